import json
from collections import Counter
from importlib.resources import files
from unittest.mock import MagicMock

import datasets
import pytest
from huggingface_hub import constants

from pscope import DataError
from pscope.inputs.texts import read_dataset, read_texts, shipped_texts


def test_the_shipped_texts():
    lines = files("pscope.data").joinpath("texts.jsonl").read_text("utf-8").splitlines()
    registers = Counter(json.loads(line)["register"] for line in lines)
    texts = shipped_texts()
    assert len(texts) == len(lines) >= 200
    assert len(registers) >= 10
    assert min(registers.values()) >= 10
    assert all(50 <= len(text.split()) <= 120 for text in texts)
    openings = Counter(tuple(text.split()[:4]) for text in texts)
    assert openings.most_common(1)[0][1] == 1


def test_files(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("one text\n\n  two, é 東京\n", "utf-8")
    assert read_texts(plain) == ["one text", "two, é 東京"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one\\ntext", "id": 1}\r\n\n{"text": "two\u2028lines"}\n', "utf-8-sig")
    assert read_texts(lines) == ["one\ntext", "two\u2028lines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\n  \n", "holds no text"),
        ("a.txt", "fine\ncafé".encode("latin-1"), r"is not UTF-8 \(line 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2, column 10: not JSON"),
        ("a.jsonl", b'{"body": "a"}', 'line 1: a record with "text" is needed'),
        ("a.jsonl", b"[1]", 'line 1: a record with "text" is needed'),
        ("a.jsonl", b'{"text": " "}', 'line 1: "text" is empty or no string'),
        ("a.jsonl", b'{"text": 3}', 'line 1: "text" is empty or no string'),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "half of a surrogate pair"),
        ("a.json", b'[{"text": "a"}]', "a.json is neither .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(DataError, match="cannot read .*: No such file"):
        read_texts(tmp_path / "missing.txt")


def test_datasets(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "train"}\n')
    assert read_dataset(str(tmp_path), most=2) == ["one", "two"]
    assert read_dataset(f"{tmp_path}::train", most=9) == ["train"]
    with pytest.raises(DataError, match="cannot read the dataset"):
        read_dataset(f"{tmp_path}::validation", most=9)
    with pytest.raises(DataError, match="not of the form"):
        read_dataset("a:b:c:d", most=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text('{"body": "one", "id": 1}\n')
    with pytest.raises(DataError, match="has no column 'text'; its columns are body, id"):
        read_dataset(str(tmp_path / "other"), most=9)


def test_a_dataset_of_a_hub_that_never_answers(silent_hub, monkeypatch):
    loaded = MagicMock(return_value=[{"text": "kept"}])
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    with pytest.raises(DataError, match="some/dataset is no folder here, and the hub cannot be reached"):
        read_dataset("some/dataset:config", most=2)
    silent_hub.accept()[0].close()
    assert not loaded.called
    # Whoever says that there is no hub has it read from what was fetched before.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_dataset("some/dataset", most=2) == ["kept"]
