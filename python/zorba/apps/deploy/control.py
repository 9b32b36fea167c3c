"""Starts, shows and stops the parties whose folders are on this machine."""

from __future__ import annotations

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
from zorba.apps.deploy.party import PartyFolder, parties, spawn
from zorba.apps.watch.live import LiveView, view_run
from zorba.apps.watch.state import Follower
from zorba.federated.run_folder import RunFolder

# A busy machine takes half a minute to start or to end a supervisor; this is when it hangs.
_LONGEST_SECONDS = 120.0
_LOOK_SECONDS = 0.2


def run_start(settings: StartSettings) -> None:
    """Runs ``zorba federate start``."""
    console = plain_console()
    chosen = parties(settings.folder, settings.only)
    start(chosen, console)
    if settings.detach or not chosen[0].is_server:
        return
    try:
        show_summary(chosen[0], follow(chosen, console), console)
    except KeyboardInterrupt:
        console.print("no longer watching; the run goes on: zorba federate stop ends it")


def run_status(settings: StatusSettings) -> None:
    """Runs ``zorba federate status``: a line for each party."""
    table = Table("party", "process", "round", "last word", box=None, pad_edge=False)
    for party in parties(settings.folder, settings.only):
        done = ""
        if party.is_server:
            state = Follower(RunFolder(party.run).events).update()
            done = f"{state.round} of {ServerConfig.read(party.path).rounds}"
        last_word = (party.said() or [""])[-1]
        table.add_row(party.name, str(party.pid() or "stopped"), done, last_word)
    plain_console().print(table)


def run_stop(settings: StopSettings) -> None:
    """Runs ``zorba federate stop``."""
    stop(parties(settings.folder, settings.only), plain_console())


def start(chosen: Sequence[PartyFolder], console: Console) -> None:
    """Starts a supervisor for each party that has none; where one fails, ends those it started."""
    # Threads of several sites that wait for each other on one core make every round many times as
    # long: sites that share this machine share its cores.
    sites = sum(not party.is_server for party in chosen)
    share = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // max(1, sites)))}
    started: dict[PartyFolder, subprocess.Popen[bytes]] = {}
    try:
        for party in chosen:
            if party.pid() is not None:
                console.print(f"{party.name} runs already")
                continue
            party.run.mkdir(exist_ok=True)
            with party.log.open("ab") as log:
                command = [sys.executable, "-m", "zorba.apps.deploy.party", str(party.path)]
                environment = os.environ if party.is_server else share | os.environ
                started[party] = spawn(command, log, env=environment)
        for party, process in started.items():
            _await_lock(party, process)
            console.print(f"started {party.name}: {party.path}")
    except BaseException:
        # Ctrl-C too: it does not reach supervisors, and those without a lock yet no stop finds.
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(_LONGEST_SECONDS)
        raise


def _await_lock(party: PartyFolder, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    # The lock is all that tells of a supervisor: without it no other command finds it. One that
    # ends with 0 had nothing to do any more.
    while party.pid() is None and process.poll() != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"{party.name} did not start: see {party.log}")
        time.sleep(_LOOK_SECONDS / 4)


def stop(chosen: Sequence[PartyFolder], console: Console) -> None:
    """Stops the parties' supervisors, and with them the engines."""
    # All are told before any is waited for: they stop side by side.
    pids = {party: party.pid() for party in chosen}
    for running in filter(None, pids.values()):
        os.kill(running, signal.SIGTERM)
    deadline = time.monotonic() + _LONGEST_SECONDS
    for party, pid in pids.items():
        while pid is not None and party.pid() is not None:
            if time.monotonic() > deadline:
                raise ConfigError(f"{party.name} (process {pid}) does not stop: see {party.log}")
            time.sleep(_LOOK_SECONDS)
        console.print(f"{'was not running:' if pid is None else 'stopped'} {party.name}")


def follow(chosen: Sequence[PartyFolder], console: Console) -> dict[str, Any]:
    """Shows the run of the first, the server, to its end; stops the others; returns the summary."""
    (server, *sites), shown = chosen, 0
    with LiveView(RunFolder(server.run).events, console, every=5.0):
        # The server's supervisor ends after the last round; those of the sites stay.
        while server.pid() is not None:
            said = server.said()
            for text in said[shown:]:
                console.print(text)
            shown = len(said)
            time.sleep(_LOOK_SECONDS)
    stop(sites, console)
    summary = server.summary(ServerConfig.read(server.path).rounds)
    if summary is None:
        raise RuntimeError(f"the rounds are not done; {server.log} tells why")
    return summary


def show_summary(server: PartyFolder, summary: dict[str, Any], console: Console) -> None:
    """Prints the end of a run, and what each private site has told."""
    console.print(view_run(Follower(RunFolder(server.run).events).update(), console))
    for name, told in summary["privacy"].items():
        spent = f"epsilon {told['epsilon']:.3g} at delta {told['delta']:g}"
        console.print(f"{name} has told {spent}, of each {told['unit']}")
