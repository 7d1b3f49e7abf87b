"""`--dry-run`: what a run would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pscope.cli.console import out, rank, working

if TYPE_CHECKING:
    from pscope.experiments.experiment import Experiment


def show_plan(experiment: Experiment[Any], what: str, device: str | None, rate: float | None) -> None:
    """Print what a stage of a run would take, at a rate in TFLOP/s or the one that is measured here."""
    from pscope.runs.plan import measured_rate, plan
    from pscope.show.tables import facts_table

    planned = plan(experiment)
    measured = rate is None
    with working("Measuring how fast matrices are multiplied here"):
        rate = measured_rate(experiment.model, device) / 1e12 if rate is None else rate
    seconds = planned.flops / (rate * 1e12)
    work = {"sources": planned.reading, "patched prompts": planned.patching, "new tokens": planned.speaking}
    shares = ", ".join(f"{flops / planned.flops:.0%} {name}" for name, flops in work.items())
    at = f"{rate:.3g} TFLOP/s{', as bare matrix products reach here' if measured else ''}"
    facts = (
        ("stage", what),
        ("units", f"{planned.units:,} in {planned.parts:,} parts"),
        ("rows", f"{planned.rows:,}, at most"),
        ("tokens", f"{planned.tokens:,} pass through decoder layers, at most"),
        (
            "memory",
            f"{planned.weight_bytes / 2**30:.3g} GiB for the weights, {planned.pass_bytes / 2**30:.3g} for a pass",
        ),
        ("floor", f"{planned.flops:.3g} FLOPs in matrix products, attention aside: {shares}"),
        ("time", f"{_duration(seconds)} of one process at {at}; of N, an Nth"),
    )
    if rank() == 0:
        out.print(facts_table(facts))


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"
