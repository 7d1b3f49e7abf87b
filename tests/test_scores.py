import math
import weakref

import pytest
import torch
from conftest import rows_for_every_layer
from reference import patched_logits

from pscope import Patchscope, PromptError, PscopeError, RowError, capture, editing
from pscope.models.internals.caches import GrowingLayer

TARGET = "The capital city of x is"
PATHS = ["staircase", "plain", "uncached"]
CONTINUATION = " Tokyo, in Japan"


def following(model, target, text):
    """The tokens of a text after the target, by the tokenizer alone."""
    ids = model.tokenizer(target.text + text)["input_ids"]
    assert ids[: len(target)] == list(target.ids)
    return ids[len(target) :]


def forced(model, target, layer, state, tokens):
    """Log-probabilities and ranks of tokens, one hooked pass over the whole of target and tokens: the reference."""
    logits = patched_logits(model.hf, model.layers, [*target.ids, *tokens], target.position, layer, state)
    logits = logits[len(target) - 1 : -1].double()
    own = logits.gather(1, torch.tensor(tokens)[:, None])
    return (own - logits.logsumexp(1, keepdim=True)).squeeze(1), (logits >= own).sum(1)


def own_state(model, target):
    return capture(model, [target], layers=[0])[0, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("at", ["x", "is", 0])
def test_a_continuation_is_scored_as_by_the_one_row_loop(tiny, path, at):
    target = tiny.prompt(TARGET, at)
    states, layers = rows_for_every_layer(tiny)
    scores = Patchscope(tiny, target, path=path).score(states, layers, CONTINUATION, ranks=True)
    tokens = following(tiny, target, CONTINUATION)
    assert len(tokens) == 4
    for row, (state, layer) in enumerate(zip(states, layers, strict=True)):
        expected, ranks = forced(tiny, target, layer, state, tokens)
        torch.testing.assert_close(scores.patched.log_probabilities[row].double(), expected, rtol=0, atol=1e-4)
        # Of so many tokens some are as probable, but for rounding.
        assert (scores.patched.ranks[row] - ranks).abs().max() <= 2
    clean, ranks = forced(tiny, target, 0, own_state(tiny, target), tokens)
    for row in range(len(states)):
        torch.testing.assert_close(scores.clean.log_probabilities[row].double(), clean, rtol=0, atol=1e-4)
        assert (scores.clean.ranks[row] - ranks).abs().max() <= 2
    assert Patchscope(tiny, target, path=path).score(states, layers, CONTINUATION).patched.ranks is None


@pytest.mark.parametrize("path", PATHS)
def test_the_logits_of_one_pass_are_gone_before_the_next(tiny, path, monkeypatch):
    states, layers = rows_for_every_layer(tiny)
    scope = Patchscope(tiny, tiny.prompt(TARGET), path=path)
    passes = scope._now()[0]
    scope.memory = 4 * passes.row_bytes(0)
    made, read = [], type(passes).read

    def watched(self, writes, last=1):
        assert all(logits() is None for logits in made)
        logits = read(self, writes, last)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(type(passes), "read", watched)
    scope.score(states, layers, " Tokyo", ranks=True)
    scope.choose(states, layers, [" Tokyo", " Paris"])
    assert len(made) == 2 * -(-len(states) // 4)


def test_the_default_model_is_scored_at_every_layer(smollm2):
    target = smollm2.prompt("The official currency of x is", "x")
    states = capture(smollm2, [smollm2.prompt("Last year they went to Japan", "Japan")])[0]
    scores = Patchscope(smollm2, target).score(states, range(31), " the yen", ranks=True)
    tokens = following(smollm2, target, " the yen")
    assert len(tokens) >= 2
    for layer, state in enumerate(states):
        expected, ranks = forced(smollm2, target, layer, state, tokens)
        torch.testing.assert_close(scores.patched.log_probabilities[layer].double(), expected, rtol=0, atol=1e-3)
        assert (scores.patched.ranks[layer] - ranks).abs().max() <= 1


@pytest.mark.parametrize("memory", [2**30, 1])
def test_each_row_may_have_a_continuation_of_its_own(tiny, memory):
    target = tiny.prompt(TARGET, "x")
    states, layers = rows_for_every_layer(tiny)
    texts = [(CONTINUATION, " Paris", " Berlin of old")[row % 3] for row in range(len(states))]
    scores = Patchscope(tiny, target, memory=memory).score(states, layers, texts, ranks=True)
    assert scores.patched.log_probabilities.shape == (len(states), 4)
    for row, text in enumerate(texts):
        tokens = following(tiny, target, text)
        expected, _ = forced(tiny, target, layers[row], states[row], tokens)
        clean, _ = forced(tiny, target, 0, own_state(tiny, target), tokens)
        for got, right in ((scores.patched, expected), (scores.clean, clean)):
            own = got.log_probabilities[row]
            torch.testing.assert_close(own[: len(tokens)].double(), right, rtol=0, atol=1e-4)
            assert own[len(tokens) :].isnan().all()
            assert (got.ranks[row][len(tokens) :] == 0).all()


def test_rows_of_one_continuation_share_passes(tiny, monkeypatch):
    states, layers = rows_for_every_layer(tiny)
    scope = Patchscope(tiny, tiny.prompt(TARGET, "x"))
    scope.score(states, layers, [" Tokyo", " Paris"] * 5)
    passes = []
    forward = type(tiny).logits

    def counted(self, ids, cache=None, last=1):
        passes.append(len(ids))
        return forward(self, ids, cache, last)

    monkeypatch.setattr(type(tiny), "logits", counted)
    scope.score(states, layers, [" Tokyo", " Paris"] * 5)
    # For each the prefix, and the rows.
    assert passes == [1, 6, 1, 6]


def test_scores_go_by_edits_of_others(tiny):
    """What others write into the stream while a row is scored is in its score, whichever path was taken before."""
    target = tiny.prompt(TARGET, "x")
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope = Patchscope(tiny, target)
    before = scope.score(states, layers, " Tokyo, in").patched.log_probabilities
    with editing(tiny, {2: lambda stream: stream * 2}):
        during = scope.score(states, layers, " Tokyo, in").patched.log_probabilities
        tokens = following(tiny, target, " Tokyo, in")
        hooked = torch.stack([_forced_in_place(tiny, target, *row, tokens) for row in zip(layers, states, strict=True)])
    torch.testing.assert_close(during.double(), hooked, rtol=0, atol=1e-4)
    assert (during - before).abs().max() > 0.1
    torch.testing.assert_close(scope.score(states, layers, " Tokyo, in").patched.log_probabilities, before)


def _forced_in_place(model, target, layer, state, tokens):
    # Ours are nested within the other's block, so that a state written at its layer comes after its edit.
    return forced(model, target, layer, state, tokens)[0]


CANDIDATES = (" Tokyo", " Tokyo Bay", " Paris", " Berlin", " North Korea", " North Sea coast", " South Korea")


def whole(model, target, layer, state, candidate):
    return forced(model, target, layer, state, following(model, target, candidate))[0].sum()


def test_whole_candidates_are_held_against_each_other(tiny):
    target = tiny.prompt(TARGET, "x")
    states, layers = rows_for_every_layer(tiny)
    distinct = [text for text in CANDIDATES if text != " Tokyo"]
    choices = Patchscope(tiny, target).choose(states, layers, distinct, by="whole")
    means = Patchscope(tiny, target).choose(states, layers, distinct, by="mean")
    lengths = torch.tensor([len(following(tiny, target, text)) for text in distinct])
    assert len(lengths.unique()) > 1
    rows = [*zip(layers, states, strict=True), (0, own_state(tiny, target))]
    for row, (layer, state) in enumerate(rows):
        expected = torch.stack([whole(tiny, target, layer, state, text) for text in distinct])
        got, mean, place = (
            (choices.patched, means.patched, row) if row < len(states) else (choices.clean, means.clean, 0)
        )
        torch.testing.assert_close(got.scores[place].double(), expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(mean.scores[place].double(), expected / lengths, rtol=0, atol=1e-3)
        assert got.chosen[place] == expected.argmax()
        assert mean.chosen[place] == (expected / lengths).argmax()


@pytest.mark.parametrize(
    ("candidates", "needed"),
    [
        ((" Tokyo", " Tokyo Bay", " Paris", " Berlin"), [1, 2, 1, 1]),
        ((" North Korea", " North Sea coast", " South Korea", " South Sea"), [2, 2, 2, 2]),
    ],
)
def test_the_start_of_candidates_tells_them_apart(tiny, candidates, needed):
    """By the fewest tokens that do: those are events of which one at most happens, and the most probable is chosen."""
    target = tiny.prompt(TARGET, "x")
    states, layers = rows_for_every_layer(tiny, per_layer=10)
    choices = Patchscope(tiny, target).choose(states, layers, candidates)
    tokens = [following(tiny, target, text) for text in candidates]
    assert tokens[1][0] == tokens[0][0]
    told_apart = set()
    for row, (layer, state) in enumerate([*zip(layers, states, strict=True), (0, own_state(tiny, target))]):
        each = [forced(tiny, target, layer, state, own[:n])[0] for own, n in zip(tokens, needed, strict=True)]
        first, exact = [own[0] for own in each], [own.sum() for own in each]
        if tokens[1][:1] == tokens[0]:
            # That Tokyo is said, and not that Tokyo Bay is.
            exact[0] = torch.log(exact[0].exp() - exact[1].exp())
        choice, place = (choices.patched, row) if row < len(states) else (choices.clean, 0)
        chosen = torch.stack(exact).argmax().item()
        assert choice.chosen[place] == chosen
        torch.testing.assert_close(choice.first[place].double(), torch.stack(first), rtol=0, atol=1e-4)
        for number, score in enumerate(choice.scores[place].tolist()):
            # Those behind may have the score of what they share with others.
            near = [math.isclose(score, value[number].item(), abs_tol=1e-3) for value in (exact, first)]
            assert near[0] if number == chosen or needed[number] == 1 else any(near)
        told_apart.add(chosen)
    # Among them some that had to be told apart.
    assert {0, 1} & told_apart
    assert {2, 3} & told_apart


def test_candidates_are_told_apart_only_where_it_matters(smollm2, monkeypatch):
    target = smollm2.prompt("The official currency of x is the", "x")
    states = capture(smollm2, [smollm2.prompt("Last year they went to Japan", "Japan")])[0, 4:8]
    scope = Patchscope(smollm2, target)
    candidates = [" Japanese yen", " Japanese dollar", " euro", " rupee", " rupiah"]
    scope.choose(states, 2, candidates)
    passes = []
    forward = type(smollm2).logits

    def counted(self, ids, cache=None, last=1):
        passes.append((len(ids), last))
        return forward(self, ids, cache, last)

    monkeypatch.setattr(type(smollm2), "logits", counted)
    choices = scope.choose(states, 2, candidates)
    assert choices.patched.chosen.tolist() == [0] * 4
    # One pass for all, and one for those that say "Japanese"; none for "ru", which nobody would say.
    assert passes == [(1, 1), (5, 1), (1, 1), (5, 1)]


def test_one_candidate_and_what_is_no_candidate(tiny):
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope = Patchscope(tiny, tiny.prompt(TARGET, "x"))
    assert scope.choose(states, layers, [" Tokyo Bay"]).patched.chosen.tolist() == [0] * 5
    for wrong, fault in (
        ([], r"there are no candidates"),
        (" Tokyo", "a list of texts, not ' Tokyo'"),
        ([" Tokyo", " Tokyo"], "have the same tokens"),
        ([" Tokyo", ""], "a continuation is a text with something in it, not ''"),
        ([" Tokyo", "land"], "'land' after 'The capital city of x is' is not tokenised as its continuation"),
    ):
        with pytest.raises((PscopeError, PromptError), match=fault):
            scope.choose(states, layers, wrong)
    with pytest.raises(PscopeError, match="there is no measure 'ends'; one of start, whole, mean"):
        scope.choose(states, layers, [" Tokyo"], by="ends")
    with pytest.raises(PscopeError, match="5 states came with 2 continuations"):
        scope.score(states, layers, [" Tokyo", " Paris"])
    room = tiny.window - len(scope.target)
    assert scope.score(states[:1], 0, " the" * (room + 1)).patched.log_probabilities.shape == (1, room + 1)
    with pytest.raises(PromptError, match="more than the window"):
        scope.score(states, layers, " the" * (room + 2))


def test_a_row_that_is_not_finite_is_told_by_its_number(tiny, monkeypatch):
    # As a state that a model makes no number of, though it is one.
    monkeypatch.setattr("pscope.engine.patchscope.check_numbers", lambda vectors: None)
    states, layers = rows_for_every_layer(tiny)
    states[4] = torch.nan
    scope = Patchscope(tiny, tiny.prompt(TARGET, "x"))
    texts = [" Tokyo", " Paris, France"] * 5
    for scored in (
        lambda: scope.score(states, layers, texts),
        lambda: scope.choose(states, layers, [" Tokyo", " Paris"]),
    ):
        with pytest.raises(RowError, match="its logits are not finite") as raised:
            scored()
        assert raised.value.row == 4


def test_an_extended_target_is_checked_as_well(tiny, monkeypatch):
    """A target that is right by itself may not be where tokens are forced after it: one of each length is checked."""
    forward = type(tiny).logits

    def wrong(self, ids, cache=None, last=1):
        logits = forward(self, ids, cache, last)
        growing = cache is not None and cache.layers and isinstance(cache.layers[0], GrowingLayer)
        return logits + 1.0 * (torch.arange(logits.shape[-1]) % 2) if growing and ids.shape[1] == 4 else logits

    monkeypatch.setattr(type(tiny), "logits", wrong)
    target = tiny.prompt(TARGET, "x")
    assert len(target) - target.position == 2
    states, layers = rows_for_every_layer(tiny, per_layer=1)
    scope = Patchscope(tiny, target)
    assert scope.path == "staircase"
    tokens = following(tiny, target, " Tokyo, in")
    assert len(tokens) == 3
    scores = scope.score(states, layers, " Tokyo, in")
    for row, (layer, state) in enumerate(zip(layers, states, strict=True)):
        expected, _ = forced(tiny, target, layer, state, tokens)
        torch.testing.assert_close(scores.patched.log_probabilities[row].double(), expected, rtol=0, atol=1e-4)
