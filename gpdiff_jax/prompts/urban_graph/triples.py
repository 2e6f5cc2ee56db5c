"""In: a knowledge graph, or a file of triples, one "head TAB relation TAB tail" a line. Out: the file; checked triples.

Also the split of a graph's triples into those that an embedding learns from and those that it is measured on.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.prompts.urban_graph.knowledge_graph import KnowledgeGraph, Named
from gpdiff_jax.typing import Key

_OWN_CONCEPT = "concept:"


def write_triples(path: str | os.PathLike[str], graph: KnowledgeGraph) -> None:
    """Writes all triples of a graph by names.

    Args:
      path: the file; an existing one is replaced.
      graph: the graph.

    Raises:
      InputError: the file cannot be written.
    """
    lines = "".join(f"{head}\t{relation}\t{tail}\n" for head, relation, tail in graph.named_triples())
    try:
        user_path(path).write_bytes(lines.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose a folder that exists") from None


def read_triples(
    path: str | os.PathLike[str], graph: KnowledgeGraph, relations: Sequence[str] | None = None
) -> list[Named]:
    """Reads triples by names and checks them against a graph; `add_triples` puts them into it.

    Args:
      path: a UTF-8 file; empty lines are skipped.
      graph: every entity must be one of its entities, but for concepts of the user's own, "concept:ANYTHING".
      relations: names that may stand between them; None for the graph's own relations.

    Returns:
      The triples, in the order of the file.

    Raises:
      InputError: the file cannot be read, or one line, which is named, does not have three parts, has a relation that
        is not in `relations`, or an entity that exists nowhere.
    """
    allowed = graph.relations if relations is None else tuple(relations)
    entities = set(graph.entities)
    try:
        text = user_path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    triples: list[Named] = []
    for number, line in enumerate(text.split("\n"), start=1):
        parts = line.removesuffix("\r").split("\t")
        if parts == [""]:
            continue
        if len(parts) != 3 or not all(parts):
            raise InputError(f"{path}, line {number}: {line[:80]!r} must be head, relation and tail, parted by tabs")
        head, relation, tail = parts
        if relation not in allowed:
            raise InputError(
                f"{path}, line {number}: relation {relation!r} is unknown; use one of {', '.join(allowed)}"
            )
        for name in (head, tail):
            if name not in entities and not (name.startswith(_OWN_CONCEPT) and len(name) > len(_OWN_CONCEPT)):
                raise InputError(
                    f"{path}, line {number}: entity {name!r} exists nowhere; name a region (region:CITY/NODE), another "
                    "entity of the graph, or a concept of your own (concept:NAME)"
                )
        triples.append((head, relation, tail))
    return triples


def split_triples(
    triples: Int[np.ndarray, "X 3"], *, validation: float, test: float, key: Key
) -> tuple[Int[np.ndarray, "train 3"], Int[np.ndarray, "validation 3"], Int[np.ndarray, "test 3"]]:
    """Splits triples at random, relation by relation, into training, validation and test.

    A triple and its reverse (b, relation, a) stay together: with one in training the other would be no question.

    Args:
      triples: int32 [X, 3], none twice.
      validation: share of every relation to hold out for choices.
      test: share to hold out for the verdict.
      key: random key.

    Returns:
      Three int32 arrays in the order of `triples`.

    Raises:
      InputError: a share is negative, or they leave nothing to train on.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise InputError(f"`validation` (={validation}) and `test` (={test}) must be shares that add up to less than 1")
    ends = np.sort(triples[:, [0, 2]], axis=1)
    groups, group = np.unique(np.column_stack([triples[:, 1], ends]), axis=0, return_inverse=True)
    lot = np.asarray(jax.random.uniform(key, (len(groups),)))
    part = np.zeros(len(groups), np.int32)
    for relation in np.unique(groups[:, 0]):
        rows = np.flatnonzero(groups[:, 0] == relation)
        rows = rows[np.argsort(lot[rows])]
        held = round(test * len(rows))
        part[rows[:held]] = 2
        part[rows[held : held + round(validation * len(rows))]] = 1
    place = part[group.reshape(-1)]
    return triples[place == 0], triples[place == 1], triples[place == 2]
