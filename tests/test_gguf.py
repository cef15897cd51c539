"""A folder with a GGUF file is a base: written as llama.cpp would, read as the same weights."""

import gguf
import pytest
import torch

from howfine.base import Base
from howfine.delta import Delta
from howfine.evaluate import evaluate
from howfine.tune import tune
from tiny import WORDS, tiny_task, tiny_tower


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny Llama, and a folder with its GGUF file."""
    model = tiny_tower("llama", vocab_size=600)
    config = model.config
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, value in model.state_dict().items():
        owner, _, kind = f"model.{path}".rpartition(".")
        part = owner.rpartition(".")[2]
        if part in heads:  # llama.cpp turns the two halves of each head into neighbours
            count = heads[part]
            value = value.reshape(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(owner)}.{kind}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, folder


def _add_tokenizer(writer, size):
    """Byte-level BPE with a token for every byte and every word of the tiny tasks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", *bytes_to_unicode().values()]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            tokens.append(word[:end])
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"<unused{number}>" for number in range(size - len(tokens))]
    assert len(tokens) == size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([m for m in dict.fromkeys(merges) if m.replace(" ", "") in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def test_the_weights_are_those_that_were_written(written):
    model, folder = written
    base = Base.load(str(folder))
    assert base.config.model_type == "llama"
    found = base.tower.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[path], value) for path, value in model.state_dict().items())
    assert base.tokenizer.pad_token is not None
    assert base.tokenizer(WORDS[0]).input_ids


def test_a_delta_on_it_scores_the_same_from_its_file(written, tmp_path):
    _, folder = written
    out = tmp_path / "x.delta.safetensors"
    made = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2}
    tuned = tune(str(folder), tiny_task(), "bitfit", out=out, train=("norm",), **made)
    again = evaluate(Delta.load(out), Base.load(str(folder)), tiny_task(), split="dev")
    assert again.value == tuned.score.value
