"""The engine itself: processes over TLS that are killed, with strangers at the doors.

Everything here looks at one run, since starting the engine takes many seconds. While a site holds
its rounds up, strangers knock and a job with code is submitted; then processes are killed, and the
site lets so few rounds pass that the run cannot end before the last kill, however quick it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.apps.deploy.build import build_client, build_server
from zorba.federated import LocalTransport, RunFolder, run_federation
from zorba.federated.events import EventReader

from tests.apps.deploy.conftest import SITES, change_server, change_site, make_project
from tests.apps.deploy.deployed import GATE, Deployed, Gate, federate, init, wait_for
from tests.apps.deploy.intruders import knock, listeners, listening_unix_sockets, submit_code

ROUNDS = 16

# In every process of the run: notes that it is there, and each class that it unpickles.
_WATCHER = """
import os, sys
def _write(*words):
    with open(os.environ["ZORBA_TEST_PICKLES"], "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")
def _note(event, arguments):
    if event == "pickle.find_class":
        _write("unpickled", *arguments, "in", *sys.orig_argv)
sys.addaudithook(_note)
_write("watched", *sys.orig_argv)
"""


@pytest.fixture(scope="module")
def seen(base: Path, tmp_path_factory: pytest.TempPathFactory, full: bool) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("deployed")
    deployed = Deployed(home / "project")
    gate = Gate(home / "gate", 3)
    port = init(base, deployed.folder, ROUNDS)
    strangers = _strangers(base, home, deployed.folder, port)
    watch = _watch(home, gate, deployed)
    try:
        federate("start", deployed.folder, "--detach", **watch)
        for project in strangers.values():
            federate("start", project.folder, "--detach", "--only", "ada")
        wait_for("first rounds", lambda: deployed.rounds() == gate.rounds)
        made = _look(deployed, strangers, home / "code")
        for project in strangers.values():
            project.end()
        # Processes of two sites: one that holds a client, and all of a site. The server's die with
        # them, or with --full after them: another job of the engine costs half a minute.
        process = deployed.process
        site = process("ada", "client_train"), process("ada", "worker_process")
        first = [process("bob", "worker_process"), *site]
        if full:
            deployed.kill(gate, *first)
            first = []
        server = process("server", "runner_process"), process("server", "server_train")
        deployed.kill(gate, *first, *server)
        gate.open(ROUNDS)
        wait_for("end", deployed.run.summary.exists)
        folder = deployed.party("server")
        wait_for("server to stop", lambda: "stopped" in federate("status", folder))
        made.watch, made.notes = watch, home / "pickles"
        yield made
    finally:
        for project in (deployed, *strangers.values()):
            project.end()


def _look(deployed: Deployed, strangers: dict[str, Deployed], code: Path) -> Any:
    """Notes what there is to see while no round ends."""
    made = SimpleNamespace(deployed=deployed, strangers=strangers, listeners=listeners(deployed))
    made.status = federate("status", deployed.folder)
    made.unix_sockets = listening_unix_sockets(deployed.processes())
    ports = {port for _, port in made.listeners}
    made.answers = knock(ports, deployed.folder, strangers["other"].folder)
    made.code, made.commands = submit_code(deployed, code)
    log = strangers["other"].log
    wait_for("refusal of the server", lambda: "CERTIFICATE_VERIFY_FAILED" in log("ada"))
    claim = "authenticated as 'bob' but claimed endpoint 'ada'"
    wait_for("refusal of the thief", lambda: claim in deployed.log())
    processes = [process for project in strangers.values() for process in project.processes()]
    made.strangers_at_work = [p for p in processes if "worker_process" in Deployed.command(p)]
    return made


def _watch(home: Path, gate: Gate, deployed: Deployed) -> dict[str, str]:
    """Environment of the run's processes, which note what they unpickle, and of which one waits."""
    (home / "sitecustomize.py").write_text(_WATCHER + GATE)
    path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    held = deployed.folder / "sites" / "cleo" / "engine"
    values = {"PICKLES": home / "pickles", "GATE": gate.path, "HELD": held}
    return {"PYTHONPATH": path} | {f"ZORBA_TEST_{name}": str(values[name]) for name in values}


