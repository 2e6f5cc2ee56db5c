"""In: source cities and their training spans. Out: all that turns any city into prompts: the parts, and their encoders.

It is kept with the generator, so that a city that comes later needs nothing but its file.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig, abstract_variables
from gpdiff_jax.prompts.temporal.encoder import TemporalEncoder, check_span, encode, pretrain_encoder
from gpdiff_jax.prompts.temporal.patches import cut_patches
from gpdiff_jax.prompts.urban_graph.embedding import Embedding, fold_in, train_embedding
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import KnowledgeGraphConfig, build_knowledge_graph, region_name
from gpdiff_jax.prompts.urban_graph.tucker import init_tucker
from gpdiff_jax.training.stored_form import check_arrays, check_facts, form_of, shapes_of
from gpdiff_jax.typing import Key

PARTS = ("statistics", "temporal", "spatial")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What a prompt is made of, and how its encoders are trained.

    Parts: "statistics" of the visible days and of the graph, the "temporal" embedding of the visible days by a masked
    autoencoder, the "spatial" embedding of the region in an urban knowledge graph.
    """

    parts: tuple[str, ...] = ("statistics",)
    temporal: TemporalConfig = TemporalConfig()
    graph: KnowledgeGraphConfig = KnowledgeGraphConfig()
    embedding: EmbeddingConfig = EmbeddingConfig(width=32)

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError(f"`parts` of the prompt is empty; choose from {', '.join(PARTS)}")
        for index, part in enumerate(self.parts):
            if part not in PARTS:
                raise InputError(f"`parts` of the prompt must be of {', '.join(PARTS)}, got {part!r}")
            if part in self.parts[:index]:
                raise InputError(f"`parts` of the prompt names {part!r} twice; name each once")

    @property
    def needs_training(self) -> bool:
        """Whether a part has an encoder that is trained on the source cities."""
        return self.parts != ("statistics",)


_FACTS = {
    "parts": [str],
    "temporal": form_of(dataclasses.asdict(TemporalConfig())),
    "graph": form_of(dataclasses.asdict(KnowledgeGraphConfig())) | {"relations": [str]},
    "embedding": form_of(dataclasses.asdict(EmbeddingConfig())),
}


class RegionPrompts(NamedTuple):
    """Prompts of N regions on the host, and what their E entries are."""

    values: Float[np.ndarray, "N E"]
    names: tuple[str, ...]
    spatial: tuple[int, ...]  # 1 where an entry says where a region lies, 0 where it says how it behaves


SPATIAL_OF_PART = {"statistics": (0, 1), "temporal": (0,), "spatial": (1,)}
"""Which kinds of entries a part of the prompt holds: 1 spatial, 0 temporal."""


