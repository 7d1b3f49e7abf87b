import errno
import json
import os
import resource
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import matplotlib.figure
import pandas as pd
import pytest
import torch
from conftest import random_model
from counting import ROW_BYTES, Counting
from transformers import LlamaConfig, LlamaForCausalLM

from pscope import PscopeError, RunError
from pscope.models.fingerprint import fingerprint
from pscope.runs.folder import Run, check_writable
from pscope.runs.parts import Parts
from pscope.runs.processes import Processes
from pscope.runs.session import Session

IDENTITY = {"model": {"fingerprint": "a"}, "data_sha256": "d", "versions": {"torch": "2", "threads": "1"}}
WHOLE = Counting().table()


@contextmanager
def session(folder, identity=IDENTITY, command="count", **options):
    """A session that ends as a command's does: `kept` is what it says when it is stopped."""
    opened = Session(folder, Processes(), **options)
    opened.kept = None
    opened.open({"command": command, "options": {"seed": 3}}, identity)
    try:
        yield opened
    except BaseException as error:
        opened.kept = opened.stop(error)
        raise
    else:
        opened.complete()


def stopping_at(number, error):
    def fault(units):
        if any(unit.name == str(number) for unit in units):
            raise error

    return fault


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_settings_table_and_figure(tmp_path):
    folder = tmp_path / "a" / "run"
    with session(folder) as opened:
        table = opened.stage("table", Counting(), {"pairs": [[1, 2]]})
        opened.run.draw(matplotlib.figure.Figure())
        pd.testing.assert_frame_equal(pd.read_csv(opened.run.note("summary", table), dtype={"unit": str}), table)
        assert json.loads(opened.run.note("texts", [{"é": 1}]).read_text("utf-8")) == [{"é": 1}]
    pd.testing.assert_frame_equal(table, WHOLE)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "table.parquet"), WHOLE)
    assert names(folder) == {
        *("settings.json", "table.parquet", "summary.csv", "texts.json", "figure.png", "figure.svg")
    }
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert (settings["status"], settings["rows"], settings["pairs"]) == ("complete", 10, [[1, 2]])
    assert settings["options"] == {"seed": 3}


