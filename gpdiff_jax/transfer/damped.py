"""In: parameters of a region of a target, and windows. Out: forecasts as they are reported, with damped anomalies."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target
from gpdiff_jax.models.anomaly import damp_anomalies
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


def damped(target: Target, scaled: Float[Array, "B P"], windows: Window) -> Float[Array, "B P"]:
    """Scaled forecasts of windows of a target as they are reported; with a profile, their anomalies are damped."""
    return damp_anomalies(scaled, windows.covariates, target.damping) if target.bank.has_profile else scaled


def in_data_units(target: Target, node: Int[Array, ""], scaled: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Scaled forecasts of a node, in data units; none below the target's floor."""
    bank = target.bank
    return jnp.maximum(scaled * bank.std[-1, node] + bank.mean[-1, node], target.floor)
