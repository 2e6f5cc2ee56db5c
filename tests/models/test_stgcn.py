"""In: random parameters, region graphs and windows. Out: what an STGCN may depend on, and a second opinion in numpy."""

import math

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.models import ModelSizes, make_model
from gpdiff_jax.regions import centre_weights

_SIZES = ModelSizes(history=12, horizon=6, num_inputs=3, num_covariates=5)
_EDGES = ((1, 0, 0.5), (2, 0, 1.0), (3, 0, 0.1), (0, 1, 0.7), (1, 2, 0.3), (0, 4, 0.9))  # from, to, weight
_NODES = 5  # no edge enters the centre from node 4


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
    padded = jraph.pad_with_graphs(graph, nodes + spare_nodes, len(edges) + spare_edges, n_graph=2)
    return jax.tree.map(jnp.asarray, padded)


def _example(sizes: ModelSizes = _SIZES, *, nodes: int = _NODES + 1, seed: int = 0):
    """The model with generic parameters (no zeros that an initialiser left), and generic inputs."""
    keys = jax.random.split(jax.random.key(seed), 3)
    model = make_model("stgcn", sizes)
    history = jax.random.normal(keys[0], (nodes, sizes.history, sizes.num_inputs))
    covariates = jax.random.normal(keys[1], (sizes.history + sizes.horizon, sizes.num_covariates))
    shapes = jax.eval_shape(model.init, keys[2], _graph(spare_nodes=nodes - _NODES), history, covariates)
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(max(2, shape[0])), jnp.float32)

    params = jax.tree.map(lambda leaf: draw(leaf.shape), shapes)
    return model, params, history, covariates


@pytest.fixture(scope="module", name="example")
def _generic():
    return _example()


@pytest.fixture(scope="module", name="apply")
def _apply(example):
    return jax.jit(example[0].apply)


