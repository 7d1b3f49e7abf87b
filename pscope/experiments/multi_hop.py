"""Multi-hop correction: a question of two hops, answered by patching the state of its first hop into its second.

The paper's section 5 (Figure 4). π1 describes something, "the company that created Visual Basic Script"; π2 asks about
it, "The current CEO of". The whole question is what a model often gets wrong although it answers either hop alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.engine.selfcheck import PathName
from pscope.engine.unpatched import continue_prompts
from pscope.errors import PscopeError, RowError
from pscope.experiments.bands import share_bands
from pscope.experiments.grid import (
    FOLDS,
    Pair,
    at_chosen,
    chosen_elsewhere,
    draw_folds,
    first_token,
    same_norm,
    source_layers,
    source_prompt,
    speak,
)
from pscope.inputs.relations import PLACEHOLDER, Query
from pscope.metrics import answer_found, answer_settled
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import capture

VANILLA, STEP_BY_STEP = "vanilla", "step by step"
COT, WITH_PLACEHOLDER, BACKPATCH = "cot", "placeholder", "backpatch"
WIRINGS = (COT, WITH_PLACEHOLDER, BACKPATCH)
TEMPLATE_SECONDS = 10
PATCHED, RANDOM, CLEAN = "patched", "random vector", "clean target"


@dataclass(frozen=True)
class Hops:
    """What the model says to each hop of a query alone, and whether that is right."""

    query: Query
    one: str
    two: str
    one_found: bool
    two_found: bool

    @property
    def solvable(self) -> bool:
        return self.one_found and self.two_found


def answer_hops(
    model: LanguageModel,
    queries: Sequence[Query],
    decoding: Decoding = GREEDY,
    *,
    memory: int = MEMORY,
    path: PathName | Literal["auto"] = "auto",
) -> list[Hops]:
    """Ask the model each hop of every query by itself; prompts that coincide are run once.

    Raises PscopeError for a query without a bridge: its second hop cannot be asked alone.
    """
    for query in queries:
        if not query.bridge:
            raise PscopeError(f'{query.text!r} has no "bridge", so its hops cannot be asked alone; keep all queries')
    one = [query.hop_one for query in queries]
    two = [query.hop_two for query in queries]
    right = [*(query.bridge for query in queries), *(query.answers for query in queries)]
    spoken = _continued(model, [*one, *two], right, decoding, memory, path)
    return [
        Hops(
            query,
            spoken[first],
            spoken[second],
            answer_found(spoken[first], query.bridge),
            answer_found(spoken[second], query.answers),
        )
        for query, first, second in zip(queries, one, two, strict=True)
    ]


def step_by_step(model: LanguageModel, query: Query, chat: bool) -> str:
    """The prompt that asks the whole query "step by step": in the model's chat template, or bare.

    Raises PscopeError for a template that fails, or comes to no end.
    """
    if not chat:
        return f"Let's think step by step. {query.text}"
    message = {"role": "user", "content": f"{query.text}? Let's think step by step."}
    filled: list[str] = []
    fault = f"it did not end within {TEMPLATE_SECONDS} seconds"

    def fill() -> None:
        nonlocal fault
        try:
            filled.append(model.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        except Exception as error:
            fault = " ".join(str(error).split())

    # A template is a program that comes with a checkpoint, and may have loops that nobody sees the end of.
    filling = Thread(target=fill, daemon=True)
    filling.start()
    filling.join(TEMPLATE_SECONDS)
    if not filled:
        raise PscopeError(f"the chat template of {model.name} cannot be filled in: {fault}; ask without it")
    return filled[0]


def correct(
    model: LanguageModel,
    queries: Sequence[Query],
    pairs: Sequence[Pair],
    decoding: Decoding = GREEDY,
    *,
    chat: bool = False,
    reasoning: Decoding = GREEDY,
    wirings: Sequence[str] = WIRINGS,
    seed: int = 0,
    memory: int = MEMORY,
) -> Iterator[pd.DataFrame]:
    """Ask every query as it stands, step by step, and by Patchscopes of three wirings at every (ℓ, ℓ*).

    Yields chunks of the table; a row is one query × method × pair × condition: `query` (its number), `text`, `source`,
    `bridge` (see `shared_bridge`), `fold`, `method`, `condition`, `layer`, `target_layer`, `continuation`, `found`, the
    `path` taken, and for patched rows the `position` and `token` whose state was read, and the `rank` (from 1) and
    `probability` of the answer's first token right after the target prompt. Queries that share a bridge share a fold.
    Of target prompts that are whole queries one of each length is checked, all others each. The methods:

    - "vanilla": the whole query, unpatched; "step by step": with that request, continued as `reasoning` says;
    - "cot": the state of π1's last token, patched over the last token of π2;
    - "placeholder": the same state, patched over the placeholder of "π2 x is";
    - "backpatch": the whole query's last token at layer ℓ, patched over itself at a lower ℓ*.

    The condition is "patched", "random vector" (a random direction of the same norm), or "clean target" for what is not
    patched. Raises PscopeError, naming the query, for a row that fails.
    """
    if not queries:
        raise PscopeError("there is no query to ask")
    folds = draw_folds([shared_bridge(query) for query in queries], seed)
    for method, prompts, how in (
        (VANILLA, [query.text for query in queries], decoding),
        (STEP_BY_STEP, [step_by_step(model, query, chat) for query in queries], reasoning),
    ):
        path = Patchscope(model, model.prompt(max(prompts, key=len)), memory=memory).path
        spoken = _continued(model, prompts, [query.answers for query in queries], how, memory, path)
        yield pd.concat(
            [
                _rows(query, number, folds, method, CLEAN, [(None, None)], [spoken[prompt]])
                for number, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
            ],
            ignore_index=True,
        ).assign(path=path)
    layers, _ = source_layers(pairs)
    # Read once: two wirings share the states of π1.
    read_at = {
        text: [source_prompt(model, getattr(query, text)) for query in queries]
        for text in dict.fromkeys(_source_of(wiring) for wiring in wirings)
    }
    # (queries, layers, hidden)
    read = {text: capture(model, prompts, layers=layers) for text, prompts in read_at.items()}
    for wiring in wirings:
        checked: dict[int, PathName] = {}
        grid = pairs_of(wiring, pairs)
        if not grid:
            continue
        columns = [layers.index(layer) for layer, _ in grid]
        for target, members in _by_target(model, queries, wiring).items():
            # A target for each query: one of each length is checked, as masks and caches do not tell them apart.
            path = checked.get(len(target), "auto") if wiring == BACKPATCH else "auto"
            scope = Patchscope(model, target, memory=memory, path=path)
            checked[len(target)] = scope.path
            together = max(1, scope.rows_per_pass(decoding.new_tokens) // (2 * len(grid)))
            for start in range(0, len(members), together):
                part = members[start : start + together]
                states = read[_source_of(wiring)][part]
                random = same_norm(states, [f"{wiring}/{queries[number].text}" for number in part], seed)
                states = torch.cat([states, random])[:, columns]  # (2 queries, pairs, hidden)
                sources = [read_at[_source_of(wiring)][number] for number in part]
                chunk = _patched(scope, states, wiring, queries, part, sources, folds, grid, decoding)
                yield chunk.assign(path=scope.path)


def shared_bridge(query: Query) -> str:
    """What queries have in common that go by the same bridge; one without a bridge stands alone, by its own text."""
    return query.bridge[0].casefold() if query.bridge else query.text


def _source_of(wiring: str) -> str:
    """Which text of a query is the source: the whole of it, or π1."""
    return "text" if wiring == BACKPATCH else "first"


def pairs_of(wiring: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that make sense for a wiring: back-patching goes from a later layer into an earlier one."""
    return [(layer, target) for layer, target in pairs if wiring != BACKPATCH or target < layer]


