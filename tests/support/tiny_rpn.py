"""A tiny proposal network: torchvision's modules, and their tensors under Detectron2's names."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

CHANNELS, HIDDEN = 8, 16

KEY_MAP = (
    (r"backbone\.body\.conv1\.(.*)", r"backbone.bottom_up.stem.conv1.\1"),
    (r"backbone\.body\.bn1\.(.*)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.(.*)", r"backbone.bottom_up.res{\1}.\2.conv\3.\4"),
    (r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.(.*)", r"backbone.bottom_up.res{\1}.\2.conv\3.norm.\4"),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0\.(.*)", r"backbone.bottom_up.res{\1}.\2.shortcut.\3"),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1\.(.*)", r"backbone.bottom_up.res{\1}.\2.shortcut.norm.\3"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.*)", r"backbone.fpn_lateral{{\1}}.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.*)", r"backbone.fpn_output{{\1}}.\2"),
    (r"rpn\.head\.conv\.0\.0\.(.*)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn\.head\.cls_logits\.(.*)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn\.head\.bbox_pred\.(.*)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_heads\.box_head\.fc(6|7)\.(.*)", r"roi_heads.box_head.fc[\1].\2"),
    (r"(roi_heads\.box_predictor\..*)", r"\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(.*)", r"roi_heads.mask_head.mask_fcn{\1}.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", r"roi_heads.mask_head.predictor.\1"),
)


def detectron_key(key: str) -> str:
    """Return what Detectron2 calls a tensor of torchvision's. In the map, {n} is n + 1, {{n}} n + 2, [n] n - 5."""
    for pattern, replacement in KEY_MAP:
        if re.fullmatch(pattern, key):
            found = re.sub(pattern, replacement, key)
            found = re.sub(r"\{\{(\d)\}\}", lambda match: str(int(match[1]) + 2), found)
            found = re.sub(r"\{(\d)\}", lambda match: str(int(match[1]) + 1), found)
            return re.sub(r"\[(\d)\]", lambda match: str(int(match[1]) - 5), found)
    raise AssertionError(key)


class Reference(torch.nn.Module):
    """Small modules of torchvision's, changed as the specification says."""

    def __init__(self) -> None:
        super().__init__()
        body = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=4, norm_layer=FrozenBatchNorm2d)
        for layer in (body.layer2, body.layer3, body.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.backbone = BackboneWithFPN(
            body, {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}, [256, 512, 1024, 2048], CHANNELS
        )
        self.rpn = torch.nn.Module()
        self.rpn.head = RPNHead(CHANNELS, 3)
        self.roi_heads = torch.nn.Module()
        self.roi_heads.box_head = TwoMLPHead(CHANNELS * 49, HIDDEN)
        predictor = torch.nn.Module()
        predictor.cls_score, predictor.bbox_pred = torch.nn.Linear(HIDDEN, 2), torch.nn.Linear(HIDDEN, 4)
        self.roi_heads.box_predictor = predictor


def make_reference(seed: int) -> Reference:
    """Return random modules whose normalisations are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    found = Reference()
    for name, values in found.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and values.dim() == 1):
            values.uniform_(0.5, 1.5, generator=generator)
        elif values.dim() == 1:
            values.normal_(0, 0.1, generator=generator)
        elif "bbox_pred" in name:
            values.normal_(0, 0.05, generator=generator)
        elif "cls_logits" in name:
            values.normal_(0, 1, generator=generator)
        else:
            values.normal_(0, values[0].numel() ** -0.5, generator=generator)
    return found.eval()


def detectron_state(reference: Reference) -> dict[str, Tensor]:
    """Return the tensors as a Detectron2 checkpoint names them."""
    return {detectron_key(key): value for key, value in reference.state_dict().items()}


def save_proposals(path: Path, seed: int = 3) -> Path:
    """Write a checkpoint and return its path."""
    torch.save({"model": detectron_state(make_reference(seed))}, path)
    return path
