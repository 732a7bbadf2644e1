import math

import mindspore as ms
import numpy as np
import pytest

from local_attention.training.evaluate import Evaluator
from local_attention.training.score import score_stream
from tests.training.toys import log_softmax, tiny_transformer

TEXT = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    ms.set_seed(0)
    return tiny_transformer(use_abs_pos_emb=False).set_train(False)


def bits_per_byte(model, text):
    """Return the reference in float64 from the logits of one forward pass, the first byte following a newline."""
    inputs = np.concatenate([[ord("\n")], text[:-1]]).astype(np.int32)
    log_p = log_softmax(model(ms.Tensor(inputs[None])).asnumpy()[0].astype(np.float64))
    return -log_p[np.arange(len(text)), text].mean() / math.log(2)


@pytest.mark.parametrize("length", [1, 300, *(pytest.param(length, marks=pytest.mark.slow) for length in (2, 37))])
def test_each_byte_is_predicted_from_all_before_it(model, length):
    score = score_stream(model, [TEXT[:length]])
    assert score.bytes_scored == length
    assert score.bpb == pytest.approx(bits_per_byte(model, TEXT[:length]), abs=1e-5)


def test_the_chunks_of_a_text_do_not_affect_the_score(model):
    whole = score_stream(model, [TEXT])
    chunks = score_stream(model, [TEXT[:1], TEXT[1:50], TEXT[50:]])
    assert chunks.bytes_scored == whole.bytes_scored == 300
    assert chunks.bpb == pytest.approx(whole.bpb, abs=1e-6)


def test_the_score_agrees_with_evaluation_in_overlapping_windows(model):
    overlapped = Evaluator(model, 64, 4)(TEXT, 0, len(TEXT), stride=8)
    assert score_stream(model, [TEXT]).bpb == pytest.approx(overlapped.bpb, abs=1e-3)


def test_a_text_longer_than_learned_positions_is_scored_to_its_end():
    score = score_stream(tiny_transformer(use_abs_pos_emb=True).set_train(False), [TEXT])
    assert score.bytes_scored == 300 and 7 < score.bpb < 9


def test_an_empty_text_is_refused(model):
    with pytest.raises(ValueError, match="at least one byte"):
        score_stream(model, [])
