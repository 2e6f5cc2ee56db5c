"""In: a path of a city file (compressed npz, one array per key), or a folder of them and names.
Out: checked cities; and back, a city written as such a file at once or not at all.
"""

import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from gpdiff_jax.cities.calendar import local_moment
from gpdiff_jax.cities.city import City, check_city, edges_of
from gpdiff_jax.errors import InputError, check_at_least
from gpdiff_jax.files import DAMAGE, check_members, read_member, user_path, write_npz

_REQUIRED = ("values", "adjacency", "interval_minutes", "start", "feature_names", "node_ids", "city", "kind")
_OPTIONAL = ("latitude", "longitude", "poi", "poi_names")


def load_city(path: str | os.PathLike[str], *, missing_above: float | int | None = None) -> City:
    """Read one city file.

    Keys beyond the known ones are ignored. In speed data a zero means missing, so zeros become NaN.

    Args:
      path: an npz file with the arrays `values` [T, N, C], `adjacency` [N, N], `interval_minutes`, `start`,
          `feature_names` [C], `node_ids` [N], `city` and `kind`, and optionally `latitude` and `longitude` [N],
          `poi` [N, K] and `poi_names` [K]. The stem of its name becomes the name of the city.
      missing_above: readings above this value are fill values and become missing, and the others are taken as they
          are; None refuses readings that look like fill values.

    Returns:
      The checked city.

    Raises:
      InputError: the file is missing, damaged, too large, holds pickled objects, or breaks a rule of `check_city`; or
        `missing_above` is below 0.

    Example:
      >>> import gpdiff_jax as gpd
      >>> city = gpd.load_city("data/bay.npz")  # doctest: +SKIP
    """
    path = user_path(path)
    check_at_least(0, {"missing_above": missing_above})
    try:
        city = _city_from_arrays(path.stem, _read_arrays(path), missing_above)
        return check_city(city, judge_extremes=missing_above is None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save_city(path: str | os.PathLike[str], city: City) -> None:
    """Write one city as a compressed npz file that `load_city` reads back bit for bit.

    The file appears complete or not at all. Edges come back sorted by sender and then receiver.

    Args:
      path: where to write; an existing file is replaced.
      city: the city.

    Raises:
      InputError: the city breaks a rule of `check_city`, or the file cannot be written.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.save_city("data/bay.npz", city)  # doctest: +SKIP
    """
    check_city(city, judge_extremes=False)
    path = user_path(path)
    arrays = {
        "values": city.values,
        "adjacency": city.adjacency(),
        "interval_minutes": np.asarray(city.interval_minutes),
        "start": np.asarray("" if city.start is None else str(city.start)),
        "feature_names": np.asarray(city.feature_names),
        "node_ids": np.asarray(city.node_ids),
        "city": np.asarray(city.place),
        "kind": np.asarray(city.kind),
    }
    if city.latitude is not None and city.longitude is not None:
        arrays |= {"latitude": city.latitude, "longitude": city.longitude}
    if city.poi is not None:
        arrays |= {"poi": city.poi, "poi_names": np.asarray(city.poi_names)}
    try:
        write_npz(path, arrays)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose a folder that exists, with space"
        ) from None


