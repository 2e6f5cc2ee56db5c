"""In: files of public data sets that hold arrays. Out: series [T, N], with times where the file has them; and matrices.

Read are DCRNN's HDF5 and its adjacency pickle (Li et al., 2018), `dataset.npy` and `matrix.npy`, STGCN's `vel.csv` and
`adj.npz` (Yu et al., 2018), the npz files of PeMS (Guo et al., 2019) and T-GCN's CSV files (Zhao et al., 2020).
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from gpdiff_jax.cities.calendar import local_moment
from gpdiff_jax.cities.city import check_interval
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE, read_npz
from gpdiff_jax.host_memory import check_unpacked
from gpdiff_jax.ingest.clock import LocalTimes, local_times, repeated_for
from gpdiff_jax.ingest.hdf5 import read_frame
from gpdiff_jax.ingest.plain_pickle import load_plain_pickle
from gpdiff_jax.ingest.readings import Rows
from gpdiff_jax.ingest.steps import Grid, grid, negative_line
from gpdiff_jax.ingest.table_file import UNNAMED, Source, name_of, names_in, numbers, read_table
from gpdiff_jax.ingest.text_file import check_file

ARRAY_FILES = (".h5", ".hdf5", ".npy", ".npz")


class Series(NamedTuple):
    """The readings of an array file."""

    values: Float[np.ndarray, "T N"]  # float64, NaN where missing
    ids: tuple[str, ...]
    times: LocalTimes | None  # [T]; None where the file has none
    source: Source = UNNAMED


def read_series(path: pathlib.Path, *, channel: int = 0, time_zone: str | None = None) -> Series:
    """Reads an array of readings.

    Args:
      path: a pandas frame in HDF5 (its first table), `.npy` or `.npz` (its array `data`, or its only one) of shape
        [T, N] or [T, N, C], or a CSV of numbers with or without a line of ids above.
      channel: which of the C quantities.
      time_zone: of the city, see `local_times`.

    Returns:
      The series; regions without ids are "0", "1", ...

    Raises:
      InputError: the file is damaged, of another layout, or has no such channel.
    """
    check_file(path)
    if path.suffix in (".h5", ".hdf5"):
        return _timed_series(path, time_zone)
    if path.suffix in (".npy", ".npz"):
        array = _read_array(path, "data")
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3:
            raise InputError(f"{path} holds an array of shape {array.shape}; readings need [T, N] or [T, N, C]")
        if not 0 <= channel < array.shape[2]:
            raise InputError(f"`channel` (={channel}) must be in 0..{array.shape[2] - 1}, as {path} has; choose one")
        return Series(array[:, :, channel], tuple(map(str, range(array.shape[1]))), None, Source(path))
    table = read_table(path, header=False)
    names = list(names_in(table.frame.iloc[0]).fillna(""))
    if headed := _is_header(names, table.frame):
        below = table.source._replace(above=table.source.above + 1)
        table = table._replace(frame=table.frame.iloc[1:].reset_index(drop=True), source=below)
    values = numbers(table, list(table.frame.columns))
    return Series(values, tuple(names) if headed else tuple(map(str, range(values.shape[1]))), None, table.source)


def _is_header(names: list[str], table: pd.DataFrame) -> bool:
    """Whether the first line of numbers without times has ids: names, 0, 1, 2, ..., or numbers far above the others."""
    if not all(name == "" or _is_number(name) for name in names):
        return True
    if not all(name.isdigit() for name in names) or len(set(names)) < len(names):
        return False
    ids = [int(name) for name in names]
    if len(ids) > 2 and ids in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        return True
    rest = pd.to_numeric(table.iloc[1:].stack(), errors="coerce")
    return bool(len(table) > 1 and min(ids) > 10 * np.nanmax(np.asarray(rest, np.float64), initial=1.0))


def series_grid(
    series: Series,
    *,
    counts: bool,
    interval_minutes: int | None = None,
    start: str | None = None,
    duplicates: str = "refuse",
    time_zone: str | None = None,
) -> Grid:
    """Puts a series on regular steps.

    Args:
      series: the readings.
      counts: see `grid`.
      interval_minutes: of the steps, needed where the file has no times.
      start: local time of the first step in ISO form, for a file without times; None where it is not known.
      duplicates: see `grid`.
      time_zone: see `grid`.

    Returns:
      The grid.

    Raises:
      InputError: an interval is missing, the start is no time, or a reading is negative; see `grid`.
    """
    if series.times is not None:
        rows, count = series.values.shape
        times = repeated_for(series.times, count)
        held = Rows(np.tile(np.arange(count), rows), times, series.values.reshape(-1), series.ids, series.source, count)
        how: dict[str, Any] = {"duplicates": duplicates, "time_zone": time_zone}
        return grid(held, counts=counts, interval_minutes=interval_minutes, **how)
    if interval_minutes is None:
        raise series.source.error("the file of readings has no times; say by --interval_minutes how long a step is")
    check_interval(interval_minutes)
    begin = None
    if start is not None:
        begin = local_moment(start, "start")
    negative = np.argwhere(series.values < 0)
    if len(negative):
        step, region = map(int, negative[0])
        row = None if series.source.separator is None else series.source.row(step)
        when = f"step {step}" if begin is None else f"{begin + np.timedelta64(step * interval_minutes, 'm')}"
        where = f"region {series.ids[region]!r} at {when}"
        raise series.source.error(
            negative_line(series.source, series.values[step, region], row, where, len(negative) - 1)
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused as a reading
        values = series.values.astype(np.float32)
    return Grid(values, series.ids, begin, interval_minutes, 0, 0, 0, 0, source=series.source)


def read_matrix_file(path: pathlib.Path) -> tuple[Float[np.ndarray, "N N"], tuple[str, ...] | None]:
    """Reads a matrix between regions.

    Args:
      path: `.npy`; `.npz` of a SciPy sparse matrix or with one array; `.pkl` of a matrix, or of ids, their numbers and
        a matrix; else a CSV of numbers without a header.

    Returns:
      float64 [N, N], and the ids that the file has for its rows.

    Raises:
      InputError: the file is damaged, of another layout, or a pickle of more than arrays and plain containers.
    """
    check_file(path)
    ids = None
    if path.suffix in (".pkl", ".pickle"):
        held = load_plain_pickle(path)
        if isinstance(held, (list, tuple)) and len(held) == 3 and isinstance(held[1], dict):
            ids, held = _pickled_ids(path, held[0]), held[2]
        matrix = held if isinstance(held, np.ndarray) else _stacked(path, held)
    elif path.suffix == ".npz":
        matrix = _read_sparse(path)
    else:
        matrix = _read_array(path, "adjacency") if path.suffix == ".npy" else _table_matrix(path)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {matrix.dtype} of shape {matrix.shape}; a matrix of numbers [N, N] is needed")
    if not np.isfinite(matrix).all():
        raise InputError(f"{path} has a cell without a number; 0 stands for no link")
    return matrix.astype(np.float64, copy=False), ids


def _pickled_ids(path: pathlib.Path, held: Any) -> tuple[str, ...]:
    if not isinstance(held, (list, tuple, np.ndarray)):
        raise InputError(f"{path} holds a {type(held).__name__} in place of a list of ids; save ids, rows and matrix")
    if others := {type(name).__name__ for name in held if not isinstance(name, (str, bytes, int, float, np.number))}:
        raise InputError(f"{path} has ids of type {min(others)}; save them as text or numbers")
    return tuple(name_of(_text(name)) for name in held)


def _stacked(path: pathlib.Path, held: Any) -> np.ndarray:
    """The matrix of a list of rows: counted first, for a list may hold one row a million times."""
    rows = list(held) if isinstance(held, (list, tuple)) else []
    if not rows or not all(isinstance(row, (list, tuple, np.ndarray)) for row in rows):
        raise InputError(f"{path} holds a {type(held).__name__} that is no list of rows; a matrix of numbers is needed")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows):
            raise InputError(
                f"{path} holds {len(rows)} rows, of which row {number} has {len(row)} cells; a matrix [N, N] is needed"
            )
    check_unpacked(path, 8 * len(rows) ** 2)
    for number, row in enumerate(rows, start=1):
        if others := {type(cell).__name__ for cell in row if not isinstance(cell, (int, float, np.number))}:
            raise InputError(f"{path} holds {min(others)} in row {number}; a matrix of numbers [N, N] is needed")
    return np.array(rows)


def _read_array(path: pathlib.Path, name: str) -> np.ndarray:
    try:
        array = _only_array(path, read_npz(path), name) if path.suffix == ".npz" else _read_npy(path)
    except InputError:
        raise
    except (*DAMAGE, MemoryError) as error:
        raise InputError(f"{path} is damaged or holds objects ({type(error).__name__}); store plain numbers") from None
    return _plain_numbers(path, array)


def _read_npy(path: pathlib.Path) -> np.ndarray:
    """The array of a `.npy`; its file may have holes and be larger than memory."""
    array = np.lib.format.open_memmap(path, mode="r")
    check_unpacked(path, array.nbytes)
    return np.array(array)


def _only_array(path: pathlib.Path, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The array of a name, or the only one."""
    if name not in arrays and len(arrays) != 1:
        raise InputError(f"{path} holds the arrays {', '.join(sorted(arrays)[:8])}; one named {name!r} is needed")
    return arrays.get(name, next(iter(arrays.values())))


