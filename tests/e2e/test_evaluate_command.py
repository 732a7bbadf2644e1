import gzip
import json
import re
import shutil
import signal
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from local_attention.training.build import load_model
from tests.e2e.conftest import TINY
from tests.e2e.test_mistakes import one_line_error

LINE = re.compile(
    r"(train|val|test): (\d+\.\d{6}) bpb over ([\d,]+) bytes \(checkpoint (.+), seq_len (\d+), stride (\d+)\)\n"
)


def scored(result):
    """Parse the printed line; returns ``(split, bpb, bytes, checkpoint, seq_len, stride)``."""
    assert result.returncode == 0, result.stderr
    split, bpb, count, *rest, seq_len, stride = LINE.fullmatch(result.stdout.decode()).groups()
    return split, float(bpb), int(count.replace(",", "")), *rest, int(seq_len), int(stride)


def summary_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def state_of(folder):
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def bare_checkpoint(finished_run, tmp_path):
    """A checkpoint without its run and without information about data, of a model without learned positions."""
    last = (finished_run[0] / "checkpoints/last").resolve()
    meta, tensors = json.loads(last.with_suffix(".json").read_text()), load_file(last)
    del meta["data"], meta["sha256"], tensors["model.pos_emb.embedding_table"]
    meta["config"]["model"]["use_abs_pos_emb"] = False
    (tmp_path / "bare.json").write_text(json.dumps(meta))
    save_file(tensors, tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def test_every_byte_of_the_test_split_is_scored_as_at_the_end_of_the_run(finished_run, commands):
    run_dir, _ = finished_run
    before = state_of(run_dir)
    split, bpb, count, checkpoint, *lengths = scored(commands.run("scripts/evaluate.py", "run=runs/whole"))
    size = commands.text.stat().st_size
    assert (split, count, lengths) == ("test", size - size * 95 // 100, [32, 32])
    assert bpb == pytest.approx(summary_of(run_dir)["test_bpb"], abs=1e-6)
    assert checkpoint == f"runs/whole/checkpoints/{(run_dir / 'checkpoints/best').resolve().name}"
    assert state_of(run_dir) == before


def test_the_score_is_that_of_numpy_in_float64(finished_run, commands):
    model, _ = load_model(finished_run[0] / "checkpoints/best")
    text = np.frombuffer(commands.text.read_bytes(), np.uint8).astype(np.int32)
    first = len(text) * 95 // 100
    windows = -(-(len(text) - first) // 32)
    padding = np.zeros(first + windows * 32 - len(text), np.int32)
    inputs = np.concatenate([text[first - 1 : -1], padding]).reshape(windows, 32)
    logits = model(ms.Tensor(inputs)).asnumpy().astype(np.float64).reshape(windows * 32, -1)[: len(text) - first]
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), text[first:]]
    bpb = nats.mean() / np.log(2)
    assert summary_of(finished_run[0])["test_bpb"] == pytest.approx(bpb, abs=1e-5)


def test_overlapping_windows_score_the_same_number_of_bytes_differently(finished_run, commands):
    result = commands.call("scripts/evaluate.py", "run=runs/whole", "split=val", "stride=8", "batch_size=16")
    split, bpb, count, _, *lengths = scored(result)
    size = commands.text.stat().st_size
    assert (split, count, lengths) == ("val", size * 95 // 100 - size * 90 // 100, [32, 8])
    assert abs(bpb - summary_of(finished_run[0])["val_bpb"]) > 1e-3


def test_dynamic_evaluation_learns_from_what_it_has_scored_and_records_its_score_beside_the_others(
    finished_run, commands, tmp_path
):
    run_dir = Path(shutil.copytree(finished_run[0], tmp_path / "run", symlinks=True))
    checkpoints, summary = state_of(run_dir / "checkpoints"), summary_of(run_dir)
    result = commands.call("scripts/evaluate.py", f"run={run_dir}", "dynamic=true", "dynamic_rate=0.5")
    assert result.returncode == 0, result.stderr
    line = r"test_bpb_dynamic: (\d+\.\d{6}) bpb over 3,000 bytes \(checkpoint .+, seq_len 32, dynamic_rate 0.5\)\n"
    (bpb,) = re.fullmatch(line, result.stdout.decode()).groups()
    assert float(bpb) < summary["test_bpb"] - 0.5
    assert state_of(run_dir / "checkpoints") == checkpoints
    recorded = summary_of(run_dir)
    assert recorded.pop("test_bpb_dynamic") == pytest.approx(float(bpb), abs=1e-6)
    assert recorded.pop("dynamic_rate") == 0.5
    assert recorded == summary
    *_, record = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert record["split"] == "test_dynamic" and record["bpb"] == pytest.approx(float(bpb), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["seq_len=16", "checkpoint=last"])
def test_a_dynamic_score_that_is_not_of_the_run_is_not_recorded(finished_run, commands, what):
    before = state_of(finished_run[0])
    result = commands.call("scripts/evaluate.py", "run=runs/whole", "dynamic=true", what)
    assert result.returncode == 0 and "test_bpb_dynamic: " in result.stdout.decode()
    assert state_of(finished_run[0]) == before


def test_other_data_than_that_of_the_run_is_scored_with_a_warning_that_names_both(finished_run, commands, tmp_path):
    other = tmp_path / "other, text"
    other.write_bytes(commands.text.read_bytes()[:2000])
    result = commands.call("scripts/evaluate.py", "run=runs/whole", "checkpoint=last", f"data.path={other}")
    assert scored(result)[2:4] == (100, "runs/whole/checkpoints/step-00000012.safetensors")
    (warning,) = [line for line in result.stderr.splitlines() if "warning" in line]
    last = finished_run[0] / "checkpoints/step-00000012.json"
    for part in (commands.text.name, json.loads(last.read_text())["data"]["fingerprint"], "other, text"):
        assert part in warning
    assert len(set(re.findall(r"\b[0-9a-f]{16}\b", warning))) == 2


def test_an_own_file_is_scored_instead_of_the_twentieth_of_the_run(finished_run, commands, tmp_path):
    text = commands.text.read_bytes()
    (tmp_path / "own.gz").write_bytes(gzip.compress(text[len(text) * 95 // 100 :]))
    result = commands.call("scripts/evaluate.py", "run=runs/whole", f"data.test_path={tmp_path}/own.gz")
    split, bpb, count, *_ = scored(result)
    assert (split, count) == ("test", 3000)
    # Only the first of them is predicted from another byte than at the end of the run.
    assert 0 < abs(bpb - summary_of(finished_run[0])["test_bpb"]) < 8 * 32 / 3000
    assert "warning: " in result.stderr


@pytest.mark.slow
def test_a_run_is_scored_on_its_own_validation_and_test_files_in_sequences_of_their_own_length(commands, tmp_path):
    text, own = commands.text.read_bytes(), {}
    for split, begin, size in (("val", 1000, 700), ("test", 5000, 900)):
        own[split] = tmp_path / split
        own[split].write_bytes(text[begin : begin + size])
    paths = [f"data.{split}_path={path}" for split, path in own.items()]
    paths += ["train.eval_seq_len=40", "model.use_abs_pos_emb=false"]
    run = commands.train("runs/own", *paths, "train.max_steps=1", "train.generate_length=1")
    assert (run.returncode, run.stderr) == (0, "")
    for split, size in (("val", 700), ("test", 900)):
        assert f"scoring {size} bytes of {split}" in run.stdout.decode()
        result = commands.call("scripts/evaluate.py", "run=runs/own", f"split={split}")
        bpb = summary_of(commands.folder / "runs/own")[f"{split}_bpb"]
        *score, _, seq_len, stride = scored(result)
        assert score == [split, pytest.approx(bpb, abs=1e-6), size]
        assert seq_len == stride == 40
        assert "warning" not in result.stderr
    own["val"].write_bytes(text[:700])
    changed = [*TINY, f"data.path={commands.text}", "run_dir=runs/own", *paths, "train.max_steps=2"]
    continued = commands.call("train.py", *changed)
    assert (continued.returncode, "a new best begins" in continued.stdout.decode()) == (0, True)


def test_a_checkpoint_file_is_enough_and_longer_windows_need_no_learned_positions(bare_checkpoint, commands):
    arguments = [f"checkpoint={bare_checkpoint}", "data=file", f"data.path={commands.text}", "seq_len=40"]
    result = commands.call("scripts/evaluate.py", *arguments)
    assert scored(result)[2:] == (3000, str(bare_checkpoint), 40, 40)
    assert "warning" not in result.stderr


def test_ctrl_c_ends_scoring_with_status_130_and_no_score(finished_run, commands):
    process = commands.start("scripts/evaluate.py", "run=runs/whole", "split=train", "stride=1")
    for line in process.stderr:
        if line.startswith(b"scoring"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected the run to score, such as run=runs/"),
        (["run=runs/whole", "split=dev"], "split=dev: expected one of train, val, test"),
        (["run=runs/whole", "stide=8"], "did you mean stride?"),
        (["run=runs/whole", "data=wikitext"], "data=wikitext: expected one of enwik8, file, stdlib"),
        (["run=runs/whole", "stride=33"], "stride=33: expected a number from 1 to seq_len=32"),
        (["run=runs/whole", "dynamic=true", "stride=8"], "stride=8: dynamic=true learns from one sequence after the"),
        (["run=runs/whole", "data.path=missing.txt"], "missing.txt does not exist"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_a_usage_error_is_one_line_and_status_2(finished_run, commands, arguments, expected):
    result = commands.call("scripts/evaluate.py", *arguments)
    assert expected in one_line_error(result)
    assert result.stdout == b""


def test_an_empty_split_is_refused(finished_run, commands, tmp_path):
    (tmp_path / "five").write_bytes(b"bytes")
    result = commands.call("scripts/evaluate.py", "run=runs/whole", "split=val", f"data.path={tmp_path / 'five'}")
    assert result.returncode == 2
    assert "the val split of five is empty" in result.stderr.splitlines()[-1]
