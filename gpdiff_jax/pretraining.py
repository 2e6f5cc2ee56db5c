"""In: a parameter zoo. Out: its latents and prompts, the training set of a generator; and the trained generator."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.cities.city import MINUTES_PER_DAY
from gpdiff_jax.diffusion.denoiser_training import train_denoiser
from gpdiff_jax.diffusion.training import PretrainConfig, ZooLatents, held_out_regions
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.folder_lock import locked_folder
from gpdiff_jax.hosts import is_first
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models.protocol import model_text
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.prompts.encoders import plain_encoder
from gpdiff_jax.prompts.prompt import PromptScaler, fit_prompt_scaler, scale_prompts
from gpdiff_jax.prompts.sources import PromptedSources
from gpdiff_jax.training.checkpoints import checkpoints_beside, drop_checkpoints
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.memory import check_room
from gpdiff_jax.training.storage import is_filled
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.vectors import evenly, padded_size
from gpdiff_jax.zoo.codec import Codec, encode_zoo, fit_codec
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.residuals import source_residuals
from gpdiff_jax.zoo.tokens import TokenLayout, make_layout, to_tokens

_DIRECTIONS = 64  # of the zoo that a generator keeps
_BLOCK = 64  # rows, of which more are filled up to a multiple
_MOST_VECTORS = 2048  # that the statistics of the codec are made from


def best_tokens(zoo: ParameterZoo, layout: TokenLayout) -> Float[np.ndarray, "R L W"]:
    """Tokens of the best parameter vector of every region of a zoo, unscaled."""
    shape = zoo.num_regions, layout.num_tokens, layout.width
    check_room(4 * math.prod(shape), f"the tokens of {zoo.num_regions} regions")
    tokens = np.zeros(shape, np.float32)
    for rows, params in zoo.vectors.parts():
        tokens[rows] = tokens_of(layout, jax.tree.map(lambda leaf: leaf[:, 0], params))
    return tokens


def tokens_of(layout: TokenLayout, params: Params) -> Float[np.ndarray, "X L W"]:
    """Tokens of parameter vectors, leaves [X, ...], unscaled."""
    return _in_few_sizes(partial(_write_tokens, layout), params)


def _in_few_sizes(function: Callable[[Params], jax.Array], params: Params) -> np.ndarray:
    """What a compiled function says of rows, filled up to few numbers of rows: parts of any size share programs."""
    count = len(jax.tree.leaves(params)[0])
    size = padded_size(count, 8) if count < _BLOCK else -(-count // _BLOCK) * _BLOCK
    if size == count:
        return np.asarray(function(params))
    filled = np.minimum(np.arange(size), count - 1)
    return np.asarray(function(jax.tree.map(lambda leaf: np.asarray(leaf)[filled], params)))[:count]


@partial(jax.jit, static_argnums=0)
def _write_tokens(layout: TokenLayout, params: Params) -> Float[Array, "X L W"]:
    return jax.vmap(partial(to_tokens, layout))(params)


def _sample_tokens(
    zoo: ParameterZoo, layout: TokenLayout, probabilities: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "X L W"], Float[np.ndarray, " X"]]:
    """Tokens of at most `_MOST_VECTORS` evenly spaced vectors of regions that are drawn at all, and their weights."""
    vectors = zoo.validation_mae.shape[1]
    candidates = np.flatnonzero(np.repeat(probabilities > 0, vectors))
    chosen = candidates[evenly(len(candidates), _MOST_VECTORS)]
    tokens = np.zeros((len(chosen), layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        place_of_row = np.full(zoo.num_regions, -1)
        place_of_row[rows] = np.arange(len(rows))
        here = np.flatnonzero(place_of_row[chosen // vectors] >= 0)
        if len(here):
            at = place_of_row[chosen[here] // vectors], chosen[here] % vectors
            tokens[here] = tokens_of(layout, jax.tree.map(lambda leaf, at=at: leaf[at], params))
    return tokens, probabilities[chosen // vectors]


def encode_vectors(zoo: ParameterZoo, codec: Codec) -> Float[np.ndarray, "R M Z D"]:
    """Latents of all M vectors of every region of a zoo, a part of the zoo at a time."""
    shape = (*zoo.validation_mae.shape, *codec.mask().shape)
    check_room(4 * math.prod(shape), f"the latents of {shape[0]} regions, {shape[1]} of each,")
    latents = np.zeros(shape, np.float32)
    for rows, params in zoo.vectors.parts():
        latents[rows] = _in_few_sizes(partial(_encode, codec), params)
    return latents


@jax.jit
def _encode(codec: Codec, params: Params) -> Float[Array, "X M Z D"]:
    return encode_zoo(codec, jax.vmap(jax.vmap(partial(to_tokens, codec.layout)))(params))


class LatentSpace(NamedTuple):
    """What a generator works in, made of the zoo before anything is trained: latents, prompts' scale, and its split."""

    codec: Codec
    prompt_scaler: PromptScaler
    held_out: Bool[np.ndarray, " R"]  # the regions that are not trained on, but chosen on
    probabilities: Float[np.ndarray, " R"]  # how often a region is drawn in training


