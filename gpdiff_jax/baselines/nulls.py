"""In: the zoo and a target's prompts. Out: parameters by rules, the null hypotheses that a generator must beat.

Every rule reads the best vector of each region alone and lets every city weigh the same. The pooled model unchanged is
what the pooled methods are, so it is no rule here; the rule that is trained is in `mlp_hypernetwork`. None needs a
generator.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from gpdiff_jax.baselines.ridge import apply_ridge, choose_penalty, fold_of_region, solve_ridge
from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.errors import check_at_least
from gpdiff_jax.pretraining import best_tokens
from gpdiff_jax.prompts.prompt import Prompts, in_scale, scale_of
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.vectors import squared_distances
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.tokens import TokenLayout, from_tokens, to_tokens

_MOST_DISTANCES = 2**24  # that are held at a time, 128 MiB
_BANDWIDTHS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0, 10.0)  # in units of the usual distance to a neighbour


class _Examples(NamedTuple):
    """What a rule may look at: prompts of the source regions and how their parameters differ from the pooled ones."""

    layout: TokenLayout
    pooled: Float[np.ndarray, " X"]
    differences: Float[np.ndarray, "R X"]  # of the best vectors from the pooled model
    prompts: Float[np.ndarray, "V R E"]  # unscaled
    city_index: Int[np.ndarray, " R"]
    weights: Float[np.ndarray, " R"]  # every city the same total

    def scaled(self, rows: Bool[np.ndarray, " R"] | None = None) -> Float[np.ndarray, "V R E"]:
        """All prompts, in the scale of the given rows."""
        rows = np.ones(len(self.weights), bool) if rows is None else rows
        return in_scale(self.prompts, scale_of(self.prompts[:, rows], self.city_index[rows])).astype(np.float64)

    def scaled_target(self, prompts: Prompts) -> Float[np.ndarray, "Q E"]:
        """A target's prompts, in the scale of all source regions."""
        scale = scale_of(self.prompts, self.city_index)
        return in_scale(np.asarray(prompts.values), scale)[0].astype(np.float64)


class _Fold(NamedTuple):
    """Regions that are left out, and the others; prompts in the scale of the others."""

    left_out: Bool[np.ndarray, " R"]
    rows: Bool[np.ndarray, " R"]
    scaled: Float[np.ndarray, "V R E"]


def zoo_mean(zoo: ParameterZoo, prompts: Prompts) -> Params:
    """The mean of the zoo, every city with the same weight, whatever the prompt.

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], all the same.
    """
    examples = _examples(zoo)
    mean = (examples.weights / examples.weights.sum()) @ examples.differences
    return _params(examples, np.repeat(mean[None], prompts.values.shape[1], axis=0))


def nearest_prompt(zoo: ParameterZoo, prompts: Prompts) -> Params:
    """The parameters of the region that has the nearest scaled prompt among its variants.

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...].
    """
    examples = _examples(zoo)
    nearest, _ = _nearest(examples.scaled_target(prompts), examples.scaled())
    return _params(examples, examples.differences[nearest])


def nearest_plus_noise(zoo: ParameterZoo, prompts: Prompts, *, samples: int, key: Key) -> Params:
    """The parameters of the region with the nearest prompt, plus noise as large as neighbours differ.

    The noise is normal. Its deviation in each parameter is the root mean square, over the source regions, of what
    separates a region from the nearest one by prompt in another city (or in another fifth of the only city), for a
    target's neighbours lie in other cities as well. A generator that is no better than this only perturbs what it
    remembers.

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions.
      samples: K, vectors per region; their forecasts are to be averaged.
      key: random key; a sample's number and a region's id are folded in.

    Returns:
      Parameters of the target regions, leaves [K, R, ...].

    Raises:
      InputError: `samples` is below 1.
    """
    check_at_least(1, {"samples": samples})
    examples = _examples(zoo)
    neighbour = np.arange(len(examples.weights))
    for fold in _folds(examples):
        others = np.flatnonzero(fold.rows)
        neighbour[fold.left_out] = others[_nearest(fold.scaled[0, fold.left_out], fold.scaled[:, fold.rows])[0]]
    nearest, _ = _nearest(examples.scaled_target(prompts), examples.scaled())
    misses = examples.differences - examples.differences[neighbour]
    return _drawn_around(examples, examples.differences[nearest], misses, prompts, samples, key)


