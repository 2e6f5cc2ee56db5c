"""What more source cities are worth in cities that no model has seen.

    python -m benchmarks.source_counts --data_dir DIR --held_out hangzhou_metro,paris_bike_counters [--minutes 60]
    python -m benchmarks.source_counts --figure docs/source_counts.svg

Every city of --held_out is left out in turn. Pooled model and generator are trained on 2, 4 and 8 of the other cities
of the package's generator, each set within the next, then on `all`: all counts of people and vehicles by the hour that
the folder holds, every channel a city of its own, without the city's own. Errors in the city's last 20 %, after three
support days, as in `gpdiff_jax.analysis.room`; the city's own parameters, of which the room is made, are those that
`benchmarks.crowd_hourly --room` found, the same for all numbers of sources. What is finished is kept in --results.
"""

import json
import math
import os
import pathlib
import shutil
import time
import zlib

import jax
import numpy as np
from absl import flags

import gpdiff_jax as gpd
from benchmarks.crowd_hourly_card import CITIES
from benchmarks.measuring import device_name, print_line
from experiments import command_line
from gpdiff_jax.analysis.room import METHODS, RoomConfig, held_out_targets, stretch_sums
from gpdiff_jax.cities import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json

flags.DEFINE_string("data_dir", os.environ.get("GPDIFF_DATA"), "folder of city files; default GPDIFF_DATA")
flags.DEFINE_list("held_out", list(CITIES), "cities to leave out in turn")
flags.DEFINE_list("counts", ["2", "4", "8", "all"], "numbers of source cities")
flags.DEFINE_string("out_dir", "runs/source_counts", "folder of trainings that are not finished")
flags.DEFINE_string("results", "benchmarks/results/source_counts", "folder of the results")
flags.DEFINE_string("rooms", "benchmarks/results/crowd_hourly_room", "folder of the rooms of the cities")
flags.DEFINE_float("minutes", None, "begin no further training after so many; no limit if not given", 0)
flags.DEFINE_string("figure", None, "draw the results there, instead of measuring")

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
_MEASURED = METHODS[:-2]
_SHOWN = {
    "pooled": "pooled",
    "generated": "generated",
    "generated_shuffled": "generated, prompts shuffled",
    "pooled_adapted": "pooled, tuned",
    "generated_adapted": "generated, tuned",
}
_SEED = 0


def source_names(held_out: str, count: str) -> list[str]:
    """The source cities that stand for a number of them, or for "all"; a greater number holds those of the lesser."""
    others = [name for name in CITIES if name != held_out]
    if count == "all":
        return [*others, *_MORE]
    if not count.isdecimal() or not 1 <= int(count) <= len(others):
        raise InputError(f"--counts (={count}) must be numbers from 1 to {len(others)}, or all")
    order = np.random.default_rng(zlib.crc32(held_out.encode())).permutation(len(others))
    return [others[index] for index in order[: int(count)]]


def read_channels(name: str, every: bool) -> list[City]:
    """A city of the folder by the hour: its first channel, or every one as a city."""
    city = gpd.load_city(pathlib.Path(flags.FLAGS.data_dir) / f"{name}.npz")
    return gpd.select_channels(gpd.resample(city, 60), "each" if every else "first")


def measured(held_out: str, count: str) -> dict:
    """Errors in a city, by a generator of so many others."""
    folder = pathlib.Path(flags.FLAGS.out_dir) / f"{held_out}_{count}"
    names = source_names(held_out, count)
    cities = [channel for name in names for channel in read_channels(name, count == "all")]
    zoo_key, key = jax.random.split(jax.random.key(_SEED))
    data = gpd.DataConfig(window_days=(1, 14))
    begin = time.perf_counter()
    zoo = gpd.harvest_cities(cities, key=zoo_key, data=data, folder=folder / "zoo")
    generator = gpd.pretrain(zoo, key=key, folder=folder / "hypernetwork")
    trained = time.perf_counter()
    (city,) = read_channels(held_out, every=False)
    config, key = RoomConfig(), jax.random.key(_SEED)
    found = [
        stretch_sums(city, generator, target, key=key, config=config)
        for target in held_out_targets(city, generator.data, config)
    ]
    total = sum(readings for _, readings in found)
    jax.clear_caches()  # the programs of many cities fill what a process may map of memory
    shutil.rmtree(folder)
    return {
        "city": held_out,
        "unit": city.unit,
        "sources": names,
        "source_regions": zoo.num_regions,
        "error": {name: sum(sums[name] for sums, _ in found) / total for name in _MEASURED},
        "readings": total,
        "seconds": {"training": trained - begin, "measuring": time.perf_counter() - trained},
    }


