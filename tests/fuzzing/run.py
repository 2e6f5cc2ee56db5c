"""Feeds broken and hostile files and folders to every reader, until each has read so many or the time is over.

    python -m tests.fuzzing.run [--readers city,zoo_folder] [--inputs 100000] [--minutes 10] [--seed 0] [--guided]

What a reader does but return or refuse in one line is printed, its input kept in --keep, and the exit code is 1 then.
With --guided, files of the readers of files grow towards lines of the library that none has reached (`atheris`).
"""

import json
import os
import pathlib
import random
import sys
import tempfile
import time

from absl import app, flags

import tests.tiny  # noqa: F401  registers its model
from gpdiff_jax import Run, SimulationConfig, save_city, simulate_cities
from tests.fuzzing.folders import folder_readers
from tests.fuzzing.guided import feed_guided
from tests.fuzzing.readers import feed, readers
from tests.runs import tiny_settings

flags.DEFINE_list("readers", None, "names of readers; all if not given")
flags.DEFINE_integer("inputs", 100_000, "files that each reads", 1)
flags.DEFINE_float("minutes", 10.0, "for all together", 0)
flags.DEFINE_integer("seed", 0, "of the changes")
flags.DEFINE_string("keep", None, "folder for files that a reader fails on")
flags.DEFINE_bool("guided", False, "let atheris choose the changes, by what they reach; readers of files alone")


def finished_run(folder: pathlib.Path) -> pathlib.Path:
    """The smallest run, with the files of its cities beside it."""
    cities = folder / "cities"
    cities.mkdir()
    for city in simulate_cities(SimulationConfig(cities=3, regions=8, days=14), seed=0):
        save_city(cities / f"{city.name}.npz", city)
    with Run.open(folder / "whole", tiny_settings(cities)) as run:
        run.evaluate()
    return folder / "whole"


def main(argv: list[str]) -> None:
    """Feeds all readers, and says what was found."""
    del argv
    given = flags.FLAGS
    found = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = pathlib.Path(name)
        every = readers(folder)
        if not given.guided and (not given.readers or set(given.readers) - set(every)):
            every |= folder_readers(finished_run(folder), folder)
        names = given.readers or list(every)
        for number, reader in enumerate(names):
            seconds, seed = 60 * given.minutes / len(names), given.seed * 1000 + number
            if given.guided:
                ends, wrong = feed_guided(reader, folder, seconds, given.inputs, seed)
            else:
                deadline = time.monotonic() + seconds
                ends, wrong = feed(every[reader], folder, random.Random(seed), given.inputs, deadline)
                ends = {"inputs": sum(ends.values()), **ends}
            print(json.dumps({"reader": reader, **ends, "wrong": sorted(wrong)}), flush=True)
            for place, content in enumerate(wrong.values()):
                if given.keep:
                    pathlib.Path(given.keep).mkdir(parents=True, exist_ok=True)
                    kept = pathlib.Path(given.keep) / f"{reader}_{place}{pathlib.Path(every[reader].file).suffix}"
                    kept.write_bytes(content)
            found += len(wrong)
    sys.exit(int(found > 0))


if __name__ == "__main__":
    app.run(main)