def _drawn_around(
    examples: _Examples,
    centre: Float[np.ndarray, "Q X"],
    misses: Float[np.ndarray, "R X"],
    prompts: Prompts,
    samples: int,
    key: Key,
) -> Params:
    """Differences of the target regions plus normal noise, as large in each parameter as a rule misses the sources'."""
    deviation = np.sqrt((examples.weights / examples.weights.sum()) @ np.square(misses)).astype(np.float32)
    noise = np.asarray(_noise(key, samples, centre.shape[1], prompts.region_ids))
    rows = _params(examples, (centre.astype(np.float32) + deviation * noise).reshape(-1, centre.shape[1]))
    return jax.tree.map(lambda leaf: leaf.reshape(samples, -1, *leaf.shape[1:]), rows)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: Key, samples: int, width: int, region_ids: UInt[Array, " R"]) -> Float[Array, "K R X"]:
    def one(sample: jax.Array, region: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), region), (width,))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(jnp.arange(samples), region_ids)


def gaussian_codes(zoo: ParameterZoo, prompts: Prompts, *, directions: int, samples: int, key: Key) -> Params:
    """The pooled model plus normal noise along the directions in which the zoo differs from it, whatever the prompt.

    Along every direction the noise is as large as the zoo's spread, so that it is the normal distribution of the joint
    codes, around the pooled model (`zoo.directions.zoo_directions`).

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions, of which the ids alone are looked at.
      directions: n, how many.
      samples: K.
      key: random key; a sample's number and a region's id are folded in.

    Returns:
      Parameters of the target regions, leaves [K, R, ...].

    Raises:
      InputError: `directions` or `samples` is below 1.
    """
    check_at_least(1, {"directions": directions, "samples": samples})
    axes = zoo_directions(zoo, directions)
    codes = np.asarray(_noise(key, samples, len(jax.tree.leaves(axes)[0]), prompts.region_ids))
    return jax.tree.map(
        lambda start, axis: np.asarray(start) + np.tensordot(codes, np.asarray(axis), axes=1), zoo.pooled, axes
    )


def kernel_average(zoo: ParameterZoo, prompts: Prompts) -> tuple[Params, float]:
    """The average of the zoo around the prompt, by a Gaussian kernel of the distance between scaled prompts.

    Nadaraya, "On Estimating Regression", 1964; Watson, "Smooth Regression Analysis", 1964. A region counts with the
    mean kernel over its variants, times what makes the cities weigh the same. The bandwidth is the one with the lowest
    squared error of the parameters on source cities left out in turn, as the penalty of `ridge_hypernetwork`; a city
    that is left out does not scale the prompts either.

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], and the bandwidth, a distance between scaled prompts.
    """
    examples = _examples(zoo)
    folds = _folds(examples)
    nearest = [_nearest(fold.scaled[0, fold.left_out], fold.scaled[:, fold.rows])[1] for fold in folds]
    usual = float(np.median(np.concatenate(nearest))) if folds else 1.0
    bandwidths = [max(usual, 1e-6) * factor for factor in _BANDWIDTHS]

    def predict(rows: np.ndarray, distance: np.ndarray, bandwidth: float) -> np.ndarray:
        return _kernel_shares(distance, examples.weights[rows], bandwidth) @ examples.differences[rows]

    errors = np.zeros(len(bandwidths))
    for fold in folds:
        left_out = np.flatnonzero(fold.left_out)
        for some, distance in _distance_blocks(fold.scaled[0, left_out], fold.scaled[:, fold.rows]):
            for place, bandwidth in enumerate(bandwidths):
                errors[place] += _squared_error(examples, left_out[some], predict(fold.rows, distance, bandwidth))
    bandwidth, every = bandwidths[int(errors.argmin())], np.ones(len(examples.weights), bool)
    blocks = _distance_blocks(examples.scaled_target(prompts), examples.scaled())
    made = np.concatenate([predict(every, distance, bandwidth) for _, distance in blocks])
    return _params(examples, made), bandwidth


def ridge_hypernetwork(zoo: ParameterZoo, prompts: Prompts) -> tuple[Params, float]:
    """Parameters by ridge regression from the prompt to the difference from the pooled model.

    The penalty is the one with the lowest squared error of the parameters on source cities left out in turn (on source
    regions left out in five folds where there is one city only). Every city weighs the same.

    Args:
      zoo: the parameters of the source regions; the best snapshot of each is used.
      prompts: of the R target regions.

    Returns:
      Parameters of the target regions, leaves [R, ...], and the penalty.
    """
    examples = _examples(zoo)
    penalty = choose_penalty(examples.prompts, examples.differences, examples.city_index)
    solution = solve_ridge(examples.scaled(), examples.differences, examples.weights, penalty)
    return _params(examples, apply_ridge(solution, examples.scaled_target(prompts))), penalty


