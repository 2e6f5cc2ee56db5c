"""In: sizes. Out: a linear autoregression of one region, the rival that a statistician would take.

Of the region's past and its neighbours', in anomalies where what is to be expected is known (a regression of the
residuals from the profile), else in readings. It is fitted on the sources as the pooled model is, by the same loss.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.models.anomaly import forecast_anomalies
from gpdiff_jax.models.graphs import centre_weights
from gpdiff_jax.models.protocol import Model, ModelSizes
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.typing import Key, Params, RegionGraph
from gpdiff_jax.zoo.pooled import PooledConfig

_LEARNING_RATE = 1e-2
_READING, _ANOMALY = 0, 2  # among the inputs of a node, see `Window`


def line_config(config: PooledConfig) -> PooledConfig:
    """How a line is trained beside a pooled model: as long, at a rate of its own, neither averaged nor mixed."""
    return dataclasses.replace(config, learning_rate=_LEARNING_RATE, averaging=0.0, mixing=0.0)


@bounded_cache(16)
def residual_autoregression(sizes: ModelSizes) -> Model:
    """The autoregression as a pair of pure functions.

    Args:
      sizes: H, P, I, F.

    Returns:
      A model of 2 H + 1 parameters per horizon step, all 0 at first: those of the centre's last H readings or
      anomalies, of the mean of its neighbours' by the weights of their edges, and a constant.
    """
    channel = _ANOMALY if sizes.anomaly else _READING

    def init(key: Key, graph: RegionGraph, history: Array, covariates: Array) -> Params:
        del key, graph, history, covariates
        return {
            "bias": jnp.zeros((sizes.horizon,)),
            "neighbours": jnp.zeros((sizes.horizon, sizes.history)),
            "own": jnp.zeros((sizes.horizon, sizes.history)),
        }

    def apply(
        params: Params, graph: RegionGraph, history: Float[Array, "N H I"], covariates: Float[Array, "HP F"]
    ) -> Float[Array, "P 1"]:
        del covariates
        past = history[..., channel]
        around = centre_weights(graph) @ past
        return (params["own"] @ past[0] + params["neighbours"] @ around + params["bias"])[:, None]

    model = Model("residual_autoregression", init, apply)
    return forecast_anomalies(model, sizes) if sizes.anomaly else model
