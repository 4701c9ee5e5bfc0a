# SPDX-License-Identifier: MIT
# fuseexp: a disk image appears as one plain raw file.
#
#   make demo     everything from nothing to a mounted file system (Debian 12, as root)
#   make check    builds and runs all tests
#   make help     lists the targets
#
# May be overridden: MUSL_CC CC CFLAGS LDFLAGS PREFIX DESTDIR BUILD; V=1 shows the commands. What the build itself
# cannot do without stands in the lower-case variables below.

MUSL_CC ?= musl-gcc
CFLAGS  ?= -O2 -g
PREFIX  ?= /usr/local
BUILD   ?= build
WERROR  ?= $(if $(CI),-Werror)
Q       := $(if $(V),,@)

deps     := $(BUILD)/deps
warnings := -Wall -Wextra -Wshadow -Wvla -Wundef -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
            -Wcast-align -Wwrite-strings -Wconversion -Wformat=2 -Wimplicit-fallthrough $(WERROR)
required := -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -DFUSE_USE_VERSION=314 -pthread $(warnings)
# Same sources, same bytes: no path of the build directory ends up in the binary.
repro    := -ffile-prefix-map=$(CURDIR)=. -fno-ident -Wl,--build-id=none
hardened := -fstack-protector-strong -fno-plt -D_FORTIFY_SOURCE=2
static   := -static -isystem $(deps)/include -isystem $(deps)/include/fuse3 -idirafter $(deps)/kernel
libs     := -L$(deps)/lib -lfuse3 -ldeflate -lzstd -Wl,--gc-sections -Wl,-z,relro,-z,now
glibc     = $(shell pkg-config --cflags fuse3 2>/dev/null | sed 's/-I/-isystem /g')
glibc_l   = $(shell pkg-config --libs fuse3 libdeflate libzstd 2>/dev/null)

# Debian packages: what building needs, what the demo and the tests need on top.
pkg_build := gcc libc6-dev musl-tools meson ninja-build pkg-config dpkg-dev linux-libc-dev ca-certificates
pkg_demo  := $(pkg_build) e2fsprogs mount fuse3 qemu-utils
pkg_check := $(pkg_demo) libfuse3-dev libdeflate-dev libzstd-dev jq fio xfsprogs fdisk dosfstools gddrescue \
             zstd lz4 xz-utils bzip2 strace procps util-linux python3 clang-tidy cppcheck shellcheck man-db
pkg_bench := $(pkg_check) qemu-system-common libnbd-bin nbdkit xmount libqcow-utils libvhdi-utils libvmdk-utils

all: $(BUILD)/fuseexp ## builds the static binary, build/fuseexp (the default)

$(BUILD)/fuseexp: fuseexp.c fuseexp.h Makefile $(deps)/.done
	$(Q)$(MUSL_CC) $(required) $(repro) $(hardened) $(CFLAGS) $(static) -ffunction-sections fuseexp.c -o $@.debug $(LDFLAGS) $(libs)
	$(Q)strip -o $@ $@.debug && echo "built $@ ($$(stat -c %s $@) bytes)"

# The program inside of the tests' own main, see harness() in test.sh.
$(BUILD)/harness.c: test.sh
	@mkdir -p $(BUILD)
	@./test.sh --harness >$@

# The same binary with every start-up step and host operation able to fail on demand (FUSEEXP_FAIL_AT).
$(BUILD)/fuseexp-fault: $(BUILD)/harness.c fuseexp.c fuseexp.h Makefile $(deps)/.done
	$(Q)$(MUSL_CC) $(required) $(repro) $(hardened) $(CFLAGS) -DFUSEEXP_FAULTS $(static) -I. $< -o $@ $(LDFLAGS) $(libs)

fault: $(BUILD)/fuseexp-fault ## builds build/fuseexp-fault: start-up steps fail on demand (for the tests)

