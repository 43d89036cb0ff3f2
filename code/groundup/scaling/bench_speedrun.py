"""Benchmarks of a whole training: a known recipe's loss sooner, and a minute's best.

Here: `speedrun`, the time to the loss that nanoGPT's recipe for a CPU reaches with
transformers' GPT-2; `sixty`, the loss after a minute. Left out: what lies between the
two recipes (`speedrun_ladder`).
"""

import statistics
from dataclasses import replace

import torch

from groundup.bench import Claim, register
from groundup.scaling.speedrun import (
    FAST,
    MINUTE,
    Recipe,
    held_out_loss,
    joined_plays,
    speedrun,
)
from groundup.scaling.speedrun_ladder import KNOWN, known_recipe

SEEDS = (0, 1, 2)
SECONDS, GOAL = 60.0, 1.65  # of training; nats per byte to be reached


def _short(recipe: Recipe, steps: int) -> Recipe:
    warmup = min(recipe.schedule.warmup, steps)
    return replace(
        recipe, schedule=replace(recipe.schedule, steps=steps, warmup=warmup)
    )


def speedup(known: list[tuple[float, float]], ours: list[tuple[float, float]]) -> float:
    """Return the fastest known run's time over that of our slowest.

    Args:
        known, ours: seconds and loss of each run.

    Returns:
        0 if one of ours stays above the lowest loss of the known recipe.
    """
    goal = min(loss for _, loss in known)
    if not all(loss <= goal for _, loss in ours):
        return 0.0
    return min(seconds for seconds, _ in known) / max(seconds for seconds, _ in ours)


@register("speedrun")
def speedrun_bench(quick: bool) -> list[Claim]:
    """Train by both recipes, in turns; the loss is over the whole validation part."""
    train, validation = joined_plays()
    seeds, every = (SEEDS[:1], 64) if quick else (SEEDS, 1)
    known, fast = (_short(r, 5) for r in (KNOWN, FAST)) if quick else (KNOWN, FAST)
    print(f"{torch.get_num_threads()} threads")
    print(f"{'recipe':<8}{'seed':>5}{'updates':>9}{'seconds':>9}{'nats/byte':>11}")
    results: dict[str, list[tuple[float, float]]] = {"known": [], "ours": []}
    for seed in seeds:
        for name in results:
            if name == "known":
                run = known_recipe(train, seed, recipe=known)
            else:
                run = speedrun(fast, train, seed)
            loss = held_out_loss(run.model, validation, every=every)
            results[name].append((run.seconds, loss))
            print(
                f"{name:<8}{seed:>5}{run.n_updates:>9}{run.seconds:>9.2f}{loss:>11.4f}",
                flush=True,
            )
    detail = "; ".join(
        f"{name} {statistics.mean(s for s, _ in runs):.2f} s, "
        f"{max(loss for _, loss in runs):.3f} nats at most"
        for name, runs in results.items()
    )
    ratio = speedup(results["known"], results["ours"])
    return [
        Claim("time to the known recipe's loss, worst of 3 seeds", ratio, 15.0, detail)
    ]


@register("sixty")
def sixty(quick: bool) -> list[Claim]:
    """Train for a minute; the loss is over the whole validation part."""
    train, validation = joined_plays()
    seeds, every, seconds = (SEEDS[:1], 64, 3.0) if quick else (SEEDS, 1, SECONDS)
    losses = []
    print(f"{torch.get_num_threads()} threads")
    print(f"{'seed':>4}{'updates':>9}{'seconds':>9}{'nats/byte':>11}")
    for seed in seeds:
        run = speedrun(MINUTE, train, seed, seconds)
        losses.append(held_out_loss(run.model, validation, every=every))
        print(
            f"{seed:>4}{run.n_updates:>9}{run.seconds:>9.2f}{losses[-1]:>11.4f}",
            flush=True,
        )
    detail = f"{statistics.mean(losses):.3f} nats per byte, at most {max(losses):.3f}"
    return [
        Claim(
            f"{GOAL} nats / the loss after {SECONDS:.0f} s, worst of 3 seeds",
            GOAL / max(losses),
            1.0,
            detail,
        )
    ]
