"""In: prompts of regions. Out: parameters for them, by the trained generator as one object: save, load, generate."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, make_denoiser
from gpdiff_jax.diffusion.drawing import Draws, draw_latents
from gpdiff_jax.diffusion.samplers import SAMPLERS, check_sampler
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.hypernetwork_folder import CODEC_ARRAYS, FORMAT, read_fields
from gpdiff_jax.models.protocol import Model, ModelSizes
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.prompts.encoders import PromptEncoder, plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler, scale_prompts, target_prompts
from gpdiff_jax.region_parameters import RegionParameters
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.memory import check_room
from gpdiff_jax.training.parallel import map_chunks
from gpdiff_jax.training.storage import in_half, save_arrays
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.codec import Codec
from gpdiff_jax.zoo.tokens import from_tokens

# Draws that a device makes at a time; with another number they would differ by rounding.
_DRAWS_ON_CPU = 32
_DRAWS = 256


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How parameters are drawn: K samples per region, guidance (0 ignores the prompt, 1 follows it), sampler and steps.

    The sampler is one of `samplers.SAMPLERS`; "euler" needs a generator trained along the rectified flow. `shrinkage`
    is the part of every generated difference from the pooled model that is kept, 0 to 1. None goes by the covariates of
    the forecaster (`kept`): half of it with `profile`, else all, as was best in cities that no generator saw
    (docs/experiments.md, sections 35 and 51).
    """

    samples: int = 5
    steps: int = 20
    guidance: float = 1.0
    sampler: str = "ddim"
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "samples", "steps"))
        if not 0 <= self.guidance <= 10:
            raise InputError(f"`guidance` must be in [0, 10], got {self.guidance}")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise InputError(f"`shrinkage` must be in [0, 1], got {self.shrinkage}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")

    def kept(self, covariates: str) -> float:
        """The part of a difference that is kept where the forecaster's windows have these covariates.

        Example:
          >>> import gpdiff_jax as gpd
          >>> gpd.GenerateConfig().kept("profile"), gpd.GenerateConfig(shrinkage=0.75).kept("profile")
          (0.5, 0.75)
        """
        if self.shrinkage is not None:
            return self.shrinkage
        return 0.5 if covariates == "profile" else 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Hypernetwork:
    """Everything that a new city needs: denoiser, codec with the pooled model, what makes prompts, and their scale.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> hypernetwork = gpd.Hypernetwork.load("runs/hangzhou/hypernetwork")  # doctest: +SKIP
      >>> prompts = hypernetwork.prompts(city)  # doctest: +SKIP
      >>> parameters = hypernetwork.generate(prompts, key=jax.random.key(0))  # doctest: +SKIP
    """

    model_name: str
    sizes: ModelSizes
    data: DataConfig
    denoiser_config: DenoiserConfig
    variables: dict
    codec: Codec
    prompt_scaler: PromptScaler
    prompt_names: tuple[str, ...]
    prompt_spatial: tuple[int, ...] = ()  # of its entries, see `Prompts.spatial`
    prompt_encoder: PromptEncoder = dataclasses.field(default_factory=plain_encoder)
    interval_minutes: int | None = None  # of the cities it was trained on; None where that is not known
    kinds: tuple[str, ...] | None = None  # of the cities it was trained on; None where that is not known
    speed_units: tuple[str, ...] = ()  # of those of them that read speeds, as far as known
    identity: str | None = None  # of the training that made it; None where that is not known
    directions: Params | None = None  # of the zoo, leaves [n, ...], along which parameters are fine-tuned
    residuals: Float[Array | np.ndarray, "P X"] | None = None  # of the sources, see `zoo.residuals.source_residuals`

    def __repr__(self) -> str:
        """What it is, without its numbers."""
        return f"<Hypernetwork {self.summary()}>"

    @property
    def model(self) -> Model:
        """The forecaster whose parameters are generated."""
        return make_model(self.model_name, self.sizes)

    @property
    def pooled(self) -> Params:
        """Parameters of the pooled model, which every generated vector differs from."""
        return from_tokens(self.codec.layout, self.codec.pooled_tokens)

    def prompts(self, city: City, *, adaptation_only: bool = False, any_kind: bool = False) -> Prompts:
        """Prompts of all regions of a city that this generator was not trained on, from its support days.

        Args:
          city: a one-channel city of the interval that the generator was trained with.
          adaptation_only: see `target_prompts`.
          any_kind: take a city of another kind than those that the generator was trained on.

        Returns:
          float32 [1, N, E].

        Raises:
          InputError: the city has another interval or kind than those that the generator was trained on; see
            `target_prompts`.
        """
        if len(city.feature_names) > 1:
            raise InputError(
                f"city {city.name!r} has {len(city.feature_names)} channels; select one of {city.feature_names} by "
                "`select_channels(city, NAME)[0]`"
            )
        self.check_city(label_of(city), any_kind=any_kind)
        data = self.data
        return target_prompts(
            city,
            support_days=data.support_days,
            history=data.history,
            horizon=data.horizon,
            encoder=self.prompt_encoder,
            adaptation_only=adaptation_only,
            protocol=data.protocol,
        )

    def check_city(self, city: CityLabel, *, any_kind: bool = False) -> None:
        """Refuses a city of another interval, kind or unit of speed than those that the generator was trained on.

        Args:
          city: its label.
          any_kind: take cities of every kind; units still have to agree.

        Raises:
          InputError: names both.
        """
        if self.interval_minutes not in (None, city.interval_minutes):
            raise InputError(
                f"the generator was trained on readings of {self.interval_minutes} minutes and city {city.name!r} has "
                f"readings of {city.interval_minutes}; `resample` it to {self.interval_minutes}"
            )
        if not any_kind and self.kinds is not None and city.kind not in self.kinds:
            raise InputError(
                f"the generator was trained on cities of kind {', '.join(self.kinds)} and city {city.name!r} is of "
                f"kind {city.kind}; take a generator of that kind, or allow it by `any_kind` (--any_kind)"
            )
        if self.speed_units and city.speed_unit not in (None, *self.speed_units):
            raise InputError(
                f"the generator was trained on speeds in {', '.join(self.speed_units)} and city {city.name!r} has "
                f"{city.channel!r}, in {city.speed_unit}; convert its readings and rename the channel"
            )

    def generate(
        self,
        prompts: Prompts,
        *,
        key: Key,
        config: GenerateConfig = GenerateConfig(),
        devices: Sequence[Device] | None = None,
        any_kind: bool = False,
    ) -> RegionParameters:
        """Draws parameters for every region from its prompt, the same to the bit on any number of devices of a kind.

        Args:
          prompts: of R regions, one variant, as `prompts(city, ...)` makes them; of `prompts.null` nothing but the
            regions is used.
          key: random key; a sample's is folded in from its number.
          config: samples, sampler, steps, guidance and shrinkage.
          devices: to spread the draws over; None for all local ones.
          any_kind: generate for cities of other kinds than those that the generator was trained on.

        Returns:
          K parameter vectors for every region.

        Raises:
          InputError: the prompts hold other entries than those the generator was trained with, several variants of
            every region, or a city of another interval or kind; or the sampler does not go with its schedule.
        """
        draws = self.draws(prompts, config.samples, any_kind=any_kind)
        self.check_sampler(config.sampler)
        how = config.sampler, config.steps, config.guidance, config.kept(self.data.covariates)
        draw = _make_draw(cast(Hashable, self.denoiser), *how)
        size = _DRAWS_ON_CPU if jax.default_backend() == "cpu" else _DRAWS
        regions = len(prompts.region_ids)
        weights = sum(self.codec.layout.filled)
        for device in (None, jax.local_devices()[0]):  # they are joined on the host, and lie on the device
            what = f"the parameters of {regions} regions, {config.samples} times {weights} weights each,"
            check_room(4 * config.samples * regions * weights, what, device)
        params = map_chunks(draw, (self.variables, self.codec, key), draws, size=size, devices=devices)
        stacked = jax.device_put(jax.tree.map(lambda leaf: leaf.reshape(config.samples, -1, *leaf.shape[1:]), params))
        city = prompts.cities[0] if len(prompts.cities) == 1 else None
        return RegionParameters(stacked, self.model_name, self.data, city, self.directions, self.residuals)

    @property
    def denoiser(self) -> Denoiser:
        """The network, without its variables."""
        return make_denoiser(self.denoiser_config, self.codec, self.prompt_spatial)

    def check_sampler(self, sampler: str) -> None:
        """Raises `InputError` for a sampler that does not exist or does not go with the generator's schedule."""
        check_sampler(sampler, self.denoiser_config.schedule)

    def draws(self, prompts: Prompts, samples: int, *, any_kind: bool = False) -> Draws:
        """What draws are made of: K of all regions, one after another.

        Args:
          prompts: of R regions, one variant.
          samples: K.
          any_kind: see `generate`.

        Returns:
          Rows on the host, K x R of them.

        Raises:
          InputError: see `generate`.
        """
        for city in prompts.cities:
            self.check_city(city, any_kind=any_kind)
        if prompts.values.shape[0] != 1:
            raise InputError(
                f"the prompts hold {prompts.values.shape[0]} variants of every region, and parameters are generated "
                "from one; choose it by `prompts.variant(index)`"
            )
        if prompts.names != self.prompt_names:
            odd = sorted(set(prompts.names) ^ set(self.prompt_names)) or ["the order of entries", prompts.names[0]]
            raise InputError(f"the prompts and the generator differ in {odd[:3]}; make the prompts with this version")
        scaled = np.asarray(scale_prompts(prompts, self.prompt_scaler))[0]
        count, mask = len(scaled), np.ones(len(scaled)) if prompts.mask is None else np.asarray(prompts.mask)
        columns: Any = (
            np.repeat(np.arange(samples), count),
            np.tile(np.asarray(prompts.region_ids), samples),
            np.tile(scaled, (samples, 1)),
            np.tile(mask.astype(np.float32), samples),
        )
        return Draws(*columns)

    def save(self, folder: str | pathlib.Path, *, half: bool = False, directions: int | None = None) -> None:
        """Writes the generator into a folder, whole or not at all.

        Args:
          folder: where; what it holds is replaced.
          half: write weights and the bases of latents with 16 bits, to be read back with 32: for a package.
          directions: of the zoo, how many are kept; None for all.

        Raises:
          InputError: a weight is too large for 16 bits.
        """
        arrays = {
            "variables": self.variables,
            "codec": {name: getattr(self.codec, name) for name in CODEC_ARRAYS}
            | {"basis": {str(layer): rows for layer, rows in enumerate(self.codec.basis) if len(rows)}},
            "prompts": {"mean": self.prompt_scaler.mean, "std": self.prompt_scaler.std},
            "pooled": self.pooled,
            "prompt_encoder": self.prompt_encoder.arrays(),
        }
        kept = None if self.directions is None else jax.tree.map(lambda leaf: leaf[:directions], self.directions)
        more = {"directions": kept, "residuals": self.residuals}
        arrays |= {name: value for name, value in more.items() if value is not None}
        if half:
            arrays |= {name: in_half(arrays[name]) for name in ("variables", "directions") if name in arrays}
            arrays["codec"] = arrays["codec"] | {"basis": in_half(arrays["codec"]["basis"])}
        facts = {
            "format": FORMAT,
            "model": self.model_name,
            "sizes": self.sizes._asdict(),
            "data": dataclasses.asdict(self.data),
            "denoiser": dataclasses.asdict(self.denoiser_config),
            "layout": self.codec.layout.as_json(),
            "components": bool(self.codec.basis),
            "space": self.codec.space,
            "prompt_names": self.prompt_names,
            "prompt_spatial": self.prompt_spatial,
            "prompt_encoder": self.prompt_encoder.facts(),
            "interval_minutes": self.interval_minutes,
            "kinds": self.kinds,
            "speed_units": self.speed_units,
            "identity": self.identity,
        }
        save_arrays(pathlib.Path(folder), arrays, facts)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Hypernetwork":
        """Reads a generator back.

        Raises:
          InputError: there is none, or it is damaged, or of another format; or its parts do not go together, or not
            with the model as it is today, as far as that is registered; or a value is not finite.
        """
        return cls(**read_fields(folder))

    def summary(self) -> str:
        """What the generator is, in a few lines."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.variables))
        return json.dumps(
            {
                "model": self.model_name,
                "model_parameters": int(self.codec.layout.mask().sum()),
                "tokens": [self.codec.layout.num_tokens, self.codec.layout.width],
                "layers": list(self.codec.layout.layers),
                "denoiser_parameters": count,
                "conditioning": self.denoiser_config.conditioning,
                "schedule": self.denoiser_config.schedule,
                "objective": self.denoiser_config.objective,
                "computes_in": self.denoiser_config.compute_dtype.name,
                "prompt_parts": list(self.prompt_encoder.config.parts),
                "prompt_width": len(self.prompt_names),
                "covariates": self.data.covariates,
                "support_days": self.data.support_days,
                "window_days": self.data.window_days,
                "interval_minutes": self.interval_minutes,
                "kinds": self.kinds,
            }
        )


@bounded_cache(32)
def _make_draw(
    denoiser: Any, sampler: str, steps: int, guidance: float, shrinkage: float
) -> Callable[[tuple[Params, Codec, Key], Draws], Params]:
    """Parameters of X draws."""

    def draw(shared: tuple[Params, Codec, Key], draws: Draws) -> Params:
        variables, codec, key = shared
        how: Any = {"sampler": sampler, "steps": steps, "guidance": guidance}
        latents = draw_latents(denoiser, variables, jnp.asarray(codec.mask()), draws, key=key, **how)
        return jax.vmap(functools.partial(Codec.params, codec, shrinkage=shrinkage))(latents)

    return draw
