"""In: harvested parameters of all source regions, and their prompts. Out: the parameter zoo, on disk and back.

The zoo is the training set of the generator: a few parameter vectors per region, with where each came from. On disk it
is a folder of chunks, so that neither writing nor reading it ever holds all vectors. A zoo has no tokens yet; it is
written with the layout of the published token width, which the shapes of the parameters give.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.hosts import is_first
from gpdiff_jax.models.protocol import abstract_params
from gpdiff_jax.models.registry import make_model, model_names
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.prompts.sources import PromptedSources
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.training.stored_form import Shape, building, check_arrays, check_facts, shapes_of, to_device
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.region_training import HarvestedRegion
from gpdiff_jax.zoo.tokens import TokenLayout, check_layout, make_layout

_FORMAT = 9
_INDEX = "index"
_FACTS = {
    "model": str,
    "names": [str],
    "prompt_names": [str],
    "prompt_provenance": [str],
    "prompt_spatial": ([int], None),
    "of": (str, None),
}


@dataclasses.dataclass(frozen=True, eq=False)
class HeldVectors:
    """Vectors in memory, leaves [R, M, ...]."""

    params: Params

    def parts(self) -> Iterator[tuple[Int[np.ndarray, " X"], Params]]:
        """Yields numbers of regions and their parameters, leaves [X, M, ...]; every region comes once."""
        yield np.arange(len(jax.tree.leaves(self.params)[0])), self.params


@dataclasses.dataclass(frozen=True, eq=False)
class StoredVectors:
    """Vectors in the chunks of a folder."""

    folder: pathlib.Path
    rows: tuple[Int[np.ndarray, " X"], ...]  # of every chunk
    shapes: dict[str, Shape]  # of one vector

    def parts(self) -> Iterator[tuple[Int[np.ndarray, " X"], Params]]:
        """See `HeldVectors.parts`; a chunk is read when it is asked for."""
        for index, rows in enumerate(self.rows):
            place, what = chunk_folder(self.folder, index), "chunk of the zoo"
            arrays, _ = load_arrays(place, _FORMAT, what)
            with building(what, place):
                wanted = {path: (len(rows), None, *shape) for path, shape in self.shapes.items()}
                check_arrays(arrays["params"], wanted, "params")
            yield rows, arrays["params"]


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterZoo:
    """M parameter vectors for each of R source regions, the best of each region first, grown from one pooled model.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> zoo = gpd.harvest_cities(cities, key=jax.random.key(0))  # doctest: +SKIP
      >>> zoo.names[0], zoo.validation_mae.shape  # doctest: +SKIP
      ('crowd_0/r0', (72, 4))
    """

    model: str
    pooled: Params
    vectors: HeldVectors | StoredVectors
    validation_mae: Float[np.ndarray, "R M"]  # scaled; NaN for a region without a reading to validate on
    start_mae: Float[np.ndarray, " R"]  # of where each region started
    step: Int[np.ndarray, "R M"]  # training steps behind each vector
    seed: Int[np.ndarray, "R M"]  # which of the seeds
    data_window: Int[np.ndarray, "R M"]  # which stretch of the training span
    prompts: Prompts  # values [V, R, E]
    names: tuple[str, ...]  # R, "city/node"
    city_index: Int[np.ndarray, " R"]
    sources: PromptedSources | None = None  # what it was harvested from; not saved

    def __repr__(self) -> str:
        """What it is, without its numbers."""
        regions, vectors = self.validation_mae.shape
        cities = ", ".join(dict.fromkeys(name.split("/", 1)[0] for name in self.names))
        return f"<ParameterZoo of model {self.model!r}: {regions} regions x {vectors} vectors, of {cities}>"

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.names)

    @property
    def layout(self) -> TokenLayout:
        """Where every parameter lies in tokens of the published width."""
        return make_layout(self.pooled)

    @property
    def params(self) -> Params:
        """All vectors, in memory: leaves float32 [R, M, ...]."""
        rows, parts = zip(*self.vectors.parts(), strict=True)
        order = np.argsort(np.concatenate(rows))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *parts)


def make_zoo(
    model: str,
    sources: PromptedSources,
    pooled: Params,
    harvested: HarvestedRegion,
    vectors: StoredVectors | None = None,
) -> ParameterZoo:
    """Puts harvested regions beside their prompts.

    Args:
      model: name of the forecaster.
      sources: what was harvested.
      pooled: the pooled model.
      harvested: of all regions, stacked; its parameters are not looked at where `vectors` are given.
      vectors: the parameters, if they lie elsewhere.

    Returns:
      The zoo.
    """
    return ParameterZoo(
        model=model,
        pooled=pooled,
        vectors=HeldVectors(harvested.params) if vectors is None else vectors,
        **{name: np.asarray(getattr(harvested, name)) for name in _PROVENANCE},
        prompts=sources.prompts,
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=sources,
    )


_PROVENANCE = ("validation_mae", "start_mae", "step", "seed", "data_window")


def save_zoo(folder: pathlib.Path, zoo: ParameterZoo) -> None:
    """Writes a zoo with orbax, part by part; the folder appears when all is written.

    Args:
      folder: a folder that does not exist yet.
      zoo: what to write.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.save_zoo("zoo", zoo)  # doctest: +SKIP
    """
    partial = partial_folder(folder)
    rows = []
    for index, (numbers, params) in enumerate(zoo.vectors.parts()):
        save_arrays(chunk_folder(partial, index), {"params": params}, {"format": _FORMAT})
        rows.append(numbers)
    finish_zoo(folder, zoo, rows)


def save_chunk(folder: pathlib.Path, index: int, result: HarvestedRegion, facts: dict[str, Any]) -> None:
    """Writes one chunk of an unfinished zoo, whole or not at all, with facts that say what it is part of."""
    save_arrays(chunk_folder(partial_folder(folder), index), result._asdict(), {"format": _FORMAT, **facts})


def load_chunk(folder: pathlib.Path, index: int) -> tuple[HarvestedRegion, dict[str, Any]]:
    """Reads one chunk of an unfinished zoo back.

    Raises:
      InputError: it is damaged.
    """
    arrays, facts = load_arrays(chunk_folder(partial_folder(folder), index), _FORMAT, "chunk of the zoo")
    return HarvestedRegion(**arrays), facts


def finished_chunks(folder: pathlib.Path) -> set[int]:
    """Which chunks of an unfinished zoo are written, as the first host sees it."""
    partial = partial_folder(folder)
    names = ask_first(lambda: [path.name for path in partial.iterdir()] if partial.is_dir() else [])
    return {int(name.removeprefix("chunk_")) for name in names if re.fullmatch(r"chunk_\d{6}", name)}


def finish_zoo(
    folder: pathlib.Path, zoo: ParameterZoo, rows: list[Int[np.ndarray, " X"]], of: str | None = None
) -> None:
    """Writes what a zoo has beside its chunks, and gives its folder its name.

    Args:
      folder: the name.
      zoo: the whole zoo; its vectors are not looked at.
      rows: of every chunk, in order.
      of: by which the harvest is known (`harvest.fingerprint`); None where it is not.
    """
    partial = partial_folder(folder)
    arrays = {
        "pooled": zoo.pooled,
        **{name: getattr(zoo, name) for name in _PROVENANCE},
        "prompts": zoo.prompts.values,
        "region_ids": zoo.prompts.region_ids,
        "city_index": zoo.city_index,
        "rows": np.concatenate(rows),
        "chunk_sizes": np.asarray([len(numbers) for numbers in rows]),
    }
    facts = {
        "format": _FORMAT,
        "model": zoo.model,
        "layout": zoo.layout.as_json(),
        "names": zoo.names,
        "prompt_names": zoo.prompts.names,
        "prompt_provenance": zoo.prompts.provenance,
        "prompt_spatial": zoo.prompts.spatial,
        "of": of,
    }
    save_arrays(partial / _INDEX, arrays, facts)
    if is_first():
        partial.rename(folder)


def load_zoo(
    folder: str | pathlib.Path, sources: PromptedSources | None = None, *, of: str | None = None
) -> ParameterZoo:
    """Reads a zoo back, all but its vectors, which stay on disk until they are asked for.

    Args:
      folder: where it lies.
      sources: what it was harvested from, which `pretrain` needs; their prompts are taken, which need not be those
        that the zoo was written with.
      of: by which the harvest is known that it must come from (`harvest.fingerprint`); None takes any.

    Returns:
      The zoo.

    Raises:
      InputError: there is none, or it is damaged, of another format or of another harvest; or its layout is not that of
        its parameters or, where sources are given and the model is registered, of the model as it is today.

    Example:
      >>> import gpdiff_jax as gpd
      >>> zoo = gpd.load_zoo("runs/hangzhou/zoo")  # doctest: +SKIP
    """
    folder = user_path(folder)
    if not ask_first(folder.is_dir):
        raise InputError(f"no zoo at {str(folder)!r}; name the folder that holds one")
    arrays, facts = load_arrays(folder / _INDEX, _FORMAT, "index of the zoo")
    if of is not None and facts.get("of") != of:
        raise InputError(
            f"{str(folder)!r} holds a zoo of other cities, settings, model, random key or version of JAX; name another "
            "folder"
        )
    what = f"the zoo at {str(folder)!r}"
    with building("zoo", folder):
        check_facts(facts, _FACTS)
        _check_index(arrays, facts)
        layout = TokenLayout.from_json(facts["layout"])
        rows = tuple(np.split(np.asarray(arrays["rows"]), np.cumsum(arrays["chunk_sizes"])[:-1]))
        check_layout(layout, make_layout(arrays["pooled"]), what, "its pooled model")
    if sources is not None and facts["model"] in model_names():
        today = abstract_params(make_model(facts["model"], sources.sizes), sources.sizes)
        check_layout(layout, make_layout(today), what, f"the model {facts['model']!r}")
    named = tuple(facts["prompt_names"]), tuple(facts["prompt_provenance"])
    values, region_ids = to_device((arrays["prompts"], arrays["region_ids"].astype(np.uint32)))
    stored = Prompts(values, region_ids, *named, spatial=tuple(facts.get("prompt_spatial") or ()))
    return ParameterZoo(
        model=facts["model"],
        pooled=arrays["pooled"],
        vectors=StoredVectors(folder, rows, shapes_of(arrays["pooled"])),
        **{name: np.asarray(arrays[name]) for name in _PROVENANCE},
        prompts=stored if sources is None else sources.prompts,
        names=tuple(facts["names"]),
        city_index=np.asarray(arrays["city_index"]),
        sources=sources,
    )


def _check_index(arrays: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuses an index whose arrays do not go together."""
    check_arrays(arrays["pooled"], shapes_of(arrays["pooled"]), "pooled")
    names, entries, regions = facts["prompt_names"], len(facts["prompt_names"]), len(facts["names"])
    if len(facts.get("prompt_spatial") or names) != entries:
        raise InputError(f"`prompt_spatial` has {len(facts['prompt_spatial'])} entries, and a prompt {entries}")
    check_arrays(arrays["prompts"], {"": (None, regions, entries)}, "prompts")
    check_arrays(arrays["validation_mae"], {"": (regions, None)}, "validation_mae", values="any")
    check_arrays(arrays["start_mae"], {"": (regions,)}, "start_mae", values="any")
    vectors = arrays["validation_mae"].shape
    whole: dict[str, Shape] = {"step": vectors, "seed": vectors, "data_window": vectors, "chunk_sizes": (None,)}
    for name, shape in (whole | dict.fromkeys(("city_index", "rows", "region_ids"), (regions,))).items():
        check_arrays(arrays[name], {"": shape}, name, kind="u" if name == "region_ids" else "i", values="any")
    sizes, once = arrays["chunk_sizes"], np.array_equal(np.sort(arrays["rows"]), np.arange(regions))
    if not once or sizes.sum() != regions or sizes.min() < 1:
        raise InputError(f"its chunks are not of {regions} regions, each once")
    if arrays["city_index"].min() < 0:
        raise InputError(f"`city_index` holds {arrays['city_index'].min()}")


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where a zoo lies while it grows."""
    return folder.with_name(f"{folder.name}.partial")


def chunk_folder(folder: pathlib.Path, index: int) -> pathlib.Path:
    """Where a chunk of a zoo lies."""
    return folder / f"chunk_{index:06d}"
