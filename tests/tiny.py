"""In: nothing. Out: the smallest world that shows everything: a model that compiles in no time, known as "tiny"."""

import functools

import jax
import jax.numpy as jnp

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


if "tiny" not in model_names():
    register_model("tiny", make_tiny)
