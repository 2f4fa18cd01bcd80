"""What stands above the library: the command line, verification, benchmarks."""
