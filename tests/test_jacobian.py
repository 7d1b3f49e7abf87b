"""The Jacobian lens, beside Jacobians that torch finds of a plain forward pass."""

import copy

import pytest
import torch
from conftest import without_a_number
from torch.autograd.functional import jacobian

import pscope
from pscope.inputs.texts import shipped_texts
from pscope.mappings.jacobian import SETTLED, fit_jacobian

TEXTS = [text[:150] for text in shipped_texts()[:5]]
LAYERS = [0, 2, 3, 4]
FEW = {"most_tokens": 12, "sinks": 3}


@pytest.fixture(scope="module")
def fitted(tiny):
    return fit_jacobian(tiny, TEXTS, LAYERS, **FEW)


def by_torch(hf, ids: list[int], layer: int, sinks: int) -> torch.Tensor:
    """In float64, position by position, through all that comes after `layer` in the decoder."""
    hf = copy.deepcopy(hf).double()
    held = {}

    def write(module, args, kwargs):
        held["stream"] = args[0]
        return (held["new"], *args[1:]), kwargs

    def last_states(stream: torch.Tensor) -> torch.Tensor:
        held["new"] = stream[None]
        hooks = []
        if layer < len(hf.model.layers):
            hooks.append(hf.model.layers[layer].register_forward_pre_hook(write, with_kwargs=True))
        hooks.append(hf.model.norm.register_forward_pre_hook(lambda module, args: held.update(last=args[0])))
        hf(torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return held["last"][0]

    stream = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    full = jacobian(last_states, stream)  # (tokens, width, tokens, width)
    # The last token of a text is left out at both ends.
    counted = range(sinks, len(ids) - 1)
    return sum(full[later, :, at] for at in counted for later in counted if later >= at) / len(counted)


def hooks_on(model) -> list:
    """Those of transformers itself."""
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.hf.modules()]


def test_it_is_the_mean_of_what_torch_finds(tiny):
    fitted, _ = fit_jacobian(tiny, TEXTS[:2], [0, 2], most_tokens=8, sinks=2)
    for layer in (0, 2):
        each = [by_torch(tiny.hf, list(tiny.prompt(text).ids[:8]), layer, 2) for text in TEXTS[:2]]
        found = fitted.at((layer, tiny.n_layers)).weight
        torch.testing.assert_close(found, torch.stack(each).mean(dim=0).float(), rtol=1e-4, atol=1e-4)


