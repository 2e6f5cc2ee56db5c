"""In: the zoo and a target's prompts. Out: parameters by rules, the null hypotheses that a generator must beat."""

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.hypernetwork import Hypernetwork, best_tokens
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, scale_prompts
from gpdiff_jax.ridge import apply_ridge, choose_penalty, city_weights, solve_ridge
from gpdiff_jax.tokens import from_tokens
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo import ParameterZoo


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
    penalty = choose_penalty(told, differences, zoo.city_index)
    solution = solve_ridge(told, differences, city_weights(zoo.city_index), penalty)
    predicted = base + apply_ridge(solution, np.asarray(scale_prompts(prompts, scaler), np.float64)[0])
    tokens = jnp.asarray(predicted.reshape(-1, layout.num_tokens, layout.width), jnp.float32)
    return jax.vmap(lambda one: from_tokens(layout, one))(tokens), penalty
