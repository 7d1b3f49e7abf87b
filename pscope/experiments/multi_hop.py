"""Multi-hop correction: a question of two hops, answered by patching the state of its first hop into its second.

The paper's section 5 (Figure 4). π1 describes something, "the company that created Visual Basic Script"; π2 asks about
it, "The current CEO of". The whole question is what a model often gets wrong although it answers either hop alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from pscope.arguments import as_list, as_seed, check_name
from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.engine.scores import MEASURES, Measure
from pscope.errors import PscopeError
from pscope.experiments.experiment import Experiment, Work, of_kind, tidy
from pscope.experiments.grid import source_prompt
from pscope.experiments.held_out import draw_folds
from pscope.experiments.known import Inquiry, Plain, answer_plainly, by_length
from pscope.experiments.scored_sweep import SCORED_TYPES, check_candidates, scored_plainly, scored_sweep
from pscope.experiments.sweep import CLEAN, TYPES, Source, mark_chosen, sweep
from pscope.inputs.queries import Query
from pscope.inputs.relations import PLACEHOLDER
from pscope.metrics import answer_found, distinct_answers, normalised
from pscope.models.chats import chat_text
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import Pair, as_pairs

VANILLA, STEP_BY_STEP = "vanilla", "step by step"
COT, WITH_PLACEHOLDER, BACKPATCH = "cot", "placeholder", "backpatch"
WIRINGS = (COT, WITH_PLACEHOLDER, BACKPATCH)
_ABOUT = {
    "query": "int64",
    "text": "string",
    "source": "string",
    "bridge": "string",
    "fold": "int64",
    "method": "string",
}
SAID_TYPES = {**_ABOUT, **TYPES, "chosen": "boolean"}
SCORE_TYPES = {**_ABOUT, **SCORED_TYPES}

_GIVE = "give Query(first, second, answers), or what read_queries has read"


def plain_hops(queries: Sequence[Query]) -> list[Inquiry]:
    """What is asked to find out what the model knows: each hop of every query by itself, and the answers that count.

    Raises PscopeError for a query without a bridge: its second hop cannot be asked alone.
    """
    for query in queries:
        if not query.bridge:
            raise PscopeError(
                f'{query.text!r} has no "bridge", so its hops cannot be asked alone; keep all (--keep all)'
            )
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


def answered_hops(queries: Sequence[Query], continuations: Mapping[str, str]) -> list[Hops]:
    """Which hops the model answers, from its `continuations` of each alone."""
    return [
        Hops(
            query,
            answer_found(continuations[query.hop_one], query.bridge),
            answer_found(continuations[query.hop_two], query.answers),
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
    return chat_text(model.tokenizer, model.name, [message], begin=True)


class MultiHopScores(Experiment[Source | Plain]):
    """Figure 4 over all pairs of layers: the most probable answer to every query, in three wirings at every (ℓ, ℓ*).

    A row of the table is one query × method × pair × condition: `query` (its number), `text`, `source`, `bridge` (see
    `shared_bridge`), `fold`, `method`, and the columns of a scored sweep (`pscope.experiments.scored_sweep`). Queries
    that share a bridge share a fold. What is chosen among are the answers to all queries with the same second hop, of
    those that are asked and others, `among`; where they have one answer, to all queries. The methods:

    - "vanilla": the whole query, unpatched;
    - "cot": the state of π1's last token, patched over the last token of π2;
    - "placeholder": the same state, patched over the placeholder of "π2 x is";
    - "backpatch": the whole query's last token at layer ℓ, patched over itself at a lower ℓ*.

    The condition is "patched", "random vector" (a random direction of the same norm), or "clean target" for what is not
    patched. Raises PscopeError if all queries have one answer, or two have answers of the same tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        queries: Sequence[Query],
        pairs: Sequence[Pair],
        *,
        among: Sequence[Query] = (),
        by: Measure = "start",
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        check_name(by, MEASURES, "measure")
        queries, pairs = as_list(Query, queries, "queries", _GIVE), as_pairs(model, model, pairs)
        self._by, self._seed = by, as_seed(seed)
        by_second = _candidates([*queries, *among])
        self._candidates = [by_second[query.second] for query in queries]
        about = _about(queries, seed)
        prompts = [model.prompt(query.text) for query in queries]
        vanilla = (_plain(VANILLA, *each) for each in zip(queries, about, prompts, strict=True))
        wired = [
            replace(source, candidates=self._candidates[source.about["query"]])
            for source in _all_wired(model, queries, about, {wiring: pairs_of(wiring, pairs) for wiring in WIRINGS})
        ]
        check_candidates(model, wired)
        self.units = [*by_length(vanilla), *wired]
        super().__init__(model, max(prompts, key=len), memory)

    def read(self, units: Sequence[Source | Plain]) -> pd.DataFrame:
        if sources := of_kind(units, Source):
            return tidy(scored_sweep(self.scope, sources, self._seed, self._by), SCORE_TYPES)
        return tidy([self._plainly(unit) for unit in of_kind(units, Plain)], SCORE_TYPES)

    def work(self, unit: Source | Plain) -> Work:
        return unit.work(new_tokens=0)

    def _plainly(self, unit: Plain) -> dict[str, object]:
        scope = self.scope(unit.prompt)
        candidates = self._candidates[unit.about["query"]]
        return {**unit.about, "path": scope.path, **scored_plainly(scope, candidates, unit.answers, self._by)}


