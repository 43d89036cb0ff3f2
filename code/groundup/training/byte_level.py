"""Bytes as tokens: any text as numbers below 256, and what a model learns of them.

Here: UTF-8 by hand, the tokenizer of Parts 2 and 3 behind an interface that later
tokenizers share, the gradient of an embedding table, and a measure of how far a
group of tokens stands together in it. Left out: tokens that span several bytes
(Part 4), and text that must be normalised first.

Sources: Yergeau (2003), RFC 3629, section 3, for UTF-8; Xue et al. (2022) for bytes
as the tokens of a language model. Page: book/2-training/byte_level.md.
Axes: `N` tokens, `V` vocabulary, `C` model width, `G` groups, `P` permutations.
"""

import hashlib
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.foundations.fitting import N_BYTES, byte_tensor

MAX_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)  # halves of UTF-16 pairs, no characters
# The same sentence, the first of Article 1, as the United Nations publish it.
ARTICLE_1 = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "French": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits."
    ),
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Japanese": (
        "すべての人間は、生れながらにして自由であり、"
        "かつ、尊厳と権利とについて平等である。"
    ),
    "Greek": (
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι "
        "στην αξιοπρέπεια και τα δικαιώματα."
    ),
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Hindi": (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।"
    ),
}


def utf8(code_point: int) -> list[int]:
    """Return the bytes of one character, from its number in Unicode.

    Below 128 the byte is the number. Otherwise its bits are cut into groups of six
    from the right; each goes behind the mark 10, and what is left behind 110, 1110
    or 11110, whose ones count the bytes.

    Raises:
        ValueError: code_point is no character: outside 0..10FFFF, or a surrogate.

    Example: `utf8(0xE9)` (é, 1110 1001) is `[0b110_00011, 0b10_101001]`.
    """
    if not 0 <= code_point <= MAX_CODE_POINT or code_point in SURROGATES:
        raise ValueError(
            f"code_point must be a character, in 0..10FFFF without D800..DFFF; "
            f"got {code_point:X}"
        )
    if code_point < 0x80:
        return [code_point]
    n_more = 1 if code_point < 0x800 else 2 if code_point < 0x10000 else 3
    mark = 0xFF << (7 - n_more) & 0xFF
    sixes = [code_point >> 6 * k & 0x3F for k in reversed(range(n_more))]
    return [mark | code_point >> 6 * n_more, *(0x80 | six for six in sixes)]


def unfinished(data: bytes) -> int:
    """Count the bytes at the end that begin a character and do not complete it.

    0 to 3. Bytes that no further byte can turn into a character count as finished.

    Example: `unfinished("né".encode()[:2])` is 1.
    """
    for n in range(1, min(3, len(data)) + 1):
        if data[-n] & 0xC0 == 0x80:
            continue  # a byte that continues; the character began further left
        try:
            data[-n:].decode()
        except UnicodeDecodeError as error:
            return n if error.reason == "unexpected end of data" else 0
        return 0
    return 0


@runtime_checkable
class Tokenizer(Protocol):
    """What a model needs of a tokenizer: text to ids and back, and an identity."""

    @property
    def n_vocab(self) -> int:
        """V: ids are in [0, V)."""

    @property
    def digest(self) -> str:
        """A hash of everything that decides which ids a text gets."""

    def encode(self, text: str) -> Int[Tensor, "N"]:
        """Return the ids of text."""

    def decode(self, ids: Int[Tensor, "N"]) -> str:
        """Return the text of ids; `decode(encode(text)) == text` for any text."""


