"""The server: FedAvg, recording what every client is sent and answers."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from leakatlas.integrations.flower import CapturingStrategy
from quickstart.task import net

app = ServerApp()


class Tampering(FedAvg):
    """A malicious server: its first linear layer sorts examples into bins, so that they come out.

    Every row measures the same thing, with thresholds that grow from row to row.
    """

    def configure_train(self, server_round, arrays, config, grid):
        """FedAvg's messages, with other weights."""
        state = arrays.to_torch_state_dict()
        rows, width = state["fc1.weight"].shape
        state["fc1.weight"] = torch.full((rows, width), 1.0 / width)
        state["fc1.bias"] = -torch.linspace(0.0, 0.5, rows)
        return super().configure_train(server_round, ArrayRecord(state), config, grid)


@app.main()
def main(grid: Grid, context: Context):
    """Run the rounds that the configuration asks for."""
    config = context.run_config
    kind = Tampering if config["tamper"] else FedAvg
    strategy = kind(fraction_evaluate=0.0, min_available_nodes=2)
    if config["capture-server"]:
        strategy = CapturingStrategy(strategy, config["leakatlas-folder"])
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net().state_dict()),
        num_rounds=config["num-server-rounds"],
    )
