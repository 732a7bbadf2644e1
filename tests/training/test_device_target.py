import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import pytest

from local_attention import kernels
from local_attention.training import device
from local_attention.training.config import TrainConfig
from local_attention.training.device import (
    estimated_memory_bytes,
    peak_memory_bytes,
    use_device,
    warn_if_memory_is_short,
)
from local_attention.training.errors import UsageError
from tests.training.toys import tiny_transformer


@pytest.fixture
def calls(monkeypatch):
    """The calls of MindSpore."""
    calls = []
    monkeypatch.setattr(ms, "set_context", lambda **options: calls.append(options))
    monkeypatch.setattr(ms, "set_device", lambda target: calls.append(target))
    return calls


@pytest.mark.parametrize("target", ["CPU", "GPU", "Ascend"])
def test_static_graphs_are_compiled_for_the_target(calls, target):
    use_device(target)
    assert calls == [{"mode": ms.GRAPH_MODE}, target]


def test_auto_leaves_the_target_to_mindspore(calls):
    use_device("auto")
    assert calls == [{"mode": ms.GRAPH_MODE}]


def test_a_type_that_the_device_cannot_compute_in_is_refused(calls):
    use_device("CPU", "float16")
    refusal = "=bfloat16: .* do not multiply matrices in bfloat16: use float32"
    with pytest.raises(UsageError, match=f"^device.precision{refusal}"):
        use_device("CPU", "bfloat16")
    with pytest.raises(UsageError, match=f"^train.precision{refusal}"):
        use_device("CPU", "bfloat16", "train.precision")


def test_products_in_bfloat16_are_asked_for_and_refused_where_there_are_none(calls, monkeypatch):
    wanted = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "multiply_in_bfloat16", wanted.append)
        use_device("CPU"), use_device("CPU", matmul_precision="bfloat16")
    assert wanted == [False, True]
    monkeypatch.setattr(kernels, "library", lambda: None)
    use_device("CPU")
    refusal = "^device.matmul_precision=bfloat16: the operators in C\\+\\+ do not run here.*; use float32$"
    with pytest.raises(UsageError, match=refusal):
        use_device("CPU", matmul_precision="bfloat16")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_unsupported_target_is_a_usage_error_in_one_line(calls, monkeypatch, kind):
    def refuse(target):
        raise kind("Unsupported device.\n\n----\n- The C++ call stack")

    monkeypatch.setattr(ms, "set_device", refuse)
    with pytest.raises(UsageError) as error:
        use_device("GPU")
    assert str(error.value).startswith("device.target=GPU cannot be used")
    assert str(error.value).endswith(": Unsupported device.")


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_each_system(monkeypatch, platform, unit):
    usage = {resource.RUSAGE_SELF: SimpleNamespace(ru_maxrss=5000)}
    monkeypatch.setattr(device.resource, "getrusage", usage.get)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory_bytes() == 5000 * unit


def test_a_run_that_needs_too_much_memory_is_a_warning_with_both_numbers(monkeypatch, caplog):
    model, train = tiny_transformer(dim=64, depth=2), TrainConfig(seq_len=1000, batch_size=10, grad_accum_every=1)
    needed = estimated_memory_bytes(model, train)
    table = 2 * 65521 * 48  # one copy of it, but four of the linear layer that follows
    with_ngrams = estimated_memory_bytes(tiny_transformer(dim=64, depth=2, max_ngram=3), train)
    assert with_ngrams - needed == 4 * (table + 4 * 2 * 48 * 64)
    activations = 4 * 55 * 64 * 2 * 1000 * 10
    assert activations + 0.25e9 < needed < activations + 0.35e9
    in_half = estimated_memory_bytes(model, replace(train, precision="float16"))
    assert in_half - needed == pytest.approx(1.5 * activations, rel=0.01)  # as measured; weights stay float32
    for available, warned in ((needed * 1.1, False), (needed * 0.9, True)):
        monkeypatch.setattr(device.os, "sysconf", {"SC_PHYS_PAGES": available / 4096, "SC_PAGE_SIZE": 4096}.get)
        caplog.clear()
        warn_if_memory_is_short(model, train)
        assert ("this run needs about 0.6 GB, and this machine has 0.5 GB" in caplog.text) == warned
