"""The chart on the Kubernetes that KUBECONFIG names; HELM=... runs it with another version of helm.

Without CONTROL_IMAGE (an image that the cluster has or can pull) its pods are made but never start; with it, and with
CLUSTER_HOST_IP (this machine, as pods reach it), weights are fetched and the bucket is probed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from mill_k8s.platform import (
    FINALIZE_MAY,
    PLATFORM,
    PLATFORM_KEY,
    SUBMITTER_MAY,
    ModelsConfig,
    Permission,
    PlatformConfig,
    parse_platform,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CHART = Path(__file__).parents[2] / "helm/labelmill"
HELM = os.environ.get("HELM") or str(Path(sys.executable).parent / "helm")
CONTROL_IMAGE = os.environ.get("CONTROL_IMAGE", "")
HOST = os.environ.get("CLUSTER_HOST_IP", "")
WAIT_S = 120


def helm(*arguments: str) -> str:
    done = subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def api() -> client.ApiClient:
    config.load_kube_config()  # type: ignore[no-untyped-call]
    return client.ApiClient()


@pytest.fixture
def namespace(api: client.ApiClient) -> Iterator[str]:
    """A namespace that enforces the restricted standard."""
    name = f"labelmill-test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core = client.CoreV1Api(api)
    core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name, labels=labels)))
    yield name
    core.delete_namespace(name)


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {WAIT_S} s for {what}"
        time.sleep(0.5)


def platform_of(core: client.CoreV1Api, namespace: str) -> tuple[PlatformConfig, ModelsConfig]:
    """What millctl reads, and the weights that the chart brings."""
    data = core.read_namespaced_config_map(PLATFORM, namespace).data
    assert data is not None
    facts = parse_platform(data[PLATFORM_KEY])
    assert facts.models is not None
    return facts, facts.models


def metadata(item: Any) -> client.V1ObjectMeta:
    assert isinstance(item.metadata, client.V1ObjectMeta)
    return item.metadata


def finished(api: client.ApiClient, namespace: str, job: str) -> bool:
    status = client.BatchV1Api(api).read_namespaced_job(job, namespace).status
    assert status is not None
    assert not status.failed, f"{job} failed: kubectl -n {namespace} logs job/{job}"
    return bool(status.succeeded)


def may(api: client.ApiClient, namespace: str, account: str, right: Permission, verb: str) -> bool:
    resource, _, subresource = right.resource.partition("/")
    asked = client.V1ResourceAttributes(
        namespace=namespace, verb=verb, group=right.group, resource=resource, subresource=subresource or None
    )
    user = f"system:serviceaccount:{namespace}:{account}"
    spec = client.V1SubjectAccessReviewSpec(
        user=user, groups=["system:serviceaccounts", "system:authenticated"], resource_attributes=asked
    )
    review = client.V1SubjectAccessReview(spec=spec)
    answer = client.AuthorizationV1Api(api).create_subject_access_review(review)
    assert answer.status is not None
    return bool(answer.status.allowed)


def test_accounts_may_do_what_is_listed_and_nothing_else(api: client.ApiClient, namespace: str) -> None:
    helm("install", "labelmill", str(CHART), f"--namespace={namespace}", f"--values={CHART}/ci/minimal-values.yaml")
    every = [
        Permission(group, resource, ("create", "delete", "get", "list", "patch", "update", "watch"))
        for group, resource in (
            ("batch", "jobs"), ("", "configmaps"), ("", "pods"), ("", "pods/log"), ("", "pods/exec"), ("", "secrets"),
            ("", "serviceaccounts/token"), ("apps", "deployments"), ("rbac.authorization.k8s.io", "rolebindings"),
        )
    ]  # fmt: skip
    for account, listed in (
        ("labelmill-worker", ()),
        ("labelmill-finalize", FINALIZE_MAY),
        ("labelmill-submitter", SUBMITTER_MAY),
    ):
        allowed = {(each.resource, verb) for each in listed for verb in each.verbs}
        found = {
            (each.resource, verb) for each in every for verb in each.verbs if may(api, namespace, account, each, verb)
        }
        assert found == allowed, account
        assert not any(may(api, "default", account, each, verb) for each in every for verb in each.verbs)


def test_pods_pass_the_namespaces_own_check(api: client.ApiClient, namespace: str) -> None:
    values = f"--values={CHART}/ci/ca-bundle-values.yaml"
    rendered = helm("template", "labelmill", str(CHART), f"--namespace={namespace}", "--kube-version=1.33.0", values)
    checked = 0
    for item in yaml.safe_load_all(rendered):
        if item is None or item["kind"] not in ("Pod", "Job"):
            continue
        pod: dict[str, Any] = item if item["kind"] == "Pod" else item["spec"]["template"]
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dry"}, "spec": pod["spec"]}
        del body["spec"]["serviceAccountName"]
        client.CoreV1Api(api).create_namespaced_pod(namespace, client.V1Pod.model_validate(body), dry_run="All")
        checked += 1
    assert checked == 2


def run_of_millctl() -> dict[str, Any]:
    container = {"name": "worker", "image": "example.org/none:1", "securityContext": {}}
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "birds-label-1", "labels": {"app.kubernetes.io/managed-by": "millctl"}},
        "spec": {"template": {"spec": pod}},
    }


def test_upgrade_and_uninstall_leave_runs_and_weights_alone(api: client.ApiClient, namespace: str) -> None:
    batch, core = client.BatchV1Api(api), client.CoreV1Api(api)
    common = (str(CHART), f"--namespace={namespace}", f"--values={CHART}/ci/minimal-values.yaml")
    notes = helm("install", "labelmill", *common).partition("NOTES:")[2]
    _, models = platform_of(core, namespace)
    assert [line.strip() for line in notes.splitlines() if line.startswith("  ")] == [
        f"helm test labelmill --namespace {namespace} --logs",
        f"kubectl --namespace {namespace} wait job/{models.prefetch_job} --for=condition=Complete --timeout=2h",
        f'make submit SHARDS=12 ARGS="--namespace {namespace}"',
    ]
    run = batch.create_namespaced_job(namespace, client.V1Job.model_validate(run_of_millctl()))

    helm("upgrade", "labelmill", *common, "--set=platform.images.control=registry.example.org/other:2")
    facts, newer = platform_of(core, namespace)
    assert facts.images.control == "registry.example.org/other:2"
    assert newer.content == models.content
    assert newer.prefetch_job != models.prefetch_job
    assert metadata(batch.read_namespaced_job("birds-label-1", namespace)).uid == metadata(run).uid

    helm("uninstall", "labelmill", f"--namespace={namespace}")
    left = metadata(batch.read_namespaced_job("birds-label-1", namespace))
    assert (left.uid, left.deletion_timestamp) == (metadata(run).uid, None)
    claim = metadata(core.read_namespaced_persistent_volume_claim(models.claim, namespace))
    assert claim.deletion_timestamp is None


@pytest.fixture
def volume(api: client.ApiClient, namespace: str, tmp_path: Path) -> Iterator[dict[str, object]]:
    """Values of a volume: of the default class, or a folder of this machine where there is no class."""
    core = client.CoreV1Api(api)
    classes = client.StorageV1Api(api).list_storage_class().items
    mark = "storageclass.kubernetes.io/is-default-class"
    if any((metadata(each).annotations or {}).get(mark) == "true" for each in classes):
        yield {"access_mode": "ReadWriteOnce", "size": "1Gi"}
        return
    folder = tmp_path / "volume"
    folder.mkdir()
    shutil.chown(folder, 10001, 10001)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    body = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }
    core.create_persistent_volume(client.V1PersistentVolume.model_validate(body))
    yield {"access_mode": "ReadWriteOnce", "size": "1Gi", "storage_class": "", "volume_name": namespace}
    core.delete_persistent_volume(namespace)


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[dict[str, object]]:
    """A server of one file, on the address by which pods reach this machine; values of it as a source."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "sam.pth").write_bytes(b"weights" * 1000)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    yield {"path": "sam.pth", "source": f"http://{HOST}:{server.server_port}/sam.pth", "sha256": digest}
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not (CONTROL_IMAGE and HOST), reason="needs CONTROL_IMAGE and CLUSTER_HOST_IP")
def test_weights_arrive_and_the_bucket_is_proved(
    api: client.ApiClient, namespace: str, volume: dict[str, object], weights: dict[str, object], tmp_path: Path
) -> None:
    from seaweed import CREDENTIALS, SeaweedFS

    (tmp_path / "s3").mkdir()
    server = SeaweedFS(tmp_path / "s3", HOST)
    try:
        core = client.CoreV1Api(api)
        core.create_namespaced_secret(
            namespace, client.V1Secret(metadata=client.V1ObjectMeta(name="bucket-keys"), string_data=CREDENTIALS)
        )
        values = {
            "platform": {
                "images": {"worker": CONTROL_IMAGE, "control": CONTROL_IMAGE},
                "credentials_secret": "bucket-keys",
            },
            "run": {
                "store": "s3://mill/labels",
                "storage": {"endpoint": server.endpoint, "region": "us-east-1", "path_style": True},
                "dataset": {"images": "s3://mill/photos"},
            },
            "prefetch": {"weights": [weights], "volume": volume},
        }
        server.client().put_object(Bucket="mill", Key="photos/0.jpg", Body=b"")
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        common = (str(CHART), f"--namespace={namespace}", f"--values={path}")
        helm("install", "labelmill", *common)
        _, models = platform_of(core, namespace)
        first = str(models.prefetch_job)
        wait_until("the weights", lambda: finished(api, namespace, first))
        if "volume_name" in volume:
            filled = tmp_path / "volume" / str(models.content)
            assert sorted(item.name for item in filled.iterdir()) == ["READY", "SHA256SUMS", "sam.pth"]
        helm("test", "labelmill", f"--namespace={namespace}", "--timeout=2m")
        said = core.read_namespaced_pod_log("labelmill-probe", namespace)
        assert "create-once is honoured" in said
        assert "PROBLEM" not in said

        helm("upgrade", "labelmill", *common, "--set=prefetch.resources.requests.cpu=100m")
        second = str(platform_of(core, namespace)[1].prefetch_job)
        assert second != first
        wait_until("the Job that finds READY", lambda: finished(api, namespace, second))
    finally:
        server.kill()
