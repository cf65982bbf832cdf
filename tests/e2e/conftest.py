"""A real cluster, a real S3 server that its pods reach, and the chart installed in a namespace of the test's own.

KUBECONFIG        any cluster of Kubernetes 1.33 or newer with the images below on its nodes
E2E_HOST          address of this machine as the pods see it; the S3 server listens there
E2E_WORKER        image of the workers; default localhost/labelmill-worker:e2e
E2E_CONTROL       image without torch; default localhost/labelmill-control:e2e
E2E_GPU           name of the GPU resource; default nvidia.com/gpu
E2E_KUBELET_PID   process id of the node's kubelet, where it may be stopped; default: that test is left out
"""

import os
import shutil
import uuid
from collections.abc import Iterator

import pytest

from clusters import SCENES, Cluster, helm_install, make_namespace, platform_settings
from mill_jobs.demo.scenes import write_scenes
from seaweed import BUCKET, SeaweedFS


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The S3 server, with the scenes in it."""
    host = os.environ.get("E2E_HOST")
    assert host, "set E2E_HOST to the address of this machine as the pods see it"
    server = SeaweedFS(tmp_path_factory.mktemp("s3"), host)
    scenes = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(scenes, 5, SCENES)
    client = server.client()
    for path in sorted((scenes / "images").iterdir()):
        client.upload_file(str(path), BUCKET, f"scenes/{path.name}")
    client.upload_file(str(scenes / "base.json"), BUCKET, "base.json")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def cluster(server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A namespace under the restricted standard, with the platform installed by helm."""
    assert os.environ.get("KUBECONFIG"), "set KUBECONFIG to a cluster"
    assert shutil.which("kubectl"), "kubectl is not on the PATH"
    namespace = f"mill-{uuid.uuid4().hex[:6]}"
    cluster = Cluster(namespace, server, tmp_path_factory.mktemp("runs"))
    make_namespace(cluster)
    helm_install(cluster, platform_settings(), cluster.write_run("default").read_text())
    yield cluster
    cluster.kubectl("delete", "namespace", namespace, "--wait=false", check=False)
