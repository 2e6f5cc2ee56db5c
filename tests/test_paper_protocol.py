"""In: cities split as the published code splits them. Out: its spans, scale and choice, and its name in all results."""

import csv
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.analysis.summary import summarize_runs
from gpdiff_jax.cities.splits import Span, split_published, split_source
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.data.target_windows import variant_of
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.prompt import region_prompts, target_prompts
from gpdiff_jax.run.results import PAPER_NOTE, results_table
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from tests.runs import tiny_settings

_WINDOW: Any = {"history": 12, "horizon": 6}
_PAPER = DataConfig(variants=5, prompt_variants=3, max_neighbours=3, protocol="paper")


def test_the_first_30_per_cent_are_test_and_the_last_days_are_tuned_on():
    split = split_published(336, 24, 7, **_WINDOW)
    assert (split.test, split.support) == (Span(0, 101), Span(168, 336))
    assert split.adaptation == split.support and len(split.validation) == 0
    source = split_source(100, protocol="paper", **_WINDOW)
    assert (source.train, source.validation) == (Span(30, 100), Span(0, 30))
    with pytest.raises(InputError, match=r"`support_days` \(=10\) are more than the 9.8 days that city 'x' has behind"):
        split_published(336, 24, 10, name="x", **_WINDOW)
    with pytest.raises(InputError, match="city 'x' has 50 steps, too few for history"):
        split_published(50, 24, 1, name="x", **_WINDOW)
    with pytest.raises(InputError, match="city 'x' has 55 steps, too few for history"):
        split_source(55, name="x", protocol="paper", **_WINDOW)


def test_a_target_is_scaled_by_its_whole_series_and_chosen_on_its_test(simulated_cities):
    city = simulated_cities[2]
    target = prepare_target(city, _PAPER)
    series = city.values[:, :, 0]
    np.testing.assert_allclose(target.bank.mean[0], np.nanmean(series, axis=0), rtol=1e-4)
    np.testing.assert_allclose(target.bank.std[-1], np.nanstd(series, axis=0), rtol=1e-3)
    starts = np.asarray(target.test_starts)
    boundary = round(0.3 * city.num_steps)
    assert starts.min() == 0 and starts.max() + 18 == boundary
    assert target.choice is not None
    np.testing.assert_array_equal(target.choice.test_starts, starts)
    np.testing.assert_array_equal(target.choice.adaptation_starts, target.support_starts)
    assert np.asarray(target.support_starts).min() >= city.num_steps - 3 * 24
    # Windows before the support forecast none of its days, so nothing is left out of their profile.
    seen = variant_of(target.bank, target.test_starts, target.support_start, target.steps_per_day)
    assert set(np.asarray(seen).tolist()) == {2 * 3 - 1}
    # Leak-free, the same city is scaled by its support days, and its test comes last.
    free = prepare_target(city, dataclasses.replace(_PAPER, protocol="leak-free"))
    assert np.abs(np.asarray(free.bank.mean[-1]) - np.nanmean(series, axis=0)).max() > 1e-2
    assert np.asarray(free.test_starts).min() > boundary


def test_prompts_of_the_library_are_of_the_days_that_are_tuned_on(simulated_cities):
    city = simulated_cities[2]
    support = prepare_target(city, _PAPER).split.support
    made = target_prompts(city, support_days=3, protocol="paper")
    assert made.provenance == region_prompts(city, [support]).provenance
    np.testing.assert_array_equal(made.values, region_prompts(city, [support]).values)
    assert made.provenance != target_prompts(city, support_days=3).provenance


def test_sources_train_on_their_last_70_per_cent(simulated_cities):
    key = jax.random.key(0)
    sources = prepare_sources(simulated_cities[:2], _PAPER, key=key)
    for span, city in zip(sources.train_spans, simulated_cities, strict=False):
        boundary = round(0.3 * city.num_steps)
        assert span == Span(boundary, city.num_steps)
        assert np.asarray(sources.validation_starts).max() + 18 <= boundary
    assert np.asarray(sources.train.starts).min() >= boundary
    assert min(span.start for spans in sources.spans for span in spans) >= boundary
    dark = dataclasses.replace(simulated_cities[0], values=np.array(simulated_cities[0].values))
    dark.values[:boundary] = np.nan
    with pytest.raises(InputError, match="'crowd_0' has no reading in its first 30 %, which validate it"):
        prepare_sources([dark], _PAPER, key=key)
    with pytest.raises(InputError, match=r"'crowd_0' has no reading in its test span \(the first 30 %\)"):
        prepare_target(dark, _PAPER)


