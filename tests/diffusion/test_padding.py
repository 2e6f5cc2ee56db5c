"""In: latents whose padding is spoiled. Out: the same parameters, predictions and losses, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.denoiser import DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.diffusion.losses import DiffusionBatch, make_diffusion_loss
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.kinds import kinds_of_layers
from gpdiff_jax.zoo.codec import Codec, fit_codec
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

# Of four layers two are of one kind, and the last one never varies: in components its whole row is padding.
_SIZES = {"gate_in": 6, "gate_out": 3, "graph": 4, "head": 5}
_BATCH, _PROMPT = 3, (0, 0)
_CONFIG = DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=4)


def _codec(components: int, still: tuple[str, ...] = ("head",), width: int = 4) -> Codec:
    rng = np.random.default_rng(0)
    pooled = {name: rng.normal(size=size).astype(np.float32) for name, size in _SIZES.items()}
    trees = [
        {
            name: leaf + (name not in still) * rng.normal(size=leaf.shape).astype(np.float32)
            for name, leaf in pooled.items()
        }
        for _ in range(6)
    ]
    kinds = {"gate": "temporal", "graph": "graph", "head": "output"}
    layout = make_layout(pooled, width, kinds_of_layers(tuple(kinds.items()), pooled))
    tokens = np.stack([to_tokens(layout, tree) for tree in trees])
    return fit_codec(layout, np.asarray(to_tokens(layout, pooled)), tokens, np.ones(6), components)


@pytest.fixture(scope="module", name="made", params=[0, 4])
def _made(request):
    """A codec, its denoiser with variables that are nowhere zero, and its compiled predictions."""
    codec = _codec(request.param)
    denoiser = make_denoiser(_CONFIG, codec, _PROMPT)
    example = jnp.zeros(codec.mask().shape), jnp.zeros(()), jnp.zeros(2), jnp.ones(())
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *example)["params"]
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    run = jax.jit(functools.partial(denoise, denoiser))
    return (
        codec,
        denoiser,
        variables,
        lambda variables, x_t: np.asarray(
            run(variables, x_t, jnp.full(_BATCH, 0.4), jnp.ones((_BATCH, 2)), jnp.ones(_BATCH))
        ),
    )


def _latents(codec: Codec, padding: float) -> jax.Array:
    latents = np.random.default_rng(2).normal(size=(_BATCH, *codec.mask().shape))
    return jnp.asarray(np.where(codec.mask() > 0, latents, padding), jnp.float32)


def test_rows_are_padded_as_the_layout_or_the_components_say(made):
    codec, denoiser, *_ = made
    assert codec.filled == denoiser.filled == ((4, 3, 4, 0) if codec.basis else (4, 2, 3, 4, 4, 1))


def test_padding_does_not_reach_parameters_nor_predictions(made):
    codec, _, variables, run = made
    plain, spoiled = _latents(codec, 0.0), _latents(codec, np.nan)
    for one, other in zip(
        *(jax.tree.leaves(jax.vmap(codec.params)(latents)) for latents in (plain, spoiled)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(one).all()
    live = codec.mask() > 0
    np.testing.assert_array_equal(run(variables, spoiled)[:, live], run(variables, plain)[:, live])
    tokens = np.where(codec.layout.mask() > 0, codec.decode(plain[0]), np.nan)
    np.testing.assert_array_equal(codec.encode(jnp.asarray(tokens)), codec.encode(codec.decode(plain[0])))


def test_a_row_that_is_all_padding_is_not_attended_to(made):
    codec, _, variables, run = made
    plain = run(variables, _latents(codec, 0.0))
    for row, filled in enumerate(codec.filled):
        others = np.arange(len(codec.filled)) != row
        changed = np.zeros(others.sum(), bool)
        # The same added to every entry is taken away again by the layer norm, but for rounding.
        for moved_by in np.random.default_rng(row).normal(size=(3, _CONFIG.width)):
            place = variables["place_embedding"].at[row].add(moved_by)
            moved = run(variables | {"place_embedding": place}, _latents(codec, 0.0))
            changed |= (moved[:, others] != plain[:, others]).any(axis=(0, 2))
        assert changed.all() if filled else not changed.any(), row


def test_padding_does_not_change_the_losses(made):
    codec, denoiser, variables, _ = made

    def forecast_losses(x0, batch, *, key):
        del batch, key
        params = jax.vmap(codec.params)(x0)
        return sum(jnp.square(leaf).sum(axis=1) for leaf in jax.tree.leaves(params))

    loss_fn = make_diffusion_loss(
        denoiser,
        forecast_losses,
        jnp.asarray(codec.mask()),
        functional_weight=1.0,
        token_weight=1.0,
        prompt_dropout=0.2,
        prompt_noise=0.1,
        pure_noise_share=0.0,
    )
    rows = jnp.arange(_BATCH, dtype=jnp.int32)

    @jax.jit
    def losses(x0):
        return loss_fn(variables, DiffusionBatch(x0, jnp.ones((_BATCH, 2)), rows, rows, rows), jax.random.key(3))[1]

    plain, spoiled = losses(_latents(codec, 0.0)), losses(_latents(codec, 1e3))
    for one, other in zip(plain, spoiled, strict=True):
        assert np.isfinite(one) and one == other and one > 0


def test_rows_are_told_apart_by_kind_alone(made):
    codec, denoiser, variables, run = made
    blind = variables | {name: jnp.zeros_like(variables[name]) for name in ("place_embedding", "layer_embedding")}
    out = run(blind, jnp.zeros((_BATCH, *codec.mask().shape)))[0]
    kinds = [denoiser.layer_kinds[layer] for layer in codec.layer_of_row]
    assert set(kinds) == {"temporal", "graph", "output"}
    for row, kind in enumerate(kinds):
        for other, name in enumerate(kinds):
            assert (np.abs(out[row] - out[other]).max() < 1e-5) == (kind == name), (row, other)


def test_codes_that_attention_cannot_hold_or_that_hold_nothing_are_refused():
    with pytest.raises(InputError, match="the parameter vectors of the zoo are all the same"):
        make_denoiser(_CONFIG, _codec(4, still=tuple(_SIZES)), _PROMPT)
    pooled = {"gate": np.zeros(9001, np.float32)}
    layout = make_layout(pooled, 2)
    tokens = np.asarray(to_tokens(layout, pooled))
    with pytest.raises(
        InputError, match=r"`token_width` \(=2\) makes 4501 tokens, more than 4096; choose a larger one"
    ):
        make_denoiser(_CONFIG, fit_codec(layout, tokens, tokens[None], np.ones(1), 0), _PROMPT)
