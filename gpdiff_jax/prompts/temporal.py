"""In: source cities and their training spans. Out: a pre-trained encoder, and the embedding of a few days of any city's
readings, the temporal prompt.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.scaling import fill_from_neighbours, silent_regions
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.prompts.autoencoder import MOST_DAYS, MaskedAutoencoder, TemporalConfig, VisiblePatches, time_codes
from gpdiff_jax.prompts.patch_bank import MaskedWindows, PatchBank, build_patch_bank, draw_pairs, draw_windows
from gpdiff_jax.prompts.patches import Patches, cut_patches
from gpdiff_jax.typing import Key, Params

_REGIONS_AT_ONCE = 32
_EVALUATION_WINDOWS = 512
_KNEE = 0.25  # of the Huber loss, in deviations of the region
_SHARPNESS = 8.0  # of the distances between embeddings


@flax.struct.dataclass
class TemporalEncoder:
    """A pre-trained encoder: what `encode` needs, and plain arrays to save."""

    variables: Params
    config: TemporalConfig = flax.struct.field(pytree_node=False)


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

    def loss_fn(
        variables: Params, bank: PatchBank, odds: jax.Array, key: Key
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        window_key, pair_key = jax.random.split(key)
        masked = masked_loss(module, variables, draw_windows(bank, config, config.batch, odds, key=window_key))
        contrast = contrast_loss(module, variables, draw_pairs(bank, config, odds, key=pair_key))
        return masked + config.contrast_weight * contrast, {"masked": masked, "contrast": contrast}

    @partial(jax.jit, donate_argnums=0)
    def train(state: tuple, bank: PatchBank, key: Key, first: jax.Array) -> tuple:
        def step(state: tuple, index: jax.Array) -> tuple:
            variables, opt_state = state
            (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                variables, bank, bank.odds[0], jax.random.fold_in(key, index)
            )
            updates, opt_state = optimiser.update(grads, opt_state, variables)
            return (optax.apply_updates(variables, updates), opt_state), loss

        state, losses = jax.lax.scan(step, state, first + jnp.arange(steps_per_call))
        return state, jax.tree.map(jnp.mean, losses)

    @jax.jit
    def evaluate(variables: Params, bank: PatchBank, key: Key) -> tuple[jax.Array, dict[str, jax.Array]]:
        def one_batch(key: Key) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_fn(variables, bank, bank.odds[1], key)

        batches = max(1, _EVALUATION_WINDOWS // config.batch)
        return jax.tree.map(jnp.mean, jax.lax.map(one_batch, jax.random.split(key, batches)))

    @jax.jit
    def start(bank: PatchBank, key: Key) -> Params:
        example = draw_windows(bank, config, 1, bank.odds[0], key=key)
        return module.init(key, example.visible, example.queries)["params"]

    variables = start(bank, keys[1])
    state = variables, optimiser.init(variables)
    best, best_error = jax.tree.map(jnp.copy, variables), np.inf
    last = -(-config.steps // steps_per_call) * steps_per_call
    for done in range(steps_per_call, last + 1, steps_per_call):
        state, trained = train(state, bank, keys[2], jnp.asarray(done - steps_per_call))
        if not all(np.isfinite(float(part)) for part in trained.values()):
            raise FloatingPointError(
                f"the temporal encoder's loss is not finite near step {done}; lower its learning rate"
            )
        loss, parts = evaluate(state[0], bank, keys[3])
        if float(loss) < best_error:
            best, best_error = jax.tree.map(jnp.copy, state[0]), float(loss)
        if progress:
            metrics = {f"train_{name}_loss": float(part) for name, part in trained.items()}
            held_out = {f"validation_{name}_loss": float(part) for name, part in parts.items()}
            progress(done, metrics | held_out | {"validation_loss": float(loss)})
    return TemporalEncoder(best, config)


def masked_loss(module: MaskedAutoencoder, variables: Params, windows: MaskedWindows) -> jax.Array:
    """Huber loss on the observed bins of hidden patches, in deviations of their region."""
    made: Any = module.apply({"params": variables}, windows.visible, windows.queries)
    error = (made - windows.target) / windows.scale[:, None, None]
    return (optax.losses.huber_loss(error, delta=_KNEE) * windows.weight).sum() / jnp.maximum(windows.weight.sum(), 1.0)


def contrast_loss(module: MaskedAutoencoder, variables: Params, windows: VisiblePatches) -> jax.Array:
    """How badly the second window of a region is told from those of the other regions of its city (InfoNCE).

    Distances are those in which prompts are compared: between entries standardised within the city.
    Source: van den Oord et al., arXiv 1807.03748, eq. 4.
    """
    made: Any = module.apply({"params": variables}, windows, method="encode")
    embedding, pairs = made[1], windows.present.shape[0] // 2
    there = (windows.present.sum(axis=1) > 0).astype(jnp.float32)
    weight = (there / jnp.maximum(there.sum(), 1.0))[:, None]
    centred = embedding - (weight * embedding).sum(axis=0, keepdims=True)
    scaled = centred / jnp.sqrt((weight * jnp.square(centred)).sum(axis=0, keepdims=True) + 1e-6)
    first, second = scaled[:pairs], scaled[pairs:]
    power = jnp.square(first).sum(axis=1)[:, None] + jnp.square(second).sum(axis=1)[None] - 2.0 * first @ second.T
    both = there[:pairs] * there[pairs:]
    logits = -_SHARPNESS * power / np.float32(scaled.shape[1])
    logits = jnp.where((both[:, None] * both[None]) > 0, logits, -1e9)
    own = jnp.diagonal(logits)
    losses = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2.0 * own
    return 0.5 * (losses * both).sum() / jnp.maximum(both.sum(), 1.0)


def encode(encoder: TemporalEncoder, city: City, span: Span) -> Float[np.ndarray, "N E"]:
    """Embeds a few days of every region's readings.

    Args:
      encoder: a pre-trained encoder.
      city: a one-channel city, of any interval that divides the encoder's patch.
      span: 1 to 14 days that may be seen.

    Returns:
      float32 [N, E]. A region without a reading in the span takes the mean of its neighbours'.

    Raises:
      InputError: the span is shorter than a day, longer than 14, or without a reading; or the interval does not fit.
    """
    check_span(city, span)
    patches = cut_patches(city, span, encoder.config.patch_minutes, encoder.config.bins)
    rows = np.asarray(_encode_rows(encoder, *_arguments(patches, patches.observed)))
    return fill_from_neighbours(rows, silent_regions(city, span), city)


def reconstruct(
    encoder: TemporalEncoder, patches: Patches, visible: Bool[np.ndarray, "N Q"]
) -> Float[np.ndarray, "N Q K"]:
    """What the autoencoder makes of every patch from the visible ones alone.

    Args:
      encoder: a pre-trained encoder.
      patches: cut with the encoder's `patch_minutes` and `bins`.
      visible: which patches of which region it may see.

    Returns:
      float32 [N, Q, K], in units of the city, as `patches.bins`.
    """
    return np.asarray(_reconstruct_rows(encoder, *_arguments(patches, visible)))


def check_span(city: City, span: Span) -> None:
    """Raises `InputError` where a span is longer than the days that an encoder reads."""
    if len(span) > MOST_DAYS * city.steps_per_day:
        raise InputError(
            f"the span of city {city.name!r} (={len(span) / city.steps_per_day:.1f} days) is longer than {MOST_DAYS} "
            f"days; give its last {MOST_DAYS * city.steps_per_day} steps"
        )


def _arguments(patches: Patches, visible: np.ndarray) -> tuple[jax.Array, ...]:
    present = (visible & patches.observed).astype(np.float32)
    return jax.device_put((patches.bins, patches.share, patches.codes, patches.days, present))


def _one_window(codes: jax.Array, days: jax.Array, row: tuple[jax.Array, ...]) -> VisiblePatches:
    bins, share, present = row
    return VisiblePatches(bins[None], share[None], time_codes(codes, days)[None], present[None])


@jax.jit
def _encode_rows(
    encoder: TemporalEncoder, bins: jax.Array, share: jax.Array, codes: jax.Array, days: jax.Array, present: jax.Array
) -> jax.Array:
    module = MaskedAutoencoder(encoder.config)

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        made: Any = module.apply({"params": encoder.variables}, _one_window(codes, days, row), method="encode")
        return made[1][0]

    return jax.lax.map(one, (bins, share, present), batch_size=_REGIONS_AT_ONCE)


@jax.jit
def _reconstruct_rows(
    encoder: TemporalEncoder, bins: jax.Array, share: jax.Array, codes: jax.Array, days: jax.Array, present: jax.Array
) -> jax.Array:
    module = MaskedAutoencoder(encoder.config)

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        window = _one_window(codes, days, row)
        made: Any = module.apply({"params": encoder.variables}, window, window.codes)
        return made[0]

    return jax.lax.map(one, (bins, share, present), batch_size=_REGIONS_AT_ONCE)
