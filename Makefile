# Scoria: build, test, run. `make help` lists what there is.
# Needs Go, git and make; `make deps` installs the rest (Debian 12 or Ubuntu, as root).

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS     := -X main.version=$(VERSION)
# Time for each fuzz target in `make test` (a number and s, m or h), and arguments of `make run` and `make bench`.
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

# Not with -fuzztime: at its end Go before 1.27 now and then reports the end itself as a failure, "context deadline
# exceeded" (golang/go#75804). An interrupt ends a run in order too; what is still there a minute later has hung, and fails.
test-fuzz: ## each fuzz target for FUZZTIME
	@cache=$$($(GO) env GOCACHE)/fuzz; bin=$$(mktemp -d); trap 'rm -rf "$$bin"' EXIT; \
	packages=$$($(GO) list -f '{{.ImportPath}} {{.Dir}}' ./...); \
	while read -r package dir; do \
		grep -qs '^func Fuzz' "$$dir"/*_test.go || continue; \
		$(GO) test -c -fuzz . -o "$$bin/test" "$$package"; \
		cd "$$dir"; \
		targets=$$("$$bin/test" -test.list '^Fuzz'); \
		for target in $$targets; do \
			echo "fuzz $$package $$target $(FUZZTIME)"; \
			timeout --foreground --preserve-status --signal INT --kill-after 1m $(FUZZTIME) \
				"$$bin/test" -test.run '^$$' -test.fuzz "^$$target\$$" -test.fuzzcachedir "$$cache/$$package" \
				-test.fuzzminimizetime 5s </dev/null; \
		done; \
		cd "$$OLDPWD"; \
	done <<<"$$packages"

test-guests: ## real NBD clients, real guests in QEMU, kill -9
	SCORIA_REQUIRE=1 $(GO) test -count=1 -p 1 -timeout 25m $(GUESTS)

bench: deps build ## measures against qemu-storage-daemon; ARGS='…' for the benchmark's flags
	$(GO) run ./integration/bench $(ARGS)

run: deps build ## a real guest on a volume whose daemon is killed and restarted; KEEP=1 leaves the daemon running
	@$(GO) run ./integration/demo $(if $(KEEP),-keep) $(ARGS)

clean: ## removes what was built; downloads in .cache stay
	rm -rf bin
