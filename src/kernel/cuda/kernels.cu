// Scoring and steering of residual-stream rows where they live; launch.rs says what each kernel is launched with.
//
// A team of threads works on each row, and a block has THREADS / team teams. A thread takes VECTOR neighbouring elements
// at a time, those of its team side by side. Kernels ending in `_wide` load and store 16 bytes at once: address, stride
// and width are multiples of 16 bytes and of VECTOR. They keep up to KEPT times VECTOR elements a thread in registers
// between scoring and editing, so each row is read once; the others, and longer rows, read again what is not kept, and
// so does a block with a row whose sum of squares f32 cannot hold or whose edit comes near the end of the dtype's range.
#include "portable.h"

#define VECTOR 8
#define KEPT 4
#define LEAST_TEAM 64
#define TEAMS (THREADS / LEAST_TEAM)

// As `Dtype`.
#define DTYPE_F32 1
#define DTYPE_F16 2
#define DTYPE_BF16 3

// As `RowStatus`.
#define ROW_OK 0
#define ROW_NON_FINITE 1
#define ROW_GATED 2
#define ROW_LIMITED 3
#define ROW_BAD_STRENGTH 4

#define UNIT_RAW 2

#define SUBTRACT 1
#define PROJECT_OUT 2
#define CLAMP 3

#define NOT_A_NUMBER F32_OF_BITS(0x7fc00000u)
#define FINITE(x) ((BITS_OF_F32(x) & 0x7f800000u) != 0x7f800000u)

// ---- Elements ----

DEVICE F32 widened(U32 dtype, U32 bits) { return dtype == DTYPE_BF16 ? F32_OF_BITS(bits << 16) : f32_of_f16((U16)bits); }

DEVICE U32 narrowed(U32 dtype, F32 value) { return dtype == DTYPE_BF16 ? bf16_bits(value) : (U32)f16_of_f32(value); }

DEVICE void words_of(U32X4 from, U32 *words) {
  words[0] = from.x;
  words[1] = from.y;
  words[2] = from.z;
  words[3] = from.w;
}

// VECTOR elements from `at` on, as floats; what lies beyond the row is 0.
DEVICE void load(U32 dtype, U32 wide, GLOBAL const void *row, U32 at, U32 width, F32 *values) {
  U32 words[VECTOR];
  if (wide && dtype == DTYPE_F32) {
    GLOBAL const U32X4 *from = (GLOBAL const U32X4 *)((GLOBAL const U32 *)row + at);
    words_of(from[0], words);
    words_of(from[1], words + 4);
    for (U32 i = 0; i < VECTOR; i++) {
      values[i] = F32_OF_BITS(words[i]);
    }
  } else if (wide) {
    words_of(*(GLOBAL const U32X4 *)((GLOBAL const U16 *)row + at), words);
    for (U32 i = 0; i < VECTOR; i++) {
      values[i] = widened(dtype, (words[i / 2] >> (16 * (i % 2))) & 0xffffu);
    }
  } else {
    for (U32 i = 0; i < VECTOR; i++) {
      values[i] = 0.0f;
      if (at + i < width) {
        values[i] = dtype == DTYPE_F32 ? ((GLOBAL const F32 *)row)[at + i]
                                       : widened(dtype, ((GLOBAL const U16 *)row)[at + i]);
      }
    }
  }
}

