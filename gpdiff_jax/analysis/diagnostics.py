"""In: a trained generator, its zoo and the prompts of targets. Out: numbers that say whether it generates.

A generator may collapse to an average, copy its training set or ignore its prompt, and still forecast fairly. Latents
are compared in the directions that the generator can draw, in units of the zoo's spread along them.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.analysis.shuffled_prompts import source_response, target_response
from gpdiff_jax.data.target import Target
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.pretraining import encode_vectors
from gpdiff_jax.prompts.prompt import Prompts, scale_prompts
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.vectors import evenly, squared_distances
from gpdiff_jax.zoo.codec import Codec
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.tokens import to_tokens

_ROWS = 2048  # regions of which all pairs are looked at
_ENTRIES = 2**24  # distances that are held at a time


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """How many shuffles of the prompts, and how many of the random windows that a source region is seen through."""

    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    shuffles: int = 5
    variants: int = 3

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "shuffles", "variants"))


class PromptedTarget(NamedTuple):
    """A target of the generator: its windows, its prompts, and the key that its parameters are drawn with."""

    name: str
    target: Target
    prompts: Prompts
    key: Key


def diagnose(
    zoo: ParameterZoo,
    hypernetwork: Hypernetwork,
    held_out: Bool[np.ndarray, " R"],
    targets: Sequence[PromptedTarget],
    *,
    key: Key,
    config: DiagnosticsConfig = DiagnosticsConfig(),
) -> dict[str, Any]:
    """Measures what a generator draws for regions it was trained on, for those held out, and for targets.

    Args:
      zoo: what it was trained on, with the sources attached.
      hypernetwork: the generator.
      held_out: [R], the regions that it was not trained on: `LatentSpace.held_out`.
      targets: cities to generate for; of their readings the support days are read, never the test span.
      key: random key of the draws for source regions, and of the shuffles.
      config: sizes.

    Returns:
      Numbers ready for JSON, None where one does not exist:
      `groups`, of the regions trained on, those held out, and every target: see `compare_latents`;
      `response`, of those held out and every target: see `shuffled_prompts`.

    Raises:
      InputError: nothing was held out, nothing was trained on, or the zoo has no sources.
    """
    if zoo.sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    if held_out.all() or not held_out.any():
        raise InputError(
            f"{int(held_out.sum())} of {len(held_out)} source regions were held out; a diagnosis needs some that the "
            "generator was trained on and some that it was not (`held_out_share`)"
        )
    codec, generate = hypernetwork.codec, partial(hypernetwork.generate, config=config.generate)
    vectors = _live(codec, encode_vectors(zoo, codec))
    draw_key, shuffle_key = jax.random.split(key)
    first = dataclasses.replace(zoo.prompts, values=zoo.prompts.values[:1])
    drawn = _latents(codec, generate(first, key=draw_key).params)
    scaled = np.asarray(scale_prompts(zoo.prompts, hypernetwork.prompt_scaler)[0], np.float64)
    groups = {}
    for name, rows in (("training", ~held_out), ("held_out", held_out)):
        groups[name] = compare_latents(
            drawn[:, rows], scaled[rows], vectors[~held_out], vectors[rows, 0], own=name == "training"
        )
    response = {
        "held_out": source_response(
            zoo, hypernetwork, np.flatnonzero(held_out), config.generate, config.shuffles, config.variants,
            draw_key=draw_key, shuffle_key=shuffle_key,
        )
    }  # fmt: skip
    for name, target, prompts, target_key in targets:
        described = np.asarray(scale_prompts(prompts, hypernetwork.prompt_scaler)[0], np.float64)
        latents = _latents(codec, generate(prompts, key=target_key).params)
        groups[name] = compare_latents(latents, described, vectors[~held_out], None, own=False)
        response[name] = target_response(
            hypernetwork, target, prompts, config.generate, config.shuffles,
            draw_key=target_key, shuffle_key=shuffle_key,
        )  # fmt: skip
    return {
        "samples": config.generate.samples,
        "steps": config.generate.steps,
        "guidance": config.generate.guidance,
        "shuffles": config.shuffles,
        "variants": min(config.variants, zoo.prompts.values.shape[0]),
        "latent_width": vectors.shape[-1],
        "groups": groups,
        "response": response,
    }


def compare_latents(
    drawn: Float[np.ndarray, "K R Y"],
    prompts: Float[np.ndarray, "R E"],
    training: Float[np.ndarray, "T M Y"],
    harvested: Float[np.ndarray, "R Y"] | None,
    *,
    own: bool,
) -> dict[str, float | int | None]:
    """Compares generated latents with harvested ones.

    Args:
      drawn: K generated latents for each of R regions.
      prompts: what they were generated from, scaled.
      training: M latents for each of the T regions that the generator was trained on.
      harvested: the best latent of each of the R regions, or None where none was harvested.
      own: the R regions are the T ones; a harvested latent's neighbours are then those of other regions.

    Returns:
      For the drawn ones, and as `harvested_...` for the harvested: `rms`; `effective_rank` (of one sample per region);
      `nearest`, the median distance to the nearest training latent; `correlation` of prompt and latent distances; and
      `sample_rms`, what separates the samples of one region.
    """
    same = np.arange(len(training)) if own else None
    pairs = [("", drawn)] if harvested is None else [("", drawn), ("harvested_", harvested[None])]
    found: dict[str, float | int | None] = {"regions": drawn.shape[1]}
    for prefix, latents in pairs:
        flat = latents.reshape(-1, latents.shape[-1])
        left_out = same if prefix else None
        found |= {
            f"{prefix}rms": root_mean_square(flat),
            f"{prefix}effective_rank": effective_rank(latents[0]),
            f"{prefix}nearest": float(np.median(nearest_distance(flat, training, left_out))),
            f"{prefix}correlation": pairwise_correlation(prompts, latents[0]),
        }
    return found | {"sample_rms": root_mean_square(drawn - drawn.mean(axis=0)) if len(drawn) > 1 else None}


def root_mean_square(latents: Float[np.ndarray, "*X"]) -> float:
    """Root of the mean square of all entries."""
    return float(np.sqrt(np.square(latents, dtype=np.float64).mean()))


def effective_rank(latents: Float[np.ndarray, "R Y"]) -> float:
    """How many directions latents spread over: the exponential of the entropy of their normalised singular values.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, of centred latents.

    Args:
      latents: one per region.

    Returns:
      Between 1 and min(R - 1, Y); 0 where all latents are the same.
    """
    rows = latents.astype(np.float64)
    singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    # What rounding leaves of equal latents is no direction.
    singular = singular[singular > 1e-6 * np.abs(rows).max()]
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def nearest_distance(
    latents: Float[np.ndarray, "X Y"], training: Float[np.ndarray, "T M Y"], left_out: np.ndarray | None = None
) -> Float[np.ndarray, " X"]:
    """Euclidean distance of every latent from the nearest one of the training set.

    Args:
      latents: any.
      training: M latents of each of T regions.
      left_out: int [X], a region of the training set for every latent, whose latents do not count; None for none.

    Returns:
      [X]; exactly 0 for a copy.
    """
    flat = training.reshape(-1, training.shape[-1]).astype(np.float64)
    region, found = np.repeat(np.arange(len(training)), training.shape[1]), np.zeros(len(latents))
    part = max(1, _ENTRIES // len(flat))
    for first in range(0, len(latents), part):
        rows = latents[first : first + part].astype(np.float64)
        squared = squared_distances(rows, flat)
        if left_out is not None:
            squared = np.where(region[None, :] == left_out[first : first + part, None], np.inf, squared)
        # The product above finds the nearest; only the difference itself is free of cancellation.
        found[first : first + part] = np.linalg.norm(rows - flat[squared.argmin(axis=1)], axis=1)
    return found


def pairwise_correlation(one: Float[np.ndarray, "R E"], other: Float[np.ndarray, "R Y"]) -> float | None:
    """Correlation of the distances between all pairs of regions in two descriptions of them, of 2048 regions at most.

    Mantel, "The Detection of Disease Clustering and a Generalized Regression Approach", 1967.

    Args:
      one: a row per region.
      other: a row per region.

    Returns:
      Between -1 and 1; None where the distances of either do not vary.
    """
    some = evenly(len(one), _ROWS)
    upper = np.triu_indices(len(some), 1)
    first, second = (_pairwise(rows[some].astype(np.float64))[upper] for rows in (one, other))
    if len(upper[0]) < 2 or min(_variation(first), _variation(second)) < 1e-6:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _variation(distances: np.ndarray) -> float:
    return float(distances.std() / max(distances.mean(), 1e-9))


def _pairwise(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squared_distances(rows, rows), 0.0))


def _live(codec: Codec, latents: np.ndarray) -> np.ndarray:
    """Latents [..., Y] without their padding."""
    return latents[..., codec.mask() > 0]


def _latents(codec: Codec, params: Params) -> Float[np.ndarray, "K R Y"]:
    """Latents of generated parameters, leaves [K, R, ...]."""
    return _live(codec, np.asarray(_encode(codec, params)))


@jax.jit
def _encode(codec: Codec, params: Params) -> jax.Array:
    encode = jax.vmap(lambda one: codec.encode(to_tokens(codec.layout, one)))
    return jax.lax.map(encode, jax.tree.map(jnp.asarray, params))
