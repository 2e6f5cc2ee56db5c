"""In: source regions. Out: a pooled model that beats the mean, and is the best that was seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City, SimulationConfig, simulate_cities
from gpdiff_jax.data.sources import Sources
from gpdiff_jax.data.windows import gather_source, mix_windows
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import make_model
from gpdiff_jax.models.protocol import Window
from gpdiff_jax.zoo import pooled
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
    params = train_pooled(
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

    trained, of_mean = (np.asarray(error) for error in errors(params))
    assert trained.mean() < 0.9 * of_mean.mean()
    # What is returned is the best that was seen, and both cities count alike in it.
    of_city = [trained[np.asarray(sources.city_index) == city].mean() for city in (0, 1)]
    assert np.mean(of_city) == pytest.approx(best, rel=1e-4) and trained.mean() != pytest.approx(best, rel=1e-3)


def test_a_kept_average_is_that_of_the_parameters_on_the_way_at_a_rate_that_stays(sources):
    model, key = make_model("tiny", sources.sizes), jax.random.key(0)

    def trained(steps: int, **changes: float):
        config = PooledConfig(steps=steps, regions=4, windows=2, evaluations=1, **changes)
        # The first step of a cosine has the whole rate.
        return train_pooled(model, sources, config, key=key, start=start)

    start = jax.tree.map(np.asarray, train_pooled(model, sources, PooledConfig(steps=1, regions=4), key=key))
    after = trained(1, averaging=0.0)
    kept = trained(1, averaging=0.995)  # a tenth of a running average is its start after one step
    for one, moved, mean in zip(*map(jax.tree.leaves, (start, after, kept)), strict=True):
        np.testing.assert_allclose(mean, one + 0.9 * (moved - one), rtol=0, atol=1e-6)
    falling, staying = (trained(20, averaging=share) for share in (0.0, 1e-6))
    far = [
        sum(float(np.square(one - held).sum()) for one, held in zip(*map(jax.tree.leaves, (made, start)), strict=True))
        for made in (falling, staying)
    ]
    assert far[1] > 1.2 * far[0]


def test_windows_are_mixed_with_those_of_another_region(sources):
    """One region of a step has no other to be mixed with."""
    model, key = make_model("tiny", sources.sizes), jax.random.key(0)

    def loss(regions: int, mixing: float) -> float:
        log: list[dict[str, float]] = []
        config = PooledConfig(steps=1, regions=regions, windows=4, evaluations=1, mixing=mixing)
        train_pooled(model, sources, config, key=key, progress=lambda done, metrics: log.append(metrics))
        return log[0]["train_loss"]

    assert loss(1, 0.2) == pytest.approx(loss(1, 0.0), rel=1e-6)
    assert loss(8, 5.0) < 0.95 * loss(8, 0.0)  # means of two regions scatter less than one


def test_most_of_a_mixed_window_is_its_own_regions_and_the_rest_the_next_ones(sources, monkeypatch):
    """The region graph is that of the larger share."""
    seen: list[tuple[np.ndarray, ...]] = []

    def watched(windows: Window, others: Window, share: jax.Array) -> Window:
        jax.debug.callback(lambda *arrays: seen.append(arrays), windows.target, others.target, share)
        return mix_windows(windows, others, share)

    monkeypatch.setattr(pooled, "mix_windows", watched)
    config = PooledConfig(steps=1, regions=6, windows=4, evaluations=1, mixing=0.5)
    train_pooled(make_model("tiny", sources.sizes), sources, config, key=jax.random.key(0))
    jax.effects_barrier()
    windows, others, share = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert share.shape == (6,) and (share >= 0.5).all() and np.ptp(share) > 0.01
    np.testing.assert_array_equal(others, np.roll(windows, -1, axis=0))
    assert not np.array_equal(others, windows)


def test_what_is_not_given_is_chosen_by_the_covariates_of_the_sources(sources):
    model = make_model("tiny", sources.sizes)

    def trained(**changes: float) -> list[np.ndarray]:
        config = PooledConfig(steps=2, regions=4, windows=2, evaluations=1, **changes)
        return jax.tree.leaves(train_pooled(model, sources, config, key=jax.random.key(0)))

    assert sources.config.covariates == "calendar"
    chosen, given, neither = trained(), trained(averaging=0.995, mixing=0.2), trained(averaging=0.0, mixing=0.0)
    for one, other in zip(chosen, given, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(not np.array_equal(one, other) for one, other in zip(chosen, neither, strict=True))


def test_averaging_and_mixing_go_by_the_covariates_unless_they_are_given():
    shares = {
        covariates: (config.averaging, config.mixing)
        for covariates in ("none", "calendar", "profile")
        for config in [PooledConfig().with_covariates(covariates)]
    }
    assert shares == {"none": (0.0, 0.0), "calendar": (0.995, 0.2), "profile": (0.0, 0.0)}
    given = PooledConfig(averaging=0.0, mixing=1.0)
    assert given.with_covariates("calendar") == given.with_covariates("profile") == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"averaging": 1.0}, r"`averaging` of the pooled model must be in \[0, 1\), got 1.0"),
        ({"mixing": -0.1}, "`mixing` must be 0, or from 1e-6 to 1e6, got -0.1"),
        ({"mixing": float("nan")}, "`mixing` must be 0, or from 1e-6 to 1e6, got nan"),
        ({"mixing": 1e-40}, "`mixing` must be 0, or from 1e-6 to 1e6, got 1e-40"),
        ({"steps": 0}, "`steps` must be above 0, got 0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PooledConfig(**changes)
