import errno
import json
import os
import resource
import warnings
from contextlib import contextmanager

import matplotlib.figure
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_model
from transformers import LlamaConfig, LlamaForCausalLM

from pscope import RunError
from pscope.runs.folder import Run, fingerprint

FRAME = pd.DataFrame({"layer": [0, 1], "value": [0.5, 0.25]})


def test_a_run_leaves_settings_table_and_figure(tmp_path):
    with Run(tmp_path / "a" / "run", {"seed": 3}) as run:
        run.add(FRAME)
        run.add(FRAME)
        run.draw(matplotlib.figure.Figure())
    folder = tmp_path / "a" / "run"
    assert {path.name for path in folder.iterdir()} == {"settings.json", "table.parquet", "figure.png", "figure.svg"}
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert (settings["seed"], settings["status"], settings["rows"]) == (3, "complete", 4)
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "table.parquet"), pd.concat([FRAME, FRAME], ignore_index=True)
    )


def test_a_run_keeps_what_was_made_from_its_table(tmp_path):
    with Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
        run.draw(matplotlib.figure.Figure(), "more")
        pd.testing.assert_frame_equal(pd.read_csv(run.note("summary", FRAME)), FRAME)
        assert json.loads(run.note("texts", [{"é": 1}]).read_text("utf-8")) == [{"é": 1}]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("settings.json", "table.parquet", "summary.csv", "texts.json", "more.png", "more.svg")
    }


def test_any_script_can_stand_in_a_figure(tmp_path):
    figure = matplotlib.figure.Figure()
    figure.suptitle("東京")
    with warnings.catch_warnings(), Run(tmp_path / "run", {}) as run:
        warnings.simplefilter("error")
        run.add(FRAME)
        run.draw(figure)
    assert "東京" in (tmp_path / "run" / "figure.svg").read_text("utf-8")


def test_a_stopped_run_keeps_what_it_had(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
        raise KeyboardInterrupt
    assert len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == 2
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["status"] == "stopped by KeyboardInterrupt"


def test_rows_that_were_written_as_the_interrupt_came_are_kept(tmp_path, monkeypatch):
    write = pq.ParquetWriter.write_table

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
    assert run.rows == len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == 2
    assert json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))["rows"] == 2


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="early"), Run(tmp_path / "a" / "b" / "run", {}):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="early"), Run(tmp_path / "mine", {}):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_failure_to_write_is_not_hidden_by_the_clean_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *_: (tmp_path / "runs" / "b").mkdir() or 1 / 0)
    with pytest.raises(ZeroDivisionError), Run(tmp_path / "runs" / "a", {}) as run:
        run.add(FRAME)
    # Somebody else's run beside it stays.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("pscope.runs.folder.check_writable", lambda folder: None)
    with Run(tmp_path / "run", {"seed": 1}) as run:
        run.add(FRAME)
        with pytest.raises(RunError, match="taken by another run"), Run(tmp_path / "run", {"seed": 2}):
            pass
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 1


@contextmanager
def files_of_at_most(size):
    """Within the block, no file grows beyond that many bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [9_000, 20_000, 50_000])
def test_a_table_that_no_longer_fits_keeps_the_rows_before(size, tmp_path):
    frames = [
        pd.DataFrame({"n": range(100 * n, 100 * n + 100)}).assign(text=lambda f: f["n"].map(str)) for n in range(99)
    ]
    too_large = pytest.raises(RunError, match="cannot write .*table.parquet: File too large")
    with files_of_at_most(size), too_large, Run(tmp_path / "run", {}) as run:
        for frame in frames:
            run.add(frame)
    kept = pd.read_parquet(tmp_path / "run" / "table.parquet")
    assert 0 < len(kept) == run.rows < 9_900
    pd.testing.assert_frame_equal(kept, pd.concat(frames, ignore_index=True)[: len(kept)])
    assert json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))["rows"] == len(kept)


def test_a_figure_that_does_not_fit_leaves_the_table(tmp_path):
    too_large = pytest.raises(RunError, match="cannot write .*figure.png: File too large")
    figure = matplotlib.figure.Figure()
    figure.text(0, 0.5, "as large as this " * 9)
    with files_of_at_most(5_000), too_large, Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
        run.draw(figure)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"settings.json", "table.parquet"}
    assert len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == run.rows == 2


def test_settings_that_do_not_fit_leave_nothing_that_blocks_another_try(tmp_path, monkeypatch):
    with files_of_at_most(10), pytest.raises(RunError, match="cannot write .*settings.json: File too large"):
        Run(tmp_path / "a" / "run", {}).__enter__()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError), Run(tmp_path / "run", {"not": {"a": "text"}.keys()}):
        pass
    assert list(tmp_path.iterdir()) == []
    # Those of the start stay when the last ones do not fit.
    with pytest.raises(RunError, match="cannot write .*settings.json: No space left"), Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr("pathlib.Path.write_text", lambda *_: (_ for _ in ()).throw(full))
    assert json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))["status"] == "running"
    assert len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == 2


def test_bytes_of_a_command_line_that_are_not_utf_8_can_be_written(tmp_path):
    line = os.fsdecode(b"pscope --out caf\xe9")
    with Run(tmp_path / "run", {"command_line": line}) as run:
        run.add(FRAME)
    assert json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))["command_line"] == line


def test_nothing_of_the_users_is_overwritten(tmp_path):
    with Run(tmp_path / "run", {}) as run:
        run.add(FRAME)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in {
        "run": "already holds a run",
        "full": "is not empty",
        "file": "is a file",
        "file/below": "cannot write",
    }.items():
        with pytest.raises(RunError, match=message), Run(tmp_path / name, {}):
            pass
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "full").iterdir())) == 1


def test_the_fingerprint_tells_weights_apart(tiny, tokenizer):
    same = random_model(LlamaForCausalLM, LlamaConfig, tokenizer)
    assert fingerprint(same) == fingerprint(tiny)
    with torch.no_grad():
        same.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint(same) != fingerprint(tiny)
    same.hf.to(torch.bfloat16)
    assert len(fingerprint(same)) == 64
