"""Weights by name against transformers' Llama, Qwen2, Mistral, and the real SmolLM2."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.foundations.assets import fetch, is_cached
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.modern.gguf_file import GGUFFile
from groundup.modern.rope import interleaved_rows
from groundup.modern.tokenizer import ChatTokenizer
from groundup.modern.weights import (
    config_of,
    load_folder,
    load_hf,
    load_smollm2,
    places,
    save_hf,
)

transformers = pytest.importorskip("transformers")
smollm2 = pytest.mark.skipif(
    not is_cached("smollm2-135m"), reason="`groundup fetch smollm2-135m` gets it"
)
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
IDS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(1))


def tiny(kind="llama", **fields):
    """A random model with everything at a size that shows: norms and biases too."""
    config, model = CLASSES[kind]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 40,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    theirs = model(config(**{**sizes, **fields})).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs


def in_double(theirs, ids):
    """The logits of transformers, in float64 throughout.

    By itself it takes angles, norms and softmax in float32 whatever the weights are,
    which would hide every difference below 1e-5.
    """
    d_head = theirs.config.hidden_size // theirs.config.num_attention_heads
    theta = theirs.config.rope_parameters["rope_theta"]
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64) / d_head

    def angles(x, position_ids):
        half = position_ids.double()[..., None] * theta**-exponents
        both = torch.cat((half, half), -1)
        return both.cos(), both.sin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs.model.rotary_emb, "forward", angles)
        patch.setattr(torch, "float32", torch.float64)
        return theirs(ids).logits


def as_stored(decoder):
    """A copy whose query and key rows are interleaved, as in a GGUF file."""
    wrong = copy.deepcopy(decoder)
    n_heads = wrong.config.n_heads + wrong.config.kv_heads
    n_rows = n_heads * wrong.config.d_head
    for block in wrong.blocks:
        rows = block.attention.qkv.weight.data[:n_rows]
        rows.copy_(interleaved_rows(rows, n_heads))
    return wrong


def theirs_config(model):
    return model.config.to_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "n_kv_heads"), [("llama", 3), ("llama", 6), ("llama", 1), ("qwen2", 2)]
)
def test_same_logits_as_transformers(kind, n_kv_heads, tied):
    theirs = tiny(kind, num_key_value_heads=n_kv_heads, tie_word_embeddings=tied)
    single = load_hf(theirs, theirs_config(theirs), torch.float32)
    expected = copy.deepcopy(theirs).float()(IDS).logits
    torch.testing.assert_close(single(IDS), expected, rtol=1e-5, atol=1e-5)
    ours = load_hf(theirs, theirs_config(theirs))
    expected = in_double(theirs, IDS)
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-9)
    assert (ours.head.weight is ours.embed.weight) == tied


def test_a_mistral_is_a_llama_with_a_window():
    theirs = tiny("mistral", sliding_window=4)
    ours = load_hf(theirs, theirs_config(theirs))
    assert ours.config.window == 4
    torch.testing.assert_close(ours(IDS), in_double(theirs, IDS), rtol=1e-9, atol=1e-9)
    without = load_hf(theirs, theirs_config(tiny("mistral", sliding_window=None)))
    assert (without(IDS) - ours(IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("theta", [500.0, 10_000.0])
def test_theta_is_taken_from_the_config(theta):
    rope = {"rope_type": "default", "rope_theta": theta}
    theirs = tiny(rope_parameters=rope)
    config = theirs_config(theirs)
    assert config_of(config).rope_theta == theta
    ours = load_hf(theirs, config)
    torch.testing.assert_close(ours(IDS), in_double(theirs, IDS), rtol=1e-9, atol=1e-9)
    # as files before transformers 5 say it
    old = {**config, "rope_parameters": None, "rope_theta": theta}
    assert config_of(old) == config_of(config)


def test_gradients_equal_transformers():
    theirs = tiny("qwen2", tie_word_embeddings=True)
    ours = load_hf(theirs, theirs_config(theirs))
    in_double(theirs, IDS).square().sum().backward()
    ours(IDS).square().sum().backward()
    named = dict(theirs.named_parameters())
    for name, parts in places(ours.config).items():
        expected = torch.cat([named[part].grad for part in parts])
        torch.testing.assert_close(ours.get_parameter(name).grad, expected)


def test_the_weights_are_copies():
    theirs = tiny()
    ours = load_hf(theirs, theirs_config(theirs))
    before = ours(IDS)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert torch.equal(ours(IDS), before)


def test_names_are_taken_strictly():
    theirs = tiny("qwen2")
    config, state = theirs_config(theirs), theirs.state_dict()
    name = "model.layers.1.self_attn.k_proj.bias"
    lacking = {n: t for n, t in state.items() if n != name}
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unknown \[\]"):
        load_hf(lacking, config)
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['gate.weight'\]"):
        load_hf({**state, "gate.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"unknown \[.*\] and 2 more"):
        load_hf({**state, **{f"x{i}": torch.zeros(1) for i in range(8)}}, config)
    with pytest.raises(ValueError, match=rf"{name} must have the shape \(24,\); got"):
        load_hf({**state, name: torch.zeros(23)}, config)
    # a Qwen2 is no Llama: its biases have no place
    with pytest.raises(ValueError, match=r"unknown .*k_proj\.bias"):
        load_hf(state, {**config, "model_type": "llama"})


def test_a_head_that_is_not_tied_is_refused_as_tied():
    theirs = tiny(tie_word_embeddings=False)
    config = {**theirs_config(theirs), "tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"says tied, but lm_head.weight differs"):
        load_hf(theirs, config)
    state = theirs.state_dict()
    state.pop("lm_head.weight")  # files of tied models leave it out
    tied = load_hf(state, config)
    torch.testing.assert_close(tied.head.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of .*; got 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of .*; got 'gelu'"),
        ({"head_dim": 16}, r"head_dim must be one of \(8,\); got 16"),
        ({"attention_bias": True}, "attention_bias must be one of .*; got True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type .*; got 'yarn'"),
    ],
)
def test_refuses_what_our_decoder_does_not_compute(change, message):
    with pytest.raises(ValueError, match=message):
        config_of({**theirs_config(tiny()), **change})


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True, "n_kv_heads": 2},
        {"tied": False},
        {"qkv_bias": True, "n_kv_heads": 1, "rope_theta": 300.0},
        {"window": 5, "norm_eps": 1e-3},
    ],
)
def test_transformers_reads_what_we_save(changes, tmp_path):
    torch.manual_seed(0)
    ours = Decoder(DecoderConfig(n_vocab=97, d_model=32, n_layers=2, **changes))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_hf(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    )
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), rtol=1e-5, atol=1e-5)
    again = load_folder(tmp_path / "model")
    assert again.config == DecoderConfig(
        **{**vars(ours.config), "n_kv_heads": ours.config.kv_heads, "d_ff": 96}
    )
    assert torch.equal(again(IDS), ours(IDS))
    half = load_folder(tmp_path / "model", torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16


def test_we_read_what_transformers_saves_in_pieces(tmp_path):
    theirs = tiny("qwen2")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_folder(tmp_path)
    torch.testing.assert_close(ours(IDS), in_double(theirs, IDS), rtol=1e-9, atol=1e-9)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    ours = Decoder(DecoderConfig(n_vocab=97, d_model=32, n_layers=1))

    def fails(*_):
        raise OSError("disk full")

    for step in ("save_file", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"groundup.modern.weights.{step}", fails)
            with pytest.raises(OSError, match="disk full"):
                save_hf(ours, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
    save_hf(ours, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError, match="is not empty"):
        save_hf(ours, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        load_folder(tmp_path)


def test_sinks_cannot_be_saved(tmp_path):
    config = DecoderConfig(n_layers=1, window=8, n_sinks=2)
    with pytest.raises(ValueError, match="n_sinks=2"):
        save_hf(Decoder(config), tmp_path / "a")


def write_gguf(path, theirs, architecture="llama", extra=()):
    """A GGUF file of a tiny Llama, as llama.cpp's converter writes it."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    config = theirs.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    state = {n: t.float() for n, t in theirs.state_dict().items()}
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in state.items():
        for part, n_heads in heads.items():
            if f"{part}_proj.weight" in name:
                tensor = interleaved_rows(tensor, n_heads)
        pieces = name.removeprefix("model.").split(".")
        block = f"blk.{pieces[1]}." if pieces[0] == "layers" else ""
        kind = {
            "embed_tokens": "token_embd",
            "norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "q_proj": "attn_q",
            "k_proj": "attn_k",
            "v_proj": "attn_v",
            "o_proj": "attn_output",
            "gate_proj": "ffn_gate",
            "up_proj": "ffn_up",
            "down_proj": "ffn_down",
        }[pieces[-2]]
        writer.add_tensor(f"{block}{kind}.weight", tensor.numpy())
    for name in extra:
        writer.add_tensor(name, torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_back_the_model(tmp_path):
    theirs = tiny(rms_norm_eps=1e-5)
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", theirs))
    assert config_of(file.config()) == config_of(theirs_config(theirs))
    expected = theirs(IDS).logits.float()
    ours = load_hf(file.state(), file.config())
    torch.testing.assert_close(ours(IDS), expected, rtol=1e-5, atol=2e-5)
    assert (as_stored(ours)(IDS) - expected).abs().max() > 0.1


def test_foreign_gguf_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be 'llama'; got 'gemma'"):
        GGUFFile(write_gguf(tmp_path / "a.gguf", tiny(), "gemma"))
    extra = ["blk.0.attn_q.bias"]
    file = GGUFFile(write_gguf(tmp_path / "b.gguf", tiny(), extra=extra))
    with pytest.raises(ValueError, match=r"holds 'blk\.0\.attn_q\.bias', which a Llam"):
        file.state()


@pytest.fixture(scope="module")
def real():
    return load_smollm2()


@pytest.fixture(scope="module")
def their_tokenizer():
    (path,) = fetch("smollm2-135m").glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@smollm2
def test_smollm2_equals_transformers_own_reading_of_the_file(real):
    """Logits, and the greedy answer; transformers un-permutes with code of its own."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours, tokenizer = real
    (path,) = fetch("smollm2-135m").glob("*.gguf")
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GGUFFile(path).config())
        )
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(found["tensors"], strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.eval()
    read = config_of({**theirs.config.to_dict(), **found["config"]})
    assert read.norm_eps == pytest.approx(1e-5, rel=1e-7)  # float32 in the file
    assert dataclasses.replace(read, norm_eps=1e-5) == ours.config
    ids = torch.tensor([tokenizer.encode(tokenizer.chat(QUESTION))])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-3)
        expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
        for _ in range(expected.shape[1] - ids.shape[1]):
            ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids, expected)
    assert tokenizer.decode(ids[0].tolist()).endswith("is Paris.<|im_end|>")


@smollm2
def test_the_wrong_layout_does_not_pass_unseen(real):
    ours, tokenizer = real
    wrong = as_stored(ours)
    ids = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy")])
    with torch.no_grad():
        good, bad = (m(ids).log_softmax(-1)[0, -1] for m in (ours, wrong))
    dog = tokenizer.encode(" dog")[0]
    assert good[dog] > -0.3
    assert bad[dog] < good[dog] - 0.5


TEXTS = [
    "Hello world",
    "don't I'll we've",
    "a  b\n\nc\t d  ",
    "x=1.5e10; 12345 007",
    "Ünïcode 漢字 🎉👩‍👩‍👧 ﬁ e\u0301",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "<|im_start|> <|im_end",
    "",
    "\x00\x7f\u200b",
]


@smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_transformers(text, real, their_tokenizer):
    tokenizer = real[1]
    ids = tokenizer.encode(text)
    assert ids == their_tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    plain = their_tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, special=False) == plain


@smollm2
def test_a_digit_is_cut_off_first_as_the_file_says(real, their_tokenizer):
    """Where transformers' reading of GGUF forgets `tokenizer.ggml.pre`.

    By hand: "smollm" isolates each number before GPT-2's pattern runs, so that white
    space before a digit is one run; GPT-2's alone keeps the last space for the digit.
    """
    tokenizer = real[1]
    three = tokenizer.core.token_to_id("ĠĠĠ")
    one = tokenizer.core.token_to_id("1")
    letter = tokenizer.core.token_to_id("a")
    assert tokenizer.encode("a   1") == [letter, three, one]
    assert their_tokenizer.encode("a   1") != [letter, three, one]


@smollm2
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=30))
def test_text_comes_back_but_for_six_control_characters(text):
    """The vocabulary has no token for the bytes of `LOST`; they vanish."""
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(c for c in text if c not in LOST)
    assert all(0 <= i < tokenizer.n_vocab for i in ids)


LOST = "\x04\x06\x13\x14\x16\x1d"


@smollm2
def test_what_is_lost_is_lost_in_transformers_too(real, their_tokenizer):
    for text in (f"a{c}b" for c in LOST):
        assert real[1].encode(text) == their_tokenizer.encode(text)
        assert real[1].decode(real[1].encode(text)) == "ab"


def _tokenizer(found=[]):  # noqa: B006 (read once; a fixture would be per example)
    if not found:
        (path,) = fetch("smollm2-135m").glob("*.gguf")
        found.append(ChatTokenizer.from_gguf(GGUFFile(path).metadata))
    return found[0]


@smollm2
@pytest.mark.parametrize("ask", [True, False])
def test_the_chat_template_equals_transformers(ask, real, their_tokenizer):
    talks = [
        QUESTION,
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "Paris."}, *QUESTION],
    ]
    for talk in talks:
        expected = their_tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=ask
        )
        assert real[1].chat(talk, ask=ask) == expected


@smollm2
def test_sizes_of_the_real_model(real):
    ours, tokenizer = real
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    assert tokenizer.n_vocab == ours.config.n_vocab == 49_152
    assert (ours.config.rope_theta, ours.config.norm_eps) == (100_000, 1e-5)
    assert [tokenizer.decode([i]) for i in tokenizer.eos_ids] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]


@smollm2
def test_tokenizer_of_a_folder(real, tmp_path):
    tokenizer = real[1]
    tokenizer.core.save(str(tmp_path / "tokenizer.json"))
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": source,
    }
    place = tmp_path / "tokenizer_config.json"
    place.write_text(json.dumps(config))
    again = ChatTokenizer.from_folder(tmp_path)
    assert again.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])
    assert again.eos_ids == tokenizer.eos_ids
    assert again.chat(QUESTION) == f"<|im_start|>{QUESTION[0]['content']}<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text(
        "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        ChatTokenizer.from_folder(tmp_path).chat(QUESTION)
    (tmp_path / "chat_template.jinja").unlink()
    place.write_text("{}")
    with pytest.raises(ValueError, match="no chat template"):
        ChatTokenizer.from_folder(tmp_path)


def test_an_unknown_cut_is_refused():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
    with pytest.raises(
        ValueError, match=r"one of \['gpt-2', 'smollm'\]; got 'gpt2', 'l"
    ):
        ChatTokenizer.from_gguf(metadata)
