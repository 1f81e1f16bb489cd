/* Moves the heap of this process to a file while it has one thread: what PyTorch's start leaves there (names, schemas and tables of
   every operator there is, 60 MiB) a step hardly reads. Compiled once per machine by profiles/cold.py.

   The file is mapped over the heap's own addresses, private and writable. What is read comes back a page at a time from the file,
   what is written becomes memory again, and nothing else notices. A page of the heap is written to the file and then given back to the
   kernel, which has to happen in C: between the two nothing may write to the heap, and Python does so all the time. All of it runs in
   the one thread there is, in a handler of SIGALRM while the libraries start, which otherwise take twice the memory that stays. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

enum { PAGES = 512, TEXT = 3 * 4096, STEP = 8 << 20, PIECE = 4 << 20 };
enum { WAIT = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER };

static char *heap, *end;  /* what the file is mapped over */
static uintptr_t page;    /* bytes */
static int file, failure; /* an errno */
static long most, next;   /* resident bytes: wanted, and from which on the heap is moved again */
static long waiting;      /* bytes written that the disk may not have yet */
static struct sigaction before;

/* The start of a file of /proc, as text. */
static long text_of(const char *path, char *text, long size) {
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    long count = descriptor < 0 ? -1 : read(descriptor, text, size - 1);
    if (descriptor >= 0) close(descriptor);
    text[count > 0 ? count : 0] = 0;
    return count;
}

static long resident(void) {
    char text[128];
    text_of("/proc/self/statm", text, sizeof text);
    char *second = strchr(text, ' ');
    return second ? strtol(second, 0, 10) * (long)page : 0;
}

/* A second thread could write to the heap while a page of it is on its way. */
static int alone(void) {
    char text[1024];
    text_of("/proc/self/stat", text, sizeof text);
    char *at = strrchr(text, ')');
    for (int field = 2; at && field < 20; field++) at = strchr(at + 1, ' ');
    return at && strtol(at, 0, 10) == 1;
}

/* What the disk does not have yet counts against the limit of a cgroup, whose processes the kernel kills rather than wait for a slow disk:
   so it never is more than a piece. */
static int write_out(const char *from, const char *to) {
    while (from < to) {
        long count = pwrite(file, from, to - from < PIECE - waiting ? to - from : PIECE - waiting, from - heap);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return failure = count ? errno : ENOSPC;
        from += count;
        if ((waiting += count) < PIECE) continue;
        if (sync_file_range(file, 0, 0, WAIT) && errno != ENOSYS && errno != EINVAL && errno != ESPIPE)
            return failure = errno; /* not that the system or the file system has no such call */
        waiting = 0;
    }
    return 0;
}

/* The file has these bytes of the heap: it takes their place. */
static void replace(char *from, char *to) {
    if (mmap(from, to - from, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, from - heap) == MAP_FAILED)
        failure = errno;
    else
        madvise(from, to - from, MADV_RANDOM);
}

/* Map the file over what the heap has grown by. */
static void extend(void) {
    char *now = (char *)((uintptr_t)sbrk(0) & ~(page - 1));
    if (now < end) end = now; /* it has shrunk */
    if (now == end) return;
    /* A full disk had better say so before anything is given back than when it is to write. */
    if (fallocate(file, 0, end - heap, now - end) && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
        failure = errno;
        return;
    }
    if (write_out(end, now)) return;
    replace(end, now);
    if (!failure) end = now;
}

enum { ELSEWHERE, CLEAN, WRITTEN };

static int state(uint64_t entry, int ours) {
    int there = entry >> 63 & 1, swapped = entry >> 62 & 1, of_file = entry >> 61 & 1;
    if (there && of_file) return CLEAN;
    return ours && (there || swapped) ? WRITTEN : ELSEWHERE;
}

