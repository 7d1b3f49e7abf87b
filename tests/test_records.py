import pytest

from pscope import DataError
from pscope.records import parse_csv, parse_json, parse_jsonl


def test_every_record_comes_with_its_place():
    assert list(parse_jsonl('{"a": 1}\r\n\n[2]\n', "f")) == [("f, line 1", {"a": 1}), ("f, line 3", [2])]
    table = 'a,b\r\n1,"two, and\nthree"\r\n\r\nNA,\r\n'
    assert list(parse_csv(table, "f")) == [
        ("f, line 3", {"a": "1", "b": "two, and\nthree"}),
        ("f, line 5", {"a": "NA", "b": ""}),
    ]
    assert list(parse_csv("a\tb\n1\t2\n", "f", delimiter="\t")) == [("f, line 2", {"a": "1", "b": "2"})]


def test_what_is_wrong_is_told_with_its_place():
    with pytest.raises(DataError, match="f, line 2, column 9: not JSON"):
        parse_json('[\n  {"a": }\n]', "f")
    with pytest.raises(DataError, match="f, line 2, column 2: not JSON"):
        list(parse_jsonl('{"a": 1}\n{a: 1}', "f"))
    with pytest.raises(DataError, match="f, line 3: 1 cells where the first line names 2"):
        list(parse_csv("a,b\n1,2\n3\n", "f"))
    with pytest.raises(DataError, match="f, line 2: 4 cells where the first line names 2"):
        list(parse_csv("a,b\n1,2,3,4\n", "f"))
    with pytest.raises(DataError, match="f, line 2: not CSV"):
        list(parse_csv('a,b\n1,"2\n', "f"))
