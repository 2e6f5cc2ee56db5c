"""In: times whose dates begin with the day or the month. Out: the same in ISO form, by the order that all show."""

import datetime
import re

import numpy as np
import pandas as pd

from gpdiff_jax.ingest.table_file import Source

_DATE = re.compile(
    r"(?P<one>\d{1,2})(?P<mark>[/.-])(?P<two>\d{1,2})(?P=mark)(?P<year>\d{4})"
    r"(?:(?:\s+|,\s*|T)(?P<hour>\d{1,2})(?P<rest>:\d{2}(?::\d{2}(?:[.,]\d+)?)?)?\s*(?P<half>[AaPp][Mm])?(?P<offset>\s*\S+)?)?"
)
_MOST = 0.5  # of the times that differ; where more are such dates, so should be all
_REMEDY = "write ISO dates, as 2026-04-03, or say by --time_format how they are written, e.g. %d/%m/%Y %H:%M"


def iso_times(text: pd.Series, source: Source) -> tuple[pd.Series, str | None]:
    """Writes times with dates as 03/04/2026, 3.4.2026 or 03-04-2026 in ISO form.

    A first part above 12 says that days come first, a second one that months do. Where there is neither, it is the
    order by which the dates are a span of days without holes, if only one is.

    Args:
      text: times, as they are written.
      source: where they come from.

    Returns:
      The times, and in words the order that was taken; the times as they are and None, where most have no such dates.

    Raises:
      InputError: the order cannot be told, the dates contradict each other, or a few times are no such dates.
    """
    distinct = list(dict.fromkeys(map(str, text)))
    found = {time: match for time in distinct if (match := _DATE.fullmatch(time))}
    if len(found) < len(distinct):
        if len(found) > _MOST * len(distinct):
            row = int(np.argmin(text.isin(list(found)).to_numpy(bool)))
            raise source.error(
                f"the time {text.iloc[row]!r} (row {source.row(row)}) in column {text.name!r} is no date, as "
                f"{next(iter(found))!r} and most others are; correct it, or leave the row out"
            )
        return text, None
    parts = np.array([(int(match["one"]), int(match["two"]), int(match["year"])) for match in found.values()])
    first = _day_is_first(parts, distinct, source)
    order = "day before month" if first else "month before day"
    written = {time: _iso(match, first) for time, match in found.items()}
    return text.map(written).astype("string"), f"{order}: {distinct[0]!r} is {written[distinct[0]]}"


def _day_is_first(parts: np.ndarray, times: list[str], source: Source) -> bool:
    """Whether the first part of the dates is the day; else it is the month."""
    above = parts[:, :2] > 12
    if above.any(axis=0).all():
        day, month = (times[int(np.argmax(side))] for side in above.T)
        raise source.error(
            f"some times have the day before the month, as {day!r}, others the month first, as {month!r}; {_REMEDY}"
        )
    if above.any():
        return bool(above[:, 0].any())
    days = {(day, month, year) for day, month, year in parts.tolist()}
    whole = [_is_whole(days), _is_whole({(day, month, year) for month, day, year in days})]
    alike = all(day == month for day, month, _ in days)
    if whole[0] == whole[1] and not alike:
        told = next(time for time, (one, two, _) in zip(times, parts, strict=True) if one != two)
        raise source.error(f"the time {told!r} may have the day or the month first, and no other time tells; {_REMEDY}")
    return alike or whole[0]


def _is_whole(days: set[tuple[int, int, int]]) -> bool:
    """Whether dates (day, month, year) are consecutive days."""
    try:
        numbers = [datetime.date(year, month, day).toordinal() for day, month, year in days]
    except ValueError:
        return False
    return max(numbers) - min(numbers) + 1 == len(days)


def _iso(match: re.Match[str], first: bool) -> str:
    day, month = (match["one"], match["two"]) if first else (match["two"], match["one"])
    date = f"{match['year']}-{month:0>2}-{day:0>2}"
    if match["hour"] is None:
        return date
    hour, half = match["hour"], (match["half"] or "").lower()
    if half and 1 <= int(hour) <= 12:
        hour = str(int(hour) % 12 + 12 * (half == "pm"))
    elif half:
        hour = f"{hour}{half}"  # is no time, and will be said so
    return f"{date}T{hour:0>2}{match['rest'] or ':00'}{(match['offset'] or '').strip()}"
