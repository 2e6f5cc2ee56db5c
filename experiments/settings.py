"""In: the flags of a run. Out: one frozen `Settings`, and the configuration of every component, by preset.

Importing this module defines the flags that all stages share.
"""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from gpdiff_jax.cities import SimulationConfig
from gpdiff_jax.data.config import SCALINGS, DataConfig
from gpdiff_jax.data.region_graphs import PICKS
from gpdiff_jax.diffusion.conditioning import STRATEGIES, check_conditioning
from gpdiff_jax.diffusion.denoiser import DTYPES, DenoiserConfig
from gpdiff_jax.diffusion.objectives import OBJECTIVES
from gpdiff_jax.diffusion.samplers import SAMPLERS, check_sampler
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig
from gpdiff_jax.models import model_names, read_model_file
from gpdiff_jax.prompts.encoders import PARTS, SPATIAL_OF_PART, PromptConfig
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.training.parallel import rows_side_by_side
from gpdiff_jax.transfer.adapt import AdaptConfig
from gpdiff_jax.zoo.codec import NORMALISATIONS
from gpdiff_jax.zoo.pooled import BaseConfig
from gpdiff_jax.zoo.region_training import HarvestConfig

PRESETS = ("tiny", "demo", "small")
DEFAULT_METHODS = (
    "historical_average",
    "last_value",
    "target_only",
    "pooled_zero_shot",
    "pooled_few_shot",
    "ridge_hypernetwork_zero_shot",
    "ridge_hypernetwork_few_shot",
    "gpdiff_zero_shot",
    "gpdiff_few_shot",
)
_NULLS = ("zoo_mean", "nearest_prompt", "nearest_plus_noise", "kernel_average", "mlp_hypernetwork")
METHODS = (*DEFAULT_METHODS, *(f"{null}_{shots}" for null in _NULLS for shots in ("zero_shot", "few_shot")))

flags.DEFINE_string("data_dir", None, "folder with one NAME.npz per city; without it, cities are simulated")
flags.DEFINE_list("sources", None, "names of the source cities, separated by commas; needs --data_dir")
flags.DEFINE_string("target", None, "name of the target city; needs --data_dir")
flags.DEFINE_integer("interval_minutes", 60, "common interval that every city is resampled to", 1, 1440)
flags.DEFINE_integer("support_days", 3, "visible days of the target city, right before its test span", 1, 365)
flags.DEFINE_enum("covariates", "profile", ["none", "calendar", "profile"], "what a forecaster sees beside the history")
flags.DEFINE_string("channels", "first", "first, each, or the name of a channel")
flags.DEFINE_float(
    "missing_above", None, "the value above which readings are missing, where files hold fill values", 0.0
)
flags.DEFINE_string(
    "model",
    "stgcn",
    f"the forecaster to harvest and generate: {', '.join(model_names())}, or a Python file that registers one",
)
flags.DEFINE_integer("seed", 0, "seed of everything random", 0, 2**31 - 1)
flags.DEFINE_enum(
    "preset",
    None,
    list(PRESETS),
    "sizes: tiny to check the path, demo for some dozens of regions, small for hundreds on two CPU cores; demo is the "
    "default for simulated cities, small with --data_dir",
)
flags.DEFINE_string("out_dir", "runs/transfer", "folder of the run; a run that it holds is continued")
flags.DEFINE_integer("history", 12, "steps that a forecaster sees", 1, 1000)
flags.DEFINE_integer("horizon", 6, "steps that it forecasts", 1, 1000)
flags.DEFINE_integer("max_neighbours", 8, "most neighbours in a region graph", 0, 1000)
flags.DEFINE_enum("pick_neighbours", "weight", list(PICKS), "which neighbours a crowded region keeps")
flags.DEFINE_enum("scaling", "support", list(SCALINGS), "what scales a source region: windows like the support, or all")
flags.DEFINE_integer("samples", None, "parameter sets drawn per region; the preset's if not given", 1, 1000)
flags.DEFINE_integer("base_steps", None, "training steps of the pooled base; the preset's if not given", 1)
flags.DEFINE_integer("region_steps", None, "most training steps of a region; the preset's if not given", 1)
flags.DEFINE_integer("pretrain_steps", None, "training steps of the generator; the preset's if not given", 1)
flags.DEFINE_integer("adapt_steps", None, "most fine-tuning steps; the preset's if not given", 1)
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
flags.DEFINE_enum(
    "normalisation", "layer", list(NORMALISATIONS), "what divides the tokens: a spread per layer or per coordinate"
)
flags.DEFINE_integer("accumulate", 1, "parts that a batch of the generator is worked on in, to save memory", 1)
flags.DEFINE_enum(
    "dtype", "auto", list(DTYPES), "what the generator computes in; auto is bfloat16 on accelerators, float32 on a CPU"
)
flags.DEFINE_enum("conditioning", "adaptive_norm", list(STRATEGIES), "where the generator's tokens hear the prompt")
flags.DEFINE_enum("schedule", "cosine", list(SCHEDULES), "how signal turns to noise on the way that is diffused")
flags.DEFINE_enum(
    "objective",
    "v",
    list(OBJECTIVES),
    "what the generator predicts; eps needs --schedule linear, v any but rectified_flow",
)
flags.DEFINE_float("min_snr_gamma", 0.0, "above 0, min-SNR weights of the token loss; the usual value is 5", 0.0)
flags.DEFINE_bool("functional_by_signal", False, "weigh the functional loss by how much of a noisy code is signal")
flags.DEFINE_enum("sampler", "ddim", list(SAMPLERS), "how parameters are drawn; euler needs --schedule rectified_flow")
flags.DEFINE_integer("sampler_steps", None, "steps of the sampler; the preset's if not given", 1, 100_000)
flags.DEFINE_float("functional_weight", None, "weight of the functional loss; the preset's if not given", 0.0)
flags.DEFINE_list(
    "methods",
    ["default"],
    "what is compared: default, all (with every null hypothesis, each also fine-tuned), or names separated by commas, "
    f"of {', '.join(METHODS)}; a finished run makes only what it lacks",
)
flags.DEFINE_bool("refit", True, "after the choice on the validation day, fine-tune on all support days")


