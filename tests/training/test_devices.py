"""In: a finished run. Out: its stages made again on other numbers of devices and hosts, as near as the table says."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.run.run import Run
from gpdiff_jax.training.storage import load_arrays
from gpdiff_jax.zoo.parameter_zoo import load_zoo
from tests.hosts_worker import STAGES, together
from tests.runs import tiny_settings
from tests.training.test_hosts import ended, start

# The largest difference of an array, as a part of its largest entry, or of its method's largest forecast, as
# docs/scaling.md says too. Where rows do not depend on each other there is none; sums of gradients, and means over a
# city, are of another order.
TOLERANCE = {
    "residual_autoregression": 1e-5,
    "boosted_trees": 0.0,
    "pooled": 1e-5,
    "zoo": 0.0,
    "hypernetwork": 1e-5,
    "generated": 0.0,
    "methods/target_only_0.npz": 0.0,
    "methods/gpdiff_zero_shot_0.npz": 0.0,
    "methods/pooled_few_shot_0.npz": 1e-5,
    "methods/gpdiff_few_shot_0.npz": 1e-5,
    "methods/gpdiff_posterior_few_shot_0.npz": 1e-5,
}


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "devices"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_the_stages_of_the_default_methods_are_the_same_on_any_number_of_devices_and_hosts(
    finished, data_dir, tmp_path, hosts, devices
):
    assert jax.local_device_count() == 2, "what it is compared with"
    (tmp_path / "cities").symlink_to(data_dir)
    shutil.copytree(finished[0], tmp_path / "finished")
    apart = ended(start(hosts, tmp_path / "again", f"stages:{devices}"))
    assert TOLERANCE.keys() == STAGES.keys()
    for part, tolerance in TOLERANCE.items():
        made = _arrays(tmp_path / "again" / part.replace("/", "-") / part)
        wanted = _arrays(tmp_path / "finished" / part)
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
            # How far samples lie apart is a difference of forecasts, as far off as these are.
            scale = wanted["forecast"] if part.startswith("methods/") else other
            largest = np.abs(np.asarray(scale, np.float64)).max(initial=0.0)
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest, err_msg=part)

    shutil.copytree(finished[0], tmp_path / "here")
    with Run.open(tmp_path / "here", tiny_settings(data_dir, methods=("default",))) as run:
        here = together(run)
    for name, distances in here.items():
        assert min(distances) > 1e-3, name  # far enough to tell the mean of all from that of some
        for one in apart:
            np.testing.assert_allclose(one[name], distances, rtol=1e-3, err_msg=name)


def _arrays(place: pathlib.Path):
    """What a stage left."""
    if place.suffix == ".npz":
        with np.load(place) as held:
            return {name: held[name] for name in held.files if name not in ("seconds", "made_of")}
    if place.name == "zoo":
        zoo = load_zoo(place)
        return zoo.params, zoo.validation_mae
    if place.name == "hypernetwork":
        held = Hypernetwork.load(place)
        return held.variables, held.codec, held.directions
    return load_arrays(place, 3, place.name)[0]
