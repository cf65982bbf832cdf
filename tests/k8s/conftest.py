"""A platform and a run, as a cluster's operator would write them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kubernetes.client import ApiClient, Configuration

from mill_jobs.config import RunConfig, parse_config
from mill_k8s.client import Cluster
from mill_k8s.platform import PlatformConfig, parse_platform

RUN = """
run: birds
store: s3://bucket/labels
storage: {endpoint: "http://10.0.0.1:8333", path_style: true}
dataset: {images: "s3://bucket/images"}
sharding: {chunk_size: 32}
recipe:
  name: cotpl
  label:
    masks: {kind: sam, checkpoint: /models/sam.pth, architecture: vit_h}
    chat: {kind: transformers, model: /models/chat}
"""
EVERYTHING = """
images: {worker: registry/worker:1, control: registry/control:1, pull_policy: Always, pull_secrets: [registry]}
service_accounts: {worker: w, finalize: f}
gpu: {resource: nvidia.com/mig-1g.10gb, count: 2}
worker: {requests: {cpu: "4", memory: 8Gi}, limits: {memory: 16Gi}}
finalize: {requests: {cpu: 100m, memory: 1Gi}, limits: {memory: 2Gi}}
node_selector: {pool: gpu}
tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
priority_class: backfill
queue: gpus
models: {claim: weights, content: 0a1b2c, prefetch_job: labelmill-prefetch-0a1b2c}
shared_memory: 2Gi
scratch: 20Gi
credentials_secret: bucket
ca_bundle: {config_map: authority}
env: [{name: OMP_NUM_THREADS, value: "2"}, {name: HF_HUB_OFFLINE, value: "0"}]
volumes: [{name: key, secret: {secretName: chat-key}}]
volume_mounts: [{name: key, mountPath: /etc/chat, readOnly: true}]
backoff_limit_per_index: 3
ttl_days: 0.5
"""


@pytest.fixture
def config() -> RunConfig:
    return parse_config(RUN, "run.yaml")


@pytest.fixture
def platform() -> PlatformConfig:
    return parse_platform("images: {worker: worker:1, control: control:1}")


@pytest.fixture
def everything() -> PlatformConfig:
    return parse_platform(EVERYTHING)


class ScriptedApi:
    """An HTTP server on loopback that answers as a Kubernetes API that was told what to say, path by path."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, object]]] = {}
        self.asked: list[str] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                path = self.path.partition("?")[0].rstrip("/")
                api.asked.append(f"{self.command} {path}")
                status, body = api.next_answer(f"{self.command} {path}")
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = _answer

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def say(self, request: str, *answers: tuple[int, object]) -> None:
        """Answer a request (`GET /path`) with these in turn, the last one again and again."""
        self.answers[request] = list(answers)

    def next_answer(self, request: str) -> tuple[int, object]:
        queue = self.answers.get(request, [(404, {"message": f"{request} not found"})])
        return queue.pop(0) if len(queue) > 1 else queue[0]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    server = ScriptedApi()
    yield server
    server.close()


@pytest.fixture
def cluster(api: ScriptedApi) -> Iterator[Cluster]:
    settings = Configuration()
    settings.host, settings.retries = api.url, False
    with ApiClient(settings) as client:
        yield Cluster(client, "mill")
