"""In: the name of something that the loop trains, and two cities. Out: it, trained for twenty steps, very small.

In float64 where JAX's x64 mode is on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.baselines.mlp_hypernetwork import PromptMlp, make_mlp_loss, predict_latents
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, split_source
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.denoiser_training import train_denoiser
from gpdiff_jax.diffusion.training import PretrainConfig, TrainingData, ZooLatents, train_network
from gpdiff_jax.models.protocol import abstract_params
from gpdiff_jax.prompts.temporal import encoder
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding import train_embedding
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import build_knowledge_graph
from gpdiff_jax.training.loop import train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.step import of_type, start_training
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.codec import CodecConfig, fit_codec
from gpdiff_jax.zoo.pooled import PooledConfig, PooledData, make_pooled_step
from gpdiff_jax.zoo.tokens import make_layout
from tests.tiny import make_tiny

_STEPS, _KEY = 20, jax.random.key(3)
_DATA = DataConfig(covariates="profile", variants=3, max_neighbours=2)


def prepare(cities: Sequence[City]) -> Sources:
    """What all of them are trained on."""
    return prepare_sources(cities, _DATA, key=jax.random.key(0), validation_windows=4)


def _dtype() -> Any:
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def _wide(tree):
    """Everything that is float32, in float64 where x64 is on."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf, _dtype())) if leaf.dtype == jnp.float32 else leaf, tree
    )


def _pretrain(evaluations: int) -> PretrainConfig:
    denoiser = DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=4, dtype=jnp.dtype(_dtype()).name)
    sizes = {"batch": 8, "accumulate": 2, "windows": 2}
    return PretrainConfig(denoiser, CodecConfig(components=4), _STEPS, evaluations=evaluations, **sizes)


def _pooled(cities: Sequence[City], sources: Sources, evaluations: int, devices: list, **options: Any) -> Params:
    del cities
    model, optimiser = make_tiny(sources.sizes), clipped_adam(1e-2)
    shapes, rng = abstract_params(model, sources.sizes), np.random.default_rng(0)
    start = jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(_dtype()), shapes)
    config = PooledConfig(regions=4, windows=2, averaging=0.9, mixing=0.2)
    return train(
        make_pooled_step(model, optimiser, config, len(devices)),
        start_training(start, optimiser, averaged=True),
        PooledData(_wide(sources), jax.device_put(np.ones(sources.num_regions, np.float32))),
        key=_KEY,
        steps=_STEPS,
        evaluate_every=_STEPS // evaluations,
        devices=devices,
        name="pooled",
        **options,
    ).params


def _zoo(sources: Sources) -> tuple[TrainingData, np.ndarray]:
    """Random latents and prompts, which is all that matters here."""
    rng = np.random.default_rng(1)
    shapes = abstract_params(make_tiny(sources.sizes), sources.sizes)
    layout = make_layout(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), 64)
    tokens = layout.mask() * rng.normal(size=(12, layout.num_tokens, layout.width)).astype(np.float32)
    codec, regions = fit_codec(layout, tokens[0], tokens, np.ones(12), 4), sources.num_regions
    x0, prompts = codec.mask() * rng.normal(size=(regions, 2, *codec.mask().shape)), rng.normal(size=(3, regions, 4))
    held_out = np.arange(regions) % 5 == 0
    arrays = [np.asarray(array, _dtype()) for array in (x0, prompts, np.where(held_out, 0.0, 1.0))]
    return TrainingData(_wide(sources), ZooLatents(*jax.device_put(arrays)), _wide(codec)), held_out


def _denoiser(cities: Sequence[City], sources: Sources, evaluations: int, **options: Any) -> Params:
    del cities
    data, held_out = _zoo(sources)
    parts = (data.sources, data.zoo, data.codec, held_out)
    return train_denoiser(make_tiny(sources.sizes), *parts, _pretrain(evaluations), key=_KEY, **options)


def _mlp(cities: Sequence[City], sources: Sources, evaluations: int, **options: Any) -> Params:
    del cities
    (data, held_out), config = _zoo(sources), _pretrain(evaluations)
    model, mask = make_tiny(sources.sizes), jnp.asarray(data.codec.mask(), _dtype())
    network = PromptMlp(4, 8, data.zoo.x0.shape[2:])
    start = of_type(jax.jit(network.init)(_KEY, jnp.zeros((1, 4)))["params"], _dtype())

    def predict(variables, data, batch, key):
        del data, key
        return predict_latents(network, variables, batch.prompt, mask)

    loss = make_mlp_loss(network, model, mask, config)
    return train_network(start, data, model, held_out, loss, predict, config, key=_KEY, name="MLP", **options)


def _encoder(cities: Sequence[City], sources: Sources, evaluations: int, **options: Any) -> Params:
    del sources
    config = TemporalConfig(width=8, heads=2, encoder_layers=1, train_days=2, steps=_STEPS, batch=4, contrast_pairs=4)
    config = dataclasses.replace(config, evaluations=evaluations)
    spans = [split_source(city.num_steps, history=12, horizon=6).train for city in cities]
    whole = encoder.build_patch_bank
    with mock.patch.object(encoder, "build_patch_bank", lambda *parts, key: _wide(whole(*parts, key=key))):
        return encoder.pretrain_encoder(cities, spans, config, key=_KEY, **options).variables


def _embedding(cities: Sequence[City], sources: Sources, evaluations: int, **options: Any) -> Params:
    del sources
    graph = build_knowledge_graph(cities[:1], [Span(0, 72)])
    sizes: Any = {"width": 4, "relation_width": 2, "batch": 16, "evaluate_every": 1, "patience": 100}
    # As many batches of queries, of both sides, as make twenty steps or more.
    triples = graph.triples[: 8 * _STEPS]
    config = EmbeddingConfig(epochs=evaluations, **sizes)
    return train_embedding(graph, config, key=_KEY, train=triples, validation=triples[:9], **options).params


USERS = {"pooled": _pooled, "denoiser": _denoiser, "mlp": _mlp, "encoder": _encoder, "embedding": _embedding}
"""From cities, their sources, a number of evaluations, devices and checkpoints to parameters."""
