"""From a known recipe to the fast one, an ingredient at a time.

Here: nanoGPT's recipe for a CPU with transformers' GPT-2, the rungs from it to
`speedrun.FAST`, what was tried beside them, and the maker of the recording `speedrun`.
Left out: the figure. What is here decides the recording's numbers.

Source: nanoGPT's README and config/train_shakespeare_char.py for the sizes and rates of
the known recipe. Page: book/4-scaling/schedules.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from groundup.artifacts import remember
from groundup.foundations.fitting import N_BYTES
from groundup.makers import Config, register
from groundup.modern.decoder import DecoderConfig
from groundup.scaling.schedules import Schedule
from groundup.scaling.speedrun import (
    FAST,
    Recipe,
    Run,
    bare_loop,
    held_out_loss,
    joined_plays,
    speedrun,
)
from groundup.training.batching import Corpus

BETAS, CLIP = (0.9, 0.99), 1.0  # of the known recipe
# The known recipe; of `sizes` it takes the numbers, and the model is GPT-2.
KNOWN = Recipe(
    DecoderConfig(d_model=128, n_layers=4, n_heads=4, tied=False),
    Schedule(2000, warmup=100, shape="cosine", end=0.1),
    optimizer="adamw",
    lr=1e-3,
    batch=12,
    dtype="float32",
)


class GPT2(nn.Module):
    """Transformers' GPT-2 for bytes, without dropout; returns logits."""

    def __init__(self, sizes: DecoderConfig, context: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=N_BYTES,
                n_positions=context,
                n_embd=sizes.d_model,
                n_layer=sizes.n_layers,
                n_head=sizes.n_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.train()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next byte at every position."""
        return self.model(ids, use_cache=False).logits


class ClippedAdamW:
    """Torch's fused AdamW with clipping; matrices decay, vectors do not."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        parts = ([p for p in model.parameters() if (p.dim() >= 2) == m] for m in (1, 0))
        groups = [
            {"params": part, "weight_decay": decay}
            for part, decay in zip(parts, (0.1, 0.0), strict=True)
        ]
        self.inner = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
        self.parameters, self.lr = list(model.parameters()), lr

    def step(self, share: float) -> None:
        """Clip, then update every parameter."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group in self.inner.param_groups:
            group["lr"] = self.lr * share
        self.inner.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.inner.zero_grad()


def known_recipe(
    corpus: Corpus, seed: int, seconds: float | None = None, recipe: Recipe = KNOWN
) -> Run:
    """Train GPT-2 by the known recipe; arguments as for `speedrun.bare_loop`."""

    def make() -> tuple[nn.Module, ClippedAdamW]:
        model = GPT2(recipe.sizes, recipe.context)
        return model, ClippedAdamW(model, recipe.lr)

    return bare_loop(make, recipe, corpus, seed, seconds)


def in_tokens(recipe: Recipe, n_tokens: int) -> Recipe:
    """Return recipe for a run of n_tokens; its warm-up keeps its share of the run."""
    steps = round(n_tokens / (recipe.batch * recipe.context))
    warmup = round(recipe.schedule.warmup / recipe.schedule.steps * steps)
    return replace(
        recipe, schedule=replace(recipe.schedule, steps=steps, warmup=warmup)
    )


def rungs() -> dict[str, Recipe]:
    """Return the ladder: the known recipe, then one ingredient more a rung.

    The first is trained as GPT-2, all others as our decoder.
    """
    late = replace(FAST.schedule, steps=KNOWN.schedule.steps)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("known recipe", {}),
        ("modern decoder", {}),
        ("rate × 10", {"lr": 10 * KNOWN.lr}),
        ("Muon", {"optimizer": "muon", "lr": FAST.lr, "muon_lr": FAST.muon_lr}),
        ("bfloat16", {"dtype": "bfloat16"}),
        ("late fall to 0", {"schedule": late}),
        ("tables of n-grams", {"orders": FAST.orders, "n_rows": FAST.n_rows}),
        ("one block, width 64", {"sizes": FAST.sizes}),
        ("batch × 4", {"batch": FAST.batch}),
    ]
    ladder, recipe = {}, KNOWN
    for name, changes in steps:
        recipe = ladder[name] = replace(recipe, **changes)
    return ladder


def beside() -> dict[str, Recipe]:
    """Return the last rung with one thing changed: what was tried, or taken back."""
    last = rungs()["batch × 4"]
    late = last.schedule
    return {
        "outputs start at 0": replace(last, quiet=True),
        "warm-up of 10 %": replace(last, schedule=replace(late, warmup=200)),
        "cosine to 10 %": replace(last, schedule=KNOWN.schedule),
        "AdamW, not Muon": replace(last, optimizer="adamw"),
        "float32": replace(last, dtype="float32"),
        "bigrams only": replace(last, orders=(2,)),
        "no tables": replace(last, orders=()),
        "width 128": replace(last, sizes=replace(last.sizes, d_model=128, n_heads=4)),
    }


CONFIG = {
    "n_tokens": 122_880,  # of a run at equal tokens
    "seconds": 3.0,  # of a run at equal time
    "seeds": [0, 1, 2],
    "every": 16,  # of the validation windows, one in so many is read
}


def measure(config: Config) -> Mapping[str, Any]:
    """Train one rung for one seed, at equal tokens and at equal time.

    Returns:
        `result`: losses in nats per byte, seconds and updates of both runs.
    """
    name, seed, every = config["name"], config["seed"], config["every"]
    recipe = (rungs() | beside())[name]
    train, validation = joined_plays()
    result = {}
    for kind, recipe_now, seconds in (
        ("tokens", in_tokens(recipe, config["n_tokens"]), None),
        ("time", recipe, config["seconds"]),
    ):
        if name == "known recipe":
            run = known_recipe(train, seed, seconds, recipe_now)
        else:
            run = speedrun(recipe_now, train, seed, seconds)
        result[kind] = {
            "loss": held_out_loss(run.model, validation, every=every),
            "seconds": run.seconds,
            "updates": run.n_updates,
        }
    return {"result": result}


USES = (
    "groundup.modern.decoder",
    "groundup.scaling.gram_tables",
    "groundup.scaling.muon",
    "groundup.scaling.speedrun",
)


@register("speedrun", uses=USES, small=CONFIG)
def make_ladder(config: Config) -> Mapping[str, Any]:
    """Train all rungs and what stands beside them, over the seeds.

    Returns:
        `rungs` and `beside`: a list of {name, runs}, a run a seed; see `measure`.
    """
    common = {key: config[key] for key in ("n_tokens", "seconds", "every")}

    def runs(name: str) -> dict[str, Any]:
        pieces = [
            remember(measure, common | {"name": name, "seed": seed}, USES)["result"]
            for seed in config["seeds"]
        ]
        return {"name": name, "runs": pieces}

    return {
        "rungs": [runs(name) for name in rungs()],
        "beside": [runs(name) for name in beside()],
    }
