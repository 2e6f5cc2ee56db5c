"""In: tokens of random parameter vectors. Out: latents of unit size, and the way back, exact or in few directions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.zoo.codec import Codec, CodecConfig, encode_zoo, fit_codec
from gpdiff_jax.zoo.tokens import TokenLayout, make_layout, to_tokens

_SHAPES = {"a": {"bias": (3,), "kernel": (4, 3)}, "b": (5,), "c": {"inner": {"kernel": (2, 2, 2)}}}
_SCALES = {"a": 0.1, "b": 3.0, "c": 0.001}
_WEIGHTS = np.array([1.0, 2.0, 3.0, 2.0, 2.0, 1.0, 1.0])


def _tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(name: str, shapes):
        return jax.tree.map(
            lambda shape: (scale * _SCALES[name] * rng.normal(size=shape)).astype(np.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    return {name: draw(name, shapes) for name, shapes in _SHAPES.items()}


@pytest.fixture(scope="module", name="zoo")
def _zoo() -> tuple[TokenLayout, np.ndarray, np.ndarray]:
    """A layout, the pooled model's tokens, and the tokens of seven vectors around it."""
    pooled = _tree(100, 10.0)
    layout = make_layout(pooled, 4)
    trees = [jax.tree.map(np.add, pooled, _tree(seed)) for seed in range(7)]
    return layout, np.asarray(to_tokens(layout, pooled)), np.stack([to_tokens(layout, tree) for tree in trees])


def _centred(zoo) -> np.ndarray:
    _, pooled, tokens = zoo
    mean = sum(w * (t - pooled) for w, t in zip(_WEIGHTS, tokens, strict=True)) / _WEIGHTS.sum()
    return tokens - pooled - mean


def test_without_components_every_layer_is_scaled_by_its_own_spread(zoo):
    layout, pooled, tokens = zoo
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, 0)
    deviations = _centred(zoo)
    for layer in range(3):
        entries = (layout.layer_tokens() == layer)[:, None] & (layout.mask() > 0)
        spread = math.sqrt(np.average(np.square(deviations[:, entries]).mean(axis=1), weights=_WEIGHTS))
        np.testing.assert_allclose(np.asarray(codec.scale)[entries], spread, rtol=1e-4)
        np.testing.assert_allclose(
            np.asarray(codec.encode(jnp.asarray(tokens[2])))[entries], deviations[2][entries] / spread, atol=1e-2
        )
    np.testing.assert_array_equal(np.asarray(codec.scale)[layout.mask() == 0], 1.0)
    np.testing.assert_array_equal(codec.mask(), layout.mask())
    assert codec.layer_of_row == layout.layer_of_token


def test_by_coordinate_each_is_scaled_by_its_own_spread_and_a_constant_one_stays(zoo):
    layout, pooled, tokens = zoo
    tokens, layer = tokens.copy(), layout.layer_tokens()[:, None]
    tokens[:, 0, 1] = pooled[0, 1]  # constant, and the pooled model's
    tokens[:, 1, 2] = 7.3  # constant, and not the pooled model's
    tokens[:, layer[:, 0] == 1] = pooled[layer[:, 0] == 1] + np.float32(0.1)  # a whole layer
    plain = fit_codec(layout, pooled, tokens, _WEIGHTS, 0)
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, 0, "coordinate")
    own = np.sqrt(np.average(np.square(_centred((layout, pooled, tokens))), axis=0, weights=_WEIGHTS))
    varies = own > 1e-6
    assert varies.sum() == layout.mask().sum() - 7 and (layer != 1)[varies.any(axis=1)].all()
    np.testing.assert_allclose(np.asarray(codec.scale)[varies], own[varies], rtol=1e-4)
    latents = np.stack([codec.encode(jnp.asarray(vector)) for vector in tokens])
    np.testing.assert_allclose(np.average(np.square(latents), axis=0, weights=_WEIGHTS)[varies], 1.0, rtol=1e-3)
    # What never varies: a code of nothing but rounding, and one that is wrong by a whole unit hardly moves it.
    still = ~varies & (layout.mask() > 0)
    assert np.abs(latents[:, still]).max() < 0.1
    moved = np.asarray(codec.decode(jnp.asarray(latents[0] + layout.mask())))
    assert np.abs(moved - tokens[0])[still].max() < 1.1 * 0.01 * np.asarray(plain.scale)[still].max()
    # The layer as a whole stays within a millionth of itself.
    assert np.abs(moved - tokens[0])[still & (layer == 1)].max() < 1e-5 * np.abs(tokens[0][still & (layer == 1)]).max()


