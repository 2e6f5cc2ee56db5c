"""In: a zoo whose parameters are a linear function of the prompt. Out: the ridge hypernetwork finds that function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.codec import fit_codec
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models import ModelSizes
from gpdiff_jax.nulls import ridge_hypernetwork
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, scale_prompts
from gpdiff_jax.sources import DataConfig
from gpdiff_jax.tokens import make_layout, to_tokens
from gpdiff_jax.zoo import HeldVectors, ParameterZoo

_ENTRIES, _OUT = 3, 5


def _problem(cities: int, *, noise: float = 0.0, regions: int = 200):
    """Three variants of a prompt, all but equal; parameters linear in it; and a target city."""
    rng = np.random.default_rng(0)
    told = rng.normal(size=(regions + 20, _ENTRIES))
    slope, shift = rng.normal(size=(_ENTRIES, _OUT)), rng.normal(size=_OUT)
    params = told @ slope + shift + noise * rng.normal(size=(regions + 20, _OUT))
    base = {"a": {"x": np.full(2, 0.5, np.float32)}, "b": np.full((3, 1), -1.0, np.float32)}

    def tree(rows: np.ndarray) -> dict:
        rows = rows.astype(np.float32)
        return {"a": {"x": rows[:, :2]}, "b": rows[:, 2:, None]}

    snapshots = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 9], axis=1), tree(params[:regions]))
    variants = told[None, :regions] + 1e-3 * rng.normal(size=(3, regions, _ENTRIES))
    names = tuple(f"p{k}" for k in range(_ENTRIES))
    zoo = ParameterZoo(
        model="linear",
        base=base,
        vectors=HeldVectors(snapshots),
        validation_mae=np.ones((regions, 2), np.float32),
        start_mae=np.ones(regions, np.float32),
        step=np.ones((regions, 2), np.int32),
        seed=np.zeros((regions, 2), np.int32),
        data_window=np.zeros((regions, 2), np.int32),
        prompts=Prompts(jnp.asarray(variants, jnp.float32), jnp.arange(regions, dtype=jnp.uint32), names),
        names=tuple(f"city/{k}" for k in range(regions)),
        city_index=(np.arange(regions) % cities).astype(np.int32),
    )
    layout = make_layout(base, 4)
    flat = np.asarray(to_tokens(layout, base))
    hypernetwork = Hypernetwork(
        model_name="linear",
        sizes=ModelSizes(12, 6, 2, 0),
        data=DataConfig(),
        denoiser_config=DenoiserConfig(),
        variables={},
        codec=fit_codec(layout, flat, flat[None], np.ones(1), 0),
        prompt_scaler=fit_prompt_scaler(zoo.prompts, zoo.city_index),
        prompt_names=names,
    )
    target = Prompts(jnp.asarray(told[None, regions:], jnp.float32), jnp.arange(20, dtype=jnp.uint32), names)
    return zoo, hypernetwork, target, tree(params[regions:])


@pytest.mark.parametrize("cities", [1, 2])
def test_a_linear_zoo_is_found_with_the_smallest_penalty(cities):
    zoo, hypernetwork, target, true = _problem(cities)
    params, penalty = ridge_hypernetwork(zoo, hypernetwork, target)
    assert penalty == 0.03
    assert jax.tree.structure(params) == jax.tree.structure(true)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(true), strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        # A penalty of 0.03 on unit-size entries shrinks slopes by three per cent.
        np.testing.assert_allclose(got, want, atol=0.25)
        assert np.corrcoef(np.asarray(got).ravel(), want.ravel())[0, 1] > 0.999


def test_the_solution_is_the_weighted_ridge_regression():
    zoo, hypernetwork, target, _ = _problem(2, noise=0.5)
    params, penalty = ridge_hypernetwork(zoo, hypernetwork, target)
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    told = np.asarray(scale_prompts(zoo.prompts, scaler), np.float64).reshape(-1, _ENTRIES)
    wanted = np.tile(np.concatenate([zoo.params["a"]["x"][:, 0], zoo.params["b"][:, 0, :, 0]], axis=1), (3, 1))
    root = np.sqrt(np.full(len(told), 1 / len(told)))[:, None]
    rows = np.concatenate(
        [root * np.append(told, np.ones((len(told), 1)), axis=1), np.sqrt(penalty) * np.eye(_ENTRIES, _ENTRIES + 1)]
    )
    base = np.array([0.5, 0.5, -1, -1, -1])
    solution = np.linalg.lstsq(rows, np.concatenate([root * (wanted - base), np.zeros((_ENTRIES, _OUT))]), rcond=None)[
        0
    ]
    asked = np.asarray(scale_prompts(target, scaler), np.float64)[0]
    expected = base + np.append(asked, np.ones((20, 1)), axis=1) @ solution
    np.testing.assert_allclose(np.asarray(params["a"]["x"]), expected[:, :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(params["b"])[:, :, 0], expected[:, 2:], rtol=1e-4, atol=1e-4)


def test_prompts_that_say_nothing_are_penalised_most():
    zoo, hypernetwork, target, _ = _problem(2, regions=12)
    rng = np.random.default_rng(1)
    noise = jnp.asarray(rng.normal(size=(3, 12, 3)), jnp.float32)
    deaf = dataclasses.replace(zoo, prompts=dataclasses.replace(zoo.prompts, values=noise))
    _, penalty = ridge_hypernetwork(deaf, hypernetwork, target)
    assert penalty >= 1.0
