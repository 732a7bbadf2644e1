"""The typed configuration of each command, and all its checks, before anything is compiled.

Each key is declared once, by a field: name, type, range, default and one line of help; see ``local_attention.options``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from os.path import expanduser
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig
from pydantic import AfterValidator, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic.dataclasses import dataclass

from local_attention.options import (
    CHECKED,
    Depth,
    Dim,
    ExactWindowSize,
    Help,
    LanguageModelOptions,
    LocalTransformerOptions,
    MaxSeqLen,
    WindowSizes,
    first_problem,
)
from local_attention.training.errors import UsageError
from local_attention.training.schema import as_dict, parse, register_schema

UserPath = Annotated[StrictStr, AfterValidator(expanduser)]  # "~" is the home directory, as in a shell
Run = Annotated[UserPath | None, Help("run directory")]
Checkpoint = Annotated[UserPath, Help("best, last or a checkpoint file, which needs no run")]
Seed = Annotated[StrictInt, Ge(0), Le(2**32 - 1)]
Count = Annotated[StrictInt, Ge(1)]
Decay = Annotated[StrictFloat, Ge(0), Lt(1)]
Fraction = Annotated[StrictFloat, Ge(0), Le(1)]
Positive = Annotated[StrictFloat, Gt(0)]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"],
    Help("type to compute in; weights and checkpoints are float32; bfloat16 needs a GPU or Ascend"),
]


Source = Annotated[
    Literal["enwik8", "stdlib", "file"],
    Help("the first 10^8 bytes of English Wikipedia, the sources of Python's standard library, or any file"),
]


@dataclass(config=CHECKED)
class OtherDataConfig:
    """Which bytes to score instead of the run's: see :func:`fill_from_checkpoint`."""

    source: Annotated[Source | None, Help("null: the data of the run")] = None
    path: Annotated[
        UserPath | None, Help("the file: raw, .gz, .xz, .bz2, .zst, .zip or .tar, detected from its content")
    ] = None
    dir: Annotated[UserPath | None, Help("folder of enwik8, which is downloaded to it if necessary; null: data/")] = (
        None
    )
    fallback: Annotated[
        Literal["stdlib"] | None,
        Help("what to use if enwik8 is absent and cannot be downloaded; null: end with an error"),
    ] = None
    max_bytes: Annotated[
        Count | None, Help("use only that many bytes of the source, from the beginning; null: all")
    ] = None
    val_path: Annotated[
        UserPath | None, Help("own file for validation; null: 5% of the bytes, before those for testing")
    ] = None
    test_path: Annotated[UserPath | None, Help("own file for testing; null: the last 5% of the bytes")] = None


@dataclass(config=CHECKED)
class DataConfig(OtherDataConfig):
    """Which bytes: see ``data.load``."""

    source: Source = "enwik8"


@dataclass(kw_only=True, config=CHECKED)
class ModelConfig(LanguageModelOptions):
    """Keyword arguments of ``LocalTransformer``; by default the model of the original's enwik8 example."""

    num_tokens: Annotated[
        StrictInt, Ge(256), Help("size of the vocabulary, at least one token per value of a byte")
    ] = 256
    max_seq_len: Annotated[
        MaxSeqLen, Help("longest sequence that learned absolute positions allow; train.seq_len unless given")
    ] = 1024
    dim: Dim = 512
    depth: Depth = 6
    local_attn_window_size: WindowSizes = 256
    exact_windowsize: ExactWindowSize = True


@dataclass(config=CHECKED)
class OptimizerConfig:
    """See ``training.optimizer``."""

    name: Annotated[Literal["adam", "adamw", "muon"], Help("set by optimizer=")] = "adamw"
    lr: Annotated[Positive, Help("peak learning rate, which the schedule scales; with muon that of AdamW")] = 1e-3
    beta1: Annotated[Decay, Help("decay of the mean of the gradients")] = 0.9
    beta2: Annotated[Decay, Help("decay of the mean of the squared gradients")] = 0.99
    eps: Annotated[Positive, Help("added to the root of the mean of the squared gradients")] = 1e-8
    weight_decay: Annotated[
        StrictFloat,
        Ge(0),
        Help("fraction of a weight that a step removes, times lr; not for norms and embeddings, nor adam"),
    ] = 0.1
    ngram_lr: Annotated[Positive, Help("peak learning rate of n-grams' embeddings, by Adagrad")] = 0.1
    muon_lr: Annotated[Positive, Help("peak learning rate of the matrices within layers, with muon")] = 0.02
    momentum: Annotated[Decay, Help("decay of the momentum of muon")] = 0.95
    muon_beta2: Annotated[
        Decay,
        Help("decay of the mean square of each row of muon's updates, which divides the row; 0: rows are not divided"),
    ] = 0.0


