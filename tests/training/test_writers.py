"""What happens to a run directory when a run begins to write there."""

import numpy as np
import pytest
import yaml

from data import Corpus
from local_attention.training import run_dir, writers
from local_attention.training.checkpoint import Checkpoints, read
from local_attention.training.config import OptimizerConfig, RunConfig
from local_attention.training.optimizer import build_optimizer
from local_attention.training.run_dir import RunPaths, restore_best
from local_attention.training.state import RunState
from local_attention.training.writers import open_run_dir
from tests.training.toys import Bigram

CORPUS = Corpus("some", np.arange(200, dtype=np.uint8))


@pytest.fixture(autouse=True)
def without_lock_and_log(monkeypatch):
    monkeypatch.setattr(run_dir.fcntl, "flock", lambda *_: None)  # a lock is held until the process ends
    monkeypatch.setattr(writers, "log_to_file", lambda *_: None)  # as is a log


def opened(paths, state, model=None):
    """Open a run directory; returns the function that saves checkpoints there."""
    model = model or Bigram()
    optimizer = build_optimizer(OptimizerConfig(), model.trainable_params())
    run_log, save, _ = open_run_dir(paths, RunConfig(), CORPUS, model, optimizer, state)
    run_log.close()
    return save


def test_a_run_that_is_resumed_in_another_directory_can_be_continued_there_from_the_beginning(tmp_path):
    save = opened(RunPaths(tmp_path / "a", None), state := RunState(9, None, step=2))
    save(best=True)
    state.step = 4
    save()
    paths = RunPaths(tmp_path / "b", (tmp_path / "a/checkpoints/last"))
    opened(paths, RunState(4, None, step=4), other := Bigram(1))
    found = {name: read(Checkpoints(paths.checkpoints).find(name))[1]["step"] for name in ("best", "last")}
    assert found == {"best": 2, "last": 4}
    assert yaml.safe_load((tmp_path / "b/config.yaml").read_text())["seed"] == 0
    restore_best(paths, other, step=2)  # which are in use, it is told
    assert abs(other.table.asnumpy() - Bigram().table.asnumpy()).max() > 0
    restore_best(paths, other, step=4)
    np.testing.assert_array_equal(other.table.asnumpy(), Bigram().table.asnumpy())


def test_the_summary_of_a_run_that_goes_on_is_removed_and_that_of_a_finished_run_is_kept(tmp_path):
    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    opened(RunPaths(tmp_path, None), RunState(4, None, step=4))
    assert summary.exists()
    opened(RunPaths(tmp_path, None), RunState(5, None, step=4))
    assert not summary.exists()
