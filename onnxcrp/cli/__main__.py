"""`python -m onnxcrp.cli`."""

from onnxcrp.cli import main

main(prog_name="onnxcrp")
