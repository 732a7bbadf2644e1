"""Train this project's model and that of PyTorch's ``local-attention`` on the same data from the same weights.

Needs the environment of ``make parity``. Example:

    .venv-parity/bin/python scripts/compare_training.py data=file data.path=FILE model=small train.max_steps=20

Takes the overrides of ``train.py``, with Adam and a constant learning rate. Prints the bits per byte of each step, and
exits with status 1 if they differ by more than 1e-3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pytorch_original import import_original, original_arguments

ORIGINAL = import_original()  # or says what is missing

import mindspore as ms
import numpy as np
import torch
from hydra import compose, initialize_config_dir

import data
from local_attention import LocalTransformer
from local_attention.torch_state import torch_state
from local_attention.training.batches import BatchIterator
from local_attention.training.build import build_model, compute_in
from local_attention.training.command import print_error
from local_attention.training.config import ModelConfig, run_config
from local_attention.training.device import use_device
from local_attention.training.errors import UsageError
from local_attention.training.optimizer import build_optimizer, loss_scaler
from local_attention.training.step import TrainStep

TOLERANCE = 1e-3


def original_model(model: LocalTransformer, config: ModelConfig) -> torch.nn.Module:
    """Build the original's ``LocalTransformer`` with the weights of ``model``."""
    theirs = ORIGINAL.LocalTransformer(**original_arguments(config))
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in torch_state(model).items()})
    theirs.pos_emb.requires_grad_(config.use_abs_pos_emb)  # without them, zeros that are not trained
    return theirs


def original_steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[np.ndarray], clip_norm: float
) -> Iterator[float]:
    """Train like the example of the original on batches ``(grad_accum_every, b, n + 1)``; yields losses in nats."""
    for batch in batches:
        losses = [model(torch.from_numpy(micro).long(), return_loss=True) for micro in batch]
        sum(losses).div(len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield sum(loss.item() for loss in losses) / len(losses)


def main() -> int:
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        fixed = ["optimizer=adam", "schedule=constant", "train.max_steps=20", "train.grad_accum_every=1"]
        config = run_config(compose("train", [*fixed, *sys.argv[1:]]))
    if config.model.attn_dropout or config.model.ff_dropout:
        raise UsageError("expected no dropout, as the random numbers would differ")
    train = config.train
    corpus = data.load(config.data)
    iterator = BatchIterator(data.SequenceSampler(corpus.train, train.seq_len + 1, config.seed), train, first_step=0)
    batches = [iterator.batch(step) for step in range(train.max_steps or 0)]

    device = config.device
    use_device(device.target, train.precision, "train.precision", device.matmul_precision)
    ms.set_seed(config.seed)
    model = compute_in(build_model(config.model), train.precision)
    scaler = loss_scaler(train.precision, train.loss_scale)
    our_optimizer = build_optimizer(config.optimizer, model.trainable_params(), scaler)
    step = TrainStep(model, our_optimizer, train.grad_accum_every, train.clip_norm).set_train()
    adam = config.optimizer
    theirs = original_model(model, config.model)
    optimizer = torch.optim.Adam(theirs.parameters(), adam.lr, (adam.beta1, adam.beta2), adam.eps)

    worst = 0.0
    print("step  ours, bpb  PyTorch, bpb  difference")
    for i, their_loss in enumerate(original_steps(theirs, optimizer, batches, train.clip_norm)):
        our_loss = float(step(ms.Tensor(batches[i]))[0].asnumpy())
        ours, other = np.array([our_loss, their_loss]) / math.log(2)
        worst = max(worst, abs(ours - other))
        print(f"{i + 1:4}  {ours:9.6f}  {other:12.6f}  {ours - other:10.1e}", flush=True)
    print(f"largest difference {worst:.1e} bpb, allowed {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print_error(error)
        sys.exit(error.exit_status)
