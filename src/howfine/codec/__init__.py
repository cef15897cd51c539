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

Only the padding after the last bit of a DEFLATE stream escapes the decoders: zlib hides it.
"""

from howfine.codec.coded import PRECISIONS, Coded
from howfine.codec.places import combinatorial_bits, decode_places, encode_places
from howfine.codec.values import decode_values, encode_values

__all__ = [
    "PRECISIONS",
    "Coded",
    "combinatorial_bits",
    "decode_places",
    "decode_values",
    "encode_places",
    "encode_values",
]
