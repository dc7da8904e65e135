/* Waiting until a step has ended. */

#include "steps.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Tell the receivers of messages that have not ended that this rank is about to sleep. */
static void tell_receivers(Steps *steps)
{
    if (!try_lock(steps))
        return; /* the thread that holds the lock waits, too */
    for (Py_ssize_t index = 0; index < steps->sends && !steps->closed; index++) {
        Channel *channel = &steps->channels[index];
        if (!channel->ended && !channel->starved) {
            channel->starved = 1;
            __atomic_store_n(&((Header *)channel->memory.buf)->starved, 1, __ATOMIC_SEQ_CST);
        }
    }
    unlock(steps);
}

/* Sleep until a peer has moved a block, or `until`, or a signal; return 0 when one of the latter two came. */
static int sleep_on_bell(Steps *steps, const struct timespec *until)
{
    Bell *bell = steps->bell.buf;
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(&bell->rings, __ATOMIC_SEQ_CST);
    tell_receivers(steps);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int woken = 1;
    if (!progress(steps))
        woken = !syscall(SYS_futex, &bell->rings, FUTEX_WAIT_BITSET, seen, until, NULL, FUTEX_BITSET_MATCH_ANY) ||
                errno == EAGAIN;
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    return woken;
}

int wait_without_gil(Steps *steps, long spins, long yields, double seconds)
{
    struct timespec until = {0, 0};
    while (!progress(steps)) {
        if (spins > 0) {
            spins--;
            relax();
        } else if (yields > 0) {
            yields--;
            sched_yield();
        } else if (!(seconds > 0)) {
            return 0;
        } else {
            if (!until.tv_sec) {
                clock_gettime(CLOCK_MONOTONIC, &until);
                long nanoseconds = until.tv_nsec + (long)((seconds - (double)(time_t)seconds) * 1e9);
                until.tv_sec += (time_t)seconds + nanoseconds / 1000000000;
                until.tv_nsec = nanoseconds % 1000000000;
            }
            if (!sleep_on_bell(steps, &until))
                return progress(steps);
        }
    }
    return 1;
}
