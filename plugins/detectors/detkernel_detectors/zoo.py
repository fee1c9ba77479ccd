"""MMDetection's zoo: its published weights by the name of their config, such as `retinanet_r50_fpn_1x_coco`."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from detkernel import wrong
from detkernel.errors import did_you_mean
from detkernel_detection.downloads import digest_in, downloaded
from detkernel_detection.weights import Weights, read_weights

BASE = "https://download.openmmlab.com/mmdetection"
"""Where the zoo is, unless the environment variable DETKERNEL_MMDET_ZOO names a mirror."""


class Published(NamedTuple):
    """Where the weights of a config are: a file that is named as its folder is, and what follows."""

    room: str
    folder: str
    stamp: str
    """When they were made, and at its end eight digits of the file's SHA-256."""

    @property
    def path(self) -> str:
        """Below the zoo."""
        return f"{self.room}/{self.folder}/{self.folder}{self.stamp}.pth"


ZOO = {
    "faster-rcnn_r50_fpn_1x_coco": Published("v2.0/faster_rcnn", "faster_rcnn_r50_fpn_1x_coco", "_20200130-047c8118"),
    "faster-rcnn_r50_fpn_2x_coco": Published(
        "v2.0/faster_rcnn", "faster_rcnn_r50_fpn_2x_coco", "_bbox_mAP-0.384_20200504_210434-a5d8aa15"
    ),
    "faster-rcnn_r50_fpn_ms-3x_coco": Published(
        "v2.0/faster_rcnn", "faster_rcnn_r50_fpn_mstrain_3x_coco", "_20210524_110822-e10bd31c"
    ),
    "faster-rcnn_r101_fpn_1x_coco": Published("v2.0/faster_rcnn", "faster_rcnn_r101_fpn_1x_coco", "_20200130-f513f705"),
    "faster-rcnn_r101_fpn_ms-3x_coco": Published(
        "v2.0/faster_rcnn", "faster_rcnn_r101_fpn_mstrain_3x_coco", "_20210524_110822-4d4d2ca8"
    ),
    "faster-rcnn_x101-64x4d_fpn_1x_coco": Published(
        "v2.0/faster_rcnn", "faster_rcnn_x101_64x4d_fpn_1x_coco", "_20200204-833ee192"
    ),
    "mask-rcnn_r50_fpn_1x_coco": Published("v2.0/mask_rcnn", "mask_rcnn_r50_fpn_1x_coco", "_20200205-d4b0c5d6"),
    "cascade-rcnn_r50_fpn_1x_coco": Published(
        "v2.0/cascade_rcnn", "cascade_rcnn_r50_fpn_1x_coco", "_20200316-3dc56deb"
    ),
    "cascade-mask-rcnn_r50_fpn_1x_coco": Published(
        "v2.0/cascade_rcnn", "cascade_mask_rcnn_r50_fpn_1x_coco", "_20200203-9d4dcb24"
    ),
    "retinanet_r50_fpn_1x_coco": Published("v2.0/retinanet", "retinanet_r50_fpn_1x_coco", "_20200130-c2398f9e"),
    "retinanet_r50_fpn_2x_coco": Published("v2.0/retinanet", "retinanet_r50_fpn_2x_coco", "_20200131-fdb43119"),
    "retinanet_r50_fpn_ms-640-800-3x_coco": Published(
        "v2.0/retinanet", "retinanet_r50_fpn_mstrain_3x_coco", "_20210718_220633-88476508"
    ),
    "retinanet_r101_fpn_1x_coco": Published("v2.0/retinanet", "retinanet_r101_fpn_1x_coco", "_20200130-7a93545f"),
    "retinanet_r101_fpn_2x_coco": Published("v2.0/retinanet", "retinanet_r101_fpn_2x_coco", "_20200131-5560aee8"),
    "retinanet_x101-64x4d_fpn_1x_coco": Published(
        "v2.0/retinanet", "retinanet_x101_64x4d_fpn_1x_coco", "_20200130-366f5af1"
    ),
    "retinanet_regnetx-800MF_fpn_1x_coco": Published(
        "v2.0/regnet", "retinanet_regnetx-800MF_fpn_1x_coco", "_20200517_191403-f6f91d10"
    ),
    "retinanet_regnetx-1.6GF_fpn_1x_coco": Published(
        "v2.0/regnet", "retinanet_regnetx-1.6GF_fpn_1x_coco", "_20200517_191403-37009a9d"
    ),
    "retinanet_regnetx-3.2GF_fpn_1x_coco": Published(
        "v2.0/regnet", "retinanet_regnetx-3.2GF_fpn_1x_coco", "_20200520_163141-cb1509e8"
    ),
    "faster-rcnn_regnetx-3.2GF_fpn_1x_coco": Published(
        "v2.0/regnet", "faster_rcnn_regnetx-3.2GF_fpn_1x_coco", "_20200517_175927-126fd9bf"
    ),
    "mask-rcnn_regnetx-3.2GF_fpn_1x_coco": Published(
        "v2.0/regnet", "mask_rcnn_regnetx-3.2GF_fpn_1x_coco", "_20200520_163141-2a9d1814"
    ),
    "mask-rcnn_regnetx-4GF_fpn_1x_coco": Published(
        "v2.0/regnet", "mask_rcnn_regnetx-4GF_fpn_1x_coco", "_20200517_180217-32e9c92d"
    ),
    "mask-rcnn_regnetx-12GF_fpn_1x_coco": Published(
        "v2.0/regnet", "mask_rcnn_regnetx-12GF_fpn_1x_coco", "_20200517_180552-b538bd8b"
    ),
    "faster-rcnn_res2net-101_fpn_2x_coco": Published("v2.0/res2net", "faster_rcnn_r2_101_fpn_2x_coco", "-175f1da6"),
    "mask-rcnn_res2net-101_fpn_2x_coco": Published("v2.0/res2net", "mask_rcnn_r2_101_fpn_2x_coco", "-17f061e8"),
    "cascade-rcnn_res2net-101_fpn_20e_coco": Published("v2.0/res2net", "cascade_rcnn_r2_101_fpn_20e_coco", "-f4b7b7db"),
    "cascade-mask-rcnn_res2net-101_fpn_20e_coco": Published(
        "v2.0/res2net", "cascade_mask_rcnn_r2_101_fpn_20e_coco", "-8a7b41e1"
    ),
    "faster-rcnn_hrnetv2p-w18-1x_coco": Published(
        "v2.0/hrnet", "faster_rcnn_hrnetv2p_w18_1x_coco", "_20200130-56651a6d"
    ),
    "faster-rcnn_hrnetv2p-w32-1x_coco": Published(
        "v2.0/hrnet", "faster_rcnn_hrnetv2p_w32_1x_coco", "_20200130-6e286425"
    ),
    "faster-rcnn_hrnetv2p-w40-1x_coco": Published(
        "v2.0/hrnet", "faster_rcnn_hrnetv2p_w40_1x_coco", "_20200210-95c1f5ce"
    ),
    "mask-rcnn_hrnetv2p-w32-1x_coco": Published("v2.0/hrnet", "mask_rcnn_hrnetv2p_w32_1x_coco", "_20200207-b29f616e"),
    "cascade-rcnn_hrnetv2p-w32-20e_coco": Published(
        "v2.0/hrnet", "cascade_rcnn_hrnetv2p_w32_20e_coco", "_20200208-928455a4"
    ),
    "fcos_hrnetv2p-w32-gn-head_4xb4-1x_coco": Published(
        "v2.0/hrnet", "fcos_hrnetv2p_w32_gn-head_4x4_1x_coco", "_20201211_134730-cb8055c0"
    ),
    "fcos_r50-caffe_fpn_gn-head_1x_coco": Published("v2.0/fcos", "fcos_r50_caffe_fpn_gn-head_1x_coco", "-821213aa"),
    "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco": Published(
        "v2.0/fcos", "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco", "-0a0d75a8"
    ),
    "atss_r50_fpn_1x_coco": Published("v2.0/atss", "atss_r50_fpn_1x_coco", "_20200209-985f7bd0"),
    "gfl_r50_fpn_1x_coco": Published("v2.0/gfl", "gfl_r50_fpn_1x_coco", "_20200629_121244-25944287"),
    "gfl_r50_fpn_ms-2x_coco": Published("v2.0/gfl", "gfl_r50_fpn_mstrain_2x_coco", "_20200629_213802-37bb1edc"),
    "gfl_r101_fpn_ms-2x_coco": Published("v2.0/gfl", "gfl_r101_fpn_mstrain_2x_coco", "_20200629_200126-dd12f847"),
    "ssd300_coco": Published("v2.0/ssd", "ssd300_coco", "_20210803_015428-d231a06e"),
    "ssd512_coco": Published("v2.0/ssd", "ssd512_coco", "_20210803_022849-0a47a1ca"),
    "tood_r50_fpn_1x_coco": Published("v2.0/tood", "tood_r50_fpn_1x_coco", "_20211210_103425-20e20746"),
    "tood_r50_fpn_ms-2x_coco": Published("v2.0/tood", "tood_r50_fpn_mstrain_2x_coco", "_20211210_144231-3b23174c"),
    "tood_r101_fpn_ms-2x_coco": Published("v2.0/tood", "tood_r101_fpn_mstrain_2x_coco", "_20211210_144232-a18f53c8"),
    "vfnet_r50_fpn_1x_coco": Published("v2.0/vfnet", "vfnet_r50_fpn_1x_coco", "_20201027-38db6f58"),
    "yolov3_d53_8xb8-320-273e_coco": Published("v2.0/yolo", "yolov3_d53_320_273e_coco", "-421362b6"),
    "yolov3_d53_8xb8-ms-416-273e_coco": Published("v2.0/yolo", "yolov3_d53_mstrain-416_273e_coco", "-2b60fcd9"),
    "yolov3_d53_8xb8-ms-608-273e_coco": Published(
        "v2.0/yolo", "yolov3_d53_mstrain-608_273e_coco", "_20210518_115020-a2c3acb8"
    ),
    "yolox_tiny_8xb8-300e_coco": Published("v2.0/yolox", "yolox_tiny_8x8_300e_coco", "_20211124_171234-b4047906"),
    "yolox_s_8xb8-300e_coco": Published("v2.0/yolox", "yolox_s_8x8_300e_coco", "_20211121_095711-4592a793"),
    "yolox_l_8xb8-300e_coco": Published("v2.0/yolox", "yolox_l_8x8_300e_coco", "_20211126_140236-d3bd2b23"),
    "yolox_x_8xb8-300e_coco": Published("v2.0/yolox", "yolox_x_8x8_300e_coco", "_20211126_140254-1ef88d67"),
    "yolof_r50-c5_8xb8-1x_coco": Published("v2.0/yolof", "yolof_r50_c5_8x8_1x_coco", "_20210425_024427-8e864411"),
    "rtmdet_tiny_8xb32-300e_coco": Published("v3.0/rtmdet", "rtmdet_tiny_8xb32-300e_coco", "_20220902_112414-78e30dcc"),
    "rtmdet_s_8xb32-300e_coco": Published("v3.0/rtmdet", "rtmdet_s_8xb32-300e_coco", "_20220905_161602-387a891e"),
    "rtmdet_m_8xb32-300e_coco": Published("v3.0/rtmdet", "rtmdet_m_8xb32-300e_coco", "_20220719_112220-229f527c"),
    "rtmdet_l_8xb32-300e_coco": Published("v3.0/rtmdet", "rtmdet_l_8xb32-300e_coco", "_20220719_112030-5a0be7c4"),
    "rtmdet_x_8xb32-300e_coco": Published("v3.0/rtmdet", "rtmdet_x_8xb32-300e_coco", "_20220715_230555-cc79b9ae"),
    "rtmdet-ins_l_8xb32-300e_coco": Published(
        "v3.0/rtmdet", "rtmdet-ins_l_8xb32-300e_coco", "_20221124_103237-78d1d652"
    ),
    "detr_r50_8xb2-150e_coco": Published("v3.0/detr", "detr_r50_8xb2-150e_coco", "_20221023_153551-436d03e8"),
    "conditional-detr_r50_8xb2-50e_coco": Published(
        "v3.0/conditional_detr", "conditional-detr_r50_8xb2-50e_coco", "_20221121_180202-c83a1dc0"
    ),
    "dab-detr_r50_8xb2-50e_coco": Published("v3.0/dab_detr", "dab-detr_r50_8xb2-50e_coco", "_20221122_120837-c1035c8c"),
    "deformable-detr_r50_16xb2-50e_coco": Published(
        "v3.0/deformable_detr", "deformable-detr_r50_16xb2-50e_coco", "_20221029_210934-6bc7d21b"
    ),
    "deformable-detr-refine_r50_16xb2-50e_coco": Published(
        "v3.0/deformable_detr", "deformable-detr-refine_r50_16xb2-50e_coco", "_20221022_225303-844e0f93"
    ),
    "deformable-detr-refine-twostage_r50_16xb2-50e_coco": Published(
        "v3.0/deformable_detr", "deformable-detr-refine-twostage_r50_16xb2-50e_coco", "_20221021_184714-acc8a5ff"
    ),
    "dino-4scale_r50_8xb2-12e_coco": Published(
        "v3.0/dino", "dino-4scale_r50_8xb2-12e_coco", "_20221202_182705-55b2bba2"
    ),
}
"""Config -> its weights, as the `metafile.yml` of each family in MMDetection names them."""


