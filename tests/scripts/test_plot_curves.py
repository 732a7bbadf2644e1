import json
import sys

import matplotlib.image
import numpy as np
import pytest

from scripts import plot_curves
from scripts.plot_curves import limits, read_run


def record(kind, step, bpb, **values):
    return dict(kind=kind, step=step, bytes_seen=100 * step, wall_s=60.0 * step, bpb=bpb, **values)


RECORDS = [
    record("train", 1, 8.0),
    record("train", 2, 4.0),
    record("eval", 2, 3.5, split="val"),
    record("train", 3, None),  # not finite
    record("train", 4, 3.0),
    dict(kind="sample", step=4, bytes_seen=400, wall_s=240.0, text="a"),
    record("eval", 4, 2.5, split="val", whole_split=True),
    record("eval", 4, 2.75, split="test", whole_split=True),
]


@pytest.fixture
def run(tmp_path):
    """Makes run directories, whose last line is incomplete."""

    def make(name, records):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"kind": "tra')
        return tmp_path / name

    return make


@pytest.fixture
def plot(monkeypatch, capsys):
    """Runs the script; returns its status and what it wrote to standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot_curves.py", *map(str, arguments)])
        return plot_curves.main(), capsys.readouterr().err

    return call


def test_curves_are_what_was_recorded_but_for_a_torn_last_line(run):
    assert read_run(run("a", RECORDS)) == {
        "train": [(100, 1, 8.0), (200, 2, 4.0), (400, 4, 3.0)],
        "val": [(200, 2, 3.5)],
        "test": [(400, 4, 2.75)],
    }


def test_the_picture_is_written_also_to_a_new_folder(run, plot, tmp_path):
    output = tmp_path / "new/folder/a.png"
    assert plot(run("a", RECORDS), run("b", RECORDS[:1]), "-o", output) == (0, "")
    assert matplotlib.image.imread(output).shape == (440, 1100, 4)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.png.gz"])
def test_an_unknown_format_is_one_line_that_names_the_formats(run, plot, tmp_path, name):
    status, err = plot(run("run", RECORDS), "-o", tmp_path / name)
    assert status == 2 and err.count("\n") == 1
    assert f"{name}: expected a name that ends in one of " in err and " .png" in err and " .svg" in err


def test_a_folder_that_cannot_be_made_is_one_line(run, plot, tmp_path):
    (tmp_path / "file").touch()
    status, err = plot(run("run", RECORDS), "-o", tmp_path / "file/a.png")
    assert (status, err) == (1, f"error: {tmp_path}/file: File exists\n")


def test_a_run_without_records_is_left_out_with_a_line(run, plot, tmp_path):
    status, err = plot(run("a", RECORDS), run("empty", []), "-o", tmp_path / "a.png")
    assert (status, err) == (0, f"{tmp_path}/empty: nothing to draw yet\n")


def test_nothing_to_draw_is_an_error(run, plot, tmp_path):
    status, err = plot(run("empty", []), "-o", tmp_path / "a.png")
    assert status == 2
    assert err.splitlines()[-1] == "error: expected a run that has recorded at least one step"
    assert not (tmp_path / "a.png").exists()


def test_no_run_is_an_error(plot, tmp_path):
    assert plot(tmp_path) == (2, f"error: {tmp_path}: expected a run directory with metrics.jsonl\n")


# What is cut off


def curves(train, val=(), test=()):
    return {
        name: [plot_curves.Point(100 * i, float(i), bpb) for i, bpb in enumerate(scores)]
        for name, scores in (("train", train), ("val", val), ("test", test))
    }


def test_the_top_is_a_little_above_the_first_validation_score():
    run = curves(np.linspace(8, 2, 100), val=[7.9, 2.5], test=[2.25])
    assert limits([run]) == pytest.approx((2 - 0.05 * 5.9, 7.9 + 0.05 * 5.9))


def test_nine_tenths_of_the_points_are_shown_if_there_is_no_earlier_score():
    run = curves([8, *[3.0] * 18, 2.0], val=[2.5])
    assert limits([run]) == pytest.approx((1.95, 3.05))


def test_a_run_that_diverges_does_not_squeeze_the_others():
    bottom, top = limits([curves([3.0, 2.0], val=[2.5]), curves([8.0, 900.0, 800.0], val=[700.0])])
    assert (bottom, top) == pytest.approx((1.7, 8.3))


def test_points_that_are_all_alike_have_some_space():
    assert limits([curves([3.0, 3.0])]) == pytest.approx((2.9, 3.1))
