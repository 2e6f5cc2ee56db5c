"""In: nothing. Out: small things that many tests use: a model that compiles in no time, known as "tiny", and others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpdiff_jax as gpd
from gpdiff_jax.cities import City
from gpdiff_jax.cities.city import label_of
from gpdiff_jax.data.series import num_covariates
from gpdiff_jax.models import Model, ModelSizes, model_names, register_model
from gpdiff_jax.models.graphs import node_mask


@functools.cache
def make_tiny(sizes: ModelSizes) -> Model:
    """Linear in the centre's history, that of its graph and the covariates; its layers are of three kinds."""

    def init(key, graph, history, covariates):
        del graph, history, covariates
        shapes = {
            "temporal": {"kernel": (sizes.horizon, sizes.history * sizes.num_inputs)},
            "graph": {"kernel": (sizes.horizon, sizes.history)},
            "head": {"bias": (sizes.horizon,), "kernel": (sizes.horizon, max(sizes.num_covariates, 1))},
        }
        flat, tree = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
        keys = jax.random.split(key, len(flat))
        return tree.unflatten([0.05 * jax.random.normal(k, shape) for k, shape in zip(keys, flat, strict=True)])

    def apply(params, graph, history, covariates):
        around = jnp.einsum("n,nt->t", node_mask(graph).astype(history.dtype), history[..., 0])
        seen = params["temporal"]["kernel"] @ history[0].reshape(-1) + params["graph"]["kernel"] @ around
        out = seen + params["head"]["bias"]
        if sizes.num_covariates:
            out = out + (params["head"]["kernel"] * covariates[sizes.history :]).sum(axis=1)
        return out[:, None]

    kinds = (("temporal", "temporal"), ("graph", "graph"), ("head", "output"))
    return Model("tiny", init, apply, kinds=kinds)


def scale_and_bias(sizes: ModelSizes) -> Model:
    """Forecasts every step as a multiple of the last reading plus a bias."""

    def init(key, graph, history, covariates):
        del key, graph, history, covariates
        return {"bias": jnp.zeros(sizes.horizon), "scale": jnp.zeros(sizes.horizon)}

    def apply(params, graph, history, covariates):
        del graph, covariates
        return (history[0, -1, 0] * params["scale"] + params["bias"])[:, None]

    return Model("linear", init, apply)


def town(edges: list[tuple[int, int, float]], nodes: int, **more: Any) -> City:
    """A city of a few steps whose graph is all that matters."""
    senders, receivers, weights = zip(*edges, strict=True)
    facts: dict[str, Any] = {
        "name": "town",
        "kind": "crowd",
        "values": np.ones((5, nodes, 1), np.float32),
        "senders": np.array(senders, np.int32),
        "receivers": np.array(receivers, np.int32),
        "weights": np.array(weights, np.float32),
        "interval_minutes": 60,
        "start": None,
        "feature_names": ("visitors",),
        "node_ids": tuple(f"r{k}" for k in range(nodes)),
    }
    return City(**{**facts, **more})


if "tiny" not in model_names():
    register_model("tiny", make_tiny)


def tiny_parameters(
    city: City, data: gpd.DataConfig, *, samples: int = 2, residuals: np.ndarray | None = None
) -> gpd.RegionParameters:
    """Random parameters of the tiny model for the regions of a city, with two directions, as if they were generated."""
    sizes = ModelSizes(12, 6, 5, num_covariates("profile"), anomaly=True)
    tiny, count = make_tiny(sizes), samples * city.num_nodes
    keys = jax.random.split(jax.random.key(3), count)
    none = (None, jnp.zeros((1, 12, 5)), jnp.zeros((18, num_covariates("profile"))))
    params = jax.vmap(lambda key: tiny.init(key, *none))(keys)
    shaped = jax.tree.map(lambda leaf: leaf.reshape(samples, city.num_nodes, *leaf.shape[1:]), params)
    directions = jax.tree.map(lambda leaf: leaf[:2, 0], shaped)
    return gpd.RegionParameters(shaped, "tiny", data, label_of(city), directions, residuals)
