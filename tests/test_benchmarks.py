"""The benchmarks agree with themselves; no time is asserted."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import scores, sweep
from benchmarks.__main__ import main
from benchmarks.floor import row_products
from benchmarks.hooked import Hooked

app = Typer()
app.command()(main)


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_quick_run_of_all(folder, tmp_path):
    out = tmp_path / "results"
    command = ["--quick", "--model", str(folder), "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads((out / "results.json").read_text("utf-8"))
    assert (out / "figure.png").exists()
    logits = {row["contestant"]: row for row in told["logits"]}
    assert {"staircase", "plain path", "hooks, batches of 128", "hooks, one row"} < logits.keys()
    # Peers are told of also where they are not installed.
    assert {f"{name}, one row" for name in sweep.PEERS} < logits.keys()
    for row in [*told["logits"], *told["continuations"]]:
        if row["seconds"] is None:
            assert "absent" in result.output
        else:
            assert row["equal"] == row["rows"]
    assert [row["difference"] < 1e-3 for row in told["scores"] if "hooks" in row["contestant"]] == [True]
    assert [row["contestant"] for row in told["speaking"]] == ["waiting", "batch by batch"] * 2
    assert all(row["equal"] == row["rows"] for row in told["speaking"])
    works = {"the model's own passes", "source passes", "sweep", "continuations"}
    assert {row["work"] for row in told["floor"]} == works
    assert {row["quantity"] for row in told["exponents"]} == {"samples", "target tokens", "new tokens", "layers"}
    assert {row["phase"] for row in told["overhead"]} == {"prefill", "decode"}
    assert 0 < told["bfloat16"][1]["agreement"] <= 1
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "name another folder with --out" in again.output


def test_a_contestant_that_answers_otherwise_is_not_timed(tiny, monkeypatch):
    logits = Hooked.logits
    monkeypatch.setattr(Hooked, "logits", lambda self, states, layers: logits(self, states * 1.01, layers))
    monkeypatch.setattr(sweep, "in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="hooks, batches of 128 is .* from the staircase"):
        sweep.logits_compared(sweep.sweep_of(tiny, 1), 1, 0)


def test_scores_that_are_others_are_not_timed(tiny, monkeypatch):
    run = Hooked.run
    monkeypatch.setattr(Hooked, "run", lambda self, states, layers, forward: run(self, states * 1.1, layers, forward))
    monkeypatch.setattr(scores, "in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="hooks score .* from the staircase"):
        scores.scores_compared(sweep.sweep_of(tiny, 1), 2, 1, 0)


def test_the_floor_counts_what_the_staircase_multiplies(tiny):
    target, layers = tiny.prompt("one two three four", 1), [0, 2, 2, 4]
    products = row_products(tiny, target, layers)
    # Three tokens from the patched one on; in the four layers, the clean row and those that have joined.
    per_layer = sum(weight.numel() for weight in tiny.layers[0].parameters() if weight.ndim == 2)
    rows = [3 * 2, 3 * 2, 3 * 4, 3 * 4]
    expected = per_layer * sum(rows) + tiny.hf.lm_head.weight.numel() * 5
    assert sum(weight.numel() * count for weight, count in products) == expected
