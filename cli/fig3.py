"""`pscope fig3`: how well entities are described from each layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pscope.cli.across import LensOption, fit_across, refuse_lens_alone, target_prompts
from pscope.cli.console import out, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import TargetModelOptions, seed_option
from pscope.cli.prompts import NameOptions, StopAtCommaOption, TargetOptions

from pscope.errors import PscopeError


@command
def fig3(
    frame: Frame,
    *,
    entities: Annotated[
        Path | None,
        typer.Argument(
            help='A .json, .jsonl or .csv file of "entity", "reference" and perhaps "group".',
            show_default="those that ship",
        ),
    ] = None,
    names: NameOptions,
    target: TargetOptions,
    target_model: TargetModelOptions,
    lens: LensOption = None,
    stop_at_comma: StopAtCommaOption = True,
    seed: Annotated[int, seed_option("the order, the random vectors, the halves and the bands")] = 0,
) -> None:
    """Figure 3: how well entities are described from each layer, by ROUGE-L against references.

    Every entity's state is patched over the placeholder of a prompt that describes entities. Beside it stand the
    controls: another entity's state, a random vector of the same norm, the placeholder alone, and, as the ceiling,
    the name written out in its place. With --target-model, that model describes, from what states are mapped to; beside
    it stand both models describing from their own, the mean state, and maps fitted on shuffled pairs.
    """
    refuse_lens_alone(lens, target_model)
    from pscope.inputs.entities import read_entities, shipped_entities, without_demonstrated

    all_entities = shipped_entities() if entities is None else read_entities(entities)
    source_model = frame.load()
    model = frame.load_target(target_model, source_model)

    import pscope
    from pscope.experiments.entity_resolution import EntityDescriptions, best_layers, name_prompt, summarise
    from pscope.experiments.entity_resolution_across import DescriptionsAcross
    from pscope.show.entity_resolution import across_table, best_table, entity_figure, layers_tables

    pairs = names.pairs(model, source_model)
    prompt, own = target_prompts(target, pscope.ENTITY_DESCRIPTION, model, source_model)
    kept, demonstrated = without_demonstrated(all_entities, prompt)
    if not kept:
        raise PscopeError("no entity is left: the target prompt speaks of all of them")
    decoding = names.decoding(stop_at_comma=stop_at_comma)
    frame.read([prompt.text, *(repr(asdict(entity)) for entity in kept)])
    options: dict[str, Any] = {"before": names.before, "seed": seed, "memory": frame.memory}
    experiment: EntityDescriptions | DescriptionsAcross
    if model is source_model:
        experiment = EntityDescriptions(model, prompt, kept, pairs, decoding, **options)
    else:
        mappings = fit_across(frame, source_model, model, pairs, lens)
        experiment = DescriptionsAcross(source_model, model, (own, prompt), mappings, kept, pairs, decoding, **options)
    if demonstrated:
        tell(f"left out, since the target prompt speaks of them: {', '.join(entity.name for entity in demonstrated)}")
    if at_sink := sum(name_prompt(source_model, entity.name, names.before).at_sink for entity in kept):
        tell(f"{at_sink} of {len(kept)} names are read at the very first token, where models keep an attention sink")
    table = frame.carry_out(
        experiment,
        entities=str(entities or "shipped with pscope"),
        left_out=[entity.name for entity in demonstrated],
        pairs=pairs,
        target=prompt.text,
        target_model=model.name,
        target_positions=prompt.positions,
        stop=decoding.stop,
        seed=seed,
    )
    summary, best = summarise(table, seed), best_layers(table, seed)
    frame.run.note("summary", summary)
    frame.run.note("best_layers", best)
    origin = "" if model is source_model else f" from states of {source_model.name}"
    figure = frame.run.draw(entity_figure(summary, f"{model.name}{origin}, {len(kept)} entities"))
    frame.finish()
    across = [] if model is source_model else [across_table(summary)]
    out.print(*layers_tables(summary), *across, *([best_table(best)] if len(best) else []))
    tell(f"table: {frame.run.folder / 'table.parquet'}\nfigure: {figure}")
