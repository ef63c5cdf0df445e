"""How single vectors of a key-value cache become codes, and what codes stand for: one file a family."""
