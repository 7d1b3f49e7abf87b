from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_model, without_a_number
from reference import hidden_states, patched_continuation, patched_logits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_unpatched import greedy
from transformers import LlamaConfig, LlamaForCausalLM

from pscope import Decoding, Patchscope, PromptError, PscopeError
from pscope.engine.generate import GREEDY
from pscope.experiments import sweep
from pscope.experiments.attribute_extraction import (
    ANOTHER,
    MAJORITY,
    PROBE,
    AttributeExtraction,
    AttributeScores,
    Question,
    plain_questions,
    question_of,
)
from pscope.experiments.attribute_summary import BEST, HELD_OUT, MEAN, SAID, SCORED, over_layers, summarise
from pscope.experiments.known import PlainWords
from pscope.experiments.scored_sweep import best_pairs
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM, Source
from pscope.inputs.relations import Marked, Relation, Sample
from pscope.metrics import answer_found
from pscope.models.prompts import Nearest
from pscope.show.attribute_extraction import accuracy_figure, accuracy_heatmaps, accuracy_table

PAIRS = [(0, 0), (0, 3), (3, 1), (4, 4)]
SUBJECTS = ["Japan", "Peru", "Chile", "Egypt", "Kenya"]


def relation_of(answers, target="one x two"):
    samples = [
        Sample(subject, answer, (Marked(f"We saw {subject} then", subject), Marked(f"In {subject}", subject)))
        for subject, answer in zip(SUBJECTS, answers, strict=True)
    ]
    return Relation("planted", "factual", Marked(target, "x"), tuple(samples))


def every_sample(model, relation):
    sources = tuple(tuple(model.prompt(source.text, source.at) for source in s.sources) for s in relation.samples)
    target = model.prompt(relation.target.text, relation.target.at)
    return Question(relation, target, relation.samples, sources)


def state(model, source, layer):
    return hidden_states(model.hf, model.layers, source.ids)[layer, source.position]


def endless(model, target, vector, layer, new_tokens):
    ids = patched_continuation(model.hf, model.layers, target.ids, target.position, layer, vector, new_tokens)
    return model.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def asked(tiny):
    """A question about which a random model says the right thing now and then: answers are words that it says."""
    target = tiny.prompt("one x two", "x")
    words = []
    for subject in SUBJECTS:
        source = tiny.prompt(f"We saw {subject} then", subject)
        said = endless(tiny, target, state(tiny, source, 3), 1, 6)
        words.append(
            tuple(dict.fromkeys(word for word in said.replace("_", " ").split() if word.isalpha()))[:2] or ("no",)
        )
    return every_sample(tiny, relation_of(words))


def table_of(model, question, new_tokens=6, **options):
    return AttributeExtraction(model, [question], PAIRS, Decoding(new_tokens), **options).table()


def scores_of(model, question, pairs=PAIRS, **options):
    return AttributeScores(model, [question], pairs, **options).table()


def known_to(model, relation, *, samples, contexts, decoding=GREEDY):
    """The question of a relation about what the model knows, and among how many subjects they were drawn."""
    question = question_of(model, relation, contexts)
    said = PlainWords(model, plain_questions([question]), decoding).table().set_index("text")["continuation"]
    return question.known(said.to_dict(), samples, seed=0)


