"""In: small features. Out: the layers' products and hand-made gradients, against plain sums and automatic ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.models.layers import (
    ChannelDense,
    add_shared,
    carry_channels,
    channel_product,
    channels_first,
    unfold,
)

_HIGHEST = jax.lax.Precision.HIGHEST


def _einsum(expression: str):
    return lambda *arrays: jnp.einsum(expression, *arrays, precision=_HIGHEST)


def _plain_carry(walks: jax.Array, x: jax.Array) -> jax.Array:
    carried = jnp.einsum("msn,nct->msct", walks, x, precision=_HIGHEST)
    return carried.reshape(walks.shape[0], -1, x.shape[2])


# The kernel's gradient is one of two products, by whether the kernel has few rows.
_CASES = {
    "channel_product, few channels": (channel_product, _einsum("cd,ncx->ndx"), ((3, 5), (4, 3, 7))),
    "channel_product, many channels": (channel_product, _einsum("cd,ncx->ndx"), ((9, 5), (4, 9, 7))),
    "carry_channels": (carry_channels, _plain_carry, ((4, 2, 6), (6, 3, 5))),
    "add_shared": (add_shared, lambda x, shared: x + shared[None], ((4, 3, 5), (3, 5))),
}


@pytest.fixture(params=_CASES, name="case")
def _case(request: pytest.FixtureRequest) -> tuple:
    return _CASES[request.param]


def _numbers(shapes: tuple, dtype: type, batch: tuple[int, ...] = ()) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(*batch, *shape)), dtype) for shape in shapes]


def _value_and_gradients(function, arrays: list[jax.Array]) -> list[np.ndarray]:
    value, pull = jax.vjp(function, *arrays)
    weights = jnp.sin(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)
    return [np.asarray(leaf) for leaf in (value, *pull(weights))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.float64, 1e-12)])
def test_values_and_gradients_are_those_of_the_plain_sum(case, dtype, tolerance):
    layer, plain, shapes = case
    with jax.enable_x64(dtype == jnp.float64):
        arrays = _numbers(shapes, dtype)
        for got, wanted in zip(_value_and_gradients(layer, arrays), _value_and_gradients(plain, arrays), strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def test_gradients_under_vmap_and_jit_are_those_of_the_plain_sum(case):
    layer, plain, shapes = case
    arrays = _numbers(shapes, jnp.float32, batch=(3,))

    def total(function):
        return jax.jit(jax.grad(lambda *arrays: jnp.sin(jax.vmap(function)(*arrays)).sum(), argnums=(0, 1)))

    for got, wanted in zip(total(layer)(*arrays), total(plain)(*arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_channel_dense_is_a_dense_layer_over_axis_one():
    x = _numbers(((4, 3, 2, 5),), jnp.float32)[0]
    layer = ChannelDense(6)
    variables = layer.init(jax.random.key(0), x)
    params = {**variables["params"], "bias": jnp.arange(6, dtype=jnp.float32)}
    wanted = np.einsum("nctb,cd->ndtb", x, params["kernel"]) + np.arange(6.0)[:, None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, x), wanted, rtol=1e-5, atol=1e-5)


def test_unfold_puts_the_steps_of_a_window_side_by_side():
    x = _numbers(((2, 3, 5, 4),), jnp.float32)[0]
    windows = np.asarray(unfold(x, 2))
    assert windows.shape == (2, 6, 4, 4)
    for step in range(4):
        np.testing.assert_array_equal(windows[:, :3, step], x[:, :, step])
        np.testing.assert_array_equal(windows[:, 3:, step], x[:, :, step + 1])


def test_channels_first_moves_the_last_axis():
    x = _numbers(((2, 3, 5, 4),), jnp.float32)[0]
    np.testing.assert_array_equal(channels_first(x), np.transpose(x, (0, 3, 1, 2)))
