"""In: a region graph with H steps of readings and H + P steps of covariates. Out: the centre's next P steps.

DCRNN (Li, Yu, Shahabi, Liu, "Diffusion Convolutional Recurrent Neural Network", arXiv 1707.01926), cut to the centre.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.graphs import walks_beside_self
from gpdiff_jax.models.layers import (
    ChannelDense,
    add_shared,
    carry_channels,
    channel_product,
    channels_first,
    horizon_head,
)
from gpdiff_jax.models.protocol import Model, ModelSizes, linen_model
from gpdiff_jax.models.registry import register_model

_ORDER = 2  # steps of the diffusion per direction


class DCRNN(nn.Module):
    """A gated recurrent unit whose maps are diffusion convolutions in both directions (eq. 3), and a head per step.

    The published model has two layers of 64 units, an encoder and a decoder that feeds on its own forecasts; here are
    19,238 parameters in 8 tensors without covariates, 22,458 in 11 with the calendar. What differs, and why: one layer
    of 32 units, a size that a region's few thousand windows can fit and a generator can learn; no decoder, since a
    decoder at the centre would need the forecasts of its neighbours, the whole graph once more: the head reads the
    encoder's last state and the covariates of the step that it forecasts; the last step is computed at the centre
    alone.
    """

    sizes: ModelSizes
    units: int = 32
    hidden: int = 64

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, history: Float[Array, "N H *B I"], covariates: Float[Array, "HP *B F"]
    ) -> Float[Array, "P *B 1"]:
        """Returns the scaled forecast of the centre."""
        length, units = self.sizes.history, self.units
        seen, ahead = covariates[:length], covariates[length:]
        history, walks = history[:-1], walks_beside_self(graph, _ORDER)[:-1, :, :-1]  # the last node is always spare
        init = nn.initializers.lecun_normal()
        num_parts = walks.shape[1]
        kernels = {
            "gates": self.param("cell_gates", init, (num_parts * units, 2 * units)),
            "candidate": self.param("cell_candidate", init, (num_parts * units, units)),
        }

        def diffuse(x: jax.Array, name: str, *, at_centre: bool = False) -> jax.Array:
            parts = carry_channels(walks[: 1 if at_centre else None], x)
            product = channel_product(kernels[name], parts.reshape(*parts.shape[:2], -1))
            return product.reshape(*product.shape[:2], *x.shape[2:])

        # What the inputs add to every gate does not wait for the state: it is made for all steps at once.
        driven = ChannelDense(3 * units, name="cell_input")(carry_channels(walks, channels_first(history)))
        if self.sizes.num_covariates:
            clock = ChannelDense(3 * units, use_bias=False, name="cell_covariates")
            driven = add_shared(driven, clock(channels_first(seen[None]))[0])
        driven = jnp.moveaxis(driven, 2, 0)

        def gates_of(state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            gates = jax.nn.sigmoid(inputs[:, : 2 * units] + diffuse(state, "gates"))
            return gates[:, :units], gates[:, units:]

        def step(state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, None]:
            reset, update = gates_of(state, inputs)
            candidate = jnp.tanh(inputs[:, 2 * units :] + diffuse(reset * state, "candidate"))
            return update * state + (1.0 - update) * candidate, None

        # The state before the first step is zero, so that step carries nothing.
        update = jax.nn.sigmoid(driven[0, :, units : 2 * units])
        state = (1.0 - update) * jnp.tanh(driven[0, :, 2 * units :])
        state, _ = jax.lax.scan(step, state, driven[1 : length - 1])
        reset, update = gates_of(state, driven[-1])
        remembered = diffuse(reset * state, "candidate", at_centre=True)[0]
        candidate = jnp.tanh(driven[-1, 0, 2 * units :] + remembered)
        state = jnp.moveaxis(update[0] * state[0] + (1.0 - update[0]) * candidate, 0, -1)
        return horizon_head(self, state, ahead, hidden=self.hidden)


def _make_dcrnn(sizes: ModelSizes) -> Model:
    if sizes.history < 2:
        raise InputError(f"model 'dcrnn' needs a history of at least 2 steps, got {sizes.history}")
    # The recurrent cell mixes time and graph in every weight.
    return linen_model("dcrnn", DCRNN(sizes), {"cell": "mixed", "head": "output"})


register_model("dcrnn", _make_dcrnn)
