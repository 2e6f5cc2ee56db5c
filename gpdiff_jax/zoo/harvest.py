"""In: source cities and a model. Out: the parameter zoo, a few vectors per region, each grown from one pooled model.

The region axis is added here: regions of like size in buckets, buckets in chunks, a chunk spread over the devices.
"""

import dataclasses
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from gpdiff_jax.data.region_graphs import trim_graphs
from gpdiff_jax.data.sources import SourceRegion, Sources
from gpdiff_jax.errors import InputError, NotFiniteError, is_out_of_memory
from gpdiff_jax.files import user_path
from gpdiff_jax.hosts import num_hosts
from gpdiff_jax.models.protocol import Model, ModelSizes, model_text
from gpdiff_jax.prompts.sources import PromptedSources
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first, check_agreed, least_devices
from gpdiff_jax.training.memory import bytes_of, check_room
from gpdiff_jax.training.parallel import PendingRows, ShardedRows, rows_side_by_side
from gpdiff_jax.training.storage import is_filled
from gpdiff_jax.training.stored_form import shapes_of
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.parameter_zoo import (
    ParameterZoo,
    StoredVectors,
    finish_zoo,
    finished_chunks,
    load_chunk,
    load_zoo,
    make_zoo,
    partial_folder,
    save_chunk,
)
from gpdiff_jax.zoo.region_training import HarvestConfig, HarvestedRegion, Pace, SharedData, make_region_trainer

_MOST_BUCKETS = 3
# One more bucket costs one more compilation, some ten seconds. It has to save this share of the work, and this much of
# it: a step of 32 windows costs about 0.1 ms per node on a CPU core.
_WORTHWHILE_SHARE = 0.15
_WORTHWHILE_NODE_STEPS = 100_000


class Chunk(NamedTuple):
    """Regions that are trained by one call of one compiled program."""

    index: int
    rows: Int[np.ndarray, " X"]  # numbers of the regions
    num_nodes: int  # N of their graphs, cut to the largest of the bucket
    num_edges: int
    size: int  # regions that the program takes; it is filled up with repeats of the last


def size_buckets(sizes: Int[np.ndarray, " R"], steps: int, most: int = _MOST_BUCKETS) -> list[int]:
    """Widths to which graphs are padded, so that one hub does not pad them all.

    Args:
      sizes: nodes of every region graph.
      steps: training steps of a region.
      most: most buckets.

    Returns:
      At most so many widths, in order; each but the largest saves a worthwhile share of all padded nodes.
    """
    widths = np.unique(sizes)
    chosen, cost = (widths[-1],), int(widths[-1]) * len(sizes)
    for count in range(2, min(most, len(widths)) + 1):
        options = [(*some, widths[-1]) for some in itertools.combinations(widths[:-1], count - 1)]
        costs = [int(np.asarray(option)[np.searchsorted(option, sizes)].sum()) for option in options]
        saved = cost - min(costs)
        if saved < _WORTHWHILE_SHARE * cost or saved * steps < _WORTHWHILE_NODE_STEPS:
            break
        chosen, cost = options[int(np.argmin(costs))], min(costs)
    return [int(width) for width in chosen]


