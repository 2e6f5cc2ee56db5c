"""In: the state of a training after some steps. Out: a folder from which the training goes on, and the state back.

Source: orbax's `training.Checkpointer`. A save is a temporary folder that is renamed when all is written, so a process
that is killed leaves the last whole one.
"""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.errors import InputError, is_out_of_memory
from gpdiff_jax.training.storage import raise_if_full

_KEPT = 3


def digest_of(words: str, tree: Any) -> str:
    """A hash of words and of every byte of a pytree of arrays and keys, by which one piece of work is known."""
    digest = hashlib.sha256(words.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        host = np.ascontiguousarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), host.shape, str(host.dtype))).encode())
        digest.update(host.tobytes())
    return digest.hexdigest()


class TrainingCheckpoints:
    """The last three states of one training."""

    def __init__(self, folder: pathlib.Path, identity: str) -> None:
        """Opens or makes the folder.

        Args:
          folder: of this training alone.
          identity: what the training is; checkpoints of another are refused.
        """
        self._folder, self._identity = pathlib.Path(folder).expanduser().absolute(), identity
        self._pending: Any = None
        # Typed loosely: orbax's annotations do not admit its own policies, nor pathlib's Path.
        place: Any = self._folder
        policy: Any = ocp.training.preservation_policies.LatestN(_KEPT)
        self._checkpointer = ocp.training.Checkpointer(place, preservation_policy=policy, cleanup_tmp_directories=True)

    def newest(self, state: Any) -> Any:
        """The newest state, or the one given where there is none.

        Args:
          state: a pytree of arrays, as it is before the first step; gives structure, shapes and types.

        Raises:
          InputError: the newest is damaged, or of another training.
        """
        newest = self._checkpointer.latest
        if newest is None:
            return state
        place = self._folder / str(newest.step)
        try:
            custom: Any = self._checkpointer.checkpointables_metadata(newest.step).custom_metadata
            same = custom["identity"] == self._identity
            held = self._checkpointer.load(newest.step, jax.tree.map(np.asarray, state)) if same else None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            self.close()
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"the checkpoint {str(place)!r} is damaged ({type(error).__name__}); move this one folder away to go "
                "on from the checkpoint before it"
            ) from error
        if not same:
            self.close()
            raise InputError(f"{str(self._folder)!r} holds checkpoints of another training; name another folder")
        return held

    def save(self, step: int, state: Any) -> None:
        """Writes a state while the training goes on; waits for the one before it."""
        self._wait()
        identity: Any = {"identity": self._identity}
        self._pending = self._checkpointer.save_async(step, state, force=True, custom_metadata=identity)

    def close(self) -> None:
        """Waits until all is written."""
        self._wait()
        self._checkpointer.close()

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except Exception as error:
                raise_if_full(error, self._folder)
                raise
