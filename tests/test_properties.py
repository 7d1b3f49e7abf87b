"""What must hold of any text: prompts and places in them, layers as they are typed, batch axes, readers of files."""

import csv
import io
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pscope.cli.options import parse_layers, parse_target_layers

from pscope import Every, First, PromptError, PscopeError
from pscope.engine.batching import PerRow, find_batch_axes, fitting
from pscope.experiments.grid import layer_pairs
from pscope.inputs.chats import read_chat
from pscope.inputs.entities import read_entities
from pscope.inputs.queries import read_queries
from pscope.inputs.records import parse_csv, parse_json, parse_jsonl
from pscope.inputs.relations import read_relations
from pscope.inputs.targets import named_target, shipped_targets
from pscope.inputs.texts import read_texts
from pscope.models.internals.calls import stream_of
from pscope.models.prompts import tokenize, written_out
from pscope.models.residual import calling

few = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
fewer = settings(few, max_examples=8)

# Half of surrogate pairs are no text that a file holds.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LETTERS = st.text("abcdefgh éπ日本\U0001f600-'", min_size=1, max_size=12)
"""Of few letters, so that pieces stand in texts several times."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def attempt(call, *given):
    """What a call gives, and the sentence in which it refuses: one of both is None."""
    try:
        return call(*given), None
    except PscopeError as error:
        return None, str(error)


# Prompts


@few
@given(text=TEXT)
def test_tokens_stand_where_their_spans_say(tokenizer, text):
    if not text.strip():
        with pytest.raises(PromptError, match="the prompt is empty"):
            tokenize(tokenizer, text)
        return
    prompt, refused = attempt(tokenize, tokenizer, text)
    if prompt is None:
        assert refused == f"the tokenizer has no token for anything in {text!r}; give some text"
        return
    assert prompt.positions == (len(prompt) - 1,)
    # Of characters that nobody writes it knows some not at all, and then miscounts those that follow.
    assume(tokenizer.decode(prompt.ids) == text)
    for token, shown, (start, end) in zip(prompt.ids, prompt.tokens, prompt.spans, strict=True):
        said = tokenizer.decode([token])
        # A character that is split over tokens is that of each.
        assert shown == text[start:end]
        assert said == shown or "\ufffd" in said


@few
@given(words=st.lists(LETTERS, min_size=1, max_size=6), piece=LETTERS)
def test_every_piece_that_is_found_is_where_it_says(tokenizer, words, piece):
    text = " ".join(words)
    assume(text.strip())
    prompt, refused = attempt(tokenize, tokenizer, text, Every(piece))
    if prompt is None:
        assert "\n" not in refused
        return
    for position in prompt.positions:
        end = prompt.spans[position][1]
        assert text[:end].rstrip().endswith(piece.strip())
    if len(prompt.positions) == 1:
        first = tokenize(tokenizer, text, First(piece))
        assert tokenize(tokenizer, text, piece).positions == prompt.positions
        assert text[prompt_start(first) :].lstrip().startswith(piece.strip())
        assert first.position <= prompt.position


def prompt_start(prompt) -> int:
    return prompt.spans[prompt.position][0]


@few
@given(before=LETTERS, word=st.text("abcxyz", min_size=1, max_size=8), after=LETTERS)
def test_words_are_written_in_the_place_of_the_placeholder(tokenizer, before, word, after):
    before, after = before.strip(), after.strip()
    assume(before and "Q" not in before + after and not before[-1:].isspace())
    prompt = tokenize(tokenizer, f"{before} Q {after}", "Q")
    assert written_out(prompt, word) == f"{before} {word} {after}"


@few
@given(index=st.integers(-12, 12))
def test_an_index_counts_from_either_end(tokenizer, index):
    text = "one two three four"
    if -4 <= index < 4:
        assert tokenize(tokenizer, text, index).position == index % 4
    else:
        with pytest.raises(PromptError, match=f"^position {index} is outside the prompt's 4 tokens: .*$"):
            tokenize(tokenizer, text, index)


# Layers as they are typed

LAYER = st.integers(0, 9999)
NEAR = st.integers(0, 4) | st.integers(0, 4) | st.integers(0, 4) | st.integers(-2, 7)
"""Mostly those of the tiny model."""


@few
@given(parts=st.lists(LAYER | st.tuples(LAYER, st.integers(0, 40)), min_size=1, max_size=5), blanks=st.booleans())
def test_layers_are_read_as_they_are_written(parts, blanks):
    blank = " " if blanks else ""
    spans = [(part, part) if isinstance(part, int) else (part[0], min(part[0] + part[1], 9999)) for part in parts]
    typed = [
        str(first) if isinstance(part, int) else f"{first}{blank}-{blank}{last}"
        for part, (first, last) in zip(parts, spans, strict=True)
    ]
    meant = sorted({layer for first, last in spans for layer in range(first, last + 1)})
    assert parse_layers(f",{blank}".join(typed)) == meant
    assert parse_target_layers(",".join(typed)) == meant


@few
@given(text=st.text("0123456789-, samel", max_size=12) | TEXT)
def test_what_is_no_layers_is_told(text):
    layers, refused = attempt(parse_target_layers, text)
    if layers is None:
        assert refused.endswith("is neither a layer (8) nor a range of them (0-15), nor same or all")
    else:
        assert layers == text or (layers == sorted(set(layers)) and layers)


@few
@given(layers=st.lists(NEAR, max_size=4), targets=st.lists(NEAR, max_size=3))
def test_pairs_are_those_of_the_model(tiny, layers, targets):
    inside = layers and targets and all(0 <= layer <= tiny.n_layers for layer in [*layers, *targets])
    if inside:
        expected = [(layer, target) for layer in layers for target in targets]
        assert layer_pairs(tiny, layers, targets) == expected
        assert layer_pairs(tiny, layers) == [(layer, layer) for layer in layers]
    else:
        with pytest.raises(PscopeError, match="^(no layer is asked for|layer -?[0-9] is out of range: .*)$"):
            layer_pairs(tiny, layers, targets)


# Batch axes


@fewer
@given(axis=st.integers(0, 3), others=st.lists(st.integers(1, 3), min_size=3, max_size=3), data=st.data())
def test_the_batch_axis_is_found_and_fitted(tiny, axis, others, data):
    size, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    shape = [*others[:axis], size, *others[axis:]]
    ids = torch.tensor([tiny.prompt("one two").ids])
    seen = []

    def give(layer, args, kwargs):
        # Each row is told from the others.
        number = torch.arange(stream_of(args, kwargs).shape[0]).repeat_interleave(size)
        extra = number.view([-1 if each == axis else 1 for each in range(4)])
        return args, {**kwargs, "extra": extra.expand(*others[:axis], -1, *others[axis:])}

    def take(layer, args, kwargs):
        seen.append(kwargs.pop("extra"))
        return args, kwargs

    def run(count):
        with calling(tiny, give), calling(tiny, take):
            tiny.next_token_logits(ids.expand(count, -1))

    def run_seen(count):
        with calling(tiny, take):
            tiny.next_token_logits(ids.expand(count, -1))

    run(1)
    assert list(seen[0].shape) == shape
    with calling(tiny, give):
        axes = find_batch_axes(tiny, run_seen)
    found = {place: axes[place] for place in axes if place[-1] == "extra"}
    assert found == {(layer, 1, "extra"): PerRow(axis, size) for layer in range(tiny.n_layers)}

    def grow(layer, args, kwargs):
        return args, {**kwargs, "extra": kwargs["extra"].narrow(axis, 0, size)}

    seen.clear()
    with calling(tiny, give), calling(tiny, grow), fitting(tiny, found):
        run_seen(rows)
    # The first row stands for those that came since.
    assert all(extra.shape[axis] == rows * size and not extra.any() for extra in seen)


# Readers of files


QUOTED = st.text('"\t,\nab', max_size=20)
"""Tables whose quotes do not fit."""


def read(reader, tmp_path, name, content):
    """What a reader makes of a file with this content, or None where it says in one sentence that it cannot."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, refused = attempt(reader, path)
    assert found is not None or "\n" not in refused
    return found


