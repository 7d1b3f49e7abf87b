"""Every architecture against the one-row loop, and the documentation's table of them."""

from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, KNOWN, VOCABULARY, build
from reference import hidden_states, logits_at_each_step, patched_logits, written_logits

from pscope import Decoding, LanguageModel, ModelError, Patchscope, Prompt, Write, Writes, capture, logit_lens
from pscope.engine.queue import Queue
from pscope.models.structure import check_structure

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "models.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
TOKENS = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1)).tolist()
POSITIONS = {"last": 19, "middle": 11, "first": 0}
NEW_TOKENS = 4
TOLERANCE = 1e-4
"""In standard deviations of the logits."""

REFUSED = {
    "cpmant": "lets tokens see later ones",
    "gemma3n_text": r"holds \(4, 1, 3, 32\) where a residual stream of \(batch, tokens, 32\) was expected",
    "xlm": r"layer 1 of XLM.* does not read what the one before it wrote",
}
EAGER = ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "bloom", "opt", "qwen3_moe", "cohere2"]


class Numbers:
    """A tokenizer of texts that are token ids."""

    is_fast = False

    def __call__(self, text, **options):
        return {"input_ids": [int(number) for number in text.split()]}


def prompt(ids, *positions):
    return Prompt(" ".join(map(str, ids)), tuple(ids), ("",) * len(ids), positions)


@cache
def model_of(name: str) -> tuple[LanguageModel, torch.nn.ModuleList]:
    """The model, and its decoder layers as they are known, not as pscope finds them."""
    hf, layers = build(name)
    return LanguageModel(hf, Numbers(), name), layers


@cache
def scope_of(name: str, where: str) -> Patchscope:
    model, _ = model_of(name)
    return Patchscope(model, prompt(TOKENS, POSITIONS[where]))


@cache
def random_states(model: LanguageModel) -> torch.Tensor:
    """States as long as the model's own, one for each layer, (L + 1, hidden)."""
    own = capture(model, [prompt(TOKENS, 7)])[0]
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    return noise * own.std(dim=-1, keepdim=True)


def assert_scores_agree(scope, layers):
    """The scores of two tokens after rows patched at every layer, and after the clean row, against the one-row loop."""
    model, target = scope.model, scope.target
    states, everywhere = random_states(model), range(model.n_layers + 1)
    tokens = TOKENS[3:5]
    scores = scope.score(states, everywhere, f" {tokens[0]} {tokens[1]}")
    own = hidden_states(model.hf, layers, target.ids)[0, target.position]
    found = scores.patched.log_probabilities, scores.clean.log_probabilities[:1]
    for layer, state, got in zip([*everywhere, 0], [*states, own], torch.cat(found), strict=True):
        ids = [*target.ids, *tokens]
        logits = patched_logits(model.hf, layers, ids, target.position, layer, state)[-3:-1].double()
        expected = logits.log_softmax(-1)[[0, 1], tokens]
        assert ((got - expected).abs() / logits.std(-1)).max() < TOLERANCE


def assert_writes_agree(model, layers, path):
    """Rows that write in several layers, at two positions, against the one-row loop: logits and two tokens."""
    target, states, top = prompt(TOKENS, 11, 15), random_states(model), model.n_layers
    rows = [
        [Write(top - 1, 15, states[0]), Write(1, 11, states[2]), Write(0, 15, states[1]), Write(0, 11, states[top])],
        [Write(layer, 11, states[1]) for layer in range(top + 1)],
        [Write(top, 15, states[0])],
    ]
    scope = Patchscope(model, target, path=path)
    (part,) = scope.logits(Writes.of(rows))
    spoken = scope.generate(Writes.of(rows), decoding=Decoding(2))
    for row, logits, said in zip(rows, part.patched, spoken.patched, strict=True):
        expected = written_logits(model.hf, layers, [*target.ids, said[0]], row)
        assert_close(logits, expected[-2])
        assert said[:1] + said[1:] == [expected[-2].argmax(), *([expected[-1].argmax()] if len(said) > 1 else [])]


def assert_close(got, expected):
    assert (got - expected).abs().max() / expected.std() < TOLERANCE
    assert got.argmax() == expected.argmax()


def assert_rows_agree(scope, layers):
    """Logits and continuations of rows patched at every layer, and of the clean row, against the one-row loop."""
    model, target = scope.model, scope.target
    states, everywhere = random_states(model), range(model.n_layers + 1)
    (part,) = scope.logits(states, everywhere)
    spoken = scope.generate(states, everywhere, Decoding(NEW_TOKENS))
    own = hidden_states(model.hf, layers, target.ids)[0, target.position]
    rows = [*zip(everywhere, states, part.patched, spoken.patched, strict=True), (0, own, part.clean, spoken.clean)]
    for layer, state, logits, said in rows:
        expected = logits_at_each_step(model.hf, layers, target.ids, target.position, layer, state, said)
        assert_close(logits, expected[0])
        assert said == expected[:-1].argmax(dim=-1).tolist()
        ended = [token in model.end_tokens for token in said]
        assert len(said) == NEW_TOKENS or ended[-1]
        assert not any(ended[:-1])


