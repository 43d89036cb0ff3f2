"""A run that is really killed (SIGKILL) at random moments, and goes on bit for bit.

The file is its own worker: run as a script it imports torch once and forks a process
for every life of a run, because an import takes longer than a life.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

N_KILLS, N_STEPS = 20, 150
MOST_UPDATES = 6  # of a life, before the random rest


def model():
    """A decoder that also draws from torch's global generator, through dropout."""
    import torch

    from groundup.modern.decoder import Decoder, DecoderConfig

    class Noisy(Decoder):
        def embed_tokens(self, ids, positions):
            x = super().embed_tokens(ids, positions)
            return torch.nn.functional.dropout(x, 0.1, self.training)

    torch.manual_seed(0)
    return Noisy(DecoderConfig(n_vocab=32, d_model=16, n_layers=1, n_heads=2))


def live(folder, optimizer, keep):
    """Train from whatever is in folder to the end, in this process."""
    import numpy as np
    import torch

    from groundup.scaling.recipe import TrainerConfig, Watch
    from groundup.scaling.schedules import Schedule
    from groundup.scaling.trainer import fit
    from groundup.training.batching import Corpus

    random.seed(2)  # a fork gets a new state; a run begins with seeds
    np.random.seed(2)  # noqa: NPY002
    drawn = torch.randint(32, (4000,), generator=torch.Generator().manual_seed(1))
    config = TrainerConfig(
        schedule=Schedule(N_STEPS, warmup=20),
        batch=4,
        context=8,
        micro_batches=2,
        optimizer=optimizer,
    )
    fit(
        model(),
        Corpus.of([drawn[:3500]]),
        config,
        validation=Corpus.of([drawn[3500:]]),
        watch=Watch(eval_every=7, eval_windows=8, save_every=1, keep=keep),
        folder=folder,
    )


def fork(*args):
    """Start a life; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        live(*args)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def step_now(folder):
    found = [int(p.name[5:11]) for p in folder.glob("step-*")]
    return max(found, default=0)


def same(a, b):
    """Tell whether two checkpoints agree in every bit and every word."""
    import torch

    def bits(tensor):
        return tensor.reshape(-1).view(torch.uint8)

    return (
        (a.step, a.meta) == (b.step, b.meta)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(bits(a.tensors[n]), bits(b.tensors[n])) for n in a.tensors)
    )


def herd(root, optimizer, seed):
    """Yield one record per kill, and one for the end; all kills are in one run."""
    import torch

    import groundup.scaling.trainer  # noqa: F401, before the forks
    from groundup.scaling.checkpointing import latest, load

    torch.set_num_threads(1)
    whole, killed = root / "whole", root / "killed"
    began = time.monotonic()
    pid = fork(whole, optimizer, N_STEPS)
    assert os.waitpid(pid, 0)[1] == 0
    each = (time.monotonic() - began) / N_STEPS
    generator = random.Random(seed)
    for kill in range(N_KILLS):
        start = step_now(killed)
        pid = fork(killed, optimizer, 2)
        until = start + generator.randint(0, MOST_UPDATES)
        while step_now(killed) < until and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(each / 20)
        time.sleep(generator.uniform(0, 2 * each))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        names = [p.name for p in killed.glob("*")] if killed.exists() else []
        path = latest(killed)
        found = None if path is None else load(path)
        yield {
            "kill": kill + 1,
            "died_of": os.WTERMSIG(status),
            "saving": any(name.startswith(".part") for name in names),
            "from": start,
            "step": found.step if found else 0,
            "same": found is None or same(found, load(whole / path.name)),
        }
    pid = fork(killed, optimizer, 2)
    assert os.waitpid(pid, 0)[1] == 0
    ends = [load(latest(folder)) for folder in (whole, killed)]
    best = [load(latest(folder / "best")) for folder in (whole, killed)]
    yield {
        "steps": [end.step for end in ends],
        "losses": [end.tensors["history/losses"].tolist() for end in ends],
        "same": same(*ends) and same(*best),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_twenty_times_and_the_same_in_every_bit(tmp_path, optimizer):
    """Weights, optimizer, losses, generators, validation: after each kill and at last.

    Where a kill falls depends on the machine; what is asserted must hold anywhere.
    """
    command = [sys.executable, __file__, str(tmp_path), optimizer, "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *kills, end = map(json.loads, done.stdout.splitlines())
    for record in kills:
        assert record["died_of"] == signal.SIGKILL, record
        assert record["same"], record
        assert record["from"] <= record["step"], record  # no kill loses a checkpoint
    assert end["same"]
    assert end["steps"] == [N_STEPS, N_STEPS]
    whole, killed = end["losses"]
    assert whole == killed
    assert len(whole) == N_STEPS
    n_saving = sum(record["saving"] for record in kills)
    print(f"{len(kills)} of {N_KILLS} kills, {n_saving} in the middle of a save")
    assert len(kills) == N_KILLS


if __name__ == "__main__":
    for found in herd(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])):
        print(json.dumps(found), flush=True)
