/* Matrices to panels. */
#include "kernels.h"
#include "pool.h"

#include <math.h>
#include <string.h>

struct pack {
  const bf16 *from;
  const struct matrix *packed;
  bf16 *to;
  int8_t *to8;
  float *scales, *doubts;
  int32_t *sums;
  uint8_t *bases;
  int32_t *starts;
  struct odd *odds;
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

/* The weight of an output, as the matrix has it that is packed already, if there is one. */
static float weight_at(const struct pack *p, long row, long i) {
  if (!p->packed) return wide(p->from[row * p->inputs + i]);
  const int8_t *whole = (const int8_t *)p->packed->panels + row / LANES * p->inputs * LANES;
  return whole[(i / 4 * LANES + row % LANES) * 4 + i % 4] * p->packed->scales[row];
}

static void pack_panel6(void *context, long panel) {
  const struct pack *p = context;
  uint8_t *to = (uint8_t *)p->to8 + panel * p->inputs * LANES * 3 / 4;
  for (int lane = 0; lane < LANES; lane++) {
    long row = panel * LANES + lane, inside = row < p->outputs ? p->inputs : 0;
    float most = 1e-12f;
    for (long i = 0; i < inside; i++) most = fmaxf(most, fabsf(weight_at(p, row, i)));
    float scale = most / 31;
    double lost = 0, length = 0;
    for (long i = 0; i < p->inputs; i++) {
      float weight = i < inside ? weight_at(p, row, i) : 0, whole = rintf(weight * 31 / most);
      double gone = weight - (double)whole * scale;
      int six = (isfinite(whole) ? (int)whole : 0) + SIX_ZERO, word = i / 4 % 4;
      uint8_t *at = to + i / 16 * PIECE + lane * 4 + i % 4;
      if (word < 3) at[word * 64] = (uint8_t)six;
      else
        for (int line = 0; line < 3; line++) at[line * 64] |= (uint8_t)(six >> 2 * line << 6);
      lost += gone * gone;
      length += (double)weight * weight;
    }
    /* split() in draw.c loses less than 2.4e-5 of a row's largest number in each: half a step of its
       second half, 2 * 127 of the first, whose step is 1 / 127, and a rounding to bf16. And fp32 sums of
       `inputs` products, in whatever order, are off by so many times 2^-24 of what there is to add. */
    double rest = 2.4e-5 * sqrt(p->inputs) + ldexp(p->inputs, -21);
    length = sqrt(length);
    p->scales[panel * LANES + lane] = scale;
    p->doubts[panel * LANES + lane] = length < LONGEST ? (float)(1.01 * (sqrt(lost) + rest * length)) : INFINITY;
  }
}

/* The same in whole numbers of six bits (wide.c), the largest of each output to 31, and how far, for a row of
   length 1, a logit can be from what they say, the row's numbers split as in draw.c. doubts: as scales.
   packed: what the logits are computed with, if that is whole numbers of eight bits, or NULL. */
void internvl_pack6(const bf16 *from, long outputs, long inputs, const struct matrix *packed, uint8_t *to,
                    float *scales, float *doubts) {
  struct pack p = {.from = from, .packed = packed, .to8 = (int8_t *)to, .scales = scales, .doubts = doubts,
                   .outputs = outputs, .inputs = inputs};
  pool_run(pack_panel6, &p, (outputs + LANES - 1) / LANES);
}

/* The exponents that a panel's codes stand for begin at the one from which on there are most. */
enum { CODES = 15, HIGHEST_BASE = 240 };

static int exponent(bf16 weight) { return weight >> 7 & 0xff; }

/* Zeros are said without an exponent. Negative: twelve bits cannot say this weight. */
static int code_of(bf16 weight, int base) {
  int code = exponent(weight) - base;
  return !(weight & 0x7fff) ? ZERO : code < CODES ? code : -1;
}

static void choose_base(void *context, long panel) {
  struct pack *p = context;
  long found[256] = {0}, inside = 0, most = -1;
  for (int lane = 0; lane < LANES; lane++) {
    long row = source(p, panel, lane);
    for (long i = 0; row < p->outputs && i < p->inputs; i++)
      found[exponent(p->from[row * p->inputs + i])] += (p->from[row * p->inputs + i] & 0x7fff) > 0;
  }
  for (int i = 1; i < CODES; i++) inside += found[i];
  for (int base = 1; base <= HIGHEST_BASE; base++) {
    inside += found[base + CODES - 1];
    if (inside > most) {
      most = inside;
      p->bases[panel] = (uint8_t)base;
    }
    inside -= found[base];
  }
  long odds = -most;
  for (int i = 0; i < 256; i++) odds += found[i];
  p->starts[panel + 1] = (int32_t)odds; /* how many; internvl_odds adds up */
}

/* How many weights of from[outputs][inputs] twelve bits cannot say. bases: [panels + 1]; starts:
   [panels + 1], where the odd ones of each panel begin. */
long internvl_odds(const bf16 *from, long outputs, long inputs, long gates, uint8_t *bases, int32_t *starts) {
  struct pack p = {.from = from, .outputs = outputs, .inputs = inputs, .gates = gates, .bases = bases,
                   .starts = starts};
  long panels = (outputs + LANES - 1) / LANES;
  pool_run(choose_base, &p, panels);
  bases[panels] = starts[0] = 0;
  for (long panel = 0; panel < panels; panel++) starts[panel + 1] += starts[panel];
  return starts[panels];
}

static void pack_panel12(void *context, long panel) {
  const struct pack *p = context;
  uint8_t *to = (uint8_t *)p->to8 + panel / GROUP * GROUP * p->inputs * LANES * 3 / 2 + panel % GROUP * PIECE;
  struct odd *odd = p->odds + p->starts[panel];
  int base = p->bases[panel];
  for (long i = 0; i < p->inputs; i++) {
    uint8_t *piece = to + i / 8 * GROUP * PIECE;
    if (i % 8 == 0) memset(piece, 0, PIECE);
    for (int lane = 0; lane < LANES; lane++) {
      long row = source(p, panel, lane);
      bf16 weight = row < p->outputs ? p->from[row * p->inputs + i] : 0;
      int code = code_of(weight, base);
      if (code < 0) {
        *odd++ = (struct odd){(int32_t)i, (uint16_t)(panel % GROUP * LANES + lane), weight};
        weight = 0;
        code = ZERO;
      }
      long pair = i % 8 / 2, word = lane * 2 + i % 2;
      piece[pair * 32 + word] = (uint8_t)(weight >> 8 & 0x80) | (weight & 0x7f);
      piece[EXPONENTS + word * 2 + pair / 2] |= (uint8_t)(code << pair % 2 * 4);
    }
  }
}

/* The same in twelve bits (wide.c), given what internvl_odds found, with a panel of zeros if they are not
   even. inputs is a multiple of STEP. */
void internvl_pack12(const bf16 *from, long outputs, long inputs, long gates, uint8_t *bases, int32_t *starts,
                     struct odd *odds, uint8_t *to) {
  struct pack p = {.from = from, .to8 = (int8_t *)to, .outputs = outputs, .inputs = inputs, .gates = gates,
                   .bases = bases, .starts = starts, .odds = odds};
  pool_run(pack_panel12, &p, (outputs + COLUMNS - 1) / COLUMNS * GROUP);
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
