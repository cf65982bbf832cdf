"""millctl against a real API server: `KUBECONFIG=... pytest -m cluster tests/k8s`. Its pods need not get to run."""

import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from kubernetes import client, config

from mill_jobs.config import read_config
from mill_k8s import cli
from mill_k8s.client import Cluster
from mill_k8s.manifests import make_request
from mill_shared.errors import MillError

pytestmark = pytest.mark.cluster

PLATFORM: dict[str, Any] = {
    "images": {"worker": "localhost/none/worker:1", "control": "localhost/none/control:1"},
    "gpu": {"count": 0},
    "worker": {"requests": {"cpu": "10m", "memory": "16Mi"}},
    "finalize": {"requests": {"cpu": "10m", "memory": "16Mi"}},
}
RUN = """
store: s3://bucket/labels
dataset: {images: "s3://bucket/images"}
recipe:
  name: cotpl
  label:
    masks: {kind: sam, checkpoint: /models/sam.pth, architecture: vit_h}
    chat: {kind: transformers, model: /models/chat}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str
    """Of a command that failed for a known reason: the message."""


class Place:
    """A namespace with the platform of a chart, and the command in it."""

    def __init__(self, name: str, folder: Path) -> None:
        config.load_kube_config()  # type: ignore[no-untyped-call]
        self.name, self.folder = name, folder
        self.core: Any = client.CoreV1Api()
        self.batch: Any = client.BatchV1Api()
        self.api: Any = client.ApiClient()
        meta = {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        namespace: Any = {"metadata": meta}
        self.core.create_namespace(namespace, _preload_content=False)
        for account in ("labelmill-worker", "labelmill-finalize"):
            body: Any = {"metadata": {"name": account}}
            self.core.create_namespaced_service_account(name, body, _preload_content=False)
        self.write_platform()
        self.cluster = Cluster.connect(name)

    def write_platform(self, **changes: Any) -> None:
        data = {"platform.yaml": yaml.safe_dump({**PLATFORM, **changes}), "run.yaml": RUN}
        body = {"metadata": {"name": "labelmill-platform"}, "data": data}
        try:
            self.core.replace_namespaced_config_map("labelmill-platform", self.name, body, _preload_content=False)
        except client.ApiException as error:
            if error.status != 404:
                raise
            self.core.create_namespaced_config_map(self.name, body, _preload_content=False)

    def run_file(self, run: str, **changes: Any) -> str:
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(RUN), "run": run, **changes}))
        return str(path)

    def millctl(self, command: str, *arguments: str) -> Ended:
        """Type a command. In this process, since loading the client takes longer than most commands."""
        typed = CliRunner().invoke(cli.millctl, [command, "-n", self.name, *arguments])
        if isinstance(typed.exception, MillError):
            return Ended(int(typed.exception.exit_code), typed.stdout, str(typed.exception))
        assert typed.exception is None or isinstance(typed.exception, SystemExit), typed.exception
        return Ended(typed.exit_code, typed.stdout, typed.stderr)

    def fault(self, command: str, *arguments: str, code: int = 78) -> str:
        ended = self.millctl(command, *arguments)
        assert ended.returncode == code, ended
        return ended.stderr

    def get(self, kind: str, name: str = "", selector: str = "") -> Any:
        """Return an object, or the objects with some labels, as the API gives them."""
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        path = f"{group}/namespaces/{self.name}/{kind}" + (f"/{name}" if name else "")
        query = [("labelSelector", selector)] if selector else []
        request = self.api.param_serialize("GET", path, query_params=query, auth_settings=["BearerToken"])
        answer = self.api.call_api(*request)
        found = json.loads(answer.read())
        return found if name else found["items"]

    def names(self) -> set[str]:
        found = {item["metadata"]["name"] for kind in ("jobs", "configmaps") for item in self.get(kind)}
        return found - {"kube-root-ca.crt", "labelmill-platform"}

    def of(self, run: str) -> set[str]:
        return {name for name in self.names() if name.startswith(f"{run}-")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if "KUBECONFIG" not in os.environ:
        pytest.skip("KUBECONFIG names no cluster")
    made = Place(f"millctl-{uuid.uuid4().hex[:8]}", tmp_path_factory.mktemp("runs"))
    yield made
    # Jobs first: a namespace that takes its Jobs along leaves pods with their finalizer, and hangs.
    for job in made.get("jobs"):
        made.cluster.delete_job(job["metadata"]["name"])
    eventually(lambda: not made.get("pods"))
    made.core.delete_namespace(made.name, _preload_content=False)


def eventually(look: Callable[[], bool]) -> None:
    for _ in range(120):
        if look():
            return
        threading.Event().wait(0.5)
    raise AssertionError("did not come about within a minute")


def test_submit_makes_three_objects_and_the_same_again_makes_none(place: Place) -> None:
    run_file = place.run_file("twice")
    first = place.millctl("submit", run_file, "--shards", "3", "--parallelism", "2")
    assert first.returncode == 0, first.stderr
    assert "attempt 1: first attempt" in first.stderr
    assert first.stdout.splitlines() == ["millctl status twice --watch", "millctl logs twice --follow"]
    made = place.of("twice")
    assert len(made) == 3
    [run_map] = made - {"twice-label-1", "twice-finalize-1"}
    owners = place.get("configmaps", run_map)["metadata"]["ownerReferences"]
    assert {owner["name"] for owner in owners} == {"twice-label-1", "twice-finalize-1"}
    again = place.millctl("submit", run_file, "--shards", "3")
    assert again.returncode == 0
    assert "at work already; nothing to do" in again.stderr
    assert place.of("twice") == made
    more = place.millctl("submit", run_file, "--shards", "3", "--parallelism", "3")
    assert "parallelism 2 -> 3" in more.stderr
    assert place.get("jobs", "twice-label-1")["spec"]["parallelism"] == 3
    assert "3 shards, not 5" in place.fault("submit", run_file, "--shards", "5")
    other = place.run_file("twice", sharding={"chunk_size": 8})
    assert "sharding.chunk_size: 32 before, 8 now" in place.fault("submit", other, "--shards", "3")


def test_a_submit_that_died_half_way_is_completed(place: Place) -> None:
    run_file = place.run_file("half")
    assert place.millctl("submit", run_file, "--shards", "2").returncode == 0
    assert place.cluster.delete_job("half-finalize-1")
    eventually(lambda: "half-finalize-1" not in place.names())
    assert place.millctl("submit", run_file, "--shards", "2").returncode == 0
    assert {"half-label-1", "half-finalize-1"} <= place.names()


def test_of_submits_at_once_one_creates_and_the_others_agree_or_are_refused(place: Place) -> None:
    ended: dict[str, subprocess.CompletedProcess[str]] = {}

    def submit(who: str, run_file: str, shards: str) -> None:
        typed = [sys.executable, "-m", "mill_k8s.cli", "submit", "-n", place.name, run_file, "--shards", shards]
        ended[who] = subprocess.run(typed, capture_output=True, text=True, timeout=120, check=False)

    other = shutil.copy(place.run_file("race", limits={"max_failed": 0.5}), place.folder / "other.yaml")
    same = place.run_file("race")
    asked = {"a": (same, "4"), "b": (same, "4"), "other file": (str(other), "4"), "other shards": (same, "7")}
    threads = [threading.Thread(target=submit, args=(who, *what)) for who, what in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    made = place.get("jobs", "race-label-1")
    winners = {
        who
        for who, (run_file, shards) in asked.items()
        if made["metadata"]["annotations"]["labelmill/shards"] == shards
        and (run_file == str(other)) == (made["metadata"]["annotations"]["labelmill/config"] != config_of(same))
    }
    assert winners
    for who, one in ended.items():
        assert one.returncode == (0 if who in winners else 78), (who, winners, one.stderr)
    assert place.of("race") == {
        "race-label-1", "race-finalize-1", made["metadata"]["annotations"]["labelmill/config"]
    }, "the losers left nothing"  # fmt: skip


def config_of(run_file: str) -> str:
    """Return the name of a run file's ConfigMap."""
    return make_request(read_config(Path(run_file)), 1).config_map


