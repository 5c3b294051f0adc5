/* Calls that change the disk and fail, or write half, when a test asks for it: loaded before everything else. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1 }; /* instead of an errno: half of the bytes are written, and the call says so */

static long asked, failing = -1; /* calls since `fail_at`, and which of them fails */
static int how;

long n_asked(void) { return asked; }

void fail_at(long number, int code) {
    asked = 0;
    failing = number;
    how = code;
}

/* 0: go on; an errno, or SHORT: fail. */
static int fails(void) { return asked++ == failing ? how : 0; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILS_OR(result) \
    int code = fails();  \
    if (code > 0) return errno = code, -1; \
    result

ssize_t pwrite(int fd, const void *from, size_t size, off_t at) {
    FAILS_OR(return REAL(pwrite)(fd, from, code == SHORT ? size / 2 : size, at));
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
    FAILS_OR(return REAL(pwrite64)(fd, from, code == SHORT ? size / 2 : size, at));
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) {
    FAILS_OR(return REAL(pwritev)(fd, parts, code == SHORT && n > 1 ? n / 2 : n, at));
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    FAILS_OR(return REAL(writev)(fd, parts, code == SHORT && n > 1 ? n / 2 : n));
}
ssize_t write(int fd, const void *from, size_t size) {
    if (fd <= 2) return REAL(write)(fd, from, size);
    FAILS_OR(return REAL(write)(fd, from, code == SHORT ? size / 2 : size));
}
int fdatasync(int fd) {
    FAILS_OR(return REAL(fdatasync)(fd));
}
int fsync(int fd) {
    FAILS_OR(return REAL(fsync)(fd));
}
int msync(void *from, size_t size, int flags) {
    FAILS_OR(return REAL(msync)(from, size, flags));
}
int ftruncate(int fd, off_t size) {
    FAILS_OR(return REAL(ftruncate)(fd, size));
}
