import pytest
import torch
from conftest import rows_for_every_layer
from reference import hidden_states, patched_logits, written_continuation, written_logits

import pscope
from pscope import Decoding, Patchscope, PscopeError, Write, Writes

TARGET = "say x and x or x now"
PATHS = ["staircase", "plain", "uncached"]


@pytest.fixture
def scope(tiny):
    return Patchscope(tiny, tiny.prompt(TARGET, pscope.Every("x")), path="staircase")


@pytest.fixture
def vectors(tiny):
    return rows_for_every_layer(tiny, per_layer=2)[0]


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_write_in_several_layers_agree_with_the_one_row_loop(tiny, vectors, path):
    target = tiny.prompt(TARGET, pscope.Every("x"))
    first, second, third = target.positions
    rows = [
        [Write(3, second, vectors[0]), Write(1, first, vectors[1])],
        [Write(4, third, vectors[2])],
        [Write(layer, first, vectors[3]) for layer in range(5)],
        [Write(0, third, vectors[4]), Write(0, second, vectors[5]), Write(2, third, vectors[6])],
        [Write(1, second, vectors[7])],
    ]
    scope = Patchscope(tiny, target, path=path)
    (part,) = scope.logits(Writes.of(rows))
    spoken = scope.generate(Writes.of(rows), decoding=Decoding(6))
    scores = scope.score(Writes.of(rows), None, spoken.patched)
    for row, logits, said, scored in zip(
        rows, part.patched, spoken.patched, scores.patched.log_probabilities, strict=True
    ):
        expected = written_logits(tiny.hf, tiny.layers, [*target.ids, *said], row)
        torch.testing.assert_close(logits, expected[-7], rtol=1e-4, atol=1e-4)
        assert said == written_continuation(tiny.hf, tiny.layers, target.ids, row, 6)
        of_said = expected[-7:-1].log_softmax(dim=-1)[range(6), said]
        torch.testing.assert_close(scored, of_said, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_those_beside_them(tiny, vectors, scope):
    first, second, _ = scope.target.positions
    rows = [[Write(k % 4, first, vectors[k]), Write(4 - k % 3, second, vectors[k + 1])] for k in range(8)]
    (together,) = scope.logits(Writes.of(rows))
    scope.memory = 1
    alone = list(scope.logits(Writes.of(rows)))
    assert len(alone) == 8
    torch.testing.assert_close(torch.cat([part.patched for part in alone]), together.patched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_state_that_is_held_stands_in_every_layer(tiny, vectors, path):
    target = tiny.prompt("one x two", "x")
    scope = Patchscope(tiny, target, path=path)
    (part,) = scope.logits(scope.writes(vectors[:2], [2, 4], hold=range(4)))
    for vector, own, logits in zip(vectors, (2, 4), part.patched, strict=False):
        held = [(layer, target.position, vector) for layer in {0, 1, 2, 3, own}]
        expected = written_logits(tiny.hf, tiny.layers, target.ids, held)[-1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_added_or_given_the_length_of_the_clean_state(tiny, vectors):
    target = tiny.prompt("one x two", "x")
    own = hidden_states(tiny.hf, tiny.layers, target.ids)[:, target.position]
    scope, layers = Patchscope(tiny, target), [0, 2, 4]
    clean = next(scope.logits(vectors[:1], 0)).clean
    long = own[layers].norm(dim=1, keepdim=True) * vectors[:3] / vectors[:3].norm(dim=1, keepdim=True)
    for how, written in (
        ({"add": True}, own[layers] + vectors[:3]),
        ({"scale": 2.0}, 2 * vectors[:3]),
        ({"norm": True, "scale": 0.5}, long / 2),
        ({"norm": True, "add": True, "scale": 3.0}, own[layers] + 3 * long),
    ):
        (part,) = scope.logits(scope.writes(vectors[:3], layers, **how))
        for layer, vector, logits in zip(layers, written, part.patched, strict=True):
            expected = patched_logits(tiny.hf, tiny.layers, target.ids, target.position, layer, vector)[-1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for norm in (False, True):
        (nothing,) = scope.logits(scope.writes(vectors[:3], layers, scale=0.0, norm=norm, add=True))
        torch.testing.assert_close(nothing.patched, clean.expand(3, -1), rtol=1e-4, atol=1e-4)


def test_several_placeholders_are_added_to_each_in_its_place(tiny, vectors):
    target = tiny.prompt(TARGET, pscope.Every("x"))
    own = hidden_states(tiny.hf, tiny.layers, target.ids)
    scope = Patchscope(tiny, target)
    each = vectors[:3].unsqueeze(0)  # one row, a vector for each position
    (part,) = scope.logits(scope.writes(each, [3], hold=[1, 4], norm=True, add=True))
    writes = []
    for layer in (1, 3, 4):
        for position, vector in zip(target.positions, vectors[:3], strict=True):
            state = own[layer, position]
            writes.append((layer, position, state + state.norm() * vector / vector.norm()))
    expected = written_logits(tiny.hf, tiny.layers, target.ids, writes)[-1]
    torch.testing.assert_close(part.patched[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_a_coarse_vector_does_not_make_the_clean_state_coarse(tiny, vectors, norm):
    scope = Patchscope(tiny, tiny.prompt("one x two", "x"))
    (nothing,) = scope.logits(scope.writes(vectors[:1].bfloat16(), 2, scale=0.0, norm=norm, add=True))
    torch.testing.assert_close(nothing.patched[0], nothing.clean, rtol=1e-5, atol=1e-5)


def test_a_state_of_its_own_held_everywhere_is_the_clean_row(tiny):
    target = tiny.prompt("one x two", "x")
    own = pscope.capture(tiny, [target])[0]
    scope = Patchscope(tiny, target)
    rows = [[Write(layer, target.position, state) for layer, state in enumerate(own)]]
    (part,) = scope.logits(Writes.of(rows))
    torch.testing.assert_close(part.patched[0], part.clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_of_any_floating_type_that_need_a_gradient(tiny, vectors, scope, dtype):
    own = vectors[:2].to(dtype).requires_grad_()
    (part,) = scope.logits(own, 2)
    (expected,) = scope.logits(own.detach().float(), 2)
    assert not part.patched.requires_grad
    torch.testing.assert_close(part.patched, expected.patched, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_written_is_told(tiny, vectors, scope):
    first, vector = scope.target.positions[0], vectors[0]
    for rows, told in (
        ([[Write(1, first, vector), Write(1, first, vector)]], f"row 0 writes twice at layer 1, position {first}"),
        ([[Write(5, first, vector)]], "layer 5 is out of range: the model has layers 0 to 4"),
        ([[Write(-1, first, vector)]], "the layer of a write is -1; a whole number from 0 on"),
        ([[Write(1, 0, vector)]], "position 0 is not marked in the target"),
        ([[Write(1, first, vector[:7])]], "vectors of width 7 do not fit a model of width 32"),
        ([[Write(1, first, vector.long())]], "int64"),
        ([[Write(1, first, vector)], [Write(1, first, vector[:7])]], "all of one width"),
        ([[]], "a row has one write at least"),
        ([], "a row has one write at least"),
    ):
        with pytest.raises(PscopeError, match=told):
            next(scope.logits(Writes.of(rows)))
    with pytest.raises(PscopeError, match="writes have layers of their own"):
        next(scope.logits(Writes.of([[Write(1, first, vector)]]), 1))
    with pytest.raises(PscopeError, match="each state has a target layer"):
        next(scope.logits(vectors))
    with pytest.raises(PscopeError, match="layer 9 is out of range"):
        scope.writes(vectors, 1, hold=[9])
    with pytest.raises(PscopeError, match="need a mapping"):
        scope.writes(vectors[:, :7], 1)
    with pytest.raises(PscopeError, match=r"which take \(rows, 32\) or .*, 32\)$"):
        scope.writes(vectors[0], 1)


def test_numbers_of_layers_and_positions_of_any_whole_type(tiny, scope, vectors):
    first = scope.target.positions[0]
    layers, positions = torch.tensor([[1], [3]]), torch.full((2, 1), first)
    (expected,) = scope.logits(Writes(vectors[:2, None], layers, positions))
    for dtype in (torch.uint8, torch.int8, torch.int32):
        (part,) = scope.logits(Writes(vectors[:2, None], layers.to(dtype), positions.to(dtype)))
        assert torch.equal(part.patched, expected.patched)
    with pytest.raises(PscopeError, match=r"layers of torch\.float32 are no numbers of layers"):
        Writes(vectors[:2, None], layers.float(), positions)
    with pytest.raises(PscopeError, match=r"positions of torch\.bool are no numbers of positions"):
        Writes(vectors[:2, None], layers, positions.bool())


def test_a_row_that_writes_nowhere_is_refused(tiny, scope, vectors):
    nowhere = Writes(vectors[:2, None], torch.tensor([[1], [-1]]), torch.full((2, 1), scope.target.positions[0]))
    with pytest.raises(PscopeError, match="row 1 writes in no layer"):
        next(scope.logits(nowhere))
