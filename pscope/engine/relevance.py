"""How much of what rows say is owed to the patch: the relevance of SelfIE (arXiv 2403.10949)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pscope.engine.generate import check_finite
from pscope.engine.plain import PlainPath
from pscope.engine.writes import Writes
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import padded


@torch.no_grad()
def relevance_of(
    model: LanguageModel, target: Prompt, writes: Writes, continuations: Sequence[Sequence[int]], memory: int
) -> Tensor:
    """|p(patched) − p(clean)| of each token that a row has said, with those before it forced: (rows, tokens).

    Rows that have said less have NaN in the places of the rest. Every row has a tail of its own, so that whole prompts
    are run, in about `memory` bytes. Raises RowError if the logits of a row are not finite.
    """
    lengths = torch.tensor([len(row) for row in continuations])
    most = int(lengths.max())
    tokens = padded(continuations).to(model.device)
    path, tails = PlainPath(model, target), tokens[:, :-1]
    together = max(1, memory // (2 * model.activation_bytes(len(target) + most, last=most)))
    relevance = torch.full((len(continuations), most), torch.nan, dtype=torch.float32)
    for start in range(0, len(continuations), together):
        rows = torch.arange(start, min(start + together, len(continuations)))
        # What follows the clean row is not looked at.
        logits = path.read(writes[rows], most, torch.cat([tails[rows[:1]], tails[rows]]))[1:]  # (rows, most, vocab)
        for place in range(most):
            present = lengths[rows] > place
            check_finite(logits[present, place], rows[present])
        ids = torch.tensor([target.ids], device=model.device).repeat(len(rows), 1)
        clean = model.logits(torch.cat([ids, tails[rows]], dim=1), last=most)
        own_tokens = tokens[rows, :, None]
        probabilities = [each.float().softmax(dim=-1).gather(2, own_tokens).squeeze(2) for each in (logits, clean)]
        relevance[rows] = (probabilities[0] - probabilities[1]).abs().cpu()
    return relevance.masked_fill(torch.arange(most) >= lengths[:, None], torch.nan)
