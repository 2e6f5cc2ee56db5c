"""In: everything that is trained by the loop, tiny. Out: the same parameters on one device and on two."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.base import BaseConfig, BaseData, make_base_step
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, split_source
from gpdiff_jax.codec import CodecConfig, fit_codec
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.denoiser_training import train_denoiser
from gpdiff_jax.diffusion.training import PretrainConfig, TrainingData, ZooCodes, train_network
from gpdiff_jax.mlp_hypernetwork import PromptMlp, make_mlp_loss, predict_codes
from gpdiff_jax.models.protocol import abstract_params
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.prompts import temporal
from gpdiff_jax.prompts.autoencoder import TemporalConfig
from gpdiff_jax.prompts.embedding import train_embedding
from gpdiff_jax.prompts.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.knowledge_graph import build_knowledge_graph
from gpdiff_jax.sources import DataConfig, Sources, prepare_sources
from gpdiff_jax.tokens import make_layout
from gpdiff_jax.training.loop import train
from gpdiff_jax.training.step import of_type, start_training
from gpdiff_jax.typing import Params
from tests.tiny import make_tiny

_STEPS, _KEY = 20, jax.random.key(3)
_DATA = DataConfig(covariates="profile", variants=3, max_neighbours=2)
_PRETRAIN = PretrainConfig(
    denoiser=DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=4, dtype="float64"),
    codec=CodecConfig(components=4),
    steps=_STEPS,
    batch=8,
    accumulate=2,
    windows=2,
    evaluations=1,
)


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    return prepare_sources(simulated_cities[:2], _DATA, key=jax.random.key(0), validation_windows=4)


def _wide(tree):
    """Everything that is float32, in float64; to be used where x64 is on."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf, np.float64)) if leaf.dtype == jnp.float32 else leaf, tree
    )


def _base(cities: Sequence[City], sources: Sources, devices: list) -> Params:
    del cities
    model, optimiser = make_tiny(sources.sizes), clipped_adam(1e-2)
    config = BaseConfig(regions=4, windows=2)
    shapes = abstract_params(model, sources.sizes)
    rng = np.random.default_rng(0)
    start = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.1, shapes)
    return train(
        make_base_step(model, optimiser, config, len(devices)),
        start_training(start, optimiser),
        BaseData(_wide(sources), jnp.ones(sources.num_regions)),
        key=_KEY,
        steps=_STEPS,
        evaluate_every=_STEPS,
        devices=devices,
        name="base",
    ).params


def _zoo(sources: Sources) -> tuple[TrainingData, np.ndarray]:
    """Random codes and prompts, which is all that matters here."""
    rng = np.random.default_rng(1)
    shapes = abstract_params(make_tiny(sources.sizes), sources.sizes)
    layout = make_layout(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), 64)
    tokens = layout.mask() * rng.normal(size=(12, layout.num_tokens, layout.width)).astype(np.float32)
    codec = _wide(fit_codec(layout, tokens[0], tokens, np.ones(12), 4))
    regions = sources.num_regions
    x0 = codec.mask() * rng.normal(size=(regions, 2, *codec.mask().shape))
    held_out = np.arange(regions) % 5 == 0
    odds = np.where(held_out, 0.0, 1.0)
    return TrainingData(
        _wide(sources), ZooCodes(*jax.device_put((x0, rng.normal(size=(3, regions, 4)), odds))), codec
    ), (held_out)


def _denoiser(cities: Sequence[City], sources: Sources, devices: list) -> Params:
    del cities
    data, held_out = _zoo(sources)
    model, parts = make_tiny(sources.sizes), (data.sources, data.zoo, data.codec, held_out)
    return train_denoiser(model, *parts, _PRETRAIN, key=_KEY, devices=devices)


def _mlp(cities: Sequence[City], sources: Sources, devices: list) -> Params:
    del cities
    data, held_out = _zoo(sources)
    model, mask = make_tiny(sources.sizes), jnp.asarray(data.codec.mask(), jnp.float64)
    network = PromptMlp(4, 8, data.zoo.x0.shape[2:])
    start = of_type(jax.jit(network.init)(_KEY, jnp.zeros((1, 4)))["params"], jnp.float64)

    def predict(variables, data, batch, key):
        del data, key
        return predict_codes(network, variables, batch.prompt, mask)

    loss = make_mlp_loss(network, model, mask, _PRETRAIN)
    options = {"key": _KEY, "name": "MLP", "devices": devices}
    return train_network(start, data, model, held_out, loss, predict, _PRETRAIN, **options)


def _encoder(cities: Sequence[City], sources: Sources, devices: list, monkeypatch: pytest.MonkeyPatch) -> Params:
    del sources
    config = TemporalConfig(
        width=8, heads=2, encoder_layers=1, train_days=2, steps=_STEPS, batch=4, evaluations=1, contrast_pairs=3
    )
    whole = temporal.build_patch_bank
    monkeypatch.setattr(temporal, "build_patch_bank", lambda *parts, **options: _wide(whole(*parts, **options)))
    spans = [split_source(city.num_steps, history=12, horizon=6).train for city in cities]
    return temporal.pretrain_encoder(cities, spans, config, key=_KEY, devices=devices).variables


def _embedding(cities: Sequence[City], sources: Sources, devices: list) -> Params:
    del sources
    graph = build_knowledge_graph(cities[:1], [Span(0, 72)])
    config = EmbeddingConfig(width=4, relation_width=2, batch=16, epochs=1, evaluate_every=1)
    triples = graph.triples[: 8 * _STEPS]  # questions of both sides: at least twenty batches
    return train_embedding(graph, config, key=_KEY, train=triples, validation=triples[:9], devices=devices).params


_LONG = [pytest.param(one, marks=pytest.mark.slow) for one in (_mlp, _encoder)]


@pytest.mark.parametrize("train_it", [_base, _denoiser, _embedding, *_LONG], ids=lambda one: one.__name__[1:])
def test_one_device_and_two_train_the_same_parameters_in_float64(train_it, simulated_cities, sources, monkeypatch):
    cities = simulated_cities[:2]
    extra = (monkeypatch,) if train_it is _encoder else ()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        one, two = (train_it(cities, sources, jax.local_devices()[:count], *extra) for count in (1, 2))
    for alone, shared in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert alone.dtype == jnp.float64
        np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-9)
