"""In: the state of a training after some steps. Out: a folder from which the training goes on, and the state back.

A save of orbax is a temporary folder that is renamed when all is written, so a process that is killed leaves the last
whole one. Orbax's own `training.Checkpointer` would have every host of a job write.
"""

import contextlib
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.errors import InputError, is_out_of_memory
from gpdiff_jax.files import user_path
from gpdiff_jax.hosts import is_first
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.orbax_calls import calling_orbax
from gpdiff_jax.training.storage import MARK, raise_if_full

_FOLDER = "checkpoints"
_KEPT = 3
_LEFT = re.compile(r"\d+\.(removed|orbax-checkpoint-tmp.*)")  # what a killed process was removing, or writing


def checkpoints_of(folder: pathlib.Path, stage: str) -> pathlib.Path:
    """Where the training of a stage that leaves its result in a folder keeps its checkpoints."""
    return folder / _FOLDER / stage


def checkpoints_beside(folder: pathlib.Path) -> pathlib.Path:
    """Where the training of what a folder gets keeps its checkpoints, for a folder that a user names."""
    return folder.with_name(f"{folder.name}.{_FOLDER}")


def drop_checkpoints(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a training whose result is written, and nothing else; of several hosts the first does.

    It is called whenever the result is read, too: the process that wrote it may have been killed before it came here.

    Args:
      folder: what `TrainingCheckpoints` was given; a folder around it that `checkpoints_of` named goes with the last.
    """
    if not is_first():
        return
    own = folder.parent.name == _FOLDER
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():  # one that a user named may hold more
            if entry.name.isdecimal() and (own or (entry / MARK).is_file()):
                _remove(entry)
            elif entry.name.isdecimal():
                with contextlib.suppress(OSError):  # unless it holds something else
                    entry.rmdir()
            elif _LEFT.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        folder.rmdir()
    if own:
        with contextlib.suppress(OSError):  # others are there
            folder.parent.rmdir()


class TrainingCheckpoints:
    """The last three states of one training; of several hosts the first keeps them for all."""

    def __init__(self, folder: pathlib.Path, identity: str) -> None:
        """Opens or makes the folder.

        Args:
          folder: of this training alone.
          identity: what the training is; checkpoints of another are refused.
        """
        self._folder, self._identity = user_path(folder).absolute(), identity
        self._pending: Any = None
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.iterdir():
                if _LEFT.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)

    def newest(self, state: Any) -> Any:
        """The newest state, or the one given where there is none.

        Args:
          state: a pytree of arrays, as it is before the first step; gives structure, shapes and types.

        Raises:
          InputError: the newest is damaged, or of another training.
        """
        tree = jax.tree.structure(state)
        held = ask_first(lambda: self._newest(state))
        return state if held is None else tree.unflatten(held)

    def _newest(self, state: Any) -> list[Any] | None:
        """The leaves of the newest state."""
        if not self._steps():
            return None
        place: Any = self._folder / str(self._steps()[-1])  # typed loosely: orbax does not admit pathlib's Path
        try:
            with calling_orbax():
                custom: Any = ocp.metadata(place).custom_metadata
                same = custom["identity"] == self._identity
                held = ocp.load(place, jax.tree.map(np.asarray, state)) if same else None
                if same and digest_of("", held) != custom["sha256"]:
                    raise ValueError("not what was written")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"the checkpoint {str(place)!r} is damaged ({type(error).__name__}); move this one folder away to go "
                "on from the checkpoint before it"
            ) from error
        if not same:
            raise InputError(f"{str(self._folder)!r} holds checkpoints of another training; name another folder")
        return jax.tree.leaves(held)

    def save(self, step: int, state: Any) -> None:
        """Writes a state while the training goes on; waits for the one before it."""
        if not is_first():
            return
        self._wait()
        place: Any = self._folder / str(step)
        facts: Any = {"identity": self._identity, "sha256": digest_of("", state)}
        with calling_orbax():
            self._pending = ocp.save_async(place, state, overwrite=True, custom_metadata=facts)

    def close(self) -> None:
        """Waits until all is written."""
        self._wait()

    def _steps(self) -> list[int]:
        return sorted(int(entry.name) for entry in self._folder.iterdir() if entry.name.isdecimal())

    def _wait(self) -> None:
        """Waits for what is being written, and removes what is too old then."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with calling_orbax():
                pending.result()
        except Exception as error:
            raise_if_full(error, self._folder)
            raise
        for step in self._steps()[:-_KEPT]:
            _remove(self._folder / str(step))


def _remove(checkpoint: pathlib.Path) -> None:
    """Removes it, by another name first: a kill must not leave a part of it that looks like a checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.removed")), ignore_errors=True)
