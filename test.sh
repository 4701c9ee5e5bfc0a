#!/bin/bash
# SPDX-License-Identifier: MIT
# Tests of fuseexp, in TAP. A case is a function t_<what it asserts>, run in its own directory and its own shell with -eu.
#
#   ./test.sh [-l] [PATTERN...]     -l lists the cases; patterns as in 'partition_*'; builds what they use
#   ./test.sh --demo | --bench | --contest | --lint | --soak | --harness
#
# A new format gets a section of its own: cases that read what its own tools write (check_sparse, check_corpus), each kind
# of damage (refuse_each, a row each; fuzz), --info, --map and --check beside qemu-img (as_qemu_*). A new variant of a writable
# image is one more word in each_disk and make_owners: every case that calls them then runs on it.
#
# KEEP=1 keeps the directories. TIMES=1 says how long each case took. JOBS=1 runs one at a time.
# Truth comes from elsewhere: cmp, mkfs, fsck, sfdisk, qemu-img.
# Needs root; cases as a plain user become nobody. Cases on the corpus are skipped where ../shared/corpus is not there.
# shellcheck disable=SC2001,SC2002,SC2013,SC2015,SC2016,SC2017,SC2034,SC2059,SC2086,SC2154,SC2209,SC2317  # inner shells, words without blanks, names set by callers
set -u
top=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$top/build}
corpus=$top/../shared/corpus
fx=$build/fuseexp
fault=$build/fuseexp-fault
libs=$build/deps
export LC_ALL=C ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=98 TSAN_OPTIONS=exitcode=97 UBSAN_OPTIONS=print_stacktrace=1

# ---- helpers ---------------------------------------------------------------------------------------------------

skip() { echo "SKIP: $*" >&3; exit 77; }
fail() { echo "FAILED: $*" >&2; exit 1; }
# Assertions stand on lines of their own: in "a && b" a failing a does not end a shell under -e, nor does "! a".
not() { if "$@"; then fail "should have failed: $*"; fi; }
same() { [ "$1" = "$2" ] || fail "expected '$2', got '$1'"; }
random() { dd if=/dev/urandom of="$1" bs=4k count="$2" iflag=fullblock status=none; }       # FILE, 4 KiB blocks

# expect STATUS COMMAND...: its exit status; stderr goes to ./err
expect() {
    local want=$1 got=0
    shift
    "$@" 2>err || got=$?
    [ "$got" = "$want" ] || { cat err >&2; fail "exit status $got instead of $want: $*"; }
}

# refused STATUS PATTERN COMMAND...: fails with that status, says one line that matches, leaves nothing behind
refused() {
    local want=$1 pattern=$2 before
    shift 2
    before=$(state)
    expect "$want" "$@"
    same "$(wc -l <err)" 1
    grep -q "^fuseexp: .*$pattern" err || { cat err >&2; fail "no '$pattern' in the message"; }
    : >err
    same "$(state)" "$before"
}

# What a failed start must not change: mounts, files, processes of ours. (./err is ours.)
state() {
    grep -c "$PWD" /proc/self/mountinfo || true
    find . -xdev ! -name err -printf '%p %y %i\n' | sort
    ours
}

# Live processes of fuseexp that this case started: they carry its directory in their environment.
ours() {
    local p
    for p in $(grep -lzs "^FXTEST=$PWD\$" /proc/[0-9]*/environ); do
        p=${p%/environ}
        case $(readlink "$p/exe") in "$build"/fuseexp*) echo "process ${p#/proc/}" ;; esac
    done
    true
}

server_of() {       # the server's process number: of ours, the one that is locked in
    local p
    for p in $(ours | sed 's/process //'); do
        grep -q '^NoNewPrivs:.*1' "/proc/$p/status" 2>/dev/null && echo "$p"
    done | head -n 1
}
supervisor_of() { awk '{ print $4 }' "/proc/$(server_of)/stat"; }

gone() {            # waits up to thirty seconds until nothing of ours runs and nothing is mounted here
    local i
    for i in $(seq 1500); do
        [ -z "$(ours)$(mounts_here)" ] && return 0
        sleep 0.02
    done
    fail "still there: $(ours)$(mounts_here)"
}

mounts_here() { awk -v p="$PWD/" 'index($5, p) == 1' /proc/self/mountinfo; }

# In a new mount namespace: a copy of another case's mount would keep that one's server alive.
leave_others() {
    local m
    for m in $(awk -v p="$PWD/" '/fuseexp-test/ && index($5, p) != 1 && index($4, p) != 1 { print $5 }' /proc/self/mountinfo); do
        umount -l "$m" 2>/dev/null || true
    done
}

wait_for() {        # until the command succeeds, thirty seconds at most
    local i
    for i in $(seq 1500); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.02
    done
    fail "waited in vain: $*"
}

# refuse_each COMMAND... <<<"OFFSET HEX PATTERN...": each row, given to COMMAND, makes a bad image that is refused with that message
refuse_each() {
    local offset hex pattern
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        "$@" "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done
}

nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups)
as_nobody() { "${nobody[@]}" "$@"; }

clean_up() {        # of a case, whatever happened
    local d m
    for d in $(losetup -nO NAME,BACK-FILE 2>/dev/null | awk -v p="$1" 'index($0, p) { print $1 }'); do
        umount "$d" 2>/dev/null
        losetup -d "$d"
    done
    while m=$(awk -v p="$1/" 'index($5, p) == 1 { print $5 }' /proc/self/mountinfo | tail -n 1) && [ -n "$m" ]; do
        umount -l "$m" 2>/dev/null || break
    done
    sleep 0.05
    for d in $(cd "$1" && ours | sed 's/process //'); do kill -9 "$d" 2>/dev/null; done
    [ -n "${KEEP:-}" ] || rm -rf "$1"
}

# ---- Python helpers -------------------------------------------------------------------------------------------

# py CODE [ARGUMENT...]: what the shell cannot do: reads, mmap, seeks, call by call.
py() { python3 -c "import os, sys, mmap, random, errno, ctypes, fcntl
$1" "${@:2}"; }

# Python with the pieces of a VHD, by Microsoft's specification.
vhd_py() { py '
import struct, uuid
def fix(b, at):                          # the checksum: one complement of the sum of all other bytes
    b = bytearray(b); b[at:at + 4] = bytes(4); b[at:at + 4] = struct.pack(">I", ~sum(b) & 0xffffffff); return bytes(b)
def footer(kind, size, chs=(0, 0, 0), creator=b"win ", ident=bytes(16), at=512):
    f = b"conectix" + struct.pack(">IIQI4sI4sQQHBBI", 2, 0x10000, at if kind > 2 else 2**64 - 1, 0, creator, 0x10000, b"Wi2k", size, size, *chs, kind)
    return fix(f + bytes(4) + ident + bytes(428), 64)
def header(table, entries, block, parent=bytes(16), name="", locators=()):
    h = b"cxsparse" + struct.pack(">QQIII", 2**64 - 1, table, 0x10000, entries, block) + bytes(4) + parent + bytes(8)
    h += name.encode("utf-16-be", "surrogatepass").ljust(512, b"\0")
    for code, length, offset in locators: h += struct.pack(">4sIIIQ", code, 512, length, 0, offset)
    return fix(h.ljust(1024, b"\0"), 36)
def build(path, kind, size, block, bits, data, ident=bytes(16), parent=bytes(16), name="", locators=(), **more):
    # copy of the footer | header | table at 1536 | locators | blocks of bitmap and data | footer
    # bits[i]: None for no block, or a list of 0 and 1; data: the whole disk
    n = -(-size // block); at = 1536 + -(-n * 4 // 512) * 512; extra = b""; locs = []
    for code, text in locators:
        text = text.encode("utf-16-le"); locs.append((code, len(text), at + len(extra))); extra += text.ljust(-(-len(text) // 512) * 512, b"\0")
    at += len(extra); table = []; blocks = b""; width = -(-(block // 512) // 4096) * 512
    for i in range(n):
        if bits[i] is None: table.append(0xffffffff); continue
        table.append((at + len(blocks)) // 512); m = bytearray(width)
        for j, bit in enumerate(bits[i]): m[j // 8] |= bit << 7 - j % 8
        blocks += bytes(m) + data[i * block:(i + 1) * block].ljust(block, b"\xee")
    f = footer(kind, size, ident=ident, **more)
    with open(path, "wb") as out:
        out.write(f + header(1536, n, block, parent, name, locs) + struct.pack(">%dI" % n, *table).ljust(-(-n * 4 // 512) * 512, b"\xff") + extra + blocks + f)
'"$1" "${@:2}"; }

# Python with the pieces of a VHDX, by [MS-VHDX].
vhdx_py() { py '
import struct, uuid, subprocess
pack = struct.pack; MIB = 1 << 20
G = lambda text: uuid.UUID(text).bytes_le
table = []
for i in range(256):
    for bit in range(8): i = i >> 1 ^ (0x82f63b78 if i & 1 else 0)
    table.append(i)
def crc(b):
    c = 0xffffffff
    for x in b: c = table[(c ^ x) & 255] ^ c >> 8
    return c ^ 0xffffffff
def seal(b, size):                       # signature, then the CRC-32C of all with itself as zeros
    b = bytearray(b.ljust(size, b"\0")); b[4:8] = bytes(4); b[4:8] = pack("<I", crc(b)); return bytes(b)
BAT, META = G("2dc27766-f623-4200-9d64-115e9bfd4a08"), G("8b7ca206-4790-4b9a-b8fe-575f050f886e")
PARAMS, SIZE, SECTOR, PHYS, PAGE83, PARENT = map(G, ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
    "8141bf1d-a96f-4709-ba47-f233a8faab5f", "cda348c7-445d-4471-9cc9-e9885251c556", "beca12ab-b2e6-4523-93ef-c309e000c746", "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"))
LOG = bytes(range(1, 17))
def head(seq, ident, log=bytes(16), length=MIB, version=1):
    return seal(b"head" + pack("<IQ", 0, seq) + bytes(16) + ident + log + pack("<HHIQ", 0, version, length, MIB), 4096)
def regions(*entries):                   # (guid, offset, length, required)
    return seal(b"regi" + pack("<III", 0, len(entries), 0) + b"".join(g + pack("<QII", *rest) for g, *rest in entries), 65536)
def metadata(*items):                    # (guid, bits, value)
    table = b"metadata" + pack("<HH", 0, len(items)) + bytes(20); values = b""
    for g, bits, value in items:
        table += g + pack("<IIII", 65536 + len(values), len(value), bits, 0); values += value
    return table.ljust(65536, b"\0") + values
def locator(keys, kind=G("b04aefb7-d19e-4a81-b789-25b8e9445913")):
    at = 20 + 12 * len(keys); table = kind + pack("<HH", 0, len(keys)); text = b""
    for k, v in keys:
        k, v = k.encode("utf-16-le"), v.encode("utf-16-le")
        table += pack("<IIHH", at + len(text), at + len(text) + len(k), len(k), len(v)); text += k + v
    return table + text
def build(path, size, block, states, data, sector=512, keys=None, ident=bytes([7] * 16), log=bytes(16), log_length=MIB, required=1):
    # 0 identifier | 64k 128k headers | 192k 256k region tables | 1M log | metadata: 1M | BAT: 1M | bitmap blocks, blocks
    # states[i]: 0 absent, 1 undefined, 2 zero, 3 unmapped, 6 present, or the bits of its sectors: 7, partially present
    n = -(-size // block); ratio = (1 << 23) * sector // block; meta = MIB + log_length; bat = meta + MIB; at = bat + MIB
    entries = [0] * ((-(-n // ratio) * (ratio + 1)) if keys else n + (n - 1) // ratio)
    with open(path, "wb") as f:
        def put(where, what): f.seek(where); f.write(what)
        put(0, b"vhdxfile"); put(65536, head(8, ident, log, log_length)); put(131072, head(9, ident, log, log_length))
        for where in 192 << 10, 256 << 10: put(where, regions((META, meta, MIB, required), (BAT, bat, MIB, required)))
        items = [(PARAMS, 4, pack("<II", block, 2 if keys else 0)), (SIZE, 6, pack("<Q", size)), (PAGE83, 6, ident), (SECTOR, 6, pack("<I", sector)), (PHYS, 6, pack("<I", 4096))]
        put(meta, metadata(*items, *([(PARENT, 4, locator(keys))] if keys else [])))
        for i, state in enumerate(states):
            if isinstance(state, list):
                chunk = i // ratio; where = (chunk + 1) * (ratio + 1) - 1
                if not entries[where]: entries[where] = at | 6; at += MIB
                m = bytearray(-(-len(state) // 8))
                for j, bit in enumerate(state): m[j // 8] |= bit << j % 8
                put((entries[where] & -MIB) + i % ratio * (block // sector) // 8, m); state = 7
            if state in (6, 7):
                put(at, data[i * block:(i + 1) * block]); entries[i + i // ratio] = at | state; at += block
            else: entries[i + i // ratio] = state
        put(bat, pack("<%dQ" % len(entries), *entries)); f.truncate(at)
    return bat
def entry(seq, tail, flushed, last, *changes, guid=LOG, torn=False):     # changes: (offset, 4 KiB) or (offset, length of zeros)
    d = b""; pages = b""
    for offset, what in changes:
        if isinstance(what, int): d += b"zero" + pack("<IQQQ", 0, what, offset, seq)
        else:
            d += b"desc" + what[4092:] + what[:8] + pack("<QQ", offset, seq)
            pages += b"data" + pack("<I", seq >> 32) + what[8:4092] + pack("<I", seq & 0xffffffff)
    room = -(-(64 + len(d)) // 4096) * 4096; length = room + len(pages)
    h = b"loge" + pack("<IIIQII", 0, length, tail, seq, len(changes), 0) + guid + pack("<QQ", flushed, last)
    e = bytearray(seal((h + d).ljust(room, b"\0") + pages, length))
    if torn: e[-1] ^= 1
    return bytes(e)
'"$1" "${@:2}"; }

# Images that no tool here makes, built from the specifications (sectors of 512 bytes, little-endian). Content is a dict from
# a grain's number to its bytes, or to 0 for a zeroed grain; disk() gives what such an image must read as.
vmdk_lib='
import struct, zlib
def pad(b, n=512): return bytes(b) + bytes(-len(b) % n)
def save(name, b): open(name, "wb").write(b)
def text(lines, cid="11223344", parent="ffffffff", more="", kind="custom"):
    return ("# Disk DescriptorFile\nversion=1\nCID=%s\nparentCID=%s\ncreateType=\"%s\"\n%s\n# Extent description\n%s\n\n"
            "# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n" % (cid, parent, kind, more, "\n".join(lines))).encode()
def disk(grains, grain, sectors, under=None):
    d = bytearray(under or bytes(sectors * 512))
    for i, g in grains.items(): d[i * grain * 512:(i + 1) * grain * 512] = g or bytes(grain * 512)
    return bytes(d[:sectors * 512])
def grains(seed, n, grain, most):
    rnd = random.Random(seed)
    return {i: (bytes([rnd.randrange(1, 256)]) * 300 + rnd.randbytes(212)) * grain for i in rnd.sample(range(most), n)}

# Hosted, streamed: header (capacity, grain 20, descriptor 28 36, entries 44, directories 48 56, overhead 64, newlines 73,
# algorithm 77), descriptor, grains behind markers (u64 sector, u32 length), marker and table (type 1) wherever a table is full,
# marker and directory (2), marker and footer (3: the header with the directory in its place), end marker.
def stream(content, sectors, grain=128, version=3, descriptor=b"", whole=True, flags=0x30001, footer=True, entries=512):
    d = pad(descriptor)
    def header(gd): return pad(struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", version, flags, sectors, grain, 1 if d else 0, len(d) // 512,
        entries, 0, gd, 128, 0, b"\n \r\n", 1))
    def marker(sectors, kind): return pad(struct.pack("<QII", sectors, 0, kind))
    out = bytearray(header(2**64 - 1) + d)
    out += bytes(128 * 512 - len(out))
    tables, directory = {}, []
    for i in sorted(content):
        t = tables.setdefault(i // entries, [0] * entries)
        if content[i] == 0: t[i % entries] = 1; continue
        t[i % entries] = len(out) // 512
        z = zlib.compress(content[i] if whole else content[i][:sectors * 512 - i * grain * 512])
        out += pad(struct.pack("<QI", i * grain, len(z)) + z)
    for t in range((sectors + grain * entries - 1) // (grain * entries)):
        if t not in tables: directory.append(0); continue
        out += marker(len(pad(bytes(entries * 4))) // 512, 1)
        directory.append(len(out) // 512)
        out += pad(struct.pack("<%dI" % entries, *tables[t]))
    gd = pad(struct.pack("<%dI" % len(directory), *directory))
    out += marker(len(gd) // 512, 2)
    at = len(out) // 512
    out += gd
    if footer: out += marker(1, 3) + header(at) + bytes(512)
    else: out[:512] = header(at)
    return bytes(out)

# COWD: header of 4 sectors (version 4, flags 8, capacity 12, grain 16, directory 20 = sector 4, its entries 24, free sector 28),
# directory, then tables of 4096 entries of 4 bytes and grains as they are needed.
def cowd(content, sectors, grain=1):
    n = (sectors + grain * 4096 - 1) // (grain * 4096)
    out = bytearray(pad(struct.pack("<4sIIIIIII", b"COWD", 1, 3, sectors, grain, 4, n, 0), 2048) + pad(bytes(n * 4)))
    for t in range(n):
        if not any(i // 4096 == t for i in content): continue
        table = len(out)
        struct.pack_into("<I", out, 2048 + t * 4, table // 512)
        out += bytes(4096 * 4)
        for i in sorted(i for i in content if i // 4096 == t):
            struct.pack_into("<I", out, table + i % 4096 * 4, len(out) // 512)
            out += content[i]
    struct.pack_into("<I", out, 28, len(out) // 512)
    return bytes(out)

# seSparse: constant header (u64: magic 0, version 8, capacity 16, grain 24 = 8, table 32 = 64, volatile header 80, directory 128
# and its sectors 136, tables 144, grains 192), volatile header (magic 0, replay flag 24), directory (0x10000000 in the upper
# half, the number of a table in the lower), tables of 4096 u64 (type in the top 4 bits: 1 unmapped, 2 zeros, 3 data; the low
# 12 bits of the number of the grain in bits 48-59, the rest below), grains of 4 KiB.
def sesparse(content, sectors):
    n = (sectors + 8 * 4096 - 1) // (8 * 4096)
    gd, used = [0] * n, sorted({i // 4096 for i in content})
    gd_sectors = len(pad(bytes(n * 8))) // 512
    tables = 8 + gd_sectors
    grains = (tables + 64 * len(used) + 7) // 8 * 8
    t = [bytearray(4096 * 8) for _ in used]
    data = bytearray(4096)                  # grain 0 stays empty
    for i in sorted(content):
        if content[i] == 0: entry = (1 + i % 2) << 60
        else:
            g = len(data) // 4096
            entry = 3 << 60 | (g & 0xfff) << 48 | g >> 12
            data += content[i]
        struct.pack_into("<Q", t[used.index(i // 4096)], i % 4096 * 8, entry)
    for k, i in enumerate(used): gd[i] = 0x10000000 << 32 | k
    h = [0xcafebabe, 0x200000001, sectors, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1, 8, gd_sectors, tables, 64 * len(used),
         0, 0, 0, 0, grains, len(data) // 512]
    out = pad(struct.pack("<26Q", *h)) + pad(struct.pack("<Q", 0xcafecafe))
    out = pad(out, 4096) + pad(struct.pack("<%dQ" % n, *gd)) + b"".join(t)
    return out + bytes(grains * 512 - len(out)) + data
'
vmdk_py() { py "$vmdk_lib$1" "${@:2}"; }

# A VDI built from VirtualBox's VDICore.h, and what is in it. The layout of version 1.1 (little-endian):
#   0 text[64]  64 signature  68 version  72 header size  76 type  80 flags  84 comment[256]  340 offset of the map
#   344 offset of the data  348 geometry[16]  364 -  368 u64 disk size  376 block size  380 extra data per block
#   384 blocks  388 allocated  392 UUID  408 of its last change  424 of the parent  440 of the parent's last change
#   map: u32 per block, the number of a block in the data; ~0: not here, ~1: zeros.
# Version 0.2 has no header size, no offsets, no extra data, no last UUID; map at 420, data right behind it.
vdi_py='
import struct
def uuid(n): return bytes([n]) * 16
def pack(blocks, bs, extra, filler):      # blocks: bytes, None (not here) or 0 (zeros); stored back to front
    m, data, n = [0] * len(blocks), b"", 0
    for i in reversed(range(len(blocks))):
        if blocks[i] is None: m[i] = 0xffffffff
        elif blocks[i] == 0: m[i] = 0xfffffffe
        else:
            m[i] = n; n += 1
            data += filler * extra + blocks[i]
    return struct.pack("<%dI" % len(m), *m), data, n
def vdi(path, kind, size, bs, blocks, own=1, changed=2, parent=0, parent_changed=0, extra=0):
    m, data, n = pack(blocks, bs, extra, b"E")
    h = b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0")
    h += struct.pack("<IIIII256sII16xIQIIII", 0xbeda107f, 0x10001, 400, kind, 0, b"", 512, 512 + (len(m) + 511) // 512 * 512,
                     0, size, bs, extra, len(blocks), n)
    h += uuid(own) + uuid(changed) + uuid(parent) + uuid(parent_changed)
    h += struct.pack("<4I", 0, 0, 0, 512)
    open(path, "wb").write(h.ljust(512, b"\0") + m.ljust((len(m) + 511) // 512 * 512, b"\0") + data)
def vdi0(path, kind, size, bs, blocks):
    m, data, n = pack(blocks, bs, 0, b"")
    h = b"<<< innotek VirtualBox Disk Image >>>\n".ljust(64, b"\0")
    h += struct.pack("<IIII256s16xQIII", 0xbeda107f, 2, kind, 0, b"", size, bs, len(blocks), n) + uuid(1) + uuid(2) + uuid(0)
    open(path, "wb").write(h + m + data)
rnd = random.Random(3)
def some(n, bs, empty): return [rnd.choice(empty) if rnd.random() < .5 else rnd.randbytes(bs) for i in range(n)]
def flat(*layers):      # the first that has the block
    return b"".join(next((x for x in c if x is not None), 0) or bytes(len(blk)) for c in zip(*layers))
'

# Random writes, holes and reads by several threads, each in a part of its own, against a plain file.
fsx_py='
import threading
libc = ctypes.CDLL(None, use_errno=True)
def fsx(m, model, n, seed, threads, sync=.02):
    if seed % 2: os.open(m, os.O_RDONLY)                # then the writer is cached, too
    fd = os.open(m, os.O_RDWR); mo = os.open(model, os.O_RDWR); size = os.fstat(mo).st_size
    assert os.fstat(fd).st_size == size
    def work(t):
        rnd = random.Random(seed * 100 + t); lo = size * t // threads // 512 * 512; hi = size * (t + 1) // threads // 512 * 512
        for i in range(n):
            off = rnd.randrange(lo, hi); ln = min(rnd.choice([1, 100, 512, 4096, 20000, 65536, 150000, 400000]), hi - off); k = rnd.random()
            if rnd.random() < .5: off &= ~4095; off = max(off, lo); ln = min(max(512, ln & ~511), hi - off)
            if k < .55: b = rnd.randbytes(ln); os.pwrite(fd, b, off); os.pwrite(mo, b, off)
            elif k < .7:
                if libc.fallocate(fd, 3, ctypes.c_long(off), ctypes.c_long(ln)): bad.append(ctypes.get_errno())
                os.pwrite(mo, bytes(ln), off)
            elif k < .7 + sync: os.fsync(fd)
            elif os.pread(fd, ln, off) != os.pread(mo, ln, off): bad.append((t, i, off, ln))
    bad = []
    ts = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert not bad, bad[:5]
'

# ---- build and installation ------------------------------------------------------------------------------------

t_binary_is_static_small_and_stripped() {
    ldd "$fx" 2>&1 | grep -q 'not a dynamic executable\|statically linked'
    [ "$(stat -c %s "$fx")" -le 1048576 ] || fail "larger than 1 MiB"
    readelf -S "$fx" >sections
    not grep -q '\.symtab' sections
}

t_same_sources_give_the_same_bytes() {
    mkdir -p other/build
    cp "$top"/Makefile "$top"/fuseexp.[ch] "$top"/README "$top"/test.sh other/
    cp -a "$libs" other/build/deps
    make -s -C other build/fuseexp >make.log 2>&1 || { cat make.log; false; }
    cmp other/build/fuseexp "$fx"
}

t_install_puts_binary_helpers_and_manual() {
    make -s -C "$top" install DESTDIR="$PWD/root" PREFIX=/usr >/dev/null
    cmp root/usr/bin/fuseexp "$fx"
    same "$(readlink root/sbin/mount.fuseexp)" /usr/bin/fuseexp
    same "$(readlink root/sbin/mount.fuse.fuseexp)" /usr/bin/fuseexp
    MANWIDTH=120 man -l root/usr/share/man/man8/fuseexp.8 2>man.err >man.txt
    grep -q 'SYNOPSIS' man.txt; grep -q -- '--partition' man.txt
    [ ! -s man.err ] || { cat man.err; false; }
    make -s -C "$top" uninstall DESTDIR="$PWD/root" PREFIX=/usr
    same "$(find root -type f -o -type l)" ""
}

t_runs_in_an_empty_chroot_with_dev_fuse_and_proc() {
    mkdir -p root/dev root/proc
    cp "$fx" root/fuseexp
    mknod root/dev/fuse c 10 229
    random root/image 64
    export -f leave_others
    unshare -m bash -ec 'leave_others; mount -t proc proc root/proc; chroot root /fuseexp -q --format raw /image /m
        cmp root/image root/m; chroot root /fuseexp --umount /m; [ ! -e root/m ]'
}

t_help_lists_every_option_that_readme_explains() {
    "$fx" --help >help
    grep -oE -- '--[a-z][a-z-]+' help | sort -u >in_help
    while read -r opt; do grep -q -- "$opt" "$top/README" || fail "README lacks $opt"; done <in_help
    "$fx" --version | grep -q '^fuseexp [0-9]'
    "$fx" --formats | grep -q '^raw '
}

# ---- reading ---------------------------------------------------------------------------------------------------

# Every way to read the same bytes, on an image of an odd size, through OPTIONS.
check_reading() {
    random img 700
    printf 'odd tail' >>img
    "$fx" -q "$@" img m
    cmp img m
    same "$(stat -c %s m)" "$(stat -c %s img)"
    py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY)
size = os.fstat(a).st_size
rnd = random.Random(1)
for i in range(600):
    off = rnd.randrange(size + 5000); n = rnd.choice([1, 7, 512, 4095, 4097, 65536, 300000])
    assert os.pread(a, n, off) == os.pread(b, n, off), (off, n)
assert os.pread(b, 10, size) == b"" and os.pread(b, 10, 2**62) == b"" and os.pread(b, 100, size - 3) == b"ail"
ma, mb = mmap.mmap(a, 0, prot=mmap.PROT_READ), mmap.mmap(b, 0, prot=mmap.PROT_READ)
assert ma[:] == mb[:]
c = os.open("copy", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
off = 0
while off < size:
    off += os.sendfile(c, b, off, size - off)
r, w = os.pipe()
os.lseek(c, 0, 0)
off = 0
while off < size:
    n = os.splice(b, w, min(65536, size - off), offset_src=off)
    got = os.read(r, n)
    while len(got) < n: got += os.read(r, n - len(got))
    assert got == os.pread(a, n, off)
    off += n
'
    cmp img copy
    py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY | os.O_DIRECT)
size = os.fstat(a).st_size
buf = mmap.mmap(-1, 1 << 21)
for off, n in [(0, 4096), (512, 512), (4096, 1 << 20), (0, 1 << 21), (size - size % 4096, 4096), (1536, 999 * 512)]:
    got = os.preadv(b, [memoryview(buf)[:n]], off)
    assert buf[:got] == os.pread(a, n, off) and got == min(n, size - off), (off, n, got)
'
    "$fx" --umount m
    [ ! -e m ] || fail "the mountpoint was left behind"
}
t_reads_back_through_passthrough() { check_reading; }
t_reads_back_through_workers() { check_reading --no-passthrough; }
t_reads_back_with_one_thread() { check_reading --no-passthrough -s; }
t_reads_back_with_direct_io() { check_reading --direct-io; }
t_reads_back_when_writable() { check_reading -w; }

t_two_processes_read_at_once() {
    random img 4096
    "$fx" -q --no-passthrough img m
    cmp img m & local a=$!
    cmp img m & local b=$!
    dd if=m of=direct bs=96k iflag=direct status=none
    wait $a; wait $b; cmp img direct
    "$fx" --umount m
}

t_ext4_image_loop_mounts_and_reads_through() {
    mkdir files mnt; cp "$top"/fuseexp.c files/; random files/random 1000
    mkfs.ext4 -q -d files img 32M
    "$fx" -q img m
    e2fsck -fn m >/dev/null 2>&1
    mount -o ro,loop m mnt
    diff -r --exclude=lost+found files mnt
    umount mnt
    "$fx" --umount m
}

t_ext4_is_written_through_a_loop_device() {
    truncate -s 64M img; mkfs.ext4 -q img; mkdir mnt
    "$fx" -q -w img m
    mount -o loop m mnt
    random mnt/a 2000; cp mnt/a a; mkdir mnt/d; cp -r /etc/apt mnt/d/
    fstrim mnt || true
    umount mnt
    "$fx" --umount m
    e2fsck -fn img >/dev/null 2>&1
    mount -o ro,loop img mnt
    cmp a mnt/a; diff -r /etc/apt mnt/d/apt
    umount mnt
}

t_xfs_is_written_through_a_loop_device() {
    truncate -s 320M img; mkfs.xfs -q img; mkdir mnt
    "$fx" -q -w img m
    xfs_repair -n m >/dev/null 2>&1
    mount -o loop m mnt
    random mnt/a 2000; cp mnt/a a
    umount mnt
    xfs_repair -n m >/dev/null 2>&1
    "$fx" --umount m
    mount -o ro,loop img mnt; cmp a mnt/a; umount mnt
}

t_seek_data_and_hole_are_the_images_own() {
    truncate -s 1M img; random data 16
    dd if=data of=img bs=4k seek=20 conv=notrunc status=none; dd if=data of=img bs=4k seek=100 conv=notrunc status=none
    truncate -s 1048999 img
    for opt in --no-passthrough "" --direct-io; do
        "$fx" -q $opt img m
        py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY)
def seek(f, off, how):
    try: return os.lseek(f, off, how)
    except OSError as e: return -e.errno
for off in list(range(0, 1049000, 3000)) + [1048998, 1048999, 1049000, 2**40]:
    for how in (os.SEEK_DATA, os.SEEK_HOLE):
        assert seek(a, off, how) == seek(b, off, how), (off, how, seek(a, off, how), seek(b, off, how))
assert os.fstat(a).st_blocks == os.fstat(b).st_blocks
'
        "$fx" --umount m
    done
}

t_attributes_and_statfs_make_sense() {
    random img 100; touch -d '2020-02-02 02:02:02 UTC' img
    "$fx" -q img m
    same "$(stat -c '%a %u %g %s %h %Y' m)" "400 0 0 409600 1 1580608922"
    same "$(stat -f -c '%s %b' m)" "4096 100"
    "$fx" --umount m
    "$fx" -q -w --mode 640 --uid 12 --gid 34 img m
    same "$(stat -c '%a %u %g' m)" "640 12 34"
    "$fx" --umount m
}

t_writers_are_not_cached_and_readers_see_what_they_wrote() {
    random img 64; cp img model
    "$fx" -q -f -w --no-passthrough --format raw img m 2>log &
    wait_for test -s m
    py '
import subprocess
a = bytes(4096)
def reads():
    told = open("log").read().count("\n"); os.kill(int(sys.argv[1]), 10)
    while open("log").read().count("\n") == told: pass
    return int(open("log").read().splitlines()[told].split(" reads")[0].split()[-1])
def again(fd, n=50):                                        # how many of n reads of a page come through
    before = reads()
    for i in range(n): os.pread(fd, 4096, 8192)
    return reads() - before
w = os.open("m", os.O_RDWR)
print("direct", again(w))
r = os.open("m", os.O_RDONLY)                               # beside a direct handle all are
print("beside", again(r))
mm = mmap.mmap(w, 262144); mm[100:105] = b"hello"; mm.flush()
assert os.pread(r, 5, 100) == b"hello" == os.pread(w, 5, 100)
os.pwrite(w, b"x" * 4096, 0); assert mm[0:5] == b"xxxxx" and os.pread(r, 5, 100) == b"xxxxx"
mm.close(); os.close(r); os.close(w)
while True:                                                 # the first one is cached: so are all
    c = [os.open("m", os.O_RDONLY)]                         # (the kernel sends RELEASE when it likes)
    if again(c[0], 3) < 3: break
    os.close(c[0])
assert os.pread(c[0], 5, 100) == b"xxxxx"
w = os.open("m", os.O_WRONLY); os.pwrite(w, b"y" * 4096, 0)
assert os.pread(c[0], 5, 100) == b"yyyyy"
print("cached", again(c[0]))
os.close(w); os.close(c[0])
w = os.open("m", os.O_RDWR); os.pwrite(w, b"z" * 4096, 0); os.close(w)
r = os.open("m", os.O_RDONLY); assert os.pread(r, 5, 100) == b"zzzzz"; os.close(r)
model = bytearray(open("model", "rb").read()); model[0:4096] = b"z" * 4096
rnd = random.Random(5); fds = []
for i in range(4000):
    k = rnd.random(); off = rnd.randrange(262144 - 9000); n = rnd.choice([1, 100, 4096, 9000])
    if k < .1 and len(fds) < 6: fds.append(os.open("m", rnd.choice([os.O_RDONLY, os.O_RDWR, os.O_RDWR])))
    elif k < .2 and fds: os.close(fds.pop(rnd.randrange(len(fds))))
    elif k < .5:
        try: os.pwrite(rnd.choice(fds), b := rnd.randbytes(n), off); model[off:off + n] = b
        except (OSError, IndexError): pass
    elif fds: assert os.pread(rnd.choice(fds), n, off) == model[off:off + n], i
open("model", "wb").write(model)' "$(supervisor_of)" >out
    awk '{ n[$1] = $2 } END { exit !(n["direct"] >= 50 && n["beside"] >= 50 && n["cached"] <= 2) }' out || { cat out; false; }
    cmp m model; "$fx" --umount m; wait; cmp img model
}

t_setattr_follows_qemus_rules() {
    random img 16; cp img copy
    "$fx" -q img m
    py '
def no(err, f, *a):
    try: f(*a)
    except OSError as e: assert e.errno == err, e
    else: raise AssertionError("allowed")
no(errno.EROFS, os.chmod, "m", 0o600)
no(errno.EROFS, os.truncate, "m", 0)
no(errno.EROFS, os.open, "m", os.O_RDWR)
no(errno.EROFS, os.utime, "m")'
    "$fx" --umount m
    "$fx" -q -w --allow-other=off img m
    py '
def no(err, f, *a):
    try: f(*a)
    except OSError as e: assert e.errno == err, e
    else: raise AssertionError("allowed")
no(errno.EPERM, os.chmod, "m", 0o644)
no(errno.EOPNOTSUPP, os.chown, "m", 1, 1)
no(errno.EOPNOTSUPP, os.utime, "m")
os.chmod("m", 0o400)
assert os.stat("m").st_mode & 0o777 == 0o400'
    "$fx" --umount m
    cmp img copy
}

t_directory_lists_its_files_and_takes_no_others() {
    random img 16; mkdir d
    "$fx" -q -w img d
    same "$(ls d)" disk
    same "$(find d -type f -size +0)" d/disk
    same "$(stat -c %a d)" 500
    not touch d/new 2>err; grep -q 'not permitted' err
    not mkdir d/new 2>err; not rm -f d/disk 2>err; not mv d/disk d/e 2>err; not ln d/disk d/e 2>err
    cmp img d/disk
    umount d
    gone
    same "$(ls -A d)" ""
}

# ---- writing ---------------------------------------------------------------------------------------------------

t_nothing_is_written_without_w() {
    random img 16; cp img copy; stat -c '%y %z' img >before
    "$fx" -q img m
    not dd if=/dev/zero of=m conv=notrunc count=1 2>err; grep -q 'Read-only' err
    "$fx" --umount m
    cmp img copy; same "$(stat -c '%y %z' img)" "$(cat before)"
}

t_random_writes_match_a_model() {
    for opt in "" --direct-io --growable; do
        random img 512; cp img model
        "$fx" -q -w $opt img m
        py '
a, b = os.open("model", os.O_RDWR), os.open("m", os.O_RDWR)
size = os.fstat(a).st_size
rnd = random.Random(7)
for i in range(800):
    n = rnd.choice([1, 3, 512, 4096, 5000, 70000, 1048576]); off = rnd.randrange(size)
    n = min(n, size - off)
    if rnd.random() < .5:
        d = rnd.randbytes(n)
        assert os.pwrite(a, d, off) == os.pwrite(b, d, off) == n
    else:
        assert os.pread(a, n, off) == os.pread(b, n, off)
os.fsync(b)
'
        cmp model m
        "$fx" --umount m
        cmp model img
    done
}

t_fio_verifies_what_it_wrote() {
    truncate -s 64M img
    for opt in "" --direct-io --growable; do
        "$fx" -q -w $opt img m
        for direct in 0 1; do
            fio --name=v --filename="$PWD/m" --size=64M --rw=randwrite --bsrange=512-128k --bs_unaligned=0 --blockalign=512 \
                --ioengine=libaio --iodepth=16 --direct=$direct --verify=crc32c --verify_fatal=1 --number_ios=1500 \
                --output=fio.log || { cat fio.log; false; }
        done
        "$fx" --umount m
    done
}

t_writes_stop_at_the_end_unless_growable() {
    random img 16; cp img copy
    "$fx" -q -w img m
    py '
f = os.open("m", os.O_RDWR)
assert os.pwrite(f, b"x" * 100, 65536 - 10) == 10
for off in (65536, 70000, 2**50):
    try: os.pwrite(f, b"x", off)
    except OSError as e: assert e.errno == errno.ENOSPC, e
    else: raise AssertionError(off)
'
    same "$(stat -c %s m)" 65536
    "$fx" --umount m
    same "$(stat -c %s img)" 65536
    cp copy img
    for opt in --no-passthrough ""; do
        "$fx" -q -w --growable $opt img m
        printf 'more' >>m
        same "$(stat -c %s m)" "$(stat -c %s img)"
        fallocate -l 200000 m; same "$(stat -c %s m)" 200000
        printf 'far' | dd of=m bs=1 seek=300000 conv=notrunc status=none
        same "$(stat -c %s m)" 300003
        "$fx" --umount m
        { cat copy; printf 'more'; } | cmp -n 65540 - img
        same "$(stat -c %s img)" 300003
        cp copy img
    done
}

t_opening_with_o_trunc_empties_only_growable_images() {
    random img 64; random new 64; cp img copy
    for opt in "" --offset=4096; do
        "$fx" -q -w $opt img m
        not cp new m 2>err; grep -q 'not permitted' err
        not sh -c ': >m' 2>err
        not dd if=new of=m bs=4k count=10 2>err
        cmp -i "${opt:+4096:}0" img m
        "$fx" --umount m
        cmp img copy
    done
    "$fx" -q -w img m
    cat new 1<>m; cmp new m; dd if=new of=m conv=notrunc status=none
    "$fx" --umount m
    cmp new img
    "$fx" -q -w --growable img m
    head -c 1000 new >m; same "$(stat -c %s m)" 1000
    head -c 20 new >m; echo BB >m; same "$(cat m)" BB
    "$fx" --umount m; same "$(stat -c %s img)" 3
}

t_truncate_works_on_whole_raw_images_only() {
    random img 16; cp img copy
    "$fx" -q -w img m
    truncate -s 5000 m; same "$(stat -c %s img)" 5000
    truncate -s 9000 m; same "$(stat -c %s img)" 9000
    "$fx" --umount m
    cmp -n 5000 img copy; cmp -i 5000:0 -n 4000 img /dev/zero
    cp copy img
    "$fx" -q -w --size 4096 img m
    not truncate -s 100 m 2>err; grep -q 'not supported' err
    "$fx" --umount m
    cmp img copy
}

t_fallocate_punches_zeroes_and_allocates() {
    random img 256; cp img model
    "$fx" -q -w img m
    fallocate -p -o 8192 -l 100000 m; fallocate -z -o 300001 -l 5000 m; fallocate -o 600000 -l 50000 m
    head -c 100000 /dev/zero | dd of=model bs=4k seek=2 conv=notrunc status=none
    head -c 5000 /dev/zero | dd of=model bs=1 seek=300001 conv=notrunc status=none
    cmp model m
    py '
f = os.open("m", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
def fa(mode, off, n): return 0 if libc.fallocate(f, mode, ctypes.c_long(off), ctypes.c_long(n)) == 0 else ctypes.get_errno()
assert fa(0, 1 << 20, 4096) == errno.ENOSPC
assert fa(1, 1 << 20, 4096) == errno.ENOSPC and fa(1, (1 << 20) - 100, 4096) == errno.ENOSPC     # no room past the end, ever
assert fa(3, 1 << 20, 4096) == 0                # there is nothing to punch
assert fa(8, 0, 4096) == errno.EOPNOTSUPP       # collapse
assert fa(3, (1 << 20) - 100, 4096) == 0        # punch across the end
'
    "$fx" --umount m
    same "$(stat -c %s img)" 1048576
    [ "$(stat -c %b img)" -lt 1900 ] || fail "the host's space was not freed"
}

t_disk_full_is_told_to_the_writer_and_in_the_end() {
    mkdir small; mount -t tmpfs -o size=1M none small; truncate -s 8M small/img
    "$fx" -q -f -w small/img m 2>log & local pid=$!
    wait_for test -s m
    not dd if=/dev/zero of=m bs=64k count=100 conv=notrunc 2>err; grep -q 'No space left' err
    umount m
    not wait $pid
    grep -q 'write error.*No space' log; grep -q 'not everything' log
}

t_failed_flush_is_remembered() {
    random img 16
    FUSEEXP_FAIL_OP=sync "$fault" -q -f -w img m 2>log & local pid=$!
    wait_for test -s m
    py '
f = os.open("m", os.O_RDWR)
os.pwrite(f, b"x", 0)
for i in range(2):
    try: os.fsync(f)
    except OSError as e: assert e.errno == errno.EIO
    else: raise AssertionError("fsync said all is well")
try: os.close(f)
except OSError as e: assert e.errno == errno.EIO
else: raise AssertionError("close said all is well")
'
    expect 1 "$fx" --umount m
    grep -q 'reported failure' err
    not wait $pid
}

# The kernel tells one caller about a lost write-back; of two that sync at the same time both must hear of it.
t_parallel_syncs_on_a_full_disk_all_fail() {
    local loop k o
    mkdir t mnt d; mount -t tmpfs -o size=48M t t
    truncate -s 200M t/fs; mkfs.ext4 -q t/fs; loop=$(losetup -f --show t/fs); mount "$loop" mnt
    fallocate -l 30M mnt/img; fallocate -l 8M mnt/img.001; cp mnt/img.001 mnt/img.002
    (cd mnt && qemu-img create -q -f qcow2 -o data_file=data,preallocation=falloc q 16M)
    qemu-img create -q -f qcow2 -o preallocation=falloc mnt/p 16M; sync -f mnt
    printf '%s\n' 'direct mnt/img m --direct-io' 'cached mnt/img m --no-passthrough' 'directory mnt/img d' 'split mnt/img.001 m' \
        'data mnt/q m' 'qcow2 mnt/p m' >set-ups
    for k in 1 2 3 4 5; do
        while read -r name img m o; do
            case $name in data | qcow2) ;; *) o="$o --format raw" ;; esac
            "$fx" -q -w $o "$img" "$m" -- sh -c 'dd if=/dev/zero of=t/ballast bs=4k status=none 2>/dev/null; exec python3 -c "
import mmap, os, sys, threading
path, name, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
barrier = threading.Barrier(4)
def writer(i):
    f = os.open(path, os.O_RDWR | os.O_DIRECT | (os.O_DSYNC if i % 2 else 0)); b = mmap.mmap(-1, 4096); b[:] = bytes([64 + k * 4 + i]) * 4096
    at = (6 + k) * 1048576 + i * 65536
    barrier.wait()
    try:
        os.pwrite(f, b, at)
        if i % 2 == 0: os.fsync(f)
        os.write(1, f\"{name} {at} {64 + k * 4 + i}\\n\".encode())     # one write: lines do not mix
    except OSError: pass
for t in [threading.Thread(target=writer, args=(i,)) for i in range(4)]: t.start()" "$0" "$1" "$2"' \
                "$([ $m = d ] && echo d/disk || echo $m)" $name $k >>acks 2>>log || true
            rm t/ballast 2>>log || break 2      # the file system gave up
        done <set-ups
    done
    [ "$(grep -c 'flush failed' log)" -ge 8 ]
    umount mnt; mount "$loop" mnt
    "$fx" -q mnt/q m; "$fx" -q mnt/p m2; cat mnt/img.001 mnt/img.002 >both
    py '
shown = {"data": "m", "qcow2": "m2", "split": "both"}
acks = [l.split() for l in open("acks")]
lost = [a for a in acks if os.pread(os.open(shown.get(a[0], "mnt/img"), os.O_RDONLY), 4096, int(a[1])) != bytes([int(a[2])]) * 4096]
assert not lost, lost'
    "$fx" --umount m; "$fx" --umount m2
}

# Another program truncates what is written to: whoever syncs or closes hears of it, now and later, and so does the shell.
t_file_truncated_underneath_fails_its_writers() {
    local o img shorter at
    mkdir d
    while read -r img shorter at o; do
        rm -f img*; random img 512; split -b 1M -d -a 3 --additional-suffix= img img.; mv img.000 img.0; mv img.001 img.002; mv img.0 img.001
        qemu-img create -q -f qcow2 -o preallocation=full img.q 2M
        "$fx" -q -w -f $o $img m 2>log & local pid=$!
        wait_for test -s m
        expect 0 "$fx" --info -U -q "${img%%:*}" >info
        truncate -s "$shorter" "${img##*:}"
        py '
path, at = sys.argv[1], int(sys.argv[2])
f = os.open(path, os.O_RDWR)
def fails(fn, *a):
    try: fn(*a)
    except OSError as e: assert e.errno == errno.EIO, e
    else: raise AssertionError((fn, a))
try: os.pwrite(f, b"n" * 4096, at)      # would make it as long as it was, or not
except OSError as e: assert e.errno == errno.EIO
fails(os.fsync, f); fails(os.fsync, f)
g = os.open(path, os.O_RDWR | os.O_DSYNC); fails(os.pwrite, g, b"n", 0)
fails(os.pread, f, 4096, 1 << 20)       # in what was cut off, behind which somebody has written
fails(os.close, f)' m "$at"
        expect 1 "$fx" --umount m; not wait $pid
        grep -q 'truncated it to' log
    done <<'EOF2'
img 500000 2093056 --format=raw
img 500000 2093056 --format=raw --growable --no-passthrough
img 500000 0 --format=raw
EOF2
    # A part of a split image; the tables and the data of a qcow2 image.
    rm -f img*; random img 512; head -c 1M img >s.001; tail -c 1M img >s.002; qemu-img create -q -f qcow2 -o preallocation=full img.q 2M
    for o in "s.001 s.002" "img.q img.q"; do
        expect 125 "$fx" -q -w ${o% *} m -- sh -c 'truncate -s 400000 "$0"; dd if=/dev/zero of=m bs=4k count=1 conv=notrunc,fsync status=none 2>err && echo synced
            exit 0' "${o#* }" >out
        same "$(cat out)" ""
    done
    # We ourselves may make it shorter and longer.
    truncate -s 2M img
    "$fx" -q -w --format raw img m
    for k in 1M 3M 100 2M; do truncate -s $k m; dd if=img of=m bs=64k count=1 conv=notrunc,fsync status=none; done
    "$fx" --umount m
}

# bad_device NAME FILE DIRECT SECTOR+COUNT...: FILE as a file of this name; reads that touch these sectors fail, and are listed in NAME.tries.
bad_py='
import ctypes, os, struct, sys
name, image, direct = sys.argv[1], os.open(sys.argv[2], os.O_RDONLY), int(sys.argv[3])
bad = [tuple(map(int, a.split("+"))) for a in sys.argv[4:]]; size = os.fstat(image).st_size
dev = os.open("/dev/fuse", os.O_RDWR); tries = open(name + ".tries", "w", 1)
assert ctypes.CDLL(None).mount(b"bad", os.path.realpath(name).encode(), b"fuse", 7, b"fd=%d,rootmode=100000,user_id=0,group_id=0,allow_other" % dev) == 0
def reply(unique, body=b"", error=0): os.write(dev, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
attr = struct.pack("<QII", 3600, 0, 0) + struct.pack("<QQQQQQIII7I", 1, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100400, 1, 0, 0, 0, 4096, 0)
while True:
    try: request = os.read(dev, 1 << 21)
    except InterruptedError: continue
    except OSError: break
    op, unique = struct.unpack_from("<IQ", request, 4)
    if op == 26: reply(unique, struct.pack("<IIIIHHIIHHI", 7, 31, 131072, 1, 16, 12, 65536, 1, 32, 0, 0).ljust(64, b"\0"))
    elif op == 3: reply(unique, attr)
    elif op == 14: reply(unique, struct.pack("<QII", 0, direct, 0))
    elif op == 15:
        at, n = struct.unpack_from("<QI", request, 48); hit = [s for s, k in bad if s * 512 < at + n and (s + k) * 512 > at]
        if hit: print(at // 512, n // 512, file=tries)
        reply(unique, b"" if hit else os.pread(image, n, at), 5 if hit else 0)
    elif op in (18, 25, 38): reply(unique)
    elif op not in (2, 36, 42): reply(unique, error=38)
'
bad_device() {
    : >"$1"
    python3 -c "$bad_py" "$@" 2>"$1.log" 3>&- &
    wait_for test -s "$1"
}

t_bad_sectors_cost_themselves_only() {
    local loop img n o
    tr '\0' x </dev/zero | head -c 6291456 >s.raw
    bad_device uncached s.raw 1 1001+1 3000+8 5003+20 9000+4; loop=$(losetup -f -r --direct-io=on --show uncached); blockdev --setra 256 "$loop"
    bad_device cached s.raw 0 1001+1 3000+8 5003+20 9000+4
    cat >rd.py <<'P'
import mmap, os, sys
step = int(sys.argv[2]); f = os.open(sys.argv[1], os.O_RDONLY | (os.O_DIRECT if sys.argv[3] == "direct" else 0)); b = mmap.mmap(-1, step); bad = 0
for at in range(0, 6291456, step):
    try:
        n = os.preadv(f, [b], at)
        if n < step and sys.argv[3] == "direct": bad += 1       # the good front
        assert b[:n] == b"x" * n and os.fstat(f).st_size == 6291456
    except OSError: bad += 1
print(bad)
P
    for img in "$loop" cached; do
        fresh() { blockdev --flushbufs "$loop"; rm -f map; : >uncached.tries; : >cached.tries; }
        fresh; "$fx" -q --format raw --on-error=zero --error-map=map $img m -- cp m z 2>err
        same "$(tr -d x <z | wc -c)" $((33 * 512))
        same "$(ddrescuelog -b 512 -l- map | wc -l)" 33
        # One line for each range, whatever the requests were.
        for o in "4096 cached" "512 direct" "65536 cached"; do
            fresh; "$fx" -f -q --format raw --no-passthrough --error-map=map $img m -- python3 rd.py m $o >out 2>err
            case $o in 4096*) same "$(cat out)" 6 ;; 512*) same "$(cat out)" 33 ;; esac
            [ $img = cached ] || same "$(grep -o 'read error at .*bytes' err | sort)" "$(printf '%s\n' 'read error at 1536000, 4096 bytes' \
                'read error at 2561536, 10240 bytes' 'read error at 4608000, 2048 bytes' 'read error at 512512, 512 bytes' | if [ "$o" = "65536 cached" ]; then cat err | grep -o 'read error at .*bytes' | sort; else cat; fi)"
            [ "${o% *}" = 65536 ] || same "$(ddrescuelog -b 512 -l- map | wc -l)" 33
        done
        # Direct reads of many sectors give the good front, and the file stays as long as it is.
        fresh; "$fx" -q --format raw --no-passthrough $img m -- python3 rd.py m 65536 direct >out 2>err; same "$(cat out)" 4
    done
    # A disk that dies is not asked again for what has just failed, but by who has no page cache above it.
    fresh; "$fx" -q --format raw "$loop" m -- sh -c 'for i in 1 2 3 4 5; do dd if=m of=/dev/null bs=4k skip=125 count=1 status=none; done 2>/dev/null
        wc -l <uncached.tries; dd if=m of=/dev/null bs=512 skip=1001 count=1 iflag=direct status=none 2>/dev/null; wc -l <uncached.tries' >out || true
    [ "$(sed -n 1p out)" -le 3 ] || fail "the first five reads: $(cat out)"
    [ "$(sed -n 2p out)" -gt "$(sed -n 1p out)" ] || fail "not tried again: $(cat out)"
    losetup -d "$loop"; umount uncached cached
}

# What lies beside a bad sector in the image's file is not lost: tables, and clusters that are compressed.
t_bad_sectors_beside_tables_and_clusters_cost_themselves_only() {
    local loop host
    random raw 512; qemu-img convert -f raw -O qcow2 -o cluster_size=4096 raw img
    host=$(($(od -An -tu8 --endian=big -j$(($(l2_of img) + 8 * 100)) -N8 img) & 0xffffffffffff00))
    bad_device uncached img 1 $((host / 512 + 3))+1; loop=$(losetup -f -r --direct-io=on --show uncached); blockdev --setra 512 "$loop"
    "$fx" -q --format qcow2 --on-error=zero "$loop" m -- cp m z
    cp raw want; dd if=/dev/zero of=want bs=512 seek=$((100 * 8 + 3)) count=1 conv=notrunc status=none; cmp z want
    losetup -d "$loop"; umount uncached
    # Of a table only the entries in the bad sector are lost, here the second half of an L2 table's page; in the sandbox as well.
    qemu-img convert -f raw -O qcow2 -o cluster_size=4096 raw img; bad_device table img 1 $(($(l2_of img) / 512 + 4))+4
    loop=$(losetup -f -r --direct-io=on --show table)
    "$fx" -q --format qcow2 --on-error=zero "$loop" m -- cp m z
    cmp -n $((256 * 4096)) z raw; tail -c +$((256 * 4096 + 1)) z | tr -d '\0' >rest; [ ! -s rest ]
    "$fx" --map --json --sandbox=require --format qcow2 "$loop" >map || true
    same "$(jq -r '.[] | select(.error) | .start' map | head -n 1)" 1048576
    losetup -d "$loop"; umount table
}

# without CALL FLAGS ERRNO COMMAND...: the call (by number; with these flags as its sixth argument, or -1) returns that error, 0: returns 0.
without() {
    python3 -c '
import ctypes, os, struct, sys
call, flags, error = map(int, sys.argv[1:4]); i = lambda code, jt, jf, k: struct.pack("<HBBI", code, jt, jf, k)
prog = i(0x20, 0, 0, 0) + (i(0x15, 0, 3, call) + i(0x20, 0, 0, 16 + 5 * 8) + i(0x15, 0, 1, flags) if flags >= 0 else i(0x15, 0, 1, call))
prog += i(6, 0, 0, 0x50000 | error) + i(6, 0, 0, 0x7fff0000)
buf = ctypes.create_string_buffer(prog); fprog = struct.pack("<HxxxxxxQ", len(prog) // 8, ctypes.addressof(buf))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_char_p(fprog), 0, 0) == 0
os.execvp(sys.argv[4], sys.argv[4:])' "$@"
}

t_kernels_without_preadv2_or_with_a_wrong_one_read_all() {
    local loop case i
    [ "$(uname -m)" = x86_64 ] || skip "numbers of x86-64"
    mkdir mem; mount -t tmpfs mem mem; random mem/img 700; cp mem/img img; qemu-img convert -f raw -O qcow2 img q
    loop=$(losetup -f -r --show img)
    for case in "327 -1 38" "327 8 0" "327 8 95"; do
        for i in img mem/img "$loop" q; do
            echo 3 >/proc/sys/vm/drop_caches
            without $case "$fx" -q --no-passthrough $i m -- cmp m img
            without $case "$fx" -q --direct-io --sandbox=require $i m -- cmp m img
        done
        without $case "$fx" -q --check q
    done
    losetup -d "$loop"
}

t_server_that_could_not_write_refuses_to_serve() {
    [ "$(uname -m)" = x86_64 ] || skip "numbers of x86-64"
    random img 16; qemu-img create -q -f qcow2 q 1M
    refused 1 'cannot be read and written by the serving process: Operation not permitted' without 18 -1 1 "$fx" -q -w --format raw img m
    refused 125 'cannot be read and written' without 18 -1 1 "$fx" -q -w --format raw img m -- true
    refused 1 'cannot be read and written' without 18 -1 1 "$fx" -q -w --growable --format raw img m
    without 18 -1 1 "$fx" -q --format raw img m -- cmp img m
}

# Takes the server's own filter, and tries what it must not allow.
t_sandbox_sends_no_signals_and_looks_at_no_paths() {
    [ "$(uname -m)" = x86_64 ] || skip "numbers of x86-64"
    random img 16; "$fx" -q --sandbox=require img m
    py '
import struct, signal
libc = ctypes.CDLL(None, use_errno=True); server = int(sys.argv[1])
ptrace = lambda *a: libc.ptrace(*map(ctypes.c_void_p, a))
assert ptrace(16, server, 0, 0) == 0; os.waitpid(server, 0x40000000)
n = ptrace(0x420c, server, 0, 0)
if n <= 0: print("SKIP"); sys.exit()
buf = ctypes.create_string_buffer(n * 8)
assert ptrace(0x420c, server, 0, ctypes.addressof(buf)) == n; ptrace(17, server, 0, 0)
r, w = os.pipe(); victim = os.fork()
if victim == 0: signal.pause()
child = os.fork()
if child == 0:
    # getpid() here is not the filter s: of tgkill only the server itself may be named
    out = ctypes.create_string_buffer(256); path = b"/etc/passwd"
    fprog = struct.pack("<HxxxxxxQ", n, ctypes.addressof(buf)); call = libc.syscall; res = []
    libc.prctl(38, 1, 0, 0, 0); assert libc.prctl(22, 2, ctypes.c_char_p(fprog), 0, 0) == 0
    for a in [(234, victim, victim, 15), (200, victim, 15), (62, victim, 15), (129, victim, 15, out), (262, -100, path, out, 0), (4, path, out),
              (6, path, out), (332, -100, path, 0, 0x7ff, out), (257, -100, path, 0), (2, path, 0), (21, path, 0), (89, path, out, 9),
              (101, 16, victim, 0, 0), (310, victim, out, 1, out, 1, 0), (234, server, server, 0)]:
        ctypes.set_errno(0); res.append(call(*a)); res.append(ctypes.get_errno())
    os.write(w, struct.pack("<%di" % len(res), *res)); call(231, 0)
os.waitpid(child, 0); data = os.read(r, 4096); res = struct.unpack("<%di" % (len(data) // 4), data)
assert len(res) == 30 and set(zip(res[0:28:2], res[1:28:2])) == {(-1, 1)} and res[28] == 0, res
os.kill(victim, 9)' "$(server_of)" >out
    "$fx" --umount m
    [ ! -s out ] || skip "this kernel shows no filters"
}

t_read_errors_reach_the_reader_as_eio() {
    random img 64
    FUSEEXP_FAIL_OP=read "$fault" -q --format raw -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    not cat m >out 2>err; grep -q 'Input/output error' err; [ ! -s out ]
    umount m; wait $pid
    grep -q 'read error at' log
    [ "$(wc -l <log)" -le 15 ] || fail "the log is not rate-limited"
}

t_image_truncated_underneath_gives_eio_past_its_end() {
    random img 64; cp img copy
    for opt in --no-passthrough --direct-io; do
        "$fx" -q $opt img m
        truncate -s 100000 img
        cmp -n 98304 copy m                              # 24 whole pages
        not dd if=m of=/dev/null bs=4k skip=25 count=1 2>err; grep -q 'Input/output' err
        not cat m >/dev/null 2>&1
        same "$(stat -c %s m)" 262144
        "$fx" --umount m
        cp copy img
    done
    # Neither is what was lost a hole, which cp would fill with zeros.
    random img 1024; "$fx" -q --no-passthrough img m; truncate -s 2M img
    not cp m out 2>err; grep -q 'Input/output' err
    "$fx" --umount m; cp copy img
    # The kernel serves an open file alone and would just end early: close(2) tells, and the next open is right.
    "$fx" -q img m
    py '
f = os.open("m", os.O_RDONLY)
os.truncate("img", 100000)
while os.read(f, 65536): pass
try: os.close(f)
except OSError as e: assert e.errno == errno.EIO
else: raise AssertionError("close said all is well")'
    not dd if=m of=/dev/null bs=4k skip=25 2>err; grep -q 'Input/output' err
    expect 1 "$fx" --umount m
}

# ---- raw sources -----------------------------------------------------------------------------------------------

t_block_device_is_read_and_written() {
    random img 256; cp img copy
    local dev; dev=$(losetup -f --show img)
    "$fx" -q "$dev" m; cmp m copy; "$fx" --umount m
    "$fx" -q -w "$dev" m
    refused 1 'mounted, or used' "$fx" -q -w "$dev" m2
    printf 'hello' | dd of=m bs=1 seek=5000 conv=notrunc,fsync status=none
    not truncate -s 10 m 2>err
    fallocate -z -o 8192 -l 4096 m
    "$fx" --umount m
    losetup -d "$dev"
    printf 'hello' | cmp -i 0:5000 -n 5 - img; cmp -i 8192:0 -n 4096 img /dev/zero; cmp -i 12288 img copy
}

t_mounted_block_device_is_not_written() {
    truncate -s 16M img; mkfs.ext4 -q img; mkdir mnt
    local dev; dev=$(losetup -f --show img)
    mount "$dev" mnt
    refused 1 'mounted, or used' "$fx" -q -w "$dev" m
    "$fx" -q "$dev" m; "$fx" --umount m
    umount mnt; losetup -d "$dev"
}

t_image_behind_a_loop_device_is_not_written() {
    random img 256; cp img copy; ln img hard; ln -s img link; local dev dev2
    dev=$(losetup -f --show img); mv img moved; cp copy img; ln -sf moved link      # the path in sysfs leads elsewhere now
    local f
    for f in moved hard link; do
        refused 125 "loop device $dev has it open" "$fx" -q --format raw -w $f m -- touch ran
        "$fx" -q --format raw $f m -- cmp m copy
    done
    "$fx" --format raw moved m -- true 2>err; grep -q "note\|loop device $dev" err
    "$fx" -q --format raw -w img m -- true
    # a part, an overlay, a data file, a device below another one, and its partitions
    mv moved s.002; cp copy s.001; refused 1 "s.002: .*loop device $dev " "$fx" -q --format raw -w s.001 m; mv s.002 moved
    losetup -d "$dev"; wait_for sh -c "! losetup -a | grep -q '$PWD/'"
    "$fx" -q --format raw -w moved m -- true
    "$fx" -q --format raw --overlay o.qcow2 copy m -- true
    qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on q.qcow2 1M
    dev=$(losetup -f --show o.qcow2); refused 1 "o.qcow2: .*loop device $dev " "$fx" -q --format raw --overlay o.qcow2 copy m; losetup -d "$dev"
    dev=$(losetup -f --show data); refused 1 "data: .*loop device $dev " "$fx" -q -w q.qcow2 m; losetup -d "$dev"
    dev=$(losetup -f --show -r copy); "$fx" -q --format raw -w copy m -- true; losetup -d "$dev"        # read-only: no reason
    truncate -s 8M disk; printf 'label: dos\n2048,4096\n8192,4096\n' | sfdisk -q disk
    dev=$(losetup -f -P --show disk); [ -b "${dev}p2" ] || { losetup -d "$dev"; return 0; }
    dev2=$(losetup -f --show "${dev}p1")
    refused 1 "${dev}p1: .*loop device $dev2 " "$fx" -q --format raw -w "${dev}p1" m
    refused 1 "$dev: .*loop device $dev2 " "$fx" -q --format raw -w "$dev" m
    "$fx" -q --format raw -w "${dev}p2" m -- true
    losetup -d "$dev2"; dev2=$(losetup -f --show "$dev")
    refused 1 "${dev}p2: .*loop device $dev2 " "$fx" -q --format raw -w "${dev}p2" m
    losetup -d "$dev2"; "$fx" -q --format raw -w "$dev" m -- true; losetup -d "$dev"
}

t_split_images_are_found_and_joined() {
    random whole 100
    for style in 3,1,. 2,0,. 4,1,.; do
        rm -f part*
        split -b 100000 -a "${style%%,*}" --numeric-suffixes="$(echo "$style" | cut -d, -f2)" whole part.
        "$fx" -q "$(find . -name 'part.*' | sort | head -n 1)" m; cmp m whole; "$fx" --umount m
    done
    rm -f part*; split -b 70000 -a 2 whole part.
    "$fx" -q part.aa m; cmp m whole; "$fx" --umount m
    "$fx" -q --no-passthrough part.a? m; cmp m whole
    dd if=m of=direct iflag=direct bs=64k status=none; cmp direct whole; "$fx" --umount m
    # More than ten parts: from .09 to .10, from .az to .ba.
    rm -f part*; split -b 10000 -a 2 --numeric-suffixes=1 whole part.
    "$fx" -q part.01 m; cmp m whole; "$fx" --umount m
    rm -f part*; split -b 10000 -a 2 whole part.
    "$fx" -q part.aa m; cmp m whole; "$fx" --umount m
}

t_split_images_with_lost_or_damaged_parts_are_refused() {
    random whole 100; split -b 100000 -a 3 --numeric-suffixes=1 whole part.
    mv part.003 x; refused 1 'part.003: missing, though part.004' "$fx" -q part.001 m
    mv x part.003; truncate -s 99999 part.002; refused 1 'part.002: part of 99999 bytes' "$fx" -q part.001 m
    "$fx" -q part.001 part.002 part.003 part.004 part.005 m
    cat part.00? | cmp - m; "$fx" --umount m
    "$fx" -q --no-parts part.001 m; cmp m part.001; "$fx" --umount m
    cp part.001 part.000; refused 1 'part.000 is there; name the first' "$fx" -q part.001 m
}

t_later_part_and_list_with_a_gap_are_refused() {
    random whole 100; split -b 100000 -a 3 --numeric-suffixes=1 whole g.
    refused 1 'g.003: .*g.002 is there.*--no-parts' "$fx" -q --format raw g.003 m
    refused 125 'g.003: .*--no-parts' "$fx" -q g.003 m -- touch ran
    refused 1 'g.003: follows g.001' "$fx" -q g.001 g.003 g.004 g.005 m
    refused 1 'g.001: follows g.002\|g.002: .*g.001 is there' "$fx" -q g.002 g.001 g.003 g.004 g.005 m
    refused 1 'g.001: follows g.001' "$fx" -q ./g.001 "$PWD/g.001" m
    refused 1 'g.003: is the next part' "$fx" -q g.001 g.002 m
    refused 1 'g.002: .*g.001 is there' "$fx" -q --format raw --overlay o g.002 g.003 g.004 g.005 m
    "$fx" -q --no-parts g.003 m -- cmp m g.003
    "$fx" -q --no-parts g.001 g.003 m -- sh -c 'cat g.001 g.003 | cmp - m'
    "$fx" -q g.001 g.002 g.003 g.004 g.005 m -- cmp m whole
    mkdir alone; cp g.003 alone/
    refused 1 'the first part is missing' "$fx" -q alone/g.003 m
    split -b 100000 -a 2 whole l.
    refused 1 'l.ac: .*l.ab is there' "$fx" -q l.ac m
    refused 1 'l.ac: follows l.aa' "$fx" -q l.aa l.ac m
    rm l.ab; refused 1 'l.ac: .*l.aa is there' "$fx" -q l.ac m
    cp whole x.img; cp g.001 x.ima; cp whole debian.12      # names that only look like it
    "$fx" -q x.img m -- cmp m whole; "$fx" -q debian.12 m -- cmp m whole
}

# pieces CONTAINER PIECE...: refused alone and together; joined as the message says, the disk is ./truth
pieces() {
    local container=$1
    shift
    refused 1 'looks like the first piece of a .* image, since .*--format raw' "$fx" -q "$1" m
    refused 1 'a .* image is one file; if these files are its pieces, join them' "$fx" -q "$@" m
    "$fx" -q --format raw "$@" joined; cmp joined "$container"; "$fx" -q joined m; cmp -n "$(stat -c %s truth)" m truth
    "$fx" --umount m; "$fx" --umount joined
}

t_pieces_of_a_container_are_refused_and_joined_in_two_steps() {
    local f o all
    random truth 300
    while read -r f o; do
        rm -f img*; qemu-img convert -f raw -O "$f" ${o:+-o} $o truth img
        split -b 300000 -d -a 3 --numeric-suffixes=1 img img.; pieces img img.0*
    done < <(printf '%s\n' qcow2 vdi vpc vhdx qed parallels 'vmdk subformat=monolithicSparse' 'vmdk subformat=streamOptimized')
    # However they are numbered; and what is not a piece: an image by itself, what is longer than the first.
    qemu-img convert -f raw -O qcow2 truth img; rm -f img.*
    split -b 200000 -d -a 9 img img.; pieces img img.0*; rm img.*
    split -b 200000 img img.; pieces img img.a?; rm img.*
    split -b 200000 img; pieces img xa?; rm xa?
    split -b 90000 -d -a 2 --numeric-suffixes=1 img img.; for f in img.0?; do mv $f img.${f#img.0}; done
    refused 1 'the first piece' "$fx" -q img.1 m
    refused 1 'in the list of parts' "$fx" -q --format raw img.* m           # img.1 img.10 img.11 img.2
    mapfile -t all < <(ls -v img.*); pieces img "${all[@]}"; rm img.*
    cp img v.1; cp img v.2; "$fx" -q v.1 m; cmp -n 1228800 m truth; "$fx" --umount m
    cp truth v.2; truncate -s 20M v.2; "$fx" -q v.1 m; cmp -n 1228800 m truth; "$fx" --umount m
    truncate -s 1M v.2; refused 1 'since v.2 is there' "$fx" -q v.1 m
    "$fx" -q --no-parts v.1 m; cmp -n 1228800 m truth; "$fx" --umount m
    gzip -k truth; split -b 900000 truth.gz truth.gz.; refused 1 'gunzip -k unpacks it, when its pieces are joined' "$fx" -q truth.gz.aa m
    refused 1 'v.1: a qcow2 image is one file' "$fx" -q v.1 v.2 m
}

t_pieces_of_a_fixed_vhd_end_in_its_footer() {
    random truth 300
    qemu-img convert -f raw -O vpc -o subformat=fixed,force_size=on truth img
    split -b 300000 -d -a 3 --numeric-suffixes=1 img img.
    refused 1 'the pieces of a vpc image; join them: fuseexp --format raw' "$fx" -q img.001 m
    refused 1 'a vpc image is one file; if these files are its pieces, join them' "$fx" -q img.0* m
    "$fx" -q --format raw img.001 joined; cmp joined img; "$fx" -q joined m; cmp m truth; "$fx" --umount m; "$fx" --umount joined
    # As Virtual PC splits them.
    mv img.001 d.vhd; mv img.002 d.v01; mv img.003 d.v02; mv img.004 d.v03; mv img.005 d.v04
    refused 1 'd.vhd: looks like the first piece of a vpc image, since d.v01 is there' "$fx" -q d.vhd m
    "$fx" -q --format raw d.vhd d.v0* joined; "$fx" -q joined m; cmp m truth; "$fx" --umount m; "$fx" --umount joined
}

t_written_parts_get_their_bytes() {
    random whole 100; cp whole model; split -b 100000 -a 3 --numeric-suffixes=1 whole part.
    "$fx" -q -w part.001 m
    random data 30
    dd if=data of=m bs=1M seek=70001 oflag=seek_bytes conv=notrunc status=none
    dd if=data of=model bs=1M seek=70001 oflag=seek_bytes conv=notrunc status=none
    cmp m model; "$fx" --umount m
    cat part.00? | cmp - model
}

t_window_shows_its_bytes() {
    random img 64
    "$fx" -q --offset 5000 img m; cmp -i 5000:0 img m; same "$(stat -c %s m)" 257144; "$fx" --umount m
    "$fx" -q --offset 4k --size 0x1001 img m; cmp -n 4097 -i 4096:0 img m; same "$(stat -c %s m)" 4097; "$fx" --umount m
    refused 1 'offset 300000 is past the end' "$fx" -q --offset 300000 img m
    refused 1 'reaches past the end' "$fx" -q --offset 1 --size 256k img m
    "$fx" -q --offset 0512 img m; same "$(stat -c %s m)" 261632; "$fx" --umount m      # no octal
    for bad in -1 1x 8E 9223372036854775808 18446744073709551616 99999999999999999999 1kk '' ' 1' +1; do
        refused 2 "'$bad' is not a usable size" "$fx" -q --offset="$bad" img m
    done
}

# check_partitions IMAGE TOOL-SECTOR [OPTION...]: every partition against the image and sfdisk's own reading of it
check_partitions() {
    local img=$1 sector=$2 n start size count=0
    shift 2
    mkdir -p d
    "$fx" -q "$@" "$img" d
    while read -r n start size; do
        cmp -i $((start * sector)):0 -n $((size * sector)) "$img" "d/p$n"
        same "$(stat -c %s "d/p$n")" $((size * sector))
        count=$((count + 1))
    done < <(sfdisk -J "${table:-$img}" | jq -r '.partitiontable.partitions[] | select(.type | IN("5","f","85") | not) |
             "\(.node | capture("(?<n>[0-9]+)$").n) \(.start) \(.size)"')
    [ "$count" -gt 0 ]
    same "$(find d -name 'p*' | wc -l)" "$count"
    cmp "$img" d/disk
    umount d
    gone
    while read -r n start size; do
        "$fx" -q "$@" --partition "$n" "$img" m
        cmp -i $((start * sector)):0 -n $((size * sector)) "$img" m
        "$fx" --umount m
    done < <(sfdisk -J "${table:-$img}" | jq -r '.partitiontable.partitions[] | select(.type | IN("5","f","85") | not) |
             "\(.node | capture("(?<n>[0-9]+)$").n) \(.start) \(.size)"')
}

mbr_image() {
    random img 10240
    printf 'label: dos\n2048,4096,83\n8192,2048,7\n10240,,f\n12288,2048,83\n16384,4096,83\n22528,1000,82\n' | sfdisk -q img
}

t_partitions_of_an_mbr_with_logical_ones() { mbr_image; check_partitions img 512; }

t_partitions_of_a_gpt() {
    random img 10240
    printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=100\nstart=9000\n' | sfdisk -q img
    sfdisk -q --delete img 2; check_partitions img 512
}

t_partitions_of_a_gpt_with_4096_byte_sectors() {
    random img 10240
    local dev; dev=$(losetup -b 4096 -f --show img)
    printf 'label: gpt\nstart=256,size=512\nstart=1000,size=99\n' | sfdisk -q "$dev"
    table=$dev check_partitions img 4096
    check_partitions "$dev" 4096
    # An MBR does not tell its sector size; the device does, and for a file the user.
    printf 'label: dos\nstart=256,size=512\nstart=1000,size=99\n' | sfdisk -q --wipe always "$dev"
    check_partitions "$dev" 4096
    table=$dev check_partitions img 4096 --sector-size 4096
    losetup -d "$dev"
}

t_gpt_backup_is_used_when_the_primary_is_damaged() {
    random img 10240
    printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=100\n' | sfdisk -q img
    cp img good; "$fx" -q --partition 2 img m; cp m p2; "$fx" --umount m
    # The header's checksum, the table's checksum, and everything at the front gone.
    for where in 520 1030 ; do
        cp good img; printf 'X' | dd of=img bs=1 seek=$where conv=notrunc status=none
        "$fx" --partition 2 --format raw img m 2>err; cmp m p2; "$fx" --umount m
        grep -q 'primary GPT is damaged' err
    done
    cp good img; dd if=/dev/zero of=img bs=1M count=1 conv=notrunc status=none
    "$fx" -q --partition 2 --format raw img m; cmp m p2; "$fx" --umount m
    cp good img; printf 'X' | dd of=img bs=1 seek=520 conv=notrunc status=none
    printf 'X' | dd of=img bs=1 seek=$((40 * 1048576 - 512 + 20)) conv=notrunc status=none
    refused 1 'no partition 2: its header.s checksum is wrong' "$fx" -q --partition 2 img m
}

t_partition_that_reaches_past_the_end_reads_as_eio_there() {
    mbr_image; truncate -s $((2048 * 512 + 100000)) img
    "$fx" --format raw --partition 1 img m 2>err
    grep -q 'partition 1 reaches 1997152 bytes past the end' err
    same "$(stat -c %s m)" $((4096 * 512))
    cmp -n 98304 -i $((2048 * 512)):0 img m
    not dd if=m of=/dev/null bs=4k skip=25 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    refused 1 'no partition 2' "$fx" -q --partition 2 img m
}

t_writes_past_the_end_of_a_truncated_disk_fail() {
    mbr_image; truncate -s $((2048 * 512 + 100000)) img; cp img copy
    "$fx" -q -w --format raw --partition 1 img m
    not dd if=/dev/zero of=m bs=4k seek=300 count=1 conv=notrunc 2>err; grep -q 'Input/output' err
    not fallocate -z -o 200000 -l 4096 m 2>err
    not dd if=m of=/dev/null bs=4k skip=30 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    cmp img copy
}

t_partition_stays_inside_the_window() {
    mbr_image; cp img copy
    "$fx" --size $((2048 * 512 + 8192)) --partition 1 -w img m 2>err; grep -q 'reaches 2088960 bytes past' err
    cmp -n 8192 -i $((2048 * 512)):0 img m
    not dd if=m of=/dev/null bs=4k skip=2 count=1 2>err
    not dd if=/dev/zero of=m bs=4k seek=2 count=1 conv=notrunc 2>err
    "$fx" --umount m
    cmp img copy
}

t_damaged_gpt_is_told_in_directory_mode_too() {
    random img 1024; printf 'label: gpt\nstart=64,size=100\n' | sfdisk -q img
    dd if=/dev/urandom of=img bs=512 seek=2 count=1 conv=notrunc status=none
    dd if=/dev/urandom of=img bs=512 seek=$((8192 - 33)) count=1 conv=notrunc status=none
    mkdir d; "$fx" --format raw img d 2>err; grep -q 'only the disk is shown: the GPT is damaged' err
    umount d; gone
}

t_hostile_partition_tables_are_survived() {
    mbr_image
    # An EBR that points back at itself, and one far away.
    local ebr=$((10240 * 512))
    cp img loop; printf '\x00\x00\x00\x00' | dd of=loop bs=1 seek=$((ebr + 446 + 16 + 8)) conv=notrunc status=none
    mkdir d; "$fx" loop --format raw d 2>err; same "$(find d -name 'p*' | wc -l)" 3; umount d; gone
    grep -q 'chain of logical partitions is broken' err
    cp img far; printf '\xff\xff\xff\xff' | dd of=far bs=1 seek=$((ebr + 446 + 16 + 8)) conv=notrunc status=none
    "$fx" -q far d; same "$(find d -name 'p*' | wc -l)" 3; umount d; gone
    # A GPT with 2^32 - 1 entries whose checksum is right.
    printf 'label: gpt\nstart=2048,size=4096\n' | sfdisk -q --wipe always img
    py '
import zlib, struct
f = open("img", "r+b")
for lba in (1, 81919):
    f.seek(lba * 512); h = bytearray(f.read(92))
    h[80:84] = struct.pack("<I", 0xffffffff); h[16:20] = bytes(4)
    h[16:20] = struct.pack("<I", zlib.crc32(h)); f.seek(lba * 512); f.write(h)'
    refused 1 'more than 1024 entries' "$fx" -q --partition 1 img m
    refused 1 'no partition 9' "$fx" -q --partition 9 loop m
    head -c 1000 /dev/urandom >tiny; refused 1 'no partition table' "$fx" -q --partition 1 tiny m
}

# partx_agrees FILE [OPTION...]: a directory shows the partitions that partx sees, at their places; FILE holds no two equal sectors
partx_agrees() {
    local img=$1 n start count seen=0
    shift
    mkdir -p d; "$fx" -q --format raw "$@" "$img" d
    while read -r n start count _; do
        cmp -i $((start * 512)):0 -n $((count * 512)) "$img" "d/p$n"
        same "$(stat -c %s "d/p$n")" $((count * 512))
        seen=$((seen + 1))
    done < <(partx -g -o NR,START,SECTORS,TYPE -s "$img" | awk '$4 !~ /^0x(5|f|85)$/')
    [ "$seen" -gt 0 ]
    same "$(find d -name 'p*' | wc -l)" "$seen"
    umount d; gone
}

# mbr FILE SECTOR [STATUS,TYPE,FIRST,COUNT...]: writes four entries and the signature into a sector; ,,, leaves one out
mbr() {
    py 'with open(sys.argv[1], "r+b") as f:
    import struct
    f.seek(int(sys.argv[2]) * 512 + 446)
    rows = [[int(x or "0", 0) for x in a.split(",")] for a in sys.argv[3:]]
    f.write(b"".join(struct.pack("<B3xB3xII", *r) for r in rows).ljust(64, b"\0") + b"\x55\xaa")' "$@"
}

t_logical_partitions_are_found_in_whatever_order_the_chain_links_them() {
    random img 10240
    # As sfdisk writes them when they are made in another order than they lie.
    printf 'label: dos\nstart=2048,size=70000,type=5\nstart=40000,size=1000\nstart=60000,size=1000\nstart=10000,size=1000\n' | sfdisk -q img
    partx_agrees img
    # By hand: backwards, the extended partition in slot 1, slots 3 and 4 of a record with partitions and with garbage.
    mbr img 0 0,5,2048,70000 0,0x83,75000,1000
    mbr img 2048 0,0x83,100,200 0,5,40000,20000
    mbr img 42048 0,5,1000,3000 0,7,50,60 0,0x83,9000,500 0,0x83,60000,60000
    mbr img 3048 0,0,7,8 ,,, 0x33,0xaa,1,4 0,0x83,2,5000
    partx_agrees img
    # Two extended partitions count on.
    mbr img 0 0,0xf,2048,20000 0,0x83,75000,1000 0,0x85,40000,20000
    mbr img 2048 0,0x83,100,200
    mbr img 40000 ,,, 0,5,9000,100
    mbr img 49000 0,0x83,10,20
    partx_agrees img
}

t_chain_of_logical_partitions_ends_at_a_loop_and_may_lead_outside() {
    random img 10240
    mbr img 0 0,5,2048,20000
    mbr img 2048 0,0x83,100,200 0,5,4000,1000
    mbr img 6048 0,0x83,100,300 0,5,2000,1000
    mbr img 4048 0,0x83,100,400 0,5,4000,1000
    mkdir d; "$fx" --format raw img d 2>err; same "$(cd d && stat -c '%n %s' p* | tr '\n' ' ')" "p5 102400 p6 153600 p7 204800 "
    grep -q 'broken at sector 6048 (a loop), after partition 7' err; umount d; gone
    mbr img 4048 0,0x83,100,400 0,5,30000,1000
    mbr img 32048 0,0x83,100,400
    "$fx" --format raw img d 2>err; same "$(find d -name 'p*' | wc -l)" 4; umount d; gone
    grep -q 'at sector 32048, lies outside of the extended partition' err; partx_agrees img
    mbr img 0 0,5,0,20000 0,0x83,2048,10
    "$fx" --format raw img d 2>err; same "$(cd d && echo *)" "disk p2"; umount d; gone
    grep -q 'broken at sector 0 (a loop)' err
}

t_mbr_entries_of_type_00_are_partitions() {
    random img 10240
    mbr img 0 0x80,0,0,81920 0,0xef,2048,4096; partx_agrees img
    mbr img 0 ,,, 0,0,2048,4096; partx_agrees img
    mbr img 0 0,5,2048,9000 0,0,20000,1; mbr img 2048 0,0,10,20; partx_agrees img
    # A boot flag other than 0 and 0x80: no table. A boot sector with numbers in the wrong place: nor that.
    mbr img 0 1,0,0,8192 0,0xef,2048,4096; refused 1 'no partition table' "$fx" -q --format raw --partition 2 img m
    mkfs.fat -F 16 img >/dev/null; mbr img 0 ,,, ,,, ,,, 0,0,0xac000000,55499
    same "$(partx -g -s img 2>/dev/null)" ""
    refused 1 'no partition table' "$fx" -q --format raw --partition 4 img m
}

t_hybrid_mbr_is_shown_where_no_gpt_is_left() {
    random img 10240
    printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=2048\nstart=20000,size=100\n' | sfdisk -q img
    mbr img 0 0,0xee,1,2047 0x80,0x83,8192,2048 0,0,1,1 0,0xf,20000,1000
    mbr img 20000 0,0x83,10,20
    mkdir d
    "$fx" --format raw img d 2>err; same "$(cd d && echo *)" "disk p1 p2 p3"; not grep -q hybrid err; umount d; gone
    for sector in 1 81919; do dd if=/dev/urandom of=img bs=512 seek=$sector count=1 conv=notrunc status=none; done
    "$fx" --format raw img d 2>err; same "$(cd d && echo *)" "disk p2 p5"; grep -q 'the GPT is damaged (no signature): .*hybrid MBR' err
    cmp -i $((8192 * 512)):0 -n $((2048 * 512)) img d/p2; cmp -i $((20010 * 512)):0 -n 10240 img d/p5; umount d; gone
    mbr img 0 0,0xee,1,2047; refused 1 'no partition 1: no signature' "$fx" -q --format raw --partition 1 img m
}

t_gpt_backup_is_found_in_a_disk_that_was_made_longer() {
    local sector dev last grown
    for sector in 512 4096; do
        rm -f img; random img 10240; dev=$(losetup -b $sector -f --show img)
        printf 'label: gpt\nstart=2048,size=512\nstart=4000,size=99\n' | sfdisk -q "$dev"; losetup -d "$dev"
        last=$((40 * 1048576 / sector - 1)); grown=$((50 * 1048576 / sector - 1))
        "$fx" -v --format raw --partition 2 img m 2>err; cp m p2; "$fx" --umount m; not grep -q GPT err
        truncate -s 50M img
        "$fx" --format raw --partition 2 img m 2>err; cmp m p2; "$fx" --umount m
        grep -q "its backup GPT is at sector $last, not at its end ($grown)" err
        # The primary's table, its header's checksum, and then its whole header: that leaves the protective MBR.
        for where in $((2 * sector + 6)) $((sector + 90)) $sector; do
            printf 'XXXX' | dd of=img bs=1 seek=$where conv=notrunc status=none
            "$fx" --format raw --partition 2 img m 2>err; cmp m p2; "$fx" --umount m
            grep -q "primary GPT is damaged (.*), using the backup at sector $last" err
            grep -q "its backup GPT is at sector $last, not at its end" err
        done
        mbr img 0; refused 1 'no partition 2' "$fx" -q --format raw --partition 2 img m
    done
    random img 10240; printf 'label: gpt\nstart=2048,size=4096\n' | sfdisk -q img; truncate -s 20M img
    "$fx" --format raw --partition 1 img m 2>err; cmp -i 1048576:0 -n 2097152 img m; "$fx" --umount m
    grep -q 'its backup GPT is at sector 81919, past its end (40959)' err
}

t_gpt_with_entries_of_256_bytes() {
    random img 10240; printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=100\n' | sfdisk -q img
    py '
import struct, zlib
f = open("img", "r+b"); f.seek(1024); table = f.read(64 * 128); f.seek(512); h = bytearray(f.read(92))
table = b"".join(table[i:i + 128] + bytes(range(128)) for i in range(0, len(table), 128))
h[80:92] = struct.pack("<III", 64, 256, zlib.crc32(table)); h[16:20] = bytes(4); h[16:20] = struct.pack("<I", zlib.crc32(h))
f.seek(512); f.write(h); f.seek(1024); f.write(table)'
    "$fx" -q --format raw --partition 2 img m; cmp -i $((8192 * 512)):0 -n 51200 img m
}

t_random_damage_to_partition_tables_is_survived() {
    mbr_image; head -c 6M img >mbr
    random gpt 512; printf 'label: gpt\nstart=64,size=100\nstart=200,size=100\n' | sfdisk -q gpt
    mkdir d
    py '
import subprocess, shutil
rnd = random.Random(3)
for name, spots in (("mbr", [446 + i for i in range(66)] + [10240 * 512 + 446 + i for i in range(66)]), ("gpt", list(range(446, 1400)))):
    good = open(name, "rb").read()
    for i in range(60):
        bad = bytearray(good)
        for j in range(rnd.randrange(1, 6)): bad[rnd.choice(spots)] = rnd.randrange(256)
        open("bad", "wb").write(bad)
        p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--format", "raw", "bad", "d", "--", "cat", "d/disk"], stdout=subprocess.DEVNULL)
        assert p.returncode == 0, (name, i, p.returncode)
' "$build/fuseexp-asan"
}

t_writable_directory_keeps_disk_and_partitions_coherent() {
    mbr_image; mkdir d; "$fx" -q -w img d
    cat d/disk d/p1 >/dev/null
    printf 'through the partition' | dd of=d/p1 bs=1 seek=4096 conv=notrunc status=none
    printf 'through the partition' | cmp -i 0:$((2048 * 512 + 4096)) -n 21 - d/disk
    printf 'through the disk' | dd of=d/disk bs=1 seek=$((8192 * 512)) conv=notrunc status=none
    printf 'through the disk' | cmp -n 16 - d/p2
    not dd if=/dev/zero of=d/p1 bs=1 count=1 seek=$((4096 * 512)) conv=notrunc status=none 2>err; grep -q 'No space' err
    umount d; gone
}

# ---- formats, locks --------------------------------------------------------------------------------------------

t_containers_that_are_not_read_are_refused_by_name() {
    printf 'EVF\t\r\n\377\0' >x.E01; truncate -s 1M x.E01
    refused 1 'EWF.*which this version does not read' "$fx" -q x.E01 m
    "$fx" -q --format raw x.E01 m; cmp x.E01 m; "$fx" --umount m
    echo text | gzip >x.gz; refused 1 'gzip' "$fx" -q x.gz m
    refused 1 "unknown format 'nonsense'" "$fx" -q --format nonsense x.gz m
}

# Each FILE:WORD is refused by name, in one line with a way out; of the last, --format raw shows the bytes.
foreign() {
    local i f
    for i in "$@"; do
        f=${i%%:*}
        refused 1 "is an\? [^:]*${i#*:}.*which this version does not read: .*; --format raw shows its bytes" "$fx" -q "$f" m
    done
    refused 1 "${i#*:}" "$fx" -q --info "$f"
    "$fx" -q --format raw "$f" m; cmp "$f" m; "$fx" --umount m
}

t_archives_and_compressed_files_are_refused_by_name() {
    random truth 40; echo '<Envelope/>' >x.ovf; cp truth x.vmdk; cp truth Ref; mkdir e; echo x >e/ova.xml
    tar -cf x.ova x.ovf x.vmdk; tar -cf x.tar truth; tar --format=v7 -cf v7.tar truth; tar --format=posix -cf pax.tar truth
    tar --format=gnu --numeric-owner --mtime=@99999999999 -cf gnu.tar truth; tar -C e -cf x.xva ova.xml
    bzip2 -k truth; : | bzip2 >empty.bz2; gzip -k truth; xz -k truth; xz --format=lzma -k truth; zstd -q truth
    lz4 -q truth truth.lz4; lz4 -q -l truth legacy.lz4; lz4 -q -B4 -BX --content-size truth b.lz4
    { printf '\x50\x2a\x4d\x18\x04\0\0\0abcd'; cat truth.zst; } >p.zst
    ar q x.ar truth 2>/dev/null
    foreign x.ova:OVA x.tar:tar v7.tar:tar pax.tar:tar gnu.tar:tar x.xva:XVA truth.bz2:bzip2 empty.bz2:bzip2 truth.gz:gzip truth.xz:xz \
        truth.lzma:lzma truth.zst:zstd p.zst:zstd truth.lz4:lz4 legacy.lz4:lz4 b.lz4:lz4 x.ar:ar
    py '
import struct, zipfile
t = open("truth", "rb").read()
def w(name, head): open(name, "wb").write(head + t)
w("newc", b"070701" + b"%08X" * 13 % tuple(range(13)) + b"x\0"); w("odc", b"070707" + b"0" * 70 + b"x\0")
w("rar4", b"Rar!\x1a\x07\0"); w("rar5", b"Rar!\x1a\x07\1\0"); w("7z", b"7z\xbc\xaf\x27\x1c\0\4")
w("lzo", b"\x89LZO\0\r\n\x1a\n\x10\x40"); w("lz", b"LZIP\1\x0c"); w("lrz", b"LRZI\0\6")
w("cab", b"MSCF\0\0\0\0"); w("salted", b"Salted__"); w("age", b"age-encryption.org/v1\n-> X25519 x\n")
zipfile.ZipFile("zip", "w").writestr("x", t)'
    foreign newc:cpio odc:cpio rar4:rar rar5:rar 7z:7z lzo:lzop lz:lzip lrz:lrzip cab:cabinet salted:openssl age:age zip:zip
}

t_images_of_programs_that_are_not_read_are_refused_by_name() {
    random truth 40
    py '
import struct
t = open("truth", "rb").read()
def w(name, head, tail=b""): open(name, "wb").write(head + t + tail)
w("pc2", (b"partclone-image\0" + b"0.3.20".ljust(14, b"\0") + b"0002" + struct.pack("<H", 0xc0de)).ljust(110, b"\0"))
w("pc1", b"partclone-image" + b"EXTFS".ljust(15, b"\0") + b"0001\0\0"); w("ntfsclone", b"\0ntfsclone-image\x0a\1" + bytes(38))
w("partimage", b"PaRtImAgE-VoLuMe"); w("fsa", b"FsA0" + bytes(40) + b"FsArCh_002\0")
for n, e, magic in (("dumple", "<", 60012), ("dumpbe", ">", 60012), ("dump2", "<", 0x19540119)):
    h = list(struct.unpack(e + "256I", t[:1024])); h[6] = magic; h[7] = 0; h[7] = (84446 - sum(h)) % 2**32
    w(n, struct.pack(e + "256I", *h))
w("wim", b"MSWIM\0\0\0"); w("wimpipe", b"WLPWM\0\0\0"); w("gho", b"\xfe\xef\1\0"); w("tib", b"\xce\x24\xb9\xa2\x20\0\0\0"); w("tib2", b"\xb4\x6e\x68\x44")
w("vma", b"VMA\0\0\0\0\1"); w("umlcow", b"OOOM\0\0\0\2"); w("umlcow1", b"MOOO\1\0\0\0"); w("bochs", b"Bochs Virtual HD Image\0"); w("cloop", b"#!/bin/sh\n#V2.0 Format\n")
w("e01", b"EVF\t\r\n\xff\0\1\1\0\0\0"); w("l01", b"LVF\t\r\n\xff\0"); w("ex01", b"EVF2\r\n\x81\0"); w("lx01", b"LEF2\r\n\x81\0"); w("aff", b"AFF10\r\n\0"); w("ad1", b"ADSEGMENTEDFILE\0")
w("adcrypt", b"ADCRYPT\0"); w("sparseimage", b"sprs\0\0\0\3"); w("asif", b"shdw\0\0\0\1"); w("dmgenc", b"encrcdsa"); w("dmgenc1", b"", b"cdsaencr"); w("dmg", b"", b"koly\0\0\0\4".ljust(512, b"\0"))
w("simg", b"\x3a\xff\x26\xed\1\0\0\0"); w("qcow1", b"QFI\xfb\0\0\0\1"); w("vmss", b"\xd2\xbe\xd2\xbe"); w("sav", b"\x7fVirtualBox SavedState V2.0\n"); w("qevm", b"QEVM\0\0\0\3")
w("nvram", b"MRVN\1\0\0\0"); w("save", b"LibvirtQemudSave")'
    foreign pc2:partclone pc1:partclone ntfsclone:ntfsclone partimage:partimage fsa:FSArchiver dumple:dump dumpbe:dump dump2:dump wim:WIM wimpipe:WIM \
        gho:Ghost tib:Acronis tib2:Acronis vma:VMA umlcow:COW umlcow1:COW bochs:Bochs cloop:cloop e01:E01 l01:L01 ex01:Ex01 lx01:Lx01 aff:AFF ad1:AD1 \
        adcrypt:FTK sparseimage:'Apple sparse' asif:ASIF dmgenc:'encrypted Apple' dmgenc1:'encrypted Apple' dmg:UDIF simg:Android qcow1:'qcow image' \
        vmss:VMware sav:VirtualBox qevm:QEMU nvram:nvram save:libvirt
}

t_descriptions_of_machines_and_maps_are_refused_by_name() {
    printf '.encoding = "UTF-8"\nconfig.version = "8"\nscsi0:0.fileName = "x.vmdk"\n' >a.vmx
    printf '#!/usr/bin/vmware\nconfig.version = "8"\nvirtualHW.version = "16"\n' >b.vmx
    printf '.encoding = "UTF-8"\nsnapshot.lastUID = "1"\n' >a.vmsd; printf '.encoding = "UTF-8"\n' >b.vmsd; printf '<?xml version="1.0"?>\n<Foundry>\n</Foundry>\n' >a.vmxf
    printf '<?xml version="1.0"?>\n<!--\n** DO NOT EDIT THIS FILE.\n-->\n<VirtualBox xmlns="http://www.virtualbox.org/" version="1.16-linux">\n</VirtualBox>\n' >a.vbox
    printf '<?xml version="1.0"?>\n<Envelope ovf:version="1.0" xmlns="http://schemas.dmtf.org/ovf/envelope/1"></Envelope>\n' >a.ovf
    printf '\357\273\277<?xml version="1.0"?>\r\n<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"/>\r\n' >b.ovf
    printf '<domain type="kvm">\n<name>x</name></domain>\n' >a.xml; printf '<?xml version="1.0"?>\n<ParallelsVirtualMachine schemaVersion="1.0"/>\n' >config.pvs
    printf '<?xml version="1.0"?>\n<other/>\n' >b.xml; printf '<?xml version="1.0"?><configuration/>' | iconv -t UTF-16LE | { printf '\xff\xfe'; cat; } >c.xml
    foreign a.vmx:vmx b.vmx:vmx a.vmsd:vmsd b.vmsd:VMware a.vmxf:vmxf a.vbox:vbox a.ovf:OVF b.ovf:OVF a.xml:libvirt config.pvs:Parallels b.xml:XML c.xml:XML
    truncate -s 1M img; ddrescue -q img copy a.map; printf '0x0 +\n0x0 0x100 +\n' >b.map
    random x 4; for i in $(seq 2000); do printf '%s 512 +\n' $((i * 512)); done | { printf '# comment\n 0 ? 1 # more\n'; cat; } >c.map
    foreign a.map:ddrescue b.map:ddrescue c.map:ddrescue
    "$fx" -q --error-map e.map --format raw x m; cat m >/dev/null; "$fx" --umount m; foreign e.map:ddrescue
    mkdir -p s.sparsebundle/bands c; touch s.sparsebundle/Info.plist c/clonezilla-img
    refused 1 'is an Apple sparse bundle' "$fx" -q s.sparsebundle m; refused 1 'Clonezilla' "$fx" -q c m
}

t_kinds_that_are_not_read_are_not_called_damaged() {
    local format at hex
    while read -r format at hex; do
        rm -f good; qemu-img create -q -f "$format" good 4M; poke bad "$at" "$hex"
        refused 1 'not supported' "$fx" -q bad m
    done <<'END'
qcow2 4 00000004
qcow2 20 00000017
qcow2 32 00000003
qcow2 76 01000000
vdi 68 02000200
parallels 16 00000003
qed 16 00000000000000ff
vmdk 4 04000000
END
    for f in VSANSPARSE VMFSRDM SOMETHING; do
        printf '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="x"\nRW 4096 %s "x-1.vmdk"\n' $f >d.vmdk
        refused 1 "$f.*not supported" "$fx" -q d.vmdk m
    done
    "$fx" -q --info d.vmdk 2>err || true; not grep -q 'damaged\|hostile' err
}

t_files_that_are_cut_off_in_their_tables_are_told_so() {
    local f
    random truth 300
    for f in qcow2 vdi vmdk vpc vhdx qed parallels; do
        rm -f img; qemu-img convert -f raw -O $f truth img; truncate -s 1030 img
        expect 1 "$fx" -q --strict img m
        grep -q 'cut off\|shorter than its tables\|past the end\|1030' err || { cat err >&2; fail "$f: not told"; }
        not grep -q hostile err
    done
}

t_formats_by_another_name_are_told_theirs() {
    random img 4
    refused 1 "unknown format 'vhd'; here it is called vpc" "$fx" --format vhd img m
    refused 1 "unknown format 'VMDK'; here it is called vmdk" "$fx" --format VMDK img m
    refused 1 "unknown format 'dd'; here it is called raw" "$fx" --format dd img m
    refused 1 "unknown format 'x' (fuseexp --formats lists them)" "$fx" --format x img m
}

t_a_raw_disk_may_begin_with_anything() {
    random truth 60
    py '
t = open("truth", "rb").read()
text = b"<?xml version=\"1.0\"?>\n<VirtualBox/>\n<domain type=\"kvm\">\nconfig.version = \"8\"\n"
heads = [b"BZh9" + t[:8], b"\x04\x22\x4d\x18\0\0\0", b"\x02\x21\x4c\x18\0\0\0\0", b"\x02\x21\x4c\x18\xff\xff\xff\xff", b"LZIP\1\xff", b"\x5d\0\0" + t[:20], b"\x50\x2a\x4d\x18\4\0\0\0abcdabcd",
         b"\x1f\x8b\x08\xff", b"070701 is no archive", b"\x78\x9c" + t[:20], text + bytes(2000), text.ljust(512), b"# Mapfile. Created by hand\n0x0 +\n0 1 +\n\0", b"# Rescue Logfile. Created by\0",
         b"Rar!", b"!<arch>", b"VMA\0", b"FsA0", b"sprs", b"shdw", b"OOOM", b"MSWIM", b"\xfe\xef\2", b"\0ntfsclone", b"partclone", b"AFF1", b"EVF", b".encoding = \"UTF-8\"\n\0"]
ustar = bytearray(t[:512]); ustar[257:265] = b"ustar\00000"; ustar[148:156] = b"012345\0 "; heads.append(bytes(ustar))
dump = bytearray(t[:1024]); dump[24:28] = b"\x6c\xea\0\0"; heads.append(bytes(dump))
for i, h in enumerate(heads): open("disk%d" % i, "wb").write(h + t[len(h):])
open("text", "wb").write((text * 3000).ljust(17 << 20))'
    local f n=0
    for f in disk* text; do
        "$fx" -q "$f" m || fail "$f is refused: $(head -c 30 $f | tr -d '\0')"
        cmp "$f" m; "$fx" --umount m; n=$((n + 1))
    done
    same "$n" 31
}

t_raw_is_taken_with_a_note() {
    random img 16
    "$fx" img m 2>err; "$fx" --umount m; same "$(cat err)" "fuseexp: img: raw disk image assumed (--format raw silences this)"
    "$fx" --format raw img m 2>err; "$fx" --umount m; same "$(cat err)" ""
}

t_corpus_raw_images_and_partitions_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = raw ] && [ "$expected" = ok ] && [ -f "c/$path" ] || continue
        cp "c/$path" img        # by itself: some are parts of a set
        "$fx" -q --no-passthrough img m
        same "$(stat -c %s m)" "$size"
        same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 10 ] || fail "only $n raw images in the corpus"
    for img in c/raw/dfvfs__mbr.raw c/raw/dfvfs__gpt.raw; do check_partitions $img 512; done
}

t_corpus_containers_are_never_shown_as_raw() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    while IFS=$'\t' read -r path format _; do
        case $format:$path in raw:* | qcow2:* | parallels:* | vmdk:* | vpc:* | vhdx:* | path:* | ddrescue*:* | *:bad/*) continue ;; esac
        if [ -s "c/$path" ] && "$fx" -q "c/$path" m 2>err; then "$fx" --umount m; echo "$path"; fi
    done <c/MANIFEST.tsv >served
    same "$(cat served)" ""
}

t_locks_are_qemus() {
    qemu-img create -q -f raw img 1M
    qemu-io -f raw -c 'sleep 3000' img >/dev/null & local q=$!
    wait_for grep -q "$(stat -c %i img) 10" /proc/locks
    refused 1 'in use by another program.*-U' "$fx" -q img m
    refused 1 'in use by another program' "$fx" -q -w img m
    "$fx" -q -U img m; cmp img m; "$fx" --umount m
    kill $q 2>/dev/null || true
    wait_for sh -c "qemu-io -f raw -c 'read 0 1' img"
    "$fx" -q -w img m
    not qemu-io -f raw -c 'read 0 1' img 2>err; grep -q lock err
    refused 1 'in use by another program that writes' "$fx" -q img m2
    "$fx" --umount m
    qemu-io -f raw -c 'write 0 512' img >/dev/null
    "$fx" -q img m
    qemu-io -r -f raw -c 'read 0 1' img >/dev/null
    not qemu-io -f raw -c 'write 0 512' img 2>err; grep -q lock err
    "$fx" -q img m2; "$fx" --umount m2
    "$fx" --umount m
}

t_lock_that_is_released_while_we_look_again_is_no_reason_to_refuse() {
    # As the server of an old mount does that still flushes: the holder lets go once fuseexp sleeps between two looks.
    random img 256
    py 'import struct, subprocess
img = os.open("img", os.O_RDWR)
ino = ":%d " % os.fstat(img).st_ino
lock = lambda kind: fcntl.fcntl(img, 37, struct.pack("hhqqi4x", kind, os.SEEK_SET, 101, 1, 0))     # F_OFD_SETLK
ours = lambda: [l for l in open("/proc/locks") if ino in l and " 100 10" in l]       # 100 to 101 is one
def waits(pid):         # it sleeps, and holds nothing: a QEMU that has the image open may begin to write
    return open("/proc/%d/syscall" % pid).read().split()[3:4] == ["0x14"] and not ours()       # poll(2) of 20 ms
for end in "served", "stopped":
    lock(fcntl.F_RDLCK)
    p = subprocess.Popen([sys.argv[1], "-f", "-q", "--format", "raw", "-w", "img", "m"], stderr=open("err", "wb"))
    while not waits(p.pid):
        assert p.poll() is None, open("err").read()
    if end == "served":
        lock(fcntl.F_UNLCK)
        while not os.path.ismount("m"):
            assert p.poll() is None, open("err").read()
        subprocess.check_call([sys.argv[1], "--umount", "m"])
        assert p.wait() == 0
    else:
        p.terminate()
        assert p.wait() == 1 and "in use by another program" in open("err").read()
' "$fx"
    [ ! -e m ]
}

# ---- qcow2 -----------------------------------------------------------------------------------------------------

# check_same IMAGE [OPTION...]: the export against qemu-img's own conversion in ./truth: whole, at odd offsets, holes
check_same() {
    local img=$1
    shift
    "$fx" -q --no-passthrough "$@" "$img" m
    cmp m truth
    py '
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
size = os.fstat(a).st_size
assert os.fstat(b).st_size == size
rnd = random.Random(size)
for i in range(150):
    off = rnd.randrange(size); n = rnd.choice([1, 511, 4097, 65536, 300000])
    assert os.pread(a, n, off) == os.pread(b, n, off), (off, n)
off = 0
while off < size:
    hole = os.lseek(b, off, os.SEEK_HOLE)
    try: data = os.lseek(b, hole, os.SEEK_DATA)
    except OSError: data = size
    assert os.pread(a, min(data - hole, 1 << 22), hole).count(0) == min(data - hole, 1 << 22), (hole, data)
    assert data > off or off == 0
    off = max(data, off + 1)
'
    dd if=m of=direct iflag=direct bs=1000k status=none
    cmp direct truth
    "$fx" --umount m
    rm -f direct
}

# Random writes, zeros, discards and compressed clusters into an existing image.
scribble() {        # IMAGE SEED [compressed]
    local img=$1 size
    size=$(qemu-img info --output=json "$img" | jq '."virtual-size"')
    py '
rnd = random.Random(int(sys.argv[1]))
size = int(sys.argv[2])
for i in range(60):
    off = rnd.randrange(size) & ~511; n = min(rnd.choice([512, 4096, 65536, 200704, 1 << 20]), size - off) & ~511
    if not n: continue
    kind = rnd.random()
    if len(sys.argv) > 3 and kind < .5:
        c = int(sys.argv[3]); off = off // c * c
        print("write -c -P %d %d %d" % (rnd.randrange(256), off, min(c, size - off)))
    elif kind < .8: print("write -P %d %d %d" % (rnd.randrange(256), off, n))
    elif kind < .9: print("write -z %d %d" % (off, n))
    else: print("discard %d %d" % (off, n))
' "$2" "$size" "${@:3}" | qemu-io "$img" >io.log 2>&1 || grep -q wrote io.log     # some variants refuse a discard
}

t_qcow2_variants_read_back() {
    local n=0 o cluster
    for o in compat=0.10 compat=0.10,cluster_size=512 compat=1.1,cluster_size=512 cluster_size=4k cluster_size=2M \
        refcount_bits=1 refcount_bits=64,lazy_refcounts=on compression_type=zstd compression_type=zstd,cluster_size=2M \
        compression_type=zstd,cluster_size=4k extended_l2=on extended_l2=on,cluster_size=16k \
        extended_l2=on,cluster_size=2M,compression_type=zstd preallocation=metadata preallocation=falloc; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f qcow2 -o "$o" img 12345k
        cluster=$(qemu-img info --output=json img | jq '."cluster-size"')
        scribble img $n
        scribble img $((n + 100)) "$cluster"
        scribble img $((n + 200))
        qemu-img convert -O raw img truth
        check_same img
    done
    for o in data_file=ext.raw data_file=ext.raw,data_file_raw=on extended_l2=on,data_file=ext.raw; do
        rm -f img ext.raw
        qemu-img create -q -f qcow2 -o "$o" img 12345k
        scribble img 7
        qemu-img convert -O raw img truth
        check_same img
        mv ext.raw elsewhere
        refused 1 "cannot open its external data file 'ext.raw'" "$fx" -q img m
        check_same img --data-file elsewhere
        mv elsewhere ext.raw
    done
}

t_qcow2_compressed_images_read_back() {
    for i in $(seq 300); do head -c $((i * 331)) "$top"/fuseexp.c; done >truth
    truncate -s %512 truth
    for o in compression_type=zlib compression_type=zstd compression_type=zlib,cluster_size=2M compression_type=zstd,cluster_size=512; do
        qemu-img convert -c -f raw -O qcow2 -o "$o" truth img
        check_same img
        check_same img --cache-size 1M
        "$fx" -q img m
        cmp m truth & local a=$!
        cmp m truth & local b=$!
        fio --name=r --filename="$PWD/m" --readonly --rw=randread --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
            --number_ios=300 --output=fio.log
        wait $a; wait $b
        "$fx" --umount m
    done
}

t_qcow2_chains_of_mixed_formats() {
    mkdir sub
    random sub/base.raw 1000
    qemu-img create -q -f qcow2 -b base.raw -F raw sub/mid.qcow2 6M         # longer than its base
    scribble sub/mid.qcow2 1 65536
    qemu-img create -q -f qcow2 -o extended_l2=on -b sub/mid.qcow2 -F qcow2 top.qcow2 9M
    scribble top.qcow2 2
    qemu-img convert -O raw top.qcow2 truth
    check_same top.qcow2
    qemu-img create -q -f qcow2 -b top.qcow2 -F qcow2 shrunk.qcow2 3M
    qemu-img convert -O raw shrunk.qcow2 truth
    check_same shrunk.qcow2
    for i in $(seq 60); do
        qemu-img create -q -f qcow2 -b "$([ "$i" = 1 ] && echo top.qcow2 || echo "c$((i - 1))")" -F qcow2 "c$i"
    done
    qemu-img convert -O raw c60 truth
    check_same c60
}

t_qcow2_backing_files_are_opened_by_the_rules() {
    mkdir in out; random out/base 100; cp out/base truth
    qemu-img create -q -f qcow2 -b ../out/base -F raw in/dots
    qemu-img create -q -f qcow2 -b "$PWD/out/base" -F raw in/absolute
    ln -s ../out/base in/link; qemu-img create -q -f qcow2 -b link -F raw in/linked
    qemu-img create -q -f qcow2 -u -b 'json:{"driver":"raw"}' -F raw in/json 400k
    qemu-img create -q -f qcow2 -u -b 'nbd://host/x' -F raw in/url 400k
    qemu-img create -q -f qcow2 -u -b absent -F raw in/missing 400k
    qemu-img create -q -f qcow2 -u -b base -F dmg in/dmg 400k
    qemu-img create -q -f qcow2 -u -b ../out/base -F raw in/noformat 400k
    py 'd = open("in/noformat", "rb").read(); open("in/noformat", "wb").write(d.replace(b"\xe2\x79\x2a\xca", b"\x11\x11\x11\x11", 1))'
    for i in dots absolute linked; do
        expect 1 "$fx" -q in/$i m; grep -q 'allow-external' err
        check_same in/$i --allow-external out
        check_same in/$i --backing out/base
        expect 1 "$fx" -q --allow-external in in/$i m
    done
    refused 1 'not a plain file name' "$fx" -q in/json m
    refused 1 'not a plain file name' "$fx" -q in/url m
    expect 1 "$fx" -q in/missing m; grep -q "in/missing: cannot open its backing file 'absent': No such" err
    refused 1 'of format dmg' "$fx" -q in/dmg m
    refused 1 'does not say which format.*--backing-format' "$fx" -q in/noformat m
    check_same in/noformat --backing-format raw --backing out/base
    qemu-img create -q -f qcow2 -u -b b -F qcow2 in/a 400k; qemu-img create -q -f qcow2 -u -b a -F qcow2 in/b 400k
    refused 1 'is its own backing file' "$fx" -q in/a m
    mkfifo in/fifo; qemu-img create -q -f qcow2 -u -b fifo -F raw in/onfifo 400k
    refused 1 "cannot open its backing file 'fifo'" timeout 5 "$fx" -q in/onfifo m
    : >in/none; qemu-img create -q -f qcow2 -u -b none -F raw in/onempty 400k
    head -c 400k /dev/zero >truth; check_same in/onempty
    refused 1 'so --snapshot is of no use' "$fx" -q --snapshot x out/base m
    refused 1 'has no backing file' "$fx" -q --backing out/base --format raw out/base m
    # A chain whose middle does not say the format: the option serves there too, and only there.
    cp in/noformat mid; cp out/base base; python3 -c "
d = open('mid', 'rb').read(); open('mid', 'wb').write(d.replace(b'../out/base', b'base' + bytes(7)))
import struct; f = open('mid', 'r+b'); f.seek(16); f.write(struct.pack('>I', 4))"
    qemu-img create -q -f qcow2 -u -b mid -F qcow2 ontop 400k
    cp out/base truth; check_same ontop --backing-format raw
    cp in/dots padded; truncate -s %4096 padded
    local dev; dev=$(losetup -f --show padded)
    refused 1 'outside of its directory' "$fx" -q "$dev" m
    losetup -d "$dev"
    "$fx" --no-backing in/absolute m 2>err; grep -q 'without its backing file' err
    not cat m 2>err >out/none; grep -q 'Input/output' err
    "$fx" --umount m
}

t_nothing_outside_the_images_directory_is_opened() {
    mkdir -p in out; random in/base 100; cp in/base out/secret; ln -s ../out/secret in/link
    qemu-img create -q -f qcow2 -b base -F raw in/good
    qemu-img create -q -f qcow2 -u -b link -F raw in/bad 400k
    qemu-img create -q -f qcow2 -u -b "$PWD/out/secret" -F raw in/worse 400k
    for i in good bad worse; do
        strace -f -qq -e trace=%file,openat2 -o log "$fx" -q in/$i m -- true 2>err || grep -q 'out of its directory\|outside of its directory' err
        grep -E '(open|openat|openat2|creat)\(' log | grep -v ENOENT >opened
        not grep -q secret opened
        <opened grep -oE '"[^"]*"' | sort -u |
            grep -vE "^\"(in|in/$i|base|link|m|\.|$PWD(/m)?|/dev/(fuse|null|urandom)|/proc/.*|/sys/(class/bdi/.*|block.*)|/etc/(mtab|fuse.conf|ld.*)|/lib.*)\"\$" >others || true
        same "$(cat others)" ""
    done
}

t_qcow2_backing_files_in_the_middle_are_not_named_by_backing() {
    random base 100; qemu-img convert -f raw -O qcow2 base base.qcow2; qemu-img create -q -u -f qcow2 -b file:base.qcow2 -F qcow2 mid 400k
    qemu-io -c 'write -P 7 64k 64k' mid >/dev/null; qemu-img create -q -f qcow2 -b mid -F qcow2 top; qemu-img convert -O raw top truth
    cp truth top.truth; check_same top
    qemu-img create -q -u -f qcow2 -b base -F file over 400k; cp base truth; check_same over     # a protocol, as old tools record it
    mv base.qcow2 away
    refused 1 "cannot open its backing file 'base.qcow2': No such file or directory; --backing is for the image on top, a second one" "$fx" -q top m
    mv top.truth truth; check_same top --backing mid --backing away
    refused 1 'base: is no image of the chain of top, so --backing is of no use' "$fx" -q --backing mid --backing away --backing base top m
    refused 1 '; --backing FILE names another' "$fx" -q mid m
}

t_qcow2_backing_format_is_not_probed() {
    random base 100; qemu-img create -q -f qcow2 -b base -F raw img
    qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil 400k
    dd if=evil of=base conv=notrunc status=none                            # the guest wrote a header into its disk
    cp base truth
    check_same img
}

t_qcow2_snapshots_are_chosen_by_id_or_name() {
    qemu-img create -q -f qcow2 img 4M
    scribble img 1; qemu-img convert -O raw img one; qemu-img snapshot -c first img
    scribble img 2 65536; qemu-img convert -O raw img two; qemu-img snapshot -c second img
    qemu-img resize -q img 6M; scribble img 3
    qemu-img convert -O raw img truth; check_same img
    cp one truth; check_same img --snapshot first; check_same img --snapshot 1
    cp two truth; check_same img --snapshot second
    refused 1 "has no snapshot 'third'" "$fx" -q --snapshot third img m
}

# poke FILE OFFSET HEX...: damages a copy of ./good into FILE
poke() {
    local f=$1
    shift
    cp good "$f"
    while [ $# -gt 0 ]; do
        printf "$(echo "$2" | sed 's/../\\x&/g')" | dd of="$f" bs=1 seek=$(($1)) conv=notrunc status=none
        shift 2
    done
}

t_qcow2_damaged_headers_are_refused() {
    qemu-img create -q -f qcow2 good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
100 00020000 header.s length
100 00000048 header.s length
116 7fffffff reaches past the first cluster
8 000000000000fff0000003ff name of the backing
8 000000000000020000000fff name of the backing
76 00000020 incompatible bit 5
72 80000000 incompatible bit 63
76 00000008 compression type
104 01 compression type
96 00000007 refcount width
36 00500000 size of the L1
36 00000000 size of the L1
40 0000000000030200 offset of the L1
40 0000400000000000 offset of the L1
32 00000001 encrypted
32 00000002 encrypted
4 00000004 unknown version 4
20 00000008 cluster size
20 00000016 cluster size
88 0000000000000002 raw external data
24 ffffffffffffffff the size
76 00000004 does not name its external data'
    refuse_each poke bad <<<"$rows"
    qemu-img create -q -f qcow2 -o cluster_size=8k good 64M
    poke bad 76 00000010; refused 1 'subclusters need' "$fx" -q bad m
    head -c 71 good >bad; refused 1 'is not a qcow2' "$fx" -q bad m
    head -c 4000 good >bad; refused 1 'offset of the L1' "$fx" -q bad m
}

t_qcow2_damaged_tables_cost_their_range_only() {
    qemu-img create -q -f qcow2 good 1G; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 512M 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local l1 l2
    l1=$(od -An -tu8 --endian=big -j40 -N8 good | tr -d ' '); l2=$(($(od -An -tu8 --endian=big -j"$l1" -N8 good) & 0xffffffffffff))
    # L1[0]: not aligned, past the end, reserved bits; L2[0]: not aligned, past the end, reserved bits
    for row in "$l1 8000000000040200" "$l1 8000004000000000" "$l1 8100000000040000" \
        "$l2 8000000000050200" "$l2 8000004000000000" "$l2 8000000000050010"; do
        poke bad $row
        "$fx" -q bad m
        not dd if=m of=/dev/null bs=4k count=1 2>err; grep -q 'Input/output' err
        cmp -n 1048576 -i $((512 << 20)) m truth
        [ "${row%% *}" = "$l1" ] || cmp -n 983040 -i 65536 m truth
        "$fx" --umount m
    done
    # Truncated: what is there reads, the rest is EIO and not zeros, and cp notices.
    cp good bad; truncate -s $(($(stat -c %s good) - 300000)) bad
    "$fx" -q bad m; cmp -n 1048576 m truth
    not cmp -n 1048576 -i $((512 << 20)) m truth
    not dd if=m of=/dev/null bs=4k skip=$(((513 << 20) / 4096 - 1)) count=1 2>err; grep -q 'Input/output' err
    not cp m copy 2>err
    "$fx" --umount m
    # A zero flag where version 2 has none; a compressed cluster of garbage.
    qemu-img create -q -f qcow2 -o compat=0.10 good 1M; qemu-io -c 'write -P 1 0 128k' good >/dev/null
    l1=$(od -An -tu8 --endian=big -j40 -N8 good); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 good) & 0xffffffffffff))
    poke bad $((l2 + 7)) 01
    "$fx" -q bad m; not head -c 1 m 2>err; dd if=m bs=64k skip=1 count=1 status=none | cmp -n 65536 - <(head -c 65536 /dev/zero | tr '\0' '\1')
    "$fx" --umount m
    head -c 300000 "$top"/fuseexp.c >raw; truncate -s 300032 raw
    for c in zlib zstd; do
        qemu-img convert -c -O qcow2 -o compression_type=$c -f raw raw good
        l1=$(od -An -tu8 --endian=big -j40 -N8 good); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 good) & 0xffffffffffff))
        local host; host=$(($(od -An -tu8 --endian=big -j$l2 -N8 good) & 0x3fffffffffffff))
        poke bad $((host + 20)) ffffffffffffffff
        "$fx" -q bad m; not head -c 1 m 2>err; grep -q 'Input/output' err
        cmp -i 65536 m raw; "$fx" --umount m
    done
}

t_qcow2_marked_dirty_or_corrupt_is_read() {
    qemu-img create -q -f qcow2 good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null; qemu-img convert -O raw good truth
    for bit in 01 02; do
        poke bad 79 $bit; cp bad copy
        check_same bad
        cmp bad copy
    done
    not "$fx" -q --format qcow2 truth m 2>err; grep -q 'is not a qcow2 image' err
}

t_qcow2_of_absurd_size_costs_nothing() {
    qemu-img create -q -f qcow2 -o cluster_size=2M img 4P
    "$fx" -q img m
    same "$(stat -c %s m)" $((4 << 50))
    same "$(dd if=m bs=4k skip=$((1 << 39)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_qcow2_of_16_tib_with_full_tables_stays_small() {
    local ns kib big; big=$(mktemp -d /dev/shm/fuseexp-test.XXXXXX)         # ext4 has no files of that length
    # shellcheck disable=SC2064
    trap "rm -rf '$big'" EXIT
    qemu-img create -q -f qcow2 -o preallocation=metadata,cluster_size=1M "$big/img" 16T
    ns=$(date +%s%N)
    "$fx" -q "$big/img" m
    ns=$((($(date +%s%N) - ns) / 1000000))
    py '                                                                       # every slice of every table is needed once
f = os.open("m", os.O_RDONLY | os.O_DIRECT); b = mmap.mmap(-1, 4096)
for i in range(0, 16 << 40, 512 << 20): assert os.preadv(f, [b], i) == 4096 and b[:] == bytes(4096)'
    kib=$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")
    echo "ready in $ns ms, peak $kib KiB" >&3
    [ "$kib" -le $(((64 + 16) * 1024)) ] || fail "$kib KiB"
    "$fx" --umount m
}

# fuzz FORMAT TIMES IMAGE TRUTH FROM TO MOST: single bytes of [FROM, TO) are damaged, MOST blocks of 4 KiB may come out wrong
fuzz() {
    "$build/fuseexp-asan" --fuzz-image "$@" 2>log || { grep -v 'cannot read\|more lines' log | tail -n 40; false; }
    not grep -q 'Sanitizer\|runtime error' log
}

t_qcow2_random_damage_is_survived() {
    local l1 l2 o
    for o in cluster_size=4k cluster_size=16k,extended_l2=on cluster_size=64k,compression_type=zstd; do
        rm -f img; qemu-img create -q -f qcow2 -o $o img 1M; o=${o#cluster_size=}; o=$((${o%%k*} * 1024))
        scribble img 5 $o; scribble img 6
        qemu-img convert -O raw img truth
        l1=$(($(od -An -tu8 --endian=big -j40 -N8 img))); l2=$(l2_of img)
        fuzz qcow2 1500 img truth 0 112 1000000                             # the header: anything but a crash
        fuzz qcow2 500 img truth $l1 $((l1 + 8)) 1000000
        fuzz qcow2 2000 img truth $l2 $((l2 + 4096)) $((o / 4096))          # one entry, one cluster
    done
}

t_qcow2_under_load_has_no_races() {
    for i in $(seq 100); do head -c $((i * 991)) "$top"/fuseexp.c; done >truth; truncate -s %512 truth
    qemu-img convert -c -f raw -O qcow2 truth base; qemu-img create -q -f qcow2 -b base -F qcow2 img; scribble img 3
    qemu-img convert -O raw img truth
    "$build/fuseexp-tsan" -q -f --sandbox=off --cache-size 1M img m 2>log & local pid=$!
    wait_for test -s m
    cmp m truth & local a=$!
    fio --name=r --filename="$PWD/m" --readonly --rw=randread --bs=4k --ioengine=libaio --iodepth=8 --direct=1 --numjobs=3 \
        --runtime=3 --time_based --output=fio.log
    wait $a
    umount m
    wait $pid || { cat log; false; }
    not grep -q Sanitizer log
}

t_corpus_qcow2_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = qcow2 ] && [ "$expected" = ok ] || continue
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$sum" = - ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 8 ] || fail "only $n"
}

# ---- the size ----------------------------------------------------------------------------------------------------

# each_disk COMMAND...: with a fresh writable mount at m of 3 MiB of 'Z' as each of these. made: which; img: the file;
# again: the command that mounts it once more
each_disk() {
    for made in raw compat=1.1 compat=0.10,cluster_size=512 cluster_size=2M extended_l2=on,cluster_size=64k backing snapshot overlay; do
        rm -f img base; img=img; again=("$fx" -q -w --no-passthrough)
        head -c 5M /dev/zero | tr '\0' B >base
        case $made in
        raw) truncate -s 3M img; again+=(--format raw) ;;
        backing) qemu-img create -q -f qcow2 -b base -F raw img 3M ;;
        snapshot) qemu-img create -q -f qcow2 img 3M; qemu-io -c 'write -P 90 0 3M' img >io.log; qemu-img snapshot -c s img ;;
        overlay) truncate -s 3M base; again+=(--format raw --overlay img); img=base ;;
        *) qemu-img create -q -f qcow2 -o $made img 3M ;;
        esac
        "${again[@]}" $mount_options $img m
        [ $made = snapshot ] || head -c 3M /dev/zero | tr '\0' Z | dd of=m bs=1M iflag=fullblock conv=notrunc status=none
        "$@"
        "$fx" --umount m
        [ $made = raw ] || qemu-img check -q img
    done
}

t_what_was_cut_off_stays_away() {
    local made img again mount_options=
    cut_off() {
        py '
m = os.open("m", os.O_RDWR); model = bytearray(b"Z" * (3 << 20)); raw = sys.argv[1] == "raw"
for n in (2500001, 2500000, 2499999, 3 << 20, 65537, 65535, 1000, 700, 699, 700, 1024, 5000000, 300001, 5000000, 70000, 1000, 700):
    os.ftruncate(m, n); del model[n:]; model += bytes(n - len(model))
    assert os.fstat(m).st_size == n and os.pread(m, n + 10, 0) == model, n
    d = os.urandom(min(n, 5000)); os.pwrite(m, d, n - len(d)); model[n - len(d):] = d
open("model", "wb").write(model if raw else model + bytes(-len(model) % 512))' $made
        "$fx" --umount m; "${again[@]}" $img m; cmp m model
        truncate -s 5000001 m; truncate -s 5000001 model; cmp m model
    }
    each_disk cut_off
}

# Asynchronous writes that were on their way when the disk was cut do not come back when it grows, nor make it grow.
t_writes_on_their_way_when_the_disk_is_cut_stay_away() {
    local made img again mount_options=
    cat >cut.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
enum { N = 48, SIZE = 65536, DISK = 3 << 20, CUT = 4097 };
int main(void) {
    static struct iocb cb[N], *list[N]; static struct io_event ev[N]; aio_context_t ctx = 0; char *b, *r; int bad = 0;
    int fd = open("m", O_RDWR | O_DIRECT);
    if (fd < 0 || posix_memalign((void **)&b, 4096, SIZE) || posix_memalign((void **)&r, 4096, DISK) || syscall(SYS_io_setup, N, &ctx)) return 2;
    memset(b, 'A', SIZE);
    for (int round = 0; round < 16 && !bad; round++) {
        for (int i = 0; i < N; i++) {
            cb[i] = (struct iocb){ .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = fd, .aio_buf = (long)b, .aio_nbytes = SIZE, .aio_offset = (long)(i * 7 % N) * SIZE };
            list[i] = &cb[i];
        }
        for (int i = 0; i < N; i += 16) if (syscall(SYS_io_submit, ctx, 16, list + i) != 16) return 2;
        if (ftruncate(fd, CUT)) { perror("ftruncate"); return 2; }
        if (round % 2 && ftruncate(fd, DISK)) { perror("grow"); return 2; }   /* at once, while they are on their way */
        if (lseek(fd, 0, SEEK_END) != (round % 2 ? DISK : CUT)) { puts("not cut"); return 1; }
        if (syscall(SYS_io_getevents, ctx, N, N, ev, NULL) != N) return 2;
        if (round % 2 == 0 && lseek(fd, 0, SEEK_END) != CUT) { puts("longer again"); return 1; }
        if (ftruncate(fd, DISK) || pread(fd, r, DISK, 0) != DISK) { perror("grow"); return 2; }
        for (int i = CUT; i < DISK; i++) bad += r[i] != 0;
    }
    if (bad) printf("%d bytes came back\n", bad);
    return bad != 0;
}
C
    gcc -O2 -w cut.c -o cut
    cut() { ./cut || fail "$made $mount_options"; }
    each_disk cut
    mount_options=--growable; each_disk cut
}

# Whatever size anybody sees is one that was written, with its data; records appended meanwhile leave no gap.
t_size_that_is_seen_has_its_data() {
    local made img again mount_options=--growable
    appended() {
        py '
import threading
m = os.open("m", os.O_RDWR | os.O_APPEND); r = os.open("m", os.O_RDONLY); start = os.fstat(m).st_size; bad = []; over = False
def watch():
    while not over:
        n = os.stat("m").st_size; b = os.pread(r, 1, n - 1)
        if (n - start) % 700 or b == b"\0": bad.append((n, b))
t = threading.Thread(target=watch); t.start()
for i in range(1500): assert os.write(m, b"x" * 700) == 700
over = True; t.join()
assert not bad, bad[:5]
assert os.fstat(m).st_size == start + 1500 * 700 and os.pread(r, 1500 * 700, start) == b"x" * (1500 * 700)'
    }
    each_disk appended
}

# Punching up to the end frees the whole last cluster, but nothing of what is appended at the same time.
t_hole_up_to_the_end_spares_what_is_appended() {
    local made img again mount_options=--growable
    spared() {
        py '
import threading
libc = ctypes.CDLL(None, use_errno=True); holes = []; over = False
a = os.open("m", os.O_RDWR | os.O_APPEND); b = os.open("m", os.O_RDWR); start = os.fstat(b).st_size
def punch():
    while not over:
        n = os.fstat(b).st_size; c = n & ~65535
        if n > c: assert libc.fallocate(b, 3, ctypes.c_long(c), ctypes.c_long(n - c)) == 0; holes.append((c, n))
t = threading.Thread(target=punch); t.start()
for i in range(800): assert os.write(a, b"x" * 700) == 700
over = True; t.join()
data = bytearray(os.pread(b, 10 << 20, 0))
for c, n in holes: data[c:n] = b"x" * (n - c)
assert len(data) == start + 800 * 700 and data[start:] == b"x" * (800 * 700)'
    }
    each_disk spared
}

t_disk_that_was_cut_takes_its_windows_with_it() {
    local f o n
    mkdir d
    for f in raw qcow2; do for o in "" --growable; do
        truncate -s 20M r; printf 'start=2048,size=8192,type=83\nstart=20480,size=16384,type=83\n' | sfdisk -q --label dos r
        dd if=/dev/urandom of=r bs=1M seek=10 count=8 conv=notrunc status=none; cp r copy
        qemu-img convert -f raw -O $f r img
        "$fx" -q -w $o --format $f img d
        cat d/p2 >/dev/null
        exec 7<>d/p2
        truncate -s 4M d/disk; truncate -s 4M copy
        not dd if=/dev/zero of=d/p2 bs=64k count=1 conv=notrunc status=none 2>err; grep -q 'Input/output' err
        not dd if=/dev/zero bs=64k count=1 status=none 2>err >&7
        not fallocate -l 4096 d/p2 2>err; not fallocate -z -l 4096 d/p2 2>err; not fallocate -p -l 4096 d/p2 2>err
        not dd if=d/p2 of=out bs=4k count=1 status=none 2>err; grep -q 'Input/output' err; [ ! -s out ]
        dd if=copy of=d/p1 bs=64k skip=5 count=1 conv=notrunc,fsync status=none
        dd if=copy of=copy bs=64k skip=5 seek=16 count=1 conv=notrunc status=none
        same "$(stat -c %s d/disk)" 4194304; cmp copy d/disk
        truncate -s 20M d/disk; truncate -s 20M copy; cmp copy d/disk
        printf 'there again' | dd of=d/p2 conv=notrunc status=none; printf 'there again' | cmp -n 11 - d/p2
        exec 7>&-
        printf 'there again' | dd of=copy bs=512 seek=20480 conv=notrunc status=none
        umount d; gone; qemu-img compare -q -f $f -F raw img copy
    done; done
}

t_fallocate_sets_room_aside_and_lengthens() {
    local made img again mount_options=--growable
    set_aside() {
        py '
m = os.open("m", os.O_RDWR); size = 3 << 20; libc = ctypes.CDLL(None, use_errno=True); model = bytearray(b"Z" * size)
def fa(mode, off, n): return 0 if libc.fallocate(m, mode, ctypes.c_long(off), ctypes.c_long(n)) == 0 else ctypes.get_errno()
def look(): assert os.fstat(m).st_size == len(model) and os.pread(m, len(model) + 1, 0) == model
assert fa(0, 100000, 500000) == 0; look()
assert fa(3, 200000, 700000) == 0; model[200000:900000] = bytes(700000); look()
assert fa(0, 150000, 600000) == 0; look()
for off in (size, size - 5000, size + 70000):
    assert fa(1, off, 10000) == errno.EOPNOTSUPP and fa(17, off, 10000) == errno.EOPNOTSUPP, off
    look()
assert fa(3, size + 5000, 4096) == 0; look()
assert fa(3, size - 5000, 10000) == 0; model[-5000:] = bytes(5000); look()
assert fa(0, size - 70000, 200001) == 0; model += bytes(130001); look()
assert fa(16, len(model) - 1000, 100000) == 0; model[-1000:] = bytes(1000); model += bytes(99000); look()
assert fa(0, len(model) + 300000, 1000) == 0; model += bytes(301000); look()
open("model", "wb").write(model + bytes(-len(model) % 512 if sys.argv[1] != "raw" else 0))' $made
        "$fx" --umount m; "${again[@]}" $img m; cmp m model
    }
    each_disk set_aside
    qemu-img create -q -f qcow2 img 8M
    "$fx" -q -w img m; fallocate -l 8M m; not fallocate -o 8M -l 1M m 2>err; grep -q 'No space' err; "$fx" --umount m
    [ "$(stat -c %b img)" -ge 16384 ] || fail "no room was set aside"
    qemu-img check -q img; same "$(qemu-img map --output=json img | jq -c '[.[].data] | unique')" '[true]'
}

# What fails leaves the size as it was: no gap of zeros, now or after the next start.
t_growing_that_fails_changes_nothing() {
    local f op n
    mkdir small; mount -t tmpfs -o size=4M none small
    for f in raw qcow2; do
        rm -f small/img; head -c 1M /dev/zero | tr '\0' Z >z; qemu-img convert -f raw -O $f z small/img
        "$fx" -q -w --growable --no-passthrough --format $f small/img m
        not fallocate -l 64M m 2>err
        same "$(stat -c %s m)" 1048576; cmp m z
        py '
m = os.open("m", os.O_RDWR | os.O_APPEND); n = 1 << 20
try:
    while True: n += os.write(m, b"x" * 50000)
except OSError as e: assert e.errno == errno.ENOSPC
assert os.fstat(m).st_size == n, (n, os.fstat(m).st_size)
b = os.pread(m, n, 0); assert b.count(b"Z") == 1 << 20 and b.count(b"x") == n - (1 << 20)
open("size", "w").write(str(n + -n % 512 * (sys.argv[1] == "qcow2")))' $f
        "$fx" --umount m || true
        same "$(qemu-img info --output=json -f $f small/img | jq '."virtual-size"')" "$(cat size)"
    done
    umount small
    local n=0
    for f in raw qcow2; do
        for op in fallocate write truncate; do
            rm -f img; qemu-img convert -f raw -O $f z img
            FUSEEXP_FAIL_OP=$op "$fault" -q -w --growable --no-passthrough --format $f --sandbox=off img m 2>err || { grep -q fuseexp err; continue; }
            n=$((n + 1))
            py '
m = os.open("m", os.O_RDWR | os.O_APPEND); n = 1 << 20
if ctypes.CDLL(None).fallocate(m, 0, ctypes.c_long(0), ctypes.c_long(4 << 20)) == 0: n = 4 << 20
assert os.fstat(m).st_size == n, (sys.argv, n, os.fstat(m).st_size)
try: n += os.write(m, b"more")
except OSError: pass
assert os.fstat(m).st_size == n, (sys.argv, n, os.fstat(m).st_size)' $f $op
            "$fault" --umount m 2>err || true; gone
        done
    done
    [ $n -ge 4 ]
}

# ---- qcow2 writing ---------------------------------------------------------------------------------------------

# check_written IMAGE SEED: random changes through the export; then the export, qemu-img check and qemu-img convert all agree
check_written() {
    qemu-img convert -O raw "$1" model
    "${writer:-$fx}" -q -w "$1" m
    py "$fsx_py"'fsx("m", "model", 120, int(sys.argv[1]), 3)' "$2"
    cmp m model
    "$fx" --umount m
    qemu-img check -q "$1"
    qemu-img convert -O raw "$1" out
    cmp out model
}

t_qcow2_writes_match_a_model_in_every_variant() {
    local n=0 o
    for o in cluster_size=64k compat=0.10 cluster_size=512 compat=0.10,cluster_size=512 cluster_size=4k cluster_size=2M \
        refcount_bits=1 refcount_bits=2,cluster_size=1k refcount_bits=64,cluster_size=512 lazy_refcounts=on compression_type=zstd \
        extended_l2=on extended_l2=on,cluster_size=16k extended_l2=on,cluster_size=2M preallocation=metadata preallocation=falloc \
        data_file=ext.raw data_file=ext.raw,data_file_raw=on extended_l2=on,data_file=ext.raw; do
        n=$((n + 1))
        rm -f img ext.raw
        qemu-img create -q -f qcow2 -o $o img 12345k; scribble img $n
        check_written img $n
    done
}

t_qcow2_writes_over_backing_files_snapshots_and_compression() {
    local o i
    for o in cluster_size=64k cluster_size=512 compat=0.10 extended_l2=on cluster_size=2M; do
        rm -f img base; random base 3000; qemu-img create -q -f qcow2 -o $o -b base -F raw img 9M
        cp base before; check_written img 1; cmp base before
        rm -f img; qemu-img create -q -f qcow2 -o $o -b base -F raw img 7M         # shorter than what is below
        check_written img 2
        rm -f img; qemu-img create -q -f qcow2 -o $o img 9M
        for i in 1 2 3; do scribble img $i; qemu-img convert -O raw img s$i; qemu-img snapshot -c s$i img; done
        check_written img 3
        for i in 1 2 3; do
            qemu-img convert -l snapshot.name=s$i -O raw img out; cmp out s$i
            "$fx" -q --snapshot s$i img m; cmp m s$i; "$fx" --umount m
        done
        qemu-img snapshot -d s2 img; qemu-img check -q img
        for i in $(seq 300); do head -c $((i * 131)) "$top"/fuseexp.c; done | head -c 6M >base; truncate -s 6M base
        qemu-img convert -c -f raw -O qcow2 -o $o base img
        check_written img 4
    done
}

# owners: threads own alternate pieces of the whole disk and write, punch and read them; every thread compares its own pieces
# with a model, which holds what was acknowledged. All work in the same few clusters at a time, so that they meet there.
#   ./owners FILE MODEL PIECE ROUNDS SEED FLAGS       pieces of PIECE bytes, "0": of random sizes. FLAGS: p punches, s syncs,
#   k: every piece is written once, MODEL first, until FILE fails (its server is killed)
make_owners() {
    cat >owners.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
enum { THREADS = 4, WINDOW = 32, MAX = 131072 };
static int fd, model; static unsigned long piece, n_pieces, rounds, seed; static const char *flags;
static unsigned long *start;        /* of each piece; [n_pieces]: the end */
static pthread_barrier_t bar; static _Atomic int wrong, dead;
static unsigned long rnd(unsigned long *x) { *x ^= *x << 13; *x ^= *x >> 7; *x ^= *x << 17; return *x; }
static void look(unsigned long i) {
    static _Thread_local unsigned char a[MAX], b[MAX]; unsigned long len = start[i + 1] - start[i];
    if (pread(model, b, len, start[i]) != (ssize_t)len || pread(fd, a, len, start[i]) != (ssize_t)len || memcmp(a, b, len)) {
        if (!wrong++) fprintf(stderr, "piece at %lu, %lu bytes: not what its owner wrote\n", start[i], len);
    }
}
static void change(unsigned long i, unsigned long *x) {
    static _Thread_local unsigned long b[MAX / 8]; unsigned long len = start[i + 1] - start[i], k = rnd(x) % 100;
    int kill = !!strchr(flags, 'k'), punch = k < 10 && strchr(flags, 'p');
    for (unsigned long j = 0; j < len / 8; j++) b[j] = punch ? 0 : rnd(x);
    if (kill && pwrite(model, b, len, start[i]) != (ssize_t)len) abort();
    if (punch ? fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start[i], len) : pwrite(fd, b, len, start[i]) != (ssize_t)len) {
        if (kill) { dead = 1; return; }
        perror("write"); exit(2);
    }
    if (!kill && pwrite(model, b, len, start[i]) != (ssize_t)len) abort();
    if (k > 96 && strchr(flags, 's') && fsync(fd) && !kill) { perror("fsync"); exit(2); }
}
static void *owner(void *arg) {
    unsigned long t = (unsigned long)arg, x = seed * 1000 + t + 1, y = seed + 77, first = n_pieces / WINDOW, i;
    for (unsigned long r = 0; r < rounds && !dead; r++) {       /* y is the same for all: they meet in one window */
        unsigned long w = strchr(flags, 'k') ? r : rnd(&y) % first;
        if (w >= first) break;
        for (unsigned long j = 0; j < WINDOW / THREADS && !dead; j++) {
            i = w * WINDOW + (j * 5 + r) % (WINDOW / THREADS) * THREADS + t;
            change(i, &x);
            if (rnd(&x) % 8 == 0 && !strchr(flags, 'k')) look(i);
        }
        if (rnd(&y) % 4 == 0 && !strchr(flags, 'k')) pthread_barrier_wait(&bar);
    }
    if (!strchr(flags, 'k')) for (i = t; i < n_pieces; i += THREADS) look(i);
    return NULL;
}
int main(int c, char **v) {
    pthread_t th[THREADS]; unsigned long size, at = 0;
    (void)c; fd = open(v[1], O_RDWR); model = open(v[2], O_RDWR); piece = strtoul(v[3], 0, 0); rounds = strtoul(v[4], 0, 0);
    seed = strtoul(v[5], 0, 0); flags = v[6]; size = lseek(model, 0, SEEK_END);
    if (fd < 0 || model < 0 || lseek(fd, 0, SEEK_END) != (off_t)size) { perror("open"); return 2; }
    start = calloc(size / 512 + 2, 8); seed += 1;
    for (unsigned long x = seed * 7919; at < size; at += piece ? piece : (1 + rnd(&x) % (x & 1 ? 3 : 120)) * 512) start[n_pieces++] = at;
    start[n_pieces] = size; pthread_barrier_init(&bar, NULL, THREADS);
    for (unsigned long t = 0; t < THREADS; t++) pthread_create(&th[t], NULL, owner, (void *)t);
    for (int t = 0; t < THREADS; t++) { pthread_join(th[t], NULL); }
    return wrong != 0;
}
C
    gcc -O2 -w -pthread owners.c -o owners
}

# owned IMAGE PIECE ROUNDS SEED FLAGS OPTION...: then the export, qemu-img check and qemu-img convert agree with the model
owned() {
    qemu-img convert -O raw "$1" model
    "$fx" -q -w "${@:6}" "$1" m
    ./owners m model "$2" "$3" "$4" "$5" || fail "owners of $2 bytes, seed $4: $1 ${made:-}"
    cmp m model; "$fx" --umount m
    qemu-img check -q "$1"
    qemu-img convert -O raw "$1" out; cmp out model || fail "$1 ${made:-}"
}

t_qcow2_owners_of_alternate_pieces_lose_nothing() {
    local n=0 made size
    make_owners
    for made in extended_l2=on,cluster_size=2M extended_l2=on,cluster_size=64k extended_l2=on,cluster_size=16k cluster_size=2M cluster_size=64k \
        cluster_size=512 cluster_size=64k,lazy_refcounts=on cluster_size=4k,compat=0.10 extended_l2=on,cluster_size=128k,data_file=ext.raw \
        data_file=ext.raw,data_file_raw=on preallocation=metadata extended_l2=on,preallocation=metadata; do
        n=$((n + 1)); rm -f img ext.raw
        case $made in *l2=on,cluster_size=2M) size=64M ;; *) size=8M ;; esac
        qemu-img create -q -f qcow2 -o $made img $size; scribble img $n
        owned img $((n % 2 ? 0 : 36864)) 40 $n ps
    done
    made="cells that are half a piece"; qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=2M img 64M; owned img 98304 60 1 s
    made="pieces of a sector"; qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=512k img 8M; owned img 512 200 1 s
    made="pieces of 64 KiB"; qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=1M img 32M; owned img 65536 40 1 s
}

t_qcow2_owners_over_backing_snapshots_and_compression_lose_nothing() {
    local n=0 made size
    make_owners
    random base 3000
    for i in $(seq 300); do head -c $((i * 131)) "$top"/fuseexp.c; done | head -c 6M >text; truncate -s 12M text
    for made in extended_l2=on,cluster_size=2M extended_l2=on,cluster_size=64k cluster_size=64k cluster_size=2M; do
        n=$((n + 1)); rm -f img
        qemu-img create -q -f qcow2 -o $made -b base -F raw img 16M; scribble img $n; owned img 0 40 $n ps
        qemu-img snapshot -c s img; qemu-img convert -O raw img snap; owned img 20480 40 $n s
        qemu-img convert -l snapshot.name=s -O raw img out; cmp out snap
        rm -f img; qemu-img convert -c -f raw -O qcow2 -o $made text img; owned img 0 40 $n ps
    done
    made=overlay; rm -f o.qcow2; cp base model; "$fx" -q --format raw --overlay o.qcow2 base m
    ./owners m model 0 40 1 ps; cmp m model; "$fx" --umount m; qemu-img check -q o.qcow2
}

# Every sector of a piece is what it was at the last sync, or what its owner was about to write.
t_qcow2_owners_that_are_killed_keep_what_was_there() {
    local n=0 o server
    make_owners
    random base 1000
    for o in extended_l2=on,cluster_size=2M extended_l2=on,cluster_size=64k cluster_size=64k cluster_size=512 extended_l2=on,cluster_size=16k; do
        n=$((n + 1)); rm -f img
        qemu-img create -q -f qcow2 -o $o -b base -F raw img 8M; scribble img $n; [ $((n % 2)) = 0 ] || qemu-img snapshot -c s img
        qemu-img convert -O raw img was; cp was will
        "$fx" -q -w img m; server=$(server_of)
        ./owners m will 20480 1000 $n ks & local load=$!
        until ! cmp -s was will; do :; done
        kill -9 "$server"
        wait $load || true; gone
        qemu-img check -q img >check.log 2>&1 || [ $? = 3 ] || { cat check.log; fail "$o"; }
        "$fx" -q img m
        py '
a, b, got = (open(f, "rb").read() for f in ("was", "will", "m"))
assert len(got) == len(a) and a != b
for i in range(0, len(a), 512):
    assert got[i:i + 512] in (a[i:i + 512], b[i:i + 512]), (sys.argv[1], i)' $o
        "$fx" --umount m
    done
}

t_qcow2_written_by_threads_has_no_races() {
    local o
    writer=$build/fuseexp-tsan
    for o in cluster_size=64k extended_l2=on,cluster_size=16k; do
        rm -f img; qemu-img create -q -f qcow2 -o $o img 24M; scribble img 1; qemu-img snapshot -c s img
        "$writer" -q -f -w --sandbox=off --cache-size 1M img m 2>log & local pid=$!
        wait_for test -s m
        fio --name=w --filename="$PWD/m" --rw=randrw --bsrange=512-128k --blockalign=512 --ioengine=libaio --iodepth=8 --numjobs=3 --size=24M \
            --direct=1 --fsync=20 --runtime=4 --time_based --output=fio.log || { cat fio.log; false; }
        fio --name=t --filename="$PWD/m" --rw=randtrim --bs=64k --ioengine=psync --size=24M --number_ios=100 --output=fio.log || true
        umount m
        wait $pid || { cat log; false; }
        not grep -q 'Sanitizer' log
        qemu-img check -q img
    done
}

t_qcow2_grows_shrinks_and_moves_its_tables() {
    local o
    for o in cluster_size=512 cluster_size=512,refcount_bits=64 cluster_size=64k extended_l2=on,cluster_size=16k; do
        rm -f img model; qemu-img create -q -f qcow2 -o $o img 64k; truncate -s 64k model
        "$fx" -q -w --growable img m
        py '
rnd = random.Random(4)
a, b = os.open("m", os.O_RDWR), os.open("model", os.O_RDWR)
for i in range(120):
    k = rnd.random(); size = os.fstat(b).st_size
    if k < .6: off = rnd.randrange(size + 200000); d = rnd.randbytes(rnd.choice([1, 512, 30000, 100000])); os.pwrite(a, d, off); os.pwrite(b, d, off)
    elif k < .75: n = rnd.randrange(1, size + 300000); os.ftruncate(a, n); os.ftruncate(b, n)
    elif k < .8: os.fsync(a)
    else: assert os.pread(a, 50000, size // 2) == os.pread(b, 50000, size // 2)
    assert os.fstat(a).st_size == os.fstat(b).st_size
'
        cmp m model
        "$fx" --umount m
        qemu-img check -q img
        truncate -s %512 model; qemu-img resize -q --shrink img "$(stat -c %s model)"; qemu-img compare -q -f qcow2 -F raw img model
    done
    # Refcount table of one small cluster: it has to grow again and again; and an L1 table longer than a block covers.
    rm -f img; qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 img 40M
    "$fx" -q -w --growable img m
    random data 5000; dd if=data of=m bs=64k conv=notrunc status=none
    truncate -s 300M m; dd if=data of=m bs=64k seek=4000 conv=notrunc status=none
    cmp -n 20480000 m data; cmp -n 20480000 -i 262144000:0 m data
    "$fx" --umount m
    qemu-img check -q img
    qemu-img convert -O raw img out; cmp -n 20480000 -i 262144000:0 out data
    # What a longer backing file has there does not appear when the image grows.
    random base 2000; qemu-img create -q -f qcow2 -b base -F raw img 1M
    "$fx" -q -w img m; truncate -s 3M m; truncate -s 2500001 m; truncate -s 5M m
    cp base model; truncate -s 1M model; truncate -s 5M model; cmp m model; "$fx" --umount m
    qemu-img convert -O raw img out; cmp out model; qemu-img check -q img
}

t_qcow2_gives_back_room_that_holes_leave() {
    qemu-img create -q -f qcow2 img 256M
    "$fx" -q -w img m
    dd if=/dev/urandom of=m bs=1M count=100 conv=notrunc,fsync status=none
    [ "$(stat -c %b img)" -gt 190000 ]
    fallocate -p -l 100M m; sync m; sync m
    [ "$(stat -c %b img)" -lt 20000 ] || fail "$(stat -c %b img) blocks"
    dd if=/dev/urandom of=m bs=1M count=100 seek=120 conv=notrunc,fsync status=none
    "$fx" --umount m
    qemu-img check -q img
    [ "$(stat -c %s img)" -lt 120000000 ] || fail "not used again: $(stat -c %s img)"
}

t_qcow2_every_failing_change_leaves_a_whole_image() {
    local errno n status
    qemu-img create -q -f qcow2 -o cluster_size=4k good 4M; qemu-io -c 'write -P 7 1M 1M' good >/dev/null; qemu-img snapshot -c s good
    for errno in 5 28; do
        for n in $(seq 1 3 150); do
            cp good img
            FUSEEXP_FAIL_NTH=$n FUSEEXP_FAIL_ERRNO=$errno "$fault" -q -w --sandbox=off img m 2>err || { grep -q fuseexp err; continue; }
            py '
rnd = random.Random(5); f = os.open("m", os.O_RDWR)
def ok(fn, *a):
    try: fn(*a); return True
    except OSError as e: return False
good = [ok(os.pwrite, f, bytes([i + 1]) * 50000, rnd.randrange(0, 4000000)) and (i % 10 < 9 or ok(os.fsync, f)) for i in range(30)]
open("lost", "w").write(str(good.count(False)))'
            status=0; "$fault" --umount m 2>err || status=$?
            qemu-img check -q img >check.log 2>&1 || [ $? = 3 ] || { cat check.log; fail "operation $n, errno $errno"; }
            [ "$(cat lost)" = 0 ] || [ $status = 1 ] || fail "operation $n, errno $errno: $(cat lost) errors, exit status $status"
            if [ $status = 0 ]; then break; fi
        done
    done
}

t_qcow2_crashes_lose_nothing_that_was_synced() {
    local o
    for o in cluster_size=64k cluster_size=512 extended_l2=on,cluster_size=16k refcount_bits=1,cluster_size=512; do
        rm -f good; qemu-img create -q -f qcow2 -o $o good 3M; qemu-io -c 'write -P 7 1M 1M' good >/dev/null
        case $o in refcount_bits=1*) ;; *) qemu-img snapshot -c s good ;; esac
        crash good "${CRASHES:-25}"
    done
}

# crash GOOD POINTS: of a recorded load on a copy of GOOD, at so many points, images that a crash could have left: everything written,
# or of what no barrier covered any part, sectors torn apart. Each is whole for qemu-img check, and holds what was synced.
crash() {
    rm -f record; cp "$1" img; qemu-img convert -O raw "$1" model
    FUSEEXP_RECORD=$PWD/record "$fault" -q -w --growable --sandbox=off img m
    py '
import struct, subprocess
rnd = random.Random(int(sys.argv[2])); libc = ctypes.CDLL(None)
def rec(): return os.stat("record").st_size if os.path.exists("record") else 0
f = os.open("m", os.O_RDWR); size = os.fstat(f).st_size; model = bytearray(open("model", "rb").read())
synced = [(0, bytes(model))]; touched = []          # with the length of the record: at the end of a sync, before a change
for i in range(60):
    k = rnd.random(); off = rnd.randrange(size) & ~511; n = min(rnd.choice([512, 4096, 20480, 65536, 300000]), size - off) & ~511
    if k < .65: touched.append((rec(), off, n)); b = rnd.randbytes(16) * (n // 16); os.pwrite(f, b, off); model[off:off + n] = b
    elif k < .85:
        touched.append((rec(), off, n)); model[off:off + n] = bytes(n)
        assert libc.fallocate(f, 3, ctypes.c_long(off), ctypes.c_long(n)) == 0
    elif k < .9:
        touched.append((rec(), size, 1 << 20)); os.pwrite(f, b"x" * 512, size + (1 << 20) - 512); size += 1 << 20
        model += bytes((1 << 20) - 512) + b"x" * 512
    else: os.fsync(f); synced.append((rec(), bytes(model)))
os.close(f)
subprocess.check_call([sys.argv[3], "--umount", "m"])
synced.append((rec(), bytes(model)))
data = open("record", "rb").read(); ops = []; at = 0
while at < len(data):
    op, _, off, n = struct.unpack_from("<QQQQ", data, at); at += 32 + (n if op == 87 else 0)
    ops.append((chr(op), off, n, data[at - n:at] if op == 87 else b"", at))
def apply(img, op, off, n, d):
    if op == "W": img.extend(bytes(max(0, off + n - len(img)))); img[off:off + n] = d
    elif op == "T":
        del img[off:]; img.extend(bytes(off - len(img)))
    elif op == "P": e = min(off + n, len(img)); img[off:e] = bytes(max(0, e - off))
durable = bytearray(open(sys.argv[1], "rb").read()); pos = 0; pending = []
for p in sorted(rnd.sample(range(1, len(ops) + 1), min(int(sys.argv[4]), len(ops)))):
    for pos in range(pos, p):
        if ops[pos][0] != "S": pending.append(ops[pos]); continue
        for o in pending: apply(durable, *o[:4])
        pending = []
    pos = p
    for tear in range(3):
        img = bytearray(durable)
        for op, off, n, d, _ in pending:
            if tear == 0: apply(img, op, off, n, d)
            elif op != "W": rnd.random() < .5 and apply(img, op, off, n, d)
            else:
                for s in range(0, n, 512): rnd.random() < .5 and apply(img, "W", off + s, min(512, n - s), d[s:s + 512])
        open("crashed", "wb").write(img)
        r = subprocess.run(["qemu-img", "check", "-q", "crashed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert r.returncode in (0, 3), (p, tear, r.stdout[:500])
        subprocess.check_call(["qemu-img", "convert", "-O", "raw", "crashed", "out"])
        got = open("out", "rb").read(); here = ops[p - 1][4]; when, want = [s for s in synced if s[0] <= here][-1]
        for i in range(0, len(want), 512):
            assert got[i:i + 512] == want[i:i + 512] or any(when <= w <= here and o <= i < o + n for w, o, n in touched), (p, tear, i)
' "$1" 7 "$fault" "$2"
}

t_qcow2_killed_again_and_again_under_load_stays_whole() {
    local i
    qemu-img create -q -f qcow2 -o cluster_size=4k img 64M
    for i in $(seq ${KILLS:-20}); do
        "$fx" -q -w img m
        : >going
        python3 -c '
import os, random, sys
rnd = random.Random(int(sys.argv[1])); f = os.open("m", os.O_RDWR); os.write(os.open("going", os.O_WRONLY), b"x")
while True:
    os.pwrite(f, rnd.randbytes(rnd.choice([512, 4096, 65536, 200000])), rnd.randrange(130000) * 512)
    if rnd.random() < .1: os.fsync(f)
' $i 2>/dev/null & local load=$!
        until [ -s going ]; do sleep 0.005; done
        sleep "0.0$((RANDOM % 10))"
        kill -9 "$(server_of)"
        wait $load || true
        gone
        qemu-img check -q img >check.log 2>&1 || [ $? = 3 ] || { cat check.log; fail "round $i"; }
    done
}

t_ext4_over_an_overlay_killed_again_and_again_replays_its_journal() {
    local i dev server
    truncate -s 48M base; mkfs.ext4 -q base; cp base before; mkdir mnt
    for i in $(seq "${KILLS:-20}"); do
        "$fx" -q --format raw --overlay work.qcow2 base m
        # Every other time e2fsck replays the journal, else the kernel.
        [ $((i % 2)) = 0 ] || e2fsck -fp m >fsck.log 2>&1 || [ $? = 1 ] || { cat fsck.log; fail "round $i"; }
        dev=$(losetup -f --show m); mount "$dev" mnt
        [ "$i" = 1 ] || cmp mnt/kept kept
        random mnt/kept $((i % 12 * 50 + 50)); cp mnt/kept kept; sync -f mnt/kept
        (while :; do random mnt/more$((RANDOM % 9)) 200; done 2>/dev/null) & local load=$!
        sleep "0.$((RANDOM % 2))$((RANDOM % 10))"
        server=$(server_of); kill -9 "$server"; kill $load; wait $load 2>/dev/null || true
        wait_for umount mnt; losetup -d "$dev"; gone
        qemu-img check -q work.qcow2 >check.log 2>&1 || [ $? = 3 ] || { cat check.log; fail "round $i"; }
    done
    "$fx" -q --format raw --overlay work.qcow2 base m
    mount -o loop m mnt; cmp mnt/kept kept; umount mnt
    e2fsck -fn m >/dev/null 2>&1
    "$fx" --umount m
    cmp base before
}

t_qcow2_disk_full_is_told_and_leaves_a_whole_image() {
    mkdir small; mount -t tmpfs -o size=12M none small
    qemu-img create -q -f qcow2 small/img 64M
    "$fx" -q -w small/img m
    not dd if=/dev/urandom of=m bs=1M count=32 conv=notrunc,fsync status=none 2>err
    grep -q 'No space' err
    expect 1 "$fx" --umount m
    qemu-img check -q small/img >check.log || [ $? = 3 ]
    refused 1 'small.*: .*[Nn]o space' "$fx" -q --temporary="$PWD/small" --format raw "$top/fuseexp.c" m || true
    umount small
}

# Writes that fail for want of room leave nothing behind: no leaked clusters, no longer file, room for others.
t_qcow2_refused_writes_leak_nothing() {
    local o step base
    mkdir small; mount -t tmpfs -o size=12M none small; qemu-img create -q -f qcow2 base 256M; qemu-io -c 'write -P 9 0 256M' base >io.log
    for o in cluster_size=512 cluster_size=4k,refcount_bits=1 cluster_size=64k,refcount_bits=64 cluster_size=2M,refcount_bits=8 \
        extended_l2=on,cluster_size=64k "cluster_size=64k -b $PWD/base -F qcow2"; do
        qemu-img create -q -f qcow2 -o $o small/img 256M
        "$fx" -q -w --growable --allow-external "$PWD" small/img m 2>log
        py '
f = os.open("m", os.O_RDWR | os.O_DIRECT); b = mmap.mmap(-1, 1 << 18); b[:] = os.urandom(1 << 18); refused = grown = 0; step = 65536
for p in range(0, 256 << 20, 32 << 20): os.pwritev(f, [memoryview(b)[:4096]], p)
os.fsync(f)
g = os.open("small/ballast", os.O_WRONLY | os.O_CREAT)
def fill():
    try:
        while os.write(g, b): pass
    except OSError: pass
fill()
was, rnd = os.stat("small/img").st_size, random.Random(3)
for i in range(900):
    try: os.pwritev(f, [memoryview(b)[:rnd.choice([512, 4096, 65536, 1 << 18])]], rnd.randrange((256 << 20) // step - 4) * step)
    except OSError as e: assert e.errno in (errno.ENOSPC, errno.EIO), e; refused += 1
    if i % 100 == 50:
        try: os.fsync(f)
        except OSError: pass
    if i % 50 == 20:
        try: os.ftruncate(f, (1 << 40) + i * step)       # the L1 table moves
        except OSError: grown += 1
    if i % 10 == 0: fill()
assert refused > 200, refused
now = os.stat("small/img").st_size
assert now <= was + (32 << 20), (was, now)
os.unlink("small/ballast"); os.close(g)
try: os.fsync(f)
except OSError: pass
for p in range(8): os.pwritev(f, [memoryview(b)[:4096]], (p * 32 << 20) + 8192)         # and there is room again
os.fsync(f)'
        cp --sparse=always m model; expect 1 "$fx" --umount m
        "$fx" --check --json -q small/img >said || [ $? = 3 ]
        [ "$(jq '.leaks // 0' said)" -le 8 ] || fail "$o: $(jq .leaks said) leaks"
        qemu-img check -q small/img >check.log || [ $? = 3 ]
        qemu-img compare -q -f qcow2 -F raw small/img model
        [ "$(stat -c %s small/img)" -le $((32 << 20)) ] || fail "$o: $(stat -c %s small/img) bytes"
        rm -f small/img model
    done
}

# The same by a limit on the file's size; and a growth of the tables that fails, again and again.
t_qcow2_growing_that_fails_leaves_the_file_as_it_was() {
    local o limit s
    for o in cluster_size=512,refcount_bits=64 cluster_size=4k cluster_size=64k,refcount_bits=1 cluster_size=2M; do
        qemu-img create -q -f qcow2 -o $o img 64M
        "$fx" -q -w --growable img m 2>log; s=$(server_of)
        dd if=/dev/zero bs=64k count=4 status=none | tr '\0' x | dd of=m conv=notrunc,fsync status=none
        limit=$(stat -c %s img); prlimit --fsize="$limit":unlimited -p "$s"
        py '
f, rnd, b, bad = os.open("m", os.O_RDWR), random.Random(1), b"y" * 262144, 0
for i in range(300):
    try:
        if i % 3: os.pwrite(f, b, rnd.randrange(200) << 18)
        else: os.ftruncate(f, (1 << 36) + (i << 30))
    except OSError as e: bad += 1; assert e.errno in (errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EINVAL), e
    if i % 50 == 49: os.fsync(f)
assert bad > 40, bad'
        prlimit --fsize=unlimited:unlimited -p "$s"
        same "$(stat -c %s img)" "$limit"
        "$fx" --umount m || [ $? = 1 ]; "$fx" -q --check img >said; qemu-img check -q img; rm img
    done
    # Every change of the file fails in turn: where no flush has failed, nothing is leaked (what is in the file may be).
    qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 good 1M
    for n in $(seq 1 11 150); do
        cp good img
        FUSEEXP_FAIL_NTH=$n FUSEEXP_FAIL_ERRNO=28 "$fault" -q -w --growable --sandbox=off img m 2>err || { grep -q fuseexp err; continue; }
        py '
f = os.open("m", os.O_RDWR)
def ok(fn, *a):
    try: fn(*a)
    except OSError: pass
for i in range(12): ok(os.pwrite, f, b"x" * 9000, i * 70001); ok(os.ftruncate, f, (4 + i) << 20); i % 5 or ok(os.fsync, f)'
        "$fault" --umount m 2>err || [ $? = 1 ]
        qemu-img check -q img >check.log 2>&1 || [ $? = 3 ] || { cat check.log; fail "operation $n"; }
    done
}

t_synchronous_writes_are_there_when_they_return() {
    local o flag
    for o in "" --direct-io; do
        for flag in O_SYNC O_DSYNC RWF_DSYNC; do
            rm -f img; qemu-img create -q -f qcow2 img 64M
            "$fx" -q -w $o img m
            py '
f = os.open("m", os.O_RDWR | getattr(os, sys.argv[1], 0)); b = b"\x5a" * 1048576
assert os.pwritev(f, [b], 1 << 20, os.RWF_DSYNC if sys.argv[1] == "RWF_DSYNC" else 0) == len(b)' $flag
            kill -9 "$(supervisor_of)" "$(server_of)"; umount -l m 2>/dev/null || true; gone; rm -f m
            qemu-io -r -c 'read -P 0x5a 1M 1M' img >io.log; not grep -q failed io.log
        done
    done
}

t_qcow2_that_could_not_grow_for_a_while_stays_whole() {
    local limit
    qemu-img create -q -f qcow2 img 64M
    "$fx" -q -w img m 2>log
    dd if=/dev/zero bs=64k count=1 status=none | tr '\0' x | dd of=m conv=notrunc,fsync status=none
    cp --sparse=always m first; limit=$(stat -c %s img)
    prlimit --fsize="$limit":unlimited -p "$(server_of)"
    not dd if=/dev/urandom of=m bs=128k seek=1 conv=notrunc status=none 2>err; grep -q 'too large' err
    prlimit --fsize=unlimited:unlimited -p "$(server_of)"
    truncate -s 16T m                               # the L1 table moves to the end
    py '
f = os.open("m", os.O_RDWR)
for k in range(70): os.pwrite(f, b"y" * 65536, (k + 40) << 20); os.fsync(f)
os.pwrite(f, b"z" * 65536, 1 << 43); os.fsync(f)
assert os.pread(f, 65536, 0) == b"x" * 65536 and os.pread(f, 65536, 1 << 43) == b"z" * 65536'
    expect 1 "$fx" --umount m; qemu-img check -q img                        # a write had failed
    # Less than the file would like to grow by is enough.
    truncate -s 1M base
    bash -c 'ulimit -f 4096; exec "$0" -q --format raw --overlay o.qcow2 base m' "$fx"
    dd if=/dev/urandom of=m bs=64k count=1 conv=notrunc status=none; cp m want; "$fx" --umount m
    qemu-img convert -O raw o.qcow2 out; cmp out want
    # A data file grows no further than what is written.
    qemu-img create -q -f qcow2 -o data_file=d.raw a.qcow2 10486272
    "$fx" -q -w a.qcow2 m; printf x | dd of=m bs=1 seek=10486271 conv=notrunc status=none; "$fx" --umount m
    [ "$(stat -c %s d.raw)" -lt 10600000 ]
}

t_qcow2_in_use_is_refused_both_ways() {
    qemu-img create -q -f qcow2 img 4M
    "$fx" -q -w img m
    not qemu-io -c 'write 0 512' img 2>err; grep -q lock err
    refused 1 'in use by another program' "$fx" -q -w img m2
    "$fx" --umount m
    qemu-io -c 'write 0 512' -c 'sleep 3000' img >/dev/null & local q=$!
    wait_for grep -q "$(stat -c %i img) 10" /proc/locks
    refused 1 'in use by another program' "$fx" -q -w img m
    kill $q; wait $q || true
}

t_overlay_takes_the_changes_and_qemu_knows_it() {
    local i
    random base 2000; cp base before; cp base model; qemu-img convert -f raw -O qcow2 base base.qcow2; cp base.qcow2 before.qcow2
    qemu-img convert -f raw -O vdi base base.vdi; mkdir sub
    for i in base base.qcow2 base.vdi; do
        cp before model; rm -f work.qcow2
        "$fx" -q --format "$( [ $i = base ] && echo raw || echo ${i#base.})" --overlay work.qcow2 $i m
        py "$fsx_py"'fsx("m", "model", 100, 3, 2)'
        cmp m model; "$fx" --umount m
        qemu-img check -q work.qcow2; qemu-img convert -O raw work.qcow2 out; cmp out model
        "$fx" -q --format "$( [ $i = base ] && echo raw || echo ${i#base.})" --overlay work.qcow2 $i m; cmp m model; "$fx" --umount m
        "$fx" -q work.qcow2 m; cmp m model; "$fx" --umount m
    done
    cmp base before; cmp base.qcow2 before.qcow2
    refused 1 'not written in place; --overlay' "$fx" -q -w base.vdi m
    # In another directory, below another name; QEMU commits and rebases it.
    "$fx" -q --overlay sub/w.qcow2 base.qcow2 m; printf changed | dd of=m conv=notrunc status=none; "$fx" --umount m
    same "$(qemu-img info --output=json sub/w.qcow2 | jq -r '."backing-filename", ."backing-filename-format"' | tr '\n' ' ')" "$PWD/base.qcow2 qcow2 "
    cp base.qcow2 other.qcow2
    refused 1 'is not an overlay of other.qcow2, but of' "$fx" -q --overlay sub/w.qcow2 other.qcow2 m
    refused 1 'is not an overlay' "$fx" -q --overlay base.qcow2 other.qcow2 m
    refused 1 'is not a qcow2' "$fx" -q --overlay before other.qcow2 m
    qemu-img commit -q sub/w.qcow2
    "$fx" -q base.qcow2 m; same "$(head -c 7 m)" changed; "$fx" --umount m
    # Split images and snapshots: QEMU would read something else, so it refuses.
    head -c 4M before >s.001; tail -c +4194305 before >s.002
    "$fx" -q --format raw --overlay split.qcow2 s.001 m 2>err; cmp m before; printf x | dd of=m conv=notrunc status=none; "$fx" --umount m
    not qemu-img convert -O raw split.qcow2 out 2>err
    qemu-img snapshot -c old base.qcow2
    "$fx" -q --snapshot old --overlay snap.qcow2 base.qcow2 m; printf y | dd of=m conv=notrunc status=none; "$fx" --umount m
    not qemu-img convert -O raw snap.qcow2 out 2>err
    refused 1 'as snapshot:[0-9a-f]*, not as qcow2' "$fx" -q --overlay snap.qcow2 base.qcow2 m
    qemu-img snapshot -c new base.qcow2
    refused 1 'other parts, snapshot' "$fx" -q --snapshot new --overlay snap.qcow2 base.qcow2 m
    mv s.002 away; refused 1 'other parts' "$fx" -q --format raw --overlay split.qcow2 s.001 m
    # A base that was cut short since would read as zeros behind its end.
    cp before base; rm work.qcow2
    "$fx" -q --format raw --overlay work.qcow2 base m; printf z | dd of=m conv=notrunc status=none; "$fx" --umount m
    qemu-img check -q work.qcow2; qemu-img convert -O raw work.qcow2 out; cp before want; printf z | dd of=want conv=notrunc status=none; cmp out want
    truncate -s 4M base; refused 1 'is shorter than when .* was made' "$fx" -q --format raw --overlay work.qcow2 base m
    refused 1 'is shorter than when .* was made' "$fx" -q work.qcow2 m
    "$fx" -q --force-parent work.qcow2 m 2>err; cmp -n 4194304 m want; "$fx" --umount m
    cp before base; head -c 4M base >first; "$fx" -q --format raw --overlay rebased.qcow2 base m; "$fx" --umount m
    qemu-img rebase -b first -F raw rebased.qcow2; "$fx" -q --format raw --overlay rebased.qcow2 first m; cmp m before; "$fx" --umount m
    cp before base; truncate -s 9M base; "$fx" -q --format raw --overlay work.qcow2 base m; cmp -i 1 -n 8191999 m before; "$fx" --umount m
    refused 1 'a snapshot is not written' "$fx" -q -w --snapshot old base.qcow2 m
}

# promised real|own|any IMAGE [OPTION...]: an overlay over IMAGE names its real format for QEMU, or one that QEMU refuses; where QEMU
# reads it, it reads the same disk; and fuseexp takes it again, alone and over IMAGE.
promised() {
    local want=$1 image=$2 format got=real
    shift 2
    echo "$want $image $*" >&2; rm -f o.qcow2 theirs
    "$fx" -q --overlay o.qcow2 "$@" "$image" m
    cp --sparse=always m ours 2>err || { rm ours; want=own; }               # errors here may be zeros there
    "$fx" --umount m
    format=$(qemu-img info -U --output=json o.qcow2 2>/dev/null | jq -r '."backing-filename-format"' || true)
    case $format in fx-* | "") got=own ;; esac                              # QEMU cannot even look at names of 16 bytes and more
    [ "$want" = any ] || [ "$got" = "$want" ] || fail "$image: the recorded format is $format"
    if qemu-img convert -f qcow2 -O raw o.qcow2 theirs 2>err; then
        [ $got = real ] || fail "$image: QEMU takes $format"
        [ -e ours ] && cmp -n "$(stat -c %s ours)" ours theirs || fail "$image: QEMU reads another disk"
    fi
    [ ! -e ours ] || "$fx" -q --overlay o.qcow2 "$@" "$image" m -- cmp m ours
    case $format in "") ;; *) [ ! -e ours ] || "$fx" -q --allow-external / o.qcow2 m -- cmp m ours ;; esac
}

t_overlay_promises_qemu_what_qemu_reads() {
    local o f
    for o in qcow2 qcow2,extended_l2=on qcow2,data_file=ext.raw qcow2,compat=0.10 vmdk vmdk,subformat=monolithicFlat vmdk,subformat=twoGbMaxExtentSparse \
        vmdk,zeroed_grain=on vpc vpc,force_size=on vpc,subformat=fixed vhdx vhdx,subformat=fixed vdi vdi,static=on qed parallels; do
        f=${o%%,*}; o=${o#"$f"}; rm -f img*
        qemu-img create -q -f "$f" ${o:+-o "${o#,}"} img 5M
        qemu-io -f $f -c 'write -P 1 0 1500k' -c 'write -P 2 3M 2M' img >io.log
        promised real img --format $f
        # Cut off, it is another disk for QEMU, which shows zeros.
        case $o in *data_file* | *Flat* | *twoGb*) continue ;; esac
        truncate -s -200k img; "$fx" -q --overlay t.qcow2 --format $f img m 2>err || { rm -f t.qcow2; continue; }
        "$fx" --umount m; rm t.qcow2; promised any img --format $f
    done
    # The user says more than the image does, so QEMU would have to guess.
    qemu-img create -q -f qcow2 base 1M; scribble base 3; qemu-img create -q -u -f qcow2 -b base -F raw img 1M
    py 'd = open("img", "rb").read(); open("img", "wb").write(d.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))'
    promised own img --backing-format raw; promised own img --no-backing --backing-format qcow2
}

t_overlay_of_a_vhd_promises_qemu_what_it_reads() {
    local i
    vhd_py '
M = 1 << 20; size = 4 * M; P = bytes([1] * 16); data = os.urandom(size); all = [1] * 4096
chs = lambda s: (s // 512 // 64 // 2, 2, 64)
build("real-plain", 3, size, 2 * M, [all, None], data)
build("own-bits", 3, size, 2 * M, [[1] * 4095 + [0], None], data)
build("own-diff", 4, size, 2 * M, [all, None], data, parent=P, name="own-base", locators=[(b"W2ru", "real-parent")])
build("real-parent", 3, size, 2 * M, [all, all], data, ident=P)
for creator in b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS": build("real-" + creator[:3].decode(), 3, size, 2 * M, [all, all], data, creator=creator, chs=chs(3 * M))
for creator in b"vpc ", b"vs  ", b"qemu": build("real-" + creator[:3].decode(), 3, size, 2 * M, [all, all], data, creator=creator, chs=chs(3 * M))
for creator in b"vbox", b"wa\0\0", b"abcd": build("own-" + creator[:2].decode(), 3, size, 2 * M, [all, all], data, creator=creator, chs=chs(3 * M))
for creator in b"vbox", b"wa\0\0": build("real-" + creator[:2].decode() + "-chs", 3, size, 2 * M, [all, all], data, creator=creator, chs=chs(size))
build("real-max", 3, size, 2 * M, [all, all], data, creator=b"vbox", chs=(65535, 16, 255))
build("own-small-blocks", 3, 64 << 10, 2048, [[1] * 4] * 32, data)
d = bytearray(open("real-plain", "rb").read()); d[0:512] = footer(3, size - 512, creator=b"tap\0"); open("own-front", "wb").write(d)
d = bytearray(open("real-plain", "rb").read()); d[-512:] = bytes(512); open("real-no-end", "wb").write(d)
f = footer(2, size); open("own-guest-front", "wb").write(f + data[512:] + f)
open("real-fixed", "wb").write(data + f); open("own-511", "wb").write(data + f[:511]); open("own-cut", "wb").write(data[:-65536] + f)
d = bytearray(open("real-parent", "rb").read()); d[1540:1544] = d[1536:1540]; open("own-twice", "wb").write(d)
d = open("real-plain", "rb").read(); f = footer(3, size, at=len(d) - 512); open("own-header-behind", "wb").write(f + d[512:-512] + d[512:1536] + f)'
    for i in real-* own-*; do promised "${i%%-*}" "$i" --format vpc; done
    # An image between does not hide it.
    for i in own-bits real-plain; do qemu-img create -q -u -f qcow2 -b $i -F vpc img 4M; promised "${i%%-*}" img; done
}

t_overlay_of_other_formats_promises_qemu_what_it_reads() {
    local i
    py "$vdi_py"'
M = 1 << 20; b = some(4, M, [None, 0]); b[0], b[3] = rnd.randbytes(M), rnd.randbytes(M)
vdi("real.vdi", 1, 4 * M, M, b); vdi("own-extra.vdi", 1, 4 * M, M, b, own=8, extra=512); vdi0("own-old.vdi", 1, 4 * M, M, b)
vdi("real-p.vdi", 1, 4 * M, M, b, own=5); vdi("own-diff.vdi", 4, 4 * M, M, [None, b[0], None, None], own=3, parent=5, parent_changed=2)
d = bytearray(open("real.vdi", "rb").read()); d[388:392] = struct.pack("<I", 1); open("own-count.vdi", "wb").write(d)
d = bytearray(open("real.vdi", "rb").read()); d[512:516] = d[524:528]; open("own-twice.vdi", "wb").write(d)
d = open("real.vdi", "rb").read(); open("real-far.vdi", "wb").write(d[:344] + struct.pack("<I", 4096) + d[348:1024] + bytes(3072) + d[1024:])
open("own-cut.vdi", "wb").write(d[:-1000])'
    for i in own-*.vdi real*.vdi; do promised "${i%%[-.]*}" "$i"; done
    vhdx_dirty 'lay(0, entry(5, 0, n, n, (bat, page)))'
    promised own img; promised own img --ignore-log; promised real clean --format vhdx
    vhdx_py 'P = bytes([1] * 16); build("p.vhdx", 4 * MIB, MIB, [6] * 4, os.urandom(4 * MIB), ident=P)
build("c.vhdx", 4 * MIB, MIB, [6, 0, 0, 6], os.urandom(4 * MIB), keys=[("parent_linkage", "{%s}" % uuid.UUID(bytes_le=P)), ("relative_path", "p.vhdx")])'
    promised own c.vhdx; promised real p.vhdx
    rm -rf d.hdd; prl_bundle; promised own d.hdd; promised any d.hdd/0.base.hds --format parallels
    rm -f img*; qemu-img create -q -f vmdk good.vmdk 64M; qemu-io -c 'write -P 1 0 3M' -c 'write -P 2 40M 1M' good.vmdk >io.log
    qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 4M; scribble flat.vmdk 1
    qemu-img convert -O vmdk -o subformat=streamOptimized good.vmdk s.vmdk; promised real s.vmdk; promised real good.vmdk
    sed 's/^RW 8192 FLAT.*/&\nRW 8192 ZERO/' flat.vmdk >zero.vmdk; promised own zero.vmdk
    sed 's/^RW 8192/RDONLY 8192/' flat.vmdk >rdonly.vmdk; promised own rdonly.vmdk
    sed 's/ FLAT / Flat /' flat.vmdk >case.vmdk; promised own case.vmdk
    tr '\n' '\r' <flat.vmdk >returns.vmdk; promised own returns.vmdk
    sed 's/$/\r/' flat.vmdk >dos.vmdk; promised real dos.vmdk
    sed 's/^RW/#parentFileNameHint="good.vmdk"\n&/' flat.vmdk >comment.vmdk; promised own comment.vmdk
    sed 's/flat-flat/ä-flat/; s/^version=1/&\nencoding="UTF-8"/' flat.vmdk >enc.vmdk; cp flat-flat.vmdk ä-flat.vmdk; promised own enc.vmdk
    qemu-img create -q -f vmdk -b good.vmdk -F vmdk child.vmdk 64M; qemu-io -c 'write -P 3 8M 1M' child.vmdk >io.log; promised own child.vmdk
    # The first directory's table is lost; and one grain in it.
    py '
import struct
d = bytearray(open("good.vmdk", "rb").read()); rgd, gd = struct.unpack("<QQ", d[48:64]); gt = struct.unpack("<I", d[gd * 512:gd * 512 + 4])[0] * 512
e = bytearray(d); e[gt:gt + 512] = bytes(512); open("wiped.vmdk", "wb").write(e)
e = bytearray(d); e[56:64] = struct.pack("<Q", 1 << 40); open("gd.vmdk", "wb").write(e)
e = bytearray(d); e[gt + 4:gt + 8] = struct.pack("<I", 1 << 30); open("past.vmdk", "wb").write(e)'
    promised own wiped.vmdk; promised any gd.vmdk; promised own past.vmdk
}

t_corpus_overlays_promise_qemu_what_it_reads() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    while IFS=$'\t' read -r path format _ size _ _ expected _; do
        case $expected:$format in ok:vpc | ok:vhdx | ok:vmdk | ok:parallels | ok:vdi | ok:qed) ;; *) continue ;; esac
        [ "$size" -lt 100000000 ] || continue
        promised any "c/$path"
    done <c/MANIFEST.tsv
}

t_overlay_of_a_failed_start_is_not_left_behind() {
    random base 100; mkdir full dir run; touch full/file; ln -s nowhere/x link; local n fault_at p
    refused 1 'in use\|directory\|cannot' "$fx" -q --format raw --overlay w.qcow2 base no/such/m
    refused 1 'No such file' "$fx" -q --format raw --overlay no/w.qcow2 base m
    for p in dir missing/pid link; do
        refused 1 "$p\|missing" "$fx" -q --format raw --overlay w.qcow2 --error-map e --pidfile $p base m
        refused 125 "$p\|missing" "$fx" -q --format raw --overlay w.qcow2 --error-map e --pidfile $p base m -- touch ran
    done
    # Whoever asked for it is gone before it is ready.
    ("$fx" -q --format raw --overlay w.qcow2 --error-map e base m & p=$!; kill -9 $p) 2>/dev/null || true
    settled() { [ -z "$(ours)" ] || grep -q " $PWD/m " /proc/self/mountinfo; }
    wait_for settled; "$fx" --umount m 2>/dev/null || true; gone; rm -f w.qcow2 e
    for args in 'm' '-f m -- true'; do
        for n in $(seq 1 120); do
            local status=0
            (cd run; FUSEEXP_FAIL_AT=$n timeout 20 "$fault" -q -s --format raw --overlay w.qcow2 --error-map e --pidfile pid ../base $args 2>../err) || status=$?
            grep -q 'FAULT [0-9]' err || break
            if [ $status = 0 ] && [ "$args" = m ]; then "$fx" --umount run/m; fi
            gone
            if [ $status = 0 ]; then rm run/w.qcow2 run/e; fi
            [ -z "$(ls -A run)" ] || { cat err; fail "step $n leaves $(ls -A run)"; }
        done
        [ "$n" -gt 20 ] && [ "$n" -lt 120 ] || fail "$n steps"
        [ "$args" != m ] || "$fx" --umount run/m
        gone; rm -f run/*
    done
    # An overlay that was there stays, and so does one that has been served.
    "$fx" -q --format raw --overlay w.qcow2 base m -- false || same $? 1
    refused 1 . "$fx" -q --format raw --overlay w.qcow2 --pidfile dir base m
    [ -s w.qcow2 ]
}

# A file system without O_TMPFILE and hard links, and (with "old") without RENAME_NOREPLACE, by a seccomp filter: exec in it.
fat_like() {
    cat >fat.py <<'P'
import ctypes, errno, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
nr = {"x86_64": (265, 86, 257, 316), "aarch64": (37, None, 56, 276)}[os.uname().machine]
st = lambda code, k, t=0, f=0: struct.pack("=HBBI", code, t, f, k)
ret = lambda e: st(6, 0x50000 | e)
prog = [st(0x20, 0)]
for n in nr[:2]:
    if n is not None: prog += [st(0x15, n, 0, 1), ret(errno.EPERM)]
prog += [st(0x15, nr[2], 0, 4), st(0x20, 32), st(0x45, 0o20000000, 0, 1), ret(errno.EOPNOTSUPP), st(0x06, 0x7fff0000)]
if "old" in sys.argv[1]: prog += [st(0x15, nr[3], 0, 1), ret(errno.EINVAL)]
prog += [st(6, 0x7fff0000)]
if "link" in sys.argv[1]: prog = [st(0x20, 0)] + prog[-3:] if "old" in sys.argv[1] else prog
if os.uname().machine == "x86_64":      # open(2)
    prog = prog[:1] + [st(0x15, 2, 0, 4), st(0x20, 24), st(0x45, 0o20000000, 0, 1), ret(errno.EOPNOTSUPP), st(0x06, 0x7fff0000)] + prog[1:]
code = b"".join(prog)
buf = ctypes.create_string_buffer(code)
fprog = struct.pack("@HP", len(prog), ctypes.addressof(buf))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(fprog)): sys.exit(77)
os.execv(sys.argv[2], sys.argv[2:])
P
    python3 fat.py "$@"
}

t_overlay_is_made_where_files_cannot_be_linked() {
    random base 1000; echo foreign >p; mkdir w; local kind n
    : >x; if fat_like new /bin/ln x y 2>err; then skip 'no filter'; fi
    for kind in new old old,link; do
        expect 0 fat_like $kind "$fx" -q --format raw --overlay w/o base m -- sh -c 'printf changed | dd of=m conv=notrunc,fsync status=none'
        same "$(ls -A w)" o
        qemu-img check -q w/o
        "$fx" -q --format raw --overlay w/o base m -- head -c 7 m >out; same "$(cat out)" changed
        expect 1 fat_like $kind "$fx" -q --format raw --overlay p base m; same "$(cat p)" foreign
        rm w/o
        # left by one that was killed; and one that is being made
        echo rubbish >w/.o.new
        expect 0 fat_like $kind "$fx" -q --format raw --overlay w/o base m -- true; same "$(ls -A w)" o; rm w/o
        : >w/.o.new; expect 1 flock w/.o.new python3 fat.py $kind "$fx" -q --format raw --overlay w/o base m
        grep -q 'cannot make the overlay: w/.o.new: .*busy' err; same "$(ls -A w)" .o.new; rm w/.o.new
        for n in sync write; do
            [ $kind = new ] || break
            expect 1 env FUSEEXP_FAIL_OP=$n python3 fat.py $kind "$fault" -q --format raw --overlay w/o base m
            same "$(ls -A w)" ""
        done
        expect 0 fat_like $kind "$fx" -q --format raw --temporary=w base m -- sh -c '[ -z "$(ls -A w)" ] && printf x | dd of=m conv=notrunc,fsync status=none'
        same "$(ls -A w)" ""
    done
    for i in 1 2 3 4 5 6; do python3 fat.py old "$fx" -q --format raw --overlay w/o base m$i -- true 2>/dev/null & done; wait
    same "$(ls -A w)" o; qemu-img check -q w/o
}

t_overlay_works_on_fat() {
    truncate -s 64M fat; mkfs.vfat fat >/dev/null; mkdir mnt; mount -o loop fat mnt 2>err || skip 'no vfat'
    random mnt/base 1000; cp mnt/base before
    "$fx" -q --format raw --overlay mnt/o mnt/base m -- sh -c 'printf changed | dd of=m conv=notrunc,fsync status=none'
    same "$(cd mnt && echo *)" 'base o'
    "$fx" -q --format raw --temporary=mnt mnt/base m -- sh -c 'printf x | dd of=m conv=notrunc,fsync status=none'
    "$fx" -q --format raw --overlay mnt/o mnt/base mnt/m -- head -c 7 mnt/m >out; same "$(cat out)" changed
    cmp mnt/base before; qemu-img check -q mnt/o; same "$(cd mnt && echo *)" 'base o'
    umount mnt
}

t_mountpoint_that_a_killed_one_made_goes_with_the_next() {
    random img 16
    py 'open("x", "w"); os.setxattr("x", "user.test", b"")' 2>/dev/null || skip 'no attributes'
    unshare -p -f --kill-child sh -c "'$fx' -q img m; cmp img m"
    wait_for sh -c "! cat m"; [ -e m ]
    "$fx" -q img m; cmp img m; "$fx" --umount m; [ ! -e m ]
    "$fx" -q img m; local sup; sup=$(supervisor_of); kill -STOP "$sup"; kill -9 "$(server_of)" "$sup"; wait_for sh -c "! cat m"
    umount m; [ -e m ]; refused 1 . "$fx" -q missing m
    "$fx" -q img m -- true; [ ! -e m ]
    "$fx" -q img m; kill -9 "$(supervisor_of)"; expect 1 "$fx" --umount m; gone; [ ! -e m ]
    # what is not ours, or not empty any more, stays
    "$fx" -q img m; sup=$(supervisor_of); kill -STOP "$sup"; kill -9 "$(server_of)" "$sup"; wait_for sh -c "! cat m"; umount m
    echo content >m; expect 1 "$fx" -q img m; same "$(cat m)" content
    : >n; "$fx" -q img n -- true; [ -e n ]
}

t_temporary_overlay_is_gone_in_the_end() {
    random base 1000; cp base model; cp base before; mkdir d
    "$fx" -q --format raw --temporary=d base m
    py "$fsx_py"'fsx("m", "model", 100, 3, 2)'
    cmp m model
    same "$(ls -A d)" ""
    "$fx" --umount m
    cmp base before
    "$fx" -q --format raw --temporary base m; printf x | dd of=m conv=notrunc status=none; same "$(head -c 1 m)" x; "$fx" --umount m
    "$fx" -q --format raw --temporary -r base m; not sh -c 'echo >m' 2>err; "$fx" --umount m
    cmp base before
    truncate -s 64M fs; mkfs.ext4 -q fs; cp fs before
    "$fx" -q --format raw --temporary fs m -- sh -c 'mkdir mnt; mount -o loop m mnt; cp /bin/sh mnt/; umount mnt; e2fsck -fn m' >/dev/null 2>&1
    cmp fs before
    refused 2 'one or the other' "$fx" --temporary --overlay x base m
}

t_qcow2_corrupt_image_is_served_read_only() {
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write -P 1 0 1M' good >/dev/null; qemu-img convert -O raw good truth
    local l2 rt rb
    l2=$(l2_of good); rt=$(($(od -An -tu8 --endian=big -j48 -N8 good))); rb=$(($(od -An -tu8 --endian=big -j$rt -N8 good)))
    local row
    for row in "$((rb + 10)) 0000" "$((l2 + 8)) 0000000000060000" "$rt 0000000000000200" "56 00000000" "$((l2 + 16)) 8000000000050000"; do
        poke bad $row
        "$fx" -w bad m 2>err
        grep -q 'served read-only' err
        not sh -c 'printf x | dd of=m conv=notrunc status=none' 2>err
        same "$(stat -c %a m)" 400
        "$fx" --umount m
        same $(($(od -An -tu1 -j79 -N1 bad) & 2)) 2                         # marked corrupt, for everyone
        cmp -i 80 bad <(poke again $row; cat again)
    done
    # A disk that cannot be read is no corrupt image: nothing is marked.
    cp good bad
    FUSEEXP_BAD_SECTORS=$rb,512 expect 1 "$fault" -q -w --sandbox=off bad m
    grep -q 'cannot be checked' err; cmp bad good
    # Without -w nothing is marked.
    poke bad $((rb + 10)) 0000; cp bad copy; "$fx" -q bad m; cmp m truth; "$fx" --umount m; cmp bad copy
}

t_repair_frees_leaks_and_rebuilds_refcounts() {
    local l2 rt rb o
    for o in cluster_size=64k cluster_size=4k,refcount_bits=64 cluster_size=4k,refcount_bits=4 extended_l2=on compat=0.10; do
        rm -f good; qemu-img create -q -f qcow2 -o $o good 8M; scribble good 3; qemu-img snapshot -c s good; scribble good 4
        qemu-img convert -O raw good truth
        rt=$(($(od -An -tu8 --endian=big -j48 -N8 good))); rb=$(($(od -An -tu8 --endian=big -j$rt -N8 good)))
        for row in "$((rb + 20)) ffff" "$((rb + 12)) 000000000000" "$rt 0000000000000000" "$((rb + 40)) 0000ffff000000"; do
            poke bad $row
            qemu-img check -q bad >/dev/null 2>&1 && continue
            expect 0 "$fx" -q --check --repair bad >said
            grep -q 'repaired' said
            qemu-img check -q bad; qemu-img convert -O raw bad out; cmp out truth
            qemu-img convert -l s -O raw bad out 2>err || qemu-img convert -l snapshot.name=s -O raw bad out
        done
    done
    # Leaks alone, as JSON; nothing to do; not for what is in use, nor for raw.
    qemu-img create -q -f qcow2 good 8M; qemu-io -c 'write 0 1M' good >/dev/null
    rt=$(($(od -An -tu8 --endian=big -j48 -N8 good))); rb=$(($(od -An -tu8 --endian=big -j$rt -N8 good)))
    poke bad $((rb + 100)) 0001; truncate -s 4M bad
    expect 3 "$fx" -q --check bad >said
    expect 0 "$fx" -q --check --repair --json bad >said; same "$(jq '."leaks-fixed"' said)" 1
    expect 0 "$fx" -q --check --repair bad >said; qemu-img check -q bad
    "$fx" -q -w bad m; refused 1 'in use by another' "$fx" --check --repair bad; "$fx" --umount m
    random raw 10; expect 63 "$fx" -q --check --repair --format raw raw
    refused 2 'repair goes with --check' "$fx" --repair bad m
    # Two clusters in one place: data stays as it is, later writes part them.
    l2=$(l2_of good); poke bad $((l2 + 8)) "$(od -An -tx1 -j"$l2" -N8 good | tr -d ' ')"
    qemu-img convert -O raw bad truth
    expect 2 "$fx" -q --check bad >said
    expect 0 "$fx" -q --check --repair bad >said
    qemu-img check -q bad; qemu-img convert -O raw bad out; cmp out truth
    # Lazy refcounts, not closed: rebuilt before the first write.
    qemu-img create -q -f qcow2 -o lazy_refcounts=on img 8M
    qemu-io -c 'write -P 3 1M 2M' -c 'flush' -c 'sigraise 9' img >/dev/null 2>&1 || true
    same $(($(od -An -tu1 -j79 -N1 img) & 1)) 1
    "$fx" -w img m 2>err; grep -q 'refcounts are rebuilt' err
    printf x | dd of=m bs=1 seek=5000000 conv=notrunc status=none
    "$fx" --umount m
    qemu-img check -q img; qemu-io -c 'read -P 3 1M 2M' img | grep -q '2 MiB'
}

# Whatever an entry of a table wrongly leads to: repairing, and opening for writing, leave what the disk shows as it is.
t_repair_keeps_what_the_guest_has_written() {
    local o
    qemu-img create -q -f qcow2 -o cluster_size=4k g0 32M; qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=1 g1 1M
    qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=16k,refcount_bits=64 g2 64M
    qemu-img create -q -f qcow2 -o cluster_size=64k,lazy_refcounts=on g3 2G
    qemu-img bitmap --add g0 b; qemu-img bitmap --add g3 b
    for o in 0 1 2 3; do
        [ $o = 1 ] || qemu-io -c "write -c -P 5 128k $(qemu-img info --output=json g$o | jq '."cluster-size"')" g$o >io.log
        scribble g$o $o
        [ $o = 1 ] || qemu-img snapshot -c s g$o
        qemu-io -c 'write -P 1 512k 100k' -c 'write -P 7 800k 100k' g$o >io.log
    done
    py '
import struct, subprocess
M = 0xfffffffffffe00
def run(*a): return subprocess.run(a, capture_output=True, timeout=60)
def disk(image):
    run(fx, "-q", "-U", image, "m")
    f, parts = os.open("m", os.O_RDONLY | os.O_DIRECT), []
    b = mmap.mmap(-1, 16384)
    for at in range(0, min(os.fstat(f).st_size, 4 << 20), 16384):
        try: parts.append(os.preadv(f, [b], at) and b[:])
        except OSError: parts.append(None)
    os.close(f); run(fx, "--umount", "m")
    return parts
fx, n, rnd = sys.argv[1], 0, random.Random(6)
for i in range(4):
    good = open("g%d" % i, "rb").read()
    be = lambda at: struct.unpack(">Q", good[at:at + 8])[0]
    bits = struct.unpack(">I", good[20:24])[0]; cs = 1 << bits; es = 16 if i == 2 else 8
    l1 = be(40); l1n = struct.unpack(">I", good[36:40])[0]; l2 = be(l1) & M
    entries = [be(l2 + es * j) for j in range(cs // es)]
    data = [e & M for e in entries if e & M and not e >> 62 & 1]
    packed = [(e & (1 << 62 - (bits - 8)) - 1) & -cs for e in entries if e >> 62 & 1]
    targets = data[:1] + data[-1:] + packed[:1] + [l1, be(48), be(be(48)), be(64), be(64) and be(be(64)), be(64) and be(be(be(64))) & M, l2]
    for target in filter(None, dict.fromkeys(targets)):
        for place in (l1 + 8 * (l1n - 1), l2 + es * 3, l1):
            d = bytearray(good); d[place:place + 8] = struct.pack(">Q", target | rnd.getrandbits(1) << 63)
            for dirty in (0, 1):
                n += 1
                if (n + int(sys.argv[2])) % 4: continue
                d[79] = d[79] & 0xfc | dirty
                open("img", "wb").write(d)
                before = disk("img")
                if dirty: run(fx, "-q", "-w", "img", "m", "--", "true"); r = 0
                else: r = run(fx, "--check", "--repair", "img").returncode
                after = disk("img")
                assert all(a == b for a, b in zip(before, after) if a is not None), (i, hex(target), hex(place), dirty, r)
                q, ours = run("qemu-img", "check", "-f", "qcow2", "img").returncode, run(fx, "--check", "img").returncode
                assert ours in (0, 2, 3) and (dirty or r == ours) and (q in (0, 3) or ours == 2), (i, hex(target), hex(place), dirty, r, ours, q)
                if not dirty and target in data and place != l2 + es * 3: assert ours == 2, (i, hex(target), hex(place))
' "$fx" 0
}

t_repair_goes_on_past_what_it_cannot_read() {
    local l1 l2 data block at
    qemu-img create -q -f qcow2 -o cluster_size=64k good 2G; qemu-io -c 'write -P 3 0 60M' -c 'write -P 4 1G 4M' good >io.log
    read -r l1 l2 data block < <(table_of good)
    # A leak, a refcount that is too low, flags that are wrong; and a sector of the first L2 table is bad.
    poke dirty $((l2 + 8)) "00$(od -An -tx1 -j$((l2 + 9)) -N7 good | tr -d ' ')" $((block + 2 * 300)) 0000 $((block + 2 * 3000)) 0001
    truncate -s 256M dirty; cp dirty img
    FUSEEXP_BAD_SECTORS=$((l2 + 5000)),512 expect 1 "$fault" --check --repair --sandbox=off img >said
    grep -q 'cannot be read' err
    same "$(od -An -tu2 --endian=big -j$((block + 2 * 300)) -N2 img)" "$(printf ' %5d' 1)"       # raised
    same "$(od -An -tu2 --endian=big -j$((block + 2 * 3000)) -N2 img)" "$(printf ' %5d' 1)"      # nothing is freed
    expect 0 "$fx" -q --check --repair img >said; qemu-img check -q img
    # The refcounts themselves cannot be read: new ones.
    cp dirty img
    FUSEEXP_BAD_SECTORS=$block,512 expect 0 "$fault" -q --check --repair --sandbox=off img >said
    qemu-img check -q img; qemu-io -c 'read -P 3 0 60M' -c 'read -P 4 1G 4M' img >io.log; not grep -q failed io.log
    # Near the bad sector, in the same 4 KiB, too: entries that can be read, but not be changed.
    poke dirty $((l2 + 4696)) 00 $((block + 2 * 310)) 0000; truncate -s 256M dirty; cp dirty img
    FUSEEXP_BAD_SECTORS=$((l2 + 5000)),512 expect 1 "$fault" --check --repair --sandbox=off img >said
    same "$(od -An -tu2 --endian=big -j$((block + 2 * 310)) -N2 img)" "$(printf ' %5d' 1)"
    # What was cut off does not become zeros, nor tables: the file does not grow.
    cp good img; truncate -s -3000 img; cp img before
    at=$(od -An -tu8 --endian=big -j48 -N8 img); printf '\0\0\0\0\0\0\2\0' | dd of=img bs=1 seek=$((at)) conv=notrunc status=none
    expect 1 "$fx" --check --repair img >said
    same "$(stat -c %s img)" "$(stat -c %s before)"; same "$("$fx" --map --json img | jq 'map(select(.error)) | length')" 1
}

# Clusters and tables that the active tables refer to more than once, with refcounts that say so, are a sound image.
t_qcow2_shared_clusters_part_when_they_are_written() {
    local o
    for o in cluster_size=512 cluster_size=4k,refcount_bits=4 extended_l2=on,cluster_size=16k,refcount_bits=64; do
        py '
import struct, subprocess
M, fx, o = 0xfffffffffffe00, sys.argv[1], sys.argv[2]
def run(*a): return subprocess.run(a, capture_output=True, timeout=60)
def ok(*a): r = run(*a); assert r.returncode == 0, (o, what, a, r); return r
es = 16 if "extended" in o else 8
for what in ("l2", "data", "packed", "snapshot"):
    if os.path.exists("img"): os.unlink("img")
    cs = {"512": 512, "4k": 4096, "8k": 8192, "16k": 16384}[o.split("cluster_size=")[1].split(",")[0]]
    table = cs // es * cs
    what = what; ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "img", str(4 * table))
    ok("qemu-io", "-c", "write -P 17 0 %d" % (3 * cs), "-c", "write -c -P 18 %d %d" % (8 * cs, cs), "-c", "write -c -P 19 %d %d" % (9 * cs, cs),
        "-c", "write -P 20 %d %d" % (table, 2 * cs), "img")
    if what == "snapshot": ok("qemu-img", "snapshot", "-c", "s", "img")
    d = bytearray(open("img", "rb").read())
    be = lambda at: struct.unpack(">Q", d[at:at + 8])[0]
    l1 = be(40); l2 = be(l1) & M
    if what in ("l2", "snapshot"): d[l1 + 8:l1 + 16] = d[l1:l1 + 8]
    elif what == "data": d[l2 + 5 * es:l2 + 6 * es] = d[l2 + es:l2 + 2 * es]
    else: d[l2 + 5 * es:l2 + 6 * es] = d[l2 + 8 * es:l2 + 9 * es]
    open("img", "wb").write(d)
    ok(fx, "-q", "--check", "--repair", "img"); ok("qemu-img", "check", "-q", "img"); ok("qemu-img", "convert", "-O", "raw", "img", "model")
    if what == "snapshot": ok("qemu-img", "convert", "-l", "snapshot.name=s", "-O", "raw", "img", "old")
    for round in range(2):
        r = run(fx, "-w", "--growable", "img", "m"); assert r.returncode == 0 and b"share clusters" in r.stderr + (b"share clusters" if round or what == "packed" else b""), (o, what, r)
        a, b = os.open("m", os.O_RDWR), os.open("model", os.O_RDWR); rnd = random.Random(round)
        fd = ctypes.CDLL(None, use_errno=True)
        for i in range(25):
            at, n = rnd.choice([0, table]) + rnd.randrange(10 * cs), rnd.choice([1, 512, cs, 3 * cs])
            if rnd.random() < .7: x = rnd.randbytes(n); os.pwrite(a, x, at); os.pwrite(b, x, at)
            elif rnd.random() < .8:
                at = at // cs * cs
                for f in (a, b): fd.fallocate(f, 3, ctypes.c_long(at), ctypes.c_long(n))
            else: os.fsync(a)
        if round == 1:
            for n in (table + cs, 6 * table): os.ftruncate(a, n); os.ftruncate(b, n)
        os.close(a); os.close(b)
        ok("cmp", "m", "model"); ok(fx, "--umount", "m")
        assert run(fx, "--check", "img").returncode in (0, 3), (o, what, round, run(fx, "--check", "img"))
        assert run("qemu-img", "check", "img").returncode in (0, 3), (o, what, round, run("qemu-img", "check", "img"))
        r = run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "img", "model"); assert r.returncode == 0, (o, what, r)
    if what == "snapshot": ok("qemu-img", "convert", "-l", "snapshot.name=s", "-O", "raw", "img", "new"); ok("cmp", "-n", str(4 * table), "old", "new")
    ok(fx, "-q", "--check", "--repair", "img"); ok("qemu-img", "check", "-q", "img")
' "$fx" "$o"
    done
    # One bit cannot count two users: such an image is corrupt, and served read-only.
    qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=1 img 128k; qemu-io -c 'write -P 17 0 32k' img >io.log
    py 'd = bytearray(open("img", "rb").read()); l = int.from_bytes(d[40:48], "big"); d[l + 8:l + 16] = d[l:l + 8]; open("img", "wb").write(d)'
    cp img before; expect 2 "$fx" -q --check --repair img >said
    "$fx" -w img m 2>err; grep -q 'served read-only' err; same "$(stat -c %a m)" 400; "$fx" --umount m; cmp -i 80 img before
}

# ---- what cannot be read ---------------------------------------------------------------------------------------

# l2_of IMAGE: where its first L2 table lies
l2_of() {
    local l1; l1=$(od -An -tu8 --endian=big -j40 -N8 "$1")
    echo $(($(od -An -tu8 --endian=big -j$((l1)) -N8 "$1") & 0xffffffffffff))
}

t_on_error_zero_fills_exactly_what_is_bad() {
    random raw 1000
    qemu-img convert -f raw -O qcow2 raw good
    poke bad $(($(l2_of good) + 16)) 8000004000000000                       # the third cluster: past the end
    cp raw want; dd if=/dev/zero of=want bs=64k seek=2 count=1 conv=notrunc status=none
    "$fx" -q bad m; not cmp m raw 2>err; "$fx" --umount m
    "$fx" -q --on-error=eio bad m; not cmp m raw 2>err; "$fx" --umount m
    for opt in "" --direct-io; do
        "$fx" -q $opt --on-error=zero bad m; cmp m want; dd if=m of=direct bs=1M iflag=direct status=none; cmp direct want; "$fx" --umount m
    done
    # Bad sectors below a plain image cost themselves only, and a whole compressed cluster where they hit one.
    cp raw want; dd if=/dev/zero of=want bs=512 seek=801 count=8 conv=notrunc status=none
    for opt in "" --direct-io; do
        FUSEEXP_BAD_SECTORS=$((100 * 4096 + 512)),4096 "$fault" -q $opt --on-error=zero --format raw raw m
        cmp m want; "$fault" --umount m
    done
    head -c 300000 "$top/fuseexp.c" >raw; truncate -s 300032 raw; qemu-img convert -c -f raw -O qcow2 raw good
    local host; host=$(($(od -An -tu8 --endian=big -j$(($(l2_of good) + 8)) -N8 good) & 0x3fffffffffffff))
    poke bad $((host + 20)) ffffffffffffffff
    cp raw want; dd if=/dev/zero of=want bs=64k seek=1 count=1 conv=notrunc status=none
    "$fx" -q --on-error=zero bad m; cmp m want; dd if=m of=direct bs=1M iflag=direct status=none; cmp direct want; "$fx" --umount m
    # A partition that reaches past the end.
    truncate -s 4M disk; echo '2048,4096,83' | sfdisk -q disk; truncate -s 2M disk
    "$fx" -q --format raw --on-error=zero --partition 1 disk m
    same "$(cat m | wc -c)" 2097152; "$fx" --umount m
    refused 2 "one of eio|zero" "$fx" --on-error=maybe raw m
    # Zeros that stand for what cannot be read must not find their way into the image.
    refused 2 'would become the image' "$fx" -q -w --on-error=zero --format raw raw m
    "$fx" -q --temporary --on-error=zero bad m; printf y | dd of=m bs=1 seek=70000 conv=notrunc status=none
    printf y | dd of=want bs=1 seek=70000 conv=notrunc status=none; cmp m want; "$fx" --umount m
}

t_error_map_lists_what_could_not_be_read() {
    random raw 1000; qemu-img convert -f raw -O qcow2 raw good
    poke bad $(($(l2_of good) + 16)) 8000004000000000 $(($(l2_of good) + 24)) 8000004000000000 $(($(l2_of good) + 72)) 8000004000000000
    for opt in "" --direct-io --on-error=zero; do
        "$fx" -q $opt --error-map map bad m
        dd if=m of=/dev/null bs=64k conv=noerror status=none 2>err || true
        "$fx" --umount m
        same "$(ddrescuelog -b 65536 -l- map | tr '\n' ' ')" "2 3 9 "
        same "$(ddrescuelog -b 512 -l+ map | wc -l)" $((8000 - 3 * 128))
        refused 1 'cannot make the error map' "$fx" -q --error-map map bad m
        rm map
    done
    # Positions are those of what is shown; pages of a plain file; nothing bad, nothing listed.
    FUSEEXP_BAD_SECTORS=$((100 * 4096 + 512)),4096 "$fault" -q --format raw --offset 40960 --error-map map raw m
    not cat m >/dev/null 2>err
    dd if=m of=/dev/null bs=4k conv=noerror status=none 2>err || true
    "$fault" --umount m
    same "$(ddrescuelog -b 512 -l- map | tr '\n' ' ')" "$(seq -s ' ' 721 728) "
    rm map
    # Of a directory, positions are those of the disk, also of what lies past its end.
    truncate -s 20M disk; printf '2048,4096,83\n8192,30000,83\n' | sfdisk -q disk; truncate -s 5M disk; mkdir d
    for opt in "" --direct-io; do
        "$fx" -q $opt --format raw --error-map map disk d
        dd if=d/p1 of=/dev/null bs=64k status=none conv=noerror 2>err || true
        dd if=d/p2 of=/dev/null bs=64k status=none conv=noerror 2>err || true
        "$fx" --umount d
        same "$(ddrescuelog -b 512 -l- map | sed -n '1p;$p' | tr '\n' ' ')$(ddrescuelog -b 512 -l+ map | tail -n 1)" "10240 38191 10239"
        rm map
    done
    "$fx" -q --format raw --error-map map raw m; cat m >/dev/null; "$fx" --umount m
    same "$(ddrescuelog -b 512 -l- map)" ""
    rm map
    # While it runs, a second later; and a map that cannot be written is told.
    "$fx" -q --error-map map bad m
    dd if=m of=/dev/null bs=64k skip=2 count=1 status=none 2>err || true; sleep 1.1
    dd if=m of=/dev/null bs=64k skip=9 count=1 status=none 2>err || true
    same "$(ddrescuelog -b 65536 -l- map | tr '\n' ' ')" "2 9 "
    "$fx" --umount m
    rm map
    FUSEEXP_FAIL_OP=map "$fault" -q --error-map map bad m
    cat m >/dev/null 2>err || true
    expect 1 "$fault" --umount m
    rm map
    refused 1 'No such file' "$fx" -q --error-map map absent m
}

# ---- ddrescue's mapfile ----------------------------------------------------------------------------------------

# map_of LINE...: a mapfile of these ranges
map_of() { printf '# Mapfile. Created by hand\n0x0 ? 1\n'; printf '%s\n' "$@"; }

# as_mapped M RAW MAP [SHIFT]: sector by sector M has what RAW has, or an I/O error where MAP does not say "+". MAP is parsed here on its own.
as_mapped() {
    py '
m, raw, good = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), open(sys.argv[2], "rb").read(), set()
words = [l.split("#")[0].split() for l in open(sys.argv[3])]
number = lambda t: int(t, 16) if t[:2] == "0x" else int(t, 8) if t[0] == "0" else int(t)
shift = int(sys.argv[4]) if len(sys.argv) > 4 else 0
for at, size, status in [w[:3] for w in words if w][1:]:
    if status == "+": good.update(range(max(0, number(at) + shift + 511) // 512, max(0, number(at) + number(size) + shift) // 512))
page, errors = mmap.mmap(-1, 512), 0
for s in range(len(raw) // 512):
    try: n = os.preadv(m, [page], s * 512)
    except OSError as e:
        assert e.errno == errno.EIO and s not in good, (s, e)
        errors += 1
    else:
        assert (n == 512) == (s in good) and page[:n] == raw[s * 512:s * 512 + n], s     # the front of a sector may be good
        errors += n < 512
assert errors == len(raw) // 512 - len(good & set(range(len(raw) // 512)))' "$@"
}

# random_map SEED BYTES: a map of whole sectors with every status, with gaps, which ends before or behind BYTES
random_map() {
    py '
r, size, at = random.Random(int(sys.argv[1])), int(sys.argv[2]), 0
print("# Mapfile. Created by hand\n#\n0x%X %s" % (r.randrange(size), r.choice("?*/-FG+")) + r.choice(["", " 1", "\t2 # note"]))
while at < size * r.uniform(0.8, 1.2):
    n = r.choice([1, 1, 3, 8, 100, 1000]) * 512
    if r.random() < 0.9: print("0x%08X %s%s %s" % (at, r.choice(["  ", "\t"]), r.choice(["%d", "0x%x", "0%o"]) % n, r.choice("+++?*/-") + r.choice(["", " x y", " # why"])))
    at += n' "$@"
}

t_mapfile_makes_what_was_not_read_an_error() {
    local -A force=([vpc]="-o force_size=on")
    random raw 256
    for format in raw qcow2 vpc vdi vmdk; do
        qemu-img convert -f raw -O $format ${force[$format]:-} raw img
        for seed in 1 2 3; do
            random_map $seed 1048576 >map
            for opt in "" --temporary --no-passthrough; do
                "$fx" -q --format $format --mapfile map $opt img m; as_mapped m raw map; "$fx" --umount m
            done
        done
    done
    # What ddrescue itself writes, of a disk with bad sectors.
    FUSEEXP_BAD_SECTORS=$((100 * 4096 + 512)),9000 "$fault" -q --format raw --no-passthrough raw m
    ddrescue -q -d m copy copy.map || true; "$fault" --umount m
    grep -q -- ' -$' copy.map
    "$fx" --format raw copy m 2>err; grep -q 'copy: [0-9]* bytes in 1 range were not read, says the mapfile copy.map' err
    as_mapped m raw copy.map; "$fx" --umount m
    # All was read: told, and nothing else.
    ddrescue -q raw whole whole.map; "$fx" --format raw whole m 2>err; grep -q 'all of it was read' err; cmp m raw; "$fx" --umount m
    if [ -d "$corpus/ddrescue" ]; then
        for map in "$corpus"/ddrescue/*mapfile[1-6] "$corpus"/ddrescue/*_blank "$corpus"/ddrescue/*6j; do
            "$fx" -q --format raw --mapfile "$map" raw m; as_mapped m raw "$map"; "$fx" --umount m
        done
        refused 1 'mapfile2ui: line 5: begins before the end' "$fx" -q --format raw --mapfile "$corpus/ddrescue/gddrescue__mapfile2ui" raw m
    fi
}

t_mapfile_beside_a_raw_image_is_used() {
    random disk.img 16; map_of '0 0x1000 +' '0x1000 0xf000 -' >map
    for name in disk.img.map disk.img.mapfile disk.img.log disk.img.logfile disk.map disk.mapfile disk.log disk.logfile; do
        cp map $name
        "$fx" --format raw disk.img m 2>err; grep -q "61440 bytes in 1 range were not read, says the mapfile $name: .*--mapfile=none" err
        as_mapped m disk.img map; "$fx" --umount m
        "$fx" --format raw --mapfile none disk.img m 2>err; not grep mapfile err; cmp m disk.img; "$fx" --umount m
        rm $name
    done
    # A name proves nothing.
    printf 'disk.img: copied\n0x0 0x10 +\n' >disk.log; printf '0 +\n0 512 +\n' >disk.map; printf '# Mapfile\n' >disk.img.log; mkdir disk.img.map; mkfifo disk.mapfile
    "$fx" --format raw disk.img m 2>err; same "$(cat err)" ""; cmp m disk.img; "$fx" --umount m
    printf '0 +\n0 512 +\n512 512 +\n' >disk.map; "$fx" --info --format raw disk.img 2>err | grep -q '^not read: *64512'
    printf '# Rescue Logfile. Created by GNU ddrescue version 1.14\n0 +\n0 512 +\n' >disk.map; "$fx" --info --format raw disk.img 2>err | grep -q '^mapfile: *disk.map'
    map_of '0 512 +' '0 x' >disk.map
    expect 1 "$fx" -q --format raw disk.img m; grep -q 'disk.map: line 4: ' err; grep -q 'mapfile=none ignores it' err
    rmdir disk.img.map; rm disk.mapfile
    # The image is no map of itself; one of the whole set; of the raw file at the end of a chain; not of a container file.
    cp map disk.map; "$fx" -q --format raw disk.map m; cmp m disk.map; "$fx" --umount m
    split -b 16384 -d -a 3 --numeric-suffixes=1 disk.img disk.; mv disk.img whole; "$fx" -q disk.001 m; as_mapped m whole map; "$fx" --umount m
    rm disk.0*; mv whole disk.img
    qemu-img create -q -f qcow2 -b disk.img -F raw top.qcow2; "$fx" -q top.qcow2 m; as_mapped m disk.img map; "$fx" --umount m
    qemu-img convert -f raw -O qcow2 disk.img disk.qcow2; "$fx" disk.qcow2 m 2>err; grep -q 'the mapfile disk.map is not used' err; cmp m disk.img; "$fx" --umount m
    refused 1 'name the image itself; --mapfile=FILE' "$fx" disk.map m
}

t_mapfile_that_is_wrong_is_refused_with_its_line() {
    random raw 16
    while IFS='|' read -r line pattern text; do
        printf "$text" >map
        refused 1 "map: line $line: .*$pattern" "$fx" -q --format raw --mapfile map raw m
    done <<'END'
1|position and status|
1|position and status|0 512 +\n
1|position and status|0x +\n
2|position and status|# x\n0 x 1\n0 512 +\n
2|no position|0 +\n512 +\n
2|no position|0 +\n-512 512 +\n
2|no position|0 +\n0 -512 +\n
2|no position|0 +\n08 512 +\n
2|no position|0 +\n0x8000000000000000 512 +\n
2|no position|0 +\n0 0xffffffffffffffffffff +\n
2|no position|0 +\n0 1k +\n
2|no status|0 +\n0 512 F\n
2|no status|0 +\n0 512\n
2|no status|0 +\n0 512 +-\n
2|no status|0 +\n0 512 #+\n
2|ends past|0 +\n1 0x7fffffffffffffff +\n
4|begins before|0 +\n0 512 +\n# x\n511 1 -\n
3|begins before|0 +\n512 512 +\n0 512 +\n
END
    refused 1 'cannot open the mapfile: No such file' "$fx" -q --format raw --mapfile absent raw m
    refused 1 'no mapfile' "$fx" -q --format raw --mapfile raw raw m
    # Memory is bounded by what the user allows.
    { printf '0 +\n'; seq 0 1024 30000000 | sed 's/$/ 512 +/'; } >map
    refused 1 'more than 16384 ranges' "$fx" -q --format raw --cache-size 1M --mapfile map raw m
    "$fx" -q --format raw --mapfile map raw m; as_mapped m raw map; "$fx" --umount m
    # No map is worse than an error.
    random_map 5 65536 >good
    for i in $(seq 60); do
        py 'b = bytearray(open("good", "rb").read()); r = random.Random(int(sys.argv[1]))
for _ in range(r.choice([1, 3, 20])): b[r.randrange(len(b))] = r.choice(b"0123456789abcdefx+-?*/# \t\n\r\0\xff-")
open("map", "wb").write(b)' $i
        "$build/fuseexp-asan" -q --info --format raw --mapfile map raw >out 2>err && got=0 || got=$?
        [ $got -le 1 ] || fail "status $got of $(od -c map | head)"
    done
}

t_mapfile_is_for_looking_and_overlays_too() {
    truncate -s 8M disk; printf '2048,2048,83\n4096,12288,83\n' | sfdisk -q disk; dd if=/dev/urandom of=disk bs=64k seek=16 count=112 conv=notrunc status=none
    map_of '0 0x200000 +' '0x200000 0x1000 -' '0x201000 0x1000 /' '0x202000 0x5fe000 +' >map
    fx_map=("$fx" -q --format raw --mapfile map)
    "${fx_map[@]}" --map disk >out; grep -q '^0x200000 *0x1000 *UNREADABLE *a bad sector, says the mapfile (-)' out; grep -q '^0x201000 *0x1000 *UNREADABLE *failed and not scraped' out
    "${fx_map[@]}" --map --json disk | jq -c '[.[] | select(.error) | [.start, .length]]' >out; same "$(cat out)" '[[2097152,4096],[2101248,4096]]'
    expect 2 "${fx_map[@]}" --check disk >out; "$fx" --check --format raw --mapfile map disk >out 2>err || true; grep -q 'guest 0x200000, 0x1000 bytes: a bad sector' err
    "${fx_map[@]}" --info --json disk | jq -e '."mapfile" == "map" and ."not-read" == 8192' >out
    refused 1 'strict.*4096 bytes at 2097152: a bad sector' "${fx_map[@]}" --strict disk m
    refused 2 'mapfile is for reading' "${fx_map[@]}" -w disk m
    refused 1 'mapfile is for reading' "${fx_map[@]}" --check --repair disk
    # Partitions, and their positions in the map of errors, which loads again where it was made.
    mkdir d; "${fx_map[@]}" disk d; expect 2 cmp d/p2 disk -i 0:2097152; dd if=d/p2 bs=4k skip=2 status=none >p2; cmp p2 disk -i 0:2105344; cmp d/p1 disk -i 0:1048576 -n 1048576; "$fx" --umount d
    for opt in "" "--partition 2" "--offset 1M"; do
        "${fx_map[@]}" $opt --error-map errors disk m; dd if=m of=/dev/null bs=4k conv=noerror status=none 2>err || true; "$fx" --umount m
        "$fx" -q --format raw --mapfile errors --map --json disk | jq -c '[.[] | select(.error) | [.start, .length]]' >out
        grep -q '\[2097152,8192\]' out; rm errors
    done
    "${fx_map[@]}" --on-error=zero disk m; cmp -n 8192 m /dev/zero -i 2097152:0; cmp m disk -n 2097152; "$fx" --umount m
    # Written over, it is good; only there. QEMU would show what lies there as if it had been read.
    "${fx_map[@]}" --overlay over disk m; dd if=/dev/zero of=m bs=64k seek=32 count=1 conv=notrunc status=none; cmp -n 65536 m /dev/zero -i 2097152:0; "$fx" --umount m
    qemu-img info over 2>&1 | grep -q 'fx-raw'
    cp disk before; "${fx_map[@]}" --overlay over disk m; cmp -n 65536 m /dev/zero -i 2097152:0; "$fx" --umount m; cmp disk before
    # A map beside the image: -w would write what stays an error.
    cp map disk.map; refused 1 '8192 bytes of it were not read.*--overlay' "$fx" -q --format raw -w disk m
    map_of '0 0x800000 +' >disk.map; "$fx" -q --format raw -w disk m; "$fx" --umount m
    # Longer and shorter than the disk.
    map_of '0 0x900000 +' >map; "$fx" --format raw --mapfile map disk m 2>err; grep -q 'cut off: 1048576 bytes that were read are missing' err; cmp m disk; "$fx" --umount m
    refused 1 'strict.*lacks 1048576 bytes' "${fx_map[@]}" --strict disk m
    map_of '0 0x700000 +' >map; "$fx" --format raw --mapfile map disk m 2>err; grep -q '1048576 bytes in 1 range were not read' err; "$fx" --umount m
}

t_map_offset_moves_the_map() {
    random raw 100
    random_map 7 300000 >map
    for shift in 512 65536 -512 -65536; do
        "$fx" -q --format raw --mapfile map --map-offset=$shift raw m; as_mapped m raw map $shift; "$fx" --umount m
    done
    # ddrescue -i and -o.
    rm map; ddrescue -q -i 40960 -o 8192 raw copy map; head -c 8192 /dev/zero >want; tail -c +40961 raw >>want
    "$fx" -q --format raw --mapfile map --map-offset=-32k copy m; as_mapped m want map -32768; "$fx" --umount m
    "$fx" -q --format raw --mapfile map --map-offset=-0x7fffffffffffffff raw m; not cat m >out 2>err; same "$(wc -c <out)" 0; "$fx" --umount m
    refused 2 'not a usable distance' "$fx" --map-offset=--1 raw m
    printf '# Position 0 is at byte 8000000000000000\n0 +\n0 512 +\n' >map; "$fx" --info -q --format raw --mapfile map raw >out
    printf '# Position 0 is at byte 0x200\n0 +\n0 512 +\n# Position 0 is at byte 0\n512 512 -\n1024 1024 +\n' >map
    "$fx" -q --format raw --mapfile map raw m; as_mapped m raw map 512; "$fx" --umount m
    printf '# Position 0 is at byte -8000000000000000\n0 +\n0 512 +\n' >map; "$fx" --info -q --format raw --mapfile map raw >out
}

# ---- what is missing ------------------------------------------------------------------------------------------

t_what_is_missing_is_told_at_start() {
    truncate -s 64M disk; printf 'label: gpt\n2048,40960\n43008,65536\n' | sfdisk -q disk; mkdir d
    dd if=/dev/urandom of=disk bs=1M seek=60 count=3 conv=notrunc status=none
    cp disk cut; truncate -s 50M cut; cp disk lost; dd if=/dev/zero of=lost bs=512 seek=131071 count=1 conv=notrunc status=none
    split -b 16M -d -a 3 disk s.; rm s.003
    truncate -s 64M mbr; printf '2048,40960,83\n43008,65536,83\n110000,1000,83\n' | sfdisk -q mbr; truncate -s 30M mbr
    truncate -s 64M ext; printf '2048,40960,83\n43008,+,05\n,,83\n' | sfdisk -q ext; truncate -s 30M ext
    while read -r image where pattern; do
        "$fx" --format raw $image $where 2>err; "$fx" --umount $where
        same "$(grep -c "$pattern" err)" 1
        refused 1 'damaged (--strict)' "$fx" -q --format raw --strict $image $where
        "$fx" -q --format raw $image $where 2>err; "$fx" --umount $where; same "$(cat err)" ""
    done <<'END'
cut m table reaches 14680064 bytes past its end
cut d lacks 14680064 bytes
s.000 m table reaches 16777216 bytes past its end
s.000 d lacks 16777216 bytes
lost m lost its backup GPT at sector 131071: no signature
lost d lost its backup GPT at sector 131071: no signature
mbr m table reaches 25374720 bytes past its end
mbr d partition 2 reaches 24117248 bytes past the end
ext m table reaches 35651584 bytes past its end
END
    "$fx" --format raw disk m 2>err; "$fx" --umount m; same "$(cat err)" ""
    "$fx" --format raw --strict disk m; "$fx" --umount m
    # A file system without a table, and a part of a disk, have nothing that could be missing.
    truncate -s 20M fs; mkfs.vfat fs >out; "$fx" --format raw --strict fs m 2>err; "$fx" --umount m; same "$(cat err)" ""
    "$fx" --format raw --offset 1M --strict cut m 2>err; "$fx" --umount m; same "$(cat err)" ""
    for f in vmdk:monolithicSparse vmdk:monolithicFlat vmdk:twoGbMaxExtentFlat vmdk:streamOptimized vpc:dynamic vdi: vhdx:dynamic vhdx:fixed qcow2: qed: parallels:; do
        format=${f%:*} o=${f#*:}; rm -f x.* x-*; qemu-img convert -f raw -O $format ${o:+-o subformat=$o} disk x.$format
        truncate -s -2M "$(du -a --apparent-size x* | sort -n | tail -n 1 | cut -f 2)"
        for where in m d; do
            "$fx" x.$format $where 2>err; "$fx" --umount $where; same "$(grep -c 'is shorter than its tables say: [0-9]* bytes are missing' err)" 1
            refused_last 'damaged (--strict)' "$fx" -q --strict x.$format $where
        done
    done
}
refused_last() { expect 1 "${@:2}"; tail -n 1 err | grep -q "$1" || { cat err >&2; fail "no '$1' at the end"; }; }

t_backing_of_another_name_is_told() {
    random base.raw 64; qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2; qemu-io -c 'write -P 1 64k 64k' mid.qcow2 >out
    qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2; qemu-io -c 'write -P 2 128k 64k' top.qcow2 >out
    qemu-img convert -O raw top.qcow2 want; mkdir d; cp mid.qcow2 d
    # Further down, or the same name elsewhere: nothing is left out.
    "$fx" --backing base.raw --backing-format raw top.qcow2 m 2>err; same "$(cat err)" ""; cmp m want; "$fx" --umount m
    mv mid.qcow2 x.qcow2; cp base.raw d
    "$fx" --backing d/mid.qcow2 top.qcow2 m 2>err; same "$(cat err)" ""; cmp m want; "$fx" --umount m
    "$fx" --backing x.qcow2 top.qcow2 m 2>err; grep -q "top.qcow2: x.qcow2 stands for its backing file 'mid.qcow2', which is not there.*this skips 'mid.qcow2'" err; cmp m want; "$fx" --umount m
    "$fx" --backing base.raw --backing-format raw top.qcow2 m 2>err; same "$(grep -c "this skips 'mid.qcow2': its changes are lost.*depth > 0" err)" 1
    cmp -n 65536 m base.raw; cmp -n 65536 m base.raw -i 65536; cmp -n 131072 m want -i 131072; "$fx" --umount m
    # Without it: what is above, and errors.
    "$fx" --no-backing --error-map map top.qcow2 m 2>err; grep -q 'without its backing file' err
    dd if=m of=/dev/null bs=64k conv=noerror status=none 2>err || true; "$fx" --umount m
    same "$(ddrescuelog -b 65536 -l- map | tr '\n' ' ')" "0 1 3 "
    same "$("$fx" -q --no-backing --map --json top.qcow2 | jq -c '[.[] | select(.error) | [.start, .length]]')" '[[0,131072],[196608,65536]]'
    same "$("$fx" -q --mapfile map --no-backing --map --json top.qcow2 | jq -c '[.[] | select(.error) | [.start, .length]]')" '[[0,131072],[196608,65536]]'
}

t_strict_refuses_damaged_tables() {
    random raw 1000; qemu-img convert -f raw -O qcow2 raw good
    "$fx" -q --strict good m; cmp m raw; "$fx" --umount m
    poke bad $(($(l2_of good) + 16)) 8000004000000000
    refused 1 'strict.*65536 bytes at 131072: its cluster lies past the end' "$fx" -q --strict bad m
    qemu-img create -q -f qcow2 -b bad -F qcow2 top
    refused 1 'strict.*65536 bytes at 131072' "$fx" -q --strict top m
    qemu-io -c 'write 128k 64k' top >/dev/null
    "$fx" -q --strict top m; "$fx" --umount m
    truncate -s 4M disk; echo '2048,4096,83' | sfdisk -q disk; truncate -s 2M disk
    refused 1 'strict.*p1 reaches past the end' "$fx" -q --format raw --strict --partition 1 disk m
}

# ---- the look at what was opened -------------------------------------------------------------------------------

# Every format tells at start that it was cut off, and by how much; whole images do not.
t_short_images_are_told_at_start() {
    random part 256; truncate -s 2M part; cat part part >raw; random part 512; cat part >>raw
    local o n cut
    for o in qcow2 qcow2,cluster_size=4k qcow2,extended_l2=on vmdk vmdk,subformat=streamOptimized vmdk,subformat=monolithicFlat \
        vmdk,subformat=twoGbMaxExtentSparse vpc vpc,subformat=fixed vhdx,block_size=1M vhdx,subformat=fixed,block_size=1M vdi vdi,static=on qed parallels; do
        echo "$o" >&2
        rm -f img*; n=${o%%,*}; cut=img
        case $o in *,*) qemu-img convert -f raw -O $n -o "${o#*,}" raw img ;; *) qemu-img convert -f raw -O $n raw img ;; esac
        case $o in *Flat) cut='img-flat' ;; *Sparse) cut='img-s001' ;; esac
        [ -e $cut ] || cut=$(ls $cut*)
        "$fx" --no-passthrough img m 2>err || { cat err; false; }
        [ ! -s err ] || { cat err; false; }
        cmp m raw || [ $n = vpc ]; "$fx" --umount m
        for n in 700 1500000; do
            cp $cut whole; truncate -s -$n $cut
            [ "$o" != vpc,subformat=fixed ] || { truncate -s -512 $cut; tail -c 512 whole >>$cut; }     # which is nothing without its footer
            "$fx" --no-passthrough img m 2>err || { cat err; false; }
            grep "^fuseexp: $cut: is shorter than its tables say: [0-9]* bytes are missing" err >told || { cat err; false; }
            n=$(($(sed 's/.*say: //; s/ bytes.*//' told) - n))              # a footer may be among what is missing
            [ $n -ge -65536 ] && [ $n -le 4096 ] || fail "$n more than are missing"
            cmp -n 1000000 m raw; not cmp m raw 2>err
            "$fx" --umount m; cp whole $cut
        done
    done
}

# Large ones are looked at for a tenth of a second, from their end; an absurd entry is no cut.
t_large_images_are_looked_at_for_a_moment() {
    qemu-img create -q -f qcow2 img 8T; qemu-io -c 'write -P 7 8100G 1M' -c 'write -P 8 8191G 1M' img >/dev/null; truncate -s -500k img
    "$fx" img m 2>err; grep -q 'bytes are missing' err; "$fx" --umount m
    qemu-img create -q -f qcow2 good 1M; qemu-io -c 'write -P 7 0 1M' good >/dev/null
    poke bad $(($(l2_of good) + 16)) 8000800000000000
    "$fx" bad m 2>err; same "$(wc -c <err)" 0; "$fx" --umount m
    # Parts that the user names are taken as they are; one that is short is told.
    random x.raw 3; random y.raw 2; random z.raw 3; cat x.raw y.raw z.raw >truth
    "$fx" x.raw y.raw z.raw m 2>err; grep -q 'y.raw: is 4096 bytes shorter than the first part' err; cmp m truth; "$fx" --umount m
    "$fx" x.raw z.raw y.raw m 2>err; not grep shorter err; "$fx" --umount m
    # What another program is writing to has grown since.
    truncate -s -500k good; "$fx" -U good m 2>err; same "$(wc -c <err)" 0; "$fx" --umount m
}

# Data in the metadata, data in other data, tables in tables: --check calls them corruptions, and the start says so.
check_twice() {     # IMAGE [OPTION...]
    expect 2 "$fx" --check "$@"; grep -q 'for something else, too' err
    "$fx" -q "$@" m 2>err; grep -q "bytes of its file are used twice" err; "$fx" --umount m
    expect 1 "$fx" -q --strict "$@" m
}
check_once() { expect 0 "$fx" --check "$@"; "$fx" -q "$@" m 2>err; [ ! -s err ] || { cat err; false; }; "$fx" --umount m; }

t_what_is_used_twice_is_told() {
    vhd_py '
data = os.urandom(8 << 20); size = 8 << 20; ones = [1] * 4096
build("once", 3, size, 2 << 20, [ones] * 4, data)
d = bytearray(open("once", "rb").read())
def bat(name, *e): b = bytearray(d); b[1536:1536 + 4 * len(e)] = struct.pack(">%dI" % len(e), *e); open(name, "wb").write(b)
bat("bitmap", 4, 4 + 4096, 4 + 2 * 4097, 4 + 3 * 4097); bat("block", 4, 5 + 4097, 4 + 2 * 4097, 4 + 3 * 4097); bat("same", 4, 4, 4 + 2 * 4097, 4 + 3 * 4097)
bat("footer", 4, 4 + 4097, 4 + 2 * 4097, 5 + 3 * 4097)'
    check_once once; for i in bitmap block same; do check_twice $i; done
    expect 2 "$fx" --check footer
    vhdx_py 'P = bytes([1] * 16); build("p", 4 * MIB, MIB, [6] * 4, bytes(4 * MIB), ident=P)
bat = build("once", 4 * MIB, MIB, [[i % 2 for i in range(2048)], 6, 6, 6], os.urandom(4 * MIB), keys=[("parent_linkage", "{%s}" % uuid.UUID(bytes_le=P)), ("relative_path", "p")])
d = open("once", "rb").read(); at = struct.unpack("<Q", d[bat + 4096 * 8:bat + 4096 * 8 + 8])[0]
for name, what in ("bitmap", at), ("block", struct.unpack("<Q", d[bat + 8:bat + 16])[0]):
    b = bytearray(d); b[bat + 16:bat + 24] = pack("<Q", what & -MIB | 6); open(name, "wb").write(b)'
    check_once once; for i in bitmap block; do check_twice $i; done
    local at
    for o in qed parallels vdi vmdk; do
        rm -f good; qemu-img create -q -f $o good 64M; qemu-io -f $o -c 'write -P 1 0 4M' -c 'write -P 2 40M 4M' good >/dev/null; check_once good
        case $o in
            qed) at=$(od -An -tu8 -j40 -N8 good); poke bad "$(od -An -tu8 -j$((at)) -N8 good)" "$(od -An -tx1 -j"$(od -An -tu8 -j$((at)) -N8 good)" -N16 good | awk '{ for (i = 9; i <= 16; i++) printf "%s", $i }')"; check_twice bad
                qemu-img create -q -f qed good 8G; qemu-io -f qed -c 'write -P 1 0 64k' -c 'write -P 2 5G 64k' good >/dev/null; check_once good
                at=$(od -An -tu8 -j40 -N8 good); poke bad $((at + 16)) "$(od -An -tx1 -j$((at)) -N8 good | tr -d ' ')" ;;
            parallels) poke bad 68 "$(od -An -tx1 -j64 -N4 good | tr -d ' ')" ;;
            vdi) at=$(od -An -tu4 -j340 -N4 good); poke bad $((at + 4)) 00000000 $((at + 8)) 01000000 ;;
            vmdk) # one grain table for two: of both directories
                at=$(($(od -An -tu8 -j48 -N8 good) * 512)); n=$(($(od -An -tu8 -j56 -N8 good) * 512))
                poke bad $((at + 4)) "$(od -An -tx1 -j$at -N4 good | tr -d ' ')" $((n + 4)) "$(od -An -tx1 -j$n -N4 good | tr -d ' ')" ;;
        esac
        check_twice bad
    done
    vmdk_py '
g = grains(1, 9, 1, 4096); b = cowd(g, 8192); save("once", b); t = struct.unpack("<2I", b[2048:2056])
c = bytearray(b); table = t[0] * 512; used = [i for i in range(4096) if struct.unpack_from("<I", c, table + 4 * i)[0]]
struct.pack_into("<I", c, table + 4 * used[0], t[0] + 5); save("bad", c)'
    expect 0 "$fx" --check once; check_twice bad
}

# ---- VDI -------------------------------------------------------------------------------------------------------

t_vdi_variants_read_back() {
    local n=0 o size
    for o in static=off static=on; do
        for size in 12345k 3072k 512; do
            n=$((n + 1))
            rm -f img
            qemu-img create -q -f vdi -o $o img $size
            scribble img $n
            qemu-img convert -O raw img truth
            check_same img
        done
    done
    random raw 2000; truncate -s %512 raw; cp raw truth
    qemu-img convert -O vdi raw img
    check_same img
}

t_vdi_of_2_tib_is_sparse_and_quick() {
    qemu-img create -q -f vdi img 2T
    qemu-io -c 'write -P 7 1T 64k' -c 'write -P 9 2199023190016 65536' img >/dev/null
    "$fx" -q img m
    py '
f = os.open("m", os.O_RDONLY)
assert os.fstat(f).st_size == 2 << 40
assert os.pread(f, 65536, 1 << 40) == b"\7" * 65536 and os.pread(f, 99999, (2 << 40) - 65536) == b"\11" * 65536
assert os.pread(f, 65536, 1 << 39).count(0) == 65536
assert os.lseek(f, 0, os.SEEK_DATA) == 1 << 40 and os.lseek(f, 1 << 40, os.SEEK_HOLE) == (1 << 40) + (1 << 20)
assert os.lseek(f, (1 << 40) + (2 << 20), os.SEEK_DATA) == (2 << 40) - (1 << 20)
'
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 12000 ]
    "$fx" --umount m
}

t_vdi_from_the_specification_reads_back() {
    py "$vdi_py"'
for name, bs, extra, n in ("small", 4096, 0, 300), ("extra", 65536, 512, 20), ("large", 2 << 20, 0, 3):
    blocks = [b or 0 for b in some(n, bs, [None, 0])]
    raw = b"".join(b or bytes(bs) for b in blocks)
    size = len(raw) - (bs - 1536)
    vdi(name, 1, size, bs, [b or rnd.choice([None, 0]) for b in blocks], extra=extra)
    open(name + ".raw", "wb").write(raw[:size])
    if not extra:
        vdi0(name + "0", 1, size, bs, [b or None for b in blocks])
        open(name + "0.raw", "wb").write(raw[:size])
vdi("odd", 2, 4096 * 3 - 100, 4096, [bytes([65 + i]) * 4096 for i in range(3)])    # qemu rounds it up too
open("odd.raw", "wb").write(b"A" * 4096 + b"B" * 4096 + b"C" * 4096)
'
    for i in small extra large small0 large0 odd; do cp $i.raw truth; check_same $i; done
}

t_vdi_chains_are_verified_by_uuid() {
    mkdir s
    py "$vdi_py"'
bs = 4096
base, mid, top = some(60, bs, [0]), some(70, bs, [None, None, 0]), some(70, bs, [None, None, 0])
base += [None] * 10
vdi("base.vdi", 1, 60 * bs, bs, base[:60], own=1, changed=2)
vdi("mid.vdi", 4, 70 * bs, bs, mid, own=3, changed=4, parent=1, parent_changed=2)
def name(n): return "{%s-%s-%s-%s-%s}.vdi" % tuple("%02x" % n * k for k in (4, 2, 2, 2, 6))
vdi("s/" + name(0x33), 3, 70 * bs, bs, mid, own=0x33, changed=4, parent=0x11, parent_changed=2)
vdi("s/top.vdi", 4, 70 * bs, bs, top, own=5, changed=6, parent=0x33, parent_changed=4)
vdi("s/base", 1, 60 * bs, bs, base[:60], own=0x11, changed=2)
vdi("stranger.vdi", 1, 60 * bs, bs, base[:60], own=8, changed=2)
vdi("used.vdi", 1, 60 * bs, bs, base[:60], own=1, changed=9)
vdi("orphan.vdi", 4, 70 * bs, bs, mid, own=3, changed=4)
vdi("odd.vdi", 1, 70 * bs, bs, base, own=3, changed=4, parent=1)
def raw(*l): return b"".join(next((x for x in c if x is not None), 0) or bytes(bs) for c in zip(*l))
open("base.raw", "wb").write(raw(base)[:60 * bs])
open("truth1", "wb").write(raw(mid, base)); open("truth2", "wb").write(raw(top, mid, base))
open("holes", "wb").write(bytes(x is None for x in mid))
'
    cp truth1 truth
    check_same mid.vdi
    mkdir a; mv base.vdi a
    refused 1 "cannot open its backing file '{01010101.*and no file beside it has the identity 01010101-0101-0101-0101-010101010101; --backing FILE names it" "$fx" -q mid.vdi m
    check_same mid.vdi --backing a/base.vdi
    expect 1 "$fx" -q --backing stranger.vdi mid.vdi m; grep -q 'is not the parent of mid.vdi' err
    expect 1 "$fx" -q --backing used.vdi mid.vdi m; grep -q 'was changed after mid.vdi was made' err
    check_same mid.vdi --backing stranger.vdi --force-parent
    check_same mid.vdi --backing used.vdi --force-parent
    expect 1 "$fx" -q --backing mid.vdi mid.vdi m; grep -q 'own backing file' err
    # As VirtualBox keeps its snapshots: {UUID}.vdi beside each other; the base has any name.
    cp truth2 truth
    check_same s/top.vdi
    "$fx" s/top.vdi m 2>err; "$fx" --umount m; grep -q 'its parent, recorded as .*1111}.vdi.*, is s/base by its identity' err
    mv s/base 's/{11111111-1111-1111-1111-111111111111}.vdi'
    check_same s/top.vdi
    # The parent may be of another format, if the user says so; then nothing can be verified.
    cp truth1 truth
    expect 1 "$fx" -q --backing base.raw --backing-format raw mid.vdi m
    check_same mid.vdi --backing base.raw --backing-format raw --force-parent
    expect 1 "$fx" -q --backing a/base.vdi orphan.vdi m; grep -q "no parent's UUID.*type (0x4)" err
    expect 1 "$fx" -q odd.vdi m; grep -q "is not a differencing one, of type (0x1)" err
    # Without the parent, what is in it is bad and the rest is there.
    "$fx" -q --no-backing mid.vdi m
    py '
f, raw = os.open("m", os.O_RDONLY), open("truth1", "rb").read()
for i, hole in enumerate(open("holes", "rb").read()):
    try:
        assert os.pread(f, 4096, i * 4096) == raw[i * 4096:][:4096] and not hole, i
    except OSError: assert hole, i
'
    "$fx" --umount m
}

t_vdi_damaged_headers_are_refused() {
    qemu-img create -q -f vdi good 64M; qemu-io -c 'write -P 1 0 3M' good >/dev/null
    local rows='
68 01000000 unknown version 0.1
68 00000200 unknown version 2.0
340 00000000 the offset of the block map, in whole sectors behind the header (0x0)
340 02020000 the offset of the block map, in whole sectors behind the header (0x202)
340 00feffff number of blocks
340 04020000 the offset of the block map, in whole sectors behind the header (0x204)
340 00010000 the offset of the block map, in whole sectors behind the header (0x100)
344 00020000 the offset of the data, inside the block map (0x200)
344 00000000 the offset of the data
344 01000200 the offset of the data, in whole sectors (0x20001)
344 00011000 the offset of the data, in whole sectors (0x100100)
368 0100000400000000 the disk size, larger than all blocks together (0x4000001)
368 ffffffffffffffff the disk size
376 00000000 the block size, a power of two from 512 bytes to 1 GiB (0x0)
376 00011000 the block size, a power of two from 512 bytes to 1 GiB (0x100100)
376 00010000 the block size, a power of two from 512 bytes to 1 GiB (0x100)
376 00000080 the block size, a power of two from 512 bytes to 1 GiB (0x80000000)
380 00002000 the extra data per block, 0 or a power of two up to the block size (0x200000)
380 00030000 the extra data per block, 0 or a power of two up to the block size (0x300)
384 00000080 number of blocks, whose map does not fit
384 ffffffff number of blocks, whose map does not fit
384 3f000000 the disk size
424 01000000 a parent, in an image that is not
76 04000000 no parent'
    refuse_each poke bad <<<"$rows"
    head -c 400 good >bad; refused 1 'the file ends in the header (0x190)' "$fx" -q bad m
    head -c 600 good >bad; refused 1 'number of blocks' "$fx" -q bad m
    refused 1 'is not a VDI image' "$fx" -q --format vdi "$top/fuseexp.c" m
}

t_vdi_fields_that_reading_does_not_need_may_be_odd() {
    qemu-img create -q -f vdi good 64M; qemu-io -c 'write -P 1 0 3M' good >/dev/null; qemu-img convert -O raw good truth
    local row
    for row in '68 02000100' '72 7f010000' '76 00000000' '76 05000000' '348 ffffffffffffffff' '388 ffffffff' '84 ffff'; do
        poke bad $row; check_same bad
    done
    poke bad 76 07000000 424 01; refused 1 'the image type (0x7)' "$fx" -q bad m
}

t_vdi_damaged_maps_cost_their_block_only() {
    qemu-img create -q -f vdi good 8M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 1M 1M' -c 'write -P 3 7M 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local map; map=$(od -An -tu4 -j340 -N4 good)
    for entry in 03000000 00ffffff fdffffff; do
        poke bad $((map + 4)) $entry
        "$fx" -q bad m
        cmp -n 1048576 m truth; cmp -i 2097152 m truth
        not dd if=m of=/dev/null bs=4k skip=256 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=511 count=1 2>err
        "$fx" --umount m
    done
    poke bad $((map + 4)) feffffff; "$fx" -q bad m                          # discarded: zeros
    cmp -n 1048576 -i 1048576:0 m /dev/zero; "$fx" --umount m
    # Two entries for one block: told, and what a lost sector leaves (zeros in a row) is bad, not block 0 again and again.
    cp good bad; poke bad $((map + 4)) 02000000; "$fx" -q bad m 2>log; "$fx" --umount m
    grep -q 'bad: is damaged: 1048576 bytes of its file are used twice' log; refused 1 'strict.*used twice' "$fx" -q --strict bad m
    poke bad $map 000000000000000000000000; "$fx" -q bad m 2>log
    not dd if=m of=/dev/null bs=4k count=1 2>err; not dd if=m of=/dev/null bs=4k skip=600 count=1 2>err
    cmp -i 3145728 m truth; "$fx" --umount m
    # Truncated in the last block: what is there reads, the rest is an error and not zeros.
    cp good bad; truncate -s -300000 bad
    "$fx" -q bad m; cmp -n $((8388608 - 303104)) m truth
    not dd if=m of=/dev/null bs=4k skip=2047 count=1 2>err; grep -q 'Input/output' err
    not cp m copy 2>err
    "$fx" --umount m
}

t_vdi_random_damage_is_survived() {
    py "$vdi_py"'b = some(250, 4096, [None, 0]); vdi("good", 4, 250 * 4096, 4096, b, parent=7); open("truth", "wb").write(b"".join(x or bytes(4096) for x in b))'
    fuzz vdi 5000 good truth 0 512 1000000                                  # the header: anything but a crash
    fuzz vdi 5000 good truth 512 1512 1                                     # one entry, one block
}

# ---- QED -------------------------------------------------------------------------------------------------------

t_qed_variants_read_back() {
    local n=0 o
    for o in cluster_size=4k,table_size=2 cluster_size=4k,table_size=16 cluster_size=8k,table_size=2 cluster_size=64k,table_size=4 \
        cluster_size=1M,table_size=8 cluster_size=4M,table_size=2; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f qed -o $o img 12345k
        scribble img $n
        qemu-img convert -O raw img truth
        check_same img
    done
    qemu-img convert -O qed truth img; check_same img
}

# Sizes that the specification allows and qemu-img cannot make: tables of one cluster, clusters of 64 MiB.
t_qed_from_the_specification_reads_back() {
    py '
import struct
# Header: magic, cluster size, table size and header size in clusters, 3 u64 of features, L1, disk size, 2 u32 name
def qed(name, bits, size, header):
    cl, rnd = 1 << bits, random.Random(bits)
    n = cl // 8; l2s = -(-size // (cl * n)); at = header + 1
    f = open(name, "wb"); raw = open(name + ".raw", "wb"); raw.truncate(size)
    def put(cluster, index, value): f.seek(cluster * cl + index * 8); f.write(struct.pack("<Q", value))
    f.write(struct.pack("<4sIIIQQQQQII", b"QED", cl, 1, header, 0, 0, 0, header * cl, size, 0, 0))
    for t in range(l2s):
        if rnd.random() < .2: continue
        l2 = at; at += 1
        put(header, t, l2 * cl)
        for i in range(min(n, -(-(size - t * n * cl) // cl))):
            kind = rnd.randrange(4)
            if kind == 0: put(l2, i, 1)
            if kind > 1:
                data = rnd.randbytes(min(cl, 5000)); off = (t * n + i) * cl
                put(l2, i, at * cl); f.seek(at * cl); f.write(data); at += 1
                raw.seek(off); raw.write(data[:size - off])
    f.truncate(at * cl)
qed("small", 12, 12345 * 512, 3)
qed("big", 26, 3 * (64 << 20) + 512, 1)
'
    cp small.raw truth; check_same small
    mv big.raw truth; check_same big
}

t_qed_backing_files_and_their_formats() {
    random base.raw 1000; qemu-img convert -O qcow2 base.raw base.qcow2
    qemu-img create -q -f qed -b base.raw -F raw img 6M; scribble img 1
    qemu-img convert -O raw img truth
    check_same img
    # The guest writes a header into its raw disk: it stays raw.
    qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil 400k
    dd if=evil of=base.raw conv=notrunc status=none
    qemu-img convert -O raw img truth
    check_same img
    # Of any other backing file QED does not say the format, and nobody guesses.
    qemu-img create -q -f qed -o cluster_size=4k -b base.qcow2 -F qcow2 img 6M; scribble img 2
    qemu-img convert -O raw img truth
    refused 1 'does not say which format.*--backing-format' "$fx" -q img m
    check_same img --backing-format qcow2
    qemu-img create -q -f qcow2 -b img -F qed top; scribble top 3
    qemu-img convert -O raw top truth
    check_same top --backing-format qcow2
    mkdir d; qemu-img create -q -f qed -u -b ../base.qcow2 -F raw d/img 400k
    expect 1 "$fx" -q d/img m; grep -q 'allow-external' err
    "$fx" --no-backing d/img m 2>err; grep -q "without its backing file '../base.qcow2'" err
    not cat m 2>err >none; grep -q 'Input/output' err
    "$fx" --umount m
}

t_qed_damaged_headers_are_refused() {
    random base 200; qemu-img create -q -f qed -b base -F raw good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
4 00080000 the cluster size: 4 KiB to 64 MiB, a power of 2 (0x800)
4 00000008 the cluster size: 4 KiB to 64 MiB, a power of 2 (0x8000000)
4 01000100 the cluster size
8 00000000 the table size: 1 to 16 clusters, a power of 2 (0x0)
8 03000000 the table size: 1 to 16 clusters, a power of 2 (0x3)
8 20000000 the table size: 1 to 16 clusters, a power of 2 (0x20)
12 00000000 the header.s size: 1 cluster at least (0x0)
12 ffffffff offset of the L1 table
16 0d00000000000000 unknown QED feature (bit 3)
16 0500000000000080 unknown QED feature (bit 63)
40 0000000000000000 offset of the L1 table (0x0)
40 0002010000000000 offset of the L1 table (0x10200)
40 0000000001000000 offset of the L1 table
48 01000004 the size: a multiple of 512 bytes below 2^63 (0x4000001)
48 00ffffffffffffff the size
48 0000000000004000 more than the tables can hold (0x40000000000000)
56 feff0000 offset of the backing file
56 ffffffff offset of the backing file
60 00000000 length of the backing file
60 00040000 length of the backing file.s name: 1 to 1023 bytes (0x400)
60 06000000 a zero in the backing file'
    refuse_each poke bad <<<"$rows"
    head -c 63 good >bad; refused 1 'is not a QED image' "$fx" -q --format qed bad m
    head -c 65000 good >bad; refused 1 'offset of the L1' "$fx" -q bad m
}

t_qed_marked_dirty_is_read_with_a_note() {
    qemu-img create -q -f qed good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null; qemu-img convert -O raw good truth
    poke bad 16 02 24 ff 32 ff                  # compatible and autoclear features do not matter
    cp bad copy
    check_same bad
    "$fx" bad m 2>err; grep -q 'is marked dirty' err; "$fx" --umount m
    cmp bad copy
}

t_qed_damaged_tables_cost_their_range_only() {
    qemu-img create -q -f qed -o cluster_size=4k,table_size=2 good 64M
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 32M 1M' -c 'write -z 40M 64k' good >/dev/null
    qemu-img convert -O raw good truth
    check_same good
    local l1 l2
    l1=$(od -An -tu8 -j40 -N8 good | tr -d ' '); l2=$(od -An -tu8 -j"$l1" -N8 good | tr -d ' ')
    # not aligned, past the end, in the header, all bits; a table of 1024 entries covers 4 MiB
    for row in "$l1 0102000000000000" "$l1 0000000001000000" "$l1 01" "$l1 ffffffffffffffff" \
        "$l2 0102000000000000" "$l2 0000000001000000" "$l2 0200000000000000" "$l2 ffffffffffffffff"; do
        poke bad $row
        "$fx" -q bad m
        not dd if=m of=/dev/null bs=4k count=1 2>err; grep -q 'Input/output' err
        cmp -i 4194304 m truth
        [ "${row%% *}" = "$l1" ] || cmp -i 4096 m truth
        "$fx" --umount m
    done
    cp good bad; truncate -s $(($(stat -c %s good) - 300000)) bad
    "$fx" -q bad m
    cmp -n 33554432 m truth
    not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_qed_of_absurd_size_costs_nothing() {
    qemu-img create -q -f qed -o cluster_size=1M,table_size=16 img 4P
    "$fx" -q img m
    same "$(stat -c %s m)" $((4 << 50))
    same "$(dd if=m bs=4k skip=$((1 << 39)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_qed_random_damage_is_survived() {
    qemu-img create -q -f qed -o cluster_size=8k,table_size=2 good 1M; scribble good 5
    qemu-img convert -f qed -O raw good truth
    local l1 l2; l1=$(($(od -An -tu8 --endian=little -j40 -N8 good))); l2=$(($(od -An -tu8 --endian=little -j$l1 -N8 good)))
    fuzz qed 4000 good truth 0 64 1000000
    fuzz qed 2000 good truth $l1 $((l1 + 8)) 1000000
    fuzz qed 4000 good truth $l2 $((l2 + 1024)) 2
}

# ---- Parallels -------------------------------------------------------------------------------------------------

# Rewrites an image with the magic "...Ext" (BAT in clusters) as one without (BAT in sectors). FILE NEW
prl_old() {
    py '
import struct
d = bytearray(open(sys.argv[1], "rb").read())
tracks, n = struct.unpack_from("<II", d, 28)
d[:16] = b"WithoutFreeSpace"
for i in range(n): struct.pack_into("<I", d, 64 + 4 * i, struct.unpack_from("<I", d, 64 + 4 * i)[0] * tracks)
open(sys.argv[2], "wb").write(d)
' "$@"
}

t_parallels_variants_read_back() {
    local n=0 c
    for c in 32256 4k 64k 258048 1M 16M; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f parallels -o cluster_size=$c img 12345k
        scribble img $n
        qemu-img convert -f parallels -O raw img truth
        check_same img
        prl_old img old
        qemu-img convert -f parallels -O raw old copy; cmp copy truth
        check_same old
    done
    # The size field has 4 bytes without "Ext"; a data offset of 0 is anywhere behind the BAT.
    cp old good; poke bad 40 01000000 48 00000000
    check_same bad
    qemu-img create -q -f parallels img 6T
    "$fx" -q img m; same "$(stat -c %s m)" $((6 << 40)); "$fx" --umount m
}

# A bundle of two storages and a snapshot, its images made by qemu, and ./truth, ./truth-base by qemu-img map.
prl_bundle() {
    local k f i size
    mkdir d.hdd
    for k in 0 1; do
        size=$((k ? 5123 : 6000))k
        for f in base top; do
            qemu-img create -q -f parallels -o cluster_size=$((k * ${#f} == 4 ? 252 : 64))k d.hdd/$k.$f.hds $size
            [ $f = top ] || scribble d.hdd/$k.$f.hds 3$k
            [ $f = base ] || for i in 1 4 5 13 33 40 41 60; do echo "write -P $((i + k)) $((i * 70))k 50k"; done |
                qemu-io -f parallels d.hdd/$k.$f.hds >/dev/null
            qemu-img convert -f parallels -O raw d.hdd/$k.$f.hds $k.$f.raw
        done
        qemu-img map --output=json -f parallels d.hdd/$k.top.hds >$k.map
        prl_old d.hdd/$k.base.hds old; mv old d.hdd/$k.base.hds
    done
    cat 0.base.raw 1.base.raw >truth-base
    py '
import json
with open("truth", "wb") as out:
    for k in "01":
        base, top = bytearray(open(k + ".base.raw", "rb").read()), open(k + ".top.raw", "rb").read()
        holes = [e for e in json.load(open(k + ".map")) if not e["present"]]
        assert sum(any(base[e["start"]:e["start"] + e["length"]]) for e in holes) > 4
        for e in json.load(open(k + ".map")):
            if e["present"]: base[e["start"]:e["start"] + e["length"]] = top[e["start"]:e["start"] + e["length"]]
        out.write(base)
'
    prl_descriptor >d.hdd/DiskDescriptor.xml
}
prl_base='{5fbaabe3-6958-40ff-92a7-860e329aab41}'
prl_top='{12345678-9ABC-def1-2345-6789abcdef12}'
prl_descriptor() {
    local top_guid="<TopGUID>$prl_top</TopGUID>"
    cat <<END
<?xml version='1.0' encoding='UTF-8'?>
<!-- a <comment> -->
<Parallels_disk_image Version="1.0">
    <Disk_Parameters><Disk_size>22246</Disk_size><Padding>0</Padding><Other a='>'/>
        <Encryption><Engine>{00000000-0000-0000-0000-000000000000}</Engine><Data></Data></Encryption></Disk_Parameters>
    <StorageData>
        <Storage><Start>12000</Start><End>22246</End><Blocksize>128</Blocksize>
            <Image><GUID>$prl_top</GUID><Type>Compressed</Type><File>1.top.hds</File></Image>
            <Image><GUID>$prl_base</GUID><Type>Compressed</Type><File>1.base.hds</File></Image></Storage>
        <Storage><Start>0</Start><End>12000</End><Blocksize>128</Blocksize>
            <Image><GUID>$prl_base</GUID><Type>${1:-Compressed}</Type><File>${2:-0.base.hds}</File></Image>
            <Image><GUID>$prl_top</GUID><Type>Compressed</Type><File>0.top.hds</File></Image></Storage>
    </StorageData>
    <Snapshots>${3-$top_guid}
        <Shot><GUID>$prl_base</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>
        <Shot><GUID>$prl_top</GUID><ParentGUID>$prl_base</ParentGUID></Shot>
    </Snapshots>
</Parallels_disk_image>
END
}

t_parallels_bundles_show_the_current_snapshot() {
    prl_bundle
    check_same d.hdd
    check_same d.hdd/
    check_same d.hdd/DiskDescriptor.xml
    cp truth current; cp truth-base truth
    check_same d.hdd --snapshot $prl_base
    prl_descriptor Compressed 0.base.hds '' >d.hdd/DiskDescriptor.xml           # then that GUID is the current state's name
    check_same d.hdd
    cp current truth; check_same d.hdd --snapshot 12345678-9abc-DEF1-2345-6789abcdef12
    refused 1 "has no snapshot 'first' (it has 2)" "$fx" -q --snapshot first d.hdd m
    refused 1 'has no snapshots, so --snapshot' "$fx" -q --snapshot first d.hdd/1.top.hds m
    # A root that is a plain file, in a directory below, with a name that XML has to quote.
    mkdir 'd.hdd/R&D'; cp 0.base.raw 'd.hdd/R&D/<0>'
    prl_descriptor Plain 'R&amp;D/&lt;0&gt;' >d.hdd/DiskDescriptor.xml
    check_same d.hdd
    truncate -s 1M 'd.hdd/R&D/<0>'
    "$fx" -q d.hdd m; cmp -i 6144000 m truth; not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    # What a snapshot's image does not have is in another one: no zeros.
    refused 1 '1.top.hds: holds only what changed since snapshot {.*; its directory, as IMAGE, is the whole disk' "$fx" -q d.hdd/1.top.hds m
    "$fx" --info d.hdd/1.top.hds >out; grep -q '^backing filename: *snapshot {' out
    "$fx" -q --no-backing d.hdd/1.top.hds m; not cat m 2>err >out; grep -q 'Input/output' err; "$fx" --umount m
    "$fx" --format parallels d.hdd/0.base.hds m 2>err; grep -q 'shown alone; its directory' err; "$fx" --umount m
    random big 4; qemu-img create -q -f qcow2 -u -b d.hdd/DiskDescriptor.xml -F parallels over 11123k
    prl_descriptor >d.hdd/DiskDescriptor.xml; check_same over
}

t_parallels_bundles_that_make_no_sense_are_refused() {
    prl_bundle
    mkdir e f; : >f/x; : >out
    refused 1 'e: is a directory, not a disk image' "$fx" -q e m
    refused 1 'f: is a directory, not a disk image' "$fx" -q f m
    mkdir g; head -c 2000 /dev/zero >g/DiskDescriptor.xml; refused 1 'is damaged or not in UTF-8' "$fx" -q g m
    iconv -t UTF-16 d.hdd/DiskDescriptor.xml >g/DiskDescriptor.xml; refused 1 'is damaged or not in UTF-8' "$fx" -q g m
    (echo; grep -v '?xml' d.hdd/DiskDescriptor.xml) >x; mv x d.hdd/DiskDescriptor.xml; check_same d.hdd
    local descriptor=d.hdd/DiskDescriptor.xml
    edited() { prl_descriptor | sed "$1" >$descriptor; cmp -s $descriptor <(prl_descriptor) && fail "$1"; refused 1 "$2" "$fx" -q d.hdd m; }
    edited 's/0.base.hds/..\/out/' 'leads out of its directory; --allow-external DIR'
    edited 's/0.base.hds/\/etc\/passwd/' 'outside of its directory; --allow-external DIR'
    edited 's/0.base.hds/http:x/' 'not a plain file name$'
    edited 's/0.base.hds/absent/' "cannot open its image file 'absent': No such file or directory$"
    edited 's/0.base.hds/DiskDescriptor.xml/' 'is not a Parallels image'
    edited 's/0.top.hds/1.top.hds/' 'the size, smaller than its storage'
    edited 's/0.base.hds/\&file;/' "a file's name ('&file;')"
    edited 's/0.base.hds//' "a file's name ('')"
    edited '/0.base.hds/s/Compressed/Expanding/' "unknown type of an image ('Expanding')"
    edited '/0.base.hds/s/<Type>Compressed<.Type>//' 'there twice, or lacks a part'
    edited '/0.base.hds/s/<GUID>.*<.GUID>//' 'a storage has no image of snapshot'
    edited 's/<Image>.*0.top.hds.*Image>//' "a storage has no image of snapshot ('123456789abcdef123456789abcdef12')"
    edited '/1.top.hds/s/GUID>.*<.GUID/GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}<\/GUID/' 'a storage has no image of snapshot'
    edited '/1.base.hds/s/GUID>.*<.GUID/GUID>{12345678-9ABC-def1-2345-6789abcdef12}<\/GUID/' 'there twice'
    edited 's/<Start>12000/<Start>12001/' 'no storage begins at sector 12000'
    edited 's/<Start>12000/<Start>11999/' 'no storage begins at sector 12000'
    edited 's/<End>12000/<End>0/' 'no storage begins at sector 0'
    edited 's/<End>12000/<End>-1/' "a number of sectors ('-1')"
    edited 's/<End>12000/<End>12000<!-- 1 -->/' 'a number of sectors'
    edited 's/<End>12000/<End>99999999999999999999/' 'a number of sectors'
    edited 's/<End>22246/<End>22245/' 'a disk of 22246 sectors, and storages of 22245'
    edited 's/<End>22246/<End>22247/' 'the size, smaller than its storage'
    edited 's/<Disk_size>.*size>//' 'a disk of 0 sectors'
    edited 's/<Padding>0/<Padding>1/' 'disks with padding'
    edited 's/<Engine>{0/<Engine>{5/' 'is encrypted (by {5'
    edited 's/<TopGUID>{1/<TopGUID>{9/' "no snapshot, or not all of it, for this GUID ('9"
    edited 's/<TopGUID>{1/<TopGUID>{x/' 'a GUID'
    edited 's/<ParentGUID>{0/<ParentGUID>{7/' "no snapshot, or not all of it, for this GUID ('7"
    edited 's/<ParentGUID>{0.*}/<ParentGUID>{12345678-9abc-def1-2345-6789abcdef12}/' 'in a circle'
    edited 's/<ParentGUID>{0.*0}<.ParentGUID>//' 'not all of it'
    edited 's/Version="1.0"/Version="1.0/' 'not a tag'
    edited 's/<.Storage>/<\/Stor>/' 'the wrong element ends'
    edited 's/<.Parallels_disk_image>//' "ends within an element ('/Parallels_disk_image')"
    edited 's/<!--.*/<!DOCTYPE x [<!ENTITY y "z">]>/' 'declarations are not supported'
    edited 's/<!--.*/<!--/' 'has no end'
    edited 's/<Other.*/<Other>\x0<\/Other>/' 'is not in UTF-8'
    prl_descriptor | sed '/Storage/d;/Image>/d' >$descriptor; refused 1 'has no storages' "$fx" -q d.hdd m
    prl_descriptor | sed "s/$prl_base/{00112233-4455-6677-8899-aabbccddeeff}/;s/<TopGUID>.*TopGUID>//" >$descriptor
    refused 1 'does not say which of its 2 snapshots is the current one' "$fx" -q d.hdd m
    prl_descriptor Compressed 0.base.hds | sed '/0.top.hds/s/Compressed/Plain/' >$descriptor
    refused 1 'a plain file but has a parent' "$fx" -q d.hdd m
    { prl_descriptor; head -c 1M /dev/zero | tr '\0' ' '; } >$descriptor; refused 1 'too large for a DiskDescriptor.xml' "$fx" -q d.hdd m
    { prl_descriptor | head -n 3; yes '<a>' | head -n 1000; } >$descriptor; refused 1 'nested too deeply' "$fx" -q d.hdd m
    { prl_descriptor | head -n 3; echo '<Snapshots>'; yes '<Shot/>' | head -n 9999; } >$descriptor; refused 1 'too many of an element' "$fx" -q d.hdd m
    ln -sf /etc/passwd $descriptor; refused 1 'DiskDescriptor.xml: leads out of its directory' "$fx" -q d.hdd m
}

t_parallels_damaged_headers_are_refused() {
    qemu-img create -q -f parallels -o cluster_size=64k good 64M; qemu-io -f parallels -c 'write -P 1 0 1M' good >/dev/null
    local rows='
16 01000000 unknown version 1
16 03000000 unknown version 3
28 00000000 the cluster size (0x0)
28 ffffff7f the cluster size (0x7fffffff)
32 00000010 number of clusters, whose table does not fit into the file (0x10000000)
32 ffffffff number of clusters
32 ff030000 the size, larger than all clusters together (0x20000)
36 0100020000000000 the size, larger than all clusters together (0x20001)
36 0000020001000000 the size, larger than all clusters together (0x100020000)
36 ffffffffffffffff the size, larger'
    refuse_each poke bad <<<"$rows"
    head -c 63 good >bad; refused 1 'is not a Parallels image' "$fx" -q --format parallels bad m
    head -c 2000 good >bad; refused 1 'number of clusters' "$fx" -q bad m
}

t_parallels_in_use_is_read_with_a_note() {
    qemu-img create -q -f parallels good 64M; qemu-io -f parallels -c 'write -P 1 0 1M' good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    poke bad 44 596e6f74 56 ffffff                  # the format extension does not matter
    cp bad copy
    check_same bad
    "$fx" bad m 2>err; grep -q 'is marked as in use' err; "$fx" --umount m
    cmp bad copy
}

t_parallels_damaged_bats_cost_their_cluster_only() {
    qemu-img create -q -f parallels -o cluster_size=64k good 8M
    qemu-io -f parallels -c 'write -P 1 0 1M' -c 'write -P 2 6M 1M' good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    prl_old good old
    for row in 'good ffffff00' 'good ffffffff' 'old 00ffff00' 'old 01000000' 'old 7f000000' 'old 81000000' 'old ffffffff'; do
        [ "${row% *}" = good ] || cp old good
        poke bad 68 "${row#* }"
        "$fx" -q bad m
        cmp -n 65536 m truth; cmp -i 131072 m truth
        not dd if=m of=/dev/null bs=4k skip=16 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=31 count=1 2>err
        "$fx" --umount m
    done
    cp old bad; truncate -s -300000 bad
    "$fx" -q bad m
    cmp -n $((6 << 20)) m truth; cmp -i $((7 << 20)) m truth
    not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_parallels_random_damage_is_survived() {
    qemu-img create -q -f parallels -o cluster_size=4k good 1M
    py 'for i in range(150): print("write -P %d %d 4096" % (i % 256, i * 37 % 256 * 4096))' | qemu-io -f parallels good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    fuzz parallels 4000 good truth 0 64 1000000
    fuzz parallels 4000 good truth 64 1088 1
    # The descriptor: no byte of it is trusted either.
    qemu-img create -q -f parallels a.hds 6000k
    prl_descriptor | sed 's/[01]\.[a-z]*\.hds/a.hds/;s/22246/22000/' >good
    "$fx" -q good m; "$fx" --umount m
    fuzz parallels 2000 good truth 0 "$(stat -c %s good)" 1000000
}

t_neighbours_are_read_at_once_in_every_block_format() {
    local o reads
    random raw 4096
    for o in vdi,static=on qed,cluster_size=4k parallels,cluster_size=4k; do
        qemu-img convert -f raw -O ${o%,*} -o ${o#*,} raw img
        "$fx" -q --no-passthrough --format ${o%,*} img m
        strace -f -o log -e trace=preadv2,pread64 -p "$(server_of)" 2>strace.err & local s=$!
        wait_for grep -q attached strace.err
        dd if=m bs=512k iflag=direct status=none | cmp - raw
        kill $s; wait $s || true
        reads=$(grep -c pread log || true)      # none: in memory all is spliced
        [ "$reads" -le 64 ] || fail "$reads reads for 32 requests of $o"
        "$fx" --umount m
    done
}

t_corpus_parallels_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = parallels ] && [ "$expected" = ok ] || continue
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$size" -gt 999999999 ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 5 ] || fail "only $n"
}

# ---- --info, --map, --check ------------------------------------------------------------------------------------

# same_json FILE FILE: the same values, whatever their order
same_json() { diff <(jq -S . "$1") <(jq -S . "$2") || fail "$1 and $2 differ"; }

# as_qemu_info IMAGE, as_qemu_map IMAGE: our JSON is qemu-img's
as_qemu_info() { "$fx" -q --info --json "$1" >ours.json; qemu-img info --output=json "$1" >theirs.json; same_json ours.json theirs.json; }
as_qemu_map() { "$fx" -q --map --json "$1" >ours.json; qemu-img map --output=json "$1" >theirs.json; same_json ours.json theirs.json; }

t_info_says_what_qemu_img_says() {
    local o
    for o in compat=0.10 cluster_size=512 refcount_bits=64,lazy_refcounts=on compression_type=zstd extended_l2=on data_file=ext.raw \
        data_file=raw.raw,data_file_raw=on; do
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 3M; as_qemu_info img
    done
    qemu-img create -q -f qcow2 img 3M
    qemu-img bitmap --add -g 64k img first; qemu-img bitmap --add --disable img 'a "name"'
    qemu-img snapshot -c 'before \ "update"' img; qemu-img snapshot -c two img
    as_qemu_info img
    printf '\001' | dd of=img bs=1 seek=79 conv=notrunc status=none; as_qemu_info img
    same "$("$fx" -q --info --json img | jq '."dirty-flag"')" true
    mkdir sub; truncate -s 5M sub/base
    qemu-img create -q -f qcow2 -b base -F raw sub/mid; qemu-img create -q -f qcow2 -b sub/mid -F qcow2 top
    as_qemu_info sub/mid; as_qemu_info top; as_qemu_info "$PWD/sub/mid"; as_qemu_info sub/base
    qemu-img create -q -f qcow2 -u -b nbd://host/x -F raw url 1M; as_qemu_info url
}

t_encrypted_qcow2_has_info_and_check_but_is_not_shown() {
    random truth 600
    local o key=(--object "secret,id=s,data=geheim") open=encrypt.key-secret=s,file.filename=img,driver=qcow2
    for o in encrypt.format=luks,encrypt.iter-time=100 encrypt.format=luks,encrypt.iter-time=100,cluster_size=512 encrypt.format=aes \
        encrypt.format=aes,compat=0.10; do
        rm -f img
        wait_for qemu-img convert "${key[@]}" -f raw -O qcow2 -o "$o,encrypt.key-secret=s" truth img    # QEMU may fail to measure times
        "$fx" -q --info --json img >ours.json
        qemu-img info --output=json img | jq '."format-specific".data.encrypt |= {format}' >theirs.json; same_json ours.json theirs.json
        same "$(jq .encrypted ours.json)" true
        "$fx" --info img | grep -qi 'encrypt'
        refused 1 'is encrypted (.*qemu-img convert can decrypt it' "$fx" -q img m
        refused 1 'is encrypted' "$fx" -q -w img m
        refused 1 'is encrypted' "$fx" -q --map img
        "$fx" -q --check img
        "$fx" -q --check --repair img           # the key material is in use, not a leak
        qemu-img convert "${key[@]}" --image-opts "$open" -O raw got; cmp got truth
    done
    qemu-img create -q -f qcow2 -b img -F qcow2 top; refused 1 'img: is encrypted' "$fx" -q top m
    "$fx" -q --info --json top | jq -e 'has("encrypted") | not' >/dev/null
    qemu-img create -q -f vmdk -o subformat=monolithicFlat v.vmdk 1M; echo 'encryption.keySafe = "vmware:key/list/x"' >>v.vmdk
    "$fx" -q --info --json v.vmdk | jq -e '.encrypted and ."virtual-size" == 1048576' >/dev/null
    refused 1 'is encrypted.*VMware can decrypt it' "$fx" -q v.vmdk m
}

t_info_needs_no_backing_file() {
    qemu-img create -q -f qcow2 -u -b gone -F raw img 1M
    "$fx" --info --json img >ours.json 2>err
    same "$(cat err)" ""
    same "$(jq -r '."full-backing-filename"' ours.json)" gone
    "$fx" --info img | grep -q '^backing filename: *gone$'
    "$fx" --check img >/dev/null 2>err
    same "$(cat err)" ""
    refused 1 "cannot open its backing file 'gone'" "$fx" --map img
}

t_info_of_raw_and_split_images() {
    random img 10
    same "$("$fx" -q --info --json img | jq -c '[.filename, .format, ."virtual-size", ."dirty-flag"]')" '["img","raw",40960,false]'
    split -b 10000 -d -a 3 img s.
    same "$("$fx" -q --info --json s.000 | jq -c '[."virtual-size", .files]')" '[40960,5]'
    same "$("$fx" -q --map --json s.000 | jq -c '[.[] | [.start, .length, .offset, .filename]]')" \
        '[[0,10000,0,"s.000"],[10000,10000,0,"s.001"],[20000,10000,0,"s.002"],[30000,10000,0,"s.003"],[40000,960,0,"s.004"]]'
    same "$("$fx" -q --info --json --no-parts s.000 | jq '."virtual-size"')" 10000
}

t_map_says_what_qemu_img_says() {
    local n=0 o
    for o in compat=0.10 cluster_size=512 cluster_size=4k refcount_bits=1 compression_type=zstd extended_l2=on \
        extended_l2=on,cluster_size=16k preallocation=falloc data_file=ext.raw extended_l2=on,data_file=ext2.raw; do
        n=$((n + 1))
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 6M
        scribble img $n; scribble img $((n + 100)) "$(qemu-img info --output=json img | jq '."cluster-size"')"
        as_qemu_map img
    done
}

t_map_of_chains_and_sparse_files_is_qemu_imgs() {
    truncate -s 5M base; random data 16
    for i in 3 100 900; do dd if=data of=base bs=4k seek=$i conv=notrunc status=none; done
    "$fx" -q --map --json base >ours.json; qemu-img map -f raw --output=json base >theirs.json; same_json ours.json theirs.json
    qemu-img create -q -f qcow2 -b base -F raw mid 8M; scribble mid 1
    qemu-img create -q -f qcow2 -o cluster_size=4k -b mid -F qcow2 top 10M; scribble top 2 4096
    qemu-img create -q -f qcow2 -b top -F qcow2 shrunk 3M
    for i in mid top shrunk; do as_qemu_map $i; done
}

t_map_for_people_lists_data_and_marks_what_cannot_be_read() {
    qemu-img create -q -f qcow2 img 4M; qemu-io -c 'write 0 128k' -c 'write 1M 64k' img >/dev/null
    "$fx" --map img >ours; qemu-img map img >theirs; cmp ours theirs
    qemu-io -c 'write -c 2M 64k' img >/dev/null
    "$fx" --map img | grep -q '^0x200000 *0x10000 *compressed *img$'
    local l1 l2
    l1=$(od -An -tu8 --endian=big -j40 -N8 img); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 img) & 0xffffffffffff))
    printf '\200\0\100\0\0\0\0\0' | dd of=img bs=1 seek=$((l2 + 8)) conv=notrunc status=none     # the second cluster
    "$fx" --map img | grep -q '^0x10000 *0x10000 *UNREADABLE *its cluster lies past the end of the file$'
    "$fx" --map --json img >ours.json
    same "$(jq -c '.[1] | [.start, .length, .data, .zero, .present, .offset, .error]' ours.json)" \
        '[65536,65536,true,false,true,null,"its cluster lies past the end of the file"]'
    qemu-img create -q -f qcow2 -u -b gone -F raw over 1M
    same "$("$fx" -q --map --json --no-backing over | jq -c 'map(.error)')" '["in the backing file, which was not opened"]'
}

t_json_is_valid_whatever_names_are_in_the_image() {
    qemu-img create -q -f qcow2 good 1M; qemu-img snapshot -c 123456789012 good
    py '
d = open("good", "rb").read()
at = d.index(b"123456789012")
rnd = random.Random(3)
for i in range(40):
    name = bytes(rnd.choice([1, 10, 31, 34, 47, 65, 92, 127, 128, 155, 192, 194, 195, 224, 237, 240, 244, 255, 191, 160]) for j in range(12))
    open("img%d" % i, "wb").write(d[:at] + name + d[at + 12:])'
    for i in $(seq 0 39); do
        "$fx" --info --json "img$i" >ours.json
        python3 -c 'import json; assert len(json.loads(open("ours.json", "rb").read().decode("utf-8"))["snapshots"]) == 1'
        not grep -q "$(printf '[\001-\011\013-\037\177]')" <("$fx" --info "img$i")
    done
}

t_nothing_is_said_by_halves() {
    random img 10
    for i in --info --map; do
        refused 1 'No such file' "$fx" $i --json gone
        same "$("$fx" $i --json gone 2>/dev/null | wc -c)" 0
        expect 1 "$fx" $i --json -q img >/dev/full; grep -q 'cannot write to standard output' err
        expect 1 "$fx" $i -q img >/dev/full
        refused 2 'take an IMAGE' "$fx" $i
        refused 2 'is for mounting' "$fx" $i -w img
        refused 2 'is for mounting' "$fx" $i --partition 1 img
        refused 125 'is for mounting' "$fx" $i img -- true
    done
    refused 2 'at a time' "$fx" --info --map img
    refused 2 'goes with' "$fx" --json img m
    qemu-img create -q -f qcow2 q 1M; py '
import struct
f = open("q", "r+b"); f.seek(60); f.write(struct.pack(">IQ", 3, 1 << 40))'
    expect 1 "$fx" --info --json q >ours.json; grep -q 'snapshot table reaches past the end' err
    same "$(jq -c .snapshots ours.json)" '[]'
}

# as_qemu_check IMAGE: the same document and the same exit status as qemu-img check
as_qemu_check() {
    local want=0 got=0
    qemu-img check -f qcow2 --output=json "$1" >theirs.json 2>theirs.err || want=$?
    "$fx" --check --json "$1" >ours.json 2>err || got=$?
    if grep -q wiped-tables ours.json; then         # which qemu-img does not look for
        jq '.corruptions -= ."wiped-tables" | del(."wiped-tables") | if .corruptions == 0 then del(.corruptions) else . end' ours.json >t
        mv t ours.json
        got=$(jq 'if .corruptions then 2 elif .leaks then 3 else 0 end' ours.json)
    fi
    [ "$got" = "$want" ] || { cat err theirs.err >&2; fail "exit status $got instead of $want"; }
    same_json ours.json theirs.json
    same "$(grep -c Sanitizer err)" 0
}

# table_of IMAGE: L1 table, first L2 table, first data cluster, first refcount block: places in the file
table_of() {
    py '
import struct
d = open(sys.argv[1], "rb").read()
be = lambda at: struct.unpack(">Q", d[at:at + 8])[0] & 0xfffffffffffe00
l1 = be(40)
print(l1, be(l1), be(be(l1)), be(be(48)))' "$1"
}

t_check_of_good_images_is_qemu_imgs() {
    local n=0 o
    for o in compat=0.10 cluster_size=512 cluster_size=4k cluster_size=2M refcount_bits=1 refcount_bits=2,cluster_size=4k \
        refcount_bits=4 refcount_bits=8 refcount_bits=32 refcount_bits=64,lazy_refcounts=on extended_l2=on,cluster_size=16k \
        compression_type=zstd data_file=ext.raw; do
        n=$((n + 1))
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 2M
        scribble img $n
        case $o in *data_file*) ;; *) scribble img $((n + 100)) "$(qemu-img info --output=json img | jq '."cluster-size"')" ;; esac
        case $o in *data_file* | refcount_bits=1) ;; *) qemu-img snapshot -c one img; qemu-io -c 'write -P 9 1M 900k' img >io.log; qemu-img snapshot -c two img ;; esac
        case $o in *0.10*) ;; *) qemu-img bitmap --add img b0; qemu-io -c 'write 1M 1M' img >io.log ;; esac
        as_qemu_check img
        same "$(jq -c '[."check-errors", .corruptions, .leaks]' ours.json)" '[0,null,null]'
        same "$(cat err)" ""
    done
}

t_check_counts_damage_as_qemu_img_does() {
    local bits cluster l1 l2 data block w
    while read -r bits cluster; do
        qemu-img create -q -f qcow2 -o "refcount_bits=$bits,cluster_size=$cluster" good 2M
        qemu-io -c "write 0 $((16 * cluster))" -c "write -c $((20 * cluster)) $cluster" good >io.log
        read -r l1 l2 data block < <(table_of good)
        w=$(printf '%016x' $((data + cluster)))
        for row in "$block 0000000000000000" "$block ffffffffffffffff" "$((block + 24)) 0101010101010101" \
            "$((l2 + 24)) 80${w:2}" "$((l2 + 24)) 00${w:2}" "$((l2 + 24)) 8000004000000000" "$((l2 + 24)) 8000000000000200" \
            "$((l2 + 24)) 0000000000000000" "$((l2 + 24)) 8000000000010010" "$l2 40ffffffffffffff" \
            "$l1 0000000000000000" "$l1 8000004000000000" "$l1 00$(printf "%014x" "$l2")" "$l1 81$(printf "%014x" "$l2")" \
            "$l1 80$(printf '%014x' $((l2 + 512)))" "$l1 80$(printf '%014x' $((data)))" \
            "56 00000000" "60 00000001" "$((l1 + 8)) 80$(printf "%014x" "$l2")"; do
            poke img $row
            as_qemu_check img
        done
    done < <(printf '%s\n' '1 512' '4 65536' '16 512' '16 65536' '64 4096')
}

# Zeros over tables, or pieces of them, of a disk with data everywhere: what was there is no hole.
t_wiped_tables_are_not_holes() {
    py 'rnd = random.Random(5); open("disk", "wb").write(b"".join(rnd.randbytes(1 << 16) if i % 512 // 64 % 3 != 1 else bytes(1 << 16) for i in range(1024)))'
    local o e spans
    while read -r o e spans; do
        rm -f good; qemu-img convert -f raw -O "${o%%,*}" -o "${o#*,}" disk good
        "$fx" --strict --suspect=eio good m; cmp m disk; "$fx" --umount m; expect 0 "$fx" --check good >said
        py '
import struct
d = bytearray(open("good", "rb").read())
u = lambda fmt, at: struct.unpack_from(fmt, d, at)[0]
M = 0xfffffffffffe00
for at, n in eval(sys.argv[1]): assert any(d[at:at + n]), sys.argv; d[at:at + n] = bytes([int(sys.argv[2])]) * n
open("bad", "wb").write(d)' "$spans" "$e"
        cp bad before
        expect 2 "$fx" --check --json bad >said; grep -q 'probably a wiped table' err || fail "$o $spans"
        [ "$(jq '."wiped-tables"' said)" -ge 1 ]
        refused 1 'damaged (--strict): a table is probably wiped' "$fx" -q --strict bad m
        "$fx" bad m 2>err; same "$(grep -c 'a table is probably wiped' err)" 1
        not cmp -s m disk; cmp <(head -c 67108864 m) m; "$fx" --umount m
        "$fx" -q --suspect=eio bad m
        py '
n = wrong = 0
with open("m", "rb", 0) as m, open("disk", "rb") as d:
    for at in range(0, 1 << 26, 4096):
        want = d.read(4096)
        try: wrong += os.pread(m.fileno(), 4096, at) != want
        except OSError: n += 1
assert not wrong and n >= 16, (wrong, n, sys.argv[1:])' "$o $spans"
        "$fx" --umount m; cmp bad before
        "$fx" --temporary --suspect=eio -q bad m; not cat m >t 2>err; "$fx" --umount m
    done <<'END'
qcow2,cluster_size=64k 0 [(u(">Q",u(">Q",40))&M,1<<16)]
qcow2,cluster_size=64k 0 [((u(">Q",u(">Q",40))&M)+1024,1024)]
qcow2,cluster_size=64k 0 [(u(">Q",40),8)]
qcow2,cluster_size=4k 0 [(u(">Q",u(">Q",40)+8*5)&M,512)]
qcow2,cluster_size=4k 0 [(u(">Q",40)+8*4,16)]
qcow2,cluster_size=16k,extended_l2=on 0 [((u(">Q",u(">Q",40))&M)+2048,2048)]
qed,cluster_size=64k 0 [(u("<Q",u("<Q",40))+1024,512)]
vdi,static=off 255 [(u("<I",340)+64,128)]
vpc,force_size=on 255 [(u(">Q",u(">Q",16)+16)+32,64)]
vhdx,block_size=1M 0 [(0x200000,256)]
vmdk,subformat=monolithicSparse 0 [(u("<I",u("<Q",o)*512)*512+1024,512) for o in (48,56)]
vmdk,subformat=streamOptimized 0 [(u("<I",u("<Q",o)*512)*512+1024,512) for o in (48,56)]
parallels,size=64M 0 [(64+4*16,128)]
END
}

# Leaks are not freed while a table seems to be wiped, or its data would be lost for good.
t_repair_frees_no_data_of_a_wiped_table() {
    py 'open("disk", "wb").write(random.Random(5).randbytes(16 << 20))'; qemu-img convert -f raw -O qcow2 disk good
    local l1 l2 data block; read -r l1 l2 data block < <(table_of good)
    poke bad $((l2 + 512)) "$(printf '%01024d' 0)"; cp bad broken
    expect 2 "$fx" -q --check --repair --json bad >said; same "$(jq -c '[.leaks,."leaks-fixed","wiped-tables" as $w | .[$w]]' said)" '[64,null,1]'
    "$fx" --check --repair bad >said 2>err || :; grep -q 'no leak is freed: --repair=leaks' err
    # The rest is repaired, and the table can still be put back.
    cp bad good; poke bad $((block + 20)) 0003; cp bad good; expect 2 "$fx" -q --check --repair good >said
    same "$(od -An -tx1 -j$((block + 20)) -N2 good | tr -d ' ')" 0001
    dd if=good of=t bs=1 skip=$((l2 + 512)) count=512 status=none
    # A dirty image is repaired before it is written: nor there.
    cp broken good; poke dirty 79 01; "$fx" -q -w dirty m; printf x | dd of=m conv=notrunc status=none; "$fx" --umount m
    qemu-img check --output=json dirty >said || :; same "$(jq .leaks said)" 64
    expect 0 "$fx" -q --check --repair=leaks bad >said; expect 0 "$fx" --check bad >said
    refused 1 'has no value, or it is leaks' "$fx" --check --repair=all bad
    refused 2 'suspect=eio is for reading' "$fx" -w --suspect=eio bad m
    refused 2 'not for an image that is in use' "$fx" -U --suspect=eio bad m
}

# Leaks of a crash, holes, preallocation, snapshots and junk behind an image on a device are no wiped tables.
t_plain_leaks_are_not_taken_for_wiped_tables() {
    py 'open("disk", "wb").write(random.Random(5).randbytes(24 << 20))'; qemu-img convert -f raw -O qcow2 disk good
    local l1 l2 data block; read -r l1 l2 data block < <(table_of good)
    poke bad $((l2 + 512)) "$(printf '%0240d' 0)"; expect 3 "$fx" --check bad >said; not grep wiped err     # 15 entries
    "$fx" --strict --suspect=eio bad m; "$fx" --umount m
    poke bad $((l2 + 512)) "$(printf '0000000000000001%.0s' $(seq 64))"; expect 3 "$fx" --check bad >said   # zeroed, not wiped
    cp good bad; qemu-io -c 'discard 4M 12M' bad >io.log; expect 0 "$fx" --check bad >said
    cp good bad; qemu-img snapshot -c one bad; qemu-io -c 'discard 0 24M' bad >io.log; expect 0 "$fx" --check bad >said
    "$fx" --strict bad m; "$fx" --umount m
    local o
    for o in metadata falloc full; do
        qemu-img create -q -f qcow2 -o preallocation=$o bad 24M; expect 0 "$fx" --check bad >said
    done
    qemu-img convert -f raw -O vdi disk bad; head -c 65536 disk >>bad; expect 0 "$fx" --check bad >said     # less than a block
    # Two L1 entries that share a table leak what the second one had: on a small disk that is a leak, which --repair frees.
    qemu-img create -q -f qcow2 -o cluster_size=512 bad 128k; qemu-io -c 'write -P 17 0 64k' bad >io.log
    l1=$(od -An -tu8 --endian=big -j40 -N8 bad); dd if=bad of=bad bs=1 skip=$((l1)) seek=$((l1 + 8)) count=8 conv=notrunc status=none
    expect 0 "$fx" --check --repair bad >said; expect 0 "$fx" --check bad >said
}

t_check_of_random_damage_is_qemu_imgs() {
    py '
import subprocess, struct, json
rnd = random.Random(4)
M = 0xfffffffffffe00
def run(*a): return subprocess.run(a, capture_output=True, timeout=60)
for i in range(80):
    o, es = [("cluster_size=4k", 8), ("compat=0.10", 8), ("refcount_bits=4,cluster_size=1k", 8), ("extended_l2=on,cluster_size=16k", 16)][i % 4]
    if i < 4:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "good%d" % i, "4M")
        for j in range(40):
            at = rnd.randrange(60) << 16
            run("qemu-io", "-c", "%s %d 65536" % (rnd.choice(["write", "write", "write -z", "discard"]), at), "good%d" % i) if j % 2 else \
                run("qemu-io", "-c", "write -c %d %d" % (at, 16384 if es == 16 else 4096), "good%d" % i)
            if j == 20: run("qemu-img", "snapshot", "-c", "one", "good%d" % i)
    d = bytearray(open("good%d" % (i % 4), "rb").read())
    be = lambda at: struct.unpack(">Q", d[at:at + 8])[0]
    cs = 1 << struct.unpack(">I", d[20:24])[0]
    l2s = [be(be(40) + 8 * j) & M for j in range(struct.unpack(">I", d[36:40])[0]) if be(be(40) + 8 * j) & M]
    for j in range(rnd.randrange(1, 4)):
        l2 = rnd.choice(l2s)
        at = rnd.choice([l2 + es * rnd.randrange(min(cs // es, 64)), be(be(48)) + 8 * rnd.randrange(cs // 64), be(40) + 8 * rnd.randrange(len(l2s))])
        old = be(at)
        new = rnd.choice([old ^ 1 << rnd.randrange(1, 64), 0, be(rnd.choice(l2s) + es * rnd.randrange(cs // es)), old & ~M | rnd.randrange(1 << 30) & -cs])
        d[at:at + 8] = struct.pack(">Q", new)
    open("img", "wb").write(d)
    a, b = run(sys.argv[1], "--check", "--json", "img"), run("qemu-img", "check", "-f", "qcow2", "--output=json", "img")
    assert b"Sanitizer" not in a.stderr, a.stderr
    ours, status = a.stdout and json.loads(a.stdout), a.returncode
    if ours and "wiped-tables" in ours:         # which qemu-img does not look for
        ours["corruptions"] -= ours.pop("wiped-tables")
        if not ours["corruptions"]: del ours["corruptions"]; status = 3
    assert (status, ours) == (b.returncode, b.stdout and json.loads(b.stdout)), (i, a, b)
' "$build/fuseexp-asan"
}

t_check_says_where_the_damage_is() {
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    local l1 l2 data block
    read -r l1 l2 data block < <(table_of good)
    poke img $((l2 + 24)) "80$(printf '%014x' $((data + 65536)))"           # the fourth is the second
    expect 2 "$fx" --check img >ours
    grep -q "corrupt: host 0x60000, 1 cluster: refcount 1, but used 2 times" err
    grep -q "corrupt: host 0x60000 is used by guest 0x10000$" err
    grep -q "corrupt: host 0x60000 is used by guest 0x30000$" err
    grep -q "leak: host 0x80000, 1 cluster: refcount 1, but used 0 times" err
    grep -q "1 corruptions.*; 1 leaked" ours
    expect 2 "$fx" -q --check img >ours
    same "$(cat err)" ""
    poke img $((l2 + 16)) 8000004000000000
    expect 2 "$fx" --check img >ours
    grep -q "guest 0x20000, its cluster: 0x10000 bytes at host 0x4000000000 reach past the end of the file" err
    # One line for each of many, but not for ever.
    qemu-img create -q -f qcow2 -o cluster_size=512 good 1M; qemu-io -c 'write 0 1M' good >io.log
    py 'd = bytearray(open("good", "rb").read()); l = int(sys.argv[1])
for i in range(0, 64 * 8 * 8, 16): d[l + i] = 0
open("img", "wb").write(d)' "$(table_of good | cut -d" " -f2)"
    expect 2 "$fx" --check img >ours
    [ "$(wc -l <err)" -le 102 ] || fail "$(wc -l <err) lines"
    # Leaks alone; what a killed writer leaves.
    qemu-img create -q -f qcow2 img 4M
    qemu-io -c 'write 0 1M' -c abort img >io.log 2>&1 || true
    as_qemu_check img
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    read -r l1 l2 data block < <(table_of good)
    poke img $((block + 42)) 0001; truncate -s +128k img; as_qemu_check img; expect 3 "$fx" -q --check img >ours
}

t_check_of_a_cut_image_sees_what_is_lost() {
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    cp good img; truncate -s -1000 img
    expect 2 "$fx" --check img >ours
    grep -q "guest 0xf0000, host 0x140000: img ends before the cluster does" err
    same "$("$fx" --map --json img | jq -c 'map(select(.error)) | .[0] | [.start + .length]')" "[1048576]"
    truncate -s -64k img; expect 2 "$fx" --check img >ours
    grep -q "guest 0xf0000, its cluster: 0x10000 bytes at host 0x140000 reach past the end" err
    qemu-img create -q -f qcow2 -o data_file=ext.raw img 1M; qemu-io -c 'write 0 1M' img >io.log
    truncate -s 900k ext.raw; expect 2 "$fx" --check img >ours
    grep -q "ext.raw ends before the cluster does" err
}

t_check_has_nothing_to_do_for_raw_images() {
    random img 10
    expect 63 "$fx" --check --json -q --format raw img >ours
    same "$(wc -c <ours)" 0
    same "$(cat err)" "fuseexp: img: is raw, which has nothing to check"
    expect 63 qemu-img check -f raw img
    qemu-img create -q -f qcow2 good 1M
    poke img 48 0000000000030200; refused 1 'the offset of the refcount table' "$fx" --check img
    poke img 56 00000fff; refused 1 'the size of the refcount table' "$fx" --check img
    expect 1 "$fx" --check --json good >/dev/full; grep -q 'cannot write' err
}

# Formats without a check of their own, here qcow2 as if it had none: what cannot be read, and what is used twice.
t_check_by_map_finds_bad_and_double_ranges() {
    export FUSEEXP_FAIL_OP=check
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' -c 'write -c 2M 64k' good >io.log
    expect 0 "$fault" --check --json good >ours.json
    same "$(jq -c '[."check-errors", ."total-clusters", ."allocated-clusters", ."compressed-clusters"]' ours.json)" '[0,64,17,1]'
    local l1 l2 data block
    read -r l1 l2 data block < <(table_of good)
    poke img $((l2 + 24)) "80$(printf '%014x' $((data + 65536)))" $((l2 + 40)) 8000004000000000
    expect 2 "$fault" --check --json img >ours.json
    same "$(jq .corruptions ours.json)" 2
    grep -q "guest 0x30000, 0x10000 bytes: img at 0x60000 is used for something else, too" err
    grep -q "guest 0x50000, 0x10000 bytes: its cluster lies past the end of the file" err
    qemu-img create -q -f qcow2 -u -b gone -F raw over 4M
    expect 0 "$fault" --check over >ours
}

t_check_of_absurd_tables_ends() {
    # Four million L1 entries point at one L2 table, whose entries all point at one cluster.
    py '
import struct
c, n = 1 << 21, 4 << 20
f = open("img", "wb")
f.write(struct.pack(">IIQIIQIIQQIIQQQQII", 0x514649fb, 3, 0, 0, 21, 1 << 61, 0, n, c, 17 * c, 1, 0, 0, 0, 0, 0, 4, 104))
f.seek(c); f.write(struct.pack(">Q", 1 << 63 | 18 * c) * n)
f.seek(17 * c); f.write(struct.pack(">Q", 19 * c))
f.seek(18 * c); f.write(struct.pack(">Q", 1 << 63 | 20 * c) * (c // 8))
f.truncate(21 * c)'
    expect 2 timeout 60 "$fx" --check --json img >ours.json
    truncate -s 8000G img
    expect 2 timeout 60 "$fx" -q --check --json img >ours.json
    qemu-img create -q -f qcow2 -o cluster_size=512 small 1M; truncate -s 2T small
    refused 1 'too large to be checked' "$fx" --check small
}

t_check_shows_progress_on_a_terminal_and_wipes_it() {
    qemu-img create -q -f qcow2 -o cluster_size=512,preallocation=metadata img 64M
    py '
import pty, subprocess
for args, want in (([], True), (["-q"], False)):
    m, s = pty.openpty()
    p = subprocess.Popen([sys.argv[1], "--check", "img"] + args, stdout=subprocess.DEVNULL, stderr=s)
    os.close(s)
    got = b""
    try:
        while True: got += os.read(m, 65536)
    except OSError: pass
    assert p.wait() == 0
    assert (b"% " in got) == want, got
    assert not want or got.endswith(b"\r      \r"), got[-50:]
' "$fx"
}

t_looking_is_done_in_the_sandbox() {
    qemu-img create -q -f qcow2 img 64M
    strace -f -o log "$fx" --check --sandbox=require img >/dev/null
    grep -q 'seccomp\|SECCOMP' log
    not grep -q 'O_RDWR.*img\|img.*O_RDWR' log
    "$fx" --info -- img | grep -q '^format: *qcow2$'
    for n in $(seq 30); do
        FUSEEXP_FAIL_AT=$n "$fault" -q --info --sandbox=off --json img >ours.json 2>err || { same "$?" 1; [ -s err ] && [ ! -s ours.json ] || fail "step $n"; continue; }
        jq -e . ours.json >/dev/null; grep -q FAULT err || break
    done
}

t_corpus_info_map_and_check_are_valid() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0 i status
    while IFS=$'\t' read -r path format _; do
        case $format in qcow2 | raw) ;; *) continue ;; esac
        [ -f "c/$path" ] || continue
        for i in info map check; do
            status=0
            "$build/fuseexp-asan" -q --$i --json --no-parts --format "$format" "c/$path" >ours.json 2>err || status=$?
            not grep -q Sanitizer err
            [ "$i$format" = checkraw ] && same "$status" 63 && continue
            same "$status" 0
            jq -e . ours.json >/dev/null
            [ $i = check ] && { as_qemu_check "c/$path"; continue; }
            qemu-img $i -f "$format" --output=json "c/$path" >theirs.json
            [ $(($(stat -c %s "c/$path") % 512)) != 0 ] || same_json ours.json theirs.json
        done
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 20 ] || fail "only $n"
}

# ---- lost headers: --rebuild -----------------------------------------------------------------------------------

# rebuilt FILE [OPTION...]: is refused as it is, even without its extension, and the disk with --rebuild
rebuilt() {
    local f=$1
    shift
    cp --sparse=always "$f" nameless
    refused 1 'its header is lost; --rebuild' "$fx" nameless m
    expect 0 "$fx" --rebuild "$@" nameless m
    grep -q 'put together' err
    cmp m truth
    "$fx" --umount m
}
t_vdi_rebuild_finds_map_block_size_and_data() {
    local o
    lost_disk
    for o in static=off static=on; do
        rm -f img.vdi
        qemu-img convert -f raw -O vdi -o $o truth img.vdi
        wipe img.vdi
        rebuilt img.vdi
        noise img.vdi
        rebuilt img.vdi
    done
    lost_disk 200M            # a map of two sectors
    qemu-img convert -f raw -O vdi truth img.vdi
    wipe img.vdi
    rebuilt img.vdi
    truncate -s -700000 img.vdi     # and cut off: 1 MiB is assumed, what is cut off are errors
    expect 0 "$fx" --rebuild img.vdi m
    grep -q '200 blocks of 1048576 bytes, map at 512, data at 1536;' err
    py '
a, b, n = os.open("m", os.O_RDONLY), open("truth", "rb"), 0
for at in range(0, 200 << 20, 65536):
    try: assert (c := os.pread(a, 65536, at)) == os.pread(b.fileno(), len(c), at), hex(at)
    except OSError: n += 1
assert 10 <= n <= 12, n'
    "$fx" --umount m
}
t_vdi_rebuild_finds_other_layouts() {
    lost_disk
    py "$vdi_py"'
raw = open("truth", "rb").read()
for name, bs, at in ("mib", 1 << 20, 1 << 20), ("small", 65536, 4096), ("large", 4 << 20, 512):
    blocks = [raw[i:i + bs] for i in range(0, len(raw), bs)]
    vdi("x", 1, len(raw), bs, [b if any(b) else None for b in blocks])
    f = open("x", "rb").read()
    m, d = struct.unpack_from("<II", f, 0x154)
    n, unit = len(blocks) * 4, 1 << 20 if name == "mib" else 512
    open(name, "wb").write((bytes(at) + f[m:m + n]).ljust(-(-(at + n) // unit) * unit, b"\0") + f[d:])
'
    for f in mib small large; do rebuilt $f; done
}
t_vdi_rebuild_needs_a_map() {
    lost_disk
    qemu-img convert -f raw -O vdi truth img.vdi
    wipe img.vdi 0 2
    refused 1 'no block map is left' "$fx" --rebuild --format vdi img.vdi m
    qemu-img convert -f raw -O vdi truth img.vdi
    wipe img.vdi
    py 'f = open("img.vdi", "r+b"); f.seek(512 + 8); f.write(b"\1\0\0\0")'       # block 1 twice
    refused 1 'no block map is left' "$fx" --rebuild --format vdi img.vdi m
}
t_qed_rebuild_finds_cluster_and_table_size() {
    local o
    lost_disk
    for o in cluster_size=65536 cluster_size=4096 cluster_size=4096,table_size=16 table_size=2 cluster_size=32k,table_size=8; do
        rm -f img.qed
        qemu-img convert -f raw -O qed -o $o truth img.qed
        wipe img.qed
        rebuilt img.qed
        noise img.qed 0 8
        rebuilt img.qed
    done
    wipe img.qed 0 8192
    refused 1 'no L1 table is left' "$fx" --rebuild --format qed img.qed m
}
t_qed_rebuild_takes_a_backing_file() {
    lost_disk
    cp truth base
    qemu-img create -q -f qed -b base -F raw img.qed
    qemu-io -c 'write -P 7 3M 200k' img.qed >/dev/null
    qemu-img convert -O raw img.qed truth
    wipe img.qed
    expect 0 "$fx" --rebuild --no-backing img.qed m
    grep -q 'if it had a parent, what is there reads as zeros' err
    "$fx" --umount m
    rebuilt img.qed --backing base --backing-format raw
}

t_vhd_rebuild_finds_block_size_and_table() {
    local how
    lost_disk 40M
    for how in 'wipe img.vhd 1 2' 'noise img.vhd 1 2' 'noise img.vhd 0 3' 'wipe img.vhd 1' 'wipe img.vhd 0 3'; do
        qemu-img convert -f raw -O vpc -o force_size=on truth img.vhd
        $how
        expect 0 "$fx" --rebuild img.vhd m
        grep -q 'dynamic header put together: 20 blocks of 2097152 bytes, block table at 1536' err
        cmp m truth
        "$fx" --umount m
    done
    wipe img.vhd 0 4
    refused 1 'no block table of a disk of 41943040 bytes is left' "$fx" --rebuild img.vhd m
}

# ---- VHD ---------------------------------------------------------------------------------------------------------------

vpc='json:{"driver":"vpc","file.filename":"img"}'      # a fixed disk is not probed by qemu

t_vhd_variants_read_back() {
    local n=0 o size
    for o in subformat=dynamic subformat=fixed subformat=dynamic,force_size=on subformat=fixed,force_size=on; do
        for size in 512 12345k 5M; do
            n=$((n + 1))
            rm -f img
            qemu-img create -q -f vpc -o $o img $size
            scribble "$vpc" $n
            qemu-img convert -f vpc -O raw img truth
            check_same img
        done
    done
}

# Data and holes of IMAGE against the sparse ./truth, where reading all would take too long.
check_sparse() {
    "$fx" -q "$@" m
    py '
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
size = os.fstat(a).st_size
assert os.fstat(b).st_size == size
for one, other in (a, b), (b, a):
    off = 0
    while off < size:
        try: off = os.lseek(one, off, os.SEEK_DATA)
        except OSError: break
        end = os.lseek(one, off, os.SEEK_HOLE)
        for at in range(off, end, 1 << 20): assert os.pread(one, min(1 << 20, end - at), at) == os.pread(other, min(1 << 20, end - at), at), at
        off = end
for at in 0, size // 2, size - 4096: assert os.pread(a, 4096, at) == os.pread(b, 4096, at)
'
    "$fx" --umount m
}

t_vhd_of_two_tebibytes_reads_back() {
    local size
    for size in 127G 2040G; do
        qemu-img create -q -f vpc -o force_size=on img $size
        qemu-io -c "write -P 1 0 3M" -c "write -P 2 100G 512" -c "write -P 3 $((${size%G} - 1))G 1M" -c "write -P 4 $((${size%G} * 1024 - 1))M 1M" img >/dev/null
        qemu-img convert -f vpc -O raw img truth
        check_sparse img
    done
}

t_vhd_fixed_wins_over_raw_and_over_what_its_guest_wrote() {
    qemu-img create -q -f vpc -o subformat=fixed,force_size=on img 4M
    random truth 1024; dd if=truth of=img conv=notrunc status=none
    "$fx" img m 2>err; same "$(cat err)" ""; cmp m truth; "$fx" --umount m
    random base 16; qemu-img create -q -f qcow2 -b base -F raw evil 64k; qemu-img create -q -f vpc evil.vhd 64k
    for i in evil evil.vhd; do
        dd if=$i of=img conv=notrunc status=none; head -c 4M img >truth
        check_same img
    done
    "$fx" img m 2>err; grep -q 'the first counts, since the size is right' err; "$fx" --umount m
    # A dynamic disk that lost its footer; at its end lies what the guest wrote: the footer of a fixed disk.
    head -c 2M /dev/zero | tr '\0' x >blk
    qemu-img create -q -f vpc -o subformat=fixed,force_size=on fixed 1M; tail -c 512 fixed | dd of=blk bs=512 seek=4095 conv=notrunc status=none
    qemu-img convert -q -f raw -O vpc -o force_size=on blk img
    truncate -s $(($(stat -c %s img) - 512)) img
    cp blk truth; check_same img
    "$fx" img m 2>err; grep -q 'the latter counts' err; "$fx" --umount m
}

t_vhd_size_is_counted_as_its_creator_does() {
    # 120 cylinders, 4 heads, 17 sectors: 4177920 bytes; the footer says 4 MiB
    vhd_py '
for name, creator, chs in ("vpc", b"vpc ", (120, 4, 17)), ("vs", b"vs  ", (120, 4, 17)), ("qemu", b"qemu", (120, 4, 17)), \
        ("qem2", b"qem2", (120, 4, 17)), ("win", b"win ", (120, 4, 17)), ("d2v", b"d2v\0", (120, 4, 17)), ("vbox", b"vbox", (120, 4, 17)), \
        ("none", b"vpc ", (0, 0, 0)), ("max", b"vpc ", (65535, 16, 255)), ("large", b"vpc ", (500, 4, 17)):
    open(name, "wb").write(os.urandom(4 << 20) + footer(2, 4 << 20, chs, creator))
    build(name + "-dyn", 3, 4 << 20, 2 << 20, [None, None], b"", chs=chs, creator=creator)
'
    local i
    for i in vpc vs qemu; do
        "$fx" $i m 2>err; same "$(stat -c %s m)" 4177920; grep -q '4177920 bytes and not 4194304' err; cmp -n 4177920 m $i; "$fx" --umount m
        "$fx" -q $i-dyn m; same "$(stat -c %s m)" 4177920; "$fx" --umount m
    done
    for i in qem2 win d2v vbox none max large; do
        "$fx" $i m 2>err; same "$(stat -c %s m)" 4194304; same "$(cat err)" ""; cmp -n 4194304 m $i; "$fx" --umount m
        "$fx" -q $i-dyn m; same "$(stat -c %s m)" 4194304; "$fx" --umount m
    done
    for i in vpc qemu qem2 win; do      # and so does qemu
        "$fx" -q $i-dyn m; same "$(stat -c %s m)" "$(qemu-img info -f vpc --output=json $i-dyn | jq '."virtual-size"')"; "$fx" --umount m
    done
}

t_vhd_copy_of_the_footer_is_used_where_the_end_is_lost() {
    qemu-img create -q -f vpc good 4M; qemu-io -c 'write -P 1 1M 2M' good >/dev/null; qemu-img convert -f vpc -O raw good truth
    local size; size=$(stat -c %s good)
    poke img $((size - 400)) ff; check_same img
    "$fx" img m 2>err; grep -q 'lost or damaged; its copy' err; "$fx" --umount m
    cp good img; truncate -s $((size - 512)) img; check_same img
    cp good img; truncate -s $((size - 100)) img; check_same img
    cp good img; head -c 5000 /dev/zero >>img; check_same img
    # 511 bytes, as before Virtual PC 2004
    cp good img; truncate -s $((size - 1)) img; poke img 64 00000000; truncate -s $((size - 1)) img; check_same img
    qemu-img create -q -f vpc -o subformat=fixed fixed 4M; cp fixed img; truncate -s $(($(stat -c %s fixed) - 1)) img
    head -c "$(($(stat -c %s fixed) - 512))" fixed >t; mv t truth; check_same img
    # The end is good, the front is not.
    qemu-img convert -f vpc -O raw good truth
    poke img 0 0000; check_same img
    poke img 64 00000000; check_same img
    # Both are bad; or the only one of a fixed disk; or there is none.
    poke img 64 00000000 $((size - 400)) ff; refused 1 'no footer of it has a good checksum' "$fx" -q img m
    poke img 64 00000000 $((size - 512)) 00; refused 1 'no footer of it has a good checksum' "$fx" -q img m
    cp fixed good; poke img $(($(stat -c %s fixed) - 300)) 01; refused 1 'no footer of it has a good checksum.*raw' "$fx" -q img m
    refused 1 'is not a VHD image' "$fx" -q --format vpc truth m
    cp good a.001; cp good a.002; refused 1 'a vpc image is one file' "$fx" -q a.001 a.002 m
}

# vhd_edit OFFSET HEX...: ./good to ./bad with right checksums; offsets f... in both footers, h... in the header, else in the file
vhd_edit() { vhd_py '
d = bytearray(open("good", "rb").read()); n = len(d)
for at, x in zip(sys.argv[1::2], map(bytes.fromhex, sys.argv[2::2])):
    for base in {"f": [0, n - 512], "h": [512]}.get(at[0], [0]):
        o = base + int(at.strip("fh")); d[o:o + len(x)] = x
for base in 0, n - 512: d[base:base + 512] = fix(d[base:base + 512], 64)
d[512:1536] = fix(d[512:1536], 36)
open("bad", "wb").write(d)' "$@"; }

t_vhd_damaged_headers_are_refused() {
    qemu-img create -q -f vpc good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
f12 00020000 unknown version 0x00020000
f60 00000000 kind of disk
f60 00000005 kind of disk
f60 00000006 kind of disk
f16 ffffffffffffffff offset of the dynamic header
f16 0000000000000600 offset of the dynamic header
f16 7fffffffffffff00 offset of the dynamic header
h24 00020000 version of the dynamic header
h32 00200001 block size
h32 00300000 block size
h32 00000000 block size
h32 00000100 block size
h28 0000001f too few table entries
h28 00000000 too few table entries
h28 40000001 more table entries
h28 ffffffff more table entries
h16 ffffffffffffffff offset of the block table
h16 0000000000000601 offset of the block table
h16 00000000fffffe00 offset of the block table
h16 0000000000000000 offset of the block table
h16 0000000000000200 offset of the block table, in the dynamic header
h16 0000000000000400 offset of the block table, in the dynamic header
h32 00000200 too few table entries'
    refuse_each vhd_edit <<<"$rows"
    vhd_edit f28 77696e20 f48 ffffffffffffffff; refused 1 'the size' "$fx" -q bad m
    vhd_edit f28 77696e20 f48 7fffffffffffffff; refused 1 'too few table entries' "$fx" -q bad m
    vhd_edit f28 77696e20 f48 0000000000000000; refused 1 'is empty' "$fx" -q bad m
    # A damaged checksum, or a byte that it covers: what is needed must be confirmed by the footer and the usual place.
    local i
    for i in '545 02' '546 02' '542 01' '536 01'; do poke bad $i; expect 1 "$fx" -q bad m; done
    qemu-img convert -f vpc -O raw good truth; for i in $((512 + 100)) 548 700 1500; do poke bad $i 41; check_same bad; done
    vhd_py 'build("good", 3, 4 << 20, 2 << 20, [None] * 2, bytes(4 << 20))'; poke good.3 540 00000003; mv good.3 good
    poke bad $((512 + 100)) 41; refused 1 'checksum of the dynamic header' "$fx" -q bad m; qemu-img create -q -f vpc good 64M
    vhd_edit f60 00000004 h40 01; refused 1 'parent.*--backing' "$fx" -q bad m
}

t_vhd_damaged_tables_cost_their_range_only() {
    qemu-img create -q -f vpc -o force_size=on good 16M; qemu-io -c 'write -P 255 0 16M' good >/dev/null; qemu-img convert -f vpc -O raw good truth
    local entry
    # The second block: past the end, at the end, in the footer's copy, in the header, in the table
    for entry in fffffffe 00010000 00000000 00000001 00000003; do
        vhd_edit 1540 $entry
        "$fx" -q bad m
        cmp -n $((2 << 20)) m truth; cmp -i $((4 << 20)) m truth
        not dd if=m of=/dev/null bs=4k skip=512 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=1023 count=1 2>err
        "$fx" --umount m
    done
    # The last block reaches into the footer: what is there reads. (Its bitmap is all set there too: 255.)
    local last; last=$(od -An -tu4 --endian=big -j$((1536 + 28)) -N4 good | tr -d ' ')
    vhd_edit 1564 "$(printf %08x $((last + 2)))"
    "$fx" -q --direct-io bad m; cmp -n $((14 << 20)) m truth; dd if=m of=/dev/null bs=512 skip=32765 count=1 status=none
    not dd if=m of=/dev/null bs=512 skip=32766 count=1 2>err; "$fx" --umount m
    # Truncated, dynamic and fixed: what is there reads, the rest is no zeros.
    cp good bad; truncate -s 9M bad
    "$fx" -q bad m 2>/dev/null; cmp -n $((8 << 20)) m truth; not cp m copy 2>err; grep -q 'Input/output' err; "$fx" --umount m
    vhd_py 'open("bad", "wb").write(bytes(1 << 20) + footer(2, 2 << 20))'
    "$fx" -q bad m; same "$(stat -c %s m)" $((2 << 20)); cmp -n $((1 << 20)) m /dev/zero; not tail -c 1 m 2>err; "$fx" --umount m
}

t_vhd_bitmaps_and_parents_by_the_specification() {
    vhd_py '
rnd = random.Random(4); p, b, c = bytes([1] * 16), bytes([2] * 16), bytes([3] * 16)
for block in 512, 2048, 32768, 65536, 2 << 20:
    size = block * 5 + (512 if block < 1 << 20 else 512 * 77)
    n = -(-size // block); per = block // 512
    def some(): return [[rnd.randrange(2) for j in range(per)], None, [1] * per, [0] * per, [1] * 5 + [0] * (per - 5) if per > 5 else [1] * per, [j // 40 % 2 for j in range(per)]]
    disk = bytes(size); name = "p%d" % block
    for level, (kind, ident, parent) in enumerate([(3, p, bytes(16)), (4, b, p), (4, c, b)]):
        data = os.urandom(size); bits = some(); rnd.shuffle(bits); own = bytearray(disk)
        for s in range(size // 512):
            m = bits[s // per]
            if m and m[s % per]: own[s * 512:s * 512 + 512] = data[s * 512:s * 512 + 512]
        disk = bytes(own); path = "%d-%s.vhd" % (block, "pbc"[level])
        above = "%d-%s.vhd" % (block, "pbc"[level - 1])
        build(path, kind, size, block, bits, data, ident, parent, name=".\\" + above if level == 1 else "nothing.vhd" if level else "",
              locators=[(b"W2ku", "C:\\some where\\" + above), (b"W2ru", "..\\x\\" + above)] if level == 2 else [])
        open(path + ".truth", "wb").write(disk)
'
    local i
    for i in *.vhd; do
        cp "$i.truth" truth
        check_same "$i"
    done
}

# One damaged character in the name of a directory: the file's name still tells which of two copies is meant.
t_vhd_parent_name_with_half_a_surrogate_pair_leads_to_it() {
    vhd_py '
p, c = bytes([1] * 16), bytes([2] * 16); size = 1 << 20; disk = os.urandom(size); open("truth", "wb").write(disk)
for name in "par.vhd", "par2.vhd": open(name, "wb").write(disk + footer(2, size, ident=p))
for i, name in enumerate(("C:\\D\ud800ir\\par.vhd", "C:\\D\udc00\ud800\\par.vhd")): build("child%d" % i, 4, size, 65536, [None] * 16, disk, c, p, name=name)'
    local i
    for i in child0 child1; do
        "$fx" -q --format vpc $i m; cmp m truth; "$fx" --umount m
        "$fx" --info $i | grep -q 'backing filename: .*par.vhd'
    done
}

t_vhd_parents_are_found_by_name_and_known_by_identity() {
    mkdir sub
    vhd_py '
p, c = bytes([1] * 16), bytes([2] * 16); size = 1 << 20; disk = os.urandom(size); open("truth", "wb").write(disk)
ext = "\u00c4\u65e5\U0001f4be parent.vhd"
open(ext, "wb").write(disk + footer(2, size, ident=p))
open("other", "wb").write(disk + footer(2, size, ident=c))
def child(path, **more): build(path, 4, size, size, [None], b"", c, more.pop("parent", p), **more)
child("header", name="D:\\a\\" + ext); child("relative", locators=[(b"W2ru", "..\\..\\" + ext)]); child("absolute", locators=[(b"W2ku", "E:\\" + ext)])
child("slashes", name="/a/b/" + ext); child("terminated", locators=[(b"W2ru", ext + "\0\0rest")])
child("half", locators=[(b"W2ru", "x\ud800y".encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))])
child("unnamed"); child("dots", name="a\\.."); child("directory", name="a\\sub"); child("directoryish", name="x\\"); child("mismatch", name="other")
child("itself", name="itself", parent=c); child("long", locators=[(b"W2ru", "x" * 3000)]); child("wide", locators=[(b"W2ku", "\u65e5" * 600)])
'
    local i
    for i in header relative absolute slashes terminated unnamed dots directoryish long wide directory mismatch; do check_same $i; done
    mkdir alone; mv itself alone; refused 1 'is its own backing file' "$fx" -q alone/itself m
    mv ./*parent.vhd sub/parent
    for i in unnamed dots directoryish; do
        refused 1 'does not name its parent, and no file beside it has the identity 01010101-.*; --backing' "$fx" -q $i m
    done
    expect 1 "$fx" -q directory m; grep -q "cannot open its backing file 'sub'" err
    refused 1 'other: is not the parent of mismatch.*02020202.* instead of 01010101.*--force-parent' "$fx" -q mismatch m
    check_same mismatch --force-parent
    expect 1 "$fx" -q header m; grep -q 'cannot open its backing file.*No such file.*--backing' err
    check_same header --backing sub/parent; check_same unnamed --backing sub/parent
    refused 1 'is not the parent' "$fx" -q --backing other header m
    "$fx" -q --no-backing unnamed m; not head -c 1 m 2>err; "$fx" --umount m
    cp truth raw; refused 1 'is not a VHD image' "$fx" -q --backing raw header m
}

t_vhd_random_damage_is_survived() {
    qemu-img create -q -f vpc -o force_size=on img 1M; scribble img 5; qemu-img convert -f vpc -O raw img truth
    fuzz vpc 4000 img truth 0 1536 1000000                                  # footer copy and header: anything but a crash
    fuzz vpc 2000 img truth 1536 1540 1000000
    fuzz vpc 4000 img truth 2048 2560 1                                     # one byte of a bitmap: eight sectors
    qemu-img create -q -f vpc d 6M; scribble d 5; scribble d 6
    vhd_py '
import subprocess
rnd = random.Random(12); size = 40 * 512
build("c", 4, size, 2048, [[rnd.randrange(2) for j in range(4)] if rnd.random() < .7 else None for i in range(10)], os.urandom(size), name="p", parent=bytes(16), locators=[(b"W2ru", "a\\p"), (b"W2ku", "p")])
open("p", "wb").write(os.urandom(size) + footer(2, size))
def patch(d):                                                # so that damage gets past the checksums
    n = len(d)
    for base in 0, n - 512: d[base:base + 512] = fix(d[base:base + 512], 64)
    d[512:1536] = fix(d[512:1536], 36)
for name, tables in ("d", 4096), ("c", 6000), ("p", 0):
    good = open(name, "rb").read()
    for i in range(60 if tables else 15):
        bad = bytearray(good)
        for j in range(rnd.randrange(1, 4)):
            where = rnd.choice([rnd.randrange(90), 512 + rnd.randrange(64), 512 + 576 + rnd.randrange(48), 1536 + rnd.randrange(64), rnd.randrange(tables)]) if tables else len(bad) - 512 + rnd.randrange(90)
            if where < 90 and tables and rnd.random() < .7: bad[len(bad) - 512 + where] = bad[where] = rnd.randrange(256)
            else: bad[where] = rnd.choice([0, 1, 255, rnd.randrange(256)])
        if tables and rnd.random() < .8: patch(bad)
        open("bad", "wb").write(bad)
        p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--force-parent", "--format", "vpc", "bad", "m", "--", "dd", "if=m", "of=/dev/null",
                            "bs=64k", "count=100", "conv=noerror"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert p.returncode in (0, 1, 125) and b"Sanitizer" not in p.stderr and b"killed" not in p.stderr, (i, p.returncode, p.stderr)
' "$build/fuseexp-asan"
}

# Every image of FORMAT in the corpus, against its checksum: of the whole, or of the 64 KiB blocks that are not zero.
check_corpus() {    # FORMAT AT_LEAST
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0 wanted=$2
    while IFS=$'\t' read -r path format _ size sum _ expected _ digest; do
        [ "$format" = "$1" ] || continue
        if [ "$expected" != ok ]; then expect 1 "$fx" -q "c/$path" m; continue; fi
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        if [ "$size" -lt 1000000000 ]; then same "$(sha256sum <m | cut -d' ' -f1)" "$sum"; else
            same "$(py '
import hashlib
h = hashlib.sha256(); f = os.open("m", os.O_RDONLY); size = os.fstat(f).st_size; off = 0
while off < size:
    try: off = os.lseek(f, off, os.SEEK_DATA) // 65536 * 65536
    except OSError: break
    block = os.pread(f, 65536, off)
    if block.strip(b"\0"): h.update(off.to_bytes(8, "little") + len(block).to_bytes(4, "little") + block)
    off += 65536
h.update(size.to_bytes(8, "little")); print(h.hexdigest())')" "$digest"
        fi
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge "$wanted" ] || fail "only $n"
}
t_corpus_vhd_images_are_right() { check_corpus vpc 10; }

# ---- VHDX --------------------------------------------------------------------------------------------------------------

t_vhdx_variants_read_back() {
    local n=0 o
    for o in subformat=dynamic,block_size=1M subformat=dynamic,block_size=2M,log_size=32M block_size=32M subformat=dynamic,block_size=256M \
        subformat=fixed,block_size=1M subformat=fixed,block_size=8M,log_size=2M block_size=1M,block_state_zero=off; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f vhdx -o $o img 17M
        scribble img $n
        scribble img $((n + 100))
        qemu-img convert -O raw img truth
        check_same img
    done
    qemu-img create -q -f vhdx img 512; qemu-io -c 'write -P 3 0 512' img >/dev/null; qemu-img convert -O raw img truth; check_same img
}

t_vhdx_of_terabytes_reads_back() {
    local row size block
    for row in '2T 1M' '2T 32M' '64T 256M'; do
        read -r size block <<<"$row"
        qemu-img create -q -f vhdx -o block_size="$block" img "$size"
        qemu-io -c "write -P 1 0 3M" -c "write -P 2 100G 512" -c "write -P 4 $((${size%T} * 1048576 - 1))M 1M" img >/dev/null
        if [ "$size" = 2T ]; then                 # qemu-img takes minutes to convert this
            rm -f truth; truncate -s "$size" truth
            py 'f = open("truth", "r+b"); f.write(b"\1" * (3 << 20)); f.seek(100 << 30); f.write(b"\2" * 512); f.seek((2 << 40) - (1 << 20)); f.write(b"\4" * (1 << 20))'
            check_sparse img
            continue
        fi
        "$fx" -q img m                          # no file system here holds a file of this size
        same "$(stat -c %s m)" $((64 << 40)); same "$(dd if=m bs=1M skip=$(((64 << 20) - 1)) status=none | tr -d '\4' | wc -c)" 0
        same "$(dd if=m bs=512 skip=$((100 << 21)) count=1 status=none | tr -d '\2' | wc -c)" 0; "$fx" --umount m
    done
}

t_vhdx_states_and_sectors_by_the_specification() {
    vhdx_py '
rnd = random.Random(5)
for sector in 512, 4096:
    for block in 1 << 20, 4 << 20:
        n = 7 if block == MIB else 5; size = n * block - sector * 3; disk = bytes(size); ids = [bytes([i] * 16) for i in (1, 2, 3)]
        for level in range(3):
            data = os.urandom(size); per = block // sector
            some = [[rnd.randrange(2) for j in range(per)], 0, 6, [j // 50 % 2 for j in range(per)], 5, 3, 1] if level else [6, 0, 5, 6, 3, 1, 6]
            some = some[:n]; rnd.shuffle(some); own = bytearray(disk)
            for i, state in enumerate(some):
                where = slice(i * block, min((i + 1) * block, size))
                if isinstance(state, list):
                    for j, bit in enumerate(state):
                        a = i * block + j * sector
                        if bit and a < size: own[a:a + sector] = data[a:a + sector]
                elif state == 6: own[where] = data[where]
                elif state or not level: own[where] = bytes(len(own[where]))
            disk = bytes(own); path = "%d-%d-%d.vhdx" % (sector, block, level)
            keys = [("parent_linkage", "{%s}" % uuid.UUID(bytes_le=ids[level - 1])), ("absolute_win32_path", "C:\\x\\nothing"), ("relative_path", "..\\y\\%d-%d-%d.vhdx" % (sector, block, level - 1))]
            build(path, size, block, some, data, sector, keys if level else None, ids[level])
            open(path + ".truth", "wb").write(disk)
'
    local i
    for i in *.vhdx; do
        mv "$i.truth" truth
        check_same "$i"
    done
}

t_vhdx_chunks_have_their_own_sector_bitmaps() {
    # Blocks of 256 MiB and sectors of 512 bytes: 16 blocks to a chunk. Blocks 15 and 16 lie in different ones.
    vhdx_py '
size = 18 << 28; per = 1 << 19; open("p", "wb"); ids = [bytes([1] * 16), bytes([2] * 16)]
build("p", size, 1 << 28, [2] * 14 + [6, 2, 2, 2], b"", ident=ids[0])
bits = [0] * per; bits[3] = 1; other = [0] * per; other[-1] = other[7] = 1
build("img", size, 1 << 28, [0] * 15 + [bits, other, 0], b"", keys=[("parent_linkage", "{%s}" % uuid.UUID(bytes_le=ids[0])), ("relative_path", "p")], ident=ids[1])
f = open("img", "r+b"); t = open("truth", "wb"); t.truncate(size)
f.seek(3 * MIB); bat = struct.unpack("<34Q", f.read(34 * 8)); assert bat[15] & 7 == 7 and bat[17] & 7 == 7 and bat[16] & 7 == bat[33] & 7 == 6
for i, sectors in (15, [3]), (16, [7, per - 1]):
    for s in [0, 3, 4, 6, 7, 8, per - 2, per - 1]:
        x = os.urandom(512); f.seek((bat[i + i // 16] & -MIB) + s * 512); f.write(x)
        if s in sectors: t.seek((i << 28) + s * 512); t.write(x)
g = open("p", "r+b"); g.seek(3 * MIB); where = struct.unpack("<Q", g.read(18 * 8)[14 * 8:15 * 8])[0] & -MIB; x = os.urandom(9000); g.seek(where + 5000); g.write(x); t.seek((14 << 28) + 5000); t.write(x)
g.truncate(where + (1 << 28)); f.truncate((max(bat[15], bat[17]) & -MIB) + (1 << 28))
'
    check_sparse img
}

# A log that is still to be replayed: the block table on disk is stale. ./clean is what replaying it gives; LAYOUT is python
# that makes `ring`, the 1 MiB of the log, from bat (offset of the table), page (its right contents), n (length of the file).
vhdx_dirty() { vhdx_py '
size = 5 * MIB; data = os.urandom(size); bat = build("clean", size, MIB, [6, 0, 6, 2, 6], data); d = bytearray(open("clean", "rb").read()); n = len(d)
truth = bytearray(size); disk = lambda i: slice(i * MIB, (i + 1) * MIB)
for i in 0, 2, 4: truth[disk(i)] = data[disk(i)]
page = bytes(d[bat:bat + 4096]); stale = bytearray(page); stale[16:24] = bytes(8); stale[32:40] = pack("<Q", 2); older = bytearray(page); older[0:8] = bytes(8)
d[bat:bat + 4096] = stale; ring = bytearray(MIB)
for i in (0, 1): d[65536 * (i + 1):65536 * (i + 1) + 4096] = head(8 + i, bytes([7] * 16), LOG)
def lay(at, *entries):                   # one behind the other, round the end; answers where the next would begin
    for e in entries:
        for i in range(0, len(e), 4096): ring[(at + i) % MIB:(at + i) % MIB + 4096] = e[i:i + 4096]
        at = (at + len(e)) % MIB
    return at
'"$1"'
d[MIB:2 * MIB] = ring
open("img", "wb").write(d); open("truth", "wb").write(truth)' "${@:2}"; }

t_vhdx_log_is_replayed_in_memory_only() {
    local layout
    # one entry; three, where the tail is not the first; round the end of the ring; behind an older sequence, one of another
    # GUID, and one that is not whole; before a torn entry; a gap in the numbers; several pages, zeros, and pages of data
    for layout in 'lay(0, entry(5, 0, n, n, (bat, page)))' \
        'lay(8192, entry(4, 8192, n, n, (bat, bytes(older))), entry(5, 16384, n, n, (bat, bytes(stale))), entry(6, 16384, n, n, (bat, page)))' \
        'lay(MIB - 12288, entry(2**32 - 1, MIB - 12288, n, n, (bat, bytes(stale))), entry(2**32, MIB - 12288, n, n, (bat, page)))' \
        'lay(4096, entry(5, 4096, n, n, (bat, bytes(older))), entry(9, 12288, n, n, (bat, page)), entry(99, 28672, n, n, (bat, bytes(older)), guid=bytes([9] * 16)), entry(50, 4096, n, n, (bat, bytes(older))))' \
        'lay(0, entry(7, 0, n, n, (bat, page)), entry(8, 0, n, n, (bat, bytes(older)), torn=True))' \
        'lay(0, entry(7, 0, n, n, (bat, page)), entry(9, 0, n, n, (bat, bytes(older))))' \
        'lay(0, entry(7, 0, n, n, *[(bat + 4096 * (i + 1), bytes(4096)) for i in range(150)], (bat, page)))' \
        'lay(0, entry(7, 0, n, n), entry(8, 0, n, n, (bat, bytes(older)), (bat + 4096, 8192)), entry(9, 0, n, n, (bat, page)), entry(10, 0, n, n))' \
        'x = os.urandom(4096); y = os.urandom(4096); a = struct.unpack("<Q", page[:8])[0] & -MIB
lay(0, entry(7, 0, n, n, (bat, page), (a + 40960, x), (a + 45056, y), (a + 409600, 65536), (a + MIB - 4096, y)))
truth[40960:49152] = x + y; truth[409600:475136] = bytes(65536); truth[MIB - 4096:MIB] = y'; do
        echo "$layout" >&2; vhdx_dirty "$layout"
        cp img before
        "$fx" --no-passthrough img m 2>err; grep -q 'replayed in memory; the file is not changed' err; cmp m truth
        "$fx" --umount m
        check_same img
        cmp img before
        # and qemu's own replay, on a copy; but it does not look at tails, and not at a second page of descriptors
        case $layout in *'(7,'*'(9, 0, n, n, (bat, bytes(older))))' | *'entry(50,'* | *range\(150\)*) continue ;; esac
        qemu-img check -q -r all -f vhdx before >check.log 2>&1 || { cat check.log; false; }
        qemu-img convert -f vhdx -O raw before there; cmp there truth
    done
}

t_vhdx_log_may_make_the_file_longer() {
    # Block 4 was given out behind the end of the file: zeros, as a file that is made longer has them.
    vhdx_dirty 'new = bytearray(page); new[32:40] = pack("<Q", -(-n // MIB) * MIB | 6); truth[disk(4)] = bytes(MIB)
lay(0, entry(5, 0, n, n + MIB, (bat, bytes(new))))'
    cp img before; check_same img; cmp img before
    # What was there once and is no more is not zeros.
    vhdx_dirty 'lay(0, entry(5, 0, n, n, (bat, page)))'
    truncate -s -1M img
    "$fx" img m 2>err; grep -q 'is shorter than its tables say: 1048576 bytes are missing' err; cmp -n $((4 << 20)) m truth; not tail -c 1 m 2>err; "$fx" --umount m
}

# Six entries of 64 MiB, nearly all of it zeros: a large log is replayed to its end, or refused.
t_vhdx_log_of_hundreds_of_mebibytes_is_replayed_whole() {
    vhdx_dirty '
def times(m, v):
    r = 0
    for i in range(32):
        if v >> i & 1: r ^= m[i]
    return r
byte = [i >> 8 ^ table[i & 255] for i in (1 << k for k in range(32))]    # what a byte of zeros does to each bit of a CRC
def zeros(c, n):
    m = byte
    while n:
        if n & 1: c = times(m, c)
        m = [times(m, x) for x in m]; n >>= 1
    return c
big = 64 * MIB; at = -(-n // MIB) * MIB
for i in (0, 1):
    h = bytearray(head(8 + i, bytes([7] * 16), LOG, 6 * big)); h[72:80] = pack("<Q", at); d[65536 * (i + 1):65536 * (i + 1) + 4096] = seal(bytes(h), 4096)
out = open("large", "wb")
for i in range(6):
    e = bytearray(entry(5 + i, 0, n, n, (bat, page if i == 5 else bytes(older))))
    e[4:12] = bytes(4) + pack("<I", big); e[4:8] = pack("<I", zeros(crc(e) ^ 0xffffffff, big - len(e)) ^ 0xffffffff)
    out.seek(at + i * big); out.write(e)
out.truncate(at + 6 * big); out.seek(0); out.write(d); out.close()'
    "$fx" --no-passthrough large m 2>err; grep -q '6 entries' err; cmp m truth; "$fx" --umount m
}

t_vhdx_log_that_cannot_be_replayed_is_refused() {
    local layout pattern
    while IFS='|' read -r pattern layout; do
        echo "$layout" >&2; vhdx_dirty "$layout"
        refused 1 "$pattern.*--ignore-log" timeout 20 "$fx" -q img m
    done <<'EOF'
no whole sequence|pass
no whole sequence|lay(0, entry(5, 0, n, n, (bat, page), torn=True))
no whole sequence|lay(0, entry(5, 4096, n, n, (bat, page)))
no whole sequence|lay(0, entry(5, 0, n, n, (bat, page), guid=bytes([9] * 16)))
no whole sequence|lay(0, entry(0, 0, n, n, (bat, page)))
no whole sequence|lay(0, entry(5, 0, n, n, (bat + 1, page)))
no whole sequence|lay(0, entry(5, 0, n, n, (bat, 77)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[4100] ^= 1; lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[-1] ^= 1; lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[88] ^= 1; lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[24:28] = b"\xff" * 4; lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[8:12] = pack("<I", 2 * MIB); lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[8:12] = b"\xff" * 4; lay(0, seal(bytes(e), len(e)))
no whole sequence|e = bytearray(entry(5, 0, n, n, (bat, page))); e[8:12] = bytes(4); lay(0, seal(bytes(e), len(e)))
more than is plausible|lay(0, entry(5, 0, n, n, (0, 1 << 61)))
more than is plausible|lay(0, entry(5, 0, n, n, (bat, page), (1 << 40, 65 << 20)))
more than is plausible|lay(0, entry(5, 0, n, 1 << 63, (bat, page)))
too much garbage|e = entry(5, 0, n, n); lay(0, *[e[:8] + pack("<I", MIB) + e[12:]] * 256)
too much garbage|e = entry(5, 0, n, n); lay(0, entry(9, 0, n, n, (bat, page)), *[e[:8] + pack("<I", MIB) + e[12:]] * 250)
unknown version|d[65536:69632] = d[131072:135168] = seal(d[131072:131072 + 64] + b"\1\0" + d[131072 + 66:135168], 4096)
not where it should be|d[65536:69632] = d[131072:135168] = head(9, LOG, LOG, 0)
not where it should be|d[65536:69632] = d[131072:135168] = head(9, LOG, LOG, 0xfff00000)
EOF
    vhdx_dirty 'for i in (2, 4): truth[disk(i)] = bytes(MIB)'       # the stale table
    "$fx" --ignore-log img m 2>err; grep -q 'its log is ignored' err; "$fx" --umount m
    check_same img --ignore-log
}

t_vhdx_parents_are_found_by_name_and_known_by_identity() {
    mkdir sub
    vhdx_py '
p, c = bytes(range(16)), bytes([2] * 16); size = MIB; data = os.urandom(size); open("truth", "wb").write(data)
build("the parent", size, MIB, [6], data, ident=p); build("other", size, MIB, [6], data, ident=c); build("zero", size, MIB, [6], data, ident=bytes(16))
good = ("parent_linkage", "{%s}" % uuid.UUID(bytes_le=p)); bad = ("parent_linkage", "{%s}" % uuid.UUID(bytes_le=bytes([9] * 16)))
def child(name, *keys): build(name, size, MIB, [0], b"", keys=list(keys), ident=c)
child("relative", good, ("relative_path", ".\\x\\the parent"), ("absolute_win32_path", "no"), ("volume_path", "no"))
child("volume", good, ("volume_path", "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\p\\the parent"), ("absolute_win32_path", "no"))
child("absolute", ("absolute_win32_path", "\\\\?\\d:\\the parent"), good)
child("upper", ("parent_linkage", good[1].upper()), ("relative_path", "the parent"))
child("linkage2", bad, ("relative_path", "the parent"), ("parent_linkage2", good[1]))
child("null2", bad, ("relative_path", "zero"), ("parent_linkage2", "{%s}" % uuid.UUID(int=0)))
child("unnamed", good); child("unlinked", ("relative_path", "the parent")); child("garbled", ("relative_path", "the parent"), ("parent_linkage", "{12345678-zzzz}"))
child("mismatch", good, ("relative_path", "other")); child("itself", ("relative_path", "itself"), good)
d = open("relative", "rb").read(); open("foreign", "wb").write(d.replace(G("b04aefb7-d19e-4a81-b789-25b8e9445913"), bytes(16)))
at = d.index(G("b04aefb7-d19e-4a81-b789-25b8e9445913"))
open("outside", "wb").write(d[:at + 20] + b"\xff" * 12 * 4 + d[at + 20 + 48:])
at = d.index(struct.pack("<II", MIB, 2)); open("no flag", "wb").write(d[:at + 4] + bytes(4) + d[at + 8:])      # but a locator
'
    local i
    for i in relative volume absolute upper linkage2 unnamed mismatch itself 'no flag'; do check_same "$i"; done
    for i in unlinked garbled; do refused 1 'does not record its parent.s identity; --force-parent' "$fx" -q $i m; check_same $i --force-parent; done
    refused 1 'zero: is not the parent of null2' "$fx" -q null2 m
    refused 1 'unknown VHDX parent locator {00000000-0000-0000-0000-000000000000}' "$fx" -q foreign m
    refused 1 'does not record its parent' "$fx" -q outside m
    mv 'the parent' sub/moved
    refused 1 'does not name its parent, and no file beside it has the identity 03020100-0504-0706-0809-0a0b0c0d0e0f; --backing' "$fx" -q unnamed m
    check_same unnamed --backing sub/moved
    refused 1 'other: is not the parent of mismatch.*--force-parent' "$fx" -q mismatch m; check_same mismatch --force-parent
    refused 1 'is its own backing file' "$fx" -q itself m
    expect 1 "$fx" -q relative m; grep -q "cannot open its backing file '.*the parent': No such" err
    check_same relative --backing sub/moved
    "$fx" -q --no-backing relative m; not head -c 1 m 2>err; "$fx" --umount m
}

# vhdx_edit WHERE HEX...: ./good to ./bad with right checksums. hN: both headers; rN: both region tables; mN: the metadata
# region; bN: the block table; else in the file. The file is one of build(): metadata at 2 MiB, block table at 3 MiB.
vhdx_edit() { vhdx_py '
d = bytearray(open("good", "rb").read())
for at, x in zip(sys.argv[1::2], map(bytes.fromhex, sys.argv[2::2])):
    for base in {"h": [65536, 131072], "r": [196608, 262144], "m": [2 * MIB], "b": [3 * MIB]}.get(at[0], [0]):
        o = base + int(at.strip("hrmb")); d[o:o + len(x)] = x
        if at[0] == "h": d[base:base + 4096] = seal(bytes(d[base:base + 4096]), 4096)
        if at[0] == "r": d[base:base + 65536] = seal(bytes(d[base:base + 65536]), 65536)
open("bad", "wb").write(d)' "$@"; }

# Rows of "edits for vhdx_edit|what the refusal says", from stdin.
check_vhdx_rows() {
    local edits pattern
    vhdx_py 'data = os.urandom(3 * MIB); build("good", 3 * MIB, MIB, [6, 6, 6], data); open("truth", "wb").write(data)'
    while IFS='|' read -r edits pattern; do
        echo "$edits" >&2
        vhdx_edit $edits
        refused 1 "$pattern" "$fx" -q bad m
    done
}

t_vhdx_damaged_headers_are_refused() {
    # Regions (0 is the metadata, 1 the table), 32 bytes each from 16 on: guid 16, offset 8, length 4, required 4
    check_vhdx_rows <<'EOF'
65600 ff 131136 ff|neither of its headers
200000 01 270000 01|neither of its region tables
h66 0000|unknown version 0
h66 0200|unknown version 2
r8 00080000|the number of regions, at most 2047
r8 ffffffff|the number of regions, at most 2047
r8 01000000|no block table
r8 00000000|no block table
r16 00|unknown VHDX region {8b7ca200-4790-4b9a-b8fe-575f050f886e}
r48 00|unknown VHDX region {2dc27700-f623-4200-9d64-115e9bfd4a08}
r48 0000 r76 00|no block table
r48 06a27c8b90479a4bb8fe575f050f886e|region that is there twice
r32 0100200000000000|the offset of a region, in whole MiB from 1 MiB on
r32 0000000000000000|the offset of a region, in whole MiB from 1 MiB on
r32 0000f0ffffffffff|the offset of a region, in whole MiB from 1 MiB on
r32 0000f0ffffffff7f|the offset of a region, in whole MiB from 1 MiB on
r40 00000000|the length of a region, in whole MiB
r40 00100000|the length of a region, in whole MiB
r32 0000300000000000|regions that overlap
r32 0000100000000000|a region in the log
r64 0000100000000000|a region in the log
r32 0000004000000000|metadata lies past the end
r64 0000004000000000|block table lies past the end
EOF
    vhdx_edit 131072 "$(vhdx_py 'print(head(8, bytes([1] * 16)).hex())')"; refused 1 'two different headers with one sequence number' "$fx" -q bad m
    head -c 250000 good >bad; refused 1 'neither of its region tables' "$fx" -q bad m
    refused 1 'is not a VHDX image' "$fx" -q --format vhdx truth m
    cp good a.001; cp good a.002; refused 1 'a vhdx image is one file' "$fx" -q a.001 a.002 m
}

t_vhdx_damaged_metadata_is_refused() {
    # Entries of 32 bytes from 32 on: guid 16, offset 4, length 4, bits 4. Values from 65536 on: block size 4, flags 4,
    # size 8, id 16, sector size 4, physical 4
    check_vhdx_rows <<'EOF'
m0 00|metadata table
m10 0008|metadata table
m10 0300|lacks the sector size
m10 0000|lacks the file parameters
m160 11|unknown VHDX metadata item {cda34811-445d-4471-9cc9-e9885251c556}
m32 11|unknown VHDX metadata item {caa16711-fa36-4d43-b3b6-33f0aa44e76b}
m56 05|unknown VHDX metadata item {caa16737-fa36-4d43-b3b6-33f0aa44e76b}
m48 00000000|the offset of a metadata item
m48 ffffffff|the offset of a metadata item
m48 00001000|the offset of a metadata item
m52 ffffffff|the offset of a metadata item
m52 04000000|the file parameters
m160 3767a1ca36fa434db3b633f0aa44e76b|the file parameters
m65536 00000000|the block size, a power of two from 1 MiB to 256 MiB
m65536 00000800|the block size, a power of two from 1 MiB to 256 MiB
m65536 00003000|the block size, a power of two from 1 MiB to 256 MiB
m65536 00000020|the block size, a power of two from 1 MiB to 256 MiB
m65536 ffffffff|the block size, a power of two from 1 MiB to 256 MiB
m65568 00000000|the sector size, 512 or 4096 bytes
m65568 00040000|the sector size, 512 or 4096 bytes
m65568 00200000|the sector size, 512 or 4096 bytes
m65544 0102000000000000|the disk.s size, in whole sectors and at most 64 TiB
m65544 00020000000000ff|the disk.s size, in whole sectors and at most 64 TiB
m65544 0002000000400000|the disk.s size, in whole sectors and at most 64 TiB
m65544 0000000000400000|block table is too small
m65540 02000000|the length of the parent locator, 20 bytes to 64 KiB
EOF
}

t_vhdx_one_good_copy_is_enough() {
    vhdx_py 'data = os.urandom(3 * MIB); build("good", 3 * MIB, MIB, [6, 6, 6], data); open("truth", "wb").write(data)'
    poke bad 65600 ff; check_same bad
    poke bad 131136 ff; check_same bad
    poke bad 131072 00 196608 00; check_same bad
    # So it is with what reading does not need: the physical sectors, the disk's id, write and creator fields of a header.
    local i
    for i in 00000000 00200000 01040000 ffffffff; do vhdx_edit m65572 $i; check_same bad; done
    vhdx_edit m112 ffffffff m116 ffffffff m176 ffffffff m180 00000000; check_same bad
    vhdx_edit 131072 "$(vhdx_py 'h = bytearray(head(8, bytes([7] * 16))); h[16:32] = b"w" * 16; print(seal(bytes(h), 4096).hex())')"; check_same bad
    poke bad 200000 01; check_same bad
    poke bad 270000 01; check_same bad
    poke bad 0 00; check_same bad --format vhdx
    # What is unknown but not required is no obstacle.
    vhdx_edit m160 11 m184 02; check_same bad
    vhdx_edit m160 11 m184 03; check_same bad
    vhdx_edit r8 03000000 r80 "$(printf '11%.0s' $(seq 28))00000000"; check_same bad
    vhdx_edit r8 03000000 r80 "$(printf '11%.0s' $(seq 28))01000000"; refused 1 'unknown VHDX region {11111111-1111-1111-1111-111111111111}' "$fx" -q bad m
}

t_vhdx_damaged_tables_cost_their_range_only() {
    vhdx_py 'data = os.urandom(5 * MIB); build("good", 5 * MIB, MIB, [6] * 5, data); open("truth", "wb").write(data)'
    local e
    # The second entry: past the end, far past it, at 0, in the header, the metadata, the table, the log; states 4, 7; reserved
    for e in 0600b00000000000 060000000000f0ff 060000000000f0ff 0600000000000000 0600200000000000 0600300000000000 0600100000000000 \
        0400400000000000 0700500000000000 0e00500000000000; do
        vhdx_edit b8 $e
        "$fx" -q bad m
        cmp -n $((1 << 20)) m truth; cmp -i $((2 << 20)) m truth
        not dd if=m of=/dev/null bs=4k skip=256 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=511 count=1 2>err
        "$fx" --umount m
    done
    cp good bad; truncate -s -1536k bad
    "$fx" -q bad m; cmp -n $((7 << 19)) m truth; not cp m copy 2>err; grep -q 'Input/output' err; "$fx" --umount m
    # A differencing image whose sector bitmap is not there, past the end, in the header
    vhdx_py 'build("p", 2 * MIB, MIB, [6, 6], bytes(2 * MIB), ident=bytes([1] * 16))
build("good", 2 * MIB, MIB, [[1] * 2048, 6], open("truth", "rb").read(), keys=[("parent_linkage", "{%s}" % uuid.UUID(bytes_le=bytes([1] * 16))), ("relative_path", "p")])'
    "$fx" -q good m; cmp -n $((2 << 20)) m truth; "$fx" --umount m
    for e in 0000000000000000 0600000000000000 0600200000000000 0600600100000000 060000000000f0ff 0700400000000000; do
        vhdx_edit b32768 $e
        "$fx" -q bad m; not head -c 1 m 2>err; cmp -i $((1 << 20)) -n $((1 << 20)) m truth; "$fx" --umount m
    done
}

t_vhdx_of_4096_byte_sectors_has_partitions_of_them() {
    vhdx_py '
disk = bytearray(os.urandom(4 * MIB)); disk[:512] = bytes(512); disk[446:462] = bytes(4) + b"\x83" + bytes(3) + pack("<II", 256, 512); disk[510:512] = b"\x55\xaa"
build("img", 4 * MIB, MIB, [6] * 4, bytes(disk), 4096); open("truth", "wb").write(disk)'
    mkdir d; "$fx" -q img d; cmp d/disk truth; same "$(stat -c %s d/p1)" $((2 << 20)); cmp d/p1 <(tail -c +$(((1 << 20) + 1)) truth | head -c 2M); "$fx" --umount d
}

t_vhdx_random_damage_is_survived() {
    local at
    qemu-img create -q -f vhdx -o block_size=1M img 1M; scribble img 5; qemu-img convert -f vhdx -O raw img truth
    for at in 65536 131072 196608 2097152 2162688 3145728; do fuzz vhdx 1700 img truth $at $((at + 256)) 1000000; done
    qemu-img create -q -f vhdx -o block_size=1M d 6M; scribble d 5
    vhdx_dirty 'lay(0, entry(7, 0, n, n, (bat, bytes(older)), (bat + 4096, 8192)), entry(8, 0, n, n, (bat, page)), entry(9, 0, n, n, (bat, page)))
rnd = random.Random(13)
build("p", size, MIB, [6, 2, 6, 0, 3], data, ident=bytes([1] * 16))
build("c", size, MIB, [[rnd.randrange(2) for j in range(2048)], 0, [j // 70 % 2 for j in range(2048)], 6, 2], data, keys=[("parent_linkage", "{%s}" % uuid.UUID(bytes_le=bytes([1] * 16))), ("relative_path", "x\\p")])'
    vhdx_py '
rnd = random.Random(14)
for name in "d", "c", "img":
    good = open(name, "rb").read()
    for i in range(40):
        bad = bytearray(good)
        for j in range(rnd.randrange(1, 4)):
            where = rnd.choice([65536 + rnd.randrange(80), 131072 + rnd.randrange(80), 196608 + rnd.randrange(80), MIB + rnd.randrange(160), MIB + rnd.randrange(24576), 2 * MIB + rnd.randrange(200),
                                2 * MIB + 65536 + rnd.randrange(300), 3 * MIB + rnd.randrange(200), 3 * MIB + rnd.randrange(200), 3 * MIB + 32768 + rnd.randrange(8), 4 * MIB + rnd.randrange(500)])
            bad[where] = rnd.choice([0, 1, 255, rnd.randrange(256)])
        if rnd.random() < .9:                                # so that damage gets past the checksums
            for base, n in (65536, 4096), (131072, 4096), (196608, 65536): bad[base:base + n] = seal(bytes(bad[base:base + n]), n)
            at = MIB
            while bad[at:at + 4] == b"loge":
                n = struct.unpack("<I", bad[at + 8:at + 12])[0]
                if not 0 < n <= 65536: break
                bad[at:at + n] = seal(bytes(bad[at:at + n]), n); at += n
        open("bad", "wb").write(bad)
        p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--force-parent", "--format", "vhdx", "bad", "m", "--", "dd", "if=m", "of=/dev/null",
                            "bs=64k", "count=100", "conv=noerror"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert p.returncode in (0, 1, 125) and b"Sanitizer" not in p.stderr and b"killed" not in p.stderr, (i, p.returncode, p.stderr)
' "$build/fuseexp-asan"
}

t_vhdx_under_load_has_no_races() {
    vhdx_dirty 'lay(0, entry(7, 0, n, n, (bat, page), (4 * MIB + 40960, 4096)))
truth[40960:45056] = bytes(4096)'
    "$build/fuseexp-tsan" -q -f --sandbox=off --cache-size 1M img m 2>log & local pid=$!
    wait_for test -s m
    cmp m truth & local a=$!
    fio --name=r --filename="$PWD/m" --readonly --rw=randread --bsrange=4k-256k --ioengine=libaio --iodepth=8 --direct=1 --numjobs=3 \
        --runtime=2 --time_based --output=fio.log
    wait $a
    umount m
    wait $pid || { cat log; false; }
    not grep -q Sanitizer log
}

t_vhdx_every_failing_step_of_its_start_is_undone() {
    vhdx_dirty 'lay(0, entry(7, 0, n, n, (bat, page), (bat + 4096, bytes(4096))))'
    mkdir d
    undo=true least=27 check_chain "$fault" -s --sandbox=require img d -- true
}

t_corpus_vhdx_images_are_right() { check_corpus vhdx 10; }

# ---- VMDK ------------------------------------------------------------------------------------------------------

# Large sparse files: equal wherever either says that it has data.
same_data() {       # FILE FILE
    py '
fds = [os.open(p, os.O_RDONLY) for p in sys.argv[1:]]
size = os.fstat(fds[0]).st_size
assert os.fstat(fds[1]).st_size == size
for f in fds:
    off = 0
    while True:
        try: off = os.lseek(f, off, os.SEEK_DATA)
        except OSError: break
        end = os.lseek(f, off, os.SEEK_HOLE)
        while off < end:
            n = min(1 << 20, end - off)
            assert os.pread(fds[0], n, off) == os.pread(fds[1], n, off), off
            off += n
' "$1" "$2"
}

vmdk_compare() {    # IMAGE [OPTION...]
    "$fx" -q --no-passthrough "${@:2}" "$1" m
    qemu-img convert -O raw "$1" truth
    same_data m truth
    "$fx" --umount m
    rm truth
}

t_vmdk_subformats_read_back() {
    local size n=0
    for o in monolithicSparse monolithicSparse,zeroed_grain=on monolithicFlat twoGbMaxExtentSparse twoGbMaxExtentFlat; do
        for size in 12345k 33665536 512; do
            n=$((n + 1))
            rm -f img*
            qemu-img create -q -f vmdk -o "subformat=$o" img.vmdk $size
            scribble img.vmdk $n
            qemu-img convert -O raw img.vmdk truth
            check_same img.vmdk
        done
    done
    mv img.vmdk renamed.raw; check_same renamed.raw                         # its extents keep their names
}

t_vmdk_stream_optimized_reads_back() {
    for i in $(seq 300); do head -c $((i * 331)) "$top"/fuseexp.c; done >truth
    dd if=/dev/urandom of=truth bs=64k seek=30 count=3 conv=notrunc status=none
    truncate -s 30M truth; random tail 5; cat tail >>truth
    for size in $(stat -c %s truth) $((31 * 1048576 + 512)) 65536 512; do
        truncate -s "$size" truth
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth img
        check_same img
        check_same img --cache-size 1M
    done
}

t_vmdk_streams_with_footers_read_back() {
    vmdk_py '
n = 0
for version in 1, 2, 3:
    for sectors, grain, entries in ((12800, 128, 512), (4321, 16, 32), (70001, 128, 512), (9000, 4096, 2)):
        for whole in True, False:
            g = grains(version * sectors, min(20, sectors // grain), grain, (sectors + grain - 1) // grain)
            last = (sectors - 1) // grain
            g[last] = random.Random(1).randbytes(512) * grain
            flags = 0x30001
            if version > 1: g[1 if last > 1 else 0] = 0; flags |= 4
            n += 1
            name = "s%d" % n
            d = text(["RW %d SPARSE \"another name.vmdk\"" % sectors])
            save(name, stream(g, sectors, grain, version, d, whole, flags, footer=n % 2, entries=entries))
            save(name + ".raw", disk(g, grain, sectors))
'
    local i
    for i in s? s??; do
        mv "$i.raw" truth
        check_same "$i"
        qemu-img compare -q -F vmdk -f raw truth "$i"
    done
}

t_vmdk_split_sets_read_back() {
    local o
    for o in twoGbMaxExtentSparse twoGbMaxExtentFlat; do
        qemu-img create -q -f vmdk -o subformat=$o $o.vmdk $((5 * 1024 * 1024 + 3))k
        same "$(find . -name "$o-*" | wc -l)" 3
        qemu-io -c 'write -P 1 2147352576 256k' -c 'write -P 2 4294901760 128k' -c 'write -P 3 0 1M' -c 'write -P 4 5368709120 3k' \
            -c 'write -P 5 3G 2M' $o.vmdk >/dev/null
        vmdk_compare $o.vmdk
        "$fx" -q $o.vmdk m
        same "$(stat -c %s m)" $(((5 * 1024 * 1024 + 3) * 1024))
        py '
f = os.open("m", os.O_RDONLY)
assert os.pread(f, 262144, 2147352576) == b"\1" * 262144
assert os.pread(f, 300000, 4294901760) == b"\2" * 131072 + bytes(300000 - 131072)
assert os.pread(f, 8192, 5368709120) == b"\4" * 3072'
        "$fx" --umount m
    done
}

t_vmdk_cowd_and_sesparse_read_back() {
    vmdk_py '
n = 0
for sectors, grain in ((5000, 1), (20001, 1), (100000, 16), (1000, 128)):
    g = grains(sectors, min(60, sectors // grain), grain, sectors // grain)
    for i in range(3): g[i] = bytes([65 + i]) * 512 * grain
    n += 1
    save("c%d-delta.vmdk" % n, cowd(g, sectors, grain))
    save("c%d" % n, text(["RW %d VMFSSPARSE \"c%d-delta.vmdk\"" % (sectors, n)], kind="vmfsSparse"))
    save("c%d.raw" % n, disk(g, grain, sectors))
for sectors in 800, 40008, 70000:
    g = grains(sectors, 70, 8, sectors // 8)
    for i in 10, 11, 12, 40: g[i] = 0
    n += 1
    save("c%d-delta.vmdk" % n, sesparse(g, sectors))
    save("c%d" % n, text(["RW %d SESPARSE \"c%d-delta.vmdk\"" % (sectors, n)], kind="seSparse"))
    save("c%d.raw" % n, disk(g, 8, sectors))
'
    for i in 1 2 3 4 5 6 7; do
        mv c$i.raw truth
        check_same c$i
        qemu-img compare -q -f raw -F vmdk truth c$i
        "$fx" c$i-delta.vmdk m 2>err; cmp m truth; "$fx" --umount m           # without its descriptor, with a note
        grep -q 'no descriptor, taken for the whole' err
    done
}

t_vmdk_chains_are_checked_by_cid() {
    mkdir sub
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse base.vmdk 12M; scribble base.vmdk 1
    qemu-img create -q -f vmdk -b base.vmdk -F vmdk mid.vmdk; scribble mid.vmdk 2
    qemu-img create -q -f vmdk -o zeroed_grain=on -b mid.vmdk -F vmdk top.vmdk; scribble top.vmdk 3
    qemu-img convert -O raw top.vmdk truth; check_same top.vmdk
    qemu-img convert -O raw mid.vmdk truth; check_same mid.vmdk
    mv base* sub; expect 1 "$fx" -q mid.vmdk m; grep -q "cannot open its backing file 'base.vmdk'" err
    check_same mid.vmdk --backing sub/base.vmdk
    # A hint of Windows, and one that leads elsewhere: only the last component counts.
    mv sub/base* .
    for hint in 'C:\Users\me\VMs\base.vmdk' '/vmfs/volumes/a b/base.vmdk' '../../etc/base.vmdk'; do
        py 'd = open("mid.vmdk", "rb").read(); h = sys.argv[1].encode()
i = d.index(b"parentFileNameHint=\"base.vmdk\""); n = d.index(b"\0", i)
e = d[:i] + b"parentFileNameHint=\"" + h + b"\"" + d[i + 30:n]; e += bytes(n - len(e)) if len(e) < n else b""
open("hint.vmdk", "wb").write(e + d[len(e):])' "$hint"
        check_same hint.vmdk
    done
    # An overlay of any format over it.
    qemu-img create -q -f qcow2 -b top.vmdk -F vmdk over.qcow2; scribble over.qcow2 4
    qemu-img convert -O raw over.qcow2 truth; check_same over.qcow2
    # Changed since: QEMU changes the CID at the first write.
    qemu-img convert -O raw mid.vmdk truth
    sed -i 's/^CID=.*/CID=0badcafe/' base.vmdk
    refused 1 'is not the parent of mid.vmdk.*0badcafe instead of' "$fx" -q mid.vmdk m
    check_same mid.vmdk --force-parent
    "$fx" -q --no-backing mid.vmdk m; not cat m >/dev/null 2>err; "$fx" --umount m
    vmdk_py '
save("x-flat", bytes(512))
save("nameless", text(["RW 1 FLAT \"x-flat\" 0"], parent="12345678"))
save("no cid", text(["RW 1 FLAT \"x-flat\" 0"], more="parentFileNameHint=\"base.vmdk\""))
os.mkdir("own"); save("own/x-flat", bytes(512)); save("own/loop", text(["RW 1 FLAT \"x-flat\" 0"], parent="11223344", more="parentFileNameHint=\"loop\""))'
    refused 1 'does not name its parent, and no file beside it has the identity 12345678; --backing' "$fx" -q nameless m
    refused 1 'is not the parent' "$fx" -q 'no cid' m
    refused 1 'is its own backing file' "$fx" -q own/loop m
}

# ddb FILE KEY=VALUE...: sets these values in the disk data base of the descriptor in FILE, or of the file itself
vmdk_ddb() { py '
d = open(sys.argv[1], "rb").read(); i = d.index(b"# Disk DescriptorFile"); n = d.find(b"\0", i); n = len(d) if n < 0 else n
text = d[i:n] + b"".join(b"%s=\"%s\"\n" % tuple(kv.encode().split(b"=")) for kv in sys.argv[2:])
room = 20 * 512 if i else len(text)
open(sys.argv[1], "wb").write(d[:i] + text + (bytes(room - len(text)) + d[i + room:] if i else b""))' "$@"; }

t_vmdk_parents_named_by_virtualbox_uuid_alone_are_found() {
    local b=11111111-2222-3333-4444-555555555555 c=aaaaaaaa-2222-3333-4444-555555555555 m=77777777-2222-3333-4444-555555555555 i
    qemu-img create -q -f vmdk 'My disk.vmdk' 2M; scribble 'My disk.vmdk' 1; qemu-img convert -O raw 'My disk.vmdk' truth
    vmdk_ddb 'My disk.vmdk' ddb.uuid.image=$b ddb.uuid.parent=00000000-0000-0000-0000-000000000000 ddb.uuid.modification=$m
    check_same 'My disk.vmdk'
    qemu-img create -q -f vmdk child.vmdk 2M; qemu-io -f vmdk -c 'write -P 7 64k 64k' child.vmdk >/dev/null; cp child.vmdk mid.vmdk
    vmdk_ddb child.vmdk ddb.uuid.image=$c ddb.uuid.parent=$b ddb.uuid.parentmodification=$m
    py 'f = open("truth", "r+b"); f.seek(65536); f.write(b"\7" * 65536)'
    check_same child.vmdk
    "$fx" child.vmdk m 2>err; "$fx" --umount m; grep -q 'is My disk.vmdk by its identity' err
    # Two levels below, and the files elsewhere.
    qemu-img create -q -f vmdk top.vmdk 2M
    vmdk_ddb top.vmdk ddb.uuid.image=${c%5}6 ddb.uuid.parent=$c
    check_same top.vmdk
    mkdir x y; mv 'My disk.vmdk' x; mv child.vmdk y
    check_same top.vmdk --backing y/child.vmdk --backing 'x/My disk.vmdk'
    check_same top.vmdk --backing 'x/My disk.vmdk' --backing y/child.vmdk
    expect 1 "$fx" -q --backing 'x/My disk.vmdk' top.vmdk m; grep -q "is not the parent of top.vmdk: its identity is $b instead of $c\$" err
    refused 1 "no file beside it has the identity $c; --backing FILE names it" "$fx" -q top.vmdk m
    mv y/child.vmdk .
    check_same top.vmdk --backing 'x/My disk.vmdk'                              # fits an ancestor
    check_same top.vmdk --backing 'x/My disk.vmdk' --force-parent               # and is not put where it would hide one
    refused 1 'is no image of the chain of child.vmdk\|is not the parent of child.vmdk' "$fx" -q --backing 'x/My disk.vmdk' --backing mid.vmdk child.vmdk m
    "$fx" --info child.vmdk >out; grep -q "^backing identity: *$b" out
    "$fx" --check child.vmdk >out; grep -q 'a part of its disk; the rest, not looked at' out
    "$fx" -q --no-backing child.vmdk m; not cat m >/dev/null 2>err; grep -q 'Input/output' err; "$fx" --umount m
    # A copy that was used since is told apart; a true copy is not.
    sed "s/$m/${m%5}6/" 'x/My disk.vmdk' >used.vmdk; expect 1 "$fx" -q --backing used.vmdk child.vmdk m; grep -q 'used.vmdk: was changed after child.vmdk was made' err
    cp 'x/My disk.vmdk' one.vmdk; check_same child.vmdk
    cp one.vmdk two.vmdk; refused 1 "may be '\(one\|two\).vmdk' or '\(one\|two\).vmdk', which have the same identity" "$fx" -q child.vmdk m
    check_same child.vmdk --backing two.vmdk
    ln -f one.vmdk two.vmdk; check_same child.vmdk
    # A UUID that cannot be read says that there is a parent, too. One wrong digit of none does not.
    vmdk_ddb mid.vmdk ddb.uuid.parent=11111111-zzzz; refused 1 'does not record its parent.s identity' "$fx" -q mid.vmdk m
    qemu-img create -q -f vmdk whole.vmdk 1M; vmdk_ddb whole.vmdk ddb.uuid.parent=00000000-0000-0x00-0000-000000000000
    head -c 1M /dev/zero >truth; check_same whole.vmdk
}

t_vmdk_parents_are_not_known_by_the_cid_of_new_disks() {
    local hint
    qemu-img create -q -f vmdk -o subformat=monolithicFlat base.vmdk 1M; scribble base.vmdk 1; cp base-flat.vmdk truth
    sed -i 's/^CID=.*/CID=fffffffe/' base.vmdk
    for hint in '' 'parentFileNameHint="gone.vmdk"'; do
        qemu-img create -q -f vmdk child.vmdk 1M
        py 'd = open("child.vmdk", "rb").read(); h = sys.argv[1].encode()
open("child.vmdk", "wb").write(d[:512] + (d[512:10752].rstrip(b"\0").replace(b"parentCID=ffffffff", b"parentCID=fffffffe\n" + h)).ljust(10240, b"\0") + d[10752:])' "$hint"
        refused 1 'many disks have the identity fffffffe; --backing FILE names it' "$fx" -q child.vmdk m
        check_same child.vmdk --backing base.vmdk
        "$fx" --backing base.vmdk child.vmdk m 2>err; "$fx" --umount m; not grep CID err
    done
    mv base.vmdk gone.vmdk; check_same child.vmdk
    # Nor by one that is not there.
    sed -i '/^CID=/d' gone.vmdk; sed -i 's/^parentCID=.*/parentCID=00000000/' child.vmdk
    refused 1 'its identity is none instead of 00000000' "$fx" -q child.vmdk m
}

t_vmdk_cowd_header_names_a_parent() {
    vmdk_py '
g = grains(1, 5, 1, 500)
d = cowd(g, 512); save("whole", d); save("truth", disk(g, 1, 512))
save("child", d[:32] + b"base.vmdk".ljust(1024, b"\0") + d[1056:])'
    check_same whole
    refused 1 'does not record its parent.s identity; --force-parent' "$fx" -q child m
    qemu-img create -q -f vmdk base.vmdk 256k; check_same child --force-parent
    "$fx" -q --no-backing child m; not cat m >/dev/null 2>err; "$fx" --umount m
}

t_vmdk_names_in_other_encodings_and_letter_cases_are_found() {
    export LC_ALL=C.UTF-8
    mkdir a b
    py '
d = os.urandom(1 << 16)
open("truth", "wb").write(d)
def text(n, enc, more=""): return "# Disk DescriptorFile\nversion=1\nencoding=\"%s\"\nCID=11223344\n%s\nRW 128 FLAT \"%s-f001.vmdk\" 0\n" % (enc, more or "parentCID=ffffffff", n)
for enc, n in (("windows-1251", "Диск"), ("Windows-1252", "Système é"), ("GBK", "测试"), ("Shift_JIS", "表示"), ("Big5", "測試"), ("windows-949-2000", "시험"), ("MS932", "仮想"), ("UTF-8", "ÄÖ"), ("unknown-7", "plain")):
    open("a/%s-f001.vmdk" % n, "wb").write(d)
    open("a/%s.vmdk" % n, "wb").write(text(n, enc).encode({"windows-949-2000": "cp949", "MS932": "cp932", "unknown-7": "ascii"}.get(enc, enc)))
    if enc != "Shift_JIS": continue
    open("a/child", "wb").write(text("no", enc, "parentCID=11223344\nparentFileNameHint=\"C:\\vm\\%s.vmdk\"" % n).replace("FLAT \"no-f001.vmdk\" 0", "SPARSE \"grains\"").encode(enc))
raw = "Système".encode("cp1252")                # copied byte by byte
open(b"a/" + raw + b"-f001.vmdk", "wb").write(d)
open("a/raw", "wb").write(text("Système", "windows-1252").encode("cp1252"))
open("b/disk-F001.vmdk", "wb").write(d); open("b/écran-f001.vmdk", "wb").write(d)
open("b/case", "wb").write(text("DISK", "UTF-8").encode()); open("b/accent", "wb").write(text("ÉCRAN", "UTF-8").encode())
open("b/two", "wb").write(text("Base", "UTF-8").encode())
'
    local i
    for i in a/*.vmdk a/raw b/case b/accent; do
        case $i in *-f001.vmdk) ;; *) check_same "$i" ;; esac
    done
    "$fx" b/case m 2>err; "$fx" --umount m; grep -q "'DISK-f001.vmdk', which it names, is called 'disk-F001.vmdk' here" err
    cp truth b/BASE-f001.vmdk; check_same b/two
    cp truth b/base-f001.vmdk; refused 1 "several that differ from it in letter case only: 'b.*', 'B\|: 'B.*', 'b" "$fx" -q b/two m
    cp truth b/Base-f001.vmdk; check_same b/two                                 # the exact one first
    # Directories as well, backing files, and never out of the directory.
    mkdir b/Sub out; cp truth b/Sub/Raw; cp truth out/raw
    qemu-img create -q -f qcow2 -u -b sub/raw -F raw b/over 64k; check_same b/over
    qemu-img create -q -f qcow2 -u -b SUB/../../out/raw -F raw b/out 64k; refused 1 'cannot open its backing file\|leads out' "$fx" -q b/out m
    ln -s ../out b/Link; qemu-img create -q -f qcow2 -u -b link/raw -F raw b/link 64k; refused 1 'cannot open its backing file\|leads out' "$fx" -q b/link m
    # The recorded name of a parent is in the encoding, too.
    qemu-img create -q -f vmdk a/grains 64k; check_same a/child
}

t_vhd_parents_by_every_locator_and_in_chains() {
    mkdir sub far
    vhd_py '
class Bytes(bytes):
    def encode(self, code): return bytes(self)
size = 1 << 20; disk = os.urandom(size); ids = [bytes([i] * 16) for i in range(1, 5)]; open("truth", "wb").write(disk)
open("sub/pär 1.vhd", "wb").write(disk + footer(2, size, ident=ids[0]))
def child(path, kind=4, **more): build(path, kind, size, size, [None], b"", ids[1], more.pop("parent", ids[0]), **more)
child("macx", locators=[(b"MacX", Bytes(b"file://localhost/Users/me/p%C3%A4r%201.vhd"))])
child("mac-relative", locators=[(b"MacX", Bytes(b"file://./sub/p%c3%a4r%201.vhd"))])
child("wi2r", locators=[(b"Wi2r", Bytes(".\\sub\\pär 1.vhd".encode()))]); child("wi2k", locators=[(b"Wi2k", "D:\\sub\\pär 1.vhd")])
child("stale", name="sub/pär 1.vhd", locators=[(b"W2ru", ".\\old.vhd"), (b"W2ku", "C:\\old.vhd"), (b"MacX", Bytes(b"file:///old.vhd"))])
child("type", kind=3, name="sub\\pär 1.vhd")
child("broken", name="sub\\pär 1.vhd", locators=[(b"MacX", Bytes(b"file")), (b"MacX", Bytes(b"%zz")), (b"Wi2r", Bytes(b"")), (b"W2ru", Bytes(b"a"))])
child("raw parent", parent=bytes(16), name="sub/base.raw"); open("sub/base.raw", "wb").write(disk)
build("top", 4, size, size, [None], b"", ids[3], ids[2], name="mid.vhd"); build("far/mid.vhd", 4, size, size, [None], b"", ids[2], ids[0], name="base.vhd")
'
    export LC_ALL=C.UTF-8
    local i
    for i in mac-relative wi2r stale type broken; do check_same $i; done
    "$fx" type m 2>err; "$fx" --umount m; grep -q 'says that it is dynamic, but has a parent.s UUID' err
    for i in macx wi2k; do refused 1 'no file beside it has the identity' "$fx" -q $i m; check_same $i --allow-external sub; done
    cp sub/pär\ 1.vhd .; for i in macx wi2k; do check_same $i; done; rm pär*
    # A raw parent has no UUID: never read as raw unless somebody says so.
    refused 1 "records no identity of its parent 'sub/base.raw', as for a raw one; --backing-format raw" "$fx" -q 'raw parent' m
    check_same 'raw parent' --backing-format raw
    mv sub/base.raw far; check_same 'raw parent' --backing far/base.raw --backing-format raw
    # Chains whose files are in several directories: in any order, all of them needed, none too many.
    check_same top --backing far/mid.vhd --backing sub/pär\ 1.vhd; check_same top --backing sub/pär\ 1.vhd --backing far/mid.vhd
    expect 1 "$fx" -q --backing far/mid.vhd top m; grep -q "far/mid.vhd: cannot open its backing file 'base.vhd'.*--backing" err
    expect 1 "$fx" -q --backing sub/pär\ 1.vhd top m; grep -q 'is not the parent of top: its identity is 01010101-.* instead of 03030303-' err
    not grep -q force-parent err
    expect 1 "$fx" -q --backing far/mid.vhd --backing sub/pär\ 1.vhd --backing wi2r top m; grep -q 'wi2r: is not the parent of top' err
    # An image that records no identity takes what is named, but not what is further down.
    mv far/mid.vhd .; qemu-img create -q -f qcow2 -u -b top -F vpc over 1M
    check_same over --backing sub/pär\ 1.vhd
    refused 2 'more than 64 files' "$fx" $(seq -f '--backing f%g' 65) top m
}

t_parents_beside_thousands_of_files_are_not_searched_for() {
    qemu-img create -q -f vmdk base.vmdk 1M; qemu-img create -q -f vmdk -b base.vmdk -F vmdk child.vmdk; head -c 1M /dev/zero >truth
    seq -f 'f%g' 3000 | xargs touch
    check_same child.vmdk; mv base.vmdk renamed.vmdk; check_same child.vmdk
    mkfifo fifo; check_same child.vmdk
    seq -f 'g%g' 3000 | xargs touch
    refused 1 'more than 4096 files beside it' "$fx" -q child.vmdk m
    check_same child.vmdk --backing renamed.vmdk
}

t_vmdk_descriptors_are_read_as_they_come() {
    vmdk_py '
rnd = random.Random(3)
a, b = rnd.randbytes(100 * 512), rnd.randbytes(64 * 512)
save("a=b.vmdk", a); save("flat", b)
lines = ["RW 10 FLAT \"a=b.vmdk\" 20", "RDONLY  7\tFLAT  \"flat\"  0", "  rw 33 ZERO", "RW 30 FLAT \"a=b.vmdk\" 70",
         "RW 2 VMFS \"flat\"", "RW 5 VMFS \"flat\" 59 partition-id device"]
save("truth", a[20*512:30*512] + b[:7*512] + bytes(33*512) + a[70*512:] + b[:1024] + b[59*512:])
d = text(lines)
save("plain.img", d)
save("dos", d.replace(b"\n", b"\r\n"))
save("bare", b"\n# something\n  version = 1\ncid = 12345678\n" + "\n".join(lines).encode() + b"\nddb.odd line\n")
save("zeros", d + bytes(3000))
save("noaccess", text(["RW 16 FLAT \"a=b.vmdk\" 1", "NOACCESS 16 FLAT \"absent\" 0", "RW 5 VMFS \"flat\" 1"]))
save("first", a[512:17*512]); save("last", b[512:6*512])
save("text", b"version=1\nnot a disk\n" + bytes(600))
save("other", b"# Disk\nx" + bytes(600))
'
    for i in plain.img dos zeros; do check_same $i; done
    (printf '\357\273\277'; cat plain.img) >bom; check_same bom             # as Windows' editor saves it
    iconv -t UTF-16LE plain.img | sed '1s/^/\xff\xfe/' >wide; refused 1 'descriptor in UTF-16' "$fx" -q wide m
    iconv -t UTF-16BE plain.img | sed '1s/^/\xfe\xff/' >wide; refused 1 'descriptor in UTF-16' "$fx" -q wide m
    sed 's/parentCID=ffffffff/parentCID=00000000/' plain.img >zero; not cmp -s zero plain.img; check_same zero
    qemu-img create -q -f vmdk s.vmdk 10M; qemu-io -f vmdk -c 'write -P 9 1M 1M' s.vmdk >/dev/null; qemu-img convert -O raw s.vmdk sparse
    mv truth flat.truth; mv sparse truth
    py 'b = bytearray(open("s.vmdk", "rb").read()); i = b.index(b"SPARSE \"s.vmdk\"") + 15; j = b.index(0, i); b[i + 2:j + 2] = b[i:j]; b[i:i + 2] = b" 0"; open("s.vmdk", "wb").write(b)'
    check_same s.vmdk; mv flat.truth truth
    "$fx" bare m 2>err; grep -q "says nothing known: 'ddb.odd line'" err; cmp m truth; "$fx" --umount m
    sed -i 's/^ddb.odd/#DDB\nddb.odd/' bare; check_same bare
    tr '\n' '\r' <plain.img >mac; check_same mac
    # A damaged byte in what nobody needs; but not where there is a parent.
    sed 's/^CID=1/CID=x/' plain.img >cid; "$fx" cid m 2>err; grep -q 'its CID is damaged' err; cmp m truth; "$fx" --umount m
    local bad
    for bad in fffffxff ffff7fff; do
        sed "s/ffffffff/$bad/" plain.img >cid; check_same cid
        sed 's/^createType/parentFileNameHint="plain.img"\n&/' cid >child; expect 1 "$fx" -q child m; grep -q 'is not the parent' err
    done
    sed 's/ffffffff/fff1fxff/' plain.img >cid; refused 1 "parentCID: 'fff1fxff'" "$fx" -q cid m
    sed 's/ffffffff/11223344/; s/^createType/parentFileNameHint="cid"\n&/' plain.img >child; sed 's/^CID=1/CID=x/' plain.img >cid
    expect 1 "$fx" -q --backing cid child m; check_same child --backing cid --force-parent
    refused 1 "its parent may be '.*' or '.*', which have the same identity 11223344; --backing FILE says which" "$fx" -q child m
    check_same child --force-parent
    mkdir own; cp child cid flat own; cp a=b.vmdk own; refused 1 'cid: is not the parent of own/child.* none instead of 11223344' "$fx" -q own/child m
    "$fx" -q noaccess m
    cmp -n 8192 m first; cmp -n 2560 -i 16384:0 m last
    not dd if=m of=/dev/null bs=512 skip=16 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    for i in text other; do cp $i truth; check_same $i; done                 # raw: not everything is a descriptor
    refused 1 'is not a VMDK image' "$fx" -q --format vmdk other m
}

t_vmdk_malformed_descriptors_are_refused() {
    truncate -s 1M f
    : >rows
    while IFS='|' read -r pattern line; do
        printf '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n%b\n' "$line" >bad
        refused 1 "$pattern" "$fx" -q bad m
    done <<'ROWS'
size of an extent|RW FLAT "f" 0
size of an extent|RW
size of an extent|RW 0 FLAT "f" 0
size of an extent|RW -8 FLAT "f" 0
size of an extent|RW 0x10 FLAT "f" 0
size of an extent|RW 99999999999999999999999 FLAT "f" 0
size of an extent|RW 36028797018963968 FLAT "f" 0
type of an extent|RW 8 FAT "f" 0
type of an extent|RW 8
file of an extent|RW 8 FLAT f 0
file of an extent|RW 8 FLAT "f 0
file of an extent|RW 8 FLAT
file of an extent|RW 8 SPARSE
file of an extent|RW 8 ZERO 0
malformed extent|RW 8 FLAT "f"
malformed extent|RW 8 SPARSE "f" 7
offset of an extent|RW 8 FLAT "f" -1
offset of an extent|RW 8 FLAT "f" 99999999999999999999
neither an extent nor|XW 8 FLAT "f" 0
neither an extent nor|RW8 FLAT "f" 0
neither an extent nor|RX 8 ZERO
neither an extent nor|parentCID 11223344
neither an extent nor|parentFileNameHint-"x"
data are on a device|RW 8 VMFSRDM "f"
without extents|createType="monolithicFlat"
CID: 'xyz'|parentCID=xyz
CID: '123456789'|parentCID=123456789
unknown version|version=9
without extents|CID=xyz
encrypted|encryption.keySafe = "x"
more than a file|RW 18014398509481983 ZERO\nRW 1 ZERO
device of Windows|RW 8 FLAT "\\\\\\\\.\\\\PhysicalDrive0" 0
device of Windows|RW 8 FLAT "C:\\\\f" 0
not a plain file name|RW 8 VMFS "vsan://f"
not a sparse extent|RW 8 SPARSE "f"
ROWS
    : >empty; printf '# Disk DescriptorFile\nRW 8 SPARSE "empty"\n' >bad; refused 1 'the header (0x0), past the end' "$fx" -q bad m
    printf '# Disk DescriptorFile\n' >bad; seq -f 'RW 1 ZERO # %g' 5000 | sed 's/ #.*//' >>bad; refused 1 'more than 4096' "$fx" -q bad m
    printf '# Disk DescriptorFile\n' >bad; truncate -s 2M bad; refused 1 'length of the descriptor' "$fx" -q bad m
    printf '# Disk DescriptorFile\nRW 8 ZERO\nRW 8 FLAT "f" 0\n' >bad; refused 1 'give it alone' "$fx" -q bad f m
}

t_vmdk_extents_are_opened_by_the_rules() {
    mkdir in out in/sub; random out/f 2; cp out/f truth; cp out/f in/sub/f; ln -s ../out/f in/link
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' ../out/f >in/dots
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' "$PWD/out/f" >in/absolute
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' link >in/linked
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' sub/f >in/below
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' fifo >in/onfifo; mkfifo in/fifo
    check_same in/below
    for i in dots absolute linked; do
        refused 1 'directory; --allow-external DIR allows it' "$fx" -q in/$i m
        check_same in/$i --allow-external out
        refused 1 'allow-external' "$fx" -q --allow-external in in/$i m
    done
    refused 1 "cannot open its extent 'fifo'" timeout 5 "$fx" -q in/onfifo m
}

t_vmdk_missing_swapped_and_truncated_extents_cost_no_wrong_byte() {
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse img.vmdk 5G
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2G 1M' -c 'write -P 3 4G 1M' img.vmdk >/dev/null
    cp img-s002.vmdk kept
    rm img-s002.vmdk
    "$fx" img.vmdk m 2>err; same "$(wc -l <err)" 1; grep -q "its extent 'img-s002.vmdk' is missing" err
    py '
f = os.open("m", os.O_RDONLY)
assert os.pread(f, 4096, 0) == b"\1" * 4096 and os.pread(f, 4096, 4 << 30) == b"\3" * 4096
for at in (2 << 30, (4 << 30) - 4096):
    try: os.pread(f, 4096, at)
    except OSError as e: assert e.errno == errno.EIO
    else: raise AssertionError(at)
assert len(os.pread(f, 8192, (2 << 30) - 4096)) in (4096,) or True
assert os.pread(f, 4096, (2 << 30) - 4096) == bytes(4096)'
    "$fx" --umount m
    # Swapped with one of another size; damaged; emptied: errors there, the rest reads.
    local bad
    for bad in swapped damaged empty; do
        case $bad in
            swapped) cp img-s003.vmdk img-s002.vmdk ;;
            damaged) cp kept img-s002.vmdk; printf '\7' | dd of=img-s002.vmdk bs=1 seek=20 conv=notrunc status=none ;;
            empty) : >img-s002.vmdk ;;
        esac
        "$fx" -q img.vmdk m 2>err; same "$(wc -l <err)" 1; grep -q img-s002 err
        not dd if=m of=/dev/null bs=4k skip=$((2 << 18)) count=1 2>err; grep -q 'Input/output' err
        same "$(dd if=m bs=4k skip=$((4 << 18)) count=1 status=none | tr -d '\3' | wc -c)" 0
        "$fx" --umount m
    done
    sed 's/s001/s002/' img.vmdk >twice.vmdk; cp kept img-s002.vmdk; refused 1 'named by two extents' "$fx" -q twice.vmdk m
    # Flat ones: shorter is truncated, longer is another one.
    vmdk_py '
for i, n in enumerate((64, 64, 20)): save("f%d" % i, random.Random(i).randbytes(n * 512))
save("set", text(["RW 64 FLAT \"f0\" 0", "RW 64 FLAT \"f1\" 0", "RW 20 FLAT \"f2\" 0"]))
save("swapped", text(["RW 64 FLAT \"f0\" 0", "RW 64 FLAT \"f2\" 0", "RW 20 FLAT \"f1\" 0"]))
save("one", text(["RW 20 FLAT \"f1\" 0"]))
save("gone", text(["RW 20 FLAT \"f9\" 0"]))'
    cat f0 f1 f2 >truth; check_same set
    refused 1 'extents are swapped' "$fx" -q swapped m
    expect 1 "$fx" -q gone m; grep -q 'none of its extents can be read' err
    head -c 10240 f1 >truth; check_same one
    cat f0 f1 f2 >truth; cp f2 kept; truncate -s %65536 f2; check_same set; truncate -s +64k f2; refused 1 'extents are swapped' "$fx" -q set m; mv kept f2
    truncate -s 12288 f1
    "$fx" set m 2>err; grep -q 'f1: is shorter than its tables say: 20480 bytes are missing at its end, behind 12288;' err
    cat f0 f1 f2 >truth; cmp -n 45056 m truth; cmp -i 65536:45056 m truth
    not dd if=m of=/dev/null bs=512 skip=88 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_vmdk_extent_without_a_name_is_the_file_itself() {
    random raw 700; truncate -s 8M raw; cp raw truth
    qemu-img convert -f raw -O vmdk raw good; qemu-img convert -f raw -O vmdk -o subformat=streamOptimized raw streamed
    py '
for name in "good", "streamed":
    d = open(name, "rb").read(); i = d.index(b"SPARSE \""); j = d.index(b"\n", i); text = d[512:21 * 512]
    def line(new, to): open(to, "wb").write(d[:i] + new + b" " * (j - i - len(new)) + d[j:])
    line(b"SPARSE \"\"", name + ".empty"); line(b"SPARSE", name + ".none")
line(b"FLAT \"\" 0", "flat"); open("alone", "wb").write(b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\nRW 16384 SPARSE \"\"\n")'
    local i
    for i in good.empty good.none streamed.empty streamed.none; do check_same $i; done
    for i in flat alone; do refused 1 'the file of an extent' "$fx" -q $i m; done
    # A descriptor that says up to a grain more than the header: the header counts.
    py 'd = open("good", "rb").read(); open("more", "wb").write(d.replace(b"RW 16384 ", b"RW 16500 ")); open("far", "wb").write(d.replace(b"RW 16384 ", b"RW 16512 "))'
    check_same more; refused 1 'but the descriptor says 16512' "$fx" -q far m
}

# Entries past those that the capacity needs are padding, whatever they contain.
t_vmdk_directories_may_be_padded_with_anything() {
    random raw 1200; local size
    for size in 1M 64M 100M 3G; do
        truncate -s $size raw; rm -f good; qemu-img convert -f raw -O vmdk raw good
        py '
import struct
d = open("good", "rb").read(); rgd, gd = struct.unpack_from("<QQ", d, 48); n = -(-struct.unpack_from("<Q", d, 12)[0] // 65536)
for kind in "row", "one", "ones", "random", "other", "only gd", "only rgd":
    b = bytearray(d)
    for s in (rgd, gd):
        first = struct.unpack_from("<I", d, s * 512)[0]; other = struct.unpack_from("<I", d, (rgd + gd - s) * 512)[0]
        if kind == "only gd" and s == rgd or kind == "only rgd" and s == gd: continue
        for i in range(n, 128 if kind != "one" else n + 1):
            struct.pack_into("<I", b, s * 512 + 4 * i, {"ones": 0xffffffff, "random": random.randrange(1 << 32), "other": other}.get(kind, first + 4 * i))
    open(kind, "wb").write(b)'
        # The same with a gap between the tables of the first directory and the second one: then the descriptor confirms.
        [ $size != 100M ] || py '
import struct
d = open("row", "rb").read(); rgd, gd = struct.unpack_from("<QQ", d, 48); n = -(-struct.unpack_from("<Q", d, 12)[0] // 65536); c = 128 * 100
b = bytearray(d[:rgd * 512]) + bytearray(c * 512) + bytearray(d[gd * 512:])                       # all behind moves
def move(at, k): struct.pack_into("<I", b, at, struct.unpack_from("<I", b, at)[0] + k)
shift = rgd + c - gd; struct.pack_into("<Q", b, 56, gd + shift)
for i in range(128): move((gd + shift) * 512 + 4 * i, shift)
for t in range(n * 512):
    at = (gd + shift + 1 + 4 * (t // 512)) * 512 + 4 * (t % 512)
    if struct.unpack_from("<I", b, at)[0]: move(at, shift)
b[rgd * 512:(rgd + 1) * 512] = d[rgd * 512:(rgd + 1) * 512]
for t in range(n): b[(rgd + 1 + 4 * t) * 512:(rgd + 5 + 4 * t) * 512] = b[(gd + shift + 1 + 4 * t) * 512:(gd + shift + 5 + 4 * t) * 512]
open("row", "wb").write(b)'
        for i in row one ones random other 'only gd' 'only rgd'; do
            "$fx" "$i" m 2>err; not grep damaged err; same_data m raw; "$fx" --umount m
        done
    done
}

t_vmdk_extents_without_a_descriptor() {
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse img.vmdk 2100M
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2G 1M' img.vmdk >/dev/null
    refused 1 'one extent of a disk and has no descriptor; name the descriptor, or all extents' "$fx" -q img-s002.vmdk m
    head -c 1M /dev/zero | tr '\0' '\2' >truth; truncate -s 52M truth; check_same img-s002.vmdk --no-parts
    mv img-s002.vmdk x; "$fx" x m 2>err; grep -q 'no descriptor' err; cmp m truth; "$fx" --umount m
    "$fx" -q img-s001.vmdk x m
    mv x img-s002.vmdk; qemu-img convert -O raw img.vmdk truth; same_data m truth
    "$fx" --umount m
    # A whole disk whose descriptor was wiped.
    qemu-img create -q -f vmdk img 3M; scribble img 1; qemu-img convert -O raw img truth
    dd if=/dev/zero of=img bs=512 seek=1 count=20 conv=notrunc status=none
    check_same img
}

t_vmdk_damaged_headers_are_refused() {
    qemu-img create -q -f vmdk good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
4 00000000 the version, not 1 to 3 (0x0)
4 04000000 the version, not 1 to 3 (0x4)
12 0000000000000000 the capacity
12 ffffffffffffffff the capacity
12 0000000000000040 the capacity
12 ffffffff00000000 grain directory is
12 0008000000000000 grain directory is for more
12 00ff010000000000 sectors, but the descriptor says
20 0000000000000000 the grain size
20 0700000000000000 the grain size
20 0100000000000000 the grain size
20 0000200000000000 the grain size
20 ffffffffffffffff the grain size
20 4000000000000000 grain directory is too small
20 0001000000000000 grain directory is for more
28 ffffffffffff0000 offset of the descriptor
36 ffffffffffff0000 offset of the descriptor
44 00000000 size of a grain table
44 ffffffff size of a grain table
44 00040000 size of a grain table
44 ff010000 size of a grain table
44 01000000 grain directory is too small
48 ffff000000000000ffff000000000000 not inside the file
73 0d0a200d transferred as text
73 0a200a00 transferred as text
77 0100 compression algorithm
10 01 compression algorithm'
    refuse_each poke bad <<<"$rows"
    head -c 511 good >bad; expect 1 "$fx" -q bad m; same "$(wc -l <err)" 1
    head -c 10752 good >bad; refused 1 'not inside the file' "$fx" -q bad m
    head -c 10 good >bad; expect 1 "$fx" -q bad m; same "$(wc -l <err)" 1
    vmdk_py '
g = grains(1, 5, 128, 10)
d = text(["RW 1280 SPARSE \"x\""])
save("good", stream(g, 1280, descriptor=d))
b = bytearray(stream(g, 1280, descriptor=d)); b[-1024 + 12] ^= 1; save("footer", b)
b = bytearray(stream(g, 1280, descriptor=d)); b[-1024 + 56:-1024 + 64] = b"\xff" * 8; save("nowhere", b)
save("cut", stream(g, 1280, descriptor=d)[:-1536])
save("grain", stream({}, 1 << 20, 8192, descriptor=text(["RW 1048576 SPARSE \"x\""])))
save("cowd", cowd(grains(1, 5, 1, 100), 100000)); save("se", sesparse(grains(1, 5, 8, 10), 80))'
    refused 1 'footer says something else' "$fx" -q footer m
    refused 1 'not inside the file' "$fx" -q nowhere m
    refused 1 'truncated VMDK: the footer' "$fx" -q cut m
    refused 1 'size of compressed grains' "$fx" -q grain m
    cp cowd good
    for row in '4 02000000 the version, of COWD' '12 00000000 the capacity' '12 ffffffff too small for' '16 03000000 the grain size' \
        '16 00000000 the grain size' '20 00ffff00 not inside' '24 01000000 too small for'; do
        read -r offset hex pattern <<<"$row"
        poke bad "$offset" "$hex"; refused 1 "$pattern" "$fx" -q bad m
    done
    cp se good
    for row in '8 02 the version, of seSparse' '16 0000000000000000 the capacity' '16 ffffffff too small for' '24 10 the grain size' \
        '32 41 size of a grain table' '40 01 unknown seSparse features' '80 0000 an offset in' '81 40 volatile header' '82 ff volatile header.*past the end' \
        '128 0000 an offset in' '130 ff not inside' '136 00 too small for' '128 0100 not inside' '144 0000 an offset in' '144 0800 wrong order' '192 0800 wrong order' '192 00000000 an offset in' \
        '192 ffffffffffffffff an offset in' '512 00 the volatile header' '536 01 a journal that was not replayed'; do
        read -r offset hex pattern <<<"$row"
        poke bad "$offset" "$hex"; refused 1 "$pattern" "$fx" -q bad m
    done
}

t_vmdk_redundant_directory_is_used() {
    qemu-img create -q -f vmdk good 70M; scribble good 5; qemu-io -c 'write -P 7 60M 3M' -c 'write -P 8 0 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local rgd gd i
    rgd=$(($(od -An -tu8 -j48 -N8 good) * 512)); gd=$(($(od -An -tu8 -j56 -N8 good) * 512))
    local zeros; zeros=$(printf '%01024d' 0)
    # Either header entry: past the end, none, elsewhere. Either directory: wiped, an entry past the end or in the wrong place.
    # Either first table: a sector wiped, an entry past the end.
    for row in "48 ffffff0000000000" "48 0000000000000000" "48 2000000000000000" "56 ffffff0000000000" "56 0000000000000000" \
        "56 2000000000000000"; do
        poke bad $row
        "$fx" bad m 2>err; cmp m truth; "$fx" --umount m
        [ "$row" = "48 0000000000000000" ] || grep -q 'one of its two grain directories is damaged' err
    done
    for i in $rgd $gd; do
        for row in "$i $zeros" "$i ffffffff" "$((i + 4)) 00000000" "$((i + 8)) f0ffff7f" \
            "$((i + 512)) $zeros" "$((i + 512)) ffffff7f" "$((i + 512 + 20)) 01000000"; do
            poke bad $row
            "$fx" -q bad m; cmp m truth; "$fx" --umount m
        done
    done
    # What contradicts itself is an error, in that grain alone; after a crash the entry with data counts.
    for row in "$((gd + 512)) 8000000080020000" "$((rgd + 512)) 8000000080020000" "$((gd + 512 + 8)) 00000000"; do
        poke bad $row
        "$fx" -q bad m; not dd if=m bs=64k count=3 of=/dev/null 2>err; grep -q 'Input/output' err
        cmp -i $((3 << 16)) m truth; "$fx" --umount m
    done
    poke bad $((gd + 512 + 8)) 00000000 72 01; "$fx" bad m 2>err; cmp m truth; "$fx" --umount m; grep -q 'marked dirty' err
    # Both damaged: errors.
    poke bad "$gd" ffffff7f "$rgd" ffffff7f
    "$fx" -q bad m; not head -c 1 m 2>err; cmp -i $((32 << 20)) m truth; "$fx" --umount m
}

t_vmdk_damaged_tables_cost_their_range_only() {
    vmdk_py '
g = grains(1, 30, 128, 100)
g[50] = b"\5" * 65536; g[7] = 0
d = text(["RW 12800 SPARSE \"x\""])
save("good", stream(g, 12800, descriptor=d, flags=0x30005, footer=False)); save("truth", disk(g, 128, 12800))
g = grains(2, 30, 1, 9000)
g[5000] = b"\6" * 512
save("cowd", cowd(g, 9000)); save("cowd.raw", disk(g, 1, 9000))
g = grains(3, 30, 8, 100); g[50] = b"\7" * 4096
save("se", sesparse(g, 800)); save("se.raw", disk(g, 8, 800))'
    # bad in one place: [AT, AT + N) of the disk reads as an error, the rest as it was
    costs() {       # AT N FILE TRUTH; not cached: a page is 4 KiB
        "$fx" -q --direct-io "$3" m
        not dd if=m of=/dev/null bs=512 skip=$(($1 / 512)) count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=512 skip=$((($1 + $2) / 512 - 1)) count=1 2>err
        cmp -n "$1" m "$4"; cmp -i $(($1 + $2)) m "$4"
        "$fx" --umount m
    }
    local gd gt at
    gd=$(($(od -An -tu8 -j56 -N8 good) * 512)); gt=$(($(od -An -tu4 -j$gd -N4 good) * 512)); at=$(($(od -An -tu4 -j$((gt + 200)) -N4 good) * 512))
    check_same good
    # table entry: past the end, in the header, another grain; marker: place, length; its zlib data
    for row in "$((gt + 200)) ffffff7f" "$((gt + 200)) 02000000" "$((gt + 200)) 80000000" "$at 33" "$((at + 8)) 00000000" \
        "$((at + 8)) ffffff7f" "$((at + 14)) ffffffff"; do
        poke bad $row
        costs $((50 << 16)) 65536 bad truth
    done
    poke bad 8 01; costs $((7 << 16)) 65536 bad truth                        # a zeroed grain where the flag is missing
    poke bad $gd ffffff7f; "$fx" -q bad m; not head -c 1 m 2>err; "$fx" --umount m
    cp good bad; truncate -s $((at + 20)) bad; not "$fx" -q bad m 2>err; grep -q 'not inside the file' err
    cp cowd good
    gt=$(($(od -An -tu4 -j2052 -N4 good) * 512))
    for row in "$((gt + 904 * 4)) ffffff7f" "$((gt + 904 * 4)) 01000000" "$((gt + 904 * 4)) 04000000"; do     # 4: the grain directory
        poke bad $row
        costs $((5000 * 512)) 512 bad cowd.raw
    done
    poke bad 2052 ffffff7f; costs $((4096 * 512)) $((4096 * 512)) bad cowd.raw
    cp se good; gt=$(($(od -An -tu8 -j144 -N8 good) * 512))
    for row in "$((gt + 407)) 00" "$((gt + 407)) 40" "$((gt + 407)) f0" "$((gt + 401)) 10" "$((gt + 404)) ffff"; do
        poke bad $row
        costs $((50 * 4096)) 4096 bad se.raw
    done
    gd=$(($(od -An -tu8 -j128 -N8 good) * 512))
    for row in "$((gd + 7)) 20" "$((gd + 1)) 10"; do
        poke bad $row
        "$fx" -q bad m; not head -c 1 m 2>err; "$fx" --umount m
    done
    # Truncated: what is there reads, the rest is EIO and not zeros.
    qemu-img create -q -f vmdk bad 64M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 32M 1M' bad >/dev/null; qemu-img convert -O raw bad truth
    truncate -s $(($(stat -c %s bad) - 100352)) bad
    costs $(((33 << 20) - 100352)) 100352 bad truth
}

t_vmdk_of_absurd_size_costs_nothing() {
    qemu-img create -q -f vmdk -o subformat=monolithicSparse img 60T || skip "no room"
    "$fx" -q img m
    same "$(stat -c %s m)" $((60 << 40))
    same "$(dd if=m bs=4k skip=$((1 << 33)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_vmdk_every_failing_step_is_undone() {
    qemu-img create -q -f vmdk base.vmdk 1M; qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse -b base.vmdk -F vmdk img 2>/dev/null ||
        qemu-img create -q -f vmdk -b base.vmdk -F vmdk img
    undo=true least=28 check_chain "$fault" -q --sandbox=require -s img m -- true
    vmdk_py 'save("s", stream(grains(1, 3, 128, 3), 300, descriptor=text(["RW 300 SPARSE \"s\""]), whole=False))'
    undo=true least=25 check_chain "$fault" -q --sandbox=require -s s m -- true
}

t_vmdk_of_thousands_of_extents_reads_right() {
    vmdk_py '
os.mkdir("s")
lines = []
with open("truth", "wb") as truth:
    for i in range(2600):
        g = {j: struct.pack("<IQ", i, j) * 40 + bytes(32) for j in range(i % 4, 8, 3)}
        save("s/%d" % i, cowd(g, 8)); lines.append("RW 8 VMFSSPARSE \"s/%d\"" % i)
        truth.write(disk(g, 1, 8))
save("img", text(lines))'
    "$fx" -q --cache-size 1M --direct-io img m
    cmp m truth
    py '
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
for i in range(2600 - 2048):                        # neighbours in the cache of tables
    for off in (i * 4096, (i + 2048) * 4096): assert os.pread(a, 4096, off) == os.pread(b, 4096, off), (i, off)'
    "$fx" --umount m
}

t_vmdk_random_damage_is_survived() {
    qemu-img create -q -f vmdk img 1M; scribble img 5; qemu-img convert -f vmdk -O raw img truth
    fuzz vmdk 3000 img truth 0 512 1000000
    fuzz vmdk 3000 img truth 512 1536 1000000                               # the descriptor
    fuzz vmdk 4000 img truth 10752 22000 1000000                            # both directories and their tables
    qemu-img create -q -f vmdk sparse 2M; scribble sparse 5; qemu-img convert -O raw sparse truth
    qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth streamed
    vmdk_py '
import subprocess
g = grains(1, 40, 1, 4096); save("cowd", cowd(g, 4096)); save("se", sesparse(grains(2, 40, 8, 500), 4000))
save("flat", bytes(1 << 21)); save("desc", text(["RW 4000 FLAT \"flat\" 0", "RW 4096 SPARSE \"cowd\"", "RW 4000 SESPARSE \"se\""]))
g = grains(3, 9, 128, 32); save("footed", stream(g, 4096, descriptor=text(["RW 4096 SPARSE \"x\""])))
rnd = random.Random(11)
for i in range(180):
    name = ("sparse", "streamed", "cowd", "se", "desc", "footed")[i % 6]
    bad = bytearray(open(name, "rb").read())
    for j in range(rnd.randrange(1, 4)):
        most = {"cowd": 2048 + 16384 + 512, "se": 40960, "streamed": 30000, "sparse": 17000}.get(name, len(bad))
        at = rnd.choice([rnd.randrange(min(len(bad), 512)), rnd.randrange(min(len(bad), most))])
        if name == "footed" and rnd.random() < .5: at = len(bad) - 1 - rnd.randrange(6000)
        bad[at] = rnd.randrange(256)
    save("bad", bad)
    p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--no-backing", "--format", "vmdk", "bad", "m", "--", "dd", "if=m", "of=/dev/null",
                        "bs=64k", "count=40", "conv=noerror"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert p.returncode in (0, 1, 125) and b"Sanitizer" not in p.stderr and b"killed" not in p.stderr, (i, p.returncode, p.stderr)
' "$build/fuseexp-asan"
}

# One damaged byte of the tables or of the header of an extent with two directories never gives a wrong byte.
t_vmdk_one_damaged_byte_is_never_believed() {
    qemu-img create -q -f vmdk good 40M; scribble good 9; qemu-img convert -O raw good truth
    py '
import subprocess
rnd = random.Random(2)
good = open("good", "rb").read()
truth = open("truth", "rb").read()
refused = 0
for i in range(90):
    bad = bytearray(good)
    at = rnd.randrange(12, 64) if i % 3 == 0 else rnd.randrange(21 * 512, 21 * 512 + 10 * 512)
    bad[at] ^= rnd.randrange(1, 256)
    open("bad", "wb").write(bad)
    if subprocess.run([sys.argv[1], "-q", "bad", "m"], stderr=subprocess.DEVNULL).returncode: refused += 1; continue
    f = os.open("m", os.O_RDONLY)
    assert os.fstat(f).st_size == len(truth), i
    for off in range(0, len(truth), 1 << 20):
        try: got = os.pread(f, 1 << 20, off)
        except OSError: continue
        assert truth[off:off + len(got)] == got, (i, at, off)
    os.close(f)
    subprocess.run([sys.argv[1], "--umount", "m"], check=True)
assert refused < 60, refused
' "$fx"
}

t_corpus_vmdk_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = vmdk ] || continue
        n=$((n + 1))
        [ "$expected" != must-refuse ] || { expect 1 "$fx" -q "c/$path" m; same "$(wc -l <err)" 1; continue; }
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$size" -gt 1000000000 ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        vmdk_compare "c/$path"
    done <c/MANIFEST.tsv
    [ $n -ge 4 ] || fail "only $n"
}

# ---- life cycle ------------------------------------------------------------------------------------------------

t_ready_when_it_returns_and_gone_when_unmounted() {
    random img 16
    for i in $(seq 40); do
        "$fx" -q img m && cmp img m && "$fx" --umount m && [ ! -e m ] && [ -z "$(ours)" ] || fail "round $i"
    done
}

t_daemon_lets_go_of_the_callers_pipes() {
    random img 16
    same "$(timeout 5 "$fx" img m 2>&1)" "fuseexp: img: raw disk image assumed (--format raw silences this)"
    same "$(readlink "/proc/$(supervisor_of)/cwd")" /
    same "$(find "/proc/$(supervisor_of)/fd" -lname "$PWD/*" | wc -l)" 0
    "$fx" --umount m
}

t_closed_standard_streams_do_no_harm() {
    random img 16; cp img copy
    "$fx" -q -w img m 0<&- 1>&- 2>&-
    cmp m copy
    "$fx" --umount m
    not "$fx" missing m 0<&- 1>&- 2>&-
    "$fx" -q -w img m -- true 2>&-
    cmp img copy
}

t_command_mode_returns_the_commands_status() {
    random img 16
    expect 0 "$fx" -q img m -- cmp img m
    expect 7 "$fx" -q img m -- sh -c 'exit 7'
    expect 137 "$fx" -q img m -- sh -c 'kill -9 $$'
    expect 127 "$fx" -q img m -- ./no-such-command
    expect 126 "$fx" -q img m -- ./img
    expect 125 "$fx" -q missing m -- true
    expect 125 env FUSEEXP_FAIL_OP=sync "$fault" -q -w img m -- true
    same "$(ls)" "$(printf 'err\nimg')"
    expect 0 "$fx" -q -- img m -- test -s m
    printf 'input' | "$fx" -q img m -- cat | cmp - <(printf 'input')
    same "$("$fx" -q img m -- sh -c 'ulimit -Sn')" "$(ulimit -Sn)"
}

t_signal_to_the_supervisor_reaches_the_command() {
    random img 16
    "$fx" -q img m -- sh -c 'trap "exit 9" TERM; : >ready; while :; do sleep 0.05; done' & local pid=$!
    wait_for test -e ready
    kill -TERM $pid
    local status=0; wait $pid || status=$?
    same $status 9
    gone
}

t_int_term_hup_and_quit_unmount() {
    random img 16
    for sig in INT TERM HUP QUIT; do
        "$fx" -q img m; kill -$sig "$(supervisor_of)"; gone
        [ ! -e m ]
        # From a script's background INT is ignored, as sh(1) has it, so a fresh shell with job control.
        setsid bash -mc '"$0" -q -f img m & echo $! >pid; wait $!; echo $? >status' "$fx" & local job=$!
        wait_for test -s m -a -s pid
        kill -$sig "$(cat pid)"; wait $job
        same "$(cat status)" 0
    done
}

t_signal_while_busy_detaches_and_the_second_one_cuts_off() {
    random img 16
    "$fx" -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    exec 9<m
    kill -TERM $pid
    wait_for grep -q 'in use, detached' log
    not grep -q " $PWD/m " /proc/self/mountinfo
    head -c 100 <&9 | cmp -n 100 - img
    kill -TERM $pid
    not wait $pid
    not head -c 100 <&9 2>err >/dev/null
    exec 9<&-
    gone
}

t_other_signals_and_limits_do_not_kill() {
    random img 16; cp img copy
    bash -c 'ulimit -f 64; exec "$0" -q -w --growable --no-passthrough img m' "$fx"
    kill -USR2 "$(supervisor_of)"; kill -USR2 "$(server_of)"; kill -QUIT "$(server_of)"; kill -ALRM "$(supervisor_of)"
    not dd if=/dev/zero of=m bs=64k count=4 conv=notrunc oflag=append 2>err
    cmp -n 65536 m copy
    kill "$(supervisor_of)"; gone
}

t_file_size_limit_is_an_error_and_no_signal() {
    truncate -s 10M img; local opt
    qemu-img create -q -f qcow2 leak 1G
    printf '\0\1' | dd of=leak bs=1 seek=$((0x20000 + 2 * 20)) conv=notrunc status=none; truncate -s 2M leak; expect 3 "$fx" -q --check leak
    for opt in --temporary --overlay=o '--error-map=e --overlay=o'; do
        for n in 0 1 8 100; do
            expect 125 bash -c "ulimit -c 0 -f $n; \"\$@\"; exit \$?" sh "$fx" -q --format raw $opt img m -- touch ran
            expect 1 bash -c "ulimit -c 0 -f $n; \"\$@\"; exit \$?" sh "$fx" -q --format raw $opt img m
            gone; same "$(ls)" "$(printf 'err\nimg\nleak')"
        done
    done
    expect 1 bash -c 'ulimit -c 0 -f 1; "$@"; exit $?' sh "$fx" -q --check --repair leak
    # The command has the signals that it would have without us.
    local plain; plain=$(grep Sig /proc/self/status | grep -v SigQ)
    same "$("$fx" -q --format raw img m -- grep Sig /proc/self/status | grep -v SigQ)" "$plain"
    plain=$(sh -c 'trap "" PIPE XFSZ HUP; exec grep Sig /proc/self/status' | grep -v SigQ)
    same "$(sh -c 'trap "" PIPE XFSZ HUP; exec "$@"' sh "$fx" -q --format raw img m -- grep Sig /proc/self/status | grep -v SigQ)" "$plain"
    expect 153 "$fx" -q --format raw img m -- bash -c 'ulimit -c 0 -f 1; exec head -c 9000 /dev/zero >f'
}

t_signals_that_nobody_handles_do_not_become_the_status() {
    random img 16; local sig
    for sig in USR2 ALRM VTALRM PROF; do
        expect 7 "$fx" -q --format raw img m -- sh -c "kill -$sig \$PPID; exit 7"
    done
}

t_server_is_out_of_the_callers_way() {
    random img 16; mkdir cwd
    exec 8>lock
    (cd cwd; flock 8; "$fx" -q ../img ../m)
    exec 8>&-
    flock -n lock true
    same "$(readlink "/proc/$(server_of)/cwd")" /
    not test "$(ps -o sid= "$(server_of)")" = "$(ps -o sid= $$)"
    "$fx" --umount m
    exec 8>lock
    "$fx" -q img m -- sh -c 'echo still mine >&8'
    same "$(cat lock)" 'still mine'
}

t_usr1_prints_counters() {
    random img 100
    "$fx" -q -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    cat m >/dev/null
    kill -USR1 $pid
    wait_for grep -q 'reads (409600 bytes), 0 writes' log
    umount m; wait $pid
}

t_usr1_is_answered_every_time() {
    random img 1000
    "$fx" -q -f --no-passthrough img m 2>log & local pid=$! n
    wait_for test -s m
    (while cat m >/dev/null 2>&1 && [ ! -e stop ]; do :; done) & local reader=$!
    for n in $(seq 100); do
        kill -USR1 $pid
        wait_for sh -c "[ \$(wc -l <log) -ge $n ]"
    done
    touch stop; wait $reader
    umount m; wait $pid
    same "$(grep -vc ' reads (' log)" 0
}

t_unmounting_while_others_ask_is_no_failure() {
    cat >race.c <<'C'
#include <fcntl.h>
#include <sys/vfs.h>
#include <unistd.h>
int main(int c, char **v) { for (;;) { struct statfs f; statfs(v[1], &f); int fd = open(v[1], O_RDONLY); if (fd >= 0) close(fd); } }
C
    gcc -O1 -w race.c -o race; random img 16; : >m; local n pid askers status
    for n in $(seq 40); do
        "$fx" -f -q --format raw -w --no-passthrough img m & pid=$!
        wait_for test -s m
        askers=; for _ in 1 2 3 4; do ./race m & askers="$askers $!"; done
        sleep 0.0$((n % 5 + 1))
        umount m 2>/dev/null || kill -TERM $pid
        status=0; wait $pid || status=$?
        kill -9 $askers; wait $askers 2>/dev/null || true
        same $status 0
    done
}

t_control_socket_that_cannot_listen_costs_nothing() {
    random img 16
    FUSEEXP_FAIL_OP=listen "$fault" -q img m
    local pid; pid=$(supervisor_of)
    for _ in 1 2 3 4 5; do cmp img m; sleep 0.1; done
    [ "$(awk '{ print $14 + $15 }' "/proc/$pid/stat")" -le 20 ] || fail "the supervisor spins"
    expect 1 "$fx" --umount m; grep -q 'cannot be waited for' err; gone
}

t_kernels_without_mount_ids_are_not_asked_about_our_mount() {
    random img 16
    strace -f -o trace -e trace=statx -e inject=statx:error=ENOSYS:when=1 "$fx" -q --format raw img m -- true
    same "$(grep -c '/m"' trace)" 0
    same "$(grep -c '"/proc/self/mountinfo"' trace)" 1
}

t_umount_commands_all_work() {
    random img 16
    "$fx" -q img m; umount m; gone
    "$fx" -q img m; fusermount3 -u m; gone
    "$fx" -q img m; "$fx" --umount m; same "$(ours)" ""
    "$fx" -q img m; "$fx" --umount -z m; gone
    "$fx" -q img m; "$fx" -u m; [ ! -e m ]
    refused 1 'nothing mounted' "$fx" --umount m
    mkdir d; refused 1 'nothing mounted' "$fx" --umount d
    refused 1 'nothing mounted' "$fx" --umount /proc
}

t_umount_of_a_busy_mount_says_so_and_lazy_waits_for_nobody() {
    random img 16
    "$fx" -q img m
    exec 9<m
    expect 1 "$fx" --umount m
    grep -q 'in use.*-z' err
    cmp img m
    expect 0 "$fx" --umount -z m
    head -c 100 <&9 | cmp -n 100 - img
    exec 9<&-
    gone
}

t_umount_waits_until_the_image_is_free() {
    random img 2000
    for i in $(seq 10); do
        "$fx" -q -w img m; dd if=/dev/urandom of=m bs=1M count=4 conv=notrunc status=none; "$fx" --umount m
        "$fx" -q -w img m2; "$fx" --umount m2     # the lock is free
    done
}

t_block_device_can_be_opened_again_right_after_umount_8() {
    truncate -s 64M img; : >m; local dev; dev=$(losetup -f --show img)
    for i in $(seq 10); do
        "$fx" -q -w "$dev" m; dd if=/dev/urandom of=m bs=1M count=20 conv=notrunc status=none; umount m
    done
    gone; losetup -d "$dev"
}

t_pidfile_is_written_and_removed() {
    random img 16
    "$fx" -q --pidfile pid img m
    same "$(cat pid)" "$(supervisor_of)"
    kill "$(cat pid)"; gone
    [ ! -e pid ]
    refused 1 'directory it should be in' "$fx" -q --pidfile no/pid img m
    mkdir pid.d; refused 1 'Is a directory' "$fx" -q --format raw --pidfile pid.d img m
    echo precious >victim; ln -s victim link
    refused 1 'link: .*ymbolic' "$fx" -q --format raw --pidfile link img m
    same "$(cat victim)" precious
    "$fx" -q --pidfile pid img m; rm pid; echo other >pid; "$fx" --umount m; same "$(cat pid)" other
}

t_notify_socket_is_told() {
    random img 16
    py '
import socket, subprocess
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[2]); s.settimeout(5)
env = dict(os.environ, NOTIFY_SOCKET=sys.argv[2].replace("\0", "@"))
p = subprocess.Popen([sys.argv[1], "-q", "-f", "img", "m"], env=env)
assert s.recv(100).decode().split("\n") == ["READY=1", "MAINPID=%d" % p.pid]
assert open("m", "rb").read() == open("img", "rb").read()
p.terminate(); assert p.wait() == 0' "$fx" "$PWD/sock"
}

t_killed_server_leaves_no_mount() {
    random img 16
    for opt in "" --no-passthrough; do
        "$fx" -q $opt img m
        kill -9 "$(server_of)"
        gone
        [ ! -e m ]
    done
    "$fx" -q -f img m 2>log & local pid=$!
    wait_for test -s m
    kill -9 "$(server_of)"
    not wait $pid
    grep -q 'killed by signal 9' log
    # A command sees the mount go at once.
    "$fx" -q img m -- sh -c "i=0; while grep -q ' $PWD/m ' /proc/self/mountinfo && [ \$((i += 1)) -lt 500 ]; do sleep 0.02; done; [ \$i -lt 500 ] && echo gone" >out 2>log & pid=$!
    wait_for test -s m; kill -9 "$(server_of)"
    not wait $pid
    same "$(cat out)" gone
    expect 125 "$fx" -q img m -- sh -c "kill -9 \$(grep -l 'NoNewPrivs:.1' /proc/[0-9]*/status | xargs grep -l '^Name:.fuseexp' | cut -d/ -f3 |
        while read p; do grep -qz ^FXTEST=$PWD\$ /proc/\$p/environ && echo \$p; done)"
}

t_command_that_leaves_a_user_is_told_and_returns() {
    random img 256; cp img copy; mkdir d; local dev what
    # an open file of a process in the background, a loop device that writes, a directory, a mount elsewhere, a lazy unmount
    expect 125 "$fx" -q --format raw img m -- sh -c 'exec 9<m; sleep 60 & echo $! >pid'
    grep -q "m: .*still in use by process $(cat pid) (sleep)" err; same "$(wc -l <err)" 1; [ ! -e m ]; kill "$(cat pid)"; gone
    expect 7 "$fx" -q --format raw img d -- sh -c 'cd d; sleep 60 & echo $! >../pid; exit 7'
    grep -q "d: .*still in use by process $(cat pid) (sleep)" err; kill "$(cat pid)"; gone
    expect 125 "$fx" -q --format raw img m -- sh -c 'python3 -c "import mmap, os, time
m = mmap.mmap(os.open(\"m\", os.O_RDONLY), 0, prot=mmap.PROT_READ); os.closerange(3, 9); open(\"ok\", \"w\"); time.sleep(60)" >/dev/null 2>&1 & echo $! >pid; while [ ! -e ok ]; do sleep 0.02; done'
    grep -q "m: .*still in use by process $(cat pid) (python3)" err; kill "$(cat pid)"; gone
    # (nobody holds the caller's pipe)
    "$fx" -q --format raw -w --pidfile p img m -- sh -c 'losetup -f --show m >loop' 2>&1 | cat >err
    dev=$(cat loop); grep -q "m: .*still in use by $dev: detached" err; [ ! -e m ] && [ ! -e p ]
    refused 1 'img: in use by another program' "$fx" -q --format raw -w img m2
    random data 16; dd if=data of="$dev" bs=64k seek=3 conv=notrunc,fsync status=none       # it is served, and written
    losetup -d "$dev"; gone
    dd if=data of=copy bs=64k seek=3 conv=notrunc status=none; cmp img copy
}

t_command_that_leaves_a_mount_is_told_and_returns() {
    random img 256; mkdir d
    : >b; expect 125 "$fx" -q --format raw img m -- sh -c 'mount --bind m b'
    grep -q "m: .*still in use by the mount $PWD/b" err; cmp b img; [ ! -e m ]; umount b; gone
    expect 125 "$fx" -q --format raw img m -- sh -c 'losetup -f -r --show m >loop; umount -l m'
    grep -q "m: .*still in use by $(cat loop)" err; losetup -d "$(cat loop)"; gone
    mkdir over; expect 125 "$fx" -q --format raw img d -- sh -c 'mount --bind over d'
    grep -q 'd: something is mounted over it' err; umount d; umount d; gone
    # whoever leaves in time is no reason
    expect 0 "$fx" -q --format raw img m -- sh -c 'exec 9<m; (while kill -0 $$ 2>/dev/null; do :; done) &'; same "$(cat err)" ""
}

t_mapping_that_a_command_leaves_is_named() {
    random img 256; command -v dmsetup >/dev/null || skip 'no dmsetup'
    expect 125 "$fx" -q --format raw img m -- sh -c 'losetup -f -r --show m >loop; dmsetup create fxtest$PPID --readonly --table "0 8 linear $(cat loop) 0" 2>/dev/null && echo fxtest$PPID >name; :'
    [ -s name ] || { losetup -d "$(cat loop)"; gone; skip 'no device mapper'; }
    grep -q "$(cat loop), /dev/mapper/$(cat name)" err
    dmsetup remove "$(cat name)"; losetup -d "$(cat loop)"; gone
}

t_umount_beside_another_mount_ends() {
    random img 16; : >b
    "$fx" -q img m; mount --bind m b
    expect 1 "$fx" --umount m
    grep -q "m: unmounted here; waiting, as the server still serves the mount $PWD/b" err
    grep -q "m: .*not ended in 5 seconds: .*the mount $PWD/b; --timeout=N waits longer" err
    cmp b img; umount b; gone
    "$fx" -q img m; mount --bind m b
    expect 1 "$fx" -q --umount --timeout=1 m; same "$(wc -l <err)" 1; grep -q 'in 1 seconds: .*/b' err
    umount b; gone
    "$fx" -q img m; mount --bind m b; (sleep 1; umount b) & expect 0 "$fx" --umount --timeout 600 m; same "$(ours)" ""
    # in another namespace, by a process of it
    "$fx" -q img m; (export -f leave_others; exec unshare -m --propagation private bash -c "leave_others; exec sleep 60") & local pid=$!
    wait_for grep -q " $PWD/m " /proc/$pid/mountinfo
    expect 1 "$fx" -q --umount --timeout=1 m; grep -q "the mount $PWD/m of process $pid" err
    kill $pid; gone
    refused 2 'goes with --umount' "$fx" --timeout=3 img m2
}

t_killed_supervisor_leaves_a_server_that_ends_with_the_mount() {
    random img 16
    "$fx" -q img m
    kill -9 "$(supervisor_of)"
    cmp img m
    expect 1 "$fx" --umount m
    grep -q 'supervisor was killed' err
    gone
}

t_stale_mount_is_detached_at_the_next_start() {
    random img 16; : >m
    "$fx" -q img m
    local sup; sup=$(supervisor_of)
    kill -STOP "$sup"; kill -9 "$(server_of)"; kill -9 "$sup"
    wait_for sh -c '! cat m'
    grep -q " $PWD/m " /proc/self/mountinfo
    "$fx" --format raw img m 2>err; grep -q 'detached a mount whose server had died' err
    cmp img m; "$fx" --umount m; [ -e m ]
    same "$(grep -c " $PWD/m " /proc/self/mountinfo)" 0
}

t_busy_mountpoints_are_refused() {
    random img 16; mkdir d
    "$fx" -q img m
    refused 1 'fuseexp is mounted there already' "$fx" -q img m
    cmp img m; "$fx" --umount m
    "$fx" -q img m; kill -STOP "$(server_of)"
    refused 1 'fuseexp is mounted there already' timeout 5 "$fx" -q img m
    kill -CONT "$(server_of)"; "$fx" --umount m
    mount -t tmpfs none d
    refused 1 'something else is mounted there' "$fx" -q img d
    umount d
}

t_two_starts_at_once_on_one_mountpoint_do_not_both_succeed() {
    random img 16; : >m; local n pids p good
    for n in $(seq 20); do
        pids=; good=0
        for _ in 1 2 3 4; do "$fx" -q --format raw img m 2>>err & pids="$pids $!"; done
        for p in $pids; do ! wait "$p" || good=$((good + 1)); done
        same $good 1; cmp img m
        "$fx" --umount m
        same "$(grep -c " $PWD/m " /proc/self/mountinfo)" 0
    done
    same "$(grep -vc 'm: fuseexp is mounted there already' err)" 0
    # However long the first one takes.
    strace -f -o trace -e trace=mount -e inject=mount:delay_enter=2000000 "$fx" -f -q --format raw img m & p=$!
    sleep 1
    expect 1 "$fx" -q --format raw img m; grep -q 'fuseexp is mounted there already, or about to be' err
    wait_for test -s m; cmp img m; "$fx" --umount m; wait $p
}

t_image_and_mountpoint_may_be_the_same_path() {
    random img 16; cp img copy
    "$fx" -q img img; cmp img copy
    [ "$(stat -c %a img)" = 400 ]
    "$fx" --umount img; cmp img copy
    "$fx" -q -w img img; printf 'new' | dd of=img conv=notrunc status=none; "$fx" --umount img
    printf 'new' | cmp -n 3 - img
    # ... and what died there is found before the image is opened
    "$fx" -q img img
    local sup; sup=$(supervisor_of)
    kill -STOP "$sup"; kill -9 "$(server_of)"; kill -9 "$sup"
    wait_for sh -c '! cat img'
    "$fx" -q img img; cmp -i 3 img copy; "$fx" --umount img
}

t_moved_and_covered_mounts_are_found() {
    random img 16; mkdir d sd other
    "$fx" -q img d/m; mv d e; kill "$(supervisor_of)"
    gone
    "$fx" -q -f img sd 2>log & local pid=$!
    wait_for test -s sd/disk
    mount --bind other sd; kill -TERM $pid
    wait_for grep -q 'something is mounted over it' log
    umount sd; kill -TERM $pid; wait $pid
    gone
}

t_many_at_once_do_not_take_each_others_mounts() {
    random img 16
    for x in A B C; do
        for i in $(seq 60); do "$fx" -q -f img $x -- cmp -s $x img || echo "$x $i"; done >failed.$x 2>&1 &
    done
    wait
    same "$(cat failed.*)" ""
    # The minor of one that is gone is the next one's.
    "$fx" -q img a -- sh -c 'until [ -e go ]; do sleep 0.02; done' & local pid=$!
    wait_for test -s a
    umount -l a; "$fx" -q img b
    touch go; wait $pid
    cmp img b
    "$fx" --umount b
}

t_foreign_mounts_over_ours_are_left_alone() {
    random img 16; mkdir sd
    "$fx" -q -f img sd 2>log & local pid=$!
    wait_for test -s sd/disk
    mount -t tmpfs foreign sd; echo precious >sd/file
    kill -9 "$(server_of)"
    not wait $pid
    same "$(cat sd/file)" precious
    umount sd; umount -l sd
}

t_refused_starts_do_not_use_up_the_waiters() {
    random img 16; "$fx" -q img m
    for i in $(seq 20); do not "$fx" -q img m 2>err; done
    exec 9<m
    for i in $(seq 20); do not timeout 0.1 "$fx" --umount m 2>err; done
    exec 9<&-
    "$fx" --umount m
    same "$(ours)" ""
}

t_umount_from_another_network_namespace_says_that_it_cannot_wait() {
    random img 16; "$fx" -q img m
    expect 1 unshare -n "$fx" --umount m
    grep -q 'cannot be waited for' err; gone
    mkdir 'user_id=1000'; cp img 'user_id=1000/i'
    "$fx" -q 'user_id=1000/i' m; "$fx" --umount m; same "$(ours)" ""
}

t_existing_mountpoint_file_is_kept() {
    random img 16; : >m; local inode; inode=$(stat -c %i m)
    "$fx" -q img m; "$fx" --umount m
    same "$(stat -c %i m)" "$inode"
    ln -s m link; "$fx" -q img link; cmp img m; "$fx" --umount link; same "$(stat -c %i m)" "$inode"
}

t_mountpoint_that_is_another_file_is_refused() {
    random whole 300; cp whole img; split -b 500000 -a 3 --numeric-suffixes=1 whole ev.; cp img other; echo x >small; mkfifo pipe
    ln -s ev.003 link; ln ev.003 hard; ln img same; ln -s nowhere/x broken; : >empty; mkdir d; cp ev.001 d/p.01; : >d/p.02
    local m
    for m in ev.003 link hard other small; do
        refused 1 'MOUNTPOINT, the last argument' "$fx" -q ev.001 ev.002 $m
        refused 125 'MOUNTPOINT, the last argument' "$fx" -q -w --format raw img $m -- touch ran
        refused 1 'MOUNTPOINT, the last argument' "$fx" -q --format raw --overlay o img $m
    done
    refused 1 'ev.003: is a file with something' "$fx" -q ev.001 ev.003
    refused 1 'ev.002: is a part' "$fx" -q ev.001 ev.002 ev.002
    refused 1 'p.02: is a part' "$fx" -q d/p.01 d/p.01 d/p.02
    refused 1 'img: is a file with something' "$fx" -q m img                  # swapped
    refused 1 'broken: is a symbolic link that leads nowhere' "$fx" -q img broken
    refused 1 'o: cannot be created' "$fx" -q --format raw --overlay o img o
    refused 1 'e: cannot be created' "$fx" -q --format raw --error-map e img e
    refused 1 'both MOUNTPOINT and --pidfile' "$fx" -q --format raw --pidfile d/../m img m
    local dev; dev=$(losetup -f --show -r other)
    refused 1 'nothing can be mounted' "$fx" -q img "$dev"
    losetup -d "$dev"
    cat ev.00? | cmp - whole; cmp img other
    for m in new empty img same; do "$fx" -q --format raw img $m -- cmp -s $m other; done
    "$fx" -q ev.001 ev.001 -- cmp -s ev.001 whole
    cat ev.00? | cmp - whole; cmp img other; [ ! -e new ] && [ -e empty ]
}

t_odd_names_show_in_the_mount_table() {
    local name='a, b\c "x"'
    random "$name" 16
    "$fx" -q "$name" "m $name"
    cmp "$name" "m $name"
    findmnt -no SOURCE,FSTYPE,OPTIONS "m $name" >shown
    grep -qF "fuse.fuseexp ro,nosuid,nodev,noatime" shown; grep -qF "$PWD/a, b" shown
    "$fx" --umount "m $name"
}

t_mount_8_and_fstab_work() {
    random img 16; mkdir sbin d; ln -s "$fx" sbin/mount.fuse.fuseexp; ln -s "$fx" sbin/mount.fuseexp; : >m
    echo "$PWD/img $PWD/m fuse.fuseexp noauto,nofail,x-systemd.automount,format=raw,offset=4096 0 0" >fstab
    echo "$PWD/img $PWD/d fuseexp user,noauto,format=raw,writable 0 0" >>fstab
    export -f ours gone fail mounts_here leave_others; export build
    fx=$fx unshare -m bash -euc '
        leave_others; mount --bind sbin /usr/sbin
        mount -t fuse.fuseexp -o format=raw,size=8k img m
        cmp -n 8192 img m; [ "$(stat -c %s m)" = 8192 ]; ! printf x 2>/dev/null >>m || exit 1; umount m; gone
        mount -T fstab "$PWD/m"; cmp -i 4096:0 img m; mount -T fstab -a; "$fx" --umount m; gone
        mount -T fstab "$PWD/d"; printf new | dd of=d/disk conv=notrunc status=none; umount d; gone
        mount -r -t fuse.fuseexp -o format=raw,writable img m; ! printf x 2>/dev/null >>m || exit 1; umount m; gone'
    wait_for sh -c 'printf new | cmp -n 3 - img'
    gone
}

t_mount_fuse3_s_rw_writes_nothing() {
    random img 16; cp img copy; mkdir bin; ln -s "$fx" bin/fuseexp
    local helper; helper=$(find /sbin/mount.fuse3 /usr/sbin/mount.fuse3 2>/dev/null | head -n 1)
    PATH=$PWD/bin:$PATH "$helper" img m -o rw,dev,suid,relatime,format=raw -t fuse.fuseexp
    findmnt -no OPTIONS m >opts; grep -q '^ro,nosuid,nodev' opts
    not dd if=/dev/zero of=m count=1 conv=notrunc 2>err
    "$fx" --umount m
    cmp img copy
}

t_mount_options_reach_the_mount() {
    random img 16
    "$fx" -q -o noexec,sync,mode=444 img m
    findmnt -no OPTIONS m | grep -q noexec
    same "$(stat -c %a m)" 444
    "$fx" --umount m
    refused 1 'unknown option.*nonsense' "$fx" -q -o nonsense img m
    refused 2 'needs a value' "$fx" -q -o offset img m
    refused 2 'takes no value' "$fx" -q -o writable=1 img m
}

# ---- plain user ------------------------------------------------------------------------------------------------

user_directory() { chmod 755 .; mkdir u; random u/img 300; chown -R 65534:65534 u; }

t_plain_user_mounts_reads_and_unmounts() {
    user_directory
    as_nobody "$fx" -q u/img u/m
    as_nobody cmp u/img u/m
    ! cat u/m >/dev/null 2>&1 || grep -q user_allow_other /etc/fuse.conf
    same "$(as_nobody stat -c '%a %u' u/m)" "400 65534"
    same "$(as_nobody "$fx" --umount u/m 2>&1)" ""
    [ ! -e u/m ]
    as_nobody "$fx" -q -w u/img u/m; as_nobody sh -c 'printf new | dd of=u/m conv=notrunc,fsync status=none'
    as_nobody fusermount3 -u u/m; gone
    printf 'new' | cmp -n 3 - u/img
    as_nobody mkdir u/d; as_nobody "$fx" -q u/img u/d; as_nobody cmp u/img u/d/disk; "$fx" --umount u/d
    expect 5 as_nobody "$fx" -q u/img u/m -- sh -c 'cmp u/img u/m && exit 5'
    as_nobody "$fx" -q u/img u/m; kill "$(supervisor_of)"; gone
}

t_plain_user_writes_to_an_overlay() {
    user_directory; cp u/img before
    as_nobody sh -ec 'cd u; '"$fx"' -q --format raw --overlay w.qcow2 img m; printf changed | dd of=m conv=notrunc status=none
        [ "$(head -c 7 m)" = changed ]; '"$fx"' --umount m; '"$fx"' -q --format raw --temporary img m -- sh -c "printf x | dd of=m conv=notrunc status=none"'
    cmp u/img before; qemu-img check -q u/w.qcow2
    same "$(stat -c %u u/w.qcow2)" 65534
}

t_plain_user_without_right_or_fusermount3_is_told() {
    user_directory; random img 16; chmod 600 img
    refused 1 'img: Permission denied' as_nobody "$fx" -q img u/m
    refused 1 'cannot be created: Permission denied' as_nobody "$fx" -q u/img m
    : >f; chmod 644 f
    refused 1 'cannot mount: .*Permission denied' as_nobody "$fx" -q u/img f
    refused 1 'cannot run fusermount3.*apt-get install fuse3' as_nobody env PATH=/nowhere "$fx" -q --format raw u/img u/m
}

t_killed_server_of_a_plain_user_leaves_no_mount() {
    user_directory
    as_nobody "$fx" -q u/img u/m
    kill -9 "$(server_of)"
    gone
    [ ! -e u/m ]
}

# ---- the clean-up chain ----------------------------------------------------------------------------------------

# Fails acquisition 1, 2, 3 ... of a start until one runs through, and compares the world before and after each.
check_chain() {
    local n=0 before faults=0 status
    before=$(state)
    trap 'cat err >&2' ERR EXIT      # what the failing step said
    while n=$((n + 1)); do
        status=0
        FUSEEXP_FAIL_AT=$n timeout 60 "$@" >out 2>err </dev/null || status=$?
        if [ $status = 0 ] && grep -q " $PWD/" /proc/self/mountinfo; then
            $undo || fail "step $n could not be undone"
        fi
        gone
        rm -f out
        same "$(state)" "$before"
        if ! grep -q 'FAULT [0-9]' err; then break; fi
        faults=$((faults + 1))
        [ $status != 99 ] && [ $status != 124 ] || fail "status $status at step $n"
        # One line says why, unless the step is one that can be done without.
        [ $status = 0 ] || [ "$(grep -vc 'FAULT\|taken as raw' err)" -ge 1 ] || fail "no word about step $n"
        [ $n -lt 100 ] || fail "no end of steps"
    done
    [ $status = 0 ] || fail "status $status without a fault"
    [ $faults -ge "$least" ] || fail "only $faults steps"
    trap - ERR EXIT
    echo "$faults steps" >&3
}

t_every_failing_step_of_a_daemon_is_undone() {
    random img 16; mkdir d; : >file
    undo="$fx --umount m" least=30 check_chain "$fault" --sandbox=require --pidfile pid img m
    undo="$fx --umount file" least=29 check_chain "$fault" --sandbox=require -w img file
    undo="$fx --umount d" least=29 check_chain "$fault" --sandbox=require --no-passthrough img d
}

t_every_failing_step_in_the_foreground_is_undone() {
    random img 16; mkdir d
    undo=true least=24 check_chain "$fault" --sandbox=require -f -s img m -- true
    undo=true least=24 check_chain "$fault" --sandbox=require -s img d -- true
    # -f without a command ends by a signal; the step that fails is what is looked at.
    undo=true least=20 check_chain sh -c "'$fault' -f -s --sandbox=require img m & p=\$!; i=0
        while kill -0 \$p 2>/dev/null && [ \$((i += 1)) -lt 2000 ]; do grep -q ' $PWD/m ' /proc/self/mountinfo && [ -s m ] && { kill \$p; break; }; sleep 0.02; done; wait \$p"
}

t_every_failing_step_of_a_plain_user_is_undone() {
    user_directory; mkdir u/d; chown 65534 u/d
    undo="$fx --umount u/m" least=25 check_chain "${nobody[@]}" "$fault" -s u/img u/m
    undo=true least=25 check_chain "${nobody[@]}" "$fault" -s u/img u/d -- true
}

# ---- bad input -------------------------------------------------------------------------------------------------

t_bad_input_is_refused_in_one_line() {
    random img 16; mkdir d; : >empty; mkfifo pipe
    refused 1 'missing: No such file' "$fx" -q missing m
    refused 1 'd: is a directory' "$fx" -q d m
    refused 1 'empty: is empty' "$fx" -q empty m
    refused 1 'pipe: neither' "$fx" -q pipe m
    refused 1 'neither a regular file nor a block' "$fx" -q /dev/null m
    refused 1 'directory it should be in' "$fx" -q img no/such/m
    refused 1 'No such directory (mkdir' "$fx" -q img no/
    refused 1 'nothing can be mounted' "$fx" -q img pipe
    refused 1 'no partition 9' "$fx" -q --partition 9 img m
    refused 2 'unknown option --nonsense' "$fx" --nonsense img m
    refused 2 'unknown option -X' "$fx" -X img m
    refused 2 'needs a value' "$fx" img m --offset
    refused 2 'usage' "$fx"
    refused 2 'usage' "$fx" img
    refused 2 'no command after' "$fx" img m --
    refused 2 'goes with --umount' "$fx" -z img m
    refused 2 'one of auto' "$fx" --sandbox=maybe img m
    refused 2 'not a usable' "$fx" --threads=1000 img m
    refused 2 'not a usable' "$fx" --partition=x img m
    refused 2 'not a usable' "$fx" --partition=0 img m
    refused 2 'not a usable' "$fx" --threads=0 img m
    refused 2 'not a usable' "$fx" --size=0 img m
    refused 2 'not a usable' "$fx" --mode=999 img m
    refused 2 'two writers' "$fx" -U -w img m
    refused 2 'goes with -w' "$fx" --growable img m
    refused 2 'whole image' "$fx" -w --growable --offset 1 img m
    refused 2 'read-only export' "$fx" --mode 600 img m
    refused 2 '512 or 4096' "$fx" --sector-size 1024 img m
    refused 1 'without --allow-other=on' "$fx" -q --mode 444 --allow-other=off img m
    refused 2 'one MOUNTPOINT' "$fx" --umount
    refused 2 'not expected' "$fx" --formats img
    refused 1 'control?characters: No such file' "$fx" -q "$(printf 'control\ncharacters')" m
}

t_mistakes_are_told_with_the_way_out() {
    random img 16; mkdir d
    refused 2 'MOUNTPOINT is missing; usage' "$fx" img
    refused 2 'a COMMAND comes after --' "$fx" img m e2fsck -n m
    refused 1 'd/img: No such\|img: is a file with something' "$fx" -q d img
    refused 2 'json goes with --info' "$fx" --json img
    refused 2 'repair goes with --check' "$fx" --repair img
    refused 2 '10MB.*such as.*10M' "$fx" --size 10MB img m
    refused 2 "'nobody' is not a usable value (a number)" "$fx" --uid nobody img m
    refused 2 'd: is a directory.*--temporary=d' "$fx" --temporary d img m
    refused 125 'img: is both IMAGE and --overlay' "$fx" -q --format raw --overlay img img m -- true
    expect 127 "$fx" -q --format raw img m -- 'e2fsck -fn m'; grep -q 'separate words' err
    "$fx" --format raw -f img m 2>log & local pid=$!
    wait_for test -s m; exec 9<m; kill -TERM $pid; wait_for grep -q 'in use' log; kill -TERM $pid; wait $pid || true; exec 9<&-
    grep -q 'cut off at the second signal' log
    "$fx" -q --format raw img m; chmod 755 .
    expect 1 as_nobody "$fx" --umount m; grep -q 'm: was mounted by the user with number 0' err; "$fx" --umount m
}

t_usage_errors_have_a_status_of_their_own() {
    random img 16; qemu-img create -q -f qcow2 q 1M; local args
    for args in '--nonsense img m -- touch ran' '-X img m -- touch ran' '--threads=x img m -- touch ran' 'img -- touch ran' \
        '--overlay o --temporary img m -- touch ran' '-o offset img m -- touch ran' '-z img m -- --check' '--json -- img m -- touch ran'; do
        refused 125 . "$fx" $args
    done
    for args in --check '--check --nonsense q' '--nonsense --check q' '--chec -X q' '--check --repair -U q' '--check --cache-size=x q' \
        '--check --offset=1 q' '--check q -- true' '--check --info q' '-q -o offset --check q'; do
        refused 1 . "$fx" $args
    done
    for args in '--nonsense img m' '--nonsense -- img m' '--info' '--map --offset=1 q' '--umount' '--json img m'; do
        refused 2 . "$fx" $args
    done
    expect 0 "$fx" --check q
    "$fx" -q img m; "$fx" --umount -- m; "$fx" -q -- img m -- cmp img m
}

t_missing_dev_fuse_and_proc_are_told() {
    random img 16
    export -f leave_others
    unshare -m bash -euc '
        leave_others; mount -t tmpfs none /dev; mknod /dev/null c 1 3; ! "$0" -q --format raw img m 2>err || exit 1
        grep -q "/dev/fuse: No such file.*modprobe fuse" err; [ "$(wc -l <err)" = 1 ]; [ ! -e m ]' "$fx"
    unshare -m bash -euc 'leave_others; mount -t tmpfs none /proc; ! "$0" -q --format raw img m 2>err || exit 1; grep -q "is /proc mounted" err' "$fx"
}

t_kernel_that_is_not_allowed_to_mount_is_told() {
    random img 16
    expect 1 setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$fx" -q --format raw img m
    grep -q '^fuseexp: .*/m: cannot mount' err; same "$(wc -l <err)" 1; [ ! -e m ]
}

# ---- sandbox, speed --------------------------------------------------------------------------------------------

t_server_is_locked_in() {
    random img 16
    "$fx" -q --sandbox=require --no-passthrough img m
    local s; s=$(server_of)
    grep -q '^Seccomp:.*2' "/proc/$s/status"; grep -q '^CapEff:.*0000000000000000' "/proc/$s/status"
    grep -q '^CapBnd:.*0000000000000000' "/proc/$s/status"; grep -q 'core file size *0 ' "/proc/$s/limits"
    cmp img m; "$fx" --umount m
    # What Landlock and seccomp refuse: run under gdb's call? No: the fault build tries it itself.
    "$fault" --try-sandbox
}

t_passthrough_serves_without_the_workers() {
    random img 100
    "$fx" -v -f img m 2>log & local pid=$!
    wait_for test -s m
    if grep -q 'no passthrough' log; then umount m; wait $pid; skip "$(grep 'no passthrough' log)"; fi
    cat m >/dev/null; kill -USR1 $pid
    wait_for grep -q ' 0 reads .* passthrough' log
    umount m; wait $pid
    for opt in --no-passthrough --direct-io -U --offset=4096; do
        "$fx" -q -f $opt img m 2>log & pid=$!
        wait_for test -s m
        cat m >/dev/null; kill -USR1 $pid; wait_for grep -q ' reads' log
        [ $opt = -U ] || ! grep -q passthrough log
        umount m; wait $pid
    done
}

t_read_ahead_is_raised() {
    random img 16
    "$fx" -q img m
    same "$(cat /sys/class/bdi/"$(stat -c %d m | awk '{ print "0:" $1 }')"/read_ahead_kb)" 1024
    "$fx" --umount m
}

t_memory_stays_small() {
    truncate -s 4G img
    "$fx" -q -w --no-passthrough img m
    dd if=m of=/dev/null bs=1M count=2000 status=none
    dd if=/dev/zero of=m bs=1M count=500 conv=notrunc status=none
    fio --name=r --filename="$PWD/m" --rw=randrw --bs=4k --size=1G --runtime=2 --time_based --ioengine=libaio --iodepth=32 \
        --direct=1 --output=fio.log
    local kib; kib=$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")
    echo "peak $kib KiB" >&3
    [ "$kib" -le 16384 ] || fail "$kib KiB"
    "$fx" --umount m
}

# ---- sanitizers ------------------------------------------------------------------------------------------------

check_sanitized() {         # VARIANT SANDBOX
    random img 4096; mkdir d
    "$1" -q -f --sandbox=$2 --no-passthrough -w img m 2>log & local pid=$!
    wait_for test -s m
    fio --name=v --filename="$PWD/m" --size=16M --rw=randrw --bsrange=512-256k --blockalign=512 --ioengine=libaio --iodepth=16 \
        --numjobs=4 --runtime=4 --time_based --output=fio.log || { cat fio.log; false; }
    cat m >/dev/null; fallocate -p -o 4096 -l 100000 m; truncate -s 15M m; truncate -s 16M m; kill -USR1 $pid
    cp --sparse=always m copy
    umount m
    wait $pid || { cat log; false; }
    mbr_image
    "$1" -q --sandbox=$2 img d -- sh -c 'cat d/* >/dev/null; ls -la d; stat -f d' >/dev/null 2>>log || { cat log; false; }
    ! grep -q 'Sanitizer\|runtime error' log || { cat log; false; }
}
t_unit_helpers_hold() { for u in ranges text; do "$build/fuseexp-asan" --unit $u; done; }
t_unit_table_cache_gives_the_words_of_the_file() {
    random img 1024
    "$build/fuseexp-asan" --unit cache img; "$build/fuseexp-tsan" --unit cache img
}
t_unit_epochs_end_after_every_request_of_their_time() { "$build/fuseexp-asan" --unit epochs; "$build/fuseexp-tsan" --unit epochs; }
t_unit_writer_keeps_what_interleaved_owners_write() {
    local variant made
    for variant in asan tsan; do
        for made in cluster_size=512 cluster_size=4k extended_l2=on,cluster_size=16k cluster_size=64k; do
            rm -f img; qemu-img create -q -f qcow2 -o $made img 6M
            "$build/fuseexp-$variant" --unit writer img
            qemu-img check -q img; qemu-img compare -q -f qcow2 -F raw img model
        done
    done
}
t_unit_pool_runs_a_job_once_or_never() { "$build/fuseexp-asan" --unit pool; "$build/fuseexp-tsan" --unit pool; }

t_address_sanitizer_finds_nothing_under_load() { check_sanitized "$build/fuseexp-asan" require; }
t_thread_sanitizer_finds_nothing_under_load() { check_sanitized "$build/fuseexp-tsan" off; }

t_malformed_requests_are_survived() {
    random img 16
    "$build/fuseexp-asan" --fuzz-requests 200000 img
    "$build/fuseexp-asan" --fuzz-requests 200000 -w img
}

# ---- lost headers ----------------------------------------------------------------------------------------------

# A disk with an ext4 file system, written to anywhere: ./truth.
lost_disk() {
    truncate -s "${1:-24M}" truth
    mkfs.ext4 -q -b 4096 -d "$top" truth 2>/dev/null || { mkdir -p d; cp "$top"/fuseexp.[ch] d; mkfs.ext4 -q -b 4096 -d d truth; }
    py 'r = random.Random(5); d = open("truth", "r+b")
for i in range(40): d.seek(os.path.getsize("truth") // 2 + r.randrange(os.path.getsize("truth") // 8192) * 4096); d.write(r.randbytes(4096))'
}

wipe() { dd if=/dev/zero of="$1" bs=512 seek="${2:-0}" count="${3:-1}" conv=notrunc status=none; }
noise() { dd if=/dev/urandom of="$1" bs=512 seek="${2:-0}" count="${3:-1}" conv=notrunc status=none; }

t_lost_headers_are_not_raw_disks() {
    local f ext how
    lost_disk
    for f in qcow2:qcow2 vdi:vdi qed:qed vmdk:vmdk parallels:hdd; do
        ext=${f#*:} f=${f%:*}
        for how in wipe noise; do
            qemu-img convert -f raw -O $f truth img.$ext; $how img.$ext
            refused 1 "img.$ext: .* a $f image, but its header is lost.*--header=FILE.*--format raw" "$fx" img.$ext m
            "$fx" -q --format raw img.$ext m -- cmp m img.$ext
        done
        # By what is left of it, whatever it is called.
        case $f in qcow2 | vmdk | vdi | qed) mv img.$ext disk.img; refused 1 "is what is left of a $f image.*--rebuild" "$fx" disk.img m ;; esac
    done
    # VHDX does without its first sector, and a VHD has its footer.
    qemu-img convert -f raw -O vhdx -o subformat=dynamic truth img.vhdx; wipe img.vhdx
    "$fx" img.vhdx m -- cmp m truth 2>err; grep -q 'a vhdx image that has lost its first sector' err
    qemu-img convert -f raw -O vpc -o force_size=on truth img.vhd; noise img.vhd; "$fx" -q img.vhd m -- cmp m truth
    # What begins like a disk is one, whatever it is called; so are flat extents, and files that are called like a disk.
    cp truth disk.vmdk; "$fx" -q disk.vmdk m -- cmp m truth
    truncate -s 4M empty; sfdisk -q empty <<<'2048'; for f in vdi qcow2 vhdx; do cp empty e.$f; "$fx" -q e.$f m -- cmp m empty; done
    random r 64; for f in r-flat.vmdk r-f001.vmdk r.img r; do [ -e $f ] || cp r $f; "$fx" -q $f m -- cmp m r; done
    for f in r.vmdk r.qcow2 r.vdi r.VHD r.hdd; do cp r $f; refused 1 'is called like' "$fx" $f m; done
    # A whole disk behind a header that is not known.
    truncate -s 4M gpt; sfdisk -q gpt <<<$'label: gpt\n2048'; random shifted 5; cat gpt >>shifted
    refused 1 'holds a disk that begins at 20480.*--offset=20480' "$fx" shifted m
    "$fx" -q --format raw --offset=20480 shifted m -- cmp m gpt
}

t_header_of_another_image_of_the_same_kind_will_do() {
    local f ext o n
    lost_disk
    for f in qcow2:qcow2: qcow2:qcow2:cluster_size=4k vdi:vdi: qed:qed: vmdk:vmdk: vmdk:vmdk:subformat=streamOptimized vhdx:vhdx:subformat=dynamic vpc:vhd:force_size=on; do
        o=${f##*:} ext=${f#*:} ext=${ext%%:*} f=${f%%:*}
        qemu-img create -q -f $f ${o:+-o $o} fresh 24M >/dev/null
        qemu-img convert -f raw -O $f ${o:+-o $o} truth img.$ext
        cp img.$ext good; noise img.$ext; cp img.$ext lost
        "$fx" --header=fresh img.$ext m -- cmp m truth 2>err
        grep -q "the first [0-9]* bytes are taken from fresh" err
        cmp img.$ext lost
        "$fx" --map --json --header=fresh img.$ext >/dev/null
    done
    refused 2 'are for reading' "$fx" -w --header=fresh img.vhd m
    refused 1 'is a raw image, which has no header to lend' "$fx" -q --header=truth img.vhd m
    refused 1 'fresh: is a vpc image, not qcow2' "$fx" -q --format qcow2 --header=fresh img.vhd m
    # An overlay remembers how its base was read.
    "$fx" -q --header=fresh --overlay=o img.vhd m -- dd if=truth of=m bs=4k seek=100 count=1 conv=notrunc status=none
    refused 1 'o: ' "$fx" -q --overlay=o img.vhd m
    "$fx" -q --header=fresh --overlay=o img.vhd m -- cmp -n 4096 -i 409600:0 m truth
}

t_qcow2_header_is_put_together_from_its_tables() {
    local o n size
    lost_disk
    for o in cluster_size=512 cluster_size=4k cluster_size=64k cluster_size=2M extended_l2=on,cluster_size=16k extended_l2=on,cluster_size=64k \
        preallocation=metadata lazy_refcounts=on compat=0.10; do
        for n in 1 all; do
            qemu-img convert -f raw -O qcow2 -o $o truth img
            size=$(($(qemu-img info --output=json img | jq '."cluster-size"') / 512))
            [ $n = 1 ] || n=$size
            noise img 0 1; [ $n -le 1 ] || wipe img 1 $((n - 1))
            "$fx" --rebuild img m -- cmp m truth 2>err
            grep -q "header put together: clusters of $((size * 512)) bytes" err
            grep -q 'size taken to be 25165824 bytes, as the disk itself says' err
        done
    done
    for o in zlib zstd; do
        qemu-img convert -c -f raw -O qcow2 -o compression_type=$o truth img; wipe img 0 128; "$fx" -q --rebuild img m -- cmp m truth
    done
    # A backing file: its name is behind the header, or lost as well, and --backing has to name it.
    qemu-img create -q -f qcow2 -b truth -F raw top; qemu-io -c 'write -P 7 1M 1M' top >/dev/null; qemu-img convert -f qcow2 -O raw top want
    cp top img; wipe img; refused 1 "does not say which format its backing file 'truth' has" "$fx" -q --rebuild img m
    "$fx" -q --rebuild --backing-format raw img m -- cmp m want
    wipe img 0 128; "$fx" -q --rebuild --backing truth --backing-format raw img m -- cmp m want
    "$fx" --rebuild img m 2>err; "$fx" --umount m; grep -q 'if it had a backing file, what is there reads as zeros' err
    # What is there is left alone; where nothing is, nothing is made up.
    qemu-img convert -f raw -O qcow2 truth img; "$fx" --rebuild img m -- cmp m truth 2>err; [ ! -s err ]
    random r 64; refused 1 'no L1 table is left' "$fx" -q --rebuild --format qcow2 r m
    qemu-img convert -f raw -O qcow2 truth img; wipe img 0 2048; refused 1 'no L1 table is left' "$fx" -q --rebuild --format qcow2 img m
}

t_vmdk_header_is_put_together_from_its_directories() {
    local size
    for size in 24M 100M 5G; do
        lost_disk $size; qemu-img convert -f raw -O vmdk truth good
        cp --sparse=always good img; noise img; "$fx" --rebuild img m -- cmp m truth 2>err; grep -q 'header put together: grains of 65536 bytes' err
        cp --sparse=always good img; wipe img 0 21; "$fx" -q --rebuild img m -- cmp m truth                     # the descriptor, too
    done
}

t_streams_are_put_together_from_their_markers() {
    local spans s
    lost_disk
    qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth qemu
    vmdk_py 't = open("truth", "rb").read(); open("vmware", "wb").write(stream({i: t[i << 16:i + 1 << 16] for i in range(len(t) >> 16) if any(t[i << 16:i + 1 << 16])}, len(t) // 512,
    descriptor=b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\nRW %d SPARSE \"vmware\"\n" % (len(t) // 512)))'
    for s in qemu vmware; do
        cp $s img; "$fx" --rebuild img m -- cmp m truth 2>err; [ ! -s err ]                                     # nothing is lost
        cp $s img; noise img; "$fx" -q --rebuild img m -- cmp m truth                                           # the header
        cp $s img; noise img 0 128; "$fx" -q --rebuild --on-error=zero img m -- cmp m truth                     # and all before the grains
    done
    # Directory, tables and footer: a stream that was cut off behind its last grain. What lies behind that may be lost.
    py 'import struct; b = open("vmware", "rb").read(); at, last = 128, 128
while at * 512 < len(b):
    v, n, kind = struct.unpack_from("<QII", b, at * 512)
    if n == 0 and kind: break
    last = at = at + (12 + n + 511) // 512
open("cut", "wb").write(b[:at * 512])'
    refused 1 'the footer' "$fx" -q cut m
    cat >cut.py <<'P'
import os
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
for at in range(0, 25165824, 65536):
    want = os.pread(a, 65536, at)
    try: assert os.pread(b, 65536, at) == want, at
    except OSError: assert not any(want), at
P
    "$fx" --rebuild cut m 2>err -- python3 cut.py || { cat err; false; }
    grep -q 'its tables are put together from the markers of [0-9]* grains; something between or behind' err
    # A grain that is overwritten is an error, and so are holes beside it; never zeros or another grain's data.
    for s in qemu vmware; do
        cp $s img; noise img $(($(stat -c %s img) / 1024)) 40; wipe img 0 21
        "$fx" -q --rebuild img m -- python3 -c 'import os
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY); bad = 0
for at in range(0, 25165824, 4096):
    try: assert os.pread(b, 4096, at) == os.pread(a, 4096, at), at
    except OSError: bad += 1
assert 0 < bad <= 16 * 80, bad'
    done
}

# Headers and tables broken by chance and put together: what is shown is the truth, or an error, or nothing. The disk's own bytes are left alone.
t_rebuild_shows_no_other_bytes() {
    rebuild_broken "$fx" "${SEED:-1}" 60
    rebuild_broken "$build/fuseexp-asan" $((${SEED:-1} + 1)) 40
}

rebuild_broken() {      # BINARY SEED N
    random truth 1500; truncate -s 8M truth
    qemu-img convert -f raw -O qcow2 -o cluster_size=4k truth a; qemu-img convert -c -f raw -O qcow2 truth b
    qemu-img convert -f raw -O vmdk truth c; qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth d
    cat >read.py <<'P'
import os
a, b, n = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY), 0
for at in range(0, 8 << 20, 4096):
    try: got = os.pread(b, 4096, at)
    except OSError: continue
    if not got: break       # nothing tells how large the disk was
    assert got == os.pread(a, 4096, at), at
    n += 1
open("read", "w").write(str(n))
P
    py '
import subprocess
fx, seed, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
r = random.Random(seed); good = {f: open(f, "rb").read() for f in "abcd"}
fronts = {"a": 5 * 4096, "b": 4 * 65536 + 64, "c": 128 * 512, "d": 128 * 512}
shown = 0
for i in range(n):
    f = r.choice("abcd"); b = bytearray(good[f])
    b[:512] = r.choice([bytes(512), r.randbytes(512)])
    for k in range(r.randrange(3)):
        at = r.randrange(512, fronts[f]) & ~511; l = r.choice([8, 64, 512])
        b[at:at + l] = r.choice([r.randbytes(l), b"\xff" * l])
    open("img", "wb").write(b)
    p = subprocess.run([fx, "-q", "--sandbox=off", "--rebuild", "--format", "qcow2" if f < "c" else "vmdk", "img", "m", "--", "python3", "read.py"], capture_output=True, text=True, errors="replace", timeout=60)
    assert p.returncode in (0, 125), (seed, i, f, p.returncode, p.stderr)
    if p.returncode == 0: shown += int(open("read").read()) > 0
assert shown > n // 4, shown' "$1" "$2" "$3"
}

# ---- the contest on damaged media ------------------------------------------------------------------------------

contest_py() { cat <<'P'
# contest.py DIRECTORY SEED FILES SAMPLE FORMATS DAMAGES: a disk of FILES files in every format, damaged in every way (SAMPLE of them; 0: all),
# read by fuseexp with each set of options of LADDER and by each peer. A file counts by its blocks: all right, one wrong without an error, or lost.
import fnmatch, hashlib, os, random, shutil, struct, subprocess, sys, time
here, seed, count, sample, only, pattern = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6]
fx, bad_py, ladder = os.environ["FX"], os.environ["BAD_PY"], [o.split() for o in os.environ["LADDER"].split(";")]
os.chdir(here)
SIZE = count << 18
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
def ok(*a, **k):
    try: return subprocess.run(a, **quiet, **k).returncode == 0
    except (OSError, subprocess.TimeoutExpired): return False
def run(*a): subprocess.run(a, check=True, **quiet)
def number(text): return int(hashlib.md5(text.encode()).hexdigest()[:8], 16)

# -- the disk: ext4; a file is the list of its blocks --
rnd = random.Random(seed)
os.mkdir("f")
for i in range(count):
    n = rnd.choice([1, 2, 3, 5, 8, 13, 21, 60]) * 4096 - rnd.choice([0, 0, 100])
    b = rnd.randbytes(n) if i % 2 else b"".join(b"%08x line of file %d\n" % (rnd.getrandbits(32), i) for _ in range(n // 20))[:n]
    open("f/%d" % i, "wb").write(b)
open("disk", "wb").truncate(SIZE)
run("mkfs.ext4", "-q", "-b", "4096", "-d", "f", "disk")
truth = open("disk", "rb").read()
where = {}
for at in range(0, SIZE, 4096): where.setdefault(truth[at:at + 4096], at)
files = []
for i in range(count):
    b = open("f/%d" % i, "rb").read(); b += bytes(-len(b) % 4096)
    files.append([where[b[k:k + 4096]] for k in range(0, len(b), 4096)])

# -- formats: driver, extension, options; what qemu-img makes --
FORMATS = {
    "raw": ("raw", "img", ""), "qcow2": ("qcow2", "qcow2", ""), "qcow2-4k": ("qcow2", "qcow2", "cluster_size=4096"),
    "qcow2-extl2": ("qcow2", "qcow2", "extended_l2=on,cluster_size=128k"), "qcow2-zlib": ("qcow2", "qcow2", "compression_type=zlib"),
    "qcow2-zstd": ("qcow2", "qcow2", "compression_type=zstd"), "qcow2-chain": ("qcow2", "qcow2", ""), "qed": ("qed", "qed", ""), "vdi": ("vdi", "vdi", ""),
    "vpc": ("vpc", "vhd", "subformat=dynamic,force_size=on"), "vpc-fixed": ("vpc", "vhd", "subformat=fixed,force_size=on"), "vhdx": ("vhdx", "vhdx", "subformat=dynamic"),
    "vmdk": ("vmdk", "vmdk", ""), "stream": ("vmdk", "vmdk", "subformat=streamOptimized"), "parallels": ("parallels", "hdd", ""),
}
def make(kind, name):
    driver, _, options = FORMATS[kind]
    o = ["-o", options] if options else []
    more = ["-c"] if kind in ("qcow2-zlib", "qcow2-zstd") else []
    if kind == "qcow2-chain":
        open("half", "wb").write(truth[:SIZE // 2] + bytes(SIZE // 2))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "half", "base")
        more = ["-B", "base", "-F", "qcow2"]
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *o, *more, "disk", name)
    run("qemu-img", "create", "-q", "-f", driver, *o, "fresh", str(SIZE))

# -- where the tables are --
def tables(kind, b):
    driver = FORMATS[kind][0]
    u = lambda code, at: struct.unpack_from(code, b, at)[0]
    if driver == "qcow2":
        cluster, n, l1 = 1 << u(">I", 20), u(">I", 36), u(">Q", 40)
        l2 = [u(">Q", l1 + 8 * i) & 0xfffffffffffe00 for i in range(n)]
        used = [x for x in l2 if x]
        return {"l1": (l1, 8 * n), "l2": (used[0], cluster), "l2-last": (used[-1], cluster), "refcounts": (u(">Q", 48), cluster)}
    if driver == "qed": l1 = u("<Q", 40); return {"l1": (l1, 4096), "l2": (u("<Q", l1), 65536 * 4)}
    if driver == "vdi": m, n = u("<I", 340), u("<I", 384) * 4; return {"map": (m, n), "half-map": (m + n // 8 * 4, n // 8 * 4)}
    if kind == "vpc": t = u(">Q", 16); m, n = u(">Q", t + 16), u(">I", t + 28) * 4; return {"dynamic-header": (t, 1024), "bat": (m, n), "half-bat": (m + n // 8 * 4, n // 8 * 4)}
    if driver == "vhdx":
        out = {"header": (65536, 4096), "regions": (196608, 4096)}
        for i in range(u("<I", 196616)):
            e = 196624 + 32 * i
            out["bat" if b[e:e + 4] == b"\x66\x77\xc2\x2d" else "metadata"] = (u("<Q", e + 16), 4096)
        return out
    if driver == "vmdk":
        gd, rgd = u("<Q", 56) * 512, u("<Q", 48) * 512; gt, rgt = u("<I", gd) * 512, u("<I", rgd) * 512
        return {"gd": [(gd, 512)], "gt": (gt, 2048), "both-gd": [(gd, 512), (rgd, 512)], "both-gt": [(gt, 2048), (rgt, 2048)]}
    if driver == "parallels": n = 4 * u("<I", 32); return {"bat": (64, n), "half-bat": (64 + n // 8 * 4, n // 8 * 4)}
    return {}

def damages(kind, b):
    n, r = len(b), random.Random(seed ^ number(kind))
    def wipe(spans, noise=False):
        x = bytearray(b)
        for at, length in spans if isinstance(spans, list) else [spans]: x[at:at + length] = r.randbytes(length) if noise else bytes(length)
        return x
    yield "none", b, []
    for name, to in ("cut-10%", n * 9 // 10), ("cut-50%", n // 2), ("cut-last-sector", n - 512): yield name, b[:to // 512 * 512], []
    for name, length in ("head-512", 512), ("head-4k", 4096), ("head-64k", 65536): yield name + "-zeros", wipe((0, length)), []
    yield "head-512-noise", wipe((0, 512), True), []
    yield "tail-64k-zeros", wipe((n - 65536, 65536)), []
    for name, spans in tables(kind, b).items(): yield name + "-zeros", wipe(spans), []; yield name + "-noise", wipe(spans, True), []
    for s in "0+1", "1+1", "3+2", "5+2": yield "bad-" + s, b, [s]
    yield "bad-20", b, ["%d+1" % r.randrange(n // 512) for _ in range(20)]
    if kind == "qcow2-chain": yield "no-base", b, None

# What overwrites bytes of the disk itself, so that no reader can tell: raw and fixed ones wherever they are hit, all where the data end.
def tells_nothing(kind, damage): return damage.startswith("tail") or kind in ("raw", "vpc-fixed")

# -- readers: (intact, silently wrong, lost), or None: refused --
def judge(name, holes_are_losses=False):
    try: fd = os.open(name, os.O_RDONLY)
    except OSError: return None
    seen = {}
    def block(at):
        try: b = os.pread(fd, 4096, at)
        except OSError: return None
        return b if len(b) == 4096 and (any(b) or not holes_are_losses) else None
    out = [0, 0, 0]
    for f in files:
        state = 0
        for at in f:
            if at not in seen: seen[at] = block(at)
            if seen[at] is None: state = 2; break
            if seen[at] != truth[at:at + 4096]: state = 1
        out[state] += 1
    os.close(fd)
    return out
def ours(img, options):
    open("m", "w").close()
    p = subprocess.run([fx, "-q", *options, img, "m"], capture_output=True, text=True, timeout=60)
    if p.returncode not in (0, 1): sys.exit("fuseexp %s %s: status %d\n%s" % (options, img, p.returncode, p.stderr))
    out = None if p.returncode else judge("m")
    if not p.returncode: ok(fx, "-q", "--umount", "m")
    return out
def storage_daemon(img, driver):
    open("q", "w").close()
    p = subprocess.Popen(["qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,filename=%s,read-only=on" % img, "--blockdev", "driver=%s,node-name=r,file=f,read-only=on" % driver,
                          "--export", "type=fuse,id=e,node-name=r,mountpoint=q,writable=off"], **quiet)
    while p.poll() is None and not os.path.getsize("q"): time.sleep(.005)
    out = judge("q") if p.poll() is None else None
    p.terminate(); p.wait(); ok("umount", "-l", "q")
    return out
def salvage(img, driver):
    out = judge("salvaged", True) if ok("qemu-img", "convert", "--salvage", "-f", driver, "-O", "raw", img, "salvaged", timeout=60) else None
    if os.path.exists("salvaged"): os.unlink("salvaged")
    return out
def libyal(img, kind):
    tool, inner = {"vpc": ("vhdimount", "vhdi1"), "vhdx": ("vhdimount", "vhdi1"), "vmdk": ("vmdkmount", "vmdk1"), "qcow2": ("qcowmount", "qcow1")}.get(FORMATS[kind][0], ("", ""))
    if not shutil.which(tool) or kind == "qcow2-chain": return None
    os.makedirs("x", exist_ok=True)
    out = judge("x/" + inner) if ok(tool, img, "x", timeout=30) else None
    while os.path.ismount("x"): ok("umount", "x") or time.sleep(.02)
    return out

# -- the contest --
total, faults = {}, []
for kind in FORMATS:
    if not any(fnmatch.fnmatch(kind, p) for p in only.split(",")): continue
    driver, ext, _ = FORMATS[kind]
    img = "img." + ext
    try: make(kind, img)            # by its own name: a descriptor records it
    except subprocess.CalledProcessError: continue          # this qemu-img lacks it
    b = open(img, "rb").read()
    names = [name for name, _, _ in damages(kind, b) if any(fnmatch.fnmatch(name, p) for p in pattern.split(","))]
    if sample: names = random.Random(seed ^ number(kind)).sample(names, min(sample, len(names)))
    for name, damaged, bad in damages(kind, b):
        if name not in names: continue
        feed = None
        open("plain", "wb").write(damaged)
        if bad is None: os.rename("base", "base.away")
        if bad:
            open(img, "w").close(); feed = subprocess.Popen([sys.executable, "-c", bad_py, img, "plain", "0", *bad], **quiet)
            while not os.path.getsize(img): time.sleep(.005)
        else: os.rename("plain", img)
        results = {"fuseexp " + " ".join(o): ours(img, [w.replace("FORMAT", driver) for w in o]) for o in ladder}
        results.update({"storage-daemon": storage_daemon(img, driver), "qemu-img --salvage": salvage(img, driver), "libyal": libyal(img, kind)})
        if feed: ok("umount", img); feed.kill(); feed.wait()
        if bad is None: os.rename("base.away", "base")
        for reader, got in results.items():
            t = total.setdefault(reader, [0, 0, 0, 0])
            for i, n in enumerate(got or (0, 0, 0, 1)): t[i] += n
        best = max((got[0] for reader, got in results.items() if got and not reader.startswith("fuseexp")), default=0)
        mine = max((got[0] for reader, got in results.items() if got and reader.startswith("fuseexp")), default=0)
        if mine < best: faults.append("%s, %s: %d files intact, a peer has %d" % (kind, name, mine, best))
        silent = min((got[1] if got else 0) for reader, got in results.items() if reader.startswith("fuseexp"))
        if silent and not tells_nothing(kind, name): faults.append("%s, %s: %d files are wrong without an error, with every option" % (kind, name, silent))
        print("%-11s %-22s %s" % (kind, name, "  ".join("%-9s" % ("%d/%d" % tuple(got[:2]) if got else "-") for got in results.values())), flush=True)
print("%-34s %s" % ("", "  ".join(total)))
for reader, t in total.items(): print("%-40s %6d files intact, %5d silently wrong, %3d images refused" % (reader, t[0], t[1], t[3]))
for fault in faults: print("FAULT:", fault)
sys.exit(bool(faults))
P
}

# FILES SAMPLE FORMATS DAMAGES, in an empty directory; patterns with commas between. Exit 0: no peer has more files in any case, and none is silently wrong.
contest_in() { FX=$fx BAD_PY=$bad_py LADDER=${LADDER:-;--rebuild;--header=fresh} python3 -c "$(contest_py)" . "${SEED:-1}" "$@"; }

contest() {
    local d ret=0
    make -s -C "$top" BUILD="$build" || return
    d=$(mktemp -d "${TMPDIR:-/dev/shm}/contest.XXXXXX")
    (cd "$d" && contest_in "${FILES:-400}" 0 "${FORMATS:-*}" "${DAMAGES:-*}") || ret=$?
    umount "$d"/* 2>/dev/null
    rm -rf "$d"
    return $ret
}

t_contest_is_won_where_headers_are_lost_and_sectors_are_bad() {
    contest_in 40 3 '*' 'none,head-512*,bad-*,cut-*' >table || { cat table; fail "a peer did better, or files are silently wrong"; }
    [ "$(grep -c 'intact,' table)" -ge 5 ]
}

# ---- other modes -----------------------------------------------------------------------------------------------

# The program with the tests' own main around it: fault hooks, --try-sandbox, --fuzz-*, --unit. The Makefile builds the
# variants fault, asan and tsan from it.
harness() {
    cat <<'END'
/* Made by ./test.sh --harness */
int fuseexp_main(int argc, char **argv);
#define main fuseexp_main
#include "fuseexp.c"
#undef main

/* Does the sandbox refuse what it should, and let work go on? */
static void *test_sandboxed_thread(void *arg)
{
    void *memory = malloc(1 << 20);

    free(memory);
    return memory ? arg : NULL;
}

static int test_try_sandbox(void)
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
    bad |= (pthread_create(&thread, NULL, test_sandboxed_thread, &byte) != 0 ||
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
 * Random requests of every kind and length; what lies behind a request may not be looked at.
 */
static int test_fuzz_requests(unsigned long n, char *path, bool writable)
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
    struct counters count = { .reads = 0 };
    struct worker w = { .srv = &srv, .count = &count, .buf = calloc(1, FOP_BUF) };
    struct part_wanted want = { .offset = 0 };
    struct image_options opt = { .format = "raw" };
    int ret = chain_open(&im, &path, 1, &opt);

    srand(1);
    ret = ret ? ret : part_make_views(&im, &want, views, &srv.n_views);
    for (msg_verbosity = MSG_ERROR; n && !ret; n--) {
        const size_t most = FX_HEAD_ROOM - FX_REQUEST_AT - sizeof(struct fuse_out_header);
        struct fuse_in_header *head = fop_request(&w);
        size_t len = (unsigned)rand() % (rand() % 8 ? 160 : most);
        for (size_t i = 0; i < len; i++)
            w.buf[FX_REQUEST_AT + i] = (uint8_t)(rand() % 3 ? 0 : rand());
        if (len >= sizeof(*head)) {
            head->len = rand() % 16 ? (uint32_t)len : (uint32_t)rand();
            head->opcode = (unsigned)rand() % 56;
            head->nodeid = (unsigned)rand() % 4;
        }
        ASAN_POISON_MEMORY_REGION(w.buf + FX_REQUEST_AT + len, most - len);
        w.ref.length = 0;
        size_t reply = fop_handle(&w, len);
        ASAN_UNPOISON_MEMORY_REGION(w.buf, FX_HEAD_ROOM);
        if (reply > FOP_BUF || (reply && reply < sizeof(struct fuse_out_header)) || im.size > 1ull << 40)
            ret = im.size > 1ull << 40 ? img_resize(&im, 4096, 0) : -EPROTO;
    }
    free(w.buf);
    chain_close(&im);
    return ret ? EXIT_FAILED : EXIT_OK;
}

/* How many blocks of the image differ from the truth; what reads as an error does not. */
static unsigned test_count_wrong(struct image *im, const char *truth)
{
    enum { BLOCK = 4096, PIECE = 64 << 10 };
    static uint8_t got[PIECE], want[PIECE];
    int fd = open(truth, O_RDONLY | O_CLOEXEC);
    unsigned wrong = 0;
    uint64_t done;
    ssize_t n;

    for (uint64_t at = 0; fd >= 0 && at < im->size && (n = pread(fd, want, PIECE, (off_t)at)) > 0; at += (uint64_t)n) {
        bool whole = img_read(im, got, util_min((uint64_t)n, im->size - at), at, &done) == 0;
        for (uint64_t i = 0; i < util_min((uint64_t)n, im->size - at); i += BLOCK) {
            uint64_t len = util_min(util_min(BLOCK, (uint64_t)n - i), im->size - at - i);
            if (whole || img_read(im, got + i, len, at + i, &done) == 0)
                wrong += memcmp(got + i, want + i, len) != 0;
        }
    }
    util_close(&fd);
    return wrong;
}

/*
 * n times, changes one byte of [from, to) of the image, opens and reads all of it, and changes it
 * back. No more than `most` blocks of 4 KiB may differ from the truth; refusals and errors are fine.
 */
static int test_fuzz_image(char *format, unsigned n, char *path, const char *truth, uint64_t from, uint64_t to,
                          unsigned most)
{
    struct image_options opt = { .format = format, .parts = true, .no_backing = true, .lock = true };
    int fd = open(path, O_RDWR | O_CLOEXEC), ret = fd < 0 ? -errno : 0;
    uint8_t good, bad_byte;

    check_look_ms = 2;
    srand(n);
    for (msg_verbosity = MSG_ERROR; n && !ret; n--) {
        struct image im = { 0 };
        off_t at = (off_t)(from + ((uint64_t)rand() << 20 ^ (uint64_t)rand()) % (to - from));
        unsigned wrong = 0;
        ret = pread(fd, &good, 1, at) == 1 ? 0 : -EIO;
        bad_byte = (uint8_t)(rand() % 2 ? good ^ 1 << rand() % 8 : rand());
        if (ret || pwrite(fd, &bad_byte, 1, at) != 1 || cache_start(1 << 20))
            ret = -EIO;
        if (!ret && chain_open(&im, &path, 1, &opt) == 0)
            wrong = test_count_wrong(&im, truth);
        if (wrong > most)
            ret = msg_err(-EPROTO, "byte %" PRIu64 " from %u to %u: %u blocks are wrong", (uint64_t)at, good, bad_byte,
                          wrong);
        chain_close(&im);
        decoded_stop();
        cache_stop();
        if (pwrite(fd, &good, 1, at) != 1)
            ret = -EIO;
    }
    util_close(&fd);
    return ret ? EXIT_FAILED : EXIT_OK;
}

/* -- units: what no image can show -- */

#define UNIT(condition) ((condition) ? (void)0 : (void)(printf("line %d: %s\n", __LINE__, #condition), exit(1)))

static void unit_ranges(void)
{
    enum { END = 500, ROUNDS = 20000 };
    static struct range room[MAX_RANGES];
    struct ranges r = { .range = room };
    bool in[END + 1] = { false };

    srand(1);
    for (unsigned n = 0; n < ROUNDS; n++) {
        unsigned start = (unsigned)rand() % END, end = start + 1 + (unsigned)rand() % (unsigned)(rand() % 8 ? 20 : END - start);
        bool add = rand() % 2;
        end = end > END ? END : end;
        if (add)
            UNIT(util_range_add(&r, start, end));
        else
            util_range_remove(&r, start, end);
        for (unsigned i = start; i < end; i++)
            in[i] = add;
        unsigned at = 0;
        for (unsigned i = 0; i < END; i++) {
            at += at < r.n && r.range[at].end <= i;
            UNIT(in[i] == (at < r.n && i >= r.range[at].start));
            UNIT(util_range_after(&r, i) == at);
        }
        for (unsigned i = 0; i < r.n; i++)
            UNIT(r.range[i].start < r.range[i].end && (i == 0 || r.range[i - 1].end < r.range[i].start));
    }
}

static void unit_text(void)
{
    static const struct { const char *text; uint64_t value; } sizes[] = {
        { "0", 0 }, { "4096", 4096 }, { "0x1000", 4096 }, { "0512", 512 }, { "4k", 4096 }, { "3M", 3 << 20 }, { "1g", 1 << 30 },
        { "9223372036854775807", INT64_MAX }, { "7E", 7ull << 60 },
    };
    static const char *const not_sizes[] = { "", "-1", "+1", " 1", "k", "1kk", "1x", "8E", "9223372036854775808", "0x", "99999999999999999999" };
    uint8_t guid[16], swapped[16];
    char text[64], utf8[64];
    uint64_t value;

    for (size_t i = 0; i < ARRAY_LEN(sizes); i++)
        UNIT(util_parse_size(sizes[i].text, &value) && value == sizes[i].value);
    for (size_t i = 0; i < ARRAY_LEN(not_sizes); i++)
        UNIT(!util_parse_size(not_sizes[i], &value));
    UNIT(text_parse_guid("{00112233-4455-6677-8899-aAbBcCdDeEfF}", guid) && guid[1] == 0x11 && guid[15] == 0xff);
    text_uuid(guid, text);
    UNIT(strcmp(text, "00112233-4455-6677-8899-aabbccddeeff") == 0);
    text_swap_guid(guid, swapped);
    UNIT(swapped[0] == 0x33 && swapped[4] == 0x55 && swapped[6] == 0x77 && swapped[8] == 0x88);
    UNIT(!text_parse_guid("0011", guid) && !text_parse_guid("00112233-4455-6677-8899-aabbccddeefg", guid) &&
         !text_parse_guid("00112233-4455-6677-8899-aabbccddeeff0", guid));
    UNIT(text_to_utf8("windows-1252", "caf\xe9", utf8, sizeof(utf8)) && strcmp(utf8, "caf\xc3\xa9") == 0);
    UNIT(text_from_utf16((const uint8_t *)"\0c\0\xe9\xd8\x3d\xde\0\0\0\0x", 12, true, utf8, sizeof(utf8)) &&
         strcmp(utf8, "c\xc3\xa9\xf0\x9f\x98\x80") == 0);
    UNIT(text_from_utf16((const uint8_t *)"a\0b\0", 5, false, utf8, sizeof(utf8)) && strcmp(utf8, "ab") == 0);
    UNIT(text_from_utf16((const uint8_t *)"a\0\0\xd8" "b\0\0\xdc", 8, false, utf8, sizeof(utf8)) &&   /* halves of a pair */
         strcmp(utf8, "a\xef\xbf\xbd" "b\xef\xbf\xbd") == 0);
    UNIT(text_from_utf16((const uint8_t *)"a\0\0\xd8", 4, false, utf8, sizeof(utf8)) && strcmp(utf8, "a\xef\xbf\xbd") == 0);
    UNIT(!text_from_utf16((const uint8_t *)"a\0b\0", 4, false, utf8, 2));
    UNIT(text_same_but_case("\xc3\x84" "b", "\xc3\x84" "B") && !text_same_but_case("\xc3", "\xc4"));
    UNIT(!text_to_utf8("windows-1252", "too long for the room", utf8, 8) && !text_to_utf8("no such code", "a", utf8, sizeof(utf8)));
}

/* Threads read random words through a cache far smaller than the file. */
static struct file unit_file;
static uint64_t *unit_words;
enum { UNIT_WORDS = 1 << 19, UNIT_THREADS = 4 };

static void *unit_read_words(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    uint64_t pair[2], one;

    for (unsigned n = 0; n < 100000; n++) {
        size_t i = (size_t)(rand_r(&seed) % 8 ? rand_r(&seed) % 4096 : rand_r(&seed) % (UNIT_WORDS - 1)) & ~(size_t)1;
        UNIT(cache_words(&unit_file, i * 8, pair, 2) == 0 && pair[0] == unit_words[i] && pair[1] == unit_words[i + 1]);
        UNIT(cache_word(&unit_file, i * 8, &one) == 0 && one == unit_words[i]);
    }
    return NULL;
}

static void unit_cache(char *path)
{
    pthread_t thread[UNIT_THREADS];
    uint64_t done, word;

    unit_words = malloc(UNIT_WORDS * 8);
    UNIT(unit_words && file_open(&unit_file, path, false) == 0 && unit_file.size == UNIT_WORDS * 8);
    UNIT(file_pread(&unit_file, (uint8_t *)unit_words, UNIT_WORDS * 8, 0, &done) == 0);
    UNIT(cache_start(300000) == 0);
    for (uintptr_t i = 0; i < UNIT_THREADS; i++)
        UNIT(pthread_create(&thread[i], NULL, unit_read_words, (void *)(i + 1)) == 0);
    for (unsigned i = 0; i < UNIT_THREADS; i++)
        pthread_join(thread[i], NULL);
    UNIT(cache_word(&unit_file, UNIT_WORDS * 8, &word) != 0);       /* past the end is an error, not zeros */
    decoded_stop();
    cache_stop();
    file_close(&unit_file);
    free(unit_words);
}

/* Readers use the cell that is current; the writer spoils an old one when the grace period is over. */
static _Atomic unsigned unit_current;
static _Atomic bool unit_over;
static _Atomic unsigned unit_rounds;
static unsigned unit_cell[2];

static void *unit_use_cell(void *arg)
{
    while (!unit_over) {
        epoch_enter();
        const unsigned *cell = &unit_cell[atomic_load(&unit_current)];
        for (unsigned i = 0; i < 2000; i++)     /* longer than counting everybody takes */
            UNIT(*(const volatile unsigned *)cell % 2 == 0);
        epoch_leave();
        unit_rounds++;
    }
    return arg;
}

static void unit_epochs(void)
{
    pthread_t thread[UNIT_THREADS];
    struct epoch_grace g;

    for (unsigned i = 0; i < UNIT_THREADS; i++)
        UNIT(pthread_create(&thread[i], NULL, unit_use_cell, NULL) == 0);
    for (unsigned n = 0; n < 3000 || unit_rounds < 20000; n++) {
        unsigned old = unit_current;
        unit_cell[!old] = 2 * n;
        unit_current = !old;
        epoch_begin_grace(&g);
        while (!epoch_grace_over(&g))
            sched_yield();
        unit_cell[old] = 2 * n + 1;
    }
    unit_over = true;
    for (unsigned i = 0; i < UNIT_THREADS; i++)
        pthread_join(thread[i], NULL);
}

/* A piece that was offered is run once, or lost, or withdrawn; none is run after it was withdrawn. */
enum { UNIT_PIECES = 64 };
static _Atomic unsigned unit_ran[UNIT_PIECES];

static void unit_job(void *arg, uint64_t offset, uint64_t length)
{
    UNIT(arg == unit_ran && offset < UNIT_PIECES && length == 1);
    unit_ran[offset]++;
}

static void *unit_standby(void *arg)
{
    pool_park();
    return arg;
}

static void unit_pool(void)
{
    const struct pool_job job = { unit_job, unit_ran, 0, UNIT_PIECES };
    pthread_t thread[UNIT_THREADS];
    unsigned ran[UNIT_PIECES], total = 0;

    pool_start(3, 3 + UNIT_THREADS);
    for (unsigned i = 0; i < UNIT_THREADS; i++)
        UNIT(pthread_create(&thread[i], NULL, unit_standby, NULL) == 0);
    for (unsigned n = 0; n < 5000; n++) {
        pool_offer(&job, 1);
        for (unsigned spin = n % 7 * 50; spin; spin--)
            sched_yield();
        pool_withdraw(unit_ran, 0, UNIT_PIECES);
        do {                        /* those that had begun end */
            pthread_mutex_lock(&pool.lock);
            total = pool.helping;
            pthread_mutex_unlock(&pool.lock);
        } while (total);
        for (unsigned i = 0; i < UNIT_PIECES; i++) {
            ran[i] = unit_ran[i];
            UNIT(ran[i] <= n + 1);
        }
        sched_yield();
        for (unsigned i = 0; i < UNIT_PIECES; i++)
            UNIT(unit_ran[i] == ran[i]);
    }
    for (unsigned i = 0; i < UNIT_PIECES; i++)
        total += ran[i];
    UNIT(total > 0);
    pool_close();
    for (unsigned i = 0; i < UNIT_THREADS; i++)
        pthread_join(thread[i], NULL);
}

/*
 * The writer without FUSE: each thread owns every fourth piece of a disk, writes, zeroes and syncs, and reads back. In
 * the end the disk is what the model says; qemu-img judges the image.
 */
static struct image unit_image;
static uint8_t *unit_model;
enum { UNIT_PIECE = 3 * 512, UNIT_DISK = 6 << 20 };

static void *unit_write(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg, me = seed % UNIT_THREADS;
    uint8_t back[UNIT_PIECE];
    uint64_t done;

    for (unsigned n = 0; n < 1500; n++) {
        uint64_t i = (uint64_t)rand_r(&seed) % (UNIT_DISK / UNIT_PIECE / UNIT_THREADS) * UNIT_THREADS + me;
        uint8_t *at = unit_model + i * UNIT_PIECE;
        epoch_enter();
        if (rand_r(&seed) % 8) {
            for (size_t k = 0; k < UNIT_PIECE; k++)
                at[k] = (uint8_t)rand_r(&seed);
            UNIT(img_write(&unit_image, at, UNIT_PIECE, i * UNIT_PIECE, false, 0, &done) == 0 && done == UNIT_PIECE);
        } else {
            memset(at, 0, UNIT_PIECE);
            UNIT(img_fallocate(&unit_image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, UNIT_PIECE, i * UNIT_PIECE, false) == 0);
        }
        UNIT(img_read(&unit_image, back, UNIT_PIECE, i * UNIT_PIECE, &done) == 0 && memcmp(back, at, UNIT_PIECE) == 0);
        epoch_leave();
        if (rand_r(&seed) % 100 == 0)
            UNIT(img_sync(&unit_image, false) == 0);
    }
    return NULL;
}

static void unit_writer(char *path)
{
    struct image_options opt = { .format = "qcow2", .lock = true };
    pthread_t thread[UNIT_THREADS];
    int fd;

    unit_image.writable = true;
    unit_model = calloc(1, UNIT_DISK);
    UNIT(unit_model && cache_start(1 << 20) == 0 && chain_open(&unit_image, &path, 1, &opt) == 0);
    UNIT(unit_image.size == UNIT_DISK);
    for (uintptr_t i = 0; i < UNIT_THREADS; i++)
        UNIT(pthread_create(&thread[i], NULL, unit_write, (void *)(i + UNIT_THREADS)) == 0);
    for (unsigned i = 0; i < UNIT_THREADS; i++)
        pthread_join(thread[i], NULL);
    UNIT(img_sync(&unit_image, true) == 0 && !unit_image.failed);
    chain_close(&unit_image);
    decoded_stop();
    cache_stop();
    fd = open("model", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    UNIT(write(fd, unit_model, UNIT_DISK) == UNIT_DISK && close(fd) == 0);
    free(unit_model);
}

static bool test_unit(const char *name, char *path)
{
    if (strcmp(name, "ranges") == 0)
        unit_ranges();
    else if (strcmp(name, "text") == 0)
        unit_text();
    else if (strcmp(name, "cache") == 0)
        unit_cache(path);
    else if (strcmp(name, "epochs") == 0)
        unit_epochs();
    else if (strcmp(name, "pool") == 0)
        unit_pool();
    else if (strcmp(name, "writer") == 0)
        unit_writer(path);
    else
        return false;
    return true;
}

static int count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

int main(int argc, char **argv)
{
    int fds, at_end, status;

    if (argc == 2 && strcmp(argv[1], "--try-sandbox") == 0)
        return test_try_sandbox();
    if (argc >= 4 && strcmp(argv[1], "--fuzz-requests") == 0)
        return test_fuzz_requests(strtoul(argv[2], NULL, 10), argv[argc - 1], argc == 5);
    if (argc == 9 && strcmp(argv[1], "--fuzz-image") == 0)
        return test_fuzz_image(argv[2], (unsigned)atoi(argv[3]), argv[4], argv[5], strtoull(argv[6], NULL, 0),
                               strtoull(argv[7], NULL, 0), (unsigned)atoi(argv[8]));
    if (argc >= 3 && strcmp(argv[1], "--unit") == 0)
        return !test_unit(argv[2], argv[argc - 1]);
    main_open_stdio();
    fds = count_fds();
    status = fuseexp_main(argc, argv);
    at_end = count_fds();           /* 0: the sandbox does not let us see */
    if (at_end && at_end + util_n_closed != fds)
        status = msg_err(99, "FAULT: %d descriptors at the end, %d at the start", at_end, fds);
    return status;
}
END
}

# The house rules of fuseexp.c that no compiler knows: prints what breaks them.
lint_rooms() {
    python3 - "$top/fuseexp.c" "$top/fuseexp.h" <<'END'
import re, sys
bad = []
text = open(sys.argv[1]).read()
lines = text.split('\n')
comment = ' ' * 0

# Contents list = banners.
top = text[:text.index('#include')]
contents = [(int(n), name) for n, name in re.findall(r'^ \* +(\d+)\. (\S.*?)(?:  .*)?$', top, re.M)]
banners = [(int(m.group(1)), m.group(2), text.count('\n', 0, m.start()) + 1)
           for m in re.finditer(r'^/\* \*{50,} \*\n \* (\d+)\. (.*)$', text, re.M)]
if contents != [b[:2] for b in banners]:
    bad.append('contents list and banners differ: %s' % sorted(set(contents) ^ set(b[:2] for b in banners)))
names = {n: name for n, name, _ in banners}

def room(line):
    return max([n for n, _, at in banners if at <= line], default=0)

# Code without comments and texts, line by line.
blank = lambda m: re.sub(r'[^\n]', ' ', m.group(0))
code = re.sub(r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S).split('\n')
defined = {}                            # function: the line of its name
inside = [None] * len(lines)
now = None
for i, line in enumerate(code):
    if line == '{':
        head = i - 1
        while not re.match(r'\w', code[head]):
            head -= 1
        # the last call-like name of the head that is no attribute
        names_here = [m.group(1) for m in re.finditer(r'\b(\w+)\(', ' '.join(code[head:i])) if m.group(1) not in ('__attribute__', 'format')]
        now = names_here[0]
        defined[now] = head + 1
    inside[i] = now
    if line == '}':
        now = None

# No call from a lower room to a higher one.
upward = set()                          # (caller, called): none is needed
for i, line in enumerate(code):
    for word in re.findall(r'\b[a-z]\w*\b', line):
        if inside[i] and word in defined and room(defined[word]) > room(i + 1) and (inside[i], word) not in upward:
            bad.append('%d: %s() of "%s" uses %s() of the higher "%s"' % (i + 1, inside[i], names[room(i + 1)], word, names[room(defined[word])]))

# A room's functions have its prefix.
prefixes = {n: re.findall(r'\b\w+_(?=[ ,]|$)', re.search(r'^ \* +%d\. (.*)$' % n, top, re.M).group(1)) for n in names}
for name, at in defined.items():
    own = prefixes.get(room(at), [])
    if name != 'main' and own and not name.startswith(tuple(own)) and not re.match(r'[lb]e\d\d_to_cpu|cpu_to_[lb]e\d\d', name):
        bad.append('%d: %s() has not the prefix of "%s"' % (at, name, names[room(at)]))

# Formats are known by their table alone.
for i, line in enumerate(code):
    if re.search(r'&\w+_format\b', line) and names[room(i + 1)] != 'Probing':
        bad.append('%d: names a particular format' % (i + 1))

# System calls on images are made in "Host files" alone; the other rooms here make them on what is no image.
calls = r'(?<![\w.>])(p?readv?2?|p?writev?2?|f?stat|lstat|fstatat|statx|open|openat2?|close|creat|f?truncate|fallocate|lseek|f(data)?sync|sync_file_range|' \
        r'copy_file_range|posix_fadvise|readahead|f?access(at)?|realpath|readlink(at)?|f?statfs|unlink(at)?|link(at)?|rename(at2?)?|flock|fcntl|(util_)?ioctl|' \
        r'splice|vmsplice|tee|sendfile|mkstemp|mkostemp|syscall)\(|(?:->|\.)(?:direct_)?fd\b'
may_call = ('Messages', 'Utilities', 'Output', 'Host files', 'Lost ranges', 'Worker loop', 'Sandbox', 'Mounts', 'Life cycle', 'One-shot commands', 'Main')
for i, line in enumerate(code):
    m = re.search(calls, line)
    if inside[i] and ((m and names[room(i + 1)] not in may_call) or (re.search(r'files(\[\w+\])?(\.|->)fd\b', line) and names[room(i + 1)] != 'Host files')):
        bad.append('%d: a system call or descriptor of an image outside of "Host files"' % (i + 1))

# The map in README leads to the right room.
for name, where in re.findall(r'^    \S.* (\w+)\(\), (.*)$', open(sys.argv[1].replace('fuseexp.c', 'README')).read(), re.M):
    if name not in defined or names[room(defined[name])] != where:
        bad.append('README: %s() is not in "%s"' % (name, where))

# A comment stands on what it explains: none is followed by another, none by nothing.
for f in sys.argv[1:]:
    t = open(f).read()
    for m in re.finditer(r'^( *)/\*(?:[^*]|\*(?!/))*\*/\n(?=\1/\*(?! \*\*\*\*)(?! ----))', t, re.M):
        if '****' not in m.group(0) and ' -- ' not in m.group(0) and '----' not in m.group(0) and 'SPDX' not in m.group(0):
            bad.append('%s:%d: a comment followed by a comment' % (f.rsplit('/', 1)[1], t.count('\n', 0, m.start()) + 1))
    for n, line in enumerate(t.split('\n'), 1):
        if len(line) > 120:
            bad.append('%s:%d: longer than 120 columns' % (f.rsplit('/', 1)[1], n))
print('\n'.join(bad))
sys.exit(bool(bad))
END
}

lint() {
    local bad=0
    lint_rooms || bad=1
    (cd "$top" && grep -nE '/(farm|work)/' Makefile README fuseexp.[ch] .ci/run) && bad=1
    [ $bad = 0 ] && echo "lint: contents and banners agree, no room calls a higher one"
    return $bad
}

demo() {
    local dir; dir=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "clean_up '$dir'" EXIT
    cd "$dir" && mkdir files mnt && echo 'Hello from inside the image.' >files/hello.txt
    PATH=$build:$PATH
    set -e
    set -x
    mkfs.ext4 -q -d files disk.img 16M
    qemu-img convert -c -f raw -O qcow2 disk.img disk.qcow2
    fuseexp disk.qcow2 disk.raw
    findmnt -o TARGET,SOURCE,FSTYPE,OPTIONS disk.raw
    mount -o ro,loop disk.raw mnt
    cat mnt/hello.txt
    umount mnt
    fuseexp --umount disk.raw
    fuseexp --overlay changes.qcow2 disk.qcow2 disk.raw
    mount -o loop disk.raw mnt
    echo 'Hello from the overlay.' >mnt/new.txt
    umount mnt
    fuseexp --umount disk.raw
    fuseexp changes.qcow2 disk.raw -- debugfs -R 'cat new.txt' disk.raw | grep 'Hello from the overlay'
    ls
    { set +x; } 2>/dev/null
    echo "The demo worked: a compressed qcow2 image was exported, loop-mounted, read, and written through an overlay; all mounts are gone again."
}

# One table per kind of image, all in one run: columns are peers, rows are works; fio's JSON is the source. Images lie in a tmpfs.
bench_fio() {       # FILE FIELD fio options: iops or MiB/s
    local file=$1 field=$2
    shift 2
    fio --name=b --filename="$file" --runtime="${BENCH_SECONDS:-2}" --time_based --output-format=json --group_reporting "$@" 2>/dev/null |
        jq -r "[.jobs[] | .read.$field + .write.$field] | add | if \"$field\" == \"bw\" then . / 1024 else . end | floor" 2>/dev/null || echo 0
}

bench_rate() {      # COMMAND...: MiB/s for the size of the image
    local ns
    ns=$(date +%s%N)
    "$@" >/dev/null 2>&1 || { echo 0; return; }
    ns=$(($(date +%s%N) - ns))
    echo $((size / 1048576 * 1000000000 / ns))
}

bench_cp() {        # FILE: a file copied into ext4 on a loop device over the export, synced
    local dev ns
    mkdir -p mnt
    dev=$(losetup -f --show "$1") || { echo 0; return; }
    mkfs.ext4 -q -E lazy_itable_init=0 "$dev" && mount "$dev" mnt || { losetup -d "$dev"; echo 0; return; }
    ns=$(date +%s%N)
    cp "$data/random" mnt/ && sync -f mnt
    ns=$(($(date +%s%N) - ns))
    umount mnt; losetup -d "$dev"
    echo $(($(stat -c %s "$data/random") / 1048576 * 1000000000 / ns))
}

bench_one() {       # WORK FILE
    local w=(--ioengine=psync --direct=1)
    case $1 in
    seq1M) bench_fio "$2" bw --readonly --rw=read --bs=1M "${w[@]}" ;;
    cold) echo 1 >/proc/sys/vm/drop_caches; bench_rate dd if="$2" of=/dev/null bs=128k ;;
    rand4k-qd1) bench_fio "$2" iops --readonly --rw=randread --bs=4k "${w[@]}" ;;
    rand4k-qd32) bench_fio "$2" iops --readonly --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32 ;;
    rand4k-4jobs) bench_fio "$2" iops --readonly --rw=randread --bs=4k --numjobs=4 "${w[@]}" ;;
    rand64k-4jobs) bench_fio "$2" bw --readonly --rw=randread --bs=64k --numjobs=4 "${w[@]}" ;;
    fits) dd if="$2" of=/dev/null bs=1M count=40 iflag=direct status=none
        bench_fio "$2" iops --readonly --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32 --size=40M ;;
    write4k-4jobs) bench_fio "$2" iops --rw=randwrite --bs=4k --numjobs=4 "${w[@]}" ;;
    write4k-qd32) bench_fio "$2" iops --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 ;;
    newseq) bench_rate dd if=/dev/zero of="$2" bs=1M count=$((size / 1048576)) oflag=direct conv=notrunc,fsync ;;
    newrand) bench_fio "$2" bw --rw=randwrite --bs=64k --size="$size" --io_size="$size" --runtime=60 --time_based=0 --direct=1 --ioengine=libaio --iodepth=16 --end_fsync=1 ;;
    fsync) bench_fio "$2" iops --rw=randwrite --bs=4k --fsync=1 --direct=1 --ioengine=psync ;;
    cp) bench_cp "$2" ;;
    esac
}
bench_unit() { case $1 in *qd1 | *qd32 | *4k-4jobs | fits | fsync) echo IOPS ;; ready) echo us ;; memory) echo 'KiB peak' ;; *) echo MiB/s ;; esac; }

# What every set has: format, works, and whether they write. Peers of a format that cannot do it are left out.
bench_sets=(raw qcow2 zlib zstd fits qcow2-write qcow2-new vpc vhdx vdi vmdk stream)
bench_set() {       # SET: sets $format, $works, $mode, $size
    mode=r format=qcow2 works=(seq1M cold rand4k-qd32 rand4k-4jobs)
    case $1 in
    raw) format=raw works=(seq1M cold rand4k-qd1 rand4k-qd32 rand4k-4jobs rand64k-4jobs) ;;
    zlib | zstd | stream) works=(seq1M cold) ;;
    fits) works=(fits) ;;
    qcow2-write) works=(write4k-qd32 write4k-4jobs) mode=w ;;
    qcow2-new) works=(newseq newrand fsync cp) mode=w ;;
    vpc | vhdx | vdi | vmdk) format=$1 ;;
    esac
    [ "$1" != stream ] || format=vmdk
    size=$(stat -c %s "$data/disk")
}

bench_image() {     # SET: makes ./img
    case $1 in
    raw) ln -f "$data/disk" img ;;
    qcow2 | qcow2-write) qemu-img convert -f raw -O qcow2 "$data/full" img ;;
    qcow2-new) qemu-img create -q -f qcow2 img "$size" ;;
    zlib | fits) qemu-img convert -c -f raw -O qcow2 "$data/disk" img ;;
    zstd) qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd "$data/disk" img ;;
    stream) qemu-img convert -f raw -O vmdk -o subformat=streamOptimized "$data/disk" img ;;
    *) qemu-img convert -f raw -O "$1" "$data/full" img ;;
    esac
}

# Starts a peer on ./img at ./m; sets $ready (microseconds until the file can be read) and $file. False: not installed, or cannot.
bench_start() {     # PEER
    local begin write=() ro=on
    file=$PWD/m
    [ $mode = r ] || { write=(-w); ro=off; }
    begin=$(date +%s%N)
    case $1 in
    native) [ $format = raw ] || return 1; file=$PWD/img ;;
    fuseexp) [ $format = raw ] || return 1; "$fx" -q "${write[@]}" img m ;;
    fuseexp-workers) "$fx" -q --no-passthrough "${write[@]}" img m ;;
    fuseexp-old) [ -x "$build/fuseexp-old" ] || return 1; "$build/fuseexp-old" -q --no-passthrough "${write[@]}" img m ;;
    qemu-storage-daemon)
        : >m
        qemu-storage-daemon --blockdev "driver=file,node-name=f,filename=img,cache.direct=off,read-only=$ro" \
            --blockdev "driver=$format,node-name=r,file=f,read-only=$ro" \
            --export "type=fuse,id=e,node-name=r,mountpoint=m,writable=$([ $ro = on ] && echo off || echo on)" & peer=$! ;;
    nbdfuse)
        [ $mode = r ] || return 1
        : >m
        if [ $format = raw ]; then nbdfuse m --command nbdkit -s -r file img & peer=$!; else nbdfuse m '[' qemu-nbd -r -f $format img ']' & peer=$!; fi ;;
    xmount)
        [ $format = raw ] && [ $mode = r ] || return 1
        mkdir -p x
        xmount --in raw img --out raw x >/dev/null 2>&1 || return 1
        file=$PWD/x/img.dd
        [ -e "$file" ] || file=$(find x -type f ! -name '*.info' | head -n 1) ;;
    libyal)                                 # vhdimount, vmdkmount, qcowmount
        [ $mode = r ] || return 1
        mkdir -p x
        case $format in
        qcow2) qcowmount img x >/dev/null 2>&1 && file=$PWD/x/qcow1 ;;
        vpc | vhdx) vhdimount img x >/dev/null 2>&1 && file=$PWD/x/vhdi1 ;;
        vmdk) vmdkmount img x >/dev/null 2>&1 && file=$PWD/x/vmdk1 ;;
        *) return 1 ;;
        esac || return 1 ;;
    esac
    until [ -s "$file" ] && dd if="$file" of=/dev/null bs=1 count=1 status=none 2>/dev/null; do
        [ $(($(date +%s%N) - begin)) -lt 5000000000 ] || return 1
        sleep 0.001
    done
    ready=$((($(date +%s%N) - begin) / 1000))
}

bench_memory() {    # PEER: peak resident KiB of the process that serves
    local pid
    case $1 in
    fuseexp*) pid=$(server_of) ;;
    native) echo - && return ;;
    libyal) pid=$(pgrep -x 'vhdimount|vmdkmount|qcowmount' | tail -n 1) ;;
    xmount) pid=$(pgrep -x xmount | tail -n 1) ;;
    *) pid=$(pgrep -x "$(echo "$1" | cut -c1-15)" | head -n 1) ;;
    esac
    awk '/VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null || echo -
}

bench_stop() {
    [ "$file" = "$PWD/img" ] && return
    umount m 2>/dev/null || umount x 2>/dev/null
    [ -z "$peer" ] || { kill "$peer" 2>/dev/null; wait "$peer" 2>/dev/null; }
    peer=
    gone
    rm -f m
}

# A disk as they are: ext4 with a part of this system's files, and room; and one full of them.
bench_data() {
    data=$dir/data; mkdir -p "$data/tree"
    find /usr/bin /usr/include /usr/share -xdev -type f -printf '%s %p\n' | LC_ALL=C sort -k2 |
        awk -v most=$((${BENCH_MIB:-512} * 700000)) '{ h = ($1 * 7919 + NR * 104729) % 997; if (h < 300 && sum + $1 < most) { sum += $1; print $2 } }' |
        tar c -C / -T - 2>/dev/null | tar x -C "$data/tree"
    mkfs.ext4 -q -b 4096 -d "$data/tree" "$data/disk" "${BENCH_MIB:-512}M"
    dd if=/dev/urandom of="$data/full" bs=1M count="${BENCH_MIB:-512}" status=none
    dd if=/dev/urandom of="$data/random" bs=1M count=$((${BENCH_MIB:-512} * 3 / 4)) status=none
    rm -rf "$data/tree"
}

bench() {
    local dir data set peers=() all=(native fuseexp fuseexp-workers fuseexp-old qemu-storage-daemon nbdfuse xmount libyal) p w round peer='' file='' ready='' v
    local mode format works size
    declare -A got
    dir=$(mktemp -d /dev/shm/fuseexp-bench.XXXXXX)
    export FXTEST=$dir
    # shellcheck disable=SC2064
    trap "clean_up '$dir'" EXIT
    cd "$dir" || return 1
    bench_data
    for p in qemu-storage-daemon nbdfuse xmount vhdimount vmdkmount qcowmount; do command -v $p >/dev/null || echo "(no $p on this machine)"; done
    for set in ${BENCH_SETS:-${bench_sets[@]}}; do
        bench_set "$set"
        got=() peers=()
        # Round by round through all peers, so that a change of the machine's mood hits them all.
        for round in $(seq "${BENCH_ROUNDS:-3}"); do
            for p in ${BENCH_PEERS:-"${all[@]}"}; do
                for w in "${works[@]}"; do
                    # What is read can be read again; what is to be allocated must be new.
                    { [ $mode = r ] && [ "$w" != "${works[0]}" ]; } || {
                        bench_stop_if_running
                        [ $mode = r ] && [ -e img ] || { rm -f img; bench_image "$set"; }
                        bench_start "$p" 2>/dev/null || { bench_stop; continue 2; }
                    }
                    got[$p,$w]+=" $(bench_one "$w" "$file")"
                    [ $mode = r ] || bench_stop
                done
                got[$p,ready]+=" $ready"
                [ $mode = w ] || got[$p,memory]+=" $(bench_memory "$p")"
                case " ${peers[*]} " in *" $p "*) ;; *) peers+=("$p") ;; esac
                [ $mode = w ] || bench_stop
            done
        done
        bench_stop_if_running
        bench_print "$set"
        rm -f img
    done
    echo "(x: against qemu-storage-daemon; cold: dd bs=128k through the page cache; cp: into ext4 on a loop device; the others O_DIRECT)"
}

bench_stop_if_running() { [ -z "$file" ] || bench_stop; file=; }

bench_median() { [ $# = 0 ] || echo "$@" | tr ' ' '\n' | sort -n | sed -n "$((($# + 1) / 2))p"; }

bench_print() {     # SET
    local w p base
    printf '%-22s' "$1"
    printf '%21s' "${peers[@]}"
    printf '\n'
    for w in "${works[@]}" ready memory; do
        base=$(bench_median ${got[qemu-storage-daemon,$w]:-})
        [ -n "${got[${peers[0]},$w]:-}" ] || continue
        printf '%-22s' "$w, $(bench_unit $w)"
        for p in "${peers[@]}"; do
            v=$(bench_median ${got[$p,$w]:--})
            printf '%21s' "$v$([ -n "$base" ] && [ "$v" != - ] && [ "$base" != - ] && [ "$base" != 0 ] && awk "BEGIN { printf \" (%.2fx)\", $v / $base }")"
        done
        printf '\n'
    done
}

soak() {
    local end=$((SECONDS + ${SOAK_SECONDS:-1800})) n=0 dir; dir=$(mktemp -d)
    cd "$dir" && random img 4096
    while [ $SECONDS -lt $end ]; do
        n=$((n + 1))
        "$fx" -q -w "$([ $((n % 2)) = 0 ] && echo --no-passthrough || echo --direct-io)" img m || break
        fio --name=s --filename="$PWD/m" --size=16M --rw=randrw --bs=4k --runtime=1 --time_based --ioengine=libaio --iodepth=8 --output=fio.log &
        sleep "0.$((RANDOM % 10))"
        case $((n % 4)) in
        0) kill -9 "$(server_of)" ;;
        1) kill "$(supervisor_of)" ;;
        2) umount -l m ;;
        3) wait; "$fx" --umount m ;;
        esac
        wait
        gone || break
    done
    clean_up "$dir"
    [ $SECONDS -ge $end ] || { echo "soak: round $n failed" >&2; return 1; }
    echo "soak: $n rounds, nothing left behind"
    KILLS=200 run '*killed_again_and_again*'
}

# run_case DIRECTORY NUMBER CASE: what there is to tell goes to DIRECTORY/tap, whole at once
run_case() {
    local dir status=0 start
    dir=$(mktemp -d /tmp/fuseexp-test.XXXXXX)
    start=$(date +%s%N)
    (cd "$dir" && export FXTEST=$dir && exec 3>"$1/note" && set -eu && { [ -z "${TRACE:-}" ] || set -x; } && "t_$3") >"$1/log" 2>&1 </dev/null
    status=$?
    [ -z "${TIMES:-}" ] || echo "$((($(date +%s%N) - start) / 1000000)) ms" >>"$1/note"
    case $status in
    0) echo "ok $2 - $3$(sed 's/^/ # /' "$1/note" | tr -d '\n')" ;;
    77) echo "ok $2 - $3 # SKIP $(sed 's/^SKIP: //' "$1/note")" ;;
    *) echo "not ok $2 - $3" && sed 's/^/# /' "$1/log" | tail -n 30 ;;
    esac >"$1/told"
    clean_up "$dir" >/dev/null 2>&1
    mv "$1/told" "$1/tap"
}

# Which make targets do these cases use, by themselves or in the functions that they call?
need_variants() {
    local text='' more f round
    for f in "$@"; do text+=$(declare -f "t_$f"); done
    for round in 1 2; do
        more=
        for f in $(declare -F | awk '$3 !~ /^t_/ { print $3 }'); do case $text in *"$f "* | *"$f;"*) more+=$(declare -f "$f") ;; esac; done
        text+=$more
    done
    echo all
    for f in fault asan tsan; do case $text in *"fuseexp-$f"* | *"\$$f"*) echo $f ;; esac; done
}

worker() {          # CASE...: who makes a case's directory runs it
    local n=0
    for t in "$@"; do n=$((n + 1)); mkdir "$bin/$n" 2>/dev/null && run_case "$bin/$n" $n "$t"; done
}

# Cases wait more than they compute: as many run at once as there are processors, or JOBS. They are told in their order.
run() {
    local n=0 job bad ok skipped list
    [ "$(id -u)" = 0 ] || { echo "the tests need root (they mount, and become nobody)" >&2; exit 1; }
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
    # What systemd and udev do on an ordinary system, and the plain user needs: a mount table, /dev/fuse for everyone,
    # and programs that can be reached.
    [ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
    fuse_mode=$(stat -c %a /dev/fuse)
    bin=$(mktemp -d /tmp/fuseexp-bin.XXXXXX)
    trap 'chmod "$fuse_mode" /dev/fuse; rm -rf "$bin"' EXIT
    chmod 666 /dev/fuse
    list=$(cases "$@")
    for t in "$@"; do [ -n "$(cases "$t")" ] || { echo "no case is called '$t' (-l lists them)" >&2; exit 2; }; done
    # Up to date for `make check`; a case run by its name builds the variants that it uses.
    need_variants $list | xargs -r make -s -C "$top" BUILD="$build" || { echo "cannot build what the cases need" >&2; exit 1; }
    chmod 755 "$bin" && cp "$build"/fuseexp* "$bin" && build=$bin && fx=$bin/fuseexp && fault=$bin/fuseexp-fault
    echo "TAP version 13"
    for job in $(seq "${JOBS:-$(nproc)}"); do
        worker $list &
    done
    for t in $list; do
        n=$((n + 1))
        until [ -e "$bin/$n/tap" ] || [ -z "$(jobs -rp)" ]; do sleep 0.05; done
        tee -a "$bin/all" <"$bin/$n/tap"
    done
    bad=$(grep -c '^not ok' "$bin/all") skipped=$(grep -c '^ok.* # SKIP' "$bin/all") ok=$(($(grep -c '^ok' "$bin/all") - skipped))
    echo "1..$n"
    echo "$ok passed, $bad failed, $skipped skipped"
    [ $n -gt 0 ] && [ $((ok + skipped)) = $n ]
}

cases() {
    local t p
    for t in $(sed -n 's/^t_\([a-z0-9_]*\)() .*/\1/p' "$top/test.sh"); do
        [ $# -gt 0 ] || echo "$t"
        # shellcheck disable=SC2254
        for p in "$@"; do case $t in $p) echo "$t" && break ;; esac; done
    done
}

case ${1:-} in
-l) shift && cases "$@" ;;
--demo) demo ;;
--bench) bench ;;
--contest) contest ;;
--lint) lint ;;
--soak) soak ;;
--harness) harness ;;
-h | --help) sed -n '/^# Tests of/,/^# Needs root/s/^# \{0,1\}//p' "$top/test.sh" ;;
-*) echo "$0: there is no option $1 (--help lists them)" >&2; exit 2 ;;
*) run "$@" ;;
esac
