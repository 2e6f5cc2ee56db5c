"""In: a device's kind, arrays to share. Out: how many rows suit a device; one copy of what is shared, however often."""

import gc

import jax
import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.training import parallel
from gpdiff_jax.training.parallel import rows_side_by_side, share
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.zoo.region_training import HarvestConfig


def test_one_row_suits_a_cpu_and_many_an_accelerator(monkeypatch):
    assert HarvestConfig().regions_per_batch is None and AdaptConfig().regions_per_batch is None
    assert (rows_side_by_side(None), rows_side_by_side(5)) == (1, 5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (rows_side_by_side(None), rows_side_by_side(5)) == (64, 5)
    with pytest.raises(InputError, match="`regions_per_batch` must be at least 0, got -1"):
        HarvestConfig(regions_per_batch=-1)
    with pytest.raises(InputError, match="`regions_per_batch` must be at least 1, got 0"):
        AdaptConfig(regions_per_batch=0)


def test_what_is_shared_is_copied_to_every_accelerator_once_and_kept_no_longer_than_it_lives(monkeypatch):
    put, made = jax.device_put, []
    monkeypatch.setattr(parallel, "_is_host_memory", lambda devices: False)
    # A copy, as on an accelerator: on a CPU it would look at the same memory.
    monkeypatch.setattr(jax, "device_put", lambda x, device: made.append(x.shape) or put(np.array(x), device))
    large, small, key = put(np.arange(2**18, dtype=np.float32)), put(np.float32(3)), jax.random.key(0)
    devices = jax.local_devices()
    first = share({"large": large, "small": small, "key": key}, devices[:1])
    again = share({"large": large, "small": small, "key": key}, devices[:1])
    both = share(large, devices[:2])
    assert made.count((1, 2**18)) == 2  # one on each of the two
    assert made.count((1,)) == 2 and again["key"].shape == (1,)
    np.testing.assert_array_equal(both, np.stack([large, large]))
    np.testing.assert_array_equal(first["large"][0], again["large"][0])
    assert len(parallel._copies) == 2
    del large
    gc.collect()
    assert len(parallel._copies) == 0


def test_on_a_cpu_what_is_shared_takes_no_memory_of_its_own():
    array = jax.device_put(np.arange(2**19, dtype=np.float32))
    copy = share(array, jax.local_devices()[:1])
    assert copy.addressable_shards[0].data.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert len(parallel._copies) == 0
