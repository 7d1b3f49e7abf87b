"""What cannot be meant, or done, is told in one line, with exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "loaded_once")

NOT_UTF_8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig1", "--model", "no/such-model"], "the hub cannot be reached"),
        (["fig1", "--model", "cut.gguf"], "cannot load cut.gguf"),
        (["fig1", "--model", "short.txt"], "short.txt is a file, and not a .gguf file"),
        (["fig1", "--model", "TINY", "--at", "CFO"], "'CFO' stands nowhere in the prompt; its tokens are 0:'Amazon'"),
        (["fig1", "--model", "TINY", "--source", "cat -> cat", "--at", "cat"], "'cat' stands 2 times"),
        (["fig1", "--model", "TINY", "--at", "99"], "position 99 is outside"),
        (["fig1", "--model", "TINY", "--at-index", "99"], "position 99 is outside"),
        (["fig1", "--at-index", "1,2"], "--at-index 1,2: one token of the source is read"),
        (["fig1", "--source", "x or x", "--at", "all:x"], "--at all:x: one token of the source is read"),
        (["table3", "Bora Bora", "--at-index", "0,1"], "--at-index 0,1: one token of the source is read"),
        (["fig1", "--at-index", "CEO"], "--at-index 'CEO' is neither an index (3) nor several of them (1,2,3)"),
        (["fig1", "--at", "CEO", "--at-index", "3"], "--at and --at-index were both given; choose one"),
        (
            ["fig1", "--source", "I have 3 cats", "--at", "3"],
            "--at 3: the prompt holds '3' as text too; give --at-index 3",
        ),
        (
            ["fig1", "--model", "TINY", "--source", "at last he", "--at", "last"],
            "'last' is a word of the prompt, at [1]",
        ),
        (["fig1", "--model", "TINY", "--target", "say x x now", "--target-at", "x"], "on the command line all:x"),
        (["fig1", "--model", "TINY", "--target", "say x x now", "--target-at", "x x"], "'x x' is one word repeated"),
        (
            ["fig1", "--model", "TINY", "--target", "0 or x", "--target-at", "0"],
            "give --target-at-index 0 for the token",
        ),
        (["fig1", "--target", "typo.txt"], "--target 'typo.txt' is no file, and looks like one"),
        (["fig1", "--target", "prompts/typo"], "--target 'prompts/typo' is no file, and looks like one"),
        (["table3", "A", "--target", "my prompt.md"], "--target 'my prompt.md' is no file, and looks like one"),
        (["fig3", "--target", "prompts/typo.txt"], "--target 'prompts/typo.txt' is no file, and looks like one"),
        (["table3", "A", "--at-index", "0", "--at", "A"], "--at and --at-index were both given"),
        (["fig1", "--memory", "0"], "a positive number of GiB"),
        (["table3", "A", "--memory", "-1"], "a positive number of GiB"),
        (["fig1", "--model", "TINY", "--source", ""], "the prompt is empty"),
        (["fig1", "--model", "TINY", "--target", " "], "the prompt is empty"),
        (["fig1", "--model", "TINY", "--target-at", "dog"], "'dog' stands nowhere"),
        (["fig1", "--model", "TINY", "--layers", "5"], "layer 5 is out of range: TINY has layers 0 to 4"),
        (["fig1", "--model", "TINY", "--new-tokens", "300"], "more than the window"),
        (["fig1", "--layers", "9-3"], "'9-3' is neither a layer (8) nor a range"),
        (["fig1", "--layers", "0-99999"], "'0-99999' is neither a layer (8) nor a range"),
        (["fig1", "--layers", "a"], "'a' is neither a layer (8) nor a range"),
        (["fig1", "--top-k", "0"], "'--top-k': Input should be greater"),
        (["fig1", "--bogus"], "No such option: --bogus"),
        (["fig1", "--dtype", "int8"], "'int8' is not one of"),
        (["figure1"], "No such command 'figure1'"),
        (["fig2", "--samples", "0"], "'--samples': Input should be greater"),
        (["fig2", "--memory", "0"], "a positive number of GiB"),
        (["fig2", "--memory", "nan"], "a positive number of GiB"),
        (["fig2", "--memory", "inf"], "a positive number of GiB"),
        (["fig2", "--texts", "full"], "full is neither .jsonl"),
        (["fig2", "--texts", "empty.txt"], "empty.txt holds no text"),
        (["fig2", "--texts", "missing.txt"], "cannot read missing.txt"),
        (["fig2", "--texts", "latin.txt"], "latin.txt is not UTF-8 (line 1)"),
        (["fig2", "--texts", "latin.txt", "--dataset", "a"], "--texts and --dataset were both given"),
        (["fig2", "--dataset", "no/such-set"], "cannot read the dataset no/such-set"),
        (["fig2", "--model", "TINY", "--texts", "short.txt", "--samples", "9"], "have only 2 positions to give"),
        (["fig2", "--no-fit", "--model", "TINY", "--layers", "0-5"], "layer 5 is out of range"),
        (["fig2", "--out", "empty.txt"], "empty.txt is a file"),
        (["fig2", "--out", "empty.txt/below"], "cannot write to empty.txt/below"),
        (["fig2", "--out", "full"], "full is not empty"),
        (["table3"], "Missing argument 'entity'"),
        (["table3", " ", "--model", "TINY"], "the prompt is empty"),
        (
            ["table3", "A", "--target-layers", "some"],
            "'some' is neither a layer (8) nor a range of them (0-15), nor same",
        ),
        (["table3", "A", "--model", "TINY", "--layers", "1,5"], "layer 5 is out of range: TINY has layers 0 to 4"),
        (["table3", "A", "--model", "TINY", "--target-layers", "5"], "layer 5 is out of range"),
        (["table3", "A", "--model", "TINY", "--at", "B"], "'B' stands nowhere in the prompt"),
        (["table3", "A", "--target", "latin.txt"], "latin.txt is not UTF-8 (line 1)"),
        (["table3", "A", "--model", "TINY", "--target", "empty.txt"], "the prompt is empty"),
        (["fit", "--model", "TINY", "--steps", "3"], "--optimiser and --steps are how the tuned lens is trained"),
        (["fit", "--model", "TINY", "--optimiser", "adam", "--jacobian"], "give --tuned beside them"),
        (["table3", "long " * 300, "--model", "TINY"], "more than the window"),
        (["table3", "A", "--model", "TINY", "--reference", "?"], "the reference '?' holds no word"),
        (["fig3", "missing.json"], "cannot read missing.json"),
        (["fig3", "short.txt"], "short.txt is none of .json, .jsonl and .csv"),
        (["fig3", "broken.json"], "broken.json, line 2, column 19: not JSON"),
        (["fig3", "twice.csv"], "twice.csv, line 3: 'A' is there already, in line 2"),
        (["fig3", "mute.csv"], 'mute.csv, line 2: "reference" is empty'),
        (["fig3", "bare.csv"], "bare.csv, line 2: a record with \"reference\" is needed; it has 'entity'"),
        (["fig3", "syria.csv", "--model", "TINY"], "no entity is left: the target prompt speaks of all of them"),
        (["fig3", "mine.csv", "--model", "TINY", "--layers", "0-9"], "layer 5 is out of range"),
        (["fig3", "mine.csv", "--model", "TINY", "--new-tokens", "300"], "more than the window"),
        (["fig3", "long.csv", "--model", "TINY"], "tokens are more than the window"),
        (["fig3", "longer.csv"], 'longer.csv, line 3: "entity" has 201 characters; at most 200 are meant'),
        (["fig3", "mine.csv", "--target-layers", "-1"], "--target-layers '-1': '-1' is neither"),
        (["table2", "empty.txt"], "empty.txt holds no relation"),
        (["table2", "broken.json"], "broken.json, line 2, column 19: not JSON"),
        (["table2", "slotless.json"], "slotless.json: the template 'a' has 0 slots {}"),
        (["table2", "--said-at", "some"], "'some' is not one of 'best', 'grid', 'all'"),
        (["fig4", "--score", "half"], "'half' is not one of 'start', 'whole', 'mean'"),
        (["table2", "--target-layers", "b"], "--target-layers 'b': 'b' is neither a layer"),
        (
            ["fig4", "--target-layers", "same,3"],
            "'same' is neither a layer (8) nor a range of them (0-15), nor same or all",
        ),
        (["table2", "--samples", "2"], "'--samples': Input should be greater"),
        (["fig4", "queries.json", "--model", "TINY"], 'has no "bridge", so its hops cannot be asked alone'),
        (["fig4", "queries.json", "--query", "a", "b"], "--query stands by itself"),
        (["fig4", "queries.json", "--keep", "some"], "'some' is not one of"),
        (["fig4", "queries.json", "--keep", "all", "--model", "TINY", "--layers", "9"], "layer 9 is out of range"),
        (["fig4", "missing"], "missing holds no relation"),
        (["fig1", "--model", "TINY", "--source", NOT_UTF_8], "holds bytes that are not UTF-8"),
        (["fig1", "--model", "TINY", "--target", NOT_UTF_8], "holds bytes that are not UTF-8"),
        (["table3", "A", "--model", "TINY", "--reference", NOT_UTF_8], "holds half of a surrogate pair"),
        (["fig4", "--model", "TINY", "--query", NOT_UTF_8, "the a"], "holds bytes that are not UTF-8"),
        (["table3", "A", "--model", "TINY", "--reference", "a " * 5001], '"reference" has 10001 characters'),
        (["fig2", "--memory", "1e300"], "a positive number of GiB is needed, at most 1048576"),
        (["fig2", "--seed", "4294967296"], "'--seed': Input should be less"),
        (["fig3", "--seed", "4294967296"], "'--seed': Input should be less"),
        (["fig4", "--seed", "4294967296"], "'--seed': Input should be less"),
        (["table2", "--seed", "9" * 5000], "'--seed': Unable to parse"),
        (["fig2", "--texts", "pipe.txt"], "pipe.txt is no regular file"),
        (["fig3", "pipe.json"], "pipe.json is no regular file"),
        (["fig4", "pipe.json"], "pipe.json is no regular file"),
        (["table2", "pipe.tsv"], "pipe.tsv is no regular file"),
        (["table3", "A", "--target", "pipe.txt"], "pipe.txt is no regular file"),
        (["fig2", "--texts", "deep.jsonl"], "deep.jsonl, line 1: nested too deep"),
        (["fig3", "deep.json"], "deep.json: nested too deep"),
        (["fig4", "deep.json"], "deep.json: nested too deep"),
        (["table2", "digits.json"], "digits.json: a number has too many digits"),
        (["\x1b]0;title\x07"], "No such command '\\x1b]0;title\\x07'"),
        (["fig1", "--model", "\x1b]0;title\x07\u202e"], "\\u001b]0;title\\u0007\\u202e"),
        (["fig1", "--device", "nonsense", "--model", "TINY"], "the device 'nonsense' cannot be used"),
        (["fig1", "--device", "cuda:9", "--model", "TINY"], "the device 'cuda:9' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tiny_folder):
    os.symlink(tiny_folder, "TINY")
    Path("cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    Path("empty.txt").touch()
    Path("short.txt").write_text("a b c")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("broken.json").write_text('[{"entity": "A", "reference": "a"},\n  {"entity": "B", reference: "b"}]')
    Path("twice.csv").write_text("entity,reference\nA,a\nA,b\n")
    Path("mute.csv").write_text("entity,reference\nA,\n")
    Path("bare.csv").write_text("entity\nA\n")
    Path("syria.csv").write_text("entity,reference\nSyria,Country\n")
    Path("long.csv").write_text(f"entity,reference\nA,a\n{'𒀀' * 150},b\n")
    Path("longer.csv").write_text(f"entity,reference\nA,a\n{'a' * 201},b\n")
    Path("slotless.json").write_text('{"name": "a", "kind": "b", "template": "a"}')
    Path("queries.json").write_text('[{"first": "the a", "second": "The b of", "answer": "c"}]')
    Path("mine.csv").write_text("entity,reference\nA,a\n")
    for name in ("pipe.txt", "pipe.json", "pipe.tsv"):
        os.mkfifo(name)
    for name in ("deep.json", "deep.jsonl"):
        Path(name).write_text("[" * 100_000 + "]" * 100_000)
    Path("digits.json").write_text(f'{{"name": {"9" * 5000}}}')
    Path("full").mkdir()
    Path("full/mine").touch()
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("pscope: ")
    assert result.stderr.count("\n") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", result.stderr)
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before


def test_a_traceback_only_when_asked_for():
    result = run("--traceback", "fig1", "--layers", "a")
    assert isinstance(result.exception, ValueError)
    assert "Traceback" not in run("fig1", "--layers", "a").output


def test_an_answer_to_bad_usage_needs_no_torch():
    code = """
