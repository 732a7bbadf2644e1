"""Data parallelism with threads instead of processes; tests/e2e/test_workers.py uses real ones."""

import math
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
from local_attention.training.distributed import SINGLE_PROCESS, Distributed, explain_lost_worker, init_distributed
from local_attention.training.errors import RunError, UsageError
from local_attention.training.evaluate import Evaluator
from local_attention.training.signals import Interrupted, SignalCheck
from local_attention.training.state import RunState
from tests.training.toys import examples, tiny_transformer


def run_processes(world_size, task):
    """Run ``task(distributed)`` in several processes at once; returns the results by rank."""
    barrier, arrays = threading.Barrier(world_size, timeout=60), [None] * world_size

    def process(rank):
        def exchange(x):
            arrays[rank] = x.asnumpy()
            barrier.wait()
            gathered = list(arrays)
            barrier.wait()
            return gathered

        def all_gather(x):
            return Tensor(np.concatenate(exchange(x)))

        def broadcast(x):
            return Tensor(exchange(x)[0])

        return task(Distributed(rank, world_size, all_gather, broadcast))

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result() for future in [pool.submit(process, rank) for rank in range(world_size)]]


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)])
def test_all_gather_returns_the_arrays_of_all_processes_to_the_bit(dtype, shape):
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(dtype) for _ in range(3)]
    for got in run_processes(3, lambda distributed: distributed.all_gather(arrays[distributed.rank])):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.stack(arrays))


def test_a_single_process_gathers_its_own_array():
    np.testing.assert_array_equal(SINGLE_PROCESS.all_gather(np.array([1.5, 2.5])), [[1.5, 2.5]])
    assert SINGLE_PROCESS.is_main


def test_an_object_is_made_by_the_main_process_only_and_broadcast():
    calls = []

    def task(distributed):
        return distributed.broadcast_object(
            lambda: calls.append(distributed.rank) or {"rank": distributed.rank, "text": "ä" * 5}
        )

    assert run_processes(3, task) == [{"rank": 0, "text": "ä" * 5}] * 3
    assert calls == [0]
    assert SINGLE_PROCESS.broadcast_object(lambda: "own") == "own"


def test_parameters_are_broadcast_from_the_main_process():
    def task(distributed):
        start = np.random.default_rng(distributed.rank).normal(size=(3, 2)).astype(np.float32)
        parameters = [Parameter(Tensor(start), name="a"), Parameter(Tensor(distributed.rank + 7, ms.int32), name="b")]
        distributed.broadcast_parameters(parameters)
        return [parameter.asnumpy().copy() for parameter in parameters]

    results = run_processes(3, task)
    np.testing.assert_array_equal(results[0][0], np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    assert results[0][1] == 7
    for other in results[1:]:
        for got, wanted in zip(other, results[0]):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_different_weights_are_an_error_naming_the_worker(rank):
    def task(distributed):
        start = np.ones((2, 3), np.float32)
        start[1, 2] += 1e-6 * (distributed.rank == rank)
        try:
            distributed.require_same_weights([Parameter(Tensor(start), name="a")])
        except RunError as error:
            return str(error)
        return None

    for error in run_processes(3, task):
        assert error is None if rank is None else f"worker {rank} differ from those of worker 0" in error


CORPUS = Corpus("some", np.arange(200, dtype=np.uint8))


def error_of_rank_1(config, corpus=CORPUS):
    def task(distributed):
        try:
            distributed.require_same_config(
                config if distributed.rank else RunConfig(), corpus if distributed.rank else CORPUS
            )
        except UsageError as error:
            return str(error)
        return None

    main, other = run_processes(2, task)
    assert main is None
    return other


def test_workers_with_other_settings_or_data_are_refused():
    assert error_of_rank_1(RunConfig()) is None
    error = error_of_rank_1(RunConfig(train=TrainConfig(batch_size=7)))
    assert error == "worker 1 has train.batch_size=7, worker 0 has 4: use the same value for both"
    assert "data.fingerprint=" in error_of_rank_1(RunConfig(), Corpus("some", CORPUS.bytes[::-1].copy()))


def test_paths_may_differ_between_machines():
    config = RunConfig()
    elsewhere = dict(path="elsewhere", dir="there", val_path="elsewhere", test_path="elsewhere")
    assert error_of_rank_1(replace(config, data=replace(config.data, **elsewhere))) is None


# What a run uses them for.


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30))
@examples(100)
def test_processes_see_the_sequences_of_one_process_with_a_batch_as_large_as_all_of_theirs(
    world_size, batch_size, accumulated, step
):
    sampler = SequenceSampler(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8), 6, seed=7)
    train = TrainConfig(seq_len=5, batch_size=batch_size, grad_accum_every=accumulated)
    parts = [BatchIterator(sampler, train, 0, Distributed(rank, world_size)).batch(step) for rank in range(world_size)]
    whole = BatchIterator(sampler, replace(train, batch_size=world_size * batch_size), 0).batch(step)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_score_is_the_same_to_the_bit_for_any_world_size(world_size):
    model = tiny_transformer()
    data = np.random.default_rng(0).integers(0, 256, 150, dtype=np.uint8)
    single = Evaluator(model, 16, 2)
    wanted, lock, batches = single(data, 3, 140), threading.Lock(), []

    def task(distributed):
        evaluator = Evaluator(model, 16, 2, distributed)

        def score_batch(tokens, batch):
            with lock:  # threads, unlike processes, share a graph
                batches.append(batch)
                return single.score_batch(tokens, batch)

        evaluator.score_batch = score_batch
        return evaluator(data, 3, 140)

    assert run_processes(world_size, task) == [wanted] * world_size
    assert len(batches) == 5  # 9 windows, none of them twice


