"""Reads a file by a library that may hang, die or take all memory over it, in a process of its own.

    python -P confined_worker.py hdf5|parquet FILE BYTES SECONDS

HDF5's library ends in an endless loop, or takes its process with it, on some damaged files, and follows names of other
files; a small Parquet file may stand for tables without end. Here they can do no harm: BYTES of memory and SECONDS of a
processor are all there is. What is wrong with the file is said on stderr in one line, behind `REFUSED`, with exit code
1. Of HDF5, the first pandas frame is written to stdout as an npz; of Parquet, nothing: it is known then that it can be
read. Nothing else of the library is imported.
"""

import contextlib
import io
import math
import pathlib
import resource
import sys
from typing import Any

REFUSED = "refused: "
_ROOM = 2**30  # bytes of address space beside what is read: code, and stacks of threads
_TOO_LARGE = (
    "it takes more than the memory that is free on this machine, once it is read; give a part of it, or use a larger "
    "machine"
)


class _RefusedError(Exception):
    """What is wrong with a file, for its user."""


def main(kind: str, path: str, most: int, seconds: int) -> None:
    """Reads a file within its limits."""
    _limit(most, seconds)
    try:
        {"hdf5": _write_frame, "parquet": _read_parquet}[kind](path, most)
    except _RefusedError as error:
        sys.exit(f"{REFUSED}{error}")
    except MemoryError:
        sys.exit(f"{REFUSED}{_TOO_LARGE}")


def _limit(most: int, seconds: int) -> None:
    wanted = {resource.RLIMIT_AS: most + _ROOM, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    for kind, limit in wanted.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    with contextlib.suppress(OSError):  # where memory runs out all the same, it is this process that the system ends
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")


def _read_parquet(path: str, most: int) -> None:
    """Reads all of a Parquet file, as pandas does afterwards, and looks whether its texts are UTF-8."""
    import pandas as pd
    import pyarrow.parquet as pq

    del most
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            batch.validate(full=True)
    pd.read_parquet(path)


def _write_frame(path: str, most: int) -> None:
    import h5py
    import numpy as np

    with h5py.File(path) as file:
        content = _FrameReader(h5py, most).first_frame(file)
    made = io.BytesIO()
    np.savez(made, allow_pickle=False, **content)
    sys.stdout.buffer.write(made.getbuffer())


class _FrameReader:
    """Reads what lies in one HDF5 file, as long as it takes no more than `left` bytes."""

    def __init__(self, h5py: Any, left: int) -> None:
        self._h5py, self._left = h5py, left

    def first_frame(self, file: Any) -> dict[str, Any]:
        """`values` [T, N], `ids` [N], the `index` [T] as integers, its `unit` and its time `zone`, "" where none is."""
        import numpy as np

        found = [file[name] for name in file if self._is_within(file, name)]
        frames = [one for one in found if isinstance(one, self._h5py.Group) and {"axis0", "axis1"} <= {*one}]
        if not frames:
            names = ", ".join(repr(name[:60]) for name in list(file)[:8])
            raise _RefusedError(f"it holds {names}; a pandas frame in fixed form is needed, within this file")
        frame = frames[0]
        ids, index = self._names(frame, "axis0"), self._within(frame, "axis1")
        unit = _text(index.attrs.get("kind", "datetime64"))
        zone = _text(index.attrs.get("tz", ""))
        moments = self._array(index, "axis1")
        if moments.ndim != 1 or moments.dtype.kind not in "iu":
            raise _RefusedError(f"its index holds {moments.dtype} of shape {moments.shape}; one of times is needed")
        self._take(3 * 8 * len(moments) * len(ids))  # the values, and the file that is made of them, and its bytes
        values = np.full((len(moments), len(ids)), np.nan)
        number = {name: place for place, name in enumerate(ids)}
        for key in frame:
            if key.endswith("_values"):
                items = [number[name] for name in self._names(frame, key.replace("_values", "_items"))]
                values[:, items] = self._array(self._within(frame, key), key)
        texts = {"ids": np.array(ids, str), "unit": np.array(unit), "zone": np.array(zone)}
        return {"values": values, "index": moments.astype(np.int64), **texts}

    def _names(self, frame: Any, key: str) -> list[str]:
        return [_text(name) for name in self._array(self._within(frame, key), key)]

    def _is_within(self, parent: Any, name: str) -> bool:
        """Whether a name stands for a part of this file; one with a slash would be a way through other links."""
        return "/" not in name and name != "." and isinstance(parent.get(name, getlink=True), self._h5py.HardLink)

    def _within(self, parent: Any, name: str) -> Any:
        if not self._is_within(parent, name):
            raise _outside(name)
        return parent[name]

    def _array(self, held: Any, name: str) -> Any:
        """A dataset's numbers or texts of equal length, if they lie in this file and fit into memory."""
        if held.external or held.is_virtual:
            raise _outside(name)
        if held.dtype.hasobject:
            raise _RefusedError(f"it holds objects in {name[:60]!r}; a pandas frame of numbers in fixed form is needed")
        self._take(math.prod(held.shape) * held.dtype.itemsize)
        return held[()]

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _RefusedError(_TOO_LARGE)


def _outside(name: str) -> _RefusedError:
    return _RefusedError(
        f"it says that {name[:60]!r} lies elsewhere, which is not followed; write one file that holds all"
    )


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
