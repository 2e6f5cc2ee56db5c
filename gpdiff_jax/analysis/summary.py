"""In: the metrics.json and config.json of several run folders.
Out: means and standard deviations over the seeds of each group of comparable runs, as rows and as tables.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, user_path

METRICS = (
    "mae_mean",
    "rmse_mean",
    "mae_weekday",
    "mae_weekend",
    "rmse_weekday",
    "rmse_weekend",
    "validation_mae",
    "learning_rate",
    "steps",
    "seconds",
    "training_seconds",
)
"""What a method's entry in metrics.json holds one number of."""

FORMATS = ("text", "markdown", "json")

_NOT_COMPARED = ("seed",)
_TITLE_KEYS = ("target", "channel", "unit", "covariates", "support_days", "horizon_minutes", "sources", "protocol")


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One metric of one method over the runs of a group."""

    mean: float | None  # None: no run has it
    std: float | None  # sample standard deviation (ddof = 1); None with fewer than two runs
    runs: int


@dataclasses.dataclass(frozen=True)
class GroupSummary:
    """What the runs of one group, equal in all but the seed, say of every method."""

    settings: dict[str, Any]
    seeds: tuple[int, ...]
    methods: dict[str, dict[str, Statistic]]  # method -> metric -> statistic, the best method first


def read_metrics(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metrics.json of a run folder.

    Args:
      run_dir: an output folder of `transfer`.

    Returns:
      Its content; `target`, `seed` and `methods` are there and of the right type.

    Raises:
      InputError: no such folder, no such file, no JSON, or not what `transfer` writes.
    """
    run_dir = user_path(run_dir)
    path = run_dir / "metrics.json"
    if not run_dir.is_dir():
        raise InputError(f"run folder {str(run_dir)!r} does not exist; give output folders of experiments.transfer")
    if not path.is_file():
        raise InputError(f"run folder {str(run_dir)!r} has no metrics.json; finish it with experiments.transfer first")
    content = _read_json(path)
    seed = content.get("seed")
    if not isinstance(content.get("target"), str) or not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"{path} must name its `target` (a word) and `seed` (a whole number); run transfer again")
    _check_methods(content.get("methods"), path)
    channels = content.get("channels") or {}
    if not isinstance(channels, dict) or not all(isinstance(channel, dict) for channel in channels.values()):
        raise InputError(f"{path}: `channels` must map every channel to its results; run transfer again")
    for channel in channels.values():
        _check_methods(channel.get("methods"), path)
    return content


def summarize_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> list[GroupSummary]:
    """Reads run folders, groups the comparable ones and summarises each group over its seeds.

    Runs are comparable if they agree in target, sources, covariates, support days, interval, horizon, protocol, model
    and preset. The channels of a run with several are groups of their own.

    Args:
      run_dirs: output folders of `transfer`.

    Returns:
      The groups, in the order of their settings; their methods in the order of their mean MAE.

    Raises:
      InputError: a folder cannot be read, or two runs of one group have the same seed.
    """
    if not run_dirs:
        raise InputError("no run folder to summarise; give at least one")
    groups: dict[str, tuple[dict[str, Any], dict[int, Any], list[Mapping[str, Any]]]] = {}
    for run_dir in run_dirs:
        content = read_metrics(run_dir)
        parts = {"": content, **(content.get("channels") or {})}
        for channel, part in parts.items():
            settings = _settings(content, pathlib.Path(run_dir), channel, part.get("unit", content.get("unit")))
            key = json.dumps(settings, sort_keys=True)
            _, seeds, entries = groups.setdefault(key, (settings, {}, []))
            seed = content["seed"]
            if seed in seeds:
                raise InputError(
                    f"run folders {str(seeds[seed])!r} and {str(run_dir)!r} have the same settings and the same seed"
                    f" (={seed}); give one of them"
                )
            seeds[seed] = run_dir
            entries.append(part["methods"])
    return [
        GroupSummary(settings, tuple(sorted(seeds)), summarize_methods(entries))
        for _, (settings, seeds, entries) in sorted(groups.items())
    ]


