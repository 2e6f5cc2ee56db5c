"""In: cities with one broken promise each. Out: the line that `check_city` owes the user."""

import dataclasses

import numpy as np
import pytest

from gpdiff_jax.cities import City, check_city
from gpdiff_jax.cities.city import edges_of
from gpdiff_jax.errors import InputError


def _city(**changes) -> City:
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    values[0, 0, 0] = np.nan
    city = City(
        name="town",
        kind="crowd",
        values=values,
        senders=np.array([0, 1, 2], np.int32),
        receivers=np.array([1, 0, 1], np.int32),
        weights=np.array([1.0, 0.5, 0.25], np.float32),
        interval_minutes=10,
        start=np.datetime64("2024-01-01T08:10", "m"),
        feature_names=("entries", "exits_per_10min"),
        node_ids=("a", "b", "c"),
        latitude=np.array([1.0, 2.0, 3.0]),
        longitude=np.array([-180.0, 0.0, 180.0]),
        poi=np.ones((3, 2), np.float32),
        poi_names=("shops", "schools"),
        place="Town",
    )
    return dataclasses.replace(city, **changes)


def _values(reading: float, *where) -> np.ndarray:
    values = np.ones((4, 3, 2), np.float32)
    values[where] = reading
    return values


def _weights(first: float) -> np.ndarray:
    return np.array([first, 0.5, 0.25], np.float32)


def _integers(*items: int) -> np.ndarray:
    return np.array(items, np.int32)


def test_a_good_city_passes_unchanged_and_describes_itself():
    city = _city()
    assert check_city(city) is city
    assert (city.num_steps, city.num_nodes, city.num_channels, city.steps_per_day) == (4, 3, 2, 144)
    assert city.unit == "entries, exits per 10 min"
    np.testing.assert_array_equal(city.adjacency(), [[0, 1, 0], [0.5, 0, 0], [0, 0.25, 0]])


def test_optional_facts_may_be_absent():
    city = _city(start=None, latitude=None, longitude=None, poi=None, poi_names=(), place="")
    assert check_city(city) is city


@pytest.mark.parametrize(
    ("names", "unit"),
    [(("speed_kmh",), "km/h"), (("speed_mph",), "mph"), (("speed",), "speed units"), (("v_kmh", "w_kmh"), "km/h")],
)
def test_a_speed_has_the_unit_that_its_channel_names(names, unit):
    city = _city(kind="speed", values=np.ones((4, 3, len(names)), np.float32), feature_names=names)
    assert check_city(city).unit == unit


