"""In: random parameter pytrees. Out: tokens that never mix layers and lose no bit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpdiff_jax.errors import InputError
from gpdiff_jax.tokens import from_tokens, make_layout, to_tokens

_NAMES = st.text("abcdef_0123456789", min_size=1, max_size=6)
_SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
_TREES = st.dictionaries(
    _NAMES,
    _SHAPES | st.dictionaries(_NAMES, _SHAPES | st.dictionaries(_NAMES, _SHAPES, min_size=1), min_size=1),
    min_size=1,
    max_size=4,
)


def _is_shape(node) -> bool:
    return isinstance(node, tuple)


def _filled(shapes: dict, seed: int = 0) -> dict:
    """Arrays of the given shapes: any bits but NaN's, so that equality is equality of bits."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        bits = np.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32)).view(np.float32)
        return np.where(np.isfinite(bits), bits, np.float32(-0.0))

    return jax.tree.map(draw, shapes, is_leaf=_is_shape)


def _assert_same_bits(one: dict, other: dict) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@settings(max_examples=12)
@given(_TREES, st.integers(1, 9), st.integers(0, 10))
def test_any_pytree_comes_back_bit_for_bit_and_no_token_mixes_layers(shapes, width, seed):
    params = _filled(shapes, seed)
    layout = make_layout(params, width)
    tokens, mask = np.asarray(to_tokens(layout, params)), layout.mask()
    assert tokens.shape == mask.shape == (layout.num_tokens, width)
    _assert_same_bits(from_tokens(layout, jnp.asarray(tokens)), params)
    # Padding is zero and comes last in a token; nothing but padding is outside the mask.
    np.testing.assert_array_equal(tokens[mask == 0], 0)
    assert (np.diff(mask, axis=1) <= 0).all()
    assert mask.sum() == sum(leaf.size for leaf in jax.tree.leaves(params))
    # Each layer's tokens hold that layer's leaves, in their order, and nothing else.
    assert layout.layers == tuple(sorted(shapes))
    for layer, name in enumerate(layout.layers):
        own = layout.layer_tokens() == layer
        flat = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(params[name])])
        assert own.sum() == math.ceil(flat.size / width)
        np.testing.assert_array_equal(tokens[own][mask[own] > 0], flat)


@pytest.fixture(scope="module", name="zoo")
def _zoo():
    shapes = {"a": {"bias": (3,), "kernel": (4, 3)}, "b": (5,), "c": {"inner": {"kernel": (2, 2, 2)}}}
    trees = [jax.tree.map(jnp.asarray, _gaussian(shapes, seed)) for seed in range(6)]
    return make_layout(trees[0], 4), trees


def _gaussian(shapes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(1.0, 2.0, shape).astype(np.float32), shapes, is_leaf=_is_shape)


def test_jit_vmap_and_a_loop_make_the_same_tokens(zoo):
    layout, trees = zoo
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    write, read = functools.partial(to_tokens, layout), functools.partial(from_tokens, layout)
    loop = np.stack([write(tree) for tree in trees])
    np.testing.assert_array_equal(np.stack([jax.jit(write)(tree) for tree in trees]), loop)
    np.testing.assert_array_equal(jax.vmap(write)(stacked), loop)
    _assert_same_bits(jax.jit(jax.vmap(read))(jnp.asarray(loop)), stacked)


def test_gradients_pass_through_tokens_and_not_through_padding(zoo):
    layout, trees = zoo
    tokens = to_tokens(layout, trees[0])
    grad = jax.grad(lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(from_tokens(layout, x))))(tokens)
    np.testing.assert_array_equal(grad, layout.mask())


@pytest.mark.parametrize(
    ("params", "width", "words"),
    [
        ({"a": np.zeros(2, np.float32)}, 0, "`token_width` must be at least 1, got 0"),
        ({}, 4, "the model has no parameters"),
    ],
)
def test_nothing_to_lay_out_is_refused(params, width, words):
    with pytest.raises(InputError, match=words):
        make_layout(params, width)
