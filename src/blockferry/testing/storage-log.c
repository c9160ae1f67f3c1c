/* Storage whose accesses are written down, so that one can say afterwards what a power loss at any moment would have left.
 *
 * Preloaded (LD_PRELOAD) into QEMU, its tools and the host process; power.py reads what it writes. STORAGE_LOG names a folder
 * with `root` (one line: what lies below that path is recorded), `log` (the entries), `page` (the lock that all processes
 * share) and `kept/`, where every file that is created gets a second name, its inode's number: it has to be the same inode
 * when power is back.
 *
 * An access and its entry are made under one lock, so the order of the entries is the order in which things happened, across
 * all processes. What comes past this library (mmap, io_uring, linux-aio) is missing in the log: power.py compares the files
 * with it and says so.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct page {
    int state; /* 0: fresh, 1: somebody makes the lock, 2: there it is */
    pthread_mutex_t lock;
};

struct entry {
    char what; /* see power.py */
    char unused[7];
    uint64_t inode;
    int64_t at, length;
    int64_t modified; /* ns; what the file's time is then */
    uint64_t bytes;   /* of data or of a path, which follow */
};

static struct page *page;
static int log_file = -1;
static char root[PATH_MAX], kept[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
    char name[PATH_MAX + 8];
    const char *folder = getenv("STORAGE_LOG");
    if (!folder)
        return;
    snprintf(name, sizeof name, "%s/root", folder);
    FILE *file = fopen(name, "re");
    if (!file || !fgets(root, sizeof root, file))
        abort();
    fclose(file);
    root[strcspn(root, "\n")] = 0;
    snprintf(kept, sizeof kept, "%s/kept", folder);
    snprintf(name, sizeof name, "%s/page", folder);
    int shared = open(name, O_RDWR | O_CLOEXEC);
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    close(shared);
    snprintf(name, sizeof name, "%s/log", folder);
    log_file = open(name, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (page == MAP_FAILED || log_file < 0)
        abort();
    int fresh = 0;
    if (__atomic_compare_exchange_n(&page->state, &fresh, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        pthread_mutexattr_t kind;
        pthread_mutexattr_init(&kind);
        pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
        pthread_mutex_init(&page->lock, &kind);
        __atomic_store_n(&page->state, 2, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(&page->state, __ATOMIC_ACQUIRE) != 2)
        usleep(100);
}

static void lock(void) {
    /* Whoever was killed while it held the lock has made no entry, or all of it. */
    if (pthread_mutex_lock(&page->lock) == EOWNERDEAD)
        pthread_mutex_consistent(&page->lock);
}

static void unlock(void) {
    int saved = errno;
    pthread_mutex_unlock(&page->lock);
    errno = saved;
}

static int below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || path[length] == 0);
}

/* Whether that file or folder is recorded; what it is then. */
static int recorded(int fd, mode_t kind, struct stat *found, char *path) {
    char link[40];
    int saved = errno, yes = 0;
    if (log_file >= 0 && !fstat(fd, found) && (found->st_mode & S_IFMT) == kind) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        path[length < 0 ? 0 : length] = 0;
        yes = length > 0 && below(path);
    }
    errno = saved;
    return yes;
}

static int64_t modified(uint64_t inode) {
    char second[PATH_MAX + 32];
    struct stat found;
    snprintf(second, sizeof second, "%s/%ju", kept, (uintmax_t)inode);
    return stat(second, &found) ? 0 : found.st_mtim.tv_sec * 1000000000 + found.st_mtim.tv_nsec;
}

static void put(char what, uint64_t inode, int64_t at, int64_t length, const struct iovec *data, int count, size_t bytes) {
    struct entry entry = {.what = what, .inode = inode, .at = at, .length = length, .bytes = bytes};
    struct iovec parts[IOV_MAX];
    if (inode)
        entry.modified = modified(inode);
    int used = 1, saved = errno;
    size_t all = sizeof entry;
    parts[0] = (struct iovec){&entry, sizeof entry};
    for (int i = 0; i < count && bytes; i++) {
        size_t some = data[i].iov_len < bytes ? data[i].iov_len : bytes;
        if (used == IOV_MAX)
            abort();
        parts[used++] = (struct iovec){data[i].iov_base, some};
        bytes -= some;
        all += some;
    }
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real)
        real = REAL(writev);
    if (real(log_file, parts, used) != (ssize_t)all)
        abort();
    errno = saved;
}

static void put_text(char what, uint64_t inode, const char *text, size_t bytes) {
    struct iovec one = {(void *)text, bytes};
    put(what, inode, 0, 0, &one, 1, bytes);
}

/* --- contents ----------------------------------------------------------------------------------------------------- */

static ssize_t wrote(int fd, const struct stat *found, ssize_t done, off_t at, const struct iovec *data, int count) {
    if (done > 0)
        put('w', found->st_ino, at < 0 ? lseek(fd, 0, SEEK_CUR) - done : at, done, data, count, (size_t)done);
    unlock();
    return done;
}