def _in_numpy(params, edges, history, covariates, sizes: ModelSizes) -> np.ndarray:
    """The centre's forecast by loops over nodes, steps and lags, in float64."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    history, covariates = np.asarray(history, np.float64), np.asarray(covariates, np.float64)
    kernel_size = 4

    def gated(rows: np.ndarray, layer: str, size: int, beside: np.ndarray | None = None) -> np.ndarray:
        out = []
        for t in range(len(rows) - size + 1):
            total = w[layer]["bias"].copy()
            for lag in range(size):
                for channel in range(rows.shape[1]):
                    total += rows[t + lag, channel] * w[layer]["kernel"][lag * rows.shape[1] + channel]
                for column in range(0 if beside is None else beside.shape[1]):
                    kernel = w["gate_in_covariates"]["kernel"]
                    total += beside[t + lag, column] * kernel[lag * beside.shape[1] + column]
            half = len(total) // 2
            out.append(total[:half] / (1.0 + np.exp(-total[half:])))
        return np.stack(out)

    seen = covariates[: sizes.history] if sizes.num_covariates else None
    gates = [gated(node, "gate_in", kernel_size, seen) for node in history]
    entering = {sender: weight for sender, receiver, weight in edges if receiver == 0}
    flow = np.zeros_like(gates[0])
    for sender, weight in entering.items():
        flow += weight / math.fsum(entering.values()) * gates[sender]
    mixed = np.concatenate([gates[0], flow], axis=1) @ w["graph"]["kernel"] + w["graph"]["bias"]
    x = gated(np.maximum(mixed, 0.0), "gate_mid", kernel_size)
    x = gated(x, "gate_out", min(kernel_size, len(x)))
    state = x.reshape(-1) @ w["head_state"]["kernel"]
    forecast = np.zeros((sizes.horizon, 1))
    for step in range(sizes.horizon):
        hidden, ahead = state + w["head_lead"][step], covariates[sizes.history + step]
        if sizes.num_covariates:
            hidden = hidden + ahead @ w["head_covariates"]["kernel"]
            forecast[step] = ahead @ w["head_direct"]
        forecast[step] += np.maximum(hidden, 0.0) @ w["head_readout"][step] + w["head_bias"][step]
    return forecast


@pytest.mark.parametrize(
    "sizes",
    [_SIZES, ModelSizes(12, 6, 2, 0), ModelSizes(7, 1, 1, 2), ModelSizes(8, 3, 2, 1)],
    ids=["all", "no covariates", "shortest", "short"],
)
def test_a_loop_in_numpy_forecasts_the_same(sizes):
    model, params, history, covariates = _example(sizes)
    forecast = jax.jit(model.apply)(params, _graph(), history, covariates)
    assert forecast.shape == (sizes.horizon, 1) and forecast.dtype == jnp.float32
    np.testing.assert_allclose(forecast, _in_numpy(params, _EDGES, history, covariates, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [_SIZES, ModelSizes(12, 6, 2, 0)], ids=["covariates", "none"])
def test_every_weight_gets_a_gradient(sizes):
    model, params, _, _ = _example(sizes)
    keys = jax.random.split(jax.random.key(7), 2)
    # Wide inputs, so that every hidden unit is active somewhere.
    history = 10.0 * jax.random.normal(keys[0], (256, _NODES + 1, sizes.history, sizes.num_inputs))
    covariates = jax.random.normal(keys[1], (256, sizes.history + sizes.horizon, sizes.num_covariates))

    @jax.jit
    @jax.grad
    def slope(params):
        forecast = jax.vmap(model.apply, in_axes=(None, None, 0, 0))(params, _graph(), history, covariates)
        return jnp.square(forecast - 1.0).mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(slope(params)):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        assert (np.asarray(grad) != 0).all(), f"{name}: {(np.asarray(grad) == 0).mean():.1%} of its weights are dead"


def test_every_leaf_gets_a_gradient_at_the_start_of_training():
    model, _, history, covariates = _example()
    params = jax.jit(model.init)(jax.random.key(3), _graph(), history, covariates)
    grads = jax.jit(jax.grad(lambda p: jnp.abs(model.apply(p, _graph(), history, covariates) - 1.0).mean()))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad != 0), jax.tree_util.keystr(path)


def test_jit_no_jit_vmap_and_a_loop_agree(example, apply):
    model, params, _, _ = example
    keys = jax.random.split(jax.random.key(9), 2)
    history = jax.random.normal(keys[0], (4, _NODES + 1, 12, 3))
    covariates = jax.random.normal(keys[1], (4, 18, 5))
    both = [jax.tree.map(lambda leaf, k=k: leaf * (1.0 + 0.1 * k), params) for k in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    loop = [model.apply(*row, _graph(), h, c) for *row, h, c in zip(both, history, covariates, strict=True)]
    compiled = [apply(p, _graph(), h, c) for p, h, c in zip(both, history, covariates, strict=True)]
    batched = jax.jit(jax.vmap(model.apply, in_axes=(0, None, 0, 0)))(stacked, _graph(), history, covariates)
    np.testing.assert_allclose(np.stack(compiled), np.stack(loop), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batched, np.stack(loop), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spare_nodes", "spare_edges"), [(1, 7), (6, 1), (9, 30)])
def test_padding_changes_nothing(example, apply, spare_nodes, spare_edges):
    _, params, history, covariates = example
    wide = jnp.concatenate([history, 100.0 * jnp.ones((spare_nodes - 1, 12, 3))])
    wide = wide.at[_NODES:].multiply(-50.0)
    graph = _graph(spare_nodes=spare_nodes, spare_edges=spare_edges)
    expected = apply(params, _graph(), history, covariates)
    np.testing.assert_allclose(apply(params, graph, wide, covariates), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_neighbours_and_edges_changes_nothing(example, apply, seed):
    _, params, history, covariates = example
    rng = np.random.default_rng(seed)
    place = np.concatenate([[0], 1 + rng.permutation(_NODES - 1), [_NODES]])  # where each node goes
    edges = [(int(place[s]), int(place[r]), w) for s, r, w in _EDGES]
    moved = jnp.zeros_like(history).at[place].set(history)
    shuffled = _graph([edges[k] for k in rng.permutation(len(edges))])
    expected = apply(params, _graph(), history, covariates)
    np.testing.assert_allclose(apply(params, shuffled, moved, covariates), expected, rtol=1e-6, atol=1e-6)


def test_only_nodes_whose_edge_enters_the_centre_count(example, apply):
    _, params, history, covariates = example
    expected = np.asarray(apply(params, _graph(), history, covariates))
    for node in range(_NODES):
        changed = np.asarray(apply(params, _graph(), history.at[node].add(1.0), covariates))
        if node == 4:
            np.testing.assert_array_equal(changed, expected)
        else:
            assert np.abs(changed - expected).max() > 1e-4, node


def test_a_region_without_an_edge_is_forecast_from_itself(example, apply):
    _, params, history, covariates = example
    alone = _graph((), spare_edges=len(_EDGES) + 1)
    np.testing.assert_array_equal(centre_weights(alone), np.zeros(_NODES + 1))
    forecast = apply(params, alone, history, covariates)
    np.testing.assert_allclose(forecast, _in_numpy(params, (), history, covariates, _SIZES), rtol=1e-5, atol=1e-5)


def test_weights_into_the_centre_are_those_of_jraphs_message_passing():
    graph = _graph(spare_nodes=3, spare_edges=4)
    one_hot = jnp.eye(graph.nodes.shape[0])
    share = graph.edges / jraph.segment_sum(graph.edges, graph.receivers, graph.nodes.shape[0])[graph.receivers]
    messages = one_hot[graph.senders] * jnp.where(jnp.isfinite(share), share, 0.0)[:, None]
    reached = jraph.segment_sum(messages, graph.receivers, graph.nodes.shape[0])
    np.testing.assert_allclose(centre_weights(graph), reached[0], rtol=1e-6)
    np.testing.assert_allclose(centre_weights(graph)[:5], np.array([0, 0.5, 1.0, 0.1, 0]) / 1.6, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (ModelSizes(6, 6, 2, 0), "history of at least 7 steps, got 6"),
        (ModelSizes(0, 6, 2, 0), "`history` must be at least 1, got 0"),
        (ModelSizes(12, 0, 2, 0), "`horizon` must be at least 1, got 0"),
        (ModelSizes(12, 6, 0, 0), "`num_inputs` must be at least 1, got 0"),
        (ModelSizes(12, 6, 2, -1), "`num_covariates` must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(InputError, match=words):
        make_model("stgcn", sizes)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(InputError, match=r"`model` must be one of .*stgcn.*, got 'gcn'"):
        make_model("gcn", _SIZES)
