"""In: the README's model file, and faulty ones. Out: a model that can be harvested, or one clear line."""

import pathlib
import re

import jax
import pytest

from gpdiff_jax.base import initial_params
from gpdiff_jax.cities import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.harvest import harvest_zoo
from gpdiff_jax.models import load_model_file, make_model, protocol
from gpdiff_jax.region_training import HarvestConfig
from gpdiff_jax.sources import DataConfig, prepare_sources

_README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(autouse=True)
def _registry_stays_as_it_was():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "_REGISTRY", dict(protocol._REGISTRY))
        yield


def test_the_model_of_the_readme_is_harvested(tmp_path: pathlib.Path, simulated_cities: list[City]):
    block = re.search(r"^## Your own model$.*?^```python\n(.*?)^```", _README.read_text(), re.M | re.S)
    assert block and len(block[1].splitlines()) <= 40
    path = tmp_path / "my_model.py"
    path.write_text(block[1])
    name = load_model_file(path)
    assert name == load_model_file(str(path)) == "my_linear"
    sources = prepare_sources(
        simulated_cities[:1], DataConfig(covariates="calendar", variants=3), key=jax.random.key(0), validation_windows=8
    )
    model = make_model(name, sources.sizes)
    base = initial_params(model, sources.graphs, sources.sizes, key=jax.random.key(1))
    config = HarvestConfig(steps=40, evaluate_every=20, snapshots=2, learning_rate=1e-2)
    zoo = harvest_zoo(model, sources, base, config, key=jax.random.key(2))
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
