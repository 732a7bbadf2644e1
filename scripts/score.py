"""Bits per byte of any file, with all the context that the model can use: ``score.py run=RUN file=FILE``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.command import command
from local_attention.training.config import ScoreConfig, score_config

CHUNK = 2**14  # bytes that are read at a time


@command("score", ScoreConfig, score_config)
def main(config: ScoreConfig) -> None:
    import numpy as np
    from tqdm import tqdm

    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.errors import UsageError
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.score import score_stream

    def chunks(file: IO[bytes]) -> Iterator[np.ndarray]:
        with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:  # None: on terminals only
            while chunk := file.read(CHUNK):
                yield np.frombuffer(chunk, np.uint8)
                bar.update(len(chunk))

    assert config.file  # checked above
    with open(0 if config.file == "-" else config.file, "rb") as file:
        path = checkpoint_of(config.run, config.checkpoint)
        use_device(config.device.target)
        model, _ = load_model(path)
        try:
            score = score_stream(model, chunks(file))
        except ValueError as error:
            raise UsageError(f"{config.file}: {error}") from None
    print(f"{config.file}: {score.bpb:.4f} bpb over {score.bytes_scored:,} bytes (checkpoint {path})", flush=True)


if __name__ == "__main__":
    main()
