"""Processes that are threads of this process; tests/e2e/test_workers.py has real ones."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Parameter, Tensor

from data import Corpus, SequenceSampler
from local_attention.training import distributed as module
from local_attention.training.batches import BatchIterator
from local_attention.training.config import RunConfig, TrainConfig
from local_attention.training.distributed import SINGLE_PROCESS, Distributed, explain_lost_worker, join_processes
from local_attention.training.errors import RunError, UsageError
from local_attention.training.evaluate import Evaluator
from local_attention.training.state import RunState
from tests.training.toys import examples, tiny_transformer


def together(count, task):
    """What ``task(workers)`` returns for each of ``count`` workers at once, by rank."""
    barrier, table = threading.Barrier(count, timeout=60), [None] * count

    def member(rank):
        def exchange(x):
            table[rank] = x.asnumpy()
            barrier.wait()
            everybody = list(table)
            barrier.wait()
            return everybody

        def gather(x):
            return Tensor(np.concatenate(exchange(x)))

        def broadcast(x):
            return Tensor(exchange(x)[0])

        return task(Distributed(rank, count, gather, broadcast))

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(member, rank) for rank in range(count)]]


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)])
def test_everybody_gets_the_arrays_of_all_to_the_bit(dtype, shape):
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(dtype) for _ in range(3)]
    for got in together(3, lambda workers: workers.gather(arrays[workers.rank])):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.stack(arrays))


def test_alone_one_gathers_from_itself():
    np.testing.assert_array_equal(SINGLE_PROCESS.gather(np.array([1.5, 2.5])), [[1.5, 2.5]])
    assert SINGLE_PROCESS.leads


def test_rank_0_alone_makes_what_is_shared():
    calls = []

    def task(workers):
        return workers.share(lambda: calls.append(workers.rank) or {"rank": workers.rank, "text": "ä" * 5})

    assert together(3, task) == [{"rank": 0, "text": "ä" * 5}] * 3
    assert calls == [0]
    assert SINGLE_PROCESS.share(lambda: "own") == "own"


def test_parameters_become_those_of_rank_0():
    def task(workers):
        start = np.random.default_rng(workers.rank).normal(size=(3, 2)).astype(np.float32)
        parameters = [Parameter(Tensor(start), name="a"), Parameter(Tensor(workers.rank + 7, ms.int32), name="b")]
        workers.share_parameters(parameters)
        return [parameter.asnumpy().copy() for parameter in parameters]

    everybody = together(3, task)
    np.testing.assert_array_equal(everybody[0][0], np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    assert everybody[0][1] == 7
    for other in everybody[1:]:
        for got, wanted in zip(other, everybody[0]):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_weights_that_have_drifted_apart_are_an_error_naming_the_worker(rank):
    def task(workers):
        start = np.ones((2, 3), np.float32)
        start[1, 2] += 1e-6 * (workers.rank == rank)
        try:
            workers.require_same_weights([Parameter(Tensor(start), name="a")])
        except RunError as error:
            return str(error)
        return None

    for complaint in together(3, task):
        assert complaint is None if rank is None else f"worker {rank} differ from those of worker 0" in complaint


CORPUS = Corpus("some", np.arange(200, dtype=np.uint8))


def complaint_of_rank_1(config, corpus=CORPUS):
    def task(workers):
        try:
            workers.require_same(config if workers.rank else RunConfig(), corpus if workers.rank else CORPUS)
        except UsageError as error:
            return str(error)
        return None

    leader, other = together(2, task)
    assert leader is None
    return other


def test_workers_with_other_settings_or_bytes_are_refused():
    assert complaint_of_rank_1(RunConfig()) is None
    complaint = complaint_of_rank_1(RunConfig(train=TrainConfig(batch_size=7)))
    assert complaint == "worker 1 has train.batch_size=7, worker 0 4: give both the same"
    assert "data.fingerprint=" in complaint_of_rank_1(RunConfig(), Corpus("some", CORPUS.bytes[::-1].copy()))


def test_each_machine_may_keep_its_bytes_elsewhere():
    config = RunConfig()
    assert complaint_of_rank_1(replace(config, data=replace(config.data, path="elsewhere", dir="there"))) is None


# What a run does with them.


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30))
@examples(100)
def test_workers_see_what_one_with_a_batch_as_large_as_all_theirs_does(count, batch_size, accumulated, step):
    sampler = SequenceSampler(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8), 6, seed=7)
    train = TrainConfig(seq_len=5, batch_size=batch_size, grad_accum_every=accumulated)
    parts = [BatchIterator(sampler, train, 0, Distributed(rank, count)).of_step(step) for rank in range(count)]
    whole = BatchIterator(sampler, replace(train, batch_size=count * batch_size), 0).of_step(step)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("count", [2, 3])
def test_a_score_is_the_same_to_the_bit_for_any_number_of_workers(count):
    ms.set_seed(0)
    model = tiny_transformer()
    data = np.random.default_rng(0).integers(0, 256, 150, dtype=np.uint8)
    alone = Evaluator(model, 16, 2)
    wanted, lock, batches = alone(data, 3, 140), threading.Lock(), []

    def task(workers):
        evaluator = Evaluator(model, 16, 2, workers)

        def score_batch(span, batch):
            with lock:  # threads, unlike processes, share a graph
                batches.append(batch)
                return alone.score_batch(span, batch)

        evaluator.score_batch = score_batch
        return evaluator(data, 3, 140)

    assert together(count, task) == [wanted] * count
    assert len(batches) == 5  # 9 windows, none of them twice


def test_all_go_by_the_clock_of_rank_0_and_by_a_signal_of_any(clock):
    states = [RunState(None, 1.0, earlier_s=earlier) for earlier in (30.0, 59.0, 61.0)]
    states[1].signal = 15
    together(3, lambda workers: states[workers.rank].agree(workers))
    assert [state.progress for state in states] == [0.5] * 3
    assert [state.signal for state in states] == [15] * 3


# Coming together, and losing one another.


def test_alone_is_alone(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    assert join_processes("none") is SINGLE_PROCESS


@pytest.mark.parametrize(
    "parallel, role, expected", [("data", None, "started by msrun"), ("none", "MS_WORKER", "data")]
)
def test_msrun_and_the_config_must_agree(monkeypatch, parallel, role, expected):
    monkeypatch.delenv("MS_ROLE", raising=False)
    if role:
        monkeypatch.setenv("MS_ROLE", role)
    with pytest.raises(UsageError, match=f"^parallel={parallel}: expected .*{expected}"):
        join_processes(parallel)


def test_the_scheduler_says_which_worker_was_lost(monkeypatch):
    def init():
        raise RuntimeError("Timed out node list is: {1}, worker 1 is the first one timed out, please check its log.")

    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setenv("MS_CPU_COMM_OP_TIMEOUT", "45")
    monkeypatch.setattr(module.communication, "init", init)
    with pytest.raises(RunError, match=r"^worker 1 was lost$"):
        join_processes("data")


def test_a_communication_that_failed_becomes_one_line_and_other_errors_stay(monkeypatch):
    monkeypatch.setenv("MS_CPU_COMM_OP_TIMEOUT", "45")
    with pytest.raises(RunError, match="another worker was lost"), explain_lost_worker():
        raise RuntimeError("Launch kernel failed: Default/AllReduce-op0\n\nmuch more")
    with pytest.raises(RuntimeError, match=r"^MatMul"), explain_lost_worker():
        raise RuntimeError("MatMul failed")
