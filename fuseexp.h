/* SPDX-License-Identifier: MIT */
/*
 * fuseexp.h: facts and contracts. On-disk and on-wire layouts with the place they come from, limits, the core
 * types, and what each layer of fuseexp.c promises the one above. No code.
 *
 * Conventions: offsets and lengths are bytes in uint64_t, unless a name ends in _lba (logical sectors).
 * Functions return 0 or -errno; whoever detects an error reports it, once.
 */
#ifndef FUSEEXP_H
#define FUSEEXP_H

#include <limits.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#define FUSEEXP_VERSION "0.1"

/* ---- integers as files have them: bytes, so that no struct of them has padding or needs alignment ------- */

typedef struct { uint8_t byte[2]; } le16;
typedef struct { uint8_t byte[4]; } le32;
typedef struct { uint8_t byte[8]; } le64;
typedef struct { uint8_t byte[2]; } be16;
typedef struct { uint8_t byte[4]; } be32;
typedef struct { uint8_t byte[8]; } be64;

/* ---- limits -------------------------------------------------------------------------------------------- */

#define MAX_PARTS 4096              /* files of one split image */
#define MAX_FILES 4096              /* of all images of a chain together: 12 bits of the cache's tags */
#define MAX_CLUSTER (2u << 20)      /* bytes that one compressed cluster decodes to */
#define MAX_CHAIN 200               /* images of one backing chain */
#define MAX_GIVEN 64                /* --backing */
#define MAX_NEIGHBOURS 4096         /* files of a directory that are looked at to find a parent by its identity */
#define MAX_PARENT_NAMES 16         /* recorded names of one parent: VHD has eight and one more */
#define MAX_VIEWS 256               /* files shown in a directory mount: the disk and its partitions */
#define MAX_LOGICAL 251             /* records followed in one extended partition: Linux counts to partition 255 */
#define MAX_GPT_ENTRIES 1024        /* more than any tool writes (128 is usual): bounds the table's allocation */
#define MAX_THREADS 64
#define DEFAULT_THREADS 16
#define MAX_IMAGE_SIZE INT64_MAX    /* the kernel's file offsets are signed */
#define FILE_PATCH 4096             /* bytes of a file that are replaced at once */
#define FILE_MAX_PATCHES 16384      /* 64 MiB of one file */
#define MAX_RANGES 65536            /* bad ranges that are remembered, of a file and in the error map */
#define MAX_WAITERS 16              /* concurrent `fuseexp --umount` on one mount */

struct range {
    uint64_t start, end;
};
struct ranges {                     /* sorted, apart */
    struct range *range;
    unsigned n;
};

/*
 * What a mapfile of GNU ddrescue says of a disk. Each span ends where the next one starts; the first starts at 0, and
 * the last one has no end.
 */
struct lost_span {
    uint64_t start;
    const char *why;                /* it was not read; NULL: it was */
};
struct lost_map {
    struct lost_span *span;
    unsigned n, room;
    char *path;
    uint64_t bytes;                 /* not read, of the image; and in so many ranges: */
    unsigned ranges;
};

/* ---- host files: file_ --------------------------------------------------------------------------------- */

/*
 * One host file or block device, opened once and never mapped (a truncation underneath would be SIGBUS).
 * Immutable after file_open() but for the atomics. All calls may run in parallel; there is no file position.
 *   file_pread   fills the whole range or fails; *done says how much of the front is good, by sectors where the host
 *                has O_DIRECT. A range past the file's end is -EIO, not zeros: the file was truncated underneath.
 *   file_patch   replaces a page of what readers see, in memory: a log that is replayed without writing. At open
 *                only; file_pread honours it, file_splice refuses such ranges. Writing to such a file is undefined.
 *   file_sync    -EIO for ever once a write-back has failed (the kernel reports it once, we remember), or once another
 *                program has made the file shorter than we left it. Callers in parallel share a barrier.
 */
struct file_patch {
    uint64_t offset;                /* a multiple of FILE_PATCH */
    uint8_t *page;                  /* owned; NULL: zeros */
};

