"""Controller and executor inside the engine, whose side the tests play: answers late, or none."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.shareable import Shareable, make_reply
from zorba.apps.deploy import engine as ours
from zorba.apps.deploy.engine import FRAME, PROBLEM, RunStoppedError
from zorba.federated import Greeting, Hello, decode

from tests.apps.deploy.conftest import SITES


class Engine(ours.FederationController):  # type: ignore[misc]
    """A controller whose sites answer a task as soon as it is sent."""

    def __init__(self) -> None:
        super().__init__()
        # Of each site to a message; None where it keeps silent.
        self.answers: dict[str, Any] = {site: lambda frame: frame[::-1] for site in SITES}
        self.sent: list[tuple[str, Any]] = []  # site and task of each message
        self.cancelled: list[Any] = []
        self.triggered = False  # whether the run is to stop
        self._config = SimpleNamespace(sites=dict.fromkeys(SITES), quorum=0)
        self._abort, self._context = self, None

    def send(self, task: Any, context: Any, targets: list[str]) -> None:
        (site,) = targets
        self.sent.append((site, task))
        if self.answers[site] is not None:
            self.answer(task, self.answers[site](task.data[FRAME]))

    def cancel_task(self, task: Any) -> None:
        self.cancelled.append(task)

    def answer(self, task: Any, result: Any) -> None:
        """Gives a task its result, by the names of arguments that the engine uses."""
        if isinstance(result, bytes):
            result, frame = make_reply("OK"), result
            result[FRAME] = frame
        task.result_received_cb(client_task=SimpleNamespace(result=result), fl_ctx=None)

    def arrive(self, *sites: str) -> None:
        for site in sites or SITES:
            peer = SimpleNamespace(get_identity_name=lambda site=site: site)
            context = SimpleNamespace(get_peer_context=lambda peer=peer: peer)
            self.handle_event("_before_process_task_request", context)

    def leave(self, site: str) -> None:
        context = SimpleNamespace(get_prop=lambda _: site)
        self.handle_event("_client_disconnected", context)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_site_that_misses_the_deadline_is_away_until_it_asks_again(engine: Engine) -> None:
    engine.arrive()
    engine.answers["bob"] = None
    replies, failures = engine.exchange(dict.fromkeys(SITES, b"xy"), 0.01)
    assert replies == {"ada": b"yx", "cleo": b"yx"}
    assert len(engine.cancelled) == 3, "no task stays with the engine"
    assert failures == {"bob": "no answer within 0.01 s"}
    engine._config.quorum = 2
    assert list(engine.nodes()) == ["ada", "cleo"]
    late = next(task for site, task in engine.sent if site == "bob")
    engine.answer(late, b"x")
    assert (len(replies), len(failures)) == (2, 1), "its late answer changes nothing"
    engine.arrive("bob")
    assert list(engine.nodes()) == sorted(SITES)


def test_nodes_wait_for_the_quorum(engine: Engine) -> None:
    engine.arrive("ada", "eve")
    later = threading.Thread(target=engine.arrive, args=("bob", "cleo"))
    later.start()
    assert list(engine.nodes()) == sorted(SITES), "and eve is no site"
    later.join()
    engine.leave("bob")
    stop = threading.Thread(target=setattr, args=(engine, "triggered", True))
    stop.start()
    with pytest.raises(RunStoppedError):
        engine.nodes()
    stop.join()


def test_exchange_ends_when_the_engine_stops(engine: Engine) -> None:
    engine.answers["ada"], engine.triggered = None, True
    with pytest.raises(RunStoppedError):
        engine.exchange(dict.fromkeys(SITES, b"x"), None)
    assert len(engine.cancelled) == 3


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"frame": "text"}, "engine answered"),
        ({"problem": "no data"}, "no data"),
        ({"problem": ["a"]}, "engine answered"),
        ({}, "engine answered OK"),
    ],
)
def test_result_without_a_message_is_a_failure(
    engine: Engine, result: dict[str, Any], sentence: str
) -> None:
    made = make_reply("OK")
    made.update(result)
    engine.answers["bob"] = lambda frame: made
    replies, failures = engine.exchange(dict.fromkeys(SITES, b"x"), 30.0)
    assert replies.keys() == {"ada", "cleo"}
    assert sentence in failures["bob"]


# --- The site's executor --------------------------------------------------------------------------


class Site:
    """An executor in an engine that knows where its folder is."""

    def __init__(self, folder: Path) -> None:
        workspace = SimpleNamespace(get_root_dir=lambda: str(folder / "engine"))
        engine = SimpleNamespace(get_workspace=lambda: workspace)
        self.context: Any = SimpleNamespace(get_engine=lambda: engine)
        self.executor = ours.SiteExecutor()
        for name in ("log_warning", "log_error", "log_exception"):
            setattr(self.executor, name, lambda *_: None)

    def ask(self, frame: Any) -> Shareable:
        task = Shareable()
        task[FRAME] = frame
        return self.executor.execute("zorba", task, self.context, None)


def test_executor_answers_with_the_messages_of_its_client(project: Path) -> None:
    site = Site(project / "sites" / "bob")
    assert site.ask(b"x")[PROBLEM] == "the site has not started"
    site.executor.handle_event("_start_run", site.context)
    hello = decode(site.ask(Greeting(7).encode())[FRAME])
    assert isinstance(hello, Hello)
    assert hello.client == "bob"
    assert "a message has at least 16 bytes" in site.ask(b"x")[PROBLEM]
    assert site.ask("text")[PROBLEM] == "a message is bytes, got str"
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
    project: Path, old: str, new: str, told: str
) -> None:
    folder = project / "sites" / "bob"
    text = (folder / "site.yaml").read_text()
    (folder / "site.yaml").write_text(text.replace(old, new))
    site = Site(folder)
    site.executor.handle_event("_start_run", site.context)
    problem = site.ask(Greeting(7).encode())[PROBLEM]
    assert told in problem
    assert "film" not in problem
