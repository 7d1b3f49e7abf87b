"""The layer sweep: N source states of every layer, patched into one target prompt at the same layer.

    python -m benchmarks.sweep

Contestants take turns in one process, after a warm-up round whose answers are compared with each other; what is quoted
are medians and the ratios of medians. The one-row loop is timed on a few samples and quoted per row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pscope
from pscope.texts import shipped_texts

BATCH = 128

Contestants = dict[str, tuple[Callable[[], object], int]]
"""By name: what to run, and how many rows it answers for."""


def prefill_hook(layer: int, rows: Tensor, position: int, states: Tensor):
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


class Hooked:
    """The usual way: whole prompts, `batch` rows at once, one hook per layer that is patched."""

    def __init__(self, model: pscope.LanguageModel, target: pscope.Prompt, batch: int) -> None:
        self.model, self.target, self.batch = model, target, batch

    @torch.no_grad()
    def run(self, states: Tensor, layers: Sequence[int], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`forward` of each batch of prompts, with the rows' states written in."""
        results = []
        for start in range(0, len(states), self.batch):
            part, part_layers = states[start : start + self.batch], torch.tensor(layers[start : start + self.batch])
            handles = []
            for layer in part_layers.unique().tolist():
                rows = (part_layers == layer).nonzero().squeeze(1)
                hook = prefill_hook(layer, rows, self.target.position, part[rows])
                if layer == 0:
                    handles.append(self.model.layers[0].register_forward_pre_hook(hook))
                else:
                    handles.append(self.model.layers[layer - 1].register_forward_hook(hook))
            try:
                results.append(forward(torch.tensor([self.target.ids] * len(part))))
            finally:
                for handle in handles:
                    handle.remove()
        return results

    def logits(self, states: Tensor, layers: Sequence[int]) -> Tensor:
        return torch.cat(
            self.run(states, layers, lambda ids: self.model.hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])
        )

    def generate(self, states: Tensor, layers: Sequence[int], new_tokens: int) -> list[list[int]]:
        def forward(ids: Tensor) -> Tensor:
            return self.model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
            )

        spoken = [row[len(self.target) :].tolist() for part in self.run(states, layers, forward) for row in part]
        return [until_end(row, self.model.end_tokens) for row in spoken]


def until_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def in_turn(contestants: Contestants, repeats: int) -> dict[str, float]:
    """The median seconds per row of each contestant; all take their turn before any has another."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (contestant, rows) in contestants.items():
            began = time.perf_counter()
            contestant()
            seconds[name].append((time.perf_counter() - began) / rows)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(
    samples: Annotated[int, typer.Option(min=1)] = 32,
    speaking: Annotated[int, typer.Option(min=1, help="Samples whose rows are also continued.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    one_by_one: Annotated[int, typer.Option(min=1, help="Samples for the one-row loop.")] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    model: str = "smollm2",
    dtype: str = "float32",
) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    lm = pscope.load(model, dtype=dtype, device="cpu")
    target = lm.prompt(pscope.TOKEN_IDENTITY)
    levels = list(range(lm.n_layers + 1))
    prompts = [lm.prompt(text) for text in shipped_texts()[:: max(1, 200 // samples)][:samples]]
    states = pscope.capture(lm, prompts).flatten(0, 1)  # (samples × layers, hidden)
    layers = levels * samples
    few, some = len(levels) * one_by_one, len(levels) * speaking

    staircase, plain = (pscope.Patchscope(lm, target, path=path) for path in ("staircase", "plain"))
    batched, loop = Hooked(lm, target, BATCH), Hooked(lm, target, 1)

    def logits(scope: pscope.Patchscope) -> Tensor:
        return torch.cat([part.patched for part in scope.logits(states, layers)])

    def spoken(scope: pscope.Patchscope) -> list[list[int]]:
        return scope.generate(states[:some], layers[:some], pscope.Decoding(new_tokens)).patched

    console = Console()
    console.print(
        f"{lm.name}, {lm.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, target of {len(target)} tokens"
    )

    title = f"logits: {samples} samples × {len(levels)} layers"
    sweep = {
        "staircase": (lambda: logits(staircase), len(states)),
        "plain path": (lambda: logits(plain), len(states)),
        f"hooks, batches of {BATCH}": (lambda: batched.logits(states, layers), len(states)),
        "hooks, one row at a time": (lambda: loop.logits(states[:few], layers[:few]), few),
    }
    answers = {name: contestant() for name, (contestant, _) in sweep.items()}
    agreement = {name: _differences(answers["staircase"], answer) for name, answer in answers.items()}
    console.print(_compared(title, "max |Δ logit|, argmax equal", agreement, in_turn(sweep, repeats)))

    title = f"continuations: {speaking} samples × {len(levels)} layers × {new_tokens} tokens"
    talk = {
        "staircase": (lambda: spoken(staircase), some),
        f"hooks and generate, batches of {BATCH}": (
            lambda: batched.generate(states[:some], layers[:some], new_tokens),
            some,
        ),
        "hooks and generate, one row at a time": (
            lambda: loop.generate(states[:few], layers[:few], new_tokens),
            few,
        ),
    }
    answers = {name: contestant() for name, (contestant, _) in talk.items()}
    agreement = {name: _same(answers["staircase"], answer) for name, answer in answers.items()}
    console.print(_compared(title, "rows with every token equal", agreement, in_turn(talk, repeats)))


def _differences(logits: Tensor, expected: Tensor) -> str:
    """The largest difference in standard deviations of a row's logits, and the share of equal argmaxes."""
    logits = logits[: len(expected)]
    scaled = (logits - expected).abs().amax(dim=-1) / expected.std(dim=-1)
    same = (logits.argmax(dim=-1) == expected.argmax(dim=-1)).sum()
    return f"{scaled.max():.0e}, {same} of {len(expected)}"


def _same(spoken: list[list[int]], expected: list[list[int]]) -> str:
    same = sum(ours == theirs for ours, theirs in zip(spoken, expected, strict=False))
    return f"{same} of {len(expected)}"


def _compared(title: str, agreement_title: str, agreement: dict[str, str], per_row: dict[str, float]) -> Table:
    table = Table("contestant", "ms per row", "staircase is faster by", agreement_title, title=title)
    for name, seconds in per_row.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / per_row['staircase']:.1f} ×", agreement[name])
    return table


if __name__ == "__main__":
    typer.run(main)
