"""The tuned lens, beside the model's own norm and unembedding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model
from transformers import Gemma2Config, Gemma2ForCausalLM

import pscope
from pscope.inputs.positions import Paired, draw_positions
from pscope.inputs.texts import shipped_texts
from pscope.mappings import tuned
from pscope.mappings.fit import Fit
from pscope.mappings.mapping import IDENTITY, Affine, Norm
from pscope.mappings.mapping_set import End, MappingSet, Origin, fold_of
from pscope.mappings.tuned import PUBLISHED, Recipe, fit_tuned

TEXTS = [text[:120] for text in shipped_texts()[:20]]
FEW = [text[:60] for text in TEXTS[:8]]
SHORT = Recipe("adam", 1e-2, steps=4, tokens=40)
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def start(tiny) -> MappingSet:
    """Closed form, from two layers, with more of a ridge than is best."""
    drawn = draw_positions(tiny, TEXTS, None, 0)
    fit = Fit(tiny, tiny, tuple((layer, tiny.n_layers) for layer in (*LAYERS, tiny.n_layers)), ridge=1.0)
    return fit.run(TEXTS, [Paired(each, each) for each in drawn])


@pytest.fixture(scope="module")
def fitted(tiny, start):
    return fit_tuned(tiny, TEXTS, start, replace(SHORT, steps=15, tokens=100))


def affine(tiny, maps) -> MappingSet:
    return MappingSet(maps, Origin("affine", End.of(tiny), End.of(tiny)))


def held_out_kl(tiny, maps) -> list[float]:
    """From HuggingFace's hidden states, norm and unembedding, one text at a time."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    heads = tiny.hf.model.norm, tiny.hf.lm_head
    for text in TEXTS:
        if fold_of(text) == 0:
            with torch.no_grad():
                out = tiny.hf(torch.tensor([tiny.prompt(text).ids]), output_hidden_states=True)
                said = out.logits[0, 1:].double().softmax(-1)
                for layer, of_layer in found.items():
                    mapping = maps[layer, tiny.n_layers]
                    mapped = out.hidden_states[layer][0, 1:] @ mapping.weight.T + mapping.bias
                    read = heads[1](heads[0](mapped)).double().softmax(-1)
                    of_layer.append((said * (said / read).log()).sum(-1))
    return [torch.cat(of_layer).mean().item() for of_layer in found.values()]


def hooks_on(model) -> list:
    """Those of transformers itself."""
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.hf.modules()]


def test_training_reads_texts_held_out_better(fitted, tiny, start):
    tuned_set, table = fitted
    assert table["layer"].tolist() == list(LAYERS)
    assert (table["kl_after"] < [0.98, 0.85] * table["kl_before"]).all()
    assert table["kl_before"].tolist() == pytest.approx(held_out_kl(tiny, start.folds[0]), rel=1e-4)
    assert table["kl_after"].tolist() == pytest.approx(held_out_kl(tiny, tuned_set.maps), rel=1e-4)


def test_origin_tells_what_was_done(fitted, tiny, start):
    origin = fitted[0].origin
    assert (origin.kind, origin.settings["start"]) == ("tuned lens", "affine")
    assert origin.settings["recipe"]["steps"] == 15
    own = [text for text in TEXTS if fold_of(text)]
    assert origin.texts == len(own)
    assert origin.positions == sum(len(tiny.prompt(text)) - 1 for text in own)
    fitted[0].check(tiny, tiny)


def test_the_last_layer_is_mapped_by_the_identity(fitted, tiny):
    states = torch.randn(3, tiny.hidden_size)
    assert torch.equal(fitted[0].at((tiny.n_layers, tiny.n_layers))(states), states)


