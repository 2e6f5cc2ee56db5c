"""In: a least-squares problem of three weights. Out: a loop that ends alike whatever the devices, parts and stops."""

import os
import pathlib
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpdiff_jax.errors import InputError, NotFiniteError
from gpdiff_jax.training import loop
from gpdiff_jax.training.checkpoints import drop_checkpoints
from gpdiff_jax.training.loop import VALIDATION, Trained, compile_steps, steps_between_evaluations, train
from gpdiff_jax.training.parallel import DEVICES, replicate
from gpdiff_jax.training.step import LossTerm, make_step, start_training

_BATCH, _KEY = 8, jax.random.key(0)
_OPTIMISER = optax.sgd(0.1)


@pytest.fixture(scope="module", name="data")
def _data() -> dict[str, jax.Array]:
    """Rows with weights, some of them zero: a mean over what is there."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5]) + 0.1 * rng.normal(size=64)).astype(np.float32)
    return jax.device_put({"x": x, "y": y, "weight": (rng.random(64) < 0.7).astype(np.float32)})


def _squares(params, data, part, key):
    del key
    rows = (part.step * _BATCH + part.numbers) % 64
    error = data["x"][rows] @ params["w"] - data["y"][rows]
    weight = data["weight"][rows]
    return (weight * error**2).sum(), weight.sum(), {"mean_error": (weight * error).sum()}


def _pull(params, data, part, key):
    """A term whose examples see each other."""
    del data, part, key
    return jnp.square(params["w"]).sum(), jnp.ones(()), {}


def _steps(num_devices: int, accumulate: int = 1, averaging: float = 0.0):
    terms = [LossTerm("squares", _squares, _BATCH), LossTerm("pull", _pull, 1, coefficient=0.01, coupled=True)]
    return make_step(terms, _OPTIMISER, num_devices=num_devices, accumulate=accumulate, averaging=averaging)


def _evaluate(params, data, key):
    del key
    share = 64 // jax.lax.axis_size(DEVICES)
    rows = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
    error = jnp.square(data["x"][rows] @ params["w"] - data["y"][rows]).sum()
    return {VALIDATION: jax.lax.psum(error, DEVICES) / 64}


def _train(data, *, count: int = 1, accumulate: int = 1, averaging: float = 0.0, **change) -> Trained:
    start = start_training({"w": np.zeros(3, data["x"].dtype)}, _OPTIMISER, averaged=averaging > 0)
    options = {"steps": 20, "evaluate_every": 5, "name": "toy", "evaluate": _evaluate, "key": _KEY} | change
    step = _steps(count, accumulate, averaging)
    return train(step, start, data, devices=jax.local_devices()[:count], **options)


def test_the_steps_are_those_of_plain_gradient_descent(data):
    x, y, weight = (np.asarray(data[name], np.float64) for name in ("x", "y", "weight"))
    w, average, norms, lines = np.zeros(3), np.zeros(3), [], []
    for step in range(6):
        rows = np.arange(step * _BATCH, (step + 1) * _BATCH) % 64
        error = x[rows] @ w - y[rows]
        grad = 2 * (weight[rows] * error) @ x[rows] / weight[rows].sum() + 0.02 * w
        norms.append(np.linalg.norm(grad))
        w = w - 0.1 * grad
        average = average + (1 - min(0.5, (1 + step) / (10 + step))) * (w - average)
    made = _train(
        data, steps=6, evaluate_every=6, evaluate=None, averaging=0.5, progress=lambda *line: lines.append(line)
    )
    np.testing.assert_allclose(made.params["w"], average, rtol=1e-5)
    ((done, metrics),) = lines
    assert done == 6 and metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(0.1 * np.mean(norms), rel=1e-5)
    assert metrics["param_norm"] == pytest.approx(np.linalg.norm(w), rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["squares"] + 0.01 * metrics["pull"], rel=1e-5)


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (1, 4), (2, 2)])
def test_devices_and_accumulated_parts_change_nothing_but_rounding(data, count, accumulate):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), data)
        alone, other = _train(wide), _train(wide, count=count, accumulate=accumulate)
    np.testing.assert_allclose(other.params["w"], alone.params["w"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(other.validation, alone.validation, rtol=0, atol=1e-9)


def test_patience_counts_nothing_where_nothing_is_evaluated(data):
    whole = _train(data, steps=9, evaluate_every=9, evaluate=None)
    made = _train(data, steps=9, evaluate_every=1, evaluate=None, patience=2)
    np.testing.assert_allclose(made.params["w"], whole.params["w"], rtol=1e-6)


def test_an_evaluation_follows_every_so_many_steps_and_the_last_stretch_may_be_shorter(data):
    lines: list[int] = []
    made = _train(data, steps=7, evaluate_every=3, progress=lambda done, _: lines.append(done))
    assert lines == [3, 6, 7] and len(made.validation) == 3
    assert [steps_between_evaluations(*pair) for pair in ((1999, 20), (2000, 20), (2002, 20), (5, 20))] == [
        100,
        100,
        101,
        1,
    ]


@pytest.mark.parametrize(
    ("evaluate_every", "calls"), [(20, [4, 4, 4, 4, 4]), (11, [4, 4, 3, 4, 4, 1]), (3, [3] * 6 + [2])]
)
def test_no_call_is_of_more_steps_than_so_many_which_changes_no_bit(data, monkeypatch, evaluate_every, calls):
    asked, compiled = [], loop.compile_steps
    monkeypatch.setattr(
        loop, "compile_steps", lambda step, count, of: (asked.append(count), compiled(step, count, of))[1]
    )
    told = []
    whole = _train(data, evaluate_every=evaluate_every, progress=lambda *given: told.append(given))
    monkeypatch.setattr(loop, "_MOST_STEPS", 4)
    asked.clear()
    heard = []
    made = _train(data, evaluate_every=evaluate_every, progress=lambda *given: heard.append(given))
    assert asked == calls
    np.testing.assert_array_equal(made.params["w"], whole.params["w"])
    np.testing.assert_array_equal(made.validation, whole.validation)
    assert heard == told


def test_every_call_is_waited_for_before_the_next_begins(data, monkeypatch):
    told, compiled, wait = [], loop.compile_steps, jax.block_until_ready
    monkeypatch.setattr(loop, "_MOST_STEPS", 4)
    monkeypatch.setattr(
        loop, "compile_steps", lambda step, count, of: (told.append(count), compiled(step, count, of))[1]
    )
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda tree: (told.append("waited"), wait(tree))[1])
    _train(data, steps=16, evaluate_every=8)
    assert told == [4, "waited"] * 4


def test_a_signal_is_heard_in_the_middle_of_a_stretch(data, monkeypatch):
    asked, compiled = [], loop.compile_steps

    def interrupted(step, count, devices):
        asked.append(count)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return compiled(step, count, devices)

    monkeypatch.setattr(loop, "_MOST_STEPS", 4)
    monkeypatch.setattr(loop, "compile_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(data, steps=4000, evaluate_every=4000)
    assert len(asked) <= 4


def test_the_best_parameters_are_kept_and_patience_ends_a_training(data):
    def rising(params, data, key):
        """Falls once, then rises."""
        far = jnp.abs(params["w"][0] - 0.5)
        return {VALIDATION: far, **_evaluate(params, data, key)} | {VALIDATION: far}

    lines: list[dict] = []
    patient = _train(data, evaluate=rising, steps=40, progress=lambda _, metrics: lines.append(metrics))
    best = int(np.argmin(patient.validation))
    assert abs(float(patient.params["w"][0]) - 0.5) == pytest.approx(patient.validation[best], rel=1e-6)
    stopped = _train(data, evaluate=rising, steps=40, patience=2)
    assert len(stopped.validation) == best + 3 < len(patient.validation)
    np.testing.assert_array_equal(stopped.params["w"], patient.params["w"])


def test_a_step_that_is_not_finite_is_named_after_the_steps_before_it_were_reported(data):
    broken = {**data, "y": data["y"].at[3 * _BATCH].set(jnp.nan), "weight": jnp.ones(64)}
    lines = []
    with pytest.raises(NotFiniteError, match="the toy's loss or its gradient is not finite at step 4; lower"):
        _train(broken, progress=lambda *line: lines.append(line))
    assert [done for done, _ in lines] == [3] and np.isfinite(list(lines[0][1].values())).all()


def test_a_validation_loss_that_is_not_finite_is_raised_not_passed_over(data):
    def broken(params, data, key):
        del data, key
        return {VALIDATION: jnp.where(jnp.abs(params["w"]).sum() > 0, jnp.nan, 0.0)}

    with pytest.raises(NotFiniteError, match="the toy's validation loss is not finite at step 5"):
        _train(data, evaluate=broken)


@pytest.mark.parametrize("batch", [7, 1])
def test_devices_that_cannot_share_a_batch_evenly_change_nothing_but_rounding(data, batch):
    made = []
    for count in (1, 2):
        step = make_step([LossTerm("squares", _squares, batch)], _OPTIMISER, num_devices=count)
        start = start_training({"w": np.zeros(3, np.float32)}, _OPTIMISER)
        options = {"key": _KEY, "steps": 20, "evaluate_every": 5, "name": "toy", "evaluate": _evaluate}
        made.append(train(step, start, data, devices=jax.local_devices()[:count], **options))
    np.testing.assert_allclose(made[1].params["w"], made[0].params["w"], rtol=1e-5)
    np.testing.assert_allclose(made[1].validation, made[0].validation, rtol=1e-5)


def test_a_batch_that_cannot_be_shared_in_parts_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"`batch` \(=8\) .* 2 devices x 3 accumulated parts \(=6\)"):
        _steps(2, 3)


class _Stop(Exception):
    """What a kill is in this process."""


def _until(last: int):
    def progress(done: int, metrics: dict[str, float]) -> None:
        del metrics
        if done >= last:
            raise _Stop

    return progress


@pytest.mark.parametrize("count", [1, 2])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(data, tmp_path, count):
    whole, folder, lines = _train(data, averaging=0.9), tmp_path / "kept", []
    for last in (5, 15):
        with pytest.raises(_Stop):
            _train(data, averaging=0.9, checkpoints=folder, progress=_until(last))
    made = _train(data, count=count, averaging=0.9, checkpoints=folder, progress=lambda *line: lines.append(line))
    assert [done for done, _ in lines] == [20]
    if count == 1:
        np.testing.assert_array_equal(made.params["w"], whole.params["w"])
        np.testing.assert_array_equal(made.validation, whole.validation)
    else:
        np.testing.assert_allclose(made.params["w"], whole.params["w"], rtol=1e-6)
    # A training that is over is read, not run.
    again = _train(data, count=count, averaging=0.9, checkpoints=folder, progress=_until(0))
    np.testing.assert_array_equal(again.params["w"], made.params["w"])
    assert sorted(int(path.name) for path in folder.iterdir()) == [10, 15, 20]


def test_only_checkpoints_are_dropped(data, tmp_path):
    for folder in (tmp_path / "model.checkpoints", tmp_path / "checkpoints" / "stage"):
        _train(data, checkpoints=folder)
        (folder / "8.removed").mkdir()
        (folder / "mine.txt").write_text("of somebody")
        # In the folder of a run it can be but what is left of a checkpoint.
        (folder / "2024" / "mine").mkdir(parents=True)
        drop_checkpoints(folder)
        years = [] if folder.parent.name == "checkpoints" else ["2024"]
        assert sorted(entry.name for entry in folder.iterdir()) == [*years, "mine.txt"]
        (folder / "mine.txt").unlink()
        for year in years:
            shutil.rmtree(folder / year)
        drop_checkpoints(folder)
    assert list(tmp_path.iterdir()) == []
    drop_checkpoints(tmp_path / "absent")


def test_checkpoints_of_another_training_and_damaged_ones_are_refused(data, tmp_path):
    _train(data, checkpoints=tmp_path / "kept")
    with pytest.raises(InputError, match=r"'.*kept' holds checkpoints of another training; name another folder"):
        _train(data, checkpoints=tmp_path / "kept", steps=21)
    for change in ({"settings": "another rate"}, {"key": jax.random.key(9)}, {"evaluate": None}):
        with pytest.raises(InputError, match="holds checkpoints of another training"):
            _train(data, checkpoints=tmp_path / "kept", **change)
    with pytest.raises(InputError, match="holds checkpoints of another training"):
        _train({**data, "y": data["y"] + 1.0}, checkpoints=tmp_path / "kept")
    largest = max((tmp_path / "kept" / "20" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(0, len(content), 97):
        content[place] ^= 4  # one bit
        largest.write_bytes(content)
        with pytest.raises(InputError, match=r"the checkpoint '.*kept/20' is damaged"):
            _train(data, checkpoints=tmp_path / "kept")
        content[place] ^= 4
    largest.write_bytes(content)
    for path in pathlib.Path(tmp_path / "kept" / "20").rglob("*"):
        if path.is_file() and path.stat().st_size > 0 and "metadata" not in path.name.lower():
            path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"the checkpoint '.*kept/20' is damaged .* move this one folder away"):
        _train(data, checkpoints=tmp_path / "kept")


def test_what_others_left_beside_checkpoints_stays(data, tmp_path):
    for name in ("15.bad", "zoo", "7.removed", "9.orbax-checkpoint-tmp-3"):
        (tmp_path / name).mkdir()
    _train(data, checkpoints=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15", "15.bad", "20", "zoo"]


def test_a_step_is_traced_once_however_often_it_is_called():
    chex.clear_trace_counter()
    step = chex.assert_max_traces(_steps(1), n=1)
    devices = tuple(jax.local_devices()[:1])
    state = replicate(start_training({"w": np.zeros(3, np.float32)}, _OPTIMISER), devices)
    data = {"x": np.ones((64, 3), np.float32), "y": np.ones(64, np.float32), "weight": np.ones(64, np.float32)}
    shared = replicate((data, _KEY), devices)
    for _ in range(3):
        state, metrics = compile_steps(step, 4, devices)(state, *shared)
    assert int(state.step[0]) == 12 and metrics["loss"].shape == (1, 4)
