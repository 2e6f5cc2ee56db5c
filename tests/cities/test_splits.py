"""In: lengths of series. Out: the spans worked out by hand, and the refusal of series that are too short."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpdiff_jax.cities.splits import Span, split_source, split_target
from gpdiff_jax.errors import InputError

_WINDOW = {"history": 12, "horizon": 6}


def test_a_source_trains_on_its_first_four_fifths():
    split = split_source(100, **_WINDOW)
    assert (split.train, split.validation) == (Span(0, 80), Span(80, 100))
    assert (len(split.train), len(split.validation)) == (80, 20)


@pytest.mark.parametrize(
    ("days", "adaptation", "validation"),
    [
        # 14 days of hours: the test is the last round(0.3 * 336) = 101 steps.
        (3, Span(163, 211), Span(211, 235)),
        (1, Span(211, 211), Span(211, 235)),
        (2, Span(187, 211), Span(211, 235)),
        (5, Span(115, 211), Span(211, 235)),
        (6, Span(91, 187), Span(187, 235)),
        (9, Span(19, 163), Span(163, 235)),
    ],
)
def test_a_targets_support_lies_right_before_its_test_and_ends_with_the_validation_days(days, adaptation, validation):
    split = split_target(336, 24, days, **_WINDOW)
    assert split.test == Span(235, 336)
    assert (split.adaptation, split.validation) == (adaptation, validation)
    assert split.support == Span(adaptation.start, 235)


@given(st.integers(1, 3000), st.sampled_from([1, 4, 24, 48, 288]), st.integers(1, 40))
def test_the_spans_of_a_target_follow_one_another_whatever_its_length(steps, per_day, days):
    try:
        split = split_target(steps, per_day, days, **_WINDOW)
    except InputError:
        assume(False)
        raise
    assert 0 <= split.adaptation.start <= split.adaptation.stop == split.validation.start
    assert split.validation.stop == split.test.start and split.test.stop == steps
    assert len(split.support) == days * per_day and len(split.validation) == max(1, days // 3) * per_day
    assert len(split.test) == round(0.3 * steps) >= 6
    # Not even the first test window's history reaches behind the support days.
    assert split.test.start - 12 >= split.support.start


def test_the_shortest_source_holds_one_window_in_each_part():
    # 24 steps train, 6 validate, with a history that reaches back.
    assert split_source(30, **_WINDOW).validation == Span(24, 30)
    with pytest.raises(InputError, match=r"city 'x' has 27 steps, too few for history \(=12\) \+ horizon \(=6\)"):
        split_source(27, name="x", **_WINDOW)
    with pytest.raises(InputError, match="too few"):
        split_source(20, history=17, horizon=1)


@pytest.mark.parametrize(
    ("steps", "per_day", "days", "words"),
    [
        (336, 24, 0, "`support_days` must be at least 1, got 0"),
        (336, 24, 10, r"`support_days` \(=10\) is longer than the 9.8 days that city 'x' has .* use at most 9"),
        (16, 4, 3, "too few|longer than"),
        (336, 4, 2, r"`support_days` \(=2\) hold 8 steps .* history \(=12\)"),
        (18, 13, 1, "city 'x' has 18 steps, too few"),
    ],
)
def test_a_target_that_is_too_short_is_refused(steps, per_day, days, words):
    with pytest.raises(InputError, match=words):
        split_target(steps, per_day, days, name="x", **_WINDOW)
