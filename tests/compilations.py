"""In: tests that run. Out: per test file, how many programs XLA compiled for it and how long that took.

`python -m pytest --compilations tests/test_adapt.py` prints the table; with `-n` it is put together from all workers.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest

_TRACE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
_COMPILE = "/jax/core/compile/backend_compile_duration"
_LOADED = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compilations:
    """Programs and seconds; those that a cache held already count as loaded, not as compiled."""

    compiled: int = 0
    loaded: int = 0
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0  # of compiling or loading

    def plus(self, other: "Compilations", sign: int = 1) -> "Compilations":
        """The sum, or with sign -1 the difference."""
        fields = (field.name for field in dataclasses.fields(self))
        return Compilations(**{name: getattr(self, name) + sign * getattr(other, name) for name in fields})


@contextlib.contextmanager
def programs_made() -> Iterator[list[str]]:
    """A list that grows by the kind of each program that is compiled, or loaded from a cache, in the block."""
    made: list[str] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        del seconds
        if event == _COMPILE:
            made.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def pytest_configure(config: pytest.Config) -> None:
    """Listens from the start."""
    config.pluginmanager.register(CompilationReport())


class CompilationReport:
    """A plugin: counts in the processes that run tests, and prints where the reports arrive."""

    def __init__(self) -> None:
        """Begins to listen to JAX."""
        self._total, self._before = Compilations(), Compilations()
        self._files: dict[str, Compilations] = collections.defaultdict(Compilations)
        self._seconds: dict[str, float] = collections.defaultdict(float)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, seconds: float, **kwargs: Any) -> None:
        del kwargs
        if event in _TRACE:
            self._total.trace_seconds += seconds
        elif event == _COMPILE:
            self._total.compiled += 1
            self._total.compile_seconds += seconds

    def _on_event(self, event: str, **kwargs: Any) -> None:
        del kwargs
        if event == _LOADED:
            self._total.loaded += 1
            self._total.compiled -= 1  # what is loaded is timed as a compilation too

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        """Notes what one phase of one test compiled, in a form that travels from a worker."""
        report = yield
        report.compilations = dataclasses.asdict(self._total.plus(self._before, -1))
        self._before = dataclasses.replace(self._total)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a phase to its file."""
        file = report.nodeid.partition("::")[0]
        self._files[file] = self._files[file].plus(Compilations(**getattr(report, "compilations", {})))
        self._seconds[file] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints the table, the slowest file first."""
        terminalreporter.section("programs compiled")
        total = Compilations()
        rows = []
        for file in sorted(self._files, key=lambda file: -self._seconds[file]):
            total = total.plus(self._files[file])
            rows.append((self._seconds[file], self._files[file], file))
        rows.append((sum(self._seconds.values()), total, "all files"))
        terminalreporter.write_line("seconds  compiled  loaded  tracing s  compiling s  file")
        for seconds, count, file in rows:
            terminalreporter.write_line(
                f"{seconds:7.1f}  {count.compiled:8d}  {count.loaded:6d}  {count.trace_seconds:9.1f}"
                f"  {count.compile_seconds:11.1f}  {file}"
            )
