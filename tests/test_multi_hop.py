import copy
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_model, without_a_number
from reference import hidden_states, patched_continuation, patched_logits
from test_unpatched import greedy
from transformers import MambaConfig, MambaForCausalLM

from pscope import Decoding, LanguageModel, Patchscope, Prompt, PromptError, PscopeError
from pscope.engine.generate import GREEDY
from pscope.engine.selfcheck import PATHS, SelfCheck
from pscope.experiments.attribute_extraction import plain_questions, question_of
from pscope.experiments.known import PlainWords
from pscope.experiments.multi_hop import (
    BACKPATCH,
    COT,
    STEP_BY_STEP,
    VANILLA,
    WITH_PLACEHOLDER,
    MultiHop,
    MultiHopScores,
    answered_hops,
    pairs_of,
    plain_hops,
    shared_bridge,
    step_by_step,
)
from pscope.experiments.multi_hop_summary import gains, summarise, transcripts
from pscope.experiments.scored_sweep import best_pairs, scored_plainly
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.inputs.queries import Query
from pscope.inputs.relations import shipped_relations
from pscope.metrics import answer_found
from pscope.models import chats
from pscope.show.multi_hop import answers_figure, answers_heatmaps

PAIRS = [(0, 0), (3, 1), (4, 2), (1, 4)]
QUERIES = [
    Query("the land of sushi", "The money of", ("yen",), ("Japan",), "The land of sushi is", "The money of Japan is"),
    Query(
        "the land of tacos", "The money of", ("peso",), ("Mexico",), "The land of tacos is", "The money of Mexico is"
    ),
    Query("the land of sushi", "A city in", ("Tokyo",), ("Japan",), "The land of sushi is", "A city in Japan is"),
    Query("the maker of the big phone", "A city in", ("Rome",), ("X",), "The maker is", "A city in X is"),
]


def table_of(model, queries, **options):
    return MultiHop(model, queries, PAIRS, Decoding(5), reasoning=Decoding(7), **options).table()


def said_by(model, asked, decoding=GREEDY):
    """What the model says to each of the plain texts."""
    return PlainWords(model, asked, decoding).table().set_index("text")["continuation"].to_dict()


def hops_of(model, queries, decoding=GREEDY):
    return answered_hops(queries, said_by(model, plain_hops(queries), decoding))


@pytest.fixture(scope="module")
def table(tiny):
    """What the random model says to all queries."""
    return table_of(tiny, QUERIES)


def test_every_row_against_the_one_row_loop(tiny, table):
    units = MultiHop(tiny, QUERIES, PAIRS).units
    assert sum(unit.rows for unit in units) - 2 * 4 == 4 * 2 * (4 + 4 + 2) == table["layer"].notna().sum()
    assert not table.duplicated(["query", "method", "condition", "layer", "target_layer"]).any()
    assert set(table["method"]) == {VANILLA, STEP_BY_STEP, COT, WITH_PLACEHOLDER, BACKPATCH}
    # Two ask by way of Japan.
    assert (table.groupby("bridge")["fold"].nunique() == 1).all()
    assert table["fold"].nunique() == table["bridge"].nunique() == 3
    decode = tiny.tokenizer.decode
    for row in table.itertuples():
        query = QUERIES[row.query]
        assert (row.text, row.found) == (query.text, answer_found(row.continuation, query.answers))
        assert row.bridge == query.bridge[0].casefold()
        if row.method == VANILLA:
            assert row.continuation == decode(greedy(tiny, tiny.prompt(query.text).ids, 5))
            continue
        if row.method == STEP_BY_STEP:
            ids = tiny.prompt(f"Let's think step by step. {query.text}").ids
            assert row.continuation == decode(greedy(tiny, ids, 7))
            continue
        # Source and target of each wiring, in so many words.
        source = {BACKPATCH: query.text}.get(row.method, query.first)
        target, position = {
            COT: (query.second, -1),
            WITH_PLACEHOLDER: (f"{query.second} x is", -2),
            BACKPATCH: (query.text, -1),
        }[row.method]
        if row.condition == PATCHED:
            read = tiny.prompt(source)
            assert (row.position, row.token) == (len(read) - 1, read.tokens[-1])
        else:
            assert row.position is row.token is pd.NA
        ids = tiny.prompt(target).ids
        assert tiny.prompt(target).tokens[position] in (" of", " in", " x", " sushi", "os", " phone")
        if row.condition == CLEAN:
            assert row.continuation == decode(greedy(tiny, ids, 5))
        if row.condition == PATCHED:
            vector = hidden_states(tiny.hf, tiny.layers, tiny.prompt(source).ids)[row.layer, -1]
            place = len(ids) + position
            said = patched_continuation(tiny.hf, tiny.layers, ids, place, row.target_layer, vector, 5)
            assert row.continuation == decode(said)
        if row.method == BACKPATCH and row.condition != CLEAN:
            assert row.target_layer < row.layer


