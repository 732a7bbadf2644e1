import json

SHORT = ["train.max_steps=2", "train.eval_bytes=1000", "train.generate_length=5", "data.max_bytes=100000"]
SHORT += ["model.dim=32", "model.heads=1", "model.depth=1", "model.ngram_buckets=997"]


def test_the_quick_start_falls_back_to_the_standard_library_and_names_its_run_directory(commands):
    result = commands.run("train.py", "experiment=quickstart", f"data.dir={commands.folder / 'runs'}", *SHORT)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.decode()
    assert "NOT ENWIK8" in printed and "stdlib" in printed
    assert "sample" in printed
    (run_dir,) = (commands.folder / "runs/quickstart").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
