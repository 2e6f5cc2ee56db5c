"""In: a few days of every region's readings. Out: their embedding by a masked autoencoder, the temporal prompt.

A patch Transformer (masked autoencoders: He et al., arXiv 2111.06377; for traffic series: STEP, Shao et al.,
arXiv 2206.09113). The encoder sees only visible patches, the decoder asks it for the others by their time codes.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gpdiff_jax.cities.city import MINUTES_PER_DAY, City
from gpdiff_jax.cities.scaling import fill_from_neighbours, silent_regions
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.layers import dense
from gpdiff_jax.prompts.patches import Patches, cut_patches
from gpdiff_jax.typing import Params

MOST_DAYS = 14
_PERIODS = (2.0, 4.0, 8.0, 16.0, 32.0)  # days, of the codes that tell one day of a window from another
_SMALLEST_DEVIATION = 0.05  # in units of the city's median deviation
_CLIP = 8.0
_REGIONS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
    """Size of the encoder, and how it is pre-trained.

    A patch is `patch_minutes` long and holds `bins` bins. Training windows last 1 to `train_days` days; `masked_share`
    of their patches is hidden, of which `queries` are reconstructed. `held_out_share` of every city's regions choose
    the best of `evaluations` moments.
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
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    evaluations: int = 10
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise InputError(f"`{field.name}` must be above 0, got {getattr(self, field.name)}")
        for name in ("masked_share", "held_out_share"):
            if getattr(self, name) >= 1:
                raise InputError(f"`{name}` must be below 1, got {getattr(self, name)}")
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
class TemporalEncoder:
    """A pre-trained encoder: what `encode` needs, and plain arrays to save."""

    variables: Params
    config: TemporalConfig = flax.struct.field(pytree_node=False)


class VisiblePatches(flax.struct.PyTreeNode):
    """Patches of B windows that the encoder may see, in any order; absent ones are padding."""

    bins: Float[Array, "B Q K"]  # in units of the city
    share: Float[Array, "B Q K"]
    codes: Float[Array, "B Q F"]  # of time, with the day of the window
    present: Float[Array, "B Q"]  # 1, or 0 for padding and for patches that must not be seen


def time_codes(codes: Float[Array, "*B Q F"], days: Float[Array, "*B Q"]) -> Float[Array, "*B Q G"]:
    """The calendar's codes, and slow sines and cosines of the days passed, which are free of the interval."""
    angle = days[..., None] * jnp.asarray([2 * np.pi / period for period in _PERIODS], jnp.float32)
    return jnp.concatenate([codes, jnp.sin(angle), jnp.cos(angle)], axis=-1)


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
    """Encoder of visible patches, pooled to one vector per window; decoder of any other patch by its time code."""

    config: TemporalConfig

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        self.encoder = [_Block(config.heads, name=f"encoder_{k}") for k in range(config.encoder_layers)]
        self.decoder = [_Block(config.heads, name=f"decoder_{k}") for k in range(config.decoder_layers)]
        self.patch_in = nn.Dense(config.width, name="patch_in")
        self.query_in = nn.Dense(config.width, name="query_in")
        self.pooled_in = nn.Dense(config.width, name="pooled_in")
        self.encoder_norm = nn.LayerNorm(name="encoder_norm")
        self.decoder_norm = nn.LayerNorm(name="decoder_norm")
        self.bins_out = nn.Dense(config.bins, name="bins_out")

    def encode(self, patches: VisiblePatches) -> tuple[Float[Array, "B Q D"], Float[Array, "B E"]]:
        """Tokens of the visible patches, and their mean, the embedding."""
        mean, std = visible_scale(patches)
        scaled = jnp.clip((patches.bins - mean) / std, -_CLIP, _CLIP) * (patches.share > 0)
        rows = jnp.concatenate([scaled, patches.share, patches.codes], axis=-1)
        x = self.patch_in(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:2], -1)
        for block in self.encoder:
            x = block(x, None, patches.present)
        x = self.encoder_norm(x)
        weight = patches.present / jnp.maximum(patches.present.sum(axis=1, keepdims=True), 1.0)
        return x, jnp.einsum("bq,bqd->bd", weight, x)

    def __call__(self, patches: VisiblePatches, queries: Float[Array, "B M G"]) -> Float[Array, "B M K"]:
        """Bins, in units of the city, of the patches at the time codes asked for."""
        tokens, pooled = self.encode(patches)
        memory = jnp.concatenate([tokens, self.pooled_in(pooled)[:, None]], axis=1)
        present = jnp.concatenate([patches.present, jnp.ones_like(patches.present[:, :1])], axis=1)
        x = self.query_in(queries.reshape(-1, queries.shape[-1])).reshape(*queries.shape[:2], -1)
        for block in self.decoder:
            x = block(x, memory, present)
        mean, std = visible_scale(patches)
        rows = self.bins_out(self.decoder_norm(x).reshape(-1, x.shape[-1]))
        return rows.reshape(*queries.shape[:2], -1) * std + mean


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
    return tuple(jnp.asarray(part) for part in (patches.bins, patches.share, patches.codes, patches.days, present))


def _one_window(codes: jax.Array, days: jax.Array, row: tuple[jax.Array, ...]) -> VisiblePatches:
    bins, share, present = row
    return VisiblePatches(bins[None], share[None], time_codes(codes, days)[None], present[None])


@jax.jit
def _encode_rows(
    encoder: TemporalEncoder, bins: jax.Array, share: jax.Array, codes: jax.Array, days: jax.Array, present: jax.Array
) -> jax.Array:
    module = MaskedAutoencoder(encoder.config)

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        window = _one_window(codes, days, row)
        return module.apply({"params": encoder.variables}, window, method="encode")[1][0]

    return jax.lax.map(one, (bins, share, present), batch_size=_REGIONS_AT_ONCE)


@jax.jit
def _reconstruct_rows(
    encoder: TemporalEncoder, bins: jax.Array, share: jax.Array, codes: jax.Array, days: jax.Array, present: jax.Array
) -> jax.Array:
    module = MaskedAutoencoder(encoder.config)

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        window = _one_window(codes, days, row)
        return module.apply({"params": encoder.variables}, window, window.codes)[0]

    return jax.lax.map(one, (bins, share, present), batch_size=_REGIONS_AT_ONCE)