@pytest.mark.parametrize("memory", [1, 2**30])
def test_a_row_says_the_same_in_whatever_company(tiny, table, memory):
    pd.testing.assert_frame_equal(table_of(tiny, QUERIES, memory=memory), table)
    alone = table_of(tiny, QUERIES[1:2], memory=memory)
    keys = ["method", "condition", "layer", "target_layer"]
    among = table[table["query"] == 1].set_index(keys)["continuation"]
    pd.testing.assert_series_equal(alone.set_index(keys)["continuation"], among, check_index_type=False)
    assert not table_of(tiny, QUERIES, memory=memory, seed=4).equals(table)


@pytest.mark.parametrize("memory", [1, 2**30])
def test_every_score_against_the_one_row_loop(tiny, memory):
    # One more query of cities, which nobody asks, has an answer that is a candidate all the same.
    more = Query("the land of fado", "A city in", ("Lisbon",), ("Portugal",))
    table = MultiHopScores(tiny, QUERIES, PAIRS, among=[more], memory=memory).table()
    assert not table.duplicated(["query", "method", "condition", "layer", "target_layer"]).any()
    assert table["layer"].notna().sum() == 4 * 2 * (4 + 4 + 2)
    candidates = {"The money of": ["yen", "peso"], "A city in": ["Tokyo", "Rome", "Lisbon"]}
    tokens = {word: tiny.tokenizer(f" {word}").input_ids[0] for words in candidates.values() for word in words}
    assert len(set(tokens.values())) == 5
    for row in table.itertuples():
        query = QUERIES[row.query]
        source = {BACKPATCH: query.text}.get(row.method, query.first)
        target, position = {
            VANILLA: (query.text, -1),
            COT: (query.second, -1),
            WITH_PLACEHOLDER: (f"{query.second} x is", -2),
            BACKPATCH: (query.text, -1),
        }[row.method]
        ids = tiny.prompt(target).ids
        place = len(ids) + position
        if row.condition == RANDOM:
            assert row.answer in candidates[query.second]
            continue
        layer = row.target_layer if row.condition == PATCHED else 0
        read, at = (tiny.prompt(source), row.layer) if row.condition == PATCHED else (tiny.prompt(target), 0)
        where = -1 if row.condition == PATCHED else place
        vector = hidden_states(tiny.hf, tiny.layers, read.ids)[at, where]
        logits = patched_logits(tiny.hf, tiny.layers, ids, place, layer, vector)[-1].log_softmax(-1)
        assert row.answer == max(candidates[query.second], key=lambda word: logits[tokens[word]])
        assert row.found == (row.answer == query.answers[0])
        assert row.log_probability == pytest.approx(logits[tokens[query.answers[0]]].item(), abs=1e-4)


def test_what_is_chosen_among(tiny):
    # A second hop with one answer alone has those of all others beside it.
    single = Query("the land of fado", "The river of", ("Tejo",), ("Portugal",))
    units = [unit for unit in MultiHopScores(tiny, [*QUERIES, single], [(3, 1)]).units if hasattr(unit, "candidates")]
    assert {unit.candidates for unit in units if unit.about["query"] == 4} == {("yen", "peso", "Tokyo", "Rome", "Tejo")}
    assert {unit.candidates for unit in units if unit.about["query"] == 0} == {("yen", "peso")}
    with pytest.raises(PscopeError, match="all queries have one answer, so that there is nothing to choose among"):
        MultiHopScores(tiny, QUERIES[:1], [(3, 1)])
    # This tokenizer passes over a byte that it does not know.
    twin = Query("the land of sushi, too", "A city in", ("Tokyo\x16",), ("Japan",))
    with pytest.raises(PromptError, match=r"' Tokyo' and ' Tokyo\\x16' have the same tokens; leave one out"):
        MultiHopScores(tiny, [*QUERIES, twin], [(3, 1)])