def test_cancel_stops_everything_and_the_next_submit_is_the_next_attempt(place: Place) -> None:
    run_file = place.run_file("stop")
    assert place.millctl("submit", run_file, "--shards", "2").returncode == 0
    ended = place.millctl("cancel", "stop")
    assert ended.returncode == 0, ended.stderr
    assert "nothing that is committed is lost" in ended.stdout
    assert json.loads(place.millctl("status", "stop", "-o", "json").stdout)["state"] == "cancelled"
    selector = "labelmill/run=stop"
    eventually(lambda: not place.get("pods", selector=selector))
    conditions = place.get("jobs", "stop-label-1")["status"]["conditions"]
    assert "DeadlineExceeded" in {condition["reason"] for condition in conditions}
    again = place.millctl("submit", run_file, "--shards", "5")
    assert again.returncode == 0, again.stderr
    assert {"stop-label-2", "stop-finalize-2"} <= place.names()
    assert "no run nobody" in place.fault("cancel", "nobody")


def test_a_suspended_attempt_can_be_cancelled_too(place: Place) -> None:
    run_file = place.run_file("parked")
    assert place.millctl("submit", run_file, "--shards", "2").returncode == 0
    place.batch.patch_namespaced_job("parked-label-1", place.name, {"spec": {"suspend": True}}, _preload_content=False)
    assert json.loads(place.millctl("status", "parked", "-o", "json").stdout)["state"] == "queued"
    assert place.millctl("cancel", "parked").returncode == 0
    eventually(lambda: "parked-label-1" not in place.names())
    assert place.millctl("submit", run_file, "--shards", "3").returncode == 0
    assert "parked-label-2" in place.names()