asan: $(BUILD)/fuseexp-asan ## builds build/fuseexp-asan: glibc, address and undefined-behaviour sanitizers
tsan: $(BUILD)/fuseexp-tsan ## builds build/fuseexp-tsan: glibc, thread sanitizer
$(BUILD)/fuseexp-asan: sanitizer := -fsanitize=address,undefined -fno-sanitize-recover=undefined
$(BUILD)/fuseexp-tsan: sanitizer := -fsanitize=thread
$(BUILD)/fuseexp-asan $(BUILD)/fuseexp-tsan: $(BUILD)/harness.c fuseexp.c fuseexp.h Makefile
	$(Q)$(CC) $(required) -O1 -g -fno-omit-frame-pointer $(sanitizer) -DFUSEEXP_FAULTS $(glibc) -I. $< -o $@ $(glibc_l)

deps: $(deps)/.done ## builds libfuse3, libdeflate and libzstd for musl from the distribution's source packages

# The machine's own package sources, as a private deb-src list: nothing outside the build directory is touched.
apt_src := -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$(CURDIR)/$(deps)/apt/parts \
           -o Dir::State::Lists=$(CURDIR)/$(deps)/apt/lists -o APT::Sandbox::User= -o Acquire::Languages=none -qq
musl_env := CC='$(MUSL_CC)' CFLAGS='-O2 -ffunction-sections -ffile-prefix-map=$(CURDIR)=. -idirafter $(CURDIR)/$(deps)/kernel'

$(deps)/.done:
	@$(MAKE) --no-print-directory need-build
	@echo "fetching the sources of libfuse3, libdeflate and libzstd"
	@rm -rf $(deps) && cd $(CURDIR) && mkdir -p $(deps)/apt/parts $(deps)/apt/lists/partial $(deps)/src $(deps)/lib \
	    $(deps)/include/fuse3 $(deps)/kernel
	@for d in linux asm-generic; do ln -s /usr/include/$$d $(deps)/kernel/$$d; done
	@ln -s "$$(dirname "$$(echo '#include <asm/types.h>' | gcc -E - | sed -n 's/^# 1 "\(.*asm\/types.h\)".*/\1/p')")" $(deps)/kernel/asm
	@for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do [ ! -s "$$f" ] || \
	    sed -n 's/^deb /deb-src /p' "$$f" > "$(deps)/apt/parts/$$(basename "$$f" .list).list"; done
	@for f in /etc/apt/sources.list.d/*.sources; do [ ! -s "$$f" ] || \
	    sed 's/^Types:.*/Types: deb-src/' "$$f" > "$(deps)/apt/parts/$$(basename "$$f")"; done
	@apt-get $(apt_src) update
	@cd $(deps)/src && apt-get $(apt_src) source fuse3 libdeflate libzstd >/dev/null
	@echo "building libfuse3 for musl"
	@cd $(deps)/src/fuse3-*/ && $(musl_env) meson setup out --prefix=/usr --buildtype=plain --default-library=static \
	    -Dutils=false -Dexamples=false -Dtests=false -Ddisable-mtab=true >/dev/null && ninja -C out >/dev/null
	@cd $(deps) && cp src/fuse3-*/out/lib/libfuse3.a lib/ && cp src/fuse3-*/include/*.h src/fuse3-*/out/libfuse_config.h include/fuse3/
	@echo "building libdeflate and libzstd for musl"
	@$(musl_env) $(MAKE) -s -C $(deps)/src/libdeflate-*/ libdeflate.a >/dev/null
	@cd $(deps)/src/libdeflate-*/ && cp libdeflate.a ../../lib/ && cp libdeflate.h ../../include/
	@$(musl_env) $(MAKE) -s -C $(deps)/src/libzstd-*/lib libzstd.a ZSTD_LIB_COMPRESSION=0 ZSTD_LIB_DICTBUILDER=0 \
	    ZSTD_LIB_DEPRECATED=0 ZSTD_LEGACY_SUPPORT=0 >/dev/null
	@cd $(deps)/src/libzstd-*/lib && cp libzstd.a ../../../lib/ && cp zstd*.h ../../../include/
	@touch $@