def test_words_are_heard_where_scores_are_best_for_others(tiny):
    scores = MultiHopScores(tiny, QUERIES, PAIRS).table()
    best = best_pairs(scores, "method", ["query"])
    assert set(best) == {COT, WITH_PLACEHOLDER, BACKPATCH}
    assert all(set(folds) == {0, 1, 2} for folds in best.values())
    said = MultiHop(tiny, QUERIES, best, Decoding(5), reasoning=Decoding(7)).table()
    grid = table_of(tiny, QUERIES).set_index(["query", "method", "condition", "layer", "target_layer"])
    for row in said[said["layer"].notna()].itertuples():
        pair = row.layer, row.target_layer
        assert pair in best[row.method].values()
        assert row.chosen == (pair == best[row.method][row.fold])
        assert row.continuation == grid.loc[(row.query, row.method, row.condition, *pair), "continuation"]
    summary = summarise(scores, said).set_index(["judged", "method", "measure"])
    own = said[(said["method"] == COT) & said["chosen"].fillna(False) & (said["condition"] == PATCHED)]
    assert len(own) == 4
    assert summary.loc[("said", COT, "held-out pair"), "found"] == own["found"].mean()
    assert ("said", COT, "oracle") not in summary.index
    assert ("scored", COT, "oracle") in summary.index


def test_gains_by_hand():
    # Six queries of six bridges; at (3, 0) each gains 2 nats but the first, which loses 4; random vectors lose 1.
    rows = []
    for query in range(6):
        base = {"query": query, "bridge": f"{query}", "fold": query % 3, "found": False}
        rows.append({**base, "method": VANILLA, "condition": CLEAN, "log_probability": -5.0 - query})
        # The second hop alone makes the answer more probable than the whole query does.
        rows.append({**base, "method": COT, "condition": CLEAN, "log_probability": -4.75 - query})
        for layer in (1, 3):
            at = {**base, "method": COT, "layer": layer, "target_layer": 0}
            gain = 0.5 if layer == 1 else (-4 if query == 0 else 2)
            rows.append({**at, "condition": PATCHED, "log_probability": -5.0 - query + gain})
            rows.append({**at, "condition": RANDOM, "log_probability": -6.0 - query})
    table = pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})
    gained = gains(table).set_index("condition")
    # On folds without query 0, 3 is best; where it is among the others, theirs is (2 + 2 + 2 - 4) / 4, as is that of 1.
    assert gained.loc[PATCHED, "gain"] == pytest.approx((-4 + 2 + 4 * (2 + 0.5) / 2) / 6)
    assert gained.loc[RANDOM, "gain"] == pytest.approx(-1)
    assert gained.loc[CLEAN, ["gain", "share"]].tolist() == [0.25, 1]
    assert gained.loc[CLEAN, "layer"] is pd.NA
    assert gained.loc[PATCHED, "queries"] == 6
    assert gains(table[table["query"] < 2].assign(fold=0)).empty


def test_both_hops_are_asked_alone(smollm2):
    capital = Query(
        "the country of sushi", "The capital city of", ("Tokyo",), ("Japan", "Japanese"), "Sushi comes from",
        "The capital city of Japan is",
    )  # fmt: skip
    wrong = Query(
        "the country of sushi", "The capital city of", ("Osaka",), ("Peru",), "Sushi comes from", "Two and two"
    )
    right, lost = hops_of(smollm2, [capital, wrong])
    assert (right.one_found, right.two_found, right.solvable) == (True, True, True)
    assert (lost.one_found, lost.two_found, lost.solvable) == (False, False, False)
    with pytest.raises(PscopeError, match='has no "bridge"'):
        plain_hops([Query("a", "b", ("c",))])


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_asked_twice_goes_on_until_all_who_ask_are_answered(tiny, order):
    first, second, question = "The land of sushi is", "The money of Japan is", "The money of the land of sushi"
    early, late = [], []
    for text in (first, second, question):
        words = re.findall(r"[a-z]{3,}", tiny.tokenizer.decode(greedy(tiny, tiny.prompt(text).ids, 40)).casefold())
        once = [word for word in words if words.count(word) == 1]
        early.append(once[0])
        late.append(once[-1])
    soon, later = (
        Query("the land of sushi", "The money of", (two, three), (one,), first, second)
        for one, two, three in (early, late)
    )
    for asked in ([soon], [later], [soon, later][::order]):
        assert all(hops.solvable for hops in hops_of(tiny, asked, Decoding(40)))


