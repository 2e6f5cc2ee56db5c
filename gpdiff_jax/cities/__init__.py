"""In: city files, or a configuration of simulated cities.
Out: checked `City` values at the interval and with the channels asked for.
"""

from gpdiff_jax.cities.city import City, check_city
from gpdiff_jax.cities.files import find_cities, load_city, save_city
from gpdiff_jax.cities.resample import PartialBins, partial_bins, resample, select_channels
from gpdiff_jax.cities.simulated import SimulationConfig, SimulationTruth, simulate_cities, simulate_city_with_truth

__all__ = [
    "City",
    "PartialBins",
    "SimulationConfig",
    "SimulationTruth",
    "check_city",
    "find_cities",
    "load_city",
    "partial_bins",
    "resample",
    "save_city",
    "select_channels",
    "simulate_cities",
    "simulate_city_with_truth",
]
