"""The rules of a DICOM node: one TOML file -> frozen dataclasses; a mistake is one line.

Unknown keys are errors: a misspelt rule must not silently send nothing. Nothing is opened or
connected here; paths are taken relative to the file.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medmo_edge.errors import NodeError, UsageError
from medmo_edge.runtime.results_origin import UUID_ROOT, ResultOptions

RESULTS = ("sr", "gsps", "sc")
_AE_TITLE = re.compile(r"[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files of one end of a TLS connection, in PEM; ``ca`` verifies the other end."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where results go: a Storage SCP ("c-store") or a DICOMweb server ("stow-rs")."""

    name: str
    kind: Literal["c-store", "stow-rs"]
    host: str = ""
    port: int = 0
    ae_title: str = ""
    calling_ae_title: str = ""
    url: str = ""
    token_env: str = ""
    timeout_seconds: float = 60.0
    tls: Tls | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which images are asked what, and where the results go; empty conditions match all."""

    name: str
    questions: tuple[str, ...]
    results: tuple[str, ...]
    send_to: tuple[str, ...]
    modality: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    calling_ae_title: tuple[str, ...] = ()
    frame: int | Literal["middle"] = 0
    window: str = ""
    plain_sr: bool = False
    max_new_tokens: int = 512
    timeout_seconds: float = 600.0

    def matches(self, modality: str, body_part: str, calling: str) -> bool:
        """Whether an image of these is asked by this rule."""
        conditions = (
            (self.modality, modality.upper()),
            (self.body_part, body_part.upper()),
            (self.calling_ae_title, calling),
        )
        return all(not wanted or value in wanted for wanted, value in conditions)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """The whole file; see docs/dicom.md for the meaning of each key."""

    ae_title: str
    spool: Path
    accept_from: tuple[str, ...]
    destinations: Mapping[str, Destination] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    host: str = "127.0.0.1"
    port: int = 11112
    max_associations: int = 8
    max_instance_mb: int = 256
    max_waiting: int = 10_000
    min_free_mb: int = 500
    timeout_seconds: float = 60.0
    retry_seconds: float = 5.0
    max_retry_seconds: float = 900.0
    give_up_after_hours: float = 72.0
    remember_days: float = 30.0
    uid_root: str = UUID_ROOT
    tls: Tls | None = None


class _Table:
    """One table of the file, read key by key; what was not asked for is an error."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise NodeError(f"{where} is no table")
        self.values = dict(values)
        self.where = where
        self.read: dict[str, Any] = {}

    def take(
        self,
        key: str,
        kind: type | tuple[type, ...],
        check: Callable[[Any], bool] = lambda value: True,
        wants: str = "",
    ) -> None:
        """Move ``key``, if it is there, to what was read."""
        if key not in self.values:
            return
        value = self.values.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or not check(value):
            wants = wants or " or ".join(one.__name__ for one in kinds)
            raise NodeError(f"{self.where}: {key} must be {wants}, not {_shown(value)}")
        self.read[key] = value

    def number(self, key: str, low: float, high: float, *, whole: bool = False) -> None:
        """A number between ``low`` and ``high``."""
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        wants = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
        self.take(key, kinds, lambda value: low <= value <= high, wants)

    def texts(self, key: str, *, allowed: tuple[str, ...] = (), empty: bool = True) -> None:
        """A list of distinct non-empty texts; one text counts as a list of one."""
        if isinstance(self.values.get(key), str):
            self.values[key] = [self.values[key]]

        def good(value: list[Any]) -> bool:
            whole = all(isinstance(each, str) and each.strip() for each in value)
            known = not allowed or all(each in allowed for each in value)
            return whole and known and len(set(value)) == len(value) and (empty or bool(value))

        wants = f"a list of {' '.join(allowed) or 'texts'}" + ("" if empty else ", not empty")
        self.take(key, list, good, wants)
        if key in self.read:
            self.read[key] = tuple(self.read[key])

    def ae_title(self, key: str) -> None:
        """An application entity title: 1 to 16 printable characters without backslash."""
        self.take(key, str, _is_ae_title, "1 to 16 printable ASCII characters")

    def done(self, *needed: str) -> dict[str, Any]:
        """What was read. Errors: NodeError for keys left over or missing."""
        if self.values:
            raise NodeError(f"{self.where}: unknown key {_shown(min(self.values))}")
        missing = [key for key in needed if key not in self.read]
        if missing:
            raise NodeError(f"{self.where}: {missing[0]} is missing")
        return self.read