struct file {
    char *path;                     /* as the user named it: for messages; NULL: it is not open, and all else is void */
    int fd;
    uint16_t id;                    /* for the cache's keys, below MAX_FILES: no two open files share one */
    bool is_blk;
    bool writable;
    _Atomic uint64_t size;          /* at open, and as we made it longer; see image.size for what is served */
    struct stat st;                 /* at open */
    _Atomic int latched;            /* the first failed write-back, 0 or -errno */
    _Atomic uint64_t gone;          /* writable: to where another program truncated it; UINT64_MAX: it did not */
    pthread_mutex_t lock;           /* protects what follows, and pairs size with the file's length */
    pthread_cond_t changed;
    uint64_t syncs_begun, syncs_over;       /* one runs at a time */
    bool scanning;                  /* a thread looks for bad sectors: it owns direct_fd and sector without the lock */
    int direct_fd;                  /* the same with O_DIRECT; -1: none */
    uint32_t sector;                /* what can be read by itself; 0: not known yet */
    /* Set while tables are changed in memory: copies the slice (of the table cache) at `start`; false: has none. */
    bool (*newer)(void *owner, uint64_t start, uint64_t *slice);
    void *newer_owner;
    struct ranges bad;              /* that could not be read, room for MAX_RANGES once there is one */
    int64_t bad_time;               /* util_now() of the last failure */
    _Atomic uint64_t bad_writes;    /* writes while something was in bad; see file_note_bad() */
    _Atomic bool troubled;          /* there is something in bad or trouble */
    _Atomic uint64_t trouble;       /* a read that was not looked into failed here; UINT64_MAX: none */
    bool overlaid;                  /* it is read with patches, or as longer than it is: */
    uint32_t n_patches;
    struct file_patch *patches;     /* sorted, room for FILE_MAX_PATCHES */
    uint64_t stored;                /* bytes that are there; from here to size zeros */
    enum { FILE_MAY_SLEEP, FILE_ALWAYS_SLEEPS, FILE_NEVER_SLEEPS } sleep;   /* do reads wait for a disk? */
};

/* QEMU's advisory locks: one byte per permission, held as shared OFD locks (block/file-posix.c, since 2.10). */
enum {
    LOCK_USES = 100,                /* + bit: "I use this permission" */
    LOCK_UNSHARED = 200,            /* + bit: "nobody else may use it" */
    PERM_READ = 0, PERM_WRITE = 1, PERM_RESIZE = 3,
};

/* ---- images and drivers: img_, raw_ -------------------------------------------------------------------- */

struct image;

/*
 * What tells an image from others, as children record it of their parent. A parent must agree in every value that its
 * child knows.
 *   ID_IMAGE   which image: stays when its data changes (but for VHDX, whose GUID changes with every use)
 *   ID_CID     VMDK's content ID: 4 bytes, changes with the data
 *   ID_STATE   changes with the data: VirtualBox's modification UUID
 */
enum identity_kind { ID_IMAGE, ID_CID, ID_STATE, ID_KINDS };

struct identity {
    bool known[ID_KINDS];
    uint8_t value[ID_KINDS][16];    /* UUIDs in the order in which they are printed */
};

/* What the user said about images; the same for all of a chain unless it says "top". */
struct image_options {
    const char *format;             /* of the top image; NULL: probed */
    const char *snapshot;           /* top: id or name */
    char *const *backing;           /* files of the chain: each where its identity fits, or instead of what top says */
    unsigned n_backing;
    const char *backing_format;     /* of the top's, and of those whose format no image says */
    const char *data_file;          /* top */
    const char *allow_external;     /* a directory that names in images may lead to */
    const char *mapfile;            /* top: says what was not read; "none": of no image; NULL: one beside raw images */
    int64_t map_offset;             /* added to the positions of a mapfile; 0: what it says itself */
    const char *header;             /* top: a file whose header stands for its own, which is lost */
    bool no_backing, force_parent, ignore_log, strict, parts, lock;
    bool rebuild;                   /* top: put together what is lost from what is left */
    bool zero_errors;               /* what cannot be read is shown as zeros, because the user said so */
    bool suspect_errors;            /* image.suspect reads as errors */
    bool free_suspects;             /* repair() may free clusters although a table seems to be wiped */
    bool top_only;                  /* to look at, not to be read: backing files are named, not opened */
};

