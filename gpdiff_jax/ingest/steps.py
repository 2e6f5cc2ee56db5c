"""In: rows of readings at any times. Out: readings at regular steps of local time, and what was done to them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.cities.city import MINUTES_PER_DAY, check_interval
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.clock import skipped_steps
from gpdiff_jax.ingest.readings import Rows
from gpdiff_jax.ingest.table_file import UNNAMED, Source

DUPLICATES = ("refuse", "sum", "mean", "last")
_MOST_CELLS = 2**28  # steps x regions, 1 GiB of float32: a year of minutes of 500 regions
# Times that lie within a quarter of an interval of a region's steps are late or early; else they lie anywhere.
_LATE, _NEARLY_ALL = 0.25, 0.95
_HOLE = 30  # days without a row, of which is told


class Grid(NamedTuple):
    """Readings at regular steps, and what happened to them."""

    values: Float[np.ndarray, "T N"]  # NaN where missing
    ids: tuple[str, ...]
    start: np.datetime64 | None  # datetime64[m], local time of step 0; None where the file has no times
    interval_minutes: int
    duplicates: int  # rows that had the region and step of another
    moved: int  # readings whose time was not on a step
    repeated: int  # steps that a clock change repeats, of those that were read both times
    skipped: int  # steps that a clock change skips, without a reading
    seen: tuple[tuple[str, str], ...] = ()  # how the file is written, where that had to be found out
    source: Source = UNNAMED


class _Steps(NamedTuple):
    """On which step every row lies."""

    slot: Int[np.ndarray, " X"]  # steps since 1970, local time
    interval: int  # minutes
    regular: bool  # whether every region was read once a step, but for what is late, early or missing
    moved: int


def grid(
    rows: Rows,
    *,
    counts: bool,
    interval_minutes: int | None = None,
    duplicates: str = "refuse",
    time_zone: str | None = None,
) -> Grid:
    """Puts readings on regular steps of local time.

    Where a region's times lie a constant while after the begin of its steps, or a little late or early, each reading is
    one step's. Where they lie anywhere, all readings of a step are summed (counts) or averaged (speeds). What is read
    in an hour that a clock change repeats counts by half, since the step holds that hour twice: a count is half of the
    sum, a speed the mean. A step without a row is missing, as are those that a clock change skips, and what is read
    while the clocks skip.

    Args:
      rows: in any order.
      counts: whether readings are counts per interval; else they are averaged.
      interval_minutes: what the city is to have; where the table has a regular one that divides it, that is kept, for
        `resample` to bring it there. None takes the most frequent distance of a region's times.
      duplicates: what to do with several rows of one region and step (of one time, where times lie anywhere):
        "refuse", "sum", "mean" or "last".
      time_zone: of the city, to tell skipped hours.

    Returns:
      The grid, from the first to the last row.

    Raises:
      InputError: duplicates; times in which no interval is seen, or one that does not divide a day or what is asked
        for; more steps and regions than can be held; not one reading; a negative one.
    """
    if duplicates not in DUPLICATES:
        raise InputError(f"`duplicates` must be one of {', '.join(DUPLICATES)}, got {duplicates!r}")
    if not np.isfinite(rows.values).any():
        raise rows.source.error("the table holds not one reading; give one with numbers in it")
    steps = _steps(rows, interval_minutes)
    rows, odd = _without_skipped(rows, time_zone, steps.interval if steps.regular else 0)
    begin, length = int(steps.slot.min()), int(np.ptp(steps.slot)) + 1
    if length * len(rows.ids) > _MOST_CELLS:
        raise rows.source.error(
            f"the times run from {rows.times.wall.min()} to {rows.times.wall.max()}, {length} steps of "
            f"{steps.interval} minutes for {len(rows.ids)} regions; correct those that are wrong, or give a "
            "longer interval"
        )
    # Rows that are one reading lie side by side, in the order of the table.
    place = steps.slot if steps.regular else rows.times.wall.astype(np.int64)
    order = np.lexsort((rows.times.second, place, rows.region))
    region, place, slot = (part[order] for part in (rows.region, place, steps.slot))
    repeated, second, values = (part[order] for part in (rows.times.repeated, rows.times.second, rows.values))
    same = np.concatenate([[False], (np.diff(region) == 0) & (np.diff(place) == 0) & (second[1:] == second[:-1])])
    if not rows.times.told:
        # Two rows at one time are then the two times of that hour.
        untold = same & repeated
        untold &= ~np.concatenate([[False], untold[:-1]])
        same, second = same & ~untold, second | untold
    if same.any() and duplicates == "refuse":
        raise rows.source.error(_duplicate_line(rows, order, same))
    first, group = np.flatnonzero(~same), np.cumsum(~same) - 1
    reduced = _reduced(values, group, len(first), duplicates)
    # Of several that are summed, as corrections are, or of which the last counts, some may be negative.
    negative = (values < 0) & ((duplicates == "mean") | (reduced < 0)[group])
    if negative.any():
        raise rows.source.error(_negative_line(rows, order[negative]))
    values = reduced
    region, slot, repeated, second = (part[first] for part in (region, slot, repeated, second))
    cell = (slot - begin) * len(rows.ids) + region
    weight = _weights(cell, repeated, second, values, steps.regular, rows.times.told)
    gridded = _combined(cell, values, weight, length * len(rows.ids), counts).reshape(length, len(rows.ids))
    start = np.datetime64(begin * steps.interval, "m")
    walls = start + np.arange(length) * np.timedelta64(steps.interval, "m")
    unread = np.isnan(gridded).all(axis=1)
    skipped = 0 if time_zone is None else int((skipped_steps(walls, time_zone) & unread).sum())
    twice = len(np.unique(slot[weight < 1]))
    return Grid(
        gridded,
        rows.ids,
        start,
        steps.interval,
        int(same.sum()),
        steps.moved,
        twice,
        skipped,
        (*rows.times.seen, *odd, *_odd_times(rows)),
        rows.source,
    )


def _without_skipped(rows: Rows, time_zone: str | None, interval: int) -> tuple[Rows, tuple[tuple[str, str], ...]]:
    """The rows, without readings of so many minutes that the city's clocks never show, and a line that says so."""
    if time_zone is None or rows.times.told:
        return rows, ()
    walls = rows.times.wall[:: rows.per_row]
    never = skipped_steps(walls, time_zone)
    # A day that begins within the skipped hour was read after it.
    last = walls[never] + np.timedelta64(max(60 * interval - 1, 0), "s")
    never[never] = skipped_steps(last, time_zone)
    never = np.repeat(never, rows.per_row) & np.isfinite(rows.values)
    if not never.any():
        return rows, ()
    first = int(np.argmax(never))
    line = (
        f"{never.sum()} readings at times that the clocks of {time_zone} skip are missing, the first at "
        f"{rows.times.wall[first]}{_row(rows, first)}; if the counters' clocks are not put forward, later times are "
        "wrong too: name the zone that they show by --time_zone, as Etc/GMT-1, which is UTC+1 all the year"
    )
    return rows._replace(values=np.where(never, np.nan, rows.values)), (("clocks", line),)


