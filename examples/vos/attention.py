"""Where an object's descriptor looks in a frame: the attention of the encoder's last layer, from the same queries, keys, mask and alpha."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.shared.maps import layer_map
from smattn.nn import SoftMaskedAttention

from .model import CELLS, VOS, Frame


@torch.no_grad()
def attention_of_first_object(model: VOS, frame: Frame, masks: Tensor, present: Tensor) -> Tensor | None:
    """The map (h, w) of a frame (batch of 1) under soft masks (1, O, h, w), mean over heads; None where the masking is hard or none."""
    layer, found = model.encoder[-1].cross_attention, []
    if not isinstance(layer, SoftMaskedAttention):
        return None

    def listen(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        query, features, _, mask = arguments
        rows = slice(CELLS, CELLS + 1)
        found.append(layer_map(layer, query[:, rows], features, mask[:, rows]))

    with layer.register_forward_pre_hook(listen):
        model.encode(frame, masks, present)
    return found[0].view(frame.coarse.shape[-2:]).cpu()
