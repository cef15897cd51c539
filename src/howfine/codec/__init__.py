"""Coders for the two things a change is made of: places (a mask) and values.

Places are k True entries among n, in row-major order. No code for uniformly random masks can beat
log2 C(n, k) bits on average; a mask with structure may take far less. `encode_places` keeps the
smallest of

    none, all   no payload
    bits        the mask itself, eight entries a byte: right near k = n/2
    rank        up to 127 places: the set's number in an enumeration of all such sets (Cover 1973)
    gaps        distances between places, entropy coded under the geometric law of n and k
    histogram   the same under a stored law, for places that come in runs or bursts
    grid        gaps within classes of rows and columns, for a matrix whose rows or columns differ;
                its one param is the number of rows
    zlib        raw DEFLATE of bits, for masks that repeat

Whichever of True and False is rarer counts as a place; the stored head says which.

A gap is cut into a token (its octave and the leading bits in it) and the raw bits below, much as a
floating-point number is. Tokens and raw bits go onto one asymmetric-numeral-system stack (Duda
2013) in chunks, so that a decoder holds little more than the mask.

Values are floats in one of PRECISIONS, raw under that name: fp32, fp16, bf16; intB, symmetric
steps of B bits times a scale; sign, one bit. Where their entropy is smaller they are

    steps       steps of any intB, under a law with one parameter in one byte, or with a table
    fp16h       fp16 with exponents and leading bits of mantissas under a stored law

and VALUES names both kinds. Their params are the scales: one, or one for each part.

Only the padding after the last bit of a DEFLATE stream escapes the decoders: zlib hides it.
"""

from howfine.codec.coded import PRECISIONS, VALUES, Coded
from howfine.codec.counting import count_places
from howfine.codec.places import combinatorial_bits, decode_places, encode_places
from howfine.codec.steps import entropy_bits
from howfine.codec.values import (
    decode_values,
    encode_nonzero,
    encode_steps_of,
    encode_values,
    rounded,
)

__all__ = [
    "PRECISIONS",
    "VALUES",
    "Coded",
    "combinatorial_bits",
    "count_places",
    "decode_places",
    "decode_values",
    "encode_nonzero",
    "encode_places",
    "encode_steps_of",
    "encode_values",
    "entropy_bits",
    "rounded",
]
