"""The training script of every site, with NVFlare's client API."""

import nvflare.client as flare
import torch
from net import Net, site_data, train_site


def main():
    """Train whenever a model arrives."""
    flare.init()
    images, labels = site_data(flare.get_site_name())
    while flare.is_running():
        received = flare.receive()
        model = Net()
        model.load_state_dict({n: torch.as_tensor(v) for n, v in received.params.items()})
        steps = train_site(model, images, labels)
        flare.send(
            flare.FLModel(params=model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": steps})
        )


if __name__ == "__main__":
    main()
