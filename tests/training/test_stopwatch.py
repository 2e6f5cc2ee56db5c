"""In: work with compiling in it. Out: its seconds without the compiling."""

import time

import jax
import jax.numpy as jnp
import pytest

from gpdiff_jax.training import stopwatch
from gpdiff_jax.training.stopwatch import stopwatch as start


def test_compiling_does_not_count_and_sleeping_does():
    jax.clear_caches()

    @jax.jit
    def slow_to_compile(x: jax.Array) -> jax.Array:
        for step in range(150):
            x = jnp.sin(x + step)
        return x

    begin = time.monotonic()
    with start() as first:
        slow_to_compile(jnp.ones(3)).block_until_ready()
        time.sleep(0.05)
    whole = time.monotonic() - begin
    assert 0.05 <= first.seconds < 0.05 + 0.5 * (whole - 0.05)
    with start() as again:
        time.sleep(0.05)
    assert 0.05 <= again.seconds < 0.2


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0.0),
        ([(2.0, 3.0), (5.0, 7.0)], 3.0),
        ([(2.0, 8.0), (3.0, 4.0), (7.0, 9.0)], 7.0),
        ([(-5.0, 2.0), (1.0, 3.0)], 3.0),
    ],
)
def test_a_program_that_is_traced_within_another_counts_once(spans, expected):
    assert stopwatch._covered(spans, 0.0) == expected
