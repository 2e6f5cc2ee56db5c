"""Makes the generator of the package, and shows what it errs by in cities that it never saw.

    python -m benchmarks.crowd_hourly --data_dir DIR --held_out beijing_metro,hangzhou_metro [--minutes 60]
    python -m benchmarks.crowd_hourly --data_dir DIR --held_out none --package gpdiff_jax/pretrained/crowd_hourly

Every city of --held_out is left out in turn: a generator is trained on the others, and forecasts the six hours after
40 random moments of the city, each from the 72 hours before it, which go through CSV as an engineer's readings do.
`none` leaves none out: it is the generator of the package as it is installed, with 16 bits, judged on a city of another
collection, nyc_bike_2014. What is finished is kept in --results and not made again; a training that was stopped goes
on. With --window_days 3,3 generators are made for three days alone, to stand beside. With --room, what is measured is
the part of the room of the city left out that is reached (`gpdiff_jax.analysis.room`). With --package, the package's
generator is made first, judged from there, and beside it its card is written, with the errors of all results.
"""

import json
import os
import pathlib
import time

import jax
from absl import flags

import gpdiff_jax as gpd
from benchmarks.crowd_hourly_card import CITIES, JUDGED_BY_ALL, model_card
from benchmarks.measuring import deadline, device_name, print_line
from benchmarks.moments import DAYS, METHODS, judge
from experiments import command_line
from gpdiff_jax.analysis.room import METHODS as ROOM_METHODS
from gpdiff_jax.analysis.room import RoomConfig, measure_room, own_parameters
from gpdiff_jax.cities import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically, write_json

flags.DEFINE_string("data_dir", os.environ.get("GPDIFF_DATA"), "folder of city files; default GPDIFF_DATA")
flags.DEFINE_list("held_out", None, "cities to leave out in turn, or none")
flags.DEFINE_string("out_dir", "runs/crowd_hourly", "folder of the trainings")
flags.DEFINE_string("results", None, "folder of the results, one file per city; one by what is measured if not given")
flags.DEFINE_bool("room", False, "measure what part of the room is reached, instead of forecasting at moments")
flags.DEFINE_integer("moments", 40, "random moments of every city", 1)
flags.DEFINE_bool("adapted", True, "forecast after fine-tuning too, which takes most of the time")
flags.DEFINE_float("minutes", None, "begin no further city after so many; no limit if not given", 0)
flags.DEFINE_list("window_days", ["1", "14"], "days of the windows that sources are seen through, least and most")
flags.DEFINE_string("package", None, "folder for the generator of none")

_DIRECTIONS = 32  # as many as fine-tuning takes
_SEED = 0


def read_city(name: str) -> City:
    """A city of the folder by the hour, first channel."""
    city = gpd.load_city(pathlib.Path(flags.FLAGS.data_dir) / f"{name}.npz")
    return gpd.select_channels(gpd.resample(city, 60), "first")[0]


def train(held_out: str) -> gpd.Hypernetwork:
    """The generator of all cities but one, or of all, made or read."""
    folder = pathlib.Path(flags.FLAGS.out_dir) / held_out
    cities = [read_city(name) for name in CITIES if name != held_out]
    zoo_key, key = jax.random.split(jax.random.key(_SEED))
    zoo = gpd.harvest_cities(cities, key=zoo_key, data=gpd.DataConfig(window_days=_days()), folder=folder / "zoo")
    return gpd.pretrain(zoo, key=key, folder=folder / "hypernetwork")


def _days() -> tuple[int, int]:
    words = flags.FLAGS.window_days
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise InputError(f"--window_days (={','.join(words)}) must be two whole numbers of days, as in 1,14")
    return int(words[0]), int(words[1])


