"""The miniature pipeline against enumeration, torch and hand-worked examples.

With a small alphabet and short answers every answer can be listed. The oracle for
everything about reinforcement learning is that list, differentiated by autograd.
"""

import itertools
import math
from collections import Counter
from string import ascii_letters

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundup.foundations.pipeline import (
    ETX,
    FEATURES,
    STX,
    Task,
    best_policy,
    count,
    cross_entropy,
    cross_entropy_gradient,
    dialogues,
    encode,
    expected_total,
    fit_reward,
    judge,
    policy_gradient,
    sample,
    smoothed_logp,
    total,
    window_features,
    windows,
)

TINY = Task("a" + STX, STX + ETX + "ab", 3)
PRINTABLE = STX + ETX + "\n !,.?'" + ascii_letters
seeds = st.integers(0, 2**31)


def random_table(seed: int, n: int = len(TINY.alphabet), scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, n, n, generator=generator, dtype=torch.float64)


def every_answer(task: Task) -> list[str]:
    """All texts that are ETX-terminated or exactly `longest` bytes long."""
    inner = task.alphabet.replace(ETX, "")
    finished = [
        "".join(body) + ETX
        for length in range(task.longest)
        for body in itertools.product(inner, repeat=length)
    ]
    return finished + [
        "".join(t) for t in itertools.product(inner, repeat=task.longest)
    ]


def listed_objective(logits, reference_logp, reward, beta, task):
    """J as a plain sum over the list of answers; autograd differentiates it."""
    answers, logp = every_answer(task), logits.log_softmax(-1)
    ours, theirs = total(logp, answers, task), total(reference_logp, answers, task)
    score = total(reward, answers, task) - beta * (ours - theirs)
    return (ours.exp() * score).sum()


# --- text


def test_encode_and_windows_by_hand():
    assert encode("abba", "ab").tolist() == [0, 1, 1, 0]
    assert windows("abba", "ab").tolist() == [[0, 1, 1], [1, 1, 0]]


@given(st.text(ascii_letters + " \n", min_size=3, max_size=60))
def test_counts_are_those_of_a_loop(text):
    alphabet = "".join(sorted(set(text)))
    table = count(windows(text, alphabet), len(alphabet))
    expected = Counter(zip(text, text[1:], text[2:], strict=False))
    for (a, b, x), n in expected.items():
        assert table[alphabet.index(a), alphabet.index(b), alphabet.index(x)] == n
    assert table.sum() == len(text) - 2


def test_answer_windows_predict_the_answer_and_nothing_of_the_prompt():
    found = windows("?" + STX + "ab" + ETX, "ab?" + STX + ETX)
    assert ["ab?\x02\x03"[x] for x in found[:, 2].tolist()] == ["a", "b", ETX]


def test_dialogues_by_hand():
    play = (
        "A:\nWho's there?\n\nB:\nNay, answer me.\n\nA:\nWhy?\n\n[Exit]\n\n"
        "B:\nWhat now?\n\nA:\nTwo\nlines.\n\nB:\nSo?\n\nA:\n" + "x" * 41
    )
    assert dialogues(play) == [("Who's there?", "Nay, answer me.")]
    assert dialogues(play, longest=41)[-1] == ("So?", "x" * 41)


# --- likelihood


def test_counting_by_hand():
    """ "to be, to be, to do": after "o " come b, b, d, so p = 2/3, 1/3."""
    alphabet = " ,bdeot"
    table = count(windows("to be, to be, to do", alphabet), 7)
    row = table[5, 0]
    assert row.tolist() == [0, 0, 2, 1, 0, 0, 0]
    loss = cross_entropy((row + 1e-300).log(), row)
    assert loss.item() == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3)
    gradient = cross_entropy_gradient(torch.zeros(7).double(), row)
    assert gradient[2].item() == pytest.approx(1 / 7 - 2 / 3)  # predicted minus seen


