"""The README's Python is run as it stands there, on the default model."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text("utf-8"), re.S)


@pytest.mark.usefixtures("loaded_once")
def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "0 ' -> CEO" in printed
    assert "Continuations(" in printed
    assert (tmp_path / "mean.safetensors").exists()
