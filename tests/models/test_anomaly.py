"""In: models that know nothing of it. Out: the same, forecasting around what is expected, at first exactly that."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model, ModelSizes, linen_model, make_model, register_model, registry
from gpdiff_jax.models.anomaly import (
    LOG_DEVIATION,
    PROFILE,
    SAME_KIND,
    damp_anomalies,
    forecast_anomalies,
    linear_leaves,
)
from gpdiff_jax.models.protocol import abstract_params, example_inputs
from tests.tiny import scale_and_bias

_SIZES = ModelSizes(12, 6, 5, 23, anomaly=True)
_RAW = _SIZES._replace(anomaly=False)
_MODELS = ("stgcn", "graph_wavenet", "dcrnn", "stid", "tiny")


def _seen(seed: int = 0):
    graph, *inputs = example_inputs(_SIZES)
    rng = np.random.default_rng(seed)
    return graph, *(rng.normal(size=x.shape).astype(np.float32) for x in inputs)


def _expected(covariates):
    ahead = covariates[_SIZES.history :]
    return ahead[:, PROFILE, None], np.exp(ahead[:, LOG_DEVIATION, None])


@pytest.mark.parametrize("name", _MODELS)
def test_a_forecast_is_the_profile_and_the_models_own_in_units_of_the_deviation(name):
    raw, model, seen = make_model(name, _RAW), make_model(name, _SIZES), _seen()
    params = jax.jit(raw.init)(jax.random.key(0), *seen)
    profile, deviation = _expected(seen[2])
    want = profile + deviation * np.asarray(jax.jit(raw.apply)(params, *seen))
    np.testing.assert_allclose(jax.jit(model.apply)(params, *seen), want, rtol=1e-5, atol=1e-5)
    if model.apply_batch is not None:
        batch = np.stack([seen[1]] * 2, axis=2), np.stack([seen[2], seen[2][::-1]], axis=1)
        got = jax.jit(model.apply_batch)(params, seen[0], *batch)
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-4, atol=1e-4)
        assert (np.abs(got[:, 1] - want) > 1e-3).any()


@pytest.mark.parametrize("name", _MODELS)
def test_a_forecast_begins_at_the_profile_and_every_parameter_still_learns(name):
    model, raw = make_model(name, _SIZES), make_model(name, _RAW)
    params = jax.jit(model.init)(jax.random.key(1), *_seen())
    apply = jax.jit(model.apply)
    for seed in (2, 3):
        seen = _seen(seed)
        np.testing.assert_array_equal(apply(params, *seen), _expected(seen[2])[0])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.jit(raw.init)(jax.random.key(1), *_seen()))

    @jax.jit
    def step(params, seen):
        grads = jax.grad(lambda p: jnp.square(model.apply(p, *seen) - 1.0).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), grads

    moved = jax.tree.map(np.asarray, params)
    for seed in range(3):
        moved, _ = step(moved, _seen(seed))
    still = [
        path
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True
        )
        if np.array_equal(before, after)
    ]
    assert not still


class _Skips(nn.Module):
    """Departs from the last reading, so no parameters at 0 make its forecast 0."""

    sizes: ModelSizes

    @nn.compact
    def __call__(self, graph, history, covariates):
        del graph, covariates
        change = nn.Dense(self.sizes.horizon, name="change")(history[0, :, ..., 0].T).T
        return (history[0, -1:, ..., 0] + change)[..., None]


class _Product(nn.Module):
    """Two matrices and nothing between them: 0 in one of them is a start, 0 in both would never be left."""

    sizes: ModelSizes

    @nn.compact
    def __call__(self, graph, history, covariates):
        del graph, covariates
        inner = nn.Dense(3, use_bias=False, name="a")(history[0, :, ..., 0].T)
        return nn.Dense(self.sizes.horizon, use_bias=False, name="b")(inner).T[..., None]


def test_only_what_can_begin_at_0_does():
    skips = linen_model("skips", _Skips(_RAW))
    assert linear_leaves(skips, _RAW) == (False, False)
    product = linen_model("product", _Product(_RAW))
    assert linear_leaves(product, _RAW) == (False, True)
    assert linear_leaves(scale_and_bias(_RAW), _RAW) == (True, True)


def test_a_model_of_the_users_own_is_made_so_without_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def init(key, graph, history, covariates):
        return {"out": {"kernel": jax.random.normal(key, (_SIZES.horizon, _SIZES.history))}}

    def apply(params, graph, history, covariates):
        return (params["out"]["kernel"] @ history[0, :, 0])[:, None]

    register_model("mine", functools.cache(lambda sizes: Model("mine", init, apply)))
    seen = _seen()
    for sizes, zero in ((_RAW, False), (_SIZES, True)):
        model = make_model("mine", sizes)
        start = jax.jit(model.init)(jax.random.key(0), *seen)
        assert bool((start["out"]["kernel"] == 0).all()) == zero
    np.testing.assert_array_equal(jax.jit(model.apply)(start, *seen), _expected(seen[2])[0])


@pytest.mark.parametrize("name", _MODELS)
def test_shapes_are_those_of_its_parameters_and_cost_no_computation(name, monkeypatch):
    """Where it begins at 0 takes a dozen compilations, ten seconds of whoever loads a generator first."""
    model = forecast_anomalies(make_model(name, _RAW), _SIZES)
    whole = abstract_params(model._replace(shapes=None), _SIZES)
    model = forecast_anomalies(make_model(name, _RAW), _SIZES)
    monkeypatch.setattr("gpdiff_jax.models.anomaly.linear_leaves", lambda *_: pytest.fail("it computed"))
    assert abstract_params(model, _SIZES) == whole
    with pytest.raises(pytest.fail.Exception, match="it computed"):
        abstract_params(model._replace(shapes=None), _SIZES)


def test_damping_keeps_a_share_of_the_anomaly_on_kinds_of_day_that_were_seen():
    covariates = np.zeros((3, 15, 4), np.float32)
    covariates[..., PROFILE] = 10.0
    covariates[:, :, SAME_KIND] = np.array([1.0, 0.0, 0.5])[:, None]
    forecast = np.full((3, 3), 20.0, np.float32)
    damped = damp_anomalies(*jax.device_put((forecast, covariates)), (0.8, 0.4))
    np.testing.assert_allclose(damped, [[18, 16, 14], [20, 20, 20], [19, 18, 17]], rtol=1e-6)
    np.testing.assert_array_equal(damp_anomalies(*jax.device_put((forecast, covariates)), (1.0, 1.0)), forecast)
    one = damp_anomalies(*jax.device_put((forecast[:, :1], covariates)), (0.8, 0.4))
    np.testing.assert_allclose(one[:, 0], [18, 20, 19], rtol=1e-6)
    with pytest.raises(InputError, match=r"`damping` must be two shares in \[0, 1\], got \(2.0, 0.5\)"):
        DataConfig(damping=(2.0, 0.5))
