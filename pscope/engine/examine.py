"""What pscope finds out about a model before it is used: its parts, its path, its habits at the start of a text."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import Patchscope
from pscope.engine.selfcheck import PathName, SelfCheck
from pscope.models.model import LanguageModel
from pscope.models.prompts import ENTITY_DESCRIPTION, TOKEN_IDENTITY
from pscope.models.residual import capture

TEXT = "The quick brown fox jumps over the lazy dog"
PLACEHOLDERS = {"?": TOKEN_IDENTITY, "x": ENTITY_DESCRIPTION}
"""The tokens that the paper's target prompts have overwritten: their last ones."""
RUNS = 3
SAMPLES: dict[PathName, int] = {"staircase": 8, "plain": 1}
"""Of how many the sweep is that each path is timed on."""


@dataclass(frozen=True)
class Examination:
    """What was found about one model."""

    model_class: str
    layer_class: str
    layers_at: str
    """The name of the list of decoder layers in the model."""
    n_layers: int
    hidden_size: int
    window: int | None
    dtype: str
    device: str
    check: SelfCheck
    lens_difference: float
    """Layer L through the logit lens against the model's own logits, in standard deviations of those."""
    start_token: str | None
    """What the tokenizer puts before a text."""
    end_tokens: tuple[str, ...]
    chat_template: bool
    placeholders: dict[str, str]
    """For each placeholder of the paper's target prompts, the token that is overwritten: the same, if it is one."""
    first_token_norm: float
    """How long the state of a text's first token is in the middle layer, against the median of its others."""
    ms_per_row: dict[PathName, float]
    """Median milliseconds for the logits of a row: a sweep of 8 samples on the staircase, of one on the plain path."""


@torch.no_grad()
def examine(model: LanguageModel) -> Examination:
    """Find a model's parts, check the paths on the token-identity prompt, and time both on sweeps over all layers.

    Raises ModelError as `choose_path` does.
    """
    target, text = model.prompt(TOKEN_IDENTITY), model.prompt(TEXT)
    scope = Patchscope(model, target)
    states = capture(model, [text])[0]  # (layers, hidden)
    norms = capture(model, [text], [range(len(text))], [model.n_layers // 2])[:, 0].float().norm(dim=-1)  # (tokens,)
    (lens,) = logit_lens(model).logits(states[-1:], model.n_layers)
    logits = model.next_token_logits(torch.tensor([text.ids], device=model.device))[0]
    return Examination(
        model_class=type(model.hf).__name__,
        layer_class=" or ".join(sorted({type(layer).__name__ for layer in model.layers})),
        layers_at=next(name for name, module in model.hf.named_modules() if module is model.layers),
        n_layers=model.n_layers,
        hidden_size=model.hidden_size,
        window=model.window,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        check=scope.check,
        lens_difference=((lens.patched[0] - logits).abs().max() / logits.float().std()).item(),
        start_token=None if TEXT.startswith(text.tokens[0]) else text.tokens[0],
        end_tokens=tuple(model.tokenizer.convert_ids_to_tokens(sorted(model.end_tokens))),
        chat_template=bool(model.tokenizer.chat_template),
        placeholders={mark: model.prompt(prompt).token.strip() for mark, prompt in PLACEHOLDERS.items()},
        first_token_norm=(norms[0] / norms[1:].median()).item(),
        ms_per_row={
            path: _ms_per_row(Patchscope(model, target, path=path), states, samples)
            for path, samples in SAMPLES.items()
            if path == "plain" or scope.check.path == "staircase"
        },
    )


def _ms_per_row(scope: Patchscope, states: torch.Tensor, samples: int) -> float:
    """For so many samples of a row at each layer, as a sweep has them."""
    rows, layers = states.repeat(samples, 1), list(range(len(states))) * samples

    def run() -> float:
        began = perf_counter()
        for part in scope.logits(rows, layers):
            # A device that works ahead has ended once its numbers are here.
            part.patched.cpu()
        return 1000 * (perf_counter() - began) / len(rows)

    run()
    return median(run() for _ in range(RUNS))
