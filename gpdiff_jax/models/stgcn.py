"""In: a region graph with H steps of readings and H + P steps of covariates. Out: the centre's next P steps.

STGCN (Yu, Yin, Zhu, "Spatio-Temporal Graph Convolutional Networks", arXiv 1709.04875), cut to what reaches the centre.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model, ModelSizes, register_model
from gpdiff_jax.regions import centre_weights
from gpdiff_jax.typing import Params

_KERNEL = 4
_CHANNELS = 32
_BOTTLENECK = 8
_HIDDEN = 64


def _unfold(x: jax.Array, kernel_size: int) -> jax.Array:
    """[..., T, C] to [..., T - kernel_size + 1, kernel_size * C]: every window of steps as one row."""
    steps = x.shape[-2] - kernel_size + 1
    return jnp.concatenate([x[..., k : k + steps, :] for k in range(kernel_size)], axis=-1)


def _gate(x: jax.Array) -> jax.Array:
    """P * sigmoid(Q), eq. 7 of the paper."""
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


class STGCN(nn.Module):
    """One spatio-temporal block (gate, first-order graph convolution, gate), an output gate, a head per horizon step.

    The published code has 16,960 parameters in 11 tensors; here are 18,382 in 12 without covariates, 24,802 in 15 with
    the calendar. What differs, and why: the published time block adds two convolutions of the same input inside one
    ReLU, identifiable only as a sum, so the paper's own gate stands here; layer norm is left out, its statistics would
    be state; the graph convolution has the paper's first-order pair (self, neighbours) and is computed at the centre
    alone, since nothing else reaches the centre's forecast; the head sees the covariates of the step that it forecasts,
    also by a linear path, so that what a region does at a given hour is a linear function of its parameters.
    """

    sizes: ModelSizes

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, history: Float[Array, "N H I"], covariates: Float[Array, "HP F"]
    ) -> Float[Array, "P 1"]:
        """Returns the scaled forecast of the centre."""
        seen, ahead = covariates[: self.sizes.history], covariates[self.sizes.history :]
        x = nn.Dense(2 * _CHANNELS, name="gate_in")(_unfold(history, _KERNEL))
        if self.sizes.num_covariates:
            # The nodes of a region graph share their clock: its part of the convolution is made once, not per node.
            x = x + nn.Dense(2 * _CHANNELS, use_bias=False, name="gate_in_covariates")(_unfold(seen, _KERNEL))[None]
        x = _gate(x)
        flow = jnp.einsum("n,ntc->tc", centre_weights(graph), x)
        x = nn.relu(nn.Dense(_BOTTLENECK, name="graph")(jnp.concatenate([x[0], flow], axis=-1)))
        x = _gate(nn.Dense(2 * _CHANNELS, name="gate_mid")(_unfold(x, _KERNEL)))
        x = _gate(nn.Dense(2 * _CHANNELS, name="gate_out")(_unfold(x, min(_KERNEL, x.shape[-2]))))
        state = nn.Dense(_HIDDEN, use_bias=False, name="head_state")(x.reshape(-1))
        lead = self.param("head_lead", nn.initializers.zeros_init(), (self.sizes.horizon, _HIDDEN))
        hidden = state[None, :] + lead
        if self.sizes.num_covariates:
            hidden = hidden + nn.Dense(_HIDDEN, use_bias=False, name="head_covariates")(ahead)
        readout = self.param("head_readout", nn.initializers.lecun_normal(), (self.sizes.horizon, _HIDDEN))
        forecast = jnp.einsum("ph,ph->p", nn.relu(hidden), readout)
        forecast = forecast + self.param("head_bias", nn.initializers.zeros_init(), (self.sizes.horizon,))
        if self.sizes.num_covariates:
            direct = self.param("head_direct", nn.initializers.zeros_init(), (self.sizes.num_covariates,))
            forecast = forecast + ahead @ direct
        return forecast[:, None]


def _make_stgcn(sizes: ModelSizes) -> Model:
    shortest = 2 * (_KERNEL - 1) + 1
    if sizes.history < shortest:
        raise InputError(f"model 'stgcn' needs a history of at least {shortest} steps, got {sizes.history}")
    module = STGCN(sizes)

    def apply(params: Params, graph: jraph.GraphsTuple, history: jax.Array, covariates: jax.Array) -> Any:
        return module.apply({"params": params}, graph, history, covariates)

    return Model("stgcn", init=lambda *arguments: module.init(*arguments)["params"], apply=apply)


register_model("stgcn", _make_stgcn)
