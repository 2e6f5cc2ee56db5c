"""In: a device's kind. Out: how many rows a device works on side by side where nobody says."""

import jax
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.training.parallel import rows_side_by_side
from gpdiff_jax.transfer.adapt import AdaptConfig
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
