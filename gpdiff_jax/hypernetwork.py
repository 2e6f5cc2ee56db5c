"""In: a parameter zoo. Out: the trained generator as one object: pretrain, save, load, generate."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from gpdiff_jax.checkpoint import load_arrays, save_arrays
from gpdiff_jax.cities.city import City
from gpdiff_jax.codec import Codec, encode_zoo, fit_codec
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.diffusion.objectives import Denoised, denoised
from gpdiff_jax.diffusion.samplers import SAMPLERS, check_sampler, guided, sample
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.diffusion.training import PretrainConfig, ZooCodes, held_out_regions, train_denoiser
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model, ModelSizes, make_model
from gpdiff_jax.prompts.encoders import PromptEncoder, plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler, fit_prompt_scaler, prompts, scale_prompts
from gpdiff_jax.sources import DataConfig, Sources
from gpdiff_jax.tokens import TokenLayout, from_tokens, make_layout, to_tokens
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo import ParameterZoo

_FORMAT = 2
_MOST_VECTORS = 2048  # that the statistics of the codes are made from


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


def best_tokens(zoo: ParameterZoo, layout: TokenLayout) -> Float[np.ndarray, "R L W"]:
    """Tokens of the best parameter vector of every region of a zoo, unscaled."""
    tokens = np.zeros((zoo.num_regions, layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        tokens[rows] = _tokens(layout, jax.tree.map(lambda leaf: leaf[:, 0], params))
    return tokens


def _tokens(layout: TokenLayout, params: Params) -> Float[np.ndarray, "X L W"]:
    return np.asarray(jax.vmap(partial(to_tokens, layout))(jax.tree.map(jnp.asarray, params)))


def _sample_tokens(
    zoo: ParameterZoo, layout: TokenLayout, odds: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "X L W"], Float[np.ndarray, " X"]]:
    """Tokens of at most `_MOST_VECTORS` evenly spaced vectors of regions with odds above 0, and their weights."""
    vectors = zoo.validation_mae.shape[1]
    candidates = np.flatnonzero(np.repeat(odds > 0, vectors))
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(len(candidates), _MOST_VECTORS)).round().astype(int)]
    tokens = np.zeros((len(chosen), layout.num_tokens, layout.width), np.float32)
    for rows, params in zoo.vectors.parts():
        place_of_row = np.full(zoo.num_regions, -1)
        place_of_row[rows] = np.arange(len(rows))
        here = np.flatnonzero(place_of_row[chosen // vectors] >= 0)
        if len(here):
            at = place_of_row[chosen[here] // vectors], chosen[here] % vectors
            tokens[here] = _tokens(layout, jax.tree.map(lambda leaf, at=at: leaf[at], params))
    return tokens, odds[chosen // vectors]


def _encode_parts(zoo: ParameterZoo, codec: Codec) -> Float[np.ndarray, "R M rows width"]:
    """Codes of all vectors, a part of the zoo at a time."""
    codes = np.zeros((*zoo.validation_mae.shape, *codec.mask().shape), np.float32)
    encode = jax.jit(lambda params: encode_zoo(codec, jax.vmap(jax.vmap(partial(to_tokens, codec.layout)))(params)))
    for rows, params in zoo.vectors.parts():
        codes[rows] = np.asarray(encode(jax.tree.map(jnp.asarray, params)))
    return codes


def choice_regions(sources: Sources, config: PretrainConfig, *, key: Key) -> Bool[np.ndarray, " R"]:
    """The source regions that `pretrain` with this configuration and key does not train on, but chooses on."""
    return held_out_regions(sources, config.held_out_share, key=jax.random.split(key)[0])


def encode_training_set(
    zoo: ParameterZoo, codec: Codec, prompt_scaler: PromptScaler, held_out: Bool[np.ndarray, " R"]
) -> ZooCodes:
    """Codes and scaled prompts of a zoo, every city drawn equally often, held-out regions never."""
    return ZooCodes(
        x0=jnp.asarray(_encode_parts(zoo, codec)),
        prompts=scale_prompts(zoo.prompts, prompt_scaler),
        odds=jnp.asarray(_odds(zoo, held_out), jnp.float32),
        prompt_names=zoo.prompts.names,
    )


def _odds(zoo: ParameterZoo, held_out: Bool[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    return np.where(held_out, 0.0, 1.0 / np.bincount(zoo.city_index)[zoo.city_index])


def pretrain(
    zoo: ParameterZoo,
    *,
    key: Key,
    config: PretrainConfig = PretrainConfig(),
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Hypernetwork:
    """Trains the generator on a zoo.

    Args:
      zoo: harvested parameters and prompts, with the sources attached, whose readings the functional loss needs.
      key: random key.
      config: sizes and weights.
      progress: called with (steps done, metrics).

    Returns:
      The generator.

    Raises:
      InputError: the zoo has no sources, or they name different regions, or its prompts lack a part that the
        conditioning needs.
      FloatingPointError: the loss is not finite.
    """
    sources = zoo.sources
    if sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    if zoo.names != sources.names:
        raise InputError("the zoo and the source cities name different regions; harvest again from these cities")
    if zoo.prompts.names != sources.prompts.names:
        raise InputError("the prompts of the zoo and of the sources have other parts; attach sources `with_prompts`")
    layout = make_layout(zoo.base, config.codec.token_width)
    held_out = choice_regions(sources, config, key=key)
    train_key = jax.random.split(key)[1]
    tokens, weights = _sample_tokens(zoo, layout, _odds(zoo, held_out))
    codec = fit_codec(layout, np.asarray(to_tokens(layout, zoo.base)), tokens, weights, config.codec.components)
    prompt_scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    training_set = encode_training_set(zoo, codec, prompt_scaler, held_out)
    model = make_model(zoo.model, sources.sizes)
    variables = train_denoiser(model, sources, training_set, codec, held_out, config, key=train_key, progress=progress)
    return Hypernetwork(
        model_name=zoo.model,
        sizes=sources.sizes,
        data=sources.config,
        denoiser_config=config.denoiser,
        variables=variables,
        codec=codec,
        prompt_scaler=prompt_scaler,
        prompt_names=zoo.prompts.names,
        prompt_encoder=sources.prompt_encoder or plain_encoder(),
    )