// The other way round, each rounded to the dtype; nothing beyond the row is written.
DEVICE void store(U32 dtype, U32 wide, GLOBAL void *row, U32 at, U32 width, const F32 *values) {
  if (wide && dtype == DTYPE_F32) {
    GLOBAL F32X4 *to = (GLOBAL F32X4 *)((GLOBAL F32 *)row + at);
    to[0] = MAKE_F32X4(values[0], values[1], values[2], values[3]);
    to[1] = MAKE_F32X4(values[4], values[5], values[6], values[7]);
  } else if (wide) {
    U32 words[4];
    for (U32 i = 0; i < 4; i++) {
      words[i] = narrowed(dtype, values[2 * i]) | narrowed(dtype, values[2 * i + 1]) << 16;
    }
    *(GLOBAL U32X4 *)((GLOBAL U16 *)row + at) = MAKE_U32X4(words[0], words[1], words[2], words[3]);
  } else {
    for (U32 i = 0; i < VECTOR && at + i < width; i++) {
      if (dtype == DTYPE_F32) {
        ((GLOBAL F32 *)row)[at + i] = values[i];
      } else {
        ((GLOBAL U16 *)row)[at + i] = (U16)narrowed(dtype, values[i]);
      }
    }
  }
}

// VECTOR elements of a direction, which is filled up with zeros to a multiple of VECTOR.
DEVICE void load_direction(GLOBAL const F32 *direction, U32 at, F32 *values) {
  load(DTYPE_F32, 1, direction, at, at + VECTOR, values);
}

// ---- Sums over a team: shared memory holds every thread's value, and then each team's result in its first place ----

#define FOLD(COMBINE)                                                                                                  \
  BARRIER;                                                                                                             \
  for (U32 step = t->team / 2; step > 0; step /= 2) {                                                                  \
    if (t->lane < step) {                                                                                              \
      U32 one = THREAD, other = THREAD + step;                                                                         \
      COMBINE;                                                                                                         \
    }                                                                                                                  \
    BARRIER;                                                                                                           \
  }

// Where a thread stands.
typedef struct {
  U32 team, lane, first; // threads of a team; this one's place in it; the team's first thread in the block
  U64 row;
  U32 live; // whether there is such a row
} Team;

DEVICE Team team_of(U32 team, U32 rows) {
  Team t;
  t.team = team;
  t.lane = THREAD % team;
  t.first = THREAD - t.lane;
  t.row = (U64)BLOCK * (THREADS / team) + THREAD / team;
  t.live = t.row < rows;
  return t;
}

DEVICE GLOBAL const void *row_at(U32 dtype, GLOBAL const void *rows, U64 element) {
  return dtype == DTYPE_F32 ? (GLOBAL const void *)((GLOBAL const F32 *)rows + element)
                            : (GLOBAL const void *)((GLOBAL const U16 *)rows + element);
}

// ---- Score ----

// What makes a score of a dot product; as `Probe`.
typedef struct {
  F64 offset, sigma;
} Calibration;

// raw = dot - offset, z = raw / sigma; 0 where one is not finite.
DEVICE U32 project(const Calibration *k, F32 dot, F64 *raw, F32 *z) {
  *raw = (F64)dot - k->offset;
  *z = (F32)(*raw / k->sigma);
  F32 narrow = (F32)*raw;
  return FINITE(*z) && FINITE(narrow);
}

DEVICE F32 score_in(U32 unit, F64 raw, F32 z) { return unit == UNIT_RAW ? (F32)raw : z; }

DEVICE void score_rows(U32 dtype, U32 wide, GLOBAL const void *rows, GLOBAL const F32 *direction, GLOBAL F32 *scores,
                       GLOBAL U8 *status, U32 count, U32 width, U64 stride, U32 team, U32 unit, Calibration k,
                       SHARED_POINTER F32 *shared) {
  Team here = team_of(team, count);
  const Team *t = &here;
  F32 dot = 0.0f;
  if (t->live) {
    GLOBAL const void *row = row_at(dtype, rows, t->row * stride);
#pragma unroll 2
    for (U32 at = t->lane * VECTOR; at < width; at += team * VECTOR) {
      F32 h[VECTOR], u[VECTOR];
      load(dtype, wide, row, at, width, h);
      load_direction(direction, at, u);
      for (U32 i = 0; i < VECTOR; i++) {
        dot += h[i] * u[i];
      }
    }
  }
  shared[THREAD] = dot;
  FOLD(shared[one] += shared[other])
  if (t->live && t->lane == 0) {
    F64 raw;
    F32 z;
    U32 finite = project(&k, shared[t->first], &raw, &z);
    scores[t->row] = finite ? score_in(unit, raw, z) : NOT_A_NUMBER;
    if (status) {
      status[t->row] = finite ? ROW_OK : ROW_NON_FINITE;
    }
  }
}