def find(part: Any, name: str) -> Weights:
    """The weights that the option `weights: mmdet:NAME` of a part asks for: downloaded the first time, and checked.

    NAME is that of a config in `ZOO`, or of any other a path below the zoo, or a whole address. Raises `ConfigError`
    for a name that is none of these, `UserError` where the file cannot be had, and `CheckpointError` where it cannot be
    read.
    """
    if not name.endswith(".pth"):
        if name not in ZOO:
            raise wrong(
                part,
                "weights",
                f"MMDetection publishes no '{name}' that is known here{did_you_mean(name, ZOO)}; of others give the "
                "path below the zoo, mmdet:v2.0/FAMILY/CONFIG/FILE.pth, or the address",
            )
        name = ZOO[name].path
    if digest_in(name) is None:
        raise wrong(
            part,
            "weights",
            f"'{name}' does not end with eight digits of its SHA-256, such as -c2398f9e.pth, so that nothing says "
            "whether it came whole; download it yourself, and give the file",
        )
    url = name if "://" in name else f"{os.environ.get('DETKERNEL_MMDET_ZOO', BASE).rstrip('/')}/{name.lstrip('/')}"
    if not re.match(r"https?://", url):
        at = "" if "://" in name else " (from DETKERNEL_MMDET_ZOO)"
        raise wrong(part, "weights", f"expected an address that begins with http:// or https://, got '{url}'{at}")
    return read_weights(downloaded(url, f"MMDetection's {name.rsplit('/', 1)[-1]}"))
