"""In: the command line of pytest. Out: the order of the files, the options --slow and --compilations, and JAX set up.

The process that only hands files out to workers does without JAX, which would cost it ten seconds.
"""

import pytest

_LONGEST_FIRST = (
    "test_models.py",
    "test_harvest.py",
    "test_transfer.py",
    "test_methods.py",
    "test_training.py",
    "test_leak.py",
    "test_temporal.py",
    "test_users.py",
    "test_library.py",
    "test_encoders.py",
    "test_embedding.py",
)
_DESELECTED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--compilations", action="store_true", help="say how many programs every test file compiles")


def pytest_configure(config: pytest.Config) -> None:
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.world")
        config.pluginmanager.import_plugin("tests.finished")
    if config.getoption("--compilations"):
        config.pluginmanager.import_plugin("tests.compilations")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A worker takes whole files, in this order: a long one at the end would be waited for.
    place = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    slow = [] if config.getoption("--slow") else [item for item in items if item.get_closest_marker("slow")]
    config.stash[_DESELECTED] = [item.nodeid for item in slow]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    deselected = config.stash.get(_DESELECTED, [])
    if deselected:
        terminalreporter.write_line(f"left out {len(deselected)} slow tests, --slow runs them:")
        for nodeid in deselected:
            terminalreporter.write_line(f"  {nodeid}")
