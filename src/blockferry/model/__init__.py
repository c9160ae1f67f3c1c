"""Frozen values and the rules that hold for them: no I/O, no event loop."""
