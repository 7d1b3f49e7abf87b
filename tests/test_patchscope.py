from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import random_model, rows_for_every_layer, without_a_number
from reference import hidden_states, logits_at_each_step, patched_continuation, patched_logits
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from pscope import Decoding, ModelError, Patchscope, PromptError, PscopeError, capture, logit_lens
from pscope.engine.staircase import Staircase
from pscope.engine.unpatched import continue_prompts
from pscope.models.internals.caches import GrowingLayer

TARGET = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
PATHS = ["staircase", "plain", "uncached"]


def assert_agrees(scope, states, layers, tolerance=1e-4):
    model, target = scope.model, scope.target
    parts = list(scope.logits(states, layers))
    logits = torch.cat([part.patched for part in parts])
    for state, layer, got in zip(states, layers, logits, strict=True):
        expected = patched_logits(model.hf, model.layers, target.ids, target.position, layer, state)[-1]
        assert (got - expected).abs().max() / expected.std() < tolerance
        assert got.argmax() == expected.argmax()
    with torch.no_grad():
        clean = model.hf(torch.tensor([target.ids])).logits[0, -1]
    for part in parts:
        assert (part.clean - clean).abs().max() / clean.std() < tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("at", [0, 7, "last"])
def test_logits_agree_with_the_one_row_loop(tiny, path, at):
    scope = Patchscope(tiny, tiny.prompt(TARGET, at), path=path)
    assert_agrees(scope, *rows_for_every_layer(tiny))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("at", [0, 7, "last"])
def test_continuations_agree_with_the_one_row_loop(tiny, path, at):
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope = Patchscope(tiny, tiny.prompt(TARGET, at), path=path)
    spoken = scope.generate(states, layers, Decoding(20))
    assert [*spoken.patched, spoken.clean] == loop_says(tiny, scope.target, 20)


@cache
def loop_says(model, target, new_tokens):
    """What the one-row loop says of a random state at each layer, in no order, and last of the clean row."""
    states, layers = rows_for_every_layer(model, per_layer=1)
    own = hidden_states(model.hf, model.layers, target.ids)[0, target.position]
    return [
        patched_continuation(model.hf, model.layers, target.ids, target.position, layer, state, new_tokens)
        for state, layer in zip([*states, own], [*layers, 0], strict=True)
    ]


def test_the_default_model_agrees_at_every_layer_logits_and_continuations(smollm2):
    state = capture(smollm2, [smollm2.prompt("Amazon's former CEO attended the Oscars", "CEO")])[0]
    layers = list(range(smollm2.n_layers + 1))
    scope = Patchscope(smollm2, smollm2.prompt("Syria: Country in the Middle East, x"))
    assert scope.check.path == "staircase"
    ids, (part,) = scope.target.ids, scope.logits(state, layers)
    spoken = scope.generate(state, layers, Decoding(12))
    for layer, logits, got in zip(layers, part.patched, spoken.patched, strict=True):
        assert len(got) == 12 or got[-1] in smollm2.end_tokens
        where = smollm2.hf, smollm2.layers, ids, scope.target.position, layer, state[layer]
        expected = logits_at_each_step(*where, got)
        assert got == expected[:-1].argmax(dim=-1).tolist()
        assert (logits - expected[0]).abs().max() / expected[0].std() < 1e-4
    with torch.no_grad():
        clean = smollm2.hf(torch.tensor([ids])).logits[0, -1]
    assert (part.clean - clean).abs().max() / clean.std() < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_a_target_of_one_token(tiny, path):
    scope = Patchscope(tiny, tiny.prompt("x"), path=path)
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    assert_agrees(scope, states, layers)
    spoken = scope.generate(states, layers, Decoding(5))
    for state, layer, got in zip(states, layers, spoken.patched, strict=True):
        assert got == patched_continuation(tiny.hf, tiny.layers, scope.target.ids, 0, layer, state, 5)


