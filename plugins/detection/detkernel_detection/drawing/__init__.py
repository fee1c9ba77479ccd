"""Draws boxes, masks and keypoints over images, and images on a sheet: legibly on any image.

    from detkernel_detection.drawing import draw
    draw(image, found, classes).save("found.jpg")

Nothing here needs a display or torch's GPU part; Pillow and NumPy do it all.
"""

from detkernel_detection.drawing.colours import colour, ink
from detkernel_detection.drawing.objects import draw
from detkernel_detection.drawing.sheet import Tile, jpeg, png, sheet

__all__ = ["Tile", "colour", "draw", "ink", "jpeg", "png", "sheet"]
