/* A pool of threads for one caller at a time; a second one waits. Waiting threads spin for the time
   between two operations of a step, then sleep. No OpenMP: its runtimes spin too, one against the
   other, as soon as two of them are in one process, and torch brings its own. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define MOST_THREADS 256
/* About 200 microseconds of pauses: longer than the gaps inside a step. */
#define SPINS 4000

static struct {
  pthread_mutex_t caller; /* held by who posts work, until it is done */
  pthread_mutex_t lock;
  pthread_cond_t wake;
  atomic_long round;   /* one more for every piece of work */
  atomic_long next;    /* the part to be taken next */
  atomic_int active;   /* threads that are still at it */
  int sleeping;        /* under the lock */
  int threads;
  work_fn work;
  void *context;
  long parts;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static void take_parts(void) {
  long part;
  while ((part = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.parts)
    pool.work(pool.context, part);
}

/* `started` is the round in which a thread was made: it knows nothing of those before. */
static void *help(void *started) {
  long seen = (long)started;
  for (;;) {
    for (int i = 0; i < SPINS && atomic_load_explicit(&pool.round, memory_order_acquire) == seen; i++)
      pause_cpu();
    if (atomic_load_explicit(&pool.round, memory_order_acquire) == seen) {
      pthread_mutex_lock(&pool.lock);
      pool.sleeping++;
      while (atomic_load_explicit(&pool.round, memory_order_acquire) == seen)
        pthread_cond_wait(&pool.wake, &pool.lock);
      pool.sleeping--;
      pthread_mutex_unlock(&pool.lock);
    }
    seen++;
    take_parts();
    atomic_fetch_sub_explicit(&pool.active, 1, memory_order_release);
  }
  return NULL;
}

/* VERSION in __init__.py. */
int internvl_version(void) { return 7; }

int pool_threads(void) { return pool.threads; }

/* Start what is missing to so many threads; they are never stopped. Returns how many there are. */
long internvl_threads(int threads) {
  pthread_mutex_lock(&pool.caller);
  void *round = (void *)atomic_load(&pool.round);
  while (pool.threads < threads && pool.threads < MOST_THREADS) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, round)) break;
    pthread_detach(thread);
    pool.threads++;
  }
  threads = pool.threads;
  pthread_mutex_unlock(&pool.caller);
  return threads;
}

void pool_run(work_fn work, void *context, long parts) {
  if (pool.threads == 1 || parts == 1) {
    for (long part = 0; part < parts; part++) work(context, part);
    return;
  }
  pthread_mutex_lock(&pool.caller);
  pool.work = work;
  pool.context = context;
  pool.parts = parts;
  atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
  atomic_store_explicit(&pool.active, pool.threads - 1, memory_order_relaxed);
  pthread_mutex_lock(&pool.lock);
  atomic_fetch_add_explicit(&pool.round, 1, memory_order_release);
  if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  take_parts();
  while (atomic_load_explicit(&pool.active, memory_order_acquire)) pause_cpu();
  pthread_mutex_unlock(&pool.caller);
}
