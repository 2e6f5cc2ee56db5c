"""What more source cities are worth in cities that no model has seen.

    python -m benchmarks.source_counts --data_dir DIR --held_out hangzhou_metro,paris_bike_counters [--minutes 60]
    python -m benchmarks.source_counts --figure docs/source_counts.svg

Every city of --held_out is left out in turn. Pooled model and generator are trained on 2, 4 and 8 of the other cities
of the package's generator, each set within the next, then on `all`: all counts of people and vehicles by the hour that
the folder holds, every channel a city of its own, without those of the same place. `8+simulated` adds as many simulated
cities, and `0+simulated` are these alone. Errors in the city's last 20 %, after three support days, as in
`gpdiff_jax.analysis.room`, few-shot by steps in codes alone; the city's own parameters, of which the room is made, are
those that `benchmarks.crowd_hourly --room` found, the same for all numbers of sources. What is finished is kept in
--results.
"""

import dataclasses
import os
import pathlib
import shutil
import time

import jax
from absl import flags

import gpdiff_jax as gpd
from benchmarks.crowd_hourly_card import CITIES
from benchmarks.measuring import deadline, device_name, print_line
from benchmarks.source_sets import SIMULATED, draw, source_names
from experiments import command_line
from gpdiff_jax.analysis.room import RoomConfig, held_out_targets, stretch_sums
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

_SEED = 0


def read_channels(name: str, every: bool) -> list[City]:
    """A city of the folder by the hour: its first channel, or every one as a city; or a simulated one."""
    if name.startswith("simulated_"):
        index = int(name.removeprefix("simulated_"))
        return [dataclasses.replace(gpd.simulate_cities(SIMULATED, seed=_SEED)[index], name=name)]
    city = gpd.load_city(pathlib.Path(flags.FLAGS.data_dir) / f"{name}.npz")
    return gpd.select_channels(gpd.resample(city, 60), "each" if every else "first")


def measured(held_out: str, count: str) -> dict:
    """Errors in a city, by a generator of so many others."""
    folder = pathlib.Path(flags.FLAGS.out_dir) / f"{held_out}_{count}"
    names = source_names(held_out, count)
    cities = [channel for name in names for channel in read_channels(name, count == "all")]
    zoo_key, generator_key, key = jax.random.split(jax.random.key(_SEED), 3)
    data = gpd.DataConfig(window_days=(1, 14))
    begin = time.perf_counter()
    zoo = gpd.harvest_cities(cities, key=zoo_key, data=data, folder=folder / "zoo")
    generator = gpd.pretrain(zoo, key=generator_key, folder=folder / "hypernetwork")
    trained = time.perf_counter()
    (city,) = read_channels(held_out, every=False)
    # As in the results that there are: all of them must be comparable.
    config = RoomConfig(adapt=gpd.AdaptConfig(shared_steps=0))
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
        "error": {name: sum(sums[name] for sums, _ in found) / total for name in found[0][0]},
        "readings": total,
        "seconds": {"training": trained - begin, "measuring": time.perf_counter() - trained},
    }


def main(argv: list[str]) -> None:
    """Measures what the folder of results lacks, or draws what it holds."""
    del argv
    given = flags.FLAGS
    results = pathlib.Path(given.results)
    if given.figure is not None:
        draw(results, pathlib.Path(given.rooms), pathlib.Path(given.figure), given.held_out, given.counts)
        return
    if given.data_dir is None:
        raise InputError("neither --data_dir nor GPDIFF_DATA names the folder of the city files")
    unknown = sorted(set(given.held_out) - set(CITIES))
    if unknown:
        raise InputError(f"--held_out (={','.join(unknown)}) must be among {', '.join(CITIES)}")
    gpd.enable_compilation_cache()
    end = deadline(given.minutes)
    for held_out in given.held_out:
        for count in given.counts:
            path = results / f"{held_out}_{count}.json"
            if path.exists() or time.monotonic() > end:
                continue
            found = measured(held_out, count)
            path.parent.mkdir(parents=True, exist_ok=True)
            command = f"python -m benchmarks.source_counts --held_out {held_out} --counts {count}"
            write_json(path, {"command": command, "device": device_name(), **found})
            for name in found["error"]:
                case = f"{held_out} from {count}: {name}"
                print_line("source_counts", case, "mean_absolute_error", found["error"][name], found["unit"])


if __name__ == "__main__":
    command_line.run(main)
