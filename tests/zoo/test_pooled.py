"""In: source regions. Out: a pooled model that beats the mean, and is the best that was seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City, SimulationConfig, simulate_cities
from gpdiff_jax.data.sources import Sources
from gpdiff_jax.data.windows import gather_source
from gpdiff_jax.models import make_model
from gpdiff_jax.zoo.pooled import PooledConfig, train_pooled, validation_error
from tests.zoo.linear import prepare


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    """Eight regions of one city, and three of another."""
    small = simulate_cities(SimulationConfig(cities=1, regions=3, days=14), seed=1)[0]
    return prepare([simulated_cities[0], dataclasses.replace(small, name="small")])


def test_a_trained_base_beats_the_mean(sources):
    """To know the last readings is worth more than to forecast the mean."""
    model = make_model("tiny", sources.sizes)
    log: list[tuple[int, dict[str, float]]] = []
    config = PooledConfig(steps=60, regions=8, windows=8, learning_rate=5e-3, evaluations=3)
    pooled = train_pooled(
        model, sources, config, key=jax.random.key(0), progress=lambda done, metrics: log.append((done, metrics))
    )
    assert [done for done, _ in log] == [20, 40, 60]
    best = min(metrics["validation_loss"] for _, metrics in log)

    @jax.jit
    def errors(params):
        def one(region):
            key = jax.random.fold_in(jax.random.key(0), region.region_id)
            nodes, starts = region.graph.nodes, region.validation_starts
            windows = gather_source(sources.bank, sources.train, nodes, starts, key=key)
            of_mean = (jnp.abs(windows.target) * windows.mask).sum() / windows.mask.sum()
            return validation_error(model, params, sources.bank, sources.train, region), of_mean

        return jax.lax.map(one, sources.regions)

    trained, of_mean = (np.asarray(error) for error in errors(pooled))
    assert trained.mean() < 0.9 * of_mean.mean()
    # What is returned is the best that was seen, and both cities count alike in it.
    of_city = [trained[np.asarray(sources.city_index) == city].mean() for city in (0, 1)]
    assert np.mean(of_city) == pytest.approx(best, rel=1e-4) and trained.mean() != pytest.approx(best, rel=1e-3)
