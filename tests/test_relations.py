import csv
import json
import re
from collections import Counter

import pytest

from pscope import DataError, PromptError
from pscope.inputs.queries import compose, read_queries
from pscope.inputs.relations import Marked, Relation, Sample, read_relations, shipped_relations
from pscope.metrics import answer_found, gives_away
from pscope.models.prompts import tokenize

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
        assert 20 <= len(relation.samples) <= 90, relation.name
        for sample in relation.samples:
            assert len(sample.sources) == len(set(sample.sources)) == 5
            assert not gives_away(sample.subject, [sample.object]), sample
            for source in sample.sources:
                # The position is found, and nothing gives the answer away.
                assert tiny.prompt(source.text, source.at)
                assert not gives_away(source.text, sample.answers), (relation.name, source)
    queries = compose(relations)
    assert len(queries) >= 300
    assert len({query.text for query in queries}) == len(queries)
    assert len(Counter(query.source for query in queries)) >= 10
    for query in queries:
        assert not gives_away(query.text, query.answers)
        assert query.bridge
        assert query.hop_one
        assert query.hop_two.startswith(query.second)


def test_no_shipped_answer_is_an_ordinary_word():
    everyday = (
        "He won a real fight in Wales. She creates jobs. Jobs are rare. Knight and Allen met at the gates of hell, "
        "or the Gates. A pound of sterling silver, pounds of coal, the soles of my shoes, Sol, Ayn Rand, a dong. "
        "A fluid. Percy Shelley, Hugo Boss, Ella Fitzgerald, Old McDonald, Bruce Lee, Julianne Moore, Lana Turner."
    )
    for relation in shipped_relations():
        for sample in relation.samples:
            # What one does with a tool is an ordinary word.
            found = [answer for answer in sample.answers if answer_found(everyday, [answer])]
            assert not found or relation.name == "tool task", (relation.name, sample.subject, found)


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


COLUMNS = ["", "sample_id", "prompt_target", "position_target", "target_baseline", "object", "subject"]
COLUMNS += ["generations_baseline", "generations_baseline_str", "is_correct_baseline"]
COLUMNS += ["prompt_source", "position_source", "source_cropped_toks"]


