"""In: functions to time and what they need. Out: medians, and one JSON line per case on standard output."""

import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.analysis.metrics import mae


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time after one warm-up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def deadline(minutes: float | None) -> float:
    """When so many minutes from now are over, of `time.monotonic`; never if None."""
    return time.monotonic() + (math.inf if minutes is None else 60 * minutes)


def peak_memory() -> float:
    """Most memory in GiB that this process has held at a time; Linux only."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def device_name() -> str:
    """The device that JAX runs on, and how many there are; on a CPU the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}"
    processor = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else processor} x {jax.device_count()} cores"


def matrix_products(
    function: Callable[..., Any], *args: Any
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, Any]]]:
    """Shapes and dimension numbers of all matrix products of a function, those in a `scan` as often as it runs.

    XLA's own count leaves out what it gives to libraries, which on a GPU is nearly all.

    Raises:
      ValueError: a loop of a length that is not known, or a branch.
    """
    found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, Any]]] = []

    def walk(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("while", "cond"):
                raise ValueError(f"how often a `{equation.primitive.name}` runs what is in it is not known")
            if equation.primitive.name == "dot_general":
                left, right = (var.aval.shape for var in equation.invars)
                found.extend([(left, right, equation.params["dimension_numbers"])] * times)
            for value in equation.params.values():
                for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner, times * equation.params.get("length", 1))

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1)
    return found


def product_operations(
    products: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, Any]]],
) -> float:
    """Floating-point operations of matrix products, as `matrix_products` finds them."""
    total = 0
    for left, right, ((_, of_right), (_, batched)) in products:
        own = [size for axis, size in enumerate(right) if axis not in (*of_right, *batched)]
        total += 2 * math.prod(left) * math.prod(own)
    return float(total)


def print_errors(
    benchmark: str,
    case: str,
    forecast: Float[np.ndarray, "S R P"],
    truth: Float[np.ndarray, "S R P"],
    average: Float[np.ndarray, "S R P"],
    *,
    weekend: Bool[np.ndarray, "S P"] | None,
    unit: str,
    parts: Mapping[str, Bool[np.ndarray, "S R P"]] | None = None,
) -> None:
    """Mean absolute errors as JSON lines, beside the historical average's: of all, by kind of day, and of more parts.

    Args:
      benchmark: its name.
      case: what was forecast, and how.
      forecast: [S, R, P], in data units.
      truth: the same, NaN where missing.
      average: the historical average.
      weekend: [S, P], whether a step falls on a weekend; None where the calendar is unknown.
      unit: of all three.
      parts: by name, further parts of the readings.
    """
    chosen: dict[str, np.ndarray] = {"all": np.ones(truth.shape, bool)}
    if weekend is not None:
        on_weekend = np.broadcast_to(weekend[:, None], truth.shape)
        chosen |= {"weekdays": ~on_weekend, "weekends": on_weekend}
    for name, part in (chosen | dict(parts or {})).items():
        error, peer = (float(mae(values[part], truth[part])) for values in (forecast, average))
        more = {"peer": "historical average", "peer_value": peer, "ratio": peer / error}
        print_line(benchmark, f"{case}: {name}", "mean_absolute_error", error, unit, **more)


def print_line(benchmark: str, case: str, metric: str, value: float, unit: str, **peer: Any) -> None:
    """One measurement as a JSON line; `peer`, `peer_value` and `ratio` where a peer ran beside it."""
    line = {"benchmark": benchmark, "case": case, "metric": metric, "value": value, "unit": unit}
    print(json.dumps({**line, "device": device_name(), **peer}), flush=True)
