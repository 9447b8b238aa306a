"""The client: trains on its own images; what goes by is captured, and may be guarded."""

import os
import signal
from functools import partial

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod

import leakatlas
from leakatlas import FedAVG
from leakatlas.integrations.flower import (
    Guard,
    capture_raw_mod,
    capture_wire_mod,
    guard_mod,
)
from quickstart.meter import meter_mod
from quickstart.task import load_data, net, train


def guard(message, context, call_next):
    """Answer a tampered model, or an update that would give images away, as configured.

    The guard knows the client's images and its local training: it reads the update as a server
    would, and replays it. Noise in between cannot be replayed.
    """
    config = context.run_config
    choice = config["guard"]
    if choice == "off":
        return call_next(message, context)
    partition = int(context.node_config["partition-id"])
    training = FedAVG(
        epochs=config["local-epochs"],
        batch_size=config["batch-size"],
        lr=config["learning-rate"],
        momentum=config["momentum"],
        mode=config["mode"],
    )
    own = (
        {}
        if config["guard-sees"] == "weights"
        else {"examples": lambda: load_data(partition, config["examples"])}
    )
    if own and config["defense"] == "none":
        own["protocol"] = training
    watcher = Guard(
        model=partial(net, config["network"]),
        on_alarm=choice,
        defense=leakatlas.defense("clipping", max_norm=0.01) if choice == "defend" else None,
        **own,
    )
    return guard_mod(watcher)(message, context, call_next)


def privacy(message, context, call_next):
    """Flower's own local differential privacy, or its clipping, where the run asks for one.

    The arguments stand in the run configuration, so that captures record them and the doctor can
    say what they are worth.
    """
    config = context.run_config
    local_dp = LocalDpMod(
        clipping_norm=config["dp-clipping-norm"],
        sensitivity=config["dp-sensitivity"],
        epsilon=config["dp-epsilon"],
        delta=config["dp-delta"],
    )
    mods = {"local_dp": local_dp, "clipping": fixedclipping_mod}
    mod = mods.get(config["defense"])
    return mod(message, context, call_next) if mod else call_next(message, context)


def where_asked(mod):
    """A capture, in runs that ask for one."""

    def maybe(message, context, call_next):
        if not context.run_config["capture"]:
            return call_next(message, context)
        return mod(message, context, call_next)

    return maybe


# First: what goes on the wire. Last: what training gave. Between them: what guards the update.
capture_wire, capture_raw = where_asked(capture_wire_mod), where_asked(capture_raw_mod)
app = ClientApp(mods=[meter_mod, capture_wire, guard, privacy, capture_raw])


def break_down(how):
    """What happens to real clients: one fails, or its process is killed."""
    if how == "raise":
        raise RuntimeError("the disk is full")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


@app.train()
def fit(message: Message, context: Context):
    """One round of local training."""
    config = context.run_config
    model = net(config["network"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    partition = int(context.node_config["partition-id"])
    images, labels = load_data(partition, config["examples"])
    if partition == 0 and message.content["config"]["server-round"] == 2:
        break_down(config["fail"])
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
