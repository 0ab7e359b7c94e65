/* Attention: rows of queries over packed keys and values, softmax in fp32 as the keys pass by.

   Keys are packed as a matrix of keys x head_dim (see block.h), values as one of head_dim x keys, in
   pieces of so many keys: a block of the paged cache, or a chunk of a tile's. Keys are taken a chunk
   at a time from the first on, so a row's result depends on its own query and keys alone, however
   the batch was cut. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>

enum { CHUNK = 544, LONG_CHUNK = 1056, QUERIES = 32, MOST_HEAD = 256, GAP = 16 };

/* AVX512 is slow enough for sums and shares of all keys of a tile in the second cache, AMX is not. */
static long chunk_keys(void) { return block_level == 3 ? LONG_CHUNK : CHUNK; }

/* Where the keys of one head begin: piece i has `size` keys at keys(i) and values(i). */
struct source {
  const bf16 *data;
  const int64_t *table; /* NULL: piece i is at i * step */
  long step, values;    /* elements from piece to piece, and from a piece's keys to its values */
  long size;
};

static const bf16 *piece(const struct source *s, long index) {
  return s->data + (s->table ? s->table[index] : index) * s->step;
}

struct rows {
  const bf16 *at; /* the queries, `apart` elements from one to the next: in `query`, or elsewhere */
  long apart;
  bf16 query[QUERIES][MOST_HEAD] __attribute__((aligned(64)));
  float scores[QUERIES * (LONG_CHUNK + GAP)] __attribute__((aligned(64)));
  bf16 shares[QUERIES * (LONG_CHUNK + GAP)] __attribute__((aligned(64)));
  float mixed[QUERIES][MOST_HEAD] __attribute__((aligned(64)));
  float sum[QUERIES][LANES] __attribute__((aligned(64)));
  float highest[QUERIES], fade[QUERIES];
  long limit[QUERIES]; /* keys that a row may see */
  int count;
};

#if defined(__x86_64__)
#include <immintrin.h>

/* 2 to the power of x: the same polynomial as `power`, any x. */
#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
FAST INLINE __m512 fast_power(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.009570090100169182f), _mm512_set1_ps(0.05591785907745361f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402474582195282f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931217908859253f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999992847442627f));
  return _mm512_scalef_ps(p, whole);
}

FAST static void fast_shares(const float *scores, long seen, float scale, float high, bf16 *shares,
                             float *sums) {
  __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(high), sum = _mm512_loadu_ps(sums), sum1 = _mm512_setzero_ps();
  for (long i = 0; i < seen; i += 2 * LANES) {
    __m512 a = fast_power(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), by, less));
    __m512 b = fast_power(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + LANES), by, less));
    if (i + 2 * LANES > seen) {
      long left = seen - i;
      a = _mm512_maskz_mov_ps((__mmask16)((1u << (left < 16 ? left : 16)) - 1), a);
      b = _mm512_maskz_mov_ps((__mmask16)(left < 16 ? 0 : (1u << (left - 16)) - 1), b);
    }
    sum = _mm512_add_ps(sum, a);
    sum1 = _mm512_add_ps(sum1, b);
    _mm512_storeu_si512(shares + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  _mm512_storeu_ps(sums, _mm512_add_ps(sum, sum1));
}

