"""Region-steps per second of the harvest engine, for every model and number of regions, against a PyTorch loop.

    python -m benchmarks.harvest [--quick] [--peer torch] [--models stgcn,graph_wavenet] [--regions 50,200,1000,5000]

A region-step is one training step (64 windows; forward, backward, Adam) of one region, whose graph has 10 nodes, the
region and its 9 nearest. The ceiling is the time that the step's own matrix products take alone, region by region in
the same compiled loop. Every case has a process of its own, so that its memory is its own. The peer trains one region
after another with the same model, windows and optimiser: once fed by a standard DataLoader, once with the series
indexed directly; and once more computing, as the library does, only what reaches the centre. Peers need torch.
"""

import dataclasses
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measuring import matrix_products, median_seconds, peak_memory, print_line, product_operations
from experiments import command_line
from gpdiff_jax.cities import City, SimulationConfig, simulate_cities
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.windows import draw_windows
from gpdiff_jax.models import Model, make_model, model_names
from gpdiff_jax.models.loss import batch_forecast, masked_huber
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.training.parallel import ShardedRows, use_every_core
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.harvest import harvest_chunks, plan_chunks
from gpdiff_jax.zoo.pooled import initial_params
from gpdiff_jax.zoo.region_training import HarvestConfig

flags.DEFINE_bool("quick", False, "50 regions; with --models stgcn it ends within two minutes")
flags.DEFINE_enum("peer", None, ["torch"], "what to run beside it")
flags.DEFINE_list("models", list(model_names()), "models to measure")
flags.DEFINE_list("regions", ["50", "200", "1000", "5000"], "numbers of regions")
flags.DEFINE_integer("steps", 20, "training steps of a region", 2)
flags.DEFINE_integer("regions_per_batch", 0, "regions side by side; 0 takes 1 on a CPU, 64 elsewhere", 0)

_WINDOWS = 64
_NEIGHBOURS = 9


