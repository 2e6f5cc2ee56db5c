"""In: a folder. Out: everything that the loop trains, with checkpoints in it; a process that is there to be killed."""

import pathlib
import sys

import jax
import numpy as np

from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from tests.training.users import USERS, prepare


def main(folder: pathlib.Path) -> None:
    """Trains what the folder does not hold yet."""
    enable_compilation_cache()
    cities = simulate_cities(SimulationConfig(cities=2, regions=8, days=14), seed=0)
    sources = prepare(cities)
    for name, train_it in USERS.items():
        if not (folder / f"{name}.npz").exists():
            made = train_it(cities, sources, 10, devices=jax.local_devices()[:1], checkpoints=folder / name)
            leaves = {str(place): np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(made))}
            np.savez(folder / f"{name}.npz", **leaves)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
