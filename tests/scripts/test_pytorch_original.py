import sys

import pytest

from scripts import benchmarking, pytorch_original
from scripts.benchmarking import workers_of_original
from scripts.pytorch_original import import_original, python_with_original


@pytest.fixture(autouse=True)
def environments(monkeypatch, tmp_path):
    """Neither this environment nor that of ``make parity`` has the original; returns where the latter's Python is."""
    monkeypatch.setattr(pytorch_original, "folder_of_original", lambda: None)
    monkeypatch.setattr(pytorch_original, "PARITY_PYTHON", tmp_path / "python")
    return tmp_path / "python"


def test_without_the_original_a_script_ends_with_the_commands_to_use(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/compare_training.py", "seed=1"])
    with pytest.raises(SystemExit) as end:
        import_original()
    message = "error: expected PyTorch and its package local-attention: run make parity once, then "
    assert end.value.code == message + ".venv-parity/bin/python scripts/compare_training.py"


def test_benchmarks_measure_the_original_in_the_environment_of_make_parity_or_say_that_they_do_not(
    monkeypatch, environments, capsys
):
    monkeypatch.setattr(benchmarking, "Worker", lambda name, options, python: (name, options, python))
    assert workers_of_original("original") == {}
    assert capsys.readouterr().err == "PyTorch is not measured: make parity sets up its environment\n"
    environments.touch()
    workers = workers_of_original("original", "bfloat16", options=["--weights", "w"])
    assert workers == {name: (name, ["--weights", "w"], str(environments)) for name in ("original", "bfloat16")}
    assert capsys.readouterr().err == ""


def test_an_environment_that_has_the_original_is_used(monkeypatch, environments):
    environments.touch()
    monkeypatch.setattr(pytorch_original, "folder_of_original", lambda: "site-packages")
    assert python_with_original() == sys.executable
