"""Affine fits against plain regressions, planted maps, and states that transformers itself returns."""

import numpy as np
import pytest
import torch
from conftest import random_model
from reference import hidden_states
from sklearn.linear_model import Ridge
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pscope import TOKEN_IDENTITY, DataError, PscopeError, load
from pscope.inputs.positions import Paired, draw_paired, draw_positions
from pscope.inputs.texts import shipped_texts
from pscope.mappings import fit as fit_module
from pscope.mappings.cache import fitted, place
from pscope.mappings.fit import Fit
from pscope.mappings.mapping import Identity
from pscope.mappings.mapping_set import FOLDS, fold_of
from pscope.mappings.moments import RIDGES, Moments

WIDTH, OUT, POSITIONS = 6, 4, 200


@pytest.fixture
def states():
    """Pairs of states that a map relates, with noise, features of unlike size, means, and folds of unlike size."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(POSITIONS, 2, WIDTH, generator=random, dtype=torch.float64)
    x = x * torch.tensor([1, 50, 0.01, 3, 1, 1]) + torch.arange(WIDTH)
    y = x[:, :1] @ torch.randn(WIDTH, OUT, generator=random, dtype=torch.float64)
    y = y + 5 + torch.randn(POSITIONS, 1, OUT, generator=random, dtype=torch.float64)
    return x, y, torch.randint(0, FOLDS, (POSITIONS,), generator=random)


def moments_of(x, y, folds, parts=1) -> Moments:
    moments = Moments([(3, 9), (5, 9)], WIDTH, OUT, "cpu")
    for part in torch.arange(len(x)).chunk(parts):
        moments.add(x[part], y[part], folds[part])
    return moments


def plain_ridge(x, y, ridge) -> tuple[np.ndarray, np.ndarray]:
    """The same by scikit-learn, from all positions at once: features of variance 1, and the penalty for that many."""
    mean, scale = x.mean(0), x.std(0)
    model = Ridge(alpha=ridge * len(x), solver="svd").fit((x - mean) / scale, y)
    weight = model.coef_ / scale
    return weight, model.intercept_ - weight @ mean


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_each_map_is_the_plain_refit_without_its_fold(states, ridge):
    x, y, folds = states
    found = moments_of(x, y, folds, parts=7).fit((5, 9), ridge)
    for left_out, mapping in [(None, found.whole), *enumerate(found.folds)]:
        kept = (folds != left_out).numpy() if left_out is not None else slice(None)
        weight, bias = plain_ridge(x[kept, 1].numpy(), y[kept, 0].numpy(), ridge)
        np.testing.assert_allclose(mapping.weight, weight, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(mapping.bias, bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("positions", "noise"), [(POSITIONS, 0), (30, 200)])
def test_the_ridge_is_the_best_on_texts_held_out(states, positions, noise):
    random = torch.Generator().manual_seed(8)
    noisy = states[1] + noise * torch.randn(POSITIONS, 1, OUT, generator=random, dtype=torch.float64)
    given = states[0][:positions], noisy[:positions], states[2][:positions]
    x, y, folds = given[0][:, 0].numpy(), given[1][:, 0].numpy(), given[2]

    def lost(ridge: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            out = (folds == fold).numpy()
            weight, bias = plain_ridge(x[~out], y[~out], ridge)
            total += np.square(y[out] - x[out] @ weight.T - bias).sum()
        return total

    found = moments_of(*given).fit((3, 9))
    losses = {ridge: lost(ridge) for ridge in RIDGES}
    assert found.ridge == min(losses, key=losses.get)
    assert (found.ridge > RIDGES[2]) == (noise > 0)
    explained = 1 - losses[found.ridge] / np.square(y - y.mean(0)).sum()
    assert found.r2 == pytest.approx(explained, abs=1e-9)


def test_what_cannot_be_fitted_is_named(states):
    x, y, folds = states
    with pytest.raises(PscopeError, match="11 positions are too few for a map from width 6: 12 are needed"):
        moments_of(x[:11], y[:11], folds[:11]).fit((3, 9))
    same = x.clone()
    same[:, 1, 4] = 7.25
    with pytest.raises(PscopeError, match="dimension 4 of layer 5 is the same at all"):
        moments_of(same, y, folds).fit((5, 9))
    assert moments_of(same, y, folds).fit((3, 9)).r2 > 0.9
    twice = x.clone()
    twice[:, 0, 5] = twice[:, 0, 0] - 2 * twice[:, 0, 3]
    with pytest.raises(PscopeError, match="states of layer 3 span 5 of 6 dimensions"):
        moments_of(twice, y, folds).fit((3, 9), 0.0)
    assert moments_of(twice, y, folds).fit((3, 9), 0.01).r2 > 0.9
    with pytest.raises(PscopeError, match="states of layer 5 are not finite"):
        moments_of(x.index_fill(1, torch.tensor([1]), torch.nan), y, folds)
    with pytest.raises(PscopeError, match="all texts fall into one fold"):
        moments_of(x, y, torch.zeros_like(folds)).fit((3, 9))
    with pytest.raises(PscopeError, match="a ridge of -1"):
        Fit(None, None, (), ridge=-1)


def rotated(model) -> tuple[object, torch.Tensor]:
    """A model that computes the same in another basis: its states are those of `model`, turned."""
    turn = torch.linalg.qr(
        torch.randn(model.hidden_size, model.hidden_size, generator=torch.Generator().manual_seed(1))
    )[0]
    other = random_model(LlamaForCausalLM, LlamaConfig, model.tokenizer)
    other.hf.load_state_dict(model.hf.state_dict())
    with torch.no_grad():
        for name, weight in other.hf.named_parameters():
            if any(
                part in name for part in ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate", "up_proj", "lm_head")
            ):
                weight.copy_(weight @ turn.T)
            elif "o_proj" in name or "down_proj" in name:
                weight.copy_(turn @ weight)
    return load(other.hf, other.tokenizer), turn


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return shipped_texts()[::20]


def test_a_planted_map_between_two_models_is_recovered(tiny, passages):
    other, turn = rotated(tiny)
    paired, share = draw_paired(tiny, other, passages, None, seed=0)
    assert share == 1
    found = Fit(tiny, other, ((0, 0), (2, 2), (4, 4)), ridge=0).run(passages, paired)
    for pair in found.maps:
        assert found.origin.r2[pair] > 0.999
        torch.testing.assert_close(found.at(pair).weight, turn, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.at(pair).bias, torch.zeros(32), rtol=0, atol=1e-2)
    shuffled = Fit(tiny, other, ((2, 2),), shuffled=0).run(passages, paired)
    assert abs(shuffled.origin.r2[2, 2]) < 0.1
    mean = shuffled.to_means().at((2, 2))(torch.randn(3, 32))
    assert mean[0].equal(mean[2])


def test_a_fit_follows_from_texts_alone(tiny, passages, monkeypatch):
    sampled = draw_positions(tiny, passages, None, seed=0)
    paired = [Paired(each, each) for each in sampled]
    pairs = ((0, 4), (3, 4), (4, 4))
    whole = Fit(tiny, tiny, pairs).run(passages, paired)
    monkeypatch.setattr(fit_module, "CHUNK", 40_000)
    # And little memory for sums, so that each pair has a pass of its own over the texts.
    monkeypatch.setattr(fit_module, "SUMS", 1)
    assert len(Fit(tiny, tiny, pairs)._groups(pairs)) == 3
    chunks = Fit(tiny, tiny, pairs).run(passages, paired[::-1])
    assert isinstance(whole.at((4, 4)), Identity)
    assert whole.origin.positions == sum(len(each.positions) for each in sampled)
    for pair in pairs[:2]:
        assert chunks.origin.r2[pair] == pytest.approx(whole.origin.r2[pair], abs=1e-5)
        torch.testing.assert_close(chunks.at(pair).weight, whole.at(pair).weight, rtol=1e-3, atol=1e-3)
    # Against least squares on the states that transformers returns, of all texts but those of one fold.
    x, y, of = [], [], []
    for text, item in zip(passages, sampled, strict=True):
        states = hidden_states(tiny.hf, tiny.layers, item.prompt.ids)
        x.append(states[3, list(item.positions)])
        y.append(states[4, list(item.positions)])
        of += [fold_of(text)] * len(item.positions)
    x, y, of = torch.cat(x).double().numpy(), torch.cat(y).double().numpy(), np.array(of)
    fold = fold_of(passages[0])
    weight, bias = plain_ridge(x[of != fold], y[of != fold], whole.origin.ridge[3, 4])
    np.testing.assert_allclose(whole.at((3, 4), passages[0]).weight, weight, atol=2e-3)
    np.testing.assert_allclose(whole.at((3, 4), passages[0]).bias, bias, atol=2e-3)


def test_a_fit_to_a_prompt_pairs_states_with_those_of_the_right_token(tiny, passages, monkeypatch):
    sampled = draw_positions(tiny, passages, 100, seed=0)
    target = tiny.prompt("cat -> cat\nx -> y", "x")
    seen = []
    monkeypatch.setattr(Moments, "add", lambda self, x, y, folds: seen.append((x, y)))
    # Nothing was added up, so that no map follows.
    with pytest.raises(PscopeError, match="0 positions"):
        Fit(tiny, tiny, ((1, 1), (3, 3)), into=target).run(passages, [Paired(each, each) for each in sampled])
    x, y = (torch.cat(each) for each in zip(*seen, strict=True))
    in_order = sorted(sampled, key=lambda each: len(each.prompt))
    row = 0
    for item in in_order:
        with torch.no_grad():
            logits = tiny.hf(torch.tensor([item.prompt.ids])).logits[0]
        own = hidden_states(tiny.hf, tiny.layers, item.prompt.ids)
        for position in item.positions:
            written = list(target.ids)
            written[target.position] = logits[position].argmax().item()
            theirs = hidden_states(tiny.hf, tiny.layers, written)
            for column, layer in enumerate((1, 3)):
                torch.testing.assert_close(x[row, column], own[layer, position], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(y[row, column], theirs[layer, target.position], rtol=1e-4, atol=1e-4)
            row += 1
    assert row == len(x) == 100


def words(split) -> PreTrainedTokenizerFast:
    """A tokenizer of the words that `split` makes of a text."""
    vocabulary = {"[UNK]": 0, "[END]": 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")


def test_positions_are_paired_where_both_tokenizers_cut(tiny):
    blanks, pieces = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()
    one, other = (load(tiny.hf, words(split)) for split in (blanks, pieces))
    text = "it's a well-kept house, she said"
    # Of the one: it's|a|well-kept|house,|she|said; of the other: it|'|s|a|well|-|kept|house|,|she|said.
    paired, share = draw_paired(one, other, [text], None, seed=0)
    assert paired[0].source.positions == (1, 2, 3, 4, 5)
    assert paired[0].target.positions == (3, 6, 8, 9, 10)
    assert share == 1
    back, share = draw_paired(other, one, [text], None, seed=0)
    assert back[0].source.positions == (3, 6, 8, 9, 10)
    assert share == 5 / 10
    drawn, _ = draw_paired(other, one, [text], 2, seed=0)
    assert len(drawn[0].source.positions) == 2
    assert set(drawn[0].source.positions) < {3, 6, 8, 9, 10}
    with pytest.raises(DataError, match="have only 5 positions to give"):
        draw_paired(other, one, [text], 6, seed=0)


def test_fits_are_kept_and_found_again(tiny, passages, tmp_path, monkeypatch):
    monkeypatch.setenv("PSCOPE_CACHE", str(tmp_path))
    paired = [Paired(each, each) for each in draw_positions(tiny, passages, 100, seed=0)]
    fit = Fit(tiny, tiny, ((1, 4),))
    first = fitted(fit, passages, paired)
    read = []
    again = fitted(fit, passages, paired, read.append)
    assert read == []
    assert again.at((1, 4)).weight.equal(first.at((1, 4)).weight)
    # What is damaged is fitted anew.
    (place(fit, passages, paired) / "mappings.safetensors").write_bytes(b"")
    assert fitted(fit, passages, paired, read.append).at((1, 4)).weight.equal(first.at((1, 4)).weight)
    assert read == [100]
    assert [path.name for path in (tmp_path / "mappings").iterdir()] == [place(fit, passages, paired).name]
    others = [
        place(Fit(tiny, tiny, ((1, 4),), ridge=0.1), passages, paired),
        place(Fit(tiny, tiny, ((2, 4),)), passages, paired),
        place(Fit(tiny, tiny, ((1, 4),), into=tiny.prompt(TOKEN_IDENTITY)), passages, paired),
        place(Fit(tiny, tiny, ((1, 4),), shuffled=0), passages, paired),
        place(fit, passages[::-1], paired),
        place(fit, passages, paired[1:]),
    ]
    assert len({place(fit, passages, paired), *others}) == 7