@pytest.mark.parametrize("at", [0, 7, "last"])
def test_own_state_in_its_own_place_is_the_clean_row(tiny, at):
    target = tiny.prompt(TARGET, at)
    own = capture(tiny, [target])[0]
    scope = Patchscope(tiny, target)
    (part,) = scope.logits(own, range(tiny.n_layers + 1))
    torch.testing.assert_close(part.patched, part.clean.expand_as(part.patched), rtol=1e-4, atol=1e-4)
    spoken = scope.generate(own, range(tiny.n_layers + 1), Decoding(10))
    assert all(row == spoken.clean for row in spoken.patched)


def test_the_self_check_catches_an_error_confined_to_patched_rows(tiny, monkeypatch):
    climb = Staircase._climb

    def off_by_a_little(self, writes, new_tokens, last):
        return climb(self, replace(writes, vectors=writes.vectors * 1.05), new_tokens, last)

    monkeypatch.setattr(Staircase, "_climb", off_by_a_little)
    scope = Patchscope(tiny, tiny.prompt(TARGET))
    assert scope.check.path == "plain"
    assert "off" in str(scope.check)
    assert scope.check.difference > 1e-3
    assert_agrees(scope, *rows_for_every_layer(tiny))


def test_quantised_weights_round_like_half_precision(tiny, monkeypatch):
    spoil(
        monkeypatch,
        tiny,
        lambda ids, cache: (
            0.01 if cache is not None and cache.layers and isinstance(cache.layers[0], GrowingLayer) else 0.0
        ),
    )
    assert Patchscope(tiny, tiny.prompt(TARGET, 7)).check.path == "plain"
    monkeypatch.setattr(tiny.hf, "is_quantized", True, raising=False)
    check = Patchscope(tiny, tiny.prompt(TARGET, 7)).check
    assert check.path == "staircase"
    assert 1e-3 < check.difference < check.tolerance < 0.5


def spoil(monkeypatch, model, wrong):
    """Let passes give logits that are off by `wrong(ids, cache)`."""
    step = type(model).logits
    monkeypatch.setattr(
        type(model), "logits", lambda self, ids, cache=None, last=1: step(self, ids, cache, last) + wrong(ids, cache)
    )


def test_the_self_check_catches_an_error_confined_to_continuations(tiny, monkeypatch):
    spoil(
        monkeypatch,
        tiny,
        lambda ids, cache: ids.shape == (6, 1) and cache is not None and isinstance(cache.layers[0], GrowingLayer),
    )
    scope = Patchscope(tiny, tiny.prompt(TARGET, 3))
    assert scope.check.path == "plain"
    assert_agrees(scope, *rows_for_every_layer(tiny))


def test_the_self_check_catches_a_cache_that_cannot_be_relied_on_once_rows_have_left(tiny, monkeypatch):
    spoil(monkeypatch, tiny, lambda ids, cache: ids.shape == (3, 1) and cache is not None)
    scope = Patchscope(tiny, tiny.prompt(TARGET, 3))
    assert scope.check.path == "uncached"
    assert "going on from its own cache is" in str(scope.check)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (1.0, lambda ids, layer: len(ids) == 6 and layer._room == 0),
        (float("nan"), lambda ids, layer: ids.shape == (3, 1)),
    ],
    ids=["with no room to go on", "not a number"],
)
def test_the_self_check_catches_an_error_of_the_staircase_alone(tiny, monkeypatch, wrong, where):
    def error(ids, cache):
        layer = None if cache is None or not cache.layers else cache.layers[0]
        return wrong if isinstance(layer, GrowingLayer) and where(ids, layer) else 0.0

    spoil(monkeypatch, tiny, error)
    assert Patchscope(tiny, tiny.prompt(TARGET, 3)).check.path == "plain"


