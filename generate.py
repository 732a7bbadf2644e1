"""Sample text from a trained run: ``python generate.py run=RUN_DIR prompt="== History =="``; README.md shows how."""

from local_attention.training.command import command
from local_attention.training.config import GenerateConfig, generate_config


@command("generate", GenerateConfig, generate_config)
def main(config: GenerateConfig) -> int | None:
    import os
    import signal
    import sys
    import time

    from data import compression
    from local_attention.decoding import DecodingSession, generate_tokens
    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.sampled_text import SampledText, unescape
    from local_attention.training.terminal import ByteOutput, as_text

    file, stop = config.prompt_file, unescape(config.stop or "")
    prompt = b"".join(compression.chunks(file)) if file else os.fsencode(config.prompt)
    path = checkpoint_of(config.run, config.checkpoint)
    device = config.device
    use_device(device.target, device.precision, matmul_precision=device.matmul_precision)
    model, meta = load_model(path, config.device.precision)
    print(f"{path}, step {meta['step']:,}", file=sys.stderr)

    # The samples are generated as one batch. The first is printed while it grows, the others when they are complete.
    session, output = DecodingSession(model, config.num_samples), ByteOutput()
    tokens = generate_tokens(
        session,
        list(prompt or b"\n"),
        config.length or None,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        num_tokens=256,  # bytes, also where the model has more tokens
        seed=config.seed,
    )
    samples, begin, generated, status = [SampledText(stop) for _ in range(config.num_samples)], None, 0, None
    # On a terminal, a sample continues its prompt. Elsewhere, a prompt and what follows a sample have own lines.
    gap = "" if sys.stdout.isatty() and sys.stderr.isatty() else "\n"

    def print_prompt(number: int) -> None:
        if config.num_samples > 1:
            print(f"--- sample {number} of {config.num_samples}", file=sys.stderr)
        print(as_text(prompt), end=gap, file=sys.stderr, flush=True)

    def end_sample() -> None:
        output.end()
        print(end=gap, file=sys.stderr, flush=True)

    try:
        print_prompt(1)
        try:
            for row in tokens:
                begin = begin or time.monotonic()  # leaves out compilation and prefill
                for sample, token in zip(samples, row, strict=True):
                    sample.append(token)
                generated += len(row)
                output.write(samples[0].new())
                if all(sample.stopped for sample in samples):
                    break
        except KeyboardInterrupt:  # how length=0 ends
            status = 128 + signal.SIGINT
        for number, sample in enumerate(samples, 1):
            if number > 1:
                print_prompt(number)
            output.write(sample.new(final=True))
            end_sample()
    finally:
        if begin:
            print(f"{generated / (time.monotonic() - begin):,.0f} bytes/s", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
