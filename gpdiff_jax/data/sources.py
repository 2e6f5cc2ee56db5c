"""In: source cities. Out: everything that training on them needs, on the device: bank, region graphs, window tables.

This is where a list of cities becomes a list of R regions; the region axis runs through all cities in order.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.cities.scaling import silent_regions
from gpdiff_jax.cities.splits import SourceSplit, Span, split_source
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.series import SeriesBank, build_bank, model_sizes
from gpdiff_jax.data.windows import StartTable, free_starts, random_spans, start_table, window_starts
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import ModelSizes
from gpdiff_jax.typing import Key, RegionGraph


class SourceRegion(NamedTuple):
    """What is particular to one source region; stacked on a leading axis for many."""

    graph: RegionGraph
    region_id: UInt32[Array, "*R"]  # seeds the region's randomness
    validation_starts: Int[Array, "*R X"]
    validated: Bool[Array, "*R"]  # whether it has a reading to forecast in its validation windows


@flax.struct.dataclass
class Sources:
    """R source regions, ready for training."""

    bank: SeriesBank
    graphs: jraph.GraphsTuple  # [R, ...]
    train: StartTable
    validation_starts: Int[Array, "*devices R X"]  # starts of the validation windows of every region
    validated: Bool[Array, "*devices R"]  # False where a region has no reading to forecast in them
    region_ids: UInt32[Array, "*devices R"]  # stable ids that seed a region's randomness
    city_index: Int[Array, "*devices R"]
    spans: tuple[tuple[Span, ...], ...] = flax.struct.field(pytree_node=False)  # per city, V; prompts: `prompted_spans`
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # "city/node" of every region
    train_spans: tuple[Span, ...] = flax.struct.field(pytree_node=False)  # per city
    config: DataConfig = flax.struct.field(pytree_node=False)
    cities: tuple[CityLabel, ...] = flax.struct.field(pytree_node=False)

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.names)

    @property
    def sizes(self) -> ModelSizes:
        """What a model of these windows must fit."""
        return model_sizes(self.bank)

    @property
    def prompted_spans(self) -> tuple[tuple[Span, ...], ...]:
        """Per city, the first of its variants, of which prompts are made."""
        return tuple(spans[: self.config.prompt_variants] for spans in self.spans)

    @property
    def regions(self) -> SourceRegion:
        """All regions, stacked."""
        return SourceRegion(self.graphs, self.region_ids, self.validation_starts, self.validated)

    @property
    def unvalidated(self) -> list[str]:
        """Names of the regions without a reading in their validation windows, which have no validation error."""
        return [name for name, known in zip(self.names, np.asarray(self.validated), strict=True) if not known]


def prepare_sources(
    cities: Sequence[City], config: DataConfig, *, key: Key, validation_windows: int = 48, seed: int = 0
) -> Sources:
    """Splits source cities in time, draws the variants of their regions, and puts all on the device.

    Args:
      cities: one-channel cities of one interval.
      config: windows, covariates and graphs.
      key: random key of the variants.
      validation_windows: validation windows per city, evenly spread over its validation span.
      seed: for `pick_neighbours="random"`.

    Returns:
      The regions of all cities, in order; those without a reading in their training span are left out.

    Raises:
      InputError: two cities of one name, whose regions would draw the same; see `build_bank`, `region_graphs`,
        `split_source`.
    """
    names = [city.name for city in cities]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two source cities are called {again!r}; give every city once, by a name of its own")
    windows: Any = {"history": config.history, "horizon": config.horizon}
    starts, validation, validated, spans, scale_spans, kept = [], [], [], [], [], []
    splits: list[SourceSplit] = []
    for city in cities:
        split = split_source(city.num_steps, name=city.name, protocol=config.protocol, **windows)
        splits.append(split)
        city_key = _fold_in(key, np.uint32(zlib.crc32(city.name.encode())))
        lengths = _window_lengths(len(split.train), city.steps_per_day, config, key=city_key)
        drawn = _spread_first(random_spans(city, split.train, lengths, key=city_key), config)
        spans.append(drawn)
        scale_spans.append(drawn if config.scaling == "support" else [split.train] * config.variants)
        allowed = window_starts(city, split.train, **windows)
        usable = free_starts(city, allowed, drawn, **windows)
        if len(allowed) and not len(usable):
            raise InputError(
                f"source city {city.name!r} trains on {len(split.train) / city.steps_per_day:.1f} days, too few beside "
                f"{min(lengths) // city.steps_per_day} visible days; use fewer support days or leave the city out"
            )
        starts.append(usable)
        held_out = window_starts(city, split.validation, reach_back=True, **windows)
        if len(held_out) == 0:
            which = "last 20 %" if config.protocol == "leak-free" else "first 30 %"
            raise InputError(f"city {city.name!r} has no reading in its {which}, which validate it; leave it out")
        picked = np.linspace(0, len(held_out) - 1, validation_windows).round().astype(int)
        validation.append(np.repeat(held_out[picked][None], city.num_nodes, axis=0))
        ahead = held_out[picked][:, None] + config.history + np.arange(config.horizon)
        validated.append(np.isfinite(city.values[ahead, :, 0]).any(axis=(0, 1)))
        kept.append(~silent_regions(city, split.train))
    masks = [
        np.stack([(np.arange(city.num_steps) >= s.start) & (np.arange(city.num_steps) < s.stop) for s in drawn])
        for city, drawn in zip(cities, spans, strict=True)
    ]
    bank = build_bank(cities, scale_spans, masks, covariates=config.covariates, **windows)
    rows = np.flatnonzero(np.concatenate(kept))
    cut: Any = {"max_neighbours": config.max_neighbours, "pick": config.pick_neighbours, "seed": seed}
    ids = np.concatenate([city.region_ids() for city in cities])
    names = [f"{city.name}/{city.node_ids[n]}" for city in cities for n in range(city.num_nodes)]
    city_index = np.repeat(np.arange(len(cities)), [city.num_nodes for city in cities])
    arrays: dict[str, Any] = {
        "graphs": region_graphs(cities, **cut, rows=rows),
        "validation_starts": np.concatenate(validation)[rows],
        "validated": np.concatenate(validated)[rows],
        "region_ids": ids[rows],
        "city_index": city_index[rows].astype(np.int32),
    }
    return Sources(
        bank=bank,
        train=start_table(cities, [split.train for split in splits], starts, spans, near_days=config.near_days),
        **jax.device_put(arrays),
        spans=tuple(tuple(s) for s in spans),
        names=tuple(names[row] for row in rows),
        train_spans=tuple(split.train for split in splits),
        config=config,
        cities=tuple(label_of(city, some) for city, some in zip(cities, kept, strict=True)),
    )


def _window_lengths(train: int, steps_per_day: int, config: DataConfig, *, key: Key) -> list[int]:
    """How many steps each variant of a city is long, see `DataConfig`; in an order that says nothing of their time."""
    if config.window_days is None:
        return [config.support_days * steps_per_day] * config.variants
    shortest, longest = config.window_days
    longest = max(shortest, min(longest, train // (2 * steps_per_day)))
    order = np.asarray(_order(_fold_in(key, np.uint32(1)), config.variants))
    share = (order + 0.5) / config.variants
    days = np.clip(np.floor(shortest * ((longest + 1) / shortest) ** share), shortest, longest)
    return [int(count) * steps_per_day for count in days]


def _spread_first(spans: list[Span], config: DataConfig) -> list[Span]:
    """The same spans, those that prompts are made of first; they are spread over all."""
    count = min(config.prompt_variants, len(spans))
    first = np.arange(count) * len(spans) // count
    return [spans[k] for k in first] + [span for k, span in enumerate(spans) if k not in first]


def city_weights(city_index: Int[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """What each of R regions counts, so that every city counts alike: one over the number of its city's regions."""
    return 1.0 / np.bincount(city_index)[city_index]


_fold_in = jax.jit(jax.random.fold_in)
_order = jax.jit(jax.random.permutation, static_argnums=1)