def test_what_finite_differences_say(tiny):
    """The last position alone: one column of J is what a small step in one dimension does, over its length."""
    ids = list(tiny.prompt(TEXTS[0]).ids[:8])
    found, _ = fit_jacobian(tiny, [TEXTS[0]], [2], most_tokens=8, sinks=6)
    hf = copy.deepcopy(tiny.hf).double()
    # Llama's norm computes in single precision, whatever it is given.
    step = 1e-2

    def last_state(by: float) -> torch.Tensor:
        def move(module, args, output):
            output = output.clone()
            output[0, 6, 5] += by
            return output

        held = {}
        hooks = [
            hf.model.layers[1].register_forward_hook(move),
            hf.model.norm.register_forward_pre_hook(lambda module, args: held.update(last=args[0])),
        ]
        with torch.no_grad():
            hf(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return held["last"][0, 6]

    column = (last_state(step) - last_state(-step)) / (2 * step)
    torch.testing.assert_close(found.at((2, tiny.n_layers)).weight[:, 5], column.float(), rtol=2e-3, atol=2e-3)


def test_no_weight_need_want_a_gradient(tiny):
    tiny.hf.requires_grad_(False)
    try:
        frozen, _ = fit_jacobian(tiny, TEXTS[:1], [2], **FEW)
    finally:
        tiny.hf.requires_grad_(True)
    free, _ = fit_jacobian(tiny, TEXTS[:1], [2], **FEW)
    assert torch.equal(frozen.at((2, 4)).weight, free.at((2, 4)).weight)


def test_the_last_layer_is_mapped_by_the_identity(fitted, tiny):
    assert torch.equal(fitted[0].at((tiny.n_layers, tiny.n_layers)).weight, torch.eye(tiny.hidden_size))


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_rows_of_a_pass_change_nothing(tiny, rows):
    one, other = (fit_jacobian(tiny, TEXTS[:1], [1], rows=each, **FEW)[0].at((1, 4)).weight for each in (8, rows))
    torch.testing.assert_close(one, other)


def test_the_table_tells_how_far_the_mean_moved(fitted, tiny):
    found, table = fitted
    means = {}
    for number in range(1, len(TEXTS) + 1):
        means[number] = {
            pair[0]: each.weight for pair, each in fit_jacobian(tiny, TEXTS[:number], LAYERS, **FEW)[0].maps.items()
        }
    assert len(table) == len(TEXTS) * len(LAYERS)
    for row in table.itertuples():
        if row.texts == 1:
            assert row.change == float("inf")
            continue
        before, after = means[row.texts - 1][row.layer], means[row.texts][row.layer]
        assert row.change == pytest.approx(((after - before).norm() / before.norm()).item(), abs=1e-5)
    assert found.origin.settings["n_prompts"] == found.origin.texts == len(TEXTS)
    assert found.origin.positions == len(TEXTS) * (12 - 3 - 1)
    assert table[table["texts"] == len(TEXTS)]["change"].max() > SETTLED
    assert found.origin.settings["settled_at"] is None
    found.check(tiny, tiny)


def test_it_settles_when_nothing_new_comes(tiny):
    found, table = fit_jacobian(
        tiny, [TEXTS[0], TEXTS[1], *[TEXTS[0], TEXTS[1]] * 60], [3], most_tokens=6, sinks=4, rows=32
    )
    last = table[table["change"] > SETTLED]["texts"].max()
    assert 2 < last < len(table)
    assert found.origin.settings["settled_at"] == last


def test_a_run_that_was_killed_ends_as_one_that_was_not(fitted, tiny, tmp_path):
    path, seen = tmp_path / "jacobian.safetensors", []

    def killed_after_three(done: int) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_jacobian(tiny, TEXTS, LAYERS, **FEW, checkpoint=path, progress=killed_after_three)
    resumed, table = fit_jacobian(tiny, TEXTS, LAYERS, **FEW, checkpoint=path, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    assert table.equals(fitted[1])
    assert resumed.origin == fitted[0].origin
    for pair, mapping in fitted[0].maps.items():
        assert torch.equal(resumed.at(pair).weight, mapping.weight)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"layers": [1]}, "layers"), ({"sinks": 2}, "sinks"), ({"texts": TEXTS[:1]}, "texts")],
    ids=["layers", "sinks", "texts"],
)
def test_the_checkpoint_of_another_fit_is_refused(tiny, tmp_path, changed, named):
    given = {"texts": TEXTS[:2], "layers": [2], **FEW, "checkpoint": tmp_path / "jacobian.safetensors"}
    fit_jacobian(tiny, **given)
    with pytest.raises(pscope.PscopeError, match=f"of another fit: the {named} differ"):
        fit_jacobian(tiny, **{**given, **changed})


def test_short_texts_are_passed_over(fitted, tiny):
    found, _ = fit_jacobian(tiny, ["Too short.", *TEXTS], LAYERS, **FEW)
    assert found.origin.texts == len(TEXTS)
    assert torch.equal(found.at((2, 4)).weight, fitted[0].at((2, 4)).weight)
    for texts in ([], ["Too short."]):
        with pytest.raises(pscope.PscopeError, match="no text has more than 17"):
            fit_jacobian(tiny, texts, LAYERS)
    with pytest.raises(pscope.PscopeError, match="out of range"):
        fit_jacobian(tiny, TEXTS, [5])
    with pytest.raises(pscope.PscopeError, match="0 layers, 8 rows"):
        fit_jacobian(tiny, TEXTS, [])


def test_a_jacobian_that_is_not_finite_names_its_layer_and_the_model_stays_as_it_was(tiny, fitted):
    weights, hooks = {name: weight.clone() for name, weight in tiny.hf.state_dict().items()}, hooks_on(tiny)
    with (
        without_a_number(tiny, tiny.prompt(TEXTS[1]).ids[5]),
        pytest.raises(pscope.PscopeError, match="layer 2 at text 1"),
    ):
        fit_jacobian(tiny, TEXTS, [2, 4], **FEW)
    with torch.no_grad():
        again, _ = fit_jacobian(tiny, TEXTS, LAYERS, **FEW)
    assert torch.equal(again.at((2, 4)).weight, fitted[0].at((2, 4)).weight)
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.hf.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in tiny.hf.parameters())
    assert hooks_on(tiny) == hooks
    assert not tiny.hf.training
