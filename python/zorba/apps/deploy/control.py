"""Starts, shows and stops the parties whose folders are on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from zorba.apps.command import plain_console
from zorba.apps.deploy.command import StartSettings, StatusSettings, StopSettings
from zorba.apps.deploy.config import ConfigError, ServerConfig
from zorba.apps.deploy.party import PartyFolder, finished, parties
from zorba.apps.deploy.summary import show_summary
from zorba.apps.watch.live import LiveView
from zorba.apps.watch.state import Follower
from zorba.federated.run_folder import RunFolder

# A busy machine takes half a minute to start or to end a supervisor; this is when it hangs.
_LONGEST_SECONDS = 120.0
_LOOK_SECONDS = 0.2
_LINE_SECONDS = 5.0


def run_start(settings: StartSettings) -> None:
    """Runs ``zorba federate start``; RuntimeError where the rounds are not done at the end."""
    console = plain_console()
    chosen = parties(settings.folder, settings.only)
    start(chosen, console)
    server = next((party for party in chosen if party.is_server), None)
    if settings.detach or server is None:
        return
    try:
        content = follow(server, console)
    except KeyboardInterrupt:
        console.print("no longer watching; the run goes on: zorba federate stop ends it")
        return
    stop([party for party in chosen if not party.is_server], console)
    if content is None:
        raise RuntimeError(f"the rounds are not done; {server.log} tells why")
    show_summary(Follower(RunFolder(server.run).events).update(), console)


def run_status(settings: StatusSettings) -> None:
    """Runs ``zorba federate status``."""
    show(parties(settings.folder, settings.only), plain_console())


def run_stop(settings: StopSettings) -> None:
    """Runs ``zorba federate stop``."""
    stop(parties(settings.folder, settings.only), plain_console())


def start(chosen: Sequence[PartyFolder], console: Console) -> None:
    """Starts a supervisor for each party that has none; where one fails, ends those it started.

    Raises:
        ConfigError: a supervisor did not start.
    """
    # Threads of several sites that wait for each other on one core make every round many times as
    # long: sites that share this machine share its cores.
    sites = sum(not party.is_server for party in chosen)
    cores = len(os.sched_getaffinity(0))
    share = {"OMP_NUM_THREADS": str(max(1, cores // max(1, sites)))}
    started: dict[PartyFolder, subprocess.Popen[bytes]] = {}
    try:
        for party in chosen:
            if party.pid() is not None:
                console.print(f"{party.name} runs already")
                continue
            party.run.mkdir(exist_ok=True)
            with party.log.open("ab") as log:
                started[party] = subprocess.Popen(
                    [sys.executable, "-m", "zorba.apps.deploy.supervisor", str(party.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(os.environ) if party.is_server else share | os.environ,
                    # A session of its own: Ctrl-C and the end of the terminal do not reach it.
                    start_new_session=True,
                )
        for party, process in started.items():
            _await_lock(party, process)
            console.print(f"started {party.name}: {party.path}")
    except BaseException:
        # Ctrl-C too: it does not reach supervisors, and those without a lock yet no stop finds.
        _end(list(started.values()))
        raise


def stop(chosen: Sequence[PartyFolder], console: Console) -> None:
    """Stops the parties' supervisors, and with them the engines."""
    # All are told before any is waited for: they stop side by side.
    pids = {party: party.pid() for party in chosen}
    for pid in pids.values():
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _LONGEST_SECONDS
    for party, pid in pids.items():
        while pid is not None and party.pid() is not None:
            if time.monotonic() > deadline:
                raise ConfigError(f"{party.name} (process {pid}) does not stop: see {party.log}")
            time.sleep(_LOOK_SECONDS)
        word = "stopped" if pid is not None else "was not running:"
        console.print(f"{word} {party.name}")


def show(chosen: Sequence[PartyFolder], console: Console) -> None:
    """Prints a line for each party, with the last sentence of its supervisor."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("party", "process", "engine", "round", "last word"):
        table.add_column(column)
    for party in chosen:
        pid, state = party.pid(), party.read_state()
        engine = str(state.get("engine") or "") if pid else ""
        done = ""
        if party.is_server:
            last = Follower(RunFolder(party.run).events).update().round
            done = f"{last} of {ServerConfig.read(party.path).rounds}"
        said = state.get("said") or [""]
        table.add_row(party.name, str(pid or "stopped"), engine, done, said[-1])
    console.print(table)


def follow(server: PartyFolder, console: Console) -> dict[str, Any] | None:
    """Shows the server's run until its supervisor ends.

    Returns:
        The summary; None where the rounds are not done.
    """
    shown = 0
    with LiveView(RunFolder(server.run).events, console, every=_LINE_SECONDS):
        # The server's supervisor ends after the last round; those of the sites stay.
        while server.pid() is not None:
            said = server.read_state().get("said", [])
            for text in said[shown:]:
                console.print(text)
            shown = len(said)
            time.sleep(_LOOK_SECONDS)
    return finished(server.run, ServerConfig.read(server.path).rounds)


def _await_lock(party: PartyFolder, process: subprocess.Popen[bytes]) -> None:
    """Waits until the supervisor holds its lock, or has ended."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    while party.pid() is None:
        # The lock is all that tells of a supervisor: without it no other command finds it.
        code = process.poll()
        if code == 0:
            return  # there was nothing to do any more
        if code is not None or time.monotonic() > deadline:
            raise ConfigError(f"{party.name} did not start: see {party.log}")
        time.sleep(_LOOK_SECONDS / 4)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends supervisors, and with them the engines."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _LONGEST_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
