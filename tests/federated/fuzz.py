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
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zorba import machine
from zorba.federated import Client, FederationError
from zorba.federated.codec import HEADER_BYTES, MAGIC, SCHEMA
from zorba.optim import NoiseTerms

from tests.federated.world import World

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


def _limit(client: Client) -> None:
    """Lets a client refuse to run for as long as a plan may ask."""
    inner = client.objective

    def limited(round_number: int, step: int) -> Any:
        evaluate, examples = inner(round_number, step)

        def some(noises: Sequence[NoiseTerms]) -> Sequence[float]:
            if len(noises) > 16:
                raise FederationError(f"{len(noises)} evaluations are more than this test has time")
            return evaluate(noises)

        return some, examples

    client.objective = limited


class Attack:
    """A federation whose server and one client get hostile messages in the middle of a round."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder / "job.log", num_perturbations=2)
        self.world.run(2)
        plans = self.world.server.begin_round()
        self.client = self.world.clients["ada"]
        replies = [self.world.clients[name].handle(data) for name, data in plans.items()]
        hello = self.client.handle(self.world.greeting)
        self.messages = [*plans.values(), *replies, self.world.greeting, hello]
        _limit(self.client)
        self._before = self._state()

    def messages_of(self, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
        chance = random.Random(seed)
        names = (*self.world.clients, *NAMES)
        for _ in range(count):
            yield chance.choice(names), hostile(chance, self.messages)

    def strike(self, name: str, data: bytes) -> bool:
        """Sends one message to both; returns whether one of them took it for a message.

        AssertionError: a refused message changed something, or a reason is a flood itself.
        """
        server, replica = self.world.server, self.client.replica
        before, applied = dict(server.fingerprints), replica.applied_round
        receipt = server.receive(name, data)
        if not receipt.accepted:
            assert server.fingerprints == before
            assert len(receipt.reason) < 600
        answer = None
        with contextlib.suppress(FederationError):
            answer = self.client.handle(data)
        assert replica.applied_round == applied
        return receipt.accepted or answer is not None

    def _state(self) -> tuple[bytes, int]:
        return self.world.path.read_bytes(), self.client.replica.fingerprint(fresh=True)

    def end(self) -> None:
        """Goes on as if nothing had been; AssertionError where something had."""
        assert self._state() == self._before, "log or weights changed"
        fresh = World(self.world.path.with_name("undisturbed.log"), num_perturbations=2)
        expected = fresh.run(4).fingerprints
        assert self.world.run(2).fingerprints == expected, "the run ends as an undisturbed one"
        for world in (fresh, self.world):
            world.server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder))
        taken, sizes, every = 0, [], max(1, arguments.messages // 10)
        started = time.perf_counter()
        for n, (name, data) in enumerate(attack.messages_of(arguments.messages, arguments.seed)):
            taken += attack.strike(name, data)
            if (n + 1) % every == 0:
                gc.collect()
                sizes.append(machine.anonymous_memory(os.getpid()))
                print(f"{n + 1:>9,} messages, {sizes[-1] / 2**20:.2f} MiB resident", flush=True)
        seconds = time.perf_counter() - started
        print(f"{arguments.messages:,} messages in {seconds:.0f} s, {taken} of them well-formed")
        print(f"memory after the first tenth: {(sizes[-1] - sizes[0]) / 1024:+.0f} KiB")
        attack.end()
        print("log and weights unchanged; the run ends as an undisturbed one")


if __name__ == "__main__":
    main()