def test_components_by_coordinate_are_those_of_the_correlations(zoo):
    layout, pooled, tokens = zoo
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, 2, "coordinate")
    share, spread = _WEIGHTS / _WEIGHTS.sum(), np.asarray(codec.scale)
    for layer, basis in enumerate(codec.basis):
        own = layout.layer_tokens() == layer
        live = layout.mask()[own].reshape(-1) > 0
        scaled = (_centred(zoo) / spread)[:, own].reshape(7, -1)[:, live].astype(np.float64)
        power, axes = np.linalg.eigh(scaled.T @ (share[:, None] * scaled))
        np.testing.assert_allclose(np.trace(scaled.T @ (share[:, None] * scaled)), live.sum(), rtol=1e-3)
        directions = np.asarray(basis)[:, live] / spread[own].reshape(-1)[live]
        np.testing.assert_allclose(np.square(directions).sum(axis=1), power[::-1][:2], rtol=1e-3)
        np.testing.assert_allclose(
            np.abs(np.diag(directions @ axes[:, ::-1][:, :2])), np.sqrt(power[::-1][:2]), rtol=1e-3
        )
    latents = np.stack([codec.encode(jnp.asarray(vector)) for vector in tokens])
    np.testing.assert_allclose(np.einsum("x,xlk->lk", share, np.square(latents)), np.ones((3, 2)), rtol=1e-3)


@pytest.mark.parametrize(
    ("components", "normalisation"), [(0, "layer"), (0, "coordinate"), (7, "coordinate"), (50, "layer")]
)
def test_encode_and_decode_are_inverse_on_the_zoo(zoo, components, normalisation):
    layout, pooled, tokens = zoo
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, components, normalisation)
    for vector in tokens:
        latent = codec.encode(jnp.asarray(vector))
        assert latent.shape == codec.mask().shape
        np.testing.assert_array_equal(np.asarray(latent)[codec.mask() == 0], 0)
        np.testing.assert_allclose(codec.decode(latent), vector, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(codec.encode(codec.decode(latent)), latent, rtol=1e-2, atol=1e-2)
        # Padding of the tokens stays zero, whatever the latent.
        wild = codec.decode(5.0 * latent + jnp.asarray(codec.mask()))
        np.testing.assert_array_equal(np.asarray(wild)[layout.mask() == 0], 0)


def test_components_are_the_principal_ones_of_each_layer_and_codes_have_unit_size(zoo):
    layout, pooled, tokens = zoo
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, 2)
    deviations, share = _centred(zoo).astype(np.float64), _WEIGHTS / _WEIGHTS.sum()
    latents = np.stack([codec.encode(jnp.asarray(vector)) for vector in tokens])
    assert latents.shape == (7, 3, 2) and codec.layer_of_row == (0, 1, 2)
    np.testing.assert_allclose(np.einsum("x,xlk->lk", share, np.square(latents)), np.ones((3, 2)), rtol=1e-3)
    np.testing.assert_allclose(np.einsum("x,xl,xl->l", share, latents[..., 0], latents[..., 1]), np.zeros(3), atol=1e-3)
    for layer, basis in enumerate(codec.basis):
        rows = deviations[:, layout.layer_tokens() == layer].reshape(7, -1)
        power = np.linalg.eigvalsh(rows.T @ (share[:, None] * rows))[::-1]
        np.testing.assert_allclose(np.square(basis).sum(axis=1), power[:2], rtol=1e-3)
        # Of all two-dimensional views of the layer, the code keeps the most: what is lost is the other powers' sum.
        kept = (
            np.stack([np.asarray(codec.decode(jnp.asarray(latent))) for latent in latents]) - pooled - (tokens - pooled)
        )
        lost = np.square(kept[:, layout.layer_tokens() == layer]).reshape(7, -1).sum(axis=1)
        np.testing.assert_allclose((share * lost).sum(), power[2:].sum(), rtol=1e-2, atol=1e-9)