// ---- Steer ----

// As `Steering`; `parameter` is alpha or the ceiling, a limit of 0 is none.
typedef struct {
  U32 operation, gated;
  F32 parameter, gate, limit;
  F64 edit_norm, edit_peak;
} Edit;

// A sum of squares in this range lost nothing to overflow or underflow.
#define SAFE_SQUARES(x) ((x) >= 1e-30f && (x) < 1e30f)

// The smallest f32 that rounds to infinity.
DEVICE F32 overflow_of(U32 dtype) {
  return dtype == DTYPE_F32 ? F32_OF_BITS(0x7f800000u) : dtype == DTYPE_F16 ? 65520.0f : F32_OF_BITS(0x7f7f8000u);
}

// What is done to a row of this norm: `coefficient` times the vector is taken off, and nothing where it is 0. `near` is
// set where the edit might leave the dtype's range.
DEVICE U32 decide(U32 dtype, const Edit *e, const Calibration *k, F32 dot, F64 norm, F32 strength, F32 *coefficient,
                  U32 *near) {
  F64 raw, asked = (F64)strength;
  F32 z;
  *coefficient = 0.0f;
  *near = 0;
  if (!FINITE(strength) || (e->operation == CLAMP && strength < 0.0f)) {
    return ROW_BAD_STRENGTH;
  }
  if (!project(k, dot, &raw, &z)) {
    return ROW_NON_FINITE;
  }
  if (e->gated && z <= e->gate) {
    return ROW_GATED;
  }
  if (e->operation == CLAMP) {
    asked = z > e->parameter ? asked * (raw - (F64)e->parameter * k->sigma) : 0.0;
  } else {
    asked *= (F64)e->parameter;
    asked = e->operation == PROJECT_OUT ? asked * (F64)dot : asked;
  }
  if (asked == 0.0) {
    return ROW_OK;
  }
  F64 dose = ABS_F64(asked) * e->edit_norm / norm, limit = (F64)e->limit;
  U32 status = ROW_OK;
  if (e->limit > 0.0f && dose > limit) {
    asked = asked * (limit / dose);
    status = ROW_LIMITED;
  }
  F32 c = (F32)asked;
  if (c == 0.0f) {
    return status;
  }
  if (!FINITE(c)) {
    return ROW_NON_FINITE;
  }
  F32 overflow = overflow_of(dtype);
  F64 range = (F64)(FINITE(overflow) ? overflow : F32_OF_BITS(0x7f7fffffu)) * 0.99;
  *near = !(norm * 1.001 + ABS_F64((F64)c) * e->edit_peak < range);
  *coefficient = c;
  return status;
}

// What the teams of a block leave in shared memory.
typedef struct {
  F32 sums[2 * THREADS];
  F64 wide_sums[THREADS];
  F32 coefficients[TEAMS];
  U32 near[TEAMS];
  U32 status[TEAMS];
} Block;

// Elements that are not kept, as every lane of a team takes them.
#define EACH_LATER(at)                                                                                                 \
  for (U32 at = ((wide ? KEPT : 0) * t->team + t->lane) * VECTOR; at < width; at += t->team * VECTOR)