def rows_to_decode(queries: int, pairs: Sequence[Pair], wirings: Sequence[str] = WIRINGS) -> int:
    """How many patched rows `correct` decodes."""
    return sum(2 * queries * len(pairs_of(wiring, pairs)) for wiring in wirings)


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How often each method answers: one row per method × measure, the share of queries `found`, `low` and `high`.

    Vanilla and step by step have one measure, "accuracy". A wiring has four: "oracle", any (ℓ, ℓ*) of the grid gives
    the answer, and "held-out pair", at the (ℓ, ℓ*) that was best for the queries of the other folds, averaged over
    those that tie; and of both what random vectors give. `pairs` is how many were chosen in all, `layer` and
    `target_layer` the one that counts most, missing where several count alike. Bands are from resampling bridges with
    all their queries, and exact where all agree; below three bridges nothing is held out.
    """
    found = []
    bridges = table.drop_duplicates("query").set_index("query")["bridge"]
    for method, rows in table.groupby("method", sort=False):
        if method in (VANILLA, STEP_BY_STEP):
            answered = rows.set_index("query")["found"].astype(float)
            found.append(_measured(method, "accuracy", answered, bridges, seed))
            continue
        own, random = (_grid(rows, condition) for condition in (PATCHED, RANDOM))
        found.append(_measured(method, "oracle", own.max(axis=1), bridges, seed))
        found.append(_measured(method, "oracle, random vector", random.max(axis=1), bridges, seed))
        folds = rows.drop_duplicates("query").set_index("query")["fold"].loc[own.index]
        if folds.nunique() == FOLDS:
            chosen = chosen_elsewhere(own, folds)
            layers = _pairs_told(chosen)
            for measure, cells in (("held-out pair", own), ("held-out pair, random vector", random)):
                found.append({**_measured(method, measure, at_chosen(cells, chosen), bridges, seed), **layers})
    columns = ["method", "measure", "found", "low", "high", "queries", "bridges", "pairs", "layer", "target_layer"]
    return pd.DataFrame(found).reindex(columns=columns).astype(dict.fromkeys(columns[-3:], "Int64"))


def _pairs_told(chosen: pd.DataFrame) -> dict:
    """What the summary says of the pairs that `chosen_elsewhere` chose; those that tie share a query among them."""
    weights = chosen.div(chosen.sum(axis=1), axis=0).sum()
    most = weights[np.isclose(weights, weights.max())]
    layer, target = most.index[0] if len(most) == 1 else (None, None)
    return {"pairs": (weights > 0).sum(), "layer": layer, "target_layer": target}


def transcripts(table: pd.DataFrame, queries: Sequence[Query]) -> list[dict]:
    """Every text of every query: what was asked, what is right, and what each method said, by pair."""
    told = []
    for number, rows in table.groupby("query"):
        query = queries[number]
        said: dict[str, object] = {}
        for method, texts in rows.groupby("method", sort=False):
            if method in (VANILLA, STEP_BY_STEP):
                said[method] = texts["continuation"].iloc[0]
                continue
            said[method] = {
                condition: {
                    "clean" if row.condition == CLEAN else f"{row.layer} → {row.target_layer}": row.continuation
                    for row in of_condition.itertuples()
                }
                for condition, of_condition in texts.groupby("condition", sort=False)
            }
        asked = {"query": query.text, "first": query.first, "second": query.second, "source": query.source}
        told.append({**asked, "answers": query.answers, "bridge": query.bridge, **said})
    return told


def _by_target(model: LanguageModel, queries: Sequence[Query], wiring: str) -> dict[Prompt, list[int]]:
    """The queries' numbers by the target prompt that they share."""
    members: dict[Prompt, list[int]] = {}
    for number, query in enumerate(queries):
        if wiring == WITH_PLACEHOLDER:
            target = model.prompt(f"{query.second} {PLACEHOLDER} is", PLACEHOLDER)
        else:
            target = model.prompt(query.second if wiring == COT else query.text)
        members.setdefault(target, []).append(number)
    return members


