"""The lens page in a real browser: `pytest -m browser`, with Chromium installed."""

import pytest

import pscope
from pscope import Decoding
from pscope.experiments.next_token import Lens
from pscope.experiments.token_grid import TokenGrid
from pscope.show.lens_page import lens_page

pytestmark = pytest.mark.browser

TEXT = "\none two one </script><b>three</b>"
ROWS = "#grid tbody tr"


@pytest.fixture(scope="module")
def table(tiny):
    lenses = [Lens("logit lens"), Lens("described", tiny.prompt("say x"), decoding=Decoding(4))]
    return TokenGrid(tiny, tiny.prompt(TEXT), lenses).table()


@pytest.fixture
def page(from_disk, table, tiny):
    return from_disk(lens_page(table, TEXT, {"model": "tiny"}, tiny.config.vocab_size))


def cell(page, layer, place):
    """The cell of a layer, counted from 0, and a token."""
    return page.locator(f"{ROWS}:nth-last-child({layer + 1}) td:nth-of-type({place + 1})")


def rows_of(table, lens, position, layer):
    return table[(table["lens"] == lens) & (table["position"] == position) & (table["layer"] == layer)]


def test_cells_show_what_the_lens_says(page, table):
    for lens in ("logit lens", "described"):
        page.select_option("#lens", label=lens)
        for position, layer in ((1, 0), (3, 4)):
            first = rows_of(table, lens, position, layer).iloc[0]
            assert cell(page, layer, position).text_content() == first["next_token"].replace("\n", "⏎")
    assert page.locator("#grid b").count() == 0
    # The label of a row is that of its cells.
    assert page.locator("#grid tbody th").all_text_contents() == ["4", "3", "2", "1", "0"]
    assert page.locator("#grid thead th").all_text_contents()[1:4] == ["⏎", "one", " two"]


def test_hovering_and_focus_tell_more(page, table):
    page.select_option("#lens", label="described")
    cell(page, 2, 1).hover()
    detail = page.locator("#detail")
    rows = rows_of(table, "described", 1, 2)
    assert "described" in detail.locator("h2").text_content()
    assert detail.locator(".bars tr").count() == len(rows) == 5
    told = detail.text_content()
    assert f"{rows['probability'].iloc[0]:.3f}" in told
    assert rows["continuation"].iloc[0].replace("\n", "⏎") in told
    clean = table[(table["lens"] == "described") & table["position"].isna()]["continuation"].iloc[0]
    assert clean.replace("\n", "⏎") in told
    assert detail.locator("svg.plot").count() == 2


def test_arrows_move_and_enter_pins(page):
    cell(page, 4, 2).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert "at 1, layer 3" in page.locator("#detail h2").text_content()
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    pins = page.locator("#pins thead th").all_text_contents()
    assert pins == ["layer", "one at 1", pins[-1]]
    assert f"{pins[-1]}, layer 3: " in page.locator("#status").text_content()
    assert page.locator("#pins tbody tr").count() == 5
    page.keyboard.press("Escape")
    assert page.locator("#pins table").count() == 0
    # One cell can be reached with the tab key, the one that was left.
    assert page.locator("#grid tbody td[tabindex='0']").count() == 1


def test_a_token_is_found_wherever_it_is_among_the_first(page, table):
    sought = rows_of(table, "logit lens", 2, 3)["next_token"].iloc[1]
    assert sought.strip()
    page.fill("#search", sought.strip())
    logit = table[(table["lens"] == "logit lens")]
    hits = logit[logit["next_token"].str.strip().str.lower() == sought.strip().lower()]
    expected = len(hits.drop_duplicates(["position", "layer"]))
    assert page.locator("#grid td.hit").count() == expected > 0
    assert f"in {expected} of {5 * logit['position'].nunique()} cells" in page.locator("#found").text_content()
    assert "at rank 2 here" in page.locator("#grid td.hit").evaluate_all("cells => cells.map(cell => cell.title)")
    page.fill("#search", "")
    assert page.locator("#grid td.hit").count() == 0


def test_colours_follow_the_measure(page, table):
    first = rows_of(table, "logit lens", 1, 2).iloc[0]
    shade = "cell => cell.style.getPropertyValue('--v')"
    assert float(cell(page, 2, 1).evaluate(shade)) == pytest.approx(first["probability"], abs=2e-3)
    page.select_option("#measure", "agreement")
    assert float(cell(page, 2, 1).evaluate(shade)) == float(first["answer_rank"] == 1)
    agreeing = table[(table["lens"] == "logit lens") & (table["rank"] == 1) & (table["answer_rank"] == 1)]
    assert page.locator("#grid td.agrees").count() == len(agreeing)
    page.select_option("#measure", "answer")
    colours = {cell(page, layer, 1).evaluate("cell => getComputedStyle(cell).backgroundColor") for layer in range(5)}
    assert len(colours) > 1


def test_dark_and_printed(page):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(media="print")
    assert not page.locator("#controls").is_visible()


def test_two_pages_in_one_notebook_do_not_disturb_each_other(browser, tiny, tmp_path):
    pages = [pscope.lens(tiny, text, top_k=2) for text in ("one two", "three four five")]
    path = tmp_path / "notebook.html"
    path.write_text("".join(f"<div>{page._repr_html_()}</div>" for page in pages), "utf-8")
    opened = browser.new_page()
    opened.goto(path.as_uri())
    first, second = (opened.frame_locator("iframe").nth(number) for number in (0, 1))
    assert [frame.locator("#grid thead th").count() for frame in (first, second)] == [4, 5]
    first.locator("#search").fill("zzz")
    assert "in 0 of" in first.locator("#found").text_content()
    assert second.locator("#found").text_content() == ""
    opened.close()


def test_a_long_text_stays_in_reach(from_disk, tiny):
    prompt = tiny.prompt("\n" + " one two three" * 66)
    table = TokenGrid(tiny, prompt, [Lens("logit lens")], top_k=2).table()
    opened = from_disk(lens_page(table, "long", {}, tiny.config.vocab_size))
    assert opened.locator("#grid thead th").count() == 1 + len(prompt) > 190
    opened.evaluate("document.querySelector('.scroll').scrollLeft = 2000")
    # Layers stay where they are while tokens go by, and tokens while layers do.
    assert opened.locator("#grid tbody th").first.bounding_box()["x"] < 100
    opened.set_viewport_size({"width": 900, "height": 150})
    top = opened.locator(".scroll").bounding_box()["y"]
    opened.evaluate("document.querySelector('.scroll').scrollTop = 60")
    assert abs(opened.locator("#grid thead th").first.bounding_box()["y"] - top) < 5