import sys
from pscope.cli.app import app
try:
    app(["fig1", "--layers", "x"])
finally:
    assert "torch" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1), finished.stderr


@pytest.mark.parametrize("command", ["check", "fig1", "fig2", "table2", "table3 A", "fig3", "fig4"])
def test_running_out_of_memory_names_options_that_the_command_has(command, monkeypatch):
    options = set(re.findall("--[a-z-]+", run(*command.split(), "--help").stdout))
    cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (MemoryError(), RuntimeError(cpu), torch.OutOfMemoryError("CUDA out of memory. Tried to")):
        monkeypatch.setattr("pscope.models.loading.load", Mock(side_effect=error))
        result = run(*command.split())
        assert result.exit_code == 2
        (told,) = result.stderr.splitlines()
        assert told.startswith("pscope: out of memory; try ")
        named = set(re.findall("--[a-z-]+", told))
        assert named == options & {"--memory", "--batch-tokens", "--dtype"}
    monkeypatch.setattr("pscope.models.loading.load", Mock(side_effect=RuntimeError("something else")))
    assert isinstance(run(*command.split()).exception, RuntimeError)


def test_a_text_without_quotes_is_told_to_need_them():
    for words in (["lens", "Two", "and", "two"], ["table3", "Diana", "Princess", "of", "Wales"]):
        result = run(*words)
        assert result.exit_code == 2
        assert result.stderr.strip().endswith("put a text of several words in quotes")


def test_fig4_without_a_query_whose_hops_are_known(tiny_folder, relations):
    result = run("fig4", relations, "--model", tiny_folder, "--no-chat", "--new-tokens", 2)
    assert result.exit_code == 2
    assert "the model answers both hops of none; --keep all asks them anyway" in " ".join(result.stderr.split())
