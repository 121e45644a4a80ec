// The fused operations of the decoder on a GPU, named as launch.rs names them. All tensors are contiguous. Where one
// block works on one row, the row is the block's number; else one thread works on one element.
#include "portable.h"

// ---- Reductions over a block ----

// Sum over the block, the same in every thread; `shared` has THREADS places and may be used again at once.
DEVICE F32 block_sum(F32 value, SHARED_POINTER F32 *shared) {
  shared[THREAD] = value;
  BARRIER;
  for (U32 step = THREADS / 2; step > 0; step /= 2) {
    if (THREAD < step) {
      shared[THREAD] += shared[THREAD + step];
    }
    BARRIER;
  }
  F32 sum = shared[0];
  BARRIER;
  return sum;
}

// Largest value of the block; NaN is passed over.
DEVICE F32 block_max(F32 value, SHARED_POINTER F32 *shared) {
  shared[THREAD] = value;
  BARRIER;
  for (U32 step = THREADS / 2; step > 0; step /= 2) {
    if (THREAD < step) {
      shared[THREAD] = FMAX(shared[THREAD], shared[THREAD + step]);
    }
    BARRIER;
  }
  F32 largest = shared[0];
  BARRIER;
  return largest;
}

// ---- RMSNorm ----

DEVICE F32 inverse_rms(F32 squares, U32 width, F32 eps) { return 1.0f / SQRT(squares / (F32)width + eps); }

// y = x * weight / sqrt(mean(x^2) + eps), row by row.
KERNEL void rms_norm(GLOBAL const F32 *RESTRICT x, GLOBAL const F32 *RESTRICT weight, GLOBAL F32 *RESTRICT y, U32 width,
                     F32 eps) {
  SHARED F32 shared[THREADS];
  GLOBAL const F32 *row = x + (U64)BLOCK * width;
  F32 squares = 0.0f;
  for (U32 i = THREAD; i < width; i += THREADS) {
    squares += row[i] * row[i];
  }
  F32 scale = inverse_rms(block_sum(squares, shared), width, eps);
  for (U32 i = THREAD; i < width; i += THREADS) {
    y[(U64)BLOCK * width + i] = row[i] * scale * weight[i];
  }
}

// dx of the above: s dy w - x s^3 mean(x dy w), with s the inverse root.
KERNEL void rms_norm_grad(GLOBAL const F32 *RESTRICT x, GLOBAL const F32 *RESTRICT weight, GLOBAL const F32 *RESTRICT dy,
                          GLOBAL F32 *RESTRICT dx, U32 width, F32 eps) {
  SHARED F32 shared[THREADS];
  U64 at = (U64)BLOCK * width;
  F32 squares = 0.0f, dot = 0.0f;
  for (U32 i = THREAD; i < width; i += THREADS) {
    squares += x[at + i] * x[at + i];
    dot += x[at + i] * dy[at + i] * weight[i];
  }
  F32 s = inverse_rms(block_sum(squares, shared), width, eps);
  F32 k = block_sum(dot, shared) * s * s * s / (F32)width;
  for (U32 i = THREAD; i < width; i += THREADS) {
    dx[at + i] = dy[at + i] * weight[i] * s - x[at + i] * k;
  }
}

// ---- Rotary embedding ----

// Rotates the pairs (i, i + half) of every head by its token's angle times `sign`; `pairs` is tokens * heads * half.
KERNEL void rope(GLOBAL const F32 *RESTRICT x, GLOBAL const F32 *RESTRICT cosines, GLOBAL const F32 *RESTRICT sines,
                 GLOBAL F32 *RESTRICT y, U32 pairs, U32 heads, U32 half_dim, F32 sign) {
  U32 i = INDEX;
  if (i >= pairs) {
    return;
  }
  U32 k = i % half_dim, head = i / half_dim, token = head / heads;
  U64 at = (U64)head * 2 * half_dim + k;
  F32 c = cosines[(U64)token * half_dim + k], s = sines[(U64)token * half_dim + k] * sign;
  F32 a = x[at], b = x[at + half_dim];
  y[at] = a * c - b * s;
  y[at + half_dim] = b * c + a * s;
}

