"""In: source cities and their training spans. Out: a pre-trained temporal encoder, chosen on held-out regions."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.prompts.patches import cut_patches, region_deviations
from gpdiff_jax.prompts.temporal import (
    MaskedAutoencoder,
    TemporalConfig,
    TemporalEncoder,
    VisiblePatches,
    time_codes,
)
from gpdiff_jax.typing import Key, Params

_EVALUATION_WINDOWS = 512
_KNEE = 0.25  # of the Huber loss, in deviations of the region
_ORIGINS = 32.0  # days: longest period of the time codes


@flax.struct.dataclass
class PatchBank:
    """The patches of all training spans, end to end, region after region."""

    bins: jax.Array  # float32 [X, K], in units of the city
    share: jax.Array  # float32 [X, K]
    codes: jax.Array  # float32 [patches of all cities, F]
    offset: jax.Array  # int32 [R], where a region's patches begin
    code_offset: jax.Array  # int32 [R], where its city's codes begin
    count: jax.Array  # int32 [R], patches of its span
    scale: jax.Array  # float32 [R], its deviation over the span, in units of the city
    odds: jax.Array  # float32 [2, R], how often a region is drawn for training and for choosing, cities alike


@flax.struct.dataclass
class MaskedWindows:
    """B windows with most patches hidden, and some of the hidden ones to reconstruct."""

    visible: VisiblePatches
    queries: jax.Array  # float32 [B, M, G], time codes of hidden patches
    target: jax.Array  # float32 [B, M, K], their bins
    weight: jax.Array  # float32 [B, M, K], share observed; 0 on padding
    scale: jax.Array  # float32 [B]


def pretrain_encoder(
    cities: Sequence[City],
    spans: Sequence[Span],
    config: TemporalConfig = TemporalConfig(),
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> TemporalEncoder:
    """Trains the masked autoencoder on random windows of source cities, every city with the same weight.

    Args:
      cities: one-channel source cities, of any intervals that divide the patch.
      spans: per city, its training span; nothing else is read.
      config: sizes.
      key: random key.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The encoder at its lowest error on the held-out regions.

    Raises:
      InputError: no city, or see `cut_patches`.
      FloatingPointError: the loss is not finite; names the step.
    """
    if not cities:
        raise InputError("`cities` is empty; name at least one source city")
    keys = jax.random.split(key, 4)
    bank = build_patch_bank(cities, spans, config, key=keys[0])
    module = MaskedAutoencoder(config)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 20), max(config.steps, 2), 0.02 * config.learning_rate
    )
    optimiser = clipped_adam(schedule, weight_decay=config.weight_decay)
    steps_per_call = -(-config.steps // config.evaluations)

    def loss_fn(variables: Params, bank: PatchBank, key: Key) -> jax.Array:
        return masked_loss(module, variables, draw_windows(bank, config, config.batch, bank.odds[0], key=key))

    @partial(jax.jit, donate_argnums=0)
    def train(state: tuple, bank: PatchBank, key: Key, first: jax.Array) -> tuple:
        def step(state: tuple, index: jax.Array) -> tuple:
            variables, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(variables, bank, jax.random.fold_in(key, index))
            updates, opt_state = optimiser.update(grads, opt_state, variables)
            return (optax.apply_updates(variables, updates), opt_state), loss

        state, losses = jax.lax.scan(step, state, first + jnp.arange(steps_per_call))
        return state, losses.mean()

    @jax.jit
    def evaluate(variables: Params, bank: PatchBank, key: Key) -> jax.Array:
        def one_batch(key: Key) -> jax.Array:
            return masked_loss(module, variables, draw_windows(bank, config, config.batch, bank.odds[1], key=key))

        batches = max(1, _EVALUATION_WINDOWS // config.batch)
        return jax.lax.map(one_batch, jax.random.split(key, batches)).mean()

    example = draw_windows(bank, config, 1, bank.odds[0], key=keys[1])
    variables: Params = jax.jit(module.init)(keys[1], example.visible, example.queries)["params"]
    state = variables, optimiser.init(variables)
    best, best_error = jax.tree.map(jnp.copy, variables), np.inf
    for done in range(steps_per_call, config.steps + 1, steps_per_call):
        state, loss = train(state, bank, keys[2], jnp.asarray(done - steps_per_call))
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"the temporal encoder's loss is not finite near step {done}; lower its rate")
        error = float(evaluate(state[0], bank, keys[3]))
        if error < best_error:
            best, best_error = jax.tree.map(jnp.copy, state[0]), error
        if progress:
            progress(done, {"train_loss": float(loss), "validation_loss": error})
    return TemporalEncoder(best, config)


def build_patch_bank(cities: Sequence[City], spans: Sequence[Span], config: TemporalConfig, *, key: Key) -> PatchBank:
    """Puts the patches of the training spans on the device; regions without a reading there are left out.

    Args:
      cities: source cities.
      spans: their training spans.
      config: sizes.
      key: decides which regions are held out of every city.

    Returns:
      The bank. A city of one region holds none out, and chooses on what it trains on.

    Raises:
      InputError: see `cut_patches`.
    """
    bins, share, codes, counts, code_starts, scales, odds = [], [], [], [], [], [], []
    for index, (city, span) in enumerate(zip(cities, spans, strict=True)):
        patches = cut_patches(city, span, config.patch_minutes, config.bins)
        kept = patches.observed.any(axis=1)
        regions = int(kept.sum())
        code_starts += [sum(len(part) for part in codes)] * regions
        counts += [len(patches.days)] * regions
        bins.append(patches.bins[kept].reshape(-1, config.bins))
        share.append(patches.share[kept].reshape(-1, config.bins))
        codes.append(patches.codes)
        scales.append(np.maximum(region_deviations(patches.bins[kept], patches.share[kept]), 0.05))
        held = np.zeros(regions, bool)
        if regions > 1:
            count = min(max(1, round(config.held_out_share * regions)), regions - 1)
            held[np.asarray(jax.random.permutation(jax.random.fold_in(key, index), regions))[:count]] = True
        choosing = held if held.any() else ~held
        odds.append(np.stack([~held / (~held).sum(), choosing / choosing.sum()]) / len(cities))
    return PatchBank(
        bins=jnp.asarray(np.concatenate(bins)),
        share=jnp.asarray(np.concatenate(share)),
        codes=jnp.asarray(np.concatenate(codes)),
        offset=jnp.asarray(np.concatenate([[0], np.cumsum(counts)[:-1]]), jnp.int32),
        code_offset=jnp.asarray(code_starts, jnp.int32),
        count=jnp.asarray(counts, jnp.int32),
        scale=jnp.asarray(np.concatenate(scales), jnp.float32),
        odds=jnp.asarray(np.concatenate(odds, axis=1), jnp.float32),
    )


def draw_windows(bank: PatchBank, config: TemporalConfig, batch: int, odds: jax.Array, *, key: Key) -> MaskedWindows:
    """Draws windows of random regions, lengths and starts, and hides most of their patches.

    Lengths are log-uniform from one day to `config.train_days`, or to the city's span.

    Args:
      bank: the patches.
      config: sizes.
      batch: B.
      odds: [R], how often every region is drawn.
      key: random key.

    Returns:
      The windows.
    """
    keys = jax.random.split(key, 5)
    most = config.train_days * config.patches_per_day
    region = jax.random.categorical(keys[0], jnp.log(odds), shape=(batch,)).astype(jnp.int32)
    longest = jnp.minimum(bank.count[region], most).astype(jnp.float32)
    shortest = jnp.float32(config.patches_per_day)
    length = shortest * (longest / shortest) ** jax.random.uniform(keys[1], (batch,))
    length = jnp.clip(jnp.round(length).astype(jnp.int32), 1, most)
    room = (bank.count[region] - length + 1).astype(jnp.float32)
    start = jnp.floor(room * jax.random.uniform(keys[2], (batch,))).astype(jnp.int32)
    # Which patches are visible, and which hidden, among those with a reading: the first of a random order.
    place = jnp.arange(most, dtype=jnp.int32)[None]
    rows = (bank.offset[region] + start)[:, None] + jnp.minimum(place, length[:, None] - 1)
    observed = (bank.share[rows].sum(axis=2) > 0) & (place < length[:, None])
    total = observed.sum(axis=1, keepdims=True)
    shown = jnp.round((1.0 - config.masked_share) * total.astype(jnp.float32)).astype(jnp.int32)
    shown = jnp.clip(shown, 1, jnp.maximum(total - 1, 1))
    order = jnp.argsort(jnp.where(observed, jax.random.uniform(keys[3], observed.shape), 2.0), axis=1)
    slots = max(1, round((1.0 - config.masked_share) * most))
    rank = jnp.arange(slots)[None], shown + jnp.arange(min(config.queries, most))[None]
    visible, hidden = (jnp.take_along_axis(order, jnp.minimum(r, most - 1), axis=1) for r in rank)
    # Where a window's days are counted from means nothing, so a longer window than any here is read as well.
    origin = _ORIGINS * jax.random.uniform(keys[4], (batch, 1))

    def gather(places: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        step = start[:, None] + jnp.minimum(places, length[:, None] - 1)
        row = bank.offset[region][:, None] + step
        days = origin + step.astype(jnp.float32) / np.float32(config.patches_per_day)
        return bank.bins[row], bank.share[row], time_codes(bank.codes[bank.code_offset[region][:, None] + step], days)

    bins, share, codes = gather(visible)
    target, weight, queries = gather(hidden)
    present = (rank[0] < shown).astype(jnp.float32)
    asked = (rank[1] < total).astype(jnp.float32)
    return MaskedWindows(
        visible=VisiblePatches(bins, share, codes, present),
        queries=queries,
        target=target,
        weight=weight * asked[..., None],
        scale=bank.scale[region],
    )


def masked_loss(module: MaskedAutoencoder, variables: Params, windows: MaskedWindows) -> jax.Array:
    """Huber loss on the observed bins of hidden patches, in deviations of their region."""
    made: jax.Array = module.apply({"params": variables}, windows.visible, windows.queries)  # pyright: ignore[reportAssignmentType]
    error = (made - windows.target) / windows.scale[:, None, None]
    return (optax.losses.huber_loss(error, delta=_KNEE) * windows.weight).sum() / jnp.maximum(windows.weight.sum(), 1.0)
