"""In: a table of readings, long or wide. Out: readings at regular steps of local time, and what was done to them."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import MINUTES_PER_DAY, check_interval
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.clock import LocalTimes, local_times, skipped_steps

DUPLICATES = ("refuse", "sum", "mean", "last")
LONG = ("unique_id", "ds", "y")
_TIME_NAMES = ("ds", "time", "timestamp", "date", "datetime", "")
_MOST_STEPS = 20_000_000  # of one region: 38 years of minutes
# Times that lie within a quarter of an interval of its grid are late or early; else they are moments within bins.
_LATE, _NEARLY_ALL = 0.25, 0.95


class Rows(NamedTuple):
    """A table of readings, a row for each."""

    region: Int[np.ndarray, " X"]  # index in `ids`
    times: LocalTimes  # [X]
    values: Float[np.ndarray, " X"]  # NaN where missing
    ids: tuple[str, ...]


class Grid(NamedTuple):
    """Readings at regular steps, and what happened to them."""

    values: Float[np.ndarray, "T N"]  # NaN where missing
    ids: tuple[str, ...]
    start: np.datetime64 | None  # datetime64[m], local time of step 0; None where the file has no times
    interval_minutes: int
    duplicates: int  # rows that had the region and time of another
    moved: int  # readings whose time was not on the grid
    repeated: int  # steps that a clock change repeats
    skipped: int  # steps that a clock change skips


def read_rows(
    path: str | os.PathLike[str],
    *,
    columns: tuple[str, str, str] = LONG,
    time_zone: str | None = None,
    time_format: str | None = None,
) -> Rows:
    """Reads a table of readings, CSV or Parquet.

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
    path = pathlib.Path(path).expanduser()
    table = read_table(path)
    if path.suffix == ".dyna":
        columns = _dyna_columns(table, columns)
        if time_zone is None:
            table[columns[1]] = column_of(table, columns[1]).astype("string").str.strip().str.removesuffix("Z")
    if set(columns) <= set(table.columns):
        return _long(table, columns, time_zone, time_format)
    found = ", ".join(map(str, table.columns[:8])) + (", ..." if len(table.columns) > 8 else "")
    if table.shape[1] < 2:
        raise InputError(
            f"the table has the columns {found}; a long one needs {', '.join(columns)}, a wide one times and then a "
            "column for every region"
        )
    present = [name for name in (columns[1], *_TIME_NAMES) if name in table.columns]
    if not present and not str(table.columns[0]).lower().startswith(("date", "time", "unnamed: 0")):
        raise InputError(
            f"the table has the columns {found}, none of them a time; a long one needs {', '.join(columns)}, a wide "
            f"one a column {columns[1]!r} and one for every region"
        )
    return _wide(table, present[0] if present else str(table.columns[0]), time_zone, time_format)


def read_table(path: pathlib.Path) -> pd.DataFrame:
    """Reads CSV, all of it as text, or Parquet; raises `InputError` where that is neither or holds no row."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; check the path")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except ImportError:
        raise InputError(
            f"{path} is Parquet, which needs pyarrow; pip install 'gpdiff_jax[data]', or write CSV"
        ) from None
    except (ValueError, OSError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path} cannot be read as {path.suffix.lstrip('.') or 'CSV'} ({reason}); check the file"
        ) from None
    if table.empty:
        raise InputError(f"{path} holds no row; give a table with readings")
    table.columns = [str(name).strip() for name in table.columns]
    return table


def _dyna_columns(table: pd.DataFrame, columns: tuple[str, str, str]) -> tuple[str, str, str]:
    """Those of region, time and reading in a LibCity file, where it has others than are named."""
    if set(columns) <= set(table.columns):
        return columns
    named = [name for name in table.columns if name not in ("dyna_id", "type", "time", "entity_id")]
    if not named or not {"time", "entity_id"} <= set(table.columns):
        found = ", ".join(table.columns[:8])
        raise InputError(f"the table has the columns {found}; a .dyna file has time, entity_id and a reading")
    return "entity_id", "time", columns[2] if columns[2] in named else named[0]


def _long(table: pd.DataFrame, columns: tuple[str, str, str], zone: str | None, form: str | None) -> Rows:
    names, times, readings = (column_of(table, name) for name in columns)
    texts = names.astype("string").str.strip()
    unnamed = (texts.isna() | (texts == "")).to_numpy(bool)
    if unnamed.any():
        raise InputError(f"row {int(np.argmax(unnamed)) + 1} names no region in column {columns[0]!r}; name it")
    region, ids = pd.factorize(texts)
    when = local_times(times, time_zone=zone, time_format=form)
    return Rows(region.astype(np.int64), when, numbers(readings), tuple(map(str, ids)))


def _wide(table: pd.DataFrame, time_column: str, zone: str | None, form: str | None) -> Rows:
    when = local_times(column_of(table, time_column), time_zone=zone, time_format=form)
    regions = [name for name in table.columns if name != time_column]
    values = np.stack([numbers(column_of(table, name)) for name in regions], axis=1)
    rows, count = values.shape
    spread = LocalTimes(*(np.repeat(part, count) for part in when))
    return Rows(np.tile(np.arange(count), rows), spread, values.reshape(-1), tuple(regions))


def column_of(table: pd.DataFrame, name: str) -> pd.Series:
    """A column; raises `InputError` where the table has two of that name."""
    column = table[name]
    if not isinstance(column, pd.Series):
        raise InputError(f"the table has two columns {name!r}; rename one")
    return column


def numbers(column: pd.Series) -> Float[np.ndarray, " X"]:
    """A column as float64; an empty cell, and what stands for one, is NaN. Raises `InputError` at any other text."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(np.float64, na_value=np.nan)
    text = column.astype("string").str.strip().fillna("")
    missing = text.str.lower().isin(["", "nan", "na", "n/a", "null", "none"]).to_numpy(bool)
    read = np.asarray(pd.to_numeric(text.where(~missing), errors="coerce"), np.float64)
    wrong = ~missing & ~np.isfinite(read)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"the reading {text.iloc[row]!r} (row {row + 1}, column {column.name!r}) is no number; correct it, or "
            "leave it empty where it is missing"
        )
    return read


