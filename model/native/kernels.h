/* What the files of this folder offer Python and each other. */
#pragma once
#include "block.h"

/* A weight that is too far from the others of its panel for twelve bits. */
struct odd {
  int32_t input;
  uint16_t column; /* of its group */
  bf16 value;
};

/* A linear layer in panels (internvl_pack), quantised if it has scales (internvl_pack8), narrow if it
   has bases (internvl_pack12), one for each panel, with the odds of panel i from odd_starts[i] on. */
struct matrix {
  const void *panels;
  const float *scales;
  const int32_t *sums;
  const float *bias; /* or NULL */
  const uint8_t *bases;
  const int32_t *odd_starts;
  const struct odd *odds;
  long inputs, outputs;
};

/* Bytes that so many inputs of a panel take. */
static inline long panel_bytes(const struct matrix *m, long inputs) {
  return inputs * LANES * (m->scales ? 2 : m->bases ? 3 : 4) / 2;
}

/* What follows a product: nothing; GELU; silu(even panel) * odd panel, half as many outputs; or
   nothing, and y is fp32 and there is no bias. */
enum { PLAIN, GELU, GATE, FLOATS };

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
void internvl_add_norm(bf16 *hidden, long ldh, const bf16 *delta, long ldd, const float *weight,
                       const float *bias, bf16 *out, long ldo, long rows, long size, float eps,
                       int centred);
void internvl_head_norms(const struct heads *heads, bf16 *qkv, long ldq, long tokens,
                         const float *query, const float *key, float eps);
void internvl_rotate_write(const struct heads *h, const struct batch *batch, const bf16 *qkv, long ldq,
                           bf16 *query, bf16 *cache);
void internvl_attend(const struct heads *h, const struct batch *batch, const bf16 *query, bf16 *cache,
                     bf16 *out);

/* few.c: narrow panels, and the products of at most FEW rows, if few_fit says so. */
enum { FEW = 24, PIECE = 192, EXPONENTS = 128, ZERO = 15 };
int few_fit(long rows);
int few_rows(long rows);
const uint32_t *few_pairs(const bf16 *x, long ldx, long rows, long inputs, uint32_t *to);
/* c[count][COLUMNS] = x * the group of panels at `column`. */
void few_product(const struct matrix *m, long column, const uint32_t *x, int count, float *c);
void few_widen(const uint8_t *from, int base, long inputs, bf16 *to);
void few_add_odds(const struct matrix *m, long column, const bf16 *x, long ldx, long rows, float *c);
