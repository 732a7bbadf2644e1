import inspect
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from local_attention import LocalAttention, LocalMHA, LocalTransformer
from local_attention.training.config import (
    DataConfig,
    DeviceConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    ScoreConfig,
    as_dict,
    evaluate_config,
    generate_config,
    keys_of,
    run_config,
    score_config,
)
from scripts.export_torch import ExportConfig, export_config
from scripts.import_torch import ImportConfig, ImportedModelConfig, import_config

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = {"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig}
FILES = sorted(CONFIGS.rglob("*.yaml"))
CHOICES = [(file.parent.name, file.stem) for file in FILES if file.parent != CONFIGS]
COMMANDS = {"train": "train.py", "generate": "generate.py"}
COMMANDS |= {name: f"scripts/{name}.py" for name in ("evaluate", "score", "import_torch", "export_torch")}
EXPERIMENTS = [name for group, name in CHOICES if group == "experiment"]


@pytest.fixture(scope="module", autouse=True)
def config_directory():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def identity(file):
    return str(file.relative_to(CONFIGS))


def overrides_of(group, name):
    return [f"{group}={name}"] + ["data.path=some.txt"] * ((group, name) == ("data", "file"))


@pytest.mark.parametrize("group, name", CHOICES)
def test_each_choice_makes_a_run_with_its_values(group, name):
    composed = compose("train", overrides_of(group, name))
    run_config(composed)
    written = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    written.pop("defaults", None)
    tree = OmegaConf.to_container(written if group == "experiment" else OmegaConf.create({group: written}))
    for key in set(leaves(tree)) - {"data.path", "model.max_seq_len"}:  # given above; follows train.seq_len
        assert OmegaConf.select(composed, key) == OmegaConf.select(OmegaConf.create(tree), key), key


def test_each_folder_is_a_group_of_the_config():
    assert {group for group, _ in CHOICES} == {*GROUPS, "experiment"}


def leaves(tree, prefix=""):
    """The dotted keys of a tree of dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("group, name", [(group, name) for group, name in CHOICES if group != "experiment"])
def test_a_run_has_every_key_of_the_dataclasses_whatever_is_chosen(group, name):
    composed = OmegaConf.to_container(compose("train", overrides_of(group, name)))
    assert set(leaves(composed)) == set(keys_of(RunConfig))


def test_generate_has_every_key_of_its_dataclass_and_its_defaults():
    composed = compose("generate", ["run=a"])
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(GenerateConfig))
    assert generate_config(composed) == GenerateConfig(run="a", device=DeviceConfig())


def test_evaluate_has_every_key_of_its_dataclass_and_its_defaults():
    composed = compose("evaluate", ["run=a"])
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(EvaluateConfig))
    assert evaluate_config(composed) == EvaluateConfig(run="a")


def test_score_has_every_key_of_its_dataclass_and_its_defaults():
    composed = compose("score", ["run=a", "file=b"])
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(ScoreConfig))
    assert score_config(composed) == ScoreConfig(run="a", file="b")


def test_import_torch_has_every_key_of_its_dataclass_and_its_defaults():
    composed = compose("import_torch", ["weights=a.pt", "run_dir=a", "model.local_attn_window_size=8"])
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(ImportConfig))
    assert import_config(composed) == ImportConfig("a.pt", "a", ImportedModelConfig(local_attn_window_size=8))


def test_export_torch_has_every_key_of_its_dataclass_and_its_defaults():
    composed = compose("export_torch", ["run=a", "output=a.pt"])
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(ExportConfig))
    assert export_config(composed) == ExportConfig(run="a", output="a.pt")


def test_a_model_is_by_default_that_of_the_dataclass():
    """Whose values ``scripts/import_torch.py`` leaves out of the command that it prints."""
    assert run_config(compose("train")).model == ModelConfig()


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "data"])
def test_evaluate_takes_the_same_data_as_training(name):
    overrides = overrides_of("data", name)
    chosen = as_dict(evaluate_config(compose("evaluate", ["run=a", *overrides])).data)
    assert chosen == as_dict(run_config(compose("train", overrides)).data)


def test_the_keys_of_a_model_are_keyword_arguments_of_the_library():
    known = set()
    for cell in (LocalTransformer, LocalMHA, LocalAttention):
        known |= inspect.signature(cell.__init__).parameters.keys()
    assert set(keys_of(ModelConfig)) <= known
    LocalTransformer(**as_dict(ModelConfig(dim=16, depth=1, heads=1, dim_head=8)))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_begins_with_the_command_that_runs_it(name):
    lines = (CONFIGS / f"experiment/{name}.yaml").read_text().splitlines()
    assert lines[:2] == ["# @package _global_", f"# python train.py experiment={name}"]


@pytest.mark.parametrize("file", [file for file in FILES if file.parent == CONFIGS], ids=identity)
def test_a_config_of_a_command_begins_with_the_command(file):
    assert file.read_text().startswith(f"# python {COMMANDS[file.stem]}")
    assert (CONFIGS.parent / COMMANDS[file.stem]).exists()


# Comments


def documented_keys(file):
    """``(dotted key, whether its line has a comment)`` of each value in a file, except what is Hydra's."""
    group = file.parent.name if file.parent.name in GROUPS else ""
    path = [group] if group else []
    base = len(path)
    for line in file.read_text().splitlines():
        match = re.match(r"( *)(\w+):(.*)", line)
        if not match:
            continue
        depth = base + len(match[1]) // 2
        path[depth:] = [match[2]]
        value, _, comment = match[3].partition(" #")
        if path[0] not in ("hydra", "defaults") and value.strip():
            yield ".".join(path), len(comment.split()) > 0


def meanings(files):
    """The keys that have a comment in one of the files."""
    return {key for file in files for key, commented in documented_keys(file) if commented}


@pytest.mark.parametrize("file", FILES, ids=identity)
def test_each_key_has_a_comment_here_or_where_it_comes_from(file):
    """A key need not be explained again in each file of its folder, nor one whose value is the name of its file."""
    apart = {"generate", "evaluate", "score", "export_torch"}
    explained = meanings([file] if file.stem in apart else [other for other in FILES if other.stem not in apart])
    named = {f"{file.parent.name}.{key}" for key in ("name", "source")}
    lacking = [key for key, _ in documented_keys(file) if key not in explained | named]
    assert not lacking


@pytest.mark.parametrize("group", ["data", "optimizer", "schedule"])
def test_a_choice_is_named_as_its_file(group):
    for file in sorted((CONFIGS / group).glob("*.yaml")):
        written = yaml.safe_load(file.read_text())
        assert written["source" if group == "data" else "name"] == file.stem
