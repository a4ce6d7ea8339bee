// A library with NCCL's interface for groups of one rank whose device memory is host memory. It checks what it is given,
// records the calls, and can be slow, fail later or hang. The tests load one copy each.
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef struct { char internal[128]; } ncclUniqueId;
struct comm { int ranks, rank, busy, failure, finalized; };
typedef struct comm* ncclComm_t;
// The whole of the structure of 2.18, and the start of the next member.
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char* netName;
    int splitShare, trafficClass;
} config;

enum { Success = 0, InvalidArgument = 4, InvalidUsage = 5, InProgress = 7 };

// What the test sets.
int fake_version = 23203;
int fake_busy;           // polls for which a call stays in progress; negative: for ever
int fake_async_failure;  // what the state becomes after the next operation
int fake_result;         // what the next operation returns
char fake_log[1 << 16];

static struct comm comms[8];
static int made;
static _Thread_local int depth;
static _Thread_local struct comm* grouped;

static void note(const char* line) { strncat(fake_log, line, sizeof fake_log - strlen(fake_log) - 1); }

int ncclGetVersion(int* version) { *version = fake_version; return Success; }
int ncclGetUniqueId(ncclUniqueId* id) { memset(id, 0x5a, sizeof *id); return Success; }
const char* ncclGetErrorString(int result) { return result == 6 ? "remote process exited" : "planted error"; }
const char* ncclGetLastError(ncclComm_t comm) { (void)comm; return "\n  peer 1 closed the connection\n"; }

static int begin(struct comm* comm) {
    comm->busy = fake_busy;
    comm->failure = fake_async_failure;
    return comm->busy != 0 || comm->failure != 0 ? InProgress : Success;
}

int ncclCommInitRankConfig(ncclComm_t* out, int ranks, ncclUniqueId id, int rank, config* c) {
    note("init;");
    *out = NULL;
    if (c->magic != 0xcafebeef || c->size != sizeof *c || c->version < 21400 || c->blocking != 0) return InvalidArgument;
    if (c->cgaClusterSize != INT_MIN || c->minCTAs != INT_MIN || c->maxCTAs != INT_MIN || c->netName != NULL ||
        c->splitShare != INT_MIN || c->trafficClass != INT_MIN)
        return InvalidArgument;
    for (size_t i = 0; i < sizeof id; ++i)
        if (id.internal[i] != 0x5a) return InvalidArgument;
    if (ranks < 1 || rank < 0 || rank >= ranks || made == 8) return InvalidArgument;
    struct comm* comm = &comms[made++];
    comm->ranks = ranks;
    comm->rank = rank;
    *out = comm;
    return begin(comm);
}

int ncclCommGetAsyncError(ncclComm_t comm, int* state) {
    if (comm->busy > 0 && --comm->busy > 0) *state = InProgress;
    else if (comm->busy < 0) *state = InProgress;
    else *state = comm->failure;
    return Success;
}

int ncclCommFinalize(ncclComm_t comm) { note("finalize;"); comm->finalized = 1; return begin(comm); }
int ncclCommDestroy(ncclComm_t comm) { note("destroy;"); return comm->finalized ? Success : InvalidUsage; }
int ncclCommAbort(ncclComm_t comm) { (void)comm; note("abort;"); return Success; }

static size_t size_of(int type) { return type == 6 || type == 9 ? 2 : type == 2 || type == 7 ? 4 : 0; }

static int operate(const char* name, const void* from, void* to, size_t count, int type, int extra, struct comm* comm,
                   void* stream) {
    char line[128];
    snprintf(line, sizeof line, "%s %zu %d %d %zu;", name, count, type, extra, (size_t)stream);
    note(line);
    if (fake_result != 0) return fake_result;
    if (size_of(type) == 0) return InvalidArgument;
    if (from != NULL && to != NULL) memmove(to, from, count * size_of(type));
    if (depth > 0) { grouped = comm; return InProgress; }
    return begin(comm);
}

int ncclAllReduce(const void* f, void* t, size_t n, int type, int op, ncclComm_t c, void* s) {
    return operate("all_reduce", f, t, n, type, op, c, s);
}
int ncclReduceScatter(const void* f, void* t, size_t n, int type, int op, ncclComm_t c, void* s) {
    return operate("reduce_scatter", f, t, n, type, op, c, s);
}
int ncclAllGather(const void* f, void* t, size_t n, int type, ncclComm_t c, void* s) {
    return operate("all_gather", f, t, n, type, 0, c, s);
}
int ncclBroadcast(const void* f, void* t, size_t n, int type, int root, ncclComm_t c, void* s) {
    return operate("broadcast", f, t, n, type, root, c, s);
}

static const void* sent;
int ncclSend(const void* f, size_t n, int type, int peer, ncclComm_t c, void* s) {
    sent = f;
    return operate("send", NULL, NULL, n, type, peer, c, s);
}
int ncclRecv(void* t, size_t n, int type, int peer, ncclComm_t c, void* s) {
    return operate("recv", sent, t, n, type, peer, c, s);
}

int ncclGroupStart(void) { note("group_start;"); ++depth; return Success; }
int ncclGroupEnd(void) {
    note("group_end;");
    if (depth == 0) return InvalidUsage;
    if (--depth > 0 || grouped == NULL) return Success;
    struct comm* comm = grouped;
    grouped = NULL;
    return begin(comm);
}
