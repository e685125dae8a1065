"""Colours on a dark page: the same hue, bright enough to be seen there."""

from __future__ import annotations

import colorsys

DARK_PAGE = "#181C22"
"""What lies under charts on a dark page, as in page.css."""
LEAST_CONTRAST = 3.0
"""Of a graphic against what lies under it, as WCAG 2.2 asks of it (1.4.11)."""


def luminance(color: str) -> float:
    """Relative luminance of ``#RRGGBB``, 0 to 1, as WCAG defines it: how bright a colour is in grey."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21."""
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def on_dark(color: str) -> str:
    """The colour as it is shown on a dark page: as it is where it can be seen, else brightened until it can."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    if saturation < 0.1:
        # Black and greys change places with white, so that black stays the strongest.
        light = max(1 - light, 0.5)
    shown = color
    while True:
        shown = "#" + "".join(f"{round(255 * c):02X}" for c in colorsys.hls_to_rgb(hue, light, saturation))
        if contrast(shown, DARK_PAGE) >= LEAST_CONTRAST or light >= 1:
            return shown
        light = min(light + 0.02, 1.0)
