"""Which mistake reproduces what a candidate gave: the reference as if a mistake were in it, and the search for one."""
