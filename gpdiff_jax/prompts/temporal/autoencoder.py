"""In: patches of a few days that may be seen. Out: their embedding, and what the hidden patches may have been.

A patch Transformer (masked autoencoders: He et al., arXiv 2111.06377; for traffic series: STEP, Shao et al.,
arXiv 2206.09113). The encoder sees only visible patches, the decoder makes the others from their time encodings.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.cities.calendar import HARMONICS, NUM_CALENDAR
from gpdiff_jax.cities.city import MINUTES_PER_DAY
from gpdiff_jax.errors import InputError, check_above_zero, named
from gpdiff_jax.models.layers import dense
from gpdiff_jax.typing import Params

MOST_DAYS = 14
LONGEST_PERIOD = 32.0  # days
_PERIODS = (2.0, 4.0, 8.0, 16.0, LONGEST_PERIOD)  # days, of the encodings that tell one day of a window from another
_SMALLEST_DEVIATION = 0.05  # in units of the city's median deviation
_CLIP = 8.0
_MAY_BE_ZERO = ("shifted_share", "contrast_weight")


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
    """Size of the encoder, and how it is pre-trained.

    A patch is `patch_minutes` long and holds `bins` bins. Training windows last 1 to `train_days` days; `masked_share`
    of their patches is hidden, of which at most `queries` are reconstructed; `shifted_share` of the windows are told
    another hour and day than their own. Beside that, two whole windows of `contrast_days` of each of `contrast_pairs`
    regions of one city are to be told from those of the others, with `contrast_weight` in the loss. `held_out_share` of
    every city's regions choose the best of `evaluations` moments.
    """

    patch_minutes: int = 120
    bins: int = 4
    width: int = 64
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 1
    train_days: int = 7
    masked_share: float = 0.75
    queries: int = 24
    steps: int = 1000
    batch: int = 64
    shifted_share: float = 0.2
    contrast_weight: float = 0.05
    contrast_pairs: int = 32
    contrast_days: int = 3
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    evaluations: int = 10
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        others = [field.name for field in dataclasses.fields(self) if field.name not in _MAY_BE_ZERO]
        check_above_zero(named(self, *others))
        for name in ("masked_share", "held_out_share", "shifted_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.contrast_weight < np.inf:
            raise InputError(f"`contrast_weight` must be a number of at least 0, got {self.contrast_weight}")
        if MINUTES_PER_DAY % self.patch_minutes:
            raise InputError(f"`patch_minutes` (={self.patch_minutes}) must divide 1440; choose e.g. 60 or 120")
        if self.train_days > MOST_DAYS:
            raise InputError(f"`train_days` must be at most {MOST_DAYS}, got {self.train_days}")
        if self.width % self.heads:
            raise InputError(f"`width` (={self.width}) must be a multiple of `heads` (={self.heads})")

    @property
    def patches_per_day(self) -> int:
        """Patches from one midnight to the next."""
        return MINUTES_PER_DAY // self.patch_minutes


@flax.struct.dataclass
class VisiblePatches:
    """Patches of B windows that the encoder may see, in any order; absent ones are padding."""

    bins: Float[Array, "*devices B Q bins"]  # in units of the city
    share: Float[Array, "*devices B Q bins"]  # observed share of every bin
    times: Float[Array, "*devices B Q G"]  # see `time_encodings`
    present: Float[Array, "*devices B Q"]  # 1, or 0 for padding and for patches that must not be seen


def time_encodings(clock: Float[Array, "*B Q F"], days: Float[Array, "*B Q"]) -> Float[Array, "*B Q G"]:
    """The calendar's features, and slow sines and cosines of the days passed, which are free of the interval."""
    frequencies = jnp.asarray([2 * np.pi / period for period in _PERIODS], jnp.float32)
    angle = days[..., None] * frequencies.reshape(*(1,) * days.ndim, -1)
    return jnp.concatenate([clock, jnp.sin(angle), jnp.cos(angle)], axis=-1)


def abstract_variables(config: TemporalConfig) -> Params:
    """Shapes and types of the variables of `MaskedAutoencoder`; nothing is computed."""

    def start() -> Any:
        bins, times = jnp.zeros((1, 1, config.bins)), jnp.zeros((1, 1, NUM_CALENDAR + 2 * len(_PERIODS)))
        patches = VisiblePatches(bins, bins, times, jnp.zeros((1, 1)))
        return MaskedAutoencoder(config).init(jax.random.key(0), patches, times)["params"]

    return jax.eval_shape(start)