enum extent_kind {
    EXT_DATA,                       /* bytes of `file` at `offset` */
    EXT_ZERO,                       /* reads as zeros, takes no room */
    EXT_BAD,                        /* cannot be read: -EIO; `why` says it */
    EXT_BACKING,                    /* what im->backing has at the same offset; zeros past its end */
    EXT_COMPRESSED,                 /* `skip` bytes into what coded_length bytes of `file` at `offset` decode to */
};

enum codec { CODEC_DEFLATE, CODEC_ZLIB, CODEC_ZSTD };  /* without a header; with one; one or several frames */

/* What lies at one offset of an image. Filled by image_format.map, consumed by the image core alone. */
struct extent {
    enum extent_kind kind;
    uint64_t length;                /* >= 1: how far this description holds from the offset asked for */
    struct file *file;              /* EXT_DATA, EXT_COMPRESSED; EXT_ZERO: NULL, or where room is set aside */
    uint64_t offset;                /* in file */
    uint32_t coded_length;          /* EXT_COMPRESSED: at most; what follows the last frame is ignored */
    uint32_t decoded_length, skip;  /* EXT_COMPRESSED: exactly; at most MAX_CLUSTER */
    enum codec codec;               /* EXT_COMPRESSED */
    const char *why;                /* EXT_BAD: static text; with `file`: because that ends before `offset` */
    bool zeroed;                    /* EXT_ZERO: the image says zeros, not just nothing */
    bool owned;                     /* EXT_DATA: may be overwritten where it lies */
    bool sparse;                    /* EXT_DATA: may have been set aside and never written, then it is a hole of file */
    unsigned depth;                 /* set by img_map(): of the image of the chain that says it */
};

/* The first and last bytes of a file, for probing without I/O. */
struct probe {
    uint8_t head[4096], tail[512];
    uint64_t head_len, tail_len;      /* tail: the last tail_len bytes of the last file of a set */
    uint64_t size;                  /* of the first */
};

struct out;

/* What --check found, in clusters. */
struct check {
    uint64_t corruptions, leaks;
    uint64_t wiped;                 /* of the corruptions: ranges of the disk whose table seems to be wiped */
    uint64_t errors;                /* that kept it from looking */
    uint64_t total, allocated, fragmented, compressed;
    uint64_t image_end;             /* bytes: where the last used cluster ends */
    uint64_t corruptions_fixed, leaks_fixed;
    unsigned corruption_lines, leak_lines;      /* told so far, see out_finding() */
};

/*
 * Who wants to know which bytes of its files an image uses: --check, and the look at every image that is opened.
 * claim() gets a range of f; `what` says which metadata it is, or is NULL for data, of the disk at `guest`. A range may
 * reach past the end of f, and one of no length says that f should reach so far.
 */
struct claims {
    void (*claim)(struct claims *c, struct file *f, uint64_t offset, uint64_t length, const char *what, uint64_t guest);
    uint64_t until;                 /* util_clock(): no more of the tables is read then; 0: all is */
    bool stopped;                   /* something was left out: because of that, or it could not be read */
};

