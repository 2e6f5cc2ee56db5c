"""In: a run and the name of a method. Out: the method's test forecasts, made once and kept in the run's folder."""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpdiff_jax.baselines import nulls, rules
from gpdiff_jax.baselines.autoregression import residual_autoregression
from gpdiff_jax.baselines.boosted_trees import forecast_trees
from gpdiff_jax.baselines.meta_learned import MetaConfig, adapt_meta_learned
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_npz, write_npz
from gpdiff_jax.hosts import is_first
from gpdiff_jax.models.protocol import Model, ModelSizes
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.run.outside import check_outside_name
from gpdiff_jax.run.settings import METHODS
from gpdiff_jax.run.stages import Stages, generate_key
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.progress import LogWriter, stage
from gpdiff_jax.training.stopwatch import stopwatch
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import MethodForecast, few_shot, sampled_forecast, zero_shot
from gpdiff_jax.transfer.posterior import posterior_shot
from gpdiff_jax.typing import Key, Params, RegionGraph
from gpdiff_jax.zoo.pooled import broadcast_regions, initial_params, shrink_towards

_RULES = {"historical_average": rules.historical_average, "last_value": rules.last_value}
_SCALARS = ("seconds", "learning_rate", "steps", "validation_mae", "shared_steps", "shared_rate")
# Whose starts are the same whatever the target shows.
_BLIND = ("pooled", "target_only", "zoo_mean", "gaussian_codes")
# Whose differences from the pooled model are as large as source cities left out in turn bear; those of the other nulls
# are as much shrunk as the generator's.
_CHOSEN_BY_CITIES = ("kernel_average", "ridge_hypernetwork", "ridge_plus_noise")
_HARVESTED = ("prompt_encoder", "prompts", "pooled", "harvest")
_STAGES = {
    "target_only": (),
    "residual_autoregression": ("residual_autoregression",),
    "boosted_trees": ("boosted_trees",),
    "pooled": ("pooled",),
    "meta_learned": ("pooled", "meta_learned"),
    "gpdiff": ("prompt_encoder", "prompts", "pooled", "harvest", "pretrain"),
    "gpdiff_posterior": ("prompt_encoder", "prompts", "pooled", "harvest", "pretrain"),
    "mlp_hypernetwork": ("prompt_encoder", "prompts", "pooled", "harvest", "mlp"),
    "mlp_ensemble": ("prompt_encoder", "prompts", "pooled", "harvest", "mlp", "mlp_ensemble"),
}


def family_of(method: str) -> str:
    """A method's name without its number of shots."""
    return method.removesuffix("_zero_shot").removesuffix("_few_shot")


def training_stages(method: str, adapt: AdaptConfig) -> tuple[str, ...]:
    """The stages that a method needs before it looks at the target, by the names that they are logged under.

    Args:
      method: one of `METHODS`, or the name of forecasts of another program, which need none.
      adapt: how it is fine-tuned: updates in codes need the zoo.
    """
    if method in _RULES or method not in METHODS:
        return ()
    family = family_of(method)
    if family == "pooled" and method.endswith("_few_shot") and adapt.update == "codes":
        return _HARVESTED
    return _STAGES.get(family, _HARVESTED)


def held_methods(run: Stages) -> list[str]:
    """The methods whose forecasts the folder of a run holds for every channel: of `METHODS`, then of other programs.

    A file that is damaged is named on standard error and removed, so that it is made again.
    """

    def held() -> list[str]:
        channels = range(len(run.targets))
        return [name for name in METHODS if all([_held(run, channel, name) is not None for channel in channels])]

    return [*ask_first(held), *outside_names(run)]


def outside_names(run: Stages) -> list[str]:
    """The forecasts of other programs that were added to a run and are held for every channel.

    What else lies among the forecasts is named on standard error, and left where it is: it cannot be made again.
    """

    def held() -> list[str]:
        found = []
        for path in sorted((run.folder / "methods").glob("*_0.npz")):
            name = path.name.removesuffix("_0.npz")
            if name in METHODS:
                continue
            try:
                check_outside_name(name)
                fields = [_read_outside(run, channel, name) for channel in range(len(run.targets))]
            except InputError as error:
                print(f"{error}; it is left out of the results", file=sys.stderr)
                continue
            found += [name] * all(one is not None for one in fields)
        return found

    return ask_first(held)


