# Everything that is done with this repository. `make help` lists it.
SHELL := /bin/sh
GO ?= go
BIN := bin
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/demarc/demarc/internal/version.version=$(VERSION) -X main.version=$(VERSION)
OBJECT := agent/core/demarc_bpfel.o

# Packages whose tests need root and the kernel's BPF. They fail without.
# The longest first: two packages run at a time, each in cgroups and namespaces of its own.
ROOT_TESTS := ./test/e2e ./agent/core/... ./agent/ring ./test/...

.DEFAULT_GOAL := help
.PHONY: help build docs generate check-generate lint test test-kernels test-hubble test-netpol test-faults lateral unit root demo tcb fuzz bench bench-micro clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## put the three binaries into bin/ (needs only Go)
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

docs: build ## manual pages and completion scripts of the command line, into bin/
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) $(BIN)/demarc docs man $(BIN)/man
	$(BIN)/demarc docs completions $(BIN)/completions

generate: ## compile bpf/ and write the generated Go
	scripts/install build
	cd agent/core && $(GO) generate ./...

check-generate: ## fail if the committed objects are not what bpf/ compiles to
	scripts/install build
	scripts/check-generate

lint: ## formatting and vet
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags kernels ./test/vm/...
	$(GO) vet -tags churn,soak ./test/e2e
	$(GO) vet -tags packages ./test/systemd
	$(GO) vet -tags kubernetes ./test/systemd ./test/cluster
	$(GO) vet -tags hubble ./test/e2e

unit:
	$(GO) test -race $$($(GO) list ./... | grep -v -e /agent/core -e /agent/ring -e '/test/')

root:
	scripts/install test
	test/run -race -p 2 -timeout 40m $(ROOT_TESTS)

test: ## everything that CI runs: generated code, lint, unit tests, tests as root
	scripts/install test
	$(MAKE) --no-print-directory check-generate lint tcb unit root

# Newest last. Kernels are kept outside the checkout, by checksum; `make clean` removes them.
KERNELS ?= 5.10 6.1 6.12 6.18 7.3
KERNEL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/demarc/kernels
test-kernels: ## demarc in virtual machines with the kernels KERNELS (5.10 6.1 6.12 6.18 7.3)
	scripts/install kernels
	test/vm/fetch $(KERNEL_CACHE) $(KERNELS)
	DEMARC_KERNELS=$(KERNEL_CACHE) DEMARC_KERNEL_SERIES="$(KERNELS)" test/run -tags kernels -count=1 -v -timeout 30m ./test/vm

.PHONY: test-churn
test-churn: ## 10,000 cgroups a minute for 3 minutes, each of which dials at once
	scripts/install test
	test/run -tags churn -count=1 -v -timeout 20m -run '^TestX13Churn$$' ./test/e2e

DURATION ?= 30m

.PHONY: soak
soak: ## two hosts under load, whose policy, keys, cgroups and daemons change all the time, for DURATION=30m
	scripts/install test
	DEMARC_SOAK=$(DURATION) test/run -tags soak -count=1 -v -timeout 100h -run '^TestSoak$$' ./test/e2e

.PHONY: test-kubernetes
test-kubernetes: ## chart and kustomize base rendered and compared; identity by a real API server, which takes minutes to build
	scripts/install test
	cd test/kubernetes && $(GO) vet ./... && $(GO) test -count=1 ./...
	@rm -rf $(BIN)/kubernetes && mkdir -p $(BIN)/kubernetes
	cd test/kubernetes && $(GO) run ./render ../../deploy/kubernetes $(CURDIR)/$(BIN)/kubernetes/manifests
	cd test/apiserver && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(CURDIR)/$(BIN)/kubernetes/etcd go.etcd.io/etcd/server/v3
	cd test/apiserver && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w $(KUBERNETES_VERSION)' -o $(CURDIR)/$(BIN)/kubernetes/kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
	DEMARC_KUBERNETES=$(CURDIR)/$(BIN)/kubernetes test/run -tags kubernetes -count=1 -v -timeout 30m -run '^TestKubernetes' ./test/systemd
# What a release's programs are told when they are built: an API server asks itself.
KUBERNETES_VERSION = $(patsubst %,-X k8s.io/component-base/version.%,gitVersion=v1.37.2 gitMajor=1 gitMinor=37)

.PHONY: packages image vagrant test-packages
ARCH ?= amd64 arm64
packages: ## deb and rpm for ARCH (amd64 arm64), in bin/packages
	@for arch in $(ARCH); do deploy/packages/build $$arch $(BIN)/packages || exit 1; done

image: ## a container image for amd64 and arm64, as an OCI layout in bin/packages; needs no daemon
	deploy/packages/build image $(BIN)/packages

