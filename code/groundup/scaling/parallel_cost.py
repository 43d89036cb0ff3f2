"""What it takes to train a model on many GPUs: memory, bytes sent, seconds.

Here: sizes of a GPT, the ways to spread it over GPUs, and for each of them the bytes
that a GPU holds and sends in one update and the time of the parts of that update. All
of it is arithmetic; nothing is run. Left out: latency, stragglers, buffers of the
libraries and fragmented memory, parallelism along the context.

Sources: Rajbhandari et al. (2020), sections 3 and 5 (states, ZeRO); Narayanan et al.
(2021), eq. 2 and 3 and section 3.2 (sizes, FLOP, tensor and pipeline traffic);
Korthikanti et al. (2023), eq. 1 to 6 (activations). Page:
book/4-scaling/distributed.md.
"""

from dataclasses import dataclass, field

from groundup.scaling.traffic import ring_bytes

PARAMETER, GRADIENT = 2, 2  # bytes, in 16 bits
STATES = 12  # bytes: 32-bit parameter and two moments; Rajbhandari et al., section 3.1
ACTIVATION = 2  # bytes of one number
RECOMPUTE = ("none", "attention", "all")


@dataclass(frozen=True)
class Sizes:
    """A transformer with biases and learned positions, or one with experts.

    Raises:
        ValueError: a size is not positive, or more experts are chosen than there are.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_vocab: int = 51_200
    context: int = 2048
    n_experts: int = 1  # copies of every feed-forward layer
    n_chosen: int = 1  # of them for a token

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.n_chosen > self.n_experts:
            raise ValueError(
                f"n_chosen must be at most n_experts={self.n_experts}; "
                f"got {self.n_chosen}"
            )

    @property
    def n_expert_parameters(self) -> int:
        """Parameters of all feed-forward layers: 8 C² + 5 C each."""
        c = self.d_model
        return self.n_layers * self.n_experts * (8 * c * c + 5 * c)

    @property
    def n_parameters(self) -> int:
        """All parameters; without experts Narayanan et al. (2021), eq. 2."""
        c = self.d_model
        rest = self.n_layers * (4 * c * c + 8 * c) + (self.n_vocab + self.context) * c
        routers = self.n_layers * c * self.n_experts if self.n_experts > 1 else 0
        return rest + routers + self.n_expert_parameters

    def flop(self, batch: int, *, passes: int = 3) -> int:
        """Return the FLOP of the matrix products of one update.

        Narayanan et al. (2021), eq. 3, which counts the scores that the mask hides too.

        Args:
            batch: sequences.
            passes: 3: forward and backward, which is twice the work; 4: with the
                forward pass of the layers done twice.
        """
        tokens, c = batch * self.context, self.d_model
        layer = 8 * c * c + 16 * c * c * self.n_chosen + 4 * self.context * c
        return tokens * (passes * self.n_layers * layer + 3 * 2 * c * self.n_vocab)


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes; a link is used in both directions at once.

    Raises:
        ValueError: a number is not positive.
    """

    flops: float  # FLOP/s of a GPU's 16-bit products, at best
    memory: float = 80e9  # bytes of a GPU
    per_node: int = 8  # GPUs
    inside: float = 300e9  # bytes/s that a GPU sends to others in its node
    between: float = 25e9  # bytes/s that a GPU sends to other nodes

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")


# Narayanan et al. (2021), section 5: 312 TFLOP/s, 80 GB, 8 links of 200 Gbit/s a node.
# Inside a node half of what the maker's data sheets give for both directions together.
A100 = Cluster(312e12)


