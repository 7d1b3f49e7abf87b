"""The plain path: whole prompts, one per row, with hooks that overwrite: slow, and always right."""

from __future__ import annotations

import torch
from torch import Tensor

from pscope.models import LanguageModel
from pscope.prompts import Prompt
from pscope.residual import Edit, editing


class PlainPath:
    """Runs patched rows of one target prompt, with the same calls as `Staircase`."""

    def __init__(self, model: LanguageModel, target: Prompt) -> None:
        self.model, self.target = model, target

    def start(self, states: Tensor, target_layers: Tensor, new_tokens: int = 0) -> PlainRows:
        """Patch each of `states` (rows, hidden) into the target at its layer, (rows,). The clean row comes first."""
        return PlainRows(self.model, self.target, states, target_layers)

    def row_bytes(self, new_tokens: int) -> int:
        """About how much memory a row takes."""
        return self.model.activation_bytes(len(self.target) + new_tokens)


class PlainRows:
    """The clean row and the patched ones. Every step runs the whole of them again, patch and all, without a cache."""

    def __init__(self, model: LanguageModel, target: Prompt, states: Tensor, target_layers: Tensor) -> None:
        self._model, self._position = model, target.position
        self._ids = torch.tensor([target.ids], device=model.device).repeat(len(states) + 1, 1)
        # The clean row is patched at no layer.
        self._layers = torch.cat([target_layers.new_tensor([-1]), target_layers])
        self._states = torch.cat([torch.zeros_like(states[:1]), states]).to(model.device)
        self._run()

    def step(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self._run()

    def keep(self, kept: Tensor) -> None:
        self._ids, self._layers, self._states = self._ids[kept], self._layers[kept.cpu()], self._states[kept]

    def _run(self) -> None:
        patched = self._layers[self._layers >= 0].unique().tolist()
        with editing(self._model, {layer: self._overwrite(layer) for layer in patched}):
            self.logits = self._model.next_token_logits(self._ids)

    def _overwrite(self, layer: int) -> Edit:
        rows = (self._layers == layer).nonzero().squeeze(1)

        def edit(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[rows, self._position] = self._states[rows].to(stream)
            return stream

        return edit
