"""In: the zoo and a target's prompts. Out: parameters by rules, the null hypotheses that a generator must beat.

Every rule reads the best vector of each region alone and lets every city weigh the same. The base unchanged is what the
pooled methods are, so it is no rule here; the rule that is trained is in `mlp_hypernetwork`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.pretraining import best_tokens
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler, fit_prompt_scaler, scale_prompts
from gpdiff_jax.ridge import apply_ridge, choose_penalty, city_weights, left_out_in_turn, solve_ridge
from gpdiff_jax.tokens import TokenLayout, from_tokens
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo import ParameterZoo

_BANDWIDTHS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0, 10.0)  # in units of the usual distance to a neighbour


class _Known(NamedTuple):
    """What a rule may look at."""

    layout: TokenLayout
    base: Float[np.ndarray, " X"]
    differences: Float[np.ndarray, "R X"]  # of the best vectors from the base
    scaler: PromptScaler
    told: Float[np.ndarray, "V R E"]  # scaled prompts
    weights: Float[np.ndarray, " R"]  # every city the same total
    fold: Int[np.ndarray, " R"]  # what is left out in turn: a city, or a fifth of the only one


def zoo_mean(zoo: ParameterZoo, hypernetwork: Hypernetwork, prompts: Prompts) -> Params:
    """The mean of the zoo, every city with the same weight, whatever the prompt.

    Args:
      zoo: the parameters of the source regions.
      hypernetwork: lends the layout of its tokens.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], all the same.
    """
    known = _known(zoo, hypernetwork)
    mean = (known.weights / known.weights.sum()) @ known.differences
    return _params(known, np.repeat(mean[None], prompts.values.shape[1], axis=0))


def nearest_prompt(zoo: ParameterZoo, hypernetwork: Hypernetwork, prompts: Prompts) -> Params:
    """The parameters of the region that has the nearest scaled prompt among its variants.

    Args:
      zoo: the parameters of the source regions.
      hypernetwork: lends the layout of its tokens.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...].
    """
    known = _known(zoo, hypernetwork)
    return _params(known, known.differences[_nearest(_asked(known, prompts), known.told)])


def nearest_plus_noise(
    zoo: ParameterZoo, hypernetwork: Hypernetwork, prompts: Prompts, *, samples: int, key: Key
) -> Params:
    """The parameters of the region with the nearest prompt, plus noise as large as neighbours differ.

    The noise is normal. Its deviation in each parameter is the root mean square, over the source regions, of what
    separates a region from the nearest one by prompt in another city (or in another fifth of the only city), for a
    target's neighbours lie in other cities as well. A generator that is no better than this only perturbs what it
    remembers.

    Args:
      zoo: the parameters of the source regions.
      hypernetwork: lends the layout of its tokens.
      prompts: of the R target regions.
      samples: K, vectors per region; their forecasts are to be averaged.
      key: random key; a sample's number and a region's id are folded in.

    Returns:
      Parameters of the target regions, leaves [K, R, ...].

    Raises:
      InputError: `samples` is below 1.
    """
    if samples < 1:
        raise InputError(f"`samples` must be at least 1, got {samples}")
    known = _known(zoo, hypernetwork)
    neighbour = np.arange(len(known.fold))
    for left_out, rows in _turns(known):
        others = np.flatnonzero(rows)
        neighbour[left_out] = others[_nearest(known.told[0, left_out], known.told[:, rows])]
    squared = np.square(known.differences - known.differences[neighbour])
    deviation = np.sqrt((known.weights / known.weights.sum()) @ squared).astype(np.float32)
    near = known.differences[_nearest(_asked(known, prompts), known.told)].astype(np.float32)
    noise = np.asarray(_noise(key, samples, near.shape[1], prompts.region_ids))
    rows = _params(known, (near + deviation * noise).reshape(-1, near.shape[1]))
    return jax.tree.map(lambda leaf: leaf.reshape(samples, -1, *leaf.shape[1:]), rows)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: Key, samples: int, width: int, region_ids: UInt[Array, " R"]) -> Float[Array, "K R X"]:
    def one(sample: jax.Array, region: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), region), (width,))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(jnp.arange(samples), region_ids)


def kernel_average(zoo: ParameterZoo, hypernetwork: Hypernetwork, prompts: Prompts) -> tuple[Params, float]:
    """The average of the zoo around the prompt, by a Gaussian kernel of the distance between scaled prompts.

    Nadaraya, "On Estimating Regression", 1964; Watson, "Smooth Regression Analysis", 1964. A region counts with the
    mean kernel over its variants, times what makes the cities weigh the same. The bandwidth is the one with the lowest
    squared error of the parameters on source cities left out in turn, as the penalty of `ridge_hypernetwork`.

    Args:
      zoo: the parameters of the source regions.
      hypernetwork: lends the layout of its tokens.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], and the bandwidth, a distance between scaled prompts.
    """
    known = _known(zoo, hypernetwork)
    turns = _turns(known)
    distances = [_distances(known.told[0, left_out], known.told[:, rows]) for left_out, rows in turns]
    usual = float(np.median(np.concatenate([distance.min(axis=(0, 2)) for distance in distances]))) if turns else 1.0

    def predict(rows: np.ndarray, distance: np.ndarray, bandwidth: float) -> np.ndarray:
        return _kernel_shares(distance, known.weights[rows], bandwidth) @ known.differences[rows]

    def error(bandwidth: float) -> float:
        total = 0.0
        for (left_out, rows), distance in zip(turns, distances, strict=True):
            total += _left_out_error(known, left_out, predict(rows, distance, bandwidth))
        return total

    bandwidth = min([max(usual, 1e-6) * factor for factor in _BANDWIDTHS], key=error)
    asked = _distances(_asked(known, prompts), known.told)
    return _params(known, predict(np.ones(len(known.fold), bool), asked, bandwidth)), bandwidth


def ridge_hypernetwork(zoo: ParameterZoo, hypernetwork: Hypernetwork, prompts: Prompts) -> tuple[Params, float]:
    """Parameters by ridge regression from the prompt to the difference from the base.

    The penalty is the one with the lowest squared error of the parameters on source cities left out in turn (on source
    regions left out in five turns where there is one city only). Every city weighs the same.

    Args:
      zoo: the parameters of the source regions; the best snapshot of each is used.
      hypernetwork: lends the layout of its tokens.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], and the penalty.
    """
    known = _known(zoo, hypernetwork)
    penalty = choose_penalty(known.told, known.differences, zoo.city_index)
    solution = solve_ridge(known.told, known.differences, known.weights, penalty)
    return _params(known, apply_ridge(solution, _asked(known, prompts))), penalty


def _known(zoo: ParameterZoo, hypernetwork: Hypernetwork) -> _Known:
    layout = hypernetwork.codec.layout
    base = np.asarray(hypernetwork.codec.base).reshape(-1)
    differences = best_tokens(zoo, layout).reshape(zoo.num_regions, -1) - base
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    told = np.asarray(scale_prompts(zoo.prompts, scaler), np.float64)
    weights, fold = city_weights(zoo.city_index), left_out_in_turn(zoo.city_index)
    return _Known(layout, base, differences, scaler, told, weights, fold)


def _asked(known: _Known, prompts: Prompts) -> Float[np.ndarray, "Q E"]:
    return np.asarray(scale_prompts(prompts, known.scaler), np.float64)[0]


def _params(known: _Known, differences: Float[np.ndarray, "Q X"]) -> Params:
    """Parameters, leaves [Q, ...], that differ so from the base."""
    tokens = (known.base + differences).reshape(-1, known.layout.num_tokens, known.layout.width)
    return _read_tokens(known.layout, tokens.astype(np.float32))


@partial(jax.jit, static_argnums=0)
def _read_tokens(layout: TokenLayout, tokens: Float[Array, "Q L W"]) -> Params:
    return jax.vmap(partial(from_tokens, layout))(tokens)


def _turns(known: _Known) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which regions are left out and which are known, in turn; both bool [R]. Of a single region, no turn."""
    turns = [(known.fold == index, known.fold != index) for index in np.unique(known.fold)]
    return [(left_out, rows) for left_out, rows in turns if rows.any()]