/*
 * The driver contract. A driver parses and maps; the core loops, clamps, zero-fills, reports and locks.
 *   probe   0..100, no I/O; the highest wins, 0 is "not mine".
 *   part    NULL: one file. Else writes the name of part i (0 is the first) of a set whose first file is `first`;
 *           false when `first` does not look like the first of a set, or there is no such name any more.
 *   remains  is f what is left of an image of this format that has lost its first sector? Reads a few places. NULL:
 *           nothing would tell.
 *   header_length  so many bytes at the front of f, an image of this format, another one made with the same options can
 *           use if its own are lost; 0: none. May be NULL.
 *   rebuild  for --rebuild, before open(): puts together what is lost of im->files[0] from what is left, in memory
 *           (file_patch()), and says each guess in a note of its own. It leaves alone what is not lost, and what it
 *           cannot verify. NULL: cannot.
 *   identify  sets im->id from the headers of im->files[0], and nothing else; cheap, opens no other file. NULL: no
 *           child of this format knows its parent by identity.
 *   create  writes an image of `size` bytes over `backing` to the empty file f. One format has it: that of overlays.
 *   open    im->files are open; sets im->size. Reports its own errors. May leave a half-built im: close() copes.
 *   begin_writing  prepares the first write, once nothing can refuse the image any more; open() changes nothing of its
 *           file. NULL: nothing to prepare.
 *   map     describes [offset, offset + length) from its start, as far as one block (cluster, grain) goes; the core
 *           joins blocks. offset < im->size, length >= 1. What cannot be found out is EXT_BAD. Thread-safe, takes no
 *           lock on the hot path.
 *   write   changes what map() does not call owned: as much of the range as it likes, at least a byte; *done 0
 *           without an error: it is owned now. buf NULL: only sets room aside. NULL: no such thing.
 *   zero    makes a range read as zeros and gives back its room. -EOPNOTSUPP: write zeros into the first *done bytes.
 *   sync    as fsync(2) for all written before; `last`: nobody writes any more, everything is put in order.
 *   resize  the image gets `size` bytes, it had `old`; the rest of the longer of the two reads as zeros afterwards.
 *           Under size_lock; the core sets im->size afterwards. NULL: the format cannot change its size.
 *   find_holes  before all is mapped with `exact`: may read tables to find out whether extents are sparse; may be NULL.
 *   info    writes what only this format has into the open object; may be NULL.
 *   snapshots  writes the internal snapshots as list "snapshots" into the open object, if there are any; may be NULL.
 *   claims  claims the metadata of the image's files; true if also all data, where one flat table says that (it is read
 *           past the cache). Else the core walks map() for the data. What cannot be read is left out. NULL: there is
 *           no metadata. Of a format with check() several may use one range.
 *   is_free  does the image itself count this part of f as free? Then old data there means nothing. NULL: it does not
 *           count.
 *   as_qemu  false: QEMU reads another disk from the image, or would damage it. Of what map() reads without errors;
 *           called before an overlay is made, may read tables. NULL: no such difference.
 *   check   NULL: the core walks map() and finds what is bad, or used twice (as data, or in claims). Else counts into
 *           *c what is wrong; < 0: could not be done.
 *   repair  sets right what check finds; never touches data. *c is what is left. NULL: cannot.
 *   close   frees what im->state refers to, which the core then frees; not called without a state; may be NULL.
 */
struct image_format {
    const char *name, *describe, *writes;
    bool writable;                  /* in place */
    bool plain;                     /* the files are the disk: no metadata, nothing to check, any bytes will do */
    bool several_files;             /* may be given as more than one */
    size_t state_size;              /* of im->state, zeroed, before identify() and open(); 0: open() allocates it */
    bool data_file;                 /* files[1] may be an external data file, which --data-file names */
    bool has_snapshots;             /* --snapshot chooses one */
    bool bad_to_qemu;               /* what map() calls bad is an error for QEMU, too */
    bool opens_headless;            /* open() does not need the first sector */
    const char *directory_file;     /* an image may be a directory that has a file of this name; NULL: none is */
    const char *extensions;         /* of files that are hardly anything else, each in blanks: " vdi " */
    int (*probe)(const struct probe *p);
    bool (*part)(const char *first, unsigned i, char name[PATH_MAX]);
    bool (*remains)(struct file *f);
    uint64_t (*header_length)(struct file *f);
    int (*rebuild)(struct image *im);
    int (*identify)(struct image *im);
    int (*create)(struct file *f, uint64_t size, const char *backing, const char *backing_format);
    int (*open)(struct image *im);
    int (*begin_writing)(struct image *im);
    void (*map)(struct image *im, uint64_t offset, uint64_t length, struct extent *ext);
    int (*write)(struct image *im, const uint8_t *buf, uint64_t len, uint64_t offset, uint64_t *done);
    int (*zero)(struct image *im, uint64_t len, uint64_t offset, uint64_t *done);
    int (*sync)(struct image *im, bool last);
    int (*resize)(struct image *im, uint64_t old, uint64_t size);
    void (*find_holes)(struct image *im);
    void (*info)(struct image *im, struct out *out);
    int (*snapshots)(struct image *im, struct out *out);
    bool (*claims)(struct image *im, struct claims *c);
    bool (*is_free)(struct image *im, const struct file *f, uint64_t offset);
    bool (*as_qemu)(struct image *im);
    int (*check)(struct image *im, struct check *c);
    int (*repair)(struct image *im, struct check *c);
    void (*close)(struct image *im);
};

