# long: a row for each architecture
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
    branches=("after:attention.output.dropout", "after:output.dropout"),
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
    branches=("before:input_layernorm", "before:post_attention_layernorm"),
    language=(),
)
_GEMMA2 = replace(
    _LLAMA,
    feed_forward="post_feedforward_layernorm",
    branches=("before:input_layernorm", "before:pre_feedforward_layernorm"),
)
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
    branches=("before:layer.0.layer_norm", "before:layer.1.layer_norm"),
)
_BART = Anatomy(
    block="layers.{}",
    letters={**_ATTENTION, "D": "self_attn.out_proj", "I": "fc1", "O": "fc2"},
    embedding="embed_tokens",
    pooling="mean",
    heads="encoder_attention_heads",
    feed_forward="fc2",
    branches=("after:self_attn", "after:fc2"),
)
_MBART = replace(_BART, branches=("before:self_attn_layer_norm", "before:final_layer_norm"))
_VIT_LETTERS = {
    "Q": "attention.q_proj",
    "K": "attention.k_proj",
    "V": "attention.v_proj",
    "D": "attention.o_proj",
    "I": "mlp.fc1",
    "O": "mlp.fc2",
}

_VIT = Anatomy(
    block="layers.{}",
    letters=_VIT_LETTERS,
    embedding="embeddings.patch_embeddings.projection",
    pooler="pooler.dense",
    pooling="cls",
    feed_forward="mlp",
    branches=("before:layernorm_before", "before:layernorm_after"),
)
_DINOV2 = replace(
    _VIT,
    block="encoder.layer.{}",
    letters={  # the largest ones have a gated net
        **_VIT_LETTERS,
        "I": "mlp.fc1|mlp.up_proj",
        "G": "mlp.gate_proj",
        "O": "mlp.fc2|mlp.down_proj",
    },
    pooler="",
    feed_forward="layer_scale2",
    branches=("before:norm1", "before:norm2"),
)
_CLIP_VISION = Anatomy(
    block="encoder.layers.{}",
    letters={**_ATTENTION, "D": "self_attn.out_proj", "I": "mlp.fc1", "O": "mlp.fc2"},
    embedding="embeddings.patch_embedding",
    pooler="post_layernorm",
    pooling="pooler",
    feed_forward="mlp",
    branches=("before:layer_norm1", "before:layer_norm2"),
)

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
        branches=_BERT.branches,
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
        branches=("after:attention.dropout", "after:output.dropout"),
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
        branches=("after:attention", "after:ffn"),
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
        branches=("after:attention.output_dropout", "after:ffn_output"),
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
        branches=("before:ln_1", "before:ln_2"),
        language=(),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    **dict.fromkeys(("mbart", "pegasus"), _MBART),
    "marian": replace(_BART, computed="embed_positions"),
    **dict.fromkeys(("vit", "deit"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    # The image tower of each; `Base.load` takes it out of a model of two.
    "clip_vision_model": _CLIP_VISION,
    "siglip_vision_model": replace(_CLIP_VISION, pooler="head"),
}


def _whole(encoder: Anatomy, layers: str, letters: dict[str, str], **decoder: Any) -> Anatomy:
    """Both stacks, of the encoder's row and of what the decoder has more, or elsewhere."""
    return replace(
        encoder,
        block=f"encoder.{encoder.block}",
        # Three modules of one table in most; the encoder's own one reads the input.
        embedding="encoder.embed_tokens|shared|decoder.embed_tokens",
        stack="encoder",
        layers=layers,
        decoder=replace(
            encoder,
            block=f"decoder.{encoder.block}",
            letters={**encoder.letters, **letters},
            stack="decoder",
            **decoder,
        ),
    )


_T5_WHOLE = _whole(
    _T5,
    "num_layers",
    {
        "CQ": "layer.1.EncDecAttention.q",
        "CK": "layer.1.EncDecAttention.k",
        "CV": "layer.1.EncDecAttention.v",
        "CD": "layer.1.EncDecAttention.o",
        "I": "layer.2.DenseReluDense.wi|layer.2.DenseReluDense.wi_1",
        "G": "layer.2.DenseReluDense.wi_0",
        "O": "layer.2.DenseReluDense.wo",
    },
    feed_forward="layer.2.dropout",
    branches=("before:layer.0.layer_norm", "before:layer.2.layer_norm"),
)
_BART_CROSS = {
    "CQ": "encoder_attn.q_proj",
    "CK": "encoder_attn.k_proj",
    "CV": "encoder_attn.v_proj",
    "CD": "encoder_attn.out_proj",
}
_BART_WHOLE, _MBART_WHOLE = (
    _whole(row, "encoder_layers", _BART_CROSS, heads="decoder_attention_heads")
    for row in (_BART, _MBART)
)
# Of whole encoder-decoders: paths are those of the model that holds both stacks.
WHOLE: dict[str, Anatomy] = {
    **dict.fromkeys(("t5", "mt5"), _T5_WHOLE),
    "bart": _BART_WHOLE,
    **dict.fromkeys(("mbart", "pegasus"), _MBART_WHOLE),
    "marian": replace(_BART_WHOLE, computed="embed_positions"),
}


def anatomy_of(config: Any, whole: bool = False) -> Anatomy:
    """The row for a Hugging Face config; with `whole`, of an encoder-decoder and not its encoder.

    Raises UnknownArchitecture, with what is known.
    """
    kind, rows, name = str(config.model_type), ANATOMIES, "ANATOMIES"
    if whole:
        rows, name = WHOLE, "WHOLE"
    if kind not in rows:
        raise UnknownArchitecture(
            f"model type {kind!r} has no anatomy row, so its layers and matrices can't be named. "
            f"{near(kind, rows)} Add a row to howfine.architectures.{name}: it is a line."
        )
    row = rows[kind]
    if (groups := getattr(config, "num_hidden_groups", 1)) != 1:
        raise UnknownArchitecture(
            f"this {kind} has num_hidden_groups {groups}, and its row names the layers of one"
        )
    if row.decoder is None:
        return row
    return replace(row, decoder=replace(row.decoder, first=int(getattr(config, row.layers))))
