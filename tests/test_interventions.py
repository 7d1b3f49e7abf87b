"""A Patchscope is that of the model as it is at the call: its weights, its adapters, and what others do to it."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, get_peft_model
from reference import patched_continuation, patched_logits
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import pscope
from pscope import Decoding, Patchscope, capture, continue_prompts, editing, overwriting

TARGET = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
PATHS = ["auto", "staircase", "plain", "uncached"]


@pytest.fixture
def own(tokenizer):
    """A model of the test's own, which it may change."""
    return random_model(LlamaForCausalLM, LlamaConfig, tokenizer)


def assert_agrees(scope, states, layers=None):
    """Logits and continuations are those of one-row passes of the model as it is now; any hooks on it take part."""
    model, target = scope.model, scope.target
    everywhere = range(model.n_layers + 1)
    (part,) = scope.logits(states, everywhere)
    spoken = scope.generate(states, everywhere, Decoding(3))
    for layer, state in enumerate(states):
        where = (model.hf, layers or model.layers, target.ids, target.position, layer, state)
        expected = patched_logits(*where)[-1]
        assert (part.patched[layer] - expected).abs().max() / expected.std() < 1e-4
        assert spoken.patched[layer] == patched_continuation(*where, 3)
    clean = model.hf(torch.tensor([target.ids])).logits[0, -1].detach()
    assert (part.clean - clean).abs().max() / clean.std() < 1e-4


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def added(vector, position=None):
    """A forward hook of somebody's, on the output of a decoder layer or of a module within one."""

    def hook(module, args, output):
        stream = output if isinstance(output, torch.Tensor) else output[0]
        stream = stream.clone()
        stream[:, slice(None) if position is None else position] += vector
        return stream if isinstance(output, torch.Tensor) else (stream, *output[1:])

    return hook


@pytest.mark.parametrize("path", PATHS)
def test_edits_around_a_patchscope(tiny, path):
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7), path=path)
    states = capture(tiny, [tiny.prompt("Amazon's former CEO")])[0]
    vector = 3 * torch.randn(tiny.hidden_size, generator=torch.Generator().manual_seed(5))
    (without,) = scope.logits(states, range(5))
    for block in (
        lambda: editing(tiny, {1: lambda stream: stream + vector}),
        lambda: editing(tiny, {0: lambda stream, positions: stream + vector * torch.tensor(positions)[:, None] / 9}),
        # Before, at and behind the patch.
        *(lambda place=place: overwriting(tiny, 1, place, vector) for place in (2, 7, 9)),
    ):
        with block():
            assert_agrees(scope, states)
            (within,) = scope.logits(states, range(5))
        assert (within.patched - without.patched).abs().max() / without.patched.std() > 0.01
    assert_agrees(scope, states)


@pytest.mark.parametrize("position", [None, 2, 8])
def test_hooks_of_others_see_whole_prompts(tiny, position):
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7))
    assert scope.check.path == "staircase"
    states = capture(tiny, [tiny.prompt("Amazon's former CEO")])[0]
    vector = 3 * torch.randn(tiny.hidden_size, generator=torch.Generator().manual_seed(5))
    for module in (tiny.layers[1], tiny.layers[2].mlp):
        with hooked(module, added(vector, position)):
            assert_agrees(scope, states)
            prompts = [tiny.prompt("The quick brown fox jumps over the lazy dog")]
            ((_, said),) = continue_prompts(tiny, prompts, Decoding(3))
            ids = list(prompts[0].ids)
            for token in said:
                assert token == tiny.hf(torch.tensor([ids])).logits[0, -1].argmax()
                ids.append(token)
    with editing(tiny, {2: lambda stream: torch.cat([stream[:, :3], stream[:, 3:4] + vector, stream[:, 4:]], dim=1)}):
        assert_agrees(scope, states)


def test_weights_may_change_between_calls(own):
    scope = Patchscope(own, own.prompt(TARGET))
    states = capture(own, [own.prompt("Amazon's former CEO")])[0]
    assert_agrees(scope, states)
    with torch.no_grad():
        for layer in own.layers:
            layer.mlp.down_proj.weight *= 1.7
    assert_agrees(scope, states)


