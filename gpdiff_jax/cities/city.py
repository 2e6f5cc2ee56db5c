"""In: the readings, the graph and the static facts of one city.
Out: a `City`, the value that every other module takes, and the check that says in one line what is wrong with one.
"""

import dataclasses
import re
import unicodedata
import zlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from gpdiff_jax.cities.distances import is_distance_matrix
from gpdiff_jax.cities.extremes import find_extreme
from gpdiff_jax.errors import InputError

KINDS = ("speed", "flow", "crowd", "stock")
AVERAGED = ("speed", "stock")  # of which a longer interval holds the mean; of the others the sum
MINUTES_PER_DAY = 1440
NAME_PATTERN = re.compile(r"[A-Za-z0-9_.:-]+")

_SPEED_UNITS = {"kmh": "km/h", "kph": "km/h", "mph": "mph", "ms": "m/s"}
# What `datetime.fromisoformat` can read back from a saved file.
_EARLIEST, _LATEST = (np.datetime64("0001-01-01T00:00", "m"), np.datetime64("9999-12-31T23:59", "m"))


@dataclasses.dataclass(frozen=True, eq=False)
class City:
    """One city: a multivariate series over a weighted graph of regions, and what is known about the regions.

    A missing reading is NaN, never zero. An edge runs from `senders[e]` to `receivers[e]` with weight `weights[e]`.

    Example:
      >>> import numpy as np, gpdiff_jax as gpd
      >>> pair = {"senders": np.array([0], np.int32), "receivers": np.array([1], np.int32)}
      >>> values = np.random.default_rng(0).poisson(9.0, (72, 2, 1)).astype(np.float32)
      >>> facts = {"name": "pair", "kind": "crowd", "feature_names": ("entries",), "node_ids": ("north", "south")}
      >>> clock = {"interval_minutes": 60, "start": np.datetime64("2024-05-01T00:00", "m")}
      >>> city = gpd.City(values=values, weights=np.ones(1, np.float32), **pair, **facts, **clock)
      >>> gpd.check_city(city).steps_per_day
      24
    """

    name: str  # stem of the file, letters, digits and _.:-
    kind: str  # of `KINDS`; flow and crowd are counts per interval, a stock is what is there, as parked cars
    values: np.ndarray  # float32 [T, N, C], NaN = missing
    senders: np.ndarray  # int32 [edges]
    receivers: np.ndarray  # int32 [edges]
    weights: np.ndarray  # float32 [edges], in (0, 1]
    interval_minutes: int
    start: np.datetime64 | None  # datetime64[m], local time of step 0; None = unknown
    feature_names: tuple[str, ...]  # [C]
    node_ids: tuple[str, ...]  # [N]
    latitude: np.ndarray | None = None  # float64 [N], degrees
    longitude: np.ndarray | None = None  # float64 [N], degrees
    poi: np.ndarray | None = None  # float32 [N, K]
    poi_names: tuple[str, ...] = ()  # [K]
    place: str = ""  # the name people use

    @property
    def num_steps(self) -> int:
        """Length T of the series."""
        return self.values.shape[0]

    @property
    def num_nodes(self) -> int:
        """Number N of regions."""
        return self.values.shape[1]

    @property
    def num_channels(self) -> int:
        """Number C of quantities read in every region."""
        return self.values.shape[2]

    @property
    def steps_per_day(self) -> int:
        """Number of readings from one midnight to the next."""
        return MINUTES_PER_DAY // self.interval_minutes

    @property
    def unit(self) -> str:
        """Unit of the readings, e.g. "km/h", "entries per 60 min" or, of a stock, "cars parked"."""
        if self.kind == "speed":
            units = [_speed_unit(name) or "speed units" for name in self.feature_names]
            return ", ".join(dict.fromkeys(units))
        # A file may name its channel "vehicles_per_5min"; after resampling only the first part still holds.
        quantities = [name.partition("_per_")[0].replace("_", " ") for name in self.feature_names]
        return ", ".join(quantities) + ("" if self.kind == "stock" else f" per {self.interval_minutes} min")

    def region_ids(self) -> UInt32[np.ndarray, " N"]:
        """Return uint32 ids of the regions, which depend on the names of the city and of the node alone."""
        return np.asarray([zlib.crc32(f"{self.name}/{node}".encode()) for node in self.node_ids], np.uint32)

    def adjacency(self) -> Float[np.ndarray, "N N"]:
        """Return the dense float32 weights, row = from, column = to, zero where there is no edge."""
        adjacency = np.zeros((self.num_nodes, self.num_nodes), np.float32)
        adjacency[self.senders, self.receivers] = self.weights
        return adjacency


