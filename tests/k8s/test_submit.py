"""What submit decides, and what it refuses before anything is rented."""

from typing import Any

import msgspec
import pytest

from mill_jobs.config import RunConfig, parse_config
from mill_k8s.client import Cluster
from mill_k8s.doctor import check_platform, check_rights
from mill_k8s.manifests import CANCELLED_NOTE, Object, Request, config_map, finalize_job, label_job, make_request
from mill_k8s.platform import PlatformConfig
from mill_k8s.progress import Attempt, Job
from mill_k8s.submit import decide, require_reachable, require_same_run, with_run_id
from mill_shared.errors import ConfigError

MAPS = "/api/v1/namespaces/mill/configmaps"
ENDED = {"Complete": "complete", "Failed": "failed"}


@pytest.fixture
def platform() -> PlatformConfig:
    return PlatformConfig.model_validate({"images": {"worker": "w", "control": "c"}})


def as_job(body: Object, end: str | None = None, *, cancelled: bool = False) -> Job:
    conditions = [{"type": end, "status": "True"}] if end else []
    meta = body["metadata"]
    notes = {**meta["annotations"], **({CANCELLED_NOTE: "now"} if cancelled else {})}
    job = {**body, "metadata": {**meta, "annotations": notes}, "status": {"conditions": conditions}}
    return msgspec.convert(job, Job)


def attempt(
    request: Request, platform: PlatformConfig, number: int = 1, *, label: str | None = None,
    finalize: str | None = None, cancelled: bool = False,
) -> Attempt:  # fmt: skip
    return Attempt(
        number,
        as_job(label_job(request, number, platform), label, cancelled=cancelled),
        as_job(finalize_job(request, number, platform), finalize, cancelled=cancelled),
    )


def test_the_first_submit_makes_attempt_one(config: RunConfig) -> None:
    assert (decide([], make_request(config, 12)).attempt, decide([], make_request(config, 12)).create) == (1, True)


def test_the_same_again_changes_nothing_while_it_runs_and_when_it_is_done(
    config: RunConfig, platform: PlatformConfig
) -> None:
    request = make_request(config, 12)
    for ends in ((None, None), ("Complete", None), ("Failed", None), ("Complete", "Complete")):
        found = decide([attempt(request, platform, 3, label=ends[0], finalize=ends[1])], request)
        assert (found.attempt, found.create) == (3, False), ends


@pytest.mark.parametrize(
    ("label", "finalize", "cancelled"),
    [("Failed", "Failed", False), ("Failed", "Complete", False), ("Complete", "Failed", False), (None, None, True)],
)
def test_an_attempt_that_failed_or_was_cancelled_is_followed_by_the_next(
    label: str | None, finalize: str | None, cancelled: bool, config: RunConfig, platform: PlatformConfig
) -> None:
    before = attempt(make_request(config, 12), platform, 2, label=label, finalize=finalize, cancelled=cancelled)
    for shards in (12, 5):
        found = decide([before], make_request(config, shards))
        assert (found.attempt, found.create) == (3, True)


