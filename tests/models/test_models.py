"""In: every registered model with generic parameters. Out: what a model may and must depend on, and second opinions."""

import functools
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from gpdiff_jax.data.series import num_covariates
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model, ModelSizes, linen_model, make_model, model_names
from gpdiff_jax.models.dcrnn import DCRNN
from gpdiff_jax.models.graph_wavenet import GraphWaveNet
from gpdiff_jax.models.stgcn import STGCN
from gpdiff_jax.models.stid import STID
from tests.models.references import carry_by_jraph, carry_by_loop, reference_forecast

_NAMES = ("dcrnn", "graph_wavenet", "graph_wavenet_adaptive", "stgcn", "stid")
_SIZES = ModelSizes(history=7, horizon=3, num_inputs=3, num_covariates=5)
_BARE = ModelSizes(history=7, horizon=3, num_inputs=2, num_covariates=0)
_EDGES = ((1, 0, 0.5), (2, 0, 1.0), (3, 0, 0.1), (0, 1, 0.7), (1, 2, 0.3), (0, 4, 0.9))  # from, to, weight
_NODES = 6  # no edge enters the centre from node 4, and none at all touches node 5


def _graph(edges=_EDGES, *, nodes: int = _NODES, spare_nodes: int = 1, spare_edges: int = 1) -> jraph.GraphsTuple:
    senders, receivers, weights = zip(*edges, strict=True) if edges else ((), (), ())
    graph = jraph.GraphsTuple(
        nodes=np.arange(nodes, dtype=np.int32),
        edges=np.asarray(weights, np.float32),
        senders=np.asarray(senders, np.int32),
        receivers=np.asarray(receivers, np.int32),
        n_node=np.asarray([nodes], np.int32),
        n_edge=np.asarray([len(edges)], np.int32),
        globals=None,
    )
    return jraph.pad_with_graphs(graph, nodes + spare_nodes, len(edges) + spare_edges, n_graph=2)


def _inputs(sizes: ModelSizes, *batch: int, nodes: int = _NODES + 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    history = rng.normal(size=(*batch, nodes, sizes.history, sizes.num_inputs)).astype(np.float32)
    covariates = rng.normal(size=(*batch, sizes.history + sizes.horizon, sizes.num_covariates)).astype(np.float32)
    return history, covariates


@functools.cache
def _shapes(model: Model, sizes: ModelSizes) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), _graph(), *_inputs(sizes))


