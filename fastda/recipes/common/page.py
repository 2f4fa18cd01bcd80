"""Report pages: one self-contained HTML file each, pictures and plots inside."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def environment(folder: Path) -> Any:
    """The jinja2 environment for the templates in `folder`, which may extend `page.html.j2`; plots set up."""
    import matplotlib
    from jinja2 import Environment, FileSystemLoader

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "path", "svg.hashsalt": "fastda", "font.family": "DejaVu Sans"}
    )
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]), autoescape=True, trim_blocks=True
    )


def svg(figure: Any, wide: bool = True) -> str:
    """The figure as inline SVG; identifiers made unique, since all figures share one page."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=NO_METADATA)
    plt.close(figure)
    text = buffer.getvalue()
    prefix = f"f{zlib.crc32(text.encode())}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = text[text.index("<svg") :]
    return text if wide else re.sub(r"<svg ", '<svg class="narrow" ', text, count=1)


def png(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_json(value: Any) -> str:
    """JSON text; numbers that JSON has no words for become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def spread(count: int, wanted: int) -> torch.Tensor:
    """At most `wanted` of the indices 0 to count − 1, evenly, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()
