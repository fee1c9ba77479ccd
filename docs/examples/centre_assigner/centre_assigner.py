"""An assigner: an anchor whose centre lies in an object is that object's."""

import torch
from detkernel import plugin
from detkernel_detection import Assigner
from detkernel_detection.parts import Matches


@plugin
class CentreAssigner(Assigner):
    """Anchors whose centre lies in an object are its own, of several objects the smallest's."""

    def assign(self, priors, targets):
        centres = priors.boxes.unflatten(-1, (2, 2)).mean(-2)
        upper_left, lower_right = targets.boxes[:, :, None].split(2, -1)
        inside = ((centres > upper_left) & (centres < lower_right)).all(-1)
        inside = inside & targets.valid[:, :, None] & priors.valid[:, None]
        area = (lower_right - upper_left).prod(-1)
        smallest = torch.where(inside, area, torch.inf).argmin(1)
        positive = inside.any(1)
        return Matches(torch.where(positive, smallest, 0), positive, priors.valid & ~positive)
