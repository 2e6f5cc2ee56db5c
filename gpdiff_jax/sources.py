"""In: source cities. Out: everything that training on them needs, on the device: bank, region graphs, window tables.

This is where a list of cities becomes a list of R regions; the region axis runs through all cities in order.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jraph
import numpy as np
from jaxtyping import Int

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.cities.scaling import silent_regions
from gpdiff_jax.cities.series import SeriesBank, build_bank
from gpdiff_jax.cities.splits import SourceSplit, Span, TargetSplit, split_source, split_target
from gpdiff_jax.cities.windows import StartTable, free_starts, random_spans, start_table, support_masks, window_starts
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import ModelSizes
from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, fit_prompt_encoder
from gpdiff_jax.prompts.prompt import Prompts, source_prompts
from gpdiff_jax.regions import region_graphs
from gpdiff_jax.typing import Key, RegionGraph

SCALINGS = ("support", "span")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How cities become windows.

    `variants` random windows per source region stand for the support days that a target region would show.
    `scaling` says what scales a source region: "support", each variant's own window, as it will be in a target, or
    "span", its whole training span.
    """

    covariates: str = "profile"
    support_days: int = 3
    history: int = 12
    horizon: int = 6
    max_neighbours: int = 8
    pick_neighbours: str = "weight"
    variants: int = 12
    scaling: str = "support"

    def __post_init__(self) -> None:
        for name in ("support_days", "history", "horizon", "variants"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.scaling not in SCALINGS:
            raise InputError(f"`scaling` must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")


class SourceRegion(NamedTuple):
    """What is particular to one source region; stacked on a leading axis for many."""

    graph: RegionGraph
    region_id: jax.Array  # uint32 [], seeds the region's randomness
    validation_starts: jax.Array  # int32 [X]
    validated: jax.Array  # bool [], whether it has a reading to forecast in its validation windows


@flax.struct.dataclass
class Sources:
    """R source regions, ready for training."""

    bank: SeriesBank
    graphs: jraph.GraphsTuple  # [R, ...]
    train: StartTable
    validation_starts: jax.Array  # int32 [R, X], starts of the validation windows of every region
    validated: jax.Array  # bool [R], False where a region has no reading to forecast in them
    region_ids: jax.Array  # uint32 [R], stable ids that seed a region's randomness
    city_index: jax.Array  # int32 [R]
    spans: tuple[tuple[Span, ...], ...] = flax.struct.field(pytree_node=False)  # per city, its V variants
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # "city/node" of every region
    prompts: Prompts  # [V, R, E]
    config: DataConfig = flax.struct.field(pytree_node=False)
    prompt_encoder: PromptEncoder | None = None  # what made the prompts; None for statistics alone
    cities: tuple[CityLabel, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.names)

    @property
    def sizes(self) -> ModelSizes:
        """What a model of these windows must fit."""
        return model_sizes(self.bank)

    @property
    def regions(self) -> SourceRegion:
        """All regions, stacked."""
        return SourceRegion(self.graphs, self.region_ids, self.validation_starts, self.validated)

    @property
    def unvalidated(self) -> list[str]:
        """Names of the regions without a reading in their validation windows, which have no validation error."""
        return [name for name, known in zip(self.names, np.asarray(self.validated), strict=True) if not known]


@flax.struct.dataclass
class Target:
    """The R regions of a target city: its windows, and which of them may be seen."""

    bank: SeriesBank
    graphs: jraph.GraphsTuple  # [R, ...]
    region_ids: jax.Array  # uint32 [R]
    adaptation_starts: jax.Array  # int32, windows inside the adaptation days
    validation_starts: jax.Array  # int32, windows that forecast the validation days
    support_starts: jax.Array  # int32, windows inside all support days
    test_starts: jax.Array  # int32, windows that forecast the test span
    floor: jax.Array  # float32 [], the least forecast: 0 where no visible reading is negative, else minus infinity
    # The city as it was on the eve of the validation days, which are its test: what learning rate and steps are chosen
    # on. None where there is nothing to adapt on or to choose on.
    choice: "Target | None"
    split: TargetSplit = flax.struct.field(pytree_node=False)
    steps_per_day: int = flax.struct.field(pytree_node=False)
    silent: tuple[int, ...] = flax.struct.field(pytree_node=False)  # regions without a visible reading

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


def model_sizes(bank: SeriesBank) -> ModelSizes:
    """The sizes of a model that reads windows of this bank."""
    return ModelSizes(bank.history, bank.horizon, bank.num_inputs, bank.num_covariates)


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
      InputError: see `build_bank`, `region_graphs`, `split_source`.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    starts, validation, validated, spans, scale_spans, kept = [], [], [], [], [], []
    splits: list[SourceSplit] = []
    for city in cities:
        split = split_source(city.num_steps, name=city.name, **windows)
        splits.append(split)
        length = config.support_days * city.steps_per_day
        city_key = _fold_in(key, np.uint32(zlib.crc32(city.name.encode())))
        drawn = random_spans(city, split.train, length, config.variants, key=city_key)
        spans.append(drawn)
        scale_spans.append(drawn if config.scaling == "support" else [split.train] * config.variants)
        allowed = window_starts(city, split.train, **windows)
        usable = free_starts(city, allowed, drawn, **windows)
        if len(allowed) and not len(usable):
            raise InputError(
                f"source city {city.name!r} trains on {len(split.train) / city.steps_per_day:.1f} days, too few beside "
                f"{config.support_days} support days; use fewer support days or leave the city out"
            )
        starts.append(usable)
        held_out = window_starts(city, split.validation, reach_back=True, **windows)
        if len(held_out) == 0:
            raise InputError(f"city {city.name!r} has no reading in its last 20 %, which validate it; leave it out")
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
        train=start_table(cities, [split.train for split in splits], starts, spans),
        **jax.device_put(arrays),
        spans=tuple(tuple(s) for s in spans),
        names=tuple(names[row] for row in rows),
        prompts=source_prompts(cities, spans, [split.train for split in splits]),
        config=config,
        cities=tuple(label_of(city, some) for city, some in zip(cities, kept, strict=True)),
    )


