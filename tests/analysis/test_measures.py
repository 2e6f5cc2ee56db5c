"""In: prompts and patches small enough to work out by hand. Out: the measures that a loop or a pencil gives."""

import jax
import numpy as np
import pytest

from gpdiff_jax.analysis.measures import (
    disjoint_windows,
    hidden_error,
    hide_patches,
    interpolate_visible,
    join_parts,
    profile_of_visible,
    recall_at,
)
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.temporal.patches import Patches, cut_patches


def test_recall_by_hand():
    first = np.array([[0.0], [1.0], [5.0]], np.float32)
    second = np.array([[0.1], [4.0], [5.1]], np.float32)
    # Seen from the first window regions 0 and 2 find themselves, region 1 comes second; from the second likewise, but
    # region 1 of the second (at 4) is nearer to region 2 (at 5) than to its own (at 1).
    assert recall_at(first, second, (1, 2)) == {1: pytest.approx(4 / 6), 2: 1.0}
    same = np.zeros((4, 2), np.float32)
    assert recall_at(same, same, (1,))[1] == 0.0  # all alike: nobody is found


def test_parts_weigh_alike_whatever_their_width():
    rng = np.random.default_rng(0)
    joined = join_parts([rng.normal(size=(500, 2)), 100 * rng.normal(size=(500, 30))])
    assert np.square(joined[:, :2]).sum() == pytest.approx(np.square(joined[:, 2:]).sum(), rel=0.02)
    np.testing.assert_allclose(join_parts([np.ones((3, 2))]), 0)


def test_windows_are_disjoint_and_inside(simulated_cities):
    city = simulated_cities[0]
    pairs = disjoint_windows(city, Span(10, 300), 3, 20, key=jax.random.key(0))
    for first, second in pairs:
        assert len(first) == len(second) == 72
        assert first.start >= 10 and first.stop <= second.start and second.stop <= 300
    assert len({first.start for first, _ in pairs}) > 5
    with pytest.raises(InputError, match="holds no two windows of 7 days"):
        disjoint_windows(city, Span(0, 300), 7, 1, key=jax.random.key(0))


def _patches(bins: list[list[list[float]]], share: np.ndarray | None = None) -> Patches:
    values = np.asarray(bins, np.float32)
    shown = np.ones_like(values) if share is None else share.astype(np.float32)
    count = values.shape[1]
    return Patches(values, shown, np.zeros((count, 20), np.float32), np.arange(count, dtype=np.float32) / 2, 1.0)


def test_interpolation_and_profile_by_hand():
    # Two patches of two bins are a day; three days, of which the first patch of day 0 and the second of day 2 are seen.
    patches = _patches([[[1, 2], [9, 9], [9, 9], [9, 9], [9, 9], [11, 12]]])
    visible = np.array([[True, False, False, False, False, True]])
    line = np.interp(np.arange(12), [0, 1, 10, 11], [1, 2, 11, 12])
    np.testing.assert_allclose(interpolate_visible(patches, visible)[0].reshape(-1), line, rtol=1e-6)
    day = [1, 2, 11, 12]
    np.testing.assert_allclose(profile_of_visible(patches, visible, 2)[0].reshape(-1), day * 3, rtol=1e-6)
    both = np.array([[True, False, True, False, False, False]])
    made = profile_of_visible(patches, both, 2)[0].reshape(3, 4)
    np.testing.assert_allclose(made[:, :2], [[5, 5.5]] * 3, rtol=1e-6)


def test_errors_count_hidden_observed_bins_alone():
    share = np.ones((1, 3, 2))
    share[0, 1, 1] = 0
    patches = _patches([[[0, 2], [4, 99], [0, 2]]], share)
    visible = np.array([[True, False, False]])
    made = np.asarray([[[7, 7], [5, -50], [0, 4]]], np.float32)
    deviation = np.std([0, 2, 4, 0, 2])
    absolute, squared = hidden_error(made, patches, visible)
    assert absolute == pytest.approx(np.mean([1, 0, 2]) / deviation, rel=1e-5)
    assert squared == pytest.approx(np.sqrt(np.mean([1, 0, 4])) / deviation, rel=1e-5)


def test_a_quarter_of_what_is_observed_is_shown(simulated_cities):
    patches = cut_patches(simulated_cities[0], Span(5, 125), 120, 4)
    visible = hide_patches(patches, 0.75, key=jax.random.key(0))
    assert not (visible & ~patches.observed).any()
    np.testing.assert_array_equal(visible.sum(axis=1), np.maximum(1, np.round(0.25 * patches.observed.sum(axis=1))))