def test_a_dry_run_prints_what_kubectl_would_create_and_creates_nothing(place: Place) -> None:
    before = place.names()
    ended = place.millctl("submit", place.run_file("dry"), "--shards", "2", "--dry-run", "-o", "yaml")
    assert ended.returncode == 0, ended.stderr
    bodies = list(yaml.safe_load_all(ended.stdout))
    assert [body["kind"] for body in bodies] == ["ConfigMap", "Job", "Job"]
    for body in bodies:
        assert place.cluster.create(body, dry_run=True)
    assert place.names() == before


def test_the_default_run_needs_no_run_file(place: Place) -> None:
    ended = place.millctl("submit", "--shards", "1", "--pilot", "64")
    assert ended.returncode == 0, ended.stderr
    assert any(name.startswith("cotpl-") and name.endswith("-label-1") for name in place.names())
    newest = place.millctl("status", "-o", "json")
    assert json.loads(newest.stdout)["run"].startswith("cotpl-")
    listed = place.millctl("runs")
    assert listed.stdout.splitlines()[1].startswith("cotpl-")


def test_pods_that_cannot_start_say_why_and_end_the_wait_with_a_code_of_its_own(place: Place) -> None:
    run_file = place.run_file("noimage")
    assert place.millctl("submit", run_file, "--shards", "1").returncode == 0
    selector = "labelmill/run=noimage,app.kubernetes.io/component=label"
    eventually(
        lambda: "localhost/none/worker:1" in json.dumps([pod["status"] for pod in place.get("pods", "", selector)])
    )
    message = place.fault("wait", "noimage", "--pending-minutes", "0.01", code=83)
    assert "Pending for" in message
    assert "localhost/none/worker:1" in message
    found = json.loads(place.millctl("status", "noimage", "-o", "json").stdout)
    assert found["state"] == "starting"
    text = place.millctl("logs", "noimage").stdout
    assert "no label pod of run noimage has started yet" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpu": {"resource": "nvidia.com/h100"}}, "no node has nvidia.com/h100; nodes offer:"),
        ({"credentials_secret": "bucket"}, "create secret generic bucket"),
        ({"models": {"claim": "weights"}}, "claim weights of the weights does not exist"),
        ({"service_accounts": {"worker": "nobody"}}, "service account nobody does not exist"),
        ({"queue": "gpus"}, "queue gpus does not exist"),
        ({"tolerations": [{"key": "a", "operator": "Perhaps"}]}, "Unsupported value"),
        ({"tolerations": [{"keys": "a"}]}, "correct the platform's values"),
        ({"worker": {"requests": {"cpu": "many"}}}, "quantities must match"),
        ({"gpus": 3}, "gpus: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_created(place: Place, changes: dict[str, Any], says: str) -> None:
    before = place.names()
    place.write_platform(**changes)
    try:
        assert says in place.fault("submit", place.run_file("wrong"), "--shards", "2")
    finally:
        place.write_platform()
    assert place.names() == before


def test_another_final_needs_no_label_job_and_the_same_run(place: Place) -> None:
    run_file = place.run_file("final")
    assert place.millctl("submit", run_file, "--shards", "1").returncode == 0
    assert "attempt 1 is at work" in place.fault("finalize", "final", "--set", "limits.max_failed=0.5")
    assert place.millctl("cancel", "final").returncode == 0
    assert "sharding.chunk_size" in place.fault("finalize", "final", "--set", "sharding.chunk_size=7")
    assert "limits.max_fail" in place.fault("finalize", "final", "--set", "limits.max_fail=7")
    ended = place.millctl("finalize", "final", "--set", "limits.max_failed=0.5")
    assert ended.returncode == 0, ended.stderr
    made = place.names()
    assert "final-finalize-2" in made
    assert "final-label-2" not in made
    assert place.millctl("cancel", "final").returncode == 0
    ended = place.millctl("rerun", "final", "--shards", "3", "--one-by-one")
    assert ended.returncode == 0, ended.stderr
    pod = place.get("jobs", "final-label-3")["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-2:] == ["--shards=3", "--one-by-one"]


def test_doctor_sees_a_healthy_namespace_and_says_what_it_cannot(place: Place) -> None:
    place.write_platform(gpu={"count": 1})
    ended = place.millctl("doctor", "--no-bucket")
    text = ended.stdout
    place.write_platform()
    assert "ok          Kubernetes 1." in text
    assert "ok          GPU nvidia.com/gpu on " in text
    assert "finalize would wait blindly" in text, "the test's account has no role"
    assert ended.returncode == 78


def test_a_missing_platform_says_how_to_install_it(place: Place) -> None:
    message = place.fault("submit", "-n", "kube-public", "--shards", "1")
    assert "namespace kube-public has no ConfigMap labelmill-platform; install the chart there" in message
