"""In: the regions.csv of comparable runs. Out: one method against every other, region by region.

Regions of a city share its days, so that they are no independent draws: a small p says that a difference runs through
the city's regions, not that it would come again in another city.
"""

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from gpdiff_jax.analysis.summary import read_metrics, summarize_runs
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path

_OF_CHANNEL = ("channel", "unit")


@dataclasses.dataclass(frozen=True)
class Paired:
    """A reference method against another one, over the regions of a channel that both have an error in."""

    method: str
    channel: str
    difference: float  # of the reference's mean error from the other's, as a part of the other's; negative is better
    better: float  # share of the regions in which the reference errs less
    p: float | None  # two-sided, Wilcoxon's signed ranks; None where no region differs
    regions: int


def paired_differences(run_dirs: Sequence[str | os.PathLike[str]], reference: str) -> list[Paired]:
    """Compares a method with every other, region by region; a region's error is its mean over the runs.

    Wilcoxon, "Individual Comparisons by Ranking Methods", Biometrics Bulletin 1, 1945.

    Args:
      run_dirs: output folders of `transfer` of one target and one setting, one per seed.
      reference: the method.

    Returns:
      One value per channel and other method that every run holds, the nearest rival first.

    Raises:
      InputError: a folder cannot be read or holds no such method, or the runs differ in more than the seed, or are
        several of simulated cities, which are others for every seed.
    """
    if not run_dirs:
        raise InputError("no run folder to compare; give at least one")
    groups = summarize_runs(run_dirs)
    settings = [{name: one for name, one in group.settings.items() if name not in _OF_CHANNEL} for group in groups]
    if any(one != settings[0] for one in settings):
        raise InputError(
            "the runs differ in more than the seed; compare region by region runs of one target and setting"
        )
    if len(run_dirs) > 1 and settings[0].get("simulation") is not None:
        raise InputError(
            "the runs simulate other cities for every seed, whose regions are not the same; give one of them"
        )
    tables = [_errors(user_path(run_dir)) for run_dir in run_dirs]
    for run_dir, table in zip(run_dirs, tables, strict=True):
        if reference not in table:
            held = ", ".join(sorted(table)) or "none"
            raise InputError(f"run folder {str(run_dir)!r} has no method {reference!r}; it has {held}")
        if set(table[reference]) != set(tables[0][reference]):
            raise InputError(f"run folders {str(run_dirs[0])!r} and {str(run_dir)!r} hold other regions")
    common = [name for name in tables[0] if all(name in table for table in tables)]
    found = []
    for channel in sorted({of for _, of in tables[0][reference]}):
        regions = sorted(key for key in tables[0][reference] if key[1] == channel)
        means = {
            name: np.mean([[table[name].get(key, np.nan) for key in regions] for table in tables], axis=0)
            for name in common
        }
        found += [_compare(name, channel, means[reference], means[name]) for name in common if name != reference]
    return sorted(found, key=lambda one: (one.channel, -one.difference))


def _compare(name: str, channel: str, reference: Float[np.ndarray, " R"], other: Float[np.ndarray, " R"]) -> Paired:
    both = np.isfinite(reference) & np.isfinite(other)
    if not both.any():
        return Paired(name, channel, math.nan, 0.0, None, 0)
    reference, other = reference[both], other[both]
    differs = bool((reference != other).any())
    test: Any = scipy.stats.wilcoxon(reference, other) if differs else None
    total = float(other.mean())
    difference = float(reference.mean()) / total - 1.0 if total else math.nan
    return Paired(
        name,
        channel,
        difference,
        float((reference < other).mean()),
        test and float(test.pvalue),
        len(other),
    )


def _errors(run_dir: pathlib.Path) -> dict[str, dict[tuple[str, str], float]]:
    """Method to region and channel to error of a run."""
    read_metrics(run_dir)  # what is no run is refused in the same words everywhere
    path = run_dir / "regions.csv"
    if not path.is_file():
        raise InputError(f"run folder {str(run_dir)!r} has no regions.csv; finish it with experiments.transfer first")
    table: dict[str, dict[tuple[str, str], float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                key, word = (row["region"], row["channel"]), row["mae"]
                table.setdefault(row["method"], {})[key] = float(word) if word else float("nan")
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path} cannot be read ({error}); run transfer again to write it anew") from error
    return table


def average_ranks(run_dirs: Sequence[str | os.PathLike[str]]) -> dict[str, float]:
    """The place of every method among all, 1 the best by `mae_mean`, averaged over runs of any targets and seeds.

    Args:
      run_dirs: output folders of `transfer`.

    Returns:
      Mean ranks of the methods that every run holds, the best first; ties share their mean rank.

    Raises:
      InputError: a folder cannot be read, or no method is in all runs.
    """
    if not run_dirs:
        raise InputError("no run folder to rank; give at least one")
    runs = [read_metrics(run_dir)["methods"] for run_dir in run_dirs]
    errors = [{name: entry.get("mae_mean") for name, entry in run.items()} for run in runs]
    common = [name for name in errors[0] if all(run.get(name) is not None for run in errors)]
    if not common:
        raise InputError("no method has an error in all of these runs; give runs of the same methods")
    ranks = np.mean([scipy.stats.rankdata([run[name] for name in common]) for run in errors], axis=0)
    return dict(sorted(zip(common, ranks.tolist(), strict=True), key=lambda item: item[1]))


def paired_table(found: Sequence[Paired], reference: str) -> str:
    """What `paired_differences` found, as plain text."""
    several = len({one.channel for one in found}) > 1
    names = [f"{one.method} ({one.channel})" if several else one.method for one in found]
    width = max(map(len, names), default=0)
    lines = [f"{reference} against, region by region (Wilcoxon's signed ranks; regions of a city are not independent):"]
    for name, one in zip(names, found, strict=True):
        p = "-" if one.p is None else f"{one.p:.2g}"
        lines.append(
            f"  {name:{width}s}  error {100 * one.difference:+6.1f} %  better in {100 * one.better:3.0f} % of "
            f"{one.regions} regions  p {p}"
        )
    return "\n".join(lines)