@pytest.mark.parametrize(
    ("model_class", "config_class", "targets", "path"),
    [
        (LlamaForCausalLM, LlamaConfig, ["q_proj", "v_proj", "down_proj"], "staircase"),
        (GPTNeoXForCausalLM, GPTNeoXConfig, ["query_key_value"], "staircase"),
        (MambaForCausalLM, MambaConfig, ["in_proj", "x_proj"], "plain"),
    ],
)
def test_adapters_take_the_path_of_the_model_they_adapt(tokenizer, model_class, config_class, targets, path):
    base = random_model(model_class, config_class, tokenizer)
    adapted = get_peft_model(base.hf, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    model = pscope.load(adapted, tokenizer)
    scope = Patchscope(model, model.prompt(TARGET, 7))
    assert scope.check.path == path
    states = capture(model, [model.prompt("Amazon's former CEO")])[0]
    assert_agrees(scope, states, base.layers)
    (with_adapter,) = scope.logits(states, range(5))
    with adapted.disable_adapter():
        assert_agrees(scope, states, base.layers)
        (without,) = scope.logits(states, range(5))
    assert (with_adapter.patched - without.patched).abs().max() / without.patched.std() > 0.01


def test_a_scaled_state_is_no_rounding(own, monkeypatch):
    """Half precision is judged by what roundings change, and what is patched must stand there to the last bit."""
    model = pscope.load(own.hf.bfloat16(), own.tokenizer)
    check = Patchscope(model, model.prompt(TARGET)).check
    assert check.path == "staircase"
    assert check.difference <= check.tolerance < 0.5
    climb = pscope.engine.staircase.Staircase._climb
    # Everywhere, and at each layer alone; the tail's norm takes the length out of what enters at the last.
    for layer in (None, 0, 2, 3):

        def scaled(self, writes, new_tokens, last, layer=layer):
            here = torch.full(writes.layers.shape, True) if layer is None else writes.layers == layer
            scaled = (writes.vectors * torch.where(here, 1.1, 1.0)[..., None]).to(writes.vectors.dtype)
            return climb(self, replace(writes, vectors=scaled), new_tokens, last)

        monkeypatch.setattr(pscope.engine.staircase.Staircase, "_climb", scaled)
        assert Patchscope(model, model.prompt(TARGET)).check.path == "plain"


def everywhere(vector):
    """A hook on all modules there are, which changes the output of one of them."""

    def hook(module, args, output):
        return output + vector if isinstance(module, torch.nn.Linear) and module.out_features == 64 else None

    return torch.nn.modules.module.register_module_forward_hook(hook)


def test_whatever_may_have_to_see_whole_prompts_does(own):
    scope = Patchscope(own, own.prompt(TARGET, 7))
    assert scope.path == "staircase"
    states = capture(own, [own.prompt("Amazon's former CEO")])[0]
    vector = 3 * torch.randn(64, generator=torch.Generator().manual_seed(5))

    handle = everywhere(vector)
    try:
        assert scope.path == "uncached"
        assert_agrees(scope, states)
    finally:
        handle.remove()

    layer = own.layers[1]
    forward = layer.forward

    def shifted(hidden_states, **options):
        # By place in what it is given: right for whole prompts only.
        moved = hidden_states.clone()
        moved[:, 3:4] += vector[: own.hidden_size]
        return forward(moved, **options)

    layer.forward = shifted
    assert scope.path == "uncached"
    assert_agrees(scope, states)
    del layer.forward

    handle = layer.mlp.register_forward_hook(torch.nn.Identity())
    assert scope.path == "uncached"
    handle.remove()
    assert scope.path == scope.check.path == "staircase"


def test_a_patchscope_made_among_hooks_of_others_is_checked_when_they_are_gone(own):
    target = own.prompt(TARGET, 7)
    states = capture(own, [own.prompt("Amazon's former CEO")])[0]

    def tenth(stream):
        stream = stream.clone()
        stream[:, 10] = 1.0
        return stream

    with editing(own, {1: tenth}):
        scope = Patchscope(own, target)
        assert (scope.path, scope.check.path) == ("uncached", "uncached")
        assert "hooks of others" in str(scope.check)
        assert_agrees(scope, states)
    assert scope.check.path == "staircase"
    assert "within" in str(scope.check)
    assert_agrees(scope, states)


def test_what_is_unpatched_sees_whole_prompts_too(tiny):
    prompts = [tiny.prompt("The quick brown fox jumps over the lazy dog"), tiny.prompt("Amazon's former CEO attended")]

    def second(stream):
        stream = stream.clone()
        stream[:, 1] = 3.0
        return stream

    with editing(tiny, {1: second}):
        for path in PATHS:
            for index, said in continue_prompts(tiny, prompts, Decoding(3), path=path):
                ids = list(prompts[index].ids)
                for token in said:
                    assert token == tiny.hf(torch.tensor([ids])).logits[0, -1].argmax()
                    ids.append(token)


def test_positions_are_true_where_an_adapted_model_generates(tokenizer):
    base = random_model(LlamaForCausalLM, LlamaConfig, tokenizer)
    adapted = get_peft_model(base.hf, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model = pscope.load(adapted, tokenizer)
    ids = list(model.prompt("The quick brown fox").ids)
    with overwriting(model, 1, 0, torch.full((model.hidden_size,), 2.0)), torch.no_grad():
        (said,) = adapted.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        for token in said[len(ids) :].tolist():
            assert token == adapted(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
