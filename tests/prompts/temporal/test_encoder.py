"""In: simulated cities. Out: patches that agree with a loop over minutes; an encoder that sees only what it may see."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.analysis.measures import profile_of_visible
from gpdiff_jax.cities import City, SimulationConfig, resample, simulate_cities
from gpdiff_jax.cities.calendar import minutes_of_week
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.temporal.autoencoder import (
    MaskedAutoencoder,
    TemporalConfig,
    VisiblePatches,
    daily_profile,
    time_encodings,
)
from gpdiff_jax.prompts.temporal.encoder import TemporalEncoder, encode, pretrain_encoder, reconstruct
from gpdiff_jax.prompts.temporal.patch_bank import build_patch_bank, draw_masked_windows, draw_pairs
from gpdiff_jax.prompts.temporal.patches import Patches, cut_patches
from gpdiff_jax.training.storage import load_arrays, save_arrays

_TINY = TemporalConfig(
    width=16, heads=2, encoder_layers=1, train_days=4, steps=120, batch=32, evaluations=4, contrast_pairs=6
)
_STILL = dataclasses.replace(_TINY, shifted_share=0.0)
_SPAN = Span(30, 30 + 72)


def _with_values(city: City, values: np.ndarray) -> City:
    return dataclasses.replace(city, values=values)


@pytest.fixture(scope="module", name="city")
def _city(simulated_cities: list[City]) -> City:
    city = simulated_cities[0]
    values = np.array(city.values)
    values[np.random.default_rng(0).random(values.shape) < 0.15] = np.nan
    return _with_values(city, values)


@pytest.fixture(scope="module", name="fine")
def _fine() -> City:
    config = SimulationConfig(cities=1, regions=4, days=5, interval_minutes=10, missing_rate=0.0, closing_share=0.0)
    return simulate_cities(config, seed=1)[0]


@pytest.fixture(scope="module", name="trained")
def _trained(simulated_cities: list[City]) -> tuple[TemporalEncoder, list[dict[str, float]]]:
    lines: list[dict[str, float]] = []
    spans = [Span(0, 240), Span(10, 250)]
    encoder = pretrain_encoder(
        simulated_cities[1:], spans, _TINY, key=jax.random.key(0), progress=lambda _, metrics: lines.append(metrics)
    )
    return encoder, lines


def _window(patches: Patches, visible: np.ndarray) -> VisiblePatches:
    regions = len(patches.bins)
    times = jnp.broadcast_to(
        time_encodings(jnp.asarray(patches.clock), jnp.asarray(patches.days))[None], (regions, len(patches.days), 30)
    )
    present = jnp.asarray(visible & patches.observed, jnp.float32)
    return VisiblePatches(jnp.asarray(patches.bins), jnp.asarray(patches.share), times, present)


_draw_windows = jax.jit(draw_masked_windows, static_argnums=(1, 2))
_draw_pairs = jax.jit(draw_pairs, static_argnums=1)


@jax.jit
def _embed(variables: dict, window: VisiblePatches) -> jax.Array:
    return MaskedAutoencoder(_TINY).apply({"params": variables}, window, method="encode")[1]


@pytest.mark.parametrize(("interval", "bins"), [(10, 4), (20, 4), (60, 4), (60, 2), (120, 3)])
def test_patches_agree_with_a_loop_over_minutes(fine, interval, bins):
    city = resample(fine, interval)
    values = np.array(city.values)
    values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
    city, span = _with_values(city, values), Span(3, 3 + 2 * city.steps_per_day)
    patches = cut_patches(city, span, 120, bins)
    assert city.start is not None
    midnight = city.start.astype("datetime64[D]").astype("datetime64[m]")
    first = int((city.start - midnight).astype(int)) + span.start * interval
    begin = first // 120 * 120
    for region in range(city.num_nodes):
        minutes = np.full(len(patches.days) * 120, np.nan)
        for step in range(span.start, span.stop):
            at = first - begin + (step - span.start) * interval
            minutes[at : at + interval] = values[step, region, 0]
        for place, part in enumerate(minutes.reshape(-1, 120 // bins)):
            where = region, place // bins, place % bins
            seen = np.isfinite(part)
            assert patches.share[where] == pytest.approx(seen.mean(), abs=1e-6)
            expected = part[seen].mean() / patches.unit if seen.any() else 0.0
            assert patches.bins[where] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert patches.bins.dtype == patches.share.dtype == patches.clock.dtype == np.float32
    np.testing.assert_allclose(np.diff(patches.days), 120 / 1440, rtol=1e-4)
    hour = (begin // 60 + 2 * np.arange(len(patches.days))) % 24
    np.testing.assert_allclose(patches.clock[:, 0], np.sin(2 * np.pi * hour / 24), atol=1e-5)


def test_a_day_at_ten_minutes_is_the_same_day_at_sixty(fine, trained):
    hourly = resample(fine, 60)
    spans = Span(0, 3 * 144), Span(0, 3 * 24)
    for bins, group in ((2, 1), (4, 2)):  # bins of half an hour agree hour by hour
        first, second = (cut_patches(city, span, 120, bins) for city, span in zip((fine, hourly), spans, strict=True))
        hours = [patches.bins.reshape(4, -1, group).mean(axis=2) * patches.unit for patches in (first, second)]
        np.testing.assert_allclose(6 * hours[0], hours[1], rtol=1e-5)
        np.testing.assert_array_equal(first.share, second.share)
        np.testing.assert_array_equal(first.clock, second.clock)
    config = dataclasses.replace(_TINY, bins=2)
    example = _window(first._replace(bins=first.bins[..., :2], share=first.share[..., :2]), first.observed)
    variables = jax.jit(MaskedAutoencoder(config).init)(jax.random.key(0), example, example.times)["params"]
    embedded = [encode(TemporalEncoder(variables, config), *pair) for pair in zip((fine, hourly), spans, strict=True)]
    np.testing.assert_allclose(*embedded, atol=1e-4)


def test_order_and_padding_change_nothing(city, trained):
    patches = cut_patches(city, _SPAN, 120, 4)
    window = _window(patches, patches.observed)
    plain = _embed(trained[0].variables, window)
    rng = np.random.default_rng(2)
    order = rng.permutation(window.bins.shape[1])

    def padded(part: jax.Array) -> jax.Array:
        rubbish = jnp.asarray(rng.normal(size=(part.shape[0], 5, *part.shape[2:])), jnp.float32)
        return jnp.concatenate([part[:, order], rubbish], axis=1)

    absent = jnp.zeros((8, 5), jnp.float32)
    other = VisiblePatches(
        padded(window.bins),
        jnp.abs(padded(window.share)),
        padded(window.times),
        jnp.concatenate([window.present[:, order], absent], axis=1),
    )
    np.testing.assert_allclose(_embed(trained[0].variables, other), plain, atol=1e-5)
    assert np.asarray(plain).std(axis=0).max() > 0.05  # regions differ


def test_the_daily_profile_agrees_with_interpolation_around_the_clock(city):
    patches = cut_patches(city, _SPAN, 120, 4)
    visible = np.random.default_rng(5).random(patches.observed.shape) < 0.25
    first_hour = int(minutes_of_week(city)[_SPAN.start]) // 120 % 12
    hour = np.eye(12, dtype=np.float32)[(first_hour + np.arange(len(patches.days))) % 12]
    weight = jnp.asarray(patches.share * visible[..., None])
    hours = jnp.broadcast_to(jnp.asarray(hour)[None], (8, *hour.shape))
    day, gap = jax.jit(daily_profile)(jnp.asarray(patches.bins), weight, hours)
    expected = profile_of_visible(patches, visible, 12)
    np.testing.assert_allclose(np.einsum("qp,npk->nqk", hour, day), expected, rtol=1e-4, atol=1e-5)
    assert (np.asarray(gap)[np.einsum("qp,nqk->npk", hour, weight) > 0] == 0).all()
    assert np.asarray(gap).min() == 0 and 1 / 48 < np.asarray(gap).max() <= 1


def test_only_visible_readings_reach_a_reconstruction(city, trained):
    patches = cut_patches(city, _SPAN, 120, 4)
    visible = np.random.default_rng(3).random(patches.observed.shape) < 0.25
    window = _window(patches, visible)
    module = MaskedAutoencoder(_TINY)

    def total(bins: jax.Array) -> jax.Array:
        made = module.apply({"params": trained[0].variables}, dataclasses.replace(window, bins=bins), window.times)
        return jnp.square(made).sum()  # pyright: ignore

    gradient = np.asarray(jax.jit(jax.grad(total))(window.bins))
    assert np.isfinite(gradient).all()
    assert (gradient[~visible] == 0).all()
    assert (np.abs(gradient[visible & (patches.share.min(axis=2) > 0)]).max(axis=1) > 0).all()
    hidden = patches._replace(bins=np.where(visible[..., None], patches.bins, np.float32(7)))
    np.testing.assert_array_equal(reconstruct(trained[0], hidden, visible), reconstruct(trained[0], patches, visible))


def test_the_value_of_a_missing_bin_does_not_matter(city, trained):
    patches = cut_patches(city, _SPAN, 120, 4)
    assert (patches.share == 0).any() and (patches.share[patches.observed] == 0).any()
    other = patches._replace(bins=np.where(patches.share > 0, patches.bins, np.float32(50)))
    first, second = (_embed(trained[0].variables, _window(p, p.observed)) for p in (patches, other))
    np.testing.assert_array_equal(first, second)


def test_units_do_not_show(city, trained):
    first = encode(trained[0], city, _SPAN)
    second = encode(trained[0], _with_values(city, city.values * np.float32(1000)), _SPAN)
    assert first.shape == (8, 16) and first.dtype == np.float32
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_what_lies_outside_a_span_is_not_read(simulated_cities, city, trained):
    values = np.array(city.values)
    values[: _SPAN.start] = 1e4
    values[_SPAN.stop :] = np.nan
    other = _with_values(city, values)
    np.testing.assert_array_equal(encode(trained[0], city, _SPAN), encode(trained[0], other, _SPAN))
    banks = [
        build_patch_bank([simulated_cities[1], c], [Span(0, 240), _SPAN], _TINY, key=jax.random.key(0))
        for c in (city, other)
    ]
    chex.assert_trees_all_equal(*banks)


def test_a_silent_region_takes_its_neighbours_embedding(city, trained):
    values = np.array(city.values)
    values[_SPAN.start : _SPAN.stop, 2] = np.nan
    table = encode(trained[0], _with_values(city, values), _SPAN)
    linked = [k for k in range(8) if (city.adjacency() + city.adjacency().T)[2, k] > 0]
    np.testing.assert_allclose(table[2], table[linked].mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("days", [1, 14])
def test_any_length_from_a_day_to_two_weeks_is_read(city, trained, days):
    assert np.isfinite(encode(trained[0], city, Span(0, 24 * days))).all()


def test_an_unknown_start_leaves_the_day_of_the_week_out(city, trained):
    known, unknown = (
        cut_patches(dataclasses.replace(city, start=start), Span(0, 48), 120, 4) for start in (city.start, None)
    )
    np.testing.assert_array_equal(unknown.clock[:, 16:], 0)
    assert (known.clock[:, 16:] != 0).any()
    assert np.isfinite(encode(trained[0], dataclasses.replace(city, start=None), _SPAN)).all()


def test_pretraining_lowers_the_error_on_held_out_regions(city, trained):
    encoder, lines = trained
    assert len(lines) == 4
    assert lines[-1]["validation_masked_loss"] < lines[0]["validation_masked_loss"]
    assert lines[-1]["train_contrast_loss"] < 0.8 * lines[0]["train_contrast_loss"]
    patches = cut_patches(city, _SPAN, 120, 4)
    visible = np.random.default_rng(4).random(patches.observed.shape) < 0.25
    hidden = (patches.share > 0) & ~visible[..., None]
    made = reconstruct(encoder, patches, visible)
    seen = patches.share * visible[..., None]
    mean = (seen * patches.bins).sum(axis=(1, 2), keepdims=True) / seen.sum(axis=(1, 2), keepdims=True)
    assert np.abs(made - patches.bins)[hidden].mean() < 0.8 * np.abs(mean - patches.bins)[hidden].mean()


def test_windows_show_a_quarter_and_ask_for_the_rest(city):
    bank = build_patch_bank([city], [Span(0, 240)], _TINY, key=jax.random.key(0))
    # Every patch is known by its number.
    numbers = jnp.broadcast_to(jnp.arange(len(bank.bins), dtype=jnp.float32)[:, None], bank.bins.shape)
    bank = dataclasses.replace(bank, bins=numbers)
    windows = _draw_windows(bank, _STILL, 200, bank.probabilities[0], key=jax.random.key(1))
    present = np.asarray(windows.visible.present) > 0
    shown_bins, asked_bins = np.asarray(windows.visible.bins), np.asarray(windows.target)
    hidden = np.asarray(windows.weight).max(axis=2) > 0
    held = np.flatnonzero(np.asarray(bank.probabilities[0]) == 0)
    assert len(held) == 1 and np.asarray(bank.probabilities[1])[held] == pytest.approx(1.0)
    observed, per_region = np.asarray(bank.share).sum(axis=1) > 0, int(bank.count[0])
    lengths = []
    for row in range(200):
        shown = shown_bins[row, present[row], 0].astype(int)
        wanted = asked_bins[row, hidden[row], 0].astype(int)
        both = np.concatenate([shown, wanted])
        assert len(set(both)) == len(both) and observed[both].all()
        region = set(both // per_region)
        assert len(region) == 1 and region.isdisjoint(held)
        span = both.max() - both.min() + 1
        assert span <= 4 * 12
        if len(wanted) < 24:  # nothing hidden is left out
            assert len(shown) == max(1, round(0.25 * len(both)))
        lengths.append(span)
    assert min(lengths) <= 14 and max(lengths) > 40


def test_shifted_windows_keep_their_readings_and_are_told_another_time(city):
    bank = build_patch_bank([city], [Span(0, 240)], _TINY, key=jax.random.key(0))
    changed = dataclasses.replace(_STILL, shifted_share=0.9)
    first, second = (
        _draw_windows(bank, config, 200, bank.probabilities[0], key=jax.random.key(1)) for config in (_STILL, changed)
    )
    np.testing.assert_array_equal(first.target, second.target)
    np.testing.assert_array_equal(first.weight, second.weight)
    moved = np.asarray(first.queries[..., :20] != second.queries[..., :20]).any(axis=(1, 2))
    assert 150 <= moved.sum() < 200
    np.testing.assert_array_equal(first.queries[..., 20:], second.queries[..., 20:])


def test_pairs_are_whole_windows_of_the_same_regions_that_share_nothing(simulated_cities):
    bank = build_patch_bank(simulated_cities, [Span(0, 240)] * 3, _TINY, key=jax.random.key(0))
    numbers = jnp.broadcast_to(jnp.arange(len(bank.bins), dtype=jnp.float32)[:, None], bank.bins.shape)
    bank = dataclasses.replace(bank, bins=numbers)
    observed, cities = np.asarray(bank.share).sum(axis=1) > 0, set()
    for seed in range(8):
        pairs = _draw_pairs(bank, _TINY, bank.probabilities[0], key=jax.random.key(seed))
        places = np.asarray(pairs.bins[:, :, 0]).astype(int)
        present = np.asarray(pairs.present) > 0
        np.testing.assert_array_equal(present, observed[places])
        regions = places // int(bank.count[0])
        assert (regions == regions[:, :1]).all() and len(set(regions[:6, 0])) == 6
        np.testing.assert_array_equal(regions[:6, 0], regions[6:, 0])
        assert (np.asarray(bank.probabilities[0])[regions[:, 0]] > 0).all()
        assert (places[:6, -1] < places[6:, 0]).all() and (np.diff(places, axis=1) == 1).all()
        assert len(set(regions[:, 0] // 8)) == 1
        cities |= set(regions[:, 0] // 8)
    assert len(cities) > 1


def test_an_encoder_is_saved_and_read_back(tmp_path, city, trained):
    encoder = trained[0]
    save_arrays(tmp_path / "encoder", encoder.variables, {"format": 1, "config": dataclasses.asdict(encoder.config)})
    arrays, facts = load_arrays(tmp_path / "encoder", 1, "encoder")
    again = TemporalEncoder(jax.tree.map(jnp.asarray, arrays), TemporalConfig(**facts["config"]))
    np.testing.assert_array_equal(encode(again, city, _SPAN), encode(encoder, city, _SPAN))


def test_bad_spans_are_refused_in_one_line(city, fine, trained):
    encoder = trained[0]
    with pytest.raises(InputError, match=r"span of city 'crowd_0' \(steps 5 to 20\) is shorter than a day"):
        encode(encoder, city, Span(5, 20))
    with pytest.raises(InputError, match=r"span of city 'crowd_0' \(=14.0 days\) is longer than 14 days"):
        encode(encoder, _with_values(city, np.concatenate([city.values] * 2)), Span(0, 14 * 24 + 1))
    values = np.array(city.values)
    values[_SPAN.start : _SPAN.stop] = np.nan
    with pytest.raises(InputError, match=r"'crowd_0' has no reading in the span to encode \(steps 30 to 102\)"):
        encode(encoder, _with_values(city, values), _SPAN)
    coarse = resample(fine, 360)
    with pytest.raises(InputError, match=r"interval of city 'crowd_0' \(=360 minutes\) must divide the 120 minutes"):
        encode(encoder, coarse, Span(0, 8))
    with pytest.raises(InputError, match="`cities` is empty"):
        pretrain_encoder([], [], _TINY, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "`width` must be above 0, got 0"),
        ("width", 18, "`width` (=18) must be a multiple of `heads` (=4)"),
        ("masked_share", 1.0, "`masked_share` must be in [0, 1), got 1.0"),
        ("contrast_weight", float("nan"), "`contrast_weight` must be a number of at least 0, got nan"),
        ("patch_minutes", 50, "`patch_minutes` (=50) must divide 1440"),
        ("train_days", 15, "`train_days` must be at most 14, got 15"),
    ],
)
def test_bad_sizes_are_refused(field, value, message):
    with pytest.raises(InputError) as error:
        TemporalConfig(**{field: value})
    assert message in str(error.value)
