"""In: files of public data sets that hold arrays. Out: series [T, N], with times where the file has them; and matrices.

Read are DCRNN's HDF5 and its adjacency pickle (Li et al., 2018), `dataset.npy` and `matrix.npy`, STGCN's `vel.csv` and
`adj.npz` (Yu et al., 2018), the npz files of PeMS (Guo et al., 2019) and T-GCN's CSV files (Zhao et al., 2020).
"""

import io
import pathlib
import pickle
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities.city import check_interval
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE, read_npz
from gpdiff_jax.ingest.clock import LocalTimes
from gpdiff_jax.ingest.readings import Grid, Rows, grid

ARRAY_FILES = (".h5", ".hdf5", ".npy", ".npz")
# All that a pickle of arrays and plain containers names, in numpy 1 and 2, and as Python 2 wrote it.
_HARMLESS = {
    *((builtin, name) for builtin in ("builtins", "__builtin__") for name in ("bytes", "set", "frozenset")),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
}


class Series(NamedTuple):
    """The readings of an array file."""

    values: Float[np.ndarray, "T N"]  # float64, NaN where missing
    ids: tuple[str, ...]
    times: np.ndarray | None  # datetime64[s] [T]; None where the file has none


def read_series(path: pathlib.Path, *, channel: int = 0) -> Series:
    """Reads an array of readings.

    Args:
      path: a pandas frame in HDF5 (its first table), `.npy` or `.npz` (its array `data`, or its only one) of shape
        [T, N] or [T, N, C], or a CSV of numbers with or without a line of ids above.
      channel: which of the C quantities.

    Returns:
      The series; regions without ids are "0", "1", ...

    Raises:
      InputError: the file is damaged, of another layout, or has no such channel.
    """
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; check the path")
    if path.suffix in (".h5", ".hdf5"):
        return _read_frame(path)
    if path.suffix in (".npy", ".npz"):
        array = _read_array(path, "data")
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3:
            raise InputError(f"{path} holds an array of shape {array.shape}; readings need [T, N] or [T, N, C]")
        if not 0 <= channel < array.shape[2]:
            raise InputError(f"`channel` (={channel}) must be in 0..{array.shape[2] - 1}, as {path} has; choose one")
        return Series(array[:, :, channel], tuple(map(str, range(array.shape[1]))), None)
    first, second, *_ = [*path.read_text(errors="replace").split("\n", 2), ""]
    names, cells = ([cell.strip() for cell in line.split(",")] for line in (first, second))
    headed = not all(map(_is_number, names)) or (_are_whole(names) and not _are_whole(cells))
    values = _read_numbers(path, skip=int(headed))
    return Series(values, tuple(names) if headed else tuple(map(str, range(values.shape[1]))), None)


def series_grid(series: Series, *, counts: bool, interval_minutes: int | None = None, start: str | None = None) -> Grid:
    """Puts a series on regular steps.

    Args:
      series: the readings; where they have times, those are taken as local.
      counts: see `grid`.
      interval_minutes: of the steps, needed where the file has no times.
      start: local time of the first step in ISO form, for a file without times; None where it is not known.

    Returns:
      The grid.

    Raises:
      InputError: an interval is missing, or the start is no time or not on a step of the day.
    """
    if series.times is not None:
        rows, count = series.values.shape
        never = np.zeros(rows * count, bool)
        times = LocalTimes(np.repeat(series.times, count), never, never)
        held = Rows(np.tile(np.arange(count), rows), times, series.values.reshape(-1), series.ids)
        return grid(held, counts=counts, interval_minutes=interval_minutes)
    if interval_minutes is None:
        raise InputError("the file of readings has no times; say by --interval_minutes how long a step is")
    check_interval(interval_minutes)
    begin = None
    if start is not None:
        try:
            begin = np.datetime64(start, "m")
        except ValueError:
            raise InputError(f"`start` (={start!r}) must be a local time as 2018-01-01T00:00; write it so") from None
    return Grid(series.values.astype(np.float32), series.ids, begin, interval_minutes, 0, 0, 0, 0)


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
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; check the path")
    ids = None
    if path.suffix in (".pkl", ".pickle"):
        held = load_plain_pickle(path)
        if isinstance(held, (list, tuple)) and len(held) == 3:
            ids, held = tuple(_text(name) for name in held[0]), held[2]
        matrix = np.asarray(held)
    elif path.suffix == ".npz":
        matrix = _read_sparse(path)
    else:
        matrix = _read_array(path, "adjacency") if path.suffix == ".npy" else _read_numbers(path, skip=0)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {matrix.dtype} of shape {matrix.shape}; a matrix of numbers [N, N] is needed")
    return matrix.astype(np.float64), ids


