"""Federated zeroth-order fine-tuning, see ``docs/protocol.md``: server, clients, and their loop."""

from zorba.federated.client import Client, Objective
from zorba.federated.errors import (
    DivergedError,
    FederationError,
    GapError,
    MessageError,
    ReplicaError,
    RunFolderError,
    ServerLogError,
)
from zorba.federated.events import EventReader, EventWriter
from zorba.federated.loop import FederationResult, LocalTransport, Transport, run_federation
from zorba.federated.messages import Greeting, Hello, Plan, Reply, decode
from zorba.federated.objective import Batches, ModelObjective
from zorba.federated.privacy import Privacy, PrivacyAccountant, PrivacySpent
from zorba.federated.replica import Replica
from zorba.federated.round import Receipt, Round, RoundReport
from zorba.federated.run_folder import RunFolder, RunRecorder
from zorba.federated.server import Server
from zorba.federated.settings import FederationSettings
from zorba.identity import ModelIdentity, model_fingerprint
from zorba.log import LogEntry, LogError, LogHeader
from zorba.log import LogFile as RoundLog

__all__ = [
    "Batches", "Client", "DivergedError", "EventReader", "EventWriter", "FederationError",
    "FederationResult", "FederationSettings", "GapError", "Greeting", "Hello", "LocalTransport",
    "LogEntry", "LogError", "LogHeader", "MessageError", "ModelIdentity", "ModelObjective",
    "Objective", "Plan", "Privacy", "PrivacyAccountant", "PrivacySpent", "Receipt", "Replica",
    "ReplicaError", "Reply", "Round", "RoundLog", "RoundReport", "RunFolder", "RunFolderError",
    "RunRecorder", "Server", "ServerLogError", "Transport", "decode", "model_fingerprint",
    "run_federation",
]  # fmt: skip
