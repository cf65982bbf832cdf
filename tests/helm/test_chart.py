"""The chart, rendered by helm itself and read as the API server and millctl would read it."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from kubernetes import client
from pydantic import BaseModel

from mill_jobs.cli import mill
from mill_jobs.config import RunConfig
from mill_jobs.prefetch import READY, PrefetchSpec
from mill_k8s import chart, manifests, platform
from mill_k8s.platform import (
    FINALIZE_MAY,
    PLATFORM,
    PLATFORM_KEY,
    RUN_KEY,
    SUBMITTER_LOOKS_AT,
    SUBMITTER_MAY,
    PlatformConfig,
    parse_platform,
)
from mill_shared.errors import ExitCode

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/labelmill"
CI = sorted((CHART / "ci").glob("*-values.yaml"))
HELM = os.environ.get("HELM") or str(Path(sys.executable).parent / "helm")
"""HELM=... runs these tests with another version."""
KINDS: dict[str, type[BaseModel]] = {
    "ConfigMap": client.V1ConfigMap,
    "Job": client.V1Job,
    "NetworkPolicy": client.V1NetworkPolicy,
    "PersistentVolumeClaim": client.V1PersistentVolumeClaim,
    "Pod": client.V1Pod,
    "Role": client.V1Role,
    "RoleBinding": client.V1RoleBinding,
    "ServiceAccount": client.V1ServiceAccount,
}
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}

Object = dict[str, Any]


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=60, check=False)


def render(values: str, *sets: str, release: str = "labelmill") -> list[Object]:
    options = [option for each in sets for option in ("--set", each)]
    done = helm(
        "template", release, str(CHART), "--namespace=labelling", "--kube-version=1.33.0",
        f"--values={CHART}/ci/{values}-values.yaml", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item is not None]


def refusal(*sets: str) -> str:
    options = [option for each in sets for option in ("--set", each)]
    values = f"--values={CHART}/ci/minimal-values.yaml"
    done = helm("template", "labelmill", str(CHART), "--kube-version=1.33.0", values, *options)
    assert done.returncode != 0
    return done.stderr


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    found = [item for item in objects if item["kind"] == kind and item["metadata"]["name"].startswith(name)]
    assert len(found) == 1, [item["metadata"]["name"] for item in found]
    return found[0]


def platform_of(objects: list[Object]) -> PlatformConfig:
    return parse_platform(only(objects, "ConfigMap", PLATFORM)["data"][PLATFORM_KEY])


def pods(objects: list[Object]) -> Iterator[Object]:
    for item in objects:
        if item["kind"] == "Pod":
            yield item
        elif item["kind"] == "Job":
            yield item["spec"]["template"]


@pytest.fixture(scope="module", params=CI, ids=lambda path: path.name.removesuffix("-values.yaml"))
def example(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param.name.removesuffix("-values.yaml"))


def test_every_object_is_one_that_kubernetes_knows(example: list[Object]) -> None:
    for item in example:
        KINDS[item["kind"]].model_validate(item)
        assert item["metadata"]["namespace"] == "labelling"
        assert len(item["metadata"]["name"]) <= 63
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "labelmill"


def test_millctl_reads_what_the_chart_wrote(example: list[Object]) -> None:
    data = only(example, "ConfigMap", PLATFORM)["data"]
    assert platform_of(example).images.worker == "registry.example.org/labelmill-worker:0.1.0"
    assert RunConfig.model_validate(yaml.safe_load(data[RUN_KEY])).store == "s3://my-bucket/labels"


def test_every_pod_passes_the_restricted_standard_without_a_token(example: list[Object]) -> None:
    for pod in pods(example):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= RESTRICTED_VOLUMES
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            names = [item["name"] for item in container.get("env") or []]
            assert len(names) == len(set(names)), "server-side apply refuses two of one name"


def test_every_pod_runs_a_command_that_there_is(example: list[Object]) -> None:
    for pod in pods(example):
        (container,) = pod["spec"]["containers"]
        assert container["command"][:3] == ["tini", "--", "mill"]
        assert container["command"][3] in mill.commands
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(container["command"][4]).parent) in mounted
        assert CliRunner().invoke(mill, [container["command"][3], "--help"]).exit_code == 0


def test_values_pass_lint(tmp_path: Path) -> None:
    for path in CI:
        done = helm("lint", "--strict", "--quiet", str(CHART), "--kube-version=1.33.0", f"--values={path}")
        assert done.returncode == 0, f"{path.name}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("assignment", "place"),
    [
        ("platform.gpus.count=2", "gpus"),
        ("network_policy.s4.ports=1", "s4"),
        ("prefetch.volume.acces_mode=x", "acces_mode"),
        ("run.recipe.label.chat.modle=x", "modle"),
        ("replicas=3", "replicas"),
        ("platform.gpu.count=-1", "count"),
        ("prefetch.weights[0].revision=main", "revision"),
    ],
)
def test_misspelt_or_impossible_value_is_refused_by_name(assignment: str, place: str) -> None:
    assert place in refusal(assignment)


def test_what_is_required_is_asked_for() -> None:
    done = helm("template", "labelmill", str(CHART), "--kube-version=1.33.0")
    assert done.returncode != 0
    for name in ("worker", "control", "store", "images"):
        assert name in done.stderr


def test_older_kubernetes_is_refused() -> None:
    done = helm("template", "l", str(CHART), "--kube-version=1.32.9", f"--values={CHART}/ci/minimal-values.yaml")
    assert done.returncode != 0
    assert "1.33" in done.stderr


def test_large_numbers_stay_whole() -> None:
    data = only(render("minimal", "run.dataset.max_pixels=200000000"), "ConfigMap", PLATFORM)["data"]
    assert yaml.safe_load(data[RUN_KEY])["dataset"]["max_pixels"] == 200_000_000


def rights(role: Object) -> set[tuple[str, str, tuple[str, ...], bool]]:
    return {
        (group, resource, tuple(sorted(rule["verbs"])), "resourceNames" in rule)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def expected(permissions: tuple[platform.Permission, ...], named: bool) -> set[tuple[str, str, tuple[str, ...], bool]]:
    return {(each.group, each.resource, tuple(sorted(each.verbs)), named) for each in permissions}


def test_finalize_may_do_what_waiting_needs_and_nothing_else() -> None:
    objects = render("minimal")
    assert rights(only(objects, "Role", "labelmill-finalize")) == expected(FINALIZE_MAY, named=False)
    (subject,) = only(objects, "RoleBinding", "labelmill-finalize")["subjects"]
    assert subject["name"] == platform_of(objects).service_accounts.finalize


def test_submitter_may_do_what_millctl_needs_and_looks_at_the_rest_by_name() -> None:
    used = ("platform.queue=gpus", "platform.credentials_secret=keys", "platform.images.pull_secrets={a}")
    role = only(render("minimal", *used), "Role", "labelmill-submitter")
    assert rights(role) == expected(SUBMITTER_MAY, named=False) | expected(SUBMITTER_LOOKS_AT, named=True)
    named = {rule["resources"][0]: rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule}
    assert named == {
        "serviceaccounts": ["labelmill-worker", "labelmill-finalize"],
        "persistentvolumeclaims": ["labelmill-models"],
        "secrets": ["a", "keys"],
        "localqueues": ["gpus"],
    }


def test_submitter_sees_no_secret_where_none_is_used() -> None:
    role = only(render("existing-claim", "platform.models.claim=mine"), "Role", "labelmill-submitter")
    assert "secrets" not in {rule["resources"][0] for rule in role["rules"]}
    assert ["mine"] in [rule.get("resourceNames") for rule in role["rules"]]


def test_no_role_reaches_beyond_its_namespace(example: list[Object]) -> None:
    assert not [item for item in example if item["kind"].startswith("Cluster")]
    for role in (item for item in example if item["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])


def test_accounts_carry_no_token_but_the_submitters() -> None:
    automount = {
        item["metadata"]["name"]: item.get("automountServiceAccountToken", True)
        for item in render("workload-identity")
        if item["kind"] == "ServiceAccount"
    }
    assert automount == {"labelmill-worker": False, "labelmill-finalize": False, "labelmill-submitter": True}


def test_accounts_made_elsewhere_are_used_by_name() -> None:
    objects = render("accounts-elsewhere")
    assert not [item for item in objects if item["kind"] == "ServiceAccount"]
    assert {pod["spec"]["serviceAccountName"] for pod in pods(objects)} == {"gpu-jobs"}
    (subject,) = only(objects, "RoleBinding", "labelmill-submitter")["subjects"]
    assert subject == {"kind": "Group", "name": "labelling", "apiGroup": "rbac.authorization.k8s.io"}


def test_prefetch_fills_the_folder_that_runs_mount() -> None:
    objects = render("minimal")
    job, models = only(objects, "Job"), platform_of(objects).models
    assert models is not None
    assert models.prefetch_job == job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1] == f"/volume/{models.content}"
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [models.claim] == [only(objects, "PersistentVolumeClaim")["metadata"]["name"]]
    spec = PrefetchSpec.model_validate(
        yaml.safe_load(only(objects, "ConfigMap", "labelmill-pre")["data"]["prefetch.yaml"])
    )
    run = RunConfig.model_validate(yaml.safe_load(only(objects, "ConfigMap", PLATFORM)["data"][RUN_KEY]))
    assert run.recipe.name == "cotpl"
    assert run.recipe.label is not None
    needed = {run.recipe.label.masks.checkpoint, run.recipe.label.chat.model}  # type: ignore[union-attr]
    assert needed == {Path(models.mount_path) / source.path for source in spec.weights}


def test_prefetch_ends_at_once_on_what_no_retry_mends() -> None:
    rules = only(render("minimal"), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert rules[1]["onExitCodes"]["values"] == [manifests.USAGE, ExitCode.CONFIG]


def test_volume_filled_by_hand_gets_no_prefetch() -> None:
    objects = render("existing-claim")
    assert not [item for item in objects if item["kind"] in ("Job", "PersistentVolumeClaim")]
    models = platform_of(objects).models
    assert models is not None
    assert (models.claim, models.content, models.prefetch_job) == ("my-weights", "cotpl-2026-11", None)


def test_folder_is_named_by_the_weights_and_the_job_by_all_that_goes_into_it() -> None:
    def names(*sets: str) -> tuple[str, str]:
        models = platform_of(render("prefetch", *sets)).models
        assert models is not None
        assert models.content is not None
        assert models.prefetch_job is not None
        return models.content, models.prefetch_job

    content, job = names()
    assert names() == (content, job)
    for change in ("platform.images.control=other:1", "prefetch.weights[0].source=https://mirror.example.org/sam.pth"):
        same, other = names(change)
        assert same == content, "a mirror or an image changes nothing about the weights"
        assert other != job, "a Job cannot be changed"
    assert names(f"prefetch.weights[0].sha256={'0' * 64}")[0] != content


def test_upgrade_and_uninstall_keep_the_weights() -> None:
    claim = only(render("minimal"), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "storageClassName" not in claim["spec"]
    static = only(render("static-volume"), "PersistentVolumeClaim")["spec"]
    assert (static["storageClassName"], static["volumeName"]) == ("", "weights-on-node-1")


def test_network_policy_is_off_unless_asked_for() -> None:
    assert not [item for item in render("minimal") if item["kind"] == "NetworkPolicy"]


def test_network_policy_selects_the_pods_and_opens_what_each_needs() -> None:
    objects = render("network-policy")
    policies = {
        item["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: item["spec"]
        for item in objects
        if item["kind"] == "NetworkPolicy"
    }
    config = RunConfig.model_validate(yaml.safe_load(only(objects, "ConfigMap", PLATFORM)["data"][RUN_KEY]))
    request = manifests.make_request(config.model_copy(update={"run": "r"}), 3)
    facts = platform_of(objects)
    made = [
        manifests.label_job(request, 1, facts)["spec"]["template"],
        manifests.finalize_job(request, 1, facts)["spec"]["template"],
        manifests.task_job("t", request, ["probe"], facts)["spec"]["template"],
        *pods(objects),
    ]
    chosen = []
    for pod in made:
        labels = pod["metadata"]["labels"]
        fitting = [
            component for component, spec in policies.items()
            if spec["podSelector"]["matchLabels"].items() <= labels.items()
        ]  # fmt: skip
        assert len(fitting) == 1
        chosen += fitting
    assert sorted(chosen) == sorted(policies)

    def ports(component: str) -> list[int]:
        return sorted({port["port"] for rule in policies[component]["egress"] for port in rule["ports"]})

    assert ports("label") == [53, 8000, 9000]
    assert ports("finalize") == [53, 443, 6443, 9000]
    assert ports("task") == ports("probe") == [53, 9000]
    assert ports("prefetch") == [53, 443, 9000]
    for spec in policies.values():
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["ingress"] == []


def test_generated_files_are_fresh(tmp_path: Path) -> None:
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    chart.write_chart(tmp_path)
    for name in ("values.yaml", "values.schema.json", "README.md"):
        fresh = (tmp_path / name).read_text(encoding="utf-8")
        assert fresh == (CHART / name).read_text(encoding="utf-8"), f"run make chart: {name}"


def test_every_default_is_the_models_own() -> None:
    tree = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    minimal = yaml.safe_load((CHART / "ci/minimal-values.yaml").read_text(encoding="utf-8"))
    tree["platform"]["images"] |= minimal["platform"]["images"]
    tree["run"] |= minimal["run"]
    written = chart.ChartValues.model_validate(tree)
    left_out = {**minimal, "run": tree["run"]}
    assert written == chart.ChartValues.model_validate(left_out)


def test_every_section_of_the_schema_is_closed() -> None:
    tree = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert tree["additionalProperties"] is False
    assert not [name for name, part in tree["$defs"].items() if part.get("additionalProperties") is not False]


def test_versions_and_names_agree() -> None:
    facts = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert facts["version"] == facts["appVersion"] == project["version"]
    assert platform.READY == READY
