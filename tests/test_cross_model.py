"""One model read by another, against one-row passes; and several experiments as one."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_model
from reference import hidden_states, patched_logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pscope import ENTITY_DESCRIPTION, Decoding, PscopeError
from pscope.experiments.cross_model import ANOTHER, MAPPED, MEAN, SHUFFLED, CrossModel, agree, best_pairs, summarise
from pscope.experiments.entity_resolution import EntityDescriptions, EntityLayers, name_prompt
from pscope.experiments.entity_resolution_across import SOURCE_ITSELF, TARGET_ITSELF, DescriptionsAcross
from pscope.experiments.sweep import PATCHED, Through
from pscope.experiments.together import Together
from pscope.inputs.entities import Entity
from pscope.inputs.positions import draw_paired
from pscope.inputs.texts import shipped_texts
from pscope.mappings.fit import Fit
from pscope.mappings.mapping import Affine
from pscope.mappings.mapping_set import End, MappingSet, Origin
from pscope.metrics import rouge_l

PAIRS = [(0, 1), (2, 0), (2, 3), (4, 3)]
ENTITIES = [Entity(name, f"what {name} is") for name in ("Nile", "Paris", "Oslo", "Rome")]


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return shipped_texts()[::30]


@pytest.fixture(scope="module")
def other(passages):
    """A model of another width and depth, with a tokenizer of its own, which cuts more finely."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(passages, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return random_model(LlamaForCausalLM, LlamaConfig, tokenizer, hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def mappings(tiny, other) -> MappingSet:
    random = torch.Generator().manual_seed(5)
    maps = {
        pair: Affine(torch.randn(48, 32, generator=random), torch.randn(48, generator=random))
        for pair in [*PAIRS, *((layer, layer) for layer in range(4))]
    }
    return MappingSet(maps, Origin("affine", End.of(tiny), End.of(other)))


def test_rows_against_one_row_passes(tiny, other, mappings, passages):
    paired, share = draw_paired(tiny, other, passages, 9, seed=2)
    assert 0 < share < 1
    target = other.prompt("cat -> cat\n?")
    experiment = CrossModel(
        tiny, other, target, {MAPPED: mappings}, passages, [each.source for each in paired], PAIRS, memory=2_000_000
    )
    table = experiment.table()
    mapped = table[table["condition"] == MAPPED]
    assert len(mapped) == 9 * len(PAIRS)
    for row in mapped.itertuples():
        ids = tiny.prompt(passages[row.text]).ids
        with torch.no_grad():
            own = tiny.hf(torch.tensor([ids])).logits[0, row.position]
        state = hidden_states(tiny.hf, tiny.layers, ids)[row.layer, row.position]
        f = mappings.maps[row.layer, row.target_layer]
        logits = patched_logits(
            other.hf, other.layers, target.ids, target.position, row.target_layer, f.weight @ state + f.bias
        )
        said, decoded = tiny.tokenizer.decode([own.argmax()]), other.tokenizer.decode([logits[-1].argmax()])
        assert (row.next_token, row.decoded) == (said, decoded)
        assert row.correct == agree(decoded, said)
        ids = tiny.tokenizer(decoded)["input_ids"]
        expected = -own.log_softmax(0)[ids[0]].item() if ids else float("nan")
        assert row.surprisal == pytest.approx(expected, abs=1e-3, nan_ok=True)
    # What another text's state said, held against each one's own prediction.
    theirs = table[table["condition"] == ANOTHER]
    assert len(theirs) == len(mapped)
    said_of = mapped.groupby(["layer", "target_layer", "decoded"]).groups
    for row in theirs.itertuples():
        assert (row.layer, row.target_layer, row.decoded) in said_of
        assert row.correct == agree(row.decoded, row.next_token)
    lent = theirs.groupby(["layer", "target_layer"])["decoded"].apply(sorted)
    pd.testing.assert_series_equal(lent, mapped.groupby(["layer", "target_layer"])["decoded"].apply(sorted))


@pytest.mark.parametrize(
    ("decoded", "said", "same"),
    [
        (" house", " house", True),
        ("hou", " house", True),
        ("house", "hou", True),
        (" horse", " house", False),
        ("\n", "\n", True),
        ("\n", " a", False),
        ("", " a", False),
        (" ", "\n", False),
        ("\ufffd", "\ufffd", False),
    ],
)
def test_two_models_agree_where_one_text_begins_with_the_other(decoded, said, same):
    assert agree(decoded, said) is same


def test_a_model_reads_itself_as_well_as_it_can(tiny, passages):
    paired, share = draw_paired(tiny, tiny, passages, 12, seed=0)
    assert share == 1
    last = [(tiny.n_layers, tiny.n_layers)]
    own = MappingSet.identity(tiny, last)
    experiment = CrossModel(
        tiny, tiny, tiny.prompt("a ?"), {MAPPED: own}, passages, [each.source for each in paired], last
    )
    together = Together({"itself": experiment, "again": experiment})
    table = together.table()
    assert set(table["reader"]) == {"itself", "again"}
    alone = experiment.table()
    for reader in ("itself", "again"):
        rows = table[table["reader"] == reader].drop(columns="reader").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, alone)
    summary = summarise(table).set_index(["reader", "condition"])
    mapped = alone[alone["condition"] == MAPPED]
    assert mapped["correct"].all()
    assert summary.loc[("itself", MAPPED), "precision_at_1"] == 1
    assert summary.loc[("itself", MAPPED), "surprisal"] == pytest.approx(mapped["surprisal"].mean())
    assert np.isnan(summary.loc[("itself", ANOTHER), "surprisal"])
    best = best_pairs(table).set_index(["reader", "condition"])
    assert best.loc[("again", MAPPED), ["layer", "target_layer", "held_out", "maximum"]].tolist() == [4, 4, 1, 1]
    assert best.loc[("again", ANOTHER), "held_out"] < 1


