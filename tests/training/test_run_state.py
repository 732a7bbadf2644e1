import json

import pytest

from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.state import RunState


def test_progress_is_by_steps(clock):
    state = RunState(40, None)
    state.step = 10
    clock.now += 10**6
    assert state.progress == 0.25


def test_progress_is_by_minutes(clock):
    state = RunState(None, 2.0)
    state.step = 10**6
    clock.now += 30
    assert state.progress == 0
    state.synchronise(SINGLE_PROCESS)
    assert state.progress == 0.25


@pytest.mark.parametrize("step, seconds, progress", [(30, 30, 0.75), (10, 90, 0.75), (10, 30, 0.25)])
def test_with_two_limits_the_nearer_one_counts(clock, step, seconds, progress):
    state = RunState(40, 2.0, step=step)
    clock.now += seconds
    state.synchronise(SINGLE_PROCESS)
    assert state.progress == progress


@pytest.mark.parametrize("step, seconds, finished", [(39, 119, False), (40, 0, True), (0, 120, True), (41, 500, True)])
def test_a_run_is_finished_at_either_limit(clock, step, seconds, finished):
    state = RunState(40, 2.0, step=step)
    clock.now += seconds
    state.synchronise(SINGLE_PROCESS)
    assert state.finished is finished


@pytest.mark.parametrize(
    "limits, seconds_left", [((40, None), 60.0), ((None, 2.0), 90.0), ((40, 2.0), 60.0), ((400, 2.0), 90.0)]
)
def test_seconds_left_are_those_to_the_nearer_limit(clock, limits, seconds_left):
    state = RunState(*limits, step=10)
    clock.now += 30
    assert state.seconds_left(2.0) == seconds_left


def test_seconds_left_are_never_below_0(clock):
    state = RunState(10, 1.0, step=11)
    clock.now += 100
    assert state.seconds_left(2.0) == 0.0


def test_wall_s_counts_earlier_sessions_too(clock):
    state = RunState(10, None, earlier_s=50.0)
    clock.now += 7
    assert state.wall_s == 57


def test_a_saved_state_is_restored_and_its_clock_continues(clock):
    state = RunState(10, None, step=3, bytes_seen=300, train_s=4.5, earlier_s=50.0, best_val_bpb=2.5, signal=15)
    state.best_step, state.init_from = 2, {"step": 9}
    clock.now += 7
    meta = json.loads(json.dumps(state.state_dict()))
    clock.now += 1000  # time between two sessions
    other = RunState(20, None)
    clock.now += 1
    other.load_state_dict(meta)
    assert (other.step, other.bytes_seen, other.train_s, other.best_val_bpb) == (3, 300, 4.5, 2.5)
    assert other.wall_s == 58
    assert other.best_step == 2 and other.init_from == {"step": 9}
    assert other.max_steps == 20  # the limit is that of the new session
    assert other.signal is None


def test_the_first_checkpoint_has_no_best_score(clock):
    other = RunState(20, None)
    other.load_state_dict(RunState(10, None).state_dict())
    assert other.best_val_bpb is None


def test_an_early_stop_and_what_is_done_at_a_step_are_saved(clock):
    state = RunState(10, None, 2, step=4, evaluations_since_best=2, events={"eval": 4, "sample": 2})
    other = RunState(10, None, 3)
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert (state.finished, other.finished, other.evaluations_since_best) == (True, False, 2)
    assert (other.has_happened("eval"), other.has_happened("sample")) == (True, False)


def test_an_evaluation_without_a_limit_never_finishes_a_run(clock):
    assert not RunState(10, None, evaluations_since_best=99).finished
