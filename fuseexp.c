/* SPDX-License-Identifier: MIT */
/*
 * fuseexp: shows what is inside a disk image as one plain raw file, through FUSE.
 *
 *   worker: read(/dev/fuse clone) -> fop_<op>() -> img_read() or img_write() -> format->map()
 *           -> file_pread() or file_pwrite() -> write(reply)
 *
 *    1. Messages                msg_     the only writer of stderr; four levels
 *    2. Utilities               util_    bytes, numbers, fault injection
 *    3. Output                  out_     JSON, or lines for people
 *    4. Worker pool             pool_    how many workers run
 *    5. Host files              file_    every system call on an image
 *    6. Codecs                  codec_   one compressed cluster
 *    7. Cache                   cache_   tables and decoded clusters in one budget
 *    8. Raw images              raw_     the driver to copy
 *    9. qcow2                   qcow2_   QEMU's format, for reading
 *    0. VHD                     vhd_     Virtual PC, Hyper-V 2008, Azure: fixed, dynamic, differencing
 *    0. VHDX                    vhdx_    Hyper-V: fixed, dynamic, differencing, with a log
 *   10. Image core              img_     probing, chains, the loops over extents, resizing
 *   11. Partitions              part_    MBR, GPT, the views
 *   12. FUSE operations         fop_     request in, reply out; knows no descriptor of FUSE
 *   13. Worker loop             loop_    the transport
 *   14. Sandbox                 box_     what the serving process gives up
 *   15. Mounts                  mnt_     mountpoint, mount table, mounting, unmounting
 *   16. Life cycle              run_     supervisor and server, the clean-up chain
 *   17. One-shot commands       cmd_     --umount, --formats, --version
 *   18. Options                 opt_     one table for getopt, -o and --help
 *   19. Main
 *
 * Processes: the supervisor (this program as started, or its background child) mounts, forks the server,
 * unmounts and cleans up; the server alone holds the image and /dev/fuse, runs sandboxed, and has one worker
 * per thread.
 *
 * Locks, all in the server:
 *   image.size_lock   growing and truncating; readers take the atomic size without it
 *   cache.set_lock    refilling table slots of a set; readers take none
 *   cache.lock        the list of decoded clusters; not held while decoding
 *   pool.lock         parking and waking workers; taken only around operations that may sleep
 *   everything else is immutable once the workers run, or an atomic of its own, or belongs to one worker
 *
 * To understand the rest, start reading at main().
 */
#include "fuseexp.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <inttypes.h>
#include <libdeflate.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

/* ******************************************************************************************************** *
 * 1. Messages
 *
 * One line each, written with one write(2), control characters made harmless: names come from strangers'
 * disks.
 *   error  something the user asked for was not done         always
 *   note   done, but the user should know                    not with -q
 *   info   what was decided                                  with -v
 *   debug  every request                                     with -d
 * ******************************************************************************************************** */

enum msg_level { MSG_ERROR, MSG_NOTE, MSG_INFO, MSG_DEBUG };

static enum msg_level msg_verbosity = MSG_NOTE;
static int msg_kmsg = -1;           /* then: the kernel's log, where nothing listens at /dev/log */
static bool msg_to_syslog;          /* a supervisor in the background has no stderr any more */

