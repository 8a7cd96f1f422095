"""Composites: which rule each layer gets. `rules/*.toml` -> `Composite`; every mistake is named with its place.

A composite is an ordered list of lines. The first line that fits a node decides its rule; a node that no line fits and
that is no pure rearrangement is an error further up (`backward.py`), never a silent gradient.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import Parameter
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp.errors import CompositeError
from onnxcrp.plugins import discover

SEEDS = ("output", "one")
BIASES = ("keep", "drop")
DENSE = ("Linear", "Gemm", "MatMul")  # one canonical op; the names it has in files match it as well
BASE = "base"  # shared lines, no preset of its own
TOP_KEYS = ("description", "extends", "seed", "stabilizer", "bias", "layer")
LINE_KEYS = ("op", "name", "first", "rule")


@dataclass(frozen=True)
class Line:
    """One `[[layer]]` table: the nodes it fits (all of `ops`, `names`, `first` that are set) and the rule they get."""

    ops: tuple[str, ...]  # op types and family names; empty: all that the rule can treat
    names: tuple[str, ...]  # globs; empty: any
    first: int | None  # depth 1..first; None: any
    rule: str
    parameters: Mapping[str, Any]  # the rule's own, and `stabilizer`, `bias` where the line sets them
    where: str = field(default="", compare=False)  # file and table, for messages
    own: bool = field(default=False, compare=False)  # written in the user's own file, neither preset nor extended

    def fits(self, *, op: str, source_op: str, family: str, names: Sequence[str], depth: int) -> bool:
        """Whether this line decides the rule of the node so described."""
        kinds = {op, source_op, family, *(DENSE if op == "Linear" else ())}
        return (
            (not kinds.isdisjoint(self.ops) if self.ops else family in families_of(self.rule))
            and (not self.names or any(fnmatchcase(name, glob) for glob in self.names for name in names))
            and (self.first is None or 1 <= depth <= self.first)
        )

    @property
    def shown(self) -> str:
        """`table 1 (line 3) name = features.*`: where it is in its file, and what it asks for."""
        asked = {"op": ", ".join(self.ops), "name": ", ".join(self.names), "first": self.first}
        which = ", ".join(f"{key} = {value}" for key, value in asked.items() if value)
        return f"table {self.where.rpartition('[[layer]] ')[2]} {which or f'rule = {self.rule}'}"

    @property
    def missing(self) -> tuple[str, ...]:
        """Parameters that the rule requires and nobody has given."""
        return tuple(
            name
            for name, default in signature(self.rule).items()
            if default is Parameter.empty and name not in self.parameters
        )


@dataclass(frozen=True)
class Composite:
    """An ordered list of lines, the seed that relevance starts with, and the defaults of all rules."""

    name: str
    seed: str  # "output": target * output, "one": the target alone
    stabilizer: float
    bias: str  # "keep" | "drop": as if every b were 0
    lines: tuple[Line, ...]
    description: str = ""
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # parameters set in place, part of the name

    def rule_for(
        self, *, op: str, source_op: str, family: str, names: Sequence[str], depth: int, by_name: bool = False
    ) -> tuple[str, dict[str, Any]] | None:
        """Rule of a node and its parameters: those that are set, always `stabilizer` and `bias`; None if no line fits.

        `by_name`: only lines that name this operator or layer count, not those for families.

        A rearrangement has no rule: its entries are moved, copied or dropped.
        Raises CompositeError when the line that fits lacks a required parameter or its rule cannot treat this family.
        """
        if family == "rearrangement":
            return None
        for line in self.lines:
            if not line.fits(op=op, source_op=source_op, family=family, names=names, depth=depth):
                continue
            if by_name and op not in line.ops and not line.names:
                continue
            if line.missing:
                raise CompositeError(
                    f'composite {self.name}: rule "{line.rule}" of {names[0] if names else op} '
                    f"needs {_listed(line.missing)}",
                    hint=f"give them in place: {self.name}({', '.join(f'{name}=...' for name in line.missing)})",
                )
            families = families_of(line.rule)
            if family not in families:
                raise CompositeError(
                    f'{line.where}: rule "{line.rule}" cannot treat {names[0] if names else op} ({op}, {family}); '
                    f"it treats {_listed(sorted(families))}",
                    hint='narrow the line with op = "..."',
                )
            return line.rule, {"stabilizer": self.stabilizer, "bias": self.bias, **line.parameters}
        return None

    @property
    def missing(self) -> tuple[str, ...]:
        """Required parameters that some line still lacks (`low`, `high` of rule zbox), in order of appearance."""
        return tuple(dict.fromkeys(name for line in self.lines for name in line.missing))

    def with_parameters(self, **parameters: Any) -> Composite:
        """The same composite with parameters set: on every line whose rule has them, `stabilizer` and `bias` for all.

        Raises CompositeError for a parameter that no line has, or a value that its rule does not allow.
        """
        if not parameters:
            return self
        settable = list(dict.fromkeys(name for line in self.lines for name in signature(line.rule)))
        given = {**self.given, **parameters}
        plain = self.name.removesuffix(_call(self.given)) if self.given else self.name
        call = plain + _call(given)
        common: dict[str, Any] = {}
        for name, value in parameters.items():
            if name in ("stabilizer", "bias"):
                common[name] = _checked(name, value, call)
            elif name not in settable:
                exist = [*settable, "stabilizer", "bias"]
                raise CompositeError(
                    f'{call}: no rule of this composite has a parameter "{name}"{_suggest(name, exist)}',
                    hint=f"there are {_listed(exist)}",
                )
        lines = []
        for line in self.lines:
            own = {name: value for name, value in parameters.items() if name in signature(line.rule)}
            kept = {name: value for name, value in line.parameters.items() if name not in common}
            lines.append(replace(line, parameters=kept | _parameters(line.rule, own, kept, f"{call}: {line.where}")))
        return replace(self, name=call, lines=tuple(lines), given=given, **common)

    @property
    def text(self) -> str:
        """The whole composite as one TOML file, `extends` and in-place parameters written out: what metadata holds."""
        out = [f"# {self.name}"]
        if self.description:
            out.append(f"description = {_toml(self.description)}")
        out += [f"seed = {_toml(self.seed)}", f"stabilizer = {_toml(self.stabilizer)}", f"bias = {_toml(self.bias)}"]
        for line in self.lines:
            out += ["", "[[layer]]"]
            if line.ops:
                out.append(f"op = {_toml(line.ops[0] if len(line.ops) == 1 else line.ops)}")
            if line.names:
                out.append(f"name = {_toml(line.names[0] if len(line.names) == 1 else line.names)}")
            if line.first is not None:
                out.append(f"first = {line.first}")
            out.append(f"rule = {_toml(line.rule)}")
            out += [f"{name} = {_toml(value)}" for name, value in line.parameters.items()]
        return "\n".join(out) + "\n"


def load(composite: str | os.PathLike[str] | Composite, **parameters: Any) -> Composite:
    """A composite by preset, file or object; `"epsilon_gamma_box(low=-3, high=3)"` or keywords set parameters in place.

    Raises CompositeError naming the file, the table and line, and what would be right.
    """
    if isinstance(composite, Composite):
        return composite.with_parameters(**parameters)
    discover()
    text = os.fspath(composite)
    head, given = _split_call(text)
    path = Path(head)
    if path.is_file():
        found = _read(path, ())
    elif path.suffix == ".toml" or path.parent != Path("."):
        raise CompositeError(f"composite file {head} does not exist", hint=f"presets are {', '.join(presets())}")
    else:
        found = _read(_preset(head), ())
    twice = sorted(given.keys() & parameters.keys())
    if twice:
        raise CompositeError(f"{text}: {_listed(twice)} is given in place and as a keyword")
    return found.with_parameters(**given, **parameters)


def presets() -> list[str]:
    """Names of the composites that come with onnxcrp."""
    return sorted(path.stem for path in _folder().glob("*.toml") if path.stem != BASE)


def signature(rule: str) -> dict[str, Any]:
    """The parameters of a rule and their defaults (`Parameter.empty`: required), without `stabilizer` and `bias`."""
    from onnxcrp.lrp import RULES

    return {name: value for name, value in RULES[rule].parameters.items() if name not in ("stabilizer", "bias")}


def families_of(rule: str) -> frozenset[str]:
    """The op families that a rule can treat."""
    from onnxcrp.lrp import RULES

    return frozenset(RULES[rule].families)


# --- reading a file ---------------------------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    """rules/: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "rules", here.parent / "rules"):
        if (folder / f"{BASE}.toml").is_file():
            return folder
    raise CompositeError("the folder of composites (rules/) is missing", hint="reinstall onnxcrp")


