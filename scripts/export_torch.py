"""Write the weights of a run for PyTorch: ``python scripts/export_torch.py run=RUN_DIR output=FILE``; see README.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.options import Help
from local_attention.training.command import command
from local_attention.training.config import Checkpoint, ModelConfig, Run, require_run_or_file
from local_attention.training.errors import UsageError
from local_attention.training.keys import keys_for, parse
from scripts.torch_files import require_ending, write_state


@keys_for("export_torch")
@dataclass
class ExportConfig:
    """Which weights go where."""

    run: Run = None
    checkpoint: Checkpoint = "best"
    output: Annotated[
        str | None, Help("file to write: .pt, .pth or .safetensors; the latter does not need PyTorch")
    ] = None


def export_config(config):
    """Turn what Hydra composed into a checked :class:`ExportConfig`; raises :class:`UsageError`."""
    export = parse(ExportConfig, config)
    require_run_or_file(export, "export")
    if not export.output:
        raise UsageError("expected the file to write, such as output=model.pt")
    require_ending("output", export.output)
    if not Path(export.output).parent.is_dir():
        raise UsageError(f"output={export.output}: there is no folder {Path(export.output).parent}")
    return export


@command("export_torch", ExportConfig)
def main(composed):
    config = export_config(composed)  # every mistake but a wrong run ends here, before the imports that take seconds

    from local_attention.torch_state import torch_state
    from local_attention.training.build import load_model
    from local_attention.training.run_dir import checkpoint_of
    from scripts.pytorch_original import original_arguments

    path = checkpoint_of(config.run, config.checkpoint)
    model, meta = load_model(path)
    arguments = original_arguments(parse(ModelConfig, meta["config"]["model"]))
    write_state(config.output, torch_state(model))
    print(f"{config.output}: {path}, step {meta['step']:,}; the model in PyTorch:")
    print(f"LocalTransformer({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")


if __name__ == "__main__":
    main()
