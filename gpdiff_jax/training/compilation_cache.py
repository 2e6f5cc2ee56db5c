"""In: a folder, or the environment.
Out: a JAX that keeps there what it compiles, so that the next process starts sooner.

Source: JAX's persistent compilation cache, the configuration values `jax_compilation_cache_dir` and
`jax_persistent_cache_*`.
"""

import logging
import os
import pathlib
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache as _jax_cache

_MIN_COMPILE_SECONDS = 0.0
_EVERY_SIZE = -1  # JAX's word for no lower bound; its own default leaves one to the file system

_logger = logging.getLogger(__name__)


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """Lets JAX keep every program that it compiles, and load it in later processes.

    The entries are keyed by program, JAX version and device, so one folder serves many runs. Deleting the folder is
    always safe. JAX runs what it finds there: choose a folder that nobody else can write to.

    Args:
      folder: where to keep them. None takes `$GPDIFF_CACHE`, else `$JAX_COMPILATION_CACHE_DIR`, else
          `~/.cache/gpdiff_jax/xla`.

    Returns:
      The folder, absolute; or None, after one line of warning, where it cannot be written.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.enable_compilation_cache()  # doctest: +SKIP
    """
    chosen = None
    try:
        chosen = _choose(folder)
        _make_writable(chosen)
    # RuntimeError: no home folder is known for "~".
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        _logger.warning(
            "no compilation cache: cannot write to %r (%s); set GPDIFF_CACHE to a folder of yours",
            str(chosen if chosen is not None else folder),
            reason,
        )
        return None
    # JAX settles on a folder at its first compilation and would go on with that one.
    _jax_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", _EVERY_SIZE)
    return chosen


def _choose(folder: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the absolute folder; an empty variable counts as unset."""
    named = folder or os.environ.get("GPDIFF_CACHE") or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return pathlib.Path(named or "~/.cache/gpdiff_jax/xla").expanduser().absolute()


def _make_writable(folder: pathlib.Path) -> None:
    """Makes the folder, closed to others, and writes to it once: permission bits alone do not tell."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"0")


__all__ = ["enable_compilation_cache"]
