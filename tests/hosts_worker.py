"""In: a number, how many there are, a port, a folder and what to do. Out: one host of a job, for a test to look at.

It is a process of its own, with as many devices as its number plus one; a job of one is none, and has one device.
"""

import json
import os
import pathlib
import shutil
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tests.tiny  # noqa: F401  registers its model
from experiments import command_line
from gpdiff_jax import hosts
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig
from gpdiff_jax.run.methods import method_forecast
from gpdiff_jax.run.run import Run
from gpdiff_jax.training import exchange, parallel
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.loop import VALIDATION, train
from gpdiff_jax.training.parallel import (
    DEVICES,
    ShardedRows,
    is_counted,
    map_chunks,
    place_rows,
    training_devices,
)
from gpdiff_jax.training.step import LossTerm, make_step, start_training
from gpdiff_jax.transfer.codes import move_along_directions
from gpdiff_jax.transfer.posterior import PosteriorConfig, draw_posterior
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.pooled import broadcast_regions
from tests.runs import tiny_settings

_OPTIMISER = optax.sgd(0.1)


def _squares(params, data, part, key):
    noise = jax.random.normal(key, (64,))[part.numbers]
    error = data["x"][part.numbers] @ params["w"] - data["y"][part.numbers] + 0.1 * noise
    return jnp.square(error).sum(), jnp.full((), part.count, jnp.float32), {}


def _evaluate(params, data, key):
    del key
    return {VALIDATION: jax.lax.pmean(jnp.square(data["x"] @ params["w"] - data["y"]).mean(), DEVICES)}


def _trained(batch: int, folder: pathlib.Path | None, steps: int = 20) -> list[float]:
    rng = np.random.default_rng(0)
    data = jax.device_put({"x": rng.normal(size=(64, 3)).astype(np.float32), "y": np.ones(64, np.float32)})
    devices = training_devices(batch)
    step = make_step([LossTerm("squares", _squares, batch)], _OPTIMISER, num_devices=len(devices))
    start = start_training({"w": np.zeros(3, np.float32)}, _OPTIMISER)
    made = train(
        *(step, start, data),
        key=jax.random.key(0),
        steps=steps,
        evaluate_every=5,
        devices=devices,
        name="toy",
        evaluate=_evaluate,
        checkpoints=folder,
    )
    return np.asarray(made.params["w"]).tolist()


def _refusal(question) -> str:
    try:
        question()
    except InputError as error:
        return str(error)
    return ""


def parts(folder: pathlib.Path) -> dict:
    """What every part of the library that hosts share makes."""
    number = hosts.host_number()
    shared = {"w": np.float32(3.0)}
    rows = {"x": np.arange(7, dtype=np.float32)}
    spread, placed = ShardedRows(_wide, shared), place_rows(rows)
    lines, (room, in_parts) = map_chunks(_wide, shared, rows, size=2), _in_parts(spread)

    def missing() -> None:
        raise InputError("no such thing")

    return {
        "hosts": hosts.num_hosts(),
        "first": hosts.is_first(),
        "devices": [len(training_devices(batch)) for batch in (8, 7)],
        "asked": exchange.ask_first(lambda: {"who": number, "array": np.arange(3), "none": None, "pair": (1, 2.5)}),
        "refused": _refusal(lambda: exchange.ask_first(missing)),
        "other": _refusal(lambda: exchange.check_agreed({"cities": [1, 2], "numbers": number})),
        "same": _refusal(lambda: exchange.check_agreed({"cities": [1, 2]})),
        "large": [len(content) for content in exchange.exchange(bytes(3000 * (number + 1)))],
        "rows": spread(rows).read(),
        "joint": ShardedRows(_apart, shared, joint=True)(rows).read(),
        "two": spread({"x": rows["x"][:2]}).read(),
        "room": room,
        "parts": in_parts,
        "pieces": _in_pieces(),
        "placed": spread(placed).read(),
        "chunks": lines,
        "even": _trained(8, folder / "even"),
        "uneven": _trained(7, None),
        "small": _trained(1, None),
        "read_again": _trained(8, folder / "even"),
    }


def _in_parts(spread: ShardedRows) -> tuple[dict, dict]:
    """What 3000 rows give where there is room for some only, less on this host than on the first."""
    free, rows = 4 * 1000 * 36 // (hosts.host_number() + 1), {"x": np.arange(3000, dtype=np.float32)}
    with mock.patch.object(parallel, "free_bytes", lambda device=None: free):
        made = spread.map(rows)
        room = {"own": spread._fitting(rows, 3000), "room": spread._rows_at_once(rows, 3000)}
    return room, {"y": made["y"][::100], "all": digest_of("", made)}  # a long line is cut by what others print


