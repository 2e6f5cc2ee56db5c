"""Shows what a run's prompts say: a projection, nearest regions across cities, and what prompts identify and predict.

With the same flags and the same folder as `python -m experiments.transfer`; runs what comes before where the folder
does not hold it: the encoders of the prompts and the harvest. Writes prompts.html and prompts.json into the folder. Of
the target's readings only the support days are used.

    python -m experiments.inspect_prompts --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run
from gpdiff_jax.analysis.prediction import ParameterPrediction
from gpdiff_jax.report.prompts import part_label


def prediction_table(prediction: ParameterPrediction) -> str:
    """The share of variance and the error of every predictor, city by city, as plain text."""
    lines = [f"{'left out':28s} {'predictor':44s} {'R2':>8s} {'within':>8s} {'MAE':>8s}"]
    for one in prediction.predicted:
        shares = f"{one.r2:8.3f} {one.r2_within:8.3f} {one.mae:8.4f}"
        lines.append(f"{one.city:28s} {part_label(one.predictor):44s} {shares}")
    return "\n".join(lines)


def show(run: Run) -> None:
    """Writes the page and its numbers, and prints the table of predictions."""
    prediction = run.inspect_prompts()
    if prediction is not None:
        print(prediction_table(prediction))
    print(run.folder / "prompts.html")


if __name__ == "__main__":
    command_line.run(run_main(show, on_hosts=False))
