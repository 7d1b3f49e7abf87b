"""All benchmarks: tables on the terminal, results.json and figure.png in a folder.

python -m benchmarks
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import pandas as pd
import seaborn as sns
import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import pscope
from benchmarks.floor import floors_compared
from benchmarks.growth import exponents, growth, whole_figure
from benchmarks.half import half_compared
from benchmarks.overhead import NO_HOOK, overheads, wide_llama
from benchmarks.peers import PEERS, installed
from benchmarks.scores import scores_compared
from benchmarks.speaking import speaking_compared
from benchmarks.sweep import STAIRCASE, continuations_compared, logits_compared, sweep_of
from pscope.runs.provenance import versions

console = Console()


def main(
    model: Annotated[str, typer.Option(help="smollm2, gemma3-270m, a hub id, a folder, a .gguf file.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda …", show_default="a GPU if there is one")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows, to see that all answers agree.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also passes of up to 64 × 512 tokens.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and figure.png.")] = Path("benchmark-results"),
) -> None:
    """What patching costs, and against whom: about ten minutes on two cores, twice that on slow ones."""
    if (out / "results.json").exists():
        raise typer.BadParameter(f"{out} holds results already; name another folder with --out")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    began = time.monotonic()
    lm = pscope.load(model, dtype=dtype, device=device)
    samples, batched, speaking, new_tokens = (2, 1, 1, 3) if quick else (32, 4, 2, 20)
    # Seconds for a comparison; all have three rounds at least.
    short, long = (0.0, 0.0) if quick else (2.0, 80.0)
    machine = {
        "processor": f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if lm.device.type == "cuda" else "cpu",
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "versions": versions() | {name: version(PEERS[name].__name__) for name in PEERS if installed(name)},
    }
    console.print(" ".join(f"{name}: {told}" for name, told in machine.items() if name != "versions"))

    sweep = sweep_of(lm, samples)
    results = {}
    results["logits"] = logits_compared(sweep, batched, long)
    _show("logits of a sweep over all layers, per row", results["logits"])
    results["continuations"] = continuations_compared(sweep, new_tokens, speaking, short)
    _show(f"continuations of {new_tokens} tokens, per row", results["continuations"])
    results["scores"] = scores_compared(sweep, new_tokens, speaking, short)
    _show("scores, per row", results["scores"])
    results["speaking"] = speaking_compared(lm, 2 if quick else 10, new_tokens, short)
    _show("rows that wait for those of the next batch, per row", results["speaking"])
    results["floor"] = floors_compared(sweep, new_tokens, short)
    _show("against the bare matrix products", results["floor"])
    most_tokens = 64 * 512 if full else 32 if quick else 512
    results["overhead"] = pd.concat(
        [overheads(each, short, most_tokens) for each in ([lm] if quick else [lm, wide_llama(lm)])], ignore_index=True
    )
    _show("a pass with a hook against one without", _worst(results["overhead"]))
    results["growth"] = growth(lm, quick)
    results["exponents"] = exponents(results["growth"])
    _show("growth: exponents of time and of peak memory", results["exponents"])
    results["fig2"] = whole_figure(lm, 2 if quick else 12, short)
    _show("all of fig2 against forward passes over its source texts", results["fig2"])
    if lm.dtype == torch.float32:
        half = pscope.load(model, dtype="bfloat16", device=device)
        results["bfloat16"] = half_compared(sweep, half, new_tokens, short)
        _show("bfloat16 against float32", results["bfloat16"])
    machine["minutes"] = round((time.monotonic() - began) / 60, 1)

    out.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine} | {name: json.loads(table.to_json(orient="records")) for name, table in results.items()}
    (out / "results.json").write_text(json.dumps(told, indent=2), "utf-8")
    figure(results, machine).savefig(out / "figure.png", dpi=150, bbox_inches="tight")
    console.print(f"{machine['minutes']} minutes; {out / 'results.json'} {out / 'figure.png'}")


def figure(results: dict[str, pd.DataFrame], machine: dict) -> Figure:
    """What a row costs each contestant, what a hook costs, and how far the staircase is from the floor."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        drawn = Figure(figsize=(15, 4.6), layout="constrained")
        rows, hooks, floors = drawn.subplots(1, 3, width_ratios=[1.2, 1, 0.8])
        logits = results["logits"].dropna(subset="seconds").assign(milliseconds=lambda table: 1000 * table["seconds"])
        sns.pointplot(logits, x="milliseconds", y="contestant", linestyle="none", ax=rows)
        for place, row in enumerate(logits.itertuples()):
            told = "" if row.contestant == STAIRCASE else f"{row.ratio:.0f} ×"
            rows.annotate(told, (row.milliseconds, place), xytext=(8, 0), textcoords="offset points", va="center")
        limits = logits["milliseconds"].min() / 2, logits["milliseconds"].max() * 4
        rows.set(xscale="log", xlim=limits, xlabel="Milliseconds per row of logits", ylabel=None)
        patched = results["overhead"][results["overhead"]["contestant"] != NO_HOOK]
        percent = patched.assign(percent=100 * (patched["ratio"] - 1))
        sns.boxplot(percent, x="percent", y="contestant", hue="phase", ax=hooks)
        sns.move_legend(hooks, "lower center", bbox_to_anchor=(0.5, 1), ncols=2, title=None, frameon=False)
        hooks.axvline(0, color="black", linewidth=1)
        hooks.set(xlabel="Time over a pass without a hook (%)", ylabel=None)
        sns.barplot(results["floor"], x="ratio", y="work", ax=floors, color=sns.color_palette()[2])
        floors.axvline(1, color="black", linewidth=1)
        floors.set(xlabel="Times the bare matrix products", ylabel=None)
        drawn.suptitle(f"{machine['model']}, {machine['dtype']}, {machine['threads']} threads, {machine['device']}")
    return drawn


def _worst(overhead: pd.DataFrame) -> pd.DataFrame:
    """Per model, phase and contestant the median and the largest ratio over batches and lengths."""
    hooked = overhead[overhead["contestant"] != NO_HOOK]
    groups = hooked.groupby(["model", "phase", "contestant"], sort=False)["ratio"]
    return groups.agg(median="median", largest="max").reset_index()


def _show(title: str, table: pd.DataFrame) -> None:
    shown = Table(*table.columns, title=title, title_justify="left")
    for row in table.itertuples(index=False):
        shown.add_row(*("absent" if value != value else _told(value) for value in row))
    console.print(shown)


def _told(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
