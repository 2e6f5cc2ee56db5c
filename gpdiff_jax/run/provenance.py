"""In: a stage of a run in its folder, and what config.json says. Out: a note of what it is made of, or a refusal.

A folder of another run, copied to where a stage is to lie, would be read as this run's own.
"""

import pathlib
from typing import Any

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, write_json
from gpdiff_jax.hosts import is_first
from gpdiff_jax.run.folder import differences
from gpdiff_jax.training.exchange import ask_first

_NOTE = "made_of.json"
_SOURCES = ("sources", "simulation", "interval_minutes", "channels", "seed", "data", "model", "model_file_sha256")
_ZOO = ("prompts", "pooled", "harvest")
_GENERATOR = (*_ZOO, "pretrain")
# The settings that each stage hangs on beside those of the sources; of any other name, those of a generator.
_STAGES = {
    "prompt_encoder": ("prompts",),
    "prompts": ("prompts",),
    "pooled": ("pooled",),
    "meta_learned": ("pooled",),
    "residual_autoregression": ("pooled",),
    "boosted_trees": ("trees",),
    "zoo": _ZOO,
    "generated": (*_GENERATOR, "generate", "target"),
    "generated_for_choice": (*_GENERATOR, "generate", "target"),
}


def note_stage(folder: pathlib.Path, stage: str) -> None:
    """Notes in the folder of a finished stage what it is made of.

    Args:
      folder: of the run.
      stage: the name of the stage and its folder.
    """
    if is_first():
        write_json(folder / stage / _NOTE, _made_of(folder, stage))


def check_stage(folder: pathlib.Path, stage: str) -> None:
    """Raises `InputError` where a stage in a run's folder is made of something else; all hosts have to ask.

    One without a note, as a process leaves it that is killed right before, or an earlier version, is taken and noted.

    Args:
      folder: of the run.
      stage: the name of the stage and its folder.
    """

    def difference() -> str | None:
        path = folder / stage / _NOTE
        if not path.exists():
            write_json(path, _made_of(folder, stage))
            return None
        held, wanted = read_json(path), _made_of(folder, stage)
        return next(differences(held, wanted), None)

    found = ask_first(difference)
    if found is not None:
        raise InputError(f"{str(folder / stage)!r} is another run's ({found}); remove it, and it is made anew")


def _made_of(folder: pathlib.Path, stage: str) -> dict[str, Any]:
    """What a stage of the run in a folder is made of: settings, and by what the readings of cities are known."""
    held = read_json(folder / "config.json")
    settings = {name: held["settings"][name] for name in (*_SOURCES, *_STAGES.get(stage, _GENERATOR))}
    target = held["settings"]["target"]
    cities = {city: digest for city, digest in held["cities"].items() if city != target or "target" in settings}
    return {"stage": stage, "settings": settings, "cities": cities}
