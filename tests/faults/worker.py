"""In: a folder and the cities of a run. Out: the run, made or gone on with, by a process that is there to be hurt.

    python -m tests.faults.worker FOLDER CITIES [METHOD ...]

It ends as the commands do: one line and an exit code.
"""

import pathlib
import sys

import tests.tiny  # noqa: F401  registers its model
from experiments import command_line
from gpdiff_jax.run.run import Run
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from tests.runs import tiny_settings


def work(folder: pathlib.Path, cities: pathlib.Path, methods: tuple[str, ...] = ("default",)) -> None:
    """Makes the run and ends the process."""

    def main(argv: list[str]) -> None:
        del argv
        enable_compilation_cache()
        with Run.open(folder, tiny_settings(cities, methods=methods or ("default",))) as run:
            run.evaluate()

    sys.argv = sys.argv[:1]
    command_line.run(main)


if __name__ == "__main__":
    work(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), tuple(sys.argv[3:]))