def _odd_times(rows: Rows) -> tuple[tuple[str, str], ...]:
    """Lines on a hole of many days between rows, and on rows of days to come: dates may be mistyped."""
    walls, found = rows.times.wall[:: rows.per_row], []
    order = np.argsort(walls, kind="stable")
    days = np.diff(walls[order]) / np.timedelta64(1, "D")
    if len(days) and days.max() >= _HOLE:
        last, first = order[np.argmax(days)], order[np.argmax(days) + 1]
        found.append(
            (
                "hole",
                f"no row between {walls[last]} and {walls[first]}{_row(rows, first * rows.per_row)}, "
                f"{days.max():.0f} days; correct the dates if they are mistyped",
            )
        )
    ahead = walls > np.datetime64("now", "s") + np.timedelta64(1, "D")
    if ahead.any():
        first = int(np.argmax(ahead))
        found.append(
            (
                "ahead",
                f"{ahead.sum()} times lie after today, the first {walls[first]}{_row(rows, first * rows.per_row)}; "
                "correct them if they are mistyped",
            )
        )
    return tuple(found)


def _row(rows: Rows, at: int | np.integer) -> str:
    """Where a row stands in its file, in brackets; nothing where there is none."""
    return "" if rows.source.path is None else f" (row {rows.source.row(int(at) // rows.per_row)})"


def _weights(
    cell: np.ndarray, repeated: np.ndarray, second: np.ndarray, values: np.ndarray, regular: bool, told: bool
) -> Float[np.ndarray, " X"]:
    """Half for what was read in an hour that was there twice, if it was read twice; else 1."""
    weight = np.where(repeated, 0.5, 1.0)
    if regular or told:
        read = np.isfinite(values)
        once, again = (np.unique(cell[repeated & read & (second == time)]) for time in (False, True))
        weight = np.where(np.isin(cell, np.intersect1d(once, again)), weight, 1.0)
    return weight


def _combined(
    cell: np.ndarray, values: np.ndarray, weight: np.ndarray, size: int, counts: bool
) -> Float[np.ndarray, " cells"]:
    """Weighted sums (counts) or means of the readings of every cell, as float32; NaN where there is none."""
    read = np.isfinite(values)
    cells, inverse = np.unique(cell[read], return_inverse=True)
    total = np.bincount(inverse, weight[read] * values[read], len(cells))
    if not counts:
        total /= np.bincount(inverse, weight[read], len(cells))
    made = np.full(size, np.nan, np.float32)
    with np.errstate(over="ignore"):  # what becomes infinite is refused as a reading
        made[cells] = total
    return made


def _duplicate_line(rows: Rows, order: Int[np.ndarray, " X"], same: Bool[np.ndarray, " X"]) -> str:
    """What to say of rows, sorted by `order`, of which some are of the region and time of the one before."""
    at, more = int(order[np.argmax(same)]), int(same.sum()) - 1
    also = f" and {more} more rows like it" if more else ""
    where = f"{rows.times.wall[at]}{_row(rows, at)}{also}"
    return (
        f"region {rows.ids[rows.region[at]]!r} has several readings at {where}; say "
        "by `duplicates` (--duplicates sum, mean or last) what to do with them, or by --time_zone when clocks change, "
        "if they come from that"
    )


