import io
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import without_a_number
from matplotlib import rc_context
from reference import hidden_states, patched_continuation
from rouge_score.rouge_scorer import RougeScorer
from test_unpatched import greedy

from pscope import ENTITY_DESCRIPTION, Decoding, LanguageModel, Patchscope, PromptError, PscopeError, capture
from pscope.experiments.entity_resolution import (
    ANOTHER,
    WRITTEN_OUT,
    EntityDescriptions,
    EntityLayers,
    best_layers,
    name_prompt,
    summarise,
)
from pscope.experiments.grid import layer_pairs
from pscope.experiments.known import Plain
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.inputs.entities import ALL, Entity, shipped_entities
from pscope.show.entity_resolution import entity_figure

NAMES = ["Albert Einstein", "Nile", "東京", "Beyoncé", "Mount Everest"]
ENTITIES = [
    Entity(name, f"the description of number {number} with a word", "popular" if number < 3 else "rare")
    for number, name in enumerate(NAMES)
]


def table_of(model, target, entities, pairs, decoding, **options):
    return EntityDescriptions(model, target, entities, pairs, decoding, **options).table()


def state(model, name, layer):
    """The state of a name's last token, after a line break."""
    return hidden_states(model.hf, model.layers, model.prompt(f"\n{name}").ids)[layer, -1]


def said(model, target, vector, layer, new_tokens):
    ids = patched_continuation(model.hf, model.layers, target.ids, target.position, layer, vector, new_tokens)
    return model.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def finding(smollm2) -> pd.DataFrame:
    """Figure 3 of the default model on some of the shipped entities."""
    chosen = shipped_entities()[::12]
    target = smollm2.prompt(ENTITY_DESCRIPTION)
    return table_of(smollm2, target, chosen, [(8, 8), (26, 26)], Decoding(12, stop=(",",)))


def test_every_row_against_the_one_row_loop(tiny):
    target = tiny.prompt("one two x three", "x")
    pairs = [(0, 0), (3, 1), (4, 4)]
    # So little memory that entities come in several parts.
    experiment = EntityDescriptions(tiny, target, ENTITIES, pairs, Decoding(4), seed=5, memory=2_000_000)
    assert len(experiment.parts(experiment.rows_per_part(experiment.rows_per_pass()))) > 2
    table = experiment.table()
    assert len(table) == 5 * (2 + 3 * 3)
    assert not table.duplicated(["entity", "condition", "layer", "target_layer"]).any()
    by_name = {entity.name: entity for entity in ENTITIES}
    clean = tiny.tokenizer.decode(greedy(tiny, target.ids, 4))
    scorer = RougeScorer(["rougeL"])
    for row in table.itertuples():
        if row.condition == PATCHED:
            assert row.state_of == row.entity
        if row.condition in (PATCHED, ANOTHER):
            vector = state(tiny, row.state_of, row.layer)
            assert row.continuation == said(tiny, target, vector, row.target_layer, 4)
            name = tiny.prompt(f"\n{row.state_of}")
            assert (row.position, row.token) == (len(name) - 1, name.tokens[-1])
        else:
            assert row.position is row.token is pd.NA
        if row.condition == CLEAN:
            assert row.continuation == clean
        elif row.condition == WRITTEN_OUT:
            ids = tiny.prompt(f"one two {row.entity} three").ids
            assert row.continuation == tiny.tokenizer.decode(greedy(tiny, ids, 4))
        assert (row.reference, row.group) == (by_name[row.entity].reference, by_name[row.entity].group)
        assert row.rouge_l == scorer.score(row.reference, row.continuation)["rougeL"].fmeasure
        assert (row.layer is pd.NA) == (row.condition in (CLEAN, WRITTEN_OUT))
    others = table[table["condition"] == ANOTHER].drop_duplicates("entity")
    # Everybody borrows from somebody else, and everybody lends once.
    assert (others["state_of"] != others["entity"]).all()
    assert sorted(others["state_of"]) == sorted(others["entity"]) == sorted(NAMES)


