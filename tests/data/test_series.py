"""In: two cities of unequal length with missing readings. Out: windows that agree with plain loops over the cities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.calendar import calendar_features, is_weekend, slot_of_day
from gpdiff_jax.cities.expectation import expectation
from gpdiff_jax.cities.profile import daily_profile, weekend_share
from gpdiff_jax.cities.scaling import region_scales
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.data.series import build_bank, gather_window, num_covariates
from gpdiff_jax.errors import InputError

_HISTORY, _HORIZON = 5, 3
_NAN = float("nan")


def _city(name: str, *, steps: int, nodes: int, start: str | None, seed: int) -> City:
    rng = np.random.default_rng(seed)
    values = rng.gamma(2.0, 10.0, (steps, nodes, 1)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    return City(
        name=name,
        kind="crowd",
        values=values,
        senders=np.arange(nodes - 1, dtype=np.int32),
        receivers=np.arange(1, nodes, dtype=np.int32),
        weights=np.ones(nodes - 1, np.float32),
        interval_minutes=120,
        start=None if start is None else np.datetime64(start, "m"),
        feature_names=("visitors",),
        node_ids=tuple(f"r{k}" for k in range(nodes)),
    )


_CITIES = (
    _city("a", steps=60, nodes=3, start="2024-03-01T06:00", seed=0),
    _city("b", steps=41, nodes=4, start=None, seed=1),
    _city("c", steps=90, nodes=2, start="2024-03-02T20:00", seed=2),
)
_SPANS = ([Span(0, 30), Span(12, 36)], [Span(4, 28), Span(2, 41)], [Span(30, 80), Span(0, 24)])


def _masks() -> list[np.ndarray]:
    masks = [np.zeros((2, city.num_steps), bool) for city in _CITIES]
    for city_masks, spans in zip(masks, _SPANS, strict=True):
        for mask, span in zip(city_masks, spans, strict=True):
            mask[span.start : span.stop] = True
    masks[0][0, 5:9] = False  # a profile may leave steps out of what scales
    return masks


@functools.cache
def _bank(covariates: str):
    return build_bank(_CITIES, _SPANS, _masks(), covariates=covariates, history=_HISTORY, horizon=_HORIZON)


def _expectation(city: City, mask: np.ndarray, mean: np.ndarray, std: np.ndarray):
    weekend = is_weekend(city)
    scaled, kinds = (city.values[mask, :, 0] - mean) / std, None if weekend is None else weekend[mask]
    return expectation(scaled, slot_of_day(city)[mask], kinds, city.steps_per_day)


def _loop_window(covariates: str, index: int, nodes: list[int], start: int, variants: np.ndarray):
    city = _CITIES[index]
    scales = [region_scales(city, span) for span in _SPANS[index]]
    weekend = is_weekend(city)
    calendar = calendar_features(city)
    seen = [_expectation(city, mask, *scale) for scale, mask in zip(scales, _masks()[index], strict=True)]
    history = np.zeros((len(nodes), _HISTORY, 5 if covariates == "profile" else 2))
    beside = np.zeros((_HISTORY + _HORIZON, num_covariates(covariates)))
    target, observed = np.zeros(_HORIZON), np.zeros(_HORIZON)
    for k in range(_HISTORY + _HORIZON):
        step, variant = start + k, variants[k]
        mean, std = scales[variant]
        slot = slot_of_day(city)[step]
        for row, node in enumerate(nodes):
            reading = city.values[step, node, 0]
            if k < _HISTORY:
                if np.isfinite(reading):
                    history[row, k, :2] = (reading - mean[node]) / std[node], 1
                if covariates == "profile":
                    kind = 0 if weekend is None else int(weekend[step])
                    profile, deviation, _ = (of_kind[kind, node, slot] for of_kind in seen[variant])
                    anomaly = (history[row, k, 0] - profile) / deviation if history[row, k, 1] else 0.0
                    history[row, k, 2:] = anomaly, profile, np.log(deviation)
            elif row == 0 and np.isfinite(reading):
                target[k - _HISTORY], observed[k - _HISTORY] = (reading - mean[node]) / std[node], 1
        if covariates != "none":
            beside[k, :20] = calendar[step]
        if covariates == "profile":
            kind = 0 if weekend is None else int(weekend[step])
            profile, deviation, same_kind = (of_kind[kind, nodes[0], slot] for of_kind in seen[variant])
            other = (seen[variant].profile[1 - kind, nodes[0], slot] - profile) / deviation
            beside[k, 20:] = other, np.log(deviation), profile, same_kind
    return history, beside, target, observed


@pytest.mark.parametrize("covariates", ["none", "calendar", "profile"])
def test_a_window_agrees_with_a_loop(covariates):
    bank = _bank(covariates)
    gather = jax.jit(gather_window)
    first = [0, 3, 7]
    for index, nodes, start, seed in (
        (0, [1, 0, 2], 0, 0),
        (0, [2, 1, 2], 52, 1),
        (1, [0, 3, 3], 33, 2),
        (2, [1, 0, 1], 17, 3),
        (2, [0, 1, 0], 82, 4),
    ):
        variant = seed % 2
        window = gather(
            bank,
            jnp.asarray(np.array(nodes, np.int32) + np.int32(first[index])),
            jnp.int32(start),
            jnp.int32(variant),
        )
        expected = _loop_window(covariates, index, nodes, start, [variant] * (_HISTORY + _HORIZON))
        for name, want in zip(("history", "covariates", "target", "mask"), expected, strict=True):
            got = getattr(window, name)
            assert got.shape == want.shape and got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=f"{name} of city {index}")


@pytest.mark.parametrize(("covariates", "inputs", "beside"), [("none", 2, 0), ("calendar", 2, 20), ("profile", 5, 24)])
def test_a_bank_knows_the_sizes_of_its_windows(covariates, inputs, beside):
    assert (_bank(covariates).num_inputs, _bank(covariates).num_covariates) == (inputs, beside)


def test_a_profile_is_the_mean_at_each_step_of_the_day_and_interpolates_around_the_clock():
    readings = np.array([[2, _NAN], [_NAN, _NAN], [4, _NAN], [_NAN, _NAN], [4, _NAN], [_NAN, _NAN]], np.float32)
    # Six steps of two days with four slots: slot 0 sees 2 and 4, slot 2 sees 4, slots 1 and 3 nothing.
    profile = daily_profile(readings, np.array([0, 1, 2, 3, 0, 1]), 4)
    np.testing.assert_allclose(profile[0], [3, 3.5, 4, 3.5])
    np.testing.assert_array_equal(profile[1], 0)
    assert profile.shape == (2, 4) and profile.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "covariates", "words"),
    [
        ({}, "weather", "`covariates` must be one of none, calendar, profile, got 'weather'"),
        ({"interval_minutes": 60}, "none", "interval of 120 minutes and 'a' one of 60"),
        ({"values": np.ones((60, 3, 2), np.float32), "feature_names": ("x", "y")}, "none", "'a' has 2 channels"),
        ({"values": np.full((60, 3, 1), np.nan, np.float32)}, "none", "'a' has no reading in its visible span"),
    ],
)
def test_cities_that_do_not_fit_together_are_refused(change, covariates, words):
    cities = [dataclasses.replace(_CITIES[0], **change), *_CITIES[1:]]
    with pytest.raises(InputError, match=words):
        build_bank(cities, _SPANS, _masks(), covariates=covariates, history=_HISTORY, horizon=_HORIZON)


def test_a_profile_is_refused_for_windows_longer_than_a_day():
    with pytest.raises(InputError, match=r"'profile' need history \+ horizon \(=13 steps\) within a day of 12 steps"):
        build_bank(_CITIES, _SPANS, _masks(), covariates="profile", history=10, horizon=3)
    with pytest.raises(InputError, match="`cities` is empty"):
        build_bank([], [], [], covariates="none", history=10, horizon=3)


def test_the_share_of_weekends_in_a_profile_is_that_of_its_readings():
    """A metro that is closed on the Sunday of its three days has a profile of two weekdays."""
    weekend = np.repeat([1.0, 0.0, 0.0], 4)
    readings = np.ones((12, 4))
    readings[:4, 0] = _NAN  # closed on Sunday
    readings[:2, 1] = _NAN  # open from noon
    readings[:, 3] = _NAN
    np.testing.assert_allclose(weekend_share(readings, weekend), [0.0, 0.2, 1 / 3, 6 / 30])
    np.testing.assert_array_equal(weekend_share(np.full((12, 2), _NAN), weekend), [0.5, 0.5])
    closed = dataclasses.replace(
        _city("d", steps=36, nodes=2, start="2024-03-03T00:00", seed=3),  # a Sunday
        values=np.concatenate([np.full((12, 2, 1), _NAN), np.ones((24, 2, 1))]).astype(np.float32),
    )
    span = [Span(0, 36)]
    bank = build_bank([closed], [span], [np.ones((1, 36), bool)], covariates="profile", history=5, horizon=3)
    np.testing.assert_array_equal(bank.same_kind[0], np.broadcast_to([[[1.0], [0.0]]], (2, 2, 12)))
    window = gather_window(bank, jnp.asarray([0, 1], jnp.int32), jnp.int32(4), jnp.int32(0))
    # On the Sunday, nothing of the profile was made on a day like it; on Monday, all.
    np.testing.assert_array_equal(window.covariates[:, -1], np.zeros(8))
