"""The page of a run: what is in it is what is in the run, whatever state that is in."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from pscope.cli.app import app
from typer.testing import CliRunner

import pscope
from pscope import RunError
from pscope.runs.folder import Run
from pscope.show.page import as_line

HOSTILE = "</script><script>alert(1)</script>\u202e\x1b[31m"


def run_of(folder, table, settings=None, **notes):
    run = Run(folder)
    run.begin({"command": "fig3", "model": {"name": "tiny"}, "status": "complete", **(settings or {})})
    if table is not None:
        run.keep(table)
    for name, note in notes.items():
        run.note(name, note)
    return run


def tables_of(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)["tables"]


def unpacked(column):
    """What the script makes of a column, by another hand."""
    raw = base64.b64decode(column["packed"])
    if column["kind"] == "number":
        return [None if np.isnan(each) else each for each in np.frombuffer(raw, "<f4").tolist()]
    codes = np.frombuffer(raw, f"<u{column['size']}").tolist()
    return [column["values"][code - 1] if code else None for code in codes]


def table():
    return pd.DataFrame(
        {
            "entity": ["A", "A", "B", HOSTILE] * 100,
            "number": [f"n{row}" for row in range(400)],
            "layer": pd.array([0, 1, None, 1] * 100, dtype="Int64"),
            "target_layer": pd.array([0, 1, None, 0] * 100, dtype="Int64"),
            "found": pd.array([True, False, None, True] * 100, dtype="boolean"),
            "rouge_l": [0.5, np.nan, 0.25, 1.0] * 100,
            "continuation": ["a\nb", None, "", "é"] * 100,
        }
    ).astype({"entity": "string", "number": "string", "continuation": "string"})


def test_the_page_holds_the_tables(tmp_path):
    summary = pd.DataFrame({"layer": [0, 1], "rouge_l": [0.5, 0.75]})
    run_of(tmp_path / "run", table(), summary=summary)
    page = pscope.run_page(tmp_path / "run")
    pd.testing.assert_frame_equal(page.table(), table())
    whole, noted = tables_of(page.html)
    assert (whole["name"], whole["rows"], noted["name"]) == ("rows of the run", 400, "summary")
    for column in whole["columns"]:
        expected = [None if pd.isna(each) else each for each in table()[column["name"]]]
        if column["name"] == "entity":
            expected = [each.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b") for each in expected]
        if column["name"] == "continuation":
            expected = [each and each.replace("\n", "⏎") for each in expected]
        assert unpacked(column) == expected
    assert (whole["unit"], whole["says"], whole["pairs"]) == ("entity", "continuation", True)
    assert whole["measures"] == ["found", "rouge_l"]
    assert (noted["unit"], noted["pairs"]) == (None, False)


def test_layers_that_each_have_one_target_are_no_grid(tmp_path):
    alone = table()[(table()["target_layer"] == table()["layer"]) | table()["layer"].isna()]
    assert alone["layer"].isna().any()
    run_of(tmp_path / "run", alone)
    (whole,) = tables_of(pscope.run_page(tmp_path / "run").html)
    assert not whole["pairs"]


def test_values_of_any_kind_are_told(tmp_path):
    odd = pd.DataFrame(
        {
            "a list": [[1, 2], None],
            "a date": pd.to_datetime(["2026-01-02", None]),
            "large": [2**62, 1],
            "b": [b"x", b"y"],
        }
    )
    run_of(tmp_path / "run", odd)
    (whole,) = tables_of(pscope.run_page(tmp_path / "run").html)
    told = {column["name"]: unpacked(column) for column in whole["columns"]}
    assert told["large"] == [str(2**62), "1"]
    assert [each and each.replace(" ", "") for each in told["a list"]] == ["[12]", None]
    assert told["a date"][0].startswith("2026-01-02")
    assert told["a date"][1] is None


def test_notes_keep_their_names_and_others_files_do_no_harm(tmp_path):
    run = run_of(tmp_path / "run", table(), groups=pd.DataFrame({"group": ["None", "NA", ""]}))
    (run.folder / "mine.csv").write_bytes("a;b\n\xe9".encode("latin-1"))
    (run.folder / "empty.csv").write_text("")
    html = pscope.run_page(run.folder).html
    _, groups = tables_of(html)
    assert unpacked(groups["columns"][0]) == ["None", "NA", None]
    assert "cannot be read: empty, mine" in html


def test_a_page_leads_to_the_grid_that_stands_beside_it(tmp_path):
    run = run_of(tmp_path / "run", table(), {"command": "lens"})
    run.write_page("the grid")
    assert 'href="page.html"' not in pscope.run_page(run.folder).html
    CliRunner().invoke(app, ["show", str(run.folder)])
    assert 'href="page.html"' in (run.folder / "show.html").read_text("utf-8")


def test_a_hostile_text_is_shown_as_text(tmp_path):
    run_of(tmp_path / "run", table(), {"path": HOSTILE, "model": {"name": HOSTILE}, "options": {"source": HOSTILE}})
    html = pscope.run_page(tmp_path / "run").html
    assert html.count("<script") == html.count("</script>") == 2
    assert not {"\u202e", "\x1b"} & set(html)
    assert not re.search(r"""@import|url\(|fetch\(|XMLHttp|https?://""", html)


def test_figures_stand_in_the_page_itself(tmp_path):
    run = run_of(tmp_path / "run", table())
    run.draw(Figure(), "figure")
    (tmp_path / "run" / "figure.svg").rename(tmp_path / "run" / "heavy.svg")
    run.draw(Figure(), "other")
    html = pscope.run_page(tmp_path / "run").html
    kinds = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', html)
    assert [kind for kind, _ in kinds] == ["png", "svg+xml"]
    assert base64.b64decode(kinds[0][1]) == (tmp_path / "run" / "figure.png").read_bytes()
    assert len(re.findall("(src|href)=", html)) == 2


def test_of_a_run_at_work_there_is_what_is_finished(tmp_path):
    run = run_of(tmp_path / "run", None, {"status": "running"})
    assert tables_of(pscope.run_page(run.folder).html) == []
    parts = run.folder / "parts"
    parts.mkdir()
    for number in (0, 2):
        table()[:3].assign(number=f"part {number}").to_parquet(parts / f"{number:05}.parquet")
    (whole,) = tables_of(pscope.run_page(run.folder).html)
    assert whole["rows"] == 6
    (number,) = (column for column in whole["columns"] if column["name"] == "number")
    assert unpacked(number) == ["part 0"] * 3 + ["part 2"] * 3
    (parts / "00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="a part of .* is damaged"):
        pscope.run_page(run.folder)


def test_the_command_writes_the_page_beside_the_run(tmp_path):
    run_of(tmp_path / "run", table())
    for _ in range(2):
        result = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
        assert (result.exit_code, result.stderr) == (0, f"page: {tmp_path / 'run' / 'show.html'}\n")
    written = (tmp_path / "run" / "show.html").read_text("utf-8")
    assert written == pscope.run_page(tmp_path / "run", beside=True).html
    named = CliRunner().invoke(app, ["show", str(tmp_path / "run"), "--out", str(tmp_path / "a.html")])
    assert named.exit_code == 0
    assert (tmp_path / "a.html").read_text("utf-8") == written
    for arguments, told in (
        (["show", str(tmp_path / "run"), "--out", str(tmp_path / "a.html")], "is there already; name a new file"),
        (["show", str(tmp_path)], "is no run"),
    ):
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2
        assert told in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_blanks_are_seen():
    assert [as_line(text) for text in (" the", "\n", " ", "  ", "")] == [" the", "⏎", "␣", "␣␣", ""]
