"""In: a city, and how many support days are visible. Out: the city after stretches of them, spread over its series."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, split_before
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.target import Target, split_city
from gpdiff_jax.data.windows import window_starts

_TEST_DAYS = 7


def stretches(city: City, config: DataConfig, count: int) -> Iterator[Target]:
    """The city after each of several stretches of support days, spread over its series.

    Args:
      city: a one-channel city.
      config: support days, windows and graphs.
      count: how many, as far as the series is long enough; at least one.

    Yields:
      The stretch, with the windows of the days after it as its test.
    """
    windows: Any = {"history": config.history, "horizon": config.horizon}
    day = city.steps_per_day
    graphs = region_graphs([city], max_neighbours=config.max_neighbours, pick=config.pick_neighbours, seed=0)
    first, last = config.support_days * day, city.num_steps - _TEST_DAYS * day
    for start in sorted(set(np.linspace(first, max(last, first), count).astype(int))):
        test = Span(int(start), min(int(start) + _TEST_DAYS * day, city.num_steps))
        split = split_before(test, day, config.support_days, before="a test", name=city.name, history=config.history)
        starts = window_starts(city, test, reach_back=True, **windows)
        visible = np.isfinite(city.values[split.support.start : split.support.stop])
        if len(starts) and visible.any():
            yield split_city(city, config, split, starts, graphs=graphs)
