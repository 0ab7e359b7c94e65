/* Linear layers: rows of bf16 times a packed matrix, and what follows at once. */
#include "lanes.h"
#include "pool.h"

enum { PLAIN, GELU, GATE, FLOATS };

struct linear {
  const bf16 *x;
  const bf16 *panels;
  const float *bias;
  void *y;
  long rows, inputs, outputs, ldx, ldy, tall;
  long groups, chunks;
  int kind;
};

CLONES static void finish(const struct linear *w, const float *c, long row, int rows, long column) {
  int width = w->outputs - column < COLUMNS ? (int)(w->outputs - column) : COLUMNS;
  float bias[COLUMNS] = {0};
  if (w->bias) memcpy(bias, w->bias + column, width * sizeof(float));
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

static void part(void *context, long index) {
  const struct linear *w = context;
  long chunk = index / w->groups, group = index % w->groups;
  long first = chunk * w->tall, last = first + w->tall < w->rows ? first + w->tall : w->rows;
  long stride = w->inputs * LANES, column = group * COLUMNS;
  long panels = (w->outputs - column + LANES - 1) / LANES;
  if (panels > GROUP) panels = GROUP;
  const bf16 *b = w->panels + group * GROUP * stride;
  /* What this thread will probably read next, brought near a little with every block of rows. */
  long blocks = (last - first + ROWS - 1) / ROWS, lines = (GROUP * stride * 2 / 64 + blocks - 1) / blocks;
  const char *soon = (const char *)(b + pool_threads() * GROUP * stride);
  if (group + pool_threads() >= w->groups || blocks == 1) lines = 0;
  float c[ROWS * COLUMNS] __attribute__((aligned(64)));
  for (long row = first; row < last; row += ROWS) {
    int rows = last - row < ROWS ? (int)(last - row) : ROWS;
    for (long line = 0; line < lines; line++, soon += 64) __builtin_prefetch(soon, 0, 2);
    block_product(w->x + row * w->ldx, w->ldx, rows, b, stride, (int)panels, (int)w->inputs, c,
                  COLUMNS, 0);
    finish(w, c, row, rows, column);
  }
  block_end();
}

/* y[rows][outputs] = f(x[rows][inputs] * panels + bias). kind: 0 nothing; 1 GELU; 2 silu(even panel)
   * odd panel, half as many outputs; 3 y is fp32 and there is no bias. bias may be NULL. */
void internvl_linear(const bf16 *x, long ldx, long rows, const bf16 *panels, const float *bias,
                     long inputs, long outputs, void *y, long ldy, int kind) {
  /* Rows that stay in the second cache while the panels pass by. */
  long tall = (1 << 19) / inputs / ROWS * ROWS;
  if (tall < ROWS) tall = ROWS;
  struct linear w = {x, panels, bias, y, rows, inputs, outputs, ldx, ldy, tall, 0, 0, kind};
  w.groups = (outputs + COLUMNS - 1) / COLUMNS;
  w.chunks = (rows + tall - 1) / tall;
  pool_run(part, &w, w.groups * w.chunks);
}

struct pack {
  const bf16 *from;
  bf16 *to;
  long outputs, inputs, padded, gates;
};

static void pack_panel(void *context, long panel) {
  const struct pack *p = context;
  bf16 *to = p->to + panel * p->padded * LANES;
  for (int lane = 0; lane < LANES; lane++) {
    /* With gates, even panels hold rows of the first half and odd ones of the second. */
    long row = p->gates ? (panel % 2) * p->gates + panel / 2 * LANES + lane : panel * LANES + lane;
    long inside = row < p->outputs ? p->inputs : 0;
    const bf16 *from = p->from + row * p->inputs;
    for (long i = 0; i < inside; i++) to[(i / 2 * LANES + lane) * 2 + i % 2] = from[i];
    for (long i = inside; i < p->padded; i++) to[(i / 2 * LANES + lane) * 2 + i % 2] = 0;
  }
}

/* from[outputs][inputs] to panels. gates: how many of the outputs are gates, or 0. */
void internvl_pack(const bf16 *from, long outputs, long inputs, bf16 *to, long gates) {
  struct pack p = {from, to, outputs, inputs, (inputs + STEP - 1) / STEP * STEP, gates};
  pool_run(pack_panel, &p, (outputs + LANES - 1) / LANES);
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
