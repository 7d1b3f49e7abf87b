"""`pscope fit`, and what `fig2`, `fig3` and `table3` read through maps, as a user types them."""

import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import run
from safetensors import safe_open

import pscope
from pscope.inputs.texts import shipped_texts
from pscope.mappings.checkpoint import Checkpoint
from pscope.mappings.storage import read_mappings
from pscope.models.states import Label

SOME = shipped_texts()[::20]


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(autouse=True)
def work(in_a_folder_of_its_own, tmp_path, monkeypatch, loaded_once):
    """A folder and a cache of one's own, and fewer texts to fit on."""
    monkeypatch.setenv("PSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pscope.inputs.texts.shipped_texts", lambda: SOME)
    return tmp_path / "work"


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.hf.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def test_maps_are_fitted_shown_and_read_as_lenses(tiny, tiny_folder):
    model = ("--model", tiny_folder)
    told = done("fit", *model, "--layers", "1,3,4", "--out", "to-last")
    mappings = read_mappings("to-last", tiny)
    assert set(mappings.maps) == {(1, 4), (3, 4), (4, 4)}
    assert len(mappings.folds) == 5
    for pair, r2 in mappings.origin.r2.items():
        assert f"{r2:.3f}" in told.stdout
        assert f"| {pair[0]} | {pair[1]} | {r2:.3f} |" in Path("to-last/README.md").read_text()
    done("fit", *model, "--to", "2", "--layers", "1", "--ridge", "0.5", "--positions", 200, "--out", "to-two")
    fixed = read_mappings("to-two", tiny)
    assert (fixed.origin.ridge, fixed.origin.positions) == ({(1, 2): 0.5}, 200)

    lines = ("--samples", 6, "--lens", "to-last", "--lens", "to-two", "--fit-to-prompt", "--random-prompts", 2)
    drawn = done("fig2", *model, *lines, "--out", "run")
    assert max(map(len, drawn.stdout.splitlines())) <= 80
    table = pd.read_parquet("run/table.parquet")
    names = ["logit lens", "tuned lens (affine)", "token identity", "fitted to the prompt", "random tokens"]
    assert list(pd.read_csv("run/summary.csv")["lens"].unique()) == [
        *names[:4],
        "affine, to-last",
        "affine, to-two",
        names[4],
    ]
    counts = table.groupby("lens").size()
    assert counts["random tokens"] == 2 * counts["token identity"] == 2 * 6 * 5
    assert table[table["lens"] == "random tokens"]["prompt"].nunique() == 2
    assert set(table[table["lens"] == "affine, to-last"]["layer"]) == {1, 3, 4}
    # The same maps, fitted by the figure itself.
    both = table.set_index(["text", "position", "layer"])
    tuned, own = (both[both["lens"] == lens] for lens in ("tuned lens (affine)", "affine, to-last"))
    pd.testing.assert_frame_equal(tuned.loc[own.index].drop(columns="lens"), own.drop(columns="lens"))
    # Fitted once; what was gone on with reads the same lenses.
    assert "fitting" in drawn.stderr
    Path("run/table.parquet").unlink()
    again = done("resume", "run")
    assert "fitting" not in again.stderr
    pd.testing.assert_frame_equal(pd.read_parquet("run/table.parquet"), table)
    Path("run/table.parquet").unlink()
    Path("to-last/folds.safetensors").unlink()
    refused = run("resume", "run")
    told, error = refused.stderr.splitlines()
    assert refused.exit_code == 2
    # Without its folds it has seen the texts that it reads.
    assert "where it reads them, it has seen them" in told
    assert "the data have changed" in error


def test_a_fit_to_the_prompt_leads_to_the_layer_that_is_read(tiny, tiny_folder):
    done("fit", "--model", tiny_folder, "--to", "prompt", "--target", "a -> a\nx", "--layers", "0,2", "--out", "maps")
    mappings = read_mappings("maps", tiny)
    assert set(mappings.maps) == {(0, 0), (2, 2)}
    assert mappings.origin.settings["into"] == "a -> a\nx"


@pytest.mark.parametrize("kind", ["--tuned", "--jacobian"])
def test_long_fits_go_on_where_they_were_stopped(kind, tiny_folder, monkeypatch):
    steps = ("--steps", 4) if kind == "--tuned" else ()
    monkeypatch.setattr("pscope.mappings.tuned._EVERY", 2)
    command = ("fit", "--model", tiny_folder, "--most", 8, "--layers", "3", kind, *steps)
    whole = done(*command, "--out", "whole")
    with monkeypatch.context() as patched:
        write = Checkpoint.write
        patched.setattr(Checkpoint, "write", lambda *of: write(*of) or os.kill(os.getpid(), signal.SIGINT))
        stopped = run(*command, "--out", "maps")
    assert stopped.exit_code == 130
    assert "the same command goes on, with --out maps" in stopped.stderr
    assert not Path("maps").exists()
    assert Path("maps.checkpoint.safetensors").exists()
    assert done(*command, "--out", "maps").stdout == whole.stdout
    assert not Path("maps.checkpoint.safetensors").exists()
    with safe_open("maps/mappings.safetensors", "pt") as one, safe_open("whole/mappings.safetensors", "pt") as two:
        names = sorted(one.keys())
        assert names == sorted(two.keys())
        for name in names:
            torch.testing.assert_close(one.get_tensor(name), two.get_tensor(name))
    if kind == "--tuned":
        assert "KL before" in whole.stdout
    else:
        assert "texts" in whole.stderr
    assert "lens, maps" in run("fig2", "--model", tiny_folder, "--no-fit", "--samples", 3, "--lens", "maps").stdout


