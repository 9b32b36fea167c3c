"""A replica on disk: one safetensors file, written in one step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

import zorba_kernels as zk
from zorba.federated.errors import ReplicaError
from zorba.files import write_whole
from zorba.identity import ModelIdentity
from zorba.tables import Tables
from zorba_kernels.noise import NOISE_VERSION, Distribution, Rounding

CHECKPOINT_SCHEMA = 1
_KEY = "zorba_replica"


@dataclass(frozen=True)
class CheckpointInfo:
    """A replica beside its weights; see ``Replica`` for the fields. ``job`` is 0 for none."""

    job: int
    applied_round: int
    fingerprint: int
    identity: ModelIdentity
    distribution: Distribution
    rounding: Rounding
    noise_version: int = NOISE_VERSION
    schema: int = CHECKPOINT_SCHEMA


def save_checkpoint(path: Path, table: Tables, info: CheckpointInfo) -> None:
    """Writes the table's tensors and ``info``; needs the package safetensors."""
    from safetensors.torch import save_file  # optional: only checkpoints need it

    # safetensors refuses tensors that share a storage, which slices of one buffer do.
    tensors = {
        e.name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
        for e in table.entries
        for t in [e.tensor.contiguous()]
    }
    # Weights and round in one file, in one step: two files could be of two rounds after a kill.
    metadata = {_KEY: json.dumps(asdict(info), sort_keys=True)}
    write_whole(path, lambda draft: save_file(tensors, draft, metadata=metadata))


def load_checkpoint(path: Path, table: Tables) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Reads a checkpoint: its info, and its tensors by name. The table is not modified.

    Raises:
        ReplicaError: it is damaged, or its names, shapes or dtypes are not those of the table.
    """
    from safetensors import SafetensorError, safe_open  # optional: only checkpoints need it

    # Everything is read and checked before the caller changes a weight: a bad file costs nothing.
    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        identity = ModelIdentity(**fields.pop("identity"))
        info = CheckpointInfo(identity=identity, **fields)
    except (OSError, SafetensorError) as error:
        raise ReplicaError(f"checkpoint {path} cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ReplicaError(f"{path} is no replica checkpoint: {error!r}") from None
    # Weights of another noise version are no error yet, but their next update would be.
    if (info.schema, info.noise_version) != (CHECKPOINT_SCHEMA, NOISE_VERSION):
        raise ReplicaError(
            f"checkpoint {path} has schema {info.schema} and noise version {info.noise_version}; "
            f"this package reads schema {CHECKPOINT_SCHEMA} and noise version {NOISE_VERSION}"
        )
    # The dtype as well: the same numbers in another dtype are other bits, and another replica.
    mine = {e.name: (tuple(e.tensor.shape), e.tensor.dtype) for e in table.entries}
    theirs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ReplicaError(
                f"checkpoint {path} has {name!r} as {theirs.get(name)}, expected {mine.get(name)}"
            )
    # A slice of a parameter has the noise, and the fingerprint, of its place in the whole.
    loaded = zk.ParamTable(tensors, offsets={e.name: e.offset for e in table.entries})
    if zk.fingerprint(loaded) != info.fingerprint:
        raise ReplicaError(f"checkpoint {path} is damaged: its fingerprint does not match")
    return info, tensors
