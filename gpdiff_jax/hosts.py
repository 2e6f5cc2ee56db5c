"""In: the processes of a job, one for each host. Out: which of them this one is.

Every host runs the same command on the same cities. Trainings share their batches over the devices of all hosts, and
rows that do not depend on each other are split over hosts (`training.parallel`). Only the first host touches the folder
of results; what it reads there it tells the others (`training.exchange`), so that they need not see its disk, and all
take the same turns. A process that is not part of such a job is the first host of one. Nothing here imports JAX.
"""

import os
import sys


def num_hosts() -> int:
    """Hosts of the job."""
    jax = sys.modules.get("jax")  # where nobody imported it there is no job, and a file need not wait for it
    return jax.process_count() if jax is not None and jax.distributed.is_initialized() else 1


def host_number() -> int:
    """The number of this host, 0 for the first."""
    return 0 if num_hosts() == 1 else sys.modules["jax"].process_index()


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
