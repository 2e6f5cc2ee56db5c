"""In: forecasts (or samples of them) and the truth, NaN where nothing was observed.
Out: masked errors over chosen axes, and the error tables of one method that the results are made of.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.errors import InputError

Axis = int | tuple[int, ...] | None

_DAY_KINDS = ("", "_weekday", "_weekend")
_MEANS = tuple(name + days for days in _DAY_KINDS for name in ("mae", "rmse"))

REGION_COLUMNS = ("region", "channel", "method", *_MEANS, "observations", "note")
"""The header of regions.csv."""


def mae(
    forecast: Float[jax.Array | np.ndarray, "*shape"],
    truth: Float[jax.Array | np.ndarray, "*shape"],
    *,
    axis: Axis = None,
) -> Float[jax.Array | np.ndarray, "*reduced"]:
    """Mean absolute error over the observed entries.

    Args:
      forecast: any shape, in the unit of the data. A NaN where the truth is observed makes the result NaN.
      truth: the same shape; NaN = missing, left out.
      axis: the axes to average over; None for all.

    Returns:
      The error in the unit of the data, float32 without the averaged axes; NaN where nothing was observed. A jax
      array if either argument is one (so it works under jit and vmap), else numpy.

    Raises:
      InputError: the shapes differ.
    """
    residual, observed, xp = _residual(forecast, truth)
    return _masked_mean(xp.abs(residual), observed, axis, xp)


def rmse(
    forecast: Float[jax.Array | np.ndarray, "*shape"],
    truth: Float[jax.Array | np.ndarray, "*shape"],
    *,
    axis: Axis = None,
) -> Float[jax.Array | np.ndarray, "*reduced"]:
    """Root of the mean squared error over the observed entries; arguments and result as in `mae`."""
    residual, observed, xp = _residual(forecast, truth)
    return _float32(xp.sqrt(_masked_mean(xp.square(residual), observed, axis, xp)), xp)


def mape(
    forecast: Float[jax.Array | np.ndarray, "*shape"],
    truth: Float[jax.Array | np.ndarray, "*shape"],
    *,
    axis: Axis = None,
    threshold: float = 0.0,
) -> Float[jax.Array | np.ndarray, "*reduced"]:
    """Mean absolute error relative to each truth, a fraction (0.1 is 10 %); otherwise as in `mae`.

    Args:
      forecast: as in `mae`.
      truth: as in `mae`.
      axis: as in `mae`.
      threshold: entries whose absolute truth is at most this, in the unit of the data, are left out. At 0 only the
          zeros are, where no relative error exists.
    """
    residual, observed, xp = _residual(forecast, truth)
    counted = observed & (xp.abs(truth) > threshold)
    scale = xp.where(counted, xp.abs(truth), xp.ones_like(truth))
    return _masked_mean(xp.abs(residual) / scale, counted, axis, xp)


def wape(
    forecast: Float[jax.Array | np.ndarray, "*shape"],
    truth: Float[jax.Array | np.ndarray, "*shape"],
    *,
    axis: Axis = None,
) -> Float[jax.Array | np.ndarray, "*reduced"]:
    """Sum of the absolute errors over the sum of the absolute truth, a fraction; otherwise as in `mae`.

    It weighs a region by its size, and zeros of the truth do it no harm; NaN where the truth sums to zero.
    """
    residual, observed, xp = _residual(forecast, truth)
    total = _sum(xp.where(observed, xp.abs(truth), xp.zeros_like(truth)), axis, xp)
    error = _sum(xp.abs(residual), axis, xp)
    return _float32(xp.where(total > 0, error / xp.where(total > 0, total, xp.ones_like(total)), xp.nan), xp)


def crps(
    samples: Float[jax.Array | np.ndarray, "K *shape"],
    truth: Float[jax.Array | np.ndarray, "*shape"],
    *,
    axis: Axis = None,
    fair: bool = False,
) -> Float[jax.Array | np.ndarray, "*reduced"]:
    """Continuous ranked probability score of an ensemble, averaged over the observed entries.

    mean_k |x_k - y| - 1/2 mean_kl |x_k - x_l| (Gneiting and Raftery, "Strictly Proper Scoring Rules", 2007, equation
    21, at the empirical distribution of the samples). With one sample it is the absolute error.

    Args:
      samples: K forecasts along the first axis, in the unit of the data.
      truth: one shape less that axis; NaN = missing, left out.
      axis: the axes of the truth to average over; None for all.
      fair: divide the second mean by K (K - 1) instead of K^2, so that its expectation does not depend on K
          (Ferro, "Fair scores for ensemble forecasts", 2014).

    Returns:
      The score in the unit of the data, float32; smaller is better; NaN where nothing was observed.

    Raises:
      InputError: the shapes do not fit, or a fair score is asked of one sample.
    """
    if samples.ndim == 0 or samples.shape[1:] != truth.shape:
        raise InputError(f"`samples` {samples.shape} must be `truth` {truth.shape} with the samples' axis before it")
    count = samples.shape[0]
    if count < (2 if fair else 1):
        raise InputError(f"`samples` holds {count} of them; a {'fair ' if fair else ''}score needs {2 if fair else 1}")
    xp = _namespace(samples, truth)
    samples, truth = xp.asarray(samples), xp.asarray(truth)
    observed = ~xp.isnan(truth)
    known = xp.broadcast_to(observed[None], samples.shape)
    centred = xp.where(known, samples - xp.where(observed, truth, xp.zeros_like(truth))[None], xp.zeros_like(samples))
    distance = xp.mean(xp.abs(centred), axis=0)
    # Sorted, the sum over pairs k < l of |x_k - x_l| is sum_k (2 k - K - 1) x_(k), k from 1: K log K, not K^2.
    rank = xp.asarray(2.0 * np.arange(1, count + 1) - count - 1, dtype=samples.dtype)
    spread = xp.sum(rank.reshape((count,) + (1,) * truth.ndim) * xp.sort(centred, axis=0), axis=0)
    return _masked_mean(distance - spread / (count * (count - 1) if fair else count**2), observed, axis, xp)


def method_entry(
    forecast: Float[np.ndarray, "S R P"],
    truth: Float[np.ndarray, "S R P"],
    *,
    is_weekend: Bool[np.ndarray, "S P"] | None,
    seconds: float | int,
    training_seconds: float | int | None = None,
    learning_rate: float | int | None = None,
    steps: int | None = None,
    validation_mae: float | int | None = None,
    shared_steps: int | None = None,
    shared_rate: float | int | None = None,
) -> dict[str, Any]:
    """Returns what metrics.json says of one method, ready for JSON.

    The city's MAE at a horizon step is the mean absolute error over all observed (window, region) pairs; `mae_mean` is
    the mean of these over the horizon steps that have any observation. RMSE likewise: a root per step, then the mean
    of the roots. Weekday and weekend figures are the same means over the entries whose target time falls there.

    Args:
      forecast: the test forecasts, in the unit of the data.
      truth: the readings; NaN = missing.
      is_weekend: whether a window's horizon step falls on a Saturday or Sunday; None if the calendar is unknown.
      seconds: what the method took for the target: making its start, tuning, forecasting; without compiling.
      training_seconds: what the stages took that it needs before, on the sources; without compiling.
      learning_rate: the tuned learning rate, if it has one.
      steps: the tuned number of fine-tuning steps, if it has one.
      validation_mae: its error on the validation days, in the unit of the data, if it was tuned.
      shared_steps: the steps that all regions of the city share, if it was tuned so.
      shared_rate: of these, their rate.

    Raises:
      InputError: the shapes do not fit.
    """
    per_step, means = _errors(forecast, truth, is_weekend, axis=(0, 1))
    return {
        **{name: [_json_number(value) for value in per_step[name]] for name in ("mae", "rmse")},
        "mae_mean": _json_number(means["mae"]),
        "rmse_mean": _json_number(means["rmse"]),
        **{name: _json_number(means[name]) for name in _MEANS[2:]},
        "seconds": _json_number(seconds),
        "training_seconds": _json_number(training_seconds),
        "learning_rate": _json_number(learning_rate),
        "steps": None if steps is None else int(steps),
        "validation_mae": _json_number(validation_mae),
        "shared_steps": None if shared_steps is None else int(shared_steps),
        "shared_rate": _json_number(shared_rate),
    }


def region_rows(
    forecast: Float[np.ndarray, "S R P"],
    truth: Float[np.ndarray, "S R P"],
    *,
    is_weekend: Bool[np.ndarray, "S P"] | None,
    method: str,
    regions: Sequence[str],
    channel: str = "",
    notes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns the rows of regions.csv of one method, one per region, with the keys of `REGION_COLUMNS`.

    A region's MAE is the mean over the horizon steps of its mean absolute error over the observed windows, so the rows
    of a city without missing readings average to its `mae_mean`.

    Args:
      forecast: as in `method_entry`.
      truth: as in `method_entry`.
      is_weekend: as in `method_entry`.
      method: the method's name.
      regions: R ids.
      channel: the channel's name.
      notes: R remarks, or None for none.

    Returns:
      R dictionaries; None where nothing was observed (an empty cell); `observations` counts the observed entries.

    Raises:
      InputError: the shapes do not fit.
    """
    notes = [""] * len(regions) if notes is None else notes
    if forecast.ndim != 3 or not len(regions) == len(notes) == forecast.shape[1]:
        raise InputError(f"{len(regions)} `regions` and {len(notes)} `notes` do not fit forecasts {forecast.shape}")
    _, means = _errors(forecast, truth, is_weekend, axis=(0,))
    observations = (~np.isnan(truth)).sum(axis=(0, 2))
    return [
        {
            "region": region,
            "channel": channel,
            "method": method,
            **{name: _json_number(means[name][r]) for name in _MEANS},
            "observations": int(observations[r]),
            "note": notes[r],
        }
        for r, region in enumerate(regions)
    ]


