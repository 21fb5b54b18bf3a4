"""A figure measured in pixels from its upper left corner, so that one cell of a mask is a whole number of pixels.

The one file that imports matplotlib, and only when something is drawn.
"""

from pathlib import Path

import numpy as np

from sglang_mm.errors import ConfigError

DPI = 100
POINTS = 72 / DPI
"""Of one pixel."""
CHARACTER = 0.6
"""Width of a character of text over its height; an upper estimate for what pictures say."""


class Sheet:
    """width, height in pixels. Raises ConfigError without matplotlib."""

    def __init__(self, width: int, height: int):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            allowed = "an environment with matplotlib"
            raise ConfigError("a picture without matplotlib", allowed, "pip install 'sglang_mm[draw]'") from error
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        """pixels: uint8 [h, w, 3], set down unscaled."""
        self.figure.figimage(pixels, x, self.height - y - len(pixels), origin="upper", zorder=-1)

    def text(self, x: float, y: float, words: str, size: float = 13, **how) -> None:
        """size: height in pixels. x, y: of the upper left corner, unless ha and va say otherwise."""
        how = {"ha": "left", "va": "top"} | how
        self.figure.text(x / self.width, 1 - y / self.height, words, fontsize=size * POINTS, **how)

    def swatch(self, x: float, y: float, color, size: int = 13) -> None:
        self.box(x, y, size, size, facecolor=color, edgecolor="#555555", linewidth=0.5)

    def box(self, x: float, y: float, width: float, height: float, **how) -> None:
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1 - (y + height) / self.height)
        size = width / self.width, height / self.height
        self.figure.add_artist(Rectangle(corner, *size, transform=self.figure.transFigure, **how))

    def axes(self, x: int, y: int, width: int, height: int, columns: float, rows: float):
        """Transparent axes over an image, from (0, 0) in its upper left corner to (columns, rows)."""
        place = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        axes = self.figure.add_axes(place, facecolor="none", xlim=(0, columns), ylim=(rows, 0))
        axes.tick_params(labelsize=11 * POINTS, length=3, width=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        return axes

    def save(self, path: str | Path) -> Path:
        """Write a PNG. Raises ConfigError where that fails."""
        path = Path(path)
        try:
            self.figure.savefig(path, format="png", dpi=DPI)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", "a file that can be written", "name another file") from error
        return path