def _patched(
    scope: Patchscope,
    states: Tensor,
    wiring: str,
    queries: Sequence[Query],
    members: Sequence[int],
    sources: Sequence[Prompt],
    folds: Sequence[int],
    pairs: Sequence[Pair],
    decoding: Decoding,
) -> pd.DataFrame:
    asked = [queries[number] for number in members]
    names = [f"{query.text!r} ({wiring}, {condition})" for condition in (PATCHED, RANDOM) for query in asked]
    texts, clean = speak(
        scope,
        states,
        names,
        pairs,
        decoding,
        lambda unit, text: answer_settled(text, asked[unit % len(asked)].answers),
    )
    # Who walks through a query of his own need not know its answer.
    answered = all(query.answers for query in asked)
    if answered:
        ranks, probabilities = first_token(scope, states, [query.answers[0] for query in asked] * 2, pairs)
    frames = []
    for place, (number, query) in enumerate(zip(members, asked, strict=True)):
        for condition, unit in ((PATCHED, place), (RANDOM, len(asked) + place)):
            frame = _rows(query, number, folds, wiring, condition, pairs, texts[unit])
            if condition == PATCHED:
                read = {"position": sources[place].position, "token": sources[place].token}
                frame = frame.assign(**read).astype({"position": "Int64", "token": "string"})
            if answered:
                frame = frame.assign(rank=_whole(ranks[unit]), probability=probabilities[unit])
            frames.append(frame)
        frames.append(_rows(query, number, folds, wiring, CLEAN, [(None, None)], [clean]))
    return pd.concat(frames, ignore_index=True)