def _command(held_out: str, days: tuple[int, int]) -> str:
    """The command that makes a result."""
    room = flags.FLAGS.room
    words = ["python -m benchmarks.crowd_hourly", *(["--room"] if room else []), f"--held_out {held_out}"]
    words += [] if room else [f"--moments {flags.FLAGS.moments}"]
    words += [] if days == (1, 14) else [f"--window_days {days[0]},{days[1]}"]
    return " ".join(words + ([] if flags.FLAGS.adapted else ["--noadapted"]))


def measured_room(name: str) -> dict:
    """The room of a city, by the generator of the others; see `measure_room`."""
    city, generator = read_city(name), train(name)
    config, key = RoomConfig(support_days=DAYS), jax.random.key(_SEED)
    own = own_parameters(city, generator.model, generator.pooled, generator.data, config, key=key)
    found = measure_room(city, generator, own, key=key, config=config)
    jax.clear_caches()  # the programs of many cities fill what a process may map of memory
    return found


def packaged(folder: str | None) -> gpd.Hypernetwork:
    """The generator of the package: the one in a folder, or the one that is installed."""
    return gpd.load_pretrained() if folder is None else gpd.Hypernetwork.load(folder)


def write_package(folder: pathlib.Path) -> None:
    """Trains the generator of all cities, if it is not there yet, and writes it with 16 bits."""
    train("none").save(folder, half=True, directions=_DIRECTIONS)
    # Orbax writes there where the folder lay, which nobody needs to know.
    write_atomically(folder / "commit_success.txt", b"Checkpoint commit was successful\n")


def main(argv: list[str]) -> None:
    """Trains and judges what the folder of results lacks."""
    del argv
    given = flags.FLAGS
    if given.data_dir is None:
        raise InputError("neither --data_dir nor GPDIFF_DATA names the folder of the city files")
    names = given.held_out or ["none", *CITIES]
    unknown = sorted(set(names) - {"none", *CITIES})
    if unknown:
        raise InputError(f"--held_out (={','.join(unknown)}) must be among none, {', '.join(CITIES)}")
    days = _days()
    if given.room and given.package is not None:
        raise InputError(f"--room measures what stands beside a package, and --package (={given.package}) makes one")
    gpd.enable_compilation_cache()
    if given.package is not None:
        write_package(pathlib.Path(given.package))
    results = pathlib.Path(given.results or f"benchmarks/results/crowd_hourly{'_room' if given.room else ''}")
    if given.room:
        names = [name for name in names if name != "none"]
    end = deadline(given.minutes)
    for name in names:
        path = results / f"{name}.json"
        command = _command(name, days)
        made = json.loads(path.read_text())["command"] if path.exists() else None
        if made is not None and made != command:
            raise InputError(f"{path} holds what {made!r} found, which is another command; name other --results")
        # The package's generator was made just now.
        done = made is not None and not (name == "none" and given.package is not None)
        if done or time.monotonic() > end:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if given.room:
            found = measured_room(name)
            write_json(path, {"command": command, "device": device_name(), **found})
            for method in ROOM_METHODS:
                print_line("room", f"{name}: {method}", "mean_absolute_error", found["error"][method], found["unit"])
            continue
        begin = time.perf_counter()
        generator = train(name) if name != "none" else packaged(given.package)
        trained = time.perf_counter()
        target = JUDGED_BY_ALL if name == "none" else name
        found = judge(read_city(target), generator, given.moments, adapted=given.adapted)
        facts = {
            "city": target,
            "generator": {"cities": [one for one in CITIES if one != name], "seed": _SEED, "window_days": list(days)},
            "support_days": DAYS,
            "command": command,
            "seconds": {"training": trained - begin, "forecasts": time.perf_counter() - trained},
            "device": device_name(),
        }
        write_json(path, facts | found)
        for method in METHODS if given.adapted else METHODS[:-1]:
            error = found["all"][method]["mean_absolute_error"]
            print_line("crowd_hourly", f"{target}: {method}", "mean_absolute_error", error, "readings")
    if given.package is not None:
        card = pathlib.Path(given.package).with_suffix(".md")
        write_atomically(card, model_card(results).encode())


if __name__ == "__main__":
    command_line.run(main)
