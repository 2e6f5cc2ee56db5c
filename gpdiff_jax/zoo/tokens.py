"""In: a parameter pytree. Out: a matrix of equal-width tokens, each of one layer, and the exact way back.

A layout is made from the shapes alone. It travels with every zoo and every generator, and is checked at their loading.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.leaves import check_leaves, named_leaves, put_leaf
from gpdiff_jax.typing import Params

PUBLISHED_WIDTH = "gcd"
"""The published rule for the width of tokens: the greatest common divisor of the sizes of all layers."""


@dataclasses.dataclass(frozen=True)
class TokenLeaf:
    """Where one leaf of the pytree lies: its path and shape, its layer and the kind of that, its place in tokens."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int
    kind: str  # one of `LAYER_KINDS`
    offset: int  # first entry, counted over all tokens
    tokens: tuple[int, int]  # the first token that holds a part of it, and the one after the last

    @property
    def size(self) -> int:
        """Its entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How a parameter pytree becomes L tokens of width W, layer by layer, each layer padded at its end."""

    width: int
    leaves: tuple[TokenLeaf, ...]

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.leaves[-1].tokens[1]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of their tokens."""
        return tuple(dict.fromkeys(leaf.path[0] for leaf in self.leaves))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return tuple({leaf.layer: leaf.kind for leaf in self.leaves}.values())

    @cached_property
    def layer_of_token(self) -> tuple[int, ...]:
        """The layer of every token."""
        ends = {leaf.layer: leaf.tokens[1] for leaf in self.leaves}
        return tuple(np.repeat(list(ends), np.diff([0, *ends.values()])).tolist())

    @cached_property
    def filled(self) -> tuple[int, ...]:
        """How many entries of every token hold parameters; the others, behind them, are padding."""
        ends = {leaf.layer: leaf.offset + leaf.size for leaf in self.leaves}
        return tuple(
            min(self.width, ends[layer] - token * self.width) for token, layer in enumerate(self.layer_of_token)
        )

    def mask(self) -> Float[np.ndarray, "L W"]:
        """1 where a parameter lies, 0 on padding."""
        return mask_of(self.filled, self.width)

    def layer_tokens(self) -> Int[np.ndarray, " L"]:
        """The layer of every token, as int32."""
        return np.asarray(self.layer_of_token, np.int32)

    def as_json(self) -> dict[str, Any]:
        """The layout as plain JSON values; `from_json` reads it back."""
        return {"width": self.width, "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TokenLayout":
        """Reads what `as_json` wrote, as it stands; `check_layout` compares it with what the shapes ask for.

        Raises:
          InputError: a value is missing or of another type.
        """
        try:
            leaves = tuple(
                TokenLeaf(
                    path=tuple(leaf["path"]),
                    shape=tuple(leaf["shape"]),
                    layer=leaf["layer"],
                    kind=leaf["kind"],
                    offset=leaf["offset"],
                    tokens=(leaf["tokens"][0], leaf["tokens"][1]),
                )
                for leaf in content["leaves"]
            )
            return cls(content["width"], leaves)
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"the token layout cannot be read ({type(error).__name__}: {error})") from error


def mask_of(filled: Sequence[int], width: int) -> Float[np.ndarray, "Z D"]:
    """1 on as many leading entries of every row as are filled, 0 behind them."""
    return (np.arange(width)[None, :] < np.asarray(filled)[:, None]).astype(np.float32)


def make_layout(
    params: Params, width: int | str = PUBLISHED_WIDTH, kinds: Mapping[str, str] | None = None
) -> TokenLayout:
    """Lays a parameter pytree out in tokens.

    Args:
      params: nested dicts of float32 arrays, or of their shapes; the first key on a leaf's path names its layer.
      width: W, entries per token, or "gcd" for the published rule (arXiv 2402.11922): the greatest common divisor of
        the sizes of the layers, which needs no padding. Where a layer is small, as a bias is, tokens become many.
      kinds: the kind of every layer, `Model.layer_kinds`; None leaves all "mixed".

    Returns:
      The layout: layers in the pytree's own (sorted) order, the leaves of a layer one after another, padding at the
      end of every layer, so that a token never mixes layers.

    Raises:
      InputError: `width` is below 1 or another word; the pytree is empty, holds anything but dicts with names as keys,
        or a leaf that is empty or not float32.
    """
    check_width(width)
    named = check_leaves(params)
    sizes: dict[str, int] = {}
    for path, leaf in named:
        sizes[path[0]] = sizes.get(path[0], 0) + leaf.size
    if isinstance(width, str):
        width = math.gcd(*sizes.values())
    leaves, layers, end = [], {}, 0
    for path, leaf in named:
        if path[0] not in layers:
            layers[path[0]] = len(layers)
            end = -(-end // width) * width
        tokens = end // width, -(-(end + leaf.size) // width)
        kind = "mixed" if kinds is None else kinds[path[0]]
        leaves.append(TokenLeaf(path, tuple(leaf.shape), layers[path[0]], kind, end, tokens))
        end += leaf.size
    return TokenLayout(width, tuple(leaves))


def check_width(width: int | str) -> None:
    """Raises `InputError` where a token width is neither a number of at least 1 nor the published rule."""
    if width != PUBLISHED_WIDTH and (not isinstance(width, int) or width < 1):
        raise InputError(
            f"`token_width` must be at least 1, or {PUBLISHED_WIDTH!r} for the published rule, got {width}"
        )


def check_layout(stored: TokenLayout, found: TokenLayout, what: str, against: str) -> None:
    """Refuses a stored layout that is not the one that the program makes today.

    Args:
      stored: as it was read.
      found: as it is made.
      what: the thing's name, for the message.
      against: the name of what `found` was made from.

    Raises:
      InputError: they differ; names the first leaf that does.
    """
    for exact in (False, True):
        for one, other in zip_longest(stored.leaves, found.leaves):
            words = _leaf_words(one, exact), _leaf_words(other, exact)
            if words[0] != words[1]:
                raise InputError(f"{what} stores {words[0]}, {against} has {words[1]}; make it again in a new folder")
        if stored.width != found.width:
            raise InputError(
                f"{what} stores tokens of width {stored.width}, {against} gives {found.width}; "
                "make it again in a new folder"
            )


def to_tokens(layout: TokenLayout, params: Params) -> Float[Array, "L W"]:
    """Writes one parameter pytree as tokens; padding is zero.

    Raises:
      InputError: a leaf has another path, shape or type than the layout says.
    """
    named = named_leaves(params)
    for leaf, (path, value) in zip_longest(layout.leaves, named, fillvalue=(None, None)):
        found = None if path is None or value is None else (path, tuple(value.shape), value.dtype)
        if not isinstance(leaf, TokenLeaf) or found != (leaf.path, leaf.shape, jnp.float32):
            wanted = _leaf_words(leaf, False) if isinstance(leaf, TokenLeaf) else "no further leaf"
            words = "no further leaf" if found is None else f"{found[2]} {'/'.join(found[0])!r} of shape {found[1]}"
            raise InputError(f"the token layout has {wanted}, the parameters have {words}")
    parts, end = [], 0
    for leaf, (_, value) in zip(layout.leaves, named, strict=True):
        parts += [jnp.zeros(leaf.offset - end, jnp.float32), jnp.asarray(value).reshape(-1)]
        end = leaf.offset + leaf.size
    parts.append(jnp.zeros(layout.num_tokens * layout.width - end, jnp.float32))
    return jnp.concatenate(parts).reshape(layout.num_tokens, layout.width)


def from_tokens(layout: TokenLayout, tokens: Float[Array, "L W"]) -> Params:
    """Reads one parameter pytree back from tokens, bit for bit what `to_tokens` took; padding is not looked at."""
    flat, params = tokens.reshape(-1), {}
    for leaf in layout.leaves:
        put_leaf(params, leaf.path, flat[leaf.offset : leaf.offset + leaf.size].reshape(leaf.shape))
    return params


def _leaf_words(leaf: TokenLeaf | None, exact: bool) -> str:
    if leaf is None:
        return "no further leaf"
    words = f"leaf {'/'.join(map(str, leaf.path))!r} of shape {leaf.shape}"
    if not exact:
        return words
    first, end = leaf.tokens
    return f"{words} as {leaf.kind}, layer {leaf.layer}, offset {leaf.offset}, tokens {first} to {end - 1}"
