/* SPDX-License-Identifier: MIT */
/*
 * fuseexp: shows what is inside a disk image as one plain raw file, through FUSE.
 *
 *   worker: read(/dev/fuse clone) -> fop_<op>() -> img_read() or img_write() -> format->map()
 *           -> file_pread() or file_pwrite() -> write(reply)
 *
 *    1. Messages               msg_        the only writer of stderr; four levels
 *    2. Utilities              util_       bytes, numbers, ranges, descriptors, fault injection
 *    3. GUIDs and text         text_       identifiers, encodings, letter case
 *    4. Output                 out_        JSON, or lines for people
 *    5. Epochs                 epoch_      when every request of a time has ended
 *    6. Worker pool            pool_       how many workers run
 *    7. Host files             file_       every system call on an image
 *    8. Codecs                 codec_      one compressed cluster
 *    9. Table cache            cache_      tables, and the budget that decoded clusters share
 *   10. Decoded clusters       decoded_    what compressed clusters decode to
 *   11. Format helpers         fmt_, ext_  refusals, opening by name, extents
 *   12. Lost ranges            lost_       what could not be read, for --error-map, or was not, by a mapfile
 *   13. Image I/O              img_        reads, writes and resizes any image through its driver
 *   14. Raw images             raw_        the driver to copy
 *   15. VDI                    vdi_        VirtualBox's format
 *   16. QED                    qed_        QEMU's older format
 *   17. VHD                    vhd_        Virtual PC, Hyper-V 2008, Azure: fixed, dynamic, differencing
 *   18. VHDX                   vhdx_       Hyper-V: fixed, dynamic, differencing, with a log
 *   19. VMDK                   vmdk_       VMware's formats
 *   20. Parallels              prl_        images, and bundles of them
 *   21. qcow2                  qcow2_      QEMU's format, for reading
 *   22. qcow2 writing          qcow2_      allocation, commits, overlays
 *   23. qcow2 check            qcow2_      counting references, repair, before the first write
 *   24. Probing                probe_      which format a file has; the table of formats
 *   25. Checks                 check_      the look at every open, and --check for most formats
 *   26. Chains                 chain_      opening an image and its backing files
 *   27. Overlays               overlay_    made, published and opened for --overlay and --temporary
 *   28. Partitions             part_       MBR, GPT, the views
 *   29. FUSE operations        fop_        request in, reply out; knows no descriptor of FUSE
 *   30. Worker loop            loop_       the transport
 *   31. Sandbox                box_        what the serving process gives up
 *   32. Options                opt_        one table for getopt, -o and --help
 *   33. Mounts                 mnt_        mountpoint, mount table, mounting, unmounting
 *   34. Life cycle             run_        supervisor and server, the clean-up chain
 *   35. One-shot commands      cmd_        --umount, --info, --map, --check, --formats, --version
 *   36. Main
 *
 * Processes: the supervisor (this program as started, or its background child) mounts, forks the server,
 * unmounts and cleans up; the server alone holds the image and /dev/fuse, runs sandboxed, and has one worker
 * per thread.
 *
 * Locks, all in the server, in the order in which they are taken:
 *   image.size_lock      growing and truncating; readers take the atomic size without it
 *   writer.commit_lock   one commit of changed tables at a time (qcow2)
 *   writer.lock          every change of a table; not held while data is written (qcow2)
 *   cache.set_lock       refilling table slots of a set; readers take none
 *   writer.changes.lock  the words that the file lacks (qcow2)
 *   decoded.lock         the list of decoded clusters; not held while decoding
 *   img_streams.lock, lost_list.lock   sequential readers; ranges that could not be read
 *   pool.lock            parking, waking, jobs; taken around operations that may sleep
 *   everything else is immutable once the workers run, or an atomic of its own, or belongs to one worker
 *
 * To understand the rest, start reading at main().
 */
#include "fuseexp.h"

#include <ctype.h>
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <iconv.h>
#include <inttypes.h>
#include <libdeflate.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
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
#include <sys/xattr.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>
#include <wctype.h>
#include <zstd.h>

/* ******************************************************************************************************** *
 * 1. Messages
 *
 * One line each, with one write(2). Control characters become "?": names come from strangers' disks.
 *   error  something the user asked for was not done         always
 *   note   done, but the user should know                    not with -q
 *   info   what was decided                                  with -v
 *   debug  every request                                     with -d
 * ******************************************************************************************************** */

enum msg_level { MSG_ERROR, MSG_NOTE, MSG_INFO, MSG_DEBUG };

static enum msg_level msg_verbosity = MSG_NOTE;
static int msg_kmsg = -1;           /* with msg_to_syslog: the kernel's log, if nothing listens at /dev/log */
static unsigned msg_hushed;         /* > 0: silent, while files are tried that may be the wrong ones */
static bool msg_to_syslog;          /* in the background there is no stderr */

__attribute__((format(printf, 1, 0))) static void msg_put(const char *fmt, va_list ap)
{
    char line[1200] = "fuseexp: ";
    size_t head = strlen(line);
    int n = vsnprintf(line + head, sizeof(line) - head - 1, fmt, ap);
    size_t len = n < 0 ? head : head + (size_t)n;

    if (msg_hushed)
        return;
    if (len > sizeof(line) - 2)
        len = sizeof(line) - 2;
    for (size_t i = head; i < len; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
            line[i] = '?';
    line[len] = msg_to_syslog ? 0 : '\n';
    if (msg_to_syslog && msg_kmsg >= 0)
        dprintf(msg_kmsg, "<4>%.900s\n", line);   /* /dev/kmsg refuses more than about 1000 bytes */
    else if (msg_to_syslog)
        syslog(LOG_DAEMON | LOG_WARNING, "%s", line + head);
    else
        (void)!write(STDERR_FILENO, line, len + 1);
}

/* Reports an error where it is detected, and returns it: return msg_err(-EIO, ...). */
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

/* Errors while serving, of which a damaged disk has millions: at most ten lines a second, the rest is counted. */
__attribute__((format(printf, 2, 3))) static int msg_serving(int ret, const char *fmt, ...)
{
    static _Atomic long second;
    static _Atomic unsigned lines;
    struct timespec now;
    va_list ap;
    unsigned n;

    if (msg_hushed)
        return ret;
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

static bool util_is_power_of_2(uint64_t value, uint64_t min, uint64_t max)
{
    return value >= min && value <= max && (value & (value - 1)) == 0;
}

static bool util_overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

/* How many of n ascending numbers, `stride` bytes apart, are at most `value`; also the index of the first above it. */
static unsigned util_count_up_to(const uint64_t *number, size_t stride, unsigned n, uint64_t value)
{
    unsigned low = 0, high = n;

    while (low < high) {
        unsigned mid = (low + high) / 2;
        if (number[mid * stride / sizeof(*number)] > value)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

/* FNV-1a of a string and its terminator: distinguishes, but is no proof against intent. */
#define UTIL_HASH_START 0xcbf29ce484222325u
static void util_hash(uint64_t *hash, const char *text)
{
    for (; text && *text; text++)
        *hash = (*hash ^ (uint8_t)*text) * 0x100000001b3u;
    *hash = (*hash ^ 0xff) * 0x100000001b3u;
}

/* util_le16(bytes), le16_to_cpu(field) and so on. */
#define UTIL_ENDIAN(order, bits) \
    static uint##bits##_t util_##order##bits(const uint8_t *p) \
    { \
        uint##bits##_t value; \
        memcpy(&value, p, sizeof(value)); \
        return order##bits##toh(value); \
    } \
    static uint##bits##_t order##bits##_to_cpu(order##bits v) \
    { \
        return util_##order##bits(v.byte); \
    }
UTIL_ENDIAN(le, 16)
UTIL_ENDIAN(le, 32)
UTIL_ENDIAN(le, 64)
UTIL_ENDIAN(be, 16)
UTIL_ENDIAN(be, 32)
UTIL_ENDIAN(be, 64)

#define UTIL_TO_ENDIAN(order, bits) \
    static order##bits cpu_to_##order##bits(uint##bits##_t v) \
    { \
        return (union { uint##bits##_t v; order##bits field; }){ hto##order##bits(v) }.field; \
    }
UTIL_TO_ENDIAN(le, 16)
UTIL_TO_ENDIAN(le, 32)
UTIL_TO_ENDIAN(le, 64)
UTIL_TO_ENDIAN(be, 32)
UTIL_TO_ENDIAN(be, 64)

/* "4096", "0x1000", "4k", "10G": powers of 1024. False on anything else, on a sign, and past MAX_IMAGE_SIZE. */
static bool util_parse_size(const char *text, uint64_t *value)
{
    static const char units[] = "\0kmgtpe";
    const char *unit;
    char *end;

    if (!isdigit((unsigned char)*text))
        return false;
    *value = strtoull(text, &end, text[0] == '0' && (text[1] | 0x20) == 'x' ? 16 : 10);
    unit = memchr(units, tolower((unsigned char)*end), sizeof(units) - 1);
    if (!unit || (*end && end[1]) || *value > (uint64_t)MAX_IMAGE_SIZE >> 10 * (unit - units))
        return false;
    *value <<= 10 * (unit - units);
    return true;
}

/* A decimal number of sectors of 512 bytes, MAX_IMAGE_SIZE at most. False on anything else. */
static bool util_parse_sectors(const char *text, uint64_t *sectors)
{
    char *end = NULL;

    errno = 0;
    *sectors = isdigit((unsigned char)*text) ? strtoull(text, &end, 10) : 0;
    return end && !*end && !errno && *sectors <= (uint64_t)MAX_IMAGE_SIZE / 512;
}

/* The first range that ends after offset; r->n: none does. */
static unsigned util_range_after(const struct ranges *r, uint64_t offset)
{
    return r->n ? util_count_up_to(&r->range->end, sizeof(*r->range), r->n, offset) : 0;
}

/* Adds [start, end); ranges that touch become one. False: the list is full. */
static bool util_range_add(struct ranges *r, uint64_t start, uint64_t end)
{
    unsigned first = start ? util_range_after(r, start - 1) : 0, last = first;

    while (last < r->n && r->range[last].start <= end)
        last++;
    if (last == first && r->n == MAX_RANGES)
        return false;
    if (last > first) {
        start = util_min(start, r->range[first].start);
        end = r->range[last - 1].end > end ? r->range[last - 1].end : end;
    }
    memmove(&r->range[first + 1], &r->range[last], (r->n - last) * sizeof(*r->range));
    r->n -= last - first - 1;       /* one more if nothing was replaced */
    r->range[first].start = start;
    r->range[first].end = end;
    return true;
}

/* Removes [start, end). A full list has no entry for what lies behind a hole in a range: that goes, too. */
static void util_range_remove(struct ranges *r, uint64_t start, uint64_t end)
{
    unsigned first = util_range_after(r, start), last = first;
    struct range left[2];

    while (last < r->n && r->range[last].start < end)
        last++;
    if (last == first)
        return;
    left[0] = (struct range){ r->range[first].start, start };
    left[1] = (struct range){ end, r->range[last - 1].end };
    memmove(&r->range[first], &r->range[last], (r->n - last) * sizeof(*r->range));
    r->n -= last - first;
    for (int i = 0; i < 2; i++)
        if (left[i].start < left[i].end)
            util_range_add(r, left[i].start, left[i].end);
}

static const char *util_basename(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

/* What `name` means in a file at `path`: a path from its directory, or absolute. False: too long. */
static bool util_beside(char to[PATH_MAX], const char *path, const char *name)
{
    int directory = *name == '/' ? 0 : (int)(util_basename(path) - path);

    return snprintf(to, PATH_MAX, "%.*s%s", directory, path, name) < PATH_MAX;
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

/* Zeroed memory, allocated page by page as it is written. NULL: none is left, or more than a size_t of 32 bits. */
static void *util_map(uint64_t bytes)
{
    void *memory = MAP_FAILED;

    if (bytes <= SIZE_MAX)
        memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void util_unmap(void *memory, uint64_t bytes)
{
    if (memory)
        munmap(memory, (size_t)bytes);
}

/* Like strcpy, but at most size bytes. False: it did not fit. */
static bool util_copy(char *to, size_t size, const char *from)
{
    return (size_t)snprintf(to, size, "%s", from) < size;
}

/* Copies a name of n bytes. False: it does not fit, or has a zero inside, which would make it another name. */
static bool util_copy_name(char *to, size_t size, const uint8_t *from, uint32_t n)
{
    if (n >= size || memchr(from, 0, n))
        return false;
    memcpy(to, from, n);
    to[n] = 0;
    return true;
}

/* Descriptors that we inherited. If the background process kept them, their locks would never be released. */
static uint8_t util_inherited[1 << 16];
static int util_n_closed;

static void util_note_inherited(void)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *e;

    while (dir && (e = readdir(dir))) {
        int fd = atoi(e->d_name);
        if (fd > STDERR_FILENO && fd < (int)sizeof(util_inherited) && fd != dirfd(dir))
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

/* Nanoseconds of the monotonic clock. */
static uint64_t util_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Milliseconds of the same. */
static int64_t util_now(void)
{
    return (int64_t)(util_clock() / 1000000);
}

/* True if a signal that asks us to stop is pending. (They are blocked, and read from a descriptor later.) */
static bool util_interrupted(void)
{
    sigset_t set;

    return sigpending(&set) == 0 && (sigismember(&set, SIGINT) || sigismember(&set, SIGTERM) ||
                                     sigismember(&set, SIGHUP));
}

/* Reads a short text, such as a file of /sys, without its newline. */
static int util_read_file(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
    int ret = n < 0 ? -errno : 0;

    util_close(&fd);
    text[n < 0 ? 0 : n] = 0;
    text[strcspn(text, "\n")] = 0;
    return ret;
}

/* Writes a short text to an existing file, such as one of /sys. */
static int util_write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int ret = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;

    util_close(&fd);
    return ret;
}

/*
 * Fault injection, only in builds with FUSEEXP_FAULTS. FUSEEXP_FAIL_AT=n makes the n-th acquisition of the start fail
 * (counted on through fork; the server counts on its own from there). FUSEEXP_FAIL_OP=name fails each operation of that
 * name on a host file, FUSEEXP_FAIL_NTH=n the n-th change of a host file or barrier, both with FUSEEXP_FAIL_ERRNO.
 */
#ifdef FUSEEXP_FAULTS
static bool util_fault(const char *what)
{
    static int step;
    const char *env = getenv("FUSEEXP_FAIL_AT");

    if (!env || ++step != atoi(env))
        return false;
    dprintf(STDERR_FILENO, "fuseexp: FAULT %d: %s\n", step, what);
    errno = EIO;
    return true;
}

static bool util_fault_op(const char *what)
{
    static _Atomic unsigned long changes;
    const char *op = getenv("FUSEEXP_FAIL_OP"), *nth = getenv("FUSEEXP_FAIL_NTH"), *err = getenv("FUSEEXP_FAIL_ERRNO");

    if (!(op && strcmp(op, what) == 0) &&
        !(nth && strstr("write sync truncate fallocate", what) && ++changes == strtoul(nth, NULL, 10)))
        return false;
    errno = err ? atoi(err) : EIO;
    return true;
}

/*
 * FUSEEXP_RECORD=file: every change of a host file and every barrier, in the order in which they happened: a letter
 * (write, sync, truncate, punch), the file's number, offset and length as 64-bit numbers, and the data of a write.
 */
static pthread_mutex_t util_record_lock = PTHREAD_MUTEX_INITIALIZER;

#define util_record_begin() pthread_mutex_lock(&util_record_lock)

static void util_record_end(bool good, char op, const struct file *f, uint64_t offset, uint64_t len, const void *data)
{
    static int fd = -1;
    const char *path = good ? getenv("FUSEEXP_RECORD") : NULL;
    uint64_t head[4] = { (uint64_t)op, f->id, offset, len };
    struct iovec iov[2] = { { head, sizeof(head) }, { (void *)(uintptr_t)data, op == 'W' ? len : 0 } };
    int old_errno = errno;

    if (path && fd < 0)
        fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (path && writev(fd, iov, 2) < 0)
        msg_err(0, "cannot record");
    pthread_mutex_unlock(&util_record_lock);
    errno = old_errno;
}

/* FUSEEXP_BAD_SECTORS=offset,length: a range that cannot be read, in every host file. */
static bool util_fault_at(uint64_t offset, uint64_t len)
{
    const char *env = getenv("FUSEEXP_BAD_SECTORS");
    char *comma;
    uint64_t start = env ? strtoull(env, &comma, 0) : 0, end = env ? start + strtoull(comma + 1, NULL, 0) : 0;

    if (offset >= end || offset + len <= start)
        return false;
    errno = EIO;
    return true;
}
#else
#define util_record_begin() ((void)0)
#define util_record_end(good, op, f, offset, len, data) ((void)0)
#define util_fault(what) false
#define util_fault_op(what) false
#define util_fault_at(offset, len) false
#endif

/* ******************************************************************************************************** *
 * 3. GUIDs and text
 *
 * Identifiers and names in images. A GUID in memory is 16 bytes in the order in which they are printed;
 * text_swap_guid() converts those that Windows stores. Text in any encoding becomes UTF-8 through iconv(3).
 * ******************************************************************************************************** */

static bool text_is_null_id(const uint8_t id[16])
{
    static const uint8_t null[16];

    return memcmp(id, null, sizeof(null)) == 0;
}

/* Converts between the printed order and that of Windows, whose first three fields are little-endian. */
static void text_swap_guid(const uint8_t from[16], uint8_t to[16])
{
    static const uint8_t order[16] = { 3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15 };

    for (size_t i = 0; i < 16; i++)
        to[i] = from[order[i]];
}

/* Cuts white space off both ends, in place. */
static char *text_trim(char *text)
{
    static const char blanks[] = " \t\r\n";
    size_t len;

    text += strspn(text, blanks);
    len = strlen(text);
    while (len && strchr(blanks, text[len - 1]))
        text[--len] = 0;
    return text;
}

/* 32 hexadecimal digits, whatever braces and dashes are around them. */
static bool text_parse_guid(const char *text, uint8_t guid[16])
{
    static const char digits[] = "0123456789abcdef";
    unsigned n = 0;
    const char *d;

    memset(guid, 0, 16);
    for (; *text; text++) {
        if (strchr("{}-", *text))
            continue;
        d = strchr(digits, tolower((unsigned char)*text));
        if (!d || n == 32)
            return false;
        guid[n / 2] = (uint8_t)(guid[n / 2] << 4 | (uint8_t)(d - digits));
        n++;
    }
    return n == 32;
}

/* hex: 2 * len + 1 bytes. */
static void text_hex(const uint8_t *bytes, size_t len, char *hex)
{
    *hex = 0;
    for (size_t i = 0; i < len; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
}

static void text_uuid(const uint8_t uuid[16], char text[37])
{
    char hex[33];

    text_hex(uuid, 16, hex);
    snprintf(text, 37, "%.8s-%.4s-%.4s-%.4s-%.12s", hex, hex + 8, hex + 12, hex + 16, hex + 20);
}

enum { TEXT_NOT_UTF8 = 1 << 30 };

/*
 * Decodes a code point (shortest form, no surrogate, at most U+10FFFF) at *text and moves past it. Of anything else it
 * returns one byte, with TEXT_NOT_UTF8: names come from strangers' disks.
 */
static uint32_t text_utf8_next(const char **text)
{
    static const uint8_t mask[] = { 0, 0x7f, 0x1f, 0x0f, 0x07 };
    static const uint32_t min[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const uint8_t *p = (const uint8_t *)*text;
    unsigned n = *p < 0x80 ? 1 : *p < 0xc0 ? 0 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : *p < 0xf8 ? 4 : 0;
    uint32_t c = p[0] & mask[n];

    for (unsigned i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80)
            n = 0;                  /* also at the end of the text */
        else
            c = c << 6 | (p[i] & 0x3f);
    }
    if (c < min[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000))
        n = 0;
    *text += n ? n : 1;
    return n ? c : TEXT_NOT_UTF8 | *p;
}

/* True if two names in UTF-8 differ in letter case at most. */
static bool text_same_but_case(const char *a, const char *b)
{
    while (*a && *b)
        if (towlower((wint_t)text_utf8_next(&a)) != towlower((wint_t)text_utf8_next(&b)))
            return false;
    return !*a && !*b;
}

/* iconv_open(3) to UTF-8. If the C library does not know the name, the number of the code page in it decides. */
static iconv_t text_open_encoding(const char *encoding)
{
    static const struct { const char *page, *name; } pages[] = {
        { "cp932", "Shift_JIS" }, { "cp943", "Shift_JIS" }, { "cp936", "GBK" },
    };
    const char *number = encoding + strcspn(encoding, "0123456789");
    iconv_t cd = *encoding ? iconv_open("UTF-8", encoding) : (iconv_t)-1;
    char page[32];

    if (cd != (iconv_t)-1)
        return cd;
    snprintf(page, sizeof(page), "cp%.*s", (int)strspn(number, "0123456789"), number);
    for (size_t i = 0; i < ARRAY_LEN(pages); i++)
        if (strcmp(page, pages[i].page) == 0)
            snprintf(page, sizeof(page), "%s", pages[i].name);
    return iconv_open("UTF-8", page);
}

/*
 * Decodes len bytes to UTF-8. unit: bytes of an invalid character, which becomes U+FFFD; 0: invalid text is refused.
 * False: the encoding is unknown, the text is not in it, or does not fit.
 */
static bool text_decode(const char *encoding, const void *from, size_t len, size_t unit, char *to, size_t size)
{
    char *in = (char *)(uintptr_t)from;
    size_t out_left = size - 1, ret;
    iconv_t cd = text_open_encoding(encoding);

    if (cd == (iconv_t)-1)
        return false;
    for (;;) {
        ret = iconv(cd, &in, &len, &to, &out_left);
        if (ret != (size_t)-1 || errno == E2BIG || !unit || len < unit || out_left < 3)
            break;
        memcpy(to, "\xef\xbf\xbd", 3);
        to += 3;
        out_left -= 3;
        in += unit;
        len -= unit;
    }
    *to = 0;
    iconv_close(cd);
    return ret == 0 && len == 0;    /* > 0: replaced characters */
}

/* A string in an encoding as VMware names it ("windows-1252"). */
static bool text_to_utf8(const char *encoding, const char *from, char *to, size_t size)
{
    return text_decode(encoding, from, strlen(from), 0, to, size);
}

/* len bytes of UTF-16, or up to a zero. NTFS allows half a surrogate pair in a name: it becomes U+FFFD. */
static bool text_from_utf16(const uint8_t *from, size_t len, bool big, char *text, size_t size)
{
    size_t n = 0;

    while (n + 2 <= len && (from[n] || from[n + 1]))
        n += 2;
    return text_decode(big ? "UTF-16BE" : "UTF-16LE", from, n, 2, text, size);
}

/* ******************************************************************************************************** *
 * 4. Output
 *
 * What --info, --map and --check print on stdout: one document of named values, as JSON or as lines for people.
 * The names are the JSON ones; for people their dashes become blanks. Nothing is written before the image is
 * open, so a refusal leaves no half document. Findings and progress go to stderr.
 * ******************************************************************************************************** */

enum {
    OUT_DEPTH = 8,
    OUT_COLUMN = 25,                /* where values begin, for people */
    OUT_FINDINGS = 100,             /* lines of --check on corruptions, and as many on leaks */
};

struct out {
    bool json;
    bool dash;                      /* for people: a list's "-" stands on this line, waiting for what follows */
    unsigned depth;
    struct out_level { char end; bool filled, flat; } level[OUT_DEPTH];     /* flat: on one line of JSON */
};

/*
 * JSON: a quoted string, in which bytes that are not UTF-8 become U+FFFD. For people: these, and what would steer the
 * terminal, become "?".
 */
static void out_string(const char *text, bool json)
{
    const char *quote = json ? "\"" : "";

    fputs(quote, stdout);
    for (const char *p = text; *p; p = text) {
        uint32_t c = text_utf8_next(&text);
        bool control = c < ' ' || (c >= 0x7f && c < 0xa0);
        if (!json && (control || c & TEXT_NOT_UTF8))
            putchar('?');
        else if (c & TEXT_NOT_UTF8)
            fputs("\\ufffd", stdout);
        else if (control)
            printf("\\u%04x", c);
        else {
            if (json && (c == '"' || c == '\\'))
                putchar('\\');
            fwrite(p, 1, (size_t)(text - p), stdout);
        }
    }
    fputs(quote, stdout);
}

/* JSON: ends a line that an object or a list breaks, and indents the next. `flat`: all is on one line. */
static void out_break(bool flat, unsigned depth)
{
    printf("%s%*s", flat ? " " : "\n", flat ? 0 : (int)(4 * depth), "");
}

/* What comes before every value: the comma, the new line, the indentation and the name (NULL: in a list). */
static void out_key(struct out *o, const char *key)
{
    struct out_level *level;

    if (!o->depth)
        return;                     /* the document itself */
    level = &o->level[o->depth - 1];
    if (o->json) {
        fputs(level->filled ? "," : "", stdout);
        out_break(level->flat, o->depth);
        if (key)
            printf("\"%s\": ", key);
    } else {
        printf("%*s", o->dash ? 0 : (int)(4 * (o->depth - 1)), "");
        for (const char *p = key; p && *p; p++)
            putchar(*p == '-' ? ' ' : *p);
        fputs(key ? ":" : "-   ", stdout);
        o->dash = !key;
    }
    level->filled = true;
}

/* bracket: { or [ */
static void out_open(struct out *o, const char *key, char bracket, bool flat)
{
    out_key(o, key);
    if (o->json)
        putchar(bracket);
    else if (o->depth && key)
        putchar('\n');
    o->level[o->depth++] = (struct out_level){ .end = bracket == '{' ? '}' : ']', .flat = flat };
}

static void out_close(struct out *o)
{
    const struct out_level *level = &o->level[--o->depth];

    if (!o->json) {
        fputs(o->dash ? "\n" : "", stdout);
        o->dash = false;
        return;
    }
    if (level->filled)
        out_break(level->flat, o->depth);
    putchar(level->end);
    if (!o->depth)
        putchar('\n');
}

/* Returns status, or EXIT_FAILED if not everything reached stdout. */
static int out_finish(int status)
{
    int error = fflush(stdout) ? errno : ferror(stdout) ? EIO : 0;

    return error ? msg_err(EXIT_FAILED, "cannot write to standard output: %s", strerror(error)) : status;
}

/* A value that is not a list or an object; for people in columns. literal: not a string of JSON. */
static void out_value(struct out *o, const char *key, const char *text, bool literal)
{
    out_key(o, key);
    if (!o->json && key)
        printf("%*s", strlen(key) + 1 < OUT_COLUMN ? (int)(OUT_COLUMN - strlen(key) - 1) : 1, "");
    o->dash = false;
    if (literal)
        fputs(text, stdout);
    else
        out_string(text, o->json);
    fputs(o->json ? "" : "\n", stdout);
}

static void out_text(struct out *o, const char *key, const char *value)
{
    out_value(o, key, value, false);
}

static void out_flag(struct out *o, const char *key, bool value)
{
    out_value(o, key, value ? "true" : "false", true);
}

static void out_number(struct out *o, const char *key, uint64_t value)
{
    char text[24];

    snprintf(text, sizeof(text), "%" PRIu64, value);
    out_value(o, key, text, true);
}

/* Bytes: for people also in the largest unit that leaves a number. */
static void out_size(struct out *o, const char *key, uint64_t value)
{
    unsigned unit = 0;
    char text[48];
    int n = snprintf(text, sizeof(text), "%" PRIu64, value);

    while (value >> 10 * unit >= 1024)
        unit++;
    if (!o->json && unit)
        snprintf(text + n, sizeof(text) - (size_t)n, " (%.4g %ciB)", (double)value / (double)(1ull << 10 * unit),
                 " KMGTPE"[unit]);
    out_value(o, key, text, true);
}

/* Seconds since 1970; for people also as a date. */
static void out_time(struct out *o, const char *key, uint32_t value)
{
    time_t when = (time_t)value;
    struct tm tm;
    char text[48];
    int n = snprintf(text, sizeof(text), "%" PRIu32, value);

    if (!o->json && gmtime_r(&when, &tm))
        strftime(text + n, sizeof(text) - (size_t)n, " (%Y-%m-%d %H:%M:%S UTC)", &tm);
    out_value(o, key, text, true);
}

/* Percents on a terminal. `on` is set before the sandbox, which forbids isatty(3). */
static struct { bool on; int percent; } out_progress = { false, -1 };

static void out_progress_wipe(void)
{
    if (out_progress.percent >= 0)
        (void)!write(STDERR_FILENO, "\r      \r", 8);
    out_progress.percent = -1;
}

static void out_progress_show(uint64_t done, uint64_t total)
{
    int percent = total ? (int)((double)done / (double)total * 100) : 0, n;
    char text[16];

    if (!out_progress.on || percent == out_progress.percent || percent > 99)
        return;
    out_progress.percent = percent;
    n = snprintf(text, sizeof(text), "\r%3d %% ", percent);
    (void)!write(STDERR_FILENO, text, (size_t)n);
}

/* One line of --check about `times` corruptions (or leaks). The lines are limited, the counts are not. */
__attribute__((format(printf, 5, 6))) static void out_finding(struct check *c, const char *image, bool leak,
                                                              uint64_t times, const char *fmt, ...)
{
    unsigned *lines = leak ? &c->leak_lines : &c->corruption_lines;
    char text[512];
    va_list ap;

    *(leak ? &c->leaks : &c->corruptions) += times;
    if (++*lines > OUT_FINDINGS)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    out_progress_wipe();
    msg_say(MSG_NOTE, "%s: %s: %s", image, leak ? "leak" : "corrupt", text);
}

/* ******************************************************************************************************** *
 * 5. Epochs
 *
 * A writer frees what a request in flight may still be using, say a cluster that the request has looked up in a table.
 * It may be reused only after every request that was in flight at that time has completed. Each worker counts when it
 * enters and when it leaves a request, so its count is odd inside. A grace period copies all counts, and is over when
 * each that was odd has changed. Nobody waits, and a request costs two atomic additions in a cache line of its own.
 *
 *   worker                                  writer
 *   epoch_enter(): count 4 -> 5             changes the table: new requests do not find the cluster
 *   looks the cluster up                    epoch_begin_grace(): copies 5
 *   reads the cluster                       epoch_grace_over(): still 5, false
 *   epoch_leave(): count 5 -> 6             epoch_grace_over(): not 5, true: the cluster is reused
 *
 * Orderings. All accesses are sequentially consistent. epoch_begin_grace() reads by an addition of 0, not by a load: a
 * worker that enters later adds to the value that the addition has stored, so it sees the changed table; a load could
 * be done before the change is visible to others. epoch_grace_over() sees a count change only after all that the
 * worker did in that request.
 * ******************************************************************************************************** */

struct epoch_grace {
    uint64_t n[MAX_THREADS];
};
static struct {
    _Alignas(64) _Atomic uint64_t n;    /* odd: inside a request; a cache line each */
} epoch_count[MAX_THREADS];
static _Atomic unsigned epoch_n_threads;
static _Thread_local unsigned epoch_self;       /* index + 1; 0: no request yet */

static void epoch_enter(void)
{
    if (!epoch_self)
        epoch_self = ++epoch_n_threads;
    if (epoch_self <= MAX_THREADS)
        epoch_count[epoch_self - 1].n++;
}

static void epoch_leave(void)
{
    epoch_enter();                  /* the other step of the same count */
}

static void epoch_begin_grace(struct epoch_grace *g)
{
    for (unsigned i = 0; i < MAX_THREADS; i++)
        g->n[i] = atomic_fetch_add(&epoch_count[i].n, 0);
}

/* The caller's own request does not count: it no longer uses what it has looked up. */
static bool epoch_grace_over(const struct epoch_grace *g)
{
    for (unsigned i = 0; i < MAX_THREADS; i++)
        if (g->n[i] % 2 && g->n[i] == epoch_count[i].n && i + 1 != epoch_self)
            return false;
    return epoch_n_threads <= MAX_THREADS;      /* more cannot be told apart: never over */
}

/* ******************************************************************************************************** *
 * 6. Worker pool
 *
 * How many workers run. As many as there are processors wait for requests, the others are parked. A worker that is
 * about to sleep on the image (the data is not in the page cache, a lock is held during I/O) says so, and a parked
 * worker replaces it; a worker that finds too many running after its request parks itself. So requests that need
 * no disk are served by few, warm threads, and a slow disk still sees many requests at once. (Measured: with
 * 8 threads always waiting, four readers of cached data get 0.85 of what they get with 2; with 2 alone, a
 * disk gets half the requests it could take.)
 *
 * Parked workers do jobs: decoding ahead, in pieces that pool_offer() queues, on all processors but one, which is
 * left to the worker that offers. Jobs are best effort: dropped when the ring is full.
 * ******************************************************************************************************** */

enum { POOL_JOBS = 256, POOL_PATIENCE = 200000 /* nanoseconds */ };

struct pool_job {
    void (*run)(void *arg, uint64_t offset, uint64_t length);
    void *arg;
    uint64_t offset, length;
};

/*
 * `running` grows without the lock, since nobody is woken by that. It shrinks under the lock, or a signal could fall
 * between the last look of a worker that parks and its wait, and be lost.
 */
static struct {
    pthread_mutex_t lock;           /* protects all but the atomics; the last lock that is taken */
    pthread_cond_t wake;
    _Atomic unsigned running;       /* workers that wait for a request, or serve one and do not sleep on the image */
    _Atomic unsigned max;           /* of these; UINT_MAX: unmounted, no worker parks */
    unsigned parked, helping;       /* helping: of the parked, those that do a job */
    struct pool_job job[POOL_JOBS];
    unsigned first_job, n_jobs;
} pool = { .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER };

static _Thread_local bool pool_helps;       /* this worker does a job while it is parked, so it is not in `running` */

static void pool_start(unsigned max, unsigned running)
{
    pool.max = max;
    pool.running = running;
}

/* Before an operation that may sleep, which pool_unblock() follows. */
static void pool_block(void)
{
    if (pool_helps)
        return;
    pthread_mutex_lock(&pool.lock);
    if (--pool.running < pool.max && pool.parked)
        pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static void pool_unblock(void)
{
    if (!pool_helps)
        pool.running++;
}

static void pool_wait(pthread_cond_t *cond, pthread_mutex_t *lock)
{
    pool_block();
    pthread_cond_wait(cond, lock);
    pool_unblock();
}

/* POOL_PATIENCE from now, as an absolute time for timed waits. */
static void pool_deadline(struct timespec *t)
{
    clock_gettime(CLOCK_REALTIME, t);
    t->tv_nsec += POOL_PATIENCE;
    t->tv_sec += t->tv_nsec / 1000000000;
    t->tv_nsec %= 1000000000;
}

/*
 * For a lock that is rarely held during I/O: only a wait that lasts counts as sleep. (Otherwise each short wait would
 * wake a worker, whose request would usually need the same lock.)
 */
static void pool_lock(pthread_mutex_t *lock)
{
    struct timespec t;

    if (pthread_mutex_trylock(lock) == 0)
        return;
    pool_deadline(&t);
    if (pthread_mutex_timedlock(lock, &t) == 0)
        return;
    pool_block();
    pthread_mutex_lock(lock);
    pool_unblock();
}

/* n workers that pool_start() counted could not be started. */
static void pool_reduce(unsigned n)
{
    pthread_mutex_lock(&pool.lock);
    pool.running -= n;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Called after each request. A stale answer is corrected after the next one. */
static bool pool_crowded(void)
{
    return atomic_load_explicit(&pool.running, memory_order_relaxed) >
           atomic_load_explicit(&pool.max, memory_order_relaxed);
}

static bool pool_may_help_locked(void)
{
    return pool.n_jobs && pool.helping + 1 < pool.max;
}

/* Runs the first job, without the lock. For grace periods a job counts as a request. */
static void pool_do_job_locked(void)
{
    struct pool_job job = pool.job[pool.first_job];

    pool.first_job = (pool.first_job + 1) % POOL_JOBS;
    pool.n_jobs--;
    pool.helping++;
    if (pool_may_help_locked())
        pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    pool_helps = true;
    epoch_enter();
    job.run(job.arg, job.offset, job.length);
    epoch_leave();
    pool_helps = false;
    pthread_mutex_lock(&pool.lock);
    pool.helping--;
}

/* Queues [offset, offset + length) of job->arg for parked workers, cut at multiples of `piece`. */
static void pool_offer(const struct pool_job *job, uint64_t piece)
{
    struct pool_job part = *job;

    pthread_mutex_lock(&pool.lock);
    for (uint64_t left = job->length; left && pool.n_jobs < POOL_JOBS && pool.parked && pool.max > 1;
         left -= part.length, part.offset += part.length) {
        part.length = util_min(left, piece - part.offset % piece);
        pool.job[(pool.first_job + pool.n_jobs++) % POOL_JOBS] = part;
    }
    if (pool_may_help_locked())
        pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Removes the queued jobs of arg that begin in [offset, end): done already, or no longer wanted. */
static void pool_withdraw(const void *arg, uint64_t offset, uint64_t end)
{
    unsigned kept = 0;

    pthread_mutex_lock(&pool.lock);
    for (unsigned i = 0; i < pool.n_jobs; i++) {
        const struct pool_job *job = &pool.job[(pool.first_job + i) % POOL_JOBS];
        if (job->arg != arg || job->offset < offset || job->offset >= end)
            pool.job[(pool.first_job + kept++) % POOL_JOBS] = *job;
    }
    pool.n_jobs = kept;
    pthread_mutex_unlock(&pool.lock);
}

/* Parks the calling worker until it may run again; meanwhile it runs jobs. */
static void pool_park(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.running--;
    pool.parked++;
    while (pool.running >= pool.max) {
        if (pool_may_help_locked())
            pool_do_job_locked();
        else
            pthread_cond_wait(&pool.wake, &pool.lock);
    }
    pool.parked--;
    pool.running++;
    pthread_mutex_unlock(&pool.lock);
}

/* Unmounted: wakes all parked workers, and none parks again. */
static void pool_close(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.max = UINT_MAX;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/*
 * Waits until all requests in flight have completed, but the caller's own. The caller must hold no lock that one of
 * them needs. Rare (a disk is made shorter), so it polls every 200 microseconds, with a condition that nobody signals:
 * the sandbox allows futex(2), but not nanosleep(2).
 */
static void pool_wait_grace(void)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t never = PTHREAD_COND_INITIALIZER;
    struct epoch_grace g;
    struct timespec t;

    epoch_begin_grace(&g);
    pool_block();
    pthread_mutex_lock(&lock);
    while (!epoch_grace_over(&g)) {
        pool_deadline(&t);
        pthread_cond_timedwait(&never, &lock, &t);
    }
    pthread_mutex_unlock(&lock);
    pool_unblock();
}

/* ******************************************************************************************************** *
 * 7. Host files
 *
 * Contract in fuseexp.h. Every system call on an image is made here.
 * ******************************************************************************************************** */

/* -- paths -- */

static bool file_exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static bool file_is_directory(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* The absolute path without links. False: there is no such file. */
static bool file_resolve(const char *path, char real[PATH_MAX])
{
    return realpath(path, real);
}

static bool file_is(const struct file *f, const struct stat *st)
{
    return f->st.st_dev == st->st_dev && f->st.st_ino == st->st_ino;
}

/* Does path lead to f? */
static bool file_is_at(const struct file *f, const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && file_is(f, &st);
}

/* Reads the front of a regular file, up to room bytes. Returns how much; *size is all of it. 0: cannot be read. */
static size_t file_peek(const char *path, uint8_t *head, size_t room, uint64_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    ssize_t n = -1;

    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        n = pread(fd, head, room, 0);
        *size = (uint64_t)st.st_size;
    }
    util_close(&fd);
    return n > 0 ? (size_t)n : 0;
}

/* Replaces `part`, if it is not in the directory dir, by the one name there that differs in letter case only. */
static int file_find_entry(int dir, char part[NAME_MAX + 1], char *matches, size_t size)
{
    char found[NAME_MAX + 1] = "";
    struct dirent *e;
    struct stat st;
    char proc[40];
    unsigned n = 0;
    size_t used = 0;
    DIR *d;

    if (fstatat(dir, part, &st, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    snprintf(proc, sizeof(proc), "/proc/self/fd/%d", dir);
    d = opendir(proc);
    while (d && (e = readdir(d)))
        if (text_same_but_case(e->d_name, part)) {
            util_copy(found, sizeof(found), e->d_name);
            used += used < size ? (size_t)snprintf(matches + used, size - used, "%s'%s'", n ? ", " : "", found) : 0;
            n++;
        }
    if (d)
        closedir(d);
    if (n == 1)
        util_copy(part, NAME_MAX + 1, found);
    return n == 1 ? 0 : n ? -ENOTUNIQ : -ENOENT;
}

/*
 * Windows and macOS ignore letter case in names, so an image from there may name "DISK.VMDK" what is disk.vmdk here.
 * fixed: `name`, below directory, as its components are called. Follows neither links nor "..". -ENOTUNIQ: several
 * names fit, listed in matches.
 */
static int file_fix_case(const char *directory, const char *name, char fixed[PATH_MAX], char *matches, size_t size)
{
    int dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), parent, ret = 0;
    char part[NAME_MAX + 1];
    size_t len, used = 0;

    for (; !ret && *name; name += len + strspn(name + len, "/")) {
        len = strcspn(name, "/");
        if (len > NAME_MAX || used + NAME_MAX + 2 > PATH_MAX) {
            ret = -ENAMETOOLONG;
            break;
        }
        snprintf(part, sizeof(part), "%.*s", (int)len, name);
        ret = strcmp(part, "..") == 0 ? -ENOENT : file_find_entry(dir, part, matches, size);
        used += (size_t)snprintf(fixed + used, PATH_MAX - used, "%s%s", used ? "/" : "", part);
        parent = dir;
        dir = openat(parent, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        util_close(&parent);
    }
    util_close(&dir);
    return ret;
}

/* -- opening and closing -- */

/*
 * A read that must not sleep. Linux 5.9 and 5.10 return 0 instead of EAGAIN; what is really the end of the file is
 * found by the read that follows. The offset is two longs, of which 64-bit machines use the first.
 */
static ssize_t file_pread_nowait(const struct file *f, void *buf, size_t len, uint64_t offset)
{
    struct iovec iov = { buf, len };
    ssize_t n = syscall(SYS_preadv2, f->fd, &iov, 1ul, (unsigned long)offset,
                        sizeof(long) == 4 ? (unsigned long)(offset >> 32) : 0ul, FX_RWF_NOWAIT);

    if (n == 0 && len)
        errno = EAGAIN;
    return n == 0 && len ? -1 : n;
}

/*
 * Can the host say whether a read would sleep? Memory never does (and cannot say); of the rest assume the
 * worst. (The device nodes of /dev lie in memory; what they name does not.)
 */
static void file_ask_sleep(struct file *f)
{
    struct statfs fs;
    uint8_t byte;

    f->sleep = FILE_MAY_SLEEP;
    if (file_pread_nowait(f, &byte, 1, 0) < 0 && errno != EAGAIN)
        f->sleep = !f->is_blk && fstatfs(f->fd, &fs) == 0 &&
                   (fs.f_type == FX_TMPFS_MAGIC || fs.f_type == FX_RAMFS_MAGIC)
                       ? FILE_NEVER_SLEEPS : FILE_ALWAYS_SLEEPS;
}

static int file_check_kind(const char *path, const struct stat *st)
{
    if (S_ISDIR(st->st_mode))
        return msg_err(-EISDIR, "%s: is a directory, not a disk image", path);
    if (!S_ISREG(st->st_mode) && !S_ISBLK(st->st_mode))
        return msg_err(-EINVAL, "%s: neither a regular file nor a block device", path);
    return 0;
}

/* Sets f->st and f->size, at open and again once f is locked. */
static int file_measure(struct file *f)
{
    int ret = fstat(f->fd, &f->st) < 0 ? -errno : 0;

    f->is_blk = S_ISBLK(f->st.st_mode);
    f->size = (uint64_t)f->st.st_size;
    if (!ret && f->is_blk && util_ioctl(f->fd, BLKGETSIZE64, &f->size) < 0)
        ret = -errno;
    return ret ? msg_err(ret, "%s: cannot tell its size: %s", f->path, strerror(-ret)) : 0;
}

static uint16_t file_ids;           /* in use since the cache was empty; cache_stop() resets it */

static bool file_is_open(const struct file *f)
{
    return f->path;
}

/* fd becomes f, which owns it from here on: file_close() even after an error. */
static int file_adopt(struct file *f, const char *path, int fd, bool writable)
{
    int ret;

    *f = (struct file){ .path = strdup(path), .fd = fd, .direct_fd = -1, .gone = UINT64_MAX, .trouble = UINT64_MAX,
                        .writable = writable };
    if (!f->path) {
        close(fd);
        return msg_err(-ENOMEM, "%s: out of memory", path);
    }
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
    f->id = file_ids++;
    if (f->id >= MAX_FILES)
        return msg_err(-EMFILE, "%s: more than %d files", path, MAX_FILES);
    ret = file_measure(f);
    if (!ret)
        ret = file_check_kind(path, &f->st);
    if (!ret && f->size > (uint64_t)MAX_IMAGE_SIZE)
        ret = msg_err(-EFBIG, "%s: too large (%" PRIu64 " bytes); up to %" PRId64 " are accepted", path, f->size,
                      MAX_IMAGE_SIZE);
    if (!ret)
        file_ask_sleep(f);
    return ret;
}

/* Leaves the access time alone where that is permitted: reading must change nothing. */
static int file_open_fd(const char *path, int flags)
{
    int fd = open(path, flags | O_NOATIME);

    return fd < 0 && errno == EPERM ? open(path, flags) : fd;
}

enum { FILE_LOCK_TRIES = 50, FILE_LOCK_PAUSE = 20 /* milliseconds */ };

/* Looks at what it is before opening it: opening a pipe or a tape has effects. */
static int file_open(struct file *f, const char *path, bool writable)
{
    int flags = O_CLOEXEC | O_NONBLOCK | (writable ? O_RDWR : O_RDONLY), fd, ret;
    struct stat st;

    if (util_fault("open") || stat(path, &st) < 0)
        return msg_err(-errno, "%s: %s", path, strerror(errno));
    ret = file_check_kind(path, &st);
    if (ret)
        return ret;
    if (S_ISBLK(st.st_mode) && writable)
        flags |= O_EXCL;
    fd = file_open_fd(path, flags);
    /* As in file_lock_image(): after umount(8) the old server still holds the device until it exits. */
    for (unsigned tries = 0; fd < 0 && errno == EBUSY && tries < FILE_LOCK_TRIES && !util_interrupted(); tries++) {
        (void)poll(NULL, 0, FILE_LOCK_PAUSE);
        fd = file_open_fd(path, flags);
    }
    if (fd < 0)
        return msg_err(-errno, "%s: %s%s", path, strerror(errno),
                       errno == EBUSY ? " (mounted, or used by another program)" : "");
    return file_adopt(f, path, fd, writable);
}

/*
 * Opens a file that an image names: below `directory`, and not out of it by "..", links or mounts
 * of /proc. Kernels before 5.6 cannot promise that, so there no name with a slash is followed, and no link.
 */
static int file_open_beneath(struct file *f, const char *directory, const char *name, const char *shown, bool writable)
{
    struct fx_open_how how = { .flags = O_PATH | O_CLOEXEC,
                               .resolve = FX_RESOLVE_BENEATH | FX_RESOLVE_NO_MAGICLINKS };
    int dir = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC), path_fd = -1, fd = -1, ret;
    char proc[40];
    struct stat st;

    if (dir >= 0) {
        path_fd = (int)syscall(SYS_openat2, dir, name, &how, sizeof(how));
        if (path_fd < 0 && errno == ENOSYS && !strchr(name, '/'))
            path_fd = openat(dir, name, O_PATH | O_CLOEXEC | O_NOFOLLOW);
    }
    ret = path_fd < 0 || fstat(path_fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? 0 : -EMEDIUMTYPE;
    if (!ret) {
        snprintf(proc, sizeof(proc), "/proc/self/fd/%d", path_fd);     /* looked at before it is opened */
        fd = file_open_fd(proc, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
        ret = fd < 0 ? -errno : 0;
    }
    util_close(&path_fd);
    util_close(&dir);
    if (ret)
        return ret;                 /* the caller knows who wanted it */
    return file_adopt(f, shown, fd, writable);
}

/* As it is now; if the host cannot say, as it was at open. */
static struct stat file_stat(const struct file *f)
{
    struct stat st;

    return fstat(f->fd, &st) == 0 ? st : f->st;
}

/* For the kernel, when it reads and writes the file by itself. */
static int file_descriptor(const struct file *f)
{
    return f->fd;
}

/* Logical sectors of a block device in bytes; 0: it is none, or does not say. */
static uint32_t file_sector_size(const struct file *f)
{
    int sector = 0;

    return f->is_blk && util_ioctl(f->fd, BLKSSZGET, &sector) == 0 && sector > 0 ? (uint32_t)sector : 0;
}

/*
 * Returns -EIO if another program has truncated a writable file: acknowledged data is lost, which is latched like a
 * failed write-back. Called at every flush, and before a change that could make the file as long as it was, since
 * nothing shows the loss afterwards.
 */
static int file_check_length(struct file *f)
{
    off_t end = lseek(f->fd, 0, SEEK_END);
    int none = 0;

    if (!f->writable || end < 0 || (uint64_t)end >= f->size)
        return f->gone == UINT64_MAX ? 0 : -EIO;
    pthread_mutex_lock(&f->lock);   /* both values again: file_truncate() changes them under the lock */
    end = lseek(f->fd, 0, SEEK_END);
    if (end >= 0 && (uint64_t)end < f->size) {
        if (f->gone == UINT64_MAX)
            msg_serving(-EIO, "%s: another program truncated it to %" PRIu64 " bytes (from %" PRIu64 "): data is lost",
                        f->path, (uint64_t)end, f->size);
        f->gone = util_min(f->gone, (uint64_t)end);
        atomic_compare_exchange_strong(&f->latched, &none, -EIO);
    }
    pthread_mutex_unlock(&f->lock);
    return f->gone == UINT64_MAX ? 0 : -EIO;
}

/* The length, which the kernel may have increased by itself (passthrough). */
static uint64_t file_follow_growth(struct file *f)
{
    off_t end;

    if (file_check_length(f))
        return f->size;
    pthread_mutex_lock(&f->lock);
    end = lseek(f->fd, 0, SEEK_END);
    if (end >= 0 && (uint64_t)end > f->size)
        f->size = (uint64_t)end;
    pthread_mutex_unlock(&f->lock);
    return f->size;
}

/* -- loop devices -- */

/* A loop device in use, and what it shows: a file by its device and inode, a block device by rdev. */
struct file_loop {
    char name[16];                  /* "loop0" */
    char path[PATH_MAX];            /* of what it shows, at the time when it was set up */
    bool read_only;
    dev_t dev, rdev;
    ino_t ino;
};

/* Asks the device where we may, since the path may lead to another file by now. False: nobody can tell. */
static bool file_ask_loop(struct file_loop *loop)
{
    struct loop_info64 info;
    char path[64];
    struct stat st;
    int fd, ret;

    snprintf(path, sizeof(path), "/dev/%s", loop->name);
    fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    ret = fd < 0 ? -1 : util_ioctl(fd, (uint32_t)LOOP_GET_STATUS64, &info);
    util_close(&fd);
    if (ret == 0) {
        loop->dev = (dev_t)info.lo_device;
        loop->rdev = (dev_t)info.lo_rdevice;
        loop->ino = (ino_t)info.lo_inode;
        loop->read_only = info.lo_flags & LO_FLAGS_READ_ONLY;
        return true;
    }
    if (stat(loop->path, &st) < 0)
        return false;
    loop->dev = st.st_dev;
    loop->rdev = st.st_rdev;
    loop->ino = st.st_ino;
    return true;
}

/* The next loop device in use, but for what it takes the device to say; dir is /sys/block. */
static bool file_next_loop(DIR *dir, struct file_loop *loop)
{
    struct dirent *e;
    char path[64], ro[4];

    while (dir && (e = readdir(dir))) {
        snprintf(path, sizeof(path), "/sys/block/%.15s/loop/backing_file", e->d_name);
        if (strncmp(e->d_name, "loop", 4) == 0 && util_copy(loop->name, sizeof(loop->name), e->d_name) &&
            util_read_file(path, loop->path, sizeof(loop->path)) == 0) {
            snprintf(path, sizeof(path), "/sys/block/%s/ro", loop->name);
            loop->read_only = util_read_file(path, ro, sizeof(ro)) == 0 && *ro == '1';
            return true;
        }
    }
    return false;
}

/* The disk that a partition is on; any other block device is its own. */
static dev_t file_whole_disk(dev_t dev)
{
    char path[64], text[32];
    unsigned disk[2];

    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/partition", major(dev), minor(dev));
    if (access(path, F_OK) < 0)
        return dev;
    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/../dev", major(dev), minor(dev));
    if (util_read_file(path, text, sizeof(text)) < 0 || sscanf(text, "%u:%u", &disk[0], &disk[1]) != 2)
        return dev;
    return makedev(disk[0], disk[1]);
}

/* Does the loop device write to what f is, or to a part or the whole of it? */
static bool file_is_below_loop(const struct file *f, struct file_loop *loop)
{
    if (!file_ask_loop(loop) || loop->read_only)
        return false;
    if (!f->is_blk)
        return loop->dev == f->st.st_dev && loop->ino == f->st.st_ino;
    return loop->rdev == f->st.st_rdev || file_whole_disk(loop->rdev) == f->st.st_rdev ||
           (loop->rdev && loop->rdev == file_whole_disk(f->st.st_rdev));
}

/*
 * A loop device has its own page cache, and opens its file neither with O_EXCL nor with locks: a write to that file
 * would not be seen through the device, and could be overwritten. A reader only gets a note, and for that the path is
 * enough: asking the device would wait for the file it shows, whose server may hang.
 */
static int file_check_loops(const struct file *f)
{
    char real[PATH_MAX];
    struct file_loop loop = { .dev = 0 };
    DIR *dir = opendir("/sys/block");
    bool found = false;

    if (!realpath(f->path, real))
        *real = 0;
    while (!found && file_next_loop(dir, &loop))
        found = f->writable ? file_is_below_loop(f, &loop) : !loop.read_only && strcmp(loop.path, real) == 0;
    if (dir)
        closedir(dir);
    if (found && f->writable)
        return msg_err(-EBUSY, "%s: in use: the loop device /dev/%s has it open for writing (umount it, and losetup -d "
                       "/dev/%s)", f->path, loop.name, loop.name);
    if (found)
        msg_say(MSG_NOTE, "%s: the loop device /dev/%s has it open for writing: what changes meanwhile may be seen in "
                "part, or not at all", f->path, loop.name);
    return 0;
}

/* -- locks -- */

/*
 * F_RDLCK, F_UNLCK: locks or unlocks a byte for each permission that we use, and for each that we deny others.
 * F_WRLCK: -EAGAIN if somebody else uses what we deny, or denies what we use, by a lock on *byte.
 */
static int file_lock_bytes(struct file *f, short type, int *byte)
{
    static const int held[] = { LOCK_USES + PERM_READ, LOCK_UNSHARED + PERM_WRITE, LOCK_UNSHARED + PERM_RESIZE,
                                LOCK_USES + PERM_WRITE, LOCK_USES + PERM_RESIZE };      /* a reader has three */
    const int other = LOCK_UNSHARED - LOCK_USES;
    struct flock lock;

    for (unsigned i = 0; i < (f->writable ? 5 : 3); i++) {
        *byte = type != F_WRLCK ? held[i] : held[i] < LOCK_UNSHARED ? held[i] + other : held[i] - other;
        lock = (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = *byte, .l_len = 1 };
        if (type == F_RDLCK && util_fault("lock"))
            return -EIO;
        if (fcntl(f->fd, type == F_WRLCK ? F_OFD_GETLK : F_OFD_SETLK, &lock) < 0)
            return -errno;
        if (type == F_WRLCK && lock.l_type != F_UNLCK)
            return -EAGAIN;
    }
    return 0;
}

/*
 * QEMU's protocol: first hold our bytes (shared, so this never waits), then look whether anybody holds one that
 * excludes us. Both sides do it in this order, so of two newcomers at least one sees the other. Before we look again we
 * drop our bytes: nothing is ours yet, and a QEMU that has the image open may want to write to it meanwhile. Example of
 * why we look again: after umount(8) the server of the old mount still flushes, and holds its locks until it exits.
 */
static int file_lock_image(struct file *f)
{
    int byte, ret;

    for (unsigned tries = 0;; tries++) {
        ret = file_lock_bytes(f, F_RDLCK, &byte);
        if (ret == -EINVAL || ret == -ENOLCK || ret == -EOPNOTSUPP || ret == -ENOSYS) {
            msg_say(MSG_NOTE, "%s: this file system has no locks; make sure that nothing else writes to the image",
                    f->path);
            return 0;
        }
        if (ret)
            return msg_err(ret, "%s: cannot lock: %s", f->path, strerror(-ret));
        ret = file_lock_bytes(f, F_WRLCK, &byte);
        if (ret != -EAGAIN || tries == FILE_LOCK_TRIES || util_interrupted())
            break;
        (void)file_lock_bytes(f, F_UNLCK, &byte);
        (void)poll(NULL, 0, FILE_LOCK_PAUSE);
    }
    if (ret == -EAGAIN)
        return msg_err(ret, "%s: in use by another program%s (lock on byte %d)%s", f->path,
                       byte < LOCK_UNSHARED ? " that writes to it" : "", byte,
                       f->writable ? "" : "; -U reads it all the same");
    return ret ? msg_err(ret, "%s: cannot look for locks: %s", f->path, strerror(-ret)) : 0;
}

/* Keeps other writers out; -EAGAIN or -EBUSY if there is one. */
static int file_lock(struct file *f)
{
    int ret = file_lock_image(f);

    return ret ? ret : file_check_loops(f);
}

/*
 * -- handles (direct and cached), bad sectors --
 *
 * A file has one descriptor with a page cache and at most one without:
 *   fd         every write, every barrier, and every read of what is good. The kernel reports a failed write-back to
 *              the descriptor that was open, once: so there is just one to ask (file_sync), and it is never reopened.
 *   direct_fd  O_DIRECT, read-only, opened before the sandbox forbids it, or at the first read error if that comes
 *              earlier; -1 where the host cannot. It reads bad sectors and what lies near them. It sees what was
 *              written through fd, since the kernel writes the dirty pages of a range back before it reads it.
 *
 * 1. A cached read fails for a whole folio or read-ahead window around a bad sector. Example: one bad sector of 512
 *    bytes can cost 128 KiB. So what failed is read again directly (file_salvage), by pages and then by sectors:
 *    exactly the bad sectors are lost.
 * 2. Within FILE_NEAR of a bad sector every read is direct, or read-ahead would run into it again.
 * 3. Bad ranges are remembered (f->bad): the page cache above us asks again for each page of a request that failed, and
 *    a dying disk takes seconds for each try. A reader without a page cache above it makes the disk try again, and so
 *    does everybody once FILE_FORGET has passed without a failure. A write makes its range good again; bad_writes
 *    counts writes, so that a scan that began before the write does not mark the range bad after it.
 * 4. One thread at a time scans (f->scanning); it owns direct_fd and sector. The others wait, then know its result.
 */

enum { FILE_PAGE = 4096, FILE_NEAR = 1 << 20, FILE_FORGET = 30000 /* milliseconds */ };

static _Thread_local bool file_tries_again;     /* rule 3: this thread's reader has no page cache above it */

/* A bad range, logged in one line once the sectors before and behind it are known to be good. */
static struct {
    pthread_mutex_t lock;           /* protects all of it */
    const struct file *file;        /* NULL: none */
    uint64_t start, end;
    bool left, right;               /* what lies before it, behind it, can be read */
    int error;
    const struct file *good_file;
    uint64_t good_end;              /* where the last good piece of good_file ends */
} file_line = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void file_tell_bad_locked(void)
{
    if (file_line.file)
        msg_serving(-EIO, "%s: read error at %" PRIu64 ", %" PRIu64 " bytes: %s", file_line.file->path,
                    file_line.start, file_line.end - file_line.start, strerror(file_line.error));
    file_line.file = NULL;
}

/* Logs the range that waits, if it is of f or f is NULL. */
static void file_tell_bad(const struct file *f)
{
    pthread_mutex_lock(&file_line.lock);
    if (!f || file_line.file == f)
        file_tell_bad_locked();
    if (!f || file_line.good_file == f)
        file_line.good_file = NULL;
    pthread_mutex_unlock(&file_line.lock);
}

static void file_line_bad(const struct file *f, uint64_t start, uint64_t end, int error)
{
    pthread_mutex_lock(&file_line.lock);
    if (file_line.file != f || start > file_line.end || end < file_line.start) {
        file_tell_bad_locked();
        file_line.file = f;
        file_line.error = error;
        file_line.start = UINT64_MAX;
        file_line.end = 0;
    }
    if (start < file_line.start) {
        file_line.start = start;
        file_line.left = file_line.good_file == f && file_line.good_end == start;
    }
    if (end > file_line.end) {
        file_line.end = end;
        file_line.right = false;
    }
    pthread_mutex_unlock(&file_line.lock);
}

/* Did the medium fail, not this process? */
static bool file_is_medium_error(int error)
{
    return error != EINTR && error != EAGAIN && error != ENOMEM && error != EINVAL && error != EPERM && error != EBADF;
}

/* Opens direct_fd, which the sandbox forbids later, and sets f->sector, the unit in which the medium is read. */
static void file_open_direct(struct file *f)
{
    uint32_t sector = f->is_blk ? file_sector_size(f) : 512;
    char proc[40];

    if (f->sector)
        return;
    f->sector = FILE_PAGE;
    snprintf(proc, sizeof(proc), "/proc/self/fd/%d", f->fd);
    if (sector > 0 && sector <= FILE_PAGE)
        f->direct_fd = file_open_fd(proc, O_RDONLY | O_DIRECT | O_NONBLOCK | O_CLOEXEC);
    if (f->direct_fd >= 0)
        f->sector = sector;
}

/* Something near `at` cannot be read. */
static void file_note_trouble(struct file *f, uint64_t at)
{
    pthread_mutex_lock(&f->lock);
    f->trouble = at;
    f->troubled = true;
    f->bad_time = util_now();
    pthread_mutex_unlock(&f->lock);
}

/* How much of the front of a range is not known to be bad; and of the rest, if any, how much is (*bad). */
static uint64_t file_find_bad(struct file *f, uint64_t offset, uint64_t len, uint64_t *bad)
{
    uint64_t front = len, end = offset + len;
    const struct range *r;
    unsigned i;

    *bad = 0;
    pthread_mutex_lock(&f->lock);
    i = util_range_after(&f->bad, offset);
    if (i < f->bad.n && f->bad.range[i].start < end) {
        r = &f->bad.range[i];
        front = r->start > offset ? r->start - offset : 0;
        *bad = util_min(r->end, end) - (offset + front);
    }
    pthread_mutex_unlock(&f->lock);
    return front;
}

/* writes: f->bad_writes before the range was tried; see rule 3. */
static void file_note_bad(struct file *f, uint64_t start, uint64_t end, int error, uint64_t writes)
{
    uint64_t bad;
    bool known = file_find_bad(f, start, 1, &bad) == 0;

    pthread_mutex_lock(&f->lock);
    if (!f->bad.range)
        f->bad.range = calloc(MAX_RANGES, sizeof(struct range));
    if (f->bad.range && writes == f->bad_writes)
        (void)util_range_add(&f->bad, start, end);      /* a full list: it will be tried again */
    f->troubled = true;
    f->bad_time = util_now();
    pthread_mutex_unlock(&f->lock);
    if (!known)
        file_line_bad(f, start, end, error);
}

/* The range was written, or could be read. */
static void file_forget_bad(struct file *f, uint64_t start, uint64_t end, bool written)
{
    pthread_mutex_lock(&f->lock);
    util_range_remove(&f->bad, start, end);
    f->bad_writes += written;
    pthread_mutex_unlock(&f->lock);
}

static void file_note_good(struct file *f, uint64_t start, uint64_t end)
{
    if (f->troubled)
        file_forget_bad(f, start, end, false);
    pthread_mutex_lock(&file_line.lock);
    file_line.left |= file_line.file == f && end == file_line.start;
    file_line.right |= file_line.file == f && start == file_line.end;
    if (file_line.left && file_line.right)
        file_tell_bad_locked();
    file_line.good_file = f;
    file_line.good_end = end;
    pthread_mutex_unlock(&file_line.lock);
}

static bool file_is_near_bad(struct file *f, uint64_t offset, uint64_t len)
{
    uint64_t from = offset - util_min(offset, FILE_NEAR), near = offset + len + FILE_NEAR - from, bad;

    pthread_mutex_lock(&f->lock);
    if (util_now() - f->bad_time > FILE_FORGET) {
        f->bad.n = 0;
        f->trouble = UINT64_MAX;
        f->troubled = false;
    }
    pthread_mutex_unlock(&f->lock);
    return (f->trouble >= from && f->trouble < from + near) || file_find_bad(f, from, near, &bad) < near;
}

/* A read has failed at offset: how much of the range cannot be read, as far as is known. */
static uint64_t file_bad_length(struct file *f, uint64_t offset, uint64_t len)
{
    off_t end = f->is_blk ? -1 : lseek(f->fd, 0, SEEK_END);
    uint64_t bad;

    if (file_find_bad(f, offset, len, &bad) == 0)
        return bad;
    if ((end >= 0 && (uint64_t)end <= offset) || f->gone <= offset)
        return len;
    return util_min(len, FILE_PAGE - offset % FILE_PAGE);
}

/* Reads n bytes of the medium, or at least `least`, where the file ends. 0, -errno, or 1: it ends before that. */
static int file_try(struct file *f, uint8_t *to, uint64_t at, uint64_t n, uint64_t least)
{
    ssize_t r;

    if (util_fault_op("read") || util_fault_at(at, n))
        return -errno;
    for (uint64_t done = 0; done < least; done += (uint64_t)r) {
        if (done % f->sector)
            return 1;
        r = pread(f->direct_fd >= 0 ? f->direct_fd : f->fd, to + done, n - done, (off_t)(at + done));
        if (r < 0 && errno != EINTR)
            return -errno;
        if (r == 0)
            return 1;
        r = r < 0 ? 0 : r;
    }
    return 0;
}

/* As file_try(), in the pieces that the medium takes: it says EINVAL to smaller ones. Without O_DIRECT if need be. */
static int file_try_aligned(struct file *f, uint8_t page[FILE_PAGE], uint64_t *at, uint64_t end, uint64_t wanted)
{
    int ret;

    for (;;) {
        *at -= *at % f->sector;
        end = (end + f->sector - 1) / f->sector * f->sector;
        ret = file_try(f, page, *at, end - *at, wanted - *at);
        if (ret != -EINVAL || f->direct_fd < 0)
            return ret;
        if (f->sector < FILE_PAGE)
            f->sector *= 2;
        else
            util_close(&f->direct_fd);
    }
}

/*
 * Reads [at, at + n), which lies in one page, whole or sector by sector; *good: how much of its front is good. All of
 * its sectors are tried, so that all that are bad are known.
 */
static int file_scan_page(struct file *f, uint8_t *to, uint64_t at, uint64_t n, uint64_t *good)
{
    uint8_t room[2 * FILE_PAGE], *page = room + (FILE_PAGE - (uintptr_t)room % FILE_PAGE);
    uint64_t end = at + n, from = at, next, writes = f->bad_writes;
    uint64_t skip;
    bool whole, suspect = f->trouble / FILE_PAGE == at / FILE_PAGE && n > f->sector;  /* has just failed as a whole */
    int ret = 0, r = suspect ? -EIO : file_try_aligned(f, page, &from, end, end);

    *good = 0;
    if (r)
        f->trouble = UINT64_MAX;
    whole = !suspect && (!r || end - from <= f->sector);        /* r says it of every sector */
    for (; from < end; from = next) {
        if (!whole && r != 1)
            r = file_try_aligned(f, page, &from, from + 1, util_min(end, from - from % f->sector + f->sector));
        next = whole && !r ? end : from + f->sector;
        if (r == 1 || (r && !file_is_medium_error(-r)))
            return r;
        if (r) {
            file_note_bad(f, from, next, -r, writes);
            ret = r;
            continue;
        }
        file_note_good(f, from, next);
        skip = from < at ? at - from : 0;
        memcpy(to + (from + skip - at), page + skip, util_min(next, end) - from - skip);
        *good = ret ? *good : util_min(next, end) - at;
    }
    return ret;
}

/* Continues a read, of which *done bytes are good. */
static int file_salvage(struct file *f, uint8_t *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    uint64_t n, good = 0, bad;
    int ret = 0;

    pool_block();
    pthread_mutex_lock(&f->lock);
    while (f->scanning)
        pthread_cond_wait(&f->changed, &f->lock);
    f->scanning = true;
    pthread_mutex_unlock(&f->lock);
    file_open_direct(f);
    if (*done)
        file_note_good(f, offset, offset + *done);
    for (; *done < len && !ret; *done += good) {
        n = util_min(len - *done, FILE_PAGE - (offset + *done) % FILE_PAGE);
        if (!file_tries_again)
            n = file_find_bad(f, offset + *done, n, &bad);
        good = 0;
        ret = n ? file_scan_page(f, buf + *done, offset + *done, n, &good) : -EIO;
    }
    pthread_mutex_lock(&f->lock);
    f->scanning = false;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
    pool_unblock();
    return ret;
}

/* -- reading -- */

/* One pread(2). What is not in the page cache is read with another worker in this one's place. */
static ssize_t file_pread_some(struct file *f, void *buf, uint64_t len, uint64_t offset, bool *waited)
{
    ssize_t n = -1;

    *waited = false;
    if (util_fault_op("read") || util_fault_at(offset, len))
        return -1;
    if (f->sleep == FILE_NEVER_SLEEPS)
        return pread(f->fd, buf, len, (off_t)offset);
    if (f->sleep == FILE_MAY_SLEEP) {
        n = file_pread_nowait(f, buf, len, offset);
        if (n >= 0 || errno != EAGAIN)
            return n;
    }
    *waited = true;
    pool_block();
    n = pread(f->fd, buf, len, (off_t)offset);
    pool_unblock();
    return n;
}

static int file_report_end(struct file *f, uint64_t at)
{
    if (f->writable && file_check_length(f))
        return -EIO;
    return msg_serving(-EIO, "%s: ends at or before %" PRIu64 ": it was %" PRIu64 " bytes long when it was opened",
                       f->path, at, f->size);
}

static int file_pread_stored(struct file *f, void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    uint64_t gone = f->gone, wanted = offset + len <= gone ? len : gone > offset ? gone - offset : 0;
    bool waited, bad = f->troubled && file_is_near_bad(f, offset, len);
    ssize_t n;
    int ret = 0;

    for (*done = 0; *done < wanted && !bad; *done += (uint64_t)n) {
        n = file_pread_some(f, (char *)buf + *done, wanted - *done, offset + *done, &waited);
        if (n == 0)
            return file_report_end(f, offset + *done);
        if (n < 0 && !file_is_medium_error(errno) && errno != EINTR)
            return msg_serving(-EIO, "%s: read error at %" PRIu64 ": %s", f->path, offset + *done, strerror(errno));
        /* What comes short after a wait has met an error, unless the file ends. */
        bad = n < 0 ? errno != EINTR : waited && (uint64_t)n < wanted - *done;
        n = n < 0 ? 0 : n;
        if (bad)
            file_note_trouble(f, offset + *done + (uint64_t)n);
    }
    if (*done < wanted)
        ret = file_salvage(f, buf, wanted, offset, done);
    if (ret == 1)
        return file_report_end(f, offset + *done);
    return ret || wanted < len ? -EIO : 0;
}

/* -- patches: a log that is replayed in memory -- */

/* The first patch that ends after offset; n_patches: none does. */
static uint32_t file_patch_after(const struct file *f, uint64_t offset)
{
    return f->n_patches && offset >= FILE_PATCH
               ? util_count_up_to(&f->patches->offset, sizeof(*f->patches), f->n_patches, offset - FILE_PATCH) : 0;
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

/* As file_pread(), for callers that can do nothing with a part. */
static int file_read(struct file *f, void *buf, uint64_t len, uint64_t offset)
{
    uint64_t done;

    return file_pread(f, buf, len, offset, &done);
}

/*
 * Reads what may end early: a bad sector behind the first `need` bytes is no error. *len, the size of buf, becomes how
 * much of the front is good; zeros follow. Headers are read like this: what lies behind their fields may be damaged.
 */
static int file_pread_front(struct file *f, void *buf, uint64_t need, uint64_t *len, uint64_t offset)
{
    uint64_t done = 0;
    int ret = file_pread(f, buf, *len, offset, &done);

    memset((uint8_t *)buf + done, 0, *len - done);
    *len = done;
    return done >= need ? 0 : ret;
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
    if (!f->patches)
        return -ENOMEM;
    if (page) {
        copy = util_fault("patch") ? NULL : malloc(FILE_PATCH);
        if (!copy)
            return -ENOMEM;
        memcpy(copy, page, FILE_PATCH);
    }
    file_overlay(f);
    if (there)
        free(f->patches[i].page);   /* NOLINT(clang-analyzer-unix.Malloc): it mistakes one patch for another */
    else
        memmove(f->patches + i + 1, f->patches + i, (f->n_patches++ - i) * sizeof(*f->patches));
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

/* -- writing and barriers -- */

/* A write sleeps when too many pages are dirty. */
static ssize_t file_pwrite_some(struct file *f, const void *buf, uint64_t len, uint64_t offset)
{
    ssize_t n;

    if (util_fault_op("write"))
        return -1;
    if (f->sleep != FILE_NEVER_SLEEPS)
        pool_block();
    util_record_begin();
    n = pwrite(f->fd, buf, len, (off_t)offset);
    util_record_end(n > 0, 'W', f, offset, (uint64_t)n, buf);
    if (f->sleep != FILE_NEVER_SLEEPS)
        pool_unblock();
    return n;
}

static int file_pwrite(struct file *f, const void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    int ret;
    ssize_t n;

    *done = 0;
    if ((offset + len >= f->size || offset + len > f->gone) && file_check_length(f))
        return -EIO;
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
    if (f->troubled)
        file_forget_bad(f, offset, offset + len, true);
    return 0;
}

/* One barrier, by itself. */
static int file_sync_alone(struct file *f)
{
    int ret;

    util_record_begin();
    ret = util_fault_op("sync") || fdatasync(f->fd) < 0 ? -errno : 0;
    util_record_end(!ret, 'S', f, 0, 0, NULL);
    if (ret)
        return msg_serving(ret, "%s: flush failed, what was written before may be lost: %s", f->path, strerror(-ret));
    return file_check_length(f);
}

/*
 * The kernel reports a failed write-back to one fdatasync(2) of a descriptor; a second one in parallel returns 0 for
 * the same lost data. So one runs at a time, and its result is latched before any caller returns. Callers that arrive
 * while one runs share the next one. Example: B writes and syncs while A's barrier runs. That barrier may have passed
 * B's page already, so B needs the next one.
 */
static int file_sync(struct file *f)
{
    int none = 0, ret = atomic_load(&f->latched);
    uint64_t ours;

    if (ret)
        return ret;
    pool_block();
    pthread_mutex_lock(&f->lock);
    for (ours = f->syncs_begun + 1; f->syncs_over < ours;) {
        if (f->syncs_over < f->syncs_begun) {
            pthread_cond_wait(&f->changed, &f->lock);
            continue;
        }
        f->syncs_begun++;
        pthread_mutex_unlock(&f->lock);
        ret = file_sync_alone(f);
        pthread_mutex_lock(&f->lock);
        if (ret)
            atomic_compare_exchange_strong(&f->latched, &none, ret);
        f->syncs_over = f->syncs_begun;
        pthread_cond_broadcast(&f->changed);
    }
    ret = f->latched;
    pthread_mutex_unlock(&f->lock);
    pool_unblock();
    return ret;
}

/* fallocate(2). -EOPNOTSUPP where the host cannot do it. */
static int file_fallocate(struct file *f, int mode, uint64_t offset, uint64_t len)
{
    int ret;

    pool_block();
    util_record_begin();
    do
        ret = util_fault_op("fallocate") ? -1 : fallocate(f->fd, mode, (off_t)offset, (off_t)len);
    while (ret < 0 && errno == EINTR);
    util_record_end(ret == 0 && (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)), 'P', f, offset, len, NULL);
    ret = ret < 0 ? -errno : 0;
    pool_unblock();
    return ret == -ENOSYS || ret == -ENODEV ? -EOPNOTSUPP : ret;
}

static int file_truncate(struct file *f, uint64_t size)
{
    int ret = file_check_length(f);

    if (ret)
        return ret;
    pthread_mutex_lock(&f->lock);   /* length and f->size change together: see file_check_length() */
    util_record_begin();
    ret = util_fault_op("truncate") || ftruncate(f->fd, (off_t)size) < 0 ? -errno : 0;
    util_record_end(!ret, 'T', f, size, 0, NULL);
    if (!ret)
        f->size = size;
    pthread_mutex_unlock(&f->lock);
    return ret;
}

/* Makes it longer; what is new reads as zeros. */
static int file_grow(struct file *f, uint64_t size)
{
    int ret = size <= f->size ? 0 : file_truncate(f, size);

    return ret ? msg_serving(ret, "%s: cannot grow to %" PRIu64 " bytes: %s", f->path, size, strerror(-ret)) : 0;
}

/* Tries the system calls that reading and writing take, inside the sandbox. Changes nothing. */
static int file_test(struct file *f)
{
    struct stat st;
    uint8_t byte;

    if (fstat(f->fd, &st) == 0 && lseek(f->fd, 0, SEEK_END) >= 0 &&
        (!f->size || pread(f->fd, &byte, 1, 0) >= 0 || file_is_medium_error(errno)) &&
        (!f->writable || (!util_fault("test of writing") && pwrite(f->fd, "", 0, 0) == 0)))
        return 0;
    return msg_err(-errno, "%s: cannot be %s by the serving process: %s (--sandbox=off may help)", f->path,
                   f->writable ? "read and written" : "read", strerror(errno));
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

/* Puts references to the file's pages into an empty pipe. False, silently: not all can be had, so read the range. */
static bool file_splice(struct file *f, int pipe_fd, uint64_t len, uint64_t offset)
{
    uint8_t last;
    loff_t at = (loff_t)offset;
    bool sleeps;
    ssize_t n;

    if (util_fault_op("read") || util_fault_at(offset, len) || !file_is_plain(f, offset, len) ||
        offset + len > f->gone || (f->troubled && file_is_near_bad(f, offset, len)))
        return false;
    sleeps = f->sleep == FILE_ALWAYS_SLEEPS ||
             (f->sleep == FILE_MAY_SLEEP && file_pread_nowait(f, &last, 1, offset + len - 1) != 1);
    if (sleeps)
        pool_block();
    n = splice(f->fd, &at, pipe_fd, NULL, len, 0);
    if (sleeps)
        pool_unblock();
    if (n == (ssize_t)len)
        return true;
    if (n >= 0 || file_is_medium_error(errno))      /* what comes short has met an error, or the file's end */
        file_note_trouble(f, offset + (n > 0 ? (uint64_t)n : 0));
    return false;
}

/*
 * Is there data or a hole at offset, and for how long (1 to len)? Data where the host cannot tell, and past the end of
 * a truncated file: what was lost must not be taken for zeros.
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

/* -- closing -- */

static void file_close(struct file *f)
{
    if (!file_is_open(f))
        return;
    file_tell_bad(f);
    util_close(&f->direct_fd);
    util_close(&f->fd);
    free(f->bad.range);
    for (uint32_t i = 0; i < f->n_patches; i++)
        free(f->patches[i].page);
    free(f->patches);
    free(f->path);
    f->path = NULL;
}

/* Closes a file of which nothing is in the cache, so that its id is free again if it is the last one. */
static void file_forget(struct file *f)
{
    if (file_is_open(f) && f->id + 1 == file_ids)
        file_ids--;
    file_close(f);
}

/* While no other thread knows the file. */
static void file_move(struct file *to, struct file *from)
{
    file_tell_bad(from);
    *to = *from;
    pthread_mutex_init(&to->lock, NULL);
    pthread_cond_init(&to->changed, NULL);
    *from = (struct file){ 0 };
}

/*
 * -- new files --
 *
 * A new image appears under its name complete or not at all: it is written without a name (O_TMPFILE), or, where the
 * file system cannot do that, under a working name, and named when it is complete.
 */

/* Errors of a file system that lacks an operation; others (no space, no permission) stand for themselves. */
static bool file_is_unsupported(int ret)
{
    return ret == -EOPNOTSUPP || ret == -EINVAL || ret == -EISDIR || ret == -EPERM || ret == -ENOSYS ||
           ret == -EMLINK || ret == -EXDEV || ret == -ENOENT;
}

/* Returns a descriptor of a file without a name, or -errno. temporary: on FAT and NFS it has a name for a moment. */
static int file_make_unnamed(const char *directory, bool temporary)
{
    char name[PATH_MAX];
    int fd = util_fault("temporary file") ? -1 : open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

    if (fd >= 0)
        return fd;
    if (!temporary || !file_is_unsupported(-errno))
        return -errno;
    if ((size_t)snprintf(name, sizeof(name), "%s/.fuseexp-XXXXXX", directory) >= sizeof(name))
        return -ENAMETOOLONG;
    fd = mkostemp(name, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (unlink(name) == 0)
        return fd;
    close(fd);
    return -EIO;
}

/*
 * Makes and locks the file `name`: returns its descriptor, or -errno. First removes one that a killed process has left,
 * which shows by its lock being free. That lock is kept until the new file is locked, so that a third process does not
 * remove the new one.
 */
static int file_make_working(const char *name)
{
    struct stat held, seen;
    int old = -1, fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0 && errno == EEXIST) {
        old = open(name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (old >= 0 && flock(old, LOCK_EX | LOCK_NB) == 0 && fstat(old, &held) == 0 && S_ISREG(held.st_mode) &&
            lstat(name, &seen) == 0 && held.st_dev == seen.st_dev && held.st_ino == seen.st_ino && unlink(name) == 0)
            fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        else
            errno = EBUSY;
    }
    if (fd < 0)
        fd = -errno;
    else
        (void)flock(fd, LOCK_EX | LOCK_NB);
    util_close(&old);
    return fd;
}

/* The last resort for naming a file: claims the name with an empty file, and replaces that. */
static int file_rename_over_own(const char *working, const char *path)
{
    struct stat mine, seen;
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600), ret;

    if (fd < 0)
        return -errno;
    ret = fstat(fd, &mine) < 0 ? -errno : 0;
    close(fd);
    if (!ret && (lstat(path, &seen) < 0 || seen.st_dev != mine.st_dev || seen.st_ino != mine.st_ino || seen.st_size))
        return -EEXIST;             /* another program's by now */
    if (!ret && rename(working, path) == 0)
        return 0;
    ret = ret ? ret : -errno;
    unlink(path);
    return ret;
}

/* Names a complete file, unless the name exists: -EEXIST. working: its name so far; NULL: it has none. */
static int file_publish(int fd, const char *working, const char *path)
{
    char proc[40];
    int ret;

    if (!working) {
        snprintf(proc, sizeof(proc), "/proc/self/fd/%d", fd);
        return linkat(AT_FDCWD, proc, AT_FDCWD, path, AT_SYMLINK_FOLLOW) < 0 ? -errno : 0;
    }
    ret = syscall(SYS_renameat2, AT_FDCWD, working, AT_FDCWD, path, RENAME_NOREPLACE) < 0 ? -errno : 0;
    if (ret && file_is_unsupported(ret)) {   /* NFS, and FAT before Linux 4.9 */
        ret = link(working, path) < 0 ? -errno : 0;
        if (!ret)
            unlink(working);
        else if (file_is_unsupported(ret))
            ret = file_rename_over_own(working, path);
    }
    return ret;
}

/* Removes the working file, unless it was published (NULL), and unlocks it: on NFS flock(2) would keep QEMU out. */
static void file_leave_working(int fd, const char *working)
{
    if (working)
        unlink(working);
    (void)flock(fd, LOCK_UN);
}

static int file_sync_directory(const char *directory)
{
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), ret = 0;

    if (fd >= 0 && fsync(fd) < 0)
        ret = -errno;
    util_close(&fd);
    return ret;
}

/* ******************************************************************************************************** *
 * 8. Codecs
 *
 * One compressed cluster at a time, into a buffer of the size that it must decode to: more or less is an error, and
 * no size in a hostile stream is allocated. Each thread has its own decoder and its own buffer for coded bytes.
 * ******************************************************************************************************** */

enum { CODEC_KEEP = 128 << 10 };

static _Thread_local struct {
    struct libdeflate_decompressor *deflate;
    ZSTD_DCtx *zstd;
    uint8_t *coded;                 /* CODEC_KEEP bytes: a larger buffer per thread would be more than the cache */
} codec_own;

/* Frame by frame: there may be several, and padding after the last. */
static int codec_zstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    size_t done = 0, frame, n;

    if (!codec_own.zstd && !(codec_own.zstd = ZSTD_createDCtx()))
        return -ENOMEM;
    while (done < out_len) {
        frame = ZSTD_findFrameCompressedSize(in, in_len);
        if (ZSTD_isError(frame))
            return -EINVAL;
        n = ZSTD_decompressDCtx(codec_own.zstd, out + done, out_len - done, in, frame);
        if (ZSTD_isError(n))
            return -EINVAL;
        done += n;
        in += frame;
        in_len -= frame;
    }
    return 0;
}

static int codec_deflate(enum codec codec, const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    if (!codec_own.deflate && !(codec_own.deflate = libdeflate_alloc_decompressor()))
        return -ENOMEM;
    return (codec == CODEC_ZLIB ? libdeflate_zlib_decompress : libdeflate_deflate_decompress)(
               codec_own.deflate, in, in_len, out, out_len, NULL) == LIBDEFLATE_SUCCESS ? 0 : -EINVAL;
}

/*
 * Reads and decodes in_len bytes of f at offset, which must become exactly out_len. -EINVAL: they do not, which the
 * caller reports; -EIO: they cannot be read, which is reported already; -ENOMEM.
 */
static int codec_read(struct file *f, uint64_t offset, size_t in_len, enum codec codec, uint8_t *out, size_t out_len)
{
    uint8_t *coded, *large = in_len > CODEC_KEEP ? malloc(in_len) : NULL;
    uint64_t done;
    int ret = -ENOMEM;

    if (in_len <= CODEC_KEEP && !codec_own.coded)
        codec_own.coded = malloc(CODEC_KEEP);
    coded = in_len > CODEC_KEEP ? large : codec_own.coded;
    if (coded)
        ret = file_pread(f, coded, in_len, offset, &done) ? -EIO : 0;
    if (!ret)
        ret = (codec == CODEC_ZSTD ? codec_zstd(coded, in_len, out, out_len)
                                   : codec_deflate(codec, coded, in_len, out, out_len));
    free(large);
    return ret;
}

/* ******************************************************************************************************** *
 * 9. Table cache
 *
 * Slices of 4 KiB of metadata tables, in sets of CACHE_WAYS slots. One budget (--cache-size): tables may fill half of
 * it, decoded clusters have what the tables have not filled. Slots are reused, never freed.
 *
 * A hit takes no lock and writes nothing shared. A slot is a seqlock:
 *
 *   cache_peek(), any thread                     cache_put_words_locked(), with the set's lock
 *    1. tag: the wanted slice?                   a. sequence + 1: odd, a change is going on
 *    2. sequence: even?                          b. the words
 *    3. tag again: still the same?               c. tag: the slice, or 0
 *    4. the words                                d. sequence + 2: even again
 *    5. sequence: as in 2?
 *
 *   - 1 only passes over the slots of other slices. It proves nothing, so it needs no order.
 *   - 2 is an acquire load of what d released: the reader sees the tag and the words of that change, or later ones.
 *   - 3 is needed because the slot may have been refilled between 1 and 2. Example: 1 sees slice A, a refill with B
 *     goes from a to d, 2 sees the even number of B. Without 3 the reader would return words of B as A's.
 *   - 3 and 4 load with acquire what c and b stored with release. So a reader that gets the tag or a word of a change
 *     also sees its a, and 5, which is not done before 4, finds another number. Words of two moments never pass.
 *   - The same number after 2^31 changes of one slot during one lookup is not a case.
 * If no slot passes, the reader takes the set's lock and fills one.
 *
 * Tables that change in memory have one owner, a driver's writer. It keeps the words that the file lacks, and
 * registers file.newer(), which copies a slice that has such words:
 *   - A reader that misses holds the set's lock from its look at newer() and the file until the slot is filled.
 *   - The owner first changes what newer() copies, then calls cache_patch(), which takes the set's lock. So a reader
 *     that misses either copies the new word, or has filled the slot before cache_patch() changes the word there.
 *   - newer() copies a slice until the file has all its words. cache_forget() is for words that the owner has written
 *     to the file itself.
 * A file without newer() does not change, so it is read without the lock.
 * ******************************************************************************************************** */

enum {
    CACHE_SLICE = 4096,
    CACHE_WORDS = CACHE_SLICE / 8,
    CACHE_WAYS = 4,
    CACHE_NARROW_SETS = 64,         /* 1 MiB */
    CACHE_LOCKS = 64
};

struct cache_slot {
    _Atomic uint64_t tag;           /* 0: empty */
    _Atomic uint32_t sequence;      /* odd during a change */
    uint32_t next_way;              /* to be replaced next; in the first slot of a set, under the set's lock */
};

static struct {
    struct cache_slot *slots;
    _Atomic uint64_t *words;        /* CACHE_WORDS per slot, as they lie in the file */
    uint64_t n_sets;
    pthread_mutex_t set_lock[CACHE_LOCKS];  /* [set % CACHE_LOCKS]: changes of its slots; held while they are filled */
    uint64_t budget;                /* bytes: of tables and decoded clusters together */
    _Atomic uint64_t table_bytes;   /* of these, what the tables have: the slots that were ever filled */
} cache;

static int cache_start(uint64_t budget)
{
    uint64_t sets, slots;

    budget = util_min(budget, SIZE_MAX / 4);    /* a 32-bit process has no more to give */
    sets = budget / 2 / (CACHE_WAYS * (CACHE_SLICE + sizeof(struct cache_slot)));
    sets += sets == 0;
    slots = sets * CACHE_WAYS;
    cache.slots = util_fault("cache slots") ? NULL : calloc((size_t)slots, sizeof(*cache.slots));
    cache.words = util_fault("cache words") ? NULL : util_map(slots * CACHE_SLICE);
    cache.n_sets = sets;
    cache.budget = budget;
    cache.table_bytes = slots * sizeof(*cache.slots);
    for (size_t i = 0; i < CACHE_LOCKS; i++)
        pthread_mutex_init(&cache.set_lock[i], NULL);
    return cache.slots && cache.words ? 0 : msg_err(-ENOMEM, "out of memory for the cache");
}

static void cache_stop(void)
{
    free(cache.slots);
    util_unmap((void *)cache.words, cache.n_sets * CACHE_WAYS * CACHE_SLICE);
    cache.slots = NULL;
    cache.words = NULL;
    cache.table_bytes = 0;
    file_ids = 0;
}

static uint64_t cache_budget(void)
{
    return cache.budget;
}

/* Counts memory that is neither table nor decoded cluster against the budget, until cache_stop(). */
static void cache_charge(uint64_t bytes)
{
    cache.table_bytes += bytes;
}

/* Bytes that the tables leave of the budget. */
static uint64_t cache_left(void)
{
    uint64_t tables = cache.table_bytes;

    return tables < cache.budget ? cache.budget - tables : 0;
}

/*
 * Tables that are read once, of images that are not written, need not fill the cache: only the first sets are used
 * until cache_widen(). A slice that lies in the wrong set by then is not found, and replaced in time.
 */
static uint64_t cache_narrow(void)
{
    uint64_t sets = cache.n_sets;

    cache.n_sets = util_min(sets, CACHE_NARROW_SETS);
    return sets;
}

static void cache_widen(uint64_t sets)
{
    cache.n_sets = sets;
}

static uint64_t cache_hash(const struct file *f, uint64_t offset)
{
    uint64_t x = offset ^ (uint64_t)f->id << 48;

    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

/* Reads n words consistently; false if the slot has another slice, or changed meanwhile. See 1 to 5 above. */
static bool cache_peek(uint64_t slot, uint64_t tag, size_t word, uint64_t *value, size_t n)
{
    struct cache_slot *s = &cache.slots[slot];
    uint32_t before;

    if (atomic_load_explicit(&s->tag, memory_order_relaxed) != tag)
        return false;
    before = atomic_load_explicit(&s->sequence, memory_order_acquire);
    if (before & 1 || atomic_load_explicit(&s->tag, memory_order_acquire) != tag)
        return false;
    for (size_t i = 0; i < n; i++)
        value[i] = atomic_load_explicit(&cache.words[slot * CACHE_WORDS + word + i], memory_order_acquire);
    return atomic_load_explicit(&s->sequence, memory_order_relaxed) == before;
}

static uint64_t cache_set(const struct file *f, uint64_t start)
{
    return cache_hash(f, start) % cache.n_sets;
}

static uint64_t cache_tag(const struct file *f, uint64_t start)
{
    return start / CACHE_SLICE << 13 | (uint64_t)f->id << 1 | 1;
}

static pthread_mutex_t *cache_lock_of(uint64_t set)
{
    return &cache.set_lock[set % CACHE_LOCKS];
}

/* Changes n words of a slot and its tag; tag 0: it is empty. See a to d above. */
static void cache_put_words_locked(uint64_t slot, uint64_t tag, const uint64_t *words, size_t word, size_t n)
{
    struct cache_slot *s = &cache.slots[slot];
    uint32_t sequence = atomic_load_explicit(&s->sequence, memory_order_relaxed);

    if (sequence == 0)
        cache.table_bytes += CACHE_SLICE;
    atomic_store_explicit(&s->sequence, sequence + 1, memory_order_relaxed);
    for (size_t i = 0; i < n; i++)
        atomic_store_explicit(&cache.words[slot * CACHE_WORDS + word + i], words[i], memory_order_release);
    atomic_store_explicit(&s->tag, tag, memory_order_release);
    atomic_store_explicit(&s->sequence, sequence + 2, memory_order_release);
}

static void cache_fill_locked(uint64_t set, uint64_t tag, const uint64_t *slice)
{
    struct cache_slot *first = &cache.slots[set * CACHE_WAYS];

    for (uint64_t way = 0; way < CACHE_WAYS; way++) /* another thread that missed it may have filled it in */
        if (atomic_load_explicit(&first[way].tag, memory_order_relaxed) == tag)
            return;
    cache_put_words_locked(set * CACHE_WAYS + first->next_way++ % CACHE_WAYS, tag, slice, 0, CACHE_WORDS);
}

/* Reads the slice at start as it is now: its owner's words, or the file's, with zeros past the file's end. */
static int cache_load(struct file *f, uint64_t start, uint64_t *slice)
{
    uint64_t done, size = f->size;

    if (f->newer && f->newer(f->newer_owner, start, slice))
        return 0;
    if (start >= size || file_pread(f, slice, util_min(CACHE_SLICE, size - start), start, &done))
        return -EIO;
    memset((uint8_t *)slice + done, 0, CACHE_SLICE - done);
    return 0;
}

/*
 * Reads n words (8 bytes each, as they lie in the file) of a table in f at offset, all of them in one slice.
 * Past the file's end they are zeros, but -EIO where the whole slice is past it, or where they cannot be read.
 */
static int cache_words(struct file *f, uint64_t offset, uint64_t *value, size_t n)
{
    uint64_t start = offset / CACHE_SLICE * CACHE_SLICE, set = cache_set(f, start), tag = cache_tag(f, start);
    uint64_t slice[CACHE_WORDS], done;
    size_t word = (size_t)(offset - start) / 8;
    int failed, ret;

    for (uint64_t way = 0; way < CACHE_WAYS; way++)
        if (cache_peek(set * CACHE_WAYS + way, tag, word, value, n))
            return 0;
    if (f->newer)
        pool_lock(cache_lock_of(set));
    ret = failed = cache_load(f, start, slice);
    if (failed && offset + 8 * n <= f->size)    /* the bad sector of a slice need not be the one that is asked for */
        ret = file_pread(f, slice + word, 8 * n, offset, &done);
    if (!f->newer)
        pthread_mutex_lock(cache_lock_of(set));
    if (!failed)
        cache_fill_locked(set, tag, slice);
    pthread_mutex_unlock(cache_lock_of(set));
    if (!ret)
        memcpy(value, slice + word, 8 * n);
    return ret;
}

static int cache_word(struct file *f, uint64_t offset, uint64_t *value)
{
    return cache_words(f, offset, value, 1);
}

/* cache_be64(f, offset, &value) and so on: a number at a multiple of its size; 0 if it cannot be read. */
#define CACHE_ENDIAN(order, bits) \
    static int cache_##order##bits(struct file *f, uint64_t offset, uint##bits##_t *value) \
    { \
        uint64_t word; \
        int ret = cache_word(f, offset & ~7ull, &word); \
        *value = ret ? 0 : util_##order##bits((const uint8_t *)&word + (offset & (8 - (bits) / 8))); \
        return ret; \
    }
CACHE_ENDIAN(le, 32)
CACHE_ENDIAN(le, 64)
CACHE_ENDIAN(be, 32)
CACHE_ENDIAN(be, 64)

/* Changes n words in the slots that hold the slice at start; n 0: these become empty. */
static void cache_change(const struct file *f, uint64_t start, size_t word, const uint64_t *words, size_t n)
{
    uint64_t set = cache_set(f, start), tag = cache_tag(f, start);

    pool_lock(cache_lock_of(set));
    for (uint64_t slot = set * CACHE_WAYS; slot < (set + 1) * CACHE_WAYS; slot++)
        if (atomic_load_explicit(&cache.slots[slot].tag, memory_order_relaxed) == tag)
            cache_put_words_locked(slot, n ? tag : 0, words, word, n);
    pthread_mutex_unlock(cache_lock_of(set));
}

/* The owner has changed n words at offset, all in one slice. Not before f->newer() copies them. */
static void cache_patch(const struct file *f, uint64_t offset, const uint64_t *words, size_t n)
{
    cache_change(f, offset / CACHE_SLICE * CACHE_SLICE, offset % CACHE_SLICE / 8, words, n);
}

/* The owner has written [offset, offset + len) to the file. Not before f->newer() has no older words of it. */
static void cache_forget(const struct file *f, uint64_t offset, uint64_t len)
{
    for (uint64_t start = offset / CACHE_SLICE * CACHE_SLICE; start < offset + len; start += CACHE_SLICE)
        cache_change(f, start, 0, NULL, 0);
}

enum { CACHE_MAX_BITS = 1 << 15 };  /* of one call: 16 MiB of sectors */

/*
 * Reads a bitmap in f at offset (a multiple of 8): *set is bit `first`, *run is how many of the `count` bits from there
 * on are equal to it, at most CACHE_MAX_BITS. The first bit of a byte is its highest (big) or its lowest.
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

/* ******************************************************************************************************** *
 * 10. Decoded clusters
 *
 * A list in the order of use, in what the tables leave of the budget. A cluster is decoded once: a thread that wants
 * one that another thread is decoding waits for it. An entry with users is not dropped. If what is being decoded
 * fills the budget, further clusters wait, so the budget holds whatever the number of threads.
 *
 * These waits do not tell the pool: what they wait for is a processor, not a disk. Another worker in their place would
 * take one from the thread that decodes (measured: sequential zlib and zstd at three quarters of the speed).
 * ******************************************************************************************************** */

enum { DECODED_BUCKETS = 8192 };

struct decoded_cluster {
    struct decoded_cluster *hash_next, *newer, *older;
    const struct file *file;
    uint64_t offset;
    uint32_t length, coded_length, users;
    enum { DECODED_BUSY, DECODED_READY, DECODED_BROKEN } state;
    uint8_t data[];                 /* written by the thread that decodes it, immutable once it is ready */
};

static struct {
    pthread_mutex_t lock;           /* protects all of it, and every struct decoded_cluster but its data */
    pthread_cond_t changed;         /* a cluster is not busy any more */
    struct decoded_cluster *bucket[DECODED_BUCKETS], *newest, *oldest;
    uint64_t used;                  /* bytes: of clusters, and what they are being decoded from */
    uint64_t busy_bytes;            /* of these, what cannot be dropped now ... */
    unsigned busy;                  /* ... in so many clusters */
} decoded = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

static struct decoded_cluster **decoded_bucket(const struct file *f, uint64_t offset)
{
    return &decoded.bucket[cache_hash(f, offset) % DECODED_BUCKETS];
}

static void decoded_unlink_locked(struct decoded_cluster *c)
{
    *(c->newer ? &c->newer->older : &decoded.newest) = c->older;
    *(c->older ? &c->older->newer : &decoded.oldest) = c->newer;
}

/* As the newest, or as the oldest, which is the first to be dropped. */
static void decoded_link_locked(struct decoded_cluster *c, bool oldest)
{
    c->newer = oldest ? decoded.oldest : NULL;
    c->older = oldest ? NULL : decoded.newest;
    *(c->newer ? &c->newer->older : &decoded.newest) = c;
    *(c->older ? &c->older->newer : &decoded.oldest) = c;
}

static uint64_t decoded_bytes(uint64_t length)
{
    return sizeof(struct decoded_cluster) + length + length / 6;        /* what malloc() rounds up to */
}

/* Removes c from the table and the list; its memory is the caller's. */
static void decoded_remove_locked(struct decoded_cluster *c)
{
    struct decoded_cluster **p = decoded_bucket(c->file, c->offset);

    while (*p != c)
        p = &(*p)->hash_next;
    *p = c->hash_next;
    decoded_unlink_locked(c);
    decoded.used -= decoded_bytes(c->length);
}

/* Nobody decodes any more. The files of the clusters may be gone already. */
static void decoded_stop(void)
{
    for (struct decoded_cluster *c; (c = decoded.oldest);) {
        decoded.oldest = c->newer;
        free(c);
    }
    decoded.newest = NULL;
    memset(decoded.bucket, 0, sizeof(decoded.bucket));
    decoded.used = 0;
}

/*
 * Drops the least recently used clusters until one of `length` bytes more fits. A dropped one of the same length is
 * returned, for its memory: its pages are there already.
 */
static struct decoded_cluster *decoded_evict_locked(uint64_t length)
{
    uint64_t max = cache_left();
    struct decoded_cluster *c = decoded.oldest, *newer, *again = NULL;

    for (; c && decoded.used + decoded_bytes(length) > max; c = newer) {
        newer = c->newer;
        if (c->users)
            continue;
        decoded_remove_locked(c);
        if (!again && c->length == length)
            again = c;
        else
            free(c);
    }
    return again;
}

/* True: what is being decoded now, which cannot be dropped, leaves no room for ext. */
static bool decoded_is_full_locked(const struct extent *ext)
{
    return decoded.busy && decoded.busy_bytes + ext->decoded_length + ext->coded_length > cache_left();
}

static struct decoded_cluster *decoded_find_locked(const struct extent *ext)
{
    struct decoded_cluster *c = *decoded_bucket(ext->file, ext->offset);

    while (c && (c->file != ext->file || c->offset != ext->offset || c->length != ext->decoded_length ||
                 c->coded_length != ext->coded_length || c->state == DECODED_BROKEN))
        c = c->hash_next;
    return c;
}

/* A new entry, to be decoded by the caller, who is its user. */
static struct decoded_cluster *decoded_add_locked(const struct extent *ext)
{
    struct decoded_cluster **bucket = decoded_bucket(ext->file, ext->offset);
    struct decoded_cluster *c = decoded_evict_locked(ext->decoded_length);

    if (!c)
        c = malloc(sizeof(*c) + ext->decoded_length);
    if (!c)
        return NULL;
    *c = (struct decoded_cluster){ .hash_next = *bucket, .file = ext->file, .offset = ext->offset,
                                   .length = ext->decoded_length, .coded_length = ext->coded_length,
                                   .users = 1, .state = DECODED_BUSY };
    *bucket = c;
    decoded_link_locked(c, false);
    decoded.used += decoded_bytes(c->length);
    return c;
}

/* Decodes c, which the caller has just added, without the lock. */
static void decoded_fill_unlocked(struct decoded_cluster *c, const struct extent *ext)
{
    uint64_t in_len = util_min(util_min(ext->coded_length, MAX_CLUSTER + 512), ext->file->size - ext->offset);
    int ret;

    decoded.busy++;
    decoded.busy_bytes += ext->decoded_length + ext->coded_length;
    decoded.used += ext->coded_length;
    pthread_mutex_unlock(&decoded.lock);
    ret = codec_read(ext->file, ext->offset, in_len, ext->codec, c->data, ext->decoded_length);
    if (ret == -EINVAL)
        msg_serving(0, "%s: the compressed cluster at %" PRIu64 " does not decode", ext->file->path, ext->offset);
    pthread_mutex_lock(&decoded.lock);
    decoded.busy--;
    decoded.busy_bytes -= ext->decoded_length + ext->coded_length;
    decoded.used -= ext->coded_length;
    c->state = ret ? DECODED_BROKEN : DECODED_READY;
    pthread_cond_broadcast(&decoded.changed);
}

/* The caller is no user of c any more. A broken one goes: a read error may have been a passing one. */
static void decoded_put_locked(struct decoded_cluster *c)
{
    if (--c->users == 0 && c->state == DECODED_BROKEN) {
        decoded_remove_locked(c);
        free(c);
    }
}

/* WAIT until another thread has decoded it. PASSING: once its end was read, it is the first to be dropped. */
enum { DECODED_WAIT = 1, DECODED_PASSING = 2 };

/*
 * Reads len bytes from ext->skip on of what a compressed extent decodes to. -EAGAIN, without DECODED_WAIT: another
 * thread is decoding it. *hit: it was decoded already, or another thread was at it.
 */
static int decoded_read(const struct extent *ext, uint8_t *buf, uint64_t len, unsigned how, bool *hit)
{
    struct decoded_cluster *c;
    bool good;

    pthread_mutex_lock(&decoded.lock);
    while (!(c = decoded_find_locked(ext)) && decoded_is_full_locked(ext))
        pthread_cond_wait(&decoded.changed, &decoded.lock);
    *hit = c;
    if (c && c->state == DECODED_BUSY && !(how & DECODED_WAIT)) {
        pthread_mutex_unlock(&decoded.lock);
        return -EAGAIN;
    }
    if (c) {
        c->users++;
        decoded_unlink_locked(c);
        decoded_link_locked(c, false);
    } else if ((c = decoded_add_locked(ext))) {
        decoded_fill_unlocked(c, ext);
    }
    while (c && c->state == DECODED_BUSY)
        pthread_cond_wait(&decoded.changed, &decoded.lock);
    pthread_mutex_unlock(&decoded.lock);
    if (!c)
        return -ENOMEM;
    good = c->state == DECODED_READY;       /* it stays what it is, and c stays while we are its user */
    if (good)
        memcpy(buf, c->data + ext->skip, len);
    pthread_mutex_lock(&decoded.lock);
    if ((how & DECODED_PASSING) && ext->skip + len == c->length) {
        decoded_unlink_locked(c);
        decoded_link_locked(c, true);
    }
    decoded_put_locked(c);
    pthread_mutex_unlock(&decoded.lock);
    return good ? 0 : -EIO;
}

/* Decodes ahead of readers, unless the cluster is there, or on its way, or the budget is full. */
static void decoded_prefetch(const struct extent *ext)
{
    struct decoded_cluster *c;

    pthread_mutex_lock(&decoded.lock);
    if (!decoded_find_locked(ext) && !decoded_is_full_locked(ext) && (c = decoded_add_locked(ext))) {
        decoded_fill_unlocked(c, ext);
        decoded_put_locked(c);
    }
    pthread_mutex_unlock(&decoded.lock);
}

/* ******************************************************************************************************** *
 * 11. Format helpers
 *
 * What drivers have in common: extents that are bad, holes, neighbours that become one, and what they say about
 * parents.
 * ******************************************************************************************************** */

/* Rejects an invalid header, of the image's file at `path`: the image is not opened. */
static int fmt_refuse_in(const struct image *im, const char *path, const char *what, uint64_t value)
{
    return msg_err(-EINVAL, "%s: damaged or hostile %s image: %s (0x%" PRIx64 ")", path, im->format->name, what, value);
}

static int fmt_refuse(const struct image *im, const char *what, uint64_t value)
{
    return fmt_refuse_in(im, im->name, what, value);
}

/* Notes a damaged or unknown field that reading the disk does not need. */
static void fmt_odd(const struct image *im, const char *what, uint64_t value)
{
    msg_say(MSG_NOTE, "%s: a field is odd, but not needed: %s (0x%" PRIx64 ")", im->name, what, value);
}

/* As fmt_refuse(), for a table at `offset` of f. One that ends past the end of the file means a truncated file. */
static int fmt_refuse_table(const struct image *im, const struct file *f, const char *what, uint64_t offset,
                            uint64_t length)
{
    if (offset <= f->size && length <= f->size - offset)
        return fmt_refuse_in(im, f->path, what, offset);
    return msg_err(-EINVAL, "%s: cut off or damaged %s image: %s (0x%" PRIx64 "), past the end of the file, which "
                   "has %" PRIu64 " bytes: a whole copy is needed", f->path, im->format->name, what, offset,
                   (uint64_t)f->size);
}

/* Reads `what` at offset of f, one of the image's files. */
static int fmt_read(const struct image *im, struct file *f, uint64_t offset, void *buf, uint64_t len, const char *what)
{
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): an extent that is opened has a file */
    return offset > f->size || len > f->size - offset ? fmt_refuse_table(im, f, what, offset, len)
                                                      : file_read(f, buf, len, offset);
}

/* Refuses a valid image of a kind that is not supported. */
static int fmt_unsupported_in(const struct image *im, const char *path, const char *what, uint64_t value)
{
    return msg_err(-EOPNOTSUPP, "%s: a %s image of a kind that is not supported: %s (0x%" PRIx64 ")", path,
                   im->format->name, what, value);
}

static int fmt_unsupported(const struct image *im, const char *what, uint64_t value)
{
    return fmt_unsupported_in(im, im->name, what, value);
}

/* The data is encrypted with `how`; `who` can decrypt it. The tables are plain, so --info and --check still work. */
static int fmt_encrypted(struct image *im, const char *how, const char *who)
{
    im->encrypted = true;
    return im->opt->top_only ? 0
                             : msg_err(-EOPNOTSUPP, "%s: is encrypted (%s), which is not supported; %s can decrypt it, "
                                       "given the key, and --info and --check work", im->name, how, who);
}

static void ext_bad(struct extent *ext, uint64_t length, const char *why)
{
    *ext = (struct extent){ .kind = EXT_BAD, .length = length, .why = why };
}

/* Bad because f ends before `end`, up to which the image needs it. */
static void ext_past(struct extent *ext, uint64_t length, const char *why, struct file *f, uint64_t end)
{
    *ext = (struct extent){ .kind = EXT_BAD, .length = length, .why = why, .file = f, .offset = end };
}

/* Data of f at offset; bad from `end` on, which is the end of f or where its data ends. */
static void ext_data(struct extent *ext, uint64_t length, struct file *f, uint64_t offset, uint64_t end)
{
    if (offset >= end)
        ext_past(ext, length, "its data lies past the end of the file", f, offset + length);
    else
        *ext = (struct extent){ .kind = EXT_DATA, .length = util_min(length, end - offset), .file = f,
                                .offset = offset };
}

/* Has the time limit of this walk over the tables passed? */
static bool ext_time_is_up(struct claims *c)
{
    c->stopped |= c->until && util_clock() > c->until;
    return c->stopped;
}

/* Claims what entry i of a table refers to. by: the driver's context. */
typedef void ext_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i,
                             const uint8_t *entry);

/* Calls `each` for n entries of a table in f at `offset`. Entries that cannot be read are skipped. */
static void ext_claim_table(struct claims *c, const struct image *im, const void *by, struct file *f, uint64_t offset,
                            uint64_t n, uint64_t width, ext_claim_entry *each)
{
    uint8_t piece[32768];
    uint64_t done, got;

    for (uint64_t i = 0; i < n && !ext_time_is_up(c); i += got) {
        got = util_min(n - i, sizeof(piece) / width);
        if (offset + i * width >= f->size)
            return;
        done = util_min(got * width, f->size - offset - i * width);
        if (file_pread(f, piece, done, offset + i * width, &done))
            done = 0;
        for (uint64_t k = 0; k < done / width; k++)
            each(c, im, by, i + k, piece + k * width);
    }
}

/*
 * -- lost headers --
 *
 * A table of blocks is known by its shape: each entry is empty or names a block of the file, and no two name the same
 * one. The distances of the blocks tell their size. The first thing that is no entry is behind the table.
 */

enum { FMT_TABLE_MAX = 1 << 22 /* entries */, FMT_TABLE_FEW = 16 /* used entries: fewer may look right by chance */ };
#define FMT_NO_BLOCK UINT64_MAX
#define FMT_LOST_PARENT "; if it had a parent, what is there reads as zeros, unless --backing names it"

struct fmt_table {
    struct file *f;
    uint64_t offset, width, max;    /* in f; bytes of an entry; how many there are at most */
    bool (*entry)(const struct fmt_table *t, const uint8_t *bytes, uint64_t *block);    /* false: it cannot be one */
    uint64_t unit;                  /* for entry() */
    uint64_t n, used, lost, last;   /* entries; those with a block; not readable; index of the last with a block */
    uint64_t low, high;             /* the first and the last block */
    uint64_t stride, nearest;       /* what divides all distances; the smallest; 0: fewer than two blocks */
    bool has_zero;                  /* there is a block 0: another one is padding */
};

static uint64_t fmt_common_divisor(uint64_t a, uint64_t b)
{
    for (uint64_t rest; b; b = rest) {
        rest = a % b;
        a = b;
    }
    return a;
}

static int fmt_compare_blocks(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

/* Adds n entries. False: the table ends among them. */
static bool fmt_add_entries(struct fmt_table *t, const uint8_t *bytes, uint64_t n, uint64_t *blocks)
{
    uint64_t block;

    for (uint64_t i = 0; i < n; i++, t->n++) {
        if (!t->entry(t, bytes + i * t->width, &block) || (block == 0 && t->has_zero))
            return false;
        if (block == FMT_NO_BLOCK)
            continue;
        t->has_zero |= block == 0;
        t->last = t->n;
        blocks[t->used++] = block;
    }
    return true;
}

/* Reads the table by sectors and sets what it tells. False: it names no block, or one twice. */
static bool fmt_look_at_table(struct fmt_table *t)
{
    uint64_t *blocks = NULL, *more, per_sector = 512 / t->width, n;
    bool good = true;
    uint8_t sector[512];

    for (uint64_t at = t->offset; good && t->n < t->max && at + sizeof(sector) <= t->f->size; at += sizeof(sector)) {
        n = util_min(per_sector, t->max - t->n);
        if (file_read(t->f, sector, sizeof(sector), at)) {
            t->n += n;
            t->lost += n;
            continue;
        }
        more = realloc(blocks, (t->used + n) * sizeof(*blocks));
        good = more && fmt_add_entries(t, sector, n, more);
        blocks = more ? more : blocks;
    }
    if (t->used)
        qsort(blocks, t->used, sizeof(*blocks), fmt_compare_blocks);
    t->low = t->used ? blocks[0] : 0;
    t->high = t->used ? blocks[t->used - 1] : 0;
    for (uint64_t i = 1; i < t->used; i++) {
        t->nearest = util_min(i == 1 ? UINT64_MAX : t->nearest, blocks[i] - blocks[i - 1]);
        t->stride = fmt_common_divisor(t->stride, blocks[i] - blocks[i - 1]);
    }
    free(blocks);
    return t->used && (t->nearest || t->used == 1);
}

/* Reads a page that a rebuilt header goes into. Sectors that cannot be read become entries that are errors. */
static void fmt_read_page(struct file *f, uint64_t offset, uint8_t page[FILE_PATCH], uint8_t error)
{
    for (uint64_t at = 0; at < FILE_PATCH; at += 512)
        if (offset + at + 512 > f->size || file_read(f, page + at, 512, offset + at))
            memset(page + at, error, 512);
}

/* The kind of an unallocated range: in the backing file, or zeros if there is none. */
static enum extent_kind ext_hole(const struct image *im)
{
    return *im->backing_name ? EXT_BACKING : EXT_ZERO;
}

/* Is b, which follows a on the disk, a continuation of a? Without `exact` all zeros are alike. */
static bool ext_continues(const struct extent *a, const struct extent *b, bool exact)
{
    if (a->kind != b->kind || a->kind == EXT_BAD || a->kind == EXT_COMPRESSED)
        return false;
    if (a->kind == EXT_ZERO && !exact)
        return true;
    return a->zeroed == b->zeroed && a->owned == b->owned && a->file == b->file &&
           (!a->file || a->offset + a->length == b->offset);
}

/* Of an unallocated extent: bad where a table seems to be wiped. */
static void ext_suspect(const struct image *im, uint64_t offset, struct extent *ext)
{
    unsigned i = util_range_after(&im->suspect, offset);
    const struct range *r = &im->suspect.range[i];

    if ((ext->kind != EXT_ZERO && ext->kind != EXT_BACKING) || i == im->suspect.n || r->start >= offset + ext->length)
        return;
    if (r->start > offset)
        ext->length = r->start - offset;
    else
        ext_bad(ext, util_min(ext->length, r->end - offset), "its table is probably wiped (--suspect=data)");
}

/*
 * Max blocks joined into one extent. Fewer in the backing file: it may split the range into small extents, and the
 * range is mapped again after each of them.
 */
enum { EXT_MAX_BLOCKS = 1024, EXT_MAX_BACKING_BLOCKS = 128 };

/*
 * Maps [offset, offset + length), which is inside the image, without its backing files. Blocks that continue each
 * other become one extent. exact: allocated zeros differ from unallocated ones, and holes of a sparse file from data;
 * this may cost system calls. Without it EXT_DATA is right for anything that can be read.
 */
static void ext_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    struct extent next;
    bool data = true;

    im->format->map(im, offset, length, ext);
    for (unsigned n = 1; ext->length < length; n++) {
        if (n == (ext->kind == EXT_BACKING ? EXT_MAX_BACKING_BLOCKS : EXT_MAX_BLOCKS))
            break;
        if (ext->kind == EXT_BACKING && im->cluster_size && ext->length / im->cluster_size >= EXT_MAX_BACKING_BLOCKS)
            break;                  /* the hole of a whole table counts as its blocks */
        im->format->map(im, offset + ext->length, length - ext->length, &next);
        if (!ext_continues(ext, &next, exact))
            break;
        ext->length += next.length;
    }
    if (ext->kind != EXT_DATA && im->suspect.n && im->opt->suspect_errors)
        ext_suspect(im, offset, ext);
    if (exact && ext->kind == EXT_DATA && ext->sparse)
        file_seek_extent(ext->file, ext->offset, ext->length, &data, &ext->length);
    if (!data) {
        ext->kind = EXT_ZERO;
        ext->zeroed = true;
    }
}

/* Sets one value of an identity. The null UUID means that there is none. */
static void ext_set_id(struct identity *id, enum identity_kind kind, const uint8_t value[16])
{
    id->known[kind] = !text_is_null_id(value);
    memcpy(id->value[kind], value, 16);
}

/* The image has a parent of this format, identified by im->parent_id; ext_add_hint() adds its recorded names. */
static void ext_set_parent(struct image *im, const char *format)
{
    im->has_hints = true;
    util_copy(im->backing_name, sizeof(im->backing_name), "unnamed");
    util_copy(im->backing_format, sizeof(im->backing_format), format);
}

/* Adds a recorded name of the parent, often a Windows path. A name that no file can have is ignored. */
static int ext_add_hint(struct image *im, const char *name)
{
    char *hint;
    const char *last;

    if (im->n_hints == MAX_PARENT_NAMES || !*name)
        return 0;                   /* the parent is found by its identity, too */
    hint = util_fault("hint") ? NULL : strdup(name);
    if (!hint)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    for (char *p = hint; *p; p++)
        *p = *p == '\\' ? '/' : *p;
    last = util_basename(hint);
    if (!*last || strcmp(last, ".") == 0 || strcmp(last, "..") == 0 ||
        (im->n_hints && strcmp(im->hints[im->n_hints - 1], hint) == 0)) {
        free(hint);
        return 0;
    }
    if (!im->n_hints)
        util_copy(im->backing_name, sizeof(im->backing_name), name);
    im->hints[im->n_hints++] = hint;
    return 0;
}

/* Adds the name that VirtualBox gives to snapshots: {UUID}.EXTENSION */
static int ext_add_uuid_hint(struct image *im, const char *extension)
{
    char uuid[37], name[64];

    text_uuid(im->parent_id.value[ID_IMAGE], uuid);
    snprintf(name, sizeof(name), "{%s}.%s", uuid, extension);
    return ext_add_hint(im, name);
}

/* Is it a URL, or a name with a protocol as QEMU has them, rather than a file name? */
static bool fmt_is_url(const char *name)
{
    size_t n = strcspn(name, ":/");

    return name[n] == ':' && n > 1;
}

/* Is `path` (absolute, resolved) below the directory that the user allowed? */
static bool fmt_is_allowed(const struct image_options *opt, const char *path)
{
    char directory[PATH_MAX];
    size_t len;

    if (!opt->allow_external || !file_resolve(opt->allow_external, directory))
        return false;
    len = strlen(directory);
    return strncmp(directory, path, len) == 0 && (path[len] == '/' || len == 1);
}

/* Opens `name` below the image's directory, or else the one file whose name differs in letter case only. */
static int fmt_open_below(const struct image *im, struct file *f, const char *directory, const char *name,
                          const char *shown, bool writable, char matches[512])
{
    char fixed[PATH_MAX] = "", other[2 * PATH_MAX];
    int ret = file_open_beneath(f, directory, name, shown, writable), cased;

    if (ret != -ENOENT)
        return ret;
    cased = file_fix_case(directory, name, fixed, matches, 512);
    if (cased || strcmp(fixed, name) == 0)
        return cased == -ENOTUNIQ ? cased : ret;
    snprintf(other, sizeof(other), "%.*s%s", (int)(strlen(shown) - strlen(name)), shown, fixed);
    ret = file_open_beneath(f, directory, fixed, other, writable);
    if (!ret)
        msg_say(MSG_NOTE, "%s: '%s', which it names, is called '%s' here", im->name, name, fixed);
    return ret;
}

/*
 * Opens into f the file that the image calls `name`. It must be in or below the image's directory, or in the
 * directory of --allow-external. what, option: for messages; option NULL: there is none, and the caller reports
 * -ENOENT.
 */
static int fmt_open_named(struct image *im, struct file *f, const char *name, const char *what,
                          const char *option)
{
    char directory[PATH_MAX], shown[PATH_MAX + 1024], real[PATH_MAX], matches[512], *slash;
    char another[96] = "", or[64] = "";
    bool writable = im->writable && f >= im->files && f < im->files + MAX_PARTS;    /* of its own, no backing file */
    int ret;

    if (option && (im->depth == 0 || im->has_hints)) {
        snprintf(another, sizeof(another), "; %s FILE names another", option);
        snprintf(or, sizeof(or), "%s FILE or ", option);
    } else if (option) {                    /* one alone would name that of the image on top, and leave this one out */
        snprintf(another, sizeof(another), "; %s is for the image on top%s", option,
                 strcmp(option, "--backing") == 0 ? ", a second one for the one below" : " only");
    }
    if (strncmp(name, "file:", 5) == 0 && strncmp(name, "file://", 7) != 0)
        name += 5;
    if (fmt_is_url(name))
        return msg_err(-EPERM, "%s: its %s '%s' is not a plain file name%s", im->name, what, name, another);
    if (!util_copy(directory, sizeof(directory), im->files[0].path))
        return msg_err(-ENAMETOOLONG, "%s: path too long", im->name);
    slash = strrchr(directory, '/');
    snprintf(shown, sizeof(shown), "%.*s%s", name[0] == '/' || !slash ? 0 : (int)(slash - directory + 1), directory,
             name);
    if (slash)
        slash[slash == directory] = 0;
    if (file_resolve(shown, real) && fmt_is_allowed(im->opt, real))
        return file_open(f, real, writable);
    if (name[0] == '/' || im->files[0].is_blk)
        return msg_err(-EPERM,
                       "%s: its %s is '%s', outside of its directory; %s--allow-external DIR allows it",
                       im->name, what, name, or);
    ret = fmt_open_below(im, f, slash ? directory : ".", name, shown, writable, matches);
    if (ret == -EXDEV || ret == -ELOOP)
        return msg_err(ret,
                       "%s: its %s '%s' leads out of its directory; %s--allow-external DIR allows it",
                       im->name, what, name, or);
    if (ret == -ENOTUNIQ)
        return msg_err(ret, "%s: its %s '%s' is not there, but several that differ from it in letter case only: %s%s",
                       im->name, what, name, matches, another);
    if (ret && (option || ret != -ENOENT))
        msg_err(ret, "%s: cannot open its %s '%s': %s%s", im->name, what, name, strerror(-ret), another);
    return ret;
}

/* ******************************************************************************************************** *
 * 12. Lost ranges
 *
 * What could not be read, for --error-map: a sorted list of ranges, written as a ddrescue mapfile whenever a
 * second has passed since the last time, and at the end. Positions count from the start of what is shown. The
 * list has an end: when it is full, a new range is joined to its neighbour, and what lies between counts as bad.
 * And mapfiles that say what was not read when the image was made.
 * ******************************************************************************************************** */

static struct {
    pthread_mutex_t lock;           /* protects all of it */
    int fd;                         /* -1: nobody wants to know */
    struct ranges bad;
    uint64_t from, size;            /* what is shown */
    time_t written;
    bool failed;
} lost_list = { .lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1 };

/* A comment of our own maps: where in the disk its position 0 is, so that it fits again. */
static const char lost_origin[] = "# Position 0 is at byte ";

/* Never overwrites a file: it may be the map of another rescue. */
static int lost_start(const char *path, uint64_t from, uint64_t size)
{
    lost_list.bad.range = util_fault("error map") ? NULL : calloc(MAX_RANGES, sizeof(struct range));
    if (!lost_list.bad.range)
        return msg_err(-ENOMEM, "%s: out of memory", path);
    lost_list.from = from;
    lost_list.size = size;
    lost_list.fd = util_fault("error map file") ? -1 : open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (lost_list.fd < 0)
        return msg_err(-errno, "%s: cannot make the error map: %s", path, strerror(errno));
    return 0;
}

static bool lost_wanted(void)
{
    return lost_list.fd >= 0;
}

static void lost_stop(void)
{
    util_close(&lost_list.fd);
    free(lost_list.bad.range);
    lost_list.bad = (struct ranges){ NULL, 0 };
}

static bool lost_put(FILE *f, uint64_t start, uint64_t end, char status)
{
    return start >= end || fprintf(f, "0x%08" PRIX64 "  0x%08" PRIX64 "  %c\n", start, end - start, status) > 0;
}

static void lost_write_locked(void)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    uint64_t at = 0;
    bool good = f && fprintf(f, "# Mapfile. Created by fuseexp %s: - could not be read, + is the rest\n"
                             "%s0x%08" PRIX64 "\n"
                             "# current_pos  current_status  current_pass\n0x%08" PRIX64 "     +               1\n"
                             "#      pos        size  status\n", FUSEEXP_VERSION, lost_origin, lost_list.from,
                             lost_list.size) > 0;

    for (unsigned i = 0; i < lost_list.bad.n && good; at = lost_list.bad.range[i++].end)
        good = lost_put(f, at, lost_list.bad.range[i].start, '+') &&
               lost_put(f, lost_list.bad.range[i].start, lost_list.bad.range[i].end, '-');
    good = good && lost_put(f, at, lost_list.size, '+');
    if (f)
        good = fclose(f) == 0 && good;
    good = good && !util_fault_op("map") && pwrite(lost_list.fd, text, len, 0) == (ssize_t)len &&
           ftruncate(lost_list.fd, (off_t)len) == 0;
    if (!good && !lost_list.failed)
        msg_serving(0, "the error map cannot be written: %s", strerror(errno));
    lost_list.failed = !good;
    free(text);
    lost_list.written = time(NULL);
}

/* Writes what there is to write. False: the map is not what it should be. */
static bool lost_finish(void)
{
    bool good;

    pthread_mutex_lock(&lost_list.lock);
    if (lost_list.fd >= 0)
        lost_write_locked();
    good = !lost_list.failed;
    pthread_mutex_unlock(&lost_list.lock);
    return good;
}

static void lost_note(uint64_t offset, uint64_t len)
{
    uint64_t start = offset > lost_list.from ? offset - lost_list.from : 0;
    uint64_t end = util_min(offset + len - lost_list.from, lost_list.size);
    const struct range *near;
    unsigned i;

    if (lost_list.fd < 0 || offset + len <= lost_list.from || start >= end)
        return;
    pthread_mutex_lock(&lost_list.lock);
    if (!util_range_add(&lost_list.bad, start, end)) {
        i = util_range_after(&lost_list.bad, start);
        near = &lost_list.bad.range[i - (i == lost_list.bad.n)];
        util_range_add(&lost_list.bad, util_min(start, near->start), end > near->end ? end : near->end);
    }
    if (lost_list.written != time(NULL))
        lost_write_locked();
    pthread_mutex_unlock(&lost_list.lock);
}

/*
 * -- mapfiles --
 *
 * GNU ddrescue's manual, "Mapfile structure". Lines of text; a "#" at the start or after a blank begins a
 * comment. The first other line is the state of ddrescue: a position, its status and a pass. Then a line for each
 * range, in order: position, size, status. Numbers are those of C. More fields are ignored: other programs add some.
 *
 * Zeros in the image do not tell whether they were read. So all that is not "+" is an error, and so is what no
 * line covers.
 */

static const struct { char status; const char *why; } lost_statuses[] = {
    { '+', NULL },
    { '?', "not tried yet, says the mapfile (?)" },
    { '*', "failed and not trimmed yet, says the mapfile (*)" },
    { '/', "failed and not scraped yet, says the mapfile (/)" },
    { '-', "a bad sector, says the mapfile (-)" },
};
static const char lost_uncovered[] = "not covered by the mapfile";

struct lost_reader {
    FILE *f;
    uint64_t left;                  /* bytes that may still be read */
    unsigned line;
    char text[256], comment[80];    /* of this line, as much as fits */
    bool heading;                   /* ddrescue's title was among the comments */
    int64_t origin;                 /* likewise, lost_origin */
    uint64_t end;                   /* of the last range, by the file's positions */
};

/* Reads a line. False: there is none left. */
static bool lost_next_line(struct lost_reader *r)
{
    size_t n = 0, n_comment = 0;
    bool in_comment = false;
    int c = EOF, last = '\n';

    for (r->line++; r->left && (c = getc(r->f)) != EOF && c != '\n'; last = c) {
        r->left--;
        in_comment |= c == '#' && isspace(last);
        if (in_comment && n_comment < sizeof(r->comment) - 1)
            r->comment[n_comment++] = (char)c;
        else if (!in_comment && n < sizeof(r->text) - 1)
            r->text[n++] = (char)c;
    }
    r->left -= r->left && c != EOF;     /* the newline */
    r->text[n] = r->comment[n_comment] = 0;
    r->heading |= strncmp(r->comment, "# Mapfile", 9) == 0 || strncmp(r->comment, "# Rescue Logfile", 16) == 0;
    if (strncmp(r->comment, lost_origin, sizeof(lost_origin) - 1) == 0)
        r->origin = strtoll(r->comment + sizeof(lost_origin) - 1, NULL, 16);
    return c != EOF && r->left;
}

/* Reads a line that is more than a comment; the last one need not end in a newline. False: there is none left. */
static bool lost_next_words(struct lost_reader *r)
{
    bool more;

    do
        more = lost_next_line(r);
    while (more && !r->text[strspn(r->text, " \t\r")]);
    return r->text[strspn(r->text, " \t\r")];
}

/* Moves *text past a number, MAX_IMAGE_SIZE at most. False: there is none. */
static bool lost_parse_number(const char **text, uint64_t *value)
{
    const char *start = *text + strspn(*text, " \t");
    char *end;

    if (!isdigit((unsigned char)*start))
        return false;
    errno = 0;
    *value = strtoull(start, &end, 0);
    *text = end;
    return !errno && *value <= (uint64_t)MAX_IMAGE_SIZE && (!*end || isspace((unsigned char)*end));
}

/* The status that text begins with, one of `accepted`; 0: it is none. */
static char lost_parse_status(const char *text, const char *accepted)
{
    text += strspn(text, " \t");
    return *text && strchr(accepted, *text) && (!text[1] || isspace((unsigned char)text[1])) ? *text : 0;
}

static bool lost_is_state(const char *text)
{
    uint64_t at;

    return lost_parse_number(&text, &at) && lost_parse_status(text, "?*/-FG+");
}

/* Reads the line's range. NULL, or what is wrong with it. */
static const char *lost_parse_range(struct lost_reader *r, uint64_t *start, uint64_t *end, const char **why)
{
    const char *text = r->text;
    uint64_t size;
    char status;

    if (!lost_parse_number(&text, start) || !lost_parse_number(&text, &size))
        return "no position and size from 0 to 0x7fffffffffffffff";
    status = lost_parse_status(text, "?*/-+");
    if (!status)
        return "no status, which is one of ? * / - +";
    if (size > (uint64_t)MAX_IMAGE_SIZE - *start)
        return "ends past what a disk can have";
    if (*start < r->end)
        return "begins before the end of the range before it";
    r->end = *end = *start + size;
    for (size_t i = 0; i < ARRAY_LEN(lost_statuses); i++)
        if (lost_statuses[i].status == status)
            *why = lost_statuses[i].why;
    return NULL;
}

/* A name proves nothing: there must be a state, and ddrescue's title or two ranges. Rewinds the file. */
static bool lost_is_map(FILE *f)
{
    struct lost_reader r = { .f = f, .left = 65536 };
    uint64_t start, end;
    const char *why;
    bool good = lost_next_words(&r) && lost_is_state(r.text);

    for (int i = 0; i < 2 && good && !r.heading; i++)
        good = lost_next_words(&r) && !lost_parse_range(&r, &start, &end, &why);
    rewind(f);
    return good;
}

static void lost_free(struct lost_map *m)
{
    if (m) {
        free(m->span);
        free(m->path);
    }
    free(m);
}

/* From `start` on the disk was not read because of `why`, or it was (NULL). */
static int lost_add(struct lost_map *m, uint64_t start, const char *why)
{
    uint64_t max = cache_budget() / 4 / sizeof(*m->span);
    struct lost_span *more;

    if (m->n && m->span[m->n - 1].why == why)
        return 0;
    if (m->n >= max)
        return msg_err(-E2BIG, "%s: more than %" PRIu64 " ranges, which is what --cache-size allows", m->path, max);
    if (!m->span || m->n == m->room) {
        m->room = (unsigned)util_min(util_min(2 * (uint64_t)m->room + 64, max), UINT_MAX / 2);
        more = util_fault("mapfile") ? NULL : realloc(m->span, m->room * sizeof(*more));
        if (!more)
            return msg_err(-ENOMEM, "%s: out of memory", m->path);
        m->span = more;
    }
    m->span[m->n++] = (struct lost_span){ start, why };
    return 0;
}

/* Where a position of the map lies on the disk: not before its start. */
static uint64_t lost_shift(uint64_t position, int64_t by)
{
    uint64_t back = 0 - (uint64_t)by;

    if (by < 0)
        return position > back ? position - back : 0;
    return util_min(position + (uint64_t)by, (uint64_t)MAX_IMAGE_SIZE);
}

/* Reads all ranges. shift: of positions; 0: as the map says. */
static int lost_read_map(struct lost_map *m, FILE *f, int64_t shift)
{
    struct lost_reader r = { .f = f, .left = UINT64_MAX };
    const char *wrong = "no mapfile of GNU ddrescue: its first line is not position and status", *why = NULL;
    uint64_t start, end, covered = 0;
    int ret = 0;

    if (!lost_next_words(&r) || !lost_is_state(r.text))
        return msg_err(-EINVAL, "%s: line %u: %s", m->path, r.line, wrong);
    shift = shift ? shift : r.origin;       /* the same for all: a comment further down must not change the order */
    while (!ret && lost_next_words(&r)) {
        wrong = lost_parse_range(&r, &start, &end, &why);
        if (wrong)
            return msg_err(-EINVAL, "%s: line %u: %s (%s)", m->path, r.line, wrong, text_trim(r.text));
        start = lost_shift(start, shift);
        end = lost_shift(end, shift);
        if (start >= end)
            continue;
        if (start > covered)
            ret = lost_add(m, covered, lost_uncovered);
        if (!ret)
            ret = lost_add(m, start, why);
        covered = end;
    }
    if (!ret && ferror(f))
        return msg_err(-EIO, "%s: %s", m->path, strerror(errno));
    return ret ? ret : lost_add(m, covered, lost_uncovered);
}

/* Sums up what was not read of a disk of `size` bytes. Returns how many bytes were read that it has not. */
static uint64_t lost_sum_up(struct lost_map *m, uint64_t size)
{
    uint64_t start, end, cut = 0;

    for (unsigned i = 0; i < m->n; i++) {
        start = m->span[i].start;
        end = i + 1 < m->n ? m->span[i + 1].start : UINT64_MAX;
        if (!m->span[i].why && end > size)
            cut += end - (start > size ? start : size);
        if (m->span[i].why && start < size) {
            m->bytes += util_min(end, size) - start;
            m->ranges += !i || !m->span[i - 1].why;
        }
    }
    return cut;
}

/* What the map says at offset; *length: how far that holds, at most what it is. */
static const char *lost_why(const struct lost_map *m, uint64_t offset, uint64_t *length)
{
    unsigned next = util_count_up_to(&m->span->start, sizeof(*m->span), m->n, offset);

    if (next < m->n)
        *length = util_min(*length, m->span[next].start - offset);
    return m->span[next - 1].why;
}

/* Opens a mapfile. strange: it may be something else than a file, since the user named it. */
static FILE *lost_open(const char *path, const struct file *image, bool strange)
{
    int fd = open(path, strange ? O_RDONLY | O_CLOEXEC : O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;
    FILE *f = NULL;

    if (fd >= 0 && fstat(fd, &st) == 0 && (strange || (S_ISREG(st.st_mode) && !file_is(image, &st))))
        f = fdopen(fd, "re");
    if (!f)
        util_close(&fd);
    return f;
}

/* Opens the mapfile beside an image: its name, whole or without the last ending, and one of four. NULL: none. */
static FILE *lost_find(const struct file *image, char path[PATH_MAX])
{
    static const char *const endings[] = { ".map", ".mapfile", ".log", ".logfile" };
    const char *name = util_basename(image->path), *dot = strrchr(name, '.');
    size_t whole = strlen(image->path), stem = dot && dot > name ? (size_t)(dot - image->path) : 0;
    FILE *f;

    for (size_t i = 0; i < 2 * ARRAY_LEN(endings); i++) {
        const char *ending = endings[i % ARRAY_LEN(endings)];
        size_t len = i < ARRAY_LEN(endings) ? whole : stem;
        if (!len || snprintf(path, PATH_MAX, "%.*s%s", (int)len, image->path, ending) >= PATH_MAX)
            continue;
        f = lost_open(path, image, false);
        if (f && lost_is_map(f))
            return f;
        if (f)
            fclose(f);
    }
    return NULL;
}

/* ******************************************************************************************************** *
 * 13. Image I/O
 *
 * The loops over extents, through the whole chain. Calls drivers by their table only, so drivers may use it for the
 * image below them.
 * ******************************************************************************************************** */

/* Was the front of this range not read when the image was made? Then describes it; else *length is what was. */
static bool img_is_unread(const struct image *im, uint64_t offset, uint64_t *length, struct extent *ext)
{
    const char *why = lost_why(im->unread, offset, length);

    ext_bad(ext, *length, why);
    ext->depth = im->depth;
    return why;
}

/*
 * As image_format.map, but for any offset and through the whole chain: never EXT_BACKING. What lies past the end of
 * the image is bad, and what its mapfile calls so; past the end of a backing file that is shorter than its child
 * it is zero.
 */
static void img_map(struct image *im, uint64_t offset, uint64_t length, bool exact, struct extent *ext)
{
    uint64_t size;

    for (;; im = im->backing, length = ext->length) {
        size = im->size;
        if (offset >= size) {
            *ext = (struct extent){ .kind = im->child ? EXT_ZERO : EXT_BAD, .length = length,
                                    .depth = im->depth ? im->depth - 1 : 0,
                                    .why = "past the end of the image" };
            return;
        }
        length = util_min(length, size - offset);
        if (im->unread && img_is_unread(im, offset, &length, ext))
            return;
        ext_map(im, offset, length, exact, ext);
        ext->depth = im->depth;
        if (ext->kind != EXT_BACKING)
            return;
        if (!im->backing) {
            ext->kind = EXT_BAD;
            ext->why = "in the backing file, which was not opened";
            return;
        }
    }
}

/*
 * Sequential readers of compressed clusters get decode-ahead. A stream is known by where its next request should begin;
 * large requests may come out of order, since the kernel sends several at once.
 */
enum { IMG_STREAMS = 8, IMG_LARGE = 64 << 10, IMG_AHEAD = 1 << 20, IMG_PENDING = 32 };

static struct {
    pthread_mutex_t lock;           /* protects all of it */
    struct { uint64_t next, ahead; } stream[IMG_STREAMS];   /* ahead: offered up to here */
    unsigned turn;
} img_streams = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Notes a request for [offset, end). How far to decode ahead, from *start on; nothing if not beyond it. */
static uint64_t img_follow(uint64_t offset, uint64_t end, uint64_t window, uint64_t *start)
{
    uint64_t until = 0, slack = end - offset >= IMG_LARGE ? IMG_AHEAD : 0;
    unsigned i = 0;

    pthread_mutex_lock(&img_streams.lock);
    while (i < IMG_STREAMS && (offset > img_streams.stream[i].next + slack ||
                               offset + slack < img_streams.stream[i].next))
        i++;
    if (i == IMG_STREAMS || img_streams.stream[i].next == 0) {
        i = i < IMG_STREAMS ? i : img_streams.turn++ % IMG_STREAMS;
        img_streams.stream[i].next = img_streams.stream[i].ahead = end;
    } else {
        if (end > img_streams.stream[i].next)
            img_streams.stream[i].next = end;
        until = img_streams.stream[i].next + window;
        *start = end > img_streams.stream[i].ahead ? end : img_streams.stream[i].ahead;
        if (until > *start)
            img_streams.stream[i].ahead = until;
    }
    pthread_mutex_unlock(&img_streams.lock);
    return until;
}

static void img_prefetch(void *arg, uint64_t offset, uint64_t length)
{
    struct extent ext;

    for (uint64_t end = offset + length; offset < end; offset += ext.length) {
        img_map(arg, offset, end - offset, false, &ext);
        if (ext.kind == EXT_COMPRESSED)
            decoded_prefetch(&ext);
    }
}

/*
 * A request for [offset, end) begins with a compressed cluster, described by ext: lets others decode what
 * follows in the request, and what will be asked for next.
 */
static void img_share_decoding(struct image *im, const struct extent *ext, uint64_t offset, uint64_t end)
{
    uint64_t piece = ext->decoded_length > IMG_LARGE ? ext->decoded_length : IMG_LARGE;
    uint64_t window = 2 * piece > IMG_AHEAD ? 2 * piece : IMG_AHEAD;
    struct pool_job rest = { img_prefetch, im, offset + ext->length, end - util_min(end, offset + ext->length) };
    struct pool_job ahead = { img_prefetch, im, 0, 0 };
    uint64_t until = img_follow(offset, end, window, &ahead.offset);

    if (rest.length)
        pool_offer(&rest, piece);
    ahead.length = until > ahead.offset ? until - ahead.offset : 0;
    if (ahead.length && window < cache_budget() / 4)
        pool_offer(&ahead, piece);
}

/*
 * A read of plain data has failed, *part bytes in. Notes what is bad: all of it in the page, since a reader through the
 * page cache will not ask for the rest. With --on-error=zero it becomes zeros, and the rest is read.
 */
static int img_salvage(struct image *im, const struct extent *ext, uint8_t *to, uint64_t n, uint64_t offset,
                       uint64_t *part)
{
    bool zero = im->opt->zero_errors;
    uint64_t at = *part, end = zero ? n : util_min(n, at + 4096 - (ext->offset + at) % 4096), bad, good;

    for (; at < end; at += good) {
        bad = file_bad_length(ext->file, ext->offset + at, n - at);
        lost_note(offset + at, bad);
        if (zero)
            memset(to + at, 0, bad);
        at += bad;
        good = 0;
        if (at < end && zero)
            (void)file_pread(ext->file, to + at, n - at, ext->offset + at, &good);
        else if (at < end)
            good = file_find_bad(ext->file, ext->offset + at, end - at, &bad);
    }
    if (!zero)
        return -EIO;
    *part = n;
    return 0;
}

/* n bytes cannot be read: returns the error, or fills in zeros if the user asked for them. */
static int img_report_bad(struct image *im, int ret, uint8_t *to, uint64_t n, uint64_t offset, uint64_t *part)
{
    *part = 0;
    if (ret != -EIO)
        return ret;
    lost_note(offset, n);
    if (!im->opt->zero_errors)
        return ret;
    memset(to, 0, n);
    *part = n;
    return 0;
}

/* Records the bad ranges in the rest of a request that failed: the reader may never ask for them again. */
static void img_note_rest(struct image *im, uint64_t offset, uint64_t end)
{
    struct extent ext;

    for (; lost_wanted() && offset < end; offset += ext.length) {
        img_map(im, offset, end - offset, false, &ext);
        if (ext.kind == EXT_BAD)
            lost_note(offset, util_min(ext.length, end - offset));
    }
}

/* Compressed clusters that another worker is decoding: read last. */
struct img_pending {
    struct extent ext;
    uint8_t *buf;
    uint64_t len, at;               /* at: in the request */
};

static int img_read_pending(struct image *im, uint64_t offset, const struct img_pending *pending, unsigned n,
                            unsigned how, uint64_t *done)
{
    uint64_t part;
    int ret = 0, r;
    bool hit;

    for (unsigned i = 0; i < n; i++) {
        r = decoded_read(&pending[i].ext, pending[i].buf, pending[i].len, DECODED_WAIT | how, &hit);
        if (r)
            r = img_report_bad(im, r, pending[i].buf, pending[i].len, offset + pending[i].at, &part);
        if (r && pending[i].at < *done) {
            *done = pending[i].at;
            ret = r;
        }
    }
    return ret;
}

/* Fills buf or fails; in both cases the first *done bytes are good. */
static int img_read(struct image *im, void *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    struct img_pending pending[IMG_PENDING];
    unsigned n_pending = 0, how = len >= IMG_LARGE ? DECODED_PASSING : 0;
    bool shared = false, hit;
    struct extent ext;
    uint64_t n, part;
    int ret = 0, late;

    for (*done = 0; *done < len && !ret; *done += part) {
        uint8_t *to = (uint8_t *)buf + *done;
        img_map(im, offset + *done, len - *done, false, &ext);
        n = part = util_min(ext.length, len - *done);
        if (ext.kind == EXT_DATA) {
            ret = file_pread(ext.file, to, n, ext.offset, &part);
            if (ret && (im->opt->zero_errors || lost_wanted()))
                ret = img_salvage(im, &ext, to, n, offset + *done, &part);
        } else if (ext.kind == EXT_ZERO) {
            memset(to, 0, n);
        } else if (ext.kind == EXT_COMPRESSED) {
            if (!shared && len >= IMG_LARGE)
                img_share_decoding(im, &ext, offset + *done, offset + len);
            ret = decoded_read(&ext, to, n, n_pending == IMG_PENDING ? how | DECODED_WAIT : how, &hit);
            if (!shared && len < IMG_LARGE && !hit)
                img_share_decoding(im, &ext, offset + *done, offset + len);
            shared = true;
            if (ret == -EAGAIN) {
                pending[n_pending++] = (struct img_pending){ ext, to, n, *done };
                ret = 0;
            }
            if (ret)
                ret = img_report_bad(im, ret, to, n, offset + *done, &part);
        } else {
            ret = msg_serving(-EIO, "%s: cannot read %" PRIu64 " bytes at %" PRIu64 ": %s", im->name, n,
                              offset + *done, ext.why);
            ret = img_report_bad(im, ret, to, n, offset + *done, &part);
        }
    }
    if (shared && len >= IMG_LARGE)
        pool_withdraw(im, offset, offset + len);
    if (ret == -EIO)
        img_note_rest(im, offset + *done, offset + len);
    late = img_read_pending(im, offset, pending, n_pending, how, done);
    return late ? late : ret;
}

static int img_note_failure(struct image *im, int ret)
{
    if (ret)
        im->failed = true;
    return ret;
}

/*
 * -- the size --
 *
 * The size that readers see, the kernel's and the file's change in one step:
 *   1. Take size_lock: one change at a time.
 *   2. To shrink, lower `admit`. New requests past it wait for size_lock; then wait for the requests that were in
 *      flight (pool_wait_grace()). After that nobody reads or writes there.
 *   3. The driver resizes the image. The range that was cut off or added reads as zeros. On failure the size stays.
 *   4. Publish im->size.
 * A write past the end writes its data between 3 and 4, so that nobody sees the size without the data. If it fails,
 * the size stays: else the next O_APPEND write would leave a gap of zeros.
 *
 * A request that waits for size_lock has looked up nothing yet and has left its epoch, so step 2 does not wait for
 * it: the two would wait for each other.
 *
 * The kernel does not wait for asynchronous writes before it truncates. A write made before a cut that arrives after
 * it neither grows the disk nor writes past the cut, even if the disk has grown again (image.cut, cut_to).
 */
static void img_lock_size(struct image *im)
{
    if (pthread_mutex_trylock(&im->size_lock) == 0)
        return;
    epoch_leave();
    pool_block();
    pthread_mutex_lock(&im->size_lock);
    pool_unblock();
    epoch_enter();
}

/*
 * How much of [offset, offset + len) is inside the disk until the request completes. Call it before anything is
 * looked up. It reads `admit` before the size: if `admit` shows no change, then a change has either completed, or
 * will wait for this request.
 */
static uint64_t img_inside(struct image *im, uint64_t offset, uint64_t len)
{
    uint64_t end = im->admit;

    end = util_min(end, im->size);
    if (offset + len > end) {
        img_lock_size(im);
        end = im->size;
        pthread_mutex_unlock(&im->size_lock);
    }
    return offset < end ? util_min(len, end - offset) : 0;
}

static int img_resize_locked(struct image *im, uint64_t old, uint64_t size)
{
    int ret;

    if (size == old)
        return 0;
    if (size > (uint64_t)MAX_IMAGE_SIZE)
        return -EFBIG;
    ret = im->format->resize ? im->format->resize(im, old, size) : -EOPNOTSUPP;
    if (ret && ret != -EOPNOTSUPP)
        msg_serving(ret, "%s: cannot change its size to %" PRIu64 ": %s", im->name, size, strerror(-ret));
    return ret == -EIO ? img_note_failure(im, ret) : ret;
}

/* ticket: increases with each request, in the order in which the requests were made. */
static int img_resize(struct image *im, uint64_t size, uint64_t ticket)
{
    bool cut;
    int ret;

    img_lock_size(im);
    cut = size < im->size;
    if (cut) {
        im->admit = size;
        pool_wait_grace();
    }
    ret = img_resize_locked(im, im->size, size);
    if (!ret)
        im->size = size;
    if (!ret && cut) {
        im->cut_to = size;          /* before `cut`: whoever sees the new ticket reads it */
        im->cut = ticket;
    }
    im->admit = UINT64_MAX;
    pthread_mutex_unlock(&im->size_lock);
    return ret;
}

/* Writes to, or zeroes (buf NULL, with fallocate(2)'s mode), the front of the range that ext describes. */
static int img_change_owned(const struct extent *ext, const uint8_t *buf, int mode, uint64_t len, uint64_t *part)
{
    uint64_t n = util_min(ext->length, len);
    int ret;

    *part = 0;
    if (buf)
        return file_pwrite(ext->file, buf, n, ext->offset, part);
    ret = file_fallocate(ext->file, mode, ext->offset, n);
    if (ret == -EOPNOTSUPP && (mode & FALLOC_FL_ZERO_RANGE))
        ret = file_write_zeros(ext->file, ext->offset, n);
    *part = ret ? 0 : n;
    return ret;
}

static int img_change(struct image *im, const void *buf, int mode, uint64_t len, uint64_t offset, uint64_t *done);

/*
 * Writes zeros where the driver cannot free a whole cluster. With PUNCH_HOLE it punches the hole into the host's
 * file, which needs no space: it works on a full disk.
 */
static int img_write_zeros(struct image *im, int mode, uint64_t len, uint64_t offset, uint64_t *done)
{
    static const uint8_t zeros[65536];
    struct extent ext = { .kind = EXT_BAD };

    if (mode & FALLOC_FL_PUNCH_HOLE)
        ext_map(im, offset, len, false, &ext);
    if (ext.kind == EXT_DATA && ext.owned &&
        img_change_owned(&ext, NULL, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, len, done) == 0)
        return 0;
    return img_change(im, zeros, 0, util_min(len, sizeof(zeros)), offset, done);
}

/*
 * Changes a range extent by extent: what the image owns is overwritten in place, without a lock; the driver does the
 * rest. buf NULL: zeroes or allocates, with fallocate(2)'s mode. Fails rather than loop without progress.
 */
static int img_change(struct image *im, const void *buf, int mode, uint64_t len, uint64_t offset, uint64_t *done)
{
    const struct image_format *format = im->format;
    struct extent ext;
    uint64_t part;
    int ret = 0;

    for (*done = 0; *done < len && !ret; *done += part) {
        const uint8_t *from = buf ? (const uint8_t *)buf + *done : NULL;
        part = 0;
        if (!buf && format->zero && (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))) {
            ret = format->zero(im, len - *done, offset + *done, &part);
            if (ret == -EOPNOTSUPP)
                ret = img_write_zeros(im, mode, part, offset + *done, &part);
            continue;
        }
        ext_map(im, offset + *done, len - *done, false, &ext);
        if (ext.kind == EXT_DATA && ext.owned)
            ret = img_change_owned(&ext, from, mode, len - *done, &part);
        else
            ret = format->write ? format->write(im, from, len - *done, offset + *done, &part) : -EIO;
    }
    /* A refused discard or allocation loses no data. */
    return buf || ret == -EIO ? img_note_failure(im, ret) : ret;
}

/* As img_change(), for a range that ends at the end of the disk or past it. The disk then ends where the data does. */
static int img_extend_locked(struct image *im, const void *buf, int mode, uint64_t len, uint64_t offset, uint64_t *done)
{
    uint64_t old = im->size, end = offset + len > old ? offset + len : old, now = end;
    int ret = img_resize_locked(im, old, end);

    *done = 0;
    if (ret)
        return ret;
    ret = img_change(im, buf, mode, len, offset, done);
    if (ret)
        now = buf && *done && offset + *done > old ? offset + *done : old;
    if (now < end && img_resize_locked(im, end, now))
        now = end;                  /* the file could not be cut back */
    im->size = now;
    return ret;
}

/* As img_inside(), for a write. One made before the last cut sees the disk end at that cut. */
static uint64_t img_inside_write(struct image *im, uint64_t offset, uint64_t len, uint64_t ticket)
{
    uint64_t inside = img_inside(im, offset, len), end = ticket < im->cut ? im->cut_to : UINT64_MAX;

    return offset < end ? util_min(inside, end - offset) : 0;
}

/*
 * Writes the part that is inside the disk; with `grow` the disk grows as needed. *done bytes were written, also on
 * failure. -ENOSPC: no part is inside. ticket: as for img_resize().
 */
static int img_write(struct image *im, const void *buf, uint64_t len, uint64_t offset, bool grow, uint64_t ticket,
                     uint64_t *done)
{
    uint64_t inside = img_inside_write(im, offset, len, ticket);
    bool late;
    int ret = 0;

    *done = 0;
    if (inside < len && grow) {
        img_lock_size(im);
        late = ticket < im->cut;
        if (!late)
            ret = img_extend_locked(im, buf, 0, len, offset, done);
        pthread_mutex_unlock(&im->size_lock);
        if (!late)
            return ret;
        inside = img_inside_write(im, offset, len, ticket);
    }
    return inside || !len ? img_change(im, buf, 0, inside, offset, done) : -ENOSPC;
}

/*
 * fallocate(2): PUNCH_HOLE, ZERO_RANGE or neither, each with or without KEEP_SIZE. Past the end there is nothing to
 * punch; space is allocated there only if the disk may grow, and then it does.
 */
static int img_fallocate(struct image *im, int mode, uint64_t len, uint64_t offset, bool grow)
{
    uint64_t inside = img_inside(im, offset, len), done;
    int ret = 0;

    if (inside == len && offset + len < im->size)
        return img_change(im, NULL, mode | FALLOC_FL_KEEP_SIZE, len, offset, &done);
    img_lock_size(im);
    inside = offset < im->size ? util_min(len, im->size - offset) : 0;
    if (inside < len && !(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) && grow)
        ret = img_extend_locked(im, NULL, mode | FALLOC_FL_KEEP_SIZE, len, offset, &done);
    else if (inside < len && !(mode & FALLOC_FL_PUNCH_HOLE))
        ret = grow ? -EOPNOTSUPP : -ENOSPC;
    else if (inside)
        ret = img_change(im, NULL, mode | FALLOC_FL_KEEP_SIZE, inside, offset, &done);
    pthread_mutex_unlock(&im->size_lock);
    return ret;
}

/* last: nobody writes any more. */
static int img_sync(struct image *im, bool last)
{
    int ret = 0, r;

    if (im->writable && im->format->sync)
        return img_note_failure(im, im->format->sync(im, last));
    for (unsigned i = 0; im->writable && i < im->n_files; i++) {
        r = file_sync(&im->files[i]);
        ret = ret ? ret : r;
    }
    return img_note_failure(im, ret);
}

/* Writes through passthrough grow the file without our knowledge. */
static void img_refresh_size(struct image *im)
{
    img_lock_size(im);
    im->size = file_follow_growth(&im->files[0]);
    pthread_mutex_unlock(&im->size_lock);
}

/* Did another program resize the file that passthrough serves? The kernel reports no error for that. */
static bool img_resized_underneath(struct image *im)
{
    return !im->writable && im->n_files == 1 && !im->files[0].is_blk &&
           (uint64_t)file_stat(&im->files[0]).st_size != im->size;
}

/* Host space that the chain takes, in units of 512 bytes. */
static uint64_t img_blocks(const struct image *im)
{
    uint64_t blocks = 0;

    for (; im; im = im->backing)
        for (unsigned i = 0; i < im->n_files; i++)
            blocks += im->files[i].is_blk ? (im->files[i].size + 511) / 512
                                          : (uint64_t)file_stat(&im->files[i]).st_blocks;
    return blocks;
}

/* ******************************************************************************************************** *
 * 14. Raw images
 *
 * The driver to copy. There is no metadata: the disk is the bytes of one file or block device, or of the parts of a
 * split image in a row. Parts are numbered (.000 or .001 onwards, two to nine digits) or lettered (.aa onwards, as
 * split(1) names them). All but the last have one size; a set that was found by name and breaks this is damaged.
 *
 * state: uint64_t start[n_files + 1], the offset on the disk at which each file begins, and the end
 * ******************************************************************************************************** */

/* Any bytes can be a raw image: chosen when no other format recognizes the file. */
static int raw_probe(const struct probe *p)
{
    (void)p;
    return 1;
}

/* The end of a part's name: digits (disk.007), or lower-case letters that count from "aa", "ab" (disk.ag). */
struct raw_suffix {
    size_t len;                     /* 0: it is not the name of a part */
    unsigned number;                /* from 0: "000" and "aa" */
    unsigned base;                  /* 10 or 26 */
    char first;                     /* the digit 0 */
};

static struct raw_suffix raw_parse_suffix(const char *path)
{
    const char *dot = strrchr(util_basename(path), '.');
    size_t len = dot ? strlen(dot + 1) : 0;
    bool digits = len && strspn(dot + 1, "0123456789") == len;
    struct raw_suffix s = { .len = len, .base = digits ? 10 : 26, .first = digits ? '0' : 'a' };

    if (len < (digits ? 1 : 2) || len > (digits ? 9 : 5))       /* no more: the number fits */
        s.len = 0;
    for (size_t i = 0; i < s.len; i++) {
        if (!digits && (dot[i + 1] < 'a' || dot[i + 1] > 'z'))
            s.len = 0;
        else
            s.number = s.number * s.base + (unsigned)(dot[i + 1] - s.first);
    }
    return s;
}

/* Writes the name of part `number` of the set that path, whose suffix is s, belongs to. False: it has no such name. */
static bool raw_part_name(const char *path, struct raw_suffix s, unsigned number, char name[PATH_MAX])
{
    if (!util_copy(name, PATH_MAX, path))
        return false;
    for (char *p = name + strlen(name); s.len--; number /= s.base)
        *--p = (char)(s.first + (int)(number % s.base));
    return number == 0;
}

static bool raw_part(const char *first, unsigned i, char name[PATH_MAX])
{
    struct raw_suffix s = raw_parse_suffix(first);

    return s.len > 1 && s.number <= (s.base == 10 ? 1 : 0) && raw_part_name(first, s, s.number + i, name);
}

enum { RAW_GAP = 64 };              /* numbers in a row that may be missing between two parts of a set */

/*
 * Refuses a later part that is named alone: without the parts before it, the disk looks broken. Letters that do not
 * begin with 'a' are more likely a file type (disk.ima beside disk.imb): only the name right before counts then.
 */
static int raw_check_first(const struct image *im)
{
    struct raw_suffix s = raw_parse_suffix(im->name);
    bool digits = s.base == 10;
    char before[PATH_MAX], lead;
    unsigned gap;

    if (s.len < 2 || !s.number)
        return 0;
    lead = im->name[strlen(im->name) - s.len];
    gap = digits || lead == 'a' ? RAW_GAP : 1;
    for (unsigned i = 1; i <= gap && i <= s.number; i++)
        if (raw_part_name(im->name, s, s.number - i, before) && file_exists(before))
            return msg_err(-EINVAL, "%s: looks like a later part of a split image, since %s is there; name the first "
                           "part, or take this one alone with --no-parts", im->name, util_basename(before));
    if (digits && s.number > 1 && lead == '0')
        return msg_err(-ENOENT, "%s: looks like a later part of a split image, and the first part is missing; "
                       "--no-parts shows this one alone", im->name);
    return 0;
}

/* Are both names parts of one set, in whatever directories? Numbers may get longer: .99, .100 */
static bool raw_same_set(const char *a, const char *b)
{
    struct raw_suffix of_a = raw_parse_suffix(a), of_b = raw_parse_suffix(b);
    size_t stem;

    a = util_basename(a);
    b = util_basename(b);
    stem = strlen(a) - of_a.len;
    return of_a.len && of_b.len && of_a.base == of_b.base && strlen(b) - of_b.len == stem &&
           strncmp(a, b, stem) == 0 && (of_a.len == of_b.len || (of_a.base == 10 && a[stem] != '0' && b[stem] != '0'));
}

/* Refuses a list of parts that has a gap, is in another order or lacks the next part: the disk would be broken. */
static int raw_check_list(const struct image *im)
{
    struct raw_suffix s = raw_parse_suffix(im->name);
    const char *last = im->name, *path;
    unsigned expected;
    char after[PATH_MAX];
    bool same = false;

    for (unsigned i = 1; i < im->n_files; i++, last = path) {
        path = im->files[i].path;
        expected = s.number + 1;
        s = raw_parse_suffix(path);
        same = raw_same_set(last, path);
        if (same && s.number != expected)
            return msg_err(-EINVAL, "%s: follows %s in the list of parts, so parts are missing or in the wrong order; "
                           "--no-parts takes the list as it is", path, util_basename(last));
    }
    if (same && raw_part_name(last, s, s.number + 1, after) && file_exists(after))
        return msg_err(-EINVAL, "%s: is the next part, but not in the list of parts; --no-parts takes the list as it "
                       "is", after);
    return 0;
}

/* All parts but the last have one size: a note where the user listed the files, a refusal where they were found. */
static int raw_check_sizes(const struct image *im)
{
    uint64_t first = im->files[0].size, size;

    for (unsigned i = 1; i < im->n_files; i++) {
        bool last = i + 1 == im->n_files;
        size = im->files[i].size;
        if (im->found_parts && (size > first || (size < first && !last)))
            return msg_err(-EINVAL, "%s: part of %" PRIu64 " bytes among parts of %" PRIu64
                           ": damaged or incomplete; name all parts to use them as they are",
                           im->files[i].path, size, first);
        if (im->n_given > 1 && size < first && !last)
            msg_say(MSG_NOTE, "%s: is %" PRIu64 " bytes shorter than the first part; if they are missing, all that "
                    "follows is in the wrong place", im->files[i].path, first - size);
    }
    return 0;
}

static int raw_open(struct image *im)
{
    uint64_t *start = im->state = util_fault("part table") ? NULL : calloc(im->n_files + 1, sizeof(*start));
    bool check_names = im->opt->parts && im->depth == 0;
    int ret;

    if (!start)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = check_names ? raw_check_first(im) : 0;
    if (!ret && check_names)
        ret = raw_check_list(im);
    if (!ret)
        ret = raw_check_sizes(im);
    for (unsigned i = 0; i < im->n_files && !ret; i++) {
        if (im->files[i].size > (uint64_t)MAX_IMAGE_SIZE - start[i])
            ret = msg_err(-EFBIG, "%s: the parts add up to more than a file can hold", im->files[i].path);
        start[i + 1] = start[i] + im->files[i].size;
    }
    im->size = start[im->n_files];
    return ret;
}

static void raw_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const uint64_t *start = im->state;
    unsigned i = util_count_up_to(start, sizeof(*start), im->n_files, offset) - 1;

    if (i + 1 < im->n_files)        /* the last may have grown since */
        length = util_min(length, start[i + 1] - offset);
    *ext = (struct extent){ .kind = EXT_DATA, .length = length, .file = &im->files[i], .offset = offset - start[i],
                            .owned = true, .sparse = true };
}

static int raw_resize(struct image *im, uint64_t old, uint64_t size)
{
    (void)old;
    return im->n_files > 1 || im->files[0].is_blk ? -EOPNOTSUPP : file_truncate(&im->files[0], size);
}

static const struct image_format raw_format = {
    .name = "raw",
    .describe = "raw files, split raw files (.000 .001 .aa), block devices",
    .writes = "in place",
    .writable = true,
    .plain = true,
    .several_files = true,
    .probe = raw_probe,
    .part = raw_part,
    .open = raw_open,
    .map = raw_map,
    .resize = raw_resize,
};

/* ******************************************************************************************************** *
 * 15. VDI
 *
 * VirtualBox, VDICore.h: versions 1.1 and 0.2. All numbers are little-endian.
 *
 *   header | block map: 4 bytes per block | blocks, each behind `extra` bytes that are not part of the disk
 *
 * A map entry is the number of a block in the file, or says "not here" (what the parent has, zeros if there is
 * none) or "zeros". Dynamic and fixed images differ only in how many blocks are allocated. A differencing image knows
 * its parent by UUID only. VirtualBox names the files of snapshots {UUID}.vdi, but not that of the disk itself.
 * ******************************************************************************************************** */

struct vdi_start {                  /* of every version */
    uint8_t text[64];               /* 0x000: "<<< Oracle VM VirtualBox Disk Image >>>" */
    le32 signature;                 /* 0x040: VDI_SIGNATURE */
    le32 version;                   /* 0x044: major << 16 | minor */
};

struct vdi_header {                 /* version 1.1 */
    struct vdi_start start;         /* 0x000 */
    le32 header_size;               /* 0x048: counts from here */
    le32 type;                      /* 0x04c: VDI_TYPE_... */
    le32 flags;                     /* 0x050 */
    uint8_t comment[256];           /* 0x054 */
    le32 map_offset;                /* 0x154: of the block map */
    le32 data_offset;               /* 0x158: of block 0, extra data included */
    uint8_t geometry[20];           /* 0x15c: unused */
    le64 disk_size;                 /* 0x170 */
    le32 block_size;                /* 0x178 */
    le32 extra;                     /* 0x17c: bytes before each block */
    le32 n_blocks;                  /* 0x180: entries of the map */
    le32 n_allocated;               /* 0x184 */
    uint8_t uuid[4][16];            /* 0x188: its own, of its last change, the parent's, of the parent's last change */
};
_Static_assert(sizeof(struct vdi_header) == 0x1c8, "VDI header, version 1.1");

struct vdi_header_v0 {              /* version 0.2: the map follows the header, the blocks follow the map */
    struct vdi_start start;         /* 0x000 */
    le32 type;                      /* 0x048 */
    le32 flags;                     /* 0x04c */
    uint8_t comment[256];           /* 0x050 */
    uint8_t geometry[16];           /* 0x150: unused */
    le64 disk_size;                 /* 0x160 */
    le32 block_size;                /* 0x168 */
    le32 n_blocks;                  /* 0x16c */
    le32 n_allocated;               /* 0x170 */
    uint8_t uuid[3][16];            /* 0x174: as above, without that of the parent's last change */
};
_Static_assert(sizeof(struct vdi_header_v0) == 0x1a4, "VDI header, version 0.2");

enum {
    VDI_VERSION_0 = 0x00000002, VDI_VERSION_1 = 0x00010001,
    VDI_HEADER_SIZE_MIN = 384,
    VDI_TYPE_DYNAMIC = 1, VDI_TYPE_FIXED = 2, VDI_TYPE_UNDO = 3, VDI_TYPE_DIFF = 4,
    VDI_MIN_BLOCK = 512,
    VDI_MAX_BLOCK = 1 << 30,        /* with as much extra data, all offsets in the file fit into 63 bits */
};
#define VDI_SIGNATURE 0xbeda107fu
#define VDI_ENTRY_NONE 0xffffffffu
#define VDI_ENTRY_ZERO 0xfffffffeu

struct vdi {
    uint32_t version, type, block_size, extra, n_blocks, n_allocated;
    uint64_t header_size, map, data;            /* map, data: offsets in the file */
    uint64_t disk_size;
    bool differencing;
};

static int vdi_probe(const struct probe *p)
{
    const struct vdi_start *start = (const struct vdi_start *)p->head;

    return p->head_len >= sizeof(*start) && le32_to_cpu(start->signature) == VDI_SIGNATURE ? 100 : 0;
}

static uint64_t vdi_header_length(struct file *f)
{
    struct vdi_header h;

    return file_read(f, &h, sizeof(h), 0) ? 0 : le32_to_cpu(h.map_offset);
}

/* Sets the identities from the header's first n UUIDs: two are its own, two its parent's. */
static void vdi_parse_uuids(struct image *im, const uint8_t (*uuid)[16], unsigned n)
{
    uint8_t printed[16];

    for (unsigned i = 0; i < n; i++) {
        text_swap_guid(uuid[i], printed);
        ext_set_id(i < 2 ? &im->id : &im->parent_id, i % 2 ? ID_STATE : ID_IMAGE, printed);
    }
}

static void vdi_parse_v0(struct image *im, struct vdi *v, const struct vdi_header_v0 *h)
{
    v->type = le32_to_cpu(h->type);
    v->disk_size = le64_to_cpu(h->disk_size);
    v->block_size = le32_to_cpu(h->block_size);
    v->n_blocks = le32_to_cpu(h->n_blocks);
    v->n_allocated = le32_to_cpu(h->n_allocated);
    v->header_size = v->map = sizeof(*h);
    v->data = v->map + 4ull * v->n_blocks;
    vdi_parse_uuids(im, h->uuid, 3);
}

static void vdi_parse_v1(struct image *im, struct vdi *v, const struct vdi_header *h)
{
    v->type = le32_to_cpu(h->type);
    v->disk_size = le64_to_cpu(h->disk_size);
    v->block_size = le32_to_cpu(h->block_size);
    v->extra = le32_to_cpu(h->extra);
    v->n_blocks = le32_to_cpu(h->n_blocks);
    v->n_allocated = le32_to_cpu(h->n_allocated);
    v->header_size = sizeof(*h);
    v->map = le32_to_cpu(h->map_offset);
    v->data = le32_to_cpu(h->data_offset);
    vdi_parse_uuids(im, h->uuid, 4);
}

static int vdi_check_header(const struct image *im)
{
    const struct vdi *v = im->state;
    uint64_t file_size = im->files[0].size;

    if ((v->type < VDI_TYPE_DYNAMIC || v->type > VDI_TYPE_DIFF) && im->parent_id.known[ID_IMAGE])
        return fmt_unsupported(im, "the image type", v->type);
    if (!util_is_power_of_2(v->block_size, VDI_MIN_BLOCK, VDI_MAX_BLOCK))
        return fmt_refuse(im, "the block size, a power of two from 512 bytes to 1 GiB", v->block_size);
    if (!util_is_power_of_2(v->extra, 0, v->block_size))
        return fmt_refuse(im, "the extra data per block, 0 or a power of two up to the block size", v->extra);
    /* Version 0.2 has neither field. In version 1.1 all programs that write VDI align both. */
    if (v->version != VDI_VERSION_0 && (v->map % 512 || v->map < v->header_size))
        return fmt_refuse(im, "the offset of the block map, in whole sectors behind the header", v->map);
    if (v->version != VDI_VERSION_0 && v->data % 512)
        return fmt_refuse(im, "the offset of the data, in whole sectors", v->data);
    if (v->map > file_size || 4ull * v->n_blocks > file_size - v->map)
        return fmt_refuse(im, "the number of blocks, whose map does not fit into the file", v->n_blocks);
    if (v->data < v->map + 4ull * v->n_blocks)
        return fmt_refuse(im, "the offset of the data, inside the block map", v->data);
    if (v->disk_size > (uint64_t)v->n_blocks * v->block_size)
        return fmt_refuse(im, "the disk size, larger than all blocks together", v->disk_size);
    if (!v->differencing && im->parent_id.known[ID_IMAGE])
        return fmt_refuse(im, "a parent, in an image that is not a differencing one, of type", v->type);
    if (v->differencing && !im->parent_id.known[ID_IMAGE] && !im->opt->force_parent)
        return fmt_refuse(im, "no parent's UUID, in a differencing image of type", v->type);
    return 0;
}

static int vdi_read_header(struct image *im)
{
    struct vdi *v = im->state;
    union {
        struct vdi_start start;
        struct vdi_header_v0 v0;
        struct vdi_header v1;
    } h = { 0 };
    uint64_t len = util_min(im->files[0].size, sizeof(h));
    int ret = file_read(&im->files[0], &h, len, 0);

    if (ret)
        return ret;
    if (le32_to_cpu(h.start.signature) != VDI_SIGNATURE)
        return msg_err(-EINVAL, "%s: is not a VDI image", im->name);
    v->version = le32_to_cpu(h.start.version);
    if (v->version == VDI_VERSION_0)
        vdi_parse_v0(im, v, &h.v0);
    else if (v->version >> 16 == VDI_VERSION_1 >> 16)
        vdi_parse_v1(im, v, &h.v1);
    else
        return msg_err(-EOPNOTSUPP, "%s: VDI of unknown version %u.%u, which is not supported", im->name,
                       v->version >> 16, v->version & 0xffff);
    if (len < v->header_size)
        return fmt_refuse(im, "the file ends in the header", len);
    if (v->version != VDI_VERSION_0 && le32_to_cpu(h.v1.header_size) < VDI_HEADER_SIZE_MIN)
        fmt_odd(im, "the header's size", le32_to_cpu(h.v1.header_size));
    if (v->type < VDI_TYPE_DYNAMIC || v->type > VDI_TYPE_DIFF)
        fmt_odd(im, "the image type", v->type);
    v->differencing = v->type == VDI_TYPE_UNDO || v->type == VDI_TYPE_DIFF;
    return vdi_check_header(im);
}

static int vdi_open(struct image *im)
{
    const struct vdi *v = im->state;
    int ret = vdi_read_header(im);

    if (ret)
        return ret;
    im->size = (v->disk_size + 511) / 512 * 512;    /* old tools left odd sizes; blocks hold whole sectors */
    im->cluster_size = v->block_size;
    im->entry_size = 4;
    if (!v->differencing)
        return 0;
    ext_set_parent(im, "vdi");
    return im->parent_id.known[ID_IMAGE] ? ext_add_uuid_hint(im, "vdi") : 0;
}

static int vdi_read_entry(const struct image *im, uint64_t i, uint32_t *entry)
{
    const struct vdi *v = im->state;

    return cache_le32(&im->files[0], v->map + 4 * i, entry);
}

/*
 * Is entry i, which says block 0, a wiped one? No two entries have the same block, so two zeros in a row are what is
 * left where a sector of the map could not be copied.
 */
static bool vdi_is_wiped(const struct image *im, uint64_t i)
{
    const struct vdi *v = im->state;
    uint32_t entry;

    return (i > 0 && vdi_read_entry(im, i - 1, &entry) == 0 && entry == 0) ||
           (i + 1 < v->n_blocks && vdi_read_entry(im, i + 1, &entry) == 0 && entry == 0);
}

static void vdi_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct vdi *v = im->state;
    struct file *f = &im->files[0];
    uint64_t i = offset / v->block_size, in_block = offset % v->block_size;
    uint32_t entry;

    length = util_min(length, v->block_size - in_block);
    if (vdi_read_entry(im, i, &entry))
        ext_bad(ext, length, "the block map cannot be read");
    else if (entry == VDI_ENTRY_NONE)
        *ext = (struct extent){ .kind = ext_hole(im), .length = length };
    else if (entry == VDI_ENTRY_ZERO)
        *ext = (struct extent){ .kind = EXT_ZERO, .length = length, .zeroed = true };
    else if (entry == 0 && vdi_is_wiped(im, i))
        ext_bad(ext, length, "its map entry was wiped: its neighbour has block 0, too");
    else
        ext_data(ext, length, f, v->data + entry * ((uint64_t)v->block_size + v->extra) + v->extra + in_block, f->size);
}

static void vdi_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct vdi *v = by;
    uint64_t entry = util_le32(bytes), stored = (uint64_t)v->block_size + v->extra;

    if (entry != VDI_ENTRY_NONE && entry != VDI_ENTRY_ZERO)
        c->claim(c, &im->files[0], v->data + entry * stored,
                 v->extra + util_min(v->block_size, im->size - i * v->block_size), NULL, i * v->block_size);
}

static bool vdi_claims(struct image *im, struct claims *c)
{
    const struct vdi *v = im->state;
    uint64_t used = (im->size + v->block_size - 1) / v->block_size;     /* entries; the map may have more */

    c->claim(c, &im->files[0], 0, v->header_size, "the header", 0);
    c->claim(c, &im->files[0], v->map, 4ull * v->n_blocks, "the block map", 0);
    ext_claim_table(c, im, v, &im->files[0], v->map, used, 4, vdi_claim_entry);
    return true;
}

/* QEMU allocates new blocks from n_allocated on, so it would overwrite a block whose number is not below it. */
static bool vdi_as_qemu(struct image *im)
{
    const struct vdi *v = im->state;
    uint32_t entry;

    if (v->version != VDI_VERSION_1 || v->differencing || v->extra)
        return false;
    for (uint64_t i = 0; i < v->n_blocks; i++)
        if (vdi_read_entry(im, i, &entry) || (entry < VDI_ENTRY_ZERO && entry >= v->n_allocated))
            return false;
    return true;
}

/* -- lost headers -- */

enum { VDI_GUESS_REACH = 2 << 20 /* the map is at 512 (QEMU), 1 MiB or another power of two up to this */,
       VDI_USUAL_BLOCK = 1 << 20, VDI_GUESS_BLOCK = 64 << 10 /* smaller ones are not guessed */ };

static bool vdi_is_entry(const struct fmt_table *t, const uint8_t *bytes, uint64_t *block)
{
    uint32_t entry = util_le32(bytes);

    *block = entry >= VDI_ENTRY_ZERO ? FMT_NO_BLOCK : entry;
    return entry >= VDI_ENTRY_ZERO || entry <= t->f->size / (VDI_GUESS_BLOCK / 4);
}

/* Sets where the data begin and the size of a block. Exact: the blocks end where the file does. */
static bool vdi_guess_blocks(const struct fmt_table *t, struct vdi *v)
{
    static const uint32_t align[] = { 512, 4096, VDI_USUAL_BLOCK };
    uint64_t end = t->offset + 4 * t->n, room, n = t->high + 1;

    for (size_t i = 0; i < ARRAY_LEN(align); i++) {
        v->data = (end + align[i] - 1) / align[i] * align[i];
        room = t->f->size - util_min(t->f->size, v->data);
        v->block_size = room / n <= VDI_MAX_BLOCK ? (uint32_t)(room / n) : 0;
        if (room % n == 0 && util_is_power_of_2(v->block_size, VDI_GUESS_BLOCK, VDI_MAX_BLOCK))
            return true;
    }
    v->block_size = VDI_USUAL_BLOCK;
    if (t->offset % VDI_USUAL_BLOCK)            /* QEMU's maps; VirtualBox aligns map and data to 1 MiB */
        v->data = (end + 511) / 512 * 512;
    return t->used >= FMT_TABLE_FEW;
}

/* All blocks of the file are in use, from 0 on, so few numbers are missing. */
static bool vdi_guess(struct file *f, struct vdi *v, struct fmt_table *t)
{
    for (uint64_t at = 512; at <= VDI_GUESS_REACH; at *= 2) {
        *t = (struct fmt_table){ .f = f, .offset = at, .width = 4, .max = FMT_TABLE_MAX, .entry = vdi_is_entry };
        if (fmt_look_at_table(t) && t->n > 1 && (t->has_zero || t->lost) && t->used + t->lost > t->high - t->high / 8 &&
            vdi_guess_blocks(t, v))
            return true;
    }
    return false;
}

static bool vdi_remains(struct file *f)
{
    struct fmt_table t;
    struct vdi v;

    return vdi_guess(f, &v, &t);
}

static int vdi_rebuild(struct image *im)
{
    struct file *f = &im->files[0];
    uint8_t page[FILE_PATCH] = { 0 };
    struct vdi_header *h = (void *)page;
    struct fmt_table t;
    struct vdi v;

    if (file_read(f, page, 512, 0) == 0 && le32_to_cpu(h->start.signature) == VDI_SIGNATURE)
        return 0;
    if (!vdi_guess(f, &v, &t))
        return msg_err(-EINVAL, "%s: cannot be put together: no block map is left; --header=FILE takes the header of "
                       "another image", im->name);
    fmt_read_page(f, 0, page, 0xfd);
    memset(page, 0, 512);
    *h = (struct vdi_header){
        .start = { .signature = cpu_to_le32(VDI_SIGNATURE), .version = cpu_to_le32(VDI_VERSION_1) },
        .header_size = cpu_to_le32(400),
        .type = cpu_to_le32(im->opt->n_backing ? VDI_TYPE_DIFF : VDI_TYPE_DYNAMIC),
        .map_offset = cpu_to_le32((uint32_t)t.offset),
        .data_offset = cpu_to_le32((uint32_t)v.data),
        .disk_size = cpu_to_le64(t.n * v.block_size),
        .block_size = cpu_to_le32(v.block_size),
        .n_blocks = cpu_to_le32((uint32_t)t.n),
        .n_allocated = cpu_to_le32((uint32_t)t.high + 1),
    };
    im->least_size = t.n * v.block_size;
    msg_say(MSG_NOTE, "%s: header put together: %" PRIu64 " blocks of %u bytes, map at %" PRIu64 ", data at %" PRIu64
            "%s", im->name, t.n, v.block_size, t.offset, v.data, im->opt->n_backing ? "" : FMT_LOST_PARENT);
    return file_patch(f, 0, page);
}

static const struct image_format vdi_format = {
    .name = "vdi",
    .describe = "VirtualBox images: dynamic, fixed, differencing",
    .writes = "overlay",
    .state_size = sizeof(struct vdi),
    .extensions = " vdi ",
    .probe = vdi_probe,
    .remains = vdi_remains,
    .header_length = vdi_header_length,
    .rebuild = vdi_rebuild,
    .identify = vdi_read_header,
    .open = vdi_open,
    .map = vdi_map,
    .claims = vdi_claims,
    .as_qemu = vdi_as_qemu,
};

/* ******************************************************************************************************** *
 * 16. QED
 *
 * QEMU docs/interop/qed_spec.rst. All numbers are little-endian.
 *
 *   header clusters | L1 table -> L2 tables (both of table_size clusters) -> clusters of data
 *
 * Only raw backing files have their format recorded; that of others is for the user to say.
 * ******************************************************************************************************** */

struct qed_header {
    uint8_t magic[4];               /* 0x00: "QED\0" */
    le32 cluster_size;              /* 0x04: 4 KiB to 64 MiB, a power of 2 */
    le32 table_clusters;            /* 0x08: of an L1 or L2 table: 1 to 16, a power of 2 */
    le32 header_clusters;           /* 0x0c: at least 1 */
    le64 features;                  /* 0x10: QED_BACKING ... */
    le64 compatible;                /* 0x18: safe to ignore */
    le64 autoclear;                 /* 0x20: safe to ignore */
    le64 l1_offset;                 /* 0x28 */
    le64 size;                      /* 0x30: of the disk */
    le32 name_offset;               /* 0x38: of the backing file's name, in the header's clusters */
    le32 name_length;               /* 0x3c */
};
_Static_assert(sizeof(struct qed_header) == 64, "QED header");

enum {
    QED_BACKING = 1, QED_NEED_CHECK = 2, QED_BACKING_RAW = 4,       /* features */
    QED_MIN_CLUSTER = 1 << 12, QED_MAX_CLUSTER = 1 << 26,
    QED_MAX_TABLE = 16,
    QED_MAX_NAME = 1023,
    QED_ENTRY_ZERO = 1,
};

struct qed {
    uint32_t cluster_bits, table_bits;          /* table_bits: log2 of the entries of a table */
    uint64_t size, features, l1, n_l1;          /* l1: offset of the L1 table; n_l1: entries that the size needs */
    uint64_t first;                             /* where the header's clusters end */
};

static int qed_probe(const struct probe *p)
{
    return p->head_len >= sizeof(struct qed_header) && memcmp(p->head, "QED", 4) == 0 ? 100 : 0;
}

static uint64_t qed_header_length(struct file *f)
{
    struct qed_header h;

    return file_read(f, &h, sizeof(h), 0) ? 0
           : (uint64_t)le32_to_cpu(h.cluster_size) * le32_to_cpu(h.header_clusters);
}

/* As many entries of the L1 table as the size needs must be there; the table ends where it may. */
static int qed_check_l1(const struct image *im, struct qed *q)
{
    uint64_t file_size = im->files[0].size;

    if (q->size % 512 || q->size > (uint64_t)MAX_IMAGE_SIZE)
        return fmt_refuse(im, "the size: a multiple of 512 bytes below 2^63", q->size);
    q->n_l1 = q->size ? ((q->size - 1) >> (q->cluster_bits + q->table_bits)) + 1 : 0;
    if (q->n_l1 > 1ull << q->table_bits)
        return fmt_refuse(im, "the size, more than the tables can hold", q->size);
    if (q->l1 < q->first || q->l1 % (1u << q->cluster_bits) || q->l1 > file_size || q->n_l1 * 8 > file_size - q->l1)
        return fmt_refuse_table(im, &im->files[0], "the offset of the L1 table", q->l1, q->n_l1 * 8);
    return 0;
}

static int qed_read_header(struct image *im, struct qed *q, struct qed_header *h)
{
    uint32_t cluster, table, header_clusters;
    uint64_t unknown;
    int ret = im->files[0].size < sizeof(*h) ? 0 : file_read(&im->files[0], h, sizeof(*h), 0);

    if (ret)
        return ret;
    if (memcmp(h->magic, "QED", 4) != 0)
        return msg_err(-EINVAL, "%s: is not a QED image", im->name);
    cluster = le32_to_cpu(h->cluster_size);
    table = le32_to_cpu(h->table_clusters);
    header_clusters = le32_to_cpu(h->header_clusters);
    q->features = le64_to_cpu(h->features);
    q->l1 = le64_to_cpu(h->l1_offset);
    q->size = le64_to_cpu(h->size);
    unknown = q->features & ~(uint64_t)(QED_BACKING | QED_NEED_CHECK | QED_BACKING_RAW);
    if (unknown)
        return msg_err(-EOPNOTSUPP, "%s: needs an unknown QED feature (bit %d), which is not supported", im->name,
                       __builtin_ctzll(unknown));
    if (!util_is_power_of_2(cluster, QED_MIN_CLUSTER, QED_MAX_CLUSTER))
        return fmt_refuse(im, "the cluster size: 4 KiB to 64 MiB, a power of 2", cluster);
    if (!util_is_power_of_2(table, 1, QED_MAX_TABLE))
        return fmt_refuse(im, "the table size: 1 to 16 clusters, a power of 2", table);
    if (!header_clusters)
        return fmt_refuse(im, "the header's size: 1 cluster at least", header_clusters);
    q->cluster_bits = (uint32_t)__builtin_ctz(cluster);
    q->table_bits = q->cluster_bits + (uint32_t)__builtin_ctz(table) - 3;
    q->first = (uint64_t)header_clusters << q->cluster_bits;
    return qed_check_l1(im, q);
}

/* The name lies in the header's clusters. */
static int qed_read_backing(struct image *im, const struct qed *q, const struct qed_header *h)
{
    uint64_t offset = le32_to_cpu(h->name_offset), len = le32_to_cpu(h->name_length);
    uint8_t name[QED_MAX_NAME];
    int ret;

    if (!(q->features & QED_BACKING))
        return 0;
    if (len == 0 || len > sizeof(name))
        return fmt_refuse(im, "the length of the backing file's name: 1 to 1023 bytes", len);
    if (offset + len > q->first || offset + len > im->files[0].size)
        return fmt_refuse(im, "the offset of the backing file's name: in the header's clusters", offset);
    ret = file_read(&im->files[0], name, len, offset);
    if (ret)
        return ret;
    if (!util_copy_name(im->backing_name, sizeof(im->backing_name), name, (uint32_t)len))
        return fmt_refuse(im, "a zero in the backing file's name, of length", len);
    if (q->features & QED_BACKING_RAW)
        util_copy(im->backing_format, sizeof(im->backing_format), "raw");
    return 0;
}

static int qed_open(struct image *im)
{
    struct qed *q = im->state;
    struct qed_header h = { .magic = { 0 } };
    int ret = qed_read_header(im, q, &h);

    if (!ret)
        ret = qed_read_backing(im, q, &h);
    if (ret)
        return ret;
    im->size = q->size;
    im->cluster_size = 1u << q->cluster_bits;
    im->entry_size = 8;
    im->dirty = q->features & QED_NEED_CHECK;
    if (im->dirty)
        msg_say(MSG_NOTE, "%s: is marked dirty (not closed properly); reading it is safe", im->name);
    return 0;
}

/*
 * Finds the L2 entry for offset: *host. *length is cut to what it holds for: at most a cluster, or without an L2 table
 * all that it would cover. Returns what is wrong, or NULL.
 */
static const char *qed_find(const struct image *im, uint64_t offset, uint64_t *length, uint64_t *host)
{
    const struct qed *q = im->state;
    struct file *f = &im->files[0];
    uint64_t cluster = 1ull << q->cluster_bits, covers = cluster << q->table_bits, table = 8ull << q->table_bits, l2;

    *host = 0;
    *length = util_min(*length, covers - (offset & (covers - 1)));
    if (cache_le64(f, q->l1 + (offset >> q->cluster_bits >> q->table_bits) * 8, &l2))
        return "its tables cannot be read";
    if (!l2)
        return NULL;
    if (l2 & (cluster - 1) || l2 < q->first)
        return "its L1 entry is damaged";
    if (l2 >= f->size || table > f->size - l2)
        return "its L2 table lies past the end of the file";
    *length = util_min(*length, cluster - (offset & (cluster - 1)));
    if (cache_le64(f, l2 + ((offset & (covers - 1)) >> q->cluster_bits) * 8, host))
        return "its tables cannot be read";
    if (*host <= QED_ENTRY_ZERO)
        return NULL;
    if (*host & (cluster - 1) || *host < q->first)
        return "its L2 entry is damaged";
    if (util_overlap(*host, cluster, q->l1, table) || util_overlap(*host, cluster, l2, table))
        return "its cluster lies in the image's own tables";
    return NULL;
}

static void qed_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct qed *q = im->state;
    struct file *f = &im->files[0];
    uint64_t host, in_cluster = offset & ((1ull << q->cluster_bits) - 1);
    const char *why = qed_find(im, offset, &length, &host);

    if (why)
        ext_bad(ext, length, why);
    else if (host > QED_ENTRY_ZERO)
        ext_data(ext, length, f, util_min(host, MAX_IMAGE_SIZE) + in_cluster, f->size);
    else
        *ext = (struct extent){ .kind = host == QED_ENTRY_ZERO ? EXT_ZERO : ext_hole(im), .length = length,
                                .zeroed = host == QED_ENTRY_ZERO };
}

static void qed_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct qed *q = by;
    uint64_t l2 = util_le64(bytes);

    (void)i;
    if (l2 && l2 % (1u << q->cluster_bits) == 0 && l2 <= (uint64_t)MAX_IMAGE_SIZE)
        c->claim(c, &im->files[0], l2, 8ull << q->table_bits, "an L2 table", 0);
}

static bool qed_claims(struct image *im, struct claims *c)
{
    const struct qed *q = im->state;

    c->claim(c, &im->files[0], 0, q->first, "the header", 0);
    c->claim(c, &im->files[0], q->l1, q->n_l1 * 8, "the L1 table", 0);
    ext_claim_table(c, im, q, &im->files[0], q->l1, q->n_l1, 8, qed_claim_entry);
    return false;
}

/* -- lost headers -- */

enum { QED_GUESS_L1 = 131072 /* entries */, QED_GUESS_L2 = 32768 /* bytes of an L2 table that are looked at */ };

struct qed_guess {
    uint64_t cluster, table;        /* bytes */
    struct fmt_table l1;
};

static bool qed_is_l1_entry(const struct fmt_table *t, const uint8_t *bytes, uint64_t *block)
{
    uint64_t entry = util_le64(bytes);

    *block = entry ? entry : FMT_NO_BLOCK;
    return entry % t->unit == 0 && (!entry || (entry > t->offset && entry < t->f->size));
}

/* A cluster may be in what was cut off. */
static bool qed_is_l2_entry(const struct fmt_table *t, const uint8_t *bytes, uint64_t *block)
{
    uint64_t entry = util_le64(bytes);

    *block = entry > QED_ENTRY_ZERO ? entry : FMT_NO_BLOCK;
    return entry <= QED_ENTRY_ZERO || (entry % t->unit == 0 && entry / 4 < t->f->size);
}

/* Do the tables that the L1 table names look like L2 tables, clear of each other and of it? Needs one with entries. */
static bool qed_tables_look_right(const struct qed_guess *g)
{
    struct fmt_table t = { .f = g->l1.f, .width = 8, .entry = qed_is_l2_entry, .unit = g->cluster };
    uint64_t used = 0, entry;
    le64 raw;

    if (g->l1.low < g->l1.offset + g->table || (g->l1.nearest && g->l1.nearest < g->table))
        return false;
    for (uint64_t i = 0; i <= g->l1.last; i++) {
        if (file_read(t.f, &raw, sizeof(raw), g->l1.offset + i * 8) || !(entry = le64_to_cpu(raw)))
            continue;
        t.offset = entry;
        t.max = util_min(util_min(g->table, QED_GUESS_L2), t.f->size - entry) / 8;
        t.n = t.used = t.lost = t.stride = 0;
        if (!fmt_look_at_table(&t) && t.used)
            return false;
        if (t.n < t.max || (t.used && t.low < g->l1.offset + g->table))
            return false;
        used += t.used;
    }
    return used > 0;
}

/* The header takes a cluster. The largest sizes that fit, since smaller ones do, too; larger tables would overlap. */
static bool qed_guess(struct file *f, struct qed_guess *g)
{
    for (uint64_t cluster = QED_MAX_CLUSTER; cluster >= QED_MIN_CLUSTER; cluster /= 2)
        for (uint64_t n = QED_MAX_TABLE; n >= 1; n /= 2) {
            *g = (struct qed_guess){ cluster, cluster * n, { .f = f, .offset = cluster, .width = 8, .unit = cluster,
                                     .max = util_min(cluster * n / 8, QED_GUESS_L1), .entry = qed_is_l1_entry } };
            if (cluster < f->size && fmt_look_at_table(&g->l1) && g->l1.n == g->l1.max && qed_tables_look_right(g))
                return true;
        }
    return false;
}

static bool qed_remains(struct file *f)
{
    struct qed_guess g;

    return qed_guess(f, &g);
}

static int qed_rebuild(struct image *im)
{
    struct file *f = &im->files[0];
    uint8_t page[FILE_PATCH];
    struct qed_header *h = (void *)page;
    bool backing = im->opt->n_backing;
    struct qed_guess g;
    uint64_t covers;

    if (file_read(f, page, 512, 0) == 0 && memcmp(h->magic, "QED", 4) == 0)
        return 0;
    if (!qed_guess(f, &g))
        return msg_err(-EINVAL, "%s: cannot be put together: no L1 table is left behind its first cluster; "
                       "--header=FILE takes the header of another image", im->name);
    covers = g.table / 8 * g.cluster;
    im->least_size = util_min((g.l1.last + 1) * covers, MAX_IMAGE_SIZE / 512 * 512);
    memset(page, 0, sizeof(page));
    page[sizeof(*h)] = '?';         /* any name will do, since --backing stands for it */
    *h = (struct qed_header){
        .magic = "QED",
        .cluster_size = cpu_to_le32((uint32_t)g.cluster),
        .table_clusters = cpu_to_le32((uint32_t)(g.table / g.cluster)),
        .header_clusters = cpu_to_le32(1),
        .features = cpu_to_le64(backing ? QED_BACKING : 0),
        .l1_offset = cpu_to_le64(g.l1.offset),
        .size = cpu_to_le64(im->least_size),
        .name_offset = cpu_to_le32(backing ? sizeof(*h) : 0),
        .name_length = cpu_to_le32(backing),
    };
    msg_say(MSG_NOTE, "%s: header put together: clusters of %" PRIu64 " bytes, L1 table at %" PRIu64 ", %" PRIu64
            " L2 tables of %" PRIu64 " bytes that look right%s", im->name, g.cluster, g.l1.offset, g.l1.used, g.table,
            backing ? "" : FMT_LOST_PARENT);
    return file_patch(f, 0, page);
}

static const struct image_format qed_format = {
    .name = "qed",
    .describe = "QEMU's older format: backing chains",
    .writes = "overlay",
    .state_size = sizeof(struct qed),
    .extensions = " qed ",
    .probe = qed_probe,
    .remains = qed_remains,
    .header_length = qed_header_length,
    .rebuild = qed_rebuild,
    .open = qed_open,
    .map = qed_map,
    .claims = qed_claims,
};

/* ******************************************************************************************************** *
 * 17. VHD
 *
 * Microsoft "Virtual Hard Disk Image Format Specification" 1.0, for reading. All numbers are big-endian.
 *
 *   fixed      data | footer
 *   others     copy of the footer | dynamic header | block table | (bitmap | data) per block ... | footer
 *
 * A bit of a block's bitmap says whether its sector is in this image. Where it is clear, a differencing image has the
 * sector from its parent; in a dynamic image it was never written and reads as zeros. (QEMU ignores the bitmaps of
 * dynamic images; it writes them all ones, like other programs that do not track sectors.)
 *
 * The footer at the end counts; where it is lost or damaged, its copy at the front does. The disk has the footer's
 * "current size", except that Virtual PC, Virtual Server and old versions of QEMU count by the geometry. So do we for
 * their images, unless the geometry is at its maximum, or larger than what the image can hold.
 * ******************************************************************************************************** */

struct vhd_footer {                 /* its last byte is missing in images made before Virtual PC 2004 */
    uint8_t cookie[8];              /* 0x00 "conectix" */
    be32 features;                  /* 0x08 */
    be32 version;                   /* 0x0c 1.x: 0x0001xxxx */
    be64 header;                    /* 0x10 offset of the dynamic header */
    be32 time;                      /* 0x18 */
    uint8_t creator[4];             /* 0x1c the program that made it */
    be32 creator_version;           /* 0x20 */
    uint8_t creator_host[4];        /* 0x24 */
    be64 original_size;             /* 0x28 */
    be64 size;                      /* 0x30 bytes: the "current size" */
    be16 cylinders;                 /* 0x38 */
    uint8_t heads;                  /* 0x3a */
    uint8_t sectors;                /* 0x3b per track */
    be32 type;                      /* 0x3c VHD_FIXED, ... */
    be32 checksum;                  /* 0x40 */
    uint8_t id[16];                 /* 0x44 */
    uint8_t saved_state;            /* 0x54 */
    uint8_t reserved[427];          /* 0x55 */
};
_Static_assert(sizeof(struct vhd_footer) == 512, "VHD footer");

struct vhd_locator {                /* where a name of the parent is */
    uint8_t code[4];                /* 0x00 its kind, see vhd_read_parent() */
    be32 space;                     /* 0x04 */
    be32 length;                    /* 0x08 bytes */
    be32 reserved;                  /* 0x0c */
    be64 offset;                    /* 0x10 */
};
_Static_assert(sizeof(struct vhd_locator) == 24, "VHD parent locator");

struct vhd_header {
    uint8_t cookie[8];              /* 0x000 "cxsparse" */
    be64 unused;                    /* 0x008 */
    be64 table;                     /* 0x010 offset of the block table */
    be32 version;                   /* 0x018 1.x: 0x0001xxxx */
    be32 entries;                   /* 0x01c of the block table */
    be32 block_size;                /* 0x020 bytes */
    be32 checksum;                  /* 0x024 */
    uint8_t parent_id[16];          /* 0x028 */
    be32 parent_time;               /* 0x038 */
    be32 reserved;                  /* 0x03c */
    uint8_t parent_name[512];       /* 0x040 UTF-16BE */
    struct vhd_locator locator[8];  /* 0x240 */
    uint8_t reserved2[256];         /* 0x300 */
};
_Static_assert(sizeof(struct vhd_header) == 1024, "VHD dynamic header");

enum {
    VHD_SECTOR = 512,
    VHD_FOOTER = sizeof(struct vhd_footer),
    VHD_HEADER = sizeof(struct vhd_header),
    VHD_FIXED = 2, VHD_DYNAMIC = 3, VHD_DIFFERENCING = 4,
    VHD_PER_BITMAP = VHD_SECTOR * 8 * VHD_SECTOR,       /* bytes whose bits fill one sector of a bitmap */
    VHD_MAX_LOCATOR = 4096,         /* bytes of a name */
    VHD_MAX_BITMAPS = 8192,         /* read before an overlay is made: half a minute on a slow disk, usually 16 GiB */
};
#define VHD_NO_BLOCK 0xffffffffu
#define VHD_MAX_GEOMETRY (65535ull * 16 * 255 * VHD_SECTOR)

struct vhd {
    struct vhd_footer footer;       /* the one that counts */
    uint32_t type, block_bits, bitmap_size, entries;
    uint64_t table, header;         /* offsets */
    uint64_t end;                   /* no data from here on: the footer, or the file's end where that is lost */
    bool by_geometry;
};

/* The one's complement of the sum of all bytes but those of the checksum, which begins at `own`. */
static uint32_t vhd_checksum(const void *from, size_t len, size_t own)
{
    const uint8_t *bytes = from;
    uint32_t sum = 0;

    for (size_t i = 0; i < len; i++)
        sum += i >= own && i < own + 4 ? 0 : bytes[i];
    return ~sum;
}

static bool vhd_is_footer(const struct vhd_footer *footer)
{
    return memcmp(footer->cookie, "conectix", 8) == 0;
}

/* Needs only 511 bytes. */
static bool vhd_footer_is_good(const struct vhd_footer *footer)
{
    return vhd_is_footer(footer) &&
           be32_to_cpu(footer->checksum) == vhd_checksum(footer, VHD_FOOTER - 1, offsetof(struct vhd_footer, checksum));
}

/*
 * Certain: the footer of a fixed disk behind exactly as much data as it says. That beats whatever the guest may have
 * written to the start of its disk.
 */
static int vhd_probe(const struct probe *p)
{
    const struct vhd_footer *footer;

    for (size_t len = VHD_FOOTER; len >= VHD_FOOTER - 1 && len <= p->tail_len; len--) {
        footer = (const void *)(p->tail + p->tail_len - len);
        if (vhd_is_footer(footer))
            return vhd_footer_is_good(footer) && be32_to_cpu(footer->type) == VHD_FIXED &&
                           be64_to_cpu(footer->size) == p->size - len
                       ? 100 : 90;
    }
    return p->head_len >= VHD_FOOTER - 1 && vhd_is_footer((const void *)p->head) ? 100 : 0;
}

/* The copy of the footer and the dynamic header, which stand before the table. */
static uint64_t vhd_header_length(struct file *f)
{
    struct { struct vhd_footer footer; struct vhd_header header; } h;

    return file_read(f, &h, sizeof(h), 0) || !vhd_is_footer(&h.footer) ? 0 : be64_to_cpu(h.header.table);
}

/* Reads a footer of len bytes. False: none is there, or it is damaged; *seen: one is there. */
static bool vhd_read_footer(struct file *f, uint64_t offset, uint64_t len, struct vhd_footer *footer, bool *seen)
{
    *footer = (struct vhd_footer){ 0 };
    if (file_read(f, footer, len, offset) || !vhd_is_footer(footer))
        return false;
    *seen = true;
    return vhd_footer_is_good(footer);
}

/* Reads the footer at the end, of 512 or 511 bytes, and its copy at the front, which fixed disks do not have. */
static int vhd_find_footer(struct image *im, struct vhd *v)
{
    struct file *f = &im->files[0];
    struct vhd_footer front;
    bool seen = false, good_end = false, good_front;

    for (uint64_t len = VHD_FOOTER; len >= VHD_FOOTER - 1 && len <= f->size && !good_end; len--) {
        v->end = f->size - len;
        good_end = vhd_read_footer(f, v->end, len, &v->footer, &seen);
    }
    good_front = f->size >= VHD_FOOTER && vhd_read_footer(f, 0, VHD_FOOTER, &front, &seen) &&
                 be32_to_cpu(front.type) != VHD_FIXED;
    if (!seen)
        return msg_err(-EINVAL, "%s: is not a VHD image", im->name);
    if (!good_end && !good_front)
        return msg_err(-EINVAL, "%s: damaged VHD: no footer of it has a good checksum; --format raw shows its bytes",
                       im->name);
    /* Behind a dynamic disk that has lost its end, the guest's own data may look like a footer. */
    if (good_end && good_front && be32_to_cpu(v->footer.type) == VHD_FIXED) {
        good_end = be64_to_cpu(v->footer.size) == v->end;
        msg_say(MSG_NOTE, "%s: has the footer of a fixed disk at its end and one of another kind at its front; %s",
                im->name, good_end ? "the first counts, since the size is right" : "the latter counts");
    } else if (!good_end) {
        msg_say(MSG_NOTE, "%s: the footer at its end is lost or damaged; its copy at the front is used", im->name);
    }
    if (!good_end) {
        v->footer = front;
        v->end = f->size;
    }
    return 0;
}

/* Reads the footer; sets the identity and the type. */
static int vhd_identify(struct image *im)
{
    struct vhd *v = im->state;
    uint32_t version;
    int ret = vhd_find_footer(im, v);

    if (ret)
        return ret;
    version = be32_to_cpu(v->footer.version);
    v->type = be32_to_cpu(v->footer.type);
    if (version >> 16 != 1)
        return msg_err(-EOPNOTSUPP, "%s: VHD of unknown version 0x%08x, which is not supported", im->name, version);
    if (v->type < VHD_FIXED || v->type > VHD_DIFFERENCING)
        return fmt_unsupported(im, "the kind of disk", v->type);
    ext_set_id(&im->id, ID_IMAGE, v->footer.id);
    return 0;
}

static uint64_t vhd_geometry(const struct vhd_footer *footer)
{
    return (uint64_t)be16_to_cpu(footer->cylinders) * footer->heads * footer->sectors * VHD_SECTOR;
}

static bool vhd_is_made_by(const struct vhd *v, const char creator[4])
{
    return memcmp(v->footer.creator, creator, 4) == 0;
}

/* reach: bytes that the blocks, or the file, can hold. */
static int vhd_set_size(struct image *im, struct vhd *v, uint64_t reach)
{
    uint64_t current = be64_to_cpu(v->footer.size), geometry = vhd_geometry(&v->footer);
    bool usable = geometry && geometry < VHD_MAX_GEOMETRY && geometry <= reach;

    if (current > (uint64_t)MAX_IMAGE_SIZE)
        return fmt_refuse(im, "the size", current);
    if (im->child && im->child->format == im->format)   /* the child decides how much of it is shown */
        current = geometry > current && geometry <= reach ? geometry : current;
    else
        v->by_geometry = usable &&
                         (vhd_is_made_by(v, "vpc ") || vhd_is_made_by(v, "vs  ") || vhd_is_made_by(v, "qemu"));
    im->size = v->by_geometry ? geometry : current;
    return 0;
}

static int vhd_check_header(struct image *im, struct vhd *v, const struct vhd_header *h)
{
    uint32_t block = be32_to_cpu(h->block_size);
    uint64_t size = im->files[0].size;

    if (memcmp(h->cookie, "cxsparse", 8) != 0)
        return fmt_refuse(im, "the offset of the dynamic header, which is not there", v->header);
    if (be32_to_cpu(h->version) >> 16 != 1)
        return fmt_unsupported(im, "the version of the dynamic header, not 0x0001xxxx", be32_to_cpu(h->version));
    if (!util_is_power_of_2(block, VHD_SECTOR, UINT32_MAX))
        return fmt_refuse(im, "the block size, which is no power of two of 512 bytes or more", block);
    v->table = be64_to_cpu(h->table);
    v->entries = be32_to_cpu(h->entries);
    if (v->table % VHD_SECTOR || v->table > size || v->table < VHD_FOOTER)
        return fmt_refuse_table(im, &im->files[0], "the offset of the block table", v->table, VHD_SECTOR);
    if ((uint64_t)v->entries * 4 > size - v->table)
        return fmt_refuse(im, "more table entries than the file holds", v->entries);
    if (util_overlap(v->table, (uint64_t)v->entries * 4, v->header, VHD_HEADER))
        return fmt_refuse(im, "the offset of the block table, in the dynamic header", v->table);
    v->block_bits = (uint32_t)__builtin_ctz(block);
    v->bitmap_size = (block / VHD_PER_BITMAP + !!(block % VHD_PER_BITMAP)) * VHD_SECTOR;
    im->cluster_size = block;
    im->entry_size = 4;
    return 0;
}

/* "file://HOST/PATH", in place: the path with its %XX decoded; relative to the child where the host is ".". */
static bool vhd_file_url(char *url)
{
    char *to = url, *from = url + 7, pair[3] = "";

    if (strncasecmp(url, "file://", 7) != 0)
        return false;
    if (strncmp(from, "./", 2) == 0 || strncmp(from, "../", 3) == 0)
        from += from[1] == '/' ? 2 : 0;
    else
        from += strcspn(from, "/");
    for (; *from; to++) {
        bool coded = from[0] == '%' && isxdigit((unsigned char)from[1]) && isxdigit((unsigned char)from[2]);
        if (coded)
            memcpy(pair, from + 1, 2);
        *to = coded ? (char)strtoul(pair, NULL, 16) : *from;
        from += coded ? 3 : 1;
    }
    *to = 0;
    return true;
}

/* Adds one recorded name of the parent. Skips what it cannot read: other names are tried, and the UUID decides. */
static int vhd_read_locator(struct image *im, const struct vhd_locator *locator)
{
    uint8_t path[VHD_MAX_LOCATOR];
    char name[2 * VHD_MAX_LOCATOR];
    struct file *f = &im->files[0];
    uint32_t len = be32_to_cpu(locator->length);
    uint64_t offset = be64_to_cpu(locator->offset);
    bool windows = locator->code[0] == 'W';

    if (len > sizeof(path) || offset > f->size || len > f->size - offset || file_read(f, path, len, offset))
        return 0;
    /* W2ru and W2ku are in UTF-16; the older Wi2r and Wi2k may be. */
    if (locator->code[1] == '2' || (windows && len >= 2 && !path[1]))
        return text_from_utf16(path, len, false, name, sizeof(name)) ? ext_add_hint(im, name) : 0;
    snprintf(name, sizeof(name), "%.*s", (int)len, (const char *)path);
    return windows || vhd_file_url(name) ? ext_add_hint(im, name) : 0;
}

/* The locators in the order of the specification, then the name in the header. */
static int vhd_read_parent(struct image *im, const struct vhd_header *h)
{
    static const char *const codes[] = { "W2ru", "W2ku", "MacX", "Wi2r", "Wi2k" };
    char name[1024];
    int ret = 0;

    ext_set_id(&im->parent_id, ID_IMAGE, h->parent_id);
    ext_set_parent(im, im->parent_id.known[ID_IMAGE] ? "vpc" : "");
    for (size_t kind = 0; kind < ARRAY_LEN(codes); kind++)
        for (size_t i = 0; i < ARRAY_LEN(h->locator) && !ret; i++)
            if (memcmp(h->locator[i].code, codes[kind], 4) == 0)
                ret = vhd_read_locator(im, &h->locator[i]);
    if (!ret && text_from_utf16(h->parent_name, sizeof(h->parent_name), true, name, sizeof(name)))
        ret = ext_add_hint(im, name);
    return ret;
}

/*
 * There is no second copy of the dynamic header. Where its checksum is wrong, something else must confirm what
 * reading needs of it: the footer's size must need exactly so many blocks of that size, and the table must lie where
 * everybody puts it. A parent is known by its identity.
 */
static int vhd_check_sum(const struct image *im, const struct vhd *v, const struct vhd_header *h)
{
    uint32_t sum = be32_to_cpu(h->checksum);
    bool confirmed = v->table == v->header + VHD_HEADER && im->size <= (uint64_t)v->entries << v->block_bits &&
                     im->size > (uint64_t)(v->entries - 1) << v->block_bits;

    if (sum == vhd_checksum(h, VHD_HEADER, offsetof(struct vhd_header, checksum)))
        return 0;
    if (!confirmed)
        return fmt_refuse(im, "the checksum of the dynamic header", sum);
    fmt_odd(im, "the checksum of the dynamic header", sum);
    return 0;
}

static int vhd_open_dynamic(struct image *im, struct vhd *v)
{
    struct vhd_header header;
    uint64_t reach;
    int ret;

    v->header = be64_to_cpu(v->footer.header);
    ret = fmt_read(im, &im->files[0], v->header, &header, VHD_HEADER, "the offset of the dynamic header");
    if (!ret)
        ret = vhd_check_header(im, v, &header);
    if (ret)
        return ret;
    reach = (uint64_t)v->entries << v->block_bits;
    ret = vhd_set_size(im, v, reach);
    if (!ret && im->size > reach)
        ret = fmt_refuse(im, "too few table entries for its size", v->entries);
    if (!ret)
        ret = vhd_check_sum(im, v, &header);
    if (ret || (v->type == VHD_DYNAMIC && text_is_null_id(header.parent_id)))
        return ret;
    if (v->type == VHD_DYNAMIC)     /* zeros for what the parent has would be the worse mistake */
        msg_say(MSG_NOTE, "%s: says that it is dynamic, but has a parent's UUID: read as differencing", im->name);
    return vhd_read_parent(im, &header);
}

static int vhd_open(struct image *im)
{
    struct vhd *v = im->state;
    int ret = vhd_identify(im);

    if (ret)
        return ret;
    ret = v->type == VHD_FIXED ? vhd_set_size(im, v, v->end) : vhd_open_dynamic(im, v);
    if (!ret && v->by_geometry && im->size != be64_to_cpu(v->footer.size))
        msg_say(MSG_NOTE, "%s: made by a program that counts by the geometry, so %" PRIu64 " bytes and not %" PRIu64,
                im->name, (uint64_t)im->size, be64_to_cpu(v->footer.size));
    return ret;
}

/* length bytes from in_block on of the block whose bitmap is at `start`, its data behind that. */
static void vhd_map_block(struct image *im, const struct vhd *v, uint64_t start, uint64_t in_block, uint64_t length,
                          struct extent *ext)
{
    uint64_t all = v->bitmap_size + (1ull << v->block_bits), data = start + v->bitmap_size + in_block, sectors;
    const char *why = NULL;
    bool here = false;

    sectors = (in_block + length - 1) / VHD_SECTOR - in_block / VHD_SECTOR + 1;
    if (util_overlap(start, all, 0, VHD_FOOTER) || util_overlap(start, all, v->header, VHD_HEADER) ||
        util_overlap(start, all, v->table, (uint64_t)v->entries * 4))
        why = "its block lies in the image's own tables";
    else if (start >= v->end || v->bitmap_size > v->end - start)
        why = "its data lies past the end of the file";
    else if (cache_bits(&im->files[0], start, in_block / VHD_SECTOR, sectors, true, &here, &sectors))
        why = "the bitmap of its block cannot be read";
    else
        length = util_min(length, sectors * VHD_SECTOR - in_block % VHD_SECTOR);
    if (why)
        ext_bad(ext, length, why);
    else if (here)
        ext_data(ext, length, &im->files[0], data, v->end);
    else
        *ext = (struct extent){ .kind = ext_hole(im), .length = length };
}

static void vhd_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct vhd *v = im->state;
    uint64_t in_block = offset & ((1ull << v->block_bits) - 1);
    uint32_t entry;

    if (v->type == VHD_FIXED) {
        ext_data(ext, length, &im->files[0], offset, v->end);
        ext->sparse = ext->kind == EXT_DATA;
        return;
    }
    length = util_min(length, (1ull << v->block_bits) - in_block);
    if (cache_be32(&im->files[0], v->table + (offset >> v->block_bits) * 4, &entry))
        ext_bad(ext, length, "the block table cannot be read");
    else if (entry == VHD_NO_BLOCK)
        *ext = (struct extent){ .kind = ext_hole(im), .length = length };
    else
        vhd_map_block(im, v, (uint64_t)entry * VHD_SECTOR, in_block, length, ext);
}

static void vhd_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct vhd *v = by;
    uint64_t start = (uint64_t)util_be32(bytes) * VHD_SECTOR, block = 1ull << v->block_bits;

    if (util_be32(bytes) == VHD_NO_BLOCK)
        return;
    c->claim(c, &im->files[0], start, v->bitmap_size, "the bitmap of a block", 0);
    c->claim(c, &im->files[0], start + v->bitmap_size, util_min(block, im->size - i * block), NULL, i * block);
}

static bool vhd_claims(struct image *im, struct claims *c)
{
    const struct vhd *v = im->state;
    struct file *f = &im->files[0];

    if (v->end < f->size)
        c->claim(c, f, v->end, f->size - v->end, "the footer", 0);
    if (v->type == VHD_FIXED) {
        c->claim(c, f, 0, im->size, NULL, 0);
        return true;
    }
    c->claim(c, f, 0, VHD_FOOTER, "the copy of the footer", 0);
    c->claim(c, f, v->header, VHD_HEADER, "the dynamic header", 0);
    c->claim(c, f, v->table, (uint64_t)v->entries * 4, "the block table", 0);
    ext_claim_table(c, im, v, f, v->table, (im->size + (1ull << v->block_bits) - 1) >> v->block_bits, 4,
                    vhd_claim_entry);
    return true;
}

static void vhd_info(struct image *im, struct out *out)
{
    static const char *const kinds[] = { "fixed", "dynamic", "differencing" };
    const struct vhd *v = im->state;
    char id[33], creator[5];

    text_hex(im->id.value[ID_IMAGE], 16, id);
    snprintf(creator, sizeof(creator), "%.4s", (const char *)v->footer.creator);
    out_text(out, "subformat", kinds[v->type - VHD_FIXED]);
    out_text(out, "creator", creator);
    out_text(out, "size-by", v->by_geometry ? "geometry" : "current size");
    out_text(out, "id", id);
}

/*
 * Bytes of the disk as QEMU counts: by the current size for these creators and with the largest geometry, else by the
 * geometry. 0: it depends on QEMU's version.
 */
static uint64_t vhd_qemu_size(const struct vhd *v)
{
    static const char *const by_size[] = { "win ", "qem2", "d2v ", "tap", "CTXS" };
    uint64_t current = be64_to_cpu(v->footer.size) & -512ull, geometry = vhd_geometry(&v->footer);

    for (size_t i = 0; i < ARRAY_LEN(by_size); i++)
        if (vhd_is_made_by(v, by_size[i]))
            return current;
    if (vhd_is_made_by(v, "wa\0") && current != geometry && geometry != VHD_MAX_GEOMETRY)
        return 0;
    return geometry == VHD_MAX_GEOMETRY ? current : geometry;
}

/* Is every bit of every bitmap set? QEMU ignores them. */
static bool vhd_bits_are_set(struct image *im)
{
    const struct vhd *v = im->state;
    uint64_t block = 1ull << v->block_bits, read = 0, end;
    struct extent ext;
    uint32_t entry;

    for (uint64_t at = 0; at < im->size; at = end) {
        end = util_min(at + block, im->size);
        if (cache_be32(&im->files[0], v->table + (at >> v->block_bits) * 4, &entry))
            return false;
        if (entry != VHD_NO_BLOCK && ++read > VHD_MAX_BITMAPS)
            return false;
        for (uint64_t from = at; entry != VHD_NO_BLOCK && from < end; from += ext.length) {
            vhd_map_block(im, v, (uint64_t)entry * VHD_SECTOR, from - at, end - from, &ext);
            if (ext.kind != EXT_DATA)
                return false;
        }
    }
    return true;
}

/*
 * QEMU looks at the front first, for the footer or its copy, and it knows no parents. It allocates blocks behind the
 * table and the last block: over a header that lies there.
 */
static bool vhd_as_qemu(struct image *im)
{
    const struct vhd *v = im->state;
    struct vhd_footer front;

    if (v->type == VHD_DIFFERENCING || vhd_qemu_size(v) != im->size || im->files[0].size < VHD_FOOTER ||
        file_read(&im->files[0], &front, VHD_FOOTER, 0))
        return false;
    if (v->type == VHD_FIXED)
        return !vhd_is_footer(&front) && v->end == im->files[0].size - VHD_FOOTER;
    return memcmp(&front, &v->footer, VHD_FOOTER) == 0 && v->header < v->table && v->block_bits >= 12 &&
           vhd_bits_are_set(im);
}

/* -- lost headers -- */

enum { VHD_GUESS_REACH = 64 << 10 /* bytes in which the block table is looked for: usually at 1536 */ };

static bool vhd_is_entry(const struct fmt_table *t, const uint8_t *bytes, uint64_t *block)
{
    uint64_t start = (uint64_t)util_be32(bytes) * VHD_SECTOR;

    *block = util_be32(bytes) == VHD_NO_BLOCK ? FMT_NO_BLOCK : start;
    return *block == FMT_NO_BLOCK || (start > t->offset && start / 4 < t->f->size);
}

/* Is the table of a disk with so many blocks of this size here? Their distance, with a bitmap before each, tells. */
static bool vhd_is_table(struct fmt_table *t, uint64_t n, uint64_t block)
{
    uint64_t bitmap = (block + VHD_PER_BITMAP - 1) / VHD_PER_BITMAP * VHD_SECTOR;

    return n <= FMT_TABLE_MAX && fmt_look_at_table(t) && t->n == n && t->used > 1 && t->stride == bitmap + block &&
           t->low >= t->offset + 4 * n;
}

/* Finds the table of a disk of so many bytes, and the size of its blocks. 0: neither. */
static uint64_t vhd_guess_block(struct file *f, uint64_t disk, struct fmt_table *t)
{
    for (uint64_t at = VHD_FOOTER + VHD_HEADER; at < util_min(f->size, VHD_GUESS_REACH); at += VHD_SECTOR)
        for (uint64_t block = 4096; block <= 1u << 30; block *= 2) {
            uint64_t n = (disk + block - 1) / block;
            *t = (struct fmt_table){ .f = f, .offset = at, .width = 4, .max = n, .entry = vhd_is_entry };
            if (vhd_is_table(t, n, block))
                return block;
        }
    return 0;
}

/* The footer is left, the dynamic header is lost. What its parent was is lost with it. */
static int vhd_rebuild(struct image *im)
{
    struct file *f = &im->files[0];
    struct vhd_header old, *h;
    uint8_t page[FILE_PATCH];
    struct fmt_table t;
    struct vhd v;
    uint64_t at, block;
    int ret = vhd_find_footer(im, &v);

    at = ret ? 0 : be64_to_cpu(v.footer.header);
    if (ret || be32_to_cpu(v.footer.type) == VHD_FIXED || be64_to_cpu(v.footer.size) > (uint64_t)MAX_IMAGE_SIZE ||
        (at <= f->size && file_read(f, &old, sizeof(old), at) == 0 && memcmp(old.cookie, "cxsparse", 8) == 0))
        return ret;
    block = at == VHD_FOOTER ? vhd_guess_block(f, be64_to_cpu(v.footer.size), &t) : 0;
    if (!block)
        return msg_err(-EINVAL, "%s: cannot be put together: no block table of a disk of %" PRIu64 " bytes is left "
                       "near its start; --header=FILE takes the header of another image", im->name,
                       be64_to_cpu(v.footer.size));
    fmt_read_page(f, 0, page, 0);   /* an entry 0 is an error */
    memcpy(page, &v.footer, VHD_FOOTER);
    h = (void *)(page + VHD_FOOTER);
    *h = (struct vhd_header){
        .cookie = "cxsparse",
        .unused = cpu_to_be64(UINT64_MAX),
        .table = cpu_to_be64(t.offset),
        .version = cpu_to_be32(0x00010000),
        .entries = cpu_to_be32((uint32_t)t.n),
        .block_size = cpu_to_be32((uint32_t)block),
    };
    h->checksum = cpu_to_be32(vhd_checksum(h, VHD_HEADER, offsetof(struct vhd_header, checksum)));
    msg_say(MSG_NOTE, "%s: dynamic header put together: %" PRIu64 " blocks of %" PRIu64 " bytes, block table at %"
            PRIu64 "%s", im->name, t.n, block, t.offset,
            be32_to_cpu(v.footer.type) == VHD_DIFFERENCING ? "; which parent it has is lost" : "");
    return file_patch(f, 0, page);
}

static const struct image_format vhd_format = {
    .name = "vpc",
    .describe = "VHD images of Virtual PC, Hyper-V, Azure: fixed, dynamic, differencing",
    .writes = "overlay",
    .state_size = sizeof(struct vhd),
    .extensions = " vhd avhd ",
    .probe = vhd_probe,
    .header_length = vhd_header_length,
    .rebuild = vhd_rebuild,
    .identify = vhd_identify,
    .open = vhd_open,
    .map = vhd_map,
    .claims = vhd_claims,
    .as_qemu = vhd_as_qemu,
    .info = vhd_info,
};

/* ******************************************************************************************************** *
 * 18. VHDX
 *
 * [MS-VHDX] "Virtual Hard Disk v2 File Format", for reading. All numbers are little-endian.
 *
 *   identifier | at 64 and 128 KiB: headers | at 192 and 256 KiB: region tables | from 1 MiB on, in any order: the log,
 *   the metadata, the block table (BAT), blocks
 *   BAT: the entries of a chunk (2^23 sectors), then one for the sector bitmap block of the chunk, and so on
 *
 * A log that was not replayed on disk is replayed in memory: its pages become patches of the file (file_patch()), which
 * every reader sees from then on; the file is not changed. The log may replace anything but the headers and itself, so
 * it is replayed right after the headers are read and before anything else is.
 * ******************************************************************************************************** */

enum {
    VHDX_MIB = 1 << 20,             /* what follows the region tables is aligned to it */
    VHDX_HEADER_AT = 64 << 10,      /* the second one lies 64 KiB further; likewise the region tables */
    VHDX_REGIONS_AT = 192 << 10,
    VHDX_TABLE = 64 << 10,          /* a region table, or the metadata table */
    VHDX_MAX_ENTRIES = 2047,        /* of either */
    VHDX_PAGE = 4096,               /* of the log */
    VHDX_LOG_SPARE = 64 << 20,      /* read at most 16 times the log and this: a whole ring takes 8 times */
    VHDX_MIN_BLOCK = 1 << 20,
    VHDX_MAX_BLOCK = 256 << 20,
    VHDX_CHUNK_BITS = 23,           /* log2 of the sectors of a chunk */
};
#define VHDX_MAX_SIZE (64ull << 40)

struct vhdx_header {
    uint8_t signature[4];           /* 0x00: "head" */
    le32 checksum;                  /* 0x04: CRC-32C of the whole with zeros here; so in all that have one */
    le64 sequence;                  /* 0x08: the header with the higher one is current */
    uint8_t file_write_guid[16];    /* 0x10 */
    uint8_t data_write_guid[16];    /* 0x20: changes with the data: what children remember of their parent */
    uint8_t log_guid[16];           /* 0x30: of the entries to replay; zeros: none */
    le16 log_version;               /* 0x40: 0 */
    le16 version;                   /* 0x42: 1 */
    le32 log_length;                /* 0x44 */
    le64 log_offset;                /* 0x48 */
    uint8_t reserved[4016];         /* 0x50 */
};
_Static_assert(sizeof(struct vhdx_header) == 4096, "VHDX header");

struct vhdx_region {
    uint8_t guid[16];               /* 0x00 */
    le64 offset;                    /* 0x10: in the file */
    le32 length;                    /* 0x18 */
    le32 flags;                     /* 0x1c: 1: required */
};
struct vhdx_region_table {
    uint8_t signature[4];           /* 0x00: "regi" */
    le32 checksum;                  /* 0x04 */
    le32 n_entries;                 /* 0x08 */
    uint8_t reserved[4];            /* 0x0c */
    struct vhdx_region entry[VHDX_MAX_ENTRIES]; /* 0x10 */
    uint8_t rest[16];               /* 0xfff0 */
};
_Static_assert(sizeof(struct vhdx_region_table) == VHDX_TABLE, "VHDX region table");

struct vhdx_metadata_entry {
    uint8_t guid[16];               /* 0x00 */
    le32 offset;                    /* 0x10: in the region */
    le32 length;                    /* 0x14 */
    le32 flags;                     /* 0x18: VHDX_META_... */
    uint8_t reserved[4];            /* 0x1c */
};
struct vhdx_metadata_table {
    uint8_t signature[8];           /* 0x00: "metadata" */
    uint8_t reserved[2];            /* 0x08 */
    le16 n_entries;                 /* 0x0a */
    uint8_t reserved2[20];          /* 0x0c */
    struct vhdx_metadata_entry entry[VHDX_MAX_ENTRIES]; /* 0x20 */
};
_Static_assert(sizeof(struct vhdx_metadata_table) == VHDX_TABLE, "VHDX metadata table");
enum { VHDX_META_USER = 1, VHDX_META_REQUIRED = 4 };

struct vhdx_parameters {            /* a metadata item */
    le32 block_size;                /* 0x00 */
    le32 flags;                     /* 0x04: VHDX_HAS_PARENT */
};
enum { VHDX_HAS_PARENT = 2 };

struct vhdx_locator_entry {         /* offsets in the locator; UTF-16, lengths in bytes */
    le32 key_offset, value_offset;  /* 0x00, 0x04 */
    le16 key_length, value_length;  /* 0x08, 0x0a */
};
struct vhdx_locator {               /* a metadata item */
    uint8_t type[16];               /* 0x00 */
    uint8_t reserved[2];            /* 0x10 */
    le16 n_entries;                 /* 0x12 */
    struct vhdx_locator_entry entry[];  /* 0x14 */
};
_Static_assert(sizeof(struct vhdx_locator_entry) == 12 && sizeof(struct vhdx_locator) == 20, "VHDX parent locator");

struct vhdx_log_header {            /* of an entry of the log; descriptors follow */
    uint8_t signature[4];           /* 0x00: "loge" */
    le32 checksum;                  /* 0x04: of the whole entry */
    le32 length;                    /* 0x08: of the whole entry, whole pages */
    le32 tail;                      /* 0x0c: where in the log the oldest entry to replay begins */
    le64 sequence;                  /* 0x10 */
    le32 n_descriptors;             /* 0x18 */
    uint8_t reserved[4];            /* 0x1c */
    uint8_t guid[16];               /* 0x20: the header's log_guid */
    le64 flushed;                   /* 0x30: length of the file that was on disk before this entry was written */
    le64 last;                      /* 0x38: length of the file that all it refers to fits into */
};
struct vhdx_descriptor {
    uint8_t signature[4];           /* 0x00: "zero": a range of zeros; "desc": a page, whose data is in the entry */
    uint8_t trailing[4];            /* 0x04: desc: the last bytes of the page */
    union {
        le64 length;                /* 0x08: zero: bytes, whole pages */
        uint8_t leading[8];         /* 0x08: desc: the first bytes of the page */
    };
    le64 offset;                    /* 0x10: in the file */
    le64 sequence;                  /* 0x18: that of the entry */
};
_Static_assert(sizeof(struct vhdx_log_header) == 64 && sizeof(struct vhdx_descriptor) == 32, "VHDX log entry");
enum { VHDX_HEADER_SLOTS = 2, VHDX_PAGE_SLOTS = 128 };  /* in units of a descriptor */

struct vhdx_data_page {             /* the pages of data follow the pages of descriptors, one for each "desc" */
    uint8_t signature[4];           /* 0x000: "data" */
    le32 sequence_high;             /* 0x004: that of the entry */
    uint8_t data[4084];             /* 0x008: the page without its first and last bytes */
    le32 sequence_low;              /* 0xffc */
};
_Static_assert(sizeof(struct vhdx_data_page) == VHDX_PAGE, "VHDX log data");

/*
 * States of payload blocks; a sector bitmap block is present (6) or not (0). UNMAPPED_095: what the draft of version
 * 0.95 had for UNMAPPED.
 */
enum { VHDX_ABSENT, VHDX_UNDEFINED, VHDX_ZERO, VHDX_UNMAPPED, VHDX_UNMAPPED_095 = 5, VHDX_PRESENT, VHDX_PARTIAL };
enum { VHDX_ENTRY_STATE = 7, VHDX_ENTRY_RESERVED = 0xffff8 };   /* bits of a BAT entry; the rest is the offset */

#define VHDX_GUID_BAT "2dc27766-f623-4200-9d64-115e9bfd4a08"
#define VHDX_GUID_METADATA "8b7ca206-4790-4b9a-b8fe-575f050f886e"
#define VHDX_GUID_LOCATOR "b04aefb7-d19e-4a81-b789-25b8e9445913"

enum vhdx_item { VHDX_PARAMETERS, VHDX_SIZE, VHDX_SECTOR, VHDX_LOCATOR, VHDX_PHYSICAL, VHDX_ID, VHDX_ITEMS };
static const struct {
    const char *guid;
    uint32_t min_length;
    enum { VHDX_NEEDED, VHDX_USED, VHDX_IGNORED } use;
    const char *what;
} vhdx_items[VHDX_ITEMS] = {
    [VHDX_PARAMETERS] = { "caa16737-fa36-4d43-b3b6-33f0aa44e76b", 8, VHDX_NEEDED, "the file parameters" },
    [VHDX_SIZE] = { "2fa54224-cd1b-4876-b211-5dbed83bf4b8", 8, VHDX_NEEDED, "the disk's size" },
    [VHDX_SECTOR] = { "8141bf1d-a96f-4709-ba47-f233a8faab5f", 4, VHDX_NEEDED, "the sector size" },
    [VHDX_LOCATOR] = { "a8d35f2d-b30b-454d-abf7-d3d84834ab0c", 20, VHDX_USED, "the parent locator" },
    [VHDX_PHYSICAL] = { "cda348c7-445d-4471-9cc9-e9885251c556", 0, VHDX_IGNORED, "the physical sector size" },
    [VHDX_ID] = { "beca12ab-b2e6-4523-93ef-c309e000c746", 0, VHDX_IGNORED, "the disk's id" },
};

struct vhdx_range {
    uint64_t offset, length;        /* length 0: there is none */
};

struct vhdx {
    uint32_t block_bits, sector_bits, chunk_bits;   /* chunk_bits: log2 of the blocks of a chunk */
    uint32_t log_version;
    uint8_t log_guid[16];
    struct vhdx_range log, metadata, bat, item[VHDX_ITEMS];
    uint64_t flushed;               /* the length of the file by the log; 0: no log was replayed */
    bool has_parent;
};

static int vhdx_probe(const struct probe *p)
{
    return p->head_len >= 8 && memcmp(p->head, "vhdxfile", 8) == 0 ? 100 : 0;
}

/* A GUID of the file as the specification prints it. */
static void vhdx_guid(const uint8_t guid[16], char text[37])
{
    uint8_t swapped[16];

    text_swap_guid(guid, swapped);
    text_uuid(swapped, text);
}

static int vhdx_unknown(const struct image *im, const char *what, const char *guid)
{
    return msg_err(-EOPNOTSUPP, "%s: needs an unknown VHDX %s {%s}, which is not supported", im->name, what, guid);
}

/* CRC-32C (Castagnoli), least significant bit first; begins with ~0 and is inverted at the end. */
static uint32_t vhdx_crc(uint32_t crc, const void *data, size_t len)
{
    static uint32_t table[256];     /* filled at open, by the only thread there is then */
    const uint8_t *bytes = data;

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

/* Reads a header or region table. False: it is not there, or has another signature or checksum. */
static bool vhdx_read_sealed(struct file *f, uint64_t offset, uint8_t *bytes, size_t len, const char *signature)
{
    static const uint8_t zeros[4];

    return offset + len <= f->size && file_read(f, bytes, len, offset) == 0 &&
           memcmp(bytes, signature, 4) == 0 &&
           ~vhdx_crc(vhdx_crc(vhdx_crc(~0u, bytes, 4), zeros, 4), bytes + 8, len - 8) == util_le32(bytes + 4);
}

static int vhdx_no_header(const struct image *im)
{
    struct file *f = &im->files[0];
    uint8_t identifier[8] = { 0 };

    if (file_read(f, identifier, util_min(8, f->size), 0) || memcmp(identifier, "vhdxfile", 8) != 0)
        return msg_err(-EINVAL, "%s: is not a VHDX image", im->name);
    if (f->size < VHDX_HEADER_AT + 2 * VHDX_TABLE)
        return fmt_refuse_table(im, f, "the offset of its headers", VHDX_HEADER_AT, 2ull * VHDX_TABLE);
    return msg_err(-EINVAL, "%s: damaged VHDX: neither of its headers has a good checksum", im->name);
}

/* Of the good headers, the one with the higher sequence number is current. Two with one number must say the same. */
static int vhdx_read_headers(struct image *im)
{
    struct vhdx *v = im->state;
    const size_t used = offsetof(struct vhdx_header, data_write_guid), end = offsetof(struct vhdx_header, reserved);
    const struct vhdx_header *h = NULL;
    struct vhdx_header both[2];
    uint8_t uuid[16];

    for (size_t i = 0; i < 2; i++) {
        const struct vhdx_header *other = &both[i];
        if (!vhdx_read_sealed(&im->files[0], VHDX_HEADER_AT + i * VHDX_TABLE, (uint8_t *)&both[i], sizeof(both[i]),
                              "head"))
            continue;
        if (h && le64_to_cpu(other->sequence) == le64_to_cpu(h->sequence) &&
            memcmp((const uint8_t *)other + used, (const uint8_t *)h + used, end - used) != 0)
            return fmt_refuse(im, "two different headers with one sequence number", le64_to_cpu(h->sequence));
        if (!h || le64_to_cpu(other->sequence) > le64_to_cpu(h->sequence))
            h = other;
    }
    if (!h)
        return vhdx_no_header(im);
    if (le16_to_cpu(h->version) != 1)
        return msg_err(-EOPNOTSUPP, "%s: VHDX of unknown version %u, which is not supported", im->name,
                       le16_to_cpu(h->version));
    text_swap_guid(h->data_write_guid, uuid);
    ext_set_id(&im->id, ID_IMAGE, uuid);
    v->log_version = le16_to_cpu(h->log_version);
    memcpy(v->log_guid, h->log_guid, sizeof(v->log_guid));
    v->log = (struct vhdx_range){ .offset = le64_to_cpu(h->log_offset), .length = le32_to_cpu(h->log_length) };
    im->dirty = !text_is_null_id(v->log_guid);
    return 0;
}

/* -- the log -- */

/*
 * The log is a ring of entries: a header, descriptors, and a page of data for each "desc" of them. A writer appends an
 * entry, flushes, and only then changes the metadata in the file. So an entry that is not complete has changed nothing
 * yet. The tail in an entry says from which one on changes may still be missing in the file.
 *
 * Entries with the header's log GUID, a good checksum and consecutive sequence numbers form a run. A run counts if the
 * tail of its last entry is one of its entries: else the first ones to replay are lost. If several runs count, that
 * with the highest number is current. It is applied from the tail to the last entry, in this order, since a later
 * entry may replace a page of an earlier one. Example (offset in the log: sequence number, tail):
 *
 *   8 KiB: 4, 8 KiB | 16 KiB: 5, 16 KiB | 24 KiB: 6, 16 KiB | 32 KiB: 7, torn      the run is 4, 5, 6; 5, 6 are applied
 */
struct vhdx_log {
    struct image *im;
    const struct vhdx *vhdx;
    uint64_t budget;                /* bytes that may still be read, so that garbage does not take for ever */
    bool spent;                     /* the budget did not suffice: what was found so far may not be all */
};

struct vhdx_entry {
    uint64_t at, length, tail, sequence, flushed, last;     /* at, tail: offsets in the log */
    uint32_t checksum, n_descriptors;
};

static int vhdx_log_bad(const struct image *im, const char *what)
{
    return msg_err(-EINVAL, "%s: was not closed properly, and its log cannot be replayed: %s; --ignore-log reads what "
                   "is there without it", im->name, what);
}

/* Reads a page of the ring. at: an offset in the log, may be past its end */
static bool vhdx_log_read(struct vhdx_log *log, uint64_t at, void *page)
{
    const struct vhdx_range *ring = &log->vhdx->log;

    log->spent |= log->budget < VHDX_PAGE || (log->budget % VHDX_MIB == 0 && util_interrupted());
    if (log->spent)
        return false;
    log->budget -= VHDX_PAGE;
    return file_read(&log->im->files[0], page, VHDX_PAGE, ring->offset + at % ring->length) == 0;
}

/* Reads the header of the entry at `at`. False: there is none of this log. */
static bool vhdx_entry_header(struct vhdx_log *log, uint64_t at, struct vhdx_entry *e)
{
    uint8_t page[VHDX_PAGE] = { 0 };
    const struct vhdx_log_header *h = (const void *)page;
    uint64_t ring = log->vhdx->log.length;

    if (!vhdx_log_read(log, at, page) || memcmp(h->signature, "loge", 4) != 0 ||
        memcmp(h->guid, log->vhdx->log_guid, 16) != 0)
        return false;
    *e = (struct vhdx_entry){
        .at = at % ring, .checksum = le32_to_cpu(h->checksum), .length = le32_to_cpu(h->length),
        .tail = le32_to_cpu(h->tail), .sequence = le64_to_cpu(h->sequence),
        .n_descriptors = le32_to_cpu(h->n_descriptors), .flushed = le64_to_cpu(h->flushed),
        .last = le64_to_cpu(h->last),
    };
    return e->length && e->length <= ring && e->length % VHDX_PAGE == 0 && e->tail < ring &&
           e->tail % VHDX_PAGE == 0 && e->sequence &&
           (VHDX_HEADER_SLOTS + (uint64_t)e->n_descriptors) * sizeof(struct vhdx_descriptor) <= e->length;
}

static bool vhdx_entry_sum(struct vhdx_log *log, const struct vhdx_entry *e)
{
    uint8_t page[VHDX_PAGE];
    uint32_t crc = ~0u;

    for (uint64_t done = 0; done < e->length; done += VHDX_PAGE) {
        if (!vhdx_log_read(log, e->at + done, page))
            return false;
        if (done == 0)
            memset(page + offsetof(struct vhdx_log_header, checksum), 0, 4);
        crc = vhdx_crc(crc, page, VHDX_PAGE);
    }
    return ~crc == e->checksum;
}

/* Checks a "desc", whose page of data is at `at` in the entry, or applies it. */
static int vhdx_entry_page(struct vhdx_log *log, const struct vhdx_entry *e, uint64_t at,
                           const struct vhdx_descriptor *d, bool apply)
{
    uint8_t page[VHDX_PAGE] = { 0 };
    const struct vhdx_data_page *data = (const void *)page;

    if (at + VHDX_PAGE > e->length || !vhdx_log_read(log, e->at + at, page) ||
        memcmp(data->signature, "data", 4) != 0 || le32_to_cpu(data->sequence_high) != e->sequence >> 32 ||
        le32_to_cpu(data->sequence_low) != (uint32_t)e->sequence)
        return -EINVAL;
    memcpy(page, d->leading, sizeof(d->leading));
    memcpy(page + VHDX_PAGE - sizeof(d->trailing), d->trailing, sizeof(d->trailing));
    return apply ? file_patch(&log->im->files[0], le64_to_cpu(d->offset), page) : 0;
}

/* Goes through the descriptors of an entry, to check them or to apply them. -EINVAL: the entry is not valid. */
static int vhdx_entry_walk(struct vhdx_log *log, const struct vhdx_entry *e, bool apply)
{
    struct vhdx_descriptor page[VHDX_PAGE_SLOTS];
    uint64_t end = VHDX_HEADER_SLOTS + (uint64_t)e->n_descriptors, offset, length;
    uint64_t data = (end + VHDX_PAGE_SLOTS - 1) / VHDX_PAGE_SLOTS * VHDX_PAGE;
    int ret = 0;

    for (uint64_t i = VHDX_HEADER_SLOTS; i < end && !ret; i++) {
        const struct vhdx_descriptor *d = &page[i % VHDX_PAGE_SLOTS];
        if ((i == VHDX_HEADER_SLOTS || i % VHDX_PAGE_SLOTS == 0) &&
            !vhdx_log_read(log, e->at + i / VHDX_PAGE_SLOTS * VHDX_PAGE, page))
            return -EINVAL;
        offset = le64_to_cpu(d->offset);
        if (le64_to_cpu(d->sequence) != e->sequence || offset % VHDX_PAGE || offset > (uint64_t)MAX_IMAGE_SIZE / 2)
            return -EINVAL;
        if (memcmp(d->signature, "desc", 4) == 0) {
            ret = vhdx_entry_page(log, e, data, d, apply);
            data += VHDX_PAGE;
            continue;
        }
        length = le64_to_cpu(d->length);
        if (memcmp(d->signature, "zero", 4) != 0 || length % VHDX_PAGE || length > (uint64_t)MAX_IMAGE_SIZE / 2)
            return -EINVAL;
        for (uint64_t k = 0; apply && k < length && !ret; k += VHDX_PAGE)
            ret = file_patch(&log->im->files[0], offset + k, NULL);
    }
    return ret;
}

/* The length of the run of consecutive entries from start on; 0: none. *last is its last one. */
static uint64_t vhdx_log_run(struct vhdx_log *log, uint64_t start, struct vhdx_entry *last)
{
    uint64_t length = 0, ring = log->vhdx->log.length;
    struct vhdx_entry e;

    while (length < ring && vhdx_entry_header(log, start + length, &e) && vhdx_entry_sum(log, &e) &&
           vhdx_entry_walk(log, &e, false) == 0 && (!length || e.sequence == last->sequence + 1) &&
           e.length <= ring - length) {
        *last = e;
        length += e.length;
    }
    return length;
}

/* Does an entry of the run begin at `tail`? */
static bool vhdx_log_has_tail(struct vhdx_log *log, uint64_t start, uint64_t length, uint64_t tail)
{
    struct vhdx_entry e;

    for (uint64_t at = 0; at < length; at += e.length) {
        if ((start + at) % log->vhdx->log.length == tail)
            return true;
        if (!vhdx_entry_header(log, start + at, &e))
            return false;
    }
    return false;
}

/* The last entry of the run to replay: *head, whose sequence number is 0 if there is none. */
static void vhdx_log_find(struct vhdx_log *log, struct vhdx_entry *head)
{
    struct vhdx_entry last = { 0 };
    uint64_t run;

    *head = last;
    /* No run that counts begins inside of another one: it would end with the same entry, and have the same tail. */
    for (uint64_t start = 0; start < log->vhdx->log.length; start += run ? run : VHDX_PAGE) {
        run = vhdx_log_run(log, start, &last);
        if (run && last.sequence > head->sequence && vhdx_log_has_tail(log, start, run, last.tail))
            *head = last;
    }
}

/* Applies the entries from the tail of `head` up to itself. */
static int vhdx_log_apply(struct vhdx_log *log, struct vhdx *v, const struct vhdx_entry *head)
{
    struct file *f = &log->im->files[0];
    struct vhdx_entry e = { .at = UINT64_MAX };
    uint64_t last = 0, total = 0;
    unsigned n = 0;
    int ret = 0;

    log->budget = 4 * v->log.length + VHDX_MIB;     /* also ends this loop, should the file change underneath */
    for (; !ret && e.at != head->at; total += e.length, n++) {
        ret = vhdx_entry_header(log, head->tail + total, &e) ? vhdx_entry_walk(log, &e, true) : -EINVAL;
        v->flushed = e.flushed > v->flushed ? e.flushed : v->flushed;
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
    /* A replay on disk makes the file longer, with zeros. A file shorter than `flushed` was cut off: no zeros. */
    if (last > f->size && v->flushed <= f->size)
        file_extend(f, last);
    return 0;
}

static int vhdx_replay(struct image *im, struct vhdx *v)
{
    struct file *f = &im->files[0];
    struct vhdx_log log = { .im = im, .vhdx = v, .budget = 16 * v->log.length + VHDX_LOG_SPARE };
    struct vhdx_entry head;

    if (im->opt->ignore_log) {
        msg_say(MSG_NOTE, "%s: was not closed properly, and its log is ignored: what was changed last may be wrong",
                im->name);
        return 0;
    }
    if (v->log_version)
        return vhdx_log_bad(im, "it is of an unknown version");
    if (!v->log.length || v->log.length % VHDX_MIB || v->log.offset % VHDX_MIB || v->log.offset < VHDX_MIB ||
        v->log.offset > f->size || v->log.length > f->size - v->log.offset)
        return vhdx_log_bad(im, "it is not where it should be");
    vhdx_log_find(&log, &head);
    if (util_interrupted())
        return msg_err(-EINTR, "interrupted");
    if (!head.sequence || log.spent)
        return vhdx_log_bad(im, log.spent ? "too much garbage in it" : "no whole sequence in it");
    return vhdx_log_apply(&log, v, &head);
}

/* -- regions, metadata -- */

/* What is read at open, one after the other, into one buffer. */
union vhdx_table {
    struct vhdx_region_table regions;
    struct vhdx_metadata_table metadata;
    struct vhdx_locator locator;
    uint8_t bytes[VHDX_TABLE];
};

static bool vhdx_overlap(const struct vhdx_range *r, const struct vhdx_range *s)
{
    return util_overlap(r->offset, r->length, s->offset, s->length);
}

static int vhdx_check_region(struct image *im, struct vhdx *v, const struct vhdx_region *e)
{
    uint64_t offset = le64_to_cpu(e->offset), length = le32_to_cpu(e->length);
    struct vhdx_range *r;
    char guid[37];

    vhdx_guid(e->guid, guid);
    r = strcmp(guid, VHDX_GUID_BAT) == 0 ? &v->bat : strcmp(guid, VHDX_GUID_METADATA) == 0 ? &v->metadata : NULL;
    if (!r)
        return le32_to_cpu(e->flags) & 1 ? vhdx_unknown(im, "region", guid) : 0;
    if (r->length)
        return fmt_refuse(im, "a region that is there twice", offset);
    if (!length || length % VHDX_MIB)
        return fmt_refuse(im, "the length of a region, in whole MiB", length);
    if (offset % VHDX_MIB || offset < VHDX_MIB || offset > (uint64_t)MAX_IMAGE_SIZE - length)
        return fmt_refuse(im, "the offset of a region, in whole MiB from 1 MiB on", offset);
    *r = (struct vhdx_range){ offset, length };
    return 0;
}

static int vhdx_read_regions(struct image *im, struct vhdx *v, union vhdx_table *t)
{
    bool good = false;
    uint32_t n;
    int ret = 0;

    for (uint64_t i = 0; i < 2 && !good; i++)
        good = vhdx_read_sealed(&im->files[0], VHDX_REGIONS_AT + i * VHDX_TABLE, t->bytes, VHDX_TABLE, "regi");
    if (!good)
        return msg_err(-EINVAL, "%s: damaged VHDX: neither of its region tables has a good checksum", im->name);
    n = le32_to_cpu(t->regions.n_entries);
    if (n > VHDX_MAX_ENTRIES)
        return fmt_refuse(im, "the number of regions, at most 2047", n);
    for (uint32_t i = 0; i < n && !ret; i++)
        ret = vhdx_check_region(im, v, &t->regions.entry[i]);
    if (ret)
        return ret;
    if (!v->bat.length || !v->metadata.length)
        return fmt_refuse(im, v->bat.length ? "no metadata region" : "no block table", n);
    if (vhdx_overlap(&v->bat, &v->metadata))
        return fmt_refuse(im, "regions that overlap", v->bat.offset);
    if (v->log.offset < (uint64_t)MAX_IMAGE_SIZE && v->log.length &&
        (vhdx_overlap(&v->log, &v->bat) || vhdx_overlap(&v->log, &v->metadata)))
        return fmt_refuse(im, "a region in the log", v->log.offset);
    return 0;
}

static int vhdx_check_item(struct image *im, struct vhdx *v, const struct vhdx_metadata_entry *e)
{
    uint64_t offset = le32_to_cpu(e->offset), length = le32_to_cpu(e->length);
    uint32_t flags = le32_to_cpu(e->flags);
    char guid[37];
    size_t i = 0;

    vhdx_guid(e->guid, guid);
    while (i < VHDX_ITEMS && (flags & VHDX_META_USER || strcmp(guid, vhdx_items[i].guid) != 0))
        i++;
    if (i == VHDX_ITEMS)
        return flags & VHDX_META_REQUIRED ? vhdx_unknown(im, "metadata item", guid) : 0;
    if (vhdx_items[i].use == VHDX_IGNORED)
        return 0;
    if (offset < VHDX_TABLE || offset > v->metadata.length || length > v->metadata.length - offset)
        return fmt_refuse(im, "the offset of a metadata item, outside of its region or in its table", offset);
    if (length < vhdx_items[i].min_length || v->item[i].length)
        return fmt_refuse(im, vhdx_items[i].what, length);
    v->item[i] = (struct vhdx_range){ v->metadata.offset + offset, length };
    return 0;
}

static int vhdx_read_metadata(struct image *im, struct vhdx *v, union vhdx_table *t)
{
    struct file *f = &im->files[0];
    uint64_t len = VHDX_TABLE;
    uint32_t n;
    int ret;

    if (v->metadata.offset > f->size || f->size - v->metadata.offset < VHDX_TABLE)
        return fmt_refuse(im, "the metadata lies past the end of the file", v->metadata.offset);
    ret = file_pread_front(f, t, sizeof(t->metadata.entry[0]), &len, v->metadata.offset);
    if (ret)
        return ret;
    n = le16_to_cpu(t->metadata.n_entries);
    if (memcmp(t->metadata.signature, "metadata", 8) != 0 || n > VHDX_MAX_ENTRIES)
        return fmt_refuse(im, "the metadata table: no signature, or more than 2047 entries", n);
    if ((const uint8_t *)&t->metadata.entry[n] > (const uint8_t *)t + len)
        return msg_err(-EIO, "%s: its metadata table cannot be read", im->name);
    for (uint32_t i = 0; i < n && !ret; i++)
        ret = vhdx_check_item(im, v, &t->metadata.entry[i]);
    for (size_t i = 0; i < VHDX_ITEMS && !ret; i++)
        if (vhdx_items[i].use == VHDX_NEEDED && !v->item[i].length)
            ret = msg_err(-EINVAL, "%s: damaged VHDX: lacks %s", im->name, vhdx_items[i].what);
    return ret;
}

/* Reads the first `len` bytes of an item, which has as many. */
static int vhdx_read_item(struct image *im, const struct vhdx *v, enum vhdx_item item, void *to, uint64_t len)
{
    return fmt_read(im, &im->files[0], v->item[item].offset, to, len, vhdx_items[item].what);
}

/* Entries that the block table must have. */
static uint64_t vhdx_bat_entries(const struct image *im, const struct vhdx *v)
{
    uint64_t blocks = (im->size + (1ull << v->block_bits) - 1) >> v->block_bits;

    if (blocks && v->has_parent)
        return (((blocks - 1) >> v->chunk_bits) + 1) * ((1ull << v->chunk_bits) + 1);
    return blocks ? blocks + ((blocks - 1) >> v->chunk_bits) : 0;
}

static int vhdx_read_items(struct image *im, struct vhdx *v)
{
    struct vhdx_parameters parameters;
    le64 size;
    le32 sector;
    uint64_t bat;
    int ret = vhdx_read_item(im, v, VHDX_PARAMETERS, &parameters, sizeof(parameters));

    if (!ret)
        ret = vhdx_read_item(im, v, VHDX_SIZE, &size, sizeof(size));
    if (!ret)
        ret = vhdx_read_item(im, v, VHDX_SECTOR, &sector, sizeof(sector));
    if (ret)
        return ret;
    v->has_parent = le32_to_cpu(parameters.flags) & VHDX_HAS_PARENT || v->item[VHDX_LOCATOR].length;
    im->cluster_size = le32_to_cpu(parameters.block_size);
    im->entry_size = 8;
    im->sector_size = le32_to_cpu(sector);
    im->size = le64_to_cpu(size);
    if (!util_is_power_of_2(im->cluster_size, VHDX_MIN_BLOCK, VHDX_MAX_BLOCK))
        return fmt_refuse(im, "the block size, a power of two from 1 MiB to 256 MiB", im->cluster_size);
    if (im->sector_size != 512 && im->sector_size != 4096)
        return fmt_refuse(im, "the sector size, 512 or 4096 bytes", im->sector_size);
    if (im->size > VHDX_MAX_SIZE || im->size % im->sector_size)
        return fmt_refuse(im, "the disk's size, in whole sectors and at most 64 TiB", im->size);
    v->block_bits = (uint32_t)__builtin_ctz(im->cluster_size);
    v->sector_bits = (uint32_t)__builtin_ctz(im->sector_size);
    v->chunk_bits = VHDX_CHUNK_BITS + v->sector_bits - v->block_bits;
    bat = vhdx_bat_entries(im, v) * 8;
    if (bat > v->bat.length)
        return fmt_refuse(im, "the block table is too small for the size", v->bat.length);
    if (v->bat.offset > im->files[0].size || bat > im->files[0].size - v->bat.offset)
        return fmt_refuse(im, "the block table lies past the end of the file", v->bat.offset);
    return 0;
}

/* -- parents -- */

/* The value of a key in a locator of `len` bytes, as text. False: it is not there, or lies outside of the locator. */
static bool vhdx_locator_text(const struct vhdx_locator *l, uint64_t len, const char *key, char *text, size_t size)
{
    const uint8_t *bytes = (const uint8_t *)l;
    char name[64];

    for (size_t i = 0; i < le16_to_cpu(l->n_entries) && sizeof(*l) + (i + 1) * sizeof(*l->entry) <= len; i++) {
        const struct vhdx_locator_entry *e = &l->entry[i];
        uint64_t key_offset = le32_to_cpu(e->key_offset), value_offset = le32_to_cpu(e->value_offset);
        size_t key_len = le16_to_cpu(e->key_length), value_len = le16_to_cpu(e->value_length);
        if (key_offset + key_len <= len && value_offset + value_len <= len && key_len == 2 * strlen(key) &&
            text_from_utf16(bytes + key_offset, key_len, false, name, sizeof(name)) && strcmp(name, key) == 0)
            return text_from_utf16(bytes + value_offset, value_len, false, text, size);
    }
    return false;
}

static int vhdx_read_parent(struct image *im, const struct vhdx *v, union vhdx_table *t)
{
    static const char *const paths[] = { "relative_path", "volume_path", "absolute_win32_path" };
    const struct vhdx_locator *l = &t->locator;
    uint64_t len = v->item[VHDX_LOCATOR].length;
    char text[3072], type[37];
    uint8_t uuid[16];
    int ret;

    if (!v->has_parent)
        return 0;
    if (!len || len > sizeof(*t))
        return fmt_refuse(im, "the length of the parent locator, 20 bytes to 64 KiB", len);
    ret = vhdx_read_item(im, v, VHDX_LOCATOR, t, len);
    if (ret)
        return ret;
    vhdx_guid(l->type, type);
    if (strcmp(type, VHDX_GUID_LOCATOR) != 0)
        return vhdx_unknown(im, "parent locator", type);
    ext_set_parent(im, "vhdx");
    if (vhdx_locator_text(l, len, "parent_linkage", text, sizeof(text)) && text_parse_guid(text, uuid))
        ext_set_id(&im->parent_id, ID_IMAGE, uuid);
    im->has_other_parent = vhdx_locator_text(l, len, "parent_linkage2", text, sizeof(text)) &&
                           text_parse_guid(text, im->other_parent) && !text_is_null_id(im->other_parent);
    for (size_t i = 0; i < ARRAY_LEN(paths) && !ret; i++)
        if (vhdx_locator_text(l, len, paths[i], text, sizeof(text)))
            ret = ext_add_hint(im, text);
    return ret;
}

static int vhdx_open(struct image *im)
{
    struct vhdx *v = im->state;
    union vhdx_table *t = util_fault("vhdx") ? NULL : malloc(sizeof(*t));
    int ret;

    if (!t)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = vhdx_read_headers(im);
    if (!ret && im->dirty)
        ret = vhdx_replay(im, v);
    if (!ret)
        ret = vhdx_read_regions(im, v, t);
    if (!ret)
        ret = vhdx_read_metadata(im, v, t);
    if (!ret)
        ret = vhdx_read_items(im, v);
    if (!ret)
        ret = vhdx_read_parent(im, v, t);
    free(t);
    return ret;
}

/* -- reading -- */

/* Why no block or bitmap can begin at `offset` of the file. NULL: it can, but its end may be cut off. */
static const char *vhdx_misplaced(const struct image *im, const struct vhdx *v, uint64_t offset, uint64_t length)
{
    const struct vhdx_range block = { offset, length };

    if (offset < VHDX_MIB)
        return "its block lies in the header";
    if (offset >= im->files[0].size)
        return "its data lies past the end of the file";
    if (vhdx_overlap(&v->bat, &block) || vhdx_overlap(&v->metadata, &block) ||
        (v->log.offset <= im->files[0].size && vhdx_overlap(&v->log, &block)))
        return "its block lies in the image's own tables";
    return NULL;
}

static void vhdx_map_data(struct image *im, const struct vhdx *v, uint64_t host, uint64_t in_block, uint64_t length,
                          struct extent *ext)
{
    const char *why = vhdx_misplaced(im, v, host, 1ull << v->block_bits);

    if (why)
        ext_bad(ext, length, why);
    else
        ext_data(ext, length, &im->files[0], host + in_block, im->files[0].size);
}

/* A block of which only those sectors are here whose bits in the chunk's sector bitmap are set. */
static void vhdx_map_partial(struct image *im, const struct vhdx *v, uint64_t block, uint64_t host, uint64_t in_block,
                             uint64_t length, struct extent *ext)
{
    uint64_t chunk = block >> v->chunk_bits, in_chunk = block & ((1ull << v->chunk_bits) - 1), entry, bitmap, first;
    uint64_t n = ((in_block + length - 1) >> v->sector_bits) - (in_block >> v->sector_bits) + 1;
    const char *why;
    bool here;

    if (cache_le64(&im->files[0], v->bat.offset + ((chunk + 1) * ((1ull << v->chunk_bits) + 1) - 1) * 8, &entry)) {
        ext_bad(ext, length, "the block table cannot be read");
        return;
    }
    bitmap = entry & -(uint64_t)VHDX_MIB;
    why = vhdx_misplaced(im, v, bitmap, VHDX_MIB);
    first = (in_chunk << (v->block_bits - v->sector_bits)) + (in_block >> v->sector_bits);
    if ((entry & (VHDX_MIB - 1)) != VHDX_PRESENT)
        why = "its sector bitmap is not there";
    else if (!why && im->files[0].size - bitmap < VHDX_MIB)
        why = "its sector bitmap lies past the end of the file";
    else if (!why && cache_bits(&im->files[0], bitmap, first, n, false, &here, &n))
        why = "its sector bitmap cannot be read";
    if (why) {
        ext_bad(ext, length, why);
        return;
    }
    length = util_min(length, (n << v->sector_bits) - (in_block & ((1ull << v->sector_bits) - 1)));
    if (here)
        vhdx_map_data(im, v, host, in_block, length, ext);
    else
        *ext = (struct extent){ .kind = EXT_BACKING, .length = length };
}

static void vhdx_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct vhdx *v = im->state;
    uint64_t block = offset >> v->block_bits, in_block = offset & ((1ull << v->block_bits) - 1), entry, host;
    uint32_t state;

    length = util_min(length, (1ull << v->block_bits) - in_block);
    if (cache_le64(&im->files[0], v->bat.offset + (block + (block >> v->chunk_bits)) * 8, &entry)) {
        ext_bad(ext, length, "the block table cannot be read");
        return;
    }
    state = entry & VHDX_ENTRY_STATE;
    host = entry & -(uint64_t)VHDX_MIB;
    if (entry & VHDX_ENTRY_RESERVED)
        ext_bad(ext, length, "its block table entry has reserved bits set");
    else if (state == VHDX_PRESENT)
        vhdx_map_data(im, v, host, in_block, length, ext);
    else if (state == VHDX_PARTIAL && v->has_parent)
        vhdx_map_partial(im, v, block, host, in_block, length, ext);
    else if (state == VHDX_ABSENT && v->has_parent)
        *ext = (struct extent){ .kind = EXT_BACKING, .length = length };
    else if (state <= VHDX_UNMAPPED || state == VHDX_UNMAPPED_095)
        *ext = (struct extent){ .kind = EXT_ZERO, .length = length };  /* also undefined: never the parent's data */
    else
        ext_bad(ext, length, "its block is in a state that does not exist");
}

static void vhdx_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct vhdx *v = by;
    uint64_t entry = util_le64(bytes), chunk = (1ull << v->chunk_bits) + 1, host = entry & -(uint64_t)VHDX_MIB;
    uint64_t start = (i - i / chunk) << v->block_bits, state = entry & VHDX_ENTRY_STATE;

    if (entry & VHDX_ENTRY_RESERVED || host > (uint64_t)MAX_IMAGE_SIZE)
        return;
    if (i % chunk == chunk - 1 && state == VHDX_PRESENT)
        c->claim(c, &im->files[0], host, VHDX_MIB, "a sector bitmap block", 0);
    else if (i % chunk != chunk - 1 && start < im->size && (state == VHDX_PRESENT || state == VHDX_PARTIAL))
        c->claim(c, &im->files[0], host, util_min(1ull << v->block_bits, im->size - start), NULL, start);
}

static bool vhdx_claims(struct image *im, struct claims *c)
{
    const struct vhdx *v = im->state;
    struct file *f = &im->files[0];

    c->claim(c, f, 0, VHDX_MIB, "the header", 0);
    if (v->log.offset >= VHDX_MIB && v->log.offset <= f->size)
        c->claim(c, f, v->log.offset, v->log.length, "the log", 0);
    c->claim(c, f, v->metadata.offset, v->metadata.length, "the metadata", 0);
    c->claim(c, f, v->bat.offset, v->bat.length, "the block table", 0);
    c->claim(c, f, v->flushed, 0, NULL, 0);
    ext_claim_table(c, im, v, f, v->bat.offset, vhdx_bat_entries(im, v), 8, vhdx_claim_entry);
    return true;
}

static void vhdx_info(struct image *im, struct out *out)
{
    const struct vhdx *v = im->state;
    char id[33];

    text_hex(im->id.value[ID_IMAGE], 16, id);
    out_text(out, "subformat", v->has_parent ? "differencing" : "fixed or dynamic");
    out_number(out, "sector-size", 1u << v->sector_bits);
    out_text(out, "data-write-id", id);
    if (im->dirty)
        out_number(out, "replayed-pages", im->files[0].n_patches);
}

/* QEMU knows no parents, and replays a log only in the file. */
static bool vhdx_as_qemu(struct image *im)
{
    return !((const struct vhdx *)im->state)->has_parent && !im->dirty;
}

/* -- lost headers -- */

static bool vhdx_remains(struct file *f)
{
    struct vhdx_header h;

    return vhdx_read_sealed(f, VHDX_HEADER_AT, (uint8_t *)&h, sizeof(h), "head") ||
           vhdx_read_sealed(f, VHDX_HEADER_AT + VHDX_TABLE, (uint8_t *)&h, sizeof(h), "head");
}

/* All that stands before the block table: the log too, which then has nothing to replay. */
static uint64_t vhdx_header_length(struct file *f)
{
    union vhdx_table *t = malloc(sizeof(*t));
    uint64_t length = 0;
    char guid[37];

    if (t && vhdx_read_sealed(f, VHDX_REGIONS_AT, t->bytes, VHDX_TABLE, "regi"))
        for (uint32_t i = 0; i < util_min(le32_to_cpu(t->regions.n_entries), VHDX_MAX_ENTRIES); i++) {
            vhdx_guid(t->regions.entry[i].guid, guid);
            if (strcmp(guid, VHDX_GUID_BAT) == 0)
                length = le64_to_cpu(t->regions.entry[i].offset);
        }
    free(t);
    return length;
}

static const struct image_format vhdx_format = {
    .name = "vhdx",
    .describe = "VHDX images of Hyper-V: fixed, dynamic, differencing; the log is replayed in memory",
    .writes = "overlay",
    .state_size = sizeof(struct vhdx),
    .opens_headless = true,
    .extensions = " vhdx avhdx ",
    .probe = vhdx_probe,
    .remains = vhdx_remains,
    .header_length = vhdx_header_length,
    .identify = vhdx_read_headers,
    .open = vhdx_open,
    .map = vhdx_map,
    .claims = vhdx_claims,
    .as_qemu = vhdx_as_qemu,
    .info = vhdx_info,
};

/* ******************************************************************************************************** *
 * 19. VMDK
 *
 * VMware "Virtual Disk Format 5.0"; COWD and seSparse: the documentation of libvmdk and QEMU. All numbers are
 * little-endian; offsets and sizes on disk are in sectors of 512 bytes.
 *
 *   descriptor  text: CID, parent, and one line for each extent of the disk, in order. A file of its own, or
 *               inside the sparse extent that is the whole disk: then its line means this file, whatever it is called
 *   flat        bytes of a file from some sector on
 *   hosted      "KDMV": header | descriptor | redundant grain directory, its tables | grain directory, its
 *               tables | grains. streamOptimized: compressed grains, each behind a marker with its sector of the disk
 *               and its length; then tables, directory, and a footer: the header again, with the directory's offset
 *   COWD        header | grain directory | tables of 4096 entries and grains, as they were allocated
 *   seSparse    header | volatile header | ... | grain directory | tables | ... | grains; entries of 8 bytes
 *
 *   grain directory entry -> grain table; grain table entry -> grain; 0: as the parent, or zeros if there is none
 *
 * An extent with two grain directories has every table twice, and writers keep both equal. Both are read: what one
 * lost comes from the other. Where the two entries of a grain differ,
 *   - an invalid one loses;
 *   - after a crash (unclean) the one that has data wins: the other one was not written yet;
 *   - one in a sector of zeros loses: copies of dying disks have zeros for what was unreadable;
 *   - otherwise the grain is an error.
 * Example: a bad sector of the host's disk destroyed 128 entries of a table. QEMU reads the first directory only, and
 * shows 8 MiB of zeros if the table was one of that; the table of the redundant directory has the data.
 * ******************************************************************************************************** */

struct vmdk_header {                /* of a hosted extent; a footer has the same shape */
    le32 magic;                     /* 0x00 "KDMV" */
    le32 version;                   /* 0x04 1 to 3 */
    le32 flags;                     /* 0x08 VMDK_FLAG_... */
    le64 capacity;                  /* 0x0c */
    le64 grain;                     /* 0x14 */
    le64 descriptor;                /* 0x1c offset; 0: none */
    le64 descriptor_size;           /* 0x24 */
    le32 table_entries;             /* 0x2c */
    le64 redundant;                 /* 0x30 offset of the redundant grain directory; 0: none */
    le64 directory;                 /* 0x38 offset of the grain directory; VMDK_AT_END: the footer has it */
    le64 overhead;                  /* 0x40 */
    uint8_t unclean;                /* 0x48 */
    uint8_t newlines[4];            /* 0x49 "\n \r\n", see vmdk_check_newlines() */
    le16 algorithm;                 /* 0x4d of compression: 1 is zlib */
    uint8_t reserved[433];          /* 0x4f */
};
_Static_assert(sizeof(struct vmdk_header) == 512, "VMDK header of a hosted extent");

struct vmdk_marker {                /* before each part of a stream */
    le64 value;                     /* 0x00 of a grain: its sector of the disk; else the part's size */
    le32 size;                      /* 0x08 of a grain: bytes of compressed data, which begin at 0x0c; else 0 */
    le32 type;                      /* 0x0c VMDK_MARKER_FOOTER, ... */
    uint8_t reserved[496];          /* 0x10 */
};
_Static_assert(sizeof(struct vmdk_marker) == 512, "VMDK marker");

struct vmdk_cowd_header {
    le32 magic;                     /* 0x000 "COWD" */
    le32 version;                   /* 0x004 1 */
    le32 flags;                     /* 0x008 */
    le32 capacity;                  /* 0x00c */
    le32 grain;                     /* 0x010 */
    le32 directory;                 /* 0x014 offset */
    le32 directory_entries;         /* 0x018 */
    le32 next_free;                 /* 0x01c offset */
    char parent[1024];              /* 0x020 its name; of a whole disk: cylinders, heads, sectors in 4 bytes each */
    uint8_t unused[592];            /* 0x420 generations, name, description */
    le32 unclean;                   /* 0x670 */
    uint8_t padding[396];           /* 0x674 */
};
_Static_assert(sizeof(struct vmdk_cowd_header) == 2048, "VMDK COWD header");

struct vmdk_se_header {
    le64 magic;                     /* 0x00 VMDK_SE_MAGIC */
    le64 version;                   /* 0x08 VMDK_SE_VERSION */
    le64 capacity;                  /* 0x10 */
    le64 grain;                     /* 0x18 */
    le64 table_size;                /* 0x20 */
    le64 flags;                     /* 0x28 features, none of which is known */
    le64 reserved[4];               /* 0x30 */
    le64 volatile_header[2];        /* 0x50 offset, size; so have all of these: */
    le64 journal_header[2];         /* 0x60 */
    le64 journal[2];                /* 0x70 */
    le64 directory[2];              /* 0x80 */
    le64 tables[2];                 /* 0x90 */
    le64 free_bitmap[2];            /* 0xa0 */
    le64 back_map[2];               /* 0xb0 */
    le64 grains[2];                 /* 0xc0 */
    uint8_t padding[304];           /* 0xd0 */
};
_Static_assert(sizeof(struct vmdk_se_header) == 512, "VMDK seSparse header");

struct vmdk_se_volatile {
    le64 magic;                     /* 0x00 VMDK_SE_VOLATILE_MAGIC */
    le64 free_table;                /* 0x08 */
    le64 next_transaction;          /* 0x10 */
    uint8_t replay;                 /* 0x18 not 0: the journal has what the tables lack */
    uint8_t padding[487];           /* 0x19 */
};
_Static_assert(sizeof(struct vmdk_se_volatile) == 512, "VMDK seSparse volatile header");

enum {
    VMDK_SECTOR = 512,
    VMDK_MAX_TEXT = 1 << 20,        /* bytes of a descriptor: MAX_PARTS lines need less */
    VMDK_MAX_GRAIN = 1 << 17,       /* sectors: 64 MiB; 128 is usual */
    VMDK_MAX_ROUNDING = 1 << 16,    /* bytes: a flat file that exceeds its extent by less was just rounded up */
    VMDK_MAX_FOOTER_BACK = 128,     /* sectors at the end in which the footer is looked for */

    VMDK_HOSTED_MAGIC = 0x564d444b, /* "KDMV" */
    VMDK_HOSTED_MIN_GRAIN = 8,      /* sectors */
    VMDK_HOSTED_ENTRIES = 512,      /* of a grain table, at most */
    VMDK_MAX_ENTRIES = 4096,        /* of a table of COWD and seSparse, always */
    VMDK_USUAL_GRAIN_BITS = 16,
    VMDK_USUAL_GRAIN = 128,         /* sectors */
    VMDK_FLAG_NEWLINES = 1, VMDK_FLAG_REDUNDANT = 2, VMDK_FLAG_ZERO_GRAINS = 4, VMDK_FLAG_COMPRESSED = 1 << 16,
    VMDK_FLAG_MARKERS = 1 << 17,
    VMDK_MARKER_HEAD = 12,          /* bytes before a grain's compressed data */
    VMDK_MARKER_END = 0, VMDK_MARKER_TABLE = 1, VMDK_MARKER_FOOTER = 3,

    VMDK_COWD_MAGIC = 0x44574f43,   /* "COWD" */

    VMDK_SE_GRAIN = 8,              /* sectors: nothing else was ever written */
    VMDK_SE_TABLE = 64,             /* sectors of a grain table */
};
#define VMDK_SE_MAGIC 0xcafebabeu
#define VMDK_SE_VOLATILE_MAGIC 0xcafecafeu
#define VMDK_SE_VERSION 0x0000000200000001u
#define VMDK_MAX_SECTORS ((uint64_t)MAX_IMAGE_SIZE / VMDK_SECTOR)
#define VMDK_NO_PARENT 0xffffffffu
#define VMDK_NEW_CID 0xfffffffeu    /* of every disk that was never written, and of all that some programs make */
#define VMDK_LINE_ENDS "\r\n"       /* of a descriptor: either, or both */
#define VMDK_AT_END UINT64_MAX      /* offset of the grain directory: the footer has it */

enum vmdk_kind { VMDK_BAD, VMDK_ZERO, VMDK_FLAT, VMDK_HOSTED, VMDK_COWD, VMDK_SESPARSE };

struct vmdk_extent {
    enum vmdk_kind kind;
    bool no_access, zero_grains, compressed, markers, unclean;
    bool exact;                     /* QEMU, for which letter case counts, recognizes the line, too */
    uint64_t start, size;           /* bytes: in the disk */
    struct file *file;
    const char *why;                /* VMDK_BAD */
    const char *type, *name;        /* of its line, in the descriptor's text; "" and NULL: it has none */
    uint64_t offset;                /* VMDK_FLAT: bytes, in file */
    /* sparse: */
    uint64_t capacity;              /* bytes: by its header; its last grain may reach past `size` */
    uint32_t grain_bits, table_bits, entry_size;    /* log2 of a grain's bytes, of a table's entries; 4 or 8 */
    uint32_t last_length;           /* compressed: what the last grain decodes to */
    uint64_t directory[2];          /* offsets in file of the one or two grain directories; 0: none */
    uint64_t header_sectors;        /* header and descriptor: no directory lies before their end */
    uint64_t first_grain;           /* offset in file: no data lies before */
    uint64_t tables, grains;        /* seSparse: offsets in file, entries count from here */
};

struct vmdk {
    struct vmdk_extent *extents;
    unsigned n_extents;
    uint32_t cid, parent_cid;
    bool no_cid;                    /* its own is missing or damaged */
    bool odd_parent_cid;            /* damaged: means none, if there is no other sign of a parent */
    char *text;                     /* the descriptor, cut into lines; NULL: none */
    bool embedded;                  /* in the extent that is the whole disk */
    const char *create_type, *hint, *encoding;      /* in text, or "" */
    struct identity id, parent_id;  /* VirtualBox's UUIDs, from the disk data base */
    bool odd_parent_uuid;           /* there is one, but it cannot be read */
    bool unlike_qemu;               /* QEMU reads the text differently: lines end at \n, keys count in comments, too */
};

/* -- the descriptor -- */

static bool vmdk_starts(const char *line, const char *word)
{
    return strncasecmp(line, word, strlen(word)) == 0;
}

/* The length of a byte order mark in UTF-8, which some editors write; 0: there is none. */
static size_t vmdk_bom(const char *text)
{
    return strncmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

/* Text that begins like a descriptor: the usual comment, or a version and, soon, a CID. */
static bool vmdk_is_descriptor(const void *bytes, size_t len)
{
    char head[1024];
    const char *p = head;

    len = util_min(len, sizeof(head) - 1);
    memcpy(head, bytes, len);
    head[len] = 0;
    for (p += vmdk_bom(head); p; p = strpbrk(p, VMDK_LINE_ENDS)) {
        p += strspn(p, " \t" VMDK_LINE_ENDS);
        if (*p != '#')
            return vmdk_starts(p, "version") && p[7 + strspn(p + 7, " \t")] == '=' && strcasestr(p, "CID");
        if (vmdk_starts(p + 1 + strspn(p + 1, " \t"), "Disk DescriptorFile"))
            return true;
    }
    return false;
}

static int vmdk_bad_line(const struct image *im, const char *what, const char *line)
{
    return msg_err(-EINVAL, "%s: damaged or hostile VMDK descriptor: %s: '%.200s'", im->name, what, line);
}

/* Returns the word at *p, terminated; *p moves to the next one. */
static char *vmdk_word(char **p)
{
    char *word = *p;

    *p += strcspn(*p, " \t");
    if (**p)
        *(*p)++ = 0;
    *p += strspn(*p, " \t");
    return word;
}

/* Reads a word that is a number of sectors. */
static bool vmdk_sectors(char **p, uint64_t *bytes)
{
    if (!util_parse_sectors(vmdk_word(p), bytes))
        return false;
    *bytes *= VMDK_SECTOR;
    return true;
}

/* A name in quotes; NULL: there is none. */
static char *vmdk_quoted(char **p)
{
    char *name = *p + 1, *end = **p == '"' ? strchr(name, '"') : NULL;

    if (!end)
        return NULL;
    *end++ = 0;
    *p = end + strspn(end, " \t");
    return name;
}

static bool vmdk_is_extent_line(const char *line)
{
    static const char *const access[] = { "RW", "RDONLY", "NOACCESS" };

    for (size_t i = 0; i < ARRAY_LEN(access); i++)
        if (vmdk_starts(line, access[i]) && strchr(" \t", line[strlen(access[i])]))
            return true;            /* strchr finds the end of the string too */
    return false;
}

static const struct vmdk_type {
    const char *word;
    enum vmdk_kind kind;            /* of the sparse ones the file's own magic decides */
} vmdk_types[] = {
    { "FLAT", VMDK_FLAT }, { "VMFS", VMDK_FLAT }, { "ZERO", VMDK_ZERO }, { "SPARSE", VMDK_HOSTED },
    { "VMFSSPARSE", VMDK_COWD }, { "SESPARSE", VMDK_SESPARSE }, { "VMFSRDM", VMDK_BAD }, { "VMFSRAW", VMDK_BAD },
    { "VMFSPASSTHROUGHRDM", VMDK_BAD }, { "VMFSPASSTHROUGHRAW", VMDK_BAD },
};

static int vmdk_set_type(const struct image *im, struct vmdk_extent *e, const char *access, const char *line)
{
    const struct vmdk_type *type = vmdk_types, *end = vmdk_types + ARRAY_LEN(vmdk_types);

    while (type < end && strcasecmp(e->type, type->word) != 0)
        type++;
    if (!*e->type)
        return vmdk_bad_line(im, "the type of an extent", line);
    if (type == end)
        return msg_err(-EOPNOTSUPP, "%s: the type of an extent, %.40s, is not supported", im->name, e->type);
    if (type->kind == VMDK_BAD)
        return msg_err(-EOPNOTSUPP, "%s: an extent of type %s: its data are on a device, not in the image, "
                       "which is not supported", im->name, e->type);
    e->kind = type->kind;
    e->exact = strcmp(access, "RW") == 0 && strcmp(e->type, type->word) == 0;
    e->no_access = vmdk_starts(access, "NOACCESS");
    return 0;
}

/* ACCESS SECTORS TYPE ["FILE" [SECTOR [...]]] */
static int vmdk_parse_extent(struct image *im, struct vmdk *v, char *line)
{
    struct vmdk_extent *e = &v->extents[v->n_extents];
    char shown[201], *p = line;
    const char *access;
    int ret;

    util_copy(shown, sizeof(shown), line);
    if (v->n_extents == MAX_PARTS)
        return msg_err(-E2BIG, "%s: more than %d extents", im->name, MAX_PARTS);
    access = vmdk_word(&p);
    if (!vmdk_sectors(&p, &e->size) || !e->size)
        return vmdk_bad_line(im, "the size of an extent", shown);
    e->type = vmdk_word(&p);
    ret = vmdk_set_type(im, e, access, shown);
    if (ret)
        return ret;
    e->name = vmdk_quoted(&p);
    if (e->kind == VMDK_HOSTED && v->embedded && (e->name ? !*e->name : !*p))
        e->name = "";               /* as FreeBSD's mkimg writes it: the file itself, see vmdk_find_self() */
    else if (e->kind == VMDK_ZERO ? !!*p : !e->name || !*e->name)
        return vmdk_bad_line(im, "the file of an extent", shown);
    if (*p && (e->kind == VMDK_FLAT || strcmp(p, "0") == 0)) {
        if (!vmdk_sectors(&p, &e->offset))
            return vmdk_bad_line(im, "the offset of an extent in its file", shown);
    } else if (*p || strcasecmp(e->type, "FLAT") == 0) {
        return vmdk_bad_line(im, "a malformed extent", shown);
    }
    v->n_extents++;
    return 0;
}

static bool vmdk_cid(const char *value, uint32_t *cid)
{
    size_t len = strspn(value, "0123456789abcdefABCDEF");

    *cid = (uint32_t)strtoul(value, NULL, 16);
    return len && len <= 8 && !value[len];
}

/*
 * "ffffffff" with one wrong character still means no parent, unless a parent is named: see vmdk_set_parent(). But
 * "fffffffe" is a valid CID.
 */
static int vmdk_set_parent_cid(struct image *im, struct vmdk *v, const char *value)
{
    bool valid = vmdk_cid(value, &v->parent_cid);
    unsigned wrong = 0;

    for (const char *p = value; *p; p++)
        wrong += *p != 'f' && *p != 'F';
    v->odd_parent_cid = strlen(value) == 8 && wrong == 1 && !(valid && v->parent_cid == VMDK_NEW_CID);
    if (v->odd_parent_cid)
        msg_say(MSG_NOTE, "%s: its parent's CID is damaged, or very odd: '%s'", im->name, value);
    return valid || v->odd_parent_cid ? 0 : vmdk_bad_line(im, "parentCID", value);
}

/* A null UUID means none, and so does one with one wrong character. Returns whether the value is valid. */
static bool vmdk_set_uuid(struct identity *id, enum identity_kind kind, const char *value)
{
    uint8_t uuid[16];
    unsigned wrong = 0;

    for (const char *p = value; *p; p++)
        wrong += !strchr("0-{}", *p);
    if (wrong <= 1)
        return true;
    if (!text_parse_guid(value, uuid))
        return false;
    ext_set_id(id, kind, uuid);
    return true;
}

/* VirtualBox names the parent by its UUID alone: its parentCID is ffffffff, and there is no hint. */
static int vmdk_set_key(struct image *im, struct vmdk *v, const char *name, const char *value)
{
    const struct { const char *name, **text; } texts[] = {
        { "createType", &v->create_type }, { "encoding", &v->encoding }, { "parentFileNameHint", &v->hint },
    };
    const struct { const char *name; struct identity *id; enum identity_kind kind; } uuids[] = {
        { "ddb.uuid.image", &v->id, ID_IMAGE }, { "ddb.uuid.modification", &v->id, ID_STATE },
        { "ddb.uuid.parent", &v->parent_id, ID_IMAGE }, { "ddb.uuid.parentmodification", &v->parent_id, ID_STATE },
    };

    for (size_t i = 0; i < ARRAY_LEN(texts); i++)
        if (strcasecmp(name, texts[i].name) == 0)
            *texts[i].text = value;
    for (size_t i = 0; i < ARRAY_LEN(uuids); i++)
        if (strcasecmp(name, uuids[i].name) == 0 && !vmdk_set_uuid(uuids[i].id, uuids[i].kind, value))
            v->odd_parent_uuid |= uuids[i].id == &v->parent_id && uuids[i].kind == ID_IMAGE;
    if (strcasecmp(name, "parentCID") == 0)
        return vmdk_set_parent_cid(im, v, value);
    if (strcasecmp(name, "CID") == 0) {     /* for its children alone: a damaged one fits none of them */
        v->no_cid = !vmdk_cid(value, &v->cid);
        if (v->no_cid)
            msg_say(MSG_NOTE, "%s: its CID is damaged: '%.20s' (no child of it can be checked)", im->name, value);
    }
    if (strcasecmp(name, "version") == 0 && isdigit((unsigned char)*value) &&
        (*value < '1' || *value > '4' || value[1]))
        return msg_err(-EOPNOTSUPP, "%s: a VMDK descriptor of unknown version '%.20s', which is not supported; 1 to 4 "
                       "are", im->name, value);
    return 0;
}

/* May a malformed line be a damaged extent, or name a parent? */
static bool vmdk_line_matters(const char *line)
{
    if (strchr(line, '"') || strcasestr(line, "CID") || strcasestr(line, "parent") || strcasestr(line, "encrypt"))
        return true;
    for (size_t i = 0; i < ARRAY_LEN(vmdk_types); i++)
        if (strcasestr(line, vmdk_types[i].word))
            return true;
    return false;
}

/* NAME = VALUE, perhaps in quotes. in_ddb: in the disk data base (virtual hardware): malformed lines are ignored. */
static int vmdk_parse_key(struct image *im, struct vmdk *v, char *line, bool in_ddb)
{
    char *value = strchr(line, '='), *name;
    size_t len;

    if (value)
        *value++ = 0;
    name = text_trim(line);
    if (!value || name[strcspn(name, " \t\"")]) {
        if (!in_ddb && (vmdk_line_matters(line) || (value && vmdk_line_matters(value))))
            return vmdk_bad_line(im, "neither an extent nor a value", line);
        if (!in_ddb)
            msg_say(MSG_NOTE, "%s: a line of its descriptor says nothing known: '%.100s'", im->name, line);
        return 0;
    }
    value = text_trim(value);
    len = strlen(value);
    if (len >= 2 && value[0] == '"' && value[len - 1] == '"') {
        value[len - 1] = 0;
        value++;
    }
    if (vmdk_starts(name, "encryption"))
        return fmt_encrypted(im, name, "VMware");
    return vmdk_set_key(im, v, name, value);
}

static int vmdk_parse(struct image *im, struct vmdk *v)
{
    size_t lines = 1;
    bool in_ddb = false;
    char *next;
    int ret = 0;

    for (const char *p = v->text; (p = strpbrk(p, VMDK_LINE_ENDS)) && lines <= MAX_PARTS; p++)
        lines++;
    v->extents = util_fault("extents") ? NULL : calloc(lines, sizeof(*v->extents));
    if (!v->extents)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    for (char *line = v->text + vmdk_bom(v->text); line && !ret; line = next) {
        next = strpbrk(line, VMDK_LINE_ENDS);
        v->unlike_qemu |= next && next[0] == '\r' && next[1] != '\n';
        if (next)
            *next++ = 0;
        line = text_trim(line);
        v->unlike_qemu |= !!strcasestr(line, "parentFileNameHint");
        if (vmdk_starts(line, "#DDB") || vmdk_starts(line, "# The Disk Data Base"))
            in_ddb = true;
        if (*line && *line != '#')
            ret = vmdk_is_extent_line(line) ? vmdk_parse_extent(im, v, line) : vmdk_parse_key(im, v, line, in_ddb);
    }
    if (!ret && !v->n_extents)
        ret = msg_err(-EINVAL, "%s: a VMDK descriptor without extents", im->name);
    return ret;
}

static void vmdk_set_cid_id(struct identity *id, uint32_t cid)
{
    uint32_t be = htobe32(cid);

    id->known[ID_CID] = true;
    memcpy(id->value[ID_CID], &be, sizeof(be));
}

static void vmdk_set_id(struct image *im, const struct vmdk *v)
{
    im->id = v->id;
    if (!v->no_cid)
        vmdk_set_cid_id(&im->id, v->cid);
}

static int vmdk_set_parent(struct image *im, const struct vmdk *v)
{
    bool cid = v->parent_cid != VMDK_NO_PARENT && v->parent_cid && !v->odd_parent_cid,
         uuid = v->parent_id.known[ID_IMAGE];
    char name[2048];
    int ret;

    vmdk_set_id(im, v);
    if (!cid && !uuid && !v->odd_parent_uuid && !*v->hint)
        return 0;
    ext_set_parent(im, "vmdk");
    if (uuid)
        im->parent_id = v->parent_id;
    if (cid || (*v->hint && !uuid))
        vmdk_set_cid_id(&im->parent_id, v->parent_cid);
    im->common_parent_id = !uuid && v->parent_cid == VMDK_NEW_CID;
    ret = text_to_utf8(v->encoding, v->hint, name, sizeof(name)) ? ext_add_hint(im, name) : 0;
    if (!ret)
        ret = ext_add_hint(im, v->hint);        /* it may have been copied byte by byte */
    return ret || !uuid ? ret : ext_add_uuid_hint(im, "vmdk");
}

/* -- sparse extents -- */

static int vmdk_bad(const struct image *im, const struct vmdk_extent *e, const char *what, uint64_t value)
{
    return fmt_refuse_in(im, e->file->path, what, value);   /* NOLINT(clang-analyzer-core.NullDereference) */
}

static int vmdk_read(const struct image *im, const struct vmdk_extent *e, uint64_t offset, void *buf, uint64_t len,
                     const char *what)
{
    return fmt_read(im, e->file, offset, buf, len, what);
}

static uint64_t vmdk_table_size(const struct vmdk_extent *e)
{
    return (uint64_t)e->entry_size << e->table_bits;
}

/* Entries that the grain directory must have, and the sectors that they fill. */
static uint64_t vmdk_directory_entries(const struct vmdk_extent *e)
{
    return ((e->capacity - 1) >> (e->grain_bits + e->table_bits)) + 1;
}

static uint64_t vmdk_directory_sectors(const struct vmdk_extent *e)
{
    return (vmdk_directory_entries(e) * e->entry_size + VMDK_SECTOR - 1) / VMDK_SECTOR;
}

/* Sets what all sparse headers have: the sectors of the extent and of a grain, the entries of a table. */
static int vmdk_set_geometry(const struct image *im, struct vmdk_extent *e, uint64_t capacity, uint64_t grain,
                             uint64_t entries)
{
    if (!capacity || capacity > VMDK_MAX_SECTORS)
        return vmdk_bad(im, e, "the capacity in sectors is 0, or more than 8 EiB", capacity);
    if (!util_is_power_of_2(grain, e->kind == VMDK_HOSTED ? VMDK_HOSTED_MIN_GRAIN : 1, VMDK_MAX_GRAIN))
        return vmdk_bad(im, e, "the grain size in sectors is not 1 (hosted: 8) to 131072, a power of two", grain);
    if (!util_is_power_of_2(entries, 1, e->kind == VMDK_HOSTED ? VMDK_HOSTED_ENTRIES : VMDK_MAX_ENTRIES))
        return vmdk_bad(im, e, "the size of a grain table in entries is not 1 to 512, a power of two", entries);
    e->capacity = capacity * VMDK_SECTOR;
    e->grain_bits = (uint32_t)__builtin_ctzll(grain * VMDK_SECTOR);
    e->table_bits = (uint32_t)__builtin_ctzll(entries);
    e->entry_size = e->kind == VMDK_SESPARSE ? 8 : 4;
    return 0;
}

/* The offset in bytes of a directory at this sector, if it lies inside the file behind the header; else 0. */
static uint64_t vmdk_directory_at(const struct vmdk_extent *e, uint64_t sector)
{
    uint64_t size = e->file->size;

    if (sector < e->header_sectors || sector > size / VMDK_SECTOR ||
        vmdk_directory_entries(e) > (size - sector * VMDK_SECTOR) / e->entry_size)
        return 0;
    return sector * VMDK_SECTOR;
}

/*
 * Programs that write two directories put all the tables of each in a row right behind it. A row that is too short or
 * too long for the capacity reveals a damaged capacity, grain size or table size. VMDK_NO_ROW: another layout.
 */
enum vmdk_row { VMDK_NO_ROW, VMDK_ROW, VMDK_ROW_TOO_SHORT, VMDK_ROW_TOO_LONG };

static enum vmdk_row vmdk_look_at_row(const struct vmdk_extent *e, unsigned which)
{
    uint64_t directory = e->directory[which], n = vmdk_directory_entries(e), end,
             table = (vmdk_table_size(e) + VMDK_SECTOR - 1) / VMDK_SECTOR, start = directory / VMDK_SECTOR,
             after = start + vmdk_directory_sectors(e), other = e->directory[1 - which] / VMDK_SECTOR;
    uint32_t first, last, next = 0;

    if (cache_le32(e->file, directory, &first) || cache_le32(e->file, directory + (n - 1) * 4, &last) ||
        (n * 4 % VMDK_SECTOR && cache_le32(e->file, directory + n * 4, &next)))
        return VMDK_NO_ROW;
    if (first > start && first < after)
        return VMDK_ROW_TOO_SHORT;  /* the tables begin inside the directory */
    if (first == after && !last)
        return VMDK_ROW_TOO_SHORT;
    end = after + n * table;
    if (first != after || last != end - table)
        return VMDK_NO_ROW;
    if (next != end)
        return VMDK_ROW;
    /* The row has one more table, unless the other directory lies there: then the entry is padding. */
    return other > start && other >= end && other < end + table ? VMDK_ROW : VMDK_ROW_TOO_LONG;
}

/* Does the descriptor confirm the geometry? It has the capacity; nearly all tables have 512 grains of 64 KiB. */
static bool vmdk_is_confirmed(const struct vmdk_extent *e)
{
    return e->size && e->size <= e->capacity && e->capacity - e->size < 1ull << e->grain_bits &&
           e->grain_bits == VMDK_USUAL_GRAIN_BITS && 1 << e->table_bits == VMDK_HOSTED_ENTRIES;
}

/* Drops the directory whose row of tables does not fit the capacity. If neither fits, the capacity is damaged. */
static int vmdk_check_rows(const struct image *im, struct vmdk_extent *e)
{
    enum vmdk_row row[2] = { vmdk_look_at_row(e, 0), vmdk_look_at_row(e, 1) };
    bool padded = row[0] == VMDK_ROW || row[1] == VMDK_ROW || vmdk_is_confirmed(e);

    for (unsigned i = 0; i < 2; i++)        /* entries past the needed tables are padding */
        if (padded && row[i] == VMDK_ROW_TOO_LONG)
            row[i] = VMDK_ROW;
    if (row[0] >= VMDK_ROW_TOO_SHORT && row[1] >= VMDK_ROW_TOO_SHORT)
        return vmdk_bad(im, e, row[0] == VMDK_ROW_TOO_LONG ? "the grain directory is for more than the capacity"
                                                           : "the grain directory is too small for the capacity",
                        e->capacity / VMDK_SECTOR);
    if (row[0] != row[1] && (row[0] == VMDK_ROW || row[1] == VMDK_ROW))
        e->directory[row[0] == VMDK_ROW] = 0;
    return 0;
}

/* Sets the directories from two sectors, of which one may be missing or damaged. */
static int vmdk_set_directories(const struct image *im, struct vmdk_extent *e, uint64_t primary, uint64_t redundant,
                                bool use_redundant)
{
    uint64_t *d = e->directory;
    int ret = 0;

    d[0] = vmdk_directory_at(e, primary);
    if ((!d[0] || use_redundant) && redundant != primary)
        d[1] = vmdk_directory_at(e, redundant);
    if (!d[0] && !d[1])
        return vmdk_bad(im, e, "the grain directory is not inside the file, or too small for the capacity", primary);
    if (d[0] && d[1] && !e->compressed)
        ret = vmdk_check_rows(im, e);
    if (!ret && (!d[0] || (use_redundant && redundant && !d[1])))
        msg_say(MSG_NOTE, "%s: one of its two grain directories is damaged; the other one is used", e->file->path);
    return ret;
}

/* Refuses a file whose newlines were converted in transfer: so were those in its data. */
static int vmdk_check_newlines(const struct vmdk_extent *e, const struct vmdk_header *h)
{
    const uint8_t *nl = h->newlines;

    if ((le32_to_cpu(h->flags) & VMDK_FLAG_NEWLINES) &&
        (memcmp(nl, "\r\n \r", 4) == 0 || memcmp(nl, "\n \n", 3) == 0 || memcmp(nl, "\r \r\r", 4) == 0))
        return msg_err(-EINVAL, "%s: was transferred as text, which changed its newlines and with them its data",
                       e->file->path);
    return 0;
}

/* Replaces the header by the footer: ... | footer marker | footer | end-of-stream marker, all one sector. */
static int vmdk_find_footer(const struct image *im, struct vmdk_extent *e, struct vmdk_header *h)
{
    struct { struct vmdk_marker marker; struct vmdk_header footer; } s;
    uint64_t end = e->file->size / VMDK_SECTOR;
    int ret;

    for (uint64_t back = 2; back < VMDK_MAX_FOOTER_BACK && back + 2 <= end; back++) {
        ret = vmdk_read(im, e, (end - back - 1) * VMDK_SECTOR, &s, sizeof(s), "the footer");
        if (ret)
            return ret;
        if (le32_to_cpu(s.footer.magic) != VMDK_HOSTED_MAGIC || le32_to_cpu(s.marker.size) != 0 ||
            le32_to_cpu(s.marker.type) != VMDK_MARKER_FOOTER)
            continue;
        if (le64_to_cpu(s.footer.capacity) != le64_to_cpu(h->capacity) ||
            le64_to_cpu(s.footer.grain) != le64_to_cpu(h->grain) ||
            le32_to_cpu(s.footer.table_entries) != le32_to_cpu(h->table_entries))
            return vmdk_bad(im, e, "the footer says something else than the header", le64_to_cpu(s.footer.capacity));
        *h = s.footer;
        return 0;
    }
    return msg_err(-EINVAL, "%s: truncated VMDK: the footer, which says where its tables are, is not at the end",
                   e->file->path);
}

static int vmdk_open_hosted(struct image *im, struct vmdk_extent *e)
{
    struct vmdk_header h;
    uint64_t sectors;
    uint32_t flags, version, algorithm;
    int ret = vmdk_read(im, e, 0, &h, sizeof(h), "the header");

    if (!ret)
        ret = vmdk_check_newlines(e, &h);
    if (!ret && le64_to_cpu(h.directory) == VMDK_AT_END)
        ret = vmdk_find_footer(im, e, &h);
    if (ret)
        return ret;
    version = le32_to_cpu(h.version);
    if (version < 1 || version > 3)
        return fmt_unsupported_in(im, e->file->path, "the version, not 1 to 3", version);
    ret = vmdk_set_geometry(im, e, le64_to_cpu(h.capacity), le64_to_cpu(h.grain), le32_to_cpu(h.table_entries));
    if (ret)
        return ret;
    flags = le32_to_cpu(h.flags);
    e->zero_grains = flags & VMDK_FLAG_ZERO_GRAINS;
    e->compressed = flags & VMDK_FLAG_COMPRESSED;
    e->markers = flags & VMDK_FLAG_MARKERS;
    algorithm = le16_to_cpu(h.algorithm);
    if (algorithm != (e->compressed ? 1 : 0))
        return fmt_unsupported_in(im, e->file->path, "the compression algorithm, not 1 (zlib), or 0 if uncompressed",
                                  algorithm);
    if (e->compressed && 1u << e->grain_bits > MAX_CLUSTER)
        return vmdk_bad(im, e, "the size of compressed grains is more than 2 MiB", 1u << e->grain_bits);
    e->unclean = h.unclean;
    im->dirty |= e->unclean;
    sectors = le64_to_cpu(h.descriptor_size);
    e->header_sectors = le64_to_cpu(h.descriptor) == 1 && sectors < VMDK_MAX_TEXT / VMDK_SECTOR ? 1 + sectors : 1;
    e->first_grain = e->header_sectors * VMDK_SECTOR;
    return vmdk_set_directories(im, e, le64_to_cpu(h.directory), le64_to_cpu(h.redundant), flags & VMDK_FLAG_REDUNDANT);
}

/* The header of a snapshot has the parent's name where others have numbers, which do not begin with 4 characters. */
static int vmdk_cowd_parent(struct image *im, const struct vmdk_cowd_header *h)
{
    size_t len = strnlen(h->parent, sizeof(h->parent));

    if (*im->backing_name || len < 4 || len == sizeof(h->parent))
        return 0;
    for (size_t i = 0; i < len; i++)
        if ((uint8_t)h->parent[i] < ' ')
            return 0;
    ext_set_parent(im, "vmdk");
    return ext_add_hint(im, h->parent);
}

static int vmdk_open_cowd(struct image *im, struct vmdk_extent *e)
{
    struct vmdk_cowd_header h;
    uint32_t entries;
    int ret = vmdk_read(im, e, 0, &h, sizeof(h), "the header");

    if (ret)
        return ret;
    if (le32_to_cpu(h.version) != 1)
        return fmt_unsupported_in(im, e->file->path, "the version, of COWD not 1", le32_to_cpu(h.version));
    ret = vmdk_set_geometry(im, e, le32_to_cpu(h.capacity), le32_to_cpu(h.grain), VMDK_MAX_ENTRIES);
    if (ret)
        return ret;
    e->unclean = le32_to_cpu(h.unclean);
    im->dirty |= e->unclean;
    ret = vmdk_cowd_parent(im, &h);
    if (ret)
        return ret;
    e->first_grain = sizeof(h);
    e->header_sectors = sizeof(h) / VMDK_SECTOR;
    entries = le32_to_cpu(h.directory_entries);
    if (entries < vmdk_directory_entries(e))
        return vmdk_bad(im, e, "the grain directory is too small for the capacity", entries);
    return vmdk_set_directories(im, e, le32_to_cpu(h.directory), 0, false);
}

/* Nothing was ever written but these features and sizes. */
static int vmdk_check_se_header(const struct image *im, struct vmdk_extent *e, const struct vmdk_se_header *h)
{
    const le64 *offset[] = { h->volatile_header, h->directory, h->tables, h->grains };

    if (le64_to_cpu(h->version) != VMDK_SE_VERSION)
        return fmt_unsupported_in(im, e->file->path, "the version, of seSparse not 0x200000001",
                                  le64_to_cpu(h->version));
    if (le64_to_cpu(h->flags))
        return fmt_unsupported_in(im, e->file->path, "unknown seSparse features", le64_to_cpu(h->flags));
    if (le64_to_cpu(h->grain) != VMDK_SE_GRAIN)
        return vmdk_bad(im, e, "the grain size of seSparse is not 8 sectors", le64_to_cpu(h->grain));
    if (le64_to_cpu(h->table_size) != VMDK_SE_TABLE)
        return vmdk_bad(im, e, "the size of a grain table of seSparse is not 64 sectors", le64_to_cpu(h->table_size));
    for (size_t i = 0; i < ARRAY_LEN(offset); i++)
        if (!le64_to_cpu(*offset[i]) || le64_to_cpu(*offset[i]) > VMDK_MAX_SECTORS)
            return vmdk_bad(im, e, "an offset in the header is 0, or past 8 EiB", le64_to_cpu(*offset[i]));
    return 0;
}

static int vmdk_open_sesparse(struct image *im, struct vmdk_extent *e)
{
    struct vmdk_se_header h;
    struct vmdk_se_volatile v;
    uint64_t at, directory, tables, grains;
    int ret = vmdk_read(im, e, 0, &h, sizeof(h), "the header");

    if (!ret)
        ret = vmdk_check_se_header(im, e, &h);
    if (ret)
        return ret;
    at = le64_to_cpu(h.volatile_header[0]);
    directory = le64_to_cpu(h.directory[0]);
    tables = le64_to_cpu(h.tables[0]);
    grains = le64_to_cpu(h.grains[0]);
    ret = vmdk_read(im, e, at * VMDK_SECTOR, &v, sizeof(v), "the volatile header");
    if (!ret && le64_to_cpu(v.magic) != VMDK_SE_VOLATILE_MAGIC)
        ret = vmdk_bad(im, e, "the volatile header does not begin with 0xcafecafe", le64_to_cpu(v.magic));
    if (!ret && v.replay)
        ret = fmt_unsupported_in(im, e->file->path, "a journal that was not replayed, after a crash", v.replay);
    if (!ret)
        ret = vmdk_set_geometry(im, e, le64_to_cpu(h.capacity), VMDK_SE_GRAIN, VMDK_MAX_ENTRIES);
    if (ret)
        return ret;
    if (le64_to_cpu(h.directory[1]) < vmdk_directory_sectors(e))
        return vmdk_bad(im, e, "the grain directory is too small for the capacity", le64_to_cpu(h.directory[1]));
    e->tables = tables * VMDK_SECTOR;
    e->grains = e->first_grain = grains * VMDK_SECTOR;
    e->header_sectors = at + 1;
    ret = vmdk_set_directories(im, e, directory, 0, false);
    /* They lie in this order, with the journal and other tables between them. */
    if (!ret && (tables < directory + vmdk_directory_sectors(e) || grains < tables))
        ret = vmdk_bad(im, e, "tables in the wrong order, or one in another", tables);
    return ret;
}

/* The kind of sparse extent that begins with these bytes; VMDK_BAD: none. */
static enum vmdk_kind vmdk_kind_of(const void *bytes, size_t len)
{
    const uint8_t *head = bytes;

    if (len >= 4 && util_le32(head) == VMDK_HOSTED_MAGIC)
        return VMDK_HOSTED;
    if (len >= 4 && util_le32(head) == VMDK_COWD_MAGIC)
        return VMDK_COWD;
    return len >= 8 && util_le64(head) == VMDK_SE_MAGIC ? VMDK_SESPARSE : VMDK_BAD;
}

static void vmdk_map_sparse(const struct image *im, const struct vmdk_extent *e, uint64_t offset, uint64_t length,
                            struct extent *ext);

/*
 * A last grain that the disk does not fill may have been compressed whole, or only as far as the disk goes.
 * Only decoding it tells.
 */
static int vmdk_measure_last(const struct image *im, struct vmdk_extent *e)
{
    uint32_t grain = 1u << e->grain_bits, rest = (uint32_t)(e->capacity & (grain - 1));
    struct extent ext;
    uint64_t len;
    uint8_t *out;
    int ret;

    e->last_length = grain;
    if (!e->compressed || !rest)
        return 0;
    vmdk_map_sparse(im, e, e->capacity - rest, rest, &ext);
    if (ext.kind != EXT_COMPRESSED)
        return 0;
    out = util_fault("grain") ? NULL : malloc(grain);
    len = util_min(ext.coded_length, MAX_CLUSTER);
    ret = out ? codec_read(e->file, ext.offset, len, CODEC_ZLIB, out, grain) : -ENOMEM;
    free(out);
    if (ret == -EINVAL)
        e->last_length = rest;
    return ret == -ENOMEM ? msg_err(ret, "%s: out of memory", im->name) : 0;
}

/* Opens the sparse extent in e->file. alone: the disk has no other extent. */
static int vmdk_open_sparse(struct image *im, struct vmdk_extent *e, bool alone)
{
    uint8_t head[8] = { 0 };
    uint64_t grain, line = e->size;
    int ret = vmdk_read(im, e, 0, head, sizeof(head), "the header");

    if (ret)
        return ret;
    e->kind = vmdk_kind_of(head, sizeof(head));
    ret = e->kind == VMDK_HOSTED     ? vmdk_open_hosted(im, e)
          : e->kind == VMDK_COWD     ? vmdk_open_cowd(im, e)
          : e->kind == VMDK_SESPARSE ? vmdk_open_sesparse(im, e)
                                     : vmdk_bad(im, e, "not a sparse extent", util_le64(head));
    if (ret)
        return ret;
    grain = 1ull << e->grain_bits;
    if (line > e->capacity && line - e->capacity < grain && alone) {
        msg_say(MSG_NOTE, "%s: its descriptor says %" PRIu64 " sectors, its header %" PRIu64 ", which is used",
                e->file->path, line / VMDK_SECTOR, e->capacity / VMDK_SECTOR);
        line = e->capacity;
    }
    if (line && (line > e->capacity || e->capacity - line >= grain))
        return msg_err(-EINVAL, "%s: holds %" PRIu64 " sectors, but the descriptor says %" PRIu64
                       ": extents are swapped, or one is damaged", e->file->path, e->capacity / VMDK_SECTOR,
                       line / VMDK_SECTOR);
    e->size = line ? line : e->capacity;
    if (!im->cluster_size)
        im->cluster_size = (uint32_t)grain;
    im->entry_size = e->entry_size;
    return vmdk_measure_last(im, e);
}

/* -- opening -- */

/* Sets e->file, if need be by opening it. -ENOENT: there is no such file; the caller reports it. */
static int vmdk_open_file(struct image *im, struct vmdk *v, struct vmdk_extent *e)
{
    char name[4 * PATH_MAX];
    struct file *f;
    int ret = -ENOENT;

    for (struct vmdk_extent *other = v->extents; other < e; other++)
        if (other->file && strcmp(other->name, e->name) == 0) {
            e->file = other->file;
            return e->kind == VMDK_FLAT && other->kind == VMDK_FLAT
                       ? 0 : msg_err(-EINVAL, "%s: '%s' is named by two extents", im->name, e->name);
        }
    if (e->name[0] == '\\' || (isalpha((unsigned char)e->name[0]) && e->name[1] == ':'))
        return msg_err(-EPERM, "%s: its extent '%s' is a path or a device of Windows", im->name, e->name);
    if (im->n_files == MAX_PARTS)
        return msg_err(-E2BIG, "%s: more than %d files", im->name, MAX_PARTS);
    f = &im->files[im->n_files++];
    e->file = f;
    if (text_to_utf8(v->encoding, e->name, name, sizeof(name)))
        ret = fmt_open_named(im, f, name, "extent", NULL);
    if (ret == -ENOENT)             /* it may have been copied byte by byte */
        ret = fmt_open_named(im, f, e->name, "extent", NULL);
    if (ret == -ENOENT) {
        e->file = NULL;
        im->n_files--;
    }
    return ret;
}

/* The extent reads as errors; the rest of the disk is served. The caller has reported why. */
static void vmdk_give_up(struct vmdk_extent *e, const char *why)
{
    e->kind = VMDK_BAD;
    e->why = why;
}

static int vmdk_open_extent(struct image *im, struct vmdk *v, struct vmdk_extent *e)
{
    int ret;

    if (e->no_access)
        vmdk_give_up(e, "the descriptor allows no access to this extent");
    if (e->kind == VMDK_BAD || e->kind == VMDK_ZERO)
        return 0;
    ret = e->file ? 0 : vmdk_open_file(im, v, e);
    if (ret == -ENOENT) {
        msg_say(MSG_NOTE, "%s: its extent '%s' is missing: what is in it reads as errors", im->name, e->name);
        vmdk_give_up(e, "in an extent whose file is missing");
        return 0;
    }
    if (ret || e->kind == VMDK_FLAT)
        return ret;
    ret = vmdk_open_sparse(im, e, v->n_extents == 1);
    if (!ret || v->n_extents == 1 || ret == -ENOMEM || !e->size)     /* without a line its size is unknown */
        return ret;
    vmdk_give_up(e, "in a damaged extent");
    return 0;
}

/* Is a flat extent's file shorter than its line says, or not there? */
static bool vmdk_is_flat_short(const struct vmdk *v)
{
    for (unsigned i = 0; i < v->n_extents; i++) {
        const struct vmdk_extent *e = &v->extents[i];
        if (e->kind == VMDK_BAD || (e->kind == VMDK_FLAT && e->offset + e->size > e->file->size))
            return true;
    }
    return false;
}

/*
 * Flat files have no header: only their lengths tell that two were swapped. One that is shorter than its line
 * may be truncated; one that is longer holds something else, unless it is just rounded up (to blocks).
 */
static int vmdk_check_flat(const struct image *im, const struct vmdk *v)
{
    unsigned users;

    for (unsigned i = 0; i < v->n_extents && v->n_extents > 1; i++) {
        const struct vmdk_extent *e = &v->extents[i];
        if (e->kind != VMDK_FLAT || e->offset || e->file->is_blk || e->file->size <= e->size)
            continue;
        users = 0;
        for (unsigned j = 0; j < v->n_extents; j++)
            users += v->extents[j].file == e->file;
        if (users == 1 && (e->file->size - e->size >= VMDK_MAX_ROUNDING || vmdk_is_flat_short(v)))
            return msg_err(-EINVAL, "%s: its extent '%s' has %" PRIu64 " bytes instead of %" PRIu64
                           ": extents are swapped, or one is of another disk", im->name, e->name, e->file->size,
                           e->size);
    }
    return 0;
}

/* Opens the extents, and lays them out in a row. */
static int vmdk_open_extents(struct image *im, struct vmdk *v)
{
    unsigned good = 0;
    uint64_t sum = 0;
    int ret = 0;

    for (unsigned i = 0; i < v->n_extents && !ret; i++) {
        struct vmdk_extent *e = &v->extents[i];
        ret = vmdk_open_extent(im, v, e);
        if (!ret && e->size > MAX_IMAGE_SIZE - sum)
            ret = msg_err(-EFBIG, "%s: the extents add up to more than a file can hold", im->name);
        e->start = sum;
        sum += ret ? 0 : e->size;
        good += e->kind != VMDK_BAD;
    }
    if (!ret)
        ret = vmdk_check_flat(im, v);
    if (!ret && !good)
        ret = msg_err(-ENOENT, "%s: none of its extents can be read", im->name);
    im->size = sum;
    if (!ret && im->dirty)
        msg_say(MSG_NOTE, "%s: is marked dirty (not closed properly); reading it is safe", im->name);
    return ret;
}

/* name-s001.vmdk: what the sparse extents of a split disk are called. */
static bool vmdk_looks_like_part(const char *path)
{
    size_t len = strlen(path);

    return len > 10 && strcasecmp(path + len - 5, ".vmdk") == 0 && path[len - 10] == '-' &&
           (path[len - 9] | 0x20) == 's' && strspn(path + len - 8, "0123456789") == 3;
}

/* Sparse extents without a descriptor: in the order they were given. */
static int vmdk_open_alone(struct image *im, struct vmdk *v)
{
    int ret;

    if (im->n_files == 1 && im->opt->parts && vmdk_looks_like_part(im->name))
        return msg_err(-EINVAL, "%s: is one extent of a disk and has no descriptor; name the descriptor, or all "
                       "extents in their order, or take this one alone with --no-parts", im->name);
    v->extents = util_fault("extents") ? NULL : calloc(im->n_files, sizeof(*v->extents));
    if (!v->extents)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    v->n_extents = im->n_files;
    for (unsigned i = 0; i < v->n_extents; i++)
        v->extents[i] = (struct vmdk_extent){ .kind = VMDK_HOSTED, .file = &im->files[i], .type = "" };
    ret = vmdk_open_extents(im, v);
    if (!ret && !*im->backing_name)
        msg_say(MSG_NOTE, "%s: no descriptor, taken for the whole of a disk without a parent: if there is one, what it "
                "holds reads as zeros", im->name);
    return ret;
}

/*
 * An embedded descriptor: one of its sparse extents is the file itself. It is the one without a name, or the one with
 * the file's name, or the only one: the file may have been renamed.
 */
static int vmdk_find_self(struct image *im, struct vmdk *v)
{
    struct vmdk_extent *self = NULL, *only = NULL;
    unsigned sparse = 0, unnamed = 0;

    for (unsigned i = 0; i < v->n_extents; i++) {
        struct vmdk_extent *e = &v->extents[i];
        if (e->kind < VMDK_HOSTED)
            continue;
        only = sparse++ ? NULL : e;
        unnamed += !*e->name;
        if (!*e->name || (!unnamed && strcmp(util_basename(im->name), e->name) == 0))
            self = e;
    }
    if (unnamed > 1)
        return msg_err(-EINVAL, "%s: several extents of its descriptor have no name", im->name);
    if (!self)
        self = only;
    if (!self)
        return msg_err(-EINVAL, "%s: none of the extents of its descriptor is the file itself", im->name);
    self->file = &im->files[0];
    return 0;
}

/* Of a descriptor inside, whole lines up to what cannot be read will do, if one of them is an extent. */
static int vmdk_load_front(struct image *im, struct vmdk *v, uint64_t at, uint64_t len)
{
    uint64_t good = len;
    bool has_extent = false;
    char *end;

    (void)file_pread_front(&im->files[0], v->text, 0, &good, at);
    if (good == len || memchr(v->text, 0, good))
        return 0;
    end = memrchr(v->text, '\n', good);
    memset(end ? end + 1 : v->text, 0, (size_t)(v->text + len - (end ? end + 1 : v->text)));
    for (const char *line = v->text; (line = strpbrk(line, VMDK_LINE_ENDS)); line++)
        has_extent |= vmdk_is_extent_line(line + 1);
    if (!has_extent)
        v->text[0] = 0;
    msg_say(MSG_NOTE, "%s: its descriptor cannot be read %s", im->name,
            has_extent ? "in whole" : "as far as its extents");
    return 0;
}

/* Loads the descriptor's text; v->text stays NULL where there is none. */
static int vmdk_load_text(struct image *im, struct vmdk *v, const struct vmdk_header *h)
{
    struct file *f = &im->files[0];
    uint64_t at = 0, len = f->size;
    int ret;

    v->embedded = le32_to_cpu(h->magic) == VMDK_HOSTED_MAGIC;
    if (v->embedded) {
        at = le64_to_cpu(h->descriptor);
        len = le64_to_cpu(h->descriptor_size);
        if (!at || !len)
            return 0;
        if (at > VMDK_MAX_SECTORS || len > VMDK_MAX_TEXT / VMDK_SECTOR)
            return fmt_refuse(im, "the size (up to 1 MiB) or the offset of the descriptor (up to 8 EiB), in sectors",
                              len > VMDK_MAX_TEXT / VMDK_SECTOR ? len : at);
        at *= VMDK_SECTOR;
        len *= VMDK_SECTOR;
    }
    if (len > VMDK_MAX_TEXT)
        return fmt_refuse(im, "the length of the descriptor is more than 1 MiB", len);
    v->text = util_fault("descriptor") ? NULL : calloc(1, len + 1);
    if (!v->text)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    if (!v->embedded || at > f->size || len > f->size - at)
        ret = fmt_read(im, f, at, v->text, len, "the offset of the descriptor");
    else
        ret = vmdk_load_front(im, v, at, len);
    if (!ret && v->embedded && !v->text[0]) {
        free(v->text);
        v->text = NULL;
    }
    return ret;
}

/* Reads and parses the descriptor, if there is one. */
static int vmdk_read_text(struct image *im, struct vmdk *v)
{
    struct { struct vmdk_header header; uint8_t more[VMDK_SECTOR]; } head = { 0 };
    uint64_t len = util_min(im->files[0].size, sizeof(head));
    int ret = file_pread_front(&im->files[0], &head, util_min(len, sizeof(head.header)), &len, 0);
    enum vmdk_kind kind = vmdk_kind_of(&head, len);

    v->parent_cid = VMDK_NO_PARENT;
    v->no_cid = true;
    v->create_type = v->hint = v->encoding = "";
    if (ret)
        return ret;
    if (kind == VMDK_BAD && !vmdk_is_descriptor(&head, len))
        return msg_err(-EINVAL, "%s: is not a VMDK image", im->name);
    if (kind == VMDK_COWD || kind == VMDK_SESPARSE)
        return 0;
    ret = vmdk_load_text(im, v, &head.header);
    if (!ret && v->text && im->n_files > 1)
        ret = msg_err(-EINVAL, "%s: has a descriptor, which names the files of the disk; give it alone", im->name);
    return ret || !v->text ? ret : vmdk_parse(im, v);
}

static int vmdk_identify(struct image *im)
{
    struct vmdk *v = im->state;
    int ret = vmdk_read_text(im, v);

    if (!ret && v->text)
        vmdk_set_id(im, v);
    return ret;
}

static int vmdk_open(struct image *im)
{
    struct vmdk *v = im->state;
    int ret = vmdk_read_text(im, v);

    if (!ret && !v->text)
        return vmdk_open_alone(im, v);
    if (!ret)
        ret = vmdk_set_parent(im, v);
    if (!ret && v->embedded)
        ret = vmdk_find_self(im, v);
    return ret ? ret : vmdk_open_extents(im, v);
}

static int vmdk_probe(const struct probe *p)
{
    return vmdk_kind_of(p->head, p->head_len) != VMDK_BAD ? 100 : vmdk_is_descriptor(p->head, p->head_len) ? 90 : 0;
}

/* The header and the descriptor, which stand before the grain directories. */
static uint64_t vmdk_header_length(struct file *f)
{
    struct vmdk_header h;
    uint64_t redundant;

    if (file_read(f, &h, sizeof(h), 0) || le32_to_cpu(h.magic) != VMDK_HOSTED_MAGIC)
        return 0;
    redundant = le64_to_cpu(h.redundant);
    return util_min(redundant ? redundant : le64_to_cpu(h.overhead), util_min(le64_to_cpu(h.directory),
                    le64_to_cpu(h.overhead))) * VMDK_SECTOR;
}

static void vmdk_close(struct image *im)
{
    struct vmdk *v = im->state;

    free(v->extents);
    free(v->text);
}

/* -- mapping -- */

static struct extent vmdk_bad_grain(const char *why)
{
    return (struct extent){ .kind = EXT_BAD, .why = why };
}

/*
 * What a grain table entry says, as an extent without a length. EXT_DATA: the grain is at `offset` in the file.
 * unreadable: the entry could not be read.
 */
static struct extent vmdk_parse_entry(const struct vmdk_extent *e, uint64_t entry, bool unreadable)
{
    uint64_t offset = entry * VMDK_SECTOR, needed = e->compressed ? VMDK_SECTOR : 1ull << e->grain_bits;

    if (unreadable)
        return vmdk_bad_grain("its grain table cannot be read");
    if (!entry)
        return (struct extent){ .kind = EXT_BACKING };
    if (e->kind == VMDK_SESPARSE) {
        /* the type in the top 4 bits; the next 12 are the low ones of the grain's number */
        offset = (entry >> 48 & 0xfff) | (entry & 0xffffffffffff) << 12;
        if (entry >> 60 == 1 || entry >> 60 == 2)       /* unmapped by the guest, or zeros */
            return (struct extent){ .kind = EXT_ZERO, .zeroed = true };
        if (entry >> 60 != 3)
            return vmdk_bad_grain("its grain table entry is of an unknown type");
        if (offset > (MAX_IMAGE_SIZE - e->grains) >> e->grain_bits)
            return vmdk_bad_grain("its data lies past the end of the file");
        offset = e->grains + (offset << e->grain_bits);
    }
    if (entry == 1 && e->zero_grains)
        return (struct extent){ .kind = EXT_ZERO, .zeroed = true };
    if (entry == 1 && e->kind == VMDK_HOSTED)
        return vmdk_bad_grain("a zeroed grain in an extent that has none");
    if (offset < e->first_grain)
        return vmdk_bad_grain("its grain table entry points into the header");
    for (unsigned i = 0; i < 2; i++)
        if (e->directory[i] && offset < e->directory[i] + vmdk_directory_entries(e) * e->entry_size &&
            offset + needed > e->directory[i])
            return vmdk_bad_grain("its grain table entry points into a grain directory");
    if (offset >= e->file->size)
        return (struct extent){ .kind = EXT_BAD, .why = "its data lies past the end of the file", .file = e->file,
                                .offset = offset + needed };
    return (struct extent){ .kind = EXT_DATA, .file = e->file, .offset = offset };
}

static int vmdk_read_entry(const struct vmdk_extent *e, uint64_t offset, uint64_t *value)
{
    uint32_t half;
    int ret;

    if (e->entry_size == 8)
        return cache_le64(e->file, offset, value);
    ret = cache_le32(e->file, offset, &half);
    *value = half;
    return ret;
}

/* Is the sector around `offset` all zeros? */
static bool vmdk_is_wiped(const struct vmdk_extent *e, uint64_t offset)
{
    uint64_t word;

    offset -= offset % VMDK_SECTOR;
    for (unsigned i = 0; i < VMDK_SECTOR; i += 8)
        if (cache_le64(e->file, offset + i, &word) || word)
            return false;
    return true;
}

/* The grain of entry i in one or (table[1] not 0) two tables. The banner says which of two entries counts. */
static struct extent vmdk_find_grain(const struct vmdk_extent *e, const uint64_t table[2], uint64_t i)
{
    uint64_t at[2] = { table[0] + i * e->entry_size, table[1] + i * e->entry_size }, entry[2] = { 0 };
    int ret[2] = { vmdk_read_entry(e, at[0], &entry[0]), table[1] ? vmdk_read_entry(e, at[1], &entry[1]) : 0 };
    struct extent a = vmdk_parse_entry(e, entry[0], ret[0]), b;

    if (!table[1] || (!ret[0] && !ret[1] && entry[0] == entry[1]))
        return a;
    b = vmdk_parse_entry(e, entry[1], ret[1]);
    if (a.kind == EXT_BAD || b.kind == EXT_BAD)
        return a.kind == EXT_BAD ? b : a;
    if (e->unclean && a.kind != b.kind && (a.kind == EXT_DATA || b.kind == EXT_DATA))
        return a.kind == EXT_DATA ? a : b;
    if (vmdk_is_wiped(e, at[0]))
        return b;
    return vmdk_is_wiped(e, at[1]) ? a : vmdk_bad_grain("its two grain tables contradict each other");
}

/* The offset of the table that a directory's entry names; 0: none. */
static uint64_t vmdk_table_offset(const struct vmdk_extent *e, uint64_t entry)
{
    if (e->kind != VMDK_SESPARSE || !entry)
        return entry * VMDK_SECTOR;
    return entry >> 32 == 0x10000000 ? e->tables + (entry & 0xffffffff) * VMDK_SE_TABLE * VMDK_SECTOR : UINT64_MAX;
}

/*
 * Sets the offsets of the tables that entries `index` of the directories name: none, one in table[0], or two; else 0.
 * Returns why there is none, if a directory is damaged.
 */
static const char *vmdk_find_tables(const struct vmdk_extent *e, uint64_t index, uint64_t table[2])
{
    uint64_t entry, offset, size = vmdk_table_size(e);
    const char *why = NULL;
    unsigned n = 0;

    table[0] = table[1] = 0;
    for (unsigned i = 0; i < 2; i++) {
        if (!e->directory[i])
            continue;
        if (vmdk_read_entry(e, e->directory[i] + index * e->entry_size, &entry)) {
            why = "its grain directory cannot be read";
            continue;
        }
        if (!entry)
            continue;
        offset = vmdk_table_offset(e, entry);
        if (offset < VMDK_SECTOR || offset > e->file->size || size > e->file->size - offset)
            why = "its grain directory entry is damaged";
        else
            table[n++] = offset;
    }
    return n ? NULL : why;
}

/* A compressed grain, at ext->offset. Its marker has its sector of the disk, which reveals a damaged table. */
static void vmdk_map_compressed(const struct vmdk_extent *e, uint64_t offset, uint64_t length, struct extent *ext)
{
    uint64_t grain = 1ull << e->grain_bits, start = offset & ~(grain - 1), lba = start / VMDK_SECTOR, at = ext->offset;
    uint32_t coded = (uint32_t)util_min(2 * grain, e->file->size - at);

    if (e->markers) {
        if (cache_le64(e->file, at, &lba) || cache_le32(e->file, at + 8, &coded)) {
            ext_bad(ext, length, "its grain marker cannot be read");
            return;
        }
        at += VMDK_MARKER_HEAD;
    }
    if (lba != start / VMDK_SECTOR)
        ext_bad(ext, length, "its grain marker has another sector of the disk");
    else if (!coded || coded > 2 * grain)
        ext_bad(ext, length, "the length in its grain marker is damaged");
    else if (at > e->file->size || coded > e->file->size - at)
        ext_past(ext, length, "its compressed grain lies past the end of the file", e->file, at + coded);
    else
        *ext = (struct extent){
            .kind = EXT_COMPRESSED, .length = length, .file = e->file, .offset = at, .codec = CODEC_ZLIB,
            .coded_length = coded, .skip = (uint32_t)(offset - start),
            .decoded_length = e->capacity - start < grain ? e->last_length : (uint32_t)grain,
        };
}

static void vmdk_map_sparse(const struct image *im, const struct vmdk_extent *e, uint64_t offset, uint64_t length,
                            struct extent *ext)
{
    uint64_t grain = 1ull << e->grain_bits, covered = grain << e->table_bits, table[2];
    const char *why = vmdk_find_tables(e, offset >> (e->grain_bits + e->table_bits), table);

    length = util_min(length, covered - (offset & (covered - 1)));
    *ext = why ? vmdk_bad_grain(why) : (struct extent){ .kind = EXT_BACKING };
    if (table[0]) {
        length = util_min(length, grain - (offset & (grain - 1)));
        *ext = vmdk_find_grain(e, table, (offset & (covered - 1)) >> e->grain_bits);
    }
    ext->length = length;
    if (ext->kind == EXT_BACKING)
        ext->kind = ext_hole(im);
    else if (ext->kind == EXT_DATA && e->compressed)
        vmdk_map_compressed(e, offset, length, ext);
    else if (ext->kind == EXT_DATA)
        ext_data(ext, length, e->file, ext->offset + (offset & (grain - 1)), e->file->size);
}

static void vmdk_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct vmdk *v = im->state;
    const struct vmdk_extent *e =
        v->extents + util_count_up_to(&v->extents->start, sizeof(*e), v->n_extents, offset) - 1;

    offset -= e->start;
    length = util_min(length, e->size - offset);
    if (e->kind == VMDK_BAD) {
        ext_bad(ext, length, e->why);
    } else if (e->kind == VMDK_ZERO) {
        *ext = (struct extent){ .kind = EXT_ZERO, .length = length };
    } else if (e->kind == VMDK_FLAT) {
        ext_data(ext, length, e->file, e->offset + offset, e->file->size);
        ext->sparse = ext->kind == EXT_DATA;
    } else {
        vmdk_map_sparse(im, e, offset, length, ext);
    }
}

static void vmdk_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct vmdk_extent *e = by;
    uint64_t table = vmdk_table_offset(e, e->entry_size == 8 ? util_le64(bytes) : util_le32(bytes));

    (void)im;
    (void)i;
    if (table && table < (uint64_t)MAX_IMAGE_SIZE)
        c->claim(c, e->file, table, vmdk_table_size(e), "a grain table", 0);
}

/* All data too, where the extents are flat. */
static bool vmdk_claims(struct image *im, struct claims *c)
{
    const struct vmdk *v = im->state;
    bool all = true;

    for (unsigned i = 0; i < v->n_extents; i++) {
        const struct vmdk_extent *e = &v->extents[i];
        if (e->kind == VMDK_FLAT)   /* may be named twice, and overlap, because the descriptor says so */
            c->claim(c, e->file, e->offset + e->size, 0, NULL, 0);
        if (e->kind < VMDK_HOSTED)
            continue;
        all = false;
        c->claim(c, e->file, 0, e->header_sectors * VMDK_SECTOR, "the header", 0);
        for (unsigned k = 0; k < 2; k++) {
            uint64_t n = vmdk_directory_entries(e);
            if (!e->directory[k])
                continue;
            c->claim(c, e->file, e->directory[k], n * e->entry_size, "a grain directory", 0);
            ext_claim_table(c, im, e, e->file, e->directory[k], n, e->entry_size, vmdk_claim_entry);
        }
    }
    return all;
}

static void vmdk_info(struct image *im, struct out *out)
{
    const struct vmdk *v = im->state;

    if (v->text) {
        out_number(out, "cid", v->cid);
        out_number(out, "parent-cid", v->parent_cid);
        out_text(out, "create-type", v->create_type);
    }
    out_open(out, "extents", '[', false);
    for (unsigned i = 0; i < v->n_extents; i++) {
        const struct vmdk_extent *e = &v->extents[i];
        out_open(out, NULL, '{', false);
        out_size(out, "virtual-size", e->size);
        if (e->file || e->name)
            out_text(out, "filename", e->file ? e->file->path : e->name);
        if (e->kind >= VMDK_HOSTED)
            out_size(out, "cluster-size", 1ull << e->grain_bits);
        out_text(out, "format", e->type);
        if (e->compressed)
            out_flag(out, "compressed", true);
        out_close(out);
    }
    out_close(out);
}

/* QEMU reads the first of two grain directories only. */
static bool vmdk_directories_agree(const struct vmdk_extent *e)
{
    uint64_t table[2], a, b;

    for (uint64_t i = 0; e->directory[1] && i < vmdk_directory_entries(e); i++) {
        if (!e->directory[0] || vmdk_find_tables(e, i, table))
            return false;
        if (!table[0])
            continue;
        for (uint64_t at = 0; at < vmdk_table_size(e); at += e->entry_size)
            if (!table[1] || vmdk_read_entry(e, table[0] + at, &a) || vmdk_read_entry(e, table[1] + at, &b) || a != b)
                return false;
    }
    return e->directory[0];
}

/*
 * QEMU skips extents of zeros and lines that it does not recognize; the size of a sparse extent is its header's. It
 * opens parents by the recorded path, never by UUID.
 */
static bool vmdk_as_qemu(struct image *im)
{
    const struct vmdk *v = im->state;

    if (*im->backing_name || v->unlike_qemu)
        return false;
    for (unsigned i = 0; i < v->n_extents; i++) {
        const struct vmdk_extent *e = &v->extents[i];
        if (e->kind == VMDK_BAD || e->kind == VMDK_ZERO || (*e->type && !v->embedded && !e->exact))
            return false;
        for (const char *c = v->embedded || !e->name ? "" : e->name; *c; c++)
            if (*c & 0x80)
                return false;       /* perhaps in another encoding */
        if (e->kind != VMDK_FLAT && (e->size != e->capacity || !vmdk_directories_agree(e)))
            return false;
    }
    return true;
}

/*
 * -- lost headers and tables --
 *
 * Of a hosted extent the two grain directories tell the header: each stands right before its tables, which lie in a
 * row, and the redundant one right before the other (see vmdk_look_at_row()). So the first entry of a directory of n
 * entries in sector s is s + n * 4 / 512, rounded up, and each other one is 4 more, the sectors of a table. Two such
 * directories with as many entries are no accident. The grain size is the smallest distance of two grains, or else the
 * usual one, if the capacity in the descriptor then needs just so many tables.
 *
 * In a stream (streamOptimized) each grain says itself where in the disk it belongs, so all tables can be lost:
 * vmdk_scan() goes from marker to marker. Where there is none, it goes on by sectors until a grain decodes.
 */

enum { VMDK_GUESS_REACH = 8 << 20 /* bytes of a file in which directories are looked for */, VMDK_TABLE_SECTORS = 4 };

struct vmdk_guess {
    uint64_t directory[2], tables;  /* sectors; entries of a directory */
    uint64_t capacity, grain;       /* sectors */
    bool has_text;                  /* a descriptor in sector 1 */
};

/* The entries of the directory in this sector, by its shape; 0: there is none. */
static uint64_t vmdk_guess_directory(struct file *f, uint64_t sector)
{
    le32 entries[VMDK_SECTOR / 4];
    uint64_t n = 0, first = 0;
    uint32_t e = 0;

    for (uint64_t at = sector; ; at++) {
        if (file_read(f, entries, sizeof(entries), at * VMDK_SECTOR))
            return 0;
        for (unsigned i = 0; i < ARRAY_LEN(entries); i++, n++) {
            e = le32_to_cpu(entries[i]);
            if (n == 0)
                first = e;
            if (e != first + n * VMDK_TABLE_SECTORS || first < sector + 1 || first > f->size / VMDK_SECTOR)
                return first == sector + (n * 4 + VMDK_SECTOR - 1) / VMDK_SECTOR ? n : 0;
        }
        if (at >= first)
            return 0;
    }
}

/* The capacity in the line of the only extent of the descriptor in sector 1, in sectors; 0: there is none. */
static uint64_t vmdk_guess_capacity(struct file *f, struct vmdk_guess *g)
{
    char text[20 * VMDK_SECTOR + 1] = "", *line;
    uint64_t len = util_min(sizeof(text) - 1, f->size - util_min(f->size, VMDK_SECTOR)), sectors;

    (void)file_pread_front(f, text, 0, &len, VMDK_SECTOR);
    g->has_text = vmdk_is_descriptor(text, len);
    for (line = text; g->has_text && (line = strpbrk(line, VMDK_LINE_ENDS)); line++)
        if (vmdk_is_extent_line(line + 1) && (sectors = strtoull(line + 1 + strcspn(line + 1, " \t"), NULL, 10)))
            return sectors <= VMDK_MAX_SECTORS ? sectors : 0;
    return 0;
}

/* The smallest distance between two grains of the first tables, in sectors; 0: there are not two. */
static uint64_t vmdk_guess_grain(struct file *f, const struct vmdk_guess *g)
{
    le32 entries[VMDK_HOSTED_ENTRIES];
    uint64_t at = (g->directory[1] * VMDK_SECTOR + g->tables * 4 + VMDK_SECTOR - 1) / VMDK_SECTOR * VMDK_SECTOR;
    uint32_t last = 0, e, least = UINT32_MAX;

    for (uint64_t t = 0; t < util_min(g->tables, 64); t++) {
        if (file_read(f, entries, sizeof(entries), at + t * sizeof(entries)))
            continue;
        for (unsigned i = 0; i < VMDK_HOSTED_ENTRIES; i++) {
            e = le32_to_cpu(entries[i]);
            if (e <= 1)
                continue;
            if (last && e != last)
                least = (uint32_t)util_min(least, e > last ? e - last : last - e);
            last = e;
        }
    }
    return least == UINT32_MAX ? 0 : least;
}

/* With this grain size, does the capacity, if it is known, need just so many tables? */
static bool vmdk_grain_fits(const struct vmdk_guess *g)
{
    uint64_t covered = VMDK_HOSTED_ENTRIES * g->grain;

    return util_is_power_of_2(g->grain, VMDK_HOSTED_MIN_GRAIN, VMDK_MAX_GRAIN) &&
           (!g->capacity || (g->capacity - 1) / covered + 1 == g->tables);
}

static bool vmdk_guess(struct file *f, struct vmdk_guess *g)
{
    uint64_t end = util_min(f->size, VMDK_GUESS_REACH) / VMDK_SECTOR, n, first;

    *g = (struct vmdk_guess){ 0 };
    g->capacity = vmdk_guess_capacity(f, g);
    for (uint64_t s = 1; s < end && !g->tables; s++) {
        n = vmdk_guess_directory(f, s);
        first = s + (n * 4 + VMDK_SECTOR - 1) / VMDK_SECTOR + n * VMDK_TABLE_SECTORS;
        if (n && vmdk_guess_directory(f, first) == n)
            *g = (struct vmdk_guess){ { first, s }, n, g->capacity, 0, g->has_text };
    }
    if (!g->tables)
        return false;
    g->grain = vmdk_guess_grain(f, g);
    if (!vmdk_grain_fits(g))
        g->grain = VMDK_USUAL_GRAIN;
    if (!vmdk_grain_fits(g))
        g->grain = 0;
    return true;
}

/* Puts a header in front of f, in memory. gd, rgd: sectors. */
static int vmdk_patch_header(struct file *f, const struct vmdk_guess *g, uint32_t flags, uint64_t gd, uint64_t rgd)
{
    uint8_t page[FILE_PATCH] = { 0 };
    uint64_t len = util_min(f->size, sizeof(page));
    struct vmdk_header *h = (void *)page;

    for (uint64_t at = VMDK_SECTOR; at + VMDK_SECTOR <= len; at += VMDK_SECTOR)
        (void)file_read(f, page + at, VMDK_SECTOR, at);
    *h = (struct vmdk_header){
        .magic = cpu_to_le32(VMDK_HOSTED_MAGIC),
        .version = cpu_to_le32(flags & VMDK_FLAG_COMPRESSED ? 3 : 1),
        .flags = cpu_to_le32(flags | VMDK_FLAG_NEWLINES),
        .capacity = cpu_to_le64(g->capacity),
        .grain = cpu_to_le64(g->grain),
        .descriptor = cpu_to_le64(g->has_text),
        .descriptor_size = cpu_to_le64(g->has_text ? 20 : 0),
        .table_entries = cpu_to_le32(VMDK_HOSTED_ENTRIES),
        .redundant = cpu_to_le64(rgd),
        .directory = cpu_to_le64(gd),
        .newlines = "\n \r\n",
        .algorithm = cpu_to_le16(flags & VMDK_FLAG_COMPRESSED ? 1 : 0),
    };
    return file_patch(f, 0, page);
}

/* -- streams -- */

enum { VMDK_STREAM_REACH = 4096 /* sectors in which the first grain of a stream is looked for */,
       VMDK_STREAM_TABLES = 32 << 20 /* bytes that a directory put together may have */ };

struct vmdk_found {
    uint64_t value, at;             /* sectors: where in the disk it belongs, where in the file its marker lies */
    bool gap;                       /* between it and the one before something was lost */
};

struct vmdk_scan {
    struct file *f;
    uint64_t capacity, grain;       /* sectors; capacity 0: not known */
    struct vmdk_found *found;       /* owned */
    size_t n, room;
    bool gap;                       /* behind the last one something was lost */
    uint64_t budget;                /* bytes that may still be decoded to find a grain: damage must not take for ever */
    uint8_t *out;                   /* of one grain, owned */
};

/* What the marker in this sector says is behind it: sectors that it takes with it; 0: this is no marker. */
static uint64_t vmdk_marked(const struct vmdk_scan *s, const struct vmdk_marker *m, uint64_t at)
{
    const uint8_t *data = (const uint8_t *)m + VMDK_MARKER_HEAD;
    uint64_t value = le64_to_cpu(m->value), left = s->f->size / VMDK_SECTOR - at;
    uint32_t size = le32_to_cpu(m->size);

    if (!size)
        return le32_to_cpu(m->type) <= VMDK_MARKER_FOOTER && value < left ? 1 + value : 0;
    return value % s->grain == 0 && value < (s->capacity ? s->capacity : VMDK_MAX_SECTORS) &&
           size <= 2 * s->grain * VMDK_SECTOR && data[0] == 0x78 && (data[0] << 8 | data[1]) % 31 == 0
               ? (VMDK_MARKER_HEAD + (uint64_t)size + VMDK_SECTOR - 1) / VMDK_SECTOR : 0;
}

static bool vmdk_decodes(struct vmdk_scan *s, uint64_t at, uint32_t size)
{
    uint64_t offset = at * VMDK_SECTOR + VMDK_MARKER_HEAD;

    if (offset + size > s->f->size || size > s->budget)
        return false;
    s->budget -= size;
    return codec_read(s->f, offset, size, CODEC_ZLIB, s->out, s->grain * VMDK_SECTOR) == 0;
}

/* Room for as many as the file has markers, each of which takes a sector at least. */
static int vmdk_note_found(struct vmdk_scan *s, uint64_t value, uint64_t at)
{
    size_t room = s->room ? s->room * 2 : 4096;
    struct vmdk_found *more;

    if (s->n == s->room) {
        more = util_fault("grains") ? NULL : realloc(s->found, room * sizeof(*more));
        if (!more)
            return -ENOMEM;
        s->found = more;
        s->room = room;
    }
    s->found[s->n++] = (struct vmdk_found){ value, at, s->gap };
    s->gap = false;
    return 0;
}

/*
 * Finds grains from this sector on, up to `most` of them. A grain counts if it stands where the part before says, or
 * if it decodes. What is neither is a gap. So are zeros: an end marker looks like that, but so does what is lost.
 */
static int vmdk_scan(struct vmdk_scan *s, uint64_t at, uint64_t end, size_t most)
{
    bool follows = false, ended = false;
    struct vmdk_marker m;
    uint64_t takes;
    int ret = 0;

    s->gap = true;
    s->budget = 4 * s->f->size + MAX_CLUSTER;
    for (uint64_t i = 0; at < end && s->n < most && !ret; at += takes ? takes : 1, i++) {
        takes = file_read(s->f, &m, sizeof(m), at * VMDK_SECTOR) ? 0 : vmdk_marked(s, &m, at);
        if (takes && le32_to_cpu(m.size)) {
            takes = follows || vmdk_decodes(s, at, le32_to_cpu(m.size)) ? takes : 0;
            ret = takes ? vmdk_note_found(s, le64_to_cpu(m.value), at) : 0;
        } else if (takes && le32_to_cpu(m.type) == VMDK_MARKER_END) {
            takes = 0;
        } else if (takes) {
            ended |= le32_to_cpu(m.type) != VMDK_MARKER_TABLE;
        }
        follows = takes;
        s->gap |= !takes && !ended;
        if (i % 1024 == 0 && util_interrupted())
            ret = msg_err(-EINTR, "interrupted");
    }
    s->gap = s->gap || !ended;      /* a stream that was not cut off ends with tables and a footer */
    return ret;
}

static int vmdk_by_value(const void *a, const void *b)
{
    const struct vmdk_found *x = a, *y = b;

    return x->value != y->value ? (x->value > y->value) - (x->value < y->value) : (x->at > y->at) - (x->at < y->at);
}

/* Sorts the grains. A gap tells which grains may be lost only if they stand in the order of the disk, as usual. */
static bool vmdk_sort_found(struct vmdk_scan *s)
{
    bool sorted = true, gap = s->gap;

    for (size_t i = 0; i < s->n; i++) {
        sorted &= i == 0 || s->found[i - 1].value < s->found[i].value;
        gap |= s->found[i].gap && (i || s->found[i].value);
    }
    if (sorted)
        return gap;
    qsort(s->found, s->n, sizeof(*s->found), vmdk_by_value);
    for (size_t i = 0; i < s->n; i++)
        s->found[i].gap = gap;
    s->gap = gap;
    return gap;
}

/* Fills table t from grain *i on. What may be lost gets the entry 1, an error in an extent without zeroed grains. */
static void vmdk_fill_table(const struct vmdk_scan *s, uint64_t t, size_t *i, le32 table[VMDK_HOSTED_ENTRIES])
{
    for (uint64_t k = 0; k < VMDK_HOSTED_ENTRIES; k++) {
        uint64_t value = (t * VMDK_HOSTED_ENTRIES + k) * s->grain;
        bool there = *i < s->n && s->found[*i].value == value;
        table[k] = cpu_to_le32(there ? (uint32_t)s->found[*i].at : (*i < s->n ? s->found[*i].gap : s->gap));
        while (*i < s->n && s->found[*i].value == value)
            ++*i;
    }
}

/* Puts the directory and all tables with a grain behind the file's end, in memory. Two tables are a page. */
static int vmdk_patch_tables(struct file *f, const struct vmdk_scan *s, uint64_t *directory)
{
    uint64_t covered = VMDK_HOSTED_ENTRIES * s->grain, n = (s->capacity - 1) / covered + 1, t;
    uint64_t per_page = FILE_PATCH / 4, base = (f->size + FILE_PATCH - 1) / FILE_PATCH * FILE_PATCH;
    uint64_t next = base + (n + per_page - 1) / per_page * FILE_PATCH;
    le32 gd[FILE_PATCH / 4] = { 0 }, tables[2][VMDK_HOSTED_ENTRIES] = { 0 };
    unsigned half = 0;
    size_t i = 0;
    int ret = 0;

    if (n * 4 > VMDK_STREAM_TABLES || next / VMDK_SECTOR > UINT32_MAX)
        return -E2BIG;
    *directory = base / VMDK_SECTOR;
    file_extend(f, next);
    for (t = 0; t < n && !ret; t++) {
        bool none = i == s->n || s->found[i].value >= (t + 1) * covered;
        gd[t % per_page] = cpu_to_le32(!none ? (uint32_t)(next / VMDK_SECTOR) + half * VMDK_TABLE_SECTORS
                                       : (i < s->n ? s->found[i].gap : s->gap) ? UINT32_MAX : 0);
        if (!none)
            vmdk_fill_table(s, t, &i, tables[half++]);
        if (half == 2 || (t + 1 == n && half)) {
            file_extend(f, next + FILE_PATCH);
            ret = file_patch(f, next, (const uint8_t *)tables);
            next += FILE_PATCH;
            half = 0;
        }
        if (!ret && (t % per_page == per_page - 1 || t + 1 == n)) {
            ret = file_patch(f, base + t / per_page * FILE_PATCH, (const uint8_t *)gd);
            memset(gd, 0, sizeof(gd));
        }
    }
    return ret;
}

/* Reads the header, or the footer if that says more. False: neither is left. */
static bool vmdk_stream_header(struct file *f, struct vmdk_header *h)
{
    uint64_t end = f->size / VMDK_SECTOR;
    struct vmdk_header footer;
    bool good = file_read(f, h, sizeof(*h), 0) == 0 && le32_to_cpu(h->magic) == VMDK_HOSTED_MAGIC;

    if (good && le64_to_cpu(h->directory) != VMDK_AT_END)
        return true;
    for (uint64_t back = 1; back <= util_min(VMDK_MAX_FOOTER_BACK, end); back++)
        if (file_read(f, &footer, sizeof(footer), (end - back) * VMDK_SECTOR) == 0 &&
            le32_to_cpu(footer.magic) == VMDK_HOSTED_MAGIC && (le32_to_cpu(footer.flags) & VMDK_FLAG_MARKERS)) {
            *h = footer;
            return true;
        }
    return good;
}

/* Do the tables below this directory lead to every grain that was found? */
static bool vmdk_tables_agree(const struct vmdk_scan *s, uint64_t directory)
{
    le32 table, entry;
    uint64_t index, at[2];

    for (size_t i = 0; i < s->n && directory; i++) {
        index = s->found[i].value / s->grain;
        at[0] = directory * VMDK_SECTOR + index / VMDK_HOSTED_ENTRIES * 4;
        if (at[0] + 4 > s->f->size || file_read(s->f, &table, sizeof(table), at[0]))
            return false;
        at[1] = (uint64_t)le32_to_cpu(table) * VMDK_SECTOR + index % VMDK_HOSTED_ENTRIES * 4;
        if (at[1] + 4 > s->f->size || file_read(s->f, &entry, sizeof(entry), at[1]) ||
            le32_to_cpu(entry) != s->found[i].at)
            return false;
    }
    return directory && s->n;
}

/* directory: the sector where it should be, or 0. has_header: the file's own is good. */
static int vmdk_rebuild_stream(struct image *im, struct vmdk_guess *g, uint64_t overhead, uint64_t directory,
                               bool has_header)
{
    struct file *f = &im->files[0];
    struct vmdk_scan s = { .f = f, .capacity = g->capacity, .grain = g->grain };
    bool gap, agree = false;
    int ret = -ENOMEM;

    s.out = malloc(g->grain * VMDK_SECTOR);
    if (s.out)
        ret = vmdk_scan(&s, overhead, f->size / VMDK_SECTOR, SIZE_MAX);
    if (!ret && !s.n)
        ret = msg_err(-EINVAL, "%s: cannot be put together: no grain is left in it", im->name);
    gap = vmdk_sort_found(&s);
    if (!ret && s.n && !s.capacity) {
        im->least_size = (s.found[s.n - 1].value + s.grain) * VMDK_SECTOR;
        s.capacity = g->capacity = (im->least_size / VMDK_SECTOR + VMDK_HOSTED_ENTRIES * s.grain - 1) /
                                   (VMDK_HOSTED_ENTRIES * s.grain) * VMDK_HOSTED_ENTRIES * s.grain;
    }
    if (!ret)
        agree = vmdk_tables_agree(&s, directory);
    if (!ret && !agree)
        ret = vmdk_patch_tables(f, &s, &directory);
    if (!ret && !(agree && has_header))
        ret = vmdk_patch_header(f, g, VMDK_FLAG_COMPRESSED | VMDK_FLAG_MARKERS, directory, 0);
    if (ret == -ENOMEM || ret == -E2BIG)
        msg_err(ret, "%s: cannot be put together: %s", im->name, strerror(-ret));
    else if (!ret && !agree)
        msg_say(MSG_NOTE, "%s: its tables are put together from the markers of %zu grains%s", im->name, s.n,
                gap ? "; something between or behind them is lost, and what may have been there reads as errors" : "");
    else if (!ret && !has_header)
        msg_say(MSG_NOTE, "%s: header put together; its tables are those of the %zu grains that are there", im->name,
                s.n);
    free(s.found);
    free(s.out);
    return ret;
}

/* -- which of these -- */

/* Does f have a grain behind a marker, near its start? */
static bool vmdk_is_stream(struct file *f, uint64_t grain)
{
    struct vmdk_scan s = { .f = f, .grain = grain, .out = malloc(grain * VMDK_SECTOR) };
    bool found = s.out && vmdk_scan(&s, 1, util_min(f->size / VMDK_SECTOR, VMDK_STREAM_REACH), 1) == 0 && s.n;

    free(s.found);
    free(s.out);
    return found;
}

static bool vmdk_remains(struct file *f)
{
    struct vmdk_guess g;

    return vmdk_guess(f, &g) || g.has_text || vmdk_is_stream(f, VMDK_USUAL_GRAIN);
}

static int vmdk_rebuild(struct image *im)
{
    struct file *f = &im->files[0];
    struct vmdk_header h = { .magic = { { 0 } } };
    struct vmdk_guess g;
    uint8_t head[VMDK_SECTOR] = { 0 };
    uint64_t len = util_min(f->size, sizeof(head)), directory;
    bool tables, good, stream;

    (void)file_pread_front(f, head, 0, &len, 0);
    good = vmdk_kind_of(head, len) == VMDK_HOSTED;
    if (im->n_files > 1 || vmdk_is_descriptor(head, len) || (!good && vmdk_kind_of(head, len) != VMDK_BAD))
        return 0;
    tables = vmdk_guess(f, &g);
    stream = vmdk_stream_header(f, &h) && (le32_to_cpu(h.flags) & VMDK_FLAG_MARKERS);
    if (good && !stream)
        return 0;
    if (stream || vmdk_is_stream(f, VMDK_USUAL_GRAIN)) {
        g.grain = stream ? le64_to_cpu(h.grain) : VMDK_USUAL_GRAIN;
        g.capacity = stream ? le64_to_cpu(h.capacity) : g.capacity;
        directory = stream ? le64_to_cpu(h.directory) : tables ? g.directory[0] : 0;
        if (g.capacity > VMDK_MAX_SECTORS ||
            !util_is_power_of_2(g.grain, VMDK_HOSTED_MIN_GRAIN, MAX_CLUSTER / VMDK_SECTOR))
            return fmt_refuse(im, "the grain size or the capacity in its footer", g.grain);
        len = util_min(stream ? le64_to_cpu(h.overhead) : 1, f->size / VMDK_SECTOR);
        return vmdk_rebuild_stream(im, &g, len, directory <= UINT32_MAX ? directory : 0, good);
    }
    if (!tables || !g.grain)
        return msg_err(-EINVAL, "%s: cannot be put together: neither a grain directory nor a stream's grain is left "
                       "near its start; --header=FILE takes the header of another image", im->name);
    if (!g.capacity) {
        g.capacity = g.tables * VMDK_HOSTED_ENTRIES * g.grain;
        im->least_size = g.capacity * VMDK_SECTOR;
    }
    msg_say(MSG_NOTE, "%s: header put together: grains of %" PRIu64 " bytes, two grain directories of %" PRIu64
            " tables at %" PRIu64 " and %" PRIu64 "%s", im->name, g.grain * VMDK_SECTOR, g.tables,
            g.directory[1] * VMDK_SECTOR, g.directory[0] * VMDK_SECTOR, g.has_text ? "" : ", no descriptor");
    return vmdk_patch_header(f, &g, VMDK_FLAG_REDUNDANT | VMDK_FLAG_ZERO_GRAINS, g.directory[0], g.directory[1]);
}

static const struct image_format vmdk_format = {
    .name = "vmdk",
    .describe = "VMware images: hosted, stream-optimized, COWD and seSparse extents, flat ones, split, with parents",
    .writes = "overlay",
    .state_size = sizeof(struct vmdk),
    .several_files = true,
    .extensions = " vmdk ",
    .probe = vmdk_probe,
    .remains = vmdk_remains,
    .header_length = vmdk_header_length,
    .rebuild = vmdk_rebuild,
    .identify = vmdk_identify,
    .open = vmdk_open,
    .map = vmdk_map,
    .claims = vmdk_claims,
    .as_qemu = vmdk_as_qemu,
    .info = vmdk_info,
    .close = vmdk_close,
};

/* ******************************************************************************************************** *
 * 20. Parallels
 *
 * QEMU docs/interop/parallels.rst and prl-xml.rst. All numbers are little-endian.
 *
 *   an image:  header | BAT: 4 bytes per cluster | clusters
 *   a bundle:  directory NAME.hdd with DiskDescriptor.xml, which lists storages, each a range of the disk, for each
 *              storage one image per snapshot, and the snapshots with their parents
 *
 * A BAT entry is the offset of a cluster in the file: in sectors, or in clusters if the magic ends in "Ext". 0: the
 * cluster is in the same storage's image of the parent snapshot. This driver opens all images of a bundle as a stack
 * of layers. A single image is a disk of one storage and one layer. Format extensions (dirty bitmaps) are ignored.
 * ******************************************************************************************************** */

enum {
    PRL_VERSION = 2,
    PRL_SECTOR = 512,
    PRL_MAX_CLUSTER = INT32_MAX / 513,  /* sectors: QEMU's limit */
    PRL_MAX_XML = 1 << 20,
    PRL_MAX_FILES = 1024,           /* of a bundle: 2 TiB in the usual pieces of 2 GiB */
    PRL_MAX_PATH = 256,             /* names of nested elements */
};

struct prl_header {
    uint8_t magic[16];              /* 0x00: PRL_MAGIC, or PRL_MAGIC_EXT: BAT entries count clusters, not sectors */
    le32 version;                   /* 0x10: 2 */
    le32 heads;                     /* 0x14 */
    le32 cylinders;                 /* 0x18 */
    le32 cluster_sectors;           /* 0x1c: as all sizes in sectors of 512 bytes */
    le32 n_entries;                 /* 0x20: of the BAT, which follows the header */
    le64 sectors;                   /* 0x24: of the disk; without "Ext" only the lower 4 bytes count */
    le32 in_use;                    /* 0x2c: PRL_IN_USE: not closed properly */
    le32 data_sector;               /* 0x30: where the clusters begin */
    uint8_t reserved[12];           /* 0x34 */
};
_Static_assert(sizeof(struct prl_header) == 64, "Parallels header");
enum { PRL_HEADER = sizeof(struct prl_header) };
#define PRL_IN_USE 0x746f6e59u
#define PRL_MAGIC "WithoutFreeSpace"
#define PRL_MAGIC_EXT "WithouFreSpacExt"
#define PRL_XML_NAME "DiskDescriptor.xml"
#define PRL_XML_ROOT "/Parallels_disk_image"

struct prl_layer {                  /* one image of a storage */
    struct file *file;
    bool plain;                     /* a raw file: only `file` and `start` are set */
    uint64_t start;                 /* offset of its storage in the disk */
    uint64_t size;                  /* bytes; UINT64_MAX: plain */
    uint64_t first;                 /* no cluster has a lower offset in the file */
    bool aligned;                   /* all clusters are whole clusters away from `first` */
    uint32_t cluster, unit;         /* bytes; unit: of BAT entries */
};

struct prl {
    struct ranges storages;         /* of the disk, without gaps; in range[] */
    unsigned n_layers;              /* of each storage */
    struct range range[PRL_MAX_FILES];
    struct prl_layer layers[PRL_MAX_FILES];     /* [storages.n][n_layers], the top snapshot first */
};

/* -- the descriptor -- */

struct prl_guid {
    bool known;
    uint8_t value[16];
};

struct prl_storage {
    uint64_t start, end;            /* sectors */
};

struct prl_image {
    unsigned storage;               /* index */
    struct prl_guid guid;           /* of its snapshot */
    const char *file, *type;        /* in the text; NULL: the descriptor does not say */
};

struct prl_shot {
    struct prl_guid guid, parent;
};

struct prl_xml {
    char text[PRL_MAX_XML + 1];
    uint64_t disk_size;             /* sectors */
    struct prl_guid top;
    unsigned n_storages, n_images, n_shots;     /* the arrays begin at [1]: index 0 means none */
    struct prl_storage storages[1 + PRL_MAX_FILES];
    struct prl_image images[1 + PRL_MAX_FILES];
    struct prl_shot shots[1 + PRL_MAX_FILES];
};

static int prl_xml_bad(const struct image *im, const char *what, const char *value)
{
    return msg_err(-EINVAL, "%s: damaged or hostile " PRL_XML_NAME ": %s ('%.60s')", im->name, what, value);
}

/* Replaces the five entities that XML has by itself, in place. False: there are others. */
static bool prl_xml_unescape(char *text)
{
    static const char *const names[] = { "amp;", "lt;", "gt;", "quot;", "apos;" };
    char *to = text;
    size_t i;

    for (; *text; *to++ = *text++) {
        if (*text != '&')
            continue;
        for (i = 0; i < ARRAY_LEN(names) && strncmp(text + 1, names[i], strlen(names[i])) != 0; i++)
            continue;
        if (i == ARRAY_LEN(names))
            return false;
        text += strlen(names[i]);
        *text = "&<>\"'"[i];
    }
    *to = 0;
    return true;
}

/* Handles what is neither a number of sectors nor a GUID. */
static int prl_xml_text(struct image *im, struct prl_image *image, const char *path, char *text)
{
    uint8_t engine[16];
    char how[80];

    if (strcmp(path, PRL_XML_ROOT "/StorageData/Storage/Image/File") == 0) {
        image->file = text;
        return *text && prl_xml_unescape(text) ? 0 : prl_xml_bad(im, "a file's name", text);
    }
    if (strcmp(path, PRL_XML_ROOT "/StorageData/Storage/Image/Type") == 0) {
        image->type = text;
        return strcmp(text, "Plain") == 0 || strcmp(text, "Compressed") == 0
                   ? 0 : msg_err(-EOPNOTSUPP, "%s: unknown type of an image ('%.60s'), which is not supported; Plain "
                                 "and Compressed are", im->name, text);
    }
    if (strcmp(path, PRL_XML_ROOT "/Disk_Parameters/Padding") == 0 && strcmp(text, "0") != 0)
        return msg_err(-EOPNOTSUPP, "%s: disks with padding are not supported ('%.60s')", im->name, text);
    snprintf(how, sizeof(how), "by %.60s", text);
    if (strcmp(path, PRL_XML_ROOT "/Disk_Parameters/Encryption/Engine") == 0 && *text &&
        !(text_parse_guid(text, engine) && text_is_null_id(engine)))
        return fmt_encrypted(im, how, "Parallels Desktop");
    return 0;
}

/* Stores the text of an element that has no others in it. */
static int prl_xml_value(struct image *im, struct prl_xml *x, const char *path, char *text)
{
    struct prl_storage *storage = &x->storages[x->n_storages];
    struct prl_image *image = &x->images[x->n_images];
    struct prl_shot *shot = &x->shots[x->n_shots];
    const struct { const char *path; uint64_t *sectors; struct prl_guid *guid; } fields[] = {
        { PRL_XML_ROOT "/Disk_Parameters/Disk_size", &x->disk_size, NULL },
        { PRL_XML_ROOT "/StorageData/Storage/Start", &storage->start, NULL },
        { PRL_XML_ROOT "/StorageData/Storage/End", &storage->end, NULL },
        { PRL_XML_ROOT "/StorageData/Storage/Image/GUID", NULL, &image->guid },
        { PRL_XML_ROOT "/Snapshots/Shot/GUID", NULL, &shot->guid },
        { PRL_XML_ROOT "/Snapshots/Shot/ParentGUID", NULL, &shot->parent },
        { PRL_XML_ROOT "/Snapshots/TopGUID", NULL, &x->top },
    };
    size_t i;

    for (i = 0; i < ARRAY_LEN(fields) && strcmp(path, fields[i].path) != 0; i++)
        continue;
    if (i == ARRAY_LEN(fields))
        return prl_xml_text(im, image, path, text);
    if (fields[i].sectors)
        return util_parse_sectors(text, fields[i].sectors) ? 0 : prl_xml_bad(im, "a number of sectors", text);
    fields[i].guid->known = text_parse_guid(text, fields[i].guid->value);
    return fields[i].guid->known || (fields[i].guid == &x->top && !*text) ? 0 : prl_xml_bad(im, "a GUID", text);
}

static int prl_xml_begin(const struct image *im, struct prl_xml *x, const char *path)
{
    unsigned *n = strcmp(path, PRL_XML_ROOT "/StorageData/Storage") == 0         ? &x->n_storages
                  : strcmp(path, PRL_XML_ROOT "/StorageData/Storage/Image") == 0 ? &x->n_images
                  : strcmp(path, PRL_XML_ROOT "/Snapshots/Shot") == 0            ? &x->n_shots
                                                                                 : NULL;

    if (!n)
        return 0;
    if (*n == PRL_MAX_FILES)
        return prl_xml_bad(im, "too many of an element", util_basename(path));
    ++*n;
    if (n == &x->n_images)
        x->images[*n].storage = x->n_storages;
    return 0;
}

/* The '>' that ends a tag; NULL: there is none. Attributes may have one in quotes. */
static char *prl_xml_tag_end(char *p)
{
    for (; p && *p && *p != '>'; p++)
        if ((*p == '"' || *p == '\'') && !(p = strchr(p + 1, *p)))
            return NULL;
    return p && *p ? p : NULL;
}

/*
 * Parses one tag, from its '<' on; *next: what follows it. path: the open elements, each after a slash. *text: the
 * text of the innermost one; NULL: it has others in it.
 */
static int prl_xml_tag(struct image *im, struct prl_xml *x, char *path, char *tag, char **text, char **next)
{
    bool ends = tag[1] == '/', empty;
    char *name = tag + 1 + ends, *close = prl_xml_tag_end(name), *last = strrchr(path, '/');
    size_t len = strcspn(name, " \t\r\n/>"), open = strlen(path);
    int ret = 0;

    if (!close || !len || name + len > close)
        return prl_xml_bad(im, "not a tag", tag);
    *next = close + 1;
    empty = close[-1] == '/';
    if (ends) {
        if (!last || strlen(last + 1) != len || strncmp(last + 1, name, len) != 0)
            return prl_xml_bad(im, "the wrong element ends", tag);
        *tag = 0;
        if (*text)
            ret = prl_xml_value(im, x, path, text_trim(*text));
        *last = 0;
        *text = NULL;
        return ret;
    }
    if (open + 1 + len >= PRL_MAX_PATH)
        return prl_xml_bad(im, "nested too deeply", tag);
    snprintf(path + open, PRL_MAX_PATH - open, "/%.*s", (int)len, name);
    ret = prl_xml_begin(im, x, path);
    if (empty)
        path[open] = 0;             /* as if it were not there */
    *text = empty ? NULL : *next;
    return ret;
}

/* Parallels writes no document types, no entities of its own, no CDATA. */
static int prl_xml_parse(struct image *im, struct prl_xml *x)
{
    char path[PRL_MAX_PATH] = "", *tag, *next = x->text, *text = NULL;
    int ret = 0;

    while (!ret && (tag = strchr(next, '<'))) {
        if (tag[1] == '?' || strncmp(tag, "<!--", 4) == 0) {
            next = strstr(tag, tag[1] == '?' ? "?>" : "-->");   /* remains in the text around it */
            if (!next)
                return prl_xml_bad(im, "has no end", tag);
        } else if (tag[1] == '!') {
            return msg_err(-EOPNOTSUPP, "%s: declarations are not supported in a " PRL_XML_NAME " ('%.60s')", im->name,
                           tag);
        } else {
            ret = prl_xml_tag(im, x, path, tag, &text, &next);
        }
    }
    return ret || !*path ? ret : prl_xml_bad(im, "ends within an element", path);
}

static int prl_xml_load(struct image *im, struct prl_xml *x)
{
    struct file *f = &im->files[0];
    uint64_t done;
    int ret;

    if (f->size > PRL_MAX_XML)
        return msg_err(-EFBIG, "%s: too large for a " PRL_XML_NAME " (%" PRIu64 " bytes); 1 MiB is accepted", im->name,
                       (uint64_t)f->size);
    ret = file_pread(f, x->text, f->size, 0, &done);
    if (!ret && memchr(x->text, 0, f->size))
        ret = msg_err(-EINVAL, "%s: " PRL_XML_NAME " is not in UTF-8", im->name);
    return ret ? ret : prl_xml_parse(im, x);
}

/* -- from the descriptor to layers -- */

/* The index of a snapshot; 0: there is none. */
static unsigned prl_find_shot(const struct prl_xml *x, const uint8_t guid[16])
{
    for (unsigned i = 1; i <= x->n_shots; i++)
        if (memcmp(x->shots[i].guid.value, guid, 16) == 0)
            return i;
    return 0;
}

/* The snapshot to show: the user's, or the current state, which is named in one of two ways. */
static int prl_find_top(const struct image *im, const struct prl_xml *x, uint8_t guid[16])
{
    static const uint8_t current[16] = { 0x5f, 0xba, 0xab, 0xe3, 0x69, 0x58, 0x40, 0xff,
                                         0x92, 0xa7, 0x86, 0x0e, 0x32, 0x9a, 0xab, 0x41 };
    const char *wanted = im->depth == 0 ? im->opt->snapshot : NULL;

    if (wanted)
        return text_parse_guid(wanted, guid) && prl_find_shot(x, guid)
                   ? 0 : msg_err(-ENOENT, "%s: has no snapshot '%s' (it has %u)", im->name, wanted, x->n_shots);
    if (x->top.known || prl_find_shot(x, current))
        memcpy(guid, x->top.known ? x->top.value : current, 16);
    else if (x->n_shots == 1)
        memcpy(guid, x->shots[1].guid.value, 16);
    else
        return msg_err(-EINVAL, "%s: does not say which of its %u snapshots is the current one; --snapshot GUID does",
                       im->name, x->n_shots);
    return 0;
}

/* The chain of snapshots from the one to show down to the root. */
static int prl_find_chain(const struct image *im, const struct prl_xml *x, uint8_t chain[MAX_CHAIN][16], unsigned *n)
{
    const struct prl_shot *shot;
    char hex[33];
    int ret;

    *n = 0;
    if (!x->n_shots && x->n_images == x->n_storages && (im->depth || !im->opt->snapshot)) {
        memcpy(chain[(*n)++], x->images[1].guid.value, 16);
        return 0;
    }
    ret = prl_find_top(im, x, chain[0]);
    while (!ret) {
        text_hex(chain[*n], 16, hex);
        shot = &x->shots[prl_find_shot(x, chain[(*n)++])];
        if (!shot->guid.known || !shot->parent.known)
            return prl_xml_bad(im, "no snapshot, or not all of it, for this GUID", hex);
        if (text_is_null_id(shot->parent.value))
            return 0;
        if (*n > x->n_shots || *n == MAX_CHAIN)
            return prl_xml_bad(im, "snapshots in a circle, or too many, from", hex);
        memcpy(chain[*n], shot->parent.value, 16);
    }
    return ret;
}

static int prl_open_layer(struct image *im, struct prl_layer *l)
{
    const char *path = l->file->path;
    struct prl_header h = { .magic = { 0 } };
    uint64_t done, entries, sectors, data;
    uint32_t cluster;
    bool ext;
    int ret = 0;

    if (l->file->size >= PRL_HEADER)
        ret = file_pread(l->file, (uint8_t *)&h, sizeof(h), 0, &done);
    if (ret)
        return ret;
    ext = memcmp(h.magic, PRL_MAGIC_EXT, 16) == 0;
    if (!ext && memcmp(h.magic, PRL_MAGIC, 16) != 0)
        return msg_err(-EINVAL, "%s: is not a Parallels image", path);
    if (le32_to_cpu(h.version) != PRL_VERSION)
        return msg_err(-EOPNOTSUPP, "%s: Parallels image of unknown version %u, which is not supported; 2 is", path,
                       le32_to_cpu(h.version));
    cluster = le32_to_cpu(h.cluster_sectors);
    entries = le32_to_cpu(h.n_entries);
    sectors = ext ? le64_to_cpu(h.sectors) : (uint32_t)le64_to_cpu(h.sectors);
    if (cluster == 0 || cluster > PRL_MAX_CLUSTER)
        return fmt_refuse_in(im, path, "not 1 to 4186127 sectors: the cluster size", cluster);
    if (entries > (l->file->size - PRL_HEADER) / 4)
        return fmt_refuse_in(im, path, "the number of clusters, whose table does not fit into the file", entries);
    if (sectors > entries * cluster || sectors > (uint64_t)MAX_IMAGE_SIZE / PRL_SECTOR)
        return fmt_refuse_in(im, path, "the size, larger than all clusters together", sectors);
    l->size = sectors * PRL_SECTOR;
    l->cluster = cluster * PRL_SECTOR;
    l->unit = ext ? l->cluster : PRL_SECTOR;
    l->first = PRL_HEADER + 4 * entries;
    data = (uint64_t)le32_to_cpu(h.data_sector) * PRL_SECTOR;
    if (data >= l->first && data <= l->file->size) {    /* an invalid one is not needed */
        l->first = data;
        l->aligned = !ext;
    }
    if (le32_to_cpu(h.in_use) == PRL_IN_USE && !im->dirty) {
        im->dirty = true;
        msg_say(MSG_NOTE, "%s: is marked as in use (not closed properly); reading it is safe", path);
    }
    return 0;
}

/* Opens a storage's image of one snapshot. Only the root may be a plain file: it has no holes. */
static int prl_open_image(struct image *im, const struct prl_xml *x, unsigned storage, const uint8_t guid[16],
                          bool root, struct prl_layer *l)
{
    const struct prl_image *found = NULL, *i;
    char hex[33];
    int ret;

    text_hex(guid, 16, hex);
    for (i = x->images + 1; i <= x->images + x->n_images; i++) {
        if (i->storage != storage || memcmp(i->guid.value, guid, 16) != 0)
            continue;
        if (found || !i->guid.known || !i->type || !i->file)
            return prl_xml_bad(im, "a storage's image is there twice, or lacks a part, of snapshot", hex);
        found = i;
    }
    if (!found)
        return prl_xml_bad(im, "a storage has no image of snapshot", hex);
    l->plain = strcmp(found->type, "Plain") == 0;
    if (l->plain && !root)
        return prl_xml_bad(im, "a snapshot that is a plain file but has a parent", found->file);
    l->file = &im->files[im->n_files++];
    l->start = x->storages[storage].start * PRL_SECTOR;
    l->size = UINT64_MAX;
    ret = fmt_open_named(im, l->file, found->file, "image file", NULL);
    if (ret == -ENOENT)
        msg_err(ret, "%s: cannot open its image file '%s': %s", im->name, found->file, strerror(ENOENT));
    return ret || l->plain ? ret : prl_open_layer(im, l);
}

/* The index of the storage that begins at `start`; 0: there is none. */
static unsigned prl_find_storage(const struct prl_xml *x, uint64_t start)
{
    for (unsigned s = 1; s <= x->n_storages; s++)
        if (x->storages[s].start == start && x->storages[s].end > start)
            return s;
    return 0;
}

static int prl_open_storages(struct image *im, const struct prl_xml *x, uint8_t chain[][16], unsigned n_chain)
{
    struct prl *p = im->state;
    struct prl_layer *l = p->layers;
    uint64_t start = 0, end;
    unsigned s;
    int ret = 0;

    p->storages = (struct ranges){ p->range, x->n_storages };
    p->n_layers = n_chain;
    for (unsigned k = 0; k < x->n_storages; k++, start = end) {
        s = prl_find_storage(x, start);
        if (!s)
            return msg_err(-EINVAL, "%s: damaged or hostile " PRL_XML_NAME ": no storage begins at sector %" PRIu64,
                           im->name, start);
        for (unsigned i = 0; i < n_chain && !ret; i++)
            ret = prl_open_image(im, x, s, chain[i], i + 1 == n_chain, &l[i]);
        if (ret)
            return ret;
        end = x->storages[s].end;
        if (l->size / PRL_SECTOR < end - start)
            /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): every storage has a file by now */
            return fmt_refuse_in(im, l->file->path, "the size, smaller than its storage", l->size);
        p->range[k] = (struct range){ start * PRL_SECTOR, end * PRL_SECTOR };
        l += n_chain;
    }
    if (!x->disk_size || x->disk_size > start)
        return msg_err(-EINVAL, "%s: damaged or hostile " PRL_XML_NAME ": a disk of %" PRIu64 " sectors, and storages "
                       "of %" PRIu64, im->name, x->disk_size, start);
    im->size = x->disk_size * PRL_SECTOR;
    im->cluster_size = p->layers->cluster;
    im->entry_size = 4;
    return 0;
}

static int prl_open_described(struct image *im, const struct prl_xml *x)
{
    uint8_t chain[MAX_CHAIN][16] = { 0 };
    unsigned n = 0;
    int ret;

    if (!x->n_storages || !x->n_images)
        return msg_err(-EINVAL, "%s: " PRL_XML_NAME " has no storages", im->name);
    ret = prl_find_chain(im, x, chain, &n);
    if (ret)
        return ret;
    if (x->n_storages * n > PRL_MAX_FILES)
        return msg_err(-E2BIG, "%s: needs more than %d files", im->name, PRL_MAX_FILES);
    return prl_open_storages(im, x, chain, n);
}

static int prl_open_bundle(struct image *im)
{
    struct prl_xml *x = util_fault("parallels descriptor") ? NULL : calloc(1, sizeof(*x));
    int ret;

    if (!x)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = prl_xml_load(im, x);
    if (!ret)
        ret = prl_open_described(im, x);
    free(x);
    return ret;
}

/* The snapshot below the image called `name`; NULL: none. */
static const uint8_t *prl_find_parent(const struct prl_xml *x, const char *name)
{
    const uint8_t *parent;

    for (unsigned i = 1; i <= x->n_images; i++) {
        parent = x->shots[prl_find_shot(x, x->images[i].guid.value)].parent.value;
        if (x->images[i].file && strcmp(util_basename(x->images[i].file), name) == 0 && !text_is_null_id(parent))
            return parent;
    }
    return NULL;
}

/* A single image may be a snapshot over another one, as the descriptor beside it says: its holes are not zeros then. */
static int prl_check_alone(struct image *im)
{
    struct prl_xml *x = util_fault("parallels snapshot") ? NULL : calloc(1, sizeof(*x));
    struct file f = { 0 };
    struct image beside = { .format = im->format, .opt = im->opt, .files = &f, .n_files = 1 };
    const uint8_t *parent = NULL;
    char uuid[37];
    int ret = 0;

    if (!x)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    msg_hushed++;
    if (fmt_open_named(im, &f, PRL_XML_NAME, "descriptor", NULL) == 0) {
        beside.name = f.path;
        (void)prl_xml_load(&beside, x);     /* of a damaged one, what comes before the damage */
        parent = prl_find_parent(x, util_basename(im->files[0].path));
    }
    msg_hushed--;
    if (parent) {
        text_uuid(parent, uuid);
        snprintf(im->backing_name, sizeof(im->backing_name), "snapshot {%s}", uuid);
        if (!im->opt->no_backing && !im->opt->top_only)
            ret = msg_err(-EINVAL, "%s: holds only what changed since %s; its directory, as IMAGE, is the whole disk; "
                          "--no-backing shows what is in it, with errors for the rest", im->name, im->backing_name);
    } else if (file_is_open(&f) && im->depth == 0) {
        msg_say(MSG_NOTE, "%s: shown alone; its directory, as IMAGE, is the whole disk with its snapshots", im->name);
    }
    free(x);
    file_forget(&f);
    return ret;
}

static int prl_open_single(struct image *im)
{
    struct prl *p = im->state;
    int ret;

    if (im->opt->snapshot && im->depth == 0)
        return msg_err(-EINVAL, "%s: has no snapshots, so --snapshot is of no use", im->name);
    p->layers->file = &im->files[0];
    ret = prl_open_layer(im, p->layers);
    if (ret)
        return ret;
    p->storages = (struct ranges){ p->range, 1 };
    p->n_layers = 1;
    im->size = p->range->end = p->layers->size;
    im->cluster_size = p->layers->cluster;
    im->entry_size = 4;
    return prl_check_alone(im);
}

static bool prl_is_xml(const uint8_t *head, size_t len)
{
    size_t i = len >= 3 && memcmp(head, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;

    while (i < len && isspace(head[i]))
        i++;
    return i < len && head[i] == '<' && memmem(head + i, len - i, PRL_XML_ROOT + 1, strlen(PRL_XML_ROOT) - 1);
}

static int prl_probe(const struct probe *p)
{
    return (p->head_len >= PRL_HEADER &&
            (memcmp(p->head, PRL_MAGIC, 16) == 0 || memcmp(p->head, PRL_MAGIC_EXT, 16) == 0)) ||
                   prl_is_xml(p->head, p->head_len) ? 100 : 0;
}

static uint64_t prl_header_length(struct file *f)
{
    return f->size ? PRL_HEADER : 0;
}

static int prl_open(struct image *im)
{
    uint8_t head[4096];
    uint64_t len = util_min(im->files[0].size, sizeof(head));
    int ret = file_pread_front(&im->files[0], head, util_min(len, PRL_HEADER), &len, 0);

    if (ret)
        return ret;
    return prl_is_xml(head, len) ? prl_open_bundle(im) : prl_open_single(im);
}

/* -- mapping -- */

/* One cluster of one layer, or the rest of it; offset counts from the storage's start. */
static void prl_map_layer(const struct prl_layer *l, uint64_t offset, uint64_t length, struct extent *ext)
{
    uint64_t in_cluster, host;
    uint32_t entry;

    if (l->plain) {
        ext_data(ext, length, l->file, offset, l->file->size);
        ext->sparse = ext->kind == EXT_DATA;
        return;
    }
    *ext = (struct extent){ .kind = EXT_BACKING, .length = length };
    if (offset >= l->size)
        return;                     /* a snapshot from when the disk was smaller */
    in_cluster = offset % l->cluster;
    ext->length = length = util_min(util_min(length, l->size - offset), l->cluster - in_cluster);
    if (cache_le32(l->file, PRL_HEADER + offset / l->cluster * 4, &entry)) {
        ext_bad(ext, length, "the BAT cannot be read");
        return;
    }
    host = (uint64_t)entry * l->unit;
    if (!entry)
        return;
    if (host < l->first || (l->aligned && (host - l->first) % l->cluster))
        ext_bad(ext, length, "its BAT entry is damaged");
    else
        ext_data(ext, length, l->file, host + in_cluster, l->file->size);
}

/* The first layer of the storage that has it. */
static void prl_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct prl *p = im->state;
    unsigned storage = util_range_after(&p->storages, offset);
    const struct prl_layer *l = &p->layers[(size_t)storage * p->n_layers];

    length = util_min(length, p->range[storage].end - offset);
    for (unsigned i = 0; i < p->n_layers; i++, l++) {
        prl_map_layer(l, offset - l->start, length, ext);
        if (ext->kind != EXT_BACKING)
            return;
        length = ext->length;
    }
    ext->kind = ext_hole(im);
}

static void prl_claim_entry(struct claims *c, const struct image *im, const void *by, uint64_t i, const uint8_t *bytes)
{
    const struct prl_layer *l = by;
    uint64_t entry = util_le32(bytes), offset = i * l->cluster;

    (void)im;
    if (entry)
        c->claim(c, l->file, entry * l->unit, util_min(l->cluster, l->size - offset), NULL, l->start + offset);
}

static bool prl_claims(struct image *im, struct claims *c)
{
    const struct prl *p = im->state;
    const struct prl_layer *l = p->layers;

    for (unsigned i = 0; i < p->storages.n; i++)
        for (unsigned k = 0; k < p->n_layers; k++, l++) {
            if (l->plain) {
                c->claim(c, l->file, 0, p->range[i].end - l->start, NULL, l->start);
                continue;
            }
            uint64_t n = (l->size + l->cluster - 1) / l->cluster;
            c->claim(c, l->file, 0, PRL_HEADER + 4 * n, "the header and the BAT", 0);
            ext_claim_table(c, im, l, l->file, PRL_HEADER, n, 4, prl_claim_entry);
        }
    return true;
}

/* QEMU knows single images only. */
static bool prl_as_qemu(struct image *im)
{
    return im->n_files == 1;
}

static const struct image_format prl_format = {
    .name = "parallels",
    .describe = "Parallels images, and directories of them (.hdd) with storages and snapshots",
    .writes = "overlay",
    .directory_file = PRL_XML_NAME,
    .has_snapshots = true,
    .state_size = sizeof(struct prl),
    .extensions = " hdd hds ",
    .probe = prl_probe,
    .header_length = prl_header_length,
    .open = prl_open,
    .map = prl_map,
    .claims = prl_claims,
    .as_qemu = prl_as_qemu,
};

/* ******************************************************************************************************** *
 * 21. qcow2
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

#define QCOW2_MAGIC 0x514649fbu                 /* "QFI\xfb" */

struct qcow2_header {
    be32 magic;                     /* 0x00 */
    be32 version;                   /* 0x04: 2 or 3 */
    be64 backing_offset;            /* 0x08: of the backing file's name, in the first cluster; 0: none */
    be32 backing_length;            /* 0x10: of that name, at most QCOW2_MAX_NAME */
    be32 cluster_bits;              /* 0x14: 9 to 21 */
    be64 size;                      /* 0x18: of the disk */
    be32 crypt;                     /* 0x20: enum qcow2_crypt */
    be32 l1_entries;                /* 0x24 */
    be64 l1_offset;                 /* 0x28 */
    be64 refcounts_offset;          /* 0x30: of the refcount table */
    be32 refcounts_clusters;        /* 0x38: of the refcount table */
    be32 n_snapshots;               /* 0x3c */
    be64 snapshots_offset;          /* 0x40 */
    /* the rest only in version 3 */
    be64 incompatible;              /* 0x48: QCOW2_DIRTY ... */
    be64 compatible;                /* 0x50: QCOW2_LAZY_REFCOUNTS */
    be64 autoclear;                 /* 0x58: QCOW2_BITMAPS, QCOW2_RAW_DATA */
    be32 refcount_order;            /* 0x60: log2 of a refcount's bits, 0 to 6; version 2: 4 */
    be32 header_length;             /* 0x64 */
    uint8_t compression;            /* 0x68: 1: zstd; not there in a header of 104 bytes */
    uint8_t reserved[7];            /* 0x69 */
};
_Static_assert(sizeof(struct qcow2_header) == 112, "qcow2 header");

enum {
    QCOW2_HEADER_V2 = offsetof(struct qcow2_header, incompatible),
    QCOW2_HEADER_V3 = offsetof(struct qcow2_header, compression),
    /* incompatible features */
    QCOW2_DIRTY = 1,                    /* refcounts may be out of date */
    QCOW2_CORRUPT = 2,
    QCOW2_DATA_FILE = 4,
    QCOW2_COMPRESSION = 8,              /* other than zlib */
    QCOW2_EXTL2 = 16,                   /* subclusters */
    QCOW2_KNOWN = QCOW2_DIRTY | QCOW2_CORRUPT | QCOW2_DATA_FILE | QCOW2_COMPRESSION | QCOW2_EXTL2,
    /* compatible */
    QCOW2_LAZY_REFCOUNTS = 1,
    /* autoclear */
    QCOW2_BITMAPS = 1,                  /* the bitmaps are up to date, and listed */
    QCOW2_RAW_DATA = 2,
    /* limits, those of QEMU */
    QCOW2_MAX_BITMAPS = 65535,
    QCOW2_MAX_L1 = 32 << 20,            /* bytes */
    QCOW2_MAX_REFCOUNT_TABLE = 8 << 20, /* bytes */
    QCOW2_MAX_NAME = 1023,
    QCOW2_MAX_SNAPSHOTS = 65536,
    QCOW2_SUBCLUSTERS = 32,
};
enum qcow2_crypt { QCOW2_PLAIN, QCOW2_AES, QCOW2_LUKS };
static const char *const qcow2_crypt_names[] = { "none", "AES", "LUKS" };

/* A header extension: its data follows, and zeros up to a multiple of 8 bytes. Type 0 ends the list. */
struct qcow2_extension {
    be32 type;                      /* 0x00 */
    be32 length;                    /* 0x04: of the data */
};
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acau    /* a name */
#define QCOW2_EXT_FEATURES 0x6803f857u          /* entries of 48 bytes: type, bit, name */
#define QCOW2_EXT_DATA_FILE 0x44415441u         /* a name */
#define QCOW2_EXT_BITMAPS 0x23852875u
#define QCOW2_EXT_CRYPT 0x0537be77u
#define QCOW2_EXT_BASE_SIZE 0x66786273u         /* ours */

struct qcow2_bitmaps_extension {
    be32 n_bitmaps;                 /* 0x00 */
    be32 reserved;                  /* 0x04 */
    be64 directory_size;            /* 0x08 */
    be64 directory_offset;          /* 0x10 */
};
_Static_assert(sizeof(struct qcow2_bitmaps_extension) == 24, "qcow2 bitmaps extension");

struct qcow2_crypt_extension {
    be64 offset;                    /* 0x00: of the LUKS header */
    be64 length;                    /* 0x08 */
};

struct qcow2_base_extension {
    be64 size;                      /* 0x00: the backing file's size when the overlay was made */
    be64 name_hash;                 /* 0x08: util_hash() of its name: another name, and the size says nothing */
};

/* An entry of the snapshot table, from a multiple of 8 bytes. Extra data, the id and the name follow. */
struct qcow2_snapshot_header {
    be64 l1_offset;                 /* 0x00 */
    be32 l1_entries;                /* 0x08 */
    be16 id_length;                 /* 0x0c */
    be16 name_length;               /* 0x0e */
    be32 seconds;                   /* 0x10: when it was made */
    be32 nanoseconds;               /* 0x14 */
    be64 clock;                     /* 0x18: nanoseconds that the guest had run */
    be32 vm_state_size;             /* 0x20 */
    be32 extra_length;              /* 0x24: bytes of struct qcow2_snapshot_extra that are there, or more */
};
_Static_assert(sizeof(struct qcow2_snapshot_header) == 40, "qcow2 snapshot");

struct qcow2_snapshot_extra {
    be64 vm_state_size;             /* 0x00: instead of the other one */
    be64 size;                      /* 0x08: of the disk; version 3 always has it */
    be64 icount;                    /* 0x10: instructions that the guest had run */
};
_Static_assert(sizeof(struct qcow2_snapshot_extra) == 24, "qcow2 snapshot, extra data");

/* An entry of the bitmap directory, from a multiple of 8 bytes. Extra data and the name follow. */
struct qcow2_bitmap_header {
    be64 table_offset;              /* 0x00 */
    be32 table_entries;             /* 0x08 */
    be32 flags;                     /* 0x0c: QCOW2_BITMAP_... */
    uint8_t type;                   /* 0x10 */
    uint8_t granularity_bits;       /* 0x11: 0 to 31 */
    be16 name_length;               /* 0x12 */
    be32 extra_length;              /* 0x14 */
};
_Static_assert(sizeof(struct qcow2_bitmap_header) == 24, "qcow2 bitmap");
enum { QCOW2_BITMAP_IN_USE = 1, QCOW2_BITMAP_AUTO = 2 };

/* Entries of the tables: an offset, a multiple of the cluster size, and flags. */
#define QCOW2_OFFSET 0x00fffffffffffe00u
#define QCOW2_COPIED (1ull << 63)               /* L1, L2: its refcount is 1 */
#define QCOW2_COMPRESSED (1ull << 62)           /* L2: see qcow2_coded_range() */
#define QCOW2_ZERO 1u                           /* L2 without subclusters: reads as zeros */
#define QCOW2_L1_RESERVED 0x7f000000000001ffu
#define QCOW2_L2_RESERVED 0x3f000000000001feu
#define QCOW2_BITMAP_RESERVED 0xff000000000001feu
#define QCOW2_REFCOUNT_BLOCK 0xfffffffffffffe00u

struct qcow2 {
    uint32_t version, cluster_bits, l2_bits, entry_size;    /* l2_bits: log2 of the entries of an L2 table */
    uint64_t size, incompatible, compatible, autoclear;
    _Atomic uint64_t l1_offset, l1_entries;                 /* change when the image is made longer */
    uint64_t refcounts_offset, refcounts_entries;           /* the refcount table; under writer.lock */
    uint32_t header_length, refcount_order;                 /* log2 of a refcount's bits */
    uint64_t snapshots_offset, bitmaps_offset, bitmaps_size;/* not looked at before they are wanted */
    uint32_t n_snapshots, n_bitmaps;
    uint32_t crypt;                 /* enum qcow2_crypt */
    uint64_t crypt_offset, crypt_size;      /* the LUKS header with its keys: without it all is lost */
    uint64_t backing_hash;          /* see struct qcow2_base_extension */
    bool subclusters, v2;
    bool preallocated;              /* see qcow2_find_holes() */
    bool shared;                    /* the active tables share clusters, see qcow2_reclaim_cluster_locked() */
    uint64_t clean;                 /* from the end of the disk to here all reads as zeros; under size_lock */
    enum codec codec;
    struct file *data;              /* where clusters lie: the image itself or the external data file */
    struct qcow2_writer *w;         /* NULL: only read */
    char data_name[QCOW2_MAX_NAME + 1];
};

static uint64_t qcow2_cluster(const struct qcow2 *q)
{
    return 1ull << q->cluster_bits;
}

static int qcow2_probe(const struct probe *p)
{
    const struct qcow2_header *h = (const void *)p->head;

    return p->head_len >= 8 && be32_to_cpu(h->magic) == QCOW2_MAGIC && be32_to_cpu(h->version) >= 2 ? 100 : 0;
}

static uint64_t qcow2_header_length(struct file *f)
{
    struct qcow2_header h;

    return file_read(f, &h, QCOW2_HEADER_V2, 0) ? 0 : 1ull << (be32_to_cpu(h.cluster_bits) & 31);
}

static int qcow2_read(struct image *im, uint64_t offset, void *buf, uint64_t len, const char *what)
{
    return fmt_read(im, &im->files[0], offset, buf, len, what);
}

/* Names unknown incompatible features, from the image's own table where it has one. */
static int qcow2_unknown_feature(const struct image *im, uint64_t bits, const uint8_t *table, uint32_t len)
{
    unsigned bit = (unsigned)__builtin_ctzll(bits);

    for (uint32_t at = 0; table && at + 48 <= len; at += 48)
        if (table[at] == 0 && table[at + 1] == bit)
            return msg_err(-EOPNOTSUPP, "%s: needs the unknown qcow2 feature '%.46s' (bit %u), which is not supported",
                           im->name, (const char *)table + at + 2, bit);
    return msg_err(-EOPNOTSUPP, "%s: needs an unknown qcow2 feature (incompatible bit %u), which is not supported",
                   im->name, bit);
}

static int qcow2_read_extension(struct image *im, struct qcow2 *q, uint32_t type, const uint8_t *data, uint32_t n)
{
    const struct qcow2_bitmaps_extension *bitmaps = (const void *)data;
    const struct qcow2_crypt_extension *crypt = (const void *)data;
    const struct qcow2_base_extension *base = (const void *)data;

    if (type == QCOW2_EXT_FEATURES && (q->incompatible & ~(uint64_t)QCOW2_KNOWN))
        return qcow2_unknown_feature(im, q->incompatible & ~(uint64_t)QCOW2_KNOWN, data, n);
    if (type == QCOW2_EXT_BACKING_FORMAT && !util_copy_name(im->backing_format, sizeof(im->backing_format), data, n))
        return fmt_refuse(im, "the name of the backing format: up to 31 bytes, none of them 0", n);
    if (type == QCOW2_EXT_DATA_FILE && !util_copy_name(q->data_name, sizeof(q->data_name), data, n))
        return fmt_refuse(im, "the name of the data file: up to 1023 bytes, none of them 0", n);
    if (type == QCOW2_EXT_BITMAPS && n >= sizeof(*bitmaps) && (q->autoclear & QCOW2_BITMAPS)) {
        q->n_bitmaps = be32_to_cpu(bitmaps->n_bitmaps);
        q->bitmaps_size = be64_to_cpu(bitmaps->directory_size);
        q->bitmaps_offset = be64_to_cpu(bitmaps->directory_offset);
    }
    if (type == QCOW2_EXT_CRYPT && n >= sizeof(*crypt)) {
        q->crypt_offset = be64_to_cpu(crypt->offset);
        q->crypt_size = be64_to_cpu(crypt->length);
    }
    if (type == QCOW2_EXT_BASE_SIZE && n == sizeof(*base)) {
        im->backing_size = be64_to_cpu(base->size);
        q->backing_hash = be64_to_cpu(base->name_hash);
    }
    return 0;
}

/*
 * Header extensions end at the first cluster's end, or where the name of the backing file lies. Not whole: behind len
 * the cluster cannot be read, so that they must have ended before.
 */
static int qcow2_read_extensions(struct image *im, struct qcow2 *q, const uint8_t *cluster, uint64_t len, bool whole)
{
    const struct qcow2_extension *ext;
    uint64_t name = be64_to_cpu(((const struct qcow2_header *)(const void *)cluster)->backing_offset);
    uint32_t type = UINT32_MAX, n;
    int ret;

    if (name >= q->header_length)   /* some images have no end marker */
        len = util_min(len, name);
    for (uint64_t at = q->header_length; at + sizeof(*ext) <= len; at += sizeof(*ext) + ((uint64_t)n + 7) / 8 * 8) {
        ext = (const void *)(cluster + at);
        type = be32_to_cpu(ext->type);
        n = be32_to_cpu(ext->length);
        if (type == 0)
            break;
        if (n > len - at - sizeof(*ext))
            return fmt_refuse(im, "a header extension reaches past the first cluster", n);
        ret = qcow2_read_extension(im, q, type, cluster + at + sizeof(*ext), n);
        if (ret)
            return ret;
    }
    if (!whole && type && len != name)
        return msg_err(-EIO, "%s: its header extensions cannot be read", im->name);
    if (q->crypt == QCOW2_LUKS && !q->crypt_size)
        return fmt_refuse(im, "LUKS without its header", q->crypt_size);
    if (q->incompatible & ~(uint64_t)QCOW2_KNOWN)
        return qcow2_unknown_feature(im, q->incompatible & ~(uint64_t)QCOW2_KNOWN, NULL, 0);
    return 0;
}

static int qcow2_check_header(struct image *im, struct qcow2 *q, uint32_t compression)
{
    if (q->version != 2 && q->version != 3)
        return msg_err(-EOPNOTSUPP, "%s: qcow2 of unknown version %u, which is not supported; 2 and 3 are", im->name,
                       q->version);
    if (q->cluster_bits < 9 || q->cluster_bits > 21)
        return fmt_unsupported(im, "the cluster size, as a power of 2 from 9 to 21", q->cluster_bits);
    if (q->crypt > QCOW2_LUKS)
        return msg_err(-EOPNOTSUPP, "%s: is encrypted by method %u, which is not supported", im->name, q->crypt);
    if (q->header_length < (q->v2 ? QCOW2_HEADER_V2 : QCOW2_HEADER_V3) || q->header_length > 1u << q->cluster_bits)
        return fmt_refuse(im, "the header's length, from 104 bytes to a cluster", q->header_length);
    if (q->refcount_order > 6)
        return fmt_refuse(im, "the refcount width, as a power of 2 from 0 to 6", q->refcount_order);
    if (compression > 1 && (q->incompatible & QCOW2_COMPRESSION))
        return fmt_unsupported(im, "the compression type, which is 0 (zlib) or 1 (zstd)", compression);
    if ((compression != 0) != !!(q->incompatible & QCOW2_COMPRESSION))
        return fmt_refuse(im, "the compression type, unlike the feature bit for it", compression);
    q->codec = compression ? CODEC_ZSTD : CODEC_DEFLATE;
    if (q->crypt && fmt_encrypted(im, qcow2_crypt_names[q->crypt], "qemu-img convert"))
        return -EOPNOTSUPP;
    if ((q->autoclear & QCOW2_RAW_DATA) && !(q->incompatible & QCOW2_DATA_FILE))
        return fmt_refuse(im, "raw external data without a data file", q->autoclear);
    if (q->subclusters && q->cluster_bits < 14)
        return fmt_refuse(im, "subclusters need clusters of 16 KiB (2^14 bytes) at least", q->cluster_bits);
    if (q->size > (uint64_t)MAX_IMAGE_SIZE)
        return fmt_refuse(im, "the size, at most 2^63 - 1 bytes", q->size);
    return 0;
}

static int qcow2_read_header(struct image *im, struct qcow2 *q)
{
    struct qcow2_header h = { .reserved = { 0 } };
    int ret = qcow2_read(im, 0, &h, util_min(im->files[0].size, sizeof(h)), "the header");

    if (!ret && (im->files[0].size < QCOW2_HEADER_V2 || be32_to_cpu(h.magic) != QCOW2_MAGIC))
        ret = msg_err(-EINVAL, "%s: is not a qcow2 image", im->name);
    if (ret)
        return ret;
    q->version = be32_to_cpu(h.version);
    q->v2 = q->version == 2;
    q->cluster_bits = be32_to_cpu(h.cluster_bits);
    q->size = be64_to_cpu(h.size);
    q->crypt = be32_to_cpu(h.crypt);
    q->l1_entries = be32_to_cpu(h.l1_entries);
    q->l1_offset = be64_to_cpu(h.l1_offset);
    q->refcounts_offset = be64_to_cpu(h.refcounts_offset);
    q->refcounts_entries = (uint64_t)be32_to_cpu(h.refcounts_clusters) << (q->cluster_bits & 31) >> 3;
    q->n_snapshots = be32_to_cpu(h.n_snapshots);
    q->snapshots_offset = be64_to_cpu(h.snapshots_offset);
    q->incompatible = q->v2 ? 0 : be64_to_cpu(h.incompatible);
    q->compatible = q->v2 ? 0 : be64_to_cpu(h.compatible);
    q->autoclear = q->v2 ? 0 : be64_to_cpu(h.autoclear);
    q->refcount_order = q->v2 ? 4 : be32_to_cpu(h.refcount_order);
    q->header_length = q->v2 ? QCOW2_HEADER_V2 : be32_to_cpu(h.header_length);
    q->subclusters = q->incompatible & QCOW2_EXTL2;
    q->entry_size = q->subclusters ? 16 : 8;
    q->l2_bits = q->cluster_bits - (q->subclusters ? 4 : 3);
    return qcow2_check_header(im, q, q->header_length > QCOW2_HEADER_V3 ? h.compression : 0);
}

/* The name of the backing file lies in the first cluster. */
static int qcow2_read_backing_name(struct image *im, struct qcow2 *q, const uint8_t *cluster, uint64_t len)
{
    const struct qcow2_header *h = (const void *)cluster;
    uint64_t offset = be64_to_cpu(h->backing_offset), hash = UTIL_HASH_START;
    uint32_t n = be32_to_cpu(h->backing_length);

    if (offset && (n > QCOW2_MAX_NAME || offset > len || n > len - offset ||
                   !util_copy_name(im->backing_name, sizeof(im->backing_name), cluster + offset, n)))
        return fmt_refuse(im, "the name of the backing file: up to 1023 bytes, none of them 0, in the first cluster",
                          n);
    util_hash(&hash, im->backing_name);
    if (hash != q->backing_hash)    /* rebased since */
        im->backing_size = 0;
    return 0;
}

/* What the first cluster has behind the header. */
static int qcow2_read_names(struct image *im, struct qcow2 *q)
{
    uint64_t all = util_min(1u << q->cluster_bits, im->files[0].size), len = all;
    uint8_t *cluster = malloc(all);
    int ret;

    if (!cluster)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = file_pread_front(&im->files[0], cluster, q->header_length, &len, 0);
    if (!ret)
        ret = qcow2_read_extensions(im, q, cluster, len, len == all);
    if (!ret)
        ret = qcow2_read_backing_name(im, q, cluster, len);
    free(cluster);
    return ret;
}

/* The L1 table, of the image or of a snapshot, must be inside the file and long enough for the disk. */
static int qcow2_check_l1(struct image *im, const struct qcow2 *q)
{
    uint64_t covers = (uint64_t)q->cluster_bits + q->l2_bits, need = q->size ? ((q->size - 1) >> covers) + 1 : 0;
    uint64_t file_size = im->files[0].size, refcounts_size = q->refcounts_entries * 8;

    if (q->l1_entries > QCOW2_MAX_L1 / 8 || q->l1_entries < need)
        return fmt_refuse(im, "the size of the L1 table: as many entries as the disk needs, up to 32 MiB of them",
                          q->l1_entries);
    if (need && (q->l1_offset % qcow2_cluster(q) || q->l1_offset > file_size || !q->l1_offset ||
                 need * 8 > file_size - q->l1_offset))
        return fmt_refuse_table(im, &im->files[0], "the offset of the L1 table", q->l1_offset, need * 8);
    /* One of the two is wrong. An impossible refcount table proves nothing, and reading does not need it. */
    if (need && q->l1_offset < q->refcounts_offset + refcounts_size && q->refcounts_offset < q->l1_offset + need * 8 &&
        q->refcounts_offset % qcow2_cluster(q) == 0 && refcounts_size <= QCOW2_MAX_REFCOUNT_TABLE &&
        q->refcounts_offset < file_size)
        return fmt_refuse(im, "the offset of the L1 table, in the refcount table", q->l1_offset);
    return 0;
}

struct qcow2_snapshot {
    uint64_t l1_offset, l1_entries, size, next;
    uint64_t clock, vm_state;       /* nanoseconds that the guest had run; bytes */
    uint64_t icount;                /* instructions it had run; UINT64_MAX: not known */
    uint32_t seconds, nanoseconds, extra_len;
    char id[256], name[1024];
};

/* Reads the entry of the snapshot table at sn->next, and sets sn->next to the offset of the one after it. */
static int qcow2_next_snapshot(struct image *im, const struct qcow2 *q, struct qcow2_snapshot *sn)
{
    static const char past_end[] = "the snapshot table reaches past the end";
    struct qcow2_snapshot_header h = { 0 };
    struct qcow2_snapshot_extra extra = { 0 };
    uint32_t id_len, name_len, extra_len;
    uint64_t at = sn->next + sizeof(h);
    int ret = qcow2_read(im, sn->next, &h, sizeof(h), past_end);

    if (ret)
        return ret;
    id_len = be16_to_cpu(h.id_length);
    name_len = be16_to_cpu(h.name_length);
    extra_len = be32_to_cpu(h.extra_length);
    if (extra_len > 1024 || id_len >= sizeof(sn->id) || name_len >= sizeof(sn->name))
        return fmt_refuse(im, "a snapshot's entry: up to 1024 bytes of extra data, 255 of id and 1023 of name",
                          extra_len);
    ret = qcow2_read(im, at, &extra, util_min(extra_len, sizeof(extra)), past_end);
    if (!ret)
        ret = qcow2_read(im, at + extra_len, sn->id, id_len, past_end);
    if (!ret)
        ret = qcow2_read(im, at + extra_len + id_len, sn->name, name_len, past_end);
    if (ret)
        return ret;
    sn->id[id_len] = sn->name[name_len] = 0;
    sn->l1_offset = be64_to_cpu(h.l1_offset);
    sn->l1_entries = be32_to_cpu(h.l1_entries);
    sn->seconds = be32_to_cpu(h.seconds);
    sn->nanoseconds = be32_to_cpu(h.nanoseconds);
    sn->clock = be64_to_cpu(h.clock);
    sn->extra_len = extra_len;
    sn->vm_state = extra_len >= 8 ? be64_to_cpu(extra.vm_state_size) : be32_to_cpu(h.vm_state_size);
    sn->size = extra_len >= 16 ? be64_to_cpu(extra.size) : q->size;
    sn->icount = extra_len >= 24 ? be64_to_cpu(extra.icount) : UINT64_MAX;
    sn->next = at + ((uint64_t)extra_len + id_len + name_len + 7) / 8 * 8;
    return 0;
}

/* By id first, then by name, as qemu-img does. */
static int qcow2_use_snapshot(struct image *im, struct qcow2 *q, const char *wanted)
{
    struct qcow2_snapshot sn = { 0 };
    uint32_t n = q->n_snapshots;
    int ret;

    if (n > QCOW2_MAX_SNAPSHOTS)
        return fmt_refuse(im, "the number of snapshots, at most 65536", n);
    for (int by_name = 0; by_name < 2; by_name++) {
        sn.next = q->snapshots_offset;
        for (uint32_t i = 0; i < n; i++) {
            ret = qcow2_next_snapshot(im, q, &sn);
            if (ret)
                return ret;
            if (strcmp(by_name ? sn.name : sn.id, wanted) != 0)
                continue;
            q->l1_offset = sn.l1_offset;
            q->l1_entries = sn.l1_entries;
            q->size = sn.size;
            return q->size > (uint64_t)MAX_IMAGE_SIZE ? fmt_refuse(im, "the snapshot's size", q->size) : 0;
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
    im->n_files = 2;
    q->data = f;
    return user ? file_open(f, user, im->writable)
                : fmt_open_named(im, f, q->data_name, "external data file", "--data-file");
}

static int qcow2_open(struct image *im)
{
    struct qcow2 *q = im->state;
    const char *snapshot = im->depth == 0 ? im->opt->snapshot : NULL;
    int ret;

    ret = qcow2_read_header(im, q);
    if (!ret)
        ret = qcow2_read_names(im, q);
    if (!ret && snapshot)
        ret = qcow2_use_snapshot(im, q, snapshot);
    if (!ret)
        ret = qcow2_check_l1(im, q);
    if (!ret)
        ret = qcow2_open_data_file(im, q);
    if (ret)
        return ret;
    im->size = q->size;
    im->cluster_size = 1u << q->cluster_bits;
    im->entry_size = q->entry_size;
    im->dirty = q->incompatible & QCOW2_DIRTY;
    if ((!im->writable || im->opt->top_only) && (q->incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT)))
        msg_say(MSG_NOTE, "%s: is marked %s; reading it is safe", im->name,
                q->incompatible & QCOW2_CORRUPT ? "corrupt" : "dirty (not closed properly)");
    return 0;
}

/* In an external data file a cluster may lie at offset 0: COPIED says that it is allocated. */
static bool qcow2_allocated(const struct qcow2 *q, uint64_t entry)
{
    return (entry & QCOW2_OFFSET) || ((q->incompatible & QCOW2_DATA_FILE) && (entry & QCOW2_COPIED));
}

/* What is wrong with an L2 entry that is not compressed, whatever its offset; or NULL. */
static const char *qcow2_check_entry(const struct qcow2 *q, uint64_t entry, uint64_t bitmap)
{
    bool allocated = qcow2_allocated(q, entry);

    if (!q->subclusters)
        return (entry & QCOW2_ZERO) && q->v2 ? "a zero cluster in a version 2 image" : NULL;
    if (entry & QCOW2_ZERO)
        return "its L2 entry has reserved bits set";
    if (allocated && (bitmap >> 32 & bitmap & UINT32_MAX))
        return "a subcluster is both allocated and zero";
    return !allocated && (bitmap & UINT32_MAX) ? "a subcluster is allocated in no cluster" : NULL;
}

/* Where the data of a compressed cluster lies: from the returned offset to *end, which is the end of a sector. */
static uint64_t qcow2_coded_range(const struct qcow2 *q, uint64_t entry, uint64_t *end)
{
    uint32_t offset_bits = 62 - (q->cluster_bits - 8);
    uint64_t host = entry & ((1ull << offset_bits) - 1);

    *end = (host / 512 + ((entry & (QCOW2_COMPRESSED - 1)) >> offset_bits) + 1) * 512;
    return host;
}

static void qcow2_map_compressed(const struct qcow2 *q, uint64_t entry, uint64_t in_cluster, uint64_t length,
                                 struct extent *ext)
{
    uint64_t end, host = qcow2_coded_range(q, entry, &end);

    if (q->incompatible & QCOW2_DATA_FILE)
        ext_bad(ext, length, "a compressed cluster in an image with an external data file");
    else if (host >= q->data->size)     /* of the last sector one byte is enough */
        ext_past(ext, length, "its compressed cluster lies past the end of the file", q->data, end - 511);
    else
        *ext = (struct extent){
            .kind = EXT_COMPRESSED, .length = length, .file = q->data, .offset = host, .codec = q->codec,
            .coded_length = (uint32_t)(end - host), .decoded_length = 1u << q->cluster_bits,
            .skip = (uint32_t)in_cluster,
        };
}

/* What one L2 entry says about `length` bytes from in_cluster on, all in its cluster. */
static void qcow2_map_entry(const struct image *im, const struct qcow2 *q, uint64_t entry, uint64_t bitmap,
                            uint64_t in_cluster, uint64_t length, struct extent *ext)
{
    uint32_t sub_bits = q->cluster_bits - 5, i = (uint32_t)(in_cluster >> sub_bits);
    uint64_t host = entry & QCOW2_OFFSET;
    uint64_t both = 1ull << 32 | 1, state = bitmap >> i & both;     /* bit 0: allocated, bit 32: reads as zeros */
    const char *why = qcow2_check_entry(q, entry, state);
    bool zero = q->subclusters ? state >> 32 : entry & QCOW2_ZERO;
    bool data = q->subclusters ? state & 1 : !zero && qcow2_allocated(q, entry);

    if (entry & QCOW2_COMPRESSED) {
        qcow2_map_compressed(q, entry, in_cluster, length, ext);
        return;
    }
    if (q->subclusters && !(entry & QCOW2_ZERO)) {
        while (i < QCOW2_SUBCLUSTERS && (bitmap >> i & both) == state)
            i++;
        length = util_min(length, ((uint64_t)i << sub_bits) - in_cluster);
    }
    *ext = (struct extent){ .length = length, .zeroed = zero };
    ext->kind = data ? EXT_DATA : zero ? EXT_ZERO : ext_hole(im);
    if (data || host || (q->subclusters && qcow2_allocated(q, entry))) {
        ext->file = q->data;
        ext->offset = host + in_cluster;
        ext->owned = entry & QCOW2_COPIED;
    }
    if (why)
        ext_bad(ext, length, why);
    else if (host % qcow2_cluster(q))
        ext_bad(ext, length, "its L2 entry is not aligned");
    else if (entry & QCOW2_L2_RESERVED)
        ext_bad(ext, length, "its L2 entry has reserved bits set");
    else if (data && ext->offset >= q->data->size)
        ext_past(ext, length, "its cluster lies past the end of the file", q->data, ext->offset + length);
    else if (data)
        ext->length = util_min(length, q->data->size - ext->offset);
}

/* An L2 entry, with its bitmap where there are subclusters: both of one moment. */
static int qcow2_read_entry(struct image *im, const struct qcow2 *q, uint64_t at, uint64_t *entry, uint64_t *bitmap)
{
    uint64_t words[2] = { 0, 0 };
    int ret = cache_words(&im->files[0], at, words, q->subclusters ? 2 : 1);

    *entry = util_be64((const uint8_t *)&words[0]);
    *bitmap = util_be64((const uint8_t *)&words[1]);
    return ret;
}

static void qcow2_map(struct image *im, uint64_t offset, uint64_t length, struct extent *ext)
{
    const struct qcow2 *q = im->state;
    uint64_t cluster = 1u << q->cluster_bits, covers = cluster << q->l2_bits, in_cluster = offset & (cluster - 1);
    uint64_t left = covers - (offset & (covers - 1)), index = (offset & (covers - 1)) >> q->cluster_bits;
    uint64_t l1, l2, entry, bitmap;

    length = util_min(length, left);
    if (cache_be64(&im->files[0], q->l1_offset + (offset >> (q->cluster_bits + q->l2_bits)) * 8, &l1)) {
        ext_bad(ext, length, "the L1 table cannot be read");
        return;
    }
    l2 = l1 & QCOW2_OFFSET;
    if (l1 & QCOW2_L1_RESERVED || l2 % cluster) {
        ext_bad(ext, length, "its L1 entry is damaged");
    } else if (!l2) {
        *ext = (struct extent){ .kind = ext_hole(im), .length = length };
    } else if (l2 >= im->files[0].size || cluster > im->files[0].size - l2) {
        ext_past(ext, length, "its L2 table lies past the end of the file", &im->files[0], l2 + cluster);
    } else {
        length = util_min(length, cluster - in_cluster);
        if (qcow2_read_entry(im, q, l2 + index * q->entry_size, &entry, &bitmap))
            ext_bad(ext, length, "its L2 table cannot be read");
        else
            qcow2_map_entry(im, q, entry, bitmap, in_cluster, length, ext);
        ext->owned &= !!(l1 & QCOW2_COPIED);
        ext->sparse = q->preallocated && ext->kind == EXT_DATA;
    }
}

/* -- refcounts: numbers of 1 to 64 bits, one per host cluster, in blocks of one cluster that a table names -- */

static int qcow2_check_refcount_table(const struct image *im)
{
    const struct qcow2 *q = im->state;

    if (q->refcounts_entries * 8 > QCOW2_MAX_REFCOUNT_TABLE)
        return fmt_refuse(im, "the size of the refcount table: at most 8 MiB", q->refcounts_entries * 8);
    if (q->refcounts_offset % qcow2_cluster(q) || q->refcounts_offset > (uint64_t)INT64_MAX)
        return fmt_refuse(im, "the offset of the refcount table: a multiple of the cluster size below 2^63",
                          q->refcounts_offset);
    return 0;
}

/* Refcounts of a block. */
static uint64_t qcow2_per_block(const struct qcow2 *q)
{
    return 1ull << (q->cluster_bits + 3 - q->refcount_order);
}

/*
 * The refcount of a cluster: the offset of its word in its block, and its bits in the word. Of refcounts narrower than
 * a byte the first one is in the lowest bits: 4 bits wide, clusters 0 to 3 are bits 56-59, 60-63, 48-51, 52-55.
 */
static uint64_t qcow2_refcount_offset(const struct qcow2 *q, uint64_t cluster, unsigned *shift, uint64_t *mask)
{
    uint64_t at = (cluster & (qcow2_per_block(q) - 1)) << q->refcount_order;
    unsigned bits = 1u << q->refcount_order;

    *mask = bits == 64 ? UINT64_MAX : (1ull << bits) - 1;
    *shift = (unsigned)(bits < 8 ? 56 - at % 64 / 8 * 8 + at % 8 : 64 - bits - at % 64);
    return at / 64 * 8;
}

/* Finds the block that has the refcount of a cluster. *block 0: there is none, so the refcount is 0. */
static int qcow2_find_block(struct image *im, uint64_t cluster, uint64_t *block)
{
    const struct qcow2 *q = im->state;
    uint64_t index = cluster / qcow2_per_block(q), at = q->refcounts_offset + index * 8;

    *block = 0;
    if (index >= q->refcounts_entries || at >= im->files[0].size)
        return 0;
    if (cache_be64(&im->files[0], at, block))
        return -EIO;
    *block &= QCOW2_REFCOUNT_BLOCK;
    return *block % qcow2_cluster(q) || *block > (uint64_t)INT64_MAX ? -EIO : 0;
}

/* The refcount of a cluster in the block that was found for it. Past the end of the file there are zeros. */
static int qcow2_read_refcount(struct image *im, uint64_t block, uint64_t cluster, uint64_t *refcount)
{
    uint64_t word = 0, mask, at;
    unsigned shift;
    int ret = 0;

    at = block + qcow2_refcount_offset(im->state, cluster, &shift, &mask);
    if (block && at < im->files[0].size)
        ret = cache_be64(&im->files[0], at, &word);
    *refcount = word >> shift & mask;
    return ret;
}

static int qcow2_get_refcount(struct image *im, uint64_t cluster, uint64_t *refcount)
{
    uint64_t block;
    int ret = qcow2_find_block(im, cluster, &block);

    *refcount = 0;
    return ret ? ret : qcow2_read_refcount(im, block, cluster, refcount);
}

/* As QEMU tells preallocation=metadata: more clusters are in use than the file has blocks, by a tenth or by two. */
static void qcow2_find_holes(struct image *im)
{
    struct qcow2 *q = im->state;
    const struct file *f = &im->files[0];
    uint64_t stored = ((uint64_t)f->st.st_blocks * 512) >> q->cluster_bits, used = 0, refcount;
    uint64_t enough = stored * 10 / 9 > stored + 2 ? stored * 10 / 9 : stored + 2;

    if (f->is_blk || (f->size >> q->cluster_bits) + 1 < enough || qcow2_check_refcount_table(im))
        return;
    for (uint64_t i = 0; i << q->cluster_bits < f->size && used < enough; i++) {
        if (qcow2_get_refcount(im, i, &refcount))
            return;
        used += refcount != 0;
    }
    q->preallocated = used >= enough;
}

/* -- what --info says -- */

static int qcow2_list_snapshots(struct image *im, struct out *out)
{
    const struct qcow2 *q = im->state;
    struct qcow2_snapshot sn = { .next = q->snapshots_offset };
    int ret = 0;

    if (!q->n_snapshots)
        return 0;
    if (q->n_snapshots > QCOW2_MAX_SNAPSHOTS)
        return fmt_refuse(im, "the number of snapshots, at most 65536", q->n_snapshots);
    out_open(out, "snapshots", '[', false);
    for (uint32_t i = 0; i < q->n_snapshots && !(ret = qcow2_next_snapshot(im, q, &sn)); i++) {
        out_open(out, NULL, '{', false);
        out_text(out, "id", sn.id);
        out_text(out, "name", sn.name);
        out_size(out, "vm-state-size", sn.vm_state);
        out_time(out, "date-sec", sn.seconds);
        out_number(out, "date-nsec", sn.nanoseconds);
        out_number(out, "vm-clock-sec", sn.clock / 1000000000);
        out_number(out, "vm-clock-nsec", sn.clock % 1000000000);
        if (sn.icount != UINT64_MAX)
            out_number(out, "icount", sn.icount);
        out_close(out);
    }
    out_close(out);
    return ret;
}

struct qcow2_bitmap {
    uint64_t table_offset, next;
    uint32_t table_entries, flags;
    uint8_t granularity_bits;
    char name[1024];
};

/* Reads the entry at b->next, all of it in the bitmap directory, and sets b->next to the offset of the one after it. */
static int qcow2_next_bitmap(struct image *im, const struct qcow2 *q, struct qcow2_bitmap *b)
{
    static const char past_end[] = "the bitmap directory reaches past the end";
    uint64_t end = q->bitmaps_offset + q->bitmaps_size, at = b->next;
    struct qcow2_bitmap_header h = { .type = 0 };
    uint32_t name_len, extra_len;
    int ret;

    if (q->bitmaps_offset > (uint64_t)INT64_MAX || q->bitmaps_size > (uint64_t)INT64_MAX || at + sizeof(h) > end)
        return fmt_refuse(im, "the size of the bitmap directory", q->bitmaps_size);
    ret = qcow2_read(im, at, &h, sizeof(h), past_end);
    if (ret)
        return ret;
    b->table_offset = be64_to_cpu(h.table_offset);
    b->table_entries = be32_to_cpu(h.table_entries);
    b->flags = be32_to_cpu(h.flags);
    b->granularity_bits = h.granularity_bits;
    name_len = be16_to_cpu(h.name_length);
    extra_len = be32_to_cpu(h.extra_length);
    b->next = at + (sizeof(h) + (uint64_t)extra_len + name_len + 7) / 8 * 8;
    if (name_len >= sizeof(b->name) || b->granularity_bits > 31 || b->next > end)
        return fmt_refuse(im, "an entry of the bitmap directory", name_len);
    b->name[name_len] = 0;
    return qcow2_read(im, at + sizeof(h) + extra_len, b->name, name_len, past_end);
}

static void qcow2_list_bitmaps(struct image *im, const struct qcow2 *q, struct out *out)
{
    struct qcow2_bitmap b = { .next = q->bitmaps_offset };
    uint64_t n = util_min(q->n_bitmaps, QCOW2_MAX_BITMAPS);

    if (!n)
        return;
    out_open(out, "bitmaps", '[', false);
    for (uint64_t i = 0; i < n && !qcow2_next_bitmap(im, q, &b); i++) {
        out_open(out, NULL, '{', false);
        out_text(out, "name", b.name);
        out_number(out, "granularity", 1ull << b.granularity_bits);
        out_open(out, "flags", '[', true);
        if (b.flags & QCOW2_BITMAP_IN_USE)
            out_text(out, NULL, "in-use");
        if (b.flags & QCOW2_BITMAP_AUTO)
            out_text(out, NULL, "auto");
        out_close(out);
        out_close(out);
    }
    out_close(out);
}

static void qcow2_info(struct image *im, struct out *out)
{
    const struct qcow2 *q = im->state;

    out_text(out, "compat", q->v2 ? "0.10" : "1.1");
    out_text(out, "compression-type", q->codec == CODEC_ZSTD ? "zstd" : "zlib");
    out_number(out, "refcount-bits", 1u << q->refcount_order);
    if (!q->v2) {
        out_flag(out, "lazy-refcounts", q->compatible & QCOW2_LAZY_REFCOUNTS);
        out_flag(out, "corrupt", q->incompatible & QCOW2_CORRUPT);
        out_flag(out, "extended-l2", q->subclusters);
    }
    if (q->crypt) {
        out_open(out, "encrypt", '{', false);
        out_text(out, "format", q->crypt == QCOW2_AES ? "aes" : "luks");
        out_close(out);
    }
    if (*q->data_name && !q->v2)
        out_text(out, "data-file", q->data_name);
    if (q->incompatible & QCOW2_DATA_FILE)
        out_flag(out, "data-file-raw", q->autoclear & QCOW2_RAW_DATA);
    qcow2_list_bitmaps(im, q, out);
}

/*
 * -- lost headers --
 *
 * QEMU begins a new image with the header, the refcount table, a refcount block and the L1 table, each in a cluster of
 * its own or more. So the L1 table is looked for in the first clusters, by its shape: each entry is 0 or names a
 * cluster that looks like an L2 table, whose entries are 0 or name clusters of the file. No data look like that by
 * chance. The cluster size is the largest one for which all of this holds: what is aligned to 64 KiB is aligned to 4
 * KiB as well.
 */

enum { QCOW2_GUESS_CLUSTERS = 64, QCOW2_GUESS_L2 = 4096 /* bytes of an L2 table that are looked at */ };

struct qcow2_guess {
    uint32_t cluster_bits;
    bool subclusters;
    uint64_t l1_offset, l1_entries, refcounts_offset;   /* the latter 0: not found; reading does not need it */
    uint64_t n_tables;              /* L2 tables that were verified */
    uint64_t n_offsets, offsets;    /* of clusters that tables name: how many, and all their bits */
    uint64_t coded;                 /* where the first compressed cluster lies; 0: none */
};

/* Could this be an entry of a table in f? It names a cluster, perhaps in what was cut off, and has no reserved bit. */
static bool qcow2_names_cluster(const struct file *f, struct qcow2_guess *g, uint64_t entry, uint64_t reserved)
{
    uint64_t offset = entry & QCOW2_OFFSET;

    if (entry & reserved || offset % (1ull << g->cluster_bits) || !offset || offset / 4 >= f->size)
        return false;
    g->n_offsets++;
    g->offsets |= offset;
    return true;
}

/* 1: f has an L2 table at this offset, most of it at least; 0: zeros, which say nothing; -1: something else. */
static int qcow2_is_table(struct file *f, struct qcow2_guess *g, uint64_t offset)
{
    uint64_t n = util_min(1ull << g->cluster_bits, QCOW2_GUESS_L2) / 8, used = 0, bad = 0, coded;
    be64 entries[QCOW2_GUESS_L2 / 8];

    if (offset + n * 8 > f->size || file_read(f, entries, n * 8, offset))
        return 0;
    for (uint64_t i = 0; i < n; i += g->subclusters ? 2 : 1) {
        uint64_t entry = be64_to_cpu(entries[i]), bitmap = g->subclusters ? be64_to_cpu(entries[i + 1]) : 0;
        if ((uint32_t)bitmap & (uint32_t)(bitmap >> 32)) {      /* a subcluster is allocated or zeros */
            bad++;
        } else if (entry & QCOW2_COMPRESSED) {
            coded = entry & ((1ull << (62 - (g->cluster_bits - 8))) - 1);
            if (entry & QCOW2_COPIED || coded < 1ull << g->cluster_bits || coded / 4 >= f->size)
                bad++;
            else
                g->coded = used++ && g->coded ? g->coded : coded;
        } else if (entry > QCOW2_ZERO) {
            if (qcow2_names_cluster(f, g, entry, QCOW2_L2_RESERVED))
                used++;
            else
                bad++;
        }
    }
    return bad * 4 > used ? -1 : used > 0;
}

/*
 * Is there an L1 table in f at g->l1_offset? Sets how long it is, up to its last good entry; a few may be damaged. If
 * all clusters that it leads to are aligned to more than the cluster size, the cluster size is a wrong guess.
 */
static bool qcow2_is_l1(struct file *f, struct qcow2_guess *g)
{
    enum { MAX_BAD = 8 };
    be64 entries[512];
    uint64_t entry, n, at = 0, bad = 0, bad_inside = 0;
    int is;

    while (bad <= MAX_BAD && at < QCOW2_MAX_L1 && at / 8 <= 2 * g->l1_entries + ARRAY_LEN(entries)) {
        n = util_min(sizeof(entries), f->size - util_min(f->size, g->l1_offset + at)) / 8;
        if (!n || file_read(f, entries, n * 8, g->l1_offset + at))
            break;
        for (uint64_t i = 0; i < n && bad <= MAX_BAD; i++, at += 8) {
            entry = be64_to_cpu(entries[i]);
            if (!entry)
                continue;
            is = -1;
            if (qcow2_names_cluster(f, g, entry, QCOW2_L1_RESERVED))
                is = qcow2_is_table(f, g, entry & QCOW2_OFFSET);
            if (is < 0) {
                bad++;
                continue;
            }
            g->n_tables += (uint64_t)is;
            g->l1_entries = at / 8 + 1;
            bad_inside = bad;
        }
    }
    return g->n_tables > bad_inside && (g->n_offsets < 4 || g->offsets & 1ull << g->cluster_bits);
}

static bool qcow2_guess(struct file *f, struct qcow2_guess *g)
{
    be64 entry;

    for (uint32_t bits = 21; bits >= 9; bits--)
        for (unsigned i = 2; i < 2u * QCOW2_GUESS_CLUSTERS; i++) {
            *g = (struct qcow2_guess){ .cluster_bits = bits, .subclusters = i % 2,
                                       .l1_offset = (uint64_t)i / 2 << bits };
            if (g->l1_offset >= f->size || (g->subclusters && bits < 14) || !qcow2_is_l1(f, g))
                continue;
            if (file_read(f, &entry, sizeof(entry), 1ull << bits) == 0 && g->l1_offset != 1ull << bits &&
                qcow2_names_cluster(f, g, be64_to_cpu(entry), ~QCOW2_REFCOUNT_BLOCK))
                g->refcounts_offset = 1ull << bits;
            return true;
        }
    return false;
}

static bool qcow2_remains(struct file *f)
{
    struct qcow2_guess g;

    return qcow2_guess(f, &g);
}

/*
 * The backing file's name is what QEMU writes last into the first cluster, behind the 8 zeros that end the extensions.
 * If those are lost with the first sector, it is what text there is behind that. Returns its offset; 0: none.
 */
static uint32_t qcow2_guess_name(const uint8_t *page, uint64_t len, uint32_t *n)
{
    static const char *const features[] = { "dirty bit", "corrupt bit", "external data file", "compression type",
                                            "extended L2 entries", "lazy refcounts", "bitmaps", "raw external data" };
    static const uint8_t zeros[8];
    uint64_t end = len, at, first = QCOW2_HEADER_V3 + sizeof(zeros);

    while (end > first && !page[end - 1])
        end--;
    for (at = end; at > first && page[at - 1] >= ' ' && page[at - 1] != 0x7f; at--)
        continue;
    if (memcmp(page + at - sizeof(zeros), zeros, sizeof(zeros)) != 0) {
        at = at < 512 ? 512 : at;
        if (at >= end || (at > 512 && page[at - 1]))
            return 0;
    }
    if (end == len || at == end || end - at > QCOW2_MAX_NAME)
        return 0;
    *n = (uint32_t)(end - at);
    for (size_t i = 0; i < ARRAY_LEN(features); i++)
        if (strlen(features[i]) == *n && memcmp(features[i], page + at, *n) == 0)
            return 0;
    return (uint32_t)at;
}

static int qcow2_rebuild_header(struct image *im)
{
    struct file *f = &im->files[0];
    uint8_t page[FILE_PATCH] = { 0 }, magic[4] = { 0 };
    uint64_t len = util_min(f->size, sizeof(page)), entries;
    struct qcow2_header *h = (void *)page;
    struct qcow2_guess g;
    uint32_t n = 0, name;
    bool zstd;

    (void)file_pread_front(f, page, 0, &len, 0);
    if (len >= QCOW2_HEADER_V2 && be32_to_cpu(h->magic) == QCOW2_MAGIC)
        return 0;
    if (!qcow2_guess(f, &g))
        return msg_err(-EINVAL, "%s: cannot be put together: no L1 table is left in its first %d clusters; "
                       "--header=FILE takes the header of another image", im->name, QCOW2_GUESS_CLUSTERS);
    /* All that the cluster of the table has room for, since nothing tells how much of it the disk needs. */
    entries = ((g.l1_entries * 8 - 1) >> g.cluster_bits << g.cluster_bits) / 8 + (1ull << g.cluster_bits) / 8;
    entries = util_min(entries, (f->size - g.l1_offset) / 8);
    zstd = g.coded && file_read(f, magic, sizeof(magic), g.coded) == 0 && memcmp(magic, "\x28\xb5\x2f\xfd", 4) == 0;
    name = qcow2_guess_name(page, len, &n);
    memset(page, 0, sizeof(*h) + sizeof(struct qcow2_extension));
    if (!name && im->opt->n_backing) {          /* any name will do, since --backing stands for it */
        name = sizeof(*h) + sizeof(struct qcow2_extension);
        n = 1;
        page[name] = '?';
    }
    *h = (struct qcow2_header){
        .magic = cpu_to_be32(QCOW2_MAGIC),
        .version = cpu_to_be32(3),
        .backing_offset = cpu_to_be64(name),
        .backing_length = cpu_to_be32(n),
        .cluster_bits = cpu_to_be32(g.cluster_bits),
        .size = cpu_to_be64(entries << (g.cluster_bits + g.cluster_bits - 3 - g.subclusters)),
        .l1_entries = cpu_to_be32((uint32_t)entries),
        .l1_offset = cpu_to_be64(g.l1_offset),
        .refcounts_offset = cpu_to_be64(g.refcounts_offset),
        .refcounts_clusters = cpu_to_be32(g.refcounts_offset ? 1 : 0),
        .incompatible = cpu_to_be64((zstd ? QCOW2_COMPRESSION : 0) | (g.subclusters ? QCOW2_EXTL2 : 0)),
        .refcount_order = cpu_to_be32(4),
        .header_length = cpu_to_be32(sizeof(*h)),
        .compression = zstd,
    };
    im->least_size = g.l1_entries << (g.cluster_bits + g.cluster_bits - 3 - g.subclusters);
    msg_say(MSG_NOTE, "%s: header put together: clusters of %u bytes%s%s, L1 table at %" PRIu64 " with %" PRIu64
            " L2 tables that look right%s", im->name, 1u << g.cluster_bits, g.subclusters ? " with subclusters" : "",
            zstd ? ", zstd" : "", g.l1_offset, g.n_tables,
            name ? "" : "; if it had a backing file, what is there reads as zeros, unless --backing names it");
    return file_patch(f, 0, page);
}

/* ******************************************************************************************************** *
 * 22. qcow2 writing
 *
 * There are two images: the file, and memory, which is the file with the changed slices (struct qcow2_changes) laid
 * over it. Requests see memory. Commits make the file follow. What is true at every instant:
 *
 * I1. Memory: a cluster's refcount is at least the number of references to it (from the header, the refcount table, L1
 *     and L2 tables), and a reference has COPIED only if the refcount is 1. So a cluster is counted before something
 *     refers to it, and uncounted after nothing does. All tables change under writer.lock. (An image where that is not
 *     so from the start is not written, see qcow2_begin_writing().)
 * I2. File: I1 holds there as well. After a crash at any instant it is a whole image, with leaks at worst.
 * I3. File: what a reference leads to was durable before the reference was written: the first contents of a table, its
 *     refcount, guest data.
 * I4. A freed cluster is used again only when a file without the reference is durable, and when every request that may
 *     have looked the reference up has completed (section 5, Epochs). Its refcount stays up until then.
 * I5. When qcow2_sync() has returned 0, every write that had returned before it was called is durable.
 * I6. Once a barrier has failed, or a write of the header whose outcome is unknown, file.latched is set: every
 *     file_sync() of that file fails, so no commit writes a reference any more.
 *
 * A cluster's way from free to used and back, and what holds it:
 *
 *   free        refcount 0 in memory
 *     | qcow2_allocate_locked(): refcount 1 in memory. If the request fails, qcow2_undo_allocation_locked() goes back
 *     |                          at once: nothing refers to it, neither in memory nor in the file.
 *   filled      data and new tables are written straight to the file, data without writer.lock: the guest's clusters
 *     |         are marked busy instead. A commit meanwhile writes the refcount: a leak if we crash.
 *     | qcow2_link_locked(), qcow2_own_l2_locked(): the reference, in memory.
 *   used        overwritten in place, without any lock
 *     | qcow2_free_locked(), under the lock that changed the reference: writer.freed
 *   freed       qcow2_freeze_locked(): writer.dropped; qcow2_thaw_locked(good): writer.waiting, a grace period begins
 *     | qcow2_reclaim_locked(), when it is over: punches a hole, then refcount 0 in memory
 *   free
 *
 * A commit (qcow2_sync(), or qcow2_commit_locked() with all locks held), under commit_lock:
 *
 *   qcow2_freeze_locked()     under writer.lock: copies the changed sectors; later changes wait for the next commit
 *   qcow2_write_stages()      without writer.lock:
 *     F0                      the file is that of the last commit; new data lies in clusters that it does not use
 *     refcounts               in blocks that the refcount table names, and in new ones
 *     F1                      counts of new clusters are too high: leaks. None is too low: what is uncounted has no
 *                             reference in the file, see I4.
 *     B1 (barrier)            only if the refcount table changes: a new block is durable before it is named (I3)
 *     refcount table
 *     F2                      as F1; a new block is counted in itself, or in a block that is named already
 *     B2 (barriers)           data, new tables and refcounts are durable (I3); an external data file first
 *     mapping                 L2, L1, the size in the header; in any order:
 *     F3                      any part of these sectors may be there. Each entry of them is true by itself (I3), and a
 *                             new L2 table that L1 names has its first contents at least, which came before B2.
 *     B3 (barrier)            the commit is durable (I5)
 *   qcow2_thaw_locked()       under writer.lock: forgets what was written, or keeps it for the next commit on failure
 *
 * A sector of 512 bytes is old or new, never torn, and holds whole entries (an extended L2 entry has 16 bytes). Fields
 * of the header that name tables change in one write after a commit, by qcow2_write_header(): the longer table, its
 * blocks and its refcounts are durable in clusters that nothing names; then the header names it; then a barrier. The
 * old table is freed like any cluster.
 *
 * Who may write a range of host bytes, and until when (I7). A cell is a cluster, or a subcluster where there are such:
 *   - A cell that is ours alone (COPIED, and allocated) is written in place by the image core, without any lock, by
 *     any request that looked it up, until that request completes. So nothing may be copied into it any more: a copy
 *     could undo what a request has written since the copy was read.
 *   - A cell that is not comes here. Under writer.lock clusters are allocated and the guest's clusters are marked busy;
 *     data and copies are written without the lock; then, under it again, the L2 entries are changed, and the cell is
 *     ours. While a cluster is busy, only the request that marked it writes to its cells that are not ours yet.
 * So one piece of a write consists of cells of one kind. Example: subclusters of 64 KiB, the second is allocated. A
 * write of [32 KiB, 68 KiB) copies [0, 32 KiB) and writes up to 64 KiB; the last 4 KiB are a piece of their own,
 * written in place. As one piece it would copy [68 KiB, 128 KiB), over what others are writing there in place.
 * ******************************************************************************************************** */

enum {
    QCOW2_MAX_RUN = 2 << 20,        /* bytes allocated at once */
    QCOW2_MAX_DIRTY = 2048,         /* changed slices before a commit is due: 16 MiB */
    QCOW2_MAX_FREED = 1 << 16,      /* ranges */
    QCOW2_BUCKETS = 1024,           /* of changed slices */
    QCOW2_GROW = 16 << 20,          /* bytes that the file grows by; those never used are cut off in the end */
};

/* Clusters in a row. Of host clusters to be freed, each loses one reference. */
struct qcow2_range {
    uint64_t first, n;
};
struct qcow2_ranges {
    unsigned n;
    struct qcow2_range range[QCOW2_MAX_FREED];
};

/* The stages of a commit, in this order. A sector belongs to one table, so to one of them. */
enum qcow2_stage { QCOW2_REFCOUNTS, QCOW2_REFCOUNT_TABLE, QCOW2_MAPPING, QCOW2_STAGES };

/*
 * A slice of the table cache with changes that the file lacks. Sectors (of 512 bytes) are a bit each: only those that
 * were changed are written, since what else lies in the slice may be data, and newer in the file.
 */
struct qcow2_slice {
    struct qcow2_slice *next, *next_frozen;
    uint64_t start;
    uint8_t changed[QCOW2_STAGES];  /* sectors of now, since the last freeze */
    uint8_t frozen_sectors[QCOW2_STAGES];   /* of frozen: being written */
    uint64_t now[CACHE_WORDS], frozen[CACHE_WORDS];
};

/*
 * Buckets, and `now` of each slice: written with writer.lock and `lock`, so they are read with either of them. Readers
 * that fill the cache have only `lock`. `changed` and n: with writer.lock. All that is frozen: with commit_lock, so a
 * commit writes it without another lock.
 */
struct qcow2_changes {
    pthread_mutex_t lock;           /* nothing but pool.lock is taken while it is held, and no I/O is done */
    struct qcow2_slice *bucket[QCOW2_BUCKETS], *frozen;
    bool any_frozen[QCOW2_STAGES];  /* the stages that have something to write */
    unsigned n;                     /* slices */
};

struct qcow2_writer {
    pthread_mutex_t commit_lock;    /* one commit at a time; taken before lock */
    pthread_mutex_t lock;           /* protects all that follows, and every change of a table */
    pthread_cond_t idle;            /* a range is not busy any more */
    uint64_t commits;               /* begun */
    int result;                     /* of the last one that has ended */
    struct qcow2_range busy[MAX_THREADS];           /* guest clusters that a request is writing to new host clusters */
    unsigned n_busy;
    uint64_t hint;                  /* below this host cluster none is free */
    uint64_t top;                   /* host bytes from here on were never used: they read as zeros */
    struct qcow2_ranges *freed;     /* by changes that are not in the file yet ... */
    struct qcow2_ranges *dropped;   /* ... that a running commit writes ... */
    struct qcow2_ranges *waiting;   /* ... that are durable: until `grace` has ended (I4) */
    struct qcow2_ranges ranges[3];  /* these three; a commit swaps the first two */
    struct epoch_grace grace;
    struct qcow2_changes changes;
};

static _Thread_local uint8_t *qcow2_scratch;        /* MAX_CLUSTER bytes */

/* -- changed tables: memory, where it differs from the file -- */

/* Where the pointer to the slice at start is, or would be. */
static struct qcow2_slice **qcow2_find_slice(struct qcow2_changes *c, uint64_t start)
{
    struct qcow2_slice **p = &c->bucket[start / CACHE_SLICE % QCOW2_BUCKETS];

    while (*p && (*p)->start != start)
        p = &(*p)->next;
    return p;
}

/* file.newer of the image's file. Called with a lock of the cache held. */
static bool qcow2_newer(void *changes, uint64_t start, uint64_t *words)
{
    struct qcow2_changes *c = changes;
    struct qcow2_slice *s;

    pthread_mutex_lock(&c->lock);
    s = *qcow2_find_slice(c, start);
    if (s)
        memcpy(words, s->now, CACHE_SLICE);
    pthread_mutex_unlock(&c->lock);
    return s;
}

static struct qcow2_slice *qcow2_get_slice_locked(struct image *im, uint64_t start)
{
    struct qcow2_changes *c = &((struct qcow2 *)im->state)->w->changes;
    struct qcow2_slice **p = qcow2_find_slice(c, start), *s = *p;

    if (s)
        return s;
    s = util_fault_op("table") ? NULL : calloc(1, sizeof(*s));
    if (!s || cache_load(&im->files[0], start, s->now)) {
        free(s);
        return NULL;
    }
    s->start = start;
    pthread_mutex_lock(&c->lock);
    *p = s;
    pthread_mutex_unlock(&c->lock);
    c->n++;
    return s;
}

/* The sectors of the slice at start that [from, to) touches. */
static uint8_t qcow2_sectors(uint64_t start, uint64_t from, uint64_t to)
{
    unsigned bits = 0;

    for (uint64_t i = 0; i < CACHE_SLICE / 512; i++)
        if (from < start + (i + 1) * 512 && to > start + i * 512)
            bits |= 1u << i;
    return (uint8_t)bits;
}

/* Changes an entry of a table, of `width` bytes (8: without a bitmap, or 16), at offset, a multiple of width. */
static int qcow2_store_locked(struct image *im, uint64_t offset, unsigned width, uint64_t entry, uint64_t bitmap,
                              enum qcow2_stage stage)
{
    struct qcow2_changes *c = &((struct qcow2 *)im->state)->w->changes;
    uint64_t start = offset / CACHE_SLICE * CACHE_SLICE, words[2] = { htobe64(entry), htobe64(bitmap) };
    struct qcow2_slice *s = qcow2_get_slice_locked(im, start);

    if (!s)
        return -EIO;
    pthread_mutex_lock(&c->lock);
    memcpy(s->now + (offset - start) / 8, words, width);
    pthread_mutex_unlock(&c->lock);
    s->changed[stage] |= qcow2_sectors(start, offset, offset + width);
    cache_patch(&im->files[0], offset, words, width / 8);
    return 0;
}

static int qcow2_store_be64(struct image *im, uint64_t offset, uint64_t value, enum qcow2_stage stage)
{
    return qcow2_store_locked(im, offset, 8, value, 0, stage);
}

/*
 * [offset, offset + len) was written straight to the file: drops the changes there, and what the cache has of it. No
 * commit is writing any of these sectors: what is written straight is a table that was not used before, or sector 0
 * right after a commit.
 */
static int qcow2_reload_locked(struct image *im, uint64_t offset, uint64_t len)
{
    struct qcow2_writer *w = ((struct qcow2 *)im->state)->w;
    uint64_t words[CACHE_WORDS], done;
    int ret = 0, r;

    for (uint64_t start = offset / CACHE_SLICE * CACHE_SLICE; w && start < offset + len; start += CACHE_SLICE) {
        uint64_t from = start < offset ? offset : start, to = util_min(start + CACHE_SLICE, offset + len);
        struct qcow2_slice *s = *qcow2_find_slice(&w->changes, start);
        if (!s)
            continue;
        for (size_t i = 0; i < QCOW2_STAGES; i++)
            s->changed[i] &= (uint8_t)~qcow2_sectors(start, from, to);
        r = file_pread(&im->files[0], words, to - from, from, &done);
        ret = ret ? ret : r;
        pthread_mutex_lock(&w->changes.lock);
        memcpy((uint8_t *)s->now + (from - start), words, r ? 0 : to - from);
        pthread_mutex_unlock(&w->changes.lock);
    }
    cache_forget(&im->files[0], offset, len);
    return ret;
}

/* -- refcounts -- */

static int qcow2_put_refcount(struct image *im, uint64_t block, uint64_t cluster, uint64_t refcount)
{
    const struct qcow2 *q = im->state;
    uint64_t word, mask, at;
    unsigned shift;

    at = qcow2_refcount_offset(q, cluster, &shift, &mask);
    if (cache_be64(&im->files[0], block + at, &word))
        return -EIO;
    word = (word & ~(mask << shift)) | (refcount & mask) << shift;
    return qcow2_store_be64(im, block + at, word, QCOW2_REFCOUNTS);
}

/* Of a cluster that has a block. */
static int qcow2_set_refcount(struct image *im, uint64_t cluster, uint64_t refcount)
{
    uint64_t block;
    int ret = qcow2_find_block(im, cluster, &block);

    return ret || !block ? -EIO : qcow2_put_refcount(im, block, cluster, refcount);
}

/* Makes the file long enough for [0, end); the image itself longer by QCOW2_GROW, where there is space for that. */
static int qcow2_reserve(struct image *im, struct file *f, uint64_t end)
{
    if (end <= f->size)
        return 0;
    if (f->is_blk)
        return -ENOSPC;
    if (f == &im->files[0] && file_truncate(f, (end + QCOW2_GROW - 1) / QCOW2_GROW * QCOW2_GROW) == 0)
        return 0;
    return file_grow(f, end);
}

/* Fills a host cluster with zeros, for a table. Its refcount is up to the caller. */
static int qcow2_clear_clusters(struct image *im, uint64_t first, uint64_t n)
{
    struct qcow2 *q = im->state;
    uint64_t offset = first * qcow2_cluster(q), length = n * qcow2_cluster(q);
    int ret = qcow2_reserve(im, &im->files[0], offset + length);

    if (ret)
        return ret;
    if (offset < q->w->top || im->files[0].is_blk)
        ret = file_write_zeros(&im->files[0], offset, length);
    if (offset + length > q->w->top)
        q->w->top = offset + length;
    return ret ? ret : qcow2_reload_locked(im, offset, length);
}

/* True: the range reads as zeros now, and its space is free. */
static bool qcow2_punch(struct image *im, uint64_t from, uint64_t to)
{
    return from >= to ||
           !file_fallocate(&im->files[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, to - from);
}

/* Undoes an allocation that nothing refers to (I1, I2). Frees its space at once: perhaps that is what was missing. */
static void qcow2_undo_allocation_locked(struct image *im, uint64_t first, uint64_t n)
{
    struct qcow2 *q = im->state;
    uint64_t from = first << q->cluster_bits, to = (first + n) << q->cluster_bits;

    for (uint64_t i = 0; i < n; i++)
        (void)qcow2_set_refcount(im, first + i, 0);
    q->w->hint = util_min(q->w->hint, first);
    if (qcow2_punch(im, from, to) && to == q->w->top)
        q->w->top = from;
}

/* The same for tables. Under commit_lock: no commit writes their entries. Not if the header may name them (I6). */
static void qcow2_undo_tables_locked(struct image *im, uint64_t first, uint64_t n)
{
    uint64_t size = 1ull << ((struct qcow2 *)im->state)->cluster_bits;

    if (atomic_load(&im->files[0].latched))
        return;
    qcow2_undo_allocation_locked(im, first, n);
    (void)qcow2_reload_locked(im, first * size, n * size);
}

/* Makes the cluster the refcount block that covers it. */
static int qcow2_make_block_locked(struct image *im, uint64_t cluster)
{
    struct qcow2 *q = im->state;
    int ret = qcow2_clear_clusters(im, cluster, 1);

    if (!ret)                       /* first (I1), or the allocator could hand it out */
        ret = qcow2_put_refcount(im, cluster * qcow2_cluster(q), cluster, 1);
    if (!ret)
        ret = qcow2_store_be64(im, q->refcounts_offset + cluster / qcow2_per_block(q) * 8,
                               cluster * qcow2_cluster(q), QCOW2_REFCOUNT_TABLE);
    if (ret)                        /* nothing names it, so no commit may write there */
        (void)qcow2_reload_locked(im, cluster * qcow2_cluster(q), qcow2_cluster(q));
    return ret;
}

static int qcow2_commit_locked(struct image *im);
static void qcow2_free_locked(struct image *im, uint64_t first, uint64_t n);

/*
 * Writes `len` bytes of the header from `from` on, in one write: no sector is torn, so the file has the old or the new
 * ones. Right after a commit, so no change of sector 0 waits in memory. An error that may have left either latches the
 * file (I6).
 */
static int qcow2_write_header(struct image *im, const struct qcow2_header *h, size_t from, size_t len)
{
    uint64_t done;
    int none = 0, ret = file_pwrite(&im->files[0], (const uint8_t *)h + from, len, from, &done);

    if (!ret)
        ret = qcow2_reload_locked(im, 0, 512);
    if (ret && ret != -ENOSPC && ret != -EDQUOT && ret != -EFBIG)
        atomic_compare_exchange_strong(&im->files[0].latched, &none, ret);
    return ret ? ret : file_sync(&im->files[0]);
}

/* The refcount table of the header. */
static int qcow2_write_table_offset(struct image *im, uint64_t offset, uint64_t clusters)
{
    const struct qcow2_header h = {
        .refcounts_offset = cpu_to_be64(offset), .refcounts_clusters = cpu_to_be32((uint32_t)clusters)
    };

    return qcow2_write_header(im, &h, offsetof(struct qcow2_header, refcounts_offset), 12);
}

/* Copies n entries of a table, as memory has them, straight to another offset of the file, where zeros are. */
static int qcow2_copy_table_locked(struct image *im, uint64_t from, uint64_t to, uint64_t n)
{
    uint64_t word, done;
    int ret = 0;

    for (uint64_t i = 0; i < n && !ret; i++) {
        ret = cache_word(&im->files[0], from + i * 8, &word);
        if (!ret && word)
            ret = file_pwrite(&im->files[0], &word, 8, to + i * 8, &done);
    }
    return ret ? ret : qcow2_reload_locked(im, to, n * 8);
}

/* The refcount table is full. Writes blocks that cover themselves and a longer table, then that, then the header. */
static int qcow2_grow_table_locked(struct image *im)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), per = qcow2_per_block(q);
    uint64_t old = q->refcounts_entries, old_offset = q->refcounts_offset;
    uint64_t start = old * per, table = (old * 2 * 8 + size - 1) / size, blocks = 1, word, done;
    int ret = qcow2_commit_locked(im);

    while (blocks * per < blocks + table)
        blocks++;
    table = ((old * 2 > old + blocks ? old * 2 : old + blocks) * 8 + size - 1) / size;
    if (table * size > QCOW2_MAX_REFCOUNT_TABLE)
        return msg_serving(-EFBIG, "%s: the refcount table cannot grow beyond 8 MiB", im->name);
    if (!ret)
        ret = qcow2_clear_clusters(im, start, blocks + table);
    for (uint64_t i = 0; i < blocks && !ret; i++) {
        word = htobe64((start + i) * size);
        ret = file_pwrite(&im->files[0], &word, 8, (start + blocks) * size + (old + i) * 8, &done);
    }
    if (!ret)
        ret = qcow2_copy_table_locked(im, old_offset, (start + blocks) * size, old);
    if (!ret) {
        q->refcounts_offset = (start + blocks) * size;
        q->refcounts_entries = table * size / 8;
    }
    for (uint64_t i = 0; i < blocks + table && !ret; i++)
        ret = qcow2_set_refcount(im, start + i, 1);
    if (!ret)
        ret = qcow2_commit_locked(im);
    if (!ret)
        ret = qcow2_write_table_offset(im, q->refcounts_offset, table);
    if (ret) {
        q->refcounts_offset = old_offset;
        q->refcounts_entries = old;
        qcow2_undo_tables_locked(im, start, blocks + table);
        return ret;
    }
    qcow2_free_locked(im, old_offset / size, old * 8 / size);
    return 0;
}

/* Allocates up to `want` host clusters in a row. -ENOBUFS: the refcount table must grow first. */
static int qcow2_allocate_locked(struct image *im, uint64_t want, uint64_t *first, uint64_t *got)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;
    uint64_t per = qcow2_per_block(q), block, refcount = 1;
    int ret = 0;

    for (*got = 0; !ret && !*got; w->hint += !ret && !*got) {
        if (w->hint >= (uint64_t)INT64_MAX >> q->cluster_bits >> 8)
            return -EFBIG;
        if (w->hint / per >= q->refcounts_entries)
            return -ENOBUFS;
        ret = qcow2_find_block(im, w->hint, &block);
        if (!ret && !block)
            ret = qcow2_make_block_locked(im, w->hint);
        else if (!ret)
            ret = qcow2_get_refcount(im, w->hint, &refcount);
        while (!ret && block && refcount == 0) {
            ret = qcow2_set_refcount(im, w->hint + *got, 1);
            if (ret)
                break;
            ++*got;
            if (*got == want || (w->hint + *got) % per == 0)
                break;
            ret = qcow2_get_refcount(im, w->hint + *got, &refcount);
        }
    }
    if (!*got)
        return ret;
    *first = w->hint;
    w->hint += *got;
    return 0;                       /* even if an error has ended the row */
}

static void qcow2_add_range(const struct image *im, struct qcow2_ranges *r, uint64_t first, uint64_t n)
{
    if (r->n && r->range[r->n - 1].first + r->range[r->n - 1].n == first)
        r->range[r->n - 1].n += n;
    else if (r->n < QCOW2_MAX_FREED)
        r->range[r->n++] = (struct qcow2_range){ first, n };
    else
        msg_serving(0, "%s: %" PRIu64 " clusters leak, which --check --repair frees", im->name, n);
}

/* Queues a refcount decrement for after the commit (I4), under the lock that dropped the reference. */
static void qcow2_free_locked(struct image *im, uint64_t first, uint64_t n)
{
    qcow2_add_range(im, ((struct qcow2 *)im->state)->w->freed, first, n);
}

/* Frees what an L2 entry referred to. */
static void qcow2_free_entry_locked(struct image *im, uint64_t entry)
{
    const struct qcow2 *q = im->state;
    uint64_t host = entry & QCOW2_OFFSET, end;

    if (entry & QCOW2_COMPRESSED) {
        host = qcow2_coded_range(q, entry, &end) >> q->cluster_bits;
        qcow2_free_locked(im, host, ((end - 1) >> q->cluster_bits) - host + 1);
    } else if (host && !(q->incompatible & QCOW2_DATA_FILE)) {
        qcow2_free_locked(im, host >> q->cluster_bits, 1);
    }
}

/* Decrements one refcount. [*from, *to): free clusters in a row, into which the caller punches a hole at their end. */
static int qcow2_reclaim_cluster_locked(struct image *im, uint64_t cluster, uint64_t *from, uint64_t *to)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), refcount;
    int ret = qcow2_get_refcount(im, cluster, &refcount);

    if (ret || refcount == 0)
        return ret;                 /* 0: a corruption that --check will find, and nothing to decrement */
    /* The other reference may be in the active tables, and would have to become COPIED now. A leak does no harm. */
    if (refcount == 2 && q->shared)
        return 0;
    if (refcount == 1 && cluster * size != *to) {
        qcow2_punch(im, *from, *to);
        *from = cluster * size;
    }
    if (refcount == 1) {
        *to = (cluster + 1) * size;
        q->w->hint = util_min(q->w->hint, cluster);
    }
    return qcow2_set_refcount(im, cluster, refcount - 1);
}

/* Frees what no request can be using any more (I4). The lock keeps it from being allocated before it is punched. */
static int qcow2_reclaim_locked(struct image *im)
{
    struct qcow2_writer *w = ((struct qcow2 *)im->state)->w;
    uint64_t from = 0, to = 0;
    int ret = 0, r;

    if (!w->waiting->n || !epoch_grace_over(&w->grace))
        return 0;
    for (unsigned i = 0; i < w->waiting->n; i++)
        for (uint64_t c = 0; c < w->waiting->range[i].n; c++) {
            r = qcow2_reclaim_cluster_locked(im, w->waiting->range[i].first + c, &from, &to);
            ret = ret ? ret : r;
        }
    qcow2_punch(im, from, to);
    w->waiting->n = 0;
    return ret;
}

/* -- commits -- */

static void qcow2_freeze_locked(struct image *im)
{
    struct qcow2_writer *w = ((struct qcow2 *)im->state)->w;
    struct qcow2_changes *c = &w->changes;
    struct qcow2_ranges *empty = w->dropped;

    memset(c->any_frozen, 0, sizeof(c->any_frozen));
    for (size_t i = 0; i < QCOW2_BUCKETS; i++)
        for (struct qcow2_slice *s = c->bucket[i]; s; s = s->next) {
            memcpy(s->frozen, s->now, CACHE_SLICE);
            memcpy(s->frozen_sectors, s->changed, sizeof(s->changed));
            memset(s->changed, 0, sizeof(s->changed));
            for (size_t stage = 0; stage < QCOW2_STAGES; stage++)
                c->any_frozen[stage] |= s->frozen_sectors[stage] != 0;
            s->next_frozen = c->frozen;
            c->frozen = s;
        }
    w->dropped = w->freed;
    w->freed = empty;
}

static int qcow2_write_stage(struct image *im, enum qcow2_stage stage)
{
    const struct qcow2 *q = im->state;
    uint64_t done;
    int ret = 0;

    for (const struct qcow2_slice *s = q->w->changes.frozen; s && !ret; s = s->next_frozen)
        for (unsigned from = 0, to; from < CACHE_SLICE / 512 && !ret; from = to + 1) {
            for (to = from; to < CACHE_SLICE / 512 && s->frozen_sectors[stage] >> to & 1; to++)
                ;
            if (to > from)
                ret = file_pwrite(&im->files[0], (const uint8_t *)s->frozen + from * 512ul, (to - from) * 512ul,
                                  s->start + from * 512ul, &done);
        }
    return ret;
}

/* From F0 to B3, see the top of this section. */
static int qcow2_write_stages(struct image *im)
{
    struct qcow2 *q = im->state;
    const bool *any = q->w->changes.any_frozen;
    int ret = qcow2_write_stage(im, QCOW2_REFCOUNTS);

    if (!ret && any[QCOW2_REFCOUNT_TABLE])
        ret = file_sync(&im->files[0]);         /* B1 */
    if (!ret)
        ret = qcow2_write_stage(im, QCOW2_REFCOUNT_TABLE);
    if (!ret && q->data != &im->files[0])
        ret = file_sync(q->data);               /* B2 */
    if (!ret)
        ret = file_sync(&im->files[0]);         /* B2 */
    if (ret || !any[QCOW2_MAPPING])
        return ret;
    ret = qcow2_write_stage(im, QCOW2_MAPPING);
    return ret ? ret : file_sync(&im->files[0]);        /* B3 */
}

/* A failed commit: nothing of it is in the file for certain, so its changes and freed ranges go to the next one. */
static void qcow2_thaw_locked(struct image *im, bool good)
{
    struct qcow2_writer *w = ((struct qcow2 *)im->state)->w;
    struct qcow2_changes *c = &w->changes;

    for (struct qcow2_slice *s; (s = c->frozen);) {
        unsigned changed = 0;
        c->frozen = s->next_frozen;
        for (size_t stage = 0; stage < QCOW2_STAGES; stage++) {
            s->changed[stage] |= good ? 0 : s->frozen_sectors[stage];
            s->frozen_sectors[stage] = 0;
            changed |= s->changed[stage];
        }
        if (changed)
            continue;
        pthread_mutex_lock(&c->lock);
        *qcow2_find_slice(c, s->start) = s->next;
        pthread_mutex_unlock(&c->lock);
        free(s);
        c->n--;
    }
    for (unsigned i = 0; i < w->dropped->n; i++)
        qcow2_add_range(im, good ? w->waiting : w->freed, w->dropped->range[i].first, w->dropped->range[i].n);
    w->dropped->n = 0;
    if (good)
        epoch_begin_grace(&w->grace);
}

/* With both locks held, so nothing changes meanwhile. */
static int qcow2_commit_locked(struct image *im)
{
    int ret;

    qcow2_freeze_locked(im);
    ret = qcow2_write_stages(im);
    qcow2_thaw_locked(im, !ret);
    return ret;
}

/* No request comes any more: frees what can be freed, and cuts off what is free at the end of the file. */
static int qcow2_end_locked(struct image *im)
{
    struct qcow2 *q = im->state;
    uint64_t end, refcount;
    int ret = qcow2_reclaim_locked(im);

    if (!ret)
        ret = qcow2_commit_locked(im);
    for (end = q->w->top >> q->cluster_bits; !ret && end; end--)
        if (qcow2_get_refcount(im, end - 1, &refcount) || refcount)
            break;                  /* the last cluster that is in use */
    end <<= q->cluster_bits;
    if (!ret && !im->files[0].is_blk && end < im->files[0].size)
        ret = file_truncate(&im->files[0], end);
    return ret;
}

/* See I5. One commit serves all callers that wait for it: those that came before it began return its result. */
static int qcow2_sync(struct image *im, bool last)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;
    uint64_t before;
    int ret;

    pool_lock(&w->lock);
    before = w->commits;
    pthread_mutex_unlock(&w->lock);
    pool_lock(&w->commit_lock);
    pool_lock(&w->lock);
    if (w->commits == before || last) {
        w->commits++;
        ret = qcow2_reclaim_locked(im);
        qcow2_freeze_locked(im);
        pthread_mutex_unlock(&w->lock);
        if (!ret)
            ret = qcow2_write_stages(im);
        pool_lock(&w->lock);
        qcow2_thaw_locked(im, !ret);
        w->result = last && !ret ? qcow2_end_locked(im) : ret;
    }
    ret = w->result;
    pthread_mutex_unlock(&w->lock);
    pthread_mutex_unlock(&w->commit_lock);
    return ret;
}

/* -- L2 tables -- */

/* The L2 table for a guest offset. If there is none, or it has other references, it gets a new one first. */
static int qcow2_own_l2_locked(struct image *im, uint64_t offset, uint64_t *l2)
{
    struct qcow2 *q = im->state;
    uint64_t l1 = q->l1_offset + (offset >> (q->cluster_bits + q->l2_bits)) * 8, entry, first = 0, got, old;
    int ret = cache_be64(&im->files[0], l1, &entry);

    old = entry & QCOW2_OFFSET;
    if (ret || entry & QCOW2_L1_RESERVED || old % qcow2_cluster(q) || old >= im->files[0].size)
        return -EIO;
    *l2 = old;
    if (old && (entry & QCOW2_COPIED))
        return 0;
    ret = qcow2_allocate_locked(im, 1, &first, &got);
    if (!ret)
        ret = qcow2_clear_clusters(im, first, 1);
    *l2 = first << q->cluster_bits;
    if (!ret && old)
        ret = qcow2_copy_table_locked(im, old, *l2, qcow2_cluster(q) / 8);
    if (!ret)
        ret = qcow2_store_be64(im, l1, *l2 | QCOW2_COPIED, QCOW2_MAPPING);
    if (ret && first)
        qcow2_undo_allocation_locked(im, first, 1);
    else if (!ret && old)
        qcow2_free_locked(im, old >> q->cluster_bits, 1);
    return ret;
}

/* -- writing -- */

/* A piece of a write (I7): the guest's clusters, and where they go. */
struct qcow2_plan {
    uint64_t guest, n;              /* offset of the first cluster, how many; 0: its first cell is ours already */
    uint64_t end;                   /* of the piece, at most: no cell before this is ours */
    uint64_t host;                  /* offset in q->data */
    uint64_t at;                    /* offset of the first cluster's L2 entry */
    uint64_t old, old_bitmap;       /* what that entry says until now */
    bool moved;                     /* the host clusters are newly allocated ... */
    bool fresh;                     /* ... and read as zeros */
};

static bool qcow2_is_empty(const struct qcow2 *q, uint64_t entry, uint64_t bitmap)
{
    return q->subclusters ? !entry && !(bitmap & UINT32_MAX) : !(entry & ~1ull);
}

/* The subclusters of cluster `guest` that [from, to) touches, a bit each. */
static uint64_t qcow2_subclusters(const struct qcow2 *q, uint64_t guest, uint64_t from, uint64_t to)
{
    uint64_t size = qcow2_cluster(q) / QCOW2_SUBCLUSTERS, mask = 0;

    for (unsigned i = 0; i < QCOW2_SUBCLUSTERS; i++, guest += size)
        if (from < guest + size && to > guest)
            mask |= 1ull << i;
    return mask;
}

/* In a cluster that is ours: the end, up to `end`, of the unallocated cells from offset on. offset: there is none. */
static uint64_t qcow2_missing_cells(const struct qcow2 *q, uint64_t entry, uint64_t bitmap, uint64_t offset,
                                    uint64_t end)
{
    uint64_t size = qcow2_cluster(q), cell = size / QCOW2_SUBCLUSTERS, at = offset;

    end = util_min(end, (offset & ~(size - 1)) + size);
    if (!q->subclusters)
        return entry & 1 ? end : offset;
    while (at < end && !(bitmap >> (at & (size - 1)) / cell & 1))
        at = util_min(end, (at & ~(cell - 1)) + cell);
    return at;
}

static bool qcow2_is_busy(const struct qcow2_writer *w, uint64_t cluster)
{
    for (unsigned i = 0; i < w->n_busy; i++)
        if (cluster >= w->busy[i].first && cluster - w->busy[i].first < w->busy[i].n)
            return true;
    return false;
}

static void qcow2_end_busy_locked(struct qcow2_writer *w, uint64_t first)
{
    for (unsigned i = 0; i < w->n_busy; i++)
        if (w->busy[i].first == first) {
            w->busy[i] = w->busy[--w->n_busy];
            break;
        }
    pthread_cond_broadcast(&w->idle);
}

/* Damaged entries are not written over: what they meant is unknown. */
static int qcow2_check_old(struct image *im, const struct qcow2_plan *p)
{
    const struct qcow2 *q = im->state;
    struct extent ext;

    for (uint64_t at = 0; at < qcow2_cluster(q); at += ext.length) {
        qcow2_map_entry(im, q, p->old, p->old_bitmap, at, qcow2_cluster(q) - at, &ext);
        if (ext.kind == EXT_BAD)
            return msg_serving(-EIO, "%s: cannot write at %" PRIu64 ": %s", im->name, p->guest + at, ext.why);
    }
    return 0;
}

/* Allocates up to `max` host clusters in a row for a plan. */
static int qcow2_allocate_data_locked(struct image *im, struct qcow2_plan *p, uint64_t max)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;
    uint64_t first;
    int ret;

    p->moved = true;
    if (q->incompatible & QCOW2_DATA_FILE) {        /* there guest and host offsets are the same */
        p->n = max;
        p->host = p->guest;
        return qcow2_reserve(im, q->data, p->host + p->n * qcow2_cluster(q));
    }
    ret = qcow2_allocate_locked(im, max, &first, &p->n);
    if (ret)
        return ret;
    p->host = first << q->cluster_bits;
    p->fresh = p->host >= w->top && !q->data->is_blk;
    ret = qcow2_reserve(im, q->data, p->host + p->n * qcow2_cluster(q));
    if (ret)
        qcow2_undo_allocation_locked(im, first, p->n);
    else if (p->host + p->n * qcow2_cluster(q) > w->top)
        w->top = p->host + p->n * qcow2_cluster(q);
    return ret;
}

/* Plans the front of a write of [offset, offset + len). */
static int qcow2_plan_locked(struct image *im, uint64_t len, uint64_t offset, struct qcow2_plan *p)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), index = offset >> q->cluster_bits & ((1ull << q->l2_bits) - 1), l2, entry, bitmap;
    uint64_t max = ((offset + len - 1) >> q->cluster_bits) - (offset >> q->cluster_bits) + 1, n = 1;
    uint64_t limit = QCOW2_MAX_RUN > size ? QCOW2_MAX_RUN / size : 1;
    int ret = qcow2_own_l2_locked(im, offset, &l2);

    if (ret)
        return ret;
    max = util_min(util_min(max, limit), (1ull << q->l2_bits) - index);
    *p = (struct qcow2_plan){ .guest = offset & ~(size - 1), .at = l2 + index * q->entry_size };
    ret = qcow2_read_entry(im, q, p->at, &p->old, &p->old_bitmap);
    if (!ret)
        ret = qcow2_check_old(im, p);
    if (ret)
        return ret;
    if ((p->old & QCOW2_COPIED) && !(p->old & QCOW2_COMPRESSED) && qcow2_allocated(q, p->old)) {
        p->host = p->old & QCOW2_OFFSET;
        p->end = qcow2_missing_cells(q, p->old, p->old_bitmap, offset, offset + len);
        p->n = p->end > offset;
        return 0;
    }
    if (!qcow2_is_empty(q, p->old, p->old_bitmap))
        max = 1;
    for (; n < max; n++)
        if (qcow2_read_entry(im, q, p->at + n * q->entry_size, &entry, &bitmap) || !qcow2_is_empty(q, entry, bitmap) ||
            qcow2_is_busy(q->w, (offset >> q->cluster_bits) + n))
            break;
    ret = qcow2_allocate_data_locked(im, p, n);
    p->end = p->guest + p->n * size;
    return ret;
}

/* What the guest sees at [at, at + len) until now; zeros past its end. */
static int qcow2_read_old(struct image *im, uint8_t *buf, uint64_t len, uint64_t at)
{
    uint64_t done, inside = at < im->size ? util_min(len, im->size - at) : 0;

    memset(buf + inside, 0, len - inside);
    return inside ? img_read(im, buf, inside, at, &done) : 0;
}

/* Looks past the end of the disk, too: what a longer disk had may lie there. */
static bool qcow2_old_is_zero(struct image *im, uint64_t at, uint64_t end)
{
    struct extent ext = { .kind = EXT_ZERO };

    for (; at < end && ext.kind == EXT_ZERO; at += ext.length) {
        ext_map(im, at, end - at, false, &ext);
        if (ext.kind == EXT_BACKING && im->backing)
            img_map(im->backing, at, ext.length, false, &ext);
    }
    return ext.kind == EXT_ZERO;
}

/* Copies [from, to) of the guest's disk, in one cluster, to the plan's host clusters. */
static int qcow2_copy_old(struct image *im, const struct qcow2_plan *p, uint64_t from, uint64_t to)
{
    const struct qcow2 *q = im->state;
    uint64_t done;
    int ret;

    if (from >= to || (p->fresh && qcow2_old_is_zero(im, from, to)))
        return 0;
    ret = qcow2_read_old(im, qcow2_scratch, to - from, from);
    return ret ? ret : file_pwrite(q->data, qcow2_scratch, to - from, p->host + from - p->guest, &done);
}

/* Writes the data, and copies around it up to whole cells. buf NULL: only copies, in space that it allocates. */
static int qcow2_write_data(struct image *im, const struct qcow2_plan *p, const uint8_t *buf, uint64_t len,
                            uint64_t offset)
{
    const struct qcow2 *q = im->state;
    uint64_t cell = q->subclusters ? qcow2_cluster(q) / QCOW2_SUBCLUSTERS : qcow2_cluster(q), done;
    uint64_t from = offset & ~(cell - 1), to = (offset + len + cell - 1) & ~(cell - 1), kept = 0;
    int ret = 0;

    if (!qcow2_scratch)
        qcow2_scratch = malloc(MAX_CLUSTER);
    if (!qcow2_scratch)
        return -ENOMEM;
    if (p->moved && q->subclusters)
        kept = p->old & QCOW2_COMPRESSED ? UINT32_MAX : p->old_bitmap & UINT32_MAX;
    kept &= ~qcow2_subclusters(q, p->guest, offset, offset + len);
    for (unsigned i = 0; kept && i < QCOW2_SUBCLUSTERS && !ret; i++)
        if (kept >> i & 1)
            ret = qcow2_copy_old(im, p, p->guest + i * cell, p->guest + (i + 1) * cell);
    if (!ret && !buf) {
        ret = qcow2_copy_old(im, p, from, to);
        return ret ? ret : file_fallocate(q->data, FALLOC_FL_KEEP_SIZE, p->host + from - p->guest, to - from);
    }
    if (ret)
        return ret;
    if (to - from == cell && (from < offset || to > offset + len) && !(p->fresh && qcow2_old_is_zero(im, from, to))) {
        ret = qcow2_read_old(im, qcow2_scratch, cell, from);
        memcpy(qcow2_scratch + (offset - from), buf, len);
        return ret ? ret : file_pwrite(q->data, qcow2_scratch, cell, p->host + from - p->guest, &done);
    }
    ret = qcow2_copy_old(im, p, from, offset);
    if (!ret)
        ret = qcow2_copy_old(im, p, offset + len, to);
    return ret ? ret : file_pwrite(q->data, buf, len, p->host + offset - p->guest, &done);
}

/* Points the L2 entries at the new clusters, and frees the old one. *linked: how many, even after an error. */
static int qcow2_link_locked(struct image *im, const struct qcow2_plan *p, uint64_t len, uint64_t offset,
                             uint64_t *linked)
{
    struct qcow2 *q = im->state;
    uint64_t entry, bitmap, mask;
    int ret = 0;

    for (uint64_t i = 0; i < p->n && !ret; i++) {
        *linked = i;
        ret = qcow2_read_entry(im, q, p->at + i * q->entry_size, &entry, &bitmap);
        mask = qcow2_subclusters(q, p->guest + i * qcow2_cluster(q), offset, offset + len);
        if (i == 0 && (entry & QCOW2_COMPRESSED))
            mask = UINT32_MAX;
        bitmap = (bitmap | mask) & ~(mask << 32);
        if (!ret)
            ret = qcow2_store_locked(im, p->at + i * q->entry_size, q->entry_size,
                                     (p->host + i * qcow2_cluster(q)) | QCOW2_COPIED, bitmap, QCOW2_MAPPING);
    }
    if (!ret && p->moved)
        qcow2_free_entry_locked(im, p->old);
    *linked = ret ? *linked : p->n;
    return ret;
}

/* So much has changed in memory that a commit is due. */
static bool qcow2_is_due_locked(const struct image *im)
{
    const struct qcow2_writer *w = ((const struct qcow2 *)im->state)->w;

    return w->changes.n > QCOW2_MAX_DIRTY || w->freed->n > QCOW2_MAX_FREED / 2;
}

/* Does what a request needs that ended with -EAGAIN (a commit) or -ENOBUFS (a longer refcount table). 0: retry it. */
static int qcow2_unblock(struct image *im, int ret)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;

    if (ret == -EAGAIN)
        return qcow2_sync(im, false);
    if (ret != -ENOBUFS)
        return ret;
    pool_lock(&w->commit_lock);
    pool_lock(&w->lock);
    ret = w->hint / qcow2_per_block(q) >= q->refcounts_entries ? qcow2_grow_table_locked(im) : 0;
    pthread_mutex_unlock(&w->lock);
    pthread_mutex_unlock(&w->commit_lock);
    return ret;
}

static int qcow2_write(struct image *im, const uint8_t *buf, uint64_t len, uint64_t offset, uint64_t *done)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;
    uint64_t first = offset >> q->cluster_bits, linked = 0;
    struct qcow2_plan p;
    int ret;

    *done = 0;
    pool_lock(&w->lock);
    while (qcow2_is_busy(w, first))
        pool_wait(&w->idle, &w->lock);
    ret = qcow2_is_due_locked(im) ? -EAGAIN : qcow2_plan_locked(im, len, offset, &p);
    if (!ret && p.n)
        w->busy[w->n_busy++] = (struct qcow2_range){ first, p.n };
    pthread_mutex_unlock(&w->lock);
    if (ret || !p.n)
        return qcow2_unblock(im, ret);

    len = util_min(len, p.end - offset);
    ret = qcow2_write_data(im, &p, buf, len, offset);
    pool_lock(&w->lock);
    if (!ret)
        ret = qcow2_link_locked(im, &p, len, offset, &linked);
    if (ret && p.moved && q->data == &im->files[0])
        qcow2_undo_allocation_locked(im, (p.host >> q->cluster_bits) + linked, p.n - linked);
    qcow2_end_busy_locked(w, first);
    pthread_mutex_unlock(&w->lock);
    *done = ret ? 0 : len;
    return ret;
}

/* -- zeros -- */

/* Makes one whole cluster read as zeros. -EOPNOTSUPP: zeros must be written. */
static int qcow2_zero_cluster_locked(struct image *im, uint64_t at, uint64_t guest)
{
    struct qcow2 *q = im->state;
    bool backed = ext_hole(im) == EXT_BACKING;
    struct qcow2_plan p = { .guest = guest };
    uint64_t entry = backed && !q->subclusters, bitmap = backed && q->subclusters ? (uint64_t)UINT32_MAX << 32 : 0;
    int ret = qcow2_read_entry(im, q, at, &p.old, &p.old_bitmap);

    if (!ret)
        ret = qcow2_check_old(im, &p);
    if (ret)
        return ret;
    if (((q->incompatible & QCOW2_DATA_FILE) && qcow2_allocated(q, p.old)) || (backed && q->v2))
        return -EOPNOTSUPP;
    if (p.old == entry && p.old_bitmap == bitmap)
        return 0;
    ret = qcow2_store_locked(im, at, q->entry_size, entry, bitmap, QCOW2_MAPPING);
    if (!ret)
        qcow2_free_entry_locked(im, p.old);
    return ret;
}

/* The same for whole clusters of one L2 table. */
static int qcow2_zero_locked(struct image *im, uint64_t len, uint64_t offset, uint64_t *done)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), entry, l2;
    int ret = cache_be64(&im->files[0], q->l1_offset + (offset >> (q->cluster_bits + q->l2_bits)) * 8, &entry);

    if (!ret && !(entry & QCOW2_OFFSET) && qcow2_old_is_zero(im, offset, offset + len)) {
        *done = len;
        return 0;
    }
    if (!ret)
        ret = qcow2_own_l2_locked(im, offset, &l2);
    for (*done = 0; !ret && *done < len; *done += size) {
        if (qcow2_is_busy(q->w, (offset + *done) >> q->cluster_bits)) {
            if (!*done)
                pool_wait(&q->w->idle, &q->w->lock);
            return 0;
        }
        ret = qcow2_zero_cluster_locked(
            im, l2 + ((offset + *done) >> q->cluster_bits & ((1ull << q->l2_bits) - 1)) * q->entry_size,
            offset + *done);
        if (ret == -EOPNOTSUPP && *done)
            return 0;               /* the caller comes again for that one */
        if (ret == -EOPNOTSUPP)
            *done = size;
        if (ret)
            return ret;
    }
    return ret;
}

static int qcow2_zero(struct image *im, uint64_t len, uint64_t offset, uint64_t *done)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), table = 1ull << (q->cluster_bits + q->l2_bits);
    uint64_t end = (im->size + size - 1) & ~(size - 1);
    int ret;

    *done = util_min(len, size - (offset & (size - 1)));
    if (offset + len == im->size)   /* a caller that zeroes up to the end holds size_lock: nobody writes behind it */
        len = end - offset;
    if (offset & (size - 1) || len < size)
        return qcow2_old_is_zero(im, offset, offset + *done) ? 0 : -EOPNOTSUPP;
    len = util_min(len & ~(size - 1), table - (offset & (table - 1)));
    *done = 0;
    pool_lock(&q->w->lock);
    ret = qcow2_is_due_locked(im) ? -EAGAIN : qcow2_zero_locked(im, len, offset, done);
    pthread_mutex_unlock(&q->w->lock);
    return qcow2_unblock(im, ret);
}

/* -- starting and stopping, changing the size -- */

/* Writes the feature bits of version 3, which other programs see. */
static int qcow2_set_features(struct image *im, uint64_t incompatible, uint64_t autoclear)
{
    struct qcow2 *q = im->state;
    const struct qcow2_header h = {
        .incompatible = cpu_to_be64(incompatible), .compatible = cpu_to_be64(q->compatible),
        .autoclear = cpu_to_be64(autoclear)
    };

    if (q->v2 || (q->incompatible == incompatible && q->autoclear == autoclear))
        return 0;
    q->incompatible = incompatible;
    q->autoclear = autoclear;
    return qcow2_write_header(im, &h, offsetof(struct qcow2_header, incompatible), 24);
}

static int qcow2_start_writer(struct image *im)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w = util_fault("qcow2 writer") ? NULL : calloc(1, sizeof(*w));

    if (!w)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    pthread_mutex_init(&w->lock, NULL);
    pthread_mutex_init(&w->commit_lock, NULL);
    pthread_mutex_init(&w->changes.lock, NULL);
    pthread_cond_init(&w->idle, NULL);
    im->files[0].newer_owner = &w->changes;
    im->files[0].newer = qcow2_newer;
    w->freed = &w->ranges[0];
    w->dropped = &w->ranges[1];
    w->waiting = &w->ranges[2];
    w->top = (im->files[0].size + qcow2_cluster(q) - 1) & ~(qcow2_cluster(q) - 1);
    return 0;
}

/* No request comes any more. Changes that no commit has written are lost. Also image_format.close. */
static void qcow2_stop_writer(struct image *im)
{
    struct qcow2 *q = im->state;

    if (!q->w)
        return;
    im->files[0].newer = NULL;
    for (size_t i = 0; i < QCOW2_BUCKETS; i++)
        for (struct qcow2_slice *s; (s = q->w->changes.bucket[i]);) {
            q->w->changes.bucket[i] = s->next;
            cache_forget(&im->files[0], s->start, CACHE_SLICE);
            free(s);
        }
    pthread_mutex_destroy(&q->w->lock);
    pthread_mutex_destroy(&q->w->commit_lock);
    pthread_mutex_destroy(&q->w->changes.lock);
    pthread_cond_destroy(&q->w->idle);
    free(q->w);
    q->w = NULL;
}

/* Undoes the allocation of the row [start, start + n), and of the blocks behind it, up to `at`, that are not named. */
static void qcow2_undo_row_locked(struct image *im, uint64_t start, uint64_t n, uint64_t at)
{
    const struct qcow2 *q = im->state;
    uint64_t per = qcow2_per_block(q), block;
    bool named;

    for (uint64_t c = at; c-- > start + n;) {
        named = false;
        for (uint64_t i = start / per; i <= (at - 1) / per; i++)
            named |= !qcow2_find_block(im, i * per, &block) && block == c << q->cluster_bits;
        if (!named)
            qcow2_undo_tables_locked(im, c, 1);
    }
    qcow2_undo_tables_locked(im, start, n);
}

/*
 * Allocates n clusters in a row behind all that is used, for an L1 table, which may be longer than what one refcount
 * block covers. The blocks that the row and they themselves need lie behind the row. With commit_lock.
 */
static int qcow2_allocate_row_locked(struct image *im, uint64_t n, uint64_t *first)
{
    struct qcow2 *q = im->state;
    struct qcow2_writer *w = q->w;
    uint64_t per = qcow2_per_block(q), start = w->top >> q->cluster_bits, block, at;
    int ret = 0;

    for (uint64_t c = start, end = at = start + n; c < at; c += per - c % per, end = at) {
        ret = qcow2_find_block(im, c, &block);
        if (ret)
            return ret;
        at = block ? end : end + 1;
    }
    if ((at - 1) / per >= q->refcounts_entries)
        return -ENOBUFS;            /* before anything was changed */
    ret = qcow2_reserve(im, &im->files[0], at << q->cluster_bits);
    if (ret)
        return ret;
    w->top = at << q->cluster_bits;
    for (uint64_t c = start + n; c < at && !ret; c++)
        ret = qcow2_clear_clusters(im, c, 1);
    /* Counted before they are named (I1): block by block of the row, the new one or the one that is there. */
    for (uint64_t c = start, next = start + n, block_at; c < at && !ret; c += per - c % per) {
        ret = qcow2_find_block(im, c, &block);
        block_at = block ? block : next++ << q->cluster_bits;
        for (uint64_t i = c; i < at && i / per == c / per && !ret; i++)
            ret = qcow2_put_refcount(im, block_at, i, 1);
    }
    /* From the last on: a block that counts others is durable before they are named. Sectors have no order on disk. */
    for (uint64_t i = (at - 1) / per + 1, next = at; i-- > start / per && !ret;) {
        ret = qcow2_find_block(im, i * per, &block);
        if (ret || block)
            continue;
        ret = qcow2_store_be64(im, q->refcounts_offset + i * 8, --next << q->cluster_bits, QCOW2_REFCOUNT_TABLE);
        if (!ret && i > start / per && (i + 1) * per > start + n)
            ret = qcow2_commit_locked(im);
    }
    if (ret)
        qcow2_undo_row_locked(im, start, n, at);
    *first = start;
    return ret;
}

/* Makes the L1 table `entries` long, or longer: fills a new one, then the header names it. With commit_lock. */
static int qcow2_grow_l1_locked(struct image *im, uint64_t entries)
{
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), n, first = 0, old = q->l1_entries, old_offset = q->l1_offset;
    struct qcow2_header h;
    int ret = 0;

    if (entries <= old)
        return 0;
    n = (entries * 8 + size - 1) / size;
    entries = n * size / 8;
    if (entries > QCOW2_MAX_L1 / 8)
        return -EFBIG;
    do {
        if (ret == -ENOBUFS)
            ret = qcow2_grow_table_locked(im);
        if (!ret)
            ret = qcow2_allocate_row_locked(im, n, &first);
    } while (ret == -ENOBUFS);
    if (ret)
        return ret;
    ret = qcow2_clear_clusters(im, first, n);
    if (!ret)
        ret = qcow2_copy_table_locked(im, old_offset, first * size, old);
    if (!ret)
        ret = qcow2_commit_locked(im);
    h.l1_entries = cpu_to_be32((uint32_t)entries);
    h.l1_offset = cpu_to_be64(first * size);
    if (!ret)
        ret = qcow2_write_header(im, &h, offsetof(struct qcow2_header, l1_entries), 12);
    if (ret) {
        qcow2_undo_tables_locked(im, first, n);
        return ret;
    }
    q->l1_offset = first * size;
    q->l1_entries = entries;
    if (old)
        qcow2_free_locked(im, old_offset / size, (old * 8 + size - 1) / size);
    return 0;
}

/*
 * The size goes to the header with the next commit. Before that, what is cut off or new reads as zeros on the disk:
 * what a longer backing file has there must not appear, and what was cut off must not come back. Whole clusters are
 * zeroed, so that an append to the last one finds zeros; new ones as well: other programs may have left data there.
 */
static int qcow2_resize(struct image *im, uint64_t old, uint64_t size)
{
    struct qcow2 *q = im->state;
    uint64_t covers = (uint64_t)q->cluster_bits + q->l2_bits, cluster = qcow2_cluster(q), done;
    uint64_t from = size < old ? size : old > q->clean ? old : q->clean;
    uint64_t to = ((old > size ? old : size) + cluster - 1) & ~(cluster - 1);
    /* Zeros first, then the size. Not when a write past the end has failed: what it left was never on the disk. */
    bool barrier = from < to && (size < im->size || (size > old && im->backing && im->backing->size > old));
    int ret = 0;

    if (!q->w || (q->v2 && q->n_snapshots))
        return -EOPNOTSUPP;         /* snapshots of version 2 do not record their size */
    if (size > old && ((size - 1) >> covers) + 1 > q->l1_entries) {
        pool_lock(&q->w->commit_lock);
        pool_lock(&q->w->lock);
        ret = qcow2_grow_l1_locked(im, ((size - 1) >> covers) + 1);
        pthread_mutex_unlock(&q->w->lock);
        pthread_mutex_unlock(&q->w->commit_lock);
    }
    if (!ret && from < to)
        ret = img_change(im, NULL, FALLOC_FL_PUNCH_HOLE, to - from, from, &done);
    if (!ret && barrier)
        ret = qcow2_sync(im, false);
    if (ret)
        return ret;
    q->clean = q->clean > to ? q->clean : to;
    size = (size + 511) & ~511ull;  /* QEMU has whole sectors only, and would cut the rest off */
    pool_lock(&q->w->lock);
    ret = size == q->size ? 0 : qcow2_store_be64(im, offsetof(struct qcow2_header, size), size, QCOW2_MAPPING);
    pthread_mutex_unlock(&q->w->lock);
    q->size = ret ? q->size : size;
    return ret;
}

/* -- making overlays -- */

/* Appends a header extension at `at`. Returns where the next one begins. */
static uint8_t *qcow2_put_extension(uint8_t *at, uint32_t type, const void *data, size_t length)
{
    struct qcow2_extension head = { cpu_to_be32(type), cpu_to_be32((uint32_t)length) };

    memcpy(at, &head, sizeof(head));
    memcpy(at + sizeof(head), data, length);
    return at + sizeof(head) + (length + 7) / 8 * 8;
}

/* A new image over `backing` (its size in bytes), in an empty file: header, refcount table, one block, L1 table. */
static int qcow2_create(struct file *f, uint64_t base_size, const char *backing, const char *backing_format)
{
    const uint64_t cluster = 1 << 16, per_table = cluster / 8 * cluster, size = (base_size + 511) & ~511ull;
    uint64_t l1 = size ? (size - 1) / per_table + 1 : 1, n = 3 + (l1 * 8 + cluster - 1) / cluster, done;
    size_t name = strlen(backing), format = strlen(backing_format);
    struct qcow2_base_extension base = { .size = cpu_to_be64(base_size) };
    uint64_t hash = UTIL_HASH_START, name_offset;
    struct qcow2_header header;
    uint8_t *h, *end;
    be64 entry;
    int ret;

    if (l1 * 8 > QCOW2_MAX_L1 || name > QCOW2_MAX_NAME || format > 31 || n > cluster / 2)
        return msg_err(-EFBIG, "%s: too large a disk for an overlay", f->path);
    h = calloc(3, cluster);         /* header, refcount table, refcount block; the L1 table is zeros */
    if (!h)
        return msg_err(-ENOMEM, "%s: out of memory", f->path);
    util_hash(&hash, backing);
    base.name_hash = cpu_to_be64(hash);
    end = qcow2_put_extension(h + QCOW2_HEADER_V3, QCOW2_EXT_BACKING_FORMAT, backing_format, format);
    end = qcow2_put_extension(end, QCOW2_EXT_BASE_SIZE, &base, sizeof(base));
    name_offset = (uint64_t)(end - h) + sizeof(struct qcow2_extension);     /* one of zeros ends them */
    memcpy(h + name_offset, backing, name + 1);
    header = (struct qcow2_header){
        .magic = cpu_to_be32(QCOW2_MAGIC),
        .version = cpu_to_be32(3),
        .backing_offset = cpu_to_be64(name_offset),
        .backing_length = cpu_to_be32((uint32_t)name),
        .cluster_bits = cpu_to_be32(16),
        .size = cpu_to_be64(size),
        .l1_entries = cpu_to_be32((uint32_t)l1),
        .l1_offset = cpu_to_be64(3 * cluster),
        .refcounts_offset = cpu_to_be64(cluster),
        .refcounts_clusters = cpu_to_be32(1),
        .refcount_order = cpu_to_be32(4),
        .header_length = cpu_to_be32(QCOW2_HEADER_V3),
    };
    memcpy(h, &header, QCOW2_HEADER_V3);
    entry = cpu_to_be64(2 * cluster);
    memcpy(h + cluster, &entry, sizeof(entry));
    for (uint64_t i = 0; i < n; i++)
        h[2 * cluster + 2 * i + 1] = 1;
    ret = file_grow(f, n * cluster);
    if (!ret)
        ret = file_pwrite(f, h, 3 * cluster, 0, &done);
    free(h);
    return ret ? ret : file_sync(f);
}

/* ******************************************************************************************************** *
 * 23. qcow2 check
 *
 * References to every host cluster are counted, as qemu-img check does, and compared with the stored refcounts: for
 * --check, for --repair, and before the first write.
 *
 * Memory is a small number and a byte per cluster of the file, and QCOW2_REFS entries of L1 tables at a time. These
 * are sorted, so that an L2 table that snapshots share is read once and counted as often as it is used: the work has
 * a bound, whatever the tables say.
 * ******************************************************************************************************** */

enum {
    QCOW2_REFS = 1 << 18,
    QCOW2_SUSPECTS = 100            /* clusters whose users are named */
};
/* What a cluster is used for. A table is repaired only if its clusters are used as that table and as nothing else. */
enum {
    QCOW2_USE_DATA = 1,
    QCOW2_USE_L2 = 2,               /* by any number of L1 entries */
    QCOW2_USE_OTHER = 4,            /* the header or a table that has one user: L1, refcounts, snapshots, bitmaps */
    QCOW2_USE_KINDS = QCOW2_USE_DATA | QCOW2_USE_L2 | QCOW2_USE_OTHER,
    QCOW2_USE_MIXED = 8,            /* several of these, or twice the last */
    QCOW2_USE_ACTIVE = 16,          /* the active tables refer to it, by an entry that may be COPIED ... */
    QCOW2_USE_COMPRESSED = 32,      /* ... or by one that never is */
    QCOW2_USE_OVERFLOW = 64,        /* it has more users than a refcount can hold */
    QCOW2_USE_SEEN = 128            /* an L2 table that was repaired */
};

/* An L1 entry that is not 0. */
struct qcow2_ref {
    uint64_t l2;                    /* offset of its L2 table */
    uint32_t index;                 /* in its L1 table */
    uint32_t table;                 /* 0: the active one; else number of the snapshot, from 1 */
};

struct qcow2_check {
    struct image *im;
    const struct qcow2 *q;
    struct check *c;
    struct file *f;
    uint64_t length;                /* of the file, in whole sectors, as QEMU counts */
    uint64_t n_clusters;            /* of the file; one more may be begun by what is not aligned */
    void *counts;                   /* n_clusters + 1 numbers of `width` bytes */
    unsigned width;                 /* enough for refcounts of the image, but 4 at most */
    uint64_t max;                   /* what a counter holds: the largest refcount, or 2^32 - 1 */
    uint8_t *uses;                  /* QCOW2_USE_* of every cluster, as many as counts */
    uint64_t l1_offset, l1_entries, size;   /* the active ones, whatever --snapshot says */
    struct qcow2_ref *refs;
    size_t n_refs;
    uint64_t walked, to_walk;       /* L2 tables, for the progress */
    uint64_t repairable;            /* corruptions that are wrong refcounts or COPIED flags */
    uint64_t flags_set;             /* COPIED flags that were repaired */
    bool mixed;                     /* some cluster is a table and something else */
    bool shared;                    /* the active tables refer to some cluster more than once */
    bool beyond;                    /* some entry refers past the end of the file: the file must not grow */
    bool unreadable;                /* some table is: what it refers to was not counted, so nothing may be freed */
    bool in_header;                 /* an L1 entry of flags alone: QEMU counts what the header would refer to */
    struct claims *claims;          /* not NULL: wants to know what is counted, and nothing is compared */
    bool naming;                    /* the second pass: users of suspects are named, nothing is counted or reported */
    uint64_t suspect[QCOW2_SUSPECTS];       /* host clusters with more users than their refcount, or unlike ones */
    size_t n_suspects;
};

/* Reports n corruptions. */
#define qcow2_finding(k, n, ...) \
    ((k)->naming ? (void)0 : out_finding((k)->c, (k)->im->name, false, n, __VA_ARGS__))

/* A walk through a table. Where it cannot be read, the rest of the sector is left out. */
struct qcow2_walk {
    uint64_t table, n;              /* its offset, a multiple of 512; how many entries */
    unsigned width;                 /* bytes of an entry: 8, or 16 with subclusters */
    uint64_t next;                  /* number of the entry after this one */
    uint64_t i, at;                 /* of this entry: its number, its offset in the file */
    uint64_t entry, bitmap;         /* what it says; bitmap: 0, or of a wide entry */
    uint64_t lost, lost_at;         /* how many sectors were left out; the first of them */
    uint64_t words[8];              /* those around this entry: eight are looked up at once, for speed */
};

/* The next entry that is not 0. False: there is none in the file. */
static bool qcow2_walk(const struct qcow2_check *k, struct qcow2_walk *w)
{
    while (w->next < w->n) {
        uint64_t size = k->f->size, words;
        w->i = w->next++;
        w->at = w->table + w->i * w->width;
        if (w->at >= size || (k->claims && w->at % 4096 == 0 && ext_time_is_up(k->claims)))
            return false;
        words = util_min(8, (size - w->at + w->width - 1) / w->width * (w->width / 8));
        if (w->at % sizeof(w->words) == 0 && cache_words(k->f, w->at, w->words, words)) {
            w->lost_at = w->lost++ ? w->lost_at : w->at;
            w->next += (512 - w->at % 512) / w->width - 1;
            continue;
        }
        w->entry = be64toh(w->words[w->at % sizeof(w->words) / 8]);
        w->bitmap = w->width == 8 ? 0 : be64toh(w->words[w->at % sizeof(w->words) / 8 + 1]);
        if (w->entry || w->bitmap)
            return true;
    }
    return false;
}

/* After a walk: what could not be read is an error. `counted`: so references are missing in the counts. */
static void qcow2_end_walk(struct qcow2_check *k, const struct qcow2_walk *w, bool counted)
{
    if (!w->lost || k->naming)
        return;
    if (k->c->errors == 0)
        msg_err(0, "%s: the table at %" PRIu64 " cannot be read", k->im->name, w->lost_at);
    k->c->errors += w->lost;
    k->unreadable |= counted;
}

/* -- counting -- */

static uint64_t qcow2_counted(const struct qcow2_check *k, uint64_t cluster)
{
    return k->width == 1   ? ((uint8_t *)k->counts)[cluster]
           : k->width == 2 ? ((uint16_t *)k->counts)[cluster]
                           : ((uint32_t *)k->counts)[cluster];
}

/* Counts `times` uses of a cluster. Two of the active tables, one of which may be COPIED, share it. */
static void qcow2_count_cluster(struct qcow2_check *k, uint64_t cluster, uint64_t times, uint8_t use)
{
    uint64_t before = qcow2_counted(k, cluster), more = util_min(times, k->max - before), now = before + more;
    uint8_t others = k->uses[cluster], kinds = others & QCOW2_USE_KINDS;

    if (use & QCOW2_USE_ACTIVE)
        k->shared |= others & (QCOW2_USE_ACTIVE | QCOW2_USE_COMPRESSED);
    else if (use & QCOW2_USE_COMPRESSED)
        k->shared |= others & QCOW2_USE_ACTIVE;
    if (kinds & (use == QCOW2_USE_OTHER ? 0xff : ~use)) {
        use |= QCOW2_USE_MIXED;
        k->mixed = true;
    }
    k->uses[cluster] |= use;
    if (k->width == 1)
        ((uint8_t *)k->counts)[cluster] = (uint8_t)now;
    else if (k->width == 2)
        ((uint16_t *)k->counts)[cluster] = (uint16_t)now;
    else
        ((uint32_t *)k->counts)[cluster] = (uint32_t)now;
    if (times > more)
        k->uses[cluster] |= QCOW2_USE_OVERFLOW;
    if (times > more && k->q->refcount_order == 6)
        k->c->errors += times - more;       /* cannot be counted: this is no finding */
    else if (times > more)
        qcow2_finding(k, times - more, "host 0x%" PRIx64 ": more references than a refcount of %u bits can hold",
                      cluster << k->q->cluster_bits, 1u << k->q->refcount_order);
    if (cluster == k->n_clusters)
        k->n_clusters++;
}

/* Counts `times` uses of a range; what, guest: for the message. Its last cluster may be only begun in the file. */
static void qcow2_count_range(struct qcow2_check *k, uint64_t offset, uint64_t length, uint64_t times, uint8_t use,
                              const char *what, uint64_t guest)
{
    uint64_t cluster = qcow2_cluster(k->q);
    char name[32] = "";

    if (!length || k->naming)
        return;
    if (offset > (uint64_t)INT64_MAX || length > (uint64_t)INT64_MAX || offset + length >= k->length + cluster) {
        k->beyond = true;
        if (guest != UINT64_MAX)
            snprintf(name, sizeof(name), "guest 0x%" PRIx64 ", ", guest);
        qcow2_finding(k, times, "%s%s: 0x%" PRIx64 " bytes at host 0x%" PRIx64 " reach past the end of the file", name,
                      what, length, offset);
        return;
    }
    for (uint64_t i = offset / cluster; i <= (offset + length - 1) / cluster; i++)
        qcow2_count_cluster(k, i, times, use);
}

/* A table that has one user. */
static void qcow2_count_table(struct qcow2_check *k, uint64_t offset, uint64_t length, const char *what)
{
    qcow2_count_range(k, offset, length, 1, QCOW2_USE_OTHER, what, UINT64_MAX);
}

/* -- L1 and L2 tables -- */

/* COPIED says that the refcount is 1. Only the active tables have it. */
static void qcow2_check_copied(struct qcow2_check *k, uint64_t host, bool copied, bool is_data, uint64_t guest,
                               uint64_t times)
{
    uint64_t refcount = 1;

    if (!(is_data && (k->q->incompatible & QCOW2_DATA_FILE)) &&
        qcow2_get_refcount(k->im, host >> k->q->cluster_bits, &refcount))
        return;                     /* qcow2_compare_counts() says so */
    if ((refcount == 1) == copied)
        return;
    k->repairable += times;
    qcow2_finding(k, times, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": the %s is %s, but its refcount is %" PRIu64,
                  guest, host, is_data ? "cluster" : "L2 table",
                  copied ? "marked as used once" : "not marked as used once", refcount);
}

static void qcow2_check_compressed(struct qcow2_check *k, uint64_t entry, uint64_t bitmap, uint64_t guest,
                                   uint64_t times, uint64_t active)
{
    uint64_t end, host = qcow2_coded_range(k->q, entry, &end);
    bool misplaced = k->q->incompatible & QCOW2_DATA_FILE;

    if (entry & QCOW2_COPIED)
        qcow2_finding(k, times, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": a compressed cluster is marked as used once",
                      guest, host);
    if (misplaced || bitmap) {
        qcow2_finding(k, times, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": a compressed cluster %s", guest, host,
                      misplaced ? "in an image with an external data file" : "has subclusters");
        return;
    }
    qcow2_count_range(k, host, end - host, times, QCOW2_USE_DATA | (active ? QCOW2_USE_COMPRESSED : 0), "compressed",
                      guest);
    k->c->allocated += active;
    k->c->compressed += active;
    k->c->fragmented += active;     /* by nature */
}

/* A cluster may end past the end of the file, as in QEMU, if all that is read of it is there. times 0: not reported. */
static void qcow2_check_whole(struct qcow2_check *k, uint64_t entry, uint64_t bitmap, uint64_t guest, uint64_t times)
{
    const struct qcow2 *q = k->q;
    uint64_t need = guest >= k->size ? 0 : util_min(qcow2_cluster(q), k->size - guest);
    uint32_t allocated = (uint32_t)bitmap;

    if (q->subclusters)             /* up to the last one that is allocated */
        need = allocated ? util_min(need, (32ull - (unsigned)__builtin_clz(allocated)) << (q->cluster_bits - 5)) : 0;
    else if (entry & QCOW2_ZERO)
        need = 0;
    if (!need || (entry & QCOW2_OFFSET) + need <= q->data->size)
        return;
    k->beyond |= !(q->incompatible & QCOW2_DATA_FILE);
    if (times)
        qcow2_finding(k, times, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": %s ends before the cluster does", guest,
                      entry & QCOW2_OFFSET, util_basename(q->data->path));
}

/* One entry of an L2 table that is used `times` times, `active` of them by the active L1 table. */
static void qcow2_check_l2_entry(struct qcow2_check *k, uint64_t entry, uint64_t bitmap, uint64_t guest,
                                 uint64_t times, uint64_t active, uint64_t *follows)
{
    const struct qcow2 *q = k->q;
    uint64_t host = entry & QCOW2_OFFSET, cluster = qcow2_cluster(q);
    const char *why = qcow2_check_entry(q, entry, bitmap);

    if (entry & QCOW2_COMPRESSED) {
        qcow2_check_compressed(k, entry, bitmap, guest, times, active);
        return;
    }
    if (entry & QCOW2_L2_RESERVED)
        qcow2_finding(k, times, "guest 0x%" PRIx64 ": its L2 entry 0x%" PRIx64 " has reserved bits set", guest, entry);
    if (why)
        qcow2_finding(k, times, "guest 0x%" PRIx64 ": %s (0x%" PRIx64 ")", guest, why, entry);
    if (!host && ((entry & QCOW2_ZERO && !q->subclusters) || !qcow2_allocated(q, entry)))
        return;
    if (host % cluster)
        qcow2_finding(k, times, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": its L2 entry is not aligned", guest, host);
    if (active) {
        k->c->allocated += active;
        k->c->fragmented += *follows && host != *follows ? active : 0;
        *follows = host + cluster;
        if (!k->in_header)
            qcow2_check_copied(k, host, entry & QCOW2_COPIED, true, guest, active);
    }
    if (!(q->incompatible & QCOW2_DATA_FILE)) {
        qcow2_count_range(k, host, cluster, times, QCOW2_USE_DATA | (active ? QCOW2_USE_ACTIVE : 0), "its cluster",
                          guest);
        k->shared |= active > 1;
    }
    if ((q->incompatible & QCOW2_DATA_FILE) ? active : host < k->f->size)
        qcow2_check_whole(k, entry, bitmap, guest, active);
}

/* Names the users of clusters that have too many: an entry of an L2 table, when all has been counted. */
static void qcow2_name_user(struct qcow2_check *k, uint64_t entry, uint64_t guest, const struct qcow2_ref *ref)
{
    bool compressed = entry & QCOW2_COMPRESSED;
    uint64_t end, host = compressed ? qcow2_coded_range(k->q, entry, &end) : entry & QCOW2_OFFSET;
    uint64_t first = host >> k->q->cluster_bits, last = compressed ? (end - 1) >> k->q->cluster_bits : first;

    if (!host || (k->q->incompatible & QCOW2_DATA_FILE))
        return;
    for (size_t i = 0; i < k->n_suspects; i++)
        if (k->suspect[i] >= first && k->suspect[i] <= last)
            out_finding(k->c, k->im->name, false, 0, "host 0x%" PRIx64 " is used by guest 0x%" PRIx64 "%s%s",
                        k->suspect[i] << k->q->cluster_bits, guest, compressed ? ", compressed" : "",
                        ref->table ? ", of a snapshot" : "");
}

/* All entries of an L2 table, at refs[0].l2, that n entries of L1 tables point to. */
static void qcow2_check_l2(struct qcow2_check *k, const struct qcow2_ref *refs, size_t n)
{
    const struct qcow2 *q = k->q;
    struct qcow2_walk w = { .table = refs->l2, .n = 1ull << q->l2_bits, .width = q->entry_size };
    uint64_t first = (uint64_t)refs->index << q->l2_bits, active = 0, follows = 0;

    k->in_header = refs->l2 == 0;
    for (size_t i = 0; i < n; i++)
        active += refs[i].table == 0;
    while (qcow2_walk(k, &w)) {
        if (k->naming)
            qcow2_name_user(k, w.entry, (first + w.i) << q->cluster_bits, refs);
        else
            qcow2_check_l2_entry(k, w.entry, w.bitmap, (first + w.i) << q->cluster_bits, n, active, &follows);
    }
    qcow2_end_walk(k, &w, true);
}

static int qcow2_compare_refs(const void *a, const void *b)
{
    const struct qcow2_ref *x = a, *y = b;

    if (x->l2 != y->l2)
        return x->l2 < y->l2 ? -1 : 1;
    if (x->table != y->table)
        return x->table < y->table ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* Looks at the L2 tables gathered so far. */
static void qcow2_check_refs(struct qcow2_check *k)
{
    size_t n;

    qsort(k->refs, k->n_refs, sizeof(*k->refs), qcow2_compare_refs);
    for (size_t i = 0; i < k->n_refs; i += n) {
        for (n = 1; i + n < k->n_refs && k->refs[i + n].l2 == k->refs[i].l2;)
            n++;
        qcow2_check_l2(k, k->refs + i, n);
        out_progress_show(k->walked += n, k->to_walk);
    }
    k->n_refs = 0;
}

static void qcow2_check_l1_entry(struct qcow2_check *k, uint64_t entry, uint64_t index, uint32_t table)
{
    uint64_t l2 = entry & QCOW2_OFFSET, cluster = qcow2_cluster(k->q);
    uint64_t guest = index << (k->q->cluster_bits + k->q->l2_bits);
    bool active = table == 0 && l2;

    if (entry & QCOW2_L1_RESERVED)
        qcow2_finding(k, 1, "guest 0x%" PRIx64 ": its L1 entry 0x%" PRIx64 " has reserved bits set", guest, entry);
    if (l2 % cluster)
        qcow2_finding(k, 1, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": its L1 entry is not aligned", guest, l2);
    qcow2_count_range(k, l2, cluster, 1, QCOW2_USE_L2 | (active ? QCOW2_USE_ACTIVE : 0), "its L2 table", guest);
    k->beyond |= cluster > k->f->size || l2 > k->f->size - cluster;
    if (l2 < k->f->size && cluster > k->f->size - l2)
        qcow2_finding(k, 1, "guest 0x%" PRIx64 ", host 0x%" PRIx64 ": the file ends before its L2 table does", guest,
                      l2);
    if (active)
        qcow2_check_copied(k, l2, entry & QCOW2_COPIED, false, guest, 1);
}

/* An L1 table. table: 0, or the number of a snapshot. */
static void qcow2_check_l1_table(struct qcow2_check *k, uint64_t offset, uint64_t entries, uint32_t table)
{
    struct qcow2_walk w = { .table = offset, .n = entries, .width = 8 };

    qcow2_count_table(k, offset, entries * 8, table ? "a snapshot's L1 table" : "the L1 table");
    while (qcow2_walk(k, &w)) {
        if (!k->naming)
            qcow2_check_l1_entry(k, w.entry, w.i, table);
        if (k->n_refs == QCOW2_REFS)
            qcow2_check_refs(k);
        k->refs[k->n_refs++] = (struct qcow2_ref){ w.entry & QCOW2_OFFSET, (uint32_t)w.i, table };
        k->to_walk++;
    }
    qcow2_end_walk(k, &w, true);
}

/* Can the snapshot's L1 table be one? */
static bool qcow2_check_snapshot(struct qcow2_check *k, const struct qcow2_snapshot *sn)
{
    bool good = sn->l1_offset % qcow2_cluster(k->q) == 0 && sn->l1_entries <= QCOW2_MAX_L1 / 8;

    if (!good)
        qcow2_finding(k, 1, "snapshot '%s': its L1 table, 0x%" PRIx64 " entries at 0x%" PRIx64 ", cannot be", sn->name,
                      sn->l1_entries, sn->l1_offset);
    if (!k->q->v2 && sn->extra_len < 16)
        qcow2_finding(k, 1, "snapshot '%s': its entry lacks the size of the disk", sn->name);
    return good;
}

/* The active tables, then those of the snapshots, as long as these can lie side by side in the file. */
static void qcow2_check_tables(struct qcow2_check *k)
{
    const struct qcow2 *q = k->q;
    struct qcow2_snapshot sn = { .next = q->snapshots_offset };
    uint64_t sum = k->l1_entries * 8;

    k->walked = k->to_walk = 0;
    qcow2_check_l1_table(k, k->l1_offset, k->l1_entries, 0);
    if (q->n_snapshots && (q->incompatible & QCOW2_DATA_FILE))
        qcow2_finding(k, 1, "snapshots in an image with an external data file");
    for (uint32_t i = 1; i <= q->n_snapshots; i++) {
        if (i > QCOW2_MAX_SNAPSHOTS || sum > k->length || qcow2_next_snapshot(k->im, q, &sn)) {
            k->unreadable = true;
            qcow2_finding(k, 1, "the snapshot table is damaged from entry %u on; what only these snapshots use seems "
                          "leaked", i);
            break;
        }
        if (qcow2_check_snapshot(k, &sn) && (sum += sn.l1_entries * 8) <= k->length)
            qcow2_check_l1_table(k, sn.l1_offset, sn.l1_entries, i);
        else
            k->unreadable = true;
    }
    qcow2_check_refs(k);
    qcow2_count_table(k, q->crypt_offset, q->crypt_size, "the encryption header");
    if (q->n_snapshots)
        qcow2_count_table(k, q->snapshots_offset, sn.next - q->snapshots_offset, "the snapshot table");
}

/* -- other tables -- */

/* The bitmap's table and the clusters that it points to. */
static void qcow2_check_bitmap(struct qcow2_check *k, const struct qcow2_bitmap *b)
{
    uint64_t host, cluster = qcow2_cluster(k->q);
    struct qcow2_walk w = { .table = b->table_offset, .n = b->table_entries, .width = 8 };

    qcow2_count_table(k, b->table_offset, (uint64_t)b->table_entries * 8, "a bitmap's table");
    if (b->table_offset % cluster) {
        qcow2_finding(k, 1, "bitmap '%s': its table at 0x%" PRIx64 " is not aligned", b->name, b->table_offset);
        return;
    }
    while (qcow2_walk(k, &w)) {
        host = w.entry & QCOW2_OFFSET;
        if ((w.entry & QCOW2_BITMAP_RESERVED) || (host && (w.entry & 1)) || host % cluster)
            qcow2_finding(k, 1, "bitmap '%s': entry 0x%" PRIx64 " of its table is damaged", b->name, w.entry);
        else if (host)
            qcow2_count_table(k, host, cluster, "a bitmap");
    }
    qcow2_end_walk(k, &w, true);
}

static void qcow2_check_bitmaps(struct qcow2_check *k)
{
    const struct qcow2 *q = k->q;
    struct qcow2_bitmap b = { .next = q->bitmaps_offset };
    const char *why = NULL;
    uint64_t sum = 0;

    if (!q->n_bitmaps)
        return;
    qcow2_count_table(k, q->bitmaps_offset, q->bitmaps_size, "the bitmap directory");
    for (uint32_t i = 0; i < q->n_bitmaps && !why; i++) {
        if (i == QCOW2_MAX_BITMAPS || qcow2_next_bitmap(k->im, q, &b))
            why = "the bitmap directory is damaged";
        else if ((sum += (uint64_t)b.table_entries * 8) > k->length)
            why = "the tables of the bitmaps overlap";
        else
            qcow2_check_bitmap(k, &b);
    }
    if (why) {
        k->unreadable = true;
        qcow2_finding(k, 1, "%s", why);
    }
}

/* Last of all, for each block is used once and by nothing else. */
static void qcow2_check_blocks(struct qcow2_check *k)
{
    const struct qcow2 *q = k->q;
    struct qcow2_walk w = { .table = q->refcounts_offset, .n = q->refcounts_entries, .width = 8 };
    uint64_t cluster;

    qcow2_count_table(k, w.table, w.n * 8, "the refcount table");
    while (qcow2_walk(k, &w)) {
        cluster = w.entry >> q->cluster_bits;
        if (w.entry % qcow2_cluster(q)) {
            qcow2_finding(k, 1, "entry %" PRIu64 " of the refcount table, 0x%" PRIx64 ", is damaged", w.i, w.entry);
        } else if (cluster >= k->n_clusters) {
            qcow2_finding(k, 1, "refcount block %" PRIu64 " at host 0x%" PRIx64 " lies past the end of the file", w.i,
                          w.entry);
        } else {
            qcow2_count_cluster(k, cluster, 1, QCOW2_USE_OTHER);
            if (qcow2_counted(k, cluster) != 1)
                qcow2_finding(k, 1, "refcount block %" PRIu64 " at host 0x%" PRIx64 " is used for something else, too",
                              w.i, w.entry);
        }
    }
    qcow2_end_walk(k, &w, false);
}

/* -- comparing -- */

/* The users of this cluster are named in the second pass. */
static void qcow2_suspect(struct qcow2_check *k, uint64_t cluster)
{
    if (k->n_suspects < QCOW2_SUSPECTS)
        k->suspect[k->n_suspects++] = cluster;
}

/* Clusters in a row with the same stored and counted refcounts. */
struct qcow2_run {
    uint64_t first, n, stored, counted;
};

static void qcow2_report_run(struct qcow2_check *k, const struct qcow2_run *r)
{
    if (r->stored == r->counted || !r->n)
        return;
    out_finding(k->c, k->im->name, r->stored > r->counted, r->n, "host 0x%" PRIx64 ", %" PRIu64 " cluster%s: refcount %"
                PRIu64 ", but used %" PRIu64 " time%s", r->first << k->q->cluster_bits, r->n, r->n == 1 ? "" : "s",
                r->stored, r->counted, r->counted == 1 ? "" : "s");
    if (r->stored > r->counted)
        return;
    k->repairable += r->n;
    for (uint64_t i = 0; i < util_min(r->n, QCOW2_SUSPECTS); i++)
        qcow2_suspect(k, r->first + i);
}

static void qcow2_compare_counts(struct qcow2_check *k)
{
    uint64_t per = qcow2_per_block(k->q), block = 0, last = 0;
    struct qcow2_run run = { .n = 0 };
    int ret = 0;

    for (uint64_t i = 0; i < k->n_clusters; i++) {
        uint64_t counted = qcow2_counted(k, i), stored = 0;
        if (i % per == 0) {
            ret = qcow2_find_block(k->im, i, &block);
            out_progress_show(i, k->n_clusters);
        }
        if (ret || qcow2_read_refcount(k->im, block, i, &stored)) {
            if (k->c->errors++ == 0)
                msg_err(0, "%s: the refcount of host 0x%" PRIx64 " cannot be read", k->im->name,
                        i << k->q->cluster_bits);
            stored = counted;
        } else if (stored || counted) {
            last = i;
        }
        /* The refcount is right, but one user or the other is wrong. (QEMU does not look for that.) */
        if ((k->uses[i] & (QCOW2_USE_MIXED | QCOW2_USE_OVERFLOW)) == QCOW2_USE_MIXED && stored == counted) {
            qcow2_finding(k, 1, "host 0x%" PRIx64 " is used as %s and as something else", i << k->q->cluster_bits,
                          k->uses[i] & QCOW2_USE_L2 ? "an L2 table" : "a table");
            qcow2_suspect(k, i);
        }
        if (stored != run.stored || counted != run.counted) {
            qcow2_report_run(k, &run);
            run = (struct qcow2_run){ i, 0, stored, counted };
        }
        run.n++;
    }
    qcow2_report_run(k, &run);
    k->c->image_end = (last + 1) << k->q->cluster_bits;
}

/* The parts of the header that only matter here. */
static int qcow2_begin_check(struct qcow2_check *k)
{
    const struct qcow2 *q = k->q;
    uint64_t cluster = qcow2_cluster(q), done;
    struct qcow2_header h;
    int ret = file_pread(k->f, &h, QCOW2_HEADER_V2, 0, &done);

    if (!ret)
        ret = qcow2_check_refcount_table(k->im);
    if (ret)
        return ret;
    k->size = be64_to_cpu(h.size);
    k->l1_entries = be32_to_cpu(h.l1_entries);
    k->l1_offset = be64_to_cpu(h.l1_offset);
    if (k->l1_entries > QCOW2_MAX_L1 / 8 || k->l1_offset % cluster || k->l1_offset > (uint64_t)INT64_MAX)
        return fmt_refuse(k->im, "the L1 table: up to 32 MiB at a multiple of the cluster size below 2^63",
                          k->l1_offset);
    k->length = (k->f->size + 511) / 512 * 512;
    k->n_clusters = (k->length + cluster - 1) / cluster;
    if (k->n_clusters > INT_MAX)
        return msg_err(-EFBIG, "%s: too large to be checked (%" PRIu64 " clusters, of at most %d)", k->im->name,
                       k->n_clusters, INT_MAX);
    k->width = q->refcount_order <= 3 ? 1 : q->refcount_order == 4 ? 2 : 4;
    k->max = q->refcount_order >= 5 ? UINT32_MAX : (1ull << (1u << q->refcount_order)) - 1;
    k->c->total = ((k->size & ~511ull) + cluster - 1) / cluster;
    return 0;
}

/* Claims the clusters that were counted. */
static void qcow2_claim_counted(struct qcow2_check *k)
{
    uint64_t n;

    for (uint64_t i = 0; i < k->n_clusters; i += n) {
        bool used = qcow2_counted(k, i);
        for (n = 1; i + n < k->n_clusters && !qcow2_counted(k, i + n) == !used;)
            n++;
        if (used)
            k->claims->claim(k->claims, k->f, i << k->q->cluster_bits,
                             util_min(n << k->q->cluster_bits, k->f->size - (i << k->q->cluster_bits)), "a cluster", 0);
    }
}

/* Counts everything, then tells `claims` what is in use, or compares and calls repair(). */
static int qcow2_count_all(struct image *im, struct check *c, struct claims *claims,
                           int (*repair)(struct qcow2_check *k))
{
    struct qcow2 *q = im->state;
    struct qcow2_check k = { .im = im, .q = q, .c = c, .f = &im->files[0], .claims = claims };
    int ret = qcow2_begin_check(&k);
    uint64_t bytes = (k.n_clusters + 1) * (k.width + 1);

    if (ret)
        return ret;
    k.counts = util_map(bytes);
    k.refs = malloc(QCOW2_REFS * sizeof(*k.refs));
    if (!k.counts || !k.refs) {
        ret = msg_err(-ENOMEM, "%s: out of memory", im->name);
        goto out_counts;
    }
    k.uses = (uint8_t *)k.counts + (k.n_clusters + 1) * k.width;
    qcow2_count_table(&k, 0, qcow2_cluster(q), "the header");
    qcow2_check_tables(&k);
    qcow2_check_bitmaps(&k);
    qcow2_check_blocks(&k);
    if (claims) {
        qcow2_claim_counted(&k);
        ret = k.unreadable ? -EIO : 0;
        goto out_counts;
    }
    qcow2_compare_counts(&k);
    k.naming = true;
    if (k.n_suspects)
        qcow2_check_tables(&k);
    k.naming = false;
    q->shared = k.shared;
    ret = repair ? repair(&k) : 0;
out_counts:
    util_unmap(k.counts, bytes);
    free(k.refs);
    return ret;
}

static int qcow2_check(struct image *im, struct check *c)
{
    return qcow2_count_all(im, c, NULL, NULL);
}

/* All that is in use, also by snapshots. Without counting twice: qcow2_check() does that. */
static bool qcow2_claims(struct image *im, struct claims *claims)
{
    struct check c = { .corruption_lines = OUT_FINDINGS, .leak_lines = OUT_FINDINGS };      /* no lines */

    msg_hushed++;
    claims->stopped |= qcow2_count_all(im, &c, claims, NULL) || c.errors;
    msg_hushed--;
    return false;
}

/* Clusters without a refcount may have old data. So has the external data file, which has no refcounts. */
static bool qcow2_is_free(struct image *im, const struct file *f, uint64_t offset)
{
    const struct qcow2 *q = im->state;
    uint64_t refcount;

    return f != &im->files[0] || qcow2_get_refcount(im, offset >> q->cluster_bits, &refcount) || !refcount;
}


/* -- repairing: the image is open for writing and nobody uses it yet, so what is called here needs no lock -- */

/* Near a bad sector an entry can be read, but not be changed: then it is left. */
static void qcow2_repair_entry(struct qcow2_check *k, const struct qcow2_walk *w, uint64_t entry)
{
    k->flags_set += !qcow2_store_locked(k->im, w->at, w->width, entry, w->bitmap, QCOW2_MAPPING);
}

/* Corrects COPIED, unless the refcount could not be repaired. Never sets it while some references cannot be read. */
static void qcow2_repair_copied(struct qcow2_check *k, const struct qcow2_walk *w, bool is_data)
{
    const struct qcow2 *q = k->q;
    uint64_t refcount, host = w->entry & QCOW2_OFFSET, cluster = host >> q->cluster_bits;

    if (!host || host % qcow2_cluster(q) || cluster >= k->n_clusters ||
        (is_data && (q->incompatible & QCOW2_DATA_FILE)) || qcow2_get_refcount(k->im, cluster, &refcount))
        return;
    if ((refcount == 1) == !!(w->entry & QCOW2_COPIED) || refcount < qcow2_counted(k, cluster) ||
        (k->uses[cluster] & QCOW2_USE_OVERFLOW) || (refcount == 1 && k->unreadable))
        return;
    qcow2_repair_entry(k, w, w->entry ^ QCOW2_COPIED);
}

/* Is it a table? A wrong L1 entry may lead to the guest's data, where most numbers are no valid L2 entries. */
static bool qcow2_is_l2(const struct qcow2_check *k, uint64_t l2)
{
    const struct qcow2 *q = k->q;
    struct qcow2_walk w = { .table = l2, .n = 1ull << q->l2_bits, .width = q->entry_size };
    struct extent ext;
    int balance = 0;                /* good entries minus bad ones */

    while (qcow2_walk(k, &w)) {
        qcow2_map_entry(k->im, q, w.entry, w.bitmap, 0, qcow2_cluster(q), &ext);
        balance += ext.kind == EXT_BAD ? -1 : 1;
    }
    return balance >= 0;
}

static int qcow2_repair_l2(struct qcow2_check *k, uint64_t l2)
{
    const struct qcow2 *q = k->q;
    struct qcow2_walk w = { .table = l2, .n = 1ull << q->l2_bits, .width = q->entry_size };
    int ret = 0;

    while (!ret && qcow2_walk(k, &w)) {
        if (!(w.entry & QCOW2_COMPRESSED))
            qcow2_repair_copied(k, &w, true);
        else if (w.entry & QCOW2_COPIED)
            qcow2_repair_entry(k, &w, w.entry & ~QCOW2_COPIED);
        if (qcow2_is_due_locked(k->im))
            ret = qcow2_commit_locked(k->im);
    }
    return ret;
}

/* Is every cluster of [offset, offset + length) used for this and for nothing else? */
static bool qcow2_is_used_as(const struct qcow2_check *k, uint64_t offset, uint64_t length, uint8_t use)
{
    for (uint64_t i = offset >> k->q->cluster_bits; i << k->q->cluster_bits < offset + length; i++)
        if (i >= k->n_clusters || (k->uses[i] & (QCOW2_USE_KINDS | QCOW2_USE_MIXED)) != use)
            return false;
    return true;
}

/* COPIED in the active tables. Each L2 table is walked once. */
static int qcow2_repair_flags(struct qcow2_check *k)
{
    const struct qcow2 *q = k->q;
    struct qcow2_walk w = { .table = k->l1_offset, .n = k->l1_entries, .width = 8 };
    bool l1_is_ours = qcow2_is_used_as(k, k->l1_offset, k->l1_entries * 8, QCOW2_USE_OTHER);
    uint64_t l2, cluster = qcow2_cluster(q);
    int ret = 0;

    while (!ret && qcow2_walk(k, &w)) {
        l2 = w.entry & QCOW2_OFFSET;
        if (!l2 || l2 % cluster || (w.entry & QCOW2_L1_RESERVED) || l2 >= k->f->size || cluster > k->f->size - l2)
            continue;
        if (l1_is_ours)
            qcow2_repair_copied(k, &w, false);
        if (k->uses[l2 >> q->cluster_bits] & QCOW2_USE_SEEN)
            continue;
        k->uses[l2 >> q->cluster_bits] |= QCOW2_USE_SEEN;
        if (qcow2_is_used_as(k, l2, cluster, QCOW2_USE_L2) && qcow2_is_l2(k, l2))
            ret = qcow2_repair_l2(k, l2);
    }
    return ret;
}

/* Stores the counts, in blocks that are nothing else; *stale: some have none. Frees nothing if a table is lost. */
static int qcow2_repair_refcounts(struct qcow2_check *k, uint64_t *changed, bool *stale)
{
    struct image *im = k->im;
    uint64_t stored, counted, block, per = qcow2_per_block(k->q);
    int ret = 0;

    for (uint64_t i = 0; i < k->n_clusters && !ret; i++) {
        bool lost = qcow2_find_block(im, i, &block);
        counted = qcow2_counted(k, i);
        if (!lost && !block && !counted)
            continue;
        if (lost || !block || !qcow2_is_used_as(k, block, 1, QCOW2_USE_OTHER) ||
            qcow2_read_refcount(im, block, i, &stored)) {
            *stale = true;
            i += block || lost ? per - 1 - i % per : 0; /* the rest of this block: reading it again would be slow */
            continue;
        }
        if (stored == counted || (k->unreadable && stored > counted))
            continue;
        if (qcow2_put_refcount(im, block, i, counted)) {        /* a bad sector near it */
            *stale = true;
            continue;
        }
        ++*changed;
        if (qcow2_is_due_locked(im))
            ret = qcow2_commit_locked(im);
    }
    return ret;
}

/* Writes a new refcount block to `offset`: what was counted, and 1 for the clusters from there on up to `end`. */
static int qcow2_write_block(struct qcow2_check *k, uint64_t number, uint64_t offset, uint64_t end)
{
    const struct qcow2 *q = k->q;
    uint64_t per = qcow2_per_block(q), size = qcow2_cluster(q), done, mask, at, value;
    be64 *block = calloc(1, size);
    unsigned shift;
    int ret;

    if (!block)
        return -ENOMEM;
    for (uint64_t c = number * per; c < (number + 1) * per && c < end; c++) {
        value = c < k->n_clusters ? qcow2_counted(k, c) : 1;
        at = qcow2_refcount_offset(q, c, &shift, &mask) / 8;
        block[at] = cpu_to_be64(be64_to_cpu(block[at]) | (value & mask) << shift);
    }
    ret = file_pwrite(k->f, block, size, offset, &done);
    free(block);
    return ret;
}

/* Writes a new refcount table and all its blocks behind the end of the file, then the header names it. */
static int qcow2_rebuild(struct qcow2_check *k)
{
    struct image *im = k->im;
    struct qcow2 *q = im->state;
    uint64_t size = qcow2_cluster(q), per = qcow2_per_block(q), start = k->n_clusters, blocks = 1, table = 1, end, done;
    be64 entry;
    int ret;

    for (end = 0; end != start + blocks + table;) {
        end = start + blocks + table;
        blocks = (end + per - 1) / per;
        table = (blocks * 8 + size - 1) / size;
    }
    if (table * size > QCOW2_MAX_REFCOUNT_TABLE)
        return -EFBIG;
    ret = file_grow(k->f, end * size);
    if (!ret)
        ret = file_write_zeros(k->f, (start + blocks) * size, table * size);
    for (uint64_t i = 0; i < blocks && !ret; i++) {
        ret = qcow2_write_block(k, i, (start + i) * size, end);
        entry = cpu_to_be64((start + i) * size);
        if (!ret)
            ret = file_pwrite(k->f, &entry, 8, (start + blocks) * size + i * 8, &done);
    }
    if (!ret)
        ret = file_sync(k->f);
    if (!ret)
        ret = qcow2_write_table_offset(im, (start + blocks) * size, table);
    if (!ret)
        ret = qcow2_reload_locked(im, start * size, (blocks + table) * size);
    if (ret)
        return ret;
    q->refcounts_offset = (start + blocks) * size;
    q->refcounts_entries = table * size / 8;
    q->w->top = end * size;
    msg_say(MSG_NOTE, "%s: all refcounts were rebuilt", im->name);
    return 0;
}

/* Where a table seems to be wiped, clusters that nothing refers to are data: their refcounts stay, as if counted. */
static void qcow2_keep_leaks(struct qcow2_check *k)
{
    uint64_t refcount;

    for (uint64_t i = 0; i < k->n_clusters; i++)
        if (!qcow2_counted(k, i) && !qcow2_get_refcount(k->im, i, &refcount) && refcount)
            qcow2_count_cluster(k, i, refcount, 0);
    msg_say(MSG_NOTE, "%s: a table seems to be wiped, so no leak is freed: --repair=leaks does that, and its data is "
            "lost", k->im->name);
}

/* 1: something has changed, so it is counted again. */
static int qcow2_repair_all(struct qcow2_check *k)
{
    struct image *im = k->im;
    bool stale = false, rebuilt = false;
    uint64_t changed = 0;
    int ret = qcow2_start_writer(im);

    if (im->suspect.n && !im->opt->free_suspects)
        qcow2_keep_leaks(k);
    if (!ret)
        ret = qcow2_repair_refcounts(k, &changed, &stale);
    if (!ret)
        ret = qcow2_commit_locked(im);
    if (!ret && stale && (k->unreadable || k->beyond)) {
        msg_say(MSG_NOTE, "%s: refcount blocks are damaged, and no new ones are made: %s", im->name, k->unreadable
                ? "some tables cannot be read, so what is in use is not known"
                : "some entries refer past the end of the file, where these would lie");
    } else if (!ret && stale) {
        ret = qcow2_rebuild(k);
        rebuilt = !ret;
    }
    if (!ret && changed && !rebuilt)
        msg_say(MSG_NOTE, "%s: %" PRIu64 " refcounts were repaired", im->name, changed);
    if (!ret)
        ret = qcow2_repair_flags(k);
    if (!ret)
        ret = qcow2_commit_locked(im);
    qcow2_stop_writer(im);
    return ret ? ret : changed || rebuilt || k->flags_set;
}

/* The automatic repair: refcounts that are out of date are no damage. Anything else is left to the user. */
static int qcow2_repair_dirty(struct qcow2_check *k)
{
    if (!k->c->corruptions && !k->c->leaks)
        return 0;
    if (k->c->errors || k->mixed || k->c->corruptions != k->repairable) {
        msg_say(MSG_NOTE, "%s: was not closed properly, and more is wrong than refcounts: it is left as it is",
                k->im->name);
        return 0;
    }
    msg_say(MSG_NOTE, "%s: was not closed properly: its refcounts are rebuilt before anything is written",
            k->im->name);
    return qcow2_repair_all(k);
}

/* Counts and repairs until nothing changes: after a rebuild the old table and its blocks are free. c: what is left. */
static int qcow2_repair_by(struct image *im, struct check *c, int (*repair)(struct qcow2_check *k))
{
    struct qcow2 *q = im->state;
    const struct check none = *c;
    int ret = 1;

    for (unsigned round = 0; ret > 0; round++) {
        *c = none;
        ret = qcow2_count_all(im, c, NULL, round < 4 ? repair : NULL);
    }
    if (!ret && !c->corruptions && !c->errors)
        ret = qcow2_set_features(im, q->incompatible & ~(uint64_t)(QCOW2_DIRTY | QCOW2_CORRUPT), q->autoclear);
    return ret;
}

static int qcow2_repair(struct image *im, struct check *c)
{
    return qcow2_repair_by(im, c, qcow2_repair_all);
}

/* -- before the first write -- */

/* With wrong refcounts a cluster that is in use would be allocated (I1). So references are counted first. */
static int qcow2_count_before_writing(struct image *im, bool *sound)
{
    struct qcow2 *q = im->state;
    struct check c = { .corruption_lines = OUT_FINDINGS, .leak_lines = OUT_FINDINGS };   /* no lines, only counts */
    int ret = 0;

    *sound = !(q->incompatible & QCOW2_CORRUPT);
    if (*sound)
        ret = q->incompatible & QCOW2_DIRTY ? qcow2_repair_by(im, &c, qcow2_repair_dirty) : qcow2_check(im, &c);
    c.corruptions += ret == -EINVAL;        /* the header's fields make no sense: it has said which */
    ret = ret == -EINVAL ? 0 : ret;
    if (ret || (c.errors && !c.corruptions))        /* a disk that cannot be read is not a corrupt image */
        return msg_err(ret ? ret : -EIO, "%s: cannot be checked, so it is not opened for writing; --overlay and "
                       "--temporary need no check", im->name);
    if (c.corruptions) {
        *sound = false;
        msg_say(MSG_ERROR, "%s: is corrupt (%" PRIu64 " findings): served read-only; --check lists them, --check "
                "--repair repairs what can be repaired", im->name, c.corruptions);
    } else if (!*sound) {
        msg_say(MSG_ERROR, "%s: is marked corrupt: served read-only; --check says why, --check --repair repairs what "
                "can be repaired", im->name);
    }
    return 0;
}

static int qcow2_begin_writing(struct image *im)
{
    struct qcow2 *q = im->state;
    bool sound = true;
    int ret;

    if (im->depth == 0 && im->opt->snapshot)
        return msg_err(-EROFS, "%s: a snapshot is not written; --overlay or --temporary takes the changes", im->name);
    ret = qcow2_count_before_writing(im, &sound);
    if (ret)
        return ret;
    im->writable = sound;
    if (!sound)
        return qcow2_set_features(im, q->incompatible | QCOW2_CORRUPT, q->autoclear);
    ret = qcow2_start_writer(im);
    if (!ret && q->shared)
        msg_say(MSG_NOTE, "%s: parts of its disk share clusters; they part where they are written, which leaks "
                "clusters (--check --repair frees them)", im->name);
    if (!ret && !im->files[0].is_blk)   /* QEMU leaves the last cluster as short as it was written */
        ret = file_grow(&im->files[0], q->w->top);
    /* Autoclear features (bitmaps) do not follow our writes, but for raw external data. */
    return ret ? ret : qcow2_set_features(im, q->incompatible, q->autoclear & QCOW2_RAW_DATA);
}

static const struct image_format qcow2_format = {
    .name = "qcow2",
    .describe = "QEMU images: backing chains, zlib and zstd, snapshots, subclusters, external data",
    .writes = "in place",
    .writable = true,
    .data_file = true,
    .has_snapshots = true,
    .bad_to_qemu = true,
    .state_size = sizeof(struct qcow2),
    .extensions = " qcow2 qcow ",
    .probe = qcow2_probe,
    .remains = qcow2_remains,
    .header_length = qcow2_header_length,
    .rebuild = qcow2_rebuild_header,
    .create = qcow2_create,
    .open = qcow2_open,
    .begin_writing = qcow2_begin_writing,
    .map = qcow2_map,
    .write = qcow2_write,
    .zero = qcow2_zero,
    .sync = qcow2_sync,
    .repair = qcow2_repair,
    .resize = qcow2_resize,
    .find_holes = qcow2_find_holes,
    .info = qcow2_info,
    .snapshots = qcow2_list_snapshots,
    .claims = qcow2_claims,
    .is_free = qcow2_is_free,
    .check = qcow2_check,
    .close = qcow2_stop_writer,
};

/* ******************************************************************************************************** *
 * 24. Probing
 *
 * Finds the driver of a file, and the parts of a set. Refuses containers that would look like a broken disk.
 * ******************************************************************************************************** */

/*
 * Of two that are equally certain the first wins. VHD stands before the formats with a magic at the start: a guest
 * writes to the start of its fixed disk, but not to the footer behind it.
 */
static const struct image_format *const probe_formats[] = {
    &raw_format, &vhd_format, &vhdx_format, &qcow2_format, &vmdk_format, &vdi_format, &qed_format, &prl_format,
};

/*
 * -- containers that are not supported --
 *
 * As raw disks they would look damaged, so they are refused by name, with a way out. A raw disk may begin with any
 * bytes, so a short or textual magic needs more evidence. Text formats must be text throughout the probed head, and
 * small.
 */

static bool probe_is_text(const struct probe *p)
{
    for (size_t i = 0; i < p->head_len; i++)
        if ((p->head[i] < ' ' && !strchr("\t\r\n", p->head[i])) || !p->head[i] || p->head[i] == 0x7f)
            return false;
    return p->head_len && p->size <= (16 << 20);
}

/* Are these `len` bytes all digits of base 8 or 16? */
static bool probe_is_digits(const uint8_t *bytes, size_t len, unsigned base)
{
    for (size_t i = 0; i < len; i++)
        if (base == 16 ? !isxdigit(bytes[i]) : bytes[i] < '0' || bytes[i] > '7')
            return false;
    return true;
}

/* The header of a member, of any flavour: its checksum counts its own field as blanks. */
static bool probe_is_tar(const struct probe *p)
{
    uint32_t sum = 0, want = 0;
    size_t i = 148;

    if (p->head_len < 512 || !p->head[0])
        return false;
    while (i < 155 && p->head[i] == ' ')
        i++;
    if (i == 155 || !probe_is_digits(p->head + i, 1, 8))
        return false;
    for (; i < 156 && probe_is_digits(p->head + i, 1, 8); i++)
        want = want * 8 + p->head[i] - '0';
    for (i = 0; i < 512; i++)
        sum += i >= 148 && i < 156 ? ' ' : p->head[i];
    return sum == want;
}

static bool probe_is_ova(const struct probe *p)
{
    const char *name = (const char *)p->head;
    size_t len = strnlen(name, 100);

    return probe_is_tar(p) && len > 4 && strncasecmp(name + len - 4, ".ovf", 4) == 0;
}

static bool probe_is_gzip(const struct probe *p)
{
    return p->head_len >= 10 && !(p->head[3] & 0xe0);
}

static bool probe_is_bzip2(const struct probe *p)
{
    return p->head_len >= 10 && p->head[3] >= '1' && p->head[3] <= '9' &&
           (memcmp(p->head + 4, "1AY&SY", 6) == 0 || memcmp(p->head + 4, "\x17\x72\x45\x38\x50\x90", 6) == 0);
}

static bool probe_is_lz4(const struct probe *p)
{
    return p->head_len >= 7 && p->head[4] >> 6 == 1 && !(p->head[4] & 2) && !(p->head[5] & 0x8f) && p->head[5] >= 0x40;
}

/* Blocks of 8 MiB, each after its coded length. */
static bool probe_is_lz4_legacy(const struct probe *p)
{
    return p->head_len >= 8 && util_le32(p->head + 4) && util_le32(p->head + 4) <= (8 << 20) + (8 << 20) / 255 + 16;
}

static bool probe_is_lzip(const struct probe *p)
{
    return p->head_len >= 6 && p->head[4] <= 1 && (p->head[5] & 0x1f) >= 12 && (p->head[5] & 0x1f) <= 29;
}

/* The usual properties; a dictionary of 2^n or 3 * 2^n bytes; an unknown or possible size; the range coder's 0. */
static bool probe_is_lzma(const struct probe *p)
{
    uint32_t dictionary = p->head_len >= 18 ? util_le32(p->head + 1) : 0, bit = dictionary & -dictionary;
    uint64_t size = p->head_len >= 18 ? util_le64(p->head + 5) : 0;

    return dictionary >= 4096 && (dictionary == bit || dictionary == 3 * bit) &&
           (size == UINT64_MAX || (size && size < 1ull << 40)) && !p->head[13];
}

/* Skippable frames of zstd or lz4 before a data frame. */
static bool probe_is_skippable(const struct probe *p)
{
    size_t at = 0;

    while (at + 8 <= p->head_len && p->head[at] >> 4 == 5 && memcmp(p->head + at + 1, "\x2a\x4d\x18", 3) == 0 &&
           util_le32(p->head + at + 4) < p->head_len)
        at += 8 + util_le32(p->head + at + 4);
    return at && at + 4 <= p->head_len && (memcmp(p->head + at, "\x28\xb5\x2f\xfd", 4) == 0 ||
                                           memcmp(p->head + at, "\x04\x22\x4d\x18", 4) == 0);
}

static bool probe_is_cpio(const struct probe *p)
{
    if (p->head_len < 110 || p->head[4] != '0')
        return false;
    return p->head[5] == '7' ? probe_is_digits(p->head, 76, 8)
                             : (p->head[5] == '1' || p->head[5] == '2') && probe_is_digits(p->head, 110, 16);
}

/* dump(8): 1 KiB of numbers, in either byte order, with a magic (of one of two versions) and a fixed sum. */
static bool probe_is_dump(const struct probe *p)
{
    uint32_t sum_le = 0, sum_be = 0, le, be;

    if (p->head_len < 1024)
        return false;
    for (size_t i = 0; i < 1024; i += 4) {
        sum_le += util_le32(p->head + i);
        sum_be += util_be32(p->head + i);
    }
    le = util_le32(p->head + 24);
    be = util_be32(p->head + 24);
    return (le == 60012 || be == 60012 || le == 0x19540119 || be == 0x19540119) &&
           (sum_le == 84446 || sum_be == 84446);
}

static bool probe_is_fsarchiver(const struct probe *p)
{
    return memmem(p->head, p->head_len, "FsArCh_00", 9);
}

static bool probe_is_nvram(const struct probe *p)
{
    return p->size <= (1 << 20);
}

static bool probe_is_ghost(const struct probe *p)
{
    return p->head_len >= 512 && !(p->head[3] & 0xf7);
}

/* A mapfile of GNU ddrescue: comments, the current position and status, and at least one range. */
static bool probe_is_mapfile(const struct probe *p)
{
    char text[4096 + 1], *line = text, *next, status;
    long long at, size;
    unsigned n = 0;

    if (!probe_is_text(p) || p->head_len >= sizeof(text))
        return false;
    memcpy(text, p->head, p->head_len);
    text[p->head_len] = 0;
    for (; n < 2 && (next = strchr(line, '\n')); line = next + 1) {
        *next = 0;
        if (*line == '#' || !line[strspn(line, " \t\r")])
            continue;
        if (n++ == 0 ? sscanf(line, "%lli %c", &at, &status) != 2 || !strchr("?*/-FG+", status)
                     : sscanf(line, "%lli %lli %c", &at, &size, &status) != 3 || !strchr("?*/-+", status))
            return false;
    }
    return n == 2;
}

#define PROBE_UNPACK "unpack it first"
#define PROBE_NAME_DISK "name the file of the disk that it tells of"
#define PROBE_NAME_COPY "name the image itself; --mapfile=FILE tells what of it was not read"
#define PROBE_CONVERT "qemu-img convert makes a raw image of it"
#define PROBE_RESTORE "its own program restores the disk"

struct probe_container {
    const char *name, *way_out, *magic;
    size_t length, offset;          /* of magic */
    bool tail;                      /* offset counts from the start of the last 512 bytes */
    const char *text;               /* if not NULL: a text file that contains this */
    bool (*check)(const struct probe *p);   /* a further condition; NULL: none */
};
#define PROBE_MAGIC(bytes) .magic = (bytes), .length = sizeof(bytes) - 1

static const struct probe_container probe_foreign[] = {
    { "a qcow image (version 1)", PROBE_CONVERT, PROBE_MAGIC("QFI\xfb") },
    { "a VMDK descriptor in UTF-16", "save it in UTF-8", PROBE_MAGIC("\xff\xfe#\0 \0D\0i\0") },
    { "a VMDK descriptor in UTF-16", "save it in UTF-8", PROBE_MAGIC("\xfe\xff\0#\0 \0D\0i") },
    { "an EWF (E01, S01) image", "ewfmount or ewfexport shows the disk", PROBE_MAGIC("EVF\t\r\n\xff\0") },
    { "an EWF delta file", PROBE_NAME_DISK, PROBE_MAGIC("MVF\t\r\n\xff\0") },
    { "an EWF logical (L01) image", "it holds files, not a disk", PROBE_MAGIC("LVF\t\r\n\xff\0") },
    { "an EWF2 (Ex01) image", "ewfmount or ewfexport of libewf shows the disk", PROBE_MAGIC("EVF2\r\n\x81\0") },
    { "an EWF2 logical (Lx01) image", "it holds files, not a disk", PROBE_MAGIC("LEF2\r\n\x81\0") },
    { "an AFF image", "affuse or affconvert -r shows the disk", PROBE_MAGIC("AFF10\r\n\0") },
    { "an AD1 image", "FTK Imager reads it; it holds files, not a disk", PROBE_MAGIC("ADSEGMENTEDFILE") },
    { "an image that FTK encrypted", "FTK Imager decrypts it, given the key", PROBE_MAGIC("ADCRYPT\0") },
    { "a Bochs image", PROBE_CONVERT, PROBE_MAGIC("Bochs Virtual HD Image") },
    { "a cloop image", PROBE_CONVERT, PROBE_MAGIC("#!/bin/sh\n#V") },
    { "a COW file of User Mode Linux or QEMU", "uml_moo merges it with its backing file", PROBE_MAGIC("OOOM\0\0\0") },
    { "a COW file of User Mode Linux", "uml_moo merges it with its backing file", PROBE_MAGIC("MOOO\x01\0\0\0") },
    { "an Apple sparse image", "hdiutil convert makes a raw image of it", PROBE_MAGIC("sprs\0\0\0\x03") },
    { "an Apple ASIF image", "diskutil attaches it", PROBE_MAGIC("shdw\0\0\0") },
    { "an encrypted Apple disk image", "hdiutil convert decrypts it, given the key", PROBE_MAGIC("encrcdsa") },
    { "an encrypted Apple disk image", "hdiutil convert decrypts it, given the key",
      PROBE_MAGIC("cdsaencr"), .offset = 504, .tail = true },
    { "an Apple disk image (UDIF)", "dmg2img or qemu-img convert -f dmg makes a raw image of it",
      PROBE_MAGIC("koly\0\0\0\x04"), .tail = true },
    { "an Android sparse image", "simg2img makes a raw image of it", PROBE_MAGIC("\x3a\xff\x26\xed\x01\0") },
    { "a partclone image", "partclone.restore -W -s FILE -O RAW makes a raw image of it",
      PROBE_MAGIC("partclone-image") },
    { "an ntfsclone image", "ntfsclone -r -O RAW FILE makes a raw image of it", PROBE_MAGIC("\0ntfsclone-image") },
    { "a partimage image", PROBE_RESTORE, PROBE_MAGIC("PaRtImAgE-VoLuMe") },
    { "an FSArchiver archive", PROBE_RESTORE, PROBE_MAGIC("FsA0"), .check = probe_is_fsarchiver },
    { "a dump of files", "restore(8) unpacks it", .check = probe_is_dump },
    { "a Windows image (WIM, ESD)", "wimapply of wimlib unpacks it", PROBE_MAGIC("MSWIM\0\0\0") },
    { "a Windows image (WIM, ESD)", "wimapply of wimlib unpacks it", PROBE_MAGIC("WLPWM\0\0\0") },
    { "a Norton Ghost image", PROBE_RESTORE, PROBE_MAGIC("\xfe\xef\x01"), .check = probe_is_ghost },
    { "an Acronis True Image backup", PROBE_RESTORE, PROBE_MAGIC("\xb4nhD") },
    { "an Acronis True Image backup", PROBE_RESTORE, PROBE_MAGIC("\xce\x24\xb9\xa2\x20\0\0\0") },
    { "an Acronis True Image backup", PROBE_RESTORE, PROBE_MAGIC("\xcd\x20\xaa\xaa\x02\0\0\0") },
    { "a Proxmox backup (VMA)", "vma extract unpacks it", PROBE_MAGIC("VMA\0\0\0\0\x01") },
    { "a saved state of VMware", PROBE_NAME_DISK, PROBE_MAGIC("\xd0\xbe\xd0\xbe") },
    { "a saved state of VMware", PROBE_NAME_DISK, PROBE_MAGIC("\xd1\xba\xd1\xba") },
    { "a saved state of VMware", PROBE_NAME_DISK, PROBE_MAGIC("\xd2\xbe\xd2\xbe") },
    { "a saved state of VMware", PROBE_NAME_DISK, PROBE_MAGIC("\xd3\xbe\xd3\xbe") },
    { "a VMware .nvram file", PROBE_NAME_DISK, PROBE_MAGIC("MRVN"), .check = probe_is_nvram },
    { "a saved state of VirtualBox", PROBE_NAME_DISK, PROBE_MAGIC("\x7fVirtualBox SavedState") },
    { "a saved state of QEMU", PROBE_NAME_DISK, PROBE_MAGIC("QEVM\0\0\0") },
    { "a saved state of libvirt", PROBE_NAME_DISK, PROBE_MAGIC("LibvirtQemudSave") },
    { "a tar archive with a virtual machine (OVA)", "tar -xf unpacks it; the .vmdk in it is the disk",
      .check = probe_is_ova },
    { "a tar archive with a virtual machine (XVA)", PROBE_UNPACK, PROBE_MAGIC("ova.xml\0"), .check = probe_is_tar },
    { "a tar archive", "tar -xf unpacks it", .check = probe_is_tar },
    { "a cpio archive", PROBE_UNPACK, PROBE_MAGIC("0707"), .check = probe_is_cpio },
    { "an ar archive (.deb is one)", PROBE_UNPACK, PROBE_MAGIC("!<arch>\n") },
    { "a rar archive", PROBE_UNPACK, PROBE_MAGIC("Rar!\x1a\x07") },
    { "a 7z archive", PROBE_UNPACK, PROBE_MAGIC("7z\xbc\xaf\x27\x1c") },
    { "a zip archive (AFF4 is one)", PROBE_UNPACK, PROBE_MAGIC("PK\x03\x04") },
    { "a zip archive", PROBE_UNPACK, PROBE_MAGIC("PK\x07\x08PK\x03\x04") },
    { "a cabinet archive", PROBE_UNPACK, PROBE_MAGIC("MSCF\0\0\0\0") },
    { "a gzip-compressed file", "gunzip -k unpacks it", PROBE_MAGIC("\x1f\x8b\x08"), .check = probe_is_gzip },
    { "a bzip2-compressed file", "bunzip2 -k unpacks it", PROBE_MAGIC("BZh"), .check = probe_is_bzip2 },
    { "an xz-compressed file", "unxz -k unpacks it", PROBE_MAGIC("\xfd" "7zXZ\0") },
    { "an lzma-compressed file", "unlzma -k unpacks it", PROBE_MAGIC("\x5d\0\0"), .check = probe_is_lzma },
    { "a zstd-compressed file", "unzstd unpacks it", PROBE_MAGIC("\x28\xb5\x2f\xfd") },
    { "a zstd- or lz4-compressed file", "unzstd or unlz4 unpacks it", .check = probe_is_skippable },
    { "an lz4-compressed file", "unlz4 unpacks it", PROBE_MAGIC("\x04\x22\x4d\x18"), .check = probe_is_lz4 },
    { "an lz4-compressed file", "unlz4 unpacks it", PROBE_MAGIC("\x02\x21\x4c\x18"), .check = probe_is_lz4_legacy },
    { "an lzop-compressed file", "lzop -d unpacks it", PROBE_MAGIC("\x89LZO\0\r\n\x1a\n") },
    { "an lzip-compressed file", "lzip -dk unpacks it", PROBE_MAGIC("LZIP"), .check = probe_is_lzip },
    { "an lrzip-compressed file", "lrzip -d unpacks it", PROBE_MAGIC("LRZI\0") },
    { "a compressed ISO image (ISZ)", PROBE_UNPACK, PROBE_MAGIC("IsZ!\x40") },
    { "a file encrypted by openssl", "openssl enc -d decrypts it", PROBE_MAGIC("Salted__") },
    { "a file encrypted by age", "age -d decrypts it", PROBE_MAGIC("age-encryption.org/v") },
    { "a mapfile of GNU ddrescue", PROBE_NAME_COPY, .check = probe_is_mapfile },
    { "a mapfile of GNU ddrescue", PROBE_NAME_COPY, .text = "# Rescue Logfile. Created by" },
    { "a .vmx file (settings of a VMware machine)", PROBE_NAME_DISK, .text = "config.version" },
    { "a .vmx file (settings of a VMware machine)", PROBE_NAME_DISK, .text = "virtualHW.version" },
    { "a .vmsd file (list of snapshots of VMware)", PROBE_NAME_DISK, PROBE_MAGIC(".encoding"), .text = "snapshot." },
    { "a file of settings of VMware", PROBE_NAME_DISK, PROBE_MAGIC(".encoding"), .text = "=" },
    { "a .vmxf file (settings of VMware)", PROBE_NAME_DISK, .text = "<Foundry" },
    { "a .vbox file (settings of a VirtualBox machine)", PROBE_NAME_DISK, .text = "<VirtualBox" },
    { "a description of a virtual machine (OVF)", PROBE_NAME_DISK, .text = "http://schemas.dmtf.org/ovf/" },
    { "a description of a virtual machine (OVF)", PROBE_NAME_DISK, .text = "<Envelope" },
    { "a file of settings of a Parallels machine", PROBE_NAME_DISK, .text = "<ParallelsVirtualMachine" },
    { "a description of a libvirt machine", PROBE_NAME_DISK, PROBE_MAGIC("<"), .text = "<domain" },
    { "an Info.plist of an Apple sparse bundle", "hdiutil convert makes a raw image of it",
      .text = "com.apple.diskimage.sparsebundle" },
    { "an XML file", PROBE_NAME_DISK, PROBE_MAGIC("<?xml"), .text = "<?xml" },
    { "an XML file", PROBE_NAME_DISK, PROBE_MAGIC("\xef\xbb\xbf<?xml"), .text = "<?xml" },
    { "an XML file in UTF-16", PROBE_NAME_DISK, PROBE_MAGIC("\xff\xfe<\0?\0x\0m\0l\0") },
};

/* The name of the piece after this one. False: the name is not one of a piece. */
static bool probe_next_piece(const char *path, char next[PATH_MAX])
{
    const char *base = util_basename(path);
    int stem = (int)strlen(path), digits = 0, letters = 0;

    while (digits < 9 && path + stem - digits > base && isdigit((unsigned char)path[stem - digits - 1]))
        digits++;
    while (path + stem - letters > base && path[stem - letters - 1] == 'a')
        letters++;
    if (digits)
        return snprintf(next, PATH_MAX, "%.*s%0*lu", stem - digits, path, digits,
                        strtoul(path + stem - digits, NULL, 10) + 1) < PATH_MAX;
    if (letters > 1)
        return snprintf(next, PATH_MAX, "%.*sb", stem - 1, path) < PATH_MAX;
    return stem > 4 && strcasecmp(path + stem - 4, ".vhd") == 0 &&
           snprintf(next, PATH_MAX, "%.*s%c01", stem - 3, path, path[stem - 3]) < PATH_MAX;
}

static bool probe_is_container(const struct probe *p, const struct probe_container *c)
{
    const uint8_t *bytes = c->tail ? p->tail : p->head;
    size_t len = c->tail ? p->tail_len : p->head_len;

    return (!c->magic || (c->offset + c->length <= len && memcmp(bytes + c->offset, c->magic, c->length) == 0)) &&
           (!c->text || (probe_is_text(p) && memmem(p->head, p->head_len, c->text, strlen(c->text)))) &&
           (!c->check || c->check(p));
}

/* Refuses containers that are not supported. */
static int probe_check_foreign(const struct image *im, const struct probe *p)
{
    char next[PATH_MAX];
    bool piece = probe_next_piece(im->name, next) && file_exists(next);

    for (const struct probe_container *c = probe_foreign; c < probe_foreign + ARRAY_LEN(probe_foreign); c++)
        if (probe_is_container(p, c))
            return msg_err(-EMEDIUMTYPE, "%s: is %s, which this version does not read: %s%s; --format raw shows "
                           "its bytes", im->name, c->name, c->way_out, piece ? ", when its pieces are joined" : "");
    return 0;
}

/* Prefix of a recorded format that QEMU must refuse. With the longest name 15 bytes: QEMU ignores longer ones. */
static const char probe_not_for_qemu[] = "fx-";

/* The recorded format of a backing file, without the prefix. */
static const char *probe_recorded_format(const char *word)
{
    size_t len = sizeof(probe_not_for_qemu) - 1;

    return strncmp(word, probe_not_for_qemu, len) == 0 ? word + len : word;
}

static const struct image_format *probe_format_named(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++)
        if (strcmp(name, probe_formats[i]->name) == 0)
            return probe_formats[i];
    return NULL;
}

/* Refuses an unknown format name and suggests the one that was probably meant. */
static int probe_unknown_format(const char *name)
{
    static const char *const others[][2] = {
        { "vhd", "vpc" }, { "img", "raw" }, { "dd", "raw" }, { "iso", "raw" }, { "hdd", "parallels" },
        { "qcow", "qcow2" },
    };
    const char *meant = NULL;

    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++)
        if (strcasecmp(name, probe_formats[i]->name) == 0)
            meant = probe_formats[i]->name;
    for (size_t i = 0; i < ARRAY_LEN(others); i++)
        if (strcasecmp(name, others[i][0]) == 0)
            meant = others[i][1];
    return msg_err(-EINVAL, "unknown format '%s'%s%s (fuseexp --formats lists them)", name,
                   meant ? "; here it is called " : "", meant ? meant : "");
}

/* Does a file of this name describe an image that is a directory? */
static bool probe_is_directory_file(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++)
        if (probe_formats[i]->directory_file && strcmp(name, probe_formats[i]->directory_file) == 0)
            return true;
    return false;
}

/* The most certain format; raw if nothing else matches. */
static const struct image_format *probe_most_certain(const struct probe *p)
{
    const struct image_format *format = NULL;
    int best = 0, score;

    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++) {
        score = probe_formats[i]->probe(p);
        if (score > best) {
            best = score;
            format = probe_formats[i];
        }
    }
    return format;
}

/* Reads the front of `head` and the end of `tail`; either may be NULL. What cannot be read ends them early. */
static void probe_read(struct probe *p, struct file *head, struct file *tail)
{
    p->size = p->head_len = p->tail_len = 0;
    if (tail) {
        p->size = tail->size;
        p->tail_len = util_min(tail->size, sizeof(p->tail));
        (void)file_pread_front(tail, p->tail, 0, &p->tail_len, tail->size - p->tail_len);
    }
    if (head) {
        p->size = head->size;
        p->head_len = util_min(head->size, sizeof(p->head));
        (void)file_pread_front(head, p->head, 0, &p->head_len, 0);
    }
}

/*
 * -- lost headers --
 *
 * A container that has lost its first sector must not pass as a raw disk: fsck would "repair" its tables. So a file
 * that no format claims, and that does not begin like a disk either, is looked at again: has it the extension of a
 * container, or anything that only stands in one?
 */

enum { PROBE_SHIFTED = 4 << 20 };

/* What disks, partitions and file systems have near their start. */
static const struct {
    uint32_t offset;
    uint8_t length;
    const char *magic;
} probe_disks[] = {
    { 510, 2, "\x55\xaa" },         /* MBR, FAT, NTFS, exFAT, BitLocker */
    { 512, 8, "EFI PART" },         { 4096, 8, "EFI PART" },        /* GPT: sectors of 512, 4096 bytes */
    { 0, 2, "ER" },                 /* Apple's partition map */
    { 1080, 2, "\x53\xef" },        /* ext2, ext3, ext4 */
    { 0, 4, "XFSB" },               { 65600, 8, "_BHRfS_M" },       /* XFS, btrfs */
    { 1024, 4, "\x10\x20\xf5\xf2" },    { 1024, 4, "\xe2\xe1\xf5\xe0" },    /* F2FS, EROFS */
    { 1024, 2, "H+" },              { 1024, 2, "HX" },              { 32, 4, "NXSB" },      /* HFS+, APFS */
    { 32769, 5, "CD001" },          { 32768, 4, "JFS1" },           { 65588, 6, "ReIsEr" },
    { 0, 4, "hsqs" },               { 0, 6, "LUKS\xba\xbe" },       { 4086, 10, "SWAPSPACE2" },
    { 0, 8, "LABELONE" },           { 512, 8, "LABELONE" },         /* LVM: in any of four sectors */
    { 1024, 8, "LABELONE" },        { 1536, 8, "LABELONE" },
    { 4096, 4, "\xfc\x4e\x2b\xa9" },    { 0, 4, "\xfc\x4e\x2b\xa9" },       /* md RAID */
};

static bool probe_begins_like_disk(struct file *f)
{
    uint8_t bytes[16];

    for (size_t i = 0; i < ARRAY_LEN(probe_disks); i++)
        if (probe_disks[i].offset + (uint64_t)probe_disks[i].length <= f->size &&
            file_read(f, bytes, probe_disks[i].length, probe_disks[i].offset) == 0 &&
            memcmp(bytes, probe_disks[i].magic, probe_disks[i].length) == 0)
            return true;
    return false;
}

/* Where a whole disk begins that does not begin at 0: its GPT says that it is in sector 1. 0: nowhere near. */
static uint64_t probe_find_shifted(struct file *f)
{
    struct gpt_header h;

    for (uint64_t at = 1024; at + sizeof(h) <= util_min(f->size, PROBE_SHIFTED); at += 512)
        if (file_read(f, &h, sizeof(h), at) == 0 && memcmp(h.signature, "EFI PART", 8) == 0 &&
            le64_to_cpu(h.my_lba) == 1 && le64_to_cpu(h.other_lba) > 1)
            return at - 512;
    return 0;
}

/* The format whose images have the extension of this name; NULL: none. Flat extents of VMware are raw. */
static const struct image_format *probe_format_called(const char *name)
{
    const char *base = util_basename(name), *dot = strrchr(base, '.');
    char word[16];

    if (!dot || strlen(dot) > 8 || strcasestr(base, "-flat.") || strcasestr(base, "-rdm") || strcasestr(base, "-f0"))
        return NULL;
    snprintf(word, sizeof(word), " %s ", dot + 1);
    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++)
        if (probe_formats[i]->extensions && strcasestr(probe_formats[i]->extensions, word))
            return probe_formats[i];
    return NULL;
}

/* Raw was assumed: refuses what is an image without its header, or sets im->format if that can be read. */
static int probe_check_headless(struct image *im)
{
    struct file *f = &im->files[0];
    const struct image_format *called = probe_format_called(im->name), *left = NULL;
    char next[PATH_MAX];
    uint64_t shift, length = f->size;
    bool data = true;

    file_seek_extent(f, 0, f->size, &data, &length);
    if (f->is_blk || !f->size || (!data && length == f->size))
        return 0;                   /* a real disk, or one that was never written */
    if (probe_begins_like_disk(f) || (probe_next_piece(im->name, next) && file_exists(next)))
        return 0;                   /* pieces are looked at later */
    left = called && called->remains && called->remains(f) ? called : NULL;
    for (size_t i = 0; i < ARRAY_LEN(probe_formats) && !left; i++)
        left = probe_formats[i]->remains && probe_formats[i]->remains(f) ? probe_formats[i] : NULL;
    if (left && (left->opens_headless || (im->opt->rebuild && left->rebuild))) {
        msg_say(MSG_NOTE, "%s: a %s image that has lost its first sector", im->name, left->name);
        im->format = left;
        return 0;
    }
    if (left || called)
        return msg_err(-EINVAL, "%s: %s a %s image, but its header is lost;%s --header=FILE takes that of another "
                       "image made with the same options, --format raw shows the bytes of this file", im->name,
                       left ? "is what is left of" : "is called like", left ? left->name : called->name,
                       left && left->rebuild ? " --rebuild puts it together from what is left," : "");
    shift = probe_find_shifted(f);
    if (shift)
        return msg_err(-EINVAL, "%s: holds a disk that begins at %" PRIu64 ", behind a header that is lost or not "
                       "known; --format raw --offset=%" PRIu64 " shows it, --format raw the bytes of this file",
                       im->name, shift, shift);
    return 0;
}

/* --header: the front of another image of the same kind stands for this one's. Nothing is written. */
static int probe_borrow_header(struct image *im)
{
    struct file donor = { 0 }, *f = &im->files[0];
    const struct image_format *format;
    struct probe p;
    uint64_t length = 0, len;
    int ret = file_open(&donor, im->opt->header, false);

    if (ret)
        return ret;
    probe_read(&p, &donor, &donor);
    format = probe_most_certain(&p);
    if (!format->plain && format->header_length)
        length = util_min(format->header_length(&donor), donor.size);
    if (!length)
        ret = msg_err(-EINVAL, "%s: is a %s image, which has no header to lend", im->opt->header, format->name);
    if (!ret && im->opt->format && im->format != format)
        ret = msg_err(-EINVAL, "%s: is a %s image, not %s", im->opt->header, format->name, im->format->name);
    for (uint64_t at = 0; at < length && !ret; at += FILE_PATCH) {
        uint8_t page[FILE_PATCH] = { 0 };
        len = util_min(f->size - util_min(at, f->size), sizeof(page));
        (void)file_pread_front(f, page, 0, &len, at);
        ret = file_read(&donor, page, util_min(length - at, sizeof(page)), at);
        if (!ret)
            ret = file_patch(f, at, page);
    }
    if (!ret) {
        msg_say(MSG_NOTE, "%s: the first %" PRIu64 " bytes are taken from %s", im->name, length, im->opt->header);
        im->format = format;
    }
    file_forget(&donor);
    return ret;
}

/* Sets im->format: the one named, or the most certain. Says when raw is only assumed. */
static int probe_image(struct image *im, const char *wanted)
{
    struct file *first = &im->files[0];
    struct probe p;
    int ret;

    if (wanted) {
        im->format = probe_format_named(wanted);
        if (!im->format)
            return probe_unknown_format(wanted);
    }
    if (im->opt->header)
        return probe_borrow_header(im);
    if (wanted)
        return 0;
    probe_read(&p, first, &im->files[im->n_files - 1]);
    im->format = probe_most_certain(&p);
    if (!im->format->plain)
        return 0;
    if (probe_is_directory_file(util_basename(first->path)))
        return msg_err(-EINVAL, "%s: is damaged or not in UTF-8, so nothing says which image files belong together; "
                       "they can be opened alone", im->name);
    if (probe_check_foreign(im, &p))
        return -EMEDIUMTYPE;
    ret = probe_check_headless(im);
    if (ret || !im->format->plain)
        return ret;
    /* If the first sector cannot be read, do not guess: on a failing disk it may have been of any format. */
    if (first->size && !p.head_len && !probe_begins_like_disk(first))
        return msg_err(-EIO, "%s: cannot tell the format of what cannot be read; --format names it", im->name);
    if (!first->is_blk && first->size)
        msg_say(MSG_NOTE, "%s: raw disk image assumed (--format raw silences this)", im->name);
    return 0;
}

/* inside: the path of the file `name` in this directory. False: there is none. */
static bool probe_find_inside(const char *directory, const char *name, char inside[PATH_MAX])
{
    return name && snprintf(inside, PATH_MAX, "%s/%s", directory, name) < PATH_MAX && file_exists(inside);
}

/* Refuses directories that hold a disk in an unsupported format. */
static int probe_check_foreign_directory(const char *path)
{
    static const struct {
        const char *file, *name, *way_out;
    } directories[] = {
        { "bands", "an Apple sparse bundle", "hdiutil convert or sparsebundlefs shows the disk" },
        { "clonezilla-img", "a directory of Clonezilla", "name the image of a partition in it" },
    };
    char inside[PATH_MAX];

    for (size_t i = 0; i < ARRAY_LEN(directories); i++)
        if (probe_find_inside(path, directories[i].file, inside))
            return msg_err(-EMEDIUMTYPE, "%s: is %s, which this version does not read: %s", path, directories[i].name,
                           directories[i].way_out);
    return 0;
}

/*
 * Adds a file to the image. An image may be a directory (Parallels): then its descriptor is opened. file_open()
 * refuses other directories.
 */
static int probe_add_file(struct image *im, const char *path)
{
    struct file *f = &im->files[im->n_files];
    bool directory = file_is_directory(path);
    char inside[PATH_MAX];
    size_t i = 0;
    int ret;

    if (im->n_files == MAX_PARTS)
        return msg_err(-E2BIG, "%s: more than %d parts", im->name, MAX_PARTS);
    if (directory && probe_check_foreign_directory(path))
        return -EMEDIUMTYPE;
    while (directory && i < ARRAY_LEN(probe_formats) &&
           !probe_find_inside(path, probe_formats[i]->directory_file, inside))
        i++;
    im->n_files++;
    if (!directory || i == ARRAY_LEN(probe_formats))
        return file_open(f, path, im->writable);
    ret = file_open_beneath(f, path, probe_formats[i]->directory_file, inside, false);
    if (ret && !file_is_open(f))
        msg_err(ret, "%s: %s", inside,
                ret == -EXDEV || ret == -ELOOP ? "leads out of its directory" : strerror(-ret));
    return ret;
}

/* Opens the parts after the first. A gap in the numbering means a missing part, not the end of the set. */
static int probe_find_parts(struct image *im)
{
    char name[PATH_MAX], missing[PATH_MAX] = "";
    int ret;

    if (im->n_given > 1 || im->files[0].is_blk || !im->format->part)
        return 0;
    for (unsigned i = 1, gap = 0; gap < RAW_GAP && im->format->part(im->name, i, name); i++) {
        if (!file_exists(name)) {
            if (gap++ == 0)
                util_copy(missing, sizeof(missing), name);
            continue;
        }
        if (gap)
            return msg_err(-ENOENT, "%s: missing, though %s is there", missing, util_basename(name));
        ret = probe_add_file(im, name);
        if (ret)
            return ret;
        im->found_parts = true;
    }
    if (im->found_parts)
        msg_say(MSG_NOTE, "%s: first of %u parts, the last is %s (--no-parts takes the first alone)",
                im->name, im->n_files, util_basename(im->files[im->n_files - 1].path));
    return 0;
}

/*
 * -- pieces --
 *
 * A container that was split into pieces (.001, .aa, disk.vmdk.000000000, .vhd and .v01) must be joined first. The
 * first piece alone would look truncated, and all of them would be taken for the extents of one disk.
 */

#define PROBE_JOIN "join them: fuseexp --format raw PIECE... JOINED shows them as one file, and then fuseexp JOINED " \
                 "MOUNTPOINT its disk; --no-parts takes %s"

/* Is there a next piece? It is no longer than this one and no image of its own, unlike numbered snapshots. */
static bool probe_has_next_piece(const struct image *im, char next[PATH_MAX])
{
    struct probe p = { .tail_len = 0 };

    if (!probe_next_piece(im->name, next))
        return false;
    p.head_len = file_peek(next, p.head, sizeof(p.head), &p.size);
    return p.head_len > 0 && p.size <= im->files[0].size && probe_most_certain(&p)->plain;
}

/*
 * Are these files the pieces of one image? The extents of a VMDK each probe as VMDK; a descriptor is shorter than
 * what it describes, while no piece is longer than the first.
 */
static bool probe_are_pieces(const struct image *im)
{
    bool each = true;
    struct probe p;

    for (unsigned i = 0; i < im->n_files; i++) {
        if (im->files[i].size > im->files[0].size)
            return false;
        probe_read(&p, &im->files[i], NULL);
        each = each && probe_most_certain(&p) == im->format;
    }
    return !each;
}

/* Looks at the end of a split image, known only now that its parts are found: a fixed VHD has only a footer. */
static int probe_check_end(const struct image *im)
{
    const struct image_format *format;
    struct probe p;

    probe_read(&p, NULL, &im->files[im->n_files - 1]);
    if (!p.tail_len)
        return 0;                   /* read errors are reported when the range is read */
    format = probe_most_certain(&p);
    if (format->plain)
        return probe_check_foreign(im, &p);
    return msg_err(-EINVAL, "%s: the pieces of a %s image; " PROBE_JOIN, im->name, format->name, "the first alone");
}

static int probe_check_pieces(const struct image *im)
{
    bool plain = im->format->plain, several = im->n_files > 1;
    size_t len = strlen(im->name);
    char next[PATH_MAX];

    if (several && !plain && probe_are_pieces(im))
        return msg_err(-EINVAL, "%s: a %s image is one file; if these files are its pieces, " PROBE_JOIN, im->name,
                       im->format->name, "the list as it is");
    if (several)
        return plain && im->found_parts && !im->opt->format ? probe_check_end(im) : 0;
    if (im->files[0].is_blk)
        return 0;
    if (plain && (im->opt->format || len < 4 || strcasecmp(im->name + len - 4, ".vhd") != 0))
        return 0;                   /* a raw disk: its parts were looked for */
    if (!probe_has_next_piece(im, next))
        return 0;
    return msg_err(-EINVAL, "%s: looks like the first piece of a %s image, since %s is there; " PROBE_JOIN, im->name,
                   plain ? "vpc" : im->format->name, util_basename(next), "it alone");
}

/* ******************************************************************************************************** *
 * 25. Checks
 *
 * What can be said of any format by its map and its claims.
 * ******************************************************************************************************** */

/*
 * -- the look at a newly opened image --
 *
 * Compares what the tables refer to with the lengths of the files and with each other, for a time too short to
 * notice. So a truncated file is reported at the start, not when a program reads past its end. Two claims on one
 * range mean that part of the disk is wrong, which no read would show. --check looks at everything.
 */

enum {
    CHECK_LOOK_MS = 100,              /* for the whole chain */
    CHECK_STRIPES = 1 << 10,          /* of the disk, in bit-reversed order: some of each part comes early */
    CHECK_MAX_RANGES = 3 << 17,       /* after merging: 18 MiB, freed at the end of the look ... */
    CHECK_ALL_RANGES = 1 << 23,       /* ... and where there is no limit of time */
};
#define CHECK_STRIPE_MIN (1ull << 20)
#define CHECK_LOOK_FAR (1ull << 30)   /* an offset this far past the end, plus the disk's size, is a damaged entry */
#define CHECK_NO_GUEST UINT64_MAX

static unsigned check_look_ms = CHECK_LOOK_MS;

/* Bytes of a file that are used. */
struct check_range {
    struct file *file;
    uint64_t start, end;
    uint64_t guest, guest_end;        /* CHECK_NO_GUEST, or of the disk: it starts with the data of this range */
    bool shared;                      /* may overlap others: compressed clusters, whose ends are upper bounds */
};

struct check_look {
    struct claims claims;           /* first: claim() gets its address */
    struct image *im;
    uint64_t *needed;               /* [n_files]: bytes that it should have */
    struct check_range *ranges;     /* [max], NULL: no memory */
    size_t n, max;
};

/* Adds a range to the list, or to the last one if it continues that in the file and on the disk. */
static void check_look_add(struct check_look *l, const struct check_range *r)
{
    struct check_range *last = l->n ? &l->ranges[l->n - 1] : NULL;
    bool follows = last && last->file == r->file && last->shared == r->shared &&
                   (r->shared ? r->start >= last->start && r->start <= last->end + 512 : r->start == last->end);

    if (follows && (r->guest == CHECK_NO_GUEST || r->guest == last->guest_end)) {
        last->end = r->end > last->end ? r->end : last->end;
        last->guest_end = r->guest == CHECK_NO_GUEST ? last->guest_end : r->guest_end;
    } else if (l->ranges && l->n < l->max) {
        l->ranges[l->n++] = *r;
    } else {
        l->claims.stopped = true;
    }
}

/* Ranges far past the end come from damaged entries, which read as errors. */
static void check_look_claim(struct claims *c, struct file *f, uint64_t offset, uint64_t length, const char *what,
                           uint64_t guest)
{
    struct check_look *l = (struct check_look *)c;
    uint64_t end = offset + length, *needed = &l->needed[f - l->im->files];

    if (end < offset || end > (uint64_t)MAX_IMAGE_SIZE || end > f->size + l->im->size + CHECK_LOOK_FAR)
        return;
    *needed = end > *needed ? end : *needed;
    end = util_min(end, f->size);
    if (!length || offset >= end)
        return;
    check_look_add(l, &(struct check_range){ f, offset, end, what ? CHECK_NO_GUEST : guest,
                                             what ? CHECK_NO_GUEST : guest + (end - offset), false });
}

/* Reverses the bits of a stripe's number: 0, then the half, then the quarters ... */
static uint64_t check_stripe(unsigned i)
{
    uint64_t reversed = 0;

    for (unsigned bit = 1; bit < CHECK_STRIPES; bit <<= 1, i >>= 1)
        reversed = reversed << 1 | (i & 1);
    return reversed;
}

/* Claims the data by map() where no flat table lists it. Starts at the end of the disk, which was written last. */
static void check_look_at_map(struct check_look *l)
{
    uint64_t size = l->im->size, stripe = (size / CHECK_STRIPES + CHECK_STRIPE_MIN) & -CHECK_STRIPE_MIN, start, end;
    struct extent ext;

    for (unsigned i = 0; i < CHECK_STRIPES; i++) {
        start = (CHECK_STRIPES - 1 - check_stripe(i)) * stripe;
        end = start < size ? start + util_min(stripe, size - start) : start;
        for (; start < end && !ext_time_is_up(&l->claims); start += ext.length) {
            ext_map(l->im, start, end - start, false, &ext);
            if (ext.kind == EXT_DATA)
                check_look_claim(&l->claims, ext.file, ext.offset, ext.length, NULL, start);
            else if (ext.kind == EXT_COMPRESSED)
                check_look_add(l, &(struct check_range){ ext.file, ext.offset, ext.offset + ext.coded_length, start,
                                                         start + ext.length, true });
            else if (ext.kind == EXT_BAD && ext.file)
                check_look_claim(&l->claims, ext.file, ext.offset, 0, NULL, 0);
        }
    }
}

static int check_compare_ranges(const void *a, const void *b)
{
    const struct check_range *x = a, *y = b;

    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->start < y->start ? -1 : x->start > y->start;
}

/* Counts the bytes that are claimed more than once, of sorted ranges. */
static uint64_t check_look_twice(struct check_look *l)
{
    uint64_t twice = 0, reached = 0;

    for (size_t i = 0; i < l->n && !l->im->format->check; i++) {
        const struct check_range *r = &l->ranges[i];
        if (i && r->file != r[-1].file)
            reached = 0;
        if (r->shared)
            continue;
        if (r->start < reached)
            twice += util_min(r->end, reached) - r->start;
        reached = r->end > reached ? r->end : reached;
    }
    return twice;
}

static int check_look_tell(struct check_look *l)
{
    struct image *im = l->im;
    uint64_t twice = check_look_twice(l);

    for (unsigned i = 0; i < im->n_files; i++) {
        im->damaged |= l->needed[i] > im->files[i].size;
        if (l->needed[i] > im->files[i].size)
            msg_say(MSG_NOTE, "%s: is shorter than its tables say: %s%" PRIu64 " bytes are missing at its end, behind %"
                    PRIu64 "; what was there reads as errors", im->files[i].path, l->claims.stopped ? "at least " : "",
                    l->needed[i] - im->files[i].size, (uint64_t)im->files[i].size);
    }
    im->damaged |= twice;
    if (!twice)
        return 0;
    if (im->opt->strict)
        return msg_err(-EIO, "%s: damaged (--strict): %" PRIu64 " bytes of its file are used twice", im->name, twice);
    msg_say(MSG_ERROR, "%s: is damaged: %" PRIu64 " bytes of its file are used twice, as two parts of the disk or as "
            "tables too, so some of what is shown is wrong (--check says where)", im->name, twice);
    return 0;
}

/*
 * -- wiped tables --
 *
 * A piece of a table that was overwritten with zeros is a hole to every reader: no error, and zeros for the data. But
 * the data is still in the file, where nothing refers to it any more. So room of the file that nothing refers to, that
 * the image does not count as free and that is not zeros, is compared with the empty ranges of the disk.
 *
 * Where? Images are mostly written in order: room between the data of 8M and that of 24M of the disk belongs to an
 * empty range from 8M to 24M. If the disk has data there, the order says nothing: then every large empty range is
 * suspect.
 *
 * How much? A crash leaks a few clusters, which never were part of the disk, and a cluster that is given back is
 * counted as free. But a sector is the least that a disk loses. So there must be an empty range at least as large as a
 * sector of the table describes, and a quarter of that in the file. Example: in a qcow2 image of 64 KiB clusters, 512
 * bytes of an L2 table are 64 entries, 4 MiB of the disk; then it takes 16 leaked clusters. A small table has fewer
 * entries than a sector: of a disk of 24 MiB it is a quarter, too.
 */

/* Room of a file that nothing refers to: between start and end so many bytes that are not zeros. */
struct check_room {
    struct file *file;
    uint64_t start, end, bytes;
};

enum { CHECK_WIPED_LEAST = 256 << 10 };     /* bytes of the disk: less is not looked at */

struct check_wiped {
    struct check_look *look;
    struct image *im;
    struct check *c;                /* NULL: not --check */
    uint64_t reach;                 /* bytes of the disk that a sector of a table describes */
    uint64_t from;                  /* of the disk: where the data before the room ends; CHECK_NO_GUEST: not known */
    struct check_room room;         /* since then */
    struct check_room strays;       /* room whose place on the disk is not known */
    struct check_room first;        /* what was found first, to be told */
    struct ranges found;            /* of the disk */
};

/* Is any byte of [at, at + length) not zero? What cannot be read says nothing. */
static bool check_is_written(struct check_wiped *w, struct file *f, uint64_t at, uint64_t length)
{
    uint8_t piece[32768];
    uint64_t n, done, extent;
    bool data;

    for (uint64_t end = at + length; at < end && !ext_time_is_up(&w->look->claims); at += n) {
        file_seek_extent(f, at, end - at, &data, &extent);
        n = data ? util_min(extent, sizeof(piece)) : extent;
        if (data && file_pread(f, piece, n, at, &done) == 0 && (piece[0] || memcmp(piece, piece + 1, n - 1) != 0))
            return true;
    }
    return false;
}

/* Nothing refers to [start, end) of f: adds what is written there, in whole clusters. */
static void check_wiped_room(struct check_wiped *w, struct file *f, uint64_t start, uint64_t end)
{
    struct image *im = w->im;
    uint64_t unit = im->cluster_size, skip;
    bool data;

    if (im->format->is_free)        /* these are aligned in the file */
        start += -start & (unit - 1);
    for (; start < end && end - start >= unit && !ext_time_is_up(&w->look->claims); start += skip) {
        file_seek_extent(f, start, end - start, &data, &skip);
        skip = data || skip < unit ? unit : skip / unit * unit;
        if (!data || (im->format->is_free && im->format->is_free(im, f, start)) ||
            !check_is_written(w, f, start, unit))
            continue;
        if (!w->room.bytes)
            w->room = (struct check_room){ .file = f, .start = start };
        w->room.bytes += unit;
        w->room.end = start + unit;
    }
}

/* [start, end) of the disk is empty, and `room` has data that may belong there. */
static void check_wiped_found(struct check_wiped *w, const struct check_room *room, uint64_t start, uint64_t end)
{
    if (!w->found.n)
        w->first = *room;
    if (!util_range_add(&w->found, start, end))     /* full: what lies between counts as well */
        w->found.range[w->found.n - 1].end = end > w->found.range[w->found.n - 1].end
                                                 ? end : w->found.range[w->found.n - 1].end;
    if (!w->c)
        return;
    w->c->wiped++;
    out_finding(w->c, w->im->name, false, 1, "guest 0x%" PRIx64 ", 0x%" PRIx64 " bytes: nothing is allocated, but "
                "nothing refers to 0x%" PRIx64 " bytes of data in 0x%" PRIx64 "..0x%" PRIx64 " of %s: probably a wiped "
                "table", start, end - start, room->bytes, room->start, room->end, util_basename(room->file->path));
}

/* Tells empty ranges in [at, end) of the disk that are large enough. room NULL: is there no data? */
static bool check_wiped_disk(struct check_wiped *w, const struct check_room *room, uint64_t at, uint64_t end)
{
    uint64_t start = at;
    struct extent ext;

    for (; at < end && !ext_time_is_up(&w->look->claims); at += ext.length) {
        ext_map(w->im, at, end - at, true, &ext);
        if (ext.kind == EXT_BACKING || (ext.kind == EXT_ZERO && !ext.zeroed && !ext.file))
            continue;
        if (!room && (ext.kind == EXT_DATA || ext.kind == EXT_COMPRESSED))
            return false;
        if (room && at - start >= w->reach)
            check_wiped_found(w, room, start, at);
        start = at + ext.length;
    }
    if (room && at >= end && end - start >= w->reach && end > start)
        check_wiped_found(w, room, start, end);
    return at >= end;
}

/* The room ends where the data of the disk at `to` is. Does the order say where its own belongs? */
static void check_wiped_place(struct check_wiped *w, uint64_t to)
{
    struct check_room *room = &w->room, *strays = &w->strays;

    if (!room->bytes)
        return;
    if (w->from != CHECK_NO_GUEST && to != CHECK_NO_GUEST && w->from < to && to - w->from >= w->reach &&
        room->bytes >= w->reach / 4 && check_wiped_disk(w, NULL, w->from, to)) {
        check_wiped_disk(w, room, w->from, to);
    } else if (!strays->bytes) {
        *strays = *room;
    } else {
        strays->bytes += room->bytes;
        strays->end = strays->file == room->file ? room->end : strays->end;
    }
    room->bytes = 0;
}

/* Goes through the sorted ranges that are used, and looks at the room between them. */
static void check_wiped_files(struct check_wiped *w)
{
    struct check_look *l = w->look;
    uint64_t size = w->im->size, reached = 0;
    struct file *f = NULL;

    for (size_t i = 0; i <= l->n; i++) {
        const struct check_range *r = i < l->n ? &l->ranges[i] : NULL;
        if (f && (!r || r->file != f)) {
            if (!f->is_blk || w->im->format->is_free)       /* behind an image on a device there is anything */
                check_wiped_room(w, f, reached, f->size);
            check_wiped_place(w, r ? CHECK_NO_GUEST : size);
        }
        if (!r)
            break;
        if (r->file != f) {
            w->from = f ? CHECK_NO_GUEST : 0;
            f = r->file;
            reached = 0;
        }
        if (r->start > reached)
            check_wiped_room(w, f, reached, r->start);
        if (r->guest != CHECK_NO_GUEST) {
            check_wiped_place(w, r->guest);
            w->from = r->guest_end;
        }
        reached = r->end > reached ? r->end : reached;
    }
    if (w->strays.bytes >= w->reach / 4)
        check_wiped_disk(w, &w->strays, 0, size);
}

static int check_wiped_tell(struct check_wiped *w)
{
    struct image *im = w->im;
    const struct range *r = w->found.range;
    char more[48] = "";

    im->damaged = true;
    if (w->c)
        return 0;
    if (w->found.n > 1)
        snprintf(more, sizeof(more), " and in %u more ranges", w->found.n - 1);
    if (im->opt->strict)
        return msg_err(-EIO, "%s: damaged (--strict): a table is probably wiped: nothing is allocated from %" PRIu64
                       " to %" PRIu64 " of the disk%s, but nothing refers to data at %" PRIu64 " of %s", im->name,
                       r->start, r->end, more, w->first.start, util_basename(w->first.file->path));
    msg_say(MSG_NOTE, "%s: a table is probably wiped: nothing is allocated from %" PRIu64 " to %" PRIu64 " of the disk"
            "%s, but nothing refers to %" PRIu64 " bytes of data in %" PRIu64 "..%" PRIu64 " of %s; %s", im->name,
            r->start, r->end, more, w->first.bytes, w->first.start, w->first.end, util_basename(w->first.file->path),
            im->opt->suspect_errors ? "reads there are errors"
                                    : "zeros are shown there (--suspect=eio: errors), --check lists all");
    return 0;
}

/* After all that is used was claimed and sorted: looks for tables that are wiped. c: of --check, or NULL. */
static int check_look_wiped(struct check_look *l, struct check *c)
{
    struct image *im = l->im;
    uint64_t unit = im->cluster_size;
    struct check_wiped w = { .look = l, .im = im, .c = c };

    im->suspect.n = 0;
    if (l->claims.stopped || !im->entry_size || !unit)
        return l->claims.stopped && im->opt->suspect_errors
                   ? msg_err(-EIO, "%s: cannot tell whether tables are wiped (--suspect=eio): they are damaged, or too "
                             "large", im->name) : 0;
    w.reach = util_min(512 / im->entry_size * unit, im->size / 4);
    w.reach = w.reach > unit ? w.reach : unit;
    if (w.reach < CHECK_WIPED_LEAST)        /* a handful of clusters is a leak like any other */
        w.reach = CHECK_WIPED_LEAST;
    if (!im->suspect.range)
        im->suspect.range = util_fault("suspects") ? NULL : malloc(MAX_RANGES * sizeof(struct range));
    w.found.range = im->suspect.range;
    if (!w.found.range)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    check_wiped_files(&w);
    im->suspect.n = w.found.n;
    if (w.found.n)
        return check_wiped_tell(&w);
    free(im->suspect.range);
    im->suspect.range = NULL;
    return 0;
}

/* Claims all that the image uses. Formats with check() have their metadata last: it is not needed for the rest. */
static void check_look_collect(struct check_look *l)
{
    const struct image_format *format = l->im->format;

    if (format->check)
        check_look_at_map(l);
    if ((!format->claims || !format->claims(l->im, &l->claims)) && !format->check)
        check_look_at_map(l);
    if (l->n)
        qsort(l->ranges, l->n, sizeof(*l->ranges), check_compare_ranges);
}

/* Looks at one image until util_clock() passes `until`; 0: at all of it. c: counts wiped tables only, for --check. */
static int check_look(struct image *im, uint64_t until, struct check *c)
{
    struct check_look l = { .claims = { .claim = check_look_claim, .until = until }, .im = im,
                            .max = until ? CHECK_MAX_RANGES : CHECK_ALL_RANGES };
    uint64_t sets;
    int ret = 0;

    if (im->format->plain || im->size == 0)
        return 0;
    im->suspect.n = 0;              /* else these would read as errors */
    l.needed = util_fault("look") ? NULL : calloc(im->n_files, sizeof(*l.needed));
    if (!l.needed)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    l.ranges = util_map(l.max * sizeof(*l.ranges));
    sets = im->writable ? 0 : cache_narrow();
    check_look_collect(&l);
    if (!c)
        ret = check_look_tell(&l);
    if (!ret)
        ret = check_look_wiped(&l, c);
    if (sets)
        cache_widen(sets);
    util_unmap(l.ranges, l.max * sizeof(*l.ranges));
    free(l.needed);
    return ret;
}

/* Not without locks: a file that another program writes to has grown since it was opened. */
static int check_look_at_chain(struct image *im)
{
    bool all = im->opt->strict || im->opt->suspect_errors;
    uint64_t until = all ? 0 : util_clock() + check_look_ms * 1000000ull;
    int ret = 0;

    for (; im && im->opt->lock && !ret; im = im->backing)
        ret = check_look(im, until, NULL);
    return ret;
}

/*
 * -- --check for formats without a check of their own --
 *
 * Finds what cannot be read and what is used twice. One bit for each sector of each file is set, first for the
 * metadata that the driver claims, then for data. Of a compressed cluster only its first sector counts, as its length
 * is an upper bound.
 */

struct check_image {
    struct claims claims;           /* first: claim() gets its address */
    bool all_claimed;               /* the data, too: not marked when map() says it */
    struct image *im;
    struct check *c;
    uint64_t unit;                  /* bytes of a cluster, in which --check counts */
    uint64_t allocated, compressed; /* bytes of the disk */
    uint64_t **used;                /* one bitmap per file, made when it is needed */
    const struct file *after;       /* where the last extent ended: one that begins there is not fragmented */
    uint64_t after_offset;
};

static uint64_t check_bitmap_size(const struct file *f)
{
    return (f->size / 512 / 64 + 1) * 8;
}

static uint64_t check_clusters(const struct check_image *k, uint64_t bytes)
{
    return (bytes + k->unit - 1) / k->unit;
}

/* Marks the sectors [at, end) inside the file. Returns how many bytes were marked already. */
static uint64_t check_mark(struct check_image *k, const struct file *f, uint64_t at, uint64_t end)
{
    uint64_t **used = &k->used[f - k->im->files], twice = 0;

    if (!*used)
        *used = util_map(check_bitmap_size(f));
    if (!*used) {
        k->c->errors++;
        return 0;
    }
    end = util_min(end, (f->size + 511) / 512);
    for (uint64_t n; at < end; at += n) {
        uint64_t *word = &(*used)[at / 64], mask;
        n = util_min(64 - at % 64, end - at);
        mask = ~0ull >> (64 - n) << at % 64;
        twice += (uint64_t)__builtin_popcountll(*word & mask);
        *word |= mask;
    }
    return twice * 512;
}

static void check_twice(struct check_image *k, uint64_t twice, const struct file *f, uint64_t offset, uint64_t length,
                        const char *what, uint64_t guest)
{
    char where[32];

    if (!twice)
        return;
    snprintf(where, sizeof(where), "guest 0x%" PRIx64, guest);
    out_finding(k->c, k->im->name, false, check_clusters(k, twice), "%s, 0x%" PRIx64 " bytes: %s at 0x%" PRIx64
                " is used for something else, too", what ? what : where, length, util_basename(f->path), offset);
}

/* Metadata owns its last sector as a whole; data marks only whole sectors. */
static void check_claim(struct claims *c, struct file *f, uint64_t offset, uint64_t length, const char *what,
                        uint64_t guest)
{
    struct check_image *k = (struct check_image *)c;
    uint64_t twice;

    if (!length || offset >= f->size)
        return;
    length = util_min(length, f->size - offset);
    twice = what ? check_mark(k, f, offset / 512, (offset + length + 511) / 512)
                 : check_mark(k, f, (offset + 511) / 512, (offset + length) / 512);
    check_twice(k, twice, f, offset, length, what, guest);
}

static void check_extent(struct check_image *k, uint64_t at, const struct extent *ext)
{
    uint64_t twice;

    if (ext->kind == EXT_BAD)
        out_finding(k->c, k->im->name, false, check_clusters(k, ext->length), "guest 0x%" PRIx64 ", 0x%" PRIx64
                    " bytes: %s", at, ext->length, ext->why);
    if (ext->kind == EXT_COMPRESSED)
        k->compressed += ext->length;
    if (ext->kind != EXT_DATA && ext->kind != EXT_COMPRESSED)
        return;
    k->allocated += ext->length;
    k->c->fragmented += (k->after && (k->after != ext->file || k->after_offset != ext->offset)) ||
                        ext->kind == EXT_COMPRESSED;
    k->after = ext->file;
    k->after_offset = ext->offset + (ext->kind == EXT_DATA ? ext->length : ext->coded_length);
    if (ext->file == &k->im->files[0] && k->after_offset > k->c->image_end)
        k->c->image_end = util_min(k->after_offset, ext->file->size);
    if (k->all_claimed)
        return;
    twice = ext->kind == EXT_DATA
                ? check_mark(k, ext->file, (ext->offset + 511) / 512, (ext->offset + ext->length) / 512)
                : check_mark(k, ext->file, ext->offset / 512, ext->offset / 512 + 1);
    check_twice(k, twice, ext->file, ext->offset, ext->length, NULL, at);
}

/* What was not read when the image was made, by its mapfile. */
static void check_unread(const struct image *im, struct check *c)
{
    uint64_t size = im->size, unit = im->cluster_size ? im->cluster_size : 65536, length;
    const char *why;

    for (uint64_t at = 0; im->unread && at < size; at += length) {
        length = size - at;
        why = lost_why(im->unread, at, &length);
        if (why)
            out_finding(c, im->name, false, (length + unit - 1) / unit, "guest 0x%" PRIx64 ", 0x%" PRIx64
                        " bytes: %s", at, length, why);
    }
}

/* As check_all(), but for wiped tables. */
static int check_image(struct image *im, struct check *c)
{
    struct check_image k = { .claims = { .claim = check_claim }, .im = im, .c = c,
                             .unit = im->cluster_size ? im->cluster_size : 65536 };
    uint64_t size = im->size;
    struct extent ext;

    if (im->format->plain && !im->unread)
        return -EOPNOTSUPP;
    check_unread(im, c);
    if (im->format->check && !util_fault_op("check"))
        return im->format->check(im, c);
    k.used = calloc(im->n_files, sizeof(*k.used));
    if (!k.used)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    k.all_claimed = im->format->claims && !im->format->check && im->format->claims(im, &k.claims);
    for (uint64_t at = 0; at < size; at += ext.length) {
        ext_map(im, at, size - at, false, &ext);
        check_extent(&k, at, &ext);
        out_progress_show(at, size);
    }
    c->total = check_clusters(&k, size);
    c->allocated = check_clusters(&k, k.allocated);
    c->compressed = check_clusters(&k, k.compressed);
    for (unsigned i = 0; i < im->n_files; i++)
        util_unmap(k.used[i], check_bitmap_size(&im->files[i]));
    free(k.used);
    return 0;
}

/* Counts the errors of the top image. -EOPNOTSUPP: the format has nothing to check. */
static int check_all(struct image *im, struct check *c)
{
    int ret;

    im->suspect.n = 0;              /* else what the look has found reads as errors */
    ret = check_image(im, c);
    return ret ? ret : check_look(im, 0, c);
}

/* ******************************************************************************************************** *
 * 26. Chains
 *
 * Opens, finds parents by name and by identity, closes. Knows nothing of FUSE or partitions.
 * ******************************************************************************************************** */

static void chain_close(struct image *im)
{
    struct image *base = im->backing;

    if (im->state && im->format->close)
        im->format->close(im);
    free(im->state);
    lost_free(im->unread);
    for (unsigned i = 0; i < im->n_files; i++)
        file_close(&im->files[i]);
    for (unsigned i = 0; i < im->n_hints; i++)
        free(im->hints[i]);
    if (im->files)
        pthread_mutex_destroy(&im->size_lock);
    free(im->files);
    free(im->suspect.range);
    memset(im, 0, sizeof(*im));
    if (base)
        chain_close(base);          /* at most MAX_CHAIN deep */
    free(base);
}

/* Prepares im, which then owns its files and a lock. The caller has set writable, growable, opt, depth and child. */
static int chain_begin(struct image *im, const char *name)
{
    im->name = name;
    im->files = util_fault("file table") ? NULL : calloc(MAX_PARTS, sizeof(*im->files));
    if (!im->files)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    pthread_mutex_init(&im->size_lock, NULL);
    im->admit = UINT64_MAX;
    return 0;
}

/* The first step that may change the image, after everything that can refuse it. */
static int chain_begin_writing(struct image *im)
{
    int ret = 0;

    if (!im->writable || im->opt->top_only || !im->format->begin_writing)
        return 0;
    if (im->dirty)                  /* it would be repaired: not before it is known whether a table is wiped */
        ret = check_look(im, 0, NULL);
    return ret ? ret : im->format->begin_writing(im);
}

/* After the files are open: locks them and lets the driver open the image. */
static int chain_finish(struct image *im)
{
    unsigned locked = 0;
    int ret = 0;

    if (im->writable && !im->format->writable)
        return msg_err(-EROFS, "%s: %s images are not written in place; --overlay and --temporary take the changes",
                       im->name, im->format->name);
    /* Lock before reading, so that the header cannot change afterwards. */
    for (; im->opt->lock && locked < im->n_files && !ret; locked++)
        ret = file_lock(&im->files[locked]);
    for (unsigned i = 0; i < im->n_files && !ret; i++)
        ret = file_measure(&im->files[i]);
    if (!ret && im->n_files > 1 && !im->format->several_files)
        ret = msg_err(-EINVAL, "%s: a %s image is one file%s", im->name, im->format->name,
                      im->format->directory_file ? "; of a directory, name that" : "");
    if (!ret && im->format->state_size) {
        im->state = util_fault("state of the image") ? NULL : calloc(1, im->format->state_size);
        ret = im->state ? 0 : msg_err(-ENOMEM, "%s: out of memory", im->name);
    }
    if (!ret && im->opt->rebuild && im->depth == 0 && im->format->rebuild)
        ret = im->format->rebuild(im);
    if (!ret)
        ret = im->format->open(im);
    for (; im->opt->lock && locked < im->n_files && !ret; locked++)
        ret = file_lock(&im->files[locked]);
    if (!ret && im->size == 0 && !im->growable && im->depth == 0)
        ret = msg_err(-EINVAL, "%s: is empty", im->name);
    return ret;
}

/* Detects a backing chain that loops or is too long. */
static int chain_check_loop(const struct image *im)
{
    if (im->depth >= MAX_CHAIN)
        return msg_err(-ELOOP, "%s: a backing chain of more than %d images", im->name, MAX_CHAIN);
    for (const struct image *c = im->child; c; c = c->child)
        if (file_is(&c->files[0], &im->files[0].st))
            return msg_err(-ELOOP, "%s: is its own backing file", im->name);
    return 0;
}

/* A backing file that was truncated would show zeros for the missing data. */
static int chain_check_backing_size(const struct image *im, const struct image *base)
{
    if (base->size >= im->backing_size)
        return 0;
    if (!im->opt->force_parent)
        return msg_err(-EINVAL, "%s: is shorter than when %s was made over it (%" PRIu64 " bytes, then %" PRIu64
                       "); --force-parent takes it all the same, with zeros at its end",
                       base->name, im->name, (uint64_t)base->size, im->backing_size);
    msg_say(MSG_NOTE, "%s: taken for the backing file of %s although it is shorter now", base->name, im->name);
    return 0;
}

/*
 * -- parents --
 *
 * Where a child records its parent's identity, the parent is the first of these that has it, read as the child's
 * format:
 *   1. a file that --backing names
 *   2. the names recorded, in the order of the format's specification: as a path below the child's directory (or below
 *      --allow-external), then the last component beside the child, then in the directory of --allow-external
 *   3. the one file in the child's directory; two would be a guess
 * A name alone proves nothing, so that what is found there is opened only if its identity fits. If nothing fits, what
 * was nearest is opened all the same, to say what is wrong with it, or because of --force-parent. Where no identity is
 * recorded (qcow2, QED) the name decides; the next --backing stands for it.
 */

static bool chain_knows_parent(const struct image *im)
{
    const bool *known = im->parent_id.known;

    return known[ID_IMAGE] || known[ID_CID] || known[ID_STATE];
}

/* The first value in which `id` differs from what im records of its parent; ID_KINDS: none does. */
static enum identity_kind chain_mismatch(const struct image *im, const struct identity *id)
{
    const struct identity *want = &im->parent_id;

    for (unsigned k = 0; k < ID_KINDS; k++) {
        bool good = id->known[k] && memcmp(id->value[k], want->value[k], 16) == 0;
        if (k == ID_IMAGE && im->has_other_parent)
            good |= id->known[k] && memcmp(id->value[k], im->other_parent, 16) == 0;
        if (want->known[k] && !good)
            return k;
    }
    return ID_KINDS;
}

static const char *chain_id_text(const struct identity *id, enum identity_kind kind, char text[37])
{
    if (!id->known[kind])
        util_copy(text, 37, "none");
    else if (kind == ID_CID)
        text_hex(id->value[kind], 4, text);
    else
        text_uuid(id->value[kind], text);
    return text;
}

/* The most specific recorded value, as text. */
static const char *chain_parent_text(const struct image *im, char text[37])
{
    return chain_id_text(&im->parent_id, im->parent_id.known[ID_IMAGE] ? ID_IMAGE : ID_CID, text);
}

/* Reads the identity of a file as an image of this format. Silent; the file stays open. */
static int chain_identify(const struct image *child, const struct image_format *format, struct file *f,
                        struct identity *id)
{
    struct image im = { .format = format, .opt = child->opt, .files = f, .n_files = 1, .name = f->path };
    int ret = format->identify ? -ENOMEM : -EMEDIUMTYPE;

    msg_hushed++;
    im.state = calloc(1, format->state_size + 1);
    if (im.state && format->identify)
        ret = format->identify(&im);
    if (im.state && format->close)
        format->close(&im);
    free(im.state);
    msg_hushed--;
    *id = im.id;
    return ret;
}

/*
 * Is f, whose opening returned ret, the parent of im? If not, f is closed. -ELOOP: it is in the chain already; -ESTALE:
 * it is another image.
 */
static int chain_try_file(const struct image *im, const struct image_format *format, struct file *f, int ret)
{
    struct identity id;

    for (const struct image *c = im; c && !ret; c = c->child)
        ret = file_is(&c->files[0], &f->st) ? -ELOOP : 0;
    if (!ret)
        ret = chain_identify(im, format, f, &id);
    if (!ret && chain_mismatch(im, &id) != ID_KINDS)
        ret = -ESTALE;
    if (ret)
        file_forget(f);
    return ret;
}

/* The first --backing after number `after` that the chain ending with im does not use; 0: none. They count from 1. */
static unsigned chain_next_given(const struct image *im, unsigned after)
{
    const struct image *c;

    for (unsigned i = after + 1; i <= im->opt->n_backing; i++) {
        for (c = im; c && c->given != i; c = c->child)
            continue;
        if (!c)
            return i;
    }
    return 0;
}

/* Sets the format of im's backing file, which is never guessed. given: the user named the file. */
static int chain_set_backing_format(const struct image *im, struct image *base, bool given)
{
    bool user = im->opt->backing_format && (!*im->backing_format || (im->depth == 0 && given));
    const char *format = probe_recorded_format(user ? im->opt->backing_format : im->backing_format);

    if (!*format && im->has_hints)
        return msg_err(-EINVAL, "%s: records no identity of its parent '%s', as for a raw one; --backing-format raw "
                       "reads it as that", im->name, im->backing_name);
    if (!*format)
        return msg_err(-EINVAL, "%s: does not say which format its backing file '%s' has; --backing-format NAME does",
                       im->name, im->backing_name);
    if (strcmp(format, "file") == 0 || strcmp(format, "host_device") == 0)
        format = "raw";             /* QEMU's drivers for host files */
    base->format = probe_format_named(format);
    if (!base->format)
        return msg_err(-EMEDIUMTYPE, "%s: its backing file '%s' is of format %s, which this version does not read",
                       im->name, im->backing_name, format);
    return 0;
}

/* A --backing of another name than the recorded one may be an image further down, and leave out those between. */
static void chain_note_skipped(const struct image *im, const char *path)
{
    const char *name = im->backing_name + (strncmp(im->backing_name, "file:", 5) == 0 ? 5 : 0);
    char recorded[PATH_MAX];
    bool there = !fmt_is_url(name) && util_beside(recorded, im->files[0].path, name) && file_exists(recorded);

    if (strcmp(util_basename(name), util_basename(path)) != 0)
        msg_say(MSG_NOTE, "%s: %s stands for its backing file '%s'%s; unless both are the same, this skips '%s': its "
                "changes are lost, and what --map shows with depth > %u may be too old", im->name, path, name,
                there ? "" : ", which is not there", util_basename(name), im->depth);
}

static int chain_take_given(const struct image *im, struct image *base, unsigned given)
{
    int ret = chain_set_backing_format(im, base, true);

    base->given = given;
    return ret ? ret : file_open(&base->files[0], im->opt->backing[given - 1], false);
}

/* Opens the --backing file whose identity matches. */
static int chain_try_given(const struct image *im, struct image *base)
{
    struct file *f = &base->files[0];
    int ret = -ENOENT;

    for (unsigned i = chain_next_given(im, 0); i; i = chain_next_given(im, i)) {
        msg_hushed++;
        ret = chain_take_given(im, base, i);
        msg_hushed--;
        ret = chain_try_file(im, base->format, f, ret);
        if (!ret)
            return 0;
        base->given = 0;
    }
    return ret;
}

enum chain_hint_way { CHAIN_HINT_PATH, CHAIN_HINT_BESIDE, CHAIN_HINT_ALLOWED, CHAIN_HINT_WAYS };

/* The path to try for a recorded name in this way. False: there is none. */
static bool chain_hint_path(const struct image *im, const char *hint, enum chain_hint_way way, char path[PATH_MAX])
{
    const char *last = util_basename(hint);
    bool windows = (isalpha((unsigned char)hint[0]) && hint[1] == ':') || strncmp(hint, "//", 2) == 0;

    if (way == CHAIN_HINT_PATH)
        return last != hint && !windows && util_copy(path, PATH_MAX, hint);
    if (way == CHAIN_HINT_BESIDE)
        return util_copy(path, PATH_MAX, last);
    return im->opt->allow_external && file_resolve(im->opt->allow_external, path) &&
           strlen(path) + strlen(last) < 1023 && util_copy(path + strlen(path), 1024, "/") &&
           util_copy(path + strlen(path), 1024, last);
}

/*
 * Opens the first file by a recorded name whose identity matches. near: else the best candidate: a name that leads to
 * another image, or to a file that may not be opened.
 */
static int chain_try_hints(struct image *im, struct image *base, char near[PATH_MAX])
{
    enum { MISSING, FORBIDDEN, OPENED } rank, best = MISSING;
    struct file *f = &base->files[0];
    char path[PATH_MAX], full[PATH_MAX];
    int ret = -ENOENT;

    for (unsigned i = 0; i < im->n_hints * CHAIN_HINT_WAYS; i++) {
        if (!chain_hint_path(im, im->hints[i / CHAIN_HINT_WAYS], i % CHAIN_HINT_WAYS, path))
            continue;
        msg_hushed++;
        ret = fmt_open_named(im, f, path, "parent", NULL);
        msg_hushed--;
        rank = ret ? MISSING : OPENED;
        if (ret && ret != -ENOENT && util_beside(full, im->files[0].path, path) && file_exists(full))
            rank = FORBIDDEN;
        ret = chain_try_file(im, base->format, f, ret);
        if (!ret && strcmp(util_basename(f->path), util_basename(path)) != 0)
            msg_say(MSG_NOTE, "%s: its parent '%s' is called '%s' here", im->name, path, util_basename(f->path));
        if (!ret || ret == -ENOMEM)
            return ret;
        if (rank > best) {
            best = rank;
            util_copy(near, PATH_MAX, path);
        }
    }
    return ret;
}

/*
 * Tries one file of the child's directory. f: the match so far; -ENOTUNIQ: `twin` matches as well. Symbolic links are
 * followed inside the directory.
 */
static int chain_try_neighbour(const struct image *im, const struct image_format *format, const char *directory,
                             const char *name, struct file *f, char twin[PATH_MAX])
{
    struct file other = { 0 };
    char shown[PATH_MAX];
    struct probe p;
    int ret = -ENAMETOOLONG;

    if (util_beside(shown, im->files[0].path, name))
        ret = file_open_beneath(&other, directory, name, shown, false);
    if (!ret) {
        probe_read(&p, &other, &other);
        ret = format->probe(&p) ? 0 : -EMEDIUMTYPE;
    }
    ret = chain_try_file(im, format, &other, ret);
    if (ret)
        return ret == -ENOMEM ? ret : 0;
    if (!file_is_open(f)) {
        file_move(f, &other);
        return 0;
    }
    if (!file_is(f, &other.st))
        ret = -ENOTUNIQ;
    util_copy(twin, PATH_MAX, shown);
    file_forget(&other);
    return ret;
}

/* Opens the only file beside im that matches. -ENOTUNIQ: `twin` is a second one. */
static int chain_search_directory(const struct image *im, struct image *base, char twin[PATH_MAX])
{
    struct file *f = &base->files[0];
    char directory[PATH_MAX];
    struct dirent *e;
    unsigned n = 0;
    DIR *dir;
    int ret = 0;

    if (im->files[0].is_blk || !util_beside(directory, im->files[0].path, "."))
        return -ENOENT;
    dir = util_fault("directory") ? NULL : opendir(directory);
    msg_hushed++;
    while (dir && !ret && (e = readdir(dir)))
        if (e->d_type == DT_REG || e->d_type == DT_LNK || e->d_type == DT_UNKNOWN)
            ret = n++ < MAX_NEIGHBOURS ? chain_try_neighbour(im, base->format, directory, e->d_name, f, twin) : -E2BIG;
    msg_hushed--;
    if (dir)
        closedir(dir);
    return ret ? ret : file_is_open(f) ? 0 : -ENOENT;
}

/*
 * No file matches. Opens the nearest one; chain_check_identity() then refuses it, or accepts it with --force-parent.
 */
static int chain_take_nearest(struct image *im, struct image *base, const char *near, const char *twin, int why)
{
    struct file *f = &base->files[0];
    unsigned next = chain_next_given(im, 0);
    char uuid[37], found[PATH_MAX] = "";
    const char *beside;

    if (f->path)
        util_copy(found, sizeof(found), f->path);
    file_forget(f);
    if (why == -ENOMEM)
        return msg_err(why, "%s: out of memory", im->name);
    if (next)
        return chain_take_given(im, base, next);
    if (*near && (im->opt->force_parent || why != -ENOTUNIQ))
        return fmt_open_named(im, f, near, "backing file", "--backing");
    chain_parent_text(im, uuid);
    if (why == -ENOTUNIQ)
        return msg_err(why, "%s: its parent may be '%s' or '%s', which have the same identity %s; --backing FILE says "
                       "which", im->name, found, twin, uuid);
    if (why == -E2BIG)
        return msg_err(why, "%s: its parent is not where it says, and there are more than %d files beside it, too many "
                       "to look at; --backing FILE names it", im->name, MAX_NEIGHBOURS);
    beside = im->common_parent_id ? "many disks have" : "no file beside it has";
    if (!im->n_hints)
        return msg_err(why, "%s: does not name its parent, and %s the identity %s; --backing FILE names it", im->name,
                       beside, uuid);
    return msg_err(why, "%s: cannot open its backing file '%s': %s, and %s the identity %s; --backing FILE names it",
                   im->name, im->backing_name, strerror(ENOENT), beside, uuid);
}

static bool chain_is_further_down(const struct image *im, const char *path);

/* Opens the file of im's backing image, and sets its format. */
static int chain_find_parent(struct image *im, struct image *base)
{
    const struct image_options *opt = im->opt;
    bool known = chain_knows_parent(im);
    unsigned next = chain_next_given(im, 0);
    char near[PATH_MAX] = "", twin[PATH_MAX] = "";
    int ret;

    if (known && chain_try_given(im, base) == 0)
        return 0;
    if (next && (!known || opt->force_parent) && !chain_is_further_down(im, opt->backing[next - 1])) {
        if (!known)
            chain_note_skipped(im, opt->backing[next - 1]);
        return chain_take_given(im, base, next);
    }
    ret = chain_set_backing_format(im, base, false);
    if (ret)
        return ret;
    if (!im->has_hints)
        return fmt_open_named(im, &base->files[0], im->backing_name, "backing file", "--backing");
    if (!known && *im->backing_format && !opt->force_parent)
        return msg_err(-EINVAL, "%s: does not record its parent's identity; --force-parent takes any", im->name);
    ret = chain_try_hints(im, base, near);
    if (!ret)
        return 0;
    if (ret != -ENOMEM && known)
        ret = im->common_parent_id ? -ENOENT : chain_search_directory(im, base, twin);
    if (ret)
        return chain_take_nearest(im, base, near, twin, ret);
    msg_say(MSG_NOTE, "%s: its parent, recorded as '%s', is %s by its identity", im->name, im->backing_name,
            base->files[0].path);
    return 0;
}

/*
 * Reports a file that is not the parent. --force-parent is offered if it may be the parent in another state, or has
 * the only recorded name. Otherwise it may be an ancestor further down the chain.
 */
static int chain_say_mismatch(const struct image *im, const char *name, const struct identity *id, bool offer)
{
    enum identity_kind kind = chain_mismatch(im, id);
    char want[37], got[37];

    for (unsigned i = 0; i < im->n_hints && kind != ID_STATE; i++)
        offer &= strcasecmp(util_basename(im->hints[i]), util_basename(name)) == 0;
    offer &= kind == ID_STATE || im->n_hints;
    chain_id_text(&im->parent_id, kind, want);
    chain_id_text(id, kind, got);
    return kind == ID_STATE
               ? msg_err(-EINVAL, "%s: was changed after %s was made from it: its modification UUID is %s instead of "
                         "%s%s", name, im->name, got, want, offer ? "; --force-parent takes it all the same" : "")
               : msg_err(-EINVAL, "%s: is not the parent of %s%s: its identity is %s instead of %s%s", name, im->name,
                         offer ? ", or was changed since" : "", got, want,
                         offer ? "; --force-parent takes it all the same" : "");
}

/* A differencing disk over the wrong parent would be a wrong disk that looks right. */
static int chain_check_identity(const struct image *im, const struct image *base)
{
    enum identity_kind kind = chain_mismatch(im, &base->id);
    char want[37], got[37];

    if (kind == ID_KINDS)
        return 0;
    if (!im->opt->force_parent)
        return chain_say_mismatch(im, base->name, &base->id, true);
    msg_say(MSG_NOTE, "%s: taken for the parent of %s, whose identity is %s instead of %s", base->name, im->name,
            chain_id_text(&base->id, kind, got), chain_id_text(&im->parent_id, kind, want));
    return 0;
}

static int chain_open_one_backing(struct image *im, struct image *base)
{
    int ret = chain_begin(base, im->backing_name);

    if (ret)
        return ret;
    base->n_files = 1;
    ret = chain_find_parent(im, base);
    if (ret)
        return ret;
    base->name = base->files[0].path;
    ret = chain_check_loop(base);
    if (!ret)
        ret = chain_finish(base);
    if (!ret)
        ret = chain_check_identity(im, base);
    return ret ? ret : chain_check_backing_size(im, base);
}

static struct image *chain_add_backing(struct image *im)
{
    struct image *base = util_fault("backing image") ? NULL : calloc(1, sizeof(*base));

    im->backing = base;
    if (!base)
        return NULL;
    base->opt = im->opt;
    base->depth = im->depth + 1;
    base->child = im;
    return base;
}

/*
 * Is this file in the chain below im's parent, as the images record it? As the parent it would leave out the images
 * between. Silent. Needed only for a --backing that no identity confirms.
 */
static bool chain_is_further_down(const struct image *im, const char *path)
{
    struct image_options recorded = *im->opt;
    struct image top = *im, *cur = &top, *base;
    struct file f = { 0 };
    struct identity id;
    bool found = false;
    int ret;

    recorded.n_backing = 0;
    recorded.force_parent = false;
    top.opt = &recorded;
    top.backing = NULL;
    msg_hushed++;
    ret = file_open(&f, path, false);
    while (!ret && !found && *cur->backing_name && (base = chain_add_backing(cur))) {
        ret = chain_open_one_backing(cur, base);
        found = !ret && ((cur != &top && file_is(&base->files[0], &f.st)) ||
                         (chain_knows_parent(base) && chain_identify(base, base->format, &f, &id) == 0 &&
                          chain_mismatch(base, &id) == ID_KINDS));
        cur = base;
    }
    msg_hushed--;
    file_close(&f);
    if (top.backing)
        chain_close(top.backing);
    free(top.backing);
    return found;
}

/* After the chain that ends with im is open: refuses a --backing that is not part of it. */
static int chain_check_given(const struct image *im)
{
    unsigned next = chain_next_given(im, 0);
    const struct image *best = NULL;
    struct file f = { 0 };
    struct identity id, best_id = { 0 };
    const char *path;
    int ret;

    if (!next)
        return 0;
    path = im->opt->backing[next - 1];
    msg_hushed++;
    ret = file_open(&f, path, false);
    for (const struct image *c = im->child; c && !ret; c = c->child)
        if (!(best && chain_mismatch(best, &best_id) == ID_STATE) && chain_identify(c, c->format, &f, &id) == 0 &&
            chain_mismatch(c, &id) != ID_KINDS) {
            best = c;
            best_id = id;
        }
    file_forget(&f);
    msg_hushed--;
    if (best)
        return chain_say_mismatch(best, path, &best_id, false);
    while (im->child)
        im = im->child;
    return msg_err(-EINVAL, "%s: is no image of the chain of %s, so --backing is of no use", path, im->name);
}

static int chain_open_backing(struct image *im)
{
    struct image *base;
    int ret = 0;

    for (; !ret && *im->backing_name; im = base) {
        if (im->opt->top_only)
            return 0;
        if (im->opt->no_backing) {
            msg_say(MSG_NOTE, "%s: without its backing file '%s', whose data reads as errors", im->name,
                    im->backing_name);
            return 0;
        }
        base = chain_add_backing(im);
        if (!base)
            return msg_err(-ENOMEM, "%s: out of memory", im->name);
        ret = chain_open_one_backing(im, base);
    }
    return ret ? ret : chain_check_given(im);
}

/* Refuses an option that means nothing for this image: it was probably meant for another one. */
static int chain_check_options(const struct image *im)
{
    const struct image_options *opt = im->opt;

    if ((opt->data_file && !im->format->data_file) || (opt->snapshot && !im->format->has_snapshots))
        return msg_err(-EINVAL, "%s: is %s, so --%s is of no use", im->name, im->format->name,
                       opt->data_file && !im->format->data_file ? "data-file" : "snapshot");
    if ((opt->n_backing || opt->backing_format) && !*im->backing_name)
        return msg_err(-EINVAL, "%s: has no backing file, so --backing is of no use", im->name);
    return 0;
}

/* What a disk says of its size in the GPT or the file system at its start, or 0. */
static uint64_t chain_size_on_disk(struct image *im)
{
    union { uint8_t byte[4096]; struct mbr mbr; } b;
    const struct gpt_header *gpt = (const void *)(b.byte + 512);
    uint64_t done;

    if (im->size < sizeof(b) || img_read(im, &b, sizeof(b), 0, &done))
        return 0;
    if (memcmp(gpt->signature, "EFI PART", 8) == 0)
        return (le64_to_cpu(gpt->other_lba) + 1) * 512;
    if (memcmp(b.byte + 3, "NTFS    ", 8) == 0)
        return (util_le64(b.byte + 0x28) + 1) * util_le16(b.byte + 0xb);
    if (util_le16(b.byte + 1080) == 0xef53 && util_le32(b.byte + 1048) < 7)     /* ext4: blocks, log2 of their KiB */
        return (uint64_t)util_le32(b.byte + 1028) << (10 + util_le32(b.byte + 1048));
    return memcmp(b.byte, "XFSB", 4) == 0 ? util_be64(b.byte + 8) * util_be32(b.byte + 4) : 0;
}

/* After --rebuild: the header that recorded the size is lost, and the tables may have room for a larger disk. */
static void chain_guess_size(struct image *im)
{
    uint64_t says = chain_size_on_disk(im), covered = im->least_size;

    if (says && says <= im->size)
        im->size = says;
    else
        im->size = util_min(im->size, covered);
    msg_say(MSG_NOTE, "%s: size taken to be %" PRIu64 " bytes, %s", im->name, (uint64_t)im->size,
            says == im->size ? "as the disk itself says" : "what its tables map");
}

/* Says what a mapfile told of im. cut: bytes that were read, but are not there. Refuses what cannot be served. */
static int chain_tell_map(const struct image *im, const struct lost_map *m, uint64_t cut)
{
    const char *ignore = im->opt->mapfile ? "" : "; --mapfile=none ignores it";

    if (m->bytes && im->writable)
        return msg_err(-EROFS, "%s: %" PRIu64 " bytes of it were not read, says the mapfile %s; --overlay and "
                       "--temporary take the changes%s", im->name, m->bytes, m->path, ignore);
    if (m->bytes)
        msg_say(MSG_NOTE, "%s: %" PRIu64 " bytes in %u range%s were not read, says the mapfile %s: they are errors%s",
                im->name, m->bytes, m->ranges, m->ranges > 1 ? "s" : "", m->path, ignore);
    else
        msg_say(MSG_NOTE, "%s: all of it was read, says the mapfile %s", im->name, m->path);
    if (!cut)
        return 0;
    if (im->opt->strict)
        return msg_err(-EIO, "%s: damaged (--strict): lacks %" PRIu64 " bytes at its end that the mapfile %s says were "
                       "read", im->name, cut, m->path);
    msg_say(MSG_NOTE, "%s: is cut off: %" PRIu64 " bytes that were read are missing at its end", im->name, cut);
    return 0;
}

/* Reads the mapfile `path`. If there is nothing that needs to be remembered, im->unread stays NULL. */
static int chain_read_map(struct image *im, const char *path, FILE *f)
{
    struct lost_map *m = im->unread = util_fault("map") ? NULL : calloc(1, sizeof(*m));
    int ret;

    if (m)
        m->path = strdup(path);
    if (!m || !m->path)
        return msg_err(-ENOMEM, "%s: out of memory", im->name);
    ret = lost_read_map(m, f, im->depth ? 0 : im->opt->map_offset);
    if (ret && !im->opt->mapfile)
        return msg_err(ret, "%s: the mapfile beside it cannot be used; --mapfile=none ignores it", im->name);
    if (!ret)
        ret = chain_tell_map(im, m, lost_sum_up(m, im->size));
    if (ret)
        return ret;
    if (m->bytes) {
        cache_charge(m->room * sizeof(*m->span));
    } else {
        lost_free(m);
        im->unread = NULL;
    }
    return 0;
}

/* The mapfile that the user named tells of the disk, one beside a raw image of the chain of that image. */
static int chain_find_map(struct image *im)
{
    bool named = im->depth == 0 && im->opt->mapfile;
    char path[PATH_MAX];
    FILE *f = NULL;
    int ret;

    if (named && !util_copy(path, sizeof(path), im->opt->mapfile))
        return msg_err(-ENAMETOOLONG, "%s: path too long", im->opt->mapfile);
    if (named)
        f = lost_open(path, &im->files[0], true);
    if (named && !f)
        return msg_err(-errno, "%s: cannot open the mapfile: %s", path, strerror(errno));
    if (!named && !im->files[0].is_blk)
        f = lost_find(&im->files[0], path);
    if (!f)
        return 0;
    ret = named || im->format->plain ? chain_read_map(im, path, f) : 0;
    if (!named && !im->format->plain)
        msg_say(MSG_NOTE, "%s: the mapfile %s is not used: it may be of this file, or of the disk (README, BAD "
                "SECTORS)", im->name, path);
    fclose(f);
    return ret;
}

static int chain_find_maps(struct image *im)
{
    int ret = 0;

    if (im->opt->mapfile && strcmp(im->opt->mapfile, "none") == 0)
        return 0;
    for (; im && !ret; im = im->backing)
        ret = chain_find_map(im);
    return ret;
}

/* Call chain_close() also after a failure. The caller has set writable and growable. */
static int chain_open(struct image *im, char *const *paths, unsigned n_paths, const struct image_options *opt)
{
    int ret;

    im->opt = opt;
    im->n_given = n_paths;
    ret = chain_begin(im, paths[0]);
    for (unsigned i = 0; i < n_paths && !ret; i++)
        ret = probe_add_file(im, paths[i]);
    if (!ret)
        ret = probe_image(im, opt->format);
    if (!ret && opt->parts)
        ret = probe_find_parts(im);
    if (!ret && opt->parts)
        ret = probe_check_pieces(im);
    if (!ret)
        ret = chain_finish(im);
    if (!ret)
        ret = chain_check_options(im);
    if (!ret)
        ret = chain_begin_writing(im);
    if (!ret)
        ret = chain_open_backing(im);
    if (!ret && im->least_size)
        chain_guess_size(im);
    if (!ret)
        ret = chain_find_maps(im);
    return ret ? ret : check_look_at_chain(im);
}

/* Opens O_DIRECT handles for all files before the sandbox forbids it: sectors are salvaged through them. Optional. */
static int chain_open_direct(struct image *im)
{
    for (; im; im = im->backing)
        for (unsigned i = 0; i < im->n_files; i++)
            file_open_direct(&im->files[i]);
    return 0;
}

/* --strict: maps the whole disk before anything is shown. */
static int chain_check_strict(struct image *im)
{
    struct extent ext;
    unsigned n = 0;

    for (uint64_t offset = 0; offset < im->size; offset += ext.length) {
        if (++n % 1024 == 0 && util_interrupted())
            return msg_err(-EINTR, "interrupted");
        img_map(im, offset, im->size - offset, false, &ext);
        if (ext.kind == EXT_BAD)
            return msg_err(-EIO, "%s: damaged (--strict): %" PRIu64 " bytes at %" PRIu64 ": %s", im->name, ext.length,
                           offset, ext.why);
    }
    return 0;
}

/* ******************************************************************************************************** *
 * 27. Overlays
 *
 * A qcow2 image over the one that was opened takes the writes.
 * ******************************************************************************************************** */

/*
 * -- compatibility with QEMU --
 *
 * Writes to an image of any format go to a qcow2 overlay; the image stays as it is. QEMU can use such an overlay if
 * it reads the same disk from the image. If it would read another one (split images, snapshots, parents that it does
 * not know, damage), the overlay records a format that QEMU refuses: else qemu-img commit would write wrong data into
 * the image.
 */

enum { OVERLAY_MAX_EXTENTS = 1 << 18 };     /* mapped of each image before an overlay is made */

/* Does QEMU read what we read from this chain, or refuse it? A range that is an error here may be zeros there. */
static bool overlay_reads_as_qemu(struct image *im)
{
    struct extent ext;

    for (; im; im = im->backing) {
        unsigned n = 0;
        if (im->damaged || im->unread || (!im->format->plain && im->size % 512) ||
            (im->format->as_qemu && !im->format->as_qemu(im)))
            return false;
        for (uint64_t at = 0; !im->format->bad_to_qemu && at < im->size; at += ext.length) {
            ext_map(im, at, im->size - at, false, &ext);
            if (++n > OVERLAY_MAX_EXTENTS || ext.kind == EXT_BAD)
                return false;
        }
    }
    return true;
}

/* The format to record: QEMU's name, or a private one with a hash of the options that the disk depends on. */
static void overlay_format(const struct image *base, char word[32])
{
    const struct image_options *opt = base->opt;
    uint64_t hash = UTIL_HASH_START;
    char size[24];
    bool parts = base->n_files > 1 && base->format->plain, cut = opt->no_backing && *base->backing_name;

    util_hash(&hash, opt->snapshot);
    for (unsigned i = 0; i < (opt->n_backing ? opt->n_backing : 1); i++)
        util_hash(&hash, i < opt->n_backing ? opt->backing[i] : NULL);
    util_hash(&hash, opt->backing_format);
    util_hash(&hash, opt->data_file);
    if (cut || opt->ignore_log)
        util_hash(&hash, cut && opt->ignore_log ? "neither" : cut ? "no backing" : "no log");
    for (unsigned i = 0; parts && i < base->n_files; i++) {
        snprintf(size, sizeof(size), "%" PRIu64, (uint64_t)base->files[i].size);
        util_hash(&hash, util_basename(base->files[i].path));
        util_hash(&hash, size);
    }
    if (opt->rebuild || opt->header) {
        util_hash(&hash, opt->rebuild ? "rebuilt" : "borrowed");
        util_hash(&hash, opt->header);
    }
    if (parts || opt->snapshot || opt->n_backing || opt->backing_format || opt->data_file || cut || opt->ignore_log ||
        opt->rebuild || opt->header)
        snprintf(word, 32, "%s:%016" PRIx64, parts ? "split-raw" : opt->snapshot ? "snapshot" : "backing", hash);
    else
        util_copy(word, 32, base->format->name);
}

/* The image's path to record: relative to the overlay's directory if it is in there, else absolute. */
static int overlay_backing(const struct image *base, const char *overlay, char name[PATH_MAX])
{
    char directory[PATH_MAX], real[PATH_MAX];
    size_t len;

    if (!file_resolve(base->files[0].path, name))
        return msg_err(-errno, "%s: %s", base->name, strerror(errno));
    util_beside(directory, overlay, ".");
    if (!file_resolve(directory, real))
        return msg_err(-errno, "%s: %s", overlay, strerror(errno));
    len = strlen(real);
    if (strncmp(name, real, len) == 0 && name[len] == '/' && !strchr(name + len + 1, '/'))
        memmove(name, name + len + 1, strlen(name + len + 1) + 1);
    return strlen(name) <= 1023 ? 0 : msg_err(-ENAMETOOLONG, "%s: too long a path to be recorded", name);
}

/* Writes the overlay into fd, which im owns from here on. QEMU never opens a temporary one: it needs no prefix. */
static int overlay_fill(struct image *im, struct image *base, const char *path, bool temporary, int fd)
{
    char backing[PATH_MAX], word[32], format[64];
    int ret = file_adopt(&im->files[0], path, fd, true);

    im->n_files = 1;
    if (!ret)
        ret = overlay_backing(base, path, backing);
    if (ret)
        return ret;
    overlay_format(base, word);
    snprintf(format, sizeof(format), "%s%s",
             temporary || strchr(word, ':') || overlay_reads_as_qemu(base) ? "" : probe_not_for_qemu, word);
    return im->format->create(&im->files[0], base->size, backing, format);
}

/*
 * Without O_TMPFILE, or a way to link it: creates the overlay under a fixed working name, so that the next start
 * removes what a killed one left.
 */
static int overlay_make_named(struct image *im, struct image *base, const char *path)
{
    char working[PATH_MAX];
    int fd, ret;

    if ((size_t)snprintf(working, sizeof(working), "%.*s.%s.new", (int)(util_basename(path) - path), path,
                         util_basename(path)) >= sizeof(working))
        return msg_err(-ENAMETOOLONG, "%s: path too long", path);
    fd = file_make_working(working);
    if (fd < 0)
        return msg_err(fd, "%s: cannot make the overlay: %s: %s", path, working, strerror(-fd));
    ret = overlay_fill(im, base, path, false, fd);
    if (!ret) {
        ret = file_publish(fd, working, path);
        if (ret)
            msg_err(ret, "%s: %s", path, strerror(-ret));
    }
    file_leave_working(fd, ret ? working : NULL);
    return ret;
}

/* Creates the overlay at `path` (temporary: a name it could have). It appears there complete, or not at all. */
static int overlay_make(struct image *im, struct image *base, const char *path, bool temporary)
{
    char directory[PATH_MAX];
    int fd, ret, flushed;

    util_beside(directory, path, ".");
    fd = file_make_unnamed(directory, temporary);
    if (fd < 0 && (temporary || !file_is_unsupported(fd) || fd == -ENOENT))
        return msg_err(fd, "%s: cannot make %s: %s", path, temporary ? "a file there" : "the overlay", strerror(-fd));
    ret = fd;
    if (fd >= 0) {
        ret = overlay_fill(im, base, path, temporary, fd);
        if (ret || temporary)
            return ret;
        ret = file_publish(fd, NULL, path);
        if (ret && !file_is_unsupported(ret))
            return msg_err(ret, "%s: %s", path, strerror(-ret));
        if (ret)
            file_close(&im->files[0]);
    }
    if (ret)
        ret = overlay_make_named(im, base, path);
    im->made = !ret;
    flushed = ret ? 0 : file_sync_directory(directory);
    if (flushed)
        msg_say(MSG_NOTE, "%s: its directory cannot be flushed: %s", path, strerror(-flushed));
    return ret;
}

/* An existing overlay must have been made over this very image. */
static int overlay_check(const struct image *im, const struct image *base)
{
    char path[PATH_MAX], format[32];

    if (!*im->backing_name)
        return msg_err(-EINVAL, "%s: is not an overlay: it has no backing file", im->name);
    if (!util_beside(path, im->name, im->backing_name) || !file_is_at(&base->files[0], path))
        return msg_err(-EINVAL, "%s: is not an overlay of %s, but of %s", im->name, base->name, im->backing_name);
    overlay_format(base, format);
    if (strcmp(probe_recorded_format(im->backing_format), format) != 0)
        return msg_err(-EINVAL, "%s: is an overlay of %s as %s, not as %s (other parts, snapshot or backing file)",
                       im->name, base->name, im->backing_format, format);
    return chain_check_backing_size(im, base);
}

/*
 * Opens `im` as an overlay of base, which is open and belongs to im on success. path: created if it does not exist;
 * with `temporary`, a name the overlay could have.
 */
static int overlay_open(struct image *im, struct image *base, const char *path, bool temporary,
                        const struct image_options *opt)
{
    bool there = !temporary && file_exists(path);
    int ret = chain_begin(im, path);

    im->opt = opt;
    im->format = probe_format_named("qcow2");
    im->n_given = 1;
    if (!ret)
        ret = there ? probe_add_file(im, path) : overlay_make(im, base, path, temporary);
    if (!ret)
        ret = chain_finish(im);
    if (!ret)
        ret = overlay_check(im, base);
    if (!ret)
        ret = chain_begin_writing(im);
    if (ret)
        return ret;
    ret = check_look_at_chain(im);    /* only the overlay: its base was looked at before */
    if (!ret && opt->suspect_errors && im->suspect.n)
        ret = msg_err(-EIO, "%s: some of its tables seem to be wiped (--suspect=eio): it takes no more changes",
                      im->name);
    im->backing = base;
    base->child = im;
    return ret;
}

/* ******************************************************************************************************** *
 * 28. Partitions
 *
 * MBR with extended partitions and GPT, in a window [base, base + size) of an image. Everything read here is
 * hostile: LBAs are checked for overflow, tables against MAX_GPT_ENTRIES, chains against MAX_LOGICAL and for loops.
 * The table is chosen as Linux does, with two exceptions. A GPT without its protective MBR is accepted if there is no
 * other table: on a disk whose first sectors were overwritten, the copy at the end is left. If both copies of the GPT
 * are damaged, the partitions of a hybrid MBR are shown.
 * ******************************************************************************************************** */

static const char part_no_table[] = "no partition table (MBR or GPT)";

struct part_scan {
    struct image *im;
    uint64_t base, size;
    uint32_t sector;                /* 512 or 4096 */
    struct view *views;
    unsigned n_views;               /* in use, of MAX_VIEWS */
    uint64_t missing;               /* bytes: so far past the end of the disk its table reaches */
    uint64_t backup;                /* the sector of the second copy of a GPT */
    const char *lost_backup;        /* what is wrong with that; NULL: nothing */
};

static int part_read(const struct part_scan *ps, uint64_t lba, void *buf, uint64_t len)
{
    uint64_t done;

    if (lba >= ps->size / ps->sector || len > ps->size - lba * ps->sector)
        return -EINVAL;
    return img_read(ps->im, buf, len, ps->base + lba * ps->sector, &done);
}

/* The table says that the disk has this many sectors at least. False: no disk has so many. */
static bool part_reaches(struct part_scan *ps, uint64_t first_lba, uint64_t n_lba)
{
    uint64_t max = ((uint64_t)MAX_IMAGE_SIZE - ps->base) / ps->sector, end;

    if (first_lba > max || n_lba > max - first_lba)
        return false;
    end = (first_lba + n_lba) * ps->sector;
    if (end > ps->size && end - ps->size > ps->missing)
        ps->missing = end - ps->size;
    return true;
}

static void part_add(struct part_scan *ps, unsigned number, uint64_t first_lba, uint64_t n_lba)
{
    uint64_t start = first_lba * ps->sector;
    struct view *v = &ps->views[ps->n_views];
    bool possible = part_reaches(ps, first_lba, n_lba);

    if (first_lba >= ps->size / ps->sector || !possible || ps->n_views == MAX_VIEWS) {
        msg_say(MSG_NOTE, "%s: partition %u %s, left out", ps->im->name, number,
                first_lba >= ps->size / ps->sector ? "starts past the end of the disk"
                : ps->n_views < MAX_VIEWS ? "is larger than any file" : "is one too many");
        return;
    }
    *v = (struct view){ .number = (int)number, .start = ps->base + start, .size = n_lba * ps->sector };
    v->inside = util_min(v->size, ps->size - start);
    snprintf(v->name, sizeof(v->name), "p%u", number);
    ps->n_views++;
    if (v->inside < v->size)
        msg_say(MSG_NOTE, "%s: partition %u reaches %" PRIu64 " bytes past the end of the disk: those read as errors",
                ps->im->name, number, v->size - v->inside);
}

/* An entry of an MBR or EBR. */
struct part_entry {
    uint8_t status, type;
    bool extended;
    uint64_t start, count;          /* sectors; in an EBR, start is relative; count 0: unused */
};

static struct part_entry part_parse_entry(const struct mbr *mbr, size_t i)
{
    const struct mbr_entry *raw = &mbr->entry[i];
    struct part_entry e = { .status = raw->status, .type = raw->type,
                            .start = le32_to_cpu(raw->first_lba), .count = le32_to_cpu(raw->sectors) };

    e.extended = e.count && e.type && strchr(MBR_EXTENDED_TYPES, e.type);
    return e;
}

struct part_chain {
    uint64_t first, n_lba;          /* the extended partition */
    uint64_t ebr, ebr_lba;          /* the current record, and how many sectors the link to it claims */
    uint64_t seen[1 + MAX_LOGICAL]; /* the MBR and all records so far: links may go back, but not in a loop */
    unsigned n_seen;
};

/* Follows the chain to its next record. Returns NULL, or what is wrong. */
static const char *part_next_ebr(const struct part_scan *ps, struct part_chain *c, struct mbr *ebr)
{
    for (unsigned i = 0; i < c->n_seen; i++)
        if (c->seen[i] == c->ebr)
            return "a loop";
    if (c->n_seen == ARRAY_LEN(c->seen))
        return "too long";
    c->seen[c->n_seen++] = c->ebr;
    if (part_read(ps, c->ebr, ebr, sizeof(*ebr)))
        return "cannot be read";
    if (c->ebr - c->first >= c->n_lba)      /* Linux follows it, too */
        msg_say(MSG_NOTE, "%s: the record of a logical partition, at sector %" PRIu64 ", lies outside of the extended "
                "partition", ps->im->name, c->ebr);
    return le16_to_cpu(ebr->signature) == MBR_SIGNATURE ? NULL : "no signature";
}

/*
 * Logical partitions: a chain of EBRs. Each has a partition (relative to itself) and a link (relative to the extended
 * partition), usually in slots 1 and 2; OS/2 used all four. Numbered in the order of the chain.
 */
static void part_scan_extended(struct part_scan *ps, uint64_t first, uint64_t n_lba, unsigned *number)
{
    struct part_chain c = { .first = first, .n_lba = n_lba, .ebr = first, .ebr_lba = n_lba, .n_seen = 1 };
    struct mbr ebr;
    struct part_entry e, link;
    const char *wrong;
    uint64_t end;

    do {
        wrong = part_next_ebr(ps, &c, &ebr);
        if (wrong) {
            msg_say(MSG_NOTE, "%s: the chain of logical partitions is broken at sector %" PRIu64 " (%s), after "
                    "partition %u", ps->im->name, c.ebr, wrong, *number - 1);
            return;
        }
        link = (struct part_entry){ .extended = false };
        for (size_t i = 0; i < 4; i++) {
            e = part_parse_entry(&ebr, i);
            end = e.start + e.count;
            /* Slots 3 and 4 may hold garbage: Linux takes what lies within the link and the extended partition. */
            if (e.count && !e.extended && (i < 2 || (end <= c.ebr_lba && c.ebr + end <= first + n_lba)))
                part_add(ps, (*number)++, c.ebr + e.start, e.count);
            if (!link.extended)
                link = e;
        }
        c.ebr = first + link.start;
        c.ebr_lba = link.count;
    } while (link.extended);
}

enum part_table { PART_NONE, PART_MBR, PART_PROTECTIVE, PART_HYBRID };

/* The boot sector of FAT, exFAT or NTFS: it ends in 55 AA, too. */
static bool part_is_boot_sector(const struct mbr *mbr)
{
    const uint8_t *b = mbr->code;
    uint16_t bytes = util_le16(b + 11), reserved = util_le16(b + 14);

    return (b[0] == 0xeb || b[0] == 0xe9) &&
           (memcmp(b + 3, "NTFS    ", 8) == 0 || memcmp(b + 3, "EXFAT   ", 8) == 0 ||
            ((bytes == 512 || bytes == 1024 || bytes == 2048 || bytes == 4096) && reserved && b[16] && b[21] >= 0xf0));
}

/* AIX has tables of its own; Linux believes the MBR of such a disk only if it names Linux partitions. */
static bool part_is_aix(const struct part_scan *ps, const struct mbr *mbr)
{
    uint8_t lvm[512];

    if (memcmp(mbr->code, "\xc9\xc2\xd4\xc1", 4) != 0)
        return false;
    for (size_t i = 0; i < 4; i++) {
        struct part_entry e = part_parse_entry(mbr, i);
        if (e.extended || (e.type && strchr("\x82\x83\x8e\xfd", e.type)))
            return false;
    }
    return part_read(ps, 7, lvm, sizeof(lvm)) == 0 && memcmp(lvm, "_LVM", 4) == 0;
}

/*
 * Is this sector an MBR, and whose? A boot sector ends in 55 AA as well, but has code where the entries would be: Linux
 * tells them by the status bytes. Linux shows entries of type 00, too (isohybrid writes one). They do not count in a
 * boot sector, nor beside a protective entry: grub writes a dummy with the boot flag there.
 */
static enum part_table part_probe_mbr(const struct part_scan *ps, const struct mbr *mbr)
{
    bool used = false, typed = false, gpt = false;

    if (le16_to_cpu(mbr->signature) != MBR_SIGNATURE || part_is_aix(ps, mbr))
        return PART_NONE;
    for (size_t i = 0; i < 4; i++) {
        struct part_entry e = part_parse_entry(mbr, i);
        if (e.status & 0x7f)
            return PART_NONE;
        used |= e.count > 0;
        gpt |= e.type == MBR_TYPE_GPT;
        typed |= e.count && e.type && e.type != MBR_TYPE_GPT;
    }
    if (gpt)
        return typed ? PART_HYBRID : PART_PROTECTIVE;
    return typed || (used && !part_is_boot_sector(mbr)) ? PART_MBR : PART_NONE;
}

static void part_scan_mbr(struct part_scan *ps, const struct mbr *mbr, enum part_table kind)
{
    unsigned logical = 5;

    for (unsigned i = 0; i < 4; i++) {
        struct part_entry e = part_parse_entry(mbr, i);
        if (e.count && !e.extended && (kind == PART_MBR || (e.type && e.type != MBR_TYPE_GPT)))
            part_add(ps, i + 1, e.start, e.count);
    }
    for (unsigned i = 0; i < 4; i++) {
        struct part_entry e = part_parse_entry(mbr, i);
        if (e.extended && part_reaches(ps, e.start, e.count))
            part_scan_extended(ps, e.start, e.count, &logical);
    }
}

/* Reads the GPT header at lba into `sector`. Returns what is wrong with it, or NULL. *other: see part_scan_gpt(). */
static const char *part_read_gpt(const struct part_scan *ps, uint64_t lba, uint8_t sector[4096], uint64_t *other)
{
    struct gpt_header *h = (struct gpt_header *)sector;
    uint32_t crc, n, entry;

    *other = 0;
    if (part_read(ps, lba, sector, ps->sector))
        return "its header cannot be read";
    if (memcmp(h->signature, "EFI PART", 8) != 0)
        return "no signature";
    *other = le64_to_cpu(h->other_lba);
    if (le32_to_cpu(h->size) < sizeof(*h) || le32_to_cpu(h->size) > ps->sector)
        return "its header's size is not 92 bytes to a sector";
    crc = le32_to_cpu(h->crc);
    h->crc = (le32){ { 0 } };
    if (libdeflate_crc32(0, h, le32_to_cpu(h->size)) != crc)
        return "its header's checksum is wrong";
    if (le64_to_cpu(h->my_lba) != lba)
        return "its header belongs elsewhere";
    n = le32_to_cpu(h->n_entries);
    entry = le32_to_cpu(h->entry_size);
    if (n > MAX_GPT_ENTRIES || entry < sizeof(struct gpt_entry) || entry > GPT_ENTRY_MAX || entry % 8)
        return "its table has more than 1024 entries, or entries not of 128 to 4096 bytes";
    return NULL;
}

/*
 * Adds the partitions of the GPT whose header is at lba. Returns NULL, or what is wrong with it. *other: where the
 * header says that the other copy is, even if it is damaged; 0: it has no signature.
 */
static const char *part_scan_gpt(struct part_scan *ps, uint64_t lba, uint64_t *other)
{
    uint8_t sector[4096] = { 0 }, *table;
    const struct gpt_header *h = (const struct gpt_header *)sector;
    const char *wrong = part_read_gpt(ps, lba, sector, other);
    uint32_t n, entry;

    if (wrong)
        return wrong;
    n = le32_to_cpu(h->n_entries);
    entry = le32_to_cpu(h->entry_size);
    table = calloc(n + 1, entry);
    if (!table)
        return "out of memory";
    if (part_read(ps, le64_to_cpu(h->entries_lba), table, (uint64_t)n * entry))
        wrong = "its table cannot be read";
    else if (libdeflate_crc32(0, table, (size_t)n * entry) != le32_to_cpu(h->entries_crc))
        wrong = "its table's checksum is wrong";
    for (uint32_t i = 0; i < n && !wrong; i++) {
        const struct gpt_entry *e = (const struct gpt_entry *)(table + (size_t)i * entry);
        uint64_t first = le64_to_cpu(e->first_lba), end = le64_to_cpu(e->last_lba) + 1;
        if (text_is_null_id(e->type_guid))
            continue;
        if (end <= first)
            msg_say(MSG_NOTE, "%s: partition %u ends before it starts, left out", ps->im->name, i + 1);
        else
            part_add(ps, i + 1, first, end - first);
    }
    free(table);
    return wrong;
}

/* The GPT is good, and its second copy should be at sector `at`. last: of the disk. */
static void part_check_backup(struct part_scan *ps, uint64_t at, uint64_t last)
{
    uint8_t sector[4096];
    uint64_t none;

    if (at < last)
        msg_say(MSG_NOTE, "%s: its backup GPT is at sector %" PRIu64 ", not at its end (%" PRIu64 "): the disk "
                "was smaller once", ps->im->name, at, last);
    if (at > last && part_reaches(ps, at, 1)) {
        msg_say(MSG_NOTE, "%s: its backup GPT is at sector %" PRIu64 ", past its end (%" PRIu64 "): the disk "
                "was larger once, or the image is cut off: it lacks %" PRIu64 " bytes", ps->im->name, at, last,
                (at - last) * ps->sector);
        return;
    }
    ps->backup = at;
    ps->lost_backup = part_read_gpt(ps, at, sector, &none);
}

/*
 * Tries the primary and the backup GPT at one sector size. The backup is at the end of the disk as it was when the
 * table was written: the primary says where, if that is left; so does the protective entry of `mbr`.
 */
static const char *part_scan_gpts(struct part_scan *ps, uint32_t sector, const struct mbr *mbr)
{
    uint64_t last = ps->size / sector - 1, backup[2 + 4] = { last }, at, none;
    const char *wrong;

    ps->sector = sector;
    if (ps->size / sector < 3)
        return "the disk is too small";
    wrong = part_scan_gpt(ps, 1, &at);
    backup[1] = at;
    for (size_t i = 0; i < 4; i++) {
        struct part_entry e = part_parse_entry(mbr, i);
        backup[2 + i] = e.type == MBR_TYPE_GPT ? e.start + e.count - 1 : 0;
    }
    for (size_t i = 0; i < ARRAY_LEN(backup) && wrong; i++) {
        if (backup[i] < 2 || part_scan_gpt(ps, backup[i], &none))
            continue;
        msg_say(MSG_NOTE, "%s: the primary GPT is damaged (%s), using the backup at sector %" PRIu64 "%s", ps->im->name,
                wrong, backup[i], i ? "" : ", the end of the disk");
        at = backup[i];
        wrong = NULL;
    }
    if (!wrong)
        part_check_backup(ps, at, last);
    return wrong;
}

/* Adds the partitions to ps->views. `sector` 0: try both sizes. NULL, or why there are none. */
static const char *part_scan_all(struct part_scan *ps, uint32_t sector)
{
    uint32_t first_try = sector ? sector : 512;
    enum part_table kind = PART_NONE;
    struct mbr first = { 0 };
    const char *wrong;

    ps->sector = first_try;
    if (ps->size >= sizeof(first) && part_read(ps, 0, &first, sizeof(first)) == 0)
        kind = part_probe_mbr(ps, &first);
    if (kind != PART_MBR) {
        wrong = part_scan_gpts(ps, first_try, &first);
        if (!wrong || (!sector && !part_scan_gpts(ps, 4096, &first)))
            return NULL;
        if (kind != PART_HYBRID)
            return kind == PART_NONE ? part_no_table : wrong;
        msg_say(MSG_NOTE, "%s: the GPT is damaged (%s): shows the partitions of its hybrid MBR, by that table's "
                "numbers", ps->im->name, wrong);
    }
    ps->sector = first_try;
    part_scan_mbr(ps, &first, kind);
    return NULL;
}

/* The sector size of the disk in the image, or of the device; 0: the table will show. */
static uint32_t part_device_sector(const struct image *im)
{
    /* An image of 512 may also be a copy of a disk with larger sectors. */
    uint32_t sector = im->sector_size > 512 ? im->sector_size : file_sector_size(&im->files[0]);

    return sector == 512 || sector == 4096 ? sector : 0;
}

/* Leaves the chosen partition as views[0] (and the only one). */
static int part_choose(struct image *im, struct view *views, unsigned *n, unsigned number, const char *wrong)
{
    char list[256] = "none";
    size_t len = 0;

    for (unsigned i = 1; i < *n; i++) {
        if (views[i].number == (int)number) {
            views[0] = views[i];
            *n = 1;
            return 0;
        }
        if (len < sizeof(list))
            len += (size_t)snprintf(list + len, sizeof(list) - len, "%s%d", len ? ", " : "", views[i].number);
    }
    if (wrong)
        return msg_err(-ENXIO, "%s: no partition %u: %s", im->name, number, wrong);
    return msg_err(-ENXIO, "%s: no partition %u (there %s %s)", im->name, number, *n == 1 ? "is" : "are", list);
}

/* What the scan has found to be missing. shown: partitions are, so what they lack has been told. */
static void part_tell_missing(const struct part_scan *ps, bool shown)
{
    if (ps->missing && !shown)
        msg_say(MSG_NOTE, "%s: its partition table reaches %" PRIu64 " bytes past its end: it is cut off, or the copy "
                "of a larger disk (in a directory the partitions have their full size, with errors there)",
                ps->im->name, ps->missing);
    if (ps->lost_backup)
        msg_say(MSG_NOTE, "%s: has lost its backup GPT at sector %" PRIu64 ": %s", ps->im->name, ps->backup,
                ps->lost_backup);
}

static int part_check_strict(const struct part_scan *ps)
{
    if (ps->missing)
        return msg_err(-EIO, "%s: damaged (--strict): its partition table reaches %" PRIu64 " bytes past the end of "
                       "the disk", ps->im->name, ps->missing);
    if (ps->lost_backup)
        return msg_err(-EIO, "%s: damaged (--strict): its backup GPT at sector %" PRIu64 " is lost: %s",
                       ps->im->name, ps->backup, ps->lost_backup);
    return 0;
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
    bool shown = want->partition || want->all;

    if (want->offset && want->offset >= im->size)
        return msg_err(-EINVAL, "%s: --offset %" PRIu64 " is past the end (%" PRIu64 ")", im->name, want->offset,
                       (uint64_t)im->size);
    if (want->size > im->size - want->offset)
        return msg_err(-EINVAL, "%s: --size %" PRIu64 " reaches past the end (%" PRIu64 " are left at the offset)",
                       im->name, want->size, im->size - want->offset);
    ps.size = want->size ? want->size : im->size - want->offset;
    views[0] = (struct view){ .name = "disk", .start = want->offset, .inside = ps.size, .size = ps.size };
    msg_hushed += !shown;           /* to look at, for what is missing */
    if (shown || ps.size == im->size)
        wrong = part_scan_all(&ps, want->sector ? want->sector : part_device_sector(im));
    msg_hushed -= !shown;
    part_tell_missing(&ps, shown);
    *n = shown ? ps.n_views : 1;
    if (im->opt->strict && !want->partition && part_check_strict(&ps))
        return -EIO;
    if (want->partition)
        return part_choose(im, views, n, want->partition, wrong);
    if (wrong && shown)
        msg_say(wrong == part_no_table ? MSG_INFO : MSG_NOTE, "%s: only the disk is shown: %s%s", im->name,
                wrong == part_no_table ? "" : "the GPT is damaged: ", wrong);
    return 0;
}

/* ******************************************************************************************************** *
 * 29. FUSE operations
 *
 * fop_handle() turns one request into one reply inside the worker's buffer; it does no FUSE I/O, so any
 * transport can carry it. Node 1 is the mountpoint: the file itself, or the directory, whose files are the
 * nodes from 2 on. Requests come from the kernel, but every length is checked all the same.
 * ******************************************************************************************************** */

/* What is served. Set up before the workers start; after that only the atomics change. */
struct server {
    struct image *im;
    struct view *views;
    unsigned n_views;
    bool is_dir, writable, growable, resizable, direct_io, keep_cache, allow_other, debug;
    bool writers_direct;            /* see fop_count_open(); set by the handshake */
    _Atomic int64_t opens;          /* of handles that are cached; below 0: of direct ones */
    int backing_id;                 /* > 0: views[0] is passed through */
    uint64_t attr_valid;            /* seconds the kernel may keep attributes */
    struct timespec started;
    _Atomic uint32_t mode, uid, gid;
};

/* The data of a READ's reply that was not copied into the buffer. */
struct reference {
    struct file *file;
    uint64_t file_offset, offset, length;   /* offset: in the image */
    bool front_will_do;             /* the reader takes a short reply, which ends where the error is */
};

struct counters {                   /* written by one worker alone, read by the supervisor */
    _Atomic uint64_t reads, read_bytes, writes, write_bytes, errors;
    _Atomic uint64_t passthrough;   /* of the first worker: the kernel serves the file */
    char apart[16];                 /* a cache line each */
};

/* What one thread needs to handle requests. The transport owns it, and more: see struct loop_worker. */
struct worker {
    struct server *srv;
    bool sends_references;          /* the transport can send data that a reference names */
    struct reference ref;           /* of the current reply; length 0: its data is in buf */
    uint8_t *buf;                   /* FOP_BUF bytes: requests at FX_REQUEST_AT, the data of replies at FX_HEAD_ROOM */
    struct counters *count;
};

enum { FOP_BUF = FX_HEAD_ROOM + FX_MAX_IO };

struct request {
    const struct fuse_in_header *head;
    const struct view *view;        /* of the node; NULL: the directory, or no such node */
    const void *arg;
    size_t arg_len;
    uint8_t *out;                   /* FX_MAX_IO bytes; overlaps the data of a WRITE */
    size_t out_len;                 /* fop.out_len, unless the operation sets it */
};

typedef int fop_fn(struct worker *w, struct request *rq);

static void fop_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

static bool fop_is_dir(const struct server *srv, uint64_t node)
{
    return srv->is_dir && node == FUSE_ROOT_ID;
}

static const struct view *fop_view(const struct server *srv, uint64_t node)
{
    uint64_t i = node - (srv->is_dir ? 2 : 1);

    return i < srv->n_views ? &srv->views[i] : NULL;
}

/* Only the view of a whole image can be resized; its size is then that of the image. */
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

/* How much of a range of the view is inside the disk, which may be shorter than the view, or have been truncated. */
static uint64_t fop_inside(const struct server *srv, const struct view *v, uint64_t offset, uint64_t len)
{
    uint64_t inside;

    if (fop_resizable(srv, v))
        return img_inside(srv->im, offset, len);
    inside = offset < v->inside ? img_inside(srv->im, v->start + offset, util_min(len, v->inside - offset)) : 0;
    if (!inside)
        msg_serving(0, "%s: %s: %" PRIu64 " bytes at %" PRIu64 " lie past the end of the disk", srv->im->name,
                    v->name, len, offset);
    return inside;
}

static bool fop_growable(const struct server *srv, const struct view *v)
{
    return srv->growable && fop_resizable(srv, v);
}

static int fop_fill_attr(const struct server *srv, uint64_t node, struct fuse_attr *attr)
{
    const struct view *v = fop_view(srv, node);
    const struct file *f = &srv->im->files[0];
    struct stat st;
    uint32_t mode = srv->mode;

    if (!v && !fop_is_dir(srv, node))
        return -ENOENT;
    st = srv->writable ? file_stat(f) : f->st;
    *attr = (struct fuse_attr){
        .ino = node,
        .uid = srv->uid,
        .gid = srv->gid,
        .blksize = 4096,
        .atime = (uint64_t)st.st_atim.tv_sec,
        .mtime = (uint64_t)st.st_mtim.tv_sec,
        .ctime = (uint64_t)st.st_ctim.tv_sec,
        .atimensec = (uint32_t)st.st_atim.tv_nsec,
        .mtimensec = (uint32_t)st.st_mtim.tv_nsec,
        .ctimensec = (uint32_t)st.st_ctim.tv_nsec,
    };
    if (v) {
        attr->mode = S_IFREG | mode;
        attr->nlink = 1;
        attr->size = fop_size(srv, v);
        attr->blocks = util_min(img_blocks(srv->im), attr->size / 512 + (attr->size % 512 != 0));
    } else {
        attr->mode = S_IFDIR | (mode & 0444) | (mode & 0444) >> 2; /* read permission implies search permission */
        attr->nlink = 2;
    }
    return 0;
}

static int fop_fill_entry(const struct server *srv, uint64_t node, struct fuse_entry_out *out)
{
    *out = (struct fuse_entry_out){
        .nodeid = node, .attr_valid = srv->attr_valid, .entry_valid = 3600  /* names never change */
    };
    return fop_fill_attr(srv, node, &out->attr);
}

static int fop_lookup(struct worker *w, struct request *rq)
{
    const struct server *srv = w->srv;
    const char *name = rq->arg;

    if (!fop_is_dir(srv, rq->head->nodeid) || name[rq->arg_len - 1] != 0)
        return -ENOENT;
    for (unsigned i = 0; i < srv->n_views; i++)
        if (strcmp(name, srv->views[i].name) == 0)
            return fop_fill_entry(srv, i + 2, (struct fuse_entry_out *)rq->out);
    return -ENOENT;
}

static int fop_getattr(struct worker *w, struct request *rq)
{
    struct fuse_attr_out *out = (struct fuse_attr_out *)rq->out;

    *out = (struct fuse_attr_out){ .attr_valid = w->srv->attr_valid };
    return fop_fill_attr(w->srv, rq->head->nodeid, &out->attr);
}

static int fop_statx(struct worker *w, struct request *rq)
{
    struct fuse_attr attr = { 0 };
    int ret = fop_fill_attr(w->srv, rq->head->nodeid, &attr);

    *(struct fx_statx_out *)rq->out = (struct fx_statx_out){
        .attr_valid = w->srv->attr_valid,
        .mask = FX_STATX_BASIC,
        .blksize = attr.blksize,
        .nlink = attr.nlink,
        .uid = attr.uid,
        .gid = attr.gid,
        .mode = (uint16_t)attr.mode,
        .ino = attr.ino,
        .size = attr.size,
        .blocks = attr.blocks,
        .atime = { .sec = (int64_t)attr.atime, .nsec = attr.atimensec },
        .mtime = { .sec = (int64_t)attr.mtime, .nsec = attr.mtimensec },
        .ctime = { .sec = (int64_t)attr.ctime, .nsec = attr.ctimensec },
    };
    return ret;
}

/* unique: the request's number, which the kernel increments with each request (fuse_get_unique()). */
static int fop_set_size(const struct server *srv, const struct view *v, uint64_t size, uint64_t unique)
{
    if (!v)
        return -EISDIR;
    if (!srv->writable)
        return -EACCES;
    if (size == fop_size(srv, v))
        return 0;
    return fop_resizable(srv, v) ? img_resize(srv->im, size, unique) : -EOPNOTSUPP;
}

/* QEMU's rules: no +w on a read-only export; permissions for group and others only with --allow-other. */
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
        ret = fop_set_size(srv, rq->view, in->size, rq->head->unique);
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

/* File handles: the kernel passes them to READ, WRITE and RELEASE. */
enum { FOP_FH_PLAIN, FOP_FH_CACHED, FOP_FH_DIRECT };

/*
 * A handle for writing bypasses the page cache (direct I/O): a loop device has its own cache above, and copying twice
 * costs it a third of its speed; and the kernel runs several O_DIRECT writers in parallel (four with 4 KiB: 2.8x).
 * Except O_WRONLY with O_DIRECT, one stream of large writes, whose pieces the kernel sends in parallel only through a
 * cached handle (dd bs=1M: 1.2x). Cached and direct handles are never open together, as a direct write does not
 * update the pages of a cached reader: the first handle decides.
 */
static uint64_t fop_count_open(struct server *srv, uint32_t flags)
{
    int64_t n = atomic_load(&srv->opens), more;
    bool direct = (flags & O_ACCMODE) == O_RDWR || ((flags & O_ACCMODE) == O_WRONLY && !(flags & O_DIRECT));

    do
        more = n < 0 || (n == 0 && direct) ? n - 1 : n + 1;
    while (!atomic_compare_exchange_weak(&srv->opens, &n, more));
    return more < 0 ? FOP_FH_DIRECT : FOP_FH_CACHED;
}

static int fop_release(struct worker *w, struct request *rq)
{
    const struct fuse_release_in *in = rq->arg;
    int64_t n = atomic_load(&w->srv->opens), less;

    do
        less = in->fh == FOP_FH_CACHED && n > 0 ? n - 1 : in->fh == FOP_FH_DIRECT && n < 0 ? n + 1 : n;
    while (!atomic_compare_exchange_weak(&w->srv->opens, &n, less));
    return 0;
}

/*
 * Stops passthrough once the file was resized by another program: reads past its end must fail.
 *
 * Refuses O_TRUNC ("cp backup m", "> m") unless the disk may grow again. A block device would ignore it, but cp takes
 * this for a regular file, skips the holes of its source, and would leave old data there.
 */
static int fop_open(struct worker *w, struct request *rq)
{
    struct fx_open_out *out = (struct fx_open_out *)rq->out;
    const struct fuse_open_in *in = rq->arg;
    struct server *srv = w->srv;
    const struct view *v = rq->view;
    int ret;

    if (!srv->writable && (in->flags & O_ACCMODE) != O_RDONLY)
        return -EROFS;
    if ((in->flags & O_TRUNC) && fop_size(srv, v)) {
        ret = fop_growable(srv, v) ? fop_set_size(srv, v, 0, rq->head->unique)
                                   : msg_serving(-EPERM, "%s: opened to be emptied, refused: write without truncating "
                                                 "(dd conv=notrunc), or use --growable", srv->im->name);
        if (ret)
            return ret;
    }
    *out = (struct fx_open_out){ .fh = FOP_FH_PLAIN };
    if (srv->direct_io) {
        out->open_flags = FOPEN_DIRECT_IO | FX_OPEN_PARALLEL_DIRECT_WRITES;
    } else if (srv->backing_id > 0 && v == srv->views && !img_resized_underneath(srv->im)) {
        out->open_flags = FX_OPEN_PASSTHROUGH;
        out->backing_id = srv->backing_id;
    } else {
        if (srv->writers_direct)
            out->fh = fop_count_open(srv, in->flags);
        out->open_flags = out->fh == FOP_FH_DIRECT ? FOPEN_DIRECT_IO | FX_OPEN_PARALLEL_DIRECT_WRITES
                          : srv->keep_cache        ? FOPEN_KEEP_CACHE
                                                   : 0;
    }
    return 0;
}

/*
 * A cached read succeeds as a whole or fails: after a short reply the kernel would assume the end of the file. After
 * an error it reads page by page, so that only the bad page is lost. A direct read returns the good front.
 */
static int fop_copy(struct worker *w, const struct reference *ref, uint8_t *out, size_t *out_len)
{
    uint64_t done;
    int ret = img_read(w->srv->im, out, ref->length, ref->offset, &done);

    *out_len = done;
    return ret && done && ref->front_will_do ? 0 : ret;
}

/* With --on-error=zero, past the end of the disk there are zeros. */
static int fop_read_padded(struct worker *w, struct request *rq, uint64_t offset, uint64_t inside, uint64_t len)
{
    uint64_t done = 0;
    int ret = inside ? img_read(w->srv->im, rq->out, inside, offset, &done) : 0;

    memset(rq->out + inside, 0, len - inside);
    rq->out_len = len;
    return ret;
}

/* Answers large reads of plain data by reference, which saves a copy; copies everything else. */
static int fop_read(struct worker *w, struct request *rq)
{
    const struct fuse_read_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = rq->view;
    /* Only a direct read carries a lock owner. O_DIRECT does not tell: the kernel may fall back to the cache. */
    struct reference ref = { .front_will_do = in->read_flags & FUSE_READ_LOCKOWNER };
    struct extent ext = { .kind = EXT_BAD };
    uint64_t size, inside;
    int ret;

    file_tries_again = ref.front_will_do;
    size = fop_size(srv, v);
    if (in->offset >= size)
        return 0;
    ref.length = util_min(util_min(in->size, FX_MAX_IO), size - in->offset);
    inside = fop_inside(srv, v, in->offset, ref.length);
    if (fop_resizable(srv, v) && inside < ref.length) {
        if (!inside)
            return 0;               /* truncated meanwhile */
        ref.length = inside;
    }
    if (inside < ref.length)
        lost_note(v->start + in->offset + inside, ref.length - inside);
    if (inside < ref.length && srv->im->opt->zero_errors)
        return fop_read_padded(w, rq, v->start + in->offset, inside, ref.length);
    if (inside && inside < ref.length && !ref.front_will_do) /* the kernel retries larger ones page by page */
        return ref.length > 4096 ? -EIO
                                 : msg_serving(-EIO, "%s: %s: ends at %" PRIu64, srv->im->name, v->name, v->inside);
    if (inside == 0)
        return -EIO;
    ref.length = inside;
    ref.offset = v->start + in->offset;
    if (w->sends_references && ref.length >= FX_SPLICE_MIN && ref.length <= FX_SPLICE_MAX)
        img_map(srv->im, ref.offset, ref.length, false, &ext);
    if (ext.kind == EXT_DATA && ext.length >= ref.length) {
        ref.file = ext.file;
        ref.file_offset = ext.offset;
        w->ref = ref;
        rq->out_len = ref.length;
        ret = 0;
    } else {
        ret = fop_copy(w, &ref, rq->out, &rq->out_len);
    }
    fop_count(&w->count->reads, 1);
    fop_count(&w->count->read_bytes, rq->out_len);
    return ret;
}

static int fop_write(struct worker *w, struct request *rq)
{
    const struct fuse_write_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = rq->view;
    uint64_t size, len = in->size, done = 0;
    int ret;

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
            return fop_resizable(srv, v) ? -ENOSPC : -EIO;
    }
    ret = img_write(srv->im, (const uint8_t *)rq->arg + sizeof(*in), len, v->start + in->offset,
                    fop_growable(srv, v), rq->head->unique, &done);
    /* O_SYNC includes O_DSYNC. For a cached handle the kernel sends FSYNC itself. */
    if (done && (in->flags & O_DSYNC) && (srv->direct_io || in->fh == FOP_FH_DIRECT) && img_sync(srv->im, false))
        return -EIO;
    fop_count(&w->count->writes, 1);
    fop_count(&w->count->write_bytes, done);
    if (ret && !done)
        return ret;
    *(struct fuse_write_out *)rq->out = (struct fuse_write_out){ .size = (uint32_t)done };
    return 0;
}

/* close(2) is the last chance to report that a passed-through file was truncated, or that a flush failed. */
static int fop_flush(struct worker *w, struct request *rq)
{
    const struct server *srv = w->srv;
    struct image *im = srv->im;

    (void)rq;
    file_tell_bad(NULL);
    if (srv->backing_id > 0 && img_resized_underneath(im)) {
        im->failed = true;
        return msg_serving(-EIO, "%s: its size was changed by another program while it was served", im->name);
    }
    for (unsigned i = 0; srv->writable && i < im->n_files; i++)
        if (file_check_length(&im->files[i]) || im->files[i].latched)
            return im->files[i].latched;
    return 0;
}

static int fop_fsync(struct worker *w, struct request *rq)
{
    (void)rq;
    return img_sync(w->srv->im, false);
}

static int fop_fallocate(struct worker *w, struct request *rq)
{
    const int known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
    const struct fuse_fallocate_in *in = rq->arg;
    const struct server *srv = w->srv;
    const struct view *v = rq->view;
    uint64_t len = in->length, size;
    int mode = (int)in->mode;

    if (!srv->writable)
        return -EROFS;
    if ((mode & ~known) || ((mode & FALLOC_FL_PUNCH_HOLE) && !(mode & FALLOC_FL_KEEP_SIZE)))
        return -EOPNOTSUPP;
    if (!len || in->offset > (uint64_t)MAX_IMAGE_SIZE || len > (uint64_t)MAX_IMAGE_SIZE - in->offset)
        return -EINVAL;
    size = fop_size(srv, v);
    if (!fop_resizable(srv, v)) {
        if (in->offset + len > size && !(mode & FALLOC_FL_PUNCH_HOLE))
            return -ENOSPC;
        if (in->offset >= size)
            return 0;
        len = util_min(len, size - in->offset);
        if (fop_inside(srv, v, in->offset, len) < len)
            return -EIO;
    }
    return img_fallocate(srv->im, mode, len, v->start + in->offset, fop_growable(srv, v));
}

/* SEEK_DATA and SEEK_HOLE over the image's extents. Bad ranges count as data, so that a copy meets the error. */
static int fop_lseek(struct worker *w, struct request *rq)
{
    const struct fuse_lseek_in *in = rq->arg;
    const struct view *v = rq->view;
    uint64_t size, at = in->offset;
    struct extent ext;

    if (!v || (in->whence != SEEK_DATA && in->whence != SEEK_HOLE))
        return -EINVAL;
    size = fop_size(w->srv, v);
    if (at >= size)
        return -ENXIO;
    for (; at < size; at += ext.length) {
        ext = (struct extent){ .kind = EXT_BAD, .length = size - at };
        if (fop_resizable(w->srv, v) || at < v->inside)
            img_map(w->srv->im, v->start + at, util_min(size, fop_resizable(w->srv, v) ? size : v->inside) - at, true,
                    &ext);
        if ((ext.kind == EXT_ZERO) == (in->whence == SEEK_HOLE))
            break;
    }
    if (at >= size && in->whence == SEEK_DATA)
        return -ENXIO;
    *(struct fuse_lseek_out *)rq->out = (struct fuse_lseek_out){ .offset = util_min(at, size) };
    return 0;
}

static int fop_statfs(struct worker *w, struct request *rq)
{
    *(struct fuse_statfs_out *)rq->out = (struct fuse_statfs_out){
        .st = { .bsize = 4096, .frsize = 4096, .blocks = fop_size(w->srv, w->srv->views) / 4096,
                .files = w->srv->n_views, .namelen = 255 }
    };
    return 0;
}

static int fop_opendir(struct worker *w, struct request *rq)
{
    (void)w;
    *(struct fx_open_out *)rq->out = (struct fx_open_out){ .fh = FOP_FH_PLAIN };
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
    size_t max = util_min(in->size, FX_MAX_IO);
    uint64_t node;
    const char *name;

    for (uint64_t i = in->offset; (name = fop_dir_name(w->srv, i, &node)); i++) {
        size_t len = strlen(name), need = head + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + len);
        struct fuse_dirent *d = (struct fuse_dirent *)(rq->out + rq->out_len + head);
        if (need > max - rq->out_len)
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

/*
 * Requests that are not in the table get -ENOSYS; the kernel then handles them alone or stops asking (POLL, ACCESS,
 * xattrs, locks, INTERRUPT, IOCTL, COPY_FILE_RANGE). To create, rename and remove is refused: the directory is fixed.
 */
static const struct fop {
    const char *name;
    fop_fn *fn;                     /* NULL: the answer is always `error` */
    uint16_t min_arg, out_len;
    enum { FOP_ANY, FOP_FILE, FOP_DIR } node;       /* what it needs, else -EISDIR or -ENOTDIR */
    int error;
    bool no_reply;
} fop_table[] = {
    [FUSE_LOOKUP] = { "LOOKUP", fop_lookup, 1, sizeof(struct fuse_entry_out) },
    [FUSE_FORGET] = { "FORGET", .no_reply = true },
    [FUSE_BATCH_FORGET] = { "BATCH_FORGET", .no_reply = true },
    [FUSE_GETATTR] = { "GETATTR", fop_getattr, 0, sizeof(struct fuse_attr_out) },
    [FUSE_SETATTR] = { "SETATTR", fop_setattr, sizeof(struct fuse_setattr_in), sizeof(struct fuse_attr_out) },
    [FX_STATX] = { "STATX", fop_statx, sizeof(struct fx_statx_in), sizeof(struct fx_statx_out) },
    [FUSE_OPEN] = { "OPEN", fop_open, sizeof(struct fuse_open_in), sizeof(struct fx_open_out), .node = FOP_FILE },
    [FUSE_READ] = { "READ", fop_read, sizeof(struct fuse_read_in), .node = FOP_FILE },
    [FUSE_WRITE] = { "WRITE", fop_write, sizeof(struct fuse_write_in), sizeof(struct fuse_write_out), FOP_FILE },
    [FUSE_FLUSH] = { "FLUSH", fop_flush },
    [FUSE_RELEASE] = { "RELEASE", fop_release, sizeof(struct fuse_release_in) },
    [FUSE_FSYNC] = { "FSYNC", fop_fsync },
    [FUSE_FALLOCATE] = { "FALLOCATE", fop_fallocate, sizeof(struct fuse_fallocate_in), .node = FOP_FILE },
    [FUSE_LSEEK] = { "LSEEK", fop_lseek, sizeof(struct fuse_lseek_in), sizeof(struct fuse_lseek_out) },
    [FUSE_STATFS] = { "STATFS", fop_statfs, 0, sizeof(struct fuse_statfs_out) },
    [FUSE_OPENDIR] = { "OPENDIR", fop_opendir, 0, sizeof(struct fx_open_out), .node = FOP_DIR },
    [FUSE_READDIR] = { "READDIR", fop_readdir, sizeof(struct fuse_read_in), .node = FOP_DIR },
    [FUSE_READDIRPLUS] = { "READDIRPLUS", fop_readdir, sizeof(struct fuse_read_in), .node = FOP_DIR },
    [FUSE_RELEASEDIR] = { "RELEASEDIR" },
    [FUSE_FSYNCDIR] = { "FSYNCDIR" },
    [FUSE_DESTROY] = { "DESTROY" },
    [FUSE_SYMLINK] = { "SYMLINK", .error = -EPERM },
    [FUSE_MKNOD] = { "MKNOD", .error = -EPERM },
    [FUSE_MKDIR] = { "MKDIR", .error = -EPERM },
    [FUSE_UNLINK] = { "UNLINK", .error = -EPERM },
    [FUSE_RMDIR] = { "RMDIR", .error = -EPERM },
    [FUSE_RENAME] = { "RENAME", .error = -EPERM },
    [FUSE_RENAME2] = { "RENAME2", .error = -EPERM },
    [FUSE_LINK] = { "LINK", .error = -EPERM },
    [FUSE_CREATE] = { "CREATE", .error = -EPERM },
};

_Static_assert(sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) == 80, "WRITE's headers");

static struct fuse_in_header *fop_request(const struct worker *w)
{
    return (struct fuse_in_header *)(w->buf + FX_REQUEST_AT);
}

/* The reply's header ends where its data begins: one contiguous piece. */
static struct fuse_out_header *fop_reply(const struct worker *w)
{
    return (struct fuse_out_header *)(w->buf + FX_HEAD_ROOM) - 1;
}

static size_t fop_finish(struct worker *w, uint64_t unique, int ret, size_t out_len)
{
    struct fuse_out_header *reply = fop_reply(w);

    if (ret == -EIO)
        fop_count(&w->count->errors, 1);
    *reply = (struct fuse_out_header){
        .len = (uint32_t)(sizeof(*reply) + (ret ? 0 : out_len)), .error = ret, .unique = unique
    };
    return reply->len;
}

static int fop_run(struct worker *w, const struct fop *op, struct request *rq)
{
    if (!op->name)
        return -ENOSYS;
    if (rq->arg_len < op->min_arg)
        return -EINVAL;
    if (op->node == FOP_FILE && !rq->view)
        return -EISDIR;
    if (op->node == FOP_DIR && !fop_is_dir(w->srv, rq->head->nodeid))
        return -ENOTDIR;
    return op->fn ? op->fn(w, rq) : op->error;
}

/* Handles the n bytes at fop_request(). Returns the reply's length, 0: none. With w->ref its data is a reference. */
static size_t fop_handle(struct worker *w, size_t n)
{
    const struct fuse_in_header *head = fop_request(w);
    struct request rq = { .head = head, .arg = head + 1, .out = w->buf + FX_HEAD_ROOM };
    const struct fop *op;
    int ret;

    if (n < sizeof(*head) || head->len != n) {
        msg_serving(0, "malformed request of %zu bytes from the kernel, ignored", n);
        return 0;
    }
    op = head->opcode < ARRAY_LEN(fop_table) ? &fop_table[head->opcode] : &fop_table[0];
    rq.view = fop_view(w->srv, head->nodeid);
    rq.arg_len = n - sizeof(*head);
    rq.out_len = op->out_len;
    ret = fop_run(w, op, &rq);
    if (w->srv->debug)
        msg_say(MSG_DEBUG, "%s(%u) node %" PRIu64 ": %s, %zu bytes", op->name ? op->name : "op", head->opcode,
                head->nodeid, ret ? strerror(-ret) : "ok", ret ? 0 : rq.out_len);
    return op->no_reply ? 0 : fop_finish(w, head->unique, ret, rq.out_len);
}

/* The reference could not be sent: reads its data into the buffer. Returns the reply's length. */
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
 * 30. Worker loop
 *
 * The transport: read(2) a request, fop_handle() it, write(2) the reply. Every worker does all three alone,
 * so there is no queue and no lock between threads; the kernel hands a request to whoever reads. The workers
 * are started together and stay: a thread that waits in read(2) costs nothing, and the kernel wakes just one.
 * ******************************************************************************************************** */

struct loop_worker {
    struct worker w;
    struct loop *loop;
    pthread_t thread;
    int fd;                         /* a clone of the session's, or that itself where it could not be cloned */
    int pipe[2];                    /* for replies by reference; -1: there is none */
};

struct loop {
    struct server *srv;
    struct loop_worker *workers;
    struct counters *counters;      /* one for each worker, in memory shared with the supervisor */
    unsigned n_workers, n_running;  /* n_running of them wait for requests; the others replace those that sleep */
    int session_fd;                 /* /dev/fuse as it was mounted; not owned */
    int end_fd;                     /* tells the supervisor that the file system is unmounted everywhere */
};

/* For SIGUSR1. The supervisor prints them, so no worker has to leave its read(2). */
static void loop_print_counters(const struct counters *counters, unsigned n, const char *name)
{
    struct counters sum = { .reads = 0 };

    for (const struct counters *c = counters; c < counters + n; c++) {
        sum.reads += c->reads;
        sum.read_bytes += c->read_bytes;
        sum.writes += c->writes;
        sum.write_bytes += c->write_bytes;
        sum.errors += c->errors;
    }
    msg_say(MSG_ERROR, "%s: %" PRIu64 " reads (%" PRIu64 " bytes), %" PRIu64 " writes (%" PRIu64 " bytes), %" PRIu64
            " errors, %u threads%s", name, sum.reads, sum.read_bytes, sum.writes, sum.write_bytes, sum.errors, n,
            counters->passthrough ? ", passthrough" : "");
}

/* Sends header and data through the worker's pipe, without copying the data. False: the pipe is empty again. */
static bool loop_send_reference(struct loop_worker *l, size_t len)
{
    const struct fuse_out_header *reply = fop_reply(&l->w);
    const struct reference *ref = &l->w.ref;

    if (write(l->pipe[1], reply, sizeof(*reply)) == sizeof(*reply) &&
        file_splice(ref->file, l->pipe[1], ref->length, ref->file_offset) &&
        splice(l->pipe[0], NULL, l->fd, NULL, len, 0) == (ssize_t)len)
        return true;
    while (read(l->pipe[0], l->w.buf + FX_HEAD_ROOM, FX_MAX_IO) > 0)
        ;
    return false;
}

static bool loop_send(struct loop_worker *l, size_t len)
{
    if (l->w.ref.length && loop_send_reference(l, len))
        return true;
    if (l->w.ref.length)
        len = fop_fetch(&l->w);
    return write(l->fd, fop_reply(&l->w), len) >= 0;
}

/*
 * What a failed read or write of /dev/fuse means: 0: go on, the request was interrupted (ENOENT: so was its caller);
 * 1: unmounted (ECONNABORTED: while a request was being read); < 0: broken.
 */
static int loop_error(const char *what)
{
    if (errno == EINTR || errno == EAGAIN || errno == ENOENT)
        return 0;
    if (errno == ENODEV || errno == ECONNABORTED)
        return 1;
    return msg_err(-errno, "%s /dev/fuse: %s", what, strerror(errno));
}

/* As loop_error(); 0 also after success. */
static int loop_once(struct loop_worker *l)
{
    ssize_t n = read(l->fd, fop_request(&l->w), FX_REQUEST_MAX);
    size_t len;
    bool sent;

    if (n < 0)
        return loop_error("reading from");
    l->w.ref.length = 0;
    epoch_enter();
    len = fop_handle(&l->w, (size_t)n);
    sent = len == 0 || loop_send(l, len);
    epoch_leave();
    return sent ? 0 : loop_error("writing to");
}

static void *loop_worker(void *arg)
{
    struct loop_worker *l = arg;
    int ret;

    do {
        if (pool_crowded()) {
            madvise(l->w.buf, FOP_BUF, MADV_DONTNEED);
            pool_park();
        }
        ret = loop_once(l);
    } while (ret == 0);
    (void)!write(l->loop->end_fd, "", 1);
    pool_close();
    return ret < 0 ? arg : NULL;    /* non-NULL: a read or write failed */
}

/* A pipe for a header and FX_SPLICE_MAX bytes of pages: any user may have that much, up to a limit. */
static void loop_open_pipe(struct loop_worker *l)
{
    if (util_fault_op("pipe") || pipe2(l->pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        l->pipe[0] = l->pipe[1] = -1;
    } else if (fcntl(l->pipe[1], F_SETPIPE_SZ, 2 * FX_SPLICE_MAX) < 0) {
        util_close(&l->pipe[0]);
        util_close(&l->pipe[1]);
    }
    l->w.sends_references = l->pipe[0] >= 0;
}

/* Buffers and descriptors for n workers. Where /dev/fuse may not be opened (mode 0600), they share the session's. */
static int loop_prepare(struct loop *loop, struct server *srv, unsigned n, int session_fd)
{
    uint32_t from = (uint32_t)session_fd;
    struct counters *counters = MAP_FAILED;
    int fd, shared = -1;

    loop->srv = srv;
    loop->session_fd = session_fd;
    loop->workers = util_fault("workers") ? NULL : calloc(n, sizeof(*loop->workers));
    if (loop->workers && !util_fault("counters"))
        counters = mmap(NULL, n * sizeof(*counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counters == MAP_FAILED)
        return msg_err(-ENOMEM, "out of memory for %u workers", n);
    loop->counters = counters;
    for (; loop->n_workers < n; loop->n_workers++) {
        struct loop_worker *l = &loop->workers[loop->n_workers];
        *l = (struct loop_worker){ .w = { .srv = srv, .count = &counters[loop->n_workers], .buf = MAP_FAILED },
                                   .loop = loop, .fd = -1, .pipe = { -1, -1 } };
        if (!util_fault("worker buffer"))
            l->w.buf = mmap(NULL, FOP_BUF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (l->w.buf == MAP_FAILED)
            return msg_err(-ENOMEM, "out of memory for %u workers", n);
        fd = shared >= 0 || util_fault("clone") ? -1 : open("/dev/fuse", O_RDWR | O_CLOEXEC);
        if (fd >= 0 && util_ioctl(fd, FX_IOC_CLONE, &from) < 0)
            util_close(&fd);
        l->fd = fd;
        if (fd < 0)
            l->fd = shared = session_fd;
        loop_open_pipe(l);
    }
    return 0;
}

/* Not the counters: the supervisor reads them until the end. */
static void loop_release(struct loop *loop)
{
    for (unsigned i = 0; i < loop->n_workers; i++) {
        struct loop_worker *l = &loop->workers[i];
        munmap(l->w.buf, FOP_BUF);
        util_close(&l->pipe[0]);
        util_close(&l->pipe[1]);
        if (l->fd != loop->session_fd)
            util_close(&l->fd);
    }
    free(loop->workers);
    loop->workers = NULL;
    loop->n_workers = 0;
}

static void loop_release_counters(struct loop *loop, unsigned n)
{
    if (loop->counters)
        munmap(loop->counters, n * sizeof(*loop->counters));
}

static void loop_fill_init(const struct server *srv, const struct fuse_init_in *in, uint64_t offered,
                           bool passthrough, struct fx_init_out *out)
{
    uint64_t want = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_ATOMIC_O_TRUNC |
                    FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_MAX_PAGES | FUSE_EXPLICIT_INVAL_DATA |
                    FUSE_INIT_EXT | (srv->direct_io || srv->writable ? FX_DIRECT_IO_ALLOW_MMAP : 0) |
                    (passthrough ? FX_PASSTHROUGH : 0);

    want &= offered;
    *out = (struct fx_init_out){
        .major = FUSE_KERNEL_VERSION,
        .minor = in->minor < 40 ? in->minor : 40,
        .max_readahead = in->max_readahead,
        .flags = (uint32_t)want,
        .flags2 = (uint32_t)(want >> 32),
        .max_background = 128,
        .congestion_threshold = 96,
        .max_write = FX_MAX_WRITE,
        .time_gran = 1,
        .max_pages = FX_MAX_IO / 4096,
        .max_stack_depth = want & FX_PASSTHROUGH ? FX_STACK_DEPTH : 0,
    };
}

/* Answers FUSE_INIT, the first request on every connection. *passthrough: wanted -> granted. */
static int loop_handshake(struct loop *loop, int fd, bool *passthrough)
{
    struct server *srv = loop->srv;
    struct fuse_in_header *head = fop_request(&loop->workers[0].w);
    struct fuse_init_in in;
    struct { struct fuse_out_header head; struct fx_init_out out; } reply;
    uint64_t offered;
    ssize_t n;

    do {                            /* a newer major sees ours in the first reply, and asks again */
        do
            n = util_fault("INIT") ? -1 : read(fd, head, FX_REQUEST_MAX);
        while (n < 0 && errno == EINTR);
        if (n < 0)
            return msg_err(-errno, "no FUSE_INIT from the kernel: %s", strerror(errno));
        memset(&in, 0, sizeof(in));
        if ((size_t)n < sizeof(*head) + 16 || head->opcode != FUSE_INIT)
            return msg_err(-EPROTO, "the kernel did not begin with FUSE_INIT");
        memcpy(&in, head + 1, util_min((size_t)n - sizeof(*head), sizeof(in)));
        if (in.major < FUSE_KERNEL_VERSION || (in.major == FUSE_KERNEL_VERSION && in.minor < FX_MIN_MINOR))
            return msg_err(-EPROTO, "this kernel speaks FUSE %u.%u; 7.%d (Linux 3.15) is the oldest that will do",
                           in.major, in.minor, FX_MIN_MINOR);
        offered = in.flags | (in.flags & FUSE_INIT_EXT ? (uint64_t)in.flags2 << 32 : 0);
        loop_fill_init(srv, &in, offered, *passthrough, &reply.out);
        reply.head = (struct fuse_out_header){ .len = sizeof(reply), .unique = head->unique };
        if (write(fd, &reply, sizeof(reply)) < 0)
            return msg_err(-errno, "cannot answer FUSE_INIT: %s", strerror(errno));
    } while (in.major != FUSE_KERNEL_VERSION);
    *passthrough = reply.out.flags2 & (uint32_t)(FX_PASSTHROUGH >> 32);
    /* Without mmap of direct handles, cached handles are the lesser evil. */
    srv->writers_direct = srv->writable && reply.out.flags2 & (uint32_t)(FX_DIRECT_IO_ALLOW_MMAP >> 32);
    return 0;
}

/* Lets the kernel serve the image, if it can: CAP_SYS_ADMIN, Linux 6.9 and a file system that supports it. */
static void loop_pass_through(struct loop *loop, int fd)
{
    struct image *im = loop->srv->im;
    struct fx_backing_map map = { .fd = file_descriptor(&im->files[0]) };
    int id = util_fault("passthrough") ? -1 : util_ioctl(fd, FX_IOC_BACKING_OPEN, &map);

    loop->counters->passthrough = id > 0;
    if (id > 0)
        loop->srv->backing_id = id;
    else
        msg_say(MSG_INFO, "%s: no passthrough: %s", im->name, strerror(errno));
}

/* The first worker runs in the calling thread. Returns when the file system is unmounted. */
static int loop_run(struct loop *loop)
{
    unsigned started = 1;
    bool broken;
    void *result;
    int ret;

    pool_start(loop->n_running, loop->n_workers);
    for (; started < loop->n_workers; started++) {
        struct loop_worker *l = &loop->workers[started];
        ret = util_fault("thread") ? EAGAIN : pthread_create(&l->thread, NULL, loop_worker, l);
        if (ret) {
            msg_say(MSG_NOTE, "only %u of %u threads could be started: %s", started, loop->n_workers, strerror(ret));
            break;
        }
    }
    pool_reduce(loop->n_workers - started);
    broken = loop_worker(&loop->workers[0]) != NULL;
    for (unsigned i = 1; i < started; i++)
        if (pthread_join(loop->workers[i].thread, &result) != 0 || result)
            broken = true;
    return broken ? -EIO : 0;
}

/* ******************************************************************************************************** *
 * 31. Sandbox
 *
 * What the server drops before its workers start: core dumps, new privileges, all capabilities, the file system
 * (Landlock) and every system call but the few that serving needs (seccomp). Open descriptors keep working, so a
 * hostile image that takes over a decoder can still show garbage to the reader, and nothing else.
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
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, 1u);
    /* An older kernel accepts the longer struct, as what it does not know is 0. */
    struct fx_landlock_ruleset rules = {
        .handled_fs = FX_LANDLOCK_FS_V1 | (abi >= 2 ? FX_LANDLOCK_REFER : 0) | (abi >= 3 ? FX_LANDLOCK_TRUNCATE : 0) |
                      (abi >= 5 ? FX_LANDLOCK_IOCTL_DEV : 0),
        .handled_net = abi >= 4 ? FX_LANDLOCK_NET : 0,
        .scoped = abi >= 6 ? FX_LANDLOCK_SCOPED : 0,
    };
    int fd, ret = 0;

    if (abi < 1)
        return abi < 0 ? -errno : -ENOSYS;
    fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0u);
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

#define BOX_LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define BOX_JUMP(op, value, yes, no) BPF_JUMP(BPF_JMP | (op) | BPF_K, (uint32_t)(value), yes, no)
#define BOX_RETURN(verdict) BPF_STMT(BPF_RET | BPF_K, verdict)
#ifndef SYS_clone3
#define SYS_clone3 435
#endif

/*
 * Allowed: I/O on open descriptors, memory without PROT_EXEC, threads, signals to ourselves, exit. Newer C libraries
 * turn pwrite(2) into pwritev2. tkill is left out: it reaches any process. All else fails with EPERM rather than
 * kills: a C library that tries something new must not cost the user the mount.
 */
static int box_seccomp(void)
{
#ifdef BOX_ARCH
    static const int allowed[] = {
        SYS_read, SYS_write, SYS_pread64, SYS_preadv2, SYS_splice, SYS_pwrite64, SYS_pwritev2, SYS_lseek, SYS_fstat,
        SYS_fallocate, SYS_ftruncate, SYS_fdatasync, SYS_fsync, SYS_close, SYS_futex, SYS_munmap, SYS_madvise,
        SYS_brk, SYS_mremap, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_exit, SYS_exit_group, SYS_clock_gettime,
        SYS_gettid, SYS_getpid, SYS_writev, SYS_set_robust_list, SYS_sched_yield, SYS_restart_syscall,
#ifdef __GLIBC__
        SYS_newfstatat,     /* fstat(3) of glibc, in builds for tests; it could ask for a path as well */
#endif
#ifdef __SANITIZE_ADDRESS__
        SYS_sched_getaffinity, SYS_sigaltstack,
#endif
#ifdef SYS_rseq
        SYS_rseq,
#endif
    };
    const struct sock_filter others[] = {   /* BOX_LOAD of an argument takes its low 32 bits */
        BOX_JUMP(BPF_JEQ, SYS_clone3, 0, 1),
        BOX_RETURN(SECCOMP_RET_ERRNO | ENOSYS),             /* the C library tries clone then */
        BOX_JUMP(BPF_JEQ, SYS_mmap, 1, 0),
        BOX_JUMP(BPF_JEQ, SYS_mprotect, 0, 4),
        BOX_LOAD(args[2]),
        BOX_JUMP(BPF_JSET, PROT_EXEC, 1, 0),
        BOX_RETURN(SECCOMP_RET_ALLOW),
        BOX_RETURN(SECCOMP_RET_ERRNO | EPERM),
        BOX_JUMP(BPF_JEQ, SYS_clone, 0, 4),
        BOX_LOAD(args[0]),
        BOX_JUMP(BPF_JSET, 0x10000 /* CLONE_THREAD */, 0, 1),
        BOX_RETURN(SECCOMP_RET_ALLOW),
        BOX_RETURN(SECCOMP_RET_ERRNO | EPERM),
        BOX_JUMP(BPF_JEQ, SYS_tgkill, 0, 3),
        BOX_LOAD(args[0]),
        BOX_JUMP(BPF_JEQ, getpid(), 0, 1),
        BOX_RETURN(SECCOMP_RET_ALLOW),
        BOX_RETURN(SECCOMP_RET_ERRNO | EPERM),
    };
    struct sock_filter code[4 + 2 * ARRAY_LEN(allowed) + ARRAY_LEN(others)] = {
        BOX_LOAD(arch),
        BOX_JUMP(BPF_JEQ, BOX_ARCH, 1, 0),
        BOX_RETURN(SECCOMP_RET_KILL_PROCESS),
        BOX_LOAD(nr),
    }, *next = code + 4;
    struct sock_fprog prog = { .len = ARRAY_LEN(code), .filter = code };

    for (size_t i = 0; i < ARRAY_LEN(allowed); i++) {
        *next++ = (struct sock_filter)BOX_JUMP(BPF_JEQ, allowed[i], 0, 1);
        *next++ = (struct sock_filter)BOX_RETURN(SECCOMP_RET_ALLOW);
    }
    memcpy(next, others, sizeof(others));
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

#ifdef PR_SET_IO_FLUSHER    /* a loop device above us must not wait for memory that only our writes can free */
    (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
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
 * 32. Options
 *
 * opt_table feeds getopt_long(3), -o (by the long names) and --help. What -o does not know goes to the mount.
 * ******************************************************************************************************** */

enum opt_allow_other { ALLOW_AUTO, ALLOW_ON, ALLOW_OFF };
enum opt_action { ACT_EXPORT, ACT_INFO, ACT_MAP, ACT_CHECK, ACT_UMOUNT, ACT_FORMATS, ACT_VERSION, ACT_HELP };
#define OPT_UNSET UINT32_MAX

struct options {
    char **images, **command, *mountpoint, *pidfile, *extra, *error_map, *overlay, *temporary, *repair;
    char *backing[MAX_GIVEN];
    unsigned n_images;
    struct image_options image;
    bool foreground, debug, single_thread, writable, share, growable, direct_io, no_passthrough, no_parts, lazy,
        verbose, quiet, json, read_only;
    bool mount_helper;              /* called by mount(8) */
    struct sigaction old_xfsz;      /* for the command: we ignore the signal, so the limit is an error for us */
    uint64_t offset, size, cache_size;
    uint32_t partition, sector_size, threads, mode, uid, gid, timeout;
    uint32_t sandbox, allow_other, action, on_error, suspect;
};

enum opt_kind {
    OPT_SET, OPT_TEXT, OPT_FILES, OPT_SIZE, OPT_SHIFT, OPT_COUNT, OPT_ID, OPT_OCTAL, OPT_CHOICE, OPT_ACTION,
    OPT_MOUNT
};

#define OPT_AT(field) offsetof(struct options, field)

static const struct opt {
    char letter;
    const char *name, *arg;         /* arg: NULL, the name of the value ("[=": optional), or the choices */
    enum opt_kind kind;
    size_t at;
    uint32_t value;                 /* OPT_ACTION: which; OPT_COUNT, OPT_ID: the largest; OPT_SIZE: not 0 */
    const char *help;
} opt_table[] = {
    { 'f', "foreground", NULL, OPT_SET, OPT_AT(foreground), 0, "stay in front" },
    { 'd', "debug", NULL, OPT_SET, OPT_AT(debug), 0, "show every request (and stay in front)" },
    { 's', "single-thread", NULL, OPT_SET, OPT_AT(single_thread), 0, "one worker" },
    { 'r', "read-only", NULL, OPT_SET, OPT_AT(read_only), 0, "change nothing (the default)" },
    { 'w', "writable", NULL, OPT_SET, OPT_AT(writable), 0, "let the export be written, and so the image" },
    { 0, "overlay", "FILE", OPT_TEXT, OPT_AT(overlay), 0,
      "like -w, but changes go to this qcow2 file (made if missing), not to IMAGE" },
    { 0, "temporary", "[=DIR]", OPT_TEXT, OPT_AT(temporary), 0, "the same with a file that is gone in the end" },
    { 'U', "force-share", NULL, OPT_SET, OPT_AT(share), 0, "read an image that another program has open" },
    { 'o', NULL, "OPT[,OPT...]", OPT_MOUNT, 0, 0, "long options without their dashes, and mount options" },
    { 'v', "verbose", NULL, OPT_SET, OPT_AT(verbose), 0, "say what is decided" },
    { 'q', "quiet", NULL, OPT_SET, OPT_AT(quiet), 0, "errors only" },
    { 0, "format", "NAME", OPT_TEXT, OPT_AT(image.format), 0, "take IMAGE for this format (see --formats)" },
    { 0, "snapshot", "ID|NAME", OPT_TEXT, OPT_AT(image.snapshot), 0, "show this internal snapshot" },
    { 0, "backing", "FILE", OPT_FILES, OPT_AT(backing), 0,
      "the backing file, instead of what the image says (several: of the chain)" },
    { 0, "backing-format", "NAME", OPT_TEXT, OPT_AT(image.backing_format), 0, "and its format" },
    { 0, "data-file", "FILE", OPT_TEXT, OPT_AT(image.data_file), 0, "the external data file" },
    { 0, "allow-external", "DIR", OPT_TEXT, OPT_AT(image.allow_external), 0,
      "images may name files below this directory" },
    { 0, "no-backing", NULL, OPT_SET, OPT_AT(image.no_backing), 0, "open no backing file; its data reads as errors" },
    { 0, "force-parent", NULL, OPT_SET, OPT_AT(image.force_parent), 0,
      "take a parent whose identity is another one" },
    { 0, "ignore-log", NULL, OPT_SET, OPT_AT(image.ignore_log), 0,
      "read a VHDX whose log cannot be replayed without it" },
    { 0, "rebuild", NULL, OPT_SET, OPT_AT(image.rebuild), 0,
      "put together a header or tables that are lost from what is left" },
    { 0, "header", "FILE", OPT_TEXT, OPT_AT(image.header), 0,
      "take the header of this image, made with the same options" },
    { 0, "on-error", "eio|zero", OPT_CHOICE, OPT_AT(on_error), 0, "what is shown where nothing can be read" },
    { 0, "suspect", "data|eio", OPT_CHOICE, OPT_AT(suspect), 0, "what is shown where a table seems to be wiped" },
    { 0, "error-map", "FILE", OPT_TEXT, OPT_AT(error_map), 0,
      "list there what could not be read (ddrescue mapfile)" },
    { 0, "mapfile", "FILE|none", OPT_TEXT, OPT_AT(image.mapfile), 0,
      "what was not read when the image was made is an error (ddrescue mapfile)" },
    { 0, "map-offset", "N[kMGT]", OPT_SHIFT, OPT_AT(image.map_offset), 0,
      "position 0 of the mapfile is this byte of the disk (may be negative)" },
    { 0, "strict", NULL, OPT_SET, OPT_AT(image.strict), 0, "refuse an image whose tables are damaged anywhere" },
    { 0, "cache-size", "N[kMGT]", OPT_SIZE, OPT_AT(cache_size), 1, "for tables and decoded clusters (64M)" },
    { 0, "no-parts", NULL, OPT_SET, OPT_AT(no_parts), 0,
      "IMAGE alone, even if it looks like a part of a split image" },
    { 0, "offset", "N[kMGT]", OPT_SIZE, OPT_AT(offset), 0, "show the image from this byte on" },
    { 0, "size", "N[kMGT]", OPT_SIZE, OPT_AT(size), 1, "and so many bytes of it" },
    { 0, "partition", "N", OPT_COUNT, OPT_AT(partition), 1024 * 1024,
      "show partition N alone, counted as Linux does" },
    { 0, "sector-size", "512|4096", OPT_COUNT, OPT_AT(sector_size), 4096, "of the partition table" },
    { 0, "growable", NULL, OPT_SET, OPT_AT(growable), 0, "with -w: writing past the end makes the image longer" },
    { 0, "direct-io", NULL, OPT_SET, OPT_AT(direct_io), 0, "no page cache above the image" },
    { 0, "no-passthrough", NULL, OPT_SET, OPT_AT(no_passthrough), 0, "serve raw images by workers too" },
    { 0, "threads", "N", OPT_COUNT, OPT_AT(threads), MAX_THREADS, "workers" },
    { 0, "mode", "OCTAL", OPT_OCTAL, OPT_AT(mode), 07777, "of the files shown (0400, with -w 0600)" },
    { 0, "uid", "N", OPT_ID, OPT_AT(uid), UINT32_MAX - 1, "their owner" },
    { 0, "gid", "N", OPT_ID, OPT_AT(gid), UINT32_MAX - 1, "their group" },
    { 0, "allow-other", "auto|on|off", OPT_CHOICE, OPT_AT(allow_other), 0, "may other users reach the mount" },
    { 0, "pidfile", "FILE", OPT_TEXT, OPT_AT(pidfile), 0, "holds the supervisor's process number while mounted" },
    { 0, "sandbox", "auto|off|require", OPT_CHOICE, OPT_AT(sandbox), 0, "lock the serving process in" },
    { 0, "info", NULL, OPT_ACTION, OPT_AT(action), ACT_INFO, "say what IMAGE is" },
    { 0, "map", NULL, OPT_ACTION, OPT_AT(action), ACT_MAP, "list what lies where" },
    { 0, "check", NULL, OPT_ACTION, OPT_AT(action), ACT_CHECK, "look for damage; changes nothing" },
    { 0, "repair", "[=leaks]", OPT_TEXT, OPT_AT(repair), 0,
      "with --check: free leaks (=leaks: also suspect ones), set refcounts right" },
    { 0, "json", NULL, OPT_SET, OPT_AT(json), 0, "with these three: for programs" },
    { 'u', "umount", NULL, OPT_ACTION, OPT_AT(action), ACT_UMOUNT, "unmount, and wait until the image is free" },
    { 'z', "lazy", NULL, OPT_SET, OPT_AT(lazy), 0, "with --umount: detach at once, do not wait" },
    { 0, "timeout", "N", OPT_COUNT, OPT_AT(timeout), 1000000, "with --umount: wait at most so many seconds" },
    { 0, "formats", NULL, OPT_ACTION, OPT_AT(action), ACT_FORMATS, "list what can be read and written" },
    { 'V', "version", NULL, OPT_ACTION, OPT_AT(action), ACT_VERSION, "say which version this is" },
    { 'h', "help", NULL, OPT_ACTION, OPT_AT(action), ACT_HELP, "show this" },
};

/* Words of fstab, and what mount(8) adds: ignored. */
static const char opt_ignored[] = "defaults|auto|noauto|nofail|user|nouser|users|owner|rw|dev|suid|relatime|norelatime|"
                                  "nodiratime|strictatime|lazytime|group|_netdev|loop";

static int opt_usage(void)
{
    printf("Usage: fuseexp [OPTION...] IMAGE... MOUNTPOINT [-- COMMAND [ARG...]]\n"
           "       fuseexp --info|--map|--check [--json] [OPTION...] IMAGE...\n"
           "       fuseexp --umount [-z | --timeout=N] MOUNTPOINT\n"
           "       fuseexp --formats | --version | --help\n\n"
           "Shows a disk image as one plain raw file (MOUNTPOINT a file, made if missing) or as a directory\n"
           "with the disk and its partitions (MOUNTPOINT a directory). Several IMAGEs are the parts of one, in "
           "order.\n\n");
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        const struct opt *opt = &opt_table[i];
        const char letter[] = { '-', opt->letter, 0 }, *arg = opt->arg ? opt->arg : "";
        const char *equals = !*arg || *arg == '[' ? "" : opt->name ? "=" : " ";
        char left[64];
        snprintf(left, sizeof(left), "%s%s%s%s%s%s", opt->letter ? letter : "    ",
                 opt->letter && opt->name ? ", " : "", opt->name ? "--" : "", opt->name ? opt->name : "", equals, arg);
        printf("  %-32s %s\n", left, opt->help);
    }
    return out_finish(EXIT_OK);
}

static int opt_bad(const struct opt *opt, const char *value)
{
    static const char *const accepted[] = {
        [OPT_SIZE] = "a usable size (such as 4096, 0x1000, 4k, 10M, 2G)", [OPT_ID] = "a usable value (a number)",
        [OPT_SHIFT] = "a usable distance (such as 1M or -32256)",
        [OPT_OCTAL] = "a usable value", [OPT_COUNT] = "a usable ", [OPT_CHOICE] = "one of "
    };
    bool shows_arg = opt->kind == OPT_CHOICE || opt->kind == OPT_COUNT;

    return msg_err(-EINVAL, "--%s: '%s' is not %s%s", opt->name, value, accepted[opt->kind], shows_arg ? opt->arg : "");
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

/* A value in brackets is optional. */
static int opt_has_value(const struct opt *opt)
{
    return !opt->arg ? no_argument : *opt->arg == '[' ? optional_argument : required_argument;
}

static int opt_mount_options(struct options *o, char *list);

static char opt_none[] = "";

static int opt_apply(struct options *o, const struct opt *opt, char *value)
{
    void *at = (char *)o + opt->at;
    uint32_t *number = at;
    uint64_t size = 0;
    bool good = true;
    char *end;

    if (!value)                     /* it has none, or needs none */
        value = opt_none;
    switch (opt->kind) {
    case OPT_SET:
        *(bool *)at = true;
        break;
    case OPT_TEXT:
        *(const char **)at = value;
        break;
    case OPT_FILES:
        if (o->image.n_backing == MAX_GIVEN)
            return msg_err(-E2BIG, "--%s: more than %d files", opt->name, MAX_GIVEN);
        ((char **)at)[o->image.n_backing++] = value;
        break;
    case OPT_SIZE:
        good = util_parse_size(value, &size) && (size || !opt->value);
        *(uint64_t *)at = size;
        break;
    case OPT_SHIFT:
        good = util_parse_size(value + (*value == '-'), &size);
        *(int64_t *)at = *value == '-' ? -(int64_t)size : (int64_t)size;
        break;
    case OPT_COUNT:
    case OPT_ID:
        good = util_parse_size(value, &size) && size <= opt->value && (size || opt->kind == OPT_ID) &&
               isdigit((unsigned char)value[strlen(value) - 1]);
        *number = (uint32_t)size;
        break;
    case OPT_OCTAL:
        size = strtoul(value, &end, 8);
        good = isdigit((unsigned char)*value) && !*end && size <= opt->value;
        *number = (uint32_t)size;
        break;
    case OPT_CHOICE:
        good = opt_choose(opt->arg, value, number);
        break;
    case OPT_ACTION:
        if (opt->value < ACT_VERSION && *number && *number != opt->value)
            return msg_err(-EINVAL, "--%s: one of --info, --map, --check, --umount and --formats at a time", opt->name);
        *number = opt->value;
        break;
    case OPT_MOUNT:
        return opt_mount_options(o, value);
    }
    return good ? 0 : opt_bad(opt, value);
}

/*
 * Handles one word of -o: our option, fstab's, or the mount's. mount(8) and mount.fuse3 add "rw,dev,suid" by
 * themselves, so "rw" must not make anything writable.
 */
static int opt_mount_option(struct options *o, char *word)
{
    char *value = strchr(word, '=');
    uint32_t any;

    if (strcmp(word, "ro") == 0) {
        o->read_only = true;
        return 0;
    }
    if (strcmp(word, "allow_other") == 0) {
        o->allow_other = ALLOW_ON;
        return 0;
    }
    if (opt_choose(opt_ignored, word, &any) || strncmp(word, "x-", 2) == 0 || strncmp(word, "X-", 2) == 0 ||
        strncmp(word, "comment=", 8) == 0)
        return 0;
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        const struct opt *opt = &opt_table[i];
        size_t len = value ? (size_t)(value - word) : strlen(word);
        if (!opt->name || opt->kind == OPT_ACTION || strlen(opt->name) != len || strncmp(opt->name, word, len) != 0)
            continue;
        if (opt_has_value(opt) != optional_argument && !opt->arg != !value)
            return msg_err(-EINVAL, "-o %s: %s", word, value ? "takes no value" : "needs a value");
        return opt_apply(o, opt, value ? value + 1 : NULL);
    }
    return fuse_opt_add_opt(&o->extra, word) == 0 ? 0 : msg_err(-ENOMEM, "out of memory");
}

static int opt_mount_options(struct options *o, char *list)
{
    int ret = 0;

    for (char *save, *word = strtok_r(list, ",", &save); word && !ret; word = strtok_r(NULL, ",", &save))
        ret = opt_mount_option(o, word);
    return ret;
}

/* After an unknown option: in "fuseexp IMAGE MOUNTPOINT fsck -n" the "--" is missing. */
static const char *opt_hint(int argc, char **argv)
{
    int words = 0;

    for (int i = 1; i < argc; i++)
        words += *argv[i] != '-';
    return words < 3 ? "fuseexp --help lists them" : "fuseexp --help lists them; a COMMAND comes after --";
}

/* getopt_long's tables from ours. Returns 0, or < 0 after saying what is wrong. */
static int opt_getopt(struct options *o, int argc, char **argv)
{
    struct option longs[ARRAY_LEN(opt_table) + 1];
    char shorts[2 * ARRAY_LEN(opt_table) + 2] = ":";
    size_t n = 0, at = 1;
    const char *hint = opt_hint(argc, argv);
    int c, ret = 0;

    memset(longs, 0, sizeof(longs));
    for (size_t i = 0; i < ARRAY_LEN(opt_table); i++) {
        if (opt_table[i].name)
            longs[n++] = (struct option){ opt_table[i].name, opt_has_value(&opt_table[i]), NULL, 256 + (int)i };
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
            return msg_err(-EINVAL, "unknown option -%c (%s)", optopt, hint);
        if (c == '?')
            return msg_err(-EINVAL, "unknown option %s (%s)", argv[optind - 1], hint);
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
    static const struct option none[] = { { NULL, 0, NULL, 0 } };
    int c, ret = 0;

    o->mount_helper = true;
    opterr = 0;
    /* Not getopt(): musl's stops at the first argument that is no option. */
    while (!ret && (c = getopt_long(argc, argv, "sfnvrN:t:o:", none, NULL)) != -1) {
        if (c == 'o')
            ret = opt_mount_options(o, optarg);
        else if (c == 'r')
            o->read_only = true;
        else if (c == 'v')
            o->verbose = true;
        else if (c == 'f')
            o->action = ACT_VERSION;    /* a fake mount: succeeds without doing anything */
        else if (c == '?')
            return msg_err(-EINVAL, "unknown option -%c", optopt);
    }
    return ret;
}

/* Refuses mount options with a command that only looks: the user meant something else. */
static int opt_check_look(const struct options *o)
{
    const char *lost = o->overlay     ? "--overlay"
                       : o->temporary ? "--temporary"
                       : o->writable  ? "-w"
                       : o->offset    ? "--offset"
                       : o->size      ? "--size"
                       : o->partition ? "--partition"
                       : o->pidfile   ? "--pidfile"
                       : o->command   ? "-- COMMAND"
                                      : NULL;

    return lost ? msg_err(-EINVAL, "%s is for mounting: --info, --map and --check look at the whole image", lost) : 0;
}

static bool opt_looks(const struct options *o)
{
    return o->action >= ACT_INFO && o->action <= ACT_CHECK;
}

static int opt_check(const struct options *o)
{
    bool overlaid = o->overlay || o->temporary, guessed = o->image.rebuild || o->image.header;
    bool mapped = o->image.mapfile && strcmp(o->image.mapfile, "none") != 0;
    const struct { bool wrong; const char *why; } rules[] = {
        { o->overlay && o->temporary, "--overlay and --temporary: one or the other" },
        { o->writable && o->on_error && !overlaid, "--on-error=zero with -w: zeros shown for what is damaged would "
          "become the image's own; --overlay or --temporary keep it as it is" },
        { mapped && o->writable && !overlaid,
          "--mapfile is for reading: what was not read stays so; --overlay or --temporary take changes" },
        { mapped && o->repair, "--mapfile is for reading: --repair changes the image" },
        { o->writable && o->suspect && !overlaid,
          "--suspect=eio is for reading; --overlay or --temporary take changes" },
        { o->share && o->suspect, "--suspect=eio is not for an image that is in use" },
        { o->repair && *o->repair && strcmp(o->repair, "leaks") != 0, "--repair has no value, or it is leaks" },
        { o->repair && o->action != ACT_CHECK, "--repair goes with --check" },
        { o->repair && o->share, "--repair is not for an image that is in use" },
        { o->json && !opt_looks(o), "--json goes with --info, --map or --check" },
        { o->lazy && o->action != ACT_UMOUNT, "-z goes with --umount" },
        { o->timeout && o->action != ACT_UMOUNT, "--timeout goes with --umount" },
        { o->growable && !o->writable, "--growable goes with -w, --overlay or --temporary" },
        { o->growable && (o->offset || o->size || o->partition),
          "--growable goes with a whole image, not with --offset, --size or --partition" },
        { guessed && o->writable && !overlaid,
          "--rebuild and --header are for reading; --overlay or --temporary take changes" },
        { guessed && o->repair, "--rebuild and --header are for reading: --repair would write what is guessed" },
        { o->share && o->writable, "-U is for reading: two writers would destroy the image" },
        { o->sector_size && o->sector_size != 512 && o->sector_size != 4096, "--sector-size is 512 or 4096" },
    };

    for (size_t i = 0; i < ARRAY_LEN(rules); i++)
        if (rules[i].wrong)
            return msg_err(-EINVAL, "%s", rules[i].why);
    if ((o->mode & 0222) && !o->writable)
        return msg_err(-EINVAL, "--mode %o on a read-only export: add -w", o->mode);
    return opt_looks(o) ? opt_check_look(o) : 0;
}

/* What an option says by its absence, or together with others. */
static void opt_complete(struct options *o)
{
    o->writable = (o->writable || o->overlay || o->temporary) && !o->read_only;
    o->foreground |= o->debug;
    if (o->single_thread)
        o->threads = 1;
    if (o->mode == OPT_UNSET)
        o->mode = o->writable ? 0600 : 0400;
    o->image.backing = o->backing;
    o->image.parts = !o->no_parts;
    o->image.lock = !o->share;
    o->image.zero_errors = o->on_error;
    o->image.suspect_errors = o->suspect;
    o->image.free_suspects = o->repair && *o->repair;
    o->image.top_only = o->action == ACT_INFO || o->action == ACT_CHECK;
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
    if (end < argc && n == 0 && o->action <= ACT_UMOUNT) {
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
    opt_complete(o);
    ret = opt_check(o);
    if (ret)
        return ret;
    if (o->action == ACT_EXPORT && n < 2)
        return msg_err(-EINVAL, "%susage: fuseexp [OPTION...] IMAGE... MOUNTPOINT [-- COMMAND] (--help explains)",
                       n ? "MOUNTPOINT is missing; " : "");
    if (opt_looks(o) && n < 1)
        return msg_err(-EINVAL, "--info, --map and --check take an IMAGE");
    o->images = &argv[optind];
    if (!opt_looks(o))
        o->mountpoint = o->images[--n];
    if (n > MAX_PARTS)
        return msg_err(-EINVAL, "more than %d parts", MAX_PARTS);
    o->n_images = (unsigned)n;
    if (o->temporary && !*o->temporary && n > 1 && file_is_directory(o->images[0]))     /* lacks its "=" */
        return msg_err(-EINVAL, "%s: is a directory and no image; --temporary=%s makes the overlay there", o->images[0],
                       o->images[0]);
    return 0;
}

/*
 * The exit status of a usage error, judged by the words alone: with --check 2 means corruptions, and COMMAND may
 * return 2 as well. "--" begins COMMAND, unless only options come before it.
 */
static int opt_error_status(int argc, char **argv)
{
    bool looks = false, words = false;

    for (int i = 1; i < argc; i++) {
        looks |= strlen(argv[i]) > strlen("--c") && strncmp("--check", argv[i], strlen(argv[i])) == 0;
        if (strcmp(argv[i], "--") == 0 && words)
            return looks ? EXIT_FAILED : argv[i + 1] ? EXIT_CMD_NOT_STARTED : EXIT_USAGE;
        words |= *argv[i] != '-' || strcmp(argv[i], "--") == 0;
    }
    return looks ? EXIT_FAILED : EXIT_USAGE;
}

/* ******************************************************************************************************** *
 * 33. Mounts
 *
 * The mount table is read, never the mountpoint itself: once mounted, touching it could wait for our own server. Root
 * mounts through libfuse; everyone else through fusermount3, whose output is kept for our one line.
 * ******************************************************************************************************** */

/* A file that we created: removed only while its path leads to that file. */
struct mnt_made {
    char path[PATH_MAX];            /* absolute, as the working directory changes; "": nothing was created */
    dev_t dev;
    ino_t ino;
};

struct mountpoint {
    char path[PATH_MAX];            /* absolute, no symbolic links */
    bool is_dir, exists, mounted;
    struct mnt_made made;           /* the file at path, if we or a start that was killed created it */
    uint64_t id;                    /* of the mount, see mnt_identity() */
    unsigned minor;                 /* of the mounted file system: the number of its FUSE connection */
    struct fuse_session *session;   /* libfuse's: owns session_fd until the server is forked */
    int session_fd;
    int lock_fd;                    /* see mnt_lock() */
};

struct mount_entry {
    char path[PATH_MAX];
    uint64_t id;                    /* see mnt_identity() */
    unsigned major, minor;
    bool covered;                   /* by another mount on top of it */
    uid_t owner;                    /* who mounted it */
    bool fuseexp;
};

/* Output of libfuse and fusermount3, for our message instead of stderr. */
static char mnt_said[400];

__attribute__((format(printf, 2, 0))) static void mnt_log(enum fuse_log_level level, const char *fmt,
                                                          va_list ap)
{
    size_t at = strlen(mnt_said);

    (void)level;
    vsnprintf(mnt_said + at, sizeof(mnt_said) - at, fmt, ap);
}

/* Why mounting or unmounting failed: the last line of it, without the prefix "fuse: " or "fusermount3: ", or ret. */
static const char *mnt_why(int ret)
{
    size_t len = strlen(mnt_said);
    char *line, *colon;

    if (!len)
        return strerror(-ret);
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
    rest = entry->fuseexp ? strchr(rest + 16, ' ') : NULL; /* after the source, which may hold any text */
    user = rest ? strstr(rest, "user_id=") : NULL;
    entry->owner = user ? (uid_t)strtoul(user + 8, NULL, 10) : 0;
    return true;
}

/* The unique id of the topmost mount at path; 0: the kernel has none. */
static uint64_t mnt_ask_identity(const char *path)
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
 * Unique mount id (Linux 6.8, statx): minors and the ids of mountinfo are reused at once. Such a kernel answers from
 * its cache, without asking the server. An older one might ask our server before it has answered INIT, so another
 * path is used to find out which kernel this is.
 */
static uint64_t mnt_identity(const char *path)
{
    static int known = -1;

    if (known < 0)
        known = mnt_ask_identity("/proc/self/mountinfo") != 0;
    return known ? mnt_ask_identity(path) : 0;
}

/* Reads the next entry of a mount table. A line has no length limit. */
static bool mnt_next(FILE *table, struct mount_entry *entry)
{
    char *line = NULL;
    size_t size = 0;
    bool found = false;

    while (!found && getline(&line, &size, table) > 0)
        found = mnt_parse_line(line, entry);
    free(line);
    return found;
}

/*
 * Finds the topmost mount at path; or, with path NULL, the mount with this minor and id wherever it was moved to.
 * covered: another mount lies on top of it. 1: found, 0: not found.
 */
static int mnt_find(const char *path, unsigned minor, uint64_t id, struct mount_entry *entry)
{
    FILE *table = fopen("/proc/self/mountinfo", "re");
    char hidden[PATH_MAX] = "";
    struct mount_entry e;
    int found = 0;

    memset(entry, 0, sizeof(*entry));
    if (!table)
        return msg_err(-EIO, "/proc/self/mountinfo: %s (is /proc mounted?)", strerror(errno));
    while (mnt_next(table, &e)) {
        if (path ? strcmp(e.path, path) == 0 : e.fuseexp && e.major == 0 && e.minor == minor) {
            e.id = mnt_identity(e.path);
            if (!path && id && e.id != id) {    /* ours but hidden, or a new mount with our old minor */
                util_copy(hidden, sizeof(hidden), e.path);
                continue;
            }
            *entry = e;
            found = 1;
        } else if (!path && strcmp(e.path, found ? entry->path : hidden) == 0) {
            entry->covered = true;
        }
    }
    fclose(table);
    return found;
}

static int mnt_run_fusermount(const char *const argv[], int comm_fd);

/* flags: 0 or MNT_DETACH. -EBUSY when somebody uses it. */
static int mnt_unmount(const char *path, int flags)
{
    const char *argv[] = { "fusermount3", flags ? "-uz" : "-u", "--", path, NULL };

    if (umount2(path, flags | UMOUNT_NOFOLLOW) == 0)
        return 0;
    if (errno != EPERM)
        return -errno;
    return mnt_run_fusermount(argv, -1) == 0 ? 0 : strstr(mnt_said, "busy") ? -EBUSY : -EPERM;
}

/*
 * Prefix of the names of a mount's control sockets. Root may not ask for the id of a mount that is private to a user;
 * then the minor must do.
 */
static void mnt_control_prefix(uint64_t id, unsigned minor, char text[48])
{
    if (id)
        snprintf(text, 48, "fuseexp:%u:%" PRIu64 ":", minor, id);
    else
        snprintf(text, 48, "fuseexp:%u:", minor);
}

/* Connects to the socket of that name if the mount's owner holds it; else -1. */
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
static size_t mnt_find_servers(const struct mount_entry *entry, struct pollfd *fds, size_t max)
{
    FILE *table = fopen("/proc/net/unix", "re");
    char line[512], want[50] = "@", *name;
    size_t n = 0;
    int fd;

    mnt_control_prefix(entry->id, entry->minor, want + 1);
    while (table && n < max && fgets(line, sizeof(line), table)) {
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
 * Reserves the path until its mount and control socket can be seen, so that of two starts at once one is refused. The
 * name of an abstract socket is the lock: it goes with its process. Other errors than EADDRINUSE do without.
 */
static int mnt_lock(struct mountpoint *mp)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    uint64_t hash = UTIL_HASH_START;
    struct stat ns = { .st_ino = 0 };

    (void)stat("/proc/self/ns/mnt", &ns);
    util_hash(&hash, mp->path);
    snprintf(addr.sun_path + 1, sizeof(addr.sun_path) - 1, "fuseexp-start:%ju:%" PRIx64, (uintmax_t)ns.st_ino, hash);
    mp->lock_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(mp->lock_fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 && errno == EADDRINUSE)
        return msg_err(-EBUSY, "%s: fuseexp is mounted there already, or about to be", mp->path);
    return 0;
}

/* Detaches a mount whose server died; refuses to mount over one that is alive. Never waits for a server that hangs. */
static int mnt_clear_stale(const char *path)
{
    struct mount_entry entry;
    struct statfs fs;
    int ret = mnt_find(path, 0, 0, &entry);

    if (ret <= 0)
        return ret;
    if (!entry.fuseexp)
        return msg_err(-EBUSY, "%s: something else is mounted there", path);
    if (mnt_find_servers(&entry, NULL, 1) || statfs(path, &fs) == 0 || (errno != ENOTCONN && errno != ECONNABORTED))
        return msg_err(-EBUSY, "%s: fuseexp is mounted there already; fuseexp --umount ends it", path);
    ret = mnt_unmount(path, MNT_DETACH);
    if (ret)
        return msg_err(ret, "%s: cannot detach the dead mount there: %s", path, strerror(-ret));
    msg_say(MSG_NOTE, "%s: detached a mount whose server had died", path);
    return 0;
}

/* Makes the path absolute. Its directory must exist; the last component is not resolved. */
static int mnt_resolve_directory(const char *arg, char path[PATH_MAX])
{
    char directory[PATH_MAX], parent[PATH_MAX], *base;

    if (!util_copy(directory, sizeof(directory), arg) || !*util_basename(arg))
        return msg_err(-EINVAL, "%s: not a usable path", arg);
    base = strrchr(directory, '/');
    if (base)
        *base = 0;
    if (!realpath(!base ? "." : base == directory ? "/" : directory, parent))
        return msg_err(-errno, "%s: the directory it should be in: %s", arg, strerror(errno));
    if (snprintf(path, PATH_MAX, "%s%s%s", parent, parent[1] ? "/" : "", util_basename(arg)) >= PATH_MAX)
        return msg_err(-ENAMETOOLONG, "%s: path too long", arg);
    return 0;
}

/* Makes a mountpoint's path absolute and free of links. It need not exist (yet). */
static int mnt_resolve(const char *arg, char path[PATH_MAX])
{
    int fd = open(arg, O_PATH | O_CLOEXEC);     /* obeys fs.protected_symlinks, unlike realpath() */

    if (fd < 0 && errno == EACCES)
        return msg_err(-errno, "%s: %s", arg, strerror(errno));
    util_close(&fd);
    if (realpath(arg, path))
        return 0;
    if (errno == ENOENT && *arg && arg[strlen(arg) - 1] == '/')
        return msg_err(-ENOENT, "%s: No such directory (mkdir makes it)", arg);
    if (errno != ENOENT || !*arg)
        return msg_err(-errno, "%s: %s", arg, strerror(errno));
    return mnt_resolve_directory(arg, path);
}

/*
 * If MOUNTPOINT is forgotten ("fuseexp ev.*"), the last argument is a part, or another image, which the mount would
 * hide. So a file with contents is accepted only if it is IMAGE itself, and an empty one only if it is no part.
 */
static int mnt_check_file(const char *path, const struct stat *st, char *const *images, unsigned n)
{
    struct stat image;
    bool is_first = false, is_part = n > 1 && raw_same_set(images[0], path);

    for (unsigned i = 0; i < n; i++)
        if (stat(images[i], &image) == 0 && image.st_dev == st->st_dev && image.st_ino == st->st_ino) {
            is_first |= i == 0;
            is_part |= i > 0;
        }
    if (is_part || (st->st_size && !is_first))
        return msg_err(-EEXIST, "%s: is %s, and MOUNTPOINT, the last argument, is a new name, an empty file, a "
                       "directory, or IMAGE itself", path,
                       is_part ? "a part of the image" : "a file with something in it");
    return 0;
}

/* Attribute of a mountpoint that we created, so that the next start removes one that a killed start left. */
#define MNT_MARK "user.fuseexp.mountpoint"

/* Was it created by mnt_create(), and is it still empty? */
static bool mnt_is_marked(const char *path)
{
    struct stat st;

    return lstat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == 0 && st.st_nlink == 1 &&
           lgetxattr(path, MNT_MARK, NULL, 0) >= 0;
}

static void mnt_note_made(struct mnt_made *made, const char *path)
{
    struct stat st;

    if (!realpath(path, made->path) || stat(made->path, &st) < 0) {
        *made->path = 0;
        return;
    }
    made->dev = st.st_dev;
    made->ino = st.st_ino;
}

static void mnt_remove_made(const struct mnt_made *made)
{
    struct stat st;

    if (*made->path && lstat(made->path, &st) == 0 && st.st_dev == made->dev && st.st_ino == made->ino)
        unlink(made->path);
}

/* Can the path be MOUNTPOINT? Called before anything is opened or created; creates nothing. */
static int mnt_check(struct mountpoint *mp, char *const *images, unsigned n)
{
    struct stat st;

    if (stat(mp->path, &st) < 0) {
        if (errno != ENOENT || lstat(mp->path, &st) < 0)
            return errno == ENOENT ? 0 : msg_err(-errno, "%s: %s", mp->path, strerror(errno));
        return msg_err(-ENOENT, "%s: is a symbolic link that leads nowhere; remove it, or make the file that it names",
                       mp->path);
    }
    mp->exists = true;
    mp->is_dir = S_ISDIR(st.st_mode);
    if (!mp->is_dir && !S_ISREG(st.st_mode))
        return msg_err(-ENOTDIR, "%s: neither a regular file nor a directory, so nothing can be mounted there",
                       mp->path);
    if (!mp->is_dir && mnt_check_file(mp->path, &st, images, n))
        return -EEXIST;
    if (mnt_is_marked(mp->path))
        mnt_note_made(&mp->made, mp->path);
    return 0;
}

/* Creates the mountpoint if it did not exist. O_EXCL: one that appeared since then is somebody else's. */
static int mnt_create(struct mountpoint *mp)
{
    int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, fd;

    if (mp->exists)
        return 0;
    fd = util_fault("mountpoint") ? -1 : open(mp->path, flags, 0600);
    if (fd < 0)
        return msg_err(-errno, "%s: cannot be created: %s", mp->path, strerror(errno));
    mnt_note_made(&mp->made, mp->path);
    (void)fsetxattr(fd, MNT_MARK, "", 0, 0);    /* optional: without it the file stays after a kill */
    close(fd);
    return 0;
}

/* Removes the file that mnt_create() made, if it is still that file, empty, and nothing is mounted on it. */
static void mnt_remove(struct mountpoint *mp)
{
    struct mount_entry entry;
    struct stat st;

    if (*mp->made.path && mnt_find(mp->path, 0, 0, &entry) == 0 && lstat(mp->path, &st) == 0 && st.st_size == 0)
        mnt_remove_made(&mp->made);
}

/* The same after an unmount, if the process that created it was killed. */
static void mnt_remove_orphan(const char *path)
{
    struct mount_entry entry;

    if (mnt_find(path, 0, 0, &entry) == 0 && mnt_is_marked(path))
        unlink(path);
}

/* Runs fusermount3 and keeps its output in mnt_said. comm_fd: the socket on which it sends /dev/fuse, or -1. */
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
        dprintf(STDERR_FILENO, "fuse: cannot run fusermount3: %s (Debian: apt-get install fuse3), and only root does "
                "without\n", strerror(errno));
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

/* Receives the descriptor of /dev/fuse from fusermount3. */
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

/* libfuse 3.14 does not fall back to fusermount3 if only root may open /dev/fuse, so call it here. */
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

/* May this process mount? Root in a container may not; fusermount3 then reports why. */
static bool mnt_privileged(void)
{
    struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct caps[2];

    return syscall(SYS_capget, &head, caps) == 0 && (caps[0].effective & 1u << CAP_SYS_ADMIN);
}

/* Tries to mount with these options. libfuse parses and checks them in both cases. */
static int mnt_try(struct mountpoint *mp, char *opts)
{
    static const struct fuse_lowlevel_ops none;
    char name[] = "fuseexp", dash_o[] = "-o", *argv[] = { name, dash_o, opts };
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    char by_fd[32];
    int ret;

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
    bad |= fuse_opt_add_opt(&opts, "subtype=fuseexp,nosuid,nodev,noatime,default_permissions," FX_MAX_READ_OPTION);
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
    struct mount_entry entry;
    bool again = false;
    char *opts;
    int ret = -EIO;

    fuse_set_log_func(mnt_log);
    if (access("/dev/fuse", F_OK) < 0)
        return msg_err(-errno, "/dev/fuse: %s (modprobe fuse)", strerror(errno));
    do {
        if (again)
            *want->allow_other = false;
        opts = mnt_options(want);
        if (!opts)
            return msg_err(-ENOMEM, "%s: out of memory", mp->path);
        ret = mnt_try(mp, opts);
        free(opts);
        if (ret)
            mnt_end_session(mp);
        again = ret && *want->allow_other && want->may_drop_allow_other && !mnt_privileged();
    } while (again);
    if (ret)
        return msg_err(ret, "%s: cannot mount: %s%s", mp->path, mnt_why(ret), access("/dev/fuse", R_OK | W_OK) < 0 ?
                       " (it takes chmod 666 /dev/fuse, as udev does)" : "");

    ret = util_fault("mount table") ? -EIO : mnt_find(mp->path, 0, 0, &entry);
    if (ret != 1)
        return msg_err(ret ? ret : -EIO, "%s: mounted, but the mount table does not show it", mp->path);
    mp->minor = entry.minor;
    mp->id = entry.id;
    return 0;
}

/* Where our mount is now, even if it was moved. False: nowhere, or (covered) hidden. */
static bool mnt_where(const struct mountpoint *mp, struct mount_entry *where)
{
    int found;

    memset(where, 0, sizeof(*where));
    if (!mp->mounted)
        return false;
    found = mp->minor ? mnt_find(NULL, mp->minor, mp->id, where) : mnt_find(mp->path, 0, 0, where);
    return found == 1 && !where->covered;
}

/* The users of a mount, for messages: the first few of them. */
struct mount_users {
    char text[500];
    unsigned n;
};

__attribute__((format(printf, 2, 3))) static void mnt_add_user(struct mount_users *users, const char *fmt, ...)
{
    size_t at = strlen(users->text);
    va_list ap;

    if (users->n++ > 4)
        return;
    if (at)
        at += (size_t)snprintf(users->text + at, sizeof(users->text) - at, ", ");
    va_start(ap, fmt);
    if (users->n > 4)
        util_copy(users->text + at, sizeof(users->text) - at, "and others");
    else if (vsnprintf(users->text + at, 110, fmt, ap) < 0)
        users->text[at] = 0;
    va_end(ap);
}

static bool mnt_is_below(const char *path, const char *mount)
{
    size_t len = strlen(mount);

    return strncmp(path, mount, len) == 0 && (!path[len] || path[len] == '/');
}

/* The next name in a directory that does not begin with a dot; NULL: none is left, and the directory is closed. */
static const char *mnt_next_name(DIR **dir)
{
    struct dirent *e;

    while (*dir && (e = readdir(*dir)))
        if (*e->d_name != '.')
            return e->d_name;
    if (*dir)
        closedir(*dir);
    *dir = NULL;
    return NULL;
}

/* The number of the next process in /proc. */
static const char *mnt_next_process(DIR **proc)
{
    const char *name;

    do
        name = mnt_next_name(proc);
    while (name && !isdigit((unsigned char)*name));
    return name;
}

/* Adds what is stacked on a block device, such as a LUKS mapping. sysfs: its directory there. */
static void mnt_add_holders(struct mount_users *users, const char *sysfs)
{
    char path[PATH_MAX], mapping[128];
    const char *name;

    snprintf(path, sizeof(path), "%s/holders", sysfs);
    for (DIR *dir = opendir(path); (name = mnt_next_name(&dir));) {
        snprintf(path, sizeof(path), "/sys/block/%s/dm/name", name);
        if (util_read_file(path, mapping, sizeof(mapping)) == 0)
            mnt_add_user(users, "/dev/mapper/%s", mapping);
        else
            mnt_add_user(users, "/dev/%s", name);
    }
}

/* Adds a loop device, and what is stacked on it and on its partitions. */
static void mnt_add_loop(struct mount_users *users, const char *loop)
{
    char path[PATH_MAX];
    const char *name;

    mnt_add_user(users, "/dev/%s", loop);
    snprintf(path, sizeof(path), "/sys/block/%s", loop);
    mnt_add_holders(users, path);
    for (DIR *dir = opendir(path); (name = mnt_next_name(&dir));)
        if (strncmp(name, loop, strlen(loop)) == 0) {
            snprintf(path, sizeof(path), "/sys/block/%s/%s", loop, name);
            mnt_add_holders(users, path);
        }
}

/* Adds loop devices on the mount. path: the mountpoint; NULL: the mount is detached, so ask each loop device. */
static void mnt_add_loops(struct mount_users *users, const char *path, unsigned minor)
{
    struct file_loop loop = { .dev = 0 };
    DIR *dir = opendir("/sys/block");

    while (file_next_loop(dir, &loop))
        if (path ? mnt_is_below(loop.path, path) : file_ask_loop(&loop) && loop.dev == makedev(0, minor))
            mnt_add_loop(users, loop.name);
    if (dir)
        closedir(dir);
}

/* Does a link, or a link in a directory such as /proc/N/fd, lead below the mount? */
static bool mnt_leads_below(const char *link, const char *mount)
{
    char path[PATH_MAX], to[PATH_MAX];
    ssize_t n = readlink(link, to, sizeof(to) - 1);
    DIR *dir = n < 0 && errno == EINVAL ? opendir(link) : NULL;
    const char *name;
    bool found;

    to[n < 0 ? 0 : n] = 0;
    found = mnt_is_below(to, mount);
    while ((name = mnt_next_name(&dir))) {
        snprintf(path, sizeof(path), "%s/%s", link, name);
        found = found || mnt_leads_below(path, mount);
    }
    return found;
}

/* Does the process have a file below the mount open or mapped, or as its working or root directory? */
static bool mnt_is_used_by(const char *process, const char *mount)
{
    static const char *const links[] = { "cwd", "root", "exe", "fd", "map_files" };
    char name[64];
    bool found = false;

    for (size_t i = 0; i < ARRAY_LEN(links) && !found; i++) {
        snprintf(name, sizeof(name), "/proc/%.20s/%s", process, links[i]);
        found = mnt_leads_below(name, mount);
    }
    return found;
}

static void mnt_add_processes(struct mount_users *users, const char *path)
{
    char name[64], comm[32];
    const char *process;

    for (DIR *proc = opendir("/proc"); (process = mnt_next_process(&proc));) {
        if (!mnt_is_used_by(process, path))
            continue;
        snprintf(name, sizeof(name), "/proc/%.20s/comm", process);
        (void)util_read_file(name, comm, sizeof(comm));
        mnt_add_user(users, "process %s (%s)", process, comm);
    }
}

/* Adds where the file system is mounted in the namespace of a process; NULL: in ours. */
static void mnt_add_mountpoints(struct mount_users *users, const char *process, unsigned minor)
{
    struct mount_entry e;
    char name[64];
    FILE *table;

    snprintf(name, sizeof(name), "/proc/%.20s/mountinfo", process ? process : "self");
    table = fopen(name, "re");
    while (table && mnt_next(table, &e))
        if (e.fuseexp && e.major == 0 && e.minor == minor)
            mnt_add_user(users, "the mount %s%s%s", e.path, process ? " of process " : "", process ? process : "");
    if (table)
        fclose(table);
}

/* Adds bind mounts, and copies in other namespaces as far as they are visible to us. */
static void mnt_add_mounts(struct mount_users *users, unsigned minor)
{
    ino_t seen[64];
    char path[64];
    const char *process;
    struct stat st;
    unsigned n = 0, i;

    mnt_add_mountpoints(users, NULL, minor);
    if (stat("/proc/self/ns/mnt", &st) < 0)
        return;
    seen[n++] = st.st_ino;
    for (DIR *proc = opendir("/proc"); (process = mnt_next_process(&proc));) {
        snprintf(path, sizeof(path), "/proc/%.20s/ns/mnt", process);
        if (n == ARRAY_LEN(seen) || stat(path, &st) < 0)
            continue;
        for (i = 0; i < n && seen[i] != st.st_ino; i++)
            ;
        if (i < n)
            continue;
        seen[n++] = st.st_ino;
        mnt_add_mountpoints(users, process, minor);
    }
}

/* Is the file system still mounted anywhere, even where it is not visible? */
static bool mnt_is_alive(unsigned minor)
{
    char path[64];

    snprintf(path, sizeof(path), "/sys/class/bdi/0:%u", minor);
    return access(path, F_OK) == 0;
}

/*
 * Aborts the connection: all requests fail at once. Only while the mount is visible, as its minor is reused later.
 * Needs fusectl; the caller has other means, too.
 */
static void mnt_abort(const struct mountpoint *mp)
{
    struct mount_entry where;
    char path[64];

    snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", mp->minor);
    if (mnt_where(mp, &where))
        (void)util_write_file(path, "1");
}

/* The kernel's default of 128 KiB is too little for a server in user space; 1 MiB is two of our READs. */
static void mnt_raise_readahead(const struct mountpoint *mp, unsigned kib)
{
    char path[64], text[16];

    snprintf(path, sizeof(path), "/sys/class/bdi/0:%u/read_ahead_kb", mp->minor);
    snprintf(text, sizeof(text), "%u", kib);
    if (util_write_file(path, text) < 0)
        msg_say(MSG_INFO, "%s: cannot raise the read-ahead: %s", path, strerror(errno));
}

/* ******************************************************************************************************** *
 * 34. Life cycle
 *
 * run_export() acquires what an export needs one by one and releases it in reverse order, whichever step fails. The
 * supervisor is one thread around run_poll(); the server is forked when everything is mounted and open, and from then
 * on it alone has the image and /dev/fuse: when it dies, however it dies, the connection is cut, and the supervisor
 * detaches the mount. OFD locks and the connection would outlive the server if the supervisor kept copies.
 *
 * Control socket: an abstract UNIX socket "fuseexp:<minor>:<identity of the mount>:<pid>". A process that waits for the
 * end connects, and reads one byte, the exit status, when everything is over (or just EOF, if we were killed).
 * ******************************************************************************************************** */

struct run {
    const struct options *o;
    struct image_options overlay_options;
    struct image im;
    char overlay_path[PATH_MAX];
    struct mnt_made made_overlay, made_error_map;   /* removed if the start fails */
    struct view views[MAX_VIEWS];
    unsigned n_views;
    struct server srv;
    struct loop loop;
    struct mountpoint mp;
    char source[PATH_MAX];          /* the image, as the mount table shows it */
    char pidfile[PATH_MAX];         /* absolute */
    sigset_t old_mask;              /* to give the command the signal state that we started with */
    struct sigaction old_pipe, old_chld;
    struct rlimit old_files;        /* the command gets them back */
    int shell_fd;                   /* to the process that the user started; -1 in the foreground */
    int sig_fd, ctl_fd, ready_fd, log_fd;
    pid_t server, command;          /* 0: not running (any more) */
    int server_status, command_status;
    bool ready, not_ready, started; /* started: ready and announced */
    bool ended;                     /* the server is unmounted everywhere, and only has to flush */
    bool cut_off;                   /* by the second signal */
    bool in_use, left;              /* after the command: the disk is in use; the server is left running */
    char log_text[4096];            /* from log_fd: a line that is not complete yet */
    size_t log_len;
    int waiters[MAX_WAITERS];       /* connected to ctl_fd */
    unsigned n_waiters;
    unsigned stop_signals;          /* INT, TERM, HUP so far */
};

/* Passes on lines of the server, which has no stderr of its own: to stderr, or in the background to syslog. */
static void run_relay_log(struct run *r)
{
    size_t max = sizeof(r->log_text) - 1 - r->log_len;
    ssize_t n = r->log_fd < 0 ? 0 : read(r->log_fd, r->log_text + r->log_len, max);
    char *line = r->log_text, *end;

    if (n == 0)
        util_close(&r->log_fd);
    r->log_len += n > 0 ? (size_t)n : 0;
    r->log_text[r->log_len] = 0;
    while (*line) {
        end = strchr(line, '\n');
        if (!end && n != 0 && (line != r->log_text || r->log_len < sizeof(r->log_text) - 1))
            break;                  /* the rest of it follows */
        if (end)
            *end = 0;
        msg_err(0, "%s", line + (strncmp(line, "fuseexp: ", 9) == 0 ? 9 : 0));
        line = end ? end + 1 : line + strlen(line);
    }
    r->log_len -= (size_t)(line - r->log_text);
    memmove(r->log_text, line, r->log_len);
}

/* Accepts connections of those who wait for the end, and drops those that were closed. */
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
    if (r->ctl_fd < 0)
        return;
    while ((fd = accept4(r->ctl_fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        if (r->n_waiters < MAX_WAITERS)
            r->waiters[r->n_waiters++] = fd;
        else
            close(fd);
    }
    if (fd < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
        util_close(&r->ctl_fd);     /* connections that nobody accepts would keep poll(2) busy */
}

static void run_reap(pid_t *pid, int *status)
{
    if (*pid > 0 && waitpid(*pid, status, WNOHANG) == *pid)
        *pid = 0;
}

/* Passes on to the command a signal that came from kill(1); a terminal signals the whole process group by itself. */
static void run_on_signal(struct run *r, const struct signalfd_siginfo *si)
{
    switch (si->ssi_signo) {
    case SIGCHLD:
        run_reap(&r->server, &r->server_status);
        run_reap(&r->command, &r->command_status);
        break;
    case SIGUSR1:
        if (r->loop.counters)
            loop_print_counters(r->loop.counters, r->o->threads, r->o->images[0]);
        break;
    default:
        if (r->command > 0 && si->ssi_code <= 0)
            kill(r->command, (int)si->ssi_signo);
        if (r->command == 0)
            r->stop_signals++;
    }
}

/* Handles the next event, or returns after timeout milliseconds (-1: waits without limit). */
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
    if (fds[1].revents) {           /* a byte when it is ready, another one at the end */
        bool told = read(r->ready_fd, &byte, 1) == 1;
        r->ended = r->ready;
        r->not_ready = !r->ready && !told;
        r->ready |= told;
        if (r->ended || !told)
            util_close(&r->ready_fd);
    }
    if (fds[0].revents && read(r->sig_fd, &si, sizeof(si)) == sizeof(si))
        run_on_signal(r, &si);
}

static void run_dispose(int sig, void (*handler)(int), struct sigaction *old)
{
    struct sigaction act = { .sa_handler = handler };

    sigaction(sig, &act, old);
}

/* The first RUN_SIGNALS of them are read from sig_fd. The others are only blocked: they would end us for no reason. */
static const int run_signals[] = { SIGINT,  SIGTERM, SIGHUP,    SIGQUIT, SIGUSR1,
                                   SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF };
enum { RUN_SIGNALS = 5 };

static int run_block_signals(struct run *r)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    for (size_t i = 0; i < RUN_SIGNALS; i++)
        sigaddset(&set, run_signals[i]);
    sigprocmask(SIG_BLOCK, &set, &r->old_mask);
    r->sig_fd = util_fault("signals") ? -1 : signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (r->sig_fd < 0)
        return msg_err(-errno, "signalfd: %s", strerror(errno));
    for (size_t i = RUN_SIGNALS; i < ARRAY_LEN(run_signals); i++)
        sigaddset(&set, run_signals[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    run_dispose(SIGPIPE, SIG_IGN, &r->old_pipe);
    run_dispose(SIGCHLD, SIG_DFL, &r->old_chld);    /* if it were ignored, wait(2) would lose the exit statuses */
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
    r->ctl_fd = util_fault("control socket") ? -1 : socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return r->ctl_fd < 0 ? msg_err(-errno, "control socket: %s", strerror(errno)) : 0;
}

/* Optional: without a name --umount cannot wait for us. */
static void run_name_control(struct run *r)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    char prefix[48];
    int len;

    mnt_control_prefix(r->mp.id, r->mp.minor, prefix);
    len = snprintf(addr.sun_path + 1, sizeof(addr.sun_path) - 1, "%s%d", prefix, (int)getpid());
    if (bind(r->ctl_fd, (struct sockaddr *)&addr,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) < 0 ||
        util_fault_op("listen") || listen(r->ctl_fd, MAX_WAITERS) < 0) {
        msg_say(MSG_INFO, "control socket: %s", strerror(errno));
        util_close(&r->ctl_fd);     /* else poll(2) would return at once each time */
    }
}

/* Sends the exit status to everyone who waits. The sockets are closed when this process exits. */
static void run_close_control(struct run *r, int status)
{
    char byte = (char)status;

    run_accept_waiters(r);
    while (r->n_waiters)
        (void)!send(r->waiters[--r->n_waiters], &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    util_close(&r->ctl_fd);
}

static int run_check_strict(struct run *r)
{
    for (unsigned i = 0; i < r->n_views; i++)
        if (r->views[i].inside < r->views[i].size)
            return msg_err(-EIO, "%s: damaged (--strict): %s reaches past the end of the disk", r->im.name,
                           r->views[i].name);
    return chain_check_strict(&r->im);
}

/* Directory of a temporary overlay: not a file system in memory, if there is another. */
static void run_temporary_path(const struct options *o, char path[PATH_MAX])
{
    const char *directory = *o->temporary ? o->temporary : getenv("TMPDIR");

    if (!directory || !*directory)
        directory = access("/var/tmp", W_OK) == 0 ? "/var/tmp" : "/tmp";
    snprintf(path, PATH_MAX, "%s/(temporary overlay)", directory);
}

static int run_open_overlay(struct run *r)
{
    const struct options *o = r->o;
    struct image *base;
    int ret;

    if (o->overlay && !util_copy(r->overlay_path, sizeof(r->overlay_path), o->overlay))
        return msg_err(-ENAMETOOLONG, "%s: path too long", o->overlay);
    if (o->temporary)
        run_temporary_path(o, r->overlay_path);
    base = util_fault("overlay") ? NULL : calloc(1, sizeof(*base));
    if (!base)
        return msg_err(-ENOMEM, "out of memory");
    r->overlay_options = (struct image_options){ .lock = o->image.lock, .zero_errors = o->image.zero_errors,
                                                 .no_backing = o->image.no_backing, .strict = o->image.strict,
                                                 .suspect_errors = o->image.suspect_errors };
    ret = chain_open(base, o->images, o->n_images, &o->image);
    for (unsigned i = 0; o->overlay && i < base->n_files && !ret; i++)
        if (file_is_at(&base->files[i], o->overlay))
            ret = msg_err(-EINVAL, "%s: is both IMAGE and --overlay, which takes the changes to IMAGE in another file",
                          o->overlay);
    if (!ret)
        ret = overlay_open(&r->im, base, r->overlay_path, o->temporary, &r->overlay_options);
    if (ret && !r->im.backing) {
        chain_close(base);
        free(base);
    }
    return ret;
}

static int run_open_image(struct run *r)
{
    const struct options *o = r->o;
    struct part_wanted want = {
        .offset = o->offset, .size = o->size, .partition = o->partition, .sector = o->sector_size
    };
    int ret;

    if (!realpath(o->images[0], r->source) || strlen(r->source) >= 1024)
        util_copy(r->source, sizeof(r->source), util_basename(o->images[0]));
    r->im.writable = o->writable;
    r->im.growable = o->growable;
    ret = cache_start(o->cache_size);
    if (!ret)
        ret = o->overlay || o->temporary ? run_open_overlay(r)
                                         : chain_open(&r->im, o->images, o->n_images, &o->image);
    if (r->im.made)
        mnt_note_made(&r->made_overlay, r->overlay_path);
    if (ret)
        return ret;
    want.all = r->mp.is_dir && !o->partition;
    ret = part_make_views(&r->im, &want, r->views, &r->n_views);
    return ret || !o->image.strict ? ret : run_check_strict(r);
}

/*
 * The error map counts offsets from the start of what is shown: the disk, the window or the partition. In a directory
 * its map is that of the disk, extended to partitions that reach past its end.
 */
static int run_start_error_map(struct run *r)
{
    uint64_t start = r->views[0].start, end = 0;
    int ret;

    if (!r->o->error_map)
        return 0;
    for (unsigned i = 0; i < r->n_views; i++)
        if (r->views[i].start + r->views[i].size > end)
            end = r->views[i].start + r->views[i].size;
    ret = lost_start(r->o->error_map, start, end - start);
    if (!ret)
        mnt_note_made(&r->made_error_map, r->o->error_map);
    return ret;
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
    srv->writable = r->im.writable;
    srv->growable = o->growable && r->im.writable;
    srv->resizable = r->im.writable && whole && r->im.format->resize;
    /* Each file has its own page cache, which a write through another file would not update. */
    srv->direct_io = o->direct_io || (r->im.writable && r->n_views > 1);
    srv->keep_cache = !o->share && !r->im.writable;
    srv->debug = o->debug;
    r->loop.n_running = cpus < 2 ? 2 : (unsigned)cpus;
    srv->attr_valid = r->im.writable || o->share ? 1 : 3600;
    srv->uid = o->uid;
    srv->gid = o->gid;
    srv->mode = o->mode & (r->im.writable ? 07777u : ~0222u);
}

/*
 * May the kernel serve the file alone? Only a whole raw file, and not one that is written but must not grow: the
 * kernel would not ask us before a write past its end.
 */
static bool run_may_pass_through(const struct run *r)
{
    const struct server *srv = &r->srv;

    return !r->o->no_passthrough && !r->o->share && !r->o->on_error && !r->o->error_map && !srv->direct_io &&
           r->im.format->plain && !r->im.unread && r->im.n_files == 1 && !r->im.files[0].is_blk &&
           srv->views[0].start == 0 && srv->views[0].size == r->im.size &&
           (!srv->writable || (srv->growable && srv->resizable));
}

static int run_mount(struct run *r)
{
    struct mount_wanted want = {
        .source = r->source, .extra = r->o->extra, .writable = r->im.writable, .allow_other = &r->srv.allow_other,
        .may_drop_allow_other = r->o->allow_other == ALLOW_AUTO
    };
    int ret;

    r->srv.allow_other = r->o->allow_other != ALLOW_OFF;
    ret = mnt_mount(&r->mp, &want);
    if (!ret && (r->srv.mode & 077) && !r->srv.allow_other)
        ret = msg_err(-EPERM, "--mode %o is of no use without --allow-other=on: nobody else reaches the mount",
                      r->srv.mode);
    return ret;
}

/* Opens what the sandbox would forbid, enters it, and checks that serving still works. */
static int run_enter_sandbox(struct run *r)
{
    int ret;

    chain_open_direct(&r->im);
    ret = box_enter(r->o->sandbox);
    for (struct image *im = &r->im; im && !ret; im = im->backing)
        ret = file_test(&im->files[0]);
    return ret;
}

/* The server's whole life, in the child. Returns its exit status. */
static int run_server(struct run *r, int ready_fd)
{
    bool pass = run_may_pass_through(r);
    int fd = r->mp.session_fd, ret;

    for (size_t i = 0; i < ARRAY_LEN(run_signals); i++)
        signal(run_signals[i], SIG_IGN);        /* the supervisor handles them and unmounts, which ends the server */
    signal(SIGCHLD, SIG_DFL);
    (void)setsid();                 /* out of reach of the terminal's signals and Ctrl-Z */
    (void)!chdir("/");
    sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
    util_close(&r->sig_fd);
    util_close(&r->shell_fd);
    util_close_inherited();

    ret = loop_handshake(&r->loop, fd, &pass);
    if (!ret && pass)
        loop_pass_through(&r->loop, fd);
    if (!ret)
        mnt_raise_readahead(&r->mp, 1024);
    if (!ret)
        ret = run_enter_sandbox(r);
    if (!ret && (util_fault("ready") || write(ready_fd, "", 1) != 1))
        ret = msg_err(-EIO, "cannot tell the supervisor that all is ready");
    if (ret)
        return EXIT_FAILED;
    r->loop.end_fd = ready_fd;
    ret = loop_run(&r->loop);
    file_tell_bad(NULL);
    if (!lost_finish())
        ret = -EIO;
    if (img_sync(&r->im, true) || r->im.failed)
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

/* Releases what only the server may hold from now on. */
static void run_let_go(struct run *r)
{
    loop_release(&r->loop);
    mnt_end_session(&r->mp);
    chain_close(&r->im);
    decoded_stop();
    cache_stop();
    lost_stop();
}

static int run_fork_server(struct run *r)
{
    int ready[2] = { -1, -1 }, log[2] = { -1, -1 };

    if (util_fault("ready pipe") || pipe2(ready, O_CLOEXEC) < 0)
        return msg_err(-errno, "pipe: %s", strerror(errno));
    r->ready_fd = ready[0];
    if ((r->shell_fd >= 0 || r->o->command) && (util_fault("log pipe") || pipe2(log, O_CLOEXEC) < 0)) {
        close(ready[1]);
        return msg_err(-errno, "pipe: %s", strerror(errno));
    }
    r->log_fd = log[0];
    r->server = util_fault("fork") ? -1 : fork();
    if (r->server == 0) {
        close(ready[0]);
        if (log[1] >= 0) {
            run_null_stdio(STDIN_FILENO, STDOUT_FILENO);
            fcntl(log[1], F_SETFL, O_NONBLOCK);     /* a stopped supervisor must not block us */
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
    /* Ready and in the foreground: the signal ends the disk like any later one. */
    if (r->stop_signals && !(r->ready && r->shell_fd < 0 && !r->o->command))
        return msg_err(-EINTR, "interrupted before the mount was ready");
    return r->ready ? 0 : -EIO;     /* the server has said why */
}

/* Follows no link and writes only to a regular file: others may write to the directory of the pidfile. */
static int run_write_pidfile(struct run *r)
{
    int flags = O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, fd, ret = 0;
    struct stat st;

    if (!r->o->pidfile)
        return 0;
    fd = util_fault("pidfile") ? -1 : open(r->pidfile, flags, 0644);
    if (fd < 0)
        return msg_err(-errno, "%s: %s", r->pidfile, strerror(errno));
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        ret = msg_err(-EINVAL, "%s: not a regular file", r->pidfile);
    } else if (ftruncate(fd, 0) < 0 || dprintf(fd, "%d\n", (int)getpid()) < 0) {
        ret = msg_err(-errno, "%s: %s", r->pidfile, strerror(errno));
        unlink(r->pidfile);
    }
    close(fd);
    return ret;
}

/* Only while it holds our number: another instance may have replaced it. */
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

/* Leaves the caller's terminal and directory; messages go to syslog from now on. */
static void run_enter_background(void)
{
    (void)setsid();
    (void)!chdir("/");
    if (access("/dev/log", W_OK) < 0)
        msg_kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    openlog("fuseexp", LOG_PID, LOG_DAEMON);
    msg_to_syslog = true;
    run_null_stdio(STDIN_FILENO, STDERR_FILENO);
}

/* Reports readiness. In the background the caller's process returns 0 now. */
static int run_announce(struct run *r)
{
    if (r->shell_fd < 0) {
        run_notify("READY=1");
        return 0;
    }
    if (util_fault("announce"))
        return msg_err(-errno, "%s: cannot be announced: %s", r->mp.path, strerror(errno));
    if (write(r->shell_fd, "", 1) != 1)
        return msg_err(-EPIPE, "%s: whoever asked for it has gone, unmounting", r->mp.path);
    util_close(&r->shell_fd);
    run_notify("READY=1");
    run_enter_background();
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
        sigaction(SIGPIPE, &r->old_pipe, NULL);
        sigaction(SIGCHLD, &r->old_chld, NULL);
        sigaction(SIGXFSZ, &r->o->old_xfsz, NULL);
        (void)setrlimit(RLIMIT_NOFILE, &r->old_files);
        sigprocmask(SIG_SETMASK, &r->old_mask, NULL);
        execvp(r->o->command[0], r->o->command);
        msg_err(0, "%s: %s%s", r->o->command[0], strerror(errno),
                strchr(r->o->command[0], ' ') ? " (after --, the command and its arguments are separate words)" : "");
        _exit(errno == ENOENT ? EXIT_CMD_NOT_FOUND : EXIT_CMD_NOT_EXECUTABLE);
    }
    r->command = pid;
    return 0;
}

/* Names the users of the disk. path: the mountpoint, by which they are found; NULL: it is detached already. */
static void run_say_in_use(const struct run *r, const char *path)
{
    struct mount_users users = { "", 0 };

    mnt_add_loops(&users, path, r->mp.minor);
    if (path)
        mnt_add_processes(&users, path);
    else
        mnt_add_mounts(&users, r->mp.minor);
    if (r->o->command)
        msg_err(0, "%s: the command has ended, but the disk is still in use%s%s: %sserved until its last user goes; "
                "not all that was written may have reached the image", path ? path : r->mp.path, users.n ? " by " : "",
                users.text, path ? "detached, and " : "");
    else
        msg_say(MSG_NOTE, "%s: in use, detached; it ends with its last user%s%s (another signal cuts it off now)", path,
                users.n ? ": " : "", users.text);
}

/* The last chance to unmount, so it retries when fork fails. False: it is still mounted, which was reported. */
static bool run_detach(struct run *r)
{
    struct mount_entry where;
    int ret = 0;

    for (int tries = 0; tries < 10 && mnt_where(&r->mp, &where); tries++) {
        ret = mnt_unmount(where.path, MNT_DETACH);
        if (!ret)
            return true;
        poll(NULL, 0, 50);
    }
    if (ret && mnt_where(&r->mp, &where))
        return !msg_err(ret, "%s: cannot unmount: %s", where.path, mnt_why(ret));
    return true;
}

/* Unmounts; waits up to patience milliseconds for users to finish (udev probes every new loop device). */
static bool run_unmount(struct run *r, int patience)
{
    int64_t until = util_now() + patience;
    struct mount_entry where;
    int ret;

    while (r->server > 0 && mnt_where(&r->mp, &where)) {
        ret = mnt_unmount(where.path, 0);
        if (!ret)
            return true;
        if (ret != -EBUSY || util_now() >= until) {
            r->in_use = ret == -EBUSY;
            if (r->in_use)
                run_say_in_use(r, where.path);
            return run_detach(r);
        }
        run_poll(r, 20);
    }
    if (r->server > 0 && where.covered)
        return !msg_err(-EBUSY, "%s: something is mounted over it, which must go first", r->mp.path);
    return true;
}

/* The second signal: ends the server without waiting for users. */
static void run_cut_off(struct run *r)
{
    mnt_abort(&r->mp);
    kill(r->server, SIGKILL);
    r->cut_off = r->ended = true;
}

static void run_release_mount(struct run *r)
{
    run_detach(r);
    r->mp.mounted = false;
    mnt_end_session(&r->mp);
}

static void run_report_death(const struct run *r)
{
    int sig = WTERMSIG(r->server_status);

    if (r->server || !WIFSIGNALED(r->server_status))
        return;
    if (sig == SIGKILL && r->cut_off)
        msg_err(0, "%s: cut off at the second signal: what was written and not synced may be lost", r->mp.path);
    else
        msg_err(0, "%s: the server was killed by signal %d (%s); the mount is gone", r->mp.path, sig, strsignal(sig));
}

enum { RUN_PATIENCE = 2000 };      /* milliseconds that users of the disk have to finish after the command */

/*
 * The command has ended, and we have tried to unmount. The disk may still be in use: by a loop device, a mapping, a
 * background process, a mount elsewhere. Waiting for it could hang a script, and ending the server would lose writes,
 * so the server is left running and ends with its last user.
 */
static void run_wait_for_users(struct run *r, int64_t until)
{
    if (r->ended) {
        run_poll(r, -1);            /* while it flushes */
    } else if (!r->in_use && util_now() < until) {
        run_poll(r, 20);
    } else {
        r->left = true;
        if (!r->in_use)             /* else it was reported already */
            run_say_in_use(r, NULL);
    }
}

/* Runs until the server has ended, whatever unmounted it: we, umount(8), fusermount3, the OOM killer. */
static void run_supervise(struct run *r)
{
    unsigned handled = 0;           /* run_wait_ready() may leave one pending */
    bool unmounted = false;
    int64_t until = 0;

    while (r->server > 0 && !r->left) {
        bool stop = r->stop_signals > handled, command_ended = r->o->command && r->command == 0;
        handled = r->stop_signals;
        if (stop && unmounted) {
            run_cut_off(r);
        } else if (!unmounted && (stop || command_ended)) {
            unmounted = run_unmount(r, command_ended ? RUN_PATIENCE : 0);
            r->in_use |= command_ended && !unmounted;
            until = util_now() + RUN_PATIENCE;
        }
        if (r->server > 0 && r->stop_signals == handled && command_ended)
            run_wait_for_users(r, until);
        else if (r->server > 0 && r->stop_signals == handled)
            run_poll(r, -1);
    }
    if (r->left)
        return;
    run_report_death(r);
    run_release_mount(r);
    while (r->command > 0) /* the disk is gone, but the command's status is needed */
        run_poll(r, -1);
}

/* Leaves the server running without us. A child relays its messages to syslog until it ends. */
static void run_leave_server(struct run *r)
{
    if (!util_fault("keeper") && fork() == 0) {
        util_close(&r->sig_fd);
        util_close(&r->ready_fd);
        util_close(&r->ctl_fd);
        while (r->n_waiters)
            close(r->waiters[--r->n_waiters]);
        run_enter_background();
        util_close_inherited();
        while (r->log_fd >= 0)
            run_relay_log(r);
        _exit(EXIT_OK);
    }
    util_close(&r->log_fd);
    r->server = 0;
}

/*
 * Ends the server after a failure. If it was ready, a program may have opened the file already: aborts the
 * connection, so that the server flushes and ends as after an unmount.
 */
static void run_stop_server(struct run *r)
{
    while (r->log_fd >= 0 && r->server > 0 && r->not_ready)
        run_relay_log(r); /* its last messages: it is exiting */
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

/* The exit status, after the server (and the command) have ended. */
static int run_status(const struct run *r)
{
    bool good = !r->left && WIFEXITED(r->server_status) && WEXITSTATUS(r->server_status) == EXIT_OK;

    if (!r->o->command)
        return good ? EXIT_OK : EXIT_FAILED;
    if (WIFSIGNALED(r->command_status))
        return 128 + WTERMSIG(r->command_status);
    return WEXITSTATUS(r->command_status) == 0 && !good ? EXIT_CMD_NOT_STARTED
                                                        : WEXITSTATUS(r->command_status);
}

/* Resolves and checks MOUNTPOINT and the pidfile, before anything is opened or created. */
static int run_resolve_paths(struct run *r)
{
    const struct options *o = r->o;
    int ret = mnt_resolve(o->mountpoint, r->mp.path);

    if (!ret)
        ret = mnt_lock(&r->mp);
    if (!ret)
        ret = mnt_clear_stale(r->mp.path);
    if (!ret)
        ret = mnt_check(&r->mp, o->images, o->n_images);
    if (!ret && o->pidfile)
        ret = mnt_resolve_directory(o->pidfile, r->pidfile);
    if (!ret && strcmp(r->pidfile, r->mp.path) == 0)
        ret = msg_err(-EINVAL, "%s: is both MOUNTPOINT and --pidfile", r->pidfile);
    return ret;
}

/*
 * Serves until unmounted. shell_fd: where to report readiness, or -1. Returns the exit status.
 *
 * The clean-up chain: what is acquired in this order, and the label that releases it before all that is above it here.
 *   1. signals           blocked, read through sig_fd           out_signals
 *   2. control socket    closed with the exit status            out_control
 *      lock              of the mountpoint, only during the start
 *   3. images, cache     a failed start removes its overlay     out_image
 *   4. error map         a failed start removes it              out_error_map
 *   5. mountpoint        removed if we created it               out_mountpoint
 *   6. mount             detached                               out_mount
 *   7. workers           buffers and descriptors                out_workers
 *   8. server            flushes and exits, or is left running  out_server
 *   9. pidfile           removed                                out_pidfile
 * From the fork (8) on the server alone holds the image and /dev/fuse: run_let_go() closes our copies, so that 3 and
 * 7 release memory only. A mount that a user moved or covered is found by its unique id.
 */
static int run_export(const struct options *o, int shell_fd)
{
    int status = o->command ? EXIT_CMD_NOT_STARTED : EXIT_FAILED;
    struct run *r = calloc(1, sizeof(*r));

    if (!r) {
        msg_err(0, "out of memory");
        goto out;
    }
    *r = (struct run){ .o = o, .shell_fd = shell_fd, .sig_fd = -1, .ctl_fd = -1, .ready_fd = -1, .log_fd = -1,
                       .mp = { .session_fd = -1, .lock_fd = -1 } };

    if (run_block_signals(r))
        goto out_signals;
    run_raise_file_limit(r);
    if (run_make_control(r) || run_resolve_paths(r))
        goto out_control;
    if (run_open_image(r))
        goto out_image;
    if (run_start_error_map(r))
        goto out_error_map;
    if (shell_fd >= 0)
        util_close_inherited();     /* not earlier: IMAGE may be /dev/fd/9 */
    run_setup_server(r);
    if (mnt_create(&r->mp))
        goto out_mountpoint;
    if (run_mount(r))
        goto out_mount;
    run_name_control(r);
    util_close(&r->mp.lock_fd);
    if (loop_prepare(&r->loop, &r->srv, o->threads, r->mp.session_fd))
        goto out_workers;
    if (run_fork_server(r))
        goto out_server;
    run_let_go(r);
    if (run_wait_ready(r) || run_write_pidfile(r))
        goto out_server;
    if (run_start_command(r) || run_announce(r))
        goto out_pidfile;
    r->started = true;
    run_supervise(r);
    status = run_status(r);

out_pidfile:
    run_remove_pidfile(r);
out_server:
    if (r->left)
        run_leave_server(r);
    else
        run_stop_server(r);
    util_close(&r->ready_fd);
out_workers:
    loop_release(&r->loop);
    loop_release_counters(&r->loop, o->threads);
out_mount:
    run_release_mount(r);
out_mountpoint:
    mnt_remove(&r->mp);
out_error_map:
    if (!r->started)
        mnt_remove_made(&r->made_error_map);
    lost_stop();
out_image:
    if (!r->started)
        mnt_remove_made(&r->made_overlay);
    chain_close(&r->im);
    decoded_stop();
    cache_stop();
out_control:
    util_close(&r->mp.lock_fd);
    run_close_control(r, status);
out_signals:
    util_close(&r->sig_fd);
    util_close(&r->shell_fd);
    free(r);                        /* signals stay blocked: a pending one must not become the exit status */
out:
    return status;
}

/*
 * Forks into the background. The child returns 0 with *shell_fd, to report readiness to. The process that the user
 * started returns 1, with its exit status, once the child is ready or has failed.
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
 * 35. One-shot commands
 * ******************************************************************************************************** */

enum { CMD_TIMEOUT = 5, CMD_SAY_AFTER = 2 };    /* seconds */

/*
 * Waits for a server's exit status. While it only flushes there is no time limit unless the user sets one; while it
 * is in use elsewhere (bind mounts, other namespaces) there is. False: the time is over, which was reported.
 */
static bool cmd_wait_for_server(const struct options *o, unsigned minor, struct pollfd *fd, int64_t start)
{
    unsigned seconds = o->timeout ? o->timeout : CMD_TIMEOUT;
    bool said = false, late = false, alive;
    struct mount_users users;
    const char *why;
    int64_t passed;

    while (poll(fd, 1, late ? 1000 : 100) <= 0) {
        passed = util_now() - start;
        late = passed >= seconds * 1000ll;
        if (!late && (said || passed < CMD_SAY_AFTER * 1000ll))
            continue;
        users = (struct mount_users){ "", 0 };
        mnt_add_mounts(&users, minor);
        alive = users.n || mnt_is_alive(minor);
        why = users.n ? "the server still serves " : alive ? "the disk is still in use" : "the server is writing";
        if (late && (alive || o->timeout)) {
            msg_err(0, "%s: unmounted here, but its server has not ended in %u seconds: %s%s; --timeout=N waits longer",
                    o->mountpoint, seconds, why, users.text);
            return false;
        }
        if (!said)
            msg_say(MSG_NOTE, "%s: unmounted here; waiting, as %s%s", o->mountpoint, why, users.text);
        said = true;
    }
    return true;
}

/* Waits until each server of the mount and its supervisor have ended. */
static int cmd_wait_for_servers(const struct options *o, const struct mount_entry *entry, struct pollfd *fds, size_t n)
{
    int64_t start = util_now();
    int status = EXIT_OK;
    char byte, end;

    for (size_t i = 0; i < n; i++) {
        if (!cmd_wait_for_server(o, entry->minor, &fds[i], start)) {
            status = EXIT_FAILED;
            close(fds[i].fd);
            continue;
        }
        if (read(fds[i].fd, &byte, 1) != 1) {
            msg_err(0, "%s: its supervisor was killed, so nobody knows how it ended", o->mountpoint);
            mnt_remove_orphan(entry->path);
            status = EXIT_FAILED;
        } else if (byte != EXIT_OK) {
            msg_err(0, "%s: unmounted, but it reported failure %d (see syslog or dmesg)", o->mountpoint, byte);
            status = EXIT_FAILED;
        }
        while (read(fds[i].fd, &end, 1) < 0 && errno == EINTR)
            ;
        close(fds[i].fd);
    }
    return status;
}

static void cmd_say_not_unmounted(const struct options *o, const struct mount_entry *entry, int ret)
{
    struct mount_users users = { "", 0 };

    if (ret == -EBUSY) {
        mnt_add_loops(&users, entry->path, entry->minor);
        mnt_add_processes(&users, entry->path);
        msg_err(ret, "%s: in use%s%s (-z detaches it now)", o->mountpoint, users.n ? " by " : "", users.text);
    } else if (ret == -EPERM && entry->owner != getuid()) {
        msg_err(ret, "%s: was mounted by the user with number %u, who can unmount it, and so can root", o->mountpoint,
                (unsigned)entry->owner);
    } else {
        msg_err(ret, "%s: %s", o->mountpoint, mnt_why(ret));
    }
}

static int cmd_umount(const struct options *o)
{
    struct pollfd fds[MAX_WAITERS];
    struct mount_entry entry;
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
    if (!entry.fuseexp)
        return msg_err(EXIT_FAILED, "%s: fuseexp has nothing mounted there", o->mountpoint);
    n = mnt_find_servers(&entry, fds, MAX_WAITERS);
    unseen = n == 0 && statfs(path, &fs) == 0;
    ret = mnt_unmount(path, o->lazy ? MNT_DETACH : 0);
    for (int tries = 0; ret == -EBUSY && tries < 50; tries++) {     /* udev looks at every new loop device */
        poll(NULL, 0, 20);
        ret = mnt_unmount(path, 0);
    }
    if (ret)
        cmd_say_not_unmounted(o, &entry, ret);
    else if (!o->lazy && unseen)
        ret = msg_err(-ESRCH, "%s: unmounted, but its server cannot be waited for (it is not in this network "
                      "namespace)", o->mountpoint);
    else if (!o->lazy)
        return cmd_wait_for_servers(o, &entry, fds, n);
    while (n)
        close(fds[--n].fd);
    return ret ? EXIT_FAILED : EXIT_OK;
}

/*
 * Opens the image for --info, --map and --check and enters the sandbox: the image may be hostile, and nothing more is
 * opened. Prints nothing to stdout before that has succeeded.
 */
static int cmd_look(const struct options *o, int (*look)(struct image *im, bool json))
{
    struct image im = { .writable = o->repair != NULL };
    int status = EXIT_FAILED;

    out_progress.on = o->action == ACT_CHECK && !o->quiet && isatty(STDERR_FILENO);
    if (cache_start(o->cache_size) == 0 && chain_open(&im, o->images, o->n_images, &o->image) == 0 &&
        chain_open_direct(&im) == 0 && box_enter(o->sandbox) == 0)
        status = out_finish(look(&im, o->json));
    chain_close(&im);
    decoded_stop();
    cache_stop();
    return status;
}

/* A relative name of a backing file is relative to the image that records it. */
static void cmd_info_backing(const struct image *im, struct out *out)
{
    const char *slash = strrchr(im->files[0].path, '/');
    char full[PATH_MAX + sizeof(im->backing_name)], uuid[37];
    bool relative = im->backing_name[0] != '/' && !fmt_is_url(im->backing_name) && slash;

    snprintf(full, sizeof(full), "%.*s%s", relative ? (int)(slash - im->files[0].path + 1) : 0, im->files[0].path,
             im->backing_name);
    out_text(out, "backing-filename", im->backing_name);
    out_text(out, "full-backing-filename", full);
    if (*im->backing_format)
        out_text(out, "backing-filename-format", im->backing_format);
    if (chain_knows_parent(im))
        out_text(out, "backing-identity", chain_parent_text(im, uuid));
}

static int cmd_info(struct image *im, bool json)
{
    struct out out = { .json = json };
    uint64_t blocks = 0;
    int ret = 0;

    for (unsigned i = 0; i < (im->format->data_file ? 1 : im->n_files); i++)
        blocks += (uint64_t)im->files[i].st.st_blocks;     /* like QEMU, without an external data file */
    out_open(&out, NULL, '{', false);
    out_text(&out, "filename", im->name);
    out_text(&out, "format", im->format->name);
    out_size(&out, "virtual-size", im->size);
    out_size(&out, "actual-size", blocks * 512);
    if (im->cluster_size)
        out_size(&out, "cluster-size", im->cluster_size);
    if (im->encrypted)
        out_flag(&out, "encrypted", true);
    out_flag(&out, "dirty-flag", im->dirty);
    if (im->n_files > 1 && !im->format->data_file)
        out_number(&out, "files", im->n_files);
    if (im->unread) {
        out_text(&out, "mapfile", im->unread->path);
        out_size(&out, "not-read", im->unread->bytes);
    }
    if (*im->backing_name)
        cmd_info_backing(im, &out);
    if (im->format->snapshots)
        ret = im->format->snapshots(im, &out);
    if (im->format->info) {
        out_open(&out, "format-specific", '{', false);
        out_text(&out, "type", im->format->name);
        out_open(&out, "data", '{', false);
        im->format->info(im, &out);
        out_close(&out);
        out_close(&out);
    }
    out_close(&out);
    return ret ? EXIT_FAILED : EXIT_OK;
}

/* Does `next` continue `ext` by the rules of qemu-img map? */
static bool cmd_map_continues(const struct extent *ext, const struct extent *next)
{
    if (ext->kind != next->kind || ext->depth != next->depth)
        return false;
    if (ext->kind == EXT_BAD)
        return strcmp(ext->why, next->why) == 0;
    if (ext->kind == EXT_COMPRESSED)
        return true;
    return ext->zeroed == next->zeroed && ext->sparse == next->sparse && ext->file == next->file &&
           (!ext->file || ext->offset + ext->length == next->offset);
}

static void cmd_map_json(struct out *out, const struct image *im, uint64_t start, const struct extent *ext)
{
    bool zero = ext->kind == EXT_ZERO, has_offset = ext->kind != EXT_BAD && ext->kind != EXT_COMPRESSED && ext->file;

    while (im->depth < ext->depth)
        im = im->backing;
    out_open(out, NULL, '{', true);
    out_number(out, "start", start);
    out_number(out, "length", ext->length);
    out_number(out, "depth", ext->depth);
    out_flag(out, "present", !zero || ext->zeroed);
    out_flag(out, "zero", zero);
    out_flag(out, "data", !zero || (ext->sparse && im->cluster_size));
    if (has_offset)
        out_number(out, "offset", ext->offset);
    if (has_offset && im->n_files > 1 && !im->format->data_file)
        out_text(out, "filename", ext->file->path);
    if (ext->kind == EXT_BAD)
        out_text(out, "error", ext->why);
    out_close(out);
}

/* Prints one line for people; leaves out zeros, like qemu-img. */
static void cmd_map_line(uint64_t start, const struct extent *ext)
{
    char offset[24];

    if (ext->kind == EXT_ZERO)
        return;
    snprintf(offset, sizeof(offset), "%#" PRIx64, ext->offset);
    printf("%#-16" PRIx64 "%#-16" PRIx64 "%-16s", start, ext->length,
           ext->kind == EXT_DATA         ? offset
           : ext->kind == EXT_COMPRESSED ? "compressed"
                                         : "UNREADABLE");
    out_string(ext->kind == EXT_BAD ? ext->why : ext->file->path, false);
    putchar('\n');
}

static void cmd_map_extent(struct out *out, const struct image *im, uint64_t start, const struct extent *ext)
{
    if (ext->length && out->json)
        cmd_map_json(out, im, start, ext);
    else if (ext->length)
        cmd_map_line(start, ext);
}

static int cmd_map(struct image *im, bool json)
{
    struct out out = { .json = json };
    struct extent ext = { .kind = EXT_BAD, .length = 0 }, next;
    uint64_t size = im->size, start = 0;

    for (struct image *i = im; i; i = i->backing)
        if (i->format->find_holes)
            i->format->find_holes(i);
    if (json)
        out_open(&out, NULL, '[', false);
    else
        printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
    for (uint64_t at = 0; at < size; at += next.length) {
        img_map(im, at, size - at, true, &next);
        if (ext.length && cmd_map_continues(&ext, &next)) {
            ext.length += next.length;
            continue;
        }
        cmd_map_extent(&out, im, start, &ext);
        if (ferror(stdout))
            return EXIT_FAILED;
        ext = next;
        start = at;
    }
    cmd_map_extent(&out, im, start, &ext);
    if (json)
        out_close(&out);
    return EXIT_OK;
}

static double cmd_percent(uint64_t part, uint64_t all)
{
    return all ? 100.0 * (double)part / (double)all : 0;
}

static void cmd_check_json(const struct image *im, const struct check *c)
{
    const struct { const char *key; uint64_t value; } counts[] = {
        { "corruptions", c->corruptions },         { "leaks", c->leaks },
        { "wiped-tables", c->wiped },
        { "image-end-offset", c->image_end },      { "total-clusters", c->total },
        { "allocated-clusters", c->allocated },    { "fragmented-clusters", c->fragmented },
        { "compressed-clusters", c->compressed },  { "corruptions-fixed", c->corruptions_fixed },
        { "leaks-fixed", c->leaks_fixed },
    };
    struct out out = { .json = true };

    out_open(&out, NULL, '{', false);
    out_text(&out, "filename", im->name);
    out_text(&out, "format", im->format->name);
    out_number(&out, "check-errors", c->errors);
    for (size_t i = 0; i < ARRAY_LEN(counts); i++)
        if (counts[i].value)
            out_number(&out, counts[i].key, counts[i].value);
    out_close(&out);
}

static void cmd_check_lines(const struct image *im, const struct check *c)
{
    if (c->corruptions_fixed || c->leaks_fixed) {
        out_string(im->name, false);
        printf(" (%s): %" PRIu64 " corruptions and %" PRIu64 " leaked clusters were repaired\n", im->format->name,
               c->corruptions_fixed, c->leaks_fixed);
    }
    out_string(im->name, false);
    printf(" (%s): ", im->format->name);
    if (c->errors)
        printf("%" PRIu64 " errors while looking, so there may be more; ", c->errors);
    if (c->corruptions)
        printf("%" PRIu64 " corruptions, the data or what is written next may be damaged; ", c->corruptions);
    printf(c->leaks ? "%" PRIu64 " leaked clusters, which only waste space\n"
           : c->errors || c->corruptions ? "no leaks\n"
                                         : "nothing wrong was found\n", c->leaks);
    printf("%" PRIu64 " of %" PRIu64 " clusters allocated (%.2f %%); of these %.2f %% fragmented, %.2f %% compressed\n",
           c->allocated, c->total, cmd_percent(c->allocated, c->total), cmd_percent(c->fragmented, c->allocated),
           cmd_percent(c->compressed, c->allocated));
    printf("its last used cluster ends at %" PRIu64 "\n", c->image_end);
    if (*im->backing_name) {
        printf("it is a part of its disk; the rest, not looked at, is in its backing file ");
        out_string(im->backing_name, false);
        printf("\n");
    }
}

/* Repairs what can be repaired. c: in, what was found; out, what is left, which decides the exit status. */
static int cmd_repair(struct image *im, struct check *c)
{
    const struct check found = *c;
    int ret;

    if (!im->format->repair)
        return -EOPNOTSUPP;
    *c = (struct check){ .corruption_lines = OUT_FINDINGS, .leak_lines = OUT_FINDINGS };
    ret = im->format->repair(im, c);
    if (!ret)
        ret = check_look(im, 0, c);
    if (ret)
        return msg_err(ret, "%s: cannot be repaired: %s", im->name, strerror(-ret));
    c->corruptions_fixed = found.corruptions - util_min(found.corruptions, c->corruptions);
    c->leaks_fixed = found.leaks - util_min(found.leaks, c->leaks);
    c->corruption_lines = found.corruption_lines;
    c->leak_lines = found.leak_lines;
    return 0;
}

/* The exit statuses are qemu-img's. */
static int cmd_check(struct image *im, bool json)
{
    struct check c = { .corruptions = 0 };
    uint64_t left_out;
    int ret = check_all(im, &c);

    if (!ret && im->writable)
        ret = cmd_repair(im, &c);
    out_progress_wipe();
    if (ret == -EOPNOTSUPP)
        return msg_err(EXIT_CHECK_NONE, "%s: is %s, which %s", im->name, im->format->name,
                       im->writable ? "cannot be repaired" : "has nothing to check");
    if (ret)
        return EXIT_FAILED;
    left_out = c.corruption_lines - util_min(c.corruption_lines, OUT_FINDINGS) + c.leak_lines -
               util_min(c.leak_lines, OUT_FINDINGS);
    if (left_out)
        msg_say(MSG_NOTE, "%s: %" PRIu64 " more lines like these were left out", im->name, left_out);
    if (json)
        cmd_check_json(im, &c);
    else
        cmd_check_lines(im, &c);
    return c.errors ? EXIT_FAILED : c.corruptions ? EXIT_CHECK_CORRUPT : c.leaks ? EXIT_CHECK_LEAKS : EXIT_OK;
}

static int cmd_formats(void)
{
    printf("%-10s %-10s %s\n", "FORMAT", "WRITES", "WHAT");
    for (size_t i = 0; i < ARRAY_LEN(probe_formats); i++)
        printf("%-10s %-10s %s\n", probe_formats[i]->name, probe_formats[i]->writes, probe_formats[i]->describe);
    return out_finish(EXIT_OK);
}

static int cmd_version(void)
{
    printf("fuseexp %s (libfuse %s, libdeflate %s)\n", FUSEEXP_VERSION, fuse_pkgversion(),
           LIBDEFLATE_VERSION_STRING);
    return out_finish(EXIT_OK);
}

/* ******************************************************************************************************** *
 * 36. Main
 * ******************************************************************************************************** */

/* If a standard stream is closed, an image must not get its number. */
static void main_open_stdio(void)
{
    int fd;

    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

static int main_export(const struct options *o)
{
    int shell_fd = -1, status = EXIT_FAILED;

    if (!o->foreground && !o->command && run_background(&shell_fd, &status) != 0)
        return status;
    return run_export(o, shell_fd);
}

int main(int argc, char **argv)
{
    struct options o = { .cache_size = 64 << 20, .threads = DEFAULT_THREADS, .mode = OPT_UNSET, .uid = getuid(),
                         .gid = getgid() };
    int status = opt_error_status(argc, argv);

    main_open_stdio();
    run_dispose(SIGXFSZ, SIG_IGN, &o.old_xfsz);
    util_note_inherited();
    if (opt_parse(&o, argc, argv) == 0) {
        msg_verbosity = o.debug ? MSG_DEBUG : o.verbose ? MSG_INFO : o.quiet ? MSG_ERROR : MSG_NOTE;
        status = o.action == ACT_INFO      ? cmd_look(&o, cmd_info)
                 : o.action == ACT_MAP     ? cmd_look(&o, cmd_map)
                 : o.action == ACT_CHECK   ? cmd_look(&o, cmd_check)
                 : o.action == ACT_UMOUNT  ? cmd_umount(&o)
                 : o.action == ACT_FORMATS ? cmd_formats()
                 : o.action == ACT_VERSION ? cmd_version()
                 : o.action == ACT_HELP    ? opt_usage()
                                           : main_export(&o);
    }
    free(o.extra);
    return status;
}
