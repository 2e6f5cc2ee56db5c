"""In: the times of a table. Out: local wall time, and which hours a clock change repeats or skips."""

import re
import zoneinfo
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.dates import iso_times
from gpdiff_jax.ingest.table_file import UNNAMED, Source

_WRITTEN_OFFSET = re.compile(r"\s*(?:Z|[+-]\d{2}(?::?\d{2})?)$")
_NUMBER = re.compile(r"[-+]?\d{1,3}([.,]\d+)?")
_OFFSET = re.compile(r"[T ]\d{2}(?::?\d{2}){0,2}(?:[.,]\d+)?" + _WRITTEN_OFFSET.pattern)
_EARLIEST, _LATEST = np.datetime64("1900-01-01", "s"), np.datetime64("2200-01-01", "s")


class LocalTimes(NamedTuple):
    """When the rows of a table were read, on the clocks of the city."""

    wall: np.ndarray  # datetime64[s] [X]
    repeated: Bool[np.ndarray, " X"]  # within an hour that a clock change repeats
    second: Bool[np.ndarray, " X"]  # within the second time of that hour
    told: bool  # whether the table tells the two apart; else `second` is False everywhere
    seen: tuple[tuple[str, str], ...] = ()  # how times are written, where that had to be found out


def local_times(
    column: pd.Series, *, time_zone: str | None = None, time_format: str | None = None, source: Source = UNNAMED
) -> LocalTimes:
    """Brings the times of a table to local wall time.

    Times without an offset from UTC are taken as local. Those with one are converted to `time_zone`; without that, the
    time that is written is the local one, as in 2024-03-31T01:00+01:00, unless the offset is zero everywhere.

    Args:
      column: text, or datetimes with or without a time zone.
      time_zone: of the city, as "Europe/Berlin". Where it is given, clock changes are known.
      time_format: how text is written, as `datetime.strptime` has it; None for ISO 8601 or,
        where all are so, dates as 03/04/2026, see `iso_times`.
      source: where the column comes from.

    Returns:
      Wall times in whole seconds.

    Raises:
      InputError: a time that cannot be read, dates of which neither the day nor the month can be told, times with and
        without offsets, an unknown time zone, or times in UTC without a time zone.
    """
    zone, seen = check_time_zone(time_zone), ()
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        _refuse_missing(column, column.isna(), source)
        instants, written = pd.DatetimeIndex(column).tz_convert("UTC"), pd.DatetimeIndex(column).tz_localize(None)
    elif pd.api.types.is_datetime64_any_dtype(column.dtype):
        _refuse_missing(column, column.isna(), source)
        return _without_offsets(pd.DatetimeIndex(column), zone, column, source)
    elif pd.api.types.is_numeric_dtype(column.dtype) and time_format is None:
        raise source.error(
            f"the time (={column.iloc[0]}) in column {column.name!r} is a number; write ISO times, e.g. "
            "2024-01-31T14:00, or say by --time_format how they are written"
        )
    else:
        shown = text = column.astype("string").str.strip()
        missing = text.isna() | (text == "")
        if time_format is None:
            _refuse_number(text, missing, source)
        _refuse_missing(column, missing, source)
        if time_format is not None:
            time_format = re.sub(r"Z$", "%z", time_format)
            _check_names_days(time_format, source)
            aware = np.full(len(text), "%z" in time_format)
        else:
            text, order = iso_times(text, source)
            seen = () if order is None else (("dates", order),)
            aware = text.str.contains(_OFFSET).to_numpy(bool)
        if aware.any() and not aware.all():
            row = int(np.argmin(aware))
            raise source.error(
                f"the time {shown.iloc[row]!r} (row {source.row(row)}) in column {column.name!r} has no offset "
                "from UTC and others have one; write all alike"
            )
        if not aware.all():
            return _without_offsets(_read(text, time_format, shown, source, utc=False), zone, column, source)._replace(
                seen=seen
            )
        instants = _read(text, time_format, shown, source, utc=True)
        if zone is None and time_format is not None and not time_format.endswith("%z"):
            raise source.error(f"`time_format` (={time_format!r}) has its offset within; give the city's --time_zone")
        bare = None if time_format is None else re.sub(r"\s*%z$", "", time_format)
        written = (
            instants
            if zone
            else _read(text.str.replace(_WRITTEN_OFFSET, "", regex=True), bare, shown, source, utc=False)
        )
    _check_years(instants, column, source)
    if zone is None:
        made = _as_written(instants, written, column, source)
        return made._replace(seen=seen + made.seen)
    wall = instants.tz_convert(zone).tz_localize(None)
    repeated = _is_repeated(wall, zone)
    first = wall.tz_localize(zone, ambiguous=np.ones(len(wall), bool), nonexistent="shift_forward").tz_convert("UTC")
    return LocalTimes(_seconds(wall), repeated, repeated & np.asarray(first != instants), True, seen)


def repeated_for(times: LocalTimes, regions: int) -> LocalTimes:
    """The times of a table with a row for all regions, for each of them, region after region within a row."""
    wall, repeated, second = (np.repeat(part, regions) for part in (times.wall, times.repeated, times.second))
    return LocalTimes(wall, repeated, second, times.told, times.seen)


def skipped_steps(steps: np.ndarray, time_zone: str) -> Bool[np.ndarray, " T"]:
    """Which moments the clocks of a time zone never show, for they are put forward over them.

    Args:
      steps: datetime64 [T], wall times.
      time_zone: as "Europe/Berlin".

    Returns:
      bool [T].
    """
    index = pd.DatetimeIndex(steps)
    return np.asarray(index.tz_localize(time_zone, ambiguous=np.ones(len(index), bool), nonexistent="NaT").isna())


