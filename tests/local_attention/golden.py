"""The cases of the golden fixtures, for the tests that read them and for ``scripts/make_fixtures.py``.

A case derives its inputs and parameters from its seed, so that the files hold outputs and gradients only. Parameters
have the names that the PyTorch package ``local-attention`` gives them; PyTorch itself is not needed.
"""

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from zlib import crc32

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from local_attention import LocalAttention, LocalMHA, LocalTransformer
from local_attention.position_bias import DynamicPositionBias
from local_attention.rotary import SinusoidalEmbeddings, apply_rotary_pos_emb
from local_attention.torch_state import correspondence
from tests.local_attention import reference

FOLDER = Path(__file__).with_name("fixtures")
RULE = ("window_size", "causal", "exact_windowsize", "look_backward", "look_forward")


@dataclass
class Case:
    """A call of a class.

    Args:
        source: who computed the expected values: "pytorch", or "numpy" where the original is wrong.
        seed: what inputs and parameters derive from.
        options: keyword arguments of the constructor.
        call: arguments of the call, but sizes instead of arrays: rows of a mask, heads of a bias.
        data: sizes of the inputs; ``blind``: whether a mask hides all keys from the first query.
    """

    source: str
    seed: int
    options: dict
    call: dict
    data: dict

    def numbers(self, name, *shape):
        """Float32 with mean 0 and variance 1, the same on every machine: ``uniform`` needs no mathematical library."""
        seed = crc32(f"{type(self).__name__} {self.seed} {name}".encode())
        return np.asarray(np.random.RandomState(seed).uniform(-(3**0.5), 3**0.5, shape), np.float32)

    def cotangent(self, shape):
        """What an output of the shape is multiplied by, the sum of which has the gradients of the case."""
        return self.numbers("cotangent", *shape)

    def mask(self, name, length):
        """``(rows, length)`` booleans, or None; unless ``blind``, no query is left without a key."""
        if self.call[name] is None:
            return None
        definition = self.definition()
        seen = reference.visibility(length, **{option: definition[option] for option in RULE})
        mask = self.numbers(name, self.call[name], length) > 0
        if self.data["blind"]:
            mask[0, seen[0]] = False
            return mask
        return mask | ~(seen & mask[:, None]).any(-1)

    def attn_bias(self, heads):
        if heads is None:
            return None
        rule = self.definition()
        windows = rule["look_backward"] + 1 + rule["look_forward"]
        return self.numbers("attn_bias", heads, rule["window_size"], rule["window_size"] * windows)

    def parameter(self, name, shape):
        """Values of a parameter that keep activations of unit size."""
        offset, factor = 0, 1 / 4
        if name.endswith(("q_scale", "k_scale")) or (name.endswith("weight") and len(shape) == 1):
            offset = 1
        elif name.endswith("static_alpha"):
            offset, factor = np.eye(*shape, 1), 1 / 16
            offset[:, 0] = 1 / shape[0]
        elif name.endswith("static_beta"):
            offset = 1 / shape[0]
        elif name.endswith(("dynamic_alpha_scale", "dynamic_beta_scale")):
            factor = 1 / 16  # or streams cancel each other, and a norm magnifies what is left
        elif name.endswith("emb.weight"):
            factor = 1
        elif name.endswith("mlp.0.weight"):  # of distances
            factor = 1 / 8
        elif len(shape) == 2:
            factor = shape[name.endswith("weight")] ** -0.5
        return np.asarray(offset + factor * self.numbers(name, *shape), np.float32)

    def cell(self):
        """Our cell, with the parameters of the case."""
        cell = self.build()
        parameters = dict(cell.parameters_and_names())
        for theirs, ours, shape in self.correspondence(cell):
            for name, part in zip(ours, np.split(np.atleast_1d(self.parameter(theirs, shape)), len(ours)), strict=True):
                parameters[name].set_data(ms.Tensor(part.reshape(parameters[name].shape)))
        return cell

    def correspondence(self, cell):
        """``(name in the original, our names, shape there)`` of all parameters."""
        return [(name, (name,), parameter.shape) for name, parameter in cell.parameters_and_names()]

    def by_reference(self, p, **changed):
        """What the reference gives with the parameters ``p`` by our names, in float64; None where it knows nothing.

        ``changed``: arguments of the call other than the case's own.
        """
        arguments = {
            name: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
            for name, x in self.arguments().items()
        }
        return self.reference(p, **arguments | changed)

    def under_their_names(self, cell, arrays):
        """Arrays by our parameters' names as arrays by the original's."""
        return {
            theirs: np.concatenate([np.atleast_1d(arrays[name]) for name in ours]).reshape(shape)
            for theirs, ours, shape in self.correspondence(cell)
        }


