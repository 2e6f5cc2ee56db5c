"""In: a zoo whose latents follow from the prompt. Out: the deterministic network learns it, chosen as promised."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.baselines.mlp_hypernetwork import MlpHypernetwork, mlp_hypernetwork
from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.losses import DiffusionBatch, functional_losses
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import make_model, registry
from gpdiff_jax.pretraining import LatentSpace, fit_latent_space
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo
from gpdiff_jax.zoo.tokens import to_tokens
from tests.tiny import scale_and_bias

_CONFIG = PretrainConfig(
    denoiser=DenoiserConfig(width=32, layers=1, heads=2, prompt_bottleneck=8),
    steps=400,
    batch=16,
    windows=2,
    learning_rate=1e-2,
    weight_decay=0.0,
    functional_weight=0.0,
    prompt_noise=0.0,
    evaluations=4,
    held_out_share=0.2,
)
_KEY, _VALIDATION = jax.random.key(2), "validation_loss"


@pytest.fixture(scope="module", autouse=True)
def _linear_is_registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "linear", functools.cache(scale_and_bias))
        yield


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    data = DataConfig(covariates="none", variants=3, max_neighbours=2)
    cities = simulated_cities[:2]
    return with_prompts(prepare_sources(cities, data, key=jax.random.key(0), validation_windows=4), cities)


@pytest.fixture(scope="module", name="problem")
def _problem(sources: Sources) -> tuple[ParameterZoo, LatentSpace]:
    """Parameters that follow two of four prompt entries; no noise, so every region is predictable."""
    rng = np.random.default_rng(0)
    described = np.repeat(rng.normal(size=(1, 16, 4)), 3, axis=0)
    params = {
        "bias": (0.3 * described[0, :, :1] * np.ones((16, 6))).astype(np.float32)[:, None],
        "scale": (0.5 + 0.3 * described[0, :, 1:2] * np.ones((16, 6))).astype(np.float32)[:, None],
    }
    pooled = {"bias": jnp.zeros(6), "scale": jnp.full(6, 0.5)}
    names = ("a", "b", "c", "d")
    zoo = ParameterZoo(
        model="linear",
        pooled=pooled,
        vectors=HeldVectors(params),
        validation_mae=np.ones((16, 1), np.float32),
        start_mae=np.ones(16, np.float32),
        step=np.ones((16, 1), np.int32),
        seed=np.zeros((16, 1), np.int32),
        data_window=np.zeros((16, 1), np.int32),
        prompts=Prompts(jnp.asarray(described, jnp.float32), sources.region_ids, names),
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=dataclasses.replace(
            sources, prompts=Prompts(jnp.asarray(described, jnp.float32), sources.region_ids, names)
        ),
    )
    return zoo, fit_latent_space(zoo, _CONFIG, key=jax.random.key(5))


def _gap(made: MlpHypernetwork, zoo: ParameterZoo, rows: np.ndarray) -> tuple[float, float]:
    """Mean squared error of the parameters, of the network and of the zoo's mean."""
    got = made.params(zoo.prompts.variant(0))
    pairs = [(np.asarray(got[name])[rows], zoo.params[name][:, 0]) for name in ("bias", "scale")]
    return (
        float(np.mean([np.square(one - true[rows]).mean() for one, true in pairs])),
        float(np.mean([np.square(true.mean(axis=0) - true[rows]).mean() for _, true in pairs])),
    )


def test_a_known_map_is_learned_and_carries_over_to_held_out_regions(problem):
    zoo, space = problem
    held_out = space.held_out
    log = []
    made = mlp_hypernetwork(
        zoo, space, _CONFIG, key=jax.random.key(1), progress=lambda done, row: log.append((done, row))
    )
    assert held_out.sum() == 4
    error, spread = _gap(made, zoo, ~held_out)
    assert error < 0.01 * spread
    error, spread = _gap(made, zoo, held_out)
    assert error < 0.5 * spread
    assert [done for done, _ in log] == [100, 200, 300, 400]
    assert log[-1][1]["token_loss"] < 0.05 < log[0][1]["token_loss"]
    prompts = zoo.prompts
    few = dataclasses.replace(prompts, values=prompts.values[:1, :3], region_ids=prompts.region_ids[:3])
    leaves = jax.tree.leaves(made.params(few))
    assert [leaf.shape for leaf in leaves] == [(3, 6), (3, 6)]
    with pytest.raises(InputError, match="hold 3 variants of every region"):
        made.params(zoo.prompts)


def test_held_out_regions_are_never_trained_on(problem):
    zoo, space = problem
    held_out = space.held_out
    config = dataclasses.replace(_CONFIG, steps=10, evaluations=1)
    other = {name: np.array(leaf) for name, leaf in zoo.params.items()}
    for leaf in other.values():
        leaf[held_out] += 7
    changed = dataclasses.replace(zoo, vectors=HeldVectors(other))
    one, two = (mlp_hypernetwork(z, space, config, key=jax.random.key(1)) for z in (zoo, changed))
    chex.assert_trees_all_equal(one.variables, two.variables)


def test_the_lowest_functional_loss_on_held_out_regions_is_kept(problem):
    """At a rate that destroys what it learned, the last network is not the one that comes back."""
    zoo, space = problem
    held_out = space.held_out
    config = dataclasses.replace(_CONFIG, steps=12, evaluations=12, learning_rate=1.0, functional_weight=1.0, ema=0.0)
    losses = []
    made = mlp_hypernetwork(zoo, space, config, key=_KEY, progress=lambda _, row: losses.append(row[_VALIDATION]))
    assert len(losses) == 12 and min(losses) < 0.95 * losses[-1]
    assert _functional(made, zoo, held_out, config) == pytest.approx(min(losses), rel=1e-5)


def _functional(made: MlpHypernetwork, zoo: ParameterZoo, held_out: np.ndarray, config: PretrainConfig) -> float:
    """The loss that the choice rests on, region by region."""
    assert zoo.sources is not None
    rows = jnp.asarray(np.flatnonzero(held_out), jnp.int32)
    model, codec = make_model(zoo.model, zoo.sources.sizes), made.space.codec
    tokens = jax.vmap(functools.partial(to_tokens, codec.layout))(made.params(zoo.prompts.variant(0)))
    latents = jax.vmap(codec.encode)(tokens)[rows]
    evaluate_key = jax.random.split(jax.random.split(_KEY)[1])[1]

    @jax.jit
    def of_variant(sources: Sources, variant: jax.Array) -> jax.Array:
        numbers = jnp.arange(len(rows), dtype=jnp.int32)
        batch = DiffusionBatch(
            latents, zoo.prompts.values[0][rows], rows, jnp.broadcast_to(variant, rows.shape), numbers
        )
        key = jax.random.split(jax.random.fold_in(evaluate_key, variant))[1]
        return functional_losses(model, sources, codec, config.windows, latents, batch, key=key).mean()

    return float(np.mean([of_variant(zoo.sources, jnp.asarray(variant, jnp.int32)) for variant in range(3)]))


def test_a_zoo_without_its_sources_is_refused(problem):
    zoo, space = problem
    without = dataclasses.replace(zoo, sources=None)
    with pytest.raises(InputError, match="the zoo has no sources attached"):
        mlp_hypernetwork(without, space, _CONFIG, key=jax.random.key(0))
    with pytest.raises(InputError, match="the zoo has no sources attached"):
        fit_latent_space(without, _CONFIG, key=jax.random.key(0))
