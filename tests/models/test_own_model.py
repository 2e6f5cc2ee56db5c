"""In: the README's model file, and faulty ones. Out: a model that can be harvested, or one clear line."""

import hashlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import (
    Model,
    ModelSizes,
    load_model_file,
    make_model,
    model_names,
    read_model_file,
    register_model,
    registry,
)
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import initial_params
from gpdiff_jax.zoo.region_training import HarvestConfig

_README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(autouse=True)
def _registry_stays_as_it_was():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        patch.setattr(registry, "_FILES", {})
        yield


def test_the_model_of_the_readme_is_harvested(tmp_path: pathlib.Path, simulated_cities: list[City]):
    block = re.search(r"^## Your own model$.*?^```python\n(.*?)^```", _README.read_text(), re.M | re.S)
    assert block and len(block[1].splitlines()) <= 40
    path = tmp_path / "my_model.py"
    path.write_text(block[1])
    name = load_model_file(path)
    assert name == load_model_file(str(path)) == "my_linear"
    sources = with_prompts(
        prepare_sources(
            simulated_cities[:1],
            DataConfig(covariates="calendar", variants=3),
            key=jax.random.key(0),
            validation_windows=8,
        ),
        simulated_cities[:1],
    )
    model = make_model(name, sources.sizes)
    pooled = initial_params(model, sources.graphs, sources.sizes, key=jax.random.key(1))
    config = HarvestConfig(steps=40, evaluate_every=20, snapshots=2, learning_rate=1e-2)
    zoo = harvest_zoo(model, sources, pooled, config, key=jax.random.key(2))
    assert (zoo.validation_mae[:, 0] < zoo.start_mae).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"no model file at '.*model.py'; --model takes one of .*stgcn"),
        ("x = 1", r"registers 0 models; call gpdiff_jax.register_model once"),
        ("raise ValueError('oh')", r"model.py' fails: ValueError: oh"),
        ("def f(:", r"model.py' fails: SyntaxError"),
        (
            "import gpdiff_jax as gpd\ngpd.register_model('stgcn', lambda sizes: None)",
            r"model 'stgcn' is registered already",
        ),
    ],
)
def test_a_file_without_a_model_is_refused_in_one_line(tmp_path: pathlib.Path, text, words):
    path = tmp_path / "model.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        load_model_file(path)


_TEXT = """
import jax.numpy as jnp
import gpdiff_jax as gpd

def make(sizes):
    def init(key, graph, history, covariates):
        return {"out": {"bias": jnp.full((sizes.horizon, 1), %s)}}

    def apply(params, graph, history, covariates):
        return params["out"]["bias"]

    return gpd.Model("mine", init, apply)

gpd.register_model("mine", make)
"""
_SIZES = ModelSizes(12, 6, 2, 0)


def _bias(name: str) -> float:
    seen: list = [None, jnp.zeros((3, 12, 2)), jnp.zeros((18, 0))]
    return float(make_model(name, _SIZES).init(jax.random.key(0), *seen)["out"]["bias"][0, 0])


def test_an_edited_model_file_replaces_what_it_registered_and_its_hash_is_of_what_was_run(tmp_path: pathlib.Path):
    path = tmp_path / "model.py"
    path.write_text(_TEXT % 1.0)
    first = read_model_file(path)
    assert _bias("mine") == 1.0 and read_model_file(path) is first
    assert first == ("mine", hashlib.sha256((_TEXT % 1.0).encode()).hexdigest())
    path.write_text(_TEXT % 2.0)
    second = read_model_file(path)
    assert (second.name, _bias("mine")) == ("mine", 2.0) and second.sha256 != first.sha256
    # Another file does not take the name away, and an edit that fails leaves what was there.
    other = tmp_path / "other.py"
    other.write_text(_TEXT % 3.0)
    with pytest.raises(InputError, match="model 'mine' is registered already"):
        read_model_file(other)
    path.write_text(_TEXT % 4.0 + "\nraise ValueError('oh')")
    with pytest.raises(InputError, match="fails: ValueError: oh"):
        read_model_file(path)
    assert _bias("mine") == 2.0


def test_a_file_that_registers_two_models_leaves_none(tmp_path: pathlib.Path):
    path, before = tmp_path / "model.py", model_names()
    path.write_text(_TEXT % 1.0 + "\ngpd.register_model('yours', make)")
    with pytest.raises(InputError, match="registers 2 models"):
        read_model_file(path)
    assert model_names() == before


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layer": (jnp.ones(2), jnp.ones(3))}, r"nested dicts with names as keys, got \['layer'\]\[0\]"),
        ({"layer": [jnp.ones(2)]}, "nested dicts with names as keys"),
        ({"layer": {0: jnp.ones(2), 1: jnp.ones(3)}}, r"nested dicts with names as keys, got \['layer'\]\[0\]"),
        ({"layer": {"w": jnp.ones(2, jnp.bfloat16)}}, "'layer/w' is bfloat16"),
        ({"layer": {"w": jnp.ones(2, jnp.int32)}}, "'layer/w' is int32"),
        ({"layer": {"w": jnp.ones((0, 3))}}, r"of shape \(0, 3\)"),
        ({"layer": {"w": jnp.ones(2)}, "empty": {}}, "none of them empty"),
        ({}, "has no parameters"),
        (jnp.ones(3), "got one array"),
    ],
)
def test_parameters_that_tokens_could_not_give_back_are_refused_when_the_model_is_made(params, words):
    def init(key, graph, history, covariates):
        return params

    def apply(params, graph, history, covariates):
        return jnp.zeros((6, 1))

    register_model("odd", lambda sizes: Model("odd", init, apply))
    with pytest.raises(InputError, match=words) as caught:
        make_model("odd", _SIZES)
    assert str(caught.value).startswith("model 'odd': ") and "\n" not in str(caught.value)


def test_a_model_that_fails_or_forecasts_another_shape_is_refused_when_it_is_made():
    def init(key, graph, history, covariates):
        return {"w": jnp.ones((history.shape[1] + 1, 1))}

    def fails(params, graph, history, covariates):
        return history[0] @ params["w"]

    def short(params, graph, history, covariates):
        return jnp.zeros((5, 1)) * params["w"][0, 0]

    def right(params, graph, history, covariates):
        return jnp.zeros((6, 1)) * params["w"][0, 0]

    def batched(params, graph, history, covariates):
        return jnp.zeros((6, 1, 1)) * params["w"][0, 0]

    register_model("batched", lambda sizes: Model("batched", init, right, batched))
    with pytest.raises(InputError, match=r"`apply_batch` of model 'batched' forecasts \(6, 1, 1\) of a batch of 2"):
        make_model("batched", _SIZES)
    register_model("fails", lambda sizes: Model("fails", init, fails))
    register_model("short", lambda sizes: Model("short", init, short))
    with pytest.raises(InputError, match=r"model 'fails' fails at ModelSizes.*: TypeError"):
        make_model("fails", _SIZES)
    with pytest.raises(InputError, match=r"model 'short' forecasts \(5, 1\), and must forecast \[P, C\] = \(6, 1\)"):
        make_model("short", _SIZES)
