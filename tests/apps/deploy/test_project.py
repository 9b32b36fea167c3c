"""``zorba federate init``: what it writes, and what it refuses."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from zorba.apps.deploy.build import build_client, pick_batches
from zorba.apps.deploy.command import FederateDemoSettings
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.demo import run_demo
from zorba.apps.deploy.party import parties
from zorba.apps.deploy.project import init_project
from zorba.apps.deploy.provision import ADMIN, ALLOWED, AUTHORITY, ENGINE, place_server

from tests.apps.deploy.conftest import SITES, wanted
from tests.conftest import Random


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_everyone_gets_a_folder_with_certificates_of_one_authority(shared_project: Path) -> None:
    project = shared_project
    server = project / "server" / ENGINE / "startup"
    root = certificate(server / "rootCA.pem")
    kits = [server / "server.crt", project / "server" / ADMIN / "startup" / "client.crt"]
    kits += [project / "sites" / site / ENGINE / "startup" / "client.crt" for site in SITES]
    names = []
    for kit in kits:
        certificate(kit).verify_directly_issued_by(root)
        assert stat.S_IMODE(kit.with_suffix(".key").stat().st_mode) == 0o600
        names += certificate(kit).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["localhost", "admin@zorba.local", *SITES]
    for folder in (server.parent, project / AUTHORITY, project / "sites" / "ada" / ENGINE):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    signs = [path.relative_to(project).parts[0] for path in project.rglob("cert.json")]
    assert signs == [AUTHORITY], "the key that signs is nowhere else"


def test_sites_take_no_code_and_no_commands(shared_project: Path) -> None:
    for site in SITES:
        local = shared_project / "sites" / site / ENGINE / "local"
        resources, rights, connections = (
            json.loads((local / f"{name}.json").read_text())
            for name in ("resources", "authorization", "comm_config")
        )
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == ALLOWED
        assert "site_log_streamer" not in {c["id"] for c in resources["components"]}
        (admin,) = rights["permissions"].values()
        assert admin["byoc"] == admin["shell_commands"] == "none"
        assert connections["internal"]["resources"]["connection_security"] == "mtls"
        assert not connections["allow_adhoc_conns"]


def test_server_keeps_its_jobs_in_its_folder_wherever_it_is(project: Path) -> None:
    engine = project / "server" / ENGINE
    place_server(engine)
    text = (engine / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text
    assert str(engine / "jobs") in text


def test_each_site_has_its_own_data_and_batches(base: Path, shared_project: Path) -> None:
    for number, name in enumerate(SITES):
        site = SiteConfig.read(shared_project / "sites" / name)
        assert (site.data, site.seed) == (str(base / f"{name}.jsonl"), number)
        assert (site.words, site.privacy) == ((" terrible", " great"), None)


def test_budgets_decide_who_activates_which_blocks(
    base: Path, shared_project: Path, tmp_path: Path
) -> None:
    table = build_client(shared_project / "sites" / "ada").replica.table
    blocks = sum(entry.tensor.nbytes for entry in table.entries)
    block, outside = blocks // 2, 4 * 2000
    budgets = {"ada": 10 * block, "bob": outside + 3 * block + block // 2, "cleo": 10 * block}
    sites = tuple(f"{name}={size}" for name, size in budgets.items())
    plan = init_project(wanted(base, tmp_path / "planned", site=sites))
    assert plan is not None
    config = ServerConfig.read(tmp_path / "planned" / "server")
    assert config.sites == {site: plan.active_blocks(site) for site in SITES}
    assert [len(config.sites[site]) for site in SITES] == [2, 1, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"site": ()}, "there are no sites"),
        ({"site": ("ada=1GiB", "bob")}, "site bob has no budget, ada has"),
        ({"site": ("ada=100", "bob=100")}, "100"),
        ({"site": ("ada=2XB",)}, "budget of site ada: '2XB' is no number of bytes"),
        ({"site": ("ada", "ada")}, "two sites are called ada"),
        ({"site": ("a b",)}, "name is 'a b'; expected text of the pattern"),
        ({"site": ("server",)}, "a site is called server"),
        ({"address": "localhost"}, "address is 'localhost'; expected host:port"),
        ({"job": "a job"}, "job is 'a job'; expected text of the pattern"),
        ({"lr": float("nan")}, "lr is nan; expected a finite number"),
        ({"eps": 1e-60}, "eps must be positive and finite in float32"),
        ({"perturbations": 1 << 20}, "num_perturbations must be an integer from 1 to 4096"),
        (
            {"distribution": "uniform"},
            "distribution is 'uniform'; expected 'gaussian', 'rademacher' or 'rank1'",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_and_leave_nothing(
    base: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = tmp_path / "project"
    with pytest.raises(ValueError, match=sentence):
        init_project(wanted(base, folder, **changes))
    assert not folder.exists()


@pytest.mark.parametrize("command", ["init", "demo"])
def test_folder_with_something_is_left_alone(base: Path, tmp_path: Path, command: str) -> None:
    """Keys and logs of a project cannot be replaced; the demo fetches nothing before it looks."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    (out / "mine").write_text("precious")
    runs = {
        "init": lambda: init_project(wanted(base, out)),
        "demo": lambda: run_demo(FederateDemoSettings(out=out, cache=cache)),
    }
    with pytest.raises(ConfigError, match="is not empty: give another folder"):
        runs[command]()
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not cache.exists()


def test_parties_are_found_in_a_project_and_in_their_own_folders(shared_project: Path) -> None:
    assert [p.name for p in parties(shared_project)] == ["server", *SITES]
    assert [p.name for p in parties(shared_project / "sites" / "bob")] == ["bob"]
    assert [p.name for p in parties(shared_project / "server")] == ["server"]
    assert [p.name for p in parties(shared_project, ["cleo"])] == ["cleo"]
    with pytest.raises(ConfigError, match="there is no eve"):
        parties(shared_project, ["eve"])
    with pytest.raises(ConfigError, match="is no project"):
        parties(shared_project / "sites")


# --- Batches --------------------------------------------------------------------------------------


def test_batches_are_the_same_for_the_same_round_and_step(rng: Random) -> None:
    rows = [{"text": str(i)} for i in range(50)]
    seed = rng.integer(32)
    first, second = (pick_batches(rows, 8, seed, list) for _ in range(2))
    batch, count = first(3, 1)
    assert count == 8
    assert len({row["text"] for row in batch}) == 8
    first(4, 0)
    assert first(3, 1) == (batch, 8) == second(3, 1)
    assert first(3, 2) != (batch, 8)
    assert pick_batches(rows[:3], 8, seed, list)(1, 0)[1] == 3


def test_batches_are_balanced_by_label(rng: Random) -> None:
    rows = [{"text": str(i), "label": int(i % 10 == 0)} for i in range(50)]
    batch, count = pick_batches(rows, 8, rng.integer(32), list, "label")(1, 0)
    assert count == 8
    assert sum(row["label"] for row in batch) == 4
    batch, count = pick_batches(rows[:11], 8, rng.integer(32), list, "label")(1, 0)
    assert (count, sum(row["label"] for row in batch)) == (6, 2), "there are no more"
