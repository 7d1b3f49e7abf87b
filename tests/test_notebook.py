"""What a notebook shows of results, and how far something has come there."""

import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest

import pscope
from pscope.experiments.layer_readout import LayerReadout
from pscope.notebook import MOST_ROWS, progress, table_in_frame

HOSTILE = "</iframe><script>alert(1)</script>\" ' \u202e"


def framed(html):
    """The page in the only frame, and the frame's own attributes."""
    found = []

    class Frames(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Frames().feed(html)
    ((tag, attributes),) = found
    assert tag == "iframe"
    return attributes["srcdoc"], attributes


def test_results_show_their_tables(tiny):
    target = tiny.prompt("say x")
    states = pscope.States.of(tiny, [tiny.prompt("one <two>")], layers=[1, 2])
    scope = pscope.Patchscope(tiny, target)
    results = [
        states,
        scope.generate(states.vectors, [1, 2], pscope.Decoding(3)),
        scope.score(states.vectors, [1, 2], " two"),
        scope.choose(states.vectors, [1, 2], [" one", " two"]),
    ]
    for result in results:
        page, attributes = framed(result._repr_html_())
        # No script of what is shown may run, and none of its styles reach the notebook.
        assert attributes["sandbox"] == ""
        for column in result.table():
            assert f"<th>{column}</th>" in page
        assert page.count("<tr>") + page.count("<tr ") == 1 + len(result.table())


def test_a_hostile_text_is_shown_as_text():
    class Result:
        def __repr__(self):
            return HOSTILE

        def table(self):
            return pd.DataFrame({"text": [HOSTILE], "more": [[HOSTILE]]})

    html = table_in_frame(Result())
    page, _ = framed(html)
    assert "<script" not in page
    assert "\u202e" not in page
    assert page.count("&lt;/iframe&gt;") == 3


def test_of_long_tables_the_first_rows_are_shown():
    class Result:
        def table(self):
            return pd.DataFrame({"row": range(MOST_ROWS + 5)})

    page, _ = framed(table_in_frame(Result()))
    assert page.count("<td>") == MOST_ROWS
    assert "and 5 more rows" in page


@pytest.fixture
def in_a_notebook(monkeypatch):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, more):
            self.done += more

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    return bars


def test_a_bar_tells_how_far_a_table_is(tiny, in_a_notebook):
    experiment = LayerReadout(tiny, tiny.prompt("say x"), tiny.prompt("one two"), [0, 2, 4])
    experiment.table()
    (bar,) = in_a_notebook
    assert bar.done == bar.options["total"] == sum(unit.rows for unit in experiment.units)


def test_nowhere_else_is_anything_shown(capfd, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with progress(10, "rows") as meter:
        assert meter(10) is None
    assert capfd.readouterr() == ("", "")
