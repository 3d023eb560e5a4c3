"""A Ray cluster with faked GPUs in a process of its own: what forks drivers must not hold Ray's threads itself.

Reads one word a line from its input: ``add`` starts a second node and prints the process id of its raylet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class ClusterProcess:
    """The cluster as the tests use it."""

    def __init__(self) -> None:
        project = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(project), "RAY_worker_niceness": "0"},
        )
        self.address = self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("> "):
                return line[2:].strip()
        raise AssertionError("the cluster's process ended")

    def add_node(self) -> int:
        """Start a second node; returns the process id of its raylet."""
        assert self.process.stdin is not None
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        return int(self._read())

    def shutdown(self) -> None:
        """End the cluster; what does not go by itself is killed, with all that it started. Never raises."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)


def main() -> None:
    from ray.cluster_utils import Cluster

    # A folder of its own, because in the usual one every ray.init on this machine would find this cluster; a short path,
    # because sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        _serve(
            Cluster(
                initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}
            )
        )


def _serve(cluster: Any) -> None:
    print(f"> {cluster.address}", flush=True)
    for _line in sys.stdin:
        node = cluster.add_node(num_cpus=1, num_gpus=2)
        print(f"> {node.all_processes['raylet'][0].process.pid}", flush=True)
    for node in cluster.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    main()
