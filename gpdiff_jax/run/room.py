"""In: a run. Out: for every source city and a generator of the others, what room there is and what is reached of it."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpdiff_jax.analysis.room import METHODS, RoomConfig, measure_room, own_parameters
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json
from gpdiff_jax.pretraining import pretrain
from gpdiff_jax.run.columns import in_columns
from gpdiff_jax.run.stages import Stages
from gpdiff_jax.training.progress import stage
from gpdiff_jax.zoo.harvest_cities import harvest_cities

_SHOWN = {
    "generated": "generated",
    "pooled_adapted": "pooled, tuned",
    "generated_adapted": "generated, tuned",
    "city": "one for the city",
}


def measure_rooms(run: Stages) -> dict[str, Any]:
    """Leaves out one source city after another, trains a generator on the others, and measures the city's room.

    Args:
      run: of two source cities at least. What is finished is kept in its folder, room/CITY.json and beside it the zoo
        and the generator that never saw the city, and not made again.

    Returns:
      What room.json holds: `cities`, see `measure_room`, and `mean_share` of each method over those with any room.

    Raises:
      InputError: there is but one source city; see `harvest_cities` and `held_out_targets`.
      NotFiniteError: a loss is not finite.
    """
    names = list(dict.fromkeys(city.name for city in run.source_cities))
    if len(names) < 2:
        raise InputError(f"the run has the source city {names[0]!r} alone, and leaves out one of several; name more")
    settings, found = run.settings, []
    config = RoomConfig(
        support_days=settings.data.support_days,
        harvest=settings.harvest,
        generate=settings.generate,
        adapt=settings.adapt,
    )
    with stage("room", len(names)) as shown:
        for name in names:
            found += _without(run, name, config)
            # Every city has programs of its own; those of five fill what a process may map of memory.
            jax.clear_caches()
            shown.advance(1, city=name)
    content = {"seed": settings.seed, "cities": found, "mean_share": _mean_share(found)}
    write_json(run.folder / "room.json", content)
    return content


def _without(run: Stages, name: str, config: RoomConfig) -> list[dict[str, Any]]:
    """The rooms of a source city's channels, by a generator that saw none of them."""
    folder = run.folder / "room" / name
    path = folder.with_name(f"{name}.json")
    if path.exists():
        return json.loads(path.read_text())["channels"]
    settings, key = run.settings, run.key(f"room of {name}")
    zoo_key, generator_key, own_key, draw_key = jax.random.split(key, 4)
    zoo = harvest_cities(
        [city for city in run.source_cities if city.name != name],
        model=settings.model,
        key=zoo_key,
        data=settings.data,
        pooled=settings.pooled,
        config=settings.harvest,
        prompts=settings.prompts,
        folder=folder / "zoo",
    )
    hypernetwork = pretrain(zoo, key=generator_key, config=settings.pretrain, folder=folder / "hypernetwork")
    found = []
    for city in run.source_cities:
        if city.name == name:
            own = own_parameters(city, run.model, zoo.pooled, settings.data, config, key=own_key)
            found.append(measure_room(city, hypernetwork, own, key=draw_key, config=config))
    write_json(path, {"channels": found})
    return found


def _mean_share(found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean over the cities whose own parameters are better than the pooled ones."""
    shares = [one["share"] for one in found if one["room"] > 0]
    return {name: float(np.mean([share[name] for share in shares])) if shares else None for name in METHODS[2:-1]}


def room_table(content: dict[str, Any]) -> str:
    """The room of every city in percent of the pooled model's error, and the shares of it that are reached, as text."""
    rows = [("left out", "room", *_SHOWN.values())]
    for one in content["cities"]:
        rows.append((one["city"], f"{100 * one['room']:.1f} %", *(_share(one["share"][name]) for name in _SHOWN)))
    rows.append(("mean", "", *(_share(content["mean_share"][name]) for name in _SHOWN)))
    return "\n".join(in_columns(rows))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
