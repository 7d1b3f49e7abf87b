"""Any table is drawn by one call, in the looks of the theme."""

import pandas as pd
import pytest
from test_attribute_extraction import PAIRS, asked, scores_of  # noqa: F401 -- `asked` is a fixture

import pscope
from pscope import DataError, Decoding
from pscope.experiments.entity_resolution import EntityDescriptions
from pscope.experiments.layer_readout import LayerReadout
from pscope.experiments.multi_hop import MultiHopScores
from pscope.experiments.next_token import Lens, NextToken
from pscope.inputs.entities import Entity
from pscope.inputs.positions import draw_positions
from pscope.inputs.queries import Query


def tables(tiny, question):
    """The table of every figure, from a tiny model, and a word of its title."""
    target = tiny.prompt("say x")
    yield LayerReadout(tiny, target, tiny.prompt("one two"), [0, 2]).table(), "layer by layer"
    sampled = draw_positions(tiny, ["one two three four"], 2, seed=0)
    lenses = [Lens("logit lens"), Lens("token identity", target)]
    yield NextToken(tiny, lenses, ["one two three four"], sampled, [0, 2]).table(), "the next token"
    entities = [Entity("Paris", "a city", "popular"), Entity("Rome", "another city", "rare")]
    yield EntityDescriptions(tiny, target, entities, [(1, 1), (2, 2)], Decoding(3)).table(), "entities are described"
    yield scores_of(tiny, question, PAIRS), "an attribute of a subject"
    queries = [Query("the land of sushi", "The capital of", ("Tokyo",), ("Japan",))]
    queries += [Query("the land of baguettes", "The capital of", ("Paris",), ("France",))]
    yield MultiHopScores(tiny, queries, [(1, 0), (2, 0)], among=queries).table(), "two hops"


def test_one_call_draws_whatever_table_it_is_given(tiny, asked, tmp_path):  # noqa: F811
    for table, title in tables(tiny, asked):
        kept = tmp_path / "table.parquet"
        table.to_parquet(kept)
        figure = pscope.figure(pd.read_parquet(kept), "tiny")
        seen, on = figure.get_suptitle().split("\n")
        assert title in seen
        assert on == "tiny"
        assert figure.get_figwidth() <= 7.5
        assert pscope.figure(table).get_suptitle() == seen


def test_a_table_of_something_else_is_refused():
    with pytest.raises(DataError, match="no figure belongs to a table of the columns a, b"):
        pscope.figure(pd.DataFrame({"a": [1], "b": [2]}))
