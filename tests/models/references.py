"""In: parameters, a list of edges and one window. Out: every model's forecast by plain numpy, written from its paper.

How features travel along edges is left open (`Carry`), so that the same reference runs by a loop over edges and by
jraph's message passing.
"""

from collections.abc import Callable, Sequence

import jraph
import numpy as np

from gpdiff_jax.models import ModelSizes

Edges = Sequence[tuple[int, int, float]]
Carry = Callable[[np.ndarray], np.ndarray]
"""[N, X] to [N, X]: what flows into every node, a mean over its edges by their weights, 0 where there are none."""


def carry_by_loop(edges: Edges) -> Carry:
    """One edge at a time, in float64."""

    def carry(x: np.ndarray) -> np.ndarray:
        out, total = np.zeros_like(x), np.zeros(len(x))
        for sender, receiver, weight in edges:
            out[receiver] += weight * x[sender]
            total[receiver] += weight
        for node in range(len(x)):
            out[node] = out[node] / total[node] if total[node] else 0.0
        return out

    return carry


def carry_by_jraph(edges: Edges) -> Carry:
    """Messages along all edges, summed by `jraph.segment_sum`."""
    senders, receivers, weights = (np.asarray(column) for column in zip(*edges, strict=True))

    def carry(x: np.ndarray) -> np.ndarray:
        messages = weights[:, None] * x[senders]
        total = np.asarray(jraph.segment_sum(weights, receivers, len(x)))
        summed = np.asarray(jraph.segment_sum(messages, receivers, len(x)))
        return np.where(total[:, None] > 0, summed / np.where(total > 0, total, 1.0)[:, None], 0.0)

    return carry


def _carry_in_time(carry: Carry, x: np.ndarray) -> np.ndarray:
    return carry(x.reshape(len(x), -1)).reshape(x.shape)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def _convolve(rows: np.ndarray, kernel: np.ndarray, size: int) -> np.ndarray:
    """[T, C] to [T - size + 1, D] by loops over steps and lags; kernel [size * C, D], oldest lag first."""
    channels = rows.shape[1]
    out = np.zeros((len(rows) - size + 1, kernel.shape[1]))
    for t in range(len(out)):
        for lag in range(size):
            out[t] += rows[t + lag] @ kernel[lag * channels : (lag + 1) * channels]
    return out