def fit_latent_space(zoo: ParameterZoo, config: PretrainConfig, *, key: Key) -> LatentSpace:
    """Splits a zoo's regions and fits the codec and the scale of the prompts.

    Args:
      zoo: harvested parameters and prompts, with the sources attached.
      config: of the codec, and the share that is held out.
      key: of `pretrain`, with which this is what it works in.

    Returns:
      The latent space. The codec is fitted to the regions that are trained on, every city with the same weight.

    Raises:
      InputError: the zoo has no sources.
    """
    if zoo.sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    kinds = make_model(zoo.model, zoo.sources.sizes).layer_kinds(zoo.pooled)
    layout = make_layout(zoo.pooled, config.codec.token_width, kinds)
    held_out = held_out_regions(zoo.sources, config.held_out_share, key=jax.random.split(key)[0])
    probabilities = region_probabilities(zoo.city_index, held_out)
    tokens, weights = _sample_tokens(zoo, layout, probabilities)
    pooled = tokens_of(layout, jax.tree.map(lambda leaf: np.asarray(leaf)[None], zoo.pooled))[0]
    kept = config.codec
    codec = fit_codec(layout, pooled, tokens, weights, kept.components, kept.normalisation, kept.space)
    return LatentSpace(codec, fit_prompt_scaler(zoo.prompts, zoo.city_index), held_out, probabilities)


def encode_training_set(zoo: ParameterZoo, space: LatentSpace) -> ZooLatents:
    """Latents and scaled prompts of a zoo, a region drawn as often as the space's probabilities say."""
    return ZooLatents(
        x0=jax.device_put(encode_vectors(zoo, space.codec)),
        prompts=scale_prompts(zoo.prompts, space.prompt_scaler),
        probabilities=jax.device_put(space.probabilities.astype(np.float32)),
        spatial=zoo.prompts.spatial,
    )


def region_probabilities(
    city_index: Int[np.ndarray, " R"], held_out: Bool[np.ndarray, " R"]
) -> Float[np.ndarray, " R"]:
    """How often each source region is drawn in training.

    Every city is drawn alike, whatever the number of its training regions, and these alike among themselves.

    Args:
      city_index: the city of every region.
      held_out: regions that are never drawn.

    Returns:
      Odds that sum to 1.
    """
    trained = np.bincount(city_index[~held_out], minlength=int(city_index.max()) + 1)
    probabilities = np.where(held_out, 0.0, 1.0 / np.maximum(trained, 1)[city_index])
    return probabilities / probabilities.sum()


