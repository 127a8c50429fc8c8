# `make` alone lists the targets. Everything that is installed goes into .tools/ and node_modules/.
SHELL := bash -o pipefail -e -u
WEB := gateway/clients/web
BUF := $(WEB)/node_modules/.bin/buf
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2 }' Makefile

run: ## install what is missing, build, and run engine, mesh and gateway in the foreground; ENGINE=model|sim|URL
	@infra/tools/install run
	@cargo build $(if $(filter sim,$(ENGINE)),--package hapa --package hapa-engine-sim)
	@cargo run --quiet --package hapa -- dev $(if $(ENGINE),--engine $(ENGINE))

build: ## build the one binary
	cargo build

test: lint build client ## run every check and every test, on real parts, and 20 s of fuzzing
	cargo test --workspace --lib --bins --tests
	@fuzz/run 20

lint: proto ## check formatting, clippy, dependencies and the protos
	@infra/tools/install test
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- --deny warnings
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
	.tools/bin/cargo-deny check bans licenses sources
	@infra/advisories

proto: $(BUF) ## check the protos: style, format, and compatibility with what was released
	$(BUF) lint
	$(BUF) format --diff --exit-code --path proto/hapa
	$(BUF) breaking --against proto/released.txtpb

release-proto: $(BUF) ## declare the protos of this moment released: from now on they may only grow
	$(BUF) build --exclude-source-info --path proto/hapa -o proto/released.txtpb

client: $(BUF) ## generate, build and test the TypeScript client
	npm --prefix $(WEB) test --silent

certs: ## make a test authority and a certificate per role in data/certs
	@infra/certs data/certs

bench: ## measure what the mesh adds to an engine, in a release build
	@infra/tools/install run
	cargo build --release --package hapa --package hapa-tests --bin hapa
	cargo bench --package hapa --package hapa-tests --bench mesh

bench-store: ## measure how fast a million events come in and reports go out; FULL=1: ten million
	@infra/tools/install test
	cargo bench --package hapa --package hapa-tests --bench store -- $(if $(FULL),--full)

load: ## fill the store DATABASE_URL=... with ten million events, a million occurrences, and keep it
	cargo bench --package hapa --package hapa-tests --bench store -- --full --into "$${DATABASE_URL:?names the store}"

test-vllm: ## run the stories that need a real vLLM, which it installs for the CPU: 7 GB, minutes
	@infra/vllm/install
	cargo build
	infra/vllm/run cargo test --package hapa-tests --test stories -- --ignored --test-threads=1 vllm

fuzz: ## feed the fuzz targets for a minute, all at once; MINUTES=10: longer
	@infra/tools/install test
	@fuzz/run $$((60 * $(or $(MINUTES),1)))

advisories: ## check the dependencies against the RustSec advisories, where their database can be reached
	@infra/tools/install test
	@infra/advisories

release: ## build the one binary for production, with the list of its dependencies inside (cargo auditable)
	@infra/tools/install release
	.tools/bin/cargo-auditable auditable build --release --locked --package hapa

sbom: ## write the software bill of materials (CycloneDX) to target/hapa.cdx.json
	@infra/tools/install release
	@infra/sbom target/hapa.cdx.json

fmt: $(BUF) ## format Rust and protos
	cargo fmt --all
	$(BUF) format --write --path proto/hapa

clean: ## remove what was built and installed, and the development data
	rm -rf target fuzz/target .tools data $(WEB)/node_modules $(WEB)/dist $(WEB)/src/gen

$(BUF): $(WEB)/package-lock.json
	npm --prefix $(WEB) ci --no-audit --no-fund --silent
	@touch $@

.PHONY: help run build test lint proto release-proto client certs bench bench-store load test-vllm fuzz advisories release sbom fmt clean
