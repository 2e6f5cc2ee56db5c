"""In: a city, and a generator that never saw it. Out: errors of its next hours at random moments, each from a CSV."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

import gpdiff_jax as gpd
from gpdiff_jax import ingest
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities import City
from gpdiff_jax.cities.calendar import is_weekend, slot_of_day
from gpdiff_jax.cities.scaling import region_scales
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.data.series import scaled_expectation
from gpdiff_jax.run.new_city import samples_that_fit
from gpdiff_jax.transfer.quantiles import LEVELS

DAYS = 3
METHODS = ("historical_average", "zero_shot", "adapted")
_FIRST = np.datetime64("2001-01-01T00:00", "m")  # where a city does not say when its series begins: a Monday


def random_moments(city: City, count: int, horizon: int, seed: int = 0) -> list[int]:
    """Steps of a city before which three days were read and after which there is something to judge forecasts by.

    Args:
      city: one channel.
      count: how many; the same one may come twice.
      horizon: P.
      seed: of the draw.

    Returns:
      Steps in order of the draw. Nights without a reading are no moments, nor are outages.
    """
    days = DAYS * city.steps_per_day
    read = np.isfinite(city.values[:, :, 0]).mean(axis=1)
    cumulative = np.concatenate([[0.0], np.cumsum(read)])
    steps = np.arange(days, city.num_steps - horizon + 1)
    after = (cumulative[steps + horizon] - cumulative[steps]) / horizon
    before = (cumulative[steps] - cumulative[steps - days]) / days
    fit = steps[(after >= 0.5) & (before >= 0.5 * read.mean())]
    return np.random.default_rng(seed).choice(fit, count).tolist()


def as_tables(city: City, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a city as an engineer would have it: a long table of its readings and one of its edges."""
    start = _FIRST if city.start is None else city.start
    steps, nodes = np.nonzero(np.isfinite(city.values[:, :, 0]))
    ids = np.asarray(city.node_ids, object)
    columns = {
        "unique_id": ids[nodes],
        "ds": (start + steps * np.timedelta64(city.interval_minutes, "m")).astype(str),
        "y": city.values[steps, nodes, 0],
    }
    readings, edges = folder / "readings.csv", folder / "edges.csv"
    pd.DataFrame(columns).to_csv(readings, index=False)
    links = {"from": ids[city.senders], "to": ids[city.receivers], "weight": city.weights}
    pd.DataFrame(links).to_csv(edges, index=False)
    return readings, edges


def forecast_moment(
    city: City, generator: gpd.Hypernetwork, step: int, folder: pathlib.Path, *, adapted: bool = True
) -> dict[str, Any]:
    """Cuts a city to the 72 hours before a step, writes them as CSV, and forecasts what comes after by both ways.

    Args:
      city: one channel, at the interval of the generator.
      generator: that never saw it.
      step: the first that is forecast.
      folder: for the tables.
      adapted: whether to fine-tune too.

    Returns:
      By name: forecasts [R, P] of `METHODS`, quantiles [R, P, Q] of each, and the truth [R, P], NaN where missing.
    """
    horizon, days = generator.data.horizon, DAYS * city.steps_per_day
    clock = _FIRST if city.start is None else city.start
    start = clock + (step - days) * np.timedelta64(city.interval_minutes, "m")
    cut = dataclasses.replace(city, values=city.values[step - days : step], start=start)
    readings, edges = as_tables(cut, folder)
    made, _ = ingest.city_from_tables(readings, name=city.name, kind=city.kind, edges=edges)
    now = start + days * np.timedelta64(city.interval_minutes, "m")
    new_city = gpd.prepare_new_city(made, generator, at=now)
    config = gpd.GenerateConfig(samples=samples_that_fit(generator, new_city.city.num_nodes))
    parameters = generator.generate(new_city.prompts, key=jax.random.key(0), config=config)
    ways = {"zero_shot": None} | ({"adapted": gpd.AdaptConfig()} if adapted else {})
    ahead = {name: gpd.forecast_next(parameters, made, at=now, adapt=how) for name, how in ways.items()}
    # Regions without a reading in the three days were left out of the city, and are not judged.
    kept = [city.node_ids.index(name) for name in new_city.city.node_ids]
    seen = _with_steps_ahead(_only(cut, kept), horizon)
    average = historical_average(seen, Span(0, days), np.asarray([days], np.int32), history=0, horizon=horizon)
    quantiles = average_quantiles(seen, Span(0, days), average, np.asarray([days]))
    found: dict[str, Any] = {"truth": city.values[step : step + horizon, kept, 0].T, "weekend": is_weekend(seen)}
    found["weekend"] = None if city.start is None else found["weekend"][-horizon:]
    found["historical_average"] = average[0], quantiles[0]
    return found | {name: (of.forecast, of.quantiles) for name, of in ahead.items()}


def _only(city: City, kept: list[int]) -> City:
    """A city of some of its regions, without edges."""
    none = {name: getattr(city, name)[:0] for name in ("senders", "receivers", "weights")}
    places = {"latitude": None, "longitude": None, "poi": None, "poi_names": ()}
    ids = tuple(city.node_ids[node] for node in kept)
    return dataclasses.replace(city, values=city.values[:, kept], node_ids=ids, **none, **places)


