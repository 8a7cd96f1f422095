"""What commands write: JSON and aligned columns to stdout, messages and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxcrp.errors import OnnxcrpError

T = TypeVar("T")


def write_json(content: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def heading(text: str) -> None:
    """A line that starts a section on stdout."""
    click.echo(click.style(text, bold=True))


def columns(rows: Sequence[Sequence[str]], *, titles: Sequence[str] = (), indent: int = 2) -> None:
    """Rows in aligned columns on stdout, numbers to the right."""
    every = [list(titles), *map(list, rows)] if titles else list(map(list, rows))
    if not every:
        return
    count = max(map(len, every))
    every = [[*row, *[""] * (count - len(row))] for row in every]
    width = [max(len(row[at]) for row in every) for at in range(count)]
    right = [at > 0 and all(_is_number(row[at]) for row in every[bool(titles) :]) for at in range(count)]
    for number, row in enumerate(every):
        cells = [
            cell.rjust(width[at]) if right[at] else cell.ljust(width[at] if at < count - 1 else 0)
            for at, cell in enumerate(row)
        ]
        line = " " * indent + "  ".join(cells).rstrip()
        click.echo(click.style(line, dim=True) if titles and number == 0 else line)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """A reader of stdout that has seen enough (`| head`) does not stop the work: files are still written."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_number(text: str) -> bool:
    try:
        float(text.strip().rstrip("%!") or 0)
    except ValueError:
        return False
    return True


def destination(out: str, suffix: str, what: str) -> Path:
    """The path of a file to write, checked before anything is computed; raises OnnxcrpError."""
    path = Path(out)
    if out == "-":
        raise OnnxcrpError(f"{what} cannot be written to stdout", hint=f"name a file: -o NAME{suffix}")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise OnnxcrpError(f"cannot write {path}: it is {kind}", hint=f"name a file: -o NAME{suffix}")
    if path.suffix.lower() != suffix:
        raise OnnxcrpError(f"{path}: {what} is an {suffix} file", hint=f"-o {path.stem}{suffix}")
    return in_a_folder(path)


def in_a_folder(path: Path) -> Path:
    """The path, if the folder that is to hold it exists; raises OnnxcrpError."""
    if not path.parent.is_dir():
        raise OnnxcrpError(f"cannot write {path}: there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")
    return path


def picture(out: str) -> Path:
    """The path of a picture to write, checked before anything is computed; raises OnnxcrpError and InputError."""
    from onnxcrp.picture import writable

    if out == "-":
        raise OnnxcrpError("a picture cannot be written to stdout", hint="name a file: -o NAME.png")
    return in_a_folder(writable(out))


def wrote(path: object, what: str = "", *, quiet: bool = False) -> None:
    """A message on stderr."""
    if not quiet:
        click.echo(f"wrote {path}{f': {what}' if what else ''}", err=True)


@contextlib.contextmanager
def steps(*, quiet: bool = False) -> Iterator[Any]:
    """A function that says on stderr what is being done, replaced by the next; silent where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda what: status.update(f"{what} ...")


def progress(items: Iterable[T], what: str, *, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """The items, with a bar, rate and time left on stderr; silent where stderr is no terminal or there is only one."""
    if quiet or total == 1 or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Items per second."""

        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")

    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=what)
