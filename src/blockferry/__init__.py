"""blockferry."""
