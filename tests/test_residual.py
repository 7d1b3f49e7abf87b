from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_model, without_a_number
from reference import hidden_states, patched_logits
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM

import pscope
from pscope import ModelError, Patchscope, PscopeError, capture, editing, overwriting, recording
from pscope.models.residual import as_pairs, length_batches, others_intervene

TEXTS = ["Amazon's former CEO", "A short one", "The quick brown fox jumps over the lazy dog and runs away"]


@pytest.fixture(scope="module")
def gpt_neo(tokenizer):
    """Its decoder layers return tuples, its positions are learned."""
    return random_model(
        GPTNeoForCausalLM,
        GPTNeoConfig,
        tokenizer,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
    )


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("name", ["smollm2", "tiny", "gpt_neo"])
def test_capture_is_what_the_layers_hold(name, request):
    model = request.getfixturevalue(name)
    prompts = [model.prompt(text) for text in TEXTS]
    states = capture(model, prompts)
    assert states.shape == (3, model.n_layers + 1, model.hidden_size)
    for prompt, state in zip(prompts, states, strict=True):
        expected = hidden_states(model.hf, model.layers, prompt.ids)[:, -1]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_layers_are_numbered_as_in_hidden_states(smollm2):
    prompt = smollm2.prompt(TEXTS[0])
    states = capture(smollm2, [prompt])[0]
    with torch.no_grad():
        theirs = smollm2.hf(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        assert len(theirs) == smollm2.n_layers + 1
        for layer in range(smollm2.n_layers):
            torch.testing.assert_close(states[layer], theirs[layer][0, -1], rtol=1e-4, atol=1e-3)
        # Theirs is normalised at the top; the residual stream is what the norm reads.
        torch.testing.assert_close(smollm2.hf.model.norm(states[-1]), theirs[-1][0, -1], rtol=1e-4, atol=1e-3)


def test_batched_equals_alone_in_the_order_asked(tiny):
    # From long to short to middling, so that the order of the batch is not the order asked, nor its inverse.
    prompts = [tiny.prompt(TEXTS[index]) for index in (2, 1, 0)]
    positions = [[3, 0], [1], [0, 2]]
    together = capture(tiny, prompts, positions, layers=[0, 3, 4])
    assert together.shape == (5, 3, tiny.hidden_size)
    alone = [
        hidden_states(tiny.hf, tiny.layers, prompt.ids)[[0, 3, 4], position]
        for prompt, read in zip(prompts, positions, strict=True)
        for position in read
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    apart = capture(tiny, prompts, positions, layers=[0, 3, 4], batch_tokens=1)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


def test_positions_count_from_the_end_as_a_prompts_do(tiny):
    prompts = [tiny.prompt(text) for text in TEXTS[:2]]
    counted = capture(tiny, prompts, [[-1, -2], [-len(prompts[1])]], layers=[0, 3])
    torch.testing.assert_close(counted, capture(tiny, prompts, [[3, 2], [0]], layers=[0, 3]), rtol=0, atol=0)
    for outside in (len(prompts[0]), -len(prompts[0]) - 1):
        with pytest.raises(PscopeError, match="do not lie within a prompt of 4 tokens"):
            capture(tiny, prompts[:1], [[outside]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "A short one"}, r"a list of prompts is needed, and 'A short one' is none of them"),
        (
            {"prompts": ["A short one"]},
            "a list of prompts is needed, and 'A short one' is none of them; make them with model.prompt",
        ),
        ({"prompts": ["PROMPT"], "positions": [-1]}, r"positions are a list for each of the 1 prompts, as \[\[-1\]\]"),
        ({"prompts": ["PROMPT"], "positions": [[0], [1]]}, "positions are a list for each of the 1 prompts"),
        ({"prompts": ["PROMPT"], "layers": "0-3"}, "layers are given as a list of numbers"),
        ({"prompts": ["PROMPT"], "layers": 3}, "layers are given as a list of numbers"),
    ],
)
def test_what_is_no_list_is_told(tiny, arguments, message):
    prompt = tiny.prompt(TEXTS[1])
    prompts = arguments.pop("prompts")
    prompts = [prompt] if prompts == ["PROMPT"] else prompts
    with pytest.raises(PscopeError, match=message):
        capture(tiny, prompts, **arguments)


