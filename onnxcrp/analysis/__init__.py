"""What stands on the explainer: checks and studies of relevance, as library functions that return plain dataclasses."""
