"""In: latents of the zoo and prompts. Out: a deterministic network from prompt to latent, the null that is trained.

It gets what the denoiser gets: the same latents, both losses with the same weights, the same optimiser, number of
steps, prompt noise and average of its weights, and it is chosen on the same held-out regions. What it lacks is the
diffusion, and with it noise levels and the weights of theirs (`min_snr_gamma`, `functional_by_signal`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.losses import DiffusionBatch, DiffusionLosses, bind_functional, example_keys
from gpdiff_jax.diffusion.training import LossFn, PretrainConfig, TrainingData, train_network
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.pretraining import LatentSpace, encode_training_set
from gpdiff_jax.prompts.prompt import Prompts, scale_prompts
from gpdiff_jax.training.step import of_type
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.codec import Codec
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo


class PromptMlp(nn.Module):
    """Prompt to latent through a bottleneck and one wide layer; begins at a latent of zeros, the mean of the zoo."""

    bottleneck: int
    width: int
    latent_shape: tuple[int, int]

    @nn.compact
    def __call__(self, prompt: Float[Array, "B E"]) -> Float[Array, "B Z D"]:
        """Returns the latents of a batch of prompts."""
        hidden = nn.silu(nn.Dense(self.bottleneck, name="prompt_in")(prompt))
        hidden = nn.gelu(nn.Dense(self.width, name="hidden")(hidden))
        rows, width = self.latent_shape
        latent = nn.Dense(rows * width, kernel_init=nn.initializers.zeros_init(), name="latent_out")(hidden)
        return latent.reshape(-1, rows, width)


@dataclasses.dataclass(frozen=True, eq=False)
class MlpHypernetwork:
    """The trained network, with the latent space of the generator that it stands beside."""

    network: PromptMlp
    variables: Params
    space: LatentSpace

    def params(self, prompts: Prompts) -> Params:
        """Parameters of every region from its prompt.

        Args:
          prompts: of R regions, one variant.

        Returns:
          Leaves [R, ...].

        Raises:
          InputError: several variants of every region.
        """
        if prompts.values.shape[0] != 1:
            raise InputError(
                f"the prompts hold {prompts.values.shape[0]} variants of every region, and parameters are made from "
                "one; choose it by `prompts.variant(index)`"
            )
        scaled = np.asarray(scale_prompts(prompts, self.space.prompt_scaler))[0]
        return _decode(self.network, self.variables, self.space.codec, scaled)


@functools.partial(jax.jit, static_argnums=0)
def _decode(network: PromptMlp, variables: Params, codec: Codec, scaled: Float[Array, "R E"]) -> Params:
    return jax.vmap(codec.params)(predict_latents(network, variables, scaled, jnp.asarray(codec.mask())))


def make_network(space: LatentSpace, config: PretrainConfig) -> PromptMlp:
    """The network that stands beside a generator: bottleneck and width of its denoiser, shape of its latents."""
    rows, width = space.codec.mask().shape
    return PromptMlp(config.denoiser.prompt_bottleneck, config.denoiser.width, (rows, width))


def mlp_hypernetwork(
    zoo: ParameterZoo,
    space: LatentSpace,
    config: PretrainConfig,
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MlpHypernetwork:
    """Trains the network on the zoo that a generator is trained on.

    Args:
      zoo: harvested parameters and prompts, with the sources attached.
      space: of the generator: `fit_latent_space` with its configuration and key.
      config: of the generator; what belongs to diffusion alone is not read.
      key: random key.
      devices: see `train_network`.
      checkpoints: see `train_network`.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The network with the lowest functional loss on the held-out regions.

    Raises:
      InputError: the zoo has no sources.
      NotFiniteError: see `train_network`.
    """
    if zoo.sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    network, codec = make_network(space, config), space.codec
    model = make_model(zoo.model, zoo.sources.sizes)
    latents = encode_training_set(zoo, space)
    init_key, train_key = jax.random.split(key)
    variables = of_type(jax.jit(network.init)(init_key, latents.prompts[0, :1])["params"], latents.x0.dtype)
    variables = train_network(
        variables,
        TrainingData(zoo.sources, latents, codec),
        model,
        space.held_out,
        make_mlp_loss(network, model, jnp.asarray(codec.mask()), config),
        lambda variables, data, batch, key: predict_latents(
            network, variables, batch.prompt, jnp.asarray(codec.mask())
        ),
        config,
        key=train_key,
        name="MLP",
        devices=devices,
        checkpoints=checkpoints,
        progress=progress,
    )
    return MlpHypernetwork(network, variables, space)


def make_mlp_loss(network: PromptMlp, model: Model, mask: Float[Array, "Z D"], config: PretrainConfig) -> LossFn:
    """The denoiser's losses, for latents that are predicted from the noisy prompt at once."""

    def loss_fn(
        variables: Params, data: TrainingData, batch: DiffusionBatch, key: Key
    ) -> tuple[jax.Array, DiffusionLosses]:
        noise_key, window_key = jax.random.split(key)
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.prompt.shape[1:]))(example_keys(batch, noise_key))
        x0 = predict_latents(network, variables, batch.prompt + config.prompt_noise * noise, mask)
        # The token loss of a denoiser that predicts v or x0 is this one where all is noise.
        token_loss = (jnp.square(x0 - batch.x0) * mask[None]).sum() / (mask.sum() * x0.shape[0])
        functional = bind_functional(model, data.sources, data.codec, config.windows)
        functional_loss = functional(x0, batch, key=window_key).mean()
        loss = config.token_weight * token_loss + config.functional_weight * functional_loss
        return loss, DiffusionLosses(loss, token_loss, functional_loss)

    return loss_fn


def predict_latents(
    network: PromptMlp, variables: Params, prompt: Float[Array, "B E"], mask: Float[Array, "Z D"]
) -> Float[Array, "B Z D"]:
    """Latents of B scaled prompts; 0 on padding."""
    latents = network.apply({"params": variables}, prompt)
    assert isinstance(latents, jax.Array)
    return latents * mask[None]
