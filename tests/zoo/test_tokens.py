"""In: random parameter pytrees. Out: tokens that never mix layers and lose no bit, and layouts that are checked."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.kinds import LAYER_KINDS
from gpdiff_jax.zoo.tokens import TokenLayout, check_layout, from_tokens, make_layout, to_tokens

# Names whose order is not that of their numbers, nor of an alphabet; and words that tell kinds.
_NAMES = st.sampled_from(("graph", "gate_10", "gate_9", "head")) | st.text("aB_-.019é", min_size=1, max_size=4)
_SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
_INNER = st.dictionaries(_NAMES, _SHAPES | st.dictionaries(_NAMES, _SHAPES, min_size=1), min_size=1, max_size=3)
_TREES = st.dictionaries(_NAMES, _SHAPES | _INNER, min_size=1, max_size=4)
_WIDTHS = st.integers(1, 9) | st.just("gcd")


def _is_shape(node) -> bool:
    return isinstance(node, tuple)


def _filled(shapes: dict, draw) -> dict:
    return jax.tree.map(draw, shapes, is_leaf=_is_shape)


def _abstract(shapes: dict) -> dict:
    return _filled(shapes, lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32))


def _any_bits(shapes: dict, seed: int) -> dict:
    """Arrays of any bits: NaN of all payloads, infinities, both zeros, the smallest numbers, and random ones."""
    rng = np.random.default_rng(seed)
    odd = np.array([0x7F800001, 0x7FC0BEEF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0, 1], np.uint32)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        bits = np.where(rng.random(shape) < 0.5, rng.choice(odd, shape), rng.integers(0, 2**32, shape, np.uint32))
        return np.asarray(bits, np.uint32).view(np.float32)

    return _filled(shapes, draw)


def _assert_same_bits(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@settings(max_examples=60)
@given(_TREES, _WIDTHS)
def test_ranges_tile_the_tokens_and_no_token_mixes_layers(shapes, width):
    params = _abstract(shapes)
    kinds = {name: LAYER_KINDS[number % 4] for number, name in enumerate(shapes)}
    layout, mask = make_layout(params, width, kinds), make_layout(params, width).mask()
    sizes = {
        name: sum(math.prod(shape) for shape in jax.tree.leaves(shapes[name], is_leaf=_is_shape)) for name in shapes
    }
    assert layout.layers == tuple(sorted(shapes)) and layout.kinds == tuple(kinds[name] for name in layout.layers)
    assert layout.width == (math.gcd(*sizes.values()) if width == "gcd" else width)
    owner = np.full(mask.size, -1)
    for leaf in layout.leaves:
        entries = slice(leaf.offset, leaf.offset + leaf.size)
        assert (owner[entries] == -1).all()
        owner[entries] = leaf.layer
        held = np.arange(mask.size)[entries] // layout.width
        assert leaf.tokens == (held[0], held[-1] + 1)
        assert (leaf.path[0], leaf.kind) == (layout.layers[leaf.layer], layout.kinds[leaf.layer])
    owner = owner.reshape(mask.shape)
    # What no leaf owns is padding; it ends the last token of a layer and fills none.
    np.testing.assert_array_equal(mask, owner >= 0)
    assert (np.diff(mask, axis=1) <= 0).all() and (mask[:, 0] == 1).all()
    assert layout.filled == tuple(mask.sum(axis=1))
    np.testing.assert_array_equal(np.where(mask > 0, owner, owner[:, :1]), np.tile(owner[:, :1], layout.width))
    assert layout.layer_of_token == tuple(owner[:, 0]) and list(owner[:, 0]) == sorted(owner[:, 0])
    for layer, name in enumerate(layout.layers):
        assert layout.layer_of_token.count(layer) == math.ceil(sizes[name] / layout.width)
    if width == "gcd":
        assert mask.all()
    assert TokenLayout.from_json(json.loads(json.dumps(layout.as_json()))) == layout


@settings(max_examples=10)
@given(_TREES, _WIDTHS, st.integers(0, 100))
def test_any_pytree_comes_back_bit_for_bit_compiled_and_batched(shapes, width, seed):
    trees = [_any_bits(shapes, seed + index) for index in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    layout = make_layout(trees[0], width)
    wanted = np.zeros((2, layout.num_tokens * layout.width), np.float32)
    for leaf, value in zip(layout.leaves, jax.tree.leaves(stacked), strict=True):
        wanted[:, leaf.offset : leaf.offset + leaf.size] = value.reshape(2, -1)
    wanted = wanted.reshape(2, layout.num_tokens, layout.width)
    # What lies on padding does not come back.
    spoiled = np.where(layout.mask() > 0, wanted, np.float32(np.nan))
    pair = jax.jit(jax.vmap(lambda params, tokens: (to_tokens(layout, params), from_tokens(layout, tokens))))
    tokens, params = pair(stacked, spoiled)
    _assert_same_bits(tokens, wanted)
    _assert_same_bits(params, stacked)


@pytest.fixture(scope="module", name="zoo")
def _zoo():
    shapes = {"a": {"bias": (3,), "kernel": (4, 3)}, "b": (), "c": {"inner": {"kernel": (2, 2, 2)}}}
    trees = [_any_bits(shapes, seed) for seed in range(3)]
    return make_layout(trees[0], 4), trees


def test_jit_vmap_and_a_loop_make_the_same_tokens_and_lead_back(zoo):
    layout, trees = zoo
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    write, read = functools.partial(to_tokens, layout), functools.partial(from_tokens, layout)
    loop = np.stack([write(tree) for tree in trees])
    _assert_same_bits(np.stack([jax.jit(write)(tree) for tree in trees]), loop)
    _assert_same_bits(jax.vmap(write)(stacked), loop)
    _assert_same_bits(jax.vmap(read)(jnp.asarray(loop)), stacked)
    _assert_same_bits(read(jnp.asarray(loop[1])), trees[1])


def test_gradients_pass_through_tokens_and_not_through_padding(zoo):
    layout, _ = zoo
    tokens = jnp.zeros((layout.num_tokens, layout.width))
    grad = jax.grad(lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(from_tokens(layout, x))))(tokens)
    np.testing.assert_array_equal(grad, layout.mask())


_ONE = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("params", "width", "words"),
    [
        ({"a": _ONE}, 0, "`token_width` must be at least 1, or 'gcd' for the published rule, got 0"),
        ({"a": _ONE}, "lcm", "`token_width` must be at least 1, or 'gcd' for the published rule, got lcm"),
        ({}, 4, "the model has no parameters"),
        ({"a": {}}, 4, "the model has no parameters"),
        (_ONE, 4, "nested dicts with names as keys, got one array"),
        ({"a": [_ONE, _ONE]}, 4, r"nested dicts with names as keys, got \['a'\]\[0\]"),
        ({"a": {0: _ONE}}, 4, r"nested dicts with names as keys, got \['a'\]\[0\]"),
        ({"a": _ONE, "b": {}}, 4, "nested dicts, none of them empty"),
        ({"a": _ONE, "b": None}, 4, "nested dicts, none of them empty"),
        ({"a": {"b": np.zeros((0, 3), np.float32)}}, 4, r"'a/b' is float32 of shape \(0, 3\); .* at least one entry"),
        ({"a": np.zeros(2)}, 4, r"'a' is float64 of shape \(2,\); .* needs float32"),
        ({"a": jnp.zeros(2, jnp.bfloat16)}, 4, "'a' is bfloat16"),
        ({"a": np.zeros((), np.int32)}, 4, r"'a' is int32 of shape \(\)"),
    ],
)
def test_what_cannot_come_back_is_refused(params, width, words):
    with pytest.raises(InputError, match=words):
        make_layout(params, width)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, r"has leaf 'a' of shape \(3, 2\), .* have float32 'a' of shape \(2, 3\)"),
        ({"a": np.zeros((3, 2))}, r"has leaf 'a' of shape \(3, 2\), .* have float64 'a' of shape \(3, 2\)"),
        ({"b": np.zeros((3, 2), np.float32)}, r"has leaf 'a' .* have float32 'b'"),
        ({"a": np.zeros((3, 2), np.float32), "b": _ONE}, r"has no further leaf, .* have float32 'b' of shape \(2,\)"),
    ],
)
def test_parameters_of_another_layout_are_refused(params, words):
    with pytest.raises(InputError, match=words):
        to_tokens(make_layout({"a": np.zeros((3, 2), np.float32)}, 4), params)


_STORED = {"gate": {"bias": (2,), "kernel": (3, 2)}, "head": (4,)}


@pytest.mark.parametrize(
    ("found", "width", "words"),
    [
        (
            {"gate": {"bias": (2,), "kernel": (3, 3)}, "head": (5,)},
            4,
            r"stores leaf 'gate/kernel' of shape \(3, 2\), the model has leaf 'gate/kernel' of shape \(3, 3\); make it",
        ),
        (_STORED | {"input": (1,)}, 4, r"stores no further leaf, the model has leaf 'input' of shape \(1,\)"),
        ({"gate": _STORED["gate"]}, 4, r"stores leaf 'head' of shape \(4,\), the model has no further leaf"),
        (_STORED, 5, "stores tokens of width 4, the model gives 5"),
    ],
)
def test_a_stored_layout_that_differs_is_refused_by_its_first_leaf(found, width, words):
    with pytest.raises(InputError, match=f"the zoo {words}"):
        check_layout(make_layout(_abstract(_STORED), 4), make_layout(_abstract(found), width), "the zoo", "the model")


def test_a_leaf_that_lies_elsewhere_or_is_of_another_kind_is_refused_and_an_equal_layout_passes():
    layout = make_layout(_abstract(_STORED), 4)
    check_layout(TokenLayout.from_json(layout.as_json()), layout, "the zoo", "the model")
    for name, value, words in (("offset", 1, "offset 1"), ("kind", "graph", "graph"), ("tokens", [0, 3], "0 to 2")):
        content = layout.as_json()
        content["leaves"][1][name] = value
        with pytest.raises(InputError, match=rf"'gate/kernel' of shape \(3, 2\) as .*{words}.* has leaf .*as mixed"):
            check_layout(TokenLayout.from_json(content), layout, "the zoo", "the model")
    del content["leaves"][1]["path"]
    with pytest.raises(InputError, match=r"the token layout cannot be read \(KeyError: 'path'\)"):
        TokenLayout.from_json(content)