__attribute__((format(printf, 1, 0))) static void msg_put(const char *fmt, va_list ap)
{
    char line[1200] = "fuseexp: ";
    size_t head = strlen(line);
    int n = vsnprintf(line + head, sizeof(line) - head - 1, fmt, ap);
    size_t len = n < 0 ? head : head + (size_t)n;

    if (len > sizeof(line) - 2)
        len = sizeof(line) - 2;
    for (size_t i = head; i < len; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
            line[i] = '?';
    line[len] = msg_to_syslog ? 0 : '\n';
    if (msg_to_syslog && msg_kmsg >= 0)
        dprintf(msg_kmsg, "<4>%.900s\n", line);   /* it refuses more than about 1000 bytes */
    else if (msg_to_syslog)
        syslog(LOG_DAEMON | LOG_WARNING, "%s", line + head);
    else
        (void)!write(STDERR_FILENO, line, len + 1);
}

/*
 * Reports an error and returns it, so that it can be reported where it is detected: return msg_err(-EIO,
 * ...).
 */
__attribute__((format(printf, 2, 3))) static int msg_err(int ret, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    msg_put(fmt, ap);
    va_end(ap);
    return ret;
}

__attribute__((format(printf, 2, 3))) static void msg_say(enum msg_level level, const char *fmt, ...)
{
    va_list ap;

    if (level > msg_verbosity)
        return;
    va_start(ap, fmt);
    msg_put(fmt, ap);
    va_end(ap);
}

/*
 * Errors while serving: a damaged disk can fail a million times, so at most ten lines a second, the rest
 * counted.
 */
__attribute__((format(printf, 2, 3))) static int msg_serving(int ret, const char *fmt, ...)
{
    static _Atomic long second;
    static _Atomic unsigned lines;
    struct timespec now;
    va_list ap;
    unsigned n;

    clock_gettime(CLOCK_MONOTONIC, &now);
    if (atomic_exchange(&second, (long)now.tv_sec) != (long)now.tv_sec) {
        n = atomic_exchange(&lines, 0);
        if (n > 10)
            msg_say(MSG_ERROR, "%u more lines like these were left out", n - 10);
    }
    if (atomic_fetch_add(&lines, 1) >= 10)
        return ret;
    va_start(ap, fmt);
    msg_put(fmt, ap);
    va_end(ap);
    return ret;
}

/* ******************************************************************************************************** *
 * 2. Utilities
 * ******************************************************************************************************** */

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

static uint64_t util_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint16_t util_le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t util_le32(const uint8_t *p)
{
    return (uint32_t)util_le16(p) | (uint32_t)util_le16(p + 2) << 16;
}

static uint16_t util_be16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t util_be32(const uint8_t *p)
{
    return (uint32_t)util_be16(p) << 16 | util_be16(p + 2);
}

static uint64_t util_be64(const uint8_t *p)
{
    return (uint64_t)util_be32(p) << 32 | util_be32(p + 4);
}

static uint64_t util_le64(const uint8_t *p)
{
    return (uint64_t)util_le32(p) | (uint64_t)util_le32(p + 4) << 32;
}

/*
 * "4096", "0x1000", "4k", "10G": powers of 1024. False on anything else, on a sign, and past MAX_IMAGE_SIZE.
 */
static bool util_parse_size(const char *text, uint64_t *value)
{
    static const char units[] = "kmgtpe";
    unsigned shift = 0;
    const char *unit;
    char *end;

    if (!isdigit((unsigned char)*text))
        return false;
    errno = 0;
    *value = strtoull(text, &end, text[0] == '0' && (text[1] | 0x20) == 'x' ? 16 : 10);
    if (errno)
        return false;
    if (*end) {
        unit = strchr(units, tolower((unsigned char)*end));
        if (!unit || end[1])
            return false;
        shift = 10 * ((unsigned)(unit - units) + 1);
    }
    if (*value > (uint64_t)MAX_IMAGE_SIZE >> shift)
        return false;
    *value <<= shift;
    return true;
}

static const char *util_basename(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

/* hex: 2 * len + 1 bytes. */
static void util_hex(const uint8_t *bytes, size_t len, char *hex)
{
    *hex = 0;
    for (size_t i = 0; i < len; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
}

/* musl declares the request as int, glibc as unsigned long; the kernel looks at 32 bits. */
static int util_ioctl(int fd, uint32_t request, void *arg)
{
#ifdef __GLIBC__
    return ioctl(fd, request, arg);
#else
    return ioctl(fd, (int)request, arg);
#endif
}

/* One character of UTF-16 at p, at most len bytes; *used: how many it took. Half a surrogate pair becomes U+FFFD. */
static uint32_t util_utf16_char(const uint8_t *p, size_t len, bool big, size_t *used)
{
    uint32_t c = big ? util_be16(p) : util_le16(p), low = 0;

    *used = 2;
    if (c < 0xd800 || c > 0xdfff)
        return c;
    if (c < 0xdc00 && len >= 4)
        low = big ? util_be16(p + 2) : util_le16(p + 2);
    if (low < 0xdc00 || low > 0xdfff)
        return 0xfffd;
    *used = 4;
    return 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
}

static size_t util_utf8_char(uint32_t c, char out[4])
{
    static const uint8_t lead[] = { 0, 0, 0xc0, 0xe0, 0xf0 };
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;

    for (size_t i = n; i-- > 1; c >>= 6)
        out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(n == 1 ? c : lead[n] | c);
    return n;
}

/*
 * The last component of a path, usually a Windows one, in len bytes of UTF-16 (up to a zero), as UTF-8. False:
 * there is none, or it does not fit, or it is no name of a file.
 */
static bool util_utf16_basename(const uint8_t *path, size_t len, bool big, char *name, size_t room)
{
    size_t n = 0, used, bytes;
    char utf8[4];
    uint32_t c;

    for (size_t at = 0; at + 2 <= len; at += used) {
        c = util_utf16_char(path + at, len - at, big, &used);
        if (!c)
            break;
        if (c == '/' || c == '\\') {
            n = 0;
            continue;
        }
        bytes = util_utf8_char(c, utf8);
        if (n + bytes >= room)
            return false;
        memcpy(name + n, utf8, bytes);
        n += bytes;
    }
    name[n] = 0;
    return n && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

/* Like strcpy, but never past room. False: it did not fit. */
static bool util_copy(char *to, size_t room, const char *from)
{
    return (size_t)snprintf(to, room, "%s", from) < room;
}

/* The descriptors that whoever started us left open: a lock held by us would never be free. */
static uint8_t util_inherited[1 << 16];
static int util_n_closed;

static void util_note_inherited(void)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *e;
    long fd;

    while (dir && (e = readdir(dir))) {
        fd = strtol(e->d_name, NULL, 10);
        if (fd > STDERR_FILENO && fd < (long)sizeof(util_inherited) && fd != dirfd(dir))
            util_inherited[fd] = 1;
    }
    if (dir)
        closedir(dir);
}

static void util_close_inherited(void)
{
    for (int fd = STDERR_FILENO + 1; fd < (int)sizeof(util_inherited); fd++)
        if (util_inherited[fd]) {
            util_inherited[fd] = 0;
            util_n_closed += close(fd) == 0;
        }
}

static void util_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Writes a short text to an existing file, such as one of /sys. */
static int util_write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int ret = 0;

    if (fd < 0)
        return -errno;
    if (write(fd, text, strlen(text)) < 0)
        ret = -errno;
    close(fd);
    return ret;
}

/*
 * Fault injection, only in builds with FUSEEXP_FAULTS. FUSEEXP_FAIL_AT=n makes the n-th acquisition of the
 * start fail (counted on through fork; the server counts on its own from there). FUSEEXP_FAIL_OP=name fails
 * each operation of that name on a host file, with FUSEEXP_FAIL_ERRNO.
 */
#ifdef FUSEEXP_FAULTS
static bool util_fault(const char *what)
{
    static int step, fail_at = -1;
    const char *env = getenv("FUSEEXP_FAIL_AT");

    if (fail_at < 0)
        fail_at = env ? atoi(env) : 0;
    if (fail_at == 0 || ++step != fail_at)
        return false;
    msg_say(MSG_ERROR, "FAULT %d: %s", step, what);
    errno = EIO;
    return true;
}

static bool util_fault_op(const char *what)
{
    const char *env = getenv("FUSEEXP_FAIL_OP"), *err = getenv("FUSEEXP_FAIL_ERRNO");

    if (!env || strcmp(env, what) != 0)
        return false;
    errno = err ? atoi(err) : EIO;
    return true;
}
#else
#define util_fault(what) false
#define util_fault_op(what) false
#endif

/* ******************************************************************************************************** *
 * 3. Output
 *
 * What --info, --map and --check say on stdout: one document of named values, as JSON or for people. The
 * names are the JSON ones; for people their dashes become blanks.
 * ******************************************************************************************************** */

enum { OUT_DEPTH = 8 };

struct out {
    bool json;
    unsigned depth;
    struct { char end; bool filled; } level[OUT_DEPTH];
};

/* A JSON string; bytes that are not UTF-8 become U+FFFD: names come from strangers' disks. */
static void out_string(const char *text)
{
    const uint8_t *p = (const uint8_t *)text;

    putchar('"');
    while (*p) {
        static const uint8_t lead[] = { 0x80, 0xe0, 0xf0, 0xf8 }, mark[] = { 0, 0xc0, 0xe0, 0xf0 };
        unsigned n = 0, i = 1;
        while (n < 4 && (*p & lead[n]) != mark[n])
            n++;
        while (n < 4 && i <= n && (p[i] & 0xc0) == 0x80)
            i++;
        if (*p == '"' || *p == '\\')
            printf("\\%c", *p);
        else if (*p < ' ' || *p == 0x7f)
            printf("\\u%04x", *p);
        else if (n == 4 || i <= n)
            fputs("\\ufffd", stdout);
        else
            fwrite(p, 1, i, stdout);
        p += n < 4 && i > n ? i : 1;
    }
    putchar('"');
}

/* What comes before every value: the comma, the new line, the indentation and the name (NULL: in a list). */
static void out_key(struct out *o, const char *key)
{
    if (o->json && o->depth && o->level[o->depth - 1].filled)
        putchar(',');
    if (o->depth) {
        if (o->json || o->level[o->depth - 1].filled || o->depth > 1)
            putchar('\n');
        o->level[o->depth - 1].filled = true;
    }
    for (unsigned i = o->json ? 0 : 1; i < o->depth; i++)
        fputs("    ", stdout);
    if (key && o->json)
        printf("\"%s\": ", key);
    else if (!o->json && !key)
        fputs("-", stdout);
    for (const char *p = key; p && !o->json; p++) {
        if (!*p) {
            fputs(":", stdout);
            break;
        }
        putchar(*p == '-' ? ' ' : *p);
    }
}

/* bracket: { or [ */
static void out_open(struct out *o, const char *key, char bracket)
{
    if (o->depth || o->json)
        out_key(o, key);
    if (o->json)
        putchar(bracket);
    o->level[o->depth].end = bracket == '{' ? '}' : ']';
    o->level[o->depth++].filled = false;
}

static void out_close(struct out *o)
{
    bool filled = o->level[--o->depth].filled;

    if (o->json && filled) {
        putchar('\n');
        for (unsigned i = 0; i < o->depth; i++)
            fputs("    ", stdout);
    }
    if (o->json)
        putchar(o->level[o->depth].end);
    if (!o->depth)
        putchar('\n');
}

static void out_number(struct out *o, const char *key, uint64_t value)
{
    out_key(o, key);
    printf(o->json ? "%" PRIu64 : " %" PRIu64, value);
}

/* Bytes: for people also in the largest unit that leaves a number. */
static void out_size(struct out *o, const char *key, uint64_t value)
{
    static const char *const units[] = { "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
    double in = (double)value / 1024;
    size_t unit = 0;

    out_number(o, key, value);
    if (o->json || value < 1024)
        return;
    for (; in >= 1024; in /= 1024)
        unit++;
    printf(" (%.3g %s)", in, units[unit]);
}

static void out_text(struct out *o, const char *key, const char *value)
{
    out_key(o, key);
    if (o->json) {
        out_string(value);
        return;
    }
    putchar(' ');
    for (; *value; value++)
        putchar((unsigned char)*value < ' ' || *value == 0x7f ? '?' : *value);
}

static void out_flag(struct out *o, const char *key, bool value)
{
    out_key(o, key);
    fputs(o->json ? "" : " ", stdout);
    fputs(value ? "true" : "false", stdout);
}

/* ******************************************************************************************************** *
 * 4. Worker pool
 *
 * Who may run. As many workers as there are processors wait for requests; the others are parked. A worker
 * that is about to sleep in an operation on the image (the data is not in the page cache) says so, and one of
 * the parked takes its place; whoever finds too many running afterwards parks itself. So requests that need
 * no disk are served by few, warm threads, and a slow disk still sees many requests at once. (Measured: with
 * 8 threads always waiting, four readers of cached data get 0.85 of what they get with 2; with 2 alone, a
 * disk gets half the requests it could take.)
 * ******************************************************************************************************** */

static struct {
    pthread_mutex_t lock;           /* protects parked and closing, and makes changes of running exact */
    pthread_cond_t wake;
    _Atomic unsigned running; /* workers that wait for or handle a request without sleeping on the image */
    _Atomic unsigned most;    /* that should */
    unsigned parked;
    bool closing;
} pool = { .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER };

static void pool_start(unsigned most, unsigned running)
{
    pool.most = most;
    pool.running = running;
}

/* Around an operation that may sleep. */
static void pool_block(void)
{
    pthread_mutex_lock(&pool.lock);
    if (--pool.running < pool.most && pool.parked)
        pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Fewer workers could be started than were counted. */
static void pool_reduce(unsigned n)
{
    pthread_mutex_lock(&pool.lock);
    pool.running -= n;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static void pool_unblock(void)
{
    pool.running++;
}

/* Between requests. Not true: nothing to do. */
static bool pool_crowded(void)
{
    return atomic_load_explicit(&pool.running, memory_order_relaxed) >
           atomic_load_explicit(&pool.most, memory_order_relaxed);
}

static void pool_park(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.running--;
    pool.parked++;
    while (pool.running >= pool.most && !pool.closing)
        pthread_cond_wait(&pool.wake, &pool.lock);
    pool.parked--;
    pool.running++;
    pthread_mutex_unlock(&pool.lock);
}

/* Unmounted: everybody out. */
static void pool_close(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    pool.most = UINT_MAX;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* ******************************************************************************************************** *
 * 5. Host files
 *
 * Contract in fuseexp.h. Every system call on an image is made here.
 * ******************************************************************************************************** */

static int file_size(struct file *f)
{
    if (!f->is_blk) {
        f->size = (uint64_t)f->st.st_size;
        return 0;
    }
    return util_ioctl(f->fd, BLKGETSIZE64, &f->size) < 0 ? -errno : 0;
}

/*
 * Can the host say whether a read would sleep? Memory never does (and cannot say); of the rest assume the
 * worst.
 */
static void file_ask_sleep(struct file *f)
{
    uint8_t byte;
    struct iovec iov = { &byte, 1 };
    struct statfs fs;

    f->sleep = FILE_MAY_SLEEP;
    if (syscall(SYS_preadv2, f->fd, &iov, 1ul, 0ul, 0ul, FX_RWF_NOWAIT) < 0 && errno != EAGAIN)
        f->sleep = fstatfs(f->fd, &fs) == 0 && (fs.f_type == FX_TMPFS_MAGIC || fs.f_type == FX_RAMFS_MAGIC)
                       ? FILE_NEVER_SLEEPS : FILE_ALWAYS_SLEEPS;
}

/* What was opened becomes f, which owns it from here on. */
static int file_adopt(struct file *f, const char *path, int fd, bool writable)
{
    static uint16_t ids;
    int ret;

    f->fd = fd;
    f->id = ids++;
    f->writable = writable;
    f->path = strdup(path);
    if (!f->path)
        return msg_err(-ENOMEM, "%s: out of memory", path);
    if (fstat(f->fd, &f->st) < 0)
        return msg_err(-errno, "%s: %s", path, strerror(errno));
    if (S_ISDIR(f->st.st_mode))
        return msg_err(-EISDIR, "%s: is a directory, not a disk image", path);
    if (!S_ISREG(f->st.st_mode) && !S_ISBLK(f->st.st_mode))
        return msg_err(-EINVAL, "%s: neither a regular file nor a block device", path);
    f->is_blk = S_ISBLK(f->st.st_mode);
    ret = file_size(f);
    if (ret)
        return msg_err(ret, "%s: cannot tell its size: %s", path, strerror(-ret));
    if (f->size > (uint64_t)MAX_IMAGE_SIZE)
        return msg_err(-EFBIG, "%s: too large (%" PRIu64 " bytes)", path, f->size);
    file_ask_sleep(f);
    return 0;
}

/* Without touching the access time where we may: looking must not change a thing. */
static int file_open_fd(const char *path, int flags)
{
    int fd = open(path, flags | O_NOATIME);

    return fd < 0 && errno == EPERM ? open(path, flags) : fd;
}

/* Looks at what it is before opening it: opening a pipe or a tape has effects. */
static int file_open(struct file *f, const char *path, bool writable)
{
    int flags = O_CLOEXEC | O_NONBLOCK | (writable ? O_RDWR : O_RDONLY), fd;
    struct stat st;

    f->fd = -1;
    if (util_fault("open") || stat(path, &st) < 0)
        return msg_err(-errno, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode))
        return msg_err(-EISDIR, "%s: is a directory, not a disk image", path);
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return msg_err(-EINVAL, "%s: neither a regular file nor a block device", path);
    if (S_ISBLK(st.st_mode) && writable)
        flags |= O_EXCL;
    fd = file_open_fd(path, flags);
    if (fd < 0)
        return msg_err(-errno, "%s: %s%s", path, strerror(errno),
                       errno == EBUSY ? " (mounted, or used by another program)" : "");
    return file_adopt(f, path, fd, writable);
}

/*
 * Opens a file that an image names, for reading: below `folder`, and not out of it by "..", links or mounts
 * of /proc. Kernels before 5.6 cannot promise that, so there no name with a slash is followed, and no link.
 */
static int file_open_beneath(struct file *f, const char *folder, const char *name, const char *shown)
{
    struct fx_open_how how = { .flags = O_PATH | O_CLOEXEC,
                               .resolve = FX_RESOLVE_BENEATH | FX_RESOLVE_NO_MAGICLINKS };
    int dir = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC), path_fd = -1, fd = -1, ret;
    char proc[40];
    struct stat st;

    f->fd = -1;
    if (dir >= 0) {
        path_fd = (int)syscall(SYS_openat2, dir, name, &how, sizeof(how));
        if (path_fd < 0 && errno == ENOSYS && !strchr(name, '/'))
            path_fd = openat(dir, name, O_PATH | O_CLOEXEC | O_NOFOLLOW);
    }
    ret = path_fd < 0 || fstat(path_fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? 0 : -EMEDIUMTYPE;
    if (!ret) {
        snprintf(proc, sizeof(proc), "/proc/self/fd/%d", path_fd);     /* looked at before it is opened */
        fd = file_open_fd(proc, O_RDONLY | O_CLOEXEC);
        ret = fd < 0 ? -errno : 0;
    }
    util_close(&path_fd);
    util_close(&dir);
    if (ret)
        return ret;                 /* the caller knows who wanted it */
    return file_adopt(f, shown, fd, false);
}

static int file_measure(struct file *f)
{
    int ret = fstat(f->fd, &f->st) < 0 ? -errno : file_size(f);

    return ret ? msg_err(ret, "%s: cannot tell its size: %s", f->path, strerror(-ret)) : 0;
}

static void file_close(struct file *f)
{
    for (uint32_t i = 0; i < f->n_patches; i++)
        free(f->patches[i].page);
    free(f->patches);
    f->patches = NULL;
    f->n_patches = 0;
    util_close(&f->fd);
    free(f->path);
    f->path = NULL;
}

static int file_lock_byte(struct file *f, int byte, int op, short type)
{
    struct flock lock = { .l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };

    if (fcntl(f->fd, op, &lock) < 0)
        return -errno;
    return op == F_OFD_GETLK && lock.l_type != F_UNLCK ? -EAGAIN : 0;
}

/*
 * QEMU's protocol: first hold our bytes (shared, so this never waits), then look whether anybody holds one
 * that excludes us. Both sides doing it in this order, at least one of two newcomers sees the other.
 */
static int file_lock(struct file *f)
{
    static const uint8_t hold_ro[] = { 100, 201, 203 }, probe_ro[] = { 200, 101, 103 };
    static const uint8_t hold_rw[] = { 100, 101, 103, 201, 203 }, probe_rw[] = { 200, 201, 203, 101, 103 };
    const uint8_t *hold = f->writable ? hold_rw : hold_ro, *probe = f->writable ? probe_rw : probe_ro;
    size_t n_hold = f->writable ? sizeof(hold_rw) : sizeof(hold_ro);
    size_t n_probe = f->writable ? sizeof(probe_rw) : sizeof(probe_ro);
    int ret = 0;

    for (size_t i = 0; i < n_hold && !ret; i++)
        ret = util_fault("lock") ? -EIO : file_lock_byte(f, hold[i], F_OFD_SETLK, F_RDLCK);
    if (ret == -EINVAL || ret == -ENOLCK || ret == -EOPNOTSUPP || ret == -ENOSYS) {
        msg_say(MSG_NOTE,
                "%s: this file system has no locks; make sure that nothing else writes to the image",
                f->path);
        return 0;
    }
    if (ret)
        return msg_err(ret, "%s: cannot lock: %s", f->path, strerror(-ret));
    for (size_t i = 0; i < n_probe; i++) {
        ret = file_lock_byte(f, probe[i], F_OFD_GETLK, F_WRLCK);
        if (ret == -EAGAIN)
            return msg_err(ret, "%s: in use by another program%s (lock on byte %d)%s", f->path,
                           probe[i] / 100 == 1 ? " that writes to it" : "", probe[i],
                           f->writable ? "" : "; -U reads it all the same");
        if (ret)
            return msg_err(ret, "%s: cannot look for locks: %s", f->path, strerror(-ret));
    }
    return 0;
}

/* One pread(2): what is in the page cache without ado, the rest after making room for another worker. */
static ssize_t file_pread_some(struct file *f, void *buf, uint64_t len, uint64_t offset)
{
    struct iovec iov = { buf, len };
    ssize_t n = -1;

    if (util_fault_op("read"))
        return -1;
    if (f->sleep != FILE_ALWAYS_SLEEPS) {
        n = syscall(SYS_preadv2, f->fd, &iov, 1ul, (unsigned long)offset, 0ul,
                    f->sleep == FILE_MAY_SLEEP ? FX_RWF_NOWAIT : 0);
        if (n >= 0 || errno != EAGAIN)
            return n;
    }
    pool_block();
    n = pread(f->fd, buf, len, (off_t)offset);
    pool_unblock();
    return n;
}

static int file_pread_stored(struct file *f, void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    ssize_t n;

    for (*done = 0; *done < len; *done += (uint64_t)n) {
        n = file_pread_some(f, (char *)buf + *done, len - *done, offset + *done);
        if (n < 0 && errno == EINTR)
            n = 0;
        else if (n < 0)
            return msg_serving(-EIO, "%s: read error at %" PRIu64 ": %s", f->path, offset + *done,
                               strerror(errno));
        else if (n == 0)
            return msg_serving(
                -EIO, "%s: ends at or before %" PRIu64 ": it was %" PRIu64 " bytes long when it was opened",
                f->path, offset + *done, f->size);
    }
    return 0;
}

/* The first patch that ends after offset; n_patches: none does. */
static uint32_t file_patch_after(const struct file *f, uint64_t offset)
{
    uint32_t low = 0, high = f->n_patches;

    while (low < high) {
        uint32_t mid = (low + high) / 2;
        if (f->patches[mid].offset + FILE_PATCH > offset)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

/* In pieces: what a patch replaces, what is stored, and what file_extend() added. */
static int file_pread_patched(struct file *f, uint8_t *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    uint64_t at, left, next, n;
    uint32_t i;
    int ret = 0;

    for (*done = 0; *done < len && !ret; *done += n) {
        at = offset + *done;
        left = len - *done;
        i = file_patch_after(f, at);
        next = i < f->n_patches ? f->patches[i].offset : UINT64_MAX;
        if (next <= at) {
            n = util_min(left, next + FILE_PATCH - at);
            if (f->patches[i].page)
                memcpy(buf + *done, f->patches[i].page + (at - next), n);
            else
                memset(buf + *done, 0, n);
        } else if (at < f->stored || at >= f->size) {
            left = util_min(left, next - at);
            ret = file_pread_stored(f, buf + *done, at < f->stored ? util_min(left, f->stored - at) : left, at, &n);
        } else {
            n = util_min(left, util_min(next, f->size) - at);
            memset(buf + *done, 0, n);
        }
    }
    return ret;
}

static int file_pread(struct file *f, void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    return f->overlaid ? file_pread_patched(f, buf, len, offset, done)
                       : file_pread_stored(f, buf, len, offset, done);
}

static void file_overlay(struct file *f)
{
    if (!f->overlaid)
        f->stored = f->size;
    f->overlaid = true;
}

/* From now on `page` (a copy of it; NULL: zeros) is read at offset, a multiple of FILE_PATCH. Only at open. */
static int file_patch(struct file *f, uint64_t offset, const uint8_t *page)
{
    uint32_t i = file_patch_after(f, offset);
    bool there = i < f->n_patches && f->patches[i].offset == offset;
    uint8_t *copy = NULL;

    if (!there && f->n_patches == FILE_MAX_PATCHES)
        return -E2BIG;
    if (!f->patches)
        f->patches = calloc(FILE_MAX_PATCHES, sizeof(*f->patches));
    if (page)
        copy = util_fault("patch") ? NULL : malloc(FILE_PATCH);
    if (!f->patches || (page && !copy)) {
        free(copy);
        return -ENOMEM;
    }
    if (page)
        memcpy(copy, page, FILE_PATCH);
    file_overlay(f);
    if (there) {
        free(f->patches[i].page);
    } else {
        memmove(f->patches + i + 1, f->patches + i, (f->n_patches - i) * sizeof(*f->patches));
        f->n_patches++;
    }
    f->patches[i] = (struct file_patch){ offset, copy };
    return 0;
}

/* From now on the file is `size` bytes long; what is not there reads as zeros. Only at open. */
static void file_extend(struct file *f, uint64_t size)
{
    file_overlay(f);
    f->size = size;
}

/* Is [offset, offset + len) just what is stored? */
static bool file_is_plain(const struct file *f, uint64_t offset, uint64_t len)
{
    uint32_t i;

    if (!f->overlaid)
        return true;
    i = file_patch_after(f, offset);
    return offset + len <= f->stored && (i == f->n_patches || f->patches[i].offset >= offset + len);
}

/* A write into the page cache sleeps when too much of it is dirty already. */
static ssize_t file_pwrite_some(struct file *f, const void *buf, uint64_t len, uint64_t offset)
{
    ssize_t n;

    if (util_fault_op("write"))
        return -1;
    if (f->sleep != FILE_NEVER_SLEEPS)
        pool_block();
    n = pwrite(f->fd, buf, len, (off_t)offset);
    if (f->sleep != FILE_NEVER_SLEEPS)
        pool_unblock();
    return n;
}

static int file_pwrite(struct file *f, const void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    int ret;
    ssize_t n;

    for (*done = 0; *done < len; *done += (uint64_t)n) {
        n = file_pwrite_some(f, (const char *)buf + *done, len - *done, offset + *done);
        if (n < 0 && errno == EINTR) {
            n = 0;
        } else if (n <= 0) {
            ret = n < 0 ? -errno : -EIO;
            return msg_serving(ret, "%s: write error at %" PRIu64 ": %s", f->path, offset + *done,
                               strerror(-ret));
        }
    }
    return 0;
}

static int file_sync(struct file *f)
{
    int none = 0, ret = atomic_load(&f->latched);

    if (ret)
        return ret;
    pool_block();
    ret = util_fault_op("sync") || fdatasync(f->fd) < 0 ? -errno : 0;
    pool_unblock();
    if (!ret)
        return 0;
    atomic_compare_exchange_strong(&f->latched, &none, ret);
    return msg_serving(ret, "%s: flush failed, what was written before may be lost: %s", f->path,
                       strerror(-ret));
}

/* mode: the flags of fallocate(2). -EOPNOTSUPP where the host cannot do it. */
static int file_fallocate(struct file *f, int mode, uint64_t offset, uint64_t len)
{
    int ret;

    pool_block();
    do
        ret = util_fault_op("fallocate") ? -1 : fallocate(f->fd, mode, (off_t)offset, (off_t)len);
    while (ret < 0 && errno == EINTR);
    ret = ret < 0 ? -errno : 0;
    pool_unblock();
    return ret == -ENOSYS || ret == -ENODEV ? -EOPNOTSUPP : ret;
}

static int file_write_zeros(struct file *f, uint64_t offset, uint64_t len)
{
    static const uint8_t zeros[65536];
    uint64_t done = 0;
    int ret = 0;

    for (; len && !ret; offset += done, len -= done)
        ret = file_pwrite(f, zeros, util_min(len, sizeof(zeros)), offset, &done);
    return ret;
}

/*
 * Puts references to the file's pages into an empty pipe. Quietly false if they cannot all be had: the caller
 * reads the range the ordinary way then, which finds out what is wrong.
 */
static bool file_splice(struct file *f, int pipe_fd, uint64_t len, uint64_t offset)
{
    uint8_t last;
    struct iovec iov = { &last, 1 };
    loff_t at = (loff_t)offset;
    bool sleeps;
    ssize_t n;

    if (util_fault_op("read") || !file_is_plain(f, offset, len))
        return false;
    sleeps = f->sleep == FILE_ALWAYS_SLEEPS ||
             (f->sleep == FILE_MAY_SLEEP &&
              syscall(SYS_preadv2, f->fd, &iov, 1ul, (unsigned long)(offset + len - 1), 0ul, FX_RWF_NOWAIT) !=
                  1);
    if (sleeps)
        pool_block();
    do {
        n = splice(f->fd, &at, pipe_fd, NULL, len, 0);
        len -= n > 0 ? (uint64_t)n : 0;
    } while (n > 0 && len);
    if (sleeps)
        pool_unblock();
    return len == 0;
}

/*
 * Data or a hole at offset, and for how long (at least 1, at most len)? Where the host cannot tell, it is
 * data; and so is what a truncated file has lost, because nobody must take that for zeros.
 */
static void file_seek_extent(struct file *f, uint64_t offset, uint64_t len, bool *data, uint64_t *extent)
{
    struct stat st;
    off_t at;

    *data = true;
    *extent = len;
    if (f->is_blk || fstat(f->fd, &st) < 0 || offset >= (uint64_t)st.st_size)
        return;
    *extent = len = util_min(len, (uint64_t)st.st_size - offset);
    at = lseek(f->fd, (off_t)offset, SEEK_DATA);
    if (at == (off_t)offset)
        at = lseek(f->fd, (off_t)offset, SEEK_HOLE);
    else
        *data = at < 0 && errno != ENXIO;
    if (at > (off_t)offset)
        *extent = util_min(len, (uint64_t)at - offset);
}

/* ******************************************************************************************************** *
 * 6. Codecs
 *
 * One compressed cluster at a time, into a buffer of the size it must have: more or less is an error, and
 * what a hostile stream claims allocates nothing. Every thread keeps its own decoder and its own buffer for
 * what it reads.
 * ******************************************************************************************************** */

static _Thread_local struct {
    struct libdeflate_decompressor *deflate;
    ZSTD_DCtx *zstd;
    uint8_t *coded; /* MAX_CLUSTER + 512: more is never needed for what decodes to MAX_CLUSTER */
} codec_own;

static bool codec_prepare(enum codec codec)
{
    if (!codec_own.coded)
        codec_own.coded = malloc(MAX_CLUSTER + 512);
    if (codec != CODEC_ZSTD && !codec_own.deflate)
        codec_own.deflate = libdeflate_alloc_decompressor();
    if (codec == CODEC_ZSTD && !codec_own.zstd)
        codec_own.zstd = ZSTD_createDCtx();
    return codec_own.coded && (codec == CODEC_ZSTD ? (void *)codec_own.zstd : (void *)codec_own.deflate);
}

/* Frame by frame, since several may follow each other and padding follows the last. */
static bool codec_zstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    size_t done = 0, frame, n;

    while (done < out_len) {
        frame = ZSTD_findFrameCompressedSize(in, in_len);
        if (ZSTD_isError(frame))
            return false;
        n = ZSTD_decompressDCtx(codec_own.zstd, out + done, out_len - done, in, frame);
        if (ZSTD_isError(n))
            return false;
        done += n;
        in += frame;
        in_len -= frame;
    }
    return true;
}

static bool codec_decode(enum codec codec, size_t in_len, uint8_t *out, size_t out_len)
{
    size_t used, got;

    if (codec == CODEC_ZSTD)
        return codec_zstd(codec_own.coded, in_len, out, out_len);
    return (codec == CODEC_ZLIB ? libdeflate_zlib_decompress_ex : libdeflate_deflate_decompress_ex)(
               codec_own.deflate, codec_own.coded, in_len, out, out_len, &used, &got) == LIBDEFLATE_SUCCESS &&
           got == out_len;
}

/* ******************************************************************************************************** *
 * 7. Cache
 *
 * One budget for all images (--cache-size), half for metadata tables, half for decoded clusters.
 *
 * Tables: slices of 4 KiB in sets of CACHE_WAYS slots. Whoever looks an entry up takes no lock: he reads the
 * slot's tag and sequence number, the entry, and the number again; when it changed, or was odd, the slot was
 * being refilled, and he goes the slow way. Refilling locks the set's lock. Slots are reused, never freed, so
 * a late reader reads old words at worst, and then throws them away.
 *
 * Decoded clusters: a list in the order of use under one lock. A cluster is decoded once: who comes second
 * waits for the first (single flight). An entry in use by somebody is not dropped.
 * ******************************************************************************************************** */

enum {
    CACHE_SLICE = 4096,
    CACHE_WORDS = CACHE_SLICE / 8,
    CACHE_WAYS = 4,
    CACHE_LOCKS = 64,
    CACHE_BUCKETS = 1024
};

struct cache_slot {
    _Atomic uint64_t tag;           /* 0: empty */
    _Atomic uint32_t sequence;      /* odd while being refilled */
    uint32_t next_way;              /* of the set, in its first slot; under the set's lock */
};

struct cache_cluster {
    struct cache_cluster *hash_next, *newer, *older;
    const struct file *file;
    uint64_t offset;
    uint32_t length, coded_length, users;
    enum { CACHE_DECODING, CACHE_READY, CACHE_BROKEN } state;
    uint8_t data[];
};

static struct {
    struct cache_slot *slots;
    _Atomic uint64_t *words;        /* CACHE_WORDS per slot, as they lie in the file */
    uint64_t n_sets;
    pthread_mutex_t set_lock[CACHE_LOCKS];

    pthread_mutex_t lock; /* protects all that follows, and every struct cache_cluster but its data */
    pthread_cond_t decoded;
    struct cache_cluster *bucket[CACHE_BUCKETS], *newest, *oldest;
    uint64_t used, most;
} cache = { .lock = PTHREAD_MUTEX_INITIALIZER, .decoded = PTHREAD_COND_INITIALIZER };

static int cache_start(uint64_t budget)
{
    uint64_t sets = 1, slots;

    while (sets * 2 * CACHE_WAYS * (CACHE_SLICE + sizeof(struct cache_slot)) <= budget / 2)
        sets *= 2;
    slots = sets * CACHE_WAYS;
    cache.slots = util_fault("cache slots") ? NULL : calloc(slots, sizeof(*cache.slots));
    cache.words = util_fault("cache words") ? MAP_FAILED
                                            : mmap(NULL, slots * CACHE_SLICE, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache.words == MAP_FAILED)
        cache.words = NULL;
    cache.n_sets = sets;
    cache.most = budget / 2;
    for (size_t i = 0; i < CACHE_LOCKS; i++)
        pthread_mutex_init(&cache.set_lock[i], NULL);
    return cache.slots && cache.words ? 0 : msg_err(-ENOMEM, "out of memory for the cache");
}

static void cache_stop(void)
{
    free(cache.slots);
    if (cache.words)
        munmap((void *)cache.words, cache.n_sets * CACHE_WAYS * CACHE_SLICE);
    cache.slots = NULL;
    cache.words = NULL;
    while (cache.oldest) {
        struct cache_cluster *c = cache.oldest;
        cache.oldest = c->newer;
        free(c);
    }
    cache.newest = NULL;
    memset(cache.bucket, 0, sizeof(cache.bucket));
    cache.used = 0;
}

static uint64_t cache_hash(const struct file *f, uint64_t offset)
{
    uint64_t x = offset ^ (uint64_t)f->id << 48;

    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

/* The 8-byte word of the slot, if it (still) holds the slice. */
static bool cache_peek(uint64_t slot, uint64_t tag, size_t word, uint64_t *value)
{
    struct cache_slot *s = &cache.slots[slot];
    uint32_t before;

    if (atomic_load_explicit(&s->tag, memory_order_relaxed) != tag)
        return false;
    before = atomic_load_explicit(&s->sequence, memory_order_acquire);
    if (before & 1 || atomic_load_explicit(&s->tag, memory_order_acquire) != tag)
        return false;
    /* acquire: the check below may not be made before the word was read */
    *value = atomic_load_explicit(&cache.words[slot * CACHE_WORDS + word], memory_order_acquire);
    return atomic_load_explicit(&s->sequence, memory_order_relaxed) == before;
}

static void cache_fill(uint64_t set, uint64_t tag, const uint64_t *slice)
{
    pthread_mutex_t *lock = &cache.set_lock[set % CACHE_LOCKS];
    struct cache_slot *first = &cache.slots[set * CACHE_WAYS], *s;
    uint64_t slot;
    uint32_t sequence;

    pthread_mutex_lock(lock);
    slot = set * CACHE_WAYS + first->next_way++ % CACHE_WAYS;
    s = &cache.slots[slot];
    sequence = atomic_load_explicit(&s->sequence, memory_order_relaxed);
    atomic_store_explicit(&s->sequence, sequence + 1, memory_order_seq_cst);
    atomic_store_explicit(&s->tag, 0, memory_order_seq_cst);
    for (size_t i = 0; i < CACHE_WORDS; i++)
        atomic_store_explicit(&cache.words[slot * CACHE_WORDS + i], slice[i], memory_order_release);
    atomic_store_explicit(&s->tag, tag, memory_order_release);
    atomic_store_explicit(&s->sequence, sequence + 2, memory_order_release);
    pthread_mutex_unlock(lock);
}

/*
 * Eight bytes of a table in f at offset (a multiple of 8), as they lie there; past the file's end zeros. -EIO:
 * unreadable.
 */
static int cache_word(struct file *f, uint64_t offset, uint64_t *value)
{
    uint64_t start = offset / CACHE_SLICE * CACHE_SLICE, set = cache_hash(f, start) % cache.n_sets, done;
    uint64_t slice[CACHE_WORDS], tag = start | (uint64_t)(f->id & 0x7ff) << 1 | 1;
    size_t word = (offset - start) / 8;

    for (uint64_t way = 0; way < CACHE_WAYS; way++)
        if (cache_peek(set * CACHE_WAYS + way, tag, word, value))
            return 0;
    if (start >= f->size || file_pread(f, slice, util_min(CACHE_SLICE, f->size - start), start, &done))
        return -EIO;
    memset((uint8_t *)slice + done, 0, CACHE_SLICE - done);
    cache_fill(set, tag, slice);
    *value = slice[word];
    return 0;
}

static int cache_be64(struct file *f, uint64_t offset, uint64_t *value)
{
    uint64_t word;
    int ret = cache_word(f, offset, &word);

    *value = ret ? 0 : util_be64((const uint8_t *)&word);
    return ret;
}

static int cache_le64(struct file *f, uint64_t offset, uint64_t *value)
{
    uint64_t word;
    int ret = cache_word(f, offset, &word);

    *value = ret ? 0 : util_le64((const uint8_t *)&word);
    return ret;
}

static int cache_be32(struct file *f, uint64_t offset, uint32_t *value)
{
    uint64_t word;
    int ret = cache_word(f, offset & ~7ull, &word);

    *value = ret ? 0 : util_be32((const uint8_t *)&word + (offset & 4));
    return ret;
}

enum { CACHE_MAX_BITS = 1 << 15 };  /* looked at for one extent: 16 MiB of sectors */

/*
 * A bitmap in f at offset (a multiple of 8): bit `first`, and how many of the `count` bits from there on are like
 * it; at most CACHE_MAX_BITS are looked at. The first bit of a byte is its highest (big) or its lowest.
 */
static int cache_bits(struct file *f, uint64_t offset, uint64_t first, uint64_t count, bool big, bool *set,
                      uint64_t *run)
{
    uint64_t word, at = first;

    *set = false;
    count = util_min(count, CACHE_MAX_BITS);
    for (*run = 0; *run < count; at = first + *run) {
        if (cache_word(f, offset + at / 64 * 8, &word))
            return *run ? 0 : -EIO;     /* what was read is good */
        word = (big ? util_be64 : util_le64)((const uint8_t *)&word);
        if (*run == 0)
            *set = (big ? word >> (63 - at % 64) : word >> at % 64) & 1;
        if (*set)
            word = ~word;
        word = big ? word << at % 64 : word >> at % 64;         /* the first bit that differs is set */
        if (word) {
            *run += (uint64_t)(big ? __builtin_clzll(word) : __builtin_ctzll(word));
            break;
        }
        *run += 64 - at % 64;
    }
    *run = util_min(*run, count);
    return 0;
}

/* -- decoded clusters -- */

static void cache_unlink(struct cache_cluster *c)
{
    *(c->newer ? &c->newer->older : &cache.newest) = c->older;
    *(c->older ? &c->older->newer : &cache.oldest) = c->newer;
}

static void cache_link_newest(struct cache_cluster *c)
{
    c->newer = NULL;
    c->older = cache.newest;
    *(cache.newest ? &cache.newest->newer : &cache.oldest) = c;
    cache.newest = c;
}

static void cache_drop(struct cache_cluster *c)
{
    struct cache_cluster **p = &cache.bucket[cache_hash(c->file, c->offset) % CACHE_BUCKETS];

    while (*p != c)
        p = &(*p)->hash_next;
    *p = c->hash_next;
    cache_unlink(c);
    cache.used -= sizeof(*c) + c->length;
    free(c);
}

static void cache_make_room(void)
{
    struct cache_cluster *c = cache.oldest, *newer;

    for (; c && cache.used > cache.most; c = newer) {
        newer = c->newer;
        if (c->users == 0)
            cache_drop(c);
    }
}

/* The cluster's entry, with us among its users; new (state CACHE_DECODING, to be decoded by us) if *ours. */
static struct cache_cluster *cache_get_locked(const struct extent *ext, bool *ours)
{
    struct cache_cluster **bucket = &cache.bucket[cache_hash(ext->file, ext->offset) % CACHE_BUCKETS], *c;

    for (c = *bucket; c; c = c->hash_next)
        if (c->file == ext->file && c->offset == ext->offset && c->length == ext->decoded_length &&
            c->coded_length == ext->coded_length && c->state != CACHE_BROKEN)
            break;
    *ours = !c;
    if (c) {
        c->users++;
        cache_unlink(c);
        cache_link_newest(c);
        return c;
    }
    c = malloc(sizeof(*c) + ext->decoded_length);
    if (!c)
        return NULL;
    *c = (struct cache_cluster){ .hash_next = *bucket,
                                 .file = ext->file,
                                 .offset = ext->offset,
                                 .length = ext->decoded_length,
                                 .coded_length = ext->coded_length,
                                 .users = 1,
                                 .state = CACHE_DECODING };
    *bucket = c;
    cache_link_newest(c);
    cache.used += sizeof(*c) + c->length;
    cache_make_room();
    return c;
}

static bool cache_decode(const struct extent *ext, uint8_t *out)
{
    uint64_t done,
        in_len = util_min(util_min(ext->coded_length, MAX_CLUSTER + 512), ext->file->size - ext->offset);

    if (!codec_prepare(ext->codec) || file_pread(ext->file, codec_own.coded, in_len, ext->offset, &done))
        return false;
    if (codec_decode(ext->codec, in_len, out, ext->decoded_length))
        return true;
    msg_serving(0, "%s: the compressed cluster at %" PRIu64 " does not decode", ext->file->path, ext->offset);
    return false;
}

/* Reads len bytes from ext->skip on of what a compressed extent decodes to. */
static int cache_read_decoded(const struct extent *ext, uint8_t *buf, uint64_t len)
{
    struct cache_cluster *c;
    bool ours, good;

    pthread_mutex_lock(&cache.lock);
    c = cache_get_locked(ext, &ours);
    if (c && ours) {
        pthread_mutex_unlock(&cache.lock);
        good = cache_decode(ext, c->data);
        pthread_mutex_lock(&cache.lock);
        c->state = good ? CACHE_READY : CACHE_BROKEN;
        pthread_cond_broadcast(&cache.decoded);
    }
    while (c && c->state == CACHE_DECODING)
        pthread_cond_wait(&cache.decoded, &cache.lock);
    pthread_mutex_unlock(&cache.lock);
    if (!c)
        return -ENOMEM;
    good = c->state == CACHE_READY;
    if (good)
        memcpy(buf, c->data + ext->skip, len);
    pthread_mutex_lock(&cache.lock);
    if (--c->users == 0 && !good)
        cache_drop(c);              /* a read error may go away; a bad cluster is tried again */
    pthread_mutex_unlock(&cache.lock);
    return good ? 0 : -EIO;
}

/* ******************************************************************************************************** *
 * 8. Raw images
 *
 * No metadata: the bytes of one file or block device, or of several files in a row. The parts of a split
 * image are numbered (.000 or .001 onwards, any width from two digits) or lettered (.aa onwards, as split(1)
 * names them). All parts but the last are of one size; a set that was found by name and breaks this has a
 * damaged part. state: uint64_t start[n_files + 1], where each file begins; only with several files.
 * ******************************************************************************************************** */

/* Anything can be raw, so it is only what is left when nothing else wants it. */
static int raw_probe(const struct probe *p)
{
    (void)p;
    return 1;
}

/* Reads a part's suffix: its length (0: this is no part's name), its number, and whether it is of digits. */
static size_t raw_suffix(const char *path, bool *digits, unsigned *number)
{
    const char *dot = strrchr(util_basename(path), '.');
    size_t len = dot ? strlen(dot + 1) : 0;

    if (len < 2 || len > 5)
        return 0;
    *digits = strspn(dot + 1, "0123456789") == len;
    *number = 0;
    for (const char *p = dot + 1; *p; p++) {
        if (!*digits && (*p < 'a' || *p > 'z'))
            return 0;
        *number = *number * (*digits ? 10 : 26) + (unsigned)(*p - (*digits ? '0' : 'a'));
    }
    return len;
}

/* The name of part `number`. False: the suffix is too short for it. */
static bool raw_name(const char *path, size_t len, bool digits, unsigned number, char name[PATH_MAX])
{
    if (!util_copy(name, PATH_MAX, path))
        return false;
    for (char *p = name + strlen(name); len--; number /= digits ? 10 : 26)
        *--p = (char)((digits ? '0' : 'a') + number % (digits ? 10 : 26));
    return number == 0;
}

static bool raw_part(const char *first, unsigned i, char name[PATH_MAX])
{
    unsigned number;
    bool digits;
    size_t len = raw_suffix(first, &digits, &number);

    return len && number <= (digits ? 1 : 0) && raw_name(first, len, digits, number + i, name);
}

/*
 * A later part of a set, shown alone, looks like a broken disk; and .001 may be the first part or the
 * second.
 */
static int raw_check_first(const struct image *im)
{
    char before[PATH_MAX];
    unsigned number;
    bool digits;
    size_t len = raw_suffix(im->name, &digits, &number);

    if (im->depth || im->n_given > 1 || !im->opt->parts || !len || !number ||
        !raw_name(im->name, len, digits, number - 1, before) || access(before, F_OK) < 0)
        return 0;
    if (im->found_parts || number == 1)
        return msg_err(-EINVAL,
                       "%s: %s is the first part; name that one, or take this one alone with --no-parts",
                       im->name, util_basename(before));
    msg_say(MSG_NOTE, "%s: shown alone, though it may be a later part of a split image: %s is there",
            im->name, util_basename(before));
    return 0;
}

static int raw_check_parts(struct image *im)
{
    uint64_t first = im->files[0].size;

    for (unsigned i = 1; im->found_parts && i < im->n_files; i++)
        if (im->files[i].size > first || (im->files[i].size < first && i + 1 < im->n_files))
            return msg_err(-EINVAL, "%s: part of %" PRIu64 " bytes among parts of %" PRIu64
                           ": damaged or incomplete; name all parts to use them as they are",
                           im->files[i].path, im->files[i].size, first);
    return 0;
}

static int raw_open(struct image *im)
{
    uint64_t *start, sum = 0;
    int ret = raw_check_first(im);

    if (!ret)
        ret = raw_check_parts(im);

    if (ret)
        return ret;
    im->state = start = util_fault("part table") ? NULL : calloc(im->n_files + 1, sizeof(*start));
    if (!start)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    for (unsigned i = 0; i < im->n_files; i++) {
        if (im->files[i].size > (uint64_t)MAX_IMAGE_SIZE - sum)
            return msg_err(-EFBIG, "%s: the parts add up to more than a file can hold", im->files[i].path);
        start[i] = sum;
        sum += im->files[i].size;
    }
    start[im->n_files] = sum;
    im->size = sum;
    return 0;
}

static int raw_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    const uint64_t *start = im->state;
    unsigned low = 0, high = im->n_files;
    bool data = true;

    while (high - low > 1) {
        unsigned mid = (low + high) / 2;
        if (start[mid] <= offset)
            low = mid;
        else
            high = mid;
    }
    ext->file = &im->files[low];
    ext->offset = offset - start[low];
    ext->length = low + 1 < im->n_files ? util_min(length, start[low + 1] - offset) : length;
    if (exact)
        file_seek_extent(ext->file, ext->offset, ext->length, &data, &ext->length);
    ext->kind = data ? EXT_DATA : EXT_ZERO;
    return 0;
}

static int raw_resize(struct image *im, uint64_t size)
{
    if (im->n_files > 1 || im->files[0].is_blk)
        return -EOPNOTSUPP;
    return util_fault_op("truncate") || ftruncate(im->files[0].fd, (off_t)size) < 0 ? -errno : 0;
}

static void raw_close(struct image *im)
{
    free(im->state);
}

static const struct image_format raw_format = {
    .name = "raw",
    .describe = "raw files, split raw files (.000 .001 .aa), block devices",
    .writes = "in place",
    .writable = true,
    .probe = raw_probe,
    .part = raw_part,
    .open = raw_open,
    .map = raw_map,
    .resize = raw_resize,
    .close = raw_close,
};

static int img_open_named(struct image *im, struct file *f, const char *name, const char *what,
                          const char *option);

/* ******************************************************************************************************** *
 * 9. qcow2
 *
 * QEMU docs/interop/qcow2.rst, versions 2 and 3, for reading. All numbers are big-endian.
 *
 *   header | L1 table -> L2 tables (one cluster each) -> clusters of data; refcounts are not needed for reading
 *   guest offset = L1 index | L2 index | offset in the cluster; an L2 entry is 8 bytes, or 16 with subclusters
 *
 * Nothing is loaded at open: L1 and L2 entries come through the table cache, so an image that claims
 * petabytes costs nothing. The L1 table must lie inside the file, and every pointer is checked where it is
 * followed.
 * ******************************************************************************************************** */

enum {
    QCOW2_MAGIC = 0x514649fb,
    QCOW2_HEADER_V2 = 72,
    QCOW2_HEADER_V3 = 104,
    QCOW2_DIRTY = 1,
    QCOW2_CORRUPT = 2,
    QCOW2_DATA_FILE = 4,
    QCOW2_COMPRESSION = 8,
    QCOW2_EXTL2 = 16,
    QCOW2_RAW_DATA = 2, /* autoclear */
    QCOW2_MAX_L1 = 32 << 20,
    QCOW2_MAX_NAME = 1023,
    QCOW2_MAX_SNAPSHOTS = 65536,
    QCOW2_LOOK_AHEAD = 128, /* entries looked at for one extent: below us they may all be looked up again */
    QCOW2_SUBCLUSTERS = 32,
};
#define QCOW2_OFFSET 0x00fffffffffffe00u
#define QCOW2_COPIED (1ull << 63)
#define QCOW2_COMPRESSED (1ull << 62)
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acau
#define QCOW2_EXT_FEATURES 0x6803f857u
#define QCOW2_EXT_DATA_FILE 0x44415441u

struct qcow2 {
    uint32_t version, cluster_bits, l2_bits, entry_size;    /* l2_bits: log2 of the entries of an L2 table */
    uint64_t size, l1_offset, l1_entries, incompatible, autoclear;
    uint32_t header_length;
    bool subclusters, v2;
    enum codec codec;
    struct file *data;              /* where clusters lie: the image itself or the external data file */
    char data_name[QCOW2_MAX_NAME + 1];
};

static int qcow2_probe(const struct probe *p)
{
    return p->head_len >= 8 && util_be32(p->head) == QCOW2_MAGIC && util_be32(p->head + 4) >= 2 ? 100 : 0;
}

static int qcow2_bad(const struct image *im, const char *what, uint64_t value)
{
    return msg_err(-EINVAL, "%s: damaged or hostile qcow2: %s (0x%" PRIx64 ")", im->name, what, value);
}

static int qcow2_read(struct image *im, uint64_t offset, void *buf, uint64_t len, const char *what)
{
    uint64_t done;

    if (offset > im->files[0].size || len > im->files[0].size - offset)
        return qcow2_bad(im, what, offset);
    return file_pread(&im->files[0], buf, len, offset, &done);
}

/* Names unknown incompatible features, from the image's own table where it has one. */
static int qcow2_unknown_feature(const struct image *im, uint64_t bits, const uint8_t *table, uint32_t len)
{
    unsigned bit = 0;

    while (!(bits >> bit & 1))
        bit++;
    for (uint32_t at = 0; table && at + 48 <= len; at += 48)
        if (table[at] == 0 && table[at + 1] == bit)
            return msg_err(-EOPNOTSUPP, "%s: needs the unknown qcow2 feature '%.46s' (bit %u)", im->name,
                           (const char *)table + at + 2, bit);
    return msg_err(-EOPNOTSUPP, "%s: needs an unknown qcow2 feature (incompatible bit %u)", im->name, bit);
}

/* Copies a name of n bytes; zeros inside would make it another one. */
static bool qcow2_copy_name(char *to, size_t room, const uint8_t *from, uint32_t n)
{
    if (n >= room || memchr(from, 0, n))
        return false;
    memcpy(to, from, n);
    to[n] = 0;
    return true;
}

/*
 * Header extensions: type, length, data padded to 8 bytes, up to the end marker or the first cluster's end.
 */
static int qcow2_extensions(struct image *im, struct qcow2 *q, const uint8_t *cluster, uint64_t len)
{
    const uint64_t known = QCOW2_DIRTY | QCOW2_CORRUPT | QCOW2_DATA_FILE | QCOW2_COMPRESSION | QCOW2_EXTL2;
    const uint8_t *features = NULL;
    uint64_t name = util_be64(cluster + 8);
    uint32_t type, n, features_len = 0;

    if (name >= q->header_length)
        len = util_min(
            len, name); /* images without an end marker: the name of the backing file ends the extensions */

    for (uint64_t at = q->header_length; at + 8 <= len; at += 8 + ((uint64_t)n + 7) / 8 * 8) {
        type = util_be32(cluster + at);
        n = util_be32(cluster + at + 4);
        if (type == 0)
            break;
        if (n > len - at - 8)
            return qcow2_bad(im, "a header extension reaches past the first cluster", n);
        if (type == QCOW2_EXT_BACKING_FORMAT &&
            !qcow2_copy_name(im->backing_format, sizeof(im->backing_format), cluster + at + 8, n))
            return qcow2_bad(im, "the name of the backing format is too long", n);
        if (type == QCOW2_EXT_DATA_FILE &&
            !qcow2_copy_name(q->data_name, sizeof(q->data_name), cluster + at + 8, n))
            return qcow2_bad(im, "the name of the data file is too long", n);
        if (type == QCOW2_EXT_FEATURES) {
            features = cluster + at + 8;
            features_len = n;
        }
    }
    return q->incompatible & ~known
               ? qcow2_unknown_feature(im, q->incompatible & ~known, features, features_len)
               : 0;
}

static int qcow2_check_header(struct image *im, struct qcow2 *q, const uint8_t *h)
{
    uint32_t compression = q->header_length > 104 ? h[104] : 0, order = q->v2 ? 4 : util_be32(h + 96);

    if (q->version != 2 && q->version != 3)
        return msg_err(-EOPNOTSUPP, "%s: qcow2 of unknown version %u", im->name, q->version);
    if (q->cluster_bits < 9 || q->cluster_bits > 21)
        return qcow2_bad(im, "the cluster size", q->cluster_bits);
    if (util_be32(h + 32))
        return msg_err(-EOPNOTSUPP, "%s: is encrypted (%s), which is not supported", im->name,
                       util_be32(h + 32) == 1   ? "AES"
                       : util_be32(h + 32) == 2 ? "LUKS"
                                                : "unknown method");
    if (q->header_length < (q->v2 ? QCOW2_HEADER_V2 : QCOW2_HEADER_V3) ||
        q->header_length > 1u << q->cluster_bits)
        return qcow2_bad(im, "the header's length", q->header_length);
    if (order > 6)
        return qcow2_bad(im, "the refcount width", order);
    if ((compression != 0) != !!(q->incompatible & QCOW2_COMPRESSION) || compression > 1)
        return qcow2_bad(im, "the compression type", compression);
    q->codec = compression ? CODEC_ZSTD : CODEC_DEFLATE;
    if ((q->autoclear & QCOW2_RAW_DATA) && !(q->incompatible & QCOW2_DATA_FILE))
        return qcow2_bad(im, "raw external data without a data file", q->autoclear);
    if (q->subclusters && q->cluster_bits < 14)
        return qcow2_bad(im, "subclusters need clusters of 16 KiB at least", q->cluster_bits);
    if (q->size > (uint64_t)MAX_IMAGE_SIZE)
        return qcow2_bad(im, "the size", q->size);
    return 0;
}

static int qcow2_read_header(struct image *im, struct qcow2 *q, const uint8_t *h)
{
    q->version = util_be32(h + 4);
    q->v2 = q->version == 2;
    q->cluster_bits = util_be32(h + 20);
    q->size = util_be64(h + 24);
    q->l1_entries = util_be32(h + 36);
    q->l1_offset = util_be64(h + 40);
    q->incompatible = q->v2 ? 0 : util_be64(h + 72);
    q->autoclear = q->v2 ? 0 : util_be64(h + 88);
    q->header_length = q->v2 ? QCOW2_HEADER_V2 : util_be32(h + 100);
    q->subclusters = q->incompatible & QCOW2_EXTL2;
    q->entry_size = q->subclusters ? 16 : 8;
    return qcow2_check_header(im, q, h);
}

/* The name of the backing file lies in the first cluster. */
static int qcow2_read_backing_name(struct image *im, const struct qcow2 *q, const uint8_t *cluster,
                                   uint64_t len)
{
    uint64_t offset = util_be64(cluster + 8);
    uint32_t n = util_be32(cluster + 16);

    if (!offset)
        return 0;
    if (n > QCOW2_MAX_NAME || offset > 1u << q->cluster_bits || n > (1u << q->cluster_bits) - offset ||
        offset + n > len)
        return qcow2_bad(im, "the name of the backing file", n);
    if (!qcow2_copy_name(im->backing_name, sizeof(im->backing_name), cluster + offset, n))
        return qcow2_bad(im, "the name of the backing file", n);
    return 0;
}

/*
 * The L1 table (of the image or of a snapshot) must be whole, inside the file, and large enough for the
 * size.
 */
static int qcow2_check_l1(struct image *im, const struct qcow2 *q)
{
    uint64_t covers = (uint64_t)q->cluster_bits + q->l2_bits,
             need = q->size ? ((q->size - 1) >> covers) + 1 : 0;

    if (q->l1_entries > QCOW2_MAX_L1 / 8 || q->l1_entries < need)
        return qcow2_bad(im, "the size of the L1 table", q->l1_entries);
    if (need && (q->l1_offset % (1u << q->cluster_bits) || q->l1_offset > im->files[0].size ||
                 need * 8 > im->files[0].size - q->l1_offset))
        return qcow2_bad(im, "the place of the L1 table", q->l1_offset);
    return 0;
}

struct qcow2_snapshot {
    uint64_t l1_offset, l1_entries, size, next;
    char id[256], name[1024];
};

static int qcow2_read_snapshot(struct image *im, const struct qcow2 *q, uint64_t at,
                               struct qcow2_snapshot *sn)
{
    uint8_t h[40] = { 0 }, extra[16] = { 0 };
    uint32_t id_len, name_len, extra_len;
    int ret = qcow2_read(im, at, h, sizeof(h), "the snapshot table reaches past the end");

    if (ret)
        return ret;
    id_len = util_be16(h + 12);
    name_len = util_be16(h + 14);
    extra_len = util_be32(h + 36);
    if (extra_len > 1024 || id_len >= sizeof(sn->id) || name_len >= sizeof(sn->name))
        return qcow2_bad(im, "a snapshot's entry", extra_len);
    ret = qcow2_read(im, at + 40, extra, util_min(extra_len, 16), "the snapshot table reaches past the end");
    if (!ret)
        ret = qcow2_read(im, at + 40 + extra_len, sn->id, id_len, "the snapshot table reaches past the end");
    if (!ret)
        ret = qcow2_read(im, at + 40 + extra_len + id_len, sn->name, name_len,
                         "the snapshot table reaches past the end");
    sn->id[id_len] = sn->name[name_len] = 0;
    sn->l1_offset = util_be64(h);
    sn->l1_entries = util_be32(h + 8);
    sn->size = extra_len >= 16 ? util_be64(extra + 8) : q->size;
    sn->next = at + (40 + (uint64_t)extra_len + id_len + name_len + 7) / 8 * 8;
    return ret;
}

/* By id first, then by name, as qemu-img does. */
static int qcow2_use_snapshot(struct image *im, struct qcow2 *q, const uint8_t *header, const char *wanted)
{
    struct qcow2_snapshot sn = { 0 };
    uint32_t n = util_be32(header + 60);
    uint64_t at;
    int ret;

    if (n > QCOW2_MAX_SNAPSHOTS)
        return qcow2_bad(im, "the number of snapshots", n);
    for (int by_name = 0; by_name < 2; by_name++) {
        at = util_be64(header + 64);
        for (uint32_t i = 0; i < n; i++, at = sn.next) {
            ret = qcow2_read_snapshot(im, q, at, &sn);
            if (ret)
                return ret;
            if (strcmp(by_name ? sn.name : sn.id, wanted) != 0)
                continue;
            q->l1_offset = sn.l1_offset;
            q->l1_entries = sn.l1_entries;
            q->size = sn.size;
            return q->size > (uint64_t)MAX_IMAGE_SIZE ? qcow2_bad(im, "the snapshot's size", q->size) : 0;
        }
    }
    return msg_err(-ENOENT, "%s: has no snapshot '%s' (it has %u)", im->name, wanted, n);
}

static int qcow2_open_data_file(struct image *im, struct qcow2 *q)
{
    struct file *f = &im->files[1];
    const char *user = im->depth == 0 ? im->opt->data_file : NULL;

    q->data = &im->files[0];
    if (!(q->incompatible & QCOW2_DATA_FILE))
        return user ? msg_err(-EINVAL, "%s: has no external data file, so --data-file is of no use", im->name)
                    : 0;
    if (!user && !*q->data_name)
        return msg_err(-EINVAL, "%s: does not name its external data file; --data-file FILE does", im->name);
    f->fd = -1;
    im->n_files = 2;
    q->data = f;
    return user ? file_open(f, user, false)
                : img_open_named(im, f, q->data_name, "external data file", "--data-file");
}

static int qcow2_open(struct image *im)
{
    struct qcow2 *q = im->state = util_fault("qcow2") ? NULL : calloc(1, sizeof(*q));
    uint8_t header[112] = { 0 }, *cluster = NULL;
    const char *snapshot = im->depth == 0 ? im->opt->snapshot : NULL;
    uint64_t len, done;
    int ret;

    if (!q)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    if (im->n_files > 1)
        return msg_err(-EINVAL, "%s: a qcow2 image is one file", im->name);
    ret = qcow2_read(im, 0, header, util_min(im->files[0].size, sizeof(header)), "the header");
    if (!ret && (im->files[0].size < QCOW2_HEADER_V2 || util_be32(header) != QCOW2_MAGIC))
        ret = msg_err(-EINVAL, "%s: is not a qcow2 image", im->name);
    if (!ret)
        ret = qcow2_read_header(im, q, header);
    if (ret)
        return ret;
    q->l2_bits = q->cluster_bits - (q->subclusters ? 4 : 3);
    len = util_min(1u << q->cluster_bits, im->files[0].size);
    cluster = calloc(1, 1u << q->cluster_bits);
    if (!cluster)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = file_pread(&im->files[0], cluster, len, 0, &done);
    if (!ret)
        ret = qcow2_extensions(im, q, cluster, len);
    if (!ret)
        ret = qcow2_read_backing_name(im, q, cluster, len);
    if (!ret && snapshot)
        ret = qcow2_use_snapshot(im, q, header, snapshot);
    if (!ret)
        ret = qcow2_check_l1(im, q);
    if (!ret)
        ret = qcow2_open_data_file(im, q);
    free(cluster);
    im->size = q->size;
    if (!ret && (q->incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT)))
        msg_say(MSG_NOTE, "%s: is marked %s; reading it is safe", im->name,
                q->incompatible & QCOW2_CORRUPT ? "corrupt" : "dirty (not closed properly)");
    return ret;
}

static void qcow2_close(struct image *im)
{
    free(im->state);
}

static int qcow2_bad_extent(struct extent *ext, uint64_t length, const char *why)
{
    *ext = (struct extent){ .kind = EXT_BAD, .length = length, .why = why };
    return 0;
}

/* Unallocated: what the backing file has, or zeros if there is none. */
static enum extent_kind qcow2_hole(const struct image *im)
{
    return *im->backing_name ? EXT_BACKING : EXT_ZERO;
}

/*
 * Describes `length` bytes from `offset` of the cluster whose L2 entry is given; they are in one cluster (or
 * subcluster).
 */
static void qcow2_map_plain(const struct qcow2 *q, uint64_t entry, enum extent_kind kind, uint64_t in_cluster,
                            uint64_t length, struct extent *ext)
{
    uint64_t host = entry & QCOW2_OFFSET;

    *ext = (struct extent){ .kind = kind, .length = length, .file = q->data, .offset = host + in_cluster };
    if (host % (1u << q->cluster_bits))
        qcow2_bad_extent(ext, length, "its L2 entry is not aligned");
    else if (entry & 0x3f000000000001feu)
        qcow2_bad_extent(ext, length, "its L2 entry has reserved bits set");
    else if (kind == EXT_DATA && ext->offset >= q->data->size)
        qcow2_bad_extent(ext, length, "its cluster lies past the end of the file");
    else if (kind == EXT_DATA)
        ext->length = util_min(length, q->data->size - ext->offset);
}

static void qcow2_map_compressed(const struct qcow2 *q, uint64_t entry, uint64_t in_cluster, uint64_t length,
                                 struct extent *ext)
{
    uint32_t offset_bits = 62 - (q->cluster_bits - 8);
    uint64_t host = entry & ((1ull << offset_bits) - 1);
    uint64_t sectors = (entry & (QCOW2_COMPRESSED - 1)) >> offset_bits;

    if (q->incompatible & QCOW2_DATA_FILE) {
        qcow2_bad_extent(ext, length, "a compressed cluster in an image with an external data file");
        return;
    }
    if (host >= q->data->size) {
        qcow2_bad_extent(ext, length, "its compressed cluster lies past the end of the file");
        return;
    }
    *ext = (struct extent){
        .kind = EXT_COMPRESSED, .length = length, .file = q->data, .offset = host, .codec = q->codec,
        .coded_length = (uint32_t)((sectors + 1) * 512 - host % 512), .decoded_length = 1u << q->cluster_bits,
        .skip = (uint32_t)in_cluster,
    };
}

/* In an external data file offset 0 is a place like any other; COPIED tells it from none. */
static bool qcow2_allocated(const struct qcow2 *q, uint64_t entry)
{
    return (entry & QCOW2_OFFSET) || ((q->incompatible & QCOW2_DATA_FILE) && (entry & QCOW2_COPIED));
}

/* One subcluster: bits 0..31 of the bitmap say allocated, 32..63 reads as zeros. */
static void qcow2_map_subcluster(const struct image *im, const struct qcow2 *q, uint64_t entry,
                                 uint64_t bitmap, uint64_t in_cluster, uint64_t length, struct extent *ext)
{
    uint32_t sub_bits = q->cluster_bits - 5, i = (uint32_t)(in_cluster >> sub_bits);
    uint64_t state = (bitmap >> i & 1) | (bitmap >> (32 + i) & 1) << 1;
    uint64_t end;

    while (i < QCOW2_SUBCLUSTERS && ((bitmap >> i & 1) | (bitmap >> (32 + i) & 1) << 1) == state)
        i++;
    end = (uint64_t)i << sub_bits;
    length = util_min(length, end - in_cluster);
    if (state == 3)
        qcow2_bad_extent(ext, length, "a subcluster is both allocated and zero");
    else if (state == 1 && !qcow2_allocated(q, entry))
        qcow2_bad_extent(ext, length, "a subcluster is allocated in no cluster");
    else
        qcow2_map_plain(q, entry,
                        state == 1   ? EXT_DATA
                        : state == 2 ? EXT_ZERO
                                     : qcow2_hole(im),
                        in_cluster, length, ext);
}

/* What one L2 entry says about `length` bytes from in_cluster on, all in its cluster. */
static void qcow2_map_entry(const struct image *im, const struct qcow2 *q, uint64_t entry, uint64_t bitmap,
                            uint64_t in_cluster, uint64_t length, struct extent *ext)
{
    bool allocated = qcow2_allocated(q, entry);

    if (entry & QCOW2_COMPRESSED)
        qcow2_map_compressed(q, entry, in_cluster, length, ext);
    else if (q->subclusters && (entry & 1))
        qcow2_bad_extent(ext, length, "its L2 entry has reserved bits set");
    else if (q->subclusters)
        qcow2_map_subcluster(im, q, entry, bitmap, in_cluster, length, ext);
    else if ((entry & 1) && q->v2)
        qcow2_bad_extent(ext, length, "a zero cluster in a version 2 image");
    else
        qcow2_map_plain(q, entry & ~1ull,
                        entry & 1   ? EXT_ZERO
                        : allocated ? EXT_DATA
                                    : qcow2_hole(im),
                        in_cluster, length, ext);
}

/* Does b carry a on, so that both are one extent? */
static bool qcow2_continues(const struct extent *a, const struct extent *b)
{
    return a->kind == b->kind && (a->kind == EXT_ZERO || a->kind == EXT_BACKING ||
                                  (a->kind == EXT_DATA && a->offset + a->length == b->offset));
}

static int qcow2_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    const struct qcow2 *q = im->state;
    uint64_t cluster = 1u << q->cluster_bits, l1, l2, entry, bitmap = 0, index, in_cluster, here, left;
    uint64_t table_left = (1ull << (q->cluster_bits + q->l2_bits)) -
                          (offset & ((1ull << (q->cluster_bits + q->l2_bits)) - 1));
    struct extent next;
    unsigned n = 0;

    (void)exact;
    length = util_min(length, table_left);
    l1 = q->l1_offset + (offset >> (q->cluster_bits + q->l2_bits)) * 8;
    if (cache_be64(&im->files[0], l1, &entry))
        return qcow2_bad_extent(ext, length, "the L1 table cannot be read");
    l2 = entry & QCOW2_OFFSET;
    if (entry & 0x7f000000000001ffu || l2 % cluster)
        return qcow2_bad_extent(ext, length, "its L1 entry is damaged");
    if (!l2) {
        *ext = (struct extent){ .kind = qcow2_hole(im), .length = length };
        return 0;
    }
    if (l2 >= im->files[0].size || cluster > im->files[0].size - l2)
        return qcow2_bad_extent(ext, length, "its L2 table lies past the end of the file");
    for (left = length, ext->length = 0; left && n++ < QCOW2_LOOK_AHEAD;
         left -= next.length, offset += next.length) {
        index = offset >> q->cluster_bits & ((1ull << q->l2_bits) - 1);
        in_cluster = offset & (cluster - 1);
        here = util_min(left, cluster - in_cluster);
        if (cache_be64(&im->files[0], l2 + index * q->entry_size, &entry) ||
            (q->subclusters && cache_be64(&im->files[0], l2 + index * q->entry_size + 8, &bitmap)))
            qcow2_bad_extent(&next, here, "its L2 table cannot be read");
        else
            qcow2_map_entry(im, q, entry, bitmap, in_cluster, here, &next);
        if (ext->length == 0)
            *ext = next;
        else if (qcow2_continues(ext, &next))
            ext->length += next.length;
        else
            break;
        if (next.length < here && next.kind == EXT_DATA)
            break;                  /* cut by the end of the file */
    }
    return 0;
}

static const struct image_format qcow2_format = {
    .name = "qcow2",
    .describe = "QEMU images: backing chains, zlib and zstd, snapshots, subclusters, external data",
    .writes = "-",
    .probe = qcow2_probe,
    .open = qcow2_open,
    .map = qcow2_map,
    .close = qcow2_close,
};

/* ******************************************************************************************************** *
 * 0. VHD
 *
 * Microsoft "Virtual Hard Disk Image Format Specification" 1.0, for reading. All numbers are big-endian.
 *
 *   fixed      data | footer
 *   others     copy of the footer | dynamic header | block table | (bitmap | data) per block ... | footer
 *
 * A bit of a block's bitmap says whether its sector is in this image. Where it is not, a differencing image has it
 * from the parent; in a dynamic image the sector was never written, and is zeros. (QEMU takes no notice of the
 * bitmap of dynamic images, but writes it all set, as everybody does who does not track sectors.)
 *
 * The footer at the end counts; where it is lost or damaged, its copy at the front. The size is the footer's
 * "current size", except that Virtual PC, Virtual Server and old versions of QEMU count by the geometry; so do we
 * for them, unless the geometry is at its maximum, or larger than what is there.
 * ******************************************************************************************************** */

enum {
    VHD_SECTOR = 512,
    VHD_FOOTER = 512,               /* 511 before Virtual PC 2004: the last, reserved byte is not there */
    VHD_OFF_VERSION = 12,
    VHD_OFF_HEADER = 16,
    VHD_OFF_CREATOR = 28,
    VHD_OFF_SIZE = 48,
    VHD_OFF_GEOMETRY = 56,          /* cylinders: 2 bytes, heads, sectors per track */
    VHD_OFF_TYPE = 60,
    VHD_OFF_CHECKSUM = 64,
    VHD_OFF_ID = 68,
    VHD_FIXED = 2, VHD_DYNAMIC = 3, VHD_DIFFERENCING = 4,
    VHD_HEADER = 1024,              /* the dynamic header */
    VHD_HEAD_TABLE = 16,
    VHD_HEAD_VERSION = 24,
    VHD_HEAD_ENTRIES = 28,
    VHD_HEAD_BLOCK = 32,
    VHD_HEAD_CHECKSUM = 36,
    VHD_HEAD_PARENT_ID = 40,
    VHD_HEAD_PARENT_NAME = 64,      /* 512 bytes of UTF-16BE */
    VHD_HEAD_LOCATORS = 576,        /* 8 of them: code, space, length, reserved: 4 bytes each; offset: 8 */
    VHD_LOCATOR_MAX = 4096,
    VHD_LOOK_AHEAD = 128,           /* blocks looked at for one extent */
};
#define VHD_NO_BLOCK 0xffffffffu
#define VHD_MAX_GEOMETRY (65535ull * 16 * 255 * VHD_SECTOR)

struct vhd {
    uint32_t type, block_bits, bitmap_size, entries;
    uint64_t table, header;
    uint64_t end;                   /* of what can be data: the footer, or the file's end where that is lost */
    char creator[5];
    bool by_geometry;
};

static int vhd_bad(const struct image *im, const char *what, uint64_t value)
{
    return msg_err(-EINVAL, "%s: damaged or hostile VHD: %s (0x%" PRIx64 ")", im->name, what, value);
}

/* The one's complement of the sum of all bytes but the checksum's own. */
static uint32_t vhd_checksum(const uint8_t *bytes, size_t len, size_t own)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < len; i++)
        sum += i >= own && i < own + 4 ? 0 : bytes[i];
    return ~sum;
}

static bool vhd_is_footer(const uint8_t *bytes)
{
    return memcmp(bytes, "conectix", 8) == 0;
}

/* 511 bytes suffice. */
static bool vhd_footer_is_good(const uint8_t *footer)
{
    return vhd_is_footer(footer) &&
           util_be32(footer + VHD_OFF_CHECKSUM) == vhd_checksum(footer, VHD_FOOTER - 1, VHD_OFF_CHECKSUM);
}

/*
 * Certain: a footer of a fixed disk behind just as much data as it says. That beats whatever the guest may have
 * written at the start of its disk.
 */
static int vhd_probe(const struct probe *p)
{
    const uint8_t *tail = p->tail + p->tail_len;

    for (size_t len = VHD_FOOTER; len >= VHD_FOOTER - 1 && len <= p->tail_len; len--)
        if (vhd_is_footer(tail - len))
            return vhd_footer_is_good(tail - len) && util_be32(tail - len + VHD_OFF_TYPE) == VHD_FIXED &&
                           util_be64(tail - len + VHD_OFF_SIZE) == p->size - len
                       ? 100 : 90;
    return p->head_len >= VHD_FOOTER - 1 && vhd_is_footer(p->head) ? 100 : 0;
}

/* Reads the footer (511 or 512 bytes) at the end. False: none is there, or it is damaged; *seen says which. */
static bool vhd_read_end(struct image *im, struct vhd *v, uint8_t *footer, bool *seen)
{
    struct file *f = &im->files[0];
    uint64_t done;

    for (uint64_t len = VHD_FOOTER; len >= VHD_FOOTER - 1 && len <= f->size; len--) {
        memset(footer, 0, VHD_FOOTER);
        if (file_pread(f, footer, len, f->size - len, &done) || !vhd_is_footer(footer))
            continue;
        *seen = true;
        v->end = f->size - len;
        if (vhd_footer_is_good(footer))
            return true;
    }
    v->end = f->size;
    return false;
}

/* The copy at the front; fixed disks have none. */
static bool vhd_read_front(struct image *im, uint8_t *footer, bool *seen)
{
    uint64_t done;

    if (im->files[0].size < VHD_FOOTER || file_pread(&im->files[0], footer, VHD_FOOTER, 0, &done))
        return false;
    *seen |= vhd_is_footer(footer);
    return vhd_footer_is_good(footer) && util_be32(footer + VHD_OFF_TYPE) != VHD_FIXED;
}

static int vhd_read_footer(struct image *im, struct vhd *v, uint8_t *footer)
{
    uint8_t front[VHD_FOOTER] = { 0 };
    bool seen = false, good_end = vhd_read_end(im, v, footer, &seen),
         good_front = vhd_read_front(im, front, &seen);

    if (!seen)
        return msg_err(-EINVAL, "%s: is not a VHD image", im->name);
    if (!good_end && !good_front)
        return msg_err(-EINVAL, "%s: damaged VHD: no footer of it has a good checksum; --format raw shows its bytes",
                       im->name);
    /* Behind a dynamic disk that has lost its end, the guest's own data may look like a footer. */
    if (good_end && good_front && util_be32(footer + VHD_OFF_TYPE) == VHD_FIXED) {
        good_end = util_be64(footer + VHD_OFF_SIZE) == v->end;
        msg_say(MSG_NOTE, "%s: has the footer of a fixed disk at its end and one of another kind at its front; %s",
                im->name, good_end ? "the first counts, since the size is right" : "the latter counts");
    } else if (!good_end) {
        msg_say(MSG_NOTE, "%s: the footer at its end is lost or damaged; its copy at the front is used", im->name);
    }
    if (!good_end) {
        memcpy(footer, front, VHD_FOOTER);
        v->end = im->files[0].size;
    }
    return 0;
}

static int vhd_check_footer(struct image *im, struct vhd *v, const uint8_t *footer)
{
    uint32_t version = util_be32(footer + VHD_OFF_VERSION);

    v->type = util_be32(footer + VHD_OFF_TYPE);
    if (version >> 16 != 1)
        return msg_err(-EOPNOTSUPP, "%s: VHD of unknown version 0x%08x", im->name, version);
    if (v->type < VHD_FIXED || v->type > VHD_DIFFERENCING)
        return vhd_bad(im, "the kind of disk", v->type);
    memcpy(im->id, footer + VHD_OFF_ID, sizeof(im->id));
    memcpy(v->creator, footer + VHD_OFF_CREATOR, 4);
    return 0;
}

/* reach: what the blocks, or the file, can hold. */
static int vhd_set_size(struct image *im, struct vhd *v, const uint8_t *footer, uint64_t reach)
{
    static const char *const counts_by_geometry[] = { "vpc ", "vs  ", "qemu" };
    const uint8_t *g = footer + VHD_OFF_GEOMETRY;
    uint64_t current = util_be64(footer + VHD_OFF_SIZE);
    uint64_t geometry = (uint64_t)util_be16(g) * g[2] * g[3] * VHD_SECTOR;

    for (size_t i = 0; i < ARRAY_LEN(counts_by_geometry); i++)
        v->by_geometry |= memcmp(v->creator, counts_by_geometry[i], 4) == 0;
    v->by_geometry = v->by_geometry && geometry && geometry < VHD_MAX_GEOMETRY && geometry <= reach;
    if (current > (uint64_t)MAX_IMAGE_SIZE)
        return vhd_bad(im, "the size", current);
    im->size = v->by_geometry ? geometry : current;
    return 0;
}

static int vhd_check_header(struct image *im, struct vhd *v, const uint8_t *h)
{
    uint32_t block = util_be32(h + VHD_HEAD_BLOCK), checksum = util_be32(h + VHD_HEAD_CHECKSUM);
    uint64_t bits, size = im->files[0].size;

    if (memcmp(h, "cxsparse", 8) != 0)
        return vhd_bad(im, "the place of the dynamic header", v->header);
    if (util_be32(h + VHD_HEAD_VERSION) >> 16 != 1)
        return vhd_bad(im, "the version of the dynamic header", util_be32(h + VHD_HEAD_VERSION));
    if (block < VHD_SECTOR || block & (block - 1))
        return vhd_bad(im, "the block size", block);
    v->table = util_be64(h + VHD_HEAD_TABLE);
    v->entries = util_be32(h + VHD_HEAD_ENTRIES);
    if (v->table % VHD_SECTOR || v->table > size)
        return vhd_bad(im, "the place of the block table", v->table);
    if ((uint64_t)v->entries * 4 > size - v->table)
        return vhd_bad(im, "more table entries than the file holds", v->entries);
    if (checksum != vhd_checksum(h, VHD_HEADER, VHD_HEAD_CHECKSUM))
        return vhd_bad(im, "the checksum of the dynamic header", checksum);
    v->block_bits = (uint32_t)__builtin_ctz(block);
    bits = block / VHD_SECTOR;
    v->bitmap_size = (uint32_t)((bits / 8 + VHD_SECTOR - 1) / VHD_SECTOR * VHD_SECTOR);
    if (bits < 8)
        v->bitmap_size = VHD_SECTOR;
    im->cluster_size = block;
    return 0;
}

/* One parent locator, if it is a path in UTF-16 (W2ru: relative to the child, W2ku: absolute). */
static bool vhd_read_locator(struct image *im, const uint8_t *locator)
{
    uint8_t path[VHD_LOCATOR_MAX];
    struct file *f = &im->files[0];
    uint32_t len = util_be32(locator + 8);
    uint64_t at = util_be64(locator + 16), done;

    return len <= sizeof(path) && at <= f->size && len <= f->size - at && !file_pread(f, path, len, at, &done) &&
           util_utf16_basename(path, len, false, im->backing_name, sizeof(im->backing_name));
}

/* The parent is looked for beside the child, so of its path only the last component matters. */
static int vhd_read_parent(struct image *im, const uint8_t *h)
{
    static const char *const codes[] = { "W2ru", "W2ku" };
    bool found = false;

    for (size_t kind = 0; kind < ARRAY_LEN(codes); kind++)
        for (size_t i = 0; i < 8 && !found; i++)
            found = memcmp(h + VHD_HEAD_LOCATORS + 24 * i, codes[kind], 4) == 0 &&
                    vhd_read_locator(im, h + VHD_HEAD_LOCATORS + 24 * i);
    if (!found)
        found = util_utf16_basename(h + VHD_HEAD_PARENT_NAME, 512, true, im->backing_name,
                                    sizeof(im->backing_name));
    if (!found && !im->opt->no_backing && (im->depth || !im->opt->backing))
        return msg_err(-EINVAL, "%s: does not name its parent; --backing FILE does", im->name);
    if (!found)
        util_copy(im->backing_name, sizeof(im->backing_name), "parent");
    util_copy(im->backing_format, sizeof(im->backing_format), "vpc");
    memcpy(im->parent_id, h + VHD_HEAD_PARENT_ID, sizeof(im->parent_id));
    im->has_parent_id = true;
    return 0;
}

static int vhd_open_dynamic(struct image *im, struct vhd *v, const uint8_t *footer)
{
    uint8_t header[VHD_HEADER];
    struct file *f = &im->files[0];
    uint64_t reach, done;
    int ret;

    v->header = util_be64(footer + VHD_OFF_HEADER);
    if (f->size < VHD_HEADER || v->header > f->size - VHD_HEADER)
        return vhd_bad(im, "the place of the dynamic header", v->header);
    ret = file_pread(f, header, VHD_HEADER, v->header, &done);
    if (!ret)
        ret = vhd_check_header(im, v, header);
    if (ret)
        return ret;
    reach = (uint64_t)v->entries << v->block_bits;
    ret = vhd_set_size(im, v, footer, reach);
    if (!ret && im->size > reach)
        ret = vhd_bad(im, "too few table entries for its size", v->entries);
    return ret || v->type == VHD_DYNAMIC ? ret : vhd_read_parent(im, header);
}

static int vhd_open(struct image *im)
{
    struct vhd *v = im->state = util_fault("vhd") ? NULL : calloc(1, sizeof(*v));
    uint8_t footer[VHD_FOOTER] = { 0 };
    int ret;

    if (!v)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    if (im->n_files > 1)
        return msg_err(-EINVAL, "%s: a VHD image is one file", im->name);
    ret = vhd_read_footer(im, v, footer);
    if (!ret)
        ret = vhd_check_footer(im, v, footer);
    if (ret)
        return ret;
    ret = v->type == VHD_FIXED ? vhd_set_size(im, v, footer, v->end) : vhd_open_dynamic(im, v, footer);
    if (!ret && v->by_geometry && im->size != util_be64(footer + VHD_OFF_SIZE))
        msg_say(MSG_NOTE, "%s: made by a program that counts by the geometry, so %" PRIu64 " bytes and not %" PRIu64,
                im->name, (uint64_t)im->size, util_be64(footer + VHD_OFF_SIZE));
    return ret;
}

static void vhd_close(struct image *im)
{
    free(im->state);
}

static int vhd_bad_extent(struct extent *ext, uint64_t length, const char *why)
{
    *ext = (struct extent){ .kind = EXT_BAD, .length = length, .why = why };
    return 0;
}

static int vhd_hole(const struct image *im, struct extent *ext, uint64_t length)
{
    *ext = (struct extent){ .kind = *im->backing_name ? EXT_BACKING : EXT_ZERO, .length = length };
    return 0;
}

/* Appends to ext what follows it, if both are one extent; the first is always taken. */
static bool vhd_append(struct extent *ext, const struct extent *next)
{
    if (ext->length == 0) {
        *ext = *next;
        return true;
    }
    if (ext->kind != next->kind || !(ext->kind == EXT_ZERO || ext->kind == EXT_BACKING ||
                                     (ext->kind == EXT_DATA && ext->offset + ext->length == next->offset)))
        return false;
    ext->length += next->length;
    return true;
}

static bool vhd_overlaps(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

/* length bytes from in_block on of the block that lies at `start` with its bitmap. */
static int vhd_map_block(struct image *im, const struct vhd *v, uint64_t start, uint64_t in_block, uint64_t length,
                         struct extent *ext)
{
    uint64_t all = v->bitmap_size + (1ull << v->block_bits), sectors, data = start + v->bitmap_size + in_block;
    bool here;

    if (vhd_overlaps(start, all, 0, VHD_FOOTER) || vhd_overlaps(start, all, v->header, VHD_HEADER) ||
        vhd_overlaps(start, all, v->table, (uint64_t)v->entries * 4))
        return vhd_bad_extent(ext, length, "its block lies in the image's own tables");
    if (start >= v->end || v->bitmap_size > v->end - start)
        return vhd_bad_extent(ext, length, "its block lies past the end of the file");
    sectors = (in_block + length - 1) / VHD_SECTOR - in_block / VHD_SECTOR + 1;
    if (cache_bits(&im->files[0], start, in_block / VHD_SECTOR, sectors, true, &here, &sectors))
        return vhd_bad_extent(ext, length, "the bitmap of its block cannot be read");
    length = util_min(length, sectors * VHD_SECTOR - in_block % VHD_SECTOR);
    if (!here)
        return vhd_hole(im, ext, length);
    if (data >= v->end)
        return vhd_bad_extent(ext, length, "its block lies past the end of the file");
    *ext = (struct extent){ .kind = EXT_DATA, .length = util_min(length, v->end - data), .file = &im->files[0],
                            .offset = data };
    return 0;
}

static int vhd_map_dynamic(struct image *im, uint64_t offset, uint64_t left, struct extent *ext)
{
    const struct vhd *v = im->state;
    uint64_t block = 1ull << v->block_bits, here;
    struct extent next;
    uint32_t entry;

    ext->length = 0;
    for (unsigned n = 0; left && n < VHD_LOOK_AHEAD; n++, left -= next.length, offset += next.length) {
        here = util_min(left, block - (offset & (block - 1)));
        if (cache_be32(&im->files[0], v->table + (offset >> v->block_bits) * 4, &entry))
            vhd_bad_extent(&next, here, "the block table cannot be read");
        else if (entry == VHD_NO_BLOCK)
            vhd_hole(im, &next, here);
        else
            vhd_map_block(im, v, (uint64_t)entry * VHD_SECTOR, offset & (block - 1), here, &next);
        if (!vhd_append(ext, &next))
            break;
    }
    return 0;
}

static int vhd_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    const struct vhd *v = im->state;
    bool data = true;

    if (v->type != VHD_FIXED)
        return vhd_map_dynamic(im, offset, length, ext);
    if (offset >= v->end)
        return vhd_bad_extent(ext, length, "past the end of the file");
    *ext = (struct extent){ .kind = EXT_DATA, .length = util_min(length, v->end - offset), .file = &im->files[0],
                            .offset = offset };
    if (exact)
        file_seek_extent(ext->file, offset, ext->length, &data, &ext->length);
    ext->kind = data ? EXT_DATA : EXT_ZERO;
    return 0;
}

static void vhd_info(struct image *im, struct out *out)
{
    static const char *const kinds[] = { "fixed", "dynamic", "differencing" };
    const struct vhd *v = im->state;
    char id[2 * sizeof(im->id) + 1];

    util_hex(im->id, sizeof(im->id), id);
    out_text(out, "subformat", kinds[v->type - VHD_FIXED]);
    out_text(out, "creator", v->creator);
    out_text(out, "size-by", v->by_geometry ? "geometry" : "current size");
    out_text(out, "id", id);
}

static const struct image_format vhd_format = {
    .name = "vpc",
    .describe = "VHD images of Virtual PC, Hyper-V, Azure: fixed, dynamic, differencing",
    .writes = "-",
    .probe = vhd_probe,
    .open = vhd_open,
    .map = vhd_map,
    .info = vhd_info,
    .close = vhd_close,
};

/* ******************************************************************************************************** *
 * 0. VHDX
 *
 * [MS-VHDX] "Virtual Hard Disk v2 File Format", for reading. All numbers are little-endian.
 *
 *   identifier | two headers | two region tables | (at 1 MiB:) log, metadata, block table (BAT), blocks, in any order
 *   BAT: the entries of a chunk (2^23 sectors), then one for the sector bitmap block of the chunk, and so on
 *
 * A log that is still to be replayed is replayed in memory: what it replaces becomes patches of the file, which every
 * reader sees from there on; the file itself stays as it is. So the log comes right after the headers, which alone
 * are never in it.
 * ******************************************************************************************************** */

enum {
    VHDX_MIB = 1 << 20,             /* everything behind the headers is aligned to it */
    VHDX_HEADER_AT = 64 << 10,      /* the second one lies 64 KiB further; likewise the region tables */
    VHDX_HEADER = 4096,
    VHDX_REGIONS_AT = 192 << 10,
    VHDX_TABLE = 64 << 10,          /* a region table, or the metadata table */
    VHDX_MAX_ENTRIES = 2047,        /* of either */
    VHDX_MIN_BLOCK = 1 << 20,
    VHDX_MAX_BLOCK = 256 << 20,
    VHDX_CHUNK_BITS = 23,           /* log2 of the sectors of a chunk */
    VHDX_LOG_PAGE = 4096,
    VHDX_LOG_HEADER = 64,
    VHDX_LOG_DESCRIPTOR = 32,
    VHDX_ENTRY_RESERVED = 0xffff8,
    VHDX_LOOK_AHEAD = 128,          /* blocks looked at for one extent */
    VHDX_MAX_LOCATOR = 64 << 10,
    VHDX_HAS_PARENT = 2,
    VHDX_META_USER = 1, VHDX_META_REQUIRED = 4,
};
#define VHDX_MAX_SIZE (64ull << 40)

/* States of payload blocks; a sector bitmap block is present (6) or not (0). */
enum { VHDX_ABSENT, VHDX_UNDEFINED, VHDX_ZERO, VHDX_UNMAPPED, VHDX_PRESENT = 6, VHDX_PARTIAL = 7 };

/* GUIDs as they lie in the file. */
static const uint8_t vhdx_guid_bat[] = { 0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42,
                                         0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08 };
static const uint8_t vhdx_guid_metadata[] = { 0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b,
                                              0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e };
static const uint8_t vhdx_guid_locator[] = { 0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a,
                                             0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13 };

enum vhdx_item { VHDX_PARAMETERS, VHDX_SIZE, VHDX_SECTOR, VHDX_PHYSICAL, VHDX_ID, VHDX_LOCATOR, VHDX_ITEMS };
static const struct {
    uint8_t guid[16];
    uint32_t length;                /* at least */
    bool needed;
    const char *what;
} vhdx_items[VHDX_ITEMS] = {
    { { 0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b }, 8, true,
      "the file parameters" },
    { { 0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8 }, 8, true,
      "the disk's size" },
    { { 0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f }, 4, true,
      "the sector size" },
    { { 0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56 }, 4, false,
      "the physical sector size" },
    { { 0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46 }, 16, false,
      "the disk's id" },
    { { 0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c }, 20, false,
      "the parent locator" },
};

struct vhdx_range {
    uint64_t offset, length;        /* length 0: there is none */
};

struct vhdx {
    uint32_t block_bits, sector_bits, chunk_bits;   /* chunk_bits: log2 of the blocks of a chunk */
    uint32_t version, log_version;
    uint8_t log_guid[16];
    struct vhdx_range log, metadata, bat, item[VHDX_ITEMS];
    bool has_parent;
};

static int vhdx_probe(const struct probe *p)
{
    return p->head_len >= 8 && memcmp(p->head, "vhdxfile", 8) == 0 ? 100 : 0;
}

static int vhdx_bad(const struct image *im, const char *what, uint64_t value)
{
    return msg_err(-EINVAL, "%s: damaged or hostile VHDX: %s (0x%" PRIx64 ")", im->name, what, value);
}

static uint32_t vhdx_guid_order(size_t i)
{
    static const uint8_t order[16] = { 3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15 };

    return order[i];
}

static int vhdx_unknown(const struct image *im, const char *what, const uint8_t *guid)
{
    uint8_t b[16];
    char hex[33];

    for (size_t i = 0; i < 16; i++)
        b[i] = guid[vhdx_guid_order(i)];
    util_hex(b, 16, hex);
    return msg_err(-EOPNOTSUPP, "%s: needs an unknown VHDX %s {%.8s-%.4s-%.4s-%.4s-%.12s}", im->name, what, hex,
                   hex + 8, hex + 12, hex + 16, hex + 20);
}

/* CRC-32C (Castagnoli), bit by bit reversed; begins with ~0 and is inverted at the end. */
static uint32_t vhdx_crc(uint32_t crc, const uint8_t *bytes, size_t len)
{
    static uint32_t table[256];     /* filled at open, by the only thread there is then */

    for (uint32_t i = 0; !table[255] && i < 256; i++) {
        uint32_t c = i;
        for (unsigned bit = 0; bit < 8; bit++)
            c = c >> 1 ^ (c & 1 ? 0x82f63b78 : 0);
        table[i] = c;
    }
    for (size_t i = 0; i < len; i++)
        crc = table[(crc ^ bytes[i]) & 0xff] ^ crc >> 8;
    return crc;
}

/* Signature, then the checksum of all with the checksum itself as zeros. */
static bool vhdx_is_good(const uint8_t *bytes, size_t len, const char *signature)
{
    static const uint8_t zeros[4];

    return memcmp(bytes, signature, 4) == 0 &&
           ~vhdx_crc(vhdx_crc(vhdx_crc(~0u, bytes, 4), zeros, 4), bytes + 8, len - 8) == util_le32(bytes + 4);
}

static bool vhdx_is_zero(const uint8_t *guid)
{
    static const uint8_t zero[16];

    return memcmp(guid, zero, 16) == 0;
}

/* Two headers: the good one with the higher sequence number is the current one. room: 64 KiB */
static int vhdx_read_headers(struct image *im, struct vhdx *v, uint8_t *room)
{
    struct file *f = &im->files[0];
    const uint8_t *h = NULL;
    uint64_t done;

    for (uint64_t i = 0; i < 2; i++) {
        uint8_t *candidate = room + i * VHDX_HEADER;
        uint64_t at = VHDX_HEADER_AT + i * VHDX_TABLE;
        if (at + VHDX_HEADER > f->size || file_pread(f, candidate, VHDX_HEADER, at, &done) ||
            !vhdx_is_good(candidate, VHDX_HEADER, "head"))
            continue;
        if (h && util_le64(candidate + 8) == util_le64(h + 8) && memcmp(candidate, h, VHDX_HEADER) != 0)
            return vhdx_bad(im, "two different headers with one sequence number", util_le64(h + 8));
        if (!h || util_le64(candidate + 8) > util_le64(h + 8))
            h = candidate;
    }
    if (!h)
        return file_pread(f, room, util_min(8, f->size), 0, &done) || memcmp(room, "vhdxfile", 8) != 0
                   ? msg_err(-EINVAL, "%s: is not a VHDX image", im->name)
                   : msg_err(-EINVAL, "%s: damaged VHDX: neither of its headers has a good checksum", im->name);
    v->log_version = util_le16(h + 64);
    v->version = util_le16(h + 66);
    if (v->version != 1)
        return msg_err(-EOPNOTSUPP, "%s: VHDX of unknown version %u", im->name, v->version);
    memcpy(im->id, h + 32, sizeof(im->id));             /* changes with the data: what children remember */
    memcpy(v->log_guid, h + 48, sizeof(v->log_guid));
    v->log = (struct vhdx_range){ .offset = util_le64(h + 72), .length = util_le32(h + 68) };
    im->dirty = !vhdx_is_zero(v->log_guid);
    return 0;
}

/* -- the log -- */

/*
 * A ring of entries, each a header with descriptors and then pages of data, in units of 4 KiB. Entries with the
 * header's log GUID and consecutive sequence numbers form a sequence; a sequence is whole when its last entry's tail
 * lies in it. Of the whole ones that with the highest number counts, from its tail on.
 */
struct vhdx_log {
    struct image *im;
    const uint8_t *guid;
    uint64_t offset, length;
    uint64_t budget;                /* bytes that may still be read: garbage must not keep us for ever */
};

struct vhdx_entry {
    uint64_t sequence, flushed, last, at, length, tail;
    uint32_t checksum, descriptors;
};

static int vhdx_log_bad(const struct image *im, const char *what)
{
    return msg_err(-EINVAL, "%s: was not closed properly, and its log cannot be replayed: %s; --ignore-log reads what "
                   "is there without it", im->name, what);
}

/* at: may be past the end of the ring */
static bool vhdx_log_read(struct vhdx_log *log, uint64_t at, uint8_t page[VHDX_LOG_PAGE])
{
    uint64_t done;

    if (log->budget < VHDX_LOG_PAGE)
        return false;
    log->budget -= VHDX_LOG_PAGE;
    return file_pread(&log->im->files[0], page, VHDX_LOG_PAGE, log->offset + at % log->length, &done) == 0;
}

static bool vhdx_entry_header(struct vhdx_log *log, uint64_t at, struct vhdx_entry *e)
{
    uint8_t page[VHDX_LOG_PAGE];

    if (!vhdx_log_read(log, at, page) || memcmp(page, "loge", 4) != 0 || memcmp(page + 32, log->guid, 16) != 0)
        return false;
    *e = (struct vhdx_entry){
        .at = at % log->length, .checksum = util_le32(page + 4), .length = util_le32(page + 8),
        .tail = util_le32(page + 12), .sequence = util_le64(page + 16), .descriptors = util_le32(page + 24),
        .flushed = util_le64(page + 48), .last = util_le64(page + 56),
    };
    return e->length && e->length <= log->length && e->length % VHDX_LOG_PAGE == 0 && e->tail < log->length &&
           e->tail % VHDX_LOG_PAGE == 0 && e->sequence &&
           VHDX_LOG_HEADER + (uint64_t)e->descriptors * VHDX_LOG_DESCRIPTOR <= e->length;
}

static bool vhdx_entry_sum(struct vhdx_log *log, const struct vhdx_entry *e)
{
    uint8_t page[VHDX_LOG_PAGE];
    uint32_t crc = ~0u;

    for (uint64_t done = 0; done < e->length; done += VHDX_LOG_PAGE) {
        if (!vhdx_log_read(log, e->at + done, page))
            return false;
        if (done == 0)
            memset(page + 4, 0, 4);
        crc = vhdx_crc(crc, page, VHDX_LOG_PAGE);
    }
    return ~crc == e->checksum;
}

static int vhdx_apply_zeros(struct file *f, uint64_t offset, uint64_t length)
{
    int ret = 0;

    for (; length && !ret; offset += VHDX_LOG_PAGE, length -= VHDX_LOG_PAGE)
        ret = file_patch(f, offset, NULL);
    return ret;
}

/*
 * The page of data that belongs to a descriptor. Its own first and last bytes, which the sequence number replaced,
 * are in the descriptor. -EINVAL: it is not of this entry.
 */
static int vhdx_data_page(struct vhdx_log *log, const struct vhdx_entry *e, uint64_t at, const uint8_t *descriptor,
                          uint8_t page[VHDX_LOG_PAGE])
{
    if (at + VHDX_LOG_PAGE > e->length || !vhdx_log_read(log, e->at + at, page) || memcmp(page, "data", 4) != 0 ||
        util_le32(page + 4) != e->sequence >> 32 || util_le32(page + VHDX_LOG_PAGE - 4) != (uint32_t)e->sequence)
        return -EINVAL;
    memcpy(page, descriptor + 8, 8);
    memcpy(page + VHDX_LOG_PAGE - 4, descriptor + 4, 4);
    return 0;
}

/* Goes through the descriptors of an entry, to check them or to apply them. -EINVAL: the entry is not valid. */
static int vhdx_entry_walk(struct vhdx_log *log, const struct vhdx_entry *e, bool apply)
{
    uint8_t page[VHDX_LOG_PAGE], data[VHDX_LOG_PAGE];
    uint64_t at = VHDX_LOG_HEADER, end = at + (uint64_t)e->descriptors * VHDX_LOG_DESCRIPTOR, offset, length;
    uint64_t data_at = (end + VHDX_LOG_PAGE - 1) / VHDX_LOG_PAGE * VHDX_LOG_PAGE;
    struct file *f = &log->im->files[0];
    int ret = 0;

    for (bool first = true; at < end && !ret; at += VHDX_LOG_DESCRIPTOR, first = false) {
        const uint8_t *d = page + at % VHDX_LOG_PAGE;
        if ((first || at % VHDX_LOG_PAGE == 0) && !vhdx_log_read(log, e->at + at / VHDX_LOG_PAGE * VHDX_LOG_PAGE, page))
            return -EINVAL;
        offset = util_le64(d + 16);
        length = util_le64(d + 8);
        if (util_le64(d + 24) != e->sequence || offset % VHDX_LOG_PAGE || offset > (uint64_t)MAX_IMAGE_SIZE / 2)
            return -EINVAL;
        if (memcmp(d, "zero", 4) == 0) {
            if (length % VHDX_LOG_PAGE || length > (uint64_t)MAX_IMAGE_SIZE / 2)
                return -EINVAL;
            ret = apply ? vhdx_apply_zeros(f, offset, length) : 0;
        } else if (memcmp(d, "desc", 4) == 0) {
            ret = vhdx_data_page(log, e, data_at, d, data);
            data_at += VHDX_LOG_PAGE;
            if (!ret && apply)
                ret = file_patch(f, offset, data);
        } else {
            return -EINVAL;
        }
    }
    return ret;
}

static bool vhdx_entry_valid(struct vhdx_log *log, uint64_t at, struct vhdx_entry *e)
{
    return vhdx_entry_header(log, at, e) && vhdx_entry_sum(log, e) && vhdx_entry_walk(log, e, false) == 0;
}

/* The length of the run of consecutive entries from start on; 0: none. *last is its last one. */
static uint64_t vhdx_log_run(struct vhdx_log *log, uint64_t start, struct vhdx_entry *last)
{
    struct vhdx_entry e;
    uint64_t length = 0;

    while (length < log->length && vhdx_entry_valid(log, start + length, &e) &&
           (!length || e.sequence == last->sequence + 1) && e.length <= log->length - length) {
        *last = e;
        length += e.length;
    }
    return length;
}

/* Is the tail of the run's last entry one of its entries? */
static bool vhdx_log_is_whole(struct vhdx_log *log, uint64_t start, uint64_t length, uint64_t tail)
{
    struct vhdx_entry e;

    for (uint64_t at = 0; at < length; at += e.length) {
        if ((start + at) % log->length == tail)
            return true;
        if (!vhdx_entry_header(log, start + at, &e))
            return false;
    }
    return false;
}

/* The last entry of the active sequence. False: there is none. */
static bool vhdx_log_find(struct vhdx_log *log, struct vhdx_entry *head)
{
    struct vhdx_entry last = { 0 };
    bool found = false;
    uint64_t run;

    /* No whole sequence begins inside of a run: it would end where the run does, with the same tail. */
    for (uint64_t start = 0; start < log->length; start += run ? run : VHDX_LOG_PAGE) {
        run = vhdx_log_run(log, start, &last);
        if (run && (!found || last.sequence > head->sequence) &&
            vhdx_log_is_whole(log, start, run, last.tail)) {
            *head = last;
            found = true;
        }
    }
    return found;
}

/* Applies the entries from the tail of `head` up to itself. */
static int vhdx_log_apply(struct vhdx_log *log, const struct vhdx_entry *head)
{
    struct file *f = &log->im->files[0];
    uint64_t flushed = 0, last = 0, total = 0;
    struct vhdx_entry e = { .at = UINT64_MAX };
    unsigned n = 0;
    int ret = 0;

    log->budget = 4 * log->length + (1 << 20);      /* also what ends this, should the file change underneath */
    for (; !ret && e.at != head->at; total += e.length, n++) {
        ret = vhdx_entry_header(log, head->tail + total, &e) ? vhdx_entry_walk(log, &e, true) : -EINVAL;
        flushed = e.flushed > flushed ? e.flushed : flushed;
        last = e.last > last ? e.last : last;
    }
    if (ret == -ENOMEM)
        return msg_err(ret, "%s: out of memory", log->im->name);
    if (ret == -E2BIG || last > (uint64_t)MAX_IMAGE_SIZE)
        return vhdx_log_bad(log->im, "it changes more than is plausible");
    if (ret)
        return vhdx_log_bad(log->im, "it was changed meanwhile");
    msg_say(MSG_NOTE, "%s: was not closed properly: its log (%u entries, %u pages) is replayed in memory; the file is "
            "not changed", log->im->name, n, f->n_patches);
    if (flushed > f->size)
        msg_say(MSG_NOTE, "%s: is truncated: it was %" PRIu64 " bytes long, not %" PRIu64, log->im->name, flushed,
                f->size);
    else if (last > f->size)
        file_extend(f, last);       /* with zeros, as whoever replays the log on disk does */
    return 0;
}

static int vhdx_replay(struct image *im, const struct vhdx *v)
{
    struct file *f = &im->files[0];
    struct vhdx_log log = { .im = im, .guid = v->log_guid, .offset = v->log.offset, .length = v->log.length,
                            .budget = 8 * v->log.length + (64 << 20) };
    struct vhdx_entry head = { 0 };

    if (im->opt->ignore_log) {
        msg_say(MSG_NOTE, "%s: was not closed properly, and its log is ignored: what was changed last may be wrong",
                im->name);
        return 0;
    }
    if (v->log_version)
        return vhdx_log_bad(im, "it is of an unknown version");
    if (!log.length || log.length % VHDX_MIB || log.offset % VHDX_MIB || log.offset < VHDX_MIB ||
        log.offset > f->size || log.length > f->size - log.offset)
        return vhdx_log_bad(im, "it is not where it should be");
    if (!vhdx_log_find(&log, &head))
        return vhdx_log_bad(im, log.budget < VHDX_LOG_PAGE ? "too much garbage in it" : "no whole sequence in it");
    return vhdx_log_apply(&log, &head);
}

/* -- regions, metadata -- */

static bool vhdx_overlaps(const struct vhdx_range *r, uint64_t offset, uint64_t length)
{
    return offset < r->offset + r->length && r->offset < offset + length;
}

static int vhdx_check_regions(struct image *im, struct vhdx *v, const uint8_t *table)
{
    uint32_t n = util_le32(table + 8);

    if (n > VHDX_MAX_ENTRIES)
        return vhdx_bad(im, "the number of regions", n);
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *e = table + 16 + (size_t)32 * i;
        uint64_t offset = util_le64(e + 16), length = util_le32(e + 24);
        struct vhdx_range *r = memcmp(e, vhdx_guid_bat, 16) == 0        ? &v->bat
                               : memcmp(e, vhdx_guid_metadata, 16) == 0 ? &v->metadata
                                                                        : NULL;
        if (!r && util_le32(e + 28) & 1)
            return vhdx_unknown(im, "region", e);
        if (!r)
            continue;
        if (r->length)
            return vhdx_bad(im, "a region that is there twice", offset);
        if (!length || length % VHDX_MIB || offset % VHDX_MIB || offset < VHDX_MIB ||
            offset > (uint64_t)MAX_IMAGE_SIZE - length)
            return vhdx_bad(im, "the place of a region", length % VHDX_MIB || !length ? length : offset);
        *r = (struct vhdx_range){ offset, length };
    }
    if (!v->bat.length || !v->metadata.length)
        return vhdx_bad(im, v->bat.length ? "no metadata region" : "no block table", n);
    return vhdx_overlaps(&v->bat, v->metadata.offset, v->metadata.length)
               ? vhdx_bad(im, "regions that overlap", v->bat.offset) : 0;
}

static int vhdx_read_regions(struct image *im, struct vhdx *v, uint8_t *room)
{
    struct file *f = &im->files[0];
    uint64_t done;

    for (uint64_t i = 0; i < 2; i++) {
        uint64_t at = VHDX_REGIONS_AT + i * VHDX_TABLE;
        if (at + VHDX_TABLE <= f->size && file_pread(f, room, VHDX_TABLE, at, &done) == 0 &&
            vhdx_is_good(room, VHDX_TABLE, "regi"))
            return vhdx_check_regions(im, v, room);
    }
    return msg_err(-EINVAL, "%s: damaged VHDX: neither of its region tables has a good checksum", im->name);
}

static int vhdx_check_item(struct image *im, struct vhdx *v, const uint8_t *e)
{
    uint64_t offset = util_le32(e + 16), length = util_le32(e + 20);
    uint32_t bits = util_le32(e + 24);
    size_t i = 0;

    while (i < VHDX_ITEMS && (bits & VHDX_META_USER || memcmp(e, vhdx_items[i].guid, 16) != 0))
        i++;
    if (i == VHDX_ITEMS)
        return bits & VHDX_META_REQUIRED ? vhdx_unknown(im, "metadata item", e) : 0;
    if (offset < VHDX_TABLE || offset > v->metadata.length || length > v->metadata.length - offset)
        return vhdx_bad(im, "the place of a metadata item", offset);
    if (length < vhdx_items[i].length || v->item[i].length)
        return vhdx_bad(im, vhdx_items[i].what, length);
    v->item[i] = (struct vhdx_range){ v->metadata.offset + offset, length };
    return 0;
}

static int vhdx_read_metadata(struct image *im, struct vhdx *v, uint8_t *room)
{
    struct file *f = &im->files[0];
    uint64_t done;
    uint32_t n;
    int ret = 0;

    if (v->metadata.offset > f->size || f->size - v->metadata.offset < VHDX_TABLE)
        return vhdx_bad(im, "the metadata lies past the end of the file", v->metadata.offset);
    if (file_pread(f, room, VHDX_TABLE, v->metadata.offset, &done))
        return -EIO;
    n = util_le16(room + 10);
    if (memcmp(room, "metadata", 8) != 0 || n > VHDX_MAX_ENTRIES)
        return vhdx_bad(im, "the metadata table", n);
    for (uint32_t i = 0; i < n && !ret; i++)
        ret = vhdx_check_item(im, v, room + 32 + (size_t)32 * i);
    for (size_t i = 0; i < VHDX_ITEMS && !ret; i++)
        if (vhdx_items[i].needed && !v->item[i].length)
            ret = msg_err(-EINVAL, "%s: damaged VHDX: lacks %s", im->name, vhdx_items[i].what);
    return ret;
}

/* The first `len` bytes (at most) of an item; zeros where there is none. */
static int vhdx_read_item(struct image *im, const struct vhdx *v, enum vhdx_item item, uint8_t *bytes, uint64_t len)
{
    struct file *f = &im->files[0];
    uint64_t done, offset = v->item[item].offset;

    memset(bytes, 0, len);
    len = util_min(len, v->item[item].length);
    if (offset > f->size || len > f->size - offset)
        return vhdx_bad(im, "a metadata item lies past the end of the file", offset);
    return file_pread(f, bytes, len, offset, &done);
}

static int vhdx_check_sizes(struct image *im, struct vhdx *v, uint32_t block, uint64_t size, uint32_t sector,
                            uint32_t physical)
{
    if (block < VHDX_MIN_BLOCK || block > VHDX_MAX_BLOCK || block & (block - 1))
        return vhdx_bad(im, "the block size", block);
    if (sector != 512 && sector != 4096)
        return vhdx_bad(im, "the sector size", sector);
    if (physical && physical != 512 && physical != 4096)
        return vhdx_bad(im, "the physical sector size", physical);
    if (size > VHDX_MAX_SIZE || size % sector)
        return vhdx_bad(im, "the disk's size", size);
    v->block_bits = (uint32_t)__builtin_ctz(block);
    v->sector_bits = (uint32_t)__builtin_ctz(sector);
    v->chunk_bits = VHDX_CHUNK_BITS + v->sector_bits - v->block_bits;
    im->size = size;
    im->cluster_size = block;
    im->sector_size = sector;
    return 0;
}

/* The block table must be whole, and large enough for the size. */
static int vhdx_check_bat(struct image *im, const struct vhdx *v)
{
    uint64_t blocks = (im->size + (1ull << v->block_bits) - 1) >> v->block_bits, entries = 0;

    if (blocks && v->has_parent)
        entries = (((blocks - 1) >> v->chunk_bits) + 1) * ((1ull << v->chunk_bits) + 1);
    else if (blocks)
        entries = blocks + ((blocks - 1) >> v->chunk_bits);
    if (entries * 8 > v->bat.length)
        return vhdx_bad(im, "the block table is too small for the size", v->bat.length);
    if (v->bat.offset > im->files[0].size || entries * 8 > im->files[0].size - v->bat.offset)
        return vhdx_bad(im, "the block table lies past the end of the file", v->bat.offset);
    return 0;
}

static int vhdx_read_items(struct image *im, struct vhdx *v)
{
    uint8_t parameters[8], size[8], sector[4], physical[4];
    int ret = vhdx_read_item(im, v, VHDX_PARAMETERS, parameters, sizeof(parameters));

    if (!ret)
        ret = vhdx_read_item(im, v, VHDX_SIZE, size, sizeof(size));
    if (!ret)
        ret = vhdx_read_item(im, v, VHDX_SECTOR, sector, sizeof(sector));
    if (!ret)
        ret = vhdx_read_item(im, v, VHDX_PHYSICAL, physical, sizeof(physical));
    if (ret)
        return ret;
    if (v->item[VHDX_PHYSICAL].length && !util_le32(physical))
        return vhdx_bad(im, "the physical sector size", 0);
    v->has_parent = util_le32(parameters + 4) & VHDX_HAS_PARENT;
    ret = vhdx_check_sizes(im, v, util_le32(parameters), util_le64(size), util_le32(sector), util_le32(physical));
    return ret ? ret : vhdx_check_bat(im, v);
}

/* -- parents -- */

static bool vhdx_key_is(const uint8_t *key, size_t len, const char *name)
{
    size_t n = strlen(name);

    if (len != 2 * n)
        return false;
    for (size_t i = 0; i < n; i++)
        if (util_le16(key + 2 * i) != (unsigned char)name[i])
            return false;
    return true;
}

/* "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}" in UTF-16. */
static bool vhdx_parse_guid(const uint8_t *text, size_t len, uint8_t guid[16])
{
    char hex[33], pair[3] = "";
    size_t n = 0;

    for (size_t i = 0; i + 2 <= len; i += 2) {
        uint32_t c = util_le16(text + i);
        if (c == '{' || c == '}' || c == '-')
            continue;
        if (n == 32 || c > 0x7f || !isxdigit((int)c))
            return false;
        hex[n++] = (char)c;
    }
    for (size_t i = 0; i < 16 && n == 32; i++) {
        memcpy(pair, hex + 2 * i, 2);
        guid[vhdx_guid_order(i)] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return n == 32;
}

/* Key and value of entry i of the locator. False: they do not lie in it. */
static bool vhdx_locator_value(const uint8_t *locator, uint64_t len, const char *key, const uint8_t **value,
                               size_t *value_len)
{
    uint32_t n = util_le16(locator + 18);

    for (uint32_t i = 0; i < n && 20 + (uint64_t)12 * (i + 1) <= len; i++) {
        const uint8_t *e = locator + 20 + (size_t)12 * i;
        uint64_t key_at = util_le32(e), value_at = util_le32(e + 4);
        uint32_t key_len = util_le16(e + 8);
        *value_len = util_le16(e + 10);
        if (key_at + key_len > len || value_at + *value_len > len || !vhdx_key_is(locator + key_at, key_len, key))
            continue;
        *value = locator + value_at;
        return true;
    }
    return false;
}

static int vhdx_parse_locator(struct image *im, const uint8_t *locator, uint64_t len)
{
    static const char *const paths[] = { "relative_path", "volume_path", "absolute_win32_path" };
    const uint8_t *value;
    bool found = false;
    size_t n;

    if (memcmp(locator, vhdx_guid_locator, 16) != 0)
        return vhdx_unknown(im, "parent locator", locator);
    for (size_t i = 0; i < ARRAY_LEN(paths) && !found; i++)
        found = vhdx_locator_value(locator, len, paths[i], &value, &n) &&
                util_utf16_basename(value, n, false, im->backing_name, sizeof(im->backing_name));
    if (!found && !im->opt->no_backing && (im->depth || !im->opt->backing))
        return msg_err(-EINVAL, "%s: does not name its parent; --backing FILE does", im->name);
    if (!found)
        util_copy(im->backing_name, sizeof(im->backing_name), "parent");
    util_copy(im->backing_format, sizeof(im->backing_format), "vhdx");
    im->has_parent_id = vhdx_locator_value(locator, len, "parent_linkage", &value, &n) &&
                        vhdx_parse_guid(value, n, im->parent_id);
    im->has_other_parent_id = vhdx_locator_value(locator, len, "parent_linkage2", &value, &n) &&
                              vhdx_parse_guid(value, n, im->other_parent_id) && !vhdx_is_zero(im->other_parent_id);
    if (!im->has_parent_id && !im->opt->force_parent)
        return msg_err(-EINVAL, "%s: does not record its parent's identity; --force-parent takes any", im->name);
    return 0;
}

static int vhdx_read_parent(struct image *im, const struct vhdx *v, uint8_t *room)
{
    uint64_t len = v->item[VHDX_LOCATOR].length;
    int ret;

    if (!v->has_parent)
        return 0;
    if (!len || len > VHDX_MAX_LOCATOR)
        return vhdx_bad(im, "the length of the parent locator", len);
    ret = vhdx_read_item(im, v, VHDX_LOCATOR, room, len);
    return ret ? ret : vhdx_parse_locator(im, room, len);
}

static int vhdx_open(struct image *im)
{
    struct vhdx *v = im->state = util_fault("vhdx") ? NULL : calloc(1, sizeof(*v));
    uint8_t *room = v ? malloc(VHDX_TABLE) : NULL;
    int ret = 0;

    if (!room)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    if (im->n_files > 1)
        ret = msg_err(-EINVAL, "%s: a VHDX image is one file", im->name);
    if (!ret)
        ret = vhdx_read_headers(im, v, room);
    if (!ret && im->dirty)
        ret = vhdx_replay(im, v);
    if (!ret)
        ret = vhdx_read_regions(im, v, room);
    if (!ret)
        ret = vhdx_read_metadata(im, v, room);
    if (!ret)
        ret = vhdx_read_items(im, v);
    if (!ret)
        ret = vhdx_read_parent(im, v, room);
    free(room);
    return ret;
}

static void vhdx_close(struct image *im)
{
    free(im->state);
}

/* -- reading -- */

/* Where a block may not lie. NULL: there. */
static const char *vhdx_misplaced(const struct image *im, const struct vhdx *v, uint64_t offset, uint64_t length)
{
    if (offset < VHDX_MIB)
        return "its block lies in the header";
    if (offset >= im->files[0].size)
        return "its block lies past the end of the file";
    if (vhdx_overlaps(&v->bat, offset, length) || vhdx_overlaps(&v->metadata, offset, length) ||
        (v->log.offset <= im->files[0].size && vhdx_overlaps(&v->log, offset, length)))
        return "its block lies in the image's own tables";
    return NULL;
}

static void vhdx_map_data(struct image *im, const struct vhdx *v, uint64_t host, uint64_t in_block, uint64_t length,
                          struct extent *ext)
{
    struct file *f = &im->files[0];
    const char *why = vhdx_misplaced(im, v, host, 1ull << v->block_bits);

    if (!why && in_block >= f->size - host)
        why = "its block lies past the end of the file";
    if (why)
        vhd_bad_extent(ext, length, why);
    else
        *ext = (struct extent){ .kind = EXT_DATA, .length = util_min(length, f->size - host - in_block), .file = f,
                                .offset = host + in_block };
}

/* A block of which only those sectors are here whose bits in the chunk's sector bitmap are set. */
static void vhdx_map_partial(struct image *im, const struct vhdx *v, uint64_t block, uint64_t host, uint64_t in_block,
                             uint64_t length, struct extent *ext)
{
    uint64_t chunk = block >> v->chunk_bits, in_chunk = block & ((1ull << v->chunk_bits) - 1), bitmap, first, n;
    uint64_t index = (chunk + 1) * ((1ull << v->chunk_bits) + 1) - 1, sector = 1ull << v->sector_bits;
    const char *why;
    bool here;

    if (cache_le64(&im->files[0], v->bat.offset + index * 8, &bitmap)) {
        vhd_bad_extent(ext, length, "the block table cannot be read");
        return;
    }
    why = vhdx_misplaced(im, v, bitmap & -(uint64_t)VHDX_MIB, VHDX_MIB);
    if ((bitmap & (VHDX_MIB - 1)) != VHDX_PRESENT)
        why = "its sector bitmap is not there";
    else if (!why && im->files[0].size - (bitmap & -(uint64_t)VHDX_MIB) < VHDX_MIB)
        why = "its sector bitmap lies past the end of the file";
    first = (in_chunk << (v->block_bits - v->sector_bits)) + (in_block >> v->sector_bits);
    n = ((in_block + length - 1) >> v->sector_bits) - (in_block >> v->sector_bits) + 1;
    if (!why && cache_bits(&im->files[0], bitmap & -(uint64_t)VHDX_MIB, first, n, false, &here, &n))
        why = "its sector bitmap cannot be read";
    if (why) {
        vhd_bad_extent(ext, length, why);
        return;
    }
    length = util_min(length, n * sector - (in_block & (sector - 1)));
    if (here)
        vhdx_map_data(im, v, host, in_block, length, ext);
    else
        *ext = (struct extent){ .kind = EXT_BACKING, .length = length };
}

/*
 * Blocks whose contents are "undefined" or "unmapped" may read as anything but the parent's data: zeros, as with
 * everyone else.
 */
static void vhdx_map_entry(struct image *im, const struct vhdx *v, uint64_t block, uint64_t entry, uint64_t in_block,
                           uint64_t length, struct extent *ext)
{
    uint32_t state = entry & 7;
    uint64_t host = entry & -(uint64_t)VHDX_MIB;

    *ext = (struct extent){ .kind = EXT_ZERO, .length = length };
    if (entry & VHDX_ENTRY_RESERVED)
        vhd_bad_extent(ext, length, "its block table entry has reserved bits set");
    else if (state == VHDX_ABSENT && v->has_parent)
        ext->kind = EXT_BACKING;
    else if (state <= VHDX_UNMAPPED)
        ;
    else if (state == VHDX_PRESENT)
        vhdx_map_data(im, v, host, in_block, length, ext);
    else if (state == VHDX_PARTIAL && v->has_parent)
        vhdx_map_partial(im, v, block, host, in_block, length, ext);
    else
        vhd_bad_extent(ext, length, "its block is in a state that cannot be");
}

static int vhdx_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    const struct vhdx *v = im->state;
    uint64_t size = 1ull << v->block_bits, left = length, block, here, entry;
    struct extent next;

    (void)exact;
    ext->length = 0;
    for (unsigned n = 0; left && n < VHDX_LOOK_AHEAD; n++, left -= next.length, offset += next.length) {
        block = offset >> v->block_bits;
        here = util_min(left, size - (offset & (size - 1)));
        if (cache_le64(&im->files[0], v->bat.offset + (block + (block >> v->chunk_bits)) * 8, &entry))
            vhd_bad_extent(&next, here, "the block table cannot be read");
        else
            vhdx_map_entry(im, v, block, entry, offset & (size - 1), here, &next);
        if (!vhd_append(ext, &next))
            break;
    }
    return 0;
}

static void vhdx_info(struct image *im, struct out *out)
{
    const struct vhdx *v = im->state;
    char id[2 * sizeof(im->id) + 1];

    util_hex(im->id, sizeof(im->id), id);
    out_text(out, "subformat", v->has_parent ? "differencing" : "fixed or dynamic");
    out_number(out, "sector-size", 1u << v->sector_bits);
    out_text(out, "data-write-id", id);
    if (im->dirty)
        out_number(out, "replayed-pages", im->files[0].n_patches);
}

static const struct image_format vhdx_format = {
    .name = "vhdx",
    .describe = "VHDX images of Hyper-V: fixed, dynamic, differencing; the log is replayed in memory",
    .writes = "-",
    .probe = vhdx_probe,
    .open = vhdx_open,
    .map = vhdx_map,
    .info = vhdx_info,
    .close = vhdx_close,
};

/* ******************************************************************************************************** *
 * 10. Image core
 *
 * The only user of the drivers. Finds the format, walks extents, and knows nothing of FUSE or partitions.
 * ******************************************************************************************************** */

/*
 * In the order of who wins when two are equally certain. VHD comes before what is told by its head: a guest writes
 * the head of its fixed disk, but not the footer behind it.
 */
static const struct image_format *const img_formats[] = { &raw_format, &vhd_format, &vhdx_format, &qcow2_format };

enum { IMG_PROBE_HEAD = 4096, IMG_PROBE_TAIL = 512 };

/*
 * Containers that are not read (yet). Shown as raw they would look like a broken disk, so they are refused
 * by name.
 */
static const struct {
    const char *name;
    uint16_t offset;
    uint8_t length;
    bool tail;                      /* offset counts from the start of the last 512 bytes */
    const char *magic;
} img_foreign[] = {
    { "a qcow image (version 1)", 0, 4, false, "QFI\xfb" },
    { "a QED image", 0, 4, false, "QED\0" },
    { "a VMDK image", 0, 4, false, "KDMV" },
    { "a VMDK image (COWD)", 0, 4, false, "COWD" },
    { "a VMDK image (seSparse)", 0, 8, false, "\xbe\xba\xfe\xca\0\0\0\0" },
    { "a VMDK descriptor", 0, 21, false, "# Disk DescriptorFile" },
    { "a VDI image", 64, 4, false, "\x7f\x10\xda\xbe" },
    { "a Parallels image", 0, 16, false, "WithoutFreeSpace" },
    { "a Parallels image", 0, 16, false, "WithouFreSpacExt" },
    { "an EWF (E01) image", 0, 8, false, "EVF\t\r\n\xff\0" },
    { "an EWF logical (L01) image", 0, 8, false, "LVF\t\r\n\xff\0" },
    { "an EWF2 (Ex01) image", 0, 8, false, "EVF2\r\n\x81\0" },
    { "an EWF2 logical (Lx01) image", 0, 8, false, "LEF2\r\n\x81\0" },
    { "an AFF image", 0, 5, false, "AFF10" },
    { "an AD1 image", 0, 15, false, "ADSEGMENTEDFILE" },
    { "a Bochs image", 0, 22, false, "Bochs Virtual HD Image" },
    { "a cloop image", 0, 16, false, "#!/bin/sh\n#V2.0 " },
    { "an Apple sparse image", 0, 4, false, "sprs" },
    { "an Apple ASIF image", 0, 4, false, "shdw" },
    { "an Apple disk image (UDIF)", 0, 4, true, "koly" },
    { "a gzip-compressed file", 0, 3, false, "\x1f\x8b\x08" },
    { "an xz-compressed file", 0, 6, false, "\xfd" "7zXZ\0" },
    { "a zstd-compressed file", 0, 4, false, "\x28\xb5\x2f\xfd" },
    { "a 7z archive", 0, 6, false, "7z\xbc\xaf\x27\x1c" },
    { "a zip archive (AFF4 is one)", 0, 4, false, "PK\x03\x04" },
};

static const char *img_find_foreign(const struct probe *p)
{
    for (size_t i = 0; i < ARRAY_LEN(img_foreign); i++) {
        const uint8_t *bytes = img_foreign[i].tail ? p->tail : p->head;
        size_t len = img_foreign[i].tail ? p->tail_len : p->head_len;
        if ((size_t)img_foreign[i].offset + img_foreign[i].length <= len &&
            memcmp(bytes + img_foreign[i].offset, img_foreign[i].magic, img_foreign[i].length) == 0)
            return img_foreign[i].name;
    }
    return NULL;
}

static const struct image_format *img_format_named(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(img_formats); i++)
        if (strcmp(name, img_formats[i]->name) == 0)
            return img_formats[i];
    return NULL;
}

