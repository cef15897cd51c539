"""Facts about architectures, as rows of path strings: never as branches.

The letters are those of `howfine.anatomy`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from howfine.anatomy import Anatomy
from howfine.errors import UnknownArchitecture, near

_BERT = Anatomy(
    block="encoder.layer.{}",
    letters={
        "Q": "attention.self.query",
        "K": "attention.self.key",
        "V": "attention.self.value",
        "D": "attention.output.dense",
        "I": "intermediate.dense",
        "O": "output.dense",
    },
    embedding="embeddings.word_embeddings",
    pooler="pooler.dense",
    pooling="pooler",
    feed_forward="output.dropout",
    language=("cls.predictions.transform",),
)
_ROBERTA = replace(_BERT, language=("lm_head.dense", "gelu", "lm_head.layer_norm"))
_ATTENTION = {"Q": "self_attn.q_proj", "K": "self_attn.k_proj", "V": "self_attn.v_proj"}
_LLAMA = Anatomy(
    block="layers.{}",
    letters={
        **_ATTENTION,
        "D": "self_attn.o_proj",
        "G": "mlp.gate_proj",
        "I": "mlp.up_proj",
        "O": "mlp.down_proj",
    },
    embedding="embed_tokens",
    pooling="last",
    feed_forward="mlp",
    language=(),
)
_GEMMA2 = replace(_LLAMA, feed_forward="post_feedforward_layernorm")
_T5 = Anatomy(
    block="block.{}",
    letters={
        "Q": "layer.0.SelfAttention.q",
        "K": "layer.0.SelfAttention.k",
        "V": "layer.0.SelfAttention.v",
        "D": "layer.0.SelfAttention.o",
        "I": "layer.1.DenseReluDense.wi|layer.1.DenseReluDense.wi_1",
        "G": "layer.1.DenseReluDense.wi_0",
        "O": "layer.1.DenseReluDense.wo",
    },
    embedding="embed_tokens",
    pooling="mean",
    heads="num_heads",
    plain_attention=False,
    feed_forward="layer.1.dropout",
)
_VIT_LETTERS = {
    "Q": "attention.q_proj",
    "K": "attention.k_proj",
    "V": "attention.v_proj",
    "D": "attention.o_proj",
    "I": "mlp.fc1",
    "O": "mlp.fc2",
}

# Paths are those of transformers' own body classes: the encoder of an encoder-decoder, the model
# without its language-model head otherwise. Keys are `config.model_type`.
ANATOMIES: dict[str, Anatomy] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(_BERT, pooler="", pooling="cls", language=("generator_predictions",)),
    "deberta-v2": Anatomy(
        _BERT.block,
        {
            "Q": "attention.self.query_proj",
            "K": "attention.self.key_proj",
            "V": "attention.self.value_proj",
            "KP": "attention.self.pos_key_proj",
            "QP": "attention.self.pos_query_proj",
            "D": "attention.output.dense",
            "I": "intermediate.dense",
            "O": "output.dense",
        },
        _BERT.embedding,
        pooling="cls",
        plain_attention=False,
        feed_forward=_BERT.feed_forward,
        language=_BERT.language,
    ),
    "mpnet": Anatomy(
        _BERT.block,
        {
            "Q": "attention.attn.q",
            "K": "attention.attn.k",
            "V": "attention.attn.v",
            "D": "attention.attn.o",
            "I": "intermediate.dense",
            "O": "output.dense",
        },
        _BERT.embedding,
        pooler="pooler.dense",
        pooling="cls",
        plain_attention=False,
        feed_forward=_BERT.feed_forward,
        language=_ROBERTA.language,
    ),
    "distilbert": Anatomy(
        block="transformer.layer.{}",
        letters={
            "Q": "attention.q_lin",
            "K": "attention.k_lin",
            "V": "attention.v_lin",
            "D": "attention.out_lin",
            "I": "ffn.lin1",
            "O": "ffn.lin2",
        },
        embedding="embeddings.word_embeddings",
        pooling="cls",
        feed_forward="ffn",
        language=("vocab_transform", "activation", "vocab_layer_norm"),
    ),
    # One set of weights serves all layers: there is one block to change.
    "albert": Anatomy(
        block="encoder.albert_layer_groups.0.albert_layers.{}",
        letters={
            "Q": "attention.query",
            "K": "attention.key",
            "V": "attention.value",
            "D": "attention.dense",
            "I": "ffn",
            "O": "ffn_output",
        },
        embedding="embeddings.word_embeddings",
        pooler="pooler",
        pooling="pooler",
        feed_forward="ffn_output",
        language=("predictions.dense", "predictions.activation", "predictions.LayerNorm"),
    ),
    "gpt2": Anatomy(
        block="h.{}",
        letters={
            "QKV": "attn.c_attn",
            "D": "attn.c_proj",
            "I": "mlp.c_fc",
            "O": "mlp.c_proj",
        },
        embedding="wte",
        pooling="last",
        linear_axes=("in", "out"),
        feed_forward="mlp",
        language=(),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "t5": _T5,
    "mt5": _T5,
    "bart": Anatomy(
        block="layers.{}",
        letters={**_ATTENTION, "D": "self_attn.out_proj", "I": "fc1", "O": "fc2"},
        embedding="embed_tokens",
        pooling="mean",
        heads="encoder_attention_heads",
        feed_forward="fc2",
    ),
    "vit": Anatomy(
        block="layers.{}",
        letters=_VIT_LETTERS,
        embedding="embeddings.patch_embeddings.projection",
        pooler="pooler.dense",
        pooling="cls",
        feed_forward="mlp",
    ),
    "dinov2": Anatomy(
        block="encoder.layer.{}",
        letters=_VIT_LETTERS,
        embedding="embeddings.patch_embeddings.projection",
        pooling="cls",
        feed_forward="layer_scale2",
    ),
}


def anatomy_of(config: Any) -> Anatomy:
    """The row for a Hugging Face config. Raises UnknownArchitecture, with what is known."""
    kind = str(config.model_type)
    if kind not in ANATOMIES:
        raise UnknownArchitecture(
            f"model type {kind!r} has no anatomy row, so its layers and matrices can't be named. "
            f"{near(kind, ANATOMIES)} Add a row to howfine.architectures.ANATOMIES: it is a line."
        )
    return ANATOMIES[kind]
