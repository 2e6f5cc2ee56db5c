"""Generates parameters for every region of a city from its prompt: of a run's target, or of any new city.

As the third stage of `python -m experiments.transfer`, with the same flags and the same folder, it leaves them in the
output folder; it runs what comes before where the folder does not hold it. With --city it needs no run and no training
data: a new city gets parameters and forecasts from its last days, in --out_dir: parameters/, forecast.npz and
generate.json, by the generator in --hypernetwork or, without that, by the package's own.

    python -m experiments.generate --data_dir DIR --sources a,b --target c --out_dir runs/c
    python -m experiments.generate --hypernetwork runs/c/hypernetwork --city new.npz --out_dir runs/new
"""

import jax
from absl import flags

from experiments import command_line
from experiments.new_city import check_flags, new_city_main
from experiments.run_flags import run_main
from gpdiff_jax import Run


def show(run: Run) -> None:
    """Generates what the folder does not hold yet, and says how much."""
    for channel, city in enumerate(run.target_cities):
        samples, regions = jax.tree.leaves(run.generated.params[channel])[0].shape[:2]
        print(f"{city.name}: {samples} parameter vectors for each of {regions} regions")
    print(run.folder / "generated")


def main(argv: list[str]) -> None:
    """A stage of a run, or with --city a new city."""
    check_flags()
    if flags.FLAGS.city is None:
        run_main(show)(argv)
    else:
        new_city_main()


if __name__ == "__main__":
    command_line.run(main)
