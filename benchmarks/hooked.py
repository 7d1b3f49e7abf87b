"""The usual way, written from the paper's description: whole prompts, with a hook for every layer that is patched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import pscope


class Hooked:
    """Patched rows of one target prompt, `batch` of them at once."""

    def __init__(self, model: pscope.LanguageModel, target: pscope.Prompt, batch: int) -> None:
        self.model, self.target, self.batch = model, target, batch

    def logits(self, states: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Logits after the target prompt, (rows, vocab) of each batch. Only the last token is unembedded, a favour."""
        return self.run(states, layers, lambda ids: self.model.hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])

    def generate(self, states: Tensor, layers: Sequence[int], new_tokens: int) -> list[list[int]]:
        """Greedy continuations by transformers' own `generate`, each up to the token that ended it."""

        def forward(ids: Tensor) -> Tensor:
            return self.model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
            )

        spoken = [row[len(self.target) :].tolist() for part in self.run(states, layers, forward) for row in part]
        return [_until_end(row, self.model.end_tokens) for row in spoken]

    @torch.no_grad()
    def run(self, states: Tensor, layers: Sequence[int], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`forward` of each batch of prompts, with the rows' states written in."""
        results = []
        for start in range(0, len(states), self.batch):
            part, part_layers = states[start : start + self.batch], torch.tensor(layers[start : start + self.batch])
            handles = []
            for layer in part_layers.unique().tolist():
                rows = (part_layers == layer).nonzero().squeeze(1)
                hook = _prefill_hook(layer, rows, self.target.position, part[rows])
                if layer == 0:
                    handles.append(self.model.layers[0].register_forward_pre_hook(hook))
                else:
                    handles.append(self.model.layers[layer - 1].register_forward_hook(hook))
            try:
                results.append(forward(torch.tensor([self.target.ids] * len(part), device=self.model.device)))
            finally:
                for handle in handles:
                    handle.remove()
        return results


def _prefill_hook(layer: int, rows: Tensor, position: int, states: Tensor):
    """A forward hook that writes `states` into some rows of the batch, in the pass over the prompt only."""

    def hook(module, args, output):
        stream = output if isinstance(output, Tensor) else output[0]
        if stream.shape[1] > position:
            stream[rows, position] = states
        return output

    def pre_hook(module, args):
        if args[0].shape[1] > position:
            args[0][rows, position] = states

    return pre_hook if layer == 0 else hook


def _until_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0] + 1] if ends else tokens
