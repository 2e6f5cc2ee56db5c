"""In: dense layers and attention over many regions. Out: that they are flax's own, and PyTorch's, numbers."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion import denoiser as denoiser_module
from gpdiff_jax.diffusion import products
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise
from gpdiff_jax.diffusion.products import attention, dense, fused_attention, rows_dot_general
from gpdiff_jax.models.kinds import LAYER_KINDS

_X = np.random.default_rng(0).normal(size=(3, 4, 5, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dense(6), nn.Dense(6)),
        (attention(2, np.dtype(np.float32), name="a"), nn.MultiHeadDotProductAttention(2, name="a")),
    ],
    ids=["dense", "attention"],
)
def test_layers_and_their_gradients_are_those_of_flax(ours, theirs):
    variables = theirs.init(jax.random.key(0), _X)
    assert jax.tree.structure(ours.init(jax.random.key(0), _X)) == jax.tree.structure(variables)

    def loss(module, variables):
        return jnp.square(module.apply(variables, _X) - 1.0).mean()

    for module in (ours, theirs):
        assert module.apply(variables, _X).shape[:-1] == _X.shape[:-1]
    value, grads = jax.value_and_grad(lambda v: loss(ours, v))(variables)
    wanted, wanted_grads = jax.value_and_grad(lambda v: loss(theirs, v))(variables)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (6, 6), (5, 2), (4, 3)])
def test_the_fused_attention_and_its_gradient_are_those_of_flax(queries, keys):
    random = np.random.default_rng(1)
    shapes = (2, 3, queries, 2, 8), (2, 3, keys, 2, 8), (2, 3, keys, 2, 8)
    inputs = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]

    def loss(function, inputs):
        return jnp.square(function(*inputs) - 1.0).mean()

    one = functools.partial(fused_attention, implementation="xla")
    read = one(
        *(jnp.pad(tokens, ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9) for tokens in inputs),
        length=keys,
    )
    np.testing.assert_allclose(read[:, :, :queries], nn.dot_product_attention(*inputs), rtol=1e-5, atol=1e-6)
    value, grads = jax.value_and_grad(lambda x: loss(one, x))(inputs)
    wanted, wanted_grads = jax.value_and_grad(lambda x: loss(nn.dot_product_attention, x))(inputs)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-4, atol=1e-6)


def test_attention_with_a_mask_does_not_read_what_it_hides():
    random = np.random.default_rng(2)
    query, key, value = (jnp.asarray(random.normal(size=(2, 4, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.asarray([True, True, False, True])[None, None, None]
    read = fused_attention(query, key, value, mask)
    np.testing.assert_allclose(read, nn.dot_product_attention(query, key, value, mask=mask), rtol=1e-5)
    np.testing.assert_allclose(read, fused_attention(query, key, value.at[:, 2].set(9.0), mask), rtol=1e-5)


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize(
    ("conditioning", "filled"),
    [("adaptive_norm", (6, 6, 6, 6, 6)), ("post_adaptive", ()), ("post_adaptive", (6, 0, 4, 6, 6))],
)
def test_the_fused_attention_changes_nothing_of_the_denoiser(monkeypatch, tokens, conditioning, filled):
    config = DenoiserConfig(width=16, layers=2, heads=2, prompt_bottleneck=5, conditioning=conditioning)
    denoiser = Denoiser(
        config, (0, 0, 1, 2, 2)[:tokens], 6, ("temporal", "graph", "output"), (0, 0, 1), filled[:tokens]
    )
    rng = np.random.default_rng(1)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, tokens, 6), (3,), (3, 3))]
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *(one[0] for one in inputs), jnp.ones(()))["params"]
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    plain = denoise(denoiser, variables, *inputs, jnp.ones(3))
    for module in (products, denoiser_module):
        monkeypatch.setattr(module, "has_fused_attention", lambda dtype: True)
    monkeypatch.setattr(products, "fused_attention", functools.partial(fused_attention, implementation="xla"))
    fused = denoise(denoiser, variables, *inputs, jnp.ones(3))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)


def test_other_products_are_refused():
    with pytest.raises(ValueError, match="dense layer"):
        rows_dot_general(jnp.ones((2, 3)), jnp.ones((2, 3)), (((0,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="dense layer"):
        rows_dot_general(jnp.ones((2, 3)), jnp.ones((2, 3, 4)), (((1,), (1,)), ((0,), (0,))))


def test_the_peer_in_pytorch_is_the_same_network():
    torch = pytest.importorskip("torch")
    from benchmarks.torch_denoiser import TorchDenoiser, load_flax

    config, layers, prompt_width = DenoiserConfig(width=16, layers=2, heads=2, prompt_bottleneck=5), (0, 0, 1, 2), 3
    kinds = ("temporal", "graph", "output")
    denoiser = Denoiser(config, layers, 6, kinds)
    example = jnp.zeros((4, 6)), jnp.zeros(()), jnp.zeros(prompt_width), jnp.ones(())
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *example)["params"]
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 4, 6), (5,), (5, prompt_width))]
    prompt_mask = np.asarray([1, 0, 1, 1, 0], np.float32)
    network = TorchDenoiser(config, 4, 6, prompt_width)
    load_flax(network, variables, layers, [LAYER_KINDS.index(kinds[layer]) for layer in layers])
    theirs = network(*(torch.from_numpy(array) for array in (*inputs, prompt_mask))).detach().numpy()
    ours = denoise(denoiser, variables, *(jnp.asarray(array) for array in (*inputs, prompt_mask)))
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    assert np.abs(ours).max() > 0.1
