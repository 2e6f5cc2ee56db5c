"""In: a parameter zoo. Out: its codes and prompts, the training set of a generator; and the trained generator."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gpdiff_jax.codec import Codec, encode_zoo, fit_codec
from gpdiff_jax.diffusion.training import PretrainConfig, ZooCodes, held_out_regions, train_denoiser
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models.protocol import make_model
from gpdiff_jax.prompts.encoders import plain_encoder
from gpdiff_jax.prompts.prompt import PromptScaler, fit_prompt_scaler, scale_prompts
from gpdiff_jax.sources import Sources
from gpdiff_jax.tokens import TokenLayout, make_layout, to_tokens
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo import ParameterZoo

_MOST_VECTORS = 2048  # that the statistics of the codes are made from


def best_tokens(zoo: ParameterZoo, layout: TokenLayout) -> Float[np.ndarray, "R L W"]:
    """Tokens of the best parameter vector of every region of a zoo, unscaled."""
    tokens = np.zeros((zoo.num_regions, layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        tokens[rows] = _tokens(layout, jax.tree.map(lambda leaf: leaf[:, 0], params))
    return tokens


def _tokens(layout: TokenLayout, params: Params) -> Float[np.ndarray, "X L W"]:
    return np.asarray(jax.vmap(partial(to_tokens, layout))(jax.tree.map(jnp.asarray, params)))


def _sample_tokens(
    zoo: ParameterZoo, layout: TokenLayout, odds: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "X L W"], Float[np.ndarray, " X"]]:
    """Tokens of at most `_MOST_VECTORS` evenly spaced vectors of regions with odds above 0, and their weights."""
    vectors = zoo.validation_mae.shape[1]
    candidates = np.flatnonzero(np.repeat(odds > 0, vectors))
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(len(candidates), _MOST_VECTORS)).round().astype(int)]
    tokens = np.zeros((len(chosen), layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        place_of_row = np.full(zoo.num_regions, -1)
        place_of_row[rows] = np.arange(len(rows))
        here = np.flatnonzero(place_of_row[chosen // vectors] >= 0)
        if len(here):
            at = place_of_row[chosen[here] // vectors], chosen[here] % vectors
            tokens[here] = _tokens(layout, jax.tree.map(lambda leaf, at=at: leaf[at], params))
    return tokens, odds[chosen // vectors]


def _encode_parts(zoo: ParameterZoo, codec: Codec) -> Float[np.ndarray, "R M rows width"]:
    """Codes of all vectors, a part of the zoo at a time."""
    codes = np.zeros((*zoo.validation_mae.shape, *codec.mask().shape), np.float32)
    for rows, params in zoo.vectors.parts():
        codes[rows] = np.asarray(_encode(codec, jax.tree.map(jnp.asarray, params)))
    return codes


@jax.jit
def _encode(codec: Codec, params: Params) -> Float[Array, "X M rows width"]:
    return encode_zoo(codec, jax.vmap(jax.vmap(partial(to_tokens, codec.layout)))(params))


def choice_regions(sources: Sources, config: PretrainConfig, *, key: Key) -> Bool[np.ndarray, " R"]:
    """The source regions that `pretrain` with this configuration and key does not train on, but chooses on."""
    return held_out_regions(sources, config.held_out_share, key=jax.random.split(key)[0])


def encode_training_set(
    zoo: ParameterZoo, codec: Codec, prompt_scaler: PromptScaler, held_out: Bool[np.ndarray, " R"]
) -> ZooCodes:
    """Codes and scaled prompts of a zoo, a region drawn in inverse proportion to its city's size, held out never."""
    return ZooCodes(
        x0=jnp.asarray(_encode_parts(zoo, codec)),
        prompts=scale_prompts(zoo.prompts, prompt_scaler),
        odds=jnp.asarray(_odds(zoo, held_out), jnp.float32),
        prompt_names=zoo.prompts.names,
    )


def _odds(zoo: ParameterZoo, held_out: Bool[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    return np.where(held_out, 0.0, 1.0 / np.bincount(zoo.city_index)[zoo.city_index])


def pretrain(
    zoo: ParameterZoo,
    *,
    key: Key,
    config: PretrainConfig = PretrainConfig(),
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Hypernetwork:
    """Trains the generator on a zoo.

    Args:
      zoo: harvested parameters and prompts, with the sources attached, whose readings the functional loss needs.
      key: random key.
      config: sizes and weights.
      progress: called with (steps done, metrics).

    Returns:
      The generator.

    Raises:
      InputError: the zoo has no sources, or they name different regions, or its prompts lack a part that the
        conditioning needs.
      FloatingPointError: the loss is not finite.
    """
    sources = zoo.sources
    if sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    if zoo.names != sources.names:
        raise InputError("the zoo and the source cities name different regions; harvest again from these cities")
    if zoo.prompts.names != sources.prompts.names:
        raise InputError("the prompts of the zoo and of the sources have other parts; attach sources `with_prompts`")
    layout = make_layout(zoo.base, config.codec.token_width)
    held_out = choice_regions(sources, config, key=key)
    train_key = jax.random.split(key)[1]
    tokens, weights = _sample_tokens(zoo, layout, _odds(zoo, held_out))
    codec = fit_codec(layout, np.asarray(to_tokens(layout, zoo.base)), tokens, weights, config.codec.components)
    prompt_scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    training_set = encode_training_set(zoo, codec, prompt_scaler, held_out)
    model = make_model(zoo.model, sources.sizes)
    variables = train_denoiser(model, sources, training_set, codec, held_out, config, key=train_key, progress=progress)
    return Hypernetwork(
        model_name=zoo.model,
        sizes=sources.sizes,
        data=sources.config,
        denoiser_config=config.denoiser,
        variables=variables,
        codec=codec,
        prompt_scaler=prompt_scaler,
        prompt_names=zoo.prompts.names,
        prompt_encoder=sources.prompt_encoder or plain_encoder(),
    )
