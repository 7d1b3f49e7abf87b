import json

import pytest
import torch
from conftest import rows_for_every_layer
from reference import hidden_states, patched_continuation, patched_logits, written_logits
from test_unpatched import greedy

from pscope import Affine, Decoding, Every, MappingSet, PscopeError, Reading, States, Writing
from pscope.experiments.reading import TEXT_ONLY
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.models.states import Label

TARGET = "tell me: x is"


@pytest.fixture
def target(tiny):
    return tiny.prompt(TARGET, "x")


@pytest.fixture
def states(tiny):
    return States.of(tiny, [tiny.prompt("one two three", "two"), tiny.prompt("a fourth")], layers=[1, 3])


def where(tiny, target):
    return tiny.hf, tiny.layers, target.ids, target.position


def test_each_state_is_read_at_its_layer_beside_the_controls(tiny, target, states):
    words = {"one two three": "one two", "a fourth": "a fourth"}
    table = Reading(tiny, target, states, decoding=Decoding(5), words=words, top_k=3).table()
    patched = table[table["condition"] == PATCHED]
    assert len(patched) == 4 * 3
    for (label, vector), (_, rows) in zip(
        zip(states.labels, states.vectors, strict=True), patched.groupby(["source", "layer"], sort=False), strict=True
    ):
        first = rows.iloc[0]
        assert (first["source"], first["token"], first["position"], first["layer"]) == tuple(label)
        assert first["target_layer"] == label.layer
        expected = patched_logits(*where(tiny, target), label.layer, vector)[-1].softmax(dim=-1).topk(3)
        assert rows["probability"].tolist() == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert rows["next_token"].tolist() == [tiny.tokenizer.decode([token]) for token in expected.indices.tolist()]
        said = patched_continuation(*where(tiny, target), label.layer, vector, 5)
        assert set(rows["continuation"]) == {tiny.tokenizer.decode(said)}
    (clean,) = table[(table["condition"] == CLEAN) & (table["rank"] == 1)].to_dict("records")
    assert clean["continuation"] == tiny.tokenizer.decode(greedy(tiny, target.ids, 5))
    written = table[(table["condition"] == TEXT_ONLY) & (table["rank"] == 1)]
    assert dict(zip(written["source"], written["continuation"], strict=True)) == {
        source: tiny.tokenizer.decode(greedy(tiny, tiny.prompt(f"tell me: {text} is").ids, 5))
        for source, text in words.items()
    }
    assert (table["condition"] == RANDOM).sum() == len(patched)


def test_a_random_vector_is_as_long_as_the_state_and_its_own(tiny, target, states, monkeypatch):
    def written(some, seed=0):
        experiment = Reading(tiny, target, some, seed=seed)
        rows = [row for row in experiment._rows(experiment.units[: len(some)]) if row.condition == RANDOM]
        return torch.stack([row.vector for row in rows])

    random = written(states)
    torch.testing.assert_close(random.norm(dim=1), states.vectors.norm(dim=1))
    assert (torch.cosine_similarity(random, states.vectors) < 0.9).all()
    assert torch.equal(written(states[2]), random[2:3])
    assert not torch.equal(written(states, seed=1), random)


def test_how_a_vector_is_written(tiny, target, states):
    writing = Writing(scales=(0.5, 2.0), norm=True, add=True, hold=(0, 2))
    table = Reading(tiny, target, states[:1], [1], writing=writing).table()
    own = hidden_states(tiny.hf, tiny.layers, target.ids)[:, target.position]
    unit = states.vectors[0] / states.vectors[0].norm()
    patched = table[table["condition"] == PATCHED].set_index("scale")["probability"]
    for scale in (0.5, 2.0):
        writes = [(k, target.position, own[k] + scale * own[k].norm() * unit) for k in (0, 1, 2)]
        expected = written_logits(tiny.hf, tiny.layers, target.ids, writes)[-1].softmax(dim=-1).max()
        assert patched[scale] == pytest.approx(expected.item(), abs=1e-5)
    nothing = Reading(tiny, target, states, writing=Writing((0.0,), add=True)).table()
    assert nothing["continuation"].nunique() == 1


def test_samples_are_those_of_the_state_whatever_stands_beside_it(tiny, target, states):
    options = {"decoding": Decoding(6, temperature=2.0), "times": 3}
    table = Reading(tiny, target, states, **options).table()
    assert table.groupby(["condition", "source", "layer"])["continuation"].nunique().min() > 1
    assert table[table["condition"] == CLEAN]["continuation"].nunique() > 1
    alone = Reading(tiny, target, states[3], memory=1, **options).table()
    columns = ["condition", "layer", "time", "continuation"]
    theirs = table[(table["source"] == "a fourth") & (table["layer"] == 3)]
    assert alone.dropna(subset="layer")[columns].values.tolist() == theirs[columns].values.tolist()


