import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from local_attention.training.arguments import escape_interpolations, quote, split, unquote
from local_attention.training.config import EvaluateConfig, GenerateConfig, RunConfig, ScoreConfig
from local_attention.training.errors import UsageError
from local_attention.training.schema import keys_of
from tests.training.toys import composed, examples

KEYS = keys_of(GenerateConfig)
SCHEMAS = {"train": RunConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig, "score": ScoreConfig}

# Texts

TEXT = st.text(st.sampled_from("'\"\\${}[]()=,:; ~#@?!*\n\tab1") | st.characters(codec="utf-8"), max_size=12)
QUOTED = r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\""  # a text in quotes: they are removed


@given(texts=st.lists(TEXT, min_size=8, max_size=8))
@example(['"Hello," she said. "Bye."', "'a' b 'c'", "'", "''", "'a\\'", '"a\\"', "it's", "a\\"])
@example(["", " a ", "== a, b ==", "${prompt}", "\\${a}", "${", "a\\\\", "[1, 2]"])
@example(["${prompt}", "\\${a}", "${", "a\\\\${", "\\'", "a.txt", "1.5", "a/b"])
@examples(20)
def test_hydra_parses_a_quoted_text_as_it_was(texts):
    texts = [text for text in texts if text not in ("null", "???") and not re.fullmatch(QUOTED, text, re.DOTALL)]
    keys = dict.fromkeys([f"key{i}" for i in range(len(texts))], KEYS["run"])
    arguments = [f"+{quote(f'{key}={escape_interpolations(text)}', keys)}" for key, text in zip(keys, texts)]
    prompt = texts[0] if texts else "a"
    config = composed("generate", *arguments, quote(f"prompt={prompt}", KEYS))
    assert [config[key] for key in keys] == texts
    assert config["prompt"] == prompt


def test_paths_may_refer_to_other_keys_and_prompts_may_not():
    arguments = ["run=runs/s${seed}", "prompt=${seed}", "stop=${seed}", "seed=3", "checkpoint=it's \\${seed}"]
    config = composed("generate", *(quote(argument, KEYS) for argument in arguments))
    assert (config["run"], config["checkpoint"]) == ("runs/s3", "it's ${seed}")
    assert (config["prompt"], config["stop"]) == ("${seed}", "${seed}")


@pytest.mark.parametrize("value", ["null", "'a, b'", '"a, b"', "'it\\'s'", "''", "runs/a-1.b/c", "a.txt"])
def test_null_plain_paths_and_text_in_quotes_are_not_changed(value):
    assert quote(f"prompt={value}", KEYS) == f"prompt={value}"


@pytest.mark.parametrize(
    "argument, printed",
    [
        ("run='head'", "run=head"),
        ("run='a b, c-1.txt'", "run=a b, c-1.txt"),
        ("run='null'", "run='null'"),
        ("run='it\\'s'", "run='it\\'s'"),
        ("run=a/b", "run=a/b"),
    ],
)
def test_quotes_that_would_be_added_again_are_not_printed(argument, printed):
    assert unquote(argument) == printed
    assert quote(printed, KEYS) == argument


@pytest.mark.parametrize("argument", ["length=5", "promptly=a, b", "--help", "prompt", "+prompt=a, b", "~prompt"])
def test_other_arguments_are_not_changed(argument):
    assert quote(argument, KEYS) == argument


# Flags, overrides, and other words


@pytest.mark.parametrize(
    "arguments, flags, overrides",
    [
        ("a=1 -m b=2,3", ["-m"], ["a=1", "b=2,3"]),
        ("a=1 --cfg job b=2 ~c", ["--cfg", "job"], ["a=1", "b=2", "~c"]),
        ("--multirun a=-1", ["--multirun"], ["a=-1"]),
        ("a=1 hydra.mode=MULTIRUN", ["hydra.mode=MULTIRUN"], ["a=1"]),
        ("hydra.verbose=true", [], ["hydra.verbose=true"]),
    ],
)
def test_flags_may_stand_anywhere(arguments, flags, overrides):
    assert split(arguments.split(), "train", {}) == (flags, overrides)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The message for a command line, in a directory with the files of a run."""
    (tmp_path / "runs/a").mkdir(parents=True)
    for name in ("a.txt", "a.safetensors", "quickstart"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def message(name, *arguments):
        with pytest.raises(UsageError) as error:
            split(list(arguments), name, keys_of(SCHEMAS[name]))
        return str(error.value)

    return message


@pytest.mark.parametrize(
    "name, word, guess",
    [
        ("generate", "runs/a", "run=runs/a"),
        ("evaluate", "runs/a", "run=runs/a"),
        ("train", "runs/a", "run_dir=runs/a"),
        ("generate", "a.safetensors", "checkpoint=a.safetensors"),
        ("train", "a.safetensors", "resume=a.safetensors"),
        ("generate", "a.txt", "prompt_file=a.txt"),
        ("score", "a.txt", "file=a.txt"),
        ("train", "a.txt", "data=file data.path=a.txt"),
        ("train", "quickstart", "experiment=quickstart"),
        ("train", "tiny", "model=tiny"),
    ],
)
def test_a_path_or_a_choice_without_its_key_is_answered_with_the_key(refusal, name, word, guess):
    assert refusal(name, "seed=1", word) == f"{word}: expected KEY=VALUE; did you mean {guess}?"


def test_a_text_that_the_shell_has_split_is_answered_with_quotes(refusal):
    message = refusal("generate", "run=runs/a", "prompt=Hello,", "world")
    assert message == "world: expected KEY=VALUE; a value with spaces needs quotes: 'prompt=Hello, world'"


@pytest.mark.parametrize("word, key", [("length", "length=1024"), ("target", "device.target=auto")])
def test_a_key_without_value_is_answered_with_the_key_and_its_default(refusal, word, key):
    assert refusal("generate", word, "=", "5") == f"{word}: expected KEY=VALUE, such as {key}"


def test_any_other_word_is_answered_with_help(refusal):
    assert refusal("generate", "-m", "nothing") == "nothing: expected KEY=VALUE; --help lists the keys"


@pytest.mark.parametrize("argument", ["--cfg=job", "--info", "hydra.sweep.dir=a", "hydra/launcher=b"])
def test_hydras_flags_and_launchers_are_refused_in_a_sweep(refusal, argument):
    assert refusal("train", "seed=1,2", "-m", argument).startswith(f"{argument}: expected keys of --help alone with -m")