def read_node_config(path: str | Path) -> NodeConfig:
    """The rules in the TOML file ``path``. Errors: NodeError, one line."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NodeError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NodeError(f"{path} is no TOML file: {error}") from error
    try:
        return _config(values, path.absolute().parent)
    except UsageError as error:
        raise NodeError(f"{path}: {error}") from error
    except NodeError as error:
        raise NodeError(f"{path}: {error}") from error.__cause__


def _config(values: dict[str, Any], folder: Path) -> NodeConfig:
    top = _Table(values, "the file")
    for key, kind in (("node", dict), ("destinations", dict), ("rules", list)):
        top.take(key, kind)
    parts = top.done("node", "destinations", "rules")
    settings = _node(parts["node"], folder)
    destinations = {
        name: _destination(name, table, folder, settings["ae_title"])
        for name, table in parts["destinations"].items()
    }
    rules = tuple(_rule(table, index) for index, table in enumerate(parts["rules"], 1))
    config = NodeConfig(**settings, destinations=destinations, rules=rules)
    _check_whole(config)
    return config


def _check_whole(config: NodeConfig) -> None:
    names = [rule.name for rule in config.rules]
    for name in names:
        if names.count(name) > 1:
            raise NodeError(f"two rules are named {name!r}")
    if not config.rules:
        raise NodeError("there is no rule: add a [[rules]] table")
    for rule in config.rules:
        for name in rule.send_to:
            if name not in config.destinations:
                known = ", ".join(config.destinations) or "none"
                raise NodeError(f"rule {rule.name!r}: no destination {name!r} (there is: {known})")
    ResultOptions(uid_root=config.uid_root)


def _node(values: Any, folder: Path) -> dict[str, Any]:
    table = _Table(values, "[node]")
    table.ae_title("ae_title")
    table.take("spool", str, bool, "a folder")
    table.texts("accept_from", empty=False)
    table.take("host", str, bool, "an address to listen on")
    table.number("port", 0, 65535, whole=True)
    for key, high in (("max_associations", 100), ("max_instance_mb", 2048)):
        table.number(key, 1, high, whole=True)
    table.number("max_waiting", 1, 10**9, whole=True)
    table.number("min_free_mb", 0, 10**9, whole=True)
    for key in ("timeout_seconds", "retry_seconds", "max_retry_seconds"):
        table.number(key, 0.05, 86400)
    table.number("give_up_after_hours", 0, 10**6)
    table.number("remember_days", 1, 10**6)
    table.take("uid_root", str)
    table.take("tls", dict)
    read = table.done("ae_title", "spool", "accept_from")
    for title in read["accept_from"]:
        if not _is_ae_title(title):
            raise NodeError(f"[node]: accept_from has {_shown(title)}, which is no AE title")
    read["spool"] = folder / read["spool"]
    if "tls" in read:
        read["tls"] = _tls(read["tls"], "[node.tls]", folder)
        if read["tls"].certificate is None:
            raise NodeError("[node.tls]: certificate is missing")
    return read


def _tls(values: Any, where: str, folder: Path) -> Tls:
    table = _Table(values, where)
    for key in ("certificate", "key", "ca"):
        table.take(key, str, lambda value: (folder / value).is_file(), "an existing PEM file")
    read = {key: folder / value for key, value in table.done().items()}
    if ("key" in read) != ("certificate" in read):
        raise NodeError(f"{where}: certificate and key belong together")
    return Tls(**read)


def _destination(name: str, values: Any, folder: Path, own_title: str) -> Destination:
    where = f"[destinations.{name}]"
    if not _NAME.fullmatch(name):
        raise NodeError(f"{where}: a name has letters, digits, '.', '_' and '-' only")
    table = _Table(values, where)
    table.take("kind", str, lambda value: value in ("c-store", "stow-rs"), "c-store or stow-rs")
    table.number("timeout_seconds", 0.1, 86400)
    table.take("tls", dict)
    stow = table.read.get("kind") == "stow-rs"
    if stow:
        table.take("url", str, _is_url, "an http:// or https:// address of the studies resource")
        table.take("token_env", str, str.isidentifier, "the name of an environment variable")
    else:
        table.take("host", str, bool, "an address")
        table.number("port", 1, 65535, whole=True)
        table.ae_title("ae_title")
        table.ae_title("calling_ae_title")
    read = table.done("kind", *(("url",) if stow else ("host", "port", "ae_title")))
    if not stow:
        read.setdefault("calling_ae_title", own_title)
    if "tls" in read:
        read["tls"] = _tls(read["tls"], f"[destinations.{name}.tls]", folder)
    return Destination(name=name, **read)


def _rule(values: Any, number: int) -> Rule:
    table = _Table(values, f"[[rules]] number {number}")
    table.take("name", str, lambda value: _NAME.fullmatch(value) is not None, "a short name")
    for key in ("modality", "body_part", "calling_ae_title"):
        table.texts(key)
    table.texts("questions", empty=False)
    table.texts("results", allowed=RESULTS, empty=False)
    table.texts("send_to", empty=False)
    table.take("frame", (int, str), _is_frame, 'a frame number from 0, or "middle"')
    table.take("window", str)
    table.take("plain_sr", bool)
    table.number("max_new_tokens", 1, 10**6, whole=True)
    table.number("timeout_seconds", 1, 86400)
    read = table.done("name", "questions", "results", "send_to")
    for key in ("modality", "body_part"):
        if key in read:
            read[key] = tuple(each.upper() for each in read[key])
    return Rule(**read)


def _is_ae_title(value: str) -> bool:
    return _AE_TITLE.fullmatch(value) is not None


def _is_url(value: str) -> bool:
    return re.fullmatch(r"https?://[!-~]+", value) is not None


def _is_frame(value: int | str) -> bool:
    return value == "middle" or (isinstance(value, int) and value >= 0)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
