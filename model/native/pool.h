/* Threads that share one piece of work after the other. */
#pragma once

typedef void (*work_fn)(void *context, long part);

/* Calls work(context, part) for every part in 0 .. parts - 1, on as many threads as were asked for,
   the caller's among them, and returns when all are done. Parts are handed out one by one, in
   order: a thread that the system holds up delays its own part and the return, not the others' parts. */
void pool_run(work_fn work, void *context, long parts);

/* The same, but every thread begins at a place of its own and takes what is behind it, so that it reads
   memory in order; who has no more takes half of what another has left. */
void pool_run_apart(work_fn work, void *context, long parts);

int pool_threads(void);
