"""Bits per byte of any file, each byte predicted from all that the model can see: ``score.py run=RUN file=FILE``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.command import command
from local_attention.training.config import ScoreConfig, score_config

PIECE = 2**14  # bytes read at once


@command("score", ScoreConfig)
def main(composed):
    config = score_config(composed)  # every mistake in the config ends here, before the imports that take seconds

    import numpy as np
    from tqdm import tqdm

    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.errors import UsageError
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.score import score_stream

    def pieces(file):
        with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:  # None: only on a terminal
            while piece := file.read(PIECE):
                yield np.frombuffer(piece, np.uint8)
                bar.update(len(piece))

    with open(0 if config.file == "-" else config.file, "rb") as file:
        path = checkpoint_of(config.run, config.checkpoint)
        use_device(config.device.target)
        model, _ = load_model(path)
        try:
            score = score_stream(model, pieces(file))
        except ValueError as error:
            raise UsageError(f"{config.file}: {error}") from None
    print(f"{config.file}: {score.bpb:.4f} bpb over {score.bytes_scored:,} bytes (checkpoint {path})", flush=True)


if __name__ == "__main__":
    main()
