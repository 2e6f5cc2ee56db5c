"""Reads the first pandas frame of an HDF5 file, in a process of its own, and writes it to stdout as an npz.

    python hdf5_worker.py FILE BYTES

HDF5's library ends in an endless loop, or takes its process with it, on some damaged files, and follows names of other
files. Here it can do no harm: who started this gives it time and memory, BYTES of it at most. What is wrong with the
file is said on stderr in one line, behind `REFUSED`, and the exit code is 1. Nothing else of the library is imported.
"""

import io
import math
import resource
import sys
from typing import Any

import h5py
import numpy as np

REFUSED = "refused: "


class _RefusedError(Exception):
    """What is wrong with a file, for its user."""


def main(path: str, most: int) -> None:
    """Writes the frame of a file that takes at most so many bytes."""
    resource.setrlimit(resource.RLIMIT_AS, (most + 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        with h5py.File(path) as file:
            content = _Reader(most).first_frame(file)
    except _RefusedError as error:
        sys.exit(f"{REFUSED}{error}")
    made = io.BytesIO()
    np.savez(made, allow_pickle=False, **content)
    sys.stdout.buffer.write(made.getbuffer())


class _Reader:
    """Reads what lies in one file, as long as it takes no more than `left` bytes."""

    def __init__(self, left: int) -> None:
        self._left = left

    def first_frame(self, file: Any) -> dict[str, np.ndarray]:
        """`values` [T, N], `ids` [N], the `index` [T] as integers, its `unit` and its time `zone`, "" where none is."""
        found = [self._within(file, name) for name in file]
        frames = [one for one in found if isinstance(one, h5py.Group) and {"axis0", "axis1"} <= {*one}]
        if not frames:
            raise _RefusedError(f"it holds {', '.join(list(file)[:8])}; a pandas frame in fixed form is needed")
        frame: Any = frames[0]
        ids, index = self._names(frame, "axis0"), self._within(frame, "axis1")
        unit = _text(index.attrs.get("kind", "datetime64"))
        zone = _text(index.attrs.get("tz", ""))
        moments = self._array(index, "axis1")
        if moments.ndim != 1 or moments.dtype.kind not in "iu":
            raise _RefusedError(f"its index holds {moments.dtype} of shape {moments.shape}; one of times is needed")
        self._take(8 * len(moments) * len(ids))
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

    def _within(self, parent: Any, name: str) -> Any:
        """What a name stands for, if it lies in this file."""
        if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
            raise _outside(name)
        return parent[name]

    def _array(self, held: Any, name: str) -> np.ndarray:
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
            raise _RefusedError(
                "it takes more than the memory that is free on this machine, once it is read; give a part of it, or "
                "use a larger machine"
            )


def _outside(name: str) -> _RefusedError:
    return _RefusedError(
        f"it says that {name[:60]!r} lies elsewhere, which is not followed; write one file that holds all"
    )


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
