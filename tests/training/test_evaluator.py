import math

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor, nn

from data import Corpus
from local_attention.training import evaluate
from local_attention.training.evaluate import Evaluator, eval_span, windows
from tests.training.toys import Clock, examples, log_softmax, tiny_transformer

SEQ_LEN = 16
DATA = np.random.default_rng(0).integers(0, 256, 150, dtype=np.uint8)


@st.composite
def spans(draw):
    first, length, seq_len = draw(st.integers(0, 50)), draw(st.integers(1, 300)), draw(st.integers(1, 40))
    return first, first + length, seq_len, draw(st.integers(1, seq_len))


@given(spans())
@examples(300)
def test_each_label_is_scored_once_and_in_order(span):
    first, stop, _, _ = span
    scored = [label for _, begin, end in windows(*span) for label in range(begin, end)]
    assert scored == list(range(first, stop))


@given(spans())
@examples(300)
def test_later_windows_have_full_context(span):
    first, stop, seq_len, stride = span
    start, begin, end = next(windows(*span))
    assert (start, begin, end) == (first, first, min(first + seq_len, stop))
    for start, begin, end in list(windows(*span))[1:]:
        assert start <= begin - (seq_len - stride)
        assert begin < end <= min(start + seq_len, stop)


# A real model.


@pytest.fixture(scope="module")
def model():
    ms.set_seed(0)
    return tiny_transformer().set_train(False)


@pytest.fixture(scope="module")
def evaluators(model):
    """Evaluators with two batch sizes; 5 does not divide the numbers of windows."""
    return {batch_size: Evaluator(model, SEQ_LEN, batch_size) for batch_size in (1, 5)}


@pytest.fixture(scope="module")
def log_p(model):
    """The model's log probabilities after each byte of windows, ``(windows, SEQ_LEN) -> (windows, SEQ_LEN, 256)``."""

    def log_p(inputs):
        ms.set_context(mode=ms.PYNATIVE_MODE)  # any number of windows without compiling
        logits = model(Tensor(inputs, ms.int32)).asnumpy()
        ms.set_context(mode=ms.GRAPH_MODE)
        return log_softmax(logits)

    return log_p


