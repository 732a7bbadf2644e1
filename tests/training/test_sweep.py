import re
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from local_attention.training import sweep as module
from local_attention.training.config import RunConfig, ScoreConfig
from local_attention.training.errors import RunError
from local_attention.training.schema import keys_of
from local_attention.training.sweep import combinations

KEYS = keys_of(RunConfig)


def swept(*overrides):
    """The combinations, as names and overrides in one line."""
    return [(name, " ".join(job)) for name, job in combinations(overrides, KEYS)]


# What is combined, and how it is named


def test_all_combinations_run_the_last_varying_fastest_and_are_named_by_what_was_swept():
    assert swept("optimizer.lr=1e-3,3e-3", "train.seq_len=8", "seed=1,2") == [
        (f"lr={lr},seed={seed}", f"optimizer.lr={lr} train.seq_len=8 seed={seed}")
        for lr in ("1e-3", "3e-3")
        for seed in (1, 2)
    ]


def test_commas_separate_texts_as_well_unless_they_are_quoted():
    jobs = swept("data.path=my a.txt,'b, c.txt',it's d.txt")
    assert [job for _, job in jobs] == ["data.path='my a.txt'", "data.path='b, c.txt'", "data.path='it\\'s d.txt'"]
    assert [name for name, _ in jobs] == ["path=my_a.txt", "path=b,_c.txt", "path=it_s_d.txt"]
    assert swept('data.path="a, b"') == [("", 'data.path="a, b"')]


def test_the_name_of_a_file_that_exists_is_one_value(tmp_path):
    file = tmp_path / "a,b"
    assert len(swept(f"data.path={file}")) == 2
    file.touch()
    assert swept(f"data.path={file}") == [("", f"data.path='{file}'")]


def test_commas_within_brackets_do_not_separate_values():
    assert [job for _, job in swept("+sizes=[1, 2],[3],{a: 1, b: 2}")] == [
        "+sizes=[1, 2]",
        "+sizes=[3]",
        "+sizes={a: 1, b: 2}",
    ]
    assert swept("+sizes=[1,2]") == [("", "+sizes=[1,2]")]


def test_groups_and_deletions_are_overrides_like_others():
    assert swept("model=tiny,small", "~experiment") == [
        ("model=tiny", "model=tiny ~experiment"),
        ("model=small", "model=small ~experiment"),
    ]


def test_keys_that_end_alike_are_named_in_full():
    (first, _), *_ = swept("optimizer=adam,adamw", "optimizer.name=adam,muon", "schedule.name=wsd,cosine")
    assert first == "optimizer=adam,optimizer.name=adam,schedule.name=wsd"


@pytest.mark.parametrize("values", ["a/b,a_b", "é,è", "1,1", f"{'a' * 200},{'b' * 200}"])
def test_names_are_short_different_and_fit_for_files(values):
    names = [name for name, _ in swept(f"data.path={values}")]
    assert [name[:7] for name in names] == ["1,path=", "2,path="]
    assert all(re.fullmatch(r"[\w.,=+-]{1,150}", name, re.ASCII) for name in names)


# What runs


