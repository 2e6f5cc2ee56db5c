"""In: the name of a reader. Out: what a fuzzer that sees which lines of the library an input reaches found of it."""

import math
import pathlib
import re
import subprocess
import sys


def feed_guided(
    reader: str, folder: pathlib.Path, seconds: float, inputs: int, seed: int
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Feeds a reader of files by `tests.fuzzing.guided_worker`, up to the first that it fails on.

    Args:
      reader: its name.
      folder: for its files.
      seconds: how long, at most.
      inputs: how many, at most.
      seed: of the changes.

    Returns:
      How many `inputs` were read and how many `reached` a line that none had reached before, and what went wrong with
      the input that did.

    Raises:
      RuntimeError: the fuzzer itself failed.
    """
    place = folder / f"guided_{reader}"
    place.mkdir()
    words = [reader, str(place), str(math.ceil(seconds)), str(inputs), str(seed)]
    command = [sys.executable, "-m", "tests.fuzzing.guided_worker", *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    said = dict(re.findall(r"^stat::(\w+): +(\d+)", done.stderr, re.MULTILINE))
    crashed = [path for path in place.iterdir() if re.match("crash-|timeout-|oom-|leak-", path.name)]
    if "number_of_executed_units" not in said or (done.returncode and not crashed):
        raise RuntimeError(done.stderr[-3000:])
    ends = {"inputs": int(said["number_of_executed_units"]), "reached": int(said["new_units_added"])}
    why = (place / "wrong.txt").read_text() if (place / "wrong.txt").exists() else ""
    return ends, {why or path.name: path.read_bytes() for path in crashed}