FAST static float fast_highest(const float *scores, long seen) {
  __m512 a = _mm512_set1_ps(-INFINITY), b = a, c = a, d = a;
  long i = 0;
  for (; i + 64 <= seen; i += 64) {
    a = _mm512_max_ps(a, _mm512_loadu_ps(scores + i));
    b = _mm512_max_ps(b, _mm512_loadu_ps(scores + i + 16));
    c = _mm512_max_ps(c, _mm512_loadu_ps(scores + i + 32));
    d = _mm512_max_ps(d, _mm512_loadu_ps(scores + i + 48));
  }
  for (; i < seen; i += 16) {
    __mmask16 inside = (__mmask16)(seen - i < 16 ? (1u << (seen - i)) - 1 : 0xffff);
    a = _mm512_mask_max_ps(a, inside, a, _mm512_loadu_ps(scores + i));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
}
#endif

/* The highest of `seen` scores; what is behind them in the last sixteen is overwritten. */
CLONES static float highest(float *scores, long seen) {
  floats most = all(-INFINITY);
  for (long i = seen; i % LANES; i++) scores[i] = -INFINITY;
  for (long i = 0; i < seen; i += LANES) most = larger(most, get(scores + i));
  return largest(most);
}

/* 2 to the power of scale * scores - high, as far as there are any, rounded, and their sums. */
CLONES static void share_out(const float *scores, long seen, float scale, float high, bf16 *shares,
                             float *sums) {
  floats sum = get(sums);
  for (long i = 0; i < seen; i += LANES) {
    floats share = power(get(scores + i) * scale - high);
    if (i + LANES > seen)
      for (long lane = seen - i; lane < LANES; lane++) share[lane] = 0;
    sum += share;
    put_share(shares + i, share);
  }
  put(sums, sum);
}

/* Scores of `keys` keys from `first` on to shares, and what the sums so far are to be multiplied by.
   `scale` holds the change from e to 2 as the base of powers. */
static void softmax(struct rows *r, long width, long first, long keys, float scale) {
  for (int row = 0; row < r->count; row++) {
    long seen = r->limit[row] - first;
    if (seen > keys) seen = keys;
    float *scores = r->scores + row * width, *sums = r->sum[row];
    bf16 *shares = r->shares + row * width;
    r->fade[row] = 1;
    if (seen > 0) {
#if defined(__x86_64__)
      int fast = block_level >= 3;
      float high = (fast ? fast_highest(scores, seen) : highest(scores, seen)) * scale;
#else
      float high = highest(scores, seen) * scale;
#endif
      float old = r->highest[row];
      if (high < old) high = old;
      if (high > old) {
        r->highest[row] = high;
        r->fade[row] = exp2f(old - high);
        for (int lane = 0; lane < LANES; lane++) sums[lane] *= r->fade[row];
      }
#if defined(__x86_64__)
      if (fast) fast_shares(scores, seen, scale, high, shares, sums);
      else
#endif
        share_out(scores, seen, scale, high, shares, sums);
    }
    long end = seen <= 0 ? 0 : (seen + LANES - 1) / LANES * LANES;
    if (end < keys) memset(shares + end, 0, (keys - end) * sizeof(bf16));
  }
}

CLONES static void fade(struct rows *r, int head) {
  for (int row = 0; row < r->count; row++)
    for (int i = 0; i < head; i += LANES)
      put(r->mixed[row] + i, get(r->mixed[row] + i) * r->fade[row]);
}

/* Fill r->mixed, not yet divided by r->sum. */
static void mix(struct rows *r, const struct source *s, int head, float scale) {
  long most = 0, chunk = chunk_keys(), width = chunk + GAP;
  for (int row = 0; row < r->count; row++) {
    if (r->limit[row] > most) most = r->limit[row];
    r->highest[row] = -INFINITY;
    memset(r->sum[row], 0, sizeof r->sum[row]);
  }
  for (long first = 0; first < most; first += chunk) {
    long keys = most - first < chunk ? (most - first + STEP - 1) / STEP * STEP : chunk;
    long inputs;
    for (long key = 0; key < keys; key += inputs) {
      long at = first + key, left = s->size - at % s->size; /* a chunk need not be made of pieces */
      inputs = keys - key < left ? keys - key : left;
      const bf16 *panels = piece(s, at / s->size) + at % s->size * head;
      block_panels(r->at, r->apart, r->count, panels, (int)(inputs / LANES), head, r->scores + key, width);
    }
    softmax(r, width, first, keys, scale);
    if (first) fade(r, head);
    for (long key = 0; key < keys; key += inputs) {
      long at = first + key, left = s->size - at % s->size;
      inputs = keys - key < left ? keys - key : left;
      const bf16 *values = piece(s, at / s->size) + s->values + at % s->size * LANES;
      for (int column = 0; column < head; column += COLUMNS)
        block_product(r->shares + key, width, r->count, values + column * s->size,
                      LANES * s->size, GROUP, (int)inputs, r->mixed[0] + column, MOST_HEAD, at > 0, NULL);
    }
  }
}

CLONES static void deliver(const struct rows *r, int row, int head, bf16 *to) {
  float share = 1 / total(get(r->sum[row]));
  for (int i = 0; i < head; i += LANES) put_bf16(to + i, get(r->mixed[row] + i) * share);
}

/* One key into a piece of `size` keys, one value likewise. */
static void store(const bf16 *key, const bf16 *value, int head, long size, long at, bf16 *keys,
                  bf16 *values) {
  bf16 *panel = keys + at / LANES * LANES * head + at % LANES * 2;
  for (int i = 0; i < head; i += 2) memcpy(panel + i * LANES, key + i, 2 * sizeof(bf16));
  bf16 *pairs = values + at / 2 * 2 * LANES + at % 2;
  for (int i = 0; i < head; i++) pairs[i / LANES * LANES * size + i % LANES * 2] = value[i];
}

static struct rows *scratch(void) {
  static __thread struct rows *mine;
  if (!mine) mine = aligned_alloc(64, (sizeof *mine + 63) / 64 * 64);
  return mine;
}

struct paged {
  const struct batch *batch;
  const bf16 *qkv;
  bf16 *query, *cache, *out;
  long ldq, at_once;
  int heads, kv_heads, head, size;
};

CLONES static void turn(const bf16 *from, const float *cosine, const float *sine, int head, bf16 *to) {
  int half = head / 2;
  for (int i = 0; i < half; i += LANES) {
    floats a = get_bf16(from + i), b = get_bf16(from + half + i);
    floats c = get(cosine + i), s = get(sine + i);
    put_bf16(to + i, a * c - b * s);
    put_bf16(to + half + i, b * c + a * s);
  }
}

static void turn_token(void *context, long part) {
  const struct paged *p = context;
  const struct batch *b = p->batch;
  long head = p->head;
  for (long token = part * p->at_once; token < (part + 1) * p->at_once && token < b->tokens; token++) {
    const bf16 *row = p->qkv + token * p->ldq;
    const float *c = b->cosine + token * head / 2, *s = b->sine + token * head / 2;
    long block = b->slots[token] / p->size, at = b->slots[token] % p->size;
    bf16 key[MOST_HEAD];
    for (long h = 0; h < p->heads; h++)
      turn(row + h * head, c, s, head, p->query + (token * p->heads + h) * head);
    for (long h = 0; h < p->kv_heads; h++) {
      turn(row + (p->heads + h) * head, c, s, head, key);
      bf16 *keys = p->cache + (block * 2 * p->kv_heads + h) * p->size * head;
      store(key, row + (p->heads + p->kv_heads + h) * head, head, p->size, at, keys,
            keys + p->kv_heads * p->size * head);
    }
  }
}

/* Turn queries and keys of qkv[tokens][heads + 2 * kv_heads][head], rows ldq apart, by their angles,
   and store keys and values at their slots of one layer's cache,
   [blocks][2][kv_heads][size * head]. query is [tokens][heads][head]. */
void internvl_rotate_write(const struct heads *h, const struct batch *batch, const bf16 *qkv, long ldq,
                           bf16 *query, bf16 *cache) {
  struct paged p = {batch, qkv, query, cache, NULL, ldq, 4, h->heads, h->kv_heads, h->head, h->size};
  pool_run(turn_token, &p, (batch->tokens + p.at_once - 1) / p.at_once);
}

static void attend_part(void *context, long part) {
  const struct paged *p = context;
  const struct batch *b = p->batch;
  long row = 0;
  while (b->tasks[row + 1] <= part) row++;
  long kv_head = (part - b->tasks[row]) % p->kv_heads;
  long first = b->starts[row] + (part - b->tasks[row]) / p->kv_heads * p->at_once;
  long last = first + p->at_once < b->starts[row + 1] ? first + p->at_once : b->starts[row + 1];
  int group = p->heads / p->kv_heads;
  struct rows *r = scratch();
  r->at = r->query[0];
  r->apart = MOST_HEAD;
  r->count = 0;
  for (long token = first; token < last; token++)
    for (int g = 0; g < group; g++, r->count++) {
      memcpy(r->query[r->count], p->query + (token * p->heads + kv_head * group + g) * p->head,
             p->head * sizeof(bf16));
      r->limit[r->count] = b->contexts[row] - (b->starts[row + 1] - token) + 1;
    }
  long one = (long)p->size * p->head;
  struct source s = {p->cache + kv_head * one, b->tables + row * b->width, 2 * p->kv_heads * one,
                     p->kv_heads * one, p->size};
  mix(r, &s, p->head, 1.44269504f / sqrtf(p->head));
  int i = 0;
  for (long token = first; token < last; token++)
    for (int g = 0; g < group; g++, i++)
      deliver(r, i, p->head, p->out + (token * p->heads + kv_head * group + g) * p->head);
  block_end();
}

/* How many tokens of a row are computed at once. */
long internvl_attend_tokens(int heads, int kv_heads) {
  return QUERIES / (heads / kv_heads);
}

/* Causal attention of the last tokens of every row over its blocks. */
void internvl_attend(const struct heads *h, const struct batch *batch, const bf16 *query, bf16 *cache,
                     bf16 *out) {
  long at_once = internvl_attend_tokens(h->heads, h->kv_heads);
  struct paged p = {batch, NULL, (bf16 *)query, cache, out, 0, at_once, h->heads, h->kv_heads, h->head, h->size};
  pool_run(attend_part, &p, batch->tasks[batch->rows]);
}

struct tile {
  const bf16 *qkv;
  long ldq, ldo;
  bf16 *packed, *out;
  long patches, padded, blocks, chunk;
  int heads, head;
};

/* Keys and values of one head of one tile, packed in chunks of keys, a panel of keys at a time.
   What a product reads behind the last patch must be numbers: zeros. */
CLONES static void pack_head(void *context, long part) {
  const struct tile *t = context;
  long tile = part / t->heads, h = part % t->heads, size = (long)t->heads * t->head;
  long chunk = t->chunk;
  bf16 *to = t->packed + part * 2 * t->padded * t->head;
  static const bf16 zero[MOST_HEAD];
  for (long i = 0; i < (t->patches + STEP - 1) / STEP * STEP; i += LANES) {
    const bf16 *keys[LANES], *values[LANES];
    for (int j = 0; j < LANES; j++) {
      const bf16 *query = t->qkv + (tile * t->patches + i + j) * t->ldq + h * t->head;
      keys[j] = i + j < t->patches ? query + size : zero;
      values[j] = i + j < t->patches ? query + 2 * size : zero;
    }
    long at = i % chunk;
    bf16 *panel = to + i / chunk * 2 * chunk * t->head + at * t->head;
    bf16 *pairs = to + (i / chunk * 2 + 1) * chunk * t->head + at * LANES;
    for (int k = 0; k < t->head; k += 2 * LANES, panel += 2 * LANES * LANES) {
      words x[LANES];
      for (int j = 0; j < LANES; j++) memcpy(x + j, keys[j] + k, sizeof *x);
      transpose(x);
      memcpy(panel, x, sizeof x);
    }
    for (int k = 0; k < t->head; k += LANES)
      for (int j = 0; j < LANES; j += 2) {
        words low = (words)get_bf16(values[j] + k) >> 16, both = low | (words)get_bf16(values[j + 1] + k);
        memcpy(pairs + k * chunk + j * LANES, &both, sizeof both);
      }
  }
}

static void attend_tile(void *context, long part) {
  const struct tile *t = context;
  long block = part % t->blocks, which = part / t->blocks;
  long tile = which / t->heads, h = which % t->heads;
  struct rows *r = scratch();
  long first = block * QUERIES;
  r->count = t->patches - first < QUERIES ? (int)(t->patches - first) : QUERIES;
  r->at = t->qkv + (tile * t->patches + first) * t->ldq + h * t->head;
  r->apart = t->ldq;
  for (int i = 0; i < r->count; i++) r->limit[i] = t->patches;
  struct source s = {t->packed + which * 2 * t->padded * t->head, NULL, 2 * t->chunk * t->head,
                     t->chunk * t->head, t->chunk};
  mix(r, &s, t->head, 1.44269504f / sqrtf(t->head));
  for (int i = 0; i < r->count; i++)
    deliver(r, i, t->head, t->out + (tile * t->patches + first + i) * t->ldo + h * t->head);
  block_end();
}

/* Elements that internvl_tile_attention needs as scratch. */
long internvl_tile_scratch(long tiles, long patches, int heads, int head) {
  long chunk = chunk_keys();
  return tiles * heads * 2 * ((patches + chunk - 1) / chunk * chunk) * head;
}

/* Attention of all patches of a tile to each other. qkv rows hold queries, keys and values of all
   heads one behind the other; ldq and ldo are the distances of rows in elements. */
void internvl_tile_attention(const bf16 *qkv, long ldq, long tiles, long patches, int heads, int head,
                             bf16 *packed, bf16 *out, long ldo) {
  long chunk = chunk_keys();
  struct tile t = {qkv, ldq, ldo, packed, out, patches, (patches + chunk - 1) / chunk * chunk,
                   (patches + QUERIES - 1) / QUERIES, chunk, heads, head};
  pool_run(pack_head, &t, tiles * heads);
  pool_run(attend_tile, &t, tiles * heads * t.blocks);
}
