"""In: parameters of a region of a target, and windows. Out: forecasts as they are reported, with damped anomalies."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target
from gpdiff_jax.models.anomaly import SAME_KIND, damp_anomalies
from gpdiff_jax.models.loss import batch_forecast
from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.typing import Params, RegionGraph


def target_forecast(
    model: Model, target: Target, params: Params, graph: RegionGraph, windows: Window
) -> Float[Array, "B P"]:
    """Scaled forecasts of a region of a target; with a profile, their anomalies are damped (`DataConfig.damping`).

    Args:
      model: the forecaster.
      target: the city.
      params: of the region.
      graph: of the region.
      windows: of the region.

    Returns:
      What is reported, and what fine-tuning minimises the error of.
    """
    return damped(target, batch_forecast(model, params, graph, windows), windows)


def on_seen_kinds(
    target: Target, tuned: Float[Array, "B P"], start: Float[Array, "B P"], windows: Window
) -> Float[Array, "B P"]:
    """Forecasts that were fine-tuned, on kinds of day that the support shows, and what they began as on others.

    The support says nothing of a kind of day that it lacks, and parameters that are moved for another kind may forecast
    it much worse than before (docs/experiments.md, section 27). Between the two, forecasts mix by the share of the
    profile that was seen on days of the kind. Without a profile, all are as they were tuned.

    Args:
      target: the city.
      tuned: forecasts of fine-tuned parameters.
      start: those of the initial parameters.
      windows: of the region.

    Returns:
      Forecasts.
    """
    if not target.bank.has_profile:
        return tuned
    share = windows.covariates[:, -target.bank.horizon :, SAME_KIND]
    # Where nothing was seen, not even what is not finite comes through.
    return jnp.where(share > 0, share * tuned + (1.0 - share) * start, start)


def damped(target: Target, scaled: Float[Array, "B P"], windows: Window) -> Float[Array, "B P"]:
    """Scaled forecasts of windows of a target as they are reported; with a profile, their anomalies are damped."""
    return damp_anomalies(scaled, windows.covariates, target.damping) if target.bank.has_profile else scaled


def in_data_units(target: Target, node: Int[Array, ""], scaled: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Scaled forecasts of a node, in data units; none below the target's floor."""
    bank = target.bank
    return jnp.maximum(scaled * bank.std[-1, node] + bank.mean[-1, node], target.floor)
