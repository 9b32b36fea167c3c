"""What ``zorba federate init`` writes, and what it refuses."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import zorba

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from cryptography import x509
from zorba.apps.deploy.build import Batches, build_client, build_server, build_settings
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.control import parties
from zorba.apps.deploy.project import init_project, parse_site
from zorba.apps.deploy.provision import ADMIN, AUTHORITY, ENGINE, settle
from zorba.federated import LocalTransport, ReplicaError, RunFolder, run_federation

from tests.apps.deploy.conftest import SITES, describe
from tests.conftest import Random


@pytest.fixture(scope="module")
def project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projects") / "plain"
    assert init_project(describe(base, folder)) is None
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_everyone_gets_a_folder_with_certificates_of_one_authority(project: Path) -> None:
    server = project / "server" / ENGINE / "startup"
    root = certificate(server / "rootCA.pem")
    kits = [server / "server.crt", project / "server" / ADMIN / "startup" / "client.crt"]
    kits += [project / "sites" / site / ENGINE / "startup" / "client.crt" for site in SITES]
    for kit in kits:
        certificate(kit).verify_directly_issued_by(root)
        key = kit.with_suffix(".key")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    names = [
        certificate(kit).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        for kit in kits
    ]
    assert names == ["localhost", "admin@zorba.local", *SITES]
    for folder in (server.parent, project / AUTHORITY, project / "sites" / "ada" / ENGINE):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    authority = [path for path in project.rglob("*") if path.name == "cert.json"]
    assert [path.relative_to(project).parts[0] for path in authority] == [AUTHORITY], (
        "the key that signs is nowhere else"
    )


def test_sites_take_no_code_and_no_commands(project: Path) -> None:
    for site in SITES:
        local = project / "sites" / site / ENGINE / "local"
        resources = json.loads((local / "resources.json").read_text())
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == ["zorba.apps.deploy.flare.", "nvflare."]
        assert "site_log_streamer" not in {c["id"] for c in resources["components"]}
        rights = json.loads((local / "authorization.json").read_text())["permissions"]
        assert rights["project_admin"]["byoc"] == "none"
        assert rights["project_admin"]["shell_commands"] == "none"
        assert rights.keys() == {"project_admin"}
        connections = json.loads((local / "comm_config.json").read_text())
        assert connections["internal"]["resources"]["connection_security"] == "mtls"
        assert not connections["allow_adhoc_conns"]


def test_server_keeps_its_jobs_in_its_folder_wherever_it_is(project: Path) -> None:
    engine = project / "server" / ENGINE
    settle(engine)
    text = (engine / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text
    assert str(engine / "jobs") in text


def test_files_make_a_server_and_clients_that_run(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    init_project(describe(base, folder, rounds=4))
    config = ServerConfig.read(folder / "server")
    server = build_server(config, RunFolder(folder / "server" / "run"))
    clients = {site: build_client(folder / "sites" / site) for site in SITES}
    result = run_federation(server, LocalTransport(clients), config.rounds)
    assert result.replicas_identical
    assert result.fingerprints.keys() == set(SITES)
    for client in clients.values():
        client.save()
    again = build_client(folder / "sites" / "bob")
    assert again.replica.applied_round == 4
    assert again.replica.fingerprint() == result.fingerprints["bob"]
    server.close()


def test_checkpoint_of_another_model_is_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    init_project(describe(base, folder))
    site = folder / "sites" / "ada"
    client = build_client(site)
    client.replica.applied_round = 1
    client.save()
    replace(SiteConfig.read(site), blocks="last:1").write(site)
    with pytest.raises(ReplicaError, match="to start from the model, remove the file"):
        build_client(site)


def test_budgets_decide_who_activates_what(base: Path, tmp_path: Path) -> None:
    client = build_client_of(base, tmp_path / "all")
    table = client.replica.table
    block = 4 * table.numel // 2
    outside = 4 * 2000
    budgets = {"ada": 10 * block, "bob": outside + 3 * block + block // 2, "cleo": 10 * block}
    plan = init_project(describe(base, tmp_path / "planned", budgets=budgets))
    assert plan is not None
    config = ServerConfig.read(tmp_path / "planned" / "server")
    assert {site: entry.active for site, entry in config.sites.items()} == {
        site: plan.active_blocks(site) for site in SITES
    }
    assert len(config.sites["bob"].active) == 1
    assert len(config.sites["ada"].active) == 2
    assert config.sites["bob"].budget == budgets["bob"]


def build_client_of(base: Path, folder: Path) -> Any:
    init_project(describe(base, folder))
    return build_client(folder / "sites" / "ada")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budgets": {}}, "there are no sites"),
        ({"budgets": {"ada": 1 << 30, "bob": 0}}, "site bob has no budget, ada has"),
        ({"budgets": {"ada": 100, "bob": 100}}, "100"),
        ({"address": "localhost"}, "address is 'localhost'; expected host:port"),
        ({"address": "localhost:0"}, "expected host:port"),
        ({"job": "a job"}, "job must be 1 to 64 letters"),
        ({"settings": {"lr": "much"}}, "settings.lr is 'much'; expected a number"),
        ({"settings": {"lr": 0.1, "speed": 3}}, "speed"),
        ({"settings": {"lr": 0.1, "eps": -1.0}}, "eps must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    base: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = tmp_path / "project"
    with pytest.raises(ValueError, match=sentence):
        init_project(describe(base, folder, **changes))
    assert not folder.exists()


def test_folder_that_is_not_empty_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty"):
        init_project(describe(base, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada", ("ada", 0)),
        ("ada=2GiB", ("ada", 2 << 30)),
        ("a.b-c=1.5MiB", ("a.b-c", 3 << 19)),
        ("ada=2GB", ("ada", 2 * 10**9)),
    ],
)
def test_site_is_a_name_and_a_size(text: str, expected: tuple[str, int]) -> None:
    assert parse_site(text) == expected


@pytest.mark.parametrize(
    "text", ["", "=2GiB", "ada=much", "ada=2XB", "server", "a b", "ada=1.2.3GiB"]
)
def test_site_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_site(text)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("rounds: 10", "rounds: many", "rounds is 'many'; expected int"),
        ("rounds: 10", "rounds: 0", "rounds is 0; expected at least 1"),
        ("rounds: 10", "", "has no 'rounds'"),
        ("seed: 0", "seed: 0\ncolour: red", "has 'colour'; expected any of job, seed"),
        ("quorum: 0", "quorum: 4", "quorum is 4; there are 3 sites"),
        ("lr_decay: linear", "lr_decay: none", "expected linear or constant"),
        ("seed: 0", "seed: [", "server.yaml"),
        ("    - model.layers.1", "    - model.layers.7", "activates model.layers.7, which is no"),
    ],
)
def test_edited_file_that_makes_no_sense_says_where(
    project: Path, tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    text = (project / "server" / "server.yaml").read_text()
    assert old in text
    (tmp_path / "server.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=sentence):
        ServerConfig.read(tmp_path)


def test_numbers_may_be_written_as_people_write_them(project: Path, tmp_path: Path) -> None:
    text = (project / "server" / "server.yaml").read_text()
    text = text.replace("timeout: 600.0", "timeout: 1e2").replace("lr: 0.05", "lr: 5e-2")
    (tmp_path / "server.yaml").write_text(text)
    config = ServerConfig.read(tmp_path)
    assert config.timeout == 100.0
    settings = build_settings(config)
    assert settings.lr_at(1) == 0.05
    assert settings.lr_at(6) == pytest.approx(0.025)


def test_config_survives_a_round_trip(project: Path, tmp_path: Path) -> None:
    for config, kind in (
        (ServerConfig.read(project / "server"), ServerConfig),
        (SiteConfig.read(project / "sites" / "bob"), SiteConfig),
    ):
        config.write(tmp_path)
        assert kind.read(tmp_path) == config


def test_batches_are_the_same_for_the_same_round_and_step(rng: Random) -> None:
    rows = [{"text": str(i)} for i in range(50)]
    seed = rng.integer(32)
    first, second = (Batches(rows, 8, seed, list) for _ in range(2))
    batch, count = first(3, 1)
    assert count == 8
    assert len({row["text"] for row in batch}) == 8
    first(4, 0)
    assert first(3, 1) == (batch, 8) == second(3, 1)
    assert first(3, 2) != (batch, 8)
    assert Batches(rows[:3], 8, seed, list)(1, 0)[1] == 3


def test_batches_are_balanced_by_label(rng: Random) -> None:
    rows = [{"text": str(i), "label": int(i % 10 == 0)} for i in range(50)]
    batch, count = Batches(rows, 8, rng.integer(32), list, "label")(1, 0)
    assert count == 8
    assert sum(row["label"] for row in batch) == 4
    batch, count = Batches(rows[:11], 8, rng.integer(32), list, "label")(1, 0)
    assert (count, sum(row["label"] for row in batch)) == (6, 2), "there are no more"


def test_parties_are_found_in_a_project_and_in_their_own_folders(project: Path) -> None:
    assert [p.name for p in parties(project)] == ["server", *SITES]
    assert [p.name for p in parties(project / "sites" / "bob")] == ["bob"]
    assert [p.name for p in parties(project, ["cleo"])] == ["cleo"]
    with pytest.raises(ConfigError, match="there is no eve"):
        parties(project, ["eve"])
    with pytest.raises(ConfigError, match="is no project"):
        parties(project / "sites")


def test_command_says_what_is_wrong(base: Path, tmp_path: Path) -> None:
    arguments = ["init", tmp_path / "p", "--model", base / "model", "--data", "x", "--site", "a=b"]
    result = zorba("federate", *arguments)
    assert result.exit_code == 1
    assert "budget of site a: 'b' is no number of bytes" in result.output
    result = zorba("federate", "status", tmp_path)
    assert result.exit_code == 1
    assert "is no project" in result.output