def _with_steps_ahead(city: City, steps: int) -> City:
    """A city with so many steps more, of which nothing was read."""
    ahead = np.full((steps, *city.values.shape[1:]), np.nan, np.float32)
    return dataclasses.replace(city, values=np.concatenate([city.values, ahead]))


def average_quantiles(
    city: City, support: Span, average: Float[np.ndarray, "S R P"], first: Int[np.ndarray, " S"]
) -> Float[np.ndarray, "S R P Q"]:
    """Quantiles around the historical average, of its residuals on each of the support days, left out of it in turn.

    They are divided by the deviation that the support days lead one to expect of a region at an hour, pooled over all
    regions and hours, and multiplied by it again.

    Args:
      city: one channel.
      support: whole days.
      average: the historical average.
      first: the first step of every forecast.

    Returns:
      In data units; none below 0.
    """
    per_day, weekend, residuals = city.steps_per_day, is_weekend(city), []
    mean, std = region_scales(city, support)
    seen = scaled_expectation(city, support, mean, std)
    kind = np.zeros(city.num_steps, int) if weekend is None else weekend.astype(int)
    deviation = seen.deviation[kind, :, slot_of_day(city)] * std  # [T, R]
    for begin in range(support.start, support.stop, per_day):
        values = np.array(city.values)
        values[begin : begin + per_day] = np.nan
        left = dataclasses.replace(city, values=values)
        if not np.isfinite(left.values[support.start : support.stop]).any():
            continue
        made = historical_average(left, support, np.asarray([begin], np.int32), history=0, horizon=per_day)[0]
        residuals.append((city.values[begin : begin + per_day, :, 0] - made.T) / deviation[begin : begin + per_day])
    if not residuals:  # of a single day, no other says how far it may be off
        return np.repeat(average[..., None], len(LEVELS), axis=-1)
    around = np.nanquantile(np.concatenate(residuals), LEVELS)
    ahead = deviation[first[:, None] + np.arange(average.shape[-1])].swapaxes(1, 2)
    return np.maximum(average[..., None] + ahead[..., None] * around, 0.0)


def judge(
    city: City, generator: gpd.Hypernetwork, count: int = 40, seed: int = 0, *, adapted: bool = True
) -> dict[str, Any]:
    """Errors, coverage and scores of a city's next hours at random moments.

    Args:
      city: one channel, at the interval of the generator, which never saw it.
      generator: trained on others.
      count: of moments.
      seed: of their draw.
      adapted: whether to fine-tune too.

    Returns:
      JSON values: over all readings, and those of weekdays and of weekends, for every method the mean absolute error,
      shares inside the intervals of 50 and 90 %, and the mean pinball loss over the quantiles, doubled, which
      approaches the CRPS; and the errors of every moment.
    """
    moments = random_moments(city, count, generator.data.horizon, seed)
    rows: list[dict[str, Any]] = []
    sums: dict[tuple[str, str], list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in moments:
            found = forecast_moment(city, generator, step, pathlib.Path(folder), adapted=adapted)
            truth = found["truth"]
            read = np.isfinite(truth)
            weekend = np.zeros(truth.shape[1], bool) if found["weekend"] is None else found["weekend"]
            row: dict[str, Any] = {"step": int(step), "readings": int(read.sum()), "weekend_steps": int(weekend.sum())}
            for name in METHODS if adapted else METHODS[:-1]:
                forecast, quantiles = found[name]
                row[name] = float(np.abs(forecast - truth)[read].mean())
                scores = interval_scores(forecast, quantiles, truth)
                for part, of in (("all", read), ("weekdays", read & ~weekend), ("weekends", read & weekend)):
                    if of.any():
                        sums.setdefault((part, name), []).append(np.append(scores[of].sum(axis=0), of.sum()))
            rows.append(row)
    result: dict[str, Any] = {"moments": rows}
    for (part, name), parts in sums.items():
        total = np.sum(parts, axis=0)
        result.setdefault(part, {"readings": int(total[-1])})[name] = means_of(total)
    return result


def means_of(total: Float[np.ndarray, "5"]) -> dict[str, float]:
    """By name, the means of `interval_scores` from their sums, and the number of readings behind them."""
    means = (total[:-1] / total[-1]).round(4).tolist()
    return dict(zip(("mean_absolute_error", "inside_50", "inside_90", "twice_pinball"), means, strict=True))


def interval_scores(
    forecast: Float[np.ndarray, "*S R P"], quantiles: Float[np.ndarray, "*S R P Q"], truth: Float[np.ndarray, "*S R P"]
) -> Float[np.ndarray, "*S R P 4"]:
    """Absolute errors, whether inside the intervals of 50 and 90 %, and twice the mean pinball loss over the levels."""
    inside = [(quantiles[..., low] <= truth) & (truth <= quantiles[..., -1 - low]) for low in (1, 0)]
    off, levels = truth[..., None] - quantiles, np.asarray(LEVELS)
    pinball = 2 * np.maximum(levels * off, (levels - 1) * off).mean(axis=-1)
    return np.stack([np.abs(forecast - truth), *inside, pinball], axis=-1)
