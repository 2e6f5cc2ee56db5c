"""In: a new city, its generated parameters and its forecasts. Out: a folder of them, and a table to print."""

import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.analysis.metrics import mae
from gpdiff_jax.cities import City, load_city
from gpdiff_jax.cities.above import told_above
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json, write_npz
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import model_names, read_model_file
from gpdiff_jax.pretrained import DEFAULT, load_pretrained
from gpdiff_jax.region_parameters import RegionParameters
from gpdiff_jax.run.columns import in_columns, short_number
from gpdiff_jax.run.run import partial_bins_note, silence_notes
from gpdiff_jax.transfer.evaluate import MethodForecast, step_names
from gpdiff_jax.transfer.new_city import NewCity, save_parameters
from gpdiff_jax.transfer.quantiles import LEVELS

_MOST_ROWS, _MOST_NAMED = 10, 5
_EXPECTED = 20  # readings of a while that was read as zero
_MOST_BYTES = 300 * 2**20


def load_generator(folder: str | None, model: str | None = None) -> tuple[Hypernetwork, str | None]:
    """Reads a trained generator, and the file of its model where it is not built in.

    Args:
      folder: of the generator; None for that of the package.
      model: the name of its model, or a `.py` file that registers it; None where it is built in.

    Returns:
      The generator, and the digest of the file that its model was read from.

    Raises:
      InputError: the generator makes parameters of another model, or of one that is not known; see `Hypernetwork.load`.
    """
    named, digest = None, None
    if model is not None and model.endswith(".py"):
        # Before the generator is read, which may look at its model.
        named, digest = read_model_file(model)
    hypernetwork = load_pretrained() if folder is None else Hypernetwork.load(folder)
    folder = folder or f"the package's {DEFAULT}"
    wanted = hypernetwork.model_name
    if model is not None and (named or model) != wanted:
        raise InputError(
            f"--model {model!r} is model {named or model!r}, but {folder!r} generates {wanted!r}; leave it out"
        )
    if wanted not in model_names():
        raise InputError(
            f"{folder!r} generates model {wanted!r}, which is not built in; name its file by --model FILE.py"
        )
    return hypernetwork, digest


