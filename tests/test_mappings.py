"""Mappings: what each does to a state, what a set of them says of itself, and what is on disk."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pscope import DataError, LanguageModel, Patchscope, PscopeError, capture
from pscope.mappings.mapping import (
    IDENTITY,
    Affine,
    Composed,
    Constant,
    KeepNorm,
    LowRank,
    Mapping,
    Norm,
    Scale,
)
from pscope.mappings.mapping_set import End, MappingSet, Origin, fold_of
from pscope.mappings.storage import digest_of, read_mappings, save_mappings

torch.manual_seed(0)
STATES = torch.randn(3, 2, 4)
W, B = torch.randn(5, 4), torch.randn(5)
U, D, S = torch.randn(4, 2), torch.randn(2, 4), torch.randn(4)


def by_hand(formula) -> np.ndarray:
    """A formula of one state, for every state by itself, in numpy."""
    return np.stack([[formula(state) for state in row] for row in STATES.double().numpy()])


@pytest.mark.parametrize(
    ("mapping", "formula"),
    [
        (IDENTITY, lambda h: h),
        (Affine(W, B), lambda h: W.double().numpy() @ h + B.double().numpy()),
        (Affine(W), lambda h: W.double().numpy() @ h),
        (LowRank(U, D, S), lambda h: U.double().numpy() @ (D.double().numpy() @ h) + S.double().numpy()),
        (LowRank(U, D, scale=0.5), lambda h: 0.5 * h + U.double().numpy() @ (D.double().numpy() @ h)),
        (Scale(3.0), lambda h: 3 * h),
        (Scale(S, S), lambda h: S.double().numpy() * h + S.double().numpy()),
        (Constant(B), lambda h: B.double().numpy()),
        (Norm(7.0), lambda h: 7 * h / np.linalg.norm(h)),
        (
            KeepNorm(Affine(W)),
            lambda h: W.double().numpy() @ h / np.linalg.norm(W.double().numpy() @ h) * np.linalg.norm(h),
        ),
        (Affine(W, B).then(Scale(2.0)), lambda h: 2 * (W.double().numpy() @ h + B.double().numpy())),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Mapping) else "",
)
def test_each_kind_against_its_formula(mapping, formula):
    np.testing.assert_allclose(mapping(STATES).numpy(), by_hand(formula), rtol=1e-5, atol=1e-5)


def test_a_state_without_length_stays():
    assert Norm(3.0)(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    assert KeepNorm(Affine(W))(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize("mapping", [Affine(W), LowRank(U, D), Scale(S)])
def test_states_of_another_width_are_refused(mapping):
    with pytest.raises(PscopeError, match=r"states of shape \(1, 7\) were given to a mapping from width 4"):
        mapping(torch.zeros(1, 7))


@pytest.mark.parametrize(
    "mapping",
    [
        IDENTITY,
        Affine(torch.eye(32), torch.zeros(32)),
        Scale(1.0),
        Composed((IDENTITY, Scale(1.0))),
    ],
)
def test_a_map_that_is_the_identity_changes_nothing_bit_for_bit(tiny, mapping):
    states = capture(tiny, [tiny.prompt("The quick brown fox")])[0]
    assert mapping(states).equal(states)
    scope = Patchscope(tiny, tiny.prompt("cat -> cat\n?"))
    layers = list(range(tiny.n_layers + 1))
    plain, mapped = (torch.cat([part.patched for part in scope.logits(x, layers)]) for x in (states, mapping(states)))
    assert mapped.equal(plain)


def end(width: int = 4, layers: int = 3, fingerprint: str | None = None) -> End:
    return End("a model", layers, width, fingerprint)


def test_a_text_is_read_by_a_map_that_has_not_seen_it():
    whole = {(1, 3): Scale(0.0), (2, 3): Scale(10.0)}
    folds = tuple({(1, 3): Scale(fold + 1.0), (2, 3): Scale(-fold - 1.0)} for fold in range(5))
    mappings = MappingSet(whole, Origin("affine", end(), end()), folds)
    texts = [f"text {number}" for number in range(12)]
    assert len({fold_of(text) for text in texts}) > 2
    states = torch.randn(12, 2, 4)
    mapped = mappings.apply(states, [(2, 3), (1, 3)], texts)
    for row, text in enumerate(texts):
        assert mapped[row].equal(
            torch.stack([states[row, 0] * -(fold_of(text) + 1), states[row, 1] * (fold_of(text) + 1)])
        )
    # Who has no text was not fitted on.
    assert mappings.apply(states, [(2, 3), (1, 3)], [None] * 12)[:, 0].equal(states[:, 0] * 10)
    with pytest.raises(PscopeError, match=r"no map for the layers \(0, 3\); these map layers 1 to 2 to layer 3"):
        mappings.at((0, 3))


ALL_KINDS = {
    (0, 3): IDENTITY,
    (1, 3): Affine(W[:4], B[:4]),
    (2, 3): LowRank(U, D, S, S),
    (3, 3): Scale(2.0, S).then(KeepNorm(Affine(W[:4]))).then(Norm(3.0)),
    (0, 2): Constant(S),
    (1, 2): Scale(S, 0.5),
}


@pytest.fixture
def whole(tmp_path):
    """A folder of ours, with all kinds of maps, and what was written into it."""
    origin = Origin("affine", end(), end(), 9, 80, "abc", {(1, 3): 0.1}, {(1, 3): 0.75}, {"into": "x"})
    folds = tuple({pair: Scale(float(fold)) for pair in ALL_KINDS} for fold in range(5))
    mappings = MappingSet(ALL_KINDS, origin, folds, {3: B})
    save_mappings(mappings, tmp_path / "maps")
    return tmp_path / "maps", mappings


class Model(LanguageModel):
    """As much of a model as a loader of mappings looks at."""

    name, n_layers, hidden_size, device = "a model", 3, 4, "cpu"

    def __init__(self):
        pass


@pytest.fixture
def unhashed(monkeypatch):
    monkeypatch.setattr("pscope.mappings.mapping_set.fingerprint", lambda model: "now")


def test_what_is_saved_is_read_again(whole, unhashed):
    folder, written = whole
    read = read_mappings(folder, Model())
    assert read.origin == written.origin
    assert read.means[3].equal(B)
    assert digest_of(read) == digest_of(written)
    for pair, mapping in ALL_KINDS.items():
        assert read.at(pair)(STATES).equal(mapping(STATES))
        text = "some text"
        assert read.at(pair, text)(STATES).equal(STATES * fold_of(text))
    changed = MappingSet({**ALL_KINDS, (1, 2): Scale(S + 1e-6, 0.5)}, written.origin, written.folds)
    assert digest_of(changed) != digest_of(written)
    fold = MappingSet(ALL_KINDS, written.origin, (written.folds[1], *written.folds[1:]))
    assert digest_of(fold) != digest_of(written)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pscope\n")
    assert "| 1 | 3 | 0.750 | 0.1 |" in card
    with safe_open(folder / "mappings.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pscope"])["origin"]["r2"] == {"1->3": 0.75}


def test_nothing_is_overwritten(whole, tmp_path):
    folder, mappings = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match="not empty"):
        save_mappings(mappings, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        save_mappings(mappings, tmp_path / "file")


def test_mappings_of_another_model_are_refused_by_name(tmp_path, unhashed):
    for of, told in (
        ((end(width=5), end()), "lead from a model, with 5 width; a model has 4"),
        ((end(), end(layers=2)), "lead to a model, with 2 layers; a model has 3"),
        ((end(fingerprint="then"), end()), "lead from a model of other weights than a model has now"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_mappings(MappingSet({(0, 3): IDENTITY}, Origin("affine", *of)), folder)
        with pytest.raises(PscopeError, match=told):
            read_mappings(folder, Model())
    save_mappings(MappingSet({(0, 3): IDENTITY}, Origin("affine", end(fingerprint="now"), end())), tmp_path / "fits")
    assert read_mappings(tmp_path / "fits", Model()).at((0, 3))(STATES).equal(STATES)


def test_damaged_mappings_are_told(whole, tmp_path, unhashed):
    folder, _ = whole
    path = folder / "mappings.safetensors"
    content = path.read_bytes()
    for damaged, told in (
        (content[: len(content) // 2], "is damaged"),
        (b"", "is damaged"),
        (content.replace(b'\\"format\\": 1', b'\\"format\\": 7'), "another format than 1"),
        (content.replace(b'\\"kind\\": \\"LowRank\\"', b'\\"kind\\": \\"Unheard\\"'), "is damaged"),
        (content.replace(b"0->3", b"0=>3"), "is damaged"),
        (content.replace(b'"shape":[4,4]', b'"shape":[2,8]'), r"is damaged: the \w+ of \w+ is \(.*does not fit"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=told):
            read_mappings(folder, Model())
    with pytest.raises(DataError, match="no folder or file here"):
        read_mappings(tmp_path / "nowhere", Model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds neither mappings\.safetensors nor a lens"):
        read_mappings(tmp_path / "empty", Model())


def test_a_mapping_of_the_users_may_hold_anything():
    @dataclass(frozen=True, eq=False)
    class Named(Mapping):
        name: str
        factor: "float"

        def __call__(self, states):
            return self.factor * states

    assert Named("twice", 2.0)(STATES).equal(2 * STATES)
    with pytest.raises(PscopeError, match="the factor of Named is a float, not 'two'"):
        Named("twice", "two")
