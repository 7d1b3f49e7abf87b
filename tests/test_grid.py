import pandas as pd
import pytest
import torch

from pscope import PscopeError
from pscope.experiments.grid import layer_pairs, source_layers, source_prompt, spread_layers
from pscope.experiments.held_out import at_chosen, chosen_elsewhere, draw_folds
from pscope.experiments.sweep import same_norm


def test_layer_pairs(tiny):
    assert layer_pairs(tiny, None) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(tiny, [1, 4], [0, 2]) == [(1, 0), (1, 2), (4, 0), (4, 2)]
    assert layer_pairs(tiny, [3], "all") == [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
    for layers, target in (([5], "same"), ([0], [5]), ([0, 5], "all")):
        with pytest.raises(PscopeError, match="layer 5 is out of range"):
            layer_pairs(tiny, layers, target)
    with pytest.raises(PscopeError, match="no layer"):
        layer_pairs(tiny, [])
    for layers, target in (("0-3", "same"), ([0], "0-3"), ([0], 3), (3, "all"), ([0, "1"], "same")):
        with pytest.raises(PscopeError, match="layers are given as a list of numbers, as"):
            layer_pairs(tiny, layers, target)
    assert source_layers([(3, 0), (3, 1), (1, 0)]) == ([3, 1], [0, 0, 1])
    assert spread_layers(tiny, (0, 0.1, 0.5, 1)) == [0, 2, 4]


def test_random_vectors_are_as_long_as_what_they_stand_for():
    states = torch.randn(3, 4, 50) * torch.tensor([1.0, 10, 100])[:, None, None]
    random = same_norm(states, ["a", "b", "c"], [0, 1, 2, 5], 0)
    torch.testing.assert_close(random.norm(dim=-1), states.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(random, states, dim=-1).abs().max() < 0.6


def test_the_random_vector_of_a_unit_is_its_own():
    states = torch.ones(3, 2, 50)
    random = same_norm(states, ["a", "b", "c"], [3, 1], 7)
    torch.testing.assert_close(same_norm(states[:1], ["c"], [3, 1], 7)[0], random[2], rtol=0, atol=0)
    torch.testing.assert_close(same_norm(states, ["c", "x", "a"], [3, 1], 7)[2], random[0], rtol=0, atol=0)
    # Nor does it matter which other layers are read.
    torch.testing.assert_close(same_norm(states, ["a", "b", "c"], [1, 2], 7)[:, 0], random[:, 1], rtol=0, atol=0)
    directions = torch.cat([random.flatten(0, 1), same_norm(states, ["a", "b", "c"], [3, 1], 8).flatten(0, 1)])
    cosines = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=-1)
    assert (cosines - torch.eye(12)).abs().max() < 0.6


def test_who_shares_a_group_shares_a_fold():
    groups = ["a", "b", "a", "c", "d", "b", "e", "f"]
    drawn = [draw_folds(groups, seed) for seed in range(5)]
    for folds in drawn:
        assert (folds[0], folds[1]) == (folds[2], folds[5])
        assert set(folds) == {0, 1, 2}
    assert len({tuple(folds) for folds in drawn}) > 1
    assert draw_folds(groups, 0) == drawn[0]
    assert draw_folds(["a", "b", "a", "b"], 0) == [0, 0, 0, 0]


def test_nobody_chooses_for_himself():
    # Column b is best for fold 0, column a for the others: so fold 0 gets a, and the others, by a majority, b.
    scores = pd.DataFrame({"a": [0, 0, 0, 1, 1], "b": [1, 1, 1, 0.5, 0.5]}, index=list("uvwxy"))
    folds = pd.Series([0, 0, 0, 1, 1], index=list("uvwxy"))
    chosen = chosen_elsewhere(scores, folds)
    assert chosen.idxmax(axis=1).tolist() == ["a", "a", "a", "b", "b"]
    assert at_chosen(scores, chosen).to_dict() == {"u": 0, "v": 0, "w": 0, "x": 0.5, "y": 0.5}


def test_columns_that_tie_count_alike():
    # For fold 0 columns a and c were best, both with 1 of 2; which of them stands first decides nothing.
    scores = pd.DataFrame({"a": [1, 1, 0], "b": [0, 0, 0], "c": [0, 0, 1]}, index=list("uvw"), dtype=float)
    folds = pd.Series([0, 1, 1], index=list("uvw"))
    for columns in (["a", "b", "c"], ["c", "b", "a"]):
        chosen = chosen_elsewhere(scores[columns], folds)
        assert chosen[["a", "b", "c"]].values.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0]]
        assert at_chosen(scores[columns], chosen).to_dict() == {"u": 0.5, "v": 1, "w": 0}
    # To the last digit, or differences to it would all have one sign.
    always = pd.DataFrame(1.0, list("uvw"), range(6))
    assert at_chosen(always, chosen_elsewhere(always, folds)).tolist() == [1, 1, 1]
    # A control of some of the units is averaged over the same columns.
    control = pd.DataFrame({"a": [0], "b": [1], "c": [1]}, index=["u"], dtype=float)
    assert at_chosen(control, chosen).to_dict() == {"u": 0.5}


def test_no_state_is_read_at_the_first_token_of_a_text(smollm2):
    assert source_prompt(smollm2, "Japan is far", "Japan").tokens[:2] == ("\n", "Japan")
    assert source_prompt(smollm2, "Japan is far", "Japan").position == 1
    assert source_prompt(smollm2, "Japan").position == 1
    assert source_prompt(smollm2, "Far is Japan", "Japan").tokens == ("Far", " is", " Japan")
    assert source_prompt(smollm2, "Japan", -1).tokens == ("\n", "Japan")
    assert source_prompt(smollm2, "Japan is far", 0).tokens == ("Japan", " is", " far")
    assert source_prompt(smollm2, "Japan is far", [0]).at_sink
    assert source_prompt(smollm2, "<|im_start|>Japan", 0).position == 0