def _speed_unit(channel: str) -> str | None:
    """The unit that the name of a channel of speeds ends with, as in "speed_kmh"; None where it ends otherwise."""
    return _SPEED_UNITS.get(channel.rpartition("_")[2].lower())


@dataclasses.dataclass(frozen=True)
class CityLabel:
    """By what the regions of a one-channel city are known, wherever something that was made for them is used."""

    name: str
    kind: str
    channel: str
    interval_minutes: int
    node_ids: tuple[str, ...]  # R, in order; of a source, those that are trained on

    @property
    def speed_unit(self) -> str | None:
        """Unit of speeds; None where it is not known, and of counts, whose interval says it."""
        return _speed_unit(self.channel) if self.kind == "speed" else None


def label_of(city: City, kept: Bool[np.ndarray, " N"] | None = None) -> CityLabel:
    """Return the label of a one-channel city, of all its regions or of those that are kept."""
    nodes = city.node_ids if kept is None else np.asarray(city.node_ids, object)[kept].tolist()
    # Names that were picked from an array are strings of NumPy, which messages would show as such.
    return CityLabel(city.name, city.kind, city.feature_names[0], city.interval_minutes, tuple(map(str, nodes)))


def edges_of(
    adjacency: Float[np.ndarray, "N N"],
) -> tuple[Int[np.ndarray, " edges"], Int[np.ndarray, " edges"], Float[np.ndarray, " edges"]]:
    """Return the edges of a dense adjacency, sorted by sender and then receiver.

    Args:
      adjacency: weights [N, N], row = from, column = to; zero where there is no edge.

    Returns:
      Senders and receivers, int32 [edges], and weights, float32 [edges].
    """
    senders, receivers = np.nonzero(adjacency)
    weights = adjacency[senders, receivers].astype(np.float32)
    return senders.astype(np.int32), receivers.astype(np.int32), weights


def check_city(city: City, *, judge_extremes: bool = True) -> City:
    """Return the city unchanged if every promise of its fields holds.

    Args:
      city: the city to check.
      judge_extremes: refuse a reading far beyond all that its region and its city read, as a fill value is; False
          where somebody has said that there are none.

    Returns:
      The same city.

    Raises:
      InputError: one line that names the first thing wrong, its value and what to do about it.

    Example:
      >>> import gpdiff_jax as gpd
      >>> city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=3), seed=0)[0]
      >>> gpd.check_city(city).num_nodes
      6
    """
    if NAME_PATTERN.fullmatch(city.name) is None:
        raise InputError(f"`name` (={city.name!r}) of a city must be letters A to Z, digits and _.:- only; rename it")
    try:
        _check_readings(city)
        _check_names(city)
        _check_clock(city)
        _check_values(city)
        if judge_extremes:
            _check_extremes(city)
        _check_edges(city)
        _check_static_facts(city)
    except InputError as error:
        raise InputError(f"city {city.name!r}: {error}") from None
    return city


def _check_array(name: str, array: np.ndarray | None, dtype: type, shape: tuple[int | None, ...], axes: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"`{name}` (of type {found}) must be a numpy array of {np.dtype(dtype)}; convert it")
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"`{name}` is a masked array, whose mask would be lost; give `{name}.filled(np.nan)`")
    fits = len(shape) == array.ndim and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"`{name}` (of shape {array.shape}) must have shape {axes} = [{sizes}]; reshape it")


def _check_readings(city: City) -> None:
    if city.kind not in KINDS:
        raise InputError(f"`kind` (={city.kind!r}) is unknown; choose one of {', '.join(KINDS)}")
    _check_array("values", city.values, np.float32, (None, None, None), "[T, N, C]")
    for axis, size in zip(("steps", "regions", "channels"), city.values.shape, strict=True):
        if size == 0:
            raise InputError(f"`values` (of shape {city.values.shape}) has no {axis}; give at least one")


