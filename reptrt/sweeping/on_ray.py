"""Tasks on a Ray cluster; the only file that imports ray."""

import contextlib
import logging
import os
import socket
import sys
from typing import Any

from reptrt.core.artifacts import package_versions
from reptrt.core.errors import ConfigError, MissingDependencyError, option
from reptrt.execute.runner import usable_cores
from reptrt.sweeping.local import thread_variables
from reptrt.sweeping.tasks import Outcome, Placement, Task

_LOG = logging.getLogger(__name__)

_QUEUED = 4  # tasks that wait in the cluster, for each of its cores
_SECONDS = 5.0  # to reach the cluster


class OnRay:
    """Tasks as Ray's, placed by their resources.

    Args:
        address: of the cluster, or "local" for one that ends with this object.
        workers: CPU cores of a local cluster; None: all.
        threads: CPU threads of a task.

    Raises:
        MissingDependencyError: ray is not installed here, or reptrt is not on a worker.
        ConfigError: there is no cluster at the address, or another version of reptrt on a worker.
    """

    def __init__(self, address: str, workers: int | None, threads: int) -> None:
        self._ray = _ray(address)
        self._address, self._threads = address, threads
        self._started: dict[Any, Task] = {}
        self._warned: set[str] = set()
        _connect(self._ray, address, workers)
        variables = thread_variables(threads)
        self._call = self._ray.remote(max_retries=0, runtime_env={"env_vars": variables})(_remote())
        try:
            self._check_package()
        except BaseException:
            self.close()
            raise

    def slots(self, placement: Placement) -> int:
        """Return the tasks that the cluster can run at a time, and some that wait there."""
        self._warn_of(placement)
        cpus = self._ray.cluster_resources().get("CPU", 1.0)
        return int(max(4, _QUEUED * cpus))

    def start(self, task: Task) -> None:
        """Hand a task to the cluster."""
        arguments = (task.work, dict(task.payload), self._threads)
        self._started[self._call.options(**_wanted(task.placement)).remote(*arguments)] = task

    def wait(self) -> Outcome:
        """Return what came of a task."""
        (reference,), _ = self._ray.wait(list(self._started), num_returns=1)
        task = self._started.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as err:
            return Outcome(task, death=_first_line(err))
        return Outcome(task, result=answer.get("result"), failure=answer.get("failure"))

    def close(self) -> None:
        """Stop what runs, and leave the cluster."""
        for reference in self._started:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._started.clear()
        self._ray.shutdown()

    def _check_package(self) -> None:
        """Refuse a cluster whose workers cannot work."""
        version = package_versions().get("reptrt")
        task = Task("worker", "reptrt.sweeping.work:version", {})
        self.start(task)
        outcome = self.wait()
        if outcome.death is not None or outcome.failure is not None:
            raise MissingDependencyError(
                f"{option('ray')} {self._address}: a worker cannot run reptrt "
                f"({outcome.failure or outcome.death}); install reptrt {version} on "
                "every machine of the cluster"
            )
        if outcome.result != version:
            raise ConfigError(
                f"{option('ray')} {self._address}: a worker has reptrt {outcome.result}, this is "
                f"{version}; install the same on every machine of the cluster"
            )

    def _warn_of(self, placement: Placement) -> None:
        """Warn once of what no machine of the cluster has now; a cluster may grow."""
        if placement.key in self._warned:
            return
        self._warned.add(placement.key)
        needed = _needed(placement)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0.0) >= v for k, v in needed.items()) for node in nodes):
            wanted = ", ".join(f"{name} {amount:g}" for name, amount in needed.items() if amount)
            _LOG.warning(
                "sweep: no machine of the Ray cluster has %s now; tasks that ask for it wait until "
                "there is one",
                wanted,
            )


def _ray(address: str) -> Any:
    """Return the package.

    Ray listens on all interfaces of the machine, so only who has its token may use a cluster that
    is started here. Ray reads the variable when it is imported: set later, it would hold for the
    servers and not for this process, which they would then refuse.
    """
    if address == "local" and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
        import ray.exceptions
    except ImportError as err:
        raise MissingDependencyError(
            f"{option('ray')}: ray is not installed ({err}); pip install 'reptrt[ray]'"
        ) from err
    return ray


def _connect(ray: Any, address: str, workers: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own next default
    if address == "local":
        # Without an address, Ray would join a cluster that happens to run on this machine.
        cores = workers or usable_cores()
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    _refuse_unreachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as err:
        if address == "auto":
            raise _unreachable(address, _first_line(err)) from err
        raise ConfigError(
            f"{option('ray')} {address}: something answers there and does not let this machine in "
            f"({_first_line(err)}); it has to be a Ray cluster of the same version of ray, with "
            "its token here too, if it has one (RAY_AUTH_TOKEN)"
        ) from err


def _refuse_unreachable(address: str) -> None:
    """Ask the port itself first: Ray tries for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        if address != "auto":
            raise ConfigError(
                f"{option('ray')} {address}: expected host:port, ray://host:port, auto or local"
            )
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as err:
        raise _unreachable(address, str(err)) from err


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"{option('ray')} {address}: there is no Ray cluster ({why}); start one with ray start "
        f"--head, or give {option('ray', 'local')}"
    )


def _remote() -> Any:
    """Return the function that a worker runs.

    It is local to this one, so that Ray sends it as code: a worker without reptrt can then say so.
    """

    def call_in_worker(work: str, payload: Any, threads: int) -> Any:
        try:
            from reptrt.sweeping.worker import call
        except ImportError as err:
            import socket

            return {"failure": f"on {socket.gethostname()}: {err}"}
        return call(work, payload, threads)

    return call_in_worker


def _needed(placement: Placement) -> dict[str, float]:
    """Return what a machine has to have, by Ray's names."""
    needed = {"CPU": placement.cpus, "GPU": placement.gpus, **placement.resources}
    if placement.memory_gib:
        needed["memory"] = placement.memory_gib * 2**30
    if placement.accelerator_type is not None:
        needed[f"accelerator_type:{placement.accelerator_type}"] = 0.001
    return needed


def _wanted(placement: Placement) -> dict[str, Any]:
    """Return the options of a Ray task."""
    wanted: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    if placement.resources:
        wanted["resources"] = dict(placement.resources)
    if placement.memory_gib:
        wanted["memory"] = placement.memory_gib * 2**30
    if placement.accelerator_type is not None:
        wanted["accelerator_type"] = placement.accelerator_type
    return wanted


def _first_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__
