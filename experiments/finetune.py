"""Fine-tunes the chosen few-shot methods on the target's support days; leaves their forecasts in the output folder.

The fourth stage of `python -m experiments.transfer`, with the same flags and the same folder; runs what comes before
where the folder does not hold it.

    python -m experiments.finetune --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Fine-tunes what the folder does not hold yet, and prints what the validation day chose."""
    for method in run.settings.methods:
        if not method.endswith("_few_shot") and method != "target_only":
            continue
        for channel, city in enumerate(run.target_cities):
            result = run.forecast(method, channel)
            print(
                f"{city.name} {method}: learning rate {result.learning_rate}, {result.steps} steps, "
                f"validation MAE {result.validation_mae}"
            )


if __name__ == "__main__":
    command_line.run(run_main(show))
