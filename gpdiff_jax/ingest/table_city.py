"""In: readings on a grid, and weights between their regions. Out: a checked city, and what was seen in its tables."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities import City, PartialBins, check_city, partial_bins, resample
from gpdiff_jax.cities.above import told_above
from gpdiff_jax.cities.city import edges_of
from gpdiff_jax.errors import check_at_least
from gpdiff_jax.ingest.graph import Sites
from gpdiff_jax.ingest.steps import Grid

_ENOUGH_STEPS, _TOTAL_SHARE = 10, 0.95  # of which a column of totals is told


class TableFacts(NamedTuple):
    """What was seen in the tables of a city, and what the city is that was made of them."""

    regions: int
    without_reading: tuple[str, ...]  # regions that were left out, and sites of which the readings have none
    first: np.datetime64 | None  # local time of the first step; None where it is not known
    steps: int
    interval_minutes: int  # of the city
    missing: float  # share of the steps of all regions
    zeros: float  # share of the readings; where zeros are missing, of those of the tables
    duplicates: int
    moved: int
    repeated: int
    skipped: int
    edges: int
    isolated: int  # regions without an edge
    seen: tuple[tuple[str, str], ...] = ()  # how the tables are written, where that had to be found out
    zeros_missing: bool = False  # whether zeros were taken as missing
    table_interval_minutes: int | None = None  # of the tables, where the city has a longer one
    kind: str = ""
    bins: PartialBins | None = None  # what was read in part, where the city has a longer interval than its tables
    above: str | None = None  # which readings were missing by `missing_above`


def table_city(
    grid: Grid,
    adjacency: Float[np.ndarray, "N N"],
    *,
    name: str,
    kind: str,
    quantity: str,
    interval_minutes: int | None = None,
    zero_is_missing: bool = False,
    missing_above: float | None = None,
    sites: Sites | None = None,
) -> tuple[City, TableFacts]:
    """Makes a city of what its tables hold.

    Args:
      grid: the readings.
      adjacency: weights between the regions, row = from, column = to.
      name: of the city, letters, digits and _.:-.
      kind: "speed", "stock", "flow" or "crowd".
      quantity: what is read, as "entries" or "speed_kmh".
      interval_minutes: to which the city is brought; None keeps that of the tables.
      zero_is_missing: whether a reading of 0 is none, as it always is of a speed.
      missing_above: above which value readings are missing.
      sites: where the regions lie.

    Returns:
      The city, without regions that have no reading, and what was seen; steps, missing readings and zeros are those
      of the city.

    Raises:
      InputError: no reading is left, or the city breaks a rule of `check_city`.
    """
    check_at_least(0, {"missing_above": missing_above})
    values, zeros_missing, above = grid.values, zero_is_missing or kind == "speed", None
    zeros = _share_of_zeros(values)
    if zeros_missing:
        values = np.where(values == 0, np.float32(np.nan), values)
    if missing_above is not None:
        when = {"interval_minutes": grid.interval_minutes, "start": grid.start}
        above = told_above(values, missing_above, ids=grid.ids, **when)
        values = np.where(values > missing_above, np.float32(np.nan), values)
    kept = np.isfinite(values).any(axis=0)
    if not kept.any():
        raise grid.source.error("no region has a reading; give tables with numbers, or a larger `missing_above`")
    weights = adjacency[np.ix_(kept, kept)]
    senders, receivers, strengths = edges_of(weights)
    linked = np.union1d(senders, receivers)
    ids = np.asarray(grid.ids, object)
    city = City(
        name=name,
        kind=kind,
        values=np.ascontiguousarray(values[:, kept, None]),
        senders=senders,
        receivers=receivers,
        weights=strengths,
        interval_minutes=grid.interval_minutes,
        start=grid.start,
        feature_names=(quantity,),
        node_ids=tuple(ids[kept]),
        latitude=None if sites is None else np.ascontiguousarray(sites.latitude[kept], np.float64),
        longitude=None if sites is None else np.ascontiguousarray(sites.longitude[kept], np.float64),
        place=name,
    )
    city = check_city(city, judge_extremes=missing_above is None)
    made = city if interval_minutes is None else resample(city, interval_minutes)
    is_longer = made.interval_minutes != grid.interval_minutes
    facts = TableFacts(
        regions=int(kept.sum()),
        without_reading=(*ids[~kept], *(() if sites is None else sites.others)),
        first=made.start,
        steps=made.num_steps,
        interval_minutes=made.interval_minutes,
        missing=float(np.isnan(made.values).mean()),
        zeros=zeros if zeros_missing else _share_of_zeros(made.values),
        duplicates=grid.duplicates,
        moved=grid.moved,
        repeated=grid.repeated,
        skipped=grid.skipped,
        edges=len(senders),
        isolated=int(kept.sum()) - len(linked),
        seen=(*grid.seen, *_total(city)),
        zeros_missing=zeros_missing,
        table_interval_minutes=grid.interval_minutes if is_longer else None,
        kind=kind,
        bins=partial_bins(city, made.interval_minutes) if is_longer else None,
        above=above,
    )
    return made, facts


def _total(city: City) -> tuple[tuple[str, str], ...]:
    """At most one line: that a region reads what all others read together, as a column of totals does."""
    values = city.values[:, :, 0]
    if city.kind == "speed" or city.num_nodes < 3:
        return ()
    sums = np.nansum(values, axis=0, dtype=np.float64)
    largest = int(np.argmax(sums))
    total = values[:, largest].astype(np.float64)
    others = np.nansum(values, axis=1, dtype=np.float64) - np.nan_to_num(total)
    read = np.isfinite(total)
    alike = np.isclose(total[read], others[read], rtol=1e-4)
    if np.count_nonzero(others[read]) < _ENOUGH_STEPS or alike.mean() < _TOTAL_SHARE:
        return ()
    name = city.node_ids[largest]
    return (("total", f"region {name!r} reads what all others read together; if it is their total, leave it out"),)


def _share_of_zeros(values: Float[np.ndarray, "..."]) -> float:
    """The share of readings that are 0."""
    return float(np.count_nonzero(values == 0) / max(np.isfinite(values).sum(), 1))


def fact_lines(facts: TableFacts) -> list[str]:
    """The facts as lines of a small table, without those of which there is nothing to say."""
    span = f"{facts.steps} steps of {facts.interval_minutes} minutes"
    if facts.first is None:
        span += " from an unknown moment: no day of the week is known (--start)"
    else:
        last = facts.first + np.timedelta64((facts.steps - 1) * facts.interval_minutes, "m")
        span = f"{facts.first} to {last}, {span}"
    if facts.table_interval_minutes is not None:
        span += f", made of steps of {facts.table_interval_minutes}"
    zeros_of = "readings of the tables, taken as missing" if facts.zeros_missing else "readings"
    rows = {
        "regions": f"{facts.regions}",
        "span": span,
        "missing": f"{100 * facts.missing:.1f} % of the readings that were due",
        "zeros": f"{100 * facts.zeros:.1f} % of the {zeros_of}",
        "graph": f"{facts.edges} edges, {facts.isolated} regions without one",
    }
    if facts.bins is not None and (words := facts.bins.words(facts.interval_minutes, facts.kind)):
        rows["in part"] = words
    if facts.above is not None:
        rows["above"] = facts.above
    if facts.without_reading:
        few = ", ".join(facts.without_reading[:5]) + (", ..." if len(facts.without_reading) > 5 else "")
        regions = "region" if len(facts.without_reading) == 1 else "regions"
        rows["left out"] = f"{len(facts.without_reading)} {regions} without a reading: {few}"
    of = "" if facts.table_interval_minutes is None else f" of {facts.table_interval_minutes} minutes"
    for name, count, what in (
        ("duplicates", facts.duplicates, "rows of a region and time that had another"),
        ("moved", facts.moved, "readings whose time was not on a step"),
        (
            "repeated",
            facts.repeated,
            f"steps{of} that a clock change repeats, read both times; they hold the mean of both",
        ),
        ("skipped", facts.skipped, f"steps{of} that a clock change skips; they are missing"),
    ):
        if count:
            rows[name] = f"{count} {what}"
    rows |= dict(facts.seen)
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]