@dataclass(frozen=True)
class Plan:
    """How a model and its batch are spread over data * tensor * pipeline GPUs.

    Raises:
        ValueError: a number is out of range, or one does not divide another.
    """

    batch: int  # sequences an update, over all GPUs
    data: int = 1  # copies of the model that read different sequences
    tensor: int = 1  # GPUs that share every matrix
    pipeline: int = 1  # groups of consecutive layers
    expert: int = 1  # of the copies, how many share one set of experts
    zero: int = 0  # shared by the copies: 1 states, 2 gradients too, 3 parameters too
    micro_batch: int = 1  # sequences at a time
    chunks: int = 1  # groups of layers a pipeline stage has (interleaved schedule)
    recompute: str = "none"  # activations made again: none, attention, all
    n_micro_batches: int = field(init=False)  # in one update, of one copy

    def __post_init__(self) -> None:
        for name in ("batch", "data", "tensor", "pipeline", "expert", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}"
                )
        if self.chunks < 1 or (self.chunks > 1 and self.pipeline == 1):
            raise ValueError(
                f"chunks must be 1, or more in a pipeline; got {self.chunks}"
            )
        if self.zero not in range(4):
            raise ValueError(f"zero must be 0, 1, 2 or 3; got {self.zero}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(
                f"recompute must be one of {', '.join(RECOMPUTE)}; "
                f"got {self.recompute!r}"
            )
        if self.data % self.expert:
            raise ValueError(f"expert must divide data={self.data}; got {self.expert}")
        if self.batch % (self.data * self.micro_batch):
            raise ValueError(
                f"batch must be a multiple of data * micro_batch="
                f"{self.data * self.micro_batch}; got {self.batch}"
            )
        n = self.batch // (self.data * self.micro_batch)
        object.__setattr__(self, "n_micro_batches", n)

    @property
    def n_gpus(self) -> int:
        """GPUs in all."""
        return self.data * self.tensor * self.pipeline


def state_bytes(
    n_parameters: float | int, data: int = 1, zero: int = 0
) -> dict[str, float]:
    """Return the bytes of parameters, gradients and optimizer states on one GPU.

    Args:
        n_parameters: on this GPU before ZeRO shares them.
        data: GPUs that share.
        zero: what is shared; see `Plan`.

    Source: Rajbhandari et al. (2020), figure 1. Example: 7.5e9 parameters, 64 GPUs: 120
    GB in all, with zero=1 31.4 GB, with 2 16.6 GB, with 3 1.9 GB.
    """
    return {
        "parameters": PARAMETER * n_parameters / (data if zero >= 3 else 1),
        "gradients": GRADIENT * n_parameters / (data if zero >= 2 else 1),
        "optimizer": STATES * n_parameters / (data if zero >= 1 else 1),
    }


def activation_bytes(model: Sizes, plan: Plan) -> float:
    """Return the bytes of the activations that the fullest GPU keeps for backward.

    For each layer and token, in 16 bits and with dropout's masks: C (34 + 5 H T / C)
    bytes, 19 C of them in the feed-forward layer, which a token with several experts
    has several times; without 5 H T if the scores are recomputed; 2 C if the input of
    the layer alone is kept. All is shared along `tensor`, norms too (sequence
    parallelism). The first stage of a pipeline keeps a micro-batch for each stage. The
    logits are not counted.

    Source: Korthikanti et al. (2023), eq. 1, 4, 5 and 6.
    """
    tokens = plan.micro_batch * model.context
    scores = 5 * model.n_heads * model.context / model.d_model
    linear = 15 + 19 * model.n_chosen
    factor = {"none": linear + scores, "attention": linear, "all": 2}[plan.recompute]
    layers = model.n_layers / plan.pipeline
    in_flight = min(plan.pipeline, plan.n_micro_batches)
    if plan.chunks > 1:  # the interleaved schedule starts more of them
        in_flight *= 1 + (plan.pipeline - 1) / (plan.pipeline * plan.chunks)
    whole = tokens * model.d_model * factor * layers * in_flight / plan.tensor
    if plan.recompute == "all":  # the layer that is being made again
        whole += tokens * model.d_model * (linear + scores) / plan.tensor
    return whole


def gpu_parameters(model: Sizes, plan: Plan) -> tuple[float, float]:
    """Return the parameters of one GPU before ZeRO: of experts, and all others."""
    shared = plan.tensor * plan.pipeline
    experts = 0.0
    dense = model.n_parameters / shared
    if model.n_experts > 1:
        experts = model.n_expert_parameters / shared / plan.expert
        dense -= model.n_expert_parameters / shared
    return experts, dense