DEVICE void steer_rows(U32 dtype, U32 wide, GLOBAL void *rows, GLOBAL const F32 *direction, GLOBAL const F32 *vector,
                       GLOBAL const F32 *strengths, GLOBAL F32 *scores, GLOBAL U8 *status, U32 count, U32 width,
                       U64 stride, U32 team, U32 unit, Calibration k, Edit e, SHARED_POINTER Block *b) {
  Team here = team_of(team, count);
  const Team *t = &here;
  U32 number = THREAD / team, teams = THREADS / team;
  GLOBAL void *row = t->live ? (GLOBAL void *)row_at(dtype, rows, t->row * stride) : rows;
  width = t->live ? width : 0;
  // A team without a row has nothing to sum up again.
  F32 kept[KEPT][VECTOR], dot = 0.0f, squares = t->live ? 0.0f : 1.0f;

#define ADD(h, at)                                                                                                     \
  F32 u[VECTOR];                                                                                                       \
  load_direction(direction, at, u);                                                                                    \
  for (U32 i = 0; i < VECTOR; i++) {                                                                                   \
    dot += (h)[i] * u[i];                                                                                              \
    squares += (h)[i] * (h)[i];                                                                                        \
  }
  if (wide) {
#pragma unroll
    for (U32 c = 0; c < KEPT; c++) {
      U32 at = (c * team + t->lane) * VECTOR;
      if (at < width) {
        load(dtype, wide, row, at, width, kept[c]);
      }
    }
#pragma unroll
    for (U32 c = 0; c < KEPT; c++) {
      U32 at = (c * team + t->lane) * VECTOR;
      if (at < width) {
        ADD(kept[c], at)
      }
    }
  }
#pragma unroll 1
  EACH_LATER(at) {
    F32 h[VECTOR];
    load(dtype, wide, row, at, width, h);
    ADD(h, at)
  }
#undef ADD
  b->sums[THREAD] = dot;
  b->sums[THREADS + THREAD] = squares;
  FOLD(b->sums[one] += b->sums[other]; b->sums[THREADS + one] += b->sums[THREADS + other])
  dot = b->sums[t->first];
  squares = b->sums[THREADS + t->first];

  // Sums that f32 is too narrow for are made again, by all teams if by any.
  U32 again = 0;
  for (U32 i = 0; i < teams; i++) {
    again |= !SAFE_SQUARES(b->sums[THREADS + i * team]);
  }
  F64 norm = SQRT_F64((F64)squares);
  if (again) {
    F64 sum = 0.0;
#pragma unroll 1
    for (U32 at = t->lane * VECTOR; at < width; at += team * VECTOR) {
      F32 h[VECTOR];
      load(dtype, wide, row, at, width, h);
      for (U32 i = 0; i < VECTOR; i++) {
        sum += (F64)h[i] * (F64)h[i];
      }
    }
    b->wide_sums[THREAD] = sum;
    FOLD(b->wide_sums[one] += b->wide_sums[other])
    norm = SAFE_SQUARES(squares) ? norm : SQRT_F64(b->wide_sums[t->first]);
  }

  if (t->lane == 0) {
    F32 coefficient = 0.0f;
    U32 near = 0, outcome = ROW_OK;
    if (t->live) {
      outcome = decide(dtype, &e, &k, dot, norm, strengths ? strengths[t->row] : 1.0f, &coefficient, &near);
      if (scores) {
        F64 raw;
        F32 z;
        scores[t->row] = project(&k, dot, &raw, &z) ? score_in(unit, raw, z) : NOT_A_NUMBER;
      }
    }
    b->coefficients[number] = coefficient;
    b->near[number] = near;
    b->status[number] = outcome;
  }
  BARRIER;
  F32 coefficient = b->coefficients[number];
  U32 outcome = b->status[number];
  U32 any_near = 0;
  for (U32 i = 0; i < teams; i++) {
    any_near |= b->near[i];
  }
  F32 peak = 0.0f;
  if (any_near) {
#pragma unroll 1
    for (U32 at = t->lane * VECTOR; at < width; at += team * VECTOR) {
      F32 h[VECTOR], v[VECTOR];
      load(dtype, wide, row, at, width, h);
      load_direction(vector, at, v);
      for (U32 i = 0; i < VECTOR; i++) {
        peak = FMAX(peak, FABS(h[i] - coefficient * v[i]));
      }
    }
    b->sums[THREAD] = peak;
    FOLD(b->sums[one] = FMAX(b->sums[one], b->sums[other]))
    peak = b->sums[t->first];
  }
  if (b->near[number] && !(peak < overflow_of(dtype))) {
    coefficient = 0.0f;
    outcome = ROW_NON_FINITE;
  }
  if (t->live && t->lane == 0) {
    status[t->row] = (U8)outcome;
  }
  if (coefficient == 0.0f) {
    return;
  }

#define TAKE_OFF(h, at)                                                                                                \
  F32 v[VECTOR];                                                                                                       \
  load_direction(vector, at, v);                                                                                       \
  for (U32 i = 0; i < VECTOR; i++) {                                                                                   \
    (h)[i] -= coefficient * v[i];                                                                                      \
  }                                                                                                                    \
  store(dtype, wide, row, at, width, h);
  if (wide) {
#pragma unroll
    for (U32 c = 0; c < KEPT; c++) {
      U32 at = (c * team + t->lane) * VECTOR;
      if (at < width) {
        TAKE_OFF(kept[c], at)
      }
    }
  }
#pragma unroll 1
  EACH_LATER(at) {
    F32 h[VECTOR];
    load(dtype, wide, row, at, width, h);
    TAKE_OFF(h, at)
  }
#undef TAKE_OFF
}

