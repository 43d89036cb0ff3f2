"""The benchmarks of Part 4; importing this module registers them."""

from groundup.scaling import bench_bpe, bench_speedrun, bench_trainer

__all__ = ["bench_bpe", "bench_speedrun", "bench_trainer"]
