"""Target prompts that go by a name: those of the literature, and the questions of the relations that ship."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from pscope.arguments import excerpt
from pscope.errors import DataError
from pscope.inputs.relations import PLACEHOLDER, shipped_relations


@dataclass(frozen=True)
class Target:
    """A prompt to patch: `at` is its placeholder, as `--target-at` takes it; `asks` and `source` are for people."""

    name: str
    text: str
    at: str
    asks: str
    source: str


@cache
def shipped_targets() -> dict[str, Target]:
    """The targets that come with pscope, by name."""
    targets = [
        Target(**record) for record in json.loads(files("pscope.data").joinpath("targets.json").read_text("utf-8"))
    ]
    targets += [
        Target(
            relation.name.replace(" ", "-"),
            relation.target.text,
            PLACEHOLDER,
            f"the relation {relation.name}",
            "table2",
        )
        for relation in shipped_relations()
    ]
    return {target.name: target for target in targets}


def named_target(name: str) -> Target | None:
    """The target of that name, if there is one. Raises DataError for what is nearly a name."""
    targets = shipped_targets()
    if not isinstance(name, str):
        raise DataError(f"a target is named by a text, not by {excerpt(name)}")
    if name not in targets and (near := get_close_matches(name, targets, n=1, cutoff=0.8)):
        raise DataError(f"there is no target {name!r}; did you mean {near[0]}? `pscope targets` lists all")
    return targets.get(name)