@pytest.fixture
def sweep(program, tmp_path, monkeypatch):
    """Runs ``train.py -m`` with a task in an empty directory, and returns its status and the configs of its runs."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides, task=lambda config: None, name="train", schema=RunConfig, **options):
        configs = []

        def seen(config):
            configs.append(config)
            return task(config)

        return program(seen, *overrides, "-m", name=name, schema=schema, **options), configs

    return run


def run_dirs(configs):
    return [config.run_dir for config in configs]


def test_all_runs_run_though_one_fails_and_a_table_names_it(sweep, capsys):
    def task(config):
        if config.optimizer.lr > 1:
            raise RunError("step 12: loss nan\nraise something")

    status, configs = sweep("optimizer.lr=1e-3,1e30,2e-3", task=task)
    assert status == 1
    assert [config.optimizer.lr for config in configs] == [1e-3, 1e30, 2e-3]
    assert capsys.readouterr().err.splitlines() == [
        "run 1 of 3: lr=1e-3",
        "run 2 of 3: lr=1e30",
        "error: step 12: loss nan raise something",
        "run 3 of 3: lr=2e-3",
        "1 of 3 runs failed:",
        "  lr=1e30: step 12: loss nan raise something",
    ]


def test_a_bug_in_one_run_does_not_end_the_others(sweep, capsys):
    status, configs = sweep("seed=1,2,0", task=lambda config: 1 // config.seed and None)
    assert (status, len(configs)) == (1, 3)
    assert "  seed=0: ZeroDivisionError: " in capsys.readouterr().err


def test_a_sweep_without_failures_has_status_0_and_leaves_nothing_of_its_own(sweep, tmp_path, capsys):
    status, configs = sweep("seed=1,2")
    assert (status, len(configs)) == (0, 2)
    assert capsys.readouterr().err == "run 1 of 2: seed=1\nrun 2 of 2: seed=2\n"
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("status", [130, 143])
def test_an_interruption_ends_the_sweep_and_prints_how_to_continue_it(sweep, capsys, status):
    found, configs = sweep("seed=1,2,3", "optimizer.lr=0.1", task=lambda config: config.seed // 2 * status)
    assert (found, len(configs)) == (status, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    again = f"python train.py -m seed=1,2,3 optimizer.lr=0.1 run_dir={Path(configs[0].run_dir).parent}"
    assert last == f"run 2 of 3 was interrupted; continue the sweep:  {again}"


def test_ctrl_c_ends_the_sweep(sweep):
    def task(config):
        raise KeyboardInterrupt

    status, configs = sweep("seed=1,2", task=task)
    assert (status, len(configs)) == (130, 1)


@pytest.mark.parametrize(
    "override, values",
    [
        ("seed=range(1,4)", [1, 2, 3]),
        ("seed=choice(5,6)", [5, 6]),
        ("seed=sort(3,1,2)", [1, 2, 3]),
        ("model=glob(*)", ["base", "small", "tiny"]),
    ],
)
def test_hydras_functions_give_values_as_well(sweep, override, values):
    status, configs = sweep(override)
    key = override.split("=")[0]
    assert status == 0
    assert [Path(run_dir).name for run_dir in run_dirs(configs)] == [f"{key}={value}" for value in values]


def test_no_value_at_all_is_refused(sweep, capsys):
    assert sweep("seed=range(1,1)") == (2, [])
    assert capsys.readouterr().err == "error: seed=range(1,1): expected at least one value\n"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.max_steps=5,0"], "max_steps=0: train.max_steps=0: expected a whole number >= 1, or null"),
        (["resume=auto,absent"], "resume=absent: resume=absent: no such run directory or checkpoint"),
        (["model=tiny,huge"], "model=huge: expected one of base, small, tiny"),
        (["seed=1,2", "run_dir=${sed}"], "run_dir: Interpolation key 'sed' not found"),
        (["seed=1,2", "parallel=data"], "-m needs parallel=none: "),
    ],
)
def test_a_mistake_in_any_run_is_found_before_the_first_begins(sweep, capsys, tmp_path, overrides, message):
    assert sweep(*overrides) == (2, [])
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


# Where the runs write


def test_without_run_dir_the_runs_of_a_sweep_have_a_new_directory_in_common(sweep):
    _, configs = sweep("optimizer.lr=1e-3,2e-3", "seed=2,3")
    folders, names = zip(*(run_dir.rsplit("/", 1) for run_dir in run_dirs(configs)), strict=True)
    assert names == ("lr=1e-3,seed=2", "lr=1e-3,seed=3", "lr=2e-3,seed=2", "lr=2e-3,seed=3")
    (folder,) = set(folders)
    assert re.fullmatch(r"runs/default/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder)


@pytest.mark.parametrize(
    "experiment, parent", [("quickstart", "runs/quickstart"), ("quickstart,cpu_10min", "runs/sweep")]
)
def test_the_directory_lies_in_that_of_the_experiment(sweep, experiment, parent):
    _, configs = sweep(f"experiment={experiment}", "seed=1,2")
    assert {str(Path(run_dir).parents[1]) for run_dir in run_dirs(configs)} == {parent}


def test_two_sweeps_that_begin_in_the_same_second_have_two_directories(sweep, monkeypatch):
    monkeypatch.setattr(module.time, "strftime", lambda form: "now")
    assert run_dirs(sweep("seed=1,2")[1]) == ["runs/default/now/seed=1", "runs/default/now/seed=2"]
    Path("runs/default/now/seed=1").mkdir(parents=True)  # a sweep that has written nothing leaves no directory
    assert run_dirs(sweep("seed=1,2")[1]) == ["runs/default/now-2/seed=1", "runs/default/now-2/seed=2"]


def test_a_run_dir_that_is_given_gets_a_subfolder_for_each_run(sweep, tmp_path):
    _, configs = sweep("seed=1,2", "run_dir=runs/x")
    assert run_dirs(configs) == ["runs/x/seed=1", "runs/x/seed=2"]
    assert not [*tmp_path.iterdir()]


def test_a_run_dir_that_differs_in_each_run_is_used_as_it_is(sweep):
    assert run_dirs(sweep("seed=1,2", "run_dir=runs/s${seed}")[1]) == ["runs/s1", "runs/s2"]
    assert run_dirs(sweep("run_dir=a,b")[1]) == ["a", "b"]


def test_a_run_dir_that_differs_in_some_runs_gets_subfolders(sweep):
    _, configs = sweep("seed=1,2", "optimizer.lr=0.1,0.2", "run_dir=runs/s${seed}")
    assert run_dirs(configs) == [f"runs/s{seed}/seed={seed},lr={lr}" for seed in (1, 2) for lr in (0.1, 0.2)]


def test_runs_that_are_continued_write_where_they_did(sweep, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    assert run_dirs(sweep("resume=a,b")[1]) == [None, None]
    assert [Path(path).name for path in run_dirs(sweep("resume=a", "seed=1,2")[1])] == ["seed=1", "seed=2"]


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_single_run_is_as_without_m(sweep, capsys, status):
    found, configs = sweep("seed=1", task=lambda config: status)
    assert (found, run_dirs(configs)) == (status, [None])
    assert capsys.readouterr().err == ""


def test_commands_without_run_dir_can_sweep_too(sweep):
    status, configs = sweep("checkpoint=best,last", name="score", schema=ScoreConfig)
    assert (status, [config.checkpoint for config in configs]) == (0, ["best", "last"])


def test_each_run_knows_its_own_overrides_and_choices(sweep):
    known = []

    def task(config):
        hydra = HydraConfig.get()
        known.append((list(hydra.overrides.task), hydra.runtime.choices["model"]))

    sweep("seed=1,2", "model=tiny", "run_dir=runs/it's", task=task)
    assert known == [([f"seed={seed}", "model=tiny", "run_dir='runs/it\\'s'"], "tiny") for seed in (1, 2)]
