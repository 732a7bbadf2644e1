"""Sample text from a trained run: ``python generate.py run=RUN_DIR prompt="== History =="``; README.md shows how."""

from local_attention.training.command import command
from local_attention.training.config import GenerateConfig, generate_config


@command("generate", GenerateConfig)
def main(composed):
    config = generate_config(composed)  # every mistake in the config ends here, before the imports that take seconds

    import os
    import sys
    import time
    from pathlib import Path

    from local_attention.decoding import DecodingSession, generate_tokens
    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.terminal import ByteOutput, as_text

    if config.prompt_file == "-":
        prompt = sys.stdin.buffer.read()
    else:
        prompt = Path(config.prompt_file).read_bytes() if config.prompt_file else os.fsencode(config.prompt)
    path = checkpoint_of(config.run, config.checkpoint)
    use_device(config.device.target)
    model, meta = load_model(path)
    print(f"{path}, step {meta['step']:,}", file=sys.stderr)

    # All samples grow together, one a row. The first is shown as it grows, the others when they are complete.
    decoder, output = DecodingSession(model, config.num_samples), ByteOutput()
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    tokens = generate_tokens(decoder, list(prompt or b"\n"), config.length or None, **sampling)
    samples, begin = [bytearray() for _ in range(config.num_samples)], None

    def head(number):
        if config.num_samples > 1:
            print(f"--- sample {number} of {config.num_samples}", file=sys.stderr)
        print(as_text(prompt), end="", file=sys.stderr, flush=True)

    try:
        head(1)
        for row in tokens:
            begin = begin or time.monotonic()  # after compiling and the prompt
            for sample, token in zip(samples, row, strict=True):
                sample.append(token)
            output.write(bytes([row[0]]))
        output.end()
        for number, sample in enumerate(samples[1:], 2):
            head(number)
            output.write(bytes(sample))
            output.end()
    finally:
        if begin:
            drawn = sum(map(len, samples))
            print(f"{drawn / (time.monotonic() - begin):,.0f} bytes/s", file=sys.stderr)


if __name__ == "__main__":
    main()
