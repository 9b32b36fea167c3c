"""What a scalar round of three sites costs beside the measuring: the engine, and what is under it.

    python -m pytest benchmarks/bench_transport.py --benchmark-only

Sites measure for free, so a round's time is overhead: messages, waiting, the update of a few
thousand weights, the log's fsync. ``deployed`` is ``zorba federate`` over mutual TLS, a server and
three sites as processes of this machine; ``local`` the same server and clients in one process.
Look at ``load`` in the results: processes that share cores with others wait for them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from rich.console import Console
from zorba import machine
from zorba.apps.deploy import build, control
from zorba.apps.deploy.command import InitSettings
from zorba.apps.deploy.config import ServerConfig, SiteConfig
from zorba.apps.deploy.jobs import ASK_SECONDS
from zorba.apps.deploy.party import parties
from zorba.apps.deploy.project import init_project
from zorba.federated import EventReader, LocalTransport, RunFolder

from tests.apps.finetune.tiny import ROWS, save_tiny_llama

SITES = ("ada", "bob", "cleo")
SAMPLES = 5
ROUNDS, WARM_UP = 100, 10
PLAN_BYTES, REPLY_BYTES = 146, 77  # encoded, where all blocks have the same sites
PATIENCE = 300.0
GROUP = f"round: {len(SITES)} sites, P = {SAMPLES}, measured for free"

# In the processes that hold a client, and in no other.
_FREE = """
import sys
if any("worker_process" in word for word in sys.orig_argv):
    from benchmarks.bench_transport import build, free
    build.ModelObjective = free
"""


def free(*_: object, **__: object) -> Any:
    """Makes an objective that costs nothing, in the place of ``ModelObjective``."""
    return lambda round_number, step: (lambda noises: [0.0] * len(noises), 4)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "model", torch.float32)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = tmp_path / "project"
    model, rows = str(tmp_path / "model"), str(tmp_path / "rows.jsonl")
    init_project(
        InitSettings(
            folder=folder, site=SITES, model=model, data=rows, template="{sentence} It was",
            words=(" terrible", " great"), address=f"localhost:{port}", job="overhead",
            rounds=10 * (ROUNDS + WARM_UP), perturbations=SAMPLES,
        )
    )  # fmt: skip
    for site in (folder / "sites").iterdir():
        SiteConfig.read(site).model_copy(update={"threads": 1}).write(site)
    return folder


def measure(benchmark: Any, call: Callable[[], object]) -> None:
    """Times single calls, and notes how they are spread and how busy the machine was."""
    before = os.getloadavg()[0]
    benchmark.pedantic(call, rounds=ROUNDS, iterations=1, warmup_rounds=WARM_UP)
    seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(
        machine.describe(),
        load=(round(before, 2), round(os.getloadavg()[0], 2)),
        median_seconds=float(np.median(seconds)),
        p90_seconds=float(np.quantile(seconds, 0.9)),
    )


@contextmanager
def running(project: Path) -> Iterator[EventReader]:
    (project.parent / "sitecustomize.py").write_text(_FREE)
    root = Path(__file__).resolve().parents[1]
    paths = [str(project.parent), str(root), os.environ.get("PYTHONPATH", "")]
    found, console = parties(project), Console(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        try:
            control.start(found, console)
            yield EventReader(RunFolder(found[0].run).events)
        finally:
            control.stop([party for party in found if party.pid() is not None], console)


@pytest.mark.benchmark(group=GROUP)
def bench_deployed(benchmark: Any, project: Path) -> None:
    """From the end of a round to the end of the next."""
    measured: list[dict[str, Any]] = []
    with running(project) as events:

        def rounds() -> Iterator[dict[str, Any]]:
            while True:
                deadline = time.monotonic() + PATIENCE
                while not (found := [e for e in events.poll() if e["event"] == "round"]):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"no round within {PATIENCE} s: see the engine.log's")
                    time.sleep(0.002)
                yield from found

        ended = rounds()
        measure(benchmark, lambda: measured.append(next(ended)))
    measured = measured[WARM_UP:]
    assert all(event["clients"] == list(SITES) for event in measured)
    assert all(event["loss"] == 0.0 for event in measured), "somebody measured a model"
    assert measured[-1]["bytes_down"] == dict.fromkeys(SITES, PLAN_BYTES)
    assert measured[-1]["bytes_up"]["ada"] == REPLY_BYTES
    benchmark.extra_info.update(
        ask_seconds=ASK_SECONDS,
        median_round_seconds=float(np.median([event["seconds"] for event in measured])),
    )


@pytest.mark.benchmark(group=GROUP)
def bench_local(benchmark: Any, project: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ModelObjective", free)
        clients = {site: build.build_client(project / "sites" / site) for site in SITES}
    config = ServerConfig.read(project / "server")
    server = build.build_server(config, RunFolder(project.parent / "run"))
    transport = LocalTransport(clients)

    def next_round() -> None:
        messages = server.begin_round(SITES)
        while messages:
            replies, failures = transport.exchange(messages)
            assert not failures
            for name, data in replies.items():
                assert server.receive(name, data).accepted
            messages = server.ask_again()
        server.end_round()

    measure(benchmark, next_round)
    server.close()