def test_any_script_can_stand_in_a_figure(tmp_path):
    figure = matplotlib.figure.Figure()
    figure.suptitle("東京")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(tmp_path).draw(figure)
    assert "東京" in (tmp_path / "figure.svg").read_text("utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("full"), RuntimeError("unforeseen")])
def test_a_stopped_run_keeps_its_parts_and_is_gone_on_with(tmp_path, error):
    folder = tmp_path / "run"
    with pytest.raises(type(error)), session(folder) as opened:
        opened.stage("table", Counting(fault=stopping_at(6, error)), {})
    assert opened.kept == f"kept 3 of 5 parts in {folder}; `pscope resume {folder}` goes on"
    assert names(folder) >= {"settings.json", "parts"}
    assert pd.read_parquet(folder / "parts")["unit"].tolist() == list("012345")
    assert json.loads((folder / "settings.json").read_text())["status"] == f"stopped by {type(error).__name__}"
    again = Counting()
    with session(folder, resume=True) as opened:
        table = opened.stage("table", again, {})
    assert again.seen == list("6789")
    pd.testing.assert_frame_equal(table, WHOLE)
    assert names(folder) == {"settings.json", "table.parquet"}
    # And once more, though nothing is missing, and something was left by a process that was killed.
    idle, took = Counting(), Run(folder).settings["seconds"]
    (folder / ".123.settings.json").write_text("half")
    with session(folder, resume=True) as opened:
        pd.testing.assert_frame_equal(opened.stage("table", idle, {}), WHOLE)
    assert idle.seen == []
    assert names(folder) == {"settings.json", "table.parquet"}
    assert Run(folder).settings["seconds"] == took


def test_stages_survive_one_by_one(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), session(folder) as opened:
        opened.stage("known", Counting(4), {})
        opened.stage("table", Counting(fault=stopping_at(0, KeyboardInterrupt())), {})
    assert names(folder) >= {"known.parquet", "settings.json"}
    first, second = Counting(4), Counting()
    with session(folder, resume=True) as opened:
        pd.testing.assert_frame_equal(opened.stage("known", first, {}), Counting(4).table())
        pd.testing.assert_frame_equal(opened.stage("table", second, {}), WHOLE)
    assert (first.seen, len(second.seen)) == ([], 10)
    assert names(folder) == {"known.parquet", "table.parquet", "settings.json"}


def test_a_run_that_fails_before_its_first_part_leaves_nothing(tmp_path):
    for folder in (tmp_path / "a" / "b" / "run", tmp_path / "mine"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        with pytest.raises(ZeroDivisionError), session(folder) as opened:
            opened.stage("table", Counting(fault=stopping_at(0, ZeroDivisionError())), {})
        assert opened.kept == ""
        assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
        assert list((tmp_path / "mine").iterdir()) == []
    # Nor one of which it turned out on the way that it cannot be done as asked.
    with pytest.raises(PscopeError), session(tmp_path / "mine") as opened:
        opened.stage("known", Counting(4), {})
        raise PscopeError("nothing is known")
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_the_user_puts_into_the_folder_stays(tmp_path):
    def fault(units):
        for name in ("notes.txt", ".hidden", "mine/notes.txt", "other.parquet"):
            path = tmp_path / "run" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), session(tmp_path / "run") as opened:
        opened.stage("table", Counting(fault=fault), {})
    assert opened.kept == ""
    assert names(tmp_path / "run") == {"notes.txt", ".hidden", "mine", "other.parquet"}


def test_a_file_system_without_links_will_do(tmp_path):
    with patch("os.link", side_effect=OSError(errno.EOPNOTSUPP, "no")), session(tmp_path / "run") as opened:
        with pytest.raises(RunError, match="was taken by another run"), session(tmp_path / "run"):
            pass
        opened.stage("table", Counting(), {})
    assert names(tmp_path / "run") == {"settings.json", "table.parquet"}


def test_somebody_elses_run_beside_it_stays(tmp_path):
    def fault(units):
        (tmp_path / "runs" / "b").mkdir()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), session(tmp_path / "runs" / "a") as opened:
        opened.stage("table", Counting(fault=fault), {})
    assert names(tmp_path / "runs") == {"b"}


def test_two_runs_never_share_a_folder(tmp_path):
    folder = tmp_path / "run"
    with session(folder) as first:
        with pytest.raises(RunError, match="is being written by another run; name another with --out"):
            check_writable(folder)
        with pytest.raises(RunError, match="was taken by another run just now"), session(folder):
            pass
        with pytest.raises(RunError, match="is being written by another process"), session(folder, resume=True):
            pass
        with pytest.raises(RunError, match="is being done whole by another process"), session(folder, share=(1, 2)):
            pass
        first.stage("table", Counting(), {})
    with pytest.raises(RunError, match=f"already holds a run; .* `pscope resume {folder}`"):
        check_writable(folder)
    assert json.loads((folder / "settings.json").read_text())["status"] == "complete"


def test_shares_are_joined(tmp_path):
    folder = tmp_path / "run"
    experiments = [Counting() for _ in range(3)]
    told = []
    with session(folder, share=(2, 3), tell=told.append) as second:
        assert len(second.stage("known", Counting(4), {})) == 4
        with pytest.raises(RunError, match="shares of .* are still being done"), session(folder, resume=True):
            pass
        # The same share twice is one too many; another one may come.
        with pytest.raises(RunError, match="is being written by another process"), session(folder, share=(2, 3)):
            pass
        with session(folder, share=(3, 3)) as third:
            known = Counting(4)
            third.stage("known", known, {})
            assert known.seen == []
            assert third.stage("table", experiments[2], {}) is None
        assert second.stage("table", experiments[1], {}) is None
    assert told[-1] == f"share 2 of 3 is done; 3 of 5 parts are there; `pscope resume {folder}` joins them"
    assert [experiment.seen for experiment in experiments] == [[], list("2389"), list("45")]
    with session(folder, resume=True) as opened:
        pd.testing.assert_frame_equal(opened.stage("table", experiments[0], {}), WHOLE)
    assert experiments[0].seen == list("0167")
    with session(folder, share=(3, 3), tell=told.append) as third:
        assert third.stage("table", Counting(), {}) is None
    assert told[-1] == f"{folder} is whole already"
    with session(tmp_path / "many", share=(9, 30), tell=told.append) as ninth:
        ninth.stage("table", Counting(), {})
    assert "0 of 5 parts are there, and this share has none to do" in told[-1]
    assert names(folder) == {"known.parquet", "table.parquet", "settings.json"}


