"""What the README and the documentation tell people to type: Python is run, and commands have the options shown."""

import re
import shlex
from pathlib import Path

import gradio
import pytest
import typer
from pscope.cli.app import app

from pscope.inputs.entities import read_entities
from pscope.inputs.queries import read_queries
from pscope.inputs.relations import read_relations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)


def commands():
    """The arguments of every line of pscope that a page shows, but for the worked example's, which its test runs."""
    lines = [(page, line.split("  #")[0]) for page in PAGES for line in "".join(blocks(page, "sh")).splitlines()]
    shown = [(page, re.search(r"(?:^|&& |-m |')pscope (.+?)'?$", line.strip())) for page, line in lines]
    return [
        pytest.param(shlex.split(found[1]), id=f"{page.stem}: {found[1]}")
        for page, found in shown
        if found and not found[1].startswith("own-token")
    ]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("page", "printed"), [("README.md", ["0 ' -> CEO", "clean "]), ("docs/python.md", ["0 ' -> CEO", "Continuations("])]
)
def test_the_python_of_a_page_runs(page, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), names)
    told = capsys.readouterr().out
    assert all(piece in told for piece in printed)


@pytest.mark.parametrize("arguments", commands())
def test_a_command_that_is_shown_has_these_options(arguments):
    group = typer.main.get_command(app)
    with group.context_class(group) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)


@pytest.mark.usefixtures("loaded_once")
def test_the_space_that_is_shown_is_launched(monkeypatch):
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **how: launched.append(page))
    (block,) = blocks(ROOT / "docs" / "space.md", "python")
    exec(compile(block, "app.py", "exec"), {})
    assert len(launched) == 1


def test_the_files_that_are_shown_are_read(tmp_path):
    page = ROOT / "docs" / "files.md"
    (entities,), (relation, queries) = blocks(page, "csv"), blocks(page, "json")
    for name, text in (("e.csv", entities), ("r.json", relation), ("q.json", queries)):
        (tmp_path / name).write_text(text)
    assert [entity.group for entity in read_entities(tmp_path / "e.csv")] == ["food", "places"]
    ((capital,), skipped) = read_relations(tmp_path / "r.json")
    assert (capital.samples[0].object, len(capital.samples[0].sources), skipped) == ("Tokyo", 2, [])
    ((query,), _) = read_queries(tmp_path / "q.json")
    assert (query.text, query.bridge) == ("The capital city of the country of origin of sushi", ("Japan",))
