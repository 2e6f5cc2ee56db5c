"""In: a run. Out: what its generator draws and what its prompts say, measured, as pages and numbers in its folder."""

from typing import Any

import numpy as np

from gpdiff_jax.analysis.diagnostics import DiagnosticsConfig, PromptedTarget, diagnose
from gpdiff_jax.analysis.inspection import Inspection, SeenCity, inspect_cities
from gpdiff_jax.analysis.prediction import ParameterPrediction, predict_parameters
from gpdiff_jax.files import write_json
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.run.stages import Stages, generate_key
from gpdiff_jax.training.progress import stage


def write_diagnosis(run: Stages, config: DiagnosticsConfig) -> dict[str, Any]:
    """Diagnoses the generator of a run and leaves diagnostics.json and diagnostics.html in its folder.

    Args:
      run: the run.
      config: how parameters are drawn, and how many shuffles and windows are measured.

    Returns:
      What diagnostics.json holds.
    """
    # matplotlib takes half a second, which only those pay who draw.
    from gpdiff_jax.report.diagnostics_page import render_diagnostics

    targets = [
        PromptedTarget(
            city.name if len(run.targets) == 1 else city.feature_names[0], target, prompts, generate_key(run, channel)
        )
        for channel, (city, target, prompts) in enumerate(
            zip(run.target_cities, run.targets, run.target_prompts, strict=True)
        )
    ]
    held_out, key = run.latent_space.held_out, run.key("diagnose")
    found = diagnose(run.zoo, run.hypernetwork, held_out, targets, key=key, config=config)
    settings = run.settings
    content = {
        "target": settings.target or run.target_cities[0].name,
        "unit": ", ".join(dict.fromkeys(city.unit for city in run.target_cities)),
        "seed": settings.seed,
        "covariates": settings.data.covariates,
        "protocol": settings.data.protocol,
        **found,
    }
    write_json(run.folder / "diagnostics.json", content)
    render_diagnostics(run.folder)
    return content


def inspect_prompts(run: Stages) -> tuple[Inspection, ParameterPrediction | None]:
    """Inspects the prompts of a run, and predicts its zoo from them.

    Args:
      run: the run.

    Returns:
      What was found; no prediction where there is one source city only, for a city is left out.
    """
    prompted = run.prompted
    sources, row_of_name = [], {name: row for row, name in enumerate(prompted.names)}
    for city, spans in zip(run.source_cities, prompted.prompted_spans, strict=True):
        known = [row_of_name.get(f"{city.name}/{node}") for node in city.node_ids]
        nodes = np.asarray([node for node, row in enumerate(known) if row is not None])
        rows = np.asarray([row for row in known if row is not None])
        prompts = Prompts(prompted.prompts.values[:, rows], prompted.prompts.region_ids[rows], prompted.prompts.names)
        sources.append(SeenCity(city, nodes, spans, prompts))
    targets = [
        SeenCity(city, np.arange(city.num_nodes), (target.split.support,), prompts)
        for city, target, prompts in zip(run.target_cities, run.targets, run.target_prompts, strict=True)
    ]
    inspection = inspect_cities(sources, targets, prompted.prompt_encoder)
    if len(run.source_cities) < 2:
        return inspection, None
    with stage("predict parameters", len(run.source_cities)) as shown:
        prediction = predict_parameters(
            run.zoo, progress=lambda done, metrics: shown.advance(done - shown.completed, **metrics)
        )
    return inspection, prediction


def write_inspection(run: Stages) -> ParameterPrediction | None:
    """Inspects the prompts of a run and leaves prompts.json and prompts.html in its folder.

    Args:
      run: the run.

    Returns:
      How well the prompts predict the zoo; see `inspect_prompts`.
    """
    from gpdiff_jax.report.document import write_page
    from gpdiff_jax.report.prompts import prompt_content, prompt_parts

    inspection, prediction = inspect_prompts(run)
    settings = run.settings
    badges = [
        f"seed {settings.seed}",
        f"support days: {settings.data.support_days}",
        f"parts: {', '.join(settings.prompts.parts)}",
        f"{settings.data.protocol} protocol",
    ]
    target = settings.target or run.target_cities[0].name
    parts = prompt_parts(inspection, prediction, target=target, badges=badges)
    write_json(
        run.folder / "prompts.json",
        {"target": target, "protocol": settings.data.protocol, **prompt_content(inspection, prediction)},
    )
    write_page(run.folder / "prompts.html", f"{target} – prompts of regions", parts)
    return prediction
