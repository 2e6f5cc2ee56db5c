"""In: the forecasts of a city's next steps. Out: a long table of them, CSV or Parquet, whole or not at all."""

import csv
import importlib.util
import io
import pathlib
from collections.abc import Mapping

import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically
from gpdiff_jax.transfer.next_hours import NextHours
from gpdiff_jax.transfer.quantiles import LEVELS

COLUMNS = ("unique_id", "ds", "mean")


def write_next(path: pathlib.Path, made: NextHours) -> None:
    """Writes a row for every region and step: `unique_id`, `ds` (local begin of the step), `mean` and quantiles.

    Quantiles are `q05`, `q25`, `q50`, `q75` and `q95`; where none are known, there are no such columns.

    Args:
      path: `.csv` or `.parquet`; a file that is there is replaced.
      made: the forecasts.

    Raises:
      InputError: the name ends otherwise, Parquet cannot be written here, or the folder does not exist.
    """
    check_table_name(path)
    regions, horizon = made.forecast.shape
    times = [f"step {step + 1}" for step in range(horizon)] if made.times is None else made.times.astype(str).tolist()
    names = np.repeat(np.asarray(made.node_ids, object), horizon).tolist()
    columns: dict[str, list] = dict(
        zip(COLUMNS, (names, times * regions, made.forecast.reshape(-1).tolist()), strict=True)
    )
    if made.quantiles is not None:
        for number, level in enumerate(LEVELS):
            columns[f"q{100 * level:02.0f}"] = made.quantiles[..., number].reshape(-1).tolist()
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        # Six digits are more than a forecast knows.
        rows = zip(*columns.values(), strict=True)
        writer.writerows((name, time, *(f"{value:.6g}" for value in values)) for name, time, *values in rows)
        content = text.getvalue().encode()
    else:
        content = _parquet(columns, known=made.times is not None)
    try:
        write_atomically(path, content)
    except FileNotFoundError:
        raise InputError(f"{path} cannot be written, its folder does not exist; make it or name another") from None


def check_table_name(path: pathlib.Path) -> None:
    """Raises `InputError` where the name of a table is not one of CSV or Parquet, or the latter cannot be written."""
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"`out_file` (={path}) is no table; name it .csv or .parquet")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"`out_file` (={path}) is Parquet, which needs pyarrow; pip install 'gpdiff_jax[data]', or name it .csv"
        )


def _parquet(columns: Mapping[str, list], *, known: bool) -> bytes:
    import pandas as pd

    table, held = pd.DataFrame(columns), io.BytesIO()
    if known:
        table["ds"] = pd.to_datetime(table["ds"])
    table.to_parquet(held, index=False)
    return held.getvalue()
