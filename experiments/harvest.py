"""Trains the pooled model and every region of the source cities; leaves the parameter zoo in the output folder.

The first stage of `python -m experiments.transfer`, with the same flags and the same folder.

    python -m experiments.harvest --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

import numpy as np

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Harvests what the folder does not hold yet, and says what the regions gained over the pooled model."""
    zoo = run.zoo
    gain = 1.0 - np.nanmean(zoo.validation_mae[:, 0]) / np.nanmean(zoo.start_mae)
    print(f"{run.folder / 'zoo'}: {zoo.num_regions} regions x {zoo.validation_mae.shape[1]} parameter vectors")
    print(f"own parameters cut the validation error of the common start by {100 * gain:.1f} %")


if __name__ == "__main__":
    command_line.run(run_main(show))
