"""What a run leaves on disk: a folder with its settings, its table and its figure."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from pscope.errors import RunError
from pscope.models.model import LanguageModel

_NOT_THE_MODEL = {"_name_or_path", "architectures", "dtype", "transformers_version"}
"""What a config says of where the model came from and how it was saved; the weights' own dtype is looked at."""


class Run:
    """A folder that is written as the run goes: `settings.json`, `table.parquet`, and the figure as PNG and SVG.

    A context manager. Left by an exception, it keeps the table as far as it got and says so in the settings, or, when
    there are no rows yet, leaves nothing behind. Nothing that was there before is touched: raises RunError if the
    folder has anything in it or cannot be written, also later, as when the disk is full. A file is there whole or not
    at all. `rows` is how many the table has once the run is left.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        self.rows = 0
        self._settings = {**settings, "status": "running", "started": datetime.now(timezone.utc).isoformat()}
        self._table: pq.ParquetWriter | None = None
        self._added: list[pa.Table] = []

    def __enter__(self) -> Run:
        self._began = time.perf_counter()
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        check_writable(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "settings.json").touch(exist_ok=False)
        except FileExistsError as error:
            raise RunError(f"{self.folder} was taken by another run just now; name another with --out") from error
        except OSError as error:
            raise RunError(
                f"cannot write to {self.folder}: {error.strerror}; name another folder with --out"
            ) from error
        try:
            self._write_settings()
        except BaseException:
            self._leave_nothing()
            raise
        return self

    def add(self, frame: pd.DataFrame) -> None:
        """Append rows to the table; what was added is on disk when the run is left, however that happens.

        Where they no longer fit, the table keeps those before them, and RunError is raised.
        """
        path = self.folder / "table.parquet"
        table = pa.Table.from_pandas(frame, preserve_index=False)
        try:
            if self._table is None:
                self._table = pq.ParquetWriter(path, table.schema)
            table = table.cast(self._table.schema)
            self._table.write_table(table)
        except OSError as error:
            self._rewrite_table()
            raise _cannot_write(path, error) from error
        self._added.append(table)

    def note(self, name: str, what: pd.DataFrame | list) -> Path:
        """Save something made from the table: a frame as `NAME.csv`, anything else as `NAME.json`; returns its path."""
        if isinstance(what, pd.DataFrame):
            with self._whole(f"{name}.csv") as path:
                what.to_csv(path, index=False)
            return self.folder / f"{name}.csv"
        self._write_json(f"{name}.json", json.dumps(what, indent=1, ensure_ascii=False))
        return self.folder / f"{name}.json"

    def draw(self, figure: Figure, name: str = "figure") -> Path:
        """Save a figure as `NAME.png` and `NAME.svg`; returns the path of the PNG."""
        # Text stays text in the SVG, drawn with the reader's fonts; in the PNG, scripts that matplotlib's own font
        # lacks are boxes, which needs no warning for every character.
        with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            for suffix in ("png", "svg"):
                with self._whole(f"{name}.{suffix}") as path:
                    figure.savefig(path, dpi=150, bbox_inches="tight")
        return self.folder / f"{name}.png"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = self._close_table()
        stopped = error or full
        if stopped is not None and not self.rows:
            self._leave_nothing()
        else:
            self._settings["status"] = "complete" if stopped is None else f"stopped by {type(stopped).__name__}"
            self._settings["seconds"] = round(time.perf_counter() - self._began, 1)
            self._settings["rows"] = self.rows
            try:
                self._write_settings()
            except RunError as failure:
                # Those of the start still stand.
                full = failure
        if error is None and full is not None:
            raise full

    def _close_table(self) -> RunError | None:
        """Close the table, count its rows, and say if it could not be written as it is."""
        if self._table is None:
            return None
        path, full = self.folder / "table.parquet", None
        try:
            self._table.close()
        except OSError as error:
            full = _cannot_write(path, error)
            self._rewrite_table()
        # Counted by the file, since Ctrl-C may come between a write and any counting of ours.
        self.rows = pq.read_metadata(path).num_rows if path.exists() else 0
        return full

    def _rewrite_table(self) -> None:
        """Where the disk is full: a table of what was added before, as much of it as fits."""
        path = self.folder / "table.parquet"
        for end in range(len(self._added), -1, -1):
            with suppress(OSError):
                # A writer that failed may hold the file open, and so its room.
                os.truncate(path, 0)
                path.unlink()
            if end == 0:
                return
            with suppress(OSError), pq.ParquetWriter(path, self._added[0].schema) as writer:
                for table in self._added[:end]:
                    writer.write_table(table)
                return

    def _leave_nothing(self) -> None:
        # Somebody else may have begun to use a folder above; what raised is what is to be seen.
        with suppress(OSError):
            for name in ("settings.json", "table.parquet"):
                (self.folder / name).unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()

    def _write_settings(self) -> None:
        self._write_json("settings.json", json.dumps(self._settings, indent=2, ensure_ascii=False))

    def _write_json(self, name: str, text: str) -> None:
        with self._whole(name) as path:
            # Bytes of a command line that are not UTF-8 become escapes, which JSON reads as what they were.
            path.write_text(f"{text}\n", "utf-8", "backslashreplace")

    @contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """A path to write to; what stands there afterwards becomes the file `name`, and nothing is left if it fails."""
        path, beside = self.folder / name, self.folder / f".{name}"
        try:
            yield beside
            beside.replace(path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise RunError if a run cannot be written to `folder`; leaves no trace of having tried."""
    try:
        _refuse_used(folder)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = nearest / f".pscope-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}")


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out")
    if (folder / "settings.json").exists():
        raise RunError(f"{folder} already holds a run; name another folder with --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; name a new folder with --out")


def describe(model: LanguageModel) -> dict:
    """What a reader of a run must know of the model, the fingerprint of its weights included."""
    return {
        "name": model.name,
        "class": type(model.hf).__name__,
        "layers": model.n_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "fingerprint": fingerprint(model),
    }


def versions() -> dict[str, str]:
    """The versions that numbers may depend on, and the number of threads."""
    packages = {name: version(name) for name in ("pscope", "torch", "transformers", "tokenizers")}
    return {"python": platform.python_version(), **packages, "threads": str(torch.get_num_threads())}


def fingerprint(model: LanguageModel, most: int = 4096) -> str:
    """A SHA-256 over the config and, of every weight, its name, shape, dtype and up to `most` evenly spaced values.

    Two checkpoints of one architecture differ in it; reading a few values keeps it instant for a model of any size.
    Weights that are offloaded count by name, shape and dtype.
    """
    config = {key: value for key, value in model.hf.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.hf.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            values = weight.flatten()[:: max(1, weight.numel() // most)]
            digest.update(values.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
