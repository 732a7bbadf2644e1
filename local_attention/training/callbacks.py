"""What happens around the steps of a run: callbacks of ``Model.train``, called in the order given."""

import logging
import math
import sys
import time

import numpy as np
from mindspore.train import Callback
from tqdm import tqdm

from local_attention.decoding import DecodingSession, generate_tokens
from local_attention.training.checkpoint import Checkpoints, tensors_of
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.schedule import learning_rate
from local_attention.training.terminal import as_text, duration

log = logging.getLogger("train")


class StepController(Callback):
    """First of all: sets the learning rate, counts, keeps what the step returned, and ends the run.

    Args:
        state: the :class:`RunState`.
        step_cell: the ``TrainStep``.
        config: the ``RunConfig``.
        workers: who train.
    """

    def __init__(self, state, step_cell, config, workers=SINGLE_PROCESS):
        super().__init__()
        self.state, self.step_cell, self.config, self.workers = state, step_cell, config, workers
        train = config.train
        self.bytes_a_step = train.seq_len * train.batch_size * train.grad_accum_every * workers.count
        self.seconds = None

    def on_train_step_begin(self, run_context):
        config, state = self.config, self.state
        state.agree(self.workers)
        self.step_cell.set_learning_rate(
            learning_rate(config.schedule, config.optimizer.lr, state.step, state.progress)
        )
        self.begin = time.monotonic()

    def on_train_step_end(self, run_context):
        loss, grad_norm, rate = (float(output.asnumpy()) for output in run_context.original_args().net_outputs)
        self.bpb, self.grad_norm, self.learning_rate = loss / math.log(2), grad_norm, rate
        self.seconds = time.monotonic() - self.begin
        self.state.step += 1
        self.state.bytes_seen += self.bytes_a_step
        self.state.train_s += self.seconds
        self.state.agree(self.workers)
        self.count_skipped()
        if self.state.finished or self.state.signal or self.state.failure:
            run_context.request_stop()

    def count_skipped(self):
        """Note a step that the ``TrainStep`` left out, and give up after too many of them."""
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
                f"step {state.step:,}: {what}, and so the last {state.skipped_in_a_row} steps were skipped; lower "
                "optimizer.lr or train.clip_norm and continue from the last checkpoint, or raise train.max_bad_steps"
            )


class Every(Callback):
    """Calls :meth:`act` each ``interval`` steps."""

    def __init__(self, state, interval):
        super().__init__()
        self.state, self.interval = state, interval

    def on_train_step_end(self, run_context):
        if self.state.step % self.interval == 0:
            self.act()


class Report(Callback):
    """Records what the steps measured and shows where the run is: a bar on a terminal, lines elsewhere.

    Args:
        state, advance: as above.
        run_log: where to record.
        interval: steps from one record to the next; it holds the mean loss of those not skipped. The first step is
            recorded, too.
    """

    def __init__(self, state, advance, run_log, interval):
        super().__init__()
        self.state, self.advance, self.run_log, self.interval = state, advance, run_log, interval
        self.bpbs, self.seconds = [], []
        self.val_bpb = None
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.step,
            disable=not sys.stderr.isatty(),
            bar_format="{bar:20} step {n_fmt}/{total_fmt}  {desc}" if state.max_steps else "step {n_fmt}  {desc}",
        )

    def on_train_step_end(self, run_context):
        if self.state.skipped_in_a_row == 0:
            self.bpbs.append(self.advance.bpb)
            self.grad_norm, self.learning_rate = self.advance.grad_norm, self.advance.learning_rate
        self.seconds.append(self.advance.seconds)
        step = self.state.step
        if self.bpbs and (step == 1 or step % self.interval == 0 or self.state.finished):
            self.report()
        self.bar.update(step - self.bar.n)

    def report(self):
        state, seconds = self.state, float(np.mean(self.seconds))
        bpb, bytes_per_s = float(np.mean(self.bpbs)), self.advance.bytes_a_step / seconds
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
            parts.append(f"{duration(state.seconds_left(seconds))} left")
        text = "  ".join(parts)
        self.bar.set_description_str(text)
        log.log(logging.INFO if self.bar.disable else logging.DEBUG, f"step {state.step:>6,}  {text}")

    def on_train_end(self, run_context):
        self.bar.close()


