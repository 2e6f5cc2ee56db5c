"""In: forecasts that another program made, and a run. Out: the same, checked and in the run's order, by channel."""

import re
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.run.settings import METHOD_SETS, METHODS
from gpdiff_jax.run.stages import Stages
from gpdiff_jax.transfer.evaluate import observed_truth, window_start_names

_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


def check_outside_name(name: str) -> None:
    """Raises `InputError` unless forecasts of another program may go by this name."""
    if not _NAME.fullmatch(name):
        raise InputError(f"forecasts cannot be named {name!r}; use at most 60 of a-z, 0-9 and _, a letter first")
    if name in (*METHODS, *METHOD_SETS) or name.startswith("gpdiff"):
        raise InputError(f"{name!r} is a name of this program's own methods; name forecasts of another one otherwise")


def region_names(run: Stages, city: City, nodes: Any = None) -> list[str]:
    """Ids of nodes of one of a run's channels, with the channel's name where there are several."""
    chosen = range(city.num_nodes) if nodes is None else nodes
    suffix = f":{city.feature_names[0]}" if len(run.target_cities) > 1 else ""
    return [f"{city.node_ids[node]}{suffix}" for node in chosen]


def in_order_of_run(
    run: Stages, name: str, forecast: Any, window_start: Any = None, node_ids: Any = None
) -> list[Float[np.ndarray, "S R P"]]:
    """Brings forecasts into the order in which a run judges its own.

    Args:
      run: the run.
      name: by which they are called in messages.
      forecast: [S, R, P] numbers in data units, the regions of one channel after those of another.
      window_start: [S] local times (`datetime64` or ISO 8601) of the first step that a window forecasts, or "step N"
        where the calendar is unknown; there may be more windows than the run judges, in any order. None where they are
        the run's, one by one.
      node_ids: [R] names, as `forecasts.npz` has them; there may be more, in any order. None where they are the run's.

    Returns:
      float32 [S, R, P] per channel.

    Raises:
      InputError: they do not fit the run, lack a window or a region, or are not finite where a reading is to be
        forecast.
    """
    values = _as_array(name, "numbers", forecast)
    if values.dtype.kind not in "iuf":
        raise InputError(f"forecasts {name!r} hold {values.dtype}; give real numbers in the unit of the data")
    wanted = [label for city in run.target_cities for label in region_names(run, city)]
    horizon = run.settings.data.horizon
    starts = window_start_names(run.target_cities[0], run.targets[0])
    windows = _places(
        name, "window", window_start, starts, _as_times if run.target_cities[0].start is not None else _words
    )
    regions = _places(name, "region", node_ids, wanted, _words)
    shape = (
        len(starts) if windows is None else len(np.asarray(window_start)),
        len(wanted) if regions is None else len(np.asarray(node_ids)),
        horizon,
    )
    if values.shape != shape:
        hint = (
            "swap the last two axes"
            if values.shape == (shape[0], shape[2], shape[1])
            else "see the run's forecasts.npz"
        )
        raise InputError(
            f"forecasts {name!r} have shape {values.shape}, which must be {shape}: windows, regions, steps; {hint}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and said so
        values = values.astype(np.float32)
    values = values if windows is None else values[windows]
    values = values if regions is None else values[:, regions]
    truth = [observed_truth(city, target)[0] for city, target in zip(run.target_cities, run.targets, strict=True)]
    lacking = ~np.isfinite(values) & np.isfinite(np.concatenate(truth, axis=1))
    if lacking.any():
        window, region, step = np.argwhere(lacking)[0]
        raise InputError(
            f"forecasts {name!r} are not finite in {lacking.sum()} places where a reading is to be forecast, the first "
            f"in the window of {starts[window]}, region {wanted[region]!r}, step {step + 1}"
        )
    return np.split(values, np.cumsum([city.num_nodes for city in run.target_cities])[:-1], axis=1)


def _places(name: str, what: str, given: Any, wanted: list[str], read: Any) -> np.ndarray | None:
    """Where each of the wanted names stands among those given; None where none are."""
    if given is None:
        return None
    labels = _as_array(name, f"names of every {what}", given)
    if labels.ndim != 1:
        raise InputError(f"forecasts {name!r}: the names of every {what} must be a list, got shape {labels.shape}")
    found = {label: place for place, label in enumerate(read(name, labels))}
    if len(found) < len(labels):
        raise InputError(f"forecasts {name!r} name a {what} twice; give every {what} once")
    keys = read(name, np.asarray(wanted))
    missing = [word for word, key in zip(wanted, keys, strict=True) if key not in found]
    if missing:
        raise InputError(
            f"forecasts {name!r} lack {len(missing)} of the {len(wanted)} {what}s that the run judges, the first "
            f"{missing[0]!r}; forecast these too"
        )
    return np.asarray([found[key] for key in keys])


def _as_array(name: str, what: str, given: Any) -> np.ndarray:
    try:
        if isinstance(given, np.ma.MaskedArray) and given.dtype.kind in "iuf":
            return np.ma.filled(given.astype(np.float64), np.nan)
        return np.asarray(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"forecasts {name!r}: the {what} are no array ({error}); give rows of one length") from None


def _words(name: str, labels: np.ndarray) -> list[Any]:
    del name
    # HDF5 gives bytes.
    return [label.decode(errors="replace") if isinstance(label, bytes) else str(label) for label in labels]


def _as_times(name: str, labels: np.ndarray) -> list[Any]:
    try:
        with warnings.catch_warnings():
            # With an offset from UTC, NumPy would bring it there.
            warnings.simplefilter("error", UserWarning)
            if labels.dtype.kind not in "MUSO":
                raise TypeError(f"they are of type {labels.dtype}")
            words = labels if labels.dtype.kind == "M" else np.asarray(_words(name, labels))
            times = words.astype("datetime64[s]")
        if np.isnat(times).any():
            raise ValueError(f"number {int(np.argmax(np.isnat(times)))} is unknown")
        return list(times)
    except (TypeError, ValueError, UserWarning) as error:
        raise InputError(
            f"forecasts {name!r}: window starts must be local times as 2020-01-31T08:00 ({error})"
        ) from None