@few
@given(
    content=st.binary(max_size=60) | TEXT | QUOTED | JSON.map(json.dumps) | JSON.map(lambda value: json.dumps([value]))
)
def test_any_file_is_read_or_told(tmp_path, content):
    for reader, names in (
        (read_entities, ["a.json", "a.jsonl", "a.csv"]),
        (read_texts, ["a.txt", "a.jsonl"]),
        (read_relations, ["a.json", "a.tsv"]),
        (read_queries, ["a.json", "a.tsv"]),
        (read_chat, ["a.json"]),
    ):
        for name in names:
            read(reader, tmp_path, name, content)


KEYS = ["entity", "reference", "group", "name", "kind", "template", "phrase", "samples", "subject", "object"]
KEYS += ["contexts", "aliases", "first", "second", "answer", "bridge", "text", "role", "content"]
RECORD = st.dictionaries(st.sampled_from(KEYS), JSON | st.just("a {} b"), max_size=8)


def named_contexts(path):
    """A relation whose sentences stand in this file beside it."""
    sample = {"subject": "subject", "object": "b"}
    relation = {"name": "one", "kind": "two", "template": "{} is", "samples": [sample]}
    path.with_name("one.json").write_text(json.dumps(relation))
    return read_relations(path.with_name("one.json"))


