"""Coders for the two things a change is made of: places (a mask) and values.

Places are k True entries among n, flattened in row-major order. No code for a uniformly random mask
can beat log2 C(n, k) bits on average; a mask with structure can take far less. `encode_places`
encodes with every coding that can still win and keeps the smallest:

    none, all   no payload
    bits        the mask itself, eight entries a byte (the right one near k = n/2)
    rank        k ≤ 64: number of the k-subset in Cover's enumeration (1973), within a byte of the
                bound
    gaps        distances between places, entropy coded with the geometric law that n and k imply
    histogram   the same, with a stored law, for masks whose places cluster
    zlib        raw DEFLATE of bits, for masks that repeat

The rarer of True and False is what counts as a place; k says which. A param, where there is one, is
the number of columns of a mask that was transposed first because its columns cluster.

A gap is cut into a token, which names its octave and the leading bits in it, and the remaining raw
bits (as floating-point numbers are). Tokens and raw bits go onto one asymmetric-numeral-system
stack (Duda 2013), popped in the order of the places.
"""

# long: a coder and its decoder are read side by side.

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from constriction.stream.model import Categorical, Uniform
from constriction.stream.stack import AnsCoder

from howfine.errors import DamagedDelta, SettingError, near
