import numpy as np
import pytest

from local_attention.training.config import ScheduleConfig
from local_attention.training.schedule import learning_rate


def rate(progress, step=10**6, peak=2.0, **options):
    return learning_rate(ScheduleConfig(**options), peak, step, progress)


@pytest.mark.parametrize("progress", [0, 0.3, 1])
def test_constant_stays_at_the_peak(progress):
    assert rate(progress, name="constant", final_fraction=0.3, decay_fraction=0.5) == 2.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_falls_from_the_peak_to_final_fraction_of_it(final):
    rates = [rate(progress, name="cosine", final_fraction=final) for progress in (0, 1 / 3, 0.5, 1)]
    assert rates == pytest.approx([2.0, 2 * (final + (1 - final) * 0.75), 1 + final, 2 * final])


@pytest.mark.parametrize("final", [0.0, 0.25])
@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
def test_wsd_falls_in_a_line_in_the_last_decay_fraction_of_the_run(decay, final):
    options = dict(name="wsd", decay_fraction=decay, final_fraction=final)
    rates = [rate(progress, **options) for progress in (0, 1 - decay, 1 - decay / 2, 1 - decay / 4, 1)]
    assert rates == pytest.approx([2.0, 2.0, 1 + final, 2 * (final + (1 - final) / 4), 2 * final])


def test_wsd_without_decay_is_constant_to_the_end():
    assert rate(1.0, name="wsd", decay_fraction=0.0, final_fraction=0.0) == 2.0


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_the_first_warmup_steps_rise_in_a_line_to_the_value_of_the_schedule(name):
    rates = [rate(0.0, step, name=name, warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    late = [rate(0.9, step, name=name, warmup_steps=4) for step in (1, 100)]
    assert late[0] == pytest.approx(late[1] / 2)


def test_the_first_step_moves_even_while_warming_up():
    assert rate(0.0, 0, warmup_steps=1000) > 0


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_progress_outside_0_to_1_counts_as_the_nearer_end(name):
    options = dict(name=name, final_fraction=0.1, decay_fraction=0.3)
    assert rate(-0.5, **options) == rate(0.0, **options)
    assert rate(1.5, **options) == rate(1.0, **options)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_a_rate_is_a_share_of_the_peak(name):
    for progress in np.linspace(0, 1, 7):
        assert rate(progress, peak=3e-4, name=name) == pytest.approx(1.5e-4 * rate(progress, name=name))