def test_layers_of_each_model_are_its_own(tiny, other, mappings, passages):
    paired, _ = draw_paired(tiny, other, passages, 2, seed=0)
    sampled = [each.source for each in paired]
    target = other.prompt("a ?")
    for pair, told in (((5, 3), "layer 5 is out of range"), ((4, 4), "layer 4 is out of range")):
        with pytest.raises(PscopeError, match=told):
            CrossModel(tiny, other, target, {MAPPED: mappings}, passages, sampled, [pair])


def test_entities_of_one_model_described_by_another(tiny, other, mappings):
    decoding, pairs = Decoding(3), [(0, 1), (2, 3), (2, 0)]
    targets = tuple(model.prompt(ENTITY_DESCRIPTION) for model in (tiny, other))
    sets = {MAPPED: mappings, SHUFFLED: mappings, MEAN: mappings}
    experiment = DescriptionsAcross(tiny, other, targets, sets, ENTITIES, pairs, decoding)
    table = experiment.table()
    target = targets[1]
    for row in table[table["condition"] == PATCHED].itertuples():
        source = name_prompt(tiny, row.entity)
        state = hidden_states(tiny.hf, tiny.layers, source.ids)[row.layer, source.position]
        f = mappings.maps[row.layer, row.target_layer]
        ids = list(target.ids)
        for _ in range(3):
            logits = patched_logits(
                other.hf, other.layers, ids, target.position, row.target_layer, f.weight @ state + f.bias
            )
            ids.append(logits[-1].argmax().item())
        assert row.continuation == other.tokenizer.decode(ids[-3:])
    # Each model by itself is what it is alone.
    for condition, model, prompt, end in ((SOURCE_ITSELF, tiny, targets[0], 0), (TARGET_ITSELF, other, target, 1)):
        diagonal = [(layer, layer) for layer in sorted({pair[end] for pair in pairs})]
        alone = EntityDescriptions(model, prompt, ENTITIES, diagonal, decoding).table()
        expected = alone[alone["condition"] == PATCHED].set_index(["entity", "layer"])["continuation"]
        found = table[table["condition"] == condition].set_index(["entity", "layer"])["continuation"]
        pd.testing.assert_series_equal(found.sort_index(), expected.sort_index())
    assert set(table["condition"]) >= {
        "another entity",
        "random vector",
        "clean target",
        "name written out",
        MEAN,
        SHUFFLED,
    }
    assert (table.groupby("condition").size()[[MEAN, SHUFFLED]] == len(ENTITIES) * len(pairs)).all()
    # Here the "means" are maps, so that what is said of all is what they make of the first.
    mean = table[table["condition"] == MEAN].set_index(["layer", "target_layer", "entity"]).sort_index()
    first = table[(table["condition"] == PATCHED) & (table["entity"] == ENTITIES[0].name)]
    first = first.set_index(["layer", "target_layer"])["continuation"]
    for pair in pairs:
        assert set(mean.loc[pair, "continuation"]) == {first[pair]}
    for (*_, entity), row in mean.iterrows():
        assert row["reference"] == f"what {entity} is"
        assert row["rouge_l"] == pytest.approx(rouge_l([row["continuation"]], [row["reference"]])[0])
        assert row[["state_of", "position", "token"]].isna().all()
    one = EntityLayers(
        other, target, name_prompt(tiny, "Oslo"), pairs, decoding, through=Through(tiny, mappings)
    ).table()
    same = table[(table["entity"] == "Oslo") & (table["condition"] == PATCHED)]
    assert one["continuation"].tolist()[:3] == same["continuation"].tolist()


def test_the_mean_state_says_the_same_of_everybody(tiny, other, passages):
    paired, _ = draw_paired(tiny, other, passages, None, seed=0)
    means = Fit(tiny, other, ((1, 2),)).run(passages, paired).to_means()
    # Of the target's states, as transformers returns them.
    states = [
        hidden_states(other.hf, other.layers, each.target.prompt.ids)[2, list(each.target.positions)] for each in paired
    ]
    torch.testing.assert_close(means.at((1, 2))(torch.zeros(1, 32))[0], torch.cat(states).mean(0), rtol=1e-3, atol=1e-3)
    through = Through(tiny, means)
    table = EntityDescriptions(
        other, other.prompt(ENTITY_DESCRIPTION), ENTITIES, [(1, 2)], Decoding(3), through=through, controls=False
    ).table()
    assert table[table["condition"] == PATCHED]["continuation"].nunique() == 1