@pytest.mark.parametrize("experiment", [MultiHopScores, MultiHop])
def test_two_queries_of_one_text_are_refused(tiny, experiment):
    # Which of them a state has answered could not be told.
    one, other = (Query("the land of sushi", "The money of", (answer,), ("Japan",)) for answer in ("yen", "won"))
    with pytest.raises(PscopeError, match="vanilla/The money of the land of sushi is read twice"):
        experiment(tiny, [one, other, *QUERIES], PAIRS).table()


def test_steps_are_asked_for_in_the_chat_template_with_one_start_token(smollm2):
    text = step_by_step(smollm2, QUERIES[0], chat=True)
    assert "The money of the land of sushi? Let's think step by step." in text
    expected = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "The money of the land of sushi? Let's think step by step."}],
        add_generation_prompt=True,
    )["input_ids"]
    assert list(smollm2.prompt(text).ids) == list(expected)
    assert step_by_step(smollm2, QUERIES[0], chat=False) == "Let's think step by step. The money of the land of sushi"


def test_the_path_of_every_target_is_its_own(tiny, monkeypatch):
    checked = []

    def choose(model, target):
        checked.append(target.text)
        name = "plain" if len(target) > 7 else "staircase"
        return PATHS[name](model, target), SelfCheck(name, "planted")

    monkeypatch.setattr("pscope.engine.patchscope.choose_path", choose)
    table = table_of(tiny, QUERIES)
    lengths = {query.text: len(tiny.prompt(query.text)) for query in QUERIES}
    backpatch = table["method"] == BACKPATCH
    slow = backpatch & (table["text"].map(lengths) > 7)
    assert slow.any()
    assert not slow[backpatch].all()
    # What is unpatched goes by the path of the longest prompt.
    unpatched = table["method"].isin([VANILLA, STEP_BY_STEP])
    assert set(table[slow | unpatched]["path"]) == {"plain"}
    assert set(table[~slow & ~unpatched]["path"]) == {"staircase"}
    # Of all that have one length and one marked place, one is checked.
    targets = [unit.target for unit in MultiHop(tiny, QUERIES, PAIRS).units if isinstance(unit.target, Prompt)]
    steps = [tiny.prompt(max((step_by_step(tiny, query, False) for query in QUERIES), key=len))]
    alike = {(len(target), target.positions) for target in [*targets, *steps]}
    assert len(checked) == len(alike) < len({*targets, *steps})


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
            "it did not end within 0.2 sec",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ],
)
def test_a_chat_template_that_cannot_be_filled_in(tiny, monkeypatch, template, fault):
    monkeypatch.setattr(chats, "TEMPLATE_SECONDS", 0.2)
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    model = LanguageModel(tiny.hf, tokenizer, "tiny")
    with pytest.raises(PscopeError, match=f"the chat template of tiny cannot be filled in: {fault}"):
        step_by_step(model, QUERIES[0], chat=True)


@pytest.mark.parametrize("ask", ["hops", "plainly"])
def test_a_recurrent_model_is_asked_by_a_path_that_was_checked(tokenizer, ask):
    mamba = random_model(MambaForCausalLM, MambaConfig, tokenizer, state_size=4)
    query = QUERIES[0]
    if ask == "hops":
        asked = plain_hops([query])
    else:
        asked = plain_questions([question_of(mamba, shipped_relations()[0], contexts=1)])[:4]
    for text, said in said_by(mamba, asked, Decoding(3)).items():
        assert said == mamba.tokenizer.decode(greedy(mamba, mamba.prompt(text).ids, 3))


def test_what_fails_is_named(tiny):
    with without_a_number(tiny, tiny.prompt(" tacos").ids[-1]), pytest.raises(PscopeError, match="tacos.* failed"):
        table_of(tiny, QUERIES)
    with pytest.raises(PscopeError, match="there are no queries"):
        table_of(tiny, [])


PLANTED = [(1, 0), (3, 0), (1, 2), (3, 2)]
BACKWARDS = [(1, 0), (3, 0), (3, 2)]


