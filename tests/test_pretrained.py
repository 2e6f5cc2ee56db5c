"""In: the generator of the package. Out: it is there where the package is installed, and forecasts a city."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from benchmarks.crowd_hourly_card import CITIES, model_card
from benchmarks.moments import random_moments
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.pretrained import pretrained_names

_ROOT = pathlib.Path(__file__).parents[1]
_FOLDER = _ROOT / "gpdiff_jax" / "pretrained"


def test_it_forecasts_a_city_of_three_days_better_than_their_mean():
    city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=24, days=21), seed=5)[0]
    generator = gpd.load_pretrained()
    config, errors = gpd.GenerateConfig(samples=2, steps=5), []
    for step in random_moments(city, 20, horizon=6, seed=0):
        assert city.start is not None
        start = city.start + (step - 72) * np.timedelta64(60, "m")
        seen = dataclasses.replace(city, values=city.values[step - 72 : step], start=start)
        new_city = gpd.prepare_new_city(seen, generator)
        parameters = generator.generate(new_city.prompts, key=jax.random.key(0), config=config)
        made = gpd.forecast_next(parameters, seen)
        assert made.quantiles is not None and (np.diff(made.quantiles, axis=-1) >= 0).all()
        window = np.asarray(new_city.target.test_starts)
        mean = historical_average(new_city.city, Span(0, 72), window, history=12, horizon=6)[0]
        truth = city.values[step : step + 6, :, 0].T
        errors.append([np.nanmean(np.abs(forecast - truth)) for forecast in (made.forecast, mean)])
    ours, peer = np.mean(errors, axis=0)
    assert ours < 0.95 * peer


def test_it_is_small_and_its_card_says_what_it_was_made_of():
    assert pretrained_names() == ("crowd_hourly",)
    files = [path for path in (_FOLDER / "crowd_hourly").rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) < 8e6
    card = (_FOLDER / "crowd_hourly.md").read_text()
    assert card == model_card(_ROOT / "benchmarks" / "results" / "crowd_hourly")
    assert all(f"| {name} |" in card for name in CITIES)
    # Nothing says on which machine it was made.
    assert not any(str(_ROOT).encode() in path.read_bytes() for path in files)
    with pytest.raises(InputError, match="the package has no generator 'speed'; choose from crowd_hourly"):
        gpd.load_pretrained("speed")


def test_an_installation_brings_it(tmp_path):
    pytest.importorskip("setuptools")
    words = ["-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([sys.executable, *words, "build_py", "--build-lib", str(tmp_path)], check=True, cwd=_ROOT)
    built = tmp_path / "gpdiff_jax" / "pretrained"
    for path in _FOLDER.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (built / path.relative_to(_FOLDER)).read_bytes() == path.read_bytes()


def test_with_16_bits_it_generates_nearly_what_it_does_with_32(tmp_path):
    # Of the package all was rounded before: it is moved off the numbers that 16 bits can say.
    kept = gpd.load_pretrained()
    off = {name: jax.tree.map(lambda leaf: 1.00037 * leaf, getattr(kept, name)) for name in ("variables", "directions")}
    basis = jax.tree.map(lambda leaf: 1.00037 * leaf, kept.codec.basis)
    whole = dataclasses.replace(kept, **off, codec=dataclasses.replace(kept.codec, basis=basis))
    whole.save(tmp_path / "half", half=True, directions=4)
    half = gpd.Hypernetwork.load(tmp_path / "half")
    for name in ("variables", "directions"):
        for have, want in zip(*(jax.tree.leaves(getattr(one, name)) for one in (half, whole)), strict=True):
            np.testing.assert_allclose(have, want[:4] if name == "directions" else want, rtol=1e-3, atol=1e-6)
            assert have.dtype == np.float32
    assert any((have != want).any() for have, want in zip(half.codec.basis, basis, strict=True))
    city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=4, days=4), seed=5)[0]
    prompts, config = gpd.prepare_new_city(city, whole).prompts, gpd.GenerateConfig(samples=1, steps=5)
    drawn = [one.generate(prompts, key=jax.random.key(0), config=config).params for one in (half, whole)]
    for have, want in zip(*map(jax.tree.leaves, drawn), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-3 * np.abs(want).max())
    wide = dataclasses.replace(whole, variables=jax.tree.map(lambda leaf: leaf + 1e5, whole.variables))
    with pytest.raises(InputError, match="is too large for 16 bits; save the values with 32 bits"):
        wide.save(tmp_path / "wide", half=True)
    assert not (tmp_path / "wide").exists()
