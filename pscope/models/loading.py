"""Find, fetch and load a causal language model: packaged, from the hub, from a folder, from a file, or from memory."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DistributedConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pscope.arguments import as_device, excerpt
from pscope.errors import ModelError, first_line
from pscope.memory import out_of_memory
from pscope.models import packaged
from pscope.models.hub import hub_answers
from pscope.models.model import LanguageModel
from pscope.models.structure import check_structure

MOST_LAYERS = 2000
"""Where a config says more, it is wrong: transformers would try to build them before it looks at the weights."""

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


def load(
    model: str | Path | PreTrainedModel = packaged.DEFAULT,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    attention: str | None = None,
    tensor_parallel: bool = False,
    adapter: str | Path | None = None,
) -> LanguageModel:
    """Load a causal language model with its tokenizer.

    `model` is the name of a packaged model (`smollm2`, the default), a folder, a `.gguf` file, a hub id, or a model in
    memory, which comes with its `tokenizer` and stays where and as it is. Weights are read from safetensors or GGUF
    only, and no code that a checkpoint carries is run. Without `device` and `device_map`, a GPU is used if there
    is one. `dtype="auto"` keeps that of the checkpoint. `attention` is transformers' name for how it is computed:
    "sdpa", "eager" …. An `adapter` is a folder of peft's, as of a LoRA, with safetensors. With `tensor_parallel`, the
    processes that torchrun started split every layer among them, and make every later call together.

    Raises ModelError, in one line that says what to do, when the model is missing, gated, unreachable or unreadable,
    or not one that can be patched (`pscope.models.structure`).
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ModelError("a model in memory comes with its tokenizer: load(model, tokenizer)")
        if adapter is not None:
            raise ModelError("a model in memory comes as it is; put the adapter on it with peft before")
        if model.training:
            raise ModelError(f"{type(model).__name__} is in training mode; call its eval() first")
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(model, "get_input_embeddings"):
            given = f"{type(model).__name__} and {excerpt(tokenizer)}"
            raise ModelError(f"a model and a tokenizer of transformers are needed, not {given}")
        return _checked(LanguageModel(model, tokenizer, model.name_or_path or type(model).__name__))
    if isinstance(model, LanguageModel) or not isinstance(model, (str, Path)) or not str(model):
        raise ModelError(f"a model is named by a text or a path, or is one of transformers; not {excerpt(model)}")
    if dtype not in [*DTYPES, *DTYPES.values()]:
        raise ModelError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype

    if adapter is not None and tensor_parallel:
        raise ModelError("adapter and tensor_parallel were both given; merge the adapter into the weights first")
    if device_map is not None and tensor_parallel:
        raise ModelError("device_map and tensor_parallel were both given; either spreads the model")
    if device_map is not None and device is not None:
        raise ModelError("device and device_map were both given; device is for the whole model, device_map spreads it")
    if device_map is None:
        device = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, options = _locate(str(model), revision)
    placement: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if tensor_parallel:
        _refuse_indivisible(folder, str(model))
        # All of them, by the plan that comes with the model's class.
        placement = {"distributed_config": DistributedConfig(tp_size=_processes())}
    if attention is not None:
        placement["attn_implementation"] = attention
    try:
        if "gguf_file" in options:
            _refuse_miscounted(Path(folder) / options["gguf_file"])
        else:
            _refuse_other_than_causal(folder)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        if "gguf_file" in options:
            # The blocks are unpacked at load time, so that a GGUF file becomes a model like any other.
            options["quantization_config"] = GgufConfig(dequantize=True)
        model_and_info: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # Refused below, by name; what transformers raises refers to a table that it logs.
            ignore_mismatched_sizes=True,
            **placement,
            **options,
        )
        # With what is told of the loading.
        hf, info = model_and_info
        _refuse_incomplete(LanguageModel(hf, tokenizer, str(model)), info)
        if tensor_parallel and not hf.supports_tp_plan:
            raise ModelError(f"transformers has no plan to split {type(hf).__name__} over processes; try a device_map")
        if device_map is None and not tensor_parallel:
            hf = hf.to(device)
    except Exception as error:
        if out_of_memory(error):
            raise ModelError(
                f"the weights of {model} do not fit into the memory of {device or 'the devices'}; try bfloat16, a "
                'device_map ("auto"), or a smaller model'
            ) from error
        raise ModelError(f"cannot load {model}: {first_line(error)}") from error
    if adapter is None:
        return _checked(LanguageModel(hf, tokenizer, str(model)))
    return _checked(LanguageModel(_with_adapter(hf, Path(adapter)), tokenizer, f"{model} with {adapter}"))