def test_every_output_says_that_the_protocol_is_not_leak_free(data_dir, tmp_path, capsys):
    adapt = AdaptConfig(
        update="own", learning_rates=(3e-3,), steps=6, evaluate_every=2, one_standard_error=False, seen_kinds_only=False
    )
    names = ("historical_average", "pooled_zero_shot", "pooled_few_shot")
    settings = tiny_settings(data_dir, data=_PAPER, adapt=adapt, methods=names)
    run = gpd.Run.open(tmp_path / "run", settings)
    assert PAPER_NOTE in capsys.readouterr().err
    content = run.evaluate()
    assert content == json.loads((tmp_path / "run" / "metrics.json").read_text()) and content["protocol"] == "paper"
    assert results_table(content).splitlines()[-1] == f"({PAPER_NOTE})"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "paper protocol: not leak-free" in page and "cannot be read" not in page
    with np.load(tmp_path / "run" / "forecasts.npz") as held:
        assert held["protocol"] == "paper"
        starts = held["window_start"]
    # The first window forecasts what follows the city's first twelve hours.
    assert np.datetime64(str(starts[0])) == run.target_cities[0].start + np.timedelta64(12, "h")
    with open(tmp_path / "run" / "regions.csv", newline="") as file:
        assert all(row["note"].startswith(PAPER_NOTE) for row in csv.DictReader(file))
    (group,) = summarize_runs([tmp_path / "run"])
    assert group.settings["protocol"] == "paper"
    # The number of steps is chosen on what is reported, as it was published.
    few = content["methods"]["pooled_few_shot"]
    assert few["steps"] > 0 and few["validation_mae"] == pytest.approx(few["mae_mean"], rel=1e-4)
    with pytest.raises(InputError, match=r"`protocol` \(='paper'\) trains on what the room is measured on"):
        run.measure_rooms()


def test_a_leak_free_table_says_nothing_of_the_paper(finished):
    folder, content = finished
    assert content["protocol"] == "leak-free" and PAPER_NOTE not in results_table(content)
    with np.load(folder / "forecasts.npz") as held:
        assert held["protocol"] == "leak-free"
    assert PAPER_NOTE not in (folder / "regions.csv").read_text()
    # The page reads every file that the run writes.
    page = (folder / "report.html").read_text()
    assert "leak-free protocol" in page and "cannot be read" not in page


def test_the_paper_preset_has_the_published_sizes():
    settings = Settings.from_preset("paper")
    denoiser, codec = settings.pretrain.denoiser, settings.pretrain.codec
    assert (settings.model, codec.token_width, codec.components) == ("stgcn", 64, 0)
    assert Settings.from_preset("paper", model="graph_wavenet").pretrain.codec.token_width == 256
    assert (denoiser.width, denoiser.layers, denoiser.heads, denoiser.schedule) == (512, 4, 8, "linear")
    assert (settings.pretrain.steps, settings.pretrain.batch, settings.pretrain.ema) == (80_000, 64, 0.995)
    assert (settings.generate.sampler, settings.generate.steps, settings.generate.samples) == ("ddpm", 500, 1)
    assert (settings.data.support_days, settings.data.covariates) == (7, "none")
    # The protocol is asked for on its own.
    assert settings.data.protocol == "leak-free"


@pytest.mark.slow
def test_the_paper_preset_takes_a_few_steps(tmp_path):
    settings = Settings.from_preset("paper", methods=("pooled_zero_shot", "gpdiff_zero_shot", "gpdiff_few_shot"))
    assert settings.simulation is not None
    cut = dataclasses.replace(
        settings,
        simulation=dataclasses.replace(settings.simulation, cities=2, regions=4),
        data=dataclasses.replace(settings.data, protocol="paper"),
        pooled=dataclasses.replace(settings.pooled, steps=10, evaluations=1),
        harvest=dataclasses.replace(settings.harvest, steps=50),
        pretrain=dataclasses.replace(settings.pretrain, steps=2, accumulate=16, evaluations=1),
        generate=dataclasses.replace(settings.generate, steps=3),
        adapt=dataclasses.replace(settings.adapt, steps=40),
    )
    run = gpd.Run.open(tmp_path / "run", cut)
    content = run.evaluate()
    # 18,382 parameters in tokens of 64, every layer in tokens of its own.
    layout = run.hypernetwork.codec.layout
    assert (len(layout.layer_of_token), layout.width) == (289, 64)
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.hypernetwork.variables))
    assert 10_000_000 < weights < 30_000_000
    assert all(np.isfinite(entry["mae"]).all() for entry in content["methods"].values())
