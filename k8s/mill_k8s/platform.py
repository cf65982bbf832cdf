"""What a cluster is like: the facts that the chart writes down and `millctl` reads.

The chart's ConfigMap `labelmill-platform` has the same name whatever the release is called, since a namespace holds one
platform. Its key `platform.yaml` is a `PlatformConfig`; its key `run.yaml` is the default run file, which
`millctl submit` takes where none is given, and whose `store` and `storage` the chart's test and `millctl doctor` probe.
"""

from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mill_shared.config import Section
from mill_shared.errors import ConfigError

PLATFORM = "labelmill-platform"
"""Name of the ConfigMap."""
PLATFORM_KEY = "platform.yaml"
RUN_KEY = "run.yaml"
RUN_FOLDER = "/etc/labelmill"
"""Where a run's ConfigMap is mounted; the run file is `run.yaml` in it."""
CA_FOLDER = "/etc/labelmill-ca"
"""Where the ConfigMap with the certificate authority is mounted."""
READY = "READY"
"""Marker that the prefetch Job writes last into the weights' folder."""
NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
"""A name of a Kubernetes object."""
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
"""A quantity as Kubernetes writes it."""


class ImagesConfig(Section):
    """The two images. A digest (`name@sha256:...`) is better than a tag: it cannot change under a run."""

    worker: str = Field(min_length=1)
    """Image with the models; labels."""
    control: str = Field(min_length=1)
    """Image without torch; waits, finalizes, plans and probes."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node pulls."""
    pull_secrets: tuple[str, ...] = ()
    """Names of Secrets with the registry's credentials."""


class ServiceAccountsConfig(Section):
    """The accounts that pods run as. Annotations for the bucket's credentials belong to them."""

    worker: str = Field("labelmill-worker", pattern=NAME)
    """Account of the labelling pods: reads images, writes results, gets no API token."""
    finalize: str = Field("labelmill-finalize", pattern=NAME)
    """Account of the finalize pod: may get Jobs and list pods, nothing else."""


class GpuConfig(Section):
    """What a labelling pod asks for."""

    resource: str = Field("nvidia.com/gpu", min_length=1)
    """Name of the resource as nodes advertise it, e.g. `nvidia.com/mig-1g.10gb`."""
    count: int = Field(1, ge=0)
    """How many a pod; 0 labels on the CPU."""
    on_demand: bool = False
    """An autoscaler brings GPU nodes from none: then submit does not look for the resource on the nodes."""


class ResourcesConfig(Section):
    """What a container asks for and may use, as Kubernetes writes it."""

    requests: dict[str, str] = Field(default_factory=dict)
    """Resource -> quantity that is set aside, e.g. `cpu: "4"`; queues with quotas need it."""
    limits: dict[str, str] = Field(default_factory=dict)
    """Resource -> quantity that the container may not pass; above the memory limit it is killed (137)."""


class ModelsConfig(Section):
    """A volume with the weights, filled once."""

    claim: str = Field(pattern=NAME)
    """Name of the PersistentVolumeClaim."""
    content: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the volume that is mounted, named by the content's digest; default: the volume's root. submit goes on
    and workers start only when the file `READY` is in it."""
    mount_path: str = Field("/models", pattern=r"^/")
    """Where run files find the weights."""
    prefetch_job: str | None = Field(None, pattern=NAME)
    """Name of the Job that fills the folder; submit waits for its end. Without one the folder was filled by hand."""


class CaBundleConfig(Section):
    """A certificate authority of your own, for the bucket's server."""

    config_map: str = Field(pattern=NAME)
    """Name of the ConfigMap that holds it."""
    key: str = Field("ca.crt", min_length=1)
    """Key of the PEM text in it. Pods find it as `AWS_CA_BUNDLE`; a run file may name `/etc/labelmill-ca/<key>`."""


