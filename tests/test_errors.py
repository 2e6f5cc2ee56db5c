"""In: what a file fills with words without end. Out: a message that is one line, and not a long one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.errors import InputError, check_types, named


def test_a_message_is_a_line_that_is_cut_where_it_is_long():
    assert str(InputError("`a` is\n5\n\nnot 6")) == "`a` is 5  not 6"
    word = str(InputError(f"city {'x' * 5000!r} is none"))
    assert word.endswith("' (5002 characters) is none") and len(word) < 150
    # Also where no word is long.
    whole = f"leaf {'x/' * 3000} is none; make it again"
    path = str(InputError(whole))
    assert path.startswith("leaf x/x/") and len(path) < 1500
    assert path.endswith(f"x/ is none; make it again ({len(whole)} characters)")


@dataclasses.dataclass
class _Config:
    days: int = 3
    rate: float = 0.1
    most: int | None = None
    part: float | None = None
    name: str = "x"
    pair: tuple[int, int] = (1, 2)
    rates: tuple[float, ...] = (0.1, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"days": 3.5}, r"`days` \(=3\.5, of type float\) must be an int"),
        ({"days": "3"}, r"`days` \(='3', of type str\) must be an int"),
        ({"days": np.float32(3)}, r"`days` \(=3\.0, of type float\) must be an int"),
        ({"days": np.arange(2)}, r"`days` \(=array\(\[0, 1\]\), of type ndarray\) must be an int"),
        ({"days": True}, r"`days` \(=True, of type bool\) must be an int"),
        ({"days": None}, r"`days` \(=None, of type NoneType\) must be an int"),
        ({"rate": "fast"}, r"`rate` \(='fast', of type str\) must be a number"),
        ({"rate": None}, r"`rate` \(=None, of type NoneType\) must be a number"),
        ({"most": 2.0}, r"`most` \(=2\.0, of type float\) must be an int"),
        ({"part": "half"}, r"`part` \(='half', of type str\) must be a number"),
    ],
)
def test_numbers_of_another_type_are_named(changes, words):
    with pytest.raises(InputError, match=rf"^{words}; convert it$"):
        named(_Config(**changes), "days")


@pytest.mark.parametrize("rates", [0.1, "0.1", ("a",), (True,), None, np.zeros((2, 2)), (np.zeros(2),)])
def test_what_is_not_several_numbers_is_named(rates):
    with pytest.raises(InputError, match=r"^`rates` \(=.*\) must be several numbers, as \(0\.1,\) or \(0\.03, 0\.1\)$"):
        named(_Config(rates=rates), "days")


@pytest.mark.parametrize("rates", [(1, 0.5), [1, 0.5], np.asarray([1, 0.5]), (np.int64(1), jnp.float32(0.5))])
def test_several_numbers_become_pythons_own(rates):
    made = _Config(rates=rates)
    assert named(made, "rates") == {"rates": (1.0, 0.5)} and all(type(one) is float for one in made.rates)


def test_numbers_of_their_type_pass():
    for changes in ({}, {"rate": 1}, {"most": 5}, {"part": 1}, {"part": np.float64(0.5)}, {"pair": "other"}):
        check_types(_Config(**changes))
    made = _Config(days=np.int64(3), rate=np.float32(0.5), most=jnp.int32(4), part=jnp.float32(0.25))
    check_types(made)
    assert (
        json.dumps(named(made, "days", "rate", "most", "part")) == '{"days": 3, "rate": 0.5, "most": 4, "part": 0.25}'
    )
    assert named(_Config(), "rate", "most") == {"rate": 0.1, "most": None}
    assert named(_Config()) == dataclasses.asdict(_Config())
