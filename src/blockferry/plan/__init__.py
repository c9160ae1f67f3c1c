"""Deciding, purely: (request, observation) -> Plan, or a refusal that says why. Nothing here does anything."""