def samples_that_fit(hypernetwork: Hypernetwork, regions: int) -> int:
    """Parameter sets per region: as many as are usual, of large cities fewer, so that all take some 300 MiB at most.

    Reading them is what a forecast costs, and their forecasts differ by a tenth of what is to be expected anyway.
    """
    usual, each = GenerateConfig().samples, 4 * int(hypernetwork.codec.layout.mask().sum())
    return max(1, min(usual, _MOST_BYTES // (each * regions)))


def notes_of(city: City, new_city: NewCity) -> list[str]:
    """What of a new city is seen in part or not at all, and which of its readings look odd; a line each."""
    made = new_city.city
    lines = partial_bins_note(city, made.interval_minutes) + silence_notes(made, new_city.target)
    return [*lines, *_unfinished_note(city, new_city), *_odd_regions(new_city)]


def notes_above(path: str | os.PathLike[str], missing_above: float | None) -> list[str]:
    """What a user should know of readings of a city file that a value makes missing; nothing where none is given."""
    if missing_above is None:
        return []
    whole = load_city(path, missing_above=math.inf)  # and none of them is judged
    facts = {"ids": whole.node_ids, "interval_minutes": whole.interval_minutes, "start": whole.start}
    return [told_above(whole.values, missing_above, **facts)]


def print_notes(notes: Sequence[str]) -> None:
    """Says lines on standard error."""
    for line in notes:
        print(line, file=sys.stderr)


def _unfinished_note(city: City, new_city: NewCity) -> list[str]:
    """At most one line: that the last readings belong to a step that is not over."""
    read, step = new_city.read, np.timedelta64(1, "m")
    if city.start is None or read.start is None:
        return []
    end = read.start + read.num_steps * read.interval_minutes * step
    later = (city.start + city.num_steps * city.interval_minutes * step - end) // step
    if not 0 < later < read.interval_minutes:
        return []
    minutes = read.interval_minutes
    return [f"{city.name}: what was read from {end} on is not looked at, for these {minutes} minutes are not over"]


def _odd_regions(new_city: NewCity) -> list[str]:
    """A line each for regions that read zero throughout or lately, or nothing for a day and more; some of many."""
    read, support = new_city.read, new_city.target.split.support
    values = read.values[support.start : support.stop, :, 0]
    seen = np.isfinite(values)
    zero = seen.any(axis=0) & (np.where(seen, values, 0.0) == 0).all(axis=0)
    ago = np.where(seen.any(axis=0), seen[::-1].argmax(axis=0), 0)
    names, late = read.node_ids, ago >= read.steps_per_day
    lines = _some(zero, lambda node: f"region {names[node]!r} read nothing but 0; if it was out of order, leave it out")
    hours = ago * read.interval_minutes // 60
    lines += _some(late, lambda node: f"region {names[node]!r} was last read {hours[node]} hours before now")
    fallen = _steps_of_odd_zeros(values, read.steps_per_day)

    def line(node: int) -> str:
        since = step_names(read, np.asarray([support.stop - fallen[node]]))[0]
        rest = "where it never did at these hours; if it is out of order, leave these readings out"
        return f"region {names[node]!r} reads 0 since {since}, {rest}"

    return lines + _some(fallen > 0, line)


def _steps_of_odd_zeros(values: Float[np.ndarray, "T N"], per_day: int) -> Int[np.ndarray, " N"]:
    """For how many of the last steps regions read zero at hours of which they never did on the days before; else 0.

    Chance alone is no cause where at least 20 counts were to be expected in that while.
    """
    above = values > 0
    lately = np.where(above.any(axis=0), above[::-1].argmax(axis=0), 0)
    last = np.arange(len(values))[:, None] >= len(values) - lately
    zero = last & (values == 0)
    # Whole days, the last ending now.
    shape, front = (-1, per_day, values.shape[1]), -len(values) % per_day
    earlier, zeros = (
        np.pad(rows, ((front, 0), (0, 0)), constant_values=fill).reshape(shape)
        for rows, fill in ((np.where(last, np.nan, values), np.nan), (zero, False))
    )
    known, missed = np.isfinite(earlier), zeros.any(axis=0)
    usual = np.where(known, earlier, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    expected = np.where(missed, usual, 0.0).sum(axis=0)
    never = ~(missed & (earlier == 0).any(axis=0)).any(axis=0)
    first = np.where(zero.any(axis=0), len(values) - zero.argmax(axis=0), 0)
    return np.where(never & (expected >= _EXPECTED), first, 0)


def _some(which: Bool[np.ndarray, " N"], line: Callable[[int], str]) -> list[str]:
    """A line for each of the first regions of some, and how many more there are."""
    nodes = np.flatnonzero(which)
    more = [f"and {len(nodes) - _MOST_NAMED} more regions like it"] if len(nodes) > _MOST_NAMED else []
    return [line(int(node)) for node in nodes[:_MOST_NAMED]] + more


def write_forecasts(
    folder: pathlib.Path,
    new_city: NewCity,
    parameters: RegionParameters,
    made: MethodForecast,
    facts: Mapping[str, Any],
) -> None:
    """Writes generate.json, parameters/ and forecast.npz.

    Args:
      folder: that this process has claimed.
      new_city: the city.
      parameters: generated for its regions.
      made: its forecasts by them.
      facts: what generate.json says beside what is known of the city and its forecasts.
    """
    silent = [new_city.city.node_ids[node] for node in new_city.target.silent]
    known = {"silent_regions": silent, "device_kind": jax.devices()[0].device_kind}
    # First the mark by which the folder is known, should it be written half.
    write_json(folder / "generate.json", _summary(new_city, made) | known | dict(facts))
    save_parameters(folder / "parameters", parameters, new_city)
    write_npz(folder / "forecast.npz", _arrays(new_city, made))


def _horizon_minutes(new_city: NewCity) -> list[int]:
    return [new_city.city.interval_minutes * step for step in range(1, new_city.data.horizon + 1)]


def _summary(new_city: NewCity, made: MethodForecast) -> dict[str, Any]:
    city, truth = new_city.city, new_city.truth
    observed = np.isfinite(truth)
    begin, end = new_city.support
    return {
        "city": city.name,
        "kind": city.kind,
        "channel": city.feature_names[0],
        "unit": city.unit,
        "interval_minutes": city.interval_minutes,
        "regions": city.num_nodes,
        "support_days": new_city.data.support_days,
        "support": [begin, end],
        "windows": len(truth),
        "window_start": [new_city.window_starts[0], new_city.window_starts[-1]],
        "horizon_minutes": _horizon_minutes(new_city),
        "forecast_mean": made.forecast.mean(axis=(0, 1)).tolist(),
        "spread_mean": None if made.spread is None else made.spread.mean(axis=(0, 1)).tolist(),
        "mae": mae(made.forecast, truth, axis=(0, 1)).tolist() if observed.any(axis=(0, 1)).all() else None,
    }


def _arrays(new_city: NewCity, made: MethodForecast) -> dict[str, np.ndarray]:
    city = new_city.city
    arrays = {
        "forecast": made.forecast,
        "window_start": np.asarray(new_city.window_starts),
        "node_ids": np.asarray(city.node_ids),
        "horizon_minutes": np.asarray(_horizon_minutes(new_city)),
        "unit": np.asarray(city.unit),
        "truth": new_city.truth,
    }
    if made.spread is not None:
        arrays["spread"] = made.spread
    if made.quantiles is not None:
        arrays |= {"quantiles": made.quantiles, "levels": np.asarray(LEVELS)}
    return arrays


def forecast_table(new_city: NewCity, made: MethodForecast, *, whole: str = "forecast.npz") -> str:
    """The last window's forecasts of some regions, and the error of all windows where it is known, as plain text.

    Args:
      new_city: the city.
      made: its forecasts.
      whole: the name of the file that has all regions.

    Returns:
      Some lines.
    """
    summary = _summary(new_city, made)
    first, last = summary["window_start"]
    windows = f"from {first}" if summary["windows"] == 1 else f"{summary['windows']} windows, {first} to {last}"
    lines = [
        f"{summary['city']}: {summary['regions']} regions, seen from {' to '.join(summary['support'])}",
        f"{summary['unit']}, forecast {windows}" + ("; the last:" if summary["windows"] > 1 else ""),
    ]
    # What is nothing beside the rest is printed as nothing, not as a row of zeros.
    band, least = made.quantiles is not None, 1e-4 * float(np.abs(made.forecast[-1]).max())
    rows = [["region (5 to 95 %)" if band else "region", *(f"+{each} min" for each in summary["horizon_minutes"])]]
    for node, name in list(enumerate(new_city.city.node_ids))[:_MOST_ROWS]:
        cells = [short_number(value, least) for value in made.forecast[-1, node]]
        if made.quantiles is not None:
            ends = [[short_number(value, least) for value in pair] for pair in made.quantiles[-1, node][:, [0, -1]]]
            cells = [f"{cell} ({low} to {high})" for cell, (low, high) in zip(cells, ends, strict=True)]
        rows.append([f"{name:.24s}", *cells])
    if summary["mae"] is not None:
        rows.append(["mean absolute error", *map(short_number, summary["mae"])])
    lines += in_columns(rows)
    if summary["regions"] > _MOST_ROWS:
        lines.append(f"and {summary['regions'] - _MOST_ROWS} more regions in {whole}")
    return "\n".join(lines)
