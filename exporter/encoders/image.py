"""Images to pixel values, over pillow and NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import RequestError

Array = np.ndarray
_BILINEAR = 2


@dataclass(frozen=True)
class ImageSettings:
    """What ``preprocessor_config.json`` says, in the order in which it is done.

    Attributes:
        resize: (height, width) to resize to, or ``None``.
        shortest_edge: Length of the shorter side to resize to, keeping proportions, or ``None``.
        longest_edge: Limit of the longer side, with `shortest_edge`.
        resample: Pillow's number of the resampling filter.
        crop: (height, width) of the centre that is cut out, or ``None``.
        scale: Factor that pixel values are multiplied with.
        mean: Per channel, subtracted after scaling; empty: no normalization.
        std: Per channel, divided by.
    """

    resize: tuple[int, int] | None
    shortest_edge: int | None
    longest_edge: int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ImageSettings:
        """Read the settings.

        Raises:
            RequestError: A key is missing or holds what is not understood.
        """
        crop = _crop(config)
        resize, shortest, longest = _size(config, square=crop is None)
        if config.get("crop_pct"):
            raise RequestError("crop_pct in preprocessor_config.json is not supported", config["crop_pct"])
        if config.get("do_pad"):
            raise RequestError("padding images (do_pad in preprocessor_config.json) is not supported", True)
        normalizes = config.get("do_normalize", True)
        if normalizes and not (config.get("image_mean") and config.get("image_std")):
            raise RequestError(
                "preprocessor_config.json normalizes and names no image_mean and image_std", None, "Add them"
            )
        return cls(
            resize=resize,
            shortest_edge=shortest,
            longest_edge=longest,
            resample=int(config.get("resample", _BILINEAR)),
            crop=crop,
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=tuple(map(float, config["image_mean"])) if normalizes else (),
            std=tuple(map(float, config["image_std"])) if normalizes else (),
        )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, or ``None`` where it depends on the image."""
        return self.crop or self.resize


@dataclass(frozen=True)
class ImageEncoder:
    """Images to ``pixel_values``."""

    settings: ImageSettings

    @classmethod
    def load(cls, folder: Path) -> ImageEncoder:
        """Read the pre-processing of a model folder.

        Raises:
            RequestError: ``preprocessor_config.json`` is missing or not understood.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise RequestError(
                "the folder has no preprocessor_config.json", folder, "Images cannot be prepared without"
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"preprocessor_config.json is not valid JSON ({error})", path) from error
        return cls(ImageSettings.from_config(config))

    def encode(self, images: Sequence[Any]) -> dict[str, Array]:
        """Images as model inputs.

        Args:
            images: Paths, `PIL.Image` objects, or uint8 arrays (height, width, 3).

        Returns:
            ``pixel_values``: float32, (batch, 3, height, width).
        """
        if not images:
            raise RequestError("there is no image to encode", "[]", "Give at least one")
        arrays = [self._one(image) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise RequestError(
                "images come out in different sizes",
                ", ".join(str(array.shape) for array in arrays),
                "Encode them singly",
            )
        return {"pixel_values": np.stack(arrays)}

    def _one(self, image: Any) -> Array:
        picture = open_image(image)
        settings = self.settings
        height, width = picture.height, picture.width
        if settings.resize is not None:
            height, width = settings.resize
        elif settings.shortest_edge is not None:
            height, width = _keep_proportions(height, width, settings.shortest_edge, settings.longest_edge)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), resample=settings.resample)
        pixels = np.asarray(picture)
        if settings.crop is not None:
            pixels = _centre(pixels, *settings.crop)
        values = pixels.astype(np.float64) * settings.scale
        values = values.astype(np.float32)
        if settings.mean:
            values = (values - np.asarray(settings.mean, np.float32)) / np.asarray(settings.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def open_image(image: Any) -> Any:
    """A `PIL.Image` in RGB from a path, an image or a uint8 array (height, width, 3).

    A photograph that says how it was held (EXIF) is turned upright, as `transformers` does.

    Raises:
        RequestError: It is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise RequestError("an image array must be uint8, (height, width, 3)", f"{image.dtype} {image.shape}")
        return Image.fromarray(image)
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise RequestError("there is no such image", image) from error
    except (UnidentifiedImageError, OSError) as error:
        raise RequestError("the image cannot be read", image, str(error)) from error


def _size(config: dict[str, Any], *, square: bool) -> tuple[tuple[int, int] | None, int | None, int | None]:
    size = config.get("size")
    if not config.get("do_resize", True):
        return None, None, None
    if isinstance(size, int):
        # Older configurations: a lone number is the shorter side where a crop follows, else both sides.
        return ((size, size), None, None) if square else (None, size, None)
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return (int(size["height"]), int(size["width"])), None, None
    if isinstance(size, dict) and "shortest_edge" in size:
        longest = size.get("longest_edge")
        return None, int(size["shortest_edge"]), None if longest is None else int(longest)
    raise RequestError("the size in preprocessor_config.json is not understood", size, "Give height and width")


def _crop(config: dict[str, Any]) -> tuple[int, int] | None:
    size = config.get("crop_size")
    if not config.get("do_center_crop", False) or size is None:
        return None
    if isinstance(size, int):
        return size, size
    return int(size["height"]), int(size["width"])


def _keep_proportions(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    short, long = sorted((height, width))
    new_short, new_long = shortest, int(shortest * long / short)
    if longest is not None and new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_short, new_long) if height <= width else (new_long, new_short)


def _centre(pixels: Array, height: int, width: int) -> Array:
    """The centre of an image (height, width, channel); zeros where the image is smaller."""
    have_height, have_width = pixels.shape[:2]
    if have_height < height or have_width < width:
        padded = np.zeros((max(height, have_height), max(width, have_width), pixels.shape[2]), pixels.dtype)
        top = (padded.shape[0] - have_height + 1) // 2
        left = (padded.shape[1] - have_width + 1) // 2
        padded[top : top + have_height, left : left + have_width] = pixels
        pixels = padded
        have_height, have_width = pixels.shape[:2]
    top, left = (have_height - height) // 2, (have_width - width) // 2
    return pixels[top : top + height, left : left + width]
