/* A step in which every row has one new token, from its ids to the last hidden states or the likeliest
   tokens in one call.

   What comes before the layers is some hundred bytes a row. But every step's weights take the place of
   all else in the caches, so that each operation of its own would cost as much as reading part of a
   layer. */
#include "kernels.h"

#include <string.h>

struct single {
  const struct decoder *decoder;
  const struct matrix *head;
  const bf16 *embedding;        /* [tokens][hidden] */
  const float *cosine, *sine;   /* [positions][head / 2] */
  const int64_t *tables;        /* [lines][width]: blocks */
  int64_t *last;                /* [lines]: the tokens drawn last */
  long hidden, width;
  struct heads heads;
};

/* Bytes, in whole lines of the cache. */
static long room(long count, long size) { return (count * size + 63) / 64 * 64; }

static void *take(char **memory, long count, long size) {
  void *taken = *memory;
  *memory += room(count, size);
  return taken;
}

/* Bytes that internvl_single needs as scratch. */
long internvl_single_scratch(const struct single *s, long rows) {
  long half = s->heads.head / 2, layers = internvl_decode_scratch(s->decoder, rows);
  long head = internvl_draw_scratch(s->head, rows);
  return 2 * room(rows * half, sizeof(float)) + room(rows * s->width, sizeof(int64_t)) +
         2 * room(rows, sizeof(int64_t)) + 2 * room(rows + 1, sizeof(int64_t)) +
         room(rows * s->hidden, sizeof(bf16)) + (head > layers ? head : layers);
}

/* inputs[4][rows] are lines, ids (-1: the token drawn last for the line), lengths with the new token, and
   how many positions are saved before it; out[rows][hidden] are the last hidden states. tokens: NULL, or
   for each row's likeliest, which is drawn then. */
void internvl_single(const struct single *s, const int32_t *inputs, long rows, bf16 *out, int64_t *tokens,
                     char *scratch) {
  const int32_t *lines = inputs, *ids = lines + rows, *lengths = ids + rows, *saved = lengths + rows;
  long half = s->heads.head / 2, size = s->heads.size;
  float *cosine = take(&scratch, rows * half, sizeof(float)), *sine = take(&scratch, rows * half, sizeof(float));
  int64_t *tables = take(&scratch, rows * s->width, sizeof(int64_t));
  int64_t *slots = take(&scratch, rows, sizeof(int64_t)), *contexts = take(&scratch, rows, sizeof(int64_t));
  int64_t *starts = take(&scratch, rows + 1, sizeof(int64_t)), *tasks = take(&scratch, rows + 1, sizeof(int64_t));
  bf16 *hidden = take(&scratch, rows * s->hidden, sizeof(bf16));
  for (long row = 0; row <= rows; row++) {
    starts[row] = row;
    tasks[row] = row * s->heads.kv_heads;
  }
  for (long row = 0; row < rows; row++) {
    const int64_t *table = s->tables + lines[row] * s->width;
    int64_t id = ids[row] < 0 ? s->last[lines[row]] : ids[row];
    long place = lengths[row] - 1, position = place - saved[row];
    /* Blocks behind a row's last are never looked at. */
    memcpy(tables + row * s->width, table, (place / size + 1) * sizeof *table);
    slots[row] = table[place / size] * size + place % size;
    contexts[row] = lengths[row];
    memcpy(cosine + row * half, s->cosine + position * half, half * sizeof *cosine);
    memcpy(sine + row * half, s->sine + position * half, half * sizeof *sine);
    memcpy(hidden + row * s->hidden, s->embedding + id * s->hidden, s->hidden * sizeof *hidden);
  }
  struct batch batch = {cosine, sine, slots, tables, starts, contexts, tasks, s->width, rows, rows};
  internvl_decode(s->decoder, &batch, NULL, rows, hidden, out, (bf16 *)scratch);
  if (!tokens) return;
  internvl_draw(s->head, out, s->hidden, rows, tokens, scratch);
  for (long row = 0; row < rows; row++) s->last[lines[row]] = tokens[row] > 0 ? tokens[row] : 0;
}