def test_every_row_against_the_one_row_loop(tiny, asked):
    # So little memory that subjects come in several chunks.
    table = table_of(tiny, asked, seed=2, memory=9_000_000)
    samples = {sample.subject: (sample, sources) for sample, sources in zip(asked.samples, asked.sources, strict=True)}
    assert table.groupby("condition").size().to_dict() == {
        PATCHED: 5 * 2 * 4,
        RANDOM: 5 * 4,
        ANOTHER: 5 * 2 * 4,
        CLEAN: 5 * 2,
    }
    units = AttributeExtraction(tiny, [asked], PAIRS).units
    assert sum(unit.rows for unit in units) == 5 * 3 * 4
    assert not table.duplicated(["subject", "context", "condition", "layer", "target_layer"]).any()
    clean = tiny.tokenizer.decode(greedy(tiny, asked.target.ids, 6))
    settled = 0
    for row in table.itertuples():
        sample, sources = samples[row.subject]
        assert row.object == sample.object
        if row.condition in (PATCHED, ANOTHER):
            lender, sources = samples[row.state_of]
            vector = state(tiny, sources[row.context], row.layer)
            whole = endless(tiny, asked.target, vector, row.target_layer, 6)
            # A row that left the batch said the beginning of it, and what is found in it is found in the whole.
            assert whole.startswith(row.continuation)
            assert row.found == answer_found(whole, sample.answers)
            settled += row.continuation != whole
            assert (row.condition == PATCHED) == (row.state_of == row.subject)
            # "We saw Japan then", "In Japan"
            assert (row.position, row.token) == (2 - row.context, f" {row.state_of}")
            if row.condition == ANOTHER:
                assert not set(lender.answers) & set(sample.answers)
        if row.condition == CLEAN:
            assert (row.continuation, row.found) == (clean, answer_found(clean, sample.answers))
        if row.condition in (RANDOM, CLEAN):
            assert row.position is pd.NA
        assert row.chosen is pd.NA
    assert set(table["path"]) == {"staircase"}
    assert settled > 0
    assert table[table["condition"] == PATCHED]["found"].any()


def test_every_score_against_the_one_row_loop(tiny):
    # Two objects are of several tokens and begin alike, one is right for another subject too.
    answers = [("New York",), ("New Mexico",), ("gold", "silver"), ("silver",), ("stone",)]
    question = every_sample(tiny, relation_of(answers))
    table = scores_of(tiny, question, seed=2, memory=9_000_000)
    samples = {sample.subject: (sample, of) for sample, of in zip(question.samples, question.sources, strict=True)}
    assert table.groupby("condition").size().to_dict() == {
        PATCHED: 5 * 2 * 4,
        RANDOM: 5 * 4,
        ANOTHER: 5 * 2 * 4,
        CLEAN: 5 * 2,
        PROBE: 5 * 2 * 3,
        MAJORITY: 5 * 2,
    }
    assert sum(unit.rows for unit in AttributeScores(tiny, [question], PAIRS).units) == 5 * 3 * 4
    assert not table.duplicated(["subject", "context", "condition", "layer", "target_layer"]).any()
    objects = [answer[0] for answer in answers]
    tokens = [tiny.tokenizer(f" {name}").input_ids for name in objects]
    target = question.target

    def chosen(layer, vector):
        """The object of which as many tokens as tell it from the others are the most probable, and the first tokens."""
        likely, first = [], []
        for own in tokens:
            needed = 2 if own[0] == tokens[0][0] else 1
            ids = [*target.ids, *own[:needed]]
            logits = patched_logits(tiny.hf, tiny.layers, ids, target.position, layer, vector)[len(target) - 1 : -1]
            each = logits.log_softmax(-1)[range(needed), own[:needed]]
            likely.append(each.sum().item())
            first.append(each[0].item())
        return objects[int(np.argmax(likely))], first

    own = hidden_states(tiny.hf, tiny.layers, target.ids)[0, target.position]
    clean, clean_first = chosen(0, own)
    for row in table.itertuples():
        sample, _ = samples[row.subject]
        assert row.found == answer_found(row.answer, sample.answers)
        if row.condition in (PATCHED, ANOTHER):
            _, sources = samples[row.state_of]
            answer, first = chosen(row.target_layer, state(tiny, sources[row.context], row.layer))
            assert row.answer == answer
            assert (row.position, row.token) == (2 - row.context, f" {row.state_of}")
            if row.condition == PATCHED:
                assert row.log_probability == pytest.approx(first[objects.index(sample.object)], abs=1e-4)
            else:
                assert row.log_probability is pd.NA
        if row.condition == CLEAN:
            assert row.answer == clean
            assert row.log_probability == pytest.approx(clean_first[objects.index(sample.object)], abs=1e-4)
        if row.condition == PROBE:
            assert (row.state_of, row.token) == (row.subject, f" {row.subject}")
        if row.condition in (RANDOM, CLEAN, MAJORITY):
            assert row.position is pd.NA
    probed = table["condition"].isin([PROBE, MAJORITY])
    assert set(table[~probed]["path"]) == {"staircase"}
    assert table[probed]["path"].isna().all()
    # By the whole of an answer, it is its own score.
    whole = scores_of(tiny, question, seed=2, by="whole")
    rows = whole[(whole["condition"] == PATCHED) & (whole["subject"] == "Japan")]
    for row in rows.itertuples():
        vector = state(tiny, samples["Japan"][1][row.context], row.layer)
        ids = [*target.ids, *tokens[0]]
        logits = patched_logits(tiny.hf, tiny.layers, ids, target.position, row.target_layer, vector)
        expected = logits[len(target) - 1 : -1].log_softmax(-1)[range(len(tokens[0])), tokens[0]].sum()
        assert row.log_probability == pytest.approx(expected.item(), abs=1e-4)


