"""The cluster files, the hand-over of a sweep to Ray on a head, and a whole cluster over ssh on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._raylet import GcsClient
from ray.autoscaler._private.util import prepare_config, validate_config

from fqsweep.engine.handover import hand_over, is_submitted_copy, job_command, wanted_workers, with_address
from fqsweep.errors import InputError
from fqsweep.files import read_lines
from tests.engine.ray_cluster import ClusterProcess
from tests.onprem_session import NAMESPACES
from tests.whole_sweeps import descendants

PROJECT = Path(__file__).resolve().parents[1]
CLUSTERS = PROJECT / "clusters"
LAUNCHED = ("gpu", "onprem")
TOKEN = "~/.ray/auth_token"


def read_cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8"))


def kube_documents() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def start_commands(cluster: dict[str, Any]) -> list[str]:
    return [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]


# --- what ray up reads ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_validator_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(read_cluster(name)))


def test_rays_own_validator_would_refuse_a_misspelt_key() -> None:
    cluster = read_cluster("gpu") | {"max_worker": 2}
    with pytest.raises(Exception, match="'max_worker' was unexpected"):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("name", LAUNCHED)
def test_everything_that_is_mounted_exists_and_makes_the_package_whole(name: str) -> None:
    mounts = read_cluster(name)["file_mounts"]
    sources = {Path(remote).name: local for remote, local in mounts.items() if remote != TOKEN}
    for remote, local in sources.items():
        assert remote == local
        assert (PROJECT / local).exists(), local
    built = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("fqsweep", "analysis", "search_spaces", "README.md"):
        assert needed in sources and needed in built
    assert "constraints.txt" in sources


@pytest.mark.parametrize("name", LAUNCHED)
def test_all_nodes_demand_one_token_which_is_no_part_of_the_repository(name: str) -> None:
    cluster = read_cluster(name)
    assert cluster["file_mounts"][TOKEN].startswith("~/")
    assert any("'RAY_AUTH_MODE=token'" in command for command in cluster["setup_commands"])
    assert not any("AUTH_TOKEN=" in command for command in cluster["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_dashboard_listens_on_loopback_and_no_option_asks_for_every_address(name: str) -> None:
    text = (CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8")
    assert "0.0.0.0" not in text
    cluster = read_cluster(name)
    assert all("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])
    assert all("--node-ip-address=0" not in command for command in start_commands(cluster))


@pytest.mark.parametrize("name", LAUNCHED)
def test_start_commands_leave_a_running_ray_alone_and_trials_their_threads(name: str) -> None:
    for command in start_commands(read_cluster(name)):
        assert "ray stop" not in command
        assert re.search(r"pgrep .* > /dev/null \|\| ray start", command)
        assert command.startswith("unset OMP_NUM_THREADS")


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_guard_of_the_start_command_does_not_find_itself(name: str) -> None:
    guards = [re.search(r"pgrep .*? > /dev/null", c) for c in start_commands(read_cluster(name))]
    for guard in guards:
        assert guard is not None
        script = guard.group().replace("6379", "1")  # a port that no Ray here has
        ended = subprocess.run(
            ["bash", "-c", f"{script} || echo starts"], capture_output=True, text=True, check=False
        )
        assert ended.stdout == "starts\n", ended.stderr


def test_the_cloud_nodes_are_closed_encrypted_and_hold_no_more_rights_than_they_need() -> None:
    cluster = read_cluster("gpu")
    head, gpu = (cluster["available_node_types"][name]["node_config"] for name in ("head", "gpu"))
    for node in (head, gpu):
        assert node["SecurityGroupIds"], "without one, Ray opens port 22 to the world"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in node["BlockDeviceMappings"])
    assert gpu["IamInstanceProfile"] != head["IamInstanceProfile"]
    assert "InstanceMarketOptions" not in head and gpu["InstanceMarketOptions"] == {"MarketType": "spot"}


class CloudFormation(yaml.SafeLoader):
    """Reads CloudFormation's short functions as pairs of name and value."""


CloudFormation.add_multi_constructor("!", lambda _loader, tag, node: (tag, node.value))