def _in_pieces() -> str:
    """What 7 rows are that are told in several pieces, the last of them a part of one."""
    mine = exchange.share_of_rows(7)
    rows = {"wide": np.arange(7000, dtype=np.float32).reshape(7, 1000)[mine], "is": (mine % 2 == 0)[:, None]}
    with mock.patch.object(exchange, "_PIECE", 2**12):
        return digest_of("", exchange.gather_rows(rows, 7))


def _apart(shared, rows):
    """How far rows are from the mean of all."""
    x, counted = rows["x"], is_counted(len(rows["x"]), 7)
    return x - shared["w"] * jax.lax.psum(jnp.where(counted, x, 0.0).sum(), DEVICES) / 7.0


def _wide(shared, rows):
    x = rows["x"]
    return {"y": shared["w"] * x, "wide": x[:, None] + jnp.arange(3.0)[None], "int": jnp.int32(x)}


def whole(folder: pathlib.Path) -> dict:
    """A whole run on the cities beside the folder; what metrics.json holds."""
    settings = tiny_settings(folder.parent / "cities", methods=("default",))
    with Run.open(folder, settings) as run:
        return run.evaluate()


def stages(folder: pathlib.Path) -> dict:
    """Makes every stage of the finished run beside the folder again, each of what the stages before it left there."""
    made = {}
    for part, make in [*STAGES.items(), ("together", together)]:
        place = folder / part.replace("/", "-")
        if hosts.is_first():
            shutil.copytree(folder.parent / "finished", place)
            if part in STAGES:
                (shutil.rmtree if (place / part).is_dir() else os.unlink)(place / part)
        exchange.ask_first(lambda: None)  # not before it is there
        with Run.open(place, tiny_settings(folder.parent / "cities", methods=("default",))) as run:
            made[part] = make(run)
    return made["together"]


def together(run: Run) -> dict:
    """How far the regions of the target go, one sample of each, by steps long enough to tell whose mean it is."""
    target, one = run.targets[0], GenerateConfig(samples=1, steps=3)
    start = jax.tree.map(np.asarray, broadcast_regions(run.pooled, target.num_regions))
    how = {"steps": 5, "rate": 1.0, "most_windows": 16, "rows_side_by_side": 1}
    far = jax.tree.map(lambda leaf: 30.0 * leaf, run.hypernetwork.directions)
    moved = move_along_directions(run.model, target, start, far, **how)
    given = run.hypernetwork, target, run.target_prompts[0]
    plain, drawn = (
        draw_posterior(*given, key=jax.random.key(7), generate=one, config=PosteriorConfig(rate=rate))
        for rate in (0.0, 3e4)
    )
    return {"codes": _apart_by_region(start, moved), "posterior": _apart_by_region(plain, drawn)}


def _apart_by_region(one: Params, other: Params) -> list[float]:
    parts = jax.tree.map(lambda a, b: np.square(a - b, dtype=np.float64).reshape(*a.shape[:2], -1).sum(-1), one, other)
    return np.sqrt(sum(jax.tree.leaves(parts)))[0].tolist()


STAGES = {
    "residual_autoregression": lambda run: run.autoregression,
    "boosted_trees": lambda run: run.trees,
    "pooled": lambda run: run.pooled,
    "zoo": lambda run: run.zoo,
    "hypernetwork": lambda run: run.hypernetwork,
    "generated": lambda run: run.generated,
} | {
    f"methods/{method}_0.npz": lambda run, method=method: method_forecast(run, 0, method)
    for method in (
        "target_only",
        "gpdiff_zero_shot",
        "pooled_few_shot",
        "gpdiff_few_shot",
        "gpdiff_posterior_few_shot",
    )
}


def other(folder: pathlib.Path) -> dict:
    """Opens a run of another seed than the other host's."""
    settings = tiny_settings(folder.parent / "cities", seed=hosts.host_number())
    with Run.open(folder, settings):
        return {}


def fails(folder: pathlib.Path) -> dict:
    """Ends the first host by what is no user's error."""

    def broken() -> None:
        raise KeyError("a defect")

    exchange.ask_first(broken)
    return {"folder": str(folder)}


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)


def main(number: int, count: int, port: int, folder: pathlib.Path, work: str) -> None:
    """Does the work and prints what it made, as one line of JSON. A number behind the work is that of the devices."""
    name, _, devices = work.partition(":")
    jax.config.update("jax_num_cpu_devices", int(devices or number + 1))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if count > 1:
        exchange.connect(f"127.0.0.1:{port}", count, number)
    enable_compilation_cache()
    made = {"parts": parts, "whole": whole, "stages": stages, "other": other, "fails": fails}[name](folder)
    print(json.dumps(made, default=_plain), flush=True)


if __name__ == "__main__":
    words, sys.argv = sys.argv[1:], sys.argv[:1]
    number, count, port = map(int, words[:3])
    command_line.run(lambda argv: main(number, count, port, pathlib.Path(words[3]), words[4]))
