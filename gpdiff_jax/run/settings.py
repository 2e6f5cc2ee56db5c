"""In: the sizes of a preset and what a user changes. Out: one frozen `Settings`, the configuration of a whole run."""

import dataclasses
import difflib
import functools
import operator
import os
from collections.abc import Sequence
from typing import Any

from gpdiff_jax.baselines.boosted_trees import BoostedTreesConfig, has_lightgbm
from gpdiff_jax.cities import SimulationConfig
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.diffusion.conditioning import check_conditioning
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.samplers import check_sampler
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError, check_types
from gpdiff_jax.hypernetwork import GenerateConfig
from gpdiff_jax.models import read_model_file
from gpdiff_jax.prompts.encoders import SPATIAL_OF_PART, PromptConfig
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.posterior import PosteriorConfig
from gpdiff_jax.zoo.codec import CodecConfig
from gpdiff_jax.zoo.pooled import PooledConfig
from gpdiff_jax.zoo.region_training import HarvestConfig

PRESETS = ("tiny", "demo", "small", "paper")
_MODELS = {"paper": "stgcn"}  # of a preset, where none is named
_PAPER_TOKEN_WIDTHS = {"stgcn": 64, "graph_wavenet": 256}
DEFAULT_METHODS = (
    "historical_average",
    "last_value",
    "residual_autoregression",
    "boosted_trees",
    "target_only",
    "pooled_zero_shot",
    "pooled_few_shot",
    "ridge_hypernetwork_zero_shot",
    "ridge_hypernetwork_few_shot",
    "gpdiff_zero_shot",
    "gpdiff_few_shot",
    "gpdiff_posterior_few_shot",
)
_NULLS = (
    "zoo_mean",
    "gaussian_codes",
    "nearest_prompt",
    "nearest_plus_noise",
    "kernel_average",
    "ridge_plus_noise",
    "mlp_hypernetwork",
    "mlp_ensemble",
)
METHODS = (
    *DEFAULT_METHODS,
    *(f"{null}_{shots}" for null in _NULLS for shots in ("zero_shot", "few_shot")),
    "meta_learned_few_shot",
)

METHOD_SETS = ("default", "all")
"""Words that stand for several methods."""

# Settings that say how and from where a run is computed; what is missing above a value is in the readings.
_EXECUTION = (
    ("data_dir",),
    ("missing_above",),
    ("harvest", "regions_per_batch"),
    ("adapt", "regions_per_batch"),
    ("target_only", "regions_per_batch"),
    ("pretrain", "accumulate"),
)


