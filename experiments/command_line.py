"""In: the `main` of an experiment module and the words of its command line.
Out: the process's end: its exit code and, on any error that a user can cause, one clear line.
"""

import difflib
import errno
import io
import logging as standard_logging
import math
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

_REMEDIES = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "; give this process the permission, or name another place"
) | {errno.ENOENT: "; name a place that exists"}
_HELP_WORDS = ("--help", "-help", "-h", "-?", "--helpshort")
_OUR_PACKAGES = ("experiments.", "benchmarks.")
_JAX_BACKENDS = "jax._src.xla_bridge"
_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 128 + signal.SIGINT
_EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
_EXIT_TERMINATED = 128 + signal.SIGTERM


class _UsageError(Exception):
    """Words on the command line that the module does not take."""


class _Terminated(BaseException):
    """SIGTERM as an exception, so that `finally` and `with` still clean up; no `except Exception` swallows it."""


def run(main: Callable[[list[str]], object], *, positional: str | None = None) -> None:
    """Parses the flags, runs an experiment's `main` and ends the process.

    The exit code is 0 (or what `main` returns), 2 after an error that a user can cause (one line `error: ...` on
    standard error), 130 after Ctrl-C, 143 after SIGTERM, 141 when the reader of standard output has gone. Any other
    exception is a defect and keeps its traceback.

    Args:
      main: takes the command line without its flags: the program's name, then the positional arguments.
      positional: how the help names the positional arguments, e.g. "RUN_DIR ..."; in brackets, "[RUN_DIR ...]",
          if there may be none. None refuses any.

    Raises:
      SystemExit: always, with the exit code.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    _mend_streams()
    try:
        app.run(lambda argv: _run_and_flush(main, argv), flags_parser=lambda argv: _parse(argv, positional))
    except _Terminated:
        _end("terminated", _EXIT_TERMINATED)
    except KeyboardInterrupt:
        _end("interrupted", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        sys.exit(_EXIT_BROKEN_PIPE)
    except Exception as error:
        if (known := _users(error)) is None:
            raise
        _end(f"error: {_one_line(known)}", _EXIT_ERROR)


def _mend_streams() -> None:
    """A stream that is closed swallows what is said; a letter that its encoding lacks ends no command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _run_and_flush(main: Callable[[list[str]], object], argv: list[str]) -> object:
    # Checkpoint writers log every file at level INFO; progress and results are what a user wants to read.
    logging.set_verbosity(logging.WARNING)
    # Their errors come back as exceptions, and are told in one line; their threads would tell them in hundreds.
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    status = main(argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _UsageError(f"standard output cannot be written ({error.strerror})") from error
    return status


def _on_sigterm(signal_number: int, frame: object) -> None:
    del signal_number, frame
    # A second SIGTERM ends the process at once, should the clean-up hang.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _Terminated


def _end(line: str, exit_code: int) -> None:
    hosts = sys.modules.get("gpdiff_jax.hosts")
    if hosts is not None and hosts.num_hosts() > 1:
        print(f"host {hosts.host_number()}: {line}", file=sys.stderr, flush=True)
        hosts.leave(exit_code)
    print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.exit(exit_code)


def _drop_output() -> None:
    """The interpreter flushes standard output once more at its end, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str], positional: str | None) -> list[str]:
    words = list(argv[1:])
    before = words[: words.index("--") if "--" in words else None]
    if any(word in _HELP_WORDS for word in before):
        print(_help_text(positional))
        sys.stdout.flush()
        sys.exit(0)
    if any(re.match(r"--?flagfile(=|$)", word) for word in before):
        raise _UsageError("--flagfile is not taken; give every setting by a flag of its own")
    remaining = flags.FLAGS([argv[0], *map(_at_home, words)])
    for flag in _our_flags():
        if flag.present and flag.value == "":
            raise _UsageError(f"--{flag.name} is empty; give a value, or leave the flag out")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise _UsageError(f"--{flag.name} (={flag.value}) must be a finite number")
    arguments = remaining[1:]
    if arguments and positional is None:
        raise _UsageError(f"unexpected argument {arguments[0]!r}; every setting is a flag, --help lists them")
    if positional is not None and not positional.startswith("[") and not arguments:
        raise _UsageError(f"missing argument {positional}; --help shows the usage")
    return remaining


def _at_home(word: str) -> str:
    """`--out_dir=~/x` as a shell reads it where the tilde stands first in a word."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{flag}{equals}{os.path.expanduser(value)}"


def _users(error: Exception) -> Exception | None:
    """The error, or the one behind it, where a user can cause and mend it; None for defects of the program."""
    if isinstance(error, (flags.Error, app.UsageError, _UsageError, OSError)):
        return error
    # Not before: `--help` and mistaken flags need not wait for the library, and an error of the library has loaded it.
    from gpdiff_jax.errors import InputError, is_disk_full, is_out_of_memory
    from gpdiff_jax.hosts import check_devices, is_lost_host

    if isinstance(error, InputError) or is_lost_host(error) or is_disk_full(error) or is_out_of_memory(error):
        return error
    if any(frame.f_globals.get("__name__") == _JAX_BACKENDS for frame, _ in traceback.walk_tb(error.__traceback__)):
        try:
            # What JAX raised where it first looked for a device may say nothing of why there is none.
            check_devices()
        except InputError as behind:
            return behind
    return None


def _memory_line(error: BaseException) -> str:
    progress = sys.modules.get("gpdiff_jax.training.progress")
    stage = progress.failed_stage(error) if progress is not None else None
    choices = next(found for name, found in _SMALLER.items() if (stage or "").startswith(name))
    given = [f"{how} --{flag}" for flag, how in choices.items() if flag in flags.FLAGS]
    *first, last = given or ["close other programs, or take a machine with more memory"]
    smaller = ("give " if given else "") + ", ".join([*first, f"or {last}"] if first else [last])
    where = f" in stage {stage}" if stage else ""
    return f"out of memory{where} ({' '.join(str(error).split())[:160]}); {smaller}"


# What to make smaller, by the stage in which memory ran out.
_SMALLER = {
    "harvest": {"regions_per_batch": "a smaller", "preset": "a smaller"},
    "pretrain": {"accumulate": "a larger", "preset": "a smaller"},
    "mlp": {"accumulate": "a larger", "preset": "a smaller"},
    "generate": {"samples": "fewer"},
    "adapt": {"regions_per_batch": "a smaller", "samples": "fewer"},
    "": {"sources": "fewer", "interval_minutes": "a longer", "preset": "a smaller"},
}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, [flag.name for flag in _our_flags()], n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        return f"unknown flag --{error.flagname}; {hint}"
    if missing := re.fullmatch(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.", text):
        choices = getattr(flags.FLAGS[missing[1]].parser, "enum_values", None)
        return f"--{missing[1]} is missing; give {'one of ' + ', '.join(choices) if choices else 'it a value'}"
    if isinstance(error, flags.Error):
        return f"{text.rstrip('.')}; --help lists the flags"
    if isinstance(error, (app.UsageError, _UsageError)):
        return text
    from gpdiff_jax.errors import InputError, is_disk_full, is_out_of_memory
    from gpdiff_jax.hosts import is_lost_host

    if not isinstance(error, InputError) and is_lost_host(error):
        why = textwrap.shorten(text, 120, placeholder=" ...")
        return f"another host of this job has ended, its last line says why; start all again to go on ({why})"
    if is_disk_full(error):
        place = error.filename if isinstance(error, OSError) and error.filename is not None else None
        where = f" ({place})" if place is not None else f" ({text[:160]})"
        elsewhere = "name an --out_dir elsewhere" if "out_dir" in flags.FLAGS else "write elsewhere"
        return f"no space left on device{where}; free some, or {elsewhere}"
    if is_out_of_memory(error):
        return _memory_line(error)
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0, "") if error.filename is not None else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{where}{remedy}"
    return text or type(error).__name__


def _help_text(positional: str | None) -> str:
    """Returns the module's docstring and the flags that it and the other modules of ours define."""
    main_module = sys.modules["__main__"]
    spec = getattr(main_module, "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None else f"python {sys.argv[0]}"
    lines = [(main_module.__doc__ or "").strip(), "", f"usage: {program} [flags] {positional or ''}".rstrip(), ""]
    for flag in _our_flags():
        lines += _flag_lines(flag)
    return "\n".join(lines).strip()


def _our_flags() -> list[flags.Flag]:
    """The module's own flags first, then those of the modules it imports, each group in the order of definition."""
    by_module = flags.FLAGS.flags_by_module_dict()
    ours = [name for name in by_module if name == sys.argv[0] or name.startswith(_OUR_PACKAGES)]
    return [flag for name in sorted(ours, key=lambda name: name != sys.argv[0]) for flag in by_module[name]]


def _flag_lines(flag: flags.Flag) -> list[str]:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    notes = [str(flag.parser.syntactic_help or "")]
    if flag.default not in (None, ""):
        notes.append(f"default {flag.default_as_str}")
    text = f"{' '.join((flag.help or '').split())} ({'; '.join(note for note in notes if note)})"
    return [
        f"  {name}",
        *textwrap.wrap(text.replace(" ()", ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


__all__ = ["run"]
