"""``server.yaml`` and ``site.yaml``: written with comments; an error is one sentence."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from zorba.apps.deploy.build import build_settings
from zorba.apps.deploy.config import (
    ConfigError,
    PrivacySection,
    RoundSettings,
    ServerConfig,
    SiteConfig,
)
from zorba.federated import FederationSettings, Privacy
from zorba.federated.privacy import UNITS

from tests.conftest import Random

KINDS: dict[str, type[ServerConfig | SiteConfig]] = {"server": ServerConfig, "site": SiteConfig}
PRIVACY = """privacy:
  # whom epsilon protects
  unit: client
  # L2 norm of a vector of P differences
  clip: 2.0
  # noise, in units of the sensitivity
  noise_multiplier: 8.0
  # at which epsilon is told
  delta: 1.0e-06
  # that the site never exceeds
  max_epsilon: .inf
"""


def text_of(project: Path, name: str) -> str:
    folder = project / "server" if name == "server" else project / "sites" / "bob"
    return (folder / f"{name}.yaml").read_text().replace("privacy: null\n", PRIVACY)


def refusal(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / f"{name}.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        KINDS[name].read(folder)
    sentence = str(caught.value)
    assert sentence.startswith(str(folder / f"{name}.yaml"))
    assert "\n" not in sentence
    return sentence.removeprefix(str(folder / f"{name}.yaml"))


@pytest.mark.parametrize("name", KINDS)
def test_file_reads_as_it_was_written(shared_project: Path, tmp_path: Path, name: str) -> None:
    text = text_of(shared_project, name)
    (tmp_path / f"{name}.yaml").write_text(text)
    config = KINDS[name].read(tmp_path)
    config.write(tmp_path)
    assert (tmp_path / f"{name}.yaml").read_text() == text
    assert KINDS[name].read(tmp_path) == config


def test_every_key_has_its_description_above_it(shared_project: Path) -> None:
    lines = text_of(shared_project, "site").splitlines()
    for name, field in SiteConfig.model_fields.items():
        above = lines[next(n for n, line in enumerate(lines) if line.startswith(f"{name}:")) - 1]
        assert field.description
        assert above.startswith("# ")
        assert field.description.endswith(above.removeprefix("# "))


def test_values_come_back_as_they_are_meant(shared_project: Path, tmp_path: Path) -> None:
    """A section may be on one line, and texts that look like numbers stay texts."""
    short = "privacy: {unit: client, clip: 2.0, noise_multiplier: 8, delta: 1e-6}\n"
    (tmp_path / "site.yaml").write_text(text_of(shared_project, "site").replace(PRIVACY, short))
    expected = PrivacySection(unit="client", clip=2.0, noise_multiplier=8.0, delta=1e-6)
    assert SiteConfig.read(tmp_path).privacy == expected
    assert expected.max_epsilon == math.inf
    odd = ("1e3", "0x10", "2024-01-01", "yes", "é: #", "", " a")
    config = SiteConfig.read(tmp_path).model_copy(update={"words": odd, "labels": odd})
    config.write(tmp_path)
    assert SiteConfig.read(tmp_path) == config


def test_models_say_what_the_core_says() -> None:
    """One list of the fields is in the core, which loads torch; these are the others."""
    mine, core = RoundSettings.model_fields, get_type_hints(FederationSettings)
    assert mine.keys() == core.keys() - {"job", "seed"}
    for name in ("estimator", "distribution", "rounding", "weighting", "aggregation"):
        assert set(get_args(mine[name].annotation)) == set(get_args(core[name])), name
    assert PrivacySection.model_fields.keys() == {f.name for f in fields(Privacy)}
    assert set(get_args(PrivacySection.model_fields["unit"].annotation)) == set(UNITS)


def test_settings_are_those_of_the_file_and_else_of_the_core(
    shared_project: Path, tmp_path: Path
) -> None:
    """Numbers may be written as people write them."""
    text = text_of(shared_project, "server")
    text = text.replace("timeout: 600.0", "timeout: 1e2").replace("lr: 0.05", "lr: 5e-2")
    (tmp_path / "server.yaml").write_text(text)
    config = ServerConfig.read(tmp_path)
    assert config.timeout == 100.0
    settings = build_settings(config)
    assert settings.lr_at(1) == 0.05
    assert settings.lr_at(6) == pytest.approx(0.025)
    core = FederationSettings(job="tiny", seed=0, lr=0.0)
    for name in ("eps", "estimator", "distribution", "rounding", "aggregation", "trim"):
        assert getattr(settings, name) == getattr(core, name)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("server", "rounds: 10", "rounds: many", "rounds is 'many'; expected a valid integer"),
        ("server", "rounds: 10", "rounds: 0", "rounds is 0; expected greater than or equal to 1"),
        ("server", "rounds: 10", "", "there is no rounds; expected all of job, seed, rounds"),
        ("server", "seed: 0", "seed: 0\ncolour: red", "setting colour; expected any of job, seed"),
        ("server", "seed: 0", "seed: 0\nrouns: 3", "no setting rouns; did you mean rounds?"),
        ("server", "  eps: ", "  epz: ", "no setting settings.epz; did you mean eps?"),
        ("server", "seed: 0", "seed: 0\nseed: 1", "seed again; line"),
        ("server", "seed: 0", "seed: 1.5", "seed is 1.5; expected a valid integer"),
        ("server", "seed: 0", f"seed: {1 << 64}", "expected less than 18446744073709551616"),
        ("server", "seed: 0", f"seed: {'9' * 5000}", "9...9999999999999' is no int"),
        ("server", "seed: 0", "seed: [", "no YAML: "),
        ("server", "seed: 0", "seed: \x01", "characters are not allowed"),
        ("server", "seed: 0", "seed: !!python/name:os.system", "the tag tag:yaml.org,2002:python"),
        ("server", "seed: 0", "seed: !!int abc", "'abc' is no int"),
        ("server", "seed: 0", "seed: &a 0\nrounds: *a", "*a is an alias; write the value itself"),
        ("server", "seed: 0", "? [seed]\n: 0", "a list or section; expected a key"),
        ("server", "quorum: 0", "quorum: 4", "quorum is 4; there are 3 sites"),
        ("server", "decay: linear", "decay: none", "is 'none'; expected 'linear' or 'constant'"),
        ("server", "timeout: 600.0", "timeout: -1", "timeout is -1; expected greater than 0"),
        ("server", "timeout: 600.0", "timeout: .inf", "timeout is inf; expected a finite number"),
        ("server", "  lr: 0.05", "  lr: much", "settings.lr is 'much'; expected a valid number"),
        ("server", "  - model.layers.1", "  - model.layers.7", "activates model.layers.7, whi"),
        ("server", "  bob:", "  b b:", "sites.b b is 'b b'; expected text of the pattern"),
        ("server", "  bob:", "  server:", "a site is called server; take another name"),
        ("server", "  bob:", "  ada:", "ada again; line"),
        ("site", "offload: false", "offload: 0", "offload is 0; expected a valid boolean"),
        ("site", "blocks: all", "blocks: first", "blocks is 'first'; expected text of the patte"),
        ("site", PRIVACY, "privacy: true", "is True; expected keys and values under it: unit"),
        ("site", "unit: client", "unit: user", "unit is 'user'; expected 'example' or 'client'"),
        ("site", "unit: client", "unit: example", "Set balanced: false, or take the unit client"),
        ("site", "clip: 2.0", "clip: -1.0", "privacy.clip is -1.0; expected greater than 0"),
        ("site", "clip: 2.0", "sigma: 1.0", "no setting privacy.sigma; expected any of unit, clip"),
        ("site", "  clip: 2.0\n", "", "there is no privacy.clip; expected all of unit, clip"),
        ("site", "delta: 1.0e-06", "delta: 2", "privacy.delta is 2; expected less than 1"),
        ("site", "epsilon: .inf", "epsilon: 0", "privacy.max_epsilon is 0; expected greater"),
    ],
)
def test_value_that_is_refused_is_named_with_its_line(
    shared_project: Path, tmp_path: Path, name: str, old: str, new: str, sentence: str
) -> None:
    text = text_of(shared_project, name)
    assert text.count(old) >= 1
    told = refusal(tmp_path, name, text.replace(old, new, 1))
    assert sentence in told
    assert re.match(r", line \d+: ", told)


@pytest.mark.parametrize("key", ["rounds", "timeout", "quorum", "lr_decay"])
def test_line_of_a_value_is_told(shared_project: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*server\.yaml: zorba federate init"):
        ServerConfig.read(tmp_path)
    lines = text_of(shared_project, "server").splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{key}:"))
    lines[at] = f"{key}: [1]"
    told = refusal(tmp_path, "server", "\n".join(lines))
    assert told.startswith(f", line {at + 1}: {key} is [1]; expected ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", " must hold keys and values"),
        (b"[1, 2]", " must hold keys and values"),
        (b"a: 1\n---\na: 1\n", ", line 2: no YAML: "),
        (b"job: a\nmodel: caf\xe9\n", ", line 2: byte 0xe9; expected UTF-8"),
        (b"\xff\xfej\x00", ", line 1: byte 0xff; expected UTF-8"),
        (b"[" * 1200, ", line 1: "),
        (b"{a: " * 1200, ", line 1: too many lists or sections inside each other"),
        (b"- " * 1200, ", line 1: too many lists or sections inside each other"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ", line 2: *a is an alias"),
    ],
    ids=lambda value: repr(value[:20]),
)
@pytest.mark.parametrize("name", KINDS)
def test_file_that_holds_no_settings_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    assert refusal(tmp_path, name, content).startswith(sentence)


@pytest.mark.parametrize("name", KINDS)
def test_mutants_are_read_or_refused(
    shared_project: Path, tmp_path: Path, name: str, rng: Random
) -> None:
    data = text_of(shared_project, name).encode()
    values = (b"", b"[", b"{", b"*a", b"&a ", b"\xe9", b"\x00", b".nan", b"-1", b"\n", b"  ", b"? ")
    accepted = 0
    for _ in range(100):
        at, end = (rng.integer(32) % len(data) for _ in range(2))
        piece = values[rng.integer(32) % len(values)]
        mutant = data[:at] + piece + data[min(max(at, end), at + 5) :]
        (tmp_path / f"{name}.yaml").write_bytes(mutant)
        with suppress(ConfigError):
            config = KINDS[name].read(tmp_path)
            accepted += 1
            config.write(tmp_path)
            assert KINDS[name].read(tmp_path) == config
            assert yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    assert 0 < accepted < 100, "mutants of comments change nothing, those of values do"
