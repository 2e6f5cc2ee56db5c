"""In: random parameter pytrees. Out: tokens that never mix layers, lose no bit and can be scaled there and back."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpdiff_jax.errors import InputError
from gpdiff_jax.tokens import (
    TokenScaler,
    denormalise,
    fit_scaler,
    from_tokens,
    make_layout,
    normalise,
    to_tokens,
)

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

    def draw(shape: tuple[int, ...]) -> jax.Array:
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        return jnp.asarray(np.where(np.isfinite(bits), bits, np.float32(-0.0)))

    return jax.tree.map(draw, shapes, is_leaf=_is_shape)


def _assert_same_bits(one: dict, other: dict) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@settings(max_examples=40)
@given(_TREES, st.integers(1, 9), st.integers(0, 10))
def test_any_pytree_comes_back_bit_for_bit(shapes, width, seed):
    params = _filled(shapes, seed)
    layout = make_layout(params, width)
    tokens = to_tokens(layout, params)
    assert tokens.shape == (layout.num_tokens, width)
    _assert_same_bits(from_tokens(layout, tokens), params)
    # Padding is zero, and nothing but padding is outside the mask.
    np.testing.assert_array_equal(np.asarray(tokens) * (1 - layout.mask()), np.zeros_like(tokens))


@settings(max_examples=40)
@given(_TREES, st.integers(1, 9))
def test_no_token_mixes_layers_and_the_mask_counts_the_parameters(shapes, width):
    marks = {name: float(number + 1) for number, name in enumerate(sorted(shapes))}
    params = {
        name: jax.tree.map(lambda shape, m=marks[name]: jnp.full(shape, m), tree, is_leaf=_is_shape)
        for name, tree in shapes.items()
    }
    layout = make_layout(params, width)
    mask = layout.mask()
    assert mask.sum() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert layout.layers == tuple(sorted(shapes))
    for row, own, layer in zip(np.asarray(to_tokens(layout, params)), mask, layout.layer_tokens(), strict=True):
        assert set(row[own > 0]) == {marks[layout.layers[layer]]}
        # Within a token, padding comes last.
        assert (np.diff(own) <= 0).all()
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in layout.layers]
    assert layout.num_tokens == sum(math.ceil(size / width) for size in sizes)


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


def test_the_scaler_holds_an_entrys_weighted_mean_and_a_layers_spread(zoo):
    layout, trees = zoo
    base = trees[0]
    differences = np.stack([to_tokens(layout, tree) for tree in trees[1:]]) - np.asarray(to_tokens(layout, base))
    weights = np.array([1.0, 2.0, 3.0, 2.0, 2.0])
    scaler = fit_scaler(layout, base, differences, weights)
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / 10
    np.testing.assert_allclose(scaler.mean, mean, rtol=1e-5, atol=1e-6)
    for layer in range(3):
        entries = (layout.layer_tokens() == layer)[:, None] & (layout.mask() > 0)
        spread = math.sqrt(np.average(np.square(differences - mean)[:, entries].mean(axis=1), weights=weights))
        np.testing.assert_allclose(np.asarray(scaler.std)[entries], spread, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(scaler.std)[layout.mask() == 0], 1.0)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_normalise_and_denormalise_are_inverse(zoo, leading):
    layout, trees = zoo
    rng = np.random.default_rng(0)
    shape = (layout.num_tokens, layout.width)
    scaler = TokenScaler(
        to_tokens(layout, trees[0]),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(rng.uniform(0.1, 2.0, shape), jnp.float32),
    )
    tokens = jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32)
    scaled = normalise(scaler, tokens)
    np.testing.assert_allclose(
        scaled, (tokens - np.asarray(scaler.base) - np.asarray(scaler.mean)) / np.asarray(scaler.std), atol=1e-4
    )
    np.testing.assert_allclose(denormalise(scaler, scaled), tokens, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalise(scaler, denormalise(scaler, tokens)), tokens, rtol=1e-5, atol=2e-5)


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