def _plain_numbers(path: pathlib.Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {array.dtype}; store plain numbers")
    check_unpacked(path, 8 * array.size)
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN becomes a quiet one
        return array.astype(np.float64, copy=False)


def _read_sparse(path: pathlib.Path) -> np.ndarray:
    """A matrix of an npz file, dense or as SciPy saves a sparse one in rows or columns."""
    arrays = read_npz(path)
    if not {"data", "indices", "indptr", "shape", "format"} <= set(arrays):
        return _plain_numbers(path, _only_array(path, arrays, "adjacency"))
    try:
        layout = _text(arrays["format"].item())
        rows, columns = (int(size) for size in arrays["shape"])
        if layout not in ("csr", "csc"):
            raise InputError(f"{path} holds a sparse matrix in the layout {layout!r}; save it as csr or csc")
        major, minor = (rows, columns) if layout == "csr" else (columns, rows)
        ends, at, data = arrays["indptr"].astype(np.int64, casting="same_kind"), arrays["indices"], arrays["data"]
        counts = np.diff(ends)
        fits = len(counts) == major and (counts >= 0).all() and ends[0] == 0 and len(at) == len(data) == ends[-1]
        if not fits or data.dtype.kind not in "fiub" or (at < 0).any():
            raise ValueError("its parts do not fit")
        check_unpacked(path, 8 * major * minor)
        dense = np.zeros((major, minor))
        np.add.at(dense, (np.repeat(np.arange(major), counts), at), data)
    except InputError:
        raise
    except (*DAMAGE, MemoryError) as error:
        raise InputError(
            f"{path} is a damaged sparse matrix ({type(error).__name__}: {error}); save it again"
        ) from None
    return dense if layout == "csr" else dense.T


def _table_matrix(path: pathlib.Path) -> Float[np.ndarray, "X Y"]:
    table = read_table(path, header=False)
    try:
        return numbers(table, list(table.frame.columns))
    except InputError as error:
        named = "(row 1, " in str(error) or "column '0')" in str(error)
        more = "; a matrix in CSV has numbers alone, no names: its rows and columns are the regions in their order"
        raise InputError(f"{error}{more if named else ''}") from None


def _timed_series(path: pathlib.Path, time_zone: str | None) -> Series:
    frame = read_frame(path)
    source = Source(path)
    return Series(
        frame.values,
        tuple(map(name_of, frame.ids)),
        local_times(frame.moments, time_zone=time_zone, source=source),
        source,
    )


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
