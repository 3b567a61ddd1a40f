"""What `entropy-po bench` and the suites in `benchmarks/` measure with: problems, their fp64 truth and floors, the peers."""
