"""In: a function of rows that do not depend on each other. Out: the same function, its rows spread over all devices.

The device axis is added here, by `jax.pmap`; a training step, whose devices tell each other their gradients, is spread
in `training.loop` over the devices that are chosen here.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpdiff_jax.hosts import num_hosts
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.exchange import gather_rows, least_devices, least_of_hosts, one_device_each, share_of_rows
from gpdiff_jax.training.memory import bytes_of, check_room, free_bytes
from gpdiff_jax.typing import Device

_MANY_ROWS = 64
_FEW_ROWS = 1024  # of which every machine has room
_ROOM_FOR = 4  # the part of the free memory that rows and results may take on a device: the host copies results
_IN_WORK = 2  # chunks that wait to be read while the next is begun


def use_every_core() -> None:
    """Makes every CPU core a device, so that rows are spread over cores; for a process that owns the machine.

    Call it before JAX is first used; later it does nothing. A number of devices that `XLA_FLAGS` sets is kept.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.use_every_core()  # doctest: +SKIP
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # No more threads than cores (`PJRT_NPROC`): rows need no collectives, and eight threads on two cores make a harvest
    # 1.7 times slower. Rows that a city moves together (`ShardedRows(joint=True)`) have them; with a thread for each
    # device they have never been seen to hang, as steps of a training on more devices than threads have.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _num_cores())


def training_devices(batch: int, devices: Sequence[Device] | None = None) -> list[Device]:
    """The devices that a training step is spread over, an equal share of the batch on each.

    Devices that wait for each other need a thread each. Processors that are one device per core have none to spare, and
    can wait for ever; so of CPU devices one is taken, whose products run on all cores, unless `PJRT_NPROC` names two
    threads for each.

    Args:
      batch: examples of a step that are worked on at a time.
      devices: those to take, whatever they are; None to choose from all.

    Returns:
      The devices, the first ones of every host, as many of each as lets all share the batch evenly; one of each where
      the hosts themselves do not.
    """
    if devices is not None:
        return list(devices)
    hosts, most = num_hosts(), _most_waiting()
    return one_device_each(max((count for count in range(1, most + 1) if batch % (count * hosts) == 0), default=1))


def _most_waiting() -> int:
    """Devices of a host that may wait for those of others, the same number on every host."""
    most = least_devices()
    named = os.environ.get("PJRT_NPROC", "")
    threads = int(named) if named.isdecimal() else 0
    return least_of_hosts(1 if jax.local_devices()[0].platform == "cpu" and threads < 2 * most else most)


def rows_side_by_side(wanted: int | None) -> int:
    """How many rows a device works on side by side: what is wanted, or what suits the default device.

    On a CPU one after another, which stay in its cache; on an accelerator many, which fill it.
    """
    if wanted is None:
        return 1 if jax.default_backend() == "cpu" else _MANY_ROWS
    return wanted


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


DEVICES = "devices"
"""The name of the device axis in everything that is mapped over devices."""


def replicate(tree: Any, devices: Sequence[Device]) -> Any:
    """Copies a pytree to every device of this host, as `jax.pmap` over `DEVICES` wants it.

    `flax.jax_utils.replicate` does the same by a compiled program for every shape; this compiles none.

    Args:
      tree: arrays, typed keys and numbers.
      devices: the devices; those of other hosts get theirs there.

    Returns:
      The leaves with a leading axis, one copy on each device of this host.
    """
    devices = [device for device in devices if device.process_index == jax.process_index()]
    return jax.tree.map(lambda leaf: _on_each(leaf, [None] * len(devices), devices), tree)


def share(tree: Any, devices: Sequence[Device]) -> Any:
    """Copies to every device of this host what nobody gives away; see `replicate`.

    Copies of large arrays are kept while the arrays themselves are: the series of all cities are placed once, whatever
    reads them. On a CPU they are no copies, but look at the same memory, and are not kept, which would keep it.
    """
    if _is_host_memory(devices):
        return replicate(tree, devices)
    here = [device for device in devices if device.process_index == jax.process_index()]

    def shared(leaf: Any) -> jax.Array:
        is_array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not is_array or leaf.nbytes < _MANY_BYTES:
            return replicate(leaf, here)
        return _of_parts([_kept_copy(leaf, device) for device in here], here)

    return jax.tree.map(shared, tree)


def _is_host_memory(devices: Sequence[Device]) -> bool:
    return devices[0].platform == "cpu"


_MANY_BYTES = 2**20
_copies: dict[tuple[int, Device], tuple[weakref.ref, jax.Array]] = {}


def _kept_copy(leaf: jax.Array, device: Device) -> jax.Array:
    """The array with a leading axis of one, on a device."""
    place = id(leaf), device
    array, copy = _copies.get(place, (None, None))
    if array is None or copy is None or array() is not leaf:
        copy = jax.device_put(np.asarray(leaf)[None], device)
        _copies[place] = weakref.ref(leaf, lambda gone: _forget(place, gone)), copy
    return copy


