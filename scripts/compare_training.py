"""Train this project's model and PyTorch's ``local-attention`` from the same weights on the same crops, and compare.

Needs the parity extra: ``pip install -e '.[parity]'``. Example:

    python scripts/compare_training.py data=file data.path=FILE model=small train.max_steps=20

Takes the overrides of ``train.py``, with Adam and a constant learning rate; prints the bits per byte of each step, and
exits with status 1 where they differ by more than 1e-3.
"""

import math
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import torch
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from local_attention.training.build import build_model
from local_attention.training.config import run_config
from local_attention.training.crops import StepCrops
from local_attention.training.device import use_device
from local_attention.training.optimizer import build_optimizer
from local_attention.training.step import TrainStep
from scripts.pytorch_original import import_original, original_state

TOLERANCE = 1e-3


def original_model(model, config):
    """The original's ``LocalTransformer`` with the weights of ``model``."""
    torch_model = import_original().LocalTransformer(
        num_tokens=config.num_tokens,
        max_seq_len=config.max_seq_len,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.dim_head,
        ff_mult=config.ff_mult,
        local_attn_window_size=config.local_attn_window_size,
        look_backward=config.look_backward,
        exact_windowsize=config.exact_windowsize,
        num_residual_streams=1,
    )
    state = {name: torch.from_numpy(array.copy()) for name, array in original_state(model).items()}
    missing, unexpected = torch_model.load_state_dict(state, strict=False)
    buffers = {name for name, _ in torch_model.named_buffers()}
    if unexpected or set(missing) - buffers:
        raise ValueError(f"weights do not fit the original: missing {missing}, unexpected {unexpected}")
    return torch_model


def original_steps(model, optimizer, batches, clip_norm):
    """The loss in nats of each step over ``(grad_accum_every, b, n + 1)`` batches, as the original's example trains."""
    for crops in batches:
        losses = [model(torch.from_numpy(micro).long(), return_loss=True) for micro in crops]
        sum(losses).div(len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield sum(loss.item() for loss in losses) / len(losses)


def main():
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        fixed = ["optimizer=adam", "schedule=constant", "train.max_steps=20", "train.grad_accum_every=1"]
        config = run_config(compose("train", [*fixed, *sys.argv[1:]]))
    train = config.train
    corpus = data.load(config.data)
    crops = StepCrops(data.CropSampler(corpus.train, train.seq_len + 1, config.seed), train, first_step=0)
    batches = [crops.of_step(step) for step in range(train.max_steps)]

    use_device(config.device.target)
    ms.set_seed(config.seed)
    model = build_model(config.model)
    step = TrainStep(
        model, build_optimizer(config.optimizer, model.trainable_params()), train.grad_accum_every, train.clip_norm
    ).set_train()
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
    sys.exit(main())