def test_something_else_is_refused_while_an_attempt_is_at_work(config: RunConfig, platform: PlatformConfig) -> None:
    live = [attempt(make_request(config, 12), platform, 2)]
    other = config.model_copy(update={"store": "s3://other/place"})
    for request, says in (
        (make_request(config, 5), "12 shards, not 5"),
        (make_request(other, 12), "another run file (ConfigMap birds-"),
        (make_request(config, 12, label_options=("--one-by-one",)), "label options 'none', not '--one-by-one'"),
        (make_request(config, 12, pilot=64), "12 shards, not 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            decide(live, request)
        assert says in str(caught.value)
        assert "attempt 2 is at work" in str(caught.value)
        assert "millctl cancel birds" in str(caught.value)


def test_the_whole_run_follows_its_pilot(config: RunConfig, platform: PlatformConfig) -> None:
    pilot = attempt(make_request(config, 12, pilot=64), platform, 1, label="Complete", finalize="Complete")
    assert decide([pilot], make_request(config, 12)).create


def test_parallelism_changes_on_the_fly(config: RunConfig, platform: PlatformConfig) -> None:
    live = [attempt(make_request(config, 12, parallelism=4), platform)]
    assert decide(live, make_request(config, 12)).parallelism is None, "not asked for"
    assert decide(live, make_request(config, 12, parallelism=4)).parallelism is None
    found = decide(live, make_request(config, 12, parallelism=40))
    assert (found.create, found.parallelism) == (False, 12)
    done = [attempt(make_request(config, 12, parallelism=4), platform, label="Complete")]
    assert decide(done, make_request(config, 12, parallelism=8)).parallelism is None


def test_another_run_under_the_same_id_is_refused_by_its_fields(
    config: RunConfig, platform: PlatformConfig, api: Any, cluster: Cluster
) -> None:
    request = make_request(config, 12)
    api.say(f"GET {MAPS}/{request.config_map}", (200, config_map(request)))
    before = [attempt(request, platform, label="Failed", finalize="Failed")]
    moved = config.model_copy(update={"store": "s3://elsewhere/labels"})
    require_same_run(cluster, before, moved)
    sharding = config.sharding.model_copy(update={"chunk_size": 64})
    with pytest.raises(ConfigError, match=r"sharding\.chunk_size: 32 before, 64 now"):
        require_same_run(cluster, before, config.model_copy(update={"sharding": sharding}))
    api.answers.clear()
    require_same_run(cluster, before, config.model_copy(update={"sharding": sharding}))  # gone: the store decides


def test_a_run_without_an_id_gets_one_that_follows_from_what_it_is(config: RunConfig) -> None:
    nameless = config.model_copy(update={"run": None})
    named = with_run_id(nameless)
    assert named.run is not None
    assert named.run.startswith("cotpl-")
    assert with_run_id(nameless.model_copy(update={"store": "s3://elsewhere/x"})).run == named.run
    dataset = config.dataset.model_copy(update={"images": "s3://bucket/others"})
    assert with_run_id(nameless.model_copy(update={"dataset": dataset})).run != named.run
    assert with_run_id(config) is config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("store: ./labels", "store: ./labels is a path, and pods share none"),
        ("finalize: {base: base.json, base_classes: ov-coco-48}", "finalize.base: base.json is a path"),
        ("dataset: {images: /data/photos}", "dataset.images: no pod has /data/photos"),
        ("dataset: {images: 's3://b/i', coco: /data/x.json}", "dataset.coco: no pod has /data/x.json"),
    ],
)
def test_paths_of_this_machine_are_refused(change: str, says: str, config: RunConfig, platform: PlatformConfig) -> None:
    import yaml

    tree = {**config.model_dump(mode="json", exclude_unset=True), **yaml.safe_load(change)}
    with pytest.raises(ConfigError) as caught:
        require_reachable(parse_config(yaml.safe_dump(tree), "run.yaml"), platform)
    assert says in str(caught.value)


def test_a_mounted_path_is_fine(config: RunConfig, everything: PlatformConfig) -> None:
    dataset = config.dataset.model_copy(update={"images": "/etc/chat/images"})
    require_reachable(config.model_copy(update={"dataset": dataset}), everything)


def healthy(api: Any) -> None:
    api.say("GET /version", (200, {"major": "1", "minor": "34+"}))
    for account in ("w", "f"):
        api.say(f"GET /api/v1/namespaces/mill/serviceaccounts/{account}", (200, {"metadata": {"name": account}}))
    for secret in ("bucket", "registry"):
        api.say(f"GET /api/v1/namespaces/mill/secrets/{secret}", (200, {"metadata": {"name": secret}}))
    api.say(f"GET {MAPS}/authority", (200, {"metadata": {"name": "authority"}}))
    claim = {"metadata": {"name": "weights"}, "status": {"phase": "Bound"}}
    api.say("GET /api/v1/namespaces/mill/persistentvolumeclaims/weights", (200, claim))
    prefetch = {"metadata": {"name": "p"}, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    api.say("GET /apis/batch/v1/namespaces/mill/jobs/labelmill-prefetch-0a1b2c", (200, prefetch))
    kueue = {"name": "kueue.x-k8s.io", "preferredVersion": {"version": "v1beta2"}}
    api.say("GET /apis", (200, {"groups": [kueue]}))
    api.say("GET /apis/kueue.x-k8s.io/v1beta2/namespaces/mill/localqueues/gpus", (200, {"metadata": {"name": "gpus"}}))
    api.say("GET /apis/scheduling.k8s.io/v1/priorityclasses/backfill", (200, {"metadata": {"name": "backfill"}}))
    node = {"metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/mig-1g.10gb": "7"}}}
    api.say("GET /api/v1/nodes", (200, {"metadata": {}, "items": [node]}))


