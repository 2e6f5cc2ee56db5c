"""In: how many simulated cities to draw, how large, of which kind, and a seed.
Out: one city file `NAME.npz` per city, in the layout that every other experiment reads.

    python -m experiments.simulate_cities --out_dir data/simulated --kind both --seed 0
"""

import pathlib

from absl import flags

from experiments import command_line
from gpdiff_jax.cities import SimulationConfig, save_city, simulate_cities
from gpdiff_jax.errors import InputError

_OUT_DIR = flags.DEFINE_string("out_dir", None, "Folder to write the city files to; made if absent.", required=True)
_KIND = flags.DEFINE_enum("kind", "crowd", ["crowd", "speed", "both"], "What the cities measure.")
_CITIES = flags.DEFINE_integer("cities", 4, "Cities of each kind.", lower_bound=1, upper_bound=1000)
_REGIONS = flags.DEFINE_integer("regions", 24, "Regions of each city.", lower_bound=2, upper_bound=1000)
_DAYS = flags.DEFINE_integer("days", 28, "Days of each series.", lower_bound=2, upper_bound=3660)
_INTERVAL = flags.DEFINE_integer(
    "interval_minutes", 60, "Minutes per step; must divide 60.", lower_bound=1, upper_bound=60
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**31 - 1)


def main(argv: list[str]) -> None:
    """Simulate the cities and write them."""
    del argv
    kinds = ("crowd", "speed") if _KIND.value == "both" else (_KIND.value,)
    configs = [
        SimulationConfig(
            cities=_CITIES.value, regions=_REGIONS.value, days=_DAYS.value, interval_minutes=_INTERVAL.value, kind=kind
        )
        for kind in kinds
    ]
    out_dir = pathlib.Path(_OUT_DIR.value)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`out_dir` (={out_dir}) cannot be made ({error.strerror}); choose another folder") from None
    for config in configs:
        for city in simulate_cities(config, seed=_SEED.value):
            path = out_dir / f"{city.name}.npz"
            save_city(path, city)
            print(
                f"{path}: {city.num_steps} steps of {city.interval_minutes} min, {city.num_nodes} regions, {city.unit}"
            )


if __name__ == "__main__":
    command_line.run(main)