def _strangers(base: Path, home: Path, mine: Path, port: int) -> dict[str, Deployed]:
    """Projects that go to this server: one with the same names, of another authority, and a copy
    of bob's folder that says it is ada, with bob's certificate."""
    other = make_project(base, home / "other", address=f"localhost:{port}")
    site = home / "thief" / "sites" / "ada"
    shutil.copytree(mine / "sites" / "bob", site)
    change_site(site, name="ada")
    return {"other": Deployed(other), "thief": Deployed(home / "thief")}


def test_run_ends_where_the_undisturbed_run_ends(seen: Any, project: Path, tmp_path: Path) -> None:
    clients = {site: build_client(project / "sites" / site) for site in SITES}
    config = change_server(project / "server", rounds=ROUNDS)
    server = build_server(config, RunFolder(tmp_path / "run"))
    result = run_federation(server, LocalTransport(clients), ROUNDS)
    server.close()
    summary = json.loads(seen.deployed.run.summary.read_text())
    assert summary["replicas_identical"]
    assert summary["final_round"] == ROUNDS
    told = {name: f"{value:016x}" for name, value in result.fingerprints.items()}
    assert summary["fingerprints"] == told
    assert seen.deployed.run.log.read_bytes() == (tmp_path / "run" / "federation.log").read_bytes()


def test_every_round_had_every_site(seen: Any, full: bool) -> None:
    events = EventReader(seen.deployed.run.events).poll()
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    assert all(event["clients"] == list(SITES) for event in rounds)
    starts = sum(event["event"] == "start" for event in events)
    assert starts >= 2 + full, "each kill ended its job"


def test_status_tells_who_runs(seen: Any) -> None:
    assert all(word in seen.status for word in ("server", *SITES, f"of {ROUNDS}"))
    assert "stopped" not in seen.status


def test_nothing_listens_without_tls_and_a_certificate_of_the_project(seen: Any) -> None:
    assert {party for party, _ in seen.listeners} == {"server", *SITES}
    refused = ("nobody, TLS 1.2", "nobody, TLS 1.3", "stranger, TLS 1.2", "stranger, TLS 1.3")
    expected = {"plain": "nothing", "member, TLS 1.2": "let in"} | dict.fromkeys(refused, "refused")
    assert all(told == expected for told in seen.answers.values()), seen.answers
    assert len(seen.answers) == len(seen.listeners)
    assert seen.unix_sockets == set()
    for (party, port), address in seen.listeners.items():
        own = party == "server" or address == "127.0.0.1"
        assert own, f"{party} listens at {address}:{port}, not for its own machine alone"


def test_strangers_get_no_part_in_the_run(seen: Any) -> None:
    """Another authority's site, and a member in another's name: both were refused, see _look."""
    assert seen.strangers_at_work == []
    for project in seen.strangers.values():
        site = project.folder / "sites" / "ada"
        assert not list(site.glob("run/*.safetensors"))
        assert not list(site.glob("engine/*/app_*"))


def test_nothing_is_unpickled(seen: Any) -> None:
    notes = seen.notes.read_text().splitlines()
    watched = [line for line in notes if line.startswith("watched")]
    for module in ("deploy.party", "server_train", "client_train", "runner_process"):
        assert any(module in line for line in watched), module
    assert sum("worker_process" in line for line in watched) >= 3
    assert [line for line in notes if line.startswith("unpickled")] == []
    code = "import fractions, pickle; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))"
    subprocess.run([sys.executable, "-c", code], env=os.environ | seen.watch, check=True)
    assert "unpickled fractions Fraction" in seen.notes.read_text()


def test_no_code_came_to_a_site_and_the_administrator_runs_no_commands(seen: Any) -> None:
    assert "BYOC not permitted" in seen.code
    for site in SITES:
        engine = seen.deployed.folder / "sites" / site / "engine"
        came = {path.suffix for path in engine.glob("*/app_*/**/*") if path.is_file()}
        assert came == {".json", ".crt"}

    assert seen.commands
    for command, told in seen.commands.items():
        assert "not authorized" in told, (command, told)
