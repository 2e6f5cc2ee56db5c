"""In: a zoo with its sources and prompts. Out: how well each part of the prompt predicts a left-out city's parameters.

A linear rule makes this much of a prompt: a generator has to reach it. Every source city is left out in turn; the
components of the parameters, the scale of the prompts, the regression and its penalty come from the other cities. Not
so the pooled model and the encoders of the temporal and the spatial part: they were trained on all source cities, the
left-out one too, the encoders without any parameters to predict.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from gpdiff_jax.baselines.ridge import PENALTIES, apply_ridge, choose_penalty, solve_ridge
from gpdiff_jax.data.sources import SourceRegion, Sources, city_weights
from gpdiff_jax.errors import InputError, check_at_least, check_types
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.prompts.encoders import columns_of_parts
from gpdiff_jax.prompts.prompt import in_scale, scale_of
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.codec import principal_directions
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.pooled import validation_error

ALL_PARTS = "all"
_PENALTIES = (*PENALTIES, 30.0, 100.0, 300.0, 1000.0)  # the largest leave little but the mean


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """How many components are predicted: enough for a share of the variance of the parameters, but at most so many."""

    variance: float = 0.9
    most_components: int = 32

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.variance <= 1:
            raise InputError(f"`variance` must be above 0 and at most 1, got {self.variance}")
        check_at_least(1, {"most_components": self.most_components})


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What one predictor makes of the regions of one left-out city.

    `r2` is the share of the variance of the components among the city's regions that is explained, about their true
    mean; it is below 0 where the prediction is worse than that mean, which no predictor knows. `r2_within` leaves the
    means of prediction and truth out: it says how well regions of the city are told apart. Both sum over components, so
    that each weighs by its variance, and are NaN where the city's regions do not differ.
    """

    city: str
    predictor: str
    r2: float
    r2_within: float
    mae: float  # of the forecasts on validation windows, scaled, mean over the city's regions
    penalty: float | None = None


@dataclasses.dataclass(frozen=True)
class LeftOutCity:
    """A left-out city, and the components of the others."""

    city: str
    regions: int
    components: int
    variance: float  # share of the other cities' variance that the components hold
    variance_here: float  # share of this city's squared differences from the others' mean that they hold


