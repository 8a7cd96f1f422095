"""The command line: one file per command, no logic. stdout is data, stderr messages, exit 0, 1 (error) or 2 (usage).

A command is imported when it is called, so that `onnxcrp --help` answers at once.
"""

from __future__ import annotations

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
    "index": "Reference samples and statistics of all concepts over a dataset: build, merge, show, stats, compare.",
    "concepts": "One prediction in concepts: heatmap, reference samples and share of each, in one picture.",
    "bench": "How fast a model is explained on this machine, and where the time goes.",
}
EXAMPLE = "onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png --target top -o heatmap.png"


class Commands(options.Group):
    """The commands by name; the one place where an error of ours becomes a line on stderr."""

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
    package="onnxcrp.cli",
    table=COMMANDS,
    examples=[EXAMPLE],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="onnxcrp")
def main() -> None:
    """Which pixels and which concepts made the model decide so: relevance propagation (LRP, CRP) for ONNX models."""