def grid(
    rows: Rows,
    *,
    counts: bool,
    interval_minutes: int | None = None,
    duplicates: str = "refuse",
    time_zone: str | None = None,
) -> Grid:
    """Puts readings on regular steps of local time.

    Times that come a little late or early move to their step; where times lie anywhere, all readings of a bin are
    summed (counts) or averaged (speeds). The hour that a clock change repeats holds the mean of its two times, so a
    count is half of their sum; the hour that it skips is missing. A step without a row is missing.

    Args:
      rows: in any order.
      counts: whether readings are counts per interval; else they are averaged.
      interval_minutes: what the city is to have; where the table has a regular one that divides it, that is kept, for
        `resample` to bring it there. None takes the most frequent distance of a region's times.
      duplicates: what to do with several rows of one region and time: "refuse", "sum", "mean" or "last".
      time_zone: of the city, to tell skipped hours.

    Returns:
      The grid, from the first to the last reading.

    Raises:
      InputError: duplicates, times too few or too irregular to see an interval in, one that does not divide a day, a
        span that is too long, or not one reading.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"`duplicates` must be one of {', '.join(DUPLICATES)}, got {duplicates!r}")
    order = np.lexsort((np.arange(len(rows.region)), rows.times.second, rows.times.wall, rows.region))
    region, values = rows.region[order], rows.values[order]
    wall, repeated, second = (part[order] for part in rows.times)
    same = np.concatenate(
        [[False], (region[1:] == region[:-1]) & (wall[1:] == wall[:-1]) & (second[1:] == second[:-1])]
    )
    # Of a clock change that the table does not tell, two rows at one time are the two times of that hour.
    untold = same & repeated & ~second
    untold &= ~np.concatenate([[False], untold[:-1]])
    second = second | untold
    same &= ~untold
    if same.any() and duplicates == "refuse":
        raise InputError(_duplicate_line(int(np.argmax(same)), same, region, wall, rows.ids))
    group = np.cumsum(~same) - 1
    first = np.flatnonzero(~same)
    values = _reduced(values, group, len(first), duplicates)
    region, wall, repeated, second = (part[first] for part in (region, wall, repeated, second))
    return _binned(
        region, wall, repeated, second, values, rows.ids, counts, interval_minutes, int(same.sum()), time_zone
    )


def _duplicate_line(at: int, same: np.ndarray, region: np.ndarray, wall: np.ndarray, ids: tuple[str, ...]) -> str:
    more = int(same.sum()) - 1
    also = f" and {more} more rows like it" if more else ""
    return (
        f"region {ids[region[at]]!r} has several readings at {wall[at]}{also}; say by `duplicates` (--duplicates "
        "sum, mean or last) what to do with them, or by --time_zone when clocks change, if they come from that"
    )


def _reduced(values: np.ndarray, group: np.ndarray, count: int, how: str) -> Float[np.ndarray, " X"]:
    """One value for every group of duplicates, which are in the order of the table; missing ones count for nothing."""
    read = np.isfinite(values)
    if how == "last":
        last = np.full(count, np.nan)
        last[group[read]] = values[read]  # of several, numpy keeps the last
        return last
    total = np.bincount(group, np.where(read, values, 0.0), count)
    number = np.bincount(group, read, count)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / np.where(how == "mean", np.maximum(number, 1), 1), np.nan)


def _binned(
    region: np.ndarray,
    wall: np.ndarray,
    repeated: np.ndarray,
    second: np.ndarray,
    values: np.ndarray,
    ids: tuple[str, ...],
    counts: bool,
    interval_minutes: int | None,
    duplicates: int,
    time_zone: str | None,
) -> Grid:
    if not np.isfinite(values).any():
        raise InputError("the table holds not one reading; give one with numbers in it")
    since = wall.astype(np.int64)
    interval = _interval(region, since, interval_minutes)
    length = 60 * interval
    offset, regular = _phase(since, length)
    slot = np.rint((since - offset) / length).astype(np.int64) if regular else since // length
    moved = int((since != slot * length).sum())
    begin, end = int(slot.min()), int(slot.max()) + 1
    if end - begin > _MOST_STEPS:
        moments = f"{wall.min()} to {wall.max()}"
        raise InputError(
            f"the times run from {moments}, {end - begin} steps of {interval} minutes; correct those that are wrong"
        )
    shape = (end - begin, len(ids), 2)
    cell = ((slot - begin) * len(ids) + region) * 2 + second
    read = np.isfinite(values)
    size = int(np.prod(shape))
    total = np.bincount(cell[read], values[read], size).reshape(shape)
    number = np.bincount(cell[read], minlength=size).reshape(shape)
    once = np.where(number > 0, total if counts else total / np.maximum(number, 1), 0.0)
    passes = (number > 0).sum(axis=2)
    if not regular and counts and not second.any():
        # The two times of a repeated hour lie in one bin, and nothing tells them apart.
        passes[slot[repeated] - begin] *= 2
    twice = np.zeros(end - begin, bool)
    twice[slot[repeated] - begin] = True
    with np.errstate(invalid="ignore"):
        gridded = np.where(passes > 0, once.sum(axis=2) / np.maximum(passes, 1), np.nan)
    start = np.datetime64(begin * interval, "m")
    steps = start + np.arange(end - begin) * np.timedelta64(interval, "m")
    skipped = 0 if time_zone is None else int(skipped_steps(steps, time_zone).sum())
    return Grid(gridded.astype(np.float32), ids, start, interval, duplicates, moved, int(twice.sum()), skipped)


def _interval(region: np.ndarray, since: np.ndarray, asked: int | None) -> int:
    """The interval of the steps: that of the table where it has one and what is asked for is a multiple of it."""
    own = _own_interval(region, since)
    if asked is not None:
        check_interval(asked)
        if own is not None and asked % own == 0 and MINUTES_PER_DAY % own == 0 and _phase(since, 60 * own)[1]:
            return own
        return asked
    if own is None:
        raise InputError("no interval can be seen in the times; say by --interval_minutes how long a step is, e.g. 60")
    if MINUTES_PER_DAY % own:
        raise InputError(
            f"the times lie {own} minutes apart, which does not divide a day; say by --interval_minutes how long the "
            "steps of the city are to be, e.g. 60"
        )
    return own


def _own_interval(region: np.ndarray, since: np.ndarray) -> int | None:
    """The most frequent distance in minutes of a region's times; None where it is not that of half of them."""
    minutes = np.rint(np.diff(since)[region[1:] == region[:-1]] / 60).astype(np.int64)
    minutes = minutes[minutes > 0]
    if not len(minutes):
        return None
    found, count = np.unique(minutes, return_counts=True)
    most = int(found[np.argmax(count)])
    return most if (np.abs(minutes - most) <= _LATE * most).mean() >= 0.5 else None


def _phase(since: np.ndarray, length: int) -> tuple[int, bool]:
    """How far from whole steps the times lie, in seconds, and whether all lie so, but for what is late or early."""
    turn = 2 * np.pi * (since % length) / length
    phase = int(np.rint(np.angle(np.exp(1j * turn).mean()) * length / (2 * np.pi)))
    apart = np.abs((since - phase + length // 2) % length - length // 2)
    regular = bool((apart <= _LATE * length).mean() >= _NEARLY_ALL)
    return (phase if regular else 0), regular
