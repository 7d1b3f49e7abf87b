import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import forked
import pandas as pd
import pytest
import torch
from conftest import run
from pscope.cli import console, progress
from pscope.cli.frame import _plain
from transformers import AutoConfig

from pscope.runs.parts import Parts

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "loaded_once", "unpainted")


def done(*arguments) -> pd.DataFrame:
    """The table that a command leaves, the last option of which names its folder."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return pd.read_parquet(Path(arguments[-1]) / "table.parquet")


@pytest.fixture
def names() -> str:
    """Four entities in a file."""
    Path("names.csv").write_text("entity,reference\nNile,River\nParis,City\nOslo,City\nRome,City\n")
    return "names.csv"


def commands(relations, tiny_folder, names):
    model = ("--model", tiny_folder, "--new-tokens", 3)
    grid = ("--layers", "1,3", "--target-layers", "0,2", *model)
    return {
        "fig1": ("fig1", "--layers", "0-4", *model),
        "fig2": ("fig2", "--no-fit", "--samples", 9, "--layers", "1,3", "--model", tiny_folder),
        "fig3": ("fig3", names, *grid),
        # On a model that knows something.
        "table2": ("table2", relations, "--quick", "--layers", "4", "--target-layers", "1", "--new-tokens", 6),
        "fig4": ("fig4", relations, "--keep", "all", "--no-chat", "--cot-tokens", 3, *grid),
    }


@pytest.mark.parametrize("name", ["fig1", "fig2", "fig3", "table2", "fig4"])
def test_a_run_that_was_stopped_again_and_again_is_the_same_in_the_end(
    name, relations, tiny_folder, names, tmp_path, monkeypatch
):
    command = commands(relations, tiny_folder, names)[name]
    whole = done(*command, "--out", "whole")
    # With so little memory that it falls into many parts, each of which is the last before Ctrl-C.
    write, tight = Parts.write, ("--memory", 0.05 if name == "table2" else 0.001)
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "write", lambda *args: write(*args) or os.kill(os.getpid(), signal.SIGINT))
        stopped = run(*command, *tight, "--out", "run")
        assert stopped.exit_code == 130
        stops = 1
        while not Path("run/table.parquet").exists() and stops < 3:
            assert "`pscope resume run` goes on" in stopped.stderr
            stopped = run("resume", "run")
            stops += 1
    assert stops > 2
    again = run("resume", "run")
    assert again.exit_code == 0, again.output
    table = pd.read_parquet("run/table.parquet")
    pd.testing.assert_frame_equal(table, whole, atol=1e-5)
    if name in ("table2", "fig4"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(f"{run}/said.parquet") for run in ("run", "whole")))
    assert sorted(os.listdir("run")) == sorted(os.listdir("whole"))
    # Of a finished run the figures are drawn anew.
    figure = next(Path("run").glob("*.png"))
    figure.unlink()
    assert run("resume", "run").exit_code == 0
    assert figure.exists()
    settings = json.loads(Path("run/settings.json").read_text("utf-8"))
    assert (settings["status"], settings["options"]["memory"]) == ("complete", tight[1])


def test_a_run_that_was_killed_is_resumed(tiny_folder, tmp_path):
    out = tmp_path / "run"
    many = tmp_path / "many.csv"
    many.write_text("entity,reference\n" + "".join(f"Number {number},a number\n" for number in range(40)))
    command = ("fig3", many, "--model", tiny_folder, "--layers", "0-4", "--new-tokens", 4, "--out")
    with forked.pscope(*command, out) as process:
        while not (out / "parts" / "00001.parquet").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        # While it lives the folder is its own, even if it does nothing.
        for refused in (("resume", out), (*command, out)):
            result = run(*refused)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert "is being written by another" in result.stderr
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert json.loads((out / "settings.json").read_text("utf-8"))["status"] == "running"
    result = run(*command, out)
    assert f"already holds a run; name another with --out, or go on with `pscope resume {out}`" in result.stderr
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("0*.parquet")}
    (out / "parts" / "00001.parquet").write_bytes(b"half")
    result = run("resume", out)
    assert result.exit_code == 0, result.output
    assert "part 1 was damaged, and is done again" in result.stderr
    assert len(before) >= 2
    table = pd.read_parquet(out / "table.parquet")
    pd.testing.assert_frame_equal(table, done(*command, tmp_path / "whole"))


def test_shares_of_a_run_are_joined(relations, tiny_folder, names, tmp_path):
    command = (*commands(relations, tiny_folder, names)["fig4"], "--memory", 0.001)
    for share in ("2/3", "3/3", "1/3"):
        result = run(*command, "--shard", share, "--out", "run")
        assert result.exit_code == 0, result.output
        assert f"share {share.replace('/', ' of ')} is done" in result.stderr
        assert result.stdout == ""
    assert not Path("run/table.parquet").exists()
    # What is said follows from the scores of all, so that it is left to whoever joins them.
    assert not Path("run/said").exists()
    assert run("resume", "run").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_parquet("run/table.parquet"), done(*command, "--out", "whole"), atol=1e-5)
    pd.testing.assert_frame_equal(*(pd.read_parquet(f"{run}/said.parquet") for run in ("run", "whole")))
    other = run(*command, "--seed", 1, "--shard", "2/3", "--out", "run")
    assert "was begun with something else: seed 0 is now 1" in other.stderr


def test_what_has_changed_is_refused(tiny_folder, names, tmp_path):
    shutil.copytree(tiny_folder, "tiny")
    command = ("fig3", names, "--model", "tiny", "--layers", "1", "--new-tokens", 2, "--out", "run")
    done(*command)
    # From any folder: the settings name files by their whole path.
    os.chdir(tmp_path)
    assert run("resume", "work/run").exit_code == 0
    os.chdir("work")
    Path(names).write_text(Path(names).read_text().replace("River", "Stream"))
    result = run("resume", "run")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "run was begun with something else: the data have changed; --force goes on all the same" in result.stderr
    config = AutoConfig.from_pretrained("tiny")
    config.rms_norm_eps = 0.1
    config.save_pretrained("tiny")
    result = run("resume", "run")
    assert "fingerprint" in result.stderr
    forced = run("resume", "run", "--force")
    assert forced.exit_code == 0, forced.output
    assert set(pd.read_parquet("run/table.parquet")["reference"]) == {"Stream", "City"}
    told = json.loads(Path("run/settings.json").read_text("utf-8"))["forced"]
    assert len(told) == 2
    assert told[1] == "the data have changed"
    # Which is how it is now.
    assert run("resume", "run").exit_code == 0


def test_what_an_option_names_is_found_again(tiny_folder, names, tmp_path):
    Path("say").mkdir()
    Path("target.txt").write_text("one x two")
    Path("set").mkdir()
    Path("set/test.jsonl").write_text('{"text": "The lighthouse keeper counted eleven ships"}')
    model = ("--model", tiny_folder)
    # A folder is no target; a file is one, and from anywhere; and so is a folder of texts with its split.
    for number, (command, *options) in enumerate(
        (
            ("table3", *model, "--target", "say", "--layers", 1, "--new-tokens", 2),
            ("table3", *model, "--target", "target.txt", "--target-at", "x", "--layers", 1, "--new-tokens", 2),
            ("fig2", *model, "--no-fit", "--dataset", "set::test", "--samples", 2, "--layers", 1),
        )
    ):
        name = ("--", "-Nile") if command == "table3" else ()
        result = run(command, *options, "--out", number, *name)
        assert result.exit_code == 0, result.output
        table = pd.read_parquet(f"{number}/table.parquet")
        Path(f"{number}/table.parquet").unlink()
        os.chdir(tmp_path)
        again = run("resume", f"work/{number}", "--memory", 0.5, "--device", "cpu")
        assert again.exit_code == 0, again.output
        os.chdir("work")
        pd.testing.assert_frame_equal(pd.read_parquet(f"{number}/table.parquet"), table)
    Path("smollm2").mkdir()
    assert _plain("model", "smollm2") == "smollm2"
    assert _plain("model", "set") == str(Path("set").absolute())


def test_a_line_that_cannot_be_told_ends_no_run(monkeypatch):
    monkeypatch.setattr(console.err, "print", Mock(side_effect=BrokenPipeError))
    console.tell("half way")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "run is no run: cannot read run/settings.json: No such file"),
        ({"command": "fig9"}, "run is a run of 'fig9', which is no command that leaves one"),
        ({"command": "check"}, "run is a run of 'check', which is no command that leaves one"),
        ({"command": None}, "is not that of a run"),
        ({"options": None}, 'hold no "options"'),
        ({"options": {"new_tokens": "many"}}, "'--new-tokens': Input should be a valid integer"),
        ({"options": {"layers": "x"}}, "--layers 'x': 'x' is neither a layer"),
        ({"options": {"colour": "red"}}, "the settings have an option 'colour' that the command has not"),
        ({"options": {"layers": ["1", "2"]}}, "is neither a layer"),
        ({"options": {"memory": -1}}, "a positive number of GiB"),
    ],
)
def test_a_run_that_cannot_be_resumed(changed, message, tiny_folder, names):
    if changed is not None:
        done("fig3", names, "--model", tiny_folder, "--layers", "1", "--new-tokens", 2, "--out", "run")
        settings = json.loads(Path("run/settings.json").read_text())
        if isinstance(changed.get("options"), dict):
            changed = {"options": {**settings["options"], **changed["options"]}}
        Path("run/settings.json").write_text(json.dumps({**settings, **changed}))
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    result = run("resume", "run")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message.casefold() in result.stderr.casefold()
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "17/16", "--out", "x"], "--shard 17/16: the third of sixteen is 3/16, and the last 16/16"),
        (["--shard", "0/16", "--out", "x"], "--shard 0/16"),
        (["--shard", "three", "--out", "x"], "--shard three"),
        (["--shard", "3/16"], "--shard needs --out"),
        (["--tensor-parallel"], "--tensor-parallel needs several processes: torchrun --nproc-per-node 2 -m pscope"),
        (["--rate", "3"], "beside --dry-run"),
        (["--rate", "0", "--dry-run"], "a positive number of TFLOP/s"),
        (["--attention", "guess"], "cannot load"),
    ],
)
def test_options_that_cannot_be_meant(arguments, message, tiny_folder):
    result = run("fig2", "--no-fit", "--model", tiny_folder, "--samples", 3, *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    assert list(Path().iterdir()) == []


def test_attention_reaches_the_model(tiny_folder, names, monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: seen.append(1) or original(*args, **kw)
    )
    command = ("fig3", names, "--model", tiny_folder, "--layers", "1", "--new-tokens", 2)
    eager = done(*command, "--attention", "eager", "--out", "eager")
    assert not seen
    table = done(*command, "--out", "sdpa")
    assert seen
    pd.testing.assert_frame_equal(table, eager)


def test_a_dry_run_needs_a_config_alone_and_writes_nothing(relations, tiny_folder, names):
    (tiny_folder / "model.safetensors").unlink()
    for name, command in commands(relations, tiny_folder, names).items():
        command = ("table2", relations, "--model", tiny_folder) if name == "table2" else command
        result = run(*command, "--dry-run", "--rate", "0.001")
        assert result.exit_code == 0, result.output
        for shown in ("units", "rows", "tokens", "GiB for the weights", "FLOPs", "at 0.001 TFLOP/s"):
            assert shown in " ".join(result.stdout.split())
    assert "what the model knows" in run("table2", relations, "--model", tiny_folder, "--dry-run").stdout
    assert sorted(path.name for path in Path().iterdir()) == [names]


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress(1000, 100) as meter:
        for seconds, done_rows in (
            (0, 100),
            (10, 150),
            (40, 300),
            (75, 475),
            (100, 600),
            (181, 999),
            (182, 1000),
            (183, 1000),
        ):
            now[0] = seconds
            meter(done_rows)
    assert capsys.readouterr().err.splitlines() == [
        "150 of 1000 rows (15%), 5 rows a second, about 3 min left",
        "475 of 1000 rows (48%), 5 rows a second, about 2 min left",
        "999 of 1000 rows (100%), 4.97 rows a second, less than a minute left",
        "all 1000 rows, in 3 min",
    ]