def _head(w: dict, features: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    forecast = []
    for step, covariates in enumerate(ahead):
        units = features @ w["head_state"]["kernel"] + w["head_lead"][step]
        direct = 0.0
        if len(covariates):
            units = units + covariates @ w["head_covariates"]["kernel"]
            direct = covariates @ w["head_direct"]
        forecast.append(_relu(units) @ w["head_readout"][step] + w["head_bias"][step] + direct)
    return np.asarray(forecast)[:, None]


def _stgcn(w: dict, carry: Carry, back: Carry, history: np.ndarray, covariates: np.ndarray, sizes: ModelSizes):
    del back

    def gate(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        return x[..., :half] * _sigmoid(x[..., half:])

    seen = covariates[: sizes.history]
    clock = _convolve(seen, w["gate_in_covariates"]["kernel"], 4) if sizes.num_covariates else 0.0
    x = gate(np.stack([_convolve(node, w["gate_in"]["kernel"], 4) + clock for node in history]) + w["gate_in"]["bias"])
    flow = _carry_in_time(carry, x)[0]
    x = _relu(np.concatenate([x[0], flow], axis=1) @ w["graph"]["kernel"] + w["graph"]["bias"])
    x = gate(_convolve(x, w["gate_mid"]["kernel"], 4) + w["gate_mid"]["bias"])
    x = gate(_convolve(x, w["gate_out"]["kernel"], min(4, len(x))) + w["gate_out"]["bias"])
    return _head(w, x.reshape(-1), covariates[sizes.history :])


def _diffuse(carry: Carry, back: Carry, x: np.ndarray) -> np.ndarray:
    """[N, ..., C] to [N, ..., 5C]: the features themselves, one and two steps along the edges, one and two against."""
    parts = [x]
    for way in (carry, back):
        once = _carry_in_time(way, x)
        parts += [once, _carry_in_time(way, once)]
    return np.concatenate(parts, axis=-1)


def _graph_wavenet(w: dict, carry: Carry, back: Carry, history: np.ndarray, covariates: np.ndarray, sizes: ModelSizes):
    blocks = -(-(sizes.history - 1) // 3)
    own = None
    if "adaptive_source" in w:
        flat = history.reshape(len(history), -1)
        source = flat @ w["adaptive_source"]["kernel"] + w["adaptive_source"]["bias"]
        likeness = np.exp(source @ (flat @ w["adaptive_sink"]["kernel"]).T)
        own = likeness / likeness.sum(axis=1, keepdims=True)
    x = history @ w["input"]["kernel"]
    if sizes.num_covariates:
        x = x + covariates[: sizes.history] @ w["input_covariates"]["kernel"]
    missing = 3 * blocks + 1 - sizes.history
    x = np.concatenate([np.zeros((len(x), missing, x.shape[2])), x], axis=1)
    skips = []
    for layer in range(2 * blocks):
        dilation = 1 + layer % 2
        # All steps and all nodes, although the forecast needs only some of them.
        pairs = np.concatenate([x[:, :-dilation], x[:, dilation:]], axis=-1)
        z = pairs @ w[f"gate_{layer}"]["kernel"] + w[f"gate_{layer}"]["bias"]
        half = z.shape[-1] // 2
        h = np.tanh(z[..., :half]) * _sigmoid(z[..., half:])
        skips.append(h[0, -1])
        if layer + 1 < 2 * blocks:
            mixed = _diffuse(carry, back, h)
            if own is not None:
                mixed = np.concatenate([mixed, np.einsum("mn,ntc->mtc", own, h)], axis=-1)
            x = x[:, dilation:] + mixed @ w[f"graph_{layer}"]["kernel"] + w[f"graph_{layer}"]["bias"]
            x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    summed = _relu(np.concatenate(skips) @ w["skip"]["kernel"] + w["skip"]["bias"])
    return _head(w, summed, covariates[sizes.history :])


def _stid(w: dict, carry: Carry, back: Carry, history: np.ndarray, covariates: np.ndarray, sizes: ModelSizes):
    del carry, back
    inputs = np.concatenate([history[0].reshape(-1), covariates[sizes.history - 1]])
    x = _relu(inputs @ w["embedding"]["kernel"] + w["embedding"]["bias"])
    for layer in range(3):
        inner = _relu(x @ w[f"encoder_{layer}_in"]["kernel"] + w[f"encoder_{layer}_in"]["bias"])
        x = x + inner @ w[f"encoder_{layer}_out"]["kernel"]
    return _head(w, x, covariates[sizes.history :])


def _dcrnn(w: dict, carry: Carry, back: Carry, history: np.ndarray, covariates: np.ndarray, sizes: ModelSizes):
    units = w["cell_candidate"].shape[1]
    state = np.zeros((len(history), units))
    for t in range(sizes.history):
        driven = _diffuse(carry, back, history[:, t]) @ w["cell_input"]["kernel"] + w["cell_input"]["bias"]
        if sizes.num_covariates:
            driven = driven + covariates[t] @ w["cell_covariates"]["kernel"]
        gates = _sigmoid(driven[:, : 2 * units] + _diffuse(carry, back, state) @ w["cell_gates"])
        reset, update = gates[:, :units], gates[:, units:]
        remembered = _diffuse(carry, back, reset * state) @ w["cell_candidate"]
        state = update * state + (1.0 - update) * np.tanh(driven[:, 2 * units :] + remembered)
    return _head(w, state[0], covariates[sizes.history :])


_REFERENCES = {
    "dcrnn": _dcrnn,
    "graph_wavenet": _graph_wavenet,
    "graph_wavenet_adaptive": _graph_wavenet,
    "stgcn": _stgcn,
    "stid": _stid,
}


def reference_forecast(
    name: str,
    params: dict,
    make_carry: Callable[[Edges], Carry],
    edges: Edges,
    history: np.ndarray,
    covariates: np.ndarray,
    sizes: ModelSizes,
) -> np.ndarray:
    """[P, 1], the centre's forecast; `history` holds the real nodes only."""
    back = [(receiver, sender, weight) for sender, receiver, weight in edges]
    return _REFERENCES[name](params, make_carry(edges), make_carry(back), history, covariates, sizes)