def planted(queries=6) -> pd.DataFrame:
    rows = []
    for query in range(queries):
        base = {"query": query, "text": "t", "source": "s", "fold": query % 3, "continuation": "c"}
        base["bridge"] = f"bridge {query}"
        rows.append({**base, "method": VANILLA, "condition": CLEAN, "found": query == 0})
        rows.append({**base, "method": STEP_BY_STEP, "condition": CLEAN, "found": query < 2})
        for method in (COT, BACKPATCH):
            for layer, target in pairs_of(method, PLANTED):
                found = (layer, target) == (3, 0) or query == layer
                at = {**base, "method": method, "layer": layer, "target_layer": target}
                rows.append({**at, "condition": PATCHED, "found": found and method == COT})
                rows.append({**at, "condition": RANDOM, "found": query == 5})
            rows.append({**base, "method": method, "condition": CLEAN, "found": False})
    return pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})


def test_the_summary_by_hand():
    summary = summarise(planted()).set_index(["method", "measure"])
    assert set(summary["judged"]) == {"scored"}
    assert summary.loc[(VANILLA, "accuracy"), "found"] == pytest.approx(1 / 6)
    assert summary.loc[(STEP_BY_STEP, "accuracy"), "found"] == pytest.approx(2 / 6)
    cot = summary.loc[COT]
    assert cot.loc["oracle", "found"] == 1
    assert cot.loc["oracle, random vector", "found"] == pytest.approx(1 / 6)
    assert cot.loc["held-out pair", ["found", "layer", "target_layer"]].tolist() == [1, 3, 0]
    assert cot.loc["held-out pair, random vector", "found"] == pytest.approx(1 / 6)
    assert summary.loc[(BACKPATCH, "held-out pair"), "found"] == 0
    random = np.random.default_rng(0)
    means = (np.arange(6) == 0).astype(float)[random.integers(6, size=(20_000, 6))].mean(axis=1)
    band = summary.loc[(VANILLA, "accuracy"), ["low", "high"]].tolist()
    assert band == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    # Back-patching answers nobody, so that all its pairs tie.
    tied = summary.loc[(BACKPATCH, "held-out pair")]
    assert (tied["pairs"], tied["layer"] is pd.NA, cot.loc["held-out pair", "pairs"]) == (len(BACKWARDS), True, 1)
    # All six agree: 6 of 6 are not improbable (2.5 %) down to .025 to the power of a sixth.
    assert cot.loc["oracle", ["low", "high"]].tolist() == pytest.approx([0.025 ** (1 / 6), 1])
    few = summarise(planted(2))
    assert not few["measure"].str.startswith("held-out").any()


def test_bands_resample_whole_bridges():
    # Three bridges of 1, 2 and 3 queries, of which the third is always answered and the others never.
    table = planted()
    table["bridge"] = table["query"].map({0: "a", 1: "b", 2: "b", 3: "c", 4: "c", 5: "c"})
    table.loc[table["method"] == VANILLA, "found"] = table["query"] >= 3
    vanilla = summarise(table).set_index(["method", "measure"]).loc[(VANILLA, "accuracy")]
    # All three resamples may be of one bridge (1 in 27), which is more than 2.5 %.
    assert (vanilla["found"], vanilla["low"], vanilla["high"]) == (0.5, 0, 1)
    assert (vanilla["queries"], vanilla["bridges"]) == (6, 3)
    table.loc[table["method"] == VANILLA, "found"] = True
    vanilla = summarise(table).set_index(["method", "measure"]).loc[(VANILLA, "accuracy")]
    assert vanilla["low"] == pytest.approx(0.025 ** (1 / 3))


def test_what_ties_on_other_queries_is_averaged():
    # Three queries, each answered at a pair of its own, and one that is answered at all; random vectors also at 1.
    answered_at = [{1}, {3}, {5}, {1, 3, 5}]
    rows = [
        {"query": query, "bridge": f"{query}", "fold": query % 3, "method": COT, "condition": condition}
        | {"layer": layer, "target_layer": 0, "found": layer in (layers | {1} if condition == RANDOM else layers)}
        for query, layers in enumerate(answered_at)
        for condition in (PATCHED, RANDOM)
        for layer in (1, 3, 5)
    ]
    table = pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})
    summary = summarise(table).set_index("measure")
    # Queries 0 and 3 share a fold: there 3 and 5 tie; query 1 takes 1 or 5, query 2 takes 1 or 3.
    assert summary.loc["held-out pair", "found"] == pytest.approx((0 + 0 + 0 + 1) / 4)
    assert summary.loc["held-out pair, random vector", "found"] == pytest.approx((0 + 1 / 2 + 1 / 2 + 1) / 4)
    assert summary.loc["held-out pair", "pairs"] == 3
    assert summary.loc["held-out pair", ["layer", "target_layer"]].isna().all()


