import copy
import re

import pytest
import torch
from conftest import rows_for_every_layer
from reference import hidden_states, patched_continuation
from test_patchscope import PATHS, TARGET

from pscope import Decoding, LanguageModel, Patchscope, PscopeError, RowError, capture, load
from pscope.engine import generate
from pscope.engine.generate import CachedRows
from pscope.engine.queue import Queue


def ending(model, end_tokens):
    """The same model, with other tokens that end a text."""
    again = LanguageModel(model.hf, model.tokenizer, model.name)
    again.__dict__["end_tokens"] = frozenset(end_tokens)
    return again


@pytest.mark.parametrize("path", PATHS)
def test_rows_end_at_different_steps(tiny, path):
    states, layers = rows_for_every_layer(tiny)
    target = tiny.prompt(TARGET, 7)
    endless = Patchscope(tiny, target).generate(states, layers, Decoding(8))
    # Tokens that some rows say early and others late or never.
    end_tokens = {endless.patched[0][2], endless.patched[3][5]}
    spoken = Patchscope(ending(tiny, end_tokens), target, path=path).generate(states, layers, Decoding(8))
    lengths = set()
    for state, layer, got in zip(states, layers, spoken.patched, strict=True):
        expected = patched_continuation(tiny.hf, tiny.layers, target.ids, target.position, layer, state, 8, end_tokens)
        assert got == expected
        lengths.add(len(got))
    assert len(lengths) > 2


def test_ended_rows_leave_the_batch():
    class Scripted:
        """Rows that say what is written for them, and remember how many of them were asked to go on."""

        script = torch.tensor([[5, 5, 5, 5], [5, 9, 0, 0], [9, 0, 0, 0], [5, 5, 9, 0]])

        def __init__(self):
            self.step_number, self.rows, self.sizes = 0, torch.arange(4), []
            self._speak()

        def _speak(self):
            self.logits = torch.nn.functional.one_hot(self.script[self.rows, self.step_number], 10).float()

        def step(self, tokens):
            assert tokens.equal(self.script[self.rows, self.step_number])
            self.sizes.append(len(tokens))
            self.step_number += 1
            self._speak()

        def keep(self, kept):
            self.rows = self.rows[kept]

    rows, decoding = Scripted(), Decoding(4)
    ends = decoding.ends(frozenset({9}), tokenizer=None)
    queue = Queue(decoding, decoding.draws(4), ends)
    queue.take(rows, range(4), length=7)
    assert queue.finish() == {0: [5, 5, 5, 5], 1: [5, 9], 2: [9], 3: [5, 5, 9]}
    assert rows.sizes == [3, 2, 1]


def test_few_rows_wait_for_those_of_the_next_pass(tiny, monkeypatch):
    states, layers = rows_for_every_layer(tiny, per_layer=12)
    target, decoding = tiny.prompt(TARGET, 7), Decoding(12)
    endless = Patchscope(tiny, target).generate(states, layers, decoding)
    # So that of twenty rows some go on for long.
    end_tokens = {row[step] for row, step in zip(endless.patched, [0, 1, 2, 3, 4, 6, 8] * 4, strict=False)}
    expected = [
        row[: next((n for n, token in enumerate(row, 1) if token in end_tokens), 12)] for row in endless.patched
    ]
    model = ending(tiny, end_tokens)
    widths, step = [], CachedRows.step

    def spy(rows, tokens):
        widths.append(len(tokens))
        step(rows, tokens)

    monkeypatch.setattr(CachedRows, "step", spy)
    passes = {}
    for path in ("staircase", "plain"):
        scope = Patchscope(model, target, path=path)
        scope.memory = 20 * scope._now()[0].row_bytes(12)
        most = scope.rows_speaking(decoding)
        assert scope.generate(states, layers, decoding).patched == expected
        assert max(widths) <= most
        passes[path] = len(widths)
        widths.clear()
    assert passes["staircase"] < 0.8 * passes["plain"]


class Endless:
    """Rows that say 0 for ever."""

    def __init__(self, count):
        self.logits, self.steps = torch.eye(2)[torch.zeros(count, dtype=torch.long)], []

    def step(self, tokens):
        self.steps.append(len(tokens))
        self.logits = torch.eye(2)[tokens]

    def keep(self, kept):
        self.logits = self.logits[kept]

    def forget(self):
        pass


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setattr(CachedRows, "joined", lambda parts: Endless(sum(len(part.logits) for part in parts)))
    return Endless


def test_rows_wait_for_those_that_have_said_as_much(endless):
    lengths = torch.tensor([1, 1, 1, 1, 1, 1, 3, 9] * 3)
    queue = Queue(Decoding(9), torch.zeros(24, 9), lambda rows, said: lengths[rows] <= said.shape[1])
    first, second, third = endless(8), endless(8), endless(8)
    queue.take(first, range(8), 5, room=8, following=5)
    assert (queue.waiting, first.steps) == (2, [])
    queue.take(second, range(8, 16), 5, room=8, following=5)
    assert (queue.waiting, second.steps) == (4, [])
    # Nobody follows: there is nothing to wait for.
    queue.take(third, range(16, 24), 5)
    assert (queue.waiting, third.steps) == (0, [])
    assert {number: len(said) for number, said in queue.finish().items()} == dict(enumerate(lengths.tolist()))