def attention_definition(options, window_size=None):
    """Options of :class:`LocalAttention` as ``reference.attention`` takes them."""
    dim = options["dim"] if options["rel_pos_emb_config"] is None else options["rel_pos_emb_config"][0]
    rotary = dim is not None and options["use_rotary_pos_emb"]
    scale_base = options["xpos_scale_base"] or max(options["window_size"] // 2, 1)
    look_forward = options["look_forward"]
    return dict(
        window_size=window_size or options["window_size"],
        causal=options["causal"],
        exact_windowsize=options["exact_windowsize"],
        look_backward=options["look_backward"],
        look_forward=int(not options["causal"]) if look_forward is None else look_forward,
        rotary=rotary,
        xpos_scale_base=scale_base if rotary and options["use_xpos"] else None,
        scale=options["scale"],
        shared_qk=options["shared_qk"],
    )


class AttentionCase(Case):
    public, called = LocalAttention, LocalAttention.construct

    def build(self):
        return LocalAttention(**self.options)

    def definition(self):
        return attention_definition(self.options, self.call["window_size"])

    def arguments(self):
        """Arguments of the call by name, in the order of the signature."""
        length = self.data["length"]
        sizes = dict(q=self.data["d"], k=self.data["d"], v=self.data["e"])
        return {name: self.numbers(name, *self.data["leading"], length, size) for name, size in sizes.items()} | dict(
            mask=self.mask("mask", length),
            input_mask=self.mask("input_mask", length),
            attn_bias=self.attn_bias(self.call["attn_bias"]),
            window_size=self.call["window_size"],
        )

    def reference(self, p, *, q, k, v, mask, input_mask, attn_bias, window_size):
        mask = input_mask if mask is None else mask
        return reference.attention(q, k, v, mask=mask, attn_bias=attn_bias, **self.definition())


class MhaCase(Case):
    public, called = LocalMHA, LocalMHA.construct

    def build(self):
        return LocalMHA(**self.options)

    def definition(self):
        exact = self.options["exact_windowsize"] is not False
        options = dict(dim=self.options["dim_head"], rel_pos_emb_config=None, exact_windowsize=exact)
        return attention_definition(self.options | options)

    def correspondence(self, cell):
        names = {name for name, _ in cell.parameters_and_names()}
        dim, inner = self.options["dim"], self.options["heads"] * self.options["dim_head"]
        found = [
            ("norm.weight", ("norm.gamma",), (dim,)),
            ("norm.bias", ("norm.beta",), (dim,)),
            ("to_qkv.weight", ("to_q.weight", "to_k.weight", "to_v.weight"), (3 * inner, dim)),
            ("q_scale", ("q_scale",), (self.options["dim_head"],)),
            ("k_scale", ("k_scale",), (self.options["dim_head"],)),
            ("to_v_gate.0.weight", ("to_v_gate.weight",), (self.options["heads"], dim)),
            ("to_v_gate.0.bias", ("to_v_gate.bias",), (self.options["heads"],)),
            ("to_out.weight", ("to_out.weight",), (dim, inner)),
        ]
        return [entry for entry in found if names.issuperset(entry[1])]

    def arguments(self):
        length = self.data["length"]
        return dict(
            x=self.numbers("x", self.data["batch"], length, self.options["dim"]),
            mask=self.mask("mask", length),
            attn_bias=self.attn_bias(self.call["attn_bias"]),
        )

    def reference(self, p, *, x, mask, attn_bias):
        names = ("heads", "prenorm", "qk_rmsnorm", "qk_scale", "gate_values_per_head")
        options = {name: self.options[name] for name in names}
        return reference.mha(x, p, mask=mask, attn_bias=attn_bias, **options, **self.definition())


class BiasCase(Case):
    public, called = DynamicPositionBias, DynamicPositionBias.construct

    def build(self):
        return DynamicPositionBias(**self.options)

    def arguments(self):
        return dict(self.call)

    def reference(self, p, *, i, j, first):
        first = j - i if first is None else first
        return reference.position_bias(abs(first + np.arange(i)[:, None] - np.arange(j)), p)


class Rotated(nn.Cell):
    """Queries and keys, rotated, one behind the other."""

    def __init__(self, embedding, scale):
        super().__init__()
        self.embedding, self.scale = embedding, scale

    def construct(self, q, k):
        freqs, decay = self.embedding(k)
        q, k = apply_rotary_pos_emb(q, k, freqs, decay) if self.scale else apply_rotary_pos_emb(q, k, freqs)
        return ops.cat((q, k), -2)


class RotaryCase(Case):
    public, called = SinusoidalEmbeddings, staticmethod(apply_rotary_pos_emb)

    def build(self):
        return Rotated(SinusoidalEmbeddings(**self.options), self.call["scale"])

    def arguments(self):
        leading, d = self.data["leading"], self.options["dim"]
        return {name: self.numbers(name, *leading, self.data[f"length_{name}"], d) for name in "qk"}

    def reference(self, p, *, q, k):
        if (self.options["use_xpos"] and self.call["scale"]) or self.options["theta"] != 10000:
            return None
        late = np.concatenate([np.zeros_like(k[..., q.shape[-2] :, :]), q], -2)
        return np.concatenate([reference.rotate(late)[..., -q.shape[-2] :, :], reference.rotate(k)], -2)


class TransformerCase(Case):
    public, called = LocalTransformer, LocalTransformer.construct

    def build(self):
        options = dict(self.options)
        dim = options["dim"]
        # not Tanh, which MindSpore computes to 1e-4 on a CPU
        inserted = nn.SequentialCell(nn.Dense(dim, dim), nn.Sigmoid()) if options["global_attn_layer"] else None
        return LocalTransformer(**options | dict(global_attn_layer=inserted))

    def cotangent(self, shape):
        """A quarter, as gradients of parameters are sums over up to 16 tokens."""
        return super().cotangent(shape) / 4 if shape else np.float32(1)

    def definition(self):
        options = self.options
        return attention_definition(
            options
            | dict(
                window_size=options["local_attn_window_size"],
                dim=options["dim_head"],
                rel_pos_emb_config=None,
                exact_windowsize=options["exact_windowsize"] is not False,
                use_rotary_pos_emb=options["use_rotary_pos_emb"] and not options["use_dynamic_pos_bias"],
                scale=None,
            )
        )

    def correspondence(self, cell):
        return correspondence(cell)

    def arguments(self):
        batch, length, num_tokens = self.data["batch"], self.data["length"], self.options["num_tokens"]
        mask, return_loss = self.mask("mask", length), self.call["return_loss"]
        if num_tokens is None:
            x = self.numbers("x", batch, length, self.options["dim"])
        else:
            x = abs(self.numbers("x", batch, length + return_loss) * 1000).astype(np.int32) % num_tokens
        if return_loss:
            x[x == self.options["ignore_index"]] += 1
            x[0, -1] = self.options["ignore_index"]
            mask = None if mask is None else np.pad(mask, ((0, 0), (0, 1)))
        return dict(x=x, mask=mask, cache=None, return_loss=return_loss)

    def reference(self, p, *, x, mask, cache, return_loss):
        names = ("depth", "heads", "qk_rmsnorm", "qk_scale", "gate_values_per_head")
        options = {name: self.options[name] for name in names} | self.definition()
        inserted = self.options["layers_insert_global_attn"] or range(1, 1 + self.options["depth"])
        options |= dict(
            mask=mask,
            streams=self.options["num_residual_streams"],
            global_attention=dense_sigmoid,
            inserted=inserted if self.options["global_attn_layer"] else (),
        )
        if return_loss:
            return reference.language_model_loss(x, p, ignore_index=self.options["ignore_index"], **options)
        return (reference.layers if self.options["num_tokens"] is None else reference.transformer)(x, p, **options)


def dense_sigmoid(x, p, name):
    return 1 / (1 + np.exp(-(x @ p[f"{name}0.weight"].T + p[f"{name}0.bias"])))


KINDS = {cases.public.__name__: cases for cases in (AttentionCase, MhaCase, BiasCase, RotaryCase, TransformerCase)}


def save(path, cases, expected):
    """Write cases, all of one class, and for each the expected arrays by name."""
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in expected]
    np.savez_compressed(
        path,
        cases=json.dumps([asdict(case) | {"shapes": shape} for case, shape in zip(cases, shapes, strict=True)]),
        values=np.concatenate(
            [array.reshape(-1) for arrays in expected for array in arrays.values()], dtype=np.float32
        ),
    )


def load(kind):
    """``[(case, expected arrays by name)]``: ``out``, and under the names of inputs and parameters their gradients."""
    with np.load(FOLDER / f"{kind}.npz") as file:
        cases, values = json.loads(str(file["cases"])), file["values"]
    loaded = []
    for case in cases:
        shapes, expected = case.pop("shapes"), {}
        for name, shape in shapes.items():
            array, values = np.split(values, [prod(shape)])
            expected[name] = array.reshape(shape)
        loaded.append((KINDS[kind](**case), expected))
    return loaded
