"""Makes the results that the README's tables show, one run after another, and the tables of what there is.

    python -m benchmarks.tables --data_dir DIR [--seeds 0,1,2] [--minutes 120] [--commit] [--sources four,all]

Every run is `experiments.transfer` with the methods of its default table: six targets from the same few sources, from
all cities that fit, and two targets with other covariates. One run keeps one core busy, so as many run side by side as
there are cores. The numbers of a run that is finished are copied to --results, and what is there is not made again; a
run that was stopped goes on from its last stage. With --commit, every result is committed. With --readme, the tables
between the two marks of that file are made of all results; with --minutes 0 they are all that is made. All null
hypotheses, with a folder of their own:

    python -m benchmarks.tables --methods all --targets hangzhou_metro,nyc_bike_2014 --covariates calendar,profile \
        --sources four --results benchmarks/results/nulls --out_dir runs/nulls
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags

from benchmarks.measuring import deadline, print_line
from benchmarks.table_cases import SOURCES, TARGETS, Case, cases_of, readme_tables, write_tables
from experiments import command_line
from gpdiff_jax.data.series import COVARIATES
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically, write_json

flags.DEFINE_string("data_dir", os.environ.get("GPDIFF_DATA"), "folder of city files; default GPDIFF_DATA")
flags.DEFINE_string("out_dir", "runs/tables", "folder of the runs")
flags.DEFINE_string("results", "benchmarks/results/transfer", "folder of the results, one per run")
flags.DEFINE_list("seeds", ["0", "1", "2"], "random seeds")
flags.DEFINE_list("sources", list(SOURCES), "the sources: four, the same few for comparison, or all that fit")
flags.DEFINE_list("covariates", list(reversed(COVARIATES)), "the covariates")
flags.DEFINE_string("preset", "small", "sizes of the runs")
flags.DEFINE_list("methods", ["default"], "the methods of every run; with others than default, name other --results")
flags.DEFINE_integer("jobs", None, "runs side by side; default one per core", 1)
flags.DEFINE_float("minutes", None, "when to stop, with what is finished kept; no limit if not given", 0)
flags.DEFINE_bool("commit", False, "commit every result")
flags.DEFINE_string("readme", None, "the file whose tables to make anew")

flags.DEFINE_list("targets", list(TARGETS), "the targets")

_COMMITTING = threading.Lock()


def run_case(case: Case, core: int | None, end: float, stop: threading.Event) -> bool:
    """Makes or continues one run, and keeps its numbers.

    Args:
      case: the run.
      core: the processor core to keep to; None for all.
      end: of `time.monotonic`, when the run is stopped; it goes on from there another time.
      stop: set to stop it at once.

    Returns:
      Whether it was finished.
    """
    given = flags.FLAGS
    folder = pathlib.Path(given.out_dir).absolute() / case.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = {
        "data_dir": given.data_dir,
        "sources": ",".join(case.cities),
        "target": case.target,
        "interval_minutes": case.interval_minutes,
        "covariates": case.covariates,
        "seed": case.seed,
        "preset": given.preset,
        "methods": ",".join(given.methods),
        "out_dir": folder,
    }
    command = [sys.executable, "-m", "experiments.transfer", *(f"--{name}={value}" for name, value in words.items())]
    if core is not None:
        command = ["taskset", "--cpu-list", str(core), *command]
    begin = time.monotonic()
    with open(folder.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while (code := process.poll()) is None:
            if time.monotonic() > end or stop.wait(1.0):
                process.terminate()
                process.wait()
                return False
    if code:
        last = folder.with_suffix(".log").read_text().splitlines()[-1:]
        raise InputError(f"the run {case.name!r} ended with exit code {code}: {''.join(last)}")
    seconds = time.monotonic() - begin
    _keep(case, folder)
    print_line("tables", case.name, "time", seconds, "s")
    return True


def _keep(case: Case, folder: pathlib.Path) -> None:
    """Copies what a run says in numbers to the folder of results."""
    kept = pathlib.Path(flags.FLAGS.results) / case.name
    kept.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["execution"]["data_dir"] = "data"  # where the files lay is nobody's business
    write_json(kept / "config.json", config)
    for name in ("seconds.json", "metrics.json"):  # the last says that all are there
        write_atomically(kept / name, (folder / name).read_bytes())
    if flags.FLAGS.commit:
        with _COMMITTING:
            subprocess.run(["git", "add", str(kept)], check=True)
            words = ["git", "commit", "-q", "-m", f"Results: {case.name}", "--", str(kept)]
            subprocess.run(words, check=True)


def _run_all(cases: Sequence[Case]) -> None:
    """Makes runs side by side, each on a core of its own, until all are made or the time is over."""
    given, begin = flags.FLAGS, time.monotonic()
    end = deadline(given.minutes)
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(given.jobs or len(cores), len(cores))
    waiting, stop, made = list(reversed(cases)), threading.Event(), []

    def work(core: int | None) -> None:
        try:
            while waiting and not stop.is_set() and time.monotonic() < end:
                case = waiting.pop()
                if not run_case(case, core, end, stop):
                    return
                made.append(case.name)
        except BaseException:
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(work, core if jobs > 1 else None) for core in cores[:jobs]]:
                done.result()
        finally:
            stop.set()  # also where this process is to end: what it started ends with it
    print_line("tables", f"{len(made)}_of_{len(cases)}_runs", "time", time.monotonic() - begin, "s")


def main(argv: list[str]) -> None:
    """Makes what the folder of results lacks, and the tables."""
    del argv
    given = flags.FLAGS
    if given.data_dir is None:
        raise InputError("neither --data_dir nor GPDIFF_DATA names the folder of the city files")
    try:
        seeds = [int(word) for word in given.seeds]
    except ValueError as error:
        raise InputError(f"--seeds (={','.join(given.seeds)}) must be whole numbers, as 0,1") from error
    cases = cases_of(seeds, given.targets, given.sources, given.covariates)
    results = pathlib.Path(given.results)
    _run_all([case for case in cases if not (results / case.name / "metrics.json").exists()])
    if given.readme:
        write_tables(pathlib.Path(given.readme), readme_tables(results))


if __name__ == "__main__":
    command_line.run(main)
