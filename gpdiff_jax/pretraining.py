"""In: a parameter zoo. Out: its codes and prompts, the training set of a generator; and the trained generator."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from gpdiff_jax.cities.city import MINUTES_PER_DAY
from gpdiff_jax.codec import Codec, encode_zoo, fit_codec
from gpdiff_jax.diffusion.denoiser_training import train_denoiser
from gpdiff_jax.diffusion.training import PretrainConfig, ZooCodes, held_out_regions
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models.protocol import make_model
from gpdiff_jax.prompts.encoders import plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler, fit_prompt_scaler, scale_prompts
from gpdiff_jax.sources import Sources
from gpdiff_jax.tokens import TokenLayout, make_layout, to_tokens
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo import ParameterZoo

_MOST_VECTORS = 2048  # that the statistics of the codes are made from


def best_tokens(zoo: ParameterZoo, layout: TokenLayout) -> Float[np.ndarray, "R L W"]:
    """Tokens of the best parameter vector of every region of a zoo, unscaled."""
    tokens = np.zeros((zoo.num_regions, layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        tokens[rows] = _tokens(layout, jax.tree.map(lambda leaf: leaf[:, 0], params))
    return tokens


def _tokens(layout: TokenLayout, params: Params) -> Float[np.ndarray, "X L W"]:
    return np.asarray(_write_tokens(layout, params))


@partial(jax.jit, static_argnums=0)
def _write_tokens(layout: TokenLayout, params: Params) -> Float[Array, "X L W"]:
    return jax.vmap(partial(to_tokens, layout))(params)


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


def encode_vectors(zoo: ParameterZoo, codec: Codec) -> Float[np.ndarray, "R M rows width"]:
    """Codes of all M vectors of every region of a zoo, a part of the zoo at a time."""
    codes = np.zeros((*zoo.validation_mae.shape, *codec.mask().shape), np.float32)
    for rows, params in zoo.vectors.parts():
        codes[rows] = np.asarray(_encode(codec, params))
    return codes


@jax.jit
def _encode(codec: Codec, params: Params) -> Float[Array, "X M rows width"]:
    return encode_zoo(codec, jax.vmap(jax.vmap(partial(to_tokens, codec.layout)))(params))


def choice_regions(sources: Sources, config: PretrainConfig, *, key: Key) -> Bool[np.ndarray, " R"]:
    """The source regions that `pretrain` with this configuration and key does not train on, but chooses on."""
    return held_out_regions(sources, config.held_out_share, key=jax.random.split(key)[0])


def encode_training_set(
    zoo: ParameterZoo, codec: Codec, prompt_scaler: PromptScaler, odds: Float[np.ndarray, " R"]
) -> ZooCodes:
    """Codes and scaled prompts of a zoo, a region drawn as often as `region_odds` say."""
    return ZooCodes(
        x0=jax.device_put(encode_vectors(zoo, codec)),
        prompts=scale_prompts(zoo.prompts, prompt_scaler),
        odds=jax.device_put(odds.astype(np.float32)),
        prompt_names=zoo.prompts.names,
    )


def region_odds(
    zoo: ParameterZoo, held_out: Bool[np.ndarray, " R"], config: PretrainConfig, like: Prompts | None = None
) -> Float[np.ndarray, " R"]:
    """How often each source region is drawn in training.

    Every city is drawn alike, whatever the number of its training regions, and these alike among themselves. With
    prompts to be `like`, every region that they tell of hands out one vote, in shares that fall with the squared
    distance between scaled prompts as a Gaussian of `config.likeness_width` does and begin from the balanced odds; a
    source region's variants count with their mean. So a city's odds sum to the votes that it gets, which are the same
    for a city of many regions as for one of few alike, and all are equal again where the width is large.

    Args:
      zoo: its prompts and cities.
      held_out: regions that are never drawn.
      config: `likeness_width`, in standard deviations per entry.
      like: prompts of a target's regions, from what may be seen of it; None to let every city count the same.

    Returns:
      Odds that sum to 1.

    Raises:
      InputError: `like` has other entries than the zoo's prompts, or tells nothing.
    """
    trained = np.bincount(zoo.city_index[~held_out], minlength=int(zoo.city_index.max()) + 1)
    odds = np.where(held_out, 0.0, 1.0 / np.maximum(trained, 1)[zoo.city_index])
    if like is None:
        return odds / odds.sum()
    if like.names != zoo.prompts.names:
        raise InputError("`like` and the prompts of the zoo have other parts; make both with one encoder")
    told = np.ones(like.values.shape[1], bool) if like.told is None else np.asarray(like.told)
    if not told.any():
        raise InputError("`like` tells nothing of any region; leave it out to weigh every city the same")
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    asked = np.asarray(scale_prompts(like, scaler), np.float64)[0, told]
    variants = np.asarray(scale_prompts(zoo.prompts, scaler), np.float64)
    exponents = np.stack([-0.5 * _squared_distances(asked, one) / config.likeness_width**2 for one in variants])
    # Far from everything all kernels underflow; only their ratios matter.
    exponents -= exponents[:, :, ~held_out].max(axis=(0, 2))[None, :, None]
    votes = np.exp(np.minimum(exponents, 0.0)).mean(axis=0) * odds
    return (votes / votes.sum(axis=1, keepdims=True)).mean(axis=0)


def _squared_distances(one: Float[np.ndarray, "Q E"], other: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "Q R"]:
    """Means over the entries."""
    squares = np.square(one).mean(axis=1)[:, None] + np.square(other).mean(axis=1)[None, :]
    return squares - 2.0 * one @ other.T / one.shape[1]


def pretrain(
    zoo: ParameterZoo,
    *,
    key: Key,
    config: PretrainConfig = PretrainConfig(),
    like: Prompts | None = None,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Hypernetwork:
    """Trains the generator on a zoo.

    Args:
      zoo: harvested parameters and prompts, with the sources attached, whose readings the functional loss needs.
      key: random key.
      config: sizes and weights.
      like: prompts of a target's regions from its support days; source regions with near prompts are then drawn more
        often, see `region_odds`.
      devices: to spread the training over; None for all local accelerators, see `parallel.training_devices`.
      checkpoints: folder from which a training that was stopped goes on; see `loop.train`.
      progress: called with (steps done, metrics).

    Returns:
      The generator.

    Raises:
      InputError: the zoo has no sources, or they name different regions, or its prompts lack a part that the
        conditioning needs; or see `region_odds`.
      NotFiniteError: the loss or its gradient is not finite; names the step.
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
    odds = region_odds(zoo, held_out, config, like)
    tokens, weights = _sample_tokens(zoo, layout, odds)
    base, chosen = _tokens(layout, jax.tree.map(lambda leaf: np.asarray(leaf)[None], zoo.base))[0], config.codec
    codec = fit_codec(layout, base, tokens, weights, chosen.components, chosen.normalisation)
    prompt_scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    training_set = encode_training_set(zoo, codec, prompt_scaler, odds)
    model = make_model(zoo.model, sources.sizes)
    spread: Any = {"devices": devices, "checkpoints": checkpoints, "progress": progress}
    variables = train_denoiser(model, sources, training_set, codec, held_out, config, key=train_key, **spread)
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
        interval_minutes=MINUTES_PER_DAY // sources.train.steps_per_day,
        kinds=tuple(sorted({city.kind for city in sources.cities})) or None,
    )
