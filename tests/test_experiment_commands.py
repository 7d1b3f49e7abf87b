"""`pscope check`, and a command for each figure and table, as a user types them."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS, random_model, run
from pscope.cli import fig4, table2
from pscope.cli.grids import GridOptions
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

import pscope

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "loaded_once")


def test_check_tells_what_a_model_is(tiny_folder, smollm2, monkeypatch):
    result = run("check", tiny_folder)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    for piece in (
        "LlamaForCausalLM, float32 on cpu",
        "0 (embedding output) to 4: LlamaDecoderLayer in model.layers",
        "32, window of 256 tokens",
        "staircase path: within",
        "none is put before a text",
        "'?' is one token, 'x' is one token",
        "ms per row on the plain path",
    ):
        assert piece in told
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads(run("check", tiny_folder, "--json").stdout)
    assert found["check"]["path"] == "staircase"
    assert found["check"]["difference"] < 1e-4
    assert found["lens_difference"] < 1e-4
    assert set(found["ms_per_row"]) == {"staircase", "plain"}
    # An attention sink, which the random model has not.
    assert 0.5 < found["first_token_norm"] < 2
    monkeypatch.setattr("pscope.engine.examine._ms_per_row", lambda *_: 1.0)
    assert json.loads(run("check", "smollm2", "--json").stdout)["first_token_norm"] > 100


def test_check_on_a_model_that_takes_the_plain_path_and_one_that_is_refused(tokenizer, tmp_path):
    mamba = random_model(MambaForCausalLM, MambaConfig, tokenizer, state_size=4).hf
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    for name, hf in (("mamba", mamba), ("bert", bert)):
        hf.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    result = run("check", tmp_path / "mamba")
    assert "plain path: on MambaForCausalLM the staircase does not run (its cache has Linear" in " ".join(
        result.stdout.split()
    )
    assert "on the staircase," not in result.stdout
    result = run("check", tmp_path / "bert")
    assert result.exit_code == 2
    assert result.stderr.startswith("pscope: BertLMHeadModel lets tokens see later ones, as masked language models do")
    assert len(result.stderr.splitlines()) == 1


def test_fig1_reads_the_ceo(tmp_path):
    result = run("fig1", "--layers", "0,5,30", "--top-k", 2, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    table = pd.DataFrame(json.loads(result.stdout))
    assert set(table["reading"]) == {"patchscope", "logit lens", "clean target"}
    early = table[(table["reading"] == "patchscope") & (table["layer"] == 5) & (table["rank"] == 1)]
    assert early["continuation"].item().startswith(" -> CEO")
    assert "staircase path" in result.stderr
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"settings.json", "table.parquet", "figure.png", "figure.svg"}
    settings = json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))
    assert settings["source_position"] == 3
    assert len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == len(table)


def test_fig1_shows_a_table_with_the_control_last(tiny_folder):
    result = run("fig1", "--model", tiny_folder, "--target", "one two x three", "--target-at", "x", "--layers", "1-2")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    # A cell that is too long goes on in a line without a layer.
    assert [layer for layer in rows if layer] == ["1", "2", "clean"]
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("fig1-")
    assert "figure: runs/fig1-" in result.stderr


def said_of(result) -> str:
    return " ".join(result.stderr.split())


@pytest.mark.usefixtures("unpainted")
def test_fig1_reads_no_attention_sink_unless_told_to(tiny_folder):
    paris = ("fig1", "--model", tiny_folder, "--source", "Paris is the capital of France", "--layers", "1")
    sink = "'Paris' is the very first token: models keep an attention sink there"
    for arguments, text, position, told in (
        (("--at", "Paris"), "\nParis is the capital of France", 1, False),
        (("--at-index", "-1"), "Paris is the capital of France", 5, False),
        (("--at-index", "0"), "Paris is the capital of France", 0, True),
    ):
        result = run(*paris, *arguments, "--out", f"run{arguments}")
        assert result.exit_code == 0, result.output
        settings = json.loads((Path(f"run{arguments}") / "settings.json").read_text("utf-8"))
        assert (settings["source"], settings["source_position"]) == (text, position)
        assert (sink in said_of(result)) == told
    result = run("table3", "Paris", "--model", tiny_folder, "--before", "", "--layers", "1")
    assert sink in said_of(result)
    Path("names.csv").write_text("entity,reference\nParis,City\nNew York,City\n")
    result = run("fig3", "names.csv", "--model", tiny_folder, "--before", "", "--layers", "1", "--new-tokens", 2)
    assert "1 of 2 names are read at the very first token" in said_of(result)


@pytest.mark.usefixtures("unpainted")
def test_positions_on_the_command_line(tiny_folder):
    Path("target.txt").write_text("say x x x x x now 3\n")
    target = ("--target", "target.txt", "--model", tiny_folder, "--layers", "1", "--memory", 0.5)
    for command, arguments, positions in (
        (("fig1",), ("--target-at", "all:x"), [1, 2, 3, 4, 5]),
        (("table3", "A", "--new-tokens", 2), ("--target-at-index", "1, 3,5"), [1, 3, 5]),
    ):
        result = run(*command, *target, *arguments, "--out", command[0])
        assert result.exit_code == 0, result.output
        settings = json.loads(Path(command[0], "settings.json").read_text("utf-8"))
        assert (settings["target_positions"], settings["target"]) == (positions, "say x x x x x now 3")
        assert settings["options"]["memory"] == 0.5


@pytest.mark.usefixtures("unpainted")
def test_rows_are_given_what_a_gpu_can_spare_unless_something_else_is_asked_for(tiny_folder, monkeypatch):
    devices, given = [], []

    def spare(of):
        devices.append(of)
        return 2**20

    def grid(*_, memory, **__):
        given.append(memory)
        raise pscope.PscopeError("seen")

    monkeypatch.setattr("pscope.experiments.token_grid.grid_of", grid)
    command = ("lens", "one two three", "--model", tiny_folder)
    run(*command)
    monkeypatch.setattr("pscope.memory.spare", spare)
    run(*command)
    run(*command, "--memory", 2)
    assert given == [2**30, 2**20, 2**31]
    assert devices == [{torch.device("cpu")}]


def test_fig2_on_the_users_texts(texts, tmp_path):
    command = ["fig2", "--no-fit", "--texts", texts, "--samples", 5, "--layers", "20,30", "--seed", 1]
    result = run(*command, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(tmp_path / "a" / "table.parquet")
    assert len(table) == 5 * 2 * 2
    assert table.groupby("text")["position"].nunique().sum() == 5
    assert table[table["layer"] == 30]["correct"].all()
    settings = json.loads((tmp_path / "a" / "settings.json").read_text("utf-8"))
    assert settings["status"] == "complete"
    assert (settings["samples"], settings["seed"], settings["layers"]) == (5, 1, [20, 30])
    assert settings["model"]["class"] == "LlamaForCausalLM"
    summary = pd.read_csv(tmp_path / "a" / "summary.csv").set_index(["lens", "layer"])
    means = table.groupby(["lens", "layer"])["correct"].mean()
    assert summary["precision_at_1"].to_dict() == pytest.approx(means.to_dict())
    for line in ("precision@1", "1.00 (0.29–1.00)"):
        assert line in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    # Never over an older one.
    again = run(*command, "--out", tmp_path / "a")
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in again.stderr


@pytest.mark.usefixtures("unpainted")
def test_fig2_options_reach_the_model(tiny_folder, texts, tmp_path):
    command = ["fig2", "--model", tiny_folder, "--texts", texts, "--samples", 4, "--dtype", "bfloat16"]
    command += ["--no-fit", "--batch-tokens", 10, "--memory", 0.001, "--seed", 1]
    result = run(*command, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))
    assert settings["model"]["dtype"] == "bfloat16"
    table = pd.read_parquet(tmp_path / "run" / "table.parquet")
    assert len(table) == 4 * 5 * 2
    # The same command with the same seed gives the same table.
    assert run(*command, "--out", tmp_path / "again").exit_code == 0
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "again" / "table.parquet"))


ENTITIES = [
    {"entity": "Syria", "reference": "Country in western Asia", "group": "popular"},
    {"entity": "Albert Einstein", "reference": "German physicist", "group": "popular"},
    {"entity": "Nile", "reference": "River in Africa", "group": "popular"},
    {"entity": "東京", "reference": "Capital of Japan", "group": "rare"},
    {"entity": "Skara Brae", "reference": "Stone Age settlement in Orkney", "group": "rare"},
]


def test_table3_resolves_a_name(tmp_path):
    command = ["table3", "Albert Einstein", "--layers", "3,8", "--reference", "German physicist"]
    result = run(*command, "--stop-at-comma", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    table = pd.DataFrame(json.loads(result.stdout))
    assert table["layer"].tolist()[:2] == [3, 8]
    assert table["condition"].tolist() == ["patched", "patched", "clean target"]
    assert table["continuation"][1] == ": Albert Einstein: German physicist"
    assert table["rouge_l"].tolist() == pytest.approx([table["rouge_l"][0], 2 / 3, 0])
    assert len(pd.read_parquet(tmp_path / "run" / "table.parquet")) == 3
    settings = json.loads((tmp_path / "run" / "settings.json").read_text("utf-8"))
    assert (settings["source"], settings["source_position"], settings["stop"]) == ("\nAlbert Einstein", 3, [","])


@pytest.mark.usefixtures("unpainted")
def test_table3_shows_a_table_with_the_control_last(tiny_folder):
    Path("target.txt").write_text("one two x three\n")
    result = run(
        *("table3", "東京", "--model", tiny_folder, "--target", "target.txt", "--target-at", "x"),
        *("--layers", "1-2", "--target-layers", "all", "--new-tokens", 2),
    )
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in result.stdout.splitlines() if "│" in line]
    targets = [str(layer) for layer in range(5)]
    assert [row for row in rows if any(row)] == [[layer, to] for layer in "12" for to in targets] + [["clean", ""]]
    (folder,) = Path("runs").iterdir()
    assert json.loads((folder / "settings.json").read_text("utf-8"))["target"] == "one two x three"


def test_fig3_on_the_users_entities(tmp_path):
    Path("mine.json").write_text(json.dumps(ENTITIES), "utf-8")
    result = run("fig3", "mine.json", "--layers", "5,8", "--seed", 1, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "left out, since the target prompt speaks of them: Syria" in result.stderr
    for shown in ("popular", "rare", "another", "written out", "the maximum is an oracle"):
        assert shown in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    folder = tmp_path / "a"
    kept = {path.name for path in folder.iterdir()}
    notes = {"summary.csv", "best_layers.csv"}
    assert kept == {"settings.json", "table.parquet", "figure.png", "figure.svg"} | notes
    table = pd.read_parquet(folder / "table.parquet")
    assert len(table) == 4 * (2 + 3 * 2)
    assert "Syria" not in set(table["entity"])
    assert not table["continuation"].str.contains(",").any()
    summary = pd.read_csv(folder / "summary.csv").set_index(["group", "condition", "layer"])
    means = table[table["condition"] == "patched"].groupby(["group", "layer"])["rouge_l"].mean()
    for (group, layer), mean in means.items():
        assert summary.loc[(group, "patched", layer), "rouge_l"] == pytest.approx(mean)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert (settings["left_out"], settings["pairs"], settings["seed"]) == (["Syria"], [[5, 5], [8, 8]], 1)


def test_fig3_with_all_target_layers_and_whole_continuations(tiny_folder, tmp_path):
    Path("mine.jsonl").write_text("\n".join(json.dumps(record) for record in ENTITIES), "utf-8")
    command = ["fig3", "mine.jsonl", "--model", tiny_folder, "--target", "one x", "--layers", "1,3", "--target-layers"]
    command += ["all", "--before", "", "--no-stop-at-comma", "--new-tokens", 3, "--memory", 0.01, "--seed", 1]
    result = run(*command, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(tmp_path / "run" / "table.parquet")
    assert len(table) == 5 * (2 + 3 * 2 * 5)
    assert (tmp_path / "run" / "figure.png").exists()
    # The same command with the same seed gives the same table.
    assert run(*command, "--out", tmp_path / "again").exit_code == 0
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "again" / "table.parquet"))


def test_table2_on_the_users_relations(relations, tmp_path):
    grid = ("--layers", "4", "--target-layers", "1,8", "--new-tokens", 8)
    result = run("table2", relations, "--quick", *grid, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "capital: 4 of 5 subjects are known, 4 are read" in result.stderr
    assert "only 4 subjects of capital: below 10" in result.stderr
    # Patched states and random vectors of four subjects, at two pairs; of the other relation too few are known.
    assert f"{4 * 2 * 2} rows will be scored" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    folder = tmp_path / "run"
    kept = {path.name for path in folder.iterdir()}
    figures = {f"{name}.{suffix}" for name in ("figure", "heatmaps") for suffix in ("png", "svg")}
    tables = {f"{stage}.parquet" for stage in ("known", "table", "said")}
    assert kept == {"settings.json", "summary.csv", "accuracy.csv"} | tables | figures
    known = pd.read_parquet(folder / "known.parquet").set_index("text")["continuation"]
    assert "Tokyo" in known["The capital city of Japan is"]
    table = pd.read_parquet(folder / "table.parquet")
    capitals = table[(table["relation"] == "capital") & (table["condition"] == "patched")]
    assert capitals["found"].mean() > 0.5
    said = pd.read_parquet(folder / "said.parquet")
    heard = said[(said["relation"] == "capital") & (said["condition"] == "patched") & said["chosen"]]
    assert len(heard) == 4
    assert all("Tokyo" in row.continuation for row in heard.itertuples() if row.subject == "Japan" and row.found)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert settings["counts"]["capital"] == [5, 4, 4]
    assert (settings["source_layers"], settings["target_layers"], settings["scored_by"]) == ([4], [1, 8], "start")
    assert set(settings["best_pairs"]["capital"]) == {"0", "1", "2"}
    summary = pd.read_csv(folder / "summary.csv").set_index(["relation", "judged"])
    assert summary.loc[("capital", "said"), "subjects"] == summary.loc[("capital", "scored"), "subjects"] == 4
    assert summary.loc[("capital", "said"), "held_out"] == heard["found"].mean()


def test_table2_tells_how_alike_scores_and_words_rank(relations, tmp_path):
    grid = ("--layers", "2,4", "--target-layers", "1,8", "--new-tokens", 8, "--said-at", "all")
    result = run("table2", relations, *grid, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    agreement = pd.read_csv(tmp_path / "run" / "agreement.csv")
    assert agreement[["relation", "ranked", "count"]].values.tolist() == [["capital", "pairs of layers", 4]]
    assert "rank correlation (Spearman)" in result.stdout


def test_table2_skips_what_the_model_does_not_know(tiny_folder, relations, tmp_path):
    (relations / "more.tsv").write_text(
        "subject\tobject\tprompt_source\tprompt_target\tposition_source\tposition_target\n"
        "A\ta\t\tx\t0\t0\nB\tc\tB\tx\t0\t0\nCat\td\tCatalan\tx\t0\t0\n"
    )
    (relations / "apart.tsv").write_text(
        "subject\tobject\tprompt_source\tprompt_target\tposition_source\tposition_target\nB\tc\tB\tno place\t0\t99\n"
    )
    result = run("table2", relations, "--model", tiny_folder, "--quick", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "apart: position 99 is outside the prompt's 2 tokens" in result.stderr
    assert "more.tsv: rows with an empty prompt_source: 1" in result.stderr
    assert "more: source prompts left out: 1, the first because 'Cat' stands only inside longer tokens" in result.stderr
    assert "food: 0 of 4 subjects are known, skipped, fewer than the 3 folds, or of one object" in result.stderr
    assert "pscope: no relation is left: the model knows too few subjects of each" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unpainted")
def test_fig4_composes_the_users_relations(relations, tmp_path):
    # On a model that knows something.
    command = ["fig4", relations, "--layers", 20, "--target-layers", 4, "--new-tokens", 8, "--cot-tokens", 1]
    result = run(*command, "--said-at", "best", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "queries: 4 composed" in result.stderr
    folder = tmp_path / "run"
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    asked = settings["counts"]["asked"]
    assert 0 < asked == settings["counts"]["both answered"] <= 4
    assert f"only {asked} queries, " in result.stderr
    assert len(json.loads((folder / "queries.json").read_text("utf-8"))) == asked
    # Rows that speak at one pair alone rank none.
    assert not (folder / "agreement.csv").exists()
    scores = pd.read_parquet(folder / "table.parquet")
    assert set(scores["answer"]) <= {"Tokyo", "Paris", "Berlin", "Cairo"}


def test_fig4_shows_what_was_said_and_how_long_it_may_be(relations, tiny_folder, tmp_path):
    command = ["fig4", relations, "--model", tiny_folder, "--keep", "all", "--layers", 3, "--target-layers", "0,1"]
    command += ["--new-tokens", 3, "--cot-tokens", 4]
    result = run(*command, "--said-at", "all", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    # The lengths stand where the numbers do.
    lengths = "step by step: 4 tokens, in the chat template; all others: 3 tokens, without it"
    assert lengths in " ".join(result.stdout.split())
    assert lengths in (tmp_path / "run" / "figure.svg").read_text("utf-8")
    for shown in ("vanilla", "step by step", "cot", "placeholder", "backpatch", "oracle"):
        assert shown in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    folder = tmp_path / "run"
    told = json.loads((folder / "queries.json").read_text("utf-8"))
    assert len(told) == 4
    assert set(told[0]["cot"]["patched"]) == {"3 → 0", "3 → 1"}
    for name in (
        *("figure.png", "heatmaps.svg", "summary.csv", "gains.csv", "agreement.csv", "table.parquet", "said.parquet"),
    ):
        assert (folder / name).exists()


@pytest.mark.usefixtures("unpainted")
def test_fig4_walks_through_one_of_the_users_queries(relations, tiny_folder):
    quick = ["fig4", relations, "--model", tiny_folder, "--keep", "all", "--no-chat", "--layers", 3]
    quick += ["--target-layers", "0,1", "--new-tokens", 3, "--cot-tokens", 3, "--said-at", "grid"]
    assert run(*quick, "--out", "all").exit_code == 0
    told = json.loads(Path("all/queries.json").read_text("utf-8"))
    assert len(told) == 4
    walk = run(*quick, "--example", 2, "--out", "walk")
    assert walk.exit_code == 0, walk.output
    assert told[1]["query"] in walk.stdout
    (walked,) = json.loads(Path("walk/queries.json").read_text("utf-8"))
    assert (walked["query"], walked["cot"]["patched"]) == (told[1]["query"], told[1]["cot"]["patched"])
    beyond = run(*quick, "--example", 5)
    assert (beyond.exit_code, beyond.stderr.count("\n")) == (2, 1)
    assert "--example 5" in beyond.stderr


@pytest.mark.usefixtures("unpainted")
def test_fig4_walks_through_a_query(tiny_folder):
    result = run(
        *("fig4", "--query", "The capital of", "the land of sushi", "--model", tiny_folder, "--no-chat"),
        *("--layers", "1,3", "--target-layers", "0", "--new-tokens", 3, "--cot-tokens", 3),
    )
    assert result.exit_code == 0, result.output
    assert "The capital of the land of sushi" in result.stdout
    assert result.stdout.count("unpatched") == 5
    assert "1 → 0" in result.stdout
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("fig4-")
    assert {path.name for path in folder.iterdir()} == {"settings.json", "table.parquet", "queries.json"}
    assert len(pd.read_parquet(folder / "table.parquet")) == 5 + 2 * (2 + 2 + 2)
    (told,) = json.loads((folder / "queries.json").read_text("utf-8"))
    assert told["query"] == "The capital of the land of sushi"
    assert set(told["cot"]["patched"]) == {"1 → 0", "3 → 0"}
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert settings["queries"] == "The capital of the land of sushi"


@pytest.mark.usefixtures("unpainted")
def test_fig2_reads_a_dataset(tiny_folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    source = ("--dataset", tmp_path / "set")
    result = run("fig2", "--no-fit", "--model", tiny_folder, *source, "--samples", 3, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert pd.read_parquet(tmp_path / "run" / "table.parquet")["text"].nunique() == 3


def test_quickly_no_more_are_asked_than_may_be_needed():
    asked = GridOptions(quick=True).asked(4, 100, seed=3)
    assert asked == sorted(set(asked))
    assert (len(asked), set(asked) <= set(range(100))) == (12, True)
    assert asked != GridOptions(quick=True).asked(4, 100, seed=4)
    assert GridOptions(quick=True).asked(4, 5, seed=3) == GridOptions().asked(4, 5, seed=3) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("quick", [False, True])
def test_rows_speak_where_they_are_scored(tiny, quick):
    grid = GridOptions(quick=quick)
    for fractions in (fig4.GRID, table2.GRID):
        assert set(grid.coarse(tiny, fractions)) <= set(grid.pairs(tiny))


def test_names_of_others_steer_no_terminal(tiny_folder, tmp_path):
    name, group = "\x1b]0;title\x07[/b]:heart:", "\u202egroup [red]"
    records = [{"entity": f"{name}{number}", "reference": "a", "group": group} for number in range(3)]
    Path("mine.json").write_text(json.dumps(records))
    command = ("--model", tiny_folder, "--layers", "1", "--new-tokens", 2)
    result = run("fig3", "mine.json", *command, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert r"\u202egroup [red]" in " ".join(result.stdout.split())
    one = run("table3", name, *command)
    assert r"\u001b]0;title\u0007[/b]:heart:" in "".join(one.stdout.split())
    for told in (result, one):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", told.output)
    as_json = run("table3", name, "--reference", "a", *command, "--json")
    assert json.loads(as_json.stdout)


@pytest.mark.usefixtures("unpainted")
def test_fig3_shows_any_number_of_groups_in_80_columns(tiny_folder, tmp_path):
    records = [
        {"entity": f"{number} {group}", "reference": "a", "group": f"the group with the name {group}"}
        for group in range(8)
        for number in range(2)
    ]
    Path("mine.json").write_text(json.dumps(records))
    result = run(
        *("fig3", "mine.json", "--model", tiny_folder, "--layers", "1,2", "--new-tokens", 2, "--out", tmp_path / "run")
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    bands = re.findall(r"\d\.\d\d \(\d\.\d\d–\d\.\d\d\)", result.stdout)
    assert len(bands) == (8 + 1) * (2 + 2)
    assert "…" not in result.stdout.split("best layer")[0]