def memory(model: Sizes, plan: Plan) -> dict[str, float]:
    """Return the bytes on one GPU: parameters, gradients, optimizer, activations.

    With zero=3 the parameters of one layer are there whole. Layers and heads are shared
    out as if their numbers always divided.
    """
    experts, dense = gpu_parameters(model, plan)
    parts = state_bytes(dense, plan.data, plan.zero)
    for name, size in state_bytes(experts, plan.data // plan.expert, plan.zero).items():
        parts[name] += size
    if plan.zero == 3:
        parts["parameters"] += (
            PARAMETER * (dense + experts) * plan.pipeline / model.n_layers
        )
    return {**parts, "activations": activation_bytes(model, plan)}


def bubble(plan: Plan) -> float:
    """Return the idle time of a pipeline over its busy time.

    (stages - 1) / (chunks * micro-batches): Narayanan et al. (2021), section 2.2.
    """
    return (plan.pipeline - 1) / (plan.chunks * plan.n_micro_batches)


def sent_bytes(model: Sizes, plan: Plan) -> dict[str, float]:
    """Return the bytes that one GPU sends in one update, by what for.

    "data": gradients are reduced and scattered, once, or for every micro-batch where no
    GPU keeps them whole (zero=2 and 3); then gradients (zero=0) or new parameters (1
    and 2) are gathered once, or parameters for every micro-batch, forward and backward
    (3). "tensor": four all-reduces of the activations of
    every layer and micro-batch, six if all is recomputed. "pipeline": activations
    forward, their gradients backward, at every border of a chunk; each of the GPUs
    along `tensor` sends its part. "expert": every token to its experts and back, in
    the forward pass and the backward.

    Source: Rajbhandari et al. (2020), section 7; Narayanan et al. (2021), sections 3.2
    and 4.1; Lepikhin et al. (2021), section 3.2 (experts).
    """
    tokens = plan.micro_batch * model.context
    stream = ACTIVATION * tokens * model.d_model * plan.n_micro_batches
    layers = model.n_layers / plan.pipeline
    passes = 6 if plan.recompute == "all" else 4
    experts, dense = gpu_parameters(model, plan)
    scatters = plan.n_micro_batches if plan.zero >= 2 else 1
    gathers = 2 * plan.n_micro_batches if plan.zero == 3 else 1
    data = 0.0
    for n, copies in ((dense, plan.data), (experts, plan.data // plan.expert)):
        # An all-reduce is one of each, and parameters are as large as gradients.
        data += scatters * ring_bytes("reduce-scatter", GRADIENT * n, copies)
        data += gathers * ring_bytes("all-gather", PARAMETER * n, copies)
    borders = 2 * plan.chunks if plan.pipeline > 1 else 0
    away = (plan.expert - 1) / plan.expert if model.n_experts > 1 else 0.0
    turns = passes * model.n_chosen / plan.tensor
    return {
        "data": data,
        "tensor": passes * layers * ring_bytes("all-reduce", stream, plan.tensor),
        "pipeline": borders * stream / plan.tensor,
        "expert": turns * layers * stream * away,
    }


def seconds(
    model: Sizes, plan: Plan, cluster: Cluster, *, efficiency: float = 0.6
) -> dict[str, float]:
    """Return the seconds of the parts of one update, as if none overlapped.

    Tensor traffic stays in the node where `tensor` fits into one; the rest goes between
    nodes, unless all GPUs are in one.

    Args:
        model, plan, cluster: what runs where.
        efficiency: share of the peak rate that the matrix products reach by themselves.

    Returns:
        "compute", "bubble", and a time for each kind of `sent_bytes`.
    """
    flop = model.flop(plan.batch, passes=4 if plan.recompute == "all" else 3)
    if plan.recompute == "attention":  # the two products of the scores
        tokens = plan.batch * model.context
        flop += tokens * model.n_layers * 4 * model.context * model.d_model
    compute = flop / (plan.n_gpus * cluster.flops * efficiency)
    sent = sent_bytes(model, plan)
    near = plan.n_gpus <= cluster.per_node
    rates = dict.fromkeys(sent, cluster.inside if near else cluster.between)
    if plan.tensor <= cluster.per_node:
        rates["tensor"] = cluster.inside
    times = {name: size / rates[name] for name, size in sent.items()}
    return {"compute": compute, "bubble": bubble(plan) * compute, **times}
