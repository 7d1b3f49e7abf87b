"""What a run leaves on disk: a folder with its settings, its table as it grows, and what was made of it."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from matplotlib import rc_context
from matplotlib.figure import Figure

from pscope.errors import RunError
from pscope.experiments.experiment import Unit
from pscope.files import beside, written_whole
from pscope.runs.parts import Parts

SETTINGS = "settings.json"
STAGES = ("known", "table", "said")
"""What the model knows unpatched, where that decides over what there is to read; the table of the run; and what is said
where the table tells that it is worth hearing.
"""

TABLE = STAGES[1]

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Run:
    """A folder with `settings.json`, finished parts, `table.parquet` once it is whole, notes, and figures.

    Whoever writes its settings or joins its parts holds its `lock`; other processes may add parts meanwhile. A file is
    there whole or not at all. Raises RunError where something cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new_folders: list[Path] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What `settings.json` holds. Raises RunError if it is none of ours."""
        path = self.folder / SETTINGS
        try:
            settings = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise RunError(f"{self.folder} is no run: cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise RunError(f"{path} is not JSON, so the run cannot be read: {error}") from error
        if not isinstance(settings, dict) or not isinstance(settings.get("command"), str):
            raise RunError(f'{path} is not that of a run: it names no "command"')
        return settings

    def begin(self, settings: Mapping[str, object]) -> bool:
        """Make the folder and write its first settings, unless another process has just done so: then False."""
        self._new_folders = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = beside(self.folder / SETTINGS)
            try:
                _write_json(settings, unfinished, indent=2)
                _link(unfinished, self.folder / SETTINGS)
            finally:
                unfinished.unlink(missing_ok=True)
        except FileExistsError:
            return False
        except BaseException as error:
            self.leave_nothing()
            if isinstance(error, OSError):
                raise _cannot_write(self.folder, error) from error
            raise
        return True

    @property
    def there(self) -> bool:
        """Whether the run has begun."""
        return (self.folder / SETTINGS).exists()

    @property
    def whole(self) -> bool:
        """Whether its table is there."""
        return (self.folder / f"{TABLE}.parquet").exists()

    @property
    def finished(self) -> int:
        """How many parts and tables of all stages are there."""
        tables = sum((self.folder / f"{stage}.parquet").exists() for stage in STAGES)
        return tables + sum(1 for stage in STAGES for _ in self.parts(stage, []).folder.glob("[0-9]*.parquet"))

    def tell(self, **settings: object) -> None:
        """Add to the settings."""
        with self.lock("settings", wait=True), self._whole(SETTINGS) as path:
            _write_json({**self.settings, **settings}, path, indent=2)

    def agree(self, stage: str, rows: int) -> int:
        """How many rows the parts of a stage have: as many as whoever came first said, now and when gone on with."""
        with self.lock("agreed", wait=True):
            agreed = self.settings.get("rows_per_part", {})
            if (
                not isinstance(agreed, dict)
                or not isinstance(agreed.get(stage, rows), int)
                or agreed.get(stage, rows) < 1
            ):
                raise RunError(
                    f'{self.folder / SETTINGS}: "rows_per_part" is {agreed!r}, from which no part can be made'
                )
            if stage not in agreed:
                self.tell(rows_per_part={**agreed, stage: rows})
            return agreed.get(stage, rows)

    @contextmanager
    def lock(self, name: str = "run", *, wait: bool = False) -> Iterator[None]:
        """Hold the folder, or something in it, while this process lives.

        Raises RunError if another process does, unless told to `wait` for it.
        """
        lock = FileLock(self.folder / f".{name}.lock")
        try:
            lock.acquire(blocking=wait)
        except Timeout as error:
            raise RunError(f"{self.folder} is being written by another process; wait until it has ended") from error
        except NotImplementedError as error:
            raise RunError(f"the file system of {self.folder} has no locks; name another folder with --out") from error
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        try:
            yield
        finally:
            if not wait:
                with suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    @property
    def held(self) -> bool:
        """Whether a process that lives holds the folder, or a share of it."""
        return self.is_held("run", "share-*")

    def is_held(self, *names: str) -> bool:
        """Whether a process that lives holds one of these locks, in which * stands for anything."""
        for path in (path for name in names for path in self.folder.glob(f".{name}.lock")):
            try:
                with FileLock(path, blocking=False):
                    pass
            except Timeout:
                return True
        return False

    def parts(self, stage: str, plan: Sequence[Sequence[Unit]]) -> Parts:
        """The parts of a stage of the run; those of its table are in the folder `parts`."""
        return Parts(self.folder / ("parts" if stage == TABLE else stage), plan)

    def table(self, stage: str = TABLE) -> pd.DataFrame | None:
        """The whole table of a stage, if it is there."""
        path = self.folder / f"{stage}.parquet"
        try:
            return pd.read_parquet(path) if path.exists() else None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is damaged ({error}); delete it, and resume the run") from error

    def rows(self, stage: str = TABLE) -> pd.DataFrame | None:
        """What there is of a stage: the whole table, or the parts of it that are finished; None where nothing is."""
        table = self.table(stage)
        paths = [] if table is not None else sorted(self.parts(stage, []).folder.glob("[0-9]*.parquet"))
        try:
            return pd.concat(map(pd.read_parquet, paths), ignore_index=True) if paths else table
        except (OSError, ValueError) as error:
            raise RunError(f"a part of {self.folder} is damaged ({error}); resume the run") from error

    def keep(self, table: pd.DataFrame, stage: str = TABLE) -> None:
        """Write the whole table of a stage; its parts are needed no longer."""
        with self._whole(f"{stage}.parquet") as path:
            table.to_parquet(path, index=False)

    def clear(self) -> None:
        """Delete the parts of all stages whose tables are whole, and what was held or left on the way."""
        for stage in STAGES:
            if (self.folder / f"{stage}.parquet").exists():
                self._clear_parts(stage)
        for path in self._left_over():
            path.unlink(missing_ok=True)

    def note(self, name: str, what: pd.DataFrame | list[Any]) -> Path:
        """Save something made from the table: a frame as `NAME.csv`, anything else as `NAME.json`; returns its path."""
        suffix = ".csv" if isinstance(what, pd.DataFrame) else ".json"
        with self._whole(f"{name}{suffix}") as path:
            if isinstance(what, pd.DataFrame):
                what.to_csv(path, index=False)
            else:
                _write_json(what, path)
        return self.folder / f"{name}{suffix}"

    def notes(self) -> dict[str, pd.DataFrame]:
        """The frames that were noted, by name; without what cannot be read, and may be somebody else's."""
        notes = {}
        for path in sorted(self.folder.glob("*.csv")):
            with suppress(OSError, ValueError):
                # "None" may be the name of a group.
                notes[path.stem] = pd.read_csv(path, keep_default_na=False, na_values=[""])
        return notes

    def draw(self, figure: Figure, name: str = "figure") -> Path:
        """Save a figure as `NAME.png` and `NAME.svg`; returns the path of the PNG."""
        # Text stays text in the SVG, drawn with the reader's fonts; in the PNG, scripts that matplotlib's own font
        # lacks are boxes, which needs no warning for every character.
        with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            for suffix in ("png", "svg"):
                with self._whole(f"{name}.{suffix}") as path:
                    figure.savefig(path, dpi=200, bbox_inches="tight")
        return self.folder / f"{name}.png"

    def write_page(self, page: str, name: str = "page") -> Path:
        """Save a page as `NAME.html`; returns its path."""
        with self._whole(f"{name}.html") as path:
            path.write_text(page, "utf-8")
        return self.folder / f"{name}.html"

    def leave_nothing(self) -> None:
        """Delete a run that this process began and nobody wants, with the folders made for it that are empty then."""
        # Somebody may have put something into the folder, or begun to use one above; what raised is what is to be seen.
        with suppress(OSError):
            for stage in STAGES:
                (self.folder / f"{stage}.parquet").unlink(missing_ok=True)
                self._clear_parts(stage)
            for path in (*self._left_over(), self.folder / SETTINGS):
                path.unlink(missing_ok=True)
            for path in self._new_folders:
                path.rmdir()

    def set_aside(self) -> None:
        """Take whole tables out of the way, under other names: those of other data than now."""
        for stage in STAGES:
            path = self.folder / f"{stage}.parquet"
            if path.exists():
                path.replace(path.with_suffix(f".before-{time.time_ns()}"))

    def _clear_parts(self, stage: str) -> None:
        folder = self.parts(stage, []).folder
        for path in (*folder.glob("[0-9]*.parquet"), *folder.glob(".[0-9]*.parquet")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def _left_over(self) -> list[Path]:
        """What processes hold, or did not come to rename."""
        return [*self.folder.glob(".*.lock"), *self.folder.glob(".[0-9]*.*")]

    @contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """A path to write to; what stands there afterwards becomes the file `name`, and nothing is left if it fails."""
        path = self.folder / name
        try:
            with written_whole(path) as unfinished:
                yield unfinished
        except OSError as error:
            raise _cannot_write(path, error) from error


def check_writable(folder: Path) -> None:
    """Raise RunError if a new run cannot be written to `folder`; leaves no trace of having tried."""
    try:
        _refuse_used(folder)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = nearest / f".pscope-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out")
    if (folder / SETTINGS).exists():
        if Run(folder).held:
            raise RunError(f"{folder} is being written by another run; name another with --out")
        raise RunError(f"{folder} already holds a run; name another with --out, or go on with `pscope resume {folder}`")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; name a new folder with --out")


def _link(unfinished: Path, path: Path) -> None:
    """Give a file its name, if no other has it: unlike a renaming, this never takes the place of one."""
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("xb") as file:
            file.write(unfinished.read_bytes())


def _write_json(what: object, path: Path, indent: int = 1) -> None:
    # Bytes of a command line that are not UTF-8 become escapes, which JSON reads as what they were.
    path.write_text(f"{json.dumps(what, indent=indent, ensure_ascii=False)}\n", "utf-8", "backslashreplace")


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}")
