"""What Figure 4 shows: how often each way of asking gives the answer, scored and said, and what patching adds to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pscope.experiments.attribute_summary import SAID, SCORED
from pscope.experiments.bands import mean_bands, share_bands
from pscope.experiments.held_out import FOLDS, at_chosen, chosen_elsewhere, folds_of, found_at
from pscope.experiments.multi_hop import BACKPATCH, STEP_BY_STEP, VANILLA
from pscope.experiments.scored_sweep import at_best_pairs, chosen_pairs
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.inputs.queries import Query


def summarise(scores: pd.DataFrame, continuations: pd.DataFrame | None = None, seed: int = 0) -> pd.DataFrame:
    """How often each method answers: one row per way an answer is `judged` × method × measure.

    `found` is the share of queries, `low` and `high` its band. Vanilla and step by step have one measure, "accuracy". A
    wiring has four: "oracle", any (ℓ, ℓ*) of the grid gives the answer, and "held-out pair", at the (ℓ, ℓ*) that was
    best for the queries of the other folds (by scores, where rows were said at those pairs alone, which then have no
    oracle), averaged over those that tie; and of both what random vectors give. `pairs` is how many were chosen in all,
    `layer` and `target_layer` the one that counts most, missing where several count alike. Bands are from resampling
    bridges with all their queries, and exact where all agree; below three bridges nothing is held out.
    """
    tables = {SCORED: scores} if continuations is None else {SCORED: scores, SAID: continuations}
    rows = [row for judged, table in tables.items() for row in _method_rows(judged, table, seed)]
    columns = ["judged", "method", "measure", "found", "low", "high", "queries", "bridges"]
    layers = ["pairs", "layer", "target_layer"]
    return pd.DataFrame(rows).reindex(columns=[*columns, *layers]).astype(dict.fromkeys(layers, "Int64"))


def _method_rows(judged: str, table: pd.DataFrame, seed: int) -> list[dict[str, object]]:
    results = []
    bridges = table.drop_duplicates("query").set_index("query")["bridge"]

    def add(method: str, measure: str, share: pd.Series, **layers: object) -> None:
        """A row from the `share` of each query, (queries,), by its number."""
        groups = share.groupby(bridges)
        (low,), (high,) = share_bands(groups.sum().to_numpy()[:, None], groups.size().to_numpy(), seed)
        row = {"judged": judged, "method": method, "measure": measure, "found": share.mean(), "low": low, "high": high}
        results.append({**row, "queries": len(share), "bridges": groups.ngroups, **layers})

    for method, rows in table.groupby("method", sort=False):
        if method in (VANILLA, STEP_BY_STEP):
            add(method, "accuracy", rows.set_index("query")["found"].astype(float))
            continue
        patched, random = (found_at(rows, condition, ["query"]) for condition in (PATCHED, RANDOM))
        if not at_best_pairs(rows):
            add(method, "oracle", patched.max(axis=1))
            if len(random):
                add(method, "oracle, random vector", random.max(axis=1))
        if folds_of(rows, ["query"]).nunique() == FOLDS:
            chosen = chosen_pairs(rows, patched, ["query"])
            layers = _pair_columns(chosen)
            for measure, cells in (("held-out pair", patched), ("held-out pair, random vector", random)):
                if len(cells):
                    add(method, measure, at_chosen(cells, chosen), **layers)
    return results


def gains(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How much more probable the answer is than after the query as it stands: a measure that needs no threshold.

    `log_probability` is compared, by default that of the answer's first token. One row per wiring × condition: the mean
    `gain`, in nats, of patched states and of random vectors, `low` and `high`, from resampling bridges with all their
    queries, at the (ℓ, ℓ*) of the largest mean gain for the queries of the other folds; `pairs`, `layer` and
    `target_layer` as in `summarise`, and the `share` of queries that gain at all. What the wiring's target gains by
    itself, unpatched, is no merit of the patch and stands beside them. Empty below three bridges.
    """
    plain = scores[scores["method"] == VANILLA].set_index("query")["log_probability"].astype(float)
    bridges = scores.drop_duplicates("query").set_index("query")["bridge"]
    results = []
    for method, rows in scores[scores["method"] != VANILLA].groupby("method", sort=False):
        patched, random = (found_at(rows, name, ["query"], "log_probability") for name in (PATCHED, RANDOM))
        patched, random = (cells.sub(plain.loc[cells.index], axis=0) for cells in (patched, random))
        folds = folds_of(rows, ["query"]).loc[patched.index]
        if folds.nunique() < FOLDS:
            continue
        chosen = chosen_elsewhere(patched, folds)
        layers = _pair_columns(chosen)
        clean = rows[rows["condition"] == CLEAN].set_index("query")["log_probability"].astype(float)
        if method == BACKPATCH:
            # Its target is the query as it stands: what differs between two passes over it is rounding.
            clean = plain.loc[clean.index]
        gained = {
            PATCHED: (at_chosen(patched, chosen), layers),
            RANDOM: (at_chosen(random, chosen), layers),
            CLEAN: (clean - plain.loc[clean.index], {}),
        }
        for condition, (gain, details) in gained.items():
            groups = gain.groupby(bridges)
            (low,), (high,) = mean_bands(groups.sum().to_numpy()[:, None], groups.size().to_numpy(), seed)
            details = {"share": (gain > 0).mean(), "queries": len(gain), **details}
            results.append(
                {"method": method, "condition": condition, "gain": gain.mean(), "low": low, "high": high, **details}
            )
    columns = ["method", "condition", "gain", "low", "high", "share", "queries", "pairs", "layer", "target_layer"]
    return pd.DataFrame(results).reindex(columns=columns).astype(dict.fromkeys(columns[-3:], "Int64"))


def _pair_columns(chosen: pd.DataFrame) -> dict[str, object]:
    """What the summary says of the pairs that `chosen_elsewhere` chose; those that tie share a query among them."""
    weights = chosen.div(chosen.sum(axis=1), axis=0).sum()
    most = weights[np.isclose(weights, weights.max())]
    layer, target = most.index[0] if len(most) == 1 else (None, None)
    return {"pairs": (weights > 0).sum(), "layer": layer, "target_layer": target}


def transcripts(table: pd.DataFrame, queries: Sequence[Query]) -> list[dict[str, object]]:
    """Every text of every query: what was asked, what is right, and what each method said, by pair."""
    records = []
    for number, rows in table.groupby("query"):
        query = queries[number]
        continuations: dict[str, object] = {}
        for method, texts in rows.groupby("method", sort=False):
            if method in (VANILLA, STEP_BY_STEP):
                continuations[method] = texts["continuation"].iloc[0]
                continue
            continuations[method] = {
                condition: {
                    "clean" if row.condition == CLEAN else f"{row.layer} → {row.target_layer}": row.continuation
                    for row in of_condition.itertuples()
                }
                for condition, of_condition in texts.groupby("condition", sort=False)
            }
        question = {"query": query.text, "first": query.first, "second": query.second, "source": query.source}
        records.append({**question, "answers": query.answers, "bridge": query.bridge, **continuations})
    return records