def test_one_region_needs_no_edge():
    nothing = np.zeros(0, np.int32)
    city = _city(
        values=np.ones((4, 1, 2), np.float32),
        senders=nothing,
        receivers=nothing,
        weights=nothing.astype(np.float32),
        node_ids=("a",),
        latitude=None,
        longitude=None,
        poi=None,
        poi_names=(),
    )
    assert check_city(city).adjacency().shape == (1, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "my town"}, ["`name`", "my town", "rename"]),
        ({"kind": "noise"}, ["`kind`", "noise", "speed, flow, crowd"]),
        ({"values": np.ones((4, 3, 2))}, ["`values`", "float64", "float32"]),
        ({"values": np.ones((4, 3), np.float32)}, ["`values`", "(4, 3)", "[T, N, C]"]),
        ({"values": np.ones((0, 3, 2), np.float32)}, ["`values`", "no steps"]),
        ({"values": np.ones((4, 0, 2), np.float32)}, ["`values`", "no regions"]),
        ({"values": np.ones((4, 3, 0), np.float32)}, ["`values`", "no channels"]),
        ({"values": _values(np.inf, 1, 2, 0)}, ["inf", "'c'", "'entries'", "step 1", "NaN"]),
        ({"values": _values(-3, 1, 2, 0)}, ["-3", "'c'", "negative", "NaN"]),
        ({"kind": "speed", "values": _values(0, 1, 2, 0)}, ["'c'", "speed of zero", "NaN"]),
        ({"values": _values(np.nan)}, ["not one reading"]),
        ({"values": _values(np.nan, slice(None), 1, 0)}, ["'b'", "'entries'", "(1 such", "drop"]),
        ({"node_ids": ("a", "b")}, ["`node_ids`", "2 names", "3 names"]),
        ({"node_ids": ("a", "b", "a")}, ["`node_ids`", "'a' twice"]),
        ({"node_ids": ("a", "", "c")}, ["`node_ids`", "non-empty"]),
        ({"node_ids": ("a", "b\n", "c")}, ["`node_ids`", "control"]),
        ({"feature_names": ("x", "x")}, ["`feature_names`", "'x' twice"]),
        ({"place": "a\x00b"}, ["`place`", "control"]),
        ({"interval_minutes": 0}, ["`interval_minutes` (=0)", "at least 1"]),
        ({"interval_minutes": -5}, ["`interval_minutes` (=-5)", "at least 1"]),
        ({"interval_minutes": 7}, ["`interval_minutes` (=7)", "divide 1440", "60"]),
        ({"start": np.datetime64("NaT", "m")}, ["`start`", "NaT"]),
        ({"start": np.datetime64("2024-01-01", "D")}, ["`start`", "datetime64[m]"]),
        ({"start": np.datetime64("12024-01-01T00:00", "m")}, ["`start`", "9999"]),
        ({"start": np.datetime64("2024-01-01T08:13", "m")}, ["`start`", "08:13", "shift it by 3 minutes"]),
        ({"senders": np.array([0, 1, 2])}, ["`senders`", "int64", "int32"]),
        ({"senders": _integers(0, 1)}, ["`senders`", "(2,)", "[3]"]),
        ({"senders": _integers(0, 1, 3)}, ["`senders`", "3", "0 to 2"]),
        ({"receivers": _integers(-1, 0, 1)}, ["`receivers`", "-1"]),
        ({"receivers": _integers(0, 0, 1)}, ["'a' to 'a'", "self-loop", "diagonal"]),
        ({"senders": _integers(0, 0, 2), "receivers": _integers(1, 1, 1)}, ["'a' to 'b'", "twice"]),
        ({"weights": _weights(-0.5)}, ["-0.5", "'a' to 'b'", "negative"]),
        ({"weights": _weights(np.nan)}, ["nan", "not finite"]),
        ({"weights": _weights(np.inf)}, ["inf", "not finite"]),
        ({"weights": _weights(0)}, ["zero", "leave the edge out"]),
        ({"weights": _weights(2)}, ["2.0", "above 1", "larger for nearer regions", "divided by their maximum"]),
        (
            {"senders": _integers(), "receivers": _integers(), "weights": np.zeros(0, np.float32)},
            ["adjacency of 3 regions", "all zero"],
        ),
        ({"latitude": None}, ["`latitude` is missing", "both or neither"]),
        ({"longitude": None}, ["`longitude` is missing", "both or neither"]),
        ({"latitude": np.array([0.0, 91.0, 0.0])}, ["`latitude` (=91.0)", "'b'", "-90..90"]),
        ({"longitude": np.array([0.0, 0.0, np.nan])}, ["`longitude` (=nan)", "'c'", "-180..180"]),
        ({"latitude": np.zeros(2)}, ["`latitude`", "(2,)", "[3]"]),
        ({"poi": np.ones((2, 2), np.float32)}, ["`poi`", "(2, 2)"]),
        ({"poi": np.ones((3, 0), np.float32)}, ["`poi`", "no columns"]),
        ({"poi": np.full((3, 2), np.nan, np.float32)}, ["`poi`", "'a'", "not finite"]),
        ({"poi_names": ("shops",)}, ["`poi_names`", "1 names", "2 names"]),
        ({"poi": None}, ["`poi_names`", "both or neither"]),
    ],
)
def test_a_broken_promise_is_one_line_with_name_value_and_remedy(changes, words):
    with pytest.raises(InputError) as caught:
        check_city(_city(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_edges_list_the_adjacency_row_by_row():
    senders, receivers, weights = edges_of(np.array([[0.0, 0.5], [1.0, 0.0]], np.float32))
    np.testing.assert_array_equal(senders, [0, 1])
    np.testing.assert_array_equal(receivers, [1, 0])
    np.testing.assert_array_equal(weights, np.array([0.5, 1.0], np.float32))
    assert (senders.dtype, receivers.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "values",
            np.ma.masked_greater(np.ones((48, 3, 1), np.float32), 0.5),
            r"`values` is a masked array, whose mask would be lost; give `values.filled\(np.nan\)`",
        ),
        ("interval_minutes", np.int64(60), r"`interval_minutes` \(=60, of type int64\) must be an int; convert it"),
        ("node_ids", ["a", "b", "c"], r"`node_ids` \(of type list\) must be a tuple of names; convert it by tuple"),
    ],
)
def test_a_value_of_another_type_is_named_by_its_type(field, value, words):
    city = _city()
    object.__setattr__(city, field, value)  # past the checks of types that only the tests have
    with pytest.raises(InputError, match=words):
        check_city(city)