def test_words_are_heard_where_scores_are_best_for_others(tiny, asked):
    scores = scores_of(tiny, asked)
    best = best_pairs(scores, "relation", ["subject", "context"])
    folds = scores.drop_duplicates("subject").set_index("subject")["fold"]
    patched = scores[scores["condition"] == PATCHED].astype({"found": float, "log_probability": float})
    for fold, pair in best["planted"].items():
        others = patched[patched["fold"] != fold].groupby(["layer", "target_layer"])
        ranked = others[["found", "log_probability"]].mean().sort_values(["found", "log_probability"])
        assert ranked.index[-1] == pair
    said = AttributeExtraction(tiny, [asked], best, Decoding(6)).table()
    pairs = set(best["planted"].values())
    patched = said[said["condition"] == PATCHED]
    assert set(zip(patched["layer"], patched["target_layer"], strict=True)) == pairs
    for row in said.itertuples():
        if row.condition == CLEAN:
            assert row.chosen is pd.NA
        else:
            assert row.chosen == ((row.layer, row.target_layer) == best["planted"][folds[row.subject]])
    # The same words as on a grid of all these pairs.
    keys = ["subject", "context", "condition", "layer", "target_layer"]
    grid = AttributeExtraction(tiny, [asked], [*pairs], Decoding(6)).table()
    both = said.merge(grid, on=keys)
    assert (both["continuation_x"] == both["continuation_y"]).all()
    assert len(both) == len(said) == len(grid)
    # What is held out are the words at the marked pairs, and there is no oracle.
    scored, heard = summarise(scores, said).to_dict("records")
    assert (scored["judged"], heard["judged"]) == (SCORED, SAID)
    own = patched[patched["chosen"].astype(bool)]
    assert heard["held_out"] == own["found"].mean()
    assert np.isnan([heard["oracle"], heard["another_oracle"]]).all()
    assert heard["probe_held_out"] == scored["probe_held_out"]


def test_relations_whose_best_pairs_differ_speak_in_one_batch(tiny, asked, monkeypatch):
    other = replace(asked, relation=replace(asked.relation, name="other"), target=tiny.prompt("a b x c", 2))
    third = replace(asked, relation=replace(asked.relation, name="third"), target=tiny.prompt("say x now", 1))
    assert len(asked.target) == len(third.target) != len(other.target)
    best = {
        "planted": {0: (0, 3), 1: (3, 1), 2: (3, 1)},
        "other": dict.fromkeys(range(3), (2, 2)),
        "third": {0: (1, 0), 1: (4, 2), 2: (2, 4)},
    }
    asked_together = []
    together = sweep.generate_together
    monkeypatch.setattr(
        sweep, "generate_together", lambda asks, *how: asked_together.append(len(asks)) or together(asks, *how)
    )
    table = AttributeExtraction(tiny, [asked, other, third], best, Decoding(6)).table()
    assert asked_together == [3]
    for name, rows in table[table["condition"].isin([PATCHED, RANDOM])].groupby("relation"):
        assert set(zip(rows["layer"], rows["target_layer"], strict=True)) == set(best[name].values())
    keys = ["relation", "subject", "context", "condition", "layer", "target_layer"]
    alone = pd.concat(
        AttributeExtraction(tiny, [question], best, Decoding(6)).table() for question in (asked, other, third)
    )
    both = table.merge(alone, on=keys, suffixes=("", "_alone"))
    assert len(both) == len(table) == len(alone)
    for column in ("continuation", "found", "token"):
        assert both[column].equals(both[f"{column}_alone"])
    # And a row is what the loop says it is.
    samples = dict(zip((sample.subject for sample in third.samples), third.sources, strict=True))
    for row in table[(table["relation"] == "third") & (table["condition"] == PATCHED)].itertuples():
        vector = state(tiny, samples[row.subject][row.context], row.layer)
        assert endless(tiny, third.target, vector, row.target_layer, 6).startswith(row.continuation)