// ---- Gated linear units: activation(gate) * up; `gelu` is 0 for SiLU and 1 for GELU in its tanh form ----

DEVICE F32 sigmoid(F32 v) { return 1.0f / (1.0f + EXP(-v)); }

// tanh(sqrt(2 / pi) (x + 0.044715 x^3))
DEVICE F32 gelu_tanh(F32 x) { return TANH(0.7978845608028654f * (x + 0.044715f * x * x * x)); }

DEVICE F32 activation(F32 x, U32 gelu) {
  if (gelu) {
    return 0.5f * x * (1.0f + gelu_tanh(x));
  }
  return x * sigmoid(x);
}

DEVICE F32 activation_slope(F32 x, U32 gelu) {
  if (gelu) {
    F32 t = gelu_tanh(x);
    F32 inner = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
  }
  F32 s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

KERNEL void gated(GLOBAL const F32 *RESTRICT gate, GLOBAL const F32 *RESTRICT up, GLOBAL F32 *RESTRICT y, U32 count,
                  U32 gelu) {
  U32 i = INDEX;
  if (i < count) {
    y[i] = activation(gate[i], gelu) * up[i];
  }
}

// The gradient in the gate, and behind its `count` values that in up.
KERNEL void gated_grad(GLOBAL const F32 *RESTRICT gate, GLOBAL const F32 *RESTRICT up, GLOBAL const F32 *RESTRICT dy,
                       GLOBAL F32 *RESTRICT both, U32 count, U32 gelu) {
  U32 i = INDEX;
  if (i < count) {
    both[i] = dy[i] * up[i] * activation_slope(gate[i], gelu);
    both[(U64)count + i] = dy[i] * activation(gate[i], gelu);
  }
}

// ---- Soft cap: y = cap * tanh(x / cap) ----

KERNEL void soft_cap(GLOBAL const F32 *RESTRICT x, GLOBAL F32 *RESTRICT y, U32 count, F32 cap) {
  U32 i = INDEX;
  if (i < count) {
    y[i] = cap * TANH(x[i] / cap);
  }
}

KERNEL void soft_cap_grad(GLOBAL const F32 *RESTRICT y, GLOBAL const F32 *RESTRICT dy, GLOBAL F32 *RESTRICT dx,
                          U32 count, F32 cap) {
  U32 i = INDEX;
  if (i < count) {
    F32 t = y[i] / cap;
    dx[i] = dy[i] * (1.0f - t * t);
  }
}

// ---- Cross-entropy ----

DEVICE F32 row_max(GLOBAL const F32 *row, U32 width, SHARED_POINTER F32 *shared) {
  F32 largest = LOWEST;
  for (U32 i = THREAD; i < width; i += THREADS) {
    largest = FMAX(largest, row[i]);
  }
  return block_max(largest, shared);
}

// log(sum(exp(row - largest)))
DEVICE F32 log_sum(GLOBAL const F32 *row, U32 width, F32 largest, SHARED_POINTER F32 *shared) {
  F32 sum = 0.0f;
  for (U32 i = THREAD; i < width; i += THREADS) {
    sum += EXP(row[i] - largest);
  }
  return LOG(block_sum(sum, shared));
}

// Negative log-likelihood of each row's target, which the host has checked.
KERNEL void cross_entropy(GLOBAL const F32 *RESTRICT logits, GLOBAL const U32 *RESTRICT targets,
                          GLOBAL F32 *RESTRICT losses, U32 vocabulary) {
  SHARED F32 shared[THREADS];
  GLOBAL const F32 *row = logits + (U64)BLOCK * vocabulary;
  F32 largest = row_max(row, vocabulary, shared);
  F32 rest = log_sum(row, vocabulary, largest, shared);
  if (THREAD == 0) {
    losses[BLOCK] = (largest - row[targets[BLOCK]]) + rest;
  }
}

// The gradient of the mean loss times dy[0]: (softmax - one at the target) dy / rows. Nothing but it is written.
KERNEL void cross_entropy_grad(GLOBAL const F32 *RESTRICT logits, GLOBAL const U32 *RESTRICT targets,
                               GLOBAL const F32 *RESTRICT dy, GLOBAL F32 *RESTRICT dx, U32 vocabulary, U32 rows) {
  SHARED F32 shared[THREADS];
  U64 at = (U64)BLOCK * vocabulary;
  F32 largest = row_max(logits + at, vocabulary, shared);
  F32 rest = log_sum(logits + at, vocabulary, largest, shared);
  F32 scale = dy[0] / (F32)rows;
  U32 target = targets[BLOCK];
  for (U32 i = THREAD; i < vocabulary; i += THREADS) {
    F32 share = scale * EXP(logits[at + i] - largest - rest);
    dx[at + i] = i == target ? share - scale : share;
  }
}

// One block: the mean of `count` values.
KERNEL void mean(GLOBAL const F32 *RESTRICT x, GLOBAL F32 *RESTRICT y, U32 count) {
  SHARED F32 shared[THREADS];
  F32 sum = 0.0f;
  for (U32 i = THREAD; i < count; i += THREADS) {
    sum += x[i];
  }
  sum = block_sum(sum, shared);
  if (THREAD == 0) {
    y[0] = sum / (F32)count;
  }
}

// ---- Attention: softmax over the keys a query sees; rows are [sequence, head, query], columns are keys ----

DEVICE F32 capped(F32 score, F32 scale, F32 cap) {
  return cap > 0.0f ? cap * TANH(score * scale / cap) : score * scale;
}

// `common` columns come before each sequence's padding; query i stands at column offset + i; `window` 0 is none.
KERNEL void attention_weights(GLOBAL const F32 *RESTRICT scores, GLOBAL const U32 *RESTRICT left_pad,
                              GLOBAL F32 *RESTRICT weights, U32 keys, U32 queries, U32 rows_of_sequence, U32 offset,
                              U32 common, U32 window, F32 scale, F32 cap) {
  SHARED F32 shared[THREADS];
  U64 at = (U64)BLOCK * keys;
  U32 own = offset + BLOCK % queries, pad = left_pad[BLOCK / rows_of_sequence];
  // Padding; a padding query sees itself, so that its softmax is defined.
  U32 end = common + pad < own ? common + pad : own, begin = common < end ? common : end;
  U32 first = 0;
  if (window > 0 && own < common) {
    first = own + 1 > window ? own + 1 - window : 0;
  } else if (window > 0 && own >= common + pad) {
    first = own - pad + 1 > window ? own - pad + 1 - window : 0;
    first = first > common ? first + pad : first;
  }
#define SEEN(j) ((j) >= first && (j) <= own && !((j) >= begin && (j) < end))
  F32 largest = LOWEST;
  for (U32 j = THREAD; j < keys; j += THREADS) {
    if (SEEN(j)) {
      largest = FMAX(largest, capped(scores[at + j], scale, cap));
    }
  }
  largest = block_max(largest, shared);
  F32 sum = 0.0f;
  for (U32 j = THREAD; j < keys; j += THREADS) {
    F32 e = SEEN(j) ? EXP(capped(scores[at + j], scale, cap) - largest) : 0.0f;
    weights[at + j] = e;
    sum += e;
  }
  F32 inverse = 1.0f / block_sum(sum, shared);
  for (U32 j = THREAD; j < keys; j += THREADS) {
    weights[at + j] *= inverse;
  }
#undef SEEN
}

// The gradient in the scores: scale w (dw - sum(w dw)), times the cap's slope where there is one.
KERNEL void attention_weights_grad(GLOBAL const F32 *RESTRICT scores, GLOBAL const F32 *RESTRICT weights,
                                   GLOBAL const F32 *RESTRICT dweights, GLOBAL F32 *RESTRICT dscores, U32 keys,
                                   F32 scale, F32 cap) {
  SHARED F32 shared[THREADS];
  U64 at = (U64)BLOCK * keys;
  F32 dot = 0.0f;
  for (U32 j = THREAD; j < keys; j += THREADS) {
    dot += weights[at + j] * dweights[at + j];
  }
  dot = block_sum(dot, shared);
  for (U32 j = THREAD; j < keys; j += THREADS) {
    F32 d = scale * weights[at + j] * (dweights[at + j] - dot);
    if (cap > 0.0f) {
      F32 t = TANH(scores[at + j] * scale / cap);
      d *= 1.0f - t * t;
    }
    dscores[at + j] = d;
  }
}

// ---- NF4 ----

#define NF4_TABLE 16
#define NF4_MAP 256
// 8 values a word, 64 values a scale, 256 scales a second-level scale.
#define NF4_WORDS_OF_SCALE 8
#define NF4_SCALES_OF_SCALE 256

// The eight values of word `at`: the first of a pair is in the high half of its byte. `tables` holds the codebook, the
// map of scale codes, and the second-level scales.
DEVICE void nf4_values(U32 word, U32 at, GLOBAL const U8 *codes, GLOBAL const F32 *tables, SHARED_POINTER F32 *codebook,
                       F32 offset, F32 *values) {
  U32 block = at / NF4_WORDS_OF_SCALE;
  F32 second = tables[NF4_TABLE + NF4_MAP + block / NF4_SCALES_OF_SCALE];
  F32 scale = tables[NF4_TABLE + codes[block]] * second + offset;
  for (U32 i = 0; i < 4; i++) {
    U32 byte = word >> (8 * i);
    values[2 * i] = codebook[(byte >> 4) & 15] * scale;
    values[2 * i + 1] = codebook[byte & 15] * scale;
  }
}

#define NF4_KERNEL(NAME, VECTOR, STORE)                                                                                \
  KERNEL void NAME(GLOBAL const U32 *RESTRICT packed, GLOBAL const U8 *RESTRICT codes,                                 \
                   GLOBAL const F32 *RESTRICT tables, GLOBAL VECTOR *RESTRICT out, U32 words, F32 offset) {            \
    SHARED F32 codebook[NF4_TABLE];                                                                                    \
    if (THREAD < NF4_TABLE) {                                                                                          \
      codebook[THREAD] = tables[THREAD];                                                                               \
    }                                                                                                                  \
    BARRIER;                                                                                                           \
    U32 at = INDEX;                                                                                                    \
    if (at < words) {                                                                                                  \
      F32 v[8];                                                                                                        \
      nf4_values(packed[at], at, codes, tables, codebook, offset, v);                                                  \
      STORE                                                                                                            \
    }                                                                                                                  \
  }

#define PAIR(a, b) (bf16_bits(a) | bf16_bits(b) << 16)

NF4_KERNEL(nf4_to_f32, F32X4, out[2 * (U64)at] = MAKE_F32X4(v[0], v[1], v[2], v[3]);
           out[2 * (U64)at + 1] = MAKE_F32X4(v[4], v[5], v[6], v[7]);)

NF4_KERNEL(nf4_to_bf16, U32X4, out[at] = MAKE_U32X4(PAIR(v[0], v[1]), PAIR(v[2], v[3]), PAIR(v[4], v[5]),
                                                    PAIR(v[6], v[7]));)

// ---- Dropout of an adapter's input, as random.rs draws it ----

// SplitMix64's output function.
DEVICE U64 mix(U64 z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ul;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebul;
  return z ^ (z >> 31);
}

#define GOLDEN 0x9e3779b97f4a7c15ul

// Zero where the element's 53 random bits are below `below`, else x * kept; `state` is the hash of the seed.
KERNEL void dropout(GLOBAL const F32 *RESTRICT x, GLOBAL F32 *RESTRICT y, U32 count, U32 width, U64 state, U64 below,
                    F32 kept) {
  U32 i = INDEX;
  if (i >= count) {
    return;
  }
  U64 row = mix(state ^ mix((U64)(i / width) + GOLDEN));
  U64 bits = mix(row + ((U64)(i % width) + 1) * GOLDEN) >> 11;
  y[i] = bits < below ? x[i] * 0.0f : x[i] * kept;
}
