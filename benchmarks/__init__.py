"""Benchmarks against more than torch: inference engines, published layers, other revisions of fastda."""