/* Give back the pages that a file has: all that are still as they were read, by `advice`, and of the heap the others too, once written. */
static void give_back(int pagemap, char *from, char *to, int ours, int advice) {
    static uint64_t entries[PAGES];
    while (from < to && !failure) {
        long count = (to - from) / (long)page;
        if (count > PAGES) count = PAGES;
        if (pread(pagemap, entries, count * 8, (uintptr_t)from / page * 8) != count * 8) return;
        for (long first = 0, last; first < count; first = last) {
            int kind = state(entries[first], ours);
            for (last = first + 1; last < count && state(entries[last], ours) == kind;) last++;
            char *low = from + first * page, *high = from + last * page;
            if (kind == CLEAN) madvise(low, high - low, advice);
            if (kind != WRITTEN) continue;
            if (write_out(low, high)) return;
            replace(low, high); /* where the heap has shrunk and grown the file is not mapped yet */
            if (failure) return;
        }
        from += count * page;
    }
}

/* Pages of the private mappings of files: code, constants and symbols of libraries. What has been written is no copy, and nobody else
   writes meanwhile. */
static void give_back_libraries(int pagemap) {
    static char text[TEXT];
    int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    long kept = 0, count;
    while (maps >= 0 && (count = read(maps, text + kept, TEXT - 1 - kept)) > 0) {
        text[kept + count] = 0;
        char *line = text, *newline, *at;
        for (; (newline = strchr(line, '\n')); line = newline + 1) {
            char *low = (char *)strtoul(line, &at, 16), *high = (char *)strtoul(at + 1, &at, 16);
            int copied = at[4] == 'p';
            strtoul(at + 6, &at, 16);          /* the offset */
            at = strchr(at + 1, ' ');          /* behind the device */
            if (copied && at && strtoul(at, 0, 10)) give_back(pagemap, low, high, 0, MADV_DONTNEED);
        }
        kept += text + count - line;
        if (kept >= TEXT - 1) break; /* no line is as long */
        memmove(text, line, kept);
    }
    if (maps >= 0) close(maps);
}

static void move(void) {
    extend();
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) {
        failure = failure ? failure : errno;
        return;
    }
    give_back(pagemap, heap, end, 1, MADV_DONTNEED);
    give_back_libraries(pagemap);
    close(pagemap);
}

static void tick(int number) {
    int saved = errno;
    (void)number;
    if (!failure && resident() > next && alone()) {
        move();
        next = resident() + STEP;
        if (next < most) next = most;
    }
    errno = saved;
}

/* Begin to move the heap, which starts at `start`, to the file whenever `bytes` are resident, looking every so many `microseconds`.
   Returns 0 or an errno. */
int tightfit_cold_begin(char *start, int descriptor, long bytes, long microseconds) {
    struct itimerval every = {{0, microseconds}, {0, microseconds}};
    struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
    page = sysconf(_SC_PAGESIZE);
    heap = end = start;
    file = descriptor;
    most = next = bytes;
    waiting = 0;
    failure = 0;
    sigfillset(&action.sa_mask);
    if (sigaction(SIGALRM, &action, &before)) return errno;
    return setitimer(ITIMER_REAL, &every, 0) ? errno : 0;
}

/* The last time, and to the disk. Returns 0, an errno, or -1 where there is a second thread. After either the
   heap is as it was, as long as the system keeps the pages that its disk refused. */
int tightfit_cold_end(void) {
    struct itimerval never = {{0, 0}, {0, 0}};
    struct sigaction nothing = {.sa_handler = SIG_IGN};
    sigset_t all, masked;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &masked);
    setitimer(ITIMER_REAL, &never, 0);
    sigaction(SIGALRM, &nothing, 0); /* one that waits is forgotten */
    sigaction(SIGALRM, &before, 0);
    if (!failure && !alone()) failure = -1;
    if (!failure) move();
    sigprocmask(SIG_SETMASK, &masked, 0);
    if (!failure && fdatasync(file)) failure = errno;
    /* What the disk refused is in the page cache alone. */
    if (!failure) posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    return failure;
}

/* After the end, at any time: give back what has only been read since. Other threads may write to it meanwhile, so it is left to the
   kernel (from Linux 5.4 on) to see what nobody has written. */
void tightfit_cold_release(void) {
    int pagemap = failure ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) return;
    give_back(pagemap, heap, end, 0, MADV_PAGEOUT);
    close(pagemap);
}