def test_smoothing_by_hand():
    """Alphabet ab, text "aab", strength 1.

    Window a, a, b once, so in that row: p(b|aa) = (1 + p(b|a)) / 2; the pair a, b is
    counted once: p(b|a) = (1 + p(b)) / 2; b once: p(b) = (1 + 1/2) / 2 = 3/4. So
    p(b|a) = 7/8 and p(b|aa) = 15/16. Context bb was never seen: it has p(b) = 3/4.
    """
    p = smoothed_logp(count(windows("aab", "ab"), 2), strength=1.0).exp()
    assert p[0, 0, 1].item() == pytest.approx(15 / 16)
    assert p[1, 0, 1].item() == pytest.approx(7 / 8)  # unseen context, seen pair
    assert p[1, 1, 1].item() == pytest.approx(3 / 4)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 2).double())


@given(seeds)
def test_smoothed_rows_are_maximum_likelihood_for_counts_plus_extras(seed):
    counts = random_table(seed).exp().round()
    logp = smoothed_logp(counts, strength=3.0)
    pairs = counts.sum(0)
    unigram = (pairs.sum(0) + 3 / 4) / (pairs.sum() + 3)
    p2 = (pairs + 3 * unigram) / (pairs.sum(-1, keepdim=True) + 3)
    assert cross_entropy_gradient(logp, counts + 3 * p2).abs().max() < 1e-12


@given(seeds, st.sampled_from([1.0, 30.0, 1000.0]))
def test_cross_entropy_is_torchs_on_the_listed_windows(seed, scale):
    logits = random_table(seed, scale=scale)
    found = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(seed))
    expected = F.cross_entropy(logits[found[:, 0], found[:, 1]], found[:, 2])
    torch.testing.assert_close(cross_entropy(logits, count(found, 4)), expected)


def test_half_precision_logits_with_float64_counts():
    logits, counts = random_table(0), random_table(1).exp()
    close = cross_entropy(logits.bfloat16(), counts)
    assert close.item() == pytest.approx(cross_entropy(logits, counts).item(), rel=0.02)


@settings(max_examples=10)
@given(seeds)
def test_gradient_is_autograds(seed):
    logits = random_table(seed).requires_grad_()
    counts = random_table(seed + 1).exp()
    cross_entropy(logits, counts).backward()
    ours = cross_entropy_gradient(logits.detach(), counts)
    torch.testing.assert_close(ours, logits.grad)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, counts), logits)


def test_descent_is_torch_sgd_and_arrives_at_the_shares():
    counts = torch.tensor([[3.0, 1.0, 4.0], [1.0, 5.0, 9.0]]).double()
    ours = torch.zeros_like(counts)
    theirs = torch.zeros_like(counts).requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=5.0)
    for _ in range(500):
        ours = ours - 5.0 * cross_entropy_gradient(ours, counts)
        optimizer.zero_grad()
        cross_entropy(theirs, counts).backward()
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach())
    torch.testing.assert_close(ours.softmax(-1), counts / counts.sum(-1, keepdim=True))


# --- sampling


def test_samples_follow_the_probabilities():
    """85 answers, five sigma each: fails by chance once in 20,000 runs at most."""
    logp = random_table(3).log_softmax(-1)
    n = 20_000
    drawn = Counter(sample(logp, TINY, n, torch.Generator().manual_seed(0)))
    answers = every_answer(TINY)
    assert set(drawn) <= set(answers)
    p = total(logp, answers, TINY).exp()
    assert p.sum().item() == pytest.approx(1)
    for answer, share in zip(answers, p.tolist(), strict=True):
        sigma = math.sqrt(n * share * (1 - share))
        assert abs(drawn[answer] - n * share) < 5 * sigma + 1, answer


def test_only_the_last_two_bytes_of_the_prompt_are_read():
    alphabet = STX + ETX + "abc?"
    logits = random_table(0, n=6)
    texts = [
        sample(logits, Task(q, alphabet, 8), 5, torch.Generator().manual_seed(1))
        for q in ("abc?" + STX, "b?" + STX)
    ]
    assert texts[0] == texts[1]


# --- judge and reward model


def test_judge_by_hand():
    known = frozenset({"no", "sir", "i"})
    assert judge("No, sir." + ETX, known) == 4 + 2 + 1
    assert judge("No, sur.", known) == 4 / 2  # unfinished, no "sir", one of two known
    assert judge("sir sir sir" + ETX, known) == pytest.approx(4 / 3 + 2)
    assert judge("", known) == 0
    assert judge("Sirrah no" + ETX, known) == 2  # a longer word is not "sir"
    assert judge("i" * 50, known) == pytest.approx(-2.0)


