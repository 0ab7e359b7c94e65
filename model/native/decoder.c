/* The decoder's layers one behind the other: a step of few tokens is over before Python could have
   named two hundred operations. */
#include "kernels.h"

#include <stddef.h>
#include <string.h>

struct layer {
  const float *norm1, *norm2, *q_norm, *k_norm; /* the last two or NULL */
  struct matrix qkv, out, gate_up, down;
  bf16 *cache;
};

struct decoder {
  const struct layer *layers;
  const float *norm;
  long count, hidden;
  float eps;
  struct heads heads;
};

/* Rows of an activation lie so many elements further apart than they are long: at distances that are
   powers of two they would fight for the same lines of the first cache. */
enum { GAP = 32 };

/* Rows for the longest of what a layer makes. */
static long longest(const struct layer *l) {
  long most = l->qkv.outputs > l->gate_up.outputs / 2 ? l->qkv.outputs : l->gate_up.outputs / 2;
  return (most > l->down.outputs ? most : l->down.outputs) + GAP;
}

static long quantised(const struct layer *l, long tokens) {
  long most = 0;
  for (const struct matrix *m = &l->qkv; m <= &l->down; m++) {
    long bytes = internvl_linear_scratch(m, tokens);
    if (bytes > most) most = bytes;
  }
  return most;
}

/* Bytes that internvl_decode needs as scratch. */
long internvl_decode_scratch(const struct decoder *d, long tokens) {
  return 3 * tokens * longest(d->layers) * sizeof(bf16) + quantised(d->layers, tokens);
}

/* hidden[tokens][hidden] through all layers and the last norm to out[count][hidden], for the `wanted`
   rows, in ascending order: of the others the last layer leaves keys and values only. What was in hidden
   is lost. */
void internvl_decode(const struct decoder *d, const struct batch *batch, const int64_t *wanted, long count,
                     bf16 *hidden, bf16 *out, bf16 *scratch) {
  long size = d->hidden, tokens = batch->tokens, ld = longest(d->layers);
  long width = (long)d->heads.heads * d->heads.head;
  bf16 *normed = scratch, *wide = normed + tokens * ld, *delta = wide + tokens * ld;
  void *whole = delta + tokens * ld;
  for (long i = 0; i < d->count; i++) {
    const struct layer *l = d->layers + i;
    internvl_add_norm(hidden, size, i ? delta : NULL, ld, l->norm1, NULL, normed, ld, tokens, size,
                      d->eps, 0);
    internvl_linear(&l->qkv, normed, ld, tokens, wide, ld, PLAIN, whole);
    if (l->q_norm)
      internvl_head_norms(&d->heads, wide, ld, tokens, l->q_norm, l->k_norm, d->eps);
    internvl_rotate_write(&d->heads, batch, wide, ld, delta, l->cache);
    internvl_attend(&d->heads, batch, delta, l->cache, normed);
    if (i == d->count - 1 && count < tokens) {
      for (long row = 0; row < count; row++) {
        memmove(normed + row * width, normed + wanted[row] * width, width * sizeof(bf16));
        memmove(hidden + row * size, hidden + wanted[row] * size, size * sizeof(bf16));
      }
      if (!(tokens = count)) return;
    }
    internvl_linear(&l->out, normed, width, tokens, delta, ld, PLAIN, whole);
    internvl_add_norm(hidden, size, delta, ld, l->norm2, NULL, normed, ld, tokens, size, d->eps, 0);
    internvl_linear(&l->gate_up, normed, ld, tokens, wide, ld, GATE, whole);
    internvl_linear(&l->down, wide, ld, tokens, delta, ld, PLAIN, whole);
  }
  internvl_add_norm(hidden, size, delta, ld, d->norm, NULL, out, size, tokens, size, d->eps, 0);
}
