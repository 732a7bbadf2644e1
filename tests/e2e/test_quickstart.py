import json

SHORT = ["train.max_steps=2", "train.eval_bytes=1000", "train.generate_length=5", "data.max_bytes=100000"]


def test_the_quick_start_falls_back_to_the_standard_library_loudly(commands):
    result = commands.run(
        "train.py", "experiment=quickstart", f"data.dir={commands.folder / 'runs'}", "run_dir=runs/quick", *SHORT
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout.decode()
    assert "NOT ENWIK8" in printed and "stdlib" in printed
    assert "sample" in printed
    summary = json.loads((commands.folder / "runs/quick/summary.json").read_text())
    assert summary["steps"] == 2


def test_the_default_run_directory_is_named_by_experiment_and_time(commands):
    result = commands.run("train.py", "experiment=quickstart", "data=stdlib", "train.generate_every=100", *SHORT)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (commands.folder / "runs/quickstart").iterdir()
    assert (run_dir / "summary.json").exists()
