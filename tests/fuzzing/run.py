"""Feeds broken and hostile files to every reader, until each has read so many or the time is over.

    python -m tests.fuzzing.run [--readers city,long_table] [--inputs 100000] [--minutes 10] [--seed 0]

What a reader does but return or refuse in one line is printed, its input kept in --keep, and the exit code is 1 then.
"""

import json
import os
import pathlib
import random
import sys
import tempfile
import time

from absl import app, flags

from tests.fuzzing.readers import feed, readers

flags.DEFINE_list("readers", None, "names of readers; all if not given")
flags.DEFINE_integer("inputs", 100_000, "files that each reads", 1)
flags.DEFINE_float("minutes", 10.0, "for all together", 0)
flags.DEFINE_integer("seed", 0, "of the changes")
flags.DEFINE_string("keep", None, "folder for files that a reader fails on")


def main(argv: list[str]) -> None:
    """Feeds all readers, and says what was found."""
    del argv
    given = flags.FLAGS
    found = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = pathlib.Path(name)
        every = readers(folder)
        names = given.readers or list(every)
        for number, reader in enumerate(names):
            deadline = time.monotonic() + 60 * given.minutes / len(names)
            luck = random.Random(given.seed * 1000 + number)
            ends, wrong = feed(every[reader], folder, luck, given.inputs, deadline)
            print(
                json.dumps({"reader": reader, "inputs": sum(ends.values()), **ends, "wrong": sorted(wrong)}), flush=True
            )
            for place, content in enumerate(wrong.values()):
                if given.keep:
                    pathlib.Path(given.keep).mkdir(parents=True, exist_ok=True)
                    kept = pathlib.Path(given.keep) / f"{reader}_{place}{pathlib.Path(every[reader].file).suffix}"
                    kept.write_bytes(content)
            found += len(wrong)
    sys.exit(int(found > 0))


if __name__ == "__main__":
    app.run(main)
