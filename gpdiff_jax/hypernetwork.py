"""In: prompts of regions. Out: parameters for them, by the trained generator as one object: save, load, generate."""

import dataclasses
import json
import pathlib
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gpdiff_jax.checkpoint import load_arrays, save_arrays
from gpdiff_jax.cities.city import City
from gpdiff_jax.codec import Codec
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.diffusion.objectives import Denoised, denoised
from gpdiff_jax.diffusion.samplers import SAMPLERS, check_sampler, guided, sample
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model, ModelSizes, make_model
from gpdiff_jax.prompts.encoders import PromptEncoder, plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler, prompts, scale_prompts
from gpdiff_jax.sources import DataConfig
from gpdiff_jax.tokens import from_tokens, make_layout
from gpdiff_jax.typing import Key, Params

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How parameters are drawn: K samples per region, guidance (0 ignores the prompt, 1 follows it), sampler and steps.

    The sampler is one of `samplers.SAMPLERS`; "euler" needs a generator trained along the rectified flow.
    """

    samples: int = 5
    steps: int = 20
    guidance: float = 1.0
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        for name in ("samples", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.guidance <= 10:
            raise InputError(f"`guidance` must be in [0, 10], got {self.guidance}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")


@flax.struct.dataclass
class RegionParameters:
    """K parameter vectors for each of R regions, with what is needed to forecast with them."""

    params: Params  # leaves [K, R, ...]
    model: str = flax.struct.field(pytree_node=False)
    data: DataConfig = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Hypernetwork:
    """Everything that a new city needs: the denoiser, the codec with the base, what makes prompts and their scale."""

    model_name: str
    sizes: ModelSizes
    data: DataConfig
    denoiser_config: DenoiserConfig
    variables: dict
    codec: Codec
    prompt_scaler: PromptScaler
    prompt_names: tuple[str, ...]
    prompt_encoder: PromptEncoder = dataclasses.field(default_factory=plain_encoder)

    @property
    def model(self) -> Model:
        """The forecaster whose parameters are generated."""
        return make_model(self.model_name, self.sizes)

    @property
    def base(self) -> Params:
        """Parameters of the pooled base, which every generated vector differs from."""
        return from_tokens(self.codec.layout, self.codec.base)

    def prompts(self, city: City) -> Prompts:
        """Prompts of all regions of a city that this generator was not trained on, from its support days.

        Args:
          city: a one-channel city of the interval that the generator was trained with.

        Returns:
          float32 [1, N, E].

        Raises:
          InputError: see `prompts.prompts`.
        """
        data = self.data
        return prompts(
            city,
            support_days=data.support_days,
            history=data.history,
            horizon=data.horizon,
            encoder=self.prompt_encoder,
        )

    def generate(self, prompts: Prompts, *, key: Key, config: GenerateConfig = GenerateConfig()) -> RegionParameters:
        """Draws parameters for every region from its prompt.

        Args:
          prompts: of R regions, as `prompts(city, ...)` makes them; of `prompts.null` nothing but the regions is used.
          key: random key; a sample's is folded in from its number.
          config: samples, sampler, steps and guidance.

        Returns:
          K parameter vectors for every region.

        Raises:
          InputError: the prompts hold other entries than those the generator was trained with, or the sampler does not
            go with its schedule.
        """
        if prompts.names != self.prompt_names:
            odd = sorted(set(prompts.names) ^ set(self.prompt_names)) or ["the order of entries", prompts.names[0]]
            raise InputError(f"the prompts and the generator differ in {odd[:3]}; make the prompts with this version")
        check_sampler(config.sampler, self.denoiser_config.schedule)
        denoiser = make_denoiser(self.denoiser_config, self.codec, self.prompt_names)
        told = scale_prompts(prompts, self.prompt_scaler)[0]
        mask = jnp.asarray(self.codec.mask())
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(config.samples))
        given = jnp.ones(told.shape[0]) if prompts.told is None else prompts.told.astype(jnp.float32)
        codes = _sample(
            denoiser,
            config.sampler,
            config.steps,
            config.guidance,
            self.variables,
            mask,
            told,
            given,
            prompts.region_ids,
            keys,
        )
        return RegionParameters(jax.vmap(jax.vmap(self.codec.params))(codes), self.model_name, self.data)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the generator into a folder, whole or not at all."""
        arrays = {
            "variables": self.variables,
            "codec": {
                "base": self.codec.base,
                "mean": self.codec.mean,
                "spread": self.codec.spread,
                "basis": {str(layer): rows for layer, rows in enumerate(self.codec.basis)},
            },
            "prompts": {"mean": self.prompt_scaler.mean, "std": self.prompt_scaler.std},
            "base": self.base,
            "prompt_encoder": self.prompt_encoder.arrays(),
        }
        facts = {
            "format": _FORMAT,
            "model": self.model_name,
            "sizes": self.sizes._asdict(),
            "data": dataclasses.asdict(self.data),
            "denoiser": dataclasses.asdict(self.denoiser_config),
            "token_width": self.codec.layout.width,
            "components": len(self.codec.basis),
            "prompt_names": self.prompt_names,
            "prompt_encoder": self.prompt_encoder.facts(),
        }
        save_arrays(pathlib.Path(folder), arrays, facts)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Hypernetwork":
        """Reads a generator back.

        Raises:
          InputError: there is none, or it is damaged, or of another format.
        """
        arrays, facts = load_arrays(pathlib.Path(folder), _FORMAT, "hypernetwork")
        arrays = jax.tree.map(jnp.asarray, arrays)
        codec = arrays["codec"]
        return cls(
            model_name=facts["model"],
            sizes=ModelSizes(**facts["sizes"]),
            data=DataConfig(**facts["data"]),
            denoiser_config=DenoiserConfig(**facts["denoiser"]),
            variables=arrays["variables"],
            codec=Codec(
                base=codec["base"],
                mean=codec["mean"],
                spread=codec["spread"],
                basis=tuple(codec["basis"][str(layer)] for layer in range(facts["components"])),
                layout=make_layout(arrays["base"], facts["token_width"]),
            ),
            prompt_scaler=PromptScaler(**arrays["prompts"]),
            prompt_names=tuple(facts["prompt_names"]),
            prompt_encoder=PromptEncoder.from_arrays(arrays.get("prompt_encoder") or {}, facts["prompt_encoder"]),
        )

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
                "prompt_parts": list(self.prompt_encoder.config.parts),
                "prompt_width": len(self.prompt_names),
                "covariates": self.data.covariates,
                "support_days": self.data.support_days,
            }
        )


