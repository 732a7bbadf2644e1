import json

import numpy as np
import pytest
import yaml

from local_attention.training.checkpoint import Checkpoints
from scripts.compare import describe, runs_below, table


@pytest.fixture
def run(tmp_path):
    """Makes run directories."""

    def make(name, lr, test_bpb=None, records=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"optimizer": {"lr": lr}, "seed": 0, "run_dir": name}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
        Checkpoints(folder / "checkpoints").save(
            {"model.a": np.zeros((2, 3), np.float32), "optimizer.m": np.zeros(9, np.float32)}, {"step": 4}
        )
        if test_bpb:
            summary = dict(steps=4, bytes_seen=4000, val_bpb=2.5, test_bpb=test_bpb, bytes_per_s=1234.5)
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def test_runs_are_found_in_folders_and_listed_by_score_with_differing_settings(run, tmp_path):
    run("sweep/a", 0.001, 2.25), run("sweep/b", 0.003, 2.125)
    runs = runs_below([tmp_path, tmp_path / "sweep"])
    assert [path.name for path in runs] == ["a", "b"]
    header, first, second = (line.split() for line in table(describe_all(runs)))
    assert first == [f"{tmp_path}/sweep/b", "6", "4", "4,000", "2.5000", "2.1250", "1,234", "optimizer.lr=0.003"]
    assert second[-1] == "optimizer.lr=0.001"
    assert header[:3] == ["run", "params", "steps"]


def describe_all(runs):
    return [describe(run) for run in runs]


def test_an_unfinished_run_shows_its_newest_figures(run):
    common = dict(wall_s=1.0)
    earlier_end = dict(kind="eval", step=0, bytes_seen=0, bpb=1.0, split="test", whole_split=True, **common)
    records = [
        earlier_end,
        dict(kind="train", step=1, bytes_seen=100, bpb=8.0, bytes_per_s=50.0, **common),
        dict(kind="eval", step=2, bytes_seen=200, bpb=3.0, split="val", **common),
        dict(kind="train", step=3, bytes_seen=300, bpb=7.0, bytes_per_s=60.0, **common),
    ]
    _, line = table([describe(run("a", 0.001, records=records))])
    assert line.split()[1:] == ["…", "6", "3", "300", "3.0000", "-", "60"]