/* Sets im->format: the one named, or the most certain. Raw by default is said aloud: it is an assumption. */
static int img_probe(struct image *im, const char *wanted)
{
    uint8_t head[IMG_PROBE_HEAD], tail[IMG_PROBE_TAIL];
    struct file *first = &im->files[0], *last = &im->files[im->n_files - 1];
    struct probe p = { head, tail, util_min(first->size, sizeof(head)), util_min(last->size, sizeof(tail)),
                       first->size };
    const char *foreign;
    uint64_t done;
    int best = 0, score;

    if (wanted)
        im->format = img_format_named(wanted);
    if (wanted)
        return im->format ? 0 : msg_err(-EINVAL, "unknown format '%s' (see fuseexp --formats)", wanted);

    /* A head that cannot be read must not lead to a guess: on a dying disk it may have been any format. */
    if (file_pread(first, head, p.head_len, 0, &done) ||
        file_pread(last, tail, p.tail_len, last->size - p.tail_len, &done))
        return msg_err(-EIO, "%s: cannot tell the format of what cannot be read; --format names it",
                       im->name);
    for (size_t i = 0; i < ARRAY_LEN(img_formats); i++) {
        score = img_formats[i]->probe(&p);
        if (score > best) {
            best = score;
            im->format = img_formats[i];
        }
    }
    if (im->format != &raw_format)
        return 0;
    foreign = img_find_foreign(&p);
    if (foreign)
        return msg_err(-EMEDIUMTYPE,
                       "%s: is %s, which this version does not read; --format raw shows its bytes", im->name,
                       foreign);
    if (!first->is_blk)
        msg_say(MSG_NOTE, "%s: no known format, taken as raw (--format raw says so)", im->name);
    return 0;
}