@partial(jax.jit, static_argnames=("denoiser", "sampler", "steps", "guidance"))
def _sample(
    denoiser: Denoiser,
    sampler: str,
    steps: int,
    guidance: float,
    variables: dict,
    mask: Float[Array, "L W"],
    prompt: Float[Array, "R E"],
    given: Float[Array, " R"],
    region_ids: UInt32[Array, " R"],
    keys: Key,
) -> Float[Array, "K R L W"]:
    """Codes of every region, one sample after another; a region's noise comes from the sample's key and its own id."""
    regions = prompt.shape[0]

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        time = jnp.broadcast_to(t, (regions,))
        told = denoise(denoiser, variables, x_t, time, prompt, given)
        if guidance != 1.0:
            told = guided(told, denoise(denoiser, variables, x_t, time, prompt, jnp.zeros(regions)), guidance)
        return denoised(denoiser.config.objective, SCHEDULES[denoiser.config.schedule](t), x_t, told * mask[None])

    def one_sample(key: Key) -> jax.Array:
        own_keys = jax.vmap(lambda region: jax.random.fold_in(key, region))(region_ids)

        def normal(keys: Key) -> jax.Array:
            return jax.vmap(lambda key: jax.random.normal(key, mask.shape))(keys) * mask[None]

        def draw(step: jax.Array) -> jax.Array:
            return normal(jax.vmap(lambda own: jax.random.fold_in(own, step))(own_keys))

        return sample(sampler, denoiser.config.schedule, denoise_fn, normal(own_keys), steps, draw)

    return jax.lax.map(one_sample, keys)
