"""The live model: its names, the users of a weight, who may write it."""
