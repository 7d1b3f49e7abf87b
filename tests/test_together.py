import pytest
import torch
from conftest import rows_for_every_layer
from reference import hidden_states, patched_continuation

from pscope import Decoding, Patchscope, RowError
from pscope.engine.generate import CachedRows
from pscope.engine.together import Request, generate_together

# Three of one length, patched at different places, and one of another length between them.
TARGETS = [("one two x", 2), ("x is red", 0), ("a longer target for x", "x"), ("we saw it", 1), ("say no more", 1)]


def requests_of(model, per_layer=1, path="auto", memory=2**30):
    requests = []
    for seed, (text, at) in enumerate(TARGETS):
        states, layers = rows_for_every_layer(model, seed=seed, per_layer=per_layer)
        requests.append(Request(Patchscope(model, model.prompt(text, at), path=path, memory=memory), states, layers))
    return requests


@pytest.mark.parametrize("path", ["auto", "plain", "uncached"])
def test_every_row_says_what_it_says_in_the_one_row_loop(tiny, path):
    requests = requests_of(tiny, path=path)
    said = generate_together(requests, Decoding(8))
    assert len(said) == len(requests)
    for (scope, states, layers), continuations in zip(requests, said, strict=True):
        where = tiny.hf, tiny.layers, scope.target.ids, scope.target.position
        for state, layer, got in zip(states, layers, continuations.patched, strict=True):
            assert got == patched_continuation(*where, layer, state, 8)
        own = hidden_states(tiny.hf, tiny.layers, scope.target.ids)[0, scope.target.position]
        assert continuations.clean == patched_continuation(*where, 0, own, 8)


def test_those_of_one_length_share_a_batch(tiny, monkeypatch):
    requests = requests_of(tiny)
    joined = CachedRows.joined
    batches = []
    monkeypatch.setattr(
        CachedRows, "joined", lambda parts: batches.append([len(part.logits) for part in parts]) or joined(parts)
    )
    generate_together(requests, Decoding(3))
    # Five rows and the clean one each; the third target is longer than the others.
    assert batches == [[6] * 4, [6]]
    batches.clear()
    # No more than fit into the memory: two targets do, in a batch of twelve rows.
    few = requests[:2] + requests[3:]
    row = max(each.scope._now()[0].row_bytes(3) for each in few)
    for each in few:
        each.scope.memory = 13 * row
    generate_together(few, Decoding(3))
    assert batches == [[6, 6], [6, 6]]
    for each in few:
        each.scope.memory = 7 * row
    batches.clear()
    whole = generate_together(few, Decoding(3))
    assert batches == [[6]] * 4
    alone = [each.scope.generate(each.states, each.target_layers, Decoding(3)) for each in few]
    assert whole == alone
    # One that does not fit is cut.
    for each in few:
        each.scope.memory = 4 * row
    batches.clear()
    assert generate_together(few, Decoding(3)) == alone
    assert batches == [[4], [3]] * 4


@pytest.mark.parametrize("decoding", [Decoding(6, temperature=0.7, seed=3), Decoding(9, stop=("a", "e"))])
def test_sampled_tokens_and_stops_are_those_of_each_alone(tiny, decoding):
    requests = requests_of(tiny, per_layer=2)
    alone = [each.scope.generate(each.states, each.target_layers, decoding) for each in requests]
    assert generate_together(requests, decoding) == alone
    assert len({len(row) for each in alone for row in each.patched}) > (decoding.temperature == 0)


def test_rows_are_numbered_through_all_that_is_asked(tiny):
    requests = requests_of(tiny)
    heard = {}

    def settled(row, text):
        heard.setdefault(row, []).append(text)
        return row == 7

    said = generate_together(requests, Decoding(4), settled)
    assert sorted(heard) == list(range(25))
    for number, texts in heard.items():
        of, row = divmod(number, 5)
        own = said[of].patched[row]
        assert texts[0] == tiny.tokenizer.decode(own[:1])
        # Row 7 is the third of the second target, and need not go on.
        assert len(own) == (1 if number == 7 else 4)
    for of, each in enumerate(requests):
        # What is patched at the top, elsewhere than at the last token, nobody reads.
        row = each.target_layers.index(1)
        spoilt = [other._replace(states=other.states.clone()) for other in requests]
        spoilt[of].states[row] = torch.nan
        with pytest.raises(RowError) as raised:
            generate_together(spoilt, Decoding(4))
        assert raised.value.row == 5 * of + row
