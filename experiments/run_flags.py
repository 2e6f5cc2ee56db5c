"""In: the flags of a run. Out: its `Settings`, and the `main` of every module that works on a run.

Importing this module defines the flags that all stages of a run share.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from gpdiff_jax.cities.splits import PROTOCOLS
from gpdiff_jax.data.config import SCALINGS, DataConfig
from gpdiff_jax.data.region_graphs import PICKS
from gpdiff_jax.diffusion.conditioning import STRATEGIES
from gpdiff_jax.diffusion.denoiser import DTYPES
from gpdiff_jax.diffusion.objectives import OBJECTIVES
from gpdiff_jax.diffusion.samplers import SAMPLERS
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.errors import InputError
from gpdiff_jax.hosts import is_first
from gpdiff_jax.models import model_names
from gpdiff_jax.prompts.encoders import PARTS
from gpdiff_jax.run.run import Run
from gpdiff_jax.run.settings import METHODS, PRESETS, Settings, choose_methods
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.training.exchange import connect
from gpdiff_jax.training.parallel import use_every_core
from gpdiff_jax.transfer.adapt_config import UPDATES
from gpdiff_jax.zoo.codec import NORMALISATIONS, SPACES

flags.DEFINE_string("data_dir", None, "folder with one NAME.npz per city; without it, cities are simulated")
flags.DEFINE_list("sources", None, "names of the source cities, separated by commas; needs --data_dir")
flags.DEFINE_string("target", None, "name of the target city; needs --data_dir")
flags.DEFINE_integer("interval_minutes", 60, "common interval that every city is resampled to", 1, 1440)
flags.DEFINE_integer(
    "support_days", None, "visible days of the target city, right before its test span; 3 if not given", 1, 365
)
flags.DEFINE_enum(
    "covariates",
    None,
    ["none", "calendar", "profile"],
    "what a forecaster sees beside the history; profile if not given, in the paper preset none",
)
flags.DEFINE_enum(
    "protocol",
    "leak-free",
    list(PROTOCOLS),
    "how cities are split: leak-free; or paper, as the published code does, which scales a target by its whole series "
    "and chooses on its test span: for comparison with published numbers alone",
)
flags.DEFINE_string("channels", "first", "first, each, or the name of a channel")
flags.DEFINE_float(
    "missing_above", None, "the value above which readings are missing, where files hold fill values", 0.0
)
flags.DEFINE_string(
    "model",
    None,
    f"the forecaster to harvest and generate: {', '.join(model_names())}, or a Python file that registers one; stid if "
    "not given, in the paper preset stgcn",
)
flags.DEFINE_integer("seed", 0, "seed of everything random", 0, 2**31 - 1)
flags.DEFINE_enum(
    "preset",
    None,
    list(PRESETS),
    "sizes: tiny to check the path, demo for some dozens of regions, small for hundreds on two CPU cores, paper those "
    "of the published system, for an accelerator, with seven support days; demo is the default for simulated cities, "
    "small with --data_dir",
)
flags.DEFINE_string("out_dir", "runs/transfer", "folder of the run; a run that it holds is continued")
flags.DEFINE_integer("history", 12, "steps that a forecaster sees", 1, 1000)
flags.DEFINE_integer("horizon", 6, "steps that it forecasts", 1, 1000)
flags.DEFINE_integer("max_neighbours", 8, "most neighbours in a region graph", 0, 1000)
flags.DEFINE_enum("pick_neighbours", "weight", list(PICKS), "which neighbours a crowded region keeps")
flags.DEFINE_enum(
    "scaling",
    None,
    list(SCALINGS),
    "what scales a source region: windows like the support, or all; support if not given, in the paper preset span",
)
flags.DEFINE_float(
    "near_days",
    None,
    "a source window sees the support days of a variant at odds that fall by 1/e for every so many days between them; "
    f"0 makes all variants alike; {DataConfig().near_days:g} if not given, in the paper preset 0",
    0.0,
)
flags.DEFINE_list(
    "window_days",
    None,
    "shortest and longest window in days through which source regions are seen, e.g. 1,14, so that the generator "
    "serves any number of support days; default --support_days",
)
flags.DEFINE_list(
    "damping",
    None,
    "shares of an anomaly that a target's forecast keeps on kinds of day that the support shows, at the first and the "
    f"last step of the horizon; 1,1 keeps all; {','.join(map(str, DataConfig().damping))} if not given, in the paper "
    "preset 1,1",
)
flags.DEFINE_integer("samples", None, "parameter sets drawn per region; the preset's if not given", 1, 1000)
flags.DEFINE_integer("pooled_steps", None, "training steps of the pooled model; the preset's if not given", 1)
flags.DEFINE_float(
    "pooled_averaging",
    None,
    "decay of the running average of the pooled model's weights, 0 for none; the preset's if not given, in all but "
    "paper .995 with the calendar alone, else 0",
    0.0,
)
flags.DEFINE_float(
    "pooled_mixing",
    None,
    "how much windows of two regions are mixed in the pooled model's training, both parameters of a Beta distribution, "
    "0 for not at all; the preset's if not given, in all but paper .2 with the calendar alone, else 0",
    0.0,
)
flags.DEFINE_integer("region_steps", None, "most training steps of a region; the preset's if not given", 1)
flags.DEFINE_integer("pretrain_steps", None, "training steps of the generator; the preset's if not given", 1)
flags.DEFINE_enum(
    "adapt",
    None,
    list(UPDATES),
    "what is fine-tuned: shared, all weights by one update for the whole city; codes, after it every region along the "
    "directions in which the sources' regions differ; own, all weights of every region on its own, as target_only "
    "always does; codes if not given, in the paper preset own",
)
flags.DEFINE_integer("code_steps", None, "steps in codes, longer without a profile; default 12, there 48", 1, 10_000)
flags.DEFINE_integer(
    "shared_steps",
    None,
    "most steps of the shared update, of which as many are taken as forecast support days best that are left out in "
    "turn; the preset's if not given, in small 100, or 400 without a profile",
    0,
    10_000,
)
flags.DEFINE_integer("adapt_steps", None, "most steps of fine-tuning all weights; the preset's if not given", 1)
flags.DEFINE_float(
    "posterior_rate",
    None,
    "how strongly the draws of gpdiff_posterior_few_shot follow the support days, all steps of the sampler together; 0 "
    "leaves them to the prompts; if not given 480, or 1920 without a profile",
    0.0,
)
flags.DEFINE_integer("harvest_seeds", 1, "times that every region is trained, with other batches", 1, 1000)
flags.DEFINE_integer("data_windows", 1, "stretches of its training span, on each of which a region is trained", 1, 1000)
flags.DEFINE_integer(
    "regions_per_batch",
    None,
    "regions trained side by side: 1 suits a CPU, many an accelerator; 0 measures it for the harvest; not given, 1 on "
    "a CPU and measured elsewhere",
    0,
)
flags.DEFINE_list(
    "prompts",
    ["statistics"],
    f"parts of the prompt, of {', '.join(PARTS)}; the last two are encoders trained on the source cities",
)
flags.DEFINE_float("guidance", 1.0, "0 ignores the prompt, 1 follows it, more exaggerates it", 0.0, 10.0)
flags.DEFINE_float(
    "shrinkage",
    None,
    "part of generated differences from the pooled model that is kept; not given, half with profile, else all",
    0.0,
    1.0,
)
flags.DEFINE_string(
    "token_width",
    None,
    "parameters per token, at least 1, or gcd for the published rule, the greatest common divisor of the sizes of all "
    "layers; the preset's if not given",
)
flags.DEFINE_integer(
    "components",
    None,
    "principal components of every layer that are diffused, 0 for the tokens themselves; the preset's if not given",
    0,
)
flags.DEFINE_enum("space", "layers", list(SPACES), "whether every layer has components of its own, or all in common")
flags.DEFINE_enum(
    "normalisation", "layer", list(NORMALISATIONS), "what divides the tokens: a spread per layer or per coordinate"
)
flags.DEFINE_integer("accumulate", 1, "parts that a batch of the generator is worked on in, to save memory", 1)
flags.DEFINE_enum(
    "dtype", "auto", list(DTYPES), "what the generator computes in; auto is bfloat16 on accelerators, float32 on a CPU"
)
flags.DEFINE_enum("conditioning", "adaptive_norm", list(STRATEGIES), "where the prompt enters the generator")
flags.DEFINE_enum(
    "schedule",
    None,
    list(SCHEDULES),
    "how signal turns to noise on the way that is diffused; cosine if not given, in the paper preset linear",
)
flags.DEFINE_enum(
    "objective",
    "v",
    list(OBJECTIVES),
    "what the generator predicts; eps needs --schedule linear, v any but rectified_flow",
)
flags.DEFINE_float("min_snr_gamma", 0.0, "above 0, min-SNR weights of the token loss; the usual value is 5", 0.0)
flags.DEFINE_bool("functional_by_signal", False, "weigh the functional loss by how much of a noisy latent is signal")
flags.DEFINE_enum(
    "sampler",
    None,
    list(SAMPLERS),
    "how parameters are drawn; euler needs --schedule rectified_flow; ddim if not given, in the paper preset ddpm",
)
flags.DEFINE_integer("sampler_steps", None, "steps of the sampler; the preset's if not given", 1, 100_000)
flags.DEFINE_float("functional_weight", None, "weight of the functional loss; the preset's if not given", 0.0)
flags.DEFINE_list(
    "methods",
    ["default"],
    "what is compared: default, all (with every null hypothesis, each also fine-tuned), or names separated by commas, "
    f"of {', '.join(METHODS)}; a finished run makes only what it lacks",
)
flags.DEFINE_bool(
    "refit", True, "where all weights are tuned, tune on all support days after the choice on the validation day"
)


def _replace(config: Any, **changes: Any) -> Any:
    """The configuration with those changes that were asked for."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def _token_width(word: str | None) -> int | str | None:
    """A number where it is one; the codec refuses other words than its own."""
    return int(word) if word and word.isdecimal() else word


