"""In: source cities and their training spans. Out: a pre-trained encoder, and the embedding of a few days of any city's
readings, the temporal prompt.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
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
from gpdiff_jax.prompts.temporal.autoencoder import (
    MOST_DAYS,
    MaskedAutoencoder,
    TemporalConfig,
    VisiblePatches,
    time_encodings,
)
from gpdiff_jax.prompts.temporal.patch_bank import (
    MaskedWindows,
    PatchBank,
    build_patch_bank,
    draw_masked_windows,
    draw_pairs,
)
from gpdiff_jax.prompts.temporal.patches import Patches, cut_patches
from gpdiff_jax.training.loop import VALIDATION, steps_between_evaluations, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import DEVICES, training_devices
from gpdiff_jax.training.step import LossTerm, Part, TrainState, make_step, of_type, start_training
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.vectors import squared_distances

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
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> TemporalEncoder:
    """Trains the masked autoencoder on random windows of source cities, every city with the same weight.

    Args:
      cities: one-channel source cities, of any intervals that divide the patch.
      spans: per city, its training span; nothing else is read.
      config: sizes.
      key: random key.
      devices: see `parallel.training_devices`.
      checkpoints: see `loop.train`.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The encoder at its lowest error on the held-out regions.

    Raises:
      InputError: no city, or see `cut_patches`.
      NotFiniteError: a loss is not finite; names the step.
    """
    if not cities:
        raise InputError("`cities` is empty; name at least one source city")
    keys = jax.random.split(key, 4)
    devices = training_devices(config.batch, devices)
    bank, module = build_patch_bank(cities, spans, config, key=keys[0]), MaskedAutoencoder(config)
    rates = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 20), max(config.steps, 2), 0.02 * config.learning_rate
    )
    optimiser = clipped_adam(rates, weight_decay=config.weight_decay)

    @jax.jit
    def start(bank: PatchBank, key: Key) -> Params:
        example = draw_masked_windows(bank, config, 1, bank.probabilities[0], key=key)
        return module.init(key, example.visible, example.queries)["params"]

    best = train(
        make_encoder_step(optimiser, config, len(devices)),
        start_training(of_type(start(bank, keys[1]), bank.bins.dtype), optimiser),
        bank,
        key=keys[2],
        steps=config.steps,
        evaluate_every=steps_between_evaluations(config.steps, config.evaluations),
        devices=devices,
        name="temporal encoder",
        evaluate=_make_evaluate(config, len(devices)),
        evaluate_key=keys[3],
        checkpoints=checkpoints,
        settings=config,
        progress=progress,
    ).params
    return TemporalEncoder(best, config)


def make_encoder_step(
    optimiser: optax.GradientTransformation, config: TemporalConfig, num_devices: int
) -> Callable[[TrainState, PatchBank, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training the encoder, for `loop.train`: hidden patches to be made, and windows to be told apart.

    The devices share both; of the second, whose windows are compared with each other, they tell each other the
    embeddings of their shares.

    Args:
      optimiser: of the variables.
      config: sizes.
      num_devices: that share the work.

    Returns:
      See `step.make_step`.
    """
    module = MaskedAutoencoder(config)

    def masked(variables: Params, bank: PatchBank, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict]:
        drawn = draw_masked_windows(bank, config, config.batch, bank.probabilities[0], key=jax.random.split(key)[0])
        mine = jax.tree.map(lambda leaf: leaf[part.numbers], drawn)
        return *masked_sums(module, variables, mine), {}

    def contrast(variables: Params, bank: PatchBank, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict]:
        del part
        pairs = draw_pairs(bank, config, bank.probabilities[0], key=jax.random.split(key)[1])
        return contrast_of(_embed_shared(module, variables, pairs), pairs), jnp.ones(()), {}

    terms = [
        LossTerm("train_masked_loss", masked, config.batch),
        LossTerm("train_contrast_loss", contrast, 1, coefficient=config.contrast_weight, coupled=True),
    ]
    return make_step(terms, optimiser, num_devices=num_devices)


