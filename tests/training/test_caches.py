"""In: models that come and go. Out: what is remembered of them is bounded, and is let go of when asked."""

import gc
import pathlib
import re
import weakref

import jax.numpy as jnp
import numpy as np

import gpdiff_jax as gpd
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.models import Model
from gpdiff_jax.training import caches
from gpdiff_jax.transfer.evaluate import zero_shot


def _model(scale: float) -> Model:
    def init(key, graph, history, covariates):
        raise AssertionError("parameters are given")

    def apply(params, graph, history, covariates):
        return jnp.broadcast_to(scale * history[0, -1, 0] * params["w"], (6,))[:, None]

    return Model("last", init, apply)


def test_a_model_is_let_go_of_with_its_programs(simulated_cities):
    target = prepare_target(simulated_cities[0], DataConfig(covariates="none", max_neighbours=1))
    params = {"w": np.ones((1, 8, 1), np.float32)}
    model = _model(1.0)
    made = zero_shot(model, target, params).forecast
    seen = weakref.ref(model.apply)
    del model
    gc.collect()
    assert seen() is not None  # a second forecast would not compile again
    gpd.clear_caches()
    gc.collect()
    assert seen() is None
    np.testing.assert_array_equal(zero_shot(_model(1.0), target, params).forecast, made)


def test_a_cache_forgets_the_oldest():
    made: list[int] = []

    @caches.bounded_cache(2)
    def square(number: int) -> int:
        made.append(number)
        return number * number

    assert [square(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 4, 1, 9, 1, 4]
    assert made == [1, 2, 3, 2]
    gpd.clear_caches()
    assert square(2) == 4 and made[-1] == 2 and len(made) == 5
    caches._caches.pop()


def test_nothing_in_the_library_remembers_without_a_bound():
    library = pathlib.Path(gpd.__file__).parent
    for path in library.rglob("*.py"):
        if path.name != "caches.py":
            assert not re.search(r"functools\.cache\b|lru_cache|import cache\b", path.read_text()), path
    assert len(caches._caches) >= 10
    assert all(0 < cached.cache_info().maxsize <= 64 for cached in caches._caches)
