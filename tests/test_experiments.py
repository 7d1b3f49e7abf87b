import io

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hidden_states, patched_continuation, patched_logits

from pscope import TOKEN_IDENTITY, DataError, PscopeError
from pscope.experiments.experiment import tidy
from pscope.experiments.layer_readout import LayerReadout
from pscope.experiments.next_token import Lens, NextToken, random_token_prompts, summarise
from pscope.inputs.positions import draw_positions
from pscope.inputs.texts import shipped_texts
from pscope.mappings.mapping import Affine
from pscope.mappings.mapping_set import End, MappingSet, Origin, fold_of
from pscope.models.prompts import tokenize
from pscope.show.layer_readout import layer_readout_figure
from pscope.show.next_token import next_token_figure


@pytest.fixture(scope="module")
def finding(smollm2) -> pd.DataFrame:
    """Figure 2 of the default model on the first words of some shipped texts, spread over registers and layers."""
    texts = [text[:150] for text in shipped_texts()[::3]]
    lenses = [Lens("logit lens"), Lens("token identity", smollm2.prompt(TOKEN_IDENTITY))]
    layers = [3, 6, 9, *range(10, 31, 2)]
    return NextToken(smollm2, lenses, texts, draw_positions(smollm2, texts, 80, seed=0), layers).table()


def places(sampled):
    return [(item.text, position) for item in sampled for position in item.positions]


def test_positions_are_spread_drawn_once_and_repeatable(tiny):
    texts = ["a b c", "one two three four five", "x"]
    assert places(draw_positions(tiny, texts, 6, seed=1)) == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)]
    for seed in range(5):
        drawn = draw_positions(tiny, texts, 2, seed)
        assert [item.text for item in drawn] == [0, 1]
        assert all(len(item.prompt) == item.positions[-1] + 1 for item in drawn)
    assert draw_positions(tiny, texts, 3, seed=2) == draw_positions(tiny, texts, 3, seed=2)
    many = [places(draw_positions(tiny, texts, 3, seed)) for seed in range(20)]
    assert len({tuple(drawn) for drawn in many}) > 3
    with pytest.raises(DataError, match="7 samples were asked for, but the 3 texts have only 6 positions"):
        draw_positions(tiny, texts, 7, seed=0)
    with pytest.raises(PscopeError, match="the number of samples is 0"):
        draw_positions(tiny, texts, 0, seed=0)
    longer_than_the_window = draw_positions(tiny, ["a " * 300], 255, seed=0)
    assert longer_than_the_window[0].positions == tuple(range(1, 256))
    long = draw_positions(tiny, ["a " * 300], 31, seed=0, most_tokens=32)
    assert long[0].positions == tuple(range(1, 32))


def test_of_a_long_text_only_the_beginning_is_tokenised(smollm2, monkeypatch):
    given = []
    monkeypatch.setattr(
        "pscope.inputs.positions.tokenize",
        lambda tokenizer, text: given.append(len(text)) or tokenize(tokenizer, text),
    )
    texts = [
        " ".join(shipped_texts()),
        "東京都は日本の首都である。" * 2000,
        "def f(x):\n    return [y**2 for y in x]\n\n" * 900,
        "a" * 40_000,
        " " * 9_000 + "one two three " * 9_000,
        "=" * 30_000 + "x" * 9,
    ]
    expected = [smollm2.tokenizer(text)["input_ids"][:512] for text in texts]
    sampled = draw_positions(smollm2, texts, sum(len(ids) - 1 for ids in expected), seed=0)
    assert [list(item.prompt.ids) for item in sampled] == expected
    # The same positions as where texts are no longer than that.
    fitting = ["a" + " a" * (len(ids) - 1) for ids in expected]
    assert places(draw_positions(smollm2, fitting, 40, seed=1)) == places(draw_positions(smollm2, texts, 40, seed=1))
    given.clear()
    draw_positions(smollm2, ["She said so. " * 1_600_000], 3, seed=0)
    assert max(given) < 20_000


