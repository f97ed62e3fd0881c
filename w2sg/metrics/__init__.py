"""Numbers of results: accuracy, PGR, intervals, tests, theory; tensors and arrays in, numbers out."""
