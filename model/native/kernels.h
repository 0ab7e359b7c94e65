/* What the files of this folder offer Python and each other. */
#pragma once
#include "block.h"

/* A weight that is too far from the others of its panel for twelve bits. */
struct odd {
  int32_t input;
  uint16_t column; /* of its group */
  bf16 value;
};

struct sketch;

/* A linear layer in panels (internvl_pack), quantised if it has scales (internvl_pack8; if it has no sums
   internvl_pack6), narrow if it has bases (internvl_pack12), one for each panel, with the odds of panel i
   from odd_starts[i] on. */
struct matrix {
  const void *panels;
  const float *scales;
  const int32_t *sums;
  const float *bias; /* or NULL */
  const uint8_t *bases;
  const int32_t *odd_starts;
  const struct odd *odds;
  struct sketch *sketch; /* or NULL */
  long inputs, outputs;
};

/* A row and an output's weights that are shorter have no sum, in whatever order, that overflows. */
#define LONGEST 1e18f

/* A head once more, in six bits: draw.c says what for. */
struct sketch {
  struct matrix whole;
  const float *doubts; /* for each of its scales */
  long rest;           /* draws for which it is not used */
};

/* Whether it is whole numbers of six bits. */
static inline int is_six(const struct matrix *m) { return m->scales && !m->sums; }

/* Bytes that so many inputs of a panel take. */
static inline long panel_bytes(const struct matrix *m, long inputs) {
  return inputs * LANES * (is_six(m) ? 3 : m->scales ? 4 : m->bases ? 6 : 8) / 4;
}

/* What follows a product: nothing; GELU; silu(even panel) * odd panel, half as many outputs; nothing, and
   y is fp32, without a bias. */
enum { PLAIN, GELU, GATE, FLOATS };

/* In the place of a token, as in engine/sampling/base.py: the highest is no number that can be compared,
   or all of them are -inf. */
enum { NOT_FINITE = -1, NOTHING_LEFT = -2 };

/* A step's tokens, row by row. */
struct batch {
  const float *cosine, *sine;                        /* [tokens][head / 2] */
  const int64_t *slots;                              /* [tokens] */
  const int64_t *tables, *starts, *contexts, *tasks; /* tasks: [rows + 1], where each row's begin */
  long width, rows, tokens;                          /* width: entries of a row in tables */
};

/* The sizes of attention: `size` tokens are a block of the cache. */
struct heads {
  int heads, kv_heads, head, size;
};

long internvl_linear_scratch(const struct matrix *m, long rows);
void internvl_linear(const struct matrix *m, const bf16 *x, long ldx, long rows, void *y, long ldy,
                     int kind, void *scratch);
long internvl_draw_scratch(const struct matrix *m, long rows);
void internvl_draw(const struct matrix *m, const bf16 *x, long ldx, long rows, int64_t *tokens, void *scratch);
void internvl_add_norm(bf16 *hidden, long ldh, const bf16 *delta, long ldd, const float *weight,
                       const float *bias, bf16 *out, long ldo, long rows, long size, float eps,
                       int centred);
void internvl_head_norms(const struct heads *heads, bf16 *qkv, long ldq, long tokens,
                         const float *query, const float *key, float eps);
void internvl_rotate_write(const struct heads *h, const struct batch *batch, const bf16 *qkv, long ldq,
                           bf16 *query, bf16 *cache);
void internvl_attend(const struct heads *h, const struct batch *batch, const bf16 *query, bf16 *cache,
                     bf16 *out);
struct decoder;
long internvl_decode_scratch(const struct decoder *d, long tokens);
void internvl_decode(const struct decoder *d, const struct batch *batch, const int64_t *wanted, long count,
                     bf16 *hidden, bf16 *out, bf16 *scratch);

/* wide.c: products by AVX512, if wide_fit() says so, and narrow panels. More rows than MOST_ROWS at a time
   leave too little of the second cache to the panels. */
enum { TALLEST_BLOCK = 12, MOST_ROWS = 256, PIECE = 192, EXPONENTS = 128, ZERO = 15, SIX_ZERO = 32 };
int wide_fit(const struct matrix *m, long rows);
/* c[rows][COLUMNS] = x[rows][..] times the group of panels at `column`; rows are ldx bytes apart. starts:
   for whole numbers, what each row's sums begin with. */
void wide_product(const struct matrix *m, long column, const void *x, long ldx, int rows, const int32_t *starts,
                  void *c);
void wide_widen(const uint8_t *from, int base, long inputs, bf16 *to);
void wide_add_odds(const struct matrix *m, long column, const bf16 *x, long ldx, long rows, float *c);