def _shares(words: list[str] | None) -> tuple[float, float] | None:
    """The two numbers of `--damping`."""
    if words is None:
        return None
    try:
        first, last = map(float, words)
    except ValueError as error:
        raise InputError(f"--damping (={','.join(words)}) must be two shares in [0, 1], as 0.85,0.6") from error
    return first, last


def _days(words: list[str] | None) -> tuple[int, int] | None:
    """The two numbers of `--window_days`."""
    try:
        if words is None:
            return None
        shortest, longest = map(int, words)
    except ValueError as error:
        raise InputError(f"--window_days (={','.join(words or ())}) must be two numbers of days, as 1,14") from error
    return shortest, longest


def settings_from_flags() -> Settings:
    """Turns the parsed flags into settings.

    Raises:
      InputError: flags that do not go together, or a component refuses its values.
    """
    values = flags.FLAGS
    if values.data_dir is None:
        for name in ("sources", "target"):
            if getattr(values, name) is not None:
                raise InputError(f"--{name} (={getattr(values, name)}) needs --data_dir, the folder of the city files")
        where = {}
    else:
        for name in ("sources", "target"):
            if not getattr(values, name):
                raise InputError(f"--data_dir needs --{name}: the name of a file in it without .npz")
        folder = str(pathlib.Path(values.data_dir))
        where = {"data_dir": folder, "sources": tuple(values.sources), "target": values.target}
    same = ("interval_minutes", "channels", "seed", "missing_above")  # as the flags are named, so are the settings
    settings = Settings.from_preset(
        values.preset or ("demo" if values.data_dir is None else "small"),
        model=values.model,
        methods=choose_methods(values.methods),
        **where,
        **{name: getattr(values, name) for name in same},
    )
    data = (
        "covariates",
        "support_days",
        "history",
        "horizon",
        "max_neighbours",
        "pick_neighbours",
        "scaling",
        "near_days",
        "protocol",
    )
    fixed = {"code_steps": values.code_steps, "shared_steps": values.shared_steps}
    adapt = {"steps": values.adapt_steps, "refit": values.refit, "regions_per_batch": values.regions_per_batch or None}
    pretrain = settings.pretrain
    denoiser = _replace(
        pretrain.denoiser,
        conditioning=values.conditioning,
        schedule=values.schedule,
        objective=values.objective,
        dtype=values.dtype,
    )
    codec = _replace(
        pretrain.codec,
        token_width=_token_width(values.token_width),
        components=values.components,
        normalisation=values.normalisation,
        space=values.space,
    )
    return dataclasses.replace(
        settings,
        data=_replace(
            settings.data,
            **{name: getattr(values, name) for name in data},
            damping=_shares(values.damping),
            window_days=_days(values.window_days),
        ),
        prompts=_replace(settings.prompts, parts=tuple(values.prompts)),
        pooled=_replace(
            settings.pooled,
            steps=values.pooled_steps,
            averaging=values.pooled_averaging,
            mixing=values.pooled_mixing,
        ),
        harvest=_replace(
            settings.harvest,
            steps=values.region_steps,
            regions_per_batch=values.regions_per_batch,
            seeds=values.harvest_seeds,
            data_windows=values.data_windows,
        ),
        pretrain=_replace(
            pretrain,
            denoiser=denoiser,
            codec=codec,
            steps=values.pretrain_steps,
            accumulate=values.accumulate,
            functional_weight=values.functional_weight,
            min_snr_gamma=values.min_snr_gamma,
            functional_by_signal=values.functional_by_signal,
        ),
        generate=_replace(
            settings.generate,
            samples=values.samples,
            guidance=values.guidance,
            shrinkage=values.shrinkage,
            sampler=values.sampler,
            steps=values.sampler_steps,
        ),
        adapt=_replace(settings.adapt, **adapt, **fixed, update=values.adapt),
        posterior=_replace(settings.posterior, rate=values.posterior_rate),
        target_only=_replace(settings.target_only, **adapt),
    )


