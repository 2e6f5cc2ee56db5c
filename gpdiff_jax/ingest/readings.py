"""In: a file of a table of readings, long or wide. Out: its rows, with their regions and local times."""

import os
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from gpdiff_jax.files import user_path
from gpdiff_jax.ingest.clock import LocalTimes, local_times, repeated_for
from gpdiff_jax.ingest.table_file import UNNAMED, Source, TableFile, column_of, name_of, names_in, numbers, read_table

LONG = ("unique_id", "ds", "y")
_FEW = 0.2  # of the times of a wide table may come again, as clocks are put back or tables are joined
_FIRST = 20  # cells by which a column of times is told
_DATED = r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})(?:[T ,].*)?"
# Names of a column of regions, or of readings, in a long table.
_OF_REGIONS = re.compile(
    r"(?:sensor|stations?|site|stop|counter|detector|region|zone|node|unique|location|value|count|start_station)"
    r"(?:[ _-]?(?:id|nr|no|name|code))?|id|wert|anzahl|ort",
    re.IGNORECASE,
)
_TIME_NAMES = ("ds", "time", "timestamp", "date", "datetime", "")


class Rows(NamedTuple):
    """A table of readings, a row for each."""

    region: Int[np.ndarray, " X"]  # index in `ids`
    times: LocalTimes  # [X]
    values: Float[np.ndarray, " X"]  # NaN where missing
    ids: tuple[str, ...]
    source: Source = UNNAMED
    per_row: int = 1  # readings of a row of the table


def read_rows(
    path: str | os.PathLike[str],
    *,
    columns: tuple[str, str, str] = LONG,
    time_zone: str | None = None,
    time_format: str | None = None,
) -> Rows:
    """Reads a table of readings, CSV or Parquet, see `read_table`.

    A table with the three columns is long: a row for every region and time. Any other is wide: a column of times, the
    first or the one with the second of the three names, and a column for every region. LibCity's `.dyna` files are
    long; they write local times as if they were in UTC, and are read so where no time zone is given.

    Args:
      path: a .csv (also compressed, .csv.gz), .parquet or .dyna file.
      columns: names of the region's, the time's and the reading's column of a long table.
      time_zone: see `local_times`.
      time_format: see `local_times`.

    Returns:
      The rows, in the order of the table; regions in that of their first row or column.

    Raises:
      InputError: a file that cannot be read, a table of neither form, a reading that is no number, a time that is none.
    """
    path = user_path(path)
    columns = (name_of(columns[0]), name_of(columns[1]), name_of(columns[2]))
    table = read_table(path)
    if path.suffix == ".dyna":
        columns = _dyna_columns(table, columns)
        if time_zone is None:
            table.frame[columns[1]] = column_of(table, columns[1]).astype("string").str.strip().str.removesuffix("Z")
    if set(columns) <= set(table.frame.columns):
        return _long(table, columns, time_zone, time_format)
    return _wide(table, _time_column(table, columns, time_format), time_zone, time_format)


def _time_column(table: TableFile, columns: tuple[str, str, str], time_format: str | None) -> str:
    """The column of times of a wide table, which is its first; refuses what looks like a long one."""
    found = ", ".join(table.frame.columns[:8]) + (", ..." if table.frame.shape[1] > 8 else "")
    said = f"the table has the columns {found}"
    absent = [repr(name) for name in columns if name not in table.frame.columns]
    lacks = "" if len(absent) == len(columns) else f", of which it lacks {', '.join(absent)}"
    needs = f"a long one needs {', '.join(columns)}{lacks} (name others by --columns)"
    if table.frame.shape[1] < 2:
        raise table.source.error(f"{said}; {needs}, a wide one times and then a column for every region")
    first = str(table.frame.columns[0])
    named = first in (columns[1], *_TIME_NAMES) or first.lower().startswith(("date", "time"))
    if len(absent) == len(columns) and columns != LONG:
        raise table.source.error(
            f"{said}, and --columns (={','.join(columns)}) names none of them; name those of region, time and reading "
            "as they are, or leave it out where every region has a column"
        )
    if not named and not _holds_times(column_of(table, first), time_format):
        if time_format is not None:
            said += f", of which {first!r} is not written as --time_format (={time_format!r}) says"
        raise table.source.error(f"{said}, and the first is no time; {needs}, a wide one a column {columns[1]!r} first")
    if not named and (regions := [name for name in table.frame.columns[1:] if _OF_REGIONS.fullmatch(name)]):
        raise table.source.error(f"{said}, of which {regions[0]!r} looks like that of a long table; {needs}")
    if "" in table.frame.columns[1:]:
        raise table.source.error(f"{said}, one of them without a name; name the region")
    if table.frame[first].duplicated().mean() > _FEW:
        why = f"most times in {first!r} come several times, as in a long one, or where AM and PM or the hour are lost"
        raise table.source.error(f"{said}, and {why}; {needs}")
    return first


def _holds_times(column: pd.Series, time_format: str | None) -> bool:
    """Whether the first cells of a column are times, whatever language names it."""
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        return True
    cells = column.iloc[:_FIRST].astype("string").str.strip().fillna("")
    if time_format is None:
        return bool(cells.str.fullmatch(_DATED).all())
    try:
        form = re.sub(r"Z$", "%z", time_format)
        return bool(pd.to_datetime(cells, format=form, errors="coerce", utc="%z" in form).notna().all())
    except (ValueError, TypeError, re.error):
        return False


def _dyna_columns(table: TableFile, columns: tuple[str, str, str]) -> tuple[str, str, str]:
    """Those of region, time and reading in a LibCity file, where it has others than are named."""
    if set(columns) <= set(table.frame.columns):
        return columns
    named = [name for name in table.frame.columns if name not in ("dyna_id", "type", "time", "entity_id")]
    if not named or not {"time", "entity_id"} <= set(table.frame.columns):
        found = ", ".join(table.frame.columns[:8])
        raise table.source.error(f"the table has the columns {found}; a .dyna file has time, entity_id and a reading")
    return "entity_id", "time", columns[2] if columns[2] in named else named[0]


def _long(table: TableFile, columns: tuple[str, str, str], zone: str | None, form: str | None) -> Rows:
    names, times = (column_of(table, name) for name in columns[:2])
    texts = names_in(names)
    unnamed = (texts.isna() | (texts == "")).to_numpy(bool)
    if unnamed.any():
        row = table.source.row(np.argmax(unnamed))
        raise table.source.error(f"row {row} names no region in column {columns[0]!r}; name it")
    region, ids = pd.factorize(texts)
    when = local_times(times, time_zone=zone, time_format=form, source=table.source)
    return Rows(region.astype(np.int64), when, numbers(table, columns[2:])[:, 0], tuple(map(str, ids)), table.source)


def _wide(table: TableFile, time_column: str, zone: str | None, form: str | None) -> Rows:
    when = local_times(column_of(table, time_column), time_zone=zone, time_format=form, source=table.source)
    regions = [name for name in table.frame.columns if name != time_column]
    values = numbers(table, regions)
    rows, count = values.shape
    return Rows(
        np.tile(np.arange(count), rows),
        repeated_for(when, count),
        values.reshape(-1),
        tuple(regions),
        table.source,
        count,
    )
