"""In: the lines that `benchmarks.scaling` printed. Out: a cost model fitted to small cases, what it says of large ones
and how far off it is; the tables and figures of the document.

The model is linear in what is counted, with no part below zero. It is fitted by least squares of relative errors to the
small cases alone, so that what it says of the others is a prediction.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.table_cases import write_tables
from gpdiff_jax.errors import InputError

STAGES = ("sources", "prompts", "pooled", "harvest", "pretrain", "generate")
METRICS = {"time": "s", "memory": "GiB"}
_HOURS = 24
_MOST_OF_A_CITY, _MOST_OF_A_ZOO = 1000, 2048  # regions of a simulated city, and of which directions are made

Line = Mapping[str, Any]


def _pairs(line: Line) -> float:
    """Pairs of regions that a stage looks at: of the zoo for its principal directions, else of every city in turn.

    Memory is that of one city's pairs: the next city takes their place.
    """
    if line["stage"] == "pretrain":
        return float(min(line["regions"], _MOST_OF_A_ZOO)) ** 2
    of_a_city = float(min(line["regions"] // 2, _MOST_OF_A_CITY))
    return of_a_city**2 if line["metric"] == "memory" else line["regions"] * of_a_city


class Growth(NamedTuple):
    """What grows, what a stage is thought to cost by it, and which cases say how much."""

    kinds: tuple[str, ...]  # how the names of its cases begin
    parts: tuple[str, ...]
    count: Callable[[Line], tuple[float, ...]]  # how much of every part there is
    fitted: tuple[str, ...]  # cases


CITIES = Growth(
    ("regions", "days"),
    ("fixed", "per region", "per reading of a region", "per pair of regions"),
    lambda line: (1.0, line["regions"], line["regions"] * line["days"] * _HOURS, _pairs(line)),
    (*(f"regions_{count}" for count in (250, 500, 1000, 2000, 4000, 8000)), "days_28", "days_56", "days_112"),
)
TOKENS = Growth(
    ("width",),
    ("fixed", "per token", "per pair of tokens"),
    lambda line: (1.0, line["tokens"], line["tokens"] ** 2),
    ("width_4096", "width_2048", "width_1024", "width_512", "width_256"),
)


class Model(NamedTuple):
    """The costs of one stage."""

    growth: Growth
    costs: tuple[float, ...]  # of every part

    def predict(self, line: Line) -> float:
        """What a case costs."""
        return float(np.dot(self.costs, self.growth.count(line)))


def fit(growth: Growth, lines: Sequence[Line]) -> Model:
    """Fits a stage's model.

    Args:
      growth: what grows.
      lines: of one stage and metric.

    Raises:
      InputError: fewer of the small cases than parts.
    """
    known = [line for line in lines if line["case"] in growth.fitted]
    if len(known) < len(growth.parts):
        raise InputError(
            f"{len(known)} cases of {', '.join(growth.fitted)} are too few to fit {len(growth.parts)} parts"
        )
    values = np.array([line["value"] for line in known])
    parts = np.array([growth.count(line) for line in known]) / values[:, None]
    best, costs = np.inf, np.zeros(len(growth.parts))
    # Of all choices of parts the best whose solution has none below zero; where the cases cannot tell two parts apart,
    # the first of them.
    for reverse in itertools.product((False, True), repeat=len(growth.parts)):
        chosen = reverse[::-1]
        own = parts[:, chosen]
        if np.linalg.matrix_rank(own / np.maximum(np.abs(own).max(axis=0), 1e-300)) < own.shape[1]:
            continue
        solution = np.linalg.lstsq(own, np.ones(len(known)), rcond=None)[0]
        error = float(np.square(own @ solution - 1).sum())
        if (solution >= 0).all() and error < best * (1 - 1e-6):
            best, costs = error, np.zeros(len(growth.parts))
            costs[list(chosen)] = solution
    return Model(growth, tuple(costs.tolist()))


def select(lines: Sequence[Line], growth: Growth, stage: str, metric: str) -> list[Line]:
    """The lines of a stage and metric in the cases of a growth."""
    return [
        line for line in lines if line["stage"] == stage and line["metric"] == metric and _kind(line) in growth.kinds
    ]


def _kind(line: Line) -> str:
    """How the name of its case begins."""
    return line["case"].partition("_")[0]


def write_report(lines: Sequence[Line], path: pathlib.Path) -> None:
    """Draws the figures beside a document and puts its tables between its marks, of what was measured.

    Args:
      lines: of all cases; one that did not end is marked, and compared with no other number of devices.
      path: the document.

    Raises:
      InputError: the document has no marks, or the small cases are too few.
    """
    growths = [growth for growth in (CITIES, TOKENS) if any(_kind(line) in growth.kinds for line in lines)]
    tables = [make(lines, growth) for growth in growths for make in (_model_table, _growth_table)]
    _draw_growth(lines, growths, path.with_name("scaling_growth.svg"))
    spread = [case for case in SPREAD_CASES if 1 in _spread(lines, *case)]
    if spread:
        tables.append(_spread_table(lines, spread))
        _draw_spread(lines, spread, path.with_name("scaling_devices.svg"))
    write_tables(path, "\n" + "\n\n".join("\n".join(table) for table in tables) + "\n")


def _models(lines: Sequence[Line], growth: Growth, metric: str) -> dict[str, tuple[Model, list[Line]]]:
    """By stage, its model and what was measured."""
    found = {stage: select(lines, growth, stage, metric) for stage in STAGES}
    return {stage: (fit(growth, own), own) for stage, own in found.items() if own}


def _model_table(lines: Sequence[Line], growth: Growth) -> list[str]:
    heads = [f"{_SCALES[metric][part][1]}, {name}" for metric in METRICS for part, name in enumerate(growth.parts)]
    table = [f"| stage | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    models = {metric: _models(lines, growth, metric) for metric in METRICS}
    for stage in models["time"]:
        cells = [
            f"{cost * _SCALES[metric][part][0]:.2g}"
            for metric in METRICS
            for part, cost in enumerate(models[metric][stage][0].costs)
        ]
        table.append(f"| {stage} | {' | '.join(cells)} |")
    return table


_SCALES = {
    "time": ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e6, "us")),
    "memory": ((1.0, "GiB"), (2.0**20, "KiB"), (2.0**30, "bytes"), (2.0**30, "bytes")),
}


def _growth_table(lines: Sequence[Line], growth: Growth) -> list[str]:
    """Every case that the model was not fitted to: what was measured, and how far the prediction is off."""
    models = {metric: _models(lines, growth, metric) for metric in METRICS}
    stages = list(models["time"])
    cases = {line["case"]: line for _, own in models["time"].values() for line in own}
    heads = [f"{stage}, {unit}" for unit in METRICS.values() for stage in stages]
    table = [f"| case | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for case, first in cases.items():
        if case in growth.fitted:
            continue
        cells = []
        for metric in METRICS:
            for model, own in models[metric].values():
                measured = next((line for line in own if line["case"] == case), None)
                cells.append("" if measured is None else _compared(measured["value"], model.predict(measured)))
        name = f"{first['tokens']} tokens" if "tokens" in first else case.replace("_", " ")
        name += ", unfinished" if "unfinished" in first else ""
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def _compared(measured: float, predicted: float) -> str:
    return f"{measured:.3g} ({round(100 * (predicted / measured - 1)):+d} %)"


def _spread_table(lines: Sequence[Line], cases: Sequence[tuple[str, str]]) -> list[str]:
    """Work per second on several devices and hosts, against one."""
    table = ["| work | spread over | " + " | ".join(f"{stage}, s" for stage in SPREAD) + " |", "|---|---|---|---|---|"]
    for kind, part in cases:
        measured = _spread(lines, kind, part)
        for count, seconds in measured.items():
            one = measured[1]
            cells = [f"{seconds[stage]:.1f} ({_gain(one[stage], seconds[stage], count, part):.2f})" for stage in SPREAD]
            table.append(f"| {part} | {count} {kind if count > 1 else kind[:-1]} | " + " | ".join(cells) + " |")
    return table


SPREAD = ("harvest", "pretrain", "generate")
"""The stages that are spread over devices and hosts."""
SPREAD_CASES = (("devices", "strong"), ("devices", "weak"), ("hosts", "strong"), ("hosts", "weak"))


def _gain(one: float, several: float, count: int, part: str) -> float:
    """Work per second as a multiple of that of one."""
    return one / several * (count if part == "weak" else 1)


def _spread(lines: Sequence[Line], kind: str, part: str) -> dict[int, dict[str, float]]:
    """Seconds by number, the least first, and stage."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        words = line["case"].split("_")
        finished = line["metric"] == "time" and "unfinished" not in line
        if finished and words[0] == kind and words[2:] == [part]:
            found.setdefault(int(words[1]), {})[line["stage"]] = line["value"]
    return dict(sorted(found.items()))


