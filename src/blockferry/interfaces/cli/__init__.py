"""The command: a thin client of the host process. Standard library and click only, on the way that every verb takes."""
