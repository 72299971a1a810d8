"""Keeps derived tables in PostgreSQL fresh, per tenant."""

__version__ = "0.1.0"