def test_a_small_memory_budget_changes_nothing_but_the_passes(tiny):
    states, layers = rows_for_every_layer(tiny, per_layer=3)
    roomy = Patchscope(tiny, tiny.prompt(TARGET, 7))
    tight = Patchscope(tiny, tiny.prompt(TARGET, 7), memory=4 * roomy._now()[0].row_bytes(0))
    parts = list(tight.logits(states, layers))
    assert [part.rows for part in parts] == [slice(s, min(s + 4, 15)) for s in range(0, 15, 4)]
    (whole,) = roomy.logits(states, layers)
    torch.testing.assert_close(torch.cat([part.patched for part in parts]), whole.patched, rtol=1e-4, atol=1e-4)
    smallest = Patchscope(tiny, tiny.prompt(TARGET, 7), memory=1)
    assert smallest.rows_per_pass() == 1
    assert smallest.generate(states, layers, Decoding(5)) == roomy.generate(states, layers, Decoding(5))


def test_results_tell_what_is_in_them(tiny):
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7))
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    spoken = scope.generate(states[:4], layers[:4], Decoding(3))
    assert spoken.text == [tiny.tokenizer.decode(row) for row in spoken.patched]
    assert spoken.table()["text"].tolist() == [*spoken.text, tiny.tokenizer.decode(spoken.clean)]
    assert spoken.table()["row"].isna().tolist() == [False] * 4 + [True]
    assert repr(spoken).startswith(f"Continuations(4 rows: {spoken.text[0]!r}, ")
    words = [" one", " two", " three"]
    choices = scope.choose(states[:2], layers[:2], words)
    assert choices.text == [words[number] for number in choices.patched.chosen]
    table = choices.table()
    assert table.loc[table["chosen"], "candidate"].tolist() == [*choices.text, words[choices.clean.chosen]]
    assert table["score"].tolist() == torch.cat([choices.patched.scores, choices.clean.scores]).flatten().tolist()
    assert repr(choices).startswith(f"Choices(2 rows of 3 candidates: {choices.text[0]!r}, ")
    scores = scope.score(states[:2], layers[:2], [" one", " two three"], ranks=True)
    told = scores.table()
    assert told[["row", "place"]].values.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert told["log_probability"].tolist() == scores.patched.log_probabilities.flatten()[[0, 2, 3]].tolist()
    assert told["clean"].tolist() == scores.clean.log_probabilities.flatten()[[0, 2, 3]].tolist()
    assert f"{told['log_probability'][0]:.2f}" in repr(scores)


def test_a_repeated_call_is_identical(tiny):
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7))
    states, layers = rows_for_every_layer(tiny)
    first, second = (next(scope.logits(states, layers)).patched for _ in range(2))
    assert first.equal(second)
    assert scope.generate(states, layers) == scope.generate(states, layers)


def test_the_last_layer_through_the_logit_lens_is_the_models_logits(smollm2, tiny, tokenizer):
    capped = random_model(
        Gemma3ForCausalLM, Gemma3TextConfig, tokenizer, head_dim=8, final_logit_softcapping=2.0, sliding_window=8
    )
    for model in (smollm2, tiny, capped):
        prompts = [model.prompt(text) for text in ("The quick brown fox", "Amazon's former CEO attended")]
        states = capture(model, prompts, layers=[model.n_layers])[:, 0]
        (part,) = logit_lens(model).logits(states, model.n_layers)
        for prompt, got in zip(prompts, part.patched, strict=True):
            with torch.no_grad():
                expected = model.hf(torch.tensor([prompt.ids])).logits[0, -1]
            assert (got - expected).abs().max() / expected.std() < 1e-4


def test_the_logit_lens_is_norm_and_unembedding_at_every_layer(smollm2):
    states = capture(smollm2, [smollm2.prompt("Amazon's former CEO attended the Oscars", "CEO")])[0]
    (part,) = logit_lens(smollm2).logits(states, smollm2.n_layers)
    with torch.no_grad():
        expected = smollm2.hf.lm_head(smollm2.hf.model.norm(states))
    torch.testing.assert_close(part.patched, expected, rtol=1e-4, atol=1e-3)


def test_half_precision_states_go_into_a_float_model(tiny):
    states, layers = rows_for_every_layer(tiny)
    scope = Patchscope(tiny, tiny.prompt(TARGET))
    (part,) = scope.logits(states.bfloat16(), layers)
    (same,) = scope.logits(states.bfloat16().float(), layers)
    assert part.patched.equal(same.patched)


