"""What the README and the documentation tell people to type: the Python is run, and every command.

Commands run on random models of as many layers as the real ones, and on less: what they find is not looked at here.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import datasets
import gradio
import pytest
import torch
from conftest import CAPITALS, random_model, run
from pscope.cli.frame import Frame
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pscope.inputs.entities import read_entities, shipped_entities
from pscope.inputs.queries import read_queries
from pscope.inputs.relations import read_relations, shipped_relations
from pscope.inputs.texts import shipped_texts
from pscope.models import loading

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)


LESS = {
    "fig2": ("--samples", "6"),
    "fig3": ("--new-tokens", "2"),
    "fig4": ("--samples", "4", "--quick", "--new-tokens", "2", "--cot-tokens", "2"),
    "fit": ("--most", "40"),
    "lens": ("--new-tokens", "2"),
    "table2": ("--samples", "4", "--quick", "--new-tokens", "2"),
}
"""What makes a command short."""


def commands():
    """The arguments of every line of pscope that a page shows, but for those that tests of their own run."""
    lines = [(page, line.split("  #")[0]) for page in PAGES for line in "".join(blocks(page, "sh")).splitlines()]
    shown = [(page, re.search(r"(?:^|&& |-m |')pscope (.+?)'?$", line.strip())) for page, line in lines]
    return [
        pytest.param(shlex.split(found[1]), id=f"{page.stem}: {found[1]}")
        for page, found in shown
        if found and not found[1].startswith("own-token") and page.stem != "recipes"
    ]


@pytest.fixture(scope="session")
def deep_folders(tokenizer, tmp_path_factory):
    """Random models that are as deep as those that pages name, and narrow."""
    folders = {}
    for name, layers, width in (("smollm2", 30, 16), ("gemma3-270m", 18, 24), ("meta-llama/Llama-3.1-70B", 80, 16)):
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 16}
        model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, **sizes)
        folders[name] = tmp_path_factory.mktemp("models") / Path(name).name
        model.hf.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def run_shown(deep_folders, tmp_path, tmp_path_factory, monkeypatch, loaded_once, unpainted):
    """Runs a command in a folder with the files that pages speak of, and any model name standing for a random one."""
    cache = tmp_path_factory.getbasetemp() / "fits"
    monkeypatch.setenv("PSCOPE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    texts = shipped_texts()[:20]
    Path("mine.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (entities,) = blocks(ROOT / "docs" / "files.md", "csv")
    for name in ("mine.csv", "entities.csv"):
        Path(name).write_text(entities)
    Path("relations").mkdir()
    samples = [
        {"subject": subject, "object": city, "contexts": [f"We saw {subject}."]} for subject, city in CAPITALS.items()
    ]
    relation = {"name": "capital", "kind": "factual", "template": "The capital city of {} is", "samples": samples}
    Path("relations/capital.json").write_text(json.dumps(relation))
    save_file({"W_dec": torch.randn(3, 16)}, "sae.safetensors")
    Path("chat.json").write_text('[{"role": "user", "content": "Where is it?"}]')

    for name in ("load", "outline"):
        of_a_folder = getattr(loading, name)

        def of_any_name(model="smollm2", *more, of_a_folder=of_a_folder, **options):
            return of_a_folder(deep_folders.get(model, deep_folders["smollm2"]), *more, **options)

        monkeypatch.setattr(loading, name, of_any_name)
    few_entities = shipped_entities()[:3]
    monkeypatch.setattr("pscope.inputs.entities.shipped_entities", lambda: few_entities)
    few_relations = [
        replace(relation, samples=relation.samples[:12])
        for relation in shipped_relations()
        if relation.name in ("country capital", "food country")
    ]
    monkeypatch.setattr("pscope.inputs.relations.shipped_relations", lambda: few_relations)
    # A random model knows nothing, so that nothing would be left to ask.
    known = Frame.known
    monkeypatch.setattr(Frame, "known", lambda frame, asked: known(frame, asked) and hoped_for(asked))
    streamed = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **how: streamed)
    monkeypatch.setattr(gradio.Blocks, "launch", interrupted)

    return lambda command, *arguments: run(command, *arguments, *LESS.get(command, ()))


def hoped_for(asked):
    table = asked.hoped_for()
    return dict(zip(table["text"], table["continuation"], strict=True))


def interrupted(page, **how):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("page", "printed"), [("README.md", ["0 ' -> CEO", "clean "]), ("docs/python.md", ["0 ' -> CEO", "Continuations("])]
)
def test_the_python_of_a_page_runs(page, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), names)
    told = capsys.readouterr().out
    assert all(piece in told for piece in printed)


@pytest.mark.parametrize("arguments", commands())
def test_a_command_that_is_shown_runs(arguments, run_shown, tmp_path):
    command, *rest = [
        re.sub("^/shared", str(tmp_path), each.replace("$SLURM_ARRAY_TASK_ID", "3")) for each in arguments
    ]
    if command in ("resume", "show"):
        assert run_shown("fig3", "mine.csv", "--layers", "0", "--out", rest[-1]).exit_code == 0
    if "my-maps" in rest and command != "fit":
        assert run_shown("fit", "--texts", "mine.jsonl", "--out", "my-maps").exit_code == 0
    result = run_shown(command, *rest)
    if "--tensor-parallel" in rest:
        # Of torchrun's processes, which tests/test_processes.py starts, this is one.
        assert "--tensor-parallel needs several processes: torchrun" in result.stderr
    else:
        assert result.exit_code == (130 if command == "app" else 0), result.output


@pytest.mark.usefixtures("loaded_once")
def test_the_space_that_is_shown_is_launched(monkeypatch):
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **how: launched.append(page))
    (block,) = blocks(ROOT / "docs" / "space.md", "python")
    exec(compile(block, "app.py", "exec"), {})
    assert len(launched) == 1


def test_the_files_that_are_shown_are_read(tmp_path):
    page = ROOT / "docs" / "files.md"
    (entities,), (relation, queries) = blocks(page, "csv"), blocks(page, "json")
    for name, text in (("e.csv", entities), ("r.json", relation), ("q.json", queries)):
        (tmp_path / name).write_text(text)
    assert [entity.group for entity in read_entities(tmp_path / "e.csv")] == ["food", "places"]
    ((capital,), skipped) = read_relations(tmp_path / "r.json")
    assert (capital.samples[0].object, len(capital.samples[0].sources), skipped) == ("Tokyo", 2, [])
    ((query,), _) = read_queries(tmp_path / "q.json")
    assert (query.text, query.bridge) == ("The capital city of the country of origin of sushi", ("Japan",))