def test_another_model_reads(tiny_folder, other_folder):
    models = ("--model", tiny_folder, "--target-model", other_folder)
    told = done("fig2", *models, "--samples", 8, "--out", "fig2")
    assert "100% of positions" in told.stderr
    assert max(map(len, told.stdout.splitlines())) <= 80
    table = pd.read_parquet("fig2/table.parquet")
    assert table["reader"].nunique() == 3
    conditions = ["mapped", "shuffled pairs", "mean state", "another text"]
    assert table[table["reader"] == f"{other_folder} reads {tiny_folder}"]["condition"].unique().tolist() == conditions
    settings = json.loads(Path("fig2/settings.json").read_text())
    assert settings["positions_paired"] == 1
    assert settings["target_model"] == str(other_folder)
    assert {"figure.png", "figure-surprisal.png", "best_pairs.csv", "summary.csv"} <= set(os.listdir("fig2"))
    assert pd.read_csv("fig2/best_pairs.csv")["condition"].tolist() == conditions
    # Maps that were fitted before, and the layers that they map.
    done("fit", *models, "--to", "same", "--layers", "0,2", "--out", "maps")
    done("fig2", *models, "--lens", "maps", "--samples", 4, "--layers", "2", "--target-layers", "same", "--out", "own")
    Path("names.csv").write_text("entity,reference\nNile,River\nParis,City\nOslo,City\nRome,City\n")
    grid = ("--layers", "0,2", "--new-tokens", 3)
    described = done("fig3", "names.csv", *models, *grid, "--out", "fig3")
    assert "source" in described.stdout
    table = pd.read_parquet("fig3/table.parquet")
    assert {"source model itself", "target model itself", "mean state", "shuffled pairs"} <= set(table["condition"])
    told = done("table3", "Oslo", *models, *grid, "--lens", "maps", "--json", "--out", "table3")
    said = table[(table["entity"] == "Oslo") & (table["condition"] == "patched")]["continuation"].tolist()
    assert [row["continuation"] for row in json.loads(told.stdout)][:2] == said
    # The same weights under another name are one model, which reads itself, unmapped.
    itself = done("table3", "Oslo", "--model", tiny_folder, "--target-model", tiny_folder, *grid, "--out", "same")
    assert itself.stdout == done("table3", "Oslo", "--model", tiny_folder, *grid, "--out", "alone").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--to", "first"], "--to first: last, same, prompt, or the number of a layer"),
        (["fit", "--to", "9"], "layer 9 is out of range"),
        (["fit", "--ridge", "some"], "--ridge some: auto, or a number from 0 on"),
        (["fit", "--ridge", "-1"], "--ridge -1: auto, or a number from 0 on"),
        (["fit", "--ridge", "nan"], "--ridge nan: auto, or a number from 0 on"),
        (["fit", "--tuned", "--jacobian"], "are two lenses; choose one"),
        (["fit", "--to", "prompt", "--target-model", "OTHER"], "so that --target-model cannot read it"),
        (["fit", "--tuned", "--to", "3"], "lead to the last layer of the same model"),
        (["fit", "--target", "a x"], "--target is for --to prompt"),
        (["fit", "--positions", "20"], "20 positions are too few for a map from width 32: 64 are needed"),
        (["fit", "--most", "1"], "all texts fall into one fold"),
        (["fit", "--to", "same"], "every layer is mapped to itself"),
        (["fit", "--layers", "7"], "layer 7 is out of range"),
        (["fit", "--out", "full"], "full is not empty"),
        (["fit", "--texts", "none.txt"], "cannot read none.txt"),
        (["fit", "--target-model", "nowhere"], "the hub cannot be reached"),
        (["fig2", "--no-fit", "--lens", "nowhere"], "nowhere is no folder or file here"),
        (["fig2", "--no-fit", "--lens", "full"], "full holds neither mappings.safetensors nor a lens"),
        (["fig2", "--target-layers", "1"], "--target-layers is for --target-model"),
        (["fig2", "--target-model", "OTHER", "--random-prompts", "2"], "leave out the options of other lines"),
        (["fig2", "--target-model", "OTHER", "--lens", "a", "--lens", "b"], "one --lens leads from"),
        (["fig2", "--target-model", "OTHER", "--target-at-index", "3"], "counts the tokens of one model"),
        (["fig2", "--target-model", "TINY"], "itself"),
        (["fit", "--jacobian", "--layers", "9"], "layer 9 is out of range"),
        (["fig2", "--random-prompts", "-1"], "Input should be greater"),
        (["fig3", "--target-model", "OTHER", "--layers", "4"], "layer 4 is out of range"),
        (["fig3", "--lens", "full"], "name it with --target-model"),
        (["table3", "--lens", "full", "Nile"], "name it with --target-model"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tiny_folder, other_folder):
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(os.listdir())
    folders = {"OTHER": str(other_folder), "TINY": str(tiny_folder)}
    named = [folders.get(argument, argument) for argument in arguments]
    result = run(*named, "--model", tiny_folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    assert sorted(os.listdir()) == before


def test_a_dry_run_leaves_maps_out_and_fits_none(tiny_folder, other_folder, tmp_path):
    done("fit", "--model", tiny_folder, "--layers", "1,2", "--out", "maps")
    Path("mine.csv").write_text("entity,reference\nNile,River\n")
    dry = ("--model", tiny_folder, "--layers", "1", "--dry-run", "--rate", "1")
    there = sorted(tmp_path.rglob("*"))
    for arguments, told in (
        (("fig2", "--lens", "maps"), ("the tuned lens: to be fitted first, on", "maps is left out of this dry run")),
        (("fig2", "--target-model", other_folder), ("maps to", "of shuffled pairs, the control,: to be fitted first")),
        (("fig3", "mine.csv", "--target-model", other_folder), ("to be fitted first",)),
        (("read", "--text", "one two", "--lens", "maps"), ("maps is left out of this dry run",)),
    ):
        result = done(*arguments, *dry)
        assert all(piece in " ".join(result.stderr.split()) for piece in told), result.stderr
        assert "FLOP" in result.stdout
    assert sorted(tmp_path.rglob("*")) == there


def test_two_lenses_of_one_name_are_refused(tiny_folder):
    done("fit", "--model", tiny_folder, "--layers", "1,2", "--out", "one/maps")
    shutil.copytree("one/maps", "two/maps")
    for command in (["lens", "one two"], ["fig2", "--no-fit", "--samples", 4]):
        result = run(*command, "--model", tiny_folder, "--lens", "one/maps", "--lens", "two/maps")
        assert result.exit_code == 2
        assert "give their folders different names" in " ".join(result.stderr.split())


def test_a_dry_run_into_a_deeper_model(tiny_folder, other_folder):
    done("fig2", "--model", other_folder, "--target-model", tiny_folder, "--dry-run", "--rate", "1")


def test_read_goes_through_maps(tiny_folder, other_folder, tiny):
    done("fit", "--model", tiny_folder, "--layers", "1,2", "--out", "maps")
    base = ("read", "--model", tiny_folder, "--text", "one two", "--target", "say x", "--new-tokens", "3", "--json")
    table = pd.DataFrame(json.loads(done(*base, "--lens", "maps").stdout))
    patched = table[table["condition"] == "patched"]
    # Layers that the maps do not lead from are left out, and those that they lead to are patched.
    assert patched[["layer", "target_layer"]].values.tolist() == [[1, 4], [2, 4]]
    maps = read_mappings("maps", tiny)
    for (_, row), layer in zip(patched.iterrows(), (1, 2), strict=True):
        state = pscope.capture(tiny, [tiny.prompt("one two")], layers=[layer])[0]
        (part,) = pscope.Patchscope(tiny, tiny.prompt("say x")).logits(maps.at((layer, 4), "one two")(state), 4)
        assert row["probability"] == pytest.approx(part.patched[0].softmax(-1).max().item(), abs=1e-5)
    across = done(*base, "--layers", "2", "--target-layers", "1", "--target-model", other_folder)
    assert [row["target_layer"] for row in json.loads(across.stdout) if row["condition"] == "patched"] == [1]
    refused = run(*base, "--layers", "2", "--target-model", other_folder, "--target-layers", "1", "--minus", "three")
    assert refused.exit_code == 2
    assert "the maps between models have a constant part" in " ".join(refused.stderr.split())
    pscope.States(torch.ones(1, 32), [Label("a", layer=3)]).to_file("three.safetensors")
    vectors = ("--vectors", "three.safetensors", "--target", "say x")
    refused = run("read", "--model", tiny_folder, *vectors, "--lens", "maps")
    assert refused.exit_code == 2
    assert "no state is of a layer that these mappings lead from" in " ".join(refused.stderr.split())
    directions = done(*base, "--layers", "2", "--lens", "maps", "--minus", "three")
    assert "a map with a constant part adds that to it" in " ".join(directions.stderr.split())


def test_a_page_with_maps_is_drawn_again_from_elsewhere(tiny_folder, tmp_path, monkeypatch):
    done("fit", "--model", tiny_folder, "--layers", "1,2", "--out", "maps")
    done("lens", "one two", "--model", tiny_folder, "--lens", "maps", "--no-describe", "--out", tmp_path / "run")
    (tmp_path / "run" / "page.html").unlink()
    monkeypatch.chdir(tmp_path)
    done("resume", "run")
    page = (tmp_path / "run" / "page.html").read_text("utf-8")
    assert ">affine, maps</option>" in page
    assert "pscope resume" not in page