struct image {
    const struct image_format *format;
    struct file *files;             /* MAX_PARTS of them, opened and owned by the core */
    unsigned n_files;
    unsigned n_given;               /* named by the user */
    bool found_parts;               /* files past the first were found by name, not given by the user */
    bool writable, growable;
    bool made;                      /* an overlay that was not there before */
    void *state;                    /* the driver's, see state_size */
    const struct image_options *opt;
    struct lost_map *unread;        /* owned; NULL: all of it was read */
    struct image *backing;          /* opened and owned by the core; NULL: EXT_BACKING does not occur */
    char backing_name[1024];        /* set by the driver's open(): as the image says it; empty: none */
    char backing_format[32];        /* likewise; empty: the image does not say */
    uint64_t backing_size;          /* likewise, bytes: it had so much at least; 0: the image does not say */
    uint64_t least_size;            /* set by rebuild(): the size is between this and what open() sets; else 0 */
    uint32_t cluster_size;          /* likewise: what is allocated at once; 0: no such thing */
    uint32_t entry_size;            /* likewise: bytes of a table that describe a cluster; 0: there are no tables */
    struct ranges suspect;          /* set by the core: of the disk, where a table seems to be wiped; room MAX_RANGES */
    bool dirty;                     /* likewise: says of itself that it was not closed properly */
    bool damaged;                   /* set by the core: something is missing or used twice, as far as it has looked */
    bool encrypted;                 /* likewise: opened for its tables alone, map() describes what cannot be read */
    /*
     * Likewise, where the backing file is known by its identity, not by its name: the names recorded for it are hints,
     * tried in this order ("/" between components, UTF-8; owned). Any file beside the image with that identity will do.
     */
    bool has_hints;
    unsigned n_hints;
    char *hints[MAX_PARENT_NAMES];
    struct identity id, parent_id;  /* likewise: its own; what its parent must have */
    bool common_parent_id;          /* likewise: so many images have it that the parent must be named */
    bool has_other_parent;          /* likewise: as ID_IMAGE this one will do, too */
    uint8_t other_parent[16];
    uint32_t sector_size;           /* likewise: the disk's logical sectors; 0: the image does not say */
    unsigned depth;                 /* 0: the image that the user named */
    struct image *child;            /* whose backing file this is */
    unsigned given;                 /* it is the n-th --backing; 0: no */
    const char *name;               /* the first file's path */
    _Atomic uint64_t size;          /* changes only under size_lock; see img_resize() */
    _Atomic uint64_t admit;         /* requests from here on wait for size_lock: UINT64_MAX, or what it is cut to */
    _Atomic uint64_t cut, cut_to;   /* ticket of the request that last made it shorter, and the size; likewise */
    _Atomic bool failed;            /* a write, a flush or a resize went wrong: the exit status will say so */
    pthread_mutex_t size_lock;
};

/* ---- views: part_ -------------------------------------------------------------------------------------- */

