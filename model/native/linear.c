/* Linear layers: rows of bf16 times a packed matrix, and what follows at once. */
#include "linear.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { AT_ONCE = 4 };

typedef int8_t bytes __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(64)));

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
/* finish() with this processor's own rounding, and past the caches where the next to read the result
   would not find it there. Only whole groups. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static void finish_fast(
    const struct linear *w, const float *c, long row, int rows, long column) {
  floats bias0 = w->m->bias ? get(w->m->bias + column) : all(0);
  floats bias1 = w->m->bias ? get(w->m->bias + column + LANES) : all(0);
  bf16 *y = (bf16 *)w->y + row * w->ldy + column;
  int past = block_level > 3 && w->rows * w->m->outputs > (1l << 20) && !(((long)y | w->ldy * 2) & 63);
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
                                                                           float scale, float to_whole,
                                                                           int8_t *to) {
  for (long i = 0; i < count; i += LANES) {
    __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + i))), 16);
    __m512 whole = _mm512_add_ps(_mm512_mul_ps((__m512)wide, _mm512_set1_ps(scale)), _mm512_set1_ps(to_whole));
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

CLONES static int32_t sum_of(const int8_t *x, long count) {
  int32_t sum = 0;
  for (long i = 0; i < count; i++) sum += x[i];
  return sum;
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
      /* AVX512 wants one side without a sign: the rows get 128 more, or with wide.c the weights. */
      int more = block_level == 3 && !w->fits ? 128 : 0;
      fast_whole_numbers(x, w->m->inputs, 1 / w->heats[row], TO_WHOLE + more, to);
      if (w->fits) w->starts[row] = -(is_six(w->m) ? SIX_ZERO : 128) * sum_of(to, w->m->inputs);
      continue;
    }
#endif
    whole_numbers(x, w->m->inputs, 1 / w->heats[row], to);
  }
}

/* AMX, inputs at a time: their part of a group of panels stays in the first cache while rows pass by. */
enum { DEEP = 256 };
/* Rows at a time: they stay in the second cache while the panels pass by. */
enum { TALLEST = 640, TALL_BYTES = 200 * 8192 };
/* Other products are slow enough for the second cache, where all inputs of a group are, and rows in the
   third; weights in twelve bits, if it is not wide.c that reads them, are widened for so many inputs at a
   time. */
enum { WIDENED = 1024, THIRD_BYTES = 16 << 20 };

/* Rows `first` to `last` of a group of panels that have been summed to c: what follows. */
static void end_rows(const struct linear *w, float *c, long row, int rows, long column) {
  if (w->m->scales) widen(w, c, row, rows, column);
  if (w->m->odds) wide_add_odds(w->m, column, w->x + row * w->ldx, w->ldx, rows, c);
  if (w->then) {
    w->then(w, c, row, rows, column);
    return;
  }
#if defined(__x86_64__)
  if (block_level >= 3 && w->kind <= GELU && column + COLUMNS <= w->m->outputs) {
    finish_fast(w, c, row, rows, column);
    return;
  }
#endif
  finish(w, c, row, rows, column);
}

static void wide_part(void *context, long index) {
  const struct linear *w = context;
  long row = index / w->groups * w->tall, group = index % w->groups, ldx = w->m->scales ? w->ld8 : w->ldx * 2;
  int rows = (int)(w->rows - row < w->tall ? w->rows - row : w->tall);
  if (w->chosen) group = w->chosen[group];
  const char *x = w->m->scales ? (const char *)w->x8 : (const char *)w->x;
  float c[MOST_ROWS * COLUMNS] __attribute__((aligned(64)));
  wide_product(w->m, group * COLUMNS, x + row * ldx, ldx, rows, w->m->scales ? w->starts + row : NULL, c);
  end_rows(w, c, row, rows, group * COLUMNS);
}

