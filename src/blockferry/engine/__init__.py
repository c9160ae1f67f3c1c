"""Carrying plans out: intent, command, observe, outcome; and settling what was interrupted."""
