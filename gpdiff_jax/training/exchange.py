"""In: a process of a job on several hosts. Out: the others, found by it, and what each of them tells the others."""

import contextlib
import functools
import hashlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpdiff_jax.errors import InputError
from gpdiff_jax.hosts import host_number, is_first, leave, num_hosts
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.typing import Device

_PIECE = 2**28  # bytes that are sent at a time
_LEAST_PIECE = 2**10
_HEARTBEAT_SECONDS = 30
_START_SECONDS = 300
_AXIS = "hosts"


def connect(coordinator: str, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one host of a job; call it before JAX is first used.

    Args:
      coordinator: address of the first host, "name:port", the same on every host; or "auto", where a cluster's
        scheduler (Slurm, Open MPI, Kubernetes, a TPU slice) tells JAX all three.
      num_processes: hosts of the job.
      process_id: number of this one, 0 for the first.

    Raises:
      InputError: arguments that do not go together, or a first host that is not there within five minutes. The first
        waits as long for the others, and is then ended by JAX.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.connect_hosts("10.0.0.1:8476", num_processes=2, process_id=0)  # doctest: +SKIP
    """
    auto = coordinator == "auto"
    if not auto and (num_processes is None or process_id is None):
        raise InputError(f"`coordinator` (={coordinator!r}) needs `num_processes` and `process_id`, or must be auto")
    if auto and (num_processes, process_id) != (None, None):
        raise InputError(
            "`coordinator` is auto, where the scheduler gives `num_processes` and `process_id`; leave them"
        )
    if not auto:
        _check(coordinator, num_processes, process_id)
        _claim(coordinator, process_id)
    # A last checkpoint on SIGTERM is this program's own work.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {} if auto else {"coordinator_address": coordinator}
    given |= {} if auto else {"num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, initialization_timeout=_START_SECONDS
        )
        sys.excepthook = functools.partial(_end_at_once, sys.excepthook)
    except (RuntimeError, ValueError) as error:
        _claimed.clear()
        why = " ".join(str(error).split())[:160]
        if auto:
            raise InputError(
                f"`coordinator` is auto, and JAX finds no scheduler that it knows ({why}); give the address of the "
                "first host, `num_processes` and `process_id`"
            ) from error
        raise InputError(
            f"the hosts did not find each other by `coordinator` (={coordinator!r}): {why}; start the same command on "
            "every host, with the address of the first and a port that is free there"
        ) from error


def _check(coordinator: str, num_processes: Any, process_id: Any) -> None:
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"`coordinator` must be name:port, as in 10.0.0.1:8476, or auto, got {coordinator!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise InputError(
            f"`process_id` (={process_id}) must be at least 0 and below `num_processes` (={num_processes})"
        )
    if process_id != 0:
        _wait_for_first(coordinator)
    else:
        with contextlib.suppress(socket.gaierror), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise InputError(
                    f"port {port} of `coordinator` (={coordinator!r}) is in use here ({error.strerror}); name another "
                    "on every host"
                ) from error


_claimed: list[socket.socket] = []  # open for as long as this process is the host that it says


def _claim(coordinator: str, process_id: Any) -> None:
    """Raises `InputError` where another process of this machine is the same host: it would end the job of both."""
    if sys.platform != "linux":
        return  # whose sockets alone go with the process, whatever ends it
    name = hashlib.sha256(f"{coordinator} {process_id}".encode()).hexdigest()[:32]
    place = socket.socket(socket.AF_UNIX)
    try:
        place.bind(f"\0gpdiff_jax.{name}")
    except OSError:
        place.close()
        raise InputError(
            f"`process_id` (={process_id}) of the job at `coordinator` (={coordinator!r}) runs here already; "
            "wait for its end, or end it"
        ) from None
    _claimed.append(place)


def _wait_for_first(coordinator: str) -> None:
    """Raises `InputError` where nobody answers in time: JAX itself would end the process, many lines long."""
    name, _, port = coordinator.rpartition(":")
    limit = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection((name, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise InputError(
                    f"nobody answers at `coordinator` (={coordinator!r}): {error.strerror or error}; start the same "
                    "command on the first host, with its address"
                ) from error
            time.sleep(0.2)


def _end_at_once(say: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends a host whose error nobody caught: at its own exit it would wait for the others, which wait for it."""
    say(kind, error, trace)
    if threading.current_thread() is threading.main_thread():  # a writer's thread may fail, and the host not
        leave(1)


def ask_first(question: Callable[[], Any]) -> Any:
    """What the first host finds, on every host; all have to ask.

    Args:
      question: called on the first host alone. Its answer is of JSON values and arrays, in dicts with names, lists and
        tuples.

    Returns:
      The answer.

    Raises:
      InputError: the question raised an error on the first host, which raises it as it is.
    """
    if num_hosts() == 1:
        return question()
    answer: Any = None
    error: Exception | None = None
    if is_first():
        try:
            answer = question()
        except Exception as raised:
            error = raised
    content = pack({"answer": answer, "error": None if error is None else str(error)}) if is_first() else b""
    found = unpack(_from_first(content))
    if error is not None:
        raise error
    if found["error"] is not None:
        raise InputError(f"the first host found: {found['error']}")
    return found["answer"]


def check_agreed(parts: Mapping[str, Any]) -> None:
    """Raises `InputError` on every host unless all bring the same JSON values, which are named by what they are of."""
    if num_hosts() == 1:
        return
    held = [json.loads(content) for content in exchange(json.dumps(dict(parts), sort_keys=True).encode())]
    for number, other in enumerate(held):
        different = [name for name in held[0] if other.get(name) != held[0][name]]
        if different:
            raise InputError(
                f"host {number} has other {' and '.join(different)} than host 0; give every host the same command, "
                "files and versions"
            )


def share_of_rows(count: int, multiple: int = 1) -> np.ndarray:
    """The rows of this host.

    Args:
      count: X, rows of the whole.
      multiple: a number of rows that a host takes together.

    Returns:
      Row numbers, as many on every host; after the last row it is repeated. Those of all hosts, one after another,
      begin with 0 to X - 1.
    """
    hosts = num_hosts()
    share = -(-count // (hosts * multiple)) * multiple
    return np.minimum(host_number() * share + np.arange(share), count - 1)


def gather_rows(rows: Any, count: int) -> Any:
    """Rows that hosts made of their shares, on every host.

    Args:
      rows: a pytree of arrays [share, ...], rows of `share_of_rows`.
      count: X.

    Returns:
      Leaves [X, ...], bit by bit what was made.
    """
    if num_hosts() == 1:
        return jax.tree.map(lambda leaf: leaf[:count], rows)
    return jax.tree.map(lambda leaf: _gathered(np.ascontiguousarray(leaf))[:count], rows)


def _gathered(mine: np.ndarray) -> np.ndarray:
    """Arrays of one shape and type of all hosts, one after another; no more than a piece of them is there twice."""
    whole = np.empty((num_hosts() * len(mine), *mine.shape[1:]), mine.dtype)
    places, content = whole.reshape(-1).view(np.uint8).reshape(num_hosts(), -1), mine.reshape(-1).view(np.uint8)
    for first in range(0, len(content), _piece()):
        size = min(len(content) - first, _piece())
        places[:, first : first + size] = _collect(_padded(content[first : first + size], size), "gather")[:, :size]
    return whole


def least_of_hosts(number: int) -> int:
    """The least number that a host brings; all have to ask."""
    return number if num_hosts() == 1 else min(int(held) for held in exchange(str(number).encode()))


def _piece() -> int:
    """Bytes of every host that are sent at a time, so that those of all are no more with more hosts."""
    return max(_LEAST_PIECE, 1 << ((_PIECE // num_hosts()).bit_length() - 1))


def exchange(content: bytes) -> list[bytes]:
    """Tells every host the bytes of all, in the order of the hosts."""
    lengths = [int.from_bytes(row.tobytes(), "little") for row in _collect(_as_array(len(content)), "gather")]
    pieces: list[list[bytes]] = [[] for _ in lengths]
    for first in range(0, max(lengths), _piece()):
        rows = _collect(_padded(content[first : first + _piece()], min(max(lengths) - first, _piece())), "gather")
        for held, row, length in zip(pieces, rows, lengths, strict=True):
            held.append(row.tobytes()[: max(0, min(length - first, _piece()))])
    return [b"".join(held) for held in pieces]


def _from_first(content: bytes) -> bytes:
    """The bytes of the first host; the others' must be empty."""
    length = int.from_bytes(_collect(_as_array(len(content)), "sum").tobytes(), "little")
    pieces = []
    for first in range(0, length, _PIECE):
        size = min(length - first, _PIECE)
        pieces.append(_collect(_padded(content[first : first + _PIECE], size), "sum").tobytes()[:size])
    return b"".join(pieces)


def _as_array(number: int) -> np.ndarray:
    return np.frombuffer(number.to_bytes(8, "little"), np.uint8)


def _padded(content: bytes | np.ndarray, size: int) -> np.ndarray:
    """Bytes as an array of one of few lengths, each of which is a program."""
    length = max(_LEAST_PIECE, 1 << (size - 1).bit_length())
    array = np.zeros(length, np.uint8)
    array[: len(content)] = np.frombuffer(content, np.uint8)
    return array


def _collect(mine: np.ndarray, how: str) -> np.ndarray:
    """One array of every host, uint8 [B]: all of them [H, B], or their sum [B]."""
    here = jax.local_devices()[0]
    sharding = NamedSharding(Mesh(np.asarray([here]), (_AXIS,)), PartitionSpec(_AXIS))
    placed = jax.make_array_from_single_device_arrays((1, len(mine)), sharding, [jax.device_put(mine[None], here)])
    return np.asarray(_collective(how)(placed).addressable_shards[0].data)[0]


@bounded_cache(2)
def _collective(how: str) -> Callable[[Any], Any]:
    devices = one_device_each()
    work = {"gather": jax.lax.all_gather, "sum": jax.lax.psum}[how]
    return jax.pmap(lambda mine: work(mine, _AXIS), axis_name=_AXIS, devices=devices, axis_size=len(devices))


def one_device_each(count: int = 1) -> list[Device]:
    """The first `count` devices of every host, host by host."""
    return [device for host in range(num_hosts()) for device in jax.local_devices(process_index=host)[:count]]


def least_devices() -> int:
    """Devices of the host that has the fewest."""
    return min(len(jax.local_devices(process_index=host)) for host in range(num_hosts()))


def pack(tree: Any) -> bytes:
    """JSON values and arrays, in dicts with names, lists and tuples, as bytes."""
    arrays: list[np.ndarray] = []

    def skeleton(part: Any) -> Any:
        if isinstance(part, dict):
            return {"dict": {name: skeleton(value) for name, value in part.items()}}
        if isinstance(part, (list, tuple)):
            return {type(part).__name__: [skeleton(value) for value in part]}
        if hasattr(part, "dtype"):
            arrays.append(np.asarray(part))
            return {"array": len(arrays) - 1}
        return {"value": part}

    words = json.dumps(skeleton(tree)).encode()
    content = io.BytesIO()
    np.save(content, np.frombuffer(words, np.uint8), allow_pickle=False)
    for array in arrays:
        np.save(content, array, allow_pickle=False)
    return content.getvalue()


def unpack(content: bytes) -> Any:
    """Inverts `pack`; runs nothing of what it reads."""
    file = io.BytesIO(content)
    words = json.loads(np.load(file, allow_pickle=False).tobytes())
    arrays: list[np.ndarray] = []

    def built(part: dict[str, Any]) -> Any:
        ((kind, value),) = part.items()
        if kind == "dict":
            return {name: built(inner) for name, inner in value.items()}
        if kind in ("list", "tuple"):
            made = [built(inner) for inner in value]
            return tuple(made) if kind == "tuple" else made
        if kind == "array":
            while len(arrays) <= value:
                arrays.append(np.load(file, allow_pickle=False))
            return arrays[value]
        return value

    return built(words)