def test_next_token_rows_against_one_row_passes(tiny):
    texts = ["The quick brown fox jumps over the lazy dog", "A short one", "Amazon's former CEO attended the Oscars"]
    sampled = draw_positions(tiny, texts, 7, seed=3)
    target = tiny.prompt(TOKEN_IDENTITY)
    layers = [0, 2, 4]
    # Small batches and little memory, so that samples are decoded in several passes and run out of order.
    lenses = [Lens("logit lens"), Lens("token identity", target)]
    experiment = NextToken(tiny, lenses, texts, sampled, layers, batch_tokens=8, memory=6_000_000)
    assert experiment.rows_per_pass() < sum(unit.rows for unit in experiment.units)
    table = experiment.table()
    assert len(table) == 7 * 3 * 2
    assert set(zip(table["text"], table["position"], strict=True)) == set(places(sampled))
    for row in table.itertuples():
        ids = tiny.prompt(texts[row.text]).ids
        with torch.no_grad():
            own = tiny.hf(torch.tensor([ids])).logits[0, row.position]
            state = hidden_states(tiny.hf, tiny.layers, ids)[row.layer, row.position]
            if row.lens == "logit lens":
                decoded = tiny.hf.lm_head(tiny.hf.model.norm(state)).argmax().item()
            else:
                logits = patched_logits(tiny.hf, tiny.layers, target.ids, target.position, row.layer, state)
                decoded = logits[-1].argmax().item()
        assert (row.decoded_id, row.next_token_id) == (decoded, own.argmax().item())
        assert row.correct == (decoded == own.argmax().item())
        assert row.surprisal == pytest.approx(-own.log_softmax(0)[decoded].item(), abs=1e-4)
        assert row.decoded == tiny.tokenizer.decode([decoded])
        assert row.token == tiny.prompt(texts[row.text]).tokens[row.position]


def test_mapped_lenses_against_one_row_passes(tiny):
    texts = ["The quick brown fox jumps over the lazy dog", "A short one", "Amazon's former CEO attended the Oscars"]
    sampled, target = draw_positions(tiny, texts, 5, seed=3), tiny.prompt("cat -> cat\n?")
    random = torch.Generator().manual_seed(0)

    def maps(*pairs: tuple[int, int]) -> dict:
        return {
            pair: Affine(torch.randn(32, 32, generator=random), torch.randn(32, generator=random)) for pair in pairs
        }

    end = End.of(tiny)
    folds = [tuple(maps(*pairs) for _ in range(5)) for pairs in ([(1, 4), (3, 4)], [(1, 1), (3, 3)], [(1, 2)])]
    sets = [MappingSet(each[0], Origin("affine", end, end), each) for each in folds]
    lenses = [Lens("to last", None, sets[0]), Lens("to prompt", target, sets[1]), Lens("to two", target, sets[2])]
    table = NextToken(tiny, lenses, texts, sampled, [1, 3]).table()
    assert table.groupby("lens").size().to_dict() == {"to last": 10, "to prompt": 10, "to two": 5}
    for row in table.itertuples():
        ids = tiny.prompt(texts[row.text]).ids
        state = hidden_states(tiny.hf, tiny.layers, ids)[row.layer, row.position]
        group = folds[["to last", "to prompt", "to two"].index(row.lens)][fold_of(texts[row.text])]
        (reached,) = (pair[1] for pair in group if pair[0] == row.layer)
        mapped = group[row.layer, reached].weight @ state + group[row.layer, reached].bias
        if row.lens == "to last":
            with torch.no_grad():
                decoded = tiny.hf.lm_head(tiny.hf.model.norm(mapped)).argmax().item()
        else:
            logits = patched_logits(tiny.hf, tiny.layers, target.ids, target.position, reached, mapped)
            decoded = logits[-1].argmax().item()
        assert row.decoded_id == decoded
    with pytest.raises(PscopeError, match="to two reads none of the layers"):
        NextToken(tiny, lenses, texts, sampled, [3])


def test_random_prompts_repeat_random_tokens(smollm2):
    prompts = random_token_prompts(smollm2, 12, seed=4)
    assert prompts == random_token_prompts(smollm2, 12, seed=4)
    assert len({prompt.text for prompt in prompts}) == 12
    shown = set()
    for prompt in prompts:
        *lines, last = prompt.text.split("\n")
        assert last == prompt.token == "?"
        assert all(line == f"{word} -> {word}" for line in lines for word in [line.partition(" -> ")[0]])
        shown.add(len(lines))
    assert shown <= set(range(1, 11))
    assert len(shown) > 4


def test_several_prompts_of_a_lens_count_a_sample_once():
    rows = [
        (text, 3, 5, "random tokens", prompt, text == 0 or prompt == "a", 1.0)
        for text in (0, 1)
        for prompt in ("a", "b")
    ]
    table = pd.DataFrame(rows, columns=["text", "position", "layer", "lens", "prompt", "correct", "surprisal"])
    assert summarise(table)["precision_at_1"].tolist() == [0.75]
    assert summarise(table[table["prompt"] == "a"])["precision_at_1"].tolist() == [1]


