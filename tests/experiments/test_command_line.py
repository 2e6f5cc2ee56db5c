"""In: small experiment scripts written to a temporary folder.
Out: what a user sees of their ends: exit codes, one-line errors and help.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gpdiff_jax import errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_SCRIPT = '''
"""A toy experiment.

It does what --action says.
"""
import errno, os, sys, time
from absl import flags
from experiments import command_line

_ACTION = flags.DEFINE_string("action", "print", "What to do.")
_SEED = flags.DEFINE_integer("seed", 0, "The seed of\\n  every draw.", lower_bound=0)
_RATE = flags.DEFINE_float("rate", 1.0, "How fast.", lower_bound=0.0)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "How to print.")


def main(argv):
    action = _ACTION.value
    if action == "print":
        print("arguments", argv[1:], "format", _FORMAT.value)
    elif action == "input_error":
        from gpdiff_jax.errors import InputError
        raise InputError("`seed` (=7) must be even;\\nchoose 8")
    elif action == "defect":
        raise ValueError("a defect of the program")
    elif action == "disk_full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x")
    elif action == "read_only":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/runs/x")
    elif action == "wrapped_disk_full":
        raise RuntimeError("writer: INTERNAL: write failed: No space left on device")
    elif action == "memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17592186044416 bytes.\\n\\nmany lines")
    elif action == "host_memory":
        raise MemoryError("Unable to allocate 8.00 TiB for an array")
    elif action == "missing":
        open("/no/such/folder/file")
    elif action == "wait":
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    elif action == "many_lines":
        for line in range(200000):
            print("a line of output", line)
    assert "jax" not in sys.modules or action == "input_error"


if __name__ == "__main__":
    command_line.run(main, positional=POSITIONAL)
'''


_FREE = "free some, or write elsewhere"


@pytest.fixture(name="script")
def _script(tmp_path):
    """Returns a function that writes the toy experiment, next to a library of errors alone."""
    library = tmp_path / "gpdiff_jax"
    library.mkdir()
    (library / "__init__.py").write_text("")
    shutil.copy(pathlib.Path(errors.__file__), library / "errors.py")

    def write(positional: str | None = None) -> list[str]:
        path = tmp_path / "toy.py"
        path.write_text(textwrap.dedent(_SCRIPT).replace("POSITIONAL", repr(positional)))
        return [sys.executable, str(path)]

    return write


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"}


def _run(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    # The script's own folder comes first on its path, so the stand-in library wins over the real one.
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, env=_environment())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sed=1"], "error: unknown flag --sed; did you mean --seed?"),
        (["--verbostiy=1"], "error: unknown flag --verbostiy; --help lists the flags"),
        (["--seed=-1"], "error: flag --seed=-1: -1 is not a non-negative integer; --help lists the flags"),
        (["--seed=x"], "error: flag --seed=x: invalid literal for int() with base 10: 'x'; --help lists the flags"),
        (["--action="], "error: --action is empty; give a value, or leave the flag out"),
        (["--rate=nan"], "error: --rate (=nan) must be a finite number"),
        (["--rate", "1e400"], "error: --rate (=inf) must be a finite number"),
        (["--flagfile=/dev/zero"], "error: --flagfile is not taken; give every setting by a flag of its own"),
        (["--flagfile", "x"], "error: --flagfile is not taken; give every setting by a flag of its own"),
        (["stray"], "error: unexpected argument 'stray'; every setting is a flag, --help lists them"),
        (["--action=input_error"], "error: `seed` (=7) must be even; choose 8"),
        (["--action=disk_full"], f"error: no space left on device (/runs/x); {_FREE}"),
        (["--action=missing"], "error: no such file or directory (/no/such/folder/file); name a place that exists"),
        (
            ["--action=wrapped_disk_full"],
            f"error: no space left on device (writer: INTERNAL: write failed: No space left on device); {_FREE}",
        ),
        (
            ["--action=memory"],
            "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 17592186044416 bytes. many lines); "
            "close other programs, or take a machine with more memory",
        ),
        (
            ["--action=host_memory"],
            "error: out of memory (Unable to allocate 8.00 TiB for an array); "
            "close other programs, or take a machine with more memory",
        ),
        (
            ["--action=read_only"],
            "error: read-only file system (/runs/x); give this process the permission, or name another place",
        ),
    ],
)
def test_users_errors_are_one_line_and_exit_code_2(script, words, expected):
    result = _run(script(), *words)
    assert result.returncode == 2
    assert result.stderr == expected + "\n"
    assert result.stdout == ""


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(script):
    home = os.path.expanduser("~")
    result = _run(script("[FILE ...]"), "~/a", "b~", "--action=print")
    assert result.stdout == f"arguments {[f'{home}/a', 'b~']} format text\n"
    result = _run(script(), "--action", "~/x")
    assert result.returncode == 0 and result.stdout == ""
    result = _run(script(), "--format=~/x")
    assert f"flag --format={home}/x" in result.stderr


def test_defect_keeps_its_traceback(script):
    result = _run(script(), "--action=defect")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a defect of the program" in result.stderr


def test_positional_arguments_mix_with_flags_and_are_required_where_named(script):
    command = script("RUN_DIR ...")
    result = _run(command, "a", "--format", "json", "b")
    assert (result.returncode, result.stdout) == (0, "arguments ['a', 'b'] format json\n")
    result = _run(command)
    assert (result.returncode, result.stderr) == (2, "error: missing argument RUN_DIR ...; --help shows the usage\n")
    assert _run(script("[RUN_DIR ...]")).returncode == 0


def test_help_shows_only_the_flags_of_the_module(script):
    result = _run(script("RUN_DIR ..."), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("A toy experiment.\n\nIt does what --action says.\n\nusage: python ")
    assert "[flags] RUN_DIR ...\n" in result.stdout
    assert "  --seed\n      The seed of every draw. (a non-negative integer; default '0')\n" in result.stdout
    assert "  --format\n      <text|json>: How to print. (default 'text')" in result.stdout
    assert "--verbosity" not in result.stdout and "pdb" not in result.stdout


@pytest.fixture
def heed_interrupts():
    """What is started while this lasts heeds SIGINT, also where a shell started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heed_interrupts")