def test_rows_of_shorter_prompts_wait_for_those_that_follow(endless):
    queue = Queue(Decoding(5), torch.zeros(16, 5), lambda rows, said: torch.zeros(len(rows), dtype=torch.bool))
    three, five, ten = endless(5), endless(6), endless(5)
    queue.take(three, range(5), 3, room=16, following=5)
    # A token each, and two more till they are as long as the next ones.
    assert (queue.waiting, three.steps) == (5, [5, 5])
    queue.take(five, range(5, 11), 5, room=16, following=10)
    # Eleven go on together, until those that began first have said five tokens.
    assert (queue.waiting, five.steps) == (0, [])
    queue.take(ten, range(11, 16), 10, room=16)
    assert queue.finish() == {number: [0] * 5 for number in range(16)}
    assert ten.steps == [5, 5, 5, 5]


def test_no_more_wait_than_half_of_the_room(endless):
    lengths = torch.tensor([3] * 8 + [9] * 4 + [2] * 8 + [9] * 4 + [1] * 6 + [9] * 2)
    queue = Queue(Decoding(9), torch.zeros(32, 9), lambda rows, said: lengths[rows] <= said.shape[1])
    waiting = []
    for first, count in ((0, 12), (12, 12), (24, 8)):
        queue.take(endless(count), range(first, first + count), 5, room=16, following=5)
        waiting.append(queue.waiting)
    # The third two find no place, and take along all that they come by.
    assert waiting == [4, 8, 0]
    assert {number: len(said) for number, said in queue.finish().items()} == dict(enumerate(lengths.tolist()))


def test_a_checkpoint_that_wants_to_sample_is_still_greedy(tiny, monkeypatch):
    states, layers = rows_for_every_layer(tiny)
    scope = Patchscope(tiny, tiny.prompt(TARGET))
    before = scope.generate(states, layers)
    monkeypatch.setattr(tiny.hf.generation_config, "do_sample", True)
    monkeypatch.setattr(tiny.hf.generation_config, "temperature", 5.0)
    assert scope.generate(states, layers) == before


def test_samples_depend_on_the_seed_and_not_on_the_batch(tiny):
    states, layers = rows_for_every_layer(tiny)
    target = tiny.prompt(TARGET, 7)
    roomy, tight = Patchscope(tiny, target), Patchscope(tiny, target, memory=1)
    sampled = roomy.generate(states, layers, Decoding(6, temperature=1.0, seed=1))
    assert tight.generate(states, layers, Decoding(6, temperature=1.0, seed=1)) == sampled
    assert roomy.generate(states, layers, Decoding(6, temperature=1.0, seed=2)) != sampled
    assert roomy.generate(states, layers, Decoding(6)) != sampled


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    decoding = Decoding(1, temperature=0.7)
    draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    chosen = decoding.choose(logits.expand(len(draws), -1), draws)
    share = torch.bincount(chosen, minlength=4) / len(draws)
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(0), atol=2e-4, rtol=0)
    # The smallest and the largest draw still fall on a token, and a token of no probability is never drawn.
    none = float("-inf")
    assert decoding.choose(torch.tensor([[none, 0.0, 0.0]]), torch.zeros(1, dtype=torch.float64)).item() == 1
    edge = decoding.choose(torch.tensor([[0.0, 0.0, none]]), torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert edge.item() == 1


def test_bad_settings():
    with pytest.raises(PscopeError, match="new_tokens is 0"):
        Decoding(0)
    for temperature in (-1, float("nan"), float("inf")):
        with pytest.raises(PscopeError, match=f"temperature is {temperature}"):
            Decoding(temperature=temperature)
    with pytest.raises(PscopeError, match="stop is ','"):
        Decoding(stop=",")
    with pytest.raises(PscopeError, match="none of them empty"):
        Decoding(stop=("a", ""))


def test_a_row_ends_with_the_token_that_completes_a_stop_string(tiny):
    states, layers = rows_for_every_layer(tiny)
    target = tiny.prompt(TARGET, 7)
    endless = Patchscope(tiny, target).generate(states, layers, Decoding(8))
    decode = tiny.tokenizer.decode
    # Two tokens of one row, of which the string takes half each; and a token of another row.
    first, second = (decode([token]) for token in endless.patched[0][2:4])
    stop = (first[-1:] + second[:1], decode([endless.patched[3][5]]))
    assert stop[0] in decode(endless.patched[0])
    spoken = Patchscope(tiny, target).generate(states, layers, Decoding(8, stop=stop))
    for whole, cut in zip(endless.patched, spoken.patched, strict=True):
        ends = [end for end in range(1, 9) if any(string in decode(whole[:end]) for string in stop)]
        assert cut == whole[: ends[0] if ends else 8]
    assert len({len(cut) for cut in spoken.patched}) > 2


def test_the_text_is_cut_before_the_stop_string(tokenizer):
    tokens = tokenizer(": German physicist (in Ulm), and more.<|im_end|>").input_ids
    assert Decoding().text(tokens, tokenizer) == ": German physicist (in Ulm), and more."
    assert Decoding(stop=("),",)).text(tokens, tokenizer) == ": German physicist (in Ulm"
    assert Decoding(stop=("more", ",", "none")).text(tokens, tokenizer) == ": German physicist (in Ulm)"
    assert Decoding(stop=(":",)).text(tokens, tokenizer) == ""


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_is_named_and_not_read(tiny, path, monkeypatch):
    # As a state that a model makes no number of, though it is one.
    monkeypatch.setattr("pscope.engine.patchscope.check_numbers", lambda vectors: None)
    states, layers = rows_for_every_layer(tiny)
    states[3, 5] = float("nan")
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7), path=path)
    layers = layers[::-1]
    with pytest.raises(RowError, match="row 3 failed: its logits are not finite in float32") as failed:
        scope.generate(states, layers)
    assert failed.value.row == 3
    with pytest.raises(RowError, match="row 3 failed"):
        list(scope.logits(states, layers))
    tight = Patchscope(tiny, tiny.prompt(TARGET, 7), path=path, memory=1)
    with pytest.raises(RowError, match="row 3 failed"):
        tight.generate(states, layers)


