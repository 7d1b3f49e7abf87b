import json
import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from pscope import ENTITY_DESCRIPTION, DataError, Every
from pscope.inputs.entities import ALL, Entity, read_entities, shipped_entities, without_demonstrated
from pscope.metrics import rouge_l
from pscope.models.prompts import tokenize

RECORDS = [
    {"entity": "Beyoncé", "reference": "American singer, and dancer", "group": "popular"},
    {"entity": "東京", "reference": "Capital of Japan", "group": "rare"},
]


def test_the_shipped_entities(tiny):
    entities = shipped_entities()
    groups = Counter(entity.group for entity in entities)
    assert set(groups) == {"popular", "rare"}
    assert groups["popular"] >= 200
    assert groups["rare"] >= 100
    records = json.loads(files("pscope.data").joinpath("entities.json").read_text("utf-8"))
    kinds = Counter((record["group"], record["kind"]) for record in records)
    assert {kind for _, kind in kinds} == {"person", "place", "work", "organisation", "event", "species", "thing"}
    assert min(kinds.values()) >= 9
    assert len({entity.reference for entity in entities}) == len(entities)
    for entity in entities:
        assert entity.reference.endswith("."), entity
        assert 4 <= len(entity.reference.split()) <= 24, entity
        assert not re.search(rf"(?<!\w){re.escape(entity.name)}(?!\w)", entity.reference, re.IGNORECASE), entity
    # Whoever only repeats the name earns next to nothing.
    assert np.mean(rouge_l([entity.name for entity in entities], [entity.reference for entity in entities])) < 0.03
    assert without_demonstrated(entities, tiny.prompt(ENTITY_DESCRIPTION)) == (entities, [])


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS), "utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(record) for record in RECORDS))
    (tmp_path / "a.csv").write_text(
        'reference,entity,kind,group\n"American singer, and dancer",Beyoncé,person,popular\n'
        "Capital of Japan,東京,,rare\n"
    )
    expected = [Entity("Beyoncé", "American singer, and dancer", "popular"), Entity("東京", "Capital of Japan", "rare")]
    for name in ("a.json", "a.jsonl", "a.csv"):
        assert read_entities(tmp_path / name) == expected


def test_groups_are_optional(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("entity,reference\nA,a\nB,b\n")
    assert [entity.group for entity in read_entities(path)] == [ALL, ALL]
    path.write_text("entity,reference,group\nA,a,known\nB,b,\n")
    assert [entity.group for entity in read_entities(path)] == ["known", "no group"]


A = '{"entity": "A", "reference": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            f'[{A},\n {{"entity": "B" "reference": "b"}}]',
            "line 2, column 17: not JSON",
        ),
        ("a.json", A, "a list of records"),
        ("a.json", "[]", "holds no entity"),
        (
            "a.json",
            f'[{A}, "B"]',
            'entry 2: a record with "entity" is needed; this is none',
        ),
        (
            "a.json",
            '[{"entity": "A", "text": "a"}]',
            "entry 1: a record with \"reference\" is needed; it has 'entity', 'text'",
        ),
        ("a.json", '[{"entity": "A", "reference": " "}]', 'entry 1: "reference" is empty'),
        ("a.json", '[{"entity": "A", "reference": "..."}]', "entry 1: the \"reference\" of 'A' holds no word"),
        ("a.json", '[{"entity": 7, "reference": "a"}]', 'entry 1: "entity" is empty or no string'),
        ("a.json", '[{"entity": "A", "reference": "a", "group": 7}]', 'entry 1: "group" is empty or no string'),
        (
            "a.jsonl",
            f'{A}\n{{"entity": "A ", "reference": "b"}}',
            "line 2: 'A' is there already, in line 1",
        ),
        (
            "a.csv",
            "entity,reference\nA,a\nB,b\nA,c\nB,d\nA,e\n",
            "a.csv, line 4: 'A' .*, in line 2; line 5: 'B' .*, in line 3; line 6: 'A' is there already, in line 2$",
        ),
        ("a.csv", "entity,reference\n" + "A,a\n" * 100, "; and 79 more$"),
        ("a.json", f'[{{"entity": "A", "reference": "a", "group": "{"g" * 201}"}}]', '"group" has 201 characters'),
        (
            "a.json",
            '[{"entity": "é", "reference": "a"}, {"entity": "e\u0301", "reference": "b"}]',
            "entry 2: .* in entry 1",
        ),
        ("a.csv", "name,reference\nA,a\n", "line 2: a record with \"entity\" is needed; it has 'name', 'reference'"),
        ("a.csv", "entity,reference\nA,\n", 'line 2: "reference" is empty'),
        ("a.csv", "entity,reference\nA,a,more\n", "line 2: 3 cells where the first line names 2"),
        ("a.csv", "", "holds no entity"),
        ("a.txt", "A: a", "is none of .json, .jsonl and .csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        read_entities(tmp_path / name)


def test_what_the_target_prompt_demonstrates_is_left_out(tiny):
    target = tiny.prompt(ENTITY_DESCRIPTION)
    names = ["Syria", "leonardo dicaprio", "Samsung", "X", "South Korea", "Leonardo", "Samsungs", "Syr"]
    kept, left_out = without_demonstrated([Entity(name, "a") for name in names], target)
    assert [entity.name for entity in left_out] == ["Syria", "leonardo dicaprio", "Samsung", "Leonardo"]
    assert [entity.name for entity in kept] == ["X", "South Korea", "Samsungs", "Syr"]


def test_a_demonstration_is_found_where_offsets_leave_blanks_out(tokenizer):
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = ByteLevel(trim_offsets=True)
    target = tokenize(PreTrainedTokenizerFast(tokenizer_object=backend), ENTITY_DESCRIPTION)
    assert target.token == "x"
    kept, left_out = without_demonstrated([Entity(name, "a") for name in ("Leonardo DiCaprio", "X", "East")], target)
    assert [entity.name for entity in left_out] == ["Leonardo DiCaprio", "East"]
    assert [entity.name for entity in kept] == ["X"]


def test_no_marked_token_is_a_mention(tiny):
    target = tiny.prompt("Syria: country, x: a, x", Every("x"))
    assert without_demonstrated([Entity("x", "a")], target) == ([Entity("x", "a")], [])
