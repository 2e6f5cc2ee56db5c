"""In: cities. Out: source regions, and a linear forecaster of them that compiles in no time, to be harvested."""

import jax
import jax.numpy as jnp

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.models import Model
from gpdiff_jax.models.graphs import node_mask
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.zoo.pooled import initial_params
from gpdiff_jax.zoo.region_training import HarvestConfig

DATA = DataConfig(covariates="calendar", variants=3, max_neighbours=3)
CONFIG = HarvestConfig(
    steps=24,
    windows=8,
    learning_rate=1e-2,
    evaluate_every=6,
    patience=2,
    snapshots=2,
    averaging=0.5,
    anchor_windows=0,
)
KEY = jax.random.key(11)


def linear() -> Model:
    """A linear forecaster of the centre's history, its neighbours' and the calendar: compiles in no time."""

    def init(key, graph, history, covariates):
        del graph, history, covariates
        return {"bias": jnp.zeros(6), "kernel": 0.1 * jax.random.normal(key, (6, 44))}

    def apply(params, graph, history, covariates):
        around = node_mask(graph).astype(history.dtype)
        seen = jnp.concatenate([history[0, :, 0], jnp.einsum("n,nt->t", around, history[..., 0]), covariates[12]])
        return (params["kernel"] @ seen + params["bias"])[:, None]

    return Model("linear", init, apply)


MODEL = linear()


def prepare(cities: list[City]) -> Sources:
    return with_prompts(prepare_sources(cities, DATA, key=jax.random.key(0), validation_windows=12), cities)


def start_of(sources: Sources) -> dict:
    """Parameters that every region may start from."""
    params = initial_params(MODEL, sources.graphs, sources.sizes, key=jax.random.key(3))
    return jax.tree.map(lambda leaf: 0.3 * leaf, params)
