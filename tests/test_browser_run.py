"""The page of a run in a real browser: `pytest -m browser`, with Chromium installed."""

import pandas as pd
import pytest
from test_run_page import run_of

from pscope import run_page

pytestmark = pytest.mark.browser


def table():
    """Two subjects at four pairs of layers, and a control."""
    rows = [
        {"relation": "capital", "subject": subject, "condition": condition, "layer": layer, "target_layer": target}
        | {"found": condition == "patched" and (subject, target) != ("Peru", 0), "score": layer + target / 10}
        | {"continuation": f"{subject} {layer} {target} <b>{condition}</b>"}
        for subject in ("Peru", "Japan")
        for condition in ("patched", "random vector")
        for layer in (3, 5)
        for target in (0, 2)
    ]
    return pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})


@pytest.fixture
def page(from_disk, tmp_path):
    summary = pd.DataFrame({"relation": ["capital"], "p": [0.5]})
    run_of(tmp_path / "run", table(), {"command": "table2"}, summary=summary)
    return from_disk(run_page(tmp_path / "run").html)


def column(page, name):
    heads = page.locator("#rows thead th").all_text_contents()
    number = [head.split(" ")[0] for head in heads].index(name) + 1
    return page.locator(f"#rows tbody td:nth-of-type({number})").all_text_contents()


def test_rows_are_filtered_searched_and_sorted(page):
    assert page.locator("#count").text_content() == "16 of 16 rows"
    assert "in all rows: relation capital" in page.locator("#same").text_content()
    page.select_option("[data-column=condition]", label="patched")
    assert column(page, "condition") == ["patched"] * 8
    page.fill("#search", "JAPAN")
    assert column(page, "subject") == ["Japan"] * 4
    assert page.locator("#count").text_content() == "4 of 16 rows"
    page.click("#rows thead button:has-text('score')")
    assert column(page, "score") == ["3", "3.200", "5", "5.200"]
    page.click("#rows thead button:has-text('score')")
    assert column(page, "score") == ["5.200", "5", "3.200", "3"]
    assert page.locator("#rows th[aria-sort=descending]").count() == 1
    page.click("#clear")
    assert page.locator("#count").text_content() == "16 of 16 rows"
    assert page.locator("b:has-text('patched')").count() == 0


def test_a_cell_opens_the_rows_behind_it(page):
    page.select_option("#measure", label="found")
    # Without a word, only what is patched: controls are not averaged with it.
    assert page.locator("[data-of=condition]").input_value() == "patched"
    shades = {
        pair: float(page.locator(f"td[data-pair='{pair}']").evaluate("cell => cell.style.getPropertyValue('--v')"))
        for pair in ("3,0", "5,0", "3,2", "5,2")
    }
    assert shades == {"3,0": 0.5, "5,0": 0.5, "3,2": 1, "5,2": 1}
    assert page.locator("#shades").text_content() == "from 0.00 (light) to 1.00 (dark)"
    # Source layers to the right, target layers upwards.
    assert page.locator("#grid thead th").all_text_contents()[1:] == ["3", "5"]
    assert page.locator("#grid tbody th").all_text_contents() == ["2", "0"]
    page.click("td[data-pair='5,0']")
    assert page.locator("#count").text_content() == "2 of 16 rows, layer 5 → 0"
    assert column(page, "continuation") == ["Peru 5 0 <b>patched</b>", "Japan 5 0 <b>patched</b>"]
    page.keyboard.press("ArrowUp")
    assert "layer 5 to 2: 1" in page.locator("#cell").text_content()
    page.keyboard.press("Enter")
    assert page.locator("#count").text_content() == "2 of 16 rows, layer 5 → 2"
    page.keyboard.press("Enter")
    assert page.locator("#count").text_content() == "16 of 16 rows"
    page.select_option("[data-of=condition]", label="random vector")
    assert page.locator("#shades").text_content() == "from 0.00 (light) to 1.00 (dark)"
    page.click("td[data-pair='5,0']")
    assert column(page, "condition") == ["random vector"] * 2
    page.select_option("#table", label="summary (1)")
    assert page.locator("#cell").text_content() == ""


def test_texts_stand_side_by_side(page):
    page.select_option("#unit", label="Japan")
    assert page.locator("#texts thead th").all_text_contents() == ["layer", "patched", "random vector"]
    line = page.locator("#texts tbody tr").nth(1)
    assert line.locator("th").text_content() == "3 → 2"
    assert line.locator("td").all_text_contents() == ["✓ Japan 3 2 <b>patched</b>", "Japan 3 2 <b>random vector</b>"]
    assert line.locator("td.right").count() == 1
    page.fill("#search", "peru")
    assert page.locator("#unit option").all_text_contents() == ["Peru"]


def test_what_differs_within_a_subject_is_told_apart(from_disk, tmp_path):
    twice = pd.concat([table(), table().assign(relation="currency", continuation="yen")])
    run_of(tmp_path / "run", twice)
    opened = from_disk(run_page(tmp_path / "run").html)
    opened.select_option("#unit", label="Japan")
    heads = opened.locator("#texts thead th").all_text_contents()[1:]
    ways = ("patched", "random vector")
    assert heads == [f"{way}, relation {relation}" for relation in ("capital", "currency") for way in ways]


def test_a_printed_page_keeps_its_headings(page):
    page.emulate_media(media="print")
    assert page.locator("#rows thead button").first.is_visible()
    assert not page.locator("#after").is_visible()


def test_sorting_by_key_keeps_the_focus(page):
    page.locator("#rows thead button:has-text('score')").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "score ▲"


def test_every_table_can_be_looked_at(page):
    page.select_option("#table", label="summary (1)")
    assert column(page, "p") == ["0.5000"]
    assert not page.locator("#heat").is_visible()
    assert not page.locator("#beside").is_visible()


def test_long_tables_come_in_pieces(from_disk, tmp_path):
    long = pd.DataFrame({"number": [f"n{row}" for row in range(250)]})
    run_of(tmp_path / "run", long)
    opened = from_disk(run_page(tmp_path / "run").html)
    assert opened.locator("#where").text_content() == "1 to 100 of 250"
    opened.click("#after")
    opened.click("#after")
    assert column(opened, "number") == [f"n{row}" for row in range(200, 250)]
    assert opened.locator("#after").is_disabled()