def _preset(name: str) -> Path:
    path = _folder() / f"{name}.toml"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        raise CompositeError(
            f'composite "{name}" is unknown{_suggest(name, presets())}', hint=f"presets are {', '.join(presets())}"
        )
    return path


def _read(path: Path, seen: tuple[Path, ...]) -> Composite:
    """One TOML file, the composites it extends included; `seen`: the files that led here."""
    shown = f"rules/{path.name}" if path.parent == _folder() else os.fspath(path)
    if path.resolve() in seen:
        raise CompositeError(f"{shown}: extends itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompositeError(f"{shown}: cannot be read: {error}") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CompositeError(f"{shown}: not valid TOML: {error}") from error

    for key in table:
        if key not in TOP_KEYS:
            raise CompositeError(
                f'{shown}{_line_of_key(text, key)}: key "{key}" is unknown{_suggest(key, TOP_KEYS)}',
                hint=f"keys of a composite are {', '.join(TOP_KEYS[:-1])} and [[layer]] tables",
            )
    parent = None
    if "extends" in table:
        parent = _extended(table["extends"], path, shown + _line_of_key(text, "extends"), (*seen, path.resolve()))
    top: dict[str, Any] = {}
    for key in ("seed", "stabilizer", "bias", "description"):
        if key in table:
            top[key] = _checked(key, table[key], shown + _line_of_key(text, key))
        else:
            inherited = {"seed": "output", "stabilizer": 1e-6, "bias": "keep", "description": ""}
            top[key] = inherited[key] if parent is None else getattr(parent, key)
    layers = table.get("layer", [])
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise CompositeError(f"{shown}: layers are [[layer]] tables, with double brackets")
    if not layers and parent is None:
        raise CompositeError(f"{shown}: has no [[layer]] table", hint='write at least one, or extends = "base"')
    numbers = [at for at, row in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*layer\s*\]\]", row)]
    lines = []
    for number, layer in enumerate(layers, 1):
        at = f" (line {numbers[number - 1]})" if len(numbers) == len(layers) else ""
        own = not seen and path.parent != _folder()
        lines.append(_line(layer, f"{shown}: [[layer]] {number}{at}", own=own))
    return Composite(name=path.stem, lines=(*lines, *(parent.lines if parent else ())), **top)


