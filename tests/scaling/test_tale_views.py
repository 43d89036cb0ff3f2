"""Tasks, their gold answers, and a checker under attack."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.story_entropy import expected
from groundup.scaling.tale_views import (
    FULL,
    QUESTIONS,
    SPOILERS,
    check,
    gold,
    instructions,
    judge_tale,
    preferences,
    task,
)
from groundup.scaling.tinytales import DOMAINS, TalesConfig, draw, tales

EVERY = TalesConfig(domains=tuple(DOMAINS), difficulty=(1, 2, 2, 3))
levels = st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 3), (3, 3, 4, 5)])


@settings(max_examples=80)
@given(index=st.integers(0, 10**9), level=levels)
def test_the_answer_of_any_task_is_right(index, level):
    config = TalesConfig(domains=tuple(DOMAINS), difficulty=level)
    asked = task(config, index, "test")
    verdict = check(asked.prompt, asked.answer)
    assert verdict.ok
    assert verdict.score == 1
    assert verdict.faults == ()
    assert check(asked.prompt, f"  {asked.answer}\n").ok
    right = gold(asked.prompt)
    assert right == (None if asked.kind == "write" else asked.answer)


@settings(max_examples=80)
@given(index=st.integers(0, 10**9), level=levels)
def test_of_any_pair_the_chosen_is_right_and_the_rejected_is_not(index, level):
    config = TalesConfig(domains=tuple(DOMAINS), difficulty=level, seed=index)
    (pair,) = preferences(config, 1)
    assert check(pair.prompt, pair.chosen).ok
    verdict = check(pair.prompt, pair.rejected)
    assert not verdict.ok
    assert 0 <= verdict.score < 1
    assert verdict.faults


def test_every_kind_of_task_and_of_spoiler_occurs():
    kinds = {t.kind for t in instructions(EVERY, 300)}
    assert kinds == {"write", "add", "run", *QUESTIONS}
    reasons = {p.reason for p in preferences(TalesConfig(), 150)}
    assert set(SPOILERS) <= reasons


def test_tasks_do_not_depend_on_how_many_there_are():
    assert instructions(EVERY, 9)[:4] == instructions(EVERY, 4)
    assert preferences(EVERY, 9)[3] == preferences(EVERY, 4)[3]
    assert instructions(EVERY, 5, "train") != instructions(EVERY, 5, "test")


def test_questions_by_hand():
    tale = (
        "A proud girl named Mia wanted a red kite. She met a big fox caught in a net. "
        "Mia only laughed. Mia never got the red kite, and the fox was still in the "
        "net."
    )
    for question, answer in {
        "What did Mia want?": "a red kite",
        "Who wanted a red kite?": "Mia",
        "Which animal did Mia meet?": "a fox",
        "Did Mia help?": "no",
        "Did Mia get the red kite?": "no",
    }.items():
        assert gold(f"{tale}\n\nQuestion: {question}") == answer
    talk = (
        "Mia: Where is my red kite, Tom?\nTom: It is on the roof, Mia.\n"
        "Mia: Thank you, I will look on the roof."
    )
    assert gold(f"{talk}\n\nQuestion: Where is the red kite?") == "on the roof"
    assert gold(f"{talk}\n\nQuestion: Whose is the red kite?") == "Mia's"
    assert gold("What is 17 + 25?") == "42"
    assert gold("What does this print?\na = 7\nb = a + 5\nprint b") == "2"


@pytest.mark.parametrize("kind", ["add", "run", "wish", "who", "got", "where"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda right: "",
        lambda right: " ",
        lambda right: f"{right} {right}",
        lambda right: f"{right}\n{right}",
        lambda right: f"The answer is {right}",
        lambda right: f"{right}..",
        lambda right: f"{right} or not",
        lambda right: right[:-1],
        lambda right: right + "0",
        lambda right: "yes no",
        lambda right: "\x00" + right,
        lambda right: right.swapcase() if right.swapcase() != right else "٤٢",
    ],
)
def test_attacks_on_short_answers_fail(kind, attack):
    asked = next(t for t in instructions(EVERY, 300) if t.kind == kind)
    verdict = check(asked.prompt, attack(asked.answer))
    assert verdict.score == 0
    assert not verdict.ok


WRITTEN = next(t for t in instructions(TalesConfig(), 20) if t.kind == "write")


@pytest.mark.parametrize(
    ("answer", "most", "word"),
    [
        ("", 0, "empty"),
        ("\n\n", 0, "empty"),
        ("A", 0.01, "leaves the grammar"),
        ("The end.", 0.1, "leaves the grammar"),
        (WRITTEN.answer + "\n\n" + WRITTEN.answer, 0.26, "leaves the grammar"),
        (WRITTEN.answer + " " + WRITTEN.answer, 0.26, "leaves the grammar"),
        (WRITTEN.answer + " The end.", 0.5, "leaves the grammar"),
        (WRITTEN.answer[: len(WRITTEN.answer) // 2], 0.3, "leaves the grammar"),
        (WRITTEN.answer.upper(), 0.1, "leaves the grammar"),
        (WRITTEN.prompt, 0.1, "leaves the grammar"),
        ("a " * 2000, 0.01, "leaves the grammar"),
        ("\x00\ud800é" * 3, 0, "leaves the grammar"),
    ],
)
def test_attacks_on_tales_fail(answer, most, word):
    verdict = check(WRITTEN.prompt, answer)
    assert not verdict.ok
    assert verdict.score <= most
    assert word in verdict.faults[0]


def test_another_tale_is_grammatical_but_not_what_was_asked():
    for tale in tales(TalesConfig(seed=5), n=20):
        verdict = check(WRITTEN.prompt, tale.text)
        plot = re.fullmatch(
            r"Write a tale about (\w+), a (\w+) (\w+) who wants a (\w+) (\w+)\.",
            WRITTEN.prompt,
        ).groups()
        names = ("hero", "trait", "kin", "colour", "thing")
        wrong = sum(tale.plot[n] != v for n, v in zip(names, plot, strict=True))
        assert len(verdict.faults) == wrong
        assert verdict.score == pytest.approx((1 + 1 / (1 + wrong)) / 2)


def test_a_tale_of_another_difficulty_is_welcome():
    for difficulty in (1, 2, 3):
        text = draw(TalesConfig(difficulty=difficulty), 4).text
        assert judge_tale(text).ok


@pytest.mark.parametrize("name", list(SPOILERS))
def test_each_spoiler_is_told_by_its_fault(name):
    words = {
        "another name at the end": "hero is",
        "another colour at the end": "colour is",
        "an end that does not follow": "deed is",
        "a sentence twice": "leaves the grammar",
        "stops early": "leaves the grammar",
        "a tale about someone else": "hero should be",
    }
    pairs = [p for p in preferences(TalesConfig(), 200) if p.reason == name]
    assert len(pairs) > 3
    for pair in pairs:
        assert words[name] in " ".join(check(pair.prompt, pair.rejected).faults)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Write a tale.",
        "What is 1 + ?",
        "What is 1 + 2 + 3?",
        "What does this print?\nimport os",
        "Tom ran.\n\nQuestion: Did Tom help?",
        draw(TalesConfig(), 0).text.strip() + "\n\nQuestion: Why?",
    ],
)
def test_refuses_prompts_that_are_no_tasks(prompt):
    with pytest.raises(ValueError, match=r"prompt must be|line must|last line"):
        check(prompt, "42")


def test_a_full_tale_is_a_mean_short_one():
    assert round(expected(TalesConfig()).n_bytes) == FULL
