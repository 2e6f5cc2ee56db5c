"""In: two processes, or an impossible folder. Out: the second loads what the first compiled; or one warning."""

import hashlib
import json
import logging
import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

from gpdiff_jax.training.compilation_cache import enable_compilation_cache

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)

# A first compilation before the cache is on makes JAX settle on "no cache"; the call has to turn it on all the same.
_PROGRAM = """
import hashlib, json
import jax, jax.numpy as jnp, numpy as np
from gpdiff_jax.training.compilation_cache import enable_compilation_cache

jnp.ones(3).sum().block_until_ready()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
folder = enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jnp.linspace(0.0, 1.0, 64 * 64).reshape(64, 64)
y = jax.jit(lambda x: jnp.sin(x @ x.T).sum(axis=0))(x)
digest = hashlib.sha256(np.asarray(y).tobytes()).hexdigest()
print(json.dumps({"folder": str(folder), "hits": len(hits), "digest": digest}))
"""


@pytest.fixture
def restored_settings():
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    yield
    if before["jax_compilation_cache_dir"]:
        enable_compilation_cache(before["jax_compilation_cache_dir"])
    for name, value in before.items():
        jax.config.update(name, value)


def _run(folder: pathlib.Path) -> dict:
    environment = {**os.environ, "GPDIFF_CACHE": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _entries(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*-cache")}


def test_a_second_process_loads_what_the_first_compiled_and_computes_the_same_bits(tmp_path):
    folder = tmp_path / "new" / "xla"
    first = _run(folder)
    kept = _entries(folder)
    second = _run(folder)
    assert first["folder"] == second["folder"] == str(folder)
    assert first["hits"] == 0 and kept
    assert second["hits"] >= 1
    assert _entries(folder) == kept
    assert second["digest"] == first["digest"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_an_unwritable_folder_is_one_line_of_warning_and_leaves_the_settings_alone(tmp_path, caplog, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("GPDIFF_CACHE", str(file / "xla"))
    before = [getattr(jax.config, name) for name in _SETTINGS]
    with caplog.at_level(logging.WARNING):
        assert enable_compilation_cache() is None
    (record,) = caplog.records
    assert str(file / "xla") in record.getMessage() and "GPDIFF_CACHE" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert [getattr(jax.config, name) for name in _SETTINGS] == before


@pytest.mark.parametrize(
    ("argument", "ours", "jaxs", "chosen"),
    [
        ("argument", "ours", "jaxs", "argument"),
        (None, "ours", "jaxs", "ours"),
        (None, "", "jaxs", "jaxs"),
        (None, None, None, ".cache/gpdiff_jax/xla"),
    ],
)
def test_the_nearest_name_wins(argument, ours, jaxs, chosen, tmp_path, monkeypatch, restored_settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("GPDIFF_CACHE", ours), ("JAX_COMPILATION_CACHE_DIR", jaxs)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    folder = enable_compilation_cache(tmp_path / argument if argument else None)
    assert folder == tmp_path / chosen and folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
