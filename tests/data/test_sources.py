"""In: simulated cities, some with silent regions or outages. Out: which regions and windows training may use."""

import dataclasses
import operator

import jax
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import city_weights, prepare_sources
from gpdiff_jax.data.target import prepare_target, prepare_targets
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.sources import with_prompts

_DATA = DataConfig(covariates="calendar", support_days=2, max_neighbours=3, variants=4)


def _silenced(city: City, begin: int, end: int, nodes: slice | int) -> City:
    values = np.array(city.values)
    values[begin:end, nodes] = np.nan
    return dataclasses.replace(city, values=values)


def test_a_region_without_a_reading_in_its_training_span_is_left_out_everywhere(simulated_cities):
    whole, city = simulated_cities[0], simulated_cities[1]
    boundary = round(0.8 * city.num_steps)
    gap = _silenced(city, 0, boundary, 3)
    sources = with_prompts(prepare_sources([whole, gap], _DATA, key=jax.random.key(0)), [whole, gap])
    complete = with_prompts(prepare_sources([whole, city], _DATA, key=jax.random.key(0)), [whole, city])
    kept = [k for k in range(16) if k != 8 + 3]
    assert sources.num_regions == 15 == len(sources.names)
    assert sources.names == tuple(complete.names[k] for k in kept) and f"{gap.name}/r3" not in sources.names
    for made, all_ in (
        (sources.region_ids, complete.region_ids),
        (sources.city_index, complete.city_index),
        (sources.graphs.nodes, complete.graphs.nodes),
    ):
        np.testing.assert_array_equal(made, np.asarray(all_)[kept])
    assert sources.prompts.values.shape == (4, 15, complete.prompts.values.shape[2])
    assert sources.validation_starts.shape[0] == 15
    # It still is a neighbour of others, through its neighbours' scale.
    assert 11 in np.asarray(sources.graphs.nodes) and np.isfinite(sources.bank.mean).all()


def test_variants_of_random_length_hold_whole_days_between_the_two_numbers_short_ones_as_often_as_long(
    simulated_cities,
):
    city = simulated_cities[0]
    config = dataclasses.replace(_DATA, variants=24, window_days=(1, 30))
    made, again = (prepare_sources([city], config, key=jax.random.key(0)) for _ in range(2))
    per_day, train = city.steps_per_day, len(made.train_spans[0])
    days = np.asarray([len(span) / per_day for span in made.spans[0]])
    longest = train // (2 * per_day)  # of a short city, half of what it trains on
    assert longest >= 3 and set(days) <= set(range(1, longest + 1)) and {1.0, float(longest)} <= set(days)
    bound = np.exp(np.log(longest + 1) / 2)
    assert abs((days < np.floor(bound)).mean() - 0.5) < 0.25
    assert made.spans == again.spans
    # Lengths say nothing of when: a later variant is not a longer one.
    starts = np.asarray([span.start for span in made.spans[0]])
    assert abs(np.corrcoef(starts, days)[0, 1]) < 0.6
    # The bank sees each through its own steps.
    span = made.spans[0][int(np.argmax(days))]
    mean = np.nanmean(city.values[span.start : span.stop, :, 0], axis=0)
    np.testing.assert_allclose(made.bank.mean[int(np.argmax(days))], mean, rtol=1e-5)


@pytest.mark.parametrize("days", [(0, 3), (4, 3)])
def test_window_days_out_of_order_are_refused(days):
    with pytest.raises(InputError, match="`window_days` must be two whole numbers of at least 1 in order"):
        DataConfig(window_days=days)


def test_prompts_are_made_of_variants_that_are_spread_over_all(simulated_cities):
    few, all_of_them = (
        prepare_sources(simulated_cities[:1], DataConfig(variants=9, prompt_variants=count), key=jax.random.key(0))
        for count in (3, 20)
    )
    in_time, by_start = all_of_them.spans[0], operator.attrgetter("start")
    assert all_of_them.prompted_spans == all_of_them.spans and list(in_time) == sorted(in_time, key=by_start)
    assert few.prompted_spans[0] == few.spans[0][:3] == (in_time[0], in_time[3], in_time[6])
    assert sorted(few.spans[0], key=by_start) == list(in_time)
    # A prompt and what a forecaster sees through the variant of the same number come from one span.
    made = [np.asarray(with_prompts(one, simulated_cities[:1]).prompts.values) for one in (few, all_of_them)]
    assert len(made[0]) == 3 and len(made[1]) == 9
    np.testing.assert_array_equal(made[0], made[1][[0, 3, 6]])
    np.testing.assert_array_equal(few.bank.profile[:3], np.asarray(all_of_them.bank.profile)[[0, 3, 6]])


def test_every_city_weighs_alike_whatever_its_regions():
    weights = city_weights(np.asarray([0, 0, 1, 0, 1, 3]))
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2, 1.0])


def test_training_and_validation_windows_keep_to_their_spans(simulated_cities):
    sources = with_prompts(
        prepare_sources(simulated_cities, _DATA, key=jax.random.key(0), validation_windows=20), simulated_cities
    )
    for index, city in enumerate(simulated_cities):
        boundary, node = round(0.8 * city.num_steps), 8 * index
        first, count = int(sources.train.first[node]), int(sources.train.count[node])
        starts = np.asarray(sources.train.starts)[first : first + count]
        assert starts.min() >= 0 and starts.max() + 18 <= boundary
        held_out = np.asarray(sources.validation_starts[node])
        assert held_out.shape == (20,) and held_out.min() + 12 >= boundary and held_out.max() + 18 <= city.num_steps
        assert all(0 <= span.start < span.stop <= boundary and len(span) == 48 for span in sources.spans[index])


