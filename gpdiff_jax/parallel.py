"""In: a function of rows that do not depend on each other. Out: the same function, its rows spread over all devices.

The device axis is added here, by `jax.pmap`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.jax_utils
import jax
import numpy as np

from gpdiff_jax.typing import Device


def use_every_core() -> None:
    """Makes every CPU core a device, so that rows are spread over cores; for a process that owns the machine.

    Call it before JAX is first used; later it does nothing. A number of devices asked for by `XLA_FLAGS` is kept.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # No more threads than cores (`PJRT_NPROC`), which collectives would need: rows need none, and eight threads on two
    # cores make a harvest 1.7 times slower.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _num_cores())


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RowSpread:
    """A function of shared values and X rows, compiled for all local devices.

    The shared values are copied to every device once. A call starts the work and returns at once; reading its result
    waits for it.
    """

    def __init__(
        self, function: Callable[[Any, Any], Any], shared: Any, devices: Sequence[Device] | None = None
    ) -> None:
        """Binds what all rows share.

        Args:
          function: `function(shared, rows) -> result`, pytrees; every leaf of rows and result has X rows on axis 0.
          shared: a pytree of arrays.
          devices: D devices; None for all local ones.
        """
        self.devices = list(jax.local_devices() if devices is None else devices)
        self._shared = flax.jax_utils.replicate(shared, self.devices)
        self._mapped = _pmap(function, tuple(self.devices))

    def __call__(self, rows: Any) -> "PendingRows":
        """Starts the work on X rows.

        Args:
          rows: leaves [X, ...]; a remainder that the devices cannot share evenly is filled up with repeats of the last
            row, whose results are dropped.

        Returns:
          The result to come.
        """
        count, num_devices = len(jax.tree.leaves(rows)[0]), len(self.devices)
        share = -(-count // num_devices)
        filled = np.minimum(np.arange(share * num_devices), count - 1)
        spread = jax.tree.map(lambda leaf: leaf[filled].reshape(num_devices, share, *leaf.shape[1:]), rows)
        return PendingRows(self._mapped(self._shared, spread), count)


@functools.cache
def _pmap(function: Callable[[Any, Any], Any], devices: tuple[Device, ...]) -> Callable[[Any, Any], Any]:
    # The same program every time: compiled programs are found by it.
    return jax.pmap(function, devices=devices)


class PendingRows:
    """Rows that devices are working on."""

    def __init__(self, result: Any, count: int) -> None:
        """Made by `RowSpread`."""
        self._result, self._count = result, count

    def read(self) -> Any:
        """Waits for the rows and returns them on the host, leaves [X, ...]."""
        arrays = jax.tree.map(np.asarray, self._result)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: self._count], arrays)