def test_the_finding_of_figure_2(finding, smollm2):
    summary = summarise(finding).set_index(["lens", "layer"])
    identity, lens = summary.loc["token identity"], summary.loc["logit lens"]
    # From layer 10 up token identity is better in precision, and by much in the upper third.
    assert (identity["precision_at_1"] > lens["precision_at_1"]).loc[10:29].all()
    assert (identity["precision_at_1_low"] > lens["precision_at_1_high"]).loc[20:28].all()
    # Surprisal crosses over: the logit lens is ahead in the lower layers, token identity in the upper.
    assert (identity["surprisal"] > lens["surprisal"]).loc[3:9].all()
    assert (identity["surprisal"] < lens["surprisal"]).loc[18:29].all()
    # At the last layer both are the model itself.
    assert identity["precision_at_1"].loc[30] == lens["precision_at_1"].loc[30] == 1
    last = finding[finding["layer"] == smollm2.n_layers]
    assert (last["decoded_id"] == last["next_token_id"]).all()


def test_bands_resample_whole_texts():
    # Two texts, one always right and one always wrong: resampled texts give 0, 1/2 or 1, whatever the samples.
    rows = [
        (text, at, layer, "logit lens", text == 0, float(text))
        for text in (0, 1)
        for layer in (0, 1)
        for at in range(50)
    ]
    table = pd.DataFrame(rows, columns=["text", "position", "layer", "lens", "correct", "surprisal"])
    summary = summarise(table)
    assert summary["precision_at_1"].tolist() == [0.5, 0.5]
    assert summary["precision_at_1_low"].tolist() == [0, 0]
    assert summary["precision_at_1_high"].tolist() == [1, 1]
    pd.testing.assert_frame_equal(summary, summarise(table))
    alone = summarise(table[table["text"] == 0])
    assert alone["precision_at_1"].tolist() == [1, 1]
    assert alone[["surprisal_low", "surprisal_high"]].isna().all(axis=None)
    # One of one: the exact interval of a share.
    assert alone["precision_at_1_low"].tolist() == pytest.approx([0.025, 0.025])
    assert alone["precision_at_1_high"].tolist() == [1, 1]


