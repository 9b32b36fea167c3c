"""The noise contract, version 2, in Triton: words, normals, signs, rounding, and the values.

``docs/noise.md`` states the contract, and ``csrc/noise.h`` says what each line computes. Nothing
but add, multiply, ``tl.fma`` and integers: compile with ``enable_fp_fusion=False``, or a contracted
multiply changes the result. Words are ``tl.uint32`` throughout.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(8)  # elements of a Gaussian or rounding block
CALL = tl.constexpr(128)  # elements of a Rademacher call
ROUNDING_DOMAIN = tl.constexpr(0x80000000)

# Codes of zorba_kernels.noise.DISTRIBUTION_CODES.
GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
RANK1 = tl.constexpr(2)

ROW_DOMAIN = tl.constexpr(0xC0000000)
COLUMN_DOMAIN = tl.constexpr(0x80000000)

# Codes of zorba_kernels.table.DTYPE_CODES.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)

LOG_3 = tl.constexpr(float.fromhex("0x1.43e25cp-4"))
LOG_2 = tl.constexpr(float.fromhex("-0x1.42d802p-1"))
LOG_1 = tl.constexpr(float.fromhex("0x1.0b7faap+1"))
LOG_0 = tl.constexpr(float.fromhex("-0x1.8553ecp+1"))
LINE_1 = tl.constexpr(float.fromhex("-0x1p-23"))
LINE_0 = tl.constexpr(float.fromhex("0x1.2101a0p+7"))
ROOT_2 = tl.constexpr(float.fromhex("0x1.808ae0p-2"))
ROOT_1 = tl.constexpr(float.fromhex("-0x1.408d50p+0"))
ROOT_0 = tl.constexpr(float.fromhex("0x1.e06a9cp+0"))
COS_3 = tl.constexpr(float.fromhex("-0x1.705eaep-90"))
COS_2 = tl.constexpr(float.fromhex("0x1.308724p-58"))
COS_1 = tl.constexpr(float.fromhex("-0x1.73cb0cp-28"))
COS_0 = tl.constexpr(float.fromhex("0x1.2d6a3ap+0"))
DITHER = tl.constexpr(float.fromhex("0x1p-54"))
LIFT = tl.constexpr(float.fromhex("0x1p-14"))
SIN_2 = tl.constexpr(float.fromhex("0x1.5a8fa8p-74"))
SIN_1 = tl.constexpr(float.fromhex("-0x1.83166cp-43"))
SIN_0 = tl.constexpr(float.fromhex("0x1.d95234p-14"))


# --- Bits ----------------------------------------------------------------------------------------


@triton.jit
def as_float(bits):
    """The float32 of a pattern."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(value):
    """The pattern of a float32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def words_of(number):
    """Low and high word of an int64."""
    return number.to(tl.uint32), (number >> 32).to(tl.uint32)


# --- Words ---------------------------------------------------------------------------------------


@triton.jit
def philox(c0, c1, c2, c3, key_lo, key_hi):
    """Philox4x32-10: four words of each counter."""
    for _ in tl.static_range(10):
        # One multiplication gives both halves; tl.umulhi would take another one.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ key_lo
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_hi
        c1 = product2.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key_lo += 0x9E3779B9
        key_hi += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def interleave(w0, w1, w2, w3):
    """[n] each -> [n, 2, 2] with word 2 i + j at [:, i, j], in registers of the same thread."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


# --- Noise ---------------------------------------------------------------------------------------


@triton.jit
def box_muller(word):
    """Two standard normals of each word."""
    # Radius: bits 0 to 15, through a float whose arithmetic is exact.
    u = as_float((word & 0xFFFF) | 0x4B000000) - 8388607.5
    u_bits = as_bits(u)
    m = as_float((u_bits & 0x7FFFFF) | 0x3F800000)
    g = tl.fma(m, LOG_3, LOG_2)
    g = tl.fma(m, g, LOG_1)
    g = tl.fma(m, g, LOG_0)
    line = tl.fma(u_bits.to(tl.int32, bitcast=True).to(tl.float32), LINE_1, LINE_0)
    s = tl.fma(m, g, line)

    # The root without a root instruction, which differs between GPUs.
    y = as_float(0x5F3759DF - (as_bits(s) >> 1))
    t = s * y
    v = t * y
    p = tl.fma(v, tl.fma(v, ROOT_2, ROOT_1), ROOT_0)
    r = as_float(as_bits(t * p) ^ (word & 0x80000000))

    # Angle: bits 16 to 30; minimax polynomials for cos and sin.
    x = as_float(((word >> 15) & 0xFFFE) | 0x4A800000) - 4210687.5
    xx = x * x
    c = tl.fma(xx, COS_3, COS_2)
    c = tl.fma(xx, c, COS_1)
    c = tl.fma(xx, c, COS_0)
    d = tl.fma(xx, SIN_2, SIN_1)
    d = tl.fma(xx, d, SIN_0)
    return r * c, r * (x * d)