def _extended(name: Any, path: Path, where: str, seen: tuple[Path, ...]) -> Composite:
    if not isinstance(name, str):
        raise CompositeError(f'{where}: extends must be a name, such as "{BASE}", got {name!r}')
    beside = path.parent / name
    try:
        return _read(beside if name.endswith(".toml") and beside.is_file() else _preset(name), seen)
    except CompositeError as error:
        raise CompositeError(f"{where}: extends: {error.message}", hint=error.hint) from error


def _line(table: dict[str, Any], where: str, *, own: bool = False) -> Line:
    """One `[[layer]]` table, checked against the signature of its rule."""
    from onnxcrp.lrp import RULES

    if "rule" not in table:
        near = _suggest("rule", table, cutoff=0.7)
        raise CompositeError(f"{where}: has no rule{near}", hint=f"rules are {', '.join(RULES)}")
    rule = table["rule"]
    if not isinstance(rule, str) or rule not in RULES:
        raise CompositeError(
            f'{where}: rule "{rule}" is unknown{_suggest(str(rule), RULES)}', hint=f"rules are {', '.join(RULES)}"
        )
    first = table.get("first")
    if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
        raise CompositeError(f"{where}: first must be a whole number >= 1 (depth 1..first), got {first!r}")
    ops = _words(table, "op", where)
    families, known = families_of(rule), _families()
    for op in ops:
        if op in known:
            if op not in families:
                raise CompositeError(
                    f'{where}: rule "{rule}" cannot treat "{op}"; it treats {_listed(sorted(families))}'
                )
        elif op not in _op_types() and "::" not in op:
            raise CompositeError(
                f'{where}: op "{op}" is unknown{_suggest(op, (*known, *_op_types()))}',
                hint=f"an ONNX operator such as Conv, or a family: {', '.join(known)}",
            )
    given = {key: value for key, value in table.items() if key not in LINE_KEYS}
    return Line(
        ops=ops,
        names=_words(table, "name", where),
        first=first,
        rule=rule,
        parameters=_parameters(rule, given, {}, where),
        where=where,
        own=own,
    )


