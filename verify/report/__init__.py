"""Reports: one result, shown on a console or written as JSON. Nothing here computes or runs anything."""
