"""In: a trained generator and a city that came after it. Out: its forecasts, and its parameters on disk and back.

Nothing of the source cities is needed: a city shows some days, its regions get parameters from them, and what comes
after them is forecast.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.cities.resample import select_channels
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import Target, split_city
from gpdiff_jax.errors import InputError, check_at_least
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.prompts.encoders import check_parts
from gpdiff_jax.prompts.prompt import Prompts, region_prompts
from gpdiff_jax.region_parameters import RegionParameters, check_regions
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.training.stored_form import building, check_arrays, check_facts, form_of, leaves_of, to_device
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import MethodForecast, observed_truth, step_names, window_start_names
from gpdiff_jax.transfer.next_hours import (
    at_interval,
    days_of,
    forecast_target,
    until,
    windows_ahead,
    with_whole_days,
)
from gpdiff_jax.typing import Key

_FORMAT = 4
_FACTS = {
    "model": str,
    "data": form_of(dataclasses.asdict(DataConfig())),
    "city": str,
    "kind": (str, None),
    "channel": str,
    "interval_minutes": int,
    "regions": [str],
}


@dataclasses.dataclass(frozen=True, eq=False)
class NewCity:
    """A city at the interval of a generator, the prompts of its regions, and the windows that are forecast."""

    city: City  # one channel; P steps longer than what was read where the future is forecast
    prompts: Prompts  # [1, R, E]
    target: Target
    data: DataConfig  # the generator's, with the support days that were used
    chosen: DataConfig  # the generator's, with the support days that were asked for, if any were
    first: int = 0  # the step at which what was read begins, where the first day was made whole

    @property
    def read(self) -> City:
        """The city as far as it was read."""
        last = int(self.target.test_starts[-1]) + self.data.history
        return dataclasses.replace(self.city, values=self.city.values[:last])

    @property
    def window_starts(self) -> list[str]:
        """ISO time of the first step that every window forecasts, or "step N" where the calendar is unknown."""
        return window_start_names(self.city, self.target)

    @property
    def support(self) -> tuple[str, str]:
        """Begin and end of the support days, written like `window_starts`; the end is the first step after them.

        Of a first day that was read in part, the begin is the first step that was read.
        """
        span = self.target.split.support
        begin, end = step_names(self.city, np.asarray([max(span.start, self.first), span.stop]))
        return begin, end

    @property
    def truth(self) -> Float[np.ndarray, "S R P"]:
        """What was read in every window, in data units; NaN where nothing was, as in the future."""
        return observed_truth(self.city, self.target)[0]


class CityParameters(NamedTuple):
    """Generated parameters with the names of their regions: what is kept of a new city."""

    parameters: RegionParameters
    city: str
    channel: str
    interval_minutes: int
    regions: tuple[str, ...]  # R


def prepare_new_city(
    city: City,
    hypernetwork: Hypernetwork,
    *,
    channels: str = "first",
    support_days: int | None = None,
    rolling_days: int = 0,
    at: np.datetime64 | None = None,
    seed: int = 0,
    any_kind: bool = False,
) -> NewCity:
    """Makes of any city what a generator takes, and chooses which windows are forecast.

    Args:
      city: as it was read, at an interval that divides the generator's.
      hypernetwork: the generator.
      channels: "first", or the name of the channel.
      support_days: d, how many of the last days are seen; None for as many as the generator was trained for, or fewer
        where the city has no more.
      rolling_days: 0 forecasts one window, the P steps after the last reading. Else the last so many days are
        forecast, window by window, each from the readings up to it; the support days lie right before them.
      at: local time of now: nothing that was read later is looked at. None takes all readings.
      seed: for `pick_neighbours="random"`.
      any_kind: take a city of another kind than those that the generator was trained on.

    Returns:
      The city; scale, profile and prompts come from the support days alone.

    Raises:
      InputError: the generator does not say its interval, the city's does not divide it, or it is of another kind;
        there is no such channel, or it is "each"; the city is too short, or shows nothing in its support days; a part
        of the prompt cannot be made of it; see `until`.

    Example:
      >>> import gpdiff_jax as gpd
      >>> hypernetwork = gpd.Hypernetwork.load("runs/hangzhou/hypernetwork")  # doctest: +SKIP
      >>> new_city = gpd.prepare_new_city(gpd.load_city("new.npz"), hypernetwork, support_days=3)  # doctest: +SKIP
    """
    if hypernetwork.interval_minutes is None:
        raise InputError("the generator does not say at which interval it was trained; pre-train it again and save it")
    if channels != "first" and channels not in city.feature_names:
        raise InputError(
            f"a new city is forecast one channel at a time, and `channels` (={channels!r}) names none of city "
            f"{city.name!r}; choose from first, {', '.join(city.feature_names)}"
        )
    check_at_least(0, {"rolling_days": rolling_days})
    read = select_channels(at_interval(city, hypernetwork.interval_minutes), channels)[0]
    hypernetwork.check_city(label_of(read), any_kind=any_kind)
    if at is not None:
        read = until(read, at)
    known = read.num_steps
    if not rolling_days:
        read = with_whole_days(read, hypernetwork.data)
    # What is chosen holds for all that is later forecast with what is generated.
    chosen = {} if support_days is None else {"support_days": support_days, "window_days": None}
    data = kept = dataclasses.replace(hypernetwork.data, **chosen)
    if support_days is None:
        data = dataclasses.replace(data, support_days=days_of(read, data, rolling_days))
    ahead = windows_ahead(read, data, rolling_days)
    support = ahead.split.support
    check_parts(hypernetwork.prompt_encoder.config, read, support)
    target = split_city(ahead.city, data, ahead.split, ahead.starts, seed=seed)
    prompts = region_prompts(read, [support], hypernetwork.prompt_encoder)
    return NewCity(ahead.city, prompts, target, data, kept, read.num_steps - known)


def forecast_new_city(
    parameters: RegionParameters, new_city: NewCity, *, adapt: AdaptConfig | None = None, key: Key | None = None
) -> MethodForecast:
    """Forecasts every window of a new city with the parameters generated for it.

    Args:
      parameters: as `Hypernetwork.generate` makes them of `new_city.prompts`.
      new_city: the city.
      adapt: None for zero-shot; else how to fine-tune on the support days.
      key: random key of the fine-tuning.

    Returns:
      Forecasts [S, R, P] in data units, averaged over the samples, their deviation over the samples, and quantiles.

    Raises:
      InputError: the parameters are for another city, or for other regions.
      NotFiniteError: fine-tuning left the numbers.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> new_city = gpd.prepare_new_city(city, hypernetwork)  # doctest: +SKIP
      >>> parameters = hypernetwork.generate(new_city.prompts, key=jax.random.key(0))  # doctest: +SKIP
      >>> made = gpd.forecast_new_city(parameters, new_city).forecast  # doctest: +SKIP
    """
    check_regions(parameters, new_city.city)
    return forecast_target(parameters, new_city.target, adapt, key)


def save_parameters(folder: str | pathlib.Path, parameters: RegionParameters, new_city: NewCity) -> None:
    """Writes the parameters of a new city's regions into a folder, whole or not at all.

    Args:
      folder: where; what it holds is replaced.
      parameters: of the city's regions.
      new_city: the city.

    Raises:
      InputError: the parameters are for another city, or for other regions.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.save_parameters("runs/new/parameters", parameters, new_city)  # doctest: +SKIP
    """
    city = new_city.city
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "model": parameters.model,
        # A city that was young when its parameters were made will be older when they are read.
        "data": dataclasses.asdict(new_city.chosen),
        "city": city.name,
        "kind": city.kind,
        "channel": city.feature_names[0],
        "interval_minutes": city.interval_minutes,
        "regions": city.node_ids,
    }
    check_regions(parameters, city)
    held = {name: getattr(parameters, name) for name in ("params", "directions", "residuals")}
    arrays: dict[str, Any] = {name: value for name, value in held.items() if value is not None}
    save_arrays(pathlib.Path(folder), arrays, facts)


def load_parameters(folder: str | pathlib.Path) -> CityParameters:
    """Reads what `save_parameters` wrote.

    Args:
      folder: where it lies.

    Returns:
      The parameters, leaves [K, R, ...], and whose they are.

    Raises:
      InputError: there are none, or they are damaged, or of another format.

    Example:
      >>> import gpdiff_jax as gpd
      >>> kept = gpd.load_parameters("runs/new/parameters")  # doctest: +SKIP
      >>> kept.city, len(kept.regions)  # doctest: +SKIP
    """
    arrays, facts = load_arrays(pathlib.Path(folder), _FORMAT, "parameters of a city")
    with building("parameters of a city", folder):
        check_facts(facts, _FACTS)
        params, regions = arrays["params"], tuple(facts["regions"])
        shapes = {path: leaf.shape[2:] for path, leaf in leaves_of(params).items()}
        if not shapes:
            raise InputError("it holds no array of parameters")
        check_arrays(params, {path: (None, len(regions), *shape) for path, shape in shapes.items()}, "params")
        if "directions" in arrays:
            check_arrays(arrays["directions"], {path: (None, *shape) for path, shape in shapes.items()}, "directions")
        data = DataConfig.from_json(facts["data"])
        if "residuals" in arrays:
            check_arrays(arrays["residuals"], {"": (data.horizon, None)}, "residuals", values="any")
        arrays = to_device(arrays)
        names = (facts["city"], facts.get("kind") or "", facts["channel"], facts["interval_minutes"])
        label = CityLabel(*names, node_ids=regions)
        more = arrays.get("directions"), arrays.get("residuals")
        made = RegionParameters(arrays["params"], facts["model"], data, label, *more)
    return CityParameters(made, facts["city"], facts["channel"], facts["interval_minutes"], regions)