@dataclass(config=CHECKED)
class ScheduleConfig:
    """See ``training.schedule``."""

    name: Annotated[Literal["constant", "cosine", "wsd"], Help("set by schedule=; wsd: warm-up, stable, decay")] = (
        "cosine"
    )
    warmup_steps: Annotated[StrictInt, Ge(0), Help("steps in which the learning rate rises linearly to its peak")] = 100
    decay_fraction: Annotated[Fraction, Help("fraction of the run, at its end, in which the rate decays")] = 1.0
    final_fraction: Annotated[Fraction, Help("learning rate at the end, as a fraction of the peak")] = 0.1


@dataclass(config=CHECKED)
class TrainConfig:
    """Sizes, length and events of a run; the events in optimizer steps."""

    seq_len: Annotated[Count, Help("input bytes per sequence; the labels are shifted by one byte")] = 1024
    batch_size: Annotated[Count, Help("sequences per micro-batch of each process")] = 4
    grad_accum_every: Annotated[Count, Help("micro-batches per step")] = 4
    max_steps: Annotated[Count | None, Help("the run ends after that many steps; null: no limit")] = 10000
    max_minutes: Annotated[Positive | None, Help("or after that many minutes, with evaluations; null: no limit")] = None
    stop_after: Annotated[
        Count | None, Help("or after that many evaluations without a new best; null: evaluations do not end it")
    ] = None
    zero_init_outputs: Annotated[
        StrictBool,
        Help("the last weights of attention and feed-forward begin at zero, so that at first layers change nothing"),
    ] = False
    clip_norm: Annotated[Positive, Help("global norm that gradients are scaled down to")] = 0.5
    precision: Precision = "float32"
    loss_scale: Annotated[
        StrictFloat,
        Ge(1),
        Help("factor of the loss at first, with float16: halved where a gradient overflows, doubled now and then"),
    ] = 65536.0
    max_bad_steps: Annotated[
        Count, Help("the run gives up after that many steps in a row whose loss or gradient is not finite")
    ] = 10
    log_every: Annotated[Count, Help("steps from one line of metrics to the next")] = 10
    eval_every: Annotated[Count, Help("steps from one evaluation to the next")] = 250
    eval_bytes: Annotated[Count, Help("first bytes of the validation split, which evaluations score")] = 100_000
    eval_seq_len: Annotated[
        Count | None, Help("bytes per sequence in evaluations and for the scores at the end; null: seq_len")
    ] = None
    final_eval_bytes: Annotated[
        Annotated[StrictInt, Ge(0)] | None,
        Help("first bytes of the validation and the test split that the end of the run scores; null: all, 0: none"),
    ] = None
    checkpoint_every: Annotated[Count, Help("steps from one checkpoint to the next, besides that at the end")] = 250
    keep_last: Annotated[Count, Help("newest checkpoints to keep, besides the best")] = 2
    generate_every: Annotated[Count, Help("steps from one sample to the next")] = 500
    generate_length: Annotated[Count, Help("bytes per sample")] = 256
    profile: Annotated[StrictBool, Help("write the operators' times of a few steps to profile.csv")] = False


@dataclass(config=CHECKED)
class DeviceConfig:
    """Where MindSpore runs."""

    target: Annotated[Literal["auto", "CPU", "GPU", "Ascend"], Help("where MindSpore runs")] = "auto"
    matmul_precision: Annotated[
        Literal["float32", "bfloat16"],
        Help("what linear layers in C++ round what they multiply to; bfloat16 needs a CPU with AVX512-BF16 or AMX"),
    ] = "float32"


@dataclass(config=CHECKED)
class ModelDeviceConfig(DeviceConfig):
    """Where MindSpore runs a trained model, and in which type."""

    precision: Precision = "float32"


