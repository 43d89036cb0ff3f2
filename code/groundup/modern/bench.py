"""The benchmarks of Part 3; importing this module registers them."""

from groundup.modern import (
    bench_attention,
    bench_decode,
    bench_loss,
    bench_train_step,
)

__all__ = ["bench_attention", "bench_decode", "bench_loss", "bench_train_step"]
