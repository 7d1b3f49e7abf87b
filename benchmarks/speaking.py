"""Rows that speak in several passes, texts of many lengths: those left of a batch wait for the next, or do not."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

import pscope
from benchmarks.timing import Contestant, against, in_turn
from pscope.inputs.entities import shipped_entities

MEMORY = 2**28


def speaking_compared(model: pscope.LanguageModel, entities: int, new_tokens: int, seconds: float) -> pd.DataFrame:
    """Names of `entities` at every layer, described up to a comma, and their references, which go on.

    A table with `seconds` per row, the `ratio` to those that wait, and how many of the `rows` are `equal`, each token.
    """
    some = shipped_entities()[:entities]
    decoding = pscope.Decoding(new_tokens, stop=(",",))
    scope = pscope.Patchscope(model, model.prompt(pscope.ENTITY_DESCRIPTION), memory=MEMORY, path="staircase")
    states = pscope.capture(model, [model.prompt(entity.name) for entity in some]).flatten(0, 1)
    layers = [*range(model.n_layers + 1)] * len(some)
    most = scope.rows_speaking(decoding)

    def pass_by_pass() -> list[list[int]]:
        passes = (slice(start, start + most) for start in range(0, len(layers), most))
        return [row for rows in passes for row in scope.generate(states[rows], layers[rows], decoding).patched]

    longer = pscope.Decoding(new_tokens)
    prompts = [model.prompt(entity.reference) for entity in some]
    lengths = sorted({len(prompt) for prompt in prompts})

    def go_on(numbers: Sequence[int]) -> dict[int, list[int]]:
        own = [prompts[number] for number in numbers]
        said = dict(pscope.continue_prompts(model, own, longer, memory=MEMORY, path="staircase"))
        return {number: said[place] for place, number in enumerate(numbers)}

    def length_by_length() -> list[list[int]]:
        said: dict[int, list[int]] = {}
        for length in lengths:
            said |= go_on([number for number, prompt in enumerate(prompts) if len(prompt) == length])
        return [said[number] for number in range(len(prompts))]

    works = {
        f"descriptions, {most} rows at once": (
            lambda: scope.generate(states, layers, decoding).patched,
            pass_by_pass,
            len(layers),
        ),
        f"texts of {len(lengths)} lengths": (
            lambda: list(go_on(range(len(prompts))).values()),
            length_by_length,
            len(prompts),
        ),
    }
    frames = []
    for work, (waiting, apart, rows) in works.items():
        equal = sum(one == other for one, other in zip(waiting(), apart(), strict=True))
        contestants = {"waiting": Contestant(waiting, rows), "batch by batch": Contestant(apart, rows)}
        frames.append(against(in_turn(contestants, seconds), "waiting").assign(work=work, equal=equal, rows=rows))
    return pd.concat(frames, ignore_index=True)