def _check_names(city: City) -> None:
    for name, texts, size in (
        ("node_ids", city.node_ids, city.num_nodes),
        ("feature_names", city.feature_names, city.num_channels),
    ):
        _check_texts(name, texts, size)
    if not _is_clean(city.place):
        raise InputError(f"`place` (={city.place!r}) must be text without control characters; clean it")


def _check_values(city: City) -> None:
    """After names and clock, so that a message can name the region and the time."""
    values, counts = city.values, city.kind != "speed"
    for wrong, what, remedy in (
        (np.isinf(values), "is infinite", "mark a missing reading as NaN"),
        (values < 0, "is negative", "mark a missing reading as NaN"),
        (np.zeros(1, bool) if counts else values == 0, "is a speed of zero", "zero means missing there: store NaN"),
    ):
        if wrong.any():
            step, node, channel = (int(index) for index in np.argwhere(wrong)[0])
            reading = f"{city.feature_names[channel]!r} of region {city.node_ids[node]!r} at {_moment(city, step)}"
            raise InputError(f"`values` (={values[step, node, channel]}): {reading} {what}; {remedy}")
    silent = np.isnan(values).all(axis=0)
    if silent.all():
        raise InputError("`values` holds not one reading, every entry is NaN; give a city that was measured")
    if silent.any():
        node, channel = (int(index) for index in np.argwhere(silent)[0])
        raise InputError(
            f"region {city.node_ids[node]!r} has no reading of {city.feature_names[channel]!r} in the whole series"
            f" ({int(np.count_nonzero(silent))} such series); drop them from the city"
        )


def _check_extremes(city: City) -> None:
    for channel in range(city.num_channels):
        found = find_extreme(city.values[:, :, channel], speed=city.kind == "speed")
        if found is None:
            continue
        more = f"; {found.others} more like it" if found.others else ""
        where = (
            f"{city.feature_names[channel]!r} of region {city.node_ids[found.node]!r} at {_moment(city, found.step)}"
        )
        raise InputError(
            f"`values` (={found.value:.7g}): {where} is far beyond the region's usual {found.usual:.4g} (99th "
            f"percentile{more}); if that stands for a missing reading, store NaN, or say by `missing_above` "
            "(--missing_above) above which value readings are missing; what lies below that is then taken as it is"
        )


def _moment(city: City, step: int) -> str:
    """A step's local time, or its number where the calendar is unknown."""
    if city.start is None:
        return f"step {step}"
    return f"step {step} ({city.start + np.timedelta64(step * city.interval_minutes, 'm')})"


def _check_texts(name: str, texts: Any, size: int) -> None:
    if not isinstance(texts, tuple):
        raise InputError(f"`{name}` (of type {type(texts).__name__}) must be a tuple of names; convert it by tuple()")
    if len(texts) != size:
        raise InputError(f"`{name}` (={len(texts)} names) must be a tuple of {size} names; give one for each")
    seen = set()
    for text in texts:
        if not _is_clean(text) or not text:
            raise InputError(f"`{name}` holds {text!r}; a name must be non-empty text without control characters")
        if text in seen:
            raise InputError(f"`{name}` holds {text!r} twice; make the names unique")
        seen.add(text)


def _is_clean(text: str) -> bool:
    # Control characters and lone surrogates break CSV and UTF-8; numpy drops trailing NULs.
    return isinstance(text, str) and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)


def check_interval(interval_minutes: Any) -> None:
    """Raise `InputError` unless whole steps of this many minutes fill a day."""
    if isinstance(interval_minutes, bool) or not isinstance(interval_minutes, int):
        kind = type(interval_minutes).__name__
        raise InputError(f"`interval_minutes` (={interval_minutes}, of type {kind}) must be an int; convert it by int")
    if interval_minutes < 1:
        raise InputError(f"`interval_minutes` (={interval_minutes}) must be a whole number of at least 1; e.g. 60")
    if MINUTES_PER_DAY % interval_minutes:
        raise InputError(f"`interval_minutes` (={interval_minutes}) must divide 1440; choose e.g. 5, 10 or 60")


def _check_clock(city: City) -> None:
    check_interval(city.interval_minutes)
    if city.start is None:
        return
    if not isinstance(city.start, np.datetime64) or city.start.dtype != np.dtype("datetime64[m]"):
        raise InputError(f"`start` (={city.start!r}) must be None or a numpy datetime64[m]; convert it")
    if np.isnat(city.start) or not _EARLIEST <= city.start <= _LATEST:
        raise InputError(f"`start` (={city.start}) must lie in the years 1 to 9999; use None if it is unknown")
    minute = int(city.start.astype(np.int64)) % city.interval_minutes
    if minute:
        raise InputError(
            f"`start` (={city.start}) must be a whole number of {city.interval_minutes}-minute steps after midnight;"
            f" shift it by {minute} minutes"
        )


