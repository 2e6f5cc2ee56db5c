"""In: a table of edges, of sites, or a matrix. Out: the weights [N, N] between the regions of a city."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from gpdiff_jax.cities.distances import is_distance_matrix
from gpdiff_jax.errors import InputError, check_at_least
from gpdiff_jax.host_memory import check_unpacked
from gpdiff_jax.ingest.arrays import read_matrix_file
from gpdiff_jax.ingest.table_file import TableFile, column_of, names_in, numbers, read_table

_EARTH_KM = 6371.0088  # mean radius, IUGG
_WEAKEST = 0.1  # weights below it are no edge, as Li et al. (DCRNN, 2018) cut them
_WEIGHTS = ("weight", "link_weight", "cost", "distance")
NEIGHBOURS = 5


class Sites(NamedTuple):
    """Where the regions of a city lie."""

    latitude: Float[np.ndarray, " N"]  # degrees
    longitude: Float[np.ndarray, " N"]
    others: tuple[str, ...] = ()  # sites of the table that are of no region


def read_edges(path: pathlib.Path, ids: tuple[str, ...], *, distances: bool | None = None) -> Float[np.ndarray, "N N"]:
    """Reads a table with the columns `from`, `to` and `weight` (or `cost` or `distance`), or a LibCity `.rel` file.

    Args:
      path: CSV or Parquet.
      ids: the regions; edges of others are left out.
      distances: whether the third column is a distance, of which `gaussian_kernel` makes weights. None refuses columns
        that may be.

    Returns:
      The weights, row = from, column = to.

    Raises:
      InputError: columns or numbers that lack, an edge that is listed twice, none between the regions, or more regions
        than there is memory for weights between all.
    """
    table = read_table(path)
    frame = table.frame.rename(columns={"origin_id": "from", "destination_id": "to"})
    table, columns = table._replace(frame=frame), ["from", "to"]
    third = next((name for name in _WEIGHTS if name in frame.columns), None)
    if third is None and (path.suffix == ".rel" or list(frame.columns) == columns):
        third, frame["weight"] = "weight", 1.0  # what is linked is linked alike
    if third is None or not set(columns) <= set(frame.columns):
        raise InputError(
            f"{path} has the columns {', '.join(frame.columns[:8])}; edges need from and to, and weight or distance if "
            "they are not all alike"
        )
    if third in ("cost", "distance") and distances is None:
        raise InputError(f"{path} has a column {third!r}; say by --distances or --nodistances whether it is one")
    number = {name: index for index, name in enumerate(ids)}
    ends = [names_in(column_of(table, name)).map(number) for name in columns]
    weights = numbers(table, [third])[:, 0]
    known = np.asarray(ends[0].notna() & ends[1].notna(), bool)
    kept = known & np.asarray((ends[0] != ends[1]).fillna(False), bool)
    if known.any() and not kept.any():
        raise InputError(f"{path} links regions of the city with themselves alone; give edges between two of them")
    if not kept.any():
        raise InputError(
            f"{path} has no edge between two regions of the city; its first is from {frame['from'].iloc[0]!r}, and the "
            f"first region is {ids[0]!r}; write ids as the readings have them"
        )
    if np.isnan(weights[kept]).any():
        row = table.source.row(np.flatnonzero(kept & np.isnan(weights))[0])
        raise table.source.error(f"an edge has no {third} (row {row}); write one, or leave the edge out")
    rows, cols = (np.asarray(end[kept], np.int64) for end in ends)
    pairs = rows * len(ids) + cols
    unique, first = np.unique(pairs, return_index=True)
    if len(unique) < len(pairs):
        again = int(np.setdiff1d(np.arange(len(pairs)), first)[0])
        row = table.source.row(np.flatnonzero(kept)[again])
        edge = f"from {ids[rows[again]]!r} to {ids[cols[again]]!r}"
        raise InputError(f"{path} lists the edge {edge} twice, again in row {row}; keep one")
    wrong = kept & (weights < 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise table.source.error(f"the {third} {weights[at]:g} (row {table.source.row(at)}) is negative; correct it")
    heaviest = int(np.argmax(np.where(kept, weights, -np.inf)))
    if not distances and weights[heaviest] > 1:
        raise InputError(
            f"{path} has the weight {weights[heaviest]:g} (row {table.source.row(heaviest)}), which is above 1; say by "
            "--distances that it is a distance, or divide weights by the largest"
        )
    check_unpacked(path, (8 + 8 if distances else 8 + 4) * len(ids) ** 2)
    matrix = np.full((len(ids), len(ids)), np.nan if distances else 0.0)
    matrix[rows, cols] = weights[kept]
    return gaussian_kernel(matrix) if distances else matrix.astype(np.float32)


def read_matrix(path: pathlib.Path, ids: tuple[str, ...], *, distances: bool = False) -> Float[np.ndarray, "N N"]:
    """Reads a matrix between all regions, in their order or with their ids, see `read_matrix_file`.

    Args:
      path: the file.
      ids: the regions.
      distances: whether it holds distances, of which `gaussian_kernel` makes weights; 0 stands for none.

    Returns:
      The weights, row = from, column = to, with a zero diagonal.

    Raises:
      InputError: another shape, other regions, or what looks like distances and is not said to be.
    """
    matrix, names = read_matrix_file(path)
    check_unpacked(path, matrix.nbytes)  # beside it, as it is without its diagonal
    if names is not None:
        row_of = {name: row for row, name in enumerate(names)}
        absent = [name for name in ids if name not in row_of]
        if absent or len(names) != len(matrix):
            what = f"has no row of region {absent[0]!r} ({len(absent)} such)" if absent else "has not one id for a row"
            raise InputError(f"{path} {what}; take the matrix that belongs to the readings")
        order = [row_of[name] for name in ids]
        matrix = matrix[np.ix_(order, order)]
    if matrix.shape != (len(ids), len(ids)):
        raise InputError(
            f"{path} holds a matrix of shape {matrix.shape}; the {len(ids)} regions need [{len(ids)}, {len(ids)}]"
        )
    matrix = np.where(np.eye(len(ids), dtype=bool), 0.0, matrix)
    if (matrix < 0).any():
        one, other = np.unravel_index(int(np.argmin(matrix)), matrix.shape)
        raise InputError(
            f"{path} has {matrix.min():g} from {ids[one]!r} to {ids[other]!r}, which is negative; correct it"
        )
    if distances:
        return gaussian_kernel(np.where(matrix == 0, np.nan, matrix))
    if is_distance_matrix(matrix):
        raise InputError(
            f"{path} looks like distances (every pair has one, and none is longer than a detour); say so by --distances"
        )
    return matrix.astype(np.float32)


def gaussian_kernel(distances: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """Weights exp(-(d / s)^2), s the standard deviation of all distances, and none where that is below 0.1.

    Source: Li et al., "Diffusion Convolutional Recurrent Neural Network", ICLR 2018, section 4. Distances that are
    nearly alike, as those of neighbours may be, all lie beyond that; then s is their median.

    Args:
      distances: NaN where there is none, as on the diagonal.

    Returns:
      float32 weights.

    Raises:
      InputError: a distance is negative.
    """
    known = distances[np.isfinite(distances)]
    if (known < 0).any():
        raise InputError(f"a distance (={known.min():g}) is negative; give distances of at least 0")
    spread = known.std() if len(known) else 1.0
    if len(known) and not _kept(known.min(), spread):
        spread = np.median(known)
    weights = np.exp(-np.square(np.where(np.isfinite(distances), distances, np.inf) / (spread or 1.0)))
    return np.where(weights < _WEAKEST, 0.0, weights).astype(np.float32)


def _kept(distance: float | np.floating, spread: float | np.floating) -> bool:
    """Whether a distance has a weight that is kept."""
    return bool(spread > 0 and np.exp(-((distance / spread) ** 2)) >= _WEAKEST)


def read_sites(path: pathlib.Path, ids: tuple[str, ...]) -> Sites:
    """Reads a table with the columns `unique_id`, `latitude` and `longitude`, or a LibCity `.geo` file.

    The site of a line or an area is the mean of its points.

    Args:
      path: CSV or Parquet.
      ids: the regions; sites of others are left out.

    Returns:
      The sites, in the order of the regions.

    Raises:
      InputError: columns that lack, a region without a site or with two, or a place that is none on earth.
    """
    table, columns = read_table(path), ("unique_id", "latitude", "longitude")
    if path.suffix == ".geo":
        table = table._replace(frame=_places(table, path))
    if not set(columns) <= set(table.frame.columns):
        raise InputError(
            f"{path} has the columns {', '.join(table.frame.columns[:8])}; sites need {', '.join(columns)}; rename them"
        )
    names = names_in(column_of(table, "unique_id"))
    if names.duplicated().any():
        again = int(np.argmax(names.duplicated()))
        row = table.source.row(again)
        raise InputError(f"{path} has two sites of {names.iloc[again]!r}, the second in row {row}; keep one")
    row_of = {name: row for row, name in enumerate(names)}
    absent = [name for name in ids if name not in row_of]
    if absent:
        raise InputError(
            f"{path} has no site of region {absent[0]!r} ({len(absent)} such); add it, or leave the region out"
        )
    rows = [row_of[name] for name in ids]
    places = []
    for name, limit in (("latitude", 90.0), ("longitude", 180.0)):
        degrees = numbers(table, [name], thousands=False)[rows, 0]
        wrong = ~(np.abs(degrees) <= limit)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise table.source.error(
                f"`{name}` (={degrees[at]}) of region {ids[at]!r} (row {table.source.row(rows[at])}) must be degrees "
                f"in -{limit:g}..{limit:g}; correct it"
            )
        places.append(degrees)
    known = {"", *ids}
    return Sites(places[0], places[1], tuple(str(name) for name in names.dropna() if name not in known))


def _places(table: TableFile, path: pathlib.Path) -> pd.DataFrame:
    """The sites of a LibCity file, which writes coordinates as JSON, longitude first."""
    if not {"geo_id", "coordinates"} <= set(table.frame.columns):
        raise InputError(
            f"{path} has the columns {', '.join(table.frame.columns[:8])}; a .geo file has geo_id and coordinates"
        )
    points = []
    for row, text in enumerate(table.frame["coordinates"]):
        try:
            points.append(np.asarray(_points(json.loads(text))).mean(axis=0))
        except (ValueError, TypeError, IndexError, RecursionError):
            at = table.source.row(row)
            raise InputError(
                f"{path} has the coordinates {str(text)[:60]!r} (row {at}); write [longitude, latitude]"
            ) from None
    longitude, latitude = np.stack(points, axis=1)
    return pd.DataFrame({"unique_id": table.frame["geo_id"], "latitude": latitude, "longitude": longitude})


def _points(place: Any) -> list[tuple[float, float]]:
    """The points of a place in GeoJSON: longitude, latitude, and perhaps a height, in lists of any depth."""
    if isinstance(place[0], list):
        return [point for part in place for point in _points(part)]
    return [(float(place[0]), float(place[1]))]


def nearest_sites(sites: Sites, neighbours: int = NEIGHBOURS) -> Float[np.ndarray, "N N"]:
    """Links every region with its nearest ones.

    Weights are exp(-(d / s)^2) of the great-circle distance d, s the median distance of the farthest of a region's
    neighbours; the same in both directions.

    Args:
      sites: of the regions.
      neighbours: how many each is linked with; it may get more from others.

    Returns:
      float32 weights; none is 0 that stands for a link.

    Raises:
      InputError: `neighbours` is below 1, or there are more regions than there is memory for distances between all.
    """
    check_at_least(1, {"neighbours": neighbours})
    count = len(sites.latitude)
    check_unpacked(f"a table of the distances between {count} regions", 4 * 8 * count**2)  # and what they are made of
    distance = great_circle_km(sites)
    count = min(neighbours, len(distance) - 1)
    if count < 1:
        return np.zeros_like(distance, np.float32)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :count]
    linked = np.zeros(distance.shape, bool)
    np.put_along_axis(linked, nearest, True, axis=1)
    linked |= linked.T
    spread = float(np.median(np.take_along_axis(distance, nearest[:, -1:], axis=1))) or 1.0
    weights = np.maximum(np.exp(-np.square(distance / spread)), 1e-6)
    return np.where(linked, weights, 0.0).astype(np.float32)


def great_circle_km(sites: Sites) -> Float[np.ndarray, "N N"]:
    """Distances in km on a sphere, by the haversine formula."""
    latitude, longitude = (np.radians(degrees)[:, None] for degrees in sites[:2])
    half = np.square(np.sin((latitude - latitude.T) / 2))
    half = half + np.cos(latitude) * np.cos(latitude.T) * np.square(np.sin((longitude - longitude.T) / 2))
    return 2 * _EARTH_KM * np.arcsin(np.sqrt(np.clip(half, 0.0, 1.0)))
