/* What each collective writes into this rank's slot, and reads from all ranks' slots.

   Every array fits a slot, and all blocks have one size. ../single_round.py does the same in Python, and a rank that
   runs that meets ranks that run this. */

#include "native.h"

/* In groups of at most this many ranks each rank reduces all arrays; in larger ones rank 0 reduces and publishes the
   result: see _EACH_REDUCES_RANKS in ../single_round.py. */
#define EACH_REDUCES_RANKS 4
#define OMITTED_FROM 2048
#define SECOND_ROUND 0x80 /* in the first byte of a label: no operation has it */

int plan_collective(Collective *c)
{
    const Ring *ring = c->ring;
    size_t all = (size_t)ring->ranks, block = c->block, limit = (size_t)ring->slot_bytes;
    int rooted = c->operation == REDUCE || c->operation == BROADCAST || c->operation == GATHER ||
                 c->operation == SCATTER;
    if (block > limit || (rooted ? c->root < 0 || c->root >= ring->ranks : c->root != -1))
        return 0;
    int at_root = ring->rank == c->root;
    size_t whole = all * block; /* cannot overflow: a slot is smaller than a region, which holds one for every rank */
    switch (c->operation) {
    case BARRIER:
        c->source = c->target = c->published = 0;
        return block == 0;
    case ALL_REDUCE:
        c->two_rounds = ring->ranks > EACH_REDUCES_RANKS;
        c->source = c->target = c->published = block;
        break;
    case REDUCE:
        c->source = c->published = block;
        c->target = at_root ? block : 0;
        break;
    case BROADCAST:
        c->source = at_root ? block : 0;
        c->target = c->published = block;
        break;
    case ALL_GATHER:
        c->source = c->published = block;
        c->target = whole;
        break;
    case GATHER:
        c->source = c->published = block;
        c->target = at_root ? whole : 0;
        break;
    case SCATTER:
        c->source = at_root ? whole : 0;
        c->published = whole;
        c->target = block;
        break;
    case REDUCE_SCATTER:
        c->source = c->published = whole;
        c->target = block;
        break;
    case ALL_TO_ALL:
        c->source = c->published = c->target = whole;
        break;
    default:
        return 0;
    }
    size_t itemsize = c->arithmetic.itemsize;
    return c->published <= limit && (!itemsize || block % itemsize == 0);
}

/* Say whether this rank's own block, or at the root its whole array, is left out of its slot: nobody else reads it. */
static int omits_own(const Collective *c)
{
    switch (c->operation) {
    case REDUCE:
    case GATHER:
        return c->ring->rank == c->root;
    case SCATTER:
    case REDUCE_SCATTER:
    case ALL_TO_ALL:
        return c->source > 0;
    default:
        return 0;
    }
}

static void write_slot(const Collective *c, int64_t number, const char *source, int whole)
{
    char *slot = data_of(c->ring, c->ring->rank, number, c->published);
    if (whole || !omits_own(c)) {
        memcpy(slot, source, c->source);
    } else if (c->source > c->block) { /* it has a block for every rank */
        size_t own = (size_t)c->ring->rank * c->block, next = own + c->block;
        memcpy(slot, source, own);
        memcpy(slot + next, source + next, c->source - next);
    }
}

int64_t write_collective(Collective *c, const char *source, int whole)
{
    Ring *ring = c->ring;
    int64_t number = ring->next;
    ring->next = number + 1 + c->two_rounds;
    if (ring->writers[number % SLOTS] != c)
        write_header(ring, number, c->label, LABEL_BYTES, c->digest, c);
    if (c->source)
        write_slot(c, number, source, whole);
    if (!ring->retracted)
        __atomic_store_n(&line_of(ring, ring->rank, number)->number, number + 1, __ATOMIC_RELEASE);
    return number;
}

/* Write a header that is equal to none into a chunk that is published with the one before it.

   Ranks that have just run a small scatter do not wait for that chunk before, nor compare its label (../slot_ring.py).
   If this rank makes another call there, they find the difference here, and not the header of an older operation. */
static void write_second_header(const Collective *c, int64_t number)
{
    unsigned char label[LABEL_BYTES];
    if (c->ring->writers[number % SLOTS] == c->label)
        return;
    memcpy(label, c->label, LABEL_BYTES);
    label[0] |= SECOND_ROUND;
    write_header(c->ring, number, label, LABEL_BYTES, ~c->digest, c->label);
}

