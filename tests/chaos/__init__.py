"""Faults at random against several replicas under load: `make chaos`."""