def table(path, rows, columns=COLUMNS):
    """A file as the paper's, of rows of subject, object, source prompt, position and the tokens up to the subject."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        for number, (subject, answer, prompt, position, tokens) in enumerate(rows):
            cells = ["The largest city in x", -1, f"The largest city in {subject}", answer, subject]
            cells += [[[464, 4387], [1748]], ['a "city",\nthe largest'], True, prompt, position, tokens]
            writer.writerow(dict(zip(COLUMNS, [number, number, *cells], strict=True)))
    return path


FAR = " Far from Peru, a ship that was built in Peru sank"
QUOTED = ' He said "Chile", and no more'
ROWS = [
    # The positions are not those of any tokenizer that is used here.
    ("Japan", "Tokyo", " He went to Japan in May", 9, [" He", " went", " to", " Ja", "pan"]),
    ("Japan", "Tokyo", " He went to Japan in May", 9, [" He", " went", " to", " Ja", "pan"]),
    ("Japan", "Edo", " He went to Japan in May", 9, [" He", " went", " to", " Ja", "pan"]),
    ("Japan", "Tokyo", " Japan is far", 7, [" Ja", "pan"]),
    ("Peru", "Lima", FAR, 40, [" Far", " from", " Pe", "ru"]),
    ("Peru", "Lima", FAR, 1, [" Far", " from Peru, a ship that", " was built", " in Pe", "ru"]),
    # Cut off at its start, it ends at the same place.
    ("Peru", "Lima", FAR, 1, [" from Peru, a ship that", " was built", " in Pe", "ru"]),
    ("Peru", "Lima", "", 0, []),
    ("Peru", "Lima", "  ", 0, []),
    ("Panama", "the Panama", " We saw Panama", 3, [" We", " saw", " Panama"]),
    ("Spain", "Madrid", " They left Portugal", 2, [" They", " left", " Portugal"]),
    ("Bahrain", "Manama", " They live in Qatar", 2, [" They", " live", " in"]),
    ("Mount Kenya", "Batian", " The high Kenya range", 2, [" The", " high", " Kenya"]),
    ("Chile", "Santiago", QUOTED, 99, "not a list"),
    ("Kenya", "Nairobi", " In Kenyatta's time", 1, [" In", " Kenya"]),
]


def test_tsv_relations_as_in_the_paper(tmp_path, tokenizer, bos_eos_tokenizer):
    path = table(tmp_path / "largest_city.tsv", ROWS)
    (relation,), skipped = read_relations(path)
    assert relation.name == "largest_city"
    assert skipped == [
        f"{path}: rows that repeat others: 2, with a further object, accepted too: 1, with an empty prompt_source: 2, "
        "whose object is the subject: 1"
    ]
    read = {sample.subject: sample for sample in relation.samples}
    assert {name: sample.answers for name, sample in read.items()} == {
        "Japan": ("Tokyo", "Edo"),
        "Peru": ("Lima",),
        "Spain": ("Madrid",),
        "Bahrain": ("Manama",),
        "Mount Kenya": ("Batian",),
        "Chile": ("Santiago",),
        "Kenya": ("Nairobi",),
    }
    # The texts as they are, and what stands before the end of the subject that is read.
    before = {
        "Japan": [(" He went to Japan in May", " He went to Japan"), (" Japan is far", " Japan")],
        "Peru": [(FAR, " Far from Peru"), (FAR, " Far from Peru, a ship that was built in Peru")],
        "Chile": [(QUOTED, ' He said "Chile')],
    }
    for tok in (tokenizer, bos_eos_tokenizer):
        for name, expected in before.items():
            for source, (text, up_to) in zip(read[name].sources, expected, strict=True):
                assert source.text == text
                assert tokenize(tok, source.text, source.at).position == last_token(tok, text, up_to)
        target = tokenize(tok, relation.target.text, relation.target.at)
        assert target.position == last_token(tok, "The largest city in x", "The largest city in x")
        with pytest.raises(PromptError, match="'Kenya' stands only inside longer tokens"):
            tokenize(tok, read["Kenya"].sources[0].text, read["Kenya"].sources[0].at)
        with pytest.raises(PromptError, match="'Spain' stands nowhere in the prompt, nor does it end with its token 2"):
            tokenize(tok, read["Spain"].sources[0].text, read["Spain"].sources[0].at)
    # A word of its own is not the end of another.
    with pytest.raises(
        PromptError, match="'Bahrain' stands nowhere in the prompt, nor does it end with its token 2, ' in'"
    ):
        tokenize(tokenizer, read["Bahrain"].sources[0].text, read["Bahrain"].sources[0].at)
    # By index only where the token there ends the subject, which it does for a tokenizer without a start token.
    (mountain,) = read["Mount Kenya"].sources
    assert tokenize(tokenizer, mountain.text, mountain.at).token == " Kenya"
    with pytest.raises(PromptError, match="nor does it end with its token 2, ' high'"):
        tokenize(bos_eos_tokenizer, mountain.text, mountain.at)


def last_token(tok, text, up_to):
    """The one token of a text that ends where the text's beginning `up_to` does."""
    assert text.startswith(up_to)
    encoded = tok(text, return_offsets_mapping=True)
    (index,) = [i for i, (start, end) in enumerate(encoded.offset_mapping) if start < end == len(up_to)]
    return index


def test_the_index_chooses_where_no_tokens_are_given(tmp_path, tokenizer, bos_eos_tokenizer):
    rows = [("Peru", "Lima", FAR, 4, []), ("Peru", "Lima", FAR, 13, []), ("Peru", "Lima", FAR, -1, [])]
    (relation,), _ = read_relations(table(tmp_path / "a.tsv", rows, COLUMNS[:-1]))
    first, *others = relation.samples[0].sources
    for tok in (tokenizer, bos_eos_tokenizer):
        assert tokenize(tok, FAR, first.at).position == last_token(tok, FAR, " Far from Peru")
        for other in others:
            up_to = " Far from Peru, a ship that was built in Peru"
            assert tokenize(tok, FAR, other.at).position == last_token(tok, FAR, up_to)


