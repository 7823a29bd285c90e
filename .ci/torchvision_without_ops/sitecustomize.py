"""On PYTHONPATH where torchvision's compiled operators are of another build of torch (CUDA's beside
a CPU torch): declares those whose absence fails its import. Processors of images need none."""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
