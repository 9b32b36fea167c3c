"""Certificates and the engine's folders: who may connect to whom, and which classes may run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import ConfigError

ENGINE = "engine"  # the engine's folder, in the server's and in each site's
ADMIN = "admin"  # the folder of whoever starts jobs, in the server's
AUTHORITY = "authority"  # the folder of the key that signs certificates; no process needs it
ADMIN_NAME = "admin@zorba.local"
CONTROLLER = "zorba.apps.deploy.engine.FederationController"
EXECUTOR = "zorba.apps.deploy.engine.SiteExecutor"
# Beginnings of the names of classes that a job may name; a party refuses all others.
ALLOWED = [CONTROLLER, EXECUTOR, "nvflare."]

_UNUSED = ("site_log_streamer", "log_receiver")  # a site's logs stay at the site
_BUILDERS = {
    "workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
    "static_file.StaticFileBuilder": {"config_folder": "config", "scheme": "grpc"},
    "cert.CertBuilder": {},
    "signature.SignatureBuilder": {},
}
# Processes of one machine speak TLS to each other too: other people may have accounts on it.
_LOCAL = {"scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}}
# Sites reach each other through the server, or not at all.
_CONNECTIONS = {"allow_adhoc_conns": False, "backbone_conn_gen": 2, "internal": _LOCAL}
# The administrator starts and stops jobs and sees that they run; no more. The refused rights are
# named too: nothing is left to the engine's defaults.
_RIGHTS = dict.fromkeys(("submit_job", "manage_job", "view", "operate"), "any") | dict.fromkeys(
    ("clone_job", "download_job", "shell_commands", "byoc", "server-predeployed-flwr"), "none"
)


def provision(folder: Path, project: str, address: str, sites: Sequence[str]) -> None:
    """Makes a certificate authority, and in a project's folder one with certificates a party.

    All connections are mutually authenticated TLS. Sites take no code, run no commands for the
    administrator, and send no logs. ConfigError tells what the engine refused.
    """
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.prov_utils import prepare_builders
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address is {address!r}; expected host:port, as example.org:8002")
    members: list[dict[str, Any]] = [
        {"name": host, "type": "server", "fed_learn_port": int(port)},
        *({"name": site, "type": "client"} for site in sites),
        {"name": ADMIN_NAME, "type": "admin", "role": "project_admin"},
    ]
    parts = [{"path": f"nvflare.lighter.impl.{k}", "args": v} for k, v in _BUILDERS.items()]
    described = {
        **{"api_version": 3, "name": project, "description": "a federation of zorba-kernels"},
        **{"participants": [m | {"org": "zorba"} for m in members], "builders": parts},
    }
    authority = folder / AUTHORITY
    # The engine logs its errors and goes on: they are kept, for the sentence that is raised.
    log, errors = logging.Logger("provision"), BufferingHandler(1000)
    errors.setLevel(logging.ERROR)
    log.addHandler(errors)
    try:
        provisioner = Provisioner(str(authority), prepare_builders(described))
        context = provisioner.provision(prepare_project(described), logger=log)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from None
    if context.get(CtxKey.BUILD_ERROR):
        told = "; ".join(record.getMessage() for record in errors.buffer)
        raise ConfigError(told or "the certificates could not be made")
    # The engine puts all kits in one folder, but each goes to its party's alone.
    made = Path(context[CtxKey.CURRENT_PROD_DIR])
    places = {ADMIN_NAME: folder / "server" / ADMIN, host: folder / "server" / ENGINE}
    places |= {site: folder / "sites" / site / ENGINE for site in sites}
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made / name, place)
        place.chmod(0o700)  # it holds a private key
        if name != ADMIN_NAME:
            _close(place / "local")
    shutil.rmtree(made)
    authority.chmod(0o700)


def place_server(engine: Path) -> None:
    """Tells the server's engine where its folder is now: it keeps its jobs there, not in /tmp."""
    path = engine / "local" / "resources.json"
    resources = json.loads(path.read_text())
    storage = resources["snapshot_persistor"]["args"]["storage"]
    storage["args"]["root_dir"] = str(engine / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(engine / "jobs")
    write_json(path, resources)


def _close(local: Path) -> None:
    """Closes the doors that the engine leaves open to the server or a site."""
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = ALLOWED
    resources["components"] = [c for c in resources["components"] if c["id"] not in _UNUSED]
    if "servers" in resources:
        # A site whose machine is gone is noticed after a minute; the engine waits for ten.
        resources["servers"][0]["heart_beat_timeout"] = 60
    else:
        # A job may ask for a longer time than this, never for a shorter one.
        resources["client"]["communication_timeout"] = 5.0
    rights = {"format_version": "1.0", "permissions": {"project_admin": _RIGHTS}}
    logs = json.loads((local / "log_config.json.default").read_text())
    # One file for each party: the supervisor keeps what comes on the console.
    logs["loggers"]["root"] |= {"level": "WARNING", "handlers": ["consoleHandler"]}
    console = logs["handlers"]["consoleHandler"] | {"formatter": "baseFormatter"}
    logs["handlers"] = {"consoleHandler": console}
    files = {"resources": resources, "authorization": rights, "log_config": logs}
    for name, content in (files | {"comm_config": _CONNECTIONS}).items():
        write_json(local / f"{name}.json", content)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that the engine reads."""
    path.write_text(json.dumps(content, indent=2) + "\n")
