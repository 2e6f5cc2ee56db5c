"""In: a city. Out: a hash of all that is known of it, by which work on it is known again."""

import hashlib

import numpy as np

from gpdiff_jax.cities.city import City


def city_digest(city: City) -> str:
    """A hash of a city's names, clock, kind, readings, graph and static facts.

    Args:
      city: the city.

    Returns:
      SHA-256 in hexadecimal digits; two cities that differ in anything have different ones. The place does not count.
    """
    words = (city.name, city.kind, city.node_ids, city.feature_names, city.interval_minutes, str(city.start))
    digest = hashlib.sha256(repr((*words, city.poi_names)).encode())
    for array in (city.values, city.senders, city.receivers, city.weights, city.latitude, city.longitude, city.poi):
        described = None if array is None else (array.shape, str(array.dtype))
        digest.update(repr(described).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
