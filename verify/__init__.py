"""Proves that an exported language model computes what its checkpoint says, or says what went wrong."""
