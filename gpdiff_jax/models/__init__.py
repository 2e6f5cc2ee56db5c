"""In: a name and sizes. Out: a forecaster of one region graph as a pure `init` / `apply` pair."""

# Importing a model's module registers it.
from gpdiff_jax.models import dcrnn as _dcrnn  # noqa: F401
from gpdiff_jax.models import graph_wavenet as _graph_wavenet  # noqa: F401
from gpdiff_jax.models import stgcn as _stgcn  # noqa: F401
from gpdiff_jax.models import stid as _stid  # noqa: F401
from gpdiff_jax.models.protocol import Model, ModelSizes, linen_model
from gpdiff_jax.models.registry import load_model_file, make_model, model_names, read_model_file, register_model

__all__ = [
    "Model",
    "ModelSizes",
    "linen_model",
    "load_model_file",
    "make_model",
    "model_names",
    "read_model_file",
    "register_model",
]