def assert_rows_that_wait_agree(scope):
    """What is said by rows that wait for those of a longer target, and go on with them, is what they say alone."""
    states, layers = random_states(scope.model), range(scope.model.n_layers + 1)
    longer = prompt([*scope.target.ids, *TOKENS[:2]], *scope.target.positions)
    scopes = [scope, Patchscope(scope.model, longer, path="staircase")]
    alone = [each.generate(states, layers, Decoding(NEW_TOKENS)) for each in scopes]
    rows = 1 + len(states)
    # They end after one, two, three or four tokens: when some have said three, the others come.
    lengths = 1 + torch.arange(2 * rows) % 4
    queue = Queue(
        Decoding(NEW_TOKENS), torch.zeros(2 * rows, NEW_TOKENS), lambda rows, said: lengths[rows] <= said.shape[1]
    )
    for first, each in zip((0, rows), scopes, strict=True):
        begun = each.start(states, layers, Decoding(NEW_TOKENS))
        queue.take(begun, range(first, first + rows), len(each.target), 2 * rows, None if first else len(longer))
        assert (queue.waiting > 0) == (first == 0)
    for number, said in queue.finish().items():
        which, row = divmod(number, rows)
        own = alone[which].patched[row - 1] if row else alone[which].clean
        assert len(said) == lengths[number]
        assert said[: len(own)] == own[: len(said)]


def test_the_documentation_counts_them():
    types = {name.split(",")[0] for name in ARCHITECTURES}
    assert f"{len(types - {*REFUSED})} model types" in (DOCS.parent / "README.md").read_text("utf-8")
    counts = f"{len(ARCHITECTURES)} configurations of {len(types)} model types"
    assert counts in (DOCS / "how-it-works.md").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in REFUSED])
def test_an_architecture(name):
    model, layers = model_of(name)
    assert check_structure(model).layers is layers
    for where in POSITIONS:
        scope = scope_of(name, where)
        assert_rows_agree(scope, layers)
        # With the scored tokens the path is checked anew; that it is right is seen without the check too.
        assert_scores_agree(scope if where == "last" else Patchscope(model, scope.target, path=scope.path), layers)
    assert_writes_agree(model, layers, scope_of(name, "middle").path)
    if scope_of(name, "middle").path == "staircase":
        assert_rows_that_wait_agree(scope_of(name, "middle"))

    prompts = [prompt(TOKENS[:length], length - 1) for length in (20, 5, 13)]
    states = capture(model, prompts)
    for read, expected in zip(states, prompts, strict=True):
        torch.testing.assert_close(
            read, hidden_states(model.hf, layers, expected.ids)[:, expected.position], rtol=1e-4, atol=1e-4
        )
    (lens,) = logit_lens(model).logits(states[:, -1], model.n_layers)
    for got, clean in zip(lens.patched, prompts, strict=True):
        with torch.no_grad():
            assert_close(got, model.hf(torch.tensor([clean.ids])).logits[0, -1])


@pytest.mark.parametrize("name", [name for name in KNOWN if name in REFUSED])
def test_what_cannot_be_patched_is_refused(name):
    with pytest.raises(ModelError, match=REFUSED[name]):
        check_structure(model_of(name)[0])


@pytest.mark.parametrize("name", EAGER)
def test_eager_attention(name):
    hf, layers = build(name, attn_implementation="eager")
    scope = Patchscope(LanguageModel(hf, None, name), prompt(TOKENS, POSITIONS["middle"]))
    assert scope.check.path == "staircase"
    assert_rows_agree(scope, layers)


def test_the_page_of_models_lists_what_was_found(request):
    paths = {name: _path(name) for name in KNOWN}
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    found, after = rest.split(END)
    if request.config.getoption("--write-models"):
        PAGE.write_text(before + BEGIN + _table(paths) + END + after, "utf-8")
    else:
        # An older transformers lacks some; those that it has are as they are told.
        listed = {name: path for path, names in _rows(found).items() for name in names if name in KNOWN}
        assert listed == paths


def _path(name: str) -> str:
    if name in REFUSED:
        return "refused"
    paths = {scope_of(name, where).check.path for where in POSITIONS}
    assert len(paths) == 1
    return paths.pop()


def _table(paths: dict[str, str]) -> str:
    lines = ["", "| path | configurations |", "|---|---|"]
    for path in ("staircase", "plain", "uncached", "refused"):
        lines.append(f"| {path} | {'; '.join(sorted(name for name in paths if paths[name] == path))} |")
    return "\n".join(lines) + "\n\n"


def _rows(table: str) -> dict[str, list[str]]:
    rows = (line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and ";" in line)
    return {path: names.split("; ") for path, names in rows}