static int img_add_file(struct image *im, const char *path)
{
    if (im->n_files == MAX_PARTS)
        return msg_err(-E2BIG, "%s: more than %d parts", im->name, MAX_PARTS);
    return file_open(&im->files[im->n_files++], path, im->writable);
}

/*
 * Opens the parts that follow the first one. A gap in the numbering is a lost part, not the end of the set.
 */
static int img_find_parts(struct image *im)
{
    enum { GAP = 64 };
    char name[PATH_MAX], missing[PATH_MAX] = "";
    int ret;

    if (im->n_given > 1 || im->files[0].is_blk || !im->format->part)
        return 0;
    for (unsigned i = 1, gap = 0; gap < GAP && im->format->part(im->name, i, name); i++) {
        if (access(name, F_OK) < 0) {
            if (gap++ == 0)
                util_copy(missing, sizeof(missing), name);
            continue;
        }
        if (gap)
            return msg_err(-ENOENT, "%s: missing, though %s is there", missing, util_basename(name));
        ret = img_add_file(im, name);
        if (ret)
            return ret;
        im->found_parts = true;
    }
    if (im->found_parts)
        msg_say(MSG_NOTE, "%s: first of %u parts, the last is %s (--no-parts takes the first alone)",
                im->name, im->n_files, util_basename(im->files[im->n_files - 1].path));
    return 0;
}

static void img_close_one(struct image *im)
{
    if (im->format && im->format->close)
        im->format->close(im);
    for (unsigned i = 0; i < im->n_files; i++)
        file_close(&im->files[i]);
    if (im->files)
        pthread_mutex_destroy(&im->size_lock);
    free(im->files);
    memset(im, 0, sizeof(*im));
}

static void img_close(struct image *im)
{
    struct image *next = im->backing;

    img_close_one(im);
    while ((im = next)) {
        next = im->backing;
        img_close_one(im);
        free(im);
    }
}

/* Holds files and a lock; the caller has set writable, growable, opt, depth and child. */
static int img_begin(struct image *im, const char *name)
{
    im->name = name;
    im->files = util_fault("file table") ? NULL : calloc(MAX_PARTS, sizeof(*im->files));
    if (!im->files)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    pthread_mutex_init(&im->size_lock, NULL);
    return 0;
}

/* Once the files are open: parts, locks, the driver. */
static int img_finish(struct image *im)
{
    unsigned locked = 0;
    int ret = 0;

    if (im->writable && !im->format->writable)
        return msg_err(-EROFS, "%s: %s images cannot be written by this version", im->name, im->format->name);
    if (im->opt->parts && im->depth == 0)
        ret = img_find_parts(im);
    /* Locked before it is read: the header that counts is the one that nobody changes any more. */
    for (; im->opt->lock && locked < im->n_files && !ret; locked++)
        ret = file_lock(&im->files[locked]);
    for (unsigned i = 0; i < im->n_files && !ret; i++)
        ret = file_measure(&im->files[i]);
    if (!ret)
        ret = im->format->open(im);
    for (; im->opt->lock && locked < im->n_files && !ret; locked++)
        ret = file_lock(&im->files[locked]);
    if (!ret && im->size == 0 && !im->growable && im->depth == 0)
        ret = msg_err(-EINVAL, "%s: is empty", im->name);
    return ret;
}

static int img_open_backing(struct image *im);

/*
 * An option that has no meaning for this image was meant for another one: better no disk than the wrong one.
 */
static int img_check_options(const struct image *im)
{
    const struct image_options *opt = im->opt;

    if ((opt->snapshot || opt->data_file) && im->format != &qcow2_format)
        return msg_err(-EINVAL, "%s: is %s, so --%s is of no use", im->name, im->format->name,
                       opt->snapshot ? "snapshot" : "data-file");
    if ((opt->backing || opt->backing_format) && !*im->backing_name)
        return msg_err(-EINVAL, "%s: has no backing file, so --backing is of no use", im->name);
    return 0;
}