#define WRITES(name, parameters, arguments, offset, data, count)                  \
    ssize_t name parameters {                                                     \
        static __typeof__(&name) real;                                            \
        struct stat found;                                                        \
        char path[PATH_MAX];                                                      \
        if (!real)                                                                \
            real = REAL(name);                                                    \
        if (!recorded(fd, S_IFREG, &found, path))                                 \
            return real arguments;                                                \
        lock();                                                                   \
        return wrote(fd, &found, real arguments, offset, data, count);            \
    }
#define ONE(data, bytes) (&(struct iovec){(void *)(data), bytes})

WRITES(write, (int fd, const void *data, size_t bytes), (fd, data, bytes), -1, ONE(data, bytes), 1)
WRITES(writev, (int fd, const struct iovec *data, int count), (fd, data, count), -1, data, count)
WRITES(pwrite, (int fd, const void *data, size_t bytes, off_t at), (fd, data, bytes, at), at, ONE(data, bytes), 1)
WRITES(pwrite64, (int fd, const void *data, size_t bytes, off64_t at), (fd, data, bytes, at), at, ONE(data, bytes), 1)
WRITES(pwritev, (int fd, const struct iovec *data, int count, off_t at), (fd, data, count, at), at, data, count)
WRITES(pwritev64, (int fd, const struct iovec *data, int count, off64_t at), (fd, data, count, at), at, data, count)

/* What is written with RWF_DSYNC (a guest's FUA) counts as unflushed: nothing here may look safer than it is. */
WRITES(pwritev2, (int fd, const struct iovec *data, int count, off_t at, int flags), (fd, data, count, at, flags), at, data,
       count)
WRITES(pwritev64v2, (int fd, const struct iovec *data, int count, off64_t at, int flags), (fd, data, count, at, flags), at,
       data, count)

#define CHANGES(name, parameters, arguments, entries)     \
    int name parameters {                                 \
        static __typeof__(&name) real;                    \
        struct stat found;                                \
        char path[PATH_MAX];                              \
        if (!real)                                        \
            real = REAL(name);                            \
        if (!recorded(fd, S_IFREG, &found, path))         \
            return real arguments;                        \
        lock();                                           \
        int done = real arguments;                        \
        if (!done) {                                      \
            entries                                       \
        }                                                 \
        unlock();                                         \
        return done;                                      \
    }

static void allocated(uint64_t inode, int mode, off64_t at, off64_t bytes) {
    if (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        abort();
    if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        put('z', inode, at, bytes, NULL, 0, 0);
    if (!(mode & FALLOC_FL_KEEP_SIZE))
        put('e', inode, 0, at + bytes, NULL, 0, 0);
}

CHANGES(ftruncate, (int fd, off_t size), (fd, size), put('t', found.st_ino, 0, size, NULL, 0, 0);)
CHANGES(ftruncate64, (int fd, off64_t size), (fd, size), put('t', found.st_ino, 0, size, NULL, 0, 0);)
CHANGES(fallocate, (int fd, int mode, off_t at, off_t bytes), (fd, mode, at, bytes), allocated(found.st_ino, mode, at, bytes);)
CHANGES(fallocate64, (int fd, int mode, off64_t at, off64_t bytes), (fd, mode, at, bytes),
        allocated(found.st_ino, mode, at, bytes);)
CHANGES(posix_fallocate, (int fd, off_t at, off_t bytes), (fd, at, bytes), allocated(found.st_ino, 0, at, bytes);)
CHANGES(posix_fallocate64, (int fd, off64_t at, off64_t bytes), (fd, at, bytes), allocated(found.st_ino, 0, at, bytes);)

/* Whoever asks for it can do without: reads and writes are seen here. */
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t bytes, unsigned flags) {
    static __typeof__(&copy_file_range) real;
    struct stat found;
    char path[PATH_MAX];
    if (!real)
        real = REAL(copy_file_range);
    if (!recorded(to, S_IFREG, &found, path))
        return real(from, from_at, to, to_at, bytes, flags);
    errno = ENOSYS;
    return -1;
}

/* Blocks that are shared are as good as written: what was flushed of their source is not flushed of the file that takes them over. */
int ioctl(int fd, unsigned long request, ...) {
    static __typeof__(&ioctl) real;
    struct stat found, source;
    char path[PATH_MAX];
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (!real)
        real = REAL(ioctl);
    if (request != FICLONERANGE || !recorded(fd, S_IFREG, &found, path) || !found.st_nlink)
        return real(fd, request, argument);
    struct file_clone_range *range = argument;
    lock();
    int done = real(fd, request, argument);
    if (!done) {
        if (fstat((int)range->src_fd, &source))
            abort();
        size_t bytes = range->src_length ? range->src_length : (uint64_t)source.st_size - range->src_offset;
        char *data = malloc(bytes);
        if (!data || pread(fd, data, bytes, (off_t)range->dest_offset) != (ssize_t)bytes)
            abort();
        put('w', found.st_ino, (int64_t)range->dest_offset, (int64_t)bytes, ONE(data, bytes), 1, bytes);
        free(data);
    }
    unlock();
    return done;
}

