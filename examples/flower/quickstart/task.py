"""The networks, the data and the local training of the quickstart."""

import torch
from torch import nn
from torch.nn import functional as F

from leakatlas.data import patches
from leakatlas.models import build

EXAMPLES = 8
"""That a client holds, unless it is told otherwise."""


class Net(nn.Module):
    """The small CNN of PyTorch's first tutorial, which most FL quickstarts train."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        """Images ``(N, 3, 32, 32)`` to logits ``(N, 10)``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def net(network="quickstart"):
    """The agreed architecture, with the weights that the server starts from."""
    torch.manual_seed(0)
    return Net() if network == "quickstart" else build(network, classes=10)


def load_data(partition, examples=EXAMPLES):
    """Images and labels of one client; nobody else has them."""
    images = patches(32, n=64).images[partition * EXAMPLES :][:examples]
    labels = torch.arange(examples) % 10
    return images, labels


def train(model, images, labels, epochs, batch_size, lr, momentum=0.0):
    """Plain local training, in order; returns the number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.train()
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return epochs * len(batches)


def trap(state):
    """What a malicious server sends: a first linear layer that sorts examples into bins.

    Every row measures the same thing, with thresholds that grow from row to row.
    """
    rows, width = state["fc1.weight"].shape
    return {
        **state,
        "fc1.weight": torch.full((rows, width), 1.0 / width),
        "fc1.bias": -torch.linspace(0.0, 0.5, rows),
    }