// ---- What is launched ----

#define SCORE(NAME, TYPE, DTYPE, WIDE)                                                                                 \
  KERNEL void NAME(GLOBAL const TYPE *RESTRICT rows, GLOBAL const F32 *RESTRICT direction,                             \
                   GLOBAL F32 *RESTRICT scores, GLOBAL U8 *RESTRICT status, U32 count, U32 width, U64 stride,          \
                   U32 team, U32 unit, F64 offset, F64 sigma) {                                                        \
    SHARED F32 shared[THREADS];                                                                                        \
    Calibration k = {offset, sigma};                                                                                   \
    score_rows(DTYPE, WIDE, rows, direction, scores, status, count, width, stride, team, unit, k, shared);             \
  }

#define STEER(NAME, TYPE, DTYPE, WIDE)                                                                                 \
  KERNEL void NAME(GLOBAL TYPE *RESTRICT rows, GLOBAL const F32 *RESTRICT direction,                                   \
                   GLOBAL const F32 *RESTRICT vector, GLOBAL const F32 *RESTRICT strengths,                            \
                   GLOBAL F32 *RESTRICT scores, GLOBAL U8 *RESTRICT status, U32 count, U32 width, U64 stride,          \
                   U32 team, U32 unit, F64 offset, F64 sigma, U32 operation, F32 parameter, U32 gated, F32 gate,       \
                   F32 limit, F64 edit_norm, F64 edit_peak) {                                                          \
    SHARED Block block;                                                                                                \
    Calibration k = {offset, sigma};                                                                                   \
    Edit e = {operation, gated, parameter, gate, limit, edit_norm, edit_peak};                                         \
    steer_rows(DTYPE, WIDE, rows, direction, vector, strengths, scores, status, count, width, stride, team, unit, k,   \
               e, &block);                                                                                             \
  }

SCORE(score_f32, F32, DTYPE_F32, 0)
SCORE(score_f16, U16, DTYPE_F16, 0)
SCORE(score_bf16, U16, DTYPE_BF16, 0)
SCORE(score_f32_wide, F32, DTYPE_F32, 1)
SCORE(score_f16_wide, U16, DTYPE_F16, 1)
SCORE(score_bf16_wide, U16, DTYPE_BF16, 1)
STEER(steer_f32, F32, DTYPE_F32, 0)
STEER(steer_f16, U16, DTYPE_F16, 0)
STEER(steer_bf16, U16, DTYPE_BF16, 0)
STEER(steer_f32_wide, F32, DTYPE_F32, 1)
STEER(steer_f16_wide, U16, DTYPE_F16, 1)
STEER(steer_bf16_wide, U16, DTYPE_BF16, 1)
