// One pool a process, of threads that sleep between searches. A search that finds the pool in use (another thread's
// search) does all of its tasks by itself.
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define MAX_THREADS 256
// How often the caller looks for the last helper to end before it goes to sleep: some microseconds.
#define PATIENCE 2000

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() __asm__ volatile("yield")
#endif

// `search` is held by the caller whose tasks are shared; `state` guards what follows it.
static pthread_mutex_t search = PTHREAD_MUTEX_INITIALIZER, state = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static int started;         // threads beside the caller
static int64_t generation;  // of the search whose tasks are shared
static int places;          // helpers that may still join it
static int next_worker;
static Work current_work;
static void *current_context;
static int64_t current_tasks;

static _Atomic int64_t next_task;
static _Atomic int helping;

static void do_tasks(Work work, void *context, int64_t tasks, int worker) {
    for (int64_t task; (task = atomic_fetch_add(&next_task, 1)) < tasks;) work(context, task, worker);
}

static void *help(void *unused) {
    (void)unused;
    int64_t seen = 0;
    pthread_mutex_lock(&state);
    for (;;) {
        while (generation == seen || !places) {
            seen = generation;
            pthread_cond_wait(&begun, &state);
        }
        seen = generation;
        places--;
        int worker = next_worker++;
        Work work = current_work;
        void *context = current_context;
        int64_t tasks = current_tasks;
        atomic_fetch_add(&helping, 1);
        pthread_mutex_unlock(&state);
        do_tasks(work, context, tasks, worker);
        pthread_mutex_lock(&state);
        if (atomic_fetch_sub(&helping, 1) == 1) pthread_cond_signal(&ended);
    }
}

// A forked child has no threads but the one that forked.
static void forget_threads(void) {
    pthread_mutex_init(&search, 0);
    pthread_mutex_init(&state, 0);
    pthread_cond_init(&begun, 0);
    pthread_cond_init(&ended, 0);
    started = places = 0;
    atomic_store(&helping, 0);
}

// Under `search`. Fewer threads than asked for are as good.
static void start_threads(int wanted) {
    static int registered;
    if (!registered) registered = !pthread_atfork(0, 0, forget_threads);
    // Signals are for the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; registered && started < wanted && !pthread_create(&thread, 0, help, 0); started++)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void vq_share(Work work, void *context, int64_t tasks, int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > tasks) threads = (int)tasks;
    if (threads < 2 || pthread_mutex_trylock(&search)) {
        for (int64_t task = 0; task < tasks; task++) work(context, task, 0);
        return;
    }
    if (started < threads - 1) start_threads(threads - 1);
    pthread_mutex_lock(&state);
    generation++;
    places = threads - 1;
    next_worker = 1;
    current_work = work;
    current_context = context;
    current_tasks = tasks;
    atomic_store(&next_task, 0);
    if (threads == 2) pthread_cond_signal(&begun);
    else pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&state);
    do_tasks(work, context, tasks, 0);
    for (int i = 0; i < PATIENCE && atomic_load(&helping); i++) PAUSE();
    pthread_mutex_lock(&state);
    // Who has not come yet comes too late.
    places = 0;
    while (atomic_load(&helping)) pthread_cond_wait(&ended, &state);
    pthread_mutex_unlock(&state);
    pthread_mutex_unlock(&search);
}