def _generic_params(model: Model, sizes: ModelSizes, *, seed: int = 0, gain: float = 1.0) -> dict:
    """No zeros that an initialiser left."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (gain * rng.normal(size=shape) / np.sqrt(max(2, shape[0]))).astype(np.float32)

    return jax.tree.map(lambda leaf: draw(leaf.shape), _shapes(model, sizes))


@functools.cache
def _compiled(model: Model):
    return jax.jit(model.apply)


@pytest.fixture(scope="module", name="example", params=_NAMES)
def _example(request):
    """A model, its parameters, and its compiled `apply`."""
    model = make_model(request.param, _SIZES)
    return model, _generic_params(model, _SIZES), _compiled(model)


def test_every_model_is_tested():
    assert tuple(name for name in model_names() if name != "tiny") == _NAMES


@pytest.mark.parametrize("make_carry", [carry_by_loop, carry_by_jraph])
def test_a_reference_in_numpy_forecasts_the_same(example, make_carry):
    model, params, apply = example
    history, covariates = _inputs(_SIZES)
    forecast = apply(params, _graph(), history, covariates)
    assert forecast.shape == (3, 1) and forecast.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, history[:_NODES], covariates))
    expected = reference_forecast(model.name, wide[0], make_carry, _EDGES, *wide[1:], _SIZES)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(forecast, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("sizes", [_BARE, ModelSizes(8, 1, 1, 1)], ids=["no covariates", "odd"])
def test_a_reference_in_numpy_agrees_at_other_sizes(name, sizes):
    model = make_model(name, sizes)
    params, (history, covariates) = _generic_params(model, sizes), _inputs(sizes)
    forecast = _compiled(model)(params, _graph(), history, covariates)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, history[:_NODES], covariates))
    expected = reference_forecast(name, wide[0], carry_by_loop, _EDGES, *wide[1:], sizes)
    np.testing.assert_allclose(forecast, expected, rtol=1e-4, atol=1e-5)


# A recurrent cell has the same weights at every step, so few steps show them all.
_FEW_STEPS = {"dcrnn": 3}


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("sizes", [_SIZES, _BARE], ids=["covariates", "none"])
def test_every_weight_gets_a_gradient_and_every_leaf_at_the_start_of_training(name, sizes):
    steps = _FEW_STEPS.get(name, sizes.history)
    sizes = sizes._replace(history=steps, horizon=min(steps, sizes.horizon))
    model = make_model(name, sizes)
    history, covariates = _inputs(sizes, 128, seed=7)

    @jax.jit
    @jax.grad
    def slope(params, graph, history, covariates):
        forecast = jax.vmap(model.apply, in_axes=(None, None, 0, 0))(params, graph, 3.0 * history, covariates)
        return jnp.square(forecast - 1.0).mean()

    # A ReLU may be shut for all inputs under some weights, hardly under six draws of them.
    draws = [slope(_generic_params(model, sizes, seed=seed), _graph(), history, covariates) for seed in range(6)]
    for path, *grads in zip(
        (path for path, _ in jax.tree_util.tree_leaves_with_path(draws[0])), *map(jax.tree.leaves, draws), strict=True
    ):
        leaf = jax.tree_util.keystr(path)
        assert np.isfinite(grads).all(), leaf
        dead = (np.asarray(grads) == 0).all(axis=0)
        assert not dead.any(), f"{leaf}: {dead.mean():.1%} of its weights are dead"
    start = jax.jit(model.init)(jax.random.key(3), _graph(), history[0], covariates[0])
    for path, grad in jax.tree_util.tree_leaves_with_path(slope(start, _graph(), history, covariates)):
        assert np.isfinite(grad).all() and np.any(grad != 0), jax.tree_util.keystr(path)


class _Published(nn.Module):
    """A time block as the published STGCN has it: two convolutions of the same input, added inside one ReLU."""

    @nn.compact
    def __call__(self, graph, history, covariates):
        del graph, covariates
        x = history[0].reshape(-1)
        x = nn.Dense(3, name="first")(x) + nn.Dense(3, use_bias=False, name="second")(x)
        return nn.Dense(2, name="readout")(nn.relu(x))[:, None]


# Small modules, and in how many directions their weights can move without a change of the function. A ReLU's unit can
# be scaled up before and down after, and so can the linear half of a gated linear unit; a residual stream that is
# normalised can be rotated; two maps whose product is all that counts can exchange a basis. No leaf lies in these.
_SMALL = {
    "stgcn": (lambda sizes: STGCN(sizes, channels=2, bottleneck=2, hidden=3), 3 * 2 + 2 + 3),
    "graph_wavenet": (lambda sizes: GraphWaveNet(sizes, channels=3, hidden=2), 3 + 2 + 2),
    "graph_wavenet_adaptive": (lambda sizes: GraphWaveNet(sizes, channels=3, hidden=2, adaptive=2), 3 + 2 + 2 + 4),
    "stid": (lambda sizes: STID(sizes, width=3, layers=2, hidden=3), 3 + 2 * 3 + 3),
    "dcrnn": (lambda sizes: DCRNN(sizes, units=2, hidden=3), 3),
}


def _redundancy(module: nn.Module, sizes: ModelSizes, *, least: int) -> int:
    """Directions in which the weights can move without a change of the forecasts: number of weights less generic rank.

    The rank of the derivative is the generic one for most weights and never higher; of the few ReLUs of a small module
    some may be shut or open for all inputs, so weights are drawn until no more than `least` directions are free.
    """
    model = linen_model("small", module)
    total = sum(leaf.size for leaf in jax.tree.leaves(_generic_params(model, sizes)))
    history, covariates = _inputs(sizes, -(-4 * total // sizes.horizon))
    wide = (2.0 * history.astype(np.float64), covariates.astype(np.float64))
    graph = _graph()
    graph = graph._replace(edges=np.asarray(graph.edges, np.float64))
    with jax.enable_x64(True):
        slope = jax.jit(jax.vmap(jax.jacrev(model.apply), in_axes=(None, None, 0, 0)))
    free = total
    for seed in range(60):
        params = _generic_params(model, sizes, seed=seed, gain=1.5)
        with jax.enable_x64(True):
            by_leaf = slope(jax.tree.map(lambda leaf: leaf.astype(np.float64), params), graph, *wide)
        columns = [np.asarray(leaf).reshape(leaf.shape[0] * leaf.shape[1], -1) for leaf in jax.tree.leaves(by_leaf)]
        jacobian = np.concatenate(columns, axis=1)
        length = np.linalg.norm(jacobian, axis=0)
        power = np.linalg.svd(jacobian / np.where(length > 0, length, 1.0), compute_uv=False)
        free = min(free, total - int((power > 1e-9 * power[0]).sum()))
        if free <= least:
            break
    return free


@pytest.mark.parametrize("name", _NAMES)
def test_no_weight_is_redundant(name):
    make, symmetries = _SMALL[name]
    sizes = ModelSizes(7, 2, 2, 2)
    assert _redundancy(make(sizes), sizes, least=symmetries) == symmetries


def test_a_redundant_weight_would_be_found():
    # The scales of the ReLU, and the whole second convolution.
    assert _redundancy(_Published(), ModelSizes(4, 2, 1, 0), least=3) == 3 + 4 * 3


def test_vmap_a_batch_inside_and_a_loop_agree(example):
    model, params, apply = example
    history, covariates = _inputs(_SIZES, 3, seed=9)
    each = [jax.tree.map(lambda leaf, k=k: leaf * np.float32(1.0 + 0.1 * k), params) for k in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    loop = np.stack([apply(p, _graph(), h, c) for p, h, c in zip(each, history, covariates, strict=True)])
    mapped = jax.jit(jax.vmap(model.apply, in_axes=(0, None, 0, 0)))(stacked, _graph(), history, covariates)
    np.testing.assert_allclose(mapped, loop, rtol=1e-4, atol=1e-5)
    loop = np.stack([apply(params, _graph(), h, c) for h, c in zip(history, covariates, strict=True)])
    inside = jax.jit(model.apply_batch)(params, _graph(), np.moveaxis(history, 0, 2), np.moveaxis(covariates, 0, 1))
    assert inside.shape == (3, 3, 1)
    np.testing.assert_allclose(np.moveaxis(inside, 1, 0), loop, rtol=1e-4, atol=1e-5)


# What is compiled for the others agrees with numpy above; every operation on its own takes these two a second.
@pytest.mark.parametrize("name", ["stid", "stgcn"])
def test_jit_and_no_jit_agree(name):
    model = make_model(name, _SIZES)
    params, (history, covariates) = _generic_params(model, _SIZES), _inputs(_SIZES)
    compiled = _compiled(model)(params, _graph(), history, covariates)
    plain = model.apply(*jax.device_put((params, _graph(), history, covariates)))
    np.testing.assert_allclose(plain, compiled, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(example):
    _, params, apply = example
    history, covariates = _inputs(_SIZES)
    wide = np.concatenate([history, 100.0 * np.ones((8, 7, 3), np.float32)])
    wide[_NODES:] *= -50.0
    graph = _graph(spare_nodes=9, spare_edges=30)
    expected = apply(params, _graph(), history, covariates)
    np.testing.assert_allclose(apply(params, graph, wide, covariates), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_nodes_and_edges_changes_nothing(example, seed):
    _, params, apply = example
    history, covariates = _inputs(_SIZES)
    rng = np.random.default_rng(seed)
    place = np.concatenate([[0], 1 + rng.permutation(_NODES - 1), [_NODES]])  # where each node goes
    edges = [(int(place[s]), int(place[r]), w) for s, r, w in _EDGES]
    moved = np.zeros_like(history)
    moved[place] = history
    shuffled = _graph([edges[k] for k in rng.permutation(len(edges))])
    expected = apply(params, _graph(), history, covariates)
    np.testing.assert_allclose(apply(params, shuffled, moved, covariates), expected, rtol=1e-5, atol=1e-5)


# Steps of history and the hops that a model sees along the edges: one graph layer; two in each of three layers; two at
# the first step and then four a step, since a gate that looks two hops far is itself carried over two.
_REACH = {"stid": (7, 0), "stgcn": (7, 1), "graph_wavenet": (7, 6), "dcrnn": (4, 14)}


@pytest.mark.parametrize("name", _REACH)
def test_a_node_beyond_the_receptive_field_changes_nothing(name):
    steps, reach = _REACH[name]
    nodes, sizes = reach + 3, _SIZES._replace(history=steps)
    graph = _graph([(node + 1, node, 1.0) for node in range(nodes - 1)], nodes=nodes)
    model = make_model(name, sizes)
    # Strong weights, or what comes from afar would drown in rounding.
    params = _generic_params(model, sizes, gain=2.0)
    history, covariates = _inputs(sizes, nodes=nodes + 1)
    weight = np.random.default_rng(1).normal(size=(sizes.horizon, 1)).astype(np.float32)

    @jax.jit
    @jax.grad
    def slope(history, params, graph, covariates):
        return (weight * model.apply(params, graph, history, covariates)).sum()

    touched = np.flatnonzero(np.abs(slope(history, params, graph, covariates)).sum(axis=(1, 2)))
    np.testing.assert_array_equal(touched, np.arange(reach + 1))


def test_a_node_that_no_edge_joins_changes_nothing(example):
    model, params, apply = example
    history, covariates = _inputs(_SIZES)
    expected = np.asarray(apply(params, _graph(), history, covariates))
    other = history.copy()
    other[5] += 1.0
    changed = np.asarray(apply(params, _graph(), other, covariates))
    if model.name == "graph_wavenet_adaptive":  # finds likeness where there are no edges
        assert np.abs(changed - expected).max() > 1e-4
    else:
        np.testing.assert_array_equal(changed, expected)


def test_a_region_without_an_edge_is_forecast_from_itself(example):
    model, params, apply = example
    if model.name == "graph_wavenet_adaptive":
        pytest.skip("it hears nodes of its graph that no edge joins")
    history, covariates = _inputs(_SIZES, nodes=2)
    alone = _graph((), nodes=1, spare_edges=3)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, history[:1], covariates))
    expected = reference_forecast(model.name, wide[0], carry_by_loop, (), *wide[1:], _SIZES)
    np.testing.assert_allclose(apply(params, alone, history, covariates), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(InputError, match=r"`model` must be one of .*stgcn.*, got 'gcn'"):
        make_model("gcn", _SIZES)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("stgcn", ModelSizes(6, 6, 2, 0), "history of at least 7 steps, got 6"),
        ("dcrnn", ModelSizes(1, 6, 2, 0), "history of at least 2 steps, got 1"),
        ("stid", ModelSizes(0, 6, 2, 0), "`history` must be at least 1, got 0"),
        ("stid", ModelSizes(12, 0, 2, 0), "`horizon` must be at least 1, got 0"),
        ("stid", ModelSizes(12, 6, 0, 0), "`num_inputs` must be at least 1, got 0"),
        ("stid", ModelSizes(12, 6, 2, -1), "`num_covariates` must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, sizes, words):
    with pytest.raises(InputError, match=words):
        make_model(name, sizes)


@pytest.mark.parametrize(("covariates", "column"), [("none", 0), ("calendar", 1), ("profile", 2)])
def test_the_readme_counts_parameters_as_they_are(covariates, column):
    readme = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(?:, the default)? \| ([\d,]+) / ([\d,]+) / ([\d,]+) \|", readme, re.M)
    assert {name for name, *_ in rows} == set(_NAMES)
    anomaly = covariates == "profile"
    sizes = ModelSizes(12, 6, 5 if anomaly else 2, num_covariates(covariates), anomaly=anomaly)
    for name, *counts in rows:
        leaves = jax.tree.leaves(_shapes(make_model(name, sizes), sizes))
        assert sum(math.prod(leaf.shape) for leaf in leaves) == int(counts[column].replace(",", "")), name
