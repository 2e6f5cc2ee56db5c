"""In: the zoo's tokens. Out: the latents that are diffused, small and of unit size, and the way back to parameters.

A latent is the normalised tokens themselves, or their leading principal components: layer by layer, or of all layers
in one vector.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError, check_at_least, check_types
from gpdiff_jax.zoo.tokens import TokenLayout, check_width, from_tokens, mask_of

NORMALISATIONS = ("layer", "coordinate")
SPACES = ("layers", "joint")
_CODES_OF_ROW = 8  # entries of a row of a joint latent, a token of the denoiser
# Of the spread of its layer: a coordinate that varies less is hardly worth a unit of the generator's error.
_LEAST_OF_LAYER = 0.01
# Of the size of its layer's parameters: what varies less is rounding.
_LEAST_OF_SIZE = 1e-6


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What is diffused.

    `token_width` is a number of entries, or "gcd" for the published rule (`tokens.make_layout`). `components` is the
    number of leading principal components kept per layer; 0 diffuses the tokens themselves. A few hundred vectors of
    many thousand entries differ in few directions that matter; in the others a generator can only learn noise.
    `normalisation` says what the differences from the zoo's mean are divided by, before the components are found where
    there are any: "layer", one spread for all of a layer, or "coordinate", every coordinate's own, at least a hundredth
    of its layer's, so that a coordinate that never varies stays where it is whatever the generator's error.

    In the space "layers" every layer has components of its own, around the zoo's mean. In the "joint" space all layers
    are one, and so are their `components`: of the differences from the pooled model, not from the zoo's mean, so that a
    latent of zeros is the pooled model.
    """

    token_width: int | str = 256
    components: int = 32
    normalisation: str = "layer"
    space: str = "layers"

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.token_width)
        if self.space not in SPACES:
            raise InputError(f"`space` must be one of {', '.join(SPACES)}, got {self.space!r}")
        check_at_least(int(self.space == "joint"), {"components": self.components})
        if self.normalisation not in NORMALISATIONS:
            raise InputError(f"`normalisation` must be one of {', '.join(NORMALISATIONS)}, got {self.normalisation!r}")


