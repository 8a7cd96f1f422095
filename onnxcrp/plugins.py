"""Operators and rules from outside: files named with --plugin, and installed packages (entry points `onnxcrp.plugins`).

A plugin is Python that registers something when it runs:

    import onnxcrp

    @onnxcrp.transpose("Prototype", family="other")
    def prototype(op, node, s): ...

    @onnxcrp.rule("other")
    def distance_share(layer, R): ...

All of a plugin is registered or, if it fails, nothing; what goes wrong in its functions later names its file and line.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxcrp.errors import OnnxcrpError, PluginError

GROUP = "onnxcrp.plugins"

_files: dict[Path, ModuleType] = {}
_discovered = False
_lock = threading.RLock()


def load_plugin(path: str | os.PathLike[str]) -> ModuleType:
    """Run a plugin file, once however often it is named; errors: PluginError naming the file, the line, the mistake."""
    file = Path(path)
    if not file.is_file():
        raise PluginError(f"there is no plugin file {str(path)!r}", hint="a .py file is expected")
    if file.suffix != ".py":
        raise PluginError(f"plugin {str(path)!r} is no .py file", hint="a Python file that calls onnxcrp.transpose")
    file = file.resolve()
    with _lock:
        return _files[file] if file in _files else _run(file, str(path))


def loaded() -> list[str]:
    """The plugin files that were run, in order."""
    return [os.fspath(file) for file in _files]


def _run(file: Path, shown: str) -> ModuleType:
    name = f"onnxcrp_plugin_{len(_files)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _registering(shown, file):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    _files[file] = module
    return module


def discover() -> None:
    """Run the plugins of installed packages, once. Errors: PluginError naming the package."""
    global _discovered
    with _lock:
        if _discovered:
            return
        _discovered = True  # a plugin may ask for a composite itself
        try:
            _run_installed()
        except BaseException:
            _discovered = False
            raise


def _run_installed() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = entry.dist.name if entry.dist is not None else "an installed package"
        with _registering(f"{entry.name} of {package}", None, hint=f"update or uninstall {package}"):
            loaded = entry.load()
            if callable(loaded):
                loaded()


@contextmanager
def _registering(name: str, file: Path | None, *, hint: str | None = None) -> Iterator[None]:
    """What is registered inside is kept, guarded, or taken back if anything fails."""
    from onnxcrp.lrp import RULES
    from onnxcrp.ops import CARRIES_NONE, OPS

    tables: list[dict[str, Any]] = [OPS, CARRIES_NONE, RULES]
    before = [dict(table) for table in tables]
    try:
        yield
    except BaseException as error:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
        if isinstance(error, Exception):
            raise _told(name, file, error, hint=hint) from error
        raise
    for key in OPS.keys() - before[0].keys():
        about = OPS[key]
        what = f"operator {key} of plugin {name}"
        OPS[key] = replace(
            about,
            transpose=_guarded(about.transpose, what),
            forward=about.forward and _guarded(about.forward, what),
            ones=about.ones and _guarded(about.ones, what),
        )
    for key in RULES.keys() - before[2].keys():
        RULES[key] = replace(RULES[key], function=_guarded(RULES[key].function, f"rule {key} of plugin {name}"))


def _guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The same function, whose errors say which plugin they come from."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except OnnxcrpError:
            raise
        except Exception as error:
            raise PluginError(f"{what}: {_line(error, Path(function.__code__.co_filename))}") from error

    return call


def _told(name: str, file: Path | None, error: Exception, *, hint: str | None) -> PluginError:
    if isinstance(error, OnnxcrpError):
        return PluginError(f"plugin {name}: {error.message}", hint=error.hint or hint)
    return PluginError(f"plugin {name}: {_line(error, file)}", hint=hint)


def _line(error: Exception, file: Path | None) -> str:
    """`line 12: NameError: name 'x' is not defined`, the last line of the plugin that was running."""
    said = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and Path(frame.filename) == file]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}" + (f": {said}" if said else "")


__all__ = ["GROUP", "discover", "load_plugin", "loaded"]
