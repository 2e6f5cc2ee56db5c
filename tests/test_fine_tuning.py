"""In: a finished run's generator and a city. Out: what ways of fine-tuning err, as the methods do; their table."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from benchmarks.fine_tuning_cases import Ways, errors_of_ways, table, ways_of
from benchmarks.held_out_stretches import stretches
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.prompt import region_prompts
from gpdiff_jax.transfer.adapt import adapt_together
from gpdiff_jax.transfer.adapt_config import CodeMoves
from gpdiff_jax.transfer.evaluate import few_shot, observed_truth, sampled_forecast
from gpdiff_jax.transfer.posterior import PosteriorConfig, draw_posterior, posterior_shot
from gpdiff_jax.zoo.pooled import broadcast_regions

_KEY = jax.random.key(3)


def test_ways_err_what_the_methods_of_a_run_do(finished, simulated_cities):
    generator, city = gpd.Hypernetwork.load(finished[0] / "hypernetwork"), simulated_cities[2]
    (target,) = stretches(city, generator.data, 1)
    generate, adapt = gpd.GenerateConfig(samples=2, steps=3), gpd.AdaptConfig(shared_steps=10)
    both, after = (CodeMoves(2, 3.0, 0.5), CodeMoves(1, 2.0, 0.0)), CodeMoves(3, 4.0, 0.0)
    found = errors_of_ways(
        generator, city, target, Ways(both, (90.0,), after), key=_KEY, generate=generate, adapt=adapt
    )
    pooled = broadcast_regions(generator.pooled, target.num_regions)
    prompts = region_prompts(city, [target.split.support], generator.prompt_encoder)
    generated = generator.generate(prompts, key=_KEY, config=generate, any_kind=True).params
    truth = observed_truth(city, target)[0]

    def error(forecast: np.ndarray) -> float:
        return np.nanmean(np.abs(forecast - truth), dtype=np.float64)

    for start, params in (("pooled", pooled), ("generated", generated)):
        for way, update, moves in ((" shared", "shared", after), *zip(_WORDS, ("codes", "codes"), both, strict=True)):
            config = dataclasses.replace(adapt, update=update, **_given(moves))
            made = few_shot(generator.model, target, params, config, key=_KEY, directions=generator.directions)
            assert found[start + way] == pytest.approx(error(made.forecast), rel=1e-6)
            assert found[start + way] != found[start]
    how = {"key": _KEY, "generate": generate, "config": PosteriorConfig(rate=90.0), "adapt": adapt}
    made = posterior_shot(generator, target, prompts, generated, **how)
    assert found["posterior 90 shared"] == pytest.approx(error(made.forecast), rel=1e-6)
    assert found["posterior 90"] not in (found["posterior 90 shared"], found["generated"])
    del how["adapt"]
    drawn = draw_posterior(generator, target, prompts, any_kind=True, **how)
    config = dataclasses.replace(adapt, **_given(after))
    known = {"directions": generator.directions, "blind_params": generated}
    tuned = adapt_together(generator.model, config, target, drawn, key=_KEY, **known)
    forecast, _ = sampled_forecast(generator.model, target, tuned.params, generated)
    assert found["posterior 90 codes 3x4"] == pytest.approx(error(forecast), rel=1e-6)
    assert len(found) == 11


_WORDS = (" codes 2x3x0.5", " codes 1x2")


def _given(moves: CodeMoves) -> dict:
    return {f"code_{name}": value for name, value in moves._asdict().items()}


def test_ways_are_named_by_words():
    after = CodeMoves(48, 0.5, 0.9)
    ways = ways_of(["12x1", "48x0.5x0.9"], ["480", "9.5"])
    assert ways == Ways((CodeMoves(12, 1.0, 0.0), after), (480.0, 9.5), after)
    known = {"generated codes 12x1": 2.0, "posterior 9.5 codes 48x0.5x0.9": None}
    assert ways.without(known) == Ways((after,), (480.0,), after)
    for codes, rates, words in (
        (["12"], [], r"steps in codes \(=12\) must be as 48x4 or 48x4x0.9"),
        (["1x1x0x1"], [], r"steps in codes \(=1x1x0x1\) must be as 48x4"),
        (["12x1"], ["many"], r"posterior rates \(=many\) numbers"),
        (["0x1"], [], "`code_steps`"),
        (["1x1x1"], [], "`code_momentum`"),
        (["12x1"], ["-1"], "`rate`"),
        ([], ["480"], r"steps in codes \(=\) must be"),
    ):
        with pytest.raises(InputError, match=words):
            ways_of(codes, rates)


def test_the_table_has_parts_of_the_untuned_pooled_model(tmp_path):
    results = [
        {"city": "a", "error": {"pooled": 4.0, "generated": 2.0, "posterior 480": 1.0}},
        {"city": "a", "error": {"pooled": 4.0, "generated": 4.5, "posterior 480": None}},
        {"city": "b", "error": {"pooled": 10.0, "generated": 5.0, "posterior 480": 2.5, "posterior 960": 5.0}},
    ]
    assert table(results).splitlines() == [
        "|  | a | b | mean |",
        "| --- | ---: | ---: | ---: |",
        "| generated | 0.750 | 0.500 | 0.625 |",
        "| posterior 480 | - | 0.250 | - |",
        "| posterior 960 | - | 0.500 | - |",
    ]
    for number, one in enumerate(results):
        (tmp_path / f"none_{number}_a_0_of_1.json").write_text(json.dumps({"format": 2, **one}))
    for name, one in (("calendar_0_a_0_of_1", results[2]), ("none_0_a_0_of_3", results[0])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": 2, **one}))
    command = [sys.executable, "-m", "benchmarks.fine_tuning", "--table", f"--results={tmp_path}"]
    made = subprocess.run([*command, "--covariates=none"], capture_output=True, text=True, check=True)
    assert made.stdout == table(results)
    none = subprocess.run([*command, "--covariates=profile"], capture_output=True, text=True)
    assert none.returncode != 0 and "holds no results with --covariates profile" in none.stderr
