/* Sums and norms of rows. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>

enum { AT_ONCE = 4 };

struct norm {
  bf16 *hidden;
  const bf16 *delta;
  const float *weight, *bias;
  bf16 *out;
  long rows, size, ldh, ldd, ldo;
  float eps;
  int centred;
};

CLONES static void one(const struct norm *n, bf16 *hidden, const bf16 *delta, const float *weight,
                       bf16 *out) {
  floats sum = all(0), squares = all(0);
  for (long i = 0; i < n->size; i += LANES) {
    if (delta) put_bf16(hidden + i, get_bf16(hidden + i) + get_bf16(delta + i));
    sum += get_bf16(hidden + i);
  }
  float mean = n->centred ? total(sum) / n->size : 0;
  /* Not the mean of squares less the square of the mean: that loses what is small beside it. */
  for (long i = 0; i < n->size; i += LANES) {
    floats x = get_bf16(hidden + i) - mean;
    squares += x * x;
  }
  float variance = total(squares) / n->size;
  float scale = 1 / sqrtf(variance + n->eps);
  for (long i = 0; i < n->size; i += LANES) {
    floats x = (get_bf16(hidden + i) - mean) * scale * get(weight + i);
    put_bf16(out + i, n->bias ? x + get(n->bias + i) : x);
  }
}

static void part(void *context, long index) {
  const struct norm *n = context;
  for (long row = index * AT_ONCE; row < (index + 1) * AT_ONCE && row < n->rows; row++)
    one(n, n->hidden + row * n->ldh, n->delta ? n->delta + row * n->ldd : NULL, n->weight,
        n->out + row * n->ldo);
}

/* hidden += delta, if there is one; out = the norm of hidden, times weight, plus bias if there is one.
   size is a multiple of 16. With `centred` the mean is taken away first: LayerNorm, else RMSNorm. */
void internvl_add_norm(bf16 *hidden, long ldh, const bf16 *delta, long ldd, const float *weight,
                       const float *bias, bf16 *out, long ldo, long rows, long size, float eps,
                       int centred) {
  struct norm n = {hidden, delta, weight, bias, out, rows, size, ldh, ldd, ldo, eps, centred};
  pool_run(part, &n, (rows + AT_ONCE - 1) / AT_ONCE);
}

struct head_norms {
  struct norm norm; /* of one head; rows are tokens */
  const struct heads *heads;
  const float *query, *key;
};

static void token(void *context, long row) {
  const struct head_norms *h = context;
  bf16 *head = h->norm.hidden + row * h->norm.ldh;
  int queries = h->heads->heads, both = queries + h->heads->kv_heads;
  for (int i = 0; i < both; i++, head += h->norm.size)
    one(&h->norm, head, NULL, i < queries ? h->query : h->key, head);
}

/* The RMSNorm of every query head and every key head, in place. A head's size is a multiple of 16. */
void internvl_head_norms(const struct heads *heads, bf16 *qkv, long ldq, long tokens,
                         const float *query, const float *key, float eps) {
  struct norm norm = {.hidden = qkv, .size = heads->head, .ldh = ldq, .eps = eps};
  struct head_norms h = {norm, heads, query, key};
  pool_run(token, &h, tokens);
}
