"""In: source regions. Out: gradient-boosted trees per horizon step, the rival that a practitioner would take.

LightGBM (Ke et al., "LightGBM: A Highly Efficient Gradient Boosting Decision Tree", NeurIPS 2017), which is an extra of
this package, on the windows, the inputs and the loss of the pooled model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.sources import SourceRegion, Sources, city_weights
from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.data.windows import draw_windows
from gpdiff_jax.errors import InputError, check_above_zero, named
from gpdiff_jax.models.anomaly import profile_and_deviation
from gpdiff_jax.models.graphs import centre_weights
from gpdiff_jax.models.protocol import ModelSizes, Window
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.transfer.damped import damped, in_data_units
from gpdiff_jax.typing import Key, RegionGraph
from gpdiff_jax.zoo.pooled import validation_windows

_READING, _OBSERVED, _ANOMALY = 0, 1, 2  # among the inputs of a node, see `Window`
INSTALL = 'python -m pip install "gpdiff_jax[trees]"'


@dataclasses.dataclass(frozen=True)
class BoostedTreesConfig:
    """At most `trees` trees per horizon step, as many as validate best in the sources, on `windows` windows a region.

    Training of a step ends when `patience` more trees have not lowered its validation error.
    """

    trees: int = 400
    leaves: int = 31
    learning_rate: float = 0.05
    windows: int = 64
    patience: int = 40

    def __post_init__(self) -> None:
        check_above_zero(named(self))


@dataclasses.dataclass(frozen=True)
class BoostedTrees:
    """One ensemble for every horizon step, as LightGBM writes it."""

    texts: tuple[str, ...]
    sizes: ModelSizes

    def arrays(self) -> dict[str, np.ndarray]:
        """The ensembles as arrays, for `storage.save_arrays`."""
        return {f"step_{step}": np.frombuffer(text.encode(), np.uint8) for step, text in enumerate(self.texts, start=1)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], sizes: ModelSizes) -> "BoostedTrees":
        """What `arrays` was made of."""
        steps = range(1, len(arrays) + 1)
        return cls(tuple(np.asarray(arrays[f"step_{step}"]).tobytes().decode() for step in steps), sizes)


@bounded_cache(1)
def has_lightgbm() -> bool:
    """Whether LightGBM can be used here: installed, with the system's libraries that it needs."""
    try:
        import_lightgbm()
    except InputError:
        return False
    return True


