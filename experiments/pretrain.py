"""Pre-trains the parameter generator on the zoo; leaves the hypernetwork in the output folder.

The second stage of `python -m experiments.transfer`, with the same flags and the same folder; harvests first where the
folder holds no zoo.

    python -m experiments.pretrain --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Trains what the folder does not hold yet, and prints what the generator is."""
    print(run.hypernetwork.summary())
    print(run.folder / "hypernetwork")


if __name__ == "__main__":
    command_line.run(run_main(show))
