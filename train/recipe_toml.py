"""TOML tables as dataclasses, with the line of every mistake and the key that was probably meant.

An unknown key, a missing key or a value of the wrong type is a RecipeError, never a default; only
a table of type ``X | None`` may be left out. It knows nothing of recipes. Lines are found by a scan
for headers and keys beside tomllib, which keeps none; a key inside a multi-line text could mislead
it, and recipes have none.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medmo_edge.errors import RecipeError

Path = tuple[str | int, ...]
#: path of a key -> what it must fulfil in words, and whether it does
Rules = dict[Path, tuple[str, bool]]

_HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.\- ]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_-]+)\s*=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed TOML file: its name for messages, its values, and the line of every key."""

    source: str
    values: dict[str, Any]
    lines: Mapping[Path, int] = field(repr=False)

    def where(self, path: Path) -> str:
        """ "FILE:LINE: table: " of a key, or of the nearest table that holds it."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), ())
        line = f":{self.lines[known]}" if known in self.lines else ""
        table = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
        return f"recipe {self.source}{line}: {table + ': ' if table else ''}"

    def refuse(self, path: Path, problem: str) -> RecipeError:
        """The error for the key or table at ``path``."""
        return RecipeError(f"{self.where(path)}{problem}")


def parse(text: str, source: str) -> Document:
    """Errors: RecipeError when ``text`` is not TOML."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source} is not valid TOML: {error}") from error
    return Document(source=source, values=values, lines=_find_lines(text))


def _find_lines(text: str) -> dict[Path, int]:
    lines: dict[Path, int] = {}
    table: Path = ()
    counts: dict[Path, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = _header_path(header[2], header[1] == "[[", counts)
            lines[table] = number
        elif key:
            lines.setdefault((*table, key[1]), number)
    return lines


def _header_path(name: str, is_array: bool, counts: dict[Path, int]) -> Path:
    """Path of a table header; arrays of tables that were opened before lead to their last entry."""
    path: Path = ()
    parts = [part.strip() for part in name.split(".")]
    for index, part in enumerate(parts):
        path = (*path, part)
        if is_array and index == len(parts) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def build(
    kind: Any, document: Document, path: Path = (), given: Mapping[type, Mapping[str, Any]] = {}
) -> Any:
    """The table at ``path`` as an instance of the dataclass ``kind``.

    Tables nest, arrays become tuples. ``given`` sets fields of a dataclass that a file may not.
    Errors: RecipeError.
    """
    values: Any = document.values
    for part in path:
        values = values[part]
    return _build(kind, values, document, path, given)


def _build(
    kind: Any, values: Any, document: Document, path: Path, given: Mapping[type, Mapping[str, Any]]
) -> Any:
    if not isinstance(values, dict):
        raise document.refuse(path, f"{path[-1] if path else 'the file'} must be a table")
    fixed = given.get(kind, {})
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in fixed}
    if unknown := sorted(values.keys() - hints.keys()):
        known = sorted(hints.keys() - values.keys()) or sorted(hints)
        raise document.refuse(
            (*path, unknown[0]), f"unknown key {unknown[0]!r}{suggest(unknown[0], known)}"
        )
    optional = {name for name, hint in hints.items() if isinstance(hint, UnionType)}
    if missing := sorted(hints.keys() - values.keys() - optional):
        raise document.refuse((*path, missing[0]), f"key {missing[0]!r} is missing")
    built = {
        name: _value(hint, values[name], document, (*path, name), given) if name in values else None
        for name, hint in hints.items()
    }
    return kind(**built, **fixed)


def suggest(name: str, known: list[str]) -> str:
    """ ", did you mean 'x'?" for the known name most like ``name``, else the names that fit."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    contained = [one for one in known if name in one or one in name]
    if close or contained:
        return f", did you mean {(close or contained)[0]!r}?"
    return f" (known here: {', '.join(known)})"


def _value(
    hint: Any, value: Any, document: Document, path: Path, given: Mapping[type, Mapping[str, Any]]
) -> Any:
    if isinstance(hint, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, document, path, given)
    if get_origin(hint) is tuple:
        return _tuple(hint, value, document, path, given)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise document.refuse(path, f"{path[-1]} must be a table")
        inner = get_args(hint)[1]
        return {k: _value(inner, v, document, (*path, k), given) for k, v in value.items()}
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise document.refuse(path, f"{path[-1]} must be one of {allowed}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise document.refuse(path, f"{path[-1]} must be of type {hint.__name__}, not {value!r}")
    return value


def _tuple(
    hint: Any, value: Any, document: Document, path: Path, given: Mapping[type, Mapping[str, Any]]
) -> tuple[Any, ...]:
    """A list; a hint without ellipsis also fixes its length."""
    if not isinstance(value, list):
        raise document.refuse(path, f"{path[-1]} must be a list")
    kinds = get_args(hint)
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise document.refuse(path, f"{path[-1]} must have {len(kinds)} entries, not {len(value)}")
    return tuple(
        _value(kinds[0], item, document, (*path, index), given) for index, item in enumerate(value)
    )


def require(rules: Rules, document: Document) -> None:
    """Errors: RecipeError with the line of the first rule that does not hold."""
    for path, (rule, holds) in rules.items():
        if not holds:
            raise document.refuse(path, rule)


def weights_rule(name: str, weights: dict[str, float], known: tuple[str, ...]) -> tuple[str, bool]:
    """The rule that a table has weights of ``known`` names, none negative, one above 0."""
    unknown = sorted(weights.keys() - set(known))
    if unknown:
        return f"{name} has unknown {unknown[0]!r}{suggest(unknown[0], list(known))}", False
    positive = bool(weights) and min(weights.values()) >= 0 and sum(weights.values()) > 0
    return f"{name} needs weights, none below 0, with a sum above 0", positive
