import inspect
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from local_attention import LocalAttention, LocalMHA, LocalTransformer
from local_attention.training.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    ScoreConfig,
    evaluate_config,
    generate_config,
    run_config,
    score_config,
)
from local_attention.training.schema import as_dict, keys_of
from scripts.diagnose import DiagnoseConfig, diagnose_config
from scripts.export_torch import ExportConfig, export_config
from scripts.import_torch import ImportConfig, ImportedModelConfig, import_config

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = {"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig}
FILES = sorted(CONFIGS.rglob("*.yaml"))
CHOICES = [(file.parent.name, file.stem) for file in FILES if file.parent != CONFIGS]
COMMANDS = {"train": "train.py", "generate": "generate.py"}
COMMANDS |= {name: f"scripts/{name}.py" for name in ("evaluate", "score", "import_torch", "export_torch", "diagnose")}
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
def test_a_run_has_every_key_that_is_declared_whatever_is_chosen(group, name):
    composed = OmegaConf.to_container(compose("train", overrides_of(group, name)))
    assert set(leaves(composed)) == set(keys_of(RunConfig))


@pytest.mark.parametrize(
    ("name", "overrides", "check", "expected"),
    [
        ("train", [], run_config, RunConfig()),
        ("generate", ["run=a"], generate_config, GenerateConfig(run="a")),
        ("evaluate", ["run=a"], evaluate_config, EvaluateConfig(run="a")),
        ("score", ["run=a", "file=b"], score_config, ScoreConfig(run="a", file="b")),
        ("diagnose", [], diagnose_config, DiagnoseConfig()),
        ("export_torch", ["run=a", "output=a.pt"], export_config, ExportConfig(run="a", output="a.pt")),
        (
            "import_torch",
            ["weights=a.pt", "run_dir=a", "model.local_attn_window_size=8"],
            import_config,
            ImportConfig("a.pt", "a", ImportedModelConfig(local_attn_window_size=8)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_has_every_declared_key_and_its_default(name, overrides, check, expected):
    composed = compose(name, overrides)
    assert set(leaves(OmegaConf.to_container(composed))) == set(keys_of(type(expected)))
    assert check(composed) == expected


def test_every_key_can_be_given_without_a_plus():
    keys = keys_of(RunConfig)
    composed = compose("train", [f"{key}=1" for key in keys])
    assert all(OmegaConf.select(composed, key) == 1 for key in keys)


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name in GROUPS], ids=identity)
def test_a_choice_says_only_what_it_is_and_what_differs_from_the_default(file):
    written = OmegaConf.to_container(OmegaConf.load(file))
    defaults = as_dict(GROUPS[file.parent.name]())
    for key in written.keys() - {"name", "source", "defaults"}:
        assert written[key] != defaults[key], key


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


@pytest.mark.parametrize("schema", [RunConfig, GenerateConfig, EvaluateConfig, ScoreConfig, ImportConfig, ExportConfig])
def test_each_key_has_one_line_of_help_one_type_and_if_a_number_a_range(schema):
    for key, option in keys_of(schema).items():
        assert len(option.help) > 4 and "\n" not in option.help, key
        assert option.kind in ("integer", "number", "boolean", "string", "array"), key
        assert bool(option.bounds) == (option.kind in ("integer", "number")), key


@pytest.mark.parametrize("group", ["data", "optimizer", "schedule"])
def test_a_choice_is_named_as_its_file(group):
    for file in sorted((CONFIGS / group).glob("*.yaml")):
        written = yaml.safe_load(file.read_text())
        assert written["source" if group == "data" else "name"] == file.stem