def test_random_rows_depend_on_relation_subject_and_seed_alone(tiny):
    keys = ["subject", "layer", "target_layer"]

    def random_rows(name="planted", kept=slice(None), seed=1, memory=2**30):
        relation = replace(relation_of([("a",), ("b",), ("c",), ("d",), ("e",)]), name=name)
        question = every_sample(tiny, replace(relation, samples=relation.samples[kept]))
        table = table_of(tiny, question, seed=seed, memory=memory)
        return table[table["condition"] == RANDOM].set_index(keys)["continuation"].sort_index()

    everybody = random_rows()
    others = everybody.drop(["Japan", "Peru"], level="subject")
    pd.testing.assert_series_equal(random_rows(kept=slice(2, None)), others)
    pd.testing.assert_series_equal(random_rows(memory=1), everybody)
    assert (random_rows(name="another") != everybody).mean() > 0.5
    assert (random_rows(seed=2) != everybody).mean() > 0.5


def test_a_row_goes_on_until_everybody_who_borrows_it_has_his_answer(tiny):
    target = tiny.prompt("one x two", "x")
    source = tiny.prompt("We saw Japan then", "Japan")
    said = endless(tiny, target, state(tiny, source, 3), 1, 12)
    early, *_, late = [word for word in said.replace("_", " ").split() if word.isalpha() and said.count(word) == 1]
    # All but Japan have one answer, so that they borrow from nobody else, and it comes after Japan's own.
    question = every_sample(tiny, relation_of([(early,), *[(late,)] * 4]))
    table = table_of(tiny, question, new_tokens=12)
    borrowed = table[(table["condition"] == ANOTHER) & (table["subject"] != "Japan") & (table["layer"] == 3)]
    assert set(borrowed["state_of"]) == {"Japan"}
    assert borrowed[borrowed["context"] == 0]["found"].all()


def test_the_probe_against_scikit_learn_alone(tiny, asked):
    table = scores_of(tiny, asked)
    folds = table.drop_duplicates("subject").set_index("subject")["fold"]
    assert sorted(folds.value_counts()) == [1, 2, 2]
    units = [(i, context) for i in range(5) for context in range(2)]
    for layer in (0, 3, 4):
        features = np.stack([state(tiny, asked.sources[i][context], layer).numpy() for i, context in units])
        classes = np.array([asked.samples[i].object for i, _ in units])
        fold = np.array([folds[asked.samples[i].subject] for i, _ in units])
        for held_out in range(3):
            train, test = fold != held_out, fold == held_out
            scaler = StandardScaler().fit(features[train])
            probe = LogisticRegression(max_iter=200).fit(scaler.transform(features[train]), classes[train])
            guesses = probe.predict(scaler.transform(features[test]))
            rows = table[(table["condition"] == PROBE) & (table["layer"] == layer) & (table["fold"] == held_out)]
            rows = rows.set_index(["subject", "context"])
            for (i, context), guess in zip(np.array(units)[test], guesses, strict=True):
                row = rows.loc[(asked.samples[i].subject, context)]
                assert (row["answer"], row["found"]) == (guess, answer_found(guess, asked.samples[i].answers))


def test_the_probe_is_graded_as_continuations_are(tiny):
    # Each answer is an alias of the other, so that whatever is predicted is right.
    answers = [("gold", "silver"), ("silver", "gold"), ("gold", "silver"), ("silver", "gold"), ("gold", "silver")]
    question = every_sample(tiny, relation_of(answers))
    table = scores_of(tiny, question)
    probed = table[table["condition"].isin([PROBE, MAJORITY])]
    assert (probed["answer"] != probed["object"]).any()
    assert probed["found"].all()
    assert probed["nameable"].all()
    unique = every_sample(tiny, relation_of([("a", "z"), ("b",), ("c", "a"), ("d",), ("e",)]))
    table = scores_of(tiny, unique, seed=1)
    folds = table.drop_duplicates("subject").set_index("subject")["fold"]
    assert folds["Japan"] != folds["Chile"]
    told = table[table["condition"] == MAJORITY].drop_duplicates("subject").set_index("subject")["nameable"]
    # Chile's "a" is Japan's answer; nobody's counts for the others.
    assert told.to_dict() == {subject: subject == "Chile" for subject in SUBJECTS}


