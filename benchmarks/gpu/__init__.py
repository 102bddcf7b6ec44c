"""What `linearize.benchmarks.gpu_check` checks and measures on a GPU."""