def test_a_regions_id_depends_on_its_own_names_alone(simulated_cities):
    both = with_prompts(prepare_sources(simulated_cities[:2], _DATA, key=jax.random.key(0)), simulated_cities[:2])
    second = with_prompts(prepare_sources(simulated_cities[1:2], _DATA, key=jax.random.key(0)), simulated_cities[1:2])
    np.testing.assert_array_equal(np.asarray(both.region_ids)[8:], second.region_ids)
    assert len(set(np.asarray(both.region_ids).tolist())) == 16
    np.testing.assert_array_equal(second.region_ids, simulated_cities[1].region_ids())
    np.testing.assert_array_equal(second.prompts.region_ids, second.region_ids)
    # So do its variants and its prompts.
    assert both.spans[1] == second.spans[0]
    np.testing.assert_array_equal(np.asarray(both.prompts.values)[:, 8:], second.prompts.values)


def test_the_spans_scaling_sees_one_scale_per_region(simulated_cities):
    data = dataclasses.replace(_DATA, scaling="span")
    spanned = with_prompts(prepare_sources(simulated_cities[:1], data, key=jax.random.key(0)), simulated_cities[:1])
    varied = with_prompts(prepare_sources(simulated_cities[:1], _DATA, key=jax.random.key(0)), simulated_cities[:1])
    assert (np.asarray(spanned.bank.mean) == np.asarray(spanned.bank.mean)[:1]).all()
    assert (np.asarray(varied.bank.mean) != np.asarray(varied.bank.mean)[:1]).any()


def test_a_targets_windows_keep_to_their_spans(simulated_cities):
    target = prepare_target(simulated_cities[0], dataclasses.replace(_DATA, support_days=6))
    split = target.split
    for starts, span, reaches_to in (
        (target.adaptation_starts, split.adaptation, split.adaptation.start),
        (target.support_starts, split.support, split.support.start),
        (target.validation_starts, split.validation, split.support.start),
        (target.test_starts, split.test, split.support.start),
    ):
        starts = np.asarray(starts)
        assert starts.min() >= reaches_to and starts.max() + 18 <= span.stop
        assert starts.min() + 12 >= span.start
    assert len(target.test_starts) == len(split.test) - 6 + 1


def test_the_channels_of_a_target_share_their_test_windows(simulated_cities):
    city = simulated_cities[0]
    gaps = [_silenced(city, 240, 260, slice(None)), _silenced(city, 300, 336, slice(None))]
    alone = [np.asarray(prepare_target(gap, _DATA).test_starts) for gap in gaps]
    together = prepare_targets(gaps, _DATA)
    assert len(alone[0]) != len(alone[1])
    for target in together:
        np.testing.assert_array_equal(target.test_starts, np.union1d(*alone))


def test_one_support_day_leaves_nothing_to_adapt_on(simulated_cities):
    target = prepare_target(simulated_cities[0], dataclasses.replace(_DATA, support_days=1))
    assert len(target.adaptation_starts) == 0 and len(target.support_starts) > 0
    # Its windows are the day's own: nothing before the day is visible as their history.
    assert int(target.validation_starts.min()) >= target.split.support.start


def test_a_target_region_without_a_visible_reading_is_named_silent(simulated_cities):
    city = simulated_cities[0]
    split = prepare_target(city, _DATA).split
    target = prepare_target(_silenced(city, split.support.start, split.support.stop, 5), _DATA)
    assert target.silent == (5,)
    for values in (target.bank.mean, target.bank.std):
        assert np.isfinite(np.asarray(values)).all()


def test_cities_that_show_nothing_where_it_counts_are_refused(simulated_cities):
    city = simulated_cities[0]
    end = city.num_steps
    every = slice(None)
    with pytest.raises(InputError, match="has no reading in its last 20 %"):
        prepare_sources([_silenced(city, round(0.8 * end), end, every)], _DATA, key=jax.random.key(0))
    with pytest.raises(InputError, match="has no reading in its test span"):
        prepare_target(_silenced(city, end - round(0.3 * end), end, every), _DATA)
    support = prepare_target(city, _DATA).split.support
    with pytest.raises(InputError, match="has no reading in its visible span"):
        prepare_target(_silenced(city, support.start, support.stop, every), _DATA)
    with pytest.raises(InputError, match=f"two source cities are called '{simulated_cities[0].name}'; give every city"):
        prepare_sources([simulated_cities[0], simulated_cities[1], simulated_cities[0]], _DATA, key=jax.random.key(0))
    with pytest.raises(InputError, match="`cities` is empty"):
        prepare_sources([], _DATA, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"support_days": 0}, "`support_days` must be at least 1, got 0"),
        ({"variants": 0}, "`variants` must be at least 1, got 0"),
        ({"scaling": "none"}, "`scaling` must be one of support, span, got 'none'"),
    ],
)
def test_a_data_configuration_out_of_range_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(_DATA, **change)
