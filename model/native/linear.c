/* Linear layers: rows of bf16 times a packed matrix, and what follows at once. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { AT_ONCE = 4 };

typedef int8_t bytes __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(64)));

struct linear {
  const struct matrix *m;
  const bf16 *x;
  const int8_t *x8; /* in its place, if the matrix is quantised */
  float *heats;     /* what a whole number of each row stands for */
  void *y;
  long rows, ldx, ldy, ld8, tall, groups, chunks;
  int kind;
};

CLONES static void finish(const struct linear *w, const float *c, long row, int rows, long column) {
  int width = w->m->outputs - column < COLUMNS ? (int)(w->m->outputs - column) : COLUMNS;
  float bias[COLUMNS] = {0};
  if (w->m->bias) memcpy(bias, w->m->bias + column, width * sizeof(float));
  floats bias0 = get(bias), bias1 = get(bias + LANES);
  for (int r = 0; r < rows; r++, c += COLUMNS) {
    floats x0 = get(c), x1 = get(c + LANES);
    if (w->kind == FLOATS) {
      memcpy((float *)w->y + (row + r) * w->ldy + column, c, width * sizeof(float));
      continue;
    }
    bf16 out[COLUMNS];
    bf16 *y = (bf16 *)w->y + (row + r) * w->ldy + column, *to = width == COLUMNS ? y : out;
    if (w->kind == GATE) {
      put_bf16(y - column / 2, silu(x0) * x1);
      continue;
    }
    x0 += bias0;
    x1 += bias1;
    put_bf16(to, w->kind == GELU ? gelu(x0) : x0);
    put_bf16(to + LANES, w->kind == GELU ? gelu(x1) : x1);
    if (to == out) memcpy(y, out, width * sizeof(bf16));
  }
}

#if defined(__x86_64__)
/* The same with this processor's own rounding, and past the caches where the next to read the result
   would not find it there. Only whole groups. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static void finish_fast(
    const struct linear *w, const float *c, long row, int rows, long column) {
  floats bias0 = w->m->bias ? get(w->m->bias + column) : all(0);
  floats bias1 = w->m->bias ? get(w->m->bias + column + LANES) : all(0);
  bf16 *y = (bf16 *)w->y + row * w->ldy + column;
  int past = w->rows * w->m->outputs > (1l << 20) && !(((long)y | w->ldy * 2) & 63);
  for (int r = 0; r < rows; r++, c += COLUMNS, y += w->ldy) {
    floats x0 = get(c) + bias0, x1 = get(c + LANES) + bias1;
    if (w->kind == GELU) {
      x0 = gelu(x0);
      x1 = gelu(x1);
    }
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
    if (past) _mm512_stream_si512((void *)y, both);
    else _mm512_storeu_si512((void *)y, both);
  }
}
#endif

/* Whole numbers to what they stand for, in their place. */
CLONES static void widen(const struct linear *w, float *c, long row, int rows, long column) {
  floats scale0 = get(w->m->scales + column), scale1 = get(w->m->scales + column + LANES);
  for (int r = 0; r < rows; r++, c += COLUMNS) {
    float heat = w->heats[row + r];
    ints x0, x1;
    memcpy(&x0, c, sizeof x0);
    memcpy(&x1, c + LANES, sizeof x1);
    put(c, __builtin_convertvector(x0, floats) * (scale0 * heat));
    put(c + LANES, __builtin_convertvector(x1, floats) * (scale1 * heat));
  }
}

/* Adding this rounds, and leaves the number in the low byte. */
#define TO_WHOLE 12582912.0f

CLONES static void whole_numbers(const bf16 *x, long count, float scale, int8_t *to) {
  for (long i = 0; i < count; i += LANES) {
    ints whole = (ints)(get_bf16(x + i) * scale + TO_WHOLE);
    bytes narrow = __builtin_convertvector(whole, bytes);
    memcpy(to + i, &narrow, sizeof narrow);
  }
}

#if defined(__x86_64__)
/* The same; compilers take the bytes one by one. */
__attribute__((target("avx512f,avx512bw"))) static void fast_whole_numbers(const bf16 *x, long count,
                                                                           float scale, int8_t *to) {
  for (long i = 0; i < count; i += LANES) {
    __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + i))), 16);
    __m512 whole = _mm512_add_ps(_mm512_mul_ps((__m512)wide, _mm512_set1_ps(scale)), _mm512_set1_ps(TO_WHOLE));
    _mm_storeu_si128((void *)(to + i), _mm512_cvtepi32_epi8((__m512i)whole));
  }
}
#endif