@dataclasses.dataclass(frozen=True)
class ParameterPrediction:
    """Results: one entry per source city, and one per city and predictor."""

    cities: tuple[LeftOutCity, ...]
    predicted: tuple[Predicted, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Space:
    """Leading components of the differences from the pooled model, fitted on some regions."""

    mean: Float[np.ndarray, " X"]
    directions: Float[np.ndarray, "K X"]  # of unit length
    variance: float

    def components(self, differences: Float[np.ndarray, "R X"]) -> Float[np.ndarray, "R K"]:
        return (differences - self.mean) @ self.directions.T

    def differences(self, components: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R X"]:
        return self.mean + components @ self.directions


def predict_parameters(
    zoo: ParameterZoo,
    config: PredictionConfig = PredictionConfig(),
    *,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> ParameterPrediction:
    """Predicts the parameters of every source city from its prompts, by what the other cities show.

    From each part of the prompt, and from all of them, ridge regression predicts the leading principal components of
    the differences from the pooled model (best snapshot of every region). Its penalty is chosen by leaving out one of
    the remaining cities in turn. A left-out region's prompt is that of its first window. Every city weighs the same.

    Beside them stand "pooled_unchanged", "zoo_mean" of the other cities, "projection" of a region's own parameters on
    the components, nearer to which no prediction of components can come (in parameters; errors need not follow), and
    its "own_parameters".

    Args:
      zoo: with its sources attached; of its prompts, the names say which columns belong to which part.
      config: the number of components.
      progress: called with (left-out cities done, metrics).

    Returns:
      Shares of variance and errors, city by city.

    Raises:
      InputError: the zoo has no sources, or those of one city only.
    """
    sources, cities = zoo.sources, np.unique(zoo.city_index)
    if sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    if len(cities) < 2:
        raise InputError(f"a city is left out in turn, but the zoo holds {len(cities)} city; name two sources or more")
    differences, parts = _differences(zoo), parts_of_prompts(zoo.prompts.names)
    unscaled = np.asarray(zoo.prompts.values)
    spaces: list[_Space] = []
    made: dict[str, list[np.ndarray]] = {}  # per predictor, the components of every left-out city
    penalties: dict[tuple[int, str], float] = {}
    found = []
    for done, city in enumerate(cities, start=1):
        rows = zoo.city_index == city
        known = zoo.city_index[~rows]
        space = _fit_space(differences[~rows], city_weights(known), config)
        components = space.components(differences)
        scaled = in_scale(unscaled, scale_of(unscaled[:, ~rows], known)).astype(np.float64)
        here = {"pooled_unchanged": space.components(np.zeros((rows.sum(), differences.shape[1])))}
        here["zoo_mean"] = np.zeros_like(components[rows])
        for part, columns in parts.items():
            own = unscaled[:, ~rows][:, :, columns]
            penalties[city, part] = choose_penalty(own, components[~rows], known, _PENALTIES)
            weights, penalty = city_weights(known), penalties[city, part]
            solution = solve_ridge(scaled[:, ~rows][:, :, columns], components[~rows], weights, penalty)
            here[part] = apply_ridge(solution, scaled[0, rows][:, columns])
        here["projection"] = here["own_parameters"] = components[rows]
        spaces.append(space)
        for name, values in here.items():
            made.setdefault(name, []).append(values)
        whole = float(np.square(differences[rows] - space.mean).sum())
        held = float(np.square(components[rows]).sum()) / whole if whole > 0 else float("nan")
        name = zoo.names[int(np.argmax(rows))].split("/", 1)[0]
        found.append(LeftOutCity(name, int(rows.sum()), len(space.directions), space.variance, held))
        if progress is not None:
            progress(done, {"components": len(space.directions)})
    model = make_model(zoo.model, sources.sizes)
    errors = {}
    for name, components in made.items():
        # The pooled model and a region's own parameters lie outside the components; all else is made of them.
        vectors = differences if name == "own_parameters" else np.zeros_like(differences, np.float32)
        for city, space, values in zip(cities, spaces, components, strict=True):
            if name not in ("pooled_unchanged", "own_parameters"):
                vectors[zoo.city_index == city] = space.differences(values)
        errors[name] = _errors(model, zoo, sources, vectors)
    predicted = []
    for index, (city, facts) in enumerate(zip(cities, found, strict=True)):
        for name in made:
            shares = explained_variance(made["own_parameters"][index], made[name][index])
            own = errors[name][zoo.city_index == city]
            mae = float(np.nanmean(own)) if np.isfinite(own).any() else float("nan")
            predicted.append(Predicted(facts.city, name, *shares, mae, penalties.get((city, name))))
    return ParameterPrediction(tuple(found), tuple(predicted))


def parts_of_prompts(names: Sequence[str]) -> dict[str, Int[np.ndarray, " X"]]:
    """The columns of every part of a prompt, and last, where there are several, of all together."""
    parts = columns_of_parts(names)
    return parts if len(parts) == 1 else {**parts, ALL_PARTS: np.arange(len(names))}


def explained_variance(true: Float[np.ndarray, "R K"], made: Float[np.ndarray, "R K"]) -> tuple[float, float]:
    """The two shares of `Predicted`: about the true mean, and with both means left out; NaN where nothing varies."""
    total = np.square(true - true.mean(axis=0)).sum()
    if total <= 1e-12 * max(float(np.square(true).sum()), 1e-30):
        return float("nan"), float("nan")
    error = made - true
    return float(1 - np.square(error).sum() / total), float(1 - np.square(error - error.mean(axis=0)).sum() / total)


def _differences(zoo: ParameterZoo) -> Float[np.ndarray, "R X"]:
    """Best vector of every region, flat, less the pooled model."""
    pooled = np.asarray(ravel_pytree(jax.tree.map(jnp.asarray, zoo.pooled))[0])
    vectors = np.zeros((zoo.num_regions, len(pooled)), np.float32)
    for rows, params in zoo.vectors.parts():
        leaves = [np.asarray(leaf)[:, 0].reshape(len(rows), -1) for leaf in jax.tree.leaves(params)]
        vectors[rows] = np.concatenate(leaves, axis=1)
    return vectors.astype(np.float64) - pooled


def _fit_space(
    differences: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"], config: PredictionConfig
) -> _Space:
    share = weights / weights.sum()
    mean = share @ differences
    rows = np.sqrt(share)[:, None] * (differences - mean)
    directions = principal_directions(rows, config.most_components)
    variance = np.square(directions).sum(axis=1) / max(float(np.square(rows).sum()), 1e-30)
    reached = np.cumsum(variance)
    count = min(int(np.searchsorted(reached, config.variance * (1 - 1e-9))) + 1, len(directions))
    kept = directions[:count]
    unit = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-30)
    return _Space(mean, unit, float(reached[count - 1]))


def _errors(
    model: Model, zoo: ParameterZoo, sources: Sources, differences: Float[np.ndarray, "R X"]
) -> Float[np.ndarray, " R"]:
    """Validation errors of all regions with the pooled model plus these differences as parameters."""
    pooled, unravel = ravel_pytree(jax.tree.map(jnp.asarray, zoo.pooled))
    params = jax.vmap(unravel)(pooled[None] + jnp.asarray(differences, jnp.float32))
    return np.asarray(_validation_errors(model, params, sources))


@partial(jax.jit, static_argnums=0)
def _validation_errors(model: Model, params: Params, sources: Sources) -> Float[Array, " R"]:
    def measure(one: tuple[Params, SourceRegion]) -> Float[Array, ""]:
        return validation_error(model, one[0], sources.bank, sources.train, one[1])

    return jax.lax.map(measure, (params, sources.regions))
