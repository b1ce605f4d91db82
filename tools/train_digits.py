"""Train the demo's RepVGG on the training part of the digits, in a few minutes on two cores.

    python tools/train_digits.py            writes reptrt/demo/digits_repvgg.pt

Training uses SGD with a one-cycle learning rate, shifts by up to a pixel, and label smoothing. The
batch norms of the 3x3 and 1x1 branches start at zero, as is common for residual branches. Each
block therefore starts as the identity, and after this short training the identity branch still has
the largest weights, as in published rep-nets after long training.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from reptrt.demo import digits
from reptrt.sources.models import build
from reptrt.sources.models.repvgg import RepVGGBlock

SEED = 0
EPOCHS, BATCH = 80, 64
PEAK_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
SMOOTHING = 0.05


def main() -> None:
    """Train, write the state dict in half precision, and print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=digits.WEIGHTS)
    output = parser.parse_args().output
    torch.manual_seed(SEED)
    architecture = replace(digits.ARCHITECTURE, in_channels=digits.INPUT_SIZE[0])
    net = build("repvgg", architecture, deploy=False)
    start_as_identity(net)
    split = digits.load_digits()
    train(net, split.train)
    state = {name: half(value) for name, value in net.state_dict().items()}
    torch.save(state, output)
    net.load_state_dict(state)
    print(f"{output}  {output.stat().st_size / 1024:.0f} KiB", end="  ")
    print(f"held-out top-1 {accuracy(net, split.held_out):.4f}")


def start_as_identity(net: nn.Module) -> None:
    """Set the batch norms so that a block with an identity branch begins as that branch."""
    for block in net.modules():
        if isinstance(block, RepVGGBlock) and block.rbr_identity is not None:
            nn.init.ones_(block.rbr_identity.weight)
            nn.init.zeros_(block.rbr_dense.bn.weight)
            nn.init.zeros_(block.rbr_1x1.bn.weight)


def train(net: nn.Module, data: digits.Digits) -> None:
    """Train in place."""
    x, y = tensors(data)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=PEAK_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    batches = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=EPOCHS * batches
    )
    net.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: batches * BATCH].split(BATCH):
            loss = F.cross_entropy(net(shifted(x[chosen])), y[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Return the batch moved by -1, 0 or 1 pixel in each direction, equally for all its images."""
    top, left = torch.randint(0, 3, (2,)).tolist()
    height, width = x.shape[2:]
    black = -digits.MEAN[0] / digits.STD[0]
    return F.pad(x, (1, 1, 1, 1), value=black)[:, :, top : top + height, left : left + width]


def tensors(data: digits.Digits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images as the net takes them, and labels."""
    x = (data.x.astype(np.float32) / 255 - digits.MEAN[0]) / digits.STD[0]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(data.y)


def half(value: torch.Tensor) -> torch.Tensor:
    """Return a floating tensor in half precision, which halves the file and is accurate enough."""
    return value.half() if value.is_floating_point() else value


def accuracy(net: nn.Module, data: digits.Digits) -> float:
    """Return the fraction of images classified as labelled."""
    x, y = tensors(data)
    net.eval()
    with torch.inference_mode():
        return float((net(x).argmax(dim=1) == y).float().mean())


if __name__ == "__main__":
    main()