def test_a_planted_relation_on_a_model_whose_answer_is_known(tokenizer):
    # Layers that add nothing: every state is an embedding, and the output answers each subject with its object.
    model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, hidden_size=64, tie_word_embeddings=False)
    subjects = [tokenizer(f" {subject}").input_ids[0] for subject in SUBJECTS]
    objects = [tokenizer(f" {word}").input_ids[0] for word in ("gold", "silver", "iron", "paper", "stone")]
    full_stop = tokenizer(".").input_ids[0]
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embed, unembed = model.hf.get_input_embeddings().weight, model.hf.lm_head.weight
        # What is not planted says any of the other tokens.
        unembed.mul_(2)
        unembed[objects] = 3 * embed[subjects]
        unembed[full_stop] = 3 * embed[objects].sum(dim=0)
    relation = relation_of([(tokenizer.decode([token]).strip(),) for token in objects], target="The money of x")
    question, answered = known_to(model, relation, samples=9, contexts=2, decoding=Decoding(3))
    assert (answered, len(question.samples)) == (5, 5)
    said, scores = table_of(model, question, new_tokens=3), scores_of(model, question)
    for table in (said, scores):
        shares = table.groupby("condition")["found"].mean()
        assert shares[PATCHED] == 1
        assert shares[ANOTHER] == 0
    assert said[said["condition"].isin([CLEAN, RANDOM])]["found"].mean() <= 0.1
    # One of five is always chosen.
    assert scores[scores["condition"] == CLEAN]["found"].mean() == 0.2
    # Each answer belongs to one subject, so that a probe has never seen those of the other fold.
    assert scores[scores["condition"].isin([PROBE, MAJORITY])]["found"].sum() == 0
    for row in summarise(scores, said).to_dict("records"):
        assert (row["oracle"], row["held_out"], row["probe_held_out"], row["another_oracle"]) == (1, 1, 0, 0)


def test_what_the_model_knows_is_kept(smollm2):
    capitals = {"Japan": "Tokyo", "France": "Paris", "Italy": "Milan", "Germany": "Berlin"}
    samples = [
        Sample(subject, (answer,), (Marked(f"A trip to {subject}", subject),)) for subject, answer in capitals.items()
    ]
    relation = Relation("capital", "factual", Marked("The capital city of x is", "x"), tuple(samples))
    question, answered = known_to(smollm2, relation, samples=2, contexts=1, decoding=Decoding(5))
    assert (answered, len(question.samples)) == (3, 2)
    assert not question.enough
    everything, _ = known_to(smollm2, relation, samples=9, contexts=1, decoding=Decoding(5))
    for sample in everything.samples:
        ids = smollm2.prompt(f"The capital city of {sample.subject} is").ids
        assert sample.object in smollm2.tokenizer.decode(greedy(smollm2, ids, 5))
    for experiment in (AttributeExtraction, AttributeScores):
        with pytest.raises(PscopeError, match="capital: 2 subjects of 2 objects; 3 and 2 are needed, for the folds"):
            experiment(smollm2, [question], [(1, 1)])
    same = every_sample(smollm2, relation_of([("gold",)] * 5))
    assert not same.enough
    with pytest.raises(PscopeError, match="planted: 5 subjects of 1 objects"):
        AttributeScores(smollm2, [same], [(1, 1)])
    assert everything.enough


