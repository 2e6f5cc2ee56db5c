"""In: prompts of three small cities, two as sources and one as target. Out: what their picture and page must show."""

import dataclasses
import html.parser
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.analysis.inspection import (
    Inspection,
    InspectionConfig,
    SeenCity,
    disjoint_pairs,
    inspect_cities,
    spread_points,
)
from gpdiff_jax.analysis.measures import join_parts, recall_at
from gpdiff_jax.analysis.prediction import LeftOutCity, ParameterPrediction, Predicted
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, split_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json
from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, RegionPrompts
from gpdiff_jax.prompts.prompt import Prompts, region_prompts
from gpdiff_jax.report.document import write_page
from gpdiff_jax.report.prompts import prompt_content, prompt_parts

_SPANS = (Span(0, 72), Span(40, 112), Span(90, 162))
_CONFIG = InspectionConfig(classes=3, regions=4, neighbours=2, pairs=6)
_BAD = '<script>alert("x")</script>'


def _with_encoder(prompts: Prompts) -> Prompts:
    """Two columns more, as of an encoder: functions of the statistics, so that they need none."""
    values = jnp.concatenate([prompts.values, jnp.tanh(prompts.values[..., :2])], axis=-1)
    return Prompts(values, prompts.region_ids, (*prompts.names, "temporal_000", "temporal_001"))


def _sources(cities: list[City]) -> list[SeenCity]:
    """The second city shows but six of its regions."""
    seen = []
    for city, nodes in zip(cities[:2], (np.arange(8), np.asarray([0, 1, 2, 4, 6, 7])), strict=True):
        prompts = _with_encoder(region_prompts(city, _SPANS))
        seen.append(
            SeenCity(city, nodes, _SPANS, Prompts(prompts.values[:, nodes], prompts.region_ids[nodes], prompts.names))
        )
    return seen


class _Encoder(PromptEncoder):
    """Stands for the encoder of a run with these parts."""

    def regions_by_span(self, city, spans):
        prompts = _with_encoder(region_prompts(city, spans))
        return [RegionPrompts(values, prompts.names, prompts.spatial) for values in np.asarray(prompts.values)]


def _inspect(cities: list[City]) -> Inspection:
    city = cities[2]
    support = split_target(city.num_steps, 24, 3, history=12, horizon=6).support
    target = SeenCity(city, np.arange(8), (support,), _with_encoder(region_prompts(city, [support])))
    return inspect_cities(_sources(cities), [target], _Encoder(None, None, None, PromptConfig()), _CONFIG)


@pytest.fixture(scope="module", name="inspection")
def _inspection(simulated_cities) -> Inspection:
    return _inspect(simulated_cities)


def test_every_region_has_a_place_in_every_projection(inspection, simulated_cities):
    names = [f"{city.name}/{node}" for city in simulated_cities for node in city.node_ids]
    shown = [name for row, name in enumerate(names) if row not in (8 + 3, 8 + 5)]
    assert inspection.names == tuple(shown) and inspection.num_sources == 14
    assert list(inspection.projections) == ["statistics", "temporal", "all"]
    for projection in inspection.projections.values():
        assert projection.places.shape == (22, 2) and np.isfinite(projection.places).all()
        assert 1 >= projection.variance[0] >= projection.variance[1] > 0
    # Two columns have no third direction.
    assert sum(inspection.projections["temporal"].variance) == pytest.approx(1)
    # Cities weigh the same: the centre is the mean of the two cities' means.
    places = inspection.projections["all"].places
    np.testing.assert_allclose(places[:8].mean(axis=0), -places[8:14].mean(axis=0), atol=1e-5)
    assert set(inspection.labels) <= set(range(len(inspection.class_names))) and len(inspection.class_names) <= 3
    assert inspection.days.shape == (22, 24)


def test_neighbours_are_the_nearest_source_regions(inspection, simulated_cities):
    sources = _sources(simulated_cities)
    values = [np.asarray(seen.prompts.values, np.float64) for seen in sources]
    mean = np.mean([table.mean(axis=(0, 1)) for table in values], axis=0)
    std = np.sqrt(np.mean([np.square(table - mean).mean(axis=(0, 1)) for table in values], axis=0)) + 1e-3
    city = simulated_cities[2]
    support = split_target(city.num_steps, 24, 3, history=12, horizon=6).support
    target = np.asarray(_with_encoder(region_prompts(city, [support])).values, np.float64)[0]
    known = np.clip((np.concatenate([table[0] for table in values]) - mean) / std, -4, 4)
    assert len(inspection.neighbours) == 4
    for row, found in inspection.neighbours.items():
        own = np.clip((target[row - 14] - mean) / std, -4, 4)
        distance = np.sqrt(np.square(known - own).sum(axis=1))
        assert [near for near, _ in found] == np.argsort(distance)[:2].tolist()
        np.testing.assert_allclose([gap for _, gap in found], np.sort(distance)[:2], rtol=1e-4)


