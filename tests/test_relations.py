import json
import re
from collections import Counter

import pytest

from pscope import DataError
from pscope.metrics import answer_found
from pscope.relations import Marked, compose, read_queries, read_relations, shipped_relations

CURRENCY = {
    "name": "currency",
    "kind": "factual",
    "template": "The currency of {} is",
    "samples": [
        {
            "subject": "Japan",
            "object": "yen",
            "aliases": ["JPY"],
            "contexts": ["He flew to Japan.", "In Japan it rains."],
        },
        {"subject": "the United States", "object": "dollar", "contexts": "Across the United States it snowed."},
    ],
}
FOOD = {
    "name": "food",
    "kind": "factual",
    "template": "The home of {}",
    "phrase": "the country of {}",
    "samples": [
        {"subject": "sushi", "object": "Japan", "contexts": ["We ate sushi."]},
        {"subject": "a hot dog", "object": "United States", "aliases": ["USA"], "contexts": ["I want a hot dog now."]},
        {"subject": "dollar pizza", "object": "United States", "contexts": ["I want dollar pizza now."]},
        {"subject": "paella", "object": "Spain", "contexts": ["We ate paella."]},
    ],
}


@pytest.fixture
def folder(tmp_path):
    for relation in (CURRENCY, FOOD):
        (tmp_path / f"{relation['name']}.json").write_text(json.dumps(relation), "utf-8")
    return tmp_path


def test_the_shipped_relations(tiny):
    relations = shipped_relations()
    assert len(relations) >= 12
    assert {relation.kind for relation in relations} == {"factual", "commonsense"}
    for relation in relations:
        assert 20 <= len(relation.samples) <= 60, relation.name
        for sample in relation.samples:
            assert len(sample.sources) == len(set(sample.sources)) == 5
            assert not answer_found(sample.subject, [sample.object]), sample
            for source in sample.sources:
                # The position is found, and nothing gives the answer away.
                assert tiny.prompt(source.text, source.at)
                assert not answer_found(source.text, sample.answers), (relation.name, source)
    queries = compose(relations)
    assert len(queries) >= 300
    assert len({query.text for query in queries}) == len(queries)
    assert len(Counter(query.source for query in queries)) >= 10
    for query in queries:
        assert not answer_found(query.text, query.answers)
        assert query.bridge
        assert query.hop_one
        assert query.hop_two.startswith(query.second)


def test_json_relations(folder):
    (folder / "contexts.json").write_text('{"paella": ["The paella is hot."]}')
    del FOOD["samples"][3]["contexts"]
    (folder / "food.json").write_text(json.dumps(FOOD), "utf-8")
    FOOD["samples"][3]["contexts"] = ["We ate paella."]
    (currency, food), skipped = read_relations(folder)
    assert skipped == []
    assert currency.target == Marked("The currency of x is", "x")
    japan, usa = currency.samples
    assert (japan.subject, japan.object, japan.answers) == ("Japan", "yen", ("yen", "JPY"))
    assert japan.sources == (Marked("He flew to Japan.", "Japan"), Marked("In Japan it rains.", "Japan"))
    assert usa.sources == (Marked("Across the United States it snowed.", "the United States"),)
    assert food.samples[3].sources == (Marked("The paella is hot.", "paella"),)


def test_tsv_relations_as_in_the_paper(tmp_path):
    path = tmp_path / "largest_city.tsv"
    path.write_text(
        "subject\tobject\tprompt_source\tprompt_target\tposition_source\tposition_target\n"
        "Japan\tTokyo\tHe went to Japan in May.\tThe largest city in x\t3\t-1\n"
        "Japan\tTokyo\tJapan is far.\tThe largest city in x\t-4\t-1\n"
        "Peru\tLima\t\tThe largest city in x\t0\t-1\n"
        'Chile\tSantiago\t"He said ""Chile""."\tThe largest city in x\t3\t-1\n'
    )
    (relation,), skipped = read_relations(path)
    assert relation.name == "largest_city"
    assert relation.target == Marked("The largest city in x", -1)
    assert [sample.subject for sample in relation.samples] == ["Japan", "Chile"]
    assert relation.samples[0].sources == (Marked("He went to Japan in May.", 3), Marked("Japan is far.", -4))
    assert relation.samples[1].sources == (Marked('He said "Chile".', 3),)
    assert skipped == [f"{path}, line 4: skipped, its prompt_source is empty"]


