"""Callbacks of ``Model.train``: what happens before and after the steps of a run, in the order of the callbacks."""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ClassVar

import numpy as np
from mindspore import nn
from mindspore.train import Callback, RunContext
from tqdm import tqdm

from local_attention.decoding import DecodingSession, generate_tokens
from local_attention.decoding.session import STEPS_PER_CALL
from local_attention.training.checkpoint import Checkpoints, Metadata, tensors_of
from local_attention.training.config import RunConfig
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.evaluate import EvalSpan, Evaluator
from local_attention.training.run_log import NullRunLog, RunLog
from local_attention.training.schedule import learning_rate
from local_attention.training.signals import Interrupted, SignalCheck
from local_attention.training.state import RunState
from local_attention.training.step import TrainStep
from local_attention.training.terminal import as_text, columns_of, format_duration, join_what_fits

Save = Callable[..., None]  # save(best=False): writes a checkpoint, or nothing

BAR_WIDTH = 10

log = logging.getLogger("train")


class StepController(Callback):
    """Sets the learning rate, updates the state, and holds the results of the last step.

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

    def count_skipped(self) -> None:
        """Count steps that were skipped because loss or gradient were not finite.

        Too many in a row, at a loss scale that cannot fall further, end the run.
        """
        state, limit = self.state, self.config.train.max_bad_steps
        if math.isfinite(self.bpb + self.grad_norm):
            state.skipped_in_a_row = 0
            return
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        what = f"loss {self.bpb:.4g} bpb, gradient norm {self.grad_norm:.4g}"
        scale = self.step_cell.loss_scale
        scaled = "" if scale == 1 else f"; the loss scale is now {scale:g}"
        log.warning(f"step {state.step:>6,}  skipped: {what}{scaled}")
        if state.skipped_in_a_row >= limit and scale == 1:
            state.failure = f"step {state.step:,}: {what}; the last {state.skipped_in_a_row} steps were skipped"


class Stop(Callback):
    """Ends training when the run is finished or has failed, or at a signal.

    Must be the last callback, so that a signal during an evaluation, a sample or a checkpoint prevents the next step.
    """

    def __init__(self, state: RunState, check_signals: SignalCheck) -> None:
        super().__init__()
        self.state, self.check_signals = state, check_signals

    def on_train_step_end(self, run_context: RunContext) -> None:
        with suppress(Interrupted):
            self.check_signals()
        if self.state.finished or self.state.signal or self.state.failure:
            run_context.request_stop()


class Event(Callback, ABC):
    """Calls :meth:`act` every ``interval`` steps, and at the end of a run that is finished.

    Args:
        state: the state of the run, which remembers the step of the last call.
        interval: steps between two calls.
        check_signals: for :meth:`act` to call now and then. If a signal interrupts it or comes before it, the event is
            still due when the run continues, see :func:`make_up`.
    """

    kind: ClassVar[str]  # of its records
    name: ClassVar[str]

    def __init__(self, state: RunState, interval: int, check_signals: SignalCheck) -> None:
        super().__init__()
        self.state, self.interval, self.check_signals = state, interval, check_signals

    def is_due(self) -> bool:
        state = self.state
        return (state.step % self.interval == 0 or state.finished) and not state.has_happened(self.kind)

    def act_if_due(self) -> bool:
        """Call :meth:`act` if it is due and nothing has ended the run; returns whether it was completed."""
        state = self.state
        if not self.is_due() or state.signal or state.failure:
            return False
        before, state.events = state.events, {**state.events, self.kind: state.step}
        try:
            self.act()
        except Interrupted:
            state.events = before
            log.info(f"step {state.step:>6,}  the {self.name} was interrupted; a continued run begins with it")
            return False
        return True

    def on_train_step_end(self, run_context: RunContext) -> None:
        self.act_if_due()

    def on_train_end(self, run_context: RunContext) -> None:
        self.act_if_due()

    @abstractmethod
    def act(self) -> None: ...


def make_up(events: Sequence[Event], save: Save) -> None:
    """Call the events that are due at the step from which a run continues, as a signal has interrupted them."""
    if any([event.act_if_due() for event in events]):
        save()


class Report(Callback):
    """Records the metrics of the steps and shows the progress: as a bar on a terminal, else as lines.

    Args:
        state, controller: see :class:`StepController`.
        run_log: where to record.
        interval: steps between two records. A record has the mean loss of those that were not skipped. The first step
            and the last one of a run that is finished are always recorded.
        flops_per_byte: see :func:`flops.flops_per_byte`.
    """

    def __init__(
        self,
        state: RunState,
        controller: StepController,
        run_log: RunLog | NullRunLog,
        interval: int,
        flops_per_byte: float,
    ) -> None:
        super().__init__()
        self.state, self.controller, self.run_log, self.interval = state, controller, run_log, interval
        self.flops_per_byte = flops_per_byte
        self.bpbs: list[float] = []
        self.seconds: list[float] = []
        self.val_bpb: float | None = None
        self.described: list[str] = []
        self.bar = tqdm(
            total=1.0,
            ncols=columns_of(sys.stderr),
            nrows=20,  # where tqdm finds a terminal of unknown size, of 0 rows, it would show nothing
            initial=min(state.progress, 1.0),
            bar_format=f"{{bar:{BAR_WIDTH}}} {{desc}}",
            disable=not sys.stderr.isatty(),
        )

    def on_train_step_end(self, run_context: RunContext) -> None:
        if self.state.skipped_in_a_row == 0:
            self.bpbs.append(self.controller.bpb)
            self.grad_norm, self.learning_rate = self.controller.grad_norm, self.controller.learning_rate
        self.seconds.append(self.controller.seconds)
        step = self.state.step
        if self.bpbs and (step == 1 or step % self.interval == 0 or self.state.finished):
            self.report()
        if not self.bar.disable:
            self.show_progress()

    def report(self) -> None:
        state, seconds = self.state, float(np.mean(self.seconds))
        bpb, bytes_per_s = float(np.mean(self.bpbs)), self.controller.bytes_per_step / seconds
        gflop_per_s = bytes_per_s * self.flops_per_byte / 1e9
        self.bpbs, self.seconds = [], []
        self.run_log.record(
            "train",
            state,
            bpb=bpb,
            lr=self.learning_rate,
            grad_norm=self.grad_norm,
            bytes_per_s=bytes_per_s,
            gflop_per_s=gflop_per_s,
            skipped_steps=state.skipped_steps,
            peak_memory_bytes=peak_memory_bytes(),
        )
        scores = [f"train {bpb:.3f} bpb", *([f"val {self.val_bpb:.3f} bpb"] if self.val_bpb else [])]
        speed = [f"{bytes_per_s:,.0f} bytes/s", f"{gflop_per_s:,.1f} GFLOP/s"]
        left = [f"{format_duration(state.seconds_left(seconds))} left"] if state.step > 1 else []
        self.described = [*left, *scores, *speed]
        level = logging.INFO if self.bar.disable else logging.DEBUG
        log.log(level, "  ".join([f"step {state.step:>6,}", *scores, *speed, *left]))

    def show_progress(self) -> None:
        """Show the bar, and beside it what fits on the terminal, the most important first."""
        state = self.state
        position = f"step {state.step:,}" + (f"/{state.max_steps:,}" if state.max_steps else "")
        self.bar.ncols = columns_of(sys.stderr)  # which a user may have changed
        text = join_what_fits([position, *self.described], self.bar.ncols - BAR_WIDTH - 1)
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(min(state.progress, 1.0) - self.bar.n)

    def on_train_end(self, run_context: RunContext) -> None:
        if self.state.finished and self.bpbs:  # an evaluation after the last step has ended the run
            self.report()
        self.bar.close()


class Evaluate(Event):
    """Scores a fixed span of the validation split, and saves the best weights.

    Args:
        state, interval, check_signals: see :class:`Event`.
        report: shows the score.
        run_log: where to record.
        evaluator: scores the span.
        span: the bytes to score.
        save: called with ``best=True`` if the score is the best so far.
    """

    kind, name = "eval", "evaluation"

    def __init__(
        self,
        state: RunState,
        interval: int,
        check_signals: SignalCheck,
        report: Report,
        run_log: RunLog | NullRunLog,
        evaluator: Evaluator,
        span: EvalSpan,
        save: Save,
    ) -> None:
        super().__init__(state, interval, check_signals)
        self.report, self.run_log, self.save = report, run_log, save
        self.evaluator, self.span = evaluator, span

    def act(self) -> None:
        state, score = self.state, self.evaluator(*self.span, before_batch=self.check_signals)
        self.report.val_bpb = score.bpb
        self.run_log.record("eval", state, split="val", bpb=score.bpb, bytes_scored=score.bytes_scored)
        best = score.bpb < (math.inf if state.best_val_bpb is None else state.best_val_bpb)
        remark = ", new best" if best else ""
        log.info(f"step {state.step:>6,}  val {score.bpb:.3f} bpb on {score.bytes_scored:,} bytes{remark}")
        if best:
            state.best_val_bpb, state.evaluations_since_best = score.bpb, 0
            self.save(best=True)
            return
        state.evaluations_since_best += 1
        if state.stopped_early:
            log.info(
                f"stopping early: no new best in the last {state.evaluations_since_best} evaluations, which is "
                f"train.stop_after={state.stop_after}; raise it, or set it to null, to continue"
            )


class Sample(Event):
    """Generates a continuation of a prompt.

    Args:
        state, interval, check_signals: see :class:`Event`.
        run_log: where to record.
        model: the model.
        prompt: ``(n,)`` uint8.
        length: number of bytes to generate.
        seed: seed of sampling.
    """

    kind = name = "sample"

    def __init__(
        self,
        state: RunState,
        interval: int,
        check_signals: SignalCheck,
        run_log: RunLog | NullRunLog,
        model: nn.Cell,
        prompt: np.ndarray,
        length: int,
        seed: int,
    ) -> None:
        super().__init__(state, interval, check_signals)
        self.run_log, self.model, self.prompt, self.length, self.seed = run_log, model, prompt, length, seed
        self.session: DecodingSession | None = None

    def act(self) -> None:
        self.session = self.session or DecodingSession(self.model)
        tokens = generate_tokens(
            self.session, self.prompt, self.length, temperature=0.8, top_p=0.95, num_tokens=256, seed=self.seed
        )
        sampled = []
        for i, (token,) in enumerate(tokens):
            if i % STEPS_PER_CALL == 0:
                self.check_signals()
            sampled.append(int(token))
        text, prompt, step = as_text(sampled), as_text(self.prompt), f"step {self.state.step:>6,}"
        self.run_log.record("sample", self.state, text=text, prompt=prompt)
        log.info(f"{step}  prompt:\n{indent(prompt)}\n{step}  sample:\n{indent(text)}")


class SaveLast(Callback):
    """Saves a checkpoint every ``interval`` steps and at the end, unless the run has failed."""

    def __init__(self, state: RunState, interval: int, save: Save) -> None:
        super().__init__()
        self.state, self.interval, self.save = state, interval, save

    def on_train_step_end(self, run_context: RunContext) -> None:
        if self.state.step % self.interval == 0:
            self.save()

    def on_train_end(self, run_context: RunContext) -> None:
        if not self.state.failure:  # the weights of a failed run are not worth more than the previous checkpoint
            self.save()


class Saver:
    """Saves checkpoints of model, optimizer and state; the same state twice only if it has become the best.

    Args:
        checkpoints: where to save.
        model, optimizer, state: what to save.
        provenance: further metadata, see :func:`start.provenance`.
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
        self.saved: Metadata | None = None

    def __call__(self, best: bool = False) -> None:
        if best:
            self.state.best_step = self.state.step
        state = self.state.state_dict()
        without_clock = {**state, "wall_s": None}
        if self.saved == without_clock and not best:
            return
        self.saved = without_clock
        self.checkpoints.save(tensors_of(self.model, self.optimizer), {**state, **self.provenance}, best)


def save_nothing(best: bool = False) -> None:
    """The :class:`Saver` of all processes except the main process."""


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
