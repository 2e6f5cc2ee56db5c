"""In: a name and sizes. Out: a forecaster of one region graph as a pure `init` / `apply` pair."""

from gpdiff_jax.models import stgcn as _stgcn  # noqa: F401  (registers the model)
from gpdiff_jax.models.protocol import Model, ModelSizes, make_model, model_names, register_model

__all__ = ["Model", "ModelSizes", "make_model", "model_names", "register_model"]
