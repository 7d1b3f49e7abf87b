"""The recipes of the documentation, as they are written there, on the default model."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from conftest import run

import pscope
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM

RECIPES = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
WORDS = re.search(r"these 20 here: (.*?)\.", RECIPES, re.DOTALL)[1].replace("\n", " ").split(", ")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, loaded_once):
    monkeypatch.chdir(tmp_path)
    assert len(WORDS) == 20
    Path("words.txt").write_text("\n".join(WORDS))
    Path("ask.json").write_text(*code("A concept", "json"))


def code(title, language):
    """The blocks of one recipe in a language."""
    (section,) = [part for part in RECIPES.split("\n## ")[1:] if part.startswith(title)]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def lines(block):
    return sum(bool(line.strip()) for line in block.splitlines())


def said(command):
    """What each row of a command says, by condition."""
    _, *arguments = shlex.split(command)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return pd.DataFrame(json.loads(result.stdout))


def texts(table, condition, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table.loc[table["condition"] == condition, "continuation"].tolist()


def test_selfie():
    (command,) = code("SelfIE", "sh")
    table = said(command)
    assert all("restaurant" in text for text in texts(table, PATCHED, layer=6))
    assert all("kitchen" in text for text in texts(table, PATCHED, layer=14))
    assert not any("restaurant" in text or "kitchen" in text for text in texts(table, RANDOM) + texts(table, CLEAN))
    owed = dict(json.loads(table["relevance"].dropna().iloc[-1]))
    assert owed[" kitchen"] > 0.1


def test_words_from_tokens():
    (command,) = code("Words from tokens", "sh")
    table = said(command)
    for text, word in (("an archipelago", "island"), ("A rhinoceros", "elephant"), ("the Eiffel", "landmarks")):
        assert word in texts(table, PATCHED, source=text)[0]
        assert word not in texts(table, RANDOM, source=text)[0]


def test_directions_of_a_dictionary():
    (command,), (made,) = code("Directions", "sh"), code("Directions", "python")
    assert lines(made) < 20
    exec(made, {})
    table = said(command)
    for number, kind in enumerate([("country",), ("fruit",), ("creature",), ("tool", "cut")]):
        for scale in (1, 2):
            rows = texts(table, PATCHED, source=f"kinds {number}", scale=scale)
            assert all(any(word in text for word in kind) for text in rows)
    assert not any(word in text for text in texts(table, RANDOM) for word in ("country", "fruit", "creature"))


def test_what_a_finetune_has_learnt():
    (made,) = code("What a finetune", "python")
    assert lines(made) < 20
    found = {}
    exec(made, found)
    table = found["table"]
    tokens = {condition: set(rows["next_token"].str.strip()) for condition, rows in table.groupby("condition")}
    about = {"dough", "yeast", "rye", "baker", "wheat", "flour", "bread", "oven"}
    assert len(tokens[PATCHED] & about) >= 3
    assert not (tokens[RANDOM] | tokens[CLEAN]) & about


def test_a_concept_injected():
    described, asked = code("A concept", "sh")
    table = said(described)
    assert all("Paris" in text or "City" in text for text in texts(table, PATCHED))
    assert not any("Paris" in text or "City" in text for text in texts(table, RANDOM))
    assert not any("Paris" in text for text in texts(said(asked), PATCHED))


def test_back_patching():
    (command,) = code("Back-patching", "sh")
    table = said(command)
    assert sum("Steve Jobs" in text for text in texts(table, PATCHED)) == 7
    assert not any("Steve Jobs" in text for text in texts(table, RANDOM) + texts(table, CLEAN))


def test_an_entity_inside_a_longer_prompt():
    (command,) = code("An entity", "sh")
    table = said(command)
    assert [text.strip(": ,") for text in texts(table, PATCHED)[:12]] == ["Japanese dish"] * 12
    assert not any("Japanese" in text and "dish" in text for text in texts(table, RANDOM))


def test_the_mean_of_twenty_countries(smollm2):
    from pscope.inputs.relations import shipped_relations

    (countries,) = [relation for relation in shipped_relations() if relation.name == "country capital"]
    prompts = [smollm2.prompt(f"\n{sample.subject}") for sample in countries.samples[:20]]
    mean = pscope.States.of(smollm2, prompts, layers=[4, 8, 12]).mean()
    target = smollm2.prompt(pscope.ENTITY_DESCRIPTION)
    table = pscope.Reading(smollm2, target, mean, [2, 4], pscope.Decoding(8, stop=(",",))).table()
    assert all(re.search("(?i)country|nation", text) for text in texts(table, PATCHED))
    assert not any(re.search("(?i)country|nation", text) for text in texts(table, CLEAN))
