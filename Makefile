# make demo   the whole story, on this machine (Debian 12, root)
# make test   every test
# Both install what they need.

STATE   ?= /var/lib/violin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
GO      ?= go

PACKAGES = qemu-system-x86 openvswitch-switch mmdebstrap squashfs-tools cpio kmod gcc libc6-dev \
	libopenmpi-dev busybox-static iproute2 ca-certificates qemu-utils ovmf \
	e2fsprogs dosfstools mtools fdisk syslinux syslinux-common systemd-boot-efi

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: demo test deps build image lint unit fuzz e2e soak bench generate clean

demo: deps build image
	$(GO) run ./demo -violin bin/violin -state $(STATE)

test: deps lint build unit fuzz image e2e

deps:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "installing" $$missing; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
	fi

build:
	$(GO) build -ldflags "-X main.version=$(VERSION)" -o bin/violin ./cmd/violin

# The image of the examples, with their programs.
image: deps build
	@mkdir -p bin/guest
	mpicc -O2 -Wall -o bin/guest/mandelbrot examples/mandelbrot/mandelbrot.c
	$(CC) -O2 -Wall -o bin/guest/ledger examples/ledger/ledger.c
	$(CC) -O2 -Wall -o bin/guest/blocks examples/blocks/blocks.c
	bin/violin --state-dir $(STATE) image build mpi -f images/mpi/image.yaml

lint:
	@bad=$$(gofmt -l api cmd demo internal test); if [ -n "$$bad" ]; then echo "gofmt:" $$bad; exit 1; fi
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

unit:
	$(GO) test -race -timeout 15m ./...

# A few seconds for everything that parses foreign bytes. A number of inputs, not a time:
# at the end of a time, Go before 1.27 may report its own deadline as a failure
# (go.dev/issue/75804).
FUZZTIME ?= 60000x
fuzz:
	@set -e; for d in $$(grep -rlE '^func Fuzz' --include=*_test.go internal | xargs -n1 dirname | sort -u); do \
		for f in $$(grep -rhoE '^func Fuzz[A-Za-z0-9_]*' $$d/*_test.go | sed 's/func //'); do \
			$(GO) test -run XXX -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./$$d; \
		done; done

# Real QEMU, Open vSwitch and namespaces; as root.
e2e: image
	bin/violin --state-dir $(STATE) image build disk -f images/disk/image.yaml
	bin/violin --state-dir $(STATE) image build cloud -f images/cloud/image.yaml
	VIOLIN_E2E=1 VIOLIN_STATE_DIR=$(STATE) $(GO) test -p 1 -timeout 50m ./internal/store ./internal/lab ./internal/openflow ./internal/fabric ./internal/gateway ./internal/qmp ./internal/migration/... ./internal/hypervisor/... ./internal/agent ./test/...

# The long forms: a thousand cuts of real VMs under load (more than an hour), a hundred of
# a VM that writes to its disks, and the protocol's exploration. VIOLIN_SEED=N, from a run's log, repeats its choices.
soak: deps build image
	VIOLIN_E2E=1 VIOLIN_CUTS=1000 VIOLIN_STATE_DIR=$(STATE) $(GO) test -count 1 -timeout 4h -v -run TestSoak ./test/e2e
	VIOLIN_E2E=1 VIOLIN_SNAPSHOTS=100 VIOLIN_STATE_DIR=$(STATE) $(GO) test -count 1 -timeout 1h -v -run TestDisks ./test/e2e
	VIOLIN_LONG=1 $(GO) test -timeout 60m ./internal/cut ./internal/coloring

bench:
	$(GO) test -run XXX -bench . ./internal/store ./internal/migration/...

# Needs protobuf-compiler and libprotobuf-dev.
generate:
	$(GO) install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
	$(GO) install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1
	PATH="$$PATH:$$($(GO) env GOPATH)/bin" protoc --proto_path=api --go_out=. --go_opt=module=violin \
		--connect-go_out=. --connect-go_opt=module=violin,simple api/violin/v1/*.proto

clean:
	rm -rf bin
