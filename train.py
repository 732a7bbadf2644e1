"""Train a byte-level language model with local attention: ``python train.py [overrides]``; README.md shows how."""

from local_attention.training.command import command
from local_attention.training.config import RunConfig, run_config
from local_attention.training.keys import as_dict


@command("train", RunConfig)
def main(composed):
    config = run_config(composed)  # every mistake in the config ends here, before the imports that take seconds

    import mindspore as ms
    from hydra.core.hydra_config import HydraConfig

    import data
    from local_attention.dropout import set_dropout_step
    from local_attention.training import callbacks, checkpoint, errors, profile, run_dir, run_log, signals, summary
    from local_attention.training.batches import batch_dataset
    from local_attention.training.build import build_model
    from local_attention.training.device import use_device, warn_of_memory
    from local_attention.training.distributed import explain_lost_worker, join_processes
    from local_attention.training.evaluate import Evaluator
    from local_attention.training.optimizer import build_optimizer
    from local_attention.training.state import RunState
    from local_attention.training.step import TrainStep, compile_step

    hydra, train = HydraConfig.get(), config.train
    run_log.log_to_screen()

    # Where the run writes, what it continues, which bytes it sees; and who takes part.
    use_device(config.device.target)
    workers = join_processes(config.parallel)
    place = workers.share(lambda: run_dir.find_run_paths(config, hydra.runtime.choices.get("experiment") or "default"))
    corpus = data.load(config.data)
    corpus.require("train", "val", "test", sequence_bytes=train.seq_len + 1)
    workers.require_same(config, corpus)
    sampler = data.SequenceSampler(corpus.train, train.seq_len + 1, config.seed)

    # Model, optimizer and step; all three as they were, if the run continues one.
    ms.set_seed((config.seed + workers.rank) % 2**32)  # of dropout; the weights of all are those of rank 0
    model = build_model(config.model)
    optimizer = build_optimizer(config.optimizer, model.trainable_params())
    step = TrainStep(model, optimizer, train.grad_accum_every, train.clip_norm, workers.count)
    state = RunState(train.max_steps, train.max_minutes)
    if place.checkpoint:
        tensors, meta = checkpoint.read(place.checkpoint) if workers.leads else (None, None)
        meta = workers.share(lambda: meta)
        run_dir.check_same_run(config, corpus, meta, workers)
        if workers.leads:
            checkpoint.restore(tensors, model, optimizer)
        state.load(meta)
        set_dropout_step(model, state.step * train.grad_accum_every)
    workers.share_parameters(checkpoint.named_parameters(model, optimizer).values())

    # From here on the run directory is written, by the leading worker alone but for a log of each.
    if workers.leads:
        run_dir.create(place.run_dir, config)
    workers.wait_for_all()
    run_log.log_to_file(place.run_dir, workers.rank)
    if workers.leads:
        origin = run_dir.origin(config, corpus, workers)
        log = run_log.RunLog(place.run_dir, state.step, as_dict(config))
        saver = callbacks.Saver(place.checkpoints, train.keep_last, model, optimizer, state, origin)
    else:
        log, saver = run_log.NoRunLog(), callbacks.save_nothing
    evaluator = Evaluator(model, train.seq_len, train.batch_size, workers)
    run_dir.announce(place, model, train, workers)
    warn_of_memory(model, train)

    # Train. The callbacks run in this order after each step, on all workers, so that none waits long for another.
    advance = callbacks.StepController(state, step, config, workers)
    report = callbacks.Report(state, advance, log, train.log_every)
    start, stop = corpus.bounds("val")
    stretch = corpus.bytes, start, min(stop, start + train.eval_bytes)
    prompt = corpus.val[: min(64, train.seq_len)]
    events = [
        advance,
        report,
        callbacks.Evaluate(state, train.eval_every, report, log, evaluator, stretch, saver),
        callbacks.Sample(state, train.generate_every, log, model, prompt, train.generate_length, config.seed),
        callbacks.SaveLast(state, train.checkpoint_every, saver),
    ]
    if train.profile and workers.leads:
        events.append(profile.Profile(place.run_dir))
    state.agree(workers)
    if not state.finished:
        with signals.StopOnSignal(state), explain_lost_worker():
            dataset = batch_dataset(sampler, train, state.step, workers)
            compile_step(step, train)
            ms.Model(step).train(1, dataset, callbacks=events, dataset_sink_mode=False)
    workers.require_same_weights(model.get_parameters())  # waits for the leading one, which saves
    if state.failure:
        raise errors.RunError(state.failure)
    if state.signal:
        return summary.interrupted(place.run_dir, state, hydra.overrides.task, workers)

    # Score the best weights on all of validation and test, and say what to do next.
    if workers.leads:
        best = checkpoint.Checkpoints(place.checkpoints).find("best") or place.checkpoint
        checkpoint.restore(checkpoint.read(best)[0], model)
    workers.share_parameters(model.get_parameters())
    scores = summary.score_splits(evaluator, corpus, state, log)
    if workers.leads:
        summary.summarise(place.run_dir, state, scores)
        log.compare({f"{split}_bpb": score.bpb for split, score in scores.items()}, state.step)
        summary.print_next_steps(place.run_dir, state, hydra.overrides.task, workers)
    log.close()
    workers.wait_for_all()


if __name__ == "__main__":
    main()
