"""In: a target city. Out: its windows on the device, and which of them may be seen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jraph
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.scaling import silent_regions
from gpdiff_jax.cities.splits import Span, TargetSplit, split_target
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.series import PER_VARIANT, SeriesBank, bank_arrays, build_bank, model_sizes
from gpdiff_jax.data.target_windows import gather_target, support_masks
from gpdiff_jax.data.windows import window_starts
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import ModelSizes, Window
from gpdiff_jax.typing import RegionGraph

_STARTS = ("adaptation_starts", "validation_starts", "support_starts", "test_starts")
# Of targets whose windows are given by their starts, all seen through one variant, or through days from step 0 on.
NO_SPLIT = TargetSplit(Span(0, 0), Span(0, 0), Span(0, 0))


@flax.struct.dataclass
class Target:
    """The R regions of a target city: its windows, and which of them may be seen."""

    bank: SeriesBank
    graphs: jraph.GraphsTuple  # [R, ...]
    region_ids: UInt32[Array, "*devices R"]
    adaptation_starts: Int[Array, "*devices adaptation"]  # windows inside the adaptation days
    validation_starts: Int[Array, "*devices validation"]  # windows that forecast the validation days
    support_starts: Int[Array, "*devices support"]  # windows inside all support days
    test_starts: Int[Array, "*devices S"]  # windows that forecast the test span
    support_start: Int[Array, "*devices"]  # first step of the support days
    floor: Float[Array, "*devices"]  # the least forecast: 0 where no visible reading is negative, else minus infinity
    # The city as it was on the eve of the validation days, which are its test: what learning rate and steps are chosen
    # on. None where there is nothing to adapt on or to choose on.
    choice: "Target | None"
    split: TargetSplit = flax.struct.field(pytree_node=False)
    steps_per_day: int = flax.struct.field(pytree_node=False)
    silent: tuple[int, ...] = flax.struct.field(pytree_node=False)  # regions without a visible reading
    damping: tuple[float, float] = flax.struct.field(pytree_node=False)  # see `DataConfig`

    @property
    def num_regions(self) -> int:
        """R."""
        return self.region_ids.shape[0]

    @property
    def can_choose(self) -> bool:
        """Whether there are windows to adapt on and others to choose learning rate and steps on."""
        return self.choice is not None

    @property
    def sizes(self) -> ModelSizes:
        """What a model of these windows must fit."""
        return model_sizes(self.bank)

    @property
    def bare(self) -> "Target":
        """What a program reads that is given its windows by starts: the same program for all supports of a city."""
        none = jax.device_put({name: np.zeros(0, np.int32) for name in _STARTS})
        return dataclasses.replace(self, choice=None, split=NO_SPLIT, silent=(), **none)


def region_windows(target: Target, region: Int[Array, ""], starts: Int[Array, " B"]) -> tuple[RegionGraph, Window]:
    """The graph of a region and its windows at the given starts; see `gather_target`."""
    graph = jax.tree.map(lambda leaf: leaf[region], target.graphs)
    return graph, gather_target(target.bank, graph.nodes, starts, target.support_start, target.steps_per_day)


def prepare_targets(cities: Sequence[City], config: DataConfig, *, seed: int = 0) -> list[Target]:
    """Prepares the channels of a target, all with the same test windows: those in which any has a reading to forecast.

    Args:
      cities: one-channel cities of the same length, one per channel.
      config: windows, covariates and graphs, the same as the sources'.
      seed: for `pick_neighbours="random"`.

    Returns:
      One target per city.

    Raises:
      InputError: see `prepare_target`.
    """
    targets = [prepare_target(city, config, seed=seed) for city in cities]
    common = np.unique(np.concatenate([np.asarray(target.test_starts) for target in targets]))
    return [dataclasses.replace(target, test_starts=jax.device_put(common)) for target in targets]


def prepare_target(city: City, config: DataConfig, *, seed: int = 0) -> Target:
    """Splits a target city into support days and test, and puts its windows on the device.

    Args:
      city: a one-channel city.
      config: windows, covariates and graphs, the same as the sources'.
      seed: for `pick_neighbours="random"`.

    Returns:
      Its regions; scale and profile come from the support days alone. In the paper's protocol the scale comes from the
      whole series, and `choice` is the test itself.

    Raises:
      InputError: see `split_target`, `build_bank`, `region_graphs`; or the test span holds no reading.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    published = config.protocol == "paper"
    of_city: Any = {"name": city.name, "protocol": config.protocol}
    split = split_target(city.num_steps, city.steps_per_day, config.support_days, **windows, **of_city)
    test_starts = window_starts(city, split.test, reach_back=True, **windows)
    if len(test_starts) == 0:
        which = "first" if published else "last"
        raise InputError(f"city {city.name!r} has no reading in its test span (the {which} 30 %); use a longer series")
    if published:
        target = split_city(city, config, split, test_starts, seed=seed, scaled_by=Span(0, city.num_steps))
        return dataclasses.replace(target, choice=target if len(target.adaptation_starts) else None)
    target = split_city(city, config, split, test_starts, seed=seed)
    return dataclasses.replace(target, choice=_before_validation(city, config, target))


