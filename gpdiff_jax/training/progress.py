"""In: a long stage's advances and metrics, step by step.
Out: progress with the time left on standard error, and JSON lines appended to a log file that survives a kill.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import open_plain
from gpdiff_jax.hosts import is_first

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_LIVE_SECONDS = 0.2
_SPEED_WINDOW_SECONDS = 600.0


class Stage:
    """What `stage` yields: counts what is done, and shows it when it is time to."""

    def __init__(
        self, show: Callable[["Stage"], None], completed: int, interval_seconds: float, clock: Callable[[], float]
    ) -> None:
        """Made by `stage`."""
        self.completed = completed
        self.metrics: dict[str, Any] = {}
        self._show, self._interval, self._clock = show, interval_seconds, clock
        self._shown = clock()
        self.first: tuple[int, float] | None = None  # what was done after the first advance, and when

    def advance(self, n: int = 1, **metrics: Any) -> None:
        """Counts `n` more steps as done and remembers the newest metrics.

        A metric is turned into a number only when it is shown, so a device array handed over at every step costs no
        transfer at every step.
        """
        self.completed += n
        self.metrics.update(metrics)
        now = self._clock()
        if self.first is None:
            self.first = self.completed, now
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(self)


@contextlib.contextmanager
def stage(
    name: str,
    total: int,
    *,
    completed: int = 0,
    console: "rich.console.Console | None" = None,
    interval_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Stage]:
    """Shows the progress of one stage: a live bar on a terminal, now and then a plain line elsewhere.

    Of several hosts the first shows it.

    Args:
      name: the stage's name.
      total: steps it will take, those already done included.
      completed: steps done before, where a killed run resumes; they do not count as speed.
      console: where to print; standard error if None, so that standard output holds results only.
      interval_seconds: the least time between two plain lines.
      clock: seconds, rising.

    Yields:
      The `Stage` whose `advance(n, **metrics)` is to be called.

    Raises:
      InputError: a negative total.
    """
    if total < 0:
        raise InputError(f"`total` (={total}) must be at least 0: the steps of stage {name!r}")
    try:
        with _shown(name, total, completed, console, interval_seconds, clock) as shown:
            yield shown
    except BaseException as error:
        if not hasattr(error, "gpdiff_stage"):  # the innermost
            error.gpdiff_stage = name  # type: ignore[attr-defined]
        raise


def failed_stage(error: BaseException) -> str | None:
    """The name of the stage in which an exception was raised; None where it was none."""
    return getattr(error, "gpdiff_stage", None)


@contextlib.contextmanager
def _shown(
    name: str,
    total: int,
    completed: int,
    console: "rich.console.Console | None",
    interval_seconds: float,
    clock: Callable[[], float],
) -> Iterator[Stage]:
    if not is_first():
        yield Stage(lambda shown: None, completed, interval_seconds, clock)
        return
    import rich.console  # when there is something to show: it takes a tenth of a second

    console = rich.console.Console(stderr=True) if console is None else console
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            bar = stack.enter_context(_bar(console))
            task = bar.add_task(name, total=total, completed=completed, metrics="")

            def update(shown: Stage) -> None:
                bar.update(task, completed=shown.completed, metrics=_format_metrics(shown.metrics))

            current = Stage(update, completed, _LIVE_SECONDS, clock)
            yield current
            update(current)
        else:
            start = clock()

            def print_line(shown: Stage) -> None:
                _print(console, _line(name, shown, total, start, clock()))

            current = Stage(print_line, completed, interval_seconds, clock)
            yield current
            words = [f"{name}: done in {_format_seconds(clock() - start)}", _format_metrics(current.metrics)]
            _print(console, ", ".join(word for word in words if word))


class LogWriter:
    """Appends JSON lines to a file, each flushed; a line that a kill cut short is dropped at the next opening.

    Of several hosts the first writes.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        """Opens the log, making it and its folder if there is none.

        Args:
          path: the file, log.jsonl of a run folder.
          clock: seconds since 1970.

        Raises:
          InputError: a link, a pipe or a folder lies there.
        """
        self._path, self._clock = pathlib.Path(path), clock
        if not is_first():
            self._file = open(os.devnull, "w")  # noqa: SIM115
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_plain(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            os.ftruncate(descriptor, file.read().rfind(b"\n") + 1)

    def write(self, stage: str, step: SupportsInt, **metrics: Any) -> None:
        """Appends one line: the time, the stage, the step and the metrics.

        Args:
          stage: the stage's name.
          step: the step within it.
          **metrics: words, numbers or arrays of numbers, on host or device; a number that is not finite becomes null.
        """
        record = {"time": round(self._clock(), 3), "stage": stage, "step": int(step)}
        record.update({name: _plain(value) for name, value in metrics.items()})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> "LogWriter":
        """Returns the writer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        self.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what a `LogWriter` wrote, whole lines only.

    Args:
      path: the file.

    Returns:
      One dictionary per line, in order; a last line that a kill cut short is left out.

    Raises:
      InputError: a whole line is not a JSON object.
      OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path} is no file; name the log of a run")
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number} is not a JSON object; name the log of a run, or correct that line")
        records.append(record)
    return records


def _bar(console: "rich.console.Console") -> "rich.progress.Progress":
    import rich.progress

    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[metrics]}", markup=False),
        console=console,
        refresh_per_second=5,
        # One dispatch may hold many steps: a short window would forget the speed between two advances.
        speed_estimate_period=_SPEED_WINDOW_SECONDS,
    )


def _print(console: "rich.console.Console", line: str) -> None:
    # soft_wrap: one line stays one line in a log file, whatever width rich assumes for it.
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _line(name: str, shown: Stage, total: int, start: float, now: float) -> str:
    remaining = total - shown.completed
    share = 100.0 * shown.completed / total if total else 100.0
    # Until the first advance it is mostly compiling, which is no measure of what is to come.
    before, since = shown.first or (shown.completed, now)
    done, seconds = shown.completed - before, now - since
    known = remaining == 0 or (done > 0 and seconds > 0)
    left = f"{_format_seconds(seconds * remaining / max(done, 1))} left" if known else "time left unknown"
    words = [f"{name}: {share:3.0f} % ({shown.completed}/{total})", f"{_format_seconds(now - start)} elapsed", left]
    return ", ".join([*words, _format_metrics(shown.metrics)]).removesuffix(", ")


def _format_seconds(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


def _format_metrics(metrics: dict[str, Any]) -> str:
    return " ".join(f"{name}={_format_value(value)}" for name, value in metrics.items())


def _format_value(value: Any) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    return f"{float(value):.4g}"


def _plain(value: Any) -> Any:
    """Returns a value as JSON can hold it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.dtype.kind in "fV" and array.dtype != np.float64:
        # By way of its shortest decimals: a float32 tenth is written as 0.1, not as 0.10000000149.
        array = array.astype(np.float32).astype(str).astype(np.float64)
    return _plain(array.tolist())
