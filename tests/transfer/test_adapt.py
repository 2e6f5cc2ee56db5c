"""In: starts for every region of a simulated city. Out: fine-tuned rows, and how rate and steps were chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.series import PER_VARIANT
from gpdiff_jax.data.target import Target, prepare_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model
from gpdiff_jax.prompts.prompt import target_prompts
from gpdiff_jax.transfer.adapt import (
    Adapted,
    adapt,
    choose_adaptation,
    fine_tune,
    forecast_rows,
    trace_validation,
)
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import few_shot, zero_shot

_DATA = DataConfig(covariates="calendar", support_days=3, max_neighbours=2)
_CONFIG = AdaptConfig(update="own", learning_rates=(3e-3, 3e-2), steps=12, evaluate_every=4, batch=8, refit=False)
_KEY = jax.random.key(7)


def _linear() -> Model:
    """A linear forecaster of the centre's history and its calendar: compiles in no time."""

    def init(key, graph, history, covariates):
        raise AssertionError("starts are given")

    def apply(params, graph, history, covariates):
        del graph
        seen = jnp.concatenate([history[0, :, 0], covariates[12]])
        return (params["kernel"] @ seen + params["bias"])[:, None]

    return Model("linear", init, apply)


_MODEL = _linear()


def _starts(rows: int, seed: int = 0, inputs: int = 32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(0.1 * rng.normal(size=(rows, 6)), jnp.float32),
        "kernel": jnp.asarray(0.1 * rng.normal(size=(rows, 6, inputs)), jnp.float32),
    }


def _one(params: dict) -> dict:
    """One sample."""
    return jax.tree.map(lambda leaf: leaf[None], params)


@pytest.fixture(scope="module", name="city")
def _city(simulated_cities: list[City]) -> City:
    """One region shows nothing in the support days."""
    city = simulated_cities[2]
    support = prepare_target(city, _DATA).split.support
    values = np.array(city.values)
    values[support.start : support.stop, 5] = np.nan
    return dataclasses.replace(city, values=values)


@pytest.fixture(scope="module", name="target")
def _target(city: City) -> Target:
    return prepare_target(city, _DATA)


_REGIONS = jnp.arange(8, dtype=jnp.int32)


@pytest.fixture(scope="module", name="adapted")
def _adapted(target: Target) -> Adapted:
    return adapt(_MODEL, _CONFIG, target, _one(_starts(8)), key=_KEY)


def _tune(target: Target, rate: float, steps: int, *, starts=None, params=None, regions=_REGIONS):
    starts = target.adaptation_starts if starts is None else starts
    params = _starts(8) if params is None else params
    return fine_tune(_MODEL, _CONFIG, target, params, regions, starts, rate, steps, key=_KEY)


def _validation_mae(city: City, target: Target, *samples) -> float:
    """In data units, by way of forecasts of the validation windows by a city that has not seen them yet."""
    assert target.choice is not None
    starts = np.asarray(target.validation_starts)
    forecasts = [forecast_rows(_MODEL, target.choice, params, _REGIONS, target.validation_starts) for params in samples]
    truth = city.values[starts[:, None] + 12 + np.arange(6), :, 0].transpose(2, 0, 1)
    return float(np.nanmean(np.abs(np.mean(forecasts, axis=0) - truth)))


def test_the_curves_are_the_errors_of_fine_tuning_for_so_many_steps(city, target, adapted):
    assert adapted.curves.shape == (2, 4)
    for rate, curve in zip(_CONFIG.learning_rates, adapted.curves, strict=True):
        for evaluation, error in enumerate(curve):
            tuned = _tune(target.choice, rate, 4 * evaluation)
            assert error == pytest.approx(_validation_mae(city, target, tuned), rel=1e-4)
    # Zero steps are among the choices, the same for every rate; more steps make a difference.
    assert adapted.curves[0, 0] == adapted.curves[1, 0]
    assert len(set(adapted.curves.ravel())) == 7