def shares(found: dict, own: float) -> dict[str, float]:
    """What part of the way from the pooled to the city's own error each method goes."""
    error = found["error"]
    return {name: (error["pooled"] - error[name]) / (error["pooled"] - own) for name in _MEASURED}


def draw(results: pathlib.Path, rooms: pathlib.Path, path: pathlib.Path) -> None:
    """Draws errors and shares of the room against the number of sources, means over the cities that have all numbers.

    Raises:
      InputError: no city has all numbers, or the room of one is not there.
    """
    from matplotlib.figure import Figure

    counts = flags.FLAGS.counts
    held_out = [
        name for name in flags.FLAGS.held_out if all((results / f"{name}_{count}.json").exists() for count in counts)
    ]
    missing = [name for name in held_out if not (rooms / f"{name}.json").exists()]
    if not held_out or missing:
        lacks = f"{rooms} lacks {', '.join(missing)}" if missing else f"{results} has no city with all of {counts}"
        raise InputError(f"{lacks}; measure it first")
    # Both [cities, counts, methods].
    relative, reached = [], []
    for name in held_out:
        error = json.loads((rooms / f"{name}.json").read_text())["error"]
        found = [json.loads((results / f"{name}_{count}.json").read_text()) for count in counts]
        relative.append([[one["error"][m] / one["error"]["historical_average"] for m in _MEASURED] for one in found])
        reached.append([list(shares(one, min(error["own"], error["city"])).values()) for one in found])
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    labels = ("error / average of three days", "share of the room")
    for axes, values, label in zip(figure.subplots(1, 2), (relative, reached), labels, strict=True):
        mean, deviation = np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / math.sqrt(len(held_out))
        for method, shown in _SHOWN.items():
            column = _MEASURED.index(method)
            if label == "share of the room" and method == "pooled":
                continue  # 0 by definition
            axes.errorbar(range(len(counts)), mean[:, column], deviation[:, column], marker="o", capsize=3, label=shown)
        axes.set(xlabel="source cities", ylabel=label, title=f"Mean and standard error, {len(held_out)} cities")
        axes.set_xticks(range(len(counts)), counts)
    figure.axes[0].legend()
    figure.axes[1].axhline(0.0, color="grey", linewidth=0.8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str]) -> None:
    """Measures what the folder of results lacks, or draws what it holds."""
    del argv
    given = flags.FLAGS
    results = pathlib.Path(given.results)
    if given.figure is not None:
        draw(results, pathlib.Path(given.rooms), pathlib.Path(given.figure))
        return
    if given.data_dir is None:
        raise InputError("neither --data_dir nor GPDIFF_DATA names the folder of the city files")
    unknown = sorted(set(given.held_out) - set(CITIES))
    if unknown:
        raise InputError(f"--held_out (={','.join(unknown)}) must be among {', '.join(CITIES)}")
    gpd.enable_compilation_cache()
    deadline = time.monotonic() + 60 * given.minutes if given.minutes else math.inf
    for held_out in given.held_out:
        for count in given.counts:
            path = results / f"{held_out}_{count}.json"
            if path.exists() or time.monotonic() > deadline:
                continue
            found = measured(held_out, count)
            path.parent.mkdir(parents=True, exist_ok=True)
            command = f"python -m benchmarks.source_counts --held_out {held_out} --counts {count}"
            write_json(path, {"command": command, "device": device_name(), **found})
            for name in _MEASURED:
                case = f"{held_out} from {count}: {name}"
                print_line("source_counts", case, "mean_absolute_error", found["error"][name], found["unit"])


if __name__ == "__main__":
    command_line.run(main)
