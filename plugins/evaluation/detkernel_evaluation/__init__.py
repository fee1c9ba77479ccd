"""COCO and Pascal VOC average precision, for detkernel."""
