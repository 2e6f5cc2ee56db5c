"""In: processes that are hosts of one job. Out: what one process makes, on each; and one line where they differ."""

import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from gpdiff_jax import hosts
from gpdiff_jax.errors import InputError
from gpdiff_jax.training import exchange
from tests.runs import without_seconds

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(count: int, folder: pathlib.Path, work: str) -> list[subprocess.Popen]:
    """The hosts of a job, each a process of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.hosts_worker"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": _ROOT}
    return [
        subprocess.Popen([*command, str(number), str(count), str(port), str(folder), work], **pipes)
        for number in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[dict]:
    """What they print at their end."""
    ends = [process.communicate(timeout=600) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err[-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_two_hosts_make_what_one_makes(tmp_path):
    (alone,), (first, second) = (ended(start(count, tmp_path / str(count), "parts")) for count in (1, 2))
    assert (alone["hosts"], alone["first"], alone["devices"]) == (1, True, [1, 1])
    # One device of each, for one of them has but one.
    assert [(one["hosts"], one["first"], one["devices"]) for one in (first, second)] == [
        (2, True, [2, 2]),
        (2, False, [2, 2]),
    ]
    assert first["asked"] == second["asked"] == alone["asked"]
    assert (alone["refused"], first["refused"]) == ("no such thing", "no such thing")
    assert second["refused"] == "the first host found: no such thing"
    assert alone["other"] == alone["same"] == first["same"] == second["same"] == ""
    assert first["other"] == second["other"]
    assert first["other"].startswith("host 1 has other numbers than host 0; give every host the same command")
    assert first["large"] == second["large"] == [3000, 6000]
    # As many at a time as fit on the host that has the least.
    assert first["room"]["room"] == second["room"]["room"] == second["room"]["own"] < first["room"]["own"]
    for name in ("rows", "joint", "two", "parts", "pieces", "placed", "chunks"):  # bit by bit
        assert first[name] == second[name] == alone[name], name
    assert alone["two"]["y"] == [0.0, 3.0] and alone["parts"]["y"] == [3.0 * x for x in range(0, 3000, 100)]
    assert alone["joint"] == [x - 9.0 for x in range(7)]
    assert alone["rows"]["y"] == [3.0 * x for x in range(7)] and np.shape(alone["rows"]["wide"]) == (7, 3)
    for name in ("even", "uneven", "small"):
        assert first[name] == second[name], name
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, err_msg=name)
    assert first["read_again"] == second["read_again"] == first["even"]
    kept = sorted(path.name for path in (tmp_path / "2" / "even").iterdir())
    assert kept == ["10", "15", "20"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_of_two_hosts_survives_one_of_them_and_ends_as_that_of_one(finished, data_dir, tmp_path, lost):
    (tmp_path / "cities").symlink_to(data_dir)
    content = finished[1]
    processes = start(2, tmp_path / "run", "whole")
    limit = time.monotonic() + 300
    while not (tmp_path / "run" / "zoo").exists() and time.monotonic() < limit:
        assert processes[0].poll() is None, processes[0].communicate()[1][-2000:]
        time.sleep(0.05)
    assert (tmp_path / "run" / "zoo").exists()
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    processes[lost].communicate()
    _, said = processes[1 - lost].communicate(timeout=60)
    assert processes[1 - lost].returncode != 0 and time.monotonic() - killed < 60
    ours = f"host {1 - lost}: error: another host of this job has ended, its last line says why; start all again"
    # Where the first is lost, JAX may end the other before this program does, in its own words.
    assert ours in said or (lost == 0 and "another task died" in said), said[-2000:]
    if lost == 0:
        return
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    made = ended(start(2, tmp_path / "run", "whole"))
    assert without_seconds(made[0]) == without_seconds(made[1])
    # It goes on with another number of hosts too.
    made[1:] = ended(start(1, tmp_path / "alone", "whole"))
    for name, entry in content["methods"].items():
        for one in made:
            np.testing.assert_allclose(one["methods"][name]["mae"], entry["mae"], rtol=1e-3, err_msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a host that it is there twice")
def test_a_host_that_is_started_twice_is_refused_and_the_job_goes_on(tmp_path):
    processes = start(2, tmp_path, "parts")
    words: Any = processes[1].args
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": _ROOT}
    first, *same = processes[0], processes[1], subprocess.Popen(words, **pipes)
    ends = [(process.communicate(timeout=300), process.returncode) for process in (first, *same)]
    assert ends[0][1] == 0, ends[0][0][1][-2000:]
    (refused,) = [said for (_, said), code in ends[1:] if code == 2]
    assert sorted(code for _, code in ends) == [0, 0, 2]
    assert re.search(r"error: `process_id` \(=1\) of the job at `coordinator` .* runs here already; wait", refused)


@pytest.mark.slow
def test_hosts_that_differ_or_fail_all_end_and_say_why(data_dir, tmp_path):
    (tmp_path / "cities").symlink_to(data_dir)
    for process in start(2, tmp_path / "run", "other"):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2 and "host 1 has other settings than host 0; give every host the same" in said
    assert not (tmp_path / "run").exists()
    first, second = start(2, tmp_path / "run", "fails")
    _, said = first.communicate(timeout=120)
    assert first.returncode == 1 and "KeyError: 'a defect'" in said
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and "error: the first host found: 'a defect'" in said


def test_rows_are_shared_by_hosts_of_unequal_shares(monkeypatch):
    for count, multiple in ((7, 1), (7, 2), (2, 1), (1, 4), (12, 4)):
        shares = []
        for number in range(3):
            monkeypatch.setattr(exchange, "num_hosts", lambda: 3)
            monkeypatch.setattr(exchange, "host_number", lambda number=number: number)
            shares.append(exchange.share_of_rows(count, multiple))
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) % multiple == 0
        rows = np.concatenate(shares)
        np.testing.assert_array_equal(rows[:count], np.arange(count))
        assert (rows[count:] == count - 1).all()


def test_what_is_told_comes_back_as_it_was():
    tree = {"a": [1, 2.5, None, "ü", True], "b": (np.arange(6, dtype=np.int8).reshape(2, 3), {"c": np.zeros((0, 2))})}
    made = exchange.unpack(exchange.pack(tree))
    assert made["a"] == tree["a"] and isinstance(made["b"], tuple)
    for one, other in ((made["b"][0], tree["b"][0]), (made["b"][1]["c"], tree["b"][1]["c"])):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    with pytest.raises(ValueError, match="allow_pickle"):
        exchange.pack({"a": np.array([object()])})


def test_a_job_that_cannot_be_is_refused_before_it_waits():
    refused = {
        (
            "10.0.0.1:80",
            None,
            0,
        ): "`coordinator` (='10.0.0.1:80') needs `num_processes` and `process_id`, or must be auto",
        (
            "auto",
            2,
            None,
        ): "`coordinator` is auto, where the scheduler gives `num_processes` and `process_id`; leave them",
        ("10.0.0.1", 2, 0): "`coordinator` must be name:port, as in 10.0.0.1:8476, or auto, got '10.0.0.1'",
        ("10.0.0.1:99999", 2, 0): "`coordinator` must be name:port, as in 10.0.0.1:8476, or auto, got '10.0.0.1:99999'",
        ("10.0.0.1:80", 2, 2): "`process_id` (=2) must be at least 0 and below `num_processes` (=2)",
    }
    for arguments, message in refused.items():
        with pytest.raises(InputError) as error:
            exchange.connect(*arguments)
        assert str(error.value) == message
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of `coordinator` .* is in use here"):
            exchange.connect(f"127.0.0.1:{port}", 2, 0)
    assert hosts.num_hosts() == 1 and hosts.is_first()


def test_a_first_host_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr(exchange, "_START_SECONDS", 0.5)
    with pytest.raises(
        InputError, match=r"nobody answers at `coordinator` \(='127.0.0.1:1'\): Connection refused; start"
    ):
        exchange.connect("127.0.0.1:1", 2, 1)
