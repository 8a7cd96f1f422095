"""The command line: one file per command, no logic. stdout is data, stderr messages, exit 0, 1 (error) or 2 (usage).

A command is imported when it is called, so that `onnxcrp --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from typing import Any

import click

from onnxcrp import __version__
from onnxcrp.cli import options
from onnxcrp.errors import OnnxcrpError

COMMANDS = {  # name, which is also the module -> what `onnxcrp --help` says
    "inspect": "What a model is: its layers, the rule each gets, what was rewritten, what is unsupported.",
    "explain": "Heatmaps of samples for targets, conditions and the most relevant concepts.",
    "compile": "Write the relevance model: one ONNX file that also outputs relevance.",
    "verify": "Check outputs, conservation and conditional sums of a model.",
    "bench": "How fast a model is explained on this machine, and where the time goes.",
}
EXAMPLE = "onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png --target top -o heatmap.png"


class Commands(click.Group):
    """The commands by name; the one place where an error of ours becomes a line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are needed."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"onnxcrp.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name for a typo."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" There are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """An example."""
        options.write_examples(formatter, [EXAMPLE])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table above, without importing what it names."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors and warnings are one line each."""
        try:
            from onnxcrp.result import ExplanationWarning

            with warnings.catch_warnings():
                warnings.simplefilter("always", ExplanationWarning)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except OnnxcrpError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of this package in a line of their own; those of others are not for users."""
    if category.__module__.startswith("onnxcrp"):
        click.echo(f"warning: {message}", err=True)


@click.command(
    cls=Commands,
    name="onnxcrp",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="onnxcrp")
def main() -> None:
    """Which pixels and which concepts made the model decide so: relevance propagation (LRP, CRP) for ONNX models."""
