"""Callbacks of ``Model.train``: what happens before and after the steps of a run, in the order of the callbacks."""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from mindspore import nn
from mindspore.train import Callback, RunContext
from tqdm import tqdm

from local_attention.decoding import DecodingSession, generate_tokens
from local_attention.training.checkpoint import Checkpoints, Metadata, tensors_of
from local_attention.training.config import RunConfig
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.evaluate import EvalSpan, Evaluator
from local_attention.training.run_log import NullRunLog, RunLog
from local_attention.training.schedule import learning_rate
from local_attention.training.state import RunState
from local_attention.training.step import TrainStep
from local_attention.training.terminal import as_text, format_duration

Save = Callable[..., None]  # save(best=False): writes a checkpoint, or nothing

log = logging.getLogger("train")


class StepController(Callback):
    """Sets the learning rate, updates the state, holds the results of the last step, and ends the run.

    Must be the first callback, as the others use its attributes ``bpb``, ``grad_norm``, ``learning_rate`` and
    ``seconds``.

    Args:
        state: the state of the run.
        step_cell: the train step.
        config: the config of the run.
        distributed: the processes that train.
    """

    def __init__(
        self, state: RunState, step_cell: TrainStep, config: RunConfig, distributed: Distributed = SINGLE_PROCESS
    ) -> None:
        super().__init__()
        self.state, self.step_cell, self.config, self.distributed = state, step_cell, config, distributed
        train = config.train
        self.bytes_per_step = train.seq_len * train.batch_size * train.grad_accum_every * distributed.world_size
        self.seconds = 0.0

    def on_train_step_begin(self, run_context: RunContext) -> None:
        config, state = self.config, self.state
        state.synchronise(self.distributed)
        self.step_cell.set_learning_rate(
            learning_rate(config.schedule, config.optimizer.lr, state.step, state.progress)
        )
        self.begin = time.monotonic()

    def on_train_step_end(self, run_context: RunContext) -> None:
        loss, grad_norm, rate = (float(output.asnumpy()) for output in run_context.original_args().net_outputs)
        self.bpb, self.grad_norm, self.learning_rate = loss / math.log(2), grad_norm, rate
        self.seconds = time.monotonic() - self.begin
        self.state.step += 1
        self.state.bytes_seen += self.bytes_per_step
        self.state.train_s += self.seconds
        self.state.synchronise(self.distributed)
        self.count_skipped()
        if self.state.finished or self.state.signal or self.state.failure:
            run_context.request_stop()

    def count_skipped(self) -> None:
        """Count steps that were skipped because loss or gradient were not finite; too many in a row end the run."""
        state, limit = self.state, self.config.train.max_bad_steps
        if math.isfinite(self.bpb + self.grad_norm):
            state.skipped_in_a_row = 0
            return
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        what = f"loss {self.bpb:.4g} bpb, gradient norm {self.grad_norm:.4g}"
        log.warning(f"step {state.step:>6,}  skipped: {what}")
        if state.skipped_in_a_row >= limit:
            state.failure = (
                f"step {state.step:,}: {what}; the last {state.skipped_in_a_row} steps were skipped; lower "
                "optimizer.lr or train.clip_norm and continue from the last checkpoint, or raise train.max_bad_steps"
            )


class Periodic(Callback, ABC):
    """Calls :meth:`act` every ``interval`` steps."""

    def __init__(self, state: RunState, interval: int) -> None:
        super().__init__()
        self.state, self.interval = state, interval
        self.last_step: int | None = None

    def on_train_step_end(self, run_context: RunContext) -> None:
        if self.state.step % self.interval == 0:
            self.last_step = self.state.step
            self.act()

    def act_at_end(self) -> None:
        """Call :meth:`act` for the last step of a run that is finished, unless that was just done."""
        if self.state.finished and self.last_step != self.state.step:
            self.act()

    @abstractmethod
    def act(self) -> None: ...


class Report(Callback):
    """Records the metrics of the steps and shows the progress: as a bar on a terminal, else as lines.

    Args:
        state, controller: see :class:`StepController`.
        run_log: where to record.
        interval: steps between two records. A record has the mean loss of those that were not skipped. The first step
            is always recorded.
    """

    def __init__(
        self, state: RunState, controller: StepController, run_log: RunLog | NullRunLog, interval: int
    ) -> None:
        super().__init__()
        self.state, self.controller, self.run_log, self.interval = state, controller, run_log, interval
        self.bpbs: list[float] = []
        self.seconds: list[float] = []
        self.val_bpb: float | None = None
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.step,
            disable=not sys.stderr.isatty(),
            bar_format="{bar:20} step {n_fmt}/{total_fmt}  {desc}" if state.max_steps else "step {n_fmt}  {desc}",
        )

    def on_train_step_end(self, run_context: RunContext) -> None:
        if self.state.skipped_in_a_row == 0:
            self.bpbs.append(self.controller.bpb)
            self.grad_norm, self.learning_rate = self.controller.grad_norm, self.controller.learning_rate
        self.seconds.append(self.controller.seconds)
        step = self.state.step
        if self.bpbs and (step == 1 or step % self.interval == 0 or self.state.finished):
            self.report()
        self.bar.update(step - self.bar.n)

    def report(self) -> None:
        state, seconds = self.state, float(np.mean(self.seconds))
        bpb, bytes_per_s = float(np.mean(self.bpbs)), self.controller.bytes_per_step / seconds
        self.bpbs, self.seconds = [], []
        self.run_log.record(
            "train",
            state,
            bpb=bpb,
            lr=self.learning_rate,
            grad_norm=self.grad_norm,
            bytes_per_s=bytes_per_s,
            skipped_steps=state.skipped_steps,
            peak_memory_bytes=peak_memory_bytes(),
        )
        parts = [f"train {bpb:.3f} bpb"]
        if self.val_bpb:
            parts.append(f"val {self.val_bpb:.3f} bpb")
        parts.append(f"{bytes_per_s:,.0f} bytes/s")
        if state.step > 1:
            parts.append(f"{format_duration(state.seconds_left(seconds))} left")
        text = "  ".join(parts)
        self.bar.set_description_str(text)
        log.log(logging.INFO if self.bar.disable else logging.DEBUG, f"step {state.step:>6,}  {text}")

    def on_train_end(self, run_context: RunContext) -> None:
        self.bar.close()


