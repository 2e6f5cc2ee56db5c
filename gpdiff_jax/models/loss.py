"""In: a model's parameters, a region graph and a batch of windows. Out: forecasts, and what is minimised on them."""

import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float

from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.typing import Params

DELTA = 0.05  # as a first study of real cities had it; see docs/experiments.md, section 24


def masked_huber(
    forecast: Float[Array, "*X P"], target: Float[Array, "*X P"], mask: Float[Array, "*X P"], delta: float = DELTA
) -> Float[Array, ""]:
    """Mean Huber loss over the observed readings; 0 where nothing is observed.

    Within an error of `delta` (in standard deviations) it is quadratic, beyond absolute, as the error that the tables
    report is, and counts have heavy tails.
    """
    total, count = huber_sums(forecast, target, mask, delta)
    return total / jnp.maximum(count, 1.0)


def huber_sums(
    forecast: Float[Array, "*X P"], target: Float[Array, "*X P"], mask: Float[Array, "*X P"], delta: float = DELTA
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the Huber losses of `masked_huber`, and the number of observed readings."""
    loss = optax.losses.huber_loss(forecast, target, delta=delta) / delta
    return (loss * mask).sum(), mask.sum()


def masked_absolute(
    forecast: Float[Array, "*X P"], target: Float[Array, "*X P"], mask: Float[Array, "*X P"]
) -> Float[Array, ""]:
    """Mean absolute error over the observed readings; NaN where nothing is observed."""
    count = mask.sum()
    return jnp.where(count > 0, (jnp.abs(forecast - target) * mask).sum() / jnp.maximum(count, 1.0), jnp.nan)


def batch_forecast(model: Model, params: Params, graph: jraph.GraphsTuple, windows: Window) -> Float[Array, "B P"]:
    """Forecasts of one region for a batch of windows, scaled."""
    if model.apply_batch is None:
        apply = jax.vmap(model.apply, in_axes=(None, None, 0, 0))
        return apply(params, graph, windows.history, windows.covariates)[..., 0]
    history, covariates = jnp.moveaxis(windows.history, 0, 2), jnp.moveaxis(windows.covariates, 0, 1)
    return model.apply_batch(params, graph, history, covariates)[..., 0].T


def anchor_loss(
    model: Model, params: Params, anchor: Params, graph: jraph.GraphsTuple, windows: Window
) -> Float[Array, ""]:
    """How far forecasts of one region have moved from those of `anchor`, on windows that have no truth."""
    held = jax.lax.stop_gradient(batch_forecast(model, anchor, graph, windows))
    return masked_huber(batch_forecast(model, params, graph, windows), held, windows.mask)