def summarize_methods(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Statistic]]:
    """Summarises the `methods` of several metrics.json.

    Args:
      runs: method -> metric -> number or None, per run.

    Returns:
      method -> metric -> statistic over the runs that have the number, in the order of mean `mae_mean`.
    """
    names = list(dict.fromkeys(name for run in runs for name in run))
    table = {
        name: {metric: _statistic([run[name].get(metric) for run in runs if name in run]) for metric in METRICS}
        for name in names
    }

    def order(name: str) -> tuple[float, str]:
        mean = table[name]["mae_mean"].mean
        return (math.inf if mean is None else mean, name)

    return {name: table[name] for name in sorted(table, key=order)}


def format_groups(groups: Sequence[GroupSummary], *, style: str, metrics: Sequence[str]) -> str:
    """Writes groups as tables.

    Args:
      groups: what `summarize_runs` returns.
      style: one of `FORMATS`.
      metrics: the columns, among `METRICS`.

    Returns:
      Text without a newline at its end. A cell is the mean and the standard deviation over the runs ("-" with one).

    Raises:
      InputError: an unknown style or metric.
    """
    if style not in FORMATS:
        raise InputError(f"`style` (={style!r}) must be one of {', '.join(FORMATS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"`metric` (={metric!r}) must be among {', '.join(METRICS)}")
    if style == "json":
        return json.dumps([_as_json(group, metrics) for group in groups], indent=2, allow_nan=False)
    return "\n\n".join(_table(group, metrics, markdown=style == "markdown") for group in groups)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; run transfer again to write it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}; run transfer again")
    return content


def _check_methods(methods: Any, path: pathlib.Path) -> None:
    if not isinstance(methods, dict) or not methods or not all(isinstance(entry, dict) for entry in methods.values()):
        raise InputError(f"{path}: `methods` must map every method to its results; run transfer again")
    for name, entry in methods.items():
        for metric in METRICS:
            if not isinstance(entry.get(metric), (int, float, type(None))):
                raise InputError(f"{path}: {metric} of {name} (={entry[metric]!r}) must be a number or null")


def _settings(content: Mapping[str, Any], run_dir: pathlib.Path, channel: str, unit: Any) -> dict[str, Any]:
    """What makes runs comparable. The folder's config.json may be gone: what it alone knows is then left out."""
    config_path = run_dir / "config.json"
    config = _read_json(config_path) if config_path.is_file() else {}
    settings = config.get("settings", config.get("flags"))
    chosen = dict(settings) if isinstance(settings, dict) else {}
    if chosen.get("simulation") is None:
        # Cities that are simulated are others for every seed.
        chosen["cities"] = config.get("cities")
    return {
        "target": content["target"],
        "channel": channel,
        "unit": unit,
        "covariates": content.get("covariates"),
        "support_days": content.get("support_days"),
        "horizon_minutes": content.get("horizon_minutes"),
        "protocol": content.get("protocol"),
        "sources": sorted(map(str, content.get("sources") or [])),
        **{name: chosen[name] for name in sorted(chosen.keys() - set(_NOT_COMPARED)) if name not in _TITLE_KEYS},
    }


def _statistic(values: Sequence[Any]) -> Statistic:
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return Statistic(None, None, 0)
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Statistic(float(np.mean(numbers)), std, len(numbers))


def _as_json(group: GroupSummary, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "settings": group.settings,
        "seeds": list(group.seeds),
        "methods": {
            name: {metric: dataclasses.asdict(entry[metric]) for metric in metrics}
            for name, entry in group.methods.items()
        },
    }


def _table(group: GroupSummary, metrics: Sequence[str], *, markdown: bool) -> str:
    # A method that some seeds lack says so: its mean is over fewer runs than its neighbours'.
    rows = [["method", *metrics, "runs"]]
    for name, entry in group.methods.items():
        rows.append([name, *(_cell(entry[metric]) for metric in metrics), str(entry["mae_mean"].runs)])
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|")
        return f"**{_title(group)}**\n\n" + "\n".join(lines)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return _title(group) + "\n\n" + "\n".join(lines)


def _title(group: GroupSummary) -> str:
    words = []
    for name in (*_TITLE_KEYS, "interval_minutes", "model"):
        value = group.settings.get(name)
        if value not in (None, "", []):
            words.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join([*words, f"seeds {', '.join(map(str, group.seeds))}"])


def _cell(statistic: Statistic) -> str:
    if statistic.mean is None:
        return "-"
    return f"{_number(statistic.mean)} ± {'-' if statistic.std is None else _number(statistic.std)}"


def _number(value: float) -> str:
    """Four significant digits, without an exponent where a plain number is as short."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 6)}f}"
    return f"{value:.3e}"
