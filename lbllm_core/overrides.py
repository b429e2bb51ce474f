"""`section.field=value` on a command line: found, typed, and refused with the closest match.

The same words work everywhere (`python -m lbllm_core.run`, `make run ARGS=…`, a deployment's parameters), so the reading of
them lives here, without Hydra. The type of a value is the type of its field: text is taken as it is written (paths may hold
spaces, commas or equals signs), lists are `a,b` or `[a,b]`, dictionaries `{name: 1.5}`. Every wrong one is reported, not
only the first.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from lbllm_core.config import SECTIONS, RunConfig, config_from_dict
from lbllm_core.errors import ConfigError


def field_types() -> dict[str, Any]:
    """`{'section.field' or 'field': type}` for every configuration key."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{inner}": inner_kind for inner, inner_kind in get_type_hints(kind).items()}
        else:
            found[name] = kind
    return found


def closest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` or an empty string. A bare field name finds its section."""
    candidates = sorted(allowed)
    leaf = word.rpartition(".")[2]
    exact = [c for c in candidates if c.rpartition(".")[2] == leaf]
    near = exact or difflib.get_close_matches(word, candidates, 1, 0.6)
    if not near:
        by_leaf = {c.rpartition(".")[2]: c for c in candidates}
        near = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)]
    return f"; did you mean {near[0]}?" if near else ""


def split(override: str) -> tuple[str, str, str]:
    """(key, value, problem) of one `key=value`; the problem is empty when it has that form."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return key, value, f"{override!r} is not of the form section.field=value"
    if key.startswith(("+", "~")) or "@" in key:
        return key, value, f"{override!r}: keys cannot be added, removed or moved; write {key.lstrip('+~').partition('@')[0]}=value for a key that exists"
    return key, value, ""


def read(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Typed values by key, and the problems found. Values of a wrong type stay text, for `config_from_dict` to name."""
    types = field_types()
    values: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        key, text, problem = split(override)
        if problem:
            problems.append(problem)
        elif key not in types:
            problems.append(unknown_key(key, types))
        else:
            values[key] = typed(types[key], text)
    return values, problems


def unknown_key(key: str, types: Mapping[str, Any]) -> str:
    """The sentence for a key that does not exist."""
    section = key.partition(".")[0]
    if section in SECTIONS and "." not in key:
        return f"{key} is a section; set one of its fields, for example {next(t for t in types if t.startswith(section + '.'))}=..."
    known = [t.rpartition(".")[2] for t in types if t.startswith(f"{section}.")]
    rest = f" Keys of {section}: {', '.join(known)}" if known else f" Sections: {', '.join(SECTIONS)}"
    return f"{key} is not a configuration key{closest(key, types) or '.'}{rest}"


def typed(kind: Any, text: str) -> Any:
    """`text` as a value of `kind`, or unchanged when it is none."""
    text = text.strip()
    if kind is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text
    inner = text[1:-1] if text[:1] in "[{(" and text[-1:] in "]})" else text
    items = [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]
    if kind == tuple[str, ...]:
        return items
    pairs = [item.partition(":") for item in items]
    return {name.strip().strip("'\""): typed(float, value) for name, _, value in pairs}


def all_problems(values: Mapping[str, Any]) -> list[str]:
    """Every problem of nested values: those of type and, with the wrong ones left at their defaults, those of range."""
    found: list[str] = []
    remaining = dict(values)
    while True:
        try:
            config_from_dict(remaining)
            return found
        except ConfigError as error:
            new = [p for p in error.problems if p not in found]
            found += new
            if not new or not any(" is not of type " in p or " is not a configuration key" in p or " must be a section" in p for p in new):
                return found
            for problem in new:
                remaining = _without(remaining, problem.partition("=")[0].partition(" ")[0])


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    section, _, leaf = key.partition(".")
    if not leaf:
        return {k: v for k, v in values.items() if k != section}
    return {k: {a: b for a, b in v.items() if a != leaf} if k == section else v for k, v in values.items()}


def merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested `base` with the dotted `values` put in."""
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    for key, value in values.items():
        section, _, leaf = key.partition(".")
        if leaf:
            result.setdefault(section, {})[leaf] = value
        else:
            result[section] = value
    return result


def explain(problem: str, origins: Mapping[str, str]) -> str:
    """A problem of `config_from_dict` with the closest allowed word and the place its value came from."""
    key = next((word for word in (problem.partition("=")[0], problem.partition(" ")[0]) if "." in word), problem.partition("=")[0])
    hint = closest(key, field_types()) if " is not a configuration key" in problem else _closest_value(key, problem)
    origin = origins.get(key) or origins.get(key.partition(".")[0], "")
    return f"{problem}{hint}" + (f" ({origin})" if origin else "")


def _closest_value(key: str, problem: str) -> str:
    section, _, leaf = key.partition(".")
    if section not in SECTIONS or "is not allowed; choose one of" not in problem:
        return ""
    specs = {f.name: f for f in dataclasses.fields(get_type_hints(RunConfig)[section])}
    allowed = specs[leaf].metadata.get("allowed", ()) if leaf in specs else ()
    written = problem.partition("=")[2].partition(" ")[0].strip("'\"")
    return closest(written, allowed) if allowed else ""