def _negative_line(rows: Rows, negative: Int[np.ndarray, " X"]) -> str:
    """What to say of the rows whose readings are negative."""
    at = int(negative.min())
    row = None if rows.source.path is None else rows.source.row(at // rows.per_row)
    where = f"region {rows.ids[rows.region[at]]!r} at {rows.times.wall[at]}"
    return negative_line(rows.source, rows.values[at], row, where, len(negative) - 1)


def negative_line(source: Source, value: float, row: int | None, where: str, more: int) -> str:
    """What to say of a negative reading in a file, and of so many more."""
    said, also = "" if row is None else f" (row {row})", f", as are {more} more" if more else ""
    is_table = source.separator is not None or (source.path is not None and source.path.suffix == ".parquet")
    remedy = "leave the cell empty" if is_table else "store NaN"
    return f"the reading {value:.7g}{said} of {where} is negative{also}; where a reading is missing, {remedy}"


def _reduced(values: np.ndarray, group: np.ndarray, count: int, how: str) -> Float[np.ndarray, " X"]:
    """One value for every group of duplicates, which are in the order of the table; missing ones count for nothing."""
    read = np.isfinite(values)
    if how == "last":
        last = np.full(count, np.nan)
        last[group[read]] = values[read]  # of several, numpy keeps the last
        return last
    total = np.bincount(group, np.where(read, values, 0.0), count)
    number = np.bincount(group, read, count)
    divisor = np.maximum(number, 1) if how == "mean" else np.ones(count)
    return np.where(number > 0, total / divisor, np.nan)


def _steps(rows: Rows, asked: int | None) -> _Steps:
    """The interval of the table and the step of every row; at the interval that is asked for where it has none."""
    since = rows.times.wall.astype(np.int64)
    own = _own_interval(rows.region, since)
    if own is not None and MINUTES_PER_DAY % own == 0:
        phase, regular = _phases(rows.region, since, 60 * own, len(rows.ids))
        if regular:
            if asked is not None and asked % own:
                check_interval(asked)
                raise rows.source.error(
                    f"the readings lie {own} minutes apart, and `interval_minutes` (={asked}) is no multiple of that; "
                    "choose one that is"
                )
            slot = np.floor_divide(since - phase[rows.region] + 30 * own, 60 * own)
            return _Steps(slot, own, True, int((since != slot * 60 * own).sum()))
    if asked is None:
        what = "no interval can be seen in the times"
        if own is not None and MINUTES_PER_DAY % own:
            what = f"the times lie {own} minutes apart, which does not divide a day"
        raise rows.source.error(f"{what}; say by --interval_minutes how long the steps of the city are to be, e.g. 60")
    check_interval(asked)
    slot = np.floor_divide(since, 60 * asked)
    return _Steps(slot, asked, False, int((since != slot * 60 * asked).sum()))


def _own_interval(region: Int[np.ndarray, " X"], since: Int[np.ndarray, " X"]) -> int | None:
    """The most frequent distance in minutes of a region's times; None where it is not that of half of them."""
    order = np.lexsort((since, region))
    gaps = np.diff(since[order])[np.diff(region[order]) == 0]
    gaps = gaps[gaps >= 30]
    minutes = np.maximum(np.rint(gaps / 60).astype(np.int64), 1)
    if not len(gaps):
        return None
    found, count = np.unique(minutes, return_counts=True)
    most = int(found[np.argmax(count)])
    return most if (np.abs(gaps - 60 * most) <= _LATE * 60 * most).mean() >= 0.5 and _is_whole(gaps, most) else None


def _is_whole(gaps: Int[np.ndarray, " X"], minutes: int) -> bool:
    """Whether distances in seconds are about so many minutes, as a minute and a half is not about two."""
    near = gaps[np.abs(gaps - 60 * minutes) <= _LATE * 60 * minutes]
    return bool(abs(np.median(near) - 60 * minutes) <= 0.1 * 60 * minutes)


def _phases(
    region: Int[np.ndarray, " X"], since: Int[np.ndarray, " X"], length: int, count: int
) -> tuple[Int[np.ndarray, " N"], bool]:
    """How many seconds after the begin of a step every region is read, and whether all are read so, or nearly.

    A little before a step, with others as much after it, is on it; constantly before it is late in the one before.
    """
    turn = 2 * np.pi * (since % length) / length
    turned = (np.bincount(region, part(turn), count) for part in (np.cos, np.sin))
    cosine, sine = turned
    phase = np.rint(np.arctan2(sine, cosine) * length / (2 * np.pi)).astype(np.int64)
    apart = np.abs((since - phase[region] + length // 2) % length - length // 2)
    near = apart <= _LATE * length
    spread = np.zeros(count, np.int64)
    np.maximum.at(spread, region[near], apart[near])
    on_step = np.abs(phase) <= spread
    return np.where(on_step, 0, phase % length), bool(near.mean() >= _NEARLY_ALL)
