import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from scripts import study
from scripts.study import read_study, with_interval

# Stands for train.py: its score is lr + 10 * seed, and it says which runs it was called for.
FAKE = """
import json, os, signal, sys
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
run_dir = Path(given["run_dir"])
run_dir.mkdir(parents=True, exist_ok=True)
with open(given["log"], "a") as log:
    log.write("/".join(run_dir.parts[-2:]) + "\\n")
if given["optimizer.lr"] == "stop":
    sys.exit(143)
if given["optimizer.lr"] == "fail":
    sys.exit(1)
score = float(given["optimizer.lr"]) + 10 * int(given["seed"]) ** 2
scores = dict(val_bpb=score + 1, test_bpb=score)
summary = dict(bytes_seen=int(given["steps"]), **scores, bytes_per_s=50.0, peak_memory_bytes=2e9)
(run_dir / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls the script on a study; returns its status, the lines of its table, and the runs that were called for."""
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(study, "ROOT", tmp_path)

    def call(content, *overrides):
        path, log = tmp_path / "study.yaml", tmp_path / "log"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        log.unlink(missing_ok=True)
        arguments = [str(path), str(tmp_path / "runs"), *overrides, f"log={log}"]
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        status = study.main()
        shown = capsys.readouterr()
        lines = [re.split(r"\s{2,}", line) for line in shown.out.splitlines() if "train.py" not in line]
        return status, lines, log.read_text().split() if log.exists() else [], shown.err

    return call


STUDY = dict(
    overrides=["steps=100", "optimizer.lr=9"],
    seeds=[0, 1, 2],
    recipes={"plain": ["optimizer.lr=1"], "better": ["optimizer.lr=0.5"]},
)


def test_each_recipe_is_trained_with_each_seed_and_compared_with_the_first(call):
    status, (header, plain, better), called, _ = call(STUDY)
    assert status == 0
    assert called == [f"{recipe}/seed={seed}" for seed in range(3) for recipe in ("plain", "better")]
    assert header == list(study.HEADER)
    # the seeds' scores are 1, 11 and 41
    interval = 4.303 * statistics.stdev([1, 11, 41]) / 3**0.5
    assert plain == ["plain", "3", "100", f"18.6667 ± {interval:.4f}", f"17.6667 ± {interval:.4f}", "50", "2.00 GB"]
    assert better[5] == "-0.5000 ± 0.0000"  # of the same seed, so that the seeds' own differences do not count


def test_the_scores_are_drawn(call, tmp_path):
    assert call(STUDY, "-o", str(tmp_path / "plot.png"))[0] == 0
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.01


def test_overrides_of_the_command_line_come_last_and_other_numbers_of_bytes_are_pointed_out(call):
    _, (_, plain, better), _, _ = call(STUDY, "optimizer.lr=2")
    assert plain[4] == better[4]
    changed = STUDY | {"recipes": STUDY["recipes"] | {"longer": ["optimizer.lr=1", "steps=200"]}}
    *_, longer, warning = call(changed)[1]
    assert longer[2] == "200" and "same number of bytes" in warning[0]


def test_a_run_that_fails_does_not_end_the_study_and_an_interrupted_one_does(call):
    recipes = {"plain": ["optimizer.lr=1"], "broken": ["optimizer.lr=fail"], "last": ["optimizer.lr=2"]}
    status, (_, _, broken, last), called, _ = call(STUDY | {"seeds": [0], "recipes": recipes})
    assert status == 0 and len(called) == 3
    assert broken[:4] == ["broken", "0", "-", "-"] and last[4:6] == ["2.0000", "+1.0000"]
    recipes |= {"broken": ["optimizer.lr=stop"]}
    status, _, called, error = call(STUDY | {"seeds": [0], "recipes": recipes})
    assert status == 143 and called == ["plain/seed=0", "broken/seed=0"]
    assert "continue:  python study.py" in error


@pytest.mark.parametrize(
    "content, message",
    [
        ("recipes: {}", "expected the keys overrides, seeds, recipes"),
        (STUDY | {"recipes": {"a": "b=1"}}, "expected a list of overrides"),
        (STUDY | {"seeds": []}, "expected at least one recipe"),
        (STUDY | {"seeds": ["0"]}, "a list of whole numbers"),
        ("{", "study.yaml: expected YAML, but"),
    ],
)
def test_mistakes_in_the_file_are_said_in_one_line(call, content, message):
    status, lines, called, error = call(content)
    assert status == 2 and not lines and not called
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error)


def test_one_seed_has_no_interval_and_many_have_the_normal_one():
    assert with_interval([]) == "-"
    assert with_interval([2.0]) == "2.0000"
    assert with_interval([1.0, 2.0]) == "1.5000 ± 6.3530"
    assert with_interval([0.5, -0.5], "+") == "+0.0000 ± 6.3530"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_the_run_saves_its_work_before_the_study_ends(tmp_path, number):
    program = (
        "import pathlib, signal, sys, time\n"
        "stop = lambda *_: (time.sleep(1), pathlib.Path('saved').touch(), sys.exit(130))\n"
        "signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch(), time.sleep(60)\n"
    )
    code = f"import sys; from scripts.study import run; sys.exit(run([sys.executable, '-c', {program!r}]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True
    ) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait() == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("path", sorted((study.ROOT / "scripts/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_read(path):
    assert len(read_study(path).recipes) > 1
