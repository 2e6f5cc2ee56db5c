"""In: parameters of a region of a target, and windows. Out: forecasts as they are reported, with damped anomalies."""

from jaxtyping import Array, Float

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
    forecast = batch_forecast(model, params, graph, windows)
    return damp_anomalies(forecast, windows.covariates, target.damping) if target.bank.has_profile else forecast
