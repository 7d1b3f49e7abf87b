"""The live demo in a real browser: `pytest -m browser`, with Chromium installed."""

import pytest
from playwright.sync_api import expect

from pscope.characters import visible
from pscope.engine.patchscope import Patchscope
from pscope.inputs.targets import shipped_targets
from pscope.show.live import TEXT

pytestmark = pytest.mark.browser

ENTITY = shipped_targets()["entity-description"]


@pytest.fixture
def opened(browser, address):
    """Pages of people who know nothing of each other, and what goes wrong in them."""
    contexts, faults, asked = [], [], []

    def open_page():
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 950}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.locator("#said .continuation").first).to_be_visible(timeout=30_000)
        return page

    yield open_page
    assert faults == []
    assert {url for url in asked if not url.startswith(address)} == set()
    assert len(asked) > 10
    for context in contexts:
        context.close()


def shows(page, demo, text, position, layer, target, at, target_layer, new_tokens=20):
    """The page comes to show what the demo says."""
    spoken = demo.say(text, position, layer, target, at, target_layer, new_tokens)
    state = f"The state of {spoken.token.strip()} (token {position}) at layer {layer}"
    what = f"{state}, patched at layer {target_layer}, says:"
    expect(page.locator("#said .what")).to_have_text(what, timeout=30_000)
    expect(page.locator("#said .continuation")).to_have_text([visible(row.continuation) for row in spoken.rows])
    return spoken


def write(page, label, text):
    box = page.locator(f"{label} textarea")
    box.fill(text)
    box.press("Enter")


def test_a_text_a_cell_a_layer_a_target(opened, demo, tiny):
    page = opened()
    shows(page, demo, TEXT, 6, 1, ENTITY.text, "last", 1)
    write(page, "#text", "one two three")
    shows(page, demo, "one two three", 3, 1, ENTITY.text, "last", 1)
    expect(page.locator("#grid thead th")).to_have_text(["layer", "⏎", "one", " two", " three"])
    page.locator('#grid td[data-position="2"][data-layer="3"]').click()
    shows(page, demo, "one two three", 2, 3, ENTITY.text, "last", 3)
    expect(page.locator("#token input")).to_have_value("2:  two")
    expect(page.locator("#layer input[type=number]")).to_have_value("3")

    def outlined():
        return page.locator("#grid td").evaluate_all(
            "cells => cells.filter(cell => getComputedStyle(cell).outlineStyle === 'solid' && !cell.matches(':hover'))"
            ".map(cell => [cell.dataset.position, cell.dataset.layer])"
        )

    page.mouse.move(0, 0)
    assert outlined() == [["2", "3"]]
    page.locator("#layer input[type=number]").fill("2")
    page.locator("#layer input[type=number]").press("Tab")
    first = shows(page, demo, "one two three", 2, 2, ENTITY.text, "last", 2)
    assert outlined() == [["2", "2"]]
    page.locator("#same input").uncheck()
    page.locator("#target-layer input[type=number]").fill("0")
    page.locator("#target-layer input[type=number]").press("Tab")
    second = shows(page, demo, "one two three", 2, 2, ENTITY.text, "last", 0)
    page.locator("#named input").click()
    page.get_by_role("option", name="summary").click()
    summary = shipped_targets()["summary"]
    third = shows(page, demo, "one two three", 2, 2, summary.text, summary.at, 0)
    expect(page.locator("#at textarea")).to_have_value(summary.at)
    assert len({spoken.rows[0].continuation for spoken in (first, second, third)}) == 3
    bars = page.locator("#said section").first.locator(".bars tr")
    expect(bars.first).to_contain_text(f"{third.rows[0].next_tokens[0][1]:.3f}")


def test_the_chosen_cell_is_in_sight(opened, demo):
    page = opened()
    write(page, "#text", "one two three " * 20)
    expect(page.locator("#grid thead th")).to_have_count(63, timeout=30_000)
    expect(page.locator('#grid td[data-position="61"][data-layer="1"]')).to_be_in_viewport(timeout=30_000)


def test_a_target_of_ones_own(opened, demo):
    page = opened()
    page.locator("#at textarea").fill("all:y")
    write(page, "#target", "y or y is")
    shows(page, demo, TEXT, 6, 1, "y or y is", "all:y", 1)
    expect(page.locator("#named input")).to_have_value("one of your own")
    expect(page.locator("#said mark")).to_have_text(["y", "y"])


def test_what_is_refused_in_one_page_is_not_seen_in_another(opened, demo):
    page, other = opened(), opened()
    write(page, "#at", "nowhere")
    refused = page.locator("#said .refused")
    expect(refused).to_contain_text("'nowhere' stands nowhere in the prompt", timeout=30_000)
    expect(page.locator("#said .continuation")).to_have_count(0)
    write(page, "#text", "one " * 70)
    expect(refused).to_contain_text("tokens; 64 are the most here", timeout=30_000)
    expect(page.locator("#grid td")).to_have_count(0)
    other.locator('#grid td[data-position="2"][data-layer="3"]').click()
    shows(other, demo, TEXT, 2, 3, ENTITY.text, "last", 3)
    assert other.locator(".refused").count() == other.locator(".toast-body").count() == 0
    write(page, "#at", "last")
    write(page, "#text", "one two")
    shows(page, demo, "one two", 2, 1, ENTITY.text, "last", 1)


def test_what_nobody_foresaw_leaves_the_server_alive(opened, demo, monkeypatch, caplog):
    page, other = opened(), opened()

    def broken(*asked):
        raise RuntimeError("broken within")

    with monkeypatch.context() as patch:
        patch.setattr(Patchscope, "generate", broken)
        page.locator('#grid td[data-position="3"][data-layer="4"]').click()
        expect(page.locator("#said .refused")).to_contain_text("nobody foresaw", timeout=30_000)
    assert "broken within" not in page.content()
    assert "broken within" in caplog.text
    other.locator('#grid td[data-position="3"][data-layer="4"]').click()
    shows(other, demo, TEXT, 3, 4, ENTITY.text, "last", 4)
    page.locator('#grid td[data-position="1"][data-layer="4"]').click()
    shows(page, demo, TEXT, 1, 4, ENTITY.text, "last", 4)


def test_hostile_texts_are_shown_as_they_are(opened, demo):
    page = opened()
    text = "<img src=x onerror=alert(1)> ${alert(2)} {{alert}} `\u202e"
    page.locator("#at textarea").fill("<b>x")
    write(page, "#target", f"{text} <b>x</b> <b>x")
    expect(page.locator("#said .refused")).to_contain_text("'<b>x' stands 2 times", timeout=30_000)
    expect(page.locator(".toast-body")).to_contain_text("<b>x", timeout=30_000)
    page.locator("#at textarea").fill("last")
    write(page, "#target", text)
    expect(page.locator("#said .target")).to_have_text(text.replace("\u202e", r"\u202e"), timeout=30_000)
    write(page, "#text", text)
    expect(page.locator("#grid thead th").nth(2)).to_have_text("<", timeout=30_000)
    assert page.locator("#grid img, #said img, #said b b, .toast-body b").count() == 0
