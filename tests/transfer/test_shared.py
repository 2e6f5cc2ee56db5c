"""In: starts of two samples and the support days of a city. Out: all of them moved by one and the same update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import Target, prepare_target, region_windows
from gpdiff_jax.models import Model
from gpdiff_jax.models.loss import masked_huber
from gpdiff_jax.training import memory, parallel
from gpdiff_jax.training.memory import NoRoomError
from gpdiff_jax.transfer import shared
from gpdiff_jax.transfer.adapt import adapt
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.shared import add_to_all, choose_steps, city_update

_SHAPES = {"bias": (6,), "kernel": (6, 36)}
_KEY = jax.random.key(3)


def _apply(params, graph, history, covariates):
    del graph
    seen = jnp.concatenate([history[0, :, 0], covariates[12]])
    return (params["kernel"] @ seen + params["bias"])[:, None]


_MODEL = Model("linear", lambda *_: {}, _apply)


@pytest.fixture(scope="module", name="target")
def _target(simulated_cities: list[City]) -> Target:
    return prepare_target(simulated_cities[2], DataConfig(support_days=3, max_neighbours=2))


def _starts(samples: int, regions: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        name: 0.1 * rng.normal(size=(samples, regions, *shape)).astype(np.float32) for name, shape in _SHAPES.items()
    }


def _moved(target: Target, params: dict, **how: Any) -> dict:
    return add_to_all(params, city_update(_MODEL, target, params, key=_KEY, **how))


@jax.jit
def _row_loss(target: Target, params: dict, region: jax.Array, starts: jax.Array) -> jax.Array:
    graph, windows = region_windows(target, region, starts)
    return masked_huber(target_forecast(_MODEL, target, params, graph, windows), windows.target, windows.mask)


def _loss(target: Target, params: dict, starts: Any = None) -> float:
    """Mean over all regions and samples of the loss on all support windows, or on those given."""
    seen, windows = target.bare, target.support_starts if starts is None else jax.device_put(starts)
    rows = [jax.tree.map(lambda leaf, k=k, r=r: leaf[k, r], params) for k in range(2) for r in range(8)]
    losses = [_row_loss(seen, row, np.int32(number % 8), windows) for number, row in enumerate(rows)]
    return float(np.mean(losses))


def test_every_region_and_sample_gets_the_same_update_and_the_support_is_forecast_better(target):
    params = _starts(2, 8)
    moved = _moved(target, params, steps=60, rate=0.1)
    for name in _SHAPES:
        update = moved[name] - params[name]
        np.testing.assert_allclose(update, np.broadcast_to(update[:1, :1], update.shape), atol=1e-5)
        assert np.abs(update).max() > 0.05
    assert _loss(target, moved) < 0.8 * _loss(target, params)


def test_more_devices_change_nothing(target, monkeypatch):
    devices, made = jax.local_devices(), []
    assert len(devices) == 2
    for count in (1, 2):
        monkeypatch.setattr(parallel.jax, "local_devices", lambda count=count, **host: devices[:count])
        made.append(_moved(target, _starts(1, 8), steps=3, rate=1e-2))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5), *made)


@pytest.mark.parametrize(("side_by_side", "parts"), [(32, 1), (100, 1), (12, 4), (1, 32), (None, 32)])
def test_so_many_regions_are_differentiated_at_a_time_as_is_asked_for(target, monkeypatch, side_by_side, parts):
    one_device = jax.local_devices()[:1]
    monkeypatch.setattr(parallel.jax, "local_devices", lambda **host: one_device)
    shared._make_update.cache_clear()
    asked, make_step = [], shared.make_step
    monkeypatch.setattr(shared, "make_step", lambda *given, **how: (asked.append(how), make_step(*given, **how))[1])
    one, many = (
        _moved(target, _starts(1, 8), steps=3, rate=1e-2, rows_side_by_side=count) for count in (side_by_side, 16)
    )
    assert [how["accumulate"] for how in asked] == [parts, 2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), one, many)


def test_parameters_without_room_for_what_they_become_are_refused_before_they_are_moved(target, monkeypatch):
    params = _starts(2, 8)
    monkeypatch.setattr(memory, "free_bytes", lambda device=None: 2 * 8 * 4 * (6 + 6 * 36) - 1)
    for config in (AdaptConfig(update="shared"), AdaptConfig(update="codes"), AdaptConfig(update="own")):
        directions = {name: np.zeros((3, *shape), np.float32) for name, shape in _SHAPES.items()}
        with pytest.raises(NoRoomError, match=r"^the fine-tuned parameters of 8 regions, 2 of each, would"):
            adapt(_MODEL, config, target, params, key=_KEY, directions=directions)


def test_without_a_choice_fine_tuning_takes_all_steps_and_needs_no_zoo(target):
    params = _starts(1, 8)
    config = AdaptConfig(update="shared", shared_steps=2, shared_rates=(1.0, 1e-2), shared_folds=0)
    made = adapt(_MODEL, config, target, params, key=_KEY)
    want = _moved(target, params, steps=2, rate=1e-2)
    jax.tree.map(np.testing.assert_array_equal, made.params, want)
    assert (made.learning_rate, made.steps, made.validation_mae) == (1e-2, 2, None)


@pytest.mark.parametrize(("covariates", "most"), [("profile", 100), ("calendar", 400)])
def test_without_a_profile_more_steps_are_looked_at_unless_their_number_is_given(
    simulated_cities, monkeypatch, covariates, most
):
    target = prepare_target(simulated_cities[2], DataConfig(covariates=covariates, support_days=3, max_neighbours=2))
    asked = []
    monkeypatch.setattr(shared, "choose_steps", lambda *given, most, **how: (asked.append(most), (0, 1e-3))[1])
    for config in (AdaptConfig(), AdaptConfig(shared_steps=7)):
        assert shared.shared_update(_MODEL, config, target, _starts(1, 8), key=_KEY) == (None, 0, None)
    assert asked == [most, 7]


@pytest.mark.parametrize(("most", "stride"), [(6, 1), (40, 2), (100, 5), (400, 5)])
def test_numbers_of_steps_that_are_judged_lie_no_more_than_five_apart(target, monkeypatch, most, stride):
    class Stopped(Exception):
        pass

    def stop(*given, stride, **how):
        raise Stopped(stride)

    monkeypatch.setattr(shared, "_descend", stop)
    with pytest.raises(Stopped, match=f"^{stride}$"):
        choose_steps(_MODEL, target, _starts(1, 8), most=most, rates=(1e-3,), key=_KEY)


def test_of_many_rows_only_so_many_are_looked_at(target, monkeypatch):
    monkeypatch.setattr(shared, "_MOST_ROWS", 4)
    params = _starts(2, 8)
    looked_at = np.zeros((2, 8), bool)
    looked_at.reshape(-1)[np.linspace(0, 15, 4).round().astype(int)] = True
    odd = {name: np.where(looked_at.reshape(2, 8, *[1] * (leaf.ndim - 2)), leaf, 7.0) for name, leaf in params.items()}
    one, other = (_moved(target, start, steps=3, rate=0.1)["bias"] - start["bias"] for start in (params, odd))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert np.abs(one).max() > 1e-3


def test_a_step_is_as_long_as_its_rate_and_as_the_part_of_the_support_that_was_read(target, monkeypatch):
    params = _starts(1, 8)

    def step(rate: float) -> np.ndarray:
        return _moved(target, params, steps=1, rate=rate)["bias"] - params["bias"]

    whole = step(0.1)
    np.testing.assert_allclose(step(0.05), whole / 2, rtol=1e-3, atol=1e-6)
    asked = []
    monkeypatch.setattr(shared, "share_of_windows", lambda city: (asked.append(city), 0.25)[1])
    np.testing.assert_allclose(step(0.1), whole / 4, rtol=1e-3, atol=1e-6)
    assert asked == [target]


def test_a_support_without_a_window_or_no_step_leaves_the_starts_as_they_are(target):
    params = _starts(1, 8)
    without = target.replace(support_starts=target.support_starts[:0])
    assert _moved(without, params, steps=2, rate=1e-2) is params
    assert _moved(target, params, steps=0, rate=1e-2) is params


def _left_out(target: Target, params: dict, most: int, rate: float) -> np.ndarray:
    """The loss on days left out one by one, after every number of steps; every day has as many readings to judge by."""
    starts = np.asarray(target.support_starts)
    first, last = ((starts + ahead - int(target.support_start)) // 24 for ahead in (12, 17))
    whole = shared.share_of_windows(target)
    losses = np.zeros(most + 1)
    for day in np.unique(first):
        others = target.replace(support_starts=jax.device_put(starts[(first != day) & (last != day)]))
        length = rate * whole / shared.share_of_windows(others)
        judged = starts[first == day]
        for steps in range(most + 1):
            losses[steps] += len(judged) * _loss(
                target, _moved(others, params, steps=steps, rate=length), jax.device_put(judged)
            )
    return losses


def test_the_most_steps_are_chosen_of_those_that_forecast_days_best_that_were_left_out(target):
    params = _starts(2, 8)
    by_hand = {rate: _left_out(target, params, 6, rate) for rate in (0.01, 0.05)}
    # One creeps, one leaps; and what leaps does nearly as well with a step more.
    alike = {rate: np.flatnonzero(losses <= 1.02 * losses.min())[-1] for rate, losses in by_hand.items()}
    assert alike[0.01] == by_hand[0.01].argmin() == 6 and 0 < by_hand[0.05].argmin() < alike[0.05] < 6
    for rates in ((0.01,), (0.05,), (0.01, 0.05)):
        steps, rate = choose_steps(_MODEL, target, params, most=6, rates=rates, key=_KEY)
        assert rate == min(rates, key=lambda rate: by_hand[rate].min()) and steps == alike[rate]
        config = AdaptConfig(update="shared", shared_steps=6, shared_rates=rates)
        made = adapt(_MODEL, config, target, params, key=_KEY)
        assert (made.steps, made.learning_rate) == (steps, rate)
        jax.tree.map(np.testing.assert_array_equal, made.params, _moved(target, params, steps=steps, rate=rate))
    # A rate at which the loss leaves the numbers is none to take.
    assert choose_steps(_MODEL, target, params, most=6, rates=(0.01, 1e38), key=_KEY) == (6, 0.01)
    # Neither is it where nothing was read of a part of the days.
    observed = np.array(target.bank.observed).reshape(8, -1)
    observed[:, 211:235] = 0
    bank = target.bank.replace(observed=jax.device_put(observed.reshape(-1)))
    unread = target.replace(bank=bank)
    chosen = choose_steps(_MODEL, unread, params, most=6, rates=(0.01,), key=_KEY)
    assert chosen[0] > 0 and choose_steps(_MODEL, unread, params, most=6, rates=(0.01, 1e38), key=_KEY) == chosen
    # No step at all, where every one does harm, nor where nothing was read of any part.
    best = _moved(target, params, steps=400, rate=0.01)
    assert choose_steps(_MODEL, target, best, most=6, rates=(0.3, 0.6), key=_KEY)[0] == 0
    nothing = target.replace(bank=target.bank.replace(observed=jax.device_put(0 * observed.reshape(-1))))
    assert choose_steps(_MODEL, nothing, params, most=6, rates=(0.01,), key=_KEY)[0] == 0


def test_of_many_steps_some_are_judged(target, monkeypatch):
    params, asked, descend = _starts(1, 8), [], shared._descend
    monkeypatch.setattr(shared, "_descend", lambda *given, **how: (asked.append(r := descend(*given, **how)), r)[1])
    steps, _ = choose_steps(_MODEL, target, params, most=44, rates=(1e-3,), key=_KEY)
    assert {len(one.validation) for one in asked} == {1, 15} and steps == 44  # after 3, 6, ..., 42, 44
    # However they are called.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        *(_moved(target, params, steps=5, rate=1e-3, stride=stride) for stride in (1, 2)),
    )


def test_devices_choose_alike_and_so_do_regions_side_by_side(target, monkeypatch):
    devices, curves, descend = jax.local_devices(), [], shared._descend
    monkeypatch.setattr(shared, "_descend", lambda *given, **how: (curves.append(r := descend(*given, **how)), r)[1])
    for count, side_by_side in ((1, 1), (1, 16), (2, 3)):
        monkeypatch.setattr(parallel.jax, "local_devices", lambda count=count, **host: devices[:count])
        choose_steps(_MODEL, target, _starts(1, 8), most=2, rates=(0.1,), rows_side_by_side=side_by_side, key=_KEY)
    made = np.concatenate([curve.validation for curve in curves]).reshape(3, 3, 3)
    np.testing.assert_allclose(made, made[[0, 0, 0]], rtol=1e-5)
    assert len(np.unique(made[0].round(6))) == 9


def test_days_are_left_out_in_so_many_parts_and_one_day_leaves_nothing_to_choose_by(simulated_cities, target):
    starts = np.asarray(target.support_starts)
    parts = list(shared._parts_left_out(target, starts, 3))
    assert len(parts) == 3 and len(list(shared._parts_left_out(target, starts, 2))) == 2
    # Of the first day half are the history of its windows, and on the last all forecasts have to end.
    assert [int(judged.sum()) for _, judged in parts] == [12, 24, 19]
    assert all((trained * judged == 0).all() and trained.sum() > 20 for trained, judged in parts)
    week = prepare_target(simulated_cities[2], DataConfig(support_days=7, max_neighbours=2))
    sizes = [judged.sum() for _, judged in shared._parts_left_out(week, np.asarray(week.support_starts), 3)]
    assert sizes == [12 + 24 + 19, 24 * 2, 24 * 2]
    day = prepare_target(simulated_cities[2], DataConfig(support_days=1, max_neighbours=2))
    assert list(shared._parts_left_out(day, np.asarray(day.support_starts), 3)) == []
    assert choose_steps(_MODEL, day, _starts(1, 8), most=6, rates=(0.3,), key=_KEY)[0] == 0
