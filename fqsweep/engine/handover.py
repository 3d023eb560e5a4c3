"""A sweep that outlives the terminal that asked for it: on the head of a Ray cluster it becomes a Ray job.

``ray submit CLUSTER.yaml fqsweep/main.py`` copies ``main.py`` alone to the head's home and kills what it started
when the client goes. So that copy hands its arguments over and follows the job's log; the job runs

    python -m fqsweep.engine.handover run SPACE --address auto ...

which gathers the workers that the cluster's YAML allows, runs the sweep, and gives the workers back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fqsweep.errors import EXIT_INTERRUPTED, EXIT_OK, InputError

# Where a job runs: relative paths, and so `out/<name of the space>`, lie there. Every node must see it.
WORK_DIR_VARIABLE = "FQSWEEP_WORK_DIR"
METADATA_KEY = "fqsweep"
GIVE_BACK = "--give-back-workers"  # in place of the words of a sweep
GATHER_S = 900.0
LOOK_S = 5.0


def is_submitted_copy(script: Path) -> bool:
    """Whether ``script`` is the copy that ``ray submit`` made on the head of a cluster that ``ray up`` started."""
    return script.resolve() == Path.home().resolve() / "main.py" and _cluster_file().exists()


def _cluster_file() -> Path:
    """What ``ray up`` leaves on the head: the YAML with every default and resource filled in."""
    return Path.home() / "ray_bootstrap_config.yaml"


# --- on the head, as the child of the client's session -------------------------------------------


def hand_over(arguments: Sequence[str]) -> int:
    """Give a ``run`` to Ray as a job, or find the job that does it already, and follow its log.

    Args:
        arguments: the words after the program's name, ``["run", "paper"]``.

    Returns:
        the exit code of the sweep; 130 where the person left before its end.

    Raises:
        InputError: no Ray runs here, or the shared folder is missing.
    """
    work_dir = _work_dir()
    client = _job_client()
    words = with_address(arguments)
    title = shlex.join(words)
    job = _find_running(client, title)
    if job is None:
        job = client.submit_job(entrypoint=job_command(work_dir, words), metadata={METADATA_KEY: title})
        print(f"handed over to Ray as job {job}: it goes on when this terminal leaves")
    else:
        print(f"this sweep runs already, as job {job}")
    print("to come back: the same `ray submit` again, which follows the running job")
    print(f"to stop it:   ray exec CLUSTER.yaml 'ray job stop {job}'   (what is finished is kept)", flush=True)
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nleft; job {job} goes on")
        return EXIT_INTERRUPTED
    return _exit_code(client, job)


def with_address(arguments: Sequence[str]) -> list[str]:
    """The words, and the cluster's address where they name none."""
    has_one = any(word.split("=")[0] == "--address" for word in arguments)
    return [*arguments, *(() if has_one else ("--address", "auto"))]


def job_command(work_dir: Path, words: Sequence[str]) -> str:
    """What the job runs, for a shell: the sweep, and workers given back where a signal ended it before it could.

    The shell outlives what ``ray job stop`` signals, and its code is that of the sweep.
    """
    sweep, give_back = (
        shlex.join([sys.executable, "-m", "fqsweep.engine.handover", *part]) for part in (words, [GIVE_BACK])
    )
    ended = f"code=$?; [ $code -le {EXIT_INTERRUPTED} ] || {give_back}; exit $code"
    return f"cd {shlex.quote(str(work_dir))} && {{ trap : TERM; {sweep}; {ended}; }}"


def _work_dir() -> Path:
    given = os.environ.get(WORK_DIR_VARIABLE)
    if not given:
        raise InputError(
            f"{WORK_DIR_VARIABLE} must name the folder that all nodes share: set it in the cluster's YAML"
        )
    if not Path(given).is_dir():
        raise InputError(f"{WORK_DIR_VARIABLE}={given} is no folder on this head: mount it, then run again")
    return Path(given)


def _job_client() -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray answers on this head; start it with `ray up CLUSTER.yaml` ({error})"
        ) from error


def _find_running(client: Any, title: str) -> str | None:
    for job in client.list_jobs():
        if (job.metadata or {}).get(METADATA_KEY) == title and not job.status.is_terminal():
            return str(job.submission_id)
    return None


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _exit_code(client: Any, job: str) -> int:
    """The sweep's own exit code; a job that was stopped counts as interrupted."""
    info = client.get_job_info(job)
    if info.status.value == "STOPPED":
        return EXIT_INTERRUPTED
    if info.status.value == "SUCCEEDED":
        return EXIT_OK
    return int(info.driver_exit_code or 1)


# --- in the job ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of ``fqsweep`` with all the workers that the cluster may have; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _leave)
    if words == [GIVE_BACK]:
        _ask_autoscaler([])
        return EXIT_OK
    program = shutil.which("fqsweep")
    command = [program] if program else [sys.executable, "-m", "fqsweep.main"]
    with _gathered_workers():
        process = subprocess.Popen([*command, *words])
        # `ray job stop` signals every process of the job: the sweep stops by itself, and this one waits for it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return process.wait()


def _leave(_signal: int, _frame: Any) -> None:
    sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _gathered_workers() -> Iterator[None]:
    """Ask the autoscaler for every worker that the YAML allows, wait for them, and let them go at the end.

    A sweep counts what runs at the same time when it starts, so workers should be there before it.
    """
    wanted = wanted_workers(json.loads(_cluster_file().read_text(encoding="utf-8")))
    bundles = [bundle for bundle in wanted if bundle]  # none for machines that are there anyway
    if bundles:
        _ask_autoscaler(bundles)
    try:
        if wanted:
            _wait_for_workers(len(wanted))
        yield
    finally:
        if bundles:
            _ask_autoscaler([])


def wanted_workers(cluster: Mapping[str, Any]) -> list[dict[str, float]]:
    """The CPUs and GPUs of each worker that a cluster may have, from the configuration that ``ray up`` leaves.

    Types are filled in their order up to ``max_workers`` of the whole cluster. A worker whose resources Ray only
    finds out when it starts (``provider: local``) is an empty mapping.

    >>> gpu = {"max_workers": 2, "resources": {"CPU": 8, "GPU": 1, "memory": 3}}
    >>> types = {"head": {"max_workers": 0}, "gpu": gpu}
    >>> wanted_workers({"head_node_type": "head", "max_workers": 4, "available_node_types": types})
    [{'CPU': 8, 'GPU': 1}, {'CPU': 8, 'GPU': 1}]
    """
    most = int(cluster.get("max_workers", 0))
    wanted: list[dict[str, float]] = []
    for node_type in cluster["available_node_types"].values():
        resources = node_type.get("resources") or {}
        bundle = {name: resources[name] for name in ("CPU", "GPU") if resources.get(name)}
        wanted += [dict(bundle)] * int(node_type.get("max_workers", 0))
    return wanted[:most]


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    """Every call replaces the one before; an empty one lets idle workers go."""
    import ray
    from ray.autoscaler.sdk import request_resources

    with _connected(ray):
        request_resources(bundles=bundles)


def _wait_for_workers(number: int) -> None:
    import ray

    until = time.monotonic() + GATHER_S
    shown = -1
    with _connected(ray):
        while True:
            here = sum(node["Alive"] for node in ray.nodes()) - 1
            if here != shown:
                print(f"workers: {here} of {number}", flush=True)
                shown = here
            if here >= number:
                return
            if time.monotonic() > until:
                print(f"no more workers came in {GATHER_S:.0f} s: the sweep runs on what is here", flush=True)
                return
            time.sleep(LOOK_S)


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, _leave)  # Ray has put its own in place, which ends with another code
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
