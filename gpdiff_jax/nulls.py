"""In: the zoo and a target's prompts. Out: parameters by rules, the null hypotheses that a generator must beat."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gpdiff_jax.hypernetwork import Hypernetwork, best_tokens
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, scale_prompts
from gpdiff_jax.tokens import from_tokens
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo import ParameterZoo

_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


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
    layout = hypernetwork.codec.layout
    base = np.asarray(hypernetwork.codec.base).reshape(-1)
    differences = best_tokens(zoo, layout).reshape(zoo.num_regions, -1) - base
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    told = np.asarray(scale_prompts(zoo.prompts, scaler), np.float64)
    weights = 1.0 / np.bincount(zoo.city_index)[zoo.city_index]
    cities = np.unique(zoo.city_index)
    fold = zoo.city_index if len(cities) > 1 else np.arange(zoo.num_regions) % 5
    errors = {}
    for penalty in _PENALTIES:
        errors[penalty] = 0.0
        for left_out in np.unique(fold):
            rows = fold != left_out
            if not rows.any():
                continue
            solution = _solve(told[:, rows], differences[rows], weights[rows], penalty)
            error = np.square(_predict(solution, told[0, ~rows]) - differences[~rows]).sum(axis=1)
            errors[penalty] += float((error * weights[~rows]).sum())
    penalty = min(errors, key=lambda key: errors[key])
    solution = _solve(told, differences, weights, penalty)
    predicted = base + _predict(solution, np.asarray(scale_prompts(prompts, scaler), np.float64)[0])
    tokens = jnp.asarray(predicted.reshape(-1, layout.num_tokens, layout.width), jnp.float32)
    return jax.vmap(lambda one: from_tokens(layout, one))(tokens), penalty


def _solve(
    told: Float[np.ndarray, "V R E"], wanted: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"], penalty: float
) -> Float[np.ndarray, "E1 X"]:
    """Weighted ridge regression with a free intercept; every variant of a prompt points at the same parameters."""
    variants, regions, width = told.shape
    features = np.concatenate([told, np.ones((variants, regions, 1))], axis=2)
    share = weights / (weights.sum() * variants)
    gram = np.einsum("vre,vrf,r->ef", features, features, share, optimize=True)
    gram[np.arange(width), np.arange(width)] += penalty
    return np.linalg.solve(gram, np.einsum("vre,r->er", features, share) @ wanted)


def _predict(solution: Float[np.ndarray, "E1 X"], told: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "R X"]:
    return told @ solution[:-1] + solution[-1]