def test_what_has_changed_is_refused_unless_forced(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), session(folder) as opened:
        opened.stage("table", Counting(fault=stopping_at(2, KeyboardInterrupt())), {})
    for changed, message in (
        ({"model": {"fingerprint": "b"}}, "fingerprint a is now b; --force"),
        ({"data_sha256": "e"}, "the data have changed; --force"),
        ({"versions": {"torch": "3", "threads": "9"}}, "torch 2 is now 3; --force"),
    ):
        with pytest.raises(RunError, match=message), session(folder, {**IDENTITY, **changed}, resume=True):
            pass
    with session(folder, {**IDENTITY, "data_sha256": "e"}, resume=True, force=True) as opened:
        opened.stage("table", Counting(), {})
    assert json.loads((folder / "settings.json").read_text())["forced"] == ["the data have changed"]
    # Its table is set aside, and made of the new data.
    again = Counting()
    with session(folder, IDENTITY, resume=True, force=True) as opened:
        opened.stage("table", again, {})
    assert len(again.seen) == 10
    assert len([*folder.glob("table.before-*")]) == 1
    with pytest.raises(RunError, match="seed 3 is now 4"):
        Session(folder, Processes(), share=(1, 2)).open({"command": "count", "options": {"seed": 4}}, IDENTITY)


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_part_is_done_again(tmp_path, damage):
    folder, told = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt), session(folder) as opened:
        opened.stage("table", Counting(fault=stopping_at(6, KeyboardInterrupt())), {})
    part = folder / "parts" / "00001.parquet"
    content = part.read_bytes()
    other = (folder / "parts" / "00000.parquet").read_bytes()
    part.write_bytes({"cut": content[:-9], "other": other, "empty": b""}[damage])
    (folder / "parts" / ".123.00004.parquet").write_bytes(b"half")
    again = Counting()
    with session(folder, resume=True, tell=told.append) as opened:
        pd.testing.assert_frame_equal(opened.stage("table", again, {}), WHOLE)
    assert "part 1 was damaged, and is done again" in told
    assert again.seen == list("236789")


def test_no_bit_that_flips_changes_a_row_unseen(tmp_path):
    experiment = Counting(4)
    parts = Parts(tmp_path / "parts", [experiment.units])
    rows = experiment.read(experiment.units)
    parts.write(0, rows)
    (path,) = (tmp_path / "parts").iterdir()
    content = path.read_bytes()
    damaged = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        if parts.discard_damaged():
            damaged += 1
        else:
            pd.testing.assert_frame_equal(parts.table(), rows)
    assert damaged > 50


def test_a_damaged_table_is_told(tmp_path):
    with session(tmp_path / "run") as opened:
        opened.stage("table", Counting(), {})
    (tmp_path / "run" / "table.parquet").write_bytes(b"half")
    with pytest.raises(RunError, match="table.parquet is damaged .*; delete it, and resume"):
        Run(tmp_path / "run").table()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run: cannot read .*settings.json: No such file"),
        ("[", "settings.json is not JSON"),
        ("[1]", "is not that of a run"),
        ('{"command": 3}', "is not that of a run"),
        (json.dumps({"command": "count", **IDENTITY, "rows_per_part": {"table": "many"}}), '"rows_per_part" is'),
        (json.dumps({"command": "count", **IDENTITY, "rows_per_part": 3}), '"rows_per_part" is 3'),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(RunError, match=message), session(tmp_path, resume=True) as opened:
        opened.stage("table", Counting(), {})