vagrant: ## what the Vagrantfile's three machines install, in bin/vagrant: package, keyring, policy, API
	@mkdir -p $(BIN)/vagrant && rm -f $(BIN)/vagrant/demarc_*.deb $(BIN)/vagrant/keyring
	deploy/packages/build amd64 $(BIN)/vagrant && rm -f $(BIN)/vagrant/*.rpm
	CGO_ENABLED=0 GOOS=linux GOARCH=amd64 $(GO) build -trimpath -o $(BIN)/vagrant/api ./test/demo/api
	$(GO) run ./cmd/demarc keys generate tag --out $(BIN)/vagrant/keyring
	cp test/demo/shop.yaml deploy/vagrant/intrude $(BIN)/vagrant/

test-packages: ## packages and image built twice, judged by lintian, installed, upgraded, run and removed under a systemd
	scripts/install packages
	@rm -rf $(BIN)/test-packages
	PACKAGE_VERSION=0.1.0 deploy/packages/build amd64 $(BIN)/test-packages/old
	PACKAGE_VERSION=0.2.0 deploy/packages/build amd64 $(BIN)/test-packages/new
	PACKAGE_VERSION=0.2.0 deploy/packages/build arm64 $(BIN)/test-packages/new
	PACKAGE_VERSION=0.2.0 deploy/packages/build amd64 $(BIN)/test-packages/again
	PACKAGE_VERSION=0.1.0 deploy/packages/build image $(BIN)/test-packages/old
	PACKAGE_VERSION=0.2.0 deploy/packages/build image $(BIN)/test-packages/new
	PACKAGE_VERSION=0.2.0 deploy/packages/build image $(BIN)/test-packages/again
	PACKAGE_VERSION=0.2.0 $(MAKE) --no-print-directory BIN=$(BIN)/test-packages vagrant
	DEMARC_PACKAGES=$(CURDIR)/$(BIN)/test-packages test/run -tags packages -count=1 -v -run 'Package|Image|Vagrant' -timeout 20m ./test/systemd

test-hubble: ## build Cilium's hubble command (some minutes), and compare what it shows with what it should
	scripts/install test
	@mkdir -p $(BIN)
	cd test/hubble && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(CURDIR)/$(BIN)/hubble github.com/cilium/cilium/hubble
	DEMARC_HUBBLE=$(CURDIR)/$(BIN)/hubble test/run -tags hubble -count=1 -v -timeout 20m -run '^TestHubble$$' ./test/e2e

CHECKS ?= 5000
test-netpol: ## every case of NetworkPolicy and ClusterNetworkPolicy on the wire, CHECKS (5000) random clusters
	scripts/install test
	$(GO) test -count=1 -v -timeout 30m -run '^Test(Facts|Random)$$' ./policy/kubernetes -rapid.checks=$(CHECKS)
	DEMARC_NETPOL=all test/run -count=1 -v -timeout 60m ./test/netpol

FAULTS ?= 200
test-faults: ## the core killed and failed at FAULTS (200) places of each phase of its life, under load
	scripts/install test
	DEMARC_FAULTS=$(FAULTS) test/run -count=1 -v -timeout 4h ./test/fault

lateral: ## what intruders do, with their tools, and what is found of it; a benign day, and what is not
	scripts/install test
	DEMARC_LATERAL=all test/run -count=1 -v -timeout 30m ./test/lateral

demo: ## nginx -> API -> PostgreSQL in namespaces of its own, what is refused, and a scan found
	scripts/install demo
	@test/run --demo

tcb: ## lines and imports of the trusted core, against its golden file
	@out=$$($(GO) test ./agent/core -run '^TestTCB' -count=1 -v 2>&1); status=$$?; \
	echo "$$out" | grep -v -e '^=== ' -e '^--- ' -e '^ok' -e '^PASS'; exit $$status

FUZZTIME ?= 30s
fuzz: ## run each fuzz target for FUZZTIME (30s)
	scripts/fuzz $(FUZZTIME)

ROUNDS ?= 15
CHANGES ?= 50
STARTS ?= 20
bench: ## the largest policies, CHANGES (50) of one, STARTS (20) of the core, ROUNDS (15) of traffic beside no agent, nftables and tc
	scripts/install bench
	@mkdir -p $(BIN)
	$(GO) test ./policy -run '^$$' -bench . -benchmem
	test/run -run '^$$' -bench . ./agent/core
	@# A goal that is missed in the one does not keep the other from being measured.
	status=0; \
	CHANGES=$(CHANGES) BENCH_JSON=$(CURDIR)/$(BIN)/bench-change.json test/run -count=1 -v -timeout 60m -run '^TestChange$$' ./test/bench || status=1; \
	STARTS=$(STARTS) BENCH_JSON=$(CURDIR)/$(BIN)/bench-start.json test/run -count=1 -v -timeout 60m -run '^TestStart$$' ./test/bench || status=1; \
	ROUNDS=$(ROUNDS) BENCH_JSON=$(CURDIR)/$(BIN)/bench.json test/run -count=1 -v -timeout 60m -run '^TestTraffic$$' ./test/bench || status=1; \
	exit $$status

REPEAT ?= 200000
bench-micro: ## single packets, REPEAT (200000) times, net of an empty program; events through the agent, up to a million a second; 200 workloads; a scrape of its metrics
	scripts/install bench
	@mkdir -p $(BIN)
	status=0; \
	REPEAT=$(REPEAT) BENCH_JSON=$(CURDIR)/$(BIN)/bench-micro.json test/run -count=1 -v -timeout 20m -run '^TestPackets$$' ./test/bench || status=1; \
	REPEAT=$(REPEAT) BENCH_JSON=$(CURDIR)/$(BIN)/bench-events.json test/run -count=1 -v -timeout 20m -run '^TestEvents$$' ./test/bench || status=1; \
	REPEAT=$(REPEAT) BENCH_JSON=$(CURDIR)/$(BIN)/bench-workloads.json test/run -count=1 -v -timeout 10m -run '^TestWorkloads$$' ./test/bench || status=1; \
	REPEAT=$(REPEAT) BENCH_JSON=$(CURDIR)/$(BIN)/bench-scrape.json test/run -count=1 -v -timeout 10m -run '^TestScrape$$' ./test/bench || status=1; \
	exit $$status

clean: ## remove what the build made, and kernels that were fetched
	rm -rf $(BIN) $(KERNEL_CACHE)
