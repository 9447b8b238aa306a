"""The quickstart's network, data and training (``../flower/quickstart``) at NVFlare's sites."""

from quickstart.task import EXAMPLES, Net, load_data, train, trap

LR = 0.05
BATCH_SIZE = 4

__all__ = ["EXAMPLES", "Net", "TamperedNet", "site_data", "train_site"]


class TamperedNet(Net):
    """What a malicious server starts from."""

    def __init__(self):
        super().__init__()
        self.load_state_dict(trap(self.state_dict()))


def site_data(site):
    """Images and labels of one site, ``site-1`` or ``site-2``."""
    return load_data(int(site.split("-")[1]) - 1)


def train_site(model, images, labels):
    """One epoch in order; returns the number of steps."""
    return train(model, images, labels, epochs=1, batch_size=BATCH_SIZE, lr=LR)
