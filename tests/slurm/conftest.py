"""What tests on a real Slurm share: the marker `slurm` and the fixture `cluster`.

A test that takes `cluster` runs under the cluster's shared lock, with SLURM_CONF set, and is
skipped with a reason where there can be no Slurm.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_no_cluster


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs a real Slurm (slurm/dev-cluster.sh)")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The one development cluster of all workers."""
    if reason := why_no_cluster():
        pytest.skip(reason)
    cluster = Cluster()
    with cluster.in_use():
        yield cluster


@pytest.fixture(autouse=True)
def on_the_cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A test's turn on the cluster, if it uses it."""
    if "cluster" not in request.fixturenames:
        yield
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    monkeypatch.setenv("SLURM_CONF", str(cluster.slurm_conf))
    with cluster.shared():
        yield
