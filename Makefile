# One word each. `make verify` never edits; `make fix` does.
.PHONY: help deps demo test torture verify fix bench
export CARGO_TERM_COLOR ?= always

help:
	@echo "make demo     a three-member cloud with a real VM on this machine, and a leader killed"
	@echo "make test     every test but the long forms"
	@echo "make torture  the long forms: kill -9 cycles, start orders, cut pushes, histories under faults"
	@echo "make verify   format, lints, documentation; edits nothing"
	@echo "make fix      what of that can be repaired by a tool"
	@echo "make bench    the figures in docs"
	@echo "make deps     installs what tests and demo need (Debian, Ubuntu)"

deps:
	deploy/install-deps.sh

demo:
	deploy/demo.sh

test: deps
	cargo test --workspace

torture:
	MAINSTAY_KILL_CYCLES=200 cargo test --test process kill_cycles -- --nocapture
	MAINSTAY_START_ROUNDS=20 cargo test --test process any_start_order -- --nocapture
	MAINSTAY_PUSH_CUTS=20 cargo test --test process interrupted_push -- --nocapture
	MAINSTAY_FLIPS=50 cargo test --test process flipped_bit -- --nocapture
	MAINSTAY_FAULT_POINTS=100 cargo test --test process one_failing_call -- --nocapture
	MAINSTAY_COMMAND_POINTS=1000 cargo test --test process when_run_again -- --nocapture
	MAINSTAY_PAUSE_SECONDS=60 cargo test --test process paused -- --nocapture
	MAINSTAY_CHURN=20000 cargo test -p mainstay-storage --test conformance churn -- --nocapture
	MAINSTAY_OCI_KILLS=100 cargo test --test process pushes_that_were_answered -- --nocapture
	MAINSTAY_ABANDONED=10000 cargo test --test process abandoned_uploads -- --nocapture
	MAINSTAY_THIN_LINE_MB=50 cargo test --test process thin_line -- --nocapture
	MAINSTAY_STOP_ROUNDS=10 cargo test --test process clean_stop -- --nocapture
	MAINSTAY_GROW_ROUNDS=10 cargo test --test process one_grows -- --nocapture
	MAINSTAY_LEADER_KILLS=100 MAINSTAY_LEADER_STOPS=30 cargo test --test process leader_kills -- --nocapture
	MAINSTAY_SCHEDULES=200 cargo test --test process histories_under_faults -- --nocapture
	MAINSTAY_PULL_MB=1024 MAINSTAY_PULL_NODES=10 cargo test --test process nodes_pull_at_once -- --nocapture
	cargo test --features seeded-bugs --test process seeded -- --nocapture
	MAINSTAY_CLONES=10 cargo test --test process suspended_template -- --nocapture
	MAINSTAY_SIM_SEEDS=20000 cargo test -p mainstay-model --test model sim -- --nocapture
	cargo test -p mainstay-model --features seeded-bugs --test model sim -- --nocapture
	MAINSTAY_GC_RACE_SECONDS=1800 cargo test --test process collection_beside -- --nocapture
	MAINSTAY_CHUNK_FLIPS=200 cargo test --test process bits_that_flip -- --nocapture
	MAINSTAY_CHUNK_LIVES=100 cargo test -p mainstay-storage --test conformance power_cuts_during -- --nocapture
	MAINSTAY_CHUNK_LIVES=300 cargo test -p mainstay-storage --test conformance members_that_die -- --nocapture
	MAINSTAY_PUSH_MB=2048 cargo test --test process a_large_push -- --nocapture
	MAINSTAY_ABANDONED=10000 cargo test --lib tiny_uploads -- --nocapture
	MAINSTAY_IDLE_SECONDS=100 cargo test --test process every_client -- --nocapture
	MAINSTAY_BUCKET_STEPS=1000 cargo test --test process members_rely_on_a_real_bucket -- --nocapture
	MAINSTAY_FLEET_NODES=5000 cargo test --test process a_fleet -- --nocapture

verify:
	cargo fmt --all -- --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

fix:
	cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

bench:
	cargo build --release
	benches/versus/run.sh