def test_recall_is_that_of_disjoint_windows(inspection, simulated_cities):
    assert disjoint_pairs(_SPANS, 6) == [(0, 2)]
    found = {(one.city, one.part): one for one in inspection.recall}
    assert len(found) == 9
    for seen in _sources(simulated_cities):
        values = np.asarray(seen.prompts.values)
        width = values.shape[2] - 2
        for part, columns in (("statistics", [slice(width)]), ("temporal", [slice(width, None)])):
            first, second = (join_parts([values[k][:, some] for some in columns]) for k in (0, 2))
            one = found[seen.city.name, part]
            assert one.found == recall_at(first, second, (1, 5)) and (one.days, one.pairs) == (3, 1)
    # Three support days hold two windows of one day.
    assert found["crowd_2", "all"].days == 1 and 0 <= found["crowd_2", "all"].found[1] <= 1


def test_nothing_outside_the_support_days_is_read(inspection, simulated_cities):
    city = simulated_cities[2]
    support = split_target(city.num_steps, 24, 3, history=12, horizon=6).support
    values = np.array(city.values) * np.float32(3) + np.float32(7)
    values[support.start : support.stop] = city.values[support.start : support.stop]
    other = _inspect([*simulated_cities[:2], dataclasses.replace(city, values=values)])
    assert prompt_content(other, None) == prompt_content(inspection, None)
    np.testing.assert_array_equal(other.days, inspection.days)


def test_points_are_spread():
    places = np.asarray([[0.0, 0], [0.1, 0], [10, 0], [-9, 0], [0, 5]])
    assert spread_points(places, 4).tolist() == [1, 2, 3, 4]
    assert spread_points(np.zeros((3, 2)), 3).tolist() == [0]
    with pytest.raises(InputError, match="`neighbours` must be at least 1, got 0"):
        InspectionConfig(neighbours=0)


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_the_page_names_every_city_and_nothing_in_it_is_taken_for_html(inspection, tmp_path):
    renamed = dataclasses.replace(
        inspection,
        names=tuple(name.replace("crowd_1", _BAD) for name in inspection.names),
        cities=tuple(name.replace("crowd_1", _BAD) for name in inspection.cities),
        recall=tuple(dataclasses.replace(one, city=one.city.replace("crowd_1", _BAD)) for one in inspection.recall),
    )
    cities = (LeftOutCity("crowd_0", 8, 2, 0.93, 0.4), LeftOutCity(_BAD, 6, 2, 0.95, float("nan")))
    rows = [
        Predicted(city, name, float("nan") if name == "all" else -0.25, 0.5, 0.125, penalty)
        for city in ("crowd_0", _BAD)
        for name, penalty in (("pooled_unchanged", None), ("statistics", 10.0), ("all", 3.0), ("own_parameters", None))
    ]
    prediction = ParameterPrediction(cities, tuple(rows))
    parts = prompt_parts(renamed, prediction, target="crowd_2", badges=["seed 0", _BAD])
    text = write_page(tmp_path / "prompts.html", "crowd_2", parts).read_text()
    reader = _Reader()
    reader.feed(text)
    assert [tag for tag, _ in reader.tags].count("script") == 1 and _BAD in reader.words
    for city in ("crowd_0", "crowd_2", "Statistics", "Temporal encoder", "Pooled model unchanged", "Own parameters"):
        assert city in reader.words
    assert all(name in reader.words for row in renamed.neighbours for name in [renamed.names[row]])
    # Two pictures per part, one small line per region and neighbour.
    assert [kind.get("class") for tag, kind in reader.tags if tag == "svg"].count("spark") == 4 * 3
    assert [tag for tag, _ in reader.tags].count("svg") == 4 * 3 + 2 * 3
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", text)
    # What sorts the tables reads a value from every cell.
    assert all("data-value" in kind for tag, kind in reader.tags if tag == "td")
    write_json(tmp_path / "prompts.json", prompt_content(renamed, prediction))
    content = json.loads((tmp_path / "prompts.json").read_text())
    assert content["prediction"]["predicted"][2]["r2"] is None and content["prediction"]["cities"][1]["city"] == _BAD
    assert len(content["regions"]) == 22 and sum(region["target"] for region in content["regions"]) == 8
    assert "only one" in "".join(prompt_parts(inspection, None, target="crowd_2", badges=[]))
