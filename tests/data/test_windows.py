"""In: series with gaps. Out: the starts that a brute-force search finds, and windows apart from their own variant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpdiff_jax.cities import City
from gpdiff_jax.cities.calendar import is_weekend
from gpdiff_jax.cities.splits import Span, TargetSplit
from gpdiff_jax.data.series import build_bank
from gpdiff_jax.data.target_windows import gather_target, support_masks
from gpdiff_jax.data.windows import (
    choose_variants,
    draw_windows,
    gather_source,
    mix_windows,
    part_of,
    random_spans,
    start_table,
    window_starts,
)
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.anomaly import PROFILE


def _city(values: np.ndarray, *, name: str = "town", interval: int = 240) -> City:
    """Six steps a day."""
    nodes = values.shape[1]
    return City(
        name=name,
        kind="crowd",
        values=values.astype(np.float32)[:, :, None],
        senders=np.arange(nodes - 1, dtype=np.int32),
        receivers=np.arange(1, nodes, dtype=np.int32),
        weights=np.ones(nodes - 1, np.float32),
        interval_minutes=interval,
        start=np.datetime64("2024-01-01T00:00", "m"),
        feature_names=("visitors",),
        node_ids=tuple(f"r{k}" for k in range(nodes)),
    )


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_starts_of_a_span_are_those_of_a_brute_force_search(seen, begin, length, history, horizon, reach_back):
    values = np.where(np.array(seen), 1.0, np.nan)
    steps = len(values)
    span = Span(min(begin, steps), min(begin + length, steps))
    expected = [
        start
        for start in range(steps)
        if start + history + horizon <= span.stop
        and (start + history >= span.start if reach_back else start >= span.start)
        and np.isfinite(values[start + history : start + history + horizon]).any()
    ]
    starts = window_starts(_city(values), span, history=history, horizon=horizon, reach_back=reach_back)
    assert starts.dtype == np.int32
    np.testing.assert_array_equal(starts, expected)


@given(st.integers(10, 120), st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_random_spans_lie_in_the_training_span_in_order_and_cover_it(steps, length, count, seed):
    span = Span(3, steps)
    city = _city(np.ones((steps + 5, 2)))
    drawn = random_spans(city, span, [length] * count, key=jax.random.key(seed))
    assert len(drawn) == count and all(len(one) == min(length, len(span)) for one in drawn)
    starts = [one.start for one in drawn]
    assert starts == sorted(starts) and starts[0] >= 3 and drawn[-1].stop <= steps
    # One in each of `count` equal parts of the possible starts.
    possible = len(span) - min(length, len(span)) + 1
    for part, start in enumerate(starts):
        assert int(part / count * possible) <= start - 3 <= (part + 1) / count * possible


def test_random_spans_of_several_lengths_each_lie_where_one_of_its_length_may():
    city, span, lengths = _city(np.ones((100, 2))), Span(10, 90), [5, 80, 5, 200, 40]
    drawn = random_spans(city, span, lengths, key=jax.random.key(0))
    assert [len(one) for one in drawn] == [5, 80, 5, 80, 40]
    assert drawn[1] == drawn[3] == span and drawn[4].stop <= 90
    same = random_spans(city, span, [5] * 5, key=jax.random.key(0))
    assert (drawn[0], drawn[2]) == (same[0], same[2])


def test_random_spans_avoid_an_outage():
    values = np.ones((200, 2))
    values[80:140] = np.nan
    drawn = random_spans(_city(values), Span(0, 200), [12] * 40, key=jax.random.key(0))
    observed = [np.isfinite(values[one.start : one.stop]).mean() for one in drawn]
    assert min(observed) >= 0.5 * np.isfinite(values).mean()
    assert max(one.start for one in drawn) > 140 and min(one.start for one in drawn) < 60


_HISTORY, _HORIZON = 3, 2
_LENGTH = _HISTORY + _HORIZON
_STEPS = (60, 48)
_SPANS = ([Span(0, 12), Span(10, 22), Span(30, 42)], [Span(0, 12), Span(4, 16), Span(8, 20)])


@functools.cache
def _sources():
    """Readings that tell their step; five nodes, and three variants whose means tell them apart."""
    cities = [
        _city(np.arange(steps)[:, None] * 10.0 + np.arange(nodes), name=name)
        for steps, nodes, name in zip(_STEPS, (3, 2), "ab", strict=True)
    ]
    masks = [
        np.stack([(np.arange(c.num_steps) >= s.start) & (np.arange(c.num_steps) < s.stop) for s in spans])
        for c, spans in zip(cities, _SPANS, strict=True)
    ]
    bank = build_bank(cities, _SPANS, masks, covariates="profile", history=_HISTORY, horizon=_HORIZON)
    trains = [Span(0, c.num_steps - 9) for c in cities]
    starts = [window_starts(c, t, history=_HISTORY, horizon=_HORIZON) for c, t in zip(cities, trains, strict=True)]
    return cities, bank, start_table(cities, trains, starts, _SPANS), starts


def _holds(span: Span, start: int) -> bool:
    """Whether a variant was made from a step of a window, or from one of a day that the window forecasts."""
    days = {(start + _HISTORY + k) // 6 for k in range(_HORIZON)}
    return any(start <= step < start + _LENGTH or step // 6 in days for step in range(span.start, span.stop))


def _in_data_units(windows, bank, node: int, variant: int) -> np.ndarray:
    return np.asarray(windows.history[:, 0, :, 0]) * float(bank.std[variant, node]) + float(bank.mean[variant, node])


@pytest.mark.parametrize(("node", "city"), [(1, 0), (4, 1)])
def test_drawn_windows_begin_at_allowed_starts_of_their_own_city_and_share_no_day_with_their_variant(node, city):
    _, bank, table, starts = _sources()
    nodes = jnp.asarray([node, node], jnp.int32)
    windows = jax.jit(lambda key: draw_windows(bank, table, nodes, 400, key=key))(jax.random.key(0))
    explained = np.zeros(400, int)
    local = node - (0, 3)[city]
    for variant, span in enumerate(_SPANS[city]):
        raw = _in_data_units(windows, bank, node, variant)
        begin = (raw[:, 0] - local) / 10
        fits = (np.abs(begin - begin.round()) < 1e-3) & np.isin(begin.round(), starts[city])
        fits &= np.abs(np.diff(raw, axis=1) - 10).max(axis=1) < 1e-2
        shares = np.array([_holds(span, int(start)) for start in begin.round()])
        masked = np.asarray(windows.mask).sum(axis=1) == 0
        explained += fits & (shares == masked)
    assert (explained >= 1).all()
    assert (np.asarray(windows.mask).sum(axis=1) > 0).any()


def test_a_window_whose_days_every_variant_holds_is_masked_and_no_other():
    _, bank, table, _ = _sources()
    nodes = jnp.asarray([3, 4], jnp.int32)  # of the second city, whose variants crowd its first twenty steps
    starts = np.arange(0, _STEPS[1] - _LENGTH + 1).astype(np.int32)
    windows = jax.jit(lambda key: gather_source(bank, table, nodes, jnp.asarray(starts), key=key))(jax.random.key(1))
    held = [all(_holds(span, int(start)) for span in _SPANS[1]) for start in starts]
    np.testing.assert_array_equal(np.asarray(windows.mask).max(axis=1) == 0, held)
    assert any(held) and not all(held)


def test_a_given_variant_masks_the_windows_whose_days_it_holds():
    _, bank, table, _ = _sources()
    nodes = jnp.asarray([0, 1], jnp.int32)
    starts = np.arange(0, _STEPS[0] - _LENGTH + 1).astype(np.int32)
    gather = jax.jit(
        lambda variant: gather_source(bank, table, nodes, jnp.asarray(starts), key=jax.random.key(0), variant=variant)
    )
    for variant, span in enumerate(_SPANS[0]):
        windows = gather(jnp.int32(variant))
        shares = [_holds(span, int(start)) for start in starts]
        np.testing.assert_array_equal(np.asarray(windows.mask).max(axis=1) == 0, shares)
        np.testing.assert_allclose(_in_data_units(windows, bank, 0, variant)[:, 0], starts * 10.0, atol=1e-2)


def test_a_window_prefers_the_variants_that_lie_near_it():
    """The variants of the first city end at steps 12, 22 and 42, and its days have 6 steps."""
    cities, bank, _, starts = _sources()
    trains = [Span(0, c.num_steps - 9) for c in cities]
    table = start_table(cities, trains, starts, _SPANS, near_days=5.0)
    given = jnp.full(20_000, 44, jnp.int32)
    choose = jax.jit(lambda table: choose_variants(bank, table, jnp.int32(0), given, key=jax.random.key(0)))
    odds = np.exp(-(44 - np.array([12, 22, 42])) / (5 * 6))
    counts = np.bincount(np.asarray(choose(table).variants), minlength=3) / len(given)
    np.testing.assert_allclose(counts, odds / odds.sum(), atol=0.02)
    alike = start_table(cities, trains, starts, _SPANS)
    np.testing.assert_allclose(np.bincount(np.asarray(choose(alike).variants)) / len(given), 1 / 3, atol=0.02)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_table_are_stretches_of_every_citys_time_that_leave_out_no_start(parts):
    _, _, table, starts = _sources()
    for node, city in ((0, 0), (4, 1)):
        seen = []
        for index in range(parts):
            part = part_of(table, jnp.int32(index), parts)
            first, count = int(part.first[node]), int(part.count[node])
            assert abs(count - len(starts[city]) / parts) < 1
            seen.append(np.asarray(table.starts[first : first + count]))
        np.testing.assert_array_equal(np.concatenate(seen), starts[city])


def test_a_city_without_a_window_is_refused_by_name():
    cities, _, _, starts = _sources()
    with pytest.raises(InputError, match="city 'b' has no window with a reading to forecast"):
        start_table(cities, [Span(0, 51), Span(0, 39)], [starts[0], np.zeros(0, np.int32)], _SPANS)


def test_a_targets_test_windows_see_the_whole_support_and_its_own_windows_all_but_the_days_they_forecast():
    rng = np.random.default_rng(0)
    city = dataclasses.replace(_city(rng.gamma(2.0, 10.0, (60, 2))), start=None)  # all days are of one kind
    split = TargetSplit(Span(20, 32), Span(32, 38), Span(38, 60))
    masks = support_masks(city, split, 6)
    bank = build_bank([city], [[split.support] * len(masks)], [masks], covariates="profile", history=3, horizon=2)
    nodes = jnp.asarray([1, 0], jnp.int32)
    starts = np.arange(20, 56).astype(np.int32)
    windows = gather_target(bank, nodes, jnp.asarray(starts), 20, 6)
    mean, std = float(bank.mean[-1, 1]), float(bank.std[-1, 1])
    for row, start in enumerate(starts):
        days = sorted({0, 1, 2} - {(start + k - 20) // 6 for k in (3, 4)})
        for k in range(5):
            step = start + k
            at = [s for d in days for s in range(20 + 6 * d, 26 + 6 * d) if s % 6 == step % 6]
            expected = np.mean([(city.values[s, 1, 0] - mean) / std for s in at])
            np.testing.assert_allclose(windows.covariates[row, k, PROFILE], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("begin", "kind"), [("2024-01-01", 1.0), ("2024-01-06", 0.0), ("2024-01-03", -1.0)])
def test_windows_of_an_unseen_kind_of_day_are_real_readings_under_another_days_calendar(begin, kind):
    """Five weekdays and the weekend after; a weekend and five weekdays after; days of both kinds."""
    days = 5 if kind else 2
    rng = np.random.default_rng(0)
    city = dataclasses.replace(_city(rng.gamma(2.0, 10.0, (42, 2))), start=np.datetime64(begin, "m"))
    train, spans = Span(0, 6 * days), [[Span(0, 6), Span(6, 12)]]
    masks = np.stack([(np.arange(42) >= s.start) & (np.arange(42) < s.stop) for s in spans[0]])
    bank = build_bank([city], spans, [masks], covariates="calendar", history=_HISTORY, horizon=_HORIZON)
    starts = window_starts(city, train, history=_HISTORY, horizon=_HORIZON)
    table = start_table([city], [train], [starts], spans)
    nodes = jnp.asarray([1, 0], jnp.int32)
    np.testing.assert_array_equal(table.unseen, kind)
    windows = jax.jit(lambda key: draw_windows(bank, table, nodes, 200, key=key, unseen=True))(jax.random.key(0))
    mask = np.asarray(windows.mask)
    assert ((mask == mask[:, :1]) & np.isin(mask, (0, 1))).all()
    if kind == -1:
        assert not mask.any()
        return
    assert mask[:, 0].mean() > 0.5
    calendar, weekend = np.asarray(bank.calendar), np.asarray(is_weekend(city))
    for row in np.flatnonzero(mask[:, 0])[:50]:
        raw = [
            np.asarray(windows.history[row, 0, :, 0]) * float(bank.std[v, 1]) + float(bank.mean[v, 1]) for v in range(2)
        ]
        real = [
            s
            for s in starts
            for one in raw
            if np.allclose(one, city.values[s : s + _HISTORY, 1, 0], rtol=1e-3, atol=1e-2)
        ]
        shown = [
            s
            for s in range(42 - _LENGTH + 1)
            if np.allclose(windows.covariates[row], calendar[s : s + _LENGTH], atol=1e-6)
        ]
        assert real and len(shown) == 1
        assert weekend[shown[0] + _HISTORY] == kind and (shown[0] - real[0]) % 6 == 0


def test_mixed_windows_lie_between_two_and_count_where_both_were_observed():
    _, bank, table, _ = _sources()
    draw = functools.partial(draw_windows, bank, table, batch=5)
    nodes = [jnp.asarray([node], jnp.int32) for node in (0, 1)]
    one, other = (draw(nodes=own, key=jax.random.key(number)) for number, own in enumerate(nodes))
    other = dataclasses.replace(other, mask=other.mask.at[:, 0].set(0.0))
    share = jnp.asarray([1.0, 0.75, 0.5, 0.25, 0.0])
    mixed = mix_windows(one, other, share)
    for name in ("history", "covariates", "target"):
        first, second, between = (np.asarray(getattr(windows, name)) for windows in (one, other, mixed))
        for row, kept in enumerate(np.asarray(share)):
            np.testing.assert_allclose(between[row], kept * first[row] + (1 - kept) * second[row], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mixed.mask, one.mask * other.mask)
    assert not mixed.mask[:, 0].any() and mixed.mask[:, 1:].any()