def find_cities(
    data_dir: str | os.PathLike[str], names: Sequence[str], *, missing_above: float | int | None = None
) -> list[City]:
    """Load cities of a folder by name.

    Args:
      data_dir: a folder with one `NAME.npz` per city.
      names: the cities wanted, each once.
      missing_above: see `load_city`.

    Returns:
      The cities, in the order of `names`.

    Raises:
      InputError: the folder or a name does not exist, a name comes twice, or a file is not a valid city.

    Example:
      >>> import gpdiff_jax as gpd
      >>> bay, york = gpd.find_cities("data", ["bay", "york"])  # doctest: +SKIP
    """
    folder = user_path(data_dir)
    if not folder.is_dir():
        raise InputError(f"`data_dir` (={folder}) is not a folder; give the folder that holds the city files")
    available = sorted(path.stem for path in folder.glob("*.npz"))
    choice = f"choose from {', '.join(available)}" if available else f"{folder} holds no .npz file"
    if not names:
        raise InputError(f"no city is named; {choice}")
    for index, name in enumerate(names):
        if name not in available:
            raise InputError(f"city {name!r} is not in {folder}; {choice}")
        if name in names[:index]:
            raise InputError(f"city {name!r} is named twice; name each city once")
    return [load_city(folder / f"{name}.npz", missing_above=missing_above) for name in names]


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        raise InputError("a folder; name a city file in it")
    if not path.is_file():
        raise InputError("no such file; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, "the file")
            members = {name.removesuffix(".npy") for name in archive.namelist()}
            for key in _REQUIRED:
                if key not in members:
                    raise InputError(f"key `{key}` is missing; a city file needs {', '.join(_REQUIRED)}")
            return {key: read_member(archive, f"{key}.npy") for key in _REQUIRED + _OPTIONAL if key in members}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error}); check the file and its permissions") from None
    except (*DAMAGE, MemoryError) as error:
        remedy = "write or download it again"
        if path.suffix != ".npz":
            remedy = "make a city file of a table by `python -m experiments.prepare_city`"
        raise InputError(f"not a readable npz file ({type(error).__name__}); {remedy}") from None


def _city_from_arrays(name: str, arrays: Mapping[str, np.ndarray], missing_above: float | int | None) -> City:
    values = _numbers(arrays, "values", np.float32)
    kind = _text(arrays, "kind")
    if kind == "speed":
        values = np.where(values == 0, np.float32(np.nan), values)
    if missing_above is not None:
        values = np.where(values > missing_above, np.float32(np.nan), values)
    adjacency = _numbers(arrays, "adjacency", np.float32)
    regions = values.shape[1] if values.ndim == 3 else arrays["node_ids"].size
    if adjacency.shape != (regions, regions):
        raise InputError(
            f"`adjacency` (of shape {adjacency.shape}) must be [N, N] = [{regions}, {regions}]; reshape it"
        )
    interval = arrays["interval_minutes"]
    if interval.shape != () or interval.dtype.kind not in "iu":
        raise InputError(f"`interval_minutes` (={interval}) must be one whole number; e.g. 60")
    senders, receivers, weights = edges_of(adjacency)
    return City(
        name=name,
        kind=kind,
        values=values,
        senders=senders,
        receivers=receivers,
        weights=weights,
        interval_minutes=int(interval),
        start=_start(_text(arrays, "start")),
        feature_names=_texts(arrays, "feature_names"),
        node_ids=_texts(arrays, "node_ids"),
        latitude=_numbers(arrays, "latitude", np.float64) if "latitude" in arrays else None,
        longitude=_numbers(arrays, "longitude", np.float64) if "longitude" in arrays else None,
        poi=_numbers(arrays, "poi", np.float32) if "poi" in arrays else None,
        poi_names=_texts(arrays, "poi_names") if "poi_names" in arrays else (),
        place=_text(arrays, "city"),
    )


def _numbers(arrays: Mapping[str, np.ndarray], key: str, dtype: type) -> np.ndarray:
    array = arrays[key]
    if array.dtype.kind not in "fiu":
        raise InputError(f"`{key}` (of type {array.dtype}) must hold real numbers; convert it to {np.dtype(dtype)}")
    # A float64 beyond float32 becomes infinite here and is refused by `check_city`.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, dtype=dtype)


def _texts(arrays: Mapping[str, np.ndarray], key: str) -> tuple[str, ...]:
    array = arrays[key]
    if array.ndim != 1 or array.dtype.kind not in "Uiu":
        raise InputError(f"`{key}` (of type {array.dtype}, shape {array.shape}) must be a list of texts; convert it")
    try:
        return tuple(str(text) for text in array.tolist())
    except ValueError:
        raise InputError(f"`{key}` holds text that is not Unicode; write it again") from None


def _text(arrays: Mapping[str, np.ndarray], key: str) -> str:
    array = arrays[key]
    if array.shape != () or array.dtype.kind != "U":
        raise InputError(f"`{key}` (of type {array.dtype}, shape {array.shape}) must be one text; convert it")
    return _texts({key: array.reshape(1)}, key)[0]


def _start(text: str) -> np.datetime64 | None:
    return local_moment(text, "start", "; leave it empty if unknown") if text else None