def _continued(
    model: LanguageModel,
    texts: Sequence[str],
    right: Sequence[Sequence[str]],
    decoding: Decoding,
    memory: int,
    path: PathName | Literal["auto"],
) -> dict[str, str]:
    """What the model says after each text, until it has said what is `right` for it.

    Texts that coincide are run once, until all who ask are answered.
    """
    wanted: dict[str, list[Sequence[str]]] = {}
    for text, answers in zip(texts, right, strict=True):
        wanted.setdefault(text, []).append(answers)
    once = list(wanted)
    prompts = [model.prompt(text) for text in once]

    def settled(index: int, text: str) -> bool:
        return all(answer_settled(text, answers) for answers in wanted[once[index]])

    try:
        spoken = dict(continue_prompts(model, prompts, decoding, settled=settled, memory=memory, path=path))
    except RowError as error:
        raise PscopeError(f"{once[error.row]!r} failed: {error.reason}") from error
    return {text: decoding.text(spoken[index], model.tokenizer) for index, text in enumerate(once)}


def _grid(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    """Found or not, (queries, layer × target layer)."""
    here = rows[rows["condition"] == condition].astype({"layer": int, "target_layer": int, "found": float})
    return here.pivot(index="query", columns=["layer", "target_layer"], values="found").sort_index(axis=1)


def _measured(method: str, measure: str, found: pd.Series, bridges: pd.Series, seed: int) -> dict:
    """`found` and `bridges` are (queries,), by the query's number."""
    groups = found.groupby(bridges)
    (low,), (high,) = share_bands(groups.sum().to_numpy()[:, None], groups.size().to_numpy(), seed)
    return {
        "method": method,
        "measure": measure,
        "found": found.mean(),
        "low": low,
        "high": high,
        "queries": len(found),
        "bridges": groups.ngroups,
    }


def _rows(
    query: Query,
    number: int,
    folds: Sequence[int],
    method: str,
    condition: str,
    pairs: Sequence[Pair] | Sequence[tuple[None, None]],
    texts: Sequence[str],
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "query": number,
            "text": query.text,
            "source": query.source,
            "bridge": shared_bridge(query),
            "fold": folds[number],
            "method": method,
            "condition": condition,
            "layer": _whole([layer for layer, _ in pairs]),
            "target_layer": _whole([target for _, target in pairs]),
            "continuation": pd.array(texts, dtype="string"),
            "found": [answer_found(text, query.answers) for text in texts],
            "position": _whole([None] * len(texts)),
            "token": pd.array([None] * len(texts), dtype="string"),
            "rank": _whole([None] * len(texts)),
            "probability": np.full(len(texts), np.nan),
        }
    )


def _whole(numbers: Sequence[int | None]) -> pd.arrays.IntegerArray:
    return pd.array(numbers, dtype="Int64")
