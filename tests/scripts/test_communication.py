import pytest

from scripts.communication import CLUSTERS, Cluster, Step, main, seconds
from tests.e2e.conftest import ROOT

STEP = Step(flops=6e9, gradients=80_000_000, parameters=10, rows=1_000_000)
MACHINES = Cluster("machines", flops=2e9, inside=None, network=1e8, latency=1e-3, fused=False)
SERVERS = Cluster("servers", flops=2e9, inside=1e10, network=1e8, latency=1e-3, fused=True)


@pytest.mark.parametrize("cluster", [MACHINES, SERVERS, *CLUSTERS])
def test_one_worker_only_computes(cluster):
    computing, communicating = seconds(STEP, cluster, 1)
    assert computing == STEP.flops / cluster.flops
    assert communicating == 0


def test_machines_send_gradients_and_rows_around_a_ring():
    # Twice three quarters of 80 MB, the rows of three others, and six messages for each of ten parameters.
    assert seconds(STEP, MACHINES, 4)[1] == pytest.approx(2 * 0.75 * 0.8 + 3 * 0.01 + 6 * 10 * 1e-3)


def test_workers_of_a_server_communicate_first():
    inside = 2 * 7 / 8 * 0.008 + 15 * 0.0001 + 14 * 1e-3
    between = 2 * 1 / 2 * 0.8 + 8 * 0.01 + 2 * 1e-3
    assert seconds(STEP, SERVERS, 16)[1] == pytest.approx(inside + between)


def test_the_table_is_that_in_the_documentation(capsys):
    main([])
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    # `enwik8_base` has 21,243,904 parameters.
    assert "| `experiment=enwik8_base` | 85.0 MB |" in printed


def test_a_custom_recipe(capsys):
    main(["model=tiny", "train.batch_size=2"])
    assert capsys.readouterr().out.count("model=tiny train.batch_size=2") == len(CLUSTERS)
