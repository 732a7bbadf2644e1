"""Train a byte-level language model with local attention: ``python train.py [overrides]``; README.md shows how."""

from local_attention.training.command import command
from local_attention.training.config import RunConfig, eval_batch_size, run_config


@command("train", RunConfig, run_config)
def main(config: RunConfig) -> int | None:
    import mindspore as ms
    from hydra.core.hydra_config import HydraConfig

    import data
    from local_attention.training import run_dir, start, summary
    from local_attention.training.batches import batch_dataset
    from local_attention.training.build import build_model, compute_in, zero_outputs
    from local_attention.training.callbacks import Evaluate, Report, Sample, SaveLast, StepController, Stop, make_up
    from local_attention.training.device import use_device, warn_if_memory_is_short
    from local_attention.training.distributed import explain_lost_worker, init_distributed
    from local_attention.training.errors import RunError
    from local_attention.training.evaluate import Evaluator, eval_span
    from local_attention.training.flops import flops_per_byte
    from local_attention.training.optimizer import build_optimizer, loss_scaler
    from local_attention.training.run_log import log_to_terminal
    from local_attention.training.signals import SignalCheck, StopOnSignal
    from local_attention.training.state import RunState
    from local_attention.training.step import TrainStep, compile_step
    from local_attention.training.writers import open_run_dir

    hydra = HydraConfig.get()
    log_to_terminal()
    device = config.device
    use_device(device.target, config.train.precision, "train.precision", device.matmul_precision)
    distributed = init_distributed(config.parallel)  # a single process, unless msrun has started several

    # Find out where the run writes and what it starts from.
    paths = run_dir.find_run_paths(config, hydra.runtime.choices.get("experiment") or "default", distributed)
    config = start.complete_config(config, paths, hydra.overrides.task, distributed)
    train = config.train

    # Load the bytes.
    corpus = data.load(config.data)
    corpus.require("train", "val", "test", sequence_bytes=train.seq_len + 1)
    distributed.require_same_config(config, corpus)
    sampler = data.SequenceSampler(corpus.train, train.seq_len + 1, config.seed)

    # Build the model, its optimizer and the train step.
    distributed.set_seed(config.seed)
    model = compute_in(build_model(config.model), train.precision)
    if train.zero_init_outputs:
        zero_outputs(model)
    scaler = loss_scaler(train.precision, train.loss_scale)
    optimizer = build_optimizer(config.optimizer, model.trainable_params(), scaler)
    step = TrainStep(model, optimizer, train.grad_accum_every, train.clip_norm, distributed.world_size)
    eval_seq_len = train.eval_seq_len or train.seq_len
    evaluator = Evaluator(
        model, eval_seq_len, eval_batch_size(train.batch_size, train.seq_len, eval_seq_len), distributed
    )

    # Restore the checkpoint, if the run is resumed. From here on, the run directory is written.
    state = RunState(train.max_steps, train.max_minutes, train.stop_after)
    trained_with = start.restore(paths, config, corpus, model, optimizer, state, distributed)
    paths = run_dir.claim(paths, distributed)
    log, save, more_callbacks = open_run_dir(paths, trained_with, corpus, model, optimizer, state, distributed)
    run_dir.announce(paths, model, train, distributed)
    warn_if_memory_is_short(model, train)

    # Train. After each step, the callbacks run in this order.
    controller, check_signals = StepController(state, step, config, distributed), SignalCheck(state, distributed, save)
    report = Report(state, controller, log, train.log_every, flops_per_byte(model, train.seq_len))
    span, prompt = eval_span(corpus, "val", train.eval_bytes), corpus.val[: min(64, train.seq_len)]
    events = [
        Sample(state, train.generate_every, check_signals, log, model, prompt, train.generate_length, config.seed),
        Evaluate(state, train.eval_every, check_signals, report, log, evaluator, span, save),
    ]
    save_last, stop = SaveLast(state, train.checkpoint_every, save), Stop(state, check_signals)
    callbacks = [controller, report, *events, save_last, *more_callbacks, stop]
    with StopOnSignal(state), explain_lost_worker():
        if not state.finished:
            compile_step(step, train)
        state.synchronise(distributed)
        make_up(events, save)
        if state.signal:
            save()
        elif not state.finished:
            dataset = batch_dataset(sampler, train, state.step, distributed)
            ms.Model(step).train(1, dataset, callbacks=callbacks, dataset_sink_mode=False)
        distributed.require_same_weights(model.get_parameters())  # also waits for the last checkpoint
        if state.failure:
            raise RunError(summary.explain_failure(paths.run_dir, state, distributed))

        # Score the best weights on the validation and test splits.
        if not state.signal:
            run_dir.restore_best(paths, model, distributed, state.step)
            scores = summary.score_splits(evaluator, corpus, state, log, train.final_eval_bytes)
    if state.signal:
        summary.print_interruption(paths.run_dir, state, hydra.overrides.task, distributed)
    elif distributed.is_main:
        summary.write_summary(paths.run_dir, state, scores)
        log.log_hparams(state.step)
        summary.print_next_steps(paths.run_dir, state, hydra.overrides.task, distributed)
    log.close()
    distributed.barrier()
    return 128 + state.signal if state.signal else None


if __name__ == "__main__":
    main()
