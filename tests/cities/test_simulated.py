"""In: simulated cities and the truth behind them. Out: that they are reproducible and that their law can be learned."""

import dataclasses
import time

import numpy as np
import pytest

from gpdiff_jax.cities import City, SimulationConfig, check_city, simulate_cities, simulate_city_with_truth
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.errors import InputError

_WHOLE = SimulationConfig(missing_rate=0.0, closing_share=0.0)


def _readings(city: City) -> np.ndarray:
    return city.values[:, :, 0].astype(np.float64)


def _same(city: City, other: City) -> bool:
    return (
        city.values.tobytes() == other.values.tobytes()
        and city.weights.tobytes() == other.weights.tobytes()
        and city.start == other.start
        and city.name == other.name
    )


def _residuals(city: City) -> np.ndarray:
    """Readings less the mean of the same hour and the same kind of day, in standard deviations, [T, N]."""
    readings = _readings(city)
    hours = np.arange(len(readings)) % city.steps_per_day
    free = np.isin(_weekday(city), (5, 6))
    for hour in range(city.steps_per_day):
        for kind_of_day in (True, False):
            these = (hours == hour) & (free == kind_of_day)
            readings[these] -= readings[these].mean(axis=0)
    return readings / readings.std(axis=0)


def _weekday(city: City) -> np.ndarray:
    assert city.start is not None
    times = city.start + np.arange(city.num_steps) * np.timedelta64(city.interval_minutes, "m")
    return (times.astype("datetime64[D]").astype(int) + 3) % 7  # 1970-01-01 was a Thursday


def _r_squared(inputs: np.ndarray, targets: np.ndarray, new_inputs: np.ndarray, new_targets: np.ndarray) -> float:
    scale = inputs.std(axis=0) + 1e-9
    weights = _ridge((inputs - inputs.mean(axis=0)) / scale, targets - targets.mean(axis=0), 3.0)
    predicted = (new_inputs - inputs.mean(axis=0)) / scale @ weights + targets.mean(axis=0)
    return 1 - ((predicted - new_targets) ** 2).sum() / ((new_targets - targets.mean(axis=0)) ** 2).sum()


def _ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(inputs.T @ inputs + penalty * np.eye(inputs.shape[1]), inputs.T @ targets)


@pytest.mark.parametrize("kind", ["crowd", "speed"])
def test_a_seed_fixes_every_city_whatever_their_number(kind):
    few = SimulationConfig(cities=2, regions=6, days=7, kind=kind)
    many = dataclasses.replace(few, cities=3)
    first, again = simulate_cities(few, seed=5), simulate_cities(many, seed=5)
    assert all(_same(city, other) for city, other in zip(first, again[:2], strict=True))
    assert _same(again[2], simulate_city_with_truth(many, index=2, seed=5)[0])
    other_seed = simulate_cities(few, seed=6)
    assert not np.array_equal(first[0].values, other_seed[0].values, equal_nan=True)
    assert not np.array_equal(first[0].values, first[1].values, equal_nan=True)
    assert [city.name for city in again] == [f"{kind}_0", f"{kind}_1", f"{kind}_2"]


def test_a_longer_series_keeps_the_map_and_the_law():
    short = simulate_city_with_truth(SimulationConfig(regions=8, days=7), index=0, seed=1)
    long = simulate_city_with_truth(SimulationConfig(regions=8, days=14), index=0, seed=1)
    np.testing.assert_array_equal(short[0].adjacency(), long[0].adjacency())
    np.testing.assert_array_equal(short[0].poi, long[0].poi)
    np.testing.assert_array_equal(short[1].workday_profile, long[1].workday_profile)


def test_counts_are_whole_and_speeds_are_plausible():
    crowd = _readings(simulate_cities(dataclasses.replace(_WHOLE, cities=1), seed=0)[0])
    speed = _readings(simulate_cities(dataclasses.replace(_WHOLE, cities=1, kind="speed"), seed=0)[0])
    np.testing.assert_array_equal(crowd, np.round(crowd))
    assert 5 < crowd.mean() < 1000
    assert speed.min() >= 2 and speed.max() < 130 and 20 < speed.mean() < 80


@pytest.mark.parametrize("regions", [2, 3, 60])
def test_the_map_is_one_symmetric_planar_piece(regions):
    city = simulate_cities(SimulationConfig(cities=1, regions=regions, days=3), seed=2)[0]
    adjacency = city.adjacency()
    np.testing.assert_array_equal(adjacency, adjacency.T)
    assert city.weights.min() >= 0.05
    reached = np.linalg.matrix_power((adjacency > 0) + np.eye(regions), regions) > 0
    assert reached.all()
    assert (adjacency > 0).sum() / 2 <= max(3 * regions - 6, 3)  # Euler's bound on planar graphs


