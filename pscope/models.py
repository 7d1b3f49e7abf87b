"""Find and load a causal language model, and know its parts: decoder layers, width, device, what ends a text.

The model stays the HuggingFace model it is; `LanguageModel` only keeps it together with its tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pscope import packaged
from pscope.errors import ModelError, PromptError
from pscope.prompts import Prompt, tokenize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A HuggingFace causal LM, its tokenizer, and the name it was asked for by."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, found by structure: the list of modules that holds the most parameters."""
        lists = [module for module in self.hf.modules() if isinstance(module, nn.ModuleList) and len(module)]
        if not lists:
            raise ModelError(
                f"{type(self.hf).__name__} keeps no list of decoder layers, so there is nothing to hook; "
                "give a decoder-only model of transformers"
            )
        return max(lists, key=lambda module: sum(weight.numel() for weight in module.parameters()))

    @property
    def n_layers(self) -> int:
        """L: residual streams are numbered 0 (embedding output) to L (what the final norm reads)."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go. Offloaded weights (on `meta`) are fetched by accelerate, which moves the ids too."""
        device = self.hf.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.hf.config.get_text_config().hidden_size

    @property
    def window(self) -> int | None:
        """The most tokens that the model can attend to, where its config says."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    def activation_bytes(self, tokens: int) -> int:
        """About how much memory a row of `tokens` tokens takes in a forward pass, and its next-token logits after."""
        intermediate = getattr(self.hf.config.get_text_config(), "intermediate_size", None) or 4 * self.hidden_size
        # The logits stand there up to three times: as they come, in order, and those of the pass before.
        logits = 3 * self.hf.config.get_text_config().vocab_size
        return (tokens * (8 * self.hidden_size + 3 * intermediate) + logits) * self.dtype.itemsize

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The token ids after which the model has nothing more to say."""
        found: set[int] = set()
        for holder in (self.hf.generation_config, self.hf.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    def prompt(self, text: str, at: str | int = "last") -> Prompt:
        """Tokenise `text` and mark a position in it; see `pscope.prompts.tokenize`.

        Raises PromptError also when the prompt is longer than the model's window.
        """
        prompt = tokenize(self.tokenizer, text, at)
        self.check_window(len(prompt))
        return prompt

    def check_window(self, tokens: int) -> None:
        """Raise PromptError if that many tokens are more than the model can attend to."""
        if self.window is not None and tokens > self.window:
            raise PromptError(
                f"{tokens} tokens are more than the window of {self.name}, which is {self.window}; use fewer"
            )

    @cached_property
    def _forward_parameters(self) -> frozenset[str]:
        return frozenset(signature(self.hf.forward).parameters)

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """One forward pass; the logits after the last token.

        `ids` is (batch, tokens); with a `cache`, they follow what it holds, and it is extended by them.
        Returns (batch, vocab), where the batch is that of the output: hooks may have made it larger.
        """
        options = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        if "logits_to_keep" in self._forward_parameters:
            # As an index, not as a number: for a number some models drop the other tokens half-way up.
            options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        if "position_ids" in self._forward_parameters:
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            options["position_ids"] = positions.expand(ids.shape[0], -1)
        return self.hf(input_ids=ids, **options).logits[:, -1]


def load(
    model: str | Path | PreTrainedModel = packaged.DEFAULT,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a causal language model with its tokenizer.

    `model` is the name of a packaged model (`smollm2`, the default), a folder, a `.gguf` file, a hub id, or a model in
    memory, which comes with its `tokenizer` and stays where and as it is. Weights are read from safetensors or GGUF
    only, and no code that a checkpoint carries is run. Without `device` and `device_map`, a GPU is used if there
    is one. `dtype="auto"` keeps that of the checkpoint.

    Raises ModelError, in one line that says what to do, when the model is missing, gated, unreachable or unreadable.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ModelError("a model in memory comes with its tokenizer: load(model, tokenizer)")
        if model.training:
            raise ModelError(f"{type(model).__name__} is in training mode; call its eval() first")
        return LanguageModel(model, tokenizer, model.name_or_path or type(model).__name__)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]

    if device is not None and device_map is not None:
        raise ModelError("device and device_map were both given; device is for the whole model, device_map spreads it")
    if device_map is None:
        device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, options = _locate(str(model), revision)
    placement = {} if device_map is None else {"device_map": device_map}
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        if "gguf_file" in options:
            # The blocks are unpacked at load time, so that a GGUF file becomes a model like any other.
            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            _refuse_other_than_causal(folder)
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, **placement, **options
        )
        if device_map is None:
            hf = hf.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {model}: {_first_line(error)}") from error
    return LanguageModel(hf, tokenizer, str(model))


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {str(device)!r} cannot be used: {_first_line(error)}") from error


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, str]]:
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
        return str(path), {}
    return _fetch_from_hub(name, revision), {}


def _fetch_from_hub(name: str, revision: str | None) -> str:
    packages = ", ".join(packaged.MODELS)
    try:
        # No pickle, no code, and no second copy of the weights in another layout.
        return snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
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
        raise ModelError(f"cannot fetch {name}: {_first_line(error)}") from error


def _refuse_other_than_causal(folder: str) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder; pscope patches decoder-only models")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