def visible_scale(patches: VisiblePatches) -> tuple[Float[Array, "B 1 1"], Float[Array, "B 1 1"]]:
    """Mean and standard deviation of every window over what is visible of it."""
    weight = patches.share * patches.present[..., None]
    count = jnp.maximum(weight.sum(axis=(1, 2), keepdims=True), 1e-6)
    mean = (weight * patches.bins).sum(axis=(1, 2), keepdims=True) / count
    variance = (weight * jnp.square(patches.bins - mean)).sum(axis=(1, 2), keepdims=True) / count
    return mean, jnp.sqrt(variance + _SMALLEST_DEVIATION**2)


class _Block(nn.Module):
    """Pre-norm attention and feed-forward; over its own tokens, or over a memory."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None, present: jax.Array) -> jax.Array:
        """Tokens [B, Q, width] after attending to those of [B, M, width] that are present [B, M]."""
        width, head = x.shape[-1], x.shape[-1] // self.heads
        normed = nn.LayerNorm(name="attention_norm")(x)
        seen = normed if memory is None else memory

        def split(rows: jax.Array, name: str) -> jax.Array:
            return dense(rows, width, name=name).reshape(*rows.shape[:2], self.heads, head)

        query, key, value = split(normed, "query"), split(seen, "key"), split(seen, "value")
        scores = jnp.einsum("bqhd,bmhd->bhqm", query, key) / np.sqrt(head).astype(np.float32)
        scores = jnp.where(present[:, None, None, :] > 0, scores, -1e9)
        mixed = jnp.einsum("bhqm,bmhd->bqhd", nn.softmax(scores), value).reshape(x.shape)
        x = x + dense(mixed, width, name="attention_out")
        hidden = nn.gelu(dense(nn.LayerNorm(name="feed_forward_norm")(x), 4 * width, name="feed_forward_in"))
        return x + dense(hidden, width, name="feed_forward_out")


class MaskedAutoencoder(nn.Module):
    """Encoder of visible patches, pooled to one vector per window; decoder of any other patch by its time code.

    What is hidden is put together from averages of the visible readings, weighted by attention, and a correction.
    """

    config: TemporalConfig

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        self.encoder = [_Block(config.heads, name=f"encoder_{k}") for k in range(config.encoder_layers)]
        self.decoder = [_Block(config.heads, name=f"decoder_{k}") for k in range(config.decoder_layers)]
        self.patch_in = nn.Dense(config.width, name="patch_in")
        self.query_in = nn.Dense(config.width, name="query_in")
        self.encoder_norm = nn.LayerNorm(name="encoder_norm")
        self.decoder_norm = nn.LayerNorm(name="decoder_norm")
        self.copy_query = nn.Dense(config.width, name="copy_query")
        self.copy_key = nn.Dense(config.width, name="copy_key")
        self.copy_kernel = self.param("copy_kernel", lambda _: jnp.asarray(_first_kernels(config.heads), jnp.float32))
        self.bins_mix = nn.Dense(2 * config.width, name="bins_mix")
        self.copy_share = nn.Dense(
            config.heads + 1, name="copy_share", bias_init=nn.initializers.constant(1.0 / (config.heads + 1))
        )
        self.bins_out = nn.Dense(config.bins, name="bins_out", kernel_init=nn.initializers.zeros_init())

    def encode(self, patches: VisiblePatches) -> tuple[Float[Array, "B Q D"], Float[Array, "B E"]]:
        """Tokens of the visible patches, and their mean, the embedding."""
        scaled = _scaled(patches)
        rows = jnp.concatenate([scaled, patches.share, patches.times], axis=-1)
        x = self.patch_in(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:2], -1)
        for block in self.encoder:
            x = block(x, None, patches.present)
        x = self.encoder_norm(x)
        weight = patches.present / jnp.maximum(patches.present.sum(axis=1, keepdims=True), 1.0)
        return x, jnp.einsum("bq,bqd->bd", weight, x)

    def decode(self, tokens: jax.Array, patches: VisiblePatches, queries: Float[Array, "B queries G"]) -> jax.Array:
        """Bins [B, queries, bins], in units of the city, of the patches at the times of `queries`."""
        size, heads = queries.shape[:2], self.config.heads
        x = self.query_in(queries.reshape(-1, queries.shape[-1])).reshape(*size, -1)
        for block in self.decoder:
            x = block(x, tokens, patches.present)
        rows = self.decoder_norm(x).reshape(-1, x.shape[-1])
        query = self.copy_query(rows).reshape(*size, heads, -1)
        key = self.copy_key(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:2], heads, -1)
        scores = jnp.einsum("bmhd,bqhd->bhmq", query, key) / np.sqrt(query.shape[-1]).astype(np.float32)
        kernel = jnp.einsum("bmg,hg->bmhg", queries, self.copy_kernel)
        scores = scores + jnp.einsum("bmhg,bqg->bhmq", kernel, patches.times)
        scores = jnp.where(patches.present[:, None, None] > 0, scores, -1e9)
        power = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * patches.present[:, None, None]
        # A bin that was not observed has nothing to give to an average of that bin.
        weight = patches.present[..., None] * patches.share
        total = jnp.einsum("bhmq,bqk->bmhk", power, weight)
        copied = jnp.einsum("bhmq,bqk->bmhk", power, weight * _scaled(patches)) / jnp.maximum(total, 1e-6)
        day, gap = daily_profile(_scaled(patches), weight, _hour_of(patches.times, self.config.patches_per_day))
        hours = _hour_of(queries, self.config.patches_per_day)
        copied = jnp.concatenate([copied, jnp.einsum("bmp,bpk->bmk", hours, day)[:, :, None]], axis=2)
        rows = jnp.concatenate(
            [
                rows,
                copied.reshape(rows.shape[0], -1),
                jnp.einsum("bmp,bpk->bmk", hours, gap).reshape(rows.shape[0], -1),
            ],
            axis=1,
        )
        rows = nn.gelu(self.bins_mix(rows))
        share = self.copy_share(rows).reshape(*size, heads + 1, 1)
        made = (share * copied).sum(axis=2) + self.bins_out(rows).reshape(*size, -1)
        mean, std = visible_scale(patches)
        return made * std + mean

    def __call__(self, patches: VisiblePatches, queries: Float[Array, "B queries G"]) -> Float[Array, "B queries bins"]:
        """Bins, in units of the city, of the patches at the times of `queries`."""
        return self.decode(self.encode(patches)[0], patches, queries)


def daily_profile(
    bins: Float[Array, "B Q bins"], weight: Float[Array, "B Q bins"], hour: Float[Array, "B Q P"]
) -> tuple[Float[Array, "B P bins"], Float[Array, "B P bins"]]:
    """The mean of what is visible at every time of day, with straight lines around the clock where nothing is.

    Args:
      bins: of patches.
      weight: how much of them is visible.
      hour: 1 at the place of every patch among the P patches of a day.

    Returns:
      The profile, and how far apart the visible bins beside each of its bins are, as a share of the day.
    """
    total = jnp.einsum("bqp,bqk->bpk", hour, weight * bins)
    seen = jnp.einsum("bqp,bqk->bpk", hour, weight)
    size, slots = seen.shape, seen.shape[1] * seen.shape[2]
    mean = (total / jnp.maximum(seen, 1e-6)).reshape(-1, slots)
    place = jnp.arange(3 * slots, dtype=jnp.int32)[None]
    known = jnp.tile(seen.reshape(-1, slots) > 0, (1, 3))
    before = jax.lax.cummax(jnp.where(known, place, 0), axis=1)[:, slots : 2 * slots]
    after = jax.lax.cummin(jnp.where(known, place, 3 * slots - 1), axis=1, reverse=True)[:, slots : 2 * slots]
    gap = (after - before).astype(jnp.float32)
    share = (place[:, slots : 2 * slots] - before).astype(jnp.float32) / jnp.maximum(gap, 1.0)
    low, high = (jnp.take_along_axis(mean, side % slots, axis=1) for side in (before, after))
    return (low + share * (high - low)).reshape(size), (jnp.minimum(gap, slots) / np.float32(slots)).reshape(size)


def _hour_of(times: Float[Array, "B Q G"], patches_per_day: int) -> Float[Array, "B Q P"]:
    """1 at the place of every patch in its day, read off the first harmonic of its time code."""
    angle = 2 * np.pi / patches_per_day * np.arange(patches_per_day)
    wave = jnp.asarray(np.stack([np.sin(angle), np.cos(angle)]), jnp.float32)
    return jax.nn.one_hot(jnp.argmax(times[..., :2] @ wave, axis=-1), patches_per_day)


def _first_kernels(heads: int) -> np.ndarray:
    """Weights of the time encodings with which averages begin: near hours, near hours of like days, and close in time.

    Odd harmonics k of weight 1 / k^2 add up to a logarithm that falls straight with the distance between two hours.
    """
    near_hour, like_day, close = (np.zeros(NUM_CALENDAR + 2 * len(_PERIODS)) for _ in range(3))
    harmonic = np.repeat(np.arange(1, HARMONICS + 1), 2)
    near_hour[: 2 * HARMONICS] = np.where(harmonic % 2, 5.0 / harmonic**2, 0.0)
    like_day[:] = near_hour
    like_day[2 * HARMONICS : NUM_CALENDAR] = 2.0
    close[NUM_CALENDAR:] = 30.0
    return np.stack([(near_hour, like_day, close)[head % 3] for head in range(heads)])


def _scaled(patches: VisiblePatches) -> jax.Array:
    mean, std = visible_scale(patches)
    return jnp.where(patches.share > 0, jnp.clip((patches.bins - mean) / std, -_CLIP, _CLIP), 0.0)
