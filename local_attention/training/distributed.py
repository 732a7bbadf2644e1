"""The processes that train one model together: MindSpore's data parallelism, started by ``msrun``."""

import hashlib
import logging
import os
import pickle
import re
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import communication, nn, ops

from local_attention.training.errors import RunError, UsageError
from local_attention.training.keys import as_dict, flat

# Seconds that a worker on a CPU waits for another one, which may be writing a checkpoint or have died: MindSpore's own
# 30 are short for a slow disk, and a minute is what a person waits for an error.
PATIENCE = "45"

log = logging.getLogger("train")


class Collective(nn.Cell):
    """A communication primitive as a graph: on a CPU most of them do not work eagerly."""

    def __init__(self, primitive):
        super().__init__()
        self.primitive = primitive

    def construct(self, x):
        return self.primitive(x)


class Broadcast(Collective):
    def construct(self, x):
        return self.primitive((x,))[0]


class Distributed:
    """Which of how many this process is, and what it asks of the others; all must ask the same, in the same order.

    Args:
        rank: 0 … count - 1; the worker of rank 0 leads: it alone writes the run.
        count: how many there are.
        all_gather: ``(n,) -> (count * n,)`` int32, the arrays of all; for several workers.
        broadcast: ``(n,) -> (n,)`` int32, that of rank 0; for several workers.
    """

    def __init__(self, rank=0, count=1, all_gather=None, broadcast=None):
        self.rank, self.count, self.all_gather, self.broadcast = rank, count, all_gather, broadcast

    @property
    def leads(self):
        return self.rank == 0

    def gather(self, array):
        """The arrays of all workers, alike in shape and dtype, in the order of ranks: ``(count, *array.shape)``."""
        array = np.ascontiguousarray(array)
        if self.count == 1:
            return array[None]
        bits = ask(self.all_gather, as_bits(array)).reshape(self.count, -1)
        return np.stack([from_bits(row, array) for row in bits])

    def share(self, make):
        """What ``make()`` returns on rank 0, which alone calls it."""
        if self.count == 1:
            return make()
        pickled = np.frombuffer(pickle.dumps(make()) if self.leads else b"", np.uint8)
        size = int(ask(self.broadcast, np.array([pickled.size], np.int32))[0])
        pickled = pickled if self.leads else np.zeros(size, np.uint8)
        return pickle.loads(from_bits(ask(self.broadcast, as_bits(pickled)), pickled).tobytes())

    def share_parameters(self, parameters):
        """Let all parameters have the values that they have on rank 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            value = parameter.asnumpy()
            parameter.set_data(ms.Tensor(from_bits(ask(self.broadcast, as_bits(value)), value)))

    def require_same_weights(self, parameters):
        """Raise :class:`RunError` unless the parameters of all workers are identical to the bit."""
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for parameter in parameters:
            digest.update(np.ascontiguousarray(parameter.asnumpy()))
        log.debug(f"weights {digest.hexdigest()}")
        everybody = self.gather(np.frombuffer(digest.digest(), np.uint8))
        for rank, other in enumerate(everybody):
            if (other != everybody[0]).any():
                raise RunError(
                    f"the weights of worker {rank} differ from those of worker 0: do all run the same program?"
                )

    def wait_for_all(self):
        """Return when all workers have come here."""
        self.gather(np.zeros(1, np.int32))

    def require_same(self, config, corpus):
        """Refuse to train together with other settings or bytes than rank 0's.

        Args:
            config: a ``RunConfig``.
            corpus: a ``Corpus``.

        Raises:
            UsageError: naming the first setting and both values.
        """
        own = flat({**as_dict(config), "data": {**as_dict(config.data), "fingerprint": corpus.fingerprint}})
        leader = self.share(lambda: own)
        for key, value in own.items():
            # Each machine may keep its bytes elsewhere.
            if value != (led := leader[key]) and key not in ("data.path", "data.dir", "run_dir"):
                raise UsageError(f"worker {self.rank} has {key}={value}, worker 0 {led}: give both the same")


SINGLE_PROCESS = Distributed()


def as_bits(array):
    """An array as int32, which every backend carries; what is missing for the last one is filled up."""
    data = array.tobytes()
    return np.frombuffer(data + bytes(-len(data) % 4), np.int32)


def from_bits(bits, like):
    """The inverse of :func:`as_bits`, for an array of the dtype and shape of ``like``."""
    return np.frombuffer(bits.tobytes()[: like.nbytes], like.dtype).reshape(like.shape)


def ask(collective, array):
    with explain_lost_worker():
        return collective(ms.Tensor(array)).asnumpy()


@contextmanager
def explain_lost_worker():
    """Say in one line, a :class:`RunError`, that another worker was lost, where a communication within fails."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("AllReduce|AllGather|Broadcast", str(error)):
            raise
        raise RunError(
            f"another worker was lost, or let this one wait for more than {os.environ['MS_CPU_COMM_OP_TIMEOUT']} s "
            "(MS_CPU_COMM_OP_TIMEOUT); the scheduler's log says which; the same command continues the run"
        ) from error


def join_processes(parallel):
    """Become one of the workers that ``msrun`` started, where ``parallel`` is "data"; alone where it is "none".

    To be called after the device was chosen and before any Cell that communicates is made. It returns once all workers
    are there. The scheduler, which ``msrun`` starts besides, stays in here until the others have ended.

    Raises:
        UsageError: where ``msrun`` did or did not start this process, against what ``parallel`` says.
        RunError: where not all workers come, or, on the scheduler, where one of them was lost.
    """
    started = "MS_ROLE" in os.environ
    if parallel == "none":
        if started:
            raise UsageError("parallel=none: expected parallel=data in a process that msrun started")
        return SINGLE_PROCESS
    if not started:
        raise UsageError(
            "parallel=data: expected to be started by msrun, as scripts/launch.sh 2 … does; see docs/distributed.md"
        )
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", PATIENCE)
    try:
        communication.init()
    except RuntimeError as error:
        lost = re.search(r"worker (\d+) is the first one timed out", str(error))
        what = f"worker {lost[1]} was lost" if lost else f"the workers did not come together: {error}"
        raise RunError(what) from None
    ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)
    collectives = Collective(ops.AllGather()), Broadcast(ops.Broadcast(0))
    workers = Distributed(communication.get_rank(), communication.get_group_size(), *collectives)
    log.info(f"worker {workers.rank} of {workers.count}: process {os.getpid()}")
    return workers
