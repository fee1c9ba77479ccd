"""What detectors of the DETR kind are made of: attention, encodings of places, denoising queries."""
