"""Computing in float16 and float64, with every option, against the definition in float64."""

from copy import deepcopy
from dataclasses import fields

import mindspore as ms
import numpy as np
import pytest
from mindspore import amp, nn, ops

from local_attention import LocalMHA
from local_attention.decoding import DecodingSession
from local_attention.decoding.kept import kept_session
from local_attention.hyper_connections import HyperConnection
from local_attention.options import LocalAttentionOptions, LocalMHAOptions
from local_attention.precision import cast, widen
from tests.local_attention.backends.test_backends import CELLS, arrays, defined, example, name_of
from tests.local_attention.cells import (
    Loss,
    ValueAndGradients,
    both_modes,
    in_a_graph,
    randomise,
    run,
    tensor,
    value_and_parameter_gradients,
)
from tests.local_attention.models import feed_in_pieces, sequences, transformer

every_option = pytest.mark.parametrize(
    ("schema", "name"), [(schema, field.name) for schema in CELLS for field in fields(schema)], ids=name_of
)


def value_and_gradients(cell, inputs, cotangent, dtype):
    value, gradients = ValueAndGradients(cell)(tensor(cotangent, dtype), *(tensor(x, dtype) for x in inputs))
    assert {value.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    return value.asnumpy(), [gradient.asnumpy() for gradient in gradients]


# Options that go together: every option is in one of these.
TOGETHER = [
    (
        LocalAttentionOptions,
        dict(window_size=2, causal=True, look_backward=2, exact_windowsize=True, scale=0.2, autopad=True)
        | dict(use_xpos=True, xpos_scale_base=3.0, dim=4),
    ),
    (LocalAttentionOptions, dict(window_size=3, look_forward=2, shared_qk=True, rel_pos_emb_config=(4,), autopad=True)),
    (LocalAttentionOptions, dict(window_size=4, use_rotary_pos_emb=False, dropout=0.5)),
    (
        LocalMHAOptions,
        dict(dim=5, window_size=2, heads=4, dim_head=2, look_backward=2, exact_windowsize=False, shared_qk=True)
        | dict(causal=True, use_xpos=True, xpos_scale_base=3.0, scale=0.2, prenorm=True),
    ),
    (
        LocalMHAOptions,
        dict(dim=6, window_size=3, heads=2, dim_head=4, look_forward=1, use_rotary_pos_emb=False, dropout=0.5)
        | dict(qk_rmsnorm=True, qk_scale=2.0, gate_values_per_head=True),
    ),
]


@every_option
def test_every_option_is_computed_in_float16_and_float64(schema, name, rng):
    used, _ = example(schema, name)
    assert_computed_in_float16_and_float64(schema, used, rng)


@pytest.mark.slow
@in_a_graph
@pytest.mark.parametrize(("schema", "used"), TOGETHER, ids=name_of)
def test_options_are_computed_in_float16_and_float64_in_a_graph(schema, used, mode, rng):
    assert_computed_in_float16_and_float64(schema, used, rng)


@every_option
def test_every_option_is_among_those_in_a_graph(schema, name):
    default = {field.name: field.default for field in fields(schema)}[name]
    assert any(kind is schema and used.get(name, default) != default for kind, used in TOGETHER)


def assert_computed_in_float16_and_float64(schema, used, rng):
    cell = CELLS[schema](**used).set_train(False)
    p, inputs = randomise(cell), arrays(schema, used, rng)
    cotangent = rng.standard_normal(inputs[0].shape)
    exact, exact_gradients = value_and_gradients(cell, inputs, cotangent, ms.float64)
    np.testing.assert_allclose(exact, defined(schema, used, *inputs, p=p), atol=1e-6)
    half, half_gradients = value_and_gradients(cell, inputs, cotangent, ms.float16)
    np.testing.assert_allclose(half, exact, atol=2e-3, rtol=2e-3)
    for gradient, wanted in zip(half_gradients, exact_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-2, rtol=1e-2)


def assert_rounded_once(found, exact):
    """``found`` in float16 is at most half a unit in the last place from ``exact``, and a bit."""
    assert found.dtype == ms.float16 and exact.dtype == ms.float64
    found, exact = found.asnumpy(), exact.asnumpy()
    assert (abs(found - exact) < 0.51 * np.spacing(abs(found)).astype(np.float64)).all()


def test_weights_of_hyper_connections_are_not_rounded(rng):
    connection = HyperConnection(4, 3, 0)
    randomise(connection)
    x, out = (rng.standard_normal(shape).astype(np.float16).astype(np.float64) for shape in ((5, 3, 4), (5, 4)))
    (half_input, half_mixed, half_beta), (exact_input, exact_mixed, exact_beta) = (
        connection.pre(tensor(x, dtype)) for dtype in (ms.float16, ms.float64)
    )
    assert_rounded_once(half_input, exact_input)
    assert_rounded_once(half_mixed, exact_mixed)
    mixed = half_mixed.astype(ms.float64)
    assert_rounded_once(
        connection.post(tensor(out, ms.float16), half_mixed, half_beta),
        connection.post(tensor(out, ms.float64), mixed, exact_beta),
    )


def test_gates_are_not_rounded(rng):
    mha = LocalMHA(dim=8, window_size=3, dim_head=4, heads=2, gate_values_per_head=True)
    mha.to_out.weight.set_data(tensor(np.eye(8)))  # exact in every type
    out = rng.standard_normal((1, 5, 8)).astype(np.float16).astype(np.float64)
    gates = tensor(rng.standard_normal((5, 2)))
    half, exact = (mha.merge(tensor(out, dtype), gates) for dtype in (ms.float16, ms.float64))
    assert_rounded_once(half, exact)


@both_modes
def test_attention_alone_may_compute_in_another_type_than_its_projections(mode, rng):
    mha = LocalMHA(dim=8, window_size=4, dim_head=4, heads=2)
    in_half = deepcopy(mha)
    in_half.attention.to_float(ms.float16)
    x = rng.standard_normal((1, 70, 8))
    assert 1e-5 < abs(run(mha, x) - run(in_half, x)).max() < 1e-2


# A model: to_float and mindspore.amp

OPTIONS = dict(max_ngram=2, ngram_buckets=97, ngram_dim=3)
QUICK, SLOW = ["to_float", "O2"], ["O1", "O3", "auto"]  # levels


def in_half(model, level):
    """What computes in float16: the model, or a cell around it that gives float32."""
    return model.to_float(ms.float16) if level == "to_float" else amp.auto_mixed_precision(model, level)


@pytest.mark.parametrize(
    ("mode", "level"),
    [("eager", level) for level in QUICK]
    + [pytest.param("eager", level, marks=pytest.mark.slow) for level in SLOW]
    + [pytest.param("graph", level, marks=pytest.mark.slow) for level in ("to_float", "O1")],
    indirect=["mode"],
)
def test_a_model_in_half_precision_predicts_learns_and_generates(level, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, single = sequences(2, 11), transformer(**OPTIONS)
    logits, prime = run(single, x), x[:, :5]
    loss, gradients = value_and_parameter_gradients(Loss(single), x)
    model = transformer(**OPTIONS)
    half = in_half(model, level)
    out = half(tensor(x))
    assert out.dtype == (ms.float16 if half is model else ms.float32)
    error = abs(out.asnumpy() - logits).max()
    assert 1e-5 < error < 1e-2 * abs(logits).max()  # it is not float32
    half_loss, half_gradients = value_and_parameter_gradients(Loss(half), x)
    assert half_loss == pytest.approx(loss, abs=5e-3)
    for name, gradient in half_gradients.items():
        assert gradient.dtype == np.float32  # as the parameters
        np.testing.assert_allclose(gradient, gradients[name], atol=1e-2, err_msg=name)
    np.testing.assert_array_equal(
        model.generate(prime, 4, temperature=0).asnumpy(), single.generate(prime, 4, temperature=0).asnumpy()
    )
    np.testing.assert_array_equal(run(single, x), logits)  # which shares cells with the other


@pytest.mark.parametrize("schema", CELLS, ids=name_of)
@pytest.mark.parametrize(
    ("mode", "level"),
    [("eager", level) for level in QUICK + SLOW] + [pytest.param("graph", "O2", marks=pytest.mark.slow)],
    indirect=["mode"],
)
def test_a_cell_alone_in_half_precision_has_gradients_in_the_types_of_inputs_and_parameters(
    schema, level, mode, rng, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    used, _ = example(schema, "shared_qk")
    cell, inputs = CELLS[schema](**used).set_train(False), arrays(schema, used, rng)
    randomise(cell)
    cotangent = rng.standard_normal(inputs[0].shape)
    exact, exact_gradients = value_and_gradients(cell, inputs, cotangent, ms.float32)
    half = in_half(cell, level)
    for dtype in (ms.float32, ms.float16):
        tensors = [tensor(x, dtype) for x in inputs]
        out = half(*tensors)
        assert out.dtype == (ms.float16 if level in ("to_float", "auto") else ms.float32)
        assert 1e-5 < abs(out.asnumpy() - exact).max() < 5e-3
        gradient = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        of_inputs, of_parameters = gradient(half, cell.trainable_params())(*tensors, tensor(cotangent, out.dtype))
        assert {g.dtype for g in of_inputs} == {dtype} and {g.dtype for g in of_parameters} <= {ms.float32}
        for found, wanted in zip(of_inputs, exact_gradients, strict=True):
            np.testing.assert_allclose(found.asnumpy(), wanted, atol=1e-2, rtol=1e-2)


def test_the_type_can_be_changed_between_calls():
    model, x = transformer(), sequences(1, 6)
    before = run(model, x)
    assert model.to_float(ms.float16)(tensor(x)).dtype == model.dtype == ms.float16
    assert kept_session(model, 1).caches[0].keys[0].dtype == ms.float16
    np.testing.assert_array_equal(run(model.to_float(ms.float32), x), before)
    assert kept_session(model, 1).caches[0].keys[0].dtype == ms.float32


def test_a_model_computes_in_the_type_of_its_parameters():
    model, x = transformer(), sequences(1, 6)
    before = run(model, x)
    for parameter in model.get_parameters():
        parameter.set_dtype(ms.float64)
    out = model(tensor(x))
    assert out.dtype == model.dtype == ms.float64
    np.testing.assert_allclose(out.asnumpy(), before, atol=1e-5)
    np.testing.assert_allclose(DecodingSession(model).feed(x), before, atol=1e-5)


def test_a_cell_around_a_model_passes_its_type_on():
    model, x = transformer(), sequences(1, 6)
    net = nn.SequentialCell(model)
    assert net.to_float(ms.float16)(tensor(x)).dtype == ms.float16


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.project, self.mha = nn.Dense(6, 6), LocalMHA(dim=6, window_size=3, dim_head=4, heads=2)

    def construct(self, x):
        return self.mha(self.project(x))


def test_level_o1_leaves_cells_within_another_network_in_float32(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MindSpore writes the code of the new network
    net, x = Net(), rng.standard_normal((1, 6, 6))
    wanted, mixed = run(net, x), amp.auto_mixed_precision(net, "O1")
    assert mixed.mha.compute_type is None
    assert 0 < abs(run(mixed, x) - wanted).max() < 1e-2  # the linear layer is in float16


def test_bfloat16_is_refused_where_it_cannot_be_computed_in():
    with pytest.raises(ValueError, match="CPUs do not multiply matrices in bfloat16: use float32"):
        transformer().to_float(ms.bfloat16)


@pytest.mark.parametrize("options", [{}, dict(use_xpos=True), dict(shared_qk=True)], ids=str)
def test_the_kv_cache_has_half_the_size_and_decodes_what_the_full_pass_predicts(options):
    model, x = transformer(**options), sequences(2, 13)
    size = DecodingSession(model, 2).nbytes
    full = model.to_float(ms.float16)(tensor(x)).asnumpy().astype(np.float32)
    session = DecodingSession(model, 2, prefill_chunk=4, prefill_threshold=4)
    assert not session.use_kernels and session.nbytes == size / 2
    decoded = feed_in_pieces(session, x, (6, 1, 6))
    np.testing.assert_allclose(decoded, full, atol=1e-2 * abs(full).max())


def test_a_cast_to_the_same_type_is_no_operator():
    x = tensor(np.ones((2, 3)))
    assert cast(x, ms.float32) is x and widen(x) is x