def _forget(place: tuple[int, Device], gone: weakref.ref) -> None:
    if place in _copies and _copies[place][0] is gone:  # and not of a newer array in the same place
        del _copies[place]


def shard(tree: Any, devices: Sequence[Device]) -> Any:
    """Puts the entries of a leading axis on as many devices; compiles nothing."""
    return jax.tree.map(lambda leaf: _on_each(leaf, list(range(len(devices))), devices), tree)


def first_copy(tree: Any) -> Any:
    """The first device's copy of replicated arrays, on the host; an index would be a program of its own."""
    return jax.tree.map(lambda leaf: np.array(leaf.addressable_shards[0].data)[0, ...], tree)


def _on_each(leaf: Any, places: Sequence[int | None], devices: Sequence[Device]) -> Any:
    """One entry of the leading axis per device, or all of the leaf where the place is None."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _on_each(jax.random.key_data(leaf), places, devices)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    entries = [(host if place is None else host[place])[None] for place in places]
    return _of_parts([jax.device_put(entry, device) for entry, device in zip(entries, devices, strict=True)], devices)


def _of_parts(parts: Sequence[jax.Array], devices: Sequence[Device]) -> jax.Array:
    """One array of what lies on devices, with a leading axis for them."""
    sharding = NamedSharding(Mesh(np.asarray(devices), (DEVICES,)), PartitionSpec(DEVICES))
    return jax.make_array_from_single_device_arrays((len(devices), *parts[0].shape[1:]), sharding, list(parts))


class ShardedRows:
    """A function of shared values and X rows, compiled for all local devices; each of several hosts works on its share.

    The shared values are copied to every device once. A call starts the work and returns at once; reading its result
    waits for it, and for the other hosts, all of which have to make the same calls.

    With `joint`, the function may sum over `DEVICES`, which are then those of all hosts, and `is_counted` says there
    which of a device's rows count.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        shared: Any,
        devices: Sequence[Device] | None = None,
        *,
        joint: bool = False,
    ) -> None:
        """Binds what all rows share.

        Args:
          function: `function(shared, rows) -> result`, pytrees; every leaf of rows and result has X rows on axis 0.
          shared: a pytree of arrays.
          devices: the devices; None for all local ones.
          joint: whether the function looks at rows of other devices.
        """
        every = list(jax.local_devices() if devices is None else devices)
        if joint and num_hosts() > 1:
            every = one_device_each(_most_waiting())
        self.devices = [device for device in every if device.process_index == jax.process_index()]
        self._joint, self._together = joint, len(self.devices) if joint else 1  # rows that a host takes together
        self._shared = share(shared, self.devices)
        self._mapped = _pmap(function, tuple(every))

    def __call__(self, rows: "Any | PlacedRows") -> "PendingRows":
        """Starts the work on X rows.

        Args:
          rows: leaves [X, ...], on the host or brought there; a remainder that the devices cannot share evenly is
            filled up with repeats of the last row, whose results are dropped. Or rows that were placed on the same
            devices before.

        Returns:
          The result to come.

        Raises:
          NoRoomError: joint rows, which cannot go in parts, would not fit on an accelerator.
        """
        if self._joint and not _is_host_memory(self.devices):
            count = len(jax.tree.leaves(rows)[0])
            share = -(-count // (len(self.devices) * num_hosts()))
            what = f"the parameters of {count} regions and samples that are tuned together"
            check_room(int(share * self._bytes_of_a_row(rows)), what, self.devices[0])
        placed = rows if isinstance(rows, PlacedRows) else place_rows(rows, self.devices, self._together)
        return PendingRows(self._mapped(self._shared, placed.rows), placed.count, self._together)

    def map(self, rows: Any) -> Any:
        """The results of X rows, a part of the rows at a time where the devices have no room for all.

        Args:
          rows: leaves [X, ...], on the host or brought there.

        Returns:
          Leaves [X, ...], on the host.
        """
        count = len(jax.tree.leaves(rows)[0])
        part = self._rows_at_once(rows, count)
        if part >= count:
            return self(rows).read()
        results: Any = None
        for first in range(0, count, part):
            cut = jax.tree.map(lambda leaf, first=first: np.asarray(leaf[first : first + part]), rows)
            results = _put(results, self(cut).read(), first, count)
        return results

    def _rows_at_once(self, rows: Any, count: int) -> int:
        """How many rows there is room for on every host, with their results; whole groups of those side by side."""
        return count if count <= _FEW_ROWS else least_of_hosts(self._fitting(rows, count))

    def _fitting(self, rows: Any, count: int) -> int:
        group = _MANY_ROWS * len(self.devices) * num_hosts()
        taken = self._bytes_of_a_row(rows)
        # What lies on a device comes to the host, too.
        free = [free_bytes(self.devices[0]), free_bytes()]
        room = min((held // _ROOM_FOR for held in free if held is not None), default=None)
        if room is None:
            return count
        return max(group, int(room / taken) // group * group)

    def _bytes_of_a_row(self, rows: Any) -> float:
        """Bytes of a row and its result."""
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(self.devices), 1, *leaf.shape[1:]), leaf.dtype), rows)
        return bytes_of((one, jax.eval_shape(self._mapped, self._shared, one))) / len(self.devices)


def _put(whole: Any, part: Any, first: int, count: int) -> Any:
    """Leaves [count, ...] with those of a part from row `first` on; made for the first part."""
    if whole is None:
        whole = jax.tree.map(lambda leaf: np.empty((count, *leaf.shape[1:]), leaf.dtype), part)

    def fill(held: np.ndarray, new: np.ndarray) -> np.ndarray:
        held[first : first + len(new)] = new[: count - first]
        return held

    return jax.tree.map(fill, whole, part)


class PlacedRows(NamedTuple):
    """Rows that lie on devices, an equal share on each, to be worked on more than once."""

    rows: Any  # leaves [D, share, ...], those of this host
    count: int  # of all hosts, without those that fill up shares


def place_rows(rows: Any, devices: Sequence[Device] | None = None, together: int = 1) -> PlacedRows:
    """Puts this host's share of X rows on devices, None for all local ones; see `ShardedRows`."""
    devices = list(jax.local_devices() if devices is None else devices)
    count = len(jax.tree.leaves(rows)[0])
    mine = share_of_rows(count, together)
    share = -(-len(mine) // len(devices))
    filled = mine[np.minimum(np.arange(share * len(devices)), len(mine) - 1)]
    return PlacedRows(_spread(rows, filled, devices), count)


def is_counted(here: int, count: int) -> jax.Array:
    """Which rows of a device of `joint` rows are no repeats that fill it up.

    Args:
      here: rows of the device.
      count: X, rows of all.

    Returns:
      Booleans [here].
    """
    return here * jax.lax.axis_index(DEVICES) + jnp.arange(here, dtype=jnp.int32) < count


@bounded_cache(32)
def _pmap(function: Callable[[Any, Any], Any], devices: tuple[Device, ...]) -> Callable[[Any, Any], Any]:
    # The same program every time: compiled programs are found by it.
    return jax.pmap(function, axis_name=DEVICES, devices=devices, axis_size=len(devices))


def _spread(rows: Any, chosen: np.ndarray, devices: Sequence[Device]) -> Any:
    """The chosen rows, an equal share on each device."""

    def cut(leaf: Any) -> np.ndarray:
        host = np.asarray(leaf)
        every = np.array_equal(chosen, np.arange(len(host)))  # which need not be copied
        return (host if every else host[chosen]).reshape(len(devices), -1, *host.shape[1:])

    return shard(jax.tree.map(cut, rows), devices)


class PendingRows:
    """Rows that devices are working on."""

    def __init__(self, result: Any, count: int, together: int) -> None:
        """Made by `ShardedRows`."""
        self._result, self._count, self._together = result, count, together

    def read(self) -> Any:
        """Waits for the rows and returns them on the host, on every host all of them, leaves [X, ...]."""
        arrays, mine = jax.tree.map(_here, self._result), len(share_of_rows(self._count, self._together))
        return gather_rows(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:mine], arrays), self._count)