def _from_random_weights(**changes: Any) -> AdaptConfig:
    """From random weights every choice of rate and steps is larger, and there is nothing to stay near."""
    sizes = {"learning_rates": (1e-3, 3e-3, 1e-2), "steps": 240, "evaluate_every": 20}
    fixed = {"update": "own", "one_standard_error": False, "blind_learning_rate": 3e-3, "seen_kinds_only": False}
    return AdaptConfig(**{**sizes, **changes}, **fixed)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run: where its cities are, and the configuration of every component; `small` is the default of every size.

    `data_dir` holds one NAME.npz for each of `sources` and for `target`. It is None where the cities are simulated, as
    `simulation` says, or passed to `Run.open` from memory. Every city is brought to `interval_minutes`; `channels` is
    "first", "each" or the name of one; readings above `missing_above` are missing. `methods` holds names of methods, or
    "default" or "all". The number of support days, covariates and windows are in `data`, samples in `generate`.

    Raises:
      InputError: two settings that do not go together, a city that is named twice, or a method that is none.

    Example:
      >>> import gpdiff_jax as gpd
      >>> cities = {"data_dir": "data", "sources": ("bay", "york"), "target": "hangzhou"}
      >>> settings = gpd.Settings.from_preset("small", **cities, seed=1, methods=("pooled_few_shot", "gpdiff_few_shot"))
      >>> settings.data.support_days
      3
    """

    data_dir: str | None = None
    sources: tuple[str, ...] = ()
    target: str = ""
    interval_minutes: int = 60
    channels: str = "first"
    model: str = "stid"
    model_file_sha256: str | None = None  # of a model of the user's own: with another file it is another run
    seed: int = 0
    simulation: SimulationConfig | None = None
    data: DataConfig = DataConfig()
    prompts: PromptConfig = PromptConfig()
    pooled: PooledConfig = PooledConfig()
    trees: BoostedTreesConfig = BoostedTreesConfig()
    harvest: HarvestConfig = HarvestConfig()
    pretrain: PretrainConfig = PretrainConfig()
    generate: GenerateConfig = GenerateConfig()
    adapt: AdaptConfig = AdaptConfig()
    posterior: PosteriorConfig = PosteriorConfig()
    target_only: AdaptConfig = _from_random_weights()
    missing_above: float | None = None
    methods: tuple[str, ...] = ("default",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", choose_methods(self.methods))
        check_types(self)
        if not 0 <= self.seed < 2**31:
            raise InputError(f"`seed` must be at least 0 and below 2 ** 31, got {self.seed}")
        named = {"data_dir": self.data_dir, "sources": self.sources, "target": self.target}
        if self.missing_above is not None and not 0 <= self.missing_above < float("inf"):
            raise InputError(f"`missing_above` must be at least 0 and finite, got {self.missing_above}")
        for lacking in ("sources", "target"):
            if any(named.values()) and not named[lacking]:
                raise InputError(f"`{lacking}` is missing, the names of cities; without any, cities are simulated")
        if self.simulation is not None and any(named.values()):
            raise InputError("the settings name cities and a `simulation` of cities; leave one of the two out")
        for name in self.sources:
            if self.sources.count(name) > 1:
                raise InputError(f"`sources` names {name!r} twice; name every city once")
        if self.target in self.sources:
            raise InputError(f"target {self.target!r} is also a source; a target must not be trained on, leave it out")
        check_sampler(self.generate.sampler, self.pretrain.denoiser.schedule)
        parts = sum((SPATIAL_OF_PART[part] for part in self.prompts.parts), ())
        check_conditioning(self.pretrain.denoiser.conditioning, parts)

    @classmethod
    def from_preset(cls, preset: str, *, model: str | None = None, **changes: Any) -> "Settings":
        """The settings that a preset stands for.

        Args:
          preset: sizes: "tiny" to check the path, "demo" for some dozens of regions, "small" for hundreds on two cores,
            "paper" those of the published system (Yuan et al., arXiv 2402.11922, and its code), for an accelerator:
            its steps, batches and rates, tokens of the parameters themselves, and neither covariates nor functional
            loss. Losses and models stay this library's, and so does the protocol: see `DataConfig.protocol`.
          model: name of a registered model, or a Python file that registers one; the file is read. None is STGCN in
            "paper", else STID.
          **changes: fields of `Settings` to be others than the preset's. A configuration is taken whole: to change one
            number of the preset's, replace it in the preset's own, as below. Without names of cities, they are
            simulated.

        Returns:
          The settings.

        Raises:
          InputError: there is no such preset or field, or see `Settings`; or the model's file registers none.

        Example:
          >>> import dataclasses, gpdiff_jax as gpd
          >>> settings = gpd.Settings.from_preset("tiny", seed=1, methods=("default",))
          >>> data = dataclasses.replace(settings.data, covariates="calendar", support_days=2)
          >>> settings = dataclasses.replace(settings, data=data)
        """
        if preset not in PRESETS:
            raise InputError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}")
        model = model or _MODELS.get(preset, "stid")
        changes = {name: _checked(name, value) for name, value in changes.items()}
        if model.endswith(".py"):
            model, changes["model_file_sha256"] = read_model_file(model)
        if not any(changes.get(name) for name in ("data_dir", "sources", "target")):
            changes.setdefault("simulation", SimulationConfig(interval_minutes=changes.get("interval_minutes", 60)))
        sizes = _SIZES[preset]
        if preset == "paper":
            codec = CodecConfig(token_width=_PAPER_TOKEN_WIDTHS.get(model, 256), components=0)
            sizes = {**sizes, "pretrain": dataclasses.replace(sizes["pretrain"], codec=codec)}
        return cls(model=model, **{**sizes, **changes})

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


def _checked(name: str, value: Any) -> Any:
    """A field of `Settings` as a user gives it: a path becomes a string, a list of names a tuple.

    Raises:
      InputError: there is no such field, or it is of another type.
    """
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    if name not in fields:
        within = [
            one for one, default in fields.items() if hasattr(default, name) and dataclasses.is_dataclass(default)
        ]
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`Settings` lists its fields"
        raise InputError(f"the settings have no `{name}`; {f'it is a field of `{within[0]}`' if within else hint}")
    if dataclasses.is_dataclass(fields[name]) and type(value) is not type(fields[name]):
        raise InputError(f"`{name}` must be a {type(fields[name]).__name__}, got {type(value).__name__}")
    if name in ("sources", "methods"):
        if isinstance(value, str):
            raise InputError(f"`{name}` must be a tuple of names, got {value!r}")
        return tuple(value)
    if isinstance(fields[name], int):
        try:
            return operator.index(value)
        except TypeError as error:
            raise InputError(f"`{name}` must be a whole number, got {value!r}") from error
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "data": DataConfig(variants=4),
        "prompts": PromptConfig(
            temporal=TemporalConfig(width=16, heads=2, encoder_layers=1, steps=20, batch=16, evaluations=2),
            embedding=EmbeddingConfig(width=8, relation_width=4, epochs=5),
        ),
        "pooled": PooledConfig(steps=100, regions=16, evaluations=2),
        "trees": BoostedTreesConfig(trees=20, leaves=8, windows=8),
        "harvest": HarvestConfig(steps=40, evaluate_every=20, snapshots=2),
        "pretrain": PretrainConfig(
            denoiser=DenoiserConfig(width=32, layers=1), steps=40, batch=8, windows=4, evaluations=2
        ),
        "generate": GenerateConfig(samples=2, steps=5),
        "adapt": AdaptConfig(shared_steps=4, learning_rates=(1e-3,), steps=20),
        "target_only": _from_random_weights(learning_rates=(3e-3,), steps=40, evaluate_every=10),
    },
    "demo": {
        "pooled": PooledConfig(steps=500, evaluations=10),
        "harvest": HarvestConfig(steps=160),
        "pretrain": PretrainConfig(denoiser=DenoiserConfig(width=64, layers=2), steps=500, evaluations=10),
        "adapt": AdaptConfig(shared_steps=40, steps=80),
        "target_only": _from_random_weights(steps=160),
    },
    "small": {},
    # Yuan et al., arXiv 2402.11922, and the code beside it (tsinghua-fib-lab/GPD).
    "paper": {
        "data": DataConfig(covariates="none", support_days=7, scaling="span", near_days=0.0, damping=(1.0, 1.0)),
        "pooled": PooledConfig(averaging=0.0, mixing=0.0),
        # 30 epochs of some 50 batches.
        "harvest": HarvestConfig(
            init="random",
            steps=1500,
            windows=64,
            learning_rate=1e-4,
            evaluate_every=50,
            patience=30,
            snapshots=1,
            averaging=0.0,
            anchor_windows=0,
        ),
        "pretrain": PretrainConfig(
            denoiser=DenoiserConfig(width=512, layers=4, heads=8, schedule="linear"),
            steps=80_000,
            batch=64,
            learning_rate=8e-5,
            weight_decay=0.0,
            ema=0.995,
            functional_weight=0.0,
            prompt_dropout=0.0,
            prompt_noise=0.0,
            pure_noise_share=0.0,
        ),
        "generate": GenerateConfig(samples=1, steps=500, sampler="ddpm", shrinkage=1.0),
        # 600 epochs of the two batches of seven days of hours.
        "adapt": AdaptConfig(
            update="own",
            learning_rates=(1e-4,),
            steps=1200,
            evaluate_every=40,
            one_standard_error=False,
            seen_kinds_only=False,
        ),
    },
}


def _available(methods: tuple[str, ...]) -> tuple[str, ...]:
    return methods if has_lightgbm() else tuple(name for name in methods if name != "boosted_trees")


def choose_methods(words: Sequence[str]) -> tuple[str, ...]:
    """The methods that a list of names, "default" and "all" stands for, in the order of `METHODS`.

    Sets hold boosted trees where LightGBM is installed.

    Raises:
      InputError: it is empty or names something else.
    """
    of_sets = (_available(DEFAULT_METHODS), _available(METHODS))
    sets = dict(zip(METHOD_SETS, of_sets, strict=True)) | {name: (name,) for name in METHODS}
    if not words:
        raise InputError(f"`methods` is empty; name default, all, or some of {', '.join(METHODS)}")
    for word in words:
        if word not in sets:
            near = difflib.get_close_matches(word, sets, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use default, all, or some of {', '.join(METHODS)}"
            raise InputError(f"`methods` names {word!r}, which is no method; {hint}")
    chosen = {name for word in words for name in sets[word]}
    return tuple(name for name in METHODS if name in chosen)
