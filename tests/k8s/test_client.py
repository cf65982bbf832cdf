"""The client against an API that answers badly: every error is ours and says what to do."""

import socket
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration

from mill_k8s.client import Cluster, ClusterError, ForbiddenError
from mill_shared.errors import ConfigError, ExitCode

JOBS = "/apis/batch/v1/namespaces/mill/jobs"
JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "birds-label-1"}, "spec": {"template": {}}}


def test_a_field_that_only_a_newer_server_knows_is_no_error(api: Any, cluster: Cluster) -> None:
    api.say(
        f"GET {JOBS}/x",
        (200, {"metadata": {"name": "x", "new": 1}, "spec": {"gang": {}}, "status": {"active": 2, "later": []}}),
    )
    job = cluster.job("x")
    assert job is not None
    assert job.status.active == 2


@pytest.mark.parametrize(
    ("status", "message", "kind", "says"),
    [
        (403, 'jobs is forbidden: User "u" cannot get', ForbiddenError, "ask whoever installed the chart"),
        (401, "Unauthorized", ForbiddenError, "log in again"),
        (500, "etcdserver: leader changed", ClusterError, "answered 500: etcdserver"),
        (429, "too many requests", ClusterError, "answered 429"),
        (422, "Job is invalid: spec.completions: too large", ConfigError, "refuses it: Job is invalid"),
    ],
)
def test_a_refusal_is_one_line_of_ours(
    status: int, message: str, kind: type[Exception], says: str, api: Any, cluster: Cluster
) -> None:
    api.say(f"GET {JOBS}/x", (status, {"message": message}))
    with pytest.raises(kind) as caught:
        cluster.job("x")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_api_that_is_not_there_is_an_outside_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Configuration()
    settings.host, settings.retries = f"http://127.0.0.1:{port}", False
    with ApiClient(settings) as client, pytest.raises(ClusterError, match="does not answer") as caught:
        Cluster(client, "mill").job("x")
    assert caught.value.exit_code == ExitCode.OUTSIDE


def test_creating_what_exists_is_no_error(api: Any, cluster: Cluster) -> None:
    created = (201, {"metadata": {"name": "birds-label-1"}})
    api.say(f"POST {JOBS}", created, (409, {"message": 'jobs.batch "birds-label-1" already exists'}))
    assert cluster.create(JOB) is True
    assert cluster.create(JOB) is False


def test_an_object_with_an_unknown_field_is_refused_before_it_is_sent(api: Any, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="correct the platform's values"):
        cluster.create({**JOB, "spec": {"template": {}, "completion": 3}})
    assert api.asked == []


def test_long_lists_come_in_pages(api: Any, cluster: Cluster) -> None:
    pages = [
        (200, {"metadata": {"continue": "more"}, "items": [{"metadata": {"name": "a"}}]}),
        (200, {"metadata": {}, "items": [{"metadata": {"name": "b"}}]}),
    ]
    api.say("GET /api/v1/namespaces/mill/pods", *pages)
    assert [pod.metadata.name for pod in cluster.pods("a=b")] == ["a", "b"]


def test_a_log_is_lines_and_the_log_of_a_gone_pod_is_none(api: Any, cluster: Cluster) -> None:
    api.say("GET /api/v1/namespaces/mill/pods/p/log", (200, "one\ntwo\nthree"))
    assert list(cluster.log("p", "worker")) == ["one", "two", "three"]
    assert list(cluster.log("gone", "worker")) == []
    waiting = 'container "worker" in pod "p" is waiting to start: ContainerCreating'
    api.say("GET /api/v1/namespaces/mill/pods/q/log", (400, {"message": waiting}))
    assert list(cluster.log("q", "worker")) == []


def test_what_this_user_may_not_see_is_not_missing(api: Any, cluster: Cluster) -> None:
    api.say("GET /api/v1/namespaces/mill/secrets/there", (200, {"metadata": {"name": "there"}}))
    api.say("GET /api/v1/namespaces/mill/secrets/hidden", (403, {"message": "forbidden"}))
    api.say("GET /api/v1/nodes", (403, {"message": "forbidden"}))
    assert cluster.exists("secrets", "there") is True
    assert cluster.exists("secrets", "absent") is False
    assert cluster.exists("secrets", "hidden") is None
    assert cluster.node_resources() is None


def test_resources_are_counted_by_nodes_that_have_some(api: Any, cluster: Cluster) -> None:
    nodes = [{"cpu": "4", "nvidia.com/gpu": "8"}, {"cpu": "4", "nvidia.com/gpu": "0"}, {"cpu": "2"}]
    items = [{"metadata": {"name": str(i)}, "status": {"allocatable": each}} for i, each in enumerate(nodes)]
    api.say("GET /api/v1/nodes", (200, {"metadata": {}, "items": items}))
    assert cluster.node_resources() == {"cpu": 3, "nvidia.com/gpu": 1}


def test_a_cluster_without_kueue_has_no_queue(api: Any, cluster: Cluster) -> None:
    api.say("GET /apis", (200, {"groups": [{"name": "apps", "preferredVersion": {"version": "v1"}}]}))
    assert cluster.queue_exists("gpus") is False
    kueue = {"name": "kueue.x-k8s.io", "preferredVersion": {"version": "v1beta2"}}
    api.say("GET /apis", (200, {"groups": [kueue]}))
    api.say("GET /apis/kueue.x-k8s.io/v1beta2/namespaces/mill/localqueues/gpus", (200, {"metadata": {"name": "gpus"}}))
    assert cluster.queue_exists("gpus") is True
    assert cluster.queue_exists("other") is False
