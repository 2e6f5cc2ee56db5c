"""In: features [N, T, ..., C] of a region graph, batch axes between time and channels. Out: the parts models share.

With the batch inside, a slice of time is one block of memory and mixing over nodes is one matrix product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unfold(x: jax.Array, kernel_size: int, *, axis: int) -> jax.Array:
    """Every window of `kernel_size` steps along `axis` as one row: [..., T, ..., C] to [..., T', ..., K * C]."""
    steps = x.shape[axis] - kernel_size + 1
    windows = [jax.lax.slice_in_dim(x, k, k + steps, axis=axis) for k in range(kernel_size)]
    return jnp.concatenate(windows, axis=-1)


def gated_linear(x: Float[Array, "... two_C"]) -> Float[Array, "... C"]:
    """P * sigmoid(Q), a gated linear unit (Dauphin et al., arXiv 1612.08083)."""
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def mix_nodes(walks: Float[Array, "S M N"], x: Float[Array, "N *X C"]) -> Float[Array, "M *X SC"]:
    """Features of every node carried along S walks: row m of walk s says how much of each node reaches node m."""
    mixed = jnp.tensordot(walks, x, axes=1)
    mixed = jnp.moveaxis(mixed, 0, -2)
    return mixed.reshape(*mixed.shape[:-2], -1)


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
    batch = (1,) * (features.ndim - 1)
    state = nn.Dense(hidden, use_bias=False, name="head_state")(features)
    lead = module.param("head_lead", nn.initializers.zeros_init(), (horizon, hidden))
    units = state[None] + lead.reshape(horizon, *batch, hidden)
    if num_covariates:
        units = units + nn.Dense(hidden, use_bias=False, name="head_covariates")(ahead)
    readout = module.param("head_readout", nn.initializers.lecun_normal(), (horizon, hidden))
    forecast = jnp.einsum("p...h,ph->p...", nn.relu(units), readout)
    forecast = forecast + module.param("head_bias", nn.initializers.zeros_init(), (horizon,)).reshape(horizon, *batch)
    if num_covariates:
        direct = module.param("head_direct", nn.initializers.zeros_init(), (num_covariates,))
        forecast = forecast + ahead @ direct
    return forecast[..., None]
