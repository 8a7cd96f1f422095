"""`python -m onnxcrp` is the command `onnxcrp`."""

from onnxcrp.cli import main

main(prog_name="onnxcrp")