def _check_edges(city: City) -> None:
    _check_array("weights", city.weights, np.float32, (None,), "[edges]")
    for name, ends in (("senders", city.senders), ("receivers", city.receivers)):
        _check_array(name, ends, np.int32, (len(city.weights),), "[edges]")
        outside = (ends < 0) | (ends >= city.num_nodes)
        if outside.any():
            raise InputError(
                f"`{name}` holds {int(ends[outside][0])}, which is no region; use 0 to {city.num_nodes - 1}"
            )
    if city.num_nodes > 1 and len(city.weights) == 0:
        raise InputError(f"the adjacency of {city.num_nodes} regions is all zero; give at least one edge")
    for wrong, what, remedy in (
        (~np.isfinite(city.weights), "is not finite", "give every edge a number in (0, 1]"),
        (city.weights < 0, "is negative", "give every edge a weight in (0, 1]"),
        (city.weights == 0, "is zero", "leave the edge out"),
        (city.weights > 1, "is above 1", _remedy_above_one(city)),
        (city.senders == city.receivers, "is a self-loop", "set the diagonal of the adjacency to zero"),
    ):
        if wrong.any():
            edge = int(np.argmax(wrong))
            ends = f"{city.node_ids[city.senders[edge]]!r} to {city.node_ids[city.receivers[edge]]!r}"
            raise InputError(f"the weight (={city.weights[edge]}) of the edge from {ends} {what}; {remedy}")
    pairs = city.senders.astype(np.int64) * city.num_nodes + city.receivers
    unique, first = np.unique(pairs, return_index=True)
    if len(unique) < len(pairs):
        edge = int(np.setdiff1d(np.arange(len(pairs)), first)[0])
        ends = f"{city.node_ids[city.senders[edge]]!r} to {city.node_ids[city.receivers[edge]]!r}"
        raise InputError(f"the edge from {ends} is listed twice; keep one")


def _remedy_above_one(city: City) -> str:
    """What to do about weights above 1: distances must be turned over, not made smaller."""
    kernel = "exp(-(d / s)^2) of a distance d, with s the deviation of all distances, and none where that is below 0.1"
    if is_distance_matrix(city.adjacency()):
        return (
            "the weights look like distances (every pair of regions has one, and none is longer than a detour); give"
            f" weights that fall with the distance: {kernel}"
        )
    return (
        "give weights in (0, 1] that are larger for nearer regions: counts of trips divided by their maximum, or"
        f" {kernel}"
    )


def _check_static_facts(city: City) -> None:
    if (city.latitude is None) != (city.longitude is None):
        absent = "latitude" if city.latitude is None else "longitude"
        raise InputError(f"`{absent}` is missing beside the other coordinate; give both or neither")
    for name, degrees, limit in (("latitude", city.latitude, 90.0), ("longitude", city.longitude, 180.0)):
        if degrees is None:
            continue
        _check_array(name, degrees, np.float64, (city.num_nodes,), "[N]")
        wrong = ~(np.abs(degrees) <= limit)
        if wrong.any():
            node = int(np.argmax(wrong))
            raise InputError(
                f"`{name}` (={degrees[node]}) of region {city.node_ids[node]!r} must be degrees"
                f" in -{limit:g}..{limit:g}; correct it or leave both coordinates out"
            )
    if city.poi is None:
        if city.poi_names:
            raise InputError(f"`poi_names` (={len(city.poi_names)} names) needs `poi` beside it; give both or neither")
        return
    _check_array("poi", city.poi, np.float32, (city.num_nodes, None), "[N, K]")
    if city.poi.shape[1] == 0:
        raise InputError(f"`poi` (of shape {city.poi.shape}) has no columns; leave it out")
    _check_texts("poi_names", city.poi_names, city.poi.shape[1])
    if not np.isfinite(city.poi).all():
        node = int(np.argmax(~np.isfinite(city.poi).all(axis=1)))
        raise InputError(f"`poi` of region {city.node_ids[node]!r} is not finite; replace it by a number")
