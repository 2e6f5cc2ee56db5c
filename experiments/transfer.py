"""The main job: a folder of city files in, forecasts of a city with almost no data out.

Harvests every region of the source cities, pre-trains the generator, generates parameters for the target's regions
from their prompts, fine-tunes them on its support days, and compares all methods on its last 30 %, leak-free. After
GPDiff (Yuan et al., ICLR 2024, arXiv 2402.11922).

    python -m experiments.transfer --out_dir runs/demo
    python -m experiments.transfer --data_dir DIR --sources a,b --target c --support_days 3 --out_dir runs/c
"""

import time

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Runs what the output folder does not hold yet, and prints the table of methods."""
    begin = time.monotonic()
    print(run.table())
    print(f"{run.folder / 'report.html'} ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    command_line.run(run_main(show))
