"""Images, by the image processor of the model that takes them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fda.data.encoding import EncodedRow, Encoder, Taker
from hf_fda.data.tables import Row
from hf_fda.errors import InputError
from hf_fda.hub import first_line


class Images(Encoder):
    """Images for classifiers.

    Args:
        processor: the model's.
        taker: the model.
        column: of images, or of the files they are in.
        folder: where these files' names start from.
    """

    padding: Mapping[str, int] = {}

    def __init__(self, processor: Any, taker: Taker, column: str, folder: Path) -> None:
        self.padding = {}
        self.processor, self.taker, self.column, self.folder = processor, taker, column, folder
        vision = getattr(taker.layout.config, "vision_config", taker.layout.config)
        self._colours = getattr(vision, "num_channels", 3) == 3

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        value = row.get(self.column)
        if value is None:
            return None
        image = self._opened(value)
        if self._colours and hasattr(image, "convert"):
            image = image.convert("RGB")
        try:
            found = self.processor(images=image, return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.taker.label}: its processor does not take an image ({first_line(error)})"
            ) from None
        return EncodedRow({name: tensor[0] for name, tensor in self.taker.taken(found).items()})

    def _opened(self, value: Any) -> Any:
        """An image from what a column holds of it: itself, its file's name, or its file's content."""
        if isinstance(value, str):
            value = {"path": str(self.folder / value), "bytes": None}
        if not isinstance(value, Mapping):
            return value
        try:
            from PIL import Image
        except ImportError:
            raise InputError(f"{self.taker.label}: images are read by Pillow: pip install pillow") from None
        content = value.get("bytes")
        try:
            return Image.open(value["path"] if content is None else io.BytesIO(content))
        except OSError as error:
            raise InputError(f"{self.taker.label}: an image cannot be read ({first_line(error)})") from None