def _here(leaf: jax.Array) -> np.ndarray:
    """What lies on the devices of this host."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.concatenate([np.asarray(part.data) for part in leaf.addressable_shards])


def map_chunks(
    function: Callable[[Any, Any], Any],
    shared: Any,
    rows: Any,
    *,
    size: int,
    devices: Sequence[Device] | None = None,
) -> Any:
    """Applies a function to chunks of rows, a chunk per device at a time.

    Every device runs one program, for chunks of one size; so what it makes of a row does not depend, to the bit, on how
    many devices of a kind there are, nor on how many hosts, each of which works on its share of the chunks.

    Args:
      function: see `ShardedRows`; the same object in every call, or it is compiled again.
      shared: a pytree of arrays.
      rows: leaves [X, ...], on the host; the last chunks are filled up with repeats of the last row, which are dropped.
      size: rows of a chunk.
      devices: the devices; None for all local ones. No more are used than there are chunks.

    Returns:
      The results, leaves [X, ...], on the host.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    count = len(jax.tree.leaves(rows)[0])
    mine = share_of_rows(count, size)
    devices = devices[: len(mine) // size]
    shared, mapped = share(shared, devices), _pmap(function, tuple(devices))
    results: Any = None
    pending: list[tuple[int, Any]] = []

    def read(first: int, made: Any) -> None:
        nonlocal results
        part = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), made)
        results = _put(results, part, first, len(mine))

    for first in range(0, len(mine), len(devices) * size):
        chunk = mine[np.minimum(first + np.arange(len(devices) * size), len(mine) - 1)]
        pending.append((first, mapped(shared, _spread(rows, chunk, devices))))
        if len(pending) > _IN_WORK:  # so that the results of all are on the host alone
            read(*pending.pop(0))
    for one in pending:
        read(*one)
    return gather_rows(results, count)
