"""Segment Anything: every mask of a picture, the whole-object mask of each point only.

The method keeps the third of the three masks that SAM gives for a point. Source: specs/cotpl.md 1.3. Everything else
behaves as the segment-anything package does, without work for masks that are dropped anyway.

Precision: float32 and tf32 as named; bfloat16 and float16 run under autocast, so weights and normalisation stay float32
and products are rounded. Scores and masks are made from float32 logits in every precision.
"""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    calculate_stability_score,
    is_box_near_crop_edge,
    uncrop_masks,
)
from torchvision.ops.boxes import batched_nms

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.config import MaskGeneratorSettings, SamConfig
from mill_shared.models.device import one_line, prepare_torch, use_tf32
from mill_shared.models.protocols import Masks

WHOLE_OBJECT = 2
"""Index of the mask that is kept. Source: specs/cotpl.md 0, fact 1."""

_UNREADABLE = (
    OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, ImportError
)  # fmt: skip
"""What torch.load raises, depending on where a file stops making sense."""

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a SAM that is none of the official ones, as the JSON file beside its checkpoint spells them."""

    image_size: int
    patch_size: int
    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    encoder_global_attention: tuple[int, ...]
    window_size: int
    prompt_dim: int
    mask_in_channels: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_dim: int
    iou_head_depth: int
    iou_head_dim: int


class WholeObjectPredictor(SamPredictor):  # type: ignore[misc]  # segment_anything has no types
    """A predictor that gives one mask a point, and upscales only those that promise enough."""

    @torch.no_grad()
    def predict_whole(
        self, points: torch.Tensor, pred_iou_threshold: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict the whole object at each point.

        Args:
            points: (N, 2), in the frame of the model's input.
            pred_iou_threshold: masks that promise no more than this are left out; at 0 none is.

        Returns:
            keep: (N,) bool; logits: (K, H, W) of the kept in the crop's frame; ious: (K,).
        """
        labels = torch.ones(len(points), dtype=torch.int, device=points.device)
        sparse, dense = self.model.prompt_encoder(points=(points[:, None], labels[:, None]), boxes=None, masks=None)
        low_res, ious = self.model.mask_decoder(
            image_embeddings=self.features,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        ious = ious[:, WHOLE_OBJECT].float()
        keep = ious > pred_iou_threshold if pred_iou_threshold > 0 else torch.ones_like(ious, dtype=torch.bool)
        kept = low_res[keep, WHOLE_OBJECT : WHOLE_OBJECT + 1].float()
        logits = self.model.postprocess_masks(kept, self.input_size, self.original_size)
        return keep, logits[:, 0], ious[keep]


class WholeObjectGenerator(SamAutomaticMaskGenerator):  # type: ignore[misc]  # segment_anything has no types
    """The package's generator with one mask a point. Masks stay packed bits instead of run-length codes."""

    def __init__(self, model: Any, settings: MaskGeneratorSettings, points_per_batch: int) -> None:
        super().__init__(
            model,
            points_per_side=settings.points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=settings.pred_iou_threshold,
            stability_score_thresh=settings.stability_threshold,
            stability_score_offset=settings.stability_offset,
            box_nms_thresh=settings.box_nms_threshold,
            crop_n_layers=settings.crop_layers,
            crop_nms_thresh=settings.crop_nms_threshold,
            crop_overlap_ratio=settings.crop_overlap_ratio,
            crop_n_points_downscale_factor=settings.crop_point_downscale,
            min_mask_region_area=settings.min_mask_region_area_px,
        )
        self.predictor = WholeObjectPredictor(model)

    def _process_batch(
        self, points: NDArray[np.float64], im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        height, width = orig_size
        transformed = self.predictor.transform.apply_coords(points, im_size)
        keep, logits, ious = self.predictor.predict_whole(
            torch.as_tensor(transformed, device=self.predictor.device), self.pred_iou_thresh
        )
        data = MaskData(masks=logits, iou_preds=ious, points=torch.as_tensor(points)[keep.cpu()])
        threshold = self.predictor.model.mask_threshold
        data["stability_score"] = calculate_stability_score(data["masks"], threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > threshold
        data["boxes"] = batched_mask_to_box(data["masks"]).reshape(-1, 4)
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        masks = uncrop_masks(data["masks"], crop_box, height, width).cpu().numpy()
        data["rles"] = [np.packbits(mask) for mask in masks]
        del data["masks"]
        return data

    def _process_crop(
        self, image: NDArray[np.uint8], crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        data = super()._process_crop(image, crop_box, crop_layer_idx, orig_size)
        # Without masks the package leaves a tensor without columns here, on which its next step fails.
        data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4)
        return data

    def masks_of(self, image_rgb: NDArray[np.uint8]) -> Masks:
        """Return the masks of a (H, W, 3) picture in the package's order."""
        height, width = image_rgb.shape[:2]
        data = self._generate_masks(image_rgb)
        found = [np.unpackbits(bits, count=height * width).reshape(height, width).view(bool) for bits in data["rles"]]
        ious = np.asarray(data["iou_preds"], dtype=np.float32)
        stabilities = np.asarray(data["stability_score"], dtype=np.float32)
        masks = np.stack(found) if found else np.zeros((0, height, width), bool)
        if self.min_mask_region_area > 0 and len(masks):
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            order, masks = remove_small_regions(masks, self.min_mask_region_area, threshold)
            ious, stabilities = ious[order], stabilities[order]
        return Masks(masks, ious, stabilities)


def remove_small_regions(
    masks: NDArray[np.bool_], least_area_px: int, nms_threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Fill small holes, drop small islands, then drop boxes that became duplicates; unchanged masks win.

    Source: specs/cotpl.md 1.3 step 8.

    Args:
        masks: (N, H, W).
        least_area_px: holes and islands with fewer pixels are small.
        nms_threshold: IoU of boxes above which one is dropped.

    Returns:
        order: (K,) indices of the masks that stay, unchanged ones first; (K, H, W) the masks in that order.
    """
    cleaned = [clean_mask(mask, least_area_px) for mask in masks]
    changed = np.stack([mask for mask, _ in cleaned])
    scores = torch.tensor([float(not is_changed) for _, is_changed in cleaned])
    boxes = batched_mask_to_box(torch.from_numpy(changed)).float().reshape(-1, 4)
    order = batched_nms(boxes, scores, torch.zeros(len(boxes)), iou_threshold=nms_threshold).numpy()
    return order, changed[order]


def clean_mask(mask: NDArray[np.bool_], least_area_px: int) -> tuple[NDArray[np.bool_], bool]:
    """Return the mask with small holes filled and small islands gone, and whether that changed it.

    As segment_anything's remove_small_regions, first for holes, then for islands, but inside the mask's box.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return mask, False
    # From an even pixel, since OpenCV numbers components by blocks of 2 x 2, and the first of equal islands is kept.
    top, bottom = max(rows[0] - 1, 0) & ~1, min(rows[-1] + 2, mask.shape[0])
    left, right = max(columns[0] - 1, 0) & ~1, min(columns[-1] + 2, mask.shape[1])
    window = mask[top:bottom, left:right]
    labels, areas = _components(~window)
    small = areas < least_area_px
    small[0] = False
    if small.any():
        # A background piece at the window's rim goes on outside of it, so its area is larger than what is seen here.
        rim = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        if small[rim].any() and window.shape != mask.shape:
            window, (top, left) = mask, (0, 0)
            bottom, right = mask.shape
            labels, areas = _components(~window)
            small = areas < least_area_px
            small[0] = False
    filled = window | small[labels] if small.any() else window
    is_changed = bool(small.any())
    labels, areas = _components(filled)
    large = areas >= least_area_px
    large[0] = False
    if not large[1:].all():
        if not large.any():
            large[1 + int(areas[1:].argmax())] = True
        filled = large[labels]
        is_changed = True
    if not is_changed:
        return mask, False
    found = mask.copy()
    found[top:bottom, left:right] = filled
    return found, True


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return (labels, area of each label) of the 8-connected components; label 0 is what is outside them."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    return np.asarray(labels, np.int32), np.asarray(stats[:, cv2.CC_STAT_AREA], np.int64)


class SamMaskGenerator:
    """The MaskGenerator of a SAM checkpoint."""

    def __init__(self, config: SamConfig, settings: MaskGeneratorSettings) -> None:
        self._device = prepare_torch(config)
        self._tf32 = config.precision == "tf32"
        self._autocast = _AUTOCAST.get(config.precision)
        self._settings = settings
        self._points_per_batch = settings.points_per_batch
        try:
            self._model = load_sam(config.checkpoint, config.architecture).to(self._device).eval()
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"{config.checkpoint}: the device failed: {one_line(error)}") from error
        self._generator = WholeObjectGenerator(self._model, settings, self._points_per_batch)

    def generate(self, image_rgb: NDArray[np.uint8], image_id: int) -> Masks:
        """Return the masks of a (H, W, 3) picture.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceLostError: the device failed for the rest of this process.
        """
        use_tf32(self._tf32)
        try:
            with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                return self._generator.masks_of(image_rgb)
        except torch.OutOfMemoryError as error:
            full = one_line(error)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the device failed while masks were made: {one_line(error)}") from error
        # Raised out here, since the frames of the cause would keep the batch in memory.
        torch.cuda.empty_cache()
        raise DeviceMemoryError(full)

    def halve_batch(self) -> bool:
        """Decode half as many points at once; False at one."""
        if self._points_per_batch == 1:
            return False
        self._points_per_batch //= 2
        self._generator = WholeObjectGenerator(self._model, self._settings, self._points_per_batch)
        return True


def load_sam(checkpoint: Path, architecture: str) -> Any:
    """Load a SAM in the official checkpoint format.

    Args:
        checkpoint: the state dict.
        architecture: vit_h, vit_l, vit_b, or custom: sizes from the JSON file of the same name.

    Raises:
        ConfigError: missing, unreadable, or of another architecture.
    """
    if not checkpoint.is_file():
        raise ConfigError(
            f"SAM checkpoint {checkpoint}: no such file; put it there or correct recipe.label.masks.checkpoint"
        )
    model = (
        _build_custom(checkpoint.with_suffix(".json"))
        if architecture == "custom"
        else sam_model_registry[architecture]()
    )
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (*_UNREADABLE, RuntimeError) as error:
        raise ConfigError(
            f"SAM checkpoint {checkpoint}: no {architecture} state dict; check recipe.label.masks.architecture, "
            f"or copy the file again: {one_line(error)}"
        ) from error
    return model


def _build_custom(path: Path) -> Any:
    try:
        sizes = msgspec.json.decode(path.read_bytes(), type=Sizes)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"SAM sizes {path}: a custom architecture needs this file: {one_line(error)}") from error
    return build_sam(sizes)


def build_sam(sizes: Sizes) -> Any:
    """Return an untrained SAM of these sizes; all else is as in the official models."""
    side = sizes.image_size // sizes.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.encoder_dim,
            depth=sizes.encoder_depth,
            num_heads=sizes.encoder_heads,
            out_chans=sizes.prompt_dim,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.window_size,
            global_attn_indexes=sizes.encoder_global_attention,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.prompt_dim,
            image_embedding_size=(side, side),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=sizes.mask_in_channels,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_dim,
                mlp_dim=sizes.decoder_mlp_dim,
                num_heads=sizes.decoder_heads,
            ),
            transformer_dim=sizes.prompt_dim,
            iou_head_depth=sizes.iou_head_depth,
            iou_head_hidden_dim=sizes.iou_head_dim,
        ),
    )
