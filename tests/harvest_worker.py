"""In: a folder. Out: a small zoo in it, chunk by chunk; a process of its own, for a test to kill."""

import pathlib
import sys

import jax

from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.models import make_model
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import initial_params
from gpdiff_jax.zoo.region_training import HarvestConfig

_CONFIG = HarvestConfig(steps=1200, windows=8, evaluate_every=400, snapshots=2, anchor_windows=0, patience=9)


def main(folder: pathlib.Path) -> None:
    """Harvests sixteen regions in eight chunks of some tenths of a second each."""
    enable_compilation_cache()
    cities = simulate_cities(SimulationConfig(cities=2, regions=8, days=14), seed=0)
    data = DataConfig(covariates="calendar", variants=2, max_neighbours=3)
    sources = with_prompts(prepare_sources(cities, data, key=jax.random.key(0), validation_windows=12), cities)
    model = make_model("stid", sources.sizes)
    pooled = initial_params(model, sources.graphs, sources.sizes, key=jax.random.key(1))
    print("harvesting", flush=True)
    harvest_zoo(model, sources, pooled, _CONFIG, key=jax.random.key(2), folder=folder, chunk=2)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