class MultiHop(Experiment[Source | Plain]):
    """Figure 4 as the paper has it: what each method says to every query, at the pairs that are worth hearing.

    The table is that of `MultiHopScores` with the columns of a sweep (`pscope.experiments.sweep`), and one method more,
    "step by step": the query with that request, continued as `reasoning` says. `pairs` are those of a grid, or, by
    wiring and fold, those that are best elsewhere (`scored_sweep.best_pairs`): then every query is asked at those of
    all folds, and `chosen` marks its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        queries: Sequence[Query],
        pairs: Sequence[Pair] | Mapping[str, Mapping[int, Pair]],
        decoding: Decoding = GREEDY,
        *,
        chat: bool = False,
        reasoning: Decoding = GREEDY,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        queries = as_list(Query, queries, "queries", _GIVE)
        if not isinstance(pairs, Mapping):
            pairs = as_pairs(model, model, pairs)
        self._decodings, self._seed = {VANILLA: decoding, STEP_BY_STEP: reasoning}, as_seed(seed)
        self._decoding, self._best = decoding, pairs if isinstance(pairs, Mapping) else None
        about = _about(queries, seed)
        prompts = {
            VANILLA: [query.text for query in queries],
            STEP_BY_STEP: [step_by_step(model, query, chat) for query in queries],
        }
        # It tells which path the others can take.
        self._longest = {method: model.prompt(max(texts, key=len)) for method, texts in prompts.items()}
        units: list[Source | Plain] = []
        for method, texts in prompts.items():
            items = zip(queries, about, map(model.prompt, texts), strict=True)
            units += by_length(_plain(method, *each) for each in items)
        grids = {
            wiring: [*dict.fromkeys(pairs.get(wiring, {}).values())]
            if isinstance(pairs, Mapping)
            else pairs_of(wiring, pairs)
            for wiring in WIRINGS
        }
        self.units = [*units, *_all_wired(model, queries, about, grids)]
        super().__init__(model, self._longest[VANILLA], memory)

    def read(self, units: Sequence[Source | Plain]) -> pd.DataFrame:
        if sources := of_kind(units, Source):
            return tidy(sweep(self.scope, sources, self._decoding, self._seed), SAID_TYPES)
        plain = of_kind(units, Plain)
        method = plain[0].target
        path = self.scope(self._longest[method]).path
        rows = answer_plainly(self.model, plain, self._decodings[method], memory=self.memory, path=path)
        return tidy(rows, SAID_TYPES)

    def work(self, unit: Source | Plain) -> Work:
        decoding = self._decodings[unit.target] if isinstance(unit, Plain) else self._decoding
        return unit.work(decoding.new_tokens)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """With the pairs that were chosen."""
        return table if self._best is None else mark_chosen(table, "method", self._best)


def _about(queries: Sequence[Query], seed: int) -> list[dict[str, object]]:
    """The columns that say what each query is."""
    bridges = [shared_bridge(query) for query in queries]
    return [
        {"query": number, "text": query.text, "source": query.source, "bridge": bridge, "fold": fold}
        for number, (query, bridge, fold) in enumerate(zip(queries, bridges, draw_folds(bridges, seed), strict=True))
    ]


def _candidates(queries: Sequence[Query]) -> dict[str, tuple[str, ...]]:
    """For every second hop the answers among which one is chosen."""
    everything = distinct_answers(query.answers[0] for query in queries)
    if len(everything) < 2:
        raise PscopeError(
            "all queries have one answer, so that there is nothing to choose among; give some with others"
        )
    by_second: dict[str, list[str]] = {}
    for query in queries:
        by_second.setdefault(query.second, []).append(query.answers[0])
    distinct = {second: distinct_answers(answers) for second, answers in by_second.items()}
    return {second: answers if len(answers) > 1 else everything for second, answers in distinct.items()}


def _all_wired(
    model: LanguageModel,
    queries: Sequence[Query],
    about: Sequence[Mapping[str, object]],
    grids: Mapping[str, Sequence[Pair]],
) -> list[Source]:
    """The queries in each wiring, at the pairs of its grid; those of one target, or of its length, side by side."""
    units: list[Source] = []
    for wiring, grid in grids.items():
        if grid:
            sources = [
                _wired(model, query, wiring, tuple(grid), {**columns, "method": wiring})
                for query, columns in zip(queries, about, strict=True)
            ]
            order = {source.target: place for place, source in reversed([*enumerate(sources)])}
            units += sorted(sources, key=lambda source: (len(source.target), order[source.target]))
    return units


def _plain(method: str, query: Query, about: Mapping[str, object], prompt: Prompt) -> Plain:
    """A query that is asked unpatched."""
    about = {**about, "method": method, "condition": CLEAN}
    return Plain(f"{method}/{query.text}", 1, method, prompt, about, query.answers)


def _wired(
    model: LanguageModel, query: Query, wiring: str, pairs: tuple[Pair, ...], about: Mapping[str, object]
) -> Source:
    """A query in one wiring: whose state is patched where."""
    if wiring == WITH_PLACEHOLDER:
        target = model.prompt(f"{query.second} {PLACEHOLDER} is", PLACEHOLDER)
    else:
        target = model.prompt(query.text if wiring == BACKPATCH else query.second)
    source = source_prompt(model, query.text if wiring == BACKPATCH else query.first)
    return Source(f"{wiring}/{query.text}", target, source, pairs, about, query.answers)


def shared_bridge(query: Query) -> str:
    """What queries have in common that go by the same bridge; without a bridge, those that describe the same."""
    return normalised(query.bridge[0] if query.bridge else query.first)


def pairs_of(wiring: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that make sense for a wiring: back-patching goes from a later layer into an earlier one."""
    return [(layer, target) for layer, target in pairs if wiring != BACKPATCH or target < layer]
