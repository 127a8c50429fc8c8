# `make` without a target lists the targets. Tools are installed into .tools/ and node_modules/.
SHELL := bash -o pipefail -e -u
WEB := gateway/clients/web
BUF := $(WEB)/node_modules/.bin/buf
PRETTIER := $(WEB)/node_modules/.bin/prettier
YAML = $(shell git ls-files '*.yaml' '*.yml')
# End-to-end tests start this binary. With --workspace it shares the build results of `cargo test --workspace`.
BUILD_FOR_TESTS = cargo build --workspace --bin hapa
BENCH_RECORDED := tests/bench-peers/recorded.json
BENCH_PEERS := cargo run --quiet --release --package hapa-bench-peers --
BENCH_RATIOS := $(BENCH_PEERS) --peers floor --workloads W3,W1a,W1b,W2,W4,W5,W5h
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-13s\033[0m %s\n", $$1, $$2 }' Makefile

run: ## install missing tools, build, and run engine, mesh and gateway in the foreground; ENGINE=model|sim|URL
	@infra/tools/install run
	@cargo build $(if $(filter sim,$(ENGINE)),--package hapa --package hapa-engine-sim)
	@cargo run --quiet --package hapa -- dev $(if $(ENGINE),--engine $(ENGINE))

build: ## build the hapa binary
	cargo build

test: $(if $(T),,lint client) ## run every check, every test, and 20 s of fuzzing; T=cache: end-to-end tests of that name
	$(BUILD_FOR_TESTS)
	$(if $(T),cargo test --workspace --test e2e -- $(T),cargo test --workspace --lib --bins --tests)
	$(if $(T),,@tests/fuzz/run 20)

test-unit: ## run the unit and property tests of all crates; they start no process
	cargo test --workspace --lib --bins

test-e2e: client ## run the end-to-end tests; T=cache: those of that name
	@infra/tools/install test
	$(BUILD_FOR_TESTS)
	cargo test --workspace --test e2e -- $(T)

policy: ## run the policy tests: dependencies, sizes, words, names, documentation, manifests and the supply chain
	@infra/tools/install test
	cargo test --workspace --test policy

lint: proto ## check the formatting of Rust and YAML, clippy, dependencies and the protos
	@infra/tools/install test
	cargo fmt --all --check
	@$(PRETTIER) --log-level warn --check $(YAML)
	@.tools/python/bin/python -m yamllint --strict $(YAML)
	cargo clippy --workspace --all-targets --all-features -- --deny warnings
	cargo metadata --locked --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null
	.tools/bin/cargo-deny check bans licenses sources
	@infra/advisories

proto: $(BUF) ## check the style and format of the protos, and their compatibility with the last release
	$(BUF) lint
	$(BUF) format --diff --exit-code --path proto/hapa
	$(BUF) breaking --against proto/released.txtpb

release-proto: $(BUF) ## mark the current protos as released: later changes must be compatible
	$(BUF) build --exclude-source-info --path proto/hapa -o proto/released.txtpb

client: $(BUF) ## generate, build and test the TypeScript client
	npm --prefix $(WEB) test --silent

certs: ## create a test certificate authority and a certificate per role in data/certs
	@infra/certs data/certs

bench: bench-build ## compare HAPA with its peers, in a release build; ROUNDS=5 WORKLOADS=W1a,W4 PEERS=floor,envoy
	@$(BENCH_PEERS) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(WORKLOADS),--workloads $(WORKLOADS)) $(if $(PEERS),--peers $(PEERS))

bench-check: bench-build ## compare the ratios of HAPA to the floor with the recorded ones; fails if one is 15 % worse
	@$(BENCH_RATIOS) --check $(BENCH_RECORDED)

bench-record: bench-build ## record the ratios of HAPA to the floor for bench-check
	@$(BENCH_RATIOS) --record $(BENCH_RECORDED)

# hapa is built by itself, so that it has the features of a release.
bench-build:
	@infra/tools/install bench
	@cargo build --release --package hapa

bench-mesh: ## measure parts of the mesh: admission, traces, outbox, hostile clients and stalled readers
	@infra/tools/install run
	cargo build --release --package hapa --package hapa-bench --bin hapa
	cargo bench --package hapa --package hapa-bench --bench mesh

bench-store: ## measure inserts and reports with a million events; FULL=1: ten million
	@infra/tools/install test
	cargo bench --package hapa --package hapa-bench --bench store -- $(if $(FULL),--full)

load: ## fill the store at DATABASE_URL with ten million events and a million occurrences
	cargo bench --package hapa --package hapa-bench --bench store -- --full --into "$${DATABASE_URL:?names the store}"

test-vllm: ## install vLLM for the CPU (7 GB, some minutes) and run the tests that need it
	@infra/vllm/install
	$(BUILD_FOR_TESTS)
	infra/vllm/run cargo test --workspace --test e2e -- --ignored --test-threads=1 vllm

fuzz: ## run all fuzz targets together for one minute; MINUTES=10: longer
	@infra/tools/install test
	@tests/fuzz/run $$((60 * $(or $(MINUTES),1)))

advisories: ## check the dependencies against the RustSec advisories, if their database can be reached
	@infra/tools/install test
	@infra/advisories

release: ## build the hapa binary for production, with its dependency list embedded (cargo auditable)
	@infra/tools/install release
	.tools/bin/cargo-auditable auditable build --release --locked --package hapa

sbom: ## write the software bill of materials (CycloneDX) to target/hapa.cdx.json
	@infra/tools/install release
	@infra/sbom target/hapa.cdx.json

fmt: $(BUF) ## format Rust, YAML and protos
	cargo fmt --all
	@$(PRETTIER) --log-level warn --write $(YAML)
	$(BUF) format --write --path proto/hapa

clean: ## remove build results, installed tools and the development data
	rm -rf target tests/fuzz/target .tools data $(WEB)/node_modules $(WEB)/dist $(WEB)/src/gen

$(BUF): $(WEB)/package-lock.json
	npm --prefix $(WEB) ci --no-audit --no-fund --silent
	@touch $@

.PHONY: help run build test test-unit test-e2e policy lint proto release-proto client certs bench bench-check bench-record bench-build bench-mesh bench-store load test-vllm fuzz advisories release sbom fmt clean