def test_the_base_on_aws_lets_in_one_address_by_ssh_and_keeps_the_results() -> None:
    text = (CLUSTERS / "aws_base.yaml").read_text(encoding="utf-8")
    base = yaml.load(text, Loader=CloudFormation)["Resources"]
    (ssh,) = base["SecurityGroup"]["Properties"]["SecurityGroupIngress"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["CidrIp"]) == (22, 22, ("Ref", "SshFrom"))
    assert base["FileSystem"]["DeletionPolicy"] == "Retain" and base["FileSystem"]["Properties"]["Encrypted"]
    assert "Policies" not in base["WorkerRole"]["Properties"]
    (policy,) = base["HeadRole"]["Properties"]["Policies"]
    actions = {action for s in policy["PolicyDocument"]["Statement"] for action in s["Action"]}
    assert not {"*", "ec2:*", "iam:*"} & actions
    profiles = {p["Properties"]["InstanceProfileName"] for n, p in base.items() if n.endswith("Profile")}
    types = read_cluster("gpu")["available_node_types"].values()
    assert profiles == {node["node_config"]["IamInstanceProfile"]["Name"] for node in types}


# --- Kubernetes ----------------------------------------------------------------------------------


def pods() -> list[dict[str, Any]]:
    spec = kube_documents()["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for group in groups)]


def test_the_ray_job_runs_a_space_that_exists_in_a_shared_folder_and_ends_its_machines() -> None:
    job = kube_documents()["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["fqsweep", "run"] and (PROJECT / "search_spaces" / f"{words[2]}.yaml").exists()
    assert words[words.index("--address") + 1] == "auto"
    (mounted,) = {
        mount["mountPath"] for pod in pods()[1:] for mount in pod["containers"][0]["volumeMounts"]
    } - {"/dev/shm"}
    assert words[words.index("--out") + 1].startswith(mounted)
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    claim = kube_documents()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods()[1:]:
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_pods_have_no_root_no_account_token_and_bounded_resources() -> None:
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_ray_on_kubernetes_demands_a_token_and_is_reached_from_its_own_pods_only() -> None:
    documents = kube_documents()
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert f"ray=={cluster['rayVersion']}\n" in (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all("podSelector" in source for rule in policy["ingress"] for source in rule["from"])
    own = policy["podSelector"]["matchLabels"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group["template"]["metadata"]["labels"] == own for group in groups)


def test_the_image_copies_what_the_launched_nodes_get() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (CLUSTERS / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    mounted = {local for remote, local in read_cluster("gpu")["file_mounts"].items() if remote != TOKEN}
    assert {word for line in copied for word in line.split()} == mounted
    allowed = (CLUSTERS / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == mounted


# --- the hand-over -------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home as `ray up` and `ray submit` leave it on a head; nothing listens there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("FQSWEEP_WORK_DIR", str(tmp_path))
    (tmp_path / "main.py").touch()
    (tmp_path / "ray_bootstrap_config.yaml").write_text("{}")
    return tmp_path


def test_only_the_copy_in_the_home_of_a_head_hands_over(head: Path) -> None:
    assert is_submitted_copy(head / "main.py")
    assert not is_submitted_copy(PROJECT / "fqsweep" / "main.py")
    (head / "ray_bootstrap_config.yaml").unlink()
    assert not is_submitted_copy(head / "main.py")


def test_a_head_without_ray_or_without_its_shared_folder_is_said(
    head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no Ray answers on this head; start it with `ray up"):
        hand_over(["run", "paper"])
    monkeypatch.setenv("FQSWEEP_WORK_DIR", str(head / "gone"))
    with pytest.raises(InputError, match=r"gone is no folder on this head: mount it"):
        hand_over(["run", "paper"])
    monkeypatch.delenv("FQSWEEP_WORK_DIR")
    with pytest.raises(InputError, match=r"FQSWEEP_WORK_DIR must name the folder that all nodes share"):
        hand_over(["run", "paper"])


def test_the_address_that_was_given_is_kept() -> None:
    assert with_address(["run", "demo"]) == ["run", "demo", "--address", "auto"]
    for given in (["--address", "ward:6379"], ["--address=ward:6379"]):
        assert with_address(["run", "demo", *given]) == ["run", "demo", *given]


def test_bad_words_are_answered_before_anything_is_handed_over(head: Path) -> None:
    shutil.copy(PROJECT / "fqsweep" / "main.py", head / "main.py")
    command = [sys.executable, str(head / "main.py"), "run", "paper", "--max-concurrent", "0"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "--max-concurrent: must be at least 1" in ended.stderr


def test_a_sweep_wants_every_worker_that_the_cluster_may_have() -> None:
    prepared = prepare_config(read_cluster("gpu"))
    prepared["available_node_types"]["gpu"]["resources"] = {"CPU": 8, "GPU": 1, "node:x": 1.0}  # Ray asks AWS
    assert wanted_workers(prepared) == [{"CPU": 8, "GPU": 1}] * 4
    assert wanted_workers({**prepared, "max_workers": 3}) == [{"CPU": 8, "GPU": 1}] * 3
    local = read_cluster("onprem")
    assert wanted_workers(prepare_config(local)) == []
    local["provider"]["worker_ips"] = ["10.0.0.12", "10.0.0.13"]
    assert wanted_workers(prepare_config(local)) == [{}, {}]


@pytest.fixture
def cluster() -> Iterator[ClusterProcess]:
    cluster = ClusterProcess()
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_job_waits_for_its_workers_runs_and_returns_the_exit_code_and_gives_them_back_however_it_ends(
    tmp_path: Path, cluster: ClusterProcess
) -> None:
    node_types = {"gpu": {"max_workers": 1, "resources": {"CPU": 1, "GPU": 2}}}
    configuration = {"max_workers": 1, "available_node_types": node_types}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(configuration))
    if (Path.home() / ".ray").exists():  # the token of the running cluster
        shutil.copytree(Path.home() / ".ray", tmp_path / ".ray")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "RAY_ADDRESS": cluster.address,
        "PYTHONPATH": str(PROJECT),
    }

    def start_job() -> subprocess.Popen[str]:
        """As Ray starts it, through a shell; it has asked for its worker when this returns."""
        job = subprocess.Popen(
            job_command(tmp_path, ["status", str(tmp_path)]),
            shell=True,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert job.stdout is not None
        assert job.stdout.readline() == "workers: 0 of 1\n"
        assert wanted() == [{"CPU": 1, "GPU": 2}]
        return job

    def wanted() -> list[dict[str, float]]:
        """What the autoscaler is asked for."""
        gcs = GcsClient(address=cluster.address)
        asked: list[dict[str, float]] = json.loads(gcs.internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))
        return asked

    killed = start_job()
    os.kill(descendants(killed.pid)[0], signal.SIGKILL)
    assert killed.wait(timeout=60) == 128 + signal.SIGKILL and wanted() == []
    stopped = start_job()
    for pid in (stopped.pid, *descendants(stopped.pid)):  # as `ray job stop` does
        os.kill(pid, signal.SIGTERM)
    assert stopped.wait(timeout=60) == 130 and wanted() == []
    job = start_job()
    cluster.add_node()
    said, complaint = job.communicate(timeout=120)
    assert said == "workers: 1 of 1\n"
    assert job.returncode == 2 and "holds no sweep" in complaint and wanted() == []


# --- a whole cluster -----------------------------------------------------------------------------


@pytest.fixture
def session() -> Iterator[Path]:
    """A folder for a cluster in namespaces of its own; a skip that says what is missing."""
    missing = [
        tool for tool in ("unshare", "ip", "ss", "rsync", "ssh", "ssh-keygen") if shutil.which(tool) is None
    ]
    missing += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
    if missing:
        pytest.skip(f"a cluster over ssh needs {', '.join(missing)} (Debian: openssh-server rsync iproute2)")
    if subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("process, mount and network namespaces cannot be made here: run as root")
    folder = Path(tempfile.mkdtemp(prefix="fq", dir="/tmp"))  # paths of Ray's sockets must be short
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_sweep_goes_on_when_the_client_dies_and_the_same_submit_follows_it(session: Path) -> None:
    command = [*NAMESPACES, sys.executable, str(PROJECT / "tests" / "onprem_session.py"), str(session)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    up, first, second = re.split(r"^== ray submit.*$", said, flags=re.MULTILINE)
    assert "== exit code 0" in up
    assert re.findall(r"^LISTEN\s+\d+\s+\d+\s+(\S+):8265 ", up, re.MULTILINE) == ["127.0.0.1"]
    assert "== a stranger is answered 401" in up
    assert "== raylet inherits FQSWEEP_DATA_DIR=" in up and "OMP_NUM_THREADS" not in up.split("== raylet")[1]
    assert "it goes on when this terminal leaves" in first and "3 of 3 cells done" not in first
    assert "== exit code -9" in first
    assert "workers: 1 of 1" in second
    assert "this sweep runs already, as job raysubmit_" in second
    assert "3 of 3 cells done" in second and "== exit code 0" in second
    assert "No nodes remaining." in second
    events = [line["event"] for line in read_lines(session / "shared" / "out" / "tiny" / "ledger.jsonl")]
    assert events.count("begin") == 1 and events[-1] == "end"
    assert (session / "shared" / "out" / "tiny" / "report" / "report.html").exists()
