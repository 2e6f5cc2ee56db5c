"""In: a city that is left out, and results of more and more sources. Out: which sources these are, and their figure."""

import json
import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.crowd_hourly_card import CITIES
from gpdiff_jax.cities import SimulationConfig
from gpdiff_jax.errors import InputError

# Counts by the hour that the package's generator is not made of: no licence is stated, or vehicles are counted.
_MORE = (
    "berlin_flow",
    "los_angeles_flow",
    "melbourne_boroondara_flow",
    "nyc_bike_2014",
    "nyc_bike_2016",
    "nyc_taxi_grid_2015",
    "taipei_metro",
    "tehran_ride",
    "yinchuan_flow",
)
# Of the same place as a city that may be left out.
_SAME_PLACE = {
    "nyc_taxi_zones_2018": ("nyc_bike_2014", "nyc_bike_2016", "nyc_taxi_grid_2015"),
    "melbourne_pedestrians": ("melbourne_boroondara_flow",),
}
SIMULATED = SimulationConfig(cities=8, regions=40, days=56)
"""As many cities as the package's generator has others, of about as many regions as the smaller of them."""
_SHOWN = {
    "pooled": "pooled",
    "generated": "generated",
    "generated_shuffled": "generated, prompts shuffled",
    "pooled_adapted": "pooled, tuned",
    "generated_adapted": "generated, tuned",
    "generated_posterior": "generated, posterior",
}


def source_names(held_out: str, count: str) -> list[str]:
    """The source cities that stand for a number of them, or for "all"; a greater number holds those of the lesser.

    With "+simulated" behind the number, which may be 0 then, as many simulated ones follow as `SIMULATED` says.
    """
    number, _, more = count.partition("+")
    if more == "simulated":
        real = [] if number == "0" else source_names(held_out, number)
        return [*real, *(f"simulated_{index}" for index in range(SIMULATED.cities))]
    others = [name for name in CITIES if name != held_out]
    if count == "all":
        return [*others, *(name for name in _MORE if name not in _SAME_PLACE.get(held_out, ()))]
    if not count.isdecimal() or not 1 <= int(count) <= len(others):
        raise InputError(f"--counts (={count}) must be numbers from 1 to {len(others)}, or all, or 8+simulated")
    order = np.random.default_rng(zlib.crc32(held_out.encode())).permutation(len(others))
    return [others[index] for index in order[: int(count)]]


def shares(found: dict[str, Any], own: float) -> dict[str, float]:
    """What part of the way from the pooled to the city's own error each method goes."""
    error = found["error"]
    return {name: (error["pooled"] - error[name]) / (error["pooled"] - own) for name in error}


def draw(
    results: pathlib.Path, rooms: pathlib.Path, path: pathlib.Path, cities: Sequence[str], counts: Sequence[str]
) -> None:
    """Draws errors and shares of the room against the number of sources, means over the cities that have all numbers.

    Args:
      results: folder of CITY_COUNT.json.
      rooms: folder of the rooms of the cities, CITY.json.
      path: of the figure.
      cities: that may have been left out.
      counts: numbers of sources, as the files have them.

    Raises:
      InputError: no city has all numbers, or the room of one is not there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    held_out = [name for name in cities if all((results / f"{name}_{count}.json").exists() for count in counts)]
    missing = [name for name in held_out if not (rooms / f"{name}.json").exists()]
    if not held_out or missing:
        lacks = f"{rooms} lacks {', '.join(missing)}" if missing else f"{results} has no city with all of {counts}"
        raise InputError(f"{lacks}; measure it first")
    errors = [[json.loads((results / f"{name}_{count}.json").read_text()) for count in counts] for name in held_out]
    rooms_of = [json.loads((rooms / f"{name}.json").read_text())["error"] for name in held_out]
    shown = [name for name in _SHOWN if all(name in one["error"] for row in errors for one in row)]
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in shown:
        relative = [[one["error"][method] / one["error"]["historical_average"] for one in row] for row in errors]
        reached = [
            [shares(one, min(own["own"], own["city"]))[method] for one in row]
            for row, own in zip(errors, rooms_of, strict=True)
        ]
        left.plot(range(len(counts)), np.mean(relative, axis=0), marker="o", label=_SHOWN[method])
        error = np.std(reached, axis=0, ddof=1) / math.sqrt(len(held_out)) if len(held_out) > 1 else None
        right.errorbar(range(len(counts)), np.mean(reached, axis=0), error, marker="o", capsize=3)
    # That of the pooled model is nil by definition: its line is the axis of the shares.
    left.set(ylabel="error / average of three days", title=f"Mean of {len(held_out)} cities that were left out")
    right.set(ylabel="share of the room", title="Mean and standard error")
    for axes in (left, right):
        axes.set_xlabel("source cities")
        axes.set_xticks(range(len(counts)), counts)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
