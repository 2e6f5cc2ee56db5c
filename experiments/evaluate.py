"""Compares all methods on the target's test span; writes metrics, tables, forecasts and the report.

The last stage of `python -m experiments.transfer`, with the same flags and the same folder; runs what comes before
where the folder does not hold it.

    python -m experiments.evaluate --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Writes the results and prints the table of methods."""
    print(run.table())
    print(run.folder / "report.html")


if __name__ == "__main__":
    command_line.run(run_main(show))
