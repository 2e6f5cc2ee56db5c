"""In: a trained generator, prompts and the support days of a city. Out: parameters drawn in the light of those days.

The generator is the prior and the support days are the likelihood. At every step of the sampler, what the noisy latent
is expected to become moves down the gradient of its loss on the support windows, and the noise that it is thought to
hold stays (manifold preserving guidance, He et al., arXiv 2311.16424; with the gradient through the network as well it
would be diffusion posterior sampling, Chung et al., arXiv 2209.14687).
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.diffusion.denoiser import Denoiser
from gpdiff_jax.diffusion.drawing import Draws, draw_latents
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models.loss import masked_huber
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import ShardedRows, rows_side_by_side
from gpdiff_jax.training.stopwatch import stopwatch
from gpdiff_jax.transfer.adapt import adapt_together, check_directions
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.codes import city_means, share_of_windows, spread_windows
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.evaluate import MethodForecast, sampled_forecast
from gpdiff_jax.transfer.shared import check_tuned_room
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.codec import Codec

# Draws that the network works on at a time: more are no faster on a CPU, and take memory.
_DRAWS_SIDE_BY_SIDE = 32
# Entries of a latent vary by about one over the zoo. Steps too long for a city drive them apart, each further than the
# last, until no loss is finite; none leads further than this.
_LARGEST_LATENT = 8.0
_LARGEST_RATE = 1e30  # what single precision holds, with room for a gradient


@dataclasses.dataclass(frozen=True)
class PosteriorConfig:
    """How strongly draws follow the support days.

    All steps of a sampler together move every latent, whose entries vary by about one over the zoo, by at most `rate`
    times the gradient of the mean Huber loss on at most `windows` support windows, of which `own_share` is the region's
    own and the rest the mean over its city; each of them by its part. None of them moves an entry beyond 8.
    None of `rate` is 480 where windows have a profile and 1920 where they have none: there starts are further off, and
    draws have to follow the days further. `own_share` and the 480 were chosen by leaving out source cities
    (docs/experiments.md, section 35), the 1920 in five cities that are neither sources nor targets (section 52).
    """

    rate: float | None = None
    own_share: float = 0.5
    windows: int = 128

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "windows"))
        if self.rate is not None and not 0 <= self.rate <= _LARGEST_RATE:
            raise InputError(f"`rate` must be a number from 0 to {_LARGEST_RATE:g}, got {self.rate}")
        if not 0 <= self.own_share <= 1:
            raise InputError(f"`own_share` must be in [0, 1], got {self.own_share}")

    def strength(self, has_profile: bool) -> float:
        """The rate, where windows have a profile or none."""
        return (480.0 if has_profile else 1920.0) if self.rate is None else self.rate


def draw_posterior(
    hypernetwork: Hypernetwork,
    target: Target,
    prompts: Prompts,
    *,
    key: Key,
    generate: GenerateConfig = GenerateConfig(),
    config: PosteriorConfig = PosteriorConfig(),
    any_kind: bool = False,
    regions_per_batch: int | None = None,
) -> Params:
    """Draws parameters for every region from its prompt and its support days.

    With a `rate` of 0 they are those that `Hypernetwork.generate` draws with the same key, up to rounding. Where the
    support holds fewer windows than days that were read throughout, steps are shorter by as much, as in `codes`.

    Args:
      hypernetwork: the generator, trained on other cities.
      target: the city and its support days.
      prompts: of its regions, one variant.
      key: random key; a sample's number and a region's id are folded in.
      generate: samples, sampler, steps, classifier-free guidance and shrinkage.
      config: how strongly the support days are followed.
      any_kind: see `Hypernetwork.generate`.
      regions_per_batch: gradients that a device works on at a time; None for what suits it. Its latents of all draws a
        device holds at once.

    Returns:
      Leaves [K, R, ...]. A region without a visible reading moves with its city.

    Raises:
      InputError: see `Hypernetwork.generate`.
    """
    draws = hypernetwork.draws(prompts, generate.samples, any_kind=any_kind)
    hypernetwork.check_sampler(generate.sampler)
    starts = spread_windows(target, config.windows)
    shared = (
        target.bare,
        hypernetwork.variables,
        hypernetwork.codec,
        key,
        starts,
        np.float32(config.strength(target.bank.has_profile) / generate.steps * share_of_windows(target)),
        np.float32(config.own_share),
    )
    regions = target.num_regions
    numbers = np.arange(generate.samples * regions, dtype=np.int32)
    kept = generate.kept(hypernetwork.data.covariates)
    how = (generate.samples, generate.sampler, generate.steps, generate.guidance, kept)
    network, batch = cast(Hashable, hypernetwork.denoiser), rows_side_by_side(regions_per_batch)
    spread = ShardedRows(_make_draw(hypernetwork.model, network, *how, batch), shared, joint=True)
    drawn = spread((draws, numbers)).read()
    return jax.tree.map(lambda leaf: leaf.reshape(-1, regions, *leaf.shape[1:]), drawn)


def posterior_shot(
    hypernetwork: Hypernetwork,
    target: Target,
    prompts: Prompts,
    prior: Params,
    *,
    key: Key,
    generate: GenerateConfig = GenerateConfig(),
    config: PosteriorConfig = PosteriorConfig(),
    adapt: AdaptConfig = AdaptConfig(),
) -> MethodForecast:
    """Forecasts the test span by parameters that are drawn in the light of the support days, and moved together.

    Args:
      hypernetwork: the generator, trained on other cities.
      target: the city and its support days.
      prompts: of its regions, one variant.
      prior: what the generator draws with this key from the prompts alone, leaves [K, R, ...]; with
        `adapt.seen_kinds_only` it forecasts the kinds of day that the support lacks (`damped.on_seen_kinds`).
      key: random key.
      generate: see `draw_posterior`.
      config: see `draw_posterior`.
      adapt: of which the steps that are shared by the city count, their number chosen from the prior; where windows
        have no profile and `update` is "codes", the steps in codes after them; `seen_kinds_only`; and how many regions
        are worked on at a time.

    Returns:
      The forecasts, averaged over the K samples.

    Raises:
      InputError: see `draw_posterior`; or the generator holds no directions for steps in codes.
      NotFiniteError: a loss of the steps that the city shares or of those in codes, or its gradient, is not finite.
      NoRoomError: the parameters would not fit beside those of the prior.
    """
    in_codes = adapt.update == "codes" and not target.bank.has_profile
    after = dataclasses.replace(adapt, update="codes" if in_codes else "shared")
    check_directions(after, hypernetwork.directions)
    check_tuned_room(prior)
    with stopwatch() as watch:
        how: Any = {"generate": generate, "config": config, "regions_per_batch": adapt.regions_per_batch}
        drawn = draw_posterior(hypernetwork, target, prompts, key=key, any_kind=True, **how)
        known = {"directions": hypernetwork.directions, "blind_params": prior}
        tuned = adapt_together(hypernetwork.model, after, target, drawn, key=key, **known)
        before = prior if adapt.seen_kinds_only else None
        forecast, spread = sampled_forecast(hypernetwork.model, target, tuned.params, before)
    made = MethodForecast(
        forecast, spread, watch.seconds, shared_steps=tuned.shared_steps, shared_rate=tuned.shared_rate
    )
    return made._replace(learning_rate=tuned.learning_rate, steps=tuned.steps) if in_codes else made


@bounded_cache(16)
def _make_draw(
    model: Model,
    denoiser: Any,
    samples: int,
    sampler: str,
    steps: int,
    guidance: float,
    shrinkage: float,
    side_by_side: int,
) -> Callable[[tuple, tuple], Params]:
    network = cast(Denoiser, denoiser)

    def loss(latent: Float[Array, "Z D"], shared: tuple, region: Int[Array, ""]) -> Float[Array, ""]:
        target, _, codec, _, starts, *_ = shared
        graph, windows = region_windows(target, region, starts)
        forecast = target_forecast(model, target, codec.params(latent, shrinkage), graph, windows)
        return masked_huber(forecast, windows.target, windows.mask)

    def draw(shared: tuple, rows: tuple[Draws, Int[Array, " X"]]) -> Params:
        (target, variables, codec, key, _, rate, own_share), (draws, numbers) = shared, rows
        assert isinstance(codec, Codec)
        regions, batch_size = numbers % target.num_regions, side_by_side if side_by_side > 1 else None

        def gradient(row: tuple) -> Float[Array, "Z D"]:
            return jax.grad(loss)(row[0], shared, row[1])

        def steer(x0: Float[Array, "X Z D"]) -> Float[Array, "X Z D"]:
            own = jax.lax.map(gradient, (x0, regions), batch_size=batch_size)
            flat = own.reshape(len(numbers), -1)
            of_city = city_means(flat, numbers // target.num_regions, samples, target.num_regions).reshape(own.shape)
            moved = x0 - rate * (own_share * own + (1.0 - own_share) * of_city)
            # What the network itself thinks to be further off stays.
            return jnp.clip(moved, jnp.minimum(x0, -_LARGEST_LATENT), jnp.maximum(x0, _LARGEST_LATENT))

        how: Any = {"sampler": sampler, "steps": steps, "guidance": guidance, "side_by_side": _DRAWS_SIDE_BY_SIDE}
        mask = jnp.asarray(codec.mask())
        latents = draw_latents(network, variables, mask, draws, key=key, steer=steer, **how)
        return jax.lax.map(functools.partial(Codec.params, codec, shrinkage=shrinkage), latents)

    return draw