def boosted_trees(
    sources: Sources,
    config: BoostedTreesConfig,
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> BoostedTrees:
    """Fits trees on windows of all source regions, every city with equal weight.

    They see what models see: of the centre all inputs, of its neighbours the mean anomaly or reading, by the weights of
    their edges, and the covariates of the step that is forecast. With a profile they forecast the anomaly in units of
    e, weighted by e, so that the loss is the absolute error of the reading; else the reading. Their number is chosen on
    the sources' validation windows, as the steps of the pooled model are; without a reading there, all are taken.

    Args:
      sources: the source regions.
      config: sizes.
      key: random key of the windows.
      progress: called with (steps of the horizon done, metrics).

    Returns:
      The trees.

    Raises:
      InputError: LightGBM cannot be imported, or no window has a reading at some step.
    """
    lightgbm = import_lightgbm()
    share = city_weights(np.asarray(sources.city_index)).astype(np.float32)
    train, held_out = jax.device_get((_training_rows(sources, key, config.windows), _validation_rows(sources)))
    settings = {
        "objective": "regression_l1",
        "num_leaves": config.leaves,
        "learning_rate": config.learning_rate,
        "deterministic": True,
        "force_row_wise": True,
        "seed": 0,  # nothing is drawn by it
        "verbosity": -1,
    }
    texts = []
    for step in range(sources.sizes.horizon):
        inputs, wanted, weight = _observed_rows(train, share, step)
        if len(wanted) == 0:
            raise InputError(f"the sources have no reading at step {step + 1} for `boosted_trees`; leave it out")
        data, how = lightgbm.Dataset(inputs, wanted, weight=weight), {}
        inputs, wanted, weight = _observed_rows(held_out, share, step)
        if len(wanted):  # else all trees are taken
            how["valid_sets"] = [lightgbm.Dataset(inputs, wanted, weight=weight, reference=data)]
            how["callbacks"] = [lightgbm.early_stopping(config.patience, verbose=False)]
        fitted = lightgbm.train(settings, data, config.trees, **how)
        texts.append(fitted.model_to_string())
        if progress is not None:
            errors = fitted.best_score.get("valid_0", {})
            known = {"validation_loss": float(errors["l1"])} if errors else {}
            progress(step + 1, {"trees": fitted.best_iteration or fitted.current_iteration(), **known})
    return BoostedTrees(tuple(texts), sources.sizes)


def forecast_trees(trees: BoostedTrees, target: Target) -> Float[np.ndarray, "S R P"]:
    """Forecasts of the test span, in data units; with a profile damped as every method's are (`DataConfig.damping`).

    Args:
      trees: fitted on sources with windows of the same sizes.
      target: the city.

    Returns:
      float32; none below the target's floor.

    Raises:
      InputError: LightGBM cannot be imported, or the sizes differ.
    """
    if trees.sizes != target.sizes:
        raise InputError(f"the trees were fitted to {trees.sizes}, and the target's windows are {target.sizes}")
    lightgbm = import_lightgbm()
    boosters = [lightgbm.Booster(model_str=text) for text in trees.texts]
    made = []
    for region in np.arange(target.num_regions, dtype=np.int32):
        node, windows, seen = _target_rows(target, region)
        inputs = jax.device_get(seen)
        found = [booster.predict(inputs.inputs(step)) for step, booster in enumerate(boosters)]
        made.append(np.asarray(_to_forecast(target, node, windows, np.stack(found, axis=1).astype(np.float32))))
    return np.stack(made, axis=1)


class _Seen(NamedTuple):
    """What trees see of X windows, and what they are to say, on leading axes."""

    past: Float[Array | np.ndarray, "*X K"]  # NaN where missing
    ahead: Float[Array | np.ndarray, "*X P F"]
    wanted: Float[Array | np.ndarray, "*X P"]
    weight: Float[Array | np.ndarray, "*X P"]  # 0 where missing

    def inputs(self, step: int) -> np.ndarray:
        """[X, K + F], the inputs of one horizon step."""
        return np.concatenate([self.past, self.ahead[..., step, :]], axis=-1)


def _see(graph: RegionGraph, windows: Window) -> _Seen:
    """The inputs of a batch of windows of one region."""
    history, anomaly = windows.history, windows.history.shape[-1] > _OBSERVED + 1
    observed = history[..., _OBSERVED]
    missing = jnp.where(observed > 0, 0.0, jnp.nan).astype(history.dtype)
    past = [history[:, 0, :, _READING] + missing[:, 0]]
    # The mean over the neighbours that were read.
    weights = centre_weights(graph)[None, :, None] * observed
    shown = history[..., _ANOMALY if anomaly else _READING]
    past.append((weights * shown).sum(axis=1) / weights.sum(axis=1))
    if anomaly:
        past += [history[:, 0, :, _ANOMALY] + missing[:, 0], history[:, 0, :, 3], history[:, 0, :, 4]]
    ahead = windows.covariates[:, history.shape[2] :]
    wanted, weight = windows.target, windows.mask
    if anomaly:
        profile, deviation = profile_and_deviation(ahead)
        wanted, weight = (wanted - profile) / deviation, weight * deviation
    return _Seen(jnp.concatenate(past, axis=1), ahead, wanted, weight)


@functools.partial(jax.jit, static_argnames="count")
def _training_rows(sources: Sources, key: Key, count: int) -> _Seen:
    """Windows of every region, drawn as the pooled model's are, [R, X]."""

    def of_region(region: SourceRegion) -> _Seen:
        own = jax.random.fold_in(key, region.region_id)
        return _see(region.graph, draw_windows(sources.bank, sources.train, region.graph.nodes, count, key=own))

    return jax.lax.map(of_region, sources.regions)


@jax.jit
def _validation_rows(sources: Sources) -> _Seen:
    """The validation windows of every region, [R, X]."""

    def of_region(region: SourceRegion) -> _Seen:
        return _see(region.graph, validation_windows(sources.bank, sources.train, region))

    return jax.lax.map(of_region, sources.regions)


@jax.jit
def _target_rows(target: Target, region: Int[Array, ""]) -> tuple[Int[Array, ""], Window, _Seen]:
    """The number of a region's node, its test windows, and what trees see of them."""
    graph, windows = region_windows(target, region, target.test_starts)
    return graph.nodes[0], windows, _see(graph, windows)


@jax.jit
def _to_forecast(
    target: Target, node: Int[Array, ""], windows: Window, said: Float[Array, "S P"]
) -> Float[Array, "S P"]:
    """What trees say of the windows of a node, as forecasts in data units."""
    if target.bank.has_profile:
        profile, deviation = profile_and_deviation(windows.covariates[:, target.bank.history :])
        said = profile + deviation * said
    return in_data_units(target, node, damped(target, said, windows))


def _observed_rows(seen: _Seen, share: Float[np.ndarray, " R"], step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, what is to be said and its weight, at one horizon step, of all windows that have a reading there."""
    weight = np.asarray(seen.weight)[..., step] * share[:, None]
    known = weight > 0
    inputs, wanted, counted = seen.inputs(step)[known], np.asarray(seen.wanted)[..., step][known], weight[known]
    return inputs, wanted, counted / (counted.mean() if len(counted) else 1.0)


def import_lightgbm() -> ModuleType:
    """LightGBM, imported when it is needed, for it is an extra.

    Raises:
      InputError: it is not installed, or cannot be loaded.
    """
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # the latter where the system lacks a library of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"`boosted_trees` needs LightGBM, which cannot be imported ({reason}); install it: {INSTALL}"
        ) from error
    return lightgbm
