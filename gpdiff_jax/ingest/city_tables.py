"""In: the files of a city's readings and of what links its regions. Out: a checked city, and what was seen in them."""

import dataclasses
import os
import pathlib

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities import City
from gpdiff_jax.cities.city import AVERAGED
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.ingest.arrays import ARRAY_FILES, read_series, series_grid
from gpdiff_jax.ingest.graph import NEIGHBOURS, Sites, nearest_sites, read_edges, read_matrix, read_sites
from gpdiff_jax.ingest.readings import LONG, read_rows
from gpdiff_jax.ingest.steps import Grid, grid
from gpdiff_jax.ingest.table_city import TableFacts, table_city
from gpdiff_jax.ingest.table_file import separator_of
from gpdiff_jax.ingest.text_file import SEPARATORS

_Path = str | os.PathLike[str]
_QUANTITIES = {"crowd": "visitors", "flow": "vehicles", "speed": "speed_kmh", "stock": "available"}
UNKNOWN = "unknown"
_NO_TEXT = (*ARRAY_FILES, ".parquet", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class ReadingsConfig:
    """How a file of readings is to be read.

    `columns`, `time_format` are of tables with times: names of the region's, the time's and the reading's column of a
    long table, and how times are written, None for ISO 8601. `channel` and `start` are of arrays without times: which
    quantity of [T, N, C], and local time of the first step or "unknown"; with `start` a CSV file is read as one.
    `time_zone` is of the city, to see clock changes. For `interval_minutes` and `duplicates` see `grid`.
    """

    columns: tuple[str, str, str] | None = None
    time_format: str | None = None
    channel: int | None = None
    start: str | None = None
    time_zone: str | None = None
    interval_minutes: int | None = None
    duplicates: str = "refuse"


def read_grid(path: _Path, *, counts: bool, config: ReadingsConfig = ReadingsConfig()) -> Grid:
    """Reads a table with times, or an array without.

    Args:
      path: .csv, .parquet, .dyna, .h5, .npy or .npz; see `read_rows` and `read_series`.
      counts: whether readings are counts per interval; else they are averaged.
      config: how to read it.

    Returns:
      Readings at regular steps.

    Raises:
      InputError: see `read_rows`, `read_series`, `grid`; or the configuration speaks of what the file has not.
    """
    path = user_path(path)
    if path.suffix in ARRAY_FILES or config.start is not None:
        _check_unused(path, "has no such columns", columns=config.columns, time_format=config.time_format)
        series = read_series(path, channel=config.channel or 0, time_zone=config.time_zone)
        if series.times is not None:
            _check_unused(path, "has its own times, of one quantity", start=config.start, channel=config.channel)
        return series_grid(
            series,
            counts=counts,
            interval_minutes=config.interval_minutes,
            start=None if config.start == UNKNOWN else config.start,
            duplicates=config.duplicates,
            time_zone=config.time_zone,
        )
    _check_unused(path, "is a table of one quantity", channel=config.channel)
    rows = read_rows(path, columns=config.columns or LONG, time_zone=config.time_zone, time_format=config.time_format)
    return grid(
        rows,
        counts=counts,
        interval_minutes=config.interval_minutes,
        duplicates=config.duplicates,
        time_zone=config.time_zone,
    )


def _check_unused(path: pathlib.Path, why: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"`{name}` (={value}) says nothing of {path}, which {why}; leave it out")


def read_graph(
    ids: tuple[str, ...],
    *,
    edges: _Path | None = None,
    matrix: _Path | None = None,
    sites: _Path | None = None,
    distances: bool | None = None,
    neighbours: int | None = None,
) -> tuple[Float[np.ndarray, "N N"], Sites | None]:
    """Reads what links the regions of a city.

    Args:
      ids: the regions.
      edges: a table of edges, see `read_edges`; or
      matrix: a matrix, see `read_matrix`; or neither, and
      sites: a table of sites, whose nearest are linked; with edges or a matrix, where the regions lie.
      distances: whether edges or matrix hold distances.
      neighbours: how many of the nearest sites a region is linked with; default 5.

    Returns:
      The weights, row = from, column = to, and the sites where there are any.

    Raises:
      InputError: nothing links the regions, or two things do; a choice is given that says nothing of them; see the
        readers.
    """
    if edges is not None and matrix is not None:
        raise InputError(f"both `edges` (={edges}) and `matrix` (={matrix}) link the regions; give one of them")
    if edges is None and matrix is None and sites is None:
        ways = "`sites` (--sites), `edges` (--edges) or `matrix` (--matrix)"
        raise InputError(f"nothing says what links the regions; give {ways}")
    if neighbours is not None and (edges is not None or matrix is not None):
        raise InputError(f"`neighbours` (={neighbours}) is of `sites` alone, and edges or a matrix are given; drop one")
    if distances is not None and edges is None and matrix is None:
        raise InputError(f"`distances` (={distances}) is of `edges` or `matrix`, and neither is given; leave it out")
    places = None if sites is None else read_sites(user_path(sites), ids)
    if edges is not None:
        return read_edges(user_path(edges), ids, distances=distances), places
    if matrix is not None:
        return read_matrix(user_path(matrix), ids, distances=bool(distances)), places
    assert places is not None
    return nearest_sites(places, NEIGHBOURS if neighbours is None else neighbours), places


def city_from_tables(
    readings: _Path,
    *,
    name: str,
    kind: str,
    quantity: str | None = None,
    edges: _Path | None = None,
    matrix: _Path | None = None,
    sites: _Path | None = None,
    distances: bool | None = None,
    neighbours: int | None = None,
    zero_is_missing: bool = False,
    missing_above: float | None = None,
    config: ReadingsConfig = ReadingsConfig(),
) -> tuple[City, TableFacts]:
    """Makes a city of the files of its readings and of what links its regions.

    Args:
      readings: see `read_grid`.
      name: of the city, letters, digits and _.:-.
      kind: "crowd" or "flow", counts per interval; "speed"; or "stock", what is there at a time, as parked cars.
      quantity: what is read; None for visitors, vehicles, speed_kmh or available, by the kind.
      edges: see `read_graph`.
      matrix: see `read_graph`.
      sites: see `read_graph`.
      distances: see `read_graph`.
      neighbours: see `read_graph`.
      zero_is_missing: whether a reading of 0 is none, as it always is of a speed.
      missing_above: above which value readings are missing.
      config: how the readings are read.

    Returns:
      The city, and what was seen in its tables.

    Raises:
      InputError: see `read_grid`, `read_graph` and `table_city`.

    Example:
      >>> from gpdiff_jax import ingest
      >>> made = ingest.city_from_tables("counts.csv", name="mine", kind="crowd", sites="sites.csv")  # doctest: +SKIP
    """
    if kind not in _QUANTITIES:
        raise InputError(f"`kind` must be one of {', '.join(_QUANTITIES)}, got {kind!r}")
    found = read_grid(readings, counts=kind not in AVERAGED, config=config)
    adjacency, places = read_graph(
        found.ids, edges=edges, matrix=matrix, sites=sites, distances=distances, neighbours=neighbours
    )
    city, facts = table_city(
        found,
        adjacency,
        name=name,
        kind=kind,
        quantity=quantity or _QUANTITIES[kind],
        interval_minutes=config.interval_minutes,
        zero_is_missing=zero_is_missing,
        missing_above=missing_above,
        sites=places,
    )
    return city, facts._replace(
        seen=facts.seen + _separators((readings, config.start is None), (edges, True), (sites, True), (matrix, False))
    )


def _separators(*files: tuple[_Path | None, bool]) -> tuple[tuple[str, str], ...]:
    """A line on the files that are separated otherwise than by commas; each comes with whether it has a header."""
    found = []
    for given, header in files:
        path = None if given is None else user_path(given)
        if path is not None and path.suffix not in _NO_TEXT:
            separator = separator_of(path, header=header)
            if separator != ",":
                found.append(f"{path.name} is separated by {SEPARATORS[separator]}")
    return (("written", f"{', '.join(found)}; a comma within a number is decimal"),) if found else ()