def test_source_prompts_without_their_subject_are_left_out(smollm2):
    def sample(subject, answer, *texts):
        return Sample(subject, (answer,), tuple(Marked(text, Nearest(subject, 99)) for text in texts))

    samples = (
        sample("Japan", "Tokyo", " Japanese food", " Japan is far", " Peru", " From Japan to Japan", " In Japan"),
        sample("France", "Paris", " Francesca"),
        sample("Italy", "Rome", " To Italy"),
    )
    relation = Relation("capital", "unknown", Marked("The capital city of x", Nearest("x", 0)), samples)
    question, answered = known_to(smollm2, relation, samples=9, contexts=2)
    assert (answered, len(question.unread)) == (2, 3)
    assert "'Japan' stands only inside longer tokens" in question.unread[0]
    assert [sample.subject for sample in question.samples] == ["Japan", "Italy"]
    japan, italy = question.sources
    # At the first token of a text nothing is told of it, so that a line break comes before.
    assert [(prompt.text, prompt.position) for prompt in japan] == [("\n Japan is far", 1), (" From Japan to Japan", 3)]
    assert [(prompt.text, prompt.token) for prompt in italy] == [(" To Italy", " Italy")]


def test_what_fails_is_named(tiny, asked):
    relation = relation_of([("a",)] * 5)
    lost = Sample("Japan", ("a",), (Marked("We saw Peru", "Japan"),))
    with without_a_number(tiny, tiny.prompt("one Egypt").ids[-1]):
        with pytest.raises(PscopeError, match="'one Egypt two' failed: its logits are not finite"):
            known_to(tiny, relation, samples=9, contexts=2)
        with pytest.raises(PscopeError, match=r"'planted/Egypt' \(patched\) failed at layer 0, target layer 0"):
            table_of(tiny, asked)
        with pytest.raises(PscopeError, match=r"'planted/Egypt' \(patched\) failed at layer 0, target layer 0"):
            scores_of(tiny, asked)
    with pytest.raises(PromptError, match="planted: 'y' stands nowhere"):
        question_of(tiny, Relation("planted", "factual", Marked("one x", "y"), (lost,)), contexts=1)
    blank = Sample("Japan", ("\n",), (Marked("We saw Japan", "Japan"),))
    with pytest.raises(PromptError, match="planted: .* is not tokenised as its continuation"):
        question_of(tiny, Relation("planted", "factual", Marked("one x ", "x"), (blank,)), contexts=1)


def planted() -> pd.DataFrame:
    """Two relations of four subjects at two layers and two target layers."""
    rows = []
    for relation in ("a", "b"):
        for number, subject in enumerate("ABCD"):
            base = {"relation": relation, "subject": subject, "object": "o", "context": 0, "fold": number % 3}
            for layer in (1, 3):
                for target in (0, 2):
                    # In relation a everybody is answered at (3, 0), A and B also at (1, 0); in b nobody.
                    found = relation == "a" and (
                        (layer, target) == (3, 0) or ((layer, target) == (1, 0) and number < 2)
                    )
                    at = {**base, "layer": layer, "target_layer": target}
                    rows += [{**at, "condition": PATCHED, "found": found}, {**at, "condition": RANDOM, "found": False}]
                # At layer 3 the probe is better; within the other folds layer 1 was.
                probed = {"found": number < layer // 3 + 1, "chosen": layer == 1, "nameable": True}
                rows.append({**base, "layer": layer, "condition": PROBE, **probed})
            rows += [
                {**base, "condition": CLEAN, "found": False},
                {**base, "condition": MAJORITY, "found": number == 1},
            ]
    return pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})


