"""In: the name of a case of `benchmarks.scaling`. Out: what its processes print, and what of it is kept."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any


def run_case(name: str, seconds: float) -> tuple[list[str], str | None]:
    """Measures a case in processes of its own.

    Args:
      name: of the case.
      seconds: the longest that it may take; then its processes are ended.

    Returns:
      The lines that the first process printed, and why the case did not end, or None.
    """
    kind, _, rest = name.partition("_")
    count = int(rest.partition("_")[0])
    hosts = count if kind == "hosts" else 1
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes, deadline, error = [], time.monotonic() + seconds, None
    with contextlib.ExitStack() as stack:
        # Files, which unlike pipes are never full.
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(hosts)]
        try:
            for number, output in enumerate(outputs):
                words = [sys.executable, "-m", "benchmarks.scaling", f"--case={name}", f"--process_id={number}"]
                words += [f"--coordinator={address}"] if hosts > 1 else []
                core = ["taskset", "--cpu-list", str(number)] if kind == "hosts" else []
                # Devices that wait for each other need threads; more of them than cores slow down who does not wait.
                threads = {"devices": str(2 * count), "hosts": "2"}.get(kind)
                environment = {**os.environ, **({} if threads is None else {"PJRT_NPROC": threads})}
                processes.append(subprocess.Popen([*core, *words], stdout=output, env=environment))
            for process in processes:
                process.wait(timeout=max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            error = f"case {name!r} takes more than {seconds / 60:g} minutes; give it more --minutes"
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if error is None and any(process.returncode for process in processes):
            error = f"case {name!r} failed; its own message says why"
        outputs[0].seek(0)
        return outputs[0].read().splitlines(), error


def kept(held: list[dict[str, Any]], name: str, said: list[str], error: str | None) -> list[dict[str, Any]]:
    """The lines of all results after a case was measured.

    Args:
      held: those before, in which the case may stand unfinished.
      name: of the case.
      said: what its first process printed.
      error: why it did not end, or None where it did.

    Returns:
      The lines; of a case that did not end, those of the try that came further, marked as unfinished.
    """
    # The hosts' network says more, and what is ended may end within a line.
    lines = [json.loads(line) for line in said if line.startswith("{") and line.endswith("}")]
    if error is not None:
        lines = [line | {"unfinished": error} for line in lines]
        before = [line for line in held if line["case"] == name]
        lines = before if len(before) > len(lines) else lines
    return [*(line for line in held if line["case"] != name), *lines]