@pytest.mark.parametrize("clip", [0.1, 100.0])
def test_one_step_is_that_of_torch(tiny, start, clip):
    """Of SGD at a rate of 1, published: one step of clipped gradients, which Nesterov's momentum makes 1.9 long."""
    text = next(text for text in TEXTS if fold_of(text))
    held_out = next(text for text in TEXTS if not fold_of(text))
    old = start.folds[0][1, tiny.n_layers]
    weight, bias = old.weight.clone().requires_grad_(), old.bias.clone().requires_grad_()
    with torch.no_grad():
        out = tiny.hf(torch.tensor([tiny.prompt(text).ids]), output_hidden_states=True)
    logits = tiny.hf.lm_head(tiny.hf.model.norm(out.hidden_states[1][0, 1:] @ weight.T + bias))
    said, read = out.logits[0, 1:].log_softmax(-1), logits.log_softmax(-1)
    by_weight, by_bias = torch.autograd.grad((said.exp() * (said - read)).sum(-1).mean(), [weight, bias])
    scale = min(1, clip / (by_weight.square().sum() + by_bias.square().sum()).sqrt())
    assert (scale < 1) == (clip < 1)

    recipe = replace(PUBLISHED, steps=1, clip=clip)
    found, _ = fit_tuned(tiny, [text, held_out], affine(tiny, {(1, tiny.n_layers): old}), recipe)
    new = found.at((1, tiny.n_layers))
    decay = 1e-3
    step = 1.9 * 0.1 * (scale * by_weight + decay * (weight - torch.eye(tiny.hidden_size)))
    torch.testing.assert_close(new.weight, (weight - step).detach())
    torch.testing.assert_close(new.bias, (bias - 1.9 * 0.1 * (scale * by_bias + decay * bias)).detach())


def test_what_a_model_does_after_its_unembedding_is_done(tokenizer):
    """Gemma 2 caps its logits."""
    model = random_model(Gemma2ForCausalLM, Gemma2Config, tokenizer, head_dim=8, final_logit_softcapping=2.0)
    _, table = fit_tuned(model, FEW, affine(model, {(3, model.n_layers): IDENTITY}), replace(SHORT, steps=1))
    found = []
    for text in FEW:
        if fold_of(text) == 0:
            with torch.no_grad():
                out = model.hf(torch.tensor([model.prompt(text).ids]), output_hidden_states=True)
                capped = 2 * (model.hf.lm_head(model.hf.model.norm(out.hidden_states[3])) / 2).tanh()
                said, read = (logits[0, 1:].log_softmax(-1) for logits in (out.logits, capped))
                found.append((said.exp() * (said - read)).sum(-1))
    assert table["kl_before"].item() == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)


def test_the_identity_is_a_start(tiny):
    identity = affine(tiny, {(1, tiny.n_layers): IDENTITY})
    written_out = affine(tiny, {(1, tiny.n_layers): Affine(torch.eye(tiny.hidden_size))})
    one, other = (fit_tuned(tiny, FEW, each, replace(SHORT, steps=1)) for each in (identity, written_out))
    assert one[1].equals(other[1])
    assert torch.equal(one[0].at((1, tiny.n_layers)).weight, other[0].at((1, tiny.n_layers)).weight)


