"""What the documentation shows of the program's own."""
