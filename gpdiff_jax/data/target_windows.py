"""In: the support days of a target. Out: its windows, none of which sees a profile of a day that it forecasts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import TargetSplit
from gpdiff_jax.data.series import SeriesBank, gather_window
from gpdiff_jax.models.protocol import Window


def support_masks(city: City, split: TargetSplit, steps_per_day: int) -> np.ndarray:
    """Which steps enter each variant of a target's profile.

    Args:
      city: the target.
      split: its spans.
      steps_per_day: steps in 24 hours.

    Returns:
      bool [V, T] with V = 2 x support days. Variant j leaves out the j-th support day; the next ones leave out the j-th
      and the one after, for a horizon across midnight; the last leaves out none.
    """
    support = split.support
    day = (np.arange(city.num_steps) - support.start) // steps_per_day
    inside = (day >= 0) & (np.arange(city.num_steps) < support.stop)
    days = range(len(support) // steps_per_day)
    left_out = [{j} for j in days] + [{j, j + 1} for j in days[:-1]] + [set()]
    return np.stack([inside & ~np.isin(day, list(some)) for some in left_out])


def gather_target(
    bank: SeriesBank,
    nodes: Int[Array, " N"],
    starts: Int[Array, " B"],
    support_start: int | Int[Array, ""],
    steps_per_day: int,
) -> Window:
    """Gathers given windows of one target region, where scale and profile leave out every day that a window forecasts.

    Args:
      bank: the series of a target, whose profile variants are those of `support_masks`.
      nodes: [N], the nodes of the region graph, the centre first.
      starts: [B], starts of the windows.
      support_start: first step of the support days.
      steps_per_day: steps in 24 hours.

    Returns:
      The windows, stacked on a leading axis B.
    """
    variant = variant_of(bank, starts, support_start, steps_per_day)
    return jax.vmap(gather_window, in_axes=(None, None, 0, 0))(bank, nodes, starts, variant)


def gather_all_days(bank: SeriesBank, nodes: Int[Array, " N"], starts: Int[Array, " B"]) -> Window:
    """Gathers windows of one target region as one after the support days is seen, where nothing is left out.

    Args:
      bank: as of `gather_target`.
      nodes: [N], the nodes of the region graph, the centre first.
      starts: [B], starts of the windows; of those inside the support, scale and profile know what they forecast.

    Returns:
      The windows, stacked on a leading axis B.
    """
    every = jnp.full(starts.shape, bank.profile.shape[0] - 1, jnp.int32)
    return jax.vmap(gather_window, in_axes=(None, None, 0, 0))(bank, nodes, starts, every)


def variant_of(
    bank: SeriesBank, starts: Int[Array, " B"], support_start: int | Int[Array, ""], steps_per_day: int
) -> Int[Array, " B"]:
    """The variant of `support_masks` that leaves out the days that each window forecasts; see `gather_target`."""
    days = bank.profile.shape[0] // 2
    first = (starts + bank.history - support_start) // steps_per_day
    last = (starts + bank.history + bank.horizon - 1 - support_start) // steps_per_day
    variant = jnp.where((first == last) | (last >= days), first, days + first)
    inside = (first >= 0) & (first < days)
    return jnp.where(inside, variant, 2 * days - 1).astype(jnp.int32)
