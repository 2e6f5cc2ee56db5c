"""In: an output folder of `transfer`.
Out: its files as one value, with the reason beside every part that is absent or broken.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.analysis.metrics import REGION_COLUMNS
from gpdiff_jax.analysis.summary import read_metrics
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE, read_json, read_npz, user_path
from gpdiff_jax.training.progress import read_log


@dataclasses.dataclass(frozen=True, eq=False)
class Forecasts:
    """The test forecasts of the GPDiff methods."""

    window_start: tuple[str, ...]  # S ISO times of the first forecast step, or "step N"
    node_ids: tuple[str, ...]  # R
    truth: Float[np.ndarray, "S R P"]  # NaN = missing
    means: dict[str, np.ndarray]  # method -> float32 [S, R, P]
    spreads: dict[str, np.ndarray]  # method -> float32 [S, R, P], where there is one


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """Where the regions lie, and where their parameters do."""

    coordinates: Float[np.ndarray, "R 2"] | None  # longitude and latitude in degrees
    edges: Int[np.ndarray, "edges 2"]
    zoo_projection: Float[np.ndarray, "M 2"]
    zoo_city: tuple[str, ...]  # M
    generated_projection: Float[np.ndarray, "G 2"]
    pooled_projection: Float[np.ndarray, "X 2"]  # one row, or none
    projection_variance: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """One finished run."""

    metrics: dict[str, Any]
    config: dict[str, Any] | None
    regions: list[dict[str, Any]] | None  # the rows of regions.csv, numbers as floats, None for an empty cell
    forecasts: Forecasts | None
    atlas: Atlas | None
    log: list[dict[str, Any]] | None
    problems: dict[str, str]  # file -> why its part is None


def read_results(run_dir: str | os.PathLike[str]) -> Results:
    """Reads a run folder; only metrics.json must be there.

    Args:
      run_dir: an output folder of `transfer`.

    Returns:
      What the folder holds. A file that is absent or does not hold what it should leaves None and a problem.

    Raises:
      InputError: metrics.json is absent or broken.
    """
    run_dir = user_path(run_dir)
    metrics = read_metrics(run_dir)
    parts: dict[str, Any] = {}
    problems = {}
    for name, read in (
        ("config.json", _read_config),
        ("regions.csv", _read_regions),
        ("forecasts.npz", _read_forecasts),
        ("report.npz", _read_atlas),
        ("log.jsonl", read_log),
    ):
        parts[name] = None
        try:
            parts[name] = read(run_dir / name)
        except FileNotFoundError:
            problems[name] = f"{name} is not in the run folder"
        except KeyError as error:
            problems[name] = f"{name} lacks {error}"
        except (OSError, csv.Error, *DAMAGE) as error:
            problems[name] = f"{name} cannot be read ({type(error).__name__}: {error})"
    return Results(metrics, *parts.values(), problems=problems)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError("it holds no JSON object")
    return content


def _read_regions(path: pathlib.Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    absent = [column for column in REGION_COLUMNS if column not in (reader.fieldnames or ())]
    if absent:
        raise InputError(f"no column {absent[0]!r}")
    words = {"region", "channel", "method", "note"}
    return [
        {
            column: (row[column] or "") if column in words else float(row[column]) if row[column] else None
            for column in REGION_COLUMNS
        }
        for row in rows
    ]


def _numbers(arrays: Mapping[str, np.ndarray], name: str, axes: int) -> np.ndarray:
    """An array of numbers with so many axes."""
    held = arrays[name]
    if held.dtype.kind not in "fiu" or held.ndim != axes:
        raise InputError(f"{name} is of {held.dtype} and shape {held.shape}, not of numbers with {axes} axes")
    return held


# What forecasts.npz holds beside forecasts.
_ABOUT = ("truth", "window_start", "node_ids", "protocol", "unit", "horizon_minutes")


def _read_forecasts(path: pathlib.Path) -> Forecasts:
    arrays = read_npz(path)
    truth = arrays["truth"]
    starts, nodes = arrays["window_start"], arrays["node_ids"]
    if truth.ndim != 3 or starts.shape != truth.shape[:1] or nodes.shape != truth.shape[1:2]:
        raise InputError(f"truth {truth.shape}, window_start {starts.shape} and node_ids {nodes.shape} do not fit")
    methods = [name for name in arrays if name not in _ABOUT]
    for name in ("truth", *methods):
        if _numbers(arrays, name, 3).shape != truth.shape:
            raise InputError(f"{name} {arrays[name].shape} and truth {truth.shape} do not fit")
    means = {name: arrays[name] for name in methods if not name.endswith("_std")}
    return Forecasts(
        window_start=tuple(map(str, starts)),
        node_ids=tuple(map(str, nodes)),
        truth=truth,
        means=means,
        spreads={name: arrays[f"{name}_std"] for name in means if f"{name}_std" in arrays},
    )


def _read_atlas(path: pathlib.Path) -> Atlas:
    arrays = read_npz(path)
    coordinates = None
    if "latitude" in arrays and "longitude" in arrays:
        places = [_numbers(arrays, name, 1).astype(np.float64) for name in ("longitude", "latitude")]
        coordinates = np.stack(places, axis=1)
    edges = np.stack([_numbers(arrays, name, 1) for name in ("senders", "receivers")], axis=1)
    if edges.dtype.kind not in "iu" or (edges.size and edges.min() < 0):
        raise InputError("senders and receivers must be numbers of regions")
    if coordinates is not None and edges.size and edges.max() >= len(coordinates):
        raise InputError(f"an edge is of region {edges.max()}, and there are {len(coordinates)}")
    zoo, city = arrays["zoo_projection"], arrays["zoo_city"]
    for name in ("zoo_projection", "generated_projection", "pooled_projection"):
        if _numbers(arrays, name, 2).shape[1] != 2:
            raise InputError(f"{name} {arrays[name].shape} must be [any, 2]")
    if city.shape != (len(zoo),):
        raise InputError(f"zoo_projection {zoo.shape} and zoo_city {city.shape} do not fit")
    variance = _numbers(arrays, "projection_variance", 1).astype(np.float64)
    if variance.shape != (2,):
        raise InputError(f"projection_variance {variance.shape} must be [2]")
    return Atlas(
        coordinates=coordinates,
        edges=edges,
        zoo_projection=zoo,
        zoo_city=tuple(map(str, city)),
        generated_projection=arrays["generated_projection"],
        pooled_projection=arrays["pooled_projection"],
        projection_variance=(float(variance[0]), float(variance[1])),
    )