# Settings that say how and from where a run is computed; what is missing above a value is in the readings.
_EXECUTION = (
    ("data_dir",),
    ("missing_above",),
    ("harvest", "regions_per_batch"),
    ("adapt", "regions_per_batch"),
    ("target_only", "regions_per_batch"),
    ("pretrain", "accumulate"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run: where its cities are, and the configuration of every component."""

    data_dir: str | None
    sources: tuple[str, ...]
    target: str
    interval_minutes: int
    channels: str
    model: str
    model_file_sha256: str | None  # of a model of the user's own: with another file it is another run
    seed: int
    simulation: SimulationConfig | None
    data: DataConfig
    prompts: PromptConfig
    base: BaseConfig
    harvest: HarvestConfig
    pretrain: PretrainConfig
    generate: GenerateConfig
    adapt: AdaptConfig
    target_only: AdaptConfig
    missing_above: float | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS

    def computed(self) -> dict[str, Any]:
        """What makes a run this one, as plain JSON values: what is computed.

        Not the methods, more of which may be asked for later, nor how it is computed, see `execution`.
        """
        settings = dataclasses.asdict(self)
        for path in (("methods",), *_EXECUTION):
            *outer, last = path
            functools.reduce(dict.__getitem__, outer, settings).pop(last)
        return settings

    def execution(self) -> dict[str, Any]:
        """How a run is computed, and from where, by the names of the settings; another way gives the same results."""
        settings = dataclasses.asdict(self)
        return {".".join(path): functools.reduce(dict.__getitem__, path, settings) for path in _EXECUTION}


def _preset(name: str) -> dict[str, Any]:
    """Sizes of every component."""
    if name == "tiny":
        return {
            "base": BaseConfig(steps=100, regions=16, evaluations=2),
            "harvest": HarvestConfig(steps=40, evaluate_every=20, snapshots=2),
            "pretrain": PretrainConfig(
                denoiser=DenoiserConfig(width=32, layers=1), steps=40, batch=8, windows=4, evaluations=2
            ),
            "generate": GenerateConfig(samples=2, steps=5),
            "adapt": AdaptConfig(learning_rates=(1e-3,), steps=20),
            "target_only": AdaptConfig(learning_rates=(3e-3,), steps=40, stay_near=False, blind_learning_rate=3e-3),
            "prompts": {
                "temporal": TemporalConfig(width=16, heads=2, encoder_layers=1, steps=20, batch=16, evaluations=2),
                "embedding": EmbeddingConfig(width=8, relation_width=4, epochs=5),
            },
            "variants": 4,
        }
    if name == "demo":
        return _preset("small") | {
            "base": BaseConfig(steps=500, evaluations=10),
            "harvest": HarvestConfig(steps=160),
            "pretrain": PretrainConfig(denoiser=DenoiserConfig(width=64, layers=2), steps=500, evaluations=10),
            "adapt": AdaptConfig(steps=80),
            "target_only": AdaptConfig(
                learning_rates=(1e-3, 3e-3, 1e-2),
                steps=160,
                evaluate_every=20,
                stay_near=False,
                blind_learning_rate=3e-3,
            ),
        }
    return {
        "base": BaseConfig(),
        "harvest": HarvestConfig(),
        "pretrain": PretrainConfig(),
        "generate": GenerateConfig(),
        "adapt": AdaptConfig(),
        # From random weights every choice of rate and steps is larger, and there is nothing to stay near.
        "target_only": AdaptConfig(
            learning_rates=(1e-3, 3e-3, 1e-2), steps=240, evaluate_every=20, stay_near=False, blind_learning_rate=3e-3
        ),
        "prompts": {},
        "variants": 12,
    }


def _replace(config: Any, **changes: Any) -> Any:
    """The configuration with those changes that were asked for."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def choose_methods(words: Sequence[str]) -> tuple[str, ...]:
    """The methods that a list of names, "default" and "all" stands for, in the order of `METHODS`.

    Raises:
      InputError: it is empty or names something else.
    """
    sets = {"default": DEFAULT_METHODS, "all": METHODS} | {name: (name,) for name in METHODS}
    if not words:
        raise InputError("--methods is empty; name default, all, or some of the methods that --help lists")
    for word in words:
        if word not in sets:
            near = difflib.get_close_matches(word, sets, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            raise InputError(f"--methods names {word!r}, which is no method; {hint}")
    chosen = {name for word in words for name in sets[word]}
    return tuple(name for name in METHODS if name in chosen)


def _token_width(word: str | None) -> int | str | None:
    """A number where it is one; the codec refuses other words than its own."""
    return int(word) if word and word.isdecimal() else word


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
        simulation = SimulationConfig(interval_minutes=values.interval_minutes)
        sources, target = (), ""
    else:
        for name in ("sources", "target"):
            if not getattr(values, name):
                raise InputError(f"--data_dir needs --{name}: the name of a file in it without .npz")
        simulation, sources, target = None, tuple(values.sources), values.target
        if len(set(sources)) < len(sources):
            raise InputError(f"--sources names {max(sources, key=sources.count)!r} twice; name every city once")
        if target in sources:
            raise InputError(f"--target {target!r} is also a source; a target must not be trained on, leave it out")
    preset = _preset(values.preset or ("demo" if values.data_dir is None else "small"))
    data = DataConfig(
        covariates=values.covariates,
        support_days=values.support_days,
        history=values.history,
        horizon=values.horizon,
        max_neighbours=values.max_neighbours,
        pick_neighbours=values.pick_neighbours,
        variants=preset["variants"],
        scaling=values.scaling,
    )
    check_sampler(values.sampler, values.schedule)
    prompt_config = PromptConfig(parts=tuple(values.prompts), **preset["prompts"])
    check_conditioning(values.conditioning, sum((SPATIAL_OF_PART[part] for part in prompt_config.parts), ()))
    model, model_digest = values.model, None
    if model.endswith(".py"):
        model, model_digest = read_model_file(values.model)
    if model not in model_names():
        raise InputError(f"--model must be one of {', '.join(model_names())}, or a .py file, got {model!r}")
    side_by_side = values.regions_per_batch
    if side_by_side is None:
        side_by_side = 1 if jax.default_backend() == "cpu" else 0
    adapt = {
        "steps": values.adapt_steps,
        "refit": values.refit,
        "regions_per_batch": side_by_side or rows_side_by_side(None),
    }
    denoiser = _replace(
        preset["pretrain"].denoiser,
        conditioning=values.conditioning,
        schedule=values.schedule,
        objective=values.objective,
        dtype=values.dtype,
    )
    codec = _replace(
        preset["pretrain"].codec,
        token_width=_token_width(values.token_width),
        components=values.components,
        normalisation=values.normalisation,
    )
    return Settings(
        data_dir=None if values.data_dir is None else str(pathlib.Path(values.data_dir)),
        sources=sources,
        target=target,
        interval_minutes=values.interval_minutes,
        channels=values.channels,
        missing_above=values.missing_above,
        model=model,
        model_file_sha256=model_digest,
        seed=values.seed,
        simulation=simulation,
        data=data,
        prompts=prompt_config,
        base=_replace(preset["base"], steps=values.base_steps),
        harvest=_replace(
            preset["harvest"],
            steps=values.region_steps,
            regions_per_batch=side_by_side,
            seeds=values.harvest_seeds,
            data_windows=values.data_windows,
        ),
        pretrain=_replace(
            preset["pretrain"],
            denoiser=denoiser,
            codec=codec,
            steps=values.pretrain_steps,
            accumulate=values.accumulate,
            functional_weight=values.functional_weight,
            min_snr_gamma=values.min_snr_gamma,
            functional_by_signal=values.functional_by_signal,
        ),
        generate=_replace(
            preset["generate"],
            samples=values.samples,
            guidance=values.guidance,
            sampler=values.sampler,
            steps=values.sampler_steps,
        ),
        adapt=_replace(preset["adapt"], **adapt),
        target_only=_replace(preset["target_only"], **adapt),
        methods=choose_methods(values.methods),
    )