@pytest.mark.parametrize("recipe", [SHORT, replace(PUBLISHED, steps=4, tokens=40)], ids=lambda each: each.optimiser)
def test_a_run_that_was_killed_ends_as_one_that_was_not(tiny, start, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(tuned, "_EVERY", 2)
    whole, whole_table = fit_tuned(tiny, FEW, start, recipe)
    path, seen = tmp_path / "new" / "tuned.safetensors", []

    def killed_after_three(done: int) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_tuned(tiny, FEW, start, recipe, checkpoint=path, progress=killed_after_three)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    resumed, table = fit_tuned(tiny, FEW, start, recipe, checkpoint=path, progress=seen.append)
    assert seen == [1, 2, 3, 3, 4]
    assert table.equals(whole_table)
    for pair in [(layer, tiny.n_layers) for layer in LAYERS]:
        assert torch.equal(resumed.at(pair).weight, whole.at(pair).weight)
        assert torch.equal(resumed.at(pair).bias, whole.at(pair).bias)


def test_the_seed_decides_which_texts_a_step_sees(tiny, start):
    one, other = (fit_tuned(tiny, FEW, start, replace(SHORT, steps=1), seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.at((1, tiny.n_layers)).weight, other.at((1, tiny.n_layers)).weight)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"recipe": replace(SHORT, steps=2, learning_rate=1e-4)}, "recipe"),
        ({"texts": FEW[:-1]}, "texts"),
        ({"start": "identity"}, "layers, start"),
    ],
    ids=["seed", "recipe", "texts", "start"],
)
def test_the_checkpoint_of_another_fit_is_refused(tiny, start, tmp_path, changed, named):
    path = tmp_path / "tuned.safetensors"
    given = {"texts": FEW, "start": start, "recipe": replace(SHORT, steps=2)}
    fit_tuned(tiny, **given, checkpoint=path)
    if changed.get("start"):
        changed = {"start": affine(tiny, {(2, tiny.n_layers): IDENTITY})}
    with pytest.raises(pscope.PscopeError, match=f"of another fit: the {named} differ"):
        fit_tuned(tiny, **{**given, **changed}, checkpoint=path)


def test_a_checkpoint_that_cannot_be_read_or_written_is_refused(tiny, start, tmp_path):
    path = tmp_path / "tuned.safetensors"
    path.write_text("nothing of the kind")
    with pytest.raises(pscope.PscopeError, match="no checkpoint that can be read"):
        fit_tuned(tiny, FEW, start, SHORT, checkpoint=path)
    with pytest.raises(pscope.PscopeError, match="cannot write"):
        fit_tuned(tiny, FEW, start, replace(SHORT, steps=1), checkpoint=Path(path, "within a file"))


def test_what_cannot_be_trained_is_refused(tiny, start):
    with pytest.raises(pscope.PscopeError, match="0 held out"):
        fit_tuned(tiny, [text for text in FEW if fold_of(text)], start, SHORT)
    with pytest.raises(pscope.PscopeError, match="0 are to be trained on"):
        fit_tuned(tiny, [text for text in FEW if not fold_of(text)], start, SHORT)
    with pytest.raises(pscope.PscopeError, match="no map to layer 4 to start from; these map layer 1 to layer 3"):
        fit_tuned(tiny, FEW, affine(tiny, {(1, 3): IDENTITY}), SHORT)
    with pytest.raises(pscope.PscopeError, match="that of layer 1 is Norm"):
        fit_tuned(tiny, FEW, affine(tiny, {(1, tiny.n_layers): Norm(1.0)}), SHORT)
    with pytest.raises(pscope.PscopeError, match="0 steps"):
        replace(SHORT, steps=0)
    with pytest.raises(pscope.PscopeError, match="not 'muon'"):
        replace(SHORT, optimiser="muon")


def test_a_loss_that_is_not_finite_names_its_layer_and_the_model_stays_as_it_was(tiny, start):
    weights = {name: weight.clone() for name, weight in tiny.hf.state_dict().items()}
    wanted, hooks = [weight.requires_grad for weight in tiny.hf.parameters()], hooks_on(tiny)
    broken = Affine(torch.full((tiny.hidden_size, tiny.hidden_size), float("nan")))
    with pytest.raises(pscope.PscopeError, match="layer 3 in step 0"):
        fit_tuned(tiny, FEW, affine(tiny, {**start.maps, (3, tiny.n_layers): broken}), SHORT)
    with torch.no_grad():
        fit_tuned(tiny, FEW, start, replace(SHORT, steps=1))
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.hf.state_dict().items())
    assert [weight.requires_grad for weight in tiny.hf.parameters()] == wanted
    assert all(weight.grad is None for weight in tiny.hf.parameters())
    assert hooks_on(tiny) == hooks
    assert not tiny.hf.training
