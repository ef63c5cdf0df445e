"""Finding where a candidate goes wrong: what is free to look at, what tracing adds, and what each value ought to be."""
