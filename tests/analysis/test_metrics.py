"""In: small arrays with missing entries.
Out: that the masked errors agree with plain loops and with numbers worked out by hand.
"""

import math

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpdiff_jax.analysis import metrics
from gpdiff_jax.errors import InputError

_NAN = float("nan")


def _loop(forecast, truth, function):
    """The mean of function(forecast, truth) over observed entries, one by one."""
    values = [
        function(float(f), float(t)) for f, t in zip(forecast.ravel(), truth.ravel(), strict=True) if not math.isnan(t)
    ]
    return sum(values) / len(values) if values else _NAN


def _pair(seed=0, shape=(7, 5, 3), missing=0.3):
    rng = np.random.default_rng(seed)
    truth = rng.normal(20.0, 9.0, shape).astype(np.float32)
    truth[rng.random(shape) < missing] = np.nan
    return rng.normal(20.0, 9.0, shape).astype(np.float32), truth


@pytest.mark.parametrize("to", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_errors_by_hand(to):
    forecast = to(np.array([[1.0, 2.0, 7.0], [4.0, 9.0, 6.0]], np.float32))
    truth = to(np.array([[2.0, _NAN, 3.0], [4.0, _NAN, 0.0]], np.float32))
    # Residuals: -1, 4 in the first row; 0, 6 in the second; the middle column was not observed.
    np.testing.assert_allclose(metrics.mae(forecast, truth), 11 / 4)
    np.testing.assert_allclose(metrics.mae(forecast, truth, axis=0), [0.5, _NAN, 5.0])
    np.testing.assert_allclose(metrics.rmse(forecast, truth, axis=1), [np.sqrt(17 / 2), np.sqrt(18.0)], rtol=1e-6)
    # The zero of the truth has no relative error: 1/2, 4/3, 0.
    np.testing.assert_allclose(metrics.mape(forecast, truth), (1 / 2 + 4 / 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics.mape(forecast, truth, threshold=2.0), (4 / 3) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics.wape(forecast, truth), 11 / 9, rtol=1e-6)
    np.testing.assert_allclose(metrics.wape(forecast, truth, axis=0), [1 / 6, _NAN, 10 / 3], rtol=1e-6)


@pytest.mark.parametrize("to", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("metric", "term", "finish"),
    [
        (metrics.mae, lambda f, t: abs(f - t), lambda x: x),
        (metrics.rmse, lambda f, t: (f - t) ** 2, math.sqrt),
        (metrics.mape, lambda f, t: abs(f - t) / abs(t), lambda x: x),
    ],
    ids=["mae", "rmse", "mape"],
)
def test_errors_agree_with_a_loop_over_any_axes(to, metric, term, finish):
    forecast, truth = _pair()
    truth[:, 2, :] = np.nan
    everything = metric(to(forecast), to(truth))
    assert everything.dtype == np.float32 and everything.shape == ()
    np.testing.assert_allclose(everything, finish(_loop(forecast, truth, term)), rtol=1e-5)
    per_region = metric(to(forecast), to(truth), axis=(0, 2))
    expected = [finish(_loop(forecast[:, r], truth[:, r], term)) for r in range(5)]
    np.testing.assert_allclose(per_region, expected, rtol=1e-5)
    assert np.isnan(per_region[2])


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("to", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_crps_agrees_with_the_double_sum(to, fair):
    _, truth = _pair(shape=(6, 4))
    samples = np.random.default_rng(1).normal(20.0, 9.0, (5, 6, 4)).astype(np.float32)
    pairs = 5 * 4 if fair else 5 * 5

    def score(column, y):
        distance = sum(abs(float(x) - y) for x in column) / 5
        return distance - sum(abs(float(a) - float(b)) for a in column for b in column) / (2 * pairs)

    table = np.array([[score(samples[:, i, j], float(truth[i, j])) for j in range(4)] for i in range(6)])
    np.testing.assert_allclose(
        metrics.crps(to(samples), to(truth), axis=1, fair=fair), np.nanmean(table, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(metrics.crps(to(samples), to(truth), fair=fair), np.nanmean(table), rtol=1e-5)


def test_crps_by_hand():
    # Truth 2, samples 1 and 5: mean distance 2, mean of all four pair distances 2, so 2 - 1 = 1; fair: 2 - 2 = 0.
    samples, truth = np.array([[1.0], [5.0]], np.float32), np.array([2.0], np.float32)
    assert metrics.crps(samples, truth) == pytest.approx(1.0)
    assert metrics.crps(samples, truth, fair=True) == pytest.approx(0.0)
    assert metrics.crps(samples[:1], truth) == pytest.approx(1.0)
    assert np.isnan(metrics.crps(samples, np.array([_NAN], np.float32)))


def test_jit_and_vmap_equal_the_plain_call_under_strict_promotion():
    forecast, truth = (jnp.asarray(array) for array in _pair(shape=(4, 6)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for metric in (metrics.mae, metrics.rmse, metrics.mape, metrics.wape):
            plain = metric(forecast, truth, axis=1)
            np.testing.assert_allclose(
                jax.jit(lambda f, t, m=metric: m(f, t, axis=1))(forecast, truth), plain, rtol=1e-6
            )
            np.testing.assert_allclose(jax.vmap(metric)(forecast, truth), plain, rtol=1e-6)
        samples = jnp.stack([forecast, forecast + 1.0, forecast - 2.0])
        plain = metrics.crps(samples, truth, axis=1)
        np.testing.assert_allclose(jax.vmap(metrics.crps, in_axes=(1, 0))(samples, truth), plain, rtol=1e-6)


def test_gradient_is_finite_where_truth_is_missing():
    forecast, truth = (jnp.asarray(array) for array in _pair(shape=(4, 6)))
    for metric in (metrics.mae, metrics.rmse, metrics.mape, metrics.wape):
        gradient = np.asarray(jax.grad(lambda f, m=metric: m(f, truth))(forecast))
        assert np.isfinite(gradient).all()
        assert ((gradient != 0) == np.isfinite(np.asarray(truth))).all()


@hypothesis.given(
    hnp.arrays(np.float32, (5, 3), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.bool_, (5, 3)),
    st.floats(-50, 50, width=32),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_missing_entries_never_matter(truth, missing, filler):
    forecast = np.full_like(truth, 3.0)
    truth = np.where(missing, np.float32(_NAN), truth)
    other = np.where(missing, np.float32(filler), forecast)
    for metric in (metrics.mae, metrics.rmse, metrics.mape, metrics.wape):
        np.testing.assert_array_equal(metric(forecast, truth, axis=0), metric(other, truth, axis=0))
    assert np.isnan(metrics.mae(forecast, truth)) == missing.all()


def test_a_forecast_without_a_number_is_not_hidden():
    forecast, truth = np.array([1.0, _NAN], np.float32), np.array([2.0, 3.0], np.float32)
    assert np.isnan(metrics.mae(forecast, truth)) and np.isnan(metrics.rmse(forecast, truth))


def test_method_entry_by_hand():
    # Two windows, two regions, two steps. Saturday: the second window.
    truth = np.array([[[1.0, 2.0], [_NAN, 4.0]], [[5.0, _NAN], [7.0, _NAN]]], np.float32)
    forecast = np.array([[[2.0, 0.0], [9.0, 4.0]], [[5.0, 1.0], [3.0, 1.0]]], np.float32)
    weekend = np.array([[False, False], [True, True]])
    entry = metrics.method_entry(forecast, truth, is_weekend=weekend, seconds=1.5, learning_rate=1e-3, steps=40)
    # Step 1 has errors 1, 0, 4; step 2 has errors 2, 0 (both on the weekday).
    assert entry["mae"] == pytest.approx([5 / 3, 1.0])
    assert entry["mae_mean"] == pytest.approx((5 / 3 + 1) / 2)
    assert entry["rmse"] == pytest.approx([math.sqrt(17 / 3), math.sqrt(2)])
    assert entry["rmse_mean"] == pytest.approx((math.sqrt(17 / 3) + math.sqrt(2)) / 2)
    assert entry["mae_weekday"] == pytest.approx((1.0 + 1.0) / 2)
    # At the weekend only the first step was observed: its mean alone.
    assert entry["mae_weekend"] == pytest.approx(2.0)
    assert entry["rmse_weekend"] == pytest.approx(math.sqrt(8))
    assert (entry["seconds"], entry["learning_rate"], entry["steps"], entry["validation_mae"]) == (1.5, 1e-3, 40, None)


def test_method_entry_without_calendar_or_observations_is_null_never_nan():
    forecast, truth = _pair()
    entry = metrics.method_entry(forecast, truth, is_weekend=None, seconds=0.0)
    assert [entry[f"{m}_{d}"] for m in ("mae", "rmse") for d in ("weekday", "weekend")] == [None] * 4
    entry = metrics.method_entry(forecast, np.full_like(truth, _NAN), is_weekend=None, seconds=0.0)
    assert entry["mae"] == [None] * 3 and entry["mae_mean"] is None
    diverged = np.where(np.arange(3) == 1, np.float32(_NAN), forecast)
    entry = metrics.method_entry(diverged, truth, is_weekend=None, seconds=0.0)
    assert entry["mae"][1] is None and entry["mae_mean"] is None and entry["mae"][0] is not None


def test_region_rows_agree_with_a_loop():
    forecast, truth = _pair()
    truth[:, 1] = np.nan
    weekend = np.random.default_rng(2).random((7, 3)) < 0.4
    regions = [f"r{i}" for i in range(5)]
    rows = metrics.region_rows(
        forecast,
        truth,
        is_weekend=weekend,
        method="last_value",
        regions=regions,
        channel="a",
        notes=["", "s", "", "", ""],
    )
    assert [tuple(row) for row in rows] == [metrics.REGION_COLUMNS] * 5
    for r, row in enumerate(rows):
        assert (row["region"], row["channel"], row["method"]) == (f"r{r}", "a", "last_value")
        assert row["observations"] == np.isfinite(truth[:, r]).sum()
        for name, chosen in (("mae", weekend | True), ("mae_weekday", ~weekend), ("mae_weekend", weekend)):
            steps = [
                _loop(forecast[chosen[:, p], r, p], truth[chosen[:, p], r, p], lambda f, t: abs(f - t))
                for p in range(3)
            ]
            seen = [value for value in steps if not math.isnan(value)]
            assert row[name] == (pytest.approx(sum(seen) / len(seen), rel=1e-5) if seen else None)
    assert rows[1]["mae"] is None and rows[1]["note"] == "s"


def test_regions_of_a_complete_city_average_to_its_mae():
    forecast, truth = _pair(missing=0.0)
    rows = metrics.region_rows(forecast, truth, is_weekend=None, method="m", regions=list("abcde"))
    entry = metrics.method_entry(forecast, truth, is_weekend=None, seconds=0.0)
    assert np.mean([row["mae"] for row in rows]) == pytest.approx(entry["mae_mean"], rel=1e-6)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    # The library's own words are what a user sees, who runs without the tests' checks of annotations.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    forecast, truth = _pair()
    with pytest.raises(InputError, match=r"`forecast` \(7, 5, 3\) and `truth` \(7, 5\)"):
        metrics.mae(forecast, truth[..., 0])
    with pytest.raises(InputError, match="samples' axis"):
        metrics.crps(forecast, truth)
    with pytest.raises(InputError, match="fair score needs 2"):
        metrics.crps(forecast[:1], truth[0], fair=True)
    with pytest.raises(InputError, match="is_weekend"):
        metrics.method_entry(forecast, truth, is_weekend=np.zeros((7, 5), bool), seconds=0.0)
    with pytest.raises(InputError, match="4 `regions`"):
        metrics.region_rows(forecast, truth, is_weekend=None, method="m", regions=list("abcd"))
