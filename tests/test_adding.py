"""The worked example of `docs/adding-an-experiment.md`, from its experiment to its test, as it is written there."""

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from pscope.cli.app import app
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-an-experiment.md").read_text("utf-8")
FILES = dict(re.findall(r"Save this as `([\w/]+)\.py`.*?```python\n(.*?)```", PAGE, re.S))


@pytest.fixture
def example(monkeypatch):
    """The four files of the page, as the modules that they would be."""
    for path, code in FILES.items():
        name = re.sub("^cli", "pscope/cli", path).replace("/", ".")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, f"{path}.py", "exec"), vars(module))
    command = sys.modules["pscope.cli.own_token"].own_token
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    app.command()(command)
    return import_module("tests.test_own_token")


def test_the_worked_example_is_an_experiment_a_figure_a_command_and_a_test(
    example, smollm2, loaded_once, tmp_path, monkeypatch
):
    assert list(FILES) == [
        "pscope/experiments/own_token",
        "pscope/show/own_token",
        "cli/own_token",
        "tests/test_own_token",
    ]
    monkeypatch.chdir(tmp_path)
    example.test_a_token_is_named_as_by_one_row_passes(smollm2)
    result = CliRunner().invoke(app, ["own-token", "--samples", "4", "--out", "run"])
    assert result.exit_code == 0, result.output
    assert Path("run/figure.png").exists()
    table = pd.read_parquet("run/table.parquet")
    assert len(table) == 4 * 2 * 31


def test_the_worked_example_passes_the_linter(tmp_path):
    # Beside all others: what is of the project and what is not is told by what is there.
    for folder in ("pscope", "cli", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, code in FILES.items():
        (tmp_path / path).with_suffix(".py").write_text(code)
    files = [f"{path}.py" for path in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
