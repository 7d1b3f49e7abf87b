import os
import subprocess
import sys

import pytest

from pscope import DataError
from pscope.inputs.records import MOST_CHARACTERS, parse_csv, parse_json, parse_jsonl, text_of


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


def test_json_that_python_cannot_hold_is_told_as_such():
    deep, long = "[" * 100_000 + "]" * 100_000, "9" * 5000
    for content, message in ((deep, "nested too deep"), (f"[{long}]", "a number has too many digits")):
        with pytest.raises(DataError, match=f"^f: {message}"):
            parse_json(content, "f")
        with pytest.raises(DataError, match=f"^f, line 2: {message}"):
            list(parse_jsonl(f"[]\n{content}", "f"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = """
import sys
from pathlib import Path
from pscope.inputs.records import read_text
read_text(Path(sys.argv[1]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pipe"], capture_output=True, text=True, timeout=60
    )
    assert finished.stderr.endswith("pipe is no regular file; give one\n")


def test_texts_that_nobody_means_are_refused():
    for key, most in MOST_CHARACTERS.items():
        assert text_of({key: f" {'a' * most} "}, key, "f") == "a" * most
        with pytest.raises(DataError, match=f'f: "{key}" has {most + 1} characters; at most {most} are meant'):
            text_of({key: "a" * (most + 1)}, key, "f")
    assert len(text_of({"text": "a" * 1_000_000}, "text", "f")) == 1_000_000
    with pytest.raises(DataError, match="half of a surrogate pair"):
        text_of({"text": os.fsdecode(b"caf\xe9")}, "text", "f")
