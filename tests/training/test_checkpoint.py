import json
import os
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention.training import checkpoint
from local_attention.training.checkpoint import Checkpoints, read, restore, sidecar, tensors_of, write_atomically
from local_attention.training.config import OptimizerConfig
from local_attention.training.errors import CheckpointError, RunError
from local_attention.training.optimizer import build_optimizer, loss_scaler
from local_attention.training.step import TrainStep
from tests.training.toys import TOKENS, Bigram, randomise, tiny_transformer

TENSORS = {"model.w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def parts(model, name="adamw", precision="float32"):
    """A model and its optimizer."""
    scaler = loss_scaler(precision, 2.0**20)
    return model, build_optimizer(OptimizerConfig(name=name), model.trainable_params(), scaler)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def save(checkpoints, step, best=False, **meta):
    return checkpoints.save({"model.w": np.full(3, step, np.float32)}, {"step": step, **meta}, best)


def steps(checkpoints):
    """Return the steps of all checkpoints, reading each of them."""
    return [read(path)[1]["step"] for path in checkpoints.complete()]


def files(checkpoints):
    return {path.name for path in checkpoints.directory.iterdir()}


# Round trips.


def test_tensors_and_metadata_come_back_as_they_were(checkpoints):
    meta = {"step": 12, "best_val_bpb": None, "config": {"model": {"dim": 3}}, "text": "a ‘b’\u2028\n"}
    path = checkpoints.save(TENSORS, meta)
    tensors, read_meta = read(path)
    assert path.name == "step-00000012.safetensors"
    assert read_meta == {"format": checkpoint.FORMAT, **meta}
    assert tensors.keys() == TENSORS.keys()
    np.testing.assert_array_equal(tensors["model.w"], TENSORS["model.w"])
    assert tensors["model.w"].dtype == np.float32


def test_weights_and_optimizer_state_come_back_as_they_were(checkpoints):
    model, optimizer = parts(tiny_transformer(max_ngram=2, ngram_buckets=11))
    randomise([*model.get_parameters(), *optimizer.get_parameters()])
    saved = tensors_of(model, optimizer)
    tensors, _ = read(checkpoints.save(saved, {"step": 1}))

    other, other_optimizer = parts(tiny_transformer(max_ngram=2, ngram_buckets=11))
    restore(tensors, other, other_optimizer)
    restored = tensors_of(other, other_optimizer)
    assert restored.keys() == saved.keys()
    assert {"model.ngram_emb.embedding_table", "optimizer.squares"} < saved.keys()
    assert {name.partition(".")[0] for name in saved} == {"model", "optimizer"}
    for name in saved:
        np.testing.assert_array_equal(restored[name], saved[name], err_msg=name)


def test_a_restored_run_takes_the_very_step_that_the_saved_one_would_have_taken(checkpoints):
    batches = Tensor(np.random.default_rng(0).integers(0, TOKENS, (3, 1, 4, 9)), ms.int32)
    model, optimizer = parts(Bigram(0))
    step = TrainStep(model, optimizer, 1, 1.0).set_train()
    step(batches[0]), step(batches[1])
    tensors, _ = read(checkpoints.save(tensors_of(model, optimizer), {"step": 2}))
    before = tensors["model.table"].copy()
    step(batches[2])

    other, other_optimizer = parts(Bigram(1))
    restore(tensors, other, other_optimizer)
    TrainStep(other, other_optimizer, 1, 1.0).set_train()(batches[2])
    wanted, got = tensors_of(model, optimizer), tensors_of(other, other_optimizer)
    assert abs(wanted["model.table"] - before).max() > 1e-5
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def test_the_loss_scale_comes_back_as_it_was_and_a_run_can_continue_in_another_precision(checkpoints):
    model, optimizer = parts(Bigram(0), precision="float16")
    optimizer.loss_scaler.scale_value.set_data(Tensor(512.0))
    optimizer.loss_scaler.counter.set_data(Tensor(7, ms.int32))
    tensors, _ = read(checkpoints.save(tensors_of(model, optimizer), {"step": 1}))

    other, other_optimizer = parts(Bigram(1), precision="float16")
    restore(tensors, other, other_optimizer)
    scaler = other_optimizer.loss_scaler
    assert (float(scaler.scale_value.asnumpy()), int(scaler.counter.asnumpy())) == (512, 7)

    single, single_optimizer = parts(Bigram(1))
    restore(tensors, single, single_optimizer)  # which needs no scale
    np.testing.assert_array_equal(single.table.asnumpy(), model.table.asnumpy())
    restore(tensors_of(single, single_optimizer), *parts(Bigram(2), precision="float16"))  # begins with its own


def test_weights_alone_can_be_restored_from_a_checkpoint_with_optimizer_state():
    model, optimizer = parts(Bigram(0))
    tensors = tensors_of(model, optimizer)
    other = Bigram(1)
    restore(tensors, other)
    np.testing.assert_array_equal(other.table.asnumpy(), model.table.asnumpy())


def test_a_checkpoint_of_weights_alone_leaves_the_optimizer_as_it_is():
    model, optimizer = parts(Bigram(0))
    randomise(optimizer.get_parameters())
    tensors = tensors_of(model, optimizer)
    weights = {name: value + 1 for name, value in tensors.items() if name.startswith("model.")}
    restore(weights, model, optimizer)
    for name, value in tensors_of(model, optimizer).items():
        np.testing.assert_array_equal(value, weights.get(name, tensors[name]), err_msg=name)


def test_a_checkpoint_does_not_change_with_the_weights_it_was_taken_from(checkpoints):
    model, optimizer = parts(Bigram(0))
    before = model.table.asnumpy().copy()
    path = checkpoints.save(tensors_of(model, optimizer), {"step": 1})
    model.table.set_data(Tensor(before + 1))
    np.testing.assert_array_equal(read(path)[0]["model.table"], before)


# Refusals.


@pytest.mark.parametrize(
    "other, name, message",
    [
        ({"depth": 2}, "adamw", "lacks the tensor model.layers.1."),
        ({"dim": 24}, "adamw", r"model\.\S+ has shape \S+ \S+ in the checkpoint, expected "),
        ({"use_abs_pos_emb": False}, "adamw", "has an unexpected tensor model.pos_emb.embedding_table"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_naming_the_tensor(other, name, message):
    tensors = tensors_of(*parts(tiny_transformer()))
    model, optimizer = parts(tiny_transformer(**other), name)
    before = tensors_of(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        restore(tensors, model, optimizer)
    for key, value in tensors_of(model, optimizer).items():
        np.testing.assert_array_equal(value, before[key], err_msg=f"{key} was changed all the same")


def test_a_checkpoint_of_another_optimizer_is_refused_naming_the_tensor():
    tensors = tensors_of(*parts(Bigram()))
    del tensors["optimizer.moment2.table"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor optimizer\.moment2\.table"):
        restore(tensors, *parts(Bigram()))
    tensors = tensors_of(*parts(Bigram())) | {"optimizer.moment3.table": np.zeros(1, np.float32)}
    with pytest.raises(CheckpointError, match=r"unexpected tensor optimizer\.moment3\.table"):
        restore(tensors, *parts(Bigram()))


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "no such checkpoint"),
        (lambda path: sidecar(path).unlink(), r"its sidecar step-00000001\.json is missing"),
        (cut, "cannot be read"),
        (lambda path: cut(sidecar(path)), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: sidecar(path).write_bytes(b""), "cannot be read"),
        (lambda path: sidecar(path).write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: path.write_bytes(os.urandom(100)), "cannot be read"),
        (lambda path: sidecar(path).write_text('{"format": 99, "step": 1}'), "has format 99, expected 1"),
        (lambda path: sidecar(path).write_text('{"step": 1}'), "has format None, expected 1"),
    ],
)
def test_a_corrupt_checkpoint_is_refused_naming_the_file(checkpoints, damage, message):
    path = save(checkpoints, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_detected(checkpoints):
    path = save(checkpoints, 1)
    flip_a_bit(path)
    with pytest.raises(CheckpointError, match="its checksum differs from that in its sidecar"):
        read(path)


def test_an_old_checkpoint_without_checksum_can_be_read(checkpoints):
    path = save(checkpoints, 3)
    meta = json.loads(sidecar(path).read_text())
    del meta["sha256"]
    sidecar(path).write_text(json.dumps(meta))
    assert read(path)[1] == meta


@pytest.mark.parametrize("name", ["last", "best"])
def test_corrupt_checkpoints_are_skipped_with_a_warning(checkpoints, caplog, name):
    paths = [save(checkpoints, step, best=True) for step in (1, 2, 3)]
    checkpoints.keep_last = 9
    paths += [save(checkpoints, 4, best=True)]
    for path in paths[2:]:
        flip_a_bit(path)
    assert checkpoints.find(name) == paths[1]
    assert [path.name in caplog.text for path in paths] == [False, False, True, True]
    flip_a_bit(paths[1])
    with pytest.raises(CheckpointError, match=r"all checkpoints in \S+ are corrupt"):
        checkpoints.find(name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_checkpoint_with_nan_or_infinity_is_not_written(checkpoints, value):
    save(checkpoints, 1)
    before = files(checkpoints)
    with pytest.raises(RunError, match=r"step 2: model\.w contains NaN or infinity"):
        checkpoints.save({"model.w": np.array([1, value], np.float32)}, {"step": 2})
    assert files(checkpoints) == before


def test_incomplete_files_of_a_killed_process_are_removed_and_nothing_else(checkpoints):
    save(checkpoints, 1), save(checkpoints, 2, best=True)
    whole = files(checkpoints)
    for name in (".step-00000003.safetensors.partial-7", ".last.partial-7", "step-00000003.json"):
        (checkpoints.directory / name).write_text("")
    checkpoint.remove_leftovers(checkpoints.directory)
    assert files(checkpoints) == whole


def test_a_sidecar_that_is_no_object_is_refused(checkpoints):
    path = save(checkpoints, 1)
    sidecar(path).write_text("[]")
    with pytest.raises(CheckpointError):
        read(path)


# Links, and which checkpoints are kept.


def test_last_is_the_newest_and_best_the_best(checkpoints):
    save(checkpoints, 1, best=True)
    second, third = save(checkpoints, 2, best=True), save(checkpoints, 3)
    assert checkpoints.find("last") == third.resolve()
    assert checkpoints.find("best") == second.resolve()
    assert not os.path.isabs(os.readlink(checkpoints.directory / "last"))  # a run directory can be moved


def test_a_checkpoint_can_be_read_by_its_link(checkpoints):
    save(checkpoints, 1)
    assert read(checkpoints.directory / "last")[1]["step"] == 1


@pytest.mark.parametrize(
    "keep_last, kept", [(1, [2, 6]), (2, [2, 5, 6]), (4, [2, 3, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep_last, kept):
    checkpoints = Checkpoints(tmp_path, keep_last)
    for step in range(1, 7):
        save(checkpoints, step, best=step == 2)
    assert steps(checkpoints) == kept
    named = {f"step-{step:08d}.{end}" for step in kept for end in ("safetensors", "json")}
    assert files(checkpoints) == named | {"last", "best"}


def test_what_was_just_saved_is_kept_even_if_others_have_later_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (10, 20, 15):
        save(checkpoints, step)
    assert steps(checkpoints) == [15, 20]


def remove_links(checkpoints):
    for name in ("last", "best"):
        (checkpoints.directory / name).unlink()


def test_without_links_best_and_last_are_known_from_the_metadata_and_the_best_is_never_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        save(checkpoints, step, best=step == 2, best_step=None if step == 1 else 2)
    remove_links(checkpoints)
    assert [read(checkpoints.find(name))[1]["step"] for name in ("best", "last")] == [2, 3]
    save(checkpoints, 4, best_step=2)
    assert steps(checkpoints) == [2, 4]
    assert read(checkpoints.find("best"))[1]["step"] == 2
    save(checkpoints, 5, best=True, best_step=5)
    assert steps(checkpoints) == [5]


def test_links_that_point_elsewhere_do_not_count(checkpoints):
    for step in (1, 2, 3):
        save(checkpoints, step, best_step=2)
    checkpoints.keep_last = 9
    for step in (2, 3):
        save(checkpoints, step, best_step=2)
    for name in ("best", "last"):
        checkpoints.link(name, checkpoints.path(1))
    assert [read(checkpoints.find(name))[1]["step"] for name in ("best", "last")] == [2, 3]


def test_if_the_newest_is_corrupt_the_best_before_it_counts(checkpoints):
    checkpoints.keep_last = 9
    for step, best in ((1, 1), (2, 1), (3, 3)):
        path = save(checkpoints, step, best=step == best, best_step=best)
    flip_a_bit(path)
    assert [read(checkpoints.find(name))[1]["step"] for name in ("best", "last")] == [1, 2]


def test_before_the_first_evaluation_the_newest_is_the_best(checkpoints):
    save(checkpoints, 0, best_step=None), save(checkpoints, 1, best_step=None)
    assert read(checkpoints.find("best"))[1]["step"] == 1


def test_a_file_system_without_links_keeps_checkpoints_all_the_same(checkpoints, monkeypatch):
    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(checkpoint.Path, "symlink_to", refuse)
    save(checkpoints, 1, best=True, best_step=1), save(checkpoints, 2, best_step=1)
    assert [read(checkpoints.find(name))[1]["step"] for name in ("best", "last")] == [1, 2]


@pytest.mark.parametrize("best_step", [2, None])
def test_a_checkpoint_is_copied_with_the_best_one_of_its_run(checkpoints, tmp_path, best_step):
    checkpoints.keep_last = 9
    for step in (1, 2, 3, 4):
        save(checkpoints, step, best=step == 2, best_step=best_step)
    copies = Checkpoints(tmp_path / "other/checkpoints")
    copies.copy(checkpoints.path(3))
    assert steps(copies) == ([2, 3] if best_step else [3])
    for path in copies.complete():
        for file in (path, sidecar(path)):
            assert file.read_bytes() == (checkpoints.directory / file.name).read_bytes()
    assert read(copies.find("last"))[1]["step"] == read(copies.directory / "last")[1]["step"] == 3


def test_a_step_can_be_saved_again_as_the_best(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 1, best=True)
    assert steps(checkpoints) == [1]
    assert checkpoints.find("best") == checkpoints.find("last")


def test_without_checkpoints_nothing_is_found(checkpoints):
    assert checkpoints.find("last") is None


@pytest.mark.parametrize("name", ["last", "best"])
def test_without_a_valid_link_the_newest_complete_checkpoint_is_found(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3):
        path = save(checkpoints, step, best=True)
    sidecar(path).unlink()
    assert checkpoints.find(name).name == "step-00000002.safetensors"
    path.unlink()
    assert checkpoints.find(name).name == "step-00000002.safetensors"
    (tmp_path / name).unlink()
    assert checkpoints.find(name).name == "step-00000002.safetensors"


# Atomic writes.


class PowerCut(BaseException):
    """An exception that no program catches."""


def write_half(tensors, path):
    path.write_bytes(b"half")
    raise PowerCut


def fail_immediately(*_):
    raise PowerCut


@pytest.mark.parametrize("where, fail", [("save_file", write_half), ("write_text", fail_immediately)])
@pytest.mark.parametrize("step", [3, 2])  # a new one, and an existing one
def test_a_save_that_fails_midway_leaves_the_earlier_checkpoints(checkpoints, monkeypatch, where, fail, step):
    for earlier in (1, 2):
        save(checkpoints, earlier, best=earlier == 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, fail)
        with pytest.raises(PowerCut):
            save(checkpoints, step, best=True)
    assert steps(checkpoints) == [1, 2]
    assert checkpoints.find("last").name == "step-00000002.safetensors"
    assert checkpoints.find("best").name == "step-00000001.safetensors"
    assert not [name for name in files(checkpoints) if "partial" in name]
    save(checkpoints, 3)
    assert checkpoints.find("last").name == "step-00000003.safetensors"


@pytest.mark.parametrize("failing_call", range(1, 20))
def test_after_a_failure_of_any_system_call_a_complete_checkpoint_is_found(checkpoints, monkeypatch, failing_call):
    checkpoints.keep_last = 1
    for step in (1, 2):
        save(checkpoints, step, best=step == 1)
    calls = 0

    def failing(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise PowerCut
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        functions = {name: failing(getattr(os, name)) for name in ("open", "fsync", "replace")}
        patch.setattr(checkpoint, "os", SimpleNamespace(**{**vars(os), **functions}))
        patch.setattr(checkpoint.Path, "unlink", failing(checkpoint.Path.unlink))
        patch.setattr(checkpoint.Path, "symlink_to", failing(checkpoint.Path.symlink_to))
        try:
            save(checkpoints, 3)
        except PowerCut:
            pass
        else:
            assert failing_call > calls
    tensors, meta = read(checkpoints.find("last"))
    assert meta["step"] in (2, 3)
    assert tensors["model.w"][0] == meta["step"]
    assert read(checkpoints.find("best"))[1]["step"] == 1


def test_a_file_is_flushed_before_it_is_moved_into_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("move"), replace(*paths)))
    write_atomically(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert events == ["flush", "move", "flush"]  # file, then its name in the directory
    assert (tmp_path / "file").read_text() == "new"


def test_a_file_is_complete_at_every_moment(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial):
        partial.write_text("n")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # renaming is atomic within a file system only
        partial.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
