"""A namespace of a real cluster with the platform in it, and commands against it, for the cluster tests."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mill_jobs.demo.run import demo_config
from seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, SeaweedFS

ROOT = Path(__file__).parent.parent.parent
MODELS = "/opt/code/mill_jobs/demo/models"
"""Where the images have the demo's models."""
SCENES = 48
CHUNK = 2
POLL_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cluster:
    """The namespace with the platform in it."""

    namespace: str
    server: SeaweedFS
    folder: Path

    def run(self, *command: object, timeout_s: float = 120, stdin: str | None = None) -> Ended:
        """Run a command with the namespace's settings."""
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=timeout_s, check=False,
            env=environment, cwd=ROOT, input=stdin,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    def kubectl(self, *arguments: object, check: bool = True, timeout_s: float = 120, stdin: str | None = None) -> str:
        """Run kubectl in the namespace and return what it printed."""
        ended = self.run("kubectl", "-n", self.namespace, *arguments, timeout_s=timeout_s, stdin=stdin)
        assert not check or ended.code == 0, f"kubectl {' '.join(map(str, arguments))}: {ended.err}"
        return ended.out

    def objects(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """Return objects of a kind."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-o", "json", "-l", selector))["items"]
        return found

    def millctl(self, *arguments: object, timeout_s: float = 600) -> Ended:
        """Run millctl in the namespace."""
        command, *rest = arguments
        return self.run("millctl", command, "--namespace", self.namespace, *rest, timeout_s=timeout_s)

    def write_run(self, run: str, **changes: object) -> Path:
        """Write a run file of the demo's models over the scenes in the bucket; dotted names change one field."""
        tree: dict[str, Any] = demo_config(Path("unused"), Path("unused"), run)
        label = tree["recipe"]["label"]
        label["masks"]["checkpoint"], label["chat"]["model"] = f"{MODELS}/sam.pth", f"{MODELS}/chat"
        tree["store"] = f"s3://{BUCKET}/runs"
        tree["storage"] = {"endpoint": self.server.endpoint, "path_style": True, "region": "us-east-1", "timeout_s": 10}
        tree["dataset"] = {"images": f"s3://{BUCKET}/scenes", "coco": f"s3://{BUCKET}/base.json"}
        tree["sharding"] = {"chunk_size": CHUNK}
        tree["limits"] = {"heartbeat_s": 2, "outside_wait_s": 240}
        tree["finalize"]["base"] = f"s3://{BUCKET}/base.json"
        for path, value in changes.items():
            *parents, last = path.split("__")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        file = self.folder / f"{run}-{uuid.uuid4().hex[:6]}.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s\n{self.kubectl('get', 'pods')}"
            time.sleep(POLL_S)

    def pods(self, run: str, kind: str = "label", phase: str | None = "Running") -> list[dict[str, Any]]:
        """Return the pods of a run."""
        found = self.objects("pods", f"labelmill/run={run},app.kubernetes.io/component={kind}")
        return [pod for pod in found if phase is None or pod["status"].get("phase") == phase]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys in the bucket below `runs/`."""
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"runs/{prefix}")
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def final(self, run: str) -> Mapping[str, bytes]:
        """Return the files of a run's newest final, without the manifest, which names the run."""
        client = self.server.client()
        refs = sorted(key for key in self.keys(f"{run}/final/refs/"))
        assert refs, f"run {run} has no final"
        digest = json.loads(client.get_object(Bucket=BUCKET, Key=refs[-1])["Body"].read())["final"]
        keys = self.keys(f"{run}/final/{digest}/")
        return {
            key.rpartition("/")[2]: client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
            if not key.endswith("manifest.json")
        }


def helm_install(cluster: Cluster, settings: Mapping[str, object], run_text: str) -> None:
    """Install the chart, as the README says."""
    run = {key: value for key, value in yaml.safe_load(run_text).items() if key != "run"}
    values = {"platform": settings, "run": run, "prefetch": {"weights": []}}
    path = cluster.folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    ended = cluster.run(
        "helm", "install", "labelmill", ROOT / "helm" / "labelmill", "-n", cluster.namespace, "-f", path
    )
    assert ended.code == 0, ended.err


def platform_settings(**changes: object) -> dict[str, object]:
    """Return the chart's platform values for a small machine without devices."""
    small = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}}
    return {
        "images": {
            "worker": os.environ.get("E2E_WORKER", "localhost/labelmill-worker:e2e"),
            "control": os.environ.get("E2E_CONTROL", "localhost/labelmill-control:e2e"),
            "pull_policy": "Never",
        },
        "gpu": {"resource": os.environ.get("E2E_GPU", "nvidia.com/gpu"), "count": 1},
        "worker": small,
        "finalize": small,
        "credentials_secret": "s3",
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        # A lost node is noticed in seconds instead of minutes.
        "tolerations": [
            {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 20}
            for taint in ("unreachable", "not-ready")
        ],
        **changes,
    }


def make_namespace(
    cluster: Cluster, labels: Sequence[str] = ("pod-security.kubernetes.io/enforce=restricted",)
) -> None:
    """Make the namespace and the Secret with the bucket's keys."""
    cluster.kubectl("create", "namespace", cluster.namespace)
    cluster.kubectl("label", "namespace", cluster.namespace, *labels)
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    cluster.kubectl("create", "secret", "generic", "s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
