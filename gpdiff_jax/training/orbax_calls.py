"""In: a call of orbax. Out: the same call, for this host alone, and nothing heard of its failure but an exception."""

import asyncio
import contextlib
import logging as standard_logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

from absl import logging
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.hosts import host_number, num_hosts

try:
    from orbax.checkpoint._src import asyncio_utils
except ImportError:  # another version of orbax
    asyncio_utils = None

_PATIENCE = 5.0  # seconds
_CALLING = threading.RLock()  # filters of warnings and logs are the process's


@contextlib.contextmanager
def calling_orbax() -> Iterator[None]:
    """Within it, one host saves and loads on its own, and a call that fails says so by its exception alone.

    What an asynchronous save logs of its failure after the call came back is not kept from the log.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_CALLING)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        logger = logging.get_absl_logger()
        logger.addFilter(_not_of_orbax)
        stack.callback(logger.removeFilter, _not_of_orbax)
        stack.enter_context(_without_others())
        try:
            yield
        except BaseException as error:
            # What the failed call still holds goes while its complaints are ignored.
            traceback.clear_frames(error.__traceback__)
            raise


def _not_of_orbax(record: standard_logging.LogRecord) -> bool:
    return "/orbax/checkpoint/" not in record.pathname


class _PatientLoops:
    """A module, of which nothing differs but that its event loops end what is under way before they close.

    Orbax (0.12.8) closes an event loop at the first failure, while other reads and writes are under way; their threads
    would print a traceback each, hundreds of lines for a file that was cut short.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """A loop of the module."""
        loop: Any = self._module.new_event_loop()
        close = loop.close

        def end_and_close() -> None:
            try:
                error = sys.exc_info()[1]
                if (error is None or isinstance(error, Exception)) and not (loop.is_closed() or loop.is_running()):
                    _end_tasks(loop)
            finally:
                close()

        loop.close = end_and_close
        return loop


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Waits, though not for ever, until nothing is under way, and keeps what that fails of from the log."""
    loop.set_exception_handler(lambda *_: None)
    begin = time.monotonic()
    with contextlib.suppress(RuntimeError):  # of tasks that come and go while they are listed
        while (left := asyncio.all_tasks(loop)) and time.monotonic() < begin + _PATIENCE:
            loop.run_until_complete(asyncio.wait(left, timeout=_PATIENCE))


if asyncio_utils is not None:
    # In orbax's own module, where its loops are made, and there for good: threads may call at any time.
    for _name in ("asyncio", "uvloop"):
        _module = getattr(asyncio_utils, _name, None)
        if _module is not None and not isinstance(_module, _PatientLoops):
            setattr(asyncio_utils, _name, _PatientLoops(_module))


@contextlib.contextmanager
def _without_others() -> Iterator[None]:
    if num_hosts() == 1:
        yield
        return
    alone: Any = ocp.Context()
    alone.multiprocessing.primary_host = host_number()
    alone.multiprocessing.active_processes = {host_number()}
    alone.multiprocessing.barrier_sync_key_prefix = f"host{host_number()}"
    # Whatever the active processes are, orbax compares the folder's name over all before it saves.
    with (
        mock.patch("orbax.checkpoint.experimental.v1._src.saving.execution._check_directory_consistency"),
        alone,
    ):
        yield
