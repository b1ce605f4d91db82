"""What goes wrong with Ray, each as one line; the cluster itself is tested in test_kill."""

import importlib.util
import re
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from reptrt.core.errors import ConfigError, MissingDependencyError
from reptrt.sweeping import on_ray
from reptrt.sweeping.on_ray import OnRay
from reptrt.sweeping.tasks import Placement, Task
from tests.support.small_run import refused, write_data, write_factory
from tests.sweeping.sheets import write_sheet

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_factory(tmp_path)
    write_data(tmp_path / "x.npz")
    text = 'data = "x.npz"\n[nets.a]\nsource = "net_of_a_small_run.py:make"\n'
    return write_sheet(tmp_path, text)


class FakeRay:
    """Runs tasks at once; its workers answer what it is told to."""

    exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def __init__(self, answer: Any) -> None:
        self.answer, self.wanted, self.given = answer, [], {}  # type: ignore[var-annotated]

    def init(self, **given: Any) -> None:
        self.given = given

    def shutdown(self) -> None:
        self.given = {}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, **_: Any) -> Any:
        def options(**wanted: Any) -> Any:
            self.wanted.append(wanted)
            return types.SimpleNamespace(remote=lambda *arguments: object())

        return lambda function: types.SimpleNamespace(options=options)

    def wait(self, references: list[Any], num_returns: int) -> Any:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def faked(monkeypatch: pytest.MonkeyPatch, answer: Any) -> FakeRay:
    ray = FakeRay(answer)
    monkeypatch.setattr(on_ray, "_ray", lambda address: ray)
    return ray


def sound() -> dict[str, Any]:
    return {"result": on_ray.package_versions().get("reptrt")}


def test_without_ray_one_line_says_what_to_install(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused("sweep", file, "-o", tmp_path / "out", "--ray", "local")
    assert re.match(r"error: --ray: ray is not installed .*pip install 'reptrt\[ray\]'", line)


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(file: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    line = refused("sweep", file, "-o", tmp_path / "out", "--ray", address)
    assert f"error: --ray {address}: there is no Ray cluster (" in line
    assert line.endswith("start one with ray start --head, or give --ray local")
    line = refused("sweep", file, "-o", tmp_path / "out", "--ray", "somewhere")
    assert "--ray somewhere: expected host:port, ray://host:port, auto or local" in line


def test_a_worker_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that is sent as code says so where the package is missing."""
    monkeypatch.setitem(sys.modules, "reptrt.sweeping.worker", None)
    answer = on_ray._remote()("reptrt.sweeping.work:version", {}, 1)
    assert "reptrt" in answer["failure"]
    ray = faked(monkeypatch, answer)
    with pytest.raises(
        MissingDependencyError, match=r"a worker cannot run reptrt .*install reptrt"
    ):
        OnRay("local", 2, 1)
    assert ray.given == {}  # it has left the cluster


def test_another_version_on_a_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, {"result": "0.0.1"})
    with pytest.raises(ConfigError, match=r"a worker has reptrt 0\.0\.1, this is .* install the"):
        OnRay("local", 2, 1)


def test_a_local_cluster_joins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = faked(monkeypatch, sound())
    OnRay("local", 2, 1)
    assert (ray.given["address"], ray.given["num_cpus"]) == ("local", 2)


@pytest.mark.parametrize(("address", "mode"), [("local", "token"), ("127.0.0.1:1", None)])
def test_the_token_is_asked_for_before_ray_is_imported(
    address: str, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray").mkdir()
    text = "import os\nmode = os.environ.get('RAY_AUTH_MODE')\n"
    (tmp_path / "ray" / "__init__.py").write_text(text)
    (tmp_path / "ray" / "exceptions.py").touch()
    for name in [n for n in sys.modules if n.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # restored after the test
    monkeypatch.delenv("RAY_AUTH_MODE")
    try:
        assert on_ray._ray(address).mode == mode
    finally:
        for name in ("ray", "ray.exceptions"):
            sys.modules.pop(name, None)


def test_placements_become_resources_and_what_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray = faked(monkeypatch, sound())
    executor = OnRay("local", 2, 1)
    placement = Placement(2, 1, 8, "A100", {"fast_disk": 1})
    assert executor.slots(placement) == executor.slots(placement) == 8
    executor.start(Task("a", "", {}, placement))
    assert ray.wanted[-1] == {
        "num_cpus": 2,
        "num_gpus": 1,
        "memory": 8 * 2**30,
        "accelerator_type": "A100",
        "resources": {"fast_disk": 1},
    }
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "no machine of the Ray cluster has CPU 2, GPU 1, fast_disk 1" in warning


def test_a_worker_that_dies_is_no_failure_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = faked(monkeypatch, sound())
    executor = OnRay("local", 2, 1)
    ray.answer = ray.exceptions.RayError("\nThe worker died.\nMore lines.")
    executor.start(Task("a", "", {}))
    outcome = executor.wait()
    assert (outcome.death, outcome.failure) == ("The worker died.", None)
