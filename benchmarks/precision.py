"""What half precision costs in agreement: the same patched rows in fp32, fp16 and bf16, with eager and sdpa attention.

    python -m benchmarks.precision

Every row of a sweep over all layers is compared with its own whole-prompt pass in fp32, and with its own whole-prompt
pass in the same precision. The states are read once, in fp32: what differs is how the target prompt is run.
"""

from __future__ import annotations

import itertools
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pscope
from pscope.inputs.texts import shipped_texts


def main(samples: Annotated[int, typer.Option(min=1)] = 4, model: str = "smollm2") -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    lm = pscope.load(model, dtype="float32", device="cpu")
    target = lm.prompt(pscope.TOKEN_IDENTITY)
    prompts = [lm.prompt(text) for text in shipped_texts()[:: max(1, 200 // samples)][:samples]]
    states = pscope.capture(lm, prompts).flatten(0, 1)  # (samples × layers, hidden)
    layers = [*range(lm.n_layers + 1)] * samples

    def logits(path: str) -> Tensor:
        scope = pscope.Patchscope(lm, target, path=path)
        return torch.cat([part.patched for part in scope.logits(states, layers)]).float()

    exact = logits("uncached")
    table = Table(
        "precision",
        "attention",
        "path",
        "from fp32: median",
        "99 %",
        "max",
        "argmax equal",
        "from whole prompts: max",
        title=f"{lm.name}: {samples} samples × {lm.n_layers + 1} layers; differences in sd of a row's logits",
    )
    for dtype, attention in itertools.product(("float32", "float16", "bfloat16"), ("sdpa", "eager")):
        lm = pscope.load(model, dtype=dtype, device="cpu")
        lm.hf.set_attn_implementation(attention)
        whole, stairs = logits("uncached"), logits("staircase")
        for path, found in (("whole prompts", whole), ("staircase", stairs)):
            off = difference(found, exact)
            table.add_row(
                dtype,
                attention,
                path,
                *(f"{off.quantile(share):.1e}" for share in (0.5, 0.99, 1.0)),
                f"{(found.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean():.1%}",
                f"{difference(found, whole).max():.1e}" if path == "staircase" else "",
            )
    console.print(table)


def difference(logits: Tensor, expected: Tensor) -> Tensor:
    """The largest difference in each row, in standard deviations of its expected logits: (rows,)."""
    return (logits - expected).abs().amax(dim=-1) / expected.std(dim=-1)


if __name__ == "__main__":
    typer.run(main)
