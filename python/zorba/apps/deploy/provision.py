"""Certificates and the engine's folders: who may connect to whom, and which classes may run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import ConfigError, split_address

ENGINE = "engine"
"""The engine's folder, in the server's and in each site's."""
ADMIN = "admin"
"""The folder of whoever starts jobs, in the server's."""
AUTHORITY = "authority"
"""The folder of the key that signs certificates; no process needs it."""
ADMIN_NAME = "admin@zorba.local"

_FLARE = "zorba.apps.deploy.flare."
CLASSES = {
    "controller": f"{_FLARE}controller.FederationController",
    "executor": f"{_FLARE}executor.SiteExecutor",
    "server": f"{_FLARE}launcher.ServerLauncher",
    "site": f"{_FLARE}launcher.SiteLauncher",
}
"""Our classes that the engine makes: of a job, and the launchers of its processes."""
ALLOWED = [_FLARE, "nvflare."]
"""Beginnings of the names of classes that a job may name; a party refuses all others."""

_ORGANISATION = "zorba"
_UNUSED = ("site_log_streamer", "log_receiver")  # a site's logs stay at the site
_BUILDERS = "nvflare.lighter.impl."


def provision(folder: Path, project: str, address: str, sites: Sequence[str]) -> None:
    """Makes a certificate authority, and a folder with certificates for each party.

    The sites' and the server's connections are mutually authenticated TLS: those between machines
    as well as those between the processes of one. Sites take no code, run no commands for the
    administrator, and send no logs.

    Args:
        folder: of the project; ``server``, ``sites/NAME`` and ``authority`` are made in it.
        project: its name, that of the certificate authority.
        address: host and port that the server is reached at.
        sites: their names.

    Raises:
        ConfigError: the engine refused a name or the address.
    """
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.prov_utils import prepare_builders
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    host, port = split_address(address)
    members: list[dict[str, Any]] = [
        {"name": host, "type": "server", "fed_learn_port": port},
        *({"name": site, "type": "client"} for site in sites),
        {"name": ADMIN_NAME, "type": "admin", "role": "project_admin"},
    ]
    described = {
        "api_version": 3,
        "name": project,
        "description": "a federation of zorba-kernels",
        "participants": [{**member, "org": _ORGANISATION} for member in members],
        "builders": [
            {
                "path": f"{_BUILDERS}workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": f"{_BUILDERS}static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {"path": f"{_BUILDERS}cert.CertBuilder"},
            {"path": f"{_BUILDERS}signature.SignatureBuilder"},
        ],
    }
    authority = folder / AUTHORITY
    # The engine logs its errors and goes on: they are kept, for the sentence that is raised.
    log, errors = logging.Logger("provision"), BufferingHandler(1000)
    errors.setLevel(logging.ERROR)
    log.addHandler(errors)
    try:
        context = Provisioner(str(authority), prepare_builders(described)).provision(
            prepare_project(described), logger=log
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from None
    if context.get(CtxKey.BUILD_ERROR):
        told = "; ".join(record.getMessage() for record in errors.buffer)
        raise ConfigError(told or "the certificates could not be made")
    # The engine puts all kits in one folder, but each goes to its party's alone.
    made = Path(context[CtxKey.CURRENT_PROD_DIR])
    _place(made / ADMIN_NAME, folder / "server" / ADMIN)
    _close(_place(made / host, folder / "server" / ENGINE), "server")
    for site in sites:
        _close(_place(made / site, folder / "sites" / site / ENGINE), "site")
    shutil.rmtree(made)
    authority.chmod(0o700)


def place_server(engine: Path) -> None:
    """Tells the server's engine where its folder is now: it keeps its jobs there, not in /tmp.

    Args:
        engine: its folder; ``local/resources.json`` in it is modified.
    """
    path = engine / "local" / "resources.json"
    resources = json.loads(path.read_text())
    storage = resources["snapshot_persistor"]["args"]["storage"]
    storage["args"]["root_dir"] = str(engine / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(engine / "jobs")
    _write(path, resources)


def _place(made: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, to)
    to.chmod(0o700)  # it holds a private key
    return to


def _close(engine: Path, role: str) -> None:
    """Closes the doors that the engine leaves open: its folder is that of the server or a site."""
    local = engine / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    # The one place that says which classes a job may name.
    resources["class_allow_list"] = ALLOWED
    resources["components"] = [c for c in resources["components"] if c["id"] not in _UNUSED]
    for component in resources["components"]:
        if component["id"] == "process_launcher":
            component["path"] = CLASSES[role]
    if role == "server":
        # A site whose machine is gone is noticed after a minute; the engine waits for ten.
        resources["servers"][0]["heart_beat_timeout"] = 60
    else:
        # A job may ask for a longer time than this, never for a shorter one.
        resources["client"]["communication_timeout"] = 5.0
    _write(local / "resources.json", resources)
    _write(local / "comm_config.json", _CONNECTIONS)
    _write(local / "authorization.json", _rights())
    logs = json.loads((local / "log_config.json.default").read_text())
    # One file for each party: the supervisor keeps what comes on the console.
    logs["loggers"]["root"] |= {"level": "WARNING", "handlers": ["consoleHandler"]}
    console = logs["handlers"]["consoleHandler"] | {"formatter": "baseFormatter"}
    logs["handlers"] = {"consoleHandler": console}
    _write(local / "log_config.json", logs)


# Processes of one machine speak TLS to each other too: other people may have accounts on it.
_CONNECTIONS = {
    # Sites reach each other through the server, or not at all.
    "allow_adhoc_conns": False,
    "backbone_conn_gen": 2,
    "internal": {
        "scheme": "tcp",
        "resources": {"host": "localhost", "connection_security": "mtls"},
    },
}


def _rights() -> dict[str, Any]:
    """The administrator starts and stops jobs and sees that they run; no more."""
    allowed = ("submit_job", "manage_job", "view", "operate")
    refused = ("clone_job", "download_job", "shell_commands", "byoc", "server-predeployed-flwr")
    # The refused ones are named too: nothing is left to the engine's defaults.
    rights = dict.fromkeys(allowed, "any") | dict.fromkeys(refused, "none")
    return {"format_version": "1.0", "permissions": {"project_admin": rights}}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