def test_bands_against_a_plain_bootstrap(finding):
    layer = finding[(finding["layer"] == 20) & (finding["lens"] == "token identity")]
    groups = [group["surprisal"].to_numpy() for _, group in layer.groupby("text")]
    random = np.random.default_rng(5)
    means = [
        np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))]).mean() for _ in range(4000)
    ]
    summary = summarise(finding).set_index(["lens", "layer"]).loc[("token identity", 20)]
    assert summary["surprisal"] == pytest.approx(layer["surprisal"].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert summary["surprisal_low"] == pytest.approx(low, abs=0.05 * (high - low))
    assert summary["surprisal_high"] == pytest.approx(high, abs=0.05 * (high - low))


def test_the_figure_shows_the_summary(finding):
    summary = summarise(finding)
    figure = next_token_figure(summary, "title")
    precision, surprise = figure.axes
    for axes, measure in ((precision, "precision_at_1"), (surprise, "surprisal")):
        for lens, line in zip(("logit lens", "token identity"), axes.get_lines(), strict=False):
            expected = summary[summary["lens"] == lens]
            np.testing.assert_allclose(line.get_xdata(), expected["layer"])
            np.testing.assert_allclose(line.get_ydata(), expected[measure])
        assert len(axes.collections) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["logit lens", "token identity"]
    assert figure.get_suptitle().endswith("\ntitle")


def test_a_lens_looks_alike_beside_whatever_others(finding):
    summary = summarise(finding)
    mine = summary[summary["lens"] == "logit lens"].assign(lens="mine")
    drawn = []
    for order in ([summary], [mine, summary]):
        axes = next_token_figure(pd.concat(order)).axes[0]
        drawn.append({line.get_label(): (line.get_color(), line.get_marker()) for line in axes.get_lines()})
    assert {name: drawn[1][name] for name in drawn[0]} == drawn[0]
    assert len({*drawn[1].values()}) == 3


def test_layer_readout_against_one_row_passes(tiny):
    source = tiny.prompt("Amazon's former CEO attended the Oscars", "CEO")
    target = tiny.prompt(TOKEN_IDENTITY)
    table = LayerReadout(tiny, target, source, [0, 1, 4], top_k=3, new_tokens=4).table()
    assert len(table) == 3 * 3 * 2 + 3
    states = hidden_states(tiny.hf, tiny.layers, source.ids)[:, source.position]
    with torch.no_grad():
        for layer in (0, 1, 4):
            logits = patched_logits(tiny.hf, tiny.layers, target.ids, target.position, layer, states[layer])[-1]
            lens = tiny.hf.lm_head(tiny.hf.model.norm(states[layer]))
            for reading, expected in (("patchscope", logits), ("logit lens", lens)):
                rows = table[(table["layer"] == layer) & (table["reading"] == reading)]
                top = expected.softmax(0).topk(3)
                assert rows["token_id"].tolist() == top.indices.tolist()
                assert rows["probability"].tolist() == pytest.approx(top.values.tolist(), abs=1e-4)
            spoken = patched_continuation(tiny.hf, tiny.layers, target.ids, target.position, layer, states[layer], 4)
            rows = table[(table["layer"] == layer) & (table["reading"] == "patchscope")]
            assert set(rows["continuation"]) == {tiny.tokenizer.decode(spoken)}
    clean = table[table["reading"] == "clean target"]
    assert clean["layer"].isna().all()
    with torch.no_grad():
        assert clean["token_id"].iloc[0] == tiny.hf(torch.tensor([target.ids])).logits[0, -1].argmax()


def test_the_readout_figure_has_a_planted_cell_where_it_belongs():
    rows = [
        {"reading": reading, "layer": layer, "rank": 1, "token": f"{reading} {layer}", "probability": 0.1}
        | {"continuation": f"goes on {layer}"}
        for reading in ("patchscope", "logit lens")
        for layer in (0, 5, 9)
    ]
    rows.append(
        {"reading": "clean target", "layer": None, "rank": 1, "token": "$c$", "probability": 0.2, "continuation": "c"}
    )
    table = pd.DataFrame(rows).astype({"layer": "Int64", "continuation": "string"})
    table.loc[(table["layer"] == 5) & (table["reading"] == "logit lens"), "probability"] = 0.9
    axes, said = layer_readout_figure(table, "$5 (#1), not $6").axes[:2]
    axes.figure.savefig(io.BytesIO())
    shades = axes.collections[0].get_array().reshape(4, 2)
    assert shades[1, 1] == 0.9
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "5", "9", "clean target"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["patchscope", "logit lens"]
    written = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in axes.texts}
    assert written[(1.5, 1.5)] == "logit lens 5"
    assert written[(0.5, 3.5)] == r"\$c\$"
    assert [(text.get_position(), text.get_text()) for text in said.texts][1] == ((0, 1.5), "goes on 5")
    # Each of the four says something else than the one above.
    assert [line.get_ydata()[0] for line in said.get_lines()] == [1, 2, 3]


def test_readout_refuses(tiny):
    target, source = tiny.prompt(TOKEN_IDENTITY), tiny.prompt("a b")
    with pytest.raises(PscopeError, match="layer 9 is out of range"):
        LayerReadout(tiny, target, source, [0, 9])
    with pytest.raises(PscopeError, match="no layer"):
        LayerReadout(tiny, target, source, [])
    for unlisted in ("0-3", 3):
        with pytest.raises(PscopeError, match="layers are given as a list of numbers, as"):
            LayerReadout(tiny, target, source, unlisted)
    with pytest.raises(PscopeError, match="2 positions of 'a b' are marked where one is needed"):
        LayerReadout(tiny, target, tiny.prompt("a b", [0, 1]), [0])
    with pytest.raises(PscopeError, match="top_k is 0"):
        LayerReadout(tiny, target, source, [0], top_k=0)


def test_what_one_experiment_has_checked_another_need_not_check(tiny, monkeypatch):
    target, source = tiny.prompt("one x two", "x"), tiny.prompt("Japan")
    first, second = (LayerReadout(tiny, target, source, [1, 2]) for _ in range(2))
    checked = first.check
    assert checked.difference is not None
    second.trust(first)
    monkeypatch.setattr("pscope.engine.patchscope.choose_path", lambda *asked: pytest.fail("checked again"))
    assert second.check == checked
    # Of another length or place, it is another matter.
    with pytest.raises(pytest.fail.Exception):
        second.scope(tiny.prompt("one two x", "x"))


def test_what_a_row_does_not_say_is_not_true():
    with pytest.raises(PscopeError, match="a row says neither true nor false of 'found'"):
        tidy([{"layer": 1, "found": True}, {"layer": 2}], {"layer": "Int64", "found": "bool"})