/* Leaves im half-built on failure: img_close() is due all the same. Set before: writable, growable. */
static int img_open(struct image *im, char *const *paths, unsigned n_paths, const struct image_options *opt)
{
    int ret;

    im->opt = opt;
    im->n_given = n_paths;
    ret = img_begin(im, paths[0]);
    for (unsigned i = 0; i < n_paths && !ret; i++)
        ret = img_add_file(im, paths[i]);
    if (!ret)
        ret = img_probe(im, opt->format);
    if (!ret)
        ret = img_finish(im);
    if (!ret)
        ret = img_check_options(im);
    return ret ? ret : img_open_backing(im);
}

/* Names that are no plain file name of this host, or could be meant as something else. */
static bool img_is_url(const char *name)
{
    size_t n = strcspn(name, ":/");

    return name[n] == ':' && n > 1;
}

/* Is `path` (absolute, resolved) below the folder that the user allowed? */
static bool img_is_allowed(const struct image_options *opt, const char *path)
{
    char folder[PATH_MAX];
    size_t len;

    if (!opt->allow_external || !realpath(opt->allow_external, folder))
        return false;
    len = strlen(folder);
    return strncmp(folder, path, len) == 0 && (path[len] == '/' || len == 1);
}

/*
 * Opens into f what the image calls `name`. The image does not choose freely: beside it, or below it, or
 * where the user allowed it. `what` and `option` are for the message.
 */
static int img_open_named(struct image *im, struct file *f, const char *name, const char *what,
                          const char *option)
{
    char folder[PATH_MAX], shown[PATH_MAX + 1024], real[PATH_MAX], *slash;
    int ret;

    if (img_is_url(name))
        return msg_err(-EPERM, "%s: its %s '%s' is not a plain file name; %s FILE names one", im->name, what,
                       name, option);
    if (!util_copy(folder, sizeof(folder), im->files[0].path))
        return msg_err(-ENAMETOOLONG, "%s: path too long", im->name);
    slash = strrchr(folder, '/');
    snprintf(shown, sizeof(shown), "%.*s%s", name[0] == '/' || !slash ? 0 : (int)(slash - folder + 1), folder,
             name);
    if (slash)
        slash[slash == folder] = 0;
    if (realpath(shown, real) && img_is_allowed(im->opt, real))
        return file_open(f, real, false);
    f->fd = -1;
    if (name[0] == '/' || im->files[0].is_blk)
        return msg_err(-EPERM,
                       "%s: its %s is '%s', outside of its folder; %s FILE or --allow-external DIR allows it",
                       im->name, what, name, option);
    ret = file_open_beneath(f, slash ? folder : ".", name, shown);
    if (ret == -EXDEV || ret == -ELOOP)
        return msg_err(ret,
                       "%s: its %s '%s' leads out of its folder; %s FILE or --allow-external DIR allows it",
                       im->name, what, name, option);
    if (ret)
        msg_err(ret, "%s: cannot open its %s '%s': %s; %s FILE names another", im->name, what, name,
                strerror(-ret), option);
    return ret;
}

/* A chain that bites its tail would be endless. */
static int img_check_loop(const struct image *im)
{
    if (im->depth >= MAX_CHAIN)
        return msg_err(-ELOOP, "%s: a backing chain of more than %d images", im->name, MAX_CHAIN);
    for (const struct image *c = im->child; c; c = c->child)
        if (c->files[0].st.st_dev == im->files[0].st.st_dev &&
            c->files[0].st.st_ino == im->files[0].st.st_ino)
            return msg_err(-ELOOP, "%s: is its own backing file", im->name);
    return 0;
}

/* A differencing disk over another parent than its own would be a wrong disk that looks right. */
static int img_check_identity(const struct image *im, const struct image *base)
{
    char want[2 * sizeof(im->id) + 1], got[2 * sizeof(im->id) + 1];

    if (!im->has_parent_id || memcmp(im->parent_id, base->id, sizeof(im->id)) == 0 ||
        (im->has_other_parent_id && memcmp(im->other_parent_id, base->id, sizeof(im->id)) == 0))
        return 0;
    util_hex(im->parent_id, sizeof(im->id), want);
    util_hex(base->id, sizeof(im->id), got);
    if (!im->opt->force_parent)
        return msg_err(-EINVAL, "%s: is not the parent of %s, or was changed since: its identity is %s instead of "
                       "%s; --force-parent takes it all the same", base->name, im->name, got, want);
    msg_say(MSG_NOTE, "%s: taken for the parent of %s, whose identity is %s instead of %s", base->name, im->name,
            got, want);
    return 0;
}

/*
 * The format of a backing file is never guessed: a guest that writes a header into its raw disk would choose
 * files.
 */
static int img_open_one_backing(struct image *im, struct image *base, const char *user_file)
{
    bool user = im->opt->backing_format && (!*im->backing_format || (im->depth == 0 && user_file));
    const char *format = user ? im->opt->backing_format : im->backing_format;
    int ret = img_begin(base, im->backing_name);

    if (ret)
        return ret;
    base->n_files = 1;
    base->files[0].fd = -1;
    if (!*format)
        return msg_err(-EINVAL,
                       "%s: does not say which format its backing file '%s' has; --backing-format NAME does",
                       im->name, im->backing_name);
    base->format = img_format_named(format);
    if (!base->format)
        return msg_err(-EMEDIUMTYPE,
                       "%s: its backing file '%s' is of format %s, which this version does not read",
                       im->name, im->backing_name, format);
    ret = user_file ? file_open(&base->files[0], user_file, false)
                    : img_open_named(im, &base->files[0], im->backing_name, "backing file", "--backing");
    if (ret)
        return ret;
    base->name = base->files[0].path;
    ret = img_check_loop(base);
    if (!ret)
        ret = img_finish(base);
    return ret ? ret : img_check_identity(im, base);
}

static int img_open_backing(struct image *im)
{
    const char *user_file;
    struct image *base;
    int ret = 0;

    for (; !ret && *im->backing_name; im = base) {
        if (im->opt->no_backing) {
            msg_say(MSG_NOTE, "%s: without its backing file '%s', whose data reads as errors", im->name,
                    im->backing_name);
            return 0;
        }
        user_file = im->depth == 0 ? im->opt->backing : NULL;
        im->backing = base = util_fault("backing image") ? NULL : calloc(1, sizeof(*base));
        if (!base)
            return msg_err(-ENOMEM, "%s: out of memory", im->name);
        base->opt = im->opt;
        base->depth = im->depth + 1;
        base->child = im;
        ret = img_open_one_backing(im, base, user_file);
    }
    return ret;
}

/*
 * As image_format.map, but for any offset and through the whole chain: never EXT_BACKING. What lies past the
 * end of the image is bad, not zero; past the end of a backing file that is shorter than its child it is
 * zero.
 */
static int img_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    uint64_t size;
    int ret;

    for (;; im = im->backing, length = ext->length) {
        size = im->size;
        if (offset >= size) {
            *ext = (struct extent){ .kind = im->depth ? EXT_ZERO : EXT_BAD, .length = length,
                                    .why = "past the end of the image" };
            return 0;
        }
        ret = im->format->map(im, offset, util_min(length, size - offset), exact, ext);
        if (ret || ext->kind != EXT_BACKING)
            return ret;
        if (!im->backing) {
            ext->kind = EXT_BAD;
            ext->why = "in the backing file, which was not opened";
            return 0;
        }
    }
}

/* Fills buf or fails; *done bytes at its front are good either way. */
static int img_read(struct image *im, void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    struct extent ext;
    uint64_t n, part;
    int ret = 0;

    for (*done = 0; *done < len && !ret; *done += part) {
        ret = img_map(im, offset + *done, len - *done, false, &ext);
        if (ret)
            break;
        n = util_min(ext.length, len - *done);
        part = 0;
        if (ext.kind == EXT_DATA) {
            ret = file_pread(ext.file, (uint8_t *)buf + *done, n, ext.offset, &part);
        } else if (ext.kind == EXT_ZERO) {
            memset((uint8_t *)buf + *done, 0, n);
            part = n;
        } else if (ext.kind == EXT_COMPRESSED) {
            ret = cache_read_decoded(&ext, (uint8_t *)buf + *done, n);
            part = ret ? 0 : n;
        } else {
            ret = msg_serving(-EIO, "%s: cannot read %" PRIu64 " bytes at %" PRIu64 ": %s", im->name, n,
                              offset + *done, ext.why);
        }
    }
    return ret;
}

static int img_note_failure(struct image *im, int ret)
{
    if (ret)
        im->failed = true;
    return ret;
}

static int img_resize_locked(struct image *im, uint64_t size)
{
    int ret;

    if (size == im->size)
        return 0;
    if (size > (uint64_t)MAX_IMAGE_SIZE)
        return -EFBIG;
    ret = im->format->resize ? im->format->resize(im, size) : -EOPNOTSUPP;
    if (!ret)
        im->size = size;
    else if (ret != -EOPNOTSUPP)
        msg_serving(ret, "%s: cannot change its size to %" PRIu64 ": %s", im->name, size, strerror(-ret));
    return ret == -EIO ? img_note_failure(im, ret) : ret;
}

/* Sets the size; with grow_only it never shrinks: another writer may have gone further. */
static int img_resize(struct image *im, uint64_t size, bool grow_only)
{
    int ret = 0;

    pthread_mutex_lock(&im->size_lock);
    if (!grow_only || size > im->size)
        ret = img_resize_locked(im, size);
    pthread_mutex_unlock(&im->size_lock);
    return ret;
}

/* Walks the extents of a range that is to be changed. buf NULL: zero it, with fallocate(2)'s mode. */
static int img_change(struct image *im, const void *buf, int mode, uint64_t len, uint64_t offset,
                      uint64_t *done)
{
    struct extent ext;
    uint64_t n, part;
    int ret = 0;

    for (*done = 0; *done < len && !ret; *done += part) {
        ret = img_map(im, offset + *done, len - *done, false, &ext);
        if (ret)
            break;
        n = util_min(ext.length, len - *done);
        part = 0;
        if (ext.kind != EXT_DATA) {
            ret = -EIO;
        } else if (buf) {
            ret = file_pwrite(ext.file, (const uint8_t *)buf + *done, n, ext.offset, &part);
        } else {
            ret = file_fallocate(ext.file, mode, ext.offset, n);
            if (ret == -EOPNOTSUPP && (mode & FALLOC_FL_ZERO_RANGE))
                ret = file_write_zeros(ext.file, ext.offset, n);
            part = ret ? 0 : n;
        }
    }
    /* What was only to be given back or set aside is not lost when that is refused. */
    return buf || ret == -EIO ? img_note_failure(im, ret) : ret;
}

/* With `grow` the image is made longer first where need be. *done bytes were written even on failure. */
static int img_write(struct image *im, const void *buf, uint64_t len, uint64_t offset, bool grow,
                     uint64_t *done)
{
    int ret;

    *done = 0;
    if (grow && offset + len > im->size) {
        ret = img_resize(im, offset + len, true);
        if (ret)
            return ret;
    }
    return img_change(im, buf, 0, len, offset, done);
}

static int img_sync(struct image *im)
{
    int ret = 0, r;

    for (unsigned i = 0; im->writable && i < im->n_files; i++) {
        r = file_sync(&im->files[i]);
        if (!ret)
            ret = r;
    }
    return img_note_failure(im, ret);
}

/* Passed-through writes grow the file behind our back. */
static void img_refresh_size(struct image *im)
{
    struct stat st;

    pthread_mutex_lock(&im->size_lock);
    if (fstat(im->files[0].fd, &st) == 0)
        im->size = (uint64_t)st.st_size;
    pthread_mutex_unlock(&im->size_lock);
}

/*
 * What the kernel would not tell anyone: a file that passthrough serves was made shorter or longer
 * underneath.
 */
static bool img_resized_underneath(struct image *im)
{
    struct stat st;

    return !im->writable && im->n_files == 1 && !im->files[0].is_blk && fstat(im->files[0].fd, &st) == 0 &&
           (uint64_t)st.st_size != im->size;
}

/* Host space that the chain takes, in units of 512 bytes. */
static uint64_t img_blocks(const struct image *im)
{
    uint64_t blocks = 0;
    struct stat st;

    for (; im; im = im->backing)
        for (unsigned i = 0; i < im->n_files; i++) {
            if (im->files[i].is_blk)
                blocks += (im->files[i].size + 511) / 512;
            else if (fstat(im->files[i].fd, &st) == 0)
                blocks += (uint64_t)st.st_blocks;
        }
    return blocks;
}

/* ******************************************************************************************************** *
 * 11. Partitions
 *
 * MBR with extended partitions and GPT, in a window [base, base + size) of an image. Everything read here is
 * hostile: LBAs are checked against overflow, tables against MAX_GPT_ENTRIES, chains against MAX_LOGICAL and
 * against turning back. Which table counts is decided as Linux does, except that a GPT is believed without
 * its protective MBR when there is no other table at all: on a disk whose first sectors were overwritten the
 * copy at the end is what is left.
 * ******************************************************************************************************** */

static const char part_no_table[] = "no partition table (MBR or GPT)";

struct part_scan {
    struct image *im;
    uint64_t base, size;
    uint32_t sector;                /* 512 or 4096 */
    struct view *views;
    unsigned n_views;               /* in use; MAX_VIEWS there are */
};

static int part_read(const struct part_scan *ps, uint64_t lba, void *buf, uint64_t len)
{
    uint64_t done;

    if (lba >= ps->size / ps->sector || len > ps->size - lba * ps->sector)
        return -EINVAL;
    return img_read(ps->im, buf, len, ps->base + lba * ps->sector, &done);
}

static void part_add(struct part_scan *ps, unsigned number, uint64_t first_lba, uint64_t n_lba)
{
    uint64_t most = (uint64_t)MAX_IMAGE_SIZE / ps->sector;
    struct view *v = &ps->views[ps->n_views];

    if (first_lba > most || n_lba > most ||
        (first_lba + n_lba) * ps->sector > (uint64_t)MAX_IMAGE_SIZE - ps->base ||
        first_lba >= ps->size / ps->sector) {
        msg_say(MSG_NOTE, "%s: partition %u starts past the end of the disk, left out", ps->im->name, number);
        return;
    }
    if (ps->n_views == MAX_VIEWS) {
        msg_say(MSG_NOTE, "%s: partition %u is one too many, left out", ps->im->name, number);
        return;
    }
    if ((first_lba + n_lba) * ps->sector > ps->size)
        msg_say(MSG_NOTE,
                "%s: partition %u reaches %" PRIu64 " bytes past the end of the disk: those read as errors",
                ps->im->name, number, (first_lba + n_lba) * ps->sector - ps->size);
    snprintf(v->name, sizeof(v->name), "p%u", number);
    v->number = (int)number;
    v->start = ps->base + first_lba * ps->sector;
    v->size = n_lba * ps->sector;
    v->inside = util_min(v->size, ps->size - first_lba * ps->sector);
    ps->n_views++;
}

struct mbr_entry {
    uint8_t status, type;
    bool used, extended;
    uint64_t start, count;          /* sectors; in an EBR, start is relative */
};

static struct mbr_entry part_mbr_entry(const uint8_t *sector, size_t i)
{
    const uint8_t *raw = sector + MBR_OFF_ENTRIES + i * MBR_ENTRY_SIZE;
    struct mbr_entry e = { .status = raw[MBR_ENT_STATUS],
                           .type = raw[MBR_ENT_TYPE],
                           .start = util_le32(raw + MBR_ENT_FIRST_LBA),
                           .count = util_le32(raw + MBR_ENT_SECTORS) };

    e.used = e.type && e.count;
    e.extended = e.used && (e.type == MBR_TYPE_EXTENDED || e.type == MBR_TYPE_EXTENDED_LBA ||
                            e.type == MBR_TYPE_EXTENDED_LINUX);
    return e;
}

/*
 * Logical partitions: a chain of EBRs, each with one partition (relative to itself) and a link (relative to
 * first).
 */
static void part_scan_extended(struct part_scan *ps, uint64_t first, uint64_t n_lba, unsigned *number)
{
    uint64_t ebr = first, next, last = 0;
    uint8_t sector[512];

    for (unsigned loops = 0;; loops++) {
        if (loops == MAX_LOGICAL || (loops && ebr <= last) || part_read(ps, ebr, sector, sizeof(sector)) ||
            util_le16(sector + MBR_OFF_MAGIC) != 0xaa55) {
            msg_say(MSG_NOTE,
                    "%s: the chain of logical partitions is broken at sector %" PRIu64 ", after partition %u",
                    ps->im->name, ebr, *number - 1);
            return;
        }
        last = ebr;
        next = 0;
        for (size_t i = 0; i < 4; i++) {
            struct mbr_entry e = part_mbr_entry(sector, i);
            if (e.extended && !next)
                next = first + e.start;
            else if (e.used && !e.extended)
                part_add(ps, (*number)++, ebr + e.start, e.count);
        }
        if (!next)
            return;
        if (next - first >= n_lba)
            msg_say(MSG_NOTE, "%s: a logical partition lies outside its extended partition", ps->im->name);
        ebr = next;
    }
}

enum part_table { PART_NONE, PART_MBR, PART_PROTECTIVE };

/*
 * Is this sector an MBR, and whose? A boot sector ends in 55 AA as well, but has code where the entries
 * would be.
 */
static enum part_table part_probe_mbr(const uint8_t *sector)
{
    bool used = false, gpt = false;

    if (util_le16(sector + MBR_OFF_MAGIC) != 0xaa55)
        return PART_NONE;
    for (size_t i = 0; i < 4; i++) {
        struct mbr_entry e = part_mbr_entry(sector, i);
        if (e.status & 0x7f)
            return PART_NONE;
        used |= e.used;
        gpt |= e.type == MBR_TYPE_GPT;
    }
    return gpt ? PART_PROTECTIVE : used ? PART_MBR : PART_NONE;
}

static void part_scan_mbr(struct part_scan *ps, const uint8_t *sector)
{
    unsigned logical = 5;

    for (unsigned i = 0; i < 4; i++) {
        struct mbr_entry e = part_mbr_entry(sector, i);
        if (e.used && !e.extended)
            part_add(ps, i + 1, e.start, e.count);
    }
    for (unsigned i = 0; i < 4; i++) {
        struct mbr_entry e = part_mbr_entry(sector, i);
        if (e.extended)
            part_scan_extended(ps, e.start, e.count, &logical);
    }
}

/* Reads the GPT whose header is at lba. NULL when its partitions were added, else what is wrong with it. */
static const char *part_scan_gpt(struct part_scan *ps, uint64_t lba)
{
    uint8_t header[4096], *table;
    uint32_t size, n, entry, crc;
    const char *wrong = NULL;

    if (part_read(ps, lba, header, ps->sector))
        return "its header cannot be read";
    size = util_le32(header + GPT_OFF_HEADER_SIZE);
    n = util_le32(header + GPT_OFF_N_ENTRIES);
    entry = util_le32(header + GPT_OFF_ENTRY_SIZE);
    crc = util_le32(header + GPT_OFF_HEADER_CRC);
    if (memcmp(header, "EFI PART", 8) != 0)
        return "no signature";
    if (size < GPT_HEADER_MIN || size > ps->sector)
        return "its header's length is absurd";
    memset(header + GPT_OFF_HEADER_CRC, 0, 4);
    if (libdeflate_crc32(0, header, size) != crc)
        return "its header's checksum is wrong";
    if (util_le64(header + GPT_OFF_MY_LBA) != lba)
        return "its header belongs elsewhere";
    if (n > MAX_GPT_ENTRIES || entry < GPT_ENTRY_MIN || entry > GPT_ENTRY_MAX || entry % 8)
        return "its table's size is absurd";

    table = calloc(n ? n : 1, entry);
    if (!table)
        return "out of memory";
    if (part_read(ps, util_le64(header + GPT_OFF_ENTRIES_LBA), table, (uint64_t)n * entry))
        wrong = "its table cannot be read";
    else if (libdeflate_crc32(0, table, (size_t)n * entry) != util_le32(header + GPT_OFF_ENTRIES_CRC))
        wrong = "its table's checksum is wrong";
    for (uint32_t i = 0; i < n && !wrong; i++) {
        static const uint8_t unused[16];
        const uint8_t *e = table + (size_t)i * entry;
        uint64_t first = util_le64(e + GPT_ENT_FIRST_LBA), last = util_le64(e + GPT_ENT_LAST_LBA);
        if (memcmp(e, unused, sizeof(unused)) == 0)
            continue;
        if (last < first || last == UINT64_MAX)
            msg_say(MSG_NOTE, "%s: partition %u ends before it starts, left out", ps->im->name, i + 1);
        else
            part_add(ps, i + 1, first, last - first + 1);
    }
    free(table);
    return wrong;
}

/* Tries the primary and the backup GPT at one sector size. */
static const char *part_scan_gpts(struct part_scan *ps, uint32_t sector)
{
    const char *wrong, *backup;

    ps->sector = sector;
    if (ps->size / sector < 3)
        return "the disk is too small";
    wrong = part_scan_gpt(ps, 1);
    if (!wrong)
        return NULL;
    backup = part_scan_gpt(ps, ps->size / sector - 1);
    if (!backup)
        msg_say(MSG_NOTE, "%s: the primary GPT is damaged (%s), using the backup at the end of the disk",
                ps->im->name, wrong);
    return backup ? wrong : NULL;
}

/* Adds the partitions to ps->views. `sector` 0: try both sizes. NULL, or why there are none. */
static const char *part_scan_all(struct part_scan *ps, uint32_t sector)
{
    const char *wrong = part_no_table;
    enum part_table mbr = PART_NONE;
    uint8_t first[512];

    ps->sector = sector ? sector : 512;
    if (ps->size >= sizeof(first) && part_read(ps, 0, first, sizeof(first)) == 0)
        mbr = part_probe_mbr(first);
    if (mbr == PART_MBR) {
        part_scan_mbr(ps, first);
        return NULL;
    }
    if (sector != 4096 && !part_scan_gpts(ps, 512))
        return NULL;
    if (sector != 512 && !part_scan_gpts(ps, 4096))
        return NULL;
    if (mbr == PART_PROTECTIVE)
        wrong = part_scan_gpts(ps, sector ? sector : 512);
    return wrong ? wrong : part_no_table;
}

/* Which sector size the device itself has, or the disk in the image; 0: the table will show. */
static uint32_t part_device_sector(const struct image *im)
{
    int sector = 0;

    if (im->sector_size > 512)      /* one of 512 may also be a copy of one with larger sectors */
        return im->sector_size;
    if (!im->files[0].is_blk || util_ioctl(im->files[0].fd, BLKSSZGET, &sector) < 0)
        return 0;
    return sector == 512 || sector == 4096 ? (uint32_t)sector : 0;
}

/* "1, 2, 5": for the message that says what could have been chosen. */
static void part_list(const struct view *views, unsigned n, char *text, size_t len)
{
    size_t at = 0;

    text[0] = 0;
    for (unsigned i = 1; i < n && at < len; i++)
        at += (size_t)snprintf(text + at, len - at, "%s%d", i > 1 ? ", " : "", views[i].number);
}

/* Leaves the chosen partition as views[0] (and the only one). */
static int part_choose(struct image *im, struct view *views, unsigned *n, unsigned number, const char *wrong)
{
    char list[256];

    for (unsigned i = 1; i < *n; i++) {
        if (views[i].number != (int)number)
            continue;
        views[0].start = views[i].start;
        views[0].size = views[i].size;
        views[0].inside = views[i].inside;
        views[0].number = views[i].number;
        memcpy(views[0].name, views[i].name, sizeof(views[0].name));
        *n = 1;
        return 0;
    }
    if (wrong)
        return msg_err(-ENXIO, "%s: no partition %u: %s", im->name, number, wrong);
    part_list(views, *n, list, sizeof(list));
    return msg_err(-ENXIO, "%s: no partition %u (there %s %s)", im->name, number,
                   *n == 1 ? "is" : "are", *n == 1 ? "none" : list);
}

struct part_wanted {
    uint64_t offset, size;          /* the window; size 0: to the image's end */
    unsigned partition, sector;     /* 0: none, automatic */
    bool all;                       /* every partition becomes a view */
};

/* Fills views (MAX_VIEWS of them): the disk or the chosen partition first. */
static int part_make_views(struct image *im, const struct part_wanted *want, struct view *views, unsigned *n)
{
    struct part_scan ps = { .im = im, .base = want->offset, .views = views, .n_views = 1 };
    const char *wrong = NULL;

    if (want->offset > im->size || (want->offset == im->size && want->offset > 0))
        return msg_err(-EINVAL, "%s: --offset %" PRIu64 " is past the end (%" PRIu64 ")", im->name,
                       want->offset, (uint64_t)im->size);
    if (want->size > im->size - want->offset)
        return msg_err(-EINVAL,
                       "%s: --size %" PRIu64 " reaches past the end (%" PRIu64 " are left at the offset)",
                       im->name, want->size, im->size - want->offset);
    ps.size = want->size ? want->size : im->size - want->offset;
    util_copy(views[0].name, sizeof(views[0].name), "disk");
    views[0].start = want->offset;
    views[0].size = views[0].inside = ps.size;
    if (want->partition || want->all)
        wrong = part_scan_all(&ps, want->sector ? want->sector : part_device_sector(im));
    *n = ps.n_views;
    if (want->partition)
        return part_choose(im, views, n, want->partition, wrong);
    if (wrong)
        msg_say(wrong == part_no_table ? MSG_INFO : MSG_NOTE, "%s: only the disk is shown: %s%s", im->name,
                wrong == part_no_table ? "" : "the GPT is damaged: ", wrong);
    return 0;
}

/* ******************************************************************************************************** *
 * 12. FUSE operations
 *
 * fop_handle() turns one request into one reply inside the worker's buffer; it does no FUSE I/O, so any
 * transport can carry it. Node 1 is the mountpoint: the file itself, or the directory, whose files are the
 * nodes from 2 on. Requests come from the kernel, but every length is checked all the same.
 * ******************************************************************************************************** */

/* What is served: set up before the workers start, then only the atomics change. */
struct server {
    struct image *im;
    struct view *views;
    unsigned n_views;
    bool is_dir, writable, growable, resizable, direct_io, keep_cache, allow_other, debug;
    int backing_id;                 /* > 0: views[0] is passed through */
    uint64_t attr_valid;            /* seconds the kernel may keep attributes */
    struct timespec started;
    _Atomic uint32_t mode, uid, gid;
    struct worker *workers;
    unsigned n_workers, n_running;  /* n_running of them wait for requests, the others replace who sleeps */
};

/* The data of a READ's reply, not copied into the buffer (yet). */
struct reference {
    struct file *file;
    uint64_t file_offset, offset, length;   /* offset: in the image */
    bool front_will_do;             /* a short reply says where the error is */
};

/* One thread, its own descriptor (or the session's, where it could not be cloned) and its own buffer. */
struct worker {
    struct server *srv;
    pthread_t thread;
    int fd;
    int pipe[2];          /* for replies by reference; -1 if there is none */
    struct reference ref; /* of the reply in hand; length 0: its data is in buf */
    uint8_t *buf; /* FX_HEAD_ROOM for the request's head, then FX_MAX_IO; a WRITE's data follows its head */
    _Atomic uint64_t reads, read_bytes, writes, write_bytes, errors; /* written by this worker alone */
};

struct request {
    const struct fuse_in_header *head;
    const void *arg;
    size_t arg_len;
    uint8_t *out;                   /* FX_MAX_IO of room; a struct fuse_out_header fits in front of it */
    size_t out_len;
};

typedef int fop_fn(struct worker *w, struct request *rq);

static void fop_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

/* The view behind a node; NULL for the directory and for nodes that do not exist. */
static const struct view *fop_view(const struct server *srv, uint64_t node)
{
    uint64_t i = node - (srv->is_dir ? 2 : 1);

    return i < srv->n_views ? &srv->views[i] : NULL;
}

/* Only a whole image that is not behind a window can change its size, and that is the view's size then. */
static bool fop_resizable(const struct server *srv, const struct view *v)
{
    return srv->resizable && v == srv->views;
}

static uint64_t fop_size(const struct server *srv, const struct view *v)
{
    if (!fop_resizable(srv, v))
        return v->size;
    if (srv->backing_id > 0)
        img_refresh_size(srv->im);
    return srv->im->size;
}

/* How much of a range of the view is there. 0: nothing, and the log says so. */
static uint64_t fop_inside(const struct server *srv, const struct view *v, uint64_t offset, uint64_t len)
{
    if (fop_resizable(srv, v) || offset + len <= v->inside)
        return len;
    if (offset < v->inside)
        return v->inside - offset;
    msg_serving(0, "%s: %s: %" PRIu64 " bytes at %" PRIu64 " lie past the end of the disk", srv->im->name,
                v->name, len, offset);
    return 0;
}

static bool fop_growable(const struct server *srv, const struct view *v)
{
    return srv->growable && fop_resizable(srv, v);
}

static void fop_fill_times(const struct server *srv, struct fuse_attr *attr)
{
    struct stat st = srv->im->files[0].st;

    if (srv->writable)
        (void)fstat(srv->im->files[0].fd, &st);
    attr->atime = (uint64_t)st.st_atim.tv_sec;
    attr->mtime = (uint64_t)st.st_mtim.tv_sec;
    attr->ctime = (uint64_t)st.st_ctim.tv_sec;
    attr->atimensec = (uint32_t)st.st_atim.tv_nsec;
    attr->mtimensec = (uint32_t)st.st_mtim.tv_nsec;
    attr->ctimensec = (uint32_t)st.st_ctim.tv_nsec;
}

static int fop_fill_attr(const struct server *srv, uint64_t node, struct fuse_attr *attr)
{
    const struct view *v = fop_view(srv, node);
    uint32_t mode = srv->mode;

    memset(attr, 0, sizeof(*attr));
    if (!v && !(srv->is_dir && node == FUSE_ROOT_ID))
        return -ENOENT;
    attr->ino = node;
    attr->uid = srv->uid;
    attr->gid = srv->gid;
    attr->blksize = 4096;
    fop_fill_times(srv, attr);
    if (v) {
        attr->mode = S_IFREG | mode;
        attr->nlink = 1;
        attr->size = fop_size(srv, v);
        attr->blocks = util_min(img_blocks(srv->im), attr->size / 512 + (attr->size % 512 != 0));
    } else {
        attr->mode = S_IFDIR | (mode & 0444) | (mode & 0444) >> 2; /* who may read the files may list them */
        attr->nlink = 2;
    }
    return 0;
}

static int fop_fill_entry(const struct server *srv, uint64_t node, struct fuse_entry_out *out)
{
    memset(out, 0, sizeof(*out));
    out->nodeid = node;
    out->attr_valid = srv->attr_valid;
    out->entry_valid = 3600;        /* names never change */
    return fop_fill_attr(srv, node, &out->attr);
}

static int fop_lookup(struct worker *w, struct request *rq)
{
    const struct server *srv = w->srv;
    const char *name = rq->arg;

    if (!srv->is_dir || rq->head->nodeid != FUSE_ROOT_ID || name[rq->arg_len - 1] != 0)
        return -ENOENT;
    for (unsigned i = 0; i < srv->n_views; i++) {
        if (strcmp(name, srv->views[i].name) != 0)
            continue;
        rq->out_len = sizeof(struct fuse_entry_out);
        return fop_fill_entry(srv, i + 2, (struct fuse_entry_out *)rq->out);
    }
    return -ENOENT;
}

static int fop_getattr(struct worker *w, struct request *rq)
{
    struct fuse_attr_out *out = (struct fuse_attr_out *)rq->out;

    memset(out, 0, sizeof(*out));
    out->attr_valid = w->srv->attr_valid;
    rq->out_len = sizeof(*out);
    return fop_fill_attr(w->srv, rq->head->nodeid, &out->attr);
}

static int fop_statx(struct worker *w, struct request *rq)
{
    struct fx_statx_out *out = (struct fx_statx_out *)rq->out;
    struct fuse_attr attr;
    int ret = fop_fill_attr(w->srv, rq->head->nodeid, &attr);

    memset(out, 0, sizeof(*out));
    out->attr_valid = w->srv->attr_valid;
    out->mask = FX_STATX_BASIC;
    out->blksize = attr.blksize;
    out->nlink = attr.nlink;
    out->uid = attr.uid;
    out->gid = attr.gid;
    out->mode = (uint16_t)attr.mode;
    out->ino = attr.ino;
    out->size = attr.size;
    out->blocks = attr.blocks;
    out->atime = (struct fx_sx_time){ .sec = (int64_t)attr.atime, .nsec = attr.atimensec };
    out->mtime = (struct fx_sx_time){ .sec = (int64_t)attr.mtime, .nsec = attr.mtimensec };
    out->ctime = (struct fx_sx_time){ .sec = (int64_t)attr.ctime, .nsec = attr.ctimensec };
    rq->out_len = sizeof(*out);
    return ret;
}

static int fop_set_size(const struct server *srv, const struct view *v, uint64_t size)
{
    if (!v)
        return -EISDIR;
    if (!srv->writable)
        return -EACCES;
    if (size == fop_size(srv, v))
        return 0;
    return fop_resizable(srv, v) ? img_resize(srv->im, size, false) : -EOPNOTSUPP;
}

/* QEMU's rules: no +w on a read-only export, nothing for group and others who cannot reach it anyway. */
static int fop_setattr(struct worker *w, struct request *rq)
{
    const uint32_t harmless = FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME | FATTR_KILL_SUIDGID;
    const struct fuse_setattr_in *in = rq->arg;
    struct server *srv = w->srv;
    uint32_t can = FATTR_SIZE | FATTR_MODE | (srv->allow_other ? FATTR_UID | FATTR_GID : 0);
    uint32_t set = in->valid & ~harmless;
    int ret;

    if (set & ~can)
        return -EOPNOTSUPP;
    if ((set & FATTR_MODE) && !srv->allow_other && (in->mode & (S_IRWXG | S_IRWXO)))
        return -EPERM;
    if ((set & FATTR_MODE) && !srv->writable && (in->mode & 0222))
        return -EROFS;
    if (set & FATTR_SIZE) {
        ret = fop_set_size(srv, fop_view(srv, rq->head->nodeid), in->size);
        if (ret)
            return ret;
    }
    if (set & FATTR_MODE)
        srv->mode = in->mode & 07777;
    if (set & FATTR_UID)
        srv->uid = in->uid;
    if (set & FATTR_GID)
        srv->gid = in->gid;
    return fop_getattr(w, rq);
}

/*
 * A passed-through file whose length was changed underneath is not passed through any more: then reads past
 * its end fail. O_TRUNC ("cp backup m", "> m") is refused unless what it empties may grow again.
 */
static int fop_open(struct worker *w, struct request *rq)
{
    struct fx_open_out *out = (struct fx_open_out *)rq->out;
    const struct fuse_open_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = fop_view(srv, rq->head->nodeid);
    int ret;

    if (!v)
        return -EISDIR;
    if (!srv->writable && (in->flags & O_ACCMODE) != O_RDONLY)
        return -EROFS;
    if ((in->flags & O_TRUNC) && fop_size(srv, v)) {
        ret = fop_growable(srv, v)
                  ? fop_set_size(srv, v, 0)
                  : msg_serving(-EPERM,
                                "%s: opened to be emptied, refused: write without truncating (dd "
                                "conv=notrunc), or use --growable",
                                srv->im->name);
        if (ret)
            return ret;
    }
    memset(out, 0, sizeof(*out));
    rq->out_len = sizeof(*out);
    if (srv->direct_io) {
        out->open_flags = FOPEN_DIRECT_IO | FX_OPEN_PARALLEL_DIRECT_WRITES;
    } else if (srv->backing_id > 0 && v == srv->views && !img_resized_underneath(srv->im)) {
        out->open_flags = FX_OPEN_PASSTHROUGH;
        out->backing_id = srv->backing_id;
    } else if (srv->keep_cache) {
        out->open_flags = FOPEN_KEEP_CACHE;
    }
    return 0;
}