class Evaluate(Periodic):
    """Scores a fixed span of the validation split, and saves the best weights.

    Args:
        state, report, run_log: see :class:`Report`.
        interval: steps between two evaluations.
        evaluator: scores the span.
        span: the bytes to score.
        save: called with ``best=True`` if the score is the best so far.
    """

    def __init__(
        self,
        state: RunState,
        interval: int,
        report: Report,
        run_log: RunLog | NullRunLog,
        evaluator: Evaluator,
        span: EvalSpan,
        save: Save,
    ) -> None:
        super().__init__(state, interval)
        self.report, self.run_log, self.save = report, run_log, save
        self.evaluator, self.span = evaluator, span

    def act(self) -> None:
        score = self.evaluator(*self.span)
        self.report.val_bpb = score.bpb
        self.run_log.record("eval", self.state, split="val", bpb=score.bpb, bytes_scored=score.bytes_scored)
        best = score.bpb < (math.inf if self.state.best_val_bpb is None else self.state.best_val_bpb)
        remark = ", new best" if best else ""
        log.info(f"step {self.state.step:>6,}  val {score.bpb:.3f} bpb on {score.bytes_scored:,} bytes{remark}")
        if best:
            self.state.best_val_bpb = score.bpb
            self.save(best=True)

    def on_train_end(self, run_context: RunContext) -> None:
        self.act_at_end()


class Sample(Periodic):
    """Generates a continuation of a prompt.

    Args:
        state, run_log: see :class:`Report`.
        interval: steps between two samples.
        model: the model.
        prompt: ``(n,)`` uint8.
        length: number of bytes to generate.
        seed: seed of sampling.
    """

    def __init__(
        self,
        state: RunState,
        interval: int,
        run_log: RunLog | NullRunLog,
        model: nn.Cell,
        prompt: np.ndarray,
        length: int,
        seed: int,
    ) -> None:
        super().__init__(state, interval)
        self.run_log, self.model, self.prompt, self.length, self.seed = run_log, model, prompt, length, seed
        self.session: DecodingSession | None = None

    def act(self) -> None:
        self.session = self.session or DecodingSession(self.model)
        tokens = generate_tokens(
            self.session, self.prompt, self.length, temperature=0.8, top_p=0.95, num_tokens=256, seed=self.seed
        )
        text = as_text([int(token) for (token,) in tokens])
        self.run_log.record("sample", self.state, text=text, prompt=as_text(self.prompt))
        log.info(f"step {self.state.step:>6,}  sample:\n{indent(text)}")

    def on_train_end(self, run_context: RunContext) -> None:
        self.act_at_end()


class SaveLast(Periodic):
    """Saves a checkpoint every ``interval`` steps and at the end, unless the run has failed."""

    def __init__(self, state: RunState, interval: int, save: Save) -> None:
        super().__init__(state, interval)
        self.save = save

    def act(self) -> None:
        self.save()

    def on_train_end(self, run_context: RunContext) -> None:
        if not self.state.failure:  # the weights of a failed run are not worth more than the previous checkpoint
            self.save()


class Saver:
    """Saves checkpoints of model, optimizer and state; the same step twice only if it has become the best.

    Args:
        checkpoints: where to save.
        model, optimizer, state: what to save.
        provenance: further metadata, see :func:`run_dir.provenance`.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: nn.Cell,
        optimizer: nn.Optimizer,
        state: RunState,
        provenance: Metadata,
    ) -> None:
        self.checkpoints = checkpoints
        self.model, self.optimizer, self.state, self.provenance = model, optimizer, state, provenance
        self.saved_step: int | None = None

    def __call__(self, best: bool = False) -> None:
        if self.saved_step == self.state.step and not best:
            return
        self.saved_step = self.state.step
        meta = {**self.state.state_dict(), **self.provenance}
        self.checkpoints.save(tensors_of(self.model, self.optimizer), meta, best)


def save_nothing(best: bool = False) -> None:
    """The :class:`Saver` of all processes except the main process."""


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