class ByteTokenizer:
    """The UTF-8 bytes of a text are its tokens. Nothing to train, nothing unknown."""

    n_vocab = N_BYTES

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of the name of the rule; it has no parameters."""
        return hashlib.sha256(b"UTF-8 bytes").hexdigest()

    def encode(self, text: str) -> Int[Tensor, "N"]:
        """Return the bytes of text as int64 ids in [0, 256).

        Raises:
            ValueError: text holds half of a surrogate pair, which is no character.
        """
        return byte_tensor(text)

    def to_bytes(self, ids: Int[Tensor, "N"]) -> bytes:
        """Return the ids as bytes; unlike text, this loses nothing.

        Raises:
            ValueError: an id is outside [0, 256).
        """
        values = ids.tolist()
        if wrong := [i for i in values if not 0 <= i < N_BYTES]:
            raise ValueError(f"ids must be in [0, {N_BYTES}); got {wrong[0]}")
        return bytes(values)

    def decode(self, ids: Int[Tensor, "N"]) -> str:
        """Return the text of ids, with U+FFFD where they are not valid UTF-8.

        One replacement stands for each longest run of bytes that begins a character
        (at most three), and for each single byte that cannot begin one: the rule of
        the Unicode Standard, section 3.9.

        Raises:
            ValueError: an id is outside [0, 256).
        """
        return self.to_bytes(ids).decode(errors="replace")


def require_digest(tokenizer: Tokenizer, digest: str) -> None:
    """Refuse a tokenizer that is not the one a checkpoint was trained with.

    Raises:
        ValueError: its digest is another than the one that was stored.
    """
    if tokenizer.digest != digest:
        raise ValueError(
            f"tokenizer must have the digest {digest[:12]}… that the checkpoint "
            f"stores; got {tokenizer.digest[:12]}…: load the tokenizer that the "
            f"model was trained with"
        )


def embedding_gradient(
    ids: Int[Tensor, "N"], upstream: Float[Tensor, "N C"], n_vocab: int
) -> Float[Tensor, "V C"]:
    """Return the gradient of the table whose rows `ids` were looked up.

    Row v is the sum of the gradients at the positions where v stands, and zero where
    v does not occur: the transpose of the one-hot matrix times `upstream`.
    """
    return torch.zeros(n_vocab, upstream.shape[1], dtype=upstream.dtype).index_add(
        0, ids, upstream
    )


def cosine_similarity(rows: Float[Tensor, "N C"]) -> Float[Tensor, "N N"]:
    """Return the cosine of the angle between every two rows.

    Raises:
        ValueError: a row is zero and has no direction.
    """
    lengths = rows.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        zero = int((lengths[:, 0] == 0).nonzero()[0])
        raise ValueError(f"rows must not be zero; row {zero} is")
    unit = rows / lengths
    return unit @ unit.T


def contrast(
    similarity: Float[Tensor, "N N"], groups: Int[Tensor, "N"]
) -> Float[Tensor, "G"]:
    """Return how much more alike the members of each group are than to the others.

    Mean similarity of two different members of the group, minus the mean between a
    member and a token outside: 0 if the group means nothing, at most 2.

    Args:
        similarity: as of `cosine_similarity`.
        groups: the group of each token, 0 to G - 1.

    Raises:
        ValueError: a group has fewer than two members, or there is only one group.
    """
    member = torch.nn.functional.one_hot(groups).to(similarity).T  # (G, N)
    size = member.sum(1)
    if len(size) < 2 or size.min() < 2:
        raise ValueError(
            f"groups must be two or more, of two tokens or more; "
            f"got sizes {[int(n) for n in size]}"
        )
    to_group = member @ similarity @ member.T  # (G, G), sums over pairs
    own = member @ similarity.diagonal()
    within = (to_group.diagonal() - own) / (size * (size - 1))
    outside = to_group.sum(1) - to_group.diagonal()
    return within - outside / (size * (size.sum() - size))


def permuted_contrasts(
    similarity: Float[Tensor, "N N"],
    groups: Int[Tensor, "N"],
    n: int,
    generator: torch.Generator,
) -> Float[Tensor, "P G"]:
    """Return `contrast` for n random reassignments of the tokens to the groups.

    What the measured value has to beat: groups of the same sizes, without meaning.
    """
    shuffled = (
        groups[torch.randperm(len(groups), generator=generator)] for _ in range(n)
    )
    return torch.stack([contrast(similarity, g) for g in shuffled])