def ridge_plus_noise(zoo: ParameterZoo, prompts: Prompts, *, samples: int, key: Key) -> Params:
    """Parameters by ridge regression plus noise as large as its residuals, so that K vectors may be averaged.

    The noise is normal. Its deviation in each parameter is the root mean square of what the regression misses on source
    cities left out in turn, at the penalty of `ridge_hypernetwork`.

    Args:
      zoo: the parameters of the source regions.
      prompts: of the R target regions.
      samples: K, vectors per region; their forecasts are to be averaged.
      key: random key; a sample's number and a region's id are folded in.

    Returns:
      Parameters of the target regions, leaves [K, R, ...].

    Raises:
      InputError: `samples` is below 1.
    """
    check_at_least(1, {"samples": samples})
    examples = _examples(zoo)
    penalty = choose_penalty(examples.prompts, examples.differences, examples.city_index)
    misses = np.zeros_like(examples.differences)
    for fold in _folds(examples):
        known = fold.scaled[:, fold.rows], examples.differences[fold.rows], examples.weights[fold.rows]
        predicted = apply_ridge(solve_ridge(*known, penalty), fold.scaled[0, fold.left_out])
        misses[fold.left_out] = examples.differences[fold.left_out] - predicted
    solution = solve_ridge(examples.scaled(), examples.differences, examples.weights, penalty)
    centre = apply_ridge(solution, examples.scaled_target(prompts))
    return _drawn_around(examples, centre, misses, prompts, samples, key)


def _examples(zoo: ParameterZoo) -> _Examples:
    layout = zoo.layout
    pooled = np.asarray(to_tokens(layout, zoo.pooled)).reshape(-1)
    differences = best_tokens(zoo, layout).reshape(zoo.num_regions, -1) - pooled
    prompts, cities = np.asarray(zoo.prompts.values), zoo.city_index
    return _Examples(layout, pooled, differences, prompts, cities, city_weights(cities))


def _params(examples: _Examples, differences: Float[np.ndarray, "Q X"]) -> Params:
    """Parameters, leaves [Q, ...], that differ so from the pooled model."""
    tokens = (examples.pooled + differences).reshape(-1, examples.layout.num_tokens, examples.layout.width)
    return _read_tokens(examples.layout, tokens.astype(np.float32))


@partial(jax.jit, static_argnums=0)
def _read_tokens(layout: TokenLayout, tokens: Float[Array, "Q L W"]) -> Params:
    return jax.vmap(partial(from_tokens, layout))(tokens)


def _folds(examples: _Examples) -> list[_Fold]:
    """Every city left out in turn, or fifths of the only one; of a single region, none."""
    number = fold_of_region(examples.city_index)
    pairs = [(number == index, number != index) for index in np.unique(number)]
    return [_Fold(left_out, rows, examples.scaled(rows)) for left_out, rows in pairs if rows.any()]


def _squared_error(examples: _Examples, rows: np.ndarray, predicted: Float[np.ndarray, "Q X"]) -> float:
    """Squared error of the parameters of some regions, every city with the same weight."""
    squared = np.square(predicted - examples.differences[rows]).sum(axis=1)
    return float((squared * examples.weights[rows]).sum())


def _distance_blocks(
    one: Float[np.ndarray, "Q E"], other: Float[np.ndarray, "V R E"]
) -> Iterator[tuple[slice, Float[np.ndarray, "V q R"]]]:
    """Euclidean distances of prompts from all variants of other ones, of some q prompts at a time.

    All at once they would be as large as variants times regions squared.
    """
    at_once = max(1, _MOST_DISTANCES // (other.shape[0] * other.shape[1]))
    for first in range(0, len(one), at_once):
        some = slice(first, first + at_once)
        yield some, np.stack([np.sqrt(np.maximum(squared_distances(one[some], variant), 0.0)) for variant in other])


def _nearest(
    one: Float[np.ndarray, "Q E"], other: Float[np.ndarray, "V R E"]
) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """The region with the nearest prompt among its variants, and how far that is."""
    regions, far = [], []
    for _, distance in _distance_blocks(one, other):
        least = distance.min(axis=0)
        regions.append(least.argmin(axis=1))
        far.append(least.min(axis=1))
    return np.concatenate(regions), np.concatenate(far)


def _kernel_shares(
    distance: Float[np.ndarray, "V Q R"], weights: Float[np.ndarray, " R"], bandwidth: float
) -> Float[np.ndarray, "Q R"]:
    """What share every known region has in the average around every prompt; rows sum to one."""
    exponent = -0.5 * np.square(distance / bandwidth)
    # Far from everything all kernels underflow; only their ratios matter.
    kernel = np.exp(exponent - exponent.max(axis=(0, 2), keepdims=True)).mean(axis=0) * weights
    return kernel / kernel.sum(axis=1, keepdims=True)