def _draw_growth(lines: Sequence[Line], growths: Sequence[Growth], path: pathlib.Path) -> None:
    columns = [(growth, kind) for growth in growths for kind in growth.kinds]
    figure = Figure(figsize=(3.7 * len(columns), 6.4), layout="constrained")
    axes = figure.subplots(len(METRICS), len(columns), squeeze=False)
    for row, (metric, unit) in enumerate(METRICS.items()):
        for own_axes, (growth, kind) in zip(axes[row], columns, strict=True):
            label = "tokens" if growth is TOKENS else kind
            for stage, (model, measured) in _models(lines, growth, metric).items():
                own = sorted((line for line in measured if line["case"].startswith(kind)), key=lambda line: line[label])
                if own:
                    sizes, color = [line[label] for line in own], f"C{STAGES.index(stage)}"
                    own_axes.loglog(sizes, [line["value"] for line in own], "o", color=color, label=stage)
                    own_axes.loglog(sizes, [model.predict(line) for line in own], ":", color=color)
            own_axes.set(xlabel=label, ylabel=unit)
    axes[0, 0].legend()
    figure.suptitle("Points are measured, lines are the model")
    figure.savefig(path, metadata={"Date": None})


def _draw_spread(lines: Sequence[Line], cases: Sequence[tuple[str, str]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    every = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, (kind, part) in zip(every, cases, strict=True):
        measured = _spread(lines, kind, part)
        for stage in SPREAD:
            gains = [_gain(measured[1][stage], seconds[stage], count, part) for count, seconds in measured.items()]
            axes.plot(list(measured), gains, "o-", label=stage)
        axes.plot(list(measured), [min(count, 2) for count in measured], "k:", label="two cores' worth")
        axes.set(title=f"{kind}, {part}", xlabel=kind, ylim=(0, None))
    figure.axes[0].set_ylabel("work per second, of one")
    figure.axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
