"""In: a block of work. Out: how long it took without the compiling in it, which falls to whoever comes first."""

import contextlib
import time
from collections.abc import Iterator

import jax

_COMPILING = "/jax/core/compile/"


class Stopwatch:
    """What `stopwatch` yields: seconds of work so far, and when the block has ended, of all of it."""

    def __init__(self) -> None:
        """Made by `stopwatch`."""
        self._begin = time.monotonic()
        self._end: float | None = None
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds without compiling."""
        end = time.monotonic() if self._end is None else self._end
        return end - self._begin - _covered(self._spans, self._begin)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILING):
            end = time.monotonic()
            self._spans.append((end - duration_secs, end))


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measures a block of work without the time in which JAX traced, lowered and compiled.

    Yields:
      The watch.
    """
    watch = Stopwatch()
    listen = watch._listen
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        watch._end = time.monotonic()


def _covered(spans: list[tuple[float, float]], begin: float) -> float:
    """Seconds after `begin` that lie in at least one span; a program is traced within the tracing of another."""
    total, reached = 0.0, begin
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
