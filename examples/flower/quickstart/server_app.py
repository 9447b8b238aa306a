"""The server: FedAvg, recording what every client is sent and answers."""

import time

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from leakatlas.integrations.flower import CapturingStrategy
from quickstart.meter import note
from quickstart.task import net, trap

app = ServerApp()


class Tampering(FedAvg):
    """A malicious server: tampers with what it sends to every client, or to the first alone."""

    def __init__(self, victims, **settings):
        super().__init__(**settings)
        self.victims = victims

    def configure_train(self, server_round, arrays, config, grid):
        """FedAvg's messages, some with other weights."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        for message in messages[: 1 if self.victims == "one" else None]:
            state = message.content[self.arrayrecord_key].to_torch_state_dict()
            message.content = RecordDict(
                {**message.content, self.arrayrecord_key: ArrayRecord(trap(state))}
            )
        return messages


@app.main()
def main(grid: Grid, context: Context):
    """Run the rounds that the configuration asks for."""
    config = context.run_config
    settings = {"fraction_evaluate": 0.0, "min_available_nodes": 2}
    if config["tamper"] == "none":
        strategy = FedAvg(**settings)
    else:
        strategy = Tampering(config["tamper"], **settings)
    if config["defense"] == "clipping":
        strategy = DifferentialPrivacyClientSideFixedClipping(
            strategy,
            noise_multiplier=config["dp-noise-multiplier"],
            clipping_norm=config["dp-clipping-norm"],
            num_sampled_clients=2,
        )
    if config["capture"]:
        limit = int(config["leakatlas-limit-mb"] * 2**20)
        strategy = CapturingStrategy(strategy, config["leakatlas-folder"], limit=limit)
    begun = time.thread_time()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net(config["network"]).state_dict()),
        num_rounds=config["num-server-rounds"],
    )
    if config["meter-folder"]:
        note(config["meter-folder"], "server", seconds=time.thread_time() - begun)
