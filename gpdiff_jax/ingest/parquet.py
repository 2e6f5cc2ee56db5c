"""In: a Parquet file. Out: its table, once it is known that it can be read and fits into memory."""

import importlib.util
import pathlib

import pandas as pd

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.confined import read_confined


def read_parquet(path: pathlib.Path) -> pd.DataFrame:
    """Reads a Parquet file as pandas does, after a process of its own has: a small file may stand for endless tables.

    Runs, dictionaries and encodings of several kinds let its own numbers tell no sizes.

    Args:
      path: the file.

    Returns:
      Its table, with the index that pandas kept in it.

    Raises:
      InputError: pyarrow is not installed; the file is damaged, no Parquet, has text that is not UTF-8, or takes more
        memory than this machine has.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path} is Parquet, which needs pyarrow; pip install 'gpdiff_jax[data]', or write CSV")
    read_confined("parquet", path)
    return pd.read_parquet(path)
