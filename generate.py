"""Sample text from a trained run: ``python generate.py run=RUN_DIR prompt="== History =="``; README.md shows how."""

from local_attention.training.command import command
from local_attention.training.config import GenerateConfig, generate_config


@command("generate", GenerateConfig, text=("run", "checkpoint", "prompt", "prompt_file"))
def main(composed):
    config = generate_config(composed)  # every mistake in the config ends here, before the imports that take seconds

    import os
    import sys
    import time
    from pathlib import Path

    from local_attention.decode import Decoder, generate_tokens
    from local_attention.training.build import load_model
    from local_attention.training.device import use_device
    from local_attention.training.run_dir import checkpoint_of
    from local_attention.training.terminal import ByteOutput, as_text

    prompt = Path(config.prompt_file).read_bytes() if config.prompt_file else os.fsencode(config.prompt)
    path = checkpoint_of(config.run, config.checkpoint)
    use_device(config.device.target)
    model, meta = load_model(path)
    print(f"{path}, step {meta['step']:,}", file=sys.stderr)

    decoder, output = Decoder(model), ByteOutput()
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    begin = None
    for i in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {i + 1} of {config.num_samples}", file=sys.stderr)
        print(as_text(prompt), end="", file=sys.stderr, flush=True)
        tokens = generate_tokens(decoder, list(prompt or b"\n"), config.length, seed=(config.seed, i), **sampling)
        for (token,) in tokens:
            begin = begin or time.monotonic()  # after compiling and the first prompt
            output.write(bytes([token]))
        output.end()
    seconds = time.monotonic() - begin
    print(f"{config.length * config.num_samples / seconds:,.0f} bytes/s", file=sys.stderr)


if __name__ == "__main__":
    main()
