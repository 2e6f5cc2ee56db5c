"""In: a run and the name of a method. Out: the method's test forecasts, made once and kept in the run's folder."""

import pathlib
import time

import jax
import numpy as np

from experiments.run_folder import write_npz
from experiments.settings import METHODS
from experiments.stages import Run
from gpdiff_jax import baselines, nulls
from gpdiff_jax.adapt import AdaptConfig
from gpdiff_jax.base import initial_params
from gpdiff_jax.evaluate import MethodForecast, few_shot, zero_shot
from gpdiff_jax.progress import LogWriter, stage
from gpdiff_jax.typing import Key, Params, RegionGraph

_RULES = {"historical_average": baselines.historical_average, "last_value": baselines.last_value}


def held_methods(run: Run) -> list[str]:
    """The methods whose forecasts the folder of a run holds for every channel, in the order of `METHODS`."""
    return [name for name in METHODS if all(_path(run, c, name).exists() for c in range(len(run.targets)))]


def method_forecast(run: Run, channel: int, method: str) -> MethodForecast:
    """The test forecasts of one method for one channel; read from the folder if they were made before.

    Args:
      run: the run.
      channel: index of the target's channel.
      method: one of `METHODS`.

    Returns:
      The forecasts.
    """
    path = _path(run, channel, method)
    if path.exists():
        with np.load(path, allow_pickle=False) as held:
            fields = {name: held[name] for name in held.files}
        scalars = {
            name: fields[name].item()
            for name in ("seconds", "learning_rate", "steps", "validation_mae")
            if name in fields
        }
        return MethodForecast(fields["forecast"], fields.get("spread"), curves=fields.get("curves"), **scalars)
    result = _make_forecast(run, channel, method)
    path.parent.mkdir(exist_ok=True)
    write_npz(path, {name: np.asarray(value) for name, value in result._asdict().items() if value is not None})
    return result


def _path(run: Run, channel: int, method: str) -> pathlib.Path:
    return run.folder / "methods" / f"{method}_{channel}.npz"


def _make_forecast(run: Run, channel: int, method: str) -> MethodForecast:
    target, city = run.targets[channel], run.target_cities[channel]
    if method in _RULES:
        begin = time.monotonic()
        windows = {"history": run.settings.data.history, "horizon": run.settings.data.horizon}
        forecast = _RULES[method](city, target.split.support, np.asarray(target.test_starts), **windows)
        return MethodForecast(forecast, None, time.monotonic() - begin)
    family = method.removesuffix("_zero_shot").removesuffix("_few_shot")
    starts = _starts(run, channel, family)
    if method.endswith("_zero_shot"):
        return zero_shot(run.model, target, starts)
    config: AdaptConfig = run.settings.target_only if family == "target_only" else run.settings.adapt
    with stage(f"adapt {method}", len(config.learning_rates) + 1) as shown:
        result = few_shot(
            run.model,
            target,
            starts,
            config,
            key=run.key("adapt"),
            progress=lambda done, metrics: shown.advance(done - shown.completed, **metrics),
        )
        shown.advance()
    _log_curves(run, f"{method} of {city.name}" if len(run.targets) > 1 else method, config, result)
    return result


def _log_curves(run: Run, method: str, config: AdaptConfig, result: MethodForecast) -> None:
    """One line for every validation error that the choice of learning rate and steps rests on."""
    with LogWriter(run.folder / "log.jsonl") as log:
        for rate, curve in zip(config.learning_rates, [] if result.curves is None else result.curves, strict=False):
            for evaluation, error in enumerate(curve):
                step = evaluation * config.evaluate_every
                log.write("adapt", step, method=method, learning_rate=rate, validation_loss=error)


def _starts(run: Run, channel: int, family: str) -> Params:
    """Start parameters of every target region, leaves [K, R, ...]."""
    if family == "gpdiff":
        return run.generated[channel]
    if family == "nearest_plus_noise":
        # Its own noise for every channel, and as many samples as GPDiff draws.
        key, samples = jax.random.fold_in(run.key(family), channel), run.settings.generate.samples
        return nulls.nearest_plus_noise(run.zoo, run.target_prompts[channel], samples=samples, key=key)
    if family == "pooled":
        regions = run.targets[channel].num_regions
        return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (1, regions, *leaf.shape)), run.base)
    own = _random_starts(run, channel) if family == "target_only" else _null_starts(run, channel, family)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], own)


def _null_starts(run: Run, channel: int, family: str) -> Params:
    """Parameters of a null hypothesis that gives every region one vector, leaves [R, ...]; made once."""
    if (channel, family) not in run.null_params:
        run.null_params[channel, family] = _make_null(run, channel, family)
    return run.null_params[channel, family]


def _make_null(run: Run, channel: int, family: str) -> Params:
    prompts = run.target_prompts[channel]
    if family == "mlp_hypernetwork":
        return run.mlp.params(prompts)
    if family == "kernel_average":
        return nulls.kernel_average(run.zoo, prompts)[0]
    if family == "ridge_hypernetwork":
        return nulls.ridge_hypernetwork(run.zoo, prompts)[0]
    rule = {"zoo_mean": nulls.zoo_mean, "nearest_prompt": nulls.nearest_prompt}[family]
    return rule(run.zoo, prompts)


def _random_starts(run: Run, channel: int) -> Params:
    target = run.targets[channel]

    @jax.jit
    def draw(key: Key, region_ids: jax.Array, graphs: RegionGraph) -> Params:
        keys = jax.vmap(lambda region: jax.random.fold_in(key, region))(region_ids)
        return jax.vmap(lambda key: initial_params(run.model, graphs, target.sizes, key=key))(keys)

    return draw(run.key("target_only"), target.region_ids, target.graphs)
