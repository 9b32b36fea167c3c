"""What runs inside the engine, with the engine's side played by the tests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from nvflare.apis.shareable import Shareable, make_reply
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.flare import launcher
from zorba.apps.deploy.flare.executor import SiteExecutor
from zorba.apps.deploy.flare.launcher import RestartingHandle
from zorba.apps.deploy.flare.transport import FRAME, PROBLEM, RunStoppedError, TaskTransport
from zorba.apps.deploy.jobs import JobKeeper
from zorba.apps.deploy.project import init_project
from zorba.federated import Greeting, Hello, decode

from tests.apps.deploy.conftest import SITES, describe


class Engine:
    """Sites that answer tasks from threads of their own."""

    def __init__(self, quorum: int = 3) -> None:
        self.answers: dict[str, Any] = {site: lambda frame: frame[::-1] for site in SITES}
        self.sent: list[tuple[str, Any]] = []
        self.cancelled: list[Any] = []
        self.stopped = False
        self.threads: list[threading.Thread] = []
        self.transport = TaskTransport(
            self.send, self.cancelled.append, SITES, quorum, lambda: self.stopped
        )

    def send(self, task: Any, site: str) -> None:
        self.sent.append((site, task))
        answer = self.answers[site]
        if answer is not None:
            thread = threading.Thread(target=self.answer, args=(task, site, answer))
            self.threads.append(thread)
            thread.start()

    def answer(self, task: Any, site: str, answer: Callable[[bytes], Any]) -> None:
        result = answer(task.data[FRAME])
        if isinstance(result, bytes):
            reply = make_reply("OK")
            reply[FRAME] = result
            result = reply
        task.result_received_cb(
            SimpleNamespace(client=SimpleNamespace(name=site), result=result), None
        )

    def arrive(self, *sites: str) -> None:
        for site in sites or SITES:
            self.transport.heard(site)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    for thread in made.threads:
        thread.join()


def test_messages_go_to_their_sites_and_back_as_bytes(engine: Engine) -> None:
    engine.arrive()
    assert list(engine.transport.nodes()) == sorted(SITES)
    plans = {site: site.encode() for site in SITES}
    replies, failures = engine.transport.exchange(plans, 30.0)
    assert replies == {site: site.encode()[::-1] for site in SITES}
    assert failures == {}
    for site, task in engine.sent:
        assert {key: value for key, value in task.data.items() if key != "__headers__"} == {
            FRAME: site.encode()
        }
    assert len(engine.cancelled) == 3, "no task stays with the engine"


def test_site_that_misses_the_deadline_is_away_until_it_asks_again(engine: Engine) -> None:
    engine.arrive()
    engine.answers["bob"] = None
    replies, failures = engine.transport.exchange(dict.fromkeys(SITES, b"x"), 0.2)
    assert replies.keys() == {"ada", "cleo"}
    assert failures == {"bob": "no answer within 0.2 s"}
    engine.transport._quorum = 2
    assert list(engine.transport.nodes()) == ["ada", "cleo"]
    late = next(task for site, task in engine.sent if site == "bob")
    engine.answer(late, "bob", lambda frame: frame)
    assert (len(replies), len(failures)) == (2, 1), "its late answer changes nothing"
    engine.arrive("bob")
    assert list(engine.transport.nodes()) == sorted(SITES)


def test_nodes_wait_for_the_quorum(engine: Engine) -> None:
    engine.arrive("ada", "eve")
    later = threading.Thread(target=engine.arrive, args=("bob", "cleo"))
    engine.threads.append(later)
    threading.Timer(0.1, later.start).start()
    assert list(engine.transport.nodes()) == sorted(SITES), "and eve is no site"
    engine.transport.lost("bob")
    engine.stopped = True
    with pytest.raises(RunStoppedError):
        engine.transport.nodes()


def test_exchange_ends_when_the_engine_stops(engine: Engine) -> None:
    engine.arrive()
    engine.answers["ada"] = None
    threading.Timer(0.1, lambda: setattr(engine, "stopped", True)).start()
    with pytest.raises(RunStoppedError):
        engine.transport.exchange(dict.fromkeys(SITES, b"x"), None)
    assert len(engine.cancelled) == 3


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (None, "none of ours"),
        ({"frame": "text"}, "engine answered"),
        ({"problem": "no data"}, "no data"),
        ({"problem": ["a"]}, "engine answered"),
        ({}, "engine answered OK"),
    ],
)
def test_result_without_a_message_is_a_failure(
    engine: Engine, result: dict[str, Any] | None, sentence: str
) -> None:
    engine.arrive()
    made = None if result is None else make_reply("OK")
    for key, value in (result or {}).items():
        made[key] = value
    engine.answers["bob"] = lambda frame: made
    replies, failures = engine.transport.exchange(dict.fromkeys(SITES, b"x"), 30.0)
    assert replies.keys() == {"ada", "cleo"}
    assert sentence in failures["bob"]


# --- The site's executor --------------------------------------------------------------------------


class Site:
    """An executor in an engine that knows where its folder is."""

    def __init__(self, folder: Path) -> None:
        workspace = SimpleNamespace(get_root_dir=lambda: str(folder / "engine"))
        engine = SimpleNamespace(get_workspace=lambda: workspace)
        self.context: Any = SimpleNamespace(get_engine=lambda: engine)
        self.executor = SiteExecutor()
        for name in ("log_warning", "log_error", "log_exception"):
            setattr(self.executor, name, lambda *_: None)

    def ask(self, frame: Any) -> Shareable:
        task = Shareable()
        task[FRAME] = frame
        return self.executor.execute("zorba", task, self.context, None)


def test_executor_answers_with_the_messages_of_its_client(base: Path, tmp_path: Path) -> None:
    init_project(describe(base, tmp_path / "p"))
    site = Site(tmp_path / "p" / "sites" / "bob")
    assert site.ask(b"x")[PROBLEM] == "the site has not started"
    site.executor.handle_event("_start_run", site.context)
    hello = decode(site.ask(Greeting(7).encode())[FRAME])
    assert isinstance(hello, Hello)
    assert hello.client == "bob"
    assert "a message has at least 16 bytes" in site.ask(b"x")[PROBLEM]
    assert site.ask("text")[PROBLEM] == "the task holds no message"
    site.executor.handle_event("_end_run", site.context)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("bob.jsonl", "gone.jsonl", "the site cannot start: FileNotFoundError"),
        ("{sentence}", "{secret}", "the site cannot start: ValueError"),
        ("batch_size: 4", "batch_size: few", "the site cannot start: ConfigError"),
    ],
)
def test_site_whose_files_are_wrong_says_so_and_tells_nothing_of_its_data(
    base: Path, tmp_path: Path, old: str, new: str, told: str
) -> None:
    init_project(describe(base, tmp_path / "p"))
    folder = tmp_path / "p" / "sites" / "bob"
    text = (folder / "site.yaml").read_text()
    (folder / "site.yaml").write_text(text.replace(old, new))
    site = Site(folder)
    site.executor.handle_event("_start_run", site.context)
    problem = site.ask(Greeting(7).encode())[PROBLEM]
    assert told in problem
    assert "film" not in problem


# --- The launcher ---------------------------------------------------------------------------------


class Process:
    """The engine's handle of a process that ends as it is told."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.killed = False
        self.adapter = SimpleNamespace(poll=lambda: self.code)

    def wait(self) -> None: ...

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        self.killed = True


