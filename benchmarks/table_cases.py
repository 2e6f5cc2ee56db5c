"""In: seeds, targets and choices of sources. Out: the runs that the README's tables are made of, and the tables."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gpdiff_jax.analysis.summary import GroupSummary, Statistic, read_metrics, summarize_runs
from gpdiff_jax.data.series import COVARIATES
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically
from gpdiff_jax.run.settings import METHODS

_HOURLY = ("beijing_metro", "hangzhou_metro", "nyc_bike_2014", "nyc_taxi_zones_2018", "melbourne_pedestrians")
# Counts of people or vehicles by the hour, of other cities or other kinds; stocks and road traffic are left out.
_MORE = (
    *("taipei_metro", "paris_bike_counters", "sf_bike_2014", "auckland_pedestrians", "salvador_bus", "tehran_ride"),
    *("nyc_taxi_grid_2015", "nyc_bike_2016"),
)
# The same service in the same city, in another year.
_TWINS = {"nyc_bike_2014": ("nyc_bike_2016",), "nyc_taxi_zones_2018": ("nyc_taxi_grid_2015",)}
_SPEED = {"shenzhen_speed": ("los_angeles_speed", "hangzhou_link_speed")}
_OTHER_COVARIATES = ("hangzhou_metro", "nyc_bike_2014")
_MARKS = ("<!-- tables -->\n", "<!-- end of tables -->\n")
_BASE = "pooled_few_shot"
TARGETS = (*_HOURLY, *_SPEED)
SOURCES = ("four", "all")  # the same few, or all that fit


class Case(NamedTuple):
    """One run."""

    target: str
    sources: str  # "four" or "all"
    covariates: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.target}-{self.sources}-{self.covariates}-{self.seed}"

    @property
    def interval_minutes(self) -> int:
        """What its cities are brought to."""
        return 15 if self.target in _SPEED else 60

    @property
    def cities(self) -> tuple[str, ...]:
        """Names of its source cities."""
        if self.target in _SPEED:
            return _SPEED[self.target]
        more = [name for name in _MORE if name not in _TWINS.get(self.target, ())] if self.sources == "all" else []
        return (*(name for name in _HOURLY if name != self.target), *more)


def cases_of(
    seeds: Iterable[int], targets: Sequence[str], sources: Sequence[str], covariates: Sequence[str]
) -> list[Case]:
    """The runs that the tables are made of, in the order in which they are made.

    Args:
      seeds: of the runs.
      targets: some of `TARGETS`.
      sources: some of `SOURCES`.
      covariates: some of `COVARIATES`.

    Returns:
      Those runs of the tables that are chosen by all four.

    Raises:
      InputError: a word that is not known, or no run.
    """
    choices = {"targets": (targets, TARGETS), "sources": (sources, SOURCES), "covariates": (covariates, COVARIATES)}
    for name, (words, known) in choices.items():
        if unknown := [word for word in words if word not in known]:
            raise InputError(f"`{name}` names {unknown[0]!r}; use some of {', '.join(known)}")
    names = [name for name in TARGETS if name in targets]
    made = []
    for seed in seeds:
        for which in sources:
            # Two cities are all that there are at 15 minutes.
            made += [Case(name, which, "profile", seed) for name in names if which == "four" or name not in _SPEED]
        made += [Case(name, "four", other, seed) for other in ("calendar", "none") for name in _OTHER_COVARIATES]
    chosen = [
        case for case in made if case.covariates in covariates and case.target in targets and case.sources in sources
    ]
    if not chosen:
        raise InputError("no table has a run of these seeds, targets, sources and covariates; leave one choice out")
    return chosen


def readme_tables(results: pathlib.Path) -> str:
    """Markdown tables of what a folder of results holds.

    Args:
      results: folder of run folders, named as `Case.name` has it.

    Returns:
      For every choice of sources and covariates a table: a row for every method, for every target the mean of the mean
      absolute errors over seeds, with their standard deviation where there are several, and in the last column the mean
      over all runs of the error as a part of the fine-tuned pooled model's.

    Raises:
      InputError: seeds of a target were run with different settings.
    """
    groups: dict[tuple[str, str], dict[str, list[pathlib.Path]]] = {}
    for folder in sorted(results.iterdir()):
        words = folder.name.split("-")
        if len(words) == 4 and (folder / "metrics.json").exists():
            target, sources, covariates, _ = words
            groups.setdefault((sources, covariates), {}).setdefault(target, []).append(folder)
    parts = []
    for (sources, covariates), targets in sorted(groups.items(), key=lambda item: (item[0][1] != "profile", item[0])):
        chosen = [name for name in (*_HOURLY, *_SPEED) if name in targets]
        columns = [_only(summarize_runs(targets[name]), targets[name]) for name in chosen]
        counts = sorted({len(column.seeds) for column in columns})
        seeds = (
            f"{counts[0]} seed{'s' if counts[0] > 1 else ''}"
            if len(counts) == 1
            else f"{counts[0]} to {counts[-1]} seeds"
        )
        few = "the same few sources" if sources == "four" else "all sources that fit"
        parts.append(f"`{covariates}`, {few}, {seeds}:\n")
        units = [f"{name} ({column.settings['unit']})" for name, column in zip(chosen, columns, strict=True)]
        rows = [["", *units, f"over {_BASE.replace('_', ' ')}"], ["---", *["---:"] * (len(units) + 1)]]
        ratios = _over_base([folder for name in chosen for folder in targets[name]])
        for method in METHODS:
            cells = [_cell(column.methods.get(method, {}).get("mae_mean")) for column in columns]
            if any(cells):
                rows.append([method.replace("_", " "), *cells, ratios.get(method, "")])
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


def _over_base(folders: Sequence[pathlib.Path]) -> dict[str, str]:
    """By method, the mean over runs of its error as a part of `_BASE`'s, as far as a run has both."""
    found: dict[str, list[float]] = {}
    for folder in folders:
        methods = read_metrics(folder)["methods"]
        for name, metrics in methods.items() if _BASE in methods else ():
            found.setdefault(name, []).append(metrics["mae_mean"] / methods[_BASE]["mae_mean"])
    return {name: f"{np.mean(parts):.3f}" for name, parts in found.items()}


def _only(groups: Sequence[GroupSummary], folders: Sequence[pathlib.Path]) -> GroupSummary:
    if len(groups) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise InputError(f"the results {names} differ in settings; remove the old ones and make them anew")
    return groups[0]


def _cell(found: Statistic | None) -> str:
    if found is None or found.mean is None:
        return ""
    digits = 1 if found.mean >= 20 else 2
    return f"{found.mean:.{digits}f}" + ("" if found.std is None else f" ± {found.std:.{digits}f}")


def write_tables(path: pathlib.Path, tables: str) -> None:
    """Puts the tables between the marks of a file; raises `InputError` where it has no marks."""
    before, mark, rest = path.read_text().partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if not (mark and end):
        raise InputError(f"{str(path)!r} has no place for the tables; put {_MARKS[0].strip()} and {_MARKS[1].strip()}")
    write_atomically(path, f"{before}{mark}{tables}{end}{after}".encode())
