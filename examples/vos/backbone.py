"""A frame's features: a pyramid from a small convolutional network or from timm, brought to one width at strides s and s/2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.shared.commands import SettingError
from examples.shared.timm_models import create_model

from .config import Config


class SmallBackbone(nn.Module):
    """Gives feature maps at strides s/2, s and 2s, where s is 4 or 8. It has group norms, for a batch is only a few frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.channels = [width, 2 * width, 4 * width]
        self.stem = _block(3, width, stride=stride // 4)
        self.stages = nn.ModuleList(
            nn.Sequential(_block(before, after, stride=2), _block(after, after))
            for before, after in zip([width, *self.channels], self.channels, strict=False)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TimmBackbone(nn.Module):
    """Gives feature maps at strides 4, 8 and 16 from a timm model. Swin's maps have the channels last, and are brought into order."""

    def __init__(self, name: str, pretrained: bool, height: int | None) -> None:
        super().__init__()
        size = {"img_size": (height or 224, height or 224), "strict_img_size": False} if name.startswith("swin") else {}
        wanted = (-4, -3, -2)  # all but the stage at stride 32, which is not even built
        self.body = create_model(name, pretrained=pretrained, features_only=True, out_indices=wanted, **size)
        if (strides := self.body.feature_info.reduction()) != [4, 8, 16]:
            raise SettingError(f"backbone {name!r}: expected maps at strides 4, 8 and 16, got {strides}")
        self.channels_last = self.body.output_fmt == "NHWC"
        self.channels = self.body.feature_info.channels()

    def forward(self, image: Tensor) -> list[Tensor]:
        return [x.movedim(-1, 1) if self.channels_last else x for x in self.body(image)]


class FeaturePyramid(nn.Module):
    """Backbone and FPN. An image (B, 3, H, W) in [0, 1] gives a coarse map (B, C, H/s, W/s) and a fine one at half that stride."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.backbone == "small":
            self.backbone: nn.Module = SmallBackbone(config.width, config.stride)
        elif config.stride != 8:
            raise ValueError(f"stride: expected 8 with a backbone of timm's, got {config.stride}")
        else:
            self.backbone = TimmBackbone(config.backbone, config.pretrained, config.height)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, config.width, 1) for channels in self.backbone.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(2))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone((image - self.mean) / self.std)
        fine, coarse, coarsest = (lateral(x) for lateral, x in zip(self.lateral, maps, strict=True))
        coarse = coarse + F.interpolate(coarsest, coarse.shape[-2:], mode="nearest")
        fine = fine + F.interpolate(coarse, fine.shape[-2:], mode="nearest")
        return self.smooth[0](coarse), self.smooth[1](fine)


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.ReLU())
