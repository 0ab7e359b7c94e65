/* What the files of this folder offer Python and each other. */
#pragma once
#include "block.h"

/* A linear layer in panels (internvl_pack), quantised if it has scales (internvl_pack8). */
struct matrix {
  const void *panels;
  const float *scales;
  const int32_t *sums;
  const float *bias; /* or NULL */
  long inputs, outputs;
};

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