def _errors(
    forecast: np.ndarray, truth: np.ndarray, is_weekend: np.ndarray | None, *, axis: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns errors per horizon step (the last axis) and their means over the steps with any observation."""
    if forecast.ndim != 3 or forecast.shape != truth.shape:
        raise InputError(f"`forecast` {forecast.shape} and `truth` {truth.shape} must both be [S, R, P]")
    windows, _, horizon = truth.shape
    if is_weekend is not None and is_weekend.shape != (windows, horizon):
        raise InputError(f"`is_weekend` {is_weekend.shape} must be [S, P] = {(windows, horizon)}")
    per_step, means = {}, {}
    for days in _DAY_KINDS:
        if not days:
            chosen = truth
        elif is_weekend is None:
            chosen = np.full_like(truth, np.nan)
        else:
            kept = is_weekend if days == "_weekend" else ~is_weekend
            chosen = np.where(kept[:, None, :], truth, np.full_like(truth, np.nan))
        for name, error in (("mae", mae), ("rmse", rmse)):
            value = np.asarray(error(forecast, chosen, axis=axis), np.float64)
            seen = ~np.isnan(chosen).all(axis=axis)
            # Only steps without any observation are left out: a NaN forecast must show in the mean.
            total = np.where(seen, value, 0.0).sum(axis=-1)
            per_step[name + days] = value
            means[name + days] = np.where(seen.any(axis=-1), total / np.maximum(seen.sum(axis=-1), 1), np.nan)
    return per_step, means


def _residual(forecast: Any, truth: Any) -> tuple[Any, Any, Any]:
    """Returns forecast minus truth (zero where missing), the observed mask and the namespace to compute in."""
    if forecast.shape != truth.shape:
        raise InputError(f"`forecast` {forecast.shape} and `truth` {truth.shape} must have one shape")
    xp = _namespace(forecast, truth)
    # On the host, float64 costs nothing, and neither a long sum nor a diverged method's squares lose digits.
    dtype = np.float64 if xp is np else jnp.float32
    forecast, truth = xp.asarray(forecast, dtype=dtype), xp.asarray(truth, dtype=dtype)
    observed = ~xp.isnan(truth)
    # Masked before and after the difference, so that no NaN reaches a gradient.
    residual = forecast - xp.where(observed, truth, xp.zeros_like(truth))
    return xp.where(observed, residual, xp.zeros_like(residual)), observed, xp


def _masked_mean(values: Any, mask: Any, axis: Axis, xp: Any) -> Any:
    count = _sum(mask, axis, xp)
    total = _sum(xp.where(mask, values, xp.zeros_like(values)), axis, xp)
    mean = total / xp.where(count > 0, count, xp.ones_like(count))
    return _float32(xp.where(count > 0, mean, xp.nan), xp)


def _namespace(*arrays: Any) -> Any:
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _sum(values: Any, axis: Axis, xp: Any) -> Any:
    return xp.sum(values, axis=axis, dtype=np.float64 if xp is np else jnp.float32)


def _float32(values: Any, xp: Any) -> Any:
    # A diverged method's error is infinite in float32, which is no reason to warn.
    with np.errstate(over="ignore"):
        return xp.asarray(values, dtype=np.float32)


def _json_number(value: Any) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not np.isfinite(value) else float(value)
