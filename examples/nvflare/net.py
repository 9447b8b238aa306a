"""The network, the data and the local training of the job."""

import torch
from torch import nn
from torch.nn import functional as F

from leakatlas.data import patches

EXAMPLES = 8
LR = 0.05
BATCH_SIZE = 4


class Net(nn.Module):
    """The small CNN of PyTorch's first tutorial."""

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


class TamperedNet(Net):
    """What a malicious server starts from: rows that sort examples into bins."""

    def __init__(self):
        super().__init__()
        rows, width = self.fc1.weight.shape
        with torch.no_grad():
            self.fc1.weight.fill_(1.0 / width)
            self.fc1.bias.copy_(-torch.linspace(0.0, 0.5, rows))


def load_data(site):
    """Images and labels of one site, ``site-1`` or ``site-2``."""
    start = (int(site.split("-")[1]) - 1) * EXAMPLES
    return patches(32, n=64).images[start : start + EXAMPLES], torch.arange(EXAMPLES) % 10


def train(model, images, labels):
    """One epoch of plain local training, in order; returns the number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    batches = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(batches)
