"""A soft mask that learns what it covers through nothing but the attention it steers.

A photograph is to be redrawn from two descriptors. Each is what one query reads from the picture by soft-masked attention: the first
query reads under a mask M, the second under 1 - M. A small network predicts M from each pixel's colour and position. No loss ever sees M:
the loss sees the two descriptors, and the gradient reaches M through the attention alone. The one hint is a click: its pixel is the first
query.

    pip install scikit-learn matplotlib tyro    # the photograph, the picture, the command line
    python examples/quickstart.py               # writes quickstart.png: photograph, first mask, learned mask
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import smattn


def features(photo: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised colour (Nk, 3) and position in [-1, 1] (Nk, 2) of each pixel of a photograph (height, width, 3)."""
    height, width, _ = photo.shape
    colour = (photo - photo.mean((0, 1))) / photo.std()
    position = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    return colour.flatten(0, 1), position


def learn_mask(photo: Tensor, click: tuple[int, int], steps: int = 300) -> tuple[Tensor, Tensor]:
    """Learn a mask of what was clicked; returns the mask before and after learning, each (height, width).

    photo (height, width, 3) in [0, 1]; click is a pixel, (row, column).
    """
    torch.manual_seed(0)
    colour, position = features(photo)
    pixels = torch.cat([colour, position], -1)[None, None]  # (B, H, Nk, D) = (1, 1, Nk, 5): the keys
    values = torch.cat([colour, 0.3 * position], -1)[None, None]  # A descriptor reads mostly colour.
    clicked = pixels[:, :, click[0] * photo.shape[1] + click[1]]
    query = torch.stack([0.3 * clicked, torch.zeros_like(clicked)], 2)  # (1, 1, Nq = 2, 5): the click is a weak hint.
    head = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    masks = []
    for _ in range(steps + 1):
        m = head(pixels[0, 0]).T  # (1, Nk)
        masks.append(m.detach().view(photo.shape[:2]))
        mask = torch.stack([m, 1 - m], 1)  # (1, Nq, Nk)
        descriptors = smattn.soft_masked_attention(query, pixels, values, mask, alpha=2.0)
        # Every pixel is drawn by the descriptors that it resembles.
        nearest = torch.softmax(-10 * torch.cdist(values, descriptors).square(), -1)  # (1, 1, Nk, Nq)
        loss = (nearest @ descriptors - values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return masks[0], masks[-1]


def main(path: str = "quickstart.png") -> None:
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_sample_image

    flower = torch.tensor(load_sample_image("flower.jpg"))[:424] / 255  # (424, 640, 3), by vultilion, CC BY 2.0
    photo = flower.view(106, 4, 160, 4, 3).mean((1, 3))
    first, last = learn_mask(photo, click=(50, 78))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.25), layout="constrained")
    for axis, picture, title in zip(axes, (photo, first, last), ("photograph", "first mask", "learned mask"), strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