/* Without their signs, bits are in the order of their numbers; infinities and NaN come last. */
CLONES static bf16 largest_bits(const bf16 *x, long count) {
  shorts most = {0};
  for (long i = 0; i < count; i += STEP) {
    shorts bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fff;
    shorts above = bits > most;
    most = (bits & above) | (most & ~above);
  }
  bf16 found = 0;
  for (int i = 0; i < STEP; i++) found = most[i] > found ? (bf16)most[i] : found;
  return found;
}

/* Rows to whole numbers between -127 and 127, the largest of each row to one of these. */
static void quantise(void *context, long index) {
  const struct linear *w = context;
  for (long row = index * AT_ONCE; row < (index + 1) * AT_ONCE && row < w->rows; row++) {
    const bf16 *x = w->x + row * w->ldx;
    int8_t *to = (int8_t *)w->x8 + row * w->ld8;
    bf16 most = largest_bits(x, w->m->inputs);
    /* No whole number could say what is not finite: it makes its row NaN. */
    w->heats[row] = most < 0x7f80 ? fmaxf(wide(most), 1e-12f) / 127 : NAN;
#if defined(__x86_64__)
    if (block_level >= 3) {
      fast_whole_numbers(x, w->m->inputs, 1 / w->heats[row], to);
      continue;
    }
#endif
    whole_numbers(x, w->m->inputs, 1 / w->heats[row], to);
  }
}

/* Inputs at a time: their part of a group of panels stays in the first cache while rows pass by. */
enum { DEEP = 256 };
/* Rows at a time: they stay in the second cache while the panels pass by. */
enum { TALLEST = 640, TALL_BYTES = 200 * 8192 };

static void part(void *context, long index) {
  const struct linear *w = context;
  long chunk = index / w->groups, group = index % w->groups;
  long first = chunk * w->tall, last = first + w->tall < w->rows ? first + w->tall : w->rows;
  long stride = w->m->inputs * LANES, column = group * COLUMNS;
  long panels = (w->m->outputs - column + LANES - 1) / LANES;
  if (panels > GROUP) panels = GROUP;
  long size = w->m->scales ? 1 : 2, deep = last - first > ROWS ? DEEP * 2 / size : w->m->inputs;
  long each = GROUP * stride * size, further = pool_threads();
  const char *b = (const char *)w->m->panels + group * each;
  const char *next = group + further < w->groups ? b + further * each : NULL;
  float c[TALLEST * COLUMNS] __attribute__((aligned(64)));
  long blocks = (last - first + ROWS - 1) / ROWS;
  for (long k = 0; k < w->m->inputs; k += deep) {
    int inputs = (int)(w->m->inputs - k < deep ? w->m->inputs - k : deep);
    int done = k + inputs == w->m->inputs;
    const char *at = b + k * LANES * size;
    struct soon soon = {done ? next : at + deep * LANES * size, stride * size, 0};
    if (soon.from && blocks > 1) soon.lines = (int)((16 + blocks - 1) / blocks);
    for (long row = first; row < last; row += ROWS) {
      int rows = last - row < ROWS ? (int)(last - row) : ROWS;
      float *to = c + (row - first) * COLUMNS;
      if (w->m->scales)
        block_product8(w->x8 + row * w->ld8 + k, w->ld8, rows, (const int8_t *)at, stride,
                       (int)panels, inputs, w->m->sums + column, (int32_t *)to, k > 0, &soon);
      else
        block_product(w->x + row * w->ldx + k, w->ldx, rows, (const bf16 *)at, stride, (int)panels,
                      inputs, to, COLUMNS, k > 0, &soon);
      if (!done) continue;
      if (w->m->scales) widen(w, to, row, rows, column);
#if defined(__x86_64__)
      if (block_level >= 3 && w->kind <= GELU && column + COLUMNS <= w->m->outputs) {
        finish_fast(w, to, row, rows, column);
        continue;
      }
#endif
      finish(w, to, row, rows, column);
    }
  }
#if defined(__x86_64__)
  _mm_sfence(); /* stores past the caches are not in order with others */
#endif
  block_end();
}

/* A line further apart than they are long: see GAP in decoder.c. */
static long apart8(long inputs) { return inputs + 64; }

static long heats_bytes(long rows) { return (rows * sizeof(float) + 63) / 64 * 64; }

/* Bytes that internvl_linear needs as scratch: for a quantised layer the rows in whole numbers, and
   what one of each stands for. */
long internvl_linear_scratch(const struct matrix *m, long rows) {
  return m->scales ? heats_bytes(rows) + rows * apart8(m->inputs) : 0;
}

/* y[rows][outputs] = kind(x[rows][inputs] * panels + bias); ldx and ldy are the distances of rows in
   elements. */