def plan_chunks(sources: Sources, size: int, steps: int) -> list[Chunk]:
    """Which regions are trained together.

    Args:
      sources: the source regions.
      size: most regions per chunk.
      steps: training steps of a region, all its vectors together.

    Returns:
      The chunks, every region in exactly one; within a bucket in the order of the regions.
    """
    nodes, edges = (np.asarray(count)[:, 0] for count in (sources.graphs.n_node, sources.graphs.n_edge))
    widths, chunks = size_buckets(nodes, steps), []
    bucket = np.searchsorted(widths, nodes)
    for index in range(len(widths)):
        rows = np.flatnonzero(bucket == index)
        most = (int(nodes[rows].max()) + 1, int(edges[rows].max()) + 1)  # one spare, which padded edges join
        # Chunks of one bucket are of one size, up to one region.
        parts = np.array_split(rows, -(-len(rows) // size))
        chunks += [Chunk(len(chunks) + k, part, *most, len(parts[0])) for k, part in enumerate(parts)]
    return chunks


def harvest_chunks(
    model: Model,
    sources: Sources,
    pooled: Params,
    config: HarvestConfig,
    chunks: Sequence[Chunk],
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
) -> Iterator[tuple[Chunk, HarvestedRegion]]:
    """Trains the regions of the given chunks; while one is handed over, the next is in work.

    Args:
      model: the forecaster.
      sources: the source regions.
      pooled: the pooled model.
      config: steps and sizes; `regions_per_batch` above 0.
      chunks: of `plan_chunks`, all or some; what a region is trained beside does not depend on which.
      key: random key of the harvest.
      devices: to spread a chunk over; None for all local ones.

    Yields:
      A chunk, and the result of its regions on the host, leaves [X, M, ...].

    Raises:
      InputError: the stretches of a city's training span are too many for its windows.
      NotFiniteError: a region's parameters or its validation error are not finite; names the region.
    """
    short = np.asarray(sources.train.count)[np.asarray(sources.graphs.nodes)[:, 0]] < config.data_windows
    if short.any():
        name = sources.names[int(np.flatnonzero(short)[0])]
        raise InputError(f"`data_windows` (={config.data_windows}) is more than the windows of {name!r}; ask for fewer")
    start_key, train_key = jax.random.split(key)
    shared = SharedData(sources.bank, sources.train, pooled, start_key, train_key, Pace.of(config))

    spread = ShardedRows(_make_train_rows(model, sources.sizes, _without_pace(config)), shared, devices)
    # On the host, where a chunk is cut out without a program of its own.
    regions: SourceRegion = jax.tree.map(np.asarray, sources.regions)
    pending: tuple[Chunk, PendingRows] | None = None
    for chunk in chunks:
        filled = np.minimum(np.arange(chunk.size), len(chunk.rows) - 1)
        cut: SourceRegion = jax.tree.map(lambda leaf, rows=chunk.rows[filled]: leaf[rows], regions)
        cut = cut._replace(graph=trim_graphs(cut.graph, chunk.num_nodes, chunk.num_edges))
        started = (chunk, spread(cut))
        if pending is not None:
            yield _finished(*pending, sources)
        pending = started
    if pending is not None:
        yield _finished(*pending, sources)


def _without_pace(config: HarvestConfig) -> HarvestConfig:
    """The configuration with the defaults of what the program takes as numbers, so that all choices share it."""
    every = {"steps": config.evaluate_every * config.snapshots}
    return dataclasses.replace(HarvestConfig(), **every, **{name: getattr(config, name) for name in _STATIC})


_STATIC = (
    "init",
    "windows",
    "evaluate_every",
    "snapshots",
    "anchor_windows",
    "seeds",
    "data_windows",
    "regions_per_batch",
)


@bounded_cache(16)
def _make_train_rows(
    model: Model, sizes: ModelSizes, config: HarvestConfig
) -> Callable[[SharedData, SourceRegion], HarvestedRegion]:
    train = make_region_trainer(model, sizes, config)

    def train_rows(shared: SharedData, regions: SourceRegion) -> HarvestedRegion:
        # A batch of one would still be a batch, with batched products, which are slower.
        count = rows_side_by_side(config.regions_per_batch)
        batch_size = count if count > 1 else None
        return jax.lax.map(lambda region: train(shared, region), regions, batch_size=batch_size)

    return train_rows


def _finished(chunk: Chunk, pending: PendingRows, sources: Sources) -> tuple[Chunk, HarvestedRegion]:
    result: HarvestedRegion = jax.tree.map(lambda leaf: leaf[: len(chunk.rows)], pending.read())
    broken = np.asarray(sources.validated)[chunk.rows] & ~np.isfinite(result.validation_mae).all(axis=1)
    for leaf in jax.tree.leaves(result.params):
        broken |= ~np.isfinite(leaf).reshape(len(chunk.rows), -1).all(axis=1)
    if broken.any():
        name = sources.names[int(chunk.rows[np.flatnonzero(broken)[0]])]
        raise NotFiniteError(f"the training of region {name!r} left the finite numbers; lower the learning rate")
    return chunk, result


def measure_regions_per_batch(
    model: Model,
    sources: Sources,
    pooled: Params,
    config: HarvestConfig,
    *,
    candidates: Sequence[int] = (1, 8, 64, 256),
    devices: Sequence[Device] | None = None,
) -> int:
    """Trains a few steps with each number of regions side by side and returns the fastest per region.

    Args:
      model: the forecaster.
      sources: the source regions.
      pooled: the pooled model.
      config: of the harvest.
      candidates: numbers of regions to try; those above the number of regions are left out.
      devices: see `harvest_chunks`.

    Returns:
      One of the candidates.
    """
    seconds: dict[int, float] = {}
    taken = math.inf
    num_devices = num_hosts() * (least_devices() if devices is None else len(devices))
    for count in candidates:
        if count > max(1, sources.num_regions // num_devices):
            break
        short = dataclasses.replace(config, steps=20, evaluate_every=20, snapshots=1, regions_per_batch=count)
        chunk = plan_chunks(sources, count * num_devices, steps=0)[-1]
        try:
            for _ in range(2):  # the first call compiles
                begin = time.perf_counter()
                list(harvest_chunks(model, sources, pooled, short, [chunk], key=jax.random.key(0), devices=devices))
                taken = (time.perf_counter() - begin) / len(chunk.rows)
        except Exception as error:
            if not seconds or not is_out_of_memory(error) or num_hosts() > 1:
                raise
            break  # more do not fit either
        seconds[count] = taken
    return ask_first(lambda: min(seconds, key=lambda count: seconds[count]))


def harvest_zoo(
    model: Model,
    sources: PromptedSources,
    pooled: Params,
    config: HarvestConfig,
    *,
    key: Key,
    folder: pathlib.Path | None = None,
    chunk: int = 64,
    devices: Sequence[Device] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> ParameterZoo:
    """Trains every region on its own, from the start that `config.init` names.

    Args:
      model: the forecaster.
      sources: the source regions.
      pooled: the pooled model.
      config: steps and sizes.
      key: random key.
      folder: where the zoo is written, chunk by chunk; a harvest that was stopped goes on after the last chunk that it
        wrote, with the same result, and a finished one is read. None keeps the zoo in memory.
      chunk: regions per call of the compiled program; progress is reported after each.
      devices: see `harvest_chunks`.
      progress: called with (regions done, metrics).

    Returns:
      The zoo, with the sources attached.

    Raises:
      InputError: see `harvest_chunks`; or the folder holds another harvest, or a damaged one.
      NotFiniteError: see `harvest_chunks`.
    """
    if config.regions_per_batch is None:
        config = dataclasses.replace(config, regions_per_batch=1 if jax.default_backend() == "cpu" else 0)
    plan = plan_chunks(sources, chunk, config.steps * config.seeds * config.data_windows)
    mine = fingerprint(model, sources, pooled, config, plan, key=key)
    check_agreed({"settings or data of the harvest": mine})
    if folder is not None and is_filled(user_path(folder)):
        return load_zoo(folder, sources, of=mine)
    results: dict[int, HarvestedRegion] = {}
    if folder is not None:
        folder, found = user_path(folder), []
        for index in sorted(finished_chunks(folder)):
            result, facts = load_chunk(folder, index)
            results[index] = result._replace(params={})  # what lies on disk need not stay in memory
            found.append(facts["regions_per_batch"])
            if facts["of"] != mine:
                place = str(partial_folder(folder))
                raise InputError(
                    f"{place!r} holds chunks of a harvest of other cities, settings, model, random key or version "
                    "of JAX; name another folder"
                )
        if config.regions_per_batch == 0 and found:
            # The least, if memory ran out with more.
            config = dataclasses.replace(config, regions_per_batch=min(found))
    if config.regions_per_batch == 0:
        chosen = measure_regions_per_batch(model, sources, pooled, config, devices=devices)
        config = dataclasses.replace(config, regions_per_batch=chosen)
    facts = {"of": mine}
    if folder is None:
        vectors = sources.num_regions * config.vectors
        check_room(vectors * bytes_of(pooled), f"{vectors} harvested vectors, which a `folder` keeps out of memory,")
    missing = [one for one in plan if one.index not in results]
    done = sources.num_regions - sum(len(one.rows) for one in missing)
    for one, result, count in _fitting_chunks(model, sources, pooled, config, missing, key=key, devices=devices):
        if folder is not None:
            save_chunk(folder, one.index, result, facts | {"regions_per_batch": count})
        done += len(one.rows)
        if progress:
            progress(done, chunk_metrics(result))
        results[one.index] = result if folder is None else result._replace(params={})
    rows = [one.rows for one in plan]
    order = np.argsort(np.concatenate(rows))
    harvested = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *(results[one.index] for one in plan))
    if folder is None:
        return make_zoo(model.name, sources, pooled, harvested)
    zoo = make_zoo(model.name, sources, pooled, harvested, StoredVectors(folder, tuple(rows), shapes_of(pooled)))
    finish_zoo(folder, zoo, rows, facts["of"])
    return zoo


def _fitting_chunks(
    model: Model,
    sources: Sources,
    pooled: Params,
    config: HarvestConfig,
    missing: list[Chunk],
    *,
    key: Key,
    devices: Sequence[Device] | None,
) -> Iterator[tuple[Chunk, HarvestedRegion, int]]:
    """`harvest_chunks`, with half as many regions side by side where memory runs out; yields their number, too."""
    while True:
        count = rows_side_by_side(config.regions_per_batch)
        try:
            for one, result in harvest_chunks(model, sources, pooled, config, missing, key=key, devices=devices):
                missing = missing[1:]
                yield one, result, count
            return
        except Exception as error:
            # Of several hosts, the others would go on as they were.
            if not is_out_of_memory(error) or count == 1 or num_hosts() > 1:
                raise
            config = dataclasses.replace(config, regions_per_batch=count // 2)
            print(f"no room for {count} regions side by side; the harvest goes on with {count // 2}", file=sys.stderr)


def fingerprint(
    model: Model, sources: Sources, pooled: Params, config: HarvestConfig, plan: Sequence[Chunk], *, key: Key
) -> str:
    """Tells one harvest from another, so that chunks of two are never put into one zoo.

    Args:
      model: the forecaster; the operations that it stands for count, not its name alone.
      sources: the source regions; every array that a chunk reads counts.
      pooled: the pooled model.
      config: steps and sizes.
      plan: which regions are trained together.
      key: random key of the harvest.

    Returns:
      A hash.
    """
    arrays = (key, pooled, sources.bank, sources.train, sources.regions, [one.rows for one in plan])
    # How many are trained side by side changes rounding alone.
    config = dataclasses.replace(config, regions_per_batch=None)
    words = (model.name, model_text(model, sources.sizes, pooled), config, sources.names, sources.config)
    return digest_of(repr(words), arrays)


def chunk_metrics(result: HarvestedRegion) -> dict[str, float]:
    """What a chunk says of itself in the log: means over its regions, errors over those that have any."""
    known = np.isfinite(result.start_mae)
    errors = {
        "validation_loss": result.validation_mae[known, 0],
        "start_validation_loss": result.start_mae[known],
    }
    means = {name: float(values.mean()) for name, values in errors.items() if len(values)}
    return means | {"steps": float(result.step[:, 0].mean())}
