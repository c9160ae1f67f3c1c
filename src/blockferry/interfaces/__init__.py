"""The ways in: HTTP, the command, the host process. They translate, and decide nothing."""
