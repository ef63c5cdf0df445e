"""Proves that an exported language model computes what its checkpoint says, token for token, or says what went wrong."""