@flax.struct.dataclass
class PromptEncoder:
    """The parts of a prompt with their trained encoders; those that are switched off are None."""

    temporal: TemporalEncoder | None
    embedding: Embedding | None
    centroids: Float[Array, "*devices K 24"] | None  # the classes in which the knowledge graph puts a region's day
    config: PromptConfig = flax.struct.field(pytree_node=False)

    def regions(self, city: City, span: Span) -> "RegionPrompts":
        """Prompts of all regions of a city, whatever it is, from what may be seen of it.

        Args:
          city: a one-channel city, one of the sources or not.
          span: what may be seen.

        Returns:
          See `RegionPrompts`, and `region_prompts`.

        Raises:
          InputError: nobody has a reading in the span, or a part cannot be made of the city.
        """
        return self.regions_by_span(city, [span])[0]

    def regions_by_span(self, city: City, spans: Sequence[Span]) -> "list[RegionPrompts]":
        """`regions` for every span; what does not depend on it is made once."""
        place = spatial_statistics(city) if "statistics" in self.config.parts else None
        return [self._regions(city, span, place) for span in spans]

    def _regions(self, city: City, span: Span, place: tuple[np.ndarray, tuple[str, ...]] | None) -> "RegionPrompts":
        tables: list[np.ndarray] = []
        names: tuple[str, ...] = ()
        spatial: tuple[int, ...] = ()
        for part in self.config.parts:
            if part == "statistics" and place is not None:
                behaviour, temporal_names = temporal_statistics(city, span)
                spatial_table, spatial_names = place
                tables += [behaviour, spatial_table]
                names += temporal_names + spatial_names
                spatial += (0,) * len(temporal_names) + (1,) * len(spatial_names)
                continue
            table = self._encode(city, span) if part == "temporal" else self._embed(city, span)
            tables.append(table)
            names += tuple(f"{part}_{index:03d}" for index in range(table.shape[1]))
            spatial += (int(part == "spatial"),) * table.shape[1]
        return RegionPrompts(np.concatenate(tables, axis=1).astype(np.float32), names, spatial)

    def _encode(self, city: City, span: Span) -> np.ndarray:
        assert self.temporal is not None
        return encode(self.temporal, city, span)

    def _embed(self, city: City, span: Span) -> np.ndarray:
        """Vectors of the regions as if the city came later, also for a source, so that all are made in one way."""
        assert self.embedding is not None
        graph = build_knowledge_graph([city], [span], self.config.graph, centroids=np.asarray(self.centroids))
        own = (f"region:{city.name}/", f"district:{city.name}/")
        foreign = [name != f"city:{city.name}" and not name.startswith(own) for name in self.embedding.entities]
        rows = np.flatnonzero(foreign)
        known = dataclasses.replace(
            self.embedding,
            params={**self.embedding.params, "entities": self.embedding.params["entities"][rows]},
            entities=tuple(self.embedding.entities[row] for row in rows),
        )
        folded = fold_in(known, graph, key=jax.random.key(zlib.crc32(city.name.encode())))
        return np.asarray(folded.vectors([region_name(city, node) for node in city.node_ids]))

    def arrays(self) -> dict[str, Any]:
        """What `from_arrays` needs, with `facts`."""
        held: dict[str, Any] = {}
        if self.temporal is not None:
            held["temporal"] = self.temporal.variables
        if self.embedding is not None:
            held["embedding"] = {"params": self.embedding.params}
            # A graph without SimilarFunction has no classes, and an empty array cannot be written.
            if self.centroids is not None and self.centroids.size:
                held["embedding"]["centroids"] = self.centroids
        return held

    def facts(self) -> dict[str, Any]:
        """Settings and names, as JSON values."""
        named = self.embedding
        names = {} if named is None else {"entities": named.entities, "relations": named.relations}
        return {"config": dataclasses.asdict(self.config), **names}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], facts: dict[str, Any]) -> "PromptEncoder":
        """The encoder that `arrays` and `facts` were taken from.

        Raises:
          InputError: the two do not go together, or have another form.
        """
        check_facts(facts, {"config": _FACTS})
        held = facts["config"]
        graph = {**held["graph"], "relations": tuple(held["graph"]["relations"])}
        config = PromptConfig(
            tuple(held["parts"]),
            TemporalConfig(**held["temporal"]),
            KnowledgeGraphConfig(**graph),
            EmbeddingConfig(**held["embedding"]),
        )
        if ("temporal" in arrays, "embedding" in arrays) != ("temporal" in config.parts, "spatial" in config.parts):
            raise InputError(f"its parts are {', '.join(config.parts)}, and its arrays {', '.join(sorted(arrays))}")
        temporal = None
        if "temporal" in arrays:
            layers, count = config.temporal.encoder_layers + config.temporal.decoder_layers, len(arrays["temporal"])
            if layers > count:  # so many layers would be traced for ever
                raise InputError(f"the temporal encoder has {layers} layers, and {count} groups of arrays")
            check_arrays(arrays["temporal"], shapes_of(abstract_variables(config.temporal)), "prompt_encoder/temporal")
            temporal = TemporalEncoder(jax.device_put(arrays["temporal"]), config.temporal)
        if "embedding" not in arrays:
            return cls(temporal, None, None, config)
        check_facts(facts, {"entities": [str], "relations": [str]})
        names = tuple(facts["entities"]), tuple(facts["relations"])
        spatial = {"centroids": np.zeros((0, 24), np.float32), "params": {}, **arrays["embedding"]}
        sizes = len(names[0]), len(names[1]), config.embedding.width, config.embedding.relation_width
        shapes = shapes_of(jax.eval_shape(lambda: init_tucker(jax.random.key(0), *sizes)))
        check_arrays(spatial["params"], shapes, "prompt_encoder/embedding/params")
        if len(spatial["centroids"]):
            check_arrays(spatial["centroids"], {"": (None, 24)}, "prompt_encoder/embedding/centroids")
        params, centroids = jax.device_put((spatial["params"], spatial["centroids"]))
        return cls(temporal, Embedding(params, jnp.zeros(0), *names, config.embedding), centroids, config)


