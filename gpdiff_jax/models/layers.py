"""In: features [N, T, ..., C] of a region graph, batch axes between time and channels. Out: the parts models share.

With the batch inside, a slice of time is one block of memory and mixing over nodes is one matrix product. Every product
is made of two matrices: XLA on a CPU takes seven times as long for the gradient of one over several axes.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense(x: Float[Array, "*X C"], features: int, *, name: str, use_bias: bool = True) -> Float[Array, "*X D"]:
    """`nn.Dense` of the calling module, applied to all rows at once."""
    rows = nn.Dense(features, use_bias=use_bias, name=name)(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], features)


class TwoDense(nn.Module):
    """A dense layer of 2D features whose halves are made apart, since nobody needs them side by side."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*X C"]) -> tuple[Float[Array, "*X D"], Float[Array, "*X D"]]:
        """Returns the first and the second half."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 2 * self.features))
        rows = x.reshape(-1, x.shape[-1])
        halves = [rows @ kernel[:, : self.features], rows @ kernel[:, self.features :]]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (2 * self.features,))
            halves = [halves[0] + bias[None, : self.features], halves[1] + bias[None, self.features :]]
        first, second = (half.reshape(*x.shape[:-1], self.features) for half in halves)
        return first, second


def unfold(x: jax.Array, kernel_size: int, *, axis: int) -> jax.Array:
    """Every window of `kernel_size` steps along `axis` as one row: [..., T, ..., C] to [..., T', ..., K * C]."""
    steps = x.shape[axis] - kernel_size + 1
    windows = [jax.lax.slice_in_dim(x, k, k + steps, axis=axis) for k in range(kernel_size)]
    return jnp.concatenate(windows, axis=-1)


@jax.custom_vjp
def add_shared(x: Float[Array, "N *X C"], shared: Float[Array, "*X C"]) -> Float[Array, "N *X C"]:
    """Adds the same to every row of axis 0; the sum in its gradient is made as a matrix product, which is faster."""
    return x + shared[None]


def _add_shared_forward(x: jax.Array, shared: jax.Array) -> tuple[jax.Array, None]:
    return add_shared(x, shared), None


def _add_shared_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    summed = jnp.ones((1, grad.shape[0]), grad.dtype) @ grad.reshape(grad.shape[0], -1)
    return grad, summed.reshape(grad.shape[1:])


add_shared.defvjp(_add_shared_forward, _add_shared_backward)


def carry_nodes(walks: Float[Array, "S M N"], x: Float[Array, "N *X C"]) -> list[Float[Array, "M *X C"]]:
    """Features of every node carried along each of S walks: row m of a walk says how much of each node reaches m."""
    rows = x.reshape(x.shape[0], -1)
    return [(walk @ rows).reshape(walk.shape[0], *x.shape[1:]) for walk in walks]


class SumDense(nn.Module):
    """A dense layer of several arrays side by side, without ever putting them side by side."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, parts: Sequence[Float[Array, "*X C"]]) -> Float[Array, "*X D"]:
        """Returns the sum of the parts' products with their rows of one kernel."""
        width = parts[0].shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (len(parts) * width, self.features))
        pairs = zip(parts, kernel.reshape(len(parts), width, self.features), strict=True)
        total = functools.reduce(jnp.add, [part.reshape(-1, width) @ rows for part, rows in pairs])
        if self.use_bias:
            total = total + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None]
        return total.reshape(*parts[0].shape[:-1], self.features)


def horizon_head(
    module: nn.Module, features: Float[Array, "*B D"], ahead: Float[Array, "P *B F"], *, hidden: int
) -> Float[Array, "P *B 1"]:
    """The forecast of every horizon step from the centre's features and that step's covariates.

    A head of its own per step would learn the clock of every step anew; one that sees the covariates of the step that
    it forecasts need not. The linear path from covariates to forecast makes what a region does at a given hour a linear
    function of its parameters.

    Args:
      module: the model, in whose scope the weights get their names, all beginning with `head_`.
      features: of the centre.
      ahead: covariates of the horizon steps; F may be 0.
      hidden: width of the hidden layer.

    Returns:
      Scaled forecasts.
    """
    horizon, num_covariates = ahead.shape[0], ahead.shape[-1]
    state = dense(features, hidden, name="head_state", use_bias=False)
    lead = module.param("head_lead", nn.initializers.zeros_init(), (horizon, hidden))
    # Each step's own row of a matrix, by a product with which step it is: its gradient is a product too, not a sum.
    batch = ahead.shape[1:-1]
    own_step = jnp.eye(horizon, dtype=features.dtype).reshape(horizon, *(1,) * len(batch), horizon)
    own_step = jnp.broadcast_to(own_step, (horizon, *batch, horizon)).reshape(-1, horizon)
    units = (own_step @ lead).reshape(horizon, *batch, hidden)
    if num_covariates:
        units = units + dense(ahead, hidden, name="head_covariates", use_bias=False)
    units = nn.relu(add_shared(units, state))
    readout = module.param("head_readout", nn.initializers.lecun_normal(), (horizon, hidden))
    forecast = ((units.reshape(-1, hidden) @ readout.T) * own_step).sum(axis=-1)
    forecast = forecast + own_step @ module.param("head_bias", nn.initializers.zeros_init(), (horizon,))
    if num_covariates:
        direct = module.param("head_direct", nn.initializers.zeros_init(), (num_covariates,))
        forecast = forecast + ahead.reshape(-1, num_covariates) @ direct
    return forecast.reshape(horizon, *batch, 1)