@triton.jit
def gaussian(block, stream_lo, stream_hi, sample, seed_lo, seed_hi):
    """Blocks [n] -> z [n, 8], a row in one thread."""
    # Both normals of a word stay in the thread that made it: no exchange before the store.
    w0, w1, w2, w3 = philox(block, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    first, second = box_muller(interleave(w0, w1, w2, w3))
    return tl.reshape(tl.join(first, second), [block.shape[0], BLOCK])


@triton.jit
def sign_words(call, stream_lo, stream_hi, sample, seed_lo, seed_hi):
    """Calls [n] -> their words in order, [4 n], for the signs of 32 elements each."""
    w0, w1, w2, w3 = philox(call, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    return tl.reshape(interleave(w0, w1, w2, w3), [4 * call.shape[0]])


@triton.jit
def sign_bytes(words):
    """[n] -> [4 n]: the signs of each block of 8 in the low byte, and more above it."""
    bytes_ = words[:, None] >> (8 * tl.arange(0, 4))[None, :]
    return tl.reshape(bytes_, [4 * words.shape[0]])


@triton.jit
def sign_bits(byte):
    """[n], signs of 8 elements in the low byte -> [n, 8] with the sign of each in bit 31."""
    return (byte[:, None] << (31 - tl.arange(0, BLOCK))[None, :]) & 0x80000000


@triton.jit
def word_at(number, domain, stream_lo, stream_hi, sample, seed_lo, seed_hi):
    """The signs of rows or columns [32 number, 32 number + 32), a bit each."""
    call = (number // 4).to(tl.uint32) + domain
    w0, w1, w2, w3 = philox(call, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    which = number % 4
    low = tl.where(which == 0, w0, w1)
    high = tl.where(which == 2, w2, w3)
    return tl.where(which < 2, low, high)


@triton.jit
def rank1_piece(row, column, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi):
    """The signs of a row's elements from ``column`` on, up to those of the next 32 columns."""
    # A vector is a row whose columns have the signs of rows, and no sign of its own.
    domain = tl.where(columns == 0, ROW_DOMAIN, COLUMN_DOMAIN).to(tl.uint32)
    v = word_at(column // 32, domain, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    u = word_at(row // 32, ROW_DOMAIN, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    u = (u >> (row % 32).to(tl.uint32)) & 1
    return (v >> (column % 32).to(tl.uint32)) ^ tl.where(columns == 0, 0, 0 - u)


@triton.jit
def rank1_words(word, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi):
    """Words [n], of 32 elements each -> their signs; ``columns`` 0: the parameter is a vector."""
    width = tl.where(columns == 0, 1 << 40, columns)  # longer than any parameter
    row = word * 32 // width
    column = word * 32 - row * width
    signs = rank1_piece(row, column, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    # Where rows are whole words that was all. Otherwise a piece ends with its row, or with the word
    # of its columns: at most 3 pieces make 32 elements of rows of 32 and more.
    done = tl.zeros_like(word)
    further = tl.where(columns % 32 == 0, 0, 30 // width + 2).to(tl.int32)
    for _ in range(further):
        count = tl.minimum(32 - column % 32, width - column)
        done += count
        column += count
        row += tl.where(column == width, 1, 0)
        column = tl.where(column == width, 0, column)
        piece = rank1_piece(row, column, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        # What a piece has behind its end is of no meaning, and the next one covers it.
        at = tl.minimum(done, 31).to(tl.uint32)
        kept = (tl.full([], 1, tl.uint32) << at) - 1
        signs = tl.where(done < 32, (signs & kept) | (piece << at), signs)
    return signs


# --- Rounding ------------------------------------------------------------------------------------


@triton.jit
def rounding_start(weight, dither, DTYPE: tl.constexpr):
    """What the sum of a stochastic round starts from."""
    scale = as_bits(weight) & 0x7F000000
    # Half's subnormals land on steps of 2^-37, whatever their exponent.
    if DTYPE == FLOAT16:
        scale = tl.maximum(scale, 0x38000000)
    return as_float(scale) * dither


@triton.jit
def rounding_dither(first, second):
    """Dither of a block with two rounding words."""
    return (first + second).to(tl.int32, bitcast=True).to(tl.float32) * DITHER


@triton.jit
def rounding_bits(first, second):
    """Rounding words [n] each -> 16 random bits of each element, [n, 8].

    The element's own byte of the word on top, the next byte below.
    """
    word = tl.join(first, second)[:, :, None]
    # Not through a reversal of the bytes: LLVM makes a vector bswap of it, which sm_100 cannot do.
    own = 8 * tl.arange(0, 4)[None, None, :]
    following = 8 * ((tl.arange(0, 4) + 1) % 4)[None, None, :]
    bits = (((word >> own) & 0xFF) << 8) | ((word >> following) & 0xFF)
    return tl.reshape(bits, [first.shape[0], BLOCK])


@triton.jit
def round_stochastic(value, random16, DTYPE: tl.constexpr):
    """One of the two neighbours of a float32 in the 16-bit dtype, as stored: int16."""
    # Integers do the cut: a conversion would round a second time.
    bits = as_bits(value)
    if DTYPE == BFLOAT16:
        rounded = tl.where(value == value, bits + random16, 0x7FC00000)
        stored = (rounded >> 16).to(tl.int16)
    else:
        size = bits & 0x7FFFFFFF
        # Below 2^-14 the half grid is even: the lift puts its step at bit 13, as for normal halves.
        lift = tl.where(size < 0x38800000, LIFT, 0.0)
        cut = (as_bits(as_float(size) + lift) + (random16 >> 3)) & 0xFFFFE000
        rounded = as_bits(as_float(cut) - lift)
        rounded = tl.where(rounded >= 0x47800000, 0x7F800000, rounded) | (bits & 0x80000000)
        rounded = tl.where(size > 0x7F800000, 0x7FC00000, rounded)
        stored = as_float(rounded).to(tl.float16).to(tl.int16, bitcast=True)  # exact
    return stored


# --- Storage -------------------------------------------------------------------------------------


@triton.jit
def widen(stored, DTYPE: tl.constexpr):
    """Bits as stored (int16, or int32 for float32) -> float32."""
    # float16 through the hardware's conversion, which is exact on every GPU; bfloat16 by a shift.
    if DTYPE == FLOAT32:
        value = stored.to(tl.float32, bitcast=True)
    elif DTYPE == BFLOAT16:
        value = as_float(stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        value = stored.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def round_nearest(value, DTYPE: tl.constexpr):
    """The nearest value of the dtype (ties to even), as stored."""
    if DTYPE == FLOAT32:
        stored = value.to(tl.int32, bitcast=True)
    elif DTYPE == BFLOAT16:
        stored = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        stored = value.to(tl.float16).to(tl.int16, bitcast=True)
    return stored


# --- The values ----------------------------------------------------------------------------------


# Types are given and values not specialised on, so that no argument leads to another compilation.
@triton.jit(
    do_not_specialize=[
        "out", "numel", "offset", "columns", "seed_lo", "seed_hi", "stream_lo", "stream_hi",
        "sample",
    ]
)  # fmt: skip
def noise(
    out: "*fp32", numel: "i64", offset: "i64", columns: "i64",
    seed_lo: "u32", seed_hi: "u32", stream_lo: "u32", stream_hi: "u32", sample: "u32",
    DISTRIBUTION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[i] = z(seed, stream, sample, offset + i); a program makes BLOCKS blocks of 8."""
    stream_lo = stream_lo.to(tl.uint32)
    stream_hi = stream_hi.to(tl.uint32)
    sample = sample.to(tl.uint32)
    seed_lo = seed_lo.to(tl.uint32)
    seed_hi = seed_hi.to(tl.uint32)
    # Aligned in the whole parameter, so that a program makes whole Philox calls.
    first = (offset.to(tl.int64) // (BLOCK * BLOCKS) + tl.program_id(0)) * BLOCKS
    if DISTRIBUTION == GAUSSIAN:
        block = (first + tl.arange(0, BLOCKS)).to(tl.uint32)
        z = gaussian(block, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    elif DISTRIBUTION == RANK1:
        word = first // 4 + tl.arange(0, BLOCKS // 4)
        columns = tl.full([], 0, tl.int64) + columns  # the interpreter counts with plain integers
        words = rank1_words(word, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        z = as_float(sign_bits(sign_bytes(words)) | 0x3F800000)
    else:
        RATIO: tl.constexpr = CALL // BLOCK
        call = (first // RATIO + tl.arange(0, BLOCKS // RATIO)).to(tl.uint32)
        words = sign_words(call, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        z = as_float(sign_bits(sign_bytes(words)) | 0x3F800000)
    at = (first + tl.arange(0, BLOCKS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :] - offset
    tl.store(out + at, z, (at >= 0) & (at < numel))