def test_bad_input(tiny, tokenizer):
    scope = Patchscope(tiny, tiny.prompt(TARGET))
    state = torch.zeros(1, tiny.hidden_size)
    with pytest.raises(PscopeError, match="layer 5 is out of range"):
        scope.logits(state, 5)
    with pytest.raises(PscopeError, match="layer -1 is out of range"):
        scope.logits(state, [-1])
    with pytest.raises(PscopeError, match="1 states came with 2 target layers"):
        scope.logits(state, [0, 1])
    with pytest.raises(PscopeError, match=r"shape \(1, 7\) do not fit .* \(rows, 32\)"):
        scope.logits(torch.zeros(1, 7), 0)
    with pytest.raises(PscopeError, match="memory"):
        Patchscope(tiny, scope.target, memory=0)
    with pytest.raises(PromptError, match="more than the window"):
        scope.generate(state, 0, Decoding(250))
    with pytest.raises(PromptError, match="257 tokens are more than the window"):
        tiny.prompt("a" + " a" * 256)
    broken = random_model(LlamaForCausalLM, LlamaConfig, tokenizer)
    broken.hf.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        Patchscope(broken, broken.prompt(TARGET))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("at", [[3, 4, 5], [7, 2], [0, -1]])
def test_several_positions_with_the_same_or_different_states(tiny, path, at):
    target = tiny.prompt("say x x x x x please now", at)
    scope = Patchscope(tiny, target, path=path)
    torch.manual_seed(3)
    states = torch.randn(tiny.n_layers + 1, len(at), tiny.hidden_size)
    layers = list(range(tiny.n_layers + 1))
    (own,) = scope.logits(states, layers)
    (same,) = scope.logits(states[:, 0], layers)
    spoken = scope.generate(states, layers, Decoding(4)).patched
    for layer, state in enumerate(states):
        ids = list(target.ids)
        for got, vectors in ((own, state), (same, state[:1].expand(len(at), -1))):
            expected = patched_logits(tiny.hf, tiny.layers, ids, list(target.positions), layer, vectors)[-1]
            assert (got.patched[layer] - expected).abs().max() / expected.std() < 1e-4
        assert spoken[layer] == patched_continuation(tiny.hf, tiny.layers, ids, list(target.positions), layer, state, 4)
    with pytest.raises(PscopeError, match=r"at \d position\(s\), which take \(rows, 32\) or \(rows, \d, 32\)"):
        scope.logits(states[:, :1], layers)


def test_several_positions_pass_the_self_check(tiny):
    scope = Patchscope(tiny, tiny.prompt("say x x x x x please now", [2, 3, 4, 5, 6]))
    assert scope.check.path == "staircase"


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("room", [0, 1])
def test_a_target_that_fills_the_window(tokenizer, path, room):
    # A table of positions, beyond whose end there is nothing to look up.
    model = random_model(
        GPT2LMHeadModel, GPT2Config, tokenizer, n_embd=32, n_layer=4, n_head=4, n_inner=64, max_position_embeddings=16
    )
    target = model.prompt("x" + " x" * (15 - room), 9)
    assert len(target) == model.window - room
    scope = Patchscope(model, target, path=path)
    assert scope.check.path == ("staircase" if path == "auto" else path)
    states, layers = rows_for_every_layer(model, per_layer=1)
    assert_agrees(scope, states, layers)
    if room:
        for state, layer, got in zip(states, layers, scope.generate(states, layers, Decoding(1)).patched, strict=True):
            assert got == patched_continuation(model.hf, model.layers, target.ids, 9, layer, state, 1)
    with pytest.raises(PromptError, match="more than the window"):
        scope.generate(states, layers, Decoding(room + 1))


def test_sampling_takes_memory_of_its_own(tiny, monkeypatch):
    states, layers = rows_for_every_layer(tiny, per_layer=3)
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7))
    scope.memory = 4 * scope._now()[0].row_bytes(2)
    passes = []
    start = Staircase.start
    monkeypatch.setattr(
        Staircase, "start", lambda self, states, *more: passes.append(len(states)) or start(self, states, *more)
    )
    scope.generate(states, layers, Decoding(2))
    assert max(passes) == 4
    passes.clear()
    scope.generate(states, layers, Decoding(2, temperature=1.0))
    # Four copies of the logits in double precision, where a row had three in single precision and little else.
    assert max(passes) == 1


