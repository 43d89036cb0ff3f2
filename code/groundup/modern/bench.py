"""The benchmarks of Part 3; importing this module registers them."""

from groundup.modern import bench_attention, bench_decode, bench_training

__all__ = ["bench_attention", "bench_decode", "bench_training"]
