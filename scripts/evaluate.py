"""Bits per byte of a checkpoint over a whole split: ``python scripts/evaluate.py run=RUN_DIR``; README.md shows how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.command import command
from local_attention.training.config import EvaluateConfig, evaluate_config, fill_from_checkpoint


@command("evaluate", EvaluateConfig, evaluate_config)
def main(config: EvaluateConfig) -> None:
    import logging
    from functools import partial

    from tqdm import tqdm

    import data
    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.dynamic import dynamic_score, load_step, record_score
    from local_attention.training.errors import UsageError
    from local_attention.training.evaluate import Evaluator, eval_span
    from local_attention.training.run_dir import checkpoint_of

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # standard error
    log = logging.getLogger("evaluate")

    # Load the model and the data; by default the data that it was trained on.
    path = checkpoint_of(config.run, config.checkpoint)
    device = config.device
    use_device(device.target, device.precision, matmul_precision=device.matmul_precision)
    model, meta = load_model(path, config.device.precision)
    config = fill_from_checkpoint(config, meta)
    assert config.seq_len and config.batch_size  # filled
    corpus = data.load(config.data)
    same_data = "data" in meta and meta["data"]["fingerprint"] == corpus.fingerprint
    if "data" in meta and not same_data:
        trained_on = f"{meta['data']['name']}, fingerprint {meta['data']['fingerprint']}"
        log.warning(f"warning: {path} was trained on {trained_on}; this is {corpus.name}, {corpus.fingerprint}")

    # Score the split.
    data_bytes, start, stop = eval_span(corpus, config.split)
    if start == stop:
        raise UsageError(f"the {config.split} split of {corpus.name} is empty: use a larger file")
    log.info(f"scoring all {stop - start:,} bytes of {config.split} with {path}")
    bar = partial(tqdm, leave=False, disable=None)  # None: on terminals only
    if config.dynamic:
        step = load_step(path, model, config.dynamic_rate, config.device.precision)
        score = dynamic_score(step, data_bytes, start, stop, config.seq_len, bar)
        name, how = f"{config.split}_bpb_dynamic", f"dynamic_rate {config.dynamic_rate:g}"
    else:
        score = Evaluator(model, config.seq_len, config.batch_size)(data_bytes, start, stop, config.stride, bar)
        name, how = config.split, f"stride {config.stride}"
    how = f"checkpoint {path}, seq_len {config.seq_len}, {how}"
    print(f"{name}: {score.bpb:.6f} bpb over {score.bytes_scored:,} bytes ({how})", flush=True)

    # Keep a dynamic score that belongs to the run: the end of a run has recorded the static ones.
    is_of_run = same_data and config.checkpoint == "best" and config.seq_len == meta["config"]["train"]["seq_len"]
    if (
        config.run
        and config.dynamic
        and is_of_run
        and record_score(config.run, config.split, score, config.dynamic_rate)
    ):
        log.info(f"recorded in {Path(config.run) / 'summary.json'}")


if __name__ == "__main__":
    main()