def test_random_vectors_are_as_long_as_the_states_they_stand_for(tiny, monkeypatch):
    given = []
    original = Patchscope.generate

    def generate(self, states, *others):
        given.append(states)
        return original(self, states, *others)

    monkeypatch.setattr(Patchscope, "generate", generate)
    table = table_of(tiny, tiny.prompt("one x"), ENTITIES, [(1, 1), (3, 0), (3, 2)], Decoding(1), seed=1)
    own, random = given[0].reshape(2, 5, 3, -1)
    order = table[table["condition"] == PATCHED]["entity"].drop_duplicates()
    expected = [[state(tiny, name, layer) for layer in (1, 3, 3)] for name in order]
    torch.testing.assert_close(own, torch.stack([torch.stack(states) for states in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(random.norm(dim=-1), own.norm(dim=-1))
    cosines = torch.nn.functional.cosine_similarity(random, own, dim=-1)
    assert cosines.abs().max() < 0.6
    assert len({round(value, 4) for value in cosines[:, :2].flatten().tolist()}) == 10


def test_the_same_seed_gives_the_same_table(tiny):
    target, pairs = tiny.prompt("one x"), [(1, 1), (3, 0)]
    roomy = table_of(tiny, target, ENTITIES, pairs, Decoding(3), seed=3)
    keys = ["entity", "condition", "layer"]
    tight = table_of(tiny, target, ENTITIES, pairs, Decoding(3), seed=3, memory=1)
    pd.testing.assert_frame_equal(roomy, table_of(tiny, target, ENTITIES, pairs, Decoding(3), seed=3))
    pd.testing.assert_frame_equal(roomy, tight)
    other = table_of(tiny, target, ENTITIES, pairs, Decoding(3), seed=4)
    assert not other.equals(roomy)
    fewer = table_of(tiny, target, ENTITIES[2:], pairs, Decoding(3), seed=3).set_index(keys)["continuation"]
    own = fewer.drop(ANOTHER, level="condition")
    pd.testing.assert_series_equal(own, roomy.set_index(keys)["continuation"].loc[own.index])


def test_one_entity_has_no_other(tiny):
    table = table_of(tiny, tiny.prompt("one x"), ENTITIES[:1], [(1, 1)], Decoding(2))
    assert set(table["condition"]) == {PATCHED, RANDOM, CLEAN, WRITTEN_OUT}
    assert len(table) == 2 + 2
    summary = summarise(table)
    assert summary["low"].isna().all()
    assert best_layers(table).empty
    entity_figure(summary, "title")


def test_layer_pairs(tiny):
    assert layer_pairs(tiny, None) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(tiny, [1, 4], [0]) == [(1, 0), (4, 0)]
    assert layer_pairs(tiny, [3], "all") == [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
    for layers, target in (([5], "same"), ([0], [5]), ([0, 5], "all")):
        with pytest.raises(PscopeError, match="layer 5 is out of range"):
            layer_pairs(tiny, layers, target)
    with pytest.raises(PscopeError, match="no layer"):
        layer_pairs(tiny, [])


def test_one_token_of_a_name_is_read(tiny):
    with pytest.raises(PscopeError, match="2 positions of .* are marked where one is needed"):
        EntityLayers(tiny, tiny.prompt("one x"), name_prompt(tiny, "New York", at=[1, 2]), [(0, 0)])


def test_a_name_is_never_the_first_token(smollm2):
    prompt = name_prompt(smollm2, "Paris")
    assert (prompt.tokens, prompt.position) == (("\n", "Paris"), 1)
    assert name_prompt(smollm2, "Paris", "The city of ").tokens == ("The", " city", " of", " Paris")
    assert name_prompt(smollm2, "Paris", "").tokens == ("Paris",)
    assert name_prompt(smollm2, "the last emperor").token == " emperor"
    assert name_prompt(smollm2, "Albert Einstein", at="Albert").position == 2
    # Why: alone, the token becomes an attention sink, whose state dwarfs that of any other place.
    alone, after = capture(smollm2, [name_prompt(smollm2, "Paris", before) for before in ("", None)], layers=[15])
    assert alone.norm() > 50 * after.norm()


def test_a_start_token_of_the_tokenizer_is_enough(tiny):
    class Starting:
        """A tokenizer that begins every text with a start token, as Llama's does."""

        is_fast, bos_token, all_special_ids = True, "<|im_start|>", [1]

        def __call__(self, text, add_special_tokens=True, **options):
            encoding = tiny.tokenizer(text, **options)
            if add_special_tokens:
                encoding["input_ids"] = [1, *encoding["input_ids"]]
                encoding["offset_mapping"] = [(0, 0), *encoding["offset_mapping"]]
            return encoding

        def convert_ids_to_tokens(self, ids):
            return tiny.tokenizer.convert_ids_to_tokens(ids)

    model = LanguageModel(tiny.hf, Starting(), "starting")
    assert name_prompt(model, "Paris").tokens == ("<|im_start|>", "Paris")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gold", 2), ("Ångström", 6), ("東京タワー", 9), ("Москва", 8), ("very " * 59 + "old", 61), (" padded ", 3)],
)
def test_any_name_is_described(tiny, name, tokens):
    source = name_prompt(tiny, name)
    assert abs(len(source) - tokens) <= 3
    goal = tiny.prompt(ENTITY_DESCRIPTION)
    table = EntityLayers(tiny, goal, source, [(0, 0), (3, 1)], Decoding(5), reference="a word").table()
    assert table["condition"].tolist() == [PATCHED, PATCHED, CLEAN]
    states = hidden_states(tiny.hf, tiny.layers, source.ids)
    for row, (layer, target) in zip(table.itertuples(), [(0, 0), (3, 1)], strict=False):
        expected = said(tiny, goal, states[layer, source.position], target, 5)
        assert row.continuation == expected
    assert table["continuation"].iloc[2] == tiny.tokenizer.decode(greedy(tiny, goal.ids, 5))


def test_the_finding_of_figure_3(finding):
    patched = finding[finding["condition"] == PATCHED].set_index(["layer", "entity"]).sort_index()
    assert "German physicist" in patched.loc[(8, "Albert Einstein"), "continuation"]
    summary = summarise(finding).set_index(["group", "condition", "layer"]).sort_index()["rouge_l"]
    # The lower half describes, better than any control and popular entities better than rare ones.
    for control in (ANOTHER, RANDOM):
        assert summary.loc[ALL, PATCHED, 8] > 2 * summary.loc[ALL, control, 8]
    assert summary.loc["popular", PATCHED, 8] > summary.loc["rare", PATCHED, 8]
    # From layer 21 on the state only says what its own prompt would have gone on with; nothing is described.
    assert summary.loc[ALL, PATCHED, 26] < 0.5 * summary.loc[ALL, PATCHED, 8]


def test_a_failing_row_ends_the_run_with_its_name(tiny):
    target = tiny.prompt("one two x")
    with pytest.raises(PromptError, match=r"^'long long .*' cannot be read: .* more than the window"):
        table_of(tiny, target, [*ENTITIES, Entity("long " * 300, "a")], [(1, 1)], Decoding(2))
    # Fits as a source, but not written out with the tokens to come.
    with pytest.raises(PromptError, match="cannot be read: .* more than the window"):
        table_of(tiny, target, [*ENTITIES, Entity("long " * 250, "a")], [(1, 1)], Decoding(9))
    with without_a_number(tiny, tiny.prompt("\nBeyoncé").ids[-1]):
        experiment = EntityDescriptions(tiny, target, ENTITIES, [(1, 1)], Decoding(2))
        with pytest.raises(PscopeError, match="'one two Beyoncé' failed: its logits are not finite"):
            experiment.read([unit for unit in experiment.units if isinstance(unit, Plain)])
        with pytest.raises(PscopeError, match=r"'Beyoncé' \(patched\) failed at layer 1, target layer 2: its states"):
            table_of(tiny, target, ENTITIES, [(1, 2)], Decoding(2))
    with pytest.raises(PscopeError, match="there are no entities"):
        table_of(tiny, target, [], [(1, 1)], Decoding(2))


def planted() -> pd.DataFrame:
    """Four entities of two groups at two layers, and controls."""
    scores = {"A": (0.1, 0.4), "B": (0.3, 0.4), "C": (0.0, 0.1), "D": (0.2, 0.1)}
    rows = []
    for name, values in scores.items():
        base = {"entity": name, "group": "popular" if name in "AB" else "rare"}
        for layer, value in enumerate(values):
            at = {**base, "layer": layer, "target_layer": layer}
            rows += [{**at, "condition": PATCHED, "rouge_l": value}, {**at, "condition": RANDOM, "rouge_l": 0.05}]
            rows += [{**at, "condition": ANOTHER, "rouge_l": 0.1 * value}]
        rows += [{**base, "condition": CLEAN, "rouge_l": 0.01}, {**base, "condition": WRITTEN_OUT, "rouge_l": 0.5}]
    return pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})


def test_means_and_bands_are_over_entities():
    summary = summarise(planted()).set_index(["group", "condition", "layer"])
    assert summary.loc[("popular", PATCHED, 0), "rouge_l"] == pytest.approx(0.2)
    assert summary.loc[("rare", PATCHED, 1), "rouge_l"] == pytest.approx(0.1)
    everything = summary.loc[(ALL, PATCHED, 0)]
    assert everything["rouge_l"] == pytest.approx(0.15)
    assert everything["entities"] == 4
    # Two entities: resampled, they give one twice, the other twice, or both.
    assert summary.loc[("popular", PATCHED, 0), ["low", "high"]].tolist() == pytest.approx([0.1, 0.3])
    random = np.random.default_rng(1)
    means = np.array([0.1, 0.3, 0.0, 0.2])[random.integers(4, size=(20_000, 4))].mean(axis=1)
    assert [everything["low"], everything["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.011)
    clean = summary.xs(CLEAN, level="condition").reset_index()
    assert clean["layer"].isna().all()
    assert clean["rouge_l"].tolist() == pytest.approx([0.01] * 3)


def test_the_best_layer_is_chosen_on_other_entities_than_it_is_reported_on():
    table = pd.DataFrame(
        [
            {"entity": f"{number}", "group": ALL, "condition": PATCHED, "layer": layer, "target_layer": target}
            | {"rouge_l": value}
            for number in range(8)
            # At (0, 7) everybody is described alike; at (layer n, 0) number n alone is described well.
            for layer, target, value in [(0, 7, 0.3), *((n, 0, 2.2 * (n == number)) for n in range(8))]
        ]
    ).astype({"layer": "Int64", "target_layer": "Int64"})
    (row,) = best_layers(table, seed=2).to_dict("records")
    # On half of them, 4, somebody reaches 2.2 / 4; on all 8 nobody is above 0.3, and in the other half it is 0.
    assert row["target_layer"] == 0
    assert row["held_out"] == 0
    assert (row["maximum_layer"], row["maximum_target_layer"]) == (0, 7)
    assert row["maximum"] == pytest.approx(0.3)
    assert (row["chosen_on"], row["reported_on"]) == (4, 4)
    assert best_layers(planted())["group"].tolist() == ["popular", "rare", ALL]


def test_the_figure_shows_groups_and_controls():
    summary = summarise(planted())
    groups, controls = entity_figure(summary, "$ title").axes
    lines = {line.get_label(): line for line in groups.get_lines()}
    assert list(lines) == ["popular", "popular, name written out", "rare", "rare, name written out"]
    np.testing.assert_allclose(lines["popular"].get_ydata(), [0.2, 0.4])
    np.testing.assert_allclose(lines["rare"].get_xdata(), [0, 1])
    np.testing.assert_allclose(lines["rare, name written out"].get_ydata(), [0.5, 0.5])
    lines = {line.get_label(): line for line in controls.get_lines()}
    assert set(lines) == {PATCHED, WRITTEN_OUT, ANOTHER, RANDOM, CLEAN}
    np.testing.assert_allclose(lines[PATCHED].get_ydata(), [0.15, 0.25])
    np.testing.assert_allclose(lines[ANOTHER].get_ydata(), [0.015, 0.025])
    assert len(controls.collections) == 5


def test_the_figure_shows_many_groups_of_any_name():
    names = [f"group {number:02}" for number in range(13)]
    names += ["_hidden", "\x1b[31mred\x07 <&> $x$", "\u202eturned", "long " * 30]
    table = pd.concat([planted()[lambda table: table["group"] == "popular"].assign(group=name) for name in names])
    figure = entity_figure(summarise(table.assign(entity=table["entity"] + table["group"])), "_\x1btitle")
    groups, controls = figure.axes
    shown = [text.get_text().removeprefix("\u200b") for text in groups.get_legend().get_texts()]
    escaped = [r"\u001b[31mred\u0007 <&> \$x\$", "_hidden", *names[:13], f"{names[-1][:23]}…", r"\u202eturned"]
    assert shown == [*escaped, WRITTEN_OUT]
    colours = {line.get_color() for line in groups.get_lines()}
    assert len(colours) == len(names)
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    drawn = {
        "".join(text.itertext()).removeprefix("\u200b")
        for text in ElementTree.fromstring(file.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {r"_\u001btitle", r"\u001b[31mred\u0007 <&> $x$", "_hidden", "group 12"} <= drawn
    # Below the axes, and within the figure.
    figure.draw_without_rendering()
    for axes in (groups, controls):
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 < axes.get_window_extent().y0
        assert legend.y0 >= 0
    assert groups.get_legend().get_window_extent().x1 < controls.get_legend().get_window_extent().x0


def test_the_heatmap_has_a_planted_cell_where_it_belongs():
    rows = [
        {"entity": name, "group": ALL, "condition": PATCHED, "layer": layer, "target_layer": target}
        | {"rouge_l": 0.9 if (layer, target) == (3, 0) else 0.1}
        for name in "AB"
        for layer in (1, 3)
        for target in (0, 2, 4)
    ]
    table = pd.DataFrame(rows).astype({"layer": "Int64", "target_layer": "Int64"})
    axes = entity_figure(summarise(table), "title").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Source layer", "Target layer")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "2", "0"]
    shades = axes.collections[0].get_array().reshape(3, 2)
    assert shades[2, 1] == pytest.approx(0.9)
    assert (np.delete(shades.flatten(), 5) == pytest.approx(0.1)).all()