def test_queries_are_composed_where_objects_are_subjects(folder):
    one, two = read_queries(folder)
    # Articles do not matter; a query that holds its answer is left out, and one whose bridge is no subject.
    assert (one.text, one.answers) == ("The currency of the country of sushi", ("yen", "JPY"))
    assert (one.first, one.second, one.bridge) == ("the country of sushi", "The currency of", ("Japan", "Japan"))
    assert (one.hop_one, one.hop_two) == ("The home of sushi", "The currency of Japan is")
    assert two.text == "The currency of the country of a hot dog"
    assert two.bridge == ("the United States", "United States", "USA")
    assert two.hop_two == "The currency of the United States is"
    assert one.source == "food → currency"


def test_queries_of_the_users(tmp_path):
    path = tmp_path / "queries.json"
    record = {"first": "the company that made X", "second": "The CEO of", "answer": "Ann", "bridge": "Acme"}
    path.write_text(json.dumps([record, {**record, "second": "The owner of", "aliases": ["A.", "Anne"], "bridge": []}]))
    one, two = read_queries(path)
    assert (one.text, one.bridge, one.hop_two) == (
        "The CEO of the company that made X",
        ("Acme",),
        "The CEO of Acme is",
    )
    assert one.hop_one == "The company that made X is"
    assert (two.answers, two.bridge) == (("Ann", "A.", "Anne"), ())
    for records, message in [
        ([], "holds no query"),
        ([record, record], "some query is there twice"),
        ([{**record, "answer": "X"}], "entry 1: the answer 'X' stands in the query itself"),
        ([{"first": "a", "second": "b"}], 'entry 1: a record with "answer" is needed'),
        ([{**record, "bridge": 7}], 'entry 1: "bridge" is neither a text nor a list'),
    ]:
        path.write_text(json.dumps(records))
        with pytest.raises(DataError, match=re.escape(message)):
            read_queries(path)
    path.write_text(json.dumps(CURRENCY))
    with pytest.raises(DataError, match="no query can be composed"):
        read_queries(path)


def changed(sample=0, **changes):
    samples = [dict(entry) for entry in CURRENCY["samples"]]
    for key in [key for key in changes if key in samples[0]]:
        samples[sample][key] = changes.pop(key)
    return json.dumps({**CURRENCY, "samples": samples, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a",\n "kind" 1}', "line 2, column 9: not JSON"),
        (changed(template="The currency"), "the template 'The currency' has 0 slots {}"),
        (changed(template="{} of {}"), "has 2 slots {}"),
        (changed(phrase="the land"), "the phrase 'the land' has 0 slots"),
        (changed(samples=[]), '"samples" is no list of samples, or an empty one'),
        (changed(object="the japan"), "sample 1: the object of 'Japan' is the subject itself"),
        (changed(sample=1, subject="Japan"), "sample 2: 'Japan' is there already"),
        (changed(contexts=[]), "sample 1: 'Japan' has no \"contexts\""),
        (changed(contexts=["Nothing."]), "sample 1: 'Japan' does not stand in its context 'Nothing.'"),
        (changed(aliases=[3]), 'sample 1: "aliases" is empty or no string'),
        (changed(name=""), '"name" is empty'),
        ("[]", 'a record with "name" is needed'),
    ],
)
def test_json_relations_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content, "utf-8")
    with pytest.raises(DataError, match=re.escape(message)):
        read_relations(tmp_path / "a.json")


ROW = {
    "subject": "Japan",
    "object": "Tokyo",
    "prompt_source": "Japan",
    "prompt_target": "The capital of x",
    "position_source": "0",
    "position_target": "-1",
}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "position_source": "one"}], "line 2: position_source 'one' is no whole number"),
        ([ROW, ROW], "line 3: 'Japan' is there already with this prompt_source"),
        ([ROW, {**ROW, "object": "Kyoto"}], "line 3: 'Japan' has two objects, 'Tokyo' and 'Kyoto'"),
        ([ROW, {**ROW, "subject": "Peru", "prompt_target": "x"}], "line 3: a relation has one prompt_target"),
        ([{**ROW, "object": "Japan"}], "line 2: the object of 'Japan' is the subject itself"),
        ([{**ROW, "prompt_source": ""}], "holds no sample with a prompt_source"),
        ([{"subject": "a", "object": "b"}], 'line 2: a record with "prompt_source" is needed'),
    ],
)
def test_tsv_relations_that_cannot_be_read(tmp_path, rows, message):
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=re.escape(message)):
        read_relations(tmp_path / "a.tsv")


def test_folders_that_cannot_be_read(folder, tmp_path):
    (folder / "again.json").write_text(json.dumps(CURRENCY))
    with pytest.raises(DataError, match="there is a relation 'currency' already"):
        read_relations(folder)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a.txt"):
        with pytest.raises(DataError, match="holds no relation"):
            read_relations(path)
