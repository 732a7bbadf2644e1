"""Learning-rate schedules: the factor of ``optimizer.lr`` as a function of the progress of the run, 0 … 1."""

import math

from local_attention.training.config import ScheduleConfig


def constant(progress: float, config: ScheduleConfig) -> float:
    return 1.0


def cosine(progress: float, config: ScheduleConfig) -> float:
    """Half a cosine from 1 to ``final_fraction`` (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, config: ScheduleConfig) -> float:
    """1, then linear decay to ``final_fraction`` in the last ``decay_fraction`` (Hu et al. 2024, arXiv 2404.06395)."""
    left = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
    return config.final_fraction + (1 - config.final_fraction) * min(1.0, left)


SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}


def learning_rate(config: ScheduleConfig, peak: float, step: int, progress: float) -> float:
    """Return the learning rate of one step.

    Args:
        config: the schedule.
        peak: ``optimizer.lr``.
        step: number of steps before this one. During the first ``warmup_steps``, the rate rises linearly to the value
            of the schedule.
        progress: the fraction of the run that is done, 0 … 1; see :attr:`RunState.progress`.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return peak * warmup * SCHEDULES[config.name](min(max(progress, 0.0), 1.0), config)
