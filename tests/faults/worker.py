"""In: a folder and the cities of a run. Out: the run, made or gone on with, by a process that is there to be hurt.

    python -m tests.faults.worker FOLDER CITIES [METHOD ...]

It ends as the commands do: one line and an exit code.
"""

import os
import pathlib
import re
import signal
import sys
from typing import Any

import tests.tiny  # noqa: F401  registers its model
from experiments import command_line
from gpdiff_jax.run.run import Run
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from tests.runs import tiny_settings

_CHANGES = {"os.rename": 1, "os.rmdir": 0, "shutil.rmtree": 0}  # audit events, and where they name it


def kill_at_a_new_change(folder: pathlib.Path, known: pathlib.Path) -> None:
    """Kills this process before it renames or removes something in a folder that no process before it came to.

    Args:
      folder: the folder of a run.
      known: a file with a line for every kind of change that a process was killed at; it gets the next.
    """
    seen = set(known.read_text().splitlines()) if known.exists() else set()

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES:
            return
        path = pathlib.Path(str(arguments[_CHANGES[event]]))
        # Orbax clears its own unfinished folders away, and all forecasts of methods are written alike.
        if not path.is_relative_to(folder) or "orbax" in path.name or (event != "os.rename" and not path.is_dir()):
            return
        kind = f"{event} {re.sub('[0-9]+', '#', str(path.relative_to(folder)))}"
        kind = re.sub(" methods/.*", " methods", kind)
        if kind not in seen:
            known.write_text("".join(f"{one}\n" for one in sorted(seen | {kind})))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)


def work(
    folder: pathlib.Path,
    cities: pathlib.Path,
    methods: tuple[str, ...] = ("default",),
    known: pathlib.Path | None = None,
) -> None:
    """Makes the run and ends the process; with `known` as `kill_at_a_new_change` has it."""
    if known is not None:
        kill_at_a_new_change(folder, known)

    def main(argv: list[str]) -> None:
        del argv
        enable_compilation_cache()
        with Run.open(folder, tiny_settings(cities, methods=methods or ("default",))) as run:
            run.evaluate()

    sys.argv = sys.argv[:1]
    command_line.run(main)


if __name__ == "__main__":
    work(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), tuple(sys.argv[3:]))
