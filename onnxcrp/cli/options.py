"""Options that several commands share, each a decorator, and the types of their values."""

from __future__ import annotations

import difflib
import importlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """The section `Examples`, a command per line, never wrapped."""
    if examples:
        with formatter.section("Examples" if len(examples) > 1 else "Example"):
            for example in examples:
                formatter.write(f"  {example}\n")


class Command(click.Command):
    """A command whose help ends with examples that work as they stand, from the project's own folder."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        write_examples(formatter, self.examples)


class Group(click.Group):
    """Commands by name, each in the module of that name in `package` and imported when it is called.

    `table`: name -> what the help of the group says of it.
    """

    def __init__(
        self, *arguments: Any, package: str, table: Mapping[str, str], examples: Sequence[str] = (), **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.package, self.table, self.examples = package, table, examples

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are needed."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.table:
            return None
        return importlib.import_module(f"{self.package}.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name for a typo."""
        if args and args[0] not in self.table and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.table, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" There are {', '.join(self.table)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        write_examples(formatter, self.examples)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, without importing what it names."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))


class Percentile(click.FloatRange):
    """A number above 0 and up to 100; click's own range lets nan through."""

    def __init__(self) -> None:
        super().__init__(0, 100, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click does, less nan."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


class Bytes(click.ParamType):
    """`2GB`, `512MiB`, `1e9` -> a number of bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Powers of 1000, or of 1024 with an i."""
        found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
        try:
            size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
        except ValueError:
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; 2GB, 512MiB or a number of bytes", param, ctx)
        return size


def model(command: F) -> F:
    """MODEL, the .onnx file."""
    return click.argument("model", type=click.Path())(command)


def composite(command: F) -> F:
    """--composite: which rule each layer gets."""
    return click.option(
        "-c",
        "--composite",
        default="epsilon_plus_flat",
        show_default=True,
        metavar="NAME|FILE",
        help="Which rule each layer gets: a preset or a .toml file, either with parameters as in"
        ' "epsilon_gamma_box(low=-3, high=3)".',
    )(command)


def output(command: F) -> F:
    """--output and --keep-head: which output is explained."""
    command = click.option("--output", metavar="NAME", help="The model output to explain. Default: the first one.")(
        command
    )
    return click.option(
        "--keep-head", is_flag=True, help="Explain after a terminal Softmax or Sigmoid, not the logits before it."
    )(command)


def preprocess(command: F) -> F:
    """--preprocess: how a picture becomes the model's input."""
    return click.option(
        "--preprocess",
        metavar="NAME|FILE",
        help="How pictures become inputs: imagenet, caffe, tf (-1..1), unit (0..1), none (0..255), or a .json file"
        " (Hugging Face preprocessor_config.json or the plain form). Default: a *.preprocessing.json beside the model.",
    )(command)


def plugin(command: F) -> F:
    """--plugin: operators and rules of one's own."""
    return click.option(
        "--plugin",
        multiple=True,
        metavar="FILE.py",
        expose_value=False,
        callback=_run_plugins,
        help="A Python file that registers operators or rules (docs/extending.md). Repeatable.",
    )(command)


def _run_plugins(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    """Runs the files; their errors are ours."""
    if value and not ctx.resilient_parsing:
        from onnxcrp.plugins import load_plugin

        for path in value:
            load_plugin(path)


def runtime(command: F) -> F:
    """--provider, --threads and --memory-limit: how onnxruntime runs."""
    command = click.option(
        "--memory-limit",
        type=Bytes(),
        default="2GiB",
        show_default=True,
        help="What one run may take, roughly: more questions are cut into chunks.",
    )(command)
    command = click.option("--threads", type=click.IntRange(1), help="Threads of one run. Default: all cores.")(command)
    return provider(command)


def provider(command: F) -> F:
    """--provider."""
    return click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME",
        callback=_known_providers,
        help="onnxruntime's execution provider: cuda, cpu ... Repeatable, best first. Default: cuda if there is one.",
    )(command)


def _known_providers(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what the installed onnxruntime lacks, with the names that would be right."""
    if value:
        from onnxcrp.errors import RuntimeMissingError
        from onnxcrp.session import providers

        try:
            providers(value)
        except RuntimeMissingError as error:
            offered = re.findall(r"(\w+)ExecutionProvider", error.message)
            if not offered or any("cuda" in name.lower() for name in value):
                raise
            names = ", ".join(name.lower() for name in offered)
            raise RuntimeMissingError(error.message, hint=f"its short names: {names}") from None
    return value


def index(command: F) -> F:
    """INDEX, the folder of an index."""
    return click.argument("index", type=click.Path(file_okay=False))(command)


def layer(command: F) -> F:
    """--layer: one of an index."""
    return click.option("--layer", required=True, metavar="LAYER", help="A layer of the index.")(command)


def channels(command: F) -> F:
    """--channel: several of them."""
    return click.option(
        "-C",
        "--channel",
        "channels",
        required=True,
        multiple=True,
        metavar="C[,C...]",
        callback=_numbers,
        help="Channels of the layer, a group of reference samples each. Repeatable.",
    )(command)


def _numbers(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[int]:
    """`3,7` and `--channel 9` -> [3, 7, 9]."""
    try:
        return [int(part) for each in value for part in each.split(",")]
    except ValueError:
        raise click.BadParameter(f"{', '.join(value)}: channels are numbers, 3 or 3,7", ctx, param) from None


def criterion(command: F) -> F:
    """--criterion and --aggregate: which list of reference samples."""
    command = click.option(
        "--aggregate",
        type=click.Choice(["sum", "max"]),
        default="sum",
        show_default=True,
        help="Over the positions of the concept.",
    )(command)
    return click.option(
        "--criterion",
        type=click.Choice(["relmax", "actmax"]),
        default="relmax",
        show_default=True,
        help="Samples where the model uses the concept most, or that excite it most.",
    )(command)


def start(command: F) -> F:
    """--start: how the heatmaps of reference samples begin."""
    return click.option(
        "--start",
        type=click.Choice(["activation", "relevance"]),
        help="Heatmaps of reference samples begin at the concept's activation, or at its relevance for their class."
        "  [default: relevance for RelMax of layers that more than a ReLU reads, else activation]",
    )(command)


def styles(command: F) -> F:
    """--style: how reference samples are drawn."""
    return click.option(
        "--style",
        "styles",
        multiple=True,
        type=click.Choice(["full", "crop", "heatmap", "masked"]),
        help="Reference samples whole; cropped to what the strongest neuron sees; the concept's heatmap; dark (of"
        " signals pale) where that is weak. Repeatable.",
    )(command)


def of_class(command: F) -> F:
    """--class: one class only."""
    return click.option("--class", "cls", metavar="CLASS", help="Of this class, a number or a name.")(command)


def class_names(command: F) -> F:
    """--class-names: what classes are called."""
    return click.option(
        "--class-names",
        type=click.Path(),
        metavar="FILE",
        help="Class names: a line each, or .json or .csv.  [default: those of the preprocessing file]",
    )(command)


def moved_data(command: F) -> F:
    """--data: where it is now."""
    return click.option(
        "--data", multiple=True, metavar="[NAME=]PATH", help="Where the index' data lies now. Repeatable."
    )(command)


def moved(command: F) -> F:
    """--model and --data: where they are now."""
    return click.option("--model", type=click.Path(), help="Where the model lies now.")(moved_data(command))


def picture(command: F) -> F:
    """--out: the picture that is drawn."""
    return click.option(
        "-o", "--out", type=click.Path(dir_okay=False), help="The picture, .png or another that Pillow writes."
    )(command)


def as_json(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, for programs.")(command)


def quiet(command: F) -> F:
    """--quiet."""
    return click.option(
        "-q", "--quiet", is_flag=True, callback=_silence, help="No progress, no messages and no warnings."
    )(command)


def _silence(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Warnings are caught around every command, so this ends with it."""
    if value:
        warnings.simplefilter("ignore")
    return value


def given(ctx: click.Context, *names: str) -> list[str]:
    """Which of these parameters were written on the command line, as the options that they are."""
    written = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE]
    return [max(p.opts, key=len) for name in names for p in written if p.name == name]


def refuse_idle(ctx: click.Context, *names: str, without: str) -> None:
    """Usage error if one of these options was written, since it does nothing without another."""
    if written := given(ctx, *names):
        raise click.UsageError(f"{written[0]} does nothing without {without}.", ctx)