def load_plain_pickle(path: pathlib.Path) -> Any:
    """Loads a pickle of arrays, numbers, text and plain containers, and of nothing else.

    Raises:
      InputError: it is damaged, or names anything else, which loading it would import or run.
    """

    class Plain(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str) -> Any:
            if (module_name, global_name) not in _HARMLESS:
                raise InputError(
                    f"{path} names {module_name}.{global_name}, and loading it could run code; save the matrix as .npy"
                )
            return super().find_class(module_name, global_name)

    try:
        # Files of Python 2 hold text in its old form.
        return Plain(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except InputError:
        raise
    except (*DAMAGE, pickle.UnpicklingError, AttributeError, ImportError, MemoryError) as error:
        raise InputError(f"{path} is a damaged pickle ({type(error).__name__}); download it again") from None


def _read_array(path: pathlib.Path, name: str) -> np.ndarray:
    try:
        if path.suffix == ".npz":
            arrays = read_npz(path)
            if name not in arrays and len(arrays) != 1:
                raise InputError(
                    f"{path} holds the arrays {', '.join(sorted(arrays)[:8])}; one named {name!r} is needed"
                )
            array = arrays.get(name, next(iter(arrays.values())))
        else:
            array = np.load(path, allow_pickle=False)
    except InputError:
        raise
    except (*DAMAGE, MemoryError) as error:
        raise InputError(f"{path} is damaged or holds objects ({type(error).__name__}); store plain numbers") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {array.dtype}; store plain numbers")
    return array.astype(np.float64)


def _read_sparse(path: pathlib.Path) -> np.ndarray:
    """A matrix of an npz file, dense or as SciPy saves a sparse one in rows or columns."""
    arrays = read_npz(path)
    if not {"data", "indices", "indptr", "shape", "format"} <= set(arrays):
        return _read_array(path, "adjacency")
    layout, (rows, columns) = arrays["format"].item(), map(int, arrays["shape"])
    layout = layout.decode() if isinstance(layout, bytes) else str(layout)
    if layout not in ("csr", "csc"):
        raise InputError(f"{path} holds a sparse matrix in the layout {layout!r}; save it as csr or csc")
    try:
        major, minor = (rows, columns) if layout == "csr" else (columns, rows)
        dense = np.zeros((major, minor))
        at = np.repeat(np.arange(major), np.diff(arrays["indptr"]))
        np.add.at(dense, (at, arrays["indices"]), arrays["data"])
    except (ValueError, IndexError, TypeError, MemoryError) as error:
        raise InputError(f"{path} is a damaged sparse matrix ({type(error).__name__}); save it again") from None
    return dense if layout == "csr" else dense.T


def _read_numbers(path: pathlib.Path, *, skip: int) -> Float[np.ndarray, "T N"]:
    try:
        return np.loadtxt(path, delimiter=",", skiprows=skip, ndmin=2)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is no table of numbers ({reason}); correct the cell") from None


def _read_frame(path: pathlib.Path) -> Series:
    """A frame as pandas keeps one in HDF5, in its fixed form."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path} is HDF5, which needs h5py; pip install 'gpdiff_jax[data]'") from None
    try:
        with h5py.File(path) as file:
            frame: Any = next((group for group in file.values() if "axis0" in group and "axis1" in group), None)
            if frame is None:
                raise InputError(f"{path} holds {', '.join(list(file)[:8])}; a pandas frame in fixed form is needed")
            ids = [_text(name) for name in frame["axis0"][()]]
            times = np.asarray(frame["axis1"][()]).astype("datetime64[ns]").astype("datetime64[s]")
            values = np.full((len(times), len(ids)), np.nan)
            number = {name: index for index, name in enumerate(ids)}
            for key in frame:
                if key.endswith("_values"):
                    items = [number[_text(name)] for name in frame[key.replace("_values", "_items")][()]]
                    values[:, items] = frame[key][()]
    except InputError:
        raise
    except (*DAMAGE, OSError) as error:
        raise InputError(f"{path} is damaged or no pandas frame ({type(error).__name__}); download it again") from None
    return Series(values, tuple(ids), times)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _are_whole(cells: list[str]) -> bool:
    """Whether all cells are whole numbers: above a line of others they are ids, as in T-GCN's files of speeds."""
    return all(cell.isdigit() for cell in cells)
