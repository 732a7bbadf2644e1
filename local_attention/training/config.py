"""The typed configuration of a run, and all its checks, before anything is compiled."""

import difflib
import math
import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from local_attention.training.errors import UsageError


@dataclass
class DataConfig:
    """Which bytes: see ``data.load``."""

    source: str = "enwik8"
    path: str | None = None
    dir: str | None = None
    fallback: str | None = None
    max_bytes: int | None = None


@dataclass
class ModelConfig:
    """Keyword arguments of ``LocalTransformer``."""

    num_tokens: int = 256
    max_seq_len: int = 1024
    dim: int = 512
    depth: int = 6
    heads: int = 8
    dim_head: int = 64
    ff_mult: float = 4.0
    num_residual_streams: int = 1
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    local_attn_window_size: int = 256
    look_backward: int = 1
    exact_windowsize: bool = True
    use_abs_pos_emb: bool = True
    use_rotary_pos_emb: bool = True
    use_xpos: bool = False
    xpos_scale_base: float | None = None
    use_dynamic_pos_bias: bool = False
    scale: float | None = None
    qk_rmsnorm: bool = False
    qk_scale: float = 8.0
    shared_qk: bool = False
    gate_values_per_head: bool = False
    max_ngram: int = 1
    ngram_buckets: int = 65521
    ngram_dim: int = 48


@dataclass
class OptimizerConfig:
    """See ``training.optimizer``."""

    name: str = "adam"
    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    ngram_lr: float = 0.1
    muon_lr: float = 0.02
    momentum: float = 0.95


@dataclass
class ScheduleConfig:
    """See ``training.schedule``."""

    name: str = "constant"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0


@dataclass
class TrainConfig:
    """Sizes, length and events of a run; the events in optimizer steps."""

    seq_len: int = 1024
    batch_size: int = 4
    grad_accum_every: int = 1
    max_steps: int | None = 1000
    max_minutes: float | None = None
    clip_norm: float = 0.5
    max_bad_steps: int = 10
    log_every: int = 10
    eval_every: int = 100
    eval_bytes: int = 100_000
    checkpoint_every: int = 100
    keep_last: int = 2
    generate_every: int = 500
    generate_length: int = 256
    profile: bool = False


@dataclass
class DeviceConfig:
    """Where MindSpore runs: auto, CPU, GPU or Ascend."""

    target: str = "auto"


@dataclass
class RunConfig:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: str = "none"
    run_dir: str | None = None
    resume: str | None = "auto"
    seed: int = 0


@dataclass
class GenerateConfig:
    """What ``generate.py`` samples."""

    run: str | None = None
    checkpoint: str = "best"
    prompt: str = ""
    prompt_file: str | None = None
    length: int = 1024
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    num_samples: int = 1
    seed: int = 0
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class OtherDataConfig(DataConfig):
    """Which bytes to score instead of the run's: see :func:`fill_from_checkpoint`."""

    source: str | None = None