def _read_outside(run: Stages, channel: int, name: str) -> dict[str, np.ndarray] | None:
    """What was kept of forecasts that were added to this run; None where nothing is.

    Raises:
      InputError: it is damaged, or was not added to this run.
    """
    path = forecast_path(run, channel, name)
    if not path.exists():
        return None
    fields = read_npz(path)
    if str(fields.get("made_of")) != _made_of(run, channel, name):
        raise InputError(f"{str(path)!r} was not added to this run (see `evaluate --forecasts`)")
    _check_form(run, channel, fields, path)
    return fields


def _check_form(run: Stages, channel: int, fields: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Raises `InputError` where arrays are not those of a method's forecasts."""
    target = run.targets[channel]
    shape = len(np.asarray(target.test_starts)), target.num_regions, run.settings.data.horizon
    numbers = [name for name in ("forecast", "spread", *_SCALARS) if name in fields]
    if not {"forecast", "seconds"} <= fields.keys():
        raise InputError(f"{str(path)!r} is damaged (it holds no forecast)")
    for name in numbers:
        wanted, held = () if name in _SCALARS else shape, fields[name]
        if held.shape != wanted or held.dtype.kind not in "fiu":
            raise InputError(f"{str(path)!r} is damaged ({name} is {held.dtype} {held.shape}, not numbers {wanted})")


def keep_outside(run: Stages, name: str, forecasts: Sequence[np.ndarray]) -> None:
    """Keeps forecasts of another program in a run's folder, in the place of those that go by the same name.

    Args:
      run: the run.
      name: of the forecasts.
      forecasts: [S, R, P] per channel, see `outside.in_order_of_run`.

    Raises:
      InputError: forecasts cannot go by that name.
    """
    check_outside_name(name)
    for channel in range(len(forecasts)) if is_first() else ():  # or old ones of a channel could stand beside new ones
        forecast_path(run, channel, name).unlink(missing_ok=True)
    for channel, values in enumerate(forecasts):
        _keep(run, channel, name, MethodForecast(values, None, float("nan")))


def _held(run: Stages, channel: int, method: str) -> MethodForecast | None:
    """What the folder holds of a method; None where that is nothing, damaged (which is removed) or not its own."""
    if method not in METHODS:
        fields = _read_outside(run, channel, method)
        return None if fields is None else MethodForecast(fields["forecast"], None, float("nan"))
    path = forecast_path(run, channel, method)
    if not path.exists():
        return None
    try:
        fields = read_npz(path)
        _check_form(run, channel, fields, path)
    except InputError as error:
        print(f"{error}; it is made again where it is asked for", file=sys.stderr)
        path.unlink()
        return None
    # Versions before this one did not say whose forecasts they are.
    if str(fields.get("made_of", made_of := _made_of(run, channel, method))) != made_of:
        print(f"{str(path)!r} holds forecasts of another method or another run, which are not taken", file=sys.stderr)
        return None
    scalars = {name: fields[name].item() for name in _SCALARS if name in fields}
    return MethodForecast(fields["forecast"], fields.get("spread"), curves=fields.get("curves"), **scalars)


def method_forecast(run: Stages, channel: int, method: str) -> MethodForecast:
    """The test forecasts of one method for one channel; read from the folder if they were made before.

    Args:
      run: the run.
      channel: index of the target's channel.
      method: one of `METHODS`.

    Returns:
      The forecasts. A file that is damaged, or of another method or run, is named on standard error and made again.
    """
    held = ask_first(lambda: None if (made := _held(run, channel, method)) is None else made._asdict())
    if held is not None:
        return MethodForecast(**held)
    result = _make_forecast(run, channel, method)
    _keep(run, channel, method, result)
    return result


def _keep(run: Stages, channel: int, method: str, made: MethodForecast) -> None:
    path = forecast_path(run, channel, method)
    if is_first():
        path.parent.mkdir(exist_ok=True)
    fields = {name: np.asarray(value) for name, value in made._asdict().items() if value is not None}
    write_npz(path, fields | {"made_of": np.asarray(_made_of(run, channel, method))})


def _made_of(run: Stages, channel: int, method: str) -> str:
    """By what the forecasts of a method are known: its name, and the settings and readings of the run."""
    return digest_of(f"{method} of channel {channel} of {run.identity}", {})


def forecast_path(run: Stages, channel: int, method: str) -> pathlib.Path:
    """Where the forecasts of a method for a channel are kept."""
    return run.folder / "methods" / f"{method}_{channel}.npz"


def _make_forecast(run: Stages, channel: int, method: str) -> MethodForecast:
    target, city = run.targets[channel], run.target_cities[channel]
    if method in _RULES:
        windows = {"history": run.settings.data.history, "horizon": run.settings.data.horizon}
        with stopwatch() as watch:
            forecast = _RULES[method](city, target.split.support, np.asarray(target.test_starts), **windows)
        return MethodForecast(forecast, None, watch.seconds)
    if method == "residual_autoregression":
        starts = broadcast_regions(run.autoregression, target.num_regions)
        return zero_shot(residual_autoregression(target.sizes), target, starts)
    if method == "boosted_trees":
        trees = run.trees
        with stopwatch() as watch:
            forecast = forecast_trees(trees, target)
        return MethodForecast(forecast, None, watch.seconds)
    family = family_of(method)
    if family == "gpdiff_posterior":
        prior, making = _starts(run, channel, "gpdiff", False)
        settings = run.settings
        how: Any = {"generate": settings.generate, "config": settings.posterior, "adapt": settings.adapt}
        prompts, key = run.target_prompts[channel], generate_key(run, channel)
        with stage(f"adapt {method}", 1) as shown:
            result = posterior_shot(run.hypernetwork, target, prompts, prior, key=key, **how)
            shown.advance()
        return result._replace(seconds=result.seconds + making)
    if family == "meta_learned":
        return _meta_forecast(run, channel)
    starts, making = _starts(run, channel, family, False)
    if method.endswith("_zero_shot"):
        result = zero_shot(run.model, target, starts)
        return result._replace(seconds=result.seconds + making)
    config: AdaptConfig = run.settings.target_only if family == "target_only" else run.settings.adapt
    chooses = config.update == "own"
    directions, choice_starts = run.directions if config.update == "codes" else None, None
    elsewhere = target.split.adaptation != target.split.support
    if target.choice is not None and family not in _BLIND and chooses and elsewhere:
        # What is chosen on the validation day starts from what the days before it show.
        choice_starts, again = _starts(run, channel, family, True)
        making += again
    with stage(f"adapt {method}", len(config.learning_rates) + 1 if chooses else 1) as shown:
        result = few_shot(
            run.model,
            target,
            starts,
            config,
            key=run.key("adapt"),
            directions=directions,
            choice_params=choice_starts,
            progress=lambda done, metrics: shown.advance(done - shown.completed, **metrics),
        )
        shown.advance()
    _log_curves(run, f"{method} of {city.name}" if len(run.targets) > 1 else method, config, result)
    return result._replace(seconds=result.seconds + making)


def _meta_forecast(run: Stages, channel: int) -> MethodForecast:
    """The meta-learned model, fine-tuned by the steps that it was learned for."""
    target, config = run.targets[channel], MetaConfig.beside(run.settings.pooled)
    starts = broadcast_regions(run.meta_learned, target.num_regions)
    with stage("adapt meta_learned_few_shot", 1) as shown, stopwatch() as watch:
        tuned = adapt_meta_learned(run.model, target, starts, config, key=run.key("adapt"))
        before = starts if run.settings.adapt.seen_kinds_only else None
        forecast, spread = sampled_forecast(run.model, target, tuned, before)
        shown.advance()
    return MethodForecast(forecast, spread, watch.seconds, config.inner_rate, config.inner_steps)


def _log_curves(run: Stages, method: str, config: AdaptConfig, result: MethodForecast) -> None:
    """One line for every validation error that the choice of learning rate and steps rests on."""
    with LogWriter(run.folder / "log.jsonl") as log:
        for rate, curve in zip(config.learning_rates, [] if result.curves is None else result.curves, strict=False):
            for evaluation, error in enumerate(curve):
                step = evaluation * config.evaluate_every
                log.write("adapt", step, method=method, learning_rate=rate, validation_loss=error)


def _starts(run: Stages, channel: int, family: str, for_choice: bool) -> tuple[Params, float]:
    """Start parameters of every target region, leaves [K, R, ...], made once; and the seconds that making them took."""
    key = (channel, family, for_choice)
    if family == "gpdiff":
        generated = run.generated_for_choice if for_choice else run.generated
        return generated.params[channel], generated.seconds[channel]
    if key not in run.starts:
        run.starts[key] = _make_starts(run, channel, family, for_choice)
    return run.starts[key]


def _make_starts(run: Stages, channel: int, family: str, for_choice: bool) -> tuple[Params, float]:
    regions = run.targets[channel].num_regions
    if family == "target_only":
        with stopwatch() as watch:
            own = _random_starts(run, channel)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[None], own), watch.seconds
    if family == "pooled":
        return broadcast_regions(run.pooled, regions), 0.0
    # What is trained on the sources is trained before the watch runs.
    prompts = (run.choice_prompts if for_choice else run.target_prompts)[channel]
    _ = {"mlp_hypernetwork": lambda: run.mlp, "mlp_ensemble": lambda: run.mlp_ensemble}.get(family, lambda: run.zoo)()
    assert prompts is not None
    with stopwatch() as watch:
        # Its own noise for every channel, and as many samples as GPDiff draws.
        own_key, samples = jax.random.fold_in(run.key(family), channel), run.settings.generate.samples
        if family == "nearest_plus_noise":
            starts = nulls.nearest_plus_noise(run.zoo, prompts, samples=samples, key=own_key)
        elif family == "ridge_plus_noise":
            starts = nulls.ridge_plus_noise(run.zoo, prompts, samples=samples, key=own_key)
        elif family == "mlp_ensemble":
            members = [member.params(prompts) for member in run.mlp_ensemble]
            starts = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
        elif family == "gaussian_codes":
            count = run.settings.adapt.directions
            starts = nulls.gaussian_codes(run.zoo, prompts, directions=count, samples=samples, key=own_key)
        else:
            starts = jax.tree.map(lambda leaf: np.asarray(leaf)[None], _by_rule(run, family, prompts))
        if family not in _CHOSEN_BY_CITIES:
            kept = run.settings.generate.kept(run.settings.data.covariates)
            starts = shrink_towards(run.pooled, starts, kept)
    return starts, watch.seconds


def _by_rule(run: Stages, family: str, prompts: Prompts) -> Params:
    """Parameters of a null hypothesis that gives every region one vector, leaves [R, ...]."""
    if family == "mlp_hypernetwork":
        return run.mlp.params(prompts)
    if family == "kernel_average":
        return nulls.kernel_average(run.zoo, prompts)[0]
    if family == "ridge_hypernetwork":
        return nulls.ridge_hypernetwork(run.zoo, prompts)[0]
    rule = {"zoo_mean": nulls.zoo_mean, "nearest_prompt": nulls.nearest_prompt}[family]
    return rule(run.zoo, prompts)


def _random_starts(run: Stages, channel: int) -> Params:
    target = run.targets[channel]
    return _draw_starts(run.model, target.sizes, run.key("target_only"), target.region_ids, target.graphs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_starts(model: Model, sizes: ModelSizes, key: Key, region_ids: jax.Array, graphs: RegionGraph) -> Params:
    keys = jax.vmap(lambda region: jax.random.fold_in(key, region))(region_ids)
    return jax.vmap(lambda key: initial_params(model, graphs, sizes, key=key))(keys)
