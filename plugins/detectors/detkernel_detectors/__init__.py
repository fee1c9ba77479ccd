"""Native detectors, made of parts. One file in `models` for each family; the parts lie in rooms by their kinds."""
