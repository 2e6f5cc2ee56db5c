"""In: the zoo's tokens. Out: the codes that are diffused, small and of unit size, and the way back to parameters.

A code is either the normalised tokens themselves, or, layer by layer, their leading principal components.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.tokens import TokenLayout, from_tokens


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What is diffused.

    `components` is the number of leading principal components kept per layer; 0 diffuses the tokens themselves. A few
    hundred vectors of many thousand entries differ in few directions that matter; in the others a generator can only
    learn noise.
    """

    token_width: int = 256
    components: int = 32

    def __post_init__(self) -> None:
        if self.token_width < 1:
            raise InputError(f"`token_width` must be at least 1, got {self.token_width}")
        if self.components < 0:
            raise InputError(f"`components` must be at least 0, got {self.components}")


@flax.struct.dataclass
class Codec:
    """Centre, directions and spread of the zoo's tokens.

    With components, `basis` holds for every layer float32 [k, tokens of the layer * W], each row a direction times
    the zoo's spread along it; without, it is empty and `spread` [L, W] scales the tokens, one number for every layer.
    """

    base: jax.Array  # float32 [L, W], tokens of the base parameters
    mean: jax.Array  # float32 [L, W], mean difference to the base over the zoo
    spread: jax.Array  # float32 [L, W], 1 on padding
    basis: tuple[jax.Array, ...]
    layout: TokenLayout = flax.struct.field(pytree_node=False)

    @property
    def layer_of_code(self) -> tuple[int, ...]:
        """The layer of every row of a code."""
        return tuple(range(len(self.layout.layers))) if self.basis else self.layout.layer_of_token

    def mask(self) -> Float[np.ndarray, "rows width"]:
        """1 where a code holds something, 0 on its padding."""
        if not self.basis:
            return self.layout.mask()
        width = max(rows.shape[0] for rows in self.basis)
        return np.stack([np.arange(width) < rows.shape[0] for rows in self.basis]).astype(np.float32)

    def encode(self, tokens: Float[Array, "L W"]) -> Float[Array, "rows width"]:
        """Tokens of one parameter vector to its code."""
        difference = tokens - self.base - self.mean
        if not self.basis:
            return difference / self.spread
        width, rows = self.mask().shape[1], []
        for layer, basis in enumerate(self.basis):
            flat = difference[self._rows(layer)].reshape(-1)
            code = basis @ flat / jnp.maximum(jnp.square(basis).sum(axis=1), 1e-20)
            rows.append(jnp.pad(code, (0, width - basis.shape[0])))
        return jnp.stack(rows)

    def decode(self, code: Float[Array, "rows width"]) -> Float[Array, "L W"]:
        """A code to the tokens of parameters; inverts `encode` up to rounding and what the components leave out."""
        if not self.basis:
            return self.base + self.mean + code * self.spread
        parts = [
            (code[layer, : basis.shape[0]] @ basis).reshape(-1, self.layout.width)
            for layer, basis in enumerate(self.basis)
        ]
        return self.base + self.mean + jnp.concatenate(parts)

    def params(self, code: Float[Array, "rows width"]) -> dict:
        """The parameter pytree of a code."""
        return from_tokens(self.layout, self.decode(code))

    def _rows(self, layer: int) -> slice:
        layers = self.layout.layer_of_token
        return slice(layers.index(layer), len(layers) - layers[::-1].index(layer))


def fit_codec(
    layout: TokenLayout,
    base: Float[np.ndarray, "L W"],
    tokens: Float[np.ndarray, "X L W"],
    weights: Float[np.ndarray, " X"],
    components: int,
) -> Codec:
    """Statistics of a zoo's tokens.

    Args:
      layout: of the tokens.
      base: [L, W], tokens of the base parameters.
      tokens: [X, L, W], the zoo.
      weights: [X], weight of each vector, so that every city counts alike.
      components: most components per layer; 0 for none.

    Returns:
      The codec.
    """
    share = weights / weights.sum()
    differences = tokens - base
    mean = np.einsum("x,xlw->lw", share, differences)
    deviations = differences - mean
    variance = np.einsum("x,xlw->lw", share, np.square(deviations))
    mask, layer = layout.mask(), np.asarray(layout.layer_of_token)
    per_layer = [(variance * mask)[layer == k].sum() / mask[layer == k].sum() for k in range(len(layout.layers))]
    spread = np.where(mask > 0, np.sqrt(np.asarray(per_layer)[layer])[:, None] + 1e-8, 1.0)
    basis = []
    if components:
        scale = np.sqrt(share)[:, None]
        basis = [
            principal_directions(scale * deviations[:, layer == k].reshape(len(tokens), -1), components)
            for k in range(len(layout.layers))
        ]
    return Codec(
        base=jnp.asarray(base, jnp.float32),
        mean=jnp.asarray(mean, jnp.float32),
        spread=jnp.asarray(spread, jnp.float32),
        basis=tuple(jnp.asarray(rows, jnp.float32) for rows in basis),
        layout=layout,
    )


def principal_directions(rows: Float[np.ndarray, "X D"], most: int) -> Float[np.ndarray, "k D"]:
    """Leading principal directions of weighted, centred rows, each as long as the spread along it.

    Args:
      rows: each times the square root of its share.
      most: of them.

    Returns:
      The directions, orthogonal, the longest first; those that hold a millionth of the leading variance are left out.
    """
    rows = rows.astype(np.float64)
    if rows.shape[0] <= rows.shape[1]:
        power, left = np.linalg.eigh(rows @ rows.T)
        directions = left.T @ rows
    else:
        power, right = np.linalg.eigh(rows.T @ rows)
        directions = right.T * np.sqrt(np.maximum(power, 0.0))[:, None]
    kept = np.argsort(-power)[:most]
    # What holds less is rounding.
    return directions[kept[power[kept] > 1e-6 * power.max()]] if power.max() > 0 else directions[kept[:1]]


def encode_zoo(codec: Codec, tokens: Float[Array, "R S L W"]) -> Float[Array, "R S rows width"]:
    """Codes of all vectors of a zoo."""
    return jax.lax.map(jax.vmap(partial(Codec.encode, codec)), tokens)