def test_what_cannot_be_meant(tiny):
    with pytest.raises(PromptError, match="a prompt is needed, not 'hi'; make one with model.prompt"):
        Patchscope(tiny, "hi")
    with pytest.raises(PscopeError, match="a list of prompts is needed, and 5 is none of them"):
        capture(tiny, 5)
    with pytest.raises(PscopeError, match="there is no path 'stairs'; one of auto, staircase, plain, uncached"):
        Patchscope(tiny, tiny.prompt(TARGET), path="stairs")
    scope = Patchscope(tiny, tiny.prompt(TARGET))
    with pytest.raises(PscopeError, match=r"states of torch.complex64 are no hidden states"):
        scope.logits(torch.zeros(1, tiny.hidden_size, dtype=torch.complex64), 0)


def test_a_model_and_a_patchscope_are_told_in_a_line(smollm2):
    told = "LanguageModel('smollm2': LlamaForCausalLM, layers 0 to 30, width 576, float32 on cpu)"
    assert repr(smollm2) == told
    scope = Patchscope(smollm2, smollm2.prompt("one x now", "x"), path="plain")
    assert repr(scope) == f"Patchscope({told}, Prompt('one x now' at 1:' x'), plain path)"


def test_another_attention_is_found_out_anew(tiny):
    # At its first token and at its last, attention needs no mask: how its rows are told apart is not known yet.
    for at in (0, "last"):
        scope = Patchscope(tiny, tiny.prompt(TARGET, at))
        try:
            tiny.hf.set_attn_implementation("eager")
            assert_agrees(scope, *rows_for_every_layer(tiny))
            assert scope.check.path == "staircase"
        finally:
            tiny.hf.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def longrope(tokenizer):
    """It places all tokens of a text otherwise once that has more than 16."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 16
    sizes = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    return random_model(Phi3ForCausalLM, Phi3Config, tokenizer, rope_parameters=rope, **sizes)


@pytest.mark.parametrize(("tokens", "new_tokens"), [(10, 6), (17, 6)])
def test_texts_that_stay_on_one_side_of_where_positions_change(longrope, tokens, new_tokens):
    target = longrope.prompt(" x" * tokens)
    assert len(target) == tokens
    state = torch.ones(32)
    spoken = Patchscope(longrope, target).generate(state[None], 2, Decoding(new_tokens))
    loop = longrope.hf, longrope.layers, target.ids, target.position, 2, state, new_tokens
    assert spoken.patched == [patched_continuation(*loop)]


def test_a_text_that_goes_on_beyond_where_positions_change_is_refused(longrope):
    target = longrope.prompt(" x" * 10)
    refused = pytest.raises(PromptError, match="10 tokens that go on for 7 pass 16, beyond which .* otherwise")
    with refused:
        Patchscope(longrope, target).generate(torch.ones(1, 32), 2, Decoding(7))
    with refused:
        list(continue_prompts(longrope, [target], Decoding(7)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_new_tensors_plays_no_part(tiny, dtype):
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope = Patchscope(tiny, tiny.prompt(TARGET))

    def told():
        scores, choices = scope.score(states, layers, " one two"), scope.choose(states, layers, [" one", " two"])
        return *scores.patched[:1], choices.patched.scores, scope.relevance(states, layers, [[3, 4]] * len(states))

    expected = told()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, told(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_of_other_lengths_are_none_of_a_rows_own(tiny):
    """Whatever the model makes of the token by which a row could be filled up."""
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope, said = Patchscope(tiny, tiny.prompt(TARGET)), [[5, 6, 7], [5], *[[3, 4]] * 3]
    expected = scope.relevance(states, layers, said)
    with without_a_number(tiny, 0):
        torch.testing.assert_close(scope.relevance(states, layers, said), expected, equal_nan=True)
