/* Attention: rows of queries over packed keys and values, softmax in fp32 as the keys pass by.

   Keys are packed as a matrix of keys x head_dim (see block.h), values as one of head_dim x keys, in
   pieces of so many keys: a block of the paged cache, or CHUNK keys of a tile. Keys are taken CHUNK
   at a time from the first on, so a row's result depends on its own query and keys alone, however
   the batch was cut. */
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>

enum { CHUNK = 128, QUERIES = 32, MOST_HEAD = 256, WIDTH = CHUNK + 16 };

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
  bf16 query[QUERIES][MOST_HEAD] __attribute__((aligned(64)));
  float scores[QUERIES][WIDTH] __attribute__((aligned(64)));
  bf16 shares[QUERIES][WIDTH] __attribute__((aligned(64)));
  float mixed[QUERIES][MOST_HEAD] __attribute__((aligned(64)));
  float sum[QUERIES][LANES] __attribute__((aligned(64)));
  float highest[QUERIES], fade[QUERIES];
  long limit[QUERIES]; /* keys that a row may see */
  int count;
};

/* Scores of `keys` keys from `first` on to shares, and what the sums so far are to be multiplied by.
   `scale` holds the change from e to 2 as the base of powers. */
CLONES static void softmax(struct rows *r, long first, long keys, float scale) {
  ints lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  for (int row = 0; row < r->count; row++) {
    long seen = r->limit[row] - first;
    if (seen > keys) seen = keys;
    float *scores = r->scores[row];
    bf16 *shares = r->shares[row];
    floats most = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= seen; i += LANES) most = larger(most, get(scores + i));
    if (i < seen) {
      floats last = pick(lanes < (int)(seen - i), get(scores + i), all(-INFINITY));
      put(scores + i, last);
      most = larger(most, last);
    }
    r->fade[row] = 1;
    long end = seen <= 0 ? 0 : (seen + LANES - 1) / LANES * LANES;
    if (end) {
      float old = r->highest[row], high = largest(most) * scale;
      if (high < old) high = old;
      if (high > old) {
        r->highest[row] = high;
        r->fade[row] = exp2f(old - high);
      }
      floats sum = get(r->sum[row]) * r->fade[row];
      for (i = 0; i < end; i += LANES) {
        floats share = power(get(scores + i) * scale - high);
        if (i + LANES > seen) share = pick(lanes < (int)(seen - i), share, all(0));
        sum += share;
        put_share(shares + i, share);
      }
      put(r->sum[row], sum);
    }
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
  long most = 0;
  for (int row = 0; row < r->count; row++) {
    if (r->limit[row] > most) most = r->limit[row];
    r->highest[row] = -INFINITY;
    memset(r->sum[row], 0, sizeof r->sum[row]);
  }
  for (long first = 0; first < most; first += CHUNK) {
    long keys = most - first < CHUNK ? (most - first + STEP - 1) / STEP * STEP : CHUNK;
    for (long key = 0; key < keys; key += COLUMNS) {
      long at = first + key;
      const bf16 *panels = piece(s, at / s->size) + at % s->size * head;
      block_product(r->query[0], MOST_HEAD, r->count, panels, LANES * head, GROUP, head,
                    r->scores[0] + key, WIDTH, 0, NULL);
    }
    softmax(r, first, keys, scale);
    if (first) fade(r, head);
    long inputs;
    for (long key = 0; key < keys; key += inputs) {
      long at = first + key, left = s->size - at % s->size; /* CHUNK need not be made of pieces */
      inputs = keys - key < left ? keys - key : left;
      const bf16 *values = piece(s, at / s->size) + s->values + at % s->size * LANES;
      for (int column = 0; column < head; column += COLUMNS)
        block_product(r->shares[0] + key, WIDTH, r->count, values + column * s->size,
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
  struct paged p = {batch, qkv, query, cache, NULL, ldq, 16, h->heads, h->kv_heads, h->head, h->size};
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
  long patches, padded, blocks;
  int heads, head;
};

/* Keys and values of one head of one tile, packed in pieces of CHUNK keys. What a product reads behind
   the last patch must be numbers: zeros. */
CLONES static void pack_head(void *context, long part) {
  const struct tile *t = context;
  long tile = part / t->heads, h = part % t->heads, size = (long)t->heads * t->head;
  bf16 *to = t->packed + part * 2 * t->padded * t->head;
  static const bf16 zero[MOST_HEAD];
  for (long i = 0; i < (t->patches + STEP - 1) / STEP * STEP; i += 2) {
    const bf16 *rows[2];
    for (int j = 0; j < 2; j++)
      rows[j] = t->qkv + (tile * t->patches + i + j) * t->ldq + h * t->head;
    int inside[2] = {i < t->patches, i + 1 < t->patches};
    bf16 *keys = to + i / CHUNK * 2 * CHUNK * t->head, *values = keys + CHUNK * t->head;
    long at = i % CHUNK;
    for (int j = 0; j < 2; j++) {
      const bf16 *key = inside[j] ? rows[j] + size : zero;
      bf16 *panel = keys + at / LANES * LANES * t->head + (at + j) % LANES * 2;
      for (int k = 0; k < t->head; k += 2) memcpy(panel + k * LANES, key + k, 2 * sizeof(bf16));
    }
    const bf16 *a = inside[0] ? rows[0] + 2 * size : zero, *b = inside[1] ? rows[1] + 2 * size : zero;
    for (int k = 0; k < t->head; k += LANES) {
      words low = (words)get_bf16(a + k) >> 16, high = (words)get_bf16(b + k), both = low | high;
      memcpy(values + k * CHUNK + at * LANES, &both, sizeof both);
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
  for (int i = 0; i < r->count; i++) {
    memcpy(r->query[i], t->qkv + (tile * t->patches + first + i) * t->ldq + h * t->head,
           t->head * sizeof(bf16));
    r->limit[i] = t->patches;
  }
  struct source s = {t->packed + which * 2 * t->padded * t->head, NULL, 2 * CHUNK * t->head,
                     CHUNK * t->head, CHUNK};
  mix(r, &s, t->head, 1.44269504f / sqrtf(t->head));
  for (int i = 0; i < r->count; i++)
    deliver(r, i, t->head, t->out + (tile * t->patches + first + i) * t->ldo + h * t->head);
  block_end();
}

/* Elements that internvl_tile_attention needs as scratch. */
long internvl_tile_scratch(long tiles, long patches, int heads, int head) {
  return tiles * heads * 2 * ((patches + CHUNK - 1) / CHUNK * CHUNK) * head;
}

/* Attention of all patches of a tile to each other. qkv rows hold queries, keys and values of all
   heads one behind the other; ldq and ldo are the distances of rows in elements. */
void internvl_tile_attention(const bf16 *qkv, long ldq, long tiles, long patches, int heads, int head,
                             bf16 *packed, bf16 *out, long ldo) {
  struct tile t = {qkv, ldq, ldo, packed, out, patches, (patches + CHUNK - 1) / CHUNK * CHUNK,
                   (patches + QUERIES - 1) / QUERIES, heads, head};
  pool_run(pack_head, &t, tiles * heads);
  pool_run(attend_tile, &t, tiles * heads * t.blocks);
}
