"""In: a pandas frame in HDF5, in its fixed form. Out: its readings, columns and index, or one line; nothing else."""

import importlib.util
import io
import pathlib
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE
from gpdiff_jax.ingest.confined import damaged, read_confined


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
    content = read_confined("hdf5", path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            ids, unit, zone = tuple(map(str, held["ids"])), str(held["unit"]), str(held["zone"])
            return Frame(held["values"], ids, _moments(path, held["index"], unit, zone))
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(path, type(error).__name__) from None


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
