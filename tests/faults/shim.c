/* Makes the disk of one process fail: preloaded, it counts the calls that change files whose path
 * matches, and lets one of them (or all from one on) fail, be cut short, or take long. What to do
 * stands in a file that is mapped shared, so that a test changes it while the process runs.
 *
 *   gcc -shared -fPIC -O2 -o shim.so shim.c -ldl
 *   LD_PRELOAD=shim.so MAINSTAY_FAULTS=control mainstay server ...
 *
 * Knows nothing of what is written. The test's side of `struct control`: tests/process/faults/shim.rs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, RENAME = 4, RESIZE = 8, CREATE = 16, REMOVE = 32 };
enum { COUNT = 0, ONCE = 1, ALWAYS = 2, DELAY = 3, SHORT = 4, INTERRUPT = 5, KILL = 6 };

struct control {
    uint32_t mode;      /* what to do */
    uint32_t error;     /* errno for ONCE and ALWAYS */
    uint32_t ops;       /* which calls count */
    uint32_t delay_ms;  /* for DELAY */
    uint64_t at;        /* the first call that is hit, from 1 */
    uint64_t until;     /* the last one, for ALWAYS and DELAY; 0 = no end */
    uint64_t count;     /* matching calls so far; written here */
    uint64_t hits;      /* faults so far (with ONCE and the like: and calls that were spared after it) */
    char match[512];    /* parts of paths, separated by '|' */
    char last[512];     /* what was hit last; written here */
};

static struct control *control;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("MAINSTAY_FAULTS");
    if (!path) return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) abort(); /* a run without its faults proves nothing */
    void *at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) abort();
    control = at;
}

static int matches(const char *path) {
    const char *part = control->match;
    while (*part) {
        const char *end = strchr(part, '|');
        size_t len = end ? (size_t)(end - part) : strlen(part);
        if (len && memmem(path, strlen(path), part, len)) return 1;
        part += len + (end != NULL);
    }
    return 0;
}

/* What happens to this call: 0 = nothing, an errno, or -1 = cut it short. */
static int fate(uint32_t op, const char *name, const char *path) {
    if (!control || !(control->ops & op) || !matches(path)) return 0;
    uint64_t n = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    uint32_t mode = control->mode;
    if (mode == COUNT || n < control->at) return 0;
    int one = mode == ONCE || mode == SHORT || mode == INTERRUPT || mode == KILL;
    if (!one && control->until && n > control->until) return 0;
    if (mode == SHORT && op != WRITE) return 0;
    /* The others are never interrupted by a signal. */
    if (mode == INTERRUPT && strcmp(name, "write") && strcmp(name, "fsync") && strcmp(name, "fdatasync")) return 0;
    /* One is enough: the first from there on that it can happen to. */
    uint64_t hits = __atomic_add_fetch(&control->hits, 1, __ATOMIC_SEQ_CST);
    if (one && hits > 1) return 0;
    snprintf(control->last, sizeof control->last, "%s of %s", name, path);
    if (mode == DELAY) {
        struct timespec wait = {control->delay_ms / 1000, (control->delay_ms % 1000) * 1000000L};
        nanosleep(&wait, NULL);
        return 0;
    }
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == SHORT) return -1;
    return mode == INTERRUPT ? EINTR : (int)control->error;
}

static int fate_fd(uint32_t op, const char *name, int fd) {
    if (!control) return 0;
    char link[64], path[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    if (len < 0) return 0;
    path[len] = 0;
    return fate(op, name, path);
}

#define REAL(ret, name, ...)                                    \
    static ret (*real)(__VA_ARGS__);                            \
    if (!real) real = (ret(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define FAIL(what)             \
    do {                       \
        int fails = (what);    \
        if (fails > 0) {       \
            errno = fails;     \
            return -1;         \
        }                      \
    } while (0)

/* Half of it, at least a byte. */
static size_t part(size_t len) { return len > 1 ? len / 2 : len; }

ssize_t write(int fd, const void *buf, size_t len) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int f = fate_fd(WRITE, "write", fd);
    if (f == -1) return real(fd, buf, part(len));
    FAIL(f);
    return real(fd, buf, len);
}

ssize_t pwrite64(int fd, const void *buf, size_t len, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    int f = fate_fd(WRITE, "write", fd);
    if (f == -1) return real(fd, buf, part(len), at);
    FAIL(f);
    return real(fd, buf, len, at);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t at) { return pwrite64(fd, buf, len, at); }

ssize_t writev(int fd, const struct iovec *iov, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int f = fate_fd(WRITE, "write", fd);
    if (f == -1) return real(fd, iov, 1);
    FAIL(f);
    return real(fd, iov, n);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    FAIL(fate_fd(SYNC, "fsync", fd));
    return real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    FAIL(fate_fd(SYNC, "fdatasync", fd));
    return real(fd);
}

int sync_file_range(int fd, off64_t at, off64_t len, unsigned flags) {
    REAL(int, "sync_file_range", int, off64_t, off64_t, unsigned);
    FAIL(fate_fd(SYNC, "sync_file_range", fd));
    return real(fd, at, len, flags);
}

int ftruncate64(int fd, off64_t len) {
    REAL(int, "ftruncate64", int, off64_t);
    FAIL(fate_fd(RESIZE, "ftruncate", fd));
    return real(fd, len);
}

int ftruncate(int fd, off_t len) { return ftruncate64(fd, len); }

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    FAIL(fate(RENAME, "rename", to));
    return real(from, to);
}

int unlinkat(int fd, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char link[64], path[2048];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = *name == '/' ? 0 : readlink(link, path, sizeof path - 1);
    if (len >= 0) {
        snprintf(path + len, sizeof path - len, len ? "/%s" : "%s", name);
        FAIL(fate(REMOVE, "unlinkat", path));
    }
    return real(fd, name, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    FAIL(fate(CREATE, "mkdir", path));
    return real(path, mode);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    FAIL(fate(REMOVE, "unlink", path));
    return real(path);
}

static int creates(const char *path, int flags) {
    struct stat st;
    return (flags & O_CREAT) && stat(path, &st) != 0;
}

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list args;
        va_start(args, flags);
        mode = va_arg(args, mode_t);
        va_end(args);
    }
    if (control && creates(path, flags)) FAIL(fate(CREATE, "create", path));
    return real(path, flags, mode);
}