def test_the_summary_by_hand():
    summary = summarise(planted()).set_index("relation")
    a = summary.loc["a"]
    # Any target layer: half of them at ℓ = 1, all at ℓ = 3.
    assert (a["oracle"], a["oracle_std"]) == (0.75, 0.25)
    assert (a["held_out"], a["subjects"], a["samples"]) == (1, 4, 4)
    # All four agree, which is not improbable (2.5 %) down to the fourth root of .025.
    exact = [pytest.approx(0.025**0.25), 1]
    assert a[["held_out_low", "held_out_high"]].tolist() == exact
    assert (a["probe"], a["probe_std"], a["probe_held_out"]) == (0.375, 0.125, 0.25)
    assert (a["majority"], a["clean"], a["random_oracle"], a["random_held_out"]) == (0.25, 0, 0, 0)
    assert np.isnan(a["another_oracle"])
    # Of four subjects no permutation test can give less than 2 in 16, here of two relations.
    assert np.isnan(a["p"])
    assert (a["judged"], a["least_p"]) == (SCORED, 2 * 2 / 16)
    assert summary.loc["b", ["oracle", "held_out"]].tolist() == [0, 0]
    # The same rows, said: the table has all pairs, so that there is an oracle of them too.
    both = summarise(planted(), planted().drop(columns="chosen")).set_index(["relation", "judged"])
    pd.testing.assert_series_equal(both.loc[("a", SAID)], both.loc[("a", SCORED)], check_names=False)
    accuracy = over_layers(planted()).fillna({"taken": ""}).set_index(["relation", "condition", "taken", "layer"])
    assert accuracy.loc[("a", PATCHED, BEST, 1), "found"] == 0.5
    assert accuracy.loc[("a", PATCHED, BEST, 3), ["found", "low", "high"]].tolist() == [1, *exact]
    # Of two target layers, one answers A and B, or everybody; nobody chooses the other.
    assert accuracy.loc[("a", PATCHED, MEAN, 1), "found"] == 0.25
    assert accuracy.loc[("a", PATCHED, MEAN, 3), "found"] == 0.5
    assert accuracy.loc[("a", PATCHED, HELD_OUT, 3), "found"] == 1
    assert accuracy.loc[("a", PROBE, "", 1), "found"] == 0.25


def compared(own, probe, nameable, relations=2) -> list[float]:
    """The p values of relations whose subjects are answered so by patching and by the probe, at the only layers."""
    rows = []
    for relation in range(relations):
        for number, (patched, probed, possible) in enumerate(zip(own, probe, nameable, strict=True)):
            base = {"relation": f"{relation}", "subject": f"{number:02}", "context": 0, "fold": number % 3, "layer": 1}
            rows.append({**base, "condition": PATCHED, "target_layer": 0, "found": patched})
            told = {"found": probed, "chosen": True, "nameable": possible}
            rows.append({**base, "condition": PROBE, **told})
    return summarise(pd.DataFrame(rows))["p"].tolist()


def summarise_least(subjects, relations):
    rows = [
        {"relation": f"{relation}", "subject": f"{number}", "context": 0, "fold": number % 3, "layer": 1}
        | {"condition": condition, "found": True, "chosen": True if condition == PROBE else None, "nameable": True}
        | {"target_layer": 0 if condition == PATCHED else None}
        for relation in range(relations)
        for number in range(subjects)
        for condition in (PATCHED, PROBE)
    ]
    return summarise(pd.DataFrame(rows))["least_p"].iloc[0]


def test_the_smallest_p_is_told():
    for shown, told in (([0.25, 0.25], "give is 0.25, blank"), ([0.25, 0.5], "give is 0.25 to 0.5, blank")):
        assert told in accuracy_table(summarise(planted()).iloc[:2].assign(least_p=shown)).caption


def test_p_against_all_flips_of_sign():
    own, probe = [1, 1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 1, 0]
    differences = np.subtract(own, probe)
    flipped = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=9)]
    share = np.mean(np.array(flipped) >= abs(differences.sum()))
    assert compared(own, probe, [True] * 9) == pytest.approx([2 * share] * 2)
    assert compared(own, own, [True] * 9) == [1, 1]
    assert compared(probe, own, [True] * 9, relations=5) == pytest.approx([min(1, 5 * share)] * 5)


def test_p_is_missing_where_nothing_could_be_shown():
    # Two of all flips are the most extreme: with six subjects 2 in 64, with seven 2 in 128; times the relations.
    assert summarise_least(13, 1) == pytest.approx(2 / 2**13)
    # Of more flips than are drawn, those that are.
    assert summarise_least(30, 15) == pytest.approx(15 * 2 / 10_000)
    for subjects, relations, smallest in (
        (6, 1, 1 / 32),
        (5, 1, None),
        (7, 3, 3 / 64),
        (7, 4, None),
        (12, 1, 1 / 2048),
    ):
        p = compared([True] * subjects, [False] * subjects, [True] * subjects, relations)
        assert p == pytest.approx([np.nan if smallest is None else smallest] * relations, nan_ok=True)
    # Where no probe could name any answer, or those of too few, it is no match for it.
    assert np.isnan(compared([True] * 12, [False] * 12, [False] * 12)).all()
    assert np.isnan(compared([True] * 12, [False] * 12, [True] * 5 + [False] * 7)).all()
    # Those whose answer it could name are compared, and only they.
    p = compared([True] * 7 + [False] * 5, [False] * 12, [True] * 7 + [False] * 5)
    assert p == pytest.approx([2 / 64] * 2)