def test_joint_codes_are_of_all_layers_in_one_vector_around_the_pooled_model(zoo):
    layout, pooled, _ = zoo
    trees = [jax.tree.map(np.add, _tree(100, 10.0), _tree(seed)) for seed in range(20)]
    tokens, weights = np.stack([to_tokens(layout, tree) for tree in trees]), np.linspace(1, 2, 20)
    codec = fit_codec(layout, pooled, tokens, weights, 11, space="joint")
    # Rows of eight codes, all of one layer that is of no kind.
    assert codec.filled == (8, 3) and codec.layer_of_row == (0, 0) and codec.kinds == ("mixed",)
    np.testing.assert_allclose(codec.decode(jnp.zeros((2, 8))), pooled, rtol=1e-6)
    share, rows = weights / weights.sum(), (tokens - pooled).reshape(20, -1).astype(np.float64)
    power = np.linalg.eigvalsh(rows.T @ (share[:, None] * rows))[::-1]
    np.testing.assert_allclose(np.square(codec.basis[0]).sum(axis=1), power[:11], rtol=1e-3)
    latents = np.stack([codec.encode(jnp.asarray(vector)) for vector in tokens])
    assert latents.shape == (20, 2, 8) and (latents[:, codec.mask() == 0] == 0).all()
    codes = latents[:, codec.mask() > 0]
    np.testing.assert_allclose(codes.T @ (share[:, None] * codes), np.eye(11), atol=2e-3)
    kept = np.stack([codec.decode(jnp.asarray(latent)) for latent in latents])
    lost = np.square(kept - tokens, dtype=np.float64).reshape(20, -1).sum(axis=1)
    np.testing.assert_allclose((share * lost).sum(), power[11:].sum(), rtol=1e-3)
    # With all that differ, the way back is exact; layer "c" holds less than a millionth of the leading variance.
    whole = fit_codec(layout, pooled, tokens, weights, 64, space="joint")
    assert whole.filled == (8, 8, 2)
    for vector in tokens:
        np.testing.assert_allclose(whole.decode(whole.encode(jnp.asarray(vector))), vector, rtol=1e-5, atol=0.01)
    np.testing.assert_array_equal(np.asarray(whole.decode(jnp.ones((3, 8))))[layout.mask() == 0], 0)
    still = fit_codec(layout, pooled, np.stack([pooled] * 3), np.ones(3), 4, space="joint")
    assert still.mask().shape == still.encode(jnp.asarray(pooled)).shape == (1, 1) and not still.mask().any()


def test_a_layer_with_fewer_directions_is_padded_and_a_zoo_without_any_still_decodes(zoo):
    layout, pooled, tokens = zoo
    frozen = np.where((layout.layer_tokens() == 1)[:, None], pooled, tokens)
    codec = fit_codec(layout, pooled, frozen, _WEIGHTS, 4)
    assert codec.mask().sum(axis=1).tolist() == [4, 0, 4]
    np.testing.assert_allclose(
        codec.decode(codec.encode(jnp.asarray(frozen[0])))[layout.layer_tokens() == 1],
        frozen[0][layout.layer_tokens() == 1],
        rtol=1e-6,
    )
    assert codec.filled == (4, 0, 4)
    # Away from the pooled model as well, where the mean is not exact.
    still = fit_codec(layout, pooled, np.stack([pooled + layout.mask() * np.float32(0.1)] * 3), np.ones(3), 4)
    assert still.mask().shape == (3, 1) and not still.mask().any()
    np.testing.assert_allclose(still.decode(jnp.ones((3, 1))), pooled + 0.1 * layout.mask(), rtol=1e-6)


def test_params_of_a_code_are_the_pytree_and_jit_vmap_and_a_loop_agree(zoo):
    layout, pooled, tokens = zoo
    codec = fit_codec(layout, pooled, tokens, _WEIGHTS, 3)
    latents = encode_zoo(codec, jnp.asarray(tokens[:6].reshape(3, 2, *pooled.shape))).reshape(6, *codec.mask().shape)
    loop = np.stack([Codec.encode(codec, jnp.asarray(vector)) for vector in tokens[:6]])
    np.testing.assert_allclose(latents, loop, rtol=1e-5, atol=1e-5)
    decode = jax.jit(jax.vmap(functools.partial(Codec.decode, codec)))
    np.testing.assert_allclose(
        decode(latents), np.stack([codec.decode(latent) for latent in latents]), rtol=1e-6, atol=1e-6
    )
    params = codec.params(latents[0])
    np.testing.assert_array_equal(to_tokens(layout, params), codec.decode(latents[0]))
    assert params["a"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"token_width": 0}, "`token_width` must be at least 1, or 'gcd' for the published rule, got 0"),
        ({"token_width": "wide"}, "`token_width` must be at least 1, or 'gcd' for the published rule, got wide"),
        ({"components": -1}, "`components` must be at least 0, got -1"),
        ({"components": 0, "space": "joint"}, "`components` must be at least 1, got 0"),
        ({"space": "codes"}, "`space` must be one of layers, joint, got 'codes'"),
        ({"normalisation": "row"}, "`normalisation` must be one of layer, coordinate, got 'row'"),
    ],
)
def test_a_codec_out_of_range_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        CodecConfig(**values)