@example(" Sir, sir. sIR! Desire", True)
@given(st.text(ascii_letters + " .,!?\n", max_size=30), st.booleans())
def test_features_are_string_counts(body, finished):
    task = Task("?" + STX, PRINTABLE, 40)
    text = body + ETX * finished
    if not text:
        return
    found = total(window_features(PRINTABLE), [text], task)[0]
    low = text.lower()
    expected = {
        "bytes": len(body),
        "spaces": text.count(" ") + text.count("\n"),
        "capitals": sum(c.isupper() for c in text),
        "! or ?": text.count("!") + text.count("?"),
        "sir": sum(low[i : i + 3] == "sir" for i in range(len(low))),
        "final stop": float(text.endswith("." + ETX)),
    }
    assert found.tolist() == [expected[name] for name in FEATURES]


def test_total_of_one_table_and_of_several():
    tables = torch.stack([random_table(0), random_table(1)])
    answers = every_answer(TINY)
    torch.testing.assert_close(
        total(tables, answers, TINY)[:, 1], total(tables[1], answers, TINY)
    )


def test_one_feature_by_hand():
    """7 of 10 pairs won by the answer with one more: sigmoid(w) = 0.7."""
    difference = torch.tensor([[1.0]] * 7 + [[-1.0]] * 3).double()
    w = fit_reward(difference, ridge=1e-9)
    assert w.item() == pytest.approx(math.log(7 / 3), rel=1e-6)


@settings(max_examples=10)
@given(seeds, st.sampled_from([0.01, 1.0, 100.0]))
def test_reward_weights_are_as_good_as_those_of_lbfgs(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, scale, 5.0])
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss(w):
        return -F.logsigmoid(x @ w).mean() + 0.05 * w @ w

    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    ours = fit_reward(x, ridge=0.1).requires_grad_()
    ours_loss = loss(ours)
    ours_loss.backward()
    assert ours.grad.abs().max() < 1e-6
    assert ours_loss.item() == pytest.approx(loss(w).item(), abs=1e-6)


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.1, 1.0, 1000.0]), st.integers(1, 30))
def test_more_steps_never_raise_the_loss(seed, scale, steps):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(20, 2, generator=generator, dtype=torch.float64)

    def loss(w):
        return (-F.logsigmoid(x @ w).mean() + 0.05 * w @ w).item()

    fewer, more = (
        fit_reward(x, ridge=0.1, steps=steps),
        fit_reward(x, ridge=0.1, steps=steps + 1),
    )
    assert loss(more) <= loss(fewer) + 1e-12


def test_the_ridge_keeps_separable_pairs_finite():
    """Each pair is won: without the ridge w grows for ever; with it, r w = P(lost)."""
    w = fit_reward(torch.ones(5, 1).double(), ridge=0.1)
    assert 0.1 * w.item() == pytest.approx(torch.sigmoid(-w).item())


# --- reinforcement learning


@settings(max_examples=30)
@given(seeds)
def test_expected_total_is_the_sum_over_all_answers(seed):
    logp, score = random_table(seed).log_softmax(-1), random_table(seed + 1)
    answers = every_answer(TINY)
    listed = (total(logp, answers, TINY).exp() * total(score, answers, TINY)).sum()
    assert expected_total(logp, score, TINY) == pytest.approx(listed.item())


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([1, 2, 3]))
def test_policy_gradient_is_autograd_through_the_list(seed, beta, longest):
    task = Task(TINY.prompt, TINY.alphabet, longest)
    logits = random_table(seed).requires_grad_()
    reference, reward = random_table(seed + 1).log_softmax(-1), random_table(seed + 2)
    listed = listed_objective(logits, reference, reward, beta, task)
    listed.backward()
    value, gradient = policy_gradient(logits.detach(), reference, reward, beta, task)
    assert value == pytest.approx(listed.item())
    torch.testing.assert_close(gradient, logits.grad)


def test_policy_gradient_in_float32_is_close_to_float64():
    args = [random_table(0), random_table(1).log_softmax(-1), random_table(2)]
    _, exact = policy_gradient(*args, 0.5, TINY)
    _, single = policy_gradient(*[a.float() for a in args], 0.5, TINY)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)