# need-build, need-demo, need-check, need-bench: installs the packages that are missing (as root), or names them.
need-%:
	@missing=$$(for p in $(pkg_$*); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	[ -z "$$missing" ] || if [ "$$(id -u)" = 0 ]; then \
	    echo "installing:" $$missing && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $$missing >$(if $(V),&1,/dev/null) 2>&1 || \
	    { echo "could not install:" $$missing >&2; exit 1; }; \
	else echo "missing packages; as root: apt-get install --no-install-recommends" $$missing >&2; exit 1; fi

demo: need-demo ## installs what is missing, builds, then exports, mounts and reads an ext4 image, step by step
	@$(MAKE) --no-print-directory all
	@./test.sh --demo

check: need-check ## installs what is missing, builds every variant and runs test.sh
	@$(MAKE) --no-print-directory $(deps)/.done
	@$(MAKE) --no-print-directory --output-sync -j$$(nproc) all fault asan tsan lint
	./test.sh

bench: need-bench ## measures fuseexp beside the native file and every peer: one run, one table
	@$(MAKE) --no-print-directory all
	@./test.sh --bench

soak: ## (make check first) thirty minutes of start, load, kill and unmount
	./test.sh --soak

lint: lint-gcc lint-cppcheck lint-tidy lint-shell ## warnings as errors, cppcheck, clang-tidy, shellcheck, and the contents list against the banners
lint-gcc:
	$(CC) $(required) -Werror -O2 $(glibc) -fsyntax-only fuseexp.c
lint-cppcheck:
	cppcheck --quiet --std=c11 --language=c --enable=warning,performance,portability --inline-suppr --error-exitcode=1 \
	    -D_GNU_SOURCE -D__x86_64__ --suppress=missingIncludeSystem fuseexp.c
lint-tidy:
	clang-tidy --quiet --warnings-as-errors='*' \
	    --checks='-*,bugprone-*,-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier,clang-analyzer-*,-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling,-bugprone-narrowing-conversions,-clang-analyzer-optin.performance.Padding,-bugprone-assignment-in-if-condition' \
	    fuseexp.c -- $(required) -Wno-unused-command-line-argument $(glibc) 2>/dev/null
lint-shell:
	shellcheck test.sh .ci/run
	./test.sh --lint

$(BUILD)/fuseexp.8: README
	@mkdir -p $(BUILD)
	awk 'BEGIN { print ".TH FUSEEXP 8\n" } \
	     /^[A-Z][A-Z ]*$$/ { if (open) print ".fi"; printf ".SH %s\n.nf\n", $$0; open = 1; next } \
	     { gsub(/\\/, "\\e"); sub(/^    /, ""); sub(/^[.'"'"']/, "\\\\\\&&"); gsub(/-/, "\\-"); print }' README > $@

install: all $(BUILD)/fuseexp.8 ## installs the binary, the mount helpers and the manual page (PREFIX, DESTDIR)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man8 $(DESTDIR)/sbin
	install -m 755 $(BUILD)/fuseexp $(DESTDIR)$(PREFIX)/bin/fuseexp
	install -m 644 $(BUILD)/fuseexp.8 $(DESTDIR)$(PREFIX)/share/man/man8/fuseexp.8
	ln -sf $(PREFIX)/bin/fuseexp $(DESTDIR)/sbin/mount.fuseexp
	ln -sf $(PREFIX)/bin/fuseexp $(DESTDIR)/sbin/mount.fuse.fuseexp

uninstall: ## removes what install put there
	rm -f $(DESTDIR)$(PREFIX)/bin/fuseexp $(DESTDIR)$(PREFIX)/share/man/man8/fuseexp.8 \
	    $(DESTDIR)/sbin/mount.fuseexp $(DESTDIR)/sbin/mount.fuse.fuseexp

dist: ## packs the committed tree as build/fuseexp.tar.gz
	@mkdir -p $(BUILD)
	git archive --format=tar --prefix=fuseexp/ HEAD | gzip -n > $(BUILD)/fuseexp.tar.gz

clean: ## removes the binaries (the built libraries stay; distclean removes them too)
	rm -rf $(BUILD)/fuseexp*
distclean: ## removes the whole build directory
	rm -rf $(BUILD)

help: ## shows this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: all fault asan tsan deps demo check bench soak lint lint-gcc lint-cppcheck lint-tidy lint-shell install uninstall dist clean distclean help
.DELETE_ON_ERROR:
