import gzip
import re
import subprocess

import pytest

from tests.e2e.test_mistakes import one_line_error

LINE = re.compile(r"(.+): (\d+\.\d{4}) bpb over ([\d,]+) bytes \(checkpoint (.+)\)\n")


def scored(result):
    """Parse the printed line; returns ``(file, bpb, bytes, checkpoint)``."""
    assert result.returncode == 0, result.stderr
    file, bpb, count, checkpoint = LINE.fullmatch(result.stdout.decode()).groups()
    return file, float(bpb), int(count.replace(",", "")), checkpoint


@pytest.fixture(scope="module")
def short_text(finished_run, commands):
    path = commands.folder / "runs/short, text"
    path.write_bytes(commands.text.read_bytes()[:700])
    return path


def test_a_file_is_scored_in_one_line(finished_run, commands, short_text):
    file, bpb, count, checkpoint = scored(commands.call("scripts/score.py", "run=runs/whole", f"file={short_text}"))
    assert (file, count) == (str(short_text), 700)
    assert 3 < bpb < 9
    assert checkpoint.startswith("runs/whole/checkpoints/step-")


@pytest.mark.slow
def test_packed_standard_input_is_scored_as_the_same_file(finished_run, commands, short_text):
    by_file = scored(commands.call("scripts/score.py", "run=runs/whole", f"file={short_text}"))
    process = commands.start("scripts/score.py", "run=runs/whole", "file=-", stdin=subprocess.PIPE)
    out, err = process.communicate(gzip.compress(short_text.read_bytes()), timeout=300)
    by_input = scored(subprocess.CompletedProcess([], process.returncode, out, err.decode()))
    assert by_input[1:] == by_file[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=runs/whole"], "file=FILE"),
        (["file=a"], "expected the run"),
        (["run=runs/whole", "file=missing"], "missing: No such file"),
        (["run=runs/whole", "file=/dev/null"], "at least one byte"),
        (["run=runs/whole", "file=runs/text.7z"], "runs/text.7z is packed with 7z, which cannot be read"),
    ],
)
def test_a_usage_error_is_one_line(finished_run, commands, arguments, message):
    (commands.folder / "runs/text.7z").write_bytes(b"7z\xbc\xaf\x27\x1c\0\4")
    assert message in one_line_error(commands.call("scripts/score.py", *arguments), 2)
