"""In: a run. Out: for every source city and a generator of the others, what room there is and what is reached of it."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpdiff_jax.analysis.room import LEAST_ROOM, METHODS, RoomConfig, measure_room, own_parameters, refuse_paper
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, write_json
from gpdiff_jax.pretraining import pretrain
from gpdiff_jax.run.columns import in_columns, short_number
from gpdiff_jax.run.stages import Stages
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.progress import stage
from gpdiff_jax.zoo.harvest_cities import harvest_cities

_SHOWN = {
    "historical_average": "mean of days",
    "pooled": "pooled",
    "generated": "generated",
    "generated_shuffled": "shuffled",
    "pooled_adapted": "pooled, tuned",
    "generated_adapted": "generated, tuned",
    "generated_posterior": "posterior",
    "city": "city's own",
    "own": "regions' own",
}


def measure_rooms(run: Stages) -> dict[str, Any]:
    """Leaves out one source city after another, trains a generator on the others, and measures the city's room.

    Args:
      run: of two source cities at least. What is finished is kept in its folder, room/CITY.json and beside it the zoo
        and the generator that never saw the city, and not made again.

    Returns:
      What room.json holds: `cities`, see `measure_room`, and `mean_share` of each method over those with any room.

    Raises:
      InputError: there is but one source city, or the protocol is the paper's; see `harvest_cities` and
        `held_out_targets`.
      NotFiniteError: a loss is not finite.
    """
    refuse_paper(run.settings.data)  # before the first minute of training
    names = list(dict.fromkeys(city.name for city in run.source_cities))
    if len(names) < 2:
        raise InputError(f"the run has the source city {names[0]!r} alone, and leaves out one of several; name more")
    settings, found = run.settings, []
    config = RoomConfig(
        support_days=settings.data.support_days,
        harvest=settings.harvest,
        generate=settings.generate,
        adapt=settings.adapt,
        posterior=settings.posterior,
    )
    for name in names:
        found += _without(run, name, config)
        # Every city has programs of its own; those of five fill what a process may map of memory.
        jax.clear_caches()
    content = {"seed": settings.seed, "cities": found, "mean_share": _mean_share(found)}
    write_json(run.folder / "room.json", content)
    return content


def _held_channels(path: pathlib.Path) -> list[dict[str, Any]] | None:
    """What was measured of a city before; None where nothing was, or it cannot be read, which is said."""
    if not path.exists():
        return None
    try:
        return list(read_json(path)["channels"])
    except (InputError, KeyError, TypeError) as error:
        print(f"{path} is damaged ({error}); it is made again", file=sys.stderr)
        return None


def _without(run: Stages, name: str, config: RoomConfig) -> list[dict[str, Any]]:
    """The rooms of a source city's channels, by a generator that saw none of them."""
    folder = run.folder / "room" / name
    path = folder.with_name(f"{name}.json")
    held = ask_first(lambda: _held_channels(path))
    if held is not None:
        return held
    settings, key = run.settings, run.key(f"room of {name}")
    zoo_key, generator_key, own_key, draw_key = jax.random.split(key, 4)
    others = [city for city in run.source_cities if city.name != name]
    pooled_steps = settings.pooled.steps
    with stage(f"harvest without {name}", pooled_steps + sum(city.num_nodes for city in others)) as shown:

        def report(of: str, done: int, metrics: dict[str, float]) -> None:
            before = {"pooled": 0, "harvest": pooled_steps}.get(of)
            if before is not None:
                shown.advance(before + done - shown.completed, **metrics)

        zoo = harvest_cities(
            others,
            model=settings.model,
            key=zoo_key,
            data=settings.data,
            pooled=settings.pooled,
            config=settings.harvest,
            prompts=settings.prompts,
            folder=folder / "zoo",
            progress=report,
        )
    with stage(f"generator without {name}", settings.pretrain.steps) as shown:
        hypernetwork = pretrain(
            zoo,
            key=generator_key,
            config=settings.pretrain,
            folder=folder / "hypernetwork",
            progress=lambda done, metrics: shown.advance(done - shown.completed, **metrics),
        )
    found, channels = [], [city for city in run.source_cities if city.name == name]
    with stage(f"room of {name}", 2 * len(channels)) as shown:
        for city in channels:
            own = own_parameters(city, run.model, zoo.pooled, settings.data, config, key=own_key)
            shown.advance()
            found.append(measure_room(city, hypernetwork, own, key=draw_key, config=config))
            shown.advance()
    write_json(path, {"channels": found})
    return found


def _mean_share(found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean over the cities that have any room."""
    shares = [one["share"] for one in found if one["room"] > LEAST_ROOM]
    return {name: float(np.mean([share[name] for share in shares])) if shares else None for name in METHODS[2:]}


def room_table(content: dict[str, Any]) -> str:
    """Errors of every city that was left out, and the shares of its room that they reach, as plain text."""
    rows = [("left out", *_SHOWN.values(), "unit")]
    for one in content["cities"]:
        rows.append((one["city"], *(short_number(one["error"][name]) for name in _SHOWN), one["unit"]))
        rows.append((f"  {_percent(one['room'])} of room", *_shares(one["share"]), ""))
    some = [one["room"] for one in content["cities"] if one["room"] > LEAST_ROOM]
    if some:
        rows.append((f"mean of {len(some)}, {_percent(np.mean(some))}", *_shares(content["mean_share"]), ""))
    note = "Below the errors: what part of the room, from the pooled to the best of the city's own, each reaches."
    return "\n".join([*in_columns(rows), note])


def _percent(value: float | np.floating) -> str:
    return f"{100 * value:.1f} %"


def _shares(share: dict[str, float | None]) -> list[str]:
    """Cells beneath the errors: how many percent of the room each method reaches; nothing where there is none."""
    values = (share.get(name) for name in _SHOWN)
    return ["" if value is None else f"{100 * value:+.0f} %" for value in values]