/*
 * Cached reads are all or nothing: after a short reply the kernel would believe that the file ends there;
 * after an error it tries again page by page, so that just the bad page is lost. Direct ones get the good
 * front.
 */
static int fop_copy(struct worker *w, const struct reference *ref, uint8_t *out, size_t *out_len)
{
    uint64_t done;
    int ret = img_read(w->srv->im, out, ref->length, ref->offset, &done);

    *out_len = done;
    return ret && done && ref->front_will_do ? 0 : ret;
}

/*
 * Large reads of plain data are answered by reference, one copy less; what is small or not plain is copied
 * here.
 */
static int fop_read(struct worker *w, struct request *rq)
{
    const struct fuse_read_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = fop_view(srv, rq->head->nodeid);
    struct reference ref = { .front_will_do = srv->direct_io || (in->flags & O_DIRECT) };
    struct extent ext;
    uint64_t size, inside;
    int ret;

    if (!v)
        return -EISDIR;
    size = fop_size(srv, v);
    if (in->offset >= size)
        return 0;
    ref.length = util_min(util_min(in->size, FX_MAX_IO), size - in->offset);
    inside = fop_inside(srv, v, in->offset, ref.length);
    if (inside && inside < ref.length && !ref.front_will_do) /* larger ones come again page by page */
        return ref.length > 4096
                   ? -EIO
                   : msg_serving(-EIO, "%s: %s: ends at %" PRIu64, srv->im->name, v->name, v->inside);
    if (inside == 0)
        return -EIO;
    ref.length = inside;
    ref.offset = v->start + in->offset;
    if (w->pipe[0] >= 0 && ref.length >= FX_SPLICE_MIN && ref.length <= FX_SPLICE_MAX &&
        img_map(srv->im, ref.offset, ref.length, false, &ext) == 0 && ext.kind == EXT_DATA &&
        ext.length >= ref.length) {
        ref.file = ext.file;
        ref.file_offset = ext.offset;
        w->ref = ref;
        rq->out_len = ref.length;
        ret = 0;
    } else {
        ret = fop_copy(w, &ref, rq->out, &rq->out_len);
    }
    fop_count(&w->reads, 1);
    fop_count(&w->read_bytes, rq->out_len);
    return ret;
}

static int fop_write(struct worker *w, struct request *rq)
{
    const struct fuse_write_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = fop_view(srv, rq->head->nodeid);
    struct fuse_write_out *out = (struct fuse_write_out *)rq->out;
    uint64_t size, len = in->size, done = 0;
    int ret;

    if (!v)
        return -EISDIR;
    if (!srv->writable)
        return -EROFS;
    if (len > rq->arg_len - sizeof(*in))
        return -EINVAL;
    if (in->offset > (uint64_t)MAX_IMAGE_SIZE - len)
        return -EFBIG;
    if (!fop_growable(srv, v)) {
        size = fop_size(srv, v);
        if (in->offset >= size && len)
            return -ENOSPC;
        len = fop_inside(srv, v, in->offset, util_min(len, size - in->offset));
        if (len == 0 && in->size)
            return -EIO;
    }
    ret = img_write(srv->im, (const uint8_t *)rq->arg + sizeof(*in), len, v->start + in->offset,
                    fop_growable(srv, v), &done);
    fop_count(&w->writes, 1);
    fop_count(&w->write_bytes, done);
    if (ret && !done)
        return ret;
    memset(out, 0, sizeof(*out));
    out->size = (uint32_t)done;
    rq->out_len = sizeof(*out);
    return 0;
}

/*
 * close(2) is the last chance to tell a reader whose passed-through file was cut short, or a writer of a
 * lost flush.
 */
static int fop_flush(struct worker *w, struct request *rq)
{
    const struct server *srv = w->srv;
    struct image *im = srv->im;

    (void)rq;
    if (srv->backing_id > 0 && img_resized_underneath(im)) {
        im->failed = true;
        return msg_serving(-EIO, "%s: its size was changed by another program while it was served", im->name);
    }
    for (unsigned i = 0; srv->writable && i < im->n_files; i++)
        if (im->files[i].latched)
            return im->files[i].latched;
    return 0;
}

static int fop_fsync(struct worker *w, struct request *rq)
{
    (void)rq;
    return img_sync(w->srv->im);
}

static int fop_fallocate(struct worker *w, struct request *rq)
{
    const int known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
    const struct fuse_fallocate_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = fop_view(srv, rq->head->nodeid);
    uint64_t len = in->length, done;
    int ret = 0, mode = (int)in->mode;

    if (!v)
        return -EISDIR;
    if (!srv->writable)
        return -EROFS;
    if ((mode & ~known) || ((mode & FALLOC_FL_PUNCH_HOLE) && !(mode & FALLOC_FL_KEEP_SIZE)))
        return -EOPNOTSUPP;
    if (!len || in->offset > (uint64_t)MAX_IMAGE_SIZE || len > (uint64_t)MAX_IMAGE_SIZE - in->offset)
        return -EINVAL;
    if (in->offset + len > fop_size(srv, v) && !(mode & FALLOC_FL_KEEP_SIZE))
        ret = fop_growable(srv, v) ? img_resize(srv->im, in->offset + len, true) : -ENOSPC;
    if (ret || in->offset >= fop_size(srv, v))
        return ret;
    len = util_min(len, fop_size(srv, v) - in->offset);
    if (fop_inside(srv, v, in->offset, len) < len)
        return -EIO;
    return img_change(srv->im, NULL, mode | FALLOC_FL_KEEP_SIZE, len, v->start + in->offset, &done);
}

/*
 * SEEK_DATA and SEEK_HOLE over the image's extents. Bad ranges count as data: whoever copies must meet the
 * error.
 */
static int fop_lseek(struct worker *w, struct request *rq)
{
    const struct fuse_lseek_in *in = rq->arg;
    struct fuse_lseek_out *out = (struct fuse_lseek_out *)rq->out;
    const struct view *v = fop_view(w->srv, rq->head->nodeid);
    uint64_t size, at = in->offset;
    struct extent ext;
    int ret;

    if (!v || (in->whence != SEEK_DATA && in->whence != SEEK_HOLE))
        return -EINVAL;
    size = fop_size(w->srv, v);
    if (at >= size)
        return -ENXIO;
    for (; at < size; at += ext.length) {
        ext = (struct extent){ .kind = EXT_BAD, .length = size - at };
        ret = 0;
        if (fop_resizable(w->srv, v) || at < v->inside)
            ret = img_map(w->srv->im, v->start + at,
                          util_min(size, fop_resizable(w->srv, v) ? size : v->inside) - at, true, &ext);
        if (ret)
            return ret;
        if ((ext.kind == EXT_ZERO) == (in->whence == SEEK_HOLE))
            break;
    }
    if (at >= size && in->whence == SEEK_DATA)
        return -ENXIO;
    out->offset = util_min(at, size);
    rq->out_len = sizeof(*out);
    return 0;
}

static int fop_statfs(struct worker *w, struct request *rq)
{
    struct fuse_statfs_out *out = (struct fuse_statfs_out *)rq->out;

    memset(out, 0, sizeof(*out));
    out->st.bsize = out->st.frsize = 4096;
    out->st.blocks = fop_size(w->srv, w->srv->views) / 4096;
    out->st.files = w->srv->n_views;
    out->st.namelen = 255;
    rq->out_len = sizeof(*out);
    return 0;
}

static int fop_opendir(struct worker *w, struct request *rq)
{
    if (!w->srv->is_dir || rq->head->nodeid != FUSE_ROOT_ID)
        return -ENOTDIR;
    memset(rq->out, 0, sizeof(struct fx_open_out));
    rq->out_len = sizeof(struct fx_open_out);
    return 0;
}

/* Entry i of the directory, 0 and 1 being "." and "..". */
static const char *fop_dir_name(const struct server *srv, uint64_t i, uint64_t *node)
{
    *node = i < 2 ? FUSE_ROOT_ID : i;
    return i == 0 ? "." : i == 1 ? ".." : i - 2 < srv->n_views ? srv->views[i - 2].name : NULL;
}

static int fop_readdir(struct worker *w, struct request *rq)
{
    const struct fuse_read_in *in = rq->arg;
    bool plus = rq->head->opcode == FUSE_READDIRPLUS;
    size_t head = plus ? offsetof(struct fuse_direntplus, dirent) : 0;
    size_t room = util_min(in->size, FX_MAX_IO);
    uint64_t node;
    const char *name;

    if (!w->srv->is_dir || rq->head->nodeid != FUSE_ROOT_ID)
        return -ENOTDIR;
    for (uint64_t i = in->offset; i < MAX_VIEWS + 2; i++) {
        name = fop_dir_name(w->srv, i, &node);
        if (!name)
            break;
        size_t len = strlen(name), need = head + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + len);
        struct fuse_dirent *d = (struct fuse_dirent *)(rq->out + rq->out_len + head);
        if (need > room - rq->out_len)
            break;
        memset(rq->out + rq->out_len, 0, need);
        if (plus && i >= 2 && fop_fill_entry(w->srv, node, (struct fuse_entry_out *)(rq->out + rq->out_len)))
            break;
        *d = (struct fuse_dirent){
            .ino = node, .off = i + 1, .namelen = (uint32_t)len, .type = i < 2 ? DT_DIR : DT_REG
        };
        memcpy(d->name, name, len);
        rq->out_len += need;
    }
    return 0;
}

static int fop_ok(struct worker *w, struct request *rq)
{
    (void)w;
    (void)rq;
    return 0;
}

/* Creating, renaming and removing: there is nothing to change in this directory. */
static int fop_not_permitted(struct worker *w, struct request *rq)
{
    (void)w;
    (void)rq;
    return -EPERM;
}

/*
 * What is not in the table gets -ENOSYS, after which the kernel does it alone or stops asking (POLL, ACCESS,
 * xattrs, locks, INTERRUPT, IOCTL, COPY_FILE_RANGE).
 */
static const struct fop {
    const char *name;
    fop_fn *fn;
    uint16_t min_arg;
    bool no_reply;
} fop_table[] = {
    [FUSE_LOOKUP] = { "LOOKUP", fop_lookup, 1, false },
    [FUSE_FORGET] = { "FORGET", fop_ok, 0, true },
    [FUSE_BATCH_FORGET] = { "BATCH_FORGET", fop_ok, 0, true },
    [FUSE_GETATTR] = { "GETATTR", fop_getattr, 0, false },
    [FUSE_SETATTR] = { "SETATTR", fop_setattr, sizeof(struct fuse_setattr_in), false },
    [FX_STATX] = { "STATX", fop_statx, sizeof(struct fx_statx_in), false },
    [FUSE_OPEN] = { "OPEN", fop_open, sizeof(struct fuse_open_in), false },
    [FUSE_READ] = { "READ", fop_read, sizeof(struct fuse_read_in), false },
    [FUSE_WRITE] = { "WRITE", fop_write, sizeof(struct fuse_write_in), false },
    [FUSE_FLUSH] = { "FLUSH", fop_flush, 0, false },
    [FUSE_RELEASE] = { "RELEASE", fop_ok, 0, false },
    [FUSE_FSYNC] = { "FSYNC", fop_fsync, 0, false },
    [FUSE_FALLOCATE] = { "FALLOCATE", fop_fallocate, sizeof(struct fuse_fallocate_in), false },
    [FUSE_LSEEK] = { "LSEEK", fop_lseek, sizeof(struct fuse_lseek_in), false },
    [FUSE_STATFS] = { "STATFS", fop_statfs, 0, false },
    [FUSE_OPENDIR] = { "OPENDIR", fop_opendir, 0, false },
    [FUSE_READDIR] = { "READDIR", fop_readdir, sizeof(struct fuse_read_in), false },
    [FUSE_READDIRPLUS] = { "READDIRPLUS", fop_readdir, sizeof(struct fuse_read_in), false },
    [FUSE_RELEASEDIR] = { "RELEASEDIR", fop_ok, 0, false },
    [FUSE_FSYNCDIR] = { "FSYNCDIR", fop_ok, 0, false },
    [FUSE_DESTROY] = { "DESTROY", fop_ok, 0, false },
    [FUSE_SYMLINK] = { "SYMLINK", fop_not_permitted, 0, false },
    [FUSE_MKNOD] = { "MKNOD", fop_not_permitted, 0, false },
    [FUSE_MKDIR] = { "MKDIR", fop_not_permitted, 0, false },
    [FUSE_UNLINK] = { "UNLINK", fop_not_permitted, 0, false },
    [FUSE_RMDIR] = { "RMDIR", fop_not_permitted, 0, false },
    [FUSE_RENAME] = { "RENAME", fop_not_permitted, 0, false },
    [FUSE_RENAME2] = { "RENAME2", fop_not_permitted, 0, false },
    [FUSE_LINK] = { "LINK", fop_not_permitted, 0, false },
    [FUSE_CREATE] = { "CREATE", fop_not_permitted, 0, false },
};

/* The reply's header ends the head room, so that it and the data are one piece. */
static struct fuse_out_header *fop_reply(const struct worker *w)
{
    return (struct fuse_out_header *)(w->buf + FX_HEAD_ROOM) - 1;
}

static size_t fop_finish(struct worker *w, uint64_t unique, int ret, size_t out_len)
{
    struct fuse_out_header *reply = fop_reply(w);

    if (ret == -EIO)
        fop_count(&w->errors, 1);
    *reply = (struct fuse_out_header){ .len = (uint32_t)(sizeof(*reply) + (ret ? 0 : out_len)),
                                       .error = ret,
                                       .unique = unique };
    return reply->len;
}

/*
 * Handles the request of n bytes in w->buf. Returns the reply's length, 0: none. With w->ref, its data is
 * elsewhere.
 */
static size_t fop_handle(struct worker *w, size_t n)
{
    const struct fuse_in_header *head = (const struct fuse_in_header *)w->buf;
    struct request rq = { .head = head, .arg = head + 1, .out = w->buf + FX_HEAD_ROOM };
    const struct fop *op;
    uint64_t unique;
    int ret;

    if (n < sizeof(*head) || head->len != n) {
        msg_serving(0, "malformed request of %zu bytes from the kernel, ignored", n);
        return 0;
    }
    unique = head->unique;
    rq.arg_len = n - sizeof(*head);
    op = head->opcode < ARRAY_LEN(fop_table) ? &fop_table[head->opcode] : &fop_table[0];
    ret = !op->fn ? -ENOSYS : rq.arg_len < op->min_arg ? -EINVAL : op->fn(w, &rq);
    if (w->srv->debug)
        msg_say(MSG_DEBUG, "%s(%u) node %" PRIu64 ": %s, %zu bytes", op->name ? op->name : "op", head->opcode,
                head->nodeid, ret ? strerror(-ret) : "ok", rq.out_len);
    return op->no_reply ? 0 : fop_finish(w, unique, ret, rq.out_len);
}

/* The reply turned out not to be sendable by reference: reads its data into the buffer after all. */
static size_t fop_fetch(struct worker *w)
{
    const struct fuse_out_header *reply = fop_reply(w);
    struct reference ref = w->ref;
    size_t len;
    int ret = fop_copy(w, &ref, w->buf + FX_HEAD_ROOM, &len);

    w->ref.length = 0;
    return fop_finish(w, reply->unique, ret, len);
}

/* ******************************************************************************************************** *
 * 13. Worker loop
 *
 * The transport: read(2) a request, fop_handle() it, write(2) the reply. Every worker does all three alone,
 * so there is no queue and no lock between threads; the kernel hands a request to whoever reads. The workers
 * are started together and stay: a thread that waits in read(2) costs nothing, and the kernel wakes just one.
 * ******************************************************************************************************** */

enum { LOOP_BUF = FX_HEAD_ROOM + FX_MAX_IO };

/* USR1 arrives at the first worker, whose read(2) it interrupts. */
static volatile sig_atomic_t loop_counters_wanted;

static void loop_on_usr1(int sig)
{
    (void)sig;
    loop_counters_wanted = 1;
}

static void loop_print_counters(const struct server *srv)
{
    uint64_t sum[5] = { 0 };

    for (unsigned i = 0; i < srv->n_workers; i++) {
        const struct worker *w = &srv->workers[i];
        sum[0] += atomic_load_explicit(&w->reads, memory_order_relaxed);
        sum[1] += atomic_load_explicit(&w->read_bytes, memory_order_relaxed);
        sum[2] += atomic_load_explicit(&w->writes, memory_order_relaxed);
        sum[3] += atomic_load_explicit(&w->write_bytes, memory_order_relaxed);
        sum[4] += atomic_load_explicit(&w->errors, memory_order_relaxed);
    }
    msg_say(MSG_ERROR,
            "%s: %" PRIu64 " reads (%" PRIu64 " bytes), %" PRIu64 " writes (%" PRIu64 " bytes), %" PRIu64
            " errors, %u threads%s",
            srv->im->name, sum[0], sum[1], sum[2], sum[3], sum[4], srv->n_workers,
            srv->backing_id > 0 ? ", passthrough" : "");
}

/*
 * Sends header and data through the worker's pipe, without copying the data. False: the pipe is empty again.
 */
static bool loop_send_reference(struct worker *w, size_t len)
{
    const struct fuse_out_header *reply = fop_reply(w);

    if (write(w->pipe[1], reply, sizeof(*reply)) == sizeof(*reply) &&
        file_splice(w->ref.file, w->pipe[1], w->ref.length, w->ref.file_offset) &&
        splice(w->pipe[0], NULL, w->fd, NULL, len, 0) == (ssize_t)len)
        return true;
    while (read(w->pipe[0], w->buf + FX_HEAD_ROOM, FX_MAX_IO) > 0)
        ;
    return false;
}

static bool loop_send(struct worker *w, size_t len)
{
    if (w->ref.length && loop_send_reference(w, len))
        return true;
    if (w->ref.length)
        len = fop_fetch(w);
    return write(w->fd, fop_reply(w), len) >= 0;
}

static void loop_interrupted(struct worker *w)
{
    if (w == w->srv->workers && loop_counters_wanted) {
        loop_counters_wanted = 0;
        loop_print_counters(w->srv);
    }
}

/* 0: another request may follow, 1: unmounted, < 0: broken. */
static int loop_once(struct worker *w)
{
    ssize_t n = read(w->fd, w->buf, LOOP_BUF);
    size_t len;

    if (n < 0) {
        if (errno == EINTR)
            loop_interrupted(w);
        if (errno == EINTR || errno == EAGAIN || errno == ENOENT)   /* ENOENT: the request was taken back */
            return 0;
        return errno == ENODEV ? 1 : msg_err(-errno, "reading from /dev/fuse: %s", strerror(errno));
    }
    w->ref.length = 0;
    len = fop_handle(w, (size_t)n);
    if (len == 0 || loop_send(w, len))
        return 0;
    if (errno == ENOENT || errno == EINTR)                          /* whoever asked has gone */
        return 0;
    return errno == ENODEV ? 1 : msg_err(-errno, "writing to /dev/fuse: %s", strerror(errno));
}

/* The first worker never parks: it is the one that USR1 wakes. */
static void *loop_worker(void *arg)
{
    struct worker *w = arg;
    int ret;

    do {
        if (pool_crowded() && w != w->srv->workers) {
            madvise(w->buf, LOOP_BUF, MADV_DONTNEED);
            pool_park();
        }
        ret = loop_once(w);
    } while (ret == 0);
    pool_close();
    return ret < 0 ? arg : NULL;    /* non-NULL: it broke */
}

/* Room for a header and FX_SPLICE_MAX bytes of pages; any user may have that much, up to a limit. */
static void loop_open_pipe(struct worker *w)
{
    if (util_fault_op("pipe") || pipe2(w->pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        w->pipe[0] = w->pipe[1] = -1;
    } else if (fcntl(w->pipe[1], F_SETPIPE_SZ, 2 * FX_SPLICE_MAX) < 0) {
        util_close(&w->pipe[0]);
        util_close(&w->pipe[1]);
    }
}

/*
 * Buffers and descriptors for n workers. Where /dev/fuse may not be opened (mode 0600), they share the
 * session's.
 */
static int loop_prepare(struct server *srv, unsigned n, int session_fd)
{
    uint32_t from = (uint32_t)session_fd;
    int fd, shared = -1;

    srv->workers = util_fault("workers") ? NULL : calloc(n, sizeof(*srv->workers));
    if (!srv->workers)
        return msg_err(-ENOMEM, "out of memory for %u workers", n);
    for (; srv->n_workers < n; srv->n_workers++) {
        struct worker *w = &srv->workers[srv->n_workers];
        w->srv = srv;
        w->fd = w->pipe[0] = w->pipe[1] = -1;
        w->buf = MAP_FAILED;
        if (!util_fault("worker buffer"))
            w->buf = mmap(NULL, LOOP_BUF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (w->buf == MAP_FAILED)
            return msg_err(-ENOMEM, "out of memory for %u workers", n);
        fd = shared >= 0 || util_fault("clone") ? -1 : open("/dev/fuse", O_RDWR | O_CLOEXEC);
        if (fd >= 0 && util_ioctl(fd, FX_IOC_CLONE, &from) < 0)
            util_close(&fd);
        w->fd = fd;
        if (fd < 0)
            w->fd = shared = session_fd;
        loop_open_pipe(w);
    }
    return 0;
}

static void loop_release(struct server *srv, int session_fd)
{
    for (unsigned i = 0; i < srv->n_workers; i++) {
        munmap(srv->workers[i].buf, LOOP_BUF);
        util_close(&srv->workers[i].pipe[0]);
        util_close(&srv->workers[i].pipe[1]);
        if (srv->workers[i].fd != session_fd)
            util_close(&srv->workers[i].fd);
    }
    free(srv->workers);
    srv->workers = NULL;
    srv->n_workers = 0;
}

static void loop_fill_init(const struct server *srv, const struct fuse_init_in *in, uint64_t offered,
                           bool passthrough, struct fx_init_out *out)
{
    uint64_t want = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS |
                    FUSE_ATOMIC_O_TRUNC | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_MAX_PAGES |
                    FUSE_EXPLICIT_INVAL_DATA | FUSE_INIT_EXT |
                    (srv->direct_io ? FX_DIRECT_IO_ALLOW_MMAP : 0) | (passthrough ? FX_PASSTHROUGH : 0);

    want &= offered;
    *out = (struct fx_init_out){
        .major = FUSE_KERNEL_VERSION,
        .minor = in->minor < 40 ? in->minor : 40,
        .max_readahead = in->max_readahead,
        .flags = (uint32_t)want,
        .flags2 = (uint32_t)(want >> 32),
        .max_background = 128,
        .congestion_threshold = 96,
        .max_write = FX_MAX_IO,
        .time_gran = 1,
        .max_pages = FX_MAX_IO / 4096,
        .max_stack_depth = want & FX_PASSTHROUGH ? FX_STACK_DEPTH : 0,
    };
}

/* Answers FUSE_INIT, the first request on every connection. *passthrough: wanted -> granted. */
static int loop_handshake(struct server *srv, int fd, bool *passthrough)
{
    struct worker *w = &srv->workers[0];
    const struct fuse_in_header *head = (const struct fuse_in_header *)w->buf;
    struct fuse_init_in in;
    struct { struct fuse_out_header head; struct fx_init_out out; } reply;
    uint64_t offered;
    ssize_t n;

    for (;;) {
        do
            n = util_fault("INIT") ? -1 : read(fd, w->buf, LOOP_BUF);
        while (n < 0 && errno == EINTR);
        if (n < 0)
            return msg_err(-errno, "no FUSE_INIT from the kernel: %s", strerror(errno));
        memset(&in, 0, sizeof(in));
        if ((size_t)n < sizeof(*head) + 16 || head->opcode != FUSE_INIT)
            return msg_err(-EPROTO, "the kernel did not begin with FUSE_INIT");
        memcpy(&in, head + 1, util_min((size_t)n - sizeof(*head), sizeof(in)));
        if (in.major < FUSE_KERNEL_VERSION || (in.major == FUSE_KERNEL_VERSION && in.minor < FX_MIN_MINOR))
            return msg_err(-EPROTO,
                           "this kernel speaks FUSE %u.%u; 7.%d (Linux 3.15) is the oldest that will do",
                           in.major, in.minor, FX_MIN_MINOR);
        offered = in.flags | (in.flags & FUSE_INIT_EXT ? (uint64_t)in.flags2 << 32 : 0);
        memset(&reply, 0, sizeof(reply));
        loop_fill_init(srv, &in, offered, *passthrough, &reply.out);
        reply.head = (struct fuse_out_header){ .len = sizeof(reply), .unique = head->unique };
        if (write(fd, &reply, sizeof(reply)) < 0)
            return msg_err(-errno, "cannot answer FUSE_INIT: %s", strerror(errno));
        if (in.major == FUSE_KERNEL_VERSION)
            break;                  /* a newer major has now seen ours and asks again */
    }
    *passthrough = reply.out.flags2 & (uint32_t)(FX_PASSTHROUGH >> 32);
    return 0;
}

/*
 * Hands the image to the kernel. It takes CAP_SYS_ADMIN, Linux 6.9 and a file system that can; else workers
 * serve.
 */
static void loop_pass_through(struct server *srv, int fd)
{
    struct fx_backing_map map = { .fd = srv->im->files[0].fd };
    int id = util_fault("passthrough") ? -1 : util_ioctl(fd, FX_IOC_BACKING_OPEN, &map);

    if (id > 0)
        srv->backing_id = id;
    else
        msg_say(MSG_INFO, "%s: no passthrough: %s", srv->im->name, strerror(errno));
}

/* The first worker runs in the calling thread. Returns when the file system is unmounted. */
static int loop_run(struct server *srv)
{
    unsigned started = 1;
    bool broken = false;
    sigset_t usr1;
    void *result;
    int ret;

    pool_start(srv->n_running, srv->n_workers);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    for (; started < srv->n_workers; started++) {
        struct worker *w = &srv->workers[started];
        ret = util_fault("thread") ? EAGAIN : pthread_create(&w->thread, NULL, loop_worker, w);
        if (ret) {
            msg_say(MSG_NOTE, "only %u of %u threads could be started: %s", started, srv->n_workers,
                    strerror(ret));
            break;
        }
    }
    pool_reduce(srv->n_workers - started);
    pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
    broken = loop_worker(&srv->workers[0]) != NULL;
    for (unsigned i = 1; i < started; i++)
        if (pthread_join(srv->workers[i].thread, &result) != 0 || result)
            broken = true;
    return broken ? -EIO : 0;
}

/* ******************************************************************************************************** *
 * 14. Sandbox
 *
 * What the server gives up before its workers start: core dumps, new privileges, all capabilities, the file
 * system (Landlock) and every system call but the few that serving takes (seccomp). Descriptors that are open
 * go on working; a hostile image that took over a decoder could still write garbage to the reader, and no
 * more.
 * ******************************************************************************************************** */

enum box_mode { BOX_AUTO, BOX_OFF, BOX_REQUIRE };

static int box_drop_capabilities(void)
{
    struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct none[2];

    memset(none, 0, sizeof(none));
    for (unsigned long cap = 0; cap < 64; cap++)
        (void)prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    return syscall(SYS_capset, &head, none) < 0 ? -errno : 0;
}

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_restrict_self 446
#endif

static int box_landlock(void)
{
    struct fx_landlock_ruleset rules = { .handled_fs = FX_LANDLOCK_FS_V1 };
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, 1u);
    size_t size = sizeof(rules.handled_fs);
    int fd, ret = 0;

    if (abi < 1)
        return abi < 0 ? -errno : -ENOSYS;
    if (abi >= 2)
        rules.handled_fs |= FX_LANDLOCK_REFER;
    if (abi >= 3)
        rules.handled_fs |= FX_LANDLOCK_TRUNCATE;
    if (abi >= 4) {
        rules.handled_net = FX_LANDLOCK_NET;
        size += sizeof(rules.handled_net);
    }
    if (abi >= 5)
        rules.handled_fs |= FX_LANDLOCK_IOCTL_DEV;
    if (abi >= 6) {
        rules.scoped = FX_LANDLOCK_SCOPED;
        size += sizeof(rules.scoped);
    }
    fd = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0u);
    if (fd < 0)
        return -errno;
    if (syscall(SYS_landlock_restrict_self, fd, 0u) < 0)
        ret = -errno;
    close(fd);
    return ret;
}

#if defined(__x86_64__)
#define BOX_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define BOX_ARCH AUDIT_ARCH_AARCH64
#endif

#define BOX_JUMP(op, k, yes, no) \
    ((struct sock_filter)BPF_JUMP(BPF_JMP | (op) | BPF_K, (uint32_t)(k), (uint8_t)(yes), (uint8_t)(no)))
#define BOX_STMT(op, k) ((struct sock_filter)BPF_STMT((op), (uint32_t)(k)))
#ifndef SYS_clone3
#define SYS_clone3 435
#endif

/*
 * Allowed: I/O on open descriptors, memory without PROT_EXEC, threads, leaving. All else fails with EPERM: a
 * C library that tries something new must not cost the user the mount.
 */
static int box_seccomp(void)
{
#ifdef BOX_ARCH
    static const int allowed[] = {
        SYS_read,       SYS_write,      SYS_pread64,         SYS_preadv2,        SYS_splice,
        SYS_pwrite64,   SYS_lseek,      SYS_fstat,           SYS_fallocate,      SYS_ftruncate,
        SYS_fdatasync,  SYS_fsync,      SYS_close,           SYS_futex,          SYS_munmap,
        SYS_madvise,    SYS_brk,        SYS_mremap,          SYS_rt_sigprocmask, SYS_rt_sigreturn,
        SYS_exit,       SYS_exit_group, SYS_clock_gettime,   SYS_gettid,         SYS_getpid,
        SYS_tgkill,     SYS_tkill,      SYS_set_robust_list, SYS_sched_yield,    SYS_restart_syscall,
        SYS_newfstatat,
#ifdef SYS_rseq
        SYS_rseq,
#endif
    };
    /*
     * The program: HEAD, one jump per allowed call, SPECIAL jumps, two checks of an argument, three
     * verdicts.
     */
    enum { N = ARRAY_LEN(allowed), HEAD = 4, SPECIAL = 4 };
    enum { PROT = HEAD + N + SPECIAL, CLONE = PROT + 2, DENY = CLONE + 2, NOSYS, ALLOW, LEN };
    const uint32_t low_arg0 = offsetof(struct seccomp_data, args[0]),
                   low_arg2 = offsetof(struct seccomp_data, args[2]);
    struct sock_filter code[LEN];
    struct sock_fprog prog = { .len = LEN, .filter = code };
    unsigned i = 0;

    code[i++] = BOX_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    code[i++] = BOX_JUMP(BPF_JEQ, BOX_ARCH, 1, 0);
    code[i++] = BOX_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[i++] = BOX_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (; i < HEAD + N; i++)
        code[i] = BOX_JUMP(BPF_JEQ, allowed[i - HEAD], ALLOW - i - 1, 0);
    code[i++] = BOX_JUMP(BPF_JEQ, SYS_mmap, PROT - (HEAD + N) - 1, 0);
    code[i++] = BOX_JUMP(BPF_JEQ, SYS_mprotect, PROT - (HEAD + N) - 2, 0);
    code[i++] = BOX_JUMP(BPF_JEQ, SYS_clone3, NOSYS - (HEAD + N) - 3, 0);
    code[i++] = BOX_JUMP(BPF_JEQ, SYS_clone, CLONE - (HEAD + N) - 4, DENY - (HEAD + N) - 4);
    code[i++] = BOX_STMT(BPF_LD | BPF_W | BPF_ABS, low_arg2);
    code[i++] = BOX_JUMP(BPF_JSET, PROT_EXEC, DENY - PROT - 2, ALLOW - PROT - 2);
    code[i++] = BOX_STMT(BPF_LD | BPF_W | BPF_ABS, low_arg0);
    code[i++] = BOX_JUMP(BPF_JSET, 0x10000 /* CLONE_THREAD */, ALLOW - CLONE - 2, DENY - CLONE - 2);
    code[i++] = BOX_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    code[i++] = BOX_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    code[i++] = BOX_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog, 0, 0) < 0 ? -errno : 0;
#else
    return -ENOSYS;
#endif
}

