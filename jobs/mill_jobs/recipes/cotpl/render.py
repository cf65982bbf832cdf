"""Pictures of regions for the chat model: the mask bright, the rest of its box grey and blurred, all else black.

Source: specs/cotpl.md 1.5. Pixel-identical to the original's rendering; the boosted picture is made once per image.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

SATURATION_GAIN = 1.5
VALUE_GAIN = 1.2
BLUR_KERNEL_PX = 31
RECTANGLE_GREEN_RGB = (0, 255, 0)
RECTANGLE_THICKNESS_PX = 2


def boost_colours(image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Raise saturation and value of a whole picture.

    Args:
        image_rgb: (H, W, 3).

    Returns:
        (H, W, 3): OpenCV 8-bit HSV with S x 1.5 and V x 1.2, clipped to 255 and truncated.
    """
    hsv = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2HSV)
    levels = np.arange(256, dtype=np.float32)
    for channel, gain in ((1, SATURATION_GAIN), (2, VALUE_GAIN)):
        table = np.clip(levels * np.float32(gain), 0, 255).astype(np.uint8)
        hsv[..., channel] = cv2.LUT(hsv[..., channel], table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8)


def render_region(
    image_rgb: NDArray[np.uint8],
    boosted_rgb: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    bbox_xywh: tuple[int, int, int, int],
) -> NDArray[np.uint8]:
    """Draw one region at full frame size.

    Args:
        image_rgb: (H, W, 3), the picture.
        boosted_rgb: (H, W, 3), `boost_colours` of it.
        mask: (H, W), the region.
        bbox_xywh: x, y, and the inclusive extent (xmax - xmin, ymax - ymin) of the mask, pixels.

    Returns:
        (H, W, 3): black, in the box blurred grey, on the mask the boosted colours, a green rectangle over all.
    """
    x, y, w, h = bbox_xywh
    canvas = np.zeros(image_rgb.shape, np.uint8)
    crop = image_rgb[y : y + h, x : x + w]
    if crop.size:
        grey = cv2.GaussianBlur(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (BLUR_KERNEL_PX, BLUR_KERNEL_PX), 0)
        canvas[y : y + h, x : x + w] = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    box = slice(y, y + h + 1), slice(x, x + w + 1)
    # A hundred times faster than indexing with the mask.
    cv2.copyTo(boosted_rgb[box], mask[box].view(np.uint8), canvas[box])
    cv2.rectangle(canvas, (x, y), (x + w, y + h), RECTANGLE_GREEN_RGB, RECTANGLE_THICKNESS_PX)
    return canvas