@register_schema("train")
@dataclass(config=CHECKED)
class RunConfig:
    """A whole run."""

    train: TrainConfig = field(default_factory=TrainConfig)  # first: its seq_len is what model.max_seq_len refers to
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: Annotated[
        Literal["none", "data"], Help("data: one of the processes that msrun or scripts/launch.sh started; none: alone")
    ] = "none"
    run_dir: Annotated[UserPath | None, Help("where the run writes; null: runs/<experiment>/<time>")] = None
    resume: Annotated[
        UserPath | None,
        Help("auto: continue the run in run_dir, if any; or a run directory or checkpoint; null: refuse to continue"),
    ] = "auto"
    init_from: Annotated[
        UserPath | None, Help("run directory or checkpoint whose weights a new run begins with; null: random weights")
    ] = None
    seed: Annotated[Seed, Help("of the weights, the order of sequences, dropout and the samples")] = 0


@register_schema("generate")
@dataclass(config=CHECKED)
class GenerateConfig:
    """What ``generate.py`` samples."""

    run: Run = None
    checkpoint: Checkpoint = "best"
    prompt: Annotated[StrictStr, Help("text to continue; empty: a newline")] = ""
    prompt_file: Annotated[
        UserPath | None, Help("a file to continue instead, raw or packed like data.path; -: standard input")
    ] = None
    length: Annotated[StrictInt, Ge(0), Help("bytes to sample; 0: until Ctrl-C")] = 1024
    stop: Annotated[
        StrictStr | None,
        Help(r"each sample ends before this text; \n, \t, \r, \\ and \xHH (a byte) are understood; null: at length"),
    ] = None
    temperature: Annotated[StrictFloat, Ge(0), Help("divides the logits; 0: always the most likely byte")] = 0.8
    top_k: Annotated[Count | None, Help("sample among that many of the most likely bytes; null: all")] = None
    top_p: Annotated[
        StrictFloat | None,
        Gt(0),
        Le(1),
        Help("sample among the most likely bytes of this total probability; null: all"),
    ] = 0.95
    num_samples: Annotated[Count, Help("continuations")] = 1
    seed: Annotated[Seed, Help("the same seed, prompt and checkpoint give the same bytes")] = 0
    device: ModelDeviceConfig = field(default_factory=ModelDeviceConfig)


@register_schema("evaluate")
@dataclass(config=CHECKED)
class EvaluateConfig:
    """What ``scripts/evaluate.py`` scores. None in ``data``: as in the run."""

    run: Run = None
    checkpoint: Checkpoint = "best"
    split: Annotated[Literal["train", "val", "test"], Help("which part of the data")] = "test"
    seq_len: Annotated[
        Count | None,
        Help("bytes that the model sees at once; null: as the run's evaluations, with dynamic as in training"),
    ] = None
    stride: Annotated[
        Count | None,
        Help("bytes from one sequence to the next, at most seq_len; null: seq_len, so that none overlap"),
    ] = None
    batch_size: Annotated[
        Count | None, Help("sequences that the model sees at once; null: about as many bytes as in training")
    ] = None
    dynamic: Annotated[
        StrictBool, Help("score each sequence, then learn from it, so that later ones are predicted better")
    ] = False
    dynamic_rate: Annotated[Positive, Help("learning rate of dynamic=true, as a fraction of the peak of the run")] = 0.1
    data: OtherDataConfig = field(default_factory=OtherDataConfig)
    device: ModelDeviceConfig = field(default_factory=ModelDeviceConfig)


@register_schema("score")
@dataclass(config=CHECKED)
class ScoreConfig:
    """What ``scripts/score.py`` scores."""

    run: Run = None
    checkpoint: Checkpoint = "best"
    file: Annotated[UserPath | None, Help("the text to score, raw or packed like data.path; -: standard input")] = None
    device: ModelDeviceConfig = field(default_factory=ModelDeviceConfig)


def run_config(config: DictConfig) -> RunConfig:
    """Turn what Hydra composed into a checked :class:`RunConfig`.

    With ``init_from``, values that must go together are checked by :func:`fill_from_initial` instead.

    Raises:
        UsageError: for an unknown key, a wrong type, a value out of range, values that do not go together.
    """
    run = parse(RunConfig, config)
    if run.init_from and run.resume not in (None, "auto"):
        raise UsageError(
            f"init_from={run.init_from} begins a new run, resume={run.resume} continues one: give one of them"
        )
    if not run.init_from:
        check_run(run)
    return run


