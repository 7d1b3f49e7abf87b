"""What the package imports and what it offers, read from the source."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import pscope

ROOT = Path(__file__).parents[1]


def imported(folder: str) -> set[str]:
    """The modules that the files of a folder import from elsewhere, with the names they take from them."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    own = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"pscope", "benchmarks", "docs"}
    return {module for module in found if module.split(".")[0] not in own | set(sys.stdlib_module_names)}


def declared(*extras: str) -> set[str]:
    """The distributions that pscope asks for, and with extras those of them."""
    asked = [line.partition("; extra ==") for line in requires("pscope")]
    return {
        re.match(r"[\w-]+", name)[0].lower().replace("_", "-")
        for name, _, of in asked
        if not of or of.strip(" \"'") in extras
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("pscope", ["adapters", "app"]), ("cli", ["app"]), ("tests", ["test"]), ("benchmarks", ["test"])],
)
def test_what_is_imported_is_declared(folder, extras):
    distributions = packages_distributions()
    needed = {distributions[module.split(".")[0]][0].lower().replace("_", "-") for module in imported(folder)}
    assert needed
    assert needed <= declared(*extras)


def test_only_what_transformers_exports_is_imported():
    private = {
        module for folder in ("pscope", "cli") for module in imported(folder) if module.startswith("transformers.")
    }
    assert private == set()


def test_editors_see_the_public_names():
    tree = ast.parse(Path(pscope.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    seen = {(line.module, alias.name, alias.asname) for line in block.body for alias in line.names}
    assert seen == {(f"pscope.{module}", name, name) for name, module in pscope._HOME.items()}
    for module, name, _ in seen:
        assert getattr(pscope, name) is getattr(sys.modules[module], name)
    assert (ROOT / "pscope" / "py.typed").is_file()


@pytest.mark.parametrize("parts", [2, 9], ids=["rooms", "files"])
def test_imports_point_downwards(parts):
    graph: dict[str, set[str]] = {}
    for folder, package in ((ROOT / "pscope", "pscope"), (ROOT / "cli", "pscope.cli")):
        for path in folder.rglob("*.py"):
            name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            used = graph.setdefault(".".join(name.split(".")[:parts]), set())
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("pscope.") and name != "pscope.__init__":
                    modules = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                    used.update(".".join(module.split(".")[:parts]) for module in modules)
            used.discard(".".join(name.split(".")[:parts]))
    assert len(graph) > parts
    # Raises CycleError, which tells the way up.
    TopologicalSorter(graph).prepare()
