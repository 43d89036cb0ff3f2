"""From text to assistant with a table: the four stages of this book in miniature.

Here: a language model that is one table of logits over windows of three bytes;
pretraining and fine-tuning as maximum likelihood on that table; a reward model for
pairs of answers; the exact gradient of expected reward under a KL penalty, and the
best value that any policy can reach. A stand-in for the human judge is here too.

Left out: everything that needs more than two bytes of context (Part 1), chat
formats with turns and roles (Part 6), and the sampled gradients, value networks and
clipping of the real thing (Parts 8 and 9).

Sources: Shannon (1948), section 3, for the table; Bradley and Terry (1952) for pairs;
Ziegler et al. (2019), equation 2, for the penalised reward; Rafailov et al. (2023),
equation 4, for its optimum. Page: book/0-foundations/pipeline.md.

It is longer than other modules, since it holds four of them in miniature.

Axes: `V V V` has an entry for each window (a, b, x): two bytes of context, then the
byte to predict. `M` features, `N` bytes, windows, answers or pairs.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

STX, ETX = "\x02", "\x03"  # ASCII 2 and 3, "start of text" and "end of text"
FEATURES = ("bytes", "spaces", "capitals", "! or ?", "sir", "final stop")


@dataclass(frozen=True)
class Task:
    """A prompt, and which continuations of it are possible.

    A continuation ends with ETX, or without it after `longest` bytes.
    """

    prompt: str  # two bytes or more; the table reads the last two
    alphabet: str  # every byte that can be written, ETX among them
    longest: int  # bytes

    def __post_init__(self) -> None:
        """Refuse a task that has no answers."""
        if len(self.prompt) < 2:
            raise ValueError(f"prompt must have two bytes, got {self.prompt!r}")
        if ETX not in self.alphabet:
            raise ValueError(f"alphabet must hold ETX, got {self.alphabet!r}")
        if self.longest < 1:
            raise ValueError(f"longest must be 1 or more, got {self.longest}")

    @property
    def start(self) -> tuple[int, int]:
        """The context that the first byte of every answer is drawn from."""
        a, b = encode(self.prompt[-2:], self.alphabet).tolist()
        return a, b

    @property
    def end(self) -> int:
        """The symbol that ends an answer."""
        return self.alphabet.index(ETX)


def encode(text: str, alphabet: str) -> Int[Tensor, "N"]:
    """Return the place in alphabet of each byte of an ASCII text.

    Raises:
        ValueError: the text holds a character that the alphabet lacks.

    Example: `encode("abba", "ab")` is `tensor([0, 1, 1, 0])`.
    """
    if strange := sorted(set(text) - set(alphabet)):
        raise ValueError(f"text holds {strange}, expected only {alphabet!r}")
    place = np.zeros(128, dtype=np.int64)
    place[np.frombuffer(alphabet.encode("ascii"), np.uint8)] = range(len(alphabet))
    return torch.from_numpy(place[np.frombuffer(text.encode("ascii"), np.uint8)])


def windows(text: str, alphabet: str) -> Int[Tensor, "N 3"]:
    """Return every three neighbouring bytes (a, b, x) of a text, in order.

    For a prompt that ends in STX, the windows of `prompt[-2:] + answer` predict every
    byte of the answer and no byte of the prompt.

    Raises:
        ValueError: the text is shorter than three bytes.
    """
    if len(text) < 3:
        raise ValueError(f"text must have three bytes or more, got {text!r}")
    return encode(text, alphabet).unfold(0, 3, 1)


def count(found: Int[Tensor, "N 3"], n_symbols: int) -> Float[Tensor, "V V V"]:
    """Count how often each window was found, in float64."""
    flat = (found[:, 0] * n_symbols + found[:, 1]) * n_symbols + found[:, 2]
    return torch.bincount(flat, minlength=n_symbols**3).double().view(3 * [n_symbols])


def dialogues(play: str, longest: int = 40) -> list[tuple[str, str]]:
    """Return (question, answer) for speeches that end in a question mark.

    Args:
        play: text in the form of `groundup.foundations.shakespeare`.
        longest: bytes that the answer, which is on one line, may have.
    """
    speeches = [block.partition(":\n")[2] for block in play.split("\n\n")]
    return [
        (question, answer)
        for question, answer in pairwise(speeches)
        if question.endswith("?") and 0 < len(answer) <= longest and "\n" not in answer
    ]


def smoothed_logp(
    counts: Float[Tensor, "V V V"], strength: float = 10.0
) -> Float[Tensor, "V V V"]:
    """Return log-probabilities from counts; a row with few counts borrows.

    Each row gets `strength` extra observations, shared out as the table with one byte
    less of context predicts; that table borrows from the next, down to the uniform
    one. The rows are the exact maximum likelihood for the counts plus the extras.
    """
    levels = [counts, counts.sum(0), counts.sum((0, 1))]
    p = torch.full_like(levels[-1], 1 / len(counts))
    for n in reversed(levels):
        p = (n + strength * p) / (n.sum(-1, keepdim=True) + strength)
    return p.log()


def cross_entropy(
    logits: Float[Tensor, "*context V"], counts: Float[Tensor, "*context V"]
) -> Float[Tensor, ""]:
    """Return the mean of -ln p over all counted windows, in nats per byte."""
    return -(counts * logits.log_softmax(-1)).sum() / counts.sum()


def cross_entropy_gradient(
    logits: Float[Tensor, "*context V"], counts: Float[Tensor, "*context V"]
) -> Float[Tensor, "*context V"]:
    """Return the derivative of `cross_entropy` by each logit: predicted minus seen.

    Row c is (n_c p(x|c) - n_cx) / N: zero where the probabilities are the shares.
    """
    expected = counts.sum(-1, keepdim=True) * logits.softmax(-1)
    return (expected - counts) / counts.sum()


def sample(
    logits: Float[Tensor, "V V V"],
    task: Task,
    n: int,
    generator: torch.Generator,
) -> list[str]:
    """Draw n answers byte by byte; one that finished carries its ETX."""
    p = logits.softmax(-1)
    a, b = torch.tensor(task.start).repeat(n, 1).T
    drawn = []
    for _ in range(task.longest):
        a, b = b, torch.multinomial(p[a, b], 1, generator=generator)[:, 0]
        drawn.append(b)
    rows = torch.stack(drawn, 1).tolist()
    texts = ["".join(task.alphabet[i] for i in row) for row in rows]
    return [text[: text.find(ETX) + 1] if ETX in text else text for text in texts]


def judge(answer: str, known: frozenset[str]) -> float:
    """Score an answer as a reader would: the quality that we really want.

    Four points for the share of words that are known and said for the first time, two
    for the word "sir", one for a full stop at the end, minus 0.1 a byte over thirty.
    """
    words = re.findall(r"[a-z']+", answer.lower())
    share = len(known & set(words)) / max(1, len(words))
    courteous, stopped = "sir" in words, answer.endswith("." + ETX)
    return 4 * share + 2 * courteous + stopped - 0.1 * max(0, len(answer) - 30)


def window_features(alphabet: str) -> Float[Tensor, "M V V V"]:
    """Return, for each of FEATURES, the windows in which it is counted (0 or 1).

    A feature of an answer is its sum over the answer's windows, so all that a reward
    model over these features sees of a text is what fits into three bytes.
    """
    no_end = alphabet.replace(ETX, "")
    kinds = (
        (alphabet, alphabet, no_end),
        (alphabet, alphabet, " \n"),
        (alphabet, alphabet, ascii_uppercase),
        (alphabet, alphabet, "!?"),
        ("sS", "iI", "rR"),
        (alphabet, ".", ETX),
    )

    def among(symbols: str) -> Float[Tensor, "V"]:
        return torch.tensor([float(c in symbols) for c in alphabet])

    return torch.stack(
        [torch.einsum("a,b,x->abx", *map(among, kind)) for kind in kinds]
    )


def total(
    score: Float[Tensor, "*M V V V"], answers: list[str], task: Task
) -> Float[Tensor, "N *M"]:
    """Sum a score of windows, or several at once, over each answer's windows."""
    rows = []
    for answer in answers:
        a, b, x = windows(task.prompt[-2:] + answer, task.alphabet).T
        rows.append(score[..., a, b, x].sum(-1))
    return torch.stack(rows)