def check_time_zone(time_zone: str | None) -> str | None:
    """Returns the name of a time zone; raises `InputError` where there is none of that name."""
    if time_zone is not None:
        try:
            zoneinfo.ZoneInfo(time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise InputError(
                f"`time_zone` (={time_zone!r}) is unknown; name one of the IANA database, e.g. Europe/Berlin"
            ) from None
    return time_zone


def _check_names_days(time_format: str, source: Source) -> None:
    """Raises `InputError` where a format leaves out the year, the month or the day, which then would be made up."""
    day = pd.Timestamp("2023-11-28T22:33:44", tz="UTC")
    try:
        again = pd.to_datetime(day.strftime(time_format), format=time_format, utc=True)
    except (ValueError, TypeError, re.error):
        return  # which is said of the times themselves
    if again.date() != day.date():
        raise source.error(
            f"`time_format` (={time_format!r}) does not tell year, month and day; write the times with all of them"
        )


def _read(text: pd.Series, time_format: str | None, shown: pd.Series, source: Source, *, utc: bool) -> pd.DatetimeIndex:
    try:
        read = pd.DatetimeIndex(pd.to_datetime(text, format=time_format or "ISO8601", utc=utc, errors="coerce"))
    except (ValueError, TypeError, re.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise source.error(f"the times in column {text.name!r} cannot be read ({reason}); mend --time_format") from None
    wrong = np.asarray(read.isna())
    if wrong.any():
        row = int(np.argmax(wrong))
        wanted = "as 2024-01-31T14:00" if time_format is None else f"as --time_format (={time_format!r}) says"
        raise source.error(
            f"the time {shown.iloc[row]!r} (row {source.row(row)}) in column {text.name!r} cannot be read; write times "
            f"{wanted}, or say by --time_format how they are written, e.g. %d/%m/%Y %H:%M"
        )
    return read


def _refuse_number(text: pd.Series, missing: pd.Series, source: Source) -> None:
    """Raises `InputError` where the first time is a number of so few digits that it is none."""
    if missing.all():
        return
    row = int(np.argmin(missing.to_numpy(bool)))
    if _NUMBER.fullmatch(text.iloc[row]):
        raise source.error(
            f"the time {text.iloc[row]!r} (row {source.row(row)}) in column {text.name!r} is a number; write times as "
            "2024-01-31T14:00, or say by --time_format how they are written; --columns names region, time and reading "
            "in this order"
        )


def _refuse_missing(column: pd.Series, missing: pd.Series, source: Source) -> None:
    if missing.any():
        row = int(np.argmax(missing.to_numpy(bool)))
        raise source.error(
            f"row {source.row(row)} has no time in column {column.name!r}; give it one or leave the row out"
        )


def _check_years(index: pd.DatetimeIndex, column: pd.Series, source: Source) -> None:
    seconds = _seconds(index.tz_localize(None))
    wrong = (seconds < _EARLIEST) | (seconds > _LATEST)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise source.error(
            f"the time {str(column.iloc[row])!r} (row {source.row(row)}) in column {column.name!r} lies outside the "
            "years 1900 to 2199; correct it, or leave the row out"
        )


def _without_offsets(wall: pd.DatetimeIndex, zone: str | None, column: pd.Series, source: Source) -> LocalTimes:
    if wall.tz is not None:
        raise source.error(
            f"the times in column {column.name!r} have offsets from UTC in a form that is not read; use ISO"
        )
    _check_years(wall, column, source)
    never = np.zeros(len(wall), bool)
    return LocalTimes(_seconds(wall), never if zone is None else _is_repeated(wall, zone), never, False)


def _as_written(instants: pd.DatetimeIndex, written: pd.DatetimeIndex, column: pd.Series, source: Source) -> LocalTimes:
    wall, moments = _seconds(written), _seconds(instants.tz_localize(None)).astype(np.int64)
    offsets = wall.astype(np.int64) - moments
    if not offsets.any():
        raise source.error(
            f"the times in column {column.name!r} are in UTC, as {str(column.iloc[0])!r}, which says nothing of the "
            "city's clocks; give its --time_zone, e.g. Asia/Shanghai, or --time_zone UTC where its clocks show that"
        )
    at = int(np.argmax(offsets != 0))
    told = f"as written, offsets from UTC left aside: {str(column.iloc[at])!r} is {written[at]} on the city's clocks"
    repeated, second = np.zeros(len(wall), bool), np.zeros(len(wall), bool)
    order = np.argsort(moments, kind="stable")
    change = np.flatnonzero(np.diff(offsets[order]) < 0)
    for at in change:
        # Clocks are put back on a whole hour (or half an hour), by which the first reading after it lies.
        back = int(offsets[order[at]] - offsets[order[at + 1]])
        begin = int(wall[order[at + 1]].astype(np.int64)) // back * back
        near = np.abs(moments - moments[order[at + 1]]) <= 2 * back
        within = near & (wall.astype(np.int64) >= begin) & (wall.astype(np.int64) < begin + back)
        later = within & (offsets == offsets[order[at + 1]])
        if (within & ~later).any():
            repeated |= within
            second |= later
    return LocalTimes(wall, repeated, second, True, (("times", told),))


def _is_repeated(wall: pd.DatetimeIndex, zone: str) -> Bool[np.ndarray, " X"]:
    return np.asarray(wall.tz_localize(zone, ambiguous="NaT", nonexistent="shift_forward").isna())


def _seconds(index: pd.DatetimeIndex) -> np.ndarray:
    return np.asarray(index.to_numpy(), "datetime64[s]")
