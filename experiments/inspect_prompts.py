"""Shows what a run's prompts say: a projection, nearest regions across cities, and what prompts identify and predict.

With the same flags and the same folder as `python -m experiments.transfer`; runs what comes before where the folder
does not hold it: the encoders of the prompts and the harvest. Writes prompts.html and prompts.json into the folder. Of
the target's readings only the support days are used.

    python -m experiments.inspect_prompts --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

import numpy as np

from experiments import command_line
from experiments.run_folder import write_json
from experiments.stages import Run, stage_main
from gpdiff_jax.analysis.inspection import Inspection, SeenCity, inspect_cities
from gpdiff_jax.analysis.prediction import ParameterPrediction, predict_parameters
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.report.document import write_page
from gpdiff_jax.report.prompts import part_label, prompt_content, prompt_parts
from gpdiff_jax.training.progress import stage


def inspect(run: Run) -> tuple[Inspection, ParameterPrediction | None]:
    """Inspects the prompts of a run, and predicts its zoo from them.

    Args:
      run: the run.

    Returns:
      What was found; no prediction where there is one source city only, for a city is left out.
    """
    prompted = run.prompted
    sources, names = [], {name: row for row, name in enumerate(prompted.names)}
    for city, spans in zip(run.source_cities, prompted.spans, strict=True):
        known = [names.get(f"{city.name}/{node}") for node in city.node_ids]
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


def prediction_table(prediction: ParameterPrediction) -> str:
    """The share of variance and the error of every predictor, city by city, as plain text."""
    lines = [f"{'left out':28s} {'predictor':44s} {'R2':>8s} {'within':>8s} {'MAE':>8s}"]
    for one in prediction.predicted:
        shares = f"{one.r2:8.3f} {one.r2_within:8.3f} {one.mae:8.4f}"
        lines.append(f"{one.city:28s} {part_label(one.predictor):44s} {shares}")
    return "\n".join(lines)


def show(run: Run) -> None:
    """Writes the page and its numbers, and prints the table of predictions."""
    inspection, prediction = inspect(run)
    settings = run.settings
    badges = [
        f"seed {settings.seed}",
        f"support days: {settings.data.support_days}",
        f"parts: {', '.join(settings.prompts.parts)}",
    ]
    target = settings.target or run.target_cities[0].name
    parts = prompt_parts(inspection, prediction, target=target, badges=badges)
    write_json(run.folder / "prompts.json", {"target": target, **prompt_content(inspection, prediction)})
    path = write_page(run.folder / "prompts.html", f"{target} – prompts of regions", parts)
    if prediction is not None:
        print(prediction_table(prediction))
    print(path)


if __name__ == "__main__":
    command_line.run(stage_main(show))
