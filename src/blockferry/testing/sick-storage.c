/* Storage that fails when told: reads, writes or flushes of some files end with an error, from one moment to another.
 *
 * Preloaded (LD_PRELOAD) into QEMU, its tools and the host process; sick.py says what fails. STORAGE_FAULTS names a file of
 * one page that all of them map: "w 28 /some/path\0" is: writes of what lies under /some/path end with errno 28; an empty
 * page is health. Nothing is done of what fails, and nothing that was done before is lost.
 *
 * A guest's own file system or blkdebug would do for one image that was opened for it; here the switch is thrown at any
 * boundary, for whatever file of whatever process is in use then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096

static volatile const char *said;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("STORAGE_FAULTS");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    said = page == MAP_FAILED ? NULL : page;
}

/* Whether `operation` (r, w, f) on this file is to fail; errno says with what. */
static int fails(char operation, int fd) {
    char order[PAGE], link[40], path[PATH_MAX];
    int number, at = 0;

    if (!said || said[0] == 0)
        return 0;
    memcpy(order, (const char *)said, PAGE);
    order[PAGE - 1] = 0;
    if (order[0] != operation || sscanf(order + 1, " %d %n", &number, &at) != 1 || at == 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0)
        return 0;
    path[length] = 0;
    const char *where = order + 1 + at;
    if (strncmp(path, where, strlen(where)))
        return 0;
    errno = number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PASS(kind, operation, name, parameters, arguments)          \
    kind name parameters {                                          \
        static __typeof__(&name) real;                              \
        if (!real)                                                  \
            real = REAL(name);                                      \
        return fails(operation, fd) ? (kind)-1 : real arguments;    \
    }

PASS(ssize_t, 'r', read, (int fd, void *data, size_t count), (fd, data, count))
PASS(ssize_t, 'r', pread, (int fd, void *data, size_t count, off_t at), (fd, data, count, at))
PASS(ssize_t, 'r', pread64, (int fd, void *data, size_t count, off64_t at), (fd, data, count, at))
PASS(ssize_t, 'r', preadv, (int fd, const struct iovec *data, int count, off_t at), (fd, data, count, at))
PASS(ssize_t, 'r', preadv64, (int fd, const struct iovec *data, int count, off64_t at), (fd, data, count, at))
PASS(ssize_t, 'w', write, (int fd, const void *data, size_t count), (fd, data, count))
PASS(ssize_t, 'w', pwrite, (int fd, const void *data, size_t count, off_t at), (fd, data, count, at))
PASS(ssize_t, 'w', pwrite64, (int fd, const void *data, size_t count, off64_t at), (fd, data, count, at))
PASS(ssize_t, 'w', pwritev, (int fd, const struct iovec *data, int count, off_t at), (fd, data, count, at))
PASS(ssize_t, 'w', pwritev64, (int fd, const struct iovec *data, int count, off64_t at), (fd, data, count, at))
PASS(int, 'w', ftruncate, (int fd, off_t size), (fd, size))
PASS(int, 'w', ftruncate64, (int fd, off64_t size), (fd, size))
PASS(int, 'w', fallocate, (int fd, int mode, off_t at, off_t bytes), (fd, mode, at, bytes))
PASS(int, 'w', fallocate64, (int fd, int mode, off64_t at, off64_t bytes), (fd, mode, at, bytes))
PASS(int, 'f', fsync, (int fd), (fd))
PASS(int, 'f', fdatasync, (int fd), (fd))
PASS(int, 'f', sync_file_range, (int fd, off64_t at, off64_t bytes, unsigned int how), (fd, at, bytes, how))