static int box_no_new_privs(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

static int box_no_core(void)
{
    const struct rlimit none = { 0, 0 };

    return setrlimit(RLIMIT_CORE, &none) < 0 ? -errno : 0;
}

static int box_enter(enum box_mode mode)
{
    static const struct {
        const char *name;
        int (*enter)(void);
    } step[] = {
        { "no core dumps", box_no_core },
        { "no new privileges", box_no_new_privs },
        { "dropping capabilities", box_drop_capabilities },
        { "Landlock", box_landlock },
        { "seccomp", box_seccomp },
    };
    int ret;

#ifdef PR_SET_IO_FLUSHER
    (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0,
                0); /* a loop device above us must not wait for memory that needs us */
#endif
    for (size_t i = 0; mode != BOX_OFF && i < ARRAY_LEN(step); i++) {
        ret = util_fault(step[i].name) ? -EIO : step[i].enter();
        if (ret && mode == BOX_REQUIRE)
            return msg_err(ret, "sandbox: %s: %s", step[i].name, strerror(-ret));
        if (ret)
            msg_say(MSG_INFO, "sandbox: without %s: %s", step[i].name, strerror(-ret));
    }
    return 0;
}

/* ******************************************************************************************************** *
 * 15. Mounts
 *
 * The mount table is read, never the mountpoint itself: once mounted, touching it could wait for our own
 * server. Root mounts through libfuse; everyone else through fusermount3, whose words are kept for our one
 * line.
 * ******************************************************************************************************** */

struct mountpoint {
    char path[PATH_MAX];            /* absolute, no symbolic links */
    bool is_dir, created, mounted;
    dev_t dev;                      /* of the file we created, to remove that one only */
    ino_t ino;
    uint64_t id;                    /* of the mount, see mnt_identity() */
    unsigned minor;                 /* of the mounted file system: the number of its FUSE connection */
    struct fuse_session *session;   /* libfuse's: owns session_fd until the server is forked */
    int session_fd;
};

struct mount_entry {
    char path[PATH_MAX];
    uint64_t id;                    /* see mnt_identity() */
    unsigned major, minor;
    bool covered;                   /* by another mount at the same place */
    uid_t owner;                    /* who mounted it */
    bool fuseexp;
};

/* What libfuse and fusermount3 say goes into our message instead of onto stderr. */
static char mnt_said[400];

__attribute__((format(printf, 2, 0))) static void mnt_log(enum fuse_log_level level, const char *fmt,
                                                          va_list ap)
{
    size_t at = strlen(mnt_said);

    (void)level;
    vsnprintf(mnt_said + at, sizeof(mnt_said) - at, fmt, ap);
}

/* The last line said, without its "fuse: " or "fusermount3: ". */
static const char *mnt_last_words(void)
{
    size_t len = strlen(mnt_said);
    char *line, *colon;

    while (len && mnt_said[len - 1] == '\n')
        mnt_said[--len] = 0;
    line = strrchr(mnt_said, '\n');
    line = line ? line + 1 : mnt_said;
    colon = strstr(line, ": ");
    return colon && strncmp(line, "fuse", 4) == 0 ? colon + 2 : line;
}

/* mountinfo writes space, tab, newline and backslash as \ooo. */
static void mnt_unescape(char *text)
{
    char *to = text;

    for (; *text; to++)
        if (text[0] == '\\' && strspn(text + 1, "01234567") >= 3) {
            *to = (char)((text[1] - '0') << 6 | (text[2] - '0') << 3 | (text[3] - '0'));
            text += 4;
        } else {
            *to = *text++;
        }
    *to = 0;
}

/* One line of mountinfo: "id parent major:minor root mountpoint options ... - type source super-options". */
static bool mnt_parse_line(char *line, struct mount_entry *entry)
{
    char *rest, *user;
    int at = 0;

    memset(entry, 0, sizeof(*entry));
    if (sscanf(line, "%*u %*u %u:%u %*s %n", &entry->major, &entry->minor, &at) < 2 || at == 0)
        return false;
    rest = line + at + strcspn(line + at, " ");
    if (!*rest)
        return false;
    *rest++ = 0;
    mnt_unescape(line + at);
    if (!util_copy(entry->path, sizeof(entry->path), line + at))
        return false;
    rest = strstr(rest, " - ");
    entry->fuseexp = rest && strncmp(rest + 3, "fuse.fuseexp ", 13) == 0;
    rest = entry->fuseexp ? strchr(rest + 16, ' ') : NULL; /* behind the source, which may say anything */
    user = rest ? strstr(rest, "user_id=") : NULL;
    entry->owner = user ? (uid_t)strtoul(user + 8, NULL, 10) : 0;
    return true;
}

/*
 * What tells this mount from all others there ever were: minors, and mountinfo's ids, are given to the next
 * mount as soon as they are free. The number of the mount that is to be seen at the path; 0 before Linux 6.8,
 * which has none. Asks the kernel's cache alone, so that no server, alive or dead, is waited for.
 */
static uint64_t mnt_identity(const char *path)
{
    union { uint8_t raw[256]; uint32_t mask; } stx;
    uint64_t id = 0;

    memset(&stx, 0, sizeof(stx));
    if (syscall(SYS_statx, AT_FDCWD, path, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | FX_STATX_DONT_SYNC,
                FX_STATX_MNT_ID_UNIQUE, stx.raw) == 0 && (stx.mask & FX_STATX_MNT_ID_UNIQUE))
        memcpy(&id, stx.raw + FX_STATX_OFF_MNT_ID, sizeof(id));
    return id;
}

/*
 * The topmost mount at path; or, with path NULL, where the mount with this minor and identity is to be seen
 * (it may have been moved). With covered set it is there, but another one lies over it. 1: found, 0: there is
 * none.
 */
static int mnt_find(const char *path, unsigned minor, uint64_t id, struct mount_entry *entry)
{
    FILE *table = fopen("/proc/self/mountinfo", "re");
    struct mount_entry *e = malloc(sizeof(*e));
    char *line = NULL;
    size_t size = 0;
    char hidden[PATH_MAX] = "";
    int found = 0;

    memset(entry, 0, sizeof(*entry));
    if (!table || !e) {
        free(e);
        if (table)
            fclose(table);
        return msg_err(-EIO, "/proc/self/mountinfo: %s (is /proc mounted?)", strerror(errno));
    }
    while (getline(&line, &size, table) > 0) {
        if (!mnt_parse_line(line, e))
            continue;
        if (path ? strcmp(e->path, path) == 0 : e->fuseexp && e->major == 0 && e->minor == minor) {
            e->id = mnt_identity(e->path);
            if (!path && id && e->id != id) {
                util_copy(hidden, sizeof(hidden),
                          e->path); /* ours, out of sight, or one that has our minor now */
                continue;
            }
            *entry = *e;
            found = 1;
        } else if (!path && strcmp(e->path, found ? entry->path : hidden) == 0) {
            entry->covered = true;
        }
    }
    free(line);
    free(e);
    fclose(table);
    return found;
}

static int mnt_run_fusermount(const char *const argv[], int comm_fd);

/* flags: 0 or MNT_DETACH. -EBUSY when somebody uses it. */
static int mnt_unmount(const char *path, int flags)
{
    const char *argv[] = { "fusermount3", "-u", "--", path, NULL },
               *lazy[] = { "fusermount3", "-u", "-z", "--", path, NULL };

    if (umount2(path, flags | UMOUNT_NOFOLLOW) == 0)
        return 0;
    if (errno != EPERM)
        return -errno;
    if (mnt_run_fusermount(flags ? lazy : argv, -1) == 0)
        return 0;
    return strstr(mnt_said, "busy") ? -EBUSY : -EPERM;
}

/*
 * What the names of the control sockets of a mount begin with. Root may not ask for the identity of a mount
 * that a plain user keeps to himself; then the minor must do.
 */
static void mnt_control_prefix(uint64_t id, unsigned minor, char text[48])
{
    if (id)
        snprintf(text, 48, "fuseexp:%u:%" PRIu64 ":", minor, id);
    else
        snprintf(text, 48, "fuseexp:%u:", minor);
}

/* One socket of that name, held by the mount's owner; or -1. */
static int mnt_connect(const char *name, uid_t owner)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct ucred peer;
    socklen_t len = sizeof(peer);
    int fd;

    if (strlen(name) >= sizeof(addr.sun_path))
        return -1;
    memcpy(addr.sun_path + 1, name + 1, strlen(name) - 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connect(fd, (struct sockaddr *)&addr,
                (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name))) < 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0 || peer.uid != owner)
        util_close(&fd);
    return fd;
}

/* Finds the control sockets of a mount; connects to them if fds is not NULL. Returns how many. */
static size_t mnt_find_servers(const struct mount_entry *entry, struct pollfd *fds, size_t most)
{
    FILE *table = fopen("/proc/net/unix", "re");
    char line[512], want[50] = "@", *name;
    size_t n = 0;
    int fd;

    mnt_control_prefix(entry->id, entry->minor, want + 1);
    while (table && n < most && fgets(line, sizeof(line), table)) {
        line[strcspn(line, "\n")] = 0;
        name = strstr(line, want);
        if (!name)
            continue;
        fd = fds ? mnt_connect(name, entry->owner) : -1;
        if (fds && fd >= 0)
            fds[n++] = (struct pollfd){ .fd = fd, .events = POLLIN };
        else if (!fds)
            n++;
    }
    if (table)
        fclose(table);
    return n;
}

/*
 * Detaches a mount whose server died; refuses to mount over anything that is alive. Asks no server that may
 * hang.
 */
static int mnt_clear_stale(const char *path)
{
    struct mount_entry entry;
    struct statfs fs;
    int ret = mnt_find(path, 0, 0, &entry);

    if (ret <= 0)
        return ret;
    if (!entry.fuseexp)
        return msg_err(-EBUSY, "%s: something else is mounted there", path);
    if (mnt_find_servers(&entry, NULL, 1) || statfs(path, &fs) == 0 ||
        (errno != ENOTCONN && errno != ECONNABORTED))
        return msg_err(-EBUSY, "%s: fuseexp is mounted there already; fuseexp --umount ends it", path);
    ret = mnt_unmount(path, MNT_DETACH);
    if (ret)
        return msg_err(ret, "%s: cannot detach the dead mount there: %s", path, strerror(-ret));
    msg_say(MSG_NOTE, "%s: detached a mount whose server had died", path);
    return 0;
}

/* Makes the path absolute: the folder it is in must exist, the last component is taken as it is. */
static int mnt_resolve_folder(const char *arg, char path[PATH_MAX])
{
    char folder[PATH_MAX], parent[PATH_MAX], *base;

    if (!util_copy(folder, sizeof(folder), arg) || !*util_basename(arg))
        return msg_err(-EINVAL, "%s: not a usable path", arg);
    base = strrchr(folder, '/');
    if (base)
        *base = 0;
    if (!realpath(!base ? "." : base == folder ? "/" : folder, parent))
        return msg_err(-errno, "%s: the folder it should be in: %s", arg, strerror(errno));
    if (snprintf(path, PATH_MAX, "%s%s%s", parent, parent[1] ? "/" : "", util_basename(arg)) >= PATH_MAX)
        return msg_err(-ENAMETOOLONG, "%s: path too long", arg);
    return 0;
}

/* Makes a mountpoint's path absolute and free of links. It need not exist (yet). */
static int mnt_resolve(const char *arg, char path[PATH_MAX])
{
    int fd = open(arg, O_PATH | O_CLOEXEC);     /* asks the kernel's protection of links, unlike realpath() */

    if (fd < 0 && errno == EACCES)
        return msg_err(-errno, "%s: %s", arg, strerror(errno));
    util_close(&fd);
    if (realpath(arg, path))
        return 0;
    if (errno != ENOENT || !*arg || arg[strlen(arg) - 1] == '/')
        return msg_err(-errno, "%s: %s", arg, strerror(errno));
    return mnt_resolve_folder(arg, path);
}

/* Makes the mountpoint if there is none. */
static int mnt_create(struct mountpoint *mp)
{
    struct stat st;
    int fd;

    if (stat(mp->path, &st) == 0) {
        mp->is_dir = S_ISDIR(st.st_mode);
        return mp->is_dir || S_ISREG(st.st_mode)
                   ? 0
                   : msg_err(-ENOTDIR,
                             "%s: neither a regular file nor a folder, so nothing can be mounted there",
                             mp->path);
    }
    if (errno != ENOENT)
        return msg_err(-errno, "%s: %s", mp->path, strerror(errno));
    fd = util_fault("mountpoint")
             ? -1
             : open(mp->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return msg_err(-errno, "%s: cannot be created: %s", mp->path, strerror(errno));
    mp->created = true;
    if (fstat(fd, &st) == 0) {
        mp->dev = st.st_dev;
        mp->ino = st.st_ino;
    }
    close(fd);
    return 0;
}

/*
 * Removes the file that mnt_create() made: only that one, only when nothing is mounted on it, only when
 * empty.
 */
static void mnt_remove(struct mountpoint *mp)
{
    struct mount_entry entry = { 0 };
    struct stat st;

    if (!mp->created || mnt_find(mp->path, 0, 0, &entry) != 0)
        return;
    if (lstat(mp->path, &st) == 0 && st.st_dev == mp->dev && st.st_ino == mp->ino && st.st_size == 0)
        unlink(mp->path);
    mp->created = false;
}

/* Runs fusermount3, keeping what it says. comm_fd: where it hands over /dev/fuse, or -1. */
static int mnt_run_fusermount(const char *const argv[], int comm_fd)
{
    int out[2], status = -1;
    char fd_text[16];
    size_t at = 0;
    ssize_t n;
    pid_t pid;

    mnt_said[0] = 0;
    if (pipe2(out, O_CLOEXEC) < 0)
        return -errno;
    pid = util_fault("fork fusermount3") ? -1 : fork();
    if (pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        dup2(out[1], STDERR_FILENO);
        if (comm_fd >= 0) {
            snprintf(fd_text, sizeof(fd_text), "%d", comm_fd);
            setenv("_FUSE_COMMFD", fd_text, 1);
            fcntl(comm_fd, F_SETFD, 0);
        }
        execvp(argv[0], (char *const *)argv);
        dprintf(
            STDERR_FILENO,
            "fuse: cannot run fusermount3: %s (Debian: apt-get install fuse3), and only root does without\n",
            strerror(errno));
        _exit(127);
    }
    close(out[1]);
    while (pid > 0 && at < sizeof(mnt_said) - 1 &&
           (n = read(out[0], mnt_said + at, sizeof(mnt_said) - 1 - at)) > 0)
        at += (size_t)n;
    mnt_said[at] = 0;
    close(out[0]);
    if (pid < 0)
        return -EAGAIN;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return status == 0 ? 0 : -EIO;
}

/* fusermount3 sends the descriptor of /dev/fuse through the socket. */
static int mnt_receive_fd(int sock)
{
    union { char buf[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
    char byte;
    struct iovec iov = { &byte, 1 };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control.buf)
    };
    struct cmsghdr *c;
    int fd = -1;

    if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) <= 0)
        return -1;
    c = CMSG_FIRSTHDR(&msg);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    return fd;
}

/*
 * libfuse 3.14 does not fall back to fusermount3 when /dev/fuse is for root alone, so we call it ourselves.
 */
static int mnt_mount_user(struct mountpoint *mp, char *opts)
{
    const char *argv[] = { "fusermount3", "-o", opts, "--", mp->path, NULL };
    int sock[2], fd = -1, ret;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sock) < 0)
        return -errno;
    ret = mnt_run_fusermount(argv, sock[0]);
    util_close(&sock[0]);
    if (ret == 0)
        fd = mnt_receive_fd(sock[1]);
    close(sock[1]);
    mp->session_fd = fd;
    return fd < 0 ? -EPERM : 0;
}

/* Root of a container may lack what mounting takes; fusermount3 then says so. */
static bool mnt_privileged(void)
{
    struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct caps[2];

    return syscall(SYS_capget, &head, caps) == 0 && (caps[0].effective & 1u << CAP_SYS_ADMIN);
}

/* One try with these options. The session object parses and checks them in both cases. */
static int mnt_try(struct mountpoint *mp, char *opts)
{
    static const struct fuse_lowlevel_ops none;
    char name[] = "fuseexp", dash_o[] = "-o", *argv[] = { name, dash_o, opts };
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    char by_fd[32];
    int ret = -EINVAL;

    mnt_said[0] = 0;
    mp->session = util_fault("session") ? NULL : fuse_session_new(&args, &none, sizeof(none), NULL);
    fuse_opt_free_args(&args);
    if (!mp->session)
        return -EINVAL;
    if (util_fault("mount")) {
        ret = -EIO;
    } else if (mnt_privileged()) {
        ret = fuse_session_mount(mp->session, mp->path) < 0 ? -EIO : 0;
    } else {
        ret = mnt_mount_user(mp, opts);
        if (!ret) {
            mp->mounted = true;
            snprintf(by_fd, sizeof(by_fd), "/dev/fd/%d", mp->session_fd);
            ret = fuse_session_mount(mp->session, by_fd) < 0 ? -EIO : 0;
        }
    }
    if (!ret) {
        mp->mounted = true;
        mp->session_fd = fuse_session_fd(mp->session);
    }
    return ret;
}

static void mnt_end_session(struct mountpoint *mp)
{
    if (mp->session)
        fuse_session_destroy(mp->session);      /* closes session_fd */
    mp->session = NULL;
    mp->session_fd = -1;
}

struct mount_wanted {
    const char *source;             /* what the mount table shows: the image */
    const char *extra;              /* the user's -o options, or NULL */
    bool writable;
    bool *allow_other;              /* in: try it; out: granted */
    bool may_drop_allow_other;      /* automatic: root asks for it, others where fuse.conf lets them */
};

/* fsname may hold commas and backslashes; fuse_opt escapes them. */
static char *mnt_options(const struct mount_wanted *want)
{
    char source[PATH_MAX + 8], *opts = NULL;
    int bad;

    snprintf(source, sizeof(source), "fsname=%s", want->source);
    bad = fuse_opt_add_opt_escaped(&opts, source);
    bad |= fuse_opt_add_opt(&opts,
                            "subtype=fuseexp,nosuid,nodev,noatime,default_permissions," FX_MAX_READ_OPTION);
    bad |= fuse_opt_add_opt(&opts, want->writable ? "rw" : "ro");
    if (*want->allow_other)
        bad |= fuse_opt_add_opt(&opts, "allow_other");
    if (want->extra)
        bad |= fuse_opt_add_opt(&opts, want->extra);
    if (bad) {
        free(opts);
        return NULL;
    }
    return opts;
}

static int mnt_mount(struct mountpoint *mp, const struct mount_wanted *want)
{
    struct mount_entry entry = { 0 };
    char *opts;
    int ret;

    fuse_set_log_func(mnt_log);
    if (access("/dev/fuse", F_OK) < 0)
        return msg_err(-errno, "/dev/fuse: %s (modprobe fuse)", strerror(errno));
    do {
        opts = mnt_options(want);
        if (!opts)
            return msg_err(-ENOMEM, "%s: out of memory", mp->path);
        ret = mnt_try(mp, opts);
        free(opts);
        if (!ret)
            break;
        mnt_end_session(mp);
        if (!*want->allow_other || !want->may_drop_allow_other || mnt_privileged())
            return msg_err(
                ret, "%s: cannot mount: %s%s", mp->path, *mnt_said ? mnt_last_words() : strerror(-ret),
                access("/dev/fuse", R_OK | W_OK) < 0 ? " (it takes chmod 666 /dev/fuse, as udev does)" : "");
        *want->allow_other = false;
    } while (true);

    ret = util_fault("mount table") ? -EIO : mnt_find(mp->path, 0, 0, &entry);
    if (ret != 1)
        return msg_err(ret ? ret : -EIO, "%s: mounted, but the mount table does not show it", mp->path);
    mp->minor = entry.minor;
    mp->id = entry.id;
    return 0;
}

/*
 * Where our mount is to be seen now, wherever somebody moved it. False: nowhere, or (covered) not from here.
 */
static bool mnt_where(const struct mountpoint *mp, struct mount_entry *where)
{
    int found;

    memset(where, 0, sizeof(*where));
    if (!mp->mounted)
        return false;
    found = mp->minor ? mnt_find(NULL, mp->minor, mp->id, where) : mnt_find(mp->path, 0, 0, where);
    return found == 1 && !where->covered;
}

/*
 * Cuts the connection: every request fails at once. Only while the mount is to be seen: later its number may
 * be another one's. Needs fusectl; the caller has other means as well.
 */
static void mnt_abort(const struct mountpoint *mp)
{
    struct mount_entry where;
    char path[64];

    snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", mp->minor);
    if (mnt_where(mp, &where))
        (void)util_write_file(path, "1");
}

/*
 * The kernel's 128 KiB of read-ahead starve a reader that waits for a process; 1 MiB is one request of ours.
 */
static void mnt_raise_readahead(const struct mountpoint *mp, unsigned kib)
{
    char path[64], text[16];

    snprintf(path, sizeof(path), "/sys/class/bdi/0:%u/read_ahead_kb", mp->minor);
    snprintf(text, sizeof(text), "%u", kib);
    if (util_write_file(path, text) < 0)
        msg_say(MSG_INFO, "%s: cannot raise the read-ahead: %s", path, strerror(errno));
}

/* ******************************************************************************************************** *
 * 16. Life cycle
 *
 * run_export() takes what an export needs one by one and releases it in reverse order, whichever step fails.
 * The supervisor is one thread around run_poll(); the server is forked when everything is mounted and open,
 * and from then on it alone has the image and /dev/fuse: when it dies, however it dies, the connection is
 * cut, and the supervisor detaches the mount. OFD locks and the connection would outlive the server if the
 * supervisor kept copies.
 *
 * Control socket: an abstract UNIX socket "fuseexp:<minor>:<identity of the mount>:<pid>" that nobody reads
 * from. Whoever waits for the end connects, and gets one byte, the exit status, when everything is over (or
 * just EOF, if we were killed).
 * ******************************************************************************************************** */

enum opt_allow_other { ALLOW_AUTO, ALLOW_ON, ALLOW_OFF };
enum opt_action { ACT_EXPORT, ACT_UMOUNT, ACT_FORMATS, ACT_VERSION, ACT_HELP };
#define OPT_UNSET UINT32_MAX

struct options {
    char **images, **command, *mountpoint, *format, *pidfile, *extra;
    char *snapshot, *backing, *backing_format, *data_file, *allow_external;
    unsigned n_images;
    bool foreground, debug, single_thread, writable, share, growable, direct_io, no_passthrough, no_parts,
        no_backing, force_parent, ignore_log, lazy, verbose, quiet;
    bool mount_helper; /* called by mount(8) */
    uint64_t offset, size, cache_size;
    uint32_t partition, sector_size, threads, mode, uid, gid;
    uint32_t sandbox, allow_other, action;
};

struct run {
    const struct options *o;
    struct image_options image_options;
    struct image im;
    struct view views[MAX_VIEWS];
    unsigned n_views;
    struct server srv;
    struct mountpoint mp;
    char source[PATH_MAX];          /* the image, as the mount table shows it */
    char pidfile[PATH_MAX];         /* absolute */
    sigset_t old_mask;
    struct rlimit old_files;        /* the command gets them back */
    int shell_fd;                   /* to the process that the user started; -1 in the foreground */
    int sig_fd, ctl_fd, ready_fd, log_fd;
    pid_t server, command;          /* 0: not running (any more) */
    int server_status, command_status;
    bool ready, not_ready;
    int waiters[MAX_WAITERS];       /* connected to ctl_fd */
    unsigned n_waiters;
    unsigned stop_signals;          /* INT, TERM, HUP so far */
};

/* Lines of a background server, until ready for the user's eyes, then for syslog. */
static void run_relay_log(struct run *r)
{
    char text[4096];
    ssize_t n = r->log_fd < 0 ? 0 : read(r->log_fd, text, sizeof(text) - 1);

    if (n == 0)
        util_close(&r->log_fd);
    if (n <= 0)
        return;
    text[n] = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        msg_err(0, "%s", line + (strncmp(line, "fuseexp: ", 9) == 0 ? 9 : 0));
}

/* Whoever waits for the end is taken in; whoever gave up (the mount was busy) makes room. */
static void run_accept_waiters(struct run *r)
{
    unsigned kept = 0;
    char byte;
    int fd;

    for (unsigned i = 0; i < r->n_waiters; i++) {
        if (recv(r->waiters[i], &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
            close(r->waiters[i]);
        else
            r->waiters[kept++] = r->waiters[i];
    }
    r->n_waiters = kept;
    while (r->ctl_fd >= 0 && (fd = accept4(r->ctl_fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        if (r->n_waiters < MAX_WAITERS)
            r->waiters[r->n_waiters++] = fd;
        else
            close(fd);
    }
}

static void run_reap(pid_t *pid, int *status)
{
    if (*pid > 0 && waitpid(*pid, status, WNOHANG) == *pid)
        *pid = 0;
}

/* A terminal sends its signals to the command by itself; what kill(1) sent us is passed on. */
static void run_on_signal(struct run *r, const struct signalfd_siginfo *si)
{
    switch (si->ssi_signo) {
    case SIGCHLD:
        run_reap(&r->server, &r->server_status);
        run_reap(&r->command, &r->command_status);
        break;
    case SIGUSR1:
        if (r->server > 0)
            kill(r->server, SIGUSR1);
        break;
    default:
        if (r->command > 0 && si->ssi_code <= 0)
            kill(r->command, (int)si->ssi_signo);
        if (r->command == 0)
            r->stop_signals++;
    }
}

/* Waits for whatever comes next, or for timeout milliseconds (-1: for ever). */
static void run_poll(struct run *r, int timeout)
{
    struct pollfd fds[] = {
        { .fd = r->sig_fd, .events = POLLIN },
        { .fd = r->ready_fd, .events = POLLIN },
        { .fd = r->log_fd, .events = POLLIN },
        { .fd = r->server > 0 ? r->ctl_fd : -1, .events = POLLIN },
    };
    struct signalfd_siginfo si;
    char byte;

    if (poll(fds, ARRAY_LEN(fds), timeout) <= 0)
        return;
    if (fds[3].revents)
        run_accept_waiters(r);
    if (fds[2].revents)
        run_relay_log(r);
    if (fds[1].revents) {
        r->ready = read(r->ready_fd, &byte, 1) == 1;
        r->not_ready = !r->ready;
        util_close(&r->ready_fd);
    }
    if (fds[0].revents && read(r->sig_fd, &si, sizeof(si)) == sizeof(si))
        run_on_signal(r, &si);
}

static int run_take_signals(struct run *r)
{
    static const int taken[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCHLD, SIGUSR1 };
    static const int deaf[] = { SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF,
                                SIGXFSZ }; /* would kill us for nothing */
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < ARRAY_LEN(taken); i++)
        sigaddset(&set, taken[i]);
    sigprocmask(SIG_BLOCK, &set, &r->old_mask);
    r->sig_fd = util_fault("signals") ? -1 : signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (r->sig_fd < 0)
        return msg_err(-errno, "signalfd: %s", strerror(errno));
    for (size_t i = 0; i < ARRAY_LEN(deaf); i++)
        sigaddset(&set, deaf[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);       /* an ignored SIGCHLD, inherited, would lose us the exit statuses */
    return 0;
}

/* A set of a thousand parts is a thousand descriptors. */
static void run_raise_file_limit(struct run *r)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &r->old_files) < 0)
        return;
    limit = r->old_files;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
}

static int run_make_control(struct run *r)
{
    r->ctl_fd = util_fault("control socket") ? -1
                                             : socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return r->ctl_fd < 0 ? msg_err(-errno, "control socket: %s", strerror(errno)) : 0;
}

/* Without the name nobody can wait for us; that is no reason not to serve. */
static void run_name_control(struct run *r)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    char prefix[48];
    int len;

    mnt_control_prefix(r->mp.id, r->mp.minor, prefix);
    len = snprintf(addr.sun_path + 1, sizeof(addr.sun_path) - 1, "%s%d", prefix, (int)getpid());
    if (bind(r->ctl_fd, (struct sockaddr *)&addr,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) < 0 ||
        listen(r->ctl_fd, MAX_WAITERS) < 0)
        msg_say(MSG_INFO, "control socket: %s", strerror(errno));
}

/* Tells everyone who waits for the end how it ended. */
static void run_close_control(struct run *r, int status)
{
    char byte = (char)status;

    run_accept_waiters(r);
    while (r->n_waiters) {
        (void)!send(r->waiters[--r->n_waiters], &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        close(r->waiters[r->n_waiters]);
    }
    util_close(&r->ctl_fd);
}

static int run_open_image(struct run *r)
{
    const struct options *o = r->o;
    struct part_wanted want = {
        .offset = o->offset, .size = o->size, .partition = o->partition, .sector = o->sector_size
    };
    struct stat st;
    int ret;

    if (!realpath(o->images[0], r->source) || strlen(r->source) >= 1024)
        util_copy(r->source, sizeof(r->source), util_basename(o->images[0]));
    r->im.writable = o->writable;
    r->im.growable = o->growable;
    r->image_options = (struct image_options){
        .format = o->format,
        .snapshot = o->snapshot,
        .backing = o->backing,
        .backing_format = o->backing_format,
        .data_file = o->data_file,
        .allow_external = o->allow_external,
        .no_backing = o->no_backing,
        .force_parent = o->force_parent,
        .ignore_log = o->ignore_log,
        .parts = !o->no_parts,
        .lock = !o->share,
    };
    ret = cache_start(o->cache_size);
    if (!ret)
        ret = img_open(&r->im, o->images, o->n_images, &r->image_options);
    if (ret)
        return ret;
    /* Looked at before anything is mounted there: a folder shows the partitions too. */
    r->mp.is_dir = stat(r->mp.path, &st) == 0 && S_ISDIR(st.st_mode);
    want.all = r->mp.is_dir && !o->partition;
    return part_make_views(&r->im, &want, r->views, &r->n_views);
}

static void run_setup_server(struct run *r)
{
    const struct options *o = r->o;
    struct server *srv = &r->srv;
    bool whole = r->views[0].start == 0 && r->views[0].size == r->im.size && !o->size && r->im.n_files == 1 &&
                 !r->im.files[0].is_blk;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    srv->im = &r->im;
    srv->views = r->views;
    srv->n_views = r->n_views;
    srv->is_dir = r->mp.is_dir;
    srv->writable = o->writable;
    srv->growable = o->growable;
    srv->resizable = o->writable && whole && r->im.format->resize;
    /* Every file has a page cache of its own; where they overlap and are written, none can be kept. */
    srv->direct_io = o->direct_io || (o->writable && r->n_views > 1);
    srv->keep_cache = !o->share;
    srv->debug = o->debug;
    srv->n_running = cpus < 2 ? 2 : (unsigned)cpus;
    srv->attr_valid = o->writable || o->share ? 1 : 3600;
    srv->uid = o->uid == OPT_UNSET ? getuid() : o->uid;
    srv->gid = o->gid == OPT_UNSET ? getgid() : o->gid;
    srv->mode = o->mode == OPT_UNSET ? (o->writable ? 0600 : 0400) : o->mode;
}

/*
 * The kernel may serve a whole raw file alone. Not when it is written but must not grow: the kernel would not
 * ask us before it writes past the end.
 */
static bool run_may_pass_through(const struct run *r)
{
    const struct server *srv = &r->srv;

    return !r->o->no_passthrough && !r->o->share && !srv->direct_io && r->im.format == &raw_format &&
           r->im.n_files == 1 && !r->im.files[0].is_blk && srv->views[0].start == 0 &&
           srv->views[0].size == r->im.size && (!srv->writable || (srv->growable && srv->resizable));
}

static int run_mount(struct run *r)
{
    const struct options *o = r->o;
    struct mount_wanted want = { .extra = o->extra,
                                 .writable = o->writable,
                                 .allow_other = &r->srv.allow_other,
                                 .may_drop_allow_other = o->allow_other == ALLOW_AUTO };
    int ret;

    want.source = r->source;
    r->srv.allow_other = o->allow_other != ALLOW_OFF;
    ret = mnt_mount(&r->mp, &want);
    if (ret)
        return ret;
    if ((r->srv.mode & 077) && !r->srv.allow_other)
        return msg_err(-EPERM,
                       "--mode %o is of no use without --allow-other=on: nobody else reaches the mount",
                       r->srv.mode);
    if ((r->srv.mode & 0222) && !o->writable)
        return msg_err(-EROFS, "--mode %o on a read-only export: add -w", r->srv.mode);
    return 0;
}

/* The server's whole life, in the child. Returns its exit status. */
static int run_server(struct run *r, int ready_fd)
{
    /* The supervisor unmounts, and that ends us. */
    static const int ignored[] = { SIGINT,  SIGTERM,   SIGHUP,  SIGQUIT, SIGUSR2,
                                   SIGALRM, SIGVTALRM, SIGPROF, SIGXFSZ };
    struct sigaction usr1 = {
        .sa_handler = loop_on_usr1
    }; /* without SA_RESTART: it must interrupt read(2) */
    bool pass = run_may_pass_through(r);
    int fd = r->mp.session_fd, ret;

    for (size_t i = 0; i < ARRAY_LEN(ignored); i++)
        signal(ignored[i], SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    (void)setsid();                 /* away from the terminal's signals, and from Ctrl-Z */
    (void)!chdir("/");
    sigaction(SIGUSR1, &usr1, NULL);
    sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
    util_close(&r->sig_fd);
    util_close(&r->shell_fd);
    util_close_inherited();

    ret = loop_handshake(&r->srv, fd, &pass);
    if (!ret && pass)
        loop_pass_through(&r->srv, fd);
    if (!ret)
        mnt_raise_readahead(&r->mp, 1024);
    if (!ret)
        ret = box_enter(r->o->sandbox);
    if (!ret && (util_fault("ready") || write(ready_fd, "", 1) != 1))
        ret = msg_err(-EIO, "cannot tell the supervisor that all is ready");
    close(ready_fd);
    if (ret)
        return EXIT_FAILED;
    ret = loop_run(&r->srv);
    if (img_sync(&r->im) || r->im.failed)
        ret = msg_err(-EIO, "%s: not everything that was written reached it", r->im.name);
    return ret ? EXIT_FAILED : EXIT_OK;
}

static void run_null_stdio(int first, int last)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    for (int fd = first; null >= 0 && fd <= last; fd++)
        dup2(null, fd);
    if (null > STDERR_FILENO)
        close(null);
}

/* What the server alone may hold from now on. */
static void run_let_go(struct run *r)
{
    loop_release(&r->srv, r->mp.session_fd);
    mnt_end_session(&r->mp);
    img_close(&r->im);
    cache_stop();
}

static int run_fork_server(struct run *r)
{
    int ready[2] = { -1, -1 }, log[2] = { -1, -1 };

    if (util_fault("ready pipe") || pipe2(ready, O_CLOEXEC) < 0)
        return msg_err(-errno, "pipe: %s", strerror(errno));
    r->ready_fd = ready[0];
    if (r->shell_fd >= 0 && (util_fault("log pipe") || pipe2(log, O_CLOEXEC) < 0)) {
        close(ready[1]);
        return msg_err(-errno, "pipe: %s", strerror(errno));
    }
    r->log_fd = log[0];
    r->server = util_fault("fork") ? -1 : fork();
    if (r->server == 0) {
        close(ready[0]);
        if (log[1] >= 0) {
            run_null_stdio(STDIN_FILENO, STDOUT_FILENO);
            fcntl(log[1], F_SETFL, O_NONBLOCK);     /* a supervisor that was stopped must not stop us */
            dup2(log[1], STDERR_FILENO);
            close(log[1]);
            close(log[0]);
        }
        _exit(run_server(r, ready[1]));
    }
    close(ready[1]);
    util_close(&log[1]);
    if (r->server > 0)
        return 0;
    r->server = 0;
    return msg_err(-EAGAIN, "fork: %s", strerror(errno));
}

static int run_wait_ready(struct run *r)
{
    while (!r->ready && !r->not_ready && !r->stop_signals)
        run_poll(r, -1);
    if (r->stop_signals)
        return msg_err(-EINTR, "interrupted before the mount was ready");
    return r->ready ? 0 : -EIO;     /* the server has said why */
}

/* Follows no link and writes into nothing but a file: pidfiles lie in folders of many. */
static int run_write_pidfile(struct run *r)
{
    struct stat st;
    int fd, ret = 0;

    if (!r->o->pidfile)
        return 0;
    fd = util_fault("pidfile")
             ? -1
             : open(r->pidfile, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644);
    if (fd < 0)
        return msg_err(-errno, "%s: %s", r->pidfile, strerror(errno));
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        ret = -EINVAL;
    else if (ftruncate(fd, 0) < 0 || dprintf(fd, "%d\n", (int)getpid()) < 0)
        ret = -errno;
    close(fd);
    if (ret && ret != -EINVAL)
        unlink(r->pidfile);
    return ret ? msg_err(ret, "%s: %s", r->pidfile, ret == -EINVAL ? "not a regular file" : strerror(-ret))
               : 0;
}

/* Only while it says our number: another instance may have taken it over. */
static void run_remove_pidfile(const struct run *r)
{
    int fd = r->o->pidfile ? open(r->pidfile, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC) : -1;
    char text[16] = "";

    if (fd >= 0 && read(fd, text, sizeof(text) - 1) > 0 && atoi(text) == (int)getpid())
        unlink(r->pidfile);
    util_close(&fd);
}

/* systemd's readiness protocol: one datagram. */
static void run_notify(const char *state)
{
    const char *name = getenv("NOTIFY_SOCKET");
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    size_t len = name ? strlen(name) : 0;
    char text[64];
    int fd, n;

    if (len < 2 || len >= sizeof(addr.sun_path) || (*name != '/' && *name != '@'))
        return;
    memcpy(addr.sun_path, name, len);
    if (*name == '@')
        addr.sun_path[0] = 0;
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    n = snprintf(text, sizeof(text), "%s\nMAINPID=%d", state, (int)getpid());
    if (fd >= 0)
        (void)!sendto(fd, text, (size_t)n, MSG_NOSIGNAL, (struct sockaddr *)&addr,
                      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len));
    util_close(&fd);
}