def definition(log_p, start, stop, stride):
    """Return the bits per byte, computed for each label in the first window that contains it."""
    text = np.concatenate([[10], DATA]).astype(np.int64)  # the byte before DATA[i] is text[i]
    rows, positions, labels = [], [], []
    for label in range(start, stop):
        i = label - start
        window = 0 if i < SEQ_LEN else -(-(i - SEQ_LEN + 1) // stride)
        begin = start + window * stride
        row = np.zeros(SEQ_LEN, np.int64)
        known = text[begin : label + 1]
        row[: known.size] = known
        rows.append(row)
        positions.append(known.size - 1)
        labels.append(DATA[label])
    chosen = log_p(np.array(rows))[np.arange(len(rows)), positions, labels]
    return -chosen.mean() / math.log(2)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("stride", [None, SEQ_LEN, 5, 1])
@pytest.mark.parametrize("start, stop", [(0, 1), (0, 37), (3, 3 + SEQ_LEN), (7, 90)])
def test_the_score_is_the_mean_over_all_bytes_of_the_span(evaluators, log_p, start, stop, stride, batch_size):
    score = evaluators[batch_size](DATA, start, stop, stride)
    assert score.bytes_scored == stop - start
    assert score.bpb == pytest.approx(definition(log_p, start, stop, stride or SEQ_LEN), abs=1e-5)


def test_a_shorter_stride_gives_bytes_more_context(evaluators, log_p):
    scores = {stride: evaluators[5](DATA, 7, 90, stride).bpb for stride in (16, 5)}
    assert abs(scores[16] - scores[5]) > 1e-4  # or the test above would not distinguish strides


# Inputs and labels, tested with a fake model.


class FakeModel(nn.Cell):
    pass


def fake_evaluator():
    """Return an evaluator whose model predicts each label with as many bits as its value; records the inputs."""
    evaluator = Evaluator(FakeModel(), SEQ_LEN, 3)
    evaluator.inputs, evaluator.modes = [], []

    def token_losses(inputs, labels):
        evaluator.inputs.append(inputs.asnumpy())
        evaluator.modes.append(evaluator.model.training)
        bits = np.where(labels.asnumpy() == 0, np.nan, labels.asnumpy())  # 0: padding, as no byte of the data is 0
        return Tensor(bits * math.log(2), ms.float32)

    evaluator.token_losses = token_losses
    return evaluator


@pytest.fixture
def fake():
    return fake_evaluator()


COUNT = np.arange(1, 200, dtype=np.uint8)


@given(start=st.integers(0, 100), length=st.integers(1, 99), stride=st.integers(1, SEQ_LEN))
@examples(50)
def test_padding_is_not_counted(start, length, stride):
    score = fake_evaluator()(COUNT, start, start + length, stride)
    assert score.bytes_scored == length
    assert score.bpb == pytest.approx(COUNT[start : start + length].mean(), rel=1e-6)


def test_the_first_byte_is_predicted_from_the_byte_before_the_span(fake):
    fake(COUNT, 50, 60)
    assert list(fake.inputs[0][0, :10]) == list(COUNT[49:59])


def test_the_first_byte_of_the_data_is_predicted_from_a_newline(fake):
    fake(COUNT, 0, 5)
    assert list(fake.inputs[0][0, :5]) == [10, 1, 2, 3, 4]


def test_the_first_byte_of_an_own_file_is_predicted_from_a_newline_and_not_from_the_training_split(fake):
    corpus = Corpus("some", np.full(200, 7, np.uint8), {"val": COUNT[:60]})
    score = fake(*eval_span(corpus, "val", 40))
    assert (score.bytes_scored, score.bpb) == (40, pytest.approx(20.5))
    assert list(fake.inputs[0][0, :5]) == [10, 1, 2, 3, 4]
    assert eval_span(corpus, "test")[1:] == (190, 200)


def test_all_calls_have_one_shape_and_thus_one_graph(fake):
    fake(COUNT, 0, 5)
    fake(COUNT, 3, 150, 7)
    assert {inputs.shape for inputs in fake.inputs} == {(3, SEQ_LEN)}


def test_progress_wraps_the_batches(fake):
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    fake(COUNT, 0, 7 * SEQ_LEN, progress=progress)
    assert seen == [3, 3, 1]


def test_an_exception_before_a_batch_ends_the_evaluation(fake):
    fake.model.training = True

    def before_batch():
        if len(fake.inputs) == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fake(COUNT, 0, 150, before_batch=before_batch)
    assert len(fake.inputs) == 2
    assert fake.model.training


@pytest.mark.parametrize("length", [5, 199])
def test_the_estimate_is_the_time_of_two_batches_without_compilation_for_all_bytes(fake, monkeypatch, length):
    clock, token_losses = Clock(), fake.token_losses

    def slow(inputs, labels):
        clock.now += 2 if fake.inputs else 60  # the first call compiles
        return token_losses(inputs, labels)

    monkeypatch.setattr(evaluate, "time", clock)
    fake.token_losses = slow
    data = np.resize(COUNT, length)
    assert fake.estimate_seconds(data, 0, length) == pytest.approx(2 if length == 5 else 4 * 199 / 96)


def test_a_checksum_changes_with_the_weights_and_with_each_byte_that_counts(model):
    evaluator, data = Evaluator(model, SEQ_LEN, 5), DATA.copy()
    checksum = evaluator.checksum(data, 10, 20)
    assert checksum == Evaluator(model, SEQ_LEN, 3).checksum(DATA, 10, 20)
    others = [evaluator.checksum(data, *span) for span in ((10, 21), (11, 20), (0, 20))]
    others.append(Evaluator(model, 8, 5).checksum(data, 10, 20))
    for i in (9, 19):
        changed = data.copy()
        changed[i] ^= 1
        others.append(evaluator.checksum(changed, 10, 20))
    for i in (8, 20):
        changed = data.copy()
        changed[i] ^= 1
        assert evaluator.checksum(changed, 10, 20) == checksum
    ms.set_seed(1)
    others.append(Evaluator(tiny_transformer(), SEQ_LEN, 5).checksum(data, 10, 20))
    assert len({checksum, *others}) == 1 + len(others)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_evaluation_mode_only_while_scoring(fake, training):
    fake.model.training = training
    fake(COUNT, 0, 100)
    assert set(fake.modes) == {False}
    assert fake.model.training is training


@pytest.mark.parametrize(
    "start, stop, stride", [(5, 5, None), (6, 5, None), (0, 9, SEQ_LEN + 1), (0, 9, -1), (0, 9, 0)]
)
def test_an_empty_span_and_a_stride_out_of_range_are_refused(fake, start, stop, stride):
    with pytest.raises(ValueError, match=r"expected start < stop and a stride of 1 … 16, got"):
        fake(COUNT, start, stop, stride)
    assert not fake.inputs
