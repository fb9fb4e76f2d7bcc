"""Triton kernels. Importing a module of this folder imports triton; nothing here is imported before it is used."""
