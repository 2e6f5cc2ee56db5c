"""In: a call of orbax. Out: the same call, for this host alone, and nothing heard of its failure but an exception."""

import asyncio
import contextlib
import functools
import importlib.util
import logging as standard_logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from absl import logging
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.hosts import host_number, num_hosts

_PATIENCE = 30.0  # seconds
# Where orbax makes its event loops.
_MAKERS = [asyncio, *([importlib.import_module("uvloop")] if importlib.util.find_spec("uvloop") else [])]


@contextlib.contextmanager
def calling_orbax() -> Iterator[None]:
    """Within it, one host saves and loads on its own, and a call that fails says so by its exception alone.

    Orbax (0.12.8) closes its event loop at the first failure, while other reads and writes are under way; their threads
    would print a traceback each, hundreds of lines for a file that was cut short.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        logger = logging.get_absl_logger()
        logger.addFilter(_not_of_orbax)
        stack.callback(logger.removeFilter, _not_of_orbax)
        for module in _MAKERS:
            patient = functools.partial(_patient_loop, module.new_event_loop)
            stack.enter_context(mock.patch.object(module, "new_event_loop", patient))
        stack.enter_context(_without_others())
        try:
            yield
        except BaseException as error:
            # What the failed call still holds goes while its complaints are ignored.
            traceback.clear_frames(error.__traceback__)
            raise


def _not_of_orbax(record: standard_logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _patient_loop(make: Callable[[], Any]) -> asyncio.AbstractEventLoop:
    """An event loop that ends what is under way in it before it closes, and keeps what that fails of to itself."""
    loop = make()
    close = loop.close

    def end_and_close() -> None:
        if not loop.is_closed() and not loop.is_running():
            begin = time.monotonic()
            while (left := asyncio.all_tasks(loop)) and time.monotonic() < begin + _PATIENCE:
                loop.run_until_complete(asyncio.wait(left, timeout=_PATIENCE))
        close()

    loop.set_exception_handler(lambda *_: None)
    loop.close = end_and_close
    return loop


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