void internvl_linear(const struct matrix *m, const bf16 *x, long ldx, long rows, void *y, long ldy,
                     int kind, void *scratch) {
  struct linear w = {.m = m, .x = x, .y = y, .rows = rows, .ldx = ldx, .ldy = ldy, .kind = kind};
  if (m->scales) {
    w.heats = scratch;
    w.ld8 = apart8(m->inputs);
    w.x8 = (int8_t *)scratch + heats_bytes(rows);
    pool_run(quantise, &w, (rows + AT_ONCE - 1) / AT_ONCE);
  }
  w.groups = (m->outputs + COLUMNS - 1) / COLUMNS;
  long tall = TALL_BYTES / (m->inputs * (m->scales ? 1 : 2));
  tall = tall < ROWS ? ROWS : tall < TALLEST ? tall : TALLEST;
  long chunks = (rows + tall - 1) / tall;
  w.tall = ((rows + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
  w.chunks = (rows + w.tall - 1) / w.tall; /* fewer, where they were rounded up */
  pool_run(part, &w, w.groups * w.chunks);
}

struct pack {
  const bf16 *from;
  bf16 *to;
  int8_t *to8;
  float *scales;
  int32_t *sums;
  long outputs, inputs, padded, gates;
};

/* Which row of the matrix a lane of a panel holds: with gates, even panels hold rows of the first half
   and odd ones of the second. */
static long source(const struct pack *p, long panel, long lane) {
  return p->gates ? (panel % 2) * p->gates + panel / 2 * LANES + lane : panel * LANES + lane;
}

static void pack_panel(void *context, long panel) {
  const struct pack *p = context;
  bf16 *to = p->to + panel * p->padded * LANES;
  for (int lane = 0; lane < LANES; lane++) {
    long row = source(p, panel, lane), inside = row < p->outputs ? p->inputs : 0;
    const bf16 *from = p->from + row * p->inputs;
    for (long i = 0; i < inside; i++) to[(i / 2 * LANES + lane) * 2 + i % 2] = from[i];
    for (long i = inside; i < p->padded; i++) to[(i / 2 * LANES + lane) * 2 + i % 2] = 0;
  }
}

/* from[outputs][inputs] to panels. gates: how many of the outputs are gates, or 0. */
void internvl_pack(const bf16 *from, long outputs, long inputs, bf16 *to, long gates) {
  struct pack p = {.from = from, .to = to, .outputs = outputs, .inputs = inputs, .gates = gates};
  p.padded = (inputs + STEP - 1) / STEP * STEP;
  pool_run(pack_panel, &p, (outputs + LANES - 1) / LANES);
}

static void pack_panel8(void *context, long panel) {
  const struct pack *p = context;
  int8_t *to = p->to8 + panel * p->inputs * LANES;
  for (int lane = 0; lane < LANES; lane++) {
    long row = source(p, panel, lane), inside = row < p->outputs ? p->inputs : 0;
    const bf16 *from = p->from + row * p->inputs;
    float most = 1e-12f;
    for (long i = 0; i < inside; i++) most = fmaxf(most, fabsf(wide(from[i])));
    int32_t sum = 0;
    for (long i = 0; i < p->inputs; i++) {
      int8_t whole = i < inside ? (int8_t)lrintf(wide(from[i]) * 127 / most) : 0;
      to[(i / 4 * LANES + lane) * 4 + i % 4] = whole;
      sum += whole;
    }
    p->scales[panel * LANES + lane] = most / 127;
    p->sums[panel * LANES + lane] = sum;
  }
}

/* The same in whole numbers, the largest of each output to 127. scales and sums: [panels * LANES] in the
   order of the panels, and LANES more that are read but not used. inputs is a multiple of STEP8. */
void internvl_pack8(const bf16 *from, long outputs, long inputs, int8_t *to, float *scales,
                    int32_t *sums, long gates) {
  struct pack p = {.from = from, .to8 = to, .scales = scales, .sums = sums, .outputs = outputs,
                   .inputs = inputs, .gates = gates};
  pool_run(pack_panel8, &p, (outputs + LANES - 1) / LANES);
}

/* Ask for large pages: a matrix that is read once per step is read a quarter faster. */
#include <sys/mman.h>
void internvl_large_pages(void *start, unsigned long bytes) {
#ifdef MADV_HUGEPAGE
  unsigned long size = 2ul << 20, from = ((unsigned long)start + size - 1) / size * size;
  unsigned long until = ((unsigned long)start + bytes) / size * size;
  if (from < until) madvise((void *)from, until - from, MADV_HUGEPAGE);
#endif
}