_fold_in = jax.jit(jax.random.fold_in)


def fit_encoder(
    sources: Sources,
    cities: Sequence[City],
    config: PromptConfig,
    *,
    key: Key,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> PromptEncoder:
    """Trains what makes prompts on source cities: their training spans, and one window of each for its graph.

    Args:
      sources: of `prepare_sources`.
      cities: the cities they were prepared from.
      config: parts of the prompt and sizes of their encoders.
      key: random key.
      checkpoints: folder from which a training that was stopped goes on; see `loop.train`.
      progress: see `fit_prompt_encoder`.

    Returns:
      The encoder.

    Raises:
      InputError: see `fit_prompt_encoder`.
      NotFiniteError: a loss is not finite.
    """
    windows = [spans[0] for spans in sources.spans]
    kept: Any = {"checkpoints": checkpoints, "progress": progress}
    return fit_prompt_encoder(cities, _train_spans(sources, cities), windows, config, key=key, **kept)


def with_prompts(
    sources: Sources,
    cities: Sequence[City],
    encoder: PromptEncoder,
    *,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Sources:
    """The sources with prompts of other parts than plain statistics.

    Args:
      sources: of `prepare_sources`.
      cities: the cities they were prepared from.
      encoder: of `fit_encoder`.
      progress: see `source_prompts`.

    Returns:
      The sources with their prompts, and the encoder that made them.

    Raises:
      InputError: see `source_prompts`.
    """
    prompts = source_prompts(cities, sources.spans, _train_spans(sources, cities), encoder, progress)
    return dataclasses.replace(sources, prompts=prompts, prompt_encoder=encoder)


def _train_spans(sources: Sources, cities: Sequence[City]) -> list[Span]:
    windows: Any = {"history": sources.config.history, "horizon": sources.config.horizon}
    return [split_source(city.num_steps, name=city.name, **windows).train for city in cities]


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
      Its regions; scale and profile come from the support days alone.

    Raises:
      InputError: see `split_target`, `build_bank`, `region_graphs`; or the test span holds no reading.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    split = split_target(city.num_steps, city.steps_per_day, config.support_days, name=city.name, **windows)
    test_starts = window_starts(city, split.test, reach_back=True, **windows)
    if len(test_starts) == 0:
        raise InputError(f"city {city.name!r} has no reading in its test span (the last 30 %); use a longer series")
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
    own = {name: getattr(view.bank, name) for name in ("mean", "std", "profile", "profile_weekend")}
    return dataclasses.replace(view, bank=dataclasses.replace(target.bank, **own))


def split_city(
    city: City,
    config: DataConfig,
    split: TargetSplit,
    test_starts: Int[np.ndarray, " S"],
    *,
    seed: int = 0,
    graphs: RegionGraph | None = None,
) -> Target:
    """Puts a city on the device, to be forecast after whichever days are its support.

    Args:
      city: a one-channel city.
      config: windows, covariates and graphs, the same as the sources'.
      split: its support days, and what is forecast.
      test_starts: [S], starts of the windows that forecast.
      seed: for `pick_neighbours="random"`.
      graphs: the region graphs, where they are made already.

    Returns:
      Its regions, without a `choice`; scale and profile come from the support days alone.

    Raises:
      InputError: see `build_bank`, `region_graphs`.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    masks = support_masks(city, split, city.steps_per_day)
    visible = city.values[split.support.start : split.support.stop]
    bank = build_bank([city], [[split.support] * len(masks)], [masks], covariates=config.covariates, **windows)
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
        "floor": np.float32(-np.inf if (visible < 0).any() else 0.0),
    }
    return Target(
        bank=bank,
        **jax.device_put(arrays),
        choice=None,
        split=split,
        steps_per_day=city.steps_per_day,
        silent=tuple(int(n) for n in np.flatnonzero(silent_regions(city, split.support))),
    )


def _validation_starts(city: City, split: TargetSplit, *, history: int, horizon: int) -> np.ndarray:
    starts = window_starts(city, split.validation, history=history, horizon=horizon, reach_back=True)
    return starts[starts >= split.support.start]
