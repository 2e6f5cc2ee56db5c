"""In: results of generators as benchmarks leave them. Out: their sources, their figure and their table."""

import itertools
import json

import numpy as np
import pytest

from benchmarks.crowd_hourly_card import CITIES
from benchmarks.generator_cases import CASES, FORMAT, SHOWN, read_result, table
from benchmarks.source_sets import draw, shares, source_names
from gpdiff_jax.diffusion.conditioning import STRATEGIES
from gpdiff_jax.errors import InputError

_METHODS = ("historical_average", "pooled", "generated", "generated_shuffled", "pooled_adapted", "generated_adapted")


@pytest.mark.parametrize("held_out", CITIES)
def test_more_sources_hold_the_fewer_and_never_the_city_that_is_left_out(held_out):
    sets = [set(source_names(held_out, count)) for count in ("2", "4", "8", "all")]
    assert [len(one) for one in sets[:3]] == [2, 4, 8]
    assert all(held_out not in more and fewer < more for fewer, more in itertools.pairwise(sets))
    # Neither does another set of the same place.
    place = held_out.split("_")[0]
    assert not [name for name in source_names(held_out, "all") if name.split("_")[0] == place]


def test_simulated_cities_stand_behind_the_others_or_alone():
    alone = source_names("hangzhou_metro", "0+simulated")
    assert alone == [f"simulated_{index}" for index in range(8)]
    assert source_names("hangzhou_metro", "8+simulated") == [*source_names("hangzhou_metro", "8"), *alone]


def test_a_number_of_sources_that_there_is_not_is_refused():
    for word in ("0", "9", "many"):
        with pytest.raises(InputError, match=rf"--counts \(={word}\) must be numbers from 1 to 8, or all"):
            source_names("hangzhou_metro", word)


def test_the_figure_is_drawn_of_the_cities_that_have_all_numbers(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "rooms").mkdir()
    for city in ("a", "b", "c"):
        error = {"historical_average": 10.0, "own": 6.0, "city": 7.0}
        (tmp_path / "rooms" / f"{city}.json").write_text(json.dumps({"error": error}))
        for count in ("2", "all") if city != "c" else ("2",):
            found = {"error": {name: float(8 + rng.random()) for name in _METHODS} | {"historical_average": 10.0}}
            (tmp_path / f"{city}_{count}.json").write_text(json.dumps(found))
    draw(tmp_path, tmp_path / "rooms", tmp_path / "figure.svg", ["a", "b", "c"], ["2", "all"])
    words = (tmp_path / "figure.svg").read_text()
    assert "Mean of 2 cities that were left out" in words and "generated, tuned" in words
    assert "generated, posterior" not in words  # which was not measured
    found = {"error": {name: 8.0 for name in _METHODS} | {"pooled": 9.0, "generated": 8.25}}
    assert shares(found, 6.0)["generated"] == pytest.approx(0.25) and shares(found, 6.0)["pooled"] == 0
    with pytest.raises(InputError, match="rooms lacks a, b; measure it first"):
        (tmp_path / "rooms" / "a.json").unlink()
        (tmp_path / "rooms" / "b.json").unlink()
        draw(tmp_path, tmp_path / "rooms", tmp_path / "figure.svg", ["a", "b", "c"], ["2", "all"])
    with pytest.raises(InputError, match="has no city with all of"):
        draw(tmp_path, tmp_path / "rooms", tmp_path / "figure.svg", ["c"], ["2", "all"])


def test_the_table_has_means_over_seeds_of_what_was_measured(tmp_path):
    assert set(STRATEGIES) < set(CASES) and {case.model for case in CASES.values()} > {"stid", "stgcn", "dcrnn"}
    assert len({case.objective for case in CASES.values()}) == 3
    for seed, pace in ((0, 10.0), (1, 20.0)):
        found = {
            "format": FORMAT,
            "city": "bay",
            "error": {name: 50.0 + 10 * seed for name in SHOWN},
            "share": {name: 0.1 + 0.2 * seed if name == "generated" else None for name in SHOWN[1:]},
            "steps_per_second": pace,
            "denoiser_parameters": 123_400,
            "peak_memory": 1.5 + seed,
        }
        (tmp_path / f"adaptive_norm_{seed}.json").write_text(json.dumps(found))
    # What was measured otherwise is no row of this table.
    (tmp_path / "flow_0.json").write_text(json.dumps(found | {"format": FORMAT - 1}))
    assert read_result(tmp_path / "flow_0.json", "bay") is None and read_result(tmp_path / "x0_0.json", "bay") is None
    head, _, row = table(tmp_path, "bay").splitlines()
    assert head.startswith("|  | pooled | generated |")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["adaptive_norm", "55.00", "55.00 (+20 %)"]
    assert cells[-4:] == ["15.0", "123 k", "2.5", "2"]
    # Nor does it take results in another city for its own, or mix them.
    with pytest.raises(InputError, match=r"_0\.json' was measured in bay, not in york; name other --res"):
        table(tmp_path, "york")
