"""In: spans of time and the series bank. Out: start steps of windows, drawn for training or listed for evaluation.

Only starts are ever kept; a window exists while a batch is gathered.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.cities.calendar import is_weekend, slot_of_day
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.data.series import SeriesBank, gather_window
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Window
from gpdiff_jax.typing import Key


@flax.struct.dataclass
class StartTable:
    """The windows that may be drawn for every node, city by city, and which profile each may see."""

    starts: Int[Array, "*devices starts"]
    first: Int[Array, "*devices nodes"]  # where a node's city begins in `starts`
    count: Int[Array, "*devices nodes"]  # how many starts its city has
    spans: Int[Array, "*devices V nodes 2"]  # the steps that each variant of a node's profile was made from
    length: Int[Array, "*devices nodes"]  # steps of a node's city
    first_slot: Int[Array, "*devices nodes"]  # step of the day at which a node's city begins
    unseen: Float[Array, "*devices nodes"]  # kind of day that its city never shows: 1 weekend, 0 weekday, else -1
    steps_per_day: int = flax.struct.field(pytree_node=False)
    near_days: float = flax.struct.field(pytree_node=False, default=0.0)  # see `DataConfig`


def window_starts(city: City, span: Span, *, history: int, horizon: int, reach_back: bool = False) -> np.ndarray:
    """Starts of all windows of a span in which somebody has a reading to forecast.

    Args:
      city: a one-channel city.
      span: the horizon lies inside it; so does the history, unless `reach_back`.
      history: H.
      horizon: P.
      reach_back: let the history begin before the span (the span's past is visible then).

    Returns:
      int32 start steps of the history, in order; possibly empty.
    """
    low = max(0, span.start - history) if reach_back else span.start
    starts = np.arange(low, span.stop - history - horizon + 1)
    anyone = np.isfinite(city.values[:, :, 0]).any(axis=1)
    seen = np.concatenate([[0], np.cumsum(anyone)])
    return starts[seen[starts + history + horizon] > seen[starts + history]].astype(np.int32)


def random_spans(city: City, span: Span, lengths: Sequence[int], *, key: Key) -> list[Span]:
    """Random spans within a source's training span, as the support days of a target might lie.

    Args:
      city: a one-channel city.
      span: its training span.
      lengths: V, steps of each; cut to the training span.
      key: random key.

    Returns:
      V spans: one drawn in each of V equal parts of the possible starts, in order of time, so that they cover it.
      Spans observed less than half as well as the whole span (a closed weekend, an outage) do not come up.
    """
    observed = np.isfinite(city.values[span.start : span.stop, :, 0]).mean(axis=1)
    cumulative = np.concatenate([[0.0], np.cumsum(observed)])
    count, uniform, possible = len(lengths), np.asarray(_uniform(key, len(lengths))), {}
    for length in {min(length, len(span)) for length in lengths}:
        share = (cumulative[length:] - cumulative[:-length]) / length
        possible[length] = span.start + np.flatnonzero(share >= 0.5 * observed.mean())
    spans = []
    for number, length in enumerate(lengths):
        starts = possible[length := min(length, len(span))]
        start = int(starts[int((number + float(uniform[number])) / count * len(starts))])
        spans.append(Span(start, start + length))
    return spans


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: Key, count: int) -> Float[Array, " V"]:
    return jax.random.uniform(key, (count,))


def start_table(
    cities: Sequence[City],
    train: Sequence[Span],
    starts: Sequence[Int[np.ndarray, " _"]],
    spans: Sequence[Sequence[Span]],
    *,
    near_days: float = 0.0,
) -> StartTable:
    """Lines up the allowed starts of several cities.

    Args:
      cities: in the order of the bank.
      train: per city, its training span.
      starts: per city, the allowed starts.
      spans: per city, the V spans of its profile variants.
      near_days: how much a window prefers variants that lie near, see `DataConfig`.

    Returns:
      The table.

    Raises:
      InputError: a city without a start.
    """
    for city, allowed in zip(cities, starts, strict=True):
        if len(allowed) == 0:
            raise InputError(f"city {city.name!r} has no window with a reading to forecast; leave it out")
    counts = [len(allowed) for allowed in starts]
    nodes = [city.num_nodes for city in cities]
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    bounds = np.asarray([[(span.start, span.stop) for span in city_spans] for city_spans in spans], np.int32)
    unseen = [_unseen_kind(city, span) for city, span in zip(cities, train, strict=True)]
    arrays = {
        "starts": np.concatenate(starts).astype(np.int32),
        "first": np.repeat(first, nodes).astype(np.int32),
        "count": np.repeat(counts, nodes).astype(np.int32),
        "spans": np.repeat(bounds.transpose(1, 0, 2), nodes, axis=1),
        "length": np.repeat([city.num_steps for city in cities], nodes).astype(np.int32),
        "first_slot": np.repeat([slot_of_day(city)[0] for city in cities], nodes).astype(np.int32),
        "unseen": np.repeat(unseen, nodes).astype(np.float32),
    }
    return StartTable(**jax.device_put(arrays), steps_per_day=cities[0].steps_per_day, near_days=near_days)


def reserved_steps(starts: Any, first_slot: Any, history: int, horizon: int, steps_per_day: int) -> tuple[Any, Any]:
    """The steps that a window's scale, profile and prompt must not be made from: its own, and the days it forecasts.

    Args:
      starts: starts of windows, any shape.
      first_slot: step of the day at which the city begins.
      history: H.
      horizon: P.
      steps_per_day: steps from midnight to midnight.

    Returns:
      First reserved step and first step after, shaped like `starts`.
    """
    midnight = (starts + history + first_slot) // steps_per_day * steps_per_day - first_slot
    last_day = (starts + history + horizon - 1 + first_slot) // steps_per_day
    next_midnight = (last_day + 1) * steps_per_day - first_slot
    xp = np if isinstance(starts, np.ndarray) else jnp
    return xp.minimum(starts, midnight), next_midnight


def free_starts(
    city: City, starts: Int[np.ndarray, " X"], spans: Sequence[Span], *, history: int, horizon: int
) -> Int[np.ndarray, " Y"]:
    """The starts that at least one of the spans leaves free: no step of the window and no day that it forecasts."""
    low, high = reserved_steps(starts, int(slot_of_day(city)[0]), history, horizon, city.steps_per_day)
    free = np.any([(span.start >= high) | (span.stop <= low) for span in spans], axis=0)
    return starts[free]


def _unseen_kind(city: City, span: Span) -> float:
    """1 where no reading of the span falls on a weekend, 0 where none falls on a weekday, else -1."""
    weekend = is_weekend(city)
    if weekend is None:
        return -1.0
    anyone = np.isfinite(city.values[span.start : span.stop, :, 0]).any(axis=1)
    seen = weekend[span.start : span.stop][anyone]
    return 1.0 if not seen.any() else 0.0 if seen.all() else -1.0


class WindowDraw(NamedTuple):
    """Which windows of one region to gather, and through which variant each is seen."""

    starts: Int[Array, " B"]
    variants: Int[Array, " B"]
    shift: Int[Array, " B"]  # steps by which the calendar is read off its place
    allowed: Bool[Array, " B"]  # False where a window must not count


def part_of(table: StartTable, index: Int[Array, ""], parts: int) -> StartTable:
    """The table with one of `parts` runs of every city's starts, of equal number and in order of time, from index 0."""
    low, high = (table.count * (index + k) // parts for k in (0, 1))
    return dataclasses.replace(table, first=table.first + low, count=high - low)


def draw_starts(
    bank: SeriesBank,
    table: StartTable,
    centre: Int[Array, ""],
    batch: int,
    *,
    key: Key,
    variant: Int[Array, ""] | None = None,
) -> WindowDraw:
    """Draws a batch of windows of one source region for training, without gathering them.

    Args:
      bank: the series.
      table: which windows may be drawn.
      centre: index of the centre node among the bank's nodes.
      batch: B.
      key: random key.
      variant: see `choose_variants`.

    Returns:
      The draw, for `gather_draw`.
    """
    start_key, variant_key = jax.random.split(key)
    draw = jax.random.randint(start_key, (batch,), 0, table.count[centre], dtype=jnp.int32)
    starts = table.starts[table.first[centre] + draw]
    return choose_variants(bank, table, centre, starts, key=variant_key, variant=variant)


def draw_unseen_starts(
    bank: SeriesBank,
    table: StartTable,
    centre: Int[Array, ""],
    batch: int,
    *,
    key: Key,
    variant: Int[Array, ""] | None = None,
) -> WindowDraw:
    """Draws windows of one source region as if they came on the kind of day that its city never shows.

    The readings are real, the calendar is that of a day up to six days away.

    Args:
      bank: the series.
      table: which windows may be drawn, and which kind of day is unseen.
      centre: index of the centre node among the bank's nodes.
      batch: B.
      key: random key.
      variant: see `choose_variants`.

    Returns:
      The draw, for `gather_unseen`; not allowed where no kind of day is unseen.
    """
    start_key, shift_key, variant_key = jax.random.split(key, 3)
    draw = jax.random.randint(start_key, (batch,), 0, table.count[centre], dtype=jnp.int32)
    starts = table.starts[table.first[centre] + draw]
    days = jnp.asarray([-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6], jnp.int32) * table.steps_per_day
    moved = starts[:, None] + days[None, :]
    last = table.length[centre] - bank.history - bank.horizon
    inside = (moved >= 0) & (moved <= last)
    first_ahead = jnp.clip(moved, 0, last) + bank.history
    fits = inside & (bank.weekend[bank.city_offset[centre] + first_ahead] == table.unseen[centre])
    chosen = jax.random.categorical(shift_key, jnp.where(fits, 0.0, -1e9), axis=-1)
    usable = jnp.take_along_axis(fits, chosen[:, None], axis=1)[:, 0]
    seen = choose_variants(bank, table, centre, starts, key=variant_key, variant=variant)
    return seen._replace(shift=jnp.where(usable, days[chosen], 0), allowed=usable)


def choose_variants(
    bank: SeriesBank,
    table: StartTable,
    centre: Int[Array, ""],
    starts: Int[Array, " B"],
    *,
    key: Key,
    variant: Int[Array, ""] | None = None,
) -> WindowDraw:
    """Chooses for each given window of one source region a variant that holds no day that it forecasts.

    Args:
      bank: the series.
      table: the spans of the variants.
      centre: index of the centre node among the bank's nodes.
      starts: [B], starts of the windows.
      key: random key of the choice, at odds by how near a variant lies (`StartTable.near_days`).
      variant: the one variant to see all windows through, instead of a random one for each.

    Returns:
      The draw, for `gather_draw`. A window is not allowed where the given variant, or every variant, holds a step of it
      or of a day that it forecasts.
    """
    spans = table.spans[:, centre]
    low, high = reserved_steps(starts, table.first_slot[centre], bank.history, bank.horizon, table.steps_per_day)
    free = (spans[None, :, 0] >= high[:, None]) | (spans[None, :, 1] <= low[:, None])
    if variant is None:
        gap = jnp.maximum(spans[None, :, 0] - high[:, None], low[:, None] - spans[None, :, 1])
        rate = 1.0 / (table.near_days * table.steps_per_day) if table.near_days else 0.0
        logits = -rate * gap.astype(jnp.float32)
        chosen = jax.random.categorical(key, jnp.where(free, logits, -1e9), axis=-1).astype(jnp.int32)
    else:
        chosen = jnp.broadcast_to(variant, starts.shape)
    allowed = jnp.take_along_axis(free, chosen[:, None], axis=1)[:, 0]
    return WindowDraw(starts, chosen, jnp.zeros_like(starts), allowed)


def gather_draw(bank: SeriesBank, nodes: Int[Array, " N"], draw: WindowDraw) -> Window:
    """Gathers the drawn windows of one region.

    Args:
      bank: the series.
      nodes: [N], the nodes of the region graph, the centre first.
      draw: which windows.

    Returns:
      The windows, stacked on a leading axis B; masked out where not allowed.
    """
    window = _gather(bank, nodes, draw)
    return dataclasses.replace(window, mask=window.mask * draw.allowed[:, None].astype(window.mask.dtype))


def gather_unseen(bank: SeriesBank, nodes: Int[Array, " N"], draw: WindowDraw) -> Window:
    """Gathers windows drawn by `draw_unseen_starts`.

    There is no truth for such a window, so the mask is 1 on every step of a usable one; `anchor_loss` holds a
    forecaster to the forecasts of the parameters that it began from.

    Args:
      bank: the series.
      nodes: [N], the nodes of the region graph, the centre first.
      draw: which windows.

    Returns:
      The windows, stacked on a leading axis B; mask 1 on every horizon step, or 0 where not allowed.
    """
    window = _gather(bank, nodes, draw)
    mask = jnp.broadcast_to(draw.allowed[:, None], window.mask.shape).astype(window.mask.dtype)
    return dataclasses.replace(window, mask=mask)


def draw_windows(
    bank: SeriesBank,
    table: StartTable,
    nodes: Int[Array, " N"],
    batch: int,
    *,
    key: Key,
    variant: Int[Array, ""] | None = None,
    unseen: bool = False,
) -> Window:
    """Draws windows by `draw_starts`, or with `unseen` by `draw_unseen_starts`, and gathers them."""
    draw, gather = (draw_unseen_starts, gather_unseen) if unseen else (draw_starts, gather_draw)
    return gather(bank, nodes, draw(bank, table, nodes[0], batch, key=key, variant=variant))


def gather_source(
    bank: SeriesBank,
    table: StartTable,
    nodes: Int[Array, " N"],
    starts: Int[Array, " B"],
    *,
    key: Key,
    variant: Int[Array, ""] | None = None,
) -> Window:
    """Gathers given windows of one source region, each seen through a variant of `choose_variants`."""
    return gather_draw(bank, nodes, choose_variants(bank, table, nodes[0], starts, key=key, variant=variant))


def mix_windows(windows: Window, others: Window, share: Float[Array, " B"]) -> Window:
    """Windows between two, what they show and what came after alike ("mixup"; Zhang et al., arXiv 1710.09412).

    Nodes are mixed by their place in the region graph: the centre with the centre, a neighbour with the other's
    neighbour of that place or, where it has fewer, with what stands in their place, its centre.

    Args:
      windows: leaves [B, ...].
      others: of the same shapes.
      share: of the first ones, 0 to 1.

    Returns:
      The windows; a step of them counts where it was observed in both.
    """

    def between(one: Float[Array, "B *X"], other: Float[Array, "B *X"]) -> Float[Array, "B *X"]:
        kept = share.astype(one.dtype).reshape(-1, *(1,) * (one.ndim - 1))
        return kept * one + (1.0 - kept) * other

    return dataclasses.replace(jax.tree.map(between, windows, others), mask=windows.mask * others.mask)


def _gather(bank: SeriesBank, nodes: Int[Array, " N"], draw: WindowDraw) -> Window:
    gather = jax.vmap(gather_window, in_axes=(None, None, 0, 0, 0))
    return gather(bank, nodes, draw.starts, draw.variants, draw.shift)
