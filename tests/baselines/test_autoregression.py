"""In: a window by hand, and sources whose anomalies fade. Out: a regression that says so, and learns how fast."""

import dataclasses

import jax
import numpy as np
import pytest

from gpdiff_jax.analysis.room import RoomConfig
from gpdiff_jax.baselines.autoregression import line_config, residual_autoregression
from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.models.anomaly import LOG_DEVIATION, PROFILE
from gpdiff_jax.models.protocol import ModelSizes, example_inputs
from gpdiff_jax.zoo.pooled import PooledConfig, train_pooled


def test_a_line_is_trained_at_its_own_rate_and_neither_averaged_nor_mixed():
    """What a pooled model is trained with, where nothing is given, is for networks."""
    config = line_config(PooledConfig(steps=7)).with_covariates("calendar")
    assert config == PooledConfig(steps=7, learning_rate=1e-2, averaging=0.0, mixing=0.0)
    assert RoomConfig().city.with_covariates("calendar").mixing == 0


@pytest.mark.parametrize("anomaly", [False, True])
def test_a_forecast_is_linear_in_the_regions_past_and_its_neighbours(anomaly):
    sizes = ModelSizes(4, 2, 5, 23, anomaly=anomaly)
    rng = np.random.default_rng(0)
    graph, *inputs = jax.device_put(example_inputs(sizes))
    history, covariates = (rng.normal(size=x.shape).astype(np.float32) for x in inputs)
    params = {
        "bias": rng.normal(size=2).astype(np.float32),
        "neighbours": rng.normal(size=(2, 4)).astype(np.float32),
        "own": rng.normal(size=(2, 4)).astype(np.float32),
    }
    model = residual_autoregression(sizes)
    # The centre's only neighbour is node 1.
    past = history[..., 2 if anomaly else 0]
    want = params["own"] @ past[0] + params["neighbours"] @ past[1] + params["bias"]
    if anomaly:
        want = covariates[4:, PROFILE] + np.exp(covariates[4:, LOG_DEVIATION]) * want
    got = jax.jit(model.apply)(*jax.device_put((params, graph, history, covariates)))
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-5, atol=1e-5)
    start = jax.jit(model.init)(jax.random.key(0), graph, history, covariates)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(start))


def test_it_learns_how_fast_anomalies_fade(simulated_cities: list[City]):
    """Days repeat but for a deviation that keeps seven tenths of itself in every hour."""
    rng = np.random.default_rng(1)
    cities = []
    for city in simulated_cities[:2]:
        hours, deviation = np.arange(city.num_steps), np.zeros((city.num_steps, city.num_nodes))
        for hour in hours[1:]:
            deviation[hour] = 0.7 * deviation[hour - 1] + rng.normal(size=city.num_nodes)
        values = (100 + 20 * np.sin(2 * np.pi * hours / 24)[:, None] + deviation)[..., None]
        cities.append(dataclasses.replace(city, values=values.astype(np.float32)))
    data = DataConfig(support_days=7, max_neighbours=2)
    sources = prepare_sources(cities, data, key=jax.random.key(0), validation_windows=12)
    config = PooledConfig(steps=300, regions=16, evaluations=3, learning_rate=2e-2)
    fitted = train_pooled(residual_autoregression(sources.sizes), sources, config, key=jax.random.key(1))
    last = np.asarray(fitted["own"])[:, -1]
    np.testing.assert_allclose(last[:3], [0.7, 0.49, 0.34], atol=0.12)
    assert np.abs(np.asarray(fitted["own"])[:, :-3]).max() < 0.15