/* Everyone who waits may go on. In the background this is where the shell's process returns 0. */
static int run_announce(struct run *r)
{
    if (r->shell_fd < 0) {
        run_notify("READY=1");
        return 0;
    }
    if (util_fault("announce") || setsid() < 0)
        return msg_err(-errno, "setsid: %s", strerror(errno));
    (void)!chdir("/");
    if (write(r->shell_fd, "", 1) != 1)
        return msg_err(-EPIPE, "%s: whoever asked for it has gone, unmounting", r->mp.path);
    util_close(&r->shell_fd);
    run_notify("READY=1");
    if (access("/dev/log", W_OK) < 0)
        msg_kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    openlog("fuseexp", LOG_PID, LOG_DAEMON);
    msg_to_syslog = true;
    run_null_stdio(STDIN_FILENO, STDERR_FILENO);
    return 0;
}

static int run_start_command(struct run *r)
{
    pid_t pid;

    if (!r->o->command)
        return 0;
    pid = util_fault("command") ? -1 : fork();
    if (pid < 0)
        return msg_err(-errno, "fork: %s", strerror(errno));
    if (pid == 0) {
        signal(SIGPIPE, SIG_DFL);
        (void)setrlimit(RLIMIT_NOFILE, &r->old_files);
        sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
        execvp(r->o->command[0], r->o->command);
        msg_err(0, "%s: %s", r->o->command[0], strerror(errno));
        _exit(errno == ENOENT ? EXIT_CMD_NOT_FOUND : EXIT_CMD_NOT_EXECUTABLE);
    }
    r->command = pid;
    return 0;
}

/* Unmounts, waiting up to patience milliseconds for users to leave (udev looks at every new loop device). */
static bool run_unmount(struct run *r, int patience)
{
    struct mount_entry where;
    int ret = 0;

    for (; r->server > 0 && mnt_where(&r->mp, &where); patience -= 20) {
        ret = mnt_unmount(where.path, 0);
        if (ret == 0)
            return true;
        if (ret != -EBUSY || patience <= 0)
            break;
        run_poll(r, 20);
    }
    if (r->server > 0 && where.covered) {
        msg_err(0, "%s: something is mounted over it, which must go first", r->mp.path);
        return false;
    }
    if (r->server == 0 || !mnt_where(&r->mp, &where))
        return true;
    if (ret == -EBUSY)
        msg_say(MSG_NOTE, "%s: in use, detached; it ends with its last user (another signal cuts it off now)",
                where.path);
    ret = mnt_unmount(where.path, MNT_DETACH);
    if (ret)
        msg_err(ret, "%s: cannot unmount: %s", where.path, *mnt_said ? mnt_last_words() : strerror(-ret));
    return !ret;
}

/* The second signal: no more waiting for users. */
static void run_cut_off(struct run *r)
{
    mnt_abort(&r->mp);
    kill(r->server, SIGKILL);
}

/* The last chance to leave nothing behind, so it takes more than one fork that fails to give up. */
static void run_release_mount(struct run *r)
{
    struct mount_entry where;
    int ret = 0;

    for (int tries = 0; tries < 10 && mnt_where(&r->mp, &where); tries++) {
        ret = mnt_unmount(where.path, MNT_DETACH);
        if (ret)
            poll(NULL, 0, 50);
        else
            r->mp.mounted = false;
    }
    if (ret && mnt_where(&r->mp, &where))
        msg_err(ret, "%s: cannot unmount: %s", where.path, *mnt_said ? mnt_last_words() : strerror(-ret));
    r->mp.mounted = false;
    mnt_end_session(&r->mp);
}

static void run_report_death(const struct run *r)
{
    int sig = WTERMSIG(r->server_status);

    if (r->server == 0 && WIFSIGNALED(r->server_status))
        msg_err(0, "%s: the server was killed by signal %d (%s); the mount is gone", r->mp.path, sig,
                strsignal(sig));
}

/* Until the server is gone. Whoever unmounts ends it: we, umount(8), fusermount3, a kernel without memory. */
static void run_supervise(struct run *r)
{
    unsigned handled = r->stop_signals;
    bool unmounted = false;

    while (r->server > 0) {
        bool stop = r->stop_signals > handled, command_ended = r->o->command && r->command == 0;
        handled = r->stop_signals;
        if (stop && unmounted)
            run_cut_off(r);
        else if (!unmounted && (stop || command_ended))
            unmounted = run_unmount(r, command_ended ? 2000 : 0);
        if (r->server > 0 && r->stop_signals == handled)
            run_poll(r, command_ended && !unmounted ? 1000 : -1);
    }
    run_report_death(r);
    run_release_mount(r);
    while (r->command > 0) /* its disk is gone, but its status is still to be told */
        run_poll(r, -1);
}

/*
 * After a failure: ends the server. If it was ready, somebody may have the file open already; he is cut off,
 * so that the server ends as after any unmount, with its flush.
 */
static void run_stop_server(struct run *r)
{
    while (r->log_fd >= 0 && r->server > 0 && r->not_ready)
        run_relay_log(r); /* its last words: it is leaving by itself */
    if (r->server > 0 && r->ready) {
        mnt_abort(&r->mp);
        run_release_mount(r);
        for (int i = 0; i < 100 && r->server > 0; i++)
            run_poll(r, 20);
    }
    if (r->server > 0) {
        kill(r->server, SIGKILL);
        if (waitpid(r->server, &r->server_status, 0) == r->server)
            r->server = 0;
    }
    while (r->log_fd >= 0)
        run_relay_log(r);
}

/* The exit status of the whole, once the server (and the command) have ended. */
static int run_status(const struct run *r)
{
    bool good = WIFEXITED(r->server_status) && WEXITSTATUS(r->server_status) == EXIT_OK;

    if (!r->o->command)
        return good ? EXIT_OK : EXIT_FAILED;
    if (WIFSIGNALED(r->command_status))
        return 128 + WTERMSIG(r->command_status);
    return WEXITSTATUS(r->command_status) == 0 && !good ? EXIT_CMD_NOT_STARTED
                                                        : WEXITSTATUS(r->command_status);
}

static unsigned run_threads(const struct options *o)
{
    return o->single_thread ? 1 : o->threads ? o->threads : DEFAULT_THREADS;
}

/* Serves until unmounted. shell_fd: who waits for readiness, or -1. Returns the exit status. */
static int run_export(const struct options *o, int shell_fd)
{
    int status = o->command ? EXIT_CMD_NOT_STARTED : EXIT_FAILED;
    struct run *r = calloc(1, sizeof(*r));

    if (!r) {
        msg_err(0, "out of memory");
        goto out;
    }
    *r = (struct run){
        .o = o, .shell_fd = shell_fd, .sig_fd = -1, .ctl_fd = -1, .ready_fd = -1, .log_fd = -1
    };
    r->mp.session_fd = -1;

    if (run_take_signals(r))
        goto out_signals;
    run_raise_file_limit(r);
    if (run_make_control(r))
        goto out_control;
    if (mnt_resolve(o->mountpoint, r->mp.path) || mnt_clear_stale(r->mp.path))
        goto out_control;
    if (o->pidfile && mnt_resolve_folder(o->pidfile, r->pidfile))
        goto out_control;
    if (run_open_image(r))
        goto out_image;
    if (shell_fd >= 0)
        util_close_inherited();     /* not sooner: IMAGE may be /dev/fd/9 */
    run_setup_server(r);
    if (mnt_create(&r->mp))
        goto out_mountpoint;
    if (run_mount(r))
        goto out_mount;
    run_name_control(r);
    if (loop_prepare(&r->srv, run_threads(o), r->mp.session_fd))
        goto out_workers;
    if (run_fork_server(r))
        goto out_server;
    run_let_go(r);
    if (run_wait_ready(r))
        goto out_server;
    if (run_write_pidfile(r))
        goto out_server;
    if (run_start_command(r) || run_announce(r))
        goto out_pidfile;
    run_supervise(r);
    status = run_status(r);

out_pidfile:
    run_remove_pidfile(r);
out_server:
    run_stop_server(r);
    util_close(&r->ready_fd);
out_workers:
    loop_release(&r->srv, r->mp.session_fd);
out_mount:
    run_release_mount(r);
out_mountpoint:
    mnt_remove(&r->mp);
out_image:
    img_close(&r->im);
    cache_stop();
out_control:
    run_close_control(r, status);
out_signals:
    util_close(&r->sig_fd);
    util_close(&r->shell_fd);
    sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
    free(r);
out:
    return status;
}

/*
 * Goes into the background. In the child, returns 0 with *shell_fd to report readiness to. In the process
 * that the user started, returns 1 with its exit status once the child is ready or has failed.
 */
static int run_background(int *shell_fd, int *status)
{
    int fds[2], wait_status;
    char byte;
    pid_t pid;

    if (util_fault("background pipe") || pipe2(fds, O_CLOEXEC) < 0)
        return msg_err(-errno, "pipe: %s", strerror(errno));
    pid = util_fault("background") ? -1 : fork();
    if (pid < 0) {
        close(fds[0]);
        close(fds[1]);
        return msg_err(-errno, "fork: %s", strerror(errno));
    }
    if (pid == 0) {
        close(fds[0]);
        *shell_fd = fds[1];
        return 0;
    }
    close(fds[1]);
    if (read(fds[0], &byte, 1) == 1)
        *status = EXIT_OK;
    else if (waitpid(pid, &wait_status, 0) == pid && WIFEXITED(wait_status) && WEXITSTATUS(wait_status) != 0)
        *status = WEXITSTATUS(wait_status);
    else
        *status = EXIT_FAILED;
    close(fds[0]);
    return 1;
}

/* ******************************************************************************************************** *
 * 17. One-shot commands
 * ******************************************************************************************************** */

/* Waits until every server of the mount has ended. */
static int cmd_wait_for_servers(const char *path, struct pollfd *fds, size_t n)
{
    int status = EXIT_OK;
    char byte;

    for (size_t i = 0; i < n; i++) {
        while (poll(&fds[i], 1, -1) < 0 && errno == EINTR)
            ;
        if (read(fds[i].fd, &byte, 1) != 1) {
            msg_err(0, "%s: its supervisor was killed, so nobody knows how it ended", path);
            status = EXIT_FAILED;
        } else if (byte != EXIT_OK) {
            msg_err(0, "%s: unmounted, but it reported failure %d (see syslog or dmesg)", path, byte);
            status = EXIT_FAILED;
        }
        close(fds[i].fd);
    }
    return status;
}

static int cmd_umount(const struct options *o)
{
    struct pollfd fds[MAX_WAITERS];
    struct mount_entry entry = { 0 };
    struct statfs fs;
    char path[PATH_MAX];
    bool unseen;
    size_t n;
    int ret;

    if (mnt_resolve(o->mountpoint, path))
        return EXIT_FAILED;
    ret = mnt_find(path, 0, 0, &entry);
    if (ret < 0)
        return EXIT_FAILED;
    if (ret == 0 || !entry.fuseexp) {
        msg_err(0, "%s: fuseexp has nothing mounted there", o->mountpoint);
        return EXIT_FAILED;
    }
    n = mnt_find_servers(&entry, fds, MAX_WAITERS);
    unseen = n == 0 && statfs(path, &fs) == 0;
    ret = mnt_unmount(path, o->lazy ? MNT_DETACH : 0);
    for (int tries = 0; ret == -EBUSY && tries < 50; tries++) {     /* udev looks at every new loop device */
        poll(NULL, 0, 20);
        ret = mnt_unmount(path, 0);
    }
    if (ret)
        msg_err(0, "%s: %s", o->mountpoint,
                ret == -EBUSY ? "in use (fuser -m names the users, losetup -a the loop devices; "
                                "-z detaches it now)"
                : *mnt_said   ? mnt_last_words()
                              : strerror(-ret));
    else if (!o->lazy && unseen)
        ret = msg_err(
            -ESRCH,
            "%s: unmounted, but its server cannot be waited for (it is not in this network namespace)",
            o->mountpoint);
    else if (!o->lazy)
        return cmd_wait_for_servers(o->mountpoint, fds, n);
    while (n)
        close(fds[--n].fd);
    return ret ? EXIT_FAILED : EXIT_OK;
}

static int cmd_formats(void)
{
    printf("%-10s %-10s %s\n", "FORMAT", "WRITES", "WHAT");
    for (size_t i = 0; i < ARRAY_LEN(img_formats); i++)
        printf("%-10s %-10s %s\n", img_formats[i]->name, img_formats[i]->writes, img_formats[i]->describe);
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_FAILED;
}

static int cmd_version(void)
{
    printf("fuseexp %s (libfuse %s, libdeflate %s)\n", FUSEEXP_VERSION, fuse_pkgversion(),
           LIBDEFLATE_VERSION_STRING);
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_FAILED;
}

#ifdef FUSEEXP_FAULTS
/* For the tests: does the sandbox refuse what it should, and let work go on? */
static void *cmd_sandboxed_thread(void *arg)
{
    void *memory = malloc(1 << 20);

    free(memory);
    return memory ? arg : NULL;
}

static int cmd_try_sandbox(void)
{
    char *no_args[] = { NULL };
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), sock = socket(AF_UNIX, SOCK_DGRAM, 0), bad = 0;
    pthread_t thread;
    void *result = NULL;
    char byte;
    pid_t pid;

    if (file < 0 || sock < 0 || box_enter(BOX_REQUIRE))
        return EXIT_FAILED;
    bad |= (open("/proc/self/exe", O_RDONLY | O_CLOEXEC) >= 0) << 0;
    bad |= (socket(AF_INET, SOCK_STREAM, 0) >= 0) << 1;
    bad |= (connect(sock, (struct sockaddr *)&addr, sizeof(addr)) == 0 || errno != EPERM) << 2;
    bad |= (execv("/bin/true", no_args) == 0 || errno != EPERM) << 3;
    pid = fork();
    if (pid == 0)
        _exit(0);
    bad |= (pid > 0) << 4;
    bad |= (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) << 5;
    bad |= (mount("none", "/", "tmpfs", 0, NULL) == 0 || unlink("/no/such/file") == 0 || errno != EPERM) << 6;
    bad |= (pread(file, &byte, 1, 0) != 1) << 7;
    bad |= (pthread_create(&thread, NULL, cmd_sandboxed_thread, &byte) != 0 ||
            pthread_join(thread, &result) != 0 || result != &byte)
           << 8;
    return bad ? msg_err(EXIT_FAILED, "the sandbox failed, bits 0x%x", (unsigned)bad) : EXIT_OK;
}

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

/*
 * For the tests: random requests of every kind and length; what lies behind a request may not be looked at.
 */
static int cmd_fuzz_requests(unsigned long n, char *path, bool writable)
{
    static struct view views[MAX_VIEWS];
    struct image im = { .writable = writable };
    struct server srv = { .im = &im,
                          .views = views,
                          .is_dir = true,
                          .writable = writable,
                          .growable = writable,
                          .resizable = writable,
                          .mode = 0600 };
    struct worker w = { .srv = &srv, .pipe = { -1, -1 }, .buf = calloc(1, LOOP_BUF) };
    struct part_wanted want = { .offset = 0 };
    struct image_options opt = { .format = "raw" };
    int ret = img_open(&im, &path, 1, &opt);

    srand(1);
    ret = ret ? ret : part_make_views(&im, &want, views, &srv.n_views);
    for (msg_verbosity = MSG_ERROR; n && !ret; n--) {
        struct fuse_in_header *head = (struct fuse_in_header *)w.buf;
        size_t len = (unsigned)rand() % (rand() % 8 ? 160 : FX_HEAD_ROOM - sizeof(struct fuse_out_header));
        for (size_t i = 0; i < len; i++)
            w.buf[i] = (uint8_t)(rand() % 3 ? 0 : rand());
        if (len >= sizeof(*head)) {
            head->len = rand() % 16 ? (uint32_t)len : (uint32_t)rand();
            head->opcode = (unsigned)rand() % 56;
            head->nodeid = (unsigned)rand() % 4;
        }
        ASAN_POISON_MEMORY_REGION(w.buf + len, FX_HEAD_ROOM - sizeof(struct fuse_out_header) - len);
        w.ref.length = 0;
        size_t reply = fop_handle(&w, len);
        ASAN_UNPOISON_MEMORY_REGION(w.buf, FX_HEAD_ROOM);
        if (reply > LOOP_BUF || (reply && reply < sizeof(struct fuse_out_header)) || im.size > 1ull << 40)
            ret = im.size > 1ull << 40 ? img_resize(&im, 4096, false) : -EPROTO;
    }
    free(w.buf);
    img_close(&im);
    return ret ? EXIT_FAILED : EXIT_OK;
}

static bool cmd_self_test(int argc, char **argv, int *status)
{
    if (argc == 2 && strcmp(argv[1], "--try-sandbox") == 0)
        *status = cmd_try_sandbox();
    else if (argc >= 4 && strcmp(argv[1], "--fuzz-requests") == 0)
        *status = cmd_fuzz_requests(strtoul(argv[2], NULL, 10), argv[argc - 1], argc == 5);
    else
        return false;
    return true;
}
#else
#define cmd_self_test(argc, argv, status) ((void)(argc), (void)(argv), (void)(status), false)
#endif

/* ******************************************************************************************************** *
 * 18. Options
 *
 * opt_table feeds getopt_long(3), -o (by the long names) and --help. What -o does not know goes to the mount.
 * ******************************************************************************************************** */

enum opt_kind {
    OPT_SET,
    OPT_CLEAR,
    OPT_TEXT,
    OPT_SIZE,
    OPT_COUNT,
    OPT_ID,
    OPT_OCTAL,
    OPT_CHOICE,
    OPT_ACTION,
    OPT_MOUNT
};

#define OPT_AT(field) offsetof(struct options, field)

static const struct opt {
    char letter;
    const char *name, *arg;         /* arg: NULL, the name of the value, or the choices */
    enum opt_kind kind;
    size_t at;
    uint32_t value;                 /* OPT_ACTION: which; OPT_COUNT, OPT_ID: the largest; OPT_SIZE: not 0 */
    const char *help;
} opt_table[] = {
    { 'f', "foreground", NULL, OPT_SET, OPT_AT(foreground), 0, "stay in front" },
    { 'd', "debug", NULL, OPT_SET, OPT_AT(debug), 0, "show every request (and stay in front)" },
    { 's', "single-thread", NULL, OPT_SET, OPT_AT(single_thread), 0, "one worker" },
    { 'r', "read-only", NULL, OPT_CLEAR, OPT_AT(writable), 0, "change nothing (the default)" },
    { 'w', "writable", NULL, OPT_SET, OPT_AT(writable), 0, "let the export be written, and so the image" },
    { 'U', "force-share", NULL, OPT_SET, OPT_AT(share), 0, "read an image that another program has open" },
    { 'o', NULL, "OPT[,OPT...]", OPT_MOUNT, 0, 0, "long options without their dashes, and mount options" },
    { 'v', "verbose", NULL, OPT_SET, OPT_AT(verbose), 0, "say what is decided" },
    { 'q', "quiet", NULL, OPT_SET, OPT_AT(quiet), 0, "errors only" },
    { 0, "format", "NAME", OPT_TEXT, OPT_AT(format), 0, "take IMAGE for this format (see --formats)" },
    { 0, "snapshot", "ID|NAME", OPT_TEXT, OPT_AT(snapshot), 0, "show this internal snapshot" },
    { 0, "backing", "FILE", OPT_TEXT, OPT_AT(backing), 0,
      "the backing file, instead of what the image says" },
    { 0, "backing-format", "NAME", OPT_TEXT, OPT_AT(backing_format), 0, "and its format" },
    { 0, "data-file", "FILE", OPT_TEXT, OPT_AT(data_file), 0, "the external data file" },
    { 0, "allow-external", "DIR", OPT_TEXT, OPT_AT(allow_external), 0,
      "images may name files below this folder" },
    { 0, "no-backing", NULL, OPT_SET, OPT_AT(no_backing), 0,
      "open no backing file; its data reads as errors" },
    { 0, "force-parent", NULL, OPT_SET, OPT_AT(force_parent), 0,
      "take a parent whose identity is another one" },
    { 0, "ignore-log", NULL, OPT_SET, OPT_AT(ignore_log), 0,
      "read a VHDX whose log cannot be replayed without it" },
    { 0, "cache-size", "N[kMGT]", OPT_SIZE, OPT_AT(cache_size), 1, "for tables and decoded clusters (64M)" },
    { 0, "no-parts", NULL, OPT_SET, OPT_AT(no_parts), 0,
      "IMAGE alone, even if it looks like a part of a split image" },
    { 0, "offset", "N[kMGT]", OPT_SIZE, OPT_AT(offset), 0, "show the image from this byte on" },
    { 0, "size", "N[kMGT]", OPT_SIZE, OPT_AT(size), 1, "and so many bytes of it" },
    { 0, "partition", "N", OPT_COUNT, OPT_AT(partition), 1024 * 1024,
      "show partition N alone, counted as Linux does" },
    { 0, "sector-size", "512|4096", OPT_COUNT, OPT_AT(sector_size), 4096, "of the partition table" },
    { 0, "growable", NULL, OPT_SET, OPT_AT(growable), 0,
      "with -w: writing past the end makes the image longer" },
    { 0, "direct-io", NULL, OPT_SET, OPT_AT(direct_io), 0, "no page cache above the image" },
    { 0, "no-passthrough", NULL, OPT_SET, OPT_AT(no_passthrough), 0, "serve raw images by workers too" },
    { 0, "threads", "N", OPT_COUNT, OPT_AT(threads), MAX_THREADS, "workers" },
    { 0, "mode", "OCTAL", OPT_OCTAL, OPT_AT(mode), 07777, "of the files shown (0400, with -w 0600)" },
    { 0, "uid", "N", OPT_ID, OPT_AT(uid), UINT32_MAX - 1, "their owner" },
    { 0, "gid", "N", OPT_ID, OPT_AT(gid), UINT32_MAX - 1, "their group" },
    { 0, "allow-other", "auto|on|off", OPT_CHOICE, OPT_AT(allow_other), 0,
      "may other users reach the mount" },
    { 0, "pidfile", "FILE", OPT_TEXT, OPT_AT(pidfile), 0,
      "holds the supervisor's process number while mounted" },
    { 0, "sandbox", "auto|off|require", OPT_CHOICE, OPT_AT(sandbox), 0, "lock the serving process in" },
    { 'u', "umount", NULL, OPT_ACTION, OPT_AT(action), ACT_UMOUNT,
      "unmount, and wait until the image is free" },
    { 'z', "lazy", NULL, OPT_SET, OPT_AT(lazy), 0, "with --umount: detach at once, do not wait" },
    { 0, "formats", NULL, OPT_ACTION, OPT_AT(action), ACT_FORMATS, "list what can be read and written" },
    { 'V', "version", NULL, OPT_ACTION, OPT_AT(action), ACT_VERSION, "say which version this is" },
    { 'h', "help", NULL, OPT_ACTION, OPT_AT(action), ACT_HELP, "show this" },
};

/* fstab's own words, and what mount(8) adds: nothing to us. */
static const char *const opt_ignored[] = {
    "defaults",    "auto",     "noauto", "nofail",  "user",     "nouser",     "users",
    "owner",       "rw",       "dev",    "suid",    "relatime", "norelatime", "nodiratime",
    "strictatime", "lazytime", "group",  "_netdev", "loop",
};

static int opt_usage(const char *text)
{
    printf("Usage: fuseexp [OPTION...] IMAGE... MOUNTPOINT [-- COMMAND [ARG...]]\n"
           "       fuseexp --umount [-z] MOUNTPOINT\n"
           "       fuseexp --formats | --version | --help\n\n%s"
           "Shows a disk image as one plain raw file (MOUNTPOINT a file, made if missing) or as a folder\n"
           "with the disk and its partitions (MOUNTPOINT a folder). Several IMAGEs are the parts of one, in "
           "order.\n\n",
           text);
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        const struct opt *opt = &opt_table[i];
        char left[64];
        int n = 0;
        if (opt->letter)
            n = snprintf(left, sizeof(left), "-%c%s", opt->letter, opt->name ? ", " : "");
        else
            n = snprintf(left, sizeof(left), "    ");
        snprintf(left + n, sizeof(left) - (size_t)n, "%s%s%s%s", opt->name ? "--" : "",
                 opt->name ? opt->name : "", opt->arg ? opt->name ? "=" : " " : "", opt->arg ? opt->arg : "");
        printf("  %-32s %s\n", left, opt->help);
    }
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_FAILED;
}

static int opt_bad(const struct opt *opt, const char *value)
{
    return msg_err(-EINVAL, "--%s: '%s' is not %s%s", opt->name, value,
                   opt->kind == OPT_CHOICE ? "one of " : "a usable ",
                   opt->kind == OPT_CHOICE || opt->kind == OPT_COUNT ? opt->arg
                   : opt->kind == OPT_SIZE                           ? "size"
                                                                     : "value");
}

static bool opt_choose(const char *choices, const char *value, uint32_t *index)
{
    size_t len = strlen(value), n;

    for (*index = 0; *choices; ++*index, choices += n + (choices[n] == '|')) {
        n = strcspn(choices, "|");
        if (n == len && strncmp(choices, value, n) == 0)
            return true;
    }
    return false;
}

static int opt_mount_options(struct options *o, char *list);

static int opt_apply(struct options *o, const struct opt *opt, char *value)
{
    void *at = (char *)o + opt->at;
    uint64_t number;
    uint32_t choice;
    char *end;

    switch (opt->kind) {
    case OPT_SET:
    case OPT_CLEAR:
        *(bool *)at = opt->kind == OPT_SET;
        return 0;
    case OPT_TEXT:
        *(char **)at = value;
        return 0;
    case OPT_SIZE:
        if (!util_parse_size(value, &number) || (number == 0 && opt->value))
            return opt_bad(opt, value);
        *(uint64_t *)at = number;
        return 0;
    case OPT_COUNT:
    case OPT_ID:
        if (!util_parse_size(value, &number) || number > opt->value ||
            (number == 0 && opt->kind == OPT_COUNT) || !isdigit((unsigned char)value[strlen(value) - 1]))
            return opt_bad(opt, value);
        *(uint32_t *)at = (uint32_t)number;
        return 0;
    case OPT_OCTAL:
        number = strtoul(value, &end, 8);
        if (!isdigit((unsigned char)*value) || *end || number > opt->value)
            return opt_bad(opt, value);
        *(uint32_t *)at = (uint32_t)number;
        return 0;
    case OPT_CHOICE:
        if (!opt_choose(opt->arg, value, &choice))
            return opt_bad(opt, value);
        *(uint32_t *)at = choice;
        return 0;
    case OPT_ACTION:
        *(uint32_t *)at = opt->value;
        return 0;
    case OPT_MOUNT:
        return opt_mount_options(o, value);
    }
    return -EINVAL;
}

static int opt_pass_to_mount(struct options *o, const char *word)
{
    if (fuse_opt_add_opt(&o->extra, word) == 0)
        return 0;
    return msg_err(-ENOMEM, "out of memory");
}

/*
 * One word of -o: ours, fstab's, or the mount's. mount(8) and mount.fuse3 say "rw,dev,suid" by themselves, so
 * "rw" must not make anything writable.
 */
static int opt_mount_option(struct options *o, char *word)
{
    char *value = strchr(word, '=');

    if (strcmp(word, "ro") == 0) {
        o->writable = false;
        return 0;
    }
    if (strcmp(word, "allow_other") == 0) {
        o->allow_other = ALLOW_ON;
        return 0;
    }
    for (size_t i = 0; i < ARRAY_LEN(opt_ignored); i++)
        if (strcmp(word, opt_ignored[i]) == 0)
            return 0;
    if (strncmp(word, "x-", 2) == 0 || strncmp(word, "X-", 2) == 0 || strncmp(word, "comment=", 8) == 0)
        return 0;
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        const struct opt *opt = &opt_table[i];
        size_t len = value ? (size_t)(value - word) : strlen(word);
        if (!opt->name || opt->kind == OPT_ACTION || strlen(opt->name) != len ||
            strncmp(opt->name, word, len) != 0)
            continue;
        if (!opt->arg != !value)
            return msg_err(-EINVAL, "-o %s: %s", word, value ? "takes no value" : "needs a value");
        return opt_apply(o, opt, value ? value + 1 : NULL);
    }
    return opt_pass_to_mount(o, word);
}

static int opt_mount_options(struct options *o, char *list)
{
    int ret = 0;

    for (char *save, *word = strtok_r(list, ",", &save); word && !ret; word = strtok_r(NULL, ",", &save))
        ret = opt_mount_option(o, word);
    return ret;
}

/* getopt_long's tables from ours. Returns 0, or < 0 after saying what is wrong. */
static int opt_getopt(struct options *o, int argc, char **argv)
{
    struct option longs[ARRAY_LEN(opt_table) + 1];
    char shorts[2 * ARRAY_LEN(opt_table) + 2] = ":";
    size_t n = 0, at = 1;
    int c, ret = 0;

    memset(longs, 0, sizeof(longs));
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        if (opt_table[i].name)
            longs[n++] = (struct option){ opt_table[i].name, opt_table[i].arg != NULL, NULL, 256 + (int)i };
        if (opt_table[i].letter)
            shorts[at++] = opt_table[i].letter;
        if (opt_table[i].letter && opt_table[i].arg)
            shorts[at++] = ':';
    }
    optind = 1;
    while (!ret && (c = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        if (c == ':')
            return msg_err(-EINVAL, "%s needs a value", argv[optind - 1]);
        if (c == '?' && optopt && optopt < 256)
            return msg_err(-EINVAL, "unknown option -%c (fuseexp --help lists them)", optopt);
        if (c == '?')
            return msg_err(-EINVAL, "unknown option %s (fuseexp --help lists them)", argv[optind - 1]);
        for (size_t i = 0; i < ARRAY_LEN(opt_table); i++)
            if (c == 256 + (int)i || c == opt_table[i].letter) {
                ret = opt_apply(o, &opt_table[i], optarg);
                break;
            }
    }
    return ret;
}

/* mount(8) calls: mount.fuseexp IMAGE MOUNTPOINT [-sfnvr] [-N namespace] [-t type] [-o options] */
static int opt_parse_helper(struct options *o, int argc, char **argv)
{
    static const struct option none[] = { { NULL, 0, NULL,
                                            0 } }; /* musl's getopt does not look behind IMAGE */
    int c, ret = 0;

    o->mount_helper = true;
    opterr = 0;
    while (!ret && (c = getopt_long(argc, argv, "sfnvrN:t:o:", none, NULL)) != -1) {
        if (c == 'o')
            ret = opt_mount_options(o, optarg);
        else if (c == 'r')
            o->writable = false;
        else if (c == 'v')
            o->verbose = true;
        else if (c == 'f')
            o->action = ACT_VERSION;    /* a fake mount: do nothing well */
        else if (c == '?')
            return msg_err(-EINVAL, "unknown option -%c", optopt);
    }
    return ret;
}

static int opt_check(struct options *o)
{
    if (o->lazy && o->action != ACT_UMOUNT)
        return msg_err(-EINVAL, "-z goes with --umount");
    if (o->growable && !o->writable)
        return msg_err(-EINVAL, "--growable goes with -w");
    if (o->growable && (o->offset || o->size || o->partition))
        return msg_err(-EINVAL,
                       "--growable goes with a whole image, not with --offset, --size or --partition");
    if (o->share && o->writable)
        return msg_err(-EINVAL, "-U is for reading: two writers would destroy the image");
    if (o->sector_size && o->sector_size != 512 && o->sector_size != 4096)
        return msg_err(-EINVAL, "--sector-size is 512 or 4096");
    if (o->mode != OPT_UNSET && (o->mode & 0222) && !o->writable)
        return msg_err(-EINVAL, "--mode %o on a read-only export: add -w", o->mode);
    return 0;
}

/* Everything before "--" is ours, everything after it the command, unless "--" only ends the options. */
static int opt_parse(struct options *o, int argc, char **argv)
{
    int end = 1, ret, n;

    while (end < argc && strcmp(argv[end], "--") != 0)
        end++;
    ret = strncmp(util_basename(argv[0]), "mount.", 6) == 0 ? opt_parse_helper(o, argc, argv)
                                                            : opt_getopt(o, end, argv);
    if (ret)
        return ret;
    n = (o->mount_helper ? argc : end) - optind;
    if (end < argc && n == 0 && o->action == ACT_EXPORT) {
        /* "fuseexp -r -- IMAGE MOUNTPOINT [-- COMMAND]" */
        memmove(&argv[end], &argv[end + 1], (size_t)(argc - end) * sizeof(*argv));
        for (argc--; end < argc && strcmp(argv[end], "--") != 0;)
            end++;
        n = end - optind;
    }
    if (end < argc && !o->mount_helper) {
        o->command = &argv[end + 1];
        argv[end] = NULL;
        if (!*o->command)
            return msg_err(-EINVAL, "no command after --");
    }
    if (o->action > ACT_UMOUNT)
        return n ? msg_err(-EINVAL, "%s: not expected here", argv[optind]) : 0;
    if (o->action == ACT_UMOUNT && n != 1)
        return msg_err(-EINVAL, "--umount takes one MOUNTPOINT");
    if (o->action == ACT_EXPORT && n < 2)
        return msg_err(-EINVAL,
                       "usage: fuseexp [OPTION...] IMAGE... MOUNTPOINT [-- COMMAND] (--help explains)");
    if (n - 1 > MAX_PARTS)
        return msg_err(-EINVAL, "more than %d parts", MAX_PARTS);
    o->images = &argv[optind];
    o->n_images = (unsigned)n - 1;
    o->mountpoint = argv[optind + n - 1];
    return opt_check(o);
}

/* ******************************************************************************************************** *
 * 19. Main
 * ******************************************************************************************************** */

/* Whoever started us with a standard stream closed must not find an image in its place. */
static void main_open_stdio(void)
{
    int fd;

    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

#ifdef FUSEEXP_FAULTS
static int main_count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}
#endif

static int main_export(const struct options *o)
{
    int shell_fd = -1, status = EXIT_FAILED;

    if (!o->foreground && !o->command && run_background(&shell_fd, &status) != 0)
        return status;
    return run_export(o, shell_fd);
}

int main(int argc, char **argv)
{
    struct options o = { .cache_size = 64 << 20, .mode = OPT_UNSET, .uid = OPT_UNSET, .gid = OPT_UNSET };
    int status = EXIT_USAGE;
#ifdef FUSEEXP_FAULTS
    int fds = main_count_fds();
#endif

    main_open_stdio();
    util_note_inherited();
    if (!cmd_self_test(argc, argv, &status) && opt_parse(&o, argc, argv) == 0) {
        msg_verbosity = o.debug ? MSG_DEBUG : o.verbose ? MSG_INFO : o.quiet ? MSG_ERROR : MSG_NOTE;
        o.foreground |= o.debug;
        status = o.action == ACT_UMOUNT    ? cmd_umount(&o)
                 : o.action == ACT_FORMATS ? cmd_formats()
                 : o.action == ACT_VERSION ? cmd_version()
                 : o.action == ACT_HELP    ? opt_usage("")
                                           : main_export(&o);
    }
    free(o.extra);
#ifdef FUSEEXP_FAULTS
    if (o.mountpoint && main_count_fds() + util_n_closed != fds)
        status = msg_err(99, "FAULT: %d descriptors at the end, %d at the start", main_count_fds(), fds);
#endif
    return status;
}
