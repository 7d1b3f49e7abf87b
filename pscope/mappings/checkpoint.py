"""How far a long fit has come, in a file: what was killed goes on from there, and ends as it would have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pscope.errors import PscopeError
from pscope.files import written_whole


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file at `path` for a fit that is all told by `of`, values of JSON. Without a path nothing is kept.

    It is written beside and renamed, so that nobody sees half of one.
    """

    path: Path | None
    of: Mapping[str, object]

    def read(self) -> dict[str, Tensor]:
        """The tensors that were kept, on the CPU; none where there is no file.

        Raises PscopeError for a file that cannot be read, or that belongs to another fit, naming what differs.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                in_file = json.loads((file.metadata() or {}).get("of", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise PscopeError(f"{self.path} is no checkpoint that can be read: {error}; delete it") from error
        of = json.loads(self._of)
        if other := sorted(name for name in of.keys() | in_file.keys() if of.get(name) != in_file.get(name)):
            raise PscopeError(
                f"{self.path} is a checkpoint of another fit: the {', '.join(other)} differ; delete it, or name another"
            )
        return tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in the place of those that were kept. Raises PscopeError where the file cannot be written."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with written_whole(self.path) as unfinished:
                save_file(copies, unfinished, {"of": self._of})
        except (OSError, SafetensorError) as error:
            raise PscopeError(f"cannot write {self.path}: {error}") from error

    @property
    def _of(self) -> str:
        return json.dumps(self.of, sort_keys=True)
