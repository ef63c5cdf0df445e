"""What each way of decoding is worth here: with and without a cache, alone and in batches, on each engine."""
