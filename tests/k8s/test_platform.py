"""Reading what the chart wrote."""

import pytest

from mill_k8s.platform import PlatformConfig, parse_platform
from mill_shared.errors import ConfigError

IMAGES = "images: {worker: w, control: c}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Input should be a valid dictionary"),
        ("images: {worker: w}", "images.control: Field required"),
        (f"{IMAGES}gpus: 3", "gpus: Extra inputs are not permitted"),
        (f"{IMAGES}gpu: {{count: -1}}", "gpu.count"),
        (f"{IMAGES}shared_memory: 1 GB", "shared_memory"),
        (f"{IMAGES}volume_mounts: [{{name: x, mountPath: /x}}]", "'x' is none of `volumes`"),
        ("images: [", "platform.yaml"),
    ],
)
def test_a_fault_names_the_field_and_the_way_out(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_platform(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dumped_platform_reads_back_the_same(everything: PlatformConfig) -> None:
    assert PlatformConfig.model_validate(everything.model_dump(mode="json")) == everything
