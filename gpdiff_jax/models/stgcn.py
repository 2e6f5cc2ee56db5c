"""In: a region graph with H steps of readings and H + P steps of covariates. Out: the centre's next P steps.

STGCN (Yu, Yin, Zhu, "Spatio-Temporal Graph Convolutional Networks", arXiv 1709.04875), cut to what reaches the centre.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.graphs import centre_weights
from gpdiff_jax.models.layers import ChannelDense, add_shared, channels_first, horizon_head, unfold
from gpdiff_jax.models.protocol import Model, ModelSizes, linen_model
from gpdiff_jax.models.registry import register_model

_KERNEL = 4


class STGCN(nn.Module):
    """One spatio-temporal block (gate, first-order graph convolution, gate), an output gate, a head per horizon step.

    The published code has 16,960 parameters in 11 tensors; here are 18,382 in 12 without covariates, 24,802 in 15 with
    the calendar. What differs, and why: the published time block adds two convolutions of the same input inside one
    ReLU, identifiable only as a sum, so the paper's own gate stands here; layer norm over the nodes is left out, since
    it would let in padding and nodes that no edge connects with the centre; the graph convolution has the paper's
    first-order pair (self, neighbours) and is computed at the centre alone, since nothing else reaches the centre's
    forecast; the head sees the covariates of the step that it forecasts, also by a linear path, so that what a region
    does at a given hour is a linear function of its parameters.
    """

    sizes: ModelSizes
    channels: int = 32
    bottleneck: int = 8
    hidden: int = 64

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, history: Float[Array, "N H *B I"], covariates: Float[Array, "HP *B F"]
    ) -> Float[Array, "P *B 1"]:
        """Returns the scaled forecast of the centre."""
        seen, ahead = covariates[: self.sizes.history], covariates[self.sizes.history :]
        history = channels_first(history[:-1])  # the last node is always spare
        gates = ChannelDense(2 * self.channels, name="gate_in")(unfold(history, _KERNEL))
        if self.sizes.num_covariates:
            # The nodes of a region graph share their clock: its part of the convolution is made once, not per node.
            clock = ChannelDense(2 * self.channels, use_bias=False, name="gate_in_covariates")
            gates = add_shared(gates, clock(unfold(channels_first(seen[None]), _KERNEL))[0])
        x = _gated(gates)
        flow = (centre_weights(graph)[None, :-1] @ x.reshape(x.shape[0], -1)).reshape(1, *x.shape[1:])
        x = nn.relu(ChannelDense(self.bottleneck, name="graph")(jnp.concatenate([x[:1], flow], axis=1)))
        for name in ("gate_mid", "gate_out"):
            x = _gated(ChannelDense(2 * self.channels, name=name)(unfold(x, min(_KERNEL, x.shape[2]))))
        features = jnp.moveaxis(jnp.swapaxes(x[0], 0, 1).reshape(-1, *x.shape[3:]), 0, -1)
        return horizon_head(self, features, ahead, hidden=self.hidden)


def _gated(gates: Float[Array, "N CC *X"]) -> Float[Array, "N C *X"]:
    """The first half of the channels times the sigmoid of the second."""
    channels = gates.shape[1] // 2
    return gates[:, :channels] * jax.nn.sigmoid(gates[:, channels:])


def _make_stgcn(sizes: ModelSizes) -> Model:
    shortest = 2 * (_KERNEL - 1) + 1
    if sizes.history < shortest:
        raise InputError(f"model 'stgcn' needs a history of at least {shortest} steps, got {sizes.history}")
    return linen_model("stgcn", STGCN(sizes), {"gate": "temporal", "graph": "graph", "head": "output"})


register_model("stgcn", _make_stgcn)
