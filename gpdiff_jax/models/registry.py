"""In: a model's name and sizes, or a file that registers one. Out: the pair of that name, checked."""

import hashlib
import os
import pathlib
import runpy
from collections.abc import Callable
from typing import NamedTuple

import jax

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.models.anomaly import forecast_anomalies
from gpdiff_jax.models.leaves import check_leaves
from gpdiff_jax.models.protocol import Model, ModelSizes, abstract_inputs, abstract_params, batched_inputs
from gpdiff_jax.training.caches import bounded_cache

_REGISTRY: dict[str, Callable[[ModelSizes], Model]] = {}


def register_model(name: str, make: Callable[[ModelSizes], Model]) -> None:
    """Makes a model known by name, for `make_model` and for `--model`.

    Args:
      name: a new name.
      make: from sizes to the pair.

    Raises:
      InputError: the name is taken.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.register_model("mine", make_my_model)  # doctest: +SKIP
    """
    if name in _REGISTRY:
        raise InputError(f"model {name!r} is registered already; choose another name")
    _REGISTRY[name] = make


def load_model_file(path: str | os.PathLike[str]) -> str:
    """Runs a Python file of a user's that registers one model, and returns its name; see `read_model_file`.

    Example:
      >>> import gpdiff_jax as gpd
      >>> name = gpd.load_model_file("my_model.py")  # doctest: +SKIP
    """
    return read_model_file(path).name


class ModelFile(NamedTuple):
    """A user's model file as it was run."""

    name: str  # of the model that it registers
    sha256: str  # of its text


_FILES: dict[pathlib.Path, ModelFile] = {}


def read_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Runs a Python file of a user's that registers one model.

    Args:
      path: the file; it calls `register_model` once. Run it only if you trust it: it is a program.

    Returns:
      The name of the model, for `make_model`, and the hash of the text that was run. A file is not run again while its
      text is the same; an edited one replaces the model that it registered before.

    Raises:
      InputError: there is no such file, it fails, or it registers none or several models; the registry is then as it
        was.
    """
    path = user_path(path).resolve()
    if not path.is_file():
        raise InputError(f"no model file at {str(path)!r}; --model takes one of {', '.join(model_names())}, or a file")
    digest, held = hashlib.sha256(path.read_bytes()).hexdigest(), _FILES.get(path)
    if held is not None and held.sha256 == digest and held.name in _REGISTRY:
        return held
    before = dict(_REGISTRY)
    if held is not None:
        _REGISTRY.pop(held.name, None)
    others = set(_REGISTRY)
    try:
        runpy.run_path(str(path), run_name=path.stem)
        added = sorted(set(_REGISTRY) - others)
        if len(added) != 1:
            raise InputError(
                f"the model file {str(path)!r} registers {len(added)} models; call gpdiff_jax.register_model once in it"
            )
    except BaseException as error:
        _REGISTRY.clear()
        _REGISTRY.update(before)
        if isinstance(error, Exception) and not str(error).startswith("the model file"):
            raise InputError(f"the model file {str(path)!r} fails: {type(error).__name__}: {error}") from error
        raise
    _FILES[path] = ModelFile(added[0], digest)
    return _FILES[path]


def model_names() -> tuple[str, ...]:
    """Names of all registered models, sorted.

    Example:
      >>> import gpdiff_jax as gpd
      >>> {"stgcn", "graph_wavenet", "dcrnn", "stid"} <= set(gpd.model_names())
      True
    """
    return tuple(sorted(_REGISTRY))


def make_model(name: str, sizes: ModelSizes) -> Model:
    """The registered model of that name at the given sizes.

    Args:
      name: of the model.
      sizes: H, P, I, F.

    Returns:
      The pair of pure functions, the same one for the same sizes; with `sizes.anomaly`, one that forecasts around what
      the visible days lead to expect.

    Raises:
      InputError: unknown name, a size that the model cannot take, parameters that tokens could not give back (see
        `leaves.check_leaves`), or a forecast of another shape than [P, C]. Nothing is computed to find out.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.make_model("stid", gpd.ModelSizes(history=12, horizon=6, num_inputs=2, num_covariates=0)).name
      'stid'
    """
    if name not in _REGISTRY:
        raise InputError(
            f"`model` must be one of {', '.join(model_names())}, got {name!r}; a model of your own is known after "
            "`load_model_file` or `register_model`, on the command line by --model FILE.py"
        )
    for field, least in (("history", 1), ("horizon", 1), ("num_inputs", 1), ("num_covariates", 0)):
        if getattr(sizes, field) < least:
            raise InputError(f"`{field}` must be at least {least}, got {getattr(sizes, field)}")
    return _make(_REGISTRY[name], sizes)


def is_built_in(name: str) -> bool:
    """Whether a registered model is one of the library's own."""
    return _REGISTRY[name].__module__.startswith("gpdiff_jax.")


@bounded_cache(64)
def _make(factory: Callable[[ModelSizes], Model], sizes: ModelSizes) -> Model:
    # The same pair every time: compiled programs are found by it.
    model = factory(sizes)
    try:
        params = abstract_params(model, sizes)
        check_leaves(params)
        model.layer_kinds(params)
        inputs = abstract_inputs(sizes)
        forecast = jax.eval_shape(model.apply, params, *inputs)
        batch = None
        if model.apply_batch is not None:
            batch = jax.eval_shape(model.apply_batch, params, *batched_inputs(inputs))
    except InputError as error:
        raise InputError(f"model {model.name!r}: {error}") from error
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise InputError(f"model {model.name!r} fails at {sizes}: {type(error).__name__}: {words}") from error
    if getattr(forecast, "shape", None) != (sizes.horizon, 1):
        raise InputError(
            f"model {model.name!r} forecasts {jax.tree.map(lambda leaf: leaf.shape, forecast)}, and must forecast "
            f"[P, C] = ({sizes.horizon}, 1)"
        )
    if batch is not None and getattr(batch, "shape", None) != (sizes.horizon, 2, 1):
        raise InputError(
            f"`apply_batch` of model {model.name!r} forecasts {jax.tree.map(lambda leaf: leaf.shape, batch)} of a "
            f"batch of 2, and must forecast [P, B, C] = ({sizes.horizon}, 2, 1)"
        )
    return forecast_anomalies(model, sizes) if sizes.anomaly else model
