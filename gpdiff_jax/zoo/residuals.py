"""In: the pooled model and the source regions. Out: what its forecasts err by, in units of what is to be expected.

A generator keeps them: they say how far forecasts of a city are off of which hardly anything was read.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.data.sources import SourceRegion, Sources, city_weights
from gpdiff_jax.data.windows import gather_source
from gpdiff_jax.models.anomaly import damp_anomalies, profile_and_deviation
from gpdiff_jax.models.loss import batch_forecast
from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import ShardedRows
from gpdiff_jax.typing import Params

_POINTS = 200


def expected_deviations(windows: Window, horizon: int, *, has_profile: bool) -> Float[Array, "B P"]:
    """The deviation e from the profile that is to be expected at the steps ahead; 1 where there is no profile.

    Args:
      windows: B windows of a region.
      horizon: P.
      has_profile: whether the covariates end with what is expected.

    Returns:
      In standard deviations of the region.
    """
    if not has_profile:
        return jnp.ones_like(windows.target)
    return profile_and_deviation(windows.covariates[:, -horizon:])[1]


def source_residuals(model: Model, sources: Sources, pooled: Params) -> Float[np.ndarray, "P X"]:
    """Quantiles of the residuals of the pooled model on the validation windows of all source regions.

    Every window is seen through a variant, as a target is through its support days; a residual is divided by the
    deviation that this leads one to expect of that region at that hour.

    Args:
      model: the forecaster.
      sources: the source regions.
      pooled: parameters of the model that was trained on them.

    Returns:
      float32, for every horizon step the residuals at 200 equally likely points, every city with the same weight; NaN
      where no source has a reading to validate on. They are of cities that the model knows, on windows that chose it.
    """
    rows = jax.tree.map(np.asarray, sources.regions)
    residuals, mask = ShardedRows(_make_residuals(model), (sources, pooled)).map(rows)
    weights = np.broadcast_to(city_weights(np.asarray(sources.city_index))[:, None, None], mask.shape) * mask
    levels = (np.arange(_POINTS) + 0.5) / _POINTS
    by_step = [(residuals[..., step].reshape(-1), weights[..., step].reshape(-1)) for step in range(mask.shape[2])]
    return np.stack([weighted_quantiles(values, own, levels) for values, own in by_step]).astype(np.float32)


@bounded_cache(16)
def _make_residuals(model: Model) -> partial:
    return partial(_residuals, model)


def _residuals(model: Model, shared: tuple[Sources, Params], regions: SourceRegion) -> tuple[Array, Array]:
    sources, pooled = shared
    bank = sources.bank

    def of_region(region: SourceRegion) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.key(0), region.region_id)
        windows = gather_source(bank, sources.train, region.graph.nodes, region.validation_starts, key=key)
        forecast = batch_forecast(model, pooled, region.graph, windows)
        if bank.has_profile:  # as those of a target are
            forecast = damp_anomalies(forecast, windows.covariates, sources.config.damping)
        deviation = expected_deviations(windows, bank.horizon, has_profile=bank.has_profile)
        return (windows.target - forecast) / deviation, windows.mask

    return jax.lax.map(of_region, regions)


def weighted_quantiles(
    values: Float[np.ndarray, " X"], weights: Float[np.ndarray, " X"], levels: Float[np.ndarray, " Q"]
) -> Float[np.ndarray, " Q"]:
    """Quantiles of weighted values, with straight lines between the middles of their steps.

    Args:
      values: in any order.
      weights: of at least 0.
      levels: in 0..1.

    Returns:
      float64; NaN where no weight is above 0.
    """
    kept = weights > 0
    if not kept.any():
        return np.full(len(levels), np.nan)
    order = np.argsort(values[kept], kind="stable")
    ordered, share = values[kept][order].astype(np.float64), weights[kept][order].astype(np.float64)
    middle = (np.cumsum(share) - 0.5 * share) / share.sum()
    return np.interp(levels, middle, ordered)