@dataclass
class EvaluateConfig:
    """What ``scripts/evaluate.py`` scores. None for a size or in ``data``: as in the run; for ``stride``: seq_len."""

    run: str | None = None
    checkpoint: str = "best"
    split: str = "test"
    seq_len: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    data: OtherDataConfig = field(default_factory=OtherDataConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class ScoreConfig:
    """What ``scripts/score.py`` scores."""

    run: str | None = None
    checkpoint: str = "best"
    file: str | None = None
    device: DeviceConfig = field(default_factory=DeviceConfig)


# key -> what is allowed there, and how to say it. A value of None is allowed where its type says so, and not checked.
POSITIVE = (lambda value: value > 0, "a number above 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
FRACTION = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_1 = (lambda value: 0 <= value < 1, "a number from 0 to below 1")


def one_of(*names):
    return (lambda value: value in names), "one of " + ", ".join(names)


def between(low, high):
    return (lambda value: low <= value <= high), f"a number from {low} to {high}"


DATA_RANGES = {
    "data.source": one_of("enwik8", "stdlib", "file"),
    "data.fallback": one_of("stdlib"),
    "data.max_bytes": POSITIVE,
}
DEVICE_RANGES = {"device.target": one_of("auto", "CPU", "GPU", "Ascend")}
MODEL_RANGES = {
    "model.num_tokens": (lambda value: value >= 256, "256 or more, as tokens are bytes"),
    **{f"model.{key}": POSITIVE for key in ("max_seq_len", "dim", "depth", "heads", "dim_head")},
    "model.ff_mult": (lambda value: value >= 1, "1 or more"),
    "model.num_residual_streams": POSITIVE,
    "model.attn_dropout": BELOW_1,
    "model.ff_dropout": BELOW_1,
    "model.local_attn_window_size": POSITIVE,
    "model.look_backward": NOT_NEGATIVE,
    **{f"model.{key}": POSITIVE for key in ("xpos_scale_base", "scale", "qk_scale", "max_ngram", "ngram_dim")},
    "model.ngram_buckets": between(2, 2**18),
}
RUN_RANGES = {  # train first, as model.max_seq_len follows train.seq_len
    **{f"train.{key}": POSITIVE for key in ("seq_len", "batch_size", "grad_accum_every", "max_steps", "max_minutes")},
    **{
        f"train.{key}": POSITIVE
        for key in ("clip_norm", "max_bad_steps", "log_every", "eval_every", "eval_bytes", "checkpoint_every")
    },
    **{f"train.{key}": POSITIVE for key in ("keep_last", "generate_every", "generate_length")},
    **DATA_RANGES,
    **MODEL_RANGES,
    "optimizer.name": one_of("adam", "adamw", "muon"),
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": BELOW_1,
    "optimizer.beta2": BELOW_1,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.ngram_lr": POSITIVE,
    "optimizer.muon_lr": POSITIVE,
    "optimizer.momentum": BELOW_1,
    "schedule.name": one_of("constant", "cosine", "wsd"),
    "schedule.warmup_steps": NOT_NEGATIVE,
    "schedule.decay_fraction": FRACTION,
    "schedule.final_fraction": FRACTION,
    **DEVICE_RANGES,
    "parallel": one_of("none", "data"),
    "seed": between(0, 2**32 - 1),
}
GENERATE_RANGES = {
    "length": NOT_NEGATIVE,
    "temperature": NOT_NEGATIVE,
    "top_k": POSITIVE,
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "num_samples": POSITIVE,
    "seed": between(0, 2**32 - 1),
    **DEVICE_RANGES,
}
EVALUATE_RANGES = {
    "split": one_of("train", "val", "test"),
    **{key: POSITIVE for key in ("seq_len", "stride", "batch_size")},
    **DATA_RANGES,
    **DEVICE_RANGES,
}


def run_config(config):
    """Turn what Hydra composed into a checked :class:`RunConfig`.

    Raises:
        UsageError: for an unknown key, a wrong type, a value out of range, values that do not go together.
    """
    run = parse(RunConfig, config)
    check_ranges(run, RUN_RANGES)
    model, train = run.model, run.train
    if train.max_steps is None and train.max_minutes is None:
        raise UsageError("expected train.max_steps or train.max_minutes, got null for both: the run would never end")
    if train.seq_len % model.local_attn_window_size:
        raise UsageError(
            f"train.seq_len={train.seq_len} is not a multiple of model.local_attn_window_size="
            f"{model.local_attn_window_size}: change one of them"
        )
    check_model(model)
    if model.use_abs_pos_emb and model.max_seq_len < train.seq_len:
        raise UsageError(
            f"model.max_seq_len={model.max_seq_len} is shorter than train.seq_len={train.seq_len}: "
            "raise it, or use model.use_abs_pos_emb=false"
        )
    require_path(run.data)
    return run


def check_model(model):
    """Raise :class:`UsageError` for options of a ``ModelConfig`` that do not go together."""
    rotary = model.use_rotary_pos_emb and not model.use_dynamic_pos_bias
    if rotary and model.dim_head % 2:
        raise UsageError(
            f"model.dim_head={model.dim_head} is odd, but rotary embeddings turn pairs of channels: "
            "use an even one, or model.use_rotary_pos_emb=false"
        )
    if model.use_xpos and not rotary:
        raise UsageError(
            "model.use_xpos=true is for rotary embeddings, which model.use_rotary_pos_emb=false and "
            "model.use_dynamic_pos_bias=true turn off: use one or the other"
        )
    if model.xpos_scale_base is not None and not model.use_xpos:
        raise UsageError(f"model.xpos_scale_base={model.xpos_scale_base} needs model.use_xpos=true")
    if model.use_xpos:
        scale_base = model.xpos_scale_base or max(model.local_attn_window_size // 2, 1)
        span = model.local_attn_window_size * (model.look_backward + 1)
        least = span / 110  # the decay over half the span is 3.5 ** 55 = 8e29 then; the library refuses 1e30
        if scale_base < least:
            raise UsageError(
                f"the decay of xPos with the base {scale_base:g} overflows over {span} bytes, a window and those it "
                f"looks back: use model.xpos_scale_base={math.ceil(least)} or more"
            )
    if model.scale is not None and model.qk_rmsnorm:
        raise UsageError(
            f"model.scale={model.scale} with model.qk_rmsnorm=true: expected model.qk_scale, which is the factor then"
        )


def generate_config(config):
    """Turn what Hydra composed into a checked :class:`GenerateConfig`; raises :class:`UsageError`."""
    generate = parse(GenerateConfig, config)
    check_ranges(generate, GENERATE_RANGES)
    if not generate.run:
        raise UsageError("expected the run to sample from, such as run=runs/quickstart/2026-01-31_10-00-00")
    if generate.prompt and generate.prompt_file:
        raise UsageError("expected one of prompt and prompt_file, got both")
    if generate.length == 0 and generate.num_samples > 1:
        raise UsageError(f"length=0 never ends: expected num_samples=1 with it, got {generate.num_samples}")
    return generate


def evaluate_config(config):
    """Turn what Hydra composed into a checked :class:`EvaluateConfig`; raises :class:`UsageError`."""
    evaluate = parse(EvaluateConfig, config)
    check_ranges(evaluate, EVALUATE_RANGES)
    require_run_or_file(evaluate, "score")
    require_path(evaluate.data)
    return evaluate


def score_config(config):
    """Turn what Hydra composed into a checked :class:`ScoreConfig`; raises :class:`UsageError`."""
    score = parse(ScoreConfig, config)
    check_ranges(score, DEVICE_RANGES)
    require_run_or_file(score, "score with")
    if not score.file:
        raise UsageError("expected the text to score: file=FILE, or file=- for standard input")
    return score


def require_run_or_file(config, verb):
    if not config.run and config.checkpoint in ("best", "last"):
        raise UsageError(
            f"expected the run to {verb}, such as run=runs/quickstart/2026-01-31_10-00-00, or checkpoint=FILE"
        )


def require_path(data):
    if data.source == "file" and not data.path:
        raise UsageError("data=file needs the file: data.path=FILE")


def fill_from_checkpoint(config, meta):
    """An :class:`EvaluateConfig` without gaps: what ``config`` leaves to the run is as in the checkpoint's metadata.

    A ``data.source`` names other data, the rest of ``data`` with it. Without one, ``data`` holds changes to the data of
    the run, and a ``data.path`` is that of a file.

    Raises:
        UsageError: where the metadata do not say, and for lengths that the model or each other do not allow.
    """
    model, train = parse(ModelConfig, meta["config"]["model"]), meta["config"].get("train", {})
    for key in ("seq_len", "batch_size"):
        if getattr(config, key) is None and key not in train:
            raise UsageError(f"the checkpoint does not say the {key} of its run: give {key}=NUMBER")
    seq_len, batch_size = config.seq_len or train["seq_len"], config.batch_size or train["batch_size"]
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


def data_of_run(meta):
    """The settings of the bytes that a checkpoint was trained on, nothing else in their place; empty if unknown."""
    if "data" not in meta:
        return {}
    data = meta["config"]["data"]
    fell_back = data["fallback"] == meta["data"]["name"]
    return {**data, "source": data["fallback"] if fell_back else data["source"], "fallback": None}


def parse(schema, config):
    """An instance of the dataclass ``schema``, its values taken from ``config``, a mapping or an OmegaConf node."""
    for name, annotation in typing.get_type_hints(schema).items():
        if is_dataclass(annotation) and not isinstance(config.get(name, {}), dict | DictConfig):
            raise UsageError(f"{name}={config[name]}: expected {name}.KEY=VALUE")
    for key in OmegaConf.missing_keys(config) if OmegaConf.is_config(config) else ():
        raise UsageError(f"{key}=???: expected a value, and ??? stands for none")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise UsageError(unknown_key(error.full_key, schema)) from None
    except OmegaConfBaseException as error:
        key = error.full_key or "the config"
        expected = describe(type_at(schema, key))
        reason = str(error).splitlines()[0]
        raise UsageError(f"{key}: expected {expected}. {reason}" if expected else f"{key}: {reason}") from None


def unknown_key(key, schema):
    """What to say of a ``key`` that the dataclass ``schema`` does not have."""
    groups = [name for name, annotation in typing.get_type_hints(schema).items() if is_dataclass(annotation)]
    known = keys_of(schema) + groups
    similar = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    return f"{key}: no such key" + (f"; did you mean {similar[0]}?" if similar else "; --help lists them")


def keys_of(schema, prefix=""):
    """The dotted keys of a tree of dataclasses."""
    keys = []
    for name, annotation in typing.get_type_hints(schema).items():
        keys += keys_of(annotation, f"{prefix}{name}.") if is_dataclass(annotation) else [prefix + name]
    return keys


def type_at(schema, key):
    """The annotation of the dotted ``key`` in a tree of dataclasses; None where there is no such key."""
    for part in key.split("."):
        hints = typing.get_type_hints(schema) if is_dataclass(schema) else {}
        schema = hints.get(part)
    return schema


def describe(annotation):
    """``int | None`` as "an int or null"; nothing for what is no plain value."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    options = typing.get_args(annotation) or (annotation,)
    return " or ".join(names[option] for option in options) if all(option in names for option in options) else ""


def check_ranges(config, ranges):
    """Raise :class:`UsageError` for the first value of ``config`` that its entry of ``ranges`` does not allow."""
    for key, (allowed, expected) in ranges.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        if (isinstance(value, float) and not math.isfinite(value)) or not allowed(value):
            raise UsageError(f"{key}={value}: expected {expected}")


def as_dict(config):
    """A dataclass tree as plain dictionaries."""
    return {f.name: as_dict(v) if is_dataclass(v := getattr(config, f.name)) else v for f in fields(config)}


def flat(tree, prefix=""):
    """``{"a": {"b": 1}} -> {"a.b": 1}``."""
    result = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
