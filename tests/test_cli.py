"""What all commands have in common: help, streams, signals, a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import forked
import pandas as pd
import pyarrow.parquet as pq
import pytest
import typer
from conftest import run
from pscope.cli.app import app
from pscope.cli.options import parse_layers, parse_shard, parse_target_layers
from pscope.cli.prompts import parse_position
from typer.testing import CliRunner

import pscope

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "loaded_once")


def test_what_marks_a_position():
    text = "say x x now 3 all:y"
    for at, index, position in (
        (None, None, -1),
        ("x", None, "x"),
        ("last", None, "last"),
        ("all:x", None, pscope.Every("x")),
        ("now 3", None, "now 3"),
        # What the prompt holds is text of it.
        ("all:y", None, "all:y"),
        ("4", None, 4),
        ("4,-1", None, [4, -1]),
        (None, "3", 3),
        (None, "-1", -1),
        (None, "1, 2", [1, 2]),
        ("9" * 5000, None, "9" * 5000),
    ):
        assert parse_position(at, index, text) == position
    assert parse_position(None, None, text, default="x") == "x"


def test_help_names_every_option_and_command(monkeypatch):
    # Wide enough that no option is broken over two lines.
    monkeypatch.setenv("COLUMNS", "200")
    commands = typer.main.get_command(app).commands
    assert len(commands) == 14
    shown = run()
    assert shown.exit_code == 0
    assert shown.stdout.strip().endswith('For example: pscope lens "The Eiffel Tower stands in the city of"')
    for name, command in commands.items():
        assert f"│ {name} " in shown.stdout
        told = run(name, "--help")
        assert told.exit_code == 0
        options = [option for param in command.params for option in (*param.opts, *param.secondary_opts)]
        assert all(option in told.stdout for option in options if option.startswith("-"))
        assert command.help.split()[0] in told.stdout


def test_help_is_legible_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], *([name, "--help"] for name in typer.main.get_command(app).commands)):
        assert max(map(len, run(*arguments).stdout.splitlines())) <= 80


def test_versions_are_told():
    told = f"pscope {version('pscope')}, torch {version('torch')}, transformers {version('transformers')}\n"
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, told)


def test_help_tells_defaults_that_are_not_constants(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command, default in (("fig1", "all"), ("table3", "the lower half"), ("fig4", "60; 10 with --quick")):
        assert f"[default: ({default})]" in run(command, "--help").stdout


@pytest.mark.usefixtures("unpainted")
def test_a_full_disk_in_the_middle_of_a_run_is_told_and_the_run_resumed(tiny_folder, texts, tmp_path, monkeypatch):
    written = []

    def full(*args, **options):
        written.append(pq_write_table(*args, **options))
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "Error writing bytes to file")

    pq_write_table = pq.write_table
    out = tmp_path / "run"
    options = ["--no-fit", "--texts", texts, "--samples", 6, "--layers", "1,3", "--memory", 0.0002]
    command = ["fig2", "--model", tiny_folder, *options]
    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        result = run(*command, "--out", out)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"pscope: cannot write {out / 'parts' / '00002.parquet'}: No space left on device; "
        f"kept 2 of 3 parts in {out}; `pscope resume {out}` goes on"
    )
    assert "Traceback" not in result.output
    settings = json.loads((out / "settings.json").read_text("utf-8"))
    assert settings["status"] == "stopped by RunError"
    kept = pd.read_parquet(out / "parts")
    resumed = run("resume", out)
    assert resumed.exit_code == 0, resumed.output
    assert run(*command, "--out", tmp_path / "whole").exit_code == 0
    table = pd.read_parquet(out / "table.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "whole" / "table.parquet"))
    pd.testing.assert_frame_equal(table[: len(kept)], kept)
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_an_ascii_stream_gets_json(tiny_folder):
    runner = CliRunner(charset="ascii")
    command = ["table3", "東京", "--model", str(tiny_folder), "--layers", "1", "--new-tokens", "2", "--json"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.isascii()
    assert len(json.loads(result.stdout)) == 2


@pytest.mark.parametrize(
    ("arguments", "encoding", "device", "exit_code", "told"),
    [
        ("fig4 --help", "ascii", os.devnull, 0, ""),
        ("figüre", "ascii", os.devnull, 2, "pscope: No such command 'fig"),
        ("--help", "utf-8", "/dev/full", 2, "pscope: No space left on device"),
    ],
)
def test_a_stream_that_cannot_take_what_is_printed(arguments, encoding, device, exit_code, told):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with open(device, "w") as stdout:
        finished = subprocess.run(
            [sys.executable, "-m", "pscope", *arguments.split()],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert finished.returncode == exit_code
    assert finished.stderr.startswith(told)
    assert finished.stderr.count("\n") == bool(told)


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]])
def test_a_stopped_command_says_what_was_kept(sent, tmp_path, tiny_folder):
    out, many = tmp_path / "run", tmp_path / "many.csv"
    many.write_text("entity,reference\n" + "".join(f"Number {number},a number\n" for number in range(400)))
    command = ("fig3", many, "--model", tiny_folder, "--layers", "0-4", "--new-tokens", 9, "--memory", 0.002)
    with forked.pscope(*command, "--out", out) as process:
        while not (out / "parts" / "00000.parquet").exists():
            assert process.poll() is None
            time.sleep(0.1)
        for number in sent:
            process.send_signal(number)
        _, told = process.communicate()
    assert process.returncode == 130
    parts = sorted((out / "parts").iterdir())
    assert len(pd.read_parquet(out / "parts")) > 0
    assert f"stopped; kept {len(parts)} of " in told
    assert f"`pscope resume {out}` goes on" in told
    assert "Traceback" not in told
    assert json.loads((out / "settings.json").read_text("utf-8"))["status"] == "stopped by KeyboardInterrupt"


def test_layers():
    assert parse_layers("0-3, 8") == [0, 1, 2, 3, 8]
    assert parse_layers("8,0-1,1") == [0, 1, 8]
    assert parse_layers(None) is None
    assert [parse_shard(text) for text in ("3/16", "16/16", None)] == [(3, 16), (16, 16), None]
    assert [parse_target_layers(text) for text in ("same", "all", "0-2,4", None)] == ["same", "all", [0, 1, 2, 4], None]