@few
@given(record=RECORD, samples=st.lists(RECORD | JSON, max_size=3))
def test_records_of_any_values_are_read_or_told(tmp_path, record, samples):
    lines = [json.dumps(each) for each in [record, *samples]]
    listed, relation = f"[{','.join(lines)}]", json.dumps({**record, "samples": samples})
    for reader, name, content in (
        (read_entities, "a.json", listed),
        (read_entities, "a.jsonl", "\n".join(lines)),
        (read_texts, "a.jsonl", "\n".join(lines)),
        (read_queries, "a.json", listed),
        (read_relations, "a.json", relation),
        (read_relations, "a.json", json.dumps(record)),
        (read_chat, "a.json", listed),
        (named_contexts, "contexts.json", json.dumps(record)),
    ):
        read(reader, tmp_path, name, content)


@few
@given(value=JSON, others=st.lists(JSON, max_size=3))
def test_json_is_read_as_it_was_written(value, others):
    assert parse_json(json.dumps(value), "f") == value
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in [value, *others])
    assert [each for _, each in parse_jsonl(lines, "f")] == [value, *others]


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@few
@given(names=st.lists(CELL.filter(str.strip), min_size=2, max_size=3, unique=True), data=st.data())
def test_tables_are_read_as_they_were_written(names, data):
    rows = data.draw(st.lists(st.lists(CELL, min_size=len(names), max_size=len(names)), max_size=4))
    for delimiter in ",\t":
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=delimiter).writerows([names, *rows])
        found = [row for _, row in parse_csv(written.getvalue(), "f", delimiter)]
        assert found == [dict(zip(names, row, strict=True)) for row in rows]


NAME = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)


@few
@given(records=st.lists(st.tuples(NAME, NAME, NAME), min_size=1, max_size=4))
def test_entities_are_read_as_they_were_written(tmp_path, records):
    keyed = [dict(zip(("entity", "reference", "group"), record, strict=True)) for record in records]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["entity", "reference", "group"], *records])
    found = [
        read(read_entities, tmp_path, name, content)
        for name, content in (
            ("a.json", json.dumps(keyed)),
            ("a.jsonl", "\n".join(map(json.dumps, keyed))),
            ("a.csv", table.getvalue()),
        )
    ]
    assert found[0] == found[1] == found[2]
    if found[0] is not None:
        assert [(each.name, each.reference, each.group) for each in found[0]] == records


TSV = ["subject", "object", "prompt_source", "prompt_target", "position_source", "position_target"]


@few
@given(
    cells=st.lists(
        st.tuples(CELL, CELL, CELL, CELL, CELL | st.integers().map(str), st.integers(-9, 9).map(str)), max_size=3
    ),
    cropped=CELL | st.lists(CELL, max_size=2).map(repr),
)
def test_rows_of_any_relation_are_read_or_told(tmp_path, cells, cropped):
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t")
    writer.writerows([[*TSV, "source_cropped_toks"], *[[*row, cropped] for row in cells]])
    read(read_relations, tmp_path, "a.tsv", table.getvalue())


@few
@given(subject=NAME, answer=NAME, before=NAME, position=st.integers(-3, 3))
def test_a_relation_is_read_as_it_was_written(tmp_path, subject, answer, before, position):
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t")
    writer.writerows([TSV, [subject, answer, f"{before} {subject}", "the capital of x", position, -1]])
    found = read(read_relations, tmp_path, "a.tsv", table.getvalue())
    if found is not None:
        ((relation,), _) = found
        (sample,) = relation.samples
        assert (sample.subject, sample.answers) == (subject, (answer,))
        assert sample.sources[0].text == f"{before} {subject}"
        assert relation.target.text == "the capital of x"


@few
@given(name=TEXT | st.sampled_from(sorted(shipped_targets())).flatmap(lambda name: st.sampled_from([name, name[:-1]])))
def test_a_target_goes_by_its_name_alone(name):
    target, refused = attempt(named_target, name)
    assert target is shipped_targets().get(name)
    assert refused is None or (target is None and re.search(r"did you mean [\w-]+\?", refused))
