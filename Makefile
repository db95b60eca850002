# Nidus. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BUILT := target/x86_64-unknown-linux-gnu/release

.PHONY: help setup build demo test lint unit testbed testbed-crates conformance bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing, from the system's packages
	@scripts/setup.sh

build: setup ## build target/release/nidus, envd and guest-init
	cargo build --release --workspace --bins $(WITH)
	@mkdir -p target/release
	@for b in nidus envd guest-init; do ln -f $(BUILT)/$$b target/release/$$b; done

demo: build ## set up, build the base template, run Python in a sandbox through the official SDK
	@scripts/demo.sh

lint: ## formatting and clippy, warnings are errors
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

unit: ## the crates' own tests
	cargo test --release --workspace

# Their S3 server is an example. Built together with the programs, and with the features that the tests
# bring, no crate is compiled twice.
test testbed testbed-crates conformance: WITH := --examples

testbed: testbed-crates ## all tests that need KVM and kernel NBD, the SDK suite among them, in an emulated machine
	$(BUILT)/testbed test --workspace --timeout 7200 --junit target/testbed.xml --only e2e-qemu --only daemon-qemu \
		--only e2e-firecracker --only daemon-firecracker

# The crates' tests want two processors, to have something happen at once.
testbed-crates: build ## those of the crates alone
	$(BUILT)/testbed test --workspace --cpus 2 --only kvm --only nbd --only memory --only vmm --only firecracker

conformance: build ## the official SDKs and a daemon under stress, on real VMs
	@conformance/run.sh

test: setup lint unit testbed-crates conformance ## set up, then all tests

bench: build ## measure, and write docs/performance.md
	@scripts/bench.sh

clean: ## remove what was built (not the data directory)
	cargo clean
	rm -rf .nidus conformance/js/node_modules
