"""Small pictures inside JSON."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Levels of grey that are kept; noise compresses badly otherwise.
LEVELS = 16


def pack(images: Tensor) -> dict[str, Any]:
    """Images in sixteen levels of grey, as text.

    Args:
        images: ``(n, 1, H, W)``, brightness 0 to 1; what is beyond is cut off.
    """
    levels = (images.detach().float().clamp(0, 1) * (LEVELS - 1)).round().to(torch.uint8).cpu()
    data = zlib.compress(levels.contiguous().numpy().tobytes(), 9)
    return {"shape": list(images.shape), "data": base64.b64encode(data).decode()}


def unpack(packed: dict[str, Any]) -> Tensor:
    """The images again, ``(n, H, W)``, brightness 0 to 1."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    n, _, height, width = packed["shape"]
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(n, height, width) / (LEVELS - 1)