def test_process_that_was_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_FIRST_PAUSE", 0.01)
    started: list[Process] = []
    codes = iter((-9, -9, 0))

    def start() -> Process:
        started.append(Process(next(codes)))
        return started[-1]

    handle = RestartingHandle(start)
    handle.wait()
    assert [process.code for process in started] == [-9, -9, 0]
    assert handle.poll() == 0


def test_process_that_failed_or_was_terminated_is_not() -> None:
    started: list[Process] = []

    def start(code: int) -> Process:
        started.append(Process(code))
        return started[-1]

    RestartingHandle(lambda: start(101)).wait()
    assert len(started) == 1
    handle = RestartingHandle(lambda: start(-9))
    handle.terminate()
    handle.wait()
    assert len(started) == 2
    assert started[1].killed


# --- The keeper of the engine's job ---------------------------------------------------------------


class Session:
    """The administrator's view of an engine."""

    def __init__(self) -> None:
        self.connected = list(SITES)
        self.status: dict[str, str] = {}
        self.processes: set[str] = set()
        self.busy = list(SITES)
        self.aborted: list[str] = []

    def get_system_info(self) -> Any:
        clients = [SimpleNamespace(name=name) for name in self.connected]
        jobs = [SimpleNamespace(job_id=job) for job in self.processes]
        return SimpleNamespace(client_info=clients, job_info=jobs)

    def list_jobs(self) -> list[dict[str, str]]:
        return [{"job_id": job, "status": status} for job, status in self.status.items()]

    def get_job_status(self, job: str) -> str:
        return self.status[job]

    def submit_job(self, folder: str) -> str:
        assert (Path(folder) / "meta.json").exists()
        job = f"job-{len(self.status)}"
        self.status[job] = "RUNNING"
        self.processes.add(job)
        return job

    def get_client_job_status(self) -> list[dict[str, str]]:
        (job,) = self.processes
        return [{"client_name": name, "job_id": job} for name in self.busy]

    def abort_job(self, job: str) -> None:
        self.aborted.append(job)
        self.status[job] = "FINISHED:ABORTED"
        self.processes.discard(job)

    def close(self) -> None: ...


