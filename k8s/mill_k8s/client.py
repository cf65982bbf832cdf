"""The one place that talks to the Kubernetes API. Its errors leave as ours, with a way out in the message.

Answers are read into the types of `progress`, not into the client's own models: those refuse a field that they do not
know, and a newer server may add one.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec
import urllib3
from kubernetes import client, config
from kubernetes.client import ApiException
from pydantic import ValidationError

from mill_k8s.manifests import TOKEN_FOLDER, Object
from mill_k8s.progress import Job, Meta, Pod
from mill_shared.errors import ConfigError, ExitCode, MillError

TIMEOUT_S = (10.0, 60.0)
"""Seconds to connect, and without an answer."""
LOG_TIMEOUT_S = (10.0, 3600.0)
PAGE = 500
CONNECTIONS = 128
"""Logs that can be followed at the same time."""
FIELD_MANAGER = "millctl"
MESSAGE_CHARS = 500

T = TypeVar("T")
Named = Literal["serviceaccounts", "secrets", "persistentvolumeclaims", "configmaps"]
"""What can be asked for by name."""


class ClusterError(MillError):
    """The Kubernetes API does not answer, or not now. Trying again may help."""

    exit_code = ExitCode.OUTSIDE


class ForbiddenError(MillError):
    """The API refuses this user, or the cluster's policy refuses the object."""

    exit_code = ExitCode.CONFIG


class PendingError(MillError):
    """Pods could not start for too long."""

    exit_code = ExitCode.PENDING


class ConfigMap(msgspec.Struct, frozen=True):
    """A ConfigMap's name and content."""

    metadata: Meta
    data: Mapping[str, str] = {}


class Claim(msgspec.Struct, frozen=True):
    """A PersistentVolumeClaim's phase."""

    phase: str
    """`Bound`, `Pending` or `Lost`."""