flags.DEFINE_string(
    "coordinator",
    None,
    "for a job on several hosts, each of which is given the same command: address of the first, name:port, or auto "
    "where the cluster's scheduler tells it; with --num_processes and --process_id",
)
flags.DEFINE_integer("num_processes", None, "hosts of a job, with --coordinator", 1)
flags.DEFINE_integer("process_id", None, "number of this host, 0 for the first, with --coordinator", 0)


def _connect() -> None:
    """Joins the other hosts, if the flags name any; of their results the first prints what all have."""
    values = flags.FLAGS
    if values.coordinator is None:
        for name in ("num_processes", "process_id"):
            if values[name].present:
                raise InputError(f"--{name} (={values[name].value}) needs --coordinator, the address of the first host")
        return
    connect(values.coordinator, values.num_processes, values.process_id)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def run_main(show: Callable[[Run], None], *, on_hosts: bool = True) -> Callable[[list[str]], None]:
    """Makes the `main` of a module that works on a run.

    Args:
      show: prints what the module is for; asking the run for it makes it, if the folder does not hold it.
      on_hosts: whether a job on several hosts can make it.

    Returns:
      `main(argv)` that parses the flags and opens the run.
    """

    def main(argv: list[str]) -> None:
        del argv
        use_every_core()
        if not on_hosts and flags.FLAGS.coordinator is not None:
            raise InputError("--coordinator is for what trains, generates or forecasts; run this on one host, without")
        _connect()
        enable_compilation_cache()
        show(Run.open(flags.FLAGS.out_dir, settings_from_flags()))

    return main
