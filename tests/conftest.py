"""In: the command line of pytest and the environment.
Out: a strict JAX on the CPU, small cities and the options --slow and --compilations.
"""

import dataclasses
import gc
import importlib.metadata
import os
import pathlib

# Before JAX is imported, and for the processes that tests start.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GPDIFF_CACHE", str(_ROOT / ".cache" / "xla"))
# With fewer threads than virtual devices, collectives can deadlock on a machine of few cores.
os.environ.setdefault("PJRT_NPROC", "8")
# Most of the suite's time is XLA's, and what is tested is meaning, not speed: without most passes and without the newer
# code generator for fusions XLA takes a quarter of it. An unknown flag ends the process, so it is given to the versions
# that were seen to know it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()

import hypothesis
import jax
import numpy as np
import pytest

import tests.tiny  # noqa: F401  registers its model
from gpdiff_jax.cities import City, SimulationConfig, simulate_cities
from gpdiff_jax.compilation_cache import enable_compilation_cache
from tests.compilations import CompilationReport

_LONGEST_FIRST = (
    "test_models.py",
    "test_harvest.py",
    "test_transfer.py",
    "test_training.py",
    "test_leak.py",
    "test_temporal.py",
    "test_users.py",
    "test_library.py",
    "test_encoders.py",
    "test_embedding.py",
)
_DESELECTED = pytest.StashKey[list[str]]()

# Two devices, so that whatever is spread over devices is spread in the tests.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
enable_compilation_cache()

# Tracing makes garbage by the million; looking for cycles in it as often as Python does takes a tenth of the time.
gc.set_threshold(200_000, 20, 20)

# A first example may wait for a compilation. The rest is as Hypothesis has it, which in CI repeats the same examples.
hypothesis.settings.register_profile("gpdiff_jax", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("gpdiff_jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--compilations", action="store_true", help="say how many programs every test file compiles")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--compilations"):
        config.pluginmanager.register(CompilationReport())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A worker takes whole files, in this order: a long one at the end would be waited for.
    place = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    slow = [] if config.getoption("--slow") else [item for item in items if item.get_closest_marker("slow")]
    config.stash[_DESELECTED] = [item.nodeid for item in slow]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    deselected = config.stash.get(_DESELECTED, [])
    if deselected:
        terminalreporter.write_line(f"left out {len(deselected)} slow tests, --slow runs them:")
        for nodeid in deselected:
            terminalreporter.write_line(f"  {nodeid}")


@pytest.fixture(scope="session")
def simulated_cities() -> list[City]:
    """Three crowd cities of eight regions and two weeks of hourly readings; their arrays are read-only."""
    cities = simulate_cities(SimulationConfig(cities=3, regions=8, days=14), seed=0)
    for city in cities:
        for field in dataclasses.fields(city):
            value = getattr(city, field.name)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
    return cities


@pytest.fixture(scope="session")
def real_cities() -> pathlib.Path:
    """The folder of real city files that GPDIFF_DATA names; a test that asks for it is skipped without one."""
    folder = os.environ.get("GPDIFF_DATA")
    if not folder:
        pytest.skip("GPDIFF_DATA names no folder of real cities")
    path = pathlib.Path(folder)
    assert path.is_dir(), f"GPDIFF_DATA (={folder}) is no folder"
    return path