@pytest.fixture
def kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[JobKeeper, Session, list[float], list[str]]:
    """A keeper, what it sees, the time that it believes it is, and what it said."""
    init_project(describe(base, tmp_path / "p"))
    (tmp_path / "p" / "server" / "run").mkdir()
    now, said = [1000.0], []
    config = ServerConfig.read(tmp_path / "p" / "server")
    keeper = JobKeeper(tmp_path / "p" / "server", config, said.append)
    session = Session()
    monkeypatch.setattr(keeper, "_connect", lambda: session)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return keeper, session, now, said


def test_job_is_started_once_the_sites_are_there(kept: Any) -> None:
    keeper, session, _, _ = kept
    session.connected = ["ada", "bob", "eve"]
    keeper.step()
    assert session.status == {}
    session.connected = list(SITES)
    keeper.step()
    keeper.step()
    assert session.status == {"job-0": "RUNNING"}


def test_job_that_ended_is_replaced_with_growing_pauses(kept: Any) -> None:
    keeper, session, now, _ = kept
    starts = []
    for _ in range(400):
        before = len(session.status)
        keeper.step()
        if len(session.status) > before:
            starts.append(now[0])
            session.abort_job(f"job-{before}")
        now[0] += 0.5
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= 61.0


def test_job_of_a_killed_engine_is_replaced(kept: Any) -> None:
    keeper, session, now, said = kept
    keeper.step()
    session.processes.clear()  # the engine still says that it runs
    for _ in range(10):
        now[0] += 1.0
        keeper.step()
    assert session.status == {"job-0": "RUNNING", "job-1": "RUNNING"}
    assert "the engine's job ended: its process is gone" in said


def test_site_that_came_back_gets_a_job_that_it_is_in(kept: Any) -> None:
    keeper, session, now, said = kept
    keeper.step()
    session.busy = ["ada", "cleo"]
    for _ in range(5):
        now[0] += 1.0
        keeper.step()
    assert session.aborted == [], "not so soon after the start"
    now[0] += 60.0
    for _ in range(3):
        keeper.step()
        now[0] += 1.0
    assert session.aborted == ["job-0"]
    assert "bob came back: starting the engine's job again" in said
    session.busy = list(SITES)
    for _ in range(80):
        keeper.step()
        now[0] += 1.0
    assert session.status["job-1"] == "RUNNING"
    assert session.aborted == ["job-0"]


def test_engine_that_is_away_is_waited_for(kept: Any) -> None:
    keeper, session, _, said = kept
    keeper.step()
    session.get_system_info = lambda: (_ for _ in ()).throw(ConnectionError("nobody there"))
    keeper.step()
    keeper.step()
    assert keeper.connected == []
    assert [text for text in said if "nobody there" in text] == [
        "cannot reach the engine: ConnectionError: nobody there"
    ]
    del session.get_system_info
    keeper.step()
    assert keeper.connected == list(SITES)
    assert list(session.status) == ["job-0"]
