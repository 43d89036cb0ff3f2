"""TinyTales: the same in every process, read back, and unambiguous by enumeration."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.tale_domains import dialogues, programs, run_program, sums
from groundup.scaling.tale_grammar import Choice, Name
from groundup.scaling.tale_stories import THINGS, stories
from groundup.scaling.tinytales import (
    DOMAINS,
    SPLITS,
    TalesConfig,
    draw,
    grammar,
    read,
    split_of,
    tales,
    tales_split,
    text_of,
)

EVERY = TalesConfig(domains=tuple(DOMAINS), difficulty=(3, 2, 4, 3), seed=7)


@settings(max_examples=100)
@given(
    order=st.permutations(sorted(DOMAINS)),
    n=st.integers(1, 4),
    difficulty=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
)
def test_any_tale_is_read_back_with_its_plot(order, n, difficulty, seed, index, split):
    config = TalesConfig(domains=tuple(order[:n]), difficulty=difficulty, seed=seed)
    tale = draw(config, index, split)
    assert read(config, tale.text) == tale
    assert tale.text.isascii()
    assert tale.text.endswith("\n\n")
    assert tale.text.count("\n\n") == 1
    assert len(grammar(tale.domain, config.difficulty).derivations(tale.text)) == 1


def strings(rules, parts, plot) -> Iterator[tuple[str, dict]]:
    """Everything that a row of parts can write, by plain recursion."""
    if not parts:
        yield "", plot
        return
    part, *rest = parts
    if isinstance(part, Choice):
        for option in rules.branch(part.rule, plot)[1]:
            inner = [*option.parts, *rest]
            yield from strings(rules, inner, {**plot, **option.binds})
    else:
        word = rules.value(part.name, plot) if isinstance(part, Name) else part
        for text, after in strings(rules, rest, plot):
            yield word + text, after


def lead(rules, parts, plot) -> str:
    """What stands before the first choice."""
    words = takewhile(lambda part: not isinstance(part, Choice), parts)
    return "".join(
        rules.value(w.name, plot) if isinstance(w, Name) else w for w in words
    )


def names_in(rules, parts) -> set[str]:
    found = set()
    for part in parts:
        if isinstance(part, Name):
            found.add(part.name.lower())
        elif isinstance(part, Choice):
            key = rules.rules[part.rule].by
            found |= {key} if key else set()
            for _, options in rules.branches(part.rule).values():
                for option in options:
                    found |= names_in(rules, option.parts)
    return found


@pytest.mark.parametrize(
    "rules",
    [f(d) for f in (stories, dialogues) for d in (1, 2, 3)]
    + [sums(2), programs(1), programs(3)],
)
def test_no_option_writes_what_begins_another_options_text(rules):
    """Then each choice can be read off the text, and text and choices are one-to-one.

    Of names that no rule depends on, the first and last value stand for all.
    """
    keys = {rule.by for rule in rules.rules.values()}
    for rule, made in rules.rules.items():
        if all(len(options) == 1 for options in made.options.values()):
            continue
        names = sorted(n for n in names_in(rules, [Choice(rule)]) if n in rules.values)
        pools = [
            rules.values[n] if n in keys else [rules.values[n][0], rules.values[n][-1]]
            for n in names
        ]
        for values in product(*pools):
            plot = dict(zip(names, values, strict=True))
            options = rules.branch(rule, plot)[1]
            leads = [lead(rules, o.parts, {**plot, **o.binds}) for o in options]
            unclear = [
                i
                for i, one in enumerate(leads)
                for j, other in enumerate(leads)
                if i != j and (one.startswith(other) or other.startswith(one))
            ]
            written = sorted(
                (text, i)
                for i in set(unclear)
                for text, _ in strings(
                    rules, options[i].parts, {**plot, **options[i].binds}
                )
            )
            for at, (text, option) in enumerate(written):
                for other, another in written[at + 1 :]:
                    if not other.startswith(text):
                        break
                    assert option == another, (rule, text, other)


def test_the_text_of_a_seed_is_the_same_in_every_process():
    """Also pinned: a change of the stories changes every number of the book."""
    code = (
        "import hashlib; from groundup.scaling.tinytales import *; "
        "c = TalesConfig(domains=tuple(DOMAINS), difficulty=(3, 2, 4, 3), seed=7); "
        "print(hashlib.sha256(text_of(c, 'validation', 50).encode()).hexdigest())"
    )
    here = hashlib.sha256(text_of(EVERY, "validation", 50).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here
    assert here[:16] == "d983471ae0f96e0c"
    short = text_of(TalesConfig(), "train", 50)
    assert hashlib.sha256(short.encode()).hexdigest()[:16] == "b5d6388bae016fcb"


def test_tales_do_not_depend_on_how_many_there_are_nor_on_the_sizes():
    few, many = TalesConfig(n_train=3), TalesConfig(n_train=9, n_test=1)
    assert tales(many)[:3] == tales(few)
    assert tales(many, n=2) == tales(few)[:2]
    assert draw(few, 8) == tales(many)[8]


def test_seeds_splits_and_shares_give_other_tales():
    texts = [
        text_of(config, split, 20)
        for config in (
            TalesConfig(),
            TalesConfig(seed=1),
            TalesConfig(domains=("stories", "sums"), shares=(9.0, 1.0)),
            TalesConfig(domains=("stories", "sums"), shares=(1.0, 9.0)),
        )
        for split in SPLITS
    ]
    assert len(set(texts)) == len(texts)


def test_domains_come_in_their_shares():
    """Five sigma: one failure in 1.7 million correct mixtures."""
    config = TalesConfig(domains=("sums", "programs"), shares=(3.0, 1.0))
    n = 4000
    found = sum(tale.domain == "sums" for tale in tales(config, n=n))
    assert abs(found - 0.75 * n) < 5 * math.sqrt(n * 0.75 * 0.25)
    assert config.weights == {"sums": 0.75, "programs": 0.25}


def test_disjoint_splits_share_no_text():
    config = TalesConfig(domains=("sums",), difficulty=1, disjoint=True)
    found = {split: {t.text for t in tales(config, split, 800)} for split in SPLITS}
    assert not found["train"] & found["validation"]
    assert not found["test"] & (found["train"] | found["validation"])
    assert all(split_of(t) == split for split, texts in found.items() for t in texts)
    every = {f"{x} + {y} = {x + y}.\n\n" for x in range(1, 10) for y in range(1, 10)}
    assert set.union(*found.values()) == every


def test_split_shares_are_eighty_ten_ten():
    texts = [str(i) for i in range(5000)]
    shares = [sum(split_of(t) == s for t in texts) / 5000 for s in SPLITS]
    for share, p in zip(shares, (0.8, 0.1, 0.1), strict=True):
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 5000)


def test_corpora_hold_the_tales_as_bytes():
    config = TalesConfig(n_train=5, n_validation=2, n_test=1)
    for split, corpus in zip(SPLITS, tales_split(config), strict=True):
        assert bytes(corpus.tokens.tolist()).decode() == text_of(config, split)
        assert len(corpus.ends) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domains": ()}, "domains must be"),
        ({"domains": ("plays",)}, "domains must be"),
        ({"domains": ("sums", "sums")}, "domains must be"),
        ({"shares": (1.0, 1.0)}, "shares must be"),
        ({"shares": (0.0,)}, "shares must be"),
        ({"n_test": 0}, "n_test must be at least 1; got 0"),
        ({"difficulty": 4}, "difficulty of stories"),
        ({"difficulty": (1, 2)}, "difficulty must be one number"),
        ({"domains": ("dialogues",), "difficulty": 0}, "difficulty of dialogues"),
        ({"domains": ("sums",), "difficulty": 7}, "difficulty of sums"),
        ({"domains": ("programs",), "difficulty": 7}, "difficulty of programs"),
    ],
)
def test_refuses_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        TalesConfig(**fields)


def test_refuses_indices_splits_and_domains():
    with pytest.raises(ValueError, match="index must not be negative"):
        draw(TalesConfig(), -1)
    with pytest.raises(ValueError, match="split must be one of"):
        draw(TalesConfig(), 0, "dev")
    with pytest.raises(ValueError, match="domain must be one of"):
        grammar("plays", 1)


def test_read_refuses_other_texts():
    config = TalesConfig()
    text = draw(config, 0).text
    for other in ("", text + text, text.strip(), text.replace(".", "!")):
        assert read(config, other) is None
    assert read(TalesConfig(difficulty=2), text) is None


@pytest.mark.parametrize("index", range(30))
def test_sums_are_right_and_programs_print_what_they_say(index):
    config = TalesConfig(domains=("sums",), difficulty=3)
    terms, total = draw(config, index).text.strip(".\n").split(" = ")
    assert sum(map(int, terms.split(" + "))) == int(total)
    source, output = (
        draw(TalesConfig(domains=("programs",), difficulty=4), index)
        .text.strip()
        .split("\n> ")
    )
    values = {}  # a second evaluator: by hand, from right to left of each line
    *lines, last = source.split("\n")
    for line in lines:
        target, expression = line.split(" = ")
        terms = [values[t] if t in values else int(t) for t in expression.split()[::2]]
        if len(terms) == 1:
            values[target] = terms[0]
        else:
            x, y = terms
            sign = expression.split()[1]
            values[target] = {"+": x + y, "-": x - y, "*": x * y}[sign] % 10
    assert int(output) == values[last[-1]]


def test_programs_by_hand():
    assert run_program("a = 7\nb = a + 5\nprint b") == "2"  # 12 wraps to 2
    assert run_program("a = 3\nb = a - 5\nc = b * b\nprint c") == "4"  # -2 is 8, 64
    assert run_program("a = 3\na = a + a\nprint a\n") == "6"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "last line"),
        ("a = 3", "last line"),
        ("print a", "not set"),
        ("a = b\nprint a", "not set"),
        ("a = 12\nprint a", "line must be like"),
        ("a = 1 / 2\nprint a", "line must be like"),
        ("a = __import__('os')\nprint a", "line must be like"),
        ("a = 1\nprint a + 1", "last line"),
        ("a = 1\n\nprint a", "line must be like"),
    ],
)
def test_the_evaluator_refuses_everything_else(source, message):
    with pytest.raises(ValueError, match=message):
        run_program(source)


def test_stories_keep_their_promises():
    """Name, thing and animal of the first lines return in the last."""
    for difficulty in (1, 2, 3):
        for tale in tales(TalesConfig(difficulty=difficulty), n=50):
            plot, end = tale.plot, tale.text[-130:]
            assert plot["hero"] in tale.text.split(".")[0]
            assert f"{plot['colour']} {plot['thing']}" in tale.text[-260:]
            helped = plot["deed"] == "helped"
            assert (THINGS[plot["thing"]][1] in end + tale.text[-260:]) == helped
