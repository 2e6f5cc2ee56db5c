"""In: simulated cities. Out: prompts of several parts, which any city gets, saved and read back."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, check_parts, fit_prompt_encoder, plain_encoder
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import KnowledgeGraphConfig
from gpdiff_jax.training.storage import load_arrays, save_arrays

_DAY = 24
_TRAIN, _SEEN = Span(0, 10 * _DAY), Span(2 * _DAY, 5 * _DAY)
_CONFIG = PromptConfig(
    parts=("spatial", "statistics", "temporal"),
    temporal=TemporalConfig(width=8, heads=2, encoder_layers=1, steps=4, batch=4, contrast_pairs=4, evaluations=2),
    embedding=EmbeddingConfig(width=6, relation_width=3, epochs=3),
)


@pytest.fixture(scope="module", name="encoder")
def _encoder(simulated_cities: list[City]) -> PromptEncoder:
    sources = simulated_cities[:2]
    return fit_prompt_encoder(sources, [_TRAIN] * 2, [_SEEN] * 2, _CONFIG, key=jax.random.key(0))


def test_parts_stand_side_by_side_in_their_order(simulated_cities, encoder):
    city = simulated_cities[2]
    table, names, spatial = encoder.regions(city, _SEEN)
    statistics = np.concatenate([temporal_statistics(city, _SEEN)[0], spatial_statistics(city)[0]], axis=1)
    assert table.shape == (8, 6 + statistics.shape[1] + 8) == (8, len(names)) and np.isfinite(table).all()
    assert names[0] == "spatial_000" and names[6] == "profile_00h" and names[-1] == "temporal_007"
    np.testing.assert_array_equal(table[:, 6:-8], statistics)
    ends = len(temporal_statistics(city, _SEEN)[1]), len(spatial_statistics(city)[1])
    assert spatial == (1,) * 6 + (0,) * ends[0] + (1,) * ends[1] + (0,) * 8
    np.testing.assert_array_equal(plain_encoder().regions(city, _SEEN)[0], statistics)
    assert table[:, :6].std(axis=0).min() > 0 and table[:, -8:].std(axis=0).min() > 0


def test_it_comes_back_from_arrays_and_json_with_the_same_prompts(simulated_cities, encoder):
    facts = json.loads(json.dumps(encoder.facts()))
    again = PromptEncoder.from_arrays(jax.tree.map(np.asarray, encoder.arrays()), facts)
    assert again.config == encoder.config
    np.testing.assert_array_equal(
        again.regions(simulated_cities[2], _SEEN)[0], encoder.regions(simulated_cities[2], _SEEN)[0]
    )


def test_a_graph_without_activity_classes_is_written_and_read_back(simulated_cities, tmp_path):
    config = dataclasses.replace(_CONFIG, parts=("spatial",), graph=KnowledgeGraphConfig(relations=("BorderBy",)))
    encoder = fit_prompt_encoder(simulated_cities[:1], [_TRAIN], [_SEEN], config, key=jax.random.key(0))
    save_arrays(tmp_path / "encoder", encoder.arrays(), {"format": 1, **encoder.facts()})
    again = PromptEncoder.from_arrays(*load_arrays(tmp_path / "encoder", 1, "prompt encoder"))
    tables = [one.regions(simulated_cities[2], _SEEN)[0] for one in (encoder, again)]
    assert tables[0].shape == (8, 6)
    np.testing.assert_array_equal(*tables)


def test_a_source_is_described_like_a_city_that_comes_later(simulated_cities, encoder):
    """Its own entities are fitted anew: their trained vectors do not matter."""
    city, embedding = simulated_cities[0], encoder.embedding
    own = np.array([name.startswith((f"region:{city.name}/", f"district:{city.name}/")) for name in embedding.entities])
    entities = np.where(own[:, None], 7.0, np.asarray(embedding.params["entities"])).astype(np.float32)
    changed = dataclasses.replace(embedding, params={**embedding.params, "entities": entities})
    other = dataclasses.replace(encoder, embedding=changed)
    np.testing.assert_array_equal(other.regions(city, _SEEN)[0], encoder.regions(city, _SEEN)[0])


def test_readings_that_may_not_be_seen_change_nothing(simulated_cities, encoder):
    hidden = []
    for city in simulated_cities:
        values = city.values.copy()
        values[_TRAIN.stop :] = 1e6
        hidden.append(dataclasses.replace(city, values=values))
    again = fit_prompt_encoder(hidden[:2], [_TRAIN] * 2, [_SEEN] * 2, _CONFIG, key=jax.random.key(0))
    chex.assert_trees_all_equal(again.arrays(), encoder.arrays())
    unseen = hidden[2].values.copy()
    unseen[: _SEEN.start] = 1e6
    unseen[_SEEN.stop :] = 1e6
    city = dataclasses.replace(hidden[2], values=unseen)
    np.testing.assert_array_equal(again.regions(city, _SEEN)[0], encoder.regions(simulated_cities[2], _SEEN)[0])


def test_a_city_of_which_a_part_cannot_be_made_is_named_before_any_training(simulated_cities):
    city = simulated_cities[0]
    check_parts(_CONFIG, city, _SEEN)
    with pytest.raises(InputError, match="shorter than a day"):
        check_parts(_CONFIG, city, Span(0, 12))
    none = np.zeros(0, np.int32)
    alone = dataclasses.replace(city, senders=none, receivers=none, weights=none.astype(np.float32))
    with pytest.raises(InputError, match="city 'crowd_0' has no edge; give it some"):
        check_parts(_CONFIG, alone, _SEEN)
    check_parts(PromptConfig(), alone, Span(0, 12))  # statistics need neither


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((), "`parts` of the prompt is empty; choose from statistics, temporal, spatial"),
        (("graph",), "`parts` of the prompt must be of statistics, temporal, spatial, got 'graph'"),
        (("temporal", "temporal"), "`parts` of the prompt names 'temporal' twice"),
    ],
)
def test_unknown_parts_are_refused(parts, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        PromptConfig(parts=parts)
