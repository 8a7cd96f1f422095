"""Commands run in this process, as a shell would see them."""

from __future__ import annotations

from click.testing import CliRunner, Result

from onnxcrp.cli import main


def run(*arguments: object) -> Result:
    """Exit code and streams; what is no exit is raised."""
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="onnxcrp")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object) -> Result:
    """The same for a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result
