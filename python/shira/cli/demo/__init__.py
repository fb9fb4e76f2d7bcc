"""The demonstration: a small byte-level Llama, its text, and two adapters trained on it."""