@pytest.mark.parametrize("kind", ["crowd", "speed"])
@pytest.mark.parametrize("interval", [15, 60])
def test_a_day_repeats_and_free_days_differ(kind, interval):
    config = dataclasses.replace(_WHOLE, cities=1, regions=16, interval_minutes=interval, kind=kind)
    city = simulate_cities(config, seed=0)[0]
    readings = _readings(city)
    centred = readings - readings.mean(axis=0)

    def autocorrelation(lag: int) -> float:
        return float((centred[lag:] * centred[:-lag]).mean() / (centred**2).mean())

    day = city.steps_per_day
    assert autocorrelation(day) > 0.4
    assert autocorrelation(day) > autocorrelation(day // 2) + 0.3
    assert autocorrelation(7 * day) > autocorrelation(3 * day)
    free = np.isin(_weekday(city), (5, 6))
    assert 7 <= free.sum() / day <= 9  # in 28 days
    hours = np.arange(city.num_steps) // (60 // interval) % 24
    morning = readings[(hours == 8) & ~free].mean() - readings[(hours == 8) & free].mean()
    assert morning > 0 if kind == "crowd" else morning < 0


def test_days_of_offices_repeat_and_those_of_leisure_differ():
    offices, leisure = [], []
    for index in range(4):
        city, truth = simulate_city_with_truth(dataclasses.replace(_WHOLE, regions=40), index=index, seed=2)
        readings = _readings(city)
        support = prepare_target(city, DataConfig()).split.support
        seen = np.stack([readings[support.start :][24 * day :][:24] for day in range(3)]) / readings.std(axis=0)
        apart = np.sqrt(seen.var(axis=0, ddof=1).mean(axis=0))
        offices.append(apart[truth.functions[:, 1] > 0.6])
        leisure.append(apart[truth.functions[:, 2] > 0.6])
    assert min(len(np.concatenate(part)) for part in (offices, leisure)) >= 10
    assert np.concatenate(leisure).mean() > 1.5 * np.concatenate(offices).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_support_of_four_weeks_lacks_free_days(seed):
    for city in simulate_cities(SimulationConfig(cities=3, regions=4), seed=seed):
        target = prepare_target(city, DataConfig())
        free = np.isin(_weekday(city), (5, 6))
        assert not free[target.split.support.start : target.split.support.stop].any()
        assert 0.2 < free[target.split.test.start :].mean() < 0.4


@pytest.mark.parametrize("kind", ["crowd", "speed"])
def test_neighbours_move_together_more_than_strangers(kind):
    config = dataclasses.replace(_WHOLE, regions=40, days=35, kind=kind)
    for index in range(3):
        city, _ = simulate_city_with_truth(config, index=index, seed=4)
        correlation = np.corrcoef(_residuals(city).T)
        linked = city.adjacency() > 0
        strangers = ~linked & ~np.eye(len(linked), dtype=bool)
        assert correlation[linked].mean() > correlation[strangers].mean() + 0.04


@pytest.mark.parametrize("kind", ["crowd", "speed"])
def test_three_days_show_what_a_region_of_another_city_is(kind):
    config = dataclasses.replace(_WHOLE, cities=5, regions=40, days=14, kind=kind)
    shapes, functions = [], []
    for index in range(config.cities):
        city, truth = simulate_city_with_truth(config, index=index, seed=7)
        workdays = np.flatnonzero((_weekday(city) < 3) & (np.arange(city.num_steps) % 24 == 0))[0]
        days = _readings(city)[workdays : workdays + 72].reshape(3, 24, -1).mean(axis=0)
        shapes.append(((days - days.mean(axis=0)) / days.std(axis=0)).T)
        functions.append(truth.functions)
    seen = []
    for held_out in range(config.cities):
        rest = [index for index in range(config.cities) if index != held_out]
        known_shapes, known_functions = (np.concatenate([part[i] for i in rest]) for part in (shapes, functions))
        seen.append(_r_squared(known_shapes, known_functions, shapes[held_out], functions[held_out]))
    assert np.mean(seen) > 0.6


@pytest.mark.parametrize("kind", ["crowd", "speed"])
def test_who_knows_the_functions_forecasts_another_city_better(kind):
    config = dataclasses.replace(_WHOLE, regions=16, days=28, kind=kind)

    def examples(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        city, truth = simulate_city_with_truth(config, index=index, seed=0)
        own = _readings(city)
        own = (own - own.mean(axis=0)) / own.std(axis=0)
        adjacency = city.adjacency()
        near = own @ (adjacency / adjacency.sum(axis=1, keepdims=True)).T
        hour_of_week_part = np.arange(len(own)) % 24 + 24 * np.isin(_weekday(city), (5, 6))
        clock = np.broadcast_to(np.eye(48)[hour_of_week_part][:, None], (*own.shape, 48))
        lags = np.stack([own[2:-1], own[1:-2], own[:-3], near[2:-1], near[1:-2], near[:-3]], axis=-1)
        blind = np.concatenate([lags, clock[3:]], axis=-1).reshape(-1, 54)
        mixture = np.broadcast_to(truth.functions, (len(own) - 3, *truth.functions.shape)).reshape(-1, 4)
        informed = (blind[:, :, None] * mixture[:, None, :]).reshape(len(blind), -1)
        return blind, informed, own[3:].reshape(-1)

    sources, target = [examples(index) for index in range(3)], examples(3)
    errors = []
    for inputs in (0, 1):
        weights = _ridge(*(np.concatenate([part[i] for part in sources]) for i in (inputs, 2)), penalty=1.0)
        errors.append(np.mean((target[inputs] @ weights - target[2]) ** 2))
    assert errors[1] < 0.85 * errors[0]
    assert errors[0] < 0.5  # of the variance: the city can be forecast at all


@pytest.mark.parametrize("kind", ["crowd", "speed"])
def test_what_the_rhythm_leaves_moves_as_the_functions_say(kind):
    config = dataclasses.replace(_WHOLE, regions=40, days=70, kind=kind)
    persistence, lasting = [], []
    for index in range(3):
        city, truth = simulate_city_with_truth(config, index=index, seed=0)
        rest = _residuals(city)
        persistence.append(truth.persistence)
        lasting.append((rest[1:] * rest[:-1]).mean(axis=0))
    assert np.corrcoef(np.concatenate(persistence), np.concatenate(lasting))[0, 1] > 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_the_missing_share_is_the_one_asked_for(rate):
    config = SimulationConfig(cities=3, regions=40, days=40, missing_rate=rate, closing_share=0.0)
    shares = [np.isnan(city.values).mean() for city in simulate_cities(config, seed=1)]
    assert np.mean(shares) == pytest.approx(rate, abs=0.1 * rate)
    if rate:
        lost = np.isnan(_readings(simulate_cities(config, seed=1)[0]))
        assert lost[1:][lost[:-1]].mean() > 1.5 * rate  # outages come in runs


def test_services_of_some_crowds_close_at_night_and_roads_never():
    config = SimulationConfig(cities=20, regions=4, days=3, missing_rate=0.0, closing_share=0.5)
    for kind, closed in (("crowd", range(4, 17)), ("speed", range(1))):
        nights = 0
        for city in simulate_cities(dataclasses.replace(config, kind=kind), seed=0):
            lost = np.isnan(_readings(city)).reshape(3, 24, 4)
            assert not lost[:, 5:].any() and not lost[:, 0].any()
            assert lost[:, 1:5].all() or not lost.any()
            nights += int(lost.any())
        assert nights in closed


def test_a_default_study_takes_seconds():
    begun = time.process_time()
    simulate_cities(SimulationConfig(regions=30, days=35), seed=0)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cities": 0}, r"`cities` \(=0\) must be in 1"),
        ({"regions": 1}, r"`regions` \(=1\) must be in 2"),
        ({"days": 1}, r"`days` \(=1\) must be in 2"),
        ({"interval_minutes": 7}, r"`interval_minutes` \(=7\) must divide 60"),
        ({"interval_minutes": 120}, r"`interval_minutes` \(=120\) must divide 60"),
        ({"interval_minutes": 0}, "must divide 60"),
        ({"kind": "flow"}, r"`kind` \(='flow'\) cannot be simulated; choose crowd or speed"),
        ({"missing_rate": 0.6}, r"`missing_rate` \(=0.6\)"),
        ({"missing_rate": float("nan")}, r"`missing_rate` \(=nan\)"),
        ({"closing_share": -0.1}, r"`closing_share` \(=-0.1\)"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        SimulationConfig(**changes)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match=r"`seed` \(=-1\)"):
        simulate_cities(SimulationConfig(), seed=-1)


def test_the_smallest_and_leakiest_city_is_still_valid():
    for seed in range(20):
        config = SimulationConfig(regions=2, days=2, missing_rate=0.5, closing_share=1.0)
        for city in simulate_cities(config, seed=seed):
            assert check_city(city) is city
            assert np.isfinite(city.values).any(axis=0).all()
