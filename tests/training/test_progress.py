"""In: stages with a clock of the test's own, and log files cut short.
Out: the plain lines, the live bar, and logs that survive a kill.
"""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from gpdiff_jax.errors import InputError
from gpdiff_jax.training import progress


class _Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def _text(console):
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _lines(console):
    return _text(console).splitlines()


def _console(**options):
    return rich.console.Console(file=io.StringIO(), width=40, **options)


def test_plain_lines_come_every_ten_seconds_with_the_time_left():
    clock, console = _Clock(), _console(force_terminal=False)
    with progress.stage("pretrain [big]", 100, console=console, clock=clock) as stage:
        for _ in range(50):
            clock.now += 1.0
            stage.advance(2, loss=jnp.float32(0.12345678), step=stage.completed)
    assert _lines(console) == [
        "pretrain [big]: " + words
        for words in (
            " 20 % (20/100), 0:00:10 elapsed, 0:00:40 left, loss=0.1235 step=18",
            " 40 % (40/100), 0:00:20 elapsed, 0:00:30 left, loss=0.1235 step=38",
            " 60 % (60/100), 0:00:30 elapsed, 0:00:20 left, loss=0.1235 step=58",
            " 80 % (80/100), 0:00:40 elapsed, 0:00:10 left, loss=0.1235 step=78",
            "100 % (100/100), 0:00:50 elapsed, 0:00:00 left, loss=0.1235 step=98",
            "done in 0:00:50, loss=0.1235 step=98",
        )
    ]


def test_steps_done_before_a_resume_are_not_speed():
    clock, console = _Clock(), _console(force_terminal=False)
    with progress.stage("harvest", 100, completed=80, console=console, clock=clock) as stage:
        clock.now = 5.0
        stage.advance(5)
        clock.now = 10.0
        stage.advance(5)
    assert _lines(console)[0] == "harvest:  90 % (90/100), 0:00:10 elapsed, 0:00:10 left"


def test_compiling_before_the_first_advance_is_not_speed():
    clock, console = _Clock(), _console(force_terminal=False)
    with progress.stage("harvest", 4, console=console, clock=clock) as stage:
        for now in (70.0, 71.0, 81.0, 91.0):
            clock.now = now
            stage.advance()
    assert _lines(console)[:3] == [
        "harvest:  25 % (1/4), 0:01:10 elapsed, time left unknown",
        "harvest:  75 % (3/4), 0:01:21 elapsed, 0:00:06 left",
        "harvest: 100 % (4/4), 0:01:31 elapsed, 0:00:00 left",
    ]


def test_short_or_empty_stage_prints_one_line_and_a_failed_one_none():
    console = _console(force_terminal=False)
    with progress.stage("prompts", 0, console=console):
        pass
    with pytest.raises(KeyError), progress.stage("adapt", 3, console=console):
        raise KeyError
    assert _lines(console) == ["prompts: done in 0:00:00"]
    with pytest.raises(InputError, match=r"`total` \(=-1\)"), progress.stage("x", -1, console=console):
        pass


def test_metrics_are_read_only_when_shown():
    class Number:
        reads = 0

        def __float__(self):
            Number.reads += 1
            return 1.0

    clock, console = _Clock(), _console(force_terminal=False)
    with progress.stage("pooled", 30, console=console, clock=clock) as stage:
        for _ in range(30):
            clock.now += 1.0
            stage.advance(loss=Number())
    assert Number.reads == 4


def test_terminal_gets_a_bar_that_ends_full():
    console = rich.console.Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress.stage("adapt", 3, console=console) as stage:
        stage.advance(3, mae=2.5)
    last = _text(console)
    assert "adapt" in last and "100%" in last and "mae=2.5" in last


def test_log_lines_hold_plain_finite_values(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    with progress.LogWriter(path, clock=lambda: 12.34567) as log:
        log.write(
            "pooled", np.int64(3), loss=jnp.float32(0.1), bad=math.inf, worse=jnp.array([1.0, np.nan]), method="m"
        )
        log.write(
            "pooled", 4, half=jnp.bfloat16(0.5), count=np.int32(7), nothing=None, on=True, deep={"a": (1, np.nan)}
        )
        # Flushed line by line: another process sees them while the log is open.
        seen = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in seen] == progress.read_log(path)
    assert progress.read_log(path) == [
        {"time": 12.346, "stage": "pooled", "step": 3, "loss": 0.1, "bad": None, "worse": [1.0, None], "method": "m"},
        {"time": 12.346, "stage": "pooled", "step": 4, "half": 0.5, "count": 7, "nothing": None, "on": True}
        | {"deep": {"a": [1, None]}},
    ]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_by_a_kill_is_dropped_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    with progress.LogWriter(path) as log:
        log.write("pooled", 1, loss=1.0, note="Zürich")
        log.write("pooled", 2, loss=0.5, note="Zürich")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [record["step"] for record in progress.read_log(path)] == [1]
    with progress.LogWriter(path) as log:
        log.write("pooled", 2, loss=0.5, note="Zürich")
    assert [record["step"] for record in progress.read_log(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        progress.read_log(path)


def test_an_exception_knows_the_innermost_stage_that_it_came_from():
    console = rich.console.Console(file=io.StringIO())
    outer, inner = (progress.stage(name, 1, console=console) for name in ("outer", "inner"))
    with pytest.raises(MemoryError) as raised, outer, inner:
        raise MemoryError
    assert progress.failed_stage(raised.value) == "inner" and progress.failed_stage(MemoryError()) is None
