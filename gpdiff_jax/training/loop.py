"""In: a pure step, a state and data. Out: the best parameters, by a training over all devices that can be stopped.

Everything that is trained in this library, but for the regions of the harvest, is trained here.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from gpdiff_jax.errors import NotFiniteError
from gpdiff_jax.hosts import num_hosts
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.checkpoints import TrainingCheckpoints
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import check_agreed
from gpdiff_jax.training.parallel import DEVICES, first_copy, replicate, share
from gpdiff_jax.training.step import Metrics, TrainState
from gpdiff_jax.typing import Device, Key, Params

Step = Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]
Evaluate = Callable[[Params, Any, Key], Metrics]
VALIDATION = "validation_loss"
"""The metric of an evaluation by which the best parameters are chosen; the lower, the better."""

# Of one call: about half a minute where a step takes a second.
_MOST_STEPS = 32


class Trained(NamedTuple):
    """What a training ended with."""

    params: Params  # the best, or the last where nothing was evaluated; on the default device
    validation: Float[np.ndarray, " evaluations"]  # the validation loss after each; fewer where patience ran out


def steps_between_evaluations(steps: int, evaluations: int) -> int:
    """Steps from one evaluation to the next, for at most so many evaluations; the last stretch may be shorter."""
    return -(-steps // evaluations)


def train(
    step: Step,
    state: TrainState,
    data: Any,
    *,
    key: Key,
    steps: int,
    evaluate_every: int,
    devices: Sequence[Device],
    name: str,
    evaluate: Evaluate | None = None,
    evaluate_key: Key | None = None,
    patience: int | None = None,
    checkpoints: pathlib.Path | None = None,
    settings: Any = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """Trains for a number of steps, or until the validation loss stops falling.

    The steps between two evaluations are a few calls of one compiled program, `_MOST_STEPS` at most in each, so that a
    signal is heard between them; what is left of a stretch is another program.

    Args:
      step: of `step.make_step`, made for these devices.
      state: before the first step.
      data: a pytree that every step reads, copied to every device.
      key: of the training; a step folds its number in.
      steps: how many.
      evaluate_every: steps from one evaluation to the next; the last stretch may be shorter.
      devices: D, of `parallel.training_devices`.
      name: of what is trained, for errors.
      evaluate: `evaluate(params, data, key) -> metrics` with a `VALIDATION` among them, mapped over `DEVICES`; every
        device returns the same. None keeps the last parameters.
      evaluate_key: the same for every evaluation; `key` if None.
      patience: evaluations without a lower validation loss after which the training ends; None for all steps, as
        where nothing is evaluated.
      checkpoints: folder for the state after every evaluation, of which the last three are kept. A training that was
        stopped goes on from the last, to the same bits on the same number of devices of a CPU. None keeps none.
      settings: what the step is made of, with a `repr` that tells it. A training whose settings, data, key or start
        are others does not go on from these checkpoints.
      progress: called with (steps done, metrics) after every evaluation: means over the steps since the last of what
        the step logs, but the newest norm of the parameters, and what the evaluation says. Before an error is raised,
        it is called with what the finite steps gave.

    Returns:
      The parameters with the lowest validation loss.

    Raises:
      NotFiniteError: a loss, its gradient or a validation loss is not finite; names the step.
      InputError: the checkpoints are another training's, or damaged; or hosts that share the training bring different
        ones.
    """
    devices = tuple(devices)
    measure = None if evaluate is None else _compile_evaluation(evaluate, devices)
    patience = None if evaluate is None else patience
    best: Params = jax.tree.map(np.asarray, state.kept)
    validation, store = np.full(-(-steps // evaluate_every), np.inf), None
    identity = ""
    if checkpoints is not None or num_hosts() > 1:
        words = repr((name, settings, steps, evaluate_every, evaluate is None))
        identity = digest_of(words, (state, data, key, evaluate_key))
        check_agreed({f"settings or data of the {name}": identity})
    if checkpoints is not None:
        store = TrainingCheckpoints(checkpoints, identity)
        leaves, tree = jax.tree.flatten(state)
        held = store.newest({"state": leaves, "best": best, "validation": validation})
        state, best, validation = tree.unflatten(jax.device_put(held["state"])), held["best"], held["validation"]
    done = int(state.step)
    data, shared_key = share(data, devices), replicate(key, devices)
    asked_key = replicate(key if evaluate_key is None else evaluate_key, devices)
    state = replicate(state, devices)
    with contextlib.ExitStack() as stack:
        if store is not None:
            # Also where the training ends in an exception: what is being written is written to its end.
            stack.callback(store.close)
        while done < steps and not _stale(validation[: -(-done // evaluate_every)], patience):
            count = min(evaluate_every, steps - done)
            curves: list[Metrics] = []
            for part in _calls(count, evaluate_every):
                state, metrics = compile_steps(step, part, devices)(state, data, shared_key)
                curves.append(metrics)
                # A signal is heard when this returns. Accelerators have the next call ready; processors that are many
                # devices have no threads for two at once.
                jax.block_until_ready(curves[-1 if devices[0].platform == "cpu" else -2 :][0])
            of_calls = [first_copy(metrics) for metrics in curves]
            means = _finite_means(jax.tree.map(lambda *parts: np.concatenate(parts), *of_calls), done, name, progress)
            at, done = done // evaluate_every, done + count
            if measure is not None:
                held_out = first_copy(measure(state.kept, data, asked_key))
                if not np.isfinite(held_out[VALIDATION]):
                    if progress:
                        progress(done, means)
                    raise NotFiniteError(
                        f"the {name}'s validation loss is not finite at step {done}; lower its learning rate"
                    )
                means |= {label: float(value) for label, value in held_out.items()}
                if held_out[VALIDATION] < validation.min():
                    best = first_copy(state.kept)
                validation[at] = held_out[VALIDATION]
            elif done == steps:
                best = first_copy(state.kept)
            if store is not None:
                leaves = first_copy(jax.tree.leaves(state))
                store.save(done, {"state": leaves, "best": best, "validation": validation.copy()})
            if progress:
                progress(done, means)
    return Trained(jax.device_put(best), validation[: -(-done // evaluate_every)])


def _calls(count: int, evaluate_every: int) -> list[int]:
    """Steps of every call of a stretch: equal ones, and what is left.

    Where the usual stretch is a multiple of enough steps, nothing is left of it.
    """
    most = min(_MOST_STEPS, evaluate_every)
    each = next((steps for steps in range(most, most // 4, -1) if evaluate_every % steps == 0), most)
    return [each] * (count // each) + [count % each] * (count % each > 0)


def _stale(validation: np.ndarray, patience: int | None) -> bool:
    """Whether the lowest of the losses lies as many evaluations back as one has patience for."""
    return patience is not None and len(validation) > 0 and len(validation) - 1 - int(validation.argmin()) >= patience


def _finite_means(
    curves: dict[str, np.ndarray], done: int, name: str, progress: Callable[[int, dict[str, float]], None] | None
) -> dict[str, float]:
    """Means over steps, after a look at each."""
    finite = np.isfinite(curves["loss"]) & np.isfinite(curves["grad_norm"])
    good = len(finite) if finite.all() else int(finite.argmin())
    means = {label: float(curve[:good].mean()) for label, curve in curves.items()} if good else {}
    if "train_loss" in means:  # the one term of this loss: the same number
        del means["loss"]
    if good:
        means["param_norm"] = float(curves["param_norm"][good - 1])
    if good < len(finite):
        if progress and good:
            progress(done + good, means)
        raise NotFiniteError(
            f"the {name}'s loss or its gradient is not finite at step {done + good + 1}; "
            + ("see what the model makes of its inputs" if done + good == 0 else "lower its learning rate")
        )
    return means


@bounded_cache(16)
def _compile_evaluation(evaluate: Evaluate, devices: tuple[Device, ...]) -> Callable[..., Metrics]:
    return jax.pmap(evaluate, axis_name=DEVICES, devices=devices, axis_size=len(devices))


@bounded_cache(16)
def compile_steps(
    step: Step, count: int, devices: tuple[Device, ...]
) -> Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]:
    """Compiles many steps as one program over devices.

    Args:
      step: of `step.make_step`.
      count: steps of one call.
      devices: that share the work.

    Returns:
      `run(state, data, key) -> (state, metrics)`, everything with a leading axis D; metrics [D, count]. The state is
      given away.
    """

    @functools.partial(jax.pmap, axis_name=DEVICES, devices=devices, axis_size=len(devices), donate_argnums=0)
    def run(state: TrainState, data: Any, key: Key) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, _: step(state, data, key), state, length=count)

    return run