@pytest.mark.parametrize("most", [9, 5, 2])
def test_with_less_memory_fewer_rows_share_a_pass(tmp_path, most):
    class Hungry(Counting):
        def read(self, units):
            rows = min(self.rows_per_pass(), sum(unit.rows for unit in units))
            if rows > most:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
            return super().read(units)

        def rows_per_part(self, rows_per_pass):
            return 20

    told = []
    hungry = Hungry()
    with session(tmp_path / "run", tell=told.append) as opened:
        pd.testing.assert_frame_equal(opened.stage("table", hungry, {}), WHOLE)
    halvings = {9: [5], 5: [5], 2: [5, 2]}[most]
    assert told[1:] == [f"out of memory: going on with {half} rows in a pass" for half in halvings]
    assert hungry.memory == halvings[-1] * ROW_BYTES


def test_memory_for_not_even_one_row(tmp_path):
    fault = patch.object(Counting, "read", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with fault, pytest.raises(torch.OutOfMemoryError), session(tmp_path / "run") as opened:
        opened.stage("table", Counting(), {})
    with pytest.raises(RuntimeError, match="else"), session(tmp_path / "run") as opened:
        opened.stage("table", Counting(fault=stopping_at(0, RuntimeError("something else"))), {})


@contextmanager
def files_of_at_most(size):
    """Within the block, no file grows beyond that many bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_part_that_does_not_fit_leaves_those_before(tmp_path):
    class Growing(Counting):
        def read(self, units):
            rows = super().read(units)
            return rows.assign(text=["".join(map(chr, range(300, 300 + row**3))) for row in rows["unit"].astype(int)])

    folder = tmp_path / "run"
    too_large = pytest.raises(RunError, match=r"cannot write .*0000\d.parquet: File too large")
    with files_of_at_most(3_000), too_large, session(folder) as opened:
        opened.stage("table", Growing(), {})
    kept = names(folder / "parts")
    assert 0 < len(kept) < 5
    assert not any(name.startswith(".") for name in kept)
    with session(folder, resume=True) as opened:
        pd.testing.assert_frame_equal(opened.stage("table", Growing(), {}), Growing().table())


def test_a_figure_that_does_not_fit_leaves_the_table(tmp_path):
    too_large = pytest.raises(RunError, match="cannot write .*figure.png: File too large")
    figure = matplotlib.figure.Figure()
    figure.text(0, 0.5, "as large as this " * 9)
    with files_of_at_most(5_000), too_large, session(tmp_path / "run") as opened:
        opened.stage("table", Counting(), {})
        opened.run.draw(figure)
    assert opened.kept.startswith(f"kept the table in {tmp_path / 'run'}")
    pd.testing.assert_frame_equal(Run(tmp_path / "run").table(), WHOLE)
    assert not any(name.startswith("figure") for name in names(tmp_path / "run"))


def test_settings_that_do_not_fit_leave_nothing_that_blocks_another_try(tmp_path):
    message = "cannot write .*run: File too large"
    with files_of_at_most(10), pytest.raises(RunError, match=message), session(tmp_path / "a" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        Run(tmp_path / "run").begin({"not": {"a": "text"}.keys()})
    assert list(tmp_path.iterdir()) == []
    # Those of the start stay when the last ones do not fit.
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RunError, match="settings.json: No space left"), session(tmp_path / "run") as opened:
        opened.stage("table", Counting(), {})
        with patch("pathlib.Path.write_text", side_effect=full):
            opened.complete()
    assert json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))["command"] == "count"
    pd.testing.assert_frame_equal(Run(tmp_path / "run").table(), WHOLE)


def test_bytes_of_a_command_line_that_are_not_utf_8_can_be_written(tmp_path):
    line = os.fsdecode(b"pscope --out caf\xe9")
    with session(tmp_path / "run", command=line) as opened:
        opened.stage("table", Counting(), {})
    assert Run(tmp_path / "run").settings["command"] == line


def test_nothing_of_the_users_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in {"full": "is not empty", "file": "is a file", "file/below": "cannot write"}.items():
        with pytest.raises(RunError, match=message):
            check_writable(tmp_path / name)
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
