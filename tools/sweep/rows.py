"""The nets of the sweep, and how their authors fuse them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sweep import lookalikes
from sweep.timm_nets import build_timm_net, reparameterized
from torch import nn

from reptrt.sources.models import ArchitectureOptions, build

_TIMM = {
    "rep": (
        *("repvgg_a0", "mobileone_s0", "mobileone_s4", "fastvit_t8"),
        *("fastvit_sa12", "repvit_m0_9", "repghostnet_050", "ghostnetv3_050"),
    ),
    "mobile": (
        *("mobilenetv2_050", "mobilenetv3_small_100", "mobilenetv4_conv_small", "ghostnet_050"),
        *("ghostnetv2_100", "efficientnet_b0", "mnasnet_small", "mixnet_s", "rexnet_100"),
        *("lcnet_050", "tinynet_e", "fbnetv3_b", "hardcorenas_a", "mobilevit_xxs"),
        *("edgenext_xx_small", "efficientvit_b0", "starnet_s1", "shvit_s1"),
    ),
    "classic": (
        *("resnet18", "seresnet18", "resnest14d", "skresnet18", "res2net50_26w_4s"),
        *("densenet121", "regnetx_002", "regnety_002", "hgnetv2_b0", "ese_vovnet19b_dw"),
        *("cspresnet50", "dla34", "gernet_s", "selecsls42b", "xception41", "darknet17"),
        *("inception_v3", "convnext_atto", "poolformer_s12", "levit_128s"),
    ),
}
_DETECTORS = ("yolov6n", "yolov6s", "yolov6m", "yolov6l")
_OTHER_SIZES = {"inception_v3": 96, "levit_128s": 224}


@dataclass(frozen=True, slots=True)
class Row:
    """One net."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    size: tuple[int, int, int]  # of an input image, (C, H, W)
    fuse: Callable[[nn.Module], nn.Module]  # what the authors make of it; may change its argument


def rows() -> list[Row]:
    """Return every net, in the order of the table."""
    nets = [
        Row(
            name, f"timm, {family}", partial(build_timm_net, name), (3, side, side), reparameterized
        )
        for family, names in _TIMM.items()
        for name in names
        for side in (_OTHER_SIZES.get(name, 64),)
    ]
    for name in _DETECTORS:
        make = partial(build, name, ArchitectureOptions(), deploy=False)
        nets.append(Row(name, "zoo, detector", make, (3, 128, 128), partial(_deploy_form, name)))
    likes: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "yolov5-like": (lookalikes.Yolo5, "detector"),
        "yolov6-like": (lookalikes.Yolo6, "detector"),
        "yolov8-like": (lookalikes.Yolo8, "detector"),
        "yolov8-seg-like": (lookalikes.Yolo8Seg, "segmentation"),
        "unet": (lookalikes.UNet, "segmentation"),
        "deeplab-like": (lookalikes.DeepLab, "segmentation"),
    }
    for name, (make, family) in likes.items():
        nets.append(Row(name, family, make, (3, 96, 96), lookalikes.fused))
    return nets


def _deploy_form(name: str, _: nn.Module) -> nn.Module:
    net = build(name, ArchitectureOptions(), deploy=True)
    net.get_submodule("detect").proj_conv = nn.Identity()  # a sum over bins, or not used at all
    return net
