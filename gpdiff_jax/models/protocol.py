"""In: a model's name and sizes. Out: a pure `init` / `apply` pair that forecasts the centre of one region graph.

Everything else in the library sees a model through this pair alone, so any pair can be harvested and generated.
"""

import hashlib
import os
import pathlib
import runpy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jraph
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.models.kinds import kinds_of_layers
from gpdiff_jax.models.leaves import check_leaves
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.typing import Key, Params, RegionGraph


class ModelSizes(NamedTuple):
    """What a model must fit: history H and horizon P (steps), inputs I per node and step, covariates F per step."""

    history: int
    horizon: int
    num_inputs: int
    num_covariates: int


@flax.struct.dataclass
class Window:
    """What a model sees of one region graph at one time, and what came after, all scaled."""

    history: Float[Array, "*B N H I"]  # reading (0 where missing), whether observed, the node's profile if used
    covariates: Float[Array, "*B steps F"]  # the calendar, and the centre's profile if used
    target: Float[Array, "*B P"]  # of the centre, 0 where missing
    mask: Float[Array, "*B P"]  # 1 where observed


class Model(NamedTuple):
    """A forecaster of one region.

    `init(key, region_graph, history, covariates) -> params` and `apply(params, region_graph, history, covariates) ->
    [P, C]`, where `region_graph` is one padded `jraph.GraphsTuple` (the centre first, the last node always spare),
    history is [N, H, I] (scaled reading, observed, and the node's daily profile if that is a covariate), covariates are
    [H + P, F] (calendar, and the centre's profile), and the forecast is scaled. All state is in `params`.

    A batch of windows goes through `vmap` of `apply`, or through `apply_batch` where a model has one: the same function
    with the batch axis before the last, a layout in which time is sliced and nodes are mixed without a transpose.

    `kinds` says which layers (first keys of `params`) work on time, on the graph and on the output: pairs of the
    beginning of a name and one of `kinds.LAYER_KINDS`. A model without them cannot be generated with `inductive_bias`.
    """

    name: str
    init: Callable[[Key, jraph.GraphsTuple, Float[Array, "N H I"], Float[Array, "HP F"]], Params]
    apply: Callable[[Params, jraph.GraphsTuple, Float[Array, "N H I"], Float[Array, "HP F"]], Float[Array, "P C"]]
    apply_batch: (
        Callable[[Params, jraph.GraphsTuple, Float[Array, "N H B I"], Float[Array, "HP B F"]], Float[Array, "P B C"]]
        | None
    ) = None
    kinds: tuple[tuple[str, str], ...] = ()

    def layer_kinds(self, params: Params) -> dict[str, str]:
        """The kind of every layer of parameters, or of their shapes; see `kinds.kinds_of_layers`."""
        return kinds_of_layers(self.kinds, params)


def linen_model(name: str, module: nn.Module, kinds: Mapping[str, str] | None = None) -> Model:
    """The pair of a Linen module whose `__call__(graph, history, covariates)` also takes batch axes before the last.

    Args:
      name: of the model.
      module: all its variables are parameters.
      kinds: by the beginnings of the names of its layers, see `Model`.

    Returns:
      The pair, with the module itself as `apply_batch`.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.register_model("mine", lambda sizes: gpd.linen_model("mine", MyModule(sizes), sizes))  # doctest: +SKIP
    """

    def apply(params: Params, graph: jraph.GraphsTuple, history: jax.Array, covariates: jax.Array) -> Any:
        return module.apply({"params": params}, graph, history, covariates)

    return Model(name, lambda *arguments: module.init(*arguments)["params"], apply, apply, tuple((kinds or {}).items()))


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
    path = pathlib.Path(path).expanduser().resolve()
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
      The pair of pure functions, the same one for the same sizes.

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


def abstract_params(model: Model, sizes: ModelSizes) -> Params:
    """Shapes and types of a model's parameters, which no graph of regions changes; nothing is computed.

    Args:
      model: the forecaster.
      sizes: H, P, I, F.

    Returns:
      A pytree of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(model.init, jax.random.key(0), *_abstract_inputs(sizes))


def _abstract_inputs(sizes: ModelSizes) -> tuple[RegionGraph, Any, Any]:
    """Shapes of a graph of two regions, and of what a model sees of them."""
    history, horizon, inputs, covariates = sizes
    fields: dict[str, Any] = {
        "nodes": np.zeros(3, np.int32),
        "edges": np.ones(1, np.float32),
        "senders": np.ones(1, np.int32),
        "receivers": np.zeros(1, np.int32),
        "n_node": np.asarray([2, 1], np.int32),
        "n_edge": np.asarray([1, 0], np.int32),
    }
    graph = jraph.GraphsTuple(globals=None, **fields)
    seen = np.zeros((3, history, inputs), np.float32), np.zeros((history + horizon, covariates), np.float32)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (graph, *seen))


def model_text(model: Model, sizes: ModelSizes, params: Params) -> str:
    """The operations of a model, as the text of its programs: it differs where two models of one name do.

    Args:
      model: the forecaster.
      sizes: H, P, I, F.
      params: of one region; their shapes are looked at.

    Returns:
      What `init`, `apply` and `apply_batch` lower to, with their constants; the same in every process and on every
      platform with the same versions of JAX.
    """
    inputs, key = _abstract_inputs(sizes), jax.random.key(0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    calls: list[tuple[Callable[..., Any], tuple]] = [(model.init, (key, *inputs)), (model.apply, (shapes, *inputs))]
    if model.apply_batch is not None:
        calls.append((model.apply_batch, (shapes, *_batched(inputs))))
    # For one platform, wherever it runs: how random numbers are made differs between them.
    return "".join(jax.jit(call).trace(*given).lower(lowering_platforms=("cpu",)).as_text() for call, given in calls)


def _batched(inputs: tuple[RegionGraph, Any, Any]) -> tuple[RegionGraph, Any, Any]:
    """The same shapes with a batch of two before the last axis, as `apply_batch` takes them."""
    graph, *seen = inputs
    history, covariates = (jax.ShapeDtypeStruct((*x.shape[:-1], 2, x.shape[-1]), x.dtype) for x in seen)
    return graph, history, covariates


@bounded_cache(64)
def _make(factory: Callable[[ModelSizes], Model], sizes: ModelSizes) -> Model:
    # The same pair every time: compiled programs are found by it.
    model = factory(sizes)
    try:
        params = abstract_params(model, sizes)
        check_leaves(params)
        model.layer_kinds(params)
        inputs = _abstract_inputs(sizes)
        forecast = jax.eval_shape(model.apply, params, *inputs)
        batch = None
        if model.apply_batch is not None:
            batch = jax.eval_shape(model.apply_batch, params, *_batched(inputs))
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
    return model
