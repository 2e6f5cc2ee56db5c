"""In: a pandas frame in HDF5, in its fixed form. Out: its readings, columns and index, or one line; nothing else."""

import importlib.util
import io
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE
from gpdiff_jax.host_memory import host_bytes

_WORKER = pathlib.Path(__file__).with_name("hdf5_worker.py")
_REFUSED = "refused: "  # as in the worker, which cannot be imported without h5py
_PATIENCE = 60.0  # seconds that any file may take; and a second for each of so many bytes
_BYTES_A_SECOND = 2**20


class Frame(NamedTuple):
    """What the first frame of a file holds."""

    values: Float[np.ndarray, "T N"]  # float64, NaN where no block has a column
    ids: tuple[str, ...]  # [N]
    moments: pd.Series  # [T], with the time zone of the file


def read_frame(path: pathlib.Path) -> Frame:
    """Reads the first frame of a file, in a process of its own: a damaged file may end that, or never let it end.

    A part that lies in another file, by a link, external storage or a virtual dataset, is not followed.

    Args:
      path: the file, as `DataFrame.to_hdf` writes one in its fixed form.

    Returns:
      The frame.

    Raises:
      InputError: h5py is not installed; the file holds no such frame, is damaged, names parts outside of itself, or
        takes more memory than this machine has.
    """
    if importlib.util.find_spec("h5py") is None:
        raise InputError(f"{path} is HDF5, which needs h5py; pip install 'gpdiff_jax[data]'")
    free = host_bytes()
    # Half of it: what was read is handed over.
    command = [sys.executable, "-I", str(_WORKER), str(path.absolute()), str(2**62 if free is None else free // 2)]
    patience = _PATIENCE + path.stat().st_size / _BYTES_A_SECOND
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        raise _damaged(path, f"it is not read after {patience:.0f} s") from None
    said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode == 1 and said and said[0].startswith(_REFUSED):
        raise InputError(f"{path}: {said[0].removeprefix(_REFUSED)}")
    if done.returncode:
        raise _damaged(path, said[0][:120] if said and done.returncode == 1 else f"exit code {done.returncode}")
    try:
        with np.load(io.BytesIO(done.stdout), allow_pickle=False) as held:
            ids, unit, zone = tuple(map(str, held["ids"])), str(held["unit"]), str(held["zone"])
            return Frame(held["values"], ids, _moments(path, held["index"], unit, zone))
    except InputError:
        raise
    except DAMAGE as error:
        raise _damaged(path, type(error).__name__) from None


def _moments(path: pathlib.Path, index: np.ndarray, kind: str, zone: str) -> pd.Series:
    unit = re.fullmatch(r"datetime64(?:\[(\w+)\])?", kind)
    if unit is None:
        raise InputError(f"{path} has an index of {kind[:60]!r}; one of times is needed")
    moments = pd.Series(index.astype(f"datetime64[{unit[1] or 'ns'}]"), name="index")
    if not zone:
        return moments
    try:
        return moments.dt.tz_localize("UTC").dt.tz_convert(zone)
    except DAMAGE:
        raise InputError(f"{path} has times of the zone {zone[:60]!r}, which is none that is known") from None


def _damaged(path: pathlib.Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or no pandas frame ({why}); download it again")
