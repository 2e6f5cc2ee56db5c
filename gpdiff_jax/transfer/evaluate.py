"""In: start parameters of every target region. Out: a method's zero-shot and few-shot forecasts of the test span."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.cities.calendar import is_weekend
from gpdiff_jax.cities.city import City
from gpdiff_jax.data.target import Target
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training.memory import check_room
from gpdiff_jax.training.stopwatch import stopwatch
from gpdiff_jax.transfer.adapt import adapt, forecast_rows
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.typing import Key, Params


class MethodForecast(NamedTuple):
    """The test forecasts of one method, and how it was tuned."""

    forecast: Float[np.ndarray, "S R P"]  # data units, mean over samples
    spread: Float[np.ndarray, "S R P"] | None  # standard deviation over samples; None with a single one
    seconds: float  # of work, without compiling
    learning_rate: float | None = None
    steps: int | None = None
    validation_mae: float | None = None
    curves: np.ndarray | None = None  # [rates, evaluations + 1], validation error while tuning
    shared_steps: int | None = None  # that the city shares, and their rate
    shared_rate: float | None = None
    quantiles: Float[np.ndarray, "S R P Q"] | None = None  # see `quantiles.forecast_quantiles`; None where not made


def sampled_forecast(
    model: Model, target: Target, params: Params, initial: Params | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Forecasts of the test windows by K samples of parameters.

    Args:
      model: the forecaster.
      target: the city.
      params: leaves [K, R, ...].
      initial: what they were before they were fine-tuned, see `forecast_rows`.

    Returns:
      Mean and deviation of the samples' forecasts [S, R, P], data units; no deviation of a single sample.
    """
    samples = jax.tree.leaves(params)[0].shape[0]
    windows, horizon = len(target.test_starts), target.bank.horizon
    wanted = 4 * samples * target.num_regions * windows * horizon
    check_room(wanted, f"the forecasts of {target.num_regions} regions in {windows} windows by {samples} samples")
    flat, before = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), (params, initial))
    regions = np.tile(np.arange(target.num_regions, dtype=np.int32), samples)
    rows = np.asarray(forecast_rows(model, target, flat, regions, target.test_starts, before))
    drawn = rows.reshape(samples, target.num_regions, *rows.shape[1:]).transpose(0, 2, 1, 3)
    return drawn.mean(axis=0), drawn.std(axis=0) if samples > 1 else None


def zero_shot(model: Model, target: Target, params: Params) -> MethodForecast:
    """Forecasts the test span with parameters as they are.

    Args:
      model: the forecaster.
      target: the city.
      params: leaves [K, R, ...]; the K forecasts of a region are averaged, never its parameters.

    Returns:
      The forecasts.
    """
    with stopwatch() as watch:
        forecast, spread = sampled_forecast(model, target, params)
    return MethodForecast(forecast, spread, watch.seconds)


def few_shot(
    model: Model,
    target: Target,
    params: Params,
    config: AdaptConfig,
    *,
    key: Key,
    directions: Params | None = None,
    choice_params: Params | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MethodForecast:
    """Fine-tunes parameters on the support days and forecasts the test span.

    Args:
      model: the forecaster.
      target: the city.
      params: starts, leaves [K, R, ...]. Where all weights are tuned, learning rate and steps are chosen for the mean
        of the samples' forecasts, then every sample is fine-tuned with them.
      config: the choices, the same for every method.
      key: random key.
      directions: of the zoo, for updates in codes: see `adapt`.
      choice_params: the starts of the choice, where they depend on the support days: see `adapt`.
      progress: called with (learning rates tried, metrics).

    Returns:
      The forecasts, averaged over the K fine-tuned samples.

    Raises:
      InputError, NotFiniteError, NoRoomError: see `adapt`.
    """
    with stopwatch() as watch:
        known = {"directions": directions, "choice_params": choice_params}
        tuned = adapt(model, config, target, params, key=key, **known, progress=progress)
        mixed = config.seen_kinds_only and tuned.steps > 0
        forecast, spread = sampled_forecast(model, target, tuned.params, params if mixed else None)
    chosen = tuned.learning_rate, tuned.steps, tuned.validation_mae, tuned.curves
    shared = tuned.shared_steps, tuned.shared_rate
    return MethodForecast(forecast, spread, watch.seconds, *chosen, *shared)


def observed_truth(city: City, target: Target) -> tuple[Float[np.ndarray, "S R P"], Bool[np.ndarray, "S P"] | None]:
    """What came after every test window, and whether it fell on a weekend.

    Args:
      city: the one-channel target.
      target: its windows.

    Returns:
      float32 [S, R, P] in data units, NaN where missing; bool [S, P], or None where the calendar is unknown.
    """
    steps = np.asarray(target.test_starts)[:, None] + target.bank.history + np.arange(target.bank.horizon)
    weekend = is_weekend(city)
    return city.values[steps, :, 0].transpose(0, 2, 1), None if weekend is None else weekend[steps]


def window_start_names(city: City, target: Target) -> list[str]:
    """Names, as `step_names` has them, of the first forecast step of every test window."""
    return step_names(city, np.asarray(target.test_starts) + target.bank.history)


def step_names(city: City, steps: Int[np.ndarray, " X"]) -> list[str]:
    """ISO times of steps, or "step N" where the calendar is unknown."""
    if city.start is None:
        return [f"step {step}" for step in steps]
    return [str(city.start + np.timedelta64(int(step) * city.interval_minutes, "m")) for step in steps]
