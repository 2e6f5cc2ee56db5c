"""In: the processes of a job, one for each host. Out: which of them this one is.

Every host runs the same command on the same cities. Trainings share their batches over the devices of all hosts, and
rows that do not depend on each other are split over hosts (`training.parallel`). Only the first host touches the folder
of results; what it reads there it tells the others (`training.exchange`), so that they need not see its disk, and all
take the same turns. A process that is not part of such a job is the first host of one. Nothing here imports JAX.
"""

import os
import sys

from gpdiff_jax.errors import InputError


def num_hosts() -> int:
    """Hosts of the job."""
    jax = sys.modules.get("jax")  # where nobody imported it there is no job, and a file need not wait for it
    return jax.process_count() if jax is not None and jax.distributed.is_initialized() else 1


def host_number() -> int:
    """The number of this host, 0 for the first."""
    return 0 if num_hosts() == 1 else sys.modules["jax"].process_index()


def check_devices() -> None:
    """Raises `InputError` where JAX cannot use the devices that it is told to use, before anything else fails by it."""
    jax = sys.modules.get("jax")
    try:
        _ = jax is None or jax.devices()
    except (RuntimeError, AssertionError) as error:
        told = os.environ.get("JAX_PLATFORMS")
        where = f"that JAX_PLATFORMS (={told}) names" if told else "of this machine"
        reason = " ".join(str(error).split())[:160] or "no such platform in this installation of JAX"
        raise InputError(f"JAX cannot use the devices {where} ({reason}); unset JAX_PLATFORMS, or mend JAX") from error


def is_first() -> bool:
    """Whether this host reads and writes for all."""
    return host_number() == 0


def is_lost_host(error: BaseException) -> bool:
    """Whether an error says that another host of the job has ended."""
    text = str(error)
    return num_hosts() > 1 and any(word in text for word in ("Gloo", "gloo", "NCCL", "onnection", "oordination"))


def leave(code: int) -> None:
    """Ends this process at once: its exit must not wait for hosts that wait for it. Alone, it does nothing."""
    if num_hosts() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
