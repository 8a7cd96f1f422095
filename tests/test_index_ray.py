"""Oracle: the index that one process makes of the same data; Ray is a real local one with two workers."""

from __future__ import annotations

import os
import signal

import pytest

ray = pytest.importorskip("ray", reason="engine ray needs the extra [ray]")
pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from onnxcrp.errors import InputError, OnnxcrpError  # noqa: E402
from onnxcrp.index import build  # noqa: E402
from onnxcrp.index.on_ray import share  # noqa: E402
from tests.support import indexes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray itself
SMALL = {"k": 6, "batch_size": 4, "block": 8, "workers": 1}


@pytest.fixture(scope="module")
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return indexes.model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def whole(net, tmp_path_factory):
    return build(net, indexes.data(200), tmp_path_factory.mktemp("whole") / "index", **SMALL)


def test_two_workers_survive_a_death_and_make_the_same_index(local_ray, net, whole, tmp_path):
    seen, killed = [], []

    def progress(done, total, skipped):
        seen.append(done)
        if not killed:  # the first task is done, so workers are at their next ones
            killed.append(kill_one_worker(tmp_path / "i" / "parts"))

    index = build(net, indexes.data(200), tmp_path / "i", engine="ray", progress=progress, **SMALL)
    assert killed[0]
    assert seen[-1] == 200
    assert indexes.tables(index) == indexes.tables(whole)
    assert sorted(p.name for p in index.path.iterdir() if p.suffix not in (".parquet", ".json")) == [".lock"]


def kill_one_worker(parts) -> int:
    """SIGKILL to the actor's process that wrote a part; its id."""
    process = next(int(p.name.split("-")[1]) for p in sorted(parts.iterdir()) if p.name.startswith("ray-"))
    os.kill(process, signal.SIGKILL)
    return process


def test_a_build_that_was_stopped_goes_on_with_ray(local_ray, net, whole, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, skipped):
        if done > 100:
            raise Stop

    with pytest.raises(Stop):
        build(net, indexes.data(200), tmp_path / "i", progress=stop, checkpoint=0, **SMALL)
    seen = []
    index = build(
        net, indexes.data(200), tmp_path / "i", engine="ray", actors=1, progress=lambda *c: seen.append(c), **SMALL
    )
    assert seen[0][0] > 100
    assert indexes.tables(index) == indexes.tables(whole)


@pytest.mark.parametrize(
    ("asked", "gpus", "cpus", "threads", "count", "reserves"),
    [
        (None, 0, 8, 1, 8, {"num_cpus": 1}),
        (None, 0, 8, 4, 2, {"num_cpus": 4}),
        (None, 0, 2, 4, 1, {"num_cpus": 2}),
        (3, 0, 8, 4, 3, {"num_cpus": 2}),
        (3, 0, 2, 1, 3, {"num_cpus": 0.6666}),
        (None, 4, 64, 1, 4, {"num_gpus": 1}),
        (8, 4, 64, 1, 8, {"num_gpus": 0.5}),
    ],
)
def test_actors_reserve_what_there_is(asked, gpus, cpus, threads, count, reserves):
    assert share(asked, gpus, cpus, threads) == (count, reserves)


def test_more_actors_than_cores_share_them(local_ray, net, whole, tmp_path):
    index = build(net, indexes.data(200), tmp_path / "i", engine="ray", actors=3, **SMALL)  # of 2 cores
    assert indexes.tables(index) == indexes.tables(whole)


def test_errors_of_workers_come_as_they_are(local_ray, net, tmp_path):
    with pytest.raises((InputError, OnnxcrpError), match="no such dataset"):
        build(net, str(tmp_path / "nowhere"), tmp_path / "i", engine="ray", **SMALL)
