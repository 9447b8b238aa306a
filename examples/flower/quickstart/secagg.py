"""The quickstart under SecAgg+: the server learns the mean alone.

Flower has SecAgg+ for its older API only: a workflow at the server, a mod at the client, arrays
without names. Point ``serverapp`` and ``clientapp`` in pyproject.toml at this module to run it.
"""

import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from leakatlas.integrations.flower import (
    CapturingLegacyStrategy,
    capture_raw_mod,
    capture_wire_mod,
)
from quickstart.task import EXAMPLES, load_data, net, train


class Client(NumPyClient):
    """Trains on its own images."""

    def __init__(self, context):
        self.config = context.run_config
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        """One round of local training."""
        model = net()
        names = model.state_dict()
        model.load_state_dict(
            {n: torch.as_tensor(a) for n, a in zip(names, parameters, strict=True)}
        )
        images, labels = load_data(self.partition)
        settings = self.config
        train(
            model,
            images,
            labels,
            settings["local-epochs"],
            settings["batch-size"],
            settings["learning-rate"],
        )
        return [tensor.numpy() for tensor in model.state_dict().values()], len(images), {}


def client_fn(context: Context):
    """Flower's way to make a client."""
    return Client(context).to_client()


client_app = ClientApp(client_fn, mods=[capture_wire_mod, secaggplus_mod, capture_raw_mod])
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context):
    """Run the rounds; what is recorded here is the mean, all that this server sees."""
    state, config = net().state_dict(), context.run_config
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([t.numpy() for t in state.values()]),
    )
    strategy = CapturingLegacyStrategy(strategy, config["leakatlas-folder"])
    rounds = ServerConfig(num_rounds=config["num-server-rounds"])
    legacy = LegacyContext(context=context, config=rounds, strategy=strategy)
    # What clients send is scaled by examples / max_weight before it is rounded: the default of 1000
    # would leave rounding errors as large as the update of eight examples.
    workflow = SecAggPlusWorkflow(
        num_shares=1.0, reconstruction_threshold=1.0, max_weight=float(EXAMPLES)
    )
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
