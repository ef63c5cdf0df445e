"""Processes for work that may crash, hang, leak or print."""
