"""In: the environment. Out: a strict JAX on the CPU, and small cities; a plugin of every process that runs tests."""

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
# Most of the suite's time is XLA's, and what is tested is meaning, not speed: without most passes, the newer code
# generator for fusions and the libraries of kernels XLA takes a fifth of it. An unknown flag ends the process, so they
# are given to the versions that were seen to know them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = " ".join(
        (
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_use_xnnpack=false",
            "--xla_cpu_use_onednn=false",
            "--xla_cpu_parallel_codegen_split_count=1",
            os.environ.get("XLA_FLAGS", ""),
        )
    ).strip()

import hypothesis
import jax
import numpy as np
import pytest

import tests.tiny  # noqa: F401  registers its model
from gpdiff_jax.cities import City, SimulationConfig, simulate_cities
from gpdiff_jax.training.compilation_cache import enable_compilation_cache

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