def _families() -> tuple[str, ...]:
    from onnxcrp.ops.registry import FAMILIES

    return tuple(FAMILIES)


def _op_types() -> frozenset[str]:
    """All operators of the ONNX standard, the canonical ones that onnxcrp adds, and those of plugins."""
    from onnxcrp.ops.registry import CARRIES_NONE, OPS, standard

    return standard() | OPS.keys() | CARRIES_NONE.keys()


def _words(table: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        example = "Conv" if key == "op" else "features.*"
        raise CompositeError(
            f'{where}: {key} must be a string or a list of strings, such as "{example}", got {value!r}'
        )
    if key in table and not words:
        raise CompositeError(f"{where}: {key} is empty", hint=f"leave {key} out to fit everything")
    return tuple(words)


def _parameters(rule: str, own: Mapping[str, Any], kept: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Parameters of a rule (and `stabilizer`, `bias`) as given by `own`, checked together with those already `kept`."""
    known = signature(rule)
    checked = {}
    for name, value in own.items():
        if name not in known and name not in ("stabilizer", "bias"):
            exist = [*known, "stabilizer", "bias"]
            hint = f"it has {', '.join(exist)}; other keys of a table are {', '.join(LINE_KEYS)}"
            if name in TOP_KEYS:
                hint = f"{name} belongs above the first [[layer]]"
            near = _suggest(name, [*exist, *LINE_KEYS])
            raise CompositeError(f'{where}: rule "{rule}" has no parameter "{name}"{near}', hint=hint)
        checked[name] = _checked(name, value, where)
    full = {name: value for name, value in known.items() if value is not Parameter.empty} | dict(kept) | checked
    if rule == "alpha_beta":
        alpha, beta = full["alpha"], full["beta"]
        if not math.isclose(alpha - beta, 1, abs_tol=1e-6):
            fix = f"for alpha = {alpha:g} set beta = {alpha - 1:g}" if alpha >= 1 else None
            raise CompositeError(
                f"{where}: alpha - beta must be 1, got {alpha:g} - {beta:g} = {alpha - beta:g}", hint=fix
            )
    if "low" in full and "high" in full and not _in_order(full["low"], full["high"]):
        low, high = _short(full["low"]), _short(full["high"])
        raise CompositeError(f"{where}: low must not be above high, got {low} and {high}")
    return checked


def _in_order(low: Any, high: Any) -> bool:
    try:
        return bool(np.all(np.asarray(low) <= np.asarray(high)))
    except ValueError:  # shapes that do not go together: the layer that they meet says so
        return True


def _checked(name: str, value: Any, where: str) -> Any:
    """One value, of the right type and range, as plain Python; raises CompositeError."""
    choices = {"seed": SEEDS, "bias": BIASES, "at": ("sample", "reference")}.get(name)
    if name == "reference" and value == "boundary":
        return value
    if choices:
        if value not in choices:
            raise CompositeError(f"{where}: {name} must be {' or '.join(map(_toml, choices))}, got {_short(value)}")
        return value
    if name == "description":
        if not isinstance(value, str):
            raise CompositeError(f"{where}: description must be a string, got {value!r}")
        return value
    if name in ("low", "high", "reference"):
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            array = np.asarray(np.nan)
        if not np.isfinite(array).all() or isinstance(value, (bool, str)):
            of = "feature" if name == "reference" else "channel"
            raise CompositeError(f"{where}: {name} must be a number or a list of one per {of}, got {_short(value)}")
        return _plain(array.tolist())
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise CompositeError(f"{where}: {name} must be a number, got {_short(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise CompositeError(f"{where}: {name} must be finite, got {number}")
    if name in ("epsilon", "stabilizer") and number <= 0:
        raise CompositeError(
            f"{where}: {name} must be above 0, got {number:g}",
            hint='rule "zero" is the limit of epsilon = 0' if name == "epsilon" else None,
        )
    if name in ("epsilon", "stabilizer") and number < np.finfo(np.float32).tiny:
        raise CompositeError(f"{where}: {name} is too small for float32, got {number:g}", hint="1e-6 is usual")
    if number < 0:
        raise CompositeError(f"{where}: {name} must not be negative, got {number:g}")
    return number


# --- small helpers ----------------------------------------------------------------------------------------------------


def _split_call(text: str) -> tuple[str, dict[str, Any]]:
    """`name(low=-3, high=[1, 2])` -> name, parameters; a text without a call (or an existing file) is a name."""
    if Path(text).is_file():
        return text, {}
    if text.count("(") > text.count(")"):
        raise CompositeError(f"{text}: a parenthesis is not closed", hint='write "name(low=-3, high=3)"')
    if not text.endswith(")"):
        return text, {}
    for at in (match.start() for match in re.finditer(r"\(", text)):
        try:
            call = ast.parse(f"f{text[at:]}", mode="eval").body
        except SyntaxError:
            continue
        if not isinstance(call, ast.Call):
            continue
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise CompositeError(f"{text}: parameters are given by name", hint=f"{text[:at]}(epsilon=0.1)")
        given = {}
        for keyword in call.keywords:
            try:
                given[str(keyword.arg)] = ast.literal_eval(keyword.value)
            except ValueError as error:
                shown = ast.unparse(keyword.value)
                raise CompositeError(
                    f"{text}: {keyword.arg} must be a number, a string or a list, got {shown}",
                    hint=f"quote words: {keyword.arg}='{shown}'" if isinstance(keyword.value, ast.Name) else None,
                ) from error
        return text[:at].strip(), given
    raise CompositeError(f"{text}: cannot be read as a composite", hint='write "name(low=-3, high=3)"')


def _line_of_key(text: str, key: str) -> str:
    """` (line n)` of a top-level key, where it can be found."""
    for number, row in enumerate(text.splitlines(), 1):
        if re.match(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=\].]""", row):
            return f" (line {number})"
    return ""


def _suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean "gamma"?`, or nothing where nothing is near."""
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[name] for name in get_close_matches(word.lower(), by_lower, n=3, cutoff=cutoff)]
    return f"; did you mean {' or '.join(map(_toml, near))}?" if near else ""


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _plain(value: Any) -> Any:
    """Nested lists as nested tuples, so that composites stay unchangeable."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _call(given: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{name}={_short(value)}' for name, value in given.items())})"


def _short(value: Any) -> str:
    """A value for a message or a name: long arrays by their shape only."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    shown = repr(value)
    return shown if len(shown) <= 120 else f"array{list(np.shape(value))}"


def _toml(value: Any) -> str:
    if isinstance(value, str):
        escaped = "".join(
            {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(c, c if c.isprintable() else f"\\u{ord(c):04x}")
            for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return str(value)