def _left_out_error(known: _Known, left_out: np.ndarray, predicted: Float[np.ndarray, "Q X"]) -> float:
    """Squared error of the parameters of regions that were left out, every city with the same weight."""
    squared = np.square(predicted - known.differences[left_out]).sum(axis=1)
    return float((squared * known.weights[left_out]).sum())


def _distances(asked: Float[np.ndarray, "Q E"], told: Float[np.ndarray, "V R E"]) -> Float[np.ndarray, "V Q R"]:
    """Euclidean distances of prompts from all variants of the known ones."""
    return np.stack([np.sqrt(np.maximum(_squared_distances(asked, variant), 0.0)) for variant in told])


def _squared_distances(one: Float[np.ndarray, "Q E"], other: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "Q R"]:
    return np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1)[None, :] - 2.0 * one @ other.T


def _nearest(asked: Float[np.ndarray, "Q E"], told: Float[np.ndarray, "V R E"]) -> Int[np.ndarray, " Q"]:
    return _distances(asked, told).min(axis=0).argmin(axis=1)


def _kernel_shares(
    distance: Float[np.ndarray, "V Q R"], weights: Float[np.ndarray, " R"], bandwidth: float
) -> Float[np.ndarray, "Q R"]:
    """What share every known region has in the average around every prompt; rows sum to one."""
    exponent = -0.5 * np.square(distance / bandwidth)
    # Far from everything all kernels underflow; only their ratios matter.
    kernel = np.exp(exponent - exponent.max(axis=(0, 2), keepdims=True)).mean(axis=0) * weights
    return kernel / kernel.sum(axis=1, keepdims=True)