@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_clean_up_and_end_with_their_codes(script, number, code, line):
    process = subprocess.Popen(
        [*script(), "--action=wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (code, "cleaned up\n", line + "\n")


def test_a_stream_that_cannot_take_what_is_said_ends_no_command_that_has_done_its_work(script):
    command = " ".join([*script("[FILE ...]"), "😀"])
    closed = subprocess.run(f"{command} >&- 2>&-", shell=True, env=_environment())
    assert closed.returncode == 0
    narrow = _environment() | {"PYTHONIOENCODING": "ascii"}
    said = subprocess.run(command, shell=True, env=narrow, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "arguments ['\\U0001f600'] format text\n")
    bare = _environment() | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    assert subprocess.run(command, shell=True, env=bare, capture_output=True).returncode == 0
    assert subprocess.run(f"{command} >&-", shell=True, env=bare, capture_output=True).returncode == 0
    quiet = "error: standard output cannot be written (No space left on device)\n"
    loud = f"error: no space left on device ([Errno 28] No space left on device); {_FREE}\n"
    for word, unbuffered, line in (("print", "", quiet), ("print", "1", loud), ("many_lines", "", loud)):
        full = _environment() | {"PYTHONUNBUFFERED": unbuffered}
        words = f"{command} --action={word} >/dev/full"
        said = subprocess.run(words, shell=True, env=full, stderr=subprocess.PIPE, text=True)
        assert (said.returncode, said.stderr) == (2, line)
    stray = _run(script("[FILE ...]"), "--", "--flagfile")
    assert stray.stdout == "arguments ['--flagfile'] format text\n"


def test_gone_reader_is_quiet(script):
    process = subprocess.Popen(
        [*script(), "--action=many_lines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141
    process.stderr.close()
