"""In: two cities. Out: where they hold the same readings: a copy under another name would tell what is hidden."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt64

from gpdiff_jax.cities.city import City

_LENGTH = 24  # equal readings in a row, without a gap
_APART = 6  # steps from one stretch that is looked for to the next
_DISTINCT = 8  # different values among them: a night of zeros is like any other
_MOST_PROBES = 4096
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_WORD = 2**64


class Overlap(NamedTuple):
    """Equal stretches of readings of two cities."""

    node: int  # of the first city
    step: int  # of the first city, where its stretch begins
    other_node: int
    other_step: int


def find_overlap(city: City, other: City) -> Overlap | None:
    """Looks for a stretch of 24 readings in a row that another city holds too, wherever it begins there.

    Readings are compared bit by bit, at the interval that the cities have; a copy in other units is not recognised.

    Args:
      city: one channel; its readings are looked for, some thousand stretches of them.
      other: one channel; it is looked through whole.

    Returns:
      The first stretch that was found, or None.
    """
    values, held = city.values[:, :, 0] + np.float32(0.0), other.values[:, :, 0] + np.float32(0.0)
    if len(held) < _LENGTH:
        return None
    steps, nodes = _probes(values)
    if len(steps) == 0:
        return None
    wanted = _hashes(values)[steps, nodes]
    order = np.argsort(wanted)
    hashes = _hashes(held)
    place = np.minimum(np.searchsorted(wanted[order], hashes), len(order) - 1)
    for other_step, other_node in zip(*np.nonzero(wanted[order][place] == hashes), strict=True):
        probe = order[place[other_step, other_node]]
        step, node = int(steps[probe]), int(nodes[probe])
        same = values[step : step + _LENGTH, node] == held[other_step : other_step + _LENGTH, other_node]
        if same.all():
            return Overlap(node, step, int(other_node), int(other_step))
    return None


def _probes(values: Float[np.ndarray, "T N"]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and nodes at which stretches begin that are whole and unlike others, evenly chosen among all such."""
    if len(values) < _LENGTH:
        return np.zeros(0, int), np.zeros(0, int)
    blocks = np.lib.stride_tricks.sliding_window_view(values, _LENGTH, axis=0)[::_APART]
    distinct = 1 + (np.diff(np.sort(blocks, axis=2), axis=2) > 0).sum(axis=2)
    block, node = np.nonzero((distinct >= _DISTINCT) & np.isfinite(blocks).all(axis=2))
    chosen = np.unique(np.linspace(0, max(len(block) - 1, 0), _MOST_PROBES).astype(int))[: len(block)]
    return block[chosen] * _APART, node[chosen]


def _hashes(values: Float[np.ndarray, "T N"]) -> UInt64[np.ndarray, "windows N"]:
    """A number for every stretch, the same for equal ones: sum of bits times powers, modulo 2^64, from running sums."""
    steps = len(values)
    inverse = np.uint64(pow(_FACTOR, -1, _WORD))
    powers = np.multiply.accumulate(np.full(steps, _FACTOR, np.uint64))
    undone = np.multiply.accumulate(np.full(steps, inverse, np.uint64))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    sums = np.concatenate([np.zeros((1, values.shape[1]), np.uint64), np.cumsum(bits * powers[:, None], axis=0)])
    windows = steps - _LENGTH + 1
    return (sums[_LENGTH:] - sums[:windows]) * undone[:windows, None]
