"""In: a region graph with H steps of readings and H + P steps of covariates. Out: the centre's next P steps.

Graph WaveNet (Wu, Pan, Long, Jiang, Zhang, arXiv 1906.00121), cut to what reaches the centre.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from gpdiff_jax.models.graphs import node_mask, walks_beside_self
from gpdiff_jax.models.layers import ChannelDense, add_shared, carry_channels, channels_first, dense, horizon_head
from gpdiff_jax.models.protocol import Model, ModelSizes, linen_model
from gpdiff_jax.models.registry import register_model

_DILATIONS = (1, 2)  # of the two layers of a block
_ORDER = 2  # steps of the diffusion per layer and direction


def _layer_dilations(history: int) -> tuple[int, ...]:
    """Dilations of whole blocks, as many as reach back over the history: four blocks for 12 steps, as in the paper."""
    blocks = max(1, -(-(history - 1) // sum(_DILATIONS)))
    return _DILATIONS * blocks


def _steps_read(dilations: tuple[int, ...]) -> list[list[int]]:
    """For every layer's input and the last output: the steps back from now that somebody reads, oldest first."""
    read = [{0}]
    for dilation in reversed(dilations):
        read.append(read[-1] | {step + dilation for step in read[-1]})
    return [sorted(steps, reverse=True) for steps in reversed(read)]


def _pick(x: jax.Array, held: list[int], wanted: list[int]) -> jax.Array:
    """The wanted steps out of the held ones, along axis 2; both are evenly spaced."""
    rows = [held.index(step) for step in wanted]
    stride = rows[1] - rows[0] if len(rows) > 1 else 1
    return jax.lax.slice_in_dim(x, rows[0], rows[-1] + 1, stride, axis=2)


def _normalise(x: jax.Array) -> jax.Array:
    """Unit root mean square over the channels (Zhang and Sennrich, arXiv 1910.07467)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + 1e-5)


class GraphWaveNet(nn.Module):
    """Gated dilated convolutions and diffusion convolutions in both directions, with skips from every layer.

    The published code, all widths 32, has 91,904 parameters in 59 tensors, 13,376 of them without a gradient; here are
    90,726 in 37 without covariates, 92,666 in 40 with the calendar. What differs, and why: of the last layer only the
    skip is made, since nothing reads its graph convolution; skips are read at the centre's last step, the only one that
    the head keeps, and summed before the ReLU, so that they share one bias; every layer is computed only at the steps
    and nodes that somebody reads; batch norm, whose statistics would be state outside the parameters, is a root mean
    square norm over channels without weights of its own, since a scale would merge into the convolutions around it; no
    dropout; as many blocks as the history needs (the paper's four for 12 steps); the head sees the covariates of the
    step that it forecasts.

    The paper's adaptive adjacency learns vectors for the nodes of one fixed graph. The nodes of a region graph have no
    fixed places, so the optional adaptive part (`adaptive` above 0, its rank) makes a node's vectors from its history.
    """

    sizes: ModelSizes
    channels: int = 32
    hidden: int = 64
    adaptive: int = 0

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, history: Float[Array, "N H *B I"], covariates: Float[Array, "HP *B F"]
    ) -> Float[Array, "P *B 1"]:
        """Returns the scaled forecast of the centre."""
        seen, ahead = covariates[: self.sizes.history], covariates[self.sizes.history :]
        dilations = _layer_dilations(self.sizes.history)
        read = _steps_read(dilations)
        history, walks = history[:-1], walks_beside_self(graph, _ORDER)[:-1, :, :-1]  # the last node is always spare
        own_walk = self._adaptive_walk(graph, history) if self.adaptive else None

        x = ChannelDense(self.channels, use_bias=False, name="input")(channels_first(history))
        if self.sizes.num_covariates:
            clock = ChannelDense(self.channels, use_bias=False, name="input_covariates")
            x = add_shared(x, clock(channels_first(seen[None]))[0])
        # Steps before the history are zero.
        missing = len(read[0]) - self.sizes.history
        x = jnp.pad(x, [(0, 0), (0, 0), (missing, 0), *[(0, 0)] * (x.ndim - 3)])
        skips = []
        for layer, dilation in enumerate(dilations):
            held, wanted = read[layer], read[layer + 1]
            now = _pick(x, held, wanted)
            pair = jnp.concatenate([_pick(x, held, [step + dilation for step in wanted]), now], axis=1)
            gates = ChannelDense(2 * self.channels, name=f"gate_{layer}")(pair)
            h = jnp.tanh(gates[:, : self.channels]) * jax.nn.sigmoid(gates[:, self.channels :])
            skips.append(h[0, :, -1])
            if layer == len(dilations) - 1:
                break
            # What the last layer makes is read at the centre alone.
            nodes = slice(0, 1 if layer == len(dilations) - 2 else None)
            parts = carry_channels(walks[nodes], h)
            if own_walk is not None:
                own = jnp.einsum("...mn,nct...->mct...", own_walk[..., nodes, :], h)
                parts = jnp.concatenate([parts, own], axis=1)
            x = _normalise(now[nodes] + ChannelDense(self.channels, name=f"graph_{layer}")(parts))
        summed = jnp.moveaxis(jnp.concatenate(skips, axis=0), 0, -1)
        summed = nn.relu(dense(summed, self.hidden, name="skip"))
        return horizon_head(self, summed, ahead, hidden=self.hidden)

    def _adaptive_walk(self, graph: jraph.GraphsTuple, history: Float[Array, "N H *B I"]) -> Float[Array, "*B N N"]:
        nodes = jnp.moveaxis(history, 1, -2)
        nodes = nodes.reshape(*nodes.shape[:-2], -1)
        source = dense(nodes, self.adaptive, name="adaptive_source")
        # A bias here would shift a whole row, which the softmax takes out again.
        sink = dense(nodes, self.adaptive, name="adaptive_sink", use_bias=False)
        likeness = jnp.einsum("m...e,n...e->...mn", source, sink)
        return jax.nn.softmax(jnp.where(node_mask(graph)[:-1], likeness, -jnp.inf), axis=-1)


def _make(name: str, adaptive: int, sizes: ModelSizes) -> Model:
    kinds = {"input": "temporal", "gate": "temporal", "graph": "graph", "skip": "output", "head": "output"}
    kinds |= {"adaptive": "graph"} if adaptive else {}
    return linen_model(name, GraphWaveNet(sizes, adaptive=adaptive), kinds)


for _name, _adaptive in (("graph_wavenet", 0), ("graph_wavenet_adaptive", 10)):
    register_model(_name, partial(_make, _name, _adaptive))
