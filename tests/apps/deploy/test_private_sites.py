"""Sites whose scalars are private: what ``privacy`` in their files does, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.apps.deploy.build import build_client, build_server
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.project import init_project
from zorba.apps.deploy.summary import lines, summarise
from zorba.apps.watch import Follower
from zorba.federated import (
    LocalTransport,
    Privacy,
    PrivacyAccountant,
    RunFolder,
    RunRecorder,
    run_federation,
)

from tests.apps.deploy.conftest import SITES, describe

ROUNDS = 3
POLICIES: dict[str, dict[str, Any]] = {
    "ada": {"unit": "example", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5},
    "bob": {"unit": "client", "clip": 2.0, "noise_multiplier": 8.0, "delta": 1e-6},
}


def edit(site: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a site's file as a person does."""
    path = site / "site.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def make_private(site: Path, **changes: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["privacy"] = POLICIES[site.name] | changes
        content["balanced"] = site.name != "ada"

    edit(site, change)


@pytest.fixture
def project(base: Path, tmp_path: Path) -> Path:
    init_project(describe(base, tmp_path / "p", rounds=ROUNDS))
    return tmp_path / "p"


def test_epsilon_of_each_private_site_is_in_the_summary(project: Path) -> None:
    for site in POLICIES:
        make_private(project / "sites" / site)
    config = ServerConfig.read(project / "server")
    run = RunFolder(project / "server" / "run")
    server = build_server(config, run)
    clients = {site: build_client(project / "sites" / site) for site in SITES}
    with RunRecorder(run, server, ROUNDS) as recorder:
        result = run_federation(server, LocalTransport(clients), ROUNDS, recorder.round)
        recorder.end(result)
    server.close()
    assert result.replicas_identical
    content = summarise(Follower(run.events).update())
    assert content["privacy"].keys() == POLICIES.keys()
    told = dict(lines(content))
    for site, policy in POLICIES.items():
        expected = PrivacyAccountant(Privacy(**policy)).spent(ROUNDS)
        assert content["privacy"][site] == {
            "unit": expected.unit, "epsilon": expected.epsilon, "delta": expected.delta
        }  # fmt: skip
        assert told[f"{site} has told"] == (
            f"epsilon {expected.epsilon:.3g} at delta {policy['delta']:g}, of each {expected.unit}"
        )
    assert "cleo has told" not in told


def test_what_was_spent_counts_after_a_restart(project: Path) -> None:
    site = project / "sites" / "ada"
    make_private(site)
    client = build_client(site)
    assert client.privacy is not None
    client.privacy.note(50, b"question", b"answer")
    make_private(site, noise_multiplier=8.0)
    again = build_client(site)
    assert again.privacy is not None
    assert again.privacy.last == (b"question", b"answer")
    assert again.privacy.spent().epsilon == client.privacy.spent().epsilon > 0


def test_budget_that_is_spent_is_told_and_the_others_go_on(project: Path) -> None:
    site = project / "sites" / "ada"
    make_private(site, max_epsilon=0.5)
    config = ServerConfig.read(project / "server")
    server = build_server(config, RunFolder(project / "server" / "run"))
    clients = {name: build_client(project / "sites" / name) for name in SITES}
    result = run_federation(server, LocalTransport(clients), ROUNDS)
    server.close()
    assert result.replicas_identical
    for report in result.reports:
        assert report.clients == ("bob", "cleo")
        assert "the privacy budget is spent" in report.failures["ada"]


def test_sites_without_privacy_need_no_more_than_before(project: Path) -> None:
    for site in SITES:
        assert SiteConfig.read(project / "sites" / site).privacy is None
    assert build_client(project / "sites" / "ada").privacy is None
    assert not (project / "sites" / "ada" / "run" / "privacy.json").exists()


def test_policy_survives_a_round_trip(project: Path, tmp_path: Path) -> None:
    site = project / "sites" / "ada"
    make_private(site)
    config = SiteConfig.read(site)
    assert config.privacy == Privacy("example", 1.0, 4.0, 1e-5, math.inf)
    config.write(tmp_path)
    assert SiteConfig.read(tmp_path) == config


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (True, "privacy is True; expected names and values under it: unit, clip, noise_multip"),
        ({"unit": "user"}, "privacy, unit is 'user'; expected example or client"),
        ({"unit": ["client"]}, "expected example or client"),
        ({"clip": "much"}, "privacy, clip is 'much'; expected float"),
        ({"clip": -1.0}, "privacy: clip must be positive and finite, got -1.0"),
        ({"noise_multiplier": 0}, "noise_multiplier must be positive and finite, got 0"),
        ({"delta": 2}, "delta must be between 0 and 1, got 2"),
        ({"max_epsilon": 0}, "max_epsilon must be positive, got 0"),
        ({"sigma": 1.0}, "privacy has 'sigma'; expected any of unit, clip, noise_multiplier"),
        ({"clip": None}, "privacy has no 'clip'"),
        ({"unit": "example", "balanced": True}, "Set balanced: false, or take the unit client"),
    ],
    ids=str,
)
def test_policy_that_makes_no_sense_is_refused_with_what_to_do(
    project: Path, privacy: Any, sentence: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        if not isinstance(privacy, dict):
            content["privacy"] = privacy
            return
        content["balanced"] = privacy.pop("balanced", False)
        merged = POLICIES["bob"] | privacy
        content["privacy"] = {name: value for name, value in merged.items() if value is not None}

    site = project / "sites" / "bob"
    edit(site, change)
    with pytest.raises(ConfigError, match=sentence):
        SiteConfig.read(site)
