# Scoria: build, test, run. `make help` lists what there is.
# Needs Go, git and make; `make deps` installs the rest (Debian 12 or Ubuntu, as root).

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS     := -X main.version=$(VERSION)
# Time for each fuzz target in `make test`, and arguments of `make run` and `make bench`.
FUZZTIME    ?= 5s
KEEP        ?=
ARGS        ?=

# Packages that boot guests; they run one after the other, by themselves.
GUESTS := ./integration ./integration/qemu

.DEFAULT_GOAL := build
.PHONY: help deps build lint test test-unit test-fuzz test-guests bench run clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

deps: ## installs what is missing (as root): QEMU, a guest kernel, busybox, fio, NBD tools
	@$(GO) run ./integration/deps

build: ## builds the programs into bin/
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

lint: ## gofmt, go vet, staticcheck, and that everything builds
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [[ -n $$unformatted ]]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) build ./...
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

test: deps build test-unit test-fuzz test-guests ## every test: unit, property, crash, fuzz, real clients, real guests

test-unit: ## unit, property and crash tests under the race detector
	$(GO) test -race -timeout 25m $$($(GO) list ./... | grep -v -x -e scoria/integration -e scoria/integration/qemu)

test-fuzz: ## each fuzz target for FUZZTIME
	@targets=$$($(GO) test -list '^Fuzz' ./... | awk '/^Fuzz/ { t[n++] = $$1 } /^ok/ { for (i = 0; i < n; i++) print $$2, t[i]; n = 0 }'); \
	while read -r package target; do \
		[[ -n $$package ]] || continue; \
		echo "fuzz $$package $$target $(FUZZTIME)"; \
		$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5s -timeout 5m $$package </dev/null; \
	done <<<"$$targets"

test-guests: ## real NBD clients, real guests in QEMU, kill -9
	SCORIA_REQUIRE=1 $(GO) test -count=1 -p 1 -timeout 25m $(GUESTS)

bench: deps build ## measures against qemu-storage-daemon; ARGS='…' for the benchmark's flags
	$(GO) run ./integration/bench $(ARGS)

run: deps build ## a real guest on a volume whose daemon is killed and restarted; KEEP=1 leaves the daemon running
	@$(GO) run ./integration/demo $(if $(KEEP),-keep) $(ARGS)

clean: ## removes what was built; downloads in .cache stay
	rm -rf bin
