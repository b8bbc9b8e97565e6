"""Benchmarks: SafeLoader beside the stock class, on the user's own machine."""
