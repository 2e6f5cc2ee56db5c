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
from gpdiff_jax.transfer.adapt import AdaptConfig, adapt
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.shared import add_to_all, city_update

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


def _loss(target: Target, params: dict) -> float:
    """Mean over all regions and samples of the loss on all support windows."""

    @jax.jit
    def of_row(params, region):
        graph, windows = region_windows(target, region, target.support_starts)
        return masked_huber(target_forecast(_MODEL, target, params, graph, windows), windows.target, windows.mask)

    rows = [jax.tree.map(lambda leaf, k=k, r=r: leaf[k, r], params) for k in range(2) for r in range(8)]
    return float(np.mean([of_row(row, np.int32(number % 8)) for number, row in enumerate(rows)]))


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


def test_fine_tuning_takes_a_fixed_number_of_steps_and_needs_no_zoo(target):
    params, config = _starts(1, 8), AdaptConfig(update="shared", shared_steps=2, shared_rate=1e-2)
    made = adapt(_MODEL, config, target, params, key=_KEY)
    want = _moved(target, params, steps=2, rate=1e-2)
    jax.tree.map(np.testing.assert_array_equal, made.params, want)
    assert (made.learning_rate, made.steps, made.validation_mae) == (1e-2, 2, None)


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
