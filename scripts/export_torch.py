"""Write the weights of a run for PyTorch: ``python scripts/export_torch.py run=RUN_DIR output=FILE``; see README.md."""

import sys
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic.dataclasses import dataclass

from local_attention.options import CHECKED, Help
from local_attention.training.command import command
from local_attention.training.config import Checkpoint, ModelConfig, Run, UserPath, require_run_or_file
from local_attention.training.errors import UsageError
from local_attention.training.schema import parse, register_schema
from scripts.torch_files import ENDINGS, require_ending, write_state


@register_schema("export_torch")
@dataclass(config=CHECKED)
class ExportConfig:
    """Which weights to export, and the file to write."""

    run: Run = None
    checkpoint: Checkpoint = "best"
    output: Annotated[UserPath | None, Help(f"file to write: {', '.join(ENDINGS)}; the last does not need PyTorch")] = (
        None
    )


def export_config(config: DictConfig | dict[str, Any]) -> ExportConfig:
    """Check a config that Hydra has composed; raises :class:`UsageError`."""
    export = parse(ExportConfig, config)
    require_run_or_file(export, "export")
    if not export.output:
        raise UsageError("expected the file to write, such as output=model.pt")
    require_ending("output", export.output)
    if not Path(export.output).parent.is_dir():
        raise UsageError(f"output={export.output}: there is no folder {Path(export.output).parent}")
    return export


@command("export_torch", ExportConfig, export_config)
def main(config: ExportConfig) -> None:
    from local_attention.torch_state import torch_state
    from local_attention.training.build import load_model
    from local_attention.training.run_dir import checkpoint_of
    from scripts.pytorch_original import original_arguments

    path = checkpoint_of(config.run, config.checkpoint)
    model, meta = load_model(path)
    arguments = original_arguments(parse(ModelConfig, meta["config"]["model"]))
    assert config.output  # checked above
    write_state(config.output, torch_state(model))
    print(f"{config.output}: {path}, step {meta['step']:,}; the model in PyTorch:")
    print(f"LocalTransformer({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")


if __name__ == "__main__":
    main()
