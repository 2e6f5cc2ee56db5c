"""In: a model of any kind. Out: the same model, made to forecast departures from what is expected.

A reading is expected at the profile, within the deviation e (`cities.expectation`), and the forecast is profile + e f,
where f is what the model says. It is done here, around the model, so that no model knows of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.models.protocol import Model, ModelSizes, example_inputs
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.typing import Key, Params, RegionGraph

# Where the expectation of a step stands among its covariates: they are the last four.
OTHER_KIND, LOG_DEVIATION, PROFILE, SAME_KIND = -4, -3, -2, -1
_TOLERANCE = 1e-4


def forecast_anomalies(model: Model, sizes: ModelSizes) -> Model:
    """Makes a model of anomalies of a model of readings.

    Args:
      model: its forecast is taken as f.
      sizes: whose covariates end with the logarithm of e, the profile and the share of days of the same kind.

    Returns:
      The model that forecasts profile + e f. Its initial f is 0 at every input, if some of the model's parameters
      enter its forecast linearly and together, as those of a last layer do: they begin at 0 and nothing else changes.
    """

    def around(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def apply_around(params: Params, graph: RegionGraph, history: jax.Array, covariates: jax.Array) -> jax.Array:
            profile, deviation = profile_and_deviation(covariates[sizes.history :])
            return profile[..., None] + deviation[..., None] * apply(params, graph, history, covariates)

        return apply_around

    def init(key: Key, graph: RegionGraph, history: jax.Array, covariates: jax.Array) -> Params:
        leaves, tree = jax.tree.flatten(model.init(key, graph, history, covariates))
        with jax.ensure_compile_time_eval():
            last = linear_leaves(model, sizes)
        return tree.unflatten([jnp.zeros_like(leaf) if at else leaf for leaf, at in zip(leaves, last, strict=True)])

    apply_batch = None if model.apply_batch is None else around(model.apply_batch)
    # Where it begins at 0 is found by computing, which takes seconds, and says nothing of shapes.
    return model._replace(
        init=init, apply=around(model.apply), apply_batch=apply_batch, shapes=model.shapes or model.init
    )


def profile_and_deviation(covariates: Float[Array, "*X F"]) -> tuple[Float[Array, "*X"], Float[Array, "*X"]]:
    """What is expected at the steps of some covariates, scaled: the profile, and the deviation e from it."""
    return covariates[..., PROFILE], jnp.exp(covariates[..., LOG_DEVIATION])


def damp_anomalies(
    forecast: Float[Array, "B P"], covariates: Float[Array, "B HP F"], damping: tuple[float, float]
) -> Float[Array, "B P"]:
    """Draws forecasts towards the profile on kinds of day that it was made of.

    Args:
      forecast: scaled.
      covariates: of the windows, which end as `forecast_anomalies` says.
      damping: the share of the anomaly that is kept at the first and the last step; see `DataConfig`.

    Returns:
      Forecasts; those on a kind of day that was not seen are as they were.
    """
    horizon = forecast.shape[1]
    ahead = covariates[:, -horizon:]
    lost = 1.0 - jnp.linspace(*damping, horizon, dtype=forecast.dtype)
    kept = 1.0 - ahead[..., SAME_KIND] * lost[None, :]
    return ahead[..., PROFILE] + kept * (forecast - ahead[..., PROFILE])


@bounded_cache(64)
def linear_leaves(model: Model, sizes: ModelSizes) -> tuple[bool, ...]:
    """Which leaves of a model's parameters can begin at 0 so that its forecast does, and still get a gradient.

    They are found by looking: at random inputs, the forecast has to be linear in all of them together and 0 where they
    are. Where no such set is, as in a product of matrices, one leaf alone may serve.

    Args:
      model: the forecaster.
      sizes: H, P, I, F.

    Returns:
      True for every such leaf, in the pytree's order; all False where the forecast can't be brought to 0 so.
    """
    rng = np.random.default_rng(0)
    graph, *inputs = example_inputs(sizes)
    seen = jax.device_put((graph, *(rng.normal(size=x.shape).astype(np.float32) for x in inputs)))
    leaves, tree = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0), *seen))

    @jax.jit
    def forecast(leaves: list[jax.Array], factors: list[jax.Array], seen: tuple) -> jax.Array:
        params = tree.unflatten([leaf * factor for leaf, factor in zip(leaves, factors, strict=True)])
        return model.apply(params, *seen)

    def scaled(of: np.ndarray, factor: float) -> np.ndarray:
        factors = [np.float32(factor if at else 1.0) for at in of]
        return np.asarray(forecast(leaves, jax.device_put(factors), seen))

    none, alone = np.zeros(len(leaves), bool), np.eye(len(leaves), dtype=bool)
    whole = scaled(none, 1.0)
    atol = _TOLERANCE * np.abs(whole).max()

    def linear(of: np.ndarray) -> bool:
        return bool(np.allclose(scaled(of, 2.0) - whole, whole - scaled(of, 0.0), atol=atol, rtol=0))

    candidates = np.asarray([linear(one) for one in alone])
    for of in (candidates, *alone[candidates][::-1]):
        if linear(of) and np.abs(scaled(of, 0.0)).max() <= atol:
            return tuple(bool(at) for at in of)
    return (False,) * len(leaves)
