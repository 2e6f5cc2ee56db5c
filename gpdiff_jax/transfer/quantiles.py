"""In: forecasts of a target, its support days, and residuals of the sources. Out: quantiles of what will be read.

After split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005; Lei et al.,
"Distribution-Free Predictive Inference for Regression", JASA 2018, section 5.2: scaled residuals): one is divided by
the deviation that is to be expected of its region at its hour, in a target joined with the spread of the generated
forecasters; quantiles of these, step by step of the horizon and over all regions, are put around a forecast in its own
units. The residuals are those of the support days, each left out in turn of scale and profile (not of the prompt, which
is one for all), and of the sources: three days are few, and may all have been quiet. Windows overlap and days are
alike, so there is no guarantee for a finite number of them; what is covered was measured (docs/experiments.md, 30).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import ShardedRows
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.evaluate import MethodForecast
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.residuals import expected_deviations, weighted_quantiles

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# So many days of support weigh as much as all that the sources say; chosen by leaving out source cities
# (docs/experiments.md, section 30).
_SOURCE_DAYS = 4.0
_MOST_WINDOWS = 128  # of the support


class _Seen(NamedTuple):
    """What is known of windows of all regions beside their forecasts, scaled."""

    target: Float[np.ndarray, "R B P"]
    mask: Float[np.ndarray, "R B P"]
    deviation: Float[np.ndarray, "R B P"]


def forecast_quantiles(
    model: Model,
    target: Target,
    params: Params,
    made: MethodForecast,
    residuals: Float[Array | np.ndarray, "P X"] | None,
    levels: tuple[float, ...] = LEVELS,
) -> Float[np.ndarray, "S R P Q"] | None:
    """Quantiles of what will be read in the test windows of a target.

    Args:
      model: the forecaster.
      target: the city.
      params: leaves [K, R, ...], as they were before any fine-tuning on the support days, whose residuals would be too
        small.
      made: forecasts of the test windows, by these parameters or fine-tuned ones.
      residuals: of the sources, as `source_residuals` makes them; None where they are not known.
      levels: Q, in 0..1.

    Returns:
      float32 in data units, in the order of the levels, none below the target's floor; None where neither the sources
      nor the support say anything: a single day cannot be left out.
    """
    at = np.asarray(levels, np.float64)
    quantiles = _residual_quantiles(model, target, params, residuals, at)
    if quantiles is None:
        return None
    nodes = np.asarray(target.graphs.nodes)[:, 0]
    std = np.asarray(target.bank.std)[-1, nodes]
    ahead = _seen(target, np.asarray(target.test_starts)).deviation * std[:, None, None]
    unit = ahead.transpose(1, 0, 2) if made.spread is None else np.hypot(ahead.transpose(1, 0, 2), made.spread)
    around = made.forecast[..., None] + unit[..., None] * quantiles.astype(np.float32)
    return np.maximum(around, np.asarray(target.floor), out=around)


def _residual_quantiles(
    model: Model,
    target: Target,
    params: Params,
    residuals: Float[Array | np.ndarray, "P X"] | None,
    levels: Float[np.ndarray, " Q"],
) -> Float[np.ndarray, "P Q"] | None:
    """Quantiles of scaled residuals at every horizon step, of the support days and the sources together."""
    days = len(target.split.support) // target.steps_per_day
    own = support_residuals(model, target, params) if days > 1 else np.zeros((0, target.bank.horizon))
    sources = np.zeros((target.bank.horizon, 0)) if residuals is None else np.asarray(residuals)
    quantiles = []
    for step, of_sources in enumerate(sources):
        of_support, of_sources = own[:, step][np.isfinite(own[:, step])], of_sources[np.isfinite(of_sources)]
        if not len(of_support) + len(of_sources):
            return None
        weights = [
            np.full(len(of_support), days / max(len(of_support), 1)),
            np.full(len(of_sources), _SOURCE_DAYS / max(len(of_sources), 1)),
        ]
        quantiles.append(weighted_quantiles(np.concatenate([of_support, of_sources]), np.concatenate(weights), levels))
    return np.stack(quantiles)


def support_residuals(model: Model, target: Target, params: Params) -> Float[np.ndarray, "X P"]:
    """Scaled residuals of all regions in windows of the support days, none of which is seen through a day it forecasts.

    Args:
      model: the forecaster.
      target: the city, of at least two support days.
      params: leaves [K, R, ...].

    Returns:
      float32, NaN where nothing was read; divided by the expected deviation, joined with the spread of the samples. Of
      two days, one has to be left: no window forecasts both.
    """
    starts = np.asarray(target.support_starts)
    if len(target.split.support) == 2 * target.steps_per_day:
        first = starts + target.bank.history - target.split.support.start
        last = first + target.bank.horizon - 1
        starts = starts[first // target.steps_per_day == last // target.steps_per_day]
    picked = np.linspace(0, len(starts) - 1, min(len(starts), _MOST_WINDOWS)).round().astype(int)
    starts = starts[picked]
    if not len(starts):
        return np.zeros((0, target.bank.horizon), np.float32)
    samples = jax.tree.leaves(params)[0].shape[0]
    flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), params)
    regions = np.tile(np.arange(target.num_regions, dtype=np.int32), samples)
    shared = (dataclasses.replace(target, choice=None), starts)
    rows = ShardedRows(_make_scaled(model), shared)((flat, regions)).read()
    drawn = np.asarray(rows).reshape(samples, target.num_regions, *rows.shape[1:])
    seen = _seen(target, starts)
    scaled = (seen.target - drawn.mean(axis=0)) / np.hypot(seen.deviation, drawn.std(axis=0))
    return np.where(seen.mask > 0, scaled, np.nan).astype(np.float32).reshape(-1, scaled.shape[2])


def _seen(target: Target, starts: Int[np.ndarray, " B"]) -> _Seen:
    regions = np.arange(target.num_regions, dtype=np.int32)
    shared = (dataclasses.replace(target, choice=None), starts)
    return _Seen(*map(np.asarray, ShardedRows(_see, shared)(regions).read()))


def _see(shared: tuple[Target, Array], regions: Int[Array, " R"]) -> tuple[Array, Array, Array]:
    target, starts = shared
    bank = target.bank

    def of_region(region: Int[Array, ""]) -> tuple[Array, Array, Array]:
        _, windows = region_windows(target, region, starts)
        deviation = expected_deviations(windows, bank.horizon, has_profile=bank.has_profile)
        return windows.target, windows.mask, deviation

    return jax.lax.map(of_region, regions)


@bounded_cache(16)
def _make_scaled(model: Model) -> partial:
    return partial(_forecast_scaled, model)


def _forecast_scaled(model: Model, shared: tuple[Target, Array], rows: tuple[Params, Array]) -> Array:
    target, starts = shared

    def of_row(row: tuple[Params, Array]) -> Array:
        params, region = row
        graph, windows = region_windows(target, region, starts)
        return target_forecast(model, target, params, graph, windows)

    return jax.lax.map(of_row, rows)
