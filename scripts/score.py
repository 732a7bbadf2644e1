"""Bits per byte of any file, with all the context that the model can use: ``score.py run=RUN file=FILE``."""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.command import command
from local_attention.training.config import ScoreConfig, score_config

CHUNK = 2**14  # bytes that are read at a time


@command("score", ScoreConfig, score_config)
def main(config: ScoreConfig) -> None:
    import numpy as np
    from tqdm import tqdm

    from data import compression
    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.errors import UsageError
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.score import score_stream

    assert config.file  # checked above
    file = compression.chunks(config.file, CHUNK)
    first = next(file, b"")  # a file that cannot be read ends here, before the model is loaded
    if not first:
        raise UsageError(f"{config.file}: expected a text of at least one byte, got an empty one")

    def arrays() -> Iterator[np.ndarray]:
        with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:  # None: on terminals only
            for chunk in chain([first], file):
                yield np.frombuffer(chunk, np.uint8)
                bar.update(len(chunk))

    path = checkpoint_of(config.run, config.checkpoint)
    device = config.device
    use_device(device.target, device.precision, matmul_precision=device.matmul_precision)
    model, _ = load_model(path, config.device.precision)
    score = score_stream(model, arrays())
    print(f"{config.file}: {score.bpb:.4f} bpb over {score.bytes_scored:,} bytes (checkpoint {path})", flush=True)


if __name__ == "__main__":
    main()