class Evaluate(Every):
    """Scores a fixed part of the validation split, and keeps the best weights.

    Args:
        state, report, run_log: as above.
        interval: steps.
        evaluator: an ``Evaluator``.
        stretch: what it scores, ``(bytes, start, stop)``.
        save: called with ``best=True`` after the best score so far.
    """

    def __init__(self, state, interval, report, run_log, evaluator, stretch, save):
        super().__init__(state, interval)
        self.report, self.run_log, self.save = report, run_log, save
        self.evaluator, self.stretch = evaluator, stretch
        self.last_step = None

    def act(self):
        self.last_step = self.state.step
        score = self.evaluator(*self.stretch)
        self.report.val_bpb = score.bpb
        self.run_log.record("eval", self.state, split="val", bpb=score.bpb, bytes_scored=score.bytes_scored)
        best = score.bpb < (math.inf if self.state.best_val_bpb is None else self.state.best_val_bpb)
        remark = ", the best yet" if best else ""
        log.info(f"step {self.state.step:>6,}  val {score.bpb:.3f} bpb on {score.bytes_scored:,} bytes{remark}")
        if best:
            self.state.best_val_bpb = score.bpb
            self.save(best=True)

    def on_train_end(self, run_context):
        if self.state.finished and self.last_step != self.state.step:
            self.act()


class Sample(Every):
    """Lets the model continue a text.

    Args:
        state, run_log: as above.
        interval: steps.
        model: the model.
        prompt: ``(n,)`` uint8.
        length: bytes.
        seed: of the random numbers.
    """

    def __init__(self, state, interval, run_log, model, prompt, length, seed):
        super().__init__(state, interval)
        self.run_log, self.model, self.prompt, self.length, self.seed = run_log, model, prompt, length, seed
        self.decoder = None
        self.last_step = None

    def act(self):
        self.last_step = self.state.step
        self.decoder = self.decoder or DecodingSession(self.model)
        tokens = generate_tokens(self.decoder, self.prompt, self.length, temperature=0.8, top_p=0.95, seed=self.seed)
        text = as_text([int(token) for (token,) in tokens])
        self.run_log.record("sample", self.state, text=text, prompt=as_text(self.prompt))
        log.info(f"step {self.state.step:>6,}  sample:\n{indent(text)}")

    def on_train_end(self, run_context):
        if self.state.finished and self.last_step != self.state.step:
            self.act()


class SaveLast(Every):
    """Writes a checkpoint each ``interval`` steps and at the end of the run, however it ends."""

    def __init__(self, state, interval, save):
        super().__init__(state, interval)
        self.save = save

    def act(self):
        self.save()

    def on_train_end(self, run_context):
        if not self.state.failure:  # then the checkpoint before is worth more
            self.save()


class Saver:
    """Writes checkpoints of the run's model, optimizer and state; twice for one step only if it has become the best.

    Args:
        directory, keep_last: see ``Checkpoints``.
        model, optimizer, state: of the run.
        origin: more metadata, see ``run_dir.origin``.
    """

    def __init__(self, directory, keep_last, model, optimizer, state, origin):
        self.checkpoints = Checkpoints(directory, keep_last)
        self.model, self.optimizer, self.state, self.origin = model, optimizer, state, origin
        self.saved_step = None

    def __call__(self, best=False):
        if self.saved_step == self.state.step and not best:
            return
        self.saved_step = self.state.step
        self.checkpoints.save(tensors_of(self.model, self.optimizer), {**self.state.saved(), **self.origin}, best)


def save_nothing(best=False):
    """What a worker has instead of a :class:`Saver` that does not lead."""


def indent(text):
    return "\n".join("    " + line for line in text.splitlines())
