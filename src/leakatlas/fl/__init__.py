"""Federated learning, observed: clients, rounds, updates, and what an adversary sees of them."""

from leakatlas.fl.composition import check_composition
from leakatlas.fl.hooks import (
    ActsOn,
    ClientContext,
    Defense,
    LocalStep,
    Memory,
    Message,
    RoundSetup,
    ServerContext,
    Trait,
    acts_at,
)
from leakatlas.fl.protocol import FedAVG, FedSGD, Protocol, task_loss
from leakatlas.fl.rounds import (
    Client,
    Federation,
    RoundRecord,
    poisson_cohort,
    uniform_cohort,
)
from leakatlas.fl.scenario import Scenario, Stage, Truth, stage
from leakatlas.fl.seeding import stream, stream_seed
from leakatlas.fl.state import ModelRef, load_into, model_state, state_hash
from leakatlas.fl.statistics import batchnorm_statistics
from leakatlas.fl.tampering import TamperedModel, Tampering
from leakatlas.fl.update import Update, average
from leakatlas.fl.view import Distribution, RoundView, View

__all__ = [
    "ActsOn",
    "Client",
    "ClientContext",
    "Defense",
    "Distribution",
    "FedAVG",
    "FedSGD",
    "Federation",
    "LocalStep",
    "Memory",
    "Message",
    "ModelRef",
    "Protocol",
    "RoundRecord",
    "RoundSetup",
    "RoundView",
    "Scenario",
    "ServerContext",
    "Stage",
    "TamperedModel",
    "Tampering",
    "Trait",
    "Truth",
    "Update",
    "View",
    "acts_at",
    "average",
    "batchnorm_statistics",
    "check_composition",
    "load_into",
    "model_state",
    "poisson_cohort",
    "stage",
    "state_hash",
    "stream",
    "stream_seed",
    "task_loss",
    "uniform_cohort",
]