def test_a_healthy_cluster_has_no_problems(api: Any, cluster: Cluster, everything: PlatformConfig) -> None:
    healthy(api)
    assert {finding.level for finding in check_platform(cluster, everything)} == {"ok"}


GONE = (404, {"message": "not found"})


@pytest.mark.parametrize(
    ("request_", "answer", "level", "says"),
    [
        ("GET /version", (200, {"major": "1", "minor": "32"}), "problem", "Kubernetes 1.32 is older than 1.33"),
        ("GET /api/v1/namespaces/mill/serviceaccounts/w", GONE, "problem", "service account w does not exist"),
        ("GET /api/v1/namespaces/mill/secrets/bucket", GONE, "problem", "create secret generic bucket"),
        ("GET /api/v1/namespaces/mill/secrets/bucket", (403, {}), "cannot see", "Secret bucket"),
        ("GET /api/v1/namespaces/mill/persistentvolumeclaims/weights", GONE, "problem", "platform.models.claim"),
        (
            "GET /apis/batch/v1/namespaces/mill/jobs/labelmill-prefetch-0a1b2c",
            (200, {"metadata": {"name": "p"}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}}),
            "problem",
            "logs job/labelmill-prefetch-0a1b2c says why",
        ),
        ("GET /apis", (200, {"groups": []}), "problem", "queue gpus does not exist"),
        ("GET /apis/scheduling.k8s.io/v1/priorityclasses/backfill", GONE, "problem", "platform.priority_class"),
        (
            "GET /api/v1/nodes",
            (200, {"items": [{"status": {"allocatable": {"cpu": "4", "nvidia.com/gpu": "8"}}}]}),
            "problem",
            "no node has nvidia.com/mig-1g.10gb; nodes offer: nvidia.com/gpu",
        ),
        ("GET /api/v1/nodes", (403, {}), "cannot see", "no right to list nodes"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    request_: str, answer: tuple[int, object], level: str, says: str, api: Any, cluster: Cluster,
    everything: PlatformConfig,
) -> None:  # fmt: skip
    healthy(api)
    api.say(request_, answer)
    [found] = [finding for finding in check_platform(cluster, everything) if finding.level != "ok"]
    assert found.level == level
    assert says in found.text


def test_rights_are_checked_in_both_directions(api: Any, cluster: Cluster, platform: PlatformConfig) -> None:
    own = "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    others = "POST /apis/authorization.k8s.io/v1/namespaces/mill/localsubjectaccessreviews"
    api.say(own, (201, {"status": {"allowed": True}}))
    api.say(others, (403, {"message": "forbidden"}))
    assert {finding.level for finding in check_rights(cluster, platform)} == {"ok", "cannot see"}
    api.say(others, (201, {"status": {"allowed": True}}))
    found = [finding.text for finding in check_rights(cluster, platform) if finding.level == "problem"]
    assert len(found) == 2
    assert all("which no pod of a run needs" in text for text in found)
    api.say(own, (201, {"status": {"allowed": False}}))
    api.say(others, (201, {"status": {"allowed": False}}))
    found = [finding.text for finding in check_rights(cluster, platform) if finding.level == "problem"]
    assert any(text.startswith("you: jobs: may not create, delete") for text in found)
    assert any("finalize would wait blindly" in text for text in found)