/* A flush covers what was written before it began, and it is on disk when it returns; fdatasync's is without the times. */
#define FLUSHES(name, what)                                          \
    int name(int fd) {                                               \
        static __typeof__(&name) real;                               \
        struct stat found;                                           \
        char path[PATH_MAX];                                         \
        if (!real)                                                   \
            real = REAL(name);                                       \
        int file = recorded(fd, S_IFREG, &found, path);              \
        if (!file && !recorded(fd, S_IFDIR, &found, path))           \
            return real(fd);                                         \
        lock();                                                      \
        int done = real(fd);                                         \
        if (!done && file)                                           \
            put(what, found.st_ino, 0, 0, NULL, 0, 0);               \
        else if (!done)                                              \
            put_text('d', found.st_ino, path, strlen(path));         \
        unlock();                                                    \
        return done;                                                 \
    }

FLUSHES(fsync, 's')
FLUSHES(fdatasync, 'f')

/* --- names -------------------------------------------------------------------------------------------------------- */

/* The whole path of a name in a folder; whether it is recorded. */
static int whole(int folder, const char *name, char *path) {
    char link[40];
    int saved = errno;
    path[0] = 0;
    if (log_file < 0)
        return 0;
    if (name[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        path[length < 0 ? 0 : length] = 0;
        errno = saved;
        if (length < 0 || (size_t)length + strlen(name) + 2 > PATH_MAX)
            return 0;
        strcat(path, "/");
    }
    if (strlen(path) + strlen(name) >= PATH_MAX)
        return 0;
    strcat(path, name);
    return below(path);
}

static void created(int fd, const char *path) {
    struct stat found;
    char second[PATH_MAX + 32];
    int saved = errno;
    if (fstat(fd, &found) || (found.st_mode & S_IFMT) != S_IFREG)
        abort();
    snprintf(second, sizeof second, "%s/%ju", kept, (uintmax_t)found.st_ino);
    if (linkat(AT_FDCWD, path, AT_FDCWD, second, 0))
        abort();
    put_text('c', found.st_ino, path, strlen(path));
    errno = saved;
}

static int opened(int (*real)(int, const char *, int, ...), int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    struct stat found;
    if (!(flags & (O_CREAT | O_TRUNC)) || !whole(folder, name, path))
        return real(folder, name, flags, mode);
    lock();
    int saved = errno;
    int absent = fstatat(folder, name, &found, AT_SYMLINK_NOFOLLOW) != 0;
    errno = saved;
    int fd = real(folder, name, flags, mode);
    if (fd >= 0 && absent)
        created(fd, path);
    else if (fd >= 0 && flags & O_TRUNC && (found.st_mode & S_IFMT) == S_IFREG)
        put('t', found.st_ino, 0, 0, NULL, 0, 0);
    unlock();
    return fd;
}

#define OPENS(name, at, parameters, folder)                      \
    int name parameters {                                        \
        static __typeof__(&at) real;                             \
        mode_t mode = 0;                                         \
        if (!real)                                               \
            real = REAL(at);                                     \
        if (flags & (O_CREAT | __O_TMPFILE)) {                   \
            va_list more;                                        \
            va_start(more, flags);                               \
            mode = va_arg(more, mode_t);                         \
            va_end(more);                                        \
        }                                                        \
        return opened(real, folder, path, flags, mode);          \
    }

OPENS(open, openat, (const char *path, int flags, ...), AT_FDCWD)
OPENS(open64, openat64, (const char *path, int flags, ...), AT_FDCWD)
OPENS(openat, openat, (int folder, const char *path, int flags, ...), folder)
OPENS(openat64, openat64, (int folder, const char *path, int flags, ...), folder)

#define NAMES(name, parameters, arguments, folder, path, entry)      \
    int name parameters {                                            \
        static __typeof__(&name) real;                               \
        char where[PATH_MAX];                                        \
        if (!real)                                                   \
            real = REAL(name);                                       \
        if (!whole(folder, path, where))                             \
            return real arguments;                                   \
        lock();                                                      \
        int done = real arguments;                                   \
        if (!done)                                                   \
            entry;                                                   \
        unlock();                                                    \
        return done;                                                 \
    }

static void renamed(int folder, const char *from, const char *name) {
    char to[PATH_MAX], both[2 * PATH_MAX];
    if (!whole(folder, name, to))
        abort();
    size_t first = strlen(from) + 1;
    memcpy(both, from, first);
    strcpy(both + first, to);
    put_text('r', 0, both, first + strlen(to));
}

NAMES(unlink, (const char *path), (path), AT_FDCWD, path, put_text('u', 0, where, strlen(where)))
NAMES(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path,
      put_text('u', 0, where, strlen(where)))
NAMES(rmdir, (const char *path), (path), AT_FDCWD, path, put_text('u', 0, where, strlen(where)))
NAMES(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, put_text('m', 0, where, strlen(where)))
NAMES(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path,
      put_text('m', 0, where, strlen(where)))
NAMES(rename, (const char *path, const char *to), (path, to), AT_FDCWD, path, renamed(AT_FDCWD, where, to))
NAMES(renameat, (int folder, const char *path, int other, const char *to), (folder, path, other, to), folder, path,
      renamed(other, where, to))