def _make_evaluate(
    config: TemporalConfig, num_devices: int
) -> Callable[[Params, PatchBank, Key], dict[str, jax.Array]]:
    """The losses on the held-out regions; the devices share the batches."""
    module, batches = MaskedAutoencoder(config), max(1, _EVALUATION_WINDOWS // config.batch)
    share = -(-batches // num_devices)

    def evaluate(variables: Params, bank: PatchBank, key: Key) -> dict[str, jax.Array]:
        def one_batch(key: Key) -> tuple[jax.Array, jax.Array]:
            window_key, pair_key = jax.random.split(key)
            windows = draw_masked_windows(bank, config, config.batch, bank.probabilities[1], key=window_key)
            pairs = draw_pairs(bank, config, bank.probabilities[1], key=pair_key)
            return masked_loss(module, variables, windows), contrast_loss(module, variables, pairs)

        mine = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
        keys = jax.random.split(key, batches)[jnp.minimum(mine, batches - 1)]
        losses = jax.lax.map(one_batch, keys)
        masked, contrast = (
            jax.lax.psum(jnp.where(mine < batches, part, 0.0).sum(), DEVICES) / batches for part in losses
        )
        whole = masked + config.contrast_weight * contrast
        return {"validation_masked_loss": masked, "validation_contrast_loss": contrast, VALIDATION: whole}

    return evaluate


def masked_loss(module: MaskedAutoencoder, variables: Params, windows: MaskedWindows) -> jax.Array:
    """Huber loss on the observed bins of hidden patches, in deviations of their region."""
    total, weight = masked_sums(module, variables, windows)
    return total / jnp.maximum(weight, 1.0)


def masked_sums(module: MaskedAutoencoder, variables: Params, windows: MaskedWindows) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses of `masked_loss`, and of their weights."""
    made: Any = module.apply({"params": variables}, windows.visible, windows.queries)
    error = (made - windows.target) / windows.scale[:, None, None]
    return (optax.losses.huber_loss(error, delta=_KNEE) * windows.weight).sum(), windows.weight.sum()


def _embed(module: MaskedAutoencoder, variables: Params, windows: VisiblePatches) -> jax.Array:
    """Embeddings [W, E] of W windows."""
    made: Any = module.apply({"params": variables}, windows, method="encode")
    return made[1]


def _embed_shared(module: MaskedAutoencoder, variables: Params, windows: VisiblePatches) -> jax.Array:
    """The same, of windows that all devices of a mapped axis `DEVICES` hold, each embedding a share of them.

    Gradients come back to the device that embedded a window, once from every device.
    """
    count, num_devices = windows.present.shape[0], jax.lax.axis_size(DEVICES)
    share = -(-count // num_devices)
    mine = (share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)) % count
    embedding = _embed(module, variables, jax.tree.map(lambda leaf: leaf[mine], windows))
    return jax.lax.all_gather(embedding, DEVICES, tiled=True)[:count]


def contrast_loss(module: MaskedAutoencoder, variables: Params, windows: VisiblePatches) -> jax.Array:
    """How badly the second window of a region is told from those of the other regions of its city (InfoNCE).

    Distances are those in which prompts are compared: between entries standardised within the city.
    Source: van den Oord et al., arXiv 1807.03748, eq. 4.
    """
    return contrast_of(_embed(module, variables, windows), windows)


def contrast_of(embedding: jax.Array, windows: VisiblePatches) -> jax.Array:
    """The loss of `contrast_loss`, of the embeddings [2 Y, E] of its windows."""
    pairs = windows.present.shape[0] // 2
    there = (windows.present.sum(axis=1) > 0).astype(jnp.float32)
    weight = (there / jnp.maximum(there.sum(), 1.0))[:, None]
    centred = embedding - (weight * embedding).sum(axis=0, keepdims=True)
    scaled = centred / jnp.sqrt((weight * jnp.square(centred)).sum(axis=0, keepdims=True) + 1e-6)
    first, second = scaled[:pairs], scaled[pairs:]
    power = squared_distances(first, second)
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
    rows = np.asarray(_apply_rows(encoder, *_arguments(patches, patches.observed), encode=True))
    return fill_from_neighbours(rows, silent_regions(city, span), city)


def reconstruct(
    encoder: TemporalEncoder, patches: Patches, visible: Bool[np.ndarray, "N Q"]
) -> Float[np.ndarray, "N Q bins"]:
    """What the autoencoder makes of every patch from the visible ones alone.

    Args:
      encoder: a pre-trained encoder.
      patches: cut with the encoder's `patch_minutes` and `bins`.
      visible: which patches of which region it may see.

    Returns:
      float32 [N, Q, bins], in units of the city, as `patches.bins`.
    """
    return np.asarray(_apply_rows(encoder, *_arguments(patches, visible), encode=False))


def check_span(city: City, span: Span) -> None:
    """Raises `InputError` where a span is longer than the days that an encoder reads."""
    if len(span) > MOST_DAYS * city.steps_per_day:
        raise InputError(
            f"the span of city {city.name!r} (={len(span) / city.steps_per_day:.1f} days) is longer than {MOST_DAYS} "
            f"days; give its last {MOST_DAYS * city.steps_per_day} steps"
        )


def _arguments(patches: Patches, visible: np.ndarray) -> tuple[jax.Array, ...]:
    present = (visible & patches.observed).astype(np.float32)
    return jax.device_put((patches.bins, patches.share, patches.clock, patches.days, present))


@functools.partial(jax.jit, static_argnames="encode")
def _apply_rows(
    encoder: TemporalEncoder,
    bins: jax.Array,
    share: jax.Array,
    clock: jax.Array,
    days: jax.Array,
    present: jax.Array,
    *,
    encode: bool,
) -> jax.Array:
    """Embeddings [N, E] of all regions where `encode`, else their reconstructed bins [N, Q, bins]; some at a time."""
    module = MaskedAutoencoder(encoder.config)

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        bins, share, present = row
        window = VisiblePatches(bins[None], share[None], time_encodings(clock, days)[None], present[None])
        if encode:
            embedding: Any = module.apply({"params": encoder.variables}, window, method="encode")
            return embedding[1][0]
        made: Any = module.apply({"params": encoder.variables}, window, window.times)
        return made[0]

    return jax.lax.map(one, (bins, share, present), batch_size=_REGIONS_AT_ONCE)