def test_length_batches_waste_little():
    lengths = [5, 100, 6, 99, 5]
    batches = list(length_batches(lengths, batch_tokens=20))
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert [sorted(lengths[i] for i in batch) for batch in batches] == [[5, 5, 6], [99], [100]]
    # What is worth a pass by itself is not padded much; what is not, is.
    lengths = [10, 20, 100, 104, 108, 160, 200]
    batches = [[lengths[i] for i in batch] for batch in length_batches(lengths, 1024, most_padding=1 / 16)]
    assert batches == [[10, 20, 100], [104, 108], [160], [200]]


@pytest.mark.parametrize("name", ["tiny", "gpt_neo"])
def test_own_state_in_its_own_place_changes_nothing(name, request):
    model = request.getfixturevalue(name)
    ids = torch.tensor([model.prompt(TEXTS[2]).ids])
    clean = model.next_token_logits(ids)
    states = hidden_states(model.hf, model.layers, ids[0].tolist())
    for layer in range(model.n_layers + 1):
        with overwriting(model, layer, 4, states[layer, 4]):
            torch.testing.assert_close(model.next_token_logits(ids), clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "gpt_neo"])
@pytest.mark.parametrize("position", [0, 4, -1])
def test_overwriting_equals_the_one_row_loop(name, position, request):
    model = request.getfixturevalue(name)
    prompt = model.prompt(TEXTS[2])
    torch.manual_seed(1)
    vectors = torch.randn(2, model.hidden_size, dtype=torch.float64)
    for layer in range(model.n_layers + 1):
        with overwriting(model, layer, position, vectors):
            logits = model.next_token_logits(torch.tensor([prompt.ids, prompt.ids]))
        for row in range(2):
            expected = patched_logits(model.hf, model.layers, prompt.ids, position, layer, vectors[row].float())[-1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_what_else_a_layer_returns_is_left_alone(gpt_neo):
    ids = torch.tensor([gpt_neo.prompt(TEXTS[0]).ids])
    returned = []
    with editing(gpt_neo, {1: lambda stream: stream + 1}):
        watch = gpt_neo.layers[0].register_forward_hook(lambda _, args, output: returned.append(output))
        gpt_neo.next_token_logits(ids)
    gpt_neo.next_token_logits(ids)
    watch.remove()
    edited, plain = returned
    assert type(edited) is type(plain) is tuple
    assert len(edited) == len(plain) == 2
    torch.testing.assert_close(edited[0], plain[0] + 1)


def test_blocks_nest_and_the_inner_one_sees_what_the_outer_wrote(tiny):
    ids = torch.tensor([tiny.prompt(TEXTS[0]).ids])
    vector = torch.ones(tiny.hidden_size)
    with overwriting(tiny, 2, 1, vector), recording(tiny, [2]) as outer:
        with overwriting(tiny, 2, 1, 2 * vector), recording(tiny, [2]) as inner:
            tiny.next_token_logits(ids)
        assert inner[2][0, 1].eq(2).all()
        assert outer[2][0, 1].eq(1).all()
        tiny.next_token_logits(ids)
        assert inner[2][0, 1].eq(2).all()
    assert hooks(tiny) == 0


def test_after_an_exception_the_model_is_as_before(tiny):
    ids = torch.tensor([tiny.prompt(TEXTS[0]).ids])
    clean = tiny.next_token_logits(ids)
    weights = {name: weight.clone() for name, weight in tiny.hf.state_dict().items()}
    seen = []
    theirs = tiny.layers[1].register_forward_hook(lambda *_: seen.append(1))

    def fail(stream):
        raise RuntimeError("in the middle of a pass")

    with pytest.raises(RuntimeError, match="middle"), editing(tiny, {0: lambda stream: stream * 2, 2: fail}):
        tiny.next_token_logits(ids)
    assert hooks(tiny) == 1
    assert tiny.next_token_logits(ids).equal(clean)
    assert len(seen) == 2
    theirs.remove()
    assert all(weight.equal(weights[name]) for name, weight in tiny.hf.state_dict().items())


def test_a_bad_layer_registers_nothing(tiny):
    edits = {0: lambda stream: stream, 5: lambda stream: stream}
    with pytest.raises(PscopeError, match="layer 5 is out of range: .* has layers 0 to 4"), editing(tiny, edits):
        pass
    assert hooks(tiny) == 0


def test_a_stream_of_another_shape_is_refused(tiny):
    # Some models carry several streams; reading one of them as if it were the only one would give wrong numbers.
    doubled = tiny.layers[1].register_forward_hook(lambda _, args, output: torch.stack([output, output]))
    with pytest.raises(ModelError, match=r"holds \(2, 1, 4, 32\) where .* \(batch, tokens, 32\) was expected"):
        capture(tiny, [tiny.prompt(TEXTS[0])], layers=[2])
    doubled.remove()


def test_capture_refuses_positions_outside_the_prompt(tiny):
    prompt = tiny.prompt("a b")
    with pytest.raises(PscopeError, match="prompt of 2 tokens"):
        capture(tiny, [prompt], [[2]])
    with pytest.raises(PscopeError, match="no prompt"):
        capture(tiny, [])


def test_positions_are_true_in_every_pass(tiny):
    prompt = tiny.prompt(TEXTS[2])
    seen = []

    def look(stream, positions):
        assert stream.shape[1] == len(positions)
        seen.append(positions)

    def aside(stream, number=3):
        assert number == 3

    with editing(tiny, {0: look, 2: look, 3: aside}), torch.no_grad():
        cache = tiny.own_cache()
        tiny.next_token_logits(torch.tensor([prompt.ids[:2]]), cache)
        tiny.next_token_logits(torch.tensor([prompt.ids[2:]]), cache)
        tiny.hf.generate(torch.tensor([prompt.ids]), max_new_tokens=2, do_sample=False)
    whole = range(len(prompt))
    step = range(len(prompt), len(prompt) + 1)
    assert seen[::2] == seen[1::2] == [whole[:2], whole[2:], whole, step]


def test_overwriting_holds_where_the_model_goes_on_from_its_cache(tiny):
    prompt = tiny.prompt(TEXTS[2])
    vector = torch.randn(tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    with overwriting(tiny, 1, 4, vector):
        cache = tiny.own_cache()
        for part in (prompt.ids[:3], prompt.ids[3:6], prompt.ids[6:]):
            got = tiny.next_token_logits(torch.tensor([part]), cache)[0]
    expected = patched_logits(tiny.hf, tiny.layers, prompt.ids, 4, 1, vector)[-1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(PscopeError, match="vectors for 2 rows do not fit a pass of 1; give one for all"),
        overwriting(tiny, 1, 4, torch.zeros(2, tiny.hidden_size)),
    ):
        tiny.next_token_logits(torch.tensor([prompt.ids]))


def test_whose_hooks_may_need_whole_prompts(tiny):
    assert not others_intervene(tiny)
    with overwriting(tiny, 1, 2, torch.zeros(tiny.hidden_size)), recording(tiny, [2, 3]):
        assert not others_intervene(tiny)
    with editing(tiny, {2: lambda stream: None}):
        assert others_intervene(tiny)
    with torch.no_grad():
        # Leaves hooks of transformers behind, which only look.
        tiny.hf(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert not others_intervene(tiny)
    for hook in (lambda *_: None, partial(print, end="")):
        handle = tiny.layers[1].mlp.register_forward_hook(hook)
        assert others_intervene(tiny)
        handle.remove()
    assert not others_intervene(tiny)


def test_threads_take_turns(tiny):
    """Each thread's passes are those of the thread alone, whatever hooks the others have on at the time."""
    prompts = [tiny.prompt(text) for text in TEXTS]
    scopes = [Patchscope(tiny, prompt) for prompt in prompts]
    states = torch.randn(3, tiny.hidden_size, generator=torch.Generator().manual_seed(0))

    def work(number):
        prompt, scope = prompts[number % 3], scopes[number % 3]
        if number % 2:
            return capture(tiny, [prompt])
        (part,) = scope.logits(states, [0, 2, 4])
        return part.patched

    alone = [work(number) for number in range(6)]
    # The same model, by another name.
    again = pscope.load(tiny.hf, tiny.tokenizer)
    assert again.lock is tiny.lock
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(work, [number % 6 for number in range(60)]))
    for number, got in enumerate(together):
        torch.testing.assert_close(got, alone[number % 6], rtol=1e-4, atol=1e-4)


class Twice(torch.nn.Module):
    def forward(self, stream):
        return 2 * stream


@pytest.mark.parametrize(
    "edit",
    [
        Twice(),
        lambda stream, **options: 2 * stream,
        lambda stream, *others: 2 * stream,
        lambda stream, factor=2: factor * stream,
        partial(torch.mul, other=2),
    ],
    ids=["module", "options", "others", "default", "builtin"],
)
def test_whatever_takes_a_stream_is_an_edit(tiny, edit):
    ids = torch.tensor([[5, 6, 7]])
    with editing(tiny, {1: lambda stream: 2 * stream}):
        expected = tiny.next_token_logits(ids)
    with editing(tiny, {1: edit}):
        assert tiny.next_token_logits(ids).equal(expected)
        assert others_intervene(tiny)


def test_positions_are_true_in_calls_of_a_part_and_after_a_pass_that_failed(tiny):
    ids, seen = torch.tensor([[5, 6, 7]]), []

    def look(stream, positions):
        seen.append(positions)
        if len(seen) == 2:
            raise RuntimeError("stop")

    with editing(tiny, {1: look}), torch.no_grad():
        cache = tiny.own_cache()
        tiny.next_token_logits(ids, cache)
        with pytest.raises(RuntimeError, match="stop"):
            tiny.next_token_logits(ids, cache)
        tiny.hf.model(input_ids=ids)
        tiny.next_token_logits(ids)
    assert seen == [range(3), range(3, 6), range(3), range(3)]


def test_vectors_are_real(tiny):
    with pytest.raises(PscopeError, match=r"vectors of torch.complex64 are no hidden states"):
        overwriting(tiny, 1, 0, torch.zeros(tiny.hidden_size, dtype=torch.complex64))


def test_an_edit_that_asks_where_tokens_stand_needs_a_cache_that_counts_them(tiny):
    class Uncounted(DynamicCache):
        def get_seq_length(self, layer_idx=0):
            raise ValueError("no layer counts")

    cache = {tiny._cache_parameter: Uncounted()}
    with (
        pytest.raises(ModelError, match="the cache of LlamaForCausalLM does not count its tokens"),
        editing(tiny, {1: lambda stream, positions: None}),
    ):
        tiny.hf(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True, **cache)
    assert not others_intervene(tiny)


def test_what_fills_up_a_batch_is_none_of_a_prompts_own(tiny):
    prompts = [tiny.prompt(text) for text in TEXTS]
    expected = capture(tiny, prompts)
    with without_a_number(tiny, 0):
        torch.testing.assert_close(capture(tiny, prompts), expected)


def test_pairs_of_layers_as_arrays(tiny):
    for pairs in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), [np.array([1, 2]), (3, 4)]):
        assert as_pairs(tiny, tiny, pairs) == [(1, 2), (3, 4)]
