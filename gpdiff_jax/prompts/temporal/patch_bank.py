"""In: source cities and their training spans. Out: their patches on the device, and windows drawn from them."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.prompts.temporal.autoencoder import LONGEST_PERIOD, TemporalConfig, VisiblePatches, time_encodings
from gpdiff_jax.prompts.temporal.patches import cut_patches, region_deviations
from gpdiff_jax.typing import Key


@flax.struct.dataclass
class PatchBank:
    """The patches of all training spans, end to end, region after region."""

    bins: Float[Array, "*devices X bins"]  # in units of the city
    share: Float[Array, "*devices X bins"]
    clock: Float[Array, "*devices patches F"]
    offset: Int[Array, "*devices R"]  # where a region's patches begin
    clock_offset: Int[Array, "*devices R"]  # where its city's rows of `clock` begin
    count: Int[Array, "*devices R"]  # patches of its span
    scale: Float[Array, "*devices R"]  # its deviation over the span, in units of the city
    probabilities: Float[
        Array, "*devices 2 R"
    ]  # of a region being drawn, for training and for validation; cities alike


@flax.struct.dataclass
class MaskedWindows:
    """B windows with most patches hidden, and some of the hidden ones to reconstruct."""

    visible: VisiblePatches
    queries: Float[Array, "*devices B queries G"]  # time encodings of hidden patches
    target: Float[Array, "*devices B queries bins"]  # their bins
    weight: Float[Array, "*devices B queries bins"]  # share observed; 0 on padding
    scale: Float[Array, "*devices B"]


def build_patch_bank(cities: Sequence[City], spans: Sequence[Span], config: TemporalConfig, *, key: Key) -> PatchBank:
    """Puts the patches of the training spans on the device; regions without a reading there are left out.

    Args:
      cities: source cities.
      spans: their training spans.
      config: sizes.
      key: decides which regions are held out of every city.

    Returns:
      The bank. The one region of a city serves training and validation.

    Raises:
      InputError: see `cut_patches`.
    """
    bins, share, clock, counts, clock_starts, scales, probabilities = [], [], [], [], [], [], []
    for index, (city, span) in enumerate(zip(cities, spans, strict=True)):
        patches = cut_patches(city, span, config.patch_minutes, config.bins)
        kept = patches.observed.any(axis=1)
        regions = int(kept.sum())
        clock_starts += [sum(len(part) for part in clock)] * regions
        counts += [len(patches.days)] * regions
        bins.append(patches.bins[kept].reshape(-1, config.bins))
        share.append(patches.share[kept].reshape(-1, config.bins))
        clock.append(patches.clock)
        scales.append(np.maximum(region_deviations(patches.bins[kept], patches.share[kept]), 0.05))
        held = np.zeros(regions, bool)
        if regions > 1:
            count = min(max(1, round(config.held_out_share * regions)), regions - 1)
            held[np.asarray(jax.random.permutation(jax.random.fold_in(key, index), regions))[:count]] = True
        validation = held if held.any() else ~held
        probabilities.append(np.stack([~held / (~held).sum(), validation / validation.sum()]) / len(cities))
    arrays = {
        "bins": np.concatenate(bins),
        "share": np.concatenate(share),
        "clock": np.concatenate(clock),
        "offset": np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32),
        "clock_offset": np.asarray(clock_starts, np.int32),
        "count": np.asarray(counts, np.int32),
        "scale": np.concatenate(scales).astype(np.float32),
        "probabilities": np.concatenate(probabilities, axis=1).astype(np.float32),
    }
    return PatchBank(**jax.device_put(arrays))


def draw_masked_windows(
    bank: PatchBank, config: TemporalConfig, batch: int, probabilities: jax.Array, *, key: Key
) -> MaskedWindows:
    """Draws windows of random regions, lengths and starts, and hides most of their patches.

    Lengths are log-uniform from one day to `config.train_days`, or to the city's span.

    Args:
      bank: the patches.
      config: sizes.
      batch: B.
      probabilities: [R], how often every region is drawn.
      key: random key.

    Returns:
      The windows.
    """
    keys = jax.random.split(key, 7)
    most = config.train_days * config.patches_per_day
    region = jax.random.categorical(keys[0], jnp.log(probabilities), shape=(batch,)).astype(jnp.int32)
    longest = jnp.minimum(bank.count[region], most).astype(jnp.float32)
    shortest = jnp.float32(config.patches_per_day)
    length = shortest * (longest / shortest) ** jax.random.uniform(keys[1], (batch,))
    length = jnp.clip(jnp.round(length).astype(jnp.int32), 1, most)
    num_starts = (bank.count[region] - length + 1).astype(jnp.float32)
    start = jnp.floor(num_starts * jax.random.uniform(keys[2], (batch,))).astype(jnp.int32)
    # Which patches are visible, and which hidden, among those with a reading: the first of a random order.
    place = jnp.arange(most, dtype=jnp.int32)[None]
    rows = (bank.offset[region] + start)[:, None] + jnp.minimum(place, length[:, None] - 1)
    observed = (bank.share[rows].sum(axis=2) > 0) & (place < length[:, None])
    num_observed = observed.sum(axis=1, keepdims=True)
    shown = jnp.round((1.0 - config.masked_share) * num_observed.astype(jnp.float32)).astype(jnp.int32)
    shown = jnp.clip(shown, 1, jnp.maximum(num_observed - 1, 1))
    order = jnp.argsort(jnp.where(observed, jax.random.uniform(keys[3], observed.shape), 2.0), axis=1)
    most_visible = max(1, round((1.0 - config.masked_share) * most))
    visible_rank, hidden_rank = jnp.arange(most_visible)[None], shown + jnp.arange(min(config.queries, most))[None]
    visible, hidden = (
        jnp.take_along_axis(order, jnp.minimum(rank, most - 1), axis=1) for rank in (visible_rank, hidden_rank)
    )
    # A random origin of the days, so that the encoder reads windows longer than those in training as well.
    origin = LONGEST_PERIOD * jax.random.uniform(keys[4], (batch, 1))
    # Cities keep different hours: what is hidden is to be read off the visible patches too, not off the clock alone.
    moved = jnp.floor(num_starts * jax.random.uniform(keys[5], (batch,))).astype(jnp.int32)
    clock_start = jnp.where(jax.random.uniform(keys[6], (batch,)) < config.shifted_share, moved, start)

    def gather(places: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        place = jnp.minimum(places, length[:, None] - 1)
        row = (bank.offset[region] + start)[:, None] + place
        days = origin + place.astype(jnp.float32) / np.float32(config.patches_per_day)
        times = time_encodings(bank.clock[(bank.clock_offset[region] + clock_start)[:, None] + place], days)
        return bank.bins[row], bank.share[row], times

    bins, share, times = gather(visible)
    target, weight, queries = gather(hidden)
    present = (visible_rank < shown).astype(jnp.float32)
    is_query = (hidden_rank < num_observed).astype(jnp.float32)
    return MaskedWindows(
        visible=VisiblePatches(bins, share, times, present),
        queries=queries,
        target=target,
        weight=weight * is_query[..., None],
        scale=bank.scale[region],
    )


def draw_pairs(bank: PatchBank, config: TemporalConfig, probabilities: jax.Array, *, key: Key) -> VisiblePatches:
    """Draws regions of one city, and of each two whole windows that share no patch.

    Args:
      bank: the patches.
      config: sizes.
      probabilities: [R], how often every region is drawn.
      key: random key.

    Returns:
      2 Y windows: the first ones of Y regions, then the second ones.
    """
    keys = jax.random.split(key, 4)
    count, most = config.contrast_pairs, config.contrast_days * config.patches_per_day
    first = jax.random.categorical(keys[0], jnp.log(probabilities))
    of_city = jnp.where(bank.clock_offset == bank.clock_offset[first], probabilities, 0.0)
    # Without replacement: the largest of so many Gumbel draws.
    draws = jnp.log(of_city) + jax.random.gumbel(keys[1], of_city.shape)
    value, region = jax.lax.top_k(draws, min(count, len(probabilities)))
    region = jnp.where(jnp.isfinite(value), region, region[0]).astype(jnp.int32)
    length = jnp.minimum(most, bank.count[first] // 2)
    num_starts = (bank.count[first] - 2 * length + 1).astype(jnp.float32)
    starts = jnp.sort(jnp.floor(num_starts * jax.random.uniform(keys[2], (2,)))).astype(jnp.int32)
    starts = starts + jnp.stack([jnp.zeros_like(length), length])
    place = jnp.minimum(jnp.arange(most, dtype=jnp.int32), length - 1)
    step = jnp.repeat(starts[:, None] + place[None], region.shape[0], axis=0)
    rows = jnp.concatenate([region, region])
    row = bank.offset[rows][:, None] + step
    origin = LONGEST_PERIOD * jax.random.uniform(keys[3])
    days = origin + jnp.broadcast_to(place.astype(jnp.float32), step.shape) / np.float32(config.patches_per_day)
    share = bank.share[row]
    present = (share.sum(axis=2) > 0) & (jnp.arange(most) < length)[None]
    fresh = jnp.isfinite(value)
    present = present & jnp.concatenate([fresh, fresh])[:, None]
    times = time_encodings(bank.clock[bank.clock_offset[rows][:, None] + step], days)
    return VisiblePatches(bank.bins[row], share, times, present.astype(jnp.float32))