def test_a_placeholder_of_several_is_chosen_by_the_index(tmp_path, tokenizer):
    path = tmp_path / "a.tsv"
    for target, position, expected in [
        ("tax x is x so", -1, 3),
        ("tax x is x so", 1, 1),
        ("tax of y", 2, 2),
        ("tax of y", -1, 2),
    ]:
        lines = ["\t".join(ROW), "\t".join({**ROW, "prompt_target": target, "position_target": str(position)}.values())]
        path.write_text("\n".join(lines))
        (relation,), _ = read_relations(path)
        assert tokenize(tokenizer, relation.target.text, relation.target.at).position == expected


def test_prompts_are_kept_as_they_are(tmp_path):
    entry = {"subject": " Japan ", "object": " yen", "contexts": [" In Japan it rains. "]}
    beside = {"subject": "Peru", "object": "sol"}
    record = {**CURRENCY, "template": "\nThe currency of {} is", "samples": [entry, beside]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    (tmp_path / "contexts.json").write_text('{"Peru": "\\tTo Peru"}')
    (relation,), _ = read_relations(tmp_path)
    assert relation.target.text == "\nThe currency of x is"
    japan, peru = relation.samples
    assert (japan.subject, japan.object, japan.sources) == ("Japan", "yen", (Marked(" In Japan it rains. ", "Japan"),))
    assert peru.sources == (Marked("\tTo Peru", "Peru"),)


def test_queries_are_composed_where_objects_are_subjects(folder):
    (one, two), _ = read_queries(folder)
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
    (one, two), skipped = read_queries(path)
    assert skipped == []
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
        ([{**record, "first": "the firm of ann"}], "entry 1: the answer 'Ann' stands in the query itself"),
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
        ([{**ROW, "position_source": "one"}], "rows whose position_source is no whole number: 1; no row is left"),
        ([{**ROW, "prompt_target": " "}], "rows with an empty prompt_target: 1; no row is left"),
        ([{**ROW, "position_target": "one"}], "line 2: position_target 'one' is no whole number"),
        ([ROW, {**ROW, "subject": "Peru", "prompt_target": "x"}], "line 3: a relation has one prompt_target"),
        ([{**ROW, "object": "Japan"}], "a.tsv: rows whose object is the subject: 1; no row is left"),
        (
            [{**ROW, "prompt_source": ""}, {**ROW, "object": " "}],
            "an empty prompt_source: 1, with an empty object: 1; no",
        ),
        ([{"subject": "a", "object": "b"}], 'line 2: a record with "prompt_source" is needed'),
    ],
)
def test_tsv_relations_that_cannot_be_read(tmp_path, rows, message):
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=re.escape(message)):
        read_relations(tmp_path / "a.tsv")


def test_one_bad_file_does_not_stop_a_folder(folder, tmp_path):
    (folder / "again.json").write_text(json.dumps(CURRENCY))
    (folder / "bad.json").write_text("{")
    (folder / "cut.tsv").write_text("subject\tobject\na\n")
    relations, skipped = read_relations(folder)
    assert [relation.name for relation in relations] == ["currency", "food"]
    assert skipped == [
        f"{folder / 'bad.json'}, line 1, column 2: not JSON (Expecting property name enclosed in double quotes); "
        "the file is skipped",
        f"{folder / 'currency.json'}: there is a relation 'currency' already; the file is skipped",
        f"{folder / 'cut.tsv'}, line 2: 1 cells where the first line names 2; the file is skipped",
    ]
    # The relation was read, from the first of two files.
    queries, told = read_queries(folder)
    assert (len(queries), told) == (2, skipped)


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / "bad" / name).write_text("{")
    with pytest.raises(DataError, match=r"a\.json, line 1, column 2: not JSON"):
        read_relations(tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a.txt"):
        with pytest.raises(DataError, match="holds no relation"):
            read_relations(path)


def test_queries_that_two_relations_make_are_refused():
    born, died = (
        Relation(name, "factual", Marked("x", "x"), (Sample("Einstein", (country,), ()),), "{} is of", "the land of {}")
        for name, country in (("birth", "Germany"), ("death", "Peru"))
    )
    samples = tuple(Sample(country, (city,), ()) for country, city in (("Germany", "Berlin"), ("Peru", "Lima")))
    capital = Relation("capital", "factual", Marked("x", "x"), samples, "The capital of {} is")
    assert len(compose([born, capital])) == len(compose([died, capital])) == 1
    told = "'The capital of the land of Einstein' is composed twice: birth → capital, and death → capital"
    with pytest.raises(DataError, match=told):
        compose([born, died, capital])
