/* The slots of a rooted collective: what its writers write, and what its readers make of it (see rooted.h). */

#include "rooted.h"

#define ORDER_AT 128 /* in a rank's counter of the region, whose first 16 bytes are that counter */
#define SLOT_ALIGNMENT 128

Py_ssize_t rooted_stride(const Collective *c)
{
    size_t bytes = sizeof(RootedSlot) + c->published;
    return (Py_ssize_t)((bytes + SLOT_ALIGNMENT - 1) / SLOT_ALIGNMENT * SLOT_ALIGNMENT);
}

Py_ssize_t rooted_bytes(const RootedSteps *steps, Py_ssize_t depth)
{
    Py_ssize_t ranks = steps->collective.ring->ranks, writers = is_from_root(&steps->collective) ? 1 : ranks;
    return ranks * (Py_ssize_t)sizeof(RootedCounter) + writers * depth * steps->stride;
}

RootedSlot *rooted_slot(const RootedSteps *steps, int writer, int64_t step)
{
    Py_ssize_t index = step % steps->depth;
    if (!is_from_root(&steps->collective))
        index += writer * steps->depth;
    return (RootedSlot *)(steps->slots + index * steps->stride);
}

int64_t *order_of_rank(const RootedSteps *steps, int rank)
{
    return (int64_t *)(steps->collective.ring->counters + (Py_ssize_t)rank * COUNTER_STRIDE + ORDER_AT);
}

int64_t late_call(const RootedSteps *steps)
{
    return (int64_t)((uint64_t)steps->order << NUMBER_BITS) | (steps->number & ((1 << NUMBER_BITS) - 1));
}

Awaited missing_steps(const RootedSteps *steps)
{
    const Collective *c = &steps->collective;
    int from_root = is_from_root(c), one = from_root != steps->writes; /* one rank, the root, is awaited */
    int first = one ? c->root : 0;
    char *counters = (char *)&steps->counters[first];
    Awaited awaited = {counters, sizeof(RootedCounter), one ? 1 : c->ring->ranks, steps->step + 1 - steps->depth,
                       counters, sizeof(RootedCounter)};
    if (!steps->writes) {
        awaited.first = (char *)rooted_slot(steps, first, steps->step);
        awaited.stride = steps->depth * steps->stride;
        awaited.value = steps->step + 1;
    }
    return awaited;
}

/* Learn how many steps all readers have read. A root that writes looks at its own counter, too, which is not behind. */
static void learn_freed(RootedSteps *steps, const Awaited *readers)
{
    int64_t freed = INT64_MAX;
    for (Py_ssize_t index = 0; index < readers->count; index++) {
        int64_t read = __atomic_load_n((int64_t *)(readers->first + index * readers->stride), __ATOMIC_ACQUIRE);
        freed = read < freed ? read : freed;
    }
    steps->freed = freed;
}

static Arrival write_step(RootedSteps *steps)
{
    const Collective *c = &steps->collective;
    int rank = c->ring->rank;
    if (steps->step - steps->freed >= steps->depth) {
        Awaited readers = missing_steps(steps);
        if (first_behind(&readers, 0) >= 0)
            return LATE;
        learn_freed(steps, &readers);
    }
    RootedSlot *slot = rooted_slot(steps, rank, steps->step);
    memcpy(slot->data, steps->source.buf, c->source);
    slot->order = steps->order;
    __atomic_store_n(&slot->step, steps->step + 1, __ATOMIC_RELEASE);
    publish_counter((char *)&steps->counters[rank], steps->step + 1);
    if (steps->target.buf && steps->target.buf != steps->source.buf) /* the root's own result */
        memcpy(steps->target.buf, (char *)steps->source.buf + (c->operation == SCATTER ? (size_t)rank * c->block : 0),
               c->block);
    return READY;
}

/* Gather all ranks' blocks, or reduce them, in order of rank. */
static void collect(RootedSteps *steps)
{
    Collective *c = &steps->collective;
    char *target = steps->target.buf;
    for (int rank = 0; rank < c->ring->ranks; rank++)
        c->parts[rank] = rank == c->root ? steps->source.buf : rooted_slot(steps, rank, steps->step)->data;
    if (c->operation == REDUCE) {
        if (c->root > 1 && target == steps->source.buf) { /* the result is written before this operand is read */
            char *copy = rooted_slot(steps, c->root, steps->step)->data;
            memcpy(copy, steps->source.buf, c->block);
            c->parts[c->root] = copy;
        }
        reduce_arrays(&c->arithmetic, target, c->parts, c->ring->ranks, c->block);
        return;
    }
    for (int rank = 0; rank < c->ring->ranks; rank++, target += c->block)
        if (target != c->parts[rank]) /* the root's own block may be there already */
            memcpy(target, c->parts[rank], c->block);
}

static Arrival read_step(RootedSteps *steps)
{
    const Collective *c = &steps->collective;
    int rank = c->ring->rank;
    Awaited writers = missing_steps(steps);
    if (first_behind(&writers, 0) >= 0)
        return LATE;
    for (Py_ssize_t index = 0; index < writers.count; index++) {
        int writer = writers.count == 1 ? c->root : (int)index;
        if (writer != rank && rooted_slot(steps, writer, steps->step)->order != steps->order) {
            steps->other = writer;
            return DIFFERENT;
        }
    }
    if (rank == c->root) {
        collect(steps);
    } else {
        size_t start = c->operation == SCATTER ? (size_t)rank * c->block : 0;
        memcpy(steps->target.buf, rooted_slot(steps, c->root, steps->step)->data + start, c->block);
    }
    /* Writers need not learn of every step. This rank has told them enough as soon as it has read all that is there. */
    if (2 * (steps->step + 1 - steps->told) >= steps->depth) {
        steps->told = steps->step + 1;
        publish_counter((char *)&steps->counters[rank], steps->told);
    }
    return READY;
}

Arrival advance_rooted(RootedSteps *steps)
{
    if (!steps->under_way)
        return READY;
    if (steps->closed)
        return LATE;
    Arrival arrival = steps->writes ? write_step(steps) : read_step(steps);
    if (arrival != READY)
        return arrival;
    int rank = steps->collective.ring->rank;
    steps->step++;
    steps->under_way = 0;
    int64_t *order = order_of_rank(steps, rank);
    if (*order <= steps->order)
        __atomic_store_n(order, steps->order + 1, __ATOMIC_RELEASE);
    RootedCounter *own = &steps->counters[rank];
    if (own->deferred)
        __atomic_store_n(&own->deferred, 0, __ATOMIC_RELEASE);
    return READY;
}
