"""Files: saved and loaded exactly, published vocabularies, files of any size."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.assets import fetch
from groundup.foundations.shakespeare import plays
from groundup.modern.gguf_file import GGUFFile
from groundup.modern.tokenizer import ChatTokenizer
from groundup.scaling.bpe_files import (
    encode_file,
    from_gguf,
    from_ranks,
    from_stand_ins,
    load,
    save,
)
from groundup.scaling.bpe_split import PATTERNS
from groundup.scaling.bpe_tokenizer import END_OF_TEXT, BPETokenizer


@pytest.fixture(scope="module")
def learned():
    return BPETokenizer.learn([plays()["Hamlet"]], 700, special=("<a>", END_OF_TEXT))


@pytest.fixture(scope="module")
def smollm():
    metadata = GGUFFile(next(fetch("smollm2-135m").glob("*.gguf"))).metadata
    return metadata, from_gguf(metadata), ChatTokenizer.from_gguf(metadata)


def test_saved_and_loaded_exactly(learned, tmp_path):
    for i, tokenizer in enumerate(
        (
            learned,
            BPETokenizer({b"b": 0, b"a": 2, b"ba": 3}, special={"<x>": 1}),
            BPETokenizer.of_merges([(b"\xff", b"\x00")], r"(?s).+"),
        )
    ):
        path = tmp_path / f"{i}.json"
        save(tokenizer, path)
        again = load(path)
        assert again.tokens == tokenizer.tokens
        assert list(again.tokens) == list(tokenizer.tokens)
        assert again.special == tokenizer.special
        assert (again.cut, again.digest) == (tokenizer.cut, tokenizer.digest)
        first = path.read_bytes()
        save(again, path)
        assert path.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]


def test_a_changed_file_is_refused(learned, tmp_path):
    path = tmp_path / "t.json"
    save(learned, path)
    contents = json.loads(path.read_text())
    contents["tokens"][300], contents["tokens"][301] = contents["tokens"][301:299:-1]
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"t\.json was changed since it was saved"):
        load(path)
    for other in ("[]", '{"format": "x"}'):
        path.write_text(other)
        with pytest.raises(ValueError, match="must be of the format 'groundup-bpe-1'"):
            load(path)


def test_stand_ins_by_hand():
    """Ġ is the 33rd of the characters that stand for bytes that do not print: 32."""
    assert from_stand_ins("Ġthe") == b" the"
    assert from_stand_ins("ĊÃ©") == "\né".encode()


def test_smollm_equals_its_reference(smollm):
    _, ours, theirs = smollm
    assert ours.n_vocab == theirs.n_vocab == 49_152
    texts = [
        plays()["Twelfth Night"],
        "It's 2 o'clock,  12345 km\n\n\tdef f(x):\n        return x ** 2 \r\n",
        "Größe, 大きさ, आकार 😀 ½ ² e\u0301 \u00a0 \u3000x",
        f"<|im_start|>user\nHi{END_OF_TEXT}",
    ]
    for text in texts:
        assert ours.encode(text, allow="all").tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert theirs.encode(texts[-1])[0] in ours.special.values()
    assert ours.encode(texts[-1])[0].item() not in ours.special.values()


@settings(max_examples=300)
@given(
    text=st.text(
        st.sampled_from("aésth'’ \n\t12.!字<|endoftext>\u00a0\u3000")
        | st.characters(max_codepoint=0x2FFF, exclude_categories=("Cn", "Cs", "Cc")),
        max_size=40,
    )
)
def test_smollm_equals_its_reference_on_any_text(smollm, text):
    _, ours, theirs = smollm
    assert ours.encode(text, allow="all").tolist() == theirs.encode(text)


def test_smollm_has_no_token_for_some_bytes(smollm):
    """The reference drops them without a word; ours says so."""
    _, ours, theirs = smollm
    assert theirs.decode(theirs.encode("a\x04b")) == "ab"
    with pytest.raises(ValueError, match="no token for the byte 0x04"):
        ours.encode("a\x04b")


def test_gguf_refusals(smollm):
    metadata = smollm[0]
    with pytest.raises(ValueError, match="model must be byte-level BPE"):
        from_gguf(metadata | {"tokenizer.ggml.model": "llama"})
    merges = metadata["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match="in the order of the merges"):
        from_gguf(metadata | {"tokenizer.ggml.merges": [*merges[1:], merges[0]]})


def test_a_list_of_ranks_by_hand(tmp_path):
    """ "YQ==" is a, "Yg==" is b, "YWI=" is ab."""
    path = tmp_path / "ranks"
    path.write_text("YQ== 0\nYg== 1\nYWI= 2\n")
    tokenizer = from_ranks(path, "gpt-2", ["<end>"])
    assert tokenizer.tokens == {b"a": 0, b"b": 1, b"ab": 2}
    assert tokenizer.special == {"<end>": 3}
    path.write_text("YQ== 0\nYg==\n")
    with pytest.raises(ValueError, match="line 2 of ranks is no token with a rank"):
        from_ranks(path, "gpt-2")


@pytest.mark.parametrize("cut", sorted(PATTERNS))
@settings(max_examples=40)
@given(
    text=st.text(st.sampled_from("ab's \n\r\t12.!é字😀"), max_size=60),
    chunk=st.integers(1, 9),
)
def test_a_file_in_pieces_is_the_file_at_once(
    learned, tmp_path_factory, cut, text, chunk
):
    path = tmp_path_factory.mktemp("stream") / "text"
    path.write_bytes(text.encode())
    tokenizer = BPETokenizer(learned.tokens, cut, learned.special)
    pieces = [torch.empty(0, dtype=torch.int64)]
    pieces += encode_file(tokenizer, path, chunk=chunk)
    assert torch.equal(torch.cat(pieces), tokenizer.encode(text))


def test_a_play_in_pieces(learned, tmp_path):
    path, text = tmp_path / "play", plays()["Twelfth Night"]
    path.write_text(text)
    pieces = list(encode_file(learned, path, chunk=1000))
    assert len(pieces) > 100
    assert torch.equal(torch.cat(pieces), learned.encode(text))


def test_memory_does_not_grow_with_the_file(learned, tmp_path):
    """A file eight times as long needs no more at its worst moment, within 10 %."""

    def peak(times):
        path = tmp_path / "long"
        path.write_text(plays()["Hamlet"][:60_000] * times)
        n = sum(map(len, encode_file(learned, path, chunk=10_000)))  # fills its memory
        tracemalloc.start()
        assert sum(map(len, encode_file(learned, path, chunk=10_000))) == n
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(8) < 1.1 * peak(1)


def test_bytes_that_are_no_text_are_refused(learned, tmp_path):
    path = tmp_path / "latin-1"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        list(encode_file(learned, path))