@pytest.mark.parametrize("memory", [1, 2**30])
def test_rows_that_are_settled_leave_the_batch(tiny, memory):
    states, layers = rows_for_every_layer(tiny)
    scope = Patchscope(tiny, tiny.prompt(TARGET, 7), memory=memory)
    whole = scope.generate(states, layers, Decoding(6))
    asked = []

    def settled(row, text):
        asked.append(row)
        assert tiny.tokenizer.decode(whole.patched[row]).startswith(text)
        return row % 2 == 0 and len(text) > 5

    spoken = scope.generate(states, layers, Decoding(6), settled)
    assert set(asked) == set(range(len(states)))
    for row, (cut, full) in enumerate(zip(spoken.patched, whole.patched, strict=True)):
        ends = [end for end in range(1, 7) if len(tiny.tokenizer.decode(full[:end])) > 5]
        assert cut == full[: ends[0] if row % 2 == 0 and ends else 6]
    assert spoken.clean == whole.clean


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_the_pad_token_plays_no_part(tiny, pad):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = pad
    hf = copy.deepcopy(tiny.hf)
    hf.config.pad_token_id = hf.generation_config.pad_token_id = tokenizer.pad_token_id
    model = load(hf, tokenizer)
    sources = [model.prompt("one two<|im_end|>three four"), model.prompt("<|im_end|>five")]
    states = capture(model, sources)
    for read, source in zip(states, sources, strict=True):
        expected = hidden_states(tiny.hf, tiny.layers, source.ids)[:, -1]
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    target = model.prompt("a<|im_end|>b<|im_end|>x c", "x")
    layers = range(model.n_layers + 1)
    spoken = Patchscope(model, target).generate(states[0], layers, Decoding(6))
    for layer, got in zip(layers, spoken.patched, strict=True):
        assert got == patched_continuation(
            tiny.hf, tiny.layers, target.ids, target.position, layer, states[0, layer], 6, model.end_tokens
        )


@pytest.mark.parametrize("temperature", [1e-3, 1e-320])
def test_the_lowest_temperatures_choose_as_greedy_does(temperature):
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).float()
    draws = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert Decoding(1, temperature=temperature).choose(logits, draws).equal(logits.argmax(dim=-1))


def test_stop_strings_are_looked_up_once(tiny, monkeypatch):
    made = []
    criteria = generate.StopStringCriteria

    def counted(*args):
        made.append(args)
        return criteria(*args)

    monkeypatch.setattr(generate, "StopStringCriteria", counted)
    states = torch.zeros(12, tiny.hidden_size)
    scope = Patchscope(tiny, tiny.prompt("one two three"), memory=1)
    decoding = Decoding(3, stop=("zyx", "!?"))
    assert len(scope.generate(states, 1, decoding).patched) == 12
    scope.generate(states, 2, decoding)
    assert len(made) == 1


def test_what_settles_a_row_may_say_so_by_any_truth(tiny):
    scope = Patchscope(tiny, tiny.prompt("one x two", "x"))
    spoken = scope.generate(torch.ones(2, 32), 1, Decoding(5), lambda row, text: re.search("^", text) if row else 0)
    assert list(map(len, spoken.patched)) == [5, 1]
