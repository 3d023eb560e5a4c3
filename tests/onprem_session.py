"""A person at work with ``clusters/onprem.yaml`` on two machines that are namespaces of this one.

    unshare --fork --pid --mount --net --mount-proc --kill-child python tests/onprem_session.py FOLDER

``ray stop`` and ``ray down`` end every Ray they see; in here they see only their own. The head (with the laptop) and
the worker each have their processes, network, sshd and home; FOLDER holds all of them, and the folder that they
share. Steps are printed as lines ``== step``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NAMESPACES = ("unshare", "--fork", "--pid", "--mount", "--net", "--mount-proc", "--kill-child")
HEAD, WORKER = "10.9.0.1", "10.9.0.2"
SPACE = """\
name: tiny
datasets:
  - {kind: synthderm, group_attributes: [skin_tone], image_size: 32, num_images: 500}
architectures: [test_resnet]
budgets_bits: [3]
seeds: [0]
methods: [{method: fp32}, {method: uniform, bits: [4]}, {method: static}]
recipe: {epochs: 2, learning_rate: 1.0e-3, finetune_epochs: 1}
search: {trials_per_cell: 1}
resources: {cpus_per_trial: 2, gpus_per_trial: 0}
"""


def edited_yaml(folder: Path) -> str:
    """``clusters/onprem.yaml`` with its EDIT lines filled in, and this Python instead of an installation."""
    text = (PROJECT / "clusters" / "onprem.yaml").read_text(encoding="utf-8")
    changes = (
        ("cluster_name: fqsweep", f"cluster_name: {folder.name}"),
        ("head_ip: HEAD_IP", f"head_ip: {HEAD}"),
        ("worker_ips: []", f"worker_ips: [{WORKER}]"),
        ("ssh_user: USER", "ssh_user: root"),
        ("~/.ssh/id_fqsweep", str(folder / "laptop" / ".ssh" / "id_fqsweep")),  # ssh's ~ is not $HOME
        ("/shared/fqsweep", str(folder / "shared")),
        ("/tmp/ray-$(id -un)", str(folder / "ray")),
        ("PATH=$HOME/fqsweep/.venv/bin:$PATH'", f"PATH={BIN}:$PATH' 'PYTHONPATH=$HOME/fqsweep'"),
        ("  - test -x ~/fqsweep/.venv/bin/python || python3 -m venv ~/fqsweep/.venv\n", ""),
        ("  - pip install --quiet --constraint ~/fqsweep/constraints.txt --editable ~/fqsweep\n", ""),
    )
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def run(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def prepare(folder: Path) -> dict[str, str]:
    """Two machines, keys, and the folder that they share; returns the laptop's environment."""
    laptop, shared = folder / "laptop", folder / "shared"
    for place in (laptop / ".ssh", laptop / ".ray", shared, folder / "ray"):
        place.mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(laptop / ".ssh" / "id_fqsweep"))
    worker = subprocess.Popen([*NAMESPACES, sys.executable, __file__, str(folder), "worker"])
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{worker.pid}/ns/net") == own:
        time.sleep(0.05)
    run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(worker.pid))
    become_machine(folder, "head", HEAD)
    token = laptop / ".ray" / "fqsweep.token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    (shared / "tiny.yaml").write_text(SPACE)
    (folder / "onprem.yaml").write_text(edited_yaml(folder))
    return {
        "HOME": str(laptop),
        "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": str(folder / "laptop"),
        "RAY_TMPDIR": str(folder / "laptop"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_UP_enable_autoscaler_v2": "1",
        "TERM": "dumb",
        "LANG": "C.UTF-8",
    }


def become_machine(folder: Path, name: str, address: str) -> None:
    """Give this namespace an address, a home for root that is its own, and an sshd."""
    home = folder / name
    (home / ".ssh").mkdir(parents=True)
    shutil.copy(folder / "laptop" / ".ssh" / "id_fqsweep.pub", home / ".ssh" / "authorized_keys")
    while subprocess.run(["ip", "link", "show", "wire"], capture_output=True, check=False).returncode != 0:
        time.sleep(0.05)
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{address}/24", "dev", "wire")
    run("ip", "link", "set", "wire", "up")
    run("ip", "route", "add", "default", "dev", "wire")  # Ray takes the address of the default route
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir(mode=0o755)
    run("mount", "-t", "tmpfs", "tmpfs", str(folder / "ray"))
    accounts = Path("/etc/passwd").read_text().splitlines()
    accounts = [f"root:x:0:0:root:{home}:/bin/bash" if line.startswith("root:") else line for line in accounts]
    (folder / f"{name}.passwd").write_text("\n".join(accounts) + "\n")
    run("mount", "--bind", str(folder / f"{name}.passwd"), "/etc/passwd")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / f"{name}.host_key"))
    run(
        *("/usr/sbin/sshd", "-f", "/dev/null", "-h", str(folder / f"{name}.host_key")),
        *("-o", f"ListenAddress={address}", "-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PidFile=none"),
        *("-o", "PasswordAuthentication=no", "-o", "PermitRootLogin=yes"),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["worker"]:
        become_machine(folder, "worker", WORKER)
        signal.pause()
    environment = prepare(folder)
    yaml = str(folder / "onprem.yaml")

    def ray(*words: str) -> int:
        print(f"== ray {' '.join(words)}", flush=True)
        started = time.monotonic()
        code = subprocess.run(["ray", *words], cwd=PROJECT, env=environment, check=False).returncode
        print(f"== exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        return code

    ray("up", "-y", yaml)
    look_around()
    submit = ("submit", yaml, "fqsweep/main.py", "--", "run", "tiny.yaml")
    driver = leave_early(submit, folder, environment)
    come_back(submit, driver, environment)
    ray("down", "-y", yaml)


def look_around() -> None:
    """Where this Ray listens, what its dashboard says to a stranger, and what its workers inherit."""
    subprocess.run(["ss", "-ltnH"], check=False)
    try:
        with urllib.request.urlopen("http://127.0.0.1:8265/api/jobs/", timeout=20) as answer:
            print("== a stranger is answered", answer.status, flush=True)
    except urllib.error.HTTPError as error:
        print("== a stranger is answered", error.code, flush=True)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"/raylet"):
                settings = (process / "environ").read_bytes().decode().split("\0")
                inherited = [
                    word for word in settings if word.startswith(("OMP_", "FQSWEEP_", "RAY_AUTH_MODE"))
                ]
                print("== raylet inherits", *sorted(inherited), flush=True)


def leave_early(submit: tuple[str, ...], folder: Path, environment: dict[str, str]) -> int:
    """``ray submit``, whose client is killed as soon as the first task runs.

    Returns:
        the sweep's process, which is held: on a busy machine it would end before anybody is back.
    """
    print("== ray submit, killed once a task runs", flush=True)
    log = folder / "first.log"
    with log.open("wb") as stream:
        client = subprocess.Popen(
            ["ray", *submit],
            **{"cwd": PROJECT, "env": environment, "start_new_session": True},
            **{"stdout": stream, "stderr": subprocess.STDOUT},
        )
    out = folder / "shared" / "out" / "tiny"
    ledger = out / "ledger.jsonl"
    driver = 0
    until = time.monotonic() + 150
    while client.poll() is None and time.monotonic() < until:
        if ledger.exists() and '"start"' in ledger.read_text():
            os.killpg(client.pid, signal.SIGKILL)
            driver = int(json.loads((out / "driver.json").read_text())["pid"])
            os.kill(driver, signal.SIGSTOP)
            break
        time.sleep(0.1)
    print(log.read_text(), flush=True)
    print(f"== exit code {client.wait()}; ledger has {len(ledger.read_text().splitlines())} lines", flush=True)
    return driver


def come_back(submit: tuple[str, ...], driver: int, environment: dict[str, str]) -> None:
    """``ray submit`` again; the sweep goes on once it is followed."""
    print("== ray submit, to come back", flush=True)
    client = subprocess.Popen(
        ["ray", *submit],
        **{"cwd": PROJECT, "env": environment, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    assert client.stdout is not None
    for line in client.stdout:
        print(line, end="", flush=True)
        if "to come back" in line:
            os.kill(driver, signal.SIGCONT)
    print(f"== exit code {client.wait()}", flush=True)


if __name__ == "__main__":
    main()
