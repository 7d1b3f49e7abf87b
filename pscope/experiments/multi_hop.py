"""Multi-hop correction: a question of two hops, answered by patching the state of its first hop into its second.

The paper's section 5 (Figure 4). π1 describes something, "the company that created Visual Basic Script"; π2 asks about
it, "The current CEO of". The whole question is what a model often gets wrong although it answers either hop alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread

import numpy as np
import pandas as pd

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.errors import PscopeError
from pscope.experiments.bands import share_bands
from pscope.experiments.experiment import Experiment, Work, tidy
from pscope.experiments.grid import Pair, source_prompt
from pscope.experiments.held_out import FOLDS, at_chosen, chosen_elsewhere, draw_folds, found_at
from pscope.experiments.known import Plain, Wanted, answer_plainly, by_length
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM, TYPES, Source, decoded_rows, sweep
from pscope.inputs.queries import Query
from pscope.inputs.relations import PLACEHOLDER
from pscope.metrics import answer_found
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt

VANILLA, STEP_BY_STEP = "vanilla", "step by step"
COT, WITH_PLACEHOLDER, BACKPATCH = "cot", "placeholder", "backpatch"
WIRINGS = (COT, WITH_PLACEHOLDER, BACKPATCH)
TEMPLATE_SECONDS = 10

_TYPES = {
    "query": "int64",
    "text": "string",
    "source": "string",
    "bridge": "string",
    "fold": "int64",
    "method": "string",
    **TYPES,
}


def plain_hops(queries: Sequence[Query]) -> list[Wanted]:
    """What is asked to find out what the model knows: each hop of every query by itself, and the answers that count.

    Raises PscopeError for a query without a bridge: its second hop cannot be asked alone.
    """
    for query in queries:
        if not query.bridge:
            raise PscopeError(f'{query.text!r} has no "bridge", so its hops cannot be asked alone; keep all queries')
    hops = ((query.hop_one, query.bridge) for query in queries), ((query.hop_two, query.answers) for query in queries)
    return [hop for each in hops for hop in each]


@dataclass(frozen=True)
class Hops:
    """Whether what the model says to each hop of a query alone is right."""

    query: Query
    one_found: bool
    two_found: bool

    @property
    def solvable(self) -> bool:
        return self.one_found and self.two_found


def answered_hops(queries: Sequence[Query], said: Mapping[str, str]) -> list[Hops]:
    """Which hops the model answers, from what it `said` to each."""
    return [
        Hops(
            query,
            answer_found(said[query.hop_one], query.bridge),
            answer_found(said[query.hop_two], query.answers),
        )
        for query in queries
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


class MultiHop(Experiment[Source | Plain]):
    """Figure 4: every query asked as it stands, step by step, and by Patchscopes of three wirings at every (ℓ, ℓ*).

    A row of the table is one query × method × pair × condition: `query` (its number), `text`, `source`, `bridge` (see
    `shared_bridge`), `fold`, `method`, and the columns of a sweep (`pscope.experiments.sweep`). Queries that share a
    bridge share a fold. The methods:

    - "vanilla": the whole query, unpatched; "step by step": with that request, continued as `reasoning` says;
    - "cot": the state of π1's last token, patched over the last token of π2;
    - "placeholder": the same state, patched over the placeholder of "π2 x is";
    - "backpatch": the whole query's last token at layer ℓ, patched over itself at a lower ℓ*.

    The condition is "patched", "random vector" (a random direction of the same norm), or "clean target" for what is not
    patched.
    """

    def __init__(
        self,
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
    ) -> None:
        if not queries:
            raise PscopeError("there is no query to ask")
        self._decodings, self._seed = {VANILLA: decoding, STEP_BY_STEP: reasoning}, seed
        self._decoding = decoding
        folds = draw_folds([shared_bridge(query) for query in queries], seed)
        about = [
            {
                "query": number,
                "text": query.text,
                "source": query.source,
                "bridge": shared_bridge(query),
                "fold": fold,
            }
            for number, (query, fold) in enumerate(zip(queries, folds, strict=True))
        ]
        prompts = {
            VANILLA: [query.text for query in queries],
            STEP_BY_STEP: [step_by_step(model, query, chat) for query in queries],
        }
        # It tells which path the others can take.
        self._longest = {method: model.prompt(max(texts, key=len)) for method, texts in prompts.items()}
        units: list[Source | Plain] = []
        for method, texts in prompts.items():
            asked = [
                _plain(method, query, model.prompt(text), told)
                for query, told, text in zip(queries, about, texts, strict=True)
            ]
            units += by_length(asked)
        for wiring in wirings:
            grid = tuple(pairs_of(wiring, pairs))
            if grid:
                sources = [
                    _wired(model, query, wiring, grid, {**told, "method": wiring})
                    for query, told in zip(queries, about, strict=True)
                ]
                order = {source.target: place for place, source in reversed([*enumerate(sources)])}
                units += sorted(sources, key=lambda source: order[source.target])
        self.units = units
        super().__init__(model, self._longest[VANILLA], memory)

    def read(self, units: Sequence[Source | Plain]) -> pd.DataFrame:
        if isinstance(units[0], Source):
            return tidy(sweep(self.scope(units[0].target), units, self._decoding, self._seed), _TYPES)
        method = units[0].target
        options = {"memory": self.memory, "path": self.scope(self._longest[method]).path}
        return tidy(answer_plainly(self.model, units, self._decodings[method], **options), _TYPES)

    def work(self, unit: Source | Plain) -> Work:
        return unit.work(self._decodings.get(unit.target, self._decoding).new_tokens)


def _plain(method: str, query: Query, prompt: Prompt, about: Mapping[str, object]) -> Plain:
    """A query that is asked unpatched."""
    about = {**about, "method": method, "condition": CLEAN}
    return Plain(f"{method}/{query.text}", 1, method, prompt, about, query.answers)


def _wired(
    model: LanguageModel, query: Query, wiring: str, pairs: tuple[Pair, ...], about: Mapping[str, object]
) -> Source:
    """A query in one wiring: whose state is patched where."""
    target: Prompt = {
        COT: lambda: model.prompt(query.second),
        WITH_PLACEHOLDER: lambda: model.prompt(f"{query.second} {PLACEHOLDER} is", PLACEHOLDER),
        BACKPATCH: lambda: model.prompt(query.text),
    }[wiring]()
    source = source_prompt(model, query.text if wiring == BACKPATCH else query.first)
    return Source(f"{wiring}/{query.text}", decoded_rows(pairs), target, source, pairs, about, query.answers)


def shared_bridge(query: Query) -> str:
    """What queries have in common that go by the same bridge; one without a bridge stands alone, by its own text."""
    return query.bridge[0].casefold() if query.bridge else query.text


def pairs_of(wiring: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that make sense for a wiring: back-patching goes from a later layer into an earlier one."""
    return [(layer, target) for layer, target in pairs if wiring != BACKPATCH or target < layer]


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
        own, random = (found_at(rows, condition, ["query"]) for condition in (PATCHED, RANDOM))
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
