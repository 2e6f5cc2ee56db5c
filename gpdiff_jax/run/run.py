"""In: settings and a folder. Out: a `Run`, which compares methods on a city, leak-free, and keeps all that it makes.

After GPDiff (Yuan et al., ICLR 2024, arXiv 2402.11922); every stage can be asked for on its own.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpdiff_jax.analysis.diagnostics import DiagnosticsConfig
from gpdiff_jax.analysis.prediction import ParameterPrediction
from gpdiff_jax.baselines.boosted_trees import INSTALL, has_lightgbm, import_lightgbm
from gpdiff_jax.cities import City, check_city, find_cities, partial_bins, resample, select_channels, simulate_cities
from gpdiff_jax.cities.city import AVERAGED
from gpdiff_jax.cities.overlap import find_overlap
from gpdiff_jax.data.target import Target
from gpdiff_jax.diffusion.conditioning import check_conditioning
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.folder_lock import refuse_if_locked, unlock_folder
from gpdiff_jax.hosts import is_first, num_hosts
from gpdiff_jax.models.protocol import abstract_params, model_text
from gpdiff_jax.models.registry import is_built_in
from gpdiff_jax.prompts.encoders import SPATIAL_OF_PART, check_parts
from gpdiff_jax.run.diagnosis import write_diagnosis, write_inspection
from gpdiff_jax.run.folder import open_run_folder
from gpdiff_jax.run.methods import keep_outside, method_forecast, outside_names
from gpdiff_jax.run.outside import check_outside_name, in_order_of_run
from gpdiff_jax.run.results import PAPER_NOTE, evaluate, results_table
from gpdiff_jax.run.room import measure_rooms
from gpdiff_jax.run.settings import METHODS, Settings, choose_methods
from gpdiff_jax.run.stages import Stages
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.transfer.evaluate import MethodForecast, step_names


class Run(Stages):
    """A run in its folder: what `python -m experiments.transfer` and its stages do, for those who import.

    Nothing is trained until it is asked for. `zoo`, `hypernetwork`, `generated` and the other properties make what the
    folder does not hold yet, or read it. While the run is open, no other process may write into its folder. Make one by
    `Run.open`. `gpdiff_jax.use_every_core` before it lets a CPU work with all its cores, as the commands do.

    Example:
      >>> import gpdiff_jax as gpd
      >>> settings = gpd.Settings.from_preset("small", data_dir="data", sources=("bay", "york"), target="hangzhou")
      >>> with gpd.Run.open("runs/hangzhou", settings) as run:  # doctest: +SKIP
      ...     print(run.table())
      ...     forecasts = run.forecast("gpdiff_few_shot").forecast
    """

    is_locked = False  # whether closing gives a lock back

    def __repr__(self) -> str:
        cities = ", ".join(city.name for city in self.source_cities)
        return f"<Run in {str(self.folder)!r}: {cities} to {self.target_cities[0].name}>"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], settings: Settings, *, cities: Iterable[City] | None = None) -> "Run":
        """Reads or simulates the cities of a run and checks that every part of the protocol can be kept.

        Args:
          folder: of the run, made where it is absent; a run that it holds is continued.
          settings: of the run.
          cities: the source cities in the order of `settings.sources`, then the target; None reads them from
            `settings.data_dir`, or simulates them.

        Returns:
          The run; nothing is trained yet. What a user should know of the cities is said on standard error.

        Raises:
          InputError: a city that cannot be read, is not the one that the settings name, holds readings of the target,
            or is too short, too coarse or empty for the settings; another process writes into the folder, or it holds
            something else; or hosts of one job read different things.
        """
        place = user_path(folder).absolute()
        ask_first(lambda: refuse_if_locked(place))
        whole = _cities(settings) if cities is None else _as_named(cities, settings)
        chosen = [select_channels(resample(city, settings.interval_minutes), settings.channels) for city in whole]
        sources, targets = [city for channels in chosen[:-1] for city in channels], chosen[-1]
        for source in sources:
            for target in targets:
                _refuse_copy(source, target)
        run = cls(settings, place, sources, targets)
        run.check()
        open_run_folder(folder, settings, [*sources, *targets], run.model_digest())
        run.is_locked = True
        for line in run.notes(whole) if is_first() else ():
            print(line, file=sys.stderr)
        return run

    def model_digest(self) -> str | None:
        """By what a model that is not built in is known: its operations; None for a built-in one."""
        if is_built_in(self.settings.model):
            return None
        text = model_text(self.model, self.sources.sizes, abstract_params(self.model, self.sources.sizes))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self) -> None:
        """Raises `InputError` where the protocol cannot be kept; before the first minute of training."""
        if "boosted_trees" in self.settings.methods:
            import_lightgbm()
        _ = self.targets, self.sources, self.model
        settings = self.settings
        layers = self.model.layer_kinds(abstract_params(self.model, self.sources.sizes)).values()
        parts = sum((SPATIAL_OF_PART[part] for part in settings.prompts.parts), ())
        check_conditioning(settings.pretrain.denoiser.conditioning, parts, tuple(layers))
        seen = [spans[0] for spans in self.sources.spans] + [target.split.support for target in self.targets]
        for city, span in zip([*self.source_cities, *self.target_cities], seen, strict=True):
            check_parts(settings.prompts, city, span)

    def notes(self, whole: Sequence[City]) -> list[str]:
        """What a user should know before it runs, a line each.

        Args:
          whole: the cities as they were read, before they were brought to the run's interval.

        Returns:
          The lines.
        """
        lines, target = [], self.target_cities[0]
        if self.settings.data.protocol == "paper":
            lines.append(PAPER_NOTE)
        kinds = sorted({city.kind for city in self.source_cities})
        if target.kind not in kinds:
            lines.append(
                f"the target {self.settings.target!r} is of kind {target.kind} and the sources are of kind "
                f"{', '.join(kinds)}: what they teach may not hold there"
            )
        elif len(kinds) > 1 and {*kinds} & {*AVERAGED}:
            lines.append(f"the sources are of kinds {', '.join(kinds)}: one model is trained on all of them")
        if not has_lightgbm() and set(self.settings.methods) >= set(choose_methods(("default",))):
            lines.append(f"boosted_trees is left out of the methods: LightGBM cannot be imported; {INSTALL}")
        for city in whole:
            lines += partial_bins_note(city, self.settings.interval_minutes)
        for city, regions in zip(self.target_cities, self.targets, strict=True):
            lines += silence_notes(city, regions)
            if not regions.can_choose:
                lines.append(f"{city.name} leaves nothing to choose on; few-shot will equal zero-shot")
        return lines

    def evaluate(self) -> dict[str, Any]:
        """Makes every chosen method's forecasts that the folder does not hold yet, and writes all results.

        Returns:
          What metrics.json holds. Beside it lie regions.csv, forecasts.npz, report.npz and report.html.
        """
        self._check_open()
        return evaluate(self)

    def table(self) -> str:
        """The methods with their errors, best first, as plain text; makes what is missing, like `evaluate`."""
        return results_table(self.evaluate())

    def forecast(self, method: str, channel: int = 0) -> MethodForecast:
        """The test forecasts of one method; made once and kept in the folder.

        Args:
          method: one of `gpdiff_jax.run.settings.METHODS`, or the name of forecasts that were added.
          channel: index of the target's channel.

        Returns:
          Forecasts [S, R, P] in data units, with what the method took.

        Raises:
          InputError: there is no such method or channel.
        """
        self._check_open()
        if method not in METHODS and method not in outside_names(self):
            choose_methods((method,))  # names the nearest
            raise InputError(f"`method` is one method, got {method!r}; `evaluate` makes those of the settings")
        if not 0 <= channel < len(self.target_cities):
            raise InputError(f"`channel` must be at least 0 and below {len(self.target_cities)}, got {channel}")
        return method_forecast(self, channel, method)

    def add_forecasts(self, name: str, forecast: Any, *, window_start: Any = None, node_ids: Any = None) -> None:
        """Keeps forecasts of another program among the run's own, to be judged and reported as these are.

        Args:
          name: by which they stand in tables, of small letters, digits and underscores; what stood there under it is
            replaced.
          forecast: [S, R, P] in the unit of the data, the regions of one channel after those of another, as in the
            run's forecasts.npz.
          window_start: [S] local times of the first step that each window forecasts, `datetime64` or ISO 8601, by
            which windows are found, in any order and among others; None where they are those of forecasts.npz.
          node_ids: [R] names of the regions, by which these are found; None where they are those of forecasts.npz.

        Raises:
          InputError: they are not in the form above, lack a window or a region that the run judges, or are not finite
            where a reading is to be forecast.

        Example:
          >>> with gpd.Run.open("runs/hangzhou", settings) as run:  # doctest: +SKIP
          ...     run.add_forecasts("dcrnn", forecast, window_start=times)
          ...     print(run.table())
        """
        self._check_open()
        check_outside_name(name)
        keep_outside(self, name, in_order_of_run(self, name, forecast, window_start, node_ids))

    def diagnose(self, config: DiagnosticsConfig | None = None) -> dict[str, Any]:
        """Measures whether the generator generates; writes diagnostics.json and diagnostics.html.

        Args:
          config: sizes; None draws as the run does.

        Returns:
          What diagnostics.json holds.

        Raises:
          InputError: this process is one host of several.
        """
        self._check_alone()
        return write_diagnosis(self, config or DiagnosticsConfig(generate=self.settings.generate))

    def measure_rooms(self) -> dict[str, Any]:
        """Leaves out every source city in turn and measures what share of its room is reached; writes room.json.

        Returns:
          What room.json holds; see `gpdiff_jax.run.room.measure_rooms`. As many generators are trained as there are
          source cities, and kept in the folder.

        Raises:
          InputError: the run has one source city alone, or one is too short; or this process is one host of several.
        """
        self._check_alone()
        return measure_rooms(self)

    def inspect_prompts(self) -> ParameterPrediction | None:
        """Measures what the prompts say; writes prompts.json and prompts.html.

        Returns:
          How well prompts predict the parameters of a source city that is left out; None where there is but one.

        Raises:
          InputError: this process is one host of several.
        """
        self._check_alone()
        return write_inspection(self)

    def _check_open(self) -> None:
        if not self.is_locked:
            raise InputError(f"the run in {str(self.folder)!r} is closed; open it again by `Run.open`")

    def _check_alone(self) -> None:
        self._check_open()
        if num_hosts() > 1:
            raise InputError("several hosts train, generate and forecast together; for this, open the run on one host")

    def close(self) -> None:
        """Lets other processes write into the folder again; a closed run makes nothing more."""
        if self.is_locked:
            unlock_folder(self.folder)
        self.is_locked = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _cities(settings: Settings) -> list[City]:
    if settings.simulation is not None:
        return simulate_cities(settings.simulation, seed=settings.seed)
    if settings.data_dir is None:
        raise InputError("the settings name no `data_dir`; give the folder of the city files, or `cities` to Run.open")
    return find_cities(settings.data_dir, [*settings.sources, settings.target], missing_above=settings.missing_above)


def _as_named(cities: Iterable[City], settings: Settings) -> list[City]:
    whole = list(cities)
    for city in whole:
        if not isinstance(city, City):
            raise InputError(f"`cities` holds a {type(city).__name__}, which is no City; read files by `load_city`")
    names, wanted = [city.name for city in whole], [*settings.sources, settings.target]
    if names != wanted or settings.simulation is not None:
        raise InputError(
            f"`cities` are {', '.join(names) or 'none'}, but the settings name "
            f"{', '.join(filter(None, wanted)) or 'simulated cities'}; give the sources in their order, then the target"
        )
    if settings.missing_above is not None:
        raise InputError("`missing_above` is for files; of cities from memory, make such readings NaN")
    return [check_city(city) for city in whole]


def partial_bins_note(city: City, interval_minutes: int) -> list[str]:
    """At most one line: how many bins of a city were observed in part."""
    words = partial_bins(city, interval_minutes).words(interval_minutes, city.kind)
    return [] if words is None else [f"{city.name}: {words}"]


def silence_notes(city: City, target: Target) -> list[str]:
    """A line for every region that shows nothing in the support days."""
    names = [city.node_ids[node] for node in target.silent]
    return [f"region {name!r} has no visible reading; it takes its neighbours' statistics" for name in names]


def _refuse_copy(source: City, target: City) -> None:
    """Raises `InputError` where a source holds readings of the target, which would tell the hidden days."""
    found = find_overlap(target, source)
    if found is not None:
        there, here = step_names(source, np.asarray([found.other_step])), step_names(target, np.asarray([found.step]))
        raise InputError(
            f"source {source.name!r} holds readings of the target {target.name!r}: its region "
            f"{source.node_ids[found.other_node]!r} from {there[0]} on is region {target.node_ids[found.node]!r} from "
            f"{here[0]} on; it would tell what is hidden, leave it out of the sources"
        )