def test_transcripts_hold_every_text():
    told = transcripts(planted(), [QUERIES[0]] * 6)
    assert len(told) == 6
    assert told[0]["query"] == QUERIES[0].text
    assert told[0]["answers"] == ("yen",)
    assert set(told[0][COT][PATCHED]) == {"1 → 0", "3 → 0", "1 → 2", "3 → 2"}
    assert told[0][BACKPATCH][CLEAN] == {"clean": "c"}


def test_the_figures_show_the_table():
    summary = summarise(planted())
    # A band that rounding puts beside its mean is none of less than no width.
    summary.loc[0, "low"] = summary.loc[0, "found"] + 1e-12
    (axes,) = answers_figure(summary, "$").axes
    shares = [share for container in axes.containers for share in container.lines[0].get_xdata()]
    assert sorted(shares) == pytest.approx(sorted(summary["found"]))
    assert [label.get_text() for label in axes.get_yticklabels()] == [*dict.fromkeys(summary["method"])][::-1]
    said = planted()
    said["found"] = said["found"] & (said["condition"] == PATCHED)
    both = summarise(planted(), said)
    panels = answers_figure(both, "$").axes
    assert [axes.get_title() for axes in panels] == [
        "the right answer is the most probable",
        "the right answer is in what is said",
    ]
    methods = [label.get_text() for label in panels[0].get_yticklabels()]
    for axes, judged in zip(panels, ("scored", "said"), strict=True):
        expected = both[both["judged"] == judged].set_index(["method", "measure"])["found"]
        got = {
            (methods[round(place)], container.get_label()): share
            for container in axes.containers
            for share, place in zip(*container.lines[0].get_data(), strict=True)
        }
        assert got == pytest.approx(expected.to_dict())
        hollow = {each.get_label() for each in axes.containers if each.lines[0].get_markerfacecolor() == "white"}
        assert hollow == {"held-out pair, random vector", "oracle, random vector"}
    cot, backpatch = answers_heatmaps(planted(), "title").axes[:2]
    # Source layers 1 and 3 to the right, target layers 0 and 2 upwards.
    assert [label.get_text() for label in cot.get_xticklabels()] == ["1", "3"]
    assert [label.get_text() for label in cot.get_yticklabels()] == ["2", "0"]
    np.testing.assert_allclose(cot.collections[0].get_array().reshape(2, 2), [[1 / 6, 1 / 6], [1 / 6, 1]])
    assert backpatch.collections[0].get_array().reshape(2, 2)[1].tolist() == [0, 0]


def test_a_candidate_that_holds_the_answer_is_another_one(tiny):
    scope = Patchscope(tiny, tiny.prompt("A city in x is"))
    both = ("Tokyo", "Tokyo Rome")
    chosen = {by: scored_plainly(scope, both, ("tokyo",), by) for by in ("whole", "mean")}
    for by, told in chosen.items():
        assert told["found"] == (told["answer"] == "Tokyo"), by
        whole = scope.choose(torch.ones(1, tiny.hidden_size), tiny.n_layers, [" Tokyo", " Tokyo Rome"], by=by)
        assert told["log_probability"] == pytest.approx(whole.clean.scores[0, 0].item(), abs=1e-5)
    # Of the two the longer one is chosen by one of the measures, or this would show nothing.
    assert "Tokyo Rome" in {told["answer"] for told in chosen.values()}


def test_bridges_that_are_one_are_held_out_together():
    named = Query("the land of jazz", "The capital of", ("Washington",), ("the United States",))
    for other in ("United States", "united states"):
        assert shared_bridge(replace(named, bridge=(other,))) == shared_bridge(named)
    # Without a bridge, it is what they describe.
    first, second = (Query("the land of jazz", second, ("a",)) for second in ("The capital of", "The money of"))
    assert shared_bridge(first) == shared_bridge(second)


def test_back_patching_gains_nothing_by_its_target():
    # It is the query as it stands, but for the rounding of another pass.
    table = planted().assign(log_probability=-1.0)
    clean = (table["condition"] == CLEAN) & (table["method"] != VANILLA)
    table.loc[clean, "log_probability"] += 1e-6
    told = gains(table).set_index(["method", "condition"])
    assert told.loc[(BACKPATCH, CLEAN), ["gain", "low", "high", "share"]].tolist() == [0, 0, 0, 0]
    assert told.loc[(COT, CLEAN), "share"] == 1
