"""Lenses of others, written by hand as their own packages write them, against their formulas in numpy."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pscope
from pscope.errors import DataError, PscopeError
from pscope.mappings.readers import read_foreign, read_jacobian_lens, read_selfie_adapter, read_tuned_lens

L, WIDTH, RANK = 4, 32, 3


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


STATES = drawn(5, WIDTH, seed=99, dtype=torch.float32)
H = STATES.double().numpy()


def rows(matrix: torch.Tensor, states: np.ndarray = H) -> np.ndarray:
    """A matrix times each state, one after the other."""
    return np.stack([matrix.double().numpy() @ state for state in states])


def agree(mapped: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(mapped.numpy(), expected, rtol=1e-4, atol=1e-4)


def named(model: pscope.LanguageModel, name: str) -> pscope.LanguageModel:
    return pscope.LanguageModel(model.hf, model.tokenizer, name)


def rewrite(file: Path, **changes) -> None:
    """Change values of a file, or with None take them out."""
    content = json.loads(file.read_text()) if file.suffix == ".json" else torch.load(file)
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    if file.suffix == ".json":
        file.write_text(json.dumps(content))
    else:
        torch.save(content, file)


TUNED = {
    "base_model_name_or_path": "someone/tiny-llama",
    "d_model": WIDTH,
    "num_hidden_layers": L,
    "bias": True,
    "base_model_revision": None,
    "unembed_hash": "0" * 64,
    "lens_type": "linear_tuned_lens",
}
WEIGHTS = [drawn(WIDTH, WIDTH, seed=layer) / 8 for layer in range(L)]
BIASES = [drawn(WIDTH, seed=10 + layer) for layer in range(L)]


@pytest.fixture
def tuned(tmp_path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TUNED))
    state = {f"{layer}.weight": WEIGHTS[layer] for layer in range(L)}
    torch.save(state | {f"{layer}.bias": BIASES[layer] for layer in range(L)}, folder / "params.pt")
    return folder


@pytest.fixture
def jacobian(tmp_path) -> Path:
    file = tmp_path / "lens.pt"
    layers = list(range(L - 1))
    torch.save(
        {"J": {layer: WEIGHTS[layer] for layer in layers}, "n_prompts": 7, "source_layers": layers, "d_model": WIDTH},
        file,
    )
    return file


PROJECTION = {
    "log_scale": torch.tensor([1.5]),
    "bias": drawn(WIDTH, seed=20, dtype=torch.float32),
    "weight": drawn(WIDTH, WIDTH, seed=21, dtype=torch.float32),
    "U": drawn(WIDTH, RANK, seed=22, dtype=torch.float32),
    "V": drawn(WIDTH, RANK, seed=23, dtype=torch.float32),
}
PARTS = {
    "scale_only": ["log_scale"],
    "scalar_affine": ["log_scale", "bias"],
    "full_rank": ["weight", "bias"],
    "low_rank_only": ["U", "V", "bias"],
    "scalar_affine_plus_low_rank": ["log_scale", "U", "V", "bias"],
}


def adapted(kind: str, states: np.ndarray) -> np.ndarray:
    """What an adapter makes of states, by its formula: s h + h U Vᵀ + b, or W h + b."""
    numbers = {key: PROJECTION[key].double().numpy() for key in PARTS[kind]}
    made = np.exp(1.5) * states if "log_scale" in numbers else np.zeros_like(states)
    made += states @ numbers["U"] @ numbers["V"].T if "U" in numbers else 0
    made += rows(PROJECTION["weight"], states) if "weight" in numbers else 0
    return made + numbers.get("bias", 0)


def write_adapter(
    folder: Path, kind="scalar_affine", normalise=True, name="someone/tiny-llama", width=WIDTH, **changes
):
    """An adapter as the hub has them; changes are made to its tensors, and None takes them out."""
    config = {"model": {"name": name}, "projection": {"type": kind, "normalize_input": normalise}}
    tensors = {
        key: value for key, value in ({k: PROJECTION[k] for k in PARTS[kind]} | changes).items() if value is not None
    }
    file = folder / f"{kind}.safetensors"
    save_file(tensors, file, {"config_json": json.dumps(config), "projection_type": kind, "model_dim": str(width)})
    return file


def test_translator_i_of_a_tuned_lens_maps_layer_i_to_the_last(tiny, tuned):
    lens = read_tuned_lens(tuned, tiny)
    assert set(lens.maps) == {(layer, L) for layer in range(L)}
    for layer in range(L):
        agree(lens.at((layer, L))(STATES), H + rows(WEIGHTS[layer]) + BIASES[layer].double().numpy())
    assert lens.origin.kind == "tuned lens"
    assert lens.origin.source == lens.origin.target == type(lens.origin.source)("someone/tiny-llama", L, WIDTH)
    assert lens.origin.settings["read_from"] == "params.pt"
    lens.check(tiny, tiny)


def test_tuned_lens_without_biases(tiny, tuned):
    rewrite(tuned / "config.json", bias=False)
    rewrite(tuned / "params.pt", **{f"{layer}.bias": None for layer in range(L)})
    agree(read_tuned_lens(tuned, tiny).at((2, L))(STATES), H + rows(WEIGHTS[2]))


@pytest.mark.parametrize("word", ["translator", "adapter", "probe"])
@pytest.mark.parametrize("include_input", [True, False])
def test_old_tuned_lenses_count_from_layer_1_and_keep_layer_0_apart(tiny, tuned, word, include_input):
    config = {"d_model": WIDTH, "num_layers": L, "include_input": include_input, "reuse_unembedding": True}
    config |= {"extra_layers": 0, "vocab_size": 9, "model_config": {"_name_or_path": "someone/tiny-llama"}}
    (tuned / "config.json").write_text(json.dumps(config))
    state = {"unembedding.weight": drawn(9, WIDTH), "layer_norm.weight": drawn(WIDTH), "layer_norm.bias": drawn(WIDTH)}
    for layer in range(0 if include_input else 1, L):
        owner = f"layer_{word}s.{layer - 1}" if layer else f"input_{word}"
        state |= {f"{owner}.weight": WEIGHTS[layer], f"{owner}.bias": BIASES[layer]}
    torch.save(state, tuned / "params.pt")
    lens = read_tuned_lens(tuned, tiny)
    assert set(lens.maps) == {(layer, L) for layer in range(0 if include_input else 1, L)}
    for layer, _ in lens.maps:
        agree(lens.at((layer, L))(STATES), H + rows(WEIGHTS[layer]) + BIASES[layer].double().numpy())
    assert lens.origin.source.name == "someone/tiny-llama"


@pytest.mark.parametrize("change", [{"extra_layers": 1}, {"reuse_unembedding": False}, {"lens_type": "other"}])
def test_tuned_lens_that_decodes_otherwise(tiny, tuned, change):
    rewrite(tuned / "config.json", **change)
    with pytest.raises(PscopeError, match="more than the model's final norm"):
        read_tuned_lens(tuned, tiny)


def test_layer_l_of_a_jacobian_lens_is_l_plus_1(tiny, jacobian):
    lens = read_jacobian_lens(jacobian, tiny)
    assert set(lens.maps) == {(1, L), (2, L), (3, L)}
    for layer in range(1, L):
        agree(lens.at((layer, L))(STATES), rows(WEIGHTS[layer - 1]))
    assert (lens.origin.kind, lens.origin.settings) == ("Jacobian lens", {"n_prompts": 7, "read_from": "lens.pt"})
    lens.check(tiny, tiny)


def test_jacobian_of_decoder_layers(tiny, tmp_path):
    """Fitted as the format says, on what comes out of decoder layer 1, it tells where a step from layer 2 leads."""
    states = pscope.capture(tiny, [tiny.prompt("Paris")])[0]
    position = torch.zeros(1, 1, dtype=torch.long)

    def final(state: torch.Tensor) -> torch.Tensor:
        state = state[None, None]
        for block in tiny.layers[2:]:
            rotary = tiny.hf.model.rotary_emb(state, position)
            state = block(state, position_embeddings=rotary, attention_mask=None)
        return state[0, 0]

    torch.testing.assert_close(final(states[2]), states[L])
    file = tmp_path / "lens.pt"
    jacobian = torch.autograd.functional.jacobian(final, states[2])
    torch.save({"J": {1: jacobian}, "n_prompts": 1, "source_layers": [1], "d_model": WIDTH}, file)
    step = 1e-3 * drawn(WIDTH, seed=3, dtype=torch.float32)
    with torch.no_grad():
        moved, expected = read_jacobian_lens(file, tiny).at((2, L))(step), final(states[2] + step) - final(states[2])
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_oldest_format_of_torch(tiny, jacobian):
    torch.save(torch.load(jacobian), jacobian, _use_new_zipfile_serialization=False)
    agree(read_foreign(jacobian, tiny).at((1, L))(STATES), rows(WEIGHTS[0]))


def test_jacobian_to_another_target(tiny, jacobian):
    rewrite(jacobian, metadata={"target_layer": 2, "model_name": "x/tiny"}, J={0: WEIGHTS[0]}, source_layers=[0])
    assert set(read_jacobian_lens(jacobian, tiny).maps) == {(1, 3)}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", PARTS)
def test_selfie_adapter_leads_every_layer_to_layer_0(tiny, tmp_path, kind, normalise):
    lens = read_selfie_adapter(write_adapter(tmp_path, kind, normalise), tiny)
    assert set(lens.maps) == {(layer, 0) for layer in range(L + 1)}
    states = H / np.linalg.norm(H, axis=1, keepdims=True) if normalise else H
    for layer in range(L + 1):
        agree(lens.at((layer, 0))(STATES), adapted(kind, states))
    assert lens.origin.kind == "SelfIE adapter"
    assert lens.origin.settings == {
        "type": kind,
        "normalize_input": normalise,
        "read_from": f"{kind}.safetensors",
    }


@pytest.mark.parametrize("normalise", ["True", "false"])
def test_selfie_adapter_with_flat_header(tiny, tmp_path, normalise):
    file = tmp_path / "flat.safetensors"
    save_file(
        {key: PROJECTION[key] for key in ("log_scale", "bias")},
        file,
        {"projection_type": "scalar_affine", "normalize_input": normalise},
    )
    states = H / np.linalg.norm(H, axis=1, keepdims=True) if normalise == "True" else H
    agree(read_foreign(file, tiny).at((2, 0))(STATES), adapted("scalar_affine", states))


def test_checkpoint_of_a_selfie_adapter(tiny, tmp_path):
    file, kind = tmp_path / "run_step_10_best.pt", "scalar_affine_plus_low_rank"
    config = {"model": {"name": "x/tiny"}, "projection": {"type": kind, "normalize_input": False}, "seed": 42}
    state = {key: PROJECTION[key] for key in PARTS[kind]}
    torch.save({"projection_state": state, "config": config, "model_dim": WIDTH, "global_step": 10}, file)
    agree(read_foreign(file, tiny).at((1, 0))(STATES), adapted(kind, H))
    torch.save({"projection_state": state, "model_dim": WIDTH}, file)
    with pytest.raises(DataError, match="has no config"):
        read_foreign(file, tiny)


def test_read_foreign_finds_each(tiny, tuned, jacobian, tmp_path):
    for path in (tuned, tuned / "config.json", tuned / "params.pt"):
        assert read_foreign(path, tiny).origin.kind == "tuned lens"
    apart = tmp_path / "apart"
    apart.mkdir()
    adapter = write_adapter(apart)
    save_file({"layer_19": PROJECTION["bias"]}, apart / "mean-vectors.safetensors")
    assert read_foreign(adapter, tiny).origin.kind == read_foreign(apart, tiny).origin.kind == "SelfIE adapter"
    assert read_foreign(jacobian, tiny).origin.kind == read_foreign(tmp_path, tiny).origin.kind == "Jacobian lens"
    write_adapter(apart, "full_rank")
    with pytest.raises(
        PscopeError, match=r"several lenses; give one of full_rank.safetensors, scalar_affine.safetensors"
    ):
        read_foreign(apart, tiny)


def test_no_lens_of_others(tiny, tiny_folder, tuned, tmp_path):
    assert read_foreign(tiny_folder, tiny) is None
    assert read_foreign(tmp_path / "nowhere", tiny) is None
    assert read_foreign(tmp_path, tiny) is None
    for file, write in (("sum.pt", {"jacobian_sum": {}}), ("list.pt", [1]), ("notes.txt", "J")):
        torch.save(write, tmp_path / file)
        assert read_foreign(tmp_path / file, tiny) is None
    save_file({"map": WEIGHTS[0]}, tuned / "mappings.safetensors")
    assert read_foreign(tuned, tiny) is None


def test_lens_of_another_model(tiny, tuned, jacobian, tmp_path):
    rewrite(tuned / "config.json", num_hidden_layers=6)
    with pytest.raises(PscopeError, match=r"tuned is for a model with 6 layers; LlamaForCausalLM has 4"):
        read_tuned_lens(tuned, tiny)
    rewrite(tuned / "config.json", num_hidden_layers=L, d_model=64)
    with pytest.raises(PscopeError, match="tuned is for a model with 64 dimensions; LlamaForCausalLM has 32"):
        read_tuned_lens(tuned, tiny)
    adapter = write_adapter(tmp_path, width=64)
    with pytest.raises(PscopeError, match="64 dimensions; .* has 32"):
        read_selfie_adapter(adapter, tiny)
    rewrite(jacobian, d_model=16)
    with pytest.raises(PscopeError, match="16 dimensions; .* has 32"):
        read_jacobian_lens(jacobian, tiny)


@pytest.mark.parametrize(
    ("layers", "metadata"), [([0, 1, 2, 3], {}), ([-1], {}), ([1], {"target_layer": 1}), ([1], {"target_layer": 4})]
)
def test_jacobians_beyond_the_layers(tiny, jacobian, layers, metadata):
    rewrite(jacobian, J={layer: WEIGHTS[layer] for layer in layers}, source_layers=layers, metadata=metadata)
    with pytest.raises(PscopeError, match=r"has layers 0 to 4") as caught:
        read_jacobian_lens(jacobian, tiny)
    assert not isinstance(caught.value, DataError)


def test_named_base_model(tiny, tuned, jacobian, tmp_path, monkeypatch):
    other, same = named(tiny, "owner/Other-Llama"), named(tiny, "copies/Tiny-Llama")
    rewrite(jacobian, metadata={"model_name": "tiny-llama"})
    adapter = write_adapter(tmp_path)
    for path in (tuned, jacobian, adapter):
        assert read_foreign(path, same) is not None
        with pytest.raises(PscopeError, match=r"is for the model (someone/)?tiny-llama, not for owner/Other-Llama"):
            read_foreign(path, other)
    # Nothing is known of these: a packaged model, a folder, a class, a lens trained on a folder.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in (named(tiny, "smollm2"), named(tiny, "here"), named(tiny, str(tmp_path)), tiny):
        assert read_foreign(tuned, model) is not None
    rewrite(tuned / "config.json", base_model_name_or_path="/models/checkpoint-500")
    assert read_foreign(tuned, other) is not None


def test_hub_names_with_and_without_meta(tiny, tmp_path):
    file = write_adapter(tmp_path, name="meta-llama/Meta-Llama-3.1-8B-Instruct")
    assert read_selfie_adapter(file, named(tiny, "meta-llama/Llama-3.1-8B-Instruct")) is not None


@pytest.mark.parametrize("prompts", [0, -3, 1.5, True, "7", None])
def test_number_of_prompts(tiny, jacobian, prompts):
    rewrite(jacobian, n_prompts=prompts)
    with pytest.raises(DataError, match=f"n_prompts = {prompts}; it must be a positive integer"):
        read_foreign(jacobian, tiny)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tiny, tuned, jacobian, tmp_path, number):
    damaged = WEIGHTS[1].clone()
    damaged[3, 4] = number
    rewrite(tuned / "params.pt", **{"1.weight": damaged})
    rewrite(jacobian, J={0: WEIGHTS[0], 1: damaged, 2: WEIGHTS[2]})
    adapter = write_adapter(tmp_path, "full_rank", weight=damaged.float())
    for path in (tuned, jacobian, adapter):
        with pytest.raises(DataError, match="not finite"):
            read_foreign(path, tiny)


class RunsCode:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_not_run(tiny, tuned, tmp_path, new_format):
    mark, lens = tmp_path / "mark", tmp_path / "lens.pt"
    for file in (lens, tuned / "params.pt"):
        torch.save({"J": RunsCode(mark), "0.weight": 1}, file, _use_new_zipfile_serialization=new_format)
        with pytest.raises(DataError, match="could run code") as caught:
            read_foreign(file, tiny)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(lens, weights_only=False)
    assert mark.exists(), "the pickle does run code where it is let"


@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_truncated_files(tiny, tuned, jacobian, tmp_path, share):
    adapter = write_adapter(tmp_path, "full_rank")
    for path, file in ((tuned, tuned / "params.pt"), (jacobian, jacobian), (adapter, adapter)):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=re.escape(str(file))):
            read_foreign(path, tiny)
    (tuned / "config.json").write_text('{"d_model": 3')
    with pytest.raises(DataError, match="config.json"):
        read_foreign(tuned, tiny)


def test_missing_files(tiny, tmp_path):
    for read in (read_tuned_lens, read_jacobian_lens):
        with pytest.raises(DataError, match=r"cannot read .*nowhere"):
            read(tmp_path / "nowhere", tiny)
    for name in ("nowhere.pt", "nowhere.safetensors"):
        with pytest.raises(DataError, match=r"cannot read .*nowhere|No such file"):
            read_selfie_adapter(tmp_path / name, tiny)


@pytest.mark.parametrize("key", ["d_model", "num_hidden_layers"])
def test_tuned_lens_without_a_size(tiny, tuned, key):
    rewrite(tuned / "config.json", **{key: None})
    with pytest.raises(DataError, match=f"{key} = None"):
        read_foreign(tuned, tiny)


def test_tuned_lens_whose_params_are_not_those_of_its_config(tiny, tuned):
    rewrite(tuned / "params.pt", **{"4.weight": WEIGHTS[0], "4.bias": BIASES[0]})
    with pytest.raises(DataError, match=r"for layers \[0, 1, 2, 3, 4\], and its config says \[0, 1, 2, 3\]"):
        read_foreign(tuned, tiny)
    rewrite(tuned / "params.pt", **{"4.weight": None, "4.bias": None, "1.bias": None})
    with pytest.raises(DataError, match=r"has nothing for bias, which must be a tensor of shape \(32,\)"):
        read_foreign(tuned, tiny)
    rewrite(tuned / "params.pt", **{"1.bias": BIASES[1], "2.weight": WEIGHTS[2][:5]})
    with pytest.raises(DataError, match=r"has \(5, 32\) for weight"):
        read_foreign(tuned, tiny)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": None},
        {"source_layers": None},
        {"source_layers": [0, 1]},
        {"J": {}, "source_layers": []},
        {"J": WEIGHTS[0]},
        {"metadata": 3},
        {"J": {"0": WEIGHTS[0]}, "source_layers": ["0"]},
        {"J": {0: 1, 1: 1, 2: 1}},
    ],
)
def test_jacobian_lens_with_keys_missing_or_at_odds(tiny, jacobian, changes):
    rewrite(jacobian, **changes)
    with pytest.raises(DataError, match="lens.pt"):
        read_foreign(jacobian, tiny)


@pytest.mark.parametrize("key", PROJECTION)
def test_selfie_adapter_without_a_tensor(tiny, tmp_path, key):
    file = write_adapter(
        tmp_path, next(kind for kind in reversed(PARTS) if key in PARTS[kind]), **{key: None}, x=BIASES[0]
    )
    with pytest.raises(DataError, match=f"has nothing for {key}"):
        read_foreign(file, tiny)


def test_selfie_adapter_of_an_unknown_kind(tiny, tmp_path):
    file = tmp_path / "new.safetensors"
    for config, words in (
        ('{"projection": {"type": "mlp"}}', "unknown type, 'mlp'"),
        ("{", "header"),
        ("{}", "projection"),
    ):
        save_file({"bias": PROJECTION["bias"]}, file, {"config_json": config, "model_dim": str(WIDTH)})
        with pytest.raises(DataError, match=words):
            read_foreign(file, tiny)
