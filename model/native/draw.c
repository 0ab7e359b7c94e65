/* Greedy draws: the highest logit of each row, kept while the head's product is made, and no logits are
   written.

   Reading the head is a quarter of a step of few rows. These are first multiplied with a sketch of it, the
   same weights in whole numbers of six bits. How far a logit can be from what the sketch says is known: by
   the length of the row times that of what rounding took from the output's weights (Cauchy-Schwarz). So the
   group of panels that promises most is computed, and then only those with an output that may be higher
   than what that one has, some dozens of several thousand, by the product that would have computed them
   all: tokens are the same, to the bit. */
#include "linear.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <stdatomic.h>

/* Rows of which the sketch is read with both halves of their numbers in registers. Of a head in whole numbers
   a row is whole numbers itself, which is one half. */
enum { SKETCHED = TALLEST_BLOCK / 2 };
/* Where one group in FEW or more had to be computed the sketch did not pay, and rests for REST draws. */
enum { FEW = 4, REST = 15 };

/* A number and its place as one that is the higher, the higher the number is or, of equals, the earlier
   it stands. NaN is the highest; 0 is no key. */
static uint64_t key_of(float x, long place) {
  uint32_t bits;
  x += 0.0f; /* -0 is no less than 0 */
  memcpy(&bits, &x, sizeof bits);
  bits = x != x ? UINT32_MAX : bits >> 31 ? ~bits : bits | 1u << 31;
  return (uint64_t)bits << 32 | (uint32_t)~place;
}

