"""Generates parameters for every region of the target city from its prompt; leaves them in the output folder.

The third stage of `python -m experiments.transfer`, with the same flags and the same folder; runs what comes before
where the folder does not hold it.

    python -m experiments.generate --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

import jax

from experiments import command_line
from experiments.stages import Run, stage_main


def show(run: Run) -> None:
    """Generates what the folder does not hold yet, and says how much."""
    for city, params in zip(run.target_cities, run.generated, strict=True):
        samples, regions = jax.tree.leaves(params)[0].shape[:2]
        print(f"{city.name}: {samples} parameter vectors for each of {regions} regions")
    print(run.folder / "generated")


if __name__ == "__main__":
    command_line.run(stage_main(show))
