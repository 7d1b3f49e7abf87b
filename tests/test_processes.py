import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pandas as pd
import pytest
import torch
from conftest import random_model, run
from split import said, said_together
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import pscope


def alone(*arguments) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output


def own_lines(told: str) -> list[str]:
    """What pscope itself says, among what torchrun says when a process fails."""
    return [line for line in told.splitlines() if line.startswith("pscope: ")]


def test_two_processes_leave_the_table_of_one(tiny_folder, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text(
        "entity,reference\n" + "".join(f"{place},Town\n" for place in ("Paris", "Oslo", "Rome", "Nice", "Bonn"))
    )
    command = ("fig3", names, "--model", tiny_folder, "--layers", "0-4", "--new-tokens", 4, "--memory", 0.001, "--out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pscope"]
    line = [*torchrun, *map(str, command), str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    printed, told = process.stdout, process.stderr
    assert process.returncode == 0, told
    alone(*command, tmp_path / "one")
    tables = [pd.read_parquet(tmp_path / name / "table.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    # One of them speaks.
    assert told.count("staircase path: within") == told.count("figure: ") == 1
    assert printed.count("the maximum is an oracle") == 1
    assert re.search(r"\d+ of 55 rows", told)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others_with_one_line(killed, tmp_path, tiny_folder):
    out, many = tmp_path / "run", tmp_path / "many.csv"
    many.write_text("entity,reference\n" + "".join(f"Number {number},a number\n" for number in range(200)))
    command = ("fig3", many, "--model", tiny_folder, "--layers", "0-4", "--new-tokens", 9, "--memory", 0.002)
    with forked.two_of_pscope(*command, "--out", out) as process:
        while not (out / "parts").is_dir() or not any((out / "parts").glob("0*.parquet")):
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(forked.pid_of(killed, process), signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = own_lines(told)
    assert re.fullmatch(rf"pscope: .*kept \d+ of \d+ parts in {out}; `pscope resume {out}` goes on", line)
    assert json.loads((out / "settings.json").read_text("utf-8"))["status"].startswith("stopped by ")


def test_a_split_model_ends_as_one(tiny_folder, tmp_path):
    out, many = tmp_path / "run", tmp_path / "many.csv"
    many.write_text("entity,reference\n" + "".join(f"Number {number},a number\n" for number in range(60)))
    command = ("fig3", many, "--model", tiny_folder, "--layers", "0-4", "--new-tokens", 9, "--memory", 0.002)
    with forked.two_of_pscope(*command, "--tensor-parallel", "--out", out) as process:
        while not (out / "parts").is_dir() or not any((out / "parts").glob("0*.parquet")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(forked.pid_of(1, process), signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    (line,) = own_lines(told)
    again = f"torchrun --nproc-per-node 2 -m pscope resume {out}"
    assert re.fullmatch(rf"pscope: .*kept \d+ of \d+ parts in {out}; `{again}` goes on", line)


def test_what_all_find_wrong_is_told_once(tmp_path):
    with forked.two_of_pscope("fig2", "--tensor-parallel", "--out", tmp_path / "run") as process:
        _, told = process.communicate(timeout=120)
    (line,) = own_lines(told)
    assert "the 9 num_attention_heads of smollm2 cannot be dealt out to 2 processes" in line
    assert not (tmp_path / "run").exists()


def elsewhere(*arguments):
    """A command of which the second process stands in another folder."""
    if os.environ["RANK"] == "1":
        Path("elsewhere").mkdir()
        os.chdir("elsewhere")
    forked.command(*arguments)


def test_processes_that_see_other_folders(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--no-fit", "--model", str(tiny_folder), "--samples", "3", "--out", "run")
    with forked.two(elsewhere, "fig2", *options) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert any("process 1 does not see run; give --out in a folder that all share" in line for line in own_lines(told))


def test_a_model_that_is_split_says_the_same(tokenizer, tmp_path):
    kinds = {
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
        "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    }
    for name, (model_class, config_class, options) in kinds.items():
        model = random_model(model_class, config_class, tokenizer, **options)
        model.hf.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in kinds]
    with forked.two(said_together, *folders, str(tmp_path / "said.pt")) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    split = torch.load(tmp_path / "said.pt", weights_only=True)
    for folder in folders:
        whole = said(pscope.load(folder, device="cpu"))
        torch.testing.assert_close(split[folder].pop("logits"), whole.pop("logits"), atol=1e-4, rtol=0)
        torch.testing.assert_close(split[folder].pop("states"), whole.pop("states"), atol=1e-4, rtol=0)
        assert split[folder] == whole
        assert whole["path"] == "staircase"
