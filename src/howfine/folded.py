"""The folded layout: a small delta file whose header and index cost as little as they can.

One run of bytes: checksum, the base's fingerprint, header and index deflated together against a
dictionary of the words that they are made of, and all payloads. docs/format.md says what MUST be
where. Nothing here knows what the payloads mean.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from typing import Any

CHECK, BASE = 8, 16  # bytes
# Header and index beyond this are not folded, nor inflated.
MOST_TEXT = 1 << 20
# Column of an index row that holds the payload's length; from _PARAMS on, the coding's params.
_LENGTH, _PARAMS = 3, 5
_FINGERPRINT = re.compile("[0-9a-f]{32}([0-9a-f]{32})?")

# Part of the format: whoever changes a byte of it makes every folded file unreadable. What is most
# common comes last, where DEFLATE refers to it in the fewest bits.
_WORDS = """
"kind":"seq2seq","encoder","decoder","towers",{"image":{"text":"image.vision_model.encoder.layers.
false,true,null,"float32","bfloat16","perplexity","loss","bleu","rouge","recall@1","f1","combined"
"pearson_spearman","unacceptable","acceptable"],["not_equivalent","equivalent"],["not_duplicate",
"duplicate"],["contradiction","neutral"],["entailment","not_entailment"],"contrastive":{"text":
"language_model":{"multiple_choice":{"label_embedding":{"verbalizer":{"template":"words":{"length":
"prefix":{"prompt":{"adapter":{"placement":"prune":{"lora":{"rank":8,"alpha":16,"graft":{"diff":{
"head","layer","global","tensor","column","granularity":"row","scope":"variant":"threshold":
"temperature":"density":0.01,"sparsity":0.9,"initial_sparsity":0.0,"freeze":["embeddings"],"top":1
"map_seed":1,"sharing":"letter","none"],"size":16,"map":"random","tiny-lora","subspace":{"rank":2,
"regrow":0.1,"saliency","movement","start","by":"magnitude","fisher","gradient","full":{},"norm"
"sparse":{"where":["matrices","bias"],"density":0.0001,"select":{"train":["bias","LayerNorm","layer@-1"]}},"mask":{"where":["matrices@-2,-1","matrices"]}},
bert-base-uncased","roberta-base","gpt2","t5-small","distilbert-base-uncased","all-MiniLM-L6-v2","
mrpc/qqp/qnli/rte/wnli/stsb/mnli/cola/dev",[-0.0,0.1],"sst2/validation",[0.9,0.95],872]"matthews",
"method/text.decoder.block.0.layer.0.SelfAttention.q.weight",[512,"method/text.h.0.attn.c_attn.bias
.mlp.c_fc.c_proj.weight",[768,3072],[3072,768],[768],"grid","histogram","zlib","bits","rank","none",
"all",0,0],["readout/scale",[],"method/text.embeddings.word_embeddings.weight",[30522,384],
position_embeddings.weight",[512,384],token_type_embeddings."method/text.pooler.dense.weight",
"bf16","fp32","int8","int6","int3","int2","sign","int4",48,1,0.00"method/text.embeddings.LayerNorm.
weight",[384],"steps",384,1,0.000"method/text.encoder.layer.1.attention.self.key.weight",[384,384],
.attention.self.value.bias",[384],.attention.self.query.bias",[384],.attention.output.LayerNorm.
.attention.output.dense.weight",.intermediate.dense.bias",[1536],.intermediate.dense.weight",
[1536,384],.output.dense.weight",[384,1536],.output.dense.bias",[384],.output.LayerNorm.bias",[384],
[{"base":"minilm","method":{"},"readout":{"classifier":{"dropout":0.0,"pooling":"cls","max_length":
128{"pooling":"mean","max_length":64}},"labels":["no","yes"],["negative","positive"],"score":["
accuracy",0.7,[0.75,0.8],"rotten_tomatoes/test",1066]},[["method/*fffff",[10645632],"gaps",100,1],[
"",[],"steps",10,1,0.00],["readout/linear.weight",[2,384],"fp16h",1300,0],["readout/linear.bias",[2],
"fp16",4,0]]]
"""
DICTIONARY = _WORDS.replace("\n", "").encode()


def fold(header: dict[str, Any], rows: list[list[Any]], payloads: bytes) -> bytes | None:
    """The bytes for a header, index rows and the payloads in their order; None if they don't suit.

    The header has the base's fingerprint under "sha256", 32 or 64 hexadecimal digits, of which 32
    are kept.
    """
    fingerprint = header.get("sha256")
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        return None
    rest = {key: value for key, value in header.items() if key != "sha256"}
    short = [[*row[:_PARAMS], *map(_shortest, row[_PARAMS:])] for row in rows]
    text = json.dumps([rest, short], separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > MOST_TEXT:
        return None
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    checked = bytes.fromhex(fingerprint)[:BASE] + deflater.compress(text) + deflater.flush()
    return _check(checked + payloads) + checked + payloads


def unfold(data: bytes) -> tuple[dict[str, Any], list[list[Any]], list[bytes]]:
    """(header, index rows, a payload for each row). ValueError for what `fold` cannot have made."""
    check, fingerprint, rest = data[:CHECK], data[CHECK : CHECK + BASE], data[CHECK + BASE :]
    if check != _check(data[CHECK:]):
        raise ValueError("its checksum does not fit")
    inflater = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        text = inflater.decompress(rest, MOST_TEXT)
    except zlib.error as error:
        raise ValueError(f"its header can't be inflated: {error}") from None
    if not inflater.eof:
        raise ValueError("its header is not one whole deflated text of bounded size")
    found = json.loads(text)
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], dict):
        raise ValueError("its header is none")
    header, rows = {"sha256": fingerprint.hex(), **found[0]}, found[1]
    if "sha256" in found[0] or not isinstance(rows, list):
        raise ValueError("its header is none")
    for row in rows:
        if not isinstance(row, list) or len(row) < _PARAMS or type(row[_LENGTH]) is not int:
            raise ValueError("a row of its index is none")
        row[_PARAMS:] = map(_widened, row[_PARAMS:])
    return header, rows, _cut(inflater.unused_data, [row[_LENGTH] for row in rows])


def overhead(data: bytes) -> int:
    """Bytes of the deflated header and index in what `unfold` can read."""
    inflater = zlib.decompressobj(-15, zdict=DICTIONARY)
    inflater.decompress(data[CHECK + BASE :], MOST_TEXT)
    return len(data) - CHECK - BASE - len(inflater.unused_data)


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:CHECK]


def _cut(payloads: bytes, lengths: list[int]) -> list[bytes]:
    if min(lengths, default=0) < 0 or sum(lengths) != len(payloads):
        raise ValueError(f"{len(payloads)} bytes of payloads, where its index has {sum(lengths)}")
    found, start = [], 0
    for length in lengths:
        found.append(payloads[start : start + length])
        start += length
    return found


def _shortest(param: Any) -> Any:
    """A float32 as the shortest decimal that is nearer to it than to any other float32."""
    if not isinstance(param, float):
        return param
    decimals = (float(f"{param:.{digits}g}") for digits in range(1, 10))
    return next((short for short in decimals if _widened(short) == param), param)


def _widened(param: Any) -> Any:
    """The float32 nearest to a float; anything else, and what no float32 is near, as it is."""
    if not isinstance(param, float):
        return param
    try:
        return struct.unpack("<f", struct.pack("<f", param))[0]
    except OverflowError:
        return param