def test_a_planted_cell_proves_the_axes_of_the_heatmap():
    first, second = accuracy_heatmaps(planted(), "title").axes[:2]
    assert first.figure.get_suptitle() == "Accuracy, at pairs of layers\ntitle"
    whole = accuracy_heatmaps(planted().replace({"layer": {3: 2}, "target_layer": {2: 1}})).get_suptitle()
    assert whole == "Accuracy, at every pair of layers"
    assert (first.get_xlabel(), first.get_ylabel()) == ("Source layer", "Target layer")
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "3"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["2", "0"]
    assert first.collections[0].get_array().reshape(2, 2).tolist() == [[0, 0], [0.5, 1]]
    assert second.collections[0].get_array().reshape(2, 2).tolist() == [[0, 0], [0, 0]]


def test_the_figure_shows_the_accuracies():
    panels = accuracy_figure(over_layers(planted()), "title").axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in panels[0].get_lines()}
    assert lines["patched, any target layer (oracle)"] == [0.5, 1]
    assert lines["patched, mean over target layers"] == [0.25, 0.5]
    assert lines["probe"] == [0.25, 0.5]


def test_a_subject_is_not_taken_for_the_context_of_another(tiny):
    sources = tuple(Marked(f"{start} OS", "OS") for start in ("We saw", "It was", "This is"))
    others = [Sample(name, (word,), (Marked(f"Here is {name}", name),)) for name, word in (("OS/2", "b"), ("x/y", "c"))]
    relation = Relation("r", "factual", Marked("one x two", "x"), (Sample("OS", ("a",), sources), *others))
    table = scores_of(tiny, every_sample(tiny, relation))
    patched = table[(table["condition"] == PATCHED) & (table["subject"] == "OS")]
    alone = Patchscope(tiny, tiny.prompt("one x two", "x"))
    for row in patched.itertuples():
        vector = state(tiny, tiny.prompt(sources[row.context].text, "OS"), row.layer)
        scores = alone.choose(vector[None], row.target_layer, [" a", " b", " c"]).patched.scores
        assert row.log_probability == pytest.approx(scores[0, 0].item(), abs=1e-4)
    assert set(patched["context"]) == {0, 1, 2}


def test_answers_that_differ_by_capitals_are_one(tiny):
    relation = relation_of([("Red",), ("red",), ("the Red",), ("blue",), ("blue",)])
    question = every_sample(tiny, relation)
    assert [question.candidate(sample) for sample in relation.samples] == ["Red", "Red", "Red", "blue", "blue"]
    table = scores_of(tiny, question)
    # As classes of the probe, and as answers that a lender may not have.
    assert set(table[table["condition"].isin([PROBE, MAJORITY])]["answer"]) == {"Red", "blue"}
    lent = table[table["condition"] == ANOTHER].drop_duplicates("subject")
    reds = set(SUBJECTS[:3])
    assert all((row.subject in reds) != (row.state_of in reds) for row in lent.itertuples())
    assert (table["kind"] == "factual").all()


def test_relations_of_one_target_keep_their_own_candidates(tiny):
    questions = [
        every_sample(tiny, replace(relation_of([(word,) for word in words]), name=words[0]))
        for words in (["a", "b", "c", "d", "e"], ["f", "g", "h", "i", "j"])
    ]
    experiment = AttributeScores(tiny, questions, PAIRS)
    together = experiment.read([unit for unit in experiment.units if isinstance(unit, Source)])
    apart = pd.concat([AttributeScores(tiny, [each], PAIRS).table() for each in questions], ignore_index=True)
    apart = apart[apart["condition"].isin([PATCHED, RANDOM, CLEAN])].reset_index(drop=True)
    assert together["answer"].tolist() == apart["answer"].tolist()