@flax.struct.dataclass
class Codec:
    """Centre, scale and principal directions of the zoo's tokens.

    With components, `basis` holds for every layer float32 [k, tokens of the layer * W]: each row is a unit principal
    direction times the standard deviation along it times `scale`, so that a latent's row times the basis is a
    difference of tokens. A layer that does not vary has no rows; without components, `basis` is empty. In the joint
    space there is one such matrix, of all tokens, and a latent holds its codes row after row.
    """

    pooled_tokens: Float[Array, "*devices L W"]  # tokens of the pooled parameters
    mean_difference: Float[Array, "*devices L W"]  # from the pooled model, over the zoo
    scale: Float[Array, "*devices L W"]  # what the differences are divided by, a standard deviation, 1 on padding
    basis: tuple[jax.Array, ...]
    layout: TokenLayout = flax.struct.field(pytree_node=False)
    space: str = flax.struct.field(pytree_node=False, default="layers")

    @property
    def is_joint(self) -> bool:
        """Whether all layers have their codes in common."""
        return self.space == "joint"

    @property
    def layer_of_row(self) -> tuple[int, ...]:
        """The layer of every row of a latent, a number into `kinds`; in the joint space all are of one."""
        if self.is_joint:
            return (0,) * len(self.filled)
        return tuple(range(len(self.layout.layers))) if self.basis else self.layout.layer_of_token

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, see `models.kinds`; in the joint space of the only one."""
        return ("mixed",) if self.is_joint else self.layout.kinds

    @property
    def filled(self) -> tuple[int, ...]:
        """How many entries of every row of a latent hold something; the others, behind them, are padding."""
        if self.is_joint:
            codes = self.basis[0].shape[0]
            return tuple(min(_CODES_OF_ROW, codes - first) for first in range(0, max(codes, 1), _CODES_OF_ROW))
        return tuple(rows.shape[0] for rows in self.basis) if self.basis else self.layout.filled

    @property
    def width(self) -> int:
        """Entries of a row of a latent."""
        return max(1, *self.filled) if self.basis else self.layout.width

    def mask(self) -> Float[np.ndarray, "Z D"]:
        """1 where a latent holds something, 0 on its padding."""
        return mask_of(self.filled, self.width)

    def encode(self, tokens: Float[Array, "L W"]) -> Float[Array, "Z D"]:
        """Tokens of one parameter vector to its latent; padding is not looked at."""
        difference = jnp.where(
            self.layout.mask() > 0, (tokens - self.pooled_tokens - self.mean_difference) / self.scale, 0.0
        )
        if not self.basis:
            return difference
        rows, size = [], self.width * (len(self.filled) if self.is_joint else 1)
        for layer, basis in enumerate(self.basis):
            own = self._tokens_of(layer)
            flat, scale = difference[own].reshape(-1), self.scale[own].reshape(1, -1)
            directions = basis / scale
            row = directions @ flat / jnp.maximum(jnp.square(directions).sum(axis=1), 1e-20)
            rows.append(jnp.pad(row, (0, size - basis.shape[0])))
        return jnp.concatenate(rows).reshape(-1, self.width) if self.is_joint else jnp.stack(rows)

    def decode(self, latent: Float[Array, "Z D"]) -> Float[Array, "L W"]:
        """A latent to the tokens of parameters; inverts `encode` up to rounding and what the components leave out.

        Padding of the latent is not looked at.
        """
        if not self.basis:
            return self.pooled_tokens + self.mean_difference + jnp.where(self.mask() > 0, latent * self.scale, 0.0)
        rows = [latent.reshape(-1)] if self.is_joint else latent
        parts = [
            (rows[layer][: basis.shape[0]] @ basis).reshape(-1, self.layout.width)
            for layer, basis in enumerate(self.basis)
        ]
        return self.pooled_tokens + self.mean_difference + jnp.concatenate(parts)

    def params(self, latent: Float[Array, "Z D"], shrinkage: float = 1.0) -> dict:
        """The parameter pytree of a latent; `shrinkage` is what stays of its difference from the pooled one."""
        tokens = self.decode(latent)
        if shrinkage != 1.0:
            tokens = self.pooled_tokens + shrinkage * (tokens - self.pooled_tokens)
        return from_tokens(self.layout, tokens)

    def _tokens_of(self, layer: int) -> slice:
        layers = self.layout.layer_of_token
        if self.is_joint:
            return slice(0, len(layers))
        return slice(layers.index(layer), len(layers) - layers[::-1].index(layer))


def fit_codec(
    layout: TokenLayout,
    pooled_tokens: Float[np.ndarray, "L W"],
    tokens: Float[np.ndarray, "X L W"],
    weights: Float[np.ndarray, " X"],
    components: int,
    normalisation: str = "layer",
    space: str = "layers",
) -> Codec:
    """Statistics of a zoo's tokens.

    Args:
      layout: of the tokens.
      pooled_tokens: [L, W], tokens of the pooled parameters.
      tokens: [X, L, W], the zoo.
      weights: [X], weight of each vector, so that every city counts alike.
      components: most components per layer, or in all in the joint space; 0 for none.
      normalisation: one of `NORMALISATIONS`.
      space: one of `SPACES`.

    Returns:
      The codec.
    """
    share = weights / weights.sum()
    differences = tokens - pooled_tokens
    joint = space == "joint"
    mean_difference = np.zeros_like(pooled_tokens) if joint else np.einsum("x,xlw->lw", share, differences)
    deviations = differences - mean_difference
    variance = np.einsum("x,xlw->lw", share, np.square(deviations))
    mask, layer = layout.mask(), layout.layer_tokens()
    if joint:
        layer = np.zeros_like(layer)
    scales, basis = np.ones_like(mask, np.float64), []
    for index in range(int(layer.max()) + 1):
        in_layer = layer == index
        filled = mask[in_layer] > 0
        overall = np.sqrt(variance[in_layer][filled].mean())
        size = np.sqrt(np.square((pooled_tokens + mean_difference)[in_layer][filled], dtype=np.float64).mean())
        smallest = max(_LEAST_OF_SIZE * size, 1e-8)
        scale = np.full(filled.shape, max(overall, smallest))
        if normalisation == "coordinate":
            scale = np.maximum(np.sqrt(variance[in_layer]), _LEAST_OF_LAYER * scale)
        scales[in_layer] = np.where(filled, scale, 1.0)
        if components:
            rows = (np.sqrt(share)[:, None, None] * deviations[:, in_layer] / scales[in_layer]).reshape(len(tokens), -1)
            directions = principal_directions(rows, components) if overall > smallest else rows[:0]
            basis.append(directions * scales[in_layer].reshape(1, -1))
    arrays = {
        "pooled_tokens": pooled_tokens,
        "mean_difference": mean_difference,
        "scale": scales,
        "basis": tuple(basis),
    }
    held = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), arrays))
    return Codec(**held, layout=layout, space=space)


def principal_directions(rows: Float[np.ndarray, "X Y"], count: int) -> Float[np.ndarray, "k Y"]:
    """Leading principal directions of weighted, centred rows, each as long as the spread along it.

    Args:
      rows: each times the square root of its share.
      count: at most so many.

    Returns:
      The directions, orthogonal, the longest first; those that hold a millionth of the leading variance are left out.
    """
    rows = rows.astype(np.float64)
    if rows.shape[0] <= rows.shape[1]:
        variances, left = np.linalg.eigh(rows @ rows.T)
    else:
        variances, right = np.linalg.eigh(rows.T @ rows)
    kept = np.argsort(-variances)[:count]
    # What holds less is rounding.
    kept = kept[variances[kept] > 1e-6 * variances.max()] if variances.max() > 0 else kept[:1]
    if rows.shape[0] <= rows.shape[1]:
        return left[:, kept].T @ rows
    return right[:, kept].T * np.sqrt(np.maximum(variances[kept], 0.0))[:, None]


def encode_zoo(codec: Codec, tokens: Float[Array, "R M L W"]) -> Float[Array, "R M Z D"]:
    """Latents of all vectors of a zoo."""
    return jax.lax.map(jax.vmap(partial(Codec.encode, codec)), tokens)
