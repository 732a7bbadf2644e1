import json

import numpy as np
import pytest
import yaml

from local_attention.training.checkpoint import Checkpoints
from scripts.compare import describe, main, runs_below, table


@pytest.fixture
def run(tmp_path):
    """Makes run directories."""

    def make(name, lr, test_bpb=None, records=(), **train):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"optimizer": {"lr": lr}, "train": train, "seed": 0, "run_dir": name}
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


def test_dynamic_scores_have_a_column_of_their_own(run):
    dynamic, static = run("a", 0.001, 2.25), run("b", 0.001, 2.5)
    summary = json.loads((dynamic / "summary.json").read_text())
    (dynamic / "summary.json").write_text(json.dumps(summary | {"test_bpb_dynamic": 2.125}))
    header, first, second, *_ = table(describe_all([dynamic, static]))
    assert "test bpb  test dynamic" in header and "val dynamic" not in header
    assert first.split()[5:7] == ["2.2500", "2.1250"] and second.split()[5:7] == ["2.5000", "-"]


def describe_all(runs):
    return [describe(run) for run in runs]


def test_runs_are_found_behind_links_each_once(run, tmp_path):
    run("runs/a", 0.001, 2.25), run("elsewhere/b", 0.003, 2.125)
    links = tmp_path / "links"
    links.mkdir()
    (links / "a").symlink_to(tmp_path / "runs/a")
    (links / "all").symlink_to(tmp_path / "elsewhere")
    (links / "again").symlink_to(links)  # a loop
    assert runs_below([links]) == [links / "a", links / "all/b"]
    assert len(runs_below([tmp_path])) == 2


TRAINED = [
    dict(kind="train", step=1, bytes_seen=100, bpb=8.0, bytes_per_s=50.0),
    dict(kind="eval", step=2, bytes_seen=200, bpb=3.0, split="val"),
    dict(kind="train", step=3, bytes_seen=300, bpb=7.0, bytes_per_s=60.0),
]
ENDED = [
    dict(kind="eval", step=4, bytes_seen=4000, bpb=2.0, split=split, whole_split=True) for split in ("val", "test")
]


def test_a_run_without_final_scores_shows_its_newest_figures_and_what_its_mark_means(run):
    _, line, legend = table([describe(run("a", 0.001, records=TRAINED))])
    assert line.split()[1:] == ["…", "6", "3", "300", "3.0000", "-", "60"]
    assert legend.startswith("… no final scores")


@pytest.mark.parametrize("summary", [True, False])
def test_a_run_that_was_continued_does_not_show_its_old_scores(run, summary):
    later = [
        dict(kind="train", step=5, bytes_seen=5000, bpb=7.0, bytes_per_s=70.0),
        dict(kind="eval", step=5, bytes_seen=5000, bpb=2.75, split="val"),
    ]
    _, line, _ = table([describe(run("a", 0.001, 2.25 if summary else None, [*TRAINED, *ENDED, *later]))])
    assert line.split()[1:] == ["…", "6", "5", "5,000", "2.7500", "-", "70"]


def test_final_scores_have_no_mark(run):
    _, line = table([describe(run("a", 0.001, 2.25, [*TRAINED, *ENDED]))])
    assert line.split()[1:] == ["6", "4", "4,000", "2.5000", "2.2500", "1,234"]


def test_a_run_that_was_ended_without_scores_shows_its_latest_evaluation(run):
    folder = run("a", 0.001, records=TRAINED)
    (folder / "summary.json").write_text(json.dumps(dict(steps=3, bytes_seen=300, val_bpb=None, bytes_per_s=55.0)))
    _, line, _ = table([describe(folder)])
    assert line.split()[1:] == ["…", "6", "3", "300", "3.0000", "-", "55"]


def settings_of(lines):
    return {line.split()[0][-1]: line.split()[7:] for line in lines}


def test_what_most_runs_have_in_common_is_said_once_and_what_all_share_never(run, tmp_path):
    run("a", 0.001, 2.1, seq_len=512, clip_norm=0.5, log_every=1), run("b", 0.002, 2.2, seq_len=512, clip_norm=0.5)
    run("c", 0.003, 2.3, seq_len=256, clip_norm=0.5)
    _, *rows, common = table(describe_all(runs_below([tmp_path])))
    assert settings_of(rows) == {
        "a": ["optimizer.lr=0.001"],
        "b": ["optimizer.lr=0.002"],
        "c": ["optimizer.lr=0.003", "train.seq_len=256"],
    }
    assert common == "Unless given, as in most runs: train.seq_len=512"


def test_many_settings_are_wrapped_at_the_width_of_the_terminal(run, tmp_path):
    settings = {f"key{i}": "a" * i for i in range(12)}
    run("a", 0.001, 2.1, **settings), run("b", 0.002, 2.2)
    width = len(str(tmp_path)) + 120
    lines = [*table(describe_all(runs_below([tmp_path])), width)]
    assert all(len(line) <= width for line in lines) and len(lines) > 4
    start = lines[0].index("settings")
    assert all(line[:start].strip() == "" for line in lines[2:4])  # under the first line of the run
    assert " ".join(line[start:].strip() for line in lines[1:]).count("train.key11=aaaaaaaaaaa") == 1


def test_runs_with_corrupt_checkpoints_or_nothing_but_a_config_are_listed(run, tmp_path, monkeypatch, capsys):
    for path in (run("a", 0.001) / "checkpoints").glob("step-*"):
        path.write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.yaml").touch()
    monkeypatch.setattr("sys.argv", ["compare.py", str(tmp_path)])
    assert main() == 0
    assert [line.split()[1:8] for line in capsys.readouterr().out.splitlines()[1:3]] == [["…", *"------"]] * 2
