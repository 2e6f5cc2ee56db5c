"""In: what users import. Out: every function of it shows an example, and those that need no training run as shown."""

import doctest
import inspect

import pytest

import gpdiff_jax

_EXPORTED = [getattr(gpdiff_jax, name) for name in gpdiff_jax.__all__]
_SHOWN = [one for one in _EXPORTED if inspect.isfunction(one)] + [
    gpdiff_jax.City, gpdiff_jax.Hypernetwork, gpdiff_jax.ParameterZoo, gpdiff_jax.Run, gpdiff_jax.Settings
]  # fmt: skip


@pytest.mark.parametrize("one", _SHOWN, ids=lambda one: one.__name__)
def test_an_example_stands_in_the_docstring_and_runs(one):
    found = [test for test in doctest.DocTestFinder(recurse=False).find(one, one.__name__) if test.examples]
    assert found, f"{one.__name__} shows no example"
    for test in found:
        report: list[str] = []
        assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)