def test_what_was_chosen_is_what_the_rule_says_and_the_rows_are_tuned_so(target, adapted):
    sums = []
    for rate in _CONFIG.learning_rates:
        errors, count = trace_validation(_MODEL, _CONFIG, target.choice, _one(_starts(8)), rate, key=_KEY)
        sums.append(np.asarray(errors, np.float64))
    curves, rate, evaluation = choose_adaptation(np.stack(sums), np.asarray(count, np.float64), _CONFIG)
    np.testing.assert_allclose(curves, adapted.curves, rtol=1e-6)
    assert (adapted.learning_rate, adapted.steps) == (_CONFIG.learning_rates[rate], 4 * evaluation)
    assert adapted.validation_mae == pytest.approx(curves[rate, evaluation])
    tuned = _tune(target, adapted.learning_rate, adapted.steps)
    for got, want in zip(jax.tree.leaves(adapted.params), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_array_equal(got[0], want)


def _by_hand(errors: np.ndarray, count: np.ndarray, rates: tuple[float, ...]) -> tuple[int, int]:
    mean = errors.sum(axis=1) / count.sum()
    best = min(np.ndindex(mean.shape), key=lambda choice: mean[choice])
    residual = [errors[best[0], row, best[1]] - mean[best] * count[row] for row in range(len(count))]
    limit = mean[best] + np.sqrt(sum(r * r for r in residual)) / count.sum()
    choices = [choice for choice in np.ndindex(mean.shape) if mean[choice] <= limit]
    return min(choices, key=lambda choice: (rates[choice[0]] * choice[1], mean[choice]))


@pytest.mark.parametrize("seed", range(20))
def test_the_least_fine_tuning_within_one_standard_error_of_the_best_is_chosen(seed):
    rng = np.random.default_rng(seed)
    rates, count = (1e-3, 3e-3), rng.integers(1, 30, 15).astype(np.float64)
    level = np.stack([1 - rng.uniform(0, 0.2) * np.arange(6), 1 - rng.uniform(0, 0.3) * np.sin(np.arange(6))])
    errors = (level[:, None, :] + 0.02 * rng.normal(size=(2, 15, 6))) * count[None, :, None]
    curves, rate, evaluation = choose_adaptation(errors, count, AdaptConfig(learning_rates=rates))
    np.testing.assert_allclose(curves, errors.sum(axis=1) / count.sum())
    assert (rate, evaluation) == _by_hand(errors, count, rates)


def test_a_clear_best_is_chosen_a_useless_tuning_is_not_and_a_diverged_one_never():
    config, count = AdaptConfig(learning_rates=(1e-3, 1e-2)), np.full(4, 10.0)
    falling = np.broadcast_to(np.array([[9.0, 5.0, 1.0], [9.0, 7.0, 8.0]])[:, None], (2, 4, 3)) * 10
    assert choose_adaptation(falling, count, config)[1:] == (0, 2)
    rising = np.broadcast_to(np.array([[1.0, 5.0, 9.0], [1.0, 7.0, np.nan]])[:, None], (2, 4, 3)) * 10
    curves, _, evaluation = choose_adaptation(rising, count, config)
    assert evaluation == 0 and curves[1, 2] == np.inf
    # A row without an observation says nothing.
    silent = np.concatenate([falling, np.zeros((2, 1, 3))], axis=1)
    assert choose_adaptation(silent, np.append(count, 0.0), config)[1:] == (0, 2)


def test_a_region_without_a_visible_reading_keeps_its_start(target):
    assert target.silent == (5,)
    tuned, start = _tune(target, 3e-2, 12), _starts(8)
    for got, was in zip(jax.tree.leaves(tuned), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(got[5], was[5])
        assert all((np.asarray(got[k]) != np.asarray(was[k])).any() for k in range(8) if k != 5)


def test_a_row_does_not_depend_on_the_rows_beside_it(target):
    together, params = _tune(target, 1e-2, 6), _starts(8)
    order = np.array([6, 2, 2])
    apart = _tune(target, 1e-2, 6, params=jax.tree.map(lambda leaf: leaf[order], params), regions=jnp.asarray(order))
    for got, want in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(got, np.asarray(want)[order])


def test_refitting_uses_the_validation_days_too(target, adapted):
    refit = adapt(_MODEL, dataclasses.replace(_CONFIG, refit=True), target, _one(_starts(8)), key=_KEY)
    assert (refit.learning_rate, refit.steps) == (adapted.learning_rate, adapted.steps)
    np.testing.assert_array_equal(refit.curves, adapted.curves)
    assert adapted.steps > 0
    expected = _tune(target, adapted.learning_rate, adapted.steps, starts=target.support_starts)
    np.testing.assert_array_equal(refit.params["kernel"][0], expected["kernel"])
    assert (np.asarray(refit.params["kernel"]) != np.asarray(adapted.params["kernel"])).any()


def test_with_one_support_day_the_rows_come_back_as_they_were(city):
    values = np.array(city.values)
    values[:, 5] = 3.0
    target = prepare_target(dataclasses.replace(city, values=values), dataclasses.replace(_DATA, support_days=1))
    start = _one(_starts(8))
    kept = adapt(_MODEL, _CONFIG, target, start, key=_KEY)
    assert kept.params is start and (kept.learning_rate, kept.steps, kept.validation_mae) == (None, 0, None)
    np.testing.assert_array_equal(
        few_shot(_MODEL, target, start, _CONFIG, key=_KEY).forecast, zero_shot(_MODEL, target, start).forecast
    )


def test_a_blind_start_is_tuned_for_all_steps_where_nothing_can_be_chosen(city):
    values = np.array(city.values)
    values[:, 5] = 3.0
    target = prepare_target(dataclasses.replace(city, values=values), dataclasses.replace(_DATA, support_days=1))
    assert not target.can_choose
    blind = dataclasses.replace(_CONFIG, blind_learning_rate=1e-2)
    made = adapt(_MODEL, blind, target, _one(_starts(8)), key=_KEY)
    assert (made.learning_rate, made.steps, made.validation_mae) == (1e-2, 12, None)
    expected = _tune(target, 1e-2, 12, starts=target.support_starts)
    for got, want in zip(jax.tree.leaves(made.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got[0], want, rtol=1e-6, atol=1e-7)


def test_samples_are_averaged_as_forecasts_and_the_mean_is_what_is_chosen_for(city, target):
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), _starts(8), _starts(8, seed=1))
    made = few_shot(_MODEL, target, pair, _CONFIG, key=_KEY)
    assert made.curves is not None and made.learning_rate is not None and made.steps is not None
    for rate, curve in zip(_CONFIG.learning_rates, made.curves, strict=True):
        for evaluation in (0, 3):
            tuned = [_tune(target.choice, rate, 4 * evaluation, params=_starts(8, seed=sample)) for sample in range(2)]
            assert curve[evaluation] == pytest.approx(_validation_mae(city, target, *tuned), rel=1e-4)
    each = []
    for sample in range(2):
        tuned = _tune(target, made.learning_rate, made.steps, params=_starts(8, seed=sample))
        each.append(np.asarray(forecast_rows(_MODEL, target, tuned, _REGIONS, target.test_starts)).transpose(1, 0, 2))
    np.testing.assert_allclose(made.forecast, np.mean(each, axis=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(made.spread, np.std(each, axis=0), rtol=1e-3, atol=1e-3)
    assert zero_shot(_MODEL, target, jax.tree.map(lambda leaf: leaf[:1], pair)).spread is None
    # Side by side, the same to rounding.
    beside = few_shot(_MODEL, target, pair, dataclasses.replace(_CONFIG, regions_per_batch=4), key=_KEY)
    np.testing.assert_allclose(beside.curves, made.curves, rtol=1e-4)


def test_what_is_chosen_on_the_validation_day_knows_nothing_of_it(simulated_cities):
    """Scale, profile and prompts; what it has of the day is the truth, and the histories of its windows."""
    data = dataclasses.replace(_DATA, covariates="profile")
    city, made = simulated_cities[2], []
    split = prepare_target(city, data).split
    for factor in (1.0, 3.0):
        values = np.array(city.values)
        values[split.validation.start : split.validation.stop] *= factor
        changed = dataclasses.replace(city, values=values)
        made.append((prepare_target(changed, data), target_prompts(changed, support_days=3, adaptation_only=True)))
    (one, prompts), (other, prompts_of_other) = made
    assert one.choice is not None and other.choice is not None
    for name in PER_VARIANT:
        np.testing.assert_array_equal(getattr(one.choice.bank, name), getattr(other.choice.bank, name), err_msg=name)
        if name != "same_kind":
            assert (np.asarray(getattr(one.bank, name)) != np.asarray(getattr(other.bank, name))).any(), name
    np.testing.assert_array_equal(prompts.values, prompts_of_other.values)
    assert (np.asarray(prompts.values) != np.asarray(target_prompts(city, support_days=3).values)).any()
    np.testing.assert_array_equal(one.choice.test_starts, one.validation_starts)
    assert one.choice.split.support == split.adaptation and one.choice.choice is None
    # The readings are held once.
    assert one.choice.bank.values is one.bank.values and one.choice.graphs is not None
    with pytest.raises(InputError, match=r"`support_days` \(=1\) leave no adaptation days"):
        target_prompts(city, support_days=1, adaptation_only=True)


def test_a_choice_starts_where_it_is_told_and_the_result_does_not(target, adapted):
    begin, elsewhere = _one(_starts(8)), _one(_starts(8, seed=5))
    made = adapt(_MODEL, _CONFIG, target, begin, key=_KEY, choice_params=elsewhere)
    chosen = adapt(_MODEL, _CONFIG, target, elsewhere, key=_KEY)
    np.testing.assert_array_equal(made.curves, chosen.curves)
    assert (np.asarray(made.curves) != np.asarray(adapted.curves)).any()
    expected = _tune(target, made.learning_rate, made.steps)
    np.testing.assert_array_equal(made.params["kernel"][0], expected["kernel"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rates": ()}, r"`learning_rates` and `blind_learning_rate` must be numbers above 0, got \(\)"),
        ({"learning_rates": (float("nan"),)}, r"must be numbers above 0, got \(nan,\)"),
        ({"blind_learning_rate": -1.0}, "must be numbers above 0, got .*-1.0"),
        ({"learning_rates": (1e-3, 0.0)}, "must be numbers above 0, got"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"evaluate_every": 0}, "`evaluate_every` must be at least 1, got 0"),
    ],
)
def test_choices_out_of_range_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        AdaptConfig(**values)


def test_counts_are_never_forecast_below_zero_and_what_was_seen_below_zero_is(city, target):
    low = {"bias": jnp.full((8, 6), -9.0), "kernel": jnp.zeros((8, 6, 32))}
    made = forecast_rows(_MODEL, target, low, _REGIONS, target.test_starts)
    assert float(target.floor) == 0.0 and (np.asarray(made) == 0.0).all()
    # A cut changes nothing above it, and is applied to every draw, not to their mean.
    high = forecast_rows(_MODEL, target, _starts(8), _REGIONS, target.test_starts)
    free = dataclasses.replace(target, floor=jnp.float32(-np.inf))
    uncut = np.asarray(forecast_rows(_MODEL, free, _starts(8), _REGIONS, target.test_starts))
    np.testing.assert_array_equal(high, np.maximum(uncut, 0.0))
    assert (uncut < 0).any() and (uncut > 0).any()
    mean = zero_shot(_MODEL, target, jax.tree.map(lambda *leaves: jnp.stack(leaves), low, _starts(8))).forecast
    np.testing.assert_allclose(mean, 0.5 * np.asarray(high).transpose(1, 0, 2), rtol=1e-5)
    # Only what may be seen decides: a negative reading of the support, not one of the test.
    split, values = target.split, np.array(city.values)
    values[split.test.start :, 0] = -5.0
    assert float(prepare_target(dataclasses.replace(city, values=values), _DATA).floor) == 0.0
    values[split.support.start, 0] = -5.0
    cold = prepare_target(dataclasses.replace(city, values=values), _DATA)
    assert float(cold.floor) == -np.inf
    assert (np.asarray(forecast_rows(_MODEL, cold, low, _REGIONS, cold.test_starts)) < 0).any()


@pytest.mark.parametrize("update", ["codes", "own", "shared"])
def test_a_kind_of_day_that_the_support_lacks_is_forecast_as_before_the_fine_tuning(simulated_cities, update):
    # Three weekdays before a test span that begins with a weekend.
    city = dataclasses.replace(simulated_cities[2], start=np.datetime64("2024-01-02T00:00", "m"))
    target = prepare_target(city, dataclasses.replace(_DATA, covariates="profile"))
    on_weekend = np.asarray(target.bank.weekend)[np.asarray(target.test_starts)[:, None] + 12 + np.arange(6)] > 0.5
    assert target.choice is not None and on_weekend.any() and not on_weekend.all()
    assert not np.asarray(target.bank.same_kind)[-1, :, 1].any()
    params = jax.tree.map(lambda *leaf: jnp.stack(leaf), *(_starts(8, seed, inputs=36) for seed in (0, 1)))
    config = dataclasses.replace(_CONFIG, update=update, one_standard_error=False, learning_rates=(3e-3,))
    directions = jax.tree.map(lambda leaf: 0.1 * leaf[:3], _starts(8, seed=2, inputs=36))
    before = zero_shot(_MODEL, target, params).forecast.transpose(1, 0, 2)
    tuned = [
        few_shot(
            _MODEL,
            target,
            params,
            dataclasses.replace(config, seen_kinds_only=only),
            key=_KEY,
            directions=directions if update == "codes" else None,
        )
        for only in (True, False)
    ]
    kept, moved = (one.forecast.transpose(1, 0, 2) for one in tuned)
    np.testing.assert_allclose(kept[:, on_weekend], before[:, on_weekend], rtol=1e-6)
    assert (moved[:, on_weekend] != before[:, on_weekend]).mean() > 0.9
    np.testing.assert_allclose(kept[:, ~on_weekend], moved[:, ~on_weekend], rtol=1e-5, atol=1e-3)
    assert tuned[0].steps == tuned[1].steps > 0
