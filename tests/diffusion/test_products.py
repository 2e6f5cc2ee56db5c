"""In: dense layers and attention over many regions. Out: that they are flax's own, and PyTorch's, numbers."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise
from gpdiff_jax.diffusion.products import attention, dense, rows_dot_general
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
