"""In: the flags of a benchmark that holds cities out. Out: its cities, and the names of those that are held out."""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from gpdiff_jax.cities import (
    City,
    SimulationConfig,
    find_cities,
    load_city,
    resample,
    select_channels,
    simulate_cities,
)
from gpdiff_jax.errors import InputError


def cities_of_flags() -> list[City]:
    """The cities of --cities in --data_dir or GPDIFF_DATA, first channels; simulated ones without either folder."""
    folder, minutes = flags.FLAGS.data_dir or os.environ.get("GPDIFF_DATA"), flags.FLAGS.interval_minutes
    if folder is None:
        cities = simulate_cities(SimulationConfig(cities=4, regions=24, days=42), seed=0)
    else:
        cities = [select_channels(city, "first")[0] for city in find_cities(folder, flags.FLAGS.cities)]
    return [resample(city, minutes) if minutes else city for city in cities]


def hourly_city(name: str) -> City:
    """A city of --data_dir by the hour, first channel."""
    return select_channels(resample(load_city(pathlib.Path(flags.FLAGS.data_dir) / f"{name}.npz"), 60), "first")[0]


def held_out_names(cities: Sequence[City]) -> list[str]:
    """The names of --held_out, all if not given, the last alone with --quick.

    Raises:
      InputError: one of them is no city, or there are not two cities.
    """
    names = [city.name for city in cities]
    held_out = flags.FLAGS.held_out or names
    unknown = sorted(set(held_out) - set(names))
    if unknown or len(cities) < 2:
        raise InputError(f"`held_out` (={unknown}) must be among at least two cities; choose from {', '.join(names)}")
    return held_out[-1:] if flags.FLAGS.quick else held_out
