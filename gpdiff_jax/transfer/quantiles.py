"""In: forecasts of a target, its support days, and residuals of the sources. Out: quantiles of what will be read.

After split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005; Lei et al.,
"Distribution-Free Predictive Inference for Regression", JASA 2018, section 5.2: scaled residuals): one is divided by
the deviation that is to be expected of its region at its hour, in a target joined with the spread of the generated
forecasters; quantiles of these, step by step of the horizon and over all regions, are put around a forecast in its own
units. The residuals are those of the support days, each left out in turn of scale and profile (not of the prompt, which
is one for all), and of the sources: three days are few, and may all have been quiet. The deviation that a residual is
divided by is the one that all days say, which will be put around the forecast: of two days with one left out it is not
known at all. Where the days that are left show no such day at that hour, there is no residual. Windows overlap and days
are alike, so there is no guarantee for a finite number of them; what is covered was measured (docs/experiments.md, 30,
31 and 33).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.data.target_windows import gather_all_days, variant_of
from gpdiff_jax.models.anomaly import SAME_KIND
from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import PlacedRows, ShardedRows
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.evaluate import MethodForecast
from gpdiff_jax.typing import Params, RegionGraph
from gpdiff_jax.vectors import evenly
from gpdiff_jax.zoo.residuals import expected_deviations, weighted_quantiles

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# So many days of support weigh as much as all that the sources say, and in a city that was never seen, forecasts
# are off by so much more than in the sources; chosen by leaving out source cities (docs/experiments.md, sections 30 and
# 33).
_SOURCE_DAYS, _UNSEEN = 4.0, 1.3
_MOST_WINDOWS, _LEAST_WINDOWS, _ENOUGH = 128, 24, 65536  # of the support, and residuals of all regions


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
    days, starts = len(target.split.support) // target.steps_per_day, judged_starts(target)
    own = support_residuals(model, target, region_rows(params), starts)
    quantiles = residual_quantiles(own, days, residuals, levels)
    if quantiles is None:
        return None
    shared = (target.bare, target.test_starts)
    ahead = np.asarray(ShardedRows(_deviations, shared).map(np.arange(target.num_regions, dtype=np.int32)))
    return around_forecasts(made.forecast, ahead.transpose(1, 0, 2), made.spread, quantiles, float(target.floor))


def around_forecasts(
    forecast: Float[np.ndarray, "*S R P"],
    deviation: Float[np.ndarray, "*S R P"],
    spread: Float[np.ndarray, "*S R P"] | None,
    quantiles: Float[np.ndarray, "P Q"],
    floor: float,
) -> Float[np.ndarray, "*S R P Q"]:
    """Quantiles of what will be read, from those of the scaled residuals.

    Args:
      forecast: in data units.
      deviation: that is to be expected, in data units.
      spread: of the samples, in data units; None with a single one.
      quantiles: of the scaled residuals at every horizon step.
      floor: the least.

    Returns:
      float32, none below the floor.
    """
    unit = deviation if spread is None else np.hypot(deviation, spread)
    around = forecast[..., None] + unit[..., None] * quantiles.astype(np.float32)
    return np.maximum(around, np.float32(floor), out=around)


def residual_quantiles(
    own: Float[np.ndarray, "*X P"],
    days: int,
    residuals: Float[Array | np.ndarray, "P Y"] | None,
    levels: Sequence[float] = LEVELS,
) -> Float[np.ndarray, "P Q"] | None:
    """Quantiles of scaled residuals at every horizon step, of the support days and the sources together.

    Args:
      own: of the support, as `support_residuals` has them.
      days: of the support; those of which there are residuals count.
      residuals: of the sources; None where they are not known.
      levels: Q, in 0..1.

    Returns:
      float64; None where a step has no residual at all. Residuals of the sources count 1.3 times as large as they are,
      for their forecaster has seen these cities.
    """
    at = np.asarray(levels, np.float64)
    own = own.reshape(-1, own.shape[-1])
    sources = np.zeros((own.shape[1], 0)) if residuals is None else _UNSEEN * np.asarray(residuals)
    quantiles = []
    for step, of_sources in enumerate(sources):
        of_support, of_sources = own[:, step][np.isfinite(own[:, step])], of_sources[np.isfinite(of_sources)]
        if not len(of_support) + len(of_sources):
            return None
        weights = [
            np.full(len(of_support), days / max(len(own), 1)),
            np.full(len(of_sources), _SOURCE_DAYS / max(len(of_sources), 1)),
        ]
        quantiles.append(weighted_quantiles(np.concatenate([of_support, of_sources]), np.concatenate(weights), at))
    return np.stack(quantiles)


def most_windows(regions: int) -> int:
    """How many windows of the support are looked at: of a large city fewer, for each has as many residuals."""
    return max(_LEAST_WINDOWS, min(_MOST_WINDOWS, _ENOUGH // regions))


def judged_starts(target: Target) -> Int[np.ndarray, " B"]:
    """Starts of the windows of the support that say how far forecasts are off, at most `most_windows`, evenly spaced.

    Of two days, one has to be left: no window forecasts both; of a single one there is none.
    """
    starts, days = np.asarray(target.support_starts), len(target.split.support) // target.steps_per_day
    if days == 2:
        first = starts + target.bank.history - target.split.support.start
        last = first + target.bank.horizon - 1
        starts = starts[first // target.steps_per_day == last // target.steps_per_day]
    picked = evenly(len(starts), most_windows(target.num_regions))
    return starts[picked] if days > 1 else starts[:0]


def support_residuals(
    model: Model, target: Target, rows: tuple[Params, Any] | PlacedRows, starts: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "R B P"]:
    """Scaled residuals of windows of the support days, none of which is seen through a day that it forecasts.

    Args:
      model: the forecaster.
      target: the city.
      rows: as `region_rows` has them, or placed.
      starts: of the windows; see `judged_starts`.

    Returns:
      float32, NaN where nothing was read, or the days that are left show no day of the kind at that hour; divided by
      the deviation that all days lead one to expect, joined with the spread of the samples.
    """
    if not len(starts):
        return np.zeros((target.num_regions, 0, target.bank.horizon), np.float32)
    shared = (target.bare, starts)
    return np.asarray(ShardedRows(_make_scaled(model), shared)(rows).read())


def region_rows(params: Params) -> tuple[Params, Int[np.ndarray, " R"]]:
    """Rows of regions with all their samples, leaves [R, K, ...], of parameters [K, R, ...]; and the regions."""
    by_region = jax.tree.map(lambda leaf: np.swapaxes(np.asarray(leaf), 0, 1), params)
    return by_region, np.arange(len(jax.tree.leaves(by_region)[0]), dtype=np.int32)


@bounded_cache(16)
def _make_scaled(model: Model) -> partial:
    return partial(_scaled_residuals, model)


def _scaled_residuals(
    model: Model, shared: tuple[Target, Array], rows: tuple[Params, Int[Array, " R"]]
) -> Float[Array, "R B P"]:
    target, starts = shared

    def of_region(row: tuple[Params, Array]) -> Array:
        samples, region = row
        graph, windows = region_windows(target, region, starts)
        drawn = jax.lax.map(lambda params: target_forecast(model, target, params, graph, windows), samples)
        variant = variant_of(target.bank, starts, target.support_start, target.steps_per_day)
        unit = target.bank.std[variant, graph.nodes[0]][:, None]
        deviation = region_deviations(target, graph, gather_all_days(target.bank, graph.nodes, starts))
        scaled = (windows.target - drawn.mean(axis=0)) * unit / jnp.hypot(deviation, drawn.std(axis=0) * unit)
        known = windows.mask > 0
        if target.bank.has_profile:
            # The days that are left must have shown such a day at that hour, as all of them have.
            known &= windows.covariates[:, -target.bank.horizon :, SAME_KIND] > 0
        return jnp.where(known, scaled, jnp.nan)

    return jax.lax.map(of_region, rows)


def _deviations(shared: tuple[Target, Array], regions: Int[Array, " R"]) -> Float[Array, "R B P"]:
    target, starts = shared

    def of_region(region: Int[Array, ""]) -> Array:
        graph, windows = region_windows(target, region, starts)
        return region_deviations(target, graph, windows)

    return jax.lax.map(of_region, regions)


def region_deviations(target: Target, graph: RegionGraph, windows: Window) -> Float[Array, "B P"]:
    """The deviation that is to be expected of a region at the steps ahead, in data units."""
    bank = target.bank
    deviation = expected_deviations(windows, bank.horizon, has_profile=bank.has_profile)
    return deviation * bank.std[-1, graph.nodes[0]]
