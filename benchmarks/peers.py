"""The tools that people sweep layers with today, one patched row at a time, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

import pscope

Answer = Callable[[Tensor, Sequence[int]], list]
"""From states (rows, hidden) and their target layers: logits after the target prompt, in parts of (rows, vocab) each
since few would want them all at once; or each row's new tokens."""


def transformer_lens(model: pscope.LanguageModel, target: pscope.Prompt) -> Answer:
    """TransformerLens: its bridge around the HuggingFace model, one hook per pass."""
    bridge = import_module("transformer_lens.model_bridge").TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct" if model.name == "smollm2" else model.name,
        # A model of its own, since it puts wrappers into it.
        hf_model=copy.deepcopy(model.hf),
        tokenizer=model.tokenizer,
        device=str(model.device),
    )
    ids = torch.tensor([target.ids], device=model.device)

    def one(state: Tensor, layer: int) -> Tensor:
        def write(stream, hook):
            stream[0, target.position] = state
            return stream

        name = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
        return bridge.run_with_hooks(ids, fwd_hooks=[(name, write)], return_type="logits")[0, -1]

    return _row_by_row(one)


def nnsight(model: pscope.LanguageModel, target: pscope.Prompt) -> Answer:
    """nnsight: a trace per row, around a model of the Llama family."""
    traced = import_module("nnsight").LanguageModel(copy.deepcopy(model.hf), tokenizer=model.tokenizer)
    ids = torch.tensor([target.ids], device=model.device)

    def one(state: Tensor, layer: int) -> Tensor:
        with traced.trace(ids):
            if layer:
                traced.model.layers[layer - 1].output[0, target.position] = state
            else:
                traced.model.embed_tokens.output[0, target.position] = state
            logits = traced.lm_head.output[0, -1].save()
        return logits

    return _row_by_row(one)


def pyvene(model: pscope.LanguageModel, target: pscope.Prompt) -> Answer:
    """pyvene: an intervenable model per layer."""
    library = import_module("pyvene")
    ids = torch.tensor([target.ids], device=model.device)

    def intervenable(layer: int):
        component = "block_output" if layer else "block_input"
        where = library.RepresentationConfig(max(layer - 1, 0), component, "pos", 1)
        return library.IntervenableModel(
            library.IntervenableConfig([where], intervention_types=library.VanillaIntervention), model.hf
        )

    def one(state: Tensor, layer: int) -> Tensor:
        patched = intervenable(layer)
        (key,) = patched.interventions
        _, output = patched(
            {"input_ids": ids},
            unit_locations={"base": target.position},
            source_representations={key: state[None, None]},
        )
        return output.logits[0, -1]

    return _row_by_row(one)


def _row_by_row(one: Callable[[Tensor, int], Tensor]) -> Answer:
    return lambda states, layers: [one(*row)[None] for row in zip(states, layers, strict=True)]


PEERS = {"TransformerLens": transformer_lens, "nnsight": nnsight, "pyvene": pyvene}


def installed(name: str) -> bool:
    """Whether a peer is there; `pip install -e ".[bench]"` brings them all."""
    return find_spec(PEERS[name].__name__) is not None
