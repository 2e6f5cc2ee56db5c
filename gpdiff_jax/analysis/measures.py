"""In: prompts of the same regions seen twice, or patches and what was made of hidden ones. Out: how good they are."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.temporal.autoencoder import daily_profile
from gpdiff_jax.prompts.temporal.patches import Patches, region_deviations
from gpdiff_jax.typing import Key


def standardise(table: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    """Every column in deviations from its mean over the regions of one city, cut at four as prompts are."""
    deviation = table.std(axis=0)
    return np.clip((table - table.mean(axis=0)) / np.where(deviation > 1e-6, deviation, 1.0), -4, 4)


def join_parts(parts: Sequence[Float[np.ndarray, "N _"]]) -> Float[np.ndarray, "N E"]:
    """Parts of a prompt side by side, standardised, each with the same weight in a distance whatever its width."""
    return np.concatenate([standardise(part) / np.sqrt(part.shape[1]) for part in parts], axis=1)


def recall_at(
    first: Float[np.ndarray, "N E"], second: Float[np.ndarray, "N E"], ranks: Sequence[int]
) -> dict[int, float]:
    """How often a region's prompt in one window is among the nearest to its own prompt in another.

    Args:
      first: prompts of N regions, seen through one window.
      second: the same regions through another.
      ranks: numbers of nearest prompts to look among.

    Returns:
      Per rank the share of regions found, averaged over both directions. A tie counts as half of it lost.
    """
    # Row by row: all differences at once would be as large as N x N x E.
    distance = np.stack([np.linalg.norm(row - second, axis=1) for row in first.astype(np.float64)])
    own = np.diag(distance)
    place = []
    for table in (distance, distance.T):
        ties = (table == own[:, None]).sum(axis=1) - 1
        place.append((table < own[:, None]).sum(axis=1) + ties / 2)
    return {rank: float(np.mean(np.concatenate(place) < rank)) for rank in ranks}


def disjoint_windows(city: City, span: Span, days: int, pairs: int, *, key: Key) -> list[tuple[Span, Span]]:
    """Random pairs of windows of one span that share no step.

    Args:
      city: a one-channel city.
      span: where to look.
      days: length of every window.
      pairs: how many.
      key: random key.

    Returns:
      The pairs, the earlier window first; both are observed at least half as well as the whole span.

    Raises:
      InputError: the span does not hold two such windows.
    """
    length = days * city.steps_per_day
    observed = np.isfinite(city.values[span.start : span.stop, :, 0]).mean(axis=1)
    cumulative = np.concatenate([[0.0], np.cumsum(observed)])
    possible = np.arange(0, len(span) - length + 1)
    possible = possible[(cumulative[possible + length] - cumulative[possible]) / length >= 0.5 * observed.mean()]
    if len(possible) == 0 or possible[-1] - possible[0] < length:
        raise InputError(
            f"the span of city {city.name!r} (steps {span.start} to {span.stop}) holds no two windows of {days} days "
            "without a common step; choose fewer days"
        )
    early = possible[possible <= possible[-1] - length]
    drawn = []
    for pair_key in jax.random.split(key, pairs):
        first_draw, second_draw = np.asarray(jax.random.uniform(pair_key, (2,)))
        first = early[int(first_draw * len(early))]
        late = possible[possible >= first + length]
        second = late[int(second_draw * len(late))]
        drawn.append(
            tuple(Span(span.start + int(begin), span.start + int(begin) + length) for begin in (first, second))
        )
    return drawn


def hide_patches(patches: Patches, masked_share: float, *, key: Key) -> Bool[np.ndarray, "N Q"]:
    """True for the patches to show: a random choice among those observed, at least one of every region that has any."""
    observed = patches.observed
    draws = np.where(observed, np.asarray(jax.random.uniform(key, observed.shape)), 2.0)
    rank = np.argsort(np.argsort(draws, axis=1), axis=1)
    shown = np.maximum(np.round((1.0 - masked_share) * observed.sum(axis=1)), 1)
    return observed & (rank < shown[:, None])


def interpolate_visible(patches: Patches, visible: Bool[np.ndarray, "N Q"]) -> Float[np.ndarray, "N Q bins"]:
    """Straight lines between the visible readings of a region, and its first and last one beyond them."""
    shape, seen = patches.bins.shape, ((patches.share > 0) & visible[:, :, None]).reshape(len(visible), -1)
    clock = np.arange(shape[1] * shape[2])
    made = np.zeros((shape[0], len(clock)), np.float32)
    for region in range(shape[0]):
        shown = np.flatnonzero(seen[region])
        if len(shown):
            made[region] = np.interp(clock, shown, patches.bins[region].reshape(-1)[shown])
    return made.reshape(shape)


def profile_of_visible(
    patches: Patches, visible: Bool[np.ndarray, "N Q"], patches_per_day: int
) -> Float[np.ndarray, "N Q bins"]:
    """The mean of what is visible at the same time of day; hours that never are come from those around them."""
    place = np.arange(patches.bins.shape[1]) % patches_per_day
    hour = np.broadcast_to(
        np.eye(patches_per_day, dtype=np.float32)[place], (len(visible), len(place), patches_per_day)
    )
    bins, weight = patches.bins.astype(np.float32), (patches.share * visible[:, :, None]).astype(np.float32)
    profile, _ = daily_profile(*jax.device_put((bins, weight, hour)))
    return np.asarray(profile)[:, place]


def hidden_error(
    made: Float[np.ndarray, "N Q bins"], patches: Patches, visible: Bool[np.ndarray, "N Q"]
) -> tuple[float, float]:
    """Mean absolute and root mean squared error on the observed bins of hidden patches.

    Args:
      made: the reconstruction, in units of the city.
      patches: the truth.
      visible: what was shown.

    Returns:
      Both in standard deviations of the region, averaged over the regions that have something hidden.
    """
    weight = patches.share * (~visible)[:, :, None]
    error = (made - patches.bins) / np.maximum(region_deviations(patches.bins, patches.share), 0.05)[:, None, None]
    count = weight.sum(axis=(1, 2))
    kept = count > 0
    absolute = (weight * np.abs(error)).sum(axis=(1, 2))[kept] / count[kept]
    squared = (weight * np.square(error)).sum(axis=(1, 2))[kept] / count[kept]
    return float(absolute.mean()), float(np.sqrt(squared).mean())
