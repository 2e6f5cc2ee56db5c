"""How time and memory of every stage grow: with regions, length of series, tokens, devices and hosts.

    python -m benchmarks.scaling --results benchmarks/results/scaling.jsonl [--cases regions_500,devices_2_weak]
    python -m benchmarks.scaling --results benchmarks/results/scaling.jsonl --report docs/scaling.md

Every case is a process of its own, of which --results gets one JSON line a stage when it ends; a case that is there is
not measured again, so the command goes on where it was stopped. Of a case that fails or takes too long, the stages that
it ended are kept, marked `unfinished`, and it is measured again. Seconds are of work, without compiling; memory is the
most that the process held in the stage. --large adds the city of 50,000 regions, which takes two cores most of an hour.

Devices are virtual ones of a CPU, which share its cores, so two cores are what can be gained by; those of `weak` have
equal work each, those of `strong` share the work of one. A host is a process with one device and one core. --report
draws the figures beside the document and puts its tables, made of all results, between its two marks.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from benchmarks.measuring import print_line
from benchmarks.scaling_case import kept, run_case
from benchmarks.scaling_path import Measured, Work, measure_path
from benchmarks.scaling_report import write_report
from experiments import command_line
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically
from gpdiff_jax.hosts import is_first
from gpdiff_jax.training.exchange import connect

flags.DEFINE_string("results", "benchmarks/results/scaling.jsonl", "the file of results, which are added to")
flags.DEFINE_list("cases", None, "cases to measure; all that are not large if not given")
flags.DEFINE_bool("large", False, "also the case of 50,000 regions")
flags.DEFINE_string("report", None, "the document whose tables and figures to make of the results, and nothing else")
flags.DEFINE_float("minutes", 60, "the longest that one case may take", 1)

flags.DEFINE_string("case", None, "the one case that this process measures; set by the benchmark itself")
flags.DEFINE_string("coordinator", None, "address of the first host; set by the benchmark itself")
flags.DEFINE_integer("process_id", 0, "number of this host; set by the benchmark itself")

_SPREAD_STEPS = 128  # so that what is written for every chunk does not count for much
_SPREAD = ("harvest", "pretrain", "generate")
_LARGE = "regions_50000"
_HOSTS = 2


def _cases() -> dict[str, Work]:
    spread = Work(regions=128, batch=32, steps=_SPREAD_STEPS, stages=_SPREAD)
    cases = {f"regions_{count}": Work(regions=count) for count in (250, 500, 1000, 2000, 4000, 8000, 50_000)}
    cases |= {
        f"days_{days}": Work(regions=200, days=days, stages=("sources", "prompts", "pooled", "harvest"))
        for days in (28, 56, 112, 224, 448)
    }
    # Rows of so many entries: of STID's 36,638 weights 18 to 290 tokens, each a layer's alone.
    cases |= {
        f"width_{width}": Work(regions=100, token_width=width, stages=("pretrain",))
        for width in (4096, 2048, 1024, 512, 256, 128)
    }
    for count in (1, 2, 4, 8):
        cases[f"devices_{count}_strong"] = spread
        cases[f"devices_{count}_weak"] = spread._replace(regions=128 * count, batch=32 * count)
    for count in (1, _HOSTS):
        cases[f"hosts_{count}_strong"] = spread
        cases[f"hosts_{count}_weak"] = spread._replace(regions=128 * count, batch=32 * count)
    return cases


def main(argv: list[str]) -> None:
    """Measures what is not yet measured, or makes the report."""
    del argv
    given, cases = flags.FLAGS, _cases()
    if given.case is not None:
        _measure(given.case, cases[given.case])
        return
    results = pathlib.Path(given.results)
    held = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if given.report is not None:
        write_report(held, pathlib.Path(given.report))
        return
    names = given.cases or [name for name in cases if name != _LARGE or given.large]
    for name in names:
        if name not in cases:
            raise InputError(f"--cases names {name!r}, which is none; name some of {', '.join(cases)}")
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        if any(line["case"] == name and "unfinished" not in line for line in held):
            continue
        said, error = run_case(name, 60 * given.minutes)
        held = kept(held, name, said, error)
        write_atomically(results, "".join(f"{json.dumps(line)}\n" for line in held).encode())
        if error is not None:
            raise InputError(error)
        print(f"{name}: done", file=sys.stderr)


def _measure(name: str, work: Work) -> None:
    kind, _, rest = name.partition("_")
    if kind == "devices":
        jax.config.update("jax_num_cpu_devices", int(rest.partition("_")[0]))
    if flags.FLAGS.coordinator is not None:
        connect(flags.FLAGS.coordinator, _HOSTS, flags.FLAGS.process_id)

    def tell(made: Measured) -> None:
        if is_first():
            facts = {"stage": made.stage, "count": made.count, "of": made.unit}
            sizes = {"regions": work.regions, "days": work.days}
            if made.tokens is not None:
                sizes["tokens"] = made.tokens
            print_line("scaling", name, "time", made.seconds, "s", **facts, **sizes)
            print_line("scaling", name, "memory", made.memory, "GiB", **facts, **sizes)

    measure_path(work, tell)


if __name__ == "__main__":
    command_line.run(main)
