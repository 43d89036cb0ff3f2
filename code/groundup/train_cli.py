"""`groundup train` and `groundup sample`: the two commands that need torch.

Here: their parameters, and what they print. Left out: everything they do; see
`scaling.runs`. `cli` imports this module only when one of the two is asked for, so that
the other commands start at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from groundup.scaling.distributed import process_group
from groundup.scaling.runs import (
    PRESETS,
    DecoderRun,
    GPTRun,
    continue_text,
    load_run,
    train_run,
)
from groundup.training.sampling import SamplingConfig

Preset = Annotated[
    Annotated[GPTRun, tyro.conf.subcommand("gpt-tiny", default=PRESETS["gpt-tiny"])]
    | Annotated[
        DecoderRun, tyro.conf.subcommand("modern-tiny", default=PRESETS["modern-tiny"])
    ],
    tyro.conf.arg(name=""),
]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
How = Literal["none", "ddp", "fsdp"]
NewFolder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
RunFolder = Annotated[
    tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")
]


def train(
    run: Preset,
    *,
    text: File = None,
    out: NewFolder = Path("out/run"),
    how: How = "none",
) -> int:
    """Train a small model in a folder that holds all that comes out of it.

    The folder gets the config, the metrics (JSON lines and TensorBoard), checkpoints,
    the weights (safetensors) and a sample. Ctrl-C saves and ends; the same command goes
    on. `groundup train PRESET --help` lists every field of a preset that can be
    changed. Several processes: `torchrun --nproc-per-node 2 -m groundup train ...`.

    Args:
        text: Train on this UTF-8 file; by default on the plays of Shakespeare.
        out: Where the run goes; new, or of the same run, begun and not finished.
        how: Under torchrun: ddp keeps a copy of the model in each process, fsdp cuts it
            into shards.
    """
    words = None if text is None else text.read_text(encoding="utf-8")
    with process_group() as world:
        history = train_run(run, out, words, how=how, progress=sys.stderr.isatty())
    if world.first:
        print(
            f"trained {len(history.losses)} updates; best validation loss "
            f"{history.best_loss:.4f} nats per byte after {history.best_step}; "
            f"the run is in {out}"
        )
    return 0


def sample(
    folder: RunFolder,
    *,
    prompt: str = "\n",
    n_new: int = 300,
    seed: int = 0,
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig(),  # noqa: B008
) -> int:
    """Let a trained model write.

    Args:
        folder: What `groundup train` left.
        prompt: The text to go on from.
        n_new: Bytes to add.
        seed: Another seed, another text.
    """
    text = continue_text(load_run(folder), prompt, n_new, sampling, seed)
    print(prompt + text)
    return 0
