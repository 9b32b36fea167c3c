"""Bytes that are no messages, and messages that lie, in any number.

    python -m tests.federated.fuzz [--messages 100000] [--seed 1]

sends them to a server in the middle of a round and to a client, and says what became of the log,
of the weights and of the memory. Half of the messages have a length and CRC that fit, as somebody
makes them who knows the format.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from zorba import machine
from zorba.federated import FederationError, Greeting, Objective, run_federation
from zorba.federated.codec import HEADER_BYTES, MAGIC, SCHEMA
from zorba.optim import NoiseTerms
from zorba.optim.terms import Evaluate

from tests.federated.world import World, make_settings

FLOATS = [struct.pack("<f", x) for x in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30)]
NAMES = ("", "eve", "ADA", "ada ", "a" * 64, "a" * 65, "../ada", "ada\n", "\u00e4da", "ada\0")


def sealed(data: bytes) -> bytes:
    """The bytes with magic, schema, length and CRC that fit."""
    kind = data[6:8].ljust(2, b"\0")
    payload = data[HEADER_BYTES:]
    head = struct.pack("<4sH2sI", MAGIC, SCHEMA, kind, HEADER_BYTES + len(payload))
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def hostile(chance: random.Random, messages: list[bytes]) -> bytes:
    """Random bytes, or a message that was cut, stretched, spliced with another, or changed."""
    data = bytearray(chance.choice(messages))
    way = chance.randrange(7)
    if way == 0:
        data = bytearray(chance.randbytes(chance.randrange(600)))
    elif way == 1:
        del data[chance.randrange(len(data)) :]
    elif way == 2:
        data += chance.randbytes(chance.randrange(1, 200))
    elif way == 3:
        other = chance.choice(messages)
        data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]
    elif way == 4:
        at = chance.randrange(len(data) - 3)
        data[at : at + 4] = chance.choice(FLOATS)
    else:
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return sealed(bytes(data)) if chance.random() < 0.5 else bytes(data)


def _limited(objective: Objective) -> Objective:
    """The same, but it refuses to run for as long as a plan may ask."""

    def limited(round_number: int, step: int) -> tuple[Evaluate, int]:
        evaluate, examples = objective(round_number, step)

        def evaluate_some(noises: Sequence[NoiseTerms]) -> Sequence[float]:
            if len(noises) > 16:
                raise FederationError(f"{len(noises)} evaluations are more than this test has time")
            return evaluate(noises)

        return evaluate_some, examples

    return limited


class Attack:
    """A federation whose server and one client get hostile messages in the middle of a round."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder / "job.log", make_settings(num_perturbations=2))
        run_federation(self.world.server, self.world.transport, 2)
        self.plans = self.world.server.begin_round()
        self.client = self.world.clients["ada"]
        replies = [self.world.clients[name].handle(data) for name, data in self.plans.items()]
        greeting = Greeting(self.world.settings.job_id).encode()
        self.client.objective = _limited(self.client.objective)
        self.messages = [*self.plans.values(), *replies, greeting, self.client.handle(greeting)]

    def messages_of(self, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
        """Yields names of senders and messages."""
        chance = random.Random(seed)
        names = (*self.world.clients, *NAMES)
        for _ in range(count):
            yield chance.choice(names), hostile(chance, self.messages)

    def strike(self, name: str, data: bytes) -> bool:
        """Sends one message to both; returns whether one of them took it for a message.

        Raises:
            AssertionError: a refused message changed something, or a reason is a flood itself.
        """
        server, replica = self.world.server, self.client.replica
        before = (server.admitted, dict(server.fingerprints))
        receipt = server.receive(name, data)
        if not receipt.accepted:
            assert (server.admitted, dict(server.fingerprints)) == before
            assert len(receipt.reason) < 600
        applied = replica.applied_round
        answer = None
        with contextlib.suppress(FederationError):
            answer = self.client.handle(data)
        assert replica.applied_round == applied
        return receipt.accepted or answer is not None

    def end(self) -> bool:
        """Goes on as if nothing had been; returns whether all replicas are as they would be."""
        fresh = World(self.world.path.with_name("undisturbed.log"), self.world.settings)
        expected = run_federation(fresh.server, fresh.transport, 4).fingerprints
        fresh.server.close()
        return run_federation(self.world.server, self.world.transport, 2).fingerprints == expected


def main() -> None:
    """Sends the messages and prints what became of everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder))
        log = attack.world.path.read_bytes()
        weights = attack.client.replica.fingerprint(fresh=True)
        taken, sizes = 0, []
        every = max(1, arguments.messages // 10)
        started = time.perf_counter()
        for n, (name, data) in enumerate(attack.messages_of(arguments.messages, arguments.seed)):
            taken += attack.strike(name, data)
            if (n + 1) % every == 0:
                gc.collect()
                sizes.append(machine.anonymous_memory(os.getpid()))
                print(f"{n + 1:>9,} messages, {sizes[-1] / 2**20:.2f} MiB resident", flush=True)
        seconds = time.perf_counter() - started
        same_log = attack.world.path.read_bytes() == log
        same_weights = attack.client.replica.fingerprint(fresh=True) == weights
        same_end = attack.end()
        growth = (sizes[-1] - sizes[0]) / 1024
        print(f"{arguments.messages:,} messages in {seconds:.0f} s, {taken} of them well-formed")
        print(f"memory after the first tenth: {growth:+.0f} KiB")
        print(f"log unchanged: {same_log}; weights unchanged: {same_weights}")
        print(f"the run ends as an undisturbed one: {same_end}")
        attack.world.server.close()
    sys.exit(0 if same_log and same_weights and same_end else 1)


if __name__ == "__main__":
    main()
