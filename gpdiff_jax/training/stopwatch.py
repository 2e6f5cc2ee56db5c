"""In: a block of work. Out: how long it took without the compiling in it, which falls to whoever comes first."""

import contextlib
import time
from collections.abc import Iterator

import jax

_COMPILING = "/jax/core/compile/"


class Stopwatch:
    """What `stopwatch` yields; its seconds are set when the block ends."""

    def __init__(self) -> None:
        """Made by `stopwatch`."""
        self.seconds = 0.0


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measures a block of work without the time in which JAX traced, lowered and compiled.

    Yields:
      The watch.
    """
    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILING):
            end = time.monotonic()
            spans.append((end - duration_secs, end))

    watch, begin = Stopwatch(), time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        watch.seconds = time.monotonic() - begin - _covered(spans, begin)


def _covered(spans: list[tuple[float, float]], begin: float) -> float:
    """Seconds after `begin` that lie in at least one span; a program is traced within the tracing of another."""
    total, reached = 0.0, begin
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
