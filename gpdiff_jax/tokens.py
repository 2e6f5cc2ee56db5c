"""In: a parameter pytree. Out: a matrix of equal-width tokens, each of one layer, and the exact way back.

A layout is made once from the shapes and travels with every zoo and every generator.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class TokenLeaf:
    """Where one leaf of the pytree lies: its path and shape, its layer, and its place in the layer's tokens."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int
    offset: int  # first entry, counted over all tokens


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How a parameter pytree becomes L tokens of width W, layer by layer, each layer padded at its end."""

    width: int
    layers: tuple[str, ...]
    leaves: tuple[TokenLeaf, ...]
    layer_of_token: tuple[int, ...]  # [L]

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.layer_of_token)

    def mask(self) -> np.ndarray:
        """float32 [L, W]: 1 where a parameter lies, 0 on padding."""
        mask = np.zeros(self.num_tokens * self.width, np.float32)
        for leaf in self.leaves:
            mask[leaf.offset : leaf.offset + math.prod(leaf.shape)] = 1.0
        return mask.reshape(self.num_tokens, self.width)

    def layer_tokens(self) -> Int[np.ndarray, " L"]:
        """The layer of every token, as int32."""
        return np.asarray(self.layer_of_token, np.int32)


def make_layout(params: Params, width: int) -> TokenLayout:
    """Lays a parameter pytree out in tokens.

    Args:
      params: nested dicts of float32 arrays; the first key on a leaf's path names its layer.
      width: W, entries per token.

    Returns:
      The layout: layers in the pytree's own (sorted) order, the leaves of a layer one after another, padding at the
      end of every layer, so that a token never mixes layers.

    Raises:
      InputError: `width` is below 1 or the pytree is empty.
    """
    if width < 1:
        raise InputError(f"`token_width` must be at least 1, got {width}")
    leaves, layers, layer_of_token, end = [], [], [], 0
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(str(key.key) for key in keys)
        if not layers or path[0] != layers[-1]:
            end = len(layer_of_token) * width
            layers.append(path[0])
        leaves.append(TokenLeaf(path, tuple(leaf.shape), len(layers) - 1, end))
        end += leaf.size
        layer_of_token += [len(layers) - 1] * (-(-end // width) - len(layer_of_token))
    if not leaves:
        raise InputError("the model has no parameters; a model to harvest needs some")
    return TokenLayout(width, tuple(layers), tuple(leaves), tuple(layer_of_token))


def to_tokens(layout: TokenLayout, params: Params) -> Float[Array, "L W"]:
    """Writes one parameter pytree as tokens; padding is zero."""
    flat = jnp.zeros(layout.num_tokens * layout.width, jnp.float32)
    for leaf, value in zip(layout.leaves, jax.tree.leaves(params), strict=True):
        flat = jax.lax.dynamic_update_slice(flat, value.reshape(-1), (leaf.offset,))
    return flat.reshape(layout.num_tokens, layout.width)


def from_tokens(layout: TokenLayout, tokens: Float[Array, "L W"]) -> Params:
    """Reads one parameter pytree back from tokens, bit for bit what `to_tokens` was given."""
    flat, params = tokens.reshape(-1), {}
    for leaf in layout.leaves:
        inner = params
        for key in leaf.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[leaf.path[-1]] = flat[leaf.offset : leaf.offset + math.prod(leaf.shape)].reshape(leaf.shape)
    return params