def eval_batch_size(batch_size: int, seq_len: int, eval_seq_len: int) -> int:
    """How many sequences of ``eval_seq_len`` bytes to evaluate at once: about as many bytes as in training."""
    return max(1, batch_size * seq_len // eval_seq_len)


def check_run(run: RunConfig) -> None:
    """Raise :class:`UsageError` for values that do not go together."""
    model, train = run.model, run.train
    if train.max_steps is None and train.max_minutes is None:
        raise UsageError("expected train.max_steps or train.max_minutes, got null for both: the run would never end")
    check_model(model)
    for number, window in enumerate(model.per_layer("local_attn_window_size"), 1):
        if not model.is_global(number) and train.seq_len % window:
            raise UsageError(
                f"train.seq_len={train.seq_len} is not a multiple of model.local_attn_window_size={window}: change one "
                "of them"
            )
    if model.use_abs_pos_emb and model.max_seq_len < train.seq_len:
        advice = "lower train.seq_len" if run.init_from else "raise it, or use model.use_abs_pos_emb=false"
        raise UsageError(
            f"model.max_seq_len={model.max_seq_len} is shorter than train.seq_len={train.seq_len}: {advice}"
        )
    if model.use_abs_pos_emb and model.max_seq_len < (train.eval_seq_len or 0):
        raise UsageError(
            f"train.eval_seq_len={train.eval_seq_len}: expected at most model.max_seq_len={model.max_seq_len}, as "
            "learned positions end there; or use model.use_abs_pos_emb=false"
        )
    require_path(run.data)


def fill_from_initial(config: RunConfig, meta: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """A checked :class:`RunConfig` for the model of a checkpoint.

    Keys of the model and ``train.seq_len`` that the command line does not give are as in the checkpoint's metadata. A
    choice of ``model=`` gives all keys of the model.

    Args:
        config: a config with ``init_from``.
        meta: the metadata of the checkpoint.
        overrides: those of the command line.

    Raises:
        UsageError: for values that do not go together.
    """
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    if "model" not in given:
        model, train = as_dict(parse(ModelConfig, meta["config"]["model"])), meta["config"].get("train", {})
        model = {key: value for key, value in model.items() if f"model.{key}" not in given}
        seq_len = config.train.seq_len if "train.seq_len" in given else train.get("seq_len", config.train.seq_len)
        config = replace(config, model=replace(config.model, **model), train=replace(config.train, seq_len=seq_len))
    check_run(config)
    return config


def check_model(model: ModelConfig) -> None:
    """Raise :class:`UsageError` for options that do not go together."""
    try:
        options = LocalTransformerOptions(**as_dict(model))
        attentions = [options.mha(number).attention() for number in range(1, model.depth + 1)]
    except ValidationError as error:
        name, expected, value = first_problem(error)
        raise UsageError(f"model.{name}={value}: expected {expected}" if name else f"model: {expected}") from None
    if model.use_xpos and not attentions[0].use_rotary_pos_emb:
        raise UsageError(
            "model.use_xpos=true is for rotary embeddings, which model.use_rotary_pos_emb=false and "
            "model.use_dynamic_pos_bias=true turn off: use one or the other"
        )
    if model.xpos_scale_base is not None and not model.use_xpos:
        raise UsageError(f"model.xpos_scale_base={model.xpos_scale_base} needs model.use_xpos=true")
    for attention in attentions if model.use_xpos else []:
        scale_base = model.xpos_scale_base or max(attention.window_size // 2, 1)
        span = attention.window_size * (attention.look_backward + 1)
        least = span / 110  # the decay over half the span is 3.5 ** 55 = 8e29 then; the library refuses 1e30
        if scale_base < least:
            raise UsageError(
                f"the decay of xPos with the base {scale_base:g} overflows over {span} bytes, a window and those it "
                f"looks back: use model.xpos_scale_base={math.ceil(least)} or more"
            )


def generate_config(config: DictConfig) -> GenerateConfig:
    """Turn what Hydra composed into a checked :class:`GenerateConfig`; raises :class:`UsageError`."""
    generate = parse(GenerateConfig, config)
    require_run_or_file(generate, "sample from")
    if generate.prompt and generate.prompt_file:
        raise UsageError("expected one of prompt and prompt_file, got both")
    if generate.length == 0 and generate.num_samples > 1 and not generate.stop:
        raise UsageError(f"length=0 never ends: expected num_samples=1 with it, got {generate.num_samples}")
    return generate


def evaluate_config(config: DictConfig) -> EvaluateConfig:
    """Turn what Hydra composed into a checked :class:`EvaluateConfig`; raises :class:`UsageError`."""
    evaluate = parse(EvaluateConfig, config)
    require_run_or_file(evaluate, "score")
    require_path(evaluate.data)
    if not evaluate.dynamic:
        if evaluate.dynamic_rate != EvaluateConfig.dynamic_rate:
            raise UsageError(f"dynamic_rate={evaluate.dynamic_rate:g} needs dynamic=true")
        return evaluate
    for key in ("stride", "batch_size"):
        if (value := getattr(evaluate, key)) is not None:
            raise UsageError(f"{key}={value}: dynamic=true learns from one sequence after the other: leave out {key}")
    return replace(evaluate, batch_size=1)


def score_config(config: DictConfig) -> ScoreConfig:
    """Turn what Hydra composed into a checked :class:`ScoreConfig`; raises :class:`UsageError`."""
    score = parse(ScoreConfig, config)
    require_run_or_file(score, "score with")
    if not score.file:
        raise UsageError("expected the text to score: file=FILE, or file=- for standard input")
    return score


def require_run_or_file(config: Any, verb: str) -> None:
    if not config.run and config.checkpoint in ("best", "last"):
        raise UsageError(
            f"expected the run to {verb}, such as run=runs/quickstart/2026-01-31_10-00-00, or checkpoint=FILE"
        )


def require_path(data: OtherDataConfig) -> None:
    if data.source == "file" and not data.path:
        raise UsageError("data=file needs the file: data.path=FILE")


def fill_from_checkpoint(config: EvaluateConfig, meta: Mapping[str, Any]) -> EvaluateConfig:
    """An :class:`EvaluateConfig` without gaps: what ``config`` leaves to the run is as in the checkpoint's metadata.

    With a ``data.source``, ``data`` replaces that of the run. Without one, its keys override those of the run, and
    ``data.path`` alone stands for ``data.source=file``.

    Raises:
        UsageError: where the metadata do not say, and for lengths that the model or each other do not allow.
    """
    model, train = parse(ModelConfig, meta["config"]["model"]), meta["config"].get("train", {})
    for key in ("seq_len", "batch_size"):
        if getattr(config, key) is None and key not in train:
            raise UsageError(f"the checkpoint does not say the {key} of its run: give {key}=NUMBER")
    seq_len = config.seq_len or (not config.dynamic and train.get("eval_seq_len")) or train["seq_len"]
    batch_size = config.batch_size or eval_batch_size(train["batch_size"], train.get("seq_len", seq_len), seq_len)
    if model.use_abs_pos_emb and seq_len > model.max_seq_len:
        raise UsageError(
            f"seq_len={seq_len}: expected at most the model's max_seq_len={model.max_seq_len}, "
            "as its learned positions end there"
        )
    stride = config.stride or seq_len
    if stride > seq_len:
        raise UsageError(f"stride={stride}: expected a number from 1 to seq_len={seq_len}, or bytes would be left out")
    data = {key: value for key, value in as_dict(config.data).items() if value is not None}
    if "source" not in data:
        data = {**data_of_run(meta), **data, **({"source": "file"} if "path" in data else {})}
    if "source" not in data:
        raise UsageError(
            "the checkpoint does not say which bytes it was trained on: name those to score with data=enwik8, "
            "data=stdlib or data=file data.path=FILE"
        )
    return replace(config, seq_len=seq_len, stride=stride, batch_size=batch_size, data=parse(DataConfig, data))


def data_of_run(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the bytes that a checkpoint was trained on, without a fallback; empty if unknown."""
    if "data" not in meta:
        return {}
    data = meta["config"]["data"]
    fell_back = data["fallback"] == meta["data"]["name"]
    return {**data, "source": data["fallback"] if fell_back else data["source"], "fallback": None}
