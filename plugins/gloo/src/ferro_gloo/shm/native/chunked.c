/* Collectives of large arrays, chunk by chunk, as ../chunked.py and ../slot_ring.py describe them.

   A plan is a list of moves, each of which treats chunk k of its bytes for every k in turn:

       stage    source               -> this rank's slot
       own      source               -> target
       reduce   all ranks' slots     -> target, and, in two phases, this rank's next slot
       take     another rank's slot  -> target

   One phase                                    Two phases
       number + k      chunk k is staged            number + 2 k      chunk k is staged
                                                    number + 2 k + 1  its parts are reduced

   The ring's rules make this safe: chunk k + 1 is written before chunk k is awaited, and a rank publishes chunk k + 1
   only after it has read chunk k - 1. */

#include "native.h"

#define LONGEST_WAIT_S 0.01 /* as PEER_CHECK_S in ../slot_ring.py */
#define SPAN_BYTES 16       /* after the label in a header: see ../slot_ring.py */

static inline Py_ssize_t chunk_bytes(const ChunkedPlan *plan, Py_ssize_t bytes, Py_ssize_t k)
{
    Py_ssize_t rest = bytes - k * plan->length;
    return rest < 0 ? 0 : rest < plan->length ? rest : plan->length;
}

static inline char *slot(const ChunkedPlan *plan, Py_ssize_t rank, int64_t number)
{
    return (char *)(line_of(plan->ring, (int)rank, number) + 1);
}

static void fill(const ChunkedPlan *plan, char *to, const char *from, Py_ssize_t bytes)
{
    if (plan->past_caches)
        copy_past_caches(to, from, (size_t)bytes);
    else
        copy_through_caches(to, from, (size_t)bytes);
}

/* Wait until all ranks have published a chunk; return 1 if they have. */
static int wait_for_chunk(const ChunkedPlan *plan, int64_t number)
{
    char *counters = plan->ring->counters;
    Awaited awaited = {counters, COUNTER_STRIDE, plan->ring->ranks, number + 1, counters, COUNTER_STRIDE};
    Py_ssize_t behind = first_behind(&awaited, 0);
    int interrupted;
    if (behind >= 0)
        behind = wait_without_gil(&awaited, behind, plan->spins, plan->yields, LONGEST_WAIT_S, &interrupted);
    return behind < 0;
}

static void stage_chunk(const ChunkedPlan *plan, Py_ssize_t k, int64_t number)
{
    char *target = slot(plan, plan->ring->rank, number);
    for (const Move *move = plan->stages.moves; move < plan->stages.moves + plan->stages.count; move++)
        copy_through_caches(target + move->to, plan->source + move->from + k * plan->length,
                            (size_t)chunk_bytes(plan, move->bytes, k));
    publish_chunk(plan->ring, number);
}

/* Copy this rank's own blocks, which have just been staged, and so are in the caches. */
static void copy_own_chunk(const ChunkedPlan *plan, Py_ssize_t k)
{
    for (const Move *move = plan->owns.moves; move < plan->owns.moves + plan->owns.count; move++)
        fill(plan, plan->target + move->to + k * plan->length, plan->source + move->from + k * plan->length,
             chunk_bytes(plan, move->bytes, k));
}

static void take_chunk(const ChunkedPlan *plan, Py_ssize_t k, int64_t number)
{
    for (const Move *move = plan->takes.moves; move < plan->takes.moves + plan->takes.count; move++)
        fill(plan, plan->target + move->to + k * plan->length, slot(plan, move->rank, number) + move->from,
             chunk_bytes(plan, move->bytes, k));
}

/* Reduce chunk k of all ranks, in order of rank, into `out`. */
static void reduce_chunk(const ChunkedPlan *plan, Py_ssize_t k, int64_t number, char *out)
{
    for (Py_ssize_t rank = 0; rank < plan->ring->ranks; rank++)
        plan->operands[rank] = slot(plan, rank, number) + plan->offsets[rank];
    plan->operands[plan->ring->rank] = plan->source + plan->own + k * plan->length;
    reduce_arrays(&plan->arithmetic, out, plan->operands, plan->ring->ranks,
                  (size_t)chunk_bytes(plan, plan->reduced, k));
}

