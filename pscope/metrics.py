"""How well a decoded distribution tells the model's own next token (the paper's section 4.1).

The functions score each sample; the `evaluate.Metric`s average them, and are built and used without a network.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

_CITATION = "Ghandeharioun et al., Patchscopes, ICML 2024, arXiv 2401.06102, section 4.1"


def surprisal(decoded: Tensor, model_logits: Tensor) -> Tensor:
    """−log p_model(decoded token), in nats, for token ids (samples, decodings) and logits (samples, vocab).

    The probability is the model's own, of the tokens that were decoded; the lower, the better were they told.
    Returns (samples, decodings).
    """
    log_p = model_logits.float().log_softmax(dim=-1)
    return -log_p.gather(1, decoded.to(log_p.device))


class PrecisionAt1(evaluate.Metric):
    """The share of samples whose decoded token is the model's own: argmax of the one = argmax of the other."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION,
            inputs_description="predictions: decoded token ids; references: the model's own next-token ids",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"precision_at_1": float(np.mean(np.equal(predictions, references)))}


class Surprisal(evaluate.Metric):
    """The mean of −log p_model(decoded token), in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION,
            inputs_description="predictions: decoded token ids; references: the model's own next-token logits",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions: list[int], references: list[list[float]]) -> dict[str, float]:
        decoded = torch.as_tensor(np.asarray(predictions))[:, None]
        return {"surprisal": surprisal(decoded, torch.as_tensor(np.asarray(references))).mean().item()}