class Cluster:
    """A namespace of a cluster. One object for one thread at a time, but logs."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._api = api
        self._batch, self._core = client.BatchV1Api(api), client.CoreV1Api(api)

    @classmethod
    def connect(cls, namespace: str | None = None, context: str | None = None) -> Self:
        """Connect as a pod does if this is one, else as kubectl does.

        Args:
            namespace: default: the pod's own, or that of the context.
            context: of the kubeconfig; default: its current one.

        Raises:
            ConfigError: neither a pod nor a kubeconfig that can be used.
        """
        settings = client.Configuration()
        settings.retries = False
        settings.connection_pool_maxsize = CONNECTIONS
        own = Path(TOKEN_FOLDER) / "namespace"
        try:
            if context is None and own.is_file():
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
                return cls(client.ApiClient(settings), namespace or own.read_text().strip())
            config.load_kube_config(context=context, client_configuration=settings)  # type: ignore[no-untyped-call]
            contexts, active = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError, TypeError) as error:
            raise ConfigError(f"no cluster: {_one_line(error)}; set KUBECONFIG, or name another --context") from error
        named = active if context is None else next(item for item in contexts if item["name"] == context)
        return cls(client.ApiClient(settings), namespace or named["context"].get("namespace") or "default")

    def version(self) -> tuple[int, int]:
        """Return major and minor version of the server."""
        found = self._call("the cluster's version", lambda: client.VersionApi(self._api).get_code(**_RAW))
        return int(found["major"]), int("".join(filter(str.isdigit, found["minor"])))

    def jobs(self, selector: str) -> list[Job]:
        """Return the Jobs with these labels."""
        return [msgspec.convert(item, Job) for item in self._list(self._batch.list_namespaced_job, "Jobs", selector)]

    def job(self, name: str) -> Job | None:
        """Return a Job; None where there is none."""
        found = self._maybe(f"Job {name}", lambda: self._batch.read_namespaced_job(name, self.namespace, **_RAW))
        return None if found is None else msgspec.convert(found, Job)

    def pods(self, selector: str) -> list[Pod]:
        """Return the pods with these labels."""
        return [msgspec.convert(item, Pod) for item in self._list(self._core.list_namespaced_pod, "pods", selector)]

    def config_map(self, name: str) -> ConfigMap | None:
        """Return a ConfigMap; None where there is none."""
        what = f"ConfigMap {name}"
        found = self._maybe(what, lambda: self._core.read_namespaced_config_map(name, self.namespace, **_RAW))
        return None if found is None else msgspec.convert(found, ConfigMap)

    def create(self, body: Object, *, dry_run: bool = False) -> bool:
        """Create a Job or a ConfigMap.

        Args:
            body: the object.
            dry_run: the server checks it and creates nothing.

        Returns:
            False where there is one of this name already.
        """
        creators: dict[str, Callable[..., Any]] = {
            "Job": self._batch.create_namespaced_job,
            "ConfigMap": self._core.create_namespaced_config_map,
        }
        create = creators[body["kind"]]
        what = f"{body['kind']} {body['metadata']['name']}"
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        try:
            self._call(
                what,
                lambda: create(
                    self.namespace, body, field_manager=FIELD_MANAGER, field_validation="Strict", **options, **_RAW
                ),
                exists=True,
            )
        except _ExistsError:
            return False
        return True

    def patch_job(self, name: str, changes: Object) -> bool:
        """Change a Job; False where there is none."""
        what = f"Job {name}"
        changed = self._maybe(what, lambda: self._batch.patch_namespaced_job(name, self.namespace, changes, **_RAW))
        return changed is not None

    def add_owners(self, config_map: str, owners: list[Object]) -> None:
        """Make Jobs owners of a ConfigMap, beside those it has."""
        changes = {"metadata": {"ownerReferences": owners}}
        self._call(
            f"ConfigMap {config_map}",
            lambda: self._core.patch_namespaced_config_map(config_map, self.namespace, changes, **_RAW),
        )

    def delete_job(self, name: str) -> bool:
        """Delete a Job and its pods; False where there is none."""
        gone = self._maybe(
            f"Job {name}",
            lambda: self._batch.delete_namespaced_job(name, self.namespace, propagation_policy="Background", **_RAW),
        )
        return gone is not None

    def delete_config_map(self, name: str) -> bool:
        """Delete a ConfigMap; False where there is none."""
        what = f"ConfigMap {name}"
        return (
            self._maybe(what, lambda: self._core.delete_namespaced_config_map(name, self.namespace, **_RAW)) is not None
        )

    def log(self, pod: str, container: str, *, tail: int | None = None, follow: bool = False) -> Iterator[str]:
        """Yield the lines of a container's log; none where the pod is gone or has not started."""
        options: dict[str, Any] = {"container": container, "follow": follow}
        if tail is not None:
            options["tail_lines"] = tail
        stream = self._maybe(
            f"the log of {pod}",
            lambda: self._core.read_namespaced_pod_log(
                pod, self.namespace, **options, _preload_content=False, _request_timeout=LOG_TIMEOUT_S
            ),
            raw=True,
        )
        if stream is None:
            return
        rest = b""
        try:
            for block in stream.stream(2**14, decode_content=True):
                *lines, rest = (rest + block).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except urllib3.exceptions.HTTPError:
            return  # the caller looks at the pod again
        finally:
            stream.release_conn()
        if rest:
            yield rest.decode(errors="replace")

    def exists(self, kind: Named, name: str) -> bool | None:
        """Return whether there is such an object; None where this user may not know."""
        readers: dict[str, Callable[..., Any]] = {
            "serviceaccounts": self._core.read_namespaced_service_account,
            "secrets": self._core.read_namespaced_secret,
            "persistentvolumeclaims": self._core.read_namespaced_persistent_volume_claim,
            "configmaps": self._core.read_namespaced_config_map,
        }
        read = readers[kind]
        return self._seen(lambda: self._maybe(name, lambda: read(name, self.namespace, **_RAW)) is not None)

    def claim(self, name: str) -> Claim | None:
        """Return a claim's phase; None where there is none, or this user may not know."""
        read = self._core.read_namespaced_persistent_volume_claim
        found = self._seen(lambda: self._maybe(name, lambda: read(name, self.namespace, **_RAW)))
        return None if not found else Claim(str(found.get("status", {}).get("phase", "")))

    def priority_class_exists(self, name: str) -> bool | None:
        """Return whether there is such a PriorityClass; None where this user may not know."""
        read = client.SchedulingV1Api(self._api).read_priority_class
        return self._seen(lambda: self._maybe(name, lambda: read(name, **_RAW)) is not None)

    def queue_exists(self, name: str) -> bool | None:
        """Return whether Kueue has such a LocalQueue here; None where this user may not know."""
        apis = client.CustomObjectsApi(self._api)
        groups = self._call("the API groups", lambda: client.ApisApi(self._api).get_api_versions(**_RAW))
        versions = [g["preferredVersion"]["version"] for g in groups["groups"] if g["name"] == "kueue.x-k8s.io"]
        if not versions:
            return False
        where = ("kueue.x-k8s.io", versions[0], self.namespace, "localqueues", name)
        return self._seen(
            lambda: self._maybe(name, lambda: apis.get_namespaced_custom_object(*where, **_RAW)) is not None
        )

    def node_resources(self) -> dict[str, int] | None:
        """Return resource -> nodes that have some of it; None where this user may not list nodes."""

        def count() -> dict[str, int]:
            found: dict[str, int] = {}
            for node in self._pages(lambda **page: self._core.list_node(**page, **_RAW), "nodes"):
                for name, amount in node.get("status", {}).get("allocatable", {}).items():
                    if amount != "0":
                        found[name] = found.get(name, 0) + 1
            return found

        return self._seen(count)

    def may(self, verb: str, group: str, resource: str, account: str | None = None) -> bool | None:
        """Return whether this user, or a service account of the namespace, may do something here; None: cannot know."""
        kind, _, sub = resource.partition("/")
        asked: Object = {
            "resourceAttributes": {
                "namespace": self.namespace, "verb": verb, "group": group, "resource": kind, "subresource": sub,
            }
        }  # fmt: skip
        access = client.AuthorizationV1Api(self._api)
        body: Any = {"apiVersion": "authorization.k8s.io/v1", "metadata": {}, "spec": asked}
        if account is None:
            answer = self._seen(
                lambda: self._call("rights", lambda: access.create_self_subject_access_review(body, **_RAW))
            )
        else:
            user = f"system:serviceaccount:{self.namespace}:{account}"
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"]
            asked |= {"user": user, "groups": groups}
            body["metadata"] = {"namespace": self.namespace}
            review = access.create_namespaced_local_subject_access_review
            answer = self._seen(lambda: self._call("rights", lambda: review(self.namespace, body, **_RAW)))
        return None if answer is None else bool(answer.get("status", {}).get("allowed"))

    def _list(self, method: Callable[..., Any], what: str, selector: str) -> Iterator[Object]:
        return self._pages(lambda **page: method(self.namespace, label_selector=selector, **page, **_RAW), what)

    def _pages(self, method: Callable[..., Any], what: str) -> Iterator[Object]:
        page: dict[str, Any] = {"limit": PAGE}
        while True:
            found = self._call(what, lambda page=dict(page): method(**page))  # type: ignore[misc]
            yield from found.get("items") or ()
            following = found.get("metadata", {}).get("continue")
            if not following:
                return
            page["_continue"] = following

    def _seen(self, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except ForbiddenError:
            return None

    def _maybe(self, what: str, request: Callable[[], Any], *, raw: bool = False) -> Any:
        try:
            return self._call(what, request, raw=raw)
        except _MissingError:
            return None

    def _call(self, what: str, request: Callable[[], Any], *, raw: bool = False, exists: bool = False) -> Any:
        try:
            answer = request()
            return answer if raw else json.loads(answer.data)
        except ApiException as error:
            raise self._error(what, error, exists=exists) from error
        except urllib3.exceptions.HTTPError as error:
            host = self._api.configuration.host
            raise ClusterError(f"{what}: the Kubernetes API at {host} does not answer: {_one_line(error)}") from error
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:5]
            )
            raise ConfigError(f"{what}: {faults}; correct the platform's values, then helm upgrade") from error

    def _error(self, what: str, error: ApiException, *, exists: bool) -> Exception:
        status, text = error.status or 0, _message(error)
        if status == 404 or (status == 400 and "waiting to start" in text):
            if text.startswith("namespaces "):
                return ConfigError(f"{what}: no namespace {self.namespace}; kubectl create namespace {self.namespace}")
            return _MissingError(what)
        if status == 409 and exists and "already exists" in text:
            return _ExistsError(what)
        if status == 401:
            return ForbiddenError(f"{what}: the cluster does not know this user ({text}); log in again")
        if status == 403:
            return ForbiddenError(f"{what} in namespace {self.namespace}: {text}; ask whoever installed the chart")
        if status in (400, 422):
            return ConfigError(f"{what}: the cluster refuses it: {text}")
        return ClusterError(f"{what}: the Kubernetes API answered {status}: {text}")


_RAW: dict[str, Any] = {"_preload_content": False, "_request_timeout": TIMEOUT_S}
"""Answers as they come, so that a field that the client does not know is no error."""


class _MissingError(Exception):
    """404."""


class _ExistsError(Exception):
    """409 on create."""


def _message(error: ApiException) -> str:
    try:
        return _one_line(json.loads(error.body or "")["message"])
    except (ValueError, TypeError, KeyError):
        return _one_line(error.body or error.reason or "")


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MESSAGE_CHARS else f"{text[: MESSAGE_CHARS - 3]}..."
