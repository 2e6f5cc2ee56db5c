"""In: days that repeat, days that do not, days unseen. Out: expectations that agree with a loop over days and steps."""

import dataclasses
import math

import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.expectation import ALONE, PRIOR, SMALLEST, UNLIKE, expectation

_NAN = float("nan")


def _days(minutes: int, days: int, *, first: int, nodes: int = 3, start: int = 0, gaps: float = 0.15, seed: int = 0):
    """Readings of some days, from step `start` of the weekday `first` (0 Monday); some are missing."""
    per_day = 1440 // minutes
    steps = np.arange(start, start + days * per_day)
    rng = np.random.default_rng(seed)
    readings = rng.normal(size=(len(steps), nodes)) + np.sin(2 * np.pi * steps / per_day)[:, None]
    readings[rng.random(readings.shape) < gaps] = np.nan
    return readings.astype(np.float32), steps % per_day, (first + steps // per_day) % 7 >= 5, per_day


def _loop(readings, slots, weekend, per_day):
    """The same estimators, one region, step and day at a time."""
    kinds = np.zeros(len(slots), int) if weekend is None else weekend.astype(int)
    nodes = readings.shape[1]
    reach = max(1, round(per_day / 24))
    values = {}
    for step, node in np.argwhere(np.isfinite(readings)):
        values.setdefault((node, kinds[step], slots[step]), []).append(float(readings[step, node]))
    profile, deviation, same = (np.zeros((2, nodes, per_day)) for _ in range(3))

    def around(slot):
        return sorted({(slot + k) % per_day for k in range(-reach, reach + 1)})

    def mean_day(node, of_kinds, slot):
        sums = {s: [one for k in of_kinds for one in values.get((node, k, s), [])] for s in range(per_day)}
        if not any(sums.values()):
            return 0.0
        back = next(k for k in range(per_day) if sums[(slot - k) % per_day])
        ahead = next(k for k in range(per_day) if sums[(slot + k) % per_day])
        last, coming = np.mean(sums[(slot - back) % per_day]), np.mean(sums[(slot + ahead) % per_day])
        return last if back == 0 else (ahead * last + back * coming) / (ahead + back)

    def variance(node, of_slots):
        groups = [values.get((node, k, s), []) for k in (0, 1) for s in of_slots]
        squares = sum(sum((one - np.mean(group)) ** 2 for one in group) for group in groups)
        return squares, sum(max(len(group) - 1, 0) for group in groups)

    whole = [variance(node, range(per_day)) for node in range(nodes)]
    city = sum(s for s, _ in whole) / sum(f for _, f in whole) if any(f for _, f in whole) else ALONE**2
    for node in range(nodes):
        own = whole[node][0] / whole[node][1] if whole[node][1] else city
        for slot in range(per_day):
            squares, freedom = variance(node, around(slot))
            spread = (squares + PRIOR * own) / (freedom + PRIOR)
            for kind in (0, 1):
                if weekend is None:
                    profile[kind, node, slot], same[kind, node, slot] = mean_day(node, (0,), slot), 0.5
                else:
                    seen = any(values.get((node, kind, s)) for s in around(slot))
                    profile[kind, node, slot] = mean_day(node, (kind,) if seen else (0, 1), slot)
                    same[kind, node, slot] = float(seen)
                wide = spread + UNLIKE**2 * (1 - same[kind, node, slot])
                deviation[kind, node, slot] = max(math.sqrt(wide), SMALLEST)
    return profile, deviation, same


@pytest.mark.parametrize(
    ("minutes", "days", "first", "start", "gaps"),
    [
        (60, 3, 0, 0, 0.15),  # weekdays alone
        (60, 3, 4, 9, 0.15),  # from Friday morning to Monday morning
        (60, 1, 2, 0, 0.15),  # one day
        (60, 2, 4, 0, 0.0),  # two days of unlike kinds
        (60, 2, 5, 0, 0.6),  # a weekend with many gaps
        (60, 7, 3, 17, 0.15),
        (30, 3, 5, 11, 0.15),
        (15, 3, 3, 40, 0.3),
        (180, 4, 4, 0, 0.15),
        (720, 3, 4, 0, 0.0),  # two steps a day: an hour before and after is all there is
    ],
)
@pytest.mark.parametrize("calendar", [True, False])
def test_an_expectation_agrees_with_a_loop(minutes, days, first, start, gaps, calendar):
    readings, slots, weekend, per_day = _days(minutes, days, first=first, start=start, gaps=gaps)
    readings[:, 2] = _NAN  # says nothing
    given = (readings, slots, weekend if calendar else None, per_day)
    found = expectation(*given)
    for name, got, want in zip(found._fields, found, _loop(*given), strict=True):
        assert got.shape == (2, 3, per_day) and got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_three_minutes_agree_with_a_loop():
    given = _days(3, 3, first=4, start=200, nodes=1, gaps=0.1)
    for got, want in zip(expectation(*given), _loop(*given), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_by_hand():
    """Two weekdays, 1 and 3 at every step but one, and nothing of a weekend."""
    readings = np.concatenate([np.full((24, 1), 1.0), np.full((24, 1), 3.0)]).astype(np.float32)
    readings[24 + 12] = 7.0
    found = expectation(readings, np.arange(48) % 24, np.zeros(48, bool), 24)
    np.testing.assert_allclose(found.profile[:, 0, 0], 2.0)
    np.testing.assert_allclose(found.profile[:, 0, 12], 4.0)
    np.testing.assert_array_equal(found.same_kind[:, 0], [np.ones(24), np.zeros(24)])
    # 23 steps with squares of 2 and one with 18, one degree of freedom each: 64 / 24 over the day.
    day = 64 / 24
    np.testing.assert_allclose(found.deviation[0, 0, 0] ** 2, (6 + 2 * day) / 5, rtol=1e-5)
    np.testing.assert_allclose(found.deviation[0, 0, 11:14] ** 2, (22 + 2 * day) / 5, rtol=1e-5)
    np.testing.assert_allclose(found.deviation[1] ** 2, found.deviation[0] ** 2 + 0.25, rtol=1e-5)


def test_days_that_repeat_are_trusted_and_days_that_do_not_are_not():
    readings, slots, weekend, per_day = _days(60, 3, first=0, gaps=0.0)
    readings[:, 0] = np.tile(readings[:24, 0], 3)
    found = expectation(readings, slots, weekend, per_day)
    np.testing.assert_array_equal(found.deviation[0, 0], np.float32(SMALLEST))
    assert found.deviation[0, 1:].min() > 0.4


def test_one_day_says_nothing_of_how_days_differ():
    readings, slots, weekend, per_day = _days(60, 1, first=0)
    found = expectation(readings, slots, weekend, per_day)
    np.testing.assert_array_equal(found.deviation[0], np.float32(ALONE))
    np.testing.assert_allclose(found.deviation[1], math.hypot(ALONE, UNLIKE), rtol=1e-6)
    silent = expectation(np.full((24, 2), _NAN, np.float32), slots, weekend, per_day)
    np.testing.assert_array_equal(silent.profile, 0)
    np.testing.assert_allclose(silent.deviation, math.hypot(ALONE, UNLIKE), rtol=1e-6)
    np.testing.assert_array_equal(silent.same_kind, 0)


def test_a_region_with_one_day_differs_as_the_others_do():
    readings, slots, weekend, per_day = _days(60, 2, first=0, gaps=0.0)
    readings[24:, 0] = _NAN
    found = expectation(readings, slots, weekend, per_day)
    others = (readings[:24, 1:] - readings[24:, 1:]).astype(np.float64)
    np.testing.assert_allclose(found.deviation[0, 0], math.sqrt((others**2).sum() / 2 / 48), rtol=1e-5)


def test_silent_regions_take_what_their_neighbours_lead_one_to_expect(simulated_cities: list[City]):
    city = dataclasses.replace(
        simulated_cities[0],
        senders=np.array([0, 1], np.int32),
        receivers=np.array([2, 2], np.int32),
        weights=np.ones(2, np.float32),
    )
    readings = np.random.default_rng(0).normal(size=(72, city.num_nodes)).astype(np.float32)
    readings[:, 2] = _NAN
    found = expectation(readings, np.arange(72) % 24, np.zeros(72, bool), 24)
    silent = np.arange(city.num_nodes) == 2
    filled = found.filled(silent, city)
    for name, before, after in zip(found._fields, found, filled, strict=True):
        around = before[:, :2].mean(axis=1)
        # Their level is not known, so they may be off by a standard deviation more.
        want = np.hypot(around, 1.0) if name == "deviation" else around
        np.testing.assert_allclose(after[:, 2], want, rtol=1e-6)
        np.testing.assert_array_equal(after[:, ~silent], before[:, ~silent])
    assert found.filled(~silent & False, city) is found
    assert found.filled(np.ones(city.num_nodes, bool), city) is found