static int64_t run_one_phase(const ChunkedPlan *plan, int64_t awaited)
{
    Py_ssize_t k = (Py_ssize_t)(awaited - plan->number);
    if (k == 0) {
        if (plan->chunks > 1)
            stage_chunk(plan, 1, awaited + 1);
        copy_own_chunk(plan, 0);
    }
    for (;;) {
        if (plan->reduces)
            reduce_chunk(plan, k, plan->number + k, plan->target + plan->out + k * plan->length);
        take_chunk(plan, k, plan->number + k);
        if (++k == plan->chunks)
            return -1;
        if (k + 1 < plan->chunks)
            stage_chunk(plan, k + 1, plan->number + k + 1);
        copy_own_chunk(plan, k);
        if (!wait_for_chunk(plan, plan->number + k))
            return plan->number + k;
    }
}

static int64_t run_two_phase(const ChunkedPlan *plan, int64_t awaited)
{
    Py_ssize_t k = (Py_ssize_t)((awaited - plan->number) / 2);
    int reduced = (awaited - plan->number) % 2 != 0;
    for (;; reduced = 0) {
        int64_t staged = plan->number + 2 * k;
        if (!reduced) {
            char *result = slot(plan, plan->ring->rank, staged + 1);
            reduce_chunk(plan, k, staged, result);
            publish_chunk(plan->ring, staged + 1);
            if (plan->out >= 0)
                memcpy(plan->target + plan->out + k * plan->length, result,
                       (size_t)chunk_bytes(plan, plan->reduced, k));
            if (k + 1 < plan->chunks)
                stage_chunk(plan, k + 1, staged + 2);
            if (!wait_for_chunk(plan, staged + 1))
                return staged + 1;
        }
        take_chunk(plan, k, staged + 1);
        if (++k == plan->chunks)
            return -1;
        if (!wait_for_chunk(plan, staged + 2))
            return staged + 2;
    }
}

void begin_chunked(ChunkedPlan *plan)
{
    plan->number = plan->ring->next++;
    plan->syncing = 1;
    plan->announced = 0;
    write_header(plan->ring, plan->number, plan->header, plan->header_bytes, plan->digest, NULL);
    stage_chunk(plan, 0, plan->number);
}

typedef enum { OTHER_CALL, OTHER_WAY, SAME } Headers;

/* Compare the headers of an operation, which all ranks have published. */
static Headers compare_headers(const ChunkedPlan *plan)
{
    static const unsigned char no_span[SPAN_BYTES];
    int announced = 0;
    for (Py_ssize_t rank = 0; rank < plan->ring->ranks; rank++) {
        const char *header = plan->ring->headers + (rank * SLOTS + plan->number % SLOTS) * HEADER_BYTES;
        if (memcmp(header, plan->header, LABEL_BYTES))
            return OTHER_CALL;
        announced |= memcmp(header + LABEL_BYTES, no_span, SPAN_BYTES) != 0;
    }
    return announced ? OTHER_WAY : SAME;
}

int64_t continue_chunked(ChunkedPlan *plan, int64_t awaited)
{
    if (plan->syncing) {
        if (!wait_for_chunk(plan, plan->number))
            return plan->number;
        Headers headers = compare_headers(plan);
        if (headers == OTHER_CALL)
            return plan->number;
        if (headers == OTHER_WAY) { /* a rank has told where its array is, and has staged nothing */
            plan->announced = 1;
            return plan->number;
        }
        plan->syncing = 0;
        plan->ring->next = plan->number + plan->chunks * (1 + plan->two_phase);
    }
    return plan->two_phase ? run_two_phase(plan, awaited) : run_one_phase(plan, awaited);
}
