"""Learning rates over a run, as factors of ``optimizer.lr``."""

import math


def constant(progress, config):
    return 1.0


def cosine(progress, config):
    """Half a cosine from 1 to ``final_fraction`` (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress, config):
    """1, then in the last ``decay_fraction`` a line to ``final_fraction`` (Hu et al. 2024, arXiv 2404.06395)."""
    left = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
    return config.final_fraction + (1 - config.final_fraction) * min(1.0, left)


SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}


def learning_rate(config, peak, step, progress):
    """The rate of one step.

    Args:
        config: a ``ScheduleConfig``.
        peak: ``optimizer.lr``.
        step: steps done before this one; the first ``warmup_steps`` rise in a line to the schedule's value.
        progress: how much of the run is over, 0 … 1, by steps or by minutes, whichever ends it first.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return peak * warmup * SCHEDULES[config.name](min(max(progress, 0.0), 1.0), config)