def _before_validation(city: City, config: DataConfig, target: Target) -> Target | None:
    """The target's `choice`: scale and profile come from the adaptation days alone."""
    split = target.split
    if not (len(target.adaptation_starts) and len(target.validation_starts)):
        return None
    if silent_regions(city, split.adaptation).all():
        return None
    eve = TargetSplit(split.adaptation, Span(split.adaptation.stop, split.adaptation.stop), split.validation)
    view = split_city(city, config, eve, np.asarray(target.validation_starts), graphs=target.graphs)
    # The readings are the same; only what they are seen through is not.
    own = {name: getattr(view.bank, name) for name in PER_VARIANT}
    return dataclasses.replace(view, bank=dataclasses.replace(target.bank, **own))


def split_city(
    city: City,
    config: DataConfig,
    split: TargetSplit,
    test_starts: Int[np.ndarray, " S"],
    *,
    seed: int = 0,
    graphs: RegionGraph | None = None,
    scaled_by: Span | None = None,
) -> Target:
    """Puts a city on the device, to be forecast after whichever days are its support.

    Args:
      city: a one-channel city.
      config: windows, covariates and graphs, the same as the sources'.
      split: its support days, and what is forecast.
      test_starts: [S], starts of the windows that forecast.
      seed: for `pick_neighbours="random"`.
      graphs: the region graphs, where they are made already.
      scaled_by: what the scale of every region is made of; None for the support days, as no leak allows more.

    Returns:
      Its regions, without a `choice`. Scale and profile come from the support days alone, and those of a window in them
      from the other days (of a single day, the scale from itself).

    Raises:
      InputError: the horizon is longer than a day; see `build_bank`, `region_graphs`.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    if config.horizon > city.steps_per_day:
        raise InputError(
            f"`horizon` (={config.horizon}) is longer than a day of {city.steps_per_day} steps of city {city.name!r}, "
            "and windows of its support days leave out two days at most; choose a shorter one"
        )
    masks = support_masks(city, split, city.steps_per_day)
    visible = city.values[split.support.start : split.support.stop]
    # A single day has no other to be scaled by.
    scales = [split.support if silent_regions(city, mask).all() else mask for mask in masks]
    if scaled_by is not None:
        scales = [scaled_by] * len(masks)
    bank = build_bank([city], [scales], [masks], covariates=config.covariates, **windows)
    if graphs is None:
        cut: Any = {"max_neighbours": config.max_neighbours, "pick": config.pick_neighbours, "seed": seed}
        graphs = region_graphs([city], **cut)
    arrays: dict[str, Any] = {
        "graphs": graphs,
        "region_ids": city.region_ids(),
        "adaptation_starts": window_starts(city, split.adaptation, **windows),
        "validation_starts": _validation_starts(city, split, **windows),
        "support_starts": window_starts(city, split.support, **windows),
        "test_starts": test_starts,
        "support_start": np.int32(split.support.start),
        "floor": _floor(visible),
    }
    return Target(
        bank=bank,
        **jax.device_put(arrays),
        choice=None,
        split=split,
        steps_per_day=city.steps_per_day,
        silent=tuple(int(n) for n in np.flatnonzero(silent_regions(city, split.support))),
        damping=config.damping,
    )


def newest_target(city: City, config: DataConfig, split: TargetSplit, graphs: RegionGraph) -> Target:
    """A target of its last window alone, seen through all support days; as little as can be forecast from.

    Args:
      city: one channel, P steps longer than what was read.
      config: of the windows.
      split: its support days.
      graphs: of its regions.

    Returns:
      The target, of `NO_SPLIT`: its size depends on the windows and the regions alone.

    Raises:
      InputError: see `build_bank`.
    """
    window, visible = config.history + config.horizon, city.values[split.support.start : split.support.stop]
    sizes: Any = {"covariates": config.covariates, "history": config.history, "horizon": config.horizon}
    seen = np.zeros(city.num_steps, bool)
    seen[split.support.start : split.support.stop] = True
    arrays: dict[str, Any] = bank_arrays([city], [[split.support]], [seen[None]], **sizes)
    arrays["node_offset"] = (window * np.arange(city.num_nodes)).astype(np.int32)
    for name in ("values", "observed"):
        arrays[name] = arrays[name].reshape(city.num_nodes, -1)[:, -window:].reshape(-1)
    for name in ("calendar", "weekend", "slot"):
        arrays[name] = arrays[name][-window:]
    none = np.zeros(0, np.int32)
    starts = dict.fromkeys(_STARTS, none) | {"test_starts": np.zeros(1, np.int32), "support_start": np.int32(0)}
    fields: dict[str, Any] = {
        "bank": SeriesBank(**jax.device_put(arrays), **sizes),
        "graphs": graphs,
        **jax.device_put({"region_ids": city.region_ids(), "floor": _floor(visible), **starts}),
    }
    facts: Any = {"steps_per_day": city.steps_per_day, "silent": (), "damping": config.damping}
    return Target(**fields, choice=None, split=NO_SPLIT, **facts)


def _floor(visible: np.ndarray) -> np.float32:
    """The least forecast of readings that are never negative, or may be."""
    return np.float32(-np.inf if (visible < 0).any() else 0.0)


def _validation_starts(city: City, split: TargetSplit, *, history: int, horizon: int) -> np.ndarray:
    starts = window_starts(city, split.validation, history=history, horizon=horizon, reach_back=True)
    return starts[starts >= split.support.start]
