"""What was intended and what came of it, on disk before anything depends on it."""