def test_relevance_is_what_a_token_owes_to_the_patch(tiny, target, states):
    table = Reading(tiny, target, states[:3], decoding=Decoding(4), relevance=True).table()
    assert table[table["condition"] != PATCHED]["relevance"].isna().all()
    told = table[table["condition"] == PATCHED]["relevance"].map(json.loads)
    for label, vector, owed in zip(states.labels, states.vectors, told, strict=False):
        said = patched_continuation(*where(tiny, target), label.layer, vector, 4)
        ids = [*target.ids, *said]
        patched = patched_logits(tiny.hf, tiny.layers, ids, target.position, label.layer, vector)
        with torch.no_grad():
            clean = tiny.hf(torch.tensor([ids])).logits[0]
        apart = (patched.softmax(-1) - clean.softmax(-1)).abs()[-5:-1][range(4), said]
        assert [share for _, share in owed] == pytest.approx(apart.tolist(), abs=1e-4)
        assert [piece for piece, _ in owed] == [tiny.tokenizer.decode([token]) for token in said]


def test_states_go_through_the_map_of_their_layers(tiny, target, states):
    twice = Affine(2 * torch.eye(32), torch.ones(32))
    mappings = MappingSet.identity(tiny, [(1, 4)])
    mappings.maps.update({(1, 4): twice, (3, 4): twice})
    table = Reading(tiny, target, states, [4], mappings=mappings).table()
    doubled = Reading(tiny, target, states.map(lambda vectors: 2 * vectors + 1), [4]).table()
    columns = ["condition", "layer", "continuation", "probability"]
    patched, expected = (each.loc[each["condition"] == PATCHED, columns].values.tolist() for each in (table, doubled))
    assert patched == expected
    with pytest.raises(PscopeError, match="'v' is of no layer, and mappings lead from one"):
        Reading(tiny, target, States(torch.ones(1, 32), (Label("v"),)), [4], mappings=mappings)


def test_every_placeholder_gets_the_state(tiny, states):
    target = tiny.prompt("say x x now", Every("x"))
    table = Reading(tiny, target, states[:1], words={"one two three": "one two"}).table()
    writes = [(1, position, states.vectors[0]) for position in target.positions]
    expected = written_logits(tiny.hf, tiny.layers, target.ids, writes)[-1].softmax(dim=-1).max()
    assert table["probability"][0] == pytest.approx(expected.item(), abs=1e-5)
    (said,) = table[table["condition"] == TEXT_ONLY]["continuation"]
    assert said == tiny.tokenizer.decode(greedy(tiny, tiny.prompt("say one two now").ids, 20))


def test_what_cannot_be_read_is_told(tiny, target, states):
    vectors, _ = rows_for_every_layer(tiny, per_layer=1)
    bare = States(vectors, tuple(Label(f"v {row}") for row in range(len(vectors))))
    for given, options, told in (
        (bare, {}, "'v 0' is of no layer, so that none is the same; give --target-layers"),
        (states[[0, 0]], {}, "'one two three' at 1:' two' of layer 1 is read twice"),
        (states, {"target_layers": [9]}, "layer 9 is out of range"),
        (states, {"times": 2}, "once is always the same without a temperature"),
        (states, {"top_k": 0}, "top_k is 0"),
        (states, {"writing": Writing(hold=(7,))}, "layer 7 is out of range"),
        (states.map(lambda vectors: vectors[:, :8]), {}, "vectors of width 8 do not fit tiny.*, which is 32 wide"),
    ):
        with pytest.raises(PscopeError, match=told.replace("tiny", "")):
            Reading(tiny, target, given, **options)
    for scales in ((), (1.0, 1.0), (float("nan"),)):
        with pytest.raises(PscopeError, match="scale"):
            Writing(scales)
    broken = states.map(lambda vectors: vectors.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(PscopeError, match=r"'one two three' at 1:' two' of layer 3 \(patched\) failed at"):
        Reading(tiny, target, broken).table()


def test_at_next_to_no_temperature_every_time_is_the_greedy_one(tiny, target, states):
    cold = Reading(tiny, target, states[:2], decoding=Decoding(4, temperature=1e-6), times=2).table()
    greedily = Reading(tiny, target, states[:2], decoding=Decoding(4)).table()
    columns = ["condition", "layer", "continuation"]
    for time in (1, 2):
        assert cold[cold["time"] == time][columns].values.tolist() == greedily[columns].values.tolist()
