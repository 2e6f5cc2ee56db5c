"""In: harvests that differ in one thing. Out: each is known from the others, and none goes on with another's chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.sources import Sources
from gpdiff_jax.errors import InputError
from gpdiff_jax.zoo.harvest import fingerprint, harvest_zoo, plan_chunks
from tests.zoo.linear import CONFIG, KEY, MODEL, linear, prepare, start_of


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    return prepare(simulated_cities[:2])


@pytest.fixture(scope="module", name="pooled")
def _pooled(sources: Sources) -> dict:
    return start_of(sources)


def test_chunks_of_another_harvest_are_refused(tmp_path, sources, pooled):
    folder = tmp_path / "zoo"

    def stop(done: int, metrics: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest_zoo(MODEL, sources, pooled, CONFIG, key=KEY, chunk=5, folder=folder, progress=stop)
    with pytest.raises(InputError, match=r"zoo.partial' holds chunks of a harvest of other .* name another folder"):
        other = dataclasses.replace(CONFIG, learning_rate=1e-3)
        harvest_zoo(MODEL, sources, pooled, other, key=KEY, chunk=5, folder=folder)


def test_every_array_that_a_chunk_reads_and_the_models_operations_are_in_the_fingerprint(sources, pooled):
    plan = plan_chunks(sources, 5, 10**6)

    def mark(sources=sources, pooled=pooled, model=MODEL, config=CONFIG, plan=plan, key=KEY) -> str:
        return fingerprint(model, sources, pooled, config, plan, key=key)

    whole = mark()
    assert whole == mark()
    read = {"bank": sources.bank, "train": sources.train, "graphs": sources.graphs}
    read |= {name: getattr(sources, name) for name in ("validation_starts", "validated", "region_ids")}
    seen = {whole}
    for name, tree in read.items():
        leaves, structure = jax.tree.flatten(tree)
        for index, leaf in enumerate(leaves):
            host = np.array(leaf)
            if not host.size:
                continue
            flat = host.reshape(-1)
            flat[-1] = not flat[-1] if host.dtype == bool else flat[-1] + 1
            changed = structure.unflatten([*leaves[:index], jax.device_put(host), *leaves[index + 1 :]])
            seen.add(mark(sources=sources.replace(**{name: changed})))
    flipped = sum(np.size(leaf) > 0 for leaf in jax.tree.leaves(read))
    assert flipped > 20 and len(seen) == flipped + 1
    other = jax.tree.map(lambda leaf: leaf + 1e-6, pooled)
    for change in ({"pooled": other}, {"key": jax.random.key(1)}, {"plan": plan[:-1]}):
        seen.add(mark(**change))
    seen.add(mark(config=dataclasses.replace(CONFIG, steps=30)))

    def steeper(params, graph, history, covariates):
        return 1.5 * MODEL.apply(params, graph, history, covariates)

    def batched(params, graph, history, covariates):
        return jnp.zeros((6, history.shape[2], 1)) * params["bias"][0]

    seen.add(mark(model=MODEL._replace(apply=steeper)))  # another function, the same name
    seen.add(mark(model=MODEL._replace(apply_batch=batched)))
    assert len(seen) == flipped + 7
    # The same operations are the same model, whoever wrote them.
    assert mark(model=linear()) == whole
