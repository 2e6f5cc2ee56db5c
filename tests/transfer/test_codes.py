"""In: starts, two directions and the support days of a city. Out: starts moved along them, as by a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import Target, prepare_target, region_windows
from gpdiff_jax.errors import InputError, NotFiniteError
from gpdiff_jax.models import Model
from gpdiff_jax.models.loss import batch_forecast, masked_huber
from gpdiff_jax.training import parallel
from gpdiff_jax.transfer.adapt import adapt
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.codes import move_along_directions
from gpdiff_jax.transfer.shared import add_to_all, city_update

_DATA = DataConfig(covariates="calendar", support_days=3, max_neighbours=2)
_SILENT = 5
_HOW = {"steps": 3, "rate": 0.5, "most_windows": 10, "rows_side_by_side": 1}


def _apply(params, graph, history, covariates):
    del graph
    seen = jnp.concatenate([history[0, :, 0], covariates[12]])
    return (params["kernel"] @ seen + params["bias"])[:, None]


_MODEL = Model("linear", lambda *_: {}, _apply)


def _params(*axes: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: 0.1 * rng.normal(size=(*axes, *shape)).astype(np.float32) for name, shape in _SHAPES.items()}


_SHAPES = {"bias": (6,), "kernel": (6, 32)}
_DIRECTIONS = _params(2, seed=1)


@pytest.fixture(scope="module", name="target")
def _target(simulated_cities: list[City]) -> Target:
    """One region shows nothing in the support days."""
    city = simulated_cities[2]
    support = prepare_target(city, _DATA).split.support
    values = np.array(city.values)
    values[support.start : support.stop, _SILENT] = np.nan
    return prepare_target(dataclasses.replace(city, values=values), _DATA)


def _at(start: dict, z) -> dict:
    return {name: start[name] + z[0] * _DIRECTIONS[name][0] + z[1] * _DIRECTIONS[name][1] for name in start}


def _loop(target: Target, params: dict, steps: int, rate: float, starts, momentum: float = 0.0) -> list[dict]:
    """Every region after so many steps, one region at a time."""

    @jax.jit
    def gradient(z, start, region):
        graph, windows = region_windows(target, region, starts)

        def loss(z):
            return masked_huber(batch_forecast(_MODEL, _at(start, z), graph, windows), windows.target, windows.mask)

        return jax.grad(loss)(z)

    own = [jax.tree.map(lambda leaf, r=region: leaf[r], params) for region in range(8)]
    z = velocity = np.zeros((8, 2), np.float32)
    for _ in range(steps):
        g = np.stack([gradient(jnp.asarray(z[r]), own[r], jnp.int32(r)) for r in range(8)])
        velocity = momentum * velocity - rate * (g / 2 + g.mean(axis=0) / 2)
        z = z + velocity
    return [_at(own[region], z[region]) for region in range(8)]


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_steps_along_the_directions_agree_with_a_loop(target, momentum):
    params = _params(2, 8, seed=0)
    moved = move_along_directions(_MODEL, target, params, _DIRECTIONS, momentum=momentum, **_HOW)
    everything = np.asarray(target.support_starts)
    picked = everything[np.linspace(0, len(everything) - 1, 10).round().astype(int)]
    for sample in range(2):
        # A sample moves on its own.
        own = jax.tree.map(lambda leaf, k=sample: leaf[k], params)
        want = _loop(target, own, 3, 0.5, jnp.asarray(picked), momentum)
        for region in range(8):
            for name in _SHAPES:
                np.testing.assert_allclose(moved[name][sample, region], want[region][name], rtol=1e-4, atol=1e-5)
    gone = np.abs(moved["kernel"] - params["kernel"]).max(axis=(0, 2, 3))
    # A region that shows nothing moves with its city.
    assert (gone > 1e-3).all()


def test_the_less_was_read_the_shorter_are_the_steps(target):
    everything = np.asarray(target.support_starts)
    assert len(everything) == 72 - 12 - 6 + 1  # three days, read throughout
    few = dataclasses.replace(target, support_starts=target.support_starts[:11])
    params = _params(1, 8, seed=0)
    moved = move_along_directions(_MODEL, few, params, _DIRECTIONS, **_HOW | {"most_windows": 11})
    own = jax.tree.map(lambda leaf: leaf[0], params)
    want = _loop(target, own, 3, 0.5 * 11 / 55, jnp.asarray(everything[:11]))
    for region in range(8):
        for name in _SHAPES:
            np.testing.assert_allclose(moved[name][0, region], want[region][name], rtol=1e-4, atol=1e-5)


def test_more_devices_change_nothing_and_neither_does_what_fills_them_up(target, monkeypatch):
    """Seven regions on two devices: the eighth row is no region, and counts in no mean."""
    devices = jax.local_devices()
    assert len(devices) == 2
    cut = jax.tree.map(lambda leaf: leaf[:7], target.graphs)
    seven, params = dataclasses.replace(target, graphs=cut, region_ids=target.region_ids[:7]), _params(1, 7, seed=0)
    made = []
    for count in (1, 2):
        monkeypatch.setattr(parallel.jax, "local_devices", lambda count=count: devices[:count])
        made.append(move_along_directions(_MODEL, seven, params, _DIRECTIONS, **_HOW))
    for name in _SHAPES:
        assert made[0][name].shape[:2] == (1, 7)
        np.testing.assert_allclose(made[1][name], made[0][name], rtol=1e-5, atol=1e-6)


def test_fine_tuning_in_codes_takes_the_leading_directions_and_needs_some(target):
    params = _params(1, 8, seed=0)
    moves = {"steps": 2, "rate": 0.3, "momentum": 0.6}
    config = AdaptConfig(
        directions=1,
        **{f"code_{name}": value for name, value in moves.items()},
        code_windows=10,
        shared_steps=9,
        shared_folds=0,
    )
    made = adapt(_MODEL, config, target, params, key=jax.random.key(0), directions=_DIRECTIONS)
    first = jax.tree.map(lambda leaf: leaf[:1], _DIRECTIONS)
    together = {
        "steps": config.shared_steps,
        "rate": config.shared_rates[-1],
        "most_windows": 10,
        "key": jax.random.key(0),
    }
    start = add_to_all(params, city_update(_MODEL, target, params, **together))
    want = move_along_directions(_MODEL, target, start, first, **(_HOW | moves))
    jax.tree.map(np.testing.assert_array_equal, made.params, want)
    assert not np.array_equal(start["bias"], params["bias"])
    alone = adapt(
        _MODEL,
        dataclasses.replace(config, shared_steps=0),
        target,
        params,
        key=jax.random.key(0),
        directions=_DIRECTIONS,
    )
    want = move_along_directions(_MODEL, target, params, first, **(_HOW | moves))
    jax.tree.map(np.testing.assert_array_equal, alone.params, want)
    assert (made.learning_rate, made.steps, made.validation_mae) == (0.3, 2, None)
    with pytest.raises(InputError, match="need the directions of a zoo; without them take `update='shared'`"):
        adapt(_MODEL, config, target, params, key=jax.random.key(0))
    with pytest.raises(InputError, match="`update` must be one of codes, shared, own, got 'all'"):
        AdaptConfig(update="all")
    with pytest.raises(InputError, match="`code_rate` must be above 0"):
        AdaptConfig(code_rate=0.0)
    with pytest.raises(InputError, match="`code_rate` must be finite, got inf"):
        AdaptConfig(code_rate=float("inf"))
    with pytest.raises(InputError, match="`code_steps`"):
        AdaptConfig(code_steps=0)
    with pytest.raises(InputError, match=r"`code_momentum` must be at least 0 and below 1, got 1\.0"):
        AdaptConfig(code_momentum=1.0)


@pytest.mark.parametrize(
    ("covariates", "moves"),
    [("profile", (12, 1.0, 0.0)), ("calendar", (48, 4.0, 0.9)), ("none", (48, 4.0, 0.9))],
)
def test_steps_in_codes_go_by_whether_a_profile_is_seen(simulated_cities, covariates, moves):
    target = prepare_target(simulated_cities[2], dataclasses.replace(_DATA, covariates=covariates))
    model = Model("bias", lambda *_: {}, lambda params, *_: params["bias"][:, None])
    params, directions = ({"bias": one["bias"]} for one in (_params(1, 8, seed=0), _DIRECTIONS))
    how = {"key": jax.random.key(0), "directions": directions}
    config = AdaptConfig(code_windows=10, shared_steps=0)
    given = AdaptConfig(code_windows=10, shared_steps=0, code_steps=3, code_rate=0.5, code_momentum=0.6)
    for one, (steps, rate, momentum) in ((config, moves), (given, (3, 0.5, 0.6))):
        made = adapt(model, one, target, params, **how)
        like = _HOW | {"steps": steps, "rate": rate, "momentum": momentum}
        want = move_along_directions(model, target, params, directions, **like)
        np.testing.assert_array_equal(made.params["bias"], want["bias"])
        assert (made.steps, made.learning_rate) == (steps, rate)


def test_a_support_without_a_window_leaves_the_starts_as_they_are(target):
    params = _params(1, 8, seed=0)
    without = dataclasses.replace(target, support_starts=target.support_starts[:0])
    assert move_along_directions(_MODEL, without, params, _DIRECTIONS, **_HOW) is params
    made = adapt(_MODEL, AdaptConfig(), without, params, key=jax.random.key(0), directions=_DIRECTIONS)
    assert made.params is params
    assert made[1:4] == (None, 0, None) and made[5:] == (None, None)  # no rate of steps that were not taken


def test_steps_that_are_far_too_long_lead_no_further_than_regions_may_differ(target):
    params = _params(2, 8, seed=0)
    moved = move_along_directions(_MODEL, target, params, _DIRECTIONS, momentum=0.9, **_HOW | {"rate": 1e9, "steps": 9})
    gone = _flat(moved) - _flat(params)
    z, *_ = np.linalg.lstsq(_flat(_DIRECTIONS).T, gone.reshape(16, -1).T, rcond=None)
    assert 7.9 < np.abs(z).max() < 8.1
    # One region whose loss is no number makes the mean of its city none.
    params["bias"][1, 3] = np.nan
    with pytest.raises(NotFiniteError, match=r"of length 0\.5 left the finite numbers; lower `code_rate`"):
        move_along_directions(_MODEL, target, params, _DIRECTIONS, **_HOW)


def _flat(params: dict) -> np.ndarray:
    parts = [params[name].reshape(*params[name].shape[: -len(shape)], -1) for name, shape in _SHAPES.items()]
    return np.concatenate(parts, axis=-1)
