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
  atomic_int active;   /* threads that are still at it */
  int sleeping;        /* under the lock */
  int threads;
  int apart;           /* whether every thread has parts of its own, or all those of the first */
  work_fn work;
  void *context;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/* What is left of a thread's parts: the first one in the upper half, the one behind the last in the
   lower. A thread is made in round `seen`: it knows nothing of those before. */
static struct thread {
  _Alignas(64) atomic_long parts;
  long seen;
} threads[MOST_THREADS];

#define FIRST (1l << 32)

static long parts_left(long parts) { return (int)parts - parts / FIRST; }

/* Half of what another thread has left, the later ones: its own. */
static int steal(struct thread *own) {
  for (struct thread *from = threads; from < threads + pool.threads; from++) {
    long parts = atomic_load_explicit(&from->parts, memory_order_relaxed), half;
    while ((half = (parts_left(parts) + 1) / 2) > 0)
      if (atomic_compare_exchange_weak_explicit(&from->parts, &parts, parts - half,
                                                memory_order_relaxed, memory_order_relaxed)) {
        long last = (int)parts;
        atomic_store_explicit(&own->parts, (last - half) * FIRST + last, memory_order_relaxed);
        return 1;
      }
  }
  return 0;
}

static void take_parts(struct thread *own) {
  if (!pool.apart) own = threads;
  do
    for (long parts; parts_left(parts = atomic_fetch_add_explicit(&own->parts, FIRST, memory_order_relaxed)) > 0;)
      pool.work(pool.context, parts / FIRST);
  while (pool.apart && steal(own));
}

static void *help(void *context) {
  struct thread *own = context;
  long seen = own->seen;
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
    take_parts(own);
    atomic_fetch_sub_explicit(&pool.active, 1, memory_order_release);
  }
  return NULL;
}

/* VERSION in __init__.py. */
int internvl_version(void) { return 12; }

int pool_threads(void) { return pool.threads; }

/* Start what is missing to so many threads; they are never stopped. Returns how many there are. */
long internvl_threads(int wanted) {
  pthread_mutex_lock(&pool.caller);
  while (pool.threads < wanted && pool.threads < MOST_THREADS) {
    pthread_t thread;
    threads[pool.threads].seen = atomic_load(&pool.round);
    if (pthread_create(&thread, NULL, help, threads + pool.threads)) break;
    pthread_detach(thread);
    pool.threads++;
  }
  wanted = pool.threads;
  pthread_mutex_unlock(&pool.caller);
  return wanted;
}

static void run(work_fn work, void *context, long parts, int apart) {
  if (pool.threads == 1 || parts == 1) {
    for (long part = 0; part < parts; part++) work(context, part);
    return;
  }
  pthread_mutex_lock(&pool.caller);
  pool.work = work;
  pool.context = context;
  pool.apart = apart;
  for (long i = 0, count = apart ? pool.threads : 1; i < count; i++)
    atomic_store_explicit(&threads[i].parts, parts * i / count * FIRST + parts * (i + 1) / count,
                          memory_order_relaxed);
  atomic_store_explicit(&pool.active, pool.threads - 1, memory_order_relaxed);
  pthread_mutex_lock(&pool.lock);
  atomic_fetch_add_explicit(&pool.round, 1, memory_order_release);
  if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  take_parts(threads);
  while (atomic_load_explicit(&pool.active, memory_order_acquire)) pause_cpu();
  pthread_mutex_unlock(&pool.caller);
}

void pool_run(work_fn work, void *context, long parts) { run(work, context, parts, 0); }

void pool_run_apart(work_fn work, void *context, long parts) { run(work, context, parts, 1); }
