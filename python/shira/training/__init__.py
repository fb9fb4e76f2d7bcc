"""Entries of live weights as parameters."""