static float number_of(uint64_t key) {
  uint32_t bits = (uint32_t)(key >> 32);
  bits = bits >> 31 ? bits & INT32_MAX : ~bits;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void raise_to(_Atomic uint64_t *best, uint64_t key) {
  uint64_t known = atomic_load_explicit(best, memory_order_relaxed);
  while (key > known && !atomic_compare_exchange_weak(best, &known, key));
}

/* What stands behind the last output is no output. */
static void cut(const struct linear *w, float *c, int rows, long column) {
  for (int r = 0; r < rows; r++)
    for (long i = w->m->outputs - column; i < COLUMNS; i++) c[r * COLUMNS + i] = -INFINITY;
}

/* Hardly ever is there anything higher than what any thread has found before. */
CLONES static void keep_highest(const struct linear *w, float *c, long row, int rows, long column) {
  _Atomic uint64_t *best = (_Atomic uint64_t *)w->y + row;
  cut(w, c, rows, column);
  for (int r = 0; r < rows; r++, c += COLUMNS) {
    float most = number_of(atomic_load_explicit(best + r, memory_order_relaxed));
    uint64_t found = 0;
    int any = 0;
    for (int i = 0; i < COLUMNS; i++) any |= !(c[i] < most);
    if (!any) continue;
    for (int i = 0; i < COLUMNS; i++) {
      uint64_t key = key_of(c[i], column + i);
      found = key > found ? key : found;
    }
    raise_to(best + r, found);
  }
}

struct bounds {
  int rows;
  const float *doubts;
  float heats[SKETCHED], lengths[SKETCHED];
  float *most; /* [groups][rows]: what nothing of a group is above */
};

/* The rows, and as many that hold what whole numbers leave of them, if anything. NaN bounds nothing. */
CLONES static void keep_bounds(const struct linear *w, float *c, long row, int rows, long column) {
  struct bounds *b = w->y;
  const float nothing[COLUMNS] = {0}, *rest = rows > b->rows ? c + b->rows * COLUMNS : NULL;
  (void)row; /* all rows at once */
  cut(w, c, rows, column);
  for (int r = 0; r < b->rows; r++) {
    floats most = all(-INFINITY);
    for (int i = 0; i < COLUMNS; i += LANES) {
      floats near = get(c + r * COLUMNS + i) * b->heats[r] + get((rest ? rest + r * COLUMNS : nothing) + i);
      floats doubt = get(b->doubts + column + i) * b->lengths[r] + 1e-30f; /* products that become 0 */
      floats high = near + doubt;
      most = larger(pick(high == high, high, all(INFINITY)), most);
    }
    b->most[column / COLUMNS * b->rows + r] = largest(most);
  }
}

/* A row as heat * whole + rest, where whole numbers are 127 at most: twice as many digits as the one alone
   would have. Returns its length, and no less: what is nearly 0 has few digits. Of rows that are too long it
   is infinite, which bounds nothing. */
CLONES static float split(const bf16 *x, long inputs, float *heat, bf16 *whole, bf16 *rest) {
  floats most = all(0), squares = all(0);
  for (long i = 0; i < inputs; i += LANES) {
    floats value = get_bf16(x + i);
    most = larger(larger(value, -value), most);
    squares += value * value;
  }
  *heat = fmaxf(largest(most), 1e-12f) / 127;
  floats scale = all(1 / *heat);
  for (long i = 0; i < inputs; i += LANES) {
    floats value = get_bf16(x + i), shifted = value * scale + 12582912.0f, near = shifted - 12582912.0f;
    put_bf16(whole + i, near);
    put_bf16(rest + i, value - near * *heat);
  }
  float length = sqrtf(total(squares)) * 1.001f + 1e-9f;
  return length < LONGEST ? length : INFINITY;
}

static long in_lines(long bytes) { return (bytes + 63) / 64 * 64; }

static long halves_bytes(const struct matrix *m, long rows) { return in_lines(2 * rows * m->inputs * sizeof(bf16)); }

static long groups_of(const struct matrix *m) { return (m->outputs + COLUMNS - 1) / COLUMNS; }

/* What no output of each group is above, for each row. */
static void sketch(const struct matrix *m, const bf16 *x, long ldx, int rows, float *most, char *scratch) {
  struct bounds b = {.rows = rows, .doubts = m->sketch->doubts, .most = most};
  struct linear w = {.m = &m->sketch->whole, .x = x, .y = &b, .rows = rows, .ldx = ldx, .then = keep_bounds};
  bf16 *halves = (bf16 *)scratch;
  scratch += halves_bytes(m, rows);
  for (int row = 0; row < rows; row++) {
    b.lengths[row] = split(x + row * ldx, m->inputs, b.heats + row, halves + row * m->inputs,
                           halves + (rows + row) * m->inputs);
    if (!m->scales) continue;
    b.lengths[row] += b.heats[row] * sqrtf(m->inputs); /* half a step of each number, and no less */
    b.heats[row] = 1; /* they are those of its own product */
  }
  if (!m->scales) {
    w.x = halves;
    w.ldx = m->inputs;
    w.rows = 2 * rows;
  }
  linear_run(&w, scratch);
}

/* For each row the group that promises most, to chosen; how many. They promise nothing any more. */
static long first_groups(const struct matrix *m, int rows, float *most, int32_t *chosen) {
  for (int row = 0; row < rows; row++) {
    float highest = -INFINITY;
    chosen[row] = 0;
    for (long group = 0; group < groups_of(m); group++) {
      float bound = most[group * rows + row];
      if (bound <= highest || bound == INFINITY) continue; /* which promises nothing */
      highest = bound;
      chosen[row] = (int32_t)group;
    }
  }
  for (int row = 0; row < rows; row++)
    for (int other = 0; other < rows; other++) most[chosen[row] * rows + other] = -INFINITY;
  return rows;
}

/* The groups with an output that may be as high as the highest so far; nothing is as high as NaN. */
static long other_groups(const struct matrix *m, int rows, const float *most, const int64_t *keys,
                         int32_t *chosen) {
  long count = 0;
  for (long group = 0; group < groups_of(m); group++) {
    int may = 0;
    for (int row = 0; row < rows; row++) may |= most[group * rows + row] >= number_of(keys[row]);
    chosen[count] = (int32_t)group;
    count += may;
  }
  return count;
}

/* Of all groups, or one for each row where there are fewer. */
static long chosen_bytes(const struct matrix *m) { return in_lines((groups_of(m) + SKETCHED) * sizeof(int32_t)); }

/* Bytes that internvl_draw needs as scratch for so many rows or fewer. */
long internvl_draw_scratch(const struct matrix *m, long rows) {
  long few = rows < SKETCHED ? rows : SKETCHED, all = internvl_linear_scratch(m, rows);
  if (!m->sketch) return all;
  long read = halves_bytes(m, few) + internvl_linear_scratch(&m->sketch->whole, 2 * few);
  return chosen_bytes(m) + in_lines(groups_of(m) * few * sizeof(float)) +
         (read > all ? read : all);
}

/* The token of each row of x[rows][inputs] * panels: the output that is the highest, the first of those
   that are as high. */
void internvl_draw(const struct matrix *m, const bf16 *x, long ldx, long rows, int64_t *tokens, void *scratch) {
  struct linear w = {.m = m, .x = x, .y = tokens, .rows = rows, .ldx = ldx, .then = keep_highest};
  memset(tokens, 0, rows * sizeof *tokens);
  if (m->sketch && 0 < rows && rows <= SKETCHED && wide_fit(m, rows) && --m->sketch->rest < 0) {
    int32_t *chosen = scratch;
    float *most = (float *)((char *)scratch + chosen_bytes(m));
    scratch = (char *)most + in_lines(groups_of(m) * rows * sizeof(float));
    sketch(m, x, ldx, (int)rows, most, scratch);
    w.chosen = chosen;
    w.count = first_groups(m, (int)rows, most, chosen);
    linear_run(&w, scratch);
    w.count = other_groups(m, (int)rows, most, tokens, chosen);
    m->sketch->rest = w.count * FEW > groups_of(m) ? REST : 0;
  }
  linear_run(&w, scratch);
  for (long row = 0; row < rows; row++) {
    float most = number_of(tokens[row]);
    int64_t place = (uint32_t)~tokens[row];
    tokens[row] = isfinite(most) ? place : most == -INFINITY ? NOTHING_LEFT : NOT_FINITE;
  }
}
