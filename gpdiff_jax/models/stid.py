"""In: H steps of readings of one region and H + P steps of covariates. Out: its next P steps; no graph is used.

STID (Shao, Zhang, Wang, Wei, Xu, "Spatial-Temporal Identity", arXiv 2208.05233).
"""

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from gpdiff_jax.models.layers import dense, horizon_head
from gpdiff_jax.models.protocol import Model, ModelSizes, linen_model
from gpdiff_jax.models.registry import register_model


class STID(nn.Module):
    """A multi-layer perceptron over the region's history, who the region is, and when it is.

    The published model has four embeddings of width 32 and three residual layers of 128; here are 31,238 parameters in
    15 tensors without covariates, 33,818 in 17 with the calendar. What differs, and why: one embedding of width 64
    takes history and time together, since a sum of linear maps of separate inputs is one map of all; time enters by the
    covariates of the last step seen and, in the head, of the step forecast, instead of tables of vectors that a region
    of three days could not fill; the region's identity is the biases, for every region has parameters of its own and an
    embedding vector would merge into them; a ReLU on the embedding, without which any change of the basis of the
    residual stream, 4,096 directions, would be the same model; the second map of a residual layer has no bias, for the
    biases that read it would take it up; no dropout.
    """

    sizes: ModelSizes
    width: int = 64
    layers: int = 3
    hidden: int = 64

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, history: Float[Array, "N H *B I"], covariates: Float[Array, "HP *B F"]
    ) -> Float[Array, "P *B 1"]:
        """Returns the scaled forecast of the centre."""
        del graph
        last_seen, ahead = covariates[self.sizes.history - 1], covariates[self.sizes.history :]
        inputs = jnp.concatenate([*history[0], last_seen], axis=-1)
        x = nn.relu(dense(inputs, self.width, name="embedding"))
        for layer in range(self.layers):
            inner = nn.relu(dense(x, self.width, name=f"encoder_{layer}_in"))
            x = x + dense(inner, self.width, name=f"encoder_{layer}_out", use_bias=False)
        return horizon_head(self, x, ahead, hidden=self.hidden)


def _make_stid(sizes: ModelSizes) -> Model:
    return linen_model("stid", STID(sizes), {"embedding": "temporal", "encoder": "temporal", "head": "output"})


register_model("stid", _make_stid)
