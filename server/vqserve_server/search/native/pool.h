// Threads that share the tasks of one search.
#pragma once
#include <stdint.h>

typedef void (*Work)(void *context, int64_t task, int worker);

// Calls work(context, task, worker) for every task in [0, tasks), on up to `threads` threads, the caller's included.
// Workers are numbered below `threads`. Returns when all tasks are done.
void vq_share(Work work, void *context, int64_t tasks, int threads);