/* A window of the image that is shown as one file. Only its first `inside` bytes are there: the rest reads as EIO. */
struct view {
    char name[16];                  /* "disk", "p1", ... */
    int number;                     /* the partition's number as Linux counts, 0 for the disk */
    uint64_t start;
    uint64_t inside;                /* less than size: a partition that reaches past the end of its disk */
    uint64_t size;                  /* at open: where a view can be resized, image.size counts */
};

/* MBR: the first sector of a disk. An EBR, which describes a logical partition, has the same shape. */
struct mbr_entry {
    uint8_t status;                 /* 0x0: 0x80: active; else 0 */
    uint8_t first_chs[3];           /* 0x1 */
    uint8_t type;                   /* 0x4 */
    uint8_t last_chs[3];            /* 0x5 */
    le32 first_lba;                 /* 0x8: in an EBR relative */
    le32 sectors;                   /* 0xc: 0: unused */
};
struct mbr {
    uint8_t code[446];              /* 0x000 */
    struct mbr_entry entry[4];      /* 0x1be */
    le16 signature;                 /* 0x1fe */
};
_Static_assert(sizeof(struct mbr_entry) == 16 && sizeof(struct mbr) == 512, "MBR");
#define MBR_SIGNATURE 0xaa55
#define MBR_EXTENDED_TYPES "\x05\x0f\x85"      /* with CHS, with LBA, Linux's */
#define MBR_TYPE_GPT 0xee

/* GPT header: UEFI specification, 5.3.2. At LBA 1 and at the last LBA. */
struct gpt_header {
    uint8_t signature[8];           /* 0x00: "EFI PART" */
    le32 revision;                  /* 0x08 */
    le32 size;                      /* 0x0c: bytes of this header, at most a sector */
    le32 crc;                       /* 0x10: CRC-32 of so many bytes, with this field 0 */
    le32 reserved;                  /* 0x14 */
    le64 my_lba;                    /* 0x18 */
    le64 other_lba;                 /* 0x20: of the other copy */
    le64 first_usable_lba;          /* 0x28 */
    le64 last_usable_lba;           /* 0x30 */
    uint8_t disk_guid[16];          /* 0x38 */
    le64 entries_lba;               /* 0x48 */
    le32 n_entries;                 /* 0x50 */
    le32 entry_size;                /* 0x54 */
    le32 entries_crc;               /* 0x58: CRC-32 of all entries */
};
struct gpt_entry {
    uint8_t type_guid[16];          /* 0x00: 0: unused */
    uint8_t guid[16];               /* 0x10 */
    le64 first_lba;                 /* 0x20 */
    le64 last_lba;                  /* 0x28: included */
    le64 attributes;                /* 0x30 */
    uint8_t name[72];               /* 0x38: UTF-16 */
};
_Static_assert(sizeof(struct gpt_header) == 92 && sizeof(struct gpt_entry) == 128, "GPT");
#define GPT_ENTRY_MAX 4096

/* ---- FUSE, as far as linux/fuse.h of older headers lacks it (names fx_ so that newer headers do not clash)  */

#define FX_MIN_MINOR 23             /* Linux 3.15: the 64-byte INIT reply */
#define FX_MAX_IO (1u << 20)        /* bytes of a worker's buffer: what 256 pages carry */
#define FX_MAX_WRITE (1u << 18)     /* per WRITE: a large direct write is split, several workers copy at once (1.3x) */
/* READs are asked for in pieces that fit, with their header, into a pipe of the 1 MiB that any user may have. */
#define FX_SPLICE_MAX (1u << 19)
#define FX_MAX_READ_OPTION "max_read=524288"
#define FX_SPLICE_MIN (1u << 16)    /* below this copying is faster than referring (measured) */
#define FX_RWF_NOWAIT 8
#define FX_RESOLVE_NO_MAGICLINKS 0x02
#define FX_RESOLVE_BENEATH 0x08
struct fx_open_how {
    uint64_t flags, mode, resolve;
};
#define FX_STATX_MNT_ID_UNIQUE 0x4000u          /* Linux 6.8 */
#define FX_STATX_OFF_MNT_ID 144
#define FX_STATX_DONT_SYNC 0x4000
#define FX_TMPFS_MAGIC 0x01021994
#define FX_RAMFS_MAGIC 0x858458f6
/* In a worker's buffer, bytes. A WRITE's data begins at a page (faster to copy), and so does a reply's, behind them. */
#define FX_REQUEST_AT (4096u - 80)  /* a WRITE's two headers are 80 bytes */
#define FX_REQUEST_MAX (80 + FX_MAX_IO)
#define FX_HEAD_ROOM 8192u          /* for a request's header and arguments, and for the reply's header */

