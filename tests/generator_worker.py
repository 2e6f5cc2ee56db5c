"""In: a folder with a saved generator and prompts, and how many devices. Out: what it draws; a process of its own."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.training.compilation_cache import enable_compilation_cache


def main(folder: pathlib.Path, devices: int) -> None:
    """Draws with all devices and writes the leaves."""
    jax.config.update("jax_num_cpu_devices", devices)
    enable_compilation_cache()
    assert len(jax.local_devices()) == devices
    hypernetwork = Hypernetwork.load(folder / "made")
    with np.load(folder / "prompts.npz") as held:
        values, region_ids = jnp.asarray(held["values"]), jnp.asarray(held["region_ids"])
    names = hypernetwork.prompt_names
    prompts = Prompts(values, region_ids, names, tuple("" for _ in names))
    drawn = hypernetwork.generate(prompts, key=jax.random.key(2), config=GenerateConfig(samples=3, steps=4))
    leaves = jax.tree.leaves(drawn.params)
    np.savez(folder / f"drawn_{devices}.npz", **{str(place): np.asarray(leaf) for place, leaf in enumerate(leaves)})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
