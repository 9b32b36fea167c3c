"""Certificates and the engine's folders: who may connect to whom, and what they may bring."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import ConfigError

ENGINE = "engine"
"""The engine's folder, in the server's and in each site's."""
ADMIN = "admin"
"""The folder of whoever starts jobs, in the server's."""
AUTHORITY = "authority"
"""The folder of the key that signs certificates; no process needs it."""
ADMIN_NAME = "admin@zorba.local"

_ORGANISATION = "zorba"
_ALLOWED = ["zorba.apps.deploy.flare.", "nvflare."]
_LAUNCHERS = {
    "server": "zorba.apps.deploy.flare.launcher.ServerLauncher",
    "site": "zorba.apps.deploy.flare.launcher.SiteLauncher",
}
_UNUSED = ("site_log_streamer", "log_receiver")  # a site's logs are its own


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
    described = {
        "api_version": 3,
        "name": project,
        "description": "a federation of zorba-kernels",
        "participants": [
            {"name": host, "type": "server", "org": _ORGANISATION, "fed_learn_port": port},
            *({"name": site, "type": "client", "org": _ORGANISATION} for site in sites),
            {
                "name": ADMIN_NAME,
                "type": "admin",
                "org": _ORGANISATION,
                "role": "project_admin",
            },
        ],
        "builders": [
            {
                "path": "nvflare.lighter.impl.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {"path": "nvflare.lighter.impl.cert.CertBuilder"},
            {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
        ],
    }
    authority = folder / AUTHORITY
    log = _Log()
    try:
        context = Provisioner(str(authority), prepare_builders(described)).provision(
            prepare_project(described), logger=log
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from None
    if context.get(CtxKey.BUILD_ERROR):
        raise ConfigError("; ".join(log.errors) or "the certificates could not be made")
    made = Path(context[CtxKey.CURRENT_PROD_DIR])
    _place(made / host, folder / "server" / ENGINE, "server")
    _place(made / ADMIN_NAME, folder / "server" / ADMIN, "admin")
    for site in sites:
        _place(made / site, folder / "sites" / site / ENGINE, "site")
    shutil.rmtree(made)
    authority.chmod(0o700)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port", or raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address is {address!r}; expected host:port, as example.org:8002")
    return host, int(port)


def _place(made: Path, to: Path, role: str) -> None:
    """Moves what the engine made for a party to its folder, and closes what it leaves open."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, to)
    to.chmod(0o700)
    if role == "admin":
        return
    local = to / "local"
    _write(local / "comm_config.json", _connections())
    _write(local / "authorization.json", _rights())
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = _ALLOWED
    resources["components"] = [c for c in resources["components"] if c["id"] not in _UNUSED]
    for component in resources["components"]:
        if component["id"] == "process_launcher":
            component["path"] = _LAUNCHERS[role]
    if role == "server":
        resources["servers"][0]["heart_beat_timeout"] = 60
    else:
        resources["client"]["communication_timeout"] = 5.0  # the job's may be longer, not shorter
    _write(local / "resources.json", resources)
    logs = json.loads((local / "log_config.json.default").read_text())
    logs["loggers"]["root"]["level"] = "WARNING"
    logs["loggers"]["root"]["handlers"] = ["consoleHandler"]
    logs["handlers"] = {"consoleHandler": logs["handlers"]["consoleHandler"]}
    logs["handlers"]["consoleHandler"]["formatter"] = "baseFormatter"
    _write(local / "log_config.json", logs)


def settle(engine: Path) -> None:
    """Tells the server's engine where its folder is now: it keeps its jobs there, and not in /tmp.

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


def _connections() -> dict[str, Any]:
    """Processes of one machine speak TLS to each other, and nobody makes other connections."""
    return {
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
    rights = dict.fromkeys(allowed, "any") | dict.fromkeys(refused, "none")
    return {"format_version": "1.0", "permissions": {"project_admin": rights}}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


class _Log:
    """Keeps what the engine says while it makes certificates."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, text: str) -> None: ...

    def debug(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def error(self, text: str) -> None:
        self.errors.append(text)