def test_all_processes_use_the_clock_of_the_main_process_and_a_signal_of_any(clock):
    states = [RunState(None, 1.0, earlier_s=earlier) for earlier in (30.0, 59.0, 61.0)]
    states[1].received_signal = 15
    run_processes(3, lambda distributed: states[distributed.rank].synchronise(distributed))
    assert [state.progress for state in states] == [0.5] * 3
    assert [state.signal for state in states] == [15] * 3


@pytest.mark.parametrize("world_size, receiver", [(2, 0), (2, 1), (3, 2)])
def test_after_a_signal_to_any_process_all_leave_an_evaluation_at_the_same_batch(clock, world_size, receiver):
    states = [RunState(100, None) for _ in range(world_size)]
    model, done = tiny_transformer().set_train(False), [0] * world_size

    def task(distributed):
        rank = distributed.rank
        evaluator = Evaluator(model, 16, 2, distributed)

        def score_batch(tokens, batch):
            done[rank] += 1
            states[rank].received_signal = 15 if rank == receiver and done[rank] == 2 else None
            return 1.0, 1

        evaluator.score_batch = score_batch
        with pytest.raises(Interrupted):
            evaluator(CORPUS.bytes, 0, 200, before_batch=SignalCheck(states[rank], distributed, lambda: None))

    run_processes(world_size, task)
    assert done == [2] * world_size
    assert [state.signal for state in states] == [15] * world_size


def test_a_check_before_each_batch_is_made_equally_often_by_all_processes():
    calls = [0] * 3

    def task(distributed):
        def count():
            calls[distributed.rank] += 1
            distributed.barrier()

        evaluator = Evaluator(model, 16, 2, distributed)
        evaluator.score_batch = lambda tokens, batch: (1.0, 1)
        return evaluator(CORPUS.bytes, 0, 16 * 2 * 4, before_batch=count)  # 4 batches for 3 processes

    model = tiny_transformer().set_train(False)
    assert run_processes(3, task) == [(1 / math.log(2), 4)] * 3
    assert calls == [2] * 3


def test_sigusr1_to_any_process_makes_the_main_process_save(clock):
    states, saved = [RunState(100, None) for _ in range(2)], []
    states[1].received_save_request = True

    def task(distributed):
        check = SignalCheck(states[distributed.rank], distributed, lambda: saved.append(distributed.rank))
        for _ in range(3):
            check()

    run_processes(2, task)
    assert sorted(saved) == [0, 1]  # the main process writes, the others save nothing


# Starting, and failures.


def test_without_msrun_there_is_a_single_process(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    assert init_distributed("none") is SINGLE_PROCESS


@pytest.mark.parametrize(
    "parallel, role, expected", [("data", None, "started by msrun"), ("none", "MS_WORKER", "data")]
)
def test_the_config_must_match_how_the_process_was_started(monkeypatch, parallel, role, expected):
    monkeypatch.delenv("MS_ROLE", raising=False)
    if role:
        monkeypatch.setenv("MS_ROLE", role)
    with pytest.raises(UsageError, match=f"^parallel={parallel}: expected .*{expected}"):
        init_distributed(parallel)


def test_the_scheduler_says_which_worker_was_lost(monkeypatch):
    def init():
        raise RuntimeError("Timed out node list is: {1}, worker 1 is the first one timed out, please check its log.")

    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setenv("MS_CPU_COMM_OP_TIMEOUT", "45")
    monkeypatch.setattr(module.communication, "init", init)
    with pytest.raises(RunError, match=r"^worker 1 was lost$"):
        init_distributed("data")


def test_a_failed_communication_becomes_one_line_and_other_errors_are_not_changed(monkeypatch):
    monkeypatch.setenv("MS_CPU_COMM_OP_TIMEOUT", "45")
    with pytest.raises(RunError, match="another worker was lost"), explain_lost_worker():
        raise RuntimeError("Launch kernel failed: Default/AllReduce-op0\n\nmuch more")
    with pytest.raises(RuntimeError, match=r"^MatMul"), explain_lost_worker():
        raise RuntimeError("MatMul failed")
