"""In: simulated cities. Out: their files, and one finished run of them, made once for all processes that run tests.

A plugin of every process that runs tests.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from gpdiff_jax import Run, save_city
from tests.runs import tiny_settings


@pytest.fixture(scope="session", name="shared")
def _shared(tmp_path_factory) -> pathlib.Path:
    """A folder that the processes of one test run have in common."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", name="data_dir")
def _data_dir(shared: pathlib.Path, simulated_cities: list) -> pathlib.Path:
    """Files of three cities; the target has a region that shows nothing in the support days."""
    folder = shared / "cities"
    folder.mkdir(exist_ok=True)
    for city in simulated_cities:
        values = np.array(city.values)
        if city is simulated_cities[-1]:
            values[163:235, 5] = np.nan
        save_city(folder / f"{city.name}.npz", dataclasses.replace(city, values=values))
    return folder


@pytest.fixture(scope="session", name="finished")
def _finished(shared: pathlib.Path, data_dir: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The folder of a finished run, to be copied before it is opened, and what its metrics.json holds."""
    folder, done = shared / "whole", shared / "whole.json"
    with (shared / "whole.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            content = Run.open(shared / "made", tiny_settings(data_dir)).evaluate()
            # The process that made it keeps its folder locked; a copy is nobody's.
            shutil.copytree(shared / "made", folder)
            done.write_text(json.dumps(content))
    return folder, json.loads(done.read_text())
