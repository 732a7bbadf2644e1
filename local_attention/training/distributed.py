"""Data parallelism: several processes, started by ``msrun``, train one model together."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import mindspore as ms
import numpy as np
from mindspore import communication, nn, ops

from local_attention.training.config import RunConfig
from local_attention.training.errors import RunError, UsageError
from local_attention.training.schema import as_dict, flatten

if TYPE_CHECKING:
    from data import Corpus

# Seconds that a process on a CPU waits for another one in a collective operation. MindSpore's default of 30 s is short
# if the other one writes a checkpoint to a slow disk. If it has died, this is how long the user waits for the error.
COLLECTIVE_TIMEOUT_S = "45"

T = TypeVar("T")

log = logging.getLogger("train")


class Collective(nn.Cell):
    """A communication primitive as a graph, as most of them do not run eagerly on CPUs."""

    def __init__(self, primitive: ops.Primitive) -> None:
        super().__init__()
        self.primitive = primitive

    def construct(self, x):
        return self.primitive(x)


class Broadcast(Collective):
    def construct(self, x):
        return self.primitive((x,))[0]


def identity(x: ms.Tensor) -> ms.Tensor:
    return x


class Distributed:
    """The processes that train together, and the communication between them.

    Methods that communicate must be called by all processes, in the same order.

    Args:
        rank: 0 … world_size - 1. The process of rank 0 is the main process, which alone writes to the run directory.
        world_size: the number of processes.
        all_gather: ``(n,) -> (world_size * n,)`` int32, concatenates the arrays of all processes.
        broadcast: ``(n,) -> (n,)`` int32, returns the array of rank 0.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        all_gather: Callable[[ms.Tensor], ms.Tensor] = identity,
        broadcast: Callable[[ms.Tensor], ms.Tensor] = identity,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._all_gather, self._broadcast = all_gather, broadcast

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def set_seed(self, seed: int) -> None:
        """Seed MindSpore. Each process gets another seed, so that dropout differs; weights are broadcast later."""
        ms.set_seed((seed + self.rank) % 2**32)

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        """Stack the arrays of all processes, which have one shape and dtype: ``(world_size, *array.shape)``."""
        array = np.ascontiguousarray(array)
        if self.world_size == 1:
            return array[None]
        bits = run_collective(self._all_gather, as_bits(array)).reshape(self.world_size, -1)
        return np.stack([from_bits(row, array) for row in bits])

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Return the result of ``make()`` of the main process to all processes; the others do not call ``make``."""
        if self.world_size == 1:
            return make()
        pickled = np.frombuffer(pickle.dumps(make()) if self.is_main else b"", np.uint8)
        size = int(run_collective(self._broadcast, np.array([pickled.size], np.int32))[0])
        pickled = pickled if self.is_main else np.zeros(size, np.uint8)
        return pickle.loads(from_bits(run_collective(self._broadcast, as_bits(pickled)), pickled).tobytes())

    def broadcast_parameters(self, parameters: Iterable[ms.Parameter]) -> None:
        """Set the parameters of all processes to the values of the main process."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            value = parameter.asnumpy()
            parameter.set_data(ms.Tensor(from_bits(run_collective(self._broadcast, as_bits(value)), value)))

    def require_same_weights(self, parameters: Iterable[ms.Parameter]) -> None:
        """Raise :class:`RunError` unless the parameters of all processes are identical to the bit."""
        if self.world_size == 1:
            return
        digest = digest_of(parameters)
        log.debug(f"weights {digest.hexdigest()}")
        digests = self.all_gather(np.frombuffer(digest.digest(), np.uint8))
        for rank, other in enumerate(digests):
            if (other != digests[0]).any():
                raise RunError(
                    f"the weights of worker {rank} differ from those of worker 0: do all workers run the same program?"
                )

    def barrier(self) -> None:
        """Wait until all processes have called this method."""
        self.all_gather(np.zeros(1, np.int32))

    def require_same_config(self, config: RunConfig, corpus: Corpus) -> None:
        """Check that all processes have the config and the data of the main process.

        Paths may differ, as machines may store the data in different places.

        Raises:
            UsageError: naming the first setting that differs, and both values.
        """
        own = flatten({**as_dict(config), "data": {**as_dict(config.data), "fingerprint": corpus.fingerprint}})
        main = self.broadcast_object(lambda: own)
        for key, value in own.items():
            if value != main[key] and not key.endswith(("path", "dir")):
                raise UsageError(
                    f"worker {self.rank} has {key}={value}, worker 0 has {main[key]}: use the same value for both"
                )


SINGLE_PROCESS = Distributed()


def digest_of(parameters: Iterable[ms.Parameter]) -> hashlib._Hash:
    """A SHA-256 of the values of parameters."""
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
    return digest


def as_bits(array: np.ndarray) -> np.ndarray:
    """Reinterpret an array as int32, which all backends can send; the last element is padded with zeros."""
    data = array.tobytes()
    return np.frombuffer(data + bytes(-len(data) % 4), np.int32)


def from_bits(bits: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of :func:`as_bits` for an array with the dtype and shape of ``like``."""
    return np.frombuffer(bits.tobytes()[: like.nbytes], like.dtype).reshape(like.shape)


def run_collective(collective: Callable[[ms.Tensor], ms.Tensor], array: np.ndarray) -> np.ndarray:
    with explain_lost_worker():
        return collective(ms.Tensor(array)).asnumpy()


@contextmanager
def explain_lost_worker() -> Iterator[None]:
    """Replace the error of a failed communication by a :class:`RunError` that says that another worker was lost."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("AllReduce|AllGather|Broadcast", str(error)):
            raise
        raise RunError(
            "another worker was lost, or this one has waited for it for more than "
            f"{os.environ['MS_CPU_COMM_OP_TIMEOUT']} s (MS_CPU_COMM_OP_TIMEOUT); the scheduler's log names the "
            "worker; use the same command to continue the run"
        ) from error


def init_distributed(parallel: str) -> Distributed:
    """Join the other processes that ``msrun`` started if ``parallel`` is "data"; a single process if it is "none".

    Must be called after the device was set and before any Cell that communicates is created. Returns once all workers
    have joined. In the scheduler, an additional process that ``msrun`` starts, it returns when the workers have ended.

    Raises:
        UsageError: ``parallel`` is "data" in a process that ``msrun`` did not start, or "none" in one that it did.
        RunError: not all workers have joined, or, in the scheduler, a worker was lost.
    """
    started_by_msrun = "MS_ROLE" in os.environ
    if parallel == "none":
        if started_by_msrun:
            raise UsageError("parallel=none: expected parallel=data in a process that msrun started")
        return SINGLE_PROCESS
    if not started_by_msrun:
        raise UsageError(
            "parallel=data: expected to be started by msrun, as scripts/launch.sh 2 … does; see docs/distributed.md"
        )
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", COLLECTIVE_TIMEOUT_S)
    try:
        communication.init()
    except RuntimeError as error:
        lost = re.search(r"worker (\d+) is the first one timed out", str(error))
        what = f"worker {lost[1]} was lost" if lost else f"not all workers have joined: {error}"
        raise RunError(what) from None
    ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)
    collectives = Collective(ops.AllGather()), Broadcast(ops.Broadcast(0))
    distributed = Distributed(communication.get_rank(), communication.get_group_size(), *collectives)
    log.info(f"worker {distributed.rank} of {distributed.world_size}: process {os.getpid()}")
    return distributed
