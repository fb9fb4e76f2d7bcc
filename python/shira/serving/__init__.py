"""Adapters beside a live model: switched in place, or unfused for each row of a batch."""
