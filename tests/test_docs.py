"""The site has every page, every public name and every option. What MkDocs makes of them, `mkdocs build` tells."""

import re
from pathlib import Path

import pytest
from pscope.cli.app import app
from typer.main import get_command
from typer.testing import CliRunner

import pscope
from docs import hooks

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = list(get_command(app).commands)


def test_the_nav_names_every_page():
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    made = [name for name in hooks.made() if name.endswith(".md")]
    assert sorted(named) == sorted([*(path.name for path in DOCS.glob("*.md")), *made])


def test_every_public_name_stands_in_the_reference_once():
    shown = re.findall(r"^::: pscope\.(\w+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(shown) == pscope.__all__


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_command_is_told_as_by_its_help(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    told = CliRunner().invoke(app, [*command.split(), "--help"]).stdout
    options = set(re.findall(r"^│[ *]*(--[\w-]+)", told, re.MULTILINE)) - {"--help"}
    first, *sections = hooks.commands().split("\n### ")
    page = dict(section.split("\n", 1) for section in sections)[f"pscope {command}"] if command else first
    rows = re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE)
    assert options
    assert sorted(rows) == sorted(options)
    # A table has three cells in every row: what would be a fourth is escaped, or within a piece of code.
    for row in re.findall(r"^\|.*\|$", page, re.MULTILINE):
        assert len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) == 5
    assert all(f"| {default}" in page for default in re.findall(r"\[default: (.+?)\] *│", told))


def test_links_lead_where_the_site_has_what_they_name():
    text = (
        '[a](docs/scale.md#what-it-will-take) ![b](docs/fig2.png) <img src="docs/fig1.png"> [c](docs/tour.ipynb) '
        "[d](data/README.md) [e](https://arxiv.org/docs/a.md) [f](#models)"
    )
    assert hooks.linked(text, "index.md") == (
        '[a](scale.md#what-it-will-take) ![b](fig2.png) <img src="fig1.png"> [c](tour.md) '
        "[d](data.md) [e](https://arxiv.org/docs/a.md) [f](#models)"
    )
    assert hooks.linked("[a](../README.md#models) [b](scale.md)", "space.md") == "[a](index.md#models) [b](scale.md)"


def test_the_tour_is_shown_with_what_it_left():
    page = hooks.made()["tour.md"]
    assert page.startswith("# A tour")
    assert page.count("```python\n") == 10
    assert [page.count(kind) for kind in ("<iframe", "<table>", "data:image/png", "```text\n")] == [5, 2, 1, 2]