def test_sampled_gradients_have_the_exact_one_as_mean():
    """REINFORCE: reward times the gradient of the sampled answer's log-probability.

    64 entries, five sigma each: fails by chance once in 25,000 runs.
    """
    logits, reward = random_table(5), random_table(6)
    _, exact = policy_gradient(logits, logits.log_softmax(-1), reward, 0.0, TINY)
    answers = sample(logits, TINY, 4000, torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    estimates = []
    for answer, r in zip(answers, total(reward, answers, TINY), strict=True):
        seen = count(windows(TINY.prompt[-2:] + answer, TINY.alphabet), 4)
        estimates.append(r * (seen - seen.sum(-1, keepdim=True) * p))
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - exact).abs()
    assert (error <= 5 * estimates.std(0) / len(answers) ** 0.5 + 1e-12).all()


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.2, 1.0, 5.0]))
def test_best_objective_is_beta_ln_z_and_no_policy_beats_it(seed, beta):
    reference, reward = random_table(seed).log_softmax(-1), random_table(seed + 1)
    answers = every_answer(TINY)
    tilted = total(reference, answers, TINY) + total(reward, answers, TINY) / beta
    best, _ = best_policy(reference, reward, beta, TINY)
    assert best == pytest.approx(beta * tilted.logsumexp(0).item())
    for other in (reference, random_table(seed + 2)):
        value, _ = policy_gradient(other, reference, reward, beta, TINY)
        assert value <= best + 1e-9


@settings(max_examples=30)
@given(seeds)
def test_first_byte_of_the_best_policy_is_the_tilted_marginal(seed):
    beta = 0.7
    reference, reward = random_table(seed).log_softmax(-1), random_table(seed + 1)
    answers = every_answer(TINY)
    tilted = total(reference, answers, TINY) + total(reward, answers, TINY) / beta
    share = tilted.softmax(0)
    expected = [
        share[[answer[0] == symbol for answer in answers]].sum().item()
        for symbol in TINY.alphabet
    ]
    _, logp = best_policy(reference, reward, beta, TINY)
    assert logp[TINY.start].exp().tolist() == pytest.approx(expected)


def test_ascent_reaches_the_closed_form_where_no_context_recurs():
    """At two bytes the contexts of the steps differ, so a table needs no clock."""
    task = Task("a" + STX, STX + ETX + "ab", 2)
    reference, reward = random_table(0).log_softmax(-1), random_table(1)
    logits = reference.clone()
    for _ in range(1500):
        logits += 4 * policy_gradient(logits, reference, reward, 0.5, task)[1]
    best, policy = best_policy(reference, reward, 0.5, task)
    value, gradient = policy_gradient(logits, reference, reward, 0.5, task)
    assert gradient.abs().max() < 1e-4
    assert best - 1e-4 < value <= best + 1e-12
    torch.testing.assert_close(
        logits.softmax(-1)[task.start], policy.exp()[task.start], rtol=0, atol=1e-3
    )


def test_without_penalty_the_policy_leaves_the_reference():
    reference = random_table(0).log_softmax(-1)
    reward, kl = random_table(1), []
    for beta in (0.0, 1.0):
        logits = reference.clone()
        for _ in range(200):
            logits += policy_gradient(logits, reference, reward, beta, TINY)[1]
        logp = logits.log_softmax(-1)
        kl.append(expected_total(logp, logp - reference, TINY))
    assert kl[0] > 2 * kl[1] > 0


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Task("a", "a" + ETX, 3), "prompt must have two bytes"),
        (lambda: Task("aa", "a", 3), "alphabet must hold ETX"),
        (lambda: Task("aa", "a" + ETX, 0), "longest must be 1 or more"),
        (lambda: encode("abc", "ab"), r"text holds \['c'\]"),
        (lambda: windows("ab", "ab"), "three bytes or more"),
        (lambda: fit_reward(torch.ones(2, 1), ridge=0.0), "ridge must be above 0"),
        (
            lambda: best_policy(random_table(0), random_table(1), 0.0, TINY),
            "beta must be above 0",
        ),
        (
            lambda: best_policy(random_table(0), random_table(1), 1e-4, TINY),
            "beta must be larger",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