def _sources(regions: int) -> Sources:
    num_cities = max(2, -(-regions // 1000))
    simulation = SimulationConfig(cities=num_cities, regions=regions // num_cities, days=28)
    cities = [_with_nearest(city) for city in simulate_cities(simulation, seed=0)]
    data = DataConfig(covariates="calendar", variants=4, max_neighbours=_NEIGHBOURS)
    return with_prompts(prepare_sources(cities, data, key=jax.random.key(0), validation_windows=4), cities)


def _with_nearest(city: City) -> City:
    """The city with an edge into every region from each of its nearest."""
    assert city.latitude is not None and city.longitude is not None
    place = np.stack([city.latitude, city.longitude * np.cos(np.deg2rad(city.latitude.mean()))])
    distance = np.hypot(*(place[:, :, None] - place[:, None, :]))
    senders = np.argsort(distance, axis=1)[:, 1 : _NEIGHBOURS + 1].astype(np.int32).ravel()
    receivers = np.repeat(np.arange(city.num_nodes, dtype=np.int32), _NEIGHBOURS)
    order = np.lexsort((receivers, senders))
    weights = np.ones(len(order), np.float32)
    return dataclasses.replace(city, senders=senders[order], receivers=receivers[order], weights=weights)


def _products(model: Model, params: Params, sources: Sources) -> list[tuple[tuple[int, ...], tuple[int, ...], Any]]:
    """Shapes and dimension numbers of all matrix products of one training step."""
    graph = jax.tree.map(lambda leaf: leaf[0], sources.graphs)  # all are of one size
    windows = draw_windows(sources.bank, sources.train, graph.nodes, _WINDOWS, key=jax.random.key(0))

    def loss_fn(params: Params) -> jax.Array:
        return masked_huber(batch_forecast(model, params, graph, windows), windows.target, windows.mask)

    return matrix_products(jax.grad(loss_fn), params)


def _products_alone(products: list, regions: int, steps: int, repeats: int, side_by_side: int) -> float:
    """Seconds per region-step of the matrix products alone, spread and looped as in the harvest."""

    def region(seed: jax.Array) -> jax.Array:
        operands = [
            (jnp.full(left, 0.01) + 0.0 * seed, jnp.full(right, 0.01) + 0.0 * seed) for left, right, _ in products
        ]

        def step(total: jax.Array, index: None) -> tuple[jax.Array, None]:
            del index
            for (left, right), (_, _, numbers) in zip(operands, products, strict=True):
                left, right, total = jax.lax.optimization_barrier((left, right, total))
                product = jax.lax.optimization_barrier(jax.lax.dot_general(left, right, numbers))
                total = total + product.reshape(-1)[0]
            return total, None

        return jax.lax.scan(step, seed, length=steps)[0]

    batch_size = side_by_side if side_by_side > 1 else None
    spread = ShardedRows(lambda _, seeds: jax.lax.map(region, seeds, batch_size=batch_size), None)
    seeds = np.zeros(regions, np.float32)
    return median_seconds(lambda: spread(seeds).read(), repeats) / (regions * steps)


def _side_by_side() -> int:
    return flags.FLAGS.regions_per_batch or (1 if jax.default_backend() == "cpu" else 64)


def _harvest_seconds(model: Model, params: Params, sources: Sources, steps: int) -> tuple[float, float]:
    """Seconds per region-step once compiled, and seconds of compilation."""
    side_by_side = _side_by_side()
    config = HarvestConfig(
        steps=steps,
        evaluate_every=steps,
        snapshots=1,
        windows=_WINDOWS,
        anchor_windows=0,
        regions_per_batch=side_by_side,
    )
    plan = plan_chunks(sources, max(64, side_by_side * jax.local_device_count()), HarvestConfig().steps)
    warm_up = [one for index, one in enumerate(plan) if one[2:] not in [before[2:] for before in plan[:index]]]
    seconds = []
    for chunks in (warm_up, warm_up, plan):
        begin = time.perf_counter()
        for _ in harvest_chunks(model, sources, params, config, chunks, key=jax.random.key(0)):
            pass
        seconds.append(time.perf_counter() - begin)
    return seconds[2] / (sources.num_regions * steps), seconds[0] - seconds[1]


def main(argv: list[str]) -> None:
    """Measures every model over every number of regions."""
    del argv
    values = flags.FLAGS
    regions = ["50"] if values.quick else values.regions
    cases = [(name, count) for name in values.models for count in regions]
    if len(cases) == 1:
        use_every_core()
        _measure(cases[0][0], int(cases[0][1]))
        return
    for name, count in cases:
        case = [f"--models={name}", f"--regions={count}"]
        # The last of a repeated flag holds; this process does not touch a device.
        ended = subprocess.run([sys.executable, "-m", "benchmarks.harvest", *sys.argv[1:], *case])
        if ended.returncode:
            sys.exit(ended.returncode)


def _measure(name: str, regions: int) -> None:
    sources = _sources(regions)
    model = make_model(name, sources.sizes)
    graphs, sizes = sources.graphs, sources.sizes
    params = jax.jit(lambda: initial_params(model, graphs, sizes, key=jax.random.key(1)))()
    steps = flags.FLAGS.steps
    ours, compiling = _harvest_seconds(model, params, sources, steps)
    case = f"{name}_{regions}"
    print_line("harvest", case, "rate", 1.0 / ours, "region-steps/s")
    print_line("harvest", case, "time", 1e3 * ours, "ms/region-step")
    print_line("harvest", case, "compilation", compiling, "s")
    print_line("harvest", case, "peak_memory", peak_memory(), "GiB")
    products = _products(model, params, sources)
    alone = _products_alone(products, min(regions, 64), steps, 3, _side_by_side())
    print_line("harvest", case, "operations", product_operations(products) / 1e6, "MFLOP/region-step")
    print_line("harvest", case, "products_alone", 1e3 * alone, "ms/region-step")
    print_line("harvest", case, "share_of_matmul_ceiling", alone / ours, "1")
    if flags.FLAGS.peer and name in ("stgcn", "graph_wavenet"):
        _compare(name, case, sources, ours, 10 if flags.FLAGS.quick else 40)


def _compare(name: str, case: str, sources: Sources, ours: float, steps: int) -> None:
    # Here, so that the rest of the benchmark does without torch.
    from benchmarks.torch_peer import torch_seconds

    peers: dict[str, dict[str, bool]] = {
        "torch, DataLoader": {"loader": True, "centre_only": False},
        "torch, direct indexing": {"loader": False, "centre_only": False},
        "torch, direct indexing, centre only": {"loader": False, "centre_only": True},
    }
    for peer, choices in peers.items():
        theirs = torch_seconds(name, sources, steps, windows=_WINDOWS, **choices)
        ratio = {"peer": peer, "peer_value": 1e3 * theirs, "ratio": theirs / ours}
        print_line("harvest", case, "time", 1e3 * ours, "ms/region-step", **ratio)


if __name__ == "__main__":
    command_line.run(main)