def _with_adapter(hf: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model within an adapter. Raises ModelError."""
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} is no adapter of peft's: it has no {' and no '.join(missing)}")
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError('an adapter needs peft; pip install "pscope[adapters]"') from error
    try:
        with warnings.catch_warnings():
            # Of weights that are missing, peft only warns; they are held against the file's below.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(hf, str(folder)).eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            in_file, own = set(file.keys()), set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if astray := sorted(own - in_file) or sorted(name for name in in_file - own if "lora" in name):
            raise ModelError(f"the adapter {folder} is of another model: {astray[0]} has no counterpart")
        if adapted.active_peft_config.is_prompt_learning:
            raise ModelError(f"{folder} puts tokens of its own before a text, so that positions would be others")
        # It passes on what is asked of the model within.
        return cast(PreTrainedModel, adapted)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load the adapter {folder}: {first_line(error)}") from error


def outline(model: str | Path, *, dtype: str = "auto", revision: str | None = None) -> LanguageModel:
    """A model without its weights, on the meta device: enough to tell what it would take. Nothing large is fetched.

    Raises ModelError as `load` does.
    """
    folder, options = _locate(str(model), revision, weights=False)
    try:
        if "gguf_file" not in options:
            _refuse_other_than_causal(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        dtype_option = {} if dtype == "auto" else {"dtype": DTYPES[dtype]}
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **dtype_option)
    except Exception as error:
        raise ModelError(f"cannot read the config of {model}: {first_line(error)}") from error
    return LanguageModel(hf.eval(), tokenizer, str(model))


def _checked(model: LanguageModel) -> LanguageModel:
    """The model, if `check_structure` has nothing against it and it embeds what its tokenizer makes of texts."""
    check_structure(model)
    # Now, while nobody has hooks on the model; it is measured once.
    _ = model.kept
    # Added tokens may lie beyond: text models keep those of their siblings that see.
    added = model.tokenizer.get_added_vocab()
    last = max(set(model.tokenizer.get_vocab().values()) - set(added.values()), default=0)
    if last >= model.embeddings:
        raise ModelError(
            f"the tokenizer of {model.name} goes up to token {last}, and its embedding has {model.embeddings} rows; "
            "give the tokenizer that belongs to the model"
        )
    return model


def _locate(name: str, revision: str | None, *, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """The local folder that holds the model, fetched if need be, and what `from_pretrained` must know besides."""
    if name in packaged.MODELS:
        return str(packaged.folder(name)), {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ModelError(f"{name} is a file, and not a .gguf file; give one, or the folder of a model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} has no config.json; give one that save_pretrained wrote")
        return str(path), {}
    return _fetch_from_hub(name, revision, weights=weights), {}


def _fetch_from_hub(name: str, revision: str | None, *, weights: bool) -> str:
    packages = ", ".join(packaged.MODELS)
    try:
        # No pickle, no code, and no second copy of the weights in another layout.
        return snapshot_download(
            name,
            revision=revision,
            local_files_only=not hub_answers(name, revision),
            allow_patterns=["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except HFValidationError as error:
        raise ModelError(
            f"{name} is neither a folder here, nor a hub id (owner/name), nor one of: {packages}"
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on its hub page, then run `hf auth login` and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {name}, or it is private (then run `hf auth login`); without the hub: {packages}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"{name} is no folder here, and the hub cannot be reached to look for it there; "
            f"check the name and the network, or use a model that needs no hub: {packages}"
        ) from error
    except Exception as error:
        # A proxy that refuses, a connection that breaks, a disk that is full: each says what it is.
        raise ModelError(f"cannot fetch {name}: {first_line(error)}") from error


def _refuse_indivisible(folder: str, name: str) -> None:
    """Raise ModelError unless the attention heads of a model can be dealt out to the processes that hold it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    processes = _processes()
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if (getattr(config, heads, None) or processes) % processes:
            raise ModelError(
                f"the {getattr(config, heads)} {heads} of {name} cannot be dealt out to {processes} processes; start "
                "as many as divide them"
            )


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _refuse_other_than_causal(folder: str) -> None:
    _refuse_absurd_sizes(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder; pscope patches decoder-only models")


def _refuse_absurd_sizes(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_absurd_sizes(value)
        elif "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise ModelError(f"its config says {key} = {value}, and no model has more than {MOST_LAYERS}")


def _refuse_miscounted(gguf: Path) -> None:
    """Raise ModelError unless a GGUF file holds as many blocks as its header counts, by which transformers goes."""
    reader = GGUFReader(gguf)
    matches = (re.match(r"blk\.(\d+)\.", tensor.name) for tensor in reader.tensors)
    blocks = len({block[1] for block in matches if block})
    count = next((field.contents() for name, field in reader.fields.items() if name.endswith(".block_count")), blocks)
    if count != blocks:
        raise ModelError(f"its header counts {count} blocks, and it holds {blocks}; give the whole file")


def _refuse_incomplete(model: LanguageModel, info: dict[str, set[Any]]) -> None:
    """Raise ModelError unless the checkpoint gave every weight of the model, and all weights of its decoder layers.

    `info` is what transformers tells of the loading. What a checkpoint need not give (tied weights, buffers) and what
    it may hold besides (buffers of older releases, layers that predict further tokens) it has left out already.
    Weights beside the decoder layers, of a vision tower or a value head, take nothing from the language model.
    """
    if missing := info["missing_keys"]:
        raise ModelError(
            f"the checkpoint lacks {_some(missing)}, which would be random; give one that is whole, of a causal model"
        )
    if mismatched := {f"{key} {tuple(given)} for {tuple(meant)}" for key, given, meant in info["mismatched_keys"]}:
        raise ModelError(f"the checkpoint has other shapes than its config says: {_some(mismatched)}")
    if dropped := {key for key in info["unexpected_keys"] if _of_a_decoder_layer(model, key)}:
        raise ModelError(f"the checkpoint has {_some(dropped)}, for which its config has no place; correct the config")


def _of_a_decoder_layer(model: LanguageModel, key: str) -> bool:
    """Whether a key for which the model has no place is a weight of one of its decoder layers, or of one more."""
    path = next(name for name, module in model.hf.named_modules() if module is model.layers)
    # A base model is saved without the prefix that it has inside the causal one.
    bare = path.removeprefix(f"{model.hf.base_model_prefix}.")
    match = re.match(rf"(?:{re.escape(path)}|{re.escape(bare)})\.(\d+)\.(?:(.+)\.)?(\w+)$", key)
    if match is None:
        return False
    layer, owner, kind = int(match[1]), match[2] or "", match[3]
    if layer >= model.n_layers:
        # Layers that predict the tokens after the next one are counted on from the others.
        return layer >= model.n_layers + (getattr(model.hf.config, "num_nextn_predict_layers", None) or 0)
    # Scales of caches and masks were kept there too; the mask of old is a "bias" that belongs to no weight.
    weights = {name for name, _ in model.layers[layer].named_parameters()}
    return kind == "weight" or (kind == "bias" and f"{owner}.weight" in weights)


def _some(keys: set[str], most: int = 3) -> str:
    names = ", ".join(sorted(keys)[:most])
    return f"{names} and {len(keys) - most} more" if len(keys) > most else names
