"""The command line: one file a verb, from its options to its report."""
