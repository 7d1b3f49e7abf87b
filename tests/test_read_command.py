"""`pscope read` and `pscope targets`, as a user types them."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import pscope
from pscope.experiments.sweep import CLEAN, PATCHED
from pscope.inputs.targets import shipped_targets
from pscope.models.states import Label

QUICK = ["--new-tokens", "4", "--json"]


@pytest.fixture(autouse=True)
def wide(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def read(*arguments):
    return run("read", *arguments)


def rows(*arguments):
    result = read(*arguments, *QUICK)
    assert result.exit_code == 0, result.output
    return pd.DataFrame(json.loads(result.stdout))


def patched(*arguments):
    table = rows(*arguments)
    return table[table["condition"] == PATCHED].reset_index(drop=True)


def reads(model, states, target, **options):
    """What the library makes of the same."""
    return pscope.Reading(model, target, states, decoding=pscope.Decoding(4), **options).table()


def assert_reads(table, model, states, target, **options):
    expected = reads(model, states, target, **options)
    expected = expected[expected["condition"] == PATCHED]
    assert table["continuation"].tolist() == expected["continuation"].tolist()
    assert table["probability"].tolist() == pytest.approx(expected["probability"].tolist(), abs=1e-5)


def test_texts_at_several_tokens(tiny, tiny_folder):
    base = ["--model", tiny_folder, "--layers", "1,3", "--target", "say x", "--text", "one two three"]
    table = patched(*base, "--at", "two", "--at", "last")
    assert table[["source", "token", "position", "layer"]].values.tolist() == [
        ["one two three", " two", 1, 1],
        ["one two three", " two", 1, 3],
        ["one two three", " three", 2, 1],
        ["one two three", " three", 2, 3],
    ]
    prompt = tiny.prompt("one two three")
    states = pscope.States.of(tiny, [prompt], [[1, 2]], [1, 3])
    assert_reads(table, tiny, states, tiny.prompt("say x"))
    both = patched(*base, "--at", "two", "--text", "four", "--at", "last")
    assert both["token"].tolist() == [" two", " two", "four", "four"]
    every = patched(*base, "--every-token")
    assert every["token"].tolist() == [token for token in ("one", " two", " three") for _ in (1, 3)]


def test_a_chat_is_read_and_asked(tiny, tiny_folder, tmp_path):
    source, target = tmp_path / "source.json", tmp_path / "target.json"
    messages = [{"role": "user", "content": "Name the capital of France"}]
    source.write_text(json.dumps({"messages": messages}))
    asked = [{"role": "user", "content": "What is x?"}]
    target.write_text(json.dumps(asked))
    base = ["--model", tiny_folder, "--chat", source, "--at", "France", "--layers", "3"]
    table = rows(*base, "--chat-target", target, "--target-at", "x")
    states = pscope.States.of(tiny, [tiny.chat(messages, "France")], layers=[3])
    assert_reads(table[table["condition"] == PATCHED], tiny, states, tiny.chat(asked, "x"))
    (written,) = table.loc[table["condition"] == "text only", "continuation"]
    whole = tiny.chat(asked, "x").text.replace("x?", "Name the capital of France?")
    ((_, said),) = pscope.continue_prompts(tiny, [tiny.prompt(whole)], pscope.Decoding(4))
    assert written == tiny.tokenizer.decode(said)


def test_the_mean_of_some_minus_that_of_others(tiny, tiny_folder, tmp_path):
    others = tmp_path / "others.txt"
    others.write_text("a chair\nthe river\n")
    some = ["one two", "three four"]
    texts = [part for text in some for part in ("--text", text)]
    base = ["--model", tiny_folder, "--layers", "2", "--target", "say x", *texts]
    mean, rest = (
        pscope.States.of(tiny, [tiny.prompt(text) for text in of], layers=[2]).mean()
        for of in (some, ["a chair", "the river", "music for all"])
    )
    table = patched(*base, "--mean", "--minus", others, "--minus", "music for all")
    assert_reads(table, tiny, mean - rest, tiny.prompt("say x"))
    assert table["source"].tolist() == ["mean of 2"]


def test_vectors_of_a_file(tiny, tiny_folder, tmp_path):
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    save_file({"W_dec": vectors, "b": torch.zeros(3)}, tmp_path / "sae.safetensors")
    np.save(tmp_path / "one.npy", vectors[1].numpy())
    base = ["--model", tiny_folder, "--target", "words", "--target-layers", "1,2", "--scale", "0.5,2", "--norm"]
    table = patched(*base, "--vectors", f"{tmp_path / 'sae.safetensors'}:W_dec")
    states = pscope.States.from_file(tmp_path / "sae.safetensors", "W_dec")
    writing = pscope.Writing((0.5, 2.0), norm=True)
    target = tiny.prompt(shipped_targets()["words"].text, pscope.Every("X"))
    assert_reads(table, tiny, states, target, target_layers=[1, 2], writing=writing)
    one = patched(*base, "--vectors", tmp_path / "one.npy")
    assert one["continuation"].tolist() == table["continuation"].tolist()[4:]


def test_the_difference_of_two_finetunes(tiny, tiny_folder, tmp_path):
    finetune = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        finetune.model.layers[0].mlp.down_proj.weight *= 3
    finetune.save_pretrained(tmp_path / "tuned")
    tiny.tokenizer.save_pretrained(tmp_path / "tuned")
    table = patched(
        *("--model", tiny_folder, "--difference", tmp_path / "tuned", "--text", "one two", "--layers", "0,2"),
        *("--target", "say x", "--add"),
    )
    other = pscope.load(finetune, tiny.tokenizer)
    prompt = tiny.prompt("one two")
    apart = pscope.States.of(other, [prompt], layers=[0, 2]) - pscope.States.of(tiny, [prompt], layers=[0, 2])
    assert not apart.vectors[0].any()
    assert_reads(table, tiny, apart, tiny.prompt("say x"), writing=pscope.Writing(add=True))


def test_an_adapter_on_the_target_alone(tiny, tiny_folder, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "lora")
    table = patched(
        *("--model", tiny_folder, "--target-adapter", tmp_path / "lora", "--text", "one two", "--layers", "1,2"),
        *("--target", "say x"),
    )
    states = pscope.States.of(tiny, [tiny.prompt("one two")], layers=[1, 2])
    model = pscope.load(adapted.eval(), tiny.tokenizer)
    assert_reads(table, model, states, model.prompt("say x"))
    assert table["continuation"].tolist() != reads(tiny, states, tiny.prompt("say x"))["continuation"].tolist()[:2]
    result = read("--model", tiny_folder, "--target-adapter", tmp_path, "--text", "a")
    assert result.exit_code == 2
    assert "is no adapter of peft's: it has no adapter_config.json and no" in " ".join(result.output.split())


def test_vectors_of_layers_are_chosen_and_subtracted_layer_by_layer(tiny, tiny_folder):
    prompts = [tiny.prompt(text) for text in ("one two", "three four")]
    states = pscope.States.of(tiny, prompts, layers=[1, 3])
    states.to_file("both.safetensors")
    states.mean().to_file("mean.safetensors")
    base = ["--model", tiny_folder, "--target", "say x"]
    only = patched(*base, "--vectors", "both.safetensors", "--layers", "3")
    assert_reads(only, tiny, states.at(3), tiny.prompt("say x"))
    less = patched(*base, "--vectors", "both.safetensors", "--layers", "3", "--minus", "mean.safetensors")
    assert_reads(less, tiny, states.at(3) - states.mean(), tiny.prompt("say x"))
    text = patched(*base, "--text", "one two", "--layers", "3", "--minus", "mean.safetensors")
    assert text["continuation"][0] == less["continuation"][0]
    words = patched(*base, "--vectors", "both.safetensors", "--layers", "3", "--minus", "a chair")
    chair = pscope.States.of(tiny, [tiny.prompt("a chair")], layers=[3])
    assert_reads(words, tiny, states.at(3) - chair.mean(), tiny.prompt("say x"))


def test_shares_of_a_chat_are_joined_from_elsewhere(smollm2, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "work" / "chat.json").write_text('[{"role": "user", "content": "one two"}]')
    base = ["--model", tiny_folder, "--chat", "chat.json", "--at", "one", "--layers", "0,1,2", "--target", "say x"]
    base += ["--temperature", "1.5", "--times", "2", "--new-tokens", "4", "--no-assistant-turn"]
    whole = read(*base, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    for share in ("1/2", "2/2"):
        assert read(*base, "--out", tmp_path / "shares", "--shard", share).exit_code == 0
    monkeypatch.chdir(tmp_path)
    joined = run("resume", tmp_path / "shares")
    assert joined.exit_code == 0, joined.output
    assert "damaged" not in joined.output
    tables = [pd.read_parquet(tmp_path / name / "table.parquet") for name in ("whole", "shares")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0].groupby(["condition", "layer"])["continuation"].nunique().max() == 2
    assert set(tables[0]["source"].dropna()) == {"chat.json"}


def test_what_is_told_on_a_terminal_and_kept(tiny_folder):
    result = read("--model", tiny_folder, "--text", "one two", "--layers", "1", "--relevance", "--out", "kept")
    assert result.exit_code == 0, result.output
    for piece in ("'one two' at 1:' two'", "a random vector says", "nothing patched", "text only: one two"):
        assert piece in result.stdout
    table = pd.read_parquet("kept/table.parquet")
    assert table["condition"].tolist() == [PATCHED, "random vector", CLEAN, "text only"]
    again = run("resume", "kept")
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout


def test_a_dry_run_needs_no_states(tiny_folder):
    result = read("--model", tiny_folder, "--text", "one two", "--mean", "--minus", "three", "--dry-run", "--rate", "1")
    assert result.exit_code == 0, result.output
    assert "7 in 2 parts" in result.stdout


def test_a_name_that_no_target_has_is_told(tiny_folder):
    command = ("--model", tiny_folder, "--text", "one two", "--layers", "1", *QUICK)
    for target, told in (("nosuchname", True), ("words", False), ("One word", False)):
        result = read(*command, "--target", target)
        assert result.exit_code == 0, result.output
        assert (f"--target {target} is patched as a text" in " ".join(result.stderr.split())) == told


def test_attention_sinks_are_told(tiny_folder):
    told = read("--model", tiny_folder, "--text", "one two", "--layers", "1", "--at", "0", *QUICK)
    assert "whose state says nothing of it" in " ".join(told.stderr.split())
    patched = read("--model", tiny_folder, "--text", "one two", "--layers", "1", "--target", "x is", "--target-at", "x")
    assert "what is patched over it may derail them" in " ".join(patched.stderr.split())
    assert (told.exit_code, patched.exit_code) == (0, 0)


def test_targets_are_listed_and_marked(smollm2):
    result = run("targets", "--json")
    listed = json.loads(result.stdout)
    assert {"token-identity", "entity-description", "summary", "meaning", "words", "country-capital"} <= listed.keys()
    assert run("targets").stdout.count("table2") == 15
    from pscope.cli.prompts import TargetOptions

    for name, target in shipped_targets().items():
        prompt = TargetOptions(name).prompt(smollm2, "")
        assert prompt.text == target.text
        assert {prompt.tokens[position].strip() for position in prompt.positions} <= {"x", "X", "?"}
    assert len(TargetOptions("summary").prompt(smollm2, "").positions) == 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is nothing to read"),
        (["--vectors", "v.npy", "--text", "a"], "give one or the other"),
        (["--vectors", "v.npy", "--every-token"], "--every-token is of texts"),
        (["--text", "a", "--at", "a", "--every-token"], "choose one"),
        (["--text", "a", "--text", "a"], "a text is given twice"),
        (["--text", "a", "--text", "b", "--text", "c", "--at", "a", "--at", "b"], "2 times --at for 3 texts"),
        (["--text", "a b", "--at", "c"], "'c' stands nowhere in the prompt"),
        (["--text", "a", "--target", "say x", "--target-at", "q"], "'q' stands nowhere in the prompt"),
        (["--text", "a", "--target", "axes x", "--target-at", "xes"], "only inside longer tokens"),
        (["--text", "a", "--target", "entity-descripton"], "did you mean entity-description?"),
        (["--text", "a", "--target", "say x", "--chat-target", "chat.json"], "choose one"),
        (["--text", "a", "--scale", "1,x"], "--scale 1,x: a number, or several"),
        (["--text", "a", "--scale", "1,1"], "given twice"),
        (["--text", "a", "--hold", "9"], "layer 9 is out of range"),
        (["--text", "a", "--times", "3"], "without a temperature"),
        (["--text", "a", "--minus", "none.txt"], "none.txt holds no text"),
        (["--text", "a", "--minus", ""], "the prompt is empty"),
        (["--text", "a", "--minus", "words.csv"], "--minus 'words.csv' is no file, and looks like one"),
        (["--text", "a", "--minus", "a"], "nothing is left to read"),
        (["--text", "a", "--minus", "v.npy", "--minus", "v.npy"], "give one file of them"),
        (["--vectors", "v.npy", "--layers", "1,2"], "vectors are of one layer, or of none"),
        (["--vectors", "v.npy", "--layers", "9"], "layer 9 is out of range"),
        (["--text", "a", "--target-adapter", "v"], "is no adapter of peft's"),
        (["--vectors", "v.npy"], "'v' is of no layer"),
        (["--vectors", "v.npy", "--minus", "a", "--target-layers", "1"], "say by --layers of which"),
        (["--vectors", "v.npy", "--target-model", "other", "--target-layers", "1"], "say by --layers of which the"),
        (["--vectors", "one.safetensors", "--layers", "2"], "--layers 2: none of States("),
        (["--text", "one two", "--difference", "starting"], "cuts 'one two' into other tokens: no finetune"),
        (["--vectors", "narrow.npy", "--target-layers", "1"], "vectors of width 8 do not fit"),
        (["--vectors", "nan.npy", "--target-layers", "1"], "row 0 of nan.npy is not finite"),
        (["--vectors", "there.npy", "--target-layers", "1"], "cannot read there.npy"),
        (["--vectors", "v.pt", "--target-layers", "1"], "neither .safetensors nor .npy"),
        (["--chat", "chat.json", "--at", "zzz"], "'zzz' stands nowhere in the prompt"),
        (["--chat", "none.txt"], "not JSON"),
        (["--chat", "odd.json"], 'odd.json, message 1: a record with "role" is needed'),
        (["--text", "a", "--difference", "other"], "two finetunes of one model are meant"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, tiny_folder, tmp_path, other_folder, bos_eos_tokenizer):
    np.save("v.npy", np.ones(32, dtype="float32"))
    np.save("narrow.npy", np.ones(8, dtype="float32"))
    np.save("nan.npy", np.full(32, np.nan))
    (tmp_path / "work" / "none.txt").write_text("\n")
    (tmp_path / "work" / "chat.json").write_text('[{"role": "user", "content": "x"}]')
    (tmp_path / "work" / "odd.json").write_text('[{"content": "x"}]')
    pscope.States(torch.ones(1, 32), [Label("a", layer=1)]).to_file("one.safetensors")
    shutil.copytree(tiny_folder, "starting")
    bos_eos_tokenizer.save_pretrained("starting")
    arguments = [other_folder if argument == "other" else argument for argument in arguments]
    result = read("--model", tiny_folder, *arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())
    assert result.stderr.strip().startswith("pscope: ")
    assert "Traceback" not in result.output


def test_a_planted_direction_is_found(tiny, tiny_folder):
    """The last layer, read at the last token, says the token whose unembedding a vector is."""
    token = tiny.tokenizer("planted").input_ids[0]
    np.save("planted.npy", 10 * tiny.hf.get_output_embeddings().weight[token].detach().numpy())
    base = ["--model", tiny_folder, "--vectors", "planted.npy", "--target", "say x"]
    table = rows(*base, "--target-layers", tiny.n_layers).set_index("condition")
    assert table["next_token"][PATCHED] == tiny.tokenizer.decode([token])
    assert table["next_token"]["random vector"] != table["next_token"][PATCHED]
