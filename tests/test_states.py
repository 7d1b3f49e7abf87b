import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pscope
from pscope import DataError, Patchscope, PscopeError, States
from pscope.models.states import Label

TEXTS = ["the first of them", "a second text"]


@pytest.fixture
def states(tiny):
    return States.of(tiny, [tiny.prompt(text) for text in TEXTS], [[1, -1], [2]], [0, 3])


def test_each_row_says_what_it_is_of(tiny, states):
    assert [tuple(label) for label in states.labels] == [
        (TEXTS[0], " first", 1, 0),
        (TEXTS[0], " first", 1, 3),
        (TEXTS[0], " them", 3, 0),
        (TEXTS[0], " them", 3, 3),
        (TEXTS[1], " text", 2, 0),
        (TEXTS[1], " text", 2, 3),
    ]
    for label, vector in zip(states.labels, states.vectors, strict=True):
        own = pscope.capture(tiny, [tiny.prompt(label.text)], [[label.position]], [label.layer])
        torch.testing.assert_close(vector, own[0, 0], rtol=1e-4, atol=1e-4)
    table = states.table()
    assert table["norm"].tolist() == pytest.approx(states.vectors.norm(dim=1).tolist())
    assert table["layer"].tolist() == [0, 3] * 3
    assert repr(states) == f"States(6 of width 32, layers 0 to 3: {TEXTS[0]!r}, {TEXTS[1]!r})"


def test_what_is_taken_out_keeps_its_labels(states):
    odd = torch.arange(6) % 2 == 1
    for rows, kept in ((2, [2]), (np.int64(2), [2]), (slice(1, 4), [1, 2, 3]), ([5, 0], [5, 0]), (odd, [1, 3, 5])):
        some = states[rows]
        assert some.labels == tuple(states.labels[row] for row in kept)
        assert torch.equal(some.vectors, states.vectors[kept])
    assert states.at(3).labels == states[1::2].labels
    with pytest.raises(PscopeError, match="no state of layer 2"):
        states.at(2)


def test_a_mean_is_that_of_each_layer(states):
    mean = states.mean()
    assert mean.labels == (Label("mean of 2", layer=0), Label("mean of 2", layer=3))
    for row in (0, 1):
        torch.testing.assert_close(mean.vectors[row], states.vectors[[row, row + 2, row + 4]].mean(dim=0))


def test_others_are_matched_by_their_layers(states):
    mean = states.mean()
    backwards = States(mean.vectors.flip(0), mean.labels[::-1])
    for less in (states - mean, states - backwards, states + -mean):
        assert less.labels == states.labels
        torch.testing.assert_close(less.vectors, states.vectors - mean.vectors[[0, 1, 0, 1, 0, 1]])
    assert not (states - states).vectors.any()
    one = States(torch.ones(1, 32), (Label("ones"),))
    torch.testing.assert_close((states - one).vectors, states.vectors - 1)
    torch.testing.assert_close((2 * states / 4).vectors, states.vectors / 2)
    assert states.map(torch.relu).labels == states.labels
    assert (states.map(torch.relu).vectors >= 0).all()
    with pytest.raises(PscopeError, match="has neither the layers of"):
        states - mean[0]
    with pytest.raises(PscopeError, match="has neither the layers of"):
        states - states[:4]
    with pytest.raises(PscopeError, match="width 32 and of width 3"):
        states - States(torch.ones(1, 3), (Label("ones"),))


def test_a_small_difference_of_half_precision_is_not_lost(states):
    half = states.map(lambda vectors: vectors.half())
    nearly = states.map(lambda vectors: (vectors + 1e-3).half())
    exact = nearly.vectors.double() - half.vectors.double()
    torch.testing.assert_close((nearly - half).vectors.double(), exact, rtol=1e-6, atol=1e-9)
    assert half.mean().vectors.dtype == torch.float32


def test_states_are_patched_as_they_are(tiny, states):
    scope = Patchscope(tiny, tiny.prompt("one x"))
    (got,) = scope.logits(states, 2)
    (expected,) = scope.logits(states.vectors, 2)
    assert torch.equal(got.patched, expected.patched)


def test_a_file_gives_back_what_was_kept(tiny, states, tmp_path):
    file = tmp_path / "new" / "mine.safetensors"
    states.to_file(file)
    again = States.from_file(file)
    assert again.labels == states.labels
    assert torch.equal(again.vectors, states.vectors)
    with pytest.raises(DataError, match="is there already"):
        states.to_file(file)
    with pytest.raises(DataError, match="ends with .safetensors"):
        states.to_file(tmp_path / "mine.pt")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.safetensors"]


def test_files_of_others(tmp_path):
    vectors = torch.randn(3, 8)
    save_file({"W_dec": vectors, "b": torch.ones(8)}, tmp_path / "sae.safetensors")
    np.save(tmp_path / "steer.npy", vectors[0].numpy())
    several = States.from_file(tmp_path / "sae.safetensors", "W_dec")
    assert [label.text for label in several.labels] == ["sae:W_dec 0", "sae:W_dec 1", "sae:W_dec 2"]
    assert torch.equal(several.vectors, vectors)
    one = States.from_file(tmp_path / "steer.npy")
    assert one.labels == (Label("steer"),)
    assert torch.equal(one.vectors, vectors[:1])
    with pytest.raises(DataError, match="W_dec, b; name one of them"):
        States.from_file(tmp_path / "sae.safetensors")
    with pytest.raises(DataError, match="no tensor 'W'"):
        States.from_file(tmp_path / "sae.safetensors", "W")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nan.npy", np.array([[1.0, np.nan]]), "row 0 of .*nan.npy is not finite"),
        ("empty.npy", np.zeros((0, 8)), "shape (0, 8)"),
        ("whole.npy", np.arange(8), "int64"),
        ("cube.npy", np.zeros((2, 2, 2)), "shape (2, 2, 2)"),
        ("pickled.npy", np.array([{"a": 1}], dtype=object), "no plain array"),
        ("half.npy", b"\x93NUMPY\x01\x00v\x00", "damaged"),
        ("half.safetensors", b"\x08\x00", "damaged"),
        ("there.safetensors", None, "cannot read"),
        ("there.npy", None, "cannot read"),
        ("vector.pt", b"", "neither .safetensors nor .npy"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path, name, content, told):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(DataError, match=told.replace("(", r"\(").replace(")", r"\)")):
        States.from_file(tmp_path / name)
