"""In: a model's name and sizes. Out: a pure `init` / `apply` pair that forecasts the centre of one region graph.

Everything else in the library sees a model through this pair alone, so any pair can be harvested and generated.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jraph
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.models.kinds import kinds_of_layers
from gpdiff_jax.typing import Key, Params, RegionGraph


class ModelSizes(NamedTuple):
    """What a model must fit: history H and horizon P (steps), inputs I per node and step, covariates F per step.

    `anomaly` says that the covariates end with what the visible days lead one to expect, and that `make_model` makes a
    model that forecasts the departure from it; see `anomaly.forecast_anomalies`.
    """

    history: int
    horizon: int
    num_inputs: int
    num_covariates: int
    anomaly: bool = False


@flax.struct.dataclass
class Window:
    """What a model sees of one region graph at one time, and what came after, all scaled."""

    # Reading (0 where missing) and whether observed; with a profile also the anomaly in units of the deviation that is
    # to be expected (0 where missing), the profile, and the logarithm of that deviation.
    history: Float[Array, "*B N H I"]
    # The calendar; with a profile also, of the centre, how far the profile of the other kind of day lies from that of
    # the step's, in units of the deviation; its logarithm; the profile; and which share of it was seen on days of the
    # step's kind.
    covariates: Float[Array, "*B steps F"]
    target: Float[Array, "*B P"]  # of the centre, 0 where missing
    mask: Float[Array, "*B P"]  # 1 where observed


class Model(NamedTuple):
    """A forecaster of one region.

    `init(key, region_graph, history, covariates) -> params` and `apply(params, region_graph, history, covariates) ->
    [P, C]`, where `region_graph` is one padded `jraph.GraphsTuple` (the centre first, the last node always spare),
    history is [N, H, I] and covariates are [H + P, F], with what `Window` says, and the forecast is scaled. All state
    is in `params`. A model need not know what its inputs are: with a profile, what it forecasts is taken for the
    departure from the profile in units of the deviation that is to be expected, see `anomaly.forecast_anomalies`.

    A batch of windows goes through `vmap` of `apply`, or through `apply_batch` where a model has one: the same function
    with the batch axis before the last, a layout in which time is sliced and nodes are mixed without a transpose.

    `kinds` says which layers (first keys of `params`) work on time, on the graph and on the output: pairs of the
    beginning of a name and one of `kinds.LAYER_KINDS`. A model without them cannot be generated with `inductive_bias`.

    `shapes` is called like `init` and makes parameters of the same shapes and types, whatever their values; None where
    `init` itself is fast to trace.
    """

    name: str
    init: Callable[[Key, jraph.GraphsTuple, Float[Array, "N H I"], Float[Array, "HP F"]], Params]
    apply: Callable[[Params, jraph.GraphsTuple, Float[Array, "N H I"], Float[Array, "HP F"]], Float[Array, "P C"]]
    apply_batch: (
        Callable[[Params, jraph.GraphsTuple, Float[Array, "N H B I"], Float[Array, "HP B F"]], Float[Array, "P B C"]]
        | None
    ) = None
    kinds: tuple[tuple[str, str], ...] = ()
    shapes: Callable[..., Params] | None = None

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


def abstract_params(model: Model, sizes: ModelSizes) -> Params:
    """Shapes and types of a model's parameters, which no graph of regions changes; nothing is computed.

    Args:
      model: the forecaster.
      sizes: H, P, I, F.

    Returns:
      A pytree of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(model.shapes or model.init, jax.random.key(0), *abstract_inputs(sizes))


def example_inputs(sizes: ModelSizes) -> tuple[RegionGraph, np.ndarray, np.ndarray]:
    """A graph of two regions and a spare node, and zeros for what a model sees of them: history and covariates."""
    history, horizon, inputs, covariates, _ = sizes
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
    return graph, *seen


def abstract_inputs(sizes: ModelSizes) -> tuple[RegionGraph, Any, Any]:
    """The shapes of `example_inputs`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example_inputs(sizes))


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
    inputs, key = abstract_inputs(sizes), jax.random.key(0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    calls: list[tuple[Callable[..., Any], tuple]] = [(model.init, (key, *inputs)), (model.apply, (shapes, *inputs))]
    if model.apply_batch is not None:
        calls.append((model.apply_batch, (shapes, *batched_inputs(inputs))))
    # For one platform, wherever it runs: how random numbers are made differs between them.
    return "".join(jax.jit(call).trace(*given).lower(lowering_platforms=("cpu",)).as_text() for call, given in calls)


def batched_inputs(inputs: tuple[RegionGraph, Any, Any]) -> tuple[RegionGraph, Any, Any]:
    """The same shapes with a batch of two before the last axis, as `apply_batch` takes them."""
    graph, *seen = inputs
    history, covariates = (jax.ShapeDtypeStruct((*x.shape[:-1], 2, x.shape[-1]), x.dtype) for x in seen)
    return graph, history, covariates
