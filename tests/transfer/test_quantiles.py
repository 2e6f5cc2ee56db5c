"""In: a city of simulated noise, and forecasts of known residuals. Out: quantiles that hold what they promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.cities.city import City, label_of
from gpdiff_jax.cities.expectation import expectation
from gpdiff_jax.cities.splits import Span, split_before
from gpdiff_jax.data.series import num_covariates
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.data.target import Target, prepare_target, split_city
from gpdiff_jax.data.windows import window_starts
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model, make_model
from gpdiff_jax.transfer.evaluate import observed_truth, zero_shot
from gpdiff_jax.transfer.quantiles import (
    LEVELS,
    forecast_quantiles,
    judged_starts,
    region_rows,
    residual_quantiles,
    support_residuals,
)
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.residuals import source_residuals, weighted_quantiles
from tests.tiny import make_tiny, town

_DATA = gpd.DataConfig(covariates="profile", max_neighbours=3, damping=(1.0, 1.0))
_SIZES = gpd.ModelSizes(12, 6, 5, num_covariates("profile"), anomaly=True)
_PER_DAY = 24
_UNSEEN = 1.3  # times that forecasts are off by more in a city that the generator never saw


def _noisy(days: int = 21, nodes: int = 30, level: float = 100.0, seed: int = 0) -> City:
    """Independent noise around a day that repeats; deviations differ from region to region and from hour to hour."""
    random = np.random.default_rng(seed)
    hour = np.arange(_PER_DAY)
    pattern = level + 30 * np.sin(2 * np.pi * hour / _PER_DAY)
    spread = (1 + hour[:, None] / 8) * np.exp(random.normal(size=nodes))
    values = np.tile(pattern, days)[:, None] + np.tile(spread, (days, 1)) * random.normal(size=(days * _PER_DAY, nodes))
    edges = [(node, (node + 1) % nodes, 1.0) for node in range(nodes)]
    # A Monday, so that three support days and their test hold weekdays and a weekend.
    start = np.datetime64("2024-04-01T00:00", "m")
    return town(edges, nodes, values=values.astype(np.float32)[:, :, None], start=start)


def _still(target: Target, samples: int = 1) -> tuple[Model, Params]:
    """A model whose anomaly is always 0: it forecasts the profile."""
    tiny = make_tiny(_SIZES)
    none = (None, jnp.zeros((1, 12, 5)), jnp.zeros((18, num_covariates("profile"))))
    params = tiny.init(jax.random.key(0), *none)
    zeros = jax.tree.map(lambda leaf: np.zeros((samples, target.num_regions, *leaf.shape), np.float32), params)
    return make_model("tiny", target.sizes), zeros


def test_weighted_quantiles_are_those_of_repeated_values():
    random = np.random.default_rng(0)
    values, counts = random.normal(size=200), random.integers(0, 4, 200)
    levels = np.asarray([0.1, 0.5, 0.77])
    found = weighted_quantiles(values, counts.astype(float), levels)
    np.testing.assert_allclose(found, np.quantile(np.repeat(values, counts), levels, method="hazen"), atol=0.02)
    np.testing.assert_allclose(
        weighted_quantiles(values, np.ones(200), levels), np.quantile(values, levels, method="hazen")
    )
    assert np.isnan(weighted_quantiles(values, np.zeros(200), levels)).all()


def test_a_residual_of_the_support_is_that_of_a_day_that_was_left_out():
    city = _noisy(nodes=4)
    target = prepare_target(city, _DATA)
    model, params = _still(target)
    residuals = support_residuals(model, target, region_rows(params), judged_starts(target))
    support = target.split.support
    starts = np.asarray(target.support_starts)
    assert residuals.shape[1] == len(starts)
    number = int(np.flatnonzero((starts + 12 - support.start) // _PER_DAY == 1)[3])
    step = int(starts[number]) + 12  # of the second support day, and so are the six from it
    assert (step + 5 - support.start) // _PER_DAY == 1
    seen = np.asarray([t for t in range(support.start, support.stop) if (t - support.start) // _PER_DAY != 1])
    readings = city.values[seen, :, 0]
    mean, std = readings.mean(axis=0), readings.std(axis=0)
    days = (np.arange(city.num_steps) // _PER_DAY) % 7 >= 5
    expected = expectation((readings - mean) / std, seen % _PER_DAY, days[seen], _PER_DAY)
    every = np.arange(support.start, support.stop)
    whole = city.values[every, :, 0]
    center, unit = whole.mean(axis=0), whole.std(axis=0)
    of_all = expectation((whole - center) / unit, every % _PER_DAY, days[every], _PER_DAY)
    ahead = step + np.arange(6)
    kind, hour = days[ahead].astype(int), ahead % _PER_DAY
    for node in range(4):
        forecast = mean[node] + std[node] * expected.profile[kind, node, hour]
        deviation = unit[node] * of_all.deviation[kind, node, hour]
        want = (city.values[ahead, node, 0] - forecast) / deviation
        np.testing.assert_allclose(residuals[node, number], want, rtol=2e-3, atol=2e-4)


def test_of_two_days_no_window_forecasts_both():
    city = _noisy(nodes=4)
    target = prepare_target(city, dataclasses.replace(_DATA, support_days=2))
    model, params = _still(target)
    first = np.asarray(target.support_starts) + 12 - target.split.support.start
    within = first // _PER_DAY == (first + 5) // _PER_DAY
    residuals = support_residuals(model, target, region_rows(params), judged_starts(target))
    assert 0 < within.sum() < len(within) and residuals.shape == (4, within.sum(), 6)


@pytest.mark.parametrize("covariates", ["calendar", "none"])
def test_without_a_profile_residuals_are_in_deviations_of_the_region(covariates):
    city = _noisy(nodes=4)
    target = prepare_target(city, dataclasses.replace(_DATA, covariates=covariates))
    model = make_model("tiny", target.sizes)
    tiny, sizes = make_tiny(target.sizes), target.sizes
    none = (None, jnp.zeros((1, 12, sizes.num_inputs)), jnp.zeros((18, sizes.num_covariates)))
    zeros = jax.tree.map(lambda leaf: np.zeros((1, 4, *leaf.shape), np.float32), tiny.init(jax.random.key(0), *none))
    made = zero_shot(model, target, zeros)
    residuals = np.broadcast_to(np.linspace(-1, 1, 201, dtype=np.float32), (6, 201))
    single = dataclasses.replace(_DATA, covariates=covariates, support_days=1)
    alone = prepare_target(city, single)
    quantiles = forecast_quantiles(model, alone, zeros, zero_shot(model, alone, zeros), residuals)
    assert quantiles is not None
    std = np.asarray(alone.bank.std)[-1][None, :, None]
    np.testing.assert_allclose((quantiles[..., 4] - quantiles[..., 0]) / 1.8 / std, _UNSEEN, rtol=2e-2)
    both = forecast_quantiles(model, target, zeros, made, residuals)
    assert both is not None and (np.diff(both, axis=-1) > 0).all()


# Deviations that two days show are known less well than those of three. Of two days, each left out of the other leaves
# one, whose deviation is not known: divided by that, residuals put 17 % inside the interval of 50.
@pytest.mark.parametrize(("days", "within"), [(2, 0.08), (3, 0.06), (7, 0.04)])
def test_intervals_cover_what_they_say_on_days_like_those_that_were_seen(days, within):
    city = _noisy(days=35, nodes=60)
    target = prepare_target(city, dataclasses.replace(_DATA, support_days=days))
    model, params = _still(target)
    made = zero_shot(model, target, params)
    quantiles = forecast_quantiles(model, target, params, made, None)
    assert quantiles is not None and quantiles.shape == (*made.forecast.shape, len(LEVELS))
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    truth, weekend = observed_truth(city, target)
    assert weekend is not None
    seen = np.broadcast_to(~weekend[:, None, :], truth.shape) if days < 6 else np.ones(truth.shape, bool)
    for low, high, share in ((0, 4, 0.9), (1, 3, 0.5)):
        inside = (truth >= quantiles[..., low]) & (truth <= quantiles[..., high])
        assert inside[seen].mean() == pytest.approx(share, abs=within)


def test_sources_speak_where_one_day_was_seen_and_nobody_does_without_them():
    city = _noisy(nodes=5, level=1e3)
    target = prepare_target(city, dataclasses.replace(_DATA, support_days=1))
    model, params = _still(target)
    made = zero_shot(model, target, params)
    assert forecast_quantiles(model, target, params, made, None) is None
    residuals = np.broadcast_to(np.linspace(-1, 1, 201, dtype=np.float32), (6, 201))
    quantiles = forecast_quantiles(model, target, params, made, residuals)
    assert quantiles is not None
    # A residual of r lies r expected deviations from the forecast, and more in a city that the generator never saw: .4
    # standard deviations of one day, or wider.
    std = np.asarray(target.bank.std)[-1][None, :, None]
    width = (quantiles[..., 4] - quantiles[..., 0]) / 1.8 / _UNSEEN / std
    assert width.min() == pytest.approx(0.4, rel=2e-2) and width.max() == pytest.approx(np.hypot(0.4, 0.5), rel=2e-2)
    # Forecasters that do not agree make it wider still.
    apart = made._replace(spread=np.broadcast_to(3.0 * std, made.forecast.shape).astype(np.float32))
    wider = forecast_quantiles(model, target, params, apart, residuals)
    assert wider is not None
    at = (wider[..., 4] - wider[..., 0]) / 1.8 / _UNSEEN / std
    np.testing.assert_allclose(at, np.hypot(width, 3.0), rtol=2e-2)


def test_no_quantile_is_below_what_counts_can_be_and_temperatures_may_be():
    for level, least in ((20.0, 0.0), (-500.0, None)):
        city = _noisy(nodes=8, level=level)
        if least is not None:
            city = dataclasses.replace(city, values=np.maximum(city.values, 0))
        target = prepare_target(city, _DATA)
        model, params = _still(target)
        quantiles = forecast_quantiles(model, target, params, zero_shot(model, target, params), None)
        assert quantiles is not None
        assert quantiles.min() == least if least is not None else quantiles.max() < 0


def test_residuals_of_sources_are_in_units_of_what_is_to_be_expected_cities_alike():
    # The profile is all that the model says of either city, the second has six times the regions.
    cities: list[City] = [dataclasses.replace(_noisy(nodes=n, seed=n), name=name) for n, name in ((5, "a"), (30, "b"))]
    sources = prepare_sources(cities, dataclasses.replace(_DATA, variants=6), key=jax.random.key(0))
    tiny = make_tiny(_SIZES)
    none = (None, jnp.zeros((1, 12, 5)), jnp.zeros((18, num_covariates("profile"))))
    zeros = jax.tree.map(jnp.zeros_like, tiny.init(jax.random.key(0), *none))
    model = make_model("tiny", sources.sizes)
    residuals = source_residuals(model, sources, zeros)
    assert residuals.shape == (6, 200) and residuals.dtype == np.float32
    assert (np.diff(residuals, axis=1) >= 0).all()
    # Noise of one deviation, and the error of a mean of few days: a little more than the normal distribution.
    wide = np.quantile(residuals, 0.84, axis=1) - np.quantile(residuals, 0.16, axis=1)
    assert ((wide > 1.6) & (wide < 3.2)).all()
    # The many regions of the second city read far more than was to be expected: half of the weight, not six sevenths.
    values = np.array(cities[1].values)
    values[int(0.8 * len(values)) :] += 1e3
    raised = [cities[0], dataclasses.replace(cities[1], values=values)]
    apart = source_residuals(model, prepare_sources(raised, sources.config, key=jax.random.key(0)), zeros)
    assert ((apart > 20).mean(axis=1) == 0.5).all()


def test_quantiles_come_with_the_next_hours(simulated_cities):
    city = simulated_cities[1]
    tiny, target = make_tiny(_SIZES), prepare_target(city, _DATA)
    none = (None, jnp.zeros((1, 12, 5)), jnp.zeros((18, num_covariates("profile"))))
    params = jax.vmap(lambda key: tiny.init(key, *none))(jax.random.split(jax.random.key(3), 2 * city.num_nodes))
    shaped = jax.tree.map(lambda leaf: leaf.reshape(2, city.num_nodes, *leaf.shape[1:]), params)
    residuals = np.broadcast_to(np.linspace(-2, 2, 200, dtype=np.float32), (6, 200))
    parameters = gpd.RegionParameters(shaped, "tiny", _DATA, label_of(city), None, residuals)
    made = gpd.forecast_next(parameters, city)
    assert made.quantiles is not None and made.quantiles.shape == (city.num_nodes, 6, 5)
    assert (made.quantiles >= 0).all()
    cut = dataclasses.replace(city, values=city.values[: target.split.support.stop])
    want = forecast_quantiles(
        target_model := make_model("tiny", target.sizes),
        target,
        shaped,
        zero_shot(target_model, target, shaped),
        residuals,
    )
    assert want is not None
    np.testing.assert_allclose(gpd.forecast_next(parameters, cut).quantiles, want[0], rtol=1e-4, atol=1e-4)
    short = gpd.forecast_next(parameters, dataclasses.replace(city, values=city.values[:30]))
    assert short.quantiles is not None and np.isfinite(short.quantiles).all()


def _after(city: City, data: gpd.DataConfig, day: int) -> Target:
    """The city on a day, after the support days before it."""
    test = Span(day * _PER_DAY, (day + 1) * _PER_DAY)
    sizes = {"history": 12, "before": "the day", "name": city.name}
    split = split_before(test, _PER_DAY, data.support_days, **sizes)
    starts = window_starts(city, split.test, history=12, horizon=6, reach_back=True)
    return split_city(city, data, split, starts)


@pytest.mark.parametrize(
    ("day", "unread"),
    # A Thursday of which nothing was read and a Friday; a Friday and a Saturday, each says nothing of the other.
    [(12, 10), (13, None)],
)
def test_days_that_the_others_say_nothing_of_make_no_residual_and_have_no_weight(day, unread):
    city, data = _noisy(nodes=60), dataclasses.replace(_DATA, support_days=2)
    if unread is not None:
        city.values[unread * _PER_DAY : (unread + 1) * _PER_DAY] = np.nan
    target = _after(city, data, day)
    model, params = _still(target)
    own = support_residuals(model, target, region_rows(params), judged_starts(target))
    assert own.size and np.isnan(own).all()
    residuals = np.broadcast_to(np.linspace(-1, 1, 201, dtype=np.float32), (6, 201))
    quantiles = residual_quantiles(own, 2, residuals)
    assert quantiles is not None
    want = np.broadcast_to(_UNSEEN * (2 * np.asarray(LEVELS) - 1), quantiles.shape)
    np.testing.assert_allclose(quantiles, want, atol=0.02)


def test_a_horizon_longer_than_a_day_is_refused():
    data = gpd.DataConfig(covariates="calendar", horizon=25)
    with pytest.raises(InputError, match=r"`horizon` \(=25\) is longer than a day of 24 steps of city 'town'"):
        prepare_target(_noisy(nodes=3), data)


def test_support_and_sources_weigh_by_their_days_and_the_support_by_what_it_says():
    # Three days of the support weigh 3, all sources 4, and these count 1.3 times: 3 / 7 of the weight lies at 0.
    own, residuals = np.zeros((2, 100, 1), np.float32), np.full((1, 500), 10.0, np.float32)
    levels = (0.42, 0.44, 0.5)
    quantiles = residual_quantiles(own, 3, residuals, levels)
    assert quantiles is not None
    np.testing.assert_allclose(quantiles, [[0.0, 13.0, 13.0]], atol=0.2)
    # Where half of them say nothing, they weigh 1.5 of 5.5.
    own[:, ::2] = np.nan
    halved = residual_quantiles(own, 3, residuals, (0.26, 0.29, 0.5))
    assert halved is not None
    np.testing.assert_allclose(halved, [[0.0, 13.0, 13.0]], atol=0.2)


def test_residuals_are_divided_by_the_deviation_joined_with_the_spread_of_the_samples():
    city = _noisy(nodes=4)
    target = prepare_target(city, _DATA)
    model, one = _still(target)
    starts = judged_starts(target)
    alone = support_residuals(model, target, region_rows(one), starts)
    _, two = _still(target, samples=2)
    # Two samples that are off by two deviations, one up and one down: their mean is the same.
    two["head"]["bias"][0] += 2.0
    two["head"]["bias"][1] -= 2.0
    apart = support_residuals(model, target, region_rows(two), starts)
    known = np.isfinite(alone)
    np.testing.assert_array_equal(np.isfinite(apart), known)
    ratio = apart[known] / alone[known]
    # 1 / sqrt(1 + 2 ** 2) if the deviation of the days that are left, by which the samples differ, were that of all.
    assert np.median(ratio) < 5**-0.5 and (ratio < 0.9).all() and (ratio > 0).all()


def test_residuals_of_sources_are_of_damped_forecasts_as_those_of_a_target():
    config = dataclasses.replace(_DATA, variants=6)
    cities = [_noisy(nodes=5)]
    tiny = make_tiny(_SIZES)
    none = (None, jnp.zeros((1, 12, 5)), jnp.zeros((18, num_covariates("profile"))))
    raised = jax.tree.map(jnp.zeros_like, tiny.init(jax.random.key(0), *none))
    raised["head"]["bias"] += 5.0
    means = []
    for damping in ((1.0, 1.0), (0.5, 0.5)):
        sources = prepare_sources(cities, dataclasses.replace(config, damping=damping), key=jax.random.key(0))
        residuals = source_residuals(make_model("tiny", sources.sizes), sources, raised)
        means.append(np.median(residuals))
    assert means[0] == pytest.approx(-5.0, abs=0.5) and means[1] == pytest.approx(-2.5, abs=0.5)
