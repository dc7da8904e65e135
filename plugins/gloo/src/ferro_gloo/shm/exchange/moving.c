/* Moving blocks of messages through their channels in shared memory.

   A message has a channel of its own, in memory of its sender (see channels.py):

       byte   0  int64 taken     how many blocks the receiver has read, which it stores
       byte   8  int64 closed    1 when the receiver reads and writes this channel no more, which it stores
       byte  64  int64 starved   1 while the sender may sleep until blocks are taken, which it stores
       byte 128  slots, each a multiple of 128 bytes:
                     int64 number   one more than the number of the block in the slot, stored last, with release
                     data           the block

   Blocks are numbered on from step to step, and use the slots in turn. The sender writes block b when the receiver has
   taken block b - slots, so it may be that many blocks ahead, and overwrites nothing that was not read. The receiver
   loads `number` with acquire, and sees the data when it sees the number, on weak memory models as well as on x86-64.
   A long message is one block, which the receiver reads where it is: in memory that both ranks map, or with a system
   call in the memory of the sender. Its slots hold numbers alone, and the sender's step ends when it has been taken.

   A process has one bell, on which its threads sleep: a futex word, and the number of sleepers. A rank first stores
   numbers, then loads the other's sleepers; a sleeper first counts itself, then loads the numbers. Between the two is a
   full fence on both sides, so at least one of them sees the other.

   Several threads may advance one exchange: `locked` is held while one does. Its holder never waits for the
   interpreter lock, so a thread that has the interpreter lock may spin for it.
*/

#define _GNU_SOURCE /* process_vm_readv */
#include "steps.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

void lock(Steps *steps)
{
    while (!try_lock(steps))
        sched_yield();
}

static void ring(Bell *bell)
{
    if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&bell->rings, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &bell->rings, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

static inline int64_t *slot_of(const Channel *channel)
{
    char *first = (char *)channel->memory.buf + HEADER_BYTES;
    return (int64_t *)(first + (channel->total & (channel->slots - 1)) * channel->stride);
}

static inline size_t block_bytes(const Channel *channel)
{
    Py_ssize_t left = channel->user.len - (Py_ssize_t)channel->done * channel->block;
    return (size_t)(left < channel->block ? left : channel->block);
}

/* Return 1 if the receiver has taken all blocks but so many of the last ones. */
static inline int has_taken(Channel *channel, int64_t but)
{
    if (channel->total - channel->taken > but)
        channel->taken = __atomic_load_n(&((Header *)channel->memory.buf)->taken, __ATOMIC_ACQUIRE);
    return channel->total - channel->taken <= but;
}

static int send_blocks(Channel *channel)
{
    for (; channel->done < channel->blocks; channel->done++) {
        if (!has_taken(channel, channel->slots - 1))
            return 0;
        int64_t *slot = slot_of(channel);
        if (!channel->direct)
            memcpy(slot + 1, (char *)channel->user.buf + channel->done * channel->block, block_bytes(channel));
        channel->total++;
        channel->moved = 1;
        __atomic_store_n(slot, channel->total, __ATOMIC_RELEASE);
    }
    return !channel->direct || has_taken(channel, 0);
}

int read_process(pid_t process, const void *address, void *target, size_t nbytes)
{
    struct iovec to = {target, nbytes}, from = {(void *)(uintptr_t)address, nbytes};
    while (to.iov_len) {
        ssize_t read = process_vm_readv(process, &to, 1, &from, 1, 0);
        if (read <= 0)
            return 0;
        to.iov_base = (char *)to.iov_base + read;
        from.iov_base = (char *)from.iov_base + read;
        to.iov_len = from.iov_len -= (size_t)read;
    }
    return 1;
}

static int receive_blocks(Channel *channel)
{
    for (; channel->done < channel->blocks; channel->done++) {
        int64_t *slot = slot_of(channel);
        if (__atomic_load_n(slot, __ATOMIC_ACQUIRE) <= channel->total)
            return 0;
        char *to = (char *)channel->user.buf + channel->done * channel->block;
        if (!channel->sender)
            memcpy(to, channel->direct ? channel->source.buf : slot + 1, block_bytes(channel));
        else if (!read_process(channel->sender, channel->address, to, block_bytes(channel)))
            return 0; /* the sender is gone, as whoever waits for it will find */
        channel->total++;
        channel->moved = 1;
        __atomic_store_n(&((Header *)channel->memory.buf)->taken, channel->total, __ATOMIC_RELEASE);
    }
    return 1;
}

/* Move all blocks that can be moved, and wake the ranks that wait for them. The caller holds the lock. */
static void advance(Steps *steps)
{
    int moved = 0;
    Py_ssize_t left = 0;
    for (Py_ssize_t index = 0; index < steps->count; index++) {
        Channel *channel = &steps->channels[index];
        if (channel->ended)
            continue;
        channel->ended = channel->sends ? send_blocks(channel) : receive_blocks(channel);
        moved |= channel->moved;
        left += !channel->ended;
    }
    if (moved) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        for (Py_ssize_t index = 0; index < steps->count; index++) {
            Channel *channel = &steps->channels[index];
            Header *header = channel->memory.buf;
            if (channel->moved && (channel->sends || __atomic_load_n(&header->starved, __ATOMIC_SEQ_CST)))
                ring(channel->bell.buf);
            channel->moved = 0;
        }
    }
    if (left == 0 && steps->left != 0) {
        __atomic_store_n(&steps->left, 0, __ATOMIC_SEQ_CST);
        if (steps->bell.obj)
            ring(steps->bell.buf); /* another thread of this process may wait for the step's end */
    } else {
        steps->left = left;
    }
}

int progress(Steps *steps)
{
    if (has_ended(steps))
        return 1;
    if (!try_lock(steps))
        return 0;
    if (!steps->closed)
        advance(steps);
    unlock(steps);
    return has_ended(steps);
}

int begin(Steps *steps)
{
    lock(steps);
    if (steps->left || steps->closed) {
        unlock(steps);
        return -1;
    }
    for (Py_ssize_t index = 0; index < steps->count; index++) {
        Channel *channel = &steps->channels[index];
        channel->done = channel->ended = 0;
        if (channel->starved) {
            channel->starved = 0;
            __atomic_store_n(&((Header *)channel->memory.buf)->starved, 0, __ATOMIC_RELAXED);
        }
    }
    steps->left = steps->count;
    advance(steps);
    unlock(steps);
    return has_ended(steps);
}
