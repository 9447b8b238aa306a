"""The client: trains on its own images; what goes by is captured, and may be guarded."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod

from leakatlas.integrations.flower import (
    Guard,
    capture_raw_mod,
    capture_wire_mod,
    guard_mod,
)
from quickstart.task import load_data, net, train


def guard(message, context, call_next):
    """Refuse a round with a tampered model, where the run configuration says so."""
    if context.run_config["guard"] == "off":
        return call_next(message, context)
    watcher = Guard(model=net, on_alarm=context.run_config["guard"])
    return guard_mod(watcher)(message, context, call_next)


def local_dp(message, context, call_next):
    """Flower's own local differential privacy, where the run configuration says so."""
    if context.run_config["defense"] != "local_dp":
        return call_next(message, context)
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=0.01, epsilon=5.0, delta=1e-5)
    return mod(message, context, call_next)


# First: what goes on the wire. Last: what training gave. Between them: what guards the update.
app = ClientApp(mods=[capture_wire_mod, guard, local_dp, capture_raw_mod])


@app.train()
def fit(message: Message, context: Context):
    """One round of local training."""
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = load_data(int(context.node_config["partition-id"]))
    config = context.run_config
    train(
        model,
        images,
        labels,
        config["local-epochs"],
        config["batch-size"],
        config["learning-rate"],
        config["momentum"],
    )
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(images)}),
    }
    return Message(content=RecordDict(content), reply_to=message)