def fit_reward(
    difference: Float[Tensor, "N M"], *, ridge: float = 1e-3, steps: int = 1000
) -> Float[Tensor, "M"]:
    """Fit Bradley-Terry weights w to pairs of answers.

    The model is P(chosen beats rejected) = sigmoid(w . difference). The loss is the
    mean of -ln P, plus ridge times half the square of w, which keeps w finite where
    the features separate all pairs. Each step divides the gradient by the largest
    curvature that the loss can have, so the loss never rises.

    Args:
        difference: features of the chosen answer minus those of the rejected one.
        ridge: above 0.
        steps: how often w is improved.

    Raises:
        ValueError: ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    n, m = difference.shape
    ridge_matrix = ridge * torch.eye(m, dtype=difference.dtype)
    curvature = difference.T @ difference / (4 * n) + ridge_matrix
    step = torch.linalg.inv(curvature)
    w = torch.zeros(m, dtype=difference.dtype)
    for _ in range(steps):
        wrong = (-difference @ w).sigmoid()  # P(rejected beats chosen)
        w = w + step @ (difference.T @ wrong / n - ridge * w)
    return w


def _backward(
    factor: Float[Tensor, "V V V"],
    now: Float[Tensor, "V V"] | float,
    done: float,
    task: Task,
) -> Float[Tensor, "L V V"]:
    """Repeat v[a, b] <- now[a, b] + sum_x factor[a, b, x] v[b, x].

    Entry k is v with k bytes left to write. It is `done` at k = 0 and after the end.
    """
    v = [torch.full(factor.shape[:2], done, dtype=factor.dtype)]
    for _ in range(task.longest):
        v.append(now + (factor * v[-1]).sum(-1))
        v[-1][:, task.end] = done
    return torch.stack(v)


def _visits(p: Float[Tensor, "V V V"], task: Task) -> Float[Tensor, "L V V"]:
    """Return the probability that byte t is written, and in which context."""
    at = torch.zeros(p.shape[:2], dtype=p.dtype)
    at[task.start] = 1
    steps = [at]
    for _ in range(task.longest - 1):
        steps.append((steps[-1][..., None] * p).sum(0))
        steps[-1][:, task.end] = 0
    return torch.stack(steps)


def expected_total(
    logp: Float[Tensor, "V V V"], score: Float[Tensor, "V V V"], task: Task
) -> float:
    """Return the mean, over all answers, of the summed score of their windows.

    With a reward as score this is the expected reward. With `logp - reference_logp`
    it is the KL divergence between the two distributions over answers, in nats.
    """
    p = logp.exp()
    return _backward(p, (p * score).sum(-1), 0.0, task)[-1][task.start].item()


def policy_gradient(
    logits: Float[Tensor, "V V V"],
    reference_logp: Float[Tensor, "V V V"],
    reward: Float[Tensor, "V V V"],
    beta: float,
    task: Task,
) -> tuple[float, Float[Tensor, "V V V"]]:
    """Return J = E[reward] - beta KL(policy | reference) and its exact gradient.

    Both are sums over all answers, done by recursion instead of by sampling. For one
    context and byte, the gradient sums over t: probability of being there at step t,
    times probability of the byte, times its advantage.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    score = reward - beta * (logp - reference_logp)
    values = _backward(p, (p * score).sum(-1), 0.0, task).flip(0)
    visits = _visits(p, task)
    ahead = torch.einsum("tab,tbx->abx", visits, values[1:])
    here = (visits * values[:-1]).sum(0)
    advantage = visits.sum(0)[..., None] * score + ahead - here[..., None]
    return values[0][task.start].item(), p * advantage


def best_policy(
    reference_logp: Float[Tensor, "V V V"],
    reward: Float[Tensor, "V V V"],
    beta: float,
    task: Task,
) -> tuple[float, Float[Tensor, "V V V"]]:
    """Return the largest J of any policy, beta ln Z, and how that policy begins.

    The best policy gives an answer y the probability reference(y) exp(reward(y)/beta)
    / Z. The second result holds, for each context, the log-probabilities of the next
    byte if an answer of `longest` bytes began there. In float64: Z can be huge.

    Raises:
        ValueError: beta is not above 0, or so small that Z overflows.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    factor = (reference_logp + reward / beta).double().exp()
    z = _backward(factor, 0.0, 1.0, task)
    if not z[-1].isfinite().all():
        raise ValueError(f"beta must be larger, got {beta}: Z overflows float64")
    best = beta * z[-1][task.start].log().item()
    return best, (factor * z[-2]).log().log_softmax(-1)