def fit_prompt_encoder(
    cities: Sequence[City],
    train_spans: Sequence[Span],
    windows: Sequence[Span],
    config: PromptConfig = PromptConfig(),
    *,
    key: Key,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> PromptEncoder:
    """Trains the encoders of a prompt on source cities.

    Args:
      cities: one-channel source cities.
      train_spans: per city, its training span, on which the temporal encoder is pre-trained.
      windows: per city, a span as long as a target's support days, from which its part of the knowledge graph is made.
      config: parts and sizes.
      key: random key.
      checkpoints: folder from which a training that was stopped goes on; see `loop.train`.
      progress: called with (steps done of the temporal encoder, metrics).

    Returns:
      The encoder; nothing is trained for parts that are switched off.

    Raises:
      InputError: see `pretrain_encoder`, `build_knowledge_graph` and `train_embedding`.
      NotFiniteError: a loss is not finite.
    """
    temporal_key, embedding_key = jax.random.split(key)
    temporal, embedding, centroids = None, None, None
    if "temporal" in config.parts:
        kept: Any = {"checkpoints": checkpoints and checkpoints / "temporal", "progress": progress}
        temporal = pretrain_encoder(cities, train_spans, config.temporal, key=temporal_key, **kept)
    if "spatial" in config.parts:
        graph = build_knowledge_graph(cities, windows, config.graph)
        kept = {"checkpoints": checkpoints and checkpoints / "embedding"}
        embedding = train_embedding(graph, config.embedding, key=embedding_key, **kept)
        centroids = jax.device_put(graph.centroids)
    return PromptEncoder(temporal, embedding, centroids, config)


def check_parts(config: PromptConfig, city: City, span: Span) -> None:
    """Raises `InputError` where a part of the prompt cannot be made of a city, before anything is trained.

    Args:
      config: parts and sizes.
      city: a one-channel city.
      span: what a prompt of it is made from.

    Raises:
      InputError: "temporal" and a span that is too long or an interval that does not divide a patch; "spatial" and a
        city without an edge.
    """
    if "temporal" in config.parts:
        check_span(city, span)
        cut_patches(city, span, config.temporal.patch_minutes, config.temporal.bins)
    if "spatial" in config.parts and "BorderBy" in config.graph.relations:
        build_knowledge_graph([city], [span], dataclasses.replace(config.graph, relations=("BorderBy",)))


def plain_encoder() -> PromptEncoder:
    """Prompts of statistics alone, which need no training."""
    return PromptEncoder(None, None, None, PromptConfig())


def columns_of_parts(names: Sequence[str]) -> dict[str, Int[np.ndarray, " X"]]:
    """The columns of a prompt by part, in the order of the prompt.

    Args:
      names: of the columns, as `PromptEncoder.regions` gives them: an encoder's carry the name of their part and a
        number, all others are statistics.

    Returns:
      Per part that the prompt has, the numbers of its columns.
    """
    encoders = [part for part in PARTS if part != "statistics"]
    found: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        part, _, number = name.rpartition("_")
        found.setdefault(part if part in encoders and number.isdigit() else "statistics", []).append(column)
    return {part: np.asarray(columns) for part, columns in found.items()}