static void part(void *context, long index) {
  const struct linear *w = context;
  const struct matrix *m = w->m;
  long chunk = index / w->groups, group = index % w->groups;
  if (w->chosen) group = w->chosen[group];
  long column = group * COLUMNS;
  long first = chunk * w->tall, last = first + w->tall < w->rows ? first + w->tall : w->rows;
  int panels = column + LANES < m->outputs ? GROUP : 1;
  long deep = m->bases ? WIDENED : m->inputs, high = block_level == 3 ? HIGH : ROWS;
  if (block_level > 3 && (last - first > ROWS || m->bases)) deep = DEEP * 2 / (m->scales ? 1 : 2);
  long apart = panel_bytes(m, m->inputs), further = pool_threads();
  const char *b = (const char *)m->panels + group * GROUP * apart;
  const char *next = !w->chosen && group + further < w->groups ? b + further * GROUP * apart : NULL;
  float c[TALLEST * COLUMNS] __attribute__((aligned(64)));
  bf16 widened[GROUP][WIDENED * LANES] __attribute__((aligned(64)));
  long blocks = (last - first + ROWS - 1) / ROWS;
  for (long k = 0; k < m->inputs; k += deep) {
    int inputs = (int)(m->inputs - k < deep ? m->inputs - k : deep);
    int done = k + inputs == m->inputs;
    const char *at = b + panel_bytes(m, k) * (m->bases ? GROUP : 1);
    const bf16 *panel = (const void *)at;
    long stride = m->inputs * LANES;
    if (m->bases) {
      for (int p = 0; p < panels; p++)
        wide_widen((const uint8_t *)at + p * PIECE, m->bases[group * GROUP + p], inputs, widened[p]);
      panel = widened[0];
      stride = WIDENED * LANES;
    }
    long further_on = panel_bytes(m, deep) * (m->bases ? GROUP : 1);
    struct soon soon = {done ? next : at + further_on, m->bases ? further_on / GROUP : apart, 0};
    long lines = panel_bytes(m, DEEP * 2 / (m->scales ? 1 : 2)) / 512;
    if (soon.from && blocks > 1) soon.lines = (int)((lines + blocks - 1) / blocks);
    for (long row = first; row < last; row += high) {
      int rows = (int)(last - row < high ? last - row : high);
      float *to = deep < m->inputs ? c + (row - first) * COLUMNS : c;
      if (m->scales)
        block_product8(w->x8 + row * w->ld8 + k, w->ld8, rows, (const int8_t *)at, stride, panels, inputs,
                       m->sums + column, (int32_t *)to, k > 0, &soon);
      else
        block_product(w->x + row * w->ldx + k, w->ldx, rows, panel, stride, panels, inputs, to, COLUMNS,
                      k > 0, &soon);
      if (done) end_rows(w, to, row, rows, column);
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

/* Bytes that internvl_linear needs as scratch for so many rows or fewer: for a quantised layer the rows
   in whole numbers, what one of each stands for and their sums. */
long internvl_linear_scratch(const struct matrix *m, long rows) {
  return m->scales ? 2 * heats_bytes(rows) + rows * apart8(m->inputs) : 0;
}

void linear_run(struct linear *w, void *scratch) {
  const struct matrix *m = w->m;
  w->fits = wide_fit(m, w->rows);
  w->groups = w->chosen ? w->count : (m->outputs + COLUMNS - 1) / COLUMNS;
  if (!w->rows || !w->groups) return;
  if (m->scales) {
    w->heats = scratch;
    w->ld8 = apart8(m->inputs);
    w->starts = (int32_t *)((char *)scratch + heats_bytes(w->rows));
    w->x8 = (int8_t *)w->starts + heats_bytes(w->rows);
    pool_run(quantise, w, (w->rows + AT_ONCE - 1) / AT_ONCE);
  }
  if (w->fits) {
    long chunks = (w->rows + MOST_ROWS - 1) / MOST_ROWS;
    w->tall = (w->rows + chunks - 1) / chunks;
    pool_run_apart(wide_part, w, w->groups * chunks); /* where one group ends the next is on its way */
    return;
  }
  long tall = (block_level > 3 ? TALL_BYTES : THIRD_BYTES) / (m->inputs * (m->scales ? 1 : 2));
  if ((block_level > 3 || m->bases) && tall > TALLEST) tall = TALLEST;
  if (tall < ROWS) tall = ROWS;
  long chunks = (w->rows + tall - 1) / tall, enough = (2 * pool_threads() + w->groups - 1) / w->groups;
  if (block_level < 4 && chunks < enough) chunks = enough;
  w->tall = ((w->rows + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
  w->chunks = (w->rows + w->tall - 1) / w->tall; /* fewer, where they were rounded up */
  pool_run(part, w, w->groups * w->chunks);
}

/* y[rows][outputs] = kind(x[rows][inputs] * panels + bias); ldx and ldy are the distances of rows in
   elements. */
void internvl_linear(const struct matrix *m, const bf16 *x, long ldx, long rows, void *y, long ldy,
                     int kind, void *scratch) {
  struct linear w = {.m = m, .x = x, .y = y, .rows = rows, .ldx = ldx, .ldy = ldy, .kind = kind};
  linear_run(&w, scratch);
}
