"""A soft mask that learns what it covers through nothing but the attention it steers.

A photograph is to be redrawn from two descriptors. Each is what one query reads from the picture by soft-masked attention: the first
query reads under a mask M, the second under 1 - M. A small network predicts M from each pixel's colour and position. No loss ever sees M:
the loss sees the two descriptors, and the gradient reaches M through the attention alone. The one hint is a click: its pixel is the first
query.

    pip install scikit-learn matplotlib tyro    # the photograph, the picture, the command line
    python examples/quickstart.py               # writes quickstart.png: photograph, masks, attention, result
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import smattn


def features(photo: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised colour (Nk, 3) and position in [-1, 1] (Nk, 2) of each pixel of a photograph (height, width, 3)."""
    height, width, _ = photo.shape
    colour = (photo - photo.mean((0, 1))) / photo.std()
    position = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    return colour.flatten(0, 1), position


class Learned(NamedTuple):
    """What came of it, all but the error (height, width); `redrawn` has three colours."""

    first: Tensor  # the mask before learning
    mask: Tensor  # and after
    attention: Tensor  # how much the first query reads of each pixel, 1 in sum
    redrawn: Tensor  # the photograph from the two descriptors
    error: float  # root of the mean square of what the descriptors miss, in units of the colours' spread


def learn_mask(photo: Tensor, click: tuple[int, int], steps: int = 300) -> Learned:
    """Learn a mask of what was clicked. photo (height, width, 3) in [0, 1]; click is a pixel, (row, column)."""
    torch.manual_seed(0)
    shape = photo.shape[:2]
    colour, position = features(photo)
    pixels = torch.cat([colour, position], -1)[None, None]  # (B, H, Nk, D) = (1, 1, Nk, 5): the keys
    values = torch.cat([colour, 0.3 * position], -1)[None, None]  # A descriptor reads mostly colour.
    clicked = pixels[:, :, click[0] * shape[1] + click[1]]
    query = torch.stack([0.3 * clicked, torch.zeros_like(clicked)], 2)  # (1, 1, Nq = 2, 5): the click is a weak hint.
    head = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    first = None
    for _ in range(steps + 1):
        m = head(pixels[0, 0]).T  # (1, Nk)
        first = m.detach() if first is None else first
        mask = torch.stack([m, 1 - m], 1)  # (1, Nq, Nk)
        descriptors = smattn.soft_masked_attention(query, pixels, values, mask, alpha=2.0)
        # Every pixel is drawn by the descriptors that it resembles.
        nearest = torch.softmax(-10 * torch.cdist(values, descriptors).square(), -1)  # (1, 1, Nk, Nq)
        drawn = nearest @ descriptors
        loss = (drawn - values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        attention = smattn.attention_map(query, pixels, mask, alpha=2.0)[0, 0]
        redrawn = (drawn[0, 0, :, :3] * photo.std() + photo.mean((0, 1))).clamp(0, 1)
    return Learned(first.view(shape), m.detach().view(shape), attention.view(shape), redrawn.view(photo.shape), loss.item() ** 0.5)


def main(out: str = "quickstart.png", steps: int = 300) -> None:
    """Learn a mask of a flower through the attention alone, and save a picture of it.

    Args:
        out: The picture to write.
        steps: How many to learn.
    """
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_sample_image

    flower = torch.tensor(load_sample_image("flower.jpg"))[:424] / 255  # (424, 640, 3), by vultilion, CC BY 2.0
    photo = flower.view(106, 4, 160, 4, 3).mean((1, 3))
    learned = learn_mask(photo, click=(50, 78), steps=steps)
    pictures = {
        "photograph": photo,
        "first mask": learned.first,
        f"mask after {steps} steps": learned.mask,
        "attention under it": learned.attention / learned.attention.max(),
        f"redrawn, error {learned.error:.2f}": learned.redrawn,
    }
    figure, axes = plt.subplots(1, len(pictures), figsize=(13, 2.1), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
