"""In: latents of the zoo and prompts. Out: a trained denoiser, chosen on source regions that were held out."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.data.sources import Sources
from gpdiff_jax.diffusion.denoiser import Denoiser, denoise, in_parts, make_denoiser
from gpdiff_jax.diffusion.losses import (
    SIDE_BY_SIDE,
    DiffusionBatch,
    DiffusionLosses,
    bind_functional,
    make_diffusion_loss,
)
from gpdiff_jax.diffusion.objectives import Denoised, denoised
from gpdiff_jax.diffusion.samplers import ddim
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.diffusion.training import (
    LossFn,
    PredictFn,
    PretrainConfig,
    TrainingData,
    ZooLatents,
    make_network_step,
    network_optimiser,
    train_network,
)
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training.step import TrainState, of_type
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.codec import Codec

_EPS_STEPS = 10


def train_denoiser(
    model: Model,
    sources: Sources,
    zoo: ZooLatents,
    codec: Codec,
    held_out: np.ndarray,
    config: PretrainConfig,
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains the denoiser on the zoo.

    Args:
      model: the forecaster, for the functional loss.
      sources: the source regions.
      zoo: latents, prompts and probabilities.
      codec: from latents to parameters.
      held_out: bool [R], the regions to choose on.
      config: sizes.
      key: random key.
      devices: see `train_network`.
      checkpoints: see `train_network`.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The averaged variables of the network at the lowest functional loss on the held-out regions, or at the end where
      nothing was held out.

    Raises:
      InputError: the denoiser's conditioning needs a part that the prompts lack.
      NotFiniteError: see `train_network`.
    """
    init_key, train_key = jax.random.split(key)
    denoiser = make_denoiser(config.denoiser, codec, zoo.spatial)
    example = (jnp.zeros(shape) for shape in (zoo.x0.shape[2:], (), zoo.prompts.shape[2:], ()))
    variables = of_type(jax.jit(denoiser.init)(init_key, *example)["params"], zoo.x0.dtype)
    return train_network(
        variables,
        TrainingData(sources, zoo, codec),
        model,
        held_out,
        make_denoiser_loss(model, codec, zoo.spatial, config),
        make_prediction(denoiser, codec),
        config,
        key=train_key,
        name="generator",
        devices=devices,
        checkpoints=checkpoints,
        progress=progress,
    )


def make_denoiser_step(
    model: Model, codec: Codec, spatial: tuple[int, ...], config: PretrainConfig, num_devices: int
) -> Callable[[TrainState, TrainingData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training the denoiser, for `loop.train`.

    Args:
      model: the forecaster, for the functional loss.
      codec: from latents to parameters.
      spatial: see `Prompts.spatial`.
      config: sizes.
      num_devices: that share every batch.

    Returns:
      See `step.make_step`.
    """
    loss_fn = make_denoiser_loss(model, codec, spatial, config)
    return make_network_step(loss_fn, network_optimiser(config), config, num_devices)


def make_denoiser_loss(model: Model, codec: Codec, spatial: tuple[int, ...], config: PretrainConfig) -> LossFn:
    """Token and functional loss of a denoiser, see `losses.make_diffusion_loss`; what it reads comes as data."""
    denoiser, mask = make_denoiser(config.denoiser, codec, spatial), codec.mask()

    def loss_fn(
        variables: Params, data: TrainingData, batch: DiffusionBatch, key: Key
    ) -> tuple[jax.Array, DiffusionLosses]:
        loss_fn = make_diffusion_loss(
            denoiser,
            bind_functional(model, data.sources, data.codec, config.windows),
            jnp.asarray(mask),
            functional_weight=config.functional_weight,
            token_weight=config.token_weight,
            prompt_dropout=config.prompt_dropout,
            prompt_noise=config.prompt_noise,
            pure_noise_share=config.pure_noise_share,
            min_snr_gamma=config.min_snr_gamma,
            functional_by_signal=config.functional_by_signal,
        )
        return loss_fn(variables, batch, key)

    return loss_fn


def make_prediction(denoiser: Denoiser, codec: Codec) -> PredictFn:
    """Latents that a denoiser makes of pure noise and a prompt, by which the best variables are chosen."""
    config, level_at = denoiser.config, SCHEDULES[denoiser.config.schedule]
    # From pure noise one step makes the mean of x0 under the prompt; eps, divided by hardly any signal, needs several.
    steps = _EPS_STEPS if config.objective == "eps" else 1

    def predict_fn(variables: Params, data: TrainingData, batch: DiffusionBatch, key: Key) -> jax.Array:
        del data
        mask, size = jnp.asarray(codec.mask()), batch.region.shape[0]
        side_by_side = SIDE_BY_SIDE if size > SIDE_BY_SIDE else None
        eps = jax.random.normal(key, batch.x0.shape) * mask[None]

        def parts(x_t: jax.Array, t: jax.Array) -> Denoised:
            rows = x_t, jnp.broadcast_to(t, (size,)), batch.prompt, jnp.ones(size)
            prediction = in_parts(partial(denoise, denoiser, variables), rows, side_by_side)
            return denoised(config.objective, level_at(t), x_t, prediction * mask[None])

        return ddim(parts, level_at, eps, steps)

    return predict_fn