int64_t begin_collective(Collective *c, const char *source, int whole)
{
    int64_t number = write_collective(c, source, whole);
    /* In the second round only rank 0 publishes anything, so the others' counters are there already. */
    int both = c->two_rounds && c->ring->rank;
    if (both)
        write_second_header(c, number + 1);
    publish_written(c->ring, number + both);
    return number;
}

/* Find a rank's data: this rank's own in `own`, unless that is NULL, and all other data in the slots. */
static const char *message_of(const Collective *c, int64_t number, int rank, const char *own)
{
    return own && rank == c->ring->rank ? own : data_of(c->ring, rank, number, c->published);
}

/* Reduce all arrays, `block` bytes of each and from byte `start` on, into `out`. */
static void reduce_slots(Collective *c, int64_t number, size_t start, const char *own, char *out)
{
    for (int rank = 0; rank < c->ring->ranks; rank++)
        c->parts[rank] = message_of(c, number, rank, own) + start;
    reduce_arrays(&c->arithmetic, out, c->parts, c->ring->ranks, c->block);
}

Awaited missing_lines(const Collective *c, int64_t number)
{
    const Ring *ring = c->ring;
    int only_result = c->two_rounds && ring->rank;
    Awaited awaited = awaited_lines(ring, number + only_result);
    if (only_result)
        awaited.count = 1; /* rank 0's, which has seen all ranks' lines of the first round */
    return awaited;
}

Arrival advance_collective(Collective *c, int64_t number)
{
    Ring *ring = c->ring;
    Awaited awaited = missing_lines(c, number);
    if (first_behind(&awaited, 0) >= 0) {
        /* Rank 0 does not come to the second round if its label differs. */
        const Line *first = line_of(ring, 0, number);
        if (awaited.value == number + 1 || __atomic_load_n(&first->number, __ATOMIC_ACQUIRE) < number + 1)
            return LATE;
        return first->digest == c->digest ? LATE : DIFFERENT;
    }
    for (int rank = 0; rank < (awaited.count == 1 ? 1 : ring->ranks); rank++)
        if (line_of(ring, rank, number)->digest != c->digest)
            return DIFFERENT;
    if (c->two_rounds && ring->rank == 0 && line_of(ring, 0, number + 1)->number != number + 2) {
        reduce_slots(c, number, 0, NULL, data_of(ring, 0, number + 1, c->block));
        publish_chunk(ring, number + 1);
    }
    return READY;
}

/* Copy a block of every rank's data, from byte `start` on, into `target`, in order of rank. */
static void gather_blocks(const Collective *c, int64_t number, size_t start, const char *own, char *target)
{
    for (int rank = 0; rank < c->ring->ranks; rank++, target += c->block) {
        const char *block = message_of(c, number, rank, own) + start;
        if (target != block) /* this rank's block may be there already */
            memcpy(target, block, c->block);
    }
}

void finish_collective(Collective *c, int64_t number, const char *source, char *target, int whole)
{
    const Ring *ring = c->ring;
    size_t start = (size_t)ring->rank * c->block;
    const char *own = whole ? NULL : source;
    if (!c->target || !target) /* the root of a broadcast may have its result already */
        return;
    switch (c->operation) {
    case ALL_REDUCE:
        if (c->two_rounds)
            memcpy(target, data_of(ring, 0, number + 1, c->block), c->block);
        else
            reduce_slots(c, number, 0, NULL, target);
        break;
    case REDUCE:
        reduce_slots(c, number, 0, own, target);
        break;
    case REDUCE_SCATTER:
        reduce_slots(c, number, start, own, target);
        break;
    case BROADCAST:
        if (target != source)
            memcpy(target, data_of(ring, c->root, number, c->published), c->block);
        break;
    case SCATTER:
        memcpy(target, message_of(c, number, c->root, own) + start, c->block);
        break;
    case ALL_GATHER:
    case GATHER:
        gather_blocks(c, number, 0, source, target);
        break;
    case ALL_TO_ALL:
        gather_blocks(c, number, start, own, target);
        break;
    default:
        break;
    }
}

int needs_whole(const Collective *c, const char *source, const char *target)
{
    /* Copying it all at once is faster where it is little. An array that the result is written over is read late. */
    return c->published <= OMITTED_FROM || (c->operation == REDUCE && c->ring->rank > 1 && target == source);
}
