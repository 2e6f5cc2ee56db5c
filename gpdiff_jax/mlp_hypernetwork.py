"""In: codes of the zoo and prompts. Out: a deterministic network from prompt to code, the null that is trained.

It gets what the denoiser gets: the same codes, both losses with the same weights, the same optimiser, number of steps,
prompt noise and average of its weights, and it is chosen on the same held-out regions. What it lacks is the diffusion,
and with it noise levels and the weights of theirs (`min_snr_gamma`, `functional_by_signal`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gpdiff_jax.codec import Codec
from gpdiff_jax.diffusion.losses import DiffusionBatch, DiffusionLosses, bind_functional, example_keys
from gpdiff_jax.diffusion.training import LossFn, PretrainConfig, TrainingData, train_network
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.pretraining import encode_training_set, region_odds
from gpdiff_jax.prompts.prompt import Prompts, scale_prompts
from gpdiff_jax.training.step import of_type
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo import ParameterZoo


class PromptMlp(nn.Module):
    """Prompt to code through a bottleneck and one wide layer; begins at a code of zeros, the mean of the zoo."""

    bottleneck: int
    width: int
    code_shape: tuple[int, int]

    @nn.compact
    def __call__(self, prompt: Float[Array, "B E"]) -> Float[Array, "B rows width"]:
        """Returns the codes of a batch of prompts."""
        hidden = nn.silu(nn.Dense(self.bottleneck, name="prompt_in")(prompt))
        hidden = nn.gelu(nn.Dense(self.width, name="hidden")(hidden))
        rows, width = self.code_shape
        code = nn.Dense(rows * width, kernel_init=nn.initializers.zeros_init(), name="code_out")(hidden)
        return code.reshape(-1, rows, width)


@dataclasses.dataclass(frozen=True, eq=False)
class MlpHypernetwork:
    """The trained network beside the generator whose codes and scaled prompts it shares."""

    network: PromptMlp
    variables: Params
    hypernetwork: Hypernetwork

    def params(self, prompts: Prompts) -> Params:
        """Parameters of every region from its prompt.

        Args:
          prompts: of R regions; the first variant is read.

        Returns:
          Leaves [R, ...].
        """
        codec = self.hypernetwork.codec
        told = np.asarray(scale_prompts(prompts, self.hypernetwork.prompt_scaler))[0]

        @jax.jit
        def made(variables: Params, codec: Codec, told: Float[Array, "R E"]) -> Params:
            return jax.vmap(codec.params)(predict_codes(self.network, variables, told, jnp.asarray(codec.mask())))

        return made(self.variables, codec, told)


def make_network(hypernetwork: Hypernetwork) -> PromptMlp:
    """The network that stands beside a generator: bottleneck and width of its denoiser, shape of its codes."""
    rows, width = hypernetwork.codec.mask().shape
    config = hypernetwork.denoiser_config
    return PromptMlp(config.prompt_bottleneck, config.width, (rows, width))


def mlp_hypernetwork(
    zoo: ParameterZoo,
    hypernetwork: Hypernetwork,
    held_out: Bool[np.ndarray, " R"],
    config: PretrainConfig,
    *,
    key: Key,
    like: Prompts | None = None,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MlpHypernetwork:
    """Trains the network on the zoo that a generator was trained on.

    Args:
      zoo: harvested parameters and prompts, with the sources attached.
      hypernetwork: the generator; lends its codec, the scale of its prompts and its sizes.
      held_out: [R], the regions that the generator was chosen on: `choice_regions`.
      config: of the generator; what belongs to diffusion alone is not read.
      key: random key.
      like: as the generator was given.
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
    network, codec = make_network(hypernetwork), hypernetwork.codec
    codes = encode_training_set(zoo, codec, hypernetwork.prompt_scaler, region_odds(zoo, held_out, config, like))
    init_key, train_key = jax.random.split(key)
    variables = of_type(jax.jit(network.init)(init_key, codes.prompts[0, :1])["params"], codes.x0.dtype)
    variables = train_network(
        variables,
        TrainingData(zoo.sources, codes, codec),
        hypernetwork.model,
        held_out,
        make_mlp_loss(network, hypernetwork.model, jnp.asarray(codec.mask()), config),
        lambda variables, data, batch, key: predict_codes(network, variables, batch.prompt, jnp.asarray(codec.mask())),
        config,
        key=train_key,
        name="MLP",
        devices=devices,
        checkpoints=checkpoints,
        progress=progress,
    )
    return MlpHypernetwork(network, variables, hypernetwork)


def make_mlp_loss(network: PromptMlp, model: Model, mask: Float[Array, "rows width"], config: PretrainConfig) -> LossFn:
    """The denoiser's losses, for codes that are predicted from the noisy prompt at once."""

    def loss_fn(
        variables: Params, data: TrainingData, batch: DiffusionBatch, key: Key
    ) -> tuple[jax.Array, DiffusionLosses]:
        noise_key, window_key = jax.random.split(key)
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.prompt.shape[1:]))(example_keys(batch, noise_key))
        x0 = predict_codes(network, variables, batch.prompt + config.prompt_noise * noise, mask)
        # The token loss of a denoiser that predicts v or x0 is this one where all is noise.
        token_loss = (jnp.square(x0 - batch.x0) * mask[None]).sum() / (mask.sum() * x0.shape[0])
        functional = bind_functional(model, data.sources, data.codec, config.windows)
        functional_loss = functional(x0, batch, key=window_key).mean()
        loss = config.token_weight * token_loss + config.functional_weight * functional_loss
        return loss, DiffusionLosses(loss, token_loss, functional_loss)

    return loss_fn


def predict_codes(
    network: PromptMlp, variables: Params, prompt: Float[Array, "B E"], mask: Float[Array, "rows width"]
) -> Float[Array, "B rows width"]:
    """Codes of B scaled prompts; 0 on padding."""
    codes = network.apply({"params": variables}, prompt)
    assert isinstance(codes, jax.Array)
    return codes * mask[None]