class PlatformConfig(Section):
    """A cluster's facts: the values `platform` of the chart."""

    images: ImagesConfig
    """Which images."""
    service_accounts: ServiceAccountsConfig = ServiceAccountsConfig()
    """Who the pods are."""
    gpu: GpuConfig = GpuConfig()
    """What a labelling pod labels on."""
    worker: ResourcesConfig = ResourcesConfig(
        requests={"cpu": "2", "memory": "16Gi", "ephemeral-storage": "2Gi"}, limits={"memory": "32Gi"}
    )
    """CPU, memory and disk of a labelling pod; the GPU is added to it."""
    finalize: ResourcesConfig = ResourcesConfig(
        requests={"cpu": "250m", "memory": "2Gi", "ephemeral-storage": "2Gi"}, limits={"memory": "8Gi"}
    )
    """CPU, memory and disk of the pod that waits and then finalizes."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that labelling pods may run on."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that labelling pods tolerate, as Kubernetes writes them. The finalize pod gets none."""
    priority_class: str | None = Field(None, pattern=NAME)
    """PriorityClass of labelling pods, e.g. a low one that lets others go first."""
    queue: str | None = Field(None, pattern=NAME)
    """LocalQueue of Kueue that label Jobs are submitted to."""
    models: ModelsConfig | None = None
    """Volume with the weights; none where they are in the image or are served over HTTP."""
    shared_memory: str = Field("1Gi", pattern=QUANTITY)
    """Size limit of `/dev/shm` in labelling pods; it counts as memory."""
    scratch: str = Field("10Gi", pattern=QUANTITY)
    """Size limit of `/tmp`, where finalize keeps its chunks: about 2 GiB for a million images."""
    credentials_secret: str | None = Field(None, pattern=NAME)
    """Secret whose keys become the environment of every pod, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Better
    is none, with annotations at the service accounts."""
    ca_bundle: CaBundleConfig | None = None
    """Certificate authority of the bucket's server; default: those of the image."""
    env: tuple[dict[str, Any], ...] = ()
    """More environment of every pod, as Kubernetes writes it; for the settings of libraries."""
    volumes: tuple[dict[str, Any], ...] = ()
    """More volumes of labelling pods, as Kubernetes writes them, e.g. a Secret with a chat server's key."""
    volume_mounts: tuple[dict[str, Any], ...] = ()
    """Where those volumes are mounted."""
    backoff_limit_per_index: int = Field(6, ge=0)
    """Times that a shard's pod is started again after a failure of its own; preemption and eviction do not count."""
    ttl_days: float = Field(7, gt=0)
    """Days after its end that a Job is kept with its pods and their logs; what it made stays in the bucket."""

    @model_validator(mode="after")
    def _mounts_name_volumes(self) -> "PlatformConfig":
        known = {volume.get("name") for volume in self.volumes}
        for mount in self.volume_mounts:
            if mount.get("name") not in known:
                raise ValueError(f"volume_mounts: {mount.get('name')!r} is none of `volumes`")
        return self


@dataclass(frozen=True)
class Permission:
    """A right in the run's namespace."""

    group: str
    """API group; empty for the core."""
    resource: str
    """Plural, with a subresource behind a slash."""
    verbs: tuple[str, ...]


SUBMITTER_MAY = (
    Permission("batch", "jobs", ("create", "delete", "get", "list", "patch")),
    Permission("", "configmaps", ("create", "delete", "get", "patch")),
    Permission("", "pods", ("get", "list")),
    Permission("", "pods/log", ("get",)),
)
"""What `millctl` needs. Whoever may create Jobs may run any image as any service account of the namespace."""
SUBMITTER_LOOKS_AT = (
    Permission("", "serviceaccounts", ("get",)),
    Permission("", "persistentvolumeclaims", ("get",)),
    Permission("", "secrets", ("get",)),
    Permission("kueue.x-k8s.io", "localqueues", ("get",)),
)
"""What submit and doctor look at before anything is rented; without the right they say that they cannot see."""
FINALIZE_MAY = (
    Permission("batch", "jobs", ("get",)),
    Permission("", "pods", ("list",)),
)
"""What the waiting finalize pod needs, and all it may have."""


def parse_platform(text: str) -> PlatformConfig:
    """Read `platform.yaml`.

    Raises:
        ConfigError: not YAML, or a field is missing, unknown or out of range; all faults in one line.
    """
    where = f"ConfigMap {PLATFORM}, {PLATFORM_KEY}"
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    try:
        return PlatformConfig.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or '(file)'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise ConfigError(f"{where}: {faults}; correct the chart's values and `helm upgrade`") from error
