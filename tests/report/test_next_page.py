"""In: a small city and made-up forecasts. Out: a whole page that holds them, of any city."""

import dataclasses
import re

import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.errors import InputError
from gpdiff_jax.transfer.next_hours import NextHours
from tests.report.test_page import Page


def _made(city: gpd.City, *, quantiles: bool = True) -> NextHours:
    random = np.random.default_rng(0)
    forecast = random.uniform(5, 900, (city.num_nodes, 6)).astype(np.float32)
    around = np.sort(forecast[..., None] + random.normal(0, 9, (*forecast.shape, 5)), axis=-1).astype(np.float32)
    times = None if city.start is None else city.start + (city.num_steps + np.arange(6)) * np.timedelta64(60, "m")
    return NextHours(forecast, None, around if quantiles else None, times, city.node_ids)


@pytest.mark.parametrize("located", [True, False])
@pytest.mark.parametrize("dated", [True, False])
def test_the_page_holds_every_region_and_step_and_no_link_out(simulated_cities, tmp_path, located, dated):
    city = dataclasses.replace(simulated_cities[1], values=np.array(simulated_cities[1].values[:70]))
    city.values[:, 2] = np.nan
    if not located:
        city = dataclasses.replace(city, latitude=None, longitude=None)
    if not dated:
        city = dataclasses.replace(city, start=None)
    city = dataclasses.replace(city, node_ids=("<b>&amp;", *city.node_ids[1:]))
    made = _made(city, quantiles=dated)
    path = gpd.render_next(tmp_path / "next.html", city, made)
    text = path.read_text()
    page = Page(text)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert "<b>&amp;" not in text and text.count("<tr>") == 1 + city.num_nodes
    held = [float(value) for value in re.findall(r'<td data-value="([^"]+)">', text)]
    np.testing.assert_allclose(np.sort(held), np.sort(made.forecast, axis=None), rtol=1e-6)
    assert ("in nine of ten" in text) == dated
    if dated:
        assert made.times is not None and str(made.times[5]).replace("T", " ") in text
    assert ("lie where they are" in text) == located
    assert gpd.render_next(path, city, made).read_text() == text
    noted = gpd.render_next(path, city, made, notes=["region <i> was last read 30 hours before now"]).read_text()
    assert "To be looked at" not in text and "<li>region &lt;i&gt; was last read 30 hours before now</li>" in noted
    assert Page(noted).open == []


def test_a_city_of_a_shorter_interval_is_drawn_at_that_of_its_forecasts(tmp_path):
    fine = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=3, interval_minutes=15), seed=3)[0]
    hourly = gpd.resample(fine, 60)
    made = _made(hourly)
    pages = [gpd.render_next(tmp_path / "next.html", city, made).read_text() for city in (fine, hourly)]
    assert pages[0] == pages[1] and "the next 6 hours" in pages[0]


def test_forecasts_of_another_city_or_time_are_refused(simulated_cities, tmp_path):
    city = simulated_cities[1]
    made, path = _made(city), tmp_path / "next.html"
    for other, said in (
        (
            dataclasses.replace(city, node_ids=city.node_ids[::-1]),
            "or in another order; give the city that was forecast",
        ),
        (dataclasses.replace(city, values=np.repeat(city.values, 2, axis=2)), "has 8 of 2, or in another order"),
        (
            dataclasses.replace(city, values=np.concatenate([city.values, city.values[:3]])),
            "was read until .* give it as",
        ),
    ):
        with pytest.raises(InputError, match=said):
            gpd.render_next(path, other, made)
    assert not path.exists()


def test_a_folder_that_is_not_there_is_named(simulated_cities, tmp_path):
    city = simulated_cities[1]
    with pytest.raises(InputError, match="its folder does not exist; make it or name another"):
        gpd.render_next(tmp_path / "none" / "next.html", city, _made(city))