#define FX_PASSTHROUGH (1ULL << 37)             /* INIT flags, 7.40 */
#define FX_DIRECT_IO_ALLOW_MMAP (1ULL << 36)    /* INIT flags, 7.39 */
#define FX_OPEN_PARALLEL_DIRECT_WRITES (1u << 6)
#define FX_OPEN_PASSTHROUGH (1u << 7)
#define FX_STATX 52                             /* opcode, 7.39 */
#define FX_STATX_BASIC 0x7ffu                   /* STATX_BASIC_STATS */
#define FX_STACK_DEPTH 2            /* lets the image lie on an overlayfs, as on every live system */

struct fx_init_out {                /* 7.23..7.40 */
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth, unused[6];
};
_Static_assert(sizeof(struct fx_init_out) == 64, "FUSE_INIT reply");

struct fx_open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;             /* with FX_OPEN_PASSTHROUGH */
};
_Static_assert(sizeof(struct fx_open_out) == 16, "FUSE_OPEN reply");

struct fx_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define FX_IOC_CLONE _IOR(229, 0, uint32_t)
#define FX_IOC_BACKING_OPEN _IOW(229, 1, struct fx_backing_map)

struct fx_statx_in {
    uint32_t getattr_flags, reserved;
    uint64_t fh;
    uint32_t sx_flags, sx_mask;
};

struct fx_sx_time {
    int64_t sec;
    uint32_t nsec;
    int32_t reserved;
};

struct fx_statx_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec, flags;
    uint64_t spare0[2];
    /* struct fuse_statx */
    uint32_t mask, blksize;
    uint64_t attributes;
    uint32_t nlink, uid, gid;
    uint16_t mode, spare1;
    uint64_t ino, size, blocks, attributes_mask;
    struct fx_sx_time atime, btime, ctime, mtime;
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t spare2[14];
};
_Static_assert(sizeof(struct fx_statx_out) == 32 + 256, "FUSE_STATX reply");

/* ---- Landlock and capabilities, for headers that lack them --------------------------------------------- */

#define FX_LANDLOCK_FS_V1 ((1ULL << 13) - 1)
#define FX_LANDLOCK_REFER (1ULL << 13)
#define FX_LANDLOCK_TRUNCATE (1ULL << 14)
#define FX_LANDLOCK_IOCTL_DEV (1ULL << 15)
#define FX_LANDLOCK_NET 3ULL        /* bind and connect TCP */
#define FX_LANDLOCK_SCOPED 3ULL     /* abstract UNIX sockets, signals */
struct fx_landlock_ruleset {
    uint64_t handled_fs, handled_net, scoped;
};

/* ---- exit statuses ------------------------------------------------------------------------------------- */

enum {
    EXIT_OK = 0,
    EXIT_FAILED = 1,
    EXIT_USAGE = 2,
    EXIT_CHECK_CORRUPT = 2,         /* --check, as qemu-img has them */
    EXIT_CHECK_LEAKS = 3,
    EXIT_CHECK_NONE = 63,           /* the format has nothing to check */
    EXIT_CMD_NOT_STARTED = 125,     /* with -- COMMAND: we failed, before it ran or at the final flush */
    EXIT_CMD_NOT_EXECUTABLE = 126,
    EXIT_CMD_NOT_FOUND = 127,
};

#endif
