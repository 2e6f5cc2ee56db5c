"""In: the folder of a finished run, and luck. Out: broken and forged folders for what reads a generator or a zoo.

A folder is broken by changing its files, which must never give another result than the whole one. It is forged by
changing what was read from it, before anything was made of that, for a file changed so would not pass its hash.
"""

import io
import json
import pathlib
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.traverse_util
import jax
import numpy as np

import gpdiff_jax as gpd
from gpdiff_jax import hypernetwork_folder
from gpdiff_jax.report.page import write_report
from gpdiff_jax.report.results import read_results
from gpdiff_jax.training import storage
from gpdiff_jax.training.checkpoints import TrainingCheckpoints
from gpdiff_jax.transfer import new_city
from gpdiff_jax.zoo import parameter_zoo
from tests.fuzzing.readers import Reader, changed_arrays, changed_bytes, npz_of

_JSON: tuple[Any, ...] = (
    *(None, -1, 0, 1, 10**9, 10**30, 0.5, float("nan"), float("inf"), True, "", "x", "../x", "<b>", "x" * 3000),
    *([], {}, [None], ["x"], [[]], {"x": 1}),
)


def changed_json(value: Any, luck: random.Random) -> Any:
    """A JSON value with one change somewhere in it."""
    inside = isinstance(value, (dict, list)) and value and luck.random() < 0.9
    if not inside:
        return luck.choice(_JSON)
    made = value.copy()
    place = luck.choice(sorted(made)) if isinstance(made, dict) else luck.randrange(len(made))
    match luck.randrange(6):
        case 0:
            del made[place]
        case 1 if isinstance(made, list):
            made.insert(place, made[place])
        case _:
            made[place] = changed_json(made[place], luck)
    return made


def _forged(module: Any, folder: pathlib.Path, read: Callable[[pathlib.Path], Any], arrays: Any, facts: Any) -> Reader:
    """A reader of what `load_arrays` gave to a module."""
    flat = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(arrays, sep="/").items()}

    def make(luck: random.Random) -> bytes:
        own, said = flat, facts
        if luck.random() < 0.5:
            own = changed_arrays(flat, luck)
        if own is flat or luck.random() < 0.3:
            said = changed_json(facts, luck)
        return pickle.dumps((flax.traverse_util.unflatten_dict(own, sep="/"), said))

    def read_forged(path: pathlib.Path) -> Any:
        with mock.patch.object(module, "load_arrays", lambda *_: pickle.loads(path.read_bytes())):
            return read(folder)

    return Reader(read_forged, "forged.pickle", make)


def _zipped(folder: pathlib.Path, luck: random.Random | None = None) -> bytes:
    """A folder in one file; with luck, one with a change of its files."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if luck is not None:
        name = luck.choice(sorted(files))
        match luck.randrange(5):
            case 0:
                del files[name]
            case 1:
                files[name] = files[luck.choice(sorted(files))]
            case 2:
                files[name] = files[name][: luck.randrange(len(files[name]) + 1)]
            case _:
                files[name] = changed_bytes(files[name], luck)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, held in files.items():
            archive.writestr(name, held)
    return content.getvalue()


def _broken(folder: pathlib.Path, place: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Reader:
    """A reader of folders of which files were changed; what it reads must be what the whole folder holds."""
    whole = jax.tree.leaves(read(folder))

    def read_broken(path: pathlib.Path) -> Any:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with zipfile.ZipFile(path) as archive:
            archive.extractall(place)
        for one, other in zip(jax.tree.leaves(read(place)), whole, strict=True):
            np.testing.assert_array_equal(one, other)

    return Reader(read_broken, "folder.zip", lambda luck: _zipped(folder, luck))


def _run(run: pathlib.Path, place: pathlib.Path, read_run: Callable[[pathlib.Path], Any]) -> Reader:
    """A reader of the files that a page is made of, one of which was changed."""
    names = ("metrics.json", "config.json", "regions.csv", "forecasts.npz", "report.npz", "log.jsonl")
    texts = {name: (run / name).read_bytes() for name in names}
    arrays = {name: dict(np.load(run / name)) for name in names if name.endswith(".npz")}

    def make(luck: random.Random) -> bytes:
        name = luck.choice(names)
        if name in arrays and luck.random() < 0.8:
            return pickle.dumps((name, npz_of(changed_arrays(arrays[name], luck))))
        if name.endswith(".json") and luck.random() < 0.8:
            return pickle.dumps((name, json.dumps(changed_json(json.loads(texts[name]), luck)).encode()))
        return pickle.dumps((name, changed_bytes(texts[name], luck)))

    def read(path: pathlib.Path) -> None:
        changed, content = pickle.loads(path.read_bytes())
        place.mkdir(exist_ok=True)
        for name in names:
            (place / name).write_bytes(content if name == changed else texts[name])
        read_run(place)

    return Reader(read, "run.pickle", make)


def _drawn(run: pathlib.Path) -> None:
    assert "<b>" not in write_report(run).read_text(), "a name is not escaped"


def folder_readers(run: pathlib.Path, folder: pathlib.Path) -> dict[str, Reader]:
    """Every reader of folders, by name.

    Args:
      run: a finished run.
      folder: for what is made of it.
    """
    generator = gpd.Hypernetwork.load(run / "hypernetwork")
    city = gpd.load_city(sorted((run.parent / "cities").glob("*.npz"))[-1])
    new = gpd.prepare_new_city(city, generator)
    parameters = generator.generate(new.prompts, key=jax.random.key(0), config=gpd.GenerateConfig(samples=1, steps=1))
    gpd.save_parameters(folder / "parameters", parameters, new)
    state = {"step": np.asarray(3), "params": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}}
    store = TrainingCheckpoints(folder / "checkpoints", "mine")
    store.save(3, state)
    store.close()
    blank = jax.tree.map(np.zeros_like, state)
    place = pathlib.Path(tempfile.mkdtemp(dir=folder))
    made = (
        ("hypernetwork", run / "hypernetwork", hypernetwork_folder.FORMAT),
        ("zoo", run / "zoo" / "index", parameter_zoo._FORMAT),
        ("parameters", folder / "parameters", new_city._FORMAT),
    )
    held = {name: storage.load_arrays(path, version, name) for name, path, version in made}

    def checkpoint(path: pathlib.Path) -> Any:
        found = TrainingCheckpoints(path, "mine").newest(blank)
        # Where the only one is gone, the training begins anew.
        return state if found is blank else found

    def zoo_arrays(path: pathlib.Path) -> Any:
        zoo = gpd.load_zoo(path)
        return zoo.params, zoo.validation_mae, zoo.prompts.values, zoo.pooled

    return {
        "hypernetwork": _forged(hypernetwork_folder, run, gpd.Hypernetwork.load, *held["hypernetwork"]),
        "zoo": _forged(parameter_zoo, run, gpd.load_zoo, *held["zoo"]),
        "parameters": _forged(new_city, run, gpd.load_parameters, *held["parameters"]),
        "hypernetwork_folder": _broken(
            run / "hypernetwork", place / "hypernetwork", lambda path: gpd.Hypernetwork.load(path).variables
        ),
        "zoo_folder": _broken(run / "zoo", place / "zoo", zoo_arrays),
        "checkpoint_folder": _broken(folder / "checkpoints", place / "checkpoints", checkpoint),
        "run": _run(run, place / "run", read_results),
        "page": _run(run, place / "run", _drawn),
    }
