"""In: the `main` of an experiment and the words of its command line. Out: how it ends, in this process.

A process of its own takes three seconds to import JAX. That exit codes reach the shell is shown once, elsewhere.
"""

import contextlib
import io
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from absl.testing import flagsaver

from experiments import command_line


def run_here(
    main: Callable[[list[str]], object], *words: str, cwd: pathlib.Path, positional: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; flags, folder and signal handlers are as before afterwards."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["command", *words])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                command_line.run(main, positional=positional)
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess([*words], 0 if code is None else int(code), out.getvalue(), err.getvalue())