def pretrain(
    zoo: ParameterZoo,
    *,
    key: Key,
    config: PretrainConfig = PretrainConfig(),
    folder: str | pathlib.Path | None = None,
    devices: Sequence[Device] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Hypernetwork:
    """Trains the generator on a zoo.

    Args:
      zoo: harvested parameters and prompts, with the sources attached, whose readings the functional loss needs.
      key: random key.
      config: sizes and weights.
      folder: where the generator is saved; beside it, in FOLDER.checkpoints, a training that was stopped leaves what it
        goes on from. A finished generator of the same zoo, settings and key is read. None saves nothing.
      devices: to spread the training over; None for all local accelerators, see `parallel.training_devices`.
      progress: called with (steps done, metrics).

    Returns:
      The generator.

    Raises:
      InputError: the zoo has no sources, or they name different regions, or its prompts lack a part that the
        conditioning needs; or the folder holds another generator, or another process works on it.
      NotFiniteError: the loss or its gradient is not finite; names the step.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> zoo = gpd.harvest_cities(cities, key=jax.random.key(0))  # doctest: +SKIP
      >>> hypernetwork = gpd.pretrain(zoo, key=jax.random.key(1), folder="hypernetwork")  # doctest: +SKIP
    """
    sources = zoo.sources
    if sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    if zoo.names != sources.names:
        raise InputError("the zoo and the source cities name different regions; harvest again from these cities")
    if zoo.prompts.names != sources.prompts.names:
        raise InputError("the prompts of the zoo and of the sources have other parts; attach sources `with_prompts`")
    place = None if folder is None else user_path(folder).absolute()
    if place is not None and is_first():
        place.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(place, outside=True):
        return _pretrain_in(place, zoo, sources, config, key, devices=devices, progress=progress)


def _pretrain_in(
    place: pathlib.Path | None,
    zoo: ParameterZoo,
    sources: PromptedSources,
    config: PretrainConfig,
    key: Key,
    *,
    devices: Sequence[Device] | None,
    progress: Callable[[int, dict[str, float]], None] | None,
) -> Hypernetwork:
    """Reads the generator that the folder `place` holds, or trains it and keeps it there, if there is a folder."""
    identity = None if place is None else _identity(zoo, config, key)
    if place is not None and is_filled(place):
        held = Hypernetwork.load(place)
        if held.identity != identity:
            raise InputError(f"{str(place)!r} holds a generator of another zoo, settings or key; name another folder")
        drop_checkpoints(checkpoints_beside(place))
        return held
    space = fit_latent_space(zoo, config, key=key)
    train_key = jax.random.split(key)[1]
    checkpoints = None if place is None else checkpoints_beside(place)
    training_set = encode_training_set(zoo, space)
    model = make_model(zoo.model, sources.sizes)
    spread: Any = {"devices": devices, "checkpoints": checkpoints, "progress": progress}
    codec, held_out = space.codec, space.held_out
    variables = train_denoiser(model, sources, training_set, codec, held_out, config, key=train_key, **spread)
    hypernetwork = Hypernetwork(
        model_name=zoo.model,
        sizes=sources.sizes,
        data=sources.config,
        denoiser_config=config.denoiser,
        variables=variables,
        codec=codec,
        prompt_scaler=space.prompt_scaler,
        prompt_names=zoo.prompts.names,
        prompt_spatial=zoo.prompts.spatial,
        prompt_encoder=sources.prompt_encoder or plain_encoder(),
        interval_minutes=MINUTES_PER_DAY // sources.train.steps_per_day,
        kinds=tuple(sorted({city.kind for city in sources.cities})) or None,
        speed_units=tuple(sorted({city.speed_unit for city in sources.cities if city.speed_unit is not None})),
        identity=identity,
        directions=zoo_directions(zoo, _DIRECTIONS),
        residuals=jax.device_put(source_residuals(model, sources, zoo.pooled)),
    )
    if place is not None and checkpoints is not None:
        hypernetwork.save(place)
        drop_checkpoints(checkpoints)
    return hypernetwork


def _identity(zoo: ParameterZoo, config: PretrainConfig, key: Key) -> str:
    """By what a training of the generator is known."""
    config = dataclasses.replace(config, accumulate=1)  # which changes rounding alone
    arrays = (key, zoo.pooled, zoo.prompts.values, zoo.prompts.region_ids, zoo.validation_mae, zoo.city_index)
    sources = zoo.sources
    assert sources is not None
    text = model_text(make_model(zoo.model, sources.sizes), sources.sizes, zoo.pooled)
    # The functional loss reads the windows, residuals of the pooled model are kept, and so is how windows were made.
    arrays = (*arrays, sources.bank, sources.train, sources.regions)
    return digest_of(repr((zoo.model, text, zoo.names, config, sources.config)), arrays)
